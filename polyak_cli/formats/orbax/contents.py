"""Read tensors whose chunks are compressed with zstd, forwards and piece by piece.

A chunk may be a whole tensor of gigabytes: Orbax writes one a device.  So it is never held, but
decompressed as far as it is asked for, and the place that was reached is kept.  Knows no header.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from polyak_cli.errors import FormatError, MissingExtraError, word_size
from polyak_cli.storage import Bytes, InputFile, Version
from polyak_cli.tensors import Extent, Files, Grid

if TYPE_CHECKING:
    import zstandard

#: Bytes that are decompressed at a time, and compressed bytes that are read at a time.
_STEP, _READ = 1 << 20, 1 << 17
#: The largest window that levels up to 19 use; a decompressor holds one.
_WINDOW = 8 << 20
#: Decompressors that are kept: of a tensor in a few chunks, one each for every checkpoint.
_KEPT = 64


def _new_decompressor() -> zstandard.ZstdDecompressor:
    """Return a decompressor of bounded memory.

    Raises:
        MissingExtraError: the library is not installed.
    """
    try:
        import zstandard
    except ImportError:
        raise MissingExtraError("reading compressed Orbax checkpoints", "orbax") from None
    return zstandard.ZstdDecompressor(max_window_size=_WINDOW)


def decompress(data: bytes, limit: int) -> bytes:
    """Return decompressed bytes, but never more than a limit.

    Raises:
        FormatError: they are damaged, or more.
    """
    stream = _Stream(iter((data,)))
    taken = []
    left = limit
    while piece := stream.take_some(min(left + 1, _STEP)):
        taken.append(piece)
        left -= len(piece)
        if left < 0:
            raise FormatError(f"decompresses to more than {word_size(limit)}; it is hostile")
    return b"".join(taken)


class _Stream:
    """The content of one zstd frame, taken from its beginning on."""

    def __init__(self, source: Iterator[bytes]) -> None:
        self.position = 0
        self.source = _Source(source)
        self.reader = _new_decompressor().stream_reader(self.source, read_size=_READ)

    def take_some(self, most: int) -> bytes:
        """Return the next bytes of the content, none only at its end."""
        import zstandard

        try:
            piece = bytes(self.reader.read(most))
        except zstandard.ZstdError as error:
            raise FormatError(f"a zstd-compressed chunk is damaged ({error})") from None
        self.position += len(piece)
        return piece

    def take_into(self, buffer: Bytes) -> None:
        """Fill a buffer with the next bytes of the content."""
        done = 0
        while done < len(buffer):
            piece = self.take_some(min(_STEP, len(buffer) - done))
            if not piece:
                raise FormatError("a zstd-compressed chunk ends too early")
            buffer[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
            done += len(piece)


class _Source:
    """A file object that a decompressor reads."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.pieces = pieces

    def read(self, _: int = -1) -> bytes:
        """Return the next piece, whatever its size; none at the end."""
        return next(self.pieces, b"")


def _read_pieces(files: Files, extent: Extent) -> Iterator[bytes]:
    """Yield the bytes of an extent, which is opened again where it was closed meanwhile."""
    for start in range(0, extent.nbytes, _READ):
        nbytes = min(_READ, extent.nbytes - start)
        buffer = np.empty(nbytes, np.uint8)
        files[extent.file].read_into(extent.offset + start, buffer)
        yield buffer.tobytes()


class _Chunk:
    """The content of one compressed chunk, read as if it were a file."""

    def __init__(self, files: Files, place: Extent, nbytes: int) -> None:
        self.files = files
        self.place = place
        self.size = nbytes

    def read_into(self, offset: int, buffer: Bytes) -> None:
        """Fill a buffer from an offset of the content on."""
        file = self.files[self.place.file]
        key = (file.version, self.place.offset)
        streams = _reached.streams
        kept = streams.pop(key, None)
        if kept is None or kept[0].position > offset:
            source = _Reopened(file)
            kept = _Stream(_read_pieces(source, self.place._replace(file=0))), source
        stream, source = kept
        source.file = file  # it may have been closed and opened again since
        while stream.position < offset:
            if not stream.take_some(min(_STEP, offset - stream.position)):
                raise FormatError("a zstd-compressed chunk ends too early")
        stream.take_into(buffer)
        if stream.position < self.size:
            streams[key] = kept
        elif stream.take_some(1):
            raise FormatError(f"a zstd-compressed chunk has more than {self.size} bytes")
        while len(streams) > _KEPT:
            del streams[next(iter(streams))]


class _Reopened:
    """The one file of a stream, as it is open now."""

    def __init__(self, file: InputFile) -> None:
        self.file = file

    def __getitem__(self, number: int, /) -> InputFile:
        return self.file


class _Reached(threading.local):
    """Where reading stopped in chunks, the last used at the end; each thread has its own."""

    def __init__(self) -> None:
        self.streams: dict[tuple[Version, int], tuple[_Stream, _Reopened]] = {}


_reached = _Reached()


class _Plain:
    """Bytes in memory, read as if they were a file."""

    def __init__(self, data: bytes) -> None:
        self.data = np.frombuffer(data, np.uint8)

    def read_into(self, offset: int, buffer: Bytes) -> None:
        """Fill a buffer from an offset on."""
        buffer[:] = self.data[offset : offset + len(buffer)]


def assemble(grid: Grid, data: Sequence[bytes]) -> bytes:
    """Return the bytes of a small tensor whose parts are in memory, as if part `k` were a file."""
    parts: Any = [_Plain(each) for each in data]
    buffer = np.empty(grid.nbytes, np.uint8)
    grid.read_into(parts, 0, buffer)
    return buffer.tobytes()


@dataclass(frozen=True, slots=True)
class Contents:
    """A tensor in chunks that are compressed with zstd.

    ``grid`` says where each chunk's content belongs, as if content `k` were a file `k`.
    """

    grid: Grid
    places: tuple[Extent, ...]  # of the compressed chunks, in the order of the grid's parts

    def describe(self) -> str:
        """See `tensors.Storage.describe`."""
        return f"slow reader: in {len(self.places)} chunks, zstd"

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.grid.nbytes

    @property
    def preferred_nbytes(self) -> int:
        """See `tensors.Storage.preferred_nbytes`."""
        return self.grid.preferred_nbytes if len(self.places) > 1 else 1

    @property
    def block_nbytes(self) -> int:
        """See `tensors.Storage.block_nbytes`; chunks are not held whole."""
        return 1

    def byte_ranges(self, start: int, stop: int) -> Iterable[Extent]:
        """See `tensors.Storage.byte_ranges`; only decompressing shows where the bytes lie."""
        del start, stop
        return ()

    def read_into(self, files: Files, start: int, buffer: Bytes) -> None:
        """See `tensors.Storage.read_into`."""
        self.grid.read_into(_Chunks(files, self.places, self.grid), start, buffer)

    def fields(self) -> list[Any]:
        """Return what it was made of, as JSON can hold it."""
        parts = [[part.start, part.shape, list(part.extent)] for part in self.grid.parts]
        places = [list(place) for place in self.places]
        return [self.grid.shape, self.grid.itemsize, parts, places]


class _Chunks:
    """The contents of a tensor's chunks, by their numbers; see `tensors.Files`."""

    def __init__(self, files: Files, places: Sequence[Extent], grid: Grid) -> None:
        self.files = files
        self.places = places
        self.grid = grid

    def __getitem__(self, number: int, /) -> Any:
        """Return a chunk's content, which can only be read."""
        return _Chunk(self.files, self.places[number], self.grid.parts[number].extent.nbytes)
