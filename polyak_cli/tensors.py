"""The nouns: a checkpoint is a table of tensors, and a tensor is mostly one run of bytes.

Knows how numbers are stored (`widen`, `narrow`) and how a run of bytes is read.  Knows nothing of
files' headers, of coefficients or of threads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from polyak_cli.storage import (
    Bytes,
    File,
)
from polyak_cli.storage.local import (
    read_exactly,
)

Float64 = npt.NDArray[np.float64]
#: The float types that are averaged, and the numpy type of their bytes; numpy has no bfloat16 and
#: no float8, whose types are those of ONNX and PyTorch ("fn": finite, with NaN but no infinity).
FLOATS: Mapping[str, str] = {
    "float16": "f2",
    "bfloat16": "u2",
    "float32": "f4",
    "float64": "f8",
    "float8_e4m3fn": "u1",
    "float8_e5m2": "u1",
}
#: Those that any format can store.
COMMON = frozenset(("float16", "bfloat16", "float32", "float64"))
#: float8 type -> bits of its mantissa, bias of its exponent, the first code that is not finite.
_FLOAT8 = {"float8_e4m3fn": (3, 7, 0x7F), "float8_e5m2": (2, 15, 0x7C)}


class Storage(Protocol):
    """Where the bytes of one tensor lie in its file, in C order."""

    @property
    def way(self) -> str:
        """How it is read, and why so where that is slow: told to a user who asks."""

    @property
    def alignment(self) -> int:
        """Bytes of the piece that is best read at once; 1 where any piece is as good."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""

    @property
    def held(self) -> int:
        """Bytes that must be in memory at once to read any of it; 1 where it is read by offset."""

    def runs(self, start: int, stop: int) -> Iterable[tuple[int, int]]:
        """Yield offset and length of each run of the file that `read_into` will read."""

    def read_into(self, descriptor: int, start: int, buffer: Bytes) -> None:
        """Fill ``buffer`` with the tensor's bytes from byte ``start`` on.

        Raises:
            FormatError: the bytes are not there or are damaged; the message lacks file and tensor,
                which the caller knows.
        """


class Extent(NamedTuple):
    """One run of bytes at an offset of the file; a NamedTuple because there may be millions."""

    offset: int
    nbytes: int

    @property
    def way(self) -> str:
        """See `Storage.way`."""
        return "extent"

    @property
    def alignment(self) -> int:
        """Any piece is as good as any other."""
        return 1

    @property
    def held(self) -> int:
        """See `Storage.held`."""
        return 1

    def runs(self, start: int, stop: int) -> Iterable[tuple[int, int]]:
        """See `Storage.runs`."""
        return ((self.offset + start, stop - start),)

    def read_into(self, descriptor: int, start: int, buffer: Bytes) -> None:
        """See `Storage.read_into`."""
        read_exactly(descriptor, self.offset + start, buffer)


@dataclass(frozen=True, slots=True)
class Inline:
    """A few bytes that the file keeps inside its header (HDF5's compact layout)."""

    data: bytes

    @property
    def way(self) -> str:
        """See `Storage.way`."""
        return "header: stored inside it"

    @property
    def alignment(self) -> int:
        """Any piece is as good as any other."""
        return 1

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return len(self.data)

    @property
    def held(self) -> int:
        """See `Storage.held`."""
        return 1

    def runs(self, start: int, stop: int) -> Iterable[tuple[int, int]]:
        """See `Storage.runs`; the header was read already."""
        del start, stop
        return ()

    def read_into(self, descriptor: int, start: int, buffer: Bytes) -> None:
        """See `Storage.read_into`."""
        del descriptor  # the header was read already
        buffer[:] = np.frombuffer(self.data, np.uint8, len(buffer), start)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One named array of a checkpoint, as its header describes it."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # "float32", "bfloat16", "int64", "bool", "string", ...
    byteorder: str  # "<" or ">"
    location: str  # the path inside the file
    storage: Storage | None  # None: only the format's own library can read it
    digest: str = ""  # of the values, where there is no storage to compare
    file: int = 0  # in which of the checkpoint's files
    arrangement: str = ""  # of the elements, where that is not C order; told to the user

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values; 0 where only the format's library knows."""
        return self.storage.nbytes if self.storage else 0


@dataclass(frozen=True, slots=True)
class Table:
    """The table of tensors of one checkpoint: all that averaging needs to know of its headers."""

    path: Path  # as the user names it
    format: str  # the name of its module in `formats`
    files: tuple[File, ...]  # all that hold its tensors; mostly one
    tensors: Mapping[str, TensorSpec]  # the model's own, in the file's order
    others: Mapping[str, TensorSpec]  # optimizer state and whatever else the file holds
    optimizer: frozenset[str]  # those of the others that are optimizer state
    config: str  # digest of the model configuration, "" where there is none
    average: bool  # this tool wrote it
    about: Mapping[str, str] = field(default_factory=dict)  # what else it says of itself
    order: tuple[str, ...] = ()  # of its layers, where loading goes by their position
    statistics: frozenset[str] = frozenset()  # BatchNorm's, where their names do not tell
    slots: Mapping[str, Sequence[str]] = field(default_factory=dict)  # EMA -> of which tensors
    suffixes: tuple[str, ...] = ()  # what a file like it may be called, if not as its format
    cautions: Mapping[str, str] = field(default_factory=dict)  # what to tell: see `Format.scan`
    fixed: bool = False  # its average must keep its types and its optimizer state
    tails: tuple[str, ...] = ()  # of the files that its average needs, in place of the suffix

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(file.version.size for file in self.files)


class LaidOut(NamedTuple):
    """Where the values of one averaged tensor belong in an output."""

    offset: int
    dtype: str
    byteorder: str
    file: int = 0  # in which of the output's files


def is_carried(dtype: str) -> bool:
    """Tell whether a tensor carries over from the newest checkpoint: an average means nothing."""
    return dtype in (*WHOLE_NUMBERS, "enum", "string", "bitfield", "opaque")


def is_numeric(spec: TensorSpec) -> bool:
    """Tell whether `numbers` can read all values of a tensor."""
    code = {**FLOATS, **WHOLE_NUMBERS}.get(spec.dtype)
    return (
        code is not None and spec.storage is not None and spec.nbytes == spec.size * int(code[1:])
    )


def itemsize(dtype: str) -> int:
    """Return the bytes of one element of a float type."""
    return int(FLOATS[dtype][1:])


def widen(raw: Bytes, dtype: str, byteorder: str, out: Float64) -> None:
    """Convert stored bytes to float64, exactly; a signalling NaN becomes a quiet one.

    To be called under ``np.errstate(invalid="ignore")``, which is too slow to enter for each slab.

    Args:
        raw: the stored bytes of n elements.
        dtype: one of `FLOATS`.
        byteorder: "<" or ">".
        out: n float64 elements, overwritten.
    """
    if dtype in _FLOAT8:
        np.take(_float8_values(dtype), raw, out=out, mode="clip")  # no index is out of bounds
        return
    stored = raw.view(byteorder + FLOATS[dtype])
    if dtype == "bfloat16":  # the upper half of a float32
        stored = np.left_shift(stored, 16, dtype=np.uint32).view(np.float32)
    np.copyto(out, stored)


#: Types that are compared and measured as numbers, though they are not averaged.
WHOLE_NUMBERS: Mapping[str, str] = {
    "bool": "u1",
    **{f"{sign}int{8 * n}": f"{sign[:1] or 'i'}{n}" for sign in ("", "u") for n in (1, 2, 4, 8)},
}


def numbers(raw: Bytes, dtype: str, byteorder: str, out: Float64) -> None:
    """Convert the stored bytes of any number to float64; integers beyond 2^53 are rounded.

    Args:
        raw: the stored bytes of n elements.
        dtype: one of `FLOATS` or of `WHOLE_NUMBERS`.
        byteorder: "<" or ">".
        out: n float64 elements, overwritten.
    """
    if dtype in WHOLE_NUMBERS:
        np.copyto(out, raw.view(byteorder + WHOLE_NUMBERS[dtype]), casting="unsafe")
    else:
        widen(raw, dtype, byteorder, out)


def narrow(values: Float64, dtype: str, byteorder: str, out: Bytes) -> None:
    """Round float64 to the stored type once, to nearest, ties to even.

    Args:
        values: n float64 elements.
        dtype: one of `FLOATS`.
        byteorder: "<" or ">".
        out: the stored bytes of n elements, overwritten.
    """
    stored = out.view(byteorder + FLOATS[dtype])
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if dtype == "bfloat16":
            stored[:] = _bfloat16_bits(values)
        elif dtype in _FLOAT8:
            stored[:] = _float8_bits(values, dtype)
        else:
            np.copyto(stored, values, casting="same_kind")


def _odd_bits(values: Float64) -> npt.NDArray[np.uint32]:
    """Round float64 to float32 *to odd*: toward zero, with the last bit set when inexact.

    Rounding to nearest first would round twice.  This keeps what the second rounding must know:
    Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using
    rounding to odd", 2008.
    """
    single = values.astype(np.float32)
    bits = single.view(np.uint32)
    wide = single.astype(np.float64)
    bits -= np.abs(wide) > np.abs(values)  # one step toward zero; infinity becomes the greatest
    bits |= wide != values
    return bits


def _bfloat16_bits(values: Float64) -> npt.NDArray[np.uint16]:
    """Round float64 to bfloat16 once."""
    bits = _odd_bits(values)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # A NaN must not carry into infinity: keep its upper bits and make it quiet.
    nan = np.isnan(values)
    rounded[nan] = (bits[nan] >> 16) | 0x40
    return rounded.astype(np.uint16)


def _float8_bits(values: Float64, dtype: str) -> npt.NDArray[np.uint8]:
    """Round float64 to a float8 once: to bfloat16 to odd, which has bits enough, and by a table."""
    bits = _odd_bits(values)
    codes: Bytes = _float8_codes(dtype)[(bits >> 16) | ((bits & 0xFFFF) != 0)]
    return codes


@functools.cache
def _float8_ladder(dtype: str) -> Float64:
    """Return the values of the codes from 0 on, and what would come after the greatest."""
    mantissa, bias, end = _FLOAT8[dtype]
    exponent, fraction = np.divmod(np.arange(end + 1), 1 << mantissa)
    whole = np.where(exponent, (1 << mantissa) + fraction, fraction)  # subnormals have no hidden 1
    ladder: Float64 = whole * 2.0 ** (np.maximum(exponent, 1) - bias - mantissa)
    return ladder


@functools.cache
def _float8_values(dtype: str) -> Float64:
    """Return the value of each of the 256 codes."""
    *_, end = _FLOAT8[dtype]
    values = np.full(128, np.nan)
    values[:end] = _float8_ladder(dtype)[:end]
    if end < 0x7F:  # without "fn", the code after the greatest is infinity
        values[end] = np.inf
    return np.concatenate([values, -values])


@functools.cache
def _float8_codes(dtype: str) -> npt.NDArray[np.uint8]:
    """Return the code nearest to each of the 65,536 bfloat16; ties go to the even code."""
    *_, end = _FLOAT8[dtype]
    ladder = _float8_ladder(dtype)
    middles = (ladder[:-1] + ladder[1:]) / 2
    # A tie goes up from an odd code; from an even one, only what is greater does.
    middles[::2] = np.nextafter(middles[::2], np.inf)
    numbers = (np.arange(0x8000, dtype=np.uint32) << 16).view(np.float32)
    codes = np.searchsorted(middles, numbers, side="right")
    # NaN, sorted behind all numbers; what overflows is infinity or, where there is none, NaN.
    codes[np.isnan(numbers)] = 0x7F if end == 0x7F else 0x7E
    return np.concatenate([codes, codes | 0x80]).astype(np.uint8)
