"""Build tables from the rows that the readers of Keras's files collect.

Knows nothing of HDF5 itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyak_cli.errors import FormatError, shown
from polyak_cli.formats.hdf5.chunks import Chunks
from polyak_cli.formats.zips import Deflated
from polyak_cli.storage import File
from polyak_cli.tensors import Extent, Inline, KerasFacts, OutputRules, Storage, Table, TensorSpec


def build_table(
    form: str, path: str, found: Mapping[str, Any], files: Sequence[File] = ()
) -> Table:
    """Return the table of a file whose tensors were collected as rows.

    Args:
        form: the key of its format.
        path: of the checkpoint.
        found: ``tensors`` and ``others``, rows of [name, shape, dtype, byteorder, location,
            storage, digest, file] where the last two may be left out; and what a `Table` has.
        files: where there are several.

    Raises:
        FormatError: two tensors have one name.
    """
    tensors = {row[0]: _spec(*row) for row in found["tensors"]}
    if len(tensors) < len(found["tensors"]):
        raise FormatError(f"{shown(path)}: two of its tensors have the same name")
    return Table(
        path=Path(path),
        format=form,
        files=tuple(files),
        tensors=tensors,
        others={row[0]: _spec(*row) for row in found["others"]},
        optimizer=frozenset(found["optimizer"]),
        config=found["config"],
        is_polyak_output=found["average"],
        about=found["about"],
        keras=KerasFacts(
            tuple(found.get("order", ())),
            frozenset(found.get("statistics", ())),
            found.get("slots", {}),
        ),
        rules=OutputRules(tuple(found.get("suffixes", ())), found["cautions"]),
    )


def _spec(
    name: str,
    shape: Sequence[int],
    dtype: str,
    byteorder: str,
    location: str,
    storage: Sequence[Any] | None,
    digest: str = "",
    file: int = 0,
) -> TensorSpec:
    where = _storage(file, *storage) if storage else None
    return TensorSpec(name, tuple(shape), dtype, byteorder, location, where, digest)


def _storage(file: int, kind: str, *row: Any) -> Storage:
    if kind == "extent":
        return Extent(row[0], row[1], file)
    if kind == "inline":
        return Inline(bytes.fromhex(row[0]))
    if kind == "deflated":
        return Deflated(row[0], row[1], row[2], row[3], file)
    return Chunks.from_fields(row[0], row[1], row[2], row[3], row[4], file)
