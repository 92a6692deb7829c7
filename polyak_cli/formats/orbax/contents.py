"""Read tensors whose chunks are compressed or not all stored, forwards and piece by piece.

A chunk may be a whole tensor of gigabytes: Orbax writes one a device.  So it is never held, but
decompressed as far as it is asked for, and the place that was reached is kept.  Knows no header.
"""

from __future__ import annotations

import random
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, cast

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
_TOO_EARLY = "a compressed chunk ends too early"
#: Decompressors that are kept: of a tensor in a few chunks, one each for every checkpoint.
_KEPT = 32


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


def decompress(data: bytes, limit: int, compression: str = "zstd") -> bytes:
    """Return decompressed bytes, but never more than a limit.

    Raises:
        FormatError: they are damaged, or more.
    """
    stream = _Stream(iter((data,)), compression)
    taken = []
    left = limit
    while piece := stream.take_some(min(left + 1, _STEP)):
        taken.append(piece)
        left -= len(piece)
        if left < 0:
            raise FormatError(f"decompresses to more than {word_size(limit)}; it is hostile")
    return b"".join(taken)


class _Stream:
    """The content of one compressed chunk, taken from its beginning on."""

    def __init__(self, source: Iterator[bytes], compression: str) -> None:
        self.position = 0
        self.reader: _Zstd | _Gzip = _Zstd(source) if compression == "zstd" else _Gzip(source)

    def take_some(self, most: int) -> bytes:
        """Return the next bytes of the content, none only at its end."""
        piece = self.reader.read(most)
        self.position += len(piece)
        return piece

    def take_into(self, buffer: Bytes) -> None:
        """Fill a buffer with the next bytes of the content."""
        done = 0
        while done < len(buffer):
            piece = self.take_some(min(_STEP, len(buffer) - done))
            if not piece:
                raise FormatError(_TOO_EARLY)
            buffer[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
            done += len(piece)


class _Zstd:
    """Decompresses one frame of zstd."""

    def __init__(self, source: Iterator[bytes]) -> None:
        self.source = _Source(source)
        # The library only calls `read`; its stub asks for a whole file object.
        taken = cast("IO[bytes]", self.source)
        self.reader = _new_decompressor().stream_reader(taken, read_size=_READ)

    def read(self, most: int) -> bytes:
        """Return the next bytes, none only at the end."""
        import zstandard

        try:
            return bytes(self.reader.read(most))
        except zstandard.ZstdError as error:
            raise FormatError(f"a zstd-compressed chunk is damaged ({error})") from None


class _Gzip:
    """Decompresses what gzip or zlib wrote."""

    def __init__(self, source: Iterator[bytes]) -> None:
        self.source = source
        self.inflater = zlib.decompressobj(wbits=32 + zlib.MAX_WBITS)  # either head

    def read(self, most: int) -> bytes:
        """Return the next bytes, none only at the end."""
        try:
            while not self.inflater.eof:
                data = self.inflater.unconsumed_tail or next(self.source, b"")
                piece = self.inflater.decompress(data, most)
                if piece or not data:
                    return piece
        except zlib.error as error:
            raise FormatError(f"a gzip-compressed chunk is damaged ({error})") from None
        return b""


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

    def __init__(self, files: Files, place: Extent, nbytes: int, compression: str) -> None:
        self.files = files
        self.place = place
        self.size = nbytes
        self.compression = compression

    def read_into(self, offset: int, buffer: Bytes) -> None:
        """Fill a buffer from an offset of the content on."""
        file = self.files[self.place.file]
        key = (file.version, self.place.offset)
        streams = _reached.streams
        kept = streams.pop(key, None)
        if kept is None or kept[0].position > offset:
            source = _Reopened(file)
            pieces = _read_pieces(source, self.place._replace(file=0))
            kept = _Stream(pieces, self.compression), source
        stream, source = kept
        source.file = file  # it may have been closed and opened again since
        while stream.position < offset:
            if not stream.take_some(min(_STEP, offset - stream.position)):
                raise FormatError(_TOO_EARLY)
        stream.take_into(buffer)
        if stream.position < self.size:
            streams[key] = kept
        elif stream.take_some(1):
            raise FormatError(f"a compressed chunk has more than {self.size} bytes")
        while len(streams) > _KEPT:
            # Any of them: the one that was used longest ago is the next to be asked for where all
            # are read in turn.
            del streams[random.choice([*streams])]  # noqa: S311 (nothing is secret)


class _Plain:
    """A chunk that is not compressed, read as if it were a file of its own."""

    def __init__(self, files: Files, place: Extent) -> None:
        self.files = files
        self.place = place

    def read_into(self, offset: int, buffer: Bytes) -> None:
        """Fill a buffer from an offset of the content on."""
        self.place.read_into(self.files, offset, buffer)


class _Filled:
    """A chunk that is not stored, all of whose elements have one value."""

    def __init__(self, fill: bytes) -> None:
        self.fill = np.frombuffer(fill, np.uint8)

    def read_into(self, offset: int, buffer: Bytes) -> None:
        """Fill a buffer with the value, from any byte of it on."""
        start = offset % len(self.fill)
        buffer[:] = np.resize(self.fill, start + len(buffer))[start:]


class _Reopened:
    """The one file of a stream, as it is open now."""

    def __init__(self, file: InputFile) -> None:
        self.file = file

    def __getitem__(self, number: int, /) -> InputFile:
        return self.file


class _Reached(threading.local):
    """Where reading stopped in chunks; each thread has its own."""

    def __init__(self) -> None:
        self.streams: dict[tuple[Version, int], tuple[_Stream, _Reopened]] = {}


_reached = _Reached()


class _Held:
    """Bytes in memory, read as if they were a file."""

    def __init__(self, data: bytes) -> None:
        self.data = np.frombuffer(data, np.uint8)

    def read_into(self, offset: int, buffer: Bytes) -> None:
        """Fill a buffer from an offset on."""
        buffer[:] = self.data[offset : offset + len(buffer)]


def assemble(grid: Grid, data: Sequence[bytes]) -> bytes:
    """Return the bytes of a small tensor whose parts are in memory, as if part `k` were a file."""
    parts: Any = [_Held(each) for each in data]
    buffer = np.empty(grid.nbytes, np.uint8)
    grid.read_into(parts, 0, buffer)
    return buffer.tobytes()


@dataclass(frozen=True, slots=True)
class Contents:
    """A tensor in chunks that are compressed, or not all of which are stored.

    ``grid`` says where each chunk's content belongs, as if content `k` were a file `k`.
    """

    grid: Grid
    #: Of the chunks as they are stored, in the order of the grid's parts; None: not stored.
    places: tuple[Extent | None, ...]
    compression: str  # "zstd", "gzip", or "" for none
    fill: bytes  # an element of a chunk that is not stored

    def describe(self) -> str:
        """See `tensors.Storage.describe`."""
        how = f"slow reader: in {len(self.places)} chunks, {self.compression or 'plain bytes'}"
        missing = self.places.count(None)
        value = "0" if not any(self.fill) else "their fill_value"
        return f"{how}; {missing} not stored, which are {value}" if missing else how

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.grid.nbytes

    @property
    def preferred_nbytes(self) -> int:
        """See `tensors.Storage.preferred_nbytes`.

        Where more chunks are read in turn than decompressors are kept, as those of many
        checkpoints or blocks of columns, each piece begins them again: the fewest pieces are best.
        """
        if self.compression:
            return self.nbytes
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
        self.grid.read_into(_Chunks(files, self), start, buffer)

    def fields(self) -> list[Any]:
        """Return what it was made of, as JSON can hold it."""
        parts = [[part.start, part.shape, list(part.extent)] for part in self.grid.parts]
        places = [list(place) if place else None for place in self.places]
        return [
            self.grid.shape,
            self.grid.itemsize,
            parts,
            places,
            self.compression,
            list(self.fill),
        ]


class _Chunks:
    """The contents of a tensor's chunks, by their numbers; see `tensors.Files`."""

    def __init__(self, files: Files, tensor: Contents) -> None:
        self.files = files
        self.tensor = tensor

    def __getitem__(self, number: int, /) -> Any:
        """Return a chunk's content, which can only be read."""
        place = self.tensor.places[number]
        if place is None:
            return _Filled(self.tensor.fill)
        if not self.tensor.compression:
            return _Plain(self.files, place)
        nbytes = self.tensor.grid.parts[number].extent.nbytes
        return _Chunk(self.files, place, nbytes, self.tensor.compression)
