"""Turn tables into what JSON can hold, and back: the only place where they cross a process border.

Knows no format.  A child that reads a hostile header may have been taken over by it, so what comes
back is checked: nothing but texts, and numbers that lie inside the files.
"""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polyak_cli.errors import FormatError, shown
from polyak_cli.storage import File, Version
from polyak_cli.tensors import (
    FLOATS,
    Asset,
    Extent,
    Grid,
    GridPart,
    Inline,
    KerasFacts,
    OutlinedLayer,
    OutputRules,
    Placement,
    Storage,
    Table,
    TensorSpec,
)


class _NonsenseError(Exception):
    """A child sent something that no format sends."""


#: What unpacking raises for rows of other types or lengths than `pack_table` makes.
_MALFORMED = (_NonsenseError, LookupError, TypeError, ValueError, AttributeError, OverflowError)
#: HDF5 keeps the size of a chunk in 32 bits, and decoding one takes that much memory.
_CHUNK_NBYTES = 1 << 32


# --- to JSON --------------------------------------------------------------------------------------


def pack_table(table: Table) -> dict[str, Any]:
    """Return a table as what JSON can hold; `unpack_table` makes it a table again."""
    return {
        "files": [[file.path, list(file.version)] for file in table.files],
        "tensors": [_pack_spec(spec) for spec in table.tensors.values()],
        "others": [_pack_spec(spec) for spec in table.others.values()],
        "optimizer": sorted(table.optimizer),
        "config": table.config,
        "is_polyak_output": table.is_polyak_output,
        "about": dict(table.about),
        "keras": [
            list(table.keras.layers),
            sorted(table.keras.statistics),
            {slot: list(names) for slot, names in table.keras.ema_slots.items()},
            [list(layer) for layer in table.keras.outline],
            dict(table.keras.labels),
        ],
        "rules": [
            list(table.rules.suffixes),
            dict(table.rules.cautions),
            table.rules.is_fixed,
            list(table.rules.tails),
            table.rules.part,
        ],
        "assets": {name: list(asset) for name, asset in table.assets.items()},
    }


def _pack_spec(spec: TensorSpec) -> list[Any]:
    storage = None if spec.storage is None else _pack_storage(spec.storage)
    row = [spec.name, spec.shape, spec.dtype, spec.byteorder, spec.location, storage]
    # Most tensors have neither; for 100,000 of them it is a third of the text.
    return [*row, spec.digest, spec.arrangement] if spec.digest or spec.arrangement else row


def _pack_storage(storage: Storage) -> list[Any]:
    if isinstance(storage, Extent):
        return ["extent", *storage]
    if isinstance(storage, Inline):
        return ["inline", storage.data.hex()]
    if isinstance(storage, Grid):
        parts = [[part.start, part.shape, list(part.extent)] for part in storage.parts]
        return ["grid", storage.shape, storage.itemsize, parts]
    from polyak_cli.formats.zips import Deflated

    if isinstance(storage, Deflated):
        return ["deflated", *storage.fields()]
    from polyak_cli.formats.hdf5.chunks import Chunks

    if isinstance(storage, Chunks):
        return ["chunks", *storage.fields()]
    from polyak_cli.formats.orbax.contents import Contents

    if isinstance(storage, Contents):
        return ["contents", *storage.fields()]
    raise TypeError(f"no codec for {type(storage).__name__}")


# --- from JSON ------------------------------------------------------------------------------------


def unpack_table(packed: Mapping[str, Any], form: str, file: File) -> Table:
    """Return the table of a checkpoint that a child packed.

    Args:
        packed: what `pack_table` made.
        form: the key of its format.
        file: the checkpoint as it was before the child opened it; it stands for the table's files
            where the child named none.

    Raises:
        FormatError: two tensors have one name, or it is no table at all.
    """
    try:
        return _unpack_table(packed, form, file)
    except _MALFORMED as error:
        raise FormatError(
            f"{shown(file.path)}: reading its header gave an invalid result ({shown(error)}); the "
            "file is damaged, hostile, or still being written"
        ) from None


def _unpack_table(packed: Mapping[str, Any], form: str, file: File) -> Table:
    files = unpack_files(packed["files"]) or (file,)
    tensors = {row[0]: _unpack_spec(files, *row) for row in packed["tensors"]}
    if len(tensors) < len(packed["tensors"]):
        raise FormatError(f"{shown(file.path)}: two of its tensors have the same name")
    suffixes, cautions, is_fixed, tails, part = packed["rules"]
    return Table(
        path=Path(file.path),
        format=form,
        files=files,
        tensors=tensors,
        others={row[0]: _unpack_spec(files, *row) for row in packed["others"]},
        optimizer=frozenset(_require_texts(packed["optimizer"])),
        config=_require_text(packed["config"]),
        is_polyak_output=_require_flag(packed["is_polyak_output"]),
        about={_require_text(key): _require_text(value) for key, value in packed["about"].items()},
        keras=_unpack_keras(*packed["keras"]),
        rules=OutputRules(
            _require_texts(suffixes),
            {_require_text(key): _require_text(value) for key, value in cautions.items()},
            _require_flag(is_fixed),
            _require_texts(tails),
            _require_text(part),
        ),
        assets=_unpack_assets(packed["assets"]),
    )


def unpack_assets(packed: Mapping[Any, Any], where: str) -> dict[str, Asset]:
    """Return assets that a child sent of a folder.

    Raises:
        FormatError: it sent something else.
    """
    try:
        return _unpack_assets(packed)
    except _MALFORMED as error:
        raise FormatError(
            f"{shown(where)}: reading its files gave invalid digests ({shown(error)}); one of "
            "them is damaged or hostile"
        ) from None


def _unpack_assets(packed: Mapping[Any, Any]) -> dict[str, Asset]:
    return {
        _require_text(name): Asset(
            _require_text(digest), _require_text(owner), _require_text(value), noted is True
        )
        for name, (digest, owner, value, noted) in packed.items()
    }


def _unpack_keras(
    layers: Sequence[str],
    statistics: Sequence[str],
    ema_slots: Mapping[str, Sequence[str]],
    outline: Sequence[Sequence[Any]],
    labels: Mapping[str, str],
) -> KerasFacts:
    """Return what Keras's files say; an outline begins at depth 1 and goes down in single steps."""
    above = 0
    for depth, name, kind in outline:
        if not 1 <= _require_count(depth) <= above + 1:
            raise _NonsenseError(f"a layer at depth {depth} below one at {above}")
        above = depth
        _require_texts((name, kind))
    return KerasFacts(
        _require_texts(layers),
        frozenset(_require_texts(statistics)),
        {_require_text(slot): _require_texts(names) for slot, names in ema_slots.items()},
        tuple(OutlinedLayer(*layer) for layer in outline),
        {_require_text(group): _require_text(name) for group, name in labels.items()},
    )


def _unpack_spec(
    files: Sequence[File],
    name: str,
    shape: Sequence[int],
    dtype: str,
    byteorder: str,
    location: str,
    storage: Sequence[Any] | None,
    digest: str = "",
    arrangement: str = "",
) -> TensorSpec:
    where = _unpack_storage(files, *storage) if storage else None
    if byteorder not in ("<", ">"):
        raise _NonsenseError(f"the byte order {byteorder}")
    # Shared by all that have the same: JSON has made a new text for each of 100,000.
    kind, sizes = sys.intern(_require_text(dtype)), _intern_shape(*shape)
    return TensorSpec(
        _require_text(name),
        sizes,
        kind,
        byteorder,
        _require_text(location),
        where,
        _require_text(digest),
        _require_text(arrangement),
    )


@functools.cache
def _intern_shape(*shape: int) -> tuple[int, ...]:
    return tuple(_require_count(size) for size in shape)


def unpack_files(packed: Iterable[Any]) -> tuple[File, ...]:
    """Return files that a child named, with the versions that it saw."""
    files = []
    for path, (*counts, mark) in packed:
        device, inode, size, mtime_ns = map(_require_count, counts)
        version = Version(device, inode, size, mtime_ns, _require_text(mark))
        files.append(File(_require_text(path), version))
    return tuple(files)


def _unpack_storage(files: Sequence[File], kind: str, *fields: Any) -> Storage:
    if kind == "extent":
        return _unpack_extent(files, *fields)
    if kind == "inline":
        (data,) = fields
        return Inline(bytes.fromhex(data))
    if kind == "grid":
        return _unpack_grid(lambda *extent: _unpack_extent(files, *extent), *fields)
    if kind == "deflated":
        return _unpack_deflated(files, *fields)
    if kind == "chunks":
        return _unpack_chunks(files, *fields)
    if kind == "contents":
        return _unpack_contents(files, *fields)
    raise _NonsenseError(f"the storage {kind}")


def _unpack_grid(
    unpack_extent: Callable[[int, int, int], Extent],
    shape: Sequence[int],
    itemsize: int,
    parts: Sequence[Any],
) -> Grid:
    """Return a grid whose parts lie inside the tensor and hold as many bytes as they must."""
    grid = Grid(
        _intern_shape(*shape),
        _require_itemsize(itemsize),
        tuple(
            GridPart(_intern_shape(*start), _intern_shape(*size), unpack_extent(*extent))
            for start, size, extent in parts
        ),
    )
    for start, size, extent in grid.parts:
        ends = (n + k for n, k in zip(start, size, strict=True))
        # An empty part could have any number of rows, each of which would be looked at.
        if not extent.nbytes or extent.nbytes != math.prod(size) * itemsize:
            raise _NonsenseError(f"a part of {extent.nbytes} bytes and the shape {size}")
        if any(end > n for end, n in zip(ends, grid.shape, strict=True)):
            raise _NonsenseError(f"a part at {start} of a tensor of shape {grid.shape}")
    return grid


def _unpack_deflated(
    files: Sequence[File], offset: int, stored: int, start: int, nbytes: int, file: int
) -> Storage:
    """Return a tensor of a deflated member that lies inside its file."""
    from polyak_cli.formats.zips import Deflated

    member = _unpack_extent(files, offset, stored, file)
    return Deflated(
        member.offset, member.nbytes, _require_count(start), _require_count(nbytes), member.file
    )


def _unpack_chunks(
    files: Sequence[File],
    shape: Sequence[int],
    chunk_shape: Sequence[int],
    itemsize: int,
    filters: Sequence[int],
    index: Sequence[Any],
    file: int,
) -> Storage:
    """Return a tensor in chunks, each inside its file and of a size that can be decoded."""
    from polyak_cli.formats.hdf5.chunks import UNDONE, Chunks

    chunks = Chunks.from_fields(
        _intern_shape(*shape),
        _intern_shape(*chunk_shape),
        _require_itemsize(itemsize),
        filters,
        index,
        _require_count(file),
    )
    if len(chunks.shape) != len(chunks.chunk_shape) or not all(chunks.chunk_shape):
        raise _NonsenseError(f"chunks {chunks.chunk_shape} of a tensor of shape {chunks.shape}")
    if chunks.block_nbytes > _CHUNK_NBYTES:
        raise _NonsenseError(f"chunks of {chunks.block_nbytes} bytes")
    if any(type(number) is not int or number not in UNDONE for number in chunks.filters):
        raise _NonsenseError(f"the filters {chunks.filters}")
    for position, (offset, nbytes, skipped) in chunks.index.items():
        _unpack_extent(files, offset, nbytes, file)
        _require_count(skipped)
        if len(position) != len(chunks.shape):
            raise _NonsenseError(f"a chunk at {position}")
    return chunks


def _unpack_contents(
    files: Sequence[File],
    shape: Sequence[int],
    itemsize: int,
    parts: Sequence[Any],
    places: Sequence[Any],
    compression: str,
    fill: Sequence[int],
) -> Storage:
    """Return a tensor in chunks, each inside its file and the content of one part, or missing."""
    from polyak_cli.formats.orbax.contents import Contents

    grid = _unpack_grid(Extent, shape, itemsize, parts)
    found = tuple(_unpack_extent(files, *place) if place else None for place in places)
    if [part.extent[::2] for part in grid.parts] != [(0, k) for k in range(len(found))]:
        raise _NonsenseError(f"{len(found)} chunks of {len(grid.parts)} parts")
    if compression not in ("", "zstd", "gzip") or len(fill) != grid.itemsize:
        raise _NonsenseError(f"chunks in {compression}, filled with {len(fill)} bytes")
    return Contents(grid, found, compression, bytes(fill))


def _unpack_extent(files: Sequence[File], offset: int, nbytes: int, file: int) -> Extent:
    """Return an extent that lies inside its file."""
    extent = Extent(_require_count(offset), _require_count(nbytes), _require_count(file))
    # Reading would fail too; but an output of that size could be laid out first.
    if file >= len(files) or offset + nbytes > files[file].version.size:
        raise _NonsenseError(f"{nbytes} bytes at {offset} of file {file}")
    return extent


def _require_count(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise _NonsenseError(f"the number {number}")
    return number


def _require_itemsize(number: Any) -> int:
    if not _require_count(number):
        raise _NonsenseError(f"elements of {number} bytes")
    return int(number)


def _require_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _NonsenseError(f"the flag {value}")
    return value


def _require_text(value: Any) -> str:
    if not isinstance(value, str):
        raise _NonsenseError(f"the text {value}")
    return value


def _require_texts(values: Iterable[Any]) -> tuple[str, ...]:
    return tuple(_require_text(value) for value in values)


# --- placements -----------------------------------------------------------------------------------


def pack_placements(
    placements: Mapping[str, Placement], locations: Iterable[str]
) -> list[list[Any] | None]:
    """Return the placements of locations that the parent knows, in its order, without names."""
    found = (placements.get(location) for location in locations)
    return [None if place is None else _pack_placement(place) for place in found]


def _pack_placement(place: Placement) -> list[Any]:
    if place.grid is None:
        return [*place[:-1]]
    return [*place[:-1], _pack_storage(place.grid)[1:]]


def unpack_placements(
    packed: Sequence[Sequence[Any] | None], averaged: Mapping[str, str], files: int
) -> dict[str, Placement]:
    """Return what `pack_placements` was given.

    Args:
        packed: what it returned.
        averaged: location in the template -> the dtype that was to be stored.
        files: of how many files the output consists.

    Raises:
        ValueError: it is nothing of the kind.
    """
    try:
        return {
            location: _unpack_placement(dtype, files, *row)
            for (location, dtype), row in zip(averaged.items(), packed, strict=True)
            if row
        }
    except _MALFORMED as error:
        raise ValueError(f"invalid placements ({error})") from None


def _unpack_placement(
    wanted: str,
    files: int,
    offset: int,
    dtype: str,
    order: str,
    file: int,
    grid: Sequence[Any] | None = None,
) -> Placement:
    """Return a placement in the output's files, of the dtype that was asked for."""

    def unpack_extent(offset: int, nbytes: int, file: int) -> Extent:
        if _require_count(file) >= files:
            raise _NonsenseError(f"the file {file}")
        return Extent(_require_count(offset), _require_count(nbytes), file)

    if (
        dtype != wanted
        or dtype not in FLOATS
        or order not in ("<", ">")
        or _require_count(file) >= files
    ):
        raise _NonsenseError(f"the placement of a {dtype} in file {file}")
    blocks = None if grid is None else _unpack_grid(unpack_extent, *grid)
    return Placement(_require_count(offset), sys.intern(dtype), order, file, blocks)


def unpack_output_files(packed: Iterable[Any], output: str) -> list[str]:
    """Return the files of an output that a child wrote: all in it, or in its folder.

    Raises:
        ValueError: a file lies elsewhere, so the parent would write into something else.
    """
    try:
        files = [_require_text(path) for path in packed]
    except _MALFORMED as error:
        raise ValueError(f"invalid files ({error})") from None
    for path in files:
        inside = path.startswith(f"{output}/") and os.path.normpath(path) == path
        if not inside and os.path.dirname(path) != os.path.dirname(output):  # noqa: PTH120 - as sent
            raise ValueError(f"the file {path} of an output {output}")
    return files
