"""Model files against a baseline on the same rows: how much better each is, and how sure that is.

Every row is asked of both models, so that what makes a row hard for either cancels out.  Knows no
framework: `models` tells what each row got, `statistics` what the differences mean.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polyak_cli.errors import shown
from polyak_cli.evaluation import data, evaluator, significance

_StrPath = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Gain:
    """How far a model is ahead of the baseline in accuracy or loss.

    Attributes:
        metric: accuracy or loss.
        paired: the difference, the model's minus the baseline's, and its 95 % interval.
        verdict: better, worse, within noise, or not comparable, where a loss is no number.
        mcnemar_p: of the exact McNemar test, for accuracy; else None.
    """

    metric: str
    paired: significance.Paired
    verdict: str
    mcnemar_p: float | None = None

    def data(self) -> dict[str, Any]:
        """Return it as what JSON can hold, but for the metric."""
        about = {"mcnemar_p": self.mcnemar_p, "verdict": self.verdict}
        return {**self.paired._asdict(), **about}


@dataclass(frozen=True, slots=True)
class Compared:
    """A model's score, and its gains over the baseline: accuracy first, then loss."""

    score: evaluator.Score
    gains: tuple[Gain, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The baseline's score and the models, in the order given."""

    baseline: evaluator.Score
    models: tuple[Compared, ...]


def compare(
    paths: _StrPath | Sequence[_StrPath],
    baseline: _StrPath,
    rows: data.Split,
    *,
    batch_size: int = 256,
    trust_code: bool = False,
) -> Comparison:
    """Score model files and a baseline on the same rows, and compare them row by row.

    Args:
        paths: model files, or one of them, as for `evaluate`.
        baseline: the model file that they are compared with.
        rows: features and labels, as for `evaluate`; two rows or more.
        batch_size: rows at a time.
        trust_code: run the code that a file carries in a Lambda layer.

    Raises:
        UsageError: the batch size is out of range, or there is one row only.
        MissingExtraError: keras or tensorflow is not installed.
        FormatError: a file is damaged or foreign, or holds weights without an architecture.
        MismatchError: the rows do not fit a model.
        PolyakError: Keras is too old, or cannot load a model, or a model carries code.
    """
    examiner = evaluator.Examiner([rows], batch_size=batch_size, trust_code=trust_code)
    several = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    files = [Path(path) for path in several]
    examiner.look([Path(baseline), *files])
    (theirs,) = examiner.outcomes(Path(baseline))
    compared = []
    for path in files:
        (ours,) = examiner.outcomes(path)
        score = _score(path, ours, rows)
        notes = (*score.notes, *_not_compared(ours, theirs, baseline))
        compared.append(Compared(replace(score, notes=notes), gains(ours, theirs)))
    return Comparison(_score(Path(baseline), theirs, rows), tuple(compared))


def gains(ours: evaluator.Outcome, theirs: evaluator.Outcome) -> tuple[Gain, ...]:
    """Return what can be compared of two outcomes on the same rows: accuracy, then loss."""
    found = []
    if ours.correct is not None and theirs.correct is not None:
        paired = significance.paired(ours.correct, theirs.correct)
        p = significance.mcnemar(ours.correct, theirs.correct)
        verdict = significance.verdict(paired, higher_is_better=True)
        found.append(Gain("accuracy", paired, verdict, p))
    if ours.losses is not None and theirs.losses is not None and ours.loss_name == theirs.loss_name:
        paired = significance.paired(ours.losses, theirs.losses)
        found.append(Gain("loss", paired, significance.verdict(paired, higher_is_better=False)))
    return tuple(found)


def _not_compared(
    ours: evaluator.Outcome, theirs: evaluator.Outcome, baseline: _StrPath
) -> tuple[str, ...]:
    """Say so where both have a loss, but not the same one."""
    if ours.losses is None or theirs.losses is None or ours.loss_name == theirs.loss_name:
        return ()
    names = f"{shown(ours.loss_name, 60)}, {shown(baseline)}'s {shown(theirs.loss_name, 60)}"
    return (f"its loss is {names}: they are not compared",)


def _score(path: Path, outcome: evaluator.Outcome, rows: data.Split) -> evaluator.Score:
    return evaluator.Score(path, outcome.loss, outcome.metrics, rows.rows, outcome.notes)
