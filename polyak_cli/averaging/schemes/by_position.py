"""Schemes that look at how far into the run each checkpoint was saved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from polyak_cli.averaging.schemes.decimals import make_context
from polyak_cli.errors import UsageError


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


def power(positions: Sequence[float], sigma: float) -> list[float]:
    """(t_i^(g+1) - t_(i-1)^(g+1)) / t_N^(g+1), with g = gamma(sigma) and t the positions.

    The power-function EMA of a whole run, where each checkpoint represents the steps since the one
    before (Karras et al. 2024, as for `gamma`).  The oldest represents as many steps as the next
    one, but none before step 0.
    """
    _require_rising(positions)
    if len(positions) == 1:
        return [1.0]
    start = max(0.0, positions[0] - (positions[1] - positions[0]))
    context = make_context()
    exponent = context.add(context.create_decimal(gamma(sigma)), 1)
    end = context.create_decimal(positions[-1])
    powers = [
        context.power(context.divide(context.create_decimal(t), end), exponent)
        for t in (start, *positions)
    ]
    return [float(context.subtract(upper, lower)) for lower, upper in pairwise(powers)]


def _require_rising(positions: Sequence[float]) -> None:
    for position in positions:
        if not (math.isfinite(position) and position > 0.0):
            raise UsageError(
                f"--scheme power: a checkpoint has position {position:g}; expected finite "
                "positions above 0"
            )
    for earlier, later in pairwise(positions):
        if not earlier < later:
            raise UsageError(
                f"--scheme power: position {later:g} follows {earlier:g}; expected positions that "
                "rise from the oldest checkpoint to the newest"
            )
