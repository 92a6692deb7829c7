"""Average the checkpoints of a training run into one better-behaved model.

>>> from polyak_cli import average, plan
>>> plan("ckpts/", scheme="exp", alpha=2).coefficients          # doctest: +SKIP
>>> average("ckpts/", "final.h5", scheme="exp", alpha=2, last=10)  # doctest: +SKIP

Importing this package imports nothing else; each name below is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polyak_cli.averaging import Options, Plan, Report, average, plan, run
    from polyak_cli.checkpoints import Checkpoint, Selection, select
    from polyak_cli.differences import Differences, Distances, diff, distances
    from polyak_cli.errors import PolyakError
    from polyak_cli.inspection import Inspection, inspect
    from polyak_cli.schemes import coefficients, effective_number

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "Differences",
    "Distances",
    "Inspection",
    "Options",
    "Plan",
    "PolyakError",
    "Report",
    "Selection",
    "__version__",
    "average",
    "coefficients",
    "diff",
    "distances",
    "effective_number",
    "inspect",
    "plan",
    "run",
    "select",
]

_HOMES = {
    "Checkpoint": "checkpoints",
    "Differences": "differences",
    "Distances": "differences",
    "Inspection": "inspection",
    "Options": "averaging",
    "Plan": "averaging",
    "PolyakError": "errors",
    "Report": "averaging",
    "Selection": "checkpoints",
    "average": "averaging",
    "coefficients": "schemes",
    "diff": "differences",
    "distances": "differences",
    "effective_number": "schemes",
    "inspect": "inspection",
    "plan": "averaging",
    "run": "averaging",
    "select": "checkpoints",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'polyak_cli' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"polyak_cli.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
