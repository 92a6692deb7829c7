"""Compute the loss of each row, and whether its class is right, from labels and outputs.

In numpy and float64, for models that bring no loss of their own: cross-entropy where labels are
classes, mean squared error where they are numbers.  This module knows no framework and no file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from polyak_cli.errors import MismatchError, word_count
from polyak_cli.evaluation import data

#: The label of a position that does not count, as PyTorch and Transformers mark padding.
IGNORED = -100
#: How far the sum of a row of probabilities, computed in float16, may be from 1.
_CLOSE = 2e-3
#: Of a probability whose logarithm is taken: the smallest normal float32.
_LEAST = float(np.finfo(np.float32).tiny)
#: A loss that is not finite is shown; numpy's warning of it would name no model.
_on_any_numbers = np.errstate(invalid="ignore", over="ignore")


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """Labels in the form in which they are compared with outputs.

    Attributes:
        values: classes, int64, shaped like the outputs without the axis of the classes; or numbers
            to predict, shaped like the outputs.
        axis: the axis of the outputs that has one element a class; None where labels are numbers.
        given: the labels as they came; those of a user's own loss.
        are_next: whether each label was moved to the position before; see `shift_labels`.
        fits: whether they have one of these forms; if not, only a loss of the user's takes them.
    """

    values: data.Array
    axis: int | None
    given: data.Array
    are_next: bool = False
    fits: bool = True

    @property
    def is_of_sequences(self) -> bool:
        """Whether each row is a sequence with a class for each position."""
        return self.axis is not None and self.values.ndim == 2


def fit_target(
    labels: data.Array, shape: tuple[int, ...], where: str, source: str, axis: int | None = None
) -> Target:
    """Return labels as classes or numbers, whichever fits outputs of a shape.

    Args:
        labels: (rows, ...).
        shape: of the outputs, rows included.
        where: the beginning of messages.
        source: name of the rows in messages.
        axis: that of the classes where two axes fit the labels; None if that is not known.

    Raises:
        MismatchError: they fit in no way, or classes may be on two axes.
    """
    if labels.shape == shape:
        # One-hot labels are classes; rows of other numbers, such as soft labels, are numbers.
        if len(shape) > 1 and shape[-1] > 1 and data.is_one_hot(labels):
            return Target(labels.argmax(-1).astype(np.int64), len(shape) - 1, labels)
        return Target(labels, None, labels)
    column = labels[..., 0] if labels.ndim > 1 and labels.shape[-1] == 1 else labels
    axes = _find_axes(column.shape, shape)
    if len(axes) > 1 and axis not in axes:
        raise MismatchError(
            f"{where}: gives rows of shape {shape[1:]}, and for the labels of {source} either axis "
            "may have the classes; give rows of another length, or return (model, loss) from the "
            "function, such as (model, torch.nn.CrossEntropyLoss())"
        )
    axis = axis if axis in axes else next(iter(axes), None)
    if axis is not None and column.dtype.kind in "biuf" and (column == np.floor(column)).all():
        counted = column[column != IGNORED] if column.ndim > 1 else column
        if not counted.size:
            raise MismatchError(f"{where}: every label of {source} is {IGNORED}, which is ignored")
        low, high, count = int(counted.min()), int(counted.max()), shape[axis]
        if low < 0 or high >= count:
            raise MismatchError(
                f"{where}: gives {count} classes, 0 to {count - 1}, but the labels of {source} go "
                f"from {low} to {high}"
            )
        return Target(column.astype(np.int64), axis, column)
    if labels.size == np.prod(shape) and labels.shape[0] == shape[0]:  # a column, or none
        return Target(labels.reshape(shape), None, labels.reshape(shape))
    raise MismatchError(
        f"{where}: gives rows of shape {shape[1:]}, but the labels of {source} have rows of shape "
        f"{labels.shape[1:]}; return (model, loss) with a loss function of your own that takes both"
    )


def _find_axes(labels: tuple[int, ...], outputs: tuple[int, ...]) -> set[int]:
    """Return the axes of the outputs that labels may lack: those that may be of the classes."""
    if len(labels) != len(outputs) - 1:
        return set()
    # PyTorch's losses have the classes on axis 1, language models on the last one.
    return {
        axis
        for axis in (1, len(outputs) - 1)
        if outputs[axis] > 1 and outputs[:axis] + outputs[axis + 1 :] == labels
    }


def shift_labels(target: Target) -> Target:
    """Return labels of sequences moved to the position before, whose output predicts them.

    Language models of Transformers take their inputs as labels, and shift them in the same way.
    """
    values = np.full_like(target.values, IGNORED)
    values[:, :-1] = target.values[:, 1:]
    return replace(target, values=values, are_next=True)


def check_counted(target: Target, source: str) -> None:
    """Refuse rows of which every position is ignored: they have no loss.

    Raises:
        MismatchError: there are such rows.
    """
    if target.axis is None or target.values.ndim < 2:
        return
    empty = (target.values == IGNORED).reshape(len(target.values), -1).all(1)
    if empty.any():
        raise MismatchError(
            f"{source}: found {word_count(int(empty.sum()), 'row')} without a label to compare "
            f"with, such as row {int(empty.argmax())}, counted from 0; leave them out"
        )


def compute_perplexity(losses: data.Array, target: Target) -> float:
    """Return exp of the mean cross-entropy of all positions that count, of all rows together.

    Args:
        losses: (rows,) of `compute_losses`, in nats; each is a mean over the positions of a row.
        target: labels of sequences.
    """
    counts = (target.values != IGNORED).sum(1)
    with np.errstate(over="ignore"):
        return float(np.exp(np.average(losses, weights=counts)))


@_on_any_numbers
def are_probabilities(outputs: data.Array, axis: int) -> bool:
    """Return whether outputs are probabilities of classes, as after a softmax."""
    low, high = outputs.min(initial=0.0), outputs.max(initial=1.0)
    return bool(low >= 0 and high <= 1 and (abs(outputs.sum(axis) - 1) < _CLOSE).all())


@_on_any_numbers
def find_probabilities(outputs: data.Array, axis: int) -> data.Array:
    """Return the probabilities of classes: of logits their softmax, in float64."""
    wide = outputs.astype(np.float64)
    if are_probabilities(wide, axis):
        return wide
    raised = np.exp(wide - wide.max(axis, keepdims=True))
    return np.asarray(raised / raised.sum(axis, keepdims=True))


@_on_any_numbers
def compute_losses(outputs: data.Array, target: Target, *, are_logits: bool) -> data.Array:
    """Return the loss of each row, (rows,) float64, means over all positions of a row.

    Positions whose label is `IGNORED` do not count; `check_counted` refuses rows of these alone.

    Args:
        outputs: (rows, ...).
        target: their labels.
        are_logits: of classes; else they are probabilities.
    """
    wide = outputs.astype(np.float64)
    if target.axis is None:
        each = (wide - target.values) ** 2
    else:
        counts = target.values != IGNORED
        index = np.expand_dims(np.where(counts, target.values, 0), target.axis)
        if are_logits:
            # log(sum(exp)) without overflow, as the greatest logit is taken out first.
            top = wide.max(target.axis, keepdims=True)
            whole = top + np.log(np.exp(wide - top).sum(target.axis, keepdims=True))
            each = whole - np.take_along_axis(wide, index, target.axis)
        else:
            chosen = np.take_along_axis(wide, index, target.axis)
            each = -np.log(np.maximum(chosen, _LEAST))
        if not counts.all():
            flat = counts.reshape(len(counts), -1)
            # Not a product: what is ignored may be infinite.
            sums = np.where(flat, each.reshape(flat.shape), 0.0).sum(1)
            return np.asarray(sums / flat.sum(1))
    return np.asarray(each.reshape(len(each), -1).mean(1))


def find_right(outputs: data.Array, target: Target) -> data.Array | None:
    """Return which classes are right, shaped like the labels; None where labels are numbers.

    With ignored positions they are floats, and NaN there.
    """
    if target.axis is None:
        return None
    right = np.asarray(outputs.argmax(target.axis) == target.values)
    ignored = target.values == IGNORED
    return np.where(ignored, np.nan, right) if ignored.any() else right
