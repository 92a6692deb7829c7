"""The tool of `polyak check`: find what is wrong with the checkpoints of a run, or with the run.

Knows what healthy runs look like: which steps, epochs and file times are usual.  Every value is
read once, in flat memory; twice where the file holds checksums.  Does not know what averaging does
with the findings.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from polyak_cli import checkpoints, formats
from polyak_cli.averaging import products
from polyak_cli.averaging.belonging import (
    assets,
    averages,
    exports,
    factors,
    prefixes,
    quantised,
    runs,
)
from polyak_cli.averaging.belonging.blame import group_alike
from polyak_cli.averaging.belonging.constants import describe_constants
from polyak_cli.averaging.fates import is_compared
from polyak_cli.averaging.matching import Row, describe_mismatch, match
from polyak_cli.averaging.notebook import write_html
from polyak_cli.averaging.options import Choice, Tensors
from polyak_cli.checkpoints import Checkpoint, PassedOver, Problem, Selection, find_file
from polyak_cli.checkpoints.folders import list_relative_paths
from polyak_cli.checkpoints.suspicions import find_suspicions
from polyak_cli.engine.slabs import FOLD_BYTES, Memory
from polyak_cli.errors import (
    FormatError,
    MismatchError,
    PolyakError,
    StoreError,
    UsageError,
    name_path,
    quote_glob,
    shown,
    word_count,
)
from polyak_cli.examining.reductions import BUFFER_BYTES, NeighbourSums, find_differing
from polyak_cli.formats.catalogue import detect
from polyak_cli.tensors import FLOATS, Table

Source = str | os.PathLike[str]

#: An outlier is `OUTLYING` times as far from its neighbours as is usual in the run, and `ASIDE`
#: times as far from each of them as they are from one another.
OUTLYING, ASIDE = 5.0, 2.0
#: Fewer checkpoints than this have no outlier: nothing is usual yet.
_ENOUGH = 4


class Checked(NamedTuple):
    """One checkpoint that `check` has read.

    Distances are Euclidean, over all float tensors, relative to the norm of the median checkpoint.

    Attributes:
        path: the file or folder.
        epoch: the epoch in its name; None if there is none.
        modified: when it was written, in seconds since 1970; None if unknown.
        size: bytes of all its files; None if unknown.
        nonfinite: the number of NaN and infinities in the model's float tensors; None if the
            checkpoint cannot be read.
        to_previous: distance to the next older checkpoint of the run that is readable and finite;
            None if there is none.
        to_next: the same for the next newer one.
        problems: what is wrong with it; empty if nothing is.
    """

    path: Path
    epoch: int | None
    modified: float | None
    size: int | None
    nonfinite: int | None
    to_previous: float | None
    to_next: float | None
    problems: tuple[Problem, ...]

    def data(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return self._asdict() | {
            "path": name_path(self.path),
            "modified": format_time(self.modified),
            "problems": [problem.data() for problem in self.problems],
        }


@dataclass(frozen=True, slots=True)
class Health:
    """The result of checking a run.

    Attributes:
        checkpoints: the checkpoints with their problems, oldest first.
        problems: the problems of the run as a whole.
        passed_over: files of the directories that are no checkpoints of the run.
        notes: messages for the user, one line each.
        verdict: whether the checkpoints are of one run, as far as their values tell.
    """

    checkpoints: tuple[Checked, ...]
    problems: tuple[Problem, ...]
    passed_over: tuple[PassedOver, ...]
    notes: tuple[str, ...]
    verdict: runs.Verdict = field(default_factory=runs.Verdict)

    @property
    def all_problems(self) -> tuple[Problem, ...]:
        """The problems of the checkpoints, then those of the run."""
        return (*(p for one in self.checkpoints for p in one.problems), *self.problems)

    @property
    def healthy(self) -> bool:
        """Whether there is no problem."""
        return not self.all_problems

    def _repr_html_(self) -> str:
        """Return the problems for a notebook."""
        problems = self.all_problems
        found = word_count(len(problems), "problem") if problems else "no problems"
        sentence = f"{word_count(len(self.checkpoints), 'checkpoint')}, {found}"
        rows = [(problem.kind, problem.text) for problem in problems]
        return write_html(sentence, ("problem", "where"), rows, self.notes)

    def data(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return {
            "healthy": self.healthy,
            "checkpoints": [one.data() for one in self.checkpoints],
            "problems": [problem.data() for problem in self.problems],
            "passed_over": [
                {"path": name_path(passed.path), "reason": passed.reason}
                for passed in self.passed_over
            ],
            "notes": list(self.notes),
            "runs": self.verdict.data([one.path for one in self.checkpoints]),
        }


def format_time(seconds: float | None) -> str | None:
    """Return a file's time in UTC as ISO 8601, None if there is no such date."""
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
    order: str | None = None,
    match: str = "name",
    allow: Sequence[str] = (),
    strip_prefix: Sequence[str] = (),
    max_memory: int | None = None,
) -> Health:
    """Check every checkpoint of a run, and the run as a whole.

    Args:
        sources: directories, globs or files, as `survey` takes them; or a selection made before,
            for which the options that choose are ignored.
        last: how many of the newest to check; all, if None.
        from_epoch: the first epoch to look at.
        to_epoch: the last epoch to look at.
        exclude: globs of file names that are not checkpoints.
        epoch_pattern: a regular expression that finds the epoch in a name.
        order: "given" keeps the order of files that are given one by one.
        match: how tensors are paired, "name" or "order".
        allow: what is no problem; see `averaging.options.ALLOWED`.
        strip_prefix: beginnings of names without which tensors are paired.
        max_memory: bytes for buffers; `reductions.BUFFER_BYTES` if None.

    Raises:
        UsageError: the arguments contradict one another or are out of range.
        CheckpointError: there are no checkpoints.
        FormatError: a file changed while it was read, or needs more memory than is allowed.
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
            order=order,
            find_polyak_outputs=formats.find_polyak_outputs,
        )
    memory = Memory.within(max_memory or BUFFER_BYTES, 1)
    examined = [_Examined(one) for one in selection.checkpoints]
    of_run = _attach_problems(examined, selection)
    _examine(examined)
    _strip_prefixes(examined, strip_prefix)
    found, verdict, kept = _measure_all(examined, match, allow, memory)
    of_run += found
    if verdict.is_refused and runs.ALLOWED not in allow:
        of_run += _report_runs(examined, verdict)
    _find_averages(examined, allow)
    notes = [*kept, *_compare_assets(examined, allow)]
    alike = [one for one in examined if not one.has("other run")]
    of_run += find_suspicions([one.checkpoint for one in alike], selection.run, selection.thinned)
    return Health(
        tuple(one.build_result() for one in examined),
        tuple(of_run),
        selection.passed_over,
        (*selection.notes, *notes),
        verdict,
    )


@dataclass(slots=True, eq=False)
class _Examined:
    """One checkpoint and what has been found about it so far."""

    checkpoint: Checkpoint
    problems: list[Problem] = field(default_factory=list)
    modified: float | None = None
    size: int | None = None
    table: Table | None = None  # None where it cannot be read
    nonfinite: int | None = None
    to_previous: float | None = None
    to_next: float | None = None

    def has(self, kind: str) -> bool:
        """Return whether it has a problem of some kind."""
        return any(problem.kind == kind for problem in self.problems)

    def add_problem(self, kind: str, text: str) -> None:
        """Add a problem of this checkpoint."""
        self.problems.append(Problem(kind, text))

    def build_result(self) -> Checked:
        """Return the result for this checkpoint."""
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


def _attach_problems(examined: Sequence[_Examined], selection: Selection) -> list[Problem]:
    """Attach the problems found while choosing; return those that belong to no checkpoint."""
    known = {one.checkpoint.path: one for one in examined}
    of_run = []
    for problem in selection.problems:
        if problem.path in known:
            known[problem.path].problems.append(problem)
        else:
            of_run.append(problem)
    return of_run


def _examine(examined: Sequence[_Examined]) -> None:
    """Find the size and time of each, and read the headers of those that can be read."""
    there = [one for one in examined if not one.has("unreadable")]
    paths = [find_file(one.checkpoint.path) for one in there]
    for one, path, outcome in zip(there, paths, formats.probe(paths), strict=True):
        if isinstance(outcome, PolyakError):
            one.add_problem("unreadable", str(outcome))
            with contextlib.suppress(OSError):  # the file may be gone
                status = path.stat()
                one.size, one.modified = status.st_size, status.st_mtime
        else:
            one.size = sum(file.version.size for file in outcome.files)
            one.modified = max(file.version.mtime_ns for file in outcome.files) / 1e9
    by_format: dict[str, list[tuple[_Examined, Path]]] = {}
    for one, path in zip(there, paths, strict=True):
        if not one.has("unreadable"):
            by_format.setdefault(detect(path), []).append((one, path))
    for found in by_format.values():
        for (one, _), table in zip(found, _scan_each([path for _, path in found]), strict=True):
            if isinstance(table, PolyakError):
                one.add_problem("unreadable", str(table))
            else:
                one.table = table


def _scan_each(paths: Sequence[Path]) -> Sequence[Table | PolyakError]:
    """Scan files of one format, each alone if they cannot be scanned together."""
    try:
        return formats.scan(paths)
    except StoreError:
        raise
    except PolyakError as error:
        return [error] if len(paths) == 1 else [_scan_each([path])[0] for path in paths]


def _strip_prefixes(examined: Sequence[_Examined], strip_prefix: Sequence[str]) -> None:
    """Give the tensors of all checkpoints the newest one's names, as averaging would."""
    there = [one for one in examined if one.table]
    tables = [one.table for one in there if one.table]
    if tables:
        stripped, _ = prefixes.strip_tables(tables, strip_prefix)
        for one, table in zip(there, stripped, strict=True):
            one.table = table


def _find_averages(examined: Sequence[_Examined], allow: Sequence[str]) -> None:
    """Add a problem to each checkpoint that holds only a running mean of its weights."""
    readable = [(one, one.table) for one in examined if one.table]
    found = averages.list_averages([table for _, table in readable])
    for (one, table), own in zip(readable, found, strict=True):
        text = averages.describe_refusal(table, Tensors(allow=tuple(allow)), own)
        if text:
            one.add_problem(averages.KIND, text)


def _compare_assets(examined: Sequence[_Examined], allow: Sequence[str]) -> list[str]:
    """Add a problem to checkpoints of the run's model with other vocabularies; return notes."""
    run = [one for one in examined if not one.has("other run") and not one.has("other model")]
    readable = [(one, one.table) for one in run if one.table]
    for one, table in readable if len(readable) > 1 else ():
        if unordered := exports.describe_unordered(table):
            one.add_problem(exports.KIND, unordered)
    problems, notes = assets.find_other_assets([table for _, table in readable])
    for place, problem in problems.items() if assets.ALLOWED not in allow else ():
        readable[place][0].problems.append(problem)
    return notes


# --- the values -----------------------------------------------------------------------------------


def _measure_all(
    examined: Sequence[_Examined], by: str, allow: Sequence[str], memory: Memory
) -> tuple[list[Problem], runs.Verdict, list[str]]:
    """Read all values: those of the run together, each checkpoint of another model alone.

    Returns:
        The problems of the run as a whole, whether it is one, and notes.
    """
    run = [one for one in _select_model(examined, by) if not one.has("other run")]
    apart = [[one] for one in examined if one.table and one not in run]
    measured = [_measure(group, by, memory) for group in (run, *apart) if group]
    notes = [note for sums in measured for note in describe_constants(sums.constants)]
    verdict = runs.Verdict()
    if run:
        verdict = runs.judge(measured[0].samples, [examined.index(one) for one in run])
    tables = [one.table for one in run if one.table and one.nonfinite is not None]
    if not tables:
        return [], verdict, notes
    rows = match(tables, by)
    found = [*_find_quantised(tables, rows, allow), *_find_factors(tables, rows, memory)]
    return found, verdict, notes


def _report_runs(examined: Sequence[_Examined], verdict: runs.Verdict) -> list[Problem]:
    """Return that there are several runs, or add a problem to the only foreign checkpoint."""
    run = [one.checkpoint for one in examined]
    names = list_relative_paths([one.path for one in run])
    text = runs.describe(verdict, names)
    if verdict.foreign is None:
        return [Problem(runs.KIND, f"{text}; {runs.advise(verdict, run, names, Choice())}")]
    one = examined[verdict.foreign]
    one.add_problem(runs.KIND, f"{shown(one.checkpoint.path)}: {text}; leave it out with --exclude")
    return []


def _select_model(examined: Sequence[_Examined], by: str) -> list[_Examined]:
    """Return the checkpoints of the most frequent model; add a problem to the others."""
    known = [(one, one.table) for one in examined if one.table]

    def describe(table: Table, template: Table) -> str:
        return describe_mismatch(table, template, by)

    groups = group_alike([table for _, table in known], describe)
    if not groups:
        return []
    usual = max(groups, key=len)  # the newest on a tie
    template = known[usual[0]][1]
    for one, table in (known[k] for members in groups if members is not usual for k in members):
        one.add_problem("other model", describe(table, template) or describe(template, table))
    return [known[k][0] for k in reversed(usual)]


def _measure(run: Sequence[_Examined], by: str, memory: Memory) -> NeighbourSums:
    """Read the values of checkpoints of one model, add the problems they show, and return sums."""
    tables = [one.table for one in run if one.table]
    rows = match(tables, by)
    sums = NeighbourSums(len(tables))
    sums.read(tables, [row for row in rows if row[-1].dtype in FLOATS], memory)
    for k, one in enumerate(run):
        if k in sums.damaged:
            one.add_problem("unreadable", str(sums.damaged[k]))
            continue
        one.nonfinite = int(sums.nonfinite[k])
        path = shown(one.checkpoint.path)
        if one.nonfinite:
            first = sums.first_nonfinite[k]
            text = f"{path}: tensor '{shown(first)}' holds NaN or infinity; {one.nonfinite} of its"
            one.add_problem(
                "nonfinite",
                f"{text} numbers are not finite; `polyak average` copies that of the newest with "
                f"--exclude-tensors {quote_glob(first)}",
            )
        pair = slice(k - 1, k + 1)
        if sums.same[k] and _has_same_carried(tables[pair], [row[pair] for row in rows]):
            text = f"{path}: every tensor is bit for bit the same as in {shown(tables[k - 1].path)}"
            one.add_problem("identical", text)
    _compare_neighbours(run, sums)
    return sums


def _find_quantised(
    tables: Sequence[Table], rows: Sequence[Row], allow: Sequence[str]
) -> list[Problem]:
    """Return what averaging would refuse as quantised: by names, and by integers that differ."""
    specs = [row[-1] for row in rows]
    names = [spec.name for spec in specs]
    floats = {spec.name for spec in specs if spec.dtype in FLOATS}
    text = quantised.describe_quantised(specs, floats, set(names))
    if not text and quantised.ALLOWED not in allow:
        suspects = quantised.list_suspects(specs, floats, set(names))
        suspected = [row for row in rows if row[-1].name in suspects and is_compared(row)]
        unequal: set[str] = set()
        with contextlib.suppress(FormatError):  # reported with the values of its checkpoint
            unequal = find_differing(tables, suspected)
        differing = (one for name, one in suspects.items() if name in unequal)
        text = next((quantised.describe_suspect(one, names) for one in differing), "")
    return [Problem("quantised", f"{shown(tables[-1].path)}: {text}")] if text else []


def _find_factors(tables: Sequence[Table], rows: Sequence[Row], memory: Memory) -> list[Problem]:
    """Return that the means of factors are far from the mean of their products, if they are."""
    found = factors.find_factors([row for row in rows if row[-1].dtype in FLOATS])
    if not found:
        return []
    equal = [1 / len(tables)] * len(tables)
    try:
        products.compare_configurations(tables)
        measured = products.measure(found, tables, equal, memory.most * FOLD_BYTES)
    except MismatchError as error:
        return [Problem("factors", str(error))]
    _, suspicions = factors.describe_measured(found, measured, exact=False)
    return suspicions


def _has_same_carried(tables: Sequence[Table], rows: Sequence[Row]) -> bool:
    """Return whether the tensors of two checkpoints that are no floats are the same."""
    carried = [row for row in rows if row[0].dtype not in FLOATS]
    if any(row[0].digest != row[1].digest for row in carried):
        return False
    return not find_differing(tables, (row for row in carried if all(s.storage for s in row)))


def _compare_neighbours(run: Sequence[_Examined], sums: NeighbourSums) -> None:
    """Record the distances between neighbours, and find outliers."""
    sound = [k for k, one in enumerate(run) if one.nonfinite == 0]
    if len(sound) < 2:
        return
    steps = [sums.measure_distance(a, b) for a, b in pairwise(sound)]
    around = [sums.measure_distance(a, b) for a, b in zip(sound, sound[2:], strict=False)]
    for place, times in _find_outliers(steps, around):
        one = run[sound[place]]
        one.add_problem(
            "outlier",
            f"{shown(one.checkpoint.path)}: is {times:.3g} times as far from its neighbours as "
            "others of the run; look at it with `polyak diff`, or leave it out with --exclude",
        )
    norm = statistics.median(math.sqrt(sums.squares[k]) for k in sound)
    for k, before, after in zip(sound, [None, *steps], [*steps, None], strict=True):
        run[k].to_previous, run[k].to_next = _divide(before, norm), _divide(after, norm)


def _divide(distance: float | None, norm: float) -> float | None:
    """Return a distance relative to a norm, which may be 0."""
    if distance is None or distance == 0:
        return distance
    return distance / norm if norm else float("inf")


def _find_outliers(
    steps: Sequence[float | None], around: Sequence[float | None]
) -> Iterator[tuple[int, float]]:
    """Yield the index of each outlier, and how many times too far it lies.

    One large step is no sign: steps are large early on, and where the learning rate jumps.  An
    outlier is far from both its neighbours, while these are near each other.  The newest
    checkpoint has one neighbour: its step must be far larger than any other.  The oldest is not
    judged, because training moves most at its beginning.

    Args:
        steps: distances from each checkpoint to the next.
        around: distances from each checkpoint to the second after it.
    """
    count = len(steps) + 1
    nearest = {  # distance to the nearer neighbour, where one is known
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
