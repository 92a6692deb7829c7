"""Measure models by a metric of the user's own, row by row where it can be.

The metric is called as scikit-learn's and Keras's are: with the labels, and with predictions.  This
module knows arrays, and no model.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from polyak_cli.errors import MismatchError, UsageError, shown
from polyak_cli.evaluation import data, user_code
from polyak_cli.evaluation.evaluator import RowScores

EXPECTED = "expected accuracy, MODULE.py:FUNCTION or package.module:FUNCTION"
ACCURACY = "accuracy"


class OwnMetric:
    """A metric that the user names, called with labels and predictions.

    Attributes:
        name: in tables.
    """

    def __init__(self, source: str) -> None:
        """Find the function.

        Raises:
            UsageError: it is neither accuracy nor the name of a function.
            PolyakError: there is no such file, or its code failed.
        """
        self._function = None
        self.name = source
        if source != ACCURACY:
            if not user_code.is_function(source):
                raise UsageError(f"--metric {shown(source)}: {EXPECTED}")
            self._function = user_code.find_function(source, EXPECTED)
            self.name = self._function.name

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
            if not any("acc" in name for name in scores.metrics):
                raise MismatchError(f"{where}: the labels of {split.source} are not classes")
            return scores
        if scores.predictions is None:
            raise MismatchError(
                f"{where}: needs the predictions of one output, of at most 268 MB; the model has "
                "several outputs, or more rows"
            )
        (labels,) = data.list_arrays(split.labels)
        found = np.asarray(self._function.call(labels, scores.predictions))
        if found.dtype.kind not in "biuf" or (found.size != 1 and found.shape != (split.rows,)):
            raise MismatchError(
                f"{where}: returned {found.dtype} of shape {found.shape}; expected one number, or "
                f"one for each of the {split.rows} rows"
            )
        value = float(found.mean())
        if found.shape == (split.rows,) and split.rows > 1:
            each = {self.name: found.astype(np.float64)}
            return replace(scores, metrics={**scores.metrics, self.name: value}, values=each)
        note = f"its {self.name} is one number for all rows, so it is not compared row by row"
        return replace(
            scores,
            metrics={**scores.metrics, self.name: value},
            notes=(*scores.notes, note),
        )
