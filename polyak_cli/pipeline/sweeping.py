"""Score every window and scheme of a run, and every single checkpoint, on data.

Selection and reporting are kept apart: the winner is chosen on one part of the rows, and its gain
is measured on the other.  The checkpoints are read once for each batch of averages.  How a
candidate is scored, and how a report looks, is not known here.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from polyak_cli import __version__, pipeline
from polyak_cli.averaging import hashing, planning, writing
from polyak_cli.averaging import options as averaging_options
from polyak_cli.averaging.notebook import write_html
from polyak_cli.averaging.schemes import Mean, is_signed, make_mean
from polyak_cli.checkpoints import WEIGHTS_SUFFIXES
from polyak_cli.errors import MismatchError, UsageError, name_path, shown, word_count
from polyak_cli.evaluation import data, recalibration, scoring
from polyak_cli.evaluation.candidates import (
    Candidate,
    ScoredCandidate,
    find_best,
    find_single,
    fold_equal,
    list_candidates,
    make_parameter,
    parse_schemes,
    parse_windows,
    rank,
)
from polyak_cli.evaluation.comparison import Gain, compute_gains
from polyak_cli.evaluation.evaluator import Evaluator, RowScores
from polyak_cli.evaluation.forecast import Forecast, forecast_sweep
from polyak_cli.evaluation.row_counts import OnShare, Progress, follow
from polyak_cli.evaluation.soups import SEARCHES
from polyak_cli.pipeline.stages import stages_of

#: Schemes of the tutorial and their relatives, as `--schemes` takes them.
SCHEMES = "equal,linear,exp:1,exp:2,exp:5,ema:0.9,power:0.1"
#: How many averages to keep on disk at once.
BATCH = 8


class Recipe(NamedTuple):
    """How `average` makes a candidate: its sources, and its options."""

    sources: averaging_options.Source | Sequence[averaging_options.Source]
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sweep:
    """The result of a sweep.

    Attributes:
        plan: the checkpoints, oldest first, and the tensors that were averaged.
        data_name: the name of the data set, as it was given.
        splits: "selection" and "reporting" -> source of the rows, and their number.
        metric: used to choose the winner: the user's own, if there is one; else accuracy where
            labels are classes, else loss.
        rows: every candidate: singles, averages, ensembles, soups, extrapolations.
        winner: the best on the selection rows; ensembles are not models and do not compete.
        recipe: how `average` makes the winner.
        gains: gains of the winner over the "newest" and the "best single" checkpoint.  The winner
            is not compared with itself, and a checkpoint that is both is the newest.
        digests: SHA-256 of each file of each checkpoint.
        notes: messages for the user.
    """

    plan: planning.Plan
    data_name: str
    splits: Mapping[str, tuple[str, int]]
    metric: str
    rows: tuple[ScoredCandidate, ...]
    winner: ScoredCandidate
    recipe: Recipe
    gains: Mapping[str, tuple[Gain, ...]]
    digests: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """The gain over the newest checkpoint by the metric, or "newest" if that one won.

        Otherwise as `significance.verdict` says it.
        """
        if find_single(self.winner.candidate.coefficients) == len(self.plan.checkpoints) - 1:
            return "newest"
        found = [gain.verdict for gain in self.gains["newest"] if gain.metric == self.metric]
        return found[0] if found else "not comparable"

    @property
    def forecast(self) -> Forecast | None:
        """The loss that annealing now would give; None where that is not known."""
        return forecast_sweep(self.rows, "reporting", self.plan.positions)

    def _repr_html_(self) -> str:
        """Return the winner and the best models for a notebook."""

        def rank(row: ScoredCandidate) -> float:
            value = row.value(self.metric, "selection")
            # NaN has no place in an order, so it goes last.
            return math.inf if math.isnan(value) else value if self.metric == "loss" else -value

        models = sorted((r for r in self.rows if r.candidate.kind != "ensemble"), key=rank)
        rows = [
            (
                self.label(row.candidate),
                row.value(self.metric, "selection"),
                row.value(self.metric, "reporting"),
            )
            for row in models
        ]
        winner = self.label(self.winner.candidate)
        header = ("model", f"{self.metric}, choosing", f"{self.metric}, others")
        return write_html(f"Winner: {winner}; verdict: {self.verdict}", header, rows, self.notes)

    def label(self, candidate: Candidate) -> str:
        """Return the name of a candidate in tables and figures."""
        if candidate.kind == "single":
            return self.plan.names[candidate.coefficients.index(1.0)]
        if candidate.kind == "soup":
            return f"{candidate.name} soup of {candidate.window}"
        if candidate.kind == "extrapolation":
            return f"extrapolated by {candidate.parameter:g}, last {candidate.window}"
        return f"{candidate.name}, last {candidate.window}"

    def data(
        self,
        *,
        command: str | None = None,
        winner_command: str | None = None,
        date: str | None = None,
    ) -> dict[str, Any]:
        """Return everything as JSON values; candidates that are one model have one row.

        Args:
            command: the command line that made this sweep, if one did.
            winner_command: the command line that makes the winner.
            date: the date of the report; the clock is not read, so equal sweeps are equal files.
        """
        rows = self._describe_rows()
        wins = self.winner.candidate.coefficients
        return {
            "polyak": __version__,
            "command": command,
            "date": date,
            "data": self.data_name,
            "metric": self.metric,
            "verdict": self.verdict,
            "winner": next(r for r in rows if r["rank"] and tuple(r["coefficients"]) == wins),
            "winner_command": winner_command,
            "forecast": self.forecast.data() if self.forecast else None,
            "gains": [
                {"over": over, "metric": gain.metric, **gain.data()}
                for over, found in self.gains.items()
                for gain in found
            ],
            "splits": {
                name: {"source": source, "rows": count}
                for name, (source, count) in self.splits.items()
            },
            "rows": rows,
            "checkpoints": [
                {
                    "path": name_path(checkpoint.path),
                    "epoch": checkpoint.epoch,
                    "size": table.size,
                    "sha256": digests,
                }
                for checkpoint, table, digests in zip(
                    self.plan.checkpoints, self.plan.tables, self.digests, strict=True
                )
            ],
            "notes": list(self.notes),
        }

    def _describe_rows(self) -> list[dict[str, Any]]:
        """Return each model once; rank 1 is the best on the selection rows."""
        folded = fold_equal(self.rows)
        models = [row for row, _ in folded if row.candidate.kind != "ensemble"]
        # Sorting is stable: of equal models the first is the better, as in `find_best`.
        ranked = sorted(models, key=lambda row: rank(row, self.metric))
        ranks = {id(row): place for place, row in enumerate(ranked, start=1)}
        return [
            {
                **self._name(row.candidate),
                "rank": ranks.get(id(row)),
                "also": [self._name(other) for other in others],
                "coefficients": list(row.candidate.coefficients),
                "metrics": {
                    split: {"loss": scores.loss, **scores.metrics}
                    for split, scores in row.scores.items()
                },
            }
            for row, others in folded
        ]

    def _name(self, candidate: Candidate) -> dict[str, Any]:
        return {
            "label": self.label(candidate),
            "kind": candidate.kind,
            "scheme": candidate.scheme,
            "parameter": candidate.parameter,
            "window": candidate.window,
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
    progress: Progress | None = None,
    **options: Any,
) -> Sweep:
    """Score every single checkpoint, window and scheme of a run.

    Args:
        sources: directories, globs or files, as for `planning.plan`.
        rows: the data set to choose and to report on.
        windows: how many of the newest checkpoints to average, such as "1-10,20"; by default all.
        chosen: schemes, such as "equal,exp:2".
        batch: how many averages to keep on disk at once; the checkpoints are read once a batch.
        select_on: the share of the test rows to choose on; the others are reported on.  Or the
            name of another split to choose on; then all test rows are reported on.
        seed: seed of the random division.
        search: soups to search for, "greedy" and "coefficients"; "extrapolate" scores what lies
            beyond the averages, with negative coefficients.
        write_best: the file to write the winner to.
        force: replace an older one.
        recalibrate: rows on which the statistics of BatchNorm are gathered again for every
            average.  Single checkpoints keep theirs.
        scratch: the folder for temporary averages.
        progress: called as rows are scored, with the number of models done and that of all; 2.25
            of 14 is a quarter of the third model.  A search adds models as it goes.
        **options: those of `planning.plan`, and of `ScoringOptions`: ``key`` and ``use_ema`` choose
            what is averaged and scored; ``metric`` also chooses the winner, by default accuracy
            where labels are classes, else loss.

    Raises:
        UsageError: windows, schemes, searches or splits are not valid.
        PolyakError: as for `planning.plan` and `evaluator.Evaluator`.
    """
    _check_arguments(batch, search, options.get("engine", "here"))
    how: Any = {key: value for key, value in options.items() if key in scoring.KEYS}
    options = _choose_averaging(options, recalibrate)
    whole: Any = {**options, "force": force}
    plan = pipeline.make_plan(sources, write_best, whole, has_skip="on_unhealthy" in options)
    wanted = list_candidates(
        plan.positions, parse_windows(windows, len(plan.checkpoints)), parse_schemes(chosen)
    )
    splits = _divide_rows(rows, select_on, seed)
    evaluator = Evaluator([*splits.values()], **how)
    # What cannot be scored is refused before anything is written.
    evaluator.inspect_files([checkpoint.path for checkpoint in plan.checkpoints])
    # A hidden folder, which searches for checkpoints do not enter.
    with tempfile.TemporaryDirectory(prefix=".polyak-sweep-", dir=scratch) as folder:
        scorer = CandidateScorer(plan, evaluator, tuple(splits), Path(folder), batch, progress)
        scored = list(scorer.score(wanted))
        scored += _score_ensembles(scorer, scored)
        by = evaluator.metric.name if evaluator.metric else _choose_metric(scored)
        for name in search:
            scored += SEARCHES[name](scorer.score, scored, by)
    # Singles come first, so a single checkpoint wins over an average that is no better.
    winner = find_best([row for row in scored if row.candidate.kind != "ensemble"], by)
    recipe = find_recipe(winner.candidate, plan, sources, {**options, "force": force})
    if write_best:
        pipeline.average(recipe.sources, write_best, **dict[str, Any](recipe.options))
    return Sweep(
        plan=plan,
        data_name=rows.name,
        splits={name: (split.source, split.rows) for name, split in splits.items()},
        metric=by,
        rows=tuple(scored),
        winner=winner,
        recipe=recipe,
        gains=_compute_gains(winner, scored, by, scorer.notes),
        digests=tuple(hashing.hash_files(table.files) for table in plan.tables),
        notes=(*plan.notes, *rows.notes, *scorer.collect_notes()),
    )


#: Options of scoring that an average takes where it is recalibrated, as its model is run then.
_RUNNING = frozenset(("batch_size", "trust_code", "model", "device"))


def _choose_averaging(options: Mapping[str, Any], rows: data.Split | None) -> dict[str, Any]:
    """Return the options of a sweep that are those of its averages, recalibrated on rows or not."""
    left_out = {"metric"} if rows is not None else {"metric", *_RUNNING}
    chosen = {key: value for key, value in options.items() if key not in left_out}
    return chosen if rows is None else {**chosen, "recalibrate": rows}


def choose_suffix(plan: planning.Plan) -> str:
    """Return the suffix of an average, by which Keras chooses its format; "" for a folder."""
    path = plan.checkpoints[-1].path
    if path != plan.tables[-1].path:  # a folder: in llama-3.1, the end is no suffix
        return ""
    # The average of sharded weights is one file.
    return WEIGHTS_SUFFIXES[0] if path.name.endswith(WEIGHTS_SUFFIXES) else path.suffix


def _check_arguments(batch: int, search: Sequence[str], engine: str) -> None:
    if engine != "here":
        raise UsageError("engine is not for sweeps, which score their averages on this machine")
    if batch < 1:
        raise UsageError(f"--batch {batch} is out of range; expected 1 or more")
    for name in search:
        if name not in SEARCHES:
            raise UsageError(
                f"--search: unknown search {shown(name)}; choose from {', '.join(SEARCHES)}"
            )


def find_recipe(
    candidate: Candidate,
    plan: planning.Plan,
    sources: averaging_options.Source | Sequence[averaging_options.Source],
    options: Mapping[str, Any],
) -> Recipe:
    """Return how `average` makes a candidate, from the checkpoints with a coefficient in it."""
    # --last counts checkpoints before --target-count and --best choose and unhealthy ones are
    # skipped, so it would choose others.  Then the members are named one by one, with coefficients.
    counted = options.get("best") is None and options.get("target_count") is None
    if candidate.kind == "average" and counted and not plan.skipped:
        parameters = make_parameter(candidate.scheme, candidate.parameter)
        chosen = {"last": candidate.window, "scheme": candidate.scheme, **parameters}
        return Recipe(sources, {**options, **chosen})
    members = [
        (checkpoint.path, multiplier)
        for checkpoint, multiplier in zip(plan.checkpoints, candidate.mean.multipliers, strict=True)
        if multiplier
    ]
    own = {key: value for key, value in options.items() if key not in _CHOOSING}
    if len(members) == 1:  # a single checkpoint was scored with its own statistics
        own = {key: value for key, value in own.items() if key not in {"recalibrate", *_RUNNING}}
    else:
        own["coefficients"] = [multiplier for _, multiplier in members]
    return Recipe([path for path, _ in members], own)


#: Options that choose checkpoints; the members of the winner are chosen already.
_CHOOSING = {
    *("last", "from_epoch", "to_epoch", "every", "min_spacing", "target_count", "exclude"),
    *("best", "best_by", "monitor", "mode", "log", "log_first", "on_unhealthy"),
}


def _divide_rows(rows: data.Dataset, select_on: str, seed: int) -> dict[str, data.Split]:
    """Return the rows to choose on and the rows to report on; no row is in both."""
    reporting = rows.split()
    if select_on in rows.splits:
        selection = rows.split(select_on)
        if selection is reporting:
            raise UsageError(
                f"--select-on {shown(select_on)}: the same rows would be used to choose and to "
                "report; choose a share of them, such as 0.5"
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
class CandidateScorer:
    """Makes and scores candidates.

    Attributes:
        progress: as for `sweep`.
        notes: what writing the averages has found.
        refused: why averages with negative coefficients could not be written.
    """

    plan: planning.Plan
    evaluator: Evaluator
    splits: tuple[str, ...]
    folder: Path
    batch: int
    progress: Progress | None = None
    notes: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    _done: int = 0  # models, in all calls
    _total: int = 0

    @property
    def _are_folders(self) -> bool:
        """Whether an average consists of several files, as shards do."""
        return len(self.plan.tables[-1].files) > 1 and not choose_suffix(self.plan)

    @property
    def _suffix(self) -> str:
        """The suffix of averages: of a checkpoint that is a folder that of the file in it."""
        if self._are_folders:
            return ""
        return choose_suffix(self.plan) or self.plan.tables[-1].path.suffix

    def collect_notes(self) -> list[str]:
        """Return what a user should know of the candidates and their scores."""
        notes = [*dict.fromkeys((*self.notes, *self.evaluator.notes))]
        if self.refused:
            count = word_count(len(self.refused), "candidate")
            why = self.refused[0]
            notes.append(f"{count} with negative coefficients could not be written, as {why}")
        return notes

    def score(self, wanted: Sequence[Candidate]) -> Iterator[ScoredCandidate]:
        """Yield the scores of each candidate, in order; equal coefficients are scored once.

        A candidate with negative coefficients that no file can hold is left out, and `refused` says
        why.
        """
        found: dict[tuple[float, ...], Mapping[str, RowScores]] = {}
        # Windows of 1 equal the newest checkpoint under every scheme.
        unique: dict[tuple[float, ...], Mean] = {}
        for candidate in wanted:
            unique.setdefault(candidate.coefficients, candidate.mean)
        self._total += len(unique)
        for coefficients, scores in self._score_means(unique):
            found[coefficients] = scores
            self._done += 1
        self._done = self._total  # those that could not be written are done too
        for candidate in wanted:
            if candidate.coefficients in found:
                yield ScoredCandidate(candidate, found[candidate.coefficients])

    def _score_means(
        self, wanted: Mapping[tuple[float, ...], Mean]
    ) -> Iterator[tuple[tuple[float, ...], Mapping[str, RowScores]]]:
        """Score averages: single checkpoints directly from their file, the others in batches."""
        several = []
        for coefficients in wanted:
            single = find_single(coefficients)
            if single is not None:
                path = self.plan.checkpoints[single].path
                yield coefficients, self._score_file(path, self._follow())
            else:
                several.append(coefficients)
        for first in range(0, len(several), self.batch):
            part = several[first : first + self.batch]
            yield from self._score_batch({key: wanted[key] for key in part})

    def _score_batch(
        self, part: Mapping[tuple[float, ...], Mean]
    ) -> Iterator[tuple[tuple[float, ...], Mapping[str, RowScores]]]:
        """Score averages that are written together."""
        paths = [self.folder / f"{k}{self._suffix}" for k in range(len(part))]
        if self._are_folders:
            for path in paths:
                path.mkdir()
        try:
            self.notes += writing.write_several(self.plan, [*part.values()], paths)
        except MismatchError as error:
            if not any(is_signed(mean.multipliers) for mean in part.values()):
                raise
            for path in paths:
                _remove(path)
            if len(part) == 1:
                self.refused.append(str(error))
            else:  # each by itself, as one that is refused must not take the others with it
                for coefficients, mean in part.items():
                    yield from self._score_batch({coefficients: mean})
            return
        for coefficients, path in zip(part, paths, strict=True):
            yield coefficients, self._score_average(path)
            _remove(path)  # at once, which frees the disk before the next is recalibrated

    def _score_average(self, path: Path) -> dict[str, RowScores]:
        """Score an average, with BatchNorm statistics of its own if the options say so."""
        report = self._follow()
        how = stages_of(self.plan).gathering
        if how is None:
            return self._score_file(path, report)
        made = path.with_name(f"recalibrated{self._suffix}")
        recalibration.recalibrate(
            path,
            made,
            how.rows,
            batch_size=how.batch_size,
            trust_code=how.trust_code,
            architecture=how.architecture,
            device=how.device,
            key=self.plan.settings.tensors.key,
            # Half of the work on the model, the other half being its score.
            progress=report and (lambda done, total: report(done / total / 2)),
        )
        found = self._score_file(made, report and (lambda share: report((1 + share) / 2)))
        _remove(made)
        return found

    def _score_file(self, path: Path, report: OnShare | None) -> dict[str, RowScores]:
        """Return the scores of one file on each split."""
        return dict(zip(self.splits, self.evaluator.score_rows(path, report), strict=True))

    def _follow(self) -> OnShare | None:
        """Return what reports the share of the next model."""
        return follow(self.progress, self._done, self._total)


def _remove(path: Path) -> None:
    """Remove an average: a file, or a folder of several."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _score_ensembles(
    scorer: CandidateScorer, rows: Sequence[ScoredCandidate]
) -> Iterator[ScoredCandidate]:
    """Yield an ensemble for every window: the mean of the predictions of its members.

    Averaging approximates it with the cost of one model.  A model of several outputs has none.
    """
    singles = [row for row in rows if row.candidate.kind == "single"]
    windows = sorted({row.candidate.window for row in rows if row.candidate.kind == "average"})
    # Windows grow by one older member each, so running sums are enough for all of them.
    sums: list[Any] = [0.0] * len(scorer.splits)
    for window, single in enumerate(reversed(singles), start=1):
        given = [single.scores[split].predictions for split in scorer.splits]
        if any(predictions is None for predictions in given):
            return
        sums = [total + np.asarray(p, np.float64) for total, p in zip(sums, given, strict=True)]
        if window in windows:
            scores = scorer.evaluator.score_predictions([total / window for total in sums])
            whole = make_mean((*(0.0,) * (len(singles) - window), *(1.0,) * window))
            named = dict(zip(scorer.splits, scores, strict=True))
            yield ScoredCandidate(Candidate("ensemble", "", None, window, whole), named)


def _choose_metric(rows: Sequence[ScoredCandidate]) -> str:
    """Return the metric to choose by.

    Raises:
        MismatchError: the models have none.
    """
    scores = rows[-1].scores["selection"]
    if scores.correct is not None:
        return "accuracy"
    if scores.loss is not None:
        return "loss"
    raise MismatchError(
        "the models have no loss, and the labels are not classes; compile the models before saving"
    )


def _compute_gains(
    winner: ScoredCandidate, rows: Sequence[ScoredCandidate], metric: str, notes: list[str]
) -> dict[str, tuple[Gain, ...]]:
    """Compare the winner with other models on the reporting rows; add to notes why one is not."""
    singles = [row for row in rows if row.candidate.kind == "single"]
    others = {"newest": singles[-1]}
    best = find_best(singles, metric)
    if best is not singles[-1]:
        others["best single"] = best
    # On rows that played no part in the choice: the winner looks better than it is on those that
    # did.
    ours = winner.scores["reporting"]
    gains = {
        over: compute_gains(ours, other.scores["reporting"])
        for over, other in others.items()
        if other.candidate.coefficients != winner.candidate.coefficients
    }
    notes += [gain.why for found in gains.values() for gain in found if gain.why]
    return gains
