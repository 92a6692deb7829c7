"""Check features against a model's inputs, and give labels the shape that a loss expects.

This module knows shapes and classes; where rows come from and what a loss computes is not its
concern.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyak_cli.errors import MismatchError, shown
from polyak_cli.evaluation import data
from polyak_cli.evaluation.losses import flatten, normalise_name, select_output


def _list_tensors(model: Any, which: str) -> list[Any]:
    """Return the inputs or outputs of a model; none if it is a subclass without declared ones."""
    return list(getattr(model, which, None) or [])


def list_output_names(model: Any) -> list[str]:
    """Return the names of the outputs; one empty name if the model does not declare them."""
    names = list(getattr(model, "output_names", None) or [])
    return names if len(names) == len(_list_tensors(model, "outputs")) else [""]


def check_features(path: Path, model: Any, rows: data.Split) -> None:
    """Refuse features that do not fit the inputs of the model."""
    inputs = _list_tensors(model, "inputs")
    given = data.list_arrays(rows.features)
    if inputs and len(inputs) != len(given):
        raise MismatchError(
            f"{shown(path)}: takes {len(inputs)} inputs, but {rows.source} has {len(given)}"
        )
    if isinstance(rows.features, Mapping):
        return  # Keras matches them by name, and reports mismatches itself
    for tensor, array in zip(inputs, given, strict=False):
        wanted = tuple(tensor.shape)[1:]
        found = array.shape[1:]
        if found == wanted[:-1] and wanted[-1:] in ((1,), (None,)):
            continue  # Keras adds the last axis
        if len(wanted) != len(found) or any(
            size not in (None, there) for size, there in zip(wanted, found, strict=True)
        ):
            raise MismatchError(
                f"{shown(path)}: takes rows of shape {_format_shape(wanted)}, but {rows.source} "
                f"has rows of shape {_format_shape(found)}"
            )


def _format_shape(shape: Sequence[int | None]) -> str:
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    return f"({sizes},)" if len(shape) == 1 else f"({sizes})"


def fit_labels(
    path: Path, rows: data.Split, model: Any, loss: Any, metrics: Any
) -> tuple[data.Arrays, bool]:
    """Return labels in the form that the loss of each output expects, and whether they are classes.

    They are classes only for a model of one output.
    """
    outputs = _list_tensors(model, "outputs")
    given = data.list_arrays(rows.labels)
    if outputs and len(outputs) != len(given):
        raise MismatchError(
            f"{shown(path)}: gives {len(outputs)} outputs, but {rows.source} has labels for "
            f"{len(given)}"
        )
    if not outputs:
        return rows.labels, False
    names = list_output_names(model)
    keys = list(rows.labels) if isinstance(rows.labels, Mapping) else names
    fitted: list[tuple[data.Array, bool]] = []
    for key, array in zip(keys, given, strict=True):
        index = names.index(key) if key in names else len(fitted)
        where = f"{shown(path)}: gives rows of shape"
        own = select_output(loss, index, names[index])
        sparse = any(
            "sparse" in normalise_name(known) for known in flatten(own) or flatten(metrics)
        )
        fitted.append(_fit(array, tuple(outputs[index].shape)[1:], sparse, where, rows.source))
    # With several outputs, accuracy would be one of several; those are left to the metrics.
    classes = len(fitted) == 1 and fitted[0][1]
    arrays = [array for array, _ in fitted]
    if isinstance(rows.labels, Mapping):
        return dict(zip(keys, arrays, strict=True)), classes
    return (tuple(arrays) if isinstance(rows.labels, tuple) else arrays[0]), classes


def _fit(
    labels: data.Array, shape: tuple[int | None, ...], sparse: bool, where: str, source: str
) -> tuple[data.Array, bool]:
    """Return labels in the shape of an output, and whether they are classes.

    Args:
        labels: (rows, ...).
        shape: shape of one row of the output.  Its last axis has one element a class, if labels
            are classes.
        sparse: whether to return classes as integers, without that last axis; else one-hot.
        where: the beginning of messages, which the shape of the output follows.
        source: name of the labels in messages.

    Raises:
        MismatchError: they do not fit.
    """
    import numpy as np

    width = shape[-1] if shape else None
    if width is None:
        return labels, False
    # Labels come as one-hot rows, as one integer a row, or as a column of integers.  The loss of
    # the file decides which of them Keras accepts, so all are converted to that.
    alike = labels.ndim == len(shape) + 1
    if width == 1:
        if alike and labels.shape[-1] == 2 and data.is_one_hot(labels):
            labels, alike = labels.argmax(-1), False
        if alike and labels.shape[-1] != 1:
            raise _make_mismatch(labels, shape, where, source)
        return (labels if alike else labels[..., None]), bool(np.isin(labels, (0, 1)).all())
    if alike and labels.shape[-1] == width:
        hot = data.is_one_hot(labels)
        if sparse and not hot:
            raise MismatchError(
                f"{where} {_format_shape(shape)} with a loss for whole classes, but the labels of "
                f"{source} are not one-hot"
            )
        return (labels.argmax(-1) if sparse else labels), hot
    index = labels[..., 0] if alike and labels.shape[-1] == 1 else labels
    if index.ndim != len(shape) or not np.array_equal(index, np.floor(index)):
        raise _make_mismatch(labels, shape, where, source)
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= width:
        raise MismatchError(
            f"{where} {_format_shape(shape)}, classes 0 to {width - 1}, but the labels of {source} "
            f"go from {low} to {high}"
        )
    index = index.astype(np.int64)
    return (index if sparse else np.eye(width, dtype=np.float32)[index]), True


def _make_mismatch(
    labels: data.Array, shape: tuple[int | None, ...], where: str, source: str
) -> MismatchError:
    return MismatchError(
        f"{where} {_format_shape(shape)}, but the labels of {source} have rows of shape "
        f"{_format_shape(labels.shape[1:])}"
    )
