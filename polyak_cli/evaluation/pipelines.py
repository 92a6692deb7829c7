"""Read the data sets of frameworks into arrays: PyTorch's `Dataset` and `DataLoader`, and tf.data.

All rows are in memory, and every model is scored on the same ones in the same order, whatever a
loader shuffles.  The frameworks are not imported: what is one of their objects has imported them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from polyak_cli.errors import FormatError, shown

#: Keys of the labels of a row that is a dict, as Transformers calls them.
_LABELS = ("labels", "label")


def read_all(returned: Any, where: str) -> Any:
    """Return what a function returned, with pairs of arrays in place of data sets of frameworks.

    Args:
        returned: a data set, two of them (train and test), or a dict of them by part; anything
            else is returned as it is.
        where: names the function in messages.

    Raises:
        FormatError: a data set is empty, or its rows are no pairs of features and labels.
    """
    if _is_data_set(returned):
        return _read(returned, where)
    if isinstance(returned, Mapping) and returned and all(map(_is_data_set, returned.values())):
        return {key: _read(one, f"{where}['{shown(key, 20)}']") for key, one in returned.items()}
    is_pair = isinstance(returned, (tuple, list)) and len(returned) == 2
    if is_pair and all(map(_is_data_set, returned)):
        parts = zip(("train", "test"), returned, strict=True)
        return {part: _read(one, f"{where}, {part}") for part, one in parts}
    return returned


def _is_data_set(given: object) -> bool:
    return _is_of_torch(given, "Dataset", "DataLoader") or _is_of_tensorflow(given)


def _is_of_torch(given: object, *names: str) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(
        given, tuple(getattr(torch.utils.data, name) for name in names)
    )


def _is_of_tensorflow(given: object) -> bool:
    tensorflow = sys.modules.get("tensorflow")
    return tensorflow is not None and isinstance(given, tensorflow.data.Dataset)


def _read(given: Any, where: str) -> tuple[Any, Any]:
    """Return the features and labels of all rows."""
    is_batched = not _is_of_torch(given, "Dataset")
    if _is_of_tensorflow(given):
        # A batch has labels with an axis of rows; those of a single row are mostly a number.
        is_batched = all(
            spec.shape.rank != 0
            for spec in _list_leaves(_split_labels(given.element_spec, where)[1])
        )
    pairs = [_split_labels(row, where) for row in _iterate(given)]
    if not pairs:
        raise FormatError(f"{where}: is empty; expected one row or more")
    join = np.concatenate if is_batched else np.stack
    features, labels = zip(*pairs, strict=True)
    try:
        return _join(features, join), _join(labels, join)
    except ValueError as error:  # as where each batch is padded to its own length
        raise FormatError(
            f"{where}: its rows do not fit into one array ({shown(error)}); give all rows the same "
            "shape"
        ) from None


def _iterate(given: Any) -> Iterable[Any]:
    """Yield the rows or batches; a map-style data set has a length and no end of its own."""
    if _is_of_torch(given, "Dataset") and hasattr(given, "__len__"):
        return (given[k] for k in range(len(given)))
    return (row for row in given)


def _split_labels(row: Any, where: str) -> tuple[Any, Any]:
    """Return features and labels of a row or a batch: a pair, or a dict with labels.

    Raises:
        FormatError: it is neither.
    """
    if isinstance(row, Mapping):
        key = next((key for key in _LABELS if key in row), None)
        rest = {name: value for name, value in row.items() if name != key}
        if key and rest:
            return rest, row[key]
        found = f"a dict with {', '.join(shown(name, 30) for name in row) or 'no keys'}"
    elif isinstance(row, (tuple, list)) and len(row) == 2:
        return row[0], row[1]
    else:
        found = f"{len(row)} things" if isinstance(row, (tuple, list)) else type(row).__name__
    raise FormatError(f"{where}: gives {found}; expected (x, y), or a dict with 'labels'")


def _list_leaves(nested: Any) -> Iterator[Any]:
    if isinstance(nested, Mapping):
        nested = tuple(nested.values())
    if isinstance(nested, (tuple, list)):
        for one in nested:
            yield from _list_leaves(one)
    else:
        yield nested


def _join(parts: Sequence[Any], join: Any) -> Any:
    """Return one array of all rows, or one for each of several inputs or outputs."""
    first = parts[0]
    if isinstance(first, Mapping):
        return {str(key): _join([part[key] for part in parts], join) for key in first}
    if isinstance(first, (tuple, list)):
        return tuple(_join(one, join) for one in zip(*parts, strict=True))
    return join([_convert(part) for part in parts])


def _convert(value: Any) -> Any:
    """Return a tensor of a framework, or a number, as a numpy array."""
    if _is_tensor(value):
        value = value.detach().cpu()
        # numpy has no bfloat16; in float32 each of its values is the same.
        return (
            value.float() if value.is_floating_point() and value.itemsize < 4 else value
        ).numpy()
    return np.asarray(value)


def _is_tensor(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)
