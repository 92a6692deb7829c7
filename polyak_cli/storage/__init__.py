"""Where bytes live: inputs are opened and read by range, outputs appear whole or not at all.

Knows no format and no tensor.  Nothing else in the package opens a checkpoint or an output by its
name.  There are two stores: the files of this machine, and the objects of buckets and web servers.
Objects become paths at the door (see `mirrors`), so that only this package knows of URLs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt

#: A buffer of bytes that reads fill and writes empty.
Bytes = npt.NDArray[np.uint8]


class Version(NamedTuple):
    """What tells that a name still stands for the very bytes that were seen before.

    Two versions of one name are equal if and only if its bytes were not replaced or changed.  Of an
    object, ``mark`` is the ETag, and device and inode are 0.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    mark: str = ""

    @property
    def is_object(self) -> bool:
        """Whether it is that of an object, which is read over a network."""
        return not self.inode and not self.device

    @classmethod
    def of(cls, status: os.stat_result) -> Version:
        """Return the version that `os.stat` or `os.fstat` reports."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def made_portable(self) -> Version:
        """Return what other machines can compare: each has device and inode numbers of its own."""
        return self._replace(device=-1, inode=-1)

    def matches(self, found: Version) -> bool:
        """Return whether a version that was found is this one, which may be portable."""
        return self == (found.made_portable() if self.device == -1 else found)


class File(NamedTuple):
    """One file of a checkpoint, as it was when its header was scanned."""

    path: str
    version: Version


class InputFile(Protocol):
    """One file or object, as it was when it was opened."""

    @property
    def name(self) -> str:
        """How messages call it."""

    @property
    def version(self) -> Version:
        """The version that was opened."""

    @property
    def size(self) -> int:
        """Its bytes."""

    def read_into(self, offset: int, buffer: Bytes) -> None:
        """Fill a buffer from an offset on.

        Raises:
            FormatError: the file ends first, or cannot be read; the message lacks its name, which
                the caller knows and puts in front.
        """

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return bytes from an offset on, fewer only where the file ends.

        Raises:
            FormatError: the file cannot be read; the message lacks its name.
        """

    def prefetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Have offset and length of each range fetched, without waiting for the bytes."""

    def stream(self) -> BinaryIO:
        """Return a file object on it, for libraries that seek and read."""

    def close(self) -> None:
        """Close it; a second call does nothing."""

    def __enter__(self) -> Self:
        """Return the open file."""

    def __exit__(self, *_: object) -> None:
        """Close it."""


class OutputFile(Protocol):
    """One file that is being written and has not got its final name yet."""

    @property
    def name(self) -> str:
        """How messages call it."""

    def write(self, offset: int, content: Bytes | bytes) -> None:
        """Write all of the content at an offset.

        Raises:
            OSError: it does not fit, or cannot be written.
        """

    def truncate(self, size: int) -> None:
        """Set the size."""

    def sync(self) -> None:
        """Have the disk hold what was written."""

    def close(self) -> None:
        """Close it; a second call does nothing."""

    def __enter__(self) -> Self:
        """Return the open file."""

    def __exit__(self, *_: object) -> None:
        """Close it."""


class Store(Protocol):
    """A place from which inputs are read.  Names are texts, as a URL is no path."""

    def open(self, key: str, version: Version | None = None) -> InputFile:
        """Open an input.

        Args:
            key: its name.
            version: refuse any other; None to take the present one.

        Raises:
            FormatError: it is missing, no regular file, unreadable, or another version; the
                message names it.
        """


def resolve(name: str | os.PathLike[str]) -> tuple[Store, str]:
    """Return the store of a name, and the key by which the store knows it.

    A URL is opened by a network client of this process, which therefore must not fork afterwards:
    only processes that were started for that resolve URLs.  All others go through `mirrors`.
    """
    from polyak_cli.storage import mirrors, urls
    from polyak_cli.storage.local import LocalStore

    key = os.fspath(name)
    if mirrors.is_mirrored(key):
        return mirrors.MirrorStore(), key
    if urls.parse(key):
        from polyak_cli.storage.objects import ObjectStore

        return ObjectStore(), key
    return LocalStore(), key


def open_input(name: str | os.PathLike[str], version: Version | None = None) -> InputFile:
    """Open an input in the store that its name belongs to; see `Store.open`."""
    store, key = resolve(name)
    return store.open(key, version)


def read_version(path: str | os.PathLike[str], status: os.stat_result | None = None) -> Version:
    """Return the version that a name has now; of an object, the version that was listed.

    Args:
        path: the name.
        status: of the file, where the system was asked already.

    Raises:
        OSError: there is none.
    """
    from polyak_cli.storage import mirrors

    found = mirrors.find_version(os.fspath(path))
    return found or Version.of(status or Path(path).stat())


def locate(path: str) -> str:
    """Return the name by which any process on any machine can open an input.

    Of the stand-in of an object that is its URL; any other path stays as it is.
    """
    from polyak_cli.storage import mirrors

    return mirrors.locate(path)


def can_locate(paths: Iterable[str]) -> bool:
    """Return whether `locate` names inputs completely: not those whose URLs hold secrets.

    These are known to this process alone, and are not sent to others.
    """
    from polyak_cli.storage import mirrors

    return not any(map(mirrors.is_secret, paths))
