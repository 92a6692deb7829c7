"""FIT TO AVERAGE: what is wrong with the checkpoints of a run, or with the run as a whole.

Knows what healthy runs look like: which steps, epochs and file times are usual.  Every value is
read once, in flat memory; twice where the file holds checksums.
"""

from __future__ import annotations

import contextlib
import os
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from polyak_cli import checkpoints, engine, formats
from polyak_cli.checkpoints import Checkpoint, PassedOver, Selection, file_of
from polyak_cli.engine import Memory
from polyak_cli.errors import FormatError, MismatchError, PolyakError, UsageError, shown
from polyak_cli.formats.detection import detect
from polyak_cli.matching import Row, compared, files_of, match, sources_of
from polyak_cli.tensors import FLOATS, Bytes, Float64, Table, numbers

Source = str | os.PathLike[str]

#: Bound on the buffers, unless one is given.
MAX_MEMORY = 16 << 20
#: A checkpoint that is so many times as far from its neighbours as is usual is an outlier; and it
#: must be so much farther from both of them than they are from one another.
OUTLYING, ASIDE = 5.0, 2.0
#: Checkpoints of which there must be so many before any can be an outlier.
_ENOUGH = 4
#: How many places further the distances reach: over two neighbours that do not count.
_REACH = 3
#: Checkpoints that were all written within so many seconds may be copies: no time tells of a run.
_COPYING = 60.0


class Problem(NamedTuple):
    """Something that is wrong."""

    #: Of a checkpoint: "unreadable", "nonfinite", "identical", "outlier", "other model", "other
    #: run", "duplicate epoch" or "no epoch".  Of the run: "gap", "resumed", "same file", "other
    #: run", where files of two formats lie together.
    kind: str
    text: str  # a sentence that names the file


class Checked(NamedTuple):
    """One checkpoint; distances are Euclidean, relative to the norm of the median checkpoint."""

    path: Path
    epoch: int | None
    modified: float | None  # seconds since 1970; None where it cannot be told
    size: int | None  # bytes, of all its files
    nonfinite: int | None  # NaN and infinities in the model's float tensors; None where unreadable
    to_previous: float | None  # to the nearest older one of the run that is readable and finite
    to_next: float | None
    problems: tuple[Problem, ...]

    def data(self) -> dict[str, Any]:
        """Return it as what JSON can hold."""
        return self._asdict() | {
            "path": str(self.path),
            "modified": written(self.modified),
            "problems": [problem._asdict() for problem in self.problems],
        }


@dataclass(frozen=True, slots=True)
class Health:
    """A run, oldest checkpoint first, and what is wrong with it."""

    checkpoints: tuple[Checked, ...]
    problems: tuple[Problem, ...]  # of the run as a whole
    passed_over: tuple[PassedOver, ...]
    notes: tuple[str, ...]

    @property
    def all_problems(self) -> tuple[Problem, ...]:
        """The problems of the checkpoints, then those of the run."""
        return (*(p for one in self.checkpoints for p in one.problems), *self.problems)

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong."""
        return not self.all_problems

    def data(self) -> dict[str, Any]:
        """Return it as what JSON can hold."""
        return {
            "healthy": self.healthy,
            "checkpoints": [one.data() for one in self.checkpoints],
            "problems": [problem._asdict() for problem in self.problems],
            "passed_over": [
                {"path": str(passed.path), "reason": passed.reason} for passed in self.passed_over
            ],
            "notes": list(self.notes),
        }


def written(seconds: float | None) -> str | None:
    """Return a file's time as ISO 8601 writes it, in UTC; None where there is no such date."""
    with contextlib.suppress(OverflowError, ValueError, OSError):
        if seconds is not None:
            return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return None


def check(
    sources: Source | Sequence[Source] | Selection,
    *,
    last: int | None = None,
    from_epoch: int | None = None,
    to_epoch: int | None = None,
    exclude: Sequence[str] = (),
    epoch_pattern: str | None = None,
    match: str = "name",
    max_memory: int | None = None,
) -> Health:
    """Look at every checkpoint of a run, and at the run as a whole.

    Args:
        sources: directories, globs or files, as `survey` takes them like the options that choose;
            or what was chosen already, where those say nothing more.
        last: only the newest so many.
        from_epoch: the first epoch to look at.
        to_epoch: the last epoch to look at.
        exclude: globs of file names that are not checkpoints.
        epoch_pattern: a regular expression that finds the epoch in a name.
        match: how tensors are paired, "name" or "order".
        max_memory: bytes for buffers; `MAX_MEMORY`.

    Raises:
        UsageError: the arguments contradict one another or are out of range.
        CheckpointError: there are no checkpoints.
        FormatError: a file changed meanwhile, or needs more memory than is allowed.
    """
    if max_memory is not None and max_memory < 1 << 20:
        raise UsageError(f"--max-memory is {max_memory}; expected at least {1 << 20}")
    if isinstance(sources, Selection):
        selection = sources
    else:
        selection = checkpoints.survey(
            sources,
            last=last,
            from_epoch=from_epoch,
            to_epoch=to_epoch,
            exclude=exclude,
            epoch_pattern=epoch_pattern,
            written_by_us=formats.averages,
        )
    memory = Memory.within(max_memory or MAX_MEMORY, 1)
    patients = [_Patient(one) for one in selection.checkpoints]
    of_run = _admit(patients, selection)
    _examine(patients)
    _measure_all(patients, match, memory)
    alike = [one for one in patients if not one.has("other run")]
    of_run += suspicions(
        [one.checkpoint for one in alike], [one.modified for one in alike], selection.thinned
    )
    return Health(
        tuple(one.checked() for one in patients),
        tuple(of_run),
        selection.passed_over,
        selection.notes,
    )


@dataclass(slots=True, eq=False)
class _Patient:
    """A checkpoint while it is looked at."""

    checkpoint: Checkpoint
    problems: list[Problem] = field(default_factory=list)
    modified: float | None = None
    size: int | None = None
    table: Table | None = None  # None where it cannot be read
    nonfinite: int | None = None
    to_previous: float | None = None
    to_next: float | None = None

    def has(self, kind: str) -> bool:
        """Tell whether it has a problem of some kind."""
        return any(problem.kind == kind for problem in self.problems)

    def suffers(self, kind: str, text: str) -> None:
        """Note a problem."""
        self.problems.append(Problem(kind, text))

    def checked(self) -> Checked:
        """Return what was found."""
        return Checked(
            self.checkpoint.path,
            self.checkpoint.epoch,
            self.modified,
            self.size,
            self.nonfinite,
            self.to_previous,
            self.to_next,
            tuple(self.problems),
        )


def _admit(patients: Sequence[_Patient], selection: Selection) -> list[Problem]:
    """Note what the choice of checkpoints found; return what is of no checkpoint."""
    known = {one.checkpoint.path: one for one in patients}
    of_run = []
    for trouble in selection.troubles:
        if trouble.path in known:
            known[trouble.path].suffers(trouble.kind, trouble.text)
        else:
            of_run.append(Problem(trouble.kind, trouble.text))
    return of_run


def _examine(patients: Sequence[_Patient]) -> None:
    """Find size and time of each, and read the headers of those that can be read."""
    there = [one for one in patients if not one.has("unreadable")]
    paths = [file_of(one.checkpoint.path) for one in there]
    for one, path, outcome in zip(there, paths, formats.tried(paths), strict=True):
        if isinstance(outcome, PolyakError):
            one.suffers("unreadable", str(outcome))
            with contextlib.suppress(OSError):  # it is gone
                status = path.stat()
                one.size, one.modified = status.st_size, status.st_mtime
        else:
            one.size = sum(file.identity.size for file in outcome.files)
            one.modified = max(file.identity.mtime_ns for file in outcome.files) / 1e9
    by_format: dict[str, list[tuple[_Patient, Path]]] = {}
    for one, path in zip(there, paths, strict=True):
        if not one.has("unreadable"):
            by_format.setdefault(detect(path), []).append((one, path))
    for found in by_format.values():
        for (one, _), table in zip(found, _tables([path for _, path in found]), strict=True):
            if isinstance(table, PolyakError):
                one.suffers("unreadable", str(table))
            else:
                one.table = table


def _tables(paths: Sequence[Path]) -> Sequence[Table | PolyakError]:
    """Scan files of one format, though some may be damaged in what is not the model's own."""
    try:
        return formats.scan(paths)
    except PolyakError as error:
        return [error] if len(paths) == 1 else [_tables([path])[0] for path in paths]


# --- the values -----------------------------------------------------------------------------------


def _measure_all(patients: Sequence[_Patient], by: str, memory: Memory) -> None:
    """Read all values: those of the run side by side, what is of another model by itself."""
    run = [one for one in _of_one_model(patients, by) if not one.has("other run")]
    apart = [[one] for one in patients if one.table and one not in run]
    for group in (run, *apart):
        if group:
            _measure(group, by, memory)


def _of_one_model(patients: Sequence[_Patient], by: str) -> list[_Patient]:
    """Return those of the model that most are of, in their order; note it of the others."""
    models: list[list[tuple[_Patient, Table]]] = []  # newest first, as their checkpoints
    for one in reversed(patients):
        if one.table:
            same = (model for model in models if not _mismatch(one.table, model[0][1], by))
            home = next(same, None)
            if home is None:
                models.append(home := [])
            home.append((one, one.table))
    if not models:
        return []
    usual = max(models, key=len)  # the newest on a tie
    for model in models:
        for one, table in model if model is not usual else ():
            one.suffers("other model", _mismatch(table, usual[0][1], by))
    return [one for one, _ in reversed(usual)]


def _mismatch(table: Table, template: Table, by: str) -> str:
    """Return why two checkpoints cannot be of one run, "" where they can."""
    if table.format != template.format:
        ours, theirs = (formats.module(one.format).NAME for one in (table, template))
        return f"{shown(table.path)}: is a {ours} file, but {shown(template.path)} is {theirs}"
    try:
        match([table, template], by)
    except MismatchError as error:
        return str(error)
    return ""


def _measure(run: Sequence[_Patient], by: str, memory: Memory) -> None:
    """Read the values of checkpoints of one model, and note what they tell."""
    tables = [one.table for one in run if one.table]
    rows = match(tables, by)
    sums = _Sums(len(tables))
    with np.errstate(invalid="ignore", over="ignore"):
        sums.read(tables, [row for row in rows if row[-1].dtype in FLOATS], memory)
    engine.unchanged(files_of(tables))
    for k, one in enumerate(run):
        if k in sums.damaged:
            one.suffers("unreadable", str(sums.damaged[k]))
            continue
        one.nonfinite = int(sums.nonfinite[k])
        path = shown(one.checkpoint.path)
        if one.nonfinite:
            text = f"{path}: tensor '{shown(sums.first[k])}' holds NaN or infinity"
            one.suffers("nonfinite", f"{text}; {one.nonfinite} of its numbers are not finite")
        if sums.same[k] and _same_carried(tables[k - 1 : k + 1], [r[k - 1 : k + 1] for r in rows]):
            text = f"{path}: every tensor is bit for bit that of {shown(tables[k - 1].path)}"
            one.suffers("identical", text)
    _compare(run, sums)


def _same_carried(tables: Sequence[Table], rows: Sequence[Row]) -> bool:
    """Tell whether two checkpoints have the same tensors of other types than floats."""
    carried = [row for row in rows if row[0].dtype not in FLOATS]
    if any(row[0].digest != row[1].digest for row in carried):
        return False
    pairs = [
        (row[0].name, sources_of(tables, row)) for row in carried if all(s.storage for s in row)
    ]
    unequal, _ = engine.differing(pairs, files_of(tables), Memory.within(MAX_MEMORY, 1))
    return not unequal


class _Sums:
    """Sums over all float tensors of checkpoints of one model, a row each, slab by slab.

    Which of them hold what is not finite is known at the end only, and until then those before and
    after are compared over their heads too.
    """

    def __init__(self, count: int) -> None:
        self.nonfinite = np.zeros(count, np.int64)
        self.first: dict[int, str] = {}  # row -> the first tensor with what is not finite
        self.squares = np.zeros(count)
        self.apart = np.zeros((count, _REACH + 1))  # [k, j]: of the distance from k - j to k
        self.same = np.arange(count) > 0  # all bits are those of the row before
        self.damaged: dict[int, FormatError] = {}

    def read(self, tables: Sequence[Table], rows: Sequence[Row], memory: Memory) -> None:
        """Read every value once."""
        recent: list[Float64] = []
        before: Bytes | None = None
        held = _REACH + 4  # those that are compared, their difference, two as stored, and masks
        for tensor, k, stored in engine.pieces(
            compared(tables, rows), files_of(tables), memory, held
        ):
            if k == 0:
                size = min(tensor.size, max(1, memory.most // (1 + held)))
                if not recent or len(recent[0]) < size:
                    recent = [np.empty(size) for _ in range(_REACH + 2)]
            if isinstance(stored, FormatError):
                self.damaged.setdefault(k, stored)
                self.same[k : k + 2] = False
                recent[k % (_REACH + 1)].fill(np.nan)
                before = None
                continue
            source = tensor.sources[k]
            count = len(stored) // (source.storage.nbytes // tensor.size)
            numbers(stored, tensor.dtypes[k], source.byteorder, recent[k % (_REACH + 1)][:count])
            self._add(tensor.name, k, [values[:count] for values in recent])
            if self.same[k]:
                self.same[k] = before is not None and np.array_equal(stored, before)
            before = stored

    def _add(self, name: str, k: int, recent: Sequence[Float64]) -> None:
        """Take in a slab of row ``k``, which stands among those before it."""
        *ring, difference = recent
        values = ring[k % len(ring)]
        squares = float(np.dot(values, values))
        self.squares[k] += squares
        if not np.isfinite(squares):  # a square may overflow where the value is finite
            nonfinite = len(values) - np.count_nonzero(np.isfinite(values))
            self.nonfinite[k] += nonfinite
            if nonfinite:
                self.first.setdefault(k, name)
        for reach in range(1, min(k, _REACH) + 1):
            np.subtract(values, ring[(k - reach) % len(ring)], out=difference)
            self.apart[k, reach] += np.dot(difference, difference)

    def distance(self, one: int, other: int) -> float | None:
        """Return how far two rows are apart, None where that was not measured."""
        reach = other - one
        return float(np.sqrt(self.apart[other, reach])) if reach <= _REACH else None


def _compare(run: Sequence[_Patient], sums: _Sums) -> None:
    """Note the distances between neighbours, and which checkpoint lies aside."""
    sound = [k for k, one in enumerate(run) if one.nonfinite == 0]
    if len(sound) < 2:
        return
    steps = [sums.distance(a, b) for a, b in pairwise(sound)]
    around = [sums.distance(a, b) for a, b in zip(sound, sound[2:], strict=False)]
    for place, times in _outliers(steps, around):
        one = run[sound[place]]
        one.suffers(
            "outlier",
            f"{shown(one.checkpoint.path)}: lies {times:.3g} times as far from its neighbours as "
            "others of the run; look at it with `polyak diff`, or leave it out with --exclude",
        )
    norm = statistics.median(float(np.sqrt(sums.squares[k])) for k in sound)
    for k, before, after in zip(sound, [None, *steps], [*steps, None], strict=True):
        run[k].to_previous, run[k].to_next = _relative(before, norm), _relative(after, norm)


def _relative(distance: float | None, norm: float) -> float | None:
    if distance is None or distance == 0:
        return distance
    return distance / norm if norm else float("inf")


def _outliers(
    steps: Sequence[float | None], around: Sequence[float | None]
) -> Iterator[tuple[int, float]]:
    """Yield the places of checkpoints that lie aside, and how many times too far.

    A step may be large, where the learning rate jumps or early on; so one that lies aside must be
    far from both its neighbours, while these are near to one another.  The newest has one neighbour
    only: its step must be far larger than any other.  The oldest is not judged: training moves
    most at its beginning.

    Args:
        steps: from each checkpoint to the next.
        around: from each to the next but one.
    """
    count = len(steps) + 1
    nearest = {  # distance to the nearer neighbour, of those that have it
        place: min(known)
        for place in range(count)
        if (known := [step for step in steps[max(0, place - 1) : place + 1] if step is not None])
    }
    if count < _ENOUGH:
        return
    for place in range(1, count - 1):
        others = [one for other, one in nearest.items() if other != place and one > 0]
        aside = around[place - 1]
        if len(others) >= _ENOUGH - 1 and place in nearest and aside is not None:
            usual = statistics.median(others)
            if nearest[place] > OUTLYING * usual and nearest[place] > ASIDE * aside:
                yield place, nearest[place] / usual
    *earlier, newest = steps
    largest = max((step for step in earlier if step is not None), default=0.0)
    if newest is not None and largest > 0 and newest > OUTLYING * largest:
        yield count - 1, newest / largest


# --- epochs and times -----------------------------------------------------------------------------


def suspicions(
    run: Sequence[Checkpoint], modified: Sequence[float | None], thinned: bool
) -> list[Problem]:
    """Return what the epochs and the times of the files tell of a run as a whole.

    Args:
        run: its checkpoints, oldest first.
        modified: when each was written, in seconds.
        thinned: checkpoints between them were left out on purpose.
    """
    known = [
        (one.epoch, one.path, time)
        for one, time in zip(run, modified, strict=True)
        if one.epoch is not None
    ]
    if any(a[0] > b[0] for a, b in pairwise(known)):  # as named one by one
        return []
    found = [] if thinned else _gaps([(epoch, path) for epoch, path, _ in known])
    timed = [(epoch, path, time) for epoch, path, time in known if time is not None]
    return found + _resumed(timed)


def _gaps(run: Sequence[tuple[int, Path]]) -> list[Problem]:
    """Find where epochs are missing, in a run most of whose checkpoints are evenly spaced."""
    steps = [b[0] - a[0] for a, b in pairwise(run) if b[0] > a[0]]
    usual, times = Counter(steps).most_common(1)[0] if steps else (0, 0)
    if 2 * times <= len(steps):  # as where only what is better than before is saved
        return []
    gaps = [(a, b) for a, b in pairwise(run) if b[0] - a[0] >= 2 * usual]
    if not gaps:
        return []
    (epoch, path), (next_epoch, next_path) = gaps[0]
    more = f"; {len(gaps) - 1} more such gaps" if len(gaps) > 1 else ""
    return [
        Problem(
            "gap",
            f"between {shown(path)} (epoch {epoch}) and {shown(next_path)} (epoch {next_epoch}) "
            f"checkpoints are missing: most are {usual} apart{more}",
        )
    ]


def _resumed(run: Sequence[tuple[int, Path, float]]) -> list[Problem]:
    """Find checkpoints that an earlier run left behind the newer ones of a resumed run.

    Resumed from epoch 5 of 10 and now at 8, a run has written 6 to 8 last: in order of epoch, the
    times rise, fall once, and rise; and those of the last stretch lie between those of 5 and 6.
    Copies mostly have one time, that of their epochs' order, or no order.
    """
    times = [time for _, _, time in run]
    falls = [k for k, (a, b) in enumerate(pairwise(times)) if a > b]
    if len(run) < _ENOUGH or max(times) - min(times) < _COPYING or len(falls) != 1:
        return []
    end = falls[0] + 1  # of the newer ones
    start = sum(time <= times[end] for time in times[:end])  # of them
    # Written before anything else, a single one may have been copied or touched by chance.
    plain = start > 0 or (end > 1 and len(run) - end > 1)
    by_time = sorted(run, key=lambda one: one[2])
    by_name = [path for _, path, _ in by_time] == sorted(path for _, path, _ in run)
    if times[start] < times[-1] or not plain or by_name:  # model_10 is copied before model_9
        return []
    left, newer = run[end:], run[start:end]
    return [
        Problem(
            "resumed",
            f"{_names(left)} {'was' if len(left) == 1 else 'were'} written before "
            f"{_names(newer)}: the run seems to have been resumed from "
            f"{f'epoch {run[start - 1][0]}' if start else 'its beginning'} since",
        )
    ]


def _names(run: Sequence[tuple[int, Path, float]]) -> str:
    first, last = shown(run[0][1]), shown(run[-1][1].name)
    return first if len(run) == 1 else f"{first} to {last}"
