"""HOW tensors are stored: scan checkpoints, and lay out an output like the newest of them.

The formats themselves are one module each; this one runs their jobs in children (`sandbox`).  The
one atomic writer is `publishing`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from polyak_cli.errors import FormatError, MismatchError, OutputError, PolyakError, shown
from polyak_cli.formats import publishing
from polyak_cli.formats.detection import detect
from polyak_cli.tensors import (
    COMMON,
    Alive,
    Extent,
    File,
    Format,
    Identity,
    Inline,
    LaidOut,
    Layout,
    Scan,
    Storage,
    Table,
    TensorSpec,
)

#: The module of a format that is called otherwise.
_HOMES = {
    "hdf5": "hdf5.keras_files",
    "keras_zip": "keras.archive",
    "weights_json": "keras.shards",
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
    from polyak_cli.formats.twins import twins

    if not paths:
        return []
    files = [File(str(path), _identity(path)) for path in paths]
    name = _common_format(paths)
    (template,) = _scanned(name, files[-1:], 1, everything=True)
    same = twins(template, files[:-1])
    others = [file for file, twin in zip(files, same, strict=False) if not twin]
    scanned = iter(_scanned(name, others, jobs, everything=everything))
    older = [
        replace(template, path=Path(file.path), files=(file,)) if twin else next(scanned)
        for file, twin in zip(files, same, strict=False)
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
    from polyak_cli.formats import sandbox

    names = [file.path for file in files]
    requests = [Scan(path, everything) for path in names]
    children = max(1, min(jobs, len(files)))
    with contextlib.closing(
        sandbox.values(module(name).scan, requests, names, children)
    ) as scanned:
        return [_table(name, file, found) for file, found in zip(files, scanned, strict=True)]


def _identity(path: Path) -> Identity:
    try:
        return Identity.of(path.stat())
    except OSError as error:
        raise PolyakError(f"{shown(path)}: cannot be read: {error.strerror}") from None


def _table(name: str, file: File, scanned: Mapping[str, Any]) -> Table:
    """Build the table of tensors from what `Format.scan` sent as JSON."""
    tensors = {row[0]: _spec(*row) for row in scanned["tensors"]}
    if len(tensors) < len(scanned["tensors"]):
        raise FormatError(f"{shown(file.path)}: two of its tensors have the same name")
    files = [File(path, Identity(*identity)) for path, identity in scanned.get("files", ())]
    return Table(
        path=Path(file.path),
        format=name,
        files=tuple(files) or (file,),
        tensors=tensors,
        others={row[0]: _spec(*row) for row in scanned["others"]},
        optimizer=frozenset(scanned["optimizer"]),
        config=scanned["config"],
        average=scanned["average"],
        about=scanned.get("about", {}),
        order=tuple(scanned.get("order", ())),
        statistics=frozenset(scanned.get("statistics", ())),
        slots=scanned.get("slots", {}),
        suffixes=tuple(scanned.get("suffixes", ())),
        cautions=scanned.get("cautions", {}),
        fixed=scanned.get("fixed", False),
        tails=tuple(scanned.get("tails", ())),
    )


def _spec(
    name: str,
    shape: Sequence[int],
    dtype: str,
    byteorder: str,
    location: str,
    storage: Sequence[Any] | None,
    *rest: Any,
) -> TensorSpec:
    """Build one row of a table."""
    where = _storage(*storage) if storage else None
    # Shared by all that have the same: JSON has made a new text for each of 100,000.
    kind, extent = sys.intern(dtype), _shape(*shape)
    return TensorSpec(name, extent, kind, byteorder, location, where, *rest)


@functools.cache
def _shape(*shape: int) -> tuple[int, ...]:
    return shape


def _storage(kind: str, *row: Any) -> Storage:
    """Build what says where a tensor lies, from what came as JSON."""
    if kind == "extent":
        return Extent(*row)
    if kind == "inline":
        return Inline(bytes.fromhex(row[0]))
    if kind == "deflated":
        from polyak_cli.formats.zips import Deflated

        return Deflated(*row)
    from polyak_cli.formats.hdf5.chunks import Chunks

    shape, chunk_shape, itemsize, filters, index = row
    places = {tuple(position): (offset, size, skip) for position, offset, size, skip in index}
    return Chunks(tuple(shape), tuple(chunk_shape), itemsize, tuple(filters), places)


def descriptions(paths: Sequence[Path]) -> Iterator[tuple[str, str, str]]:
    """Yield model configuration, training configuration and Keras version of each file.

    They are the texts that Keras wrote; what a file lacks is ''.

    Raises:
        FormatError: a file is foreign, damaged, hostile, or still being written.
    """
    from polyak_cli.formats import sandbox
    from polyak_cli.formats.hdf5 import keras_files

    names = [str(path) for path in paths]
    yield from sandbox.values(keras_files.description, names, names)


def averages(paths: Sequence[Path], *, jobs: int = 1) -> Collection[Path]:
    """Return those of the files that this tool wrote."""
    from polyak_cli.formats import sandbox

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
    from polyak_cli.formats import sandbox

    # What cannot be read just now is left to hdf5, which says why.
    requests = [(module(_detected(path) or "hdf5"), str(path)) for path in paths]
    names = [str(path) for path in paths]
    return [
        outcome
        if isinstance(outcome, PolyakError)
        else Tried(
            tuple(File(path, Identity(*identity)) for path, identity in outcome["files"]),
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
    from polyak_cli.formats import sandbox

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


#: Suffix of an output -> the format to which checkpoints of others are converted.
_TARGETS = {".safetensors": "safetensors", ".npz": "npz"}


def target(output: Path | None, template: Table) -> str:
    """Return the format of an output: the template's, unless its suffix is that of another."""
    form = module(template.format)
    if output and not output.name.endswith(form.SUFFIXES) and hasattr(form, "texts"):
        return _TARGETS.get(output.suffix, template.format)
    return template.format


def is_folder(output: Path, template: Table) -> bool:
    """Tell whether an output is to be a folder: named without suffix, for several files."""
    folder = getattr(module(template.format), "FOLDER", False)
    return folder and len(template.files) > 1 and not output.suffix


def check_conversion(
    output: Path | None, template: Table, *, averaged: Mapping[str, str], drop_optimizer: bool
) -> None:
    """Refuse, before any work, an output whose format cannot hold what is to be in it.

    Args:
        output: the file or folder that will be written; None for one of the template's format.
        template: the checkpoint that it will be like.
        averaged: location in the template -> dtype to store.
        drop_optimizer: leave its state out.

    Raises:
        OutputError: what would be lost.
    """
    from polyak_cli.formats import sandbox

    name = target(output, template)
    for dtype in sorted({*averaged.values()} - getattr(module(name), "TYPES", COMMON)):
        raise OutputError(
            f"{shown(output or template.path)}: is {module(name).NAME}, which has no type {dtype}; "
            "choose another --dtype, or safetensors for the output"
        )
    if not output or (name == template.format and not _merges(output, template)):
        return
    request = Layout(template, "", averaged, drop_optimizer, "")
    (outcome,) = sandbox.each(_refuse, [(name, request)], [str(template.path)])
    if isinstance(outcome, OutputError):
        raise OutputError(f"{shown(output)}: {shown(template.path)} {outcome}")
    if isinstance(outcome, PolyakError):
        raise outcome


def _merges(output: Path, template: Table) -> bool:
    """Tell whether the shards of a folder, each with texts of its own, become one file."""
    folder = getattr(module(template.format), "FOLDER", False)
    return folder and len(template.files) > 1 and not is_folder(output, template)


def _refuse(request: tuple[str, Layout], alive: Alive) -> None:
    """Refuse, in a child, what cannot be converted or merged."""
    from polyak_cli.formats import conversion

    name, layout = request
    said = cast(conversion.Source, module(layout.template.format)).texts(layout.template, alive)
    if name != layout.template.format:
        conversion.refuse(layout)
        cast(conversion.Target, module(name)).refuse(layout, said)


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
    from polyak_cli.formats import sandbox

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


def check_output(
    output: Path, tables: Sequence[Table], *, force: bool, run: Sequence[Path] = ()
) -> None:
    """Refuse, before any work, an output that could not or must not be written.

    Args:
        output: the file or folder to write.
        tables: of the checkpoints, the template last.
        force: replace an older output.
        run: further checkpoints of the same run, which are not to be replaced either.

    Raises:
        OutputError: what is in the way, and what to do.
    """
    try:
        _check_place(output, tables, force=force)
        for path in run:
            if output.exists() and path.exists() and output.samefile(path):
                raise OutputError(
                    f"{shown(output)}: is a checkpoint of the run, if not one that is averaged; "
                    "name another output"
                )
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        reason = error.strerror if isinstance(error, OSError) else error
        raise OutputError(f"{shown(output)}: cannot be written: {shown(reason)}") from None


def _check_place(output: Path, tables: Sequence[Table], *, force: bool) -> None:
    name = shown(output)
    folder_wanted = is_folder(output, tables[-1])
    if output.is_dir() and not folder_wanted:
        raise OutputError(f"{name}: is a folder; name the file to write in it")
    named = target(output, tables[-1])
    form = module(named)
    suffixes = (named == tables[-1].format and tables[-1].suffixes) or form.SUFFIXES
    if not folder_wanted and not output.name.endswith(suffixes):
        raise OutputError(
            f"{name}: the checkpoints are {form.NAME}, which is opened only as "
            f"{' or '.join(suffixes)}; give the output that suffix{_otherwise(tables[-1])}"
        )
    _check_weights_suffix(output, tables[-1], suffixes)
    folder = output.resolve().parent
    if not folder.is_dir():
        raise OutputError(f"{name}: there is no folder {shown(folder)}; create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{name}: the folder {shown(folder)} is not writable")
    for further in _further(output, tables[-1]):
        if os.path.lexists(further) and not force:
            raise OutputError(f"{shown(further)}: already exists; use --force to replace it")
    if not os.path.lexists(output):
        return
    if folder_wanted and output.exists():
        inputs = [file for table in tables for file in table.files]
        publishing.check_folder(output, inputs, force=force)
        return
    if output.exists():
        _check_existing(output, tables)
    if not force:
        raise OutputError(f"{name}: already exists; use --force to replace it")


def _check_weights_suffix(output: Path, template: Table, suffixes: Sequence[str]) -> None:
    """Refuse what Keras would take for another layout by its name, unless it was called so."""
    weights = getattr(module(target(output, template)), "WEIGHTS_SUFFIX", None)
    if not weights or weights in suffixes or template.path.name.endswith(weights):
        return
    if output.name.endswith(weights):
        raise OutputError(
            f"{shown(output)}: {shown(template.path)} is of Keras's older layout, which "
            f"load_weights() refuses in a file called {weights}; call the output "
            f"{' or '.join(suffixes)}"
        )


def _further(output: Path, template: Table) -> list[Path]:
    """Return the files that an output consists of besides the one that is named.

    Raises:
        OutputError: the name is a link, beside whose target they would not be found.
    """
    further = [publishing.beside(output, tail) for tail in template.tails]
    if further and output.is_symlink():
        raise OutputError(
            f"{shown(output)}: is a link, and the output has several files; name the place itself"
        )
    return further


def _otherwise(template: Table) -> str:
    """Say what else an output may be called."""
    form = module(template.format)
    shards = ", or none for a folder of as many files" if is_folder(Path("x"), template) else ""
    others = [end for end in _TARGETS if end not in form.SUFFIXES] if hasattr(form, "texts") else []
    return shards + (f", or {' or '.join(others)} to convert it" if others else "")


def _check_existing(output: Path, tables: Sequence[Table]) -> None:
    """Refuse to replace an input or what is no file, --force or not."""
    status = output.stat()
    for path, identity in (file for table in tables for file in table.files):
        if (status.st_dev, status.st_ino) == (identity.device, identity.inode):
            raise OutputError(
                f"{shown(output)}: is the checkpoint {shown(path)} itself; name another output"
            )
    if not output.is_file():
        raise OutputError(f"{shown(output)}: is not a regular file; name another output")
