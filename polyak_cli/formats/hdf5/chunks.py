"""Read tensors that HDF5 keeps in chunks, without the HDF5 library.

The scan found where each chunk lies and which filters it went through.  zlib runs outside the
interpreter's lock, which libhdf5 does not.  Does not know headers.
"""

from __future__ import annotations

import itertools
import math
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from polyak_cli.errors import FormatError
from polyak_cli.storage import Bytes, InputFile
from polyak_cli.tensors import Extent, Files

DEFLATE, SHUFFLE, FLETCHER32, LZF = 1, 2, 3, 32000
#: The filters that are undone here, by the names their users know.
UNDONE = {DEFLATE: "gzip", SHUFFLE: "shuffle", FLETCHER32: "fletcher32", LZF: "lzf"}


@dataclass(frozen=True, slots=True)
class Chunks:
    """A tensor cut into a grid of chunks, each stored through a pipeline of filters."""

    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    itemsize: int
    filters: tuple[int, ...]  # in the order in which they were applied on writing
    index: dict[tuple[int, ...], tuple[int, int, int]]  # grid position -> offset, bytes, skipped
    file: int = 0  # which of the checkpoint's files

    def fields(self) -> list[Any]:
        """Return what `from_fields` takes, as JSON can hold it."""
        index = [[position, *place] for position, place in self.index.items()]
        return [self.shape, self.chunk_shape, self.itemsize, self.filters, index, self.file]

    @classmethod
    def from_fields(
        cls,
        shape: Sequence[int],
        chunk_shape: Sequence[int],
        itemsize: int,
        filters: Sequence[int],
        index: Sequence[tuple[Sequence[int], int, int, int]],
        file: int = 0,
    ) -> Chunks:
        """Return what has these fields."""
        places = {tuple(position): (offset, size, skip) for position, offset, size, skip in index}
        return cls(tuple(shape), tuple(chunk_shape), itemsize, tuple(filters), places, file)

    def describe(self) -> str:
        """See `tensors.Storage.describe`."""
        filters = ", ".join(UNDONE[number] for number in self.filters) or "no filter"
        return f"slow reader: in chunks, {filters}"

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.itemsize

    @property
    def _row_bytes(self) -> int:
        """Bytes of one row: all elements with the same first index."""
        return math.prod(self.shape[1:]) * self.itemsize

    @property
    def preferred_nbytes(self) -> int:
        """Bytes of a band of whole chunks, each of which is then decoded once."""
        return max(1, self.chunk_shape[0] * self._row_bytes)

    @property
    def block_nbytes(self) -> int:
        """Bytes of one decoded chunk: filters work on whole chunks only."""
        return math.prod(self.chunk_shape) * self.itemsize

    def byte_ranges(self, start: int, stop: int) -> Iterator[Extent]:
        """See `tensors.Storage.byte_ranges`."""
        for position in self._positions(start, stop):
            offset, nbytes, _ = self.index[position]
            yield Extent(offset, nbytes, self.file)

    def read_into(self, files: Files, start: int, buffer: Bytes) -> None:
        """See `tensors.Storage.read_into`."""
        for position in self._positions(start, start + len(buffer)):
            chunk = self._decode(files[self.file], position)
            corner = [p * c for p, c in zip(position, self.chunk_shape, strict=True)]
            inside = tuple(
                slice(0, min(c, n - k))
                for k, c, n in zip(corner, self.chunk_shape, self.shape, strict=True)
            )
            self._place(chunk[inside], corner, start, buffer)

    def _positions(self, start: int, stop: int) -> Iterator[tuple[int, ...]]:
        """Yield the grid positions of all chunks that may hold some of these bytes."""
        first = np.unravel_index(start // self.itemsize, self.shape)
        last = np.unravel_index((stop - 1) // self.itemsize, self.shape)
        ranges = []
        within = True  # one index of all axes before
        for one, other, c, n in zip(first, last, self.chunk_shape, self.shape, strict=True):
            ranges.append(range(one // c, other // c + 1) if within else range(-(-n // c)))
            within = within and one == other
        return itertools.product(*ranges)

    def _place(self, chunk: Bytes, corner: list[int], start: int, buffer: Bytes) -> None:
        """Copy the elements of a chunk, shape (..., itemsize), that belong in the buffer."""
        row, step = corner[0], self._row_bytes
        if start % step == 0 and len(buffer) % step == 0:
            band = buffer.reshape(len(buffer) // step, *self.shape[1:], self.itemsize)
            low = start // step
            rows = slice(max(row, low), min(row + len(chunk), low + len(band)))
            there = (
                slice(rows.start - low, rows.stop - low),
                *(slice(k, k + n) for k, n in zip(corner[1:], chunk.shape[1:-1], strict=True)),
            )
            band[there] = chunk[rows.start - row : rows.stop - row]
            return
        # A piece that begins or ends within a row: place element by element.
        indices = np.ix_(
            *(np.arange(k, k + n) for k, n in zip(corner, chunk.shape[:-1], strict=True))
        )
        flat = np.ravel_multi_index(indices, self.shape).ravel() - start // self.itemsize
        wanted = buffer.reshape(-1, self.itemsize)
        shared = (flat >= 0) & (flat < len(wanted))
        wanted[flat[shared]] = chunk.reshape(-1, self.itemsize)[shared]

    def _decode(self, file: InputFile, position: tuple[int, ...]) -> Bytes:
        """Return one whole chunk, shape (*chunk_shape, itemsize), with its filters undone."""
        offset, nbytes, skipped = self.index[position]
        raw = np.empty(nbytes, np.uint8)
        file.read_into(offset, raw)
        for k, number in reversed(list(enumerate(self.filters))):
            if not skipped >> k & 1:
                raw = _UNDO[number](raw, self)
        if len(raw) != self.block_nbytes:
            raise FormatError(f"a chunk decodes to {len(raw)} bytes; expected {self.block_nbytes}")
        return raw.reshape(*self.chunk_shape, self.itemsize)


def _inflate(raw: Bytes, limit: int) -> Bytes:
    """Decompress, but never to more than the header allows."""
    decompressor = zlib.decompressobj()
    try:
        data = decompressor.decompress(raw.tobytes(), limit)
    except zlib.error as error:
        raise FormatError(f"a gzip-compressed chunk is damaged ({error})") from None
    if not decompressor.eof:
        raise FormatError("a gzip-compressed chunk is damaged (it does not end where it should)")
    return np.frombuffer(data, np.uint8)


def _verify_checksum(raw: Bytes) -> Bytes:
    """Verify and remove a Fletcher-32 checksum (HDF5 file format, section III.A.3).

    Sums 16-bit big-endian words modulo 65535; an odd last byte is the upper half of a word.
    """
    body, stored = raw[:-4], int.from_bytes(raw[-4:].tobytes(), "little")
    even = body if len(body) % 2 == 0 else np.append(body, np.uint8(0))
    words = even.view(">u2").astype(np.uint64)
    factors = np.arange(len(words), 0, -1, dtype=np.uint64) % 65535
    low = int(words.sum()) % 65535
    high = int((words * factors % 65535).sum()) % 65535
    # Older libraries wrote the halves' bytes swapped; HDF5 itself accepts both.
    swapped = int.from_bytes(bytes(stored.to_bytes(4, "little")[k] for k in (1, 0, 3, 2)), "little")
    if not any(
        (s >> 16) % 65535 == high and (s & 0xFFFF) % 65535 == low for s in (stored, swapped)
    ):
        raise FormatError("the checksum of a chunk is wrong: the data are damaged")
    return body


def _unpack_lzf(raw: Bytes, expected: int) -> Bytes:
    """Let h5py's own LZF work on the bytes, inside a one-chunk file whose header is ours."""
    import h5py

    # libhdf5 takes files in memory that have one name for one file, and threads need their own.
    name = f"lzf-{threading.get_ident()}"
    with h5py.File(name, "w", driver="core", backing_store=False) as file:
        data = file.create_dataset(
            "x", (expected,), np.uint8, chunks=(expected,), compression="lzf"
        )
        data.id.write_direct_chunk((0,), raw.tobytes())
        try:
            unpacked: npt.NDArray[np.uint8] = data[:]
        except OSError:
            raise FormatError("an LZF-compressed chunk is damaged") from None
    return unpacked


def _unshuffle(raw: Bytes, itemsize: int) -> Bytes:
    """Put the bytes of each element together again; a rest that fills no element stays last."""
    body = len(raw) // itemsize * itemsize
    shuffled = raw[:body].reshape(itemsize, -1)
    return np.concatenate([np.ascontiguousarray(shuffled.T).ravel(), raw[body:]])


#: Filter -> what undoes it.
_UNDO: Mapping[int, Callable[[Bytes, Chunks], Bytes]] = {
    # A checksum may have been added before, which makes the content longer by 4 bytes.
    DEFLATE: lambda raw, chunks: _inflate(raw, chunks.block_nbytes + 4),
    SHUFFLE: lambda raw, chunks: _unshuffle(raw, chunks.itemsize),
    FLETCHER32: lambda raw, _: _verify_checksum(raw),
    LZF: lambda raw, chunks: _unpack_lzf(raw, chunks.block_nbytes),
}
