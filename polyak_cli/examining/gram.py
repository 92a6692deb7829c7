"""What a Gram matrix tells of a run: distances, steps, spread, components, effective number.

Pure functions over the inner products of checkpoints.  They know no file, no tensor and no verdict,
and need no value of the model: whatever is asked of any weighted average is in the matrix.

All products are of differences to the newest checkpoint.  A late run moves by a millionth of its
norm and less; products of the weights themselves would lose that to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from polyak_cli.tensors import Float64

#: A rounding error leaves a squared length of so much of what it was computed from, where it is 0.
_ROUNDING = 64 * np.finfo(np.float64).eps
#: Bisections of an interval of length 2: as many as float64 can tell apart.
_BISECTIONS = 60


@dataclass(frozen=True, slots=True, eq=False)
class Gram:
    """The inner products of N checkpoints, oldest first, about the newest one.

    With x_k the checkpoints as vectors, d_k = x_k - x_N and s = 2^exponent:

    Attributes:
        inner: N x N, <d_i, d_j> / s^2; the last row and column are 0.
        along: N, <d_k, x_N> / s^2.
        square: <x_N, x_N> / s^2.
        size: elements of a vector.
        exponent: mostly 0; more where squares would overflow float64.
    """

    inner: Float64
    along: Float64
    square: float
    size: int
    exponent: int = 0

    @property
    def count(self) -> int:
        """How many checkpoints there are."""
        return len(self.inner)

    def rescale(self, exponent: int) -> Gram:
        """Return the same with a larger exponent; digits are lost only where they vanish."""
        shift = 2 * (self.exponent - exponent)
        if not shift:
            return self
        inner, along = np.ldexp(self.inner, shift), np.ldexp(self.along, shift)
        return Gram(inner, along, math.ldexp(self.square, shift), self.size, exponent)

    def normalise(self) -> Gram:
        """Return the products of the same vectors at a scale where no length overflows."""
        return replace(self, exponent=0)

    def plus(self, other: Gram) -> Gram:
        """Return the products of both parts of the vectors together."""
        exponent = max(self.exponent, other.exponent)
        a, b = self.rescale(exponent), other.rescale(exponent)
        return Gram(
            a.inner + b.inner, a.along + b.along, a.square + b.square, a.size + b.size, exponent
        )


def take_window(gram: Gram, first: int, end: int) -> Gram:
    """Return the products of the checkpoints ``first`` to ``end - 1`` alone, about their newest.

    Where they are near one another and far from the newest of all, rounding leaves an error of
    about 1e-16 of the square of that distance.
    """
    newest = end - 1
    inner, along = gram.inner, gram.along
    to_newest = inner[:, newest]
    about = inner - to_newest[:, None] - to_newest[None, :] + inner[newest, newest]
    beside = along - along[newest] + to_newest - inner[newest, newest]
    square = gram.square + 2 * float(along[newest]) + float(inner[newest, newest])
    kept = slice(first, end)
    return Gram(about[kept, kept], beside[kept], square, gram.size, gram.exponent)


def make_empty(count: int) -> Gram:
    """Return the products of vectors without an element."""
    return Gram(np.zeros((count, count)), np.zeros(count), 0.0, 0)


def make_gram(vectors: Float64) -> Gram:
    """Return the products of vectors in memory.

    Args:
        vectors: N x size, oldest first, finite, with squares that float64 holds.
    """
    newest = vectors[-1]
    differences = vectors - newest
    inner = differences @ differences.T
    return Gram(inner, differences @ newest, float(newest @ newest), vectors.shape[1])


def _root(gram: Gram, squares: Float64) -> Float64:
    """Return lengths from their squares; rounding may have left a square just below 0."""
    with np.errstate(over="ignore"):  # a length itself may be infinite in float64
        lengths: Float64 = np.ldexp(np.sqrt(np.maximum(squares, 0.0)), gram.exponent)
    return lengths


def _divide(part: float, whole: float) -> float | None:
    """Return a quotient, 0 of nothing by nothing, None where only the divisor is 0."""
    if part == 0:
        return 0.0
    return part / whole if whole > 0 else None


def share_equally(count: int) -> Float64:
    """Return the coefficients of the equal average."""
    return np.full(count, 1.0 / count)


# --- lengths and distances ------------------------------------------------------------------------


def norms(gram: Gram) -> Float64:
    """Return the Euclidean norm of each checkpoint."""
    return _root(gram, gram.square + 2 * gram.along + np.diag(gram.inner))


def distances(gram: Gram) -> Float64:
    """Return N x N, the distance of each two checkpoints.

    Where two are near one another and far from the newest, rounding leaves an error of about 1e-8
    times their distance from the newest.
    """
    squares = np.diag(gram.inner)
    apart = squares[:, None] + squares[None, :] - 2 * gram.inner
    # The newest's distances are given as they are; and a distance to itself is 0 exactly.
    np.fill_diagonal(apart, 0.0)
    noise = _ROUNDING * (squares[:, None] + squares[None, :])
    return _root(gram, np.where(apart > noise, apart, 0.0))


def cosines(gram: Gram) -> Float64:
    """Return N x N, the cosine of the angle of each two checkpoints' weights; NaN beside a zero."""
    along = gram.along
    products = gram.square + along[:, None] + along[None, :] + gram.inner
    lengths = np.sqrt(np.maximum(np.diag(products), 0.0))
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Float64 = np.clip(products / np.outer(lengths, lengths), -1.0, 1.0)
    return found


def norm_of_average(gram: Gram, coefficients: Sequence[float] | Float64) -> float:
    """Return the norm of a weighted average, of coefficients of any sign with the sum 1."""
    c = np.asarray(coefficients, np.float64)
    square = gram.square + 2 * float(c @ gram.along) + float(c @ gram.inner @ c)
    return float(_root(gram, np.array(square)))


def distances_to_average(gram: Gram, coefficients: Sequence[float] | Float64) -> Float64:
    """Return how far a weighted average is from each checkpoint.

    Args:
        gram: of the checkpoints.
        coefficients: oldest first, of any sign, with the sum 1.
    """
    offsets = np.asarray(coefficients, np.float64)[None, :] - np.eye(gram.count)
    return _measure(gram, offsets)


def distance_of_averages(
    gram: Gram, one: Sequence[float] | Float64, other: Sequence[float] | Float64
) -> float:
    """Return how far two weighted averages are apart."""
    return float(_measure(gram, (np.asarray(one) - np.asarray(other))[None, :])[0])


def _measure(gram: Gram, offsets: Float64) -> Float64:
    """Return the length of sum_k offset_k x_k, of rows of offsets with the sum 0 each."""
    squares = np.einsum("ik,kj,ij->i", offsets, gram.inner, offsets)
    scale = np.abs(offsets) @ np.sqrt(np.diag(gram.inner))
    return _root(gram, np.where(squares > _ROUNDING * scale**2, squares, 0.0))


# --- steps ----------------------------------------------------------------------------------------


def products_of_steps(gram: Gram) -> Float64:
    """Return N-1 x N-1, the inner products of the steps x_(k+1) - x_k, over s^2."""
    found: Float64 = np.diff(np.diff(gram.inner, axis=0), axis=1)
    return found


def lengths_of_steps(gram: Gram) -> Float64:
    """Return the length of each of the N-1 steps."""
    return np.diag(distances(gram), 1).copy()


def cosines_of_steps(gram: Gram) -> Float64:
    """Return the N-2 cosines of each step with the next; NaN where one of them has no length."""
    products = products_of_steps(gram)
    lengths = lengths_of_steps(gram.normalise())
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.diag(products, 1) / (lengths[:-1] * lengths[1:])
    return np.clip(np.where(np.isfinite(found), found, np.nan), -1.0, 1.0)


def jitter(gram: Gram) -> float | None:
    """Return the variance of noise whose steps would turn as much, over ||m||^2 of the equal mean.

    It is a sixth of the mean of ||x_(k+1) - 2 x_k + x_(k-1)||^2: independent noise of variance v
    has 6 v there, and a straight path 0.  None for fewer than three checkpoints, and where the mean
    is zero and they differ.
    """
    if gram.count < 3:
        return None
    products = products_of_steps(gram)
    squares = np.diag(products)
    turns = np.maximum(squares[:-1] + squares[1:] - 2 * np.diag(products, 1), 0.0)
    return _divide(float(np.mean(turns)) / 6, _square_of_mean(gram))


def mean_cosine(gram: Gram) -> float | None:
    """Return the mean cosine of each step with the next; None if none is known."""
    found = cosines_of_steps(gram)
    found = found[~np.isnan(found)]
    return float(found.mean()) if len(found) else None


# --- spread and components ------------------------------------------------------------------------


def center(gram: Gram, coefficients: Sequence[float] | Float64 | None = None) -> Float64:
    """Return N x N, <x_i - m, x_j - m> over s^2, with m the equal or a weighted mean."""
    c = share_equally(gram.count) if coefficients is None else np.asarray(coefficients, np.float64)
    offsets = np.eye(gram.count) - c[None, :]
    found: Float64 = offsets @ gram.inner @ offsets.T
    return (found + found.T) / 2


def spread(gram: Gram) -> float | None:
    """Return the mean of ||x_k - m||^2 over ||m||^2, with m the equal average of all.

    The spread of checkpoints that are all the same is 0, even if all are zero; None where the mean
    is zero and they differ.
    """
    equal = share_equally(gram.count)
    lengths = distances_to_average(gram.normalise(), equal)
    return _divide(float(np.mean(lengths**2)), _square_of_mean(gram))


def _square_of_mean(gram: Gram) -> float:
    """Return the squared norm of the equal average, over s^2."""
    equal = share_equally(gram.count)
    return gram.square + 2 * float(equal @ gram.along) + float(equal @ gram.inner @ equal)


class Components(NamedTuple):
    """The principal components of a run about its equal average.

    Attributes:
        shares: N, of the sum of all squared distances from the mean, largest first; all 0 where the
            checkpoints are the same.
        places: N x N, where checkpoint k stands in component j, as a distance from the mean.  The
            newest stands at 0 or more in each.
    """

    shares: Float64
    places: Float64


def find_components(gram: Gram) -> Components:
    """Return the principal components of the checkpoints."""
    centered = center(gram)
    # Only rounding is left of checkpoints that are all the same.
    noise = _ROUNDING * float(np.max(np.diag(gram.inner), initial=0.0))
    values, vectors = np.linalg.eigh(centered)
    values = np.where(values > noise, values, 0.0)[::-1]
    places = vectors[:, ::-1] * np.sqrt(values)
    places *= np.where(places[-1] < 0, -1.0, 1.0)
    total = float(values.sum())
    shares = values / total if total > 0 else values
    with np.errstate(over="ignore"):
        return Components(shares, np.ldexp(places, gram.exponent))


def place_average(components: Components, coefficients: Sequence[float] | Float64) -> Float64:
    """Return where a weighted average stands in each component."""
    found: Float64 = np.asarray(coefficients, np.float64) @ components.places
    return found


# --- how many checkpoints count -------------------------------------------------------------------


def correlate_neighbours(gram: Gram) -> float | None:
    """Return sum <e_k, e_(k+1)> / sum <e_k, e_k>, with e_k = x_k - mean; None if all are the same.

    This is the usual estimate of the correlation at lag one, with all elements taken together.  It
    is biased down, by about (1 + 4 r) / N; see `estimate_correlation`.
    """
    if gram.count < 2:
        return None
    centered = center(gram)
    variance = float(np.trace(centered))
    if not variance > _ROUNDING * float(np.max(np.diag(gram.inner))):
        return None
    return float(np.trace(centered, 1)) / variance


def estimate_correlation(gram: Gram) -> float | None:
    """Return the correlation r of neighbours, in [-1, 1], without the bias of a short run.

    The checkpoints are taken for N values of a process whose correlation at distance k is r^k.
    Then the expectations of both sums in `correlate_neighbours` are known for each r: the r is
    returned whose quotient of expectations is the one that was measured.  With many elements the
    quotient is close to that of the expectations.  1 means that they drift: the distances grow with
    the number of steps as those of a random walk do, or faster.

    Returns:
        None for fewer than three checkpoints, and where all are the same.
    """
    measured = correlate_neighbours(gram)
    if measured is None or gram.count < 3:
        return None
    lags = _lags(gram.count)
    if measured >= _expect_correlation(_walk(lags)):
        return 1.0
    low, high = -1.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if _expect_correlation(_correlate(middle, lags)) < measured:
            low = middle
        else:
            high = middle
    return high


def effective_number(
    gram: Gram, coefficients: Sequence[float] | Float64 | None = None
) -> float | None:
    """Return how many independent checkpoints would average noise as well.

    With r as of `estimate_correlation` it is 1 / sum_ij c_i c_j r^|i - j|.  For many checkpoints
    that count equally this is N (1 - r) / (1 + r) (Bayley and Hammersley, "The effective number of
    independent observations in an autocorrelated time series", 1946); for r = 0 it is the plan's
    1 / sum(c^2).  Above that where neighbours lie on opposite sides of the mean.

    Args:
        gram: of the checkpoints.
        coefficients: oldest first, of any sign, with the sum 1; equal ones if None.

    Returns:
        None where no correlation is known, and where neighbours are so opposed that nothing of the
        noise is left.
    """
    r = estimate_correlation(gram)
    if r is None:
        return None
    c = share_equally(gram.count) if coefficients is None else np.asarray(coefficients, np.float64)
    variance = float(c @ _correlate(r, _lags(gram.count)) @ c)
    return 1.0 / variance if variance > _ROUNDING else None


def _lags(count: int) -> Float64:
    """Return N x N, how many places two checkpoints are apart."""
    places = np.arange(count, dtype=np.float64)
    return np.abs(places[:, None] - places[None, :])


def _correlate(r: float, lags: Float64) -> Float64:
    """Return r^lag, which is 1 at lag 0 for every r."""
    found: Float64 = np.power(r, lags)
    return found


def _walk(lags: Float64) -> Float64:
    """Return what is left of r^lag as r goes to 1 and the mean is taken off: a random walk."""
    return -lags


def _expect_correlation(correlations: Float64) -> float:
    """Return the quotient of expectations; see `estimate_correlation`."""
    count = len(correlations)
    offsets = np.eye(count) - 1.0 / count
    centered = offsets @ correlations @ offsets
    return float(np.trace(centered, 1) / np.trace(centered))
