"""HOW tensors are stored: scan checkpoints, lay out an output, and publish it whole or not at all.

The formats themselves are one module each; this one runs their jobs in children (`sandbox`) and
holds the one atomic writer, `publish`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from polyak_cli.errors import OutputError, PolyakError, shown
from polyak_cli.tensors import Identity, LaidOut, Table

#: What Keras opens as HDF5; it goes by the suffix, and it is case-sensitive.
SUFFIXES = (".h5", ".hdf5")


def scan(paths: Sequence[Path], *, jobs: int = 1) -> list[Table]:
    """Return the table of tensors of each checkpoint, in order.

    A checkpoint that differs from the template in its tensors' values only shares its table.

    Args:
        paths: the checkpoints; the last one is the template, of which everything is listed.
        jobs: children that scan at a time.

    Raises:
        FormatError: a file is foreign, damaged, hostile, or still being written.
    """
    from polyak_cli.formats.twins import is_twin

    if not paths:
        return []
    files = [(path, _identity(path)) for path in paths]
    (template,) = _scanned(files[-1:], 1, everything=True)
    twins = [is_twin(template, *file) for file in files[:-1]]
    others = [file for file, twin in zip(files, twins, strict=False) if not twin]
    scanned = iter(_scanned(others, jobs, everything=False))
    return [
        replace(template, path=path, identity=identity) if twin else next(scanned)
        for (path, identity), twin in zip(files, [*twins, True], strict=True)
    ]


def _scanned(files: Sequence[tuple[Path, Identity]], jobs: int, *, everything: bool) -> list[Table]:
    """Scan files in children; the first that cannot be read is raised."""
    from polyak_cli.formats import hdf5, sandbox

    names = [str(path) for path, _ in files]
    requests = [hdf5.Scan(name, everything) for name in names]
    tables = []
    children = max(1, min(jobs, len(files)))
    with contextlib.closing(sandbox.each(hdf5.scan, requests, names, children)) as outcomes:
        for (path, identity), outcome in zip(files, outcomes, strict=True):
            if isinstance(outcome, PolyakError):
                raise outcome
            tables.append(hdf5.table(path, identity, outcome))
    return tables


def _identity(path: Path) -> Identity:
    try:
        return Identity.of(path.stat())
    except OSError as error:
        raise PolyakError(f"{shown(path)}: cannot be read: {error.strerror}") from None


def descriptions(paths: Sequence[Path]) -> Iterator[tuple[str, str, str]]:
    """Yield model configuration, training configuration and Keras version of each file.

    They are the texts that Keras wrote; what a file lacks is ''.

    Raises:
        FormatError: a file is foreign, damaged, hostile, or still being written.
    """
    from polyak_cli.formats import hdf5, sandbox

    names = [str(path) for path in paths]
    with contextlib.closing(sandbox.each(hdf5.description, names, names)) as outcomes:
        for outcome in outcomes:
            if isinstance(outcome, PolyakError):
                raise outcome
            model, training, keras = outcome
            yield model, training, keras


def averages(paths: Sequence[Path], *, jobs: int = 1) -> Collection[Path]:
    """Return those of the files that this tool wrote."""
    from polyak_cli.formats import hdf5, sandbox

    outcomes = sandbox.each(hdf5.is_average, [str(p) for p in paths], [str(p) for p in paths], jobs)
    return {path for path, ours in zip(paths, outcomes, strict=True) if ours is True}


def lay_out(
    template: Table,
    output: Path,
    *,
    averaged: Mapping[str, str],
    dropped: Sequence[str],
    provenance: str,
) -> dict[str, LaidOut]:
    """Write all of the output but its averaged tensors, and return where those belong.

    Args:
        template: the checkpoint that it will be like.
        output: the file to write; overwritten.
        averaged: location in the file -> dtype to store.
        dropped: what to leave out, as names of the file's root.
        provenance: the record to write into it, as JSON.

    Raises:
        FormatError: the template cannot be copied safely.
        OSError: there is no room.
    """
    from polyak_cli.formats import hdf5, sandbox

    path, whole = str(template.path), hdf5.whole_groups(template, averaged)
    request = hdf5.Layout(path, str(output), averaged, whole, dropped, provenance)
    (outcome,) = sandbox.each(hdf5.lay_out, [request], [path])
    if isinstance(outcome, OutputError):  # `publish` knows by what name to tell it
        raise OSError(errno.ENOSPC, str(outcome))
    if isinstance(outcome, PolyakError):
        raise outcome
    return hdf5.laid_out(outcome)


def check_output(output: Path, inputs: Sequence[tuple[Path, Identity]], *, force: bool) -> None:
    """Refuse, before any work, an output that could not or must not be written.

    Raises:
        OutputError: what is in the way, and what to do.
    """
    name = shown(output)
    if output.is_dir():
        raise OutputError(f"{name}: is a folder; name the file to write in it")
    if output.suffix not in SUFFIXES:
        raise OutputError(
            f"{name}: Keras opens an HDF5 model only as .h5 or .hdf5; give the output that suffix"
        )
    folder = output.resolve().parent
    if not folder.is_dir():
        raise OutputError(f"{name}: there is no folder {shown(folder)}; create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{name}: the folder {shown(folder)} is not writable")
    if not os.path.lexists(output):
        return
    if output.exists():
        _check_existing(output, inputs)
    if not force:
        raise OutputError(f"{name}: already exists; use --force to replace it")


def _check_existing(output: Path, inputs: Sequence[tuple[Path, Identity]]) -> None:
    """Refuse to replace an input or what is no file, --force or not."""
    status = output.stat()
    for path, identity in inputs:
        if (status.st_dev, status.st_ino) == (identity.device, identity.inode):
            raise OutputError(
                f"{shown(output)}: is the checkpoint {shown(path)} itself; name another output"
            )
    if not output.is_file():
        raise OutputError(f"{shown(output)}: is not a regular file; name another output")


def check_room(output: Path, nbytes: int) -> None:
    """Refuse an output that the disk has no room for.

    Raises:
        OutputError: with both sizes.
    """
    space = os.statvfs(output.resolve().parent)
    free = space.f_bavail * space.f_frsize
    if nbytes > free:
        raise OutputError(
            f"{shown(output)}: needs {nbytes} bytes, but its disk has {free} free; make room or "
            "write elsewhere"
        )


@contextlib.contextmanager
def publish(output: Path, *, force: bool) -> Iterator[Path]:
    """Yield a hidden path beside ``output`` that takes its name when the block ends well.

    The file is synced, renamed, and its folder synced.  On any exception - an interrupt too - the
    hidden file is gone and what had the name before is untouched.  A link is followed, so that
    what it points to is replaced.

    Raises:
        OutputError: it cannot be written, or appeared meanwhile and ``force`` is not given.
    """
    final = output.resolve()
    hidden = final.parent / f".polyak-{os.getpid()}-{secrets.token_hex(4)}.partial"
    try:
        with open(hidden, "xb"):  # the user's umask gives its mode, as for any new file
            pass
        yield hidden
        _sync(hidden)
        if force:
            if final.exists():
                hidden.chmod(final.stat().st_mode & 0o7777)
            hidden.replace(final)
        else:
            _rename_new(hidden, final)
        _sync(final.parent)
    except OSError as error:
        raise OutputError(_unwritable(output, error)) from error
    finally:
        try:
            hidden.unlink(missing_ok=True)
        finally:  # an interrupt may fall into the line above; the next one is ignored by then
            hidden.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename_new(hidden: Path, final: Path) -> None:
    """Give the file its name, unless another has taken it since it was checked."""
    try:
        os.link(hidden, final)  # fails where the name exists; rename would replace
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if final.exists():
            raise FileExistsError(errno.EEXIST, "exists") from None
        hidden.replace(final)


def _unwritable(output: Path, error: OSError) -> str:
    name = shown(output)
    if error.errno == errno.EEXIST:
        return f"{name}: already exists; use --force to replace it"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{name}: no room to write it ({error.strerror}); make room or write elsewhere"
    return f"{name}: cannot be written: {error.strerror}"
