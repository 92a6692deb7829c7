"""Lay out an Orbax checkpoint like another one: the same tree and chunks, nothing compressed.

All values go to one data file of an OCDBT database, whatever the template's lie in, and each array
is described by Zarr's version 2.  So the averaged ones are plain bytes that are filled in later.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from polyak_cli.formats.orbax import database, ocdbt, zarr
from polyak_cli.formats.orbax.database import Kept
from polyak_cli.storage import Bytes, OutputFile
from polyak_cli.tensors import Extent, Grid, GridPart, Placement

#: Beside `_METADATA`, which comes last, in the order in which they are found on reading.
FILES = ocdbt.MANIFEST, database.DATA
_ALIGNMENT = 64
#: Our types -> those of Zarr's version 2; it has names of its own for the others.
_CODES = {
    "bool": "|b1",
    "int8": "|i1",
    "uint8": "|u1",
    **{f"int{8 * n}": f"<i{n}" for n in (2, 4, 8)},
    **{f"uint{8 * n}": f"<u{n}" for n in (2, 4, 8)},
    **{f"float{8 * n}": f"<f{n}" for n in (2, 4, 8)},
    **{f"complex{8 * n}": f"<c{n}" for n in (8, 16)},
}


class Chunked(NamedTuple):
    """An array, and the blocks that its chunks are."""

    name: str
    array: zarr.Array
    blocks: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]  # start and shape


class Target:
    """Where a tensor is written as if it were one run of bytes; see `conversion.Sink`."""

    def __init__(self, file: OutputFile, grid: Grid) -> None:
        self.file = file
        self.grid = grid

    def write(self, offset: int, content: Bytes) -> None:
        """Write bytes of the tensor."""
        self.grid.write([self.file], offset, content)


class Layout:
    """Gives each chunk its place in the data file."""

    def __init__(self) -> None:
        self.end = 0
        self.values: dict[str, bytes | Kept] = {}

    def add(self, item: Chunked, dtype: str) -> Grid:
        """Return where the elements of an array belong, stored as a type."""
        shape, itemsize = item.array.shape, zarr.SIZES[dtype]
        chunk = item.array.inner or item.array.chunk
        self.values[f"{item.name}/{zarr.V2}"] = _describe(shape, chunk, dtype)
        nbytes = math.prod(chunk) * itemsize  # of a chunk at the array's end too, with padding
        parts = []
        for start, size in item.blocks:
            place = -(-self.end // _ALIGNMENT) * _ALIGNMENT
            position = ".".join(str(k // c) for k, c in zip(start, chunk, strict=True)) or "0"
            self.values[f"{item.name}/{position}"] = Kept(place, nbytes)
            parts.append(GridPart(start, size, Extent(place, math.prod(size) * itemsize)))
            self.end = place + nbytes
        return Grid(shape, itemsize, tuple(parts))

    def finish(self) -> tuple[bytes, bytes]:
        """Return the node that belongs at the end of the data file, and the manifest."""
        node = database.encode_node(self.values)
        return node, database.encode_manifest(node, self.end, self.values)


def place(grid: Grid, dtype: str) -> Placement:
    """Return where the values of an array belong; the data file is the second of `FILES`."""
    if len(grid.parts) == 1:
        return Placement(grid.parts[0].extent.offset, dtype, "<", 1)
    return Placement(0, dtype, "<", 1, grid)


def encode_tree(content: Mapping[str, Any], kept: set[str]) -> bytes:
    """Return `_METADATA` for a database of Zarr's version 2.

    Args:
        content: what the template's says.
        kept: the keys of its entries that stay.
    """
    tree = {key: entry for key, entry in content["tree_metadata"].items() if key in kept}
    said = {**content, "tree_metadata": tree, "use_ocdbt": True, "use_zarr3": False}
    return json.dumps(said).encode()


def _describe(shape: Sequence[int], chunk: Sequence[int], dtype: str) -> bytes:
    """Return the `.zarray` of an array."""
    said = {
        "chunks": list(chunk),
        "compressor": None,
        "dimension_separator": ".",
        "dtype": _CODES.get(dtype, dtype),
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(shape),
        "zarr_format": 2,
    }
    return json.dumps(said, sort_keys=True).encode()
