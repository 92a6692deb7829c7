"""Schemes that look at the age of a checkpoint only: how many are newer."""

from __future__ import annotations

from collections.abc import Sequence

from polyak_cli.averaging.schemes.decimals import make_context


def equal(positions: Sequence[float]) -> list[float]:
    """1 for each: the plain Polyak-Ruppert average of the checkpoints."""
    return [1.0] * len(positions)


def linear(positions: Sequence[float]) -> list[float]:
    """N - a for age a: 1, 2, ..., N from the oldest to the newest (the Keras tutorial's)."""
    count = len(positions)
    return [float(count - age) for age in _ages(count)]


def exp(positions: Sequence[float], alpha: float) -> list[float]:
    """e^(-a / alpha) for age a: falls by e every ``alpha`` checkpoints (the tutorial's).

    The tutorial has a + 1 in place of a, a factor common to all, which the division cancels.
    Without it the newest has exactly 1, and no alpha is so small that all would be 0.
    """
    context = make_context()
    width = context.create_decimal(alpha)
    return [float(context.exp(context.divide(-age, width))) for age in _ages(len(positions))]


def _ages(count: int) -> range:
    """The ages of ``count`` checkpoints, oldest first: count - 1 down to 0."""
    return range(count - 1, -1, -1)
