"""WHICH AVERAGE: every window and scheme of a run, and every single checkpoint, scored on data.

Selection and reporting are kept apart: the winner is chosen on one part of the rows, and what it
gains is told on the other.  Each batch of averages is folded in one reading of the checkpoints.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polyak_cli import __version__, pipeline
from polyak_cli.averaging import options as averaging_options
from polyak_cli.averaging import planning, records, writing
from polyak_cli.errors import MismatchError, UsageError, shown
from polyak_cli.evaluation import data, recalibration
from polyak_cli.evaluation.candidates import (
    Candidate,
    Row,
    find_best,
    list_candidates,
    make_parameter,
    parse_schemes,
    parse_windows,
)
from polyak_cli.evaluation.comparison import Gain, gains
from polyak_cli.evaluation.evaluator import Examiner, Outcome
from polyak_cli.evaluation.soups import SEARCHES

#: Schemes of the tutorial and their relatives, as `--schemes` takes them.
SCHEMES = "equal,linear,exp:1,exp:2,exp:5,ema:0.9,power:0.1"
#: Averages that lie on the disk at a time.
BATCH = 8


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a sweep found.

    Attributes:
        plan: of the checkpoints, oldest first, and of the tensors that were averaged.
        splits: what the selection and the reporting rows are called, and how many there are.
        metric: by which the winner was chosen: accuracy where labels are classes, else loss.
        rows: every candidate: singles, averages, ensembles, soups.
        winner: the best on the selection rows; ensembles, which are no model, do not compete.
        gains: of the winner over the "newest" and the "best single" checkpoint.
        digests: SHA-256 of each file of each checkpoint.
        notes: what the user should know.
    """

    plan: planning.Plan
    splits: Mapping[str, tuple[str, int]]
    metric: str
    rows: tuple[Row, ...]
    winner: Row
    gains: Mapping[str, tuple[Gain, ...]]
    digests: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]

    def label(self, candidate: Candidate) -> str:
        """Return what a candidate is called in tables and figures."""
        if candidate.kind == "single":
            newest = candidate.coefficients.index(1.0)
            return self.plan.checkpoints[newest].path.name
        if candidate.kind == "soup":
            return f"{candidate.name} soup of {candidate.window}"
        return f"{candidate.name}, last {candidate.window}"

    def data(self) -> dict[str, Any]:
        """Return everything as what JSON can hold."""
        return {
            "polyak": __version__,
            "checkpoints": [
                {
                    "path": str(checkpoint.path),
                    "epoch": checkpoint.epoch,
                    "size": table.size,
                    "sha256": digests,
                }
                for checkpoint, table, digests in zip(
                    self.plan.checkpoints, self.plan.tables, self.digests, strict=True
                )
            ],
            "splits": {
                name: {"source": source, "rows": count}
                for name, (source, count) in self.splits.items()
            },
            "metric": self.metric,
            "rows": [self._row(row) for row in self.rows],
            "winner": self._row(self.winner),
            "gains": [
                {"over": over, "metric": gain.metric, **gain.data()}
                for over, found in self.gains.items()
                for gain in found
            ],
            "notes": list(self.notes),
        }

    def _row(self, row: Row) -> dict[str, Any]:
        candidate = row.candidate
        return {
            "label": self.label(candidate),
            "kind": candidate.kind,
            "scheme": candidate.scheme,
            "parameter": candidate.parameter,
            "window": candidate.window,
            "coefficients": list(candidate.coefficients),
            "metrics": {
                split: {"loss": outcome.loss, **outcome.metrics}
                for split, outcome in row.outcomes.items()
            },
        }


def sweep(
    sources: averaging_options.Source | Sequence[averaging_options.Source],
    rows: data.Dataset,
    *,
    windows: str | None = None,
    chosen: str = SCHEMES,
    batch: int = BATCH,
    select_on: str = "0.5",
    seed: int = 0,
    search: Sequence[str] = (),
    write_best: Path | None = None,
    force: bool = False,
    recalibrate: data.Split | None = None,
    scratch: Path | None = None,
    batch_size: int = 256,
    trust_code: bool = False,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    **options: Any,
) -> Sweep:
    """Score every single checkpoint, window and scheme of a run.

    Args:
        sources: directories, globs or files, as of `averaging.plan`.
        rows: to choose and to report on.
        windows: how many of the newest count, such as "1-10,20"; all there are.
        chosen: schemes, such as "equal,exp:2".
        batch: averages that lie on the disk at a time; each batch reads the checkpoints once.
        select_on: the share of the test rows to choose on, the others being reported on; or the
            name of another split to choose on, all test rows being reported on.
        seed: of the division.
        search: "greedy" and "coefficients": soups to look for beyond the schemes.
        write_best: the file to write the winner to.
        force: replace an older one.
        recalibrate: rows on which BatchNorm's statistics are gathered anew for every average; not
            for single checkpoints, whose own they are.
        scratch: the folder below which averages are written for a while.
        batch_size: rows that Keras scores at a time.
        trust_code: run code that a model file carries.
        progress: told how many candidates are scored, and of how many.
        **options: of `averaging.plan`.

    Raises:
        UsageError: windows, schemes or splits are not such.
        PolyakError: as `averaging.plan` and `evaluator.Examiner`.
    """
    if batch < 1:
        raise UsageError(f"--batch {batch} is out of range; expected 1 or more")
    for name in search:
        if name not in SEARCHES:
            raise UsageError(
                f"--search: there is no {shown(name)}; choose of {', '.join(SEARCHES)}"
            )
    if recalibrate is not None:
        options |= {"recalibrate": recalibrate, "batch_size": batch_size, "trust_code": trust_code}
    plan = planning.plan(sources, write_best, force=force, **options)
    wanted = list_candidates(
        plan.positions, parse_windows(windows, len(plan.checkpoints)), parse_schemes(chosen)
    )
    splits = _splits(rows, select_on, seed)
    examiner = Examiner([*splits.values()], batch_size=batch_size, trust_code=trust_code)
    with tempfile.TemporaryDirectory(prefix=".polyak-sweep-", dir=scratch) as folder:
        bench = _Bench(plan, examiner, tuple(splits), Path(folder), batch)
        scored = list(bench.scored(wanted, progress))
        scored += _ensembles(bench, scored)
        metric = _metric(scored)
        for name in search:
            scored.append(SEARCHES[name](bench.scored, scored, metric))
    competing = [row for row in scored if row.candidate.kind != "ensemble"]
    winner = find_best(competing, metric)
    if write_best:
        _write(winner.candidate, plan, sources, write_best)
    return Sweep(
        plan=plan,
        splits={name: (split.source, split.rows) for name, split in splits.items()},
        metric=metric,
        rows=tuple(scored),
        winner=winner,
        gains=_gains(winner, scored, metric),
        digests=tuple(records.hash_files(table.files) for table in plan.tables),
        notes=(*plan.notes, *rows.notes, *dict.fromkeys(examiner.notes)),
    )


def _write(
    candidate: Candidate,
    plan: planning.Plan,
    sources: averaging_options.Source | Sequence[averaging_options.Source],
    output: Path,
) -> None:
    """Write the winner as `average` does, from the checkpoints that count in it."""
    options = plan.options
    # --last counts before --best and before what is skipped.
    if candidate.kind == "average" and options.get("best") is None and not plan.skipped:
        parameters = make_parameter(candidate.scheme, candidate.parameter)
        own: Any = {**options, "last": candidate.window, "scheme": candidate.scheme, **parameters}
        pipeline.average(sources, output, **own)
        return
    members = [
        (checkpoint.path, coefficient)
        for checkpoint, coefficient in zip(plan.checkpoints, candidate.coefficients, strict=True)
        if coefficient
    ]
    own = {key: value for key, value in options.items() if key not in _CHOOSING}
    if len(members) == 1:  # as it was scored: with its own statistics
        for key in ("recalibrate", "batch_size", "trust_code"):
            own.pop(key, None)
    else:
        own["coefficients"] = [coefficient for _, coefficient in members]
    pipeline.average([path for path, _ in members], output, **own)


#: Options that choose checkpoints, which are chosen by then.
_CHOOSING = {
    *("last", "from_epoch", "to_epoch", "every", "exclude", "best", "monitor", "mode", "log"),
    "on_unhealthy",
}


def _splits(rows: data.Dataset, select_on: str, seed: int) -> dict[str, data.Split]:
    """Return the rows to choose on and those to report on, which have none in common."""
    reporting = rows.split()
    if select_on in rows.splits:
        selection = rows.split(select_on)
        if selection is reporting:
            raise UsageError(
                f"--select-on {shown(select_on)}: the same rows are reported on; choose a share of "
                "them, such as 0.5"
            )
        return {"selection": selection, "reporting": reporting}
    try:
        share = float(select_on)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise UsageError(
            f"--select-on {shown(select_on)}: is neither a share between 0 and 1 nor a split of "
            f"{shown(rows.name)}"
        )
    selection, reporting = data.halves(reporting, seed=seed, share=share)
    return {"selection": selection, "reporting": reporting}


@dataclass(slots=True)
class _Bench:
    """Where candidates are made and scored."""

    plan: planning.Plan
    examiner: Examiner
    splits: tuple[str, ...]
    folder: Path
    batch: int

    def scored(
        self,
        wanted: Sequence[Candidate],
        progress: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> Iterator[Row]:
        """Yield a row for each candidate, in order; those of the same coefficients share one."""
        found: dict[tuple[float, ...], Mapping[str, Outcome]] = {}
        unique = list(dict.fromkeys(candidate.coefficients for candidate in wanted))
        for coefficients, outcomes in self.outcomes(unique):
            found[coefficients] = outcomes
            progress(len(found), len(unique))
        for candidate in wanted:
            yield Row(candidate, found[candidate.coefficients])

    def outcomes(
        self, wanted: Iterable[tuple[float, ...]]
    ) -> Iterator[tuple[tuple[float, ...], Mapping[str, Outcome]]]:
        """Score averages: those of one checkpoint as it is, the others in batches."""
        several = []
        for coefficients in wanted:
            if max(coefficients) == 1:
                path = self.plan.checkpoints[coefficients.index(1.0)].path
                yield coefficients, self.examined(path)
            else:
                several.append(coefficients)
        suffix = "".join(self.plan.checkpoints[-1].path.suffixes[-1:])
        for first in range(0, len(several), self.batch):
            part = several[first : first + self.batch]
            paths = [self.folder / f"{k}{suffix}" for k in range(len(part))]
            writing.several(self.plan, part, paths)
            for coefficients, path in zip(part, paths, strict=True):
                yield coefficients, self.examined(self.recalibrated(path))
                path.unlink()

    def recalibrated(self, path: Path) -> Path:
        """Return an average with BatchNorm statistics of its own, if that was asked for."""
        options = self.plan.options
        rows = options.get("recalibrate")
        if rows is None:
            return path
        made = path.with_name(f"recalibrated{path.suffix}")
        size = options.get("batch_size") or recalibration.BATCH_SIZE
        trust = options.get("trust_code", False)
        recalibration.recalibrate(path, made, rows, batch_size=size, trust_code=trust, force=True)
        return made

    def examined(self, path: Path) -> dict[str, Outcome]:
        """Score one file."""
        return dict(zip(self.splits, self.examiner.outcomes(path), strict=True))


def _ensembles(bench: _Bench, rows: Sequence[Row]) -> Iterator[Row]:
    """Yield the mean of the members' predictions, for every window: what averaging stands in for.

    Nothing where a model has several outputs.
    """
    singles = [row for row in rows if row.candidate.kind == "single"]
    windows = sorted({row.candidate.window for row in rows if row.candidate.kind == "average"})
    sums: list[Any] = [0.0] * len(bench.splits)
    for window, single in enumerate(reversed(singles), start=1):
        given = [single.outcomes[split].predictions for split in bench.splits]
        if any(predictions is None for predictions in given):
            return
        sums = [total + np.asarray(p, np.float64) for total, p in zip(sums, given, strict=True)]
        if window in windows:
            judged = bench.examiner.judged([total / window for total in sums])
            whole = (*(0.0,) * (len(singles) - window), *(1 / window,) * window)
            outcomes = dict(zip(bench.splits, judged, strict=True))
            yield Row(Candidate("ensemble", "", None, window, whole), outcomes)


def _metric(rows: Sequence[Row]) -> str:
    """Return what to choose by.

    Raises:
        MismatchError: there is nothing.
    """
    outcome = rows[-1].outcomes["selection"]
    if outcome.correct is not None:
        return "accuracy"
    if outcome.loss is not None:
        return "loss"
    raise MismatchError(
        "the models have neither a loss nor classes as labels; compile them before saving"
    )


def _gains(winner: Row, rows: Sequence[Row], metric: str) -> dict[str, tuple[Gain, ...]]:
    """Compare the winner on the reporting rows, row by row."""
    singles = [row for row in rows if row.candidate.kind == "single"]
    others = {"newest": singles[-1], "best single": find_best(singles, metric)}
    ours = winner.outcomes["reporting"]
    return {over: gains(ours, other.outcomes["reporting"]) for over, other in others.items()}
