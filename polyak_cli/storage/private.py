"""Private folders in TMPDIR, which are removed even if all who used them were killed.

Whoever uses a folder holds a lock on a file in it.  The system gives it up when the last of these
processes has ended, however that ended, so that a later run can tell which folders nobody uses.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

#: Bytes of the path of a socket, on Linux and macOS; and where paths are short enough.
_LONGEST_PATH, _SHORT = 100, "/tmp"  # noqa: S108 (private folders are made in it)
_PREFIX, _LOCK = "polyak-", "lock"
#: How often a folder is removed, and seconds between.
_ATTEMPTS, _PAUSE = 50, 0.1


@contextlib.contextmanager
def use_folder() -> Iterator[str]:
    """Yield a folder of this process in TMPDIR, and remove it; also those of dead processes."""
    remove_dead()
    path, lock = make_folder()
    try:
        yield path
    finally:
        for _ in range(_ATTEMPTS):  # a process that is being killed may still write into it
            shutil.rmtree(path, ignore_errors=True)
            if not Path(path).exists():
                break
            time.sleep(_PAUSE)
        os.close(lock)


def make_folders(socket: str) -> tuple[str, str, list[int]]:
    """Make a folder in TMPDIR, and remove those of dead processes.

    Args:
        socket: the name of one.

    Returns:
        The folder, the one in which a socket can have the name, which is mostly the same, and the
        descriptors of `make_folder`.
    """
    remove_dead()
    root, lock = make_folder()
    if len(os.fsencode(root)) + len(socket) + 1 <= _LONGEST_PATH:
        return root, root, [lock]
    remove_dead(_SHORT)
    place, other = make_folder(_SHORT)
    return root, place, [lock, other]


def make_folder(parent: str | None = None) -> tuple[str, int]:
    """Make a folder that only this user can enter.

    Args:
        parent: where; TMPDIR by default.

    Returns:
        Its path, and a descriptor by which this process, and those that inherit it, hold its lock.
    """
    path = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
    hidden = f"{path}/.{_LOCK}"
    descriptor = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    # Named when it is locked already: another run must not take it for that of a dead one.
    Path(hidden).rename(f"{path}/{_LOCK}")
    return path, descriptor


def remove_dead(parent: str | None = None) -> None:
    """Remove the folders of this user whose processes have all ended."""
    for path in Path(parent or tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # in use, no folder of `make_folder`, or gone by now
            found = path.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
                _remove_unlocked(path)


def _remove_unlocked(path: Path) -> None:
    descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(descriptor)
