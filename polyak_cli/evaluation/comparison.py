"""Compare model files with a baseline on the same rows: how much better each is, and how surely.

Both models score every row, so that the difficulty of a row cancels out in the difference.  This
module knows no framework: `evaluator` scores the rows, and `significance` judges the differences.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from polyak_cli.averaging.notebook import write_html
from polyak_cli.errors import PolyakError, shown
from polyak_cli.evaluation import data, significance
from polyak_cli.evaluation.evaluator import Evaluator, RowScores, Score
from polyak_cli.evaluation.own_metrics import Measured
from polyak_cli.evaluation.row_counts import Progress, follow
from polyak_cli.evaluation.scoring import ScoringOptions
from polyak_cli.storage import mirrors

_StrPath = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Gain:
    """The difference between a model and the baseline by one metric.

    Attributes:
        metric: accuracy, loss, or a metric of the user's own, of which more is better.
        paired: the difference, the model's minus the baseline's, and its 95 % interval; not finite
            where it is not comparable.
        verdict: better, worse, within noise, or not comparable, where a loss is not finite.  Better
            and worse need both an interval without 0 and a p below 0.05.
        mcnemar_p: p of the exact McNemar test for accuracy; None for loss.
        sign_flip_p: p of Fisher's randomisation test for the others; None for accuracy.
        in_parts: whether parts of the rows were paired, as by a metric that is one number for all
            rows; ``paired.rows`` is the number of them then.
        why: why a metric of the user's own is not comparable; "" where it is.
    """

    metric: str
    paired: significance.Paired
    verdict: str
    mcnemar_p: float | None = None
    sign_flip_p: float | None = None
    in_parts: bool = False
    why: str = ""

    @property
    def p(self) -> float | None:
        """The p of its test."""
        return self.sign_flip_p if self.mcnemar_p is None else self.mcnemar_p

    def data(self) -> dict[str, Any]:
        """Return everything except the metric as JSON values."""
        tests = {"mcnemar_p": self.mcnemar_p, "sign_flip_p": self.sign_flip_p}
        about = {"in_parts": self.in_parts, "verdict": self.verdict}
        return {**self.paired._asdict(), **tests, **about}


@dataclass(frozen=True, slots=True)
class Compared:
    """A model that was compared with a baseline.

    Attributes:
        score: the score of the model.
        gains: its gains over the baseline: by a metric of the user's own, accuracy, and loss; only
            those that both have.
    """

    score: Score
    gains: tuple[Gain, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of comparing models with a baseline.

    Attributes:
        baseline: the score of the baseline.
        models: the models, in the order given.
    """

    baseline: Score
    models: tuple[Compared, ...]

    def _repr_html_(self) -> str:
        """Return the differences for a notebook."""
        rows = [
            (
                one.score.path,
                gain.metric,
                f"{gain.paired.difference:+.4f}",
                f"{gain.paired.low:+.4f} to {gain.paired.high:+.4f}",
                gain.verdict,
            )
            for one in self.models
            for gain in one.gains
        ]
        header = ("model", "metric", "difference", "95 % interval", "verdict")
        return write_html(f"Compared with {self.baseline.path}", header, rows)


def compare(
    paths: _StrPath | Sequence[_StrPath],
    baseline: _StrPath,
    rows: data.Split,
    *,
    progress: Progress | None = None,
    **options: Unpack[ScoringOptions],
) -> Comparison:
    """Score model files and a baseline on the same rows, and compare them row by row.

    Args:
        paths: model files, or one of them, as for `evaluate`.
        baseline: the model file to compare with.
        rows: features and labels, as for `evaluate`; two rows or more.
        progress: as for `evaluate`; the baseline is the first model.
        **options: see `ScoringOptions`.  A metric of the user's own is compared row by row where it
            has a number for each, else over parts of the rows, see `own_metrics.divide_whole`.

    Raises:
        UsageError: the batch size is out of range, or there is only one row.
        MissingExtraError: Keras or its back end is not installed.
        FormatError: a file is damaged or foreign, or holds weights without an architecture.
        MismatchError: the rows do not fit a model.
        PolyakError: Keras is too old, or cannot load a model, or a model carries code.
    """
    evaluator = Evaluator([rows], **options)
    # A single string is a sequence of strings, too: of its letters.
    several = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    files = [Path(mirrors.enter(os.fspath(path))) for path in several]
    baseline = mirrors.enter(os.fspath(baseline))
    # All at once, so that a bad file is refused before the first one is scored.
    evaluator.inspect_files([Path(baseline), *files])
    total = 1 + len(files)
    (theirs,) = evaluator.score_rows(Path(baseline), follow(progress, 0, total))
    compared = []
    for done, path in enumerate(files, 1):
        (ours,) = evaluator.score_rows(path, follow(progress, done, total))
        score = _make_score(path, ours, rows)
        gains = compute_gains(ours, theirs)
        whys = (gain.why for gain in gains if gain.why)
        notes = (*score.notes, *_note_other_loss(ours, theirs, baseline), *whys)
        compared.append(Compared(replace(score, notes=notes), gains))
    return Comparison(_make_score(Path(baseline), theirs, rows), tuple(compared))


def compute_gains(ours: RowScores, theirs: RowScores) -> tuple[Gain, ...]:
    """Return the gains of one model over another on the same rows: own metric, accuracy, loss.

    An accuracy or loss that either of them does not have for each row is left out.
    """
    found = []
    # First, as who names a metric decides by it.
    if ours.own and theirs.own and ours.own.is_whole == theirs.own.is_whole:
        found.append(_compare_own(ours.own, theirs.own))
    # A share of rows and a mean loss may disagree: a model can be more often right, and wrong
    # with more confidence.  Both are reported.
    if ours.correct is not None and theirs.correct is not None:
        paired = significance.paired_difference(ours.correct, theirs.correct)
        p = significance.mcnemar(ours.correct, theirs.correct)
        verdict = significance.verdict(paired, higher_is_better=True, p=p)
        found.append(Gain("accuracy", paired, verdict, mcnemar_p=p))
    # Losses of different names have different units, so their difference means nothing.
    if ours.losses is not None and theirs.losses is not None and ours.loss_name == theirs.loss_name:
        paired = significance.paired_difference(ours.losses, theirs.losses)
        p = significance.sign_flip(ours.losses, theirs.losses)
        verdict = significance.verdict(paired, higher_is_better=False, p=p)
        found.append(Gain("loss", paired, verdict, sign_flip_p=p))
    return tuple(found)


def _compare_own(ours: Measured, theirs: Measured) -> Gain:
    """Return the gain by a metric of the user's own: row by row, or part by part of the rows."""
    none = significance.Paired(ours.value - theirs.value, math.nan, math.nan, 0)
    try:
        each = ours.divide(), theirs.divide()
    except PolyakError as error:
        return Gain(ours.name, none, "not comparable", in_parts=ours.is_whole, why=str(error))
    if not math.isfinite(none.difference):
        why = f"the {ours.name} is {ours.value:.6g}, the other's {theirs.value:.6g}"
        return Gain(ours.name, none, "not comparable", in_parts=ours.is_whole, why=why)
    paired = significance.paired_difference(*each)
    p = significance.sign_flip(*each)
    verdict = significance.verdict(paired, higher_is_better=True, p=p)
    return Gain(ours.name, paired, verdict, sign_flip_p=p, in_parts=ours.is_whole)


def _note_other_loss(ours: RowScores, theirs: RowScores, baseline: _StrPath) -> tuple[str, ...]:
    """Return a note if both models have a loss, but not the same one."""
    if ours.losses is None or theirs.losses is None or ours.loss_name == theirs.loss_name:
        return ()
    names = f"{shown(ours.loss_name, 60)}, {shown(baseline)}'s {shown(theirs.loss_name, 60)}"
    return (f"its loss is {names}: they are not compared",)


def _make_score(path: Path, scores: RowScores, rows: data.Split) -> Score:
    return Score(path, scores.loss, scores.metrics, rows.rows, scores.notes, scores.loss_words)
