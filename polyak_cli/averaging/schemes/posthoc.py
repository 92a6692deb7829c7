"""An EMA of any width, after training, from EMAs that were saved while it ran."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from operator import mul
from typing import NamedTuple

from polyak_cli.averaging.schemes.by_position import gamma
from polyak_cli.averaging.schemes.decimals import make_context
from polyak_cli.errors import UsageError

#: The widths of which there are snapshots, in words.
WIDTHS = "a sigma from 0.001 to below 1/sqrt(12) = 0.288675"


def is_width(sigma: float) -> bool:
    """Return whether a sigma is one of `WIDTHS`; the largest would be the equal mean."""
    return sigma >= 0.001 and 12.0 * sigma * sigma < 1.0


class Snapshot(NamedTuple):
    """An EMA of power-function profile, as it was at one step."""

    step: float
    sigma: float


class Solution(NamedTuple):
    """How snapshots are combined, and what that misses.

    Attributes:
        multipliers: one a snapshot, of any sign; they are divided by their sum.
        error: norm of the combined profile minus the one asked for, as a part of the latter's.
    """

    multipliers: tuple[float, ...]
    error: float


def posthoc(positions: Sequence[float], sigma: float, sigmas: Sequence[float]) -> list[float]:
    """The EMA of width sigma at the newest step, from EMAs of other widths: x with A x = b.

    Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models",
    algorithm 3.  An EMA of exponent g at step T counts step t by p(t) = (g + 1) t^g / T^(g+1).  Of
    all combinations of the snapshots' profiles p_i, A x = b gives the one nearest to the profile r
    that is asked for, in least squares: A_ij = <p_i, p_j>, b_i = <p_i, r>.

    Args:
        positions: step of each snapshot.
        sigma: relative width of the EMA to make.
        sigmas: relative width of each snapshot.

    Returns:
        One each, of any sign.  A snapshot that is itself what is asked for counts 1.

    Raises:
        UsageError: there is only one snapshot, or two are the same EMA.
    """
    return [*combine(positions, sigma, sigmas).multipliers]


def combine(positions: Sequence[float], sigma: float, sigmas: Sequence[float]) -> Solution:
    """Return how snapshots are combined, and what that misses; see `posthoc`."""
    if len(sigmas) != len(positions):
        raise UsageError(
            f"--scheme posthoc needs the sigma of each snapshot; found {len(sigmas)} of "
            f"{len(positions)}"
        )
    stored = tuple(map(Snapshot, positions, sigmas))
    for place, one in enumerate(stored):
        if not (0.0 < one.step < math.inf and is_width(one.sigma)):
            raise UsageError(
                f"--scheme posthoc: a snapshot has step {one.step:g} and sigma {one.sigma:g}; "
                f"expected a step above 0, and {WIDTHS}; leave it out with --exclude"
            )
        if one in stored[:place]:
            raise UsageError(
                f"--scheme posthoc: two snapshots have sigma {one.sigma:g} at step {one.step:g}; "
                "leave one out with --exclude"
            )
    target = Snapshot(max(positions), sigma)
    if target in stored:
        return Solution(tuple(float(one == target) for one in stored), 0.0)
    if len(stored) == 1:
        raise UsageError(
            f"--scheme posthoc: one snapshot, of sigma {sigmas[0]:g}, gives no other EMA; name "
            "snapshots of other sigmas or steps too"
        )
    return _solve(stored, target)


@lru_cache(maxsize=4)  # a plan asks several times
def _solve(stored: tuple[Snapshot, ...], target: Snapshot) -> Solution:
    """Solve the normal equations by the Cholesky decomposition of A, with one refinement.

    In float64, one operation after the other: LAPACK's order, and so its last bits, depend on the
    machine.  `math.fsum` rounds each sum once.
    """
    *rows, last = _multiply_all((*stored, target))
    right, norm = last[:-1], last[-1]
    whole = [[*row, *(below[k] for below in rows[k + 1 :])] for k, row in enumerate(rows)]
    lower = _decompose(rows)
    found = _substitute(lower, right)
    missing = [math.fsum((b, *map(mul, row, map(float.__neg__, found))))
               for row, b in zip(whole, right, strict=True)]  # fmt: skip
    found = [x + more for x, more in zip(found, _substitute(lower, missing), strict=True)]
    total = math.fsum(found)
    shares = [x / total for x in found]
    # |sum x_i p_i - r|^2 = x'A x - 2 b'x + <r, r>
    images = [math.fsum(map(mul, row, shares)) - 2.0 * b
              for row, b in zip(whole, right, strict=True)]  # fmt: skip
    square = math.fsum((norm, *map(mul, images, shares)))
    return Solution(tuple(found), math.sqrt(max(0.0, square) / norm))


def _multiply_all(snapshots: Sequence[Snapshot]) -> list[list[float]]:
    """Return the inner products of the profiles of snapshots, of each with itself and those before.

    <p_a, p_b> = (g_a + 1) (g_b + 1) / (g_a + g_b + 1) (t / T)^g / T, where t is the earlier of both
    steps, T the later one, and g the exponent of the later.  Steps are parts of the newest.
    """
    context = make_context()
    end = max(one.step for one in snapshots)
    steps = [one.step / end for one in snapshots]
    logarithms = [context.ln(context.create_decimal(step)) for step in steps]
    exponents = [gamma(one.sigma) for one in snapshots]
    exact = [context.create_decimal(exponent) for exponent in exponents]

    def multiply(a: int, b: int) -> float:
        early, late = (a, b) if steps[a] < steps[b] else (b, a)
        distance = context.subtract(logarithms[early], logarithms[late])
        power = float(context.exp(context.multiply(exact[late], distance)))
        widths = (exponents[a] + 1.0) / (exponents[a] + exponents[b] + 1.0)
        return widths * (exponents[b] + 1.0) * power / steps[late]

    return [[multiply(a, b) for b in range(a + 1)] for a in range(len(snapshots))]


def _decompose(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return L with A = L L', given the rows of A up to the diagonal.

    Raises:
        UsageError: two profiles are alike to all digits.
    """
    lower: list[list[float]] = []
    for row in rows:
        own: list[float] = []
        for k, a in enumerate(row[:-1]):
            own.append((a - math.fsum(map(mul, own, lower[k]))) / lower[k][k])
        pivot = row[-1] - math.fsum(map(mul, own, own))
        if not pivot > 0.0:
            raise UsageError(
                "--scheme posthoc: two snapshots are too alike for coefficients of their own; "
                "leave one out with --exclude"
            )
        lower.append([*own, math.sqrt(pivot)])
    return lower


def _substitute(lower: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    """Return x with L L' x = b."""
    found: list[float] = []
    for row, b in zip(lower, right, strict=True):
        found.append((b - math.fsum(map(mul, found, row))) / row[-1])
    for k in range(len(found) - 1, -1, -1):
        found[k] /= lower[k][k]
        for j in range(k):
            found[j] -= lower[k][j] * found[k]
    return found
