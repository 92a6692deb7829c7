"""Score one output of a model on the rows of a split, batch by batch, and keep each row's loss.

The loss is the user's own, or chosen by the labels (`row_losses`).  This module knows no file and
no framework: a model is what predicts.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from typing import Any, Protocol

import numpy as np

from polyak_cli.errors import MismatchError, UsageError, shown
from polyak_cli.evaluation import data, pipelines, row_losses
from polyak_cli.evaluation.evaluator import RowScores

#: Outputs of a split that are kept for ensembles, in bytes.
MOST_KEPT = 256 << 20
#: How far the mean of the losses of rows may be from the loss of their batch, which was added up in
#: float32.
_TOLERANCE = 1e-3
#: Losses that take classes as whole numbers only.
_WHOLE = ("nllloss", "multimarginloss", "nll_loss", "multi_margin_loss")
#: Losses of logits, and of their logarithms, whose softmax is the probability of a class.
_OF_CLASSES = ("crossentropyloss", "cross_entropy", "nllloss", "nll_loss")
#: Losses of one yes or no an element -> the output from which on it is yes.
_BINARY = {
    "bcewithlogitsloss": 0.0,
    "binary_cross_entropy_with_logits": 0.0,
    "bceloss": 0.5,
    "binary_cross_entropy": 0.5,
}


class Predictor(Protocol):
    """A model that has the tensors of a checkpoint."""

    def predict(self, features: data.Arrays) -> Any:
        """Return all that the model gives for some rows."""

    def find_output(self, returned: Any) -> Any:
        """Return the only output, as the loss of the user takes it."""

    def unwrap(self, outputs: Any) -> data.Array:
        """Return outputs as a numpy array."""

    def wrap(self, labels: data.Array) -> Any:
        """Return labels as the loss of the user takes them."""


class Function:
    """What a function of the user returned that takes the tensors of a checkpoint."""

    def __init__(self, predict: Any) -> None:
        self._predict = predict

    def predict(self, features: data.Arrays) -> Any:
        """See `Predictor.predict`."""
        return self._predict(features)

    def find_output(self, returned: Any) -> Any:
        """See `Predictor.find_output`."""
        return returned

    def unwrap(self, outputs: Any) -> data.Array:
        """See `Predictor.unwrap`."""
        return np.asarray(pipelines.to_array(outputs))  # its code may run PyTorch

    def wrap(self, labels: data.Array) -> Any:
        """See `Predictor.wrap`."""
        return labels


class OwnLoss:
    """A loss that the function of the user returned: called with outputs and labels.

    Attributes:
        words: its name and settings, and whose it is.
        name: of the kind of loss; only losses of the same name are compared.
        is_free: whether it takes labels of any shape and value, as code of the user may.
        ignored: the class that it passes over.
    """

    def __init__(self, function: Any) -> None:
        """Find the loss of each row, if the function can return it.

        Raises:
            UsageError: it cannot be called.
        """
        if not callable(function) or isinstance(function, type):
            raise UsageError(
                f"the loss beside the model is {shown(function, 60)}; expected a function, or a "
                "module of PyTorch, that is called with outputs and labels"
            )
        self._function = function
        self._kind = str(getattr(function, "__name__", "") or type(function).__name__)
        home = str(getattr(function, "__module__", ""))
        self.is_free = not home.startswith("torch.")
        whose = "your own" if self.is_free else "PyTorch's"
        self.ignored = int(getattr(function, "ignore_index", row_losses.IGNORED))
        settings = function.extra_repr() if hasattr(function, "extra_repr") else ""
        named = f"{self._kind}({settings})" if settings else self._kind
        self.words, self.name = f"{shown(named, 80)} ({whose})", f"{shown(named, 80)} * 1"
        self._each = _find_each(function)

    @property
    def is_of_classes(self) -> bool:
        """Whether outputs are logits, or logarithms of probabilities."""
        return self._kind.lower() in _OF_CLASSES

    @property
    def threshold(self) -> float | None:
        """The output from which on an element is a yes; None where that is not known."""
        return _BINARY.get(self._kind.lower())

    def choose_labels(self, target: row_losses.Target, block: slice) -> data.Array:
        """Return labels in the form that the loss takes."""
        labels, classes = target.given[block], target.values[block]
        is_plain = target.axis is not None and labels.ndim == classes.ndim
        if is_plain or (target.axis is not None and self._kind.lower() in _WHOLE):
            return np.where(classes == row_losses.IGNORED, self.ignored, classes)
        # What predicts numbers, or a yes and no, computes in floats.
        is_whole = not target.fits and labels.dtype.kind in "iu"
        return labels.astype(np.int64 if is_whole else np.float32)

    def measure(
        self, outputs: Any, labels: Any, predictor: Predictor
    ) -> tuple[data.Array | None, float]:
        """Return the loss of each row, None if it has none, and that of the batch.

        Raises:
            MismatchError: it returns something else than numbers.
        """
        total = predictor.unwrap(self._function(outputs, labels)).astype(np.float64)
        count = len(labels)
        if total.ndim and len(total) == count:  # it has a number for every row
            rows = total.reshape(count, -1).mean(1)
            return rows, float(rows.mean())
        if total.size != 1:
            raise MismatchError(
                f"the loss {shown(self._kind, 60)} returned numbers of shape {total.shape} for "
                f"{count} rows; expected one number, or one a row"
            )
        rows = self._measure_each(outputs, labels, predictor)
        value = float(total.reshape(()))
        # Weighted means, sums, and losses of pairs of rows are not the mean over rows.
        if not _are_close(float(rows.mean()), value):
            return None, value
        return rows, value

    def _measure_each(self, outputs: Any, labels: Any, predictor: Predictor) -> data.Array:
        """Return the loss of each row: without reduction, or as a batch of one."""
        if self._each is not None:
            found = predictor.unwrap(self._each(outputs, labels)).astype(np.float64)
            if found.ndim and len(found) == len(labels):
                return np.asarray(found.reshape(len(labels), -1).mean(1))
        values = [
            float(predictor.unwrap(self._function(outputs[k : k + 1], labels[k : k + 1])))
            for k in range(len(labels))
        ]
        return np.array(values)


def _find_each(function: Any) -> Any:
    """Return a loss without its reduction to one number; None where it has no such setting."""
    if getattr(function, "reduction", None) == "batchmean":
        return None  # KLDivLoss: a row has the sum of its numbers, and not their mean
    if isinstance(getattr(function, "reduction", None), str):
        each = copy.copy(function)
        each.reduction = "none"
        return each
    try:
        known = "reduction" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None
    return functools.partial(function, reduction="none") if known else None


def _are_close(one: float, other: float) -> bool:
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) and math.isnan(other)
    return math.isclose(one, other, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)


class Pass:
    """One output of a model in one pass over the rows of a split.

    Attributes:
        shape: of the predictions that are kept; None if they are too large.
    """

    def __init__(
        self,
        predictor: Predictor,
        own: OwnLoss | None,
        split: data.Split,
        where: str,
        *,
        keeps: bool,
    ) -> None:
        """Nothing is run yet.

        Args:
            predictor: the model.
            own: the loss of the output; None to choose one by the labels.
            split: the rows, with the labels of this output alone.
            where: the file of the weights, for messages.
            keeps: whether predictions are kept, for ensembles and metrics of the user's.
        """
        (self._labels,) = data.list_arrays(split.labels)
        self._predictor, self._own, self._split = predictor, own, split
        self._where, self._keeps = shown(where), keeps
        self._target: row_losses.Target | None = None
        self._are_logits = True
        self._losses = np.full(split.rows, np.nan)
        self._totals: list[tuple[int, float]] = []  # rows of each batch, and their loss
        self._right: list[data.Array] = []
        self._kept: list[data.Array] = []
        self._is_row_wise = True
        self._row: tuple[int, ...] = ()  # shape of a row of the output
        self.shape: tuple[int, ...] | None = None

    def restart(self) -> Pass:
        """Return a pass over the same rows for predictions that are like these."""
        again = Pass(self._predictor, self._own, self._split, self._where, keeps=False)
        again._target, again._is_row_wise = self._target, self._is_row_wise
        again._row = self._row
        return again

    def add(self, block: slice, given: Any) -> None:
        """Score the output of some rows.

        Raises:
            MismatchError: the labels do not fit the outputs.
        """
        outputs = self._predictor.unwrap(given)
        target = self._target or self._fit(outputs)
        self._add(target, block, outputs, given)
        if self.shape is not None:
            self._kept.append(self._make_prediction(target, outputs))

    def run_given(self, predictions: data.Array, batch_size: int) -> None:
        """Score predictions that are like those of `finish`."""
        target = self._target
        assert target is not None  # noqa: S101 - `restart` has set it
        self._are_logits = False
        for start in range(0, len(predictions), batch_size):
            block = slice(start, start + batch_size)
            outputs = predictions[block].astype(np.float32)
            given = outputs
            if self._is_of_classes(target) and self._own:
                # Its logarithm is a logit of a probability, which the loss takes.
                given = np.log(np.maximum(outputs, np.finfo(np.float32).tiny))
            self._add(target, block, outputs, self._predictor.wrap(given))
            self._kept.append(outputs)

    def finish(self) -> RowScores:
        """Return the results of all batches."""
        target = self._target
        assert target is not None  # noqa: S101 - `run` has set it
        count = sum(rows for rows, _ in self._totals)
        notes = []
        loss = float(self._losses.mean())
        if not self._is_row_wise:
            loss = sum(rows * value for rows, value in self._totals) / count
            notes.append(
                "its loss is not the mean of the losses of single rows: the mean over batches is "
                "shown, and rows are not compared by it"
            )
        metrics = {}
        correct = None
        if self._right:
            right = np.concatenate(self._right)
            metrics["accuracy"] = float(np.nanmean(right))  # NaN: an ignored position
            # With a class for each position, no row is wholly right or wrong.
            correct = right if right.ndim == 1 else None
        if target.is_of_sequences and self._own is None:
            metrics["perplexity"] = row_losses.compute_perplexity(self._losses, target)
        words, name = self._name_loss(target)
        return RowScores(
            loss,
            metrics,
            self._losses if self._is_row_wise else None,
            correct,
            np.concatenate(self._kept) if self._kept else None,
            name,
            tuple(notes),
            words,
        )

    def _fit(self, outputs: data.Array) -> row_losses.Target:
        """Compare the labels with the first outputs, which say what is a class."""
        if not outputs.ndim or outputs.dtype.kind not in "biuf":
            raise MismatchError(f"{self._where}: the model gives no array with one row a row")
        shape = (self._split.rows, *outputs.shape[1:])
        are_inputs = self._are_inputs()
        axis = len(shape) - 1 if are_inputs else None
        if self._own and self._own.is_of_classes:
            axis = 1  # as PyTorch's losses take them
        found = self._fit_labels(shape, axis)
        if self._own is None:
            if found.is_of_sequences and are_inputs:
                found = row_losses.shift_labels(found)
            row_losses.check_counted(found, self._split.source)
            self._refuse_yes_and_no(found)
        if found.axis is not None:
            self._are_logits = not row_losses.are_probabilities(outputs, found.axis)
        if self._keeps and math.prod(shape) * outputs.itemsize <= MOST_KEPT:
            self.shape = shape
        self._row = outputs.shape[1:]
        self._target = found
        return found

    def _fit_labels(self, shape: tuple[int, ...], axis: int | None) -> row_losses.Target:
        """Return labels as classes or numbers, or as they are where the user's code takes them.

        Raises:
            MismatchError: they do not fit outputs of the shape, and no code of the user takes them.
        """
        labels = self._labels
        if self._own and self._own.ignored != row_losses.IGNORED and labels.ndim > 1:
            wide = labels.astype(np.int64) if labels.dtype.kind in "iu" else labels
            labels = np.where(wide == self._own.ignored, row_losses.IGNORED, wide)
        try:
            return row_losses.fit_target(labels, shape, self._where, self._split.source, axis)
        except MismatchError:
            if self._own is None or not self._own.is_free:
                raise
            return row_losses.Target(self._labels, None, self._labels, fits=False)

    def _refuse_yes_and_no(self, target: row_losses.Target) -> None:
        """Refuse labels 0 and 1 of outputs whose loss the labels do not tell.

        Raises:
            MismatchError: labels are 0 and 1, and no classes.
        """
        # A squared error of logits would be a number too, and would mean nothing.
        if target.axis is None and np.isin(target.values, (0, 1)).all():
            raise MismatchError(
                f"{self._split.source}: the labels are 0 and 1, and the model has an output for "
                "each; its loss cannot be guessed: return (model, loss) from the function, such as "
                "(model, torch.nn.BCEWithLogitsLoss())"
            )

    def _are_inputs(self) -> bool:
        """Return whether the labels equal one of the inputs, apart from ignored positions."""
        counted = self._labels != row_losses.IGNORED
        return any(
            given.shape == self._labels.shape and bool((given == self._labels)[counted].all())
            for given in data.list_arrays(self._split.features)
        )

    def _add(
        self, target: row_losses.Target, block: slice, outputs: data.Array, given: Any
    ) -> None:
        """Add the losses of a batch, and which of its rows are right."""
        part = row_losses.Target(target.values[block], target.axis, target.given[block])
        rows = len(part.values)
        if len(outputs) != rows:
            raise MismatchError(f"{self._where}: the model gives {len(outputs)} rows for {rows}")
        if outputs.shape[1:] != self._row:
            raise MismatchError(
                f"{self._where}: the model gives rows of shape {self._row} for one batch and of "
                f"shape {outputs.shape[1:]} for another; expected one shape, to be compared with "
                "labels"
            )
        if self._own is None:
            each: data.Array | None = row_losses.compute_losses(
                outputs, part, are_logits=self._are_logits
            )
            total = float("nan")
        else:
            labels = self._predictor.wrap(self._own.choose_labels(target, block))
            each, total = self._own.measure(given, labels, self._predictor)
        self._is_row_wise = self._is_row_wise and each is not None
        if each is not None:
            self._losses[block] = each
        self._totals.append((rows, total))
        right = self._find_right(part, outputs)
        if right is not None:
            self._right.append(right)

    def _find_right(self, part: row_losses.Target, outputs: data.Array) -> data.Array | None:
        """Return which classes are right; None where labels are numbers to predict."""
        threshold = self._own.threshold if self._own else None
        if part.axis is not None or threshold is None:
            return row_losses.find_right(outputs, part)
        if part.values.shape != outputs.shape or not np.isin(part.values, (0, 1)).all():
            return None
        right = (outputs > threshold) == (part.values == 1)
        return np.asarray(right.reshape(len(right)) if right.size == len(right) else right)

    def _is_of_classes(self, target: row_losses.Target) -> bool:
        """Return whether predictions are kept as probabilities, whose mean is an ensemble."""
        return target.axis is not None and (self._own is None or self._own.is_of_classes)

    def _make_prediction(self, target: row_losses.Target, outputs: data.Array) -> data.Array:
        if self._is_of_classes(target) and target.axis is not None:
            return row_losses.find_probabilities(outputs, target.axis).astype(np.float32)
        return outputs.astype(np.float32, copy=False)

    def _name_loss(self, target: row_losses.Target) -> tuple[str, str]:
        """Return which loss it is and why, and the name by which losses are compared."""
        if self._own:
            return self._own.words, self._own.name
        # The names are those that Keras's losses have here, as they are the same.
        if target.axis is None:
            return "mse (chosen, as the labels are numbers)", "meansquarederror * 1"
        of = "logits" if self._are_logits else "probabilities"
        why = (
            "with the next label (chosen, as the labels are the inputs)"
            if target.are_next
            else "(chosen, as the labels are classes)"
        )
        return f"cross-entropy of {of} {why}", "categoricalcrossentropy * 1"
