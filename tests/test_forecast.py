"""What annealing would give: the interval is as wide as the run moves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak_cli import pipeline
from polyak_cli.evaluation import data
from polyak_cli.evaluation.candidates import ScoredCandidate, list_candidates
from polyak_cli.evaluation.evaluator import RowScores
from polyak_cli.evaluation.forecast import Forecast, forecast, forecast_sweep, word_forecast
from polyak_cli.pipeline import annealing
from tests.command import one_line, polyak

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
        ([1e-300] * 5 + [1e300] * 5, 1.0),  # no float64 holds such an interval
        ([1e300] * 5 + [1e-310] * 5, 1.0),
        ([1.7e308] * 10, 1.7e308),
    ],
)
def test_nothing_is_said_without_ten_losses_above_0(singles: list[float], average: float) -> None:
    """Too few checkpoints, losses without a logarithm, and wild ones give no forecast."""
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
    places = [float(k) for k in range(1, 13)]
    assert forecast_sweep(score(12)[::-1], "reporting", places) == wanted
    assert forecast_sweep(score(9), "reporting", places[:9]) is None
    assert forecast_sweep(score(12, "linear"), "reporting", places) is None
    text = word_forecast(wanted.data())
    assert f"about loss 5, from {wanted.low:.4g} to {wanted.high:.4g}." in text
    assert "95 % of measured trials, 90 % in the worst task" in text


def test_checkpoints_that_are_not_one_an_epoch_give_no_forecast() -> None:
    """Steps, every second epoch and a missing epoch were not measured; older gaps do not matter."""
    rows, epochs = score(12), [float(k) for k in range(1, 13)]
    for places in ([100 * k for k in epochs], [2 * k for k in epochs], [*epochs[:-1], 13.0]):
        assert forecast_sweep(rows, "reporting", places) is None
    early = [-9.0, -5.0, *epochs[2:]]
    assert forecast_sweep(rows, "reporting", early) == forecast_sweep(rows, "reporting", epochs)


class Scorer:
    """An evaluator whose loss is the value in the file, and which counts."""

    notes: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.seen: list[str] = []

    def score_rows(self, path: Path, _progress: object = None) -> list[RowScores]:
        """Return the scores of a file."""
        self.seen.append(path.name)
        with np.load(path) as file:
            return [RowScores(float(file["w"][0]), {}, None, None, None)]


def test_a_checkpoint_of_a_watched_run_is_scored_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forecast is of the last ten and the average of five; the next one scores what is new."""
    for k in range(1, 13):
        np.savez(tmp_path / f"model_{k:02d}.npz", w=np.array([10 + 6 / k], np.float64))
    rows: Any = data.Split("rows", np.zeros((1, 1)), np.zeros(1))
    scorer = Scorer()
    monkeypatch.setattr(annealing, "Evaluator", lambda *_given, **_options: scorer)
    forecaster = annealing.Forecaster(rows)
    losses = [10 + 6 / k for k in range(1, 13)]
    for end, fresh in ((11, 10), (12, 1)):
        scorer.seen.clear()
        plan = pipeline.plan(tmp_path, to_epoch=end, scheme="exp")
        found = forecaster.forecast(plan)
        assert found == forecast(losses[:end], found.loss if found else 0)
        assert found is not None
        assert found.loss == pytest.approx(float(np.mean(losses[end - 5 : end])))
        singles = [name for name in scorer.seen if name.startswith("model_")]
        assert singles == [f"model_{k:02d}.npz" for k in range(end - fresh + 1, end + 1)]
        assert len(scorer.seen) == fresh + 1
    assert forecaster.forecast(pipeline.plan(tmp_path, last=9)) is None
    forecaster.check(plan)  # something was scored already
    assert len(scorer.seen) == 2
    fresh_one = annealing.Forecaster(rows)
    scorer.seen.clear()
    fresh_one.check(plan)
    assert scorer.seen == ["model_12.npz"]
    assert fresh_one.forecast(plan) == found
    assert scorer.seen.count("model_12.npz") == 1


def test_options_of_the_forecast_need_data(tmp_path: Path) -> None:
    """A model or trust without rows would have no effect, so they are refused."""
    done = polyak("watch", ".", "--once", "--trust-code", "-o", "o.npz", cwd=tmp_path)
    assert done.returncode == 2
    assert "--model, --device and --trust-code belong to --data, which is missing" in done.stderr


PREDICT = "def load(tensors):\n    return lambda x: x @ tensors['w'].reshape(2, 3)\n"


@pytest.mark.parametrize(
    ("epochs", "why"),
    [
        (range(9), "it takes an average of ten checkpoints or more with a loss, one an epoch"),
        (range(0, 1000, 100), "the last ten checkpoints are not one an epoch by their names"),
    ],
    ids=["fewer", "steps"],
)
def test_a_run_without_a_forecast_has_a_note_that_says_why(
    tmp_path: Path, epochs: range, why: str
) -> None:
    """The average is published all the same."""
    (tmp_path / "own.py").write_text(PREDICT)
    for k in epochs:
        np.savez(tmp_path / f"model_{k}.npz", w=np.full(6, k / 10))
    watch = ("watch", ".", "--once", "--data", "blobs", "--interval", "0.01", "--model")
    done = polyak(*watch, "own.py:load", "-o", "o.npz", cwd=tmp_path)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 1), done.stderr
    assert done.stderr.startswith(f"note: no forecast: {why}")
    assert len(done.stderr.splitlines()) == 1


def test_what_cannot_be_scored_ends_a_watch_before_it_writes(tmp_path: Path) -> None:
    """In one line, once the first checkpoint is there, whatever is missing or does not fit."""
    (tmp_path / "own.py").write_text(PREDICT)
    np.savez(tmp_path / "model_1.npz", w=np.zeros(5))
    watch = ("watch", ".", "--once", "--data", "blobs", "--interval", "0.01", "-o", "o.npz")
    for model, error in (((), "name a function"), (("--model", "own.py:load"), "ValueError")):
        done = polyak(*watch, *model, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (3, "")
        assert error in one_line(done.stderr)
        assert "model_1.npz" in done.stderr
    assert not (tmp_path / "o.npz").exists()
