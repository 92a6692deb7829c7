"""Says what annealing a run in training would give, each time its average is published.

Scores each checkpoint once, however often it is in an average.  How the forecast is made, and how
far it can be trusted, is known in `evaluation.forecast`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from polyak_cli.averaging.planning import Plan
from polyak_cli.evaluation import data
from polyak_cli.evaluation.candidates import Candidate, ScoredCandidate, list_candidates
from polyak_cli.evaluation.evaluator import Evaluator, RowScores
from polyak_cli.evaluation.forecast import WINDOW, Forecast, forecast_sweep
from polyak_cli.evaluation.scoring import ScoringOptions
from polyak_cli.pipeline.sweeping import CandidateScorer
from polyak_cli.storage import File

_SPLIT = "reporting"


class Forecaster:
    """Scores the checkpoints of a run as they come.

    Args:
        rows: what they are scored on.
        **options: see `ScoringOptions`.
    """

    def __init__(self, rows: data.Split, **options: Unpack[ScoringOptions]) -> None:
        self._evaluator = Evaluator([rows], **options)
        self._scored: dict[tuple[File, ...], Mapping[str, RowScores]] = {}

    @property
    def notes(self) -> Sequence[str]:
        """Messages for the user about the checkpoints scored so far."""
        return self._evaluator.notes

    def check(self, plan: Plan) -> None:
        """Score the newest checkpoint of the first plan.

        What fits neither the rows nor the model would show only with the tenth checkpoint.

        Raises:
            PolyakError: it cannot be scored.
        """
        if not self._scored:
            (scores,) = self._evaluator.score_rows(plan.checkpoints[-1].path)
            self._scored[tuple(plan.tables[-1].files)] = {_SPLIT: _keep_loss(scores)}

    def forecast(self, plan: Plan) -> Forecast | None:
        """Return what annealing now would give; None where that is not known.

        Args:
            plan: of an average; its last ten checkpoints are scored, with the scheme's coefficients
                left out of account.

        Raises:
            PolyakError: a checkpoint cannot be scored, or is gone.
        """
        count = len(plan.checkpoints)
        if count < 2 * WINDOW:
            return None
        wanted = list_candidates(plan.positions, [WINDOW], [("equal", None)])
        singles, average = wanted[count - 2 * WINDOW : count], wanted[-1]
        files = {id(one): tuple(plan.tables[one.coefficients.index(1.0)].files) for one in singles}
        fresh = [one for one in singles if files[id(one)] not in self._scored]
        found = self._score(plan, [*fresh, average])
        for row in found[:-1]:
            kept = {split: _keep_loss(scores) for split, scores in row.scores.items()}
            self._scored[files[id(row.candidate)]] = kept
        known = [ScoredCandidate(one, self._scored[files[id(one)]]) for one in singles]
        # Others are not asked for again.
        self._scored = {key: self._scored[key] for key in files.values()}
        return forecast_sweep([*known, found[-1]], _SPLIT, plan.positions)

    def _score(self, plan: Plan, wanted: list[Candidate]) -> list[ScoredCandidate]:
        """Return the scores of single checkpoints and of an average, in order."""
        with tempfile.TemporaryDirectory(prefix=".polyak-watch-") as folder:
            scorer = CandidateScorer(plan, self._evaluator, (_SPLIT,), Path(folder), batch=1)
            return list(scorer.score(wanted))


def _keep_loss(scores: RowScores) -> RowScores:
    """Return scores without those of each row, which take memory for as long as a run trains."""
    return replace(scores, losses=None, correct=None, predictions=None, own=None)
