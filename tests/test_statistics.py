"""Intervals and tests of differences, against brute force, formulas and another implementation."""

from __future__ import annotations

import functools
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
from polyak_cli.evaluation import own_metrics, significance
from polyak_cli.evaluation.comparison import compute_gains
from polyak_cli.evaluation.evaluator import RowScores
from polyak_cli.evaluation.significance import (
    Paired,
    mcnemar,
    paired_difference,
    sign_flip,
    verdict,
)

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
        assert verdict(found, higher_is_better=True, p=0.01) == "not comparable"
    both = np.array([math.inf, 1.0])
    assert math.isnan(paired_difference(both, both).difference)


def test_rows_that_cannot_be_paired_are_refused() -> None:
    """Unequal numbers of rows, several numbers a row, and a single row are refused."""
    for ours, theirs in ((3, 4), (1, 1), (0, 0)):
        with pytest.raises(UsageError, match="a paired difference needs"):
            paired_difference(np.zeros(ours), np.zeros(theirs))
    with pytest.raises(UsageError, match=r"found the shapes \(3, 2\)"):
        paired_difference(np.zeros((3, 2)), np.zeros((3, 2)))
    with pytest.raises(UsageError, match="a paired difference needs"):
        sign_flip(np.zeros(3), np.zeros(4))
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


# --- Fisher's test --------------------------------------------------------------------------------


@quietly
@given(st.lists(st.integers(-9, 9), min_size=2, max_size=9))
def test_p_is_the_share_of_all_signs(rows: list[int]) -> None:
    """Up to 13 rows that differ, every choice of signs is tried; rows of 0 change nothing."""
    tried = [abs(sum(s * r for s, r in zip(signs, rows, strict=True)))
             for signs in itertools.product((-1, 1), repeat=len(rows))]  # fmt: skip
    expected = np.mean([one >= abs(sum(rows)) for one in tried])
    ours = np.array(rows) / 7  # fractions, whose sums round differently in each order
    assert sign_flip(ours, 0 * ours) == pytest.approx(expected, rel=1e-12)
    assert sign_flip(ours, 0 * ours) == sign_flip(0 * ours, ours)


def test_p_of_right_and_wrong_is_that_of_mcnemar() -> None:
    """The tests are the same one, exactly for few rows, and to their sampling error for many."""
    for pairs in ((0, 0), (4, 0), (5, 0), (6, 0), (9, 2), (13, 0)):
        assert sign_flip(*answers(*pairs, 1)) == pytest.approx(mcnemar(*answers(*pairs)), rel=1e-12)
    for pairs in ((10, 4), (40, 20), (7000, 6800)):
        assert sign_flip(*answers(*pairs)) == pytest.approx(mcnemar(*answers(*pairs)), abs=0.015)


def test_p_of_many_rows_is_that_of_another_implementation() -> None:
    """SciPy's permutation test of 200 pairs agrees to the sampling error of both."""
    scipy_stats = pytest.importorskip("scipy.stats")
    ours = np.random.default_rng(6).normal(0.1, 1.0, 200)
    expected = scipy_stats.permutation_test(
        (ours, np.zeros(200)),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        rng=np.random.default_rng(7),
    ).pvalue
    assert sign_flip(ours, np.zeros(200)) == pytest.approx(expected, abs=0.02)


def test_p_is_the_same_every_time_and_never_zero() -> None:
    """Random signs come from a seed; the choice found counts among them, so p is at least 1e-4."""
    ours = np.random.default_rng(8).normal(1.0, 0.1, 20_000)
    assert sign_flip(ours, 0 * ours) == 1 / 10_001
    assert sign_flip(ours[:50] - 0.98, 0 * ours[:50]) == sign_flip(ours[:50] - 0.98, 0 * ours[:50])
    assert sign_flip(np.ones(5), np.ones(5)) == 1.0
    assert math.isnan(sign_flip(np.array([math.inf, 1.0]), np.zeros(2)))


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
    assert verdict(found, higher_is_better=True, p=0.04) == more
    assert verdict(found, higher_is_better=False, p=0.04) == less


def test_a_p_that_is_not_small_makes_no_verdict() -> None:
    """Better and worse need a p below 0.05 too; without a finite p nothing can be compared."""
    found = Paired(0.2, 0.1, 0.3, 100)
    for p, word in ((0.0499, "better"), (0.05, "within noise"), (0.125, "within noise")):
        assert verdict(found, higher_is_better=True, p=p) == word
    assert verdict(found, higher_is_better=True, p=math.nan) == "not comparable"


# --- how often a verdict is wrong -----------------------------------------------------------------


def differ_in_accuracy(only_ours: int, only_theirs: int, rows: int = 200) -> tuple[str, bool]:
    """Return the verdict on two models, and whether the interval alone would have decided."""
    ours, theirs = answers(only_ours, only_theirs, rows - only_ours - only_theirs - 1)
    scores = [RowScores(None, {}, None, correct, None) for correct in (ours, theirs)]
    (gain,) = compute_gains(*scores)
    return gain.verdict, gain.paired.low > 0 or gain.paired.high < 0


@pytest.mark.parametrize("differing", [4, 6, 9, 17])
def test_equal_models_are_rarely_called_better_or_worse(differing: int) -> None:
    """Over all outcomes, by their exact probabilities, 5 % at most are wrong.

    By the interval alone, all four of four are: one of eight pairs.
    """
    wrong = alone = 0.0
    for ahead in range(differing + 1):
        probability = math.comb(differing, ahead) / 2**differing
        word, decided = differ_in_accuracy(ahead, differing - ahead)
        assert word in ("better", "worse", "within noise")
        wrong += probability * (word != "within noise")
        alone += probability * decided
    assert wrong <= 0.05
    assert alone >= wrong
    if differing == 4:
        assert (wrong, alone) == (0, 0.125)


@pytest.mark.soak
def test_a_thousand_pairs_of_equal_models_for_each_number_of_rows_that_differ() -> None:
    """At most 5 % of verdicts are wrong, for 4 to 50 differing rows of 200, each ours by chance.

    The seed is the number of differing rows.  The exact test errs with a probability of at most
    0.05, so the number of wrong verdicts in 1,000 is above 77 with a probability of less than
    1e-4 a number of rows, 0.5 % in all; over all 47,000 pairs there is no allowance.
    """
    wrong = {}
    for differing in range(4, 51):
        ahead = np.random.default_rng(differing).binomial(differing, 0.5, 1000)
        outcomes, times = np.unique(ahead, return_counts=True)
        words = [differ_in_accuracy(int(k), differing - int(k))[0] for k in outcomes]
        wrong[differing] = sum(
            int(count) for word, count in zip(words, times, strict=True) if word != "within noise"
        )
    print(wrong)
    assert max(wrong.values()) <= 77
    assert sum(wrong.values()) <= 0.05 * 47_000
    assert wrong[4] == wrong[5] == 0


def draw_differences(kind: str, rows: int, random: np.random.Generator) -> Numbers:
    """Return the differences in loss of two equal models, as likely positive as negative."""
    sizes = {
        "normal": random.normal(size=rows),
        "heavy": random.laplace(size=rows) ** 3,
        "few rows": random.normal(size=rows) * (random.random(rows) < 0.2),
        "skewed": np.exp(random.normal(size=rows)) - np.exp(0.5),
    }[kind]
    return np.asarray(sizes)


def count_wrong(kind: str, rows: int, pairs: int) -> tuple[int, int]:
    """Return how many verdicts on loss are wrong, and how many would be by the interval alone."""
    random = np.random.default_rng(rows)
    wrong = alone = 0
    for _ in range(pairs):
        ours = draw_differences(kind, rows, random)
        scores = [RowScores(None, {}, losses, None, None, "a") for losses in (ours, 0 * ours)]
        (gain,) = compute_gains(*scores)
        wrong += gain.verdict != "within noise"
        alone += gain.paired.low > 0 or gain.paired.high < 0
    return wrong, alone


def test_equal_losses_are_rarely_called_better_or_worse() -> None:
    """With ten rows, the interval alone errs in more than 12 % of 200 pairs, the verdict in 5 %.

    The seed is the number of rows; 19 of 200 leave a right test with a probability of 0.5 %.
    """
    wrong, alone = count_wrong("heavy", 10, 200)
    assert wrong <= 19
    assert alone >= 24


@pytest.mark.soak
@pytest.mark.parametrize("rows", [5, 10, 20, 30, 100])
@pytest.mark.parametrize("kind", ["normal", "heavy", "few rows", "skewed"])
def test_a_thousand_pairs_of_equal_losses(kind: str, rows: int) -> None:
    """At most 5 % of verdicts are wrong where either sign is as likely; README has the figures.

    The allowance is that of accuracy, 77 of 1,000.  Skewed differences, whose mean is 0 but whose
    signs are not alike, are wrong more often: at most 20 %, and less than by the interval alone.
    """
    wrong, alone = count_wrong(kind, rows, 1000)
    print(kind, rows, wrong, alone)
    assert wrong <= (200 if kind == "skewed" else 77)
    assert wrong <= alone


# --- metrics of all rows --------------------------------------------------------------------------


def find_f1(labels: Numbers, chosen: Numbers) -> Numbers:
    """Return the F1 of yes and no, 0 where there is no yes, as one number for all rows."""
    count = labels.sum() + chosen.sum()
    return np.array([2 * (labels & chosen).sum() / count if count else 0.0])


def find_auc(labels: Numbers, outputs: Numbers) -> Numbers:
    """Return the share of pairs of a yes and a no in which the yes has the larger output."""
    larger = outputs[labels][:, None] > outputs[~labels]
    return np.array([larger.mean() if larger.size else math.nan])


def test_the_parts_of_auc_are_those_of_delong() -> None:
    """The interval is as wide as by DeLong's variance, whatever the outputs are scaled by."""
    random = np.random.default_rng(8)
    labels = np.arange(150) < 60
    ours, theirs = random.normal(size=(2, 150)) + labels * [[1.2], [0.8]]
    first, second = (own_metrics.divide_whole(find_auc, labels, o, "auc") for o in (ours, theirs))
    found = paired_difference(first, second)
    variance = 0.0
    for rows, axis in ((labels, 1), (~labels, 0)):  # placements of each yes, and of each no
        placed = [(o[labels][:, None] > o[~labels]).mean(axis=axis) for o in (ours, theirs)]
        variance += (placed[0] - placed[1]).var(ddof=1) / rows.sum()
    assert found.high - found.low == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.05)
    again = own_metrics.divide_whole(find_auc, labels, 100 * ours - 7, "auc")
    assert again == pytest.approx(first)


KINDS, ROWS = ("f1", "other f1", "auc"), (20, 50, 100, 400)


def draw_pair(kind: str, rows: int, random: np.random.Generator) -> tuple[Numbers, Numbers]:
    """Return labels and (2, rows) predictions of two models of the same metric.

    Three rows of ten are a yes.  The models of "f1" and "auc" are alike; of "other f1" one says
    yes often and the other seldom, which gives both an F1 of 0.586.
    """
    labels = random.random(rows) < 0.3
    # The models share most of their errors, as two averages of one run do.
    shared = 1.5 * labels + 0.8 * random.normal(size=rows)
    outputs = shared + 0.6 * random.normal(size=(2, rows))
    least = [[0.8], [0.8]] if kind == "f1" else [[-0.128], [1.575]]
    return labels, outputs if kind == "auc" else outputs > least


def count_wrong_wholes(kind: str, rows: int, pairs: int) -> int:
    """Return how many verdicts on a metric of all rows are wrong for models of the same metric."""
    random = np.random.default_rng(rows)
    measure = find_auc if kind == "auc" else find_f1
    wrong = 0
    for _ in range(pairs):
        labels, given = draw_pair(kind, rows, random)
        scores = []
        for one in given:
            divide = functools.partial(own_metrics.divide_whole, measure, labels, one, kind)
            own = own_metrics.Measured(kind, float(measure(labels, one)[0]), True, divide)
            scores.append(RowScores(None, {}, None, None, None, own=own))
        (gain,) = compute_gains(*scores)
        wrong += gain.verdict in ("better", "worse")
    return wrong


def test_equal_f1_is_rarely_called_better_or_worse() -> None:
    """Of 200 pairs of equal models with 30 rows, at most 19; the seed is the number of rows."""
    assert count_wrong_wholes("f1", 30, 200) <= 19


@pytest.mark.soak
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_metrics_of_all_rows_are_rarely_called_better_or_worse(kind: str, rows: int) -> None:
    """About 5 % of 200 verdicts are wrong; with 20 rows, six of them a yes, up to 10 %.

    More are so by chance with a probability of some 1e-4 for each number of rows.  The guide's page
    worth has the figures of 1,000, which `python -m tests.test_statistics` prints.
    """
    assert count_wrong_wholes(kind, rows, 200) <= (36 if rows == 20 else 22)


@pytest.mark.soak
def test_f1_of_twenty_parts_by_themselves_errs_often() -> None:
    """So it is not how models are compared: more than 15 % of 1,000 verdicts are wrong.

    One model says yes often, the other seldom; the F1 of five rows favours one of them.
    """
    random = np.random.default_rng(100)
    wrong = 0
    for _ in range(1000):
        labels, given = draw_pair("other f1", 100, random)
        parts = [np.arange(k, 100, 20) for k in range(20)]
        each = [np.array([find_f1(labels[k], one[k])[0] for k in parts]) for one in given]
        p = sign_flip(*each)
        wrong += verdict(paired_difference(*each), higher_is_better=True, p=p) != "within noise"
    print(wrong)
    assert wrong > 150


def test_the_constants_are_those_of_the_documentation() -> None:
    """There are 10,000 resamples from seed 0, and the interval has 95 %."""
    assert (significance.SEED, significance.RESAMPLES, significance.CONFIDENCE) == (0, 10_000, 0.95)
    assert significance.LEVEL == 0.05


if __name__ == "__main__":
    for each_kind, each_rows in itertools.product(KINDS, ROWS):
        print(each_kind, each_rows, count_wrong_wholes(each_kind, each_rows, 1000))
