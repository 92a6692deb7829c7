"""How tensors are stored: scan checkpoints, and write outputs like the newest of them.

Each format is one class in a module of its own; `catalogue.FORMATS` lists them.  This module runs
their work in children (`processes.sandbox`), because a hostile file may crash, hang or bloat what
reads it.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from polyak_cli.errors import FormatError, MismatchError, PolyakError, StoreError, UsageError, shown
from polyak_cli.formats import wire
from polyak_cli.formats.catalogue import detect, find_format
from polyak_cli.formats.format import Draft, Format, OutputForm, ScanRequest, SkeletonRequest
from polyak_cli.processes import sandbox
from polyak_cli.processes.sandbox import Heartbeat
from polyak_cli.storage import File, Version, mirrors, read_version
from polyak_cli.storage.local import LocalOutput
from polyak_cli.tensors import Checksum, Placement, Table

#: Bytes from which on a checksum is compared while they are folded, if they come over a network.
_LATER = 1 << 16

# --- reading --------------------------------------------------------------------------------------


def scan(
    paths: Sequence[Path], *, jobs: int = 1, with_optimizer: bool = False, key: str = ""
) -> list[Table]:
    """Return the table of tensors of each checkpoint, in order.

    A checkpoint that differs from the template in its tensors' values only shares its table.

    Args:
        paths: the checkpoints; the last one is the template, and everything in it is listed.
        jobs: children that scan at a time.
        with_optimizer: list what is not the model's own of the other checkpoints too.
        key: of the part of each checkpoint that is taken for the model; "" leaves it to the format.

    Raises:
        UsageError: a key is given, and checkpoints of this format have no parts.
        FormatError: a file is foreign, damaged, hostile, or still being written.
        MismatchError: they are not of one format.
    """
    from polyak_cli.formats.same_skeleton import compare_skeletons

    if not paths:
        return []
    files = [File(str(path), _read_version(path)) for path in paths]
    mirrors.expect_alike(file.path for file in files)
    form = _find_common_format(paths)
    if find_format(form).is_scattered:
        mirrors.fetch_all([file.path for file in files], most=mirrors.WHOLE)
    if key and not find_format(form).has_parts:
        what_to_do = "choose tensors with --include-tensors"
        if find_format(form).carries_all:
            what_to_do = (
                "leave --key out: the model is averaged anyway, and -o NAME.safetensors or "
                "--only-weights writes it alone"
            )
        raise UsageError(
            f"--key {shown(key)}: {shown(paths[-1])} is a {find_format(form).name} file, which has "
            f"no parts to choose from; {what_to_do}"
        )
    (template,) = _scan_all(form, files[-1:], 1, True, key)
    same = compare_skeletons(template, files[:-1])
    others = [file for file, is_same in zip(files, same, strict=False) if not is_same]
    scanned = iter(_scan_all(form, others, jobs, with_optimizer, key))
    older = [
        replace(template, path=Path(file.path), files=(file,)) if is_same else next(scanned)
        for file, is_same in zip(files, same, strict=False)
    ]
    return [*older, template]


def _find_common_format(paths: Sequence[Path]) -> str:
    """Return the format of all checkpoints, recognised by content and not by their names."""
    key = detect(paths[-1])
    for path in paths[:-1]:
        other = detect(path)
        if other != key:
            raise MismatchError(
                f"{shown(path)}: is a {find_format(other).name} file, but {shown(paths[-1])} is "
                f"{find_format(key).name}; all checkpoints of an average must have the same format"
            )
    return key


def _scan_all(
    name: str, files: Sequence[File], jobs: int, with_optimizer: bool, key: str
) -> list[Table]:
    """Scan files in children; the first error is raised."""
    names = [file.path for file in files]
    # The format is imported here, once, and not in each child.
    form = find_format(name)
    requests = [(form, ScanRequest(path, with_optimizer, key)) for path in names]
    children = max(1, min(jobs, len(files)))
    with contextlib.closing(sandbox.run_all(_scan_one, requests, names, children)) as scanned:
        return [wire.unpack_table(found, name, f) for f, found in zip(files, scanned, strict=True)]


def _scan_one(request: tuple[Format, ScanRequest], heartbeat: Heartbeat) -> dict[str, Any]:
    """Scan a checkpoint, in a child."""
    form, scan_request = request
    return wire.pack_table(form.scan(scan_request, heartbeat))


def _read_version(path: Path) -> Version:
    try:
        return read_version(path)
    except OSError as error:
        raise PolyakError(f"{shown(path)}: cannot be read: {error.strerror}") from None


def read_descriptions(paths: Sequence[Path]) -> Iterator[tuple[str, str, str]]:
    """Yield model configuration, training configuration and Keras version of each `.h5` file.

    They are the texts that Keras wrote; what a file lacks is ''.

    Raises:
        FormatError: a file is foreign, damaged, hostile, or still being written.
    """
    from polyak_cli.formats.hdf5 import keras_files

    names = [str(path) for path in paths]
    yield from sandbox.run_all(keras_files.read_description, names, names)


def list_views(table: Table) -> list[list[Any]]:
    """Return how the tensors of one PyTorch file lie in their storages; see `archive.list_views`.

    Raises:
        FormatError: the file is damaged or hostile.
    """
    from polyak_cli.formats.torch import archive

    path = table.files[0].path
    request = (path, table.rules.part)
    (found,) = sandbox.run_all(archive.list_views, [request], [path])
    return [*found]


def find_polyak_outputs(paths: Sequence[Path], *, jobs: int = 1) -> Collection[Path]:
    """Return those of the files that this tool wrote."""
    mirrors.expect_alike(map(str, paths))
    with mirrors.reading_heads():
        known = [(path, key) for path in paths if (key := _detect_or_none(path))]
        names = [str(path) for path, _ in known]
        requests = [(find_format(key), str(path)) for path, key in known]
        outcomes = [*sandbox.run_each(_is_polyak_output, requests, names, jobs)]
    return {path for (path, _), ours in zip(known, outcomes, strict=True) if ours is True}


def _is_polyak_output(request: tuple[Format, str], heartbeat: Heartbeat) -> bool:
    form, path = request
    return form.is_polyak_output(path, heartbeat)


def read_metrics(paths: Sequence[Path]) -> list[tuple[str, float] | None]:
    """Return the metric that each checkpoint keeps of itself; see `Format.read_metric`.

    Raises:
        FormatError: a checkpoint is foreign, damaged or hostile.
    """
    names = [str(path) for path in paths]
    requests = [(find_format(detect(path)), str(path)) for path in paths]
    found = sandbox.run_all(_read_metric, requests, names)
    return [(str(one[0]), float(one[1])) if one else None for one in found]


def _read_metric(request: tuple[Format, str], heartbeat: Heartbeat) -> tuple[str, float] | None:
    form, path = request
    return form.read_metric(path, heartbeat)


def read_numbers(paths: Sequence[Path], key: str) -> list[float | None]:
    """Return a number that each checkpoint keeps beside its tensors; see `Format.read_number`.

    Raises:
        FormatError: a checkpoint is foreign, damaged or hostile.
    """
    names = [str(path) for path in paths]
    requests = [(find_format(detect(path)), str(path), key) for path in paths]
    return [*sandbox.run_all(_read_number, requests, names)]


def _read_number(request: tuple[Format, str, str], heartbeat: Heartbeat) -> float | None:
    form, path, key = request
    return form.read_number(path, key, heartbeat)


class Probed(NamedTuple):
    """A checkpoint that is whole."""

    files: tuple[File, ...]  # as they were before it was probed
    is_polyak_output: bool  # this tool wrote it


def probe(paths: Sequence[Path], *, jobs: int = 1, key: str = "") -> list[Probed | PolyakError]:
    """Try whether each file can be read as a checkpoint now, whatever the others are.

    Checksums are compared where a format has them; other values are not looked at.

    Args:
        paths: the files.
        jobs: how many are tried at a time.
        key: of the part of each checkpoint that is taken for the model.

    Returns:
        For each file what it consists of, or the error that says why not.

    Raises:
        StoreError: of the first file that its store does not give.
    """
    mirrors.expect_alike(map(str, paths))
    errors: dict[int, PolyakError] = {}
    requests: dict[int, tuple[Format, ScanRequest]] = {}
    for number, path in enumerate(paths):
        try:
            request = ScanRequest(str(path), with_optimizer=False, key=key)
            requests[number] = find_format(detect(path)), request
        except StoreError:
            raise
        except PolyakError as error:
            errors[number] = error
    names = [request.path for form, request in requests.values() if form.is_scattered]
    with contextlib.suppress(PolyakError):  # which the child meets again, and of which file
        mirrors.fetch_all(names, most=mirrors.WHOLE)
    outcomes = [
        *sandbox.run_each(
            _probe_one,
            [*requests.values()],
            [request.path for _, request in requests.values()],
            max(1, min(jobs, len(requests))),
        )
    ]
    for outcome in outcomes:
        if isinstance(outcome, StoreError):
            raise outcome
    found = dict(zip(requests, outcomes, strict=True)) | errors
    return [
        outcome
        if isinstance(outcome, PolyakError)
        else Probed(wire.unpack_files(outcome["files"]), outcome["is_polyak_output"])
        for outcome in (found[number] for number in range(len(paths)))
    ]


def _probe_one(wanted: tuple[Format, ScanRequest], heartbeat: Heartbeat) -> dict[str, Any]:
    """Probe a checkpoint, in a child."""
    form, request = wanted
    path = request.path
    version = _read_version(Path(path))
    table = form.scan(request, heartbeat)
    if form.has_checksums:
        form.check(path, heartbeat)
    return {
        "files": table.files or [(path, version)],
        "is_polyak_output": form.is_polyak_output(path, heartbeat),
    }


def check(tables: Sequence[Table], *, jobs: int, later: bool = False) -> list[Checksum]:
    """Compare the tensors of checkpoints with the checksums that their files hold, if they do.

    Args:
        tables: the checkpoints.
        jobs: how many are read at a time.
        later: return checksums of values that come over a network and are not kept, instead of
            fetching these: the caller compares them.

    Raises:
        FormatError: one is wrong; names file and tensor.
    """
    form = find_format(tables[-1].format)
    if not form.has_checksums:
        return []

    def check_one(table: Table, heartbeat: Heartbeat) -> list[Checksum]:
        is_kept = not any(_is_fetched_twice(file, form) for file in table.files)
        return form.check(str(table.path), heartbeat, _LATER if later and not is_kept else None)

    names = [str(table.path) for table in tables]
    found = sandbox.run_all(check_one, tables, names, min(jobs, len(names)))
    return [Checksum(*one) for left in found for one in left]


def _is_fetched_twice(file: File, form: Format) -> bool:
    """Return whether what is read of a file is fetched again with the next reading."""
    return file.version.is_object and (not form.is_scattered or file.version.size > mirrors.WHOLE)


def _detect_or_none(path: Path) -> str:
    """Return the format of a file, '' where it has none that is known here."""
    with contextlib.suppress(PolyakError):
        return detect(path)
    return ""


# --- writing --------------------------------------------------------------------------------------


class Skeleton(NamedTuple):
    """An output that is complete except for its averaged tensors."""

    files: Sequence[str]
    placements: Mapping[str, Placement]  # location in the template -> where to write
    finalize: Callable[[], None]  # to be called when they are written


def has_late_checksums(key: str) -> bool:
    """Return whether an output of a format is finished only when its tensors are written.

    Args:
        key: of the format.
    """
    return type(find_format(key)).finalize is not Format.finalize


def write_skeleton(
    template: Table,
    output: Path,
    *,
    averaged: Mapping[str, str],
    drop_optimizer: bool,
    provenance: str,
    form: OutputForm = OutputForm(),  # noqa: B008 - immutable
) -> Skeleton:
    """Write all of an output except its averaged tensors.

    Args:
        template: the checkpoint that it will be like.
        output: the file to write; overwritten.
        averaged: location in the template -> dtype to store.
        drop_optimizer: leave its state out.
        provenance: the record to write into it, as JSON.
        form: of the output; by default the template's.

    Raises:
        FormatError: the template cannot be copied safely.
        OSError: it cannot be written; `publish` knows by what name to report it.
    """
    key = form.key or template.format
    if output.is_dir() and len(template.files) == 1:
        output /= find_format(key).name_outputs(template)[0]
        LocalOutput(str(output), create=True).close()
    whole = str(form.architecture.path) if form.architecture else ""
    request = SkeletonRequest(template, str(output), averaged, drop_optimizer, provenance, whole)
    find_format(key)  # imported here, and not in the child
    (outcome,) = sandbox.run_each(_write_one, [(key, form.extract, request)], [str(template.path)])
    if isinstance(outcome, PolyakError):
        raise outcome
    if "unwritable" in outcome:
        raise OSError(*outcome["unwritable"])
    try:
        files = wire.unpack_output_files(outcome["files"], str(output))
        placements = wire.unpack_placements(outcome["placements"], averaged, max(1, len(files)))
    except ValueError as error:
        raise FormatError(
            f"{shown(template.path)}: copying its structure gave an invalid result "
            f"({shown(error)}); the file is damaged or hostile"
        ) from None
    draft = Draft(placements, files, outcome["notes"])
    return Skeleton(files or [str(output)], placements, lambda: _finalize(key, str(output), draft))


def _write_one(request: tuple[str, bool, SkeletonRequest], heartbeat: Heartbeat) -> dict[str, Any]:
    """Write, in a child, a skeleton of its template's format or of another."""
    key, extract, wanted = request
    try:
        if extract:
            draft = find_format(wanted.template.format).extract(wanted, heartbeat)
        else:
            draft = _write_or_convert(key, wanted, heartbeat)
    except OSError as error:  # one of the template's files is reported as any unreadable file
        if not error.errno or error.filename in {file.path for file in wanted.template.files}:
            raise
        return {"unwritable": [error.errno, error.strerror]}
    return {
        "placements": wire.pack_placements(draft.placements, wanted.averaged),
        "files": list(draft.files),
        "notes": dict(draft.notes),
    }


def _write_or_convert(key: str, request: SkeletonRequest, heartbeat: Heartbeat) -> Draft:
    if key == request.template.format:
        return find_format(key).write_skeleton(request, heartbeat)
    texts = find_format(request.template.format).texts(request.template, heartbeat)
    return find_format(key).convert(request, texts, heartbeat)


def _finalize(key: str, output: str, draft: Draft) -> None:
    """Finish an output; if it cannot be read again, the output is at fault, not an input."""
    try:
        find_format(key).finalize(output, draft)
    except FormatError as error:
        raise OSError(errno.EIO, str(error)) from None
