"""Intervals and tests of differences, against brute force, formulas and another implementation."""

from __future__ import annotations

import itertools
import math
import time
import tracemalloc
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak_cli.errors import UsageError
from polyak_cli.evaluation import significance
from polyak_cli.evaluation.significance import Paired, mcnemar, paired_difference, verdict

quietly = settings(derandomize=True, deadline=None, max_examples=50)
numbers = st.floats(-1e6, 1e6)
Numbers = npt.NDArray[Any]


def answers(only_ours: int, only_theirs: int, both: int = 0) -> tuple[Numbers, Numbers]:
    """Return which rows two models have right, given the numbers right by one and by both."""
    ours = np.repeat([True, False, True, False], [only_ours, only_theirs, both, 1])
    theirs = np.repeat([False, True, True, False], [only_ours, only_theirs, both, 1])
    return ours, theirs


# --- the interval ---------------------------------------------------------------------------------


@quietly
@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=60), st.integers(0, 9))
def test_the_difference_is_the_mean_and_lies_among_the_rows(
    pairs: list[tuple[float, float]], seed: int
) -> None:
    """The interval lies within the values of the rows, and is the same every time."""
    ours, theirs = np.array(pairs).T
    found = paired_difference(ours, theirs, seed=seed, resamples=500)
    exact = sum((Fraction(a) - Fraction(b) for a, b in pairs), Fraction()) / len(pairs)
    assert found.difference == pytest.approx(float(exact), rel=1e-9, abs=1e-8)
    differences = ours - theirs
    room = 1e-9 * max(1.0, abs(differences).max())
    assert differences.min() - room <= found.low <= found.high <= differences.max() + room
    assert found.rows == len(pairs)
    assert found == paired_difference(ours, theirs, seed=seed, resamples=500)


@quietly
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
def test_the_models_change_places_with_the_sign(pairs: list[tuple[bool, bool]]) -> None:
    """Theirs minus ours is the mirror image, and a change of unit scales all numbers."""
    ours, theirs = np.array(pairs).T
    there, back = (
        paired_difference(ours, theirs, resamples=500),
        paired_difference(theirs, ours, resamples=500),
    )
    assert there[:3] == pytest.approx((-back.difference, -back.high, -back.low), abs=1e-12)
    percent = paired_difference(100.0 * ours, 100.0 * theirs, resamples=500)
    assert percent[:3] == pytest.approx([100 * value for value in there[:3]], abs=1e-9)


def test_the_interval_is_that_of_all_resamples() -> None:
    """Five rows have 3,125 resamples; 100,000 random ones find their middle 95 %."""
    rows = np.array([0.3, -1.0, 2.5, 0.0, 1.1])
    means = [np.mean(drawn) for drawn in itertools.product(rows, repeat=5)]
    found = paired_difference(rows, np.zeros(5), resamples=100_000)
    assert found[1:3] == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.03)


def test_the_interval_is_that_of_another_implementation() -> None:
    """SciPy's percentile bootstrap of 1,000 skewed rows agrees to its own sampling error."""
    scipy_stats = pytest.importorskip("scipy.stats")
    rows = np.random.default_rng(1).exponential(size=1000) - 0.9
    theirs = scipy_stats.bootstrap(
        (rows,), np.mean, method="percentile", rng=np.random.default_rng(2), batch=1000
    ).confidence_interval
    found = paired_difference(rows, np.zeros(1000))
    assert found[1:3] == pytest.approx((theirs.low, theirs.high), abs=0.003)


@pytest.mark.parametrize("kind", ["normal", "skewed", "accuracy"])
@pytest.mark.slow
def test_the_interval_covers_the_truth_nineteen_times_of_twenty(kind: str) -> None:
    """Of 1,000 simulated runs with 100 rows each, 92 to 97.5 % contain the true difference."""
    random = np.random.default_rng(20)
    size = (1000, 100)
    runs, truth = {
        "normal": (random.normal(0.3, 2.0, size), 0.3),
        "skewed": (random.exponential(size=size), 1.0),
        "accuracy": (random.choice([-1.0, 0.0, 1.0], size, p=[0.1, 0.7, 0.2]), 0.1),
    }[kind]
    found = [
        paired_difference(rows, 0 * rows, seed=k, resamples=1000) for k, rows in enumerate(runs)
    ]
    assert 920 <= sum(one.low <= truth <= one.high for one in found) <= 975


def test_groups_of_rows_leave_the_interval_as_it_is() -> None:
    """Above 10,000 rows the interval has the width of the normal approximation, around the mean."""
    rows = np.random.default_rng(3).exponential(size=123_457)
    found = paired_difference(rows, np.zeros(len(rows)), resamples=4000)
    expected = 1.959964 * rows.std() / math.sqrt(len(rows))
    assert found.difference == pytest.approx(rows.mean(), rel=1e-12)
    assert found.high - found.difference == pytest.approx(expected, rel=0.06)
    assert found.difference - found.low == pytest.approx(expected, rel=0.06)


def test_sorted_rows_are_grouped_at_random() -> None:
    """Rows sorted by their difference do not widen the interval."""
    rows = np.sort(np.random.default_rng(4).normal(size=50_000))
    found = paired_difference(rows, np.zeros(len(rows)), resamples=1000)
    assert found.high - found.low == pytest.approx(2 * 1.96 / math.sqrt(50_000), rel=0.1)


@pytest.mark.slow
def test_a_million_rows_take_seconds_and_little_memory() -> None:
    """The rows themselves are 8 MB a model; the resamples add some tens of MB."""
    random = np.random.default_rng(5)
    ours, theirs = random.normal(size=(2, 1_000_000))
    started = time.monotonic()
    tracemalloc.start()
    found = paired_difference(ours, theirs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 120e6
    assert time.monotonic() - started < 60
    assert found.low < found.difference < found.high


def test_rows_that_are_no_numbers_give_an_interval_that_is_none() -> None:
    """One NaN, or infinity on either side, makes the difference not comparable."""
    for value in (math.nan, math.inf, -math.inf):
        found = paired_difference(np.array([1.0, value]), np.array([1.0, 2.0]))
        assert not math.isfinite(found.difference)
        assert math.isnan(found.low)
        assert verdict(found, higher_is_better=True) == "not comparable"
    both = np.array([math.inf, 1.0])
    assert math.isnan(paired_difference(both, both).difference)


def test_rows_that_cannot_be_paired_are_refused() -> None:
    """Unequal numbers of rows, several numbers a row, and a single row are refused."""
    for ours, theirs in ((3, 4), (1, 1), (0, 0)):
        with pytest.raises(UsageError, match="a paired difference needs"):
            paired_difference(np.zeros(ours), np.zeros(theirs))
    with pytest.raises(UsageError, match=r"found the shapes \(3, 2\)"):
        paired_difference(np.zeros((3, 2)), np.zeros((3, 2)))
    with pytest.raises(UsageError, match="McNemar's test needs"):
        mcnemar(np.zeros(3, bool), np.zeros(4, bool))


# --- McNemar's test -------------------------------------------------------------------------------


def exactly(only_ours: int, only_theirs: int) -> float:
    """Return the two-sided p, computed with whole numbers."""
    count, fewer = only_ours + only_theirs, min(only_ours, only_theirs)
    tail = sum(math.comb(count, k) for k in range(fewer + 1))
    return float(min(Fraction(1), Fraction(2 * tail, 2**count)))


@quietly
@given(st.integers(0, 400), st.integers(0, 400), st.integers(0, 5))
def test_p_is_that_of_whole_numbers(only_ours: int, only_theirs: int, both: int) -> None:
    """It holds for any number of pairs; rows on which the models agree change nothing."""
    ours, theirs = answers(only_ours, only_theirs, both)
    assert mcnemar(ours, theirs) == pytest.approx(exactly(only_ours, only_theirs), rel=1e-12)
    assert mcnemar(ours, theirs) == mcnemar(theirs, ours)


@pytest.mark.parametrize(
    "pairs",
    [(0, 0), (1, 0), (5, 5), (2, 8), (50, 49), (49_800, 50_200), (50_000, 50_000), (49_000, 51_000),
     (500_700, 499_300)],
)  # fmt: skip
def test_p_is_that_of_another_implementation(pairs: tuple[int, int]) -> None:
    """SciPy's exact binomial test agrees, from no pair to a million."""
    scipy_stats = pytest.importorskip("scipy.stats")
    count = sum(pairs)
    expected = scipy_stats.binomtest(pairs[0], count, 0.5).pvalue if count else 1.0
    assert mcnemar(*answers(*pairs)) == pytest.approx(expected, rel=1e-8)


def test_p_of_a_disagreement_that_cannot_be_chance_is_zero_or_nearly() -> None:
    """Nothing overflows if every one of many pairs is ours."""
    assert mcnemar(*answers(1000, 0)) == pytest.approx(2.0**-999, rel=1e-10)
    assert mcnemar(*answers(100_000, 0)) == 0.0


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "more", "less"),
    [
        (0.1, 0.3, "better", "worse"),
        (-0.3, -0.1, "worse", "better"),
        (-0.1, 0.3, "within noise", "within noise"),
        (0.0, 0.3, "within noise", "within noise"),
        (0.0, 0.0, "within noise", "within noise"),
    ],
)
def test_the_verdict_is_whether_zero_is_in_the_interval(
    low: float, high: float, more: str, less: str
) -> None:
    """This holds for metrics that should be high, and for those that should be low."""
    found = Paired((low + high) / 2, low, high, 100)
    assert verdict(found, higher_is_better=True) == more
    assert verdict(found, higher_is_better=False) == less


def test_the_constants_are_those_of_the_documentation() -> None:
    """There are 10,000 resamples from seed 0, and the interval has 95 %."""
    assert (significance.SEED, significance.RESAMPLES, significance.CONFIDENCE) == (0, 10_000, 0.95)
