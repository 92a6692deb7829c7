"""Windows, schemes and candidates of a sweep, decided before anything is scored."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak_cli import pipeline
from polyak_cli.averaging import schemes
from polyak_cli.cli.averaging import average
from polyak_cli.cli.sweeps import write_command
from polyak_cli.errors import UsageError
from polyak_cli.evaluation import candidates, soups
from polyak_cli.evaluation.candidates import Candidate, ScoredCandidate
from polyak_cli.pipeline import sweeping
from polyak_cli.pipeline.sweeping import find_recipe, sweep
from tests.command import SAMPLES
from tests.oracle import read_model, write_model


def test_schemes_are_read_with_their_parameters() -> None:
    """A parameter stands behind a colon; without one, it is the scheme's default."""
    assert candidates.parse_schemes("equal,linear, exp:2,ema") == [
        ("equal", None),
        ("linear", None),
        ("exp", 2.0),
        ("ema", schemes.resolve("ema").parameters["decay"]),
    ]


def test_a_sweep_on_a_cluster_is_refused() -> None:
    """Its averages are files of this machine."""
    rows: Any = None  # nothing is read
    with pytest.raises(UsageError, match="engine is not for sweeps"):
        sweep("nowhere", rows, engine="dask")


@pytest.mark.parametrize(
    "options",
    [
        {"every": 2},
        {"min_spacing": 2, "last": 4},
        {"last": 8, "target_count": 4},
        {"best": 4, "best_by": "lifespan", "log": SAMPLES / "training.csv", "log_first": 1},
    ],
)
def test_the_winner_is_made_of_the_checkpoints_that_were_scored(options: dict[str, Any]) -> None:
    """However they were chosen, the recipe averages the same files with the same coefficients."""
    plan = pipeline.make_plan(SAMPLES, None, options)  # type: ignore[arg-type]
    (winner,) = candidates.list_candidates(plan.positions, [3], [("exp", 2.0)])[-1:]
    (beyond,) = candidates.list_extrapolations(len(plan.checkpoints), [2])[:1]
    for candidate, count in ((winner, 3), (beyond, 2)):
        recipe = find_recipe(candidate, plan, SAMPLES, options)
        again = pipeline.plan(recipe.sources, **recipe.options)
        chosen = [one.path for one in plan.checkpoints[-count:]]
        assert [one.path for one in again.checkpoints] == chosen
        assert again.coefficients == candidate.coefficients[-count:]
    # A shell and the command line take numbers that begin with a minus.
    line = write_command(average, [SAMPLES], {"last": 2, "coefficients": [-0.25, 1.25]}, "o.h5")
    context = average.make_context("average", shlex.split(line)[2:])
    assert context.params["coefficients"] == (-0.25, 1.25)


@pytest.mark.parametrize("text", ["", "mean", "equal:2", "exp:x", "exp:-1", "ema:2", "equal,,exp"])
def test_what_is_no_scheme_is_refused(text: str) -> None:
    """Unknown names, and parameters that are invalid, out of range or not accepted, are refused."""
    with pytest.raises(UsageError):
        candidates.parse_schemes(text)


def test_windows_are_numbers_and_ranges() -> None:
    """Without a list, every window is scored."""
    assert candidates.parse_windows("1-3, 7,2", 10) == [1, 2, 3, 7]
    assert candidates.parse_windows(None, 4) == [1, 2, 3, 4]


@pytest.mark.parametrize("text", ["", "0", "11", "3-2", "1-11", "a", "1-", "-3", "1,,2", "2.5"])
def test_what_is_no_window_is_refused(text: str) -> None:
    """Windows lie between 1 and the number of checkpoints."""
    with pytest.raises(UsageError, match="--windows"):
        candidates.parse_windows(text, 10)


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 12), st.data())
def test_candidates_are_all_singles_windows_and_schemes(count: int, data: st.DataObject) -> None:
    """Coefficients sum to 1, are zero outside the window, and are those of `average --last`."""
    windows = data.draw(st.lists(st.integers(1, count), min_size=1, unique=True))
    positions = [float(k + 1) for k in range(count)]
    chosen = candidates.parse_schemes("equal,exp:2,power:0.1")
    found = candidates.list_candidates(positions, windows, chosen)
    assert [c.coefficients.index(1.0) for c in found[:count]] == list(range(count))
    averages = found[count:]
    assert {(c.scheme, c.window) for c in averages} == {(n, w) for n, _ in chosen for w in windows}
    for candidate in averages:
        assert math.isclose(math.fsum(candidate.coefficients), 1)
        assert not any(candidate.coefficients[: count - candidate.window])
        if candidate.scheme == "exp":
            assert candidate.coefficients[count - candidate.window :] == schemes.coefficients(
                "exp", positions[count - candidate.window :], alpha=2
            )


@settings(derandomize=True, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.data(), st.floats(0.01, 0.9))
def test_a_step_of_the_search_keeps_coefficients_such(
    raw: list[float], data: st.DataObject, step: float
) -> None:
    """After a step toward or away from a checkpoint, none is negative and the sum is 1."""
    total = math.fsum(raw)
    if total < 0.01:
        return
    coefficients = [c / total for c in raw]
    k = data.draw(st.integers(0, len(raw) - 1))
    for near in soups.step_coefficients(coefficients, k, step):
        assert min(near) >= 0
        assert math.isclose(math.fsum(near), 1)
        assert near[k] != coefficients[k]


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 12), st.data())
def test_extrapolations_go_beyond_the_newer_half_of_a_window(
    count: int, data: st.DataObject
) -> None:
    """Each is B + x (B - A) of the halves of an even window, worked out in fractions."""
    windows = data.draw(st.lists(st.integers(1, count), unique=True))
    found = candidates.list_extrapolations(count, windows)
    sizes = sorted({window // 2 * 2 for window in windows} - {0})
    assert [(one.parameter, one.window) for one in found] == [
        (reach, size) for reach in (0.25, 0.5, 1.0) for size in sizes
    ]
    for one in found:
        half, reach = one.window // 2, Fraction(one.parameter or 0)
        older, newer = Fraction(-reach, half), Fraction(1 + reach, half)
        expected = [*[Fraction(0)] * (count - 2 * half), *[older] * half, *[newer] * half]
        assert sum(expected) == 1
        assert [float(share) for share in expected] == pytest.approx(one.coefficients, rel=1e-15)


def test_a_search_for_coefficients_does_not_begin_beyond_the_checkpoints() -> None:
    """Its steps keep signs, so it would never find coefficients that are not negative."""
    beyond = candidates.list_extrapolations(2, [2])[:1]
    singles = candidates.list_candidates([1.0, 2.0], [], [])

    def score(wanted: Sequence[Candidate]) -> list[ScoredCandidate]:
        return [scored(one, one.coefficients[-1]) for one in wanted]

    (found,) = soups.search_coefficients(score, score([*singles, *beyond]), "accuracy")
    assert found.candidate.coefficients == (0.0, 1.0)


def scored(candidate: Candidate, accuracy: float) -> ScoredCandidate:
    """Return a candidate whose accuracy is given; more is better."""
    rows: Any = SimpleNamespace(loss=-accuracy, metrics={}, correct=np.array([accuracy]))
    return ScoredCandidate(candidate, {"selection": rows})


def test_an_extrapolation_that_no_file_can_hold_is_left_out(tmp_path: Path) -> None:
    """A variance below 0: the note counts such candidates; all others are scored, in order."""
    (tmp_path / "run").mkdir()
    for epoch, variance in enumerate((9.0, 4.0, 3.0, 1.0), start=1):
        values = np.full(3, variance, np.float32)
        layer = {"bn/moving_variance": values, "bn/moving_mean": values, "bn/gamma": values}
        write_model(tmp_path / f"run/model_{epoch}.h5", {"bn": layer})
    plan = pipeline.make_plan(tmp_path / "run", None, {})
    read: Any = SimpleNamespace(
        score_rows=lambda path, _report: [read_model(path)], notes=["scored"]
    )
    scorer = sweeping.CandidateScorer(plan, read, ("selection",), tmp_path, 8)
    wanted = candidates.list_candidates(plan.positions, [2, 4], [("equal", None)])[4:]
    wanted += candidates.list_extrapolations(4, [2, 4])
    scored: Any = scorer.score(wanted)  # what `read` returns, in place of scores
    name = "model_weights/bn/bn/moving_variance"
    variances = [float(row.scores["selection"][name][0]) for row in scored]
    # 1 - x (3 - 1) is 0.5, 0 and -1; 2 - x (6.5 - 2) is 0.875, -0.25 and -2.5.
    assert variances == [2.0, 4.25, 0.5, 0.875, 0.0]
    *_, scores, note = scorer.collect_notes()
    assert scores == "scored"
    assert note.startswith("3 candidates with negative coefficients could not be written, as the")
    assert "--recalibrate" in note
    assert not [*tmp_path.glob("*.h5")]


def test_candidates_that_are_one_model_are_one_row() -> None:
    """Windows of 1 and an ensemble of 1 are the newest; an ensemble of several is no average."""
    made = candidates.list_candidates([1.0, 2.0, 3.0], [1, 2], [("equal", None), ("exp", 2.0)])
    made += [Candidate("ensemble", "", None, window, made[2 + window].mean) for window in (1, 2)]
    made.append(Candidate("soup", "greedy", None, 2, made[4].mean))
    folded = candidates.fold_equal([ScoredCandidate(one, {}) for one in made])
    assert [(row.candidate.name, row.candidate.window) for row, _ in folded] == [
        *[("single", 1)] * 3,
        *(("equal", 2), ("exp:2", 2), ("ensemble", 2)),
    ]
    names = [[f"{one.name} {one.window}" for one in rest] for _, rest in folded]
    assert names == [[], [], ["equal 1", "exp:2 1", "ensemble 1"], ["greedy 2"], [], []]
