"""Checkpoints of Orbax: a folder of `_METADATA`, which lists a tree of arrays, and their values.

The values lie in an OCDBT database in the folder (`ocdbt`), or in a folder for each array.  A value
is a chunk of an array (`zarr`), and mostly a whole array or the part of one device.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from polyak_cli.errors import FormatError, shown, word_size
from polyak_cli.formats import checksums, conversion, zips
from polyak_cli.formats.format import Draft, Format, ScanRequest, SkeletonRequest
from polyak_cli.formats.model_folders import RECORD_NAME
from polyak_cli.formats.orbax import contents, ocdbt, writing, zarr
from polyak_cli.formats.orbax.contents import Contents
from polyak_cli.formats.orbax.ocdbt import Value
from polyak_cli.processes.sandbox import Heartbeat
from polyak_cli.storage import File, open_input
from polyak_cli.storage.local import LocalOutput, name_errors
from polyak_cli.tensors import (
    FLOATS,
    Extent,
    Grid,
    GridPart,
    Inline,
    OutputRules,
    Storage,
    Table,
    TensorSpec,
)

#: Under what programs keep optimizers and metrics: Keras; Flax's TrainState and MaxText; T5X; NNX.
_STATE = re.compile(
    r"optimizer(_variables|_states?)?|opt(_states?)?|metrics(_variables)?|param_states|tx"
)
#: What an array's value may be: what Orbax calls types of leaves, without their packages.
_ARRAYS = {"jax.Array", "np.ndarray", "scalar"}
#: Files of databases, which one database of an output replaces.
_STORAGE = re.compile(r"([^/]+/)?(ocdbt\.process_\d+/)?(manifest\.ocdbt|d/[0-9a-f]{32})")
_STRINGS = "_strings.json"
_ITEMS = "_CHECKPOINT_METADATA"
#: Bytes up to which a tensor whose chunks stand in the database itself is read with its header.
_SMALL = 1 << 20


class _Leaf(NamedTuple):
    """One array of the tree."""

    name: str  # its keys, joined by dots, as Orbax calls it
    path: tuple[str, ...]


class _Listed(NamedTuple):
    """What `_METADATA` says."""

    file: File
    arrays: Sequence[_Leaf]
    keys: Mapping[str, str]  # name of an array -> its key in the tree
    strings: Collection[str]
    uses_ocdbt: bool
    content: Mapping[str, Any]

    def list_keys(self, kept: Collection[str]) -> set[str]:
        """Return the tree's keys without those of arrays that are not kept."""
        left_out = {key for name, key in self.keys.items() if name not in kept}
        return set(self.content["tree_metadata"]) - left_out


class _Piece(NamedTuple):
    """A chunk: a block of an array, and where its bytes are."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    value: Value


# --- the tree -------------------------------------------------------------------------------------


def _read_json(path: Path) -> tuple[File, dict[str, Any]]:
    """Return a file of one JSON object."""
    with open_input(path) as file, name_errors(str(path)):
        if file.size > zips.WHOLE:
            raise FormatError(
                f"has {word_size(file.size)}; expected at most {word_size(zips.WHOLE)}"
            )
        try:
            said = json.loads(file.read(0, file.size))
        except (ValueError, RecursionError) as error:
            raise FormatError(
                f"is not JSON ({shown(error, 60)}); it is truncated or damaged"
            ) from None
        if not isinstance(said, dict):
            raise FormatError("is not a JSON object; it is damaged")
        return File(str(path), file.version), said


def _read_tree(path: str, heartbeat: Heartbeat) -> _Listed:
    """Read which arrays there are.

    Raises:
        FormatError: `_METADATA` is damaged, or lists something that is not read here.
    """
    file, said = _read_json(Path(path))
    with name_errors(path):
        tree, uses_ocdbt = said.get("tree_metadata"), said.get("use_ocdbt", True)
        if not isinstance(tree, dict) or not isinstance(uses_ocdbt, bool):
            raise FormatError("has no tree_metadata of an Orbax checkpoint")
        arrays, strings, keys = [], [], {}
        for key, entry in heartbeat.over(tree.items()):
            leaf, kind = _parse_leaf(key, entry)
            if kind in _ARRAYS:
                arrays.append(leaf)
                keys[leaf.name] = key
            elif kind == "string":
                strings.append(leaf.name)
            elif not (isinstance(entry, dict) and entry["value_metadata"].get("skip_deserialize")):
                raise FormatError(
                    f"'{shown(leaf.name)}' is a {shown(kind, 40)}; expected arrays, numbers and "
                    "strings"
                )
        if len(keys) < len(arrays):
            raise FormatError("two of its arrays have the same name")
    return _Listed(file, arrays, keys, strings, uses_ocdbt, said)


def _parse_leaf(key: str, entry: Any) -> tuple[_Leaf, str]:
    """Return one leaf of the tree, and what it is."""
    try:
        keys = [each["key"] for each in entry["key_metadata"]]
        kind = entry["value_metadata"]["value_type"]
        path = tuple(str(each) for each in keys if isinstance(each, (str, int)))
        if len(path) != len(keys) or not path or not isinstance(kind, str):
            raise TypeError("its keys are no texts")
    except (LookupError, TypeError) as error:
        raise FormatError(
            f"describes {shown(key, 60)} by something else than keys and a type "
            f"({shown(error, 40)})"
        ) from None
    return _Leaf(".".join(path), path), kind


# --- values ---------------------------------------------------------------------------------------


@dataclass
class _Values:
    """The values of a checkpoint by their keys, and the files that they lie in."""

    folder: Path
    database: Mapping[str, Value] | None  # None: each is a file
    files: list[File] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)
    pieces: list[Extent] = field(default_factory=list)  # all that were found

    def find(self, key: str) -> Value | None:
        """Return the value of a key, None if there is none."""
        if self.database is not None:
            return self.database.get(key)
        try:
            with open_input(self.folder / key) as file:
                return Value(None, key, 0, file.size)
        except FormatError as error:
            if isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
                return None
            raise

    def add(self, name: str) -> int:
        """Return the number of a file, which is one of the checkpoint's from now on."""
        if name not in self.numbers:
            path = str(self.folder / name)
            with open_input(path) as file:
                self.files.append(File(path, file.version))
            self.numbers[name] = len(self.files) - 1
        return self.numbers[name]

    def place(self, value: Value) -> Extent:
        """Return where a value lies that is not in the database itself.

        Raises:
            FormatError: it lies outside of its file; names the file.
        """
        number = self.add(value.file)
        file = self.files[number]
        if value.offset + value.nbytes > file.version.size:
            raise FormatError(
                f"{shown(file.path)}: is too short: {value.nbytes} bytes at offset {value.offset} "
                "lie outside of it; it is truncated, or the files come from different saves"
            )
        return Extent(value.offset, value.nbytes, number)

    def read(self, value: Value, start: int, stop: int) -> bytes:
        """Return bytes of a value."""
        if value.content is not None:
            return value.content[start:stop]
        offset, _, number = self.place(value)
        with open_input(*self.files[number]) as file:
            return file.read(offset + start, stop - start)

    def cut(self, value: Value, offset: int, nbytes: int) -> Value:
        """Return a part of a value."""
        if value.content is not None:
            return Value(value.content[offset : offset + nbytes], nbytes=nbytes)
        return value._replace(offset=value.offset + offset, nbytes=nbytes)


def _read_array(
    values: _Values, leaf: _Leaf, heartbeat: Heartbeat
) -> tuple[zarr.Array, list[_Piece]]:
    """Return what the metadata of an array say, and its chunks.

    Raises:
        FormatError: they are missing, damaged or hostile; names file and tensor.
    """
    try:
        array = _read_metadata(values, leaf)
        return array, _list_pieces(values, leaf, array, heartbeat)
    except FormatError as error:
        raise _name_tensor(values, leaf, error) from None


def _name_tensor(values: _Values, leaf: _Leaf, error: FormatError) -> FormatError:
    """Put the names of the folder and of a tensor in front of an error that has neither."""
    if str(error).startswith(str(shown(values.folder))):
        return error
    return FormatError(f"{shown(values.folder)}: tensor '{shown(leaf.name)}' {error}")


def _read_metadata(values: _Values, leaf: _Leaf) -> zarr.Array:
    """Read the metadata of an array."""
    if re.search(r"(^|/)\.{1,2}(/|$)|^/|//|\0", leaf.name):
        raise FormatError("has a name that leads out of the checkpoint")
    found = [(name, values.find(f"{leaf.name}/{name}")) for name in (zarr.V2, zarr.V3)]
    said = [(name, value) for name, value in found if value is not None]
    if len(said) != 1:
        raise FormatError(
            f"has both {zarr.V2} and {zarr.V3}"
            if said
            else f"has neither {zarr.V2} nor {zarr.V3}; the checkpoint is not complete"
        )
    name, value = said[0]
    nbytes = _count(value)
    if nbytes > _SMALL:
        raise FormatError(f"has a {name} of {word_size(nbytes)}")
    return zarr.parse(name, values.read(value, 0, nbytes))


def _describe(values: _Values, leaf: _Leaf, heartbeat: Heartbeat) -> TensorSpec:
    """Describe an array."""
    array, pieces = _read_array(values, leaf, heartbeat)
    try:
        storage = _store(values, array, pieces)
    except FormatError as error:
        raise _name_tensor(values, leaf, error) from None
    return TensorSpec(
        leaf.name, array.shape, array.dtype, array.codec.byteorder, leaf.name, storage
    )


def _count(value: Value) -> int:
    """Return the bytes of a value."""
    return value.nbytes if value.content is None else len(value.content)


def _list_pieces(
    values: _Values, leaf: _Leaf, array: zarr.Array, heartbeat: Heartbeat
) -> list[_Piece]:
    """Return the chunks of an array; one that is missing is an error, so none is made up."""
    pieces: list[_Piece] = []
    for start, key in heartbeat.over(array.list_keys()):
        value = values.find(f"{leaf.name}/{key}")
        if value is None:
            raise FormatError(
                f"has shape {shown(array.shape, 60)}, but no chunk '{key}'; the checkpoint is not "
                "complete, or an Orbax wrote it that left out chunks of zeros: restore it and "
                "save it again"
            )
        if array.inner is None:
            pieces.append(_clip(array, start, array.chunk, value))
        else:
            pieces += _open_shard(values, array, start, value)
    return pieces


def _open_shard(
    values: _Values, array: zarr.Array, start: Sequence[int], value: Value
) -> Iterable[_Piece]:
    """Yield the chunks of a shard, which its index at its end lists (Zarr 3, sharding codec)."""
    assert array.inner is not None  # noqa: S101 (only shards are opened)
    inner = math.prod(c // i for c, i in zip(array.chunk, array.inner, strict=True))
    nbytes, size = 16 * inner, _count(value)
    if nbytes + 4 > min(size, zips.WHOLE):
        raise FormatError(f"has a shard of {size} bytes; expected an index of {inner} chunks in it")
    index = values.read(value, size - nbytes - 4, size)
    if struct.unpack("<L", index[-4:])[0] != checksums.crc32c(index[:-4]):
        raise FormatError("has a shard whose index has a wrong checksum; it is damaged")
    places = struct.iter_unpack("<QQ", index[:-4])
    for at, (offset, length) in zip(array.list_inner(start), places, strict=True):
        if any(k >= n for k, n in zip(at, array.shape, strict=True)):
            continue  # behind the array's end, where a shard holds padding
        if offset + length > size - nbytes - 4:
            raise FormatError(
                "has a shard with a chunk outside of it, or without one of its chunks"
            )
        yield _clip(array, at, array.inner, values.cut(value, offset, length))


def _clip(array: zarr.Array, start: Sequence[int], chunk: Sequence[int], value: Value) -> _Piece:
    """Return a chunk without what lies behind the array's end."""
    ends = zip(start, chunk, array.shape, strict=True)
    shape = tuple(min(c, n - k) for k, c, n in ends)
    # Only at the end of the first dimension that it has more than one of is padding a tail.
    first = next((k for k, c in enumerate(chunk) if c > 1), 0)
    if shape[first + 1 :] != tuple(chunk[first + 1 :]):
        raise FormatError(
            f"has the shape {shown(array.shape, 60)} and chunks of {shown(tuple(chunk), 60)}; "
            "expected chunks that fill it"
        )
    nbytes = math.prod(chunk) * array.itemsize
    if not array.codec.is_compressed and _count(value) != nbytes:
        raise FormatError(f"has a chunk of {_count(value)} bytes; expected {nbytes}")
    return _Piece(tuple(start), shape, value)


def _store(values: _Values, array: zarr.Array, pieces: Sequence[_Piece]) -> Storage:
    """Return where the elements of an array lie."""
    nbytes = math.prod(array.shape) * array.itemsize
    if any(piece.value.content is not None for piece in pieces):
        return _read_small(values, array, pieces, nbytes)
    extents = [values.place(piece.value) for piece in pieces]
    values.pieces += extents
    sizes = [math.prod(piece.shape) * array.itemsize for piece in pieces]
    if not array.codec.is_compressed:
        extents = [
            extent._replace(nbytes=size) for extent, size in zip(extents, sizes, strict=True)
        ]
        if len(extents) <= 1:
            return extents[0] if extents else Extent(0, 0)
        return Grid(array.shape, array.itemsize, _join(pieces, extents))
    if not nbytes:
        return Extent(0, 0)
    inner = [Extent(0, size, number) for number, size in enumerate(sizes)]
    return Contents(Grid(array.shape, array.itemsize, _join(pieces, inner)), tuple(extents))


def _join(pieces: Sequence[_Piece], extents: Sequence[Extent]) -> tuple[GridPart, ...]:
    return tuple(
        GridPart(piece.start, piece.shape, extent)
        for piece, extent in zip(pieces, extents, strict=True)
    )


def _read_small(
    values: _Values, array: zarr.Array, pieces: Sequence[_Piece], nbytes: int
) -> Inline:
    """Read an array of which some chunks stand in the database itself."""
    if nbytes > _SMALL:
        raise FormatError(f"has {word_size(nbytes)} in chunks of a few bytes; expected larger ones")
    extents, data = [], []
    for number, piece in enumerate(pieces):
        size = math.prod(piece.shape) * array.itemsize
        raw = values.read(piece.value, 0, _count(piece.value))
        if array.codec.is_compressed:
            raw = contents.decompress(raw, max(_SMALL, size))
        if len(raw) < size:
            raise FormatError(f"has a chunk of {len(raw)} bytes; expected {size}")
        data.append(raw)
        extents.append(Extent(0, size, number))
    grid = Grid(array.shape, array.itemsize, _join(pieces, extents))
    return Inline(contents.assemble(grid, data))


def _refuse_shared(values: _Values, path: str) -> None:
    """Refuse chunks of which two lie in the same bytes."""
    places = sorted(values.pieces, key=lambda extent: (extent.file, extent.offset, extent.nbytes))
    for one, other in itertools.pairwise(places):
        if one.file == other.file and one.offset + one.nbytes > other.offset:
            raise FormatError(
                f"{shown(path)}: two chunks lie at offset {other.offset} of "
                f"{shown(values.files[one.file].path)}; it is damaged or hostile"
            )


def _open_values(listed: _Listed, heartbeat: Heartbeat) -> _Values:
    """Return the values of a checkpoint; its database is read whole, as it is a list of keys."""
    folder = Path(listed.file.path).parent
    if not listed.uses_ocdbt:
        return _Values(folder, None)
    database, files = ocdbt.read(folder, heartbeat)
    values = _Values(folder, database)
    for name in files:
        values.add(name)
    return values


def _is_state(path: Sequence[str]) -> bool:
    """Tell whether an array continues a training, and is none of the model's."""
    return any(_STATE.fullmatch(key) for key in path[:2])


def _find_root(path: str | Path) -> Path:
    """Return the folder of a checkpoint, which may hold the tree's folder beside others.

    A `CheckpointManager` saves several items for a step, each in a folder of its own; the step's
    folder has a file that lists them.
    """
    folder = Path(path).parent
    is_item = (folder.parent / _ITEMS).is_file() and not (folder / _ITEMS).is_file()
    return folder.parent if is_item else folder


def _read_record(path: str) -> str:
    """Return the record of an average, which is a file in its folder; "" if there is none."""
    try:
        with open_input(_find_root(path) / RECORD_NAME) as file:
            return file.read(0, zips.WHOLE).decode(errors="replace").removesuffix("\n")
    except FormatError:
        return ""


class OrbaxCheckpoint(Format):
    """The folders that `orbax.checkpoint` and Keras's `OrbaxCheckpoint` write."""

    key = "orbax"
    name = "Orbax"
    suffixes = ()
    recalculation = (
        "load the average into the model, and run training data through it in training mode, "
        "without a step of the optimizer"
    )
    can_be_folder = True
    carries_all = True
    can_be_left = True
    dtypes = frozenset(FLOATS)

    def scan(self, request: ScanRequest, heartbeat: Heartbeat) -> Table:
        """See `Format.scan`."""
        listed = _read_tree(request.path, heartbeat)
        values = _open_values(listed, heartbeat)
        tensors: dict[str, TensorSpec] = {}
        others: dict[str, TensorSpec] = {}
        state = frozenset(leaf.name for leaf in listed.arrays if _is_state(leaf.path))
        for leaf in heartbeat.over(listed.arrays):
            spec = _describe(values, leaf, heartbeat)
            # All are looked at, so that the checkpoint's files are the same either way.
            if leaf.name not in state:
                tensors[leaf.name] = spec
            elif request.with_optimizer:
                others[leaf.name] = spec
        if not tensors:
            raise FormatError(f"{shown(request.path)}: lists no array of a model")
        _refuse_shared(values, request.path)
        record = _read_record(request.path)
        return Table(
            path=Path(request.path),
            format=self.key,
            files=(*values.files, listed.file),
            tensors=tensors,
            others=others,
            optimizer=state,
            config="",
            is_polyak_output=bool(record),
            about={"provenance": record} if record else {},
            rules=OutputRules(is_fixed=False),
        )

    def texts(self, table: Table, heartbeat: Heartbeat) -> dict[str, str]:
        """See `Format.texts`: strings of the tree, and the configuration of a Keras model."""
        listed = _read_tree(table.files[-1].path, heartbeat)
        folder = Path(listed.file.path).parent
        found = _read_strings(folder / _STRINGS) if listed.strings else {}
        try:
            found |= _read_strings(folder.parent / "model_config" / _STRINGS)
        except FormatError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
        return found

    def find_root(self, template: Table) -> Path:
        """See `Format.find_root`."""
        return _find_root(template.path)

    def is_storage(self, name: str) -> bool:
        """See `Format.is_storage`: of databases, what older versions and processes left."""
        return _STORAGE.fullmatch(name) is not None

    def name_outputs(self, template: Table) -> list[str]:
        """See `Format.name_outputs`; values lie in one file, whatever the template's lie in."""
        folder = template.path.parent.relative_to(_find_root(template.path))
        names = *writing.FILES, template.path.name
        return [(folder / name).as_posix() for name in names]

    def write_skeleton(self, request: SkeletonRequest, heartbeat: Heartbeat) -> Draft:
        """See `Format.write_skeleton`."""
        template = request.template
        listed = _read_tree(template.files[-1].path, heartbeat)
        values = _open_values(listed, heartbeat)
        conversion.require_same(listed.file.path, listed.file.version, template.files[-1].version)
        paths = [str(Path(request.output, name)) for name in self.name_outputs(template)]
        manifest_path, data_path, tree_path = paths
        specs = {**template.tensors, **template.others}
        layout, placements, kept = writing.Layout(), {}, set()
        Path(data_path).parent.mkdir(parents=True, exist_ok=True)
        with (
            conversion.Carrier(template, heartbeat) as carrier,
            LocalOutput(data_path, create=True) as output,
        ):
            for leaf in heartbeat.over(listed.arrays):
                spec = specs[leaf.name]
                if leaf.name in template.optimizer and request.drop_optimizer:
                    continue
                kept.add(leaf.name)
                array, pieces = _read_array(values, leaf, heartbeat)
                blocks = [(piece.start, piece.shape) for piece in pieces]
                wanted = request.averaged.get(leaf.name)
                grid = layout.add(writing.Chunked(leaf.name, array, blocks), wanted or spec.dtype)
                if wanted and spec.size:
                    placements[leaf.name] = writing.place(grid, wanted)
                elif not wanted:
                    carrier.carry(spec, writing.Target(output, grid), 0)
            node, manifest = layout.finish()
            output.truncate(layout.end)
            output.write(layout.end, node)
        tree = writing.encode_tree(listed.content, listed.list_keys(kept))
        for path, content in ((manifest_path, manifest), (tree_path, tree)):
            with LocalOutput(path, create=True) as output:
                output.write(0, content)
        return Draft(placements, paths)

    def is_polyak_output(self, path: str, heartbeat: Heartbeat) -> bool:
        """See `Format.is_polyak_output`."""
        heartbeat()
        return bool(_read_record(path))


def _read_strings(path: Path) -> dict[str, str]:
    """Return the strings of a tree."""
    _, said = _read_json(path)
    if not all(isinstance(text, str) for text in said.values()):
        raise FormatError(f"{shown(path)}: does not map names to strings; it is damaged")
    return said
