"""The scheme that gives a run at a constant learning rate the average of one whose rate decayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from polyak_cli.averaging.schemes.by_position import require_rising
from polyak_cli.averaging.schemes.decimals import compute_cosine, make_context

if TYPE_CHECKING:
    from decimal import Context, Decimal


def decay(positions: Sequence[float], shape: str) -> list[float]:
    """f(x_(i-1)) - f(x_i), newest f(x_N): merging in place of a decay of the learning rate.

    Tian et al. 2025, "WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging for LLM
    Pre-training".  A decay that begins at the oldest checkpoint multiplies the updates between two
    checkpoints by f, which falls from 1 to 0.  Where the rate was constant, the same is reached by

        theta_1 + sum_i f(x_i) (theta_i - theta_(i-1)),

    and sorting by checkpoint gives each its multiplier.  x_i is the part of the decay that is over
    at checkpoint i.  At even distances it is (i - 1) / N, as in Megatron-LM: the decay ends one
    distance after the newest.  At other distances that is the mean distance:
    x_i = (t_i - t_1) / (t_N - t_1) * (N - 1) / N.

    Args:
        positions: t, oldest first.
        shape: of f: "linear", 1 - x, which is the equal average at even distances; "1-sqrt",
            1 - sqrt(x), which counts the oldest most; or "cosine", (1 + cos(pi x)) / 2, which
            counts the middle most.
    """
    count = len(positions)
    if count == 1:
        return [1.0]
    require_rising(positions, "decay")
    context = make_context()
    oldest, *others = (context.create_decimal(t) for t in positions)
    length = context.multiply(context.subtract(others[-1], oldest), count)
    parts = (
        context.divide(context.multiply(context.subtract(t, oldest), count - 1), length)
        for t in others
    )
    left = [context.create_decimal(1), *(_SHAPES[shape](x, context) for x in parts)]
    shares = [*(context.subtract(a, b) for a, b in pairwise(left)), left[-1]]
    # N times as much, so that the equal average has the multipliers 1.
    return [float(context.multiply(share, count)) for share in shares]


def _fall_linearly(x: Decimal, context: Context) -> Decimal:
    return context.subtract(1, x)


def _fall_as_root(x: Decimal, context: Context) -> Decimal:
    return context.subtract(1, context.sqrt(x))


def _fall_as_cosine(x: Decimal, context: Context) -> Decimal:
    return context.divide(context.add(1, compute_cosine(x, context)), 2)


#: Shape -> f, of the part of the decay that is over.
_SHAPES: dict[str, Callable[[Decimal, Context], Decimal]] = {
    "linear": _fall_linearly,
    "1-sqrt": _fall_as_root,
    "cosine": _fall_as_cosine,
}
SHAPES = tuple(_SHAPES)
