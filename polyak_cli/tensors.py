"""The nouns: a checkpoint is a table of tensors, and a tensor is mostly one run of bytes.

Knows how a run of bytes is read.  Knows nothing of arithmetic (`engine.kernel`), of
files' headers, of coefficients or of threads.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from polyak_cli.errors import FormatError
from polyak_cli.storage import Bytes, File, InputFile, OutputFile

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
#: Asked for every tensor of every checkpoint, of which there may be millions.
_ITEMSIZES = {dtype: int(code[1:]) for dtype, code in FLOATS.items()}
#: Those that any format can store.
COMMON = frozenset(("float16", "bfloat16", "float32", "float64"))


class Files(Protocol):
    """The files of one checkpoint, open for reading, by their number in its table."""

    def __getitem__(self, number: int, /) -> InputFile:
        """Return a file, opened when it is first needed."""


class Storage(Protocol):
    """Where the bytes of one tensor lie in the files of its checkpoint, in C order."""

    def describe(self) -> str:
        """Say how it is read, and why so where that is slow."""

    @property
    def preferred_nbytes(self) -> int:
        """Bytes of the piece that is best read at once; 1 where any piece is as good."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""

    @property
    def block_nbytes(self) -> int:
        """Bytes that must be in memory at once to read any of it; 1 where it is read by offset."""

    def byte_ranges(self, start: int, stop: int) -> Iterable[Extent]:
        """Yield each part of a file that `read_into` reads for the bytes from start to stop."""

    def read_into(self, files: Files, start: int, buffer: Bytes) -> None:
        """Fill ``buffer`` with the tensor's bytes from byte ``start`` on.

        Raises:
            FormatError: the bytes are not there or are damaged; the message lacks file and tensor,
                which the caller knows.
        """


class Extent(NamedTuple):
    """One run of bytes in one file; a NamedTuple because there may be millions."""

    offset: int
    nbytes: int
    file: int = 0  # which of the checkpoint's files: an index into `Table.files`

    def describe(self) -> str:
        """See `Storage.describe`."""
        return "plain bytes"

    @property
    def preferred_nbytes(self) -> int:
        """Any piece is as good as any other."""
        return 1

    @property
    def block_nbytes(self) -> int:
        """See `Storage.block_nbytes`."""
        return 1

    def byte_ranges(self, start: int, stop: int) -> Iterable[Extent]:
        """See `Storage.byte_ranges`."""
        return (Extent(self.offset + start, stop - start, self.file),)

    def read_into(self, files: Files, start: int, buffer: Bytes) -> None:
        """See `Storage.read_into`."""
        files[self.file].read_into(self.offset + start, buffer)


class Checksum(NamedTuple):
    """What a file says of some of its bytes."""

    path: str
    offset: int
    nbytes: int
    crc: int
    kind: str  # "crc32" or "crc32c"
    damaged: str  # the message where it is wrong, without the file's name


@dataclass(frozen=True, slots=True)
class Inline:
    """A few bytes that the file keeps inside its header (HDF5's compact layout)."""

    data: bytes

    def describe(self) -> str:
        """See `Storage.describe`."""
        return "header: stored inside it"

    @property
    def preferred_nbytes(self) -> int:
        """Any piece is as good as any other."""
        return 1

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return len(self.data)

    @property
    def block_nbytes(self) -> int:
        """See `Storage.block_nbytes`."""
        return 1

    def byte_ranges(self, start: int, stop: int) -> Iterable[Extent]:
        """See `Storage.byte_ranges`; the header was read already."""
        del start, stop
        return ()

    def read_into(self, files: Files, start: int, buffer: Bytes) -> None:
        """See `Storage.read_into`."""
        del files  # the header was read already
        buffer[:] = np.frombuffer(self.data, np.uint8, len(buffer), start)


class GridPart(NamedTuple):
    """A part of a tensor that lies in one piece somewhere: a block of its index space."""

    start: tuple[int, ...]  # index of its first element, one number a dimension
    shape: tuple[int, ...]
    extent: Extent  # its bytes, in C order


class _Rows(NamedTuple):
    """Rows of one length that follow one another in a file, and lie evenly spaced in a tensor."""

    extent: Extent  # all of them
    at: int  # distance of the first from the byte that is asked for
    rows: int
    nbytes: int  # of a row
    step: int  # bytes from one row to the next

    def view(self, buffer: Bytes) -> Bytes:
        """Return the rows of a buffer as a matrix."""
        shape, strides = (self.rows, self.nbytes), (self.step, 1)
        return np.ndarray(shape, np.uint8, buffer, self.at, strides)


@dataclass(frozen=True, slots=True)
class Grid:
    """A tensor in several extents, of any of the checkpoint's files.

    So are saved the tensors of a model that was trained on several machines: each machine writes
    the block that it holds.  The blocks cover the tensor without overlaps.
    """

    shape: tuple[int, ...]
    itemsize: int  # bytes of an element
    parts: tuple[GridPart, ...]
    #: The first byte of each part in the tensor, and the byte behind its last one: of a thousand
    #: parts, a slab needs a few.
    lows: npt.NDArray[np.int64] = field(init=False, repr=False, compare=False)
    highs: npt.NDArray[np.int64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Compute where parts begin and end."""
        lows = [self._find_place(part.start) for part in self.parts]
        highs = [
            self._find_place([n + k - 1 for n, k in zip(part.start, part.shape, strict=True)])
            for part in self.parts
        ]
        # The class is frozen; these follow from its other fields.
        object.__setattr__(self, "lows", np.array(lows, np.int64))
        object.__setattr__(self, "highs", np.array(highs, np.int64) + self.itemsize)

    def describe(self) -> str:
        """See `Storage.describe`."""
        files = len({part.extent.file for part in self.parts})
        return f"plain bytes in {len(self.parts)} parts of {files} files"

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.itemsize

    @property
    def preferred_nbytes(self) -> int:
        """Bytes between two indices of the first dimension: whole rows are read in long runs."""
        return max(1, math.prod(self.shape[1:]) * self.itemsize)

    @property
    def block_nbytes(self) -> int:
        """See `Storage.block_nbytes`."""
        return 1

    def byte_ranges(self, start: int, stop: int) -> Iterable[Extent]:
        """See `Storage.byte_ranges`."""
        for piece in self._cut(start, stop):
            yield piece.extent

    def read_into(self, files: Files, start: int, buffer: Bytes) -> None:
        """See `Storage.read_into`."""
        filled = 0
        for piece in self._cut(start, start + len(buffer)):
            offset, nbytes, file = piece.extent
            if piece.rows == 1:
                files[file].read_into(offset, buffer[piece.at : piece.at + nbytes])
            else:
                # One read of all rows, though it is copied: a read for each would cost far more.
                read = np.empty(nbytes, np.uint8)
                files[file].read_into(offset, read)
                piece.view(buffer)[:] = read.reshape(piece.rows, piece.nbytes)
            filled += nbytes
        if filled != len(buffer):
            raise FormatError(f"{len(buffer) - filled} bytes of it are in none of its parts")

    def write(self, outputs: Sequence[OutputFile], start: int, buffer: Bytes) -> None:
        """Write the tensor's bytes from byte ``start`` on, where `read_into` would read them."""
        for piece in self._cut(start, start + len(buffer)):
            offset, nbytes, file = piece.extent
            if piece.rows == 1:
                content = buffer[piece.at : piece.at + nbytes]
            else:
                content = np.ascontiguousarray(piece.view(buffer)).reshape(-1)
            outputs[file].write(offset, content)

    def _find_place(self, index: Sequence[int]) -> int:
        """Return where an element lies in the tensor, in bytes."""
        flat = 0
        for n, size in zip(index, self.shape, strict=True):
            flat = flat * size + n
        return flat * self.itemsize

    def _cut(self, start: int, stop: int) -> Iterator[_Rows]:
        """Yield the rows of all parts that lie between two bytes of the tensor."""
        for number in np.flatnonzero((self.lows < stop) & (self.highs > start)).tolist():
            yield from self._cut_part(self.parts[number], start, stop)

    def _cut_part(self, part: GridPart, start: int, stop: int) -> Iterator[_Rows]:
        """Yield the rows of a part that lie between two bytes of the tensor.

        The dimensions of a part are, from the last one: those that together are one row, as the
        part has all of each but the first; those whose indices count rows of one distance; and
        those whose indices count groups of such rows.
        """
        row = len(self.shape)
        while row and part.shape[row - 1] == self.shape[row - 1]:
            row -= 1
        row = max(row - 1, 0)
        group = max(row - 1, 0)
        while group and part.shape[group] == self.shape[group]:
            group -= 1
        nbytes = math.prod(part.shape[row:]) * self.itemsize
        step = math.prod(self.shape[row:]) * self.itemsize
        count = math.prod(part.shape[group:row])
        outer = part.shape[:group]

        def find_group(number: int) -> int:
            index = np.unravel_index(number, outer) if outer else ()
            place = [n + int(k) for n, k in zip(part.start, index, strict=False)]
            return self._find_place([*place, *part.start[len(place) :]])

        groups = range(math.prod(outer))
        if len(groups) > 1:
            length = (count - 1) * step + nbytes
            first = bisect.bisect_right(groups, start - length, key=find_group)
            groups = range(first, bisect.bisect_left(groups, stop, key=find_group))
        for number in groups:
            offset = part.extent.offset + number * count * nbytes
            whole = Extent(offset, count * nbytes, part.extent.file)
            rows = _Rows(whole, find_group(number) - start, count, nbytes, step)
            yield from _clip(rows, stop - start)


def _clip(rows: _Rows, length: int) -> Iterator[_Rows]:
    """Yield the parts of rows between byte 0 and a length; a row that is cut comes by itself."""
    (offset, _, file), at, count, nbytes, step = rows
    first = max(0, (-at - nbytes) // step + 1)
    last = min(count, -((at - length) // step))
    while first < last:
        place = at + first * step
        low, high = max(0, -place), min(nbytes, length - place)
        # All rows but the first and the last lie inside.
        number = 1
        if (low, high) == (0, nbytes):
            number = last - first
            number -= number > 1 and place + (number - 1) * step + nbytes > length
        extent = Extent(offset + first * nbytes + low, (number - 1) * nbytes + high - low, file)
        yield _Rows(extent, place + low, number, high - low, step)
        first += number


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
    arrangement: str = ""  # of the elements, where that is not C order; shown to the user

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values; 0 where only the format's library knows."""
        return self.storage.nbytes if self.storage else 0


class OutlinedLayer(NamedTuple):
    """One layer in a model's configuration; the layers of a model follow it, one deeper."""

    depth: int  # 1: of the model itself
    name: str  # "" where the configuration has none
    kind: str  # its class, as automatic names have it, such as "batch_normalization"; or ""


@dataclass(frozen=True, slots=True)
class KerasFacts:
    """What Keras's files say of a model, and hardly any others."""

    layers: tuple[str, ...] = ()  # in their order, where loading goes by position
    statistics: frozenset[str] = frozenset()  # BatchNorm's, where their names do not tell
    ema_slots: Mapping[str, Sequence[str]] = field(default_factory=dict)  # EMA -> of which tensors
    outline: tuple[OutlinedLayer, ...] = ()  # of the configuration, in its order
    #: Of a weights file: group -> the name of its layer, which its path does not tell.
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OutputRules:
    """What an average that is like a checkpoint may be called, must keep, or should say."""

    suffixes: tuple[str, ...] = ()  # of its name, if not those of its format
    #: What a user should know who stores a dtype, keeps the "optimizer" or "objects" beside the
    #: tensors, or misses the "ema".
    cautions: Mapping[str, str] = field(default_factory=dict)
    is_fixed: bool = False  # types and optimizer state must stay
    tails: tuple[str, ...] = ()  # of its further files, in place of the suffix
    part: str = ""  # the key of the part that was asked for; a conversion takes nothing else


class Asset(NamedTuple):
    """What lies beside the tensors and gives them meaning, such as the words of a vocabulary.

    Row 2 of an embedding is the third word of its vocabulary: two checkpoints whose tensors pair
    belong together only if their assets are the same.
    """

    digest: str  # of its content: equal where the content means the same
    owner: str = ""  # the name of the layer that uses it, for messages
    value: str = ""  # of a key in a configuration, in short; "" for other assets
    is_noted: bool = False  # another one is said; whoever averages is not refused


_NO_FACTS, _NO_RULES = KerasFacts(), OutputRules()


@dataclass(frozen=True, slots=True)
class Table:
    """The table of tensors of one checkpoint: all that averaging needs to know of its headers."""

    path: Path  # as the user names it
    format: str  # the key of its format; see `formats.FORMATS`
    files: tuple[File, ...]  # all that hold its tensors; mostly one
    tensors: Mapping[str, TensorSpec]  # the model's own, in the file's order
    others: Mapping[str, TensorSpec]  # optimizer state and whatever else the file holds
    optimizer: frozenset[str]  # those of the others that are optimizer state
    config: str  # digest of the model configuration, "" where there is none
    is_polyak_output: bool  # this tool wrote it
    about: Mapping[str, str] = field(default_factory=dict)  # what else it says of itself
    keras: KerasFacts = field(default_factory=lambda: _NO_FACTS)
    rules: OutputRules = field(default_factory=lambda: _NO_RULES)
    assets: Mapping[str, Asset] = field(default_factory=dict)  # name in the checkpoint -> asset

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(file.version.size for file in self.files)


class Placement(NamedTuple):
    """Where the values of one averaged tensor belong in an output."""

    offset: int
    dtype: str
    byteorder: str
    file: int = 0  # in which of the output's files
    #: Where they belong if that is not one run; offset is 0 then, and its files are counted from
    #: the placement's file on.
    grid: Grid | None = None

    def write(self, outputs: Sequence[OutputFile], start: int, content: Bytes) -> None:
        """Write the bytes of the values from byte ``start`` on.

        Args:
            outputs: the files that the placement counts.
            start: of the tensor's bytes.
            content: the bytes.

        Raises:
            OSError: they cannot be written.
        """
        if self.grid is None:
            outputs[self.file].write(self.offset + start, content)
        else:
            self.grid.write(outputs[self.file :], start, content)


def is_carried(dtype: str) -> bool:
    """Return whether a tensor carries over from the newest checkpoint: an average means nothing."""
    return dtype in (*WHOLE_NUMBERS, "enum", "string", "bitfield", "opaque")


def is_numeric(spec: TensorSpec) -> bool:
    """Return whether `engine.kernel.widen_any` can read all values of a tensor."""
    code = {**FLOATS, **WHOLE_NUMBERS}.get(spec.dtype)
    return (
        code is not None and spec.storage is not None and spec.nbytes == spec.size * int(code[1:])
    )


def itemsize(dtype: str) -> int:
    """Return the bytes of one element of a float type."""
    return _ITEMSIZES[dtype]


#: Types that are compared and measured as numbers, though they are not averaged.
WHOLE_NUMBERS: Mapping[str, str] = {
    "bool": "u1",
    **{f"{sign}int{8 * n}": f"{sign[:1] or 'i'}{n}" for sign in ("", "u") for n in (1, 2, 4, 8)},
}
