"""The weighted mean that a scheme leads to: multipliers, and their sum that divides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from polyak_cli.errors import UsageError


class Mean(NamedTuple):
    """The rule of a weighted mean: ``(m_1 x_1 + m_2 x_2 + ...) / divisor``.

    Attributes:
        multipliers: one a checkpoint, oldest first, each finite, of any sign.
        divisor: their sum, rounded once, above 0.  It is 1.0 for averages whose record has no
            divisor: they were multiplied by the coefficients themselves.
    """

    multipliers: tuple[float, ...]
    divisor: float

    @property
    def coefficients(self) -> tuple[float, ...]:
        """The share of each checkpoint: multiplier / divisor, rounded once; the sum is 1."""
        return tuple(multiplier / self.divisor for multiplier in self.multipliers)

    def scale(self) -> Mean:
        """Return the same mean with a divisor above 1/2 and at most 1, for the arithmetic.

        Both sides are scaled by one power of two, which changes no digit.  Sums of float64 near the
        maximum overflow no sooner than with coefficients, as each multiplier is at most as large as
        its coefficient, and one checkpoint is multiplied by 1.
        """
        counted = [multiplier for multiplier in self.multipliers if multiplier]
        if len(counted) == 1:  # nothing is rounded, not even the smallest float64
            return Mean(tuple(float(m != 0) for m in self.multipliers), 1.0)
        fraction, exponent = math.frexp(self.divisor)
        exponent -= fraction == 0.5  # exactly a power of two becomes 1
        scaled = tuple(math.ldexp(m, -exponent) for m in self.multipliers)
        return Mean(scaled, math.ldexp(self.divisor, -exponent))


def make_mean(multipliers: Sequence[float]) -> Mean:
    """Return the mean that divides by the sum of its multipliers.

    Where the sum is negative, all signs are turned, which changes no quotient.

    Args:
        multipliers: finite, of any sign; their sum is not 0.

    Raises:
        UsageError: the sum is 0, or so near to it that a coefficient would be infinite.
    """
    # The sum of huge custom coefficients would overflow; a power of two scales them exactly.
    large = max(map(abs, multipliers)) > 2.0**900
    own = tuple(math.ldexp(m, -200) if large else m for m in multipliers)
    divisor = math.fsum(own)
    if divisor < 0.0:
        own, divisor = tuple(-m if m else 0.0 for m in own), -divisor
    # Above 1 the quotient of float64 is infinite where the exact one is too large.
    if divisor == 0.0 or not all(math.isfinite(m / divisor) for m in own):
        raise UsageError(
            f"the multipliers of the checkpoints have the sum {divisor:g}, by which they cannot be "
            f"divided: {', '.join(f'{m:g}' for m in multipliers)}; expected another sum than 0"
        )
    return Mean(own, divisor)


def sum_absolutes(coefficients: Sequence[float]) -> float:
    """Return the sum of the absolute values of coefficients, whose sum is 1.

    It is 1 if none is negative.  Above that the average lies outside of its checkpoints, and their
    noise counts more than in one checkpoint alone: the error of each is multiplied by at most this.
    """
    return math.fsum(map(abs, coefficients))


def is_signed(multipliers: Sequence[float]) -> bool:
    """Return whether some checkpoint counts negatively, so that the average extrapolates."""
    return any(m < 0.0 for m in multipliers)


def effective_number(coefficients: Sequence[float]) -> float:
    """Return how many equally counted checkpoints would average noise as well: 1 / sum(c^2).

    Args:
        coefficients: normalised, in any order, not none at all.

    Raises:
        ZeroDivisionError: there are none, or all are zero.
    """
    return 1.0 / math.fsum(c * c for c in coefficients)
