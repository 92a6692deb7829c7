"""An output that is a folder of files: written beside its place, swapped in whole or not at all.

Knows which files such a folder may hold, so that nothing else is ever replaced or deleted.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from polyak_cli.errors import OutputError, shown
from polyak_cli.tensors import File

#: How the files end that an output may replace: shards, and the index of them.
_OURS = (".safetensors", ".safetensors.index.json")


def check(output: Path, inputs: Sequence[File], *, force: bool) -> None:
    """Refuse a folder that must not be replaced; an empty one may be filled.

    Raises:
        OutputError: what is in the way, and what to do.
    """
    name = shown(output)
    if not output.is_dir():
        raise OutputError(f"{name}: exists and is no folder; name another output")
    for path, _ in inputs:
        if Path(path).parent.samefile(output):
            raise OutputError(f"{name}: holds the checkpoint {shown(path)}; name another output")
    if any(output.iterdir()) and not force:
        raise OutputError(f"{name}: already exists; use --force to replace it")
    other = _other(output)
    if other:
        raise OutputError(
            f"{name}: holds '{shown(other)}', which an average would not; name another output, or "
            "move that away"
        )


def _other(folder: Path) -> str:
    """Return the name of something that is not a file of a sharded checkpoint, or ''."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            regular = stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode)
            if not regular or not entry.name.endswith(_OURS):
                return entry.name
    return ""


@contextlib.contextmanager
def publish(final: Path, *, force: bool) -> Iterator[Path]:
    """Yield a hidden folder beside ``final`` that takes its name when the block ends well.

    An older folder is moved aside for an instant and deleted last; whatever ends the program, one
    of the two is there, though a loss of power may leave the older one under a hidden name.

    Raises:
        OSError: it cannot be written, or the name was taken meanwhile.
        OutputError: the older folder has been given something else meanwhile.
    """
    hidden = final.parent / f".polyak-{os.getpid()}-{secrets.token_hex(4)}.partial"
    older = hidden.with_suffix(".older")
    try:
        hidden.mkdir()
        yield hidden
        for path in (*hidden.iterdir(), hidden):
            sync(path)
        if force and final.exists() and any(final.iterdir()):
            check(final, (), force=True)
            hidden.chmod(final.stat().st_mode & 0o7777)
            final.rename(older)
        hidden.rename(final)  # fails where the name is a folder that holds something
        sync(final.parent)
    finally:
        try:
            _settle(hidden, older, final)
        finally:  # an interrupt may fall into the line above; the next one is ignored by then
            _settle(hidden, older, final)


def _settle(hidden: Path, older: Path, final: Path) -> None:
    """Delete what did not get the name, or what lost it."""
    if older.exists() and not final.exists():
        older.rename(final)
    for folder in (hidden, older):
        with contextlib.suppress(FileNotFoundError):
            for path in folder.iterdir():
                if path.name.endswith(_OURS):
                    path.unlink()
            folder.rmdir()


def sync(path: Path) -> None:
    """Have a file, or a folder's list of files, on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
