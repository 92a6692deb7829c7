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
    from polyak_cli.averaging.planning import Plan
    from polyak_cli.averaging.schemes import coefficients, effective_number
    from polyak_cli.checkpoints import (
        Checkpoint,
        PassedOver,
        Problem,
        Selection,
        model_files,
        select,
    )
    from polyak_cli.errors import (
        CheckpointError,
        FormatError,
        MismatchError,
        MissingExtraError,
        OutputError,
        PolyakError,
        UsageError,
    )
    from polyak_cli.evaluation.comparison import Compared, Comparison, Gain, compare
    from polyak_cli.evaluation.data import Split, halves
    from polyak_cli.evaluation.evaluator import Evaluator, RowScores, Score, evaluate
    from polyak_cli.evaluation.recalibration import Recalibration, recalibrate
    from polyak_cli.evaluation.sample_run import TrainReport, train
    from polyak_cli.evaluation.significance import Paired, mcnemar, paired_difference, verdict
    from polyak_cli.examining.differences import Differences, Distances, diff, distances
    from polyak_cli.examining.health import Checked, Health, check
    from polyak_cli.examining.inspection import Inspection, inspect
    from polyak_cli.examining.verification import Discrepancy, Verification, verify
    from polyak_cli.pipeline import Options, Report, average, plan, run
    from polyak_cli.pipeline.sweeping import Sweep, sweep
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
    "Evaluator",
    "FormatError",
    "Gain",
    "Health",
    "Inspection",
    "MismatchError",
    "MissingExtraError",
    "Options",
    "OutputError",
    "Paired",
    "PassedOver",
    "Plan",
    "PolyakError",
    "Problem",
    "Recalibration",
    "Report",
    "RowScores",
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
    "paired_difference",
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
    "Compared": "evaluation.comparison",
    "Comparison": "evaluation.comparison",
    "Differences": "examining.differences",
    "Discrepancy": "examining.verification",
    "Distances": "examining.differences",
    "Evaluator": "evaluation.evaluator",
    "FormatError": "errors",
    "Gain": "evaluation.comparison",
    "Health": "examining.health",
    "Inspection": "examining.inspection",
    "MismatchError": "errors",
    "MissingExtraError": "errors",
    "Options": "pipeline",
    "RowScores": "evaluation.evaluator",
    "OutputError": "errors",
    "Paired": "evaluation.significance",
    "PassedOver": "checkpoints",
    "Plan": "averaging.planning",
    "PolyakError": "errors",
    "Problem": "checkpoints",
    "Recalibration": "evaluation.recalibration",
    "Report": "pipeline",
    "Score": "evaluation.evaluator",
    "Selection": "checkpoints",
    "Split": "evaluation.data",
    "Sweep": "pipeline.sweeping",
    "TrainReport": "evaluation.sample_run",
    "UsageError": "errors",
    "Verification": "examining.verification",
    "average": "pipeline",
    "check": "examining.health",
    "coefficients": "averaging.schemes",
    "compare": "evaluation.comparison",
    "diff": "examining.differences",
    "distances": "examining.differences",
    "effective_number": "averaging.schemes",
    "evaluate": "evaluation.evaluator",
    "halves": "evaluation.data",
    "inspect": "examining.inspection",
    "mcnemar": "evaluation.significance",
    "model_files": "checkpoints",
    "paired_difference": "evaluation.significance",
    "plan": "pipeline",
    "recalibrate": "evaluation.recalibration",
    "run": "pipeline",
    "select": "checkpoints",
    "sweep": "pipeline.sweeping",
    "train": "evaluation.sample_run",
    "verdict": "evaluation.significance",
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
