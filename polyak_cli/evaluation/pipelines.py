"""Read the data sets of frameworks into arrays: PyTorch's and Hugging Face's, loaders, and tf.data.

All rows are in memory, and every model is scored on the same ones in the same order, whatever a
loader shuffles; `draw_alike` makes that order the same in each run.  The frameworks are not
imported: what is one of their objects has imported them.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from polyak_cli.errors import FormatError, shown

#: Keys of the labels of a row that is a dict, as Transformers calls them.
_LABELS = ("labels", "label", "label_ids")
#: Key of what is 1 at the positions of a sequence and 0 where it is padded, as tokenizers call it.
_MASK = "attention_mask"


def read_all(returned: Any, where: str) -> Any:
    """Return what a function returned, with pairs of arrays in place of data sets of frameworks.

    Args:
        returned: a data set, or a list of rows that are dicts with labels; two of them (train and
            test), or a dict of them by part.  Anything else is returned as it is.
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


@contextlib.contextmanager
def draw_alike() -> Iterator[None]:
    """Let Python, numpy and PyTorch's CPU draw the same random numbers in the block in each run.

    So a loader that shuffles gives its rows in one order, and halves of rows and batches of
    BatchNorm are the same again.  Afterwards each generator goes on from where it was.
    """
    torch = sys.modules.get("torch")
    python, legacy = random.getstate(), np.random.get_state()
    state = torch.get_rng_state() if torch else None
    random.seed(0)
    np.random.seed(0)
    if torch:
        torch.default_generator.manual_seed(0)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        if torch:
            torch.set_rng_state(state)


def _is_data_set(given: object) -> bool:
    known = _is_of_torch(given, "Dataset", "DataLoader") or _is_of_tensorflow(given)
    return known or _is_list_of_rows(given)


def _is_list_of_rows(given: Any) -> bool:
    """Return whether something is a list of dicts with labels, or a `datasets.Dataset` of them."""
    is_of_hugging_face = hasattr(given, "column_names") and not isinstance(given, Mapping)
    if not (isinstance(given, list) or is_of_hugging_face) or not len(given):
        return False
    return isinstance(given[0], Mapping) and _find_labels(given[0]) is not None


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
    pairs = [tuple(map(_convert_all, _split_labels(row, where))) for row in _iterate(given)]
    if not pairs:
        raise FormatError(f"{where}: is empty; expected one row or more")
    is_batched = _is_batched(given, pairs[0])
    join = np.concatenate if is_batched else np.stack
    if is_batched:
        pairs = [*_pad(pairs)]
    features, labels = zip(*pairs, strict=True)
    try:
        return _join(features, join), _join(labels, join)
    except ValueError as error:  # as where each batch is padded to its own length
        raise FormatError(
            f"{where}: its rows do not fit into one array ({shown(error)}); give all rows the same "
            f"shape, or a DataLoader whose collate_fn pads them and their {_MASK}"
        ) from None


def _is_batched(given: Any, first: Any) -> bool:
    """Return whether a data set gives batches, such as the first features and labels."""
    if _is_of_torch(given, "Dataset") or _is_list_of_rows(given):
        return False
    if _is_of_torch(given, "DataLoader") and given.batch_sampler is not None:
        return True
    # Others may do either.  In a batch, all arrays have the same number of rows.
    shapes = [one.shape for one in _list_leaves(first)]
    return all(shapes) and len({shape[0] for shape in shapes}) == 1


def _iterate(given: Any) -> Iterable[Any]:
    """Yield the rows or batches; a map-style data set has a length and no end of its own."""
    if _is_of_torch(given, "IterableDataset"):  # it may have a length, too
        return (row for row in given)
    if _is_of_torch(given, "Dataset") and hasattr(given, "__len__"):
        return (given[k] for k in range(len(given)))
    return (row for row in given)


def _split_labels(row: Any, where: str) -> tuple[Any, Any]:
    """Return features and labels of a row or a batch: a pair, or a dict with labels.

    Raises:
        FormatError: it is neither.
    """
    if isinstance(row, Mapping):
        key = _find_labels(row)
        if key is not None:
            return {name: value for name, value in row.items() if name != key}, row[key]
        found = f"a dict with {', '.join(shown(name, 30) for name in row) or 'no keys'}"
    elif isinstance(row, (tuple, list)) and len(row) == 2:
        return row[0], row[1]
    else:
        count = len(row) if isinstance(row, (tuple, list)) else 0
        found = f"rows of {count} part{'s'[: count != 1]}" if count else type(row).__name__
    raise FormatError(f"{where}: gives {found}; expected (x, y), or a dict with 'labels'")


def _find_labels(row: Mapping[Any, Any]) -> Any:
    """Return the key of the labels of a row that has other keys too; None if it is no such row."""
    return next((key for key in _LABELS if key in row and len(row) > 1), None)


def _pad(pairs: Sequence[tuple[Any, Any]]) -> Sequence[tuple[Any, Any]]:
    """Return batches padded to the longest, where each was padded to its own longest sequence.

    Each array is continued with what it holds where the attention mask is 0; batches without such
    a mask, and arrays that hold there nothing or several things, stay as they are.
    """
    if not all(isinstance(features, Mapping) and _MASK in features for features, _ in pairs):
        return pairs
    masks = [features[_MASK] for features, _ in pairs]
    longest = max(mask.shape[-1] for mask in masks)

    def extend(arrays: Sequence[Any]) -> Sequence[Any]:
        both = [*zip(arrays, masks, strict=True)]
        if any(np.shape(array) != mask.shape or mask.ndim != 2 for array, mask in both):
            return arrays
        fill = np.unique(np.concatenate([array[mask == 0] for array, mask in both]))
        if len(fill) != 1:
            return arrays
        room = [((0, 0), (0, longest - mask.shape[1])) for mask in masks]
        return [np.pad(a, r, constant_values=fill[0]) for a, r in zip(arrays, room, strict=True)]

    padded = {key: extend([features[key] for features, _ in pairs]) for key in pairs[0][0]}
    labels = extend([one for _, one in pairs])
    return [({key: padded[key][k] for key in padded}, labels[k]) for k in range(len(pairs))]


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
    if isinstance(first, tuple):
        return tuple(_join(one, join) for one in zip(*parts, strict=True))
    return join(parts)


def _convert_all(nested: Any) -> Any:
    """Return what a row or batch holds, in the same structure, as numpy arrays."""
    if isinstance(nested, Mapping):
        return {key: _convert_all(one) for key, one in nested.items()}
    # A list of numbers is one array, as tokenizers return it, and so is text, which loaders leave
    # as it is; one of tensors is several.
    is_several = isinstance(nested, list) and any(len(getattr(x, "shape", ())) for x in nested)
    is_text = isinstance(nested, tuple) and all(isinstance(one, str) for one in nested)
    if (isinstance(nested, tuple) and not is_text) or is_several:
        return tuple(map(_convert_all, nested))
    return to_array(nested)


def to_array(value: Any) -> Any:
    """Return a tensor of a framework, or what numpy takes, as a numpy array."""
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
