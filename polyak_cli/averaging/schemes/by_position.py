"""Schemes that look at how far into the run each checkpoint was saved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from polyak_cli.averaging.schemes.decimals import make_context
from polyak_cli.errors import UsageError

if TYPE_CHECKING:
    from decimal import Context, Decimal

#: Significant digits of `power`: the integrals of neighbours 1e-12 apart differ in few of them.
_POWER_DIGITS = 80


def gamma(sigma: float) -> float:
    """Return the exponent of the power-function EMA whose relative width is ``sigma``.

    It is the largest real root of x^3 + 7x^2 + (16 - 1/sigma^2)x + (12 - 1/sigma^2) (Karras et al.
    2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", post-hoc EMA).

    Args:
        sigma: more than 0, less than 1/sqrt(12).

    Returns:
        The exponent, at least 0; infinity where it exceeds float64 (sigma below about 1e-308).
    """
    # With x = y / sigma the root lies in (0, 1) and no term can overflow.  To the right of it the
    # cubic rises and is convex, so Newton's steps from y = 1 fall towards it and never jump over.
    b, c, d = 7.0 * sigma, 16.0 * sigma * sigma - 1.0, (12.0 * sigma * sigma - 1.0) * sigma
    y = 1.0
    while True:
        value = ((y + b) * y + c) * y + d
        slope = (3.0 * y + 2.0 * b) * y + c
        lower = y - value / slope
        if not 0.0 < lower < y:
            return y / sigma
        y = lower


def power(
    positions: Sequence[float], sigma: float | None = None, ema_half_life: float | None = None
) -> list[float]:
    """The power-function EMA of every step, interpolated between checkpoints.

    An EMA of every step counts the step t by the density (g+1) t^g / T^(g+1), with g = gamma(sigma)
    and T the newest position (Karras et al. 2024, as for `gamma`).  Between two checkpoints the
    weights of the model are not known; their best estimate, exact on a straight line and the
    expected value of a random walk, lies on the line between the two.  So checkpoint i counts by
    the integral of the density times a hat, which is 1 at t_i and falls to 0 at its neighbours.

    Before the oldest checkpoint the estimate is that one.  It represents as many steps before it as
    lie between it and the next one, but none before step 0: what is older is not averaged.

    Args:
        positions: as for all schemes; they must rise.
        sigma: the relative width.
        ema_half_life: in place of ``sigma``, the half-life at the end of the run.  There the EMA
            multiplies what it has by (1 - 1/T)^(g+1) in one step, near 2^(-1/H) for
            g + 1 = T ln(2) / H; so h = 0.05 T in every step is torchtitan's EMA.  A longer one than
            `find_longest_half_life` counts every step alike.

    Raises:
        UsageError: the positions do not rise.
    """
    require_rising(positions, "power")
    if len(positions) == 1:
        return [1.0]
    context = make_context(_POWER_DIGITS)
    exponent = _find_exponent(context, positions[-1], sigma, ema_half_life)
    start = max(0.0, positions[0] - (positions[1] - positions[0]))
    end = context.create_decimal(positions[-1])
    times = [context.divide(context.create_decimal(t), end) for t in (start, *positions)]
    # With T = 1, the integral of the density up to t is t^(g+1), and that of t times the density
    # is (g+1) / (g+2) t^(g+2).  The first factor is 1 - 1/(g+2), also where g is infinite.
    masses = [context.power(t, exponent) for t in times]
    ratio = context.subtract(1, context.divide(1, context.add(exponent, 1)))
    moments = [
        context.multiply(ratio, context.multiply(t, mass))
        for t, mass in zip(times, masses, strict=True)
    ]
    found = [context.subtract(masses[1], masses[0])]
    for place in range(1, len(positions)):
        left, right = times[place], times[place + 1]
        mass = context.subtract(masses[place + 1], masses[place])
        moment = context.subtract(moments[place + 1], moments[place])
        # Of each step in between, (t - left) / (right - left) counts for the newer checkpoint.
        newer = context.divide(
            context.subtract(moment, context.multiply(left, mass)), context.subtract(right, left)
        )
        # Rounding alone can leave less than nothing, or more than there is.
        newer = min(max(newer, context.create_decimal(0)), mass)
        found[-1] = context.add(found[-1], context.subtract(mass, newer))
        found.append(newer)
    return [float(one) for one in found]


def _find_exponent(
    context: Context, end: float, sigma: float | None, half_life: float | None
) -> Decimal:
    """Return g + 1, from the relative width or from the half-life at the end."""
    if half_life is None:
        return context.add(context.create_decimal(gamma(sigma or 0.0)), 1)
    logarithm = context.multiply(context.create_decimal(end), context.ln(context.create_decimal(2)))
    # Below 1, the oldest steps would count most.  A run that has only begun is that short.
    return max(
        context.divide(logarithm, context.create_decimal(half_life)), context.create_decimal(1)
    )


def find_longest_half_life(end: float) -> float:
    """Return T ln(2), the half-life of `power` at which every step up to ``end`` counts alike."""
    return end * math.log(2.0)


def require_rising(positions: Sequence[float], scheme: str) -> None:
    """Refuse positions that are not finite, above 0 and rising.

    Raises:
        UsageError: names the scheme and the position.
    """
    for position in positions:
        if not (math.isfinite(position) and position > 0.0):
            raise UsageError(
                f"--scheme {scheme}: a checkpoint has position {position:g}; expected finite "
                "positions above 0"
            )
    for earlier, later in pairwise(positions):
        if not earlier < later:
            raise UsageError(
                f"--scheme {scheme}: position {later:g} follows {earlier:g}; expected positions "
                "that rise from the oldest checkpoint to the newest"
            )
