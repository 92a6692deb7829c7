"""The nouns: a checkpoint is a table of tensors, and a tensor is mostly one run of bytes.

Knows how a run of bytes is read.  Knows nothing of arithmetic (`engine.kernel`), of
files' headers, of coefficients or of threads.
"""

from __future__ import annotations

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
    """Return whether `engine.kernel.widen_any` can read all values of a tensor."""
    code = {**FLOATS, **WHOLE_NUMBERS}.get(spec.dtype)
    return (
        code is not None and spec.storage is not None and spec.nbytes == spec.size * int(code[1:])
    )


def itemsize(dtype: str) -> int:
    """Return the bytes of one element of a float type."""
    return int(FLOATS[dtype][1:])


#: Types that are compared and measured as numbers, though they are not averaged.
WHOLE_NUMBERS: Mapping[str, str] = {
    "bool": "u1",
    **{f"{sign}int{8 * n}": f"{sign[:1] or 'i'}{n}" for sign in ("", "u") for n in (1, 2, 4, 8)},
}
