"""How an array is cut into chunks and stored, as `.zarray` (version 2) or `zarr.json` (3) says it.

Reads what TensorStore writes for Orbax: regular chunks in C order, plain or compressed with zstd or
gzip, in version 3 also in shards of several chunks.  Shapes are checked by the bytes that are
there, and nothing is allocated for them.  Knows no file and no database.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from polyak_cli.errors import FormatError, shown

V2, V3 = ".zarray", "zarr.json"
#: The kind letters of version 2 -> our names, without the width in bits.
_LETTERS = {"f": "float", "i": "int", "u": "uint", "c": "complex"}
#: Types by their names, which version 3 uses for all, and their bytes.
SIZES = {
    "bool": 1,
    **{f"{sign}int{8 * n}": n for sign in ("", "u") for n in (1, 2, 4, 8)},
    **{f"float{8 * n}": n for n in (2, 4, 8)},
    **{f"complex{8 * n}": n for n in (8, 16)},
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2"), 1),
    "bfloat16": 2,
}
#: Those of which numpy makes a value.
_NUMPYS = {name for name in SIZES if not name.startswith(("bfloat", "float8"))}
_DEEPEST = 32  # dimensions
_LARGEST = 1 << 62
_MOST_CHUNKS = 1 << 22
#: Compressors of version 2 -> what reads them; all three of zlib's have heads that tell them apart.
_COMPRESSORS = {"zstd": "zstd", "gzip": "gzip", "zlib": "gzip"}


class Codec(NamedTuple):
    """How the elements of a chunk become bytes."""

    byteorder: str
    compression: str  # "zstd", "gzip", or "" for plain bytes


class Array(NamedTuple):
    """One array, as its metadata describe it."""

    shape: tuple[int, ...]
    chunk: tuple[int, ...]  # of each value of the database, or each file
    dtype: str
    itemsize: int
    codec: Codec
    separator: str  # between the numbers in a chunk's key
    prefix: str  # of a chunk's key
    fill: Any  # the value of elements whose chunk is not stored; see `encode_fill`
    #: Of the chunks inside of a shard; a shard's index is at its end, with a checksum.
    inner: tuple[int, ...] | None = None

    @property
    def counts(self) -> tuple[int, ...]:
        """How many chunks there are in each dimension."""
        return tuple(-(-n // c) for n, c in zip(self.shape, self.chunk, strict=True))

    def list_keys(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """Yield where each chunk begins in the array, and its key."""
        for position in _list_positions(self.counts):
            start = tuple(p * c for p, c in zip(position, self.chunk, strict=True))
            numbers = self.separator.join(map(str, position))
            if not self.prefix:
                yield start, numbers or "0"
            else:
                yield start, f"{self.prefix}{self.separator}{numbers}" if numbers else self.prefix

    def has(self, start: Sequence[int]) -> bool:
        """Return whether a chunk begins inside of the array."""
        return all(k < n for k, n in zip(start, self.shape, strict=True))

    def encode_fill(self) -> bytes:
        """Return the bytes of an element whose chunk is not stored.

        Raises:
            FormatError: the metadata name a value that is not one of the type.
        """
        fill = self.fill
        if fill is None or (fill == 0 and not str(fill).startswith("-")):  # as TensorStore has it
            return bytes(self.itemsize)
        try:
            if self.dtype not in _NUMPYS or not isinstance(fill, (int, float, str)):
                raise TypeError
            swap: Any = self.codec.byteorder
            code = np.dtype(self.dtype).newbyteorder(swap)
            # JSON has no NaN and infinity, so they are texts.
            return np.array(float(fill) if isinstance(fill, str) else fill).astype(code).tobytes()
        except (TypeError, ValueError, OverflowError):
            raise FormatError(
                f"has the fill_value {shown(fill, 60)}; expected 0 or a number that numpy has as "
                f"{self.dtype}"
            ) from None

    def list_inner(self, start: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """Yield where each chunk of a shard begins in the array; the shard's start is given."""
        assert self.inner is not None  # noqa: S101 (only shards have them)
        counts = [c // i for c, i in zip(self.chunk, self.inner, strict=True)]
        for position in _list_positions(counts):
            yield tuple(s + p * i for s, p, i in zip(start, position, self.inner, strict=True))


def _list_positions(counts: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield all positions in a grid, the last index first; `itertools.product` would list each."""
    if not counts:
        yield ()
        return
    for first in range(counts[0]):
        for rest in _list_positions(counts[1:]):
            yield (first, *rest)


def parse(name: str, raw: bytes) -> Array:
    """Return what the metadata of an array say.

    Args:
        name: of the metadata, which tells their version.
        raw: their bytes.

    Raises:
        FormatError: they are damaged or hostile, or say what is not read here; the message lacks
            the name of the tensor.
    """
    try:
        said = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"has a {name} that is not JSON ({shown(error, 60)})") from None
    if not isinstance(said, dict):
        raise FormatError(f"has a {name} that is not a JSON object")
    array = _parse_v2(said) if name == V2 else _parse_v3(said)
    chunks = math.prod(array.counts)
    if chunks > _MOST_CHUNKS:
        raise FormatError(f"has {chunks} chunks; expected at most {_MOST_CHUNKS}")
    return array


def _parse_v2(said: Mapping[str, Any]) -> Array:
    """See the specification of Zarr, version 2, "Metadata"."""
    _require(said.get("zarr_format") == 2, "zarr_format", said.get("zarr_format"), "2")
    order = said.get("order")
    shape, chunk = _parse_shapes(said.get("shape"), said.get("chunks"))
    _require(order == "C" or len(shape) < 2, "order", order, "'C'")
    _require(not said.get("filters"), "filters", said.get("filters"), "none")
    dtype, byteorder = _parse_type(said.get("dtype"))
    separator = said.get("dimension_separator", ".")
    _require(separator in (".", "/"), "dimension_separator", separator, "'.' or '/'")
    compressor = said.get("compressor")
    kind = str(compressor.get("id")) if isinstance(compressor, dict) else ""
    is_known = compressor is None or kind in _COMPRESSORS
    _require(is_known, "compressor", compressor, "zstd, gzip, zlib or none")
    codec = Codec(byteorder, _COMPRESSORS.get(kind, ""))
    return Array(shape, chunk, dtype, SIZES[dtype], codec, separator, "", said.get("fill_value"))


def _parse_type(code: Any) -> tuple[str, str]:
    """Return the name and byte order of a type as version 2 writes it."""
    if isinstance(code, str) and code in SIZES:  # those that numpy does not have
        return code, "<"
    found = re.fullmatch(r"([<>|])([fiuc])(\d{1,2})", code) if isinstance(code, str) else None
    name = f"{_LETTERS[found[2]]}{8 * int(found[3])}" if found else ""
    if found and name in SIZES:
        return name, ">" if found[1] == ">" else "<"
    _require(code == "|b1", "dtype", code, "a number's type")
    return "bool", "<"


def _parse_v3(said: Mapping[str, Any]) -> Array:
    """See the specification of Zarr, version 3, "Array metadata"."""
    _require(said.get("zarr_format") == 3, "zarr_format", said.get("zarr_format"), "3")
    grid, keys = _object(said, "chunk_grid"), _object(said, "chunk_key_encoding")
    _require(grid.get("name") == "regular", "chunk_grid", grid, "a regular one")
    shape, chunk = _parse_shapes(said.get("shape"), _configuration(grid).get("chunk_shape"))
    dtype = str(said.get("data_type"))
    _require(dtype in SIZES, "data_type", dtype, "a number's type")
    style = keys.get("name")
    _require(style in ("default", "v2"), "chunk_key_encoding", style, "'default' or 'v2'")
    separator = _configuration(keys).get("separator", "/" if style == "default" else ".")
    _require(separator in (".", "/"), "separator", separator, "'.' or '/'")
    codecs, inner = said.get("codecs"), None
    first = codecs[0] if isinstance(codecs, list) and len(codecs) == 1 else None
    if isinstance(first, dict) and first.get("name") == "sharding_indexed":
        shard = _configuration(first)
        _, inner = _parse_shapes(chunk, shard.get("chunk_shape"))
        even = all(c % i == 0 for c, i in zip(chunk, inner, strict=True))
        _require(even, "chunk_shape", list(inner), f"divisors of {list(chunk)}")
        place = shard.get("index_location", "end")
        _require(place == "end", "index_location", place, "'end'")
        names = [codec.get("name") for codec in _objects(shard.get("index_codecs"))]
        _require(names == ["bytes", "crc32c"], "index_codecs", names, "bytes and crc32c")
        codecs = shard.get("codecs")
    codec = _parse_codecs(codecs)
    prefix = "c" if style == "default" else ""
    fill = said.get("fill_value")
    return Array(shape, chunk, dtype, SIZES[dtype], codec, separator, prefix, fill, inner)


def _parse_codecs(codecs: Any) -> Codec:
    """Return what the codecs of version 3 amount to."""
    found = _objects(codecs)
    names = [codec.get("name") for codec in found]
    is_known = names[:1] == ["bytes"] and names[1:] in ([], ["zstd"], ["gzip"])
    _require(is_known, "codecs", names, "bytes, and zstd, gzip or nothing")
    checksum = names[-1] == "zstd" and _configuration(found[-1]).get("checksum", False)
    _require(isinstance(checksum, bool), "checksum", checksum, "true or false")
    endian = _configuration(found[0]).get("endian", "little")
    _require(endian in ("little", "big"), "endian", endian, "'little' or 'big'")
    return Codec("<" if endian == "little" else ">", str(names[1]) if names[1:] else "")


def _parse_shapes(shape: Any, chunk: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of an array and of its chunks."""
    for name, sizes, least in (("shape", shape, 0), ("chunk shape", chunk, 1)):
        _require(
            isinstance(sizes, (list, tuple))
            and len(sizes) <= _DEEPEST
            and all(type(n) is int and least <= n < _LARGEST for n in sizes)
            and math.prod(sizes) < _LARGEST,
            name,
            sizes,
            f"at most {_DEEPEST} whole numbers of {least} or more",
        )
    _require(len(shape) == len(chunk), "chunk shape", chunk, f"{len(shape)} numbers")
    return tuple(shape), tuple(chunk)


def _object(said: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a JSON object in another."""
    found = said.get(key)
    _require(isinstance(found, dict), key, found, "an object")
    return found or {}


def _objects(said: Any) -> list[Mapping[str, Any]]:
    """Return a list of JSON objects."""
    is_list = isinstance(said, list) and all(isinstance(one, dict) for one in said)
    _require(is_list, "codecs", said, "a list of objects")
    return list(said)


def _configuration(said: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of a codec, grid or encoding; they may be left out."""
    return _object({"configuration": {}, **said}, "configuration")


def _require(is_so: bool, key: str, found: Any, expected: str) -> None:
    """Refuse metadata that say something else than what is read here."""
    if not is_so:
        raise FormatError(f"has the {key} {shown(found, 60)}; expected {expected}")
