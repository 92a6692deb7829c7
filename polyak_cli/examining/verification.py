"""THE TOOL of `polyak verify`: is an average what its record says, bit for bit?

Finds the checkpoints that the record names, averages them once more, and compares all files byte
by byte.  What differs is named; which of the inputs is to blame is told as far as it can be.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from polyak_cli import __version__, averaging, engine, formats, recalibration, records
from polyak_cli.averaging import Plan
from polyak_cli.checkpoints import Checkpoint, Selection, file_of, with_numbers
from polyak_cli.errors import (
    CheckpointError,
    FormatError,
    MismatchError,
    PolyakError,
    UsageError,
    shown,
)
from polyak_cli.examining import bitwise
from polyak_cli.examining.bitwise import Deviation, Unlike
from polyak_cli.formats import publishing
from polyak_cli.matching import files_of, sources_of
from polyak_cli.records import Record
from polyak_cli.tensors import Bytes, Float64, Table, itemsize, narrow

_StrPath = str | os.PathLike[str]

#: Files of a folder that are tried in place of an input that is missing.
_TRIED = 24
#: Elements by which it is tried who could be exchanged or renamed.
_SAMPLE = 1 << 12
#: Inputs of which each pair is tried.
_PAIRED = 40


class Discrepancy(NamedTuple):
    """Why an average does not verify."""

    kind: Literal["file", "record", "input", "tensor", "metadata"]
    name: str  # of the input or tensor; of the output's file otherwise
    text: str  # in words, the name included


@dataclass(frozen=True, slots=True)
class Verification:
    """What came of verifying an average.

    Attributes:
        output: the average, as the user named it.
        inputs: name and place of each checkpoint it was made of, oldest first; None where it was
            not found.
        problems: why it does not verify; none where it does.
        nbytes: how many bytes were compared.
        unverified: tensors that cannot be recomputed: BatchNorm's statistics, gathered anew.
        notes: what the user should know, a line each.
    """

    output: Path
    inputs: tuple[tuple[str, Path | None], ...] = ()
    problems: tuple[Discrepancy, ...] = ()
    nbytes: int = 0
    unverified: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def verified(self) -> bool:
        """Whether the average is what its record says, bit for bit."""
        return not self.problems

    def data(self) -> dict[str, Any]:
        """Return it as what JSON can hold."""
        return {
            "output": str(self.output),
            "verified": self.verified,
            "problems": [problem._asdict() for problem in self.problems],
            "inputs": [
                {"name": name, "path": str(path) if path else None} for name, path in self.inputs
            ],
            "bytes": self.nbytes,
            "unverified": list(self.unverified),
            "notes": list(self.notes),
        }


def verify(
    output: _StrPath,
    *,
    sources: Sequence[_StrPath] = (),
    max_memory: int | None = None,
    jobs: int | None = None,
) -> Verification:
    """Recompute an average from the record in it, and compare it bit for bit.

    The record is no signature: who can write both the file and its record can make them agree.

    Args:
        output: the average: a file, or a folder that is one.
        sources: folders in which the checkpoints are looked for, before the one that holds the
            average; without them, the folders in that one are looked into too.
        max_memory: bytes for buffers; `averaging.MAX_MEMORY`.
        jobs: processes; as many as there are processors, at most 8.

    Raises:
        UsageError: a source is no folder, or a number is out of range.
        FormatError: there is no such file, or it is not one that holds a record.
        CheckpointError: the folder holds several that it could be, or it is no average.
        OutputError: there is no room for a copy to compare with.
    """
    machine: averaging.Options = {"max_memory": max_memory, "jobs": jobs}
    averaging.check_options(machine)
    path = _opened(Path(output))
    for folder in map(Path, sources):
        if not os.path.isdir(folder):  # noqa: PTH112 - Path's raises where one may not look
            raise UsageError(f"--source {shown(folder)}: is no folder; name one with checkpoints")
    try:
        (table,) = formats.scan([path])
    except FormatError as error:
        return Verification(Path(output), problems=(Discrepancy("file", path.name, str(error)),))
    if "provenance" not in table.about and not table.average:
        raise FormatError(
            f"{shown(output)}: holds no record of where it comes from; only averages that polyak "
            "wrote can be verified"
        )
    try:
        record = records.read(table.about.get("provenance", ""))
    except FormatError as error:
        text = f"{shown(output)}: {error}"
        return Verification(Path(output), problems=(Discrepancy("record", path.name, text),))
    except CheckpointError as error:
        raise CheckpointError(f"{shown(output)}: {error}; there is nothing to recompute") from None
    folders = [*map(Path, sources), _beside(table)]
    around, notes = ([], []) if sources else _around(record, table)
    return _Examination(
        Path(output), table, record, [*folders, *around], machine, notes=notes
    ).result()


def _opened(path: Path) -> Path:
    """Return the file that opens an average; TensorFlow's may be named by what its files have."""
    found = file_of(path)
    if not found.exists():
        index = path.with_name(f"{path.name}.index")
        found = index if index.is_file() else found
    try:
        os.close(os.open(found, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        raise FormatError(f"{shown(path)}: cannot be read: {error.strerror}") from None
    if not found.is_file():
        raise FormatError(f"{shown(path)}: is neither a file nor a folder that is one checkpoint")
    return found


def _is_folder(table: Table) -> bool:
    """Tell whether an average is a folder, and not files whose names begin alike."""
    return getattr(formats.module(table.format), "FOLDER", False) and len(table.files) > 1


def _beside(table: Table) -> Path:
    """Return the folder that holds an average."""
    return table.path.parent.parent if _is_folder(table) else table.path.parent


# --- where the inputs are -------------------------------------------------------------------------


@dataclass(slots=True)
class _Place:
    """One input, and where it was found."""

    recorded: records.Input
    path: Path | None = None

    def problem(self, text: str) -> Discrepancy:
        """Say what is wrong with it."""
        return Discrepancy("input", self.recorded.name, f"'{shown(self.recorded.name, 80)}' {text}")


def _located(record: Record, folders: Sequence[Path], own: Table) -> list[_Place]:
    """Look for every input by its name, in this order of the folders."""
    places: list[_Place] = []
    for one in record.inputs:
        taken = {place.path for place in places}
        paths = [path for path in _called(one.name, folders, own) if path not in taken]
        # Where several folders have the name, that is it which is as the record says.
        fitting = [path for path in paths if len(paths) > 1 and _fits(path, one)]
        places.append(_Place(one, next(iter([*fitting, *paths]), None)))
    return places


def _called(name: str, folders: Sequence[Path], own: Table) -> Iterator[Path]:
    """Yield what has a name in the folders, or is such a folder itself, but for the average."""
    for folder in folders:
        within = folder / name
        if os.path.exists(within):  # noqa: PTH110 - as above
            if not _is_part(within, own):
                yield within
        elif folder.name == name and file_of(folder) != folder:
            yield folder


def _around(record: Record, own: Table) -> tuple[list[Path], list[str]]:
    """Return the folders beside the average to look into too, and what is to be noted.

    Of several that hold files of such names, digests tell which is meant.
    """
    names = [one.name for one in record.inputs]
    beside = _beside(own)
    if all(any(_called(name, [beside], own)) for name in names):
        return [], []
    found = _holding(names, beside, own)
    if len(found) < 2 or all(one.sha256 for one in record.inputs):
        return found, []
    several = " and ".join(shown(folder) for folder in found[:2])
    return [], [f"{several} hold files of such names: choose one with --source"]


def _holding(names: Sequence[str], place: Path, own: Table) -> list[Path]:
    """Return the folders in a place that hold anything of these names."""
    with contextlib.suppress(OSError), os.scandir(place) as entries:
        folders = sorted(
            place / entry.name
            for entry in entries
            if not entry.name.startswith(".") and entry.is_dir()
        )
        return [one for one in folders if any(any(_called(name, [one], own)) for name in names)]
    return []


def _is_part(path: Path, own: Table) -> bool:
    """Tell whether a file is one of the average's."""
    status = file_of(path).stat()
    return any(
        (status.st_dev, status.st_ino) == (identity.device, identity.inode)
        for _, identity in own.files
    )


def _fits(path: Path, recorded: records.Input) -> bool:
    """Tell whether a single file is as recorded; of what has several files, nothing is told."""
    if not path.is_file() or path.stat().st_size != recorded.size:
        return False
    return not recorded.sha256 or (averaging.sha256(path),) == recorded.sha256


def _of_the_size(places: Sequence[_Place], folders: Sequence[Path], own: Table) -> list[Path]:
    """Return files of other names that could be the inputs which are missing, by name."""
    named = {place.recorded.name for place in places}
    sizes = {place.recorded.size for place in places if place.path is None}
    found = set()
    for folder in folders:
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            found |= {
                folder / entry.name
                for entry in entries
                if entry.name not in named
                and not entry.name.startswith(".")
                and entry.is_file()
                and entry.stat().st_size in sizes
            }
    others = (path for path in found if not _is_part(path, own))
    return sorted(others, key=with_numbers)[:_TRIED]


# --- the examination ------------------------------------------------------------------------------


@dataclass(slots=True)
class _Examination:
    """An average whose record could be read."""

    output: Path
    table: Table
    record: Record
    folders: Sequence[Path]
    machine: averaging.Options
    places: list[_Place] = field(default_factory=list)
    problems: list[Discrepancy] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def result(self) -> Verification:
        """Look at all of it."""
        if not self.record.is_sealed:
            self.notes.append(
                f"its record, by polyak {shown(self.record.version, 40)}, has no digest of itself: "
                "what was changed in the record alone may go unnoticed"
            )
        self.places = _located(self.record, self.folders, self.table)
        self._replace_missing()
        try:
            gathered = self._gathered()
            plan = self._plan([place.path for place in self.places])
            if plan:
                self._compare_inputs(plan)
                self._compare(plan)
        except (FormatError, MismatchError, CheckpointError) as error:
            gathered = ()
            self._cannot(error)
        engine.unchanged(self.table.files)
        return Verification(
            output=self.output,
            inputs=tuple((place.recorded.name, place.path) for place in self.places),
            problems=tuple(self.problems),
            nbytes=self.table.size,
            unverified=gathered,
            notes=tuple(self.notes),
        )

    def _plan(self, paths: Sequence[Path | None]) -> Plan | None:
        """Return the plan by which the average was made, None where a checkpoint is missing.

        Raises:
            PolyakError: the checkpoints are not ones that could be averaged so.
        """
        found = [path for path in paths if path]
        if len(found) < len(paths):
            return None
        given = zip(found, self.record.inputs, strict=True)
        chosen = tuple(Checkpoint(path, one.epoch, None) for path, one in given)
        positions = tuple(float(k) for k in range(1, len(found) + 1))
        # The type is not the checkpoints' concern, and neither is that of the output.
        options: Any = {**self.record.options, **self.machine}
        try:
            plan = averaging.plan(Selection(chosen, (), (), positions), **options | {"dtype": None})
            averaging.check_options(options)
        except UsageError as error:
            raise FormatError(f"its record has options that are refused: {error}") from None
        converted = self.table.format != plan.tables[-1].format
        return replace(
            plan,
            output=Path(f"x.{self.table.format}") if converted else None,
            coefficients=tuple(one.coefficient for one in self.record.inputs),
            options=options,
        )

    def _cannot(self, error: PolyakError) -> None:
        """Say why nothing can be recomputed, and which input is to blame."""
        tried = [place for place in self.places if place.path]
        files = [file_of(place.path) for place in tried if place.path]
        for place, outcome in zip(tried, formats.tried(files), strict=True):
            if isinstance(outcome, PolyakError):
                self.problems.append(place.problem(f"cannot be averaged: {outcome}"))
        if not self.problems:
            text = f"the average cannot be recomputed: {error}"
            self.problems.append(Discrepancy("file", self.table.path.name, text))

    # --- inputs -----------------------------------------------------------------------------------

    def _replace_missing(self) -> None:
        """Name the inputs that are missing, and what was found in their places."""
        missing = [place for place in self.places if place.path is None]
        if not missing:
            return
        candidates = _of_the_size(self.places, self.folders, self.table)
        if all(place.recorded.sha256 for place in missing):
            held: dict[tuple[str, ...], Path] = {}
            held.update(((averaging.sha256(path),), path) for path in candidates)
            for place in missing:
                place.path = held.get(place.recorded.sha256)
        else:
            for paths in itertools.islice(itertools.permutations(candidates, len(missing)), _TRIED):
                if self._stand_for(missing, paths):
                    for place, path in zip(missing, paths, strict=True):
                        place.path = path
                    break
        where = " or ".join(dict.fromkeys(shown(folder) for folder in self.folders))
        for place in missing:
            text = f"is missing: nothing in {where} has that name; name its folder with --source"
            if place.path:
                text = f"is missing, and {shown(place.path)} has what was averaged: it was renamed"
            self.problems.append(place.problem(text))

    def _stand_for(self, missing: Sequence[_Place], paths: Sequence[Path]) -> bool:
        """Tell whether files of other names give the average in place of those missing."""
        pairs = zip(paths, missing, strict=True)
        if not all(path.stat().st_size == place.recorded.size for path, place in pairs):
            return False
        named = iter(paths)
        with contextlib.suppress(PolyakError):
            plan = self._plan([place.path or next(named) for place in self.places])
            if plan:
                largest = max(plan.averaged_rows, key=lambda row: row[-1].size)[-1]
                return _Sample.of(plan, self.table, largest.name, 0).holds()
        return False

    def _compare_inputs(self, plan: Plan) -> None:
        """Compare sizes, and digests where they are recorded."""
        for place, table in zip(self.places, plan.tables, strict=True):
            recorded = place.recorded
            if table.size != recorded.size:
                text = f"has {table.size} bytes, but had {recorded.size} when it was averaged"
                self.problems.append(place.problem(text))
            elif recorded.sha256:
                digests = averaging.digests(table)
                if digests != recorded.sha256:
                    self.problems.append(place.problem(self._held_by(digests)))

    def _held_by(self, digests: tuple[str, ...]) -> str:
        """Say what an input holds that is not what it held."""
        for one in self.record.inputs:
            if one.sha256 == digests:
                return f"holds what '{shown(one.name, 80)}' held: files were exchanged"
        return "was changed: its SHA-256 is not the one recorded"

    # --- the output -------------------------------------------------------------------------------

    def _gathered(self) -> tuple[str, ...]:
        """Compare statistics that cannot be recomputed with their digests; return their names."""
        if not self.record.recalibrated:
            return ()
        values = recalibration.statistics_of(self.table)
        what = f"{len(values)} BatchNorm statistics were gathered anew over rows of data"
        if self.record.statistics is None:
            self.notes.append(f"{what}, and no digest of them was recorded: they are not verified")
            return tuple(values)
        self.notes.append(f"{what}: they are not recomputed, but compared with recorded digests")
        digests = recalibration.digests(self.table, values)
        for name, digest in digests.items():
            if digest != self.record.statistics[name]:
                text = f"tensor '{shown(name)}' is not what was gathered: its SHA-256 is another"
                self.problems.append(Discrepancy("tensor", name, text))
        return tuple(values)

    def _compare(self, plan: Plan) -> None:
        """Average once more and compare; say what differs and who is to blame."""
        deviation = self._deviation(plan)
        if not deviation:
            return
        blamed = any(problem.kind == "input" for problem in self.problems)
        self.problems += [Discrepancy("tensor", one.name, str(one)) for one in deviation.tensors]
        name = self.table.path.name
        self.problems += [Discrepancy("metadata", name, text) for text in deviation.outside]
        if deviation.outside and not deviation.tensors and self.record.version != __version__:
            self.notes.append(
                f"every tensor is equal bit for bit; the file was written by polyak "
                f"{shown(self.record.version, 40)}, and this is {__version__}, which may lay out "
                "what is outside of them in another way"
            )
        if not blamed:
            self._blame(plan, deviation.tensors)

    def _deviation(self, plan: Plan) -> Deviation:
        """Average once more and compare with what is there."""
        path = self.table.path
        opened = Path("copy", path.name) if _is_folder(self.table) else Path(path.name)
        near = [_beside(self.table), Path(tempfile.gettempdir())]
        nbytes = self.table.size * (1 + self.record.recalibrated)
        with publishing.scratch(near, nbytes) as folder:
            expected = averaging.again(plan, folder, opened, self.record.text)
            if self.record.recalibrated:
                expected = recalibration.restored(expected, self.table)
            found = [path.with_name(Path(file.path).name) for file in expected.files]
            if not _laid_out_alike(self.table, expected):
                return _by_tensors(self.table, expected)
            deviation = bitwise.compare(found, expected)
        if deviation.outside and self.table.config != expected.config:
            more = (*deviation.outside, "the configuration of the model is not that of the newest")
            return deviation._replace(outside=more)
        return deviation

    def _blame(self, plan: Plan, unlike: Sequence[Unlike]) -> None:
        """Say which input it may be that was changed, or that it was the output."""
        if all(one.sha256 for one in self.record.inputs):
            self.notes.append("every input has the SHA-256 recorded: the average was changed")
            return
        averaged = {*plan.averaged} & {one.name for one in unlike}
        sampled = max((one for one in unlike if one.name in averaged), key=_elements, default=None)
        if sampled:
            pair = _Sample.of(plan, self.table, sampled.name, sampled.first).exchanged()
            if pair:
                one, other = (self.places[k] for k in pair)
                text = f"and '{shown(other.recorded.name, 80)}' were exchanged"
                self.problems.append(one.problem(text))
                return
        made = max(identity.mtime_ns for _, identity in self.table.files)
        later = [
            place
            for place, table in zip(self.places, plan.tables, strict=True)
            if any(identity.mtime_ns > made for _, identity in table.files)
        ]
        for place in later:
            self.problems.append(place.problem("was modified after the average was written"))
        if not later:
            self.notes.append(
                "no digests of the inputs were recorded (--hash), so it cannot be told whether an "
                "input or the average was changed"
            )


def _elements(unlike: Unlike) -> int:
    return unlike.elements


def _laid_out_alike(one: Table, other: Table) -> bool:
    """Tell whether both have the same tensors at the same places."""

    def places(table: Table) -> dict[str, Any]:
        specs = table.tensors | table.others  # type: ignore[operator] # both are dicts
        return {name: (s.dtype, s.shape, s.storage, s.file) for name, s in specs.items()}

    return len(one.files) == len(other.files) and places(one) == places(other)


def _by_tensors(found: Table, expected: Table) -> Deviation:
    """Compare outputs that are laid out differently, tensor by tensor."""
    ours, right = ({**table.tensors, **table.others} for table in (found, expected))
    apart = [f"tensor '{shown(name)}' is missing" for name in right if name not in ours]
    apart += [f"tensor '{shown(name)}' is one too many" for name in ours if name not in right]
    unlike = []
    rows = []
    for name in (name for name in right if name in ours):
        a, b = ours[name], right[name]
        if (a.dtype, a.shape, a.digest) != (b.dtype, b.shape, b.digest):
            unlike.append(name)
        elif a.storage and b.storage:
            rows.append((name, sources_of([found, expected], (a, b))))
    memory = engine.Memory.within(averaging.MAX_MEMORY, 1)
    differing, _ = engine.differing(rows, [*found.files, *expected.files], memory)
    tensors = [Unlike(n, 0, 0, right[n].size) for n in right if n in {*unlike, *differing}]
    return Deviation(tuple(tensors), (*apart, "the tensors do not lie where they should"))


# --- who is to blame ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Sample:
    """Some elements of one tensor, as every input and the average have them."""

    inputs: Sequence[Float64]
    coefficients: Sequence[float]
    average: Float64
    dtype: str

    @classmethod
    def of(cls, plan: Plan, average: Table, name: str, first: int) -> _Sample:
        """Take the elements of an averaged tensor from one of them on."""
        row = next(row for row in plan.averaged_rows if row[-1].name == name)
        specs = (*row, average.tensors[name])
        tables = (*plan.tables, average)
        files = files_of(tables)
        dtypes = [spec.dtype for spec in specs]
        tensor = engine.Compared(name, specs[-1].size, dtypes, sources_of(tables, specs))
        start = 0
        memory = engine.Memory.within(averaging.MAX_MEMORY, 1)
        for _, slabs in engine.values([tensor], files, memory):
            if first < start + slabs[0].size:
                part = slice(first - start, first - start + _SAMPLE)
                *inputs, found = (slab[part].copy() for slab in slabs)
                return cls(inputs, plan.coefficients, found, specs[-1].dtype)
            start += slabs[0].size
        raise AssertionError(f"{name} has no element {first}")

    def holds(self, inputs: Sequence[Float64] | None = None) -> bool:
        """Tell whether the average is that of the inputs."""
        total = np.zeros_like(self.average)
        begun = False
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):
            for coefficient, values in zip(self.coefficients, inputs or self.inputs, strict=True):
                if coefficient:
                    term = coefficient * values
                    total = total + term if begun else term
                    begun = True
        return bool(np.array_equal(self._stored(total), self._stored(self.average)))

    def _stored(self, values: Float64) -> Bytes:
        raw = np.empty(values.size * itemsize(self.dtype), np.uint8)
        narrow(values, self.dtype, "<", raw)
        return raw

    def exchanged(self) -> tuple[int, int] | None:
        """Return the one pair of inputs that gives the average when exchanged, if there is one."""
        if len(self.inputs) > _PAIRED or self.holds():
            return None
        found = []
        for i, j in itertools.combinations(range(len(self.inputs)), 2):
            inputs = [*self.inputs]
            inputs[i], inputs[j] = inputs[j], inputs[i]
            if self.holds(inputs):
                found.append((i, j))
        return found[0] if len(found) == 1 else None
