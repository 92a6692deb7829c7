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
    from polyak_cli.averaging import Options, Plan, Report, average, plan, run
    from polyak_cli.checkpoints import Checkpoint, PassedOver, Selection, model_files, select
    from polyak_cli.data import Split
    from polyak_cli.differences import Differences, Distances, diff, distances
    from polyak_cli.errors import (
        CheckpointError,
        FormatError,
        MismatchError,
        MissingExtraError,
        OutputError,
        PolyakError,
        UsageError,
    )
    from polyak_cli.inspection import Inspection, inspect
    from polyak_cli.models import Score, TrainReport, evaluate, train
    from polyak_cli.schemes import coefficients, effective_number

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Differences",
    "Distances",
    "FormatError",
    "Inspection",
    "MismatchError",
    "MissingExtraError",
    "Options",
    "OutputError",
    "PassedOver",
    "Plan",
    "PolyakError",
    "Report",
    "Score",
    "Selection",
    "Split",
    "TrainReport",
    "UsageError",
    "__version__",
    "average",
    "coefficients",
    "diff",
    "distances",
    "effective_number",
    "evaluate",
    "inspect",
    "model_files",
    "plan",
    "run",
    "select",
    "train",
]

_HOMES = {
    "Checkpoint": "checkpoints",
    "CheckpointError": "errors",
    "Differences": "differences",
    "Distances": "differences",
    "FormatError": "errors",
    "Inspection": "inspection",
    "MismatchError": "errors",
    "MissingExtraError": "errors",
    "Options": "averaging",
    "OutputError": "errors",
    "PassedOver": "checkpoints",
    "Plan": "averaging",
    "PolyakError": "errors",
    "Report": "averaging",
    "Score": "models",
    "Selection": "checkpoints",
    "Split": "data",
    "TrainReport": "models",
    "UsageError": "errors",
    "average": "averaging",
    "coefficients": "schemes",
    "diff": "differences",
    "distances": "differences",
    "effective_number": "schemes",
    "evaluate": "models",
    "inspect": "inspection",
    "model_files": "checkpoints",
    "plan": "averaging",
    "run": "averaging",
    "select": "checkpoints",
    "train": "models",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'polyak_cli' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"polyak_cli.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
