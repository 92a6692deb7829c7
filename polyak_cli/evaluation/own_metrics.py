"""Measure models by a metric of the user's own: a number for each row, or one for all rows.

The metric is called as scikit-learn's and Keras's are: with the labels, and with predictions.  One
number for all rows, such as F1, is divided among parts of the rows, so that models are compared
part by part where they cannot be row by row.  This module knows arrays, and no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from polyak_cli.errors import MismatchError, UsageError, shown
from polyak_cli.evaluation import data, user_code

if TYPE_CHECKING:
    from polyak_cli.evaluation.evaluator import RowScores

EXPECTED = "expected accuracy, loss, MODULE.py:FUNCTION or package.module:FUNCTION"
#: What is measured without a function.
BUILT_IN = ("accuracy", "loss")
#: Parts among which a metric of all rows is divided; fewer than twice as many rows are one each.
PARTS = 100
#: The fewest with a verdict: with less, one part decides it.
_FEWEST = 10
_SEED = 0


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """A metric of the user's own, of one model on some rows.

    Attributes:
        name: of the metric.
        value: of all rows.
        is_whole: it is one number for all rows, which no row has by itself.
        divide: returns the numbers whose mean is the value: (rows,), or (parts,) if it is whole;
            raises a `PolyakError` where they are not known.
    """

    name: str
    value: float
    is_whole: bool
    divide: Callable[[], data.Array]


class OwnMetric:
    """A metric that the user names, called with labels and predictions.

    Attributes:
        name: in tables.
    """

    def __init__(self, source: str) -> None:
        """Find the function.

        Raises:
            UsageError: it is no function and none of `BUILT_IN`, or its name is taken.
            PolyakError: there is no such file, or its code failed.
        """
        self._function = None
        self.name = source
        if source not in BUILT_IN:
            if not user_code.is_function(source):
                raise UsageError(f"--metric {shown(source)}: {EXPECTED}")
            self._function = user_code.find_function(source, EXPECTED)
            self.name = self._function.name
            if self.name in BUILT_IN:
                raise UsageError(
                    f"--metric {shown(source)}: polyak has {self.name} of its own; give the "
                    "function another name"
                )

    def measure(self, path: Path, split: data.Split, scores: RowScores) -> RowScores:
        """Return scores with this metric added.

        Args:
            path: the model file, for messages.
            split: the rows.
            scores: of the model on them.

        Raises:
            MismatchError: there is nothing to measure, or the metric is no number.
            PolyakError: the function failed.
        """
        where = f"{shown(path)}: --metric {shown(self.name)}"
        if self._function is None:
            if self.name == "loss" and scores.loss is None:
                raise MismatchError(f"{where}: the model has no loss that is known")
            if self.name == "accuracy" and not any("acc" in name for name in scores.metrics):
                raise MismatchError(f"{where}: the labels of {split.source} are not classes")
            return scores
        if self.name in scores.metrics:
            raise MismatchError(
                f"{where}: the model has a metric of this name; give the function another name"
            )
        if scores.predictions is None:
            raise MismatchError(
                f"{where}: needs the predictions of one output, of at most 268 MB; the model has "
                "several outputs, or more rows"
            )
        (labels,) = data.list_arrays(split.labels)
        call = partial(self._call, path, split)
        found = call(labels, scores.predictions)
        is_whole = found.size == 1
        given = (call, labels, scores.predictions, self.name)
        measured = Measured(
            name=self.name,
            value=float(found.mean()),
            is_whole=is_whole,
            divide=partial(divide_whole, *given) if is_whole else lambda: found,
        )
        notes = scores.notes
        if not np.isfinite(found).all():
            count = np.count_nonzero(~np.isfinite(found))
            of = "" if is_whole else f" for {count} of the {split.rows} rows"
            notes += (f"its {self.name} is no finite number{of}",)
        metrics = {**scores.metrics, self.name: measured.value}
        return replace(scores, metrics=metrics, own=measured, notes=notes)

    def _call(
        self, path: Path, split: data.Split, labels: data.Array, predictions: data.Array
    ) -> data.Array:
        """Return the number of each row as (rows,) float64, or the one of all rows as (1,).

        Raises:
            MismatchError: it returns something else than numbers.
            PolyakError: it failed.
        """
        function = self._function
        assert function is not None  # noqa: S101 - `measure` has called it
        rows = len(labels)
        what = f"{self.name}() failed on {split.source} and the predictions of {shown(path)}"
        with function.running(what):
            # Copies, as it may write into them.
            returned = function.function(labels.copy(), predictions.copy())
            found = np.asarray(returned)
        if found.dtype.kind in "biuf" and (found.size == 1 or found.shape == (rows,)):
            return found.astype(np.float64).reshape(-1)
        kind = type(returned).__name__
        if found.dtype.kind != "O":
            kind = f"{found.dtype} of shape {found.shape}"
        raise MismatchError(
            f"{shown(path)}: --metric {shown(self.name)}: returned {shown(kind, 60)}; expected one "
            f"number, or one for each of the {rows} rows"
        )


def divide_whole(
    measure: Callable[[data.Array, data.Array], data.Array],
    labels: data.Array,
    predictions: data.Array,
    name: str,
) -> data.Array:
    """Divide a metric of all rows among parts of them.

    These are Tukey's pseudo-values ("Bias and confidence in not-quite large samples", Annals of
    Mathematical Statistics 29, 1958), moved so that their mean is the metric: k times the metric
    of all rows minus k - 1 times that without the part, for k parts.  Of a mean over rows, each is
    the mean of its part.  Their spread is that of the metric if it changes smoothly with the rows,
    as F1, BLEU and AUC do; of AUC they are the numbers of DeLong's test (1988).

    The metric of each part by itself would be another one: F1 and BLEU of few rows are biased, and
    AUC of one class is none.  Of 1,000 simulated pairs of models with the same F1, that called 206
    better or worse, this 47.

    Args:
        measure: returns the metric of some rows, (1,), from their labels and predictions.
        labels: (rows, ...).
        predictions: (rows, ...).
        name: of the metric, for messages.

    Returns:
        (parts,) float64: one for each row, or for each of 100 random parts of 200 rows or more;
        the parts are the same for all models.

    Raises:
        MismatchError: there are fewer than ten rows, or the metric without a part is not finite.
        PolyakError: the function failed.
    """
    rows = len(labels)
    parts = rows if rows < 2 * PARTS else PARTS
    if parts < _FEWEST:
        raise MismatchError(
            f"its {name} is one number for all rows, and {rows} rows are too few to divide it "
            f"among; expected {_FEWEST} or more"
        )
    whole = float(measure(labels, predictions)[0])
    if not math.isfinite(whole):
        return np.full(parts, whole)
    # At random, as rows are often sorted.
    order = np.random.default_rng(_SEED).permutation(rows)
    without = np.empty(parts)
    for k, part in enumerate(np.array_split(order, parts)):
        kept = np.ones(rows, dtype=bool)
        kept[part] = False
        found = measure(labels[kept], predictions[kept])
        if found.size != 1 or not math.isfinite(found[0]):
            others = f" and {len(part) - 1} others" if len(part) > 1 else ""
            raise MismatchError(
                f"its {name} is no finite number without row {part[0] + 1}{others}, so it is not "
                "compared"
            )
        without[k] = found[0]
    values = parts * whole - (parts - 1) * without
    return np.asarray(values - values.mean() + whole)
