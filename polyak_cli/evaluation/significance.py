"""Test whether a difference between two models is more than chance, from paired rows.

This module knows pairs of numbers, one pair a row; it knows no model, no data set and no file.  The
rows are assumed to be drawn independently from the data that the models will see.  Related rows,
such as frames of one film, vary less and give intervals that are too narrow.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from polyak_cli.errors import UsageError

Array: TypeAlias = npt.NDArray[Any]

#: Default seed of the resampling: the same rows give the same interval every time.
SEED = 0
RESAMPLES = 10_000
CONFIDENCE = 0.95
#: A difference is only shown where p is below it; see `verdict`.
LEVEL = 0.05
_UNITS = 10_000  # at most so many rows, or groups of rows, are drawn in a resample
_BLOCK = 1 << 20  # draws at a time, about 16 MB


class Paired(NamedTuple):
    """The mean difference of two models over the same rows, and its interval.

    Attributes:
        difference: mean over the rows of ours minus theirs, in their unit.
        low: lower end of its 95 % bootstrap interval.
        high: upper end of it.
        rows: the number of rows.
    """

    difference: float
    low: float
    high: float
    rows: int


def paired_difference(
    ours: Array, theirs: Array, *, seed: int = SEED, resamples: int = RESAMPLES
) -> Paired:
    """Return the mean of ours minus theirs, row by row, with its 95 % bootstrap interval.

    The interval is Efron's percentile interval ("Bootstrap Methods: Another Look at the Jackknife",
    Annals of Statistics 7, 1979): the middle 95 % of the means of rows drawn with replacement.  The
    BCa interval corrects it for skewness, by an amount that falls as 1 / rows; but it does not
    exist where resamples agree, as they do for two models that differ on a few rows only.  Both are
    too narrow for fewer than about thirty rows, or where few rows differ: so `verdict` asks for a
    p as well.

    Above 10,000 rows, 10,000 random groups of (almost) equal size are drawn instead.  This bounds
    the time, and does not change the spread of the mean.

    Args:
        ours: (rows,) numbers or booleans.
        theirs: the same for the other model, in the same order of rows.
        seed: seed of the resampling; the same arguments give the same interval.
        resamples: the number of resamples.

    Raises:
        UsageError: the numbers of rows differ, or there are fewer than two.
    """
    differences = _subtract_rows(ours, theirs)
    rows = len(differences)
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        difference = float(differences.mean())
    if not math.isfinite(difference):
        return Paired(difference, math.nan, math.nan, rows)
    random = np.random.default_rng(seed)
    means = _resample_means(*_group_rows(differences, random), random, resamples)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return Paired(difference, float(low), float(high), rows)


def _subtract_rows(ours: Array, theirs: Array) -> npt.NDArray[np.float64]:
    """Return ours minus theirs, row by row; refuse numbers that are no pairs."""
    if ours.shape != theirs.shape or ours.ndim != 1:
        raise UsageError(
            "a paired difference needs one number per row from each model; found the shapes "
            f"{ours.shape} and {theirs.shape}"
        )
    if len(ours) < 2:
        raise UsageError(f"a paired difference needs two rows or more; found {len(ours)}")
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        return np.asarray(ours.astype(np.float64) - theirs.astype(np.float64))


def _group_rows(differences: Array, random: np.random.Generator) -> tuple[Array, Array]:
    """Return the sums and sizes of the units to draw: single rows, or random groups of rows."""
    rows = len(differences)
    if rows <= _UNITS:
        return differences, np.ones(rows)
    # Random groups: rows are often sorted, and groups of similar rows would vary more.
    starts = np.arange(_UNITS) * rows // _UNITS
    sums = np.add.reduceat(random.permutation(differences), starts)
    return sums, np.diff(starts, append=rows).astype(np.float64)


def _resample_means(
    sums: Array, sizes: Array, random: np.random.Generator, resamples: int
) -> npt.NDArray[np.float64]:
    """Return the means of resamples, drawn with replacement in blocks of bounded memory."""
    units = len(sums)
    means = np.empty(resamples)
    alike = bool((sizes == sizes[0]).all())
    step = max(1, _BLOCK // units)
    for start in range(0, resamples, step):
        drawn = random.integers(units, size=(min(step, resamples - start), units))
        total = units * sizes[0] if alike else sizes[drawn].sum(1)
        means[start : start + len(drawn)] = sums[drawn].sum(1) / total
    return means


def mcnemar(ours: Array, theirs: Array) -> float:
    """Return the two-sided p of the hypothesis that both models are right equally often.

    The exact test of McNemar ("Note on the sampling error of the difference between correlated
    proportions or percentages", Psychometrika 12, 1947): among the rows
    that exactly one model has right, each is ours with a probability of one half.

    Args:
        ours: (rows,) booleans, whether our model is right.
        theirs: the same for the other model, in the same order of rows.

    Raises:
        UsageError: the numbers of rows differ.
    """
    if ours.shape != theirs.shape or ours.ndim != 1:
        raise UsageError(
            "McNemar's test needs one answer per row from each model; found the shapes "
            f"{ours.shape} and {theirs.shape}"
        )
    only_ours = int(np.count_nonzero(ours > theirs))
    only_theirs = int(np.count_nonzero(theirs > ours))
    count, fewer = only_ours + only_theirs, min(only_ours, only_theirs)
    # Binomial coefficients relative to the middle one, from the middle down to 0.  Without
    # factorials and logarithms nothing overflows, and 100,000 pairs lose no digit that matters.
    middle = count // 2
    k = np.arange(middle, 0, -1, dtype=np.float64)
    terms = np.cumprod(np.concatenate([[1.0], k / (count - k + 1)]))
    total = 2 * terms.sum() - (terms[0] if count % 2 == 0 else 0)  # the middle of an even row once
    return min(1.0, float(2 * terms[middle - fewer :].sum() / total))


def sign_flip(ours: Array, theirs: Array, *, seed: int = SEED, resamples: int = RESAMPLES) -> float:
    """Return the two-sided p of the hypothesis that the models could change places on any row.

    Fisher's randomisation test for pairs ("The Design of Experiments", 1935, section 21): each
    difference is as likely to be positive as negative, whatever its size.  p is the share of all
    choices of signs whose sum is as far from 0 as the one found.  For differences of -1, 0 and 1 it
    is McNemar's test.  A p below 0.05 needs six rows that differ.

    All choices are tried where there are at most ``resamples``.  Otherwise random ones are, and the
    one found counts among them, which keeps the error rate at its level (Phipson and Smyth 2010).
    Above 10,000 rows that differ, random groups of them get one sign each.

    Args:
        ours: (rows,) numbers.
        theirs: the same for the other model, in the same order of rows.
        seed: seed of the signs; the same arguments give the same p.
        resamples: the number of random choices of signs.

    Returns:
        p, or NaN if a difference is not finite.

    Raises:
        UsageError: the numbers of rows differ, or there are fewer than two.
    """
    differences = _subtract_rows(ours, theirs)
    if not np.isfinite(differences).all():
        return math.nan
    differences = differences[differences != 0]
    if len(differences) == 0:
        return 1.0
    random = np.random.default_rng(seed)
    units, _ = _group_rows(differences, random)
    # Sums in another order round differently: what equals the one found must count as equal.
    least = abs(units.sum()) - 1e-10 * abs(units).sum()
    if len(units) < resamples.bit_length():  # 2 to the number of units is at most resamples
        choices = np.arange(1 << len(units))[:, None] >> np.arange(len(units)) & 1
        return float(np.mean(_flip(units, choices) >= least))
    extreme, step = 1, max(1, _BLOCK // len(units))
    for start in range(0, resamples, step):
        shape = (min(step, resamples - start), len(units))
        extreme += int(np.count_nonzero(_flip(units, random.integers(2, size=shape)) >= least))
    return extreme / (resamples + 1)


def _flip(units: Array, choices: Array) -> Array:
    """Return how far from 0 the sum is, where a choice of 0 makes a unit negative."""
    return np.asarray(abs((2.0 * choices - 1.0) @ units))


def verdict(paired: Paired, *, higher_is_better: bool, p: float) -> str:
    """Return a difference in words: better, worse, within noise, or not comparable.

    Better and worse need both: 0 lies outside the interval, and p is below 0.05.  Otherwise it is
    within noise, which says that no difference is shown, not that there is none.  The interval
    alone is wrong too often where few rows differ: four rows that differ all one way, which chance
    gives in one of eight pairs of equal models, have an interval without 0 and a p of 0.125.

    Args:
        paired: the difference and its interval.
        higher_is_better: whether more is better, as of accuracy, or less, as of a loss.
        p: that of `mcnemar` for right and wrong answers, that of `sign_flip` for other numbers.

    Returns:
        "not comparable" if the difference or p is not finite.
    """
    if not all(map(math.isfinite, (*paired, p))):
        return "not comparable"
    if paired.low <= 0 <= paired.high or p >= LEVEL:
        return "within noise"
    return "better" if (paired.low > 0) == higher_is_better else "worse"
