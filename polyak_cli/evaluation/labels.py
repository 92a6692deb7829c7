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


def _list_names(model: Any, which: str) -> list[str]:
    """Return the names of a model's inputs or outputs, in the order of its tensors; [""] if none.

    Those of a dict are its keys: Keras sorts them, as its `tree` does, and forgets the names that
    the layers have.
    """
    tensors = _list_tensors(model, which)
    struct = _find_dict(model, which)
    if struct:
        keys = sorted(struct, key=str)
        same = len(keys) == len(tensors) and all(
            struct[key] is tensor for key, tensor in zip(keys, tensors, strict=True)
        )
        return [str(key) for key in keys] if same else [""]
    if which == "inputs":
        return [str(tensor.name) for tensor in tensors] or [""]
    names = [str(name) for name in getattr(model, "output_names", None) or []]
    if not names and len(tensors) == 1 and getattr(model, "layers", None):
        names = [str(model.layers[-1].name)]  # Sequential
    # A subclass that was built by its build() alone has neither.
    return names if names and len(names) == len(tensors) else [""]


def _find_dict(model: Any, which: str) -> Mapping[Any, Any] | None:
    """Return the tensors of a model that takes or gives a dict of them, else None."""
    struct = getattr(model, f"_{which}_struct", None)
    return struct if isinstance(struct, Mapping) else None


def list_output_names(model: Any) -> list[str]:
    """Return the names of the outputs; one empty name if the model does not declare them."""
    return _list_names(model, "outputs")


def _order_arrays(
    path: Path, model: Any, which: str, arrays: data.Arrays, source: str
) -> list[data.Array]:
    """Return one array for each input or output of a model, in the order of its tensors.

    Raises:
        MismatchError: there are more or fewer, or their names are others.
    """
    tensors, names = _list_tensors(model, which), _list_names(model, which)
    given = data.list_arrays(arrays)
    takes, has = ("takes", "has") if which == "inputs" else ("gives", "has labels for")
    known = "" if names == [""] else ", ".join(f"'{shown(name, 60)}'" for name in names)
    if isinstance(arrays, Mapping) and known and set(arrays) != set(names):
        found = ", ".join(f"'{shown(key, 60)}'" for key in arrays)
        raise MismatchError(
            f"{shown(path)}: {takes} the {which} {known}, but {source} {has} {found}; name the "
            f"arrays like the {which}"
        )
    if len(tensors) != len(given):
        several = f"; give one for each of {known}, by name or in this order" if known else ""
        raise MismatchError(
            f"{shown(path)}: {takes} {len(tensors)} {which}, but {source} {has} {len(given)}"
            f"{several if len(tensors) > 1 else ''}"
        )
    # A dict of outputs is sorted by Keras, so a position says nothing that a user would know.
    if len(given) > 1 and not isinstance(arrays, Mapping) and _find_dict(model, which):
        raise MismatchError(
            f"{shown(path)}: {takes} the {which} {known} as a dict, but the arrays of {source} "
            f"have no names; name them like the {which}"
        )
    if isinstance(arrays, Mapping) and known:
        return [arrays[name] for name in names]
    return given


def _pack_arrays(model: Any, which: str, arrays: list[data.Array]) -> Any:
    """Return arrays in the structure that a model takes or gives: one, a list, or a dict."""
    if _find_dict(model, which):
        return dict(zip(_list_names(model, which), arrays, strict=True))
    return arrays[0] if len(arrays) == 1 else arrays


def fit_features(path: Path, model: Any, rows: data.Split) -> Any:
    """Return features in the structure that a model takes; refuse those that do not fit its inputs.

    Raises:
        MismatchError: they do not fit.
    """
    inputs = _list_tensors(model, "inputs")
    if not inputs:  # a subclass that declares none takes what its code takes
        return [*rows.features] if isinstance(rows.features, tuple) else rows.features
    given = _order_arrays(path, model, "inputs", rows.features, rows.source)
    for tensor, array in zip(inputs, given, strict=True):
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
    return _pack_arrays(model, "inputs", given)


def _format_shape(shape: Sequence[int | None]) -> str:
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    return f"({sizes},)" if len(shape) == 1 else f"({sizes})"


def fit_labels(
    path: Path, rows: data.Split, model: Any, loss: Any, metrics: Any
) -> tuple[Any, bool]:
    """Return labels in the form that the loss of each output expects, and whether they are classes.

    They are classes only for a model of one output.
    """
    outputs = _list_tensors(model, "outputs")
    if not outputs:
        return rows.labels, False
    names = list_output_names(model)
    given = _order_arrays(path, model, "outputs", rows.labels, rows.source)
    fitted: list[tuple[data.Array, bool]] = []
    for index, array in enumerate(given):
        name = names[index] if len(names) == len(given) else ""
        which = f" '{shown(name, 60)}'" if len(given) > 1 else ""
        where = f"{shown(path)}: gives{which} rows of shape"
        own = select_output(loss, index, name)
        # One output's metrics may be a flat list, which belongs to it alone.
        measured = select_output(metrics, index, name) if len(given) > 1 else metrics
        sparse = any(
            "sparse" in normalise_name(known) for known in flatten(own) or flatten(measured)
        )
        fitted.append(_fit(array, tuple(outputs[index].shape)[1:], sparse, where, rows.source))
    # With several outputs, accuracy would be one of several; those are left to the metrics.
    classes = len(fitted) == 1 and fitted[0][1]
    return _pack_arrays(model, "outputs", [array for array, _ in fitted]), classes


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
