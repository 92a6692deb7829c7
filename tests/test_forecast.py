"""What annealing would give: the interval is as wide as the run moves."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak_cli.evaluation.candidates import ScoredCandidate, list_candidates
from polyak_cli.evaluation.evaluator import RowScores
from polyak_cli.evaluation.forecast import Forecast, forecast, forecast_sweep, word_forecast

LOSSES = st.floats(1e-3, 1e3)


def half(found: Forecast | None) -> float:
    """Return half the width of an interval, in logarithms."""
    assert found is not None
    assert math.log(found.high / found.loss) == pytest.approx(math.log(found.loss / found.low))
    return math.log(found.high / found.loss)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(LOSSES, min_size=10, max_size=30), LOSSES)
def test_the_interval_is_around_the_average(singles: list[float], average: float) -> None:
    """It holds the average's loss, and neither checkpoints before the tenth nor units matter."""
    found = forecast(singles, average)
    assert found is not None
    assert 0 < found.low < found.loss == average < found.high
    assert forecast(singles[-10:], average) == found
    scaled = forecast([7 * loss for loss in singles], 7 * average)
    assert half(scaled) == pytest.approx(half(found))


def test_a_run_that_improves_or_scatters_is_less_certain() -> None:
    """Each alone widens the interval, and in a run that stands still it is the narrowest."""
    still = half(forecast([1.0] * 10, 1.0))
    improving = half(forecast([1.2] * 5 + [1.0] * 5, 1.0))
    scattering = half(forecast([1.2] * 10, 1.0))
    both = half(forecast([1.4] * 5 + [1.2] * 5, 1.0))
    assert 0 < still < min(improving, scattering)
    assert improving == pytest.approx(scattering)
    assert both > max(improving, scattering)


@pytest.mark.parametrize(
    ("singles", "average"),
    [
        ([1.0] * 9, 1.0),
        ([1.0] * 10, 0.0),
        ([1.0] * 10, math.nan),
        ([1.0] * 9 + [math.inf], 1.0),
        ([1.0] * 9 + [-0.5], 1.0),
    ],
)
def test_nothing_is_said_without_ten_losses_above_0(singles: list[float], average: float) -> None:
    """Too few checkpoints, and losses that have no logarithm, give no forecast."""
    assert forecast(singles, average) is None


def score(count: int, chosen: str = "equal") -> list[ScoredCandidate]:
    """Return a sweep: checkpoint k has the loss k + 1, an average the number of its members."""
    found = []
    for one in list_candidates([float(k + 1) for k in range(count)], [3, 5], [(chosen, None)]):
        single = one.kind == "single"
        loss = one.coefficients.index(1.0) + 1.0 if single else float(one.window)
        rows = {split: RowScores(loss * factor, {}, None, None, None) for split, factor in SPLITS}
        found.append(ScoredCandidate(one, rows))
    return found


SPLITS = (("selection", 100.0), ("reporting", 1.0))


def test_a_sweep_is_forecast_by_its_last_ten_and_the_average_of_five() -> None:
    """Losses are those of the rows that nothing was chosen on; without both there is nothing."""
    wanted = forecast([float(k) for k in range(3, 13)], 5.0)
    assert wanted is not None
    assert forecast_sweep(score(12)[::-1], "reporting") == wanted
    assert forecast_sweep(score(9), "reporting") is None
    assert forecast_sweep(score(12, "linear"), "reporting") is None
    text = word_forecast(wanted.data())
    assert f"about loss 5, from {wanted.low:.4g} to {wanted.high:.4g}." in text
    assert "95 % of measured trials, 90 % in the worst task" in text
