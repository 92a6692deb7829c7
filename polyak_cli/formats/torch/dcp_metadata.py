"""The `.metadata` of a distributed checkpoint (DCP): which items there are, and where each lies.

It is a pickle of dataclasses, and is read by `pickles` into inert values.  Nothing that it says is
believed: types, shapes, blocks and names of files are checked here.  Opens no part.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Never

import numpy as np

from polyak_cli.errors import FormatError, shown
from polyak_cli.formats.torch import pickles
from polyak_cli.formats.torch.pickles import SIZES, Instance, Name, Pairs
from polyak_cli.processes.sandbox import Heartbeat

_MODULE = "torch.distributed.checkpoint"
_TENSOR = f"{_MODULE}.metadata.TensorStorageMetadata"
_BYTES = f"{_MODULE}.metadata.BytesStorageMetadata"
_CHUNK = f"{_MODULE}.metadata.ChunkStorageMetadata"
#: Where PyTorch has it today, and where older releases had it.
_SHARDS = "torch.distributed._shard.sharded_tensor.metadata"
_PROPERTIES = {f"{home}.TensorProperties" for home in (f"{_MODULE}.metadata", _SHARDS)}
_INDEX = f"{_MODULE}.metadata.MetadataIndex"
#: PyTorch's, and OLMo-core's own class with the same attributes.
_STORED = {
    f"{home}.filesystem._StorageInfo" for home in (_MODULE, "olmo_core.distributed.checkpoint")
}
_SIZE = "torch.Size"
#: Megatron's own classes for the same things; the first is a `Metadata` with one more attribute.
_MEGATRON = "megatron.core.dist_checkpointing.strategies"
_ROOTS = {f"{_MODULE}.metadata.Metadata", f"{_MEGATRON}.torch.MCoreMetadata"}
#: All that may be named; nothing of it is looked up.
_CLASSES = frozenset(
    {
        *_ROOTS,
        _TENSOR,
        _BYTES,
        _CHUNK,
        *_PROPERTIES,
        _INDEX,
        *_STORED,
        _SIZE,
        f"{_MODULE}.metadata._MEM_FORMAT_ENCODING",
        f"{_SHARDS}.MEM_FORMAT_ENCODING",
        f"{_MODULE}.metadata.StorageMeta",
        f"{_MEGATRON}.resharding.TensorReformulationMetadata",
        # What each process wrote, which Megatron keeps to plan the next save.
        f"{_MEGATRON}.torch.MCoreSavePlan",
        *(
            f"{_MODULE}.planner.{kind}"
            for kind in (
                "SavePlan",
                "WriteItem",
                "WriteItemType",
                "TensorWriteData",
                "BytesIOWriteData",
            )
        ),
        "torch.serialization._get_layout",
        # The folder that the checkpoint was saved to; Python 3.13 moved the classes.
        *(f"pathlib{home}.{kind}Path" for home in ("", "._local") for kind in ("Posix", "Windows")),
    }
)
#: What the storage of `HuggingFaceStorageWriter` is called.
_HUGGING_FACE = f"{_MODULE}._hf_utils._HFStorageInfo"
#: Dimensions of a tensor at most, as numpy has them.
_DIMENSIONS = 64


class Stored(NamedTuple):
    """Where one item, or one block of a tensor, lies."""

    file: str  # the name of a file beside `.metadata`
    offset: int
    nbytes: int


class Block(NamedTuple):
    """A block of a tensor that was saved by itself."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    stored: Stored


class TensorItem(NamedTuple):
    """A tensor, in blocks that cover it without overlaps."""

    name: str
    path: tuple[str, ...]  # the keys that lead to it in the state dict that was saved
    dtype: str
    shape: tuple[int, ...]
    blocks: Sequence[Block]  # none is empty


class BytesItem(NamedTuple):
    """Whatever else was saved: a number, a text, an object; in bytes that are not looked into."""

    name: str
    path: tuple[str, ...]
    stored: Stored


def read(content: bytes, heartbeat: Heartbeat) -> tuple[list[TensorItem], list[BytesItem]]:
    """Return the items of a checkpoint, in its order.

    Raises:
        FormatError: the metadata are damaged or hostile, or name what is not a file beside them.
    """
    root = _read_attributes(read_root(content, heartbeat), _ROOTS)
    stored = _read_places(root.get("storage_data"), heartbeat)
    paths = _read_paths(root.get("planner_data"))
    tensors: list[TensorItem] = []
    others: list[BytesItem] = []
    for name, item in heartbeat.over(_read_pairs(root.get("state_dict_metadata"), "the items")):
        if not isinstance(name, str):
            _refuse("an item has a name that is not a string")
        path = paths.get(name, (name,))
        if isinstance(item, Instance) and item.of == _BYTES:
            others.append(BytesItem(name, path, _find_place(stored, name, None)))
        else:
            try:
                tensors.append(_read_tensor(name, path, item, stored))
            except FormatError as error:
                raise FormatError(f"tensor '{shown(name)}' {error}") from None
    names = [*(item.name for item in tensors), *(item.name for item in others)]
    if len({*names}) < len(names):
        _refuse("two items have the same name")
    return tensors, others


def read_root(content: bytes, heartbeat: Heartbeat) -> Any:
    """Return what the pickle of metadata holds, of which nothing is checked.

    Raises:
        FormatError: it is damaged, or names what no metadata need.
    """
    try:
        return pickles.read(content, heartbeat, _CLASSES)
    except FormatError as error:
        if _HUGGING_FACE in str(error):
            raise FormatError(
                "was written by HuggingFaceStorageWriter, whose tensors are in safetensors files; "
                "name the folder of those, or save with FileSystemWriter"
            ) from None
        # The output would hand a stranger's name on to programs that do unpickle it.
        what, is_unknown, _ = str(error).partition(", which no state dict needs")
        if is_unknown:
            raise FormatError(
                f"{what}, which no metadata of a distributed checkpoint need and which is never "
                "run; they are hostile, or a planner keeps objects in them"
            ) from None
        raise


def _refuse(what: str) -> Never:
    raise FormatError(f"its metadata are damaged or hostile: {what}")


# --- attributes of dataclasses --------------------------------------------------------------------


def _read_attributes(value: Any, kinds: set[str]) -> dict[str, Any]:
    """Return the attributes of an object of a class."""
    if not isinstance(value, Instance) or value.of not in kinds:
        _refuse(f"expected a {min(kinds).rpartition('.')[2]}")
    return {
        key: item for key, item in _read_pairs(value.state, "attributes") if isinstance(key, str)
    }


def _read_pairs(value: Any, what: str) -> list[tuple[Any, Any]]:
    if not isinstance(value, Pairs):
        _refuse(f"{what} are not in a dictionary")
    return value.items


def _read_sizes(value: Any) -> tuple[int, ...]:
    """Return a `torch.Size`, checked to be one that a tensor could have."""
    match value:
        case Instance(of, (tuple(sizes),)) if of == _SIZE and len(sizes) <= _DIMENSIONS:
            if all(type(n) is int and 0 <= n < 1 << 63 for n in sizes):
                return sizes
    _refuse("a size is not a tuple of whole numbers of 0 or more")


# --- where items lie ------------------------------------------------------------------------------

#: Name of an item, and the index of a block's first element -> where it lies.
_Places = Mapping[tuple[str, tuple[int, ...] | None], Stored]


def _read_places(value: Any, heartbeat: Heartbeat) -> _Places:
    """Return where all items and blocks lie."""
    places: dict[tuple[str, tuple[int, ...] | None], Stored] = {}
    for index, info in heartbeat.over(_read_pairs(value, "the places of the items")):
        key = _read_attributes(index, {_INDEX})
        name, offset = key.get("fqn"), key.get("offset")
        if not isinstance(name, str):
            _refuse("the name of an item is not a string")
        start = None if offset is None else _read_sizes(offset)
        place = _read_place(name, _read_attributes(info, _STORED))
        if places.setdefault((name, start), place) != place:
            _refuse(f"'{shown(name)}' lies in two places")
    return places


def _read_place(name: str, info: Mapping[str, Any]) -> Stored:
    """Return one place, in a file beside the metadata: a path could lead to any file."""
    transforms = info.get("transform_descriptors")
    if transforms:
        raise FormatError(
            f"'{shown(name)}' is compressed ({shown(transforms, 60)}); save the checkpoint without "
            "extensions"
        )
    file, offset, nbytes = (info.get(key) for key in ("relative_path", "offset", "length"))
    if not isinstance(file, str) or file in ("", ".", "..") or re.search(r"[/\\\0]", file):
        _refuse(
            f"'{shown(name)}' lies in '{shown(file, 60)}'; expected the name of a file in the same "
            "folder"
        )
    numbers = (offset, nbytes)
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
        _refuse(f"'{shown(name)}' lies at offset {shown(offset, 40)}, {shown(nbytes, 40)} bytes")
    return Stored(file, int(numbers[0] or 0), int(numbers[1] or 0))


def _find_place(places: _Places, name: str, start: tuple[int, ...] | None) -> Stored:
    place = places.get((name, start))
    if place is None:
        where = "" if start is None else f" at {start}"
        _refuse(f"no place is given for '{shown(name)}'{where}")
    return place


def _read_paths(value: Any) -> dict[str, tuple[str, ...]]:
    """Return the path of keys of each item that has one; programs may keep something else here."""
    if not isinstance(value, Pairs):
        return {}
    return {
        name: tuple(str(key) for key in path)
        for name, path in value.items
        if isinstance(name, str)
        and isinstance(path, tuple)
        and path
        and all(isinstance(key, (str, int)) for key in path)
    }


# --- tensors --------------------------------------------------------------------------------------


def _read_tensor(name: str, path: tuple[str, ...], item: Any, places: _Places) -> TensorItem:
    """Return a tensor whose blocks cover it."""
    said = _read_attributes(item, {_TENSOR})
    shape = _read_sizes(said.get("size"))
    dtype = _read_dtype(said.get("properties"))
    if math.prod(shape) * SIZES[dtype] >= 1 << 62:
        _refuse(f"it has the shape {shown(shape, 60)}")
    chunks = said.get("chunks")
    if not isinstance(chunks, list):
        _refuse("its blocks are not in a list")
    blocks = []
    for chunk in chunks:
        known = _read_attributes(chunk, {_CHUNK})
        start, size = _read_sizes(known.get("offsets")), _read_sizes(known.get("sizes"))
        # A process that has no rows of a tensor saves an empty block.
        if math.prod(size):
            blocks.append(Block(start, size, _find_place(places, name, start)))
    _check_cover(shape, blocks)
    return TensorItem(name, path, dtype, shape, blocks)


def _read_dtype(properties: Any) -> str:
    """Return the type of a tensor; its other properties are no longer used."""
    if not isinstance(properties, Instance) or properties.of not in _PROPERTIES:
        _refuse("it has no properties")
    state = properties.state
    if isinstance(state, tuple) and state and isinstance(state[0], Name):
        dtype = state[0].full.removeprefix("torch.")
        if dtype in SIZES:
            return dtype
    _refuse("it has no known type")


def _check_cover(shape: tuple[int, ...], blocks: Sequence[Block]) -> None:
    """Refuse blocks that reach out of a tensor, overlap, or leave elements without a block."""
    for start, size, _ in blocks:
        if len(start) != len(shape) or len(size) != len(shape):
            raise FormatError(f"has a block of {len(size)} dimensions; expected {len(shape)}")
        if any(n + k > whole for n, k, whole in zip(start, size, shape, strict=True)):
            raise FormatError(
                f"has a block of shape {shown(size, 60)} at {shown(start, 60)}, which reaches out "
                f"of its shape {shown(shape, 60)}"
            )
    held, whole = sum(math.prod(block.shape) for block in blocks), math.prod(shape)
    if held < whole:
        raise FormatError(
            f"has blocks of {held} elements; expected {whole}: some ranks did not save theirs"
        )
    overlap = _find_overlap(blocks)
    if overlap or held > whole:
        raise FormatError(f"has overlapping blocks, one of them at {shown(overlap, 60)}")


def _find_overlap(blocks: Sequence[Block]) -> tuple[int, ...] | None:
    """Return the start of a block that overlaps an earlier one, None if none does."""
    if len(blocks) < 2:
        return None
    starts = np.array([block.start for block in blocks])
    stops = starts + np.array([block.shape for block in blocks])
    # In the order of one dimension, only blocks that have begun and not ended can overlap.
    sweep = int(np.argmax([len({*column}) for column in starts.T.tolist()]))
    order = np.argsort(starts[:, sweep], kind="stable")
    starts, stops = starts[order], stops[order]
    bounds = np.searchsorted(starts[:, sweep], stops[:, sweep])
    for k, bound in enumerate(bounds.tolist()):
        later = slice(k + 1, max(bound, k + 1))
        apart = (starts[later] >= stops[k]) | (stops[later] <= starts[k])
        common = np.flatnonzero(~apart.any(axis=1))
        if len(common):
            return tuple(int(n) for n in starts[k + 1 + common[0]])
    return None
