"""Where the values of an Orbax checkpoint lie, and how each array is made of them.

A value is a chunk of an array: a key of an OCDBT database (`ocdbt`), or a file in a folder.
`zarr` says which keys an array has.  Knows no tree and no format.
"""

from __future__ import annotations

import itertools
import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from polyak_cli.errors import FormatError, shown, word_size
from polyak_cli.formats import checksums, zips
from polyak_cli.formats.orbax import contents, ocdbt, zarr
from polyak_cli.formats.orbax.contents import Contents
from polyak_cli.formats.orbax.ocdbt import Value
from polyak_cli.processes.sandbox import Heartbeat
from polyak_cli.storage import File, open_input
from polyak_cli.tensors import Extent, Grid, GridPart, Inline, Storage, TensorSpec

#: Bytes up to which a tensor whose chunks stand in the database itself is read with its header.
_SMALL = 1 << 20
#: Bytes that a compressed byte can stand for: of zstd's blocks, those of one repeated byte are the
#: densest, 128 KiB in 4 bytes; of zlib's, matches of 258 bytes in 2 bits.
_MOST_GAINED = {"zstd": 1 << 15, "gzip": 1032}
#: Chunks of a checkpoint that need not be stored: no more than these are believed.
_MOST_MISSING = 1 << 16
#: How the folders of the processes of a run begin.
_PROCESS = "ocdbt.process_"
#: Offset and length in a shard's index of a chunk that is not stored.
_ABSENT = (1 << 64) - 1


class Leaf(NamedTuple):
    """One array of the tree."""

    name: str  # its keys, joined by dots, as Orbax calls it
    path: tuple[str, ...]


class Piece(NamedTuple):
    """A chunk: a block of an array, and where its bytes are."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    value: Value | None  # None: it is not stored, and all of its elements are the fill value


@dataclass
class Values:
    """The values of a checkpoint by their keys, and the files that they lie in."""

    folder: Path
    database: Mapping[str, Value] | None  # None: each is a file
    is_sparse: bool  # chunks of the fill value need not be stored
    missing: int = 0  # chunks that are not
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

    def count_missing(self, array: zarr.Array, key: str) -> None:
        """Count a chunk that is not stored.

        Raises:
            FormatError: it should be, or they are too many; the message lacks the tensor.
        """
        self.missing += 1
        if not self.is_sparse:
            raise FormatError(
                f"has shape {shown(array.shape, 60)}, but no chunk '{key}'; the checkpoint is not "
                "complete"
            )
        if self.missing > _MOST_MISSING:
            raise FormatError(
                f"has shape {shown(array.shape, 60)}, but no chunk '{key}', and with it more than "
                f"{_MOST_MISSING} chunks are missing; it is damaged or hostile"
            )

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


def read_array(values: Values, leaf: Leaf, heartbeat: Heartbeat) -> tuple[zarr.Array, list[Piece]]:
    """Return what the metadata of an array say, and its chunks.

    Raises:
        FormatError: they are missing, damaged or hostile; names file and tensor.
    """
    try:
        array = _read_metadata(values, leaf)
        return array, _list_pieces(values, leaf, array, heartbeat)
    except FormatError as error:
        raise _name_tensor(values, leaf, error) from None


def _name_tensor(values: Values, leaf: Leaf, error: FormatError) -> FormatError:
    """Put the names of the folder and of a tensor in front of an error that has neither."""
    if str(error).startswith(str(shown(values.folder))):
        return error
    return FormatError(f"{shown(values.folder)}: tensor '{shown(leaf.name)}' {error}")


def _read_metadata(values: Values, leaf: Leaf) -> zarr.Array:
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


def describe(values: Values, leaf: Leaf, heartbeat: Heartbeat) -> TensorSpec:
    """Describe an array."""
    array, pieces = read_array(values, leaf, heartbeat)
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
    values: Values, leaf: Leaf, array: zarr.Array, heartbeat: Heartbeat
) -> list[Piece]:
    """Return the chunks of an array, also those that are not stored."""
    pieces: list[Piece] = []
    for start, key in heartbeat.over(array.list_keys()):
        value = values.find(f"{leaf.name}/{key}")
        if array.inner is not None and value is not None:
            pieces += _open_shard(values, array, start, value)
            continue
        starts = [start] if array.inner is None else array.list_inner(start)
        for place in starts:
            if value is None:
                values.count_missing(array, key)
            if array.has(place):
                pieces.append(_clip(array, place, array.inner or array.chunk, value))
    return pieces


def _open_shard(
    values: Values, array: zarr.Array, start: Sequence[int], value: Value
) -> Iterable[Piece]:
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
        if not array.has(at):
            continue  # behind the array's end, where a shard holds padding
        if offset == length == _ABSENT:
            values.count_missing(array, "/".join(map(str, at)))
            yield _clip(array, at, array.inner, None)
            continue
        if offset + length > size - nbytes - 4:
            raise FormatError("has a shard with a chunk outside of it")
        yield _clip(array, at, array.inner, values.cut(value, offset, length))


def _clip(
    array: zarr.Array, start: Sequence[int], chunk: Sequence[int], value: Value | None
) -> Piece:
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
    if value is not None and not array.codec.compression and _count(value) != nbytes:
        raise FormatError(f"has a chunk of {_count(value)} bytes; expected {nbytes}")
    return Piece(tuple(start), shape, value)


def _store(values: Values, array: zarr.Array, pieces: Sequence[Piece]) -> Storage:
    """Return where the elements of an array lie."""
    nbytes = math.prod(array.shape) * array.itemsize
    if any(piece.value and piece.value.content is not None for piece in pieces):
        return _read_small(values, array, pieces, nbytes)
    places = [piece.value and values.place(piece.value) for piece in pieces]
    extents = [place for place in places if place]
    values.pieces += extents
    sizes = [math.prod(piece.shape) * array.itemsize for piece in pieces]
    if not nbytes:
        return Extent(0, 0)
    fill = bytes(array.itemsize) if len(extents) == len(places) else array.encode_fill()
    for size, place in zip(sizes, places, strict=True):
        if place and size > place.nbytes * _MOST_GAINED.get(array.codec.compression, 1):
            raise FormatError(
                f"has {size} bytes in a chunk of {place.nbytes}, which is more than "
                f"{array.codec.compression or 'plain bytes'} can hold; it is damaged or hostile"
            )
    if array.codec.compression or len(extents) < len(places):
        inner = [Extent(0, size, number) for number, size in enumerate(sizes)]
        grid = Grid(array.shape, array.itemsize, _join(pieces, inner))
        return Contents(grid, tuple(places), array.codec.compression, fill)
    extents = [extent._replace(nbytes=size) for extent, size in zip(extents, sizes, strict=True)]
    if len(extents) == 1:
        return extents[0]
    return Grid(array.shape, array.itemsize, _join(pieces, extents))


def _join(pieces: Sequence[Piece], extents: Sequence[Extent]) -> tuple[GridPart, ...]:
    return tuple(
        GridPart(piece.start, piece.shape, extent)
        for piece, extent in zip(pieces, extents, strict=True)
    )


def _read_small(values: Values, array: zarr.Array, pieces: Sequence[Piece], nbytes: int) -> Inline:
    """Read an array of which some chunks stand in the database itself."""
    if nbytes > _SMALL:
        raise FormatError(f"has {word_size(nbytes)} in chunks of a few bytes; expected larger ones")
    extents, data = [], []
    for number, piece in enumerate(pieces):
        size = math.prod(piece.shape) * array.itemsize
        if piece.value is None:
            raw = array.encode_fill() * math.prod(piece.shape)
        else:
            raw = values.read(piece.value, 0, _count(piece.value))
            if array.codec.compression:
                raw = contents.decompress(raw, max(_SMALL, size), array.codec.compression)
        if len(raw) < size:
            raise FormatError(f"has a chunk of {len(raw)} bytes; expected {size}")
        data.append(raw)
        extents.append(Extent(0, size, number))
    grid = Grid(array.shape, array.itemsize, _join(pieces, extents))
    return Inline(contents.assemble(grid, data))


def refuse_shared(values: Values, path: str) -> None:
    """Refuse chunks of which two lie in the same bytes."""
    places = sorted(values.pieces, key=lambda extent: (extent.file, extent.offset, extent.nbytes))
    for one, other in itertools.pairwise(places):
        if one.file == other.file and one.offset + one.nbytes > other.offset:
            raise FormatError(
                f"{shown(path)}: two chunks lie at offset {other.offset} of "
                f"{shown(values.files[one.file].path)}; it is damaged or hostile"
            )


def open_values(
    folder: Path, uses_ocdbt: bool | None, is_sparse: bool, heartbeat: Heartbeat
) -> Values:
    """Return the values in a folder; a database is read whole, as it is a list of keys.

    Args:
        folder: that of the checkpoint.
        uses_ocdbt: whether they lie in a database; None if only the folder shows it.
        is_sparse: chunks of the fill value need not be stored.
        heartbeat: called every few keys.

    Raises:
        FormatError: the database is missing or damaged; names the file.
    """
    homes = _find_databases(folder)
    if not homes and not uses_ocdbt:
        return Values(folder, None, is_sparse)
    found: dict[str, Value] = {}
    files: list[str] = []
    twice: list[tuple[str, str, Value]] = []
    for home in homes or [""]:
        keys, names = ocdbt.read(folder / home, heartbeat)
        prefix = f"{home}/" if home else ""
        files += (prefix + name for name in names)
        for key, value in keys.items():
            moved = value._replace(file=prefix + value.file) if value.content is None else value
            if found.setdefault(key, moved) is not moved:
                twice.append((home, key, moved))
    values = Values(folder, found, is_sparse)
    for name in files:
        values.add(name)
    for home, key, value in twice:
        _require_equal(values, home, key, value)
    return values


def _require_equal(values: Values, home: str, key: str, value: Value) -> None:
    """Refuse a value of a second process that differs from the first one's, or is a chunk.

    Each process describes the arrays of which it writes some chunks.
    """
    first = values.find(key)
    nbytes = _count(value)
    if (
        key.rpartition("/")[2] not in (zarr.V2, zarr.V3)
        or first is None
        or not nbytes == _count(first) <= _SMALL
        or values.read(first, 0, nbytes) != values.read(value, 0, nbytes)
    ):
        raise FormatError(
            f"{shown(values.folder / home)}: holds another value of '{shown(key, 60)}' than the "
            "other processes' databases; it is damaged"
        )


def _find_databases(folder: Path) -> list[str]:
    """Return the folders in a folder that hold a database: itself, or those of its processes.

    The last step of a save merges the latter into the former, unless that is switched off.
    """
    if (folder / ocdbt.MANIFEST).is_file():
        return [""]
    found = [path.parent.name for path in folder.glob(f"{_PROCESS}*/{ocdbt.MANIFEST}")]
    return sorted(found, key=lambda name: (len(name), name))
