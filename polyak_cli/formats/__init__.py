"""HOW tensors are stored: scan checkpoints, and lay out an output like the newest of them.

The formats themselves are one module each; this one runs their jobs in children (`sandbox`).  The
one atomic writer is `publishing`.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from polyak_cli.errors import FormatError, MismatchError, PolyakError, shown
from polyak_cli.errors import OutputError as OutputError
from polyak_cli.formats.detection import detect
from polyak_cli.formats.format import Format, Layout, Scan
from polyak_cli.formats.wire import build_table
from polyak_cli.processes.sandbox import Alive
from polyak_cli.storage import (
    File,
    Version,
)
from polyak_cli.storage import publishing as publishing
from polyak_cli.tensors import COMMON as COMMON
from polyak_cli.tensors import Extent as Extent
from polyak_cli.tensors import Inline as Inline
from polyak_cli.tensors import LaidOut, Table
from polyak_cli.tensors import Storage as Storage
from polyak_cli.tensors import TensorSpec as TensorSpec

#: The module of a format that is called otherwise.
_HOMES = {
    "hdf5": "hdf5.keras_files",
    "keras_zip": "keras.archive",
    "weights_json": "keras.shards",
    "torch_zip": "torch.archive",
    "tf_bundle": "tensorflow.bundle",
}


def module(name: str) -> Format:
    """Return the module of a format, imported when it is first needed."""
    home = _HOMES.get(name, name)
    return cast(Format, importlib.import_module(f"polyak_cli.formats.{home}"))


def scan(paths: Sequence[Path], *, jobs: int = 1, everything: bool = False) -> list[Table]:
    """Return the table of tensors of each checkpoint, in order.

    A checkpoint that differs from the template in its tensors' values only shares its table.

    Args:
        paths: the checkpoints; the last one is the template, of which everything is listed.
        jobs: children that scan at a time.
        everything: list what is not the model's own of the other checkpoints too.

    Raises:
        FormatError: a file is foreign, damaged, hostile, or still being written.
        MismatchError: they are not of one format.
    """
    from polyak_cli.formats.same_skeleton import compare_skeletons

    if not paths:
        return []
    files = [File(str(path), _identity(path)) for path in paths]
    name = _common_format(paths)
    (template,) = _scanned(name, files[-1:], 1, everything=True)
    same = compare_skeletons(template, files[:-1])
    others = [file for file, equal in zip(files, same, strict=False) if not equal]
    scanned = iter(_scanned(name, others, jobs, everything=everything))
    older = [
        replace(template, path=Path(file.path), files=(file,)) if equal else next(scanned)
        for file, equal in zip(files, same, strict=False)
    ]
    return [*older, template]


def _common_format(paths: Sequence[Path]) -> str:
    """Return the format of all checkpoints, told by what they hold and not by their names."""
    name = detect(paths[-1])
    for path in paths[:-1]:
        other = detect(path)
        if other != name:
            raise MismatchError(
                f"{shown(path)}: is a {module(other).NAME} file, but {shown(paths[-1])} is "
                f"{module(name).NAME}; the checkpoints of one average must be of one format"
            )
    return name


def _scanned(name: str, files: Sequence[File], jobs: int, *, everything: bool) -> list[Table]:
    """Scan files in children; the first that cannot be read is raised."""
    from polyak_cli.processes import sandbox

    names = [file.path for file in files]
    requests = [Scan(path, everything) for path in names]
    children = max(1, min(jobs, len(files)))
    with contextlib.closing(
        sandbox.values(module(name).scan, requests, names, children)
    ) as scanned:
        return [build_table(name, file, found) for file, found in zip(files, scanned, strict=True)]


def _identity(path: Path) -> Version:
    try:
        return Version.of(path.stat())
    except OSError as error:
        raise PolyakError(f"{shown(path)}: cannot be read: {error.strerror}") from None


def descriptions(paths: Sequence[Path]) -> Iterator[tuple[str, str, str]]:
    """Yield model configuration, training configuration and Keras version of each file.

    They are the texts that Keras wrote; what a file lacks is ''.

    Raises:
        FormatError: a file is foreign, damaged, hostile, or still being written.
    """
    from polyak_cli.formats.hdf5 import keras_files
    from polyak_cli.processes import sandbox

    names = [str(path) for path in paths]
    yield from sandbox.values(keras_files.description, names, names)


def averages(paths: Sequence[Path], *, jobs: int = 1) -> Collection[Path]:
    """Return those of the files that this tool wrote."""
    from polyak_cli.processes import sandbox

    known = [(path, name) for path in paths if (name := _detected(path))]
    names = [str(path) for path, _ in known]
    requests = [(module(name), str(path)) for path, name in known]
    outcomes = sandbox.each(_is_average, requests, names, jobs)
    return {path for (path, _), ours in zip(known, outcomes, strict=True) if ours is True}


class Tried(NamedTuple):
    """A checkpoint that is whole."""

    files: tuple[File, ...]  # as they were before it was tried
    average: bool  # this tool wrote it


def tried(paths: Sequence[Path], *, jobs: int = 1) -> list[Tried | PolyakError]:
    """Try whether each file can be read as a checkpoint now, whatever the others are.

    Checksums are compared where a format has them; other values are not looked at.

    Returns:
        For each file what it consists of, or the error that says why not.
    """
    from polyak_cli.processes import sandbox

    # What cannot be read just now is left to hdf5, which says why.
    requests = [(module(_detected(path) or "hdf5"), str(path)) for path in paths]
    names = [str(path) for path in paths]
    return [
        outcome
        if isinstance(outcome, PolyakError)
        else Tried(
            tuple(File(path, Version(*identity)) for path, identity in outcome["files"]),
            outcome["average"],
        )
        for outcome in sandbox.each(_try, requests, names, max(1, min(jobs, len(paths))))
    ]


def _try(request: tuple[Format, str], alive: Alive) -> dict[str, Any]:
    form, path = request
    identity = _identity(Path(path))
    scanned = form.scan(Scan(path, everything=False), alive)
    if form.CHECKED:
        form.check(path, alive)
    return {
        "files": scanned.get("files") or [(path, identity)],
        "average": form.is_average(path, alive),
    }


def check(tables: Sequence[Table], *, jobs: int) -> None:
    """Compare the tensors of checkpoints with the checksums that their files hold, if they do.

    Raises:
        FormatError: one is wrong; names file and tensor.
    """
    from polyak_cli.processes import sandbox

    form = module(tables[-1].format)
    if form.CHECKED:
        names = [str(table.path) for table in tables]
        for _ in sandbox.values(form.check, names, names, min(jobs, len(names))):
            pass


def _detected(path: Path) -> str:
    """Return the format of a file, '' where it has none that is known here."""
    with contextlib.suppress(PolyakError):
        return detect(path)
    return ""


def _is_average(request: tuple[Format, str], alive: Alive) -> bool:
    form, path = request
    return form.is_average(path, alive)


class Room(NamedTuple):
    """An output that is written but for its averaged tensors."""

    files: Sequence[str]
    places: Mapping[str, LaidOut]  # location in the template -> where to write
    seal: Callable[[], None]  # to be called when they are written


def _lay_out(request: tuple[str, Layout], alive: Alive) -> dict[str, Any]:
    """Lay out, in a child, an output of its template's format or of another."""
    try:
        laid_out = _laid_out(*request, alive)
    except OSError as error:  # of the template's files it is told as of any that cannot be read
        if not error.errno or error.filename in {file.path for file in request[1].template.files}:
            raise
        return {"unwritable": [error.errno, error.strerror]}
    # Without the names, which the parent has already, and which are the larger part.
    places = laid_out["places"]
    return laid_out | {"places": [places.get(location) for location in request[1].averaged]}


def _laid_out(name: str, layout: Layout, alive: Alive) -> dict[str, Any]:
    if name == layout.template.format:
        return module(name).lay_out(layout, alive)
    from polyak_cli.formats import conversion

    source = cast(conversion.Source, module(layout.template.format))
    said = source.texts(layout.template, alive)
    return cast(conversion.Target, module(name)).convert(layout, said, alive)


def _seal(name: str, output: str, laid_out: Mapping[str, Any]) -> None:
    """Finish an output; what of it cannot be read again is its own trouble, as all else here."""
    try:
        module(name).seal(output, laid_out)
    except FormatError as error:
        raise OSError(errno.EIO, str(error)) from None


def lay_out(
    template: Table,
    output: Path,
    *,
    averaged: Mapping[str, str],
    drop_optimizer: bool,
    provenance: str,
    name: str = "",
) -> Room:
    """Write all of the output but its averaged tensors.

    Args:
        template: the checkpoint that it will be like.
        output: the file to write; overwritten.
        averaged: location in the template -> dtype to store.
        drop_optimizer: leave its state out.
        provenance: the record to write into it, as JSON.
        name: its format, see `target`; "" for the template's.

    Raises:
        FormatError: the template cannot be copied safely.
        OSError: it cannot be written; `publish` knows by what name to tell it.
    """
    from polyak_cli.processes import sandbox

    name = name or template.format
    request = Layout(template, str(output), averaged, drop_optimizer, provenance)
    (outcome,) = sandbox.each(_lay_out, [(name, request)], [str(template.path)])
    if isinstance(outcome, PolyakError):
        raise outcome
    if "unwritable" in outcome:
        raise OSError(*outcome["unwritable"])
    places = {
        location: LaidOut(place[0], sys.intern(place[1]), *place[2:])
        for location, place in zip(averaged, outcome["places"], strict=True)
        if place
    }
    outcome["places"] = places  # what came as JSON is not kept
    files = outcome.get("files", [str(output)])
    return Room(files, places, lambda: _seal(name, str(output), outcome))
