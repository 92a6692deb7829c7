"""What annealing a run now would give, judged by the losses of its checkpoints and their average.

Annealing takes the learning rate to 0; an average of the last checkpoints does much of what that
does, without training.  How far the two are apart depends on how fast the run still improves and on
how much its checkpoints scatter, so the interval is as wide as these two say.  Its width was
measured on runs of four tasks at a constant rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any, NamedTuple

from polyak_cli.evaluation.candidates import ScoredCandidate

#: Checkpoints in the average, and epochs of the annealing, as in the measurements.
WINDOW = 5
#: Half the width of the interval, in logarithms of the loss, for one unit of movement.  In the
#: trials of `make proof` it covers 95 %; a test computes it from their results.
WIDTH = 0.902
#: The share of trials that the interval covers where its width is found in the three other tasks:
#: of all trials, and of those of the worst task.
COVERED = (0.95, 0.90)
#: Movement of a run that stands still: the interval never closes.
_LEAST = 0.01


class Forecast(NamedTuple):
    """The loss after annealing from the newest checkpoint on, over five epochs.

    Attributes:
        loss: that of the average of the last five checkpoints.
        low: lower end of the interval.
        high: upper end.
    """

    loss: float
    low: float
    high: float

    def data(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return self._asdict()


def find_movement(singles: Sequence[float], average: float) -> float:
    """Return how much a run moves: improvement and scatter, as logarithms of losses.

    Args:
        singles: losses of the last ten checkpoints, oldest first, above 0.
        average: loss of the equal average of the last five, above 0.
    """
    before, now = fmean(singles[:WINDOW]), fmean(singles[WINDOW:])
    return abs(math.log(now / before)) + abs(math.log(now / average)) + _LEAST


def forecast(singles: Sequence[float], average: float) -> Forecast | None:
    """Return what annealing now would give; None where that is not known.

    Args:
        singles: losses of a run's checkpoints, one an epoch, oldest first.
        average: loss of the equal average of the last five.

    Returns:
        None for fewer than ten checkpoints, where a loss is not finite or not above 0, and where
        losses are so far apart that no float64 holds the interval.
    """
    last = singles[-2 * WINDOW :]
    if len(last) < 2 * WINDOW or not all(0 < loss < math.inf for loss in (*last, average)):
        return None
    try:
        half = WIDTH * find_movement(last, average)
        found = Forecast(average, average * math.exp(-half), average * math.exp(half))
    except (OverflowError, ValueError):  # a sum is too large, a quotient is 0
        return None
    return found if math.isfinite(found.high) else None


def forecast_sweep(
    rows: Sequence[ScoredCandidate], split: str, positions: Sequence[float]
) -> Forecast | None:
    """Return what annealing now would give, by the scores of a sweep.

    Args:
        rows: the candidates of a sweep.
        split: the rows whose losses are taken.
        positions: where each checkpoint stands in the run, oldest first.

    Returns:
        None without ten checkpoints with a loss, where the equal average of the newest five was not
        scored, or where the last ten are not one an epoch, as nothing else was measured.
    """
    if not _are_one_an_epoch(positions):
        return None
    singles, averages = {}, []
    for row in rows:
        one, loss = row.candidate, row.value("loss", split)
        if one.kind == "single":
            singles[one.coefficients.index(1.0)] = loss
        elif (one.kind, one.scheme, one.window) == ("average", "equal", WINDOW):
            averages.append(loss)
    if not averages:
        return None
    return forecast([singles[place] for place in sorted(singles)], averages[0])


def _are_one_an_epoch(positions: Sequence[float]) -> bool:
    """Return whether the last ten checkpoints, or all of fewer, follow each other by 1."""
    return all(after - before == 1 for before, after in pairwise(positions[-2 * WINDOW :]))


def explain_absence(positions: Sequence[float]) -> str:
    """Return why a run has no forecast, for a user who asked for one.

    Args:
        positions: where each checkpoint of the average stands in the run, oldest first.
    """
    if len(positions) < 2 * WINDOW:
        return "it takes an average of ten checkpoints or more with a loss, one an epoch"
    if not _are_one_an_epoch(positions):
        return (
            "the last ten checkpoints are not one an epoch by their names, and nothing else was "
            "measured"
        )
    return "a loss of the last ten checkpoints is missing, not finite, or not above 0"


def word_forecast(found: Mapping[str, float]) -> str:
    """Return one line for the user.

    Args:
        found: the JSON form of a `Forecast`.
    """
    all_trials, worst = (f"{share:.0%}".replace("%", " %") for share in COVERED)
    return (
        "Annealed now over five epochs, if checkpoints are one an epoch at a constant rate: about "
        f"loss {found['loss']:.4g}, from {found['low']:.4g} to {found['high']:.4g}. Such intervals "
        f"held {all_trials} of measured trials, {worst} in the worst task."
    )
