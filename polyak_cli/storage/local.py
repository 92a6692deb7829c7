"""Files of this machine: read and written by offset, with few system calls.

Knows no format.  `tests/faults` makes `os.preadv`, `os.pread` and `os.pwrite` fail one by one, so
these stay the only calls that move bytes.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, Self

import numpy as np

from polyak_cli.errors import CHANGED, ChangedError, FormatError, shown
from polyak_cli.storage import Bytes, InputFile, OutputFile, Version

#: Bytes of a page of memory.
PAGE = 4096
#: Bytes that `copy_range` moves at a time.
_STEP = 1 << 20


def page_aligned(nbytes: int) -> Bytes:
    """Return bytes that begin at a page of memory; their content is undefined."""
    whole = np.empty(nbytes + PAGE, np.uint8)
    start = -whole.ctypes.data % PAGE
    return whole[start : start + nbytes]


def clashes(distance: int) -> bool:
    """Return whether the system copies slowly over a distance in memory.

    On AMD's Zen processors ``rep movsb``, with which Linux copies between page cache and buffers,
    is four times slower where the target lies 1 to 63 bytes behind the source, modulo a page.
    `np.empty` and `bytearray` begin 16 bytes behind a page, and tensors anywhere in their files.
    """
    return 0 < distance % PAGE < 64


def make_read_error(error: OSError) -> FormatError:
    """Return the error for a failed read; the message lacks the file, which the caller knows."""
    return FormatError(f"cannot be read: {error.strerror}")


class _Descriptor:
    """An open descriptor, which is closed once."""

    _descriptor: int

    def fileno(self) -> int:
        """Return the descriptor, for libraries that take one."""
        return self._descriptor

    def close(self) -> None:
        """See `storage.InputFile.close`."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Self:
        """Return the open file."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


class LocalInput(_Descriptor):
    """A regular file, open for reading; see `storage.InputFile`."""

    def __init__(self, name: str, descriptor: int, version: Version) -> None:
        self.name = name
        self.version = version
        self._descriptor = descriptor

    @classmethod
    def borrow(cls, name: str, descriptor: int) -> Self:
        """Return an input on a descriptor that its owner closes."""
        return cls(name, descriptor, Version.of(os.fstat(descriptor)))

    @property
    def size(self) -> int:
        """Its bytes, when it was opened."""
        return self.version.size

    def read_into(self, offset: int, buffer: Bytes) -> None:
        """See `storage.InputFile.read_into`."""
        view = memoryview(buffer.data)
        while len(view):
            try:
                count = os.preadv(self._descriptor, [view], offset)
            except OSError as error:
                raise make_read_error(error) from None
            if count == 0:
                raise FormatError(f"the file ends {len(view)} bytes before the tensor does")
            view, offset = view[count:], offset + count

    def read(self, offset: int, nbytes: int) -> bytes:
        """See `storage.InputFile.read`.

        The system may give fewer bytes at a time: after a signal, on a network, beyond 2 GiB.
        """
        parts = []
        try:
            while nbytes and (part := os.pread(self._descriptor, nbytes, offset)):
                parts.append(part)
                nbytes, offset = nbytes - len(part), offset + len(part)
        except OSError as error:
            raise make_read_error(error) from None
        return b"".join(parts)

    def stream(self) -> BinaryIO:
        """See `storage.InputFile.stream`."""
        return io.BufferedReader(InputStream(self))

    def prefetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """See `storage.InputFile.prefetch`."""
        if hasattr(os, "posix_fadvise"):  # macOS has none, and reads ahead by itself
            for offset, nbytes in ranges:
                os.posix_fadvise(self._descriptor, offset, nbytes, os.POSIX_FADV_WILLNEED)


class InputStream(io.RawIOBase):
    """A position in an input, for libraries that seek and read; it reads as `InputFile.read`."""

    def __init__(self, file: InputFile) -> None:
        self._file = file
        self._position = 0

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def seekable(self) -> bool:
        """Return that it has a position."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to an offset from the beginning, the position, or the end."""
        starts = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.size}
        position = starts[whence] + offset
        if not 0 <= position < 1 << 63:  # what `lseek` refuses, and `zipfile` relies on that
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the file goes, and return the number of bytes."""
        data = self._file.read(self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class LocalOutput(_Descriptor):
    """A file that is being written; see `storage.OutputFile`."""

    def __init__(self, path: str, *, create: bool = False) -> None:
        """Open a file that exists, or with ``create`` one that must not exist yet."""
        self.name = path
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0)
        self._descriptor = os.open(path, flags, 0o666)

    @classmethod
    def borrow(cls, name: str, descriptor: int) -> Self:
        """Return an output on a descriptor that its owner closes."""
        output = cls.__new__(cls)
        output.name, output._descriptor = name, descriptor
        return output

    def reader(self) -> LocalInput:
        """Return an input that reads what was written; it is closed with this file."""
        return LocalInput.borrow(self.name, self._descriptor)

    def write(self, offset: int, content: Bytes | bytes) -> None:
        """See `storage.OutputFile.write`; the system may take the content in several parts."""
        view = memoryview(content if isinstance(content, bytes) else content.data)
        while len(view):
            count = os.pwrite(self._descriptor, view, offset)
            view, offset = view[count:], offset + count

    def stream(self) -> BinaryIO:
        """Return a file object on it for libraries that write one; closing it leaves this open."""
        return open(self._descriptor, "r+b", closefd=False)

    def truncate(self, size: int) -> None:
        """See `storage.OutputFile.truncate`."""
        os.ftruncate(self._descriptor, size)

    def sync(self) -> None:
        """See `storage.OutputFile.sync`."""
        getattr(os, "fdatasync", os.fsync)(self._descriptor)  # macOS has only fsync


class LocalStore:
    """The files of this machine; see `storage.Store`."""

    def open(self, key: str, version: Version | None = None) -> LocalInput:
        """See `storage.Store.open`.  Links are followed, as caches of models consist of them."""
        try:
            # Without O_NONBLOCK, opening a FIFO waits for its writer.
            descriptor = os.open(key, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise FormatError(f"{shown(key)}: cannot be read: {error.strerror}") from error
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise FormatError(f"{shown(key)}: is not a regular file")
            found = Version.of(status)
            if version is not None and not version.matches(found):
                raise ChangedError(f"{shown(key)}: {CHANGED}")
        except BaseException:
            os.close(descriptor)
            raise
        return LocalInput(key, descriptor, found)


def open_local(path: str | os.PathLike[str], version: Version | None = None) -> LocalInput:
    """Open a file of this machine, where a library needs its descriptor; see `Store.open`.

    An object is fetched whole first.
    """
    from polyak_cli.storage import mirrors

    name = os.fspath(path)
    if mirrors.find_version(name):
        return mirrors.open_whole(name, version)
    return LocalStore().open(name, version)


def copy_range(
    source: InputFile,
    offset: int,
    target: OutputFile,
    to: int,
    nbytes: int,
    after_each: Callable[[], None] = lambda: None,
) -> None:
    """Copy bytes from an input to an output, in pieces of bounded size.

    Args:
        source: the input.
        offset: where the bytes begin in it.
        target: the output.
        to: where they go.
        nbytes: how many.
        after_each: called after each piece; a heartbeat, for one.

    Raises:
        FormatError: the input ends first, or cannot be read; the message lacks its name.
        OSError: the output cannot be written.
    """
    buffer = np.empty(min(_STEP, nbytes), np.uint8)
    for done in range(0, nbytes, _STEP):
        piece = buffer[: nbytes - done]
        source.read_into(offset + done, piece)
        target.write(to + done, piece)
        after_each()


def copy_around(
    source: InputFile,
    target: OutputFile,
    holes: Iterable[tuple[int, int]],
    after_each: Callable[[], None] = lambda: None,
) -> None:
    """Copy a file except for bytes that will be written later; see `copy_range`.

    Args:
        source: the input.
        target: the output, which gets its size.
        holes: where these bytes begin and how many they are, in order and without overlaps.
        after_each: called after each piece.
    """
    target.truncate(source.size)
    done = 0
    for offset, nbytes in (*holes, (source.size, 0)):
        copy_range(source, done, target, done, offset - done, after_each)
        done = offset + nbytes


@contextlib.contextmanager
def name_errors(name: str) -> Iterator[None]:
    """Put a file's name in front of errors that lack it."""
    try:
        yield
    except FormatError as error:
        raise type(error)(f"{shown(name)}: {error}") from None
