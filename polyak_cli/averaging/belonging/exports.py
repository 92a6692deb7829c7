"""Recognise exported models whose variables are numbered in no fixed order.

Keras 3's `model.export()` keeps a model's variables in a set, and numbers them in the order in
which the set yields them: `_all_variables/0` may be a kernel in one file and a bias in the next.
Reads only the names of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

from polyak_cli.errors import MismatchError, shown
from polyak_cli.tensors import Table

#: The kind of the problem.
KIND = "no order"
_UNORDERED = "_all_variables/"


def refuse_unordered(tables: Sequence[Table]) -> None:
    """Refuse to pair tensors whose names are numbers in no fixed order.

    Raises:
        MismatchError: one checkpoint at least has such names.
    """
    text = next((said for table in reversed(tables) if (said := describe_unordered(table))), "")
    if text and len(tables) > 1:
        raise MismatchError(text)


def describe_unordered(table: Table) -> str:
    """Return why the tensors of a checkpoint cannot be paired with another's, "" if they can."""
    if not any(name.startswith(_UNORDERED) for name in table.tensors):
        return ""
    return (
        f"{shown(table.path)}: was written by model.export(), which numbers variables in another "
        f"order in every file ('{_UNORDERED}0'), so that tensors cannot be paired; average the "
        "model's own checkpoints, .keras or .weights.h5, and export the average"
    )
