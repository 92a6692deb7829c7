"""Checkpoints of several files, each of which is a checkpoint by itself: join, write, finish.

Knows neither which files there are nor how they store tensors: each has a format of its own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from polyak_cli.errors import FormatError, shown
from polyak_cli.formats.catalogue import detect, find_format
from polyak_cli.formats.conversion import require_same
from polyak_cli.formats.format import Draft, Format, ScanRequest, SkeletonRequest
from polyak_cli.processes.sandbox import Heartbeat
from polyak_cli.storage import File, open_input
from polyak_cli.storage.local import LocalOutput, copy_range, name_errors
from polyak_cli.tensors import (
    COMMON,
    FLOATS,
    Asset,
    Checksum,
    Extent,
    OutputRules,
    Placement,
    Table,
    TensorSpec,
)


class Part(NamedTuple):
    """One part of a checkpoint."""

    name: str  # of the file that opens it, relative to the checkpoint's folder, with "/"
    prefix: str  # of its tensors' names in the whole
    table: Table  # of it alone


class FormatOfParts(Format):
    """A file that names others, each a checkpoint by itself; the output is a folder of the same."""

    has_checksums = True
    can_be_folder = True
    dtypes = frozenset(FLOATS)
    #: Those that files of `torch.save` can have in place of one another; safetensors has all.
    retypes = COMMON

    @abstractmethod
    def scan_parts(self, request: ScanRequest, heartbeat: Heartbeat) -> list[Part]:
        """Read the headers of all parts; see `Format.scan`."""

    def scan(self, request: ScanRequest, heartbeat: Heartbeat) -> Table:
        """See `Format.scan`."""
        return _join_tables(self.key, request.path, self.scan_parts(request, heartbeat))

    def write_skeleton(self, request: SkeletonRequest, heartbeat: Heartbeat) -> Draft:
        """See `Format.write_skeleton`."""
        found = self.scan_parts(request_scan(request.template), heartbeat)
        _require_unchanged(found, request.template)
        draft = _write_parts(found, request, heartbeat)
        return draft._replace(files=[*draft.files, self.write_index(request, heartbeat)])

    def write_index(self, request: SkeletonRequest, heartbeat: Heartbeat) -> str:
        """Write the file that names the parts into an output folder, and return its path."""
        index = request.template.files[-1]
        copy = str(Path(request.output, Path(index.path).name))
        with (
            open_input(*index) as source,
            name_errors(index.path),
            LocalOutput(copy, create=True) as to,
        ):
            copy_range(source, 0, to, 0, source.size, heartbeat)
        return copy

    def finalize(self, output: str, draft: Draft) -> None:
        """See `Format.finalize`."""
        del output  # each part is a file of its own
        for first, key, notes in draft.notes["parts"]:
            find_format(key).finalize(draft.files[first], Draft({}, (), notes))

    def check(self, path: str, heartbeat: Heartbeat, later: int | None = None) -> list[Checksum]:
        """See `Format.check`."""
        left: list[Checksum] = []
        for part in self.scan_parts(ScanRequest(path, with_optimizer=False), heartbeat):
            form = find_format(part.table.format)
            if form.has_checksums:
                left += form.check(str(part.table.path), heartbeat, later)
        return left


def request_scan(table: Table) -> ScanRequest:
    """Return the scan by which a table was made that lists everything."""
    return ScanRequest(str(table.path), with_optimizer=True)


def scan_part(
    folder: Path, name: str, prefix: str, request: ScanRequest, heartbeat: Heartbeat
) -> Part:
    """Read the header of a part.

    Args:
        folder: of the whole checkpoint.
        name: of the file that opens the part, relative to the folder.
        prefix: of its tensors' names in the whole.
        request: the scan of the whole.
        heartbeat: as for `Format.scan`.

    Raises:
        FormatError: it is damaged, hostile, missing, or of a format that cannot be a part.
    """
    path = folder / name
    with open_input(path) as file:
        itself = File(str(path), file.version)
    form = find_format(detect(path))
    if not form.can_be_part:
        raise FormatError(f"{shown(path)}: is {form.name}; expected safetensors or PyTorch")
    table = form.scan(request._replace(path=str(path)), heartbeat)
    files = table.files or (itself,)
    return Part(name, prefix, replace(table, files=files, format=form.key))


def _join_tables(key: str, path: str, parts: Sequence[Part]) -> Table:
    """Return the parts' tables as one, with the file that names the parts as the last of its files.

    Raises:
        FormatError: two parts hold tensors of one name.
    """
    files: list[File] = []
    tensors: list[TensorSpec] = []
    others: list[TensorSpec] = []
    assets: dict[str, Asset] = {}
    for number, (_, prefix, table) in enumerate(parts):
        for found, specs in ((tensors, table.tensors), (others, table.others)):
            found += (_rename(spec, prefix, number, len(files)) for spec in specs.values())
        files += table.files
        assets |= {f"{prefix}{name}": asset for name, asset in table.assets.items()}
    ((often, times),) = Counter(s.name for s in tensors).most_common(1) or [("", 1)]
    if times > 1:
        raise FormatError(f"{shown(path)}: two of its files hold tensor '{shown(often)}'")
    with open_input(path) as file:
        files.append(File(path, file.version))
    return Table(
        path=Path(path),
        format=key,
        files=tuple(files),
        tensors={spec.name: spec for spec in tensors},
        others={spec.name: spec for spec in others},
        optimizer=frozenset(p.prefix + name for p in parts for name in p.table.optimizer),
        config="",
        is_polyak_output=any(part.table.is_polyak_output for part in parts),
        about=next((part.table.about for part in parts if part.table.about), {}),
        rules=OutputRules(is_fixed=any(part.table.rules.is_fixed for part in parts)),
        assets=assets,
    )


def _rename(spec: TensorSpec, prefix: str, number: int, first: int) -> TensorSpec:
    """Return a part's tensor as the whole has it; its files are numbered from ``first``."""
    storage = spec.storage
    if isinstance(storage, Extent):
        storage = storage._replace(file=first + storage.file)
    elif storage is not None:
        raise TypeError(f"a part's tensor lies in {type(storage).__name__}")
    return replace(
        spec, name=prefix + spec.name, location=f"{number}/{spec.location}", storage=storage
    )


def _require_unchanged(parts: Sequence[Part], template: Table) -> None:
    """Refuse parts that are no more those that were scanned."""
    found = [file for part in parts for file in part.table.files]
    for (path, version), scanned in zip(found, template.files[:-1], strict=False):
        require_same(path, version, scanned.version)


def _write_parts(parts: Sequence[Part], request: SkeletonRequest, heartbeat: Heartbeat) -> Draft:
    """Write the parts into an output folder.

    Raises:
        FormatError: a part cannot be copied safely.
        OSError: the output cannot be written.
    """
    placements: dict[str, Placement] = {}
    files: list[str] = []
    notes: list[list[Any]] = []
    for number, part in enumerate(parts):
        draft = _write_part(part, number, request, heartbeat)
        placements |= {
            f"{number}/{location}": place._replace(file=len(files) + place.file)
            for location, place in draft.placements.items()
        }
        notes.append([len(files), part.table.format, dict(draft.notes)])
        files += draft.files
    return Draft(placements, files, {"parts": notes})


def _write_part(part: Part, number: int, request: SkeletonRequest, heartbeat: Heartbeat) -> Draft:
    """Write one part at its place in the output folder."""
    table = part.table
    target = Path(request.output, part.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    is_single = len(table.files) == 1
    if is_single:
        LocalOutput(str(target), create=True).close()
    wanted = request.averaged
    own = {
        spec.location: wanted[f"{number}/{spec.location}"]
        for spec in table.tensors.values()
        if f"{number}/{spec.location}" in wanted
    }
    output = str(target if is_single else target.parent)
    draft = find_format(table.format).write_skeleton(
        request._replace(template=table, output=output, averaged=own), heartbeat
    )
    return draft._replace(files=draft.files or [output])
