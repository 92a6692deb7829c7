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
    too narrow for fewer than about thirty rows.

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
    if ours.shape != theirs.shape or ours.ndim != 1:
        raise UsageError(
            f"a paired difference needs one number a row of either model, found the shapes "
            f"{ours.shape} and {theirs.shape}"
        )
    rows = len(ours)
    if rows < 2:
        raise UsageError(f"a paired difference needs two rows or more, found {rows}")
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        differences = ours.astype(np.float64) - theirs.astype(np.float64)
        difference = float(differences.mean())
    if not math.isfinite(difference):
        return Paired(difference, math.nan, math.nan, rows)
    random = np.random.default_rng(seed)
    means = _resample_means(*_group_rows(differences, random), random, resamples)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return Paired(difference, float(low), float(high), rows)


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
            f"McNemar's test needs one answer a row of either model, found the shapes "
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


def verdict(paired: Paired, *, higher_is_better: bool) -> str:
    """Return a difference in words: better, worse, within noise, or not comparable.

    It is within noise if 0 lies in the interval, and not comparable if it is not finite.
    """
    if not all(map(math.isfinite, paired)):
        return "not comparable"
    if paired.low <= 0 <= paired.high:
        return "within noise"
    return "better" if (paired.low > 0) == higher_is_better else "worse"
