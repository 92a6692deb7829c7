"""Turn what a child sends as JSON into tables.

Knows no format.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyak_cli.errors import FormatError, shown
from polyak_cli.storage import (
    File,
    Version,
)
from polyak_cli.tensors import Extent, Inline, Storage, Table, TensorSpec


def build_table(name: str, file: File, scanned: Mapping[str, Any]) -> Table:
    """Build the table of tensors from what `Format.scan` sent as JSON."""
    tensors = {row[0]: _spec(*row) for row in scanned["tensors"]}
    if len(tensors) < len(scanned["tensors"]):
        raise FormatError(f"{shown(file.path)}: two of its tensors have the same name")
    files = [File(path, Version(*identity)) for path, identity in scanned.get("files", ())]
    return Table(
        path=Path(file.path),
        format=name,
        files=tuple(files) or (file,),
        tensors=tensors,
        others={row[0]: _spec(*row) for row in scanned["others"]},
        optimizer=frozenset(scanned["optimizer"]),
        config=scanned["config"],
        average=scanned["average"],
        about=scanned.get("about", {}),
        order=tuple(scanned.get("order", ())),
        statistics=frozenset(scanned.get("statistics", ())),
        slots=scanned.get("slots", {}),
        suffixes=tuple(scanned.get("suffixes", ())),
        cautions=scanned.get("cautions", {}),
        fixed=scanned.get("fixed", False),
        tails=tuple(scanned.get("tails", ())),
    )


def _spec(
    name: str,
    shape: Sequence[int],
    dtype: str,
    byteorder: str,
    location: str,
    storage: Sequence[Any] | None,
    *rest: Any,
) -> TensorSpec:
    """Build one row of a table."""
    where = _storage(*storage) if storage else None
    # Shared by all that have the same: JSON has made a new text for each of 100,000.
    kind, extent = sys.intern(dtype), _shape(*shape)
    return TensorSpec(name, extent, kind, byteorder, location, where, *rest)


@functools.cache
def _shape(*shape: int) -> tuple[int, ...]:
    return shape


def _storage(kind: str, *row: Any) -> Storage:
    """Build what says where a tensor lies, from what came as JSON."""
    if kind == "extent":
        return Extent(*row)
    if kind == "inline":
        return Inline(bytes.fromhex(row[0]))
    if kind == "deflated":
        from polyak_cli.formats.zips import Deflated

        return Deflated(*row)
    from polyak_cli.formats.hdf5.chunks import Chunks

    shape, chunk_shape, itemsize, filters, index = row
    places = {tuple(position): (offset, size, skip) for position, offset, size, skip in index}
    return Chunks(tuple(shape), tuple(chunk_shape), itemsize, tuple(filters), places)
