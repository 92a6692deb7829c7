"""Every read of a file that a test makes through storage, by path, offset and length.

A test sees its own reads and those of the children that it forks.  What libhdf5 reads by itself
does not pass through Python and is not seen.  Observed with LD_PRELOAD: it reads object headers in
pieces of 512 bytes, so a piece may reach less than 512 bytes into a tensor that follows a header.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Read(NamedTuple):
    """One read: as many bytes as were asked for, not as many as came."""

    path: str
    offset: int
    nbytes: int

    def overlaps(self, start: int, stop: int) -> bool:
        """Return whether it took a byte between two offsets."""
        return self.offset < stop and start < self.offset + self.nbytes


class ReadLog:
    """The reads since the log began, in the order in which each process made them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def reads(self) -> list[Read]:
        """Return all of them."""
        rows = (line.rsplit("\t", 2) for line in self.path.read_text().splitlines())
        return [Read(path, int(offset), int(nbytes)) for path, offset, nbytes in rows]


@contextlib.contextmanager
def count_reads(folder: Path) -> Iterator[ReadLog]:
    """Log all calls of `os.preadv` and `os.pread`, the only ones by which storage reads.

    Args:
        folder: where the log is kept.
    """
    log = ReadLog(folder / "reads.log")
    # Appended in one call each, so that the lines of several processes do not mix.
    descriptor = os.open(log.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)

    def note(source: int, offset: int, nbytes: int) -> None:
        path = Path(f"/proc/self/fd/{source}").readlink()
        os.write(descriptor, f"{path}\t{offset}\t{nbytes}\n".encode())

    preadv, pread = os.preadv, os.pread

    def logged_preadv(source: int, buffers: Sequence[Any], offset: int) -> int:
        note(source, offset, sum(memoryview(buffer).nbytes for buffer in buffers))
        return preadv(source, buffers, offset)

    def logged_pread(source: int, nbytes: int, offset: int) -> bytes:
        note(source, offset, nbytes)
        return pread(source, nbytes, offset)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "preadv", logged_preadv)
            patch.setattr(os, "pread", logged_pread)
            yield log
    finally:
        os.close(descriptor)
