"""Average the checkpoints of a training run into one better-behaved model.

>>> from polyak_cli import average, plan
>>> plan("ckpts/", scheme="exp", alpha=2).coefficients          # doctest: +SKIP
>>> average("ckpts/", "final.h5", scheme="exp", alpha=2, last=10)  # doctest: +SKIP
>>> [score.loss for score in evaluate("final.h5", Split("my rows", x, y))]  # doctest: +SKIP

Importing this package imports nothing else; each name below is loaded when it is first used.

`import polyak` works too, where polyak is installed: see the folder `polyak`.
"""

# Sorting would write a statement for each `as`.
# isort: skip_file
from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the names below once more, in the only form that type checkers understand
    from polyak_cli.averaging.planning import Plan as Plan
    from polyak_cli.averaging.schemes import (
        coefficients as coefficients,
        effective_number as effective_number,
    )
    from polyak_cli.checkpoints import (
        Checkpoint as Checkpoint,
        PassedOver as PassedOver,
        Problem as Problem,
        Selection as Selection,
        model_files as model_files,
        select as select,
    )
    from polyak_cli.errors import (
        ChangedError as ChangedError,
        CheckpointError as CheckpointError,
        FormatError as FormatError,
        MismatchError as MismatchError,
        MissingExtraError as MissingExtraError,
        OutputError as OutputError,
        PolyakError as PolyakError,
        StoreError as StoreError,
        UsageError as UsageError,
    )
    from polyak_cli.evaluation.comparison import (
        Compared as Compared,
        Comparison as Comparison,
        Gain as Gain,
        compare as compare,
    )
    from polyak_cli.evaluation.data import Split as Split, halves as halves
    from polyak_cli.evaluation.evaluator import (
        Evaluator as Evaluator,
        RowScores as RowScores,
        Score as Score,
        evaluate as evaluate,
    )
    from polyak_cli.evaluation.recalibration import (
        Recalibration as Recalibration,
        recalibrate as recalibrate,
    )
    from polyak_cli.evaluation.sample_run import TrainReport as TrainReport, train as train
    from polyak_cli.evaluation.scoring import ScoringOptions as ScoringOptions
    from polyak_cli.evaluation.significance import (
        Paired as Paired,
        mcnemar as mcnemar,
        paired_difference as paired_difference,
        sign_flip as sign_flip,
        verdict as verdict,
    )
    from polyak_cli.examining.differences import (
        Differences as Differences,
        Distances as Distances,
        diff as diff,
        distances as distances,
    )
    from polyak_cli.examining.geometry import Geometry as Geometry, geometry as geometry
    from polyak_cli.examining.health import Checked as Checked, Health as Health, check as check
    from polyak_cli.examining.inspection import Inspection as Inspection, inspect as inspect
    from polyak_cli.examining.verification import (
        Discrepancy as Discrepancy,
        Verification as Verification,
        verify as verify,
    )
    from polyak_cli.pipeline import average as average, plan as plan, run as run
    from polyak_cli.pipeline.report import Report as Report
    from polyak_cli.pipeline.stages import Options as Options
    from polyak_cli.pipeline.sweeping import Sweep as Sweep, sweep as sweep
    from polyak_cli.pipeline.watching import watch as watch

__version__ = "0.1.0"

#: Module -> the public names that it defines.
_NAMES = {
    "averaging.planning": ("Plan",),
    "averaging.schemes": (
        "coefficients",
        "effective_number",
    ),
    "checkpoints": (
        "Checkpoint",
        "PassedOver",
        "Problem",
        "Selection",
        "model_files",
        "select",
    ),
    "errors": (
        "ChangedError",
        "CheckpointError",
        "FormatError",
        "MismatchError",
        "MissingExtraError",
        "OutputError",
        "PolyakError",
        "StoreError",
        "UsageError",
    ),
    "evaluation.comparison": (
        "Compared",
        "Comparison",
        "Gain",
        "compare",
    ),
    "evaluation.data": (
        "Split",
        "halves",
    ),
    "evaluation.evaluator": (
        "Evaluator",
        "RowScores",
        "Score",
        "evaluate",
    ),
    "evaluation.recalibration": (
        "Recalibration",
        "recalibrate",
    ),
    "evaluation.sample_run": (
        "TrainReport",
        "train",
    ),
    "evaluation.scoring": ("ScoringOptions",),
    "evaluation.significance": (
        "Paired",
        "mcnemar",
        "paired_difference",
        "sign_flip",
        "verdict",
    ),
    "examining.differences": (
        "Differences",
        "Distances",
        "diff",
        "distances",
    ),
    "examining.geometry": (
        "Geometry",
        "geometry",
    ),
    "examining.health": (
        "Checked",
        "Health",
        "check",
    ),
    "examining.inspection": (
        "Inspection",
        "inspect",
    ),
    "examining.verification": (
        "Discrepancy",
        "Verification",
        "verify",
    ),
    "pipeline": (
        "average",
        "plan",
        "run",
    ),
    "pipeline.report": ("Report",),
    "pipeline.stages": ("Options",),
    "pipeline.sweeping": (
        "Sweep",
        "sweep",
    ),
    "pipeline.watching": ("watch",),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"polyak_cli.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
