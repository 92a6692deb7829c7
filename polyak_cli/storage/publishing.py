"""The one atomic writer: an output appears whole under its name, or not at all.

Files and folders of files are written under a hidden name beside their place, synced, and renamed.
Knows which files a folder may hold, so that nothing else is ever replaced or deleted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from polyak_cli.errors import OutputError, shown
from polyak_cli.storage import (
    File,
)

#: How the files end that an output may replace: shards, and the index of them.
_OURS = (".safetensors", ".safetensors.index.json")


def check_folder(output: Path, inputs: Sequence[File], *, force: bool) -> None:
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


def check_room(output: Path, nbytes: int) -> None:
    """Refuse an output that the disk has no room for.

    Raises:
        OutputError: with both sizes.
    """
    free = _free(output.resolve().parent)
    if nbytes > free:
        raise OutputError(
            f"{shown(output)}: needs {nbytes} bytes, but its disk has {free} free; make room or "
            "write elsewhere"
        )


@contextlib.contextmanager
def publish(output: Path, *, force: bool, folder: bool = False) -> Iterator[Path]:
    """Yield a hidden path beside ``output`` that takes its name when the block ends well.

    The file is synced, renamed, and its folder synced.  On any exception - an interrupt too - the
    hidden file is gone and what had the name before is untouched.  A link is followed, so that
    what it points to is replaced.

    Further files of a format that needs several are called like the hidden one with something
    appended, which takes the place of the output's suffix in the end.  They get their names before
    the output itself does, so that whoever sees it sees all of it.  Only where ``force`` replaces
    an older output of several files, there is an instant, and after a loss of power perhaps a
    state, in which the older one's first file stands beside the new ones.

    Raises:
        OutputError: it cannot be written, or appeared meanwhile and ``force`` is not given.
    """
    written = _publish_folder if folder else _publish_files
    try:
        with written(output.resolve(), force=force) as hidden:
            yield hidden
    except OSError as error:
        raise OutputError(_unwritable(output, error)) from error


@contextlib.contextmanager
def _publish_files(final: Path, *, force: bool) -> Iterator[Path]:
    """See `publish`; raises OSError."""
    hidden = _hidden(final)
    try:
        with open(hidden, "xb"):  # the user's umask gives its mode, as for any new file
            pass
        yield hidden
        named = _names(hidden, final)
        for path in named:
            _sync(path)
        if force:
            _replace(named)
        else:
            _rename_new(named)
        _sync(final.parent)
    finally:
        try:
            _remove(hidden)
        finally:  # an interrupt may fall into the line above; the next one is ignored by then
            _remove(hidden)


def _hidden(final: Path) -> Path:
    """Return a name beside an output that nobody else has."""
    return final.parent / f".polyak-{os.getpid()}-{secrets.token_hex(4)}.partial"


def _written(hidden: Path) -> list[Path]:
    """Return all files of an output that has not got its name yet."""
    return [hidden, *sorted(hidden.parent.glob(f"{hidden.name}.*"))]


def _names(hidden: Path, final: Path) -> dict[Path, Path]:
    """Return what each file of an output will be called; the one that opens it comes last."""
    further = [path for path in _written(hidden) if path != hidden]
    named = {path: beside(final, path.name[len(hidden.name) :]) for path in further}
    return named | {hidden: final}


def _remove(hidden: Path) -> None:
    for path in _written(hidden):
        path.unlink(missing_ok=True)


def beside(output: Path, tail: str) -> Path:
    """Return what a further file of an output is called."""
    return output.with_name(output.stem + tail)


def _replace(named: Mapping[Path, Path]) -> None:
    """Give files their names, whatever had them before."""
    for hidden, final in named.items():
        if final.exists():
            hidden.chmod(final.stat().st_mode & 0o7777)
        hidden.replace(final)


def _rename_new(named: Mapping[Path, Path]) -> None:
    """Give files their names, unless another has taken one since they were checked."""
    try:
        for hidden, final in named.items():
            _link(hidden, final)
    except BaseException:  # all or nothing, an interrupt too
        for hidden, final in named.items():
            if not hidden.exists() or (final.exists() and final.samefile(hidden)):
                final.unlink(missing_ok=True)
        raise


def _link(hidden: Path, final: Path) -> None:
    """Give one file its name; the hidden one may stay beside it."""
    try:
        os.link(hidden, final)  # fails where the name exists; rename would replace
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if final.exists():
            raise FileExistsError(errno.EEXIST, "exists") from None
        hidden.replace(final)


# --- what is only looked at -----------------------------------------------------------------------


@contextlib.contextmanager
def scratch(near: Sequence[Path], nbytes: int) -> Iterator[Path]:
    """Yield a hidden folder for a copy that is only looked at; whatever happens, it is gone then.

    Args:
        near: folders, of which the first that may be written to and has room will hold it.
        nbytes: of the copy.

    Raises:
        OutputError: there is no such folder, or what is written into it has no room after all.
    """
    for place in near:
        if os.access(place, os.W_OK | os.X_OK) and _free(place) >= nbytes:
            break
    else:
        named = " and ".join(dict.fromkeys(map(shown, near)))
        raise OutputError(
            f"{named}: no room for a copy of {nbytes} bytes to compare with; make room there, or "
            "set TMPDIR to a folder on a disk that has it"
        )
    folder = _hidden(place.resolve() / "copy")
    try:
        folder.mkdir(mode=0o700)
        yield folder
    except OSError as error:
        raise OutputError(_unwritable(place, error)) from error
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        finally:  # an interrupt may fall into the line above; the next one is ignored by then
            shutil.rmtree(folder, ignore_errors=True)


def take_names(hidden: Path, final: Path) -> None:
    """Give the files of a copy their names, as `publish` does, though neither synced nor hidden."""
    if hidden.is_dir():
        hidden.rename(final)
        return
    for path, name in _names(hidden, final).items():
        path.rename(name)


def from_disk(paths: Sequence[Path]) -> None:
    """Sync files, and have them read from the disk the next time, where the system can be told.

    Raises:
        OSError: the disk does not take them.
    """
    for path in paths:
        _sync(path)
        if hasattr(os, "posix_fadvise"):  # macOS has none
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _free(folder: Path) -> int:
    """Return the bytes that the disk of a folder has room for."""
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize


def _unwritable(output: Path, error: OSError) -> str:
    name = shown(output)
    if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
        return f"{name}: already exists; use --force to replace it"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{name}: no room to write it ({error.strerror}); make room or write elsewhere"
    return f"{name}: cannot be written: {error.strerror}"


# --- folders --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _publish_folder(final: Path, *, force: bool) -> Iterator[Path]:
    """Yield a hidden folder beside ``final`` that takes its name when the block ends well.

    An older folder is moved aside for an instant and deleted last; whatever ends the program, one
    of the two is there, though a loss of power may leave the older one under a hidden name.

    Raises:
        OSError: it cannot be written, or the name was taken meanwhile.
        OutputError: the older folder has been given something else meanwhile.
    """
    hidden = _hidden(final)
    older = hidden.with_suffix(".older")
    try:
        hidden.mkdir()
        yield hidden
        for path in (*hidden.iterdir(), hidden):
            _sync(path)
        if force and final.exists() and any(final.iterdir()):
            check_folder(final, (), force=True)
            hidden.chmod(final.stat().st_mode & 0o7777)
            final.rename(older)
        hidden.rename(final)  # fails where the name is a folder that holds something
        _sync(final.parent)
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


def _sync(path: Path) -> None:
    """Have a file, or a folder's list of files, on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
