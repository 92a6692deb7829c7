"""The one atomic writer: an output appears whole under its name, or not at all.

Files and folders of files are written under a hidden name beside their place, synced, and renamed.
Knows no format: the caller says which files of an older folder are an average's, and nothing else
is ever replaced or deleted.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from polyak_cli.errors import OutputError, shown, word_size
from polyak_cli.storage import File, mirrors

#: Returns the names of the files in a folder, relative to it, that may be replaced with it.
ListOwned = Callable[[Path], Collection[str]]


def own_nothing(_folder: Path) -> Collection[str]:
    """Return no name: nothing may be replaced."""
    return ()


def check_folder(
    output: Path, inputs: Sequence[File], list_owned: ListOwned, *, force: bool
) -> None:
    """Refuse a folder that must not be replaced; an empty one may be filled.

    Args:
        output: the folder.
        inputs: files that it must not hold.
        list_owned: returns which of its files an output may replace.
        force: replace an older output.

    Raises:
        OutputError: says which file is in the way, and what to do.
    """
    name = shown(output)
    if not output.is_dir():
        raise OutputError(f"{name}: exists and is not a folder; name another output")
    place = output.resolve()
    for path, _ in inputs:
        folder = Path(path).parent.resolve()
        if place in (folder, *folder.parents):
            raise OutputError(f"{name}: holds the checkpoint {shown(path)}; name another output")
    if any(output.iterdir()) and not force:
        raise OutputError(f"{name}: already exists; use --force to replace it")
    other = _find_other(output, set(list_owned(output)))
    if other:
        raise OutputError(
            f"{name}: holds '{shown(other)}', which is not part of an average; name another "
            "output, or move it away"
        )


def _find_other(folder: Path, owned: Collection[str], inside: str = "") -> str:
    """Return the first name that is neither an owned regular file nor a folder of such, or ''."""
    with os.scandir(folder / inside) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = f"{inside}{entry.name}"
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode) and any(one.startswith(f"{name}/") for one in owned):
                other = _find_other(folder, owned, f"{name}/")
                if other:
                    return other
            elif not stat.S_ISREG(mode) or name not in owned:
                return name
    return ""


def check_room(output: Path, nbytes: int) -> None:
    """Refuse an output that does not fit on its disk.

    Raises:
        OutputError: names both sizes.
    """
    free = _free(output.resolve().parent)
    if nbytes > free:
        raise OutputError(
            f"{shown(output)}: needs {word_size(nbytes)}, but its disk has {word_size(free)} "
            "free; make room or write elsewhere"
        )


@contextlib.contextmanager
def publish(
    output: Path,
    *,
    force: bool,
    folder: ListOwned | None = None,
    opener: str = "",
    verify: bool = False,
) -> Iterator[Path]:
    """Yield a hidden path beside ``output`` that takes its name when the block ends without error.

    The file is synced, renamed, and its folder synced.  After any exception, an interrupt too, the
    hidden file is deleted and what had the name before is untouched.  A link is followed, so that
    its target is replaced.

    A format of several files calls the further ones like the hidden one with a tail appended; at
    the end the tail replaces the output's suffix.  They get their names before the output itself,
    so that a reader who finds the output finds all of it.  When ``force`` replaces an older output
    of several files, the older first file stands beside new further files for an instant, and after
    a loss of power perhaps for good.

    The stand-in of an object is hidden beside the other stand-ins, and is sent when the block ends.

    Args:
        output: the path.
        force: replace what has the name.
        folder: make a folder instead of a file, and replace an older one only if it holds nothing
            but the files that this returns.
        opener: the file of a folder by which a reader finds the others.  Objects have no folders
            that could be renamed: it gets its name last.
        verify: read objects back after they were sent.

    Raises:
        OutputError: it cannot be written, or appeared meanwhile and ``force`` is not given.
    """
    try:
        if mirrors.is_mirrored(str(output)):
            with _publish_objects(output, folder, opener, force=force, verify=verify) as hidden:
                yield hidden
            return
        final = output.resolve()
        with (
            _publish_folder(final, folder, force=force)
            if folder
            else _publish_files(final, force=force)
        ) as hidden:
            yield hidden
    except OSError as error:
        raise OutputError(_explain_error(output, error)) from error


def is_replaced(output: Path, inode: int) -> bool:
    """Return whether a published output is another file by now; objects were compared already."""
    return not mirrors.is_mirrored(str(output)) and output.stat().st_ino != inode


@contextlib.contextmanager
def _publish_files(final: Path, *, force: bool) -> Iterator[Path]:
    """See `publish`; raises OSError."""
    hidden = _make_hidden_name(final)
    with _cleaning_up(lambda: _remove(hidden)):
        with open(hidden, "xb"):  # the user's umask gives its mode, as for any new file
            pass
        yield hidden
        named = _map_names(hidden, final)
        for path in named:
            _sync(path)
        if force:
            _name_over_older(named)
        else:
            _name_new(named)
        _sync(final.parent)


@contextlib.contextmanager
def _cleaning_up(clean_up: Callable[[], None]) -> Iterator[None]:
    """Call ``clean_up`` when the block ends, however it ends.

    A signal may interrupt the call, or come where Python holds a block that is entered but not yet
    bound to its ``with``.  Then the call is made when the program exits.
    """
    owner = os.getpid()

    def clean_up_at_exit() -> None:
        if os.getpid() == owner:  # a forked child has no part in it
            with contextlib.suppress(OSError):
                clean_up()

    atexit.register(clean_up_at_exit)
    try:
        yield
    finally:
        clean_up()
        atexit.unregister(clean_up_at_exit)


def _make_hidden_name(final: Path) -> Path:
    """Return a unique hidden name beside an output."""
    return final.parent / f".polyak-{os.getpid()}-{os.urandom(4).hex()}.partial"


def _list_written(hidden: Path) -> list[Path]:
    """Return all files of an output that is still hidden."""
    return [hidden, *sorted(hidden.parent.glob(f"{hidden.name}.*"))]


def _map_names(hidden: Path, final: Path) -> dict[Path, Path]:
    """Return the final name of each file of an output; the one that opens it comes last."""
    further = [path for path in _list_written(hidden) if path != hidden]
    named = {path: name_beside(final, path.name[len(hidden.name) :]) for path in further}
    return named | {hidden: final}


def _remove(hidden: Path) -> None:
    for path in _list_written(hidden):
        path.unlink(missing_ok=True)


def name_beside(output: Path, tail: str) -> Path:
    """Return the name of a further file of an output."""
    return output.with_name(output.stem + tail)


def _name_over_older(named: Mapping[Path, Path]) -> None:
    """Give files their names, and replace the files that had them."""
    for hidden, final in named.items():
        if final.exists():
            hidden.chmod(final.stat().st_mode & 0o7777)
        hidden.replace(final)


def _name_new(named: Mapping[Path, Path]) -> None:
    """Give files their names, unless one was taken since they were checked."""
    try:
        for hidden, final in named.items():
            _link(hidden, final)
    except BaseException:  # all or nothing, an interrupt too
        for hidden, final in named.items():
            if not hidden.exists() or (final.exists() and final.samefile(hidden)):
                final.unlink(missing_ok=True)
        raise


def _link(hidden: Path, final: Path) -> None:
    """Give one file its name; its hidden name may stay beside it."""
    try:
        os.link(hidden, final)  # fails where the name exists; rename would replace
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if final.exists():
            raise FileExistsError(errno.EEXIST, "exists") from None
        hidden.replace(final)


# --- objects --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _publish_objects(
    output: Path, list_owned: ListOwned | None, opener: str, *, force: bool, verify: bool
) -> Iterator[Path]:
    """Yield a hidden path among the stand-ins, and send it when the block ends without error.

    Raises:
        OSError: the hidden file cannot be written.
        OutputError: the store cannot be written, or the name was taken meanwhile.
    """
    mirrors.prepare(output, force=force)
    hidden = _make_hidden_name(output)
    with _cleaning_up(lambda: _abandon(hidden)):
        _finals[hidden] = output
        if list_owned is None:
            hidden.touch()
        else:
            hidden.mkdir()
        yield hidden
        if list_owned is None:
            mirrors.send(_map_names(hidden, output), force=force, verify=verify)
        else:
            named = _map_objects(hidden, output, opener)
            older = _list_older(output, list_owned, force=force)
            stale = [path for path in older if path not in named.values()]
            mirrors.send(named, force=force, stale=stale, verify=verify)


#: The hidden names of objects that are being written -> the stand-ins that they become.
_finals: dict[Path, Path] = {}


def begin_parts(written: Mapping[Path, Sequence[tuple[int, int]]]) -> bool:
    """Begin to send files of a hidden output to a store while they are written.

    Args:
        written: each file of one output -> offset and length of each run of bytes that
            `mirrors.open_output` will write; the others are there.

    Returns:
        Whether the store takes parts from several processes; if not, nothing has changed.
    """
    named = {}
    for path in written:
        hidden = next((one for one in (path, *path.parents) if one in _finals), None)
        if hidden is None:
            return False
        named[path] = _finals[hidden] / path.relative_to(hidden)
    return mirrors.begin(named, written)


def _map_objects(hidden: Path, output: Path, opener: str) -> dict[Path, Path]:
    """Return the final name of each file of a folder; the one that opens it comes last."""
    files = [path for path in sorted(hidden.rglob("*")) if path.is_file()]
    files.sort(key=lambda path: path.relative_to(hidden).as_posix() == opener)
    return {path: output / path.relative_to(hidden) for path in files}


def _list_older(output: Path, list_owned: ListOwned, *, force: bool) -> list[Path]:
    """Return the stand-ins of an older output; refuse what came into its folder meanwhile."""
    mirrors.enter(f"{mirrors.locate(str(output))}/")
    if not output.is_dir():
        return []
    check_folder(output, [], list_owned, force=force)
    return [output / name for name in list_owned(output)]


def _abandon(hidden: Path) -> None:
    """End what is being sent, and delete its stand-ins."""
    mirrors.abandon()
    _finals.pop(hidden, None)
    if hidden.is_dir():
        for folder in _list_written(hidden):
            shutil.rmtree(folder, ignore_errors=True)
    else:
        _remove(hidden)


# --- scratch copies -------------------------------------------------------------------------------


@contextlib.contextmanager
def make_scratch(near: Sequence[Path], nbytes: int) -> Iterator[Path]:
    """Yield a hidden folder for a temporary copy, and delete it at the end, whatever happens.

    Args:
        near: folders; the first that is writable and has room will hold the copy.
        nbytes: of the copy.

    Raises:
        OutputError: there is no such folder, or its room does not last.
    """
    for place in near:
        if os.access(place, os.W_OK | os.X_OK) and _free(place) >= nbytes:
            break
    else:
        named = " and ".join(dict.fromkeys(map(shown, near)))
        raise OutputError(
            f"{named}: no room for a copy of {word_size(nbytes)} to compare with; make room "
            "there, or set TMPDIR to a folder on a disk with room"
        )
    folder = _make_hidden_name(place.resolve() / "copy")
    try:
        with _cleaning_up(lambda: shutil.rmtree(folder, ignore_errors=True)):
            folder.mkdir(mode=0o700)
            yield folder
    except OSError as error:
        raise OutputError(_explain_error(place, error)) from error


def take_names(hidden: Path, final: Path) -> None:
    """Give the files of a scratch copy their final names, as `publish` does, without syncing."""
    if hidden.is_dir():
        hidden.rename(final)
        return
    for path, name in _map_names(hidden, final).items():
        path.rename(name)


def sync_files(paths: Sequence[Path]) -> None:
    """Have the disk hold files, so that other machines see what was written.

    Raises:
        OSError: the disk does not take them.
    """
    for path in paths:
        _sync(path)


def drop_cache(paths: Sequence[Path]) -> None:
    """Sync files and drop them from the page cache, so that they are next read from the disk.

    Raises:
        OSError: the disk does not take them.
    """
    for path in paths:
        with _open_to_sync(path) as descriptor:
            os.fsync(descriptor)
            if hasattr(os, "posix_fadvise"):  # macOS has none
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _free(folder: Path) -> int:
    """Return the free bytes of the disk that a folder is on."""
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize


def _explain_error(output: Path, error: OSError) -> str:
    name = shown(output)
    if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
        return f"{name}: already exists; use --force to replace it"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{name}: no room to write it ({error.strerror}); make room or write elsewhere"
    return f"{name}: cannot be written: {error.strerror}"


# --- folders --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _publish_folder(final: Path, list_owned: ListOwned, *, force: bool) -> Iterator[Path]:
    """Yield a hidden folder beside ``final`` that takes its name when the block ends without error.

    An older folder is moved aside for an instant and deleted last.  Whatever ends the program, one
    of the two exists, though a loss of power may leave the older one under a hidden name.

    Raises:
        OSError: it cannot be written, or the name was taken meanwhile.
        OutputError: a foreign file was put into the older folder meanwhile.
    """
    hidden = _make_hidden_name(final)
    older = hidden.with_suffix(".older")
    with _cleaning_up(lambda: _settle(hidden, older, final)):
        hidden.mkdir()
        yield hidden
        for path in (*hidden.rglob("*"), hidden):
            _sync(path)
        if force and final.exists() and any(final.iterdir()):
            hidden.chmod(final.stat().st_mode & 0o7777)
            final.rename(older)
            # Only now: under its new name, no other program puts a file into it.
            _check_older(older, final, list_owned)
        hidden.rename(final)  # fails where the name is a folder that holds something
        _sync(final.parent)


def _check_older(older: Path, final: Path, list_owned: ListOwned) -> None:
    """Give an older folder its name back and refuse, if it holds anything but an average."""
    other = _find_other(older, set(list_owned(older)))
    if other:
        older.rename(final)
        raise OutputError(
            f"{shown(final)}: now holds '{shown(other)}', which is not part of an average; name "
            "another output, or move it away"
        )


def _settle(hidden: Path, older: Path, final: Path) -> None:
    """Delete the folder that lost the name or did not get it."""
    if older.exists() and not final.exists():
        older.rename(final)
    for folder in (*_list_written(hidden), older):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)


def _sync(path: Path) -> None:
    """Write a file, or a folder's list of files, to the disk."""
    with _open_to_sync(path) as descriptor:
        os.fsync(descriptor)


@contextlib.contextmanager
def _open_to_sync(path: Path) -> Iterator[int]:
    """Open a file or a folder; not through `LocalStore`, which opens no folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
