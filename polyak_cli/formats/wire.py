"""Turn tables into what JSON can hold, and back: the only place where they cross a process border.

Knows no format.  A child that reads a hostile header may have been taken over by it, so what comes
back is checked: nothing but numbers that lie inside the files, and texts.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polyak_cli.errors import FormatError, shown
from polyak_cli.storage import File, Version
from polyak_cli.tensors import (
    Extent,
    Grid,
    GridPart,
    Inline,
    KerasFacts,
    OutputRules,
    Placement,
    Storage,
    Table,
    TensorSpec,
)


class _NonsenseError(Exception):
    """What came from a child is no table."""


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
        ],
        "rules": [
            list(table.rules.suffixes),
            dict(table.rules.cautions),
            table.rules.is_fixed,
            list(table.rules.tails),
        ],
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
    except (_NonsenseError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(
            f"{shown(file.path)}: reading its header gave no sensible table ({shown(error)}); the "
            "file is damaged, hostile, or still being written"
        ) from None


def _unpack_table(packed: Mapping[str, Any], form: str, file: File) -> Table:
    files = tuple(File(str(path), Version(*map(int, v))) for path, v in packed["files"]) or (file,)
    tensors = {row[0]: _unpack_spec(files, *row) for row in packed["tensors"]}
    if len(tensors) < len(packed["tensors"]):
        raise FormatError(f"{shown(file.path)}: two of its tensors have the same name")
    layers, statistics, ema_slots = packed["keras"]
    suffixes, cautions, is_fixed, tails = packed["rules"]
    return Table(
        path=Path(file.path),
        format=form,
        files=files,
        tensors=tensors,
        others={row[0]: _unpack_spec(files, *row) for row in packed["others"]},
        optimizer=frozenset(_texts(packed["optimizer"])),
        config=_text(packed["config"]),
        is_polyak_output=bool(packed["is_polyak_output"]),
        about={_text(key): _text(value) for key, value in packed["about"].items()},
        keras=KerasFacts(
            _texts(layers),
            frozenset(_texts(statistics)),
            {_text(slot): _texts(names) for slot, names in ema_slots.items()},
        ),
        rules=OutputRules(
            _texts(suffixes),
            {_text(key): _text(value) for key, value in cautions.items()},
            bool(is_fixed),
            _texts(tails),
        ),
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
    kind, sizes = sys.intern(_text(dtype)), _shape(*shape)
    return TensorSpec(
        _text(name), sizes, kind, byteorder, _text(location), where, digest, arrangement
    )


@functools.cache
def _shape(*shape: int) -> tuple[int, ...]:
    return tuple(_count(size) for size in shape)


def _unpack_storage(files: Sequence[File], kind: str, *fields: Any) -> Storage:
    if kind == "extent":
        return _extent(files, *fields)
    if kind == "inline":
        return Inline(bytes.fromhex(fields[0]))
    if kind == "grid":
        shape, itemsize, parts = fields
        blocks = (
            GridPart(_shape(*start), _shape(*size), _extent(files, *extent))
            for start, size, extent in parts
        )
        return Grid(_shape(*shape), _count(itemsize), tuple(blocks))
    if kind == "deflated":
        from polyak_cli.formats.zips import Deflated

        return Deflated(*map(_count, fields))
    if kind != "chunks":
        raise _NonsenseError(f"the storage {kind}")
    from polyak_cli.formats.hdf5.chunks import Chunks

    return Chunks.from_fields(*fields)


def _extent(files: Sequence[File], offset: int, nbytes: int, file: int) -> Extent:
    """Return an extent that lies inside its file."""
    extent = Extent(_count(offset), _count(nbytes), _count(file))
    if file >= len(files) or offset + nbytes > files[file].version.size:
        raise _NonsenseError(f"{nbytes} bytes at {offset} of file {file}")
    return extent


def _count(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise _NonsenseError(f"the number {number}")
    return number


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _NonsenseError(f"the text {value}")
    return value


def _texts(values: Iterable[Any]) -> tuple[str, ...]:
    return tuple(_text(value) for value in values)


# --- placements -----------------------------------------------------------------------------------


def pack_placements(
    placements: Mapping[str, Placement], locations: Iterable[str]
) -> list[list[Any] | None]:
    """Return the placements of locations that the parent knows, in its order, without names."""
    found = (placements.get(location) for location in locations)
    return [None if place is None else list(place) for place in found]


def unpack_placements(
    packed: Sequence[Sequence[Any] | None], locations: Iterable[str]
) -> dict[str, Placement]:
    """Return what `pack_placements` was given."""
    return {
        location: Placement(_count(row[0]), sys.intern(row[1]), row[2], _count(row[3]))
        for location, row in zip(locations, packed, strict=True)
        if row
    }
