"""Read and write runs of bytes of local files, by offset.

Knows no format.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from polyak_cli.errors import FormatError

Bytes = npt.NDArray[np.uint8]
#: Bytes of a page of memory.
PAGE = 4096


def page_aligned(nbytes: int) -> Bytes:
    """Return bytes that begin at a page of memory; their content is undefined."""
    whole = np.empty(nbytes + PAGE, np.uint8)
    start = -whole.ctypes.data % PAGE
    return whole[start : start + nbytes]


def clashes(distance: int) -> bool:
    """Tell whether the system copies slowly to a place so many bytes behind where it copies from.

    On AMD's Zen processors ``rep movsb``, with which Linux copies between page cache and buffers,
    is four times slower where the target lies 1 to 63 bytes behind the source, modulo a page.
    `np.empty` and `bytearray` begin 16 bytes behind a page, and tensors anywhere in their files.
    """
    return 0 < distance % PAGE < 64


def read_exactly(descriptor: int, offset: int, buffer: Bytes) -> None:
    """Fill ``buffer`` from the file's bytes at ``offset``.

    Raises:
        FormatError: the file ends first, or cannot be read; the message lacks the file.
    """
    view = memoryview(buffer.data)
    while len(view):
        try:
            count = os.preadv(descriptor, [view], offset)
        except OSError as error:
            raise unreadable(error) from None
        if count == 0:
            raise FormatError(f"the file ends {len(view)} bytes before the tensor does")
        view, offset = view[count:], offset + count


def read_at(descriptor: int, offset: int, nbytes: int) -> bytes:
    """Return the file's bytes at ``offset``, fewer only where it ends.

    The system may give fewer at a time: where a signal comes, on a network, and beyond 2 GiB.

    Raises:
        FormatError: the file cannot be read; the message lacks it.
    """
    parts = []
    try:
        while nbytes and (part := os.pread(descriptor, nbytes, offset)):
            parts.append(part)
            nbytes, offset = nbytes - len(part), offset + len(part)
    except OSError as error:
        raise unreadable(error) from None
    return b"".join(parts)


def unreadable(error: OSError) -> FormatError:
    """Return what a failed read means, for whoever knows the file to name it."""
    return FormatError(f"cannot be read: {error.strerror}")


def expect(descriptor: int, offset: int, nbytes: int) -> None:
    """Have the system fetch bytes that will be read soon, without waiting for them."""
    if hasattr(os, "posix_fadvise"):  # macOS has none, and reads ahead by itself
        os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_WILLNEED)


def write_exactly(descriptor: int, offset: int, buffer: Bytes | bytes) -> None:
    """Write all of ``buffer`` at ``offset``, which the system may take in several parts."""
    view = memoryview(buffer if isinstance(buffer, bytes) else buffer.data)
    while len(view):
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


class Identity(NamedTuple):
    """What tells that a path still names the very bytes whose header was scanned."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        """Return the identity that `os.stat` or `os.fstat` tells."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class File(NamedTuple):
    """One file of a checkpoint, as it was when its header was scanned."""

    path: str
    identity: Identity
