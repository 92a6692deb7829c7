"""Average the checkpoints of a training run into one better-behaved model.

>>> from polyak_cli import average, plan
>>> plan("ckpts/", scheme="exp", alpha=2).coefficients          # doctest: +SKIP
>>> average("ckpts/", "final.h5", scheme="exp", alpha=2, last=10)  # doctest: +SKIP
>>> [score.loss for score in evaluate("final.h5", Split("my rows", x, y))]  # doctest: +SKIP

Importing this package imports nothing else; each name below is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polyak_cli.averaging.options import Options
    from polyak_cli.averaging.planning import Plan, plan
    from polyak_cli.averaging.schemes import coefficients, effective_number
    from polyak_cli.checkpoints import (
        Checkpoint,
        PassedOver,
        Problem,
        Selection,
        model_files,
        select,
    )
    from polyak_cli.comparison import Compared, Comparison, Gain, compare
    from polyak_cli.data import Split, halves
    from polyak_cli.errors import (
        CheckpointError,
        FormatError,
        MismatchError,
        MissingExtraError,
        OutputError,
        PolyakError,
        UsageError,
    )
    from polyak_cli.examining.differences import Differences, Distances, diff, distances
    from polyak_cli.examining.health import Checked, Health, check
    from polyak_cli.examining.inspection import Inspection, inspect
    from polyak_cli.examining.verification import Discrepancy, Verification, verify
    from polyak_cli.models import Examiner, Outcome, Score, TrainReport, evaluate, train
    from polyak_cli.pipeline import Report, average, run
    from polyak_cli.recalibration import Recalibration, recalibrate
    from polyak_cli.statistics import Paired, mcnemar, paired, verdict
    from polyak_cli.sweeping import Sweep, sweep
    from polyak_cli.watching import watch

__version__ = "0.1.0"

__all__ = [
    "Checked",
    "Checkpoint",
    "CheckpointError",
    "Compared",
    "Comparison",
    "Differences",
    "Discrepancy",
    "Distances",
    "Examiner",
    "FormatError",
    "Gain",
    "Health",
    "Inspection",
    "MismatchError",
    "MissingExtraError",
    "Options",
    "Outcome",
    "OutputError",
    "Paired",
    "PassedOver",
    "Plan",
    "PolyakError",
    "Problem",
    "Recalibration",
    "Report",
    "Score",
    "Selection",
    "Split",
    "Sweep",
    "TrainReport",
    "UsageError",
    "Verification",
    "__version__",
    "average",
    "check",
    "coefficients",
    "compare",
    "diff",
    "distances",
    "effective_number",
    "evaluate",
    "halves",
    "inspect",
    "mcnemar",
    "model_files",
    "paired",
    "plan",
    "recalibrate",
    "run",
    "select",
    "sweep",
    "train",
    "verdict",
    "verify",
    "watch",
]

_HOMES = {
    "Checked": "examining.health",
    "Checkpoint": "checkpoints",
    "CheckpointError": "errors",
    "Compared": "comparison",
    "Comparison": "comparison",
    "Differences": "examining.differences",
    "Discrepancy": "examining.verification",
    "Distances": "examining.differences",
    "Examiner": "models",
    "FormatError": "errors",
    "Gain": "comparison",
    "Health": "examining.health",
    "Inspection": "examining.inspection",
    "MismatchError": "errors",
    "MissingExtraError": "errors",
    "Options": "averaging.options",
    "Outcome": "models",
    "OutputError": "errors",
    "Paired": "statistics",
    "PassedOver": "checkpoints",
    "Plan": "averaging.planning",
    "PolyakError": "errors",
    "Problem": "checkpoints",
    "Recalibration": "recalibration",
    "Report": "pipeline",
    "Score": "models",
    "Selection": "checkpoints",
    "Split": "data",
    "Sweep": "sweeping",
    "TrainReport": "models",
    "UsageError": "errors",
    "Verification": "examining.verification",
    "average": "pipeline",
    "check": "examining.health",
    "coefficients": "averaging.schemes",
    "compare": "comparison",
    "diff": "examining.differences",
    "distances": "examining.differences",
    "effective_number": "averaging.schemes",
    "evaluate": "models",
    "halves": "data",
    "inspect": "examining.inspection",
    "mcnemar": "statistics",
    "model_files": "checkpoints",
    "paired": "statistics",
    "plan": "averaging.planning",
    "recalibrate": "recalibration",
    "run": "pipeline",
    "select": "checkpoints",
    "sweep": "sweeping",
    "train": "models",
    "verdict": "statistics",
    "verify": "examining.verification",
    "watch": "watching",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'polyak_cli' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"polyak_cli.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
