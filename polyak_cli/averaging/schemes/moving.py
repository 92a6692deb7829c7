"""Exponential moving averages of the checkpoints: debiased, or as they run during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from polyak_cli.averaging.schemes.by_position import require_rising
from polyak_cli.averaging.schemes.decimals import make_context

if TYPE_CHECKING:
    from decimal import Context, Decimal


class _Update(NamedTuple):
    """One update of a moving average: it becomes ``kept`` x itself + ``added`` x the checkpoint.

    The sum is 1; both are there because the smaller one would lose its digits in a subtraction.
    """

    kept: Decimal
    added: Decimal


def ema(
    positions: Sequence[float],
    decay: float | None = None,
    ema_half_life: float | None = None,
    from_first: bool = False,
    ramp: str | None = None,
) -> list[float]:
    """decay^a for age a: the exponential moving average, debiased.

    An average started from the oldest checkpoint would count that one far too much; dividing by the
    sum of the powers, which normalising does, removes this bias (Kingma & Ba 2015, section 3).
    Equals ``exp`` with alpha = -1 / ln(decay).

    Args:
        positions: as for all schemes; only half-lives look at the values.
        decay: the factor of the average in each update.
        ema_half_life: in place of ``decay``: an update after d steps has the factor
            2^(-d / half-life).  Without bias, the oldest checkpoint counts as if the update before
            it had been as long ago as the next one is ahead, but not before step 0.
        from_first: start from the oldest checkpoint, with the bias, as an EMA in training does.
        ramp: the rule by which smaller factors come first, a name in `RAMPS`; it starts from the
            oldest checkpoint too.

    Raises:
        UsageError: there is a half-life, and the positions do not rise.
    """
    context = make_context()
    if decay is not None and not from_first and ramp is None:
        # 0^0 cannot come up: decay is more than 0.
        factor = context.create_decimal(decay)
        return [float(context.power(factor, age)) for age in range(len(positions) - 1, -1, -1)]
    if ema_half_life is not None:
        require_rising(positions, "ema")
    gaps = [later - earlier for earlier, later in pairwise(positions)]
    updates = [_update(context, gap, decay, ema_half_life) for gap in gaps]
    if from_first or ramp is not None:
        if ramp is not None:  # keeps less of the first averages
            limits = [RAMPS[ramp](context, k, positions) for k in range(1, len(positions))]
            updates = [min(pair) for pair in zip(updates, limits, strict=True)]
        return [float(one) for one in _unroll(context, updates)]
    if not gaps:
        return [1.0]
    oldest = _update(context, min(positions[0], gaps[0]), decay, ema_half_life)
    _, *found = _unroll(context, [oldest, *updates])  # without what was there before all updates
    # A factor common to all, so that evenly spaced checkpoints count 1, decay, decay^2, ...
    return [float(context.divide(one, updates[-1].added)) for one in found]


def _unroll(context: Context, updates: Sequence[_Update]) -> list[Decimal]:
    """Return how much what was there before the updates counts in the end, and then each update."""
    share = context.create_decimal(1)
    found = []
    for update in reversed(updates):
        found.append(context.multiply(update.added, share))
        share = context.multiply(update.kept, share)
    return [share, *reversed(found)]


def _update(
    context: Context, steps: float, decay: float | None, half_life: float | None
) -> _Update:
    """Return the update after some steps: by a half-life, or by a decay whatever the steps."""
    if half_life is None:
        kept = context.create_decimal(decay or 0.0)
        return _Update(kept, context.subtract(1, kept))
    halvings = context.divide(context.create_decimal(steps), context.create_decimal(half_life))
    kept = context.power(2, context.minus(halvings))
    if halvings > context.create_decimal("1e-18"):
        return _Update(kept, context.subtract(1, kept))
    return _Update(kept, context.multiply(halvings, context.ln(context.create_decimal(2))))


def _ramp_like_tfa(context: Context, place: int, _: Sequence[float]) -> _Update:
    """(1 + t) / (10 + t) after t updates: TensorFlow Addons, diffusers' EMAModel."""
    whole = context.create_decimal(10 + place)
    return _Update(context.divide(1 + place, whole), context.divide(9, whole))


def _ramp_like_ema_pytorch(context: Context, place: int, _: Sequence[float]) -> _Update:
    """1 - (1 + t)^(-2/3) after t updates: ema-pytorch, timm and diffusers as they are set."""
    power = context.divide(context.create_decimal(-2), 3)
    added = context.power(1 + place, power)
    return _Update(context.subtract(1, added), added)


def _ramp_like_edm2(context: Context, place: int, positions: Sequence[float]) -> _Update:
    """A half-life of 0.09 t at step t: the traditional EMA of EDM2 (Karras et al. 2024)."""
    steps = positions[place] - positions[place - 1]
    return _update(context, steps, None, 0.09 * positions[place])


#: Name of each ramp -> its function of the number of updates before this one, and the positions.
RAMPS: Mapping[str, Callable[[Context, int, Sequence[float]], _Update]] = {
    "tfa": _ramp_like_tfa,
    "ema-pytorch": _ramp_like_ema_pytorch,
    "edm2": _ramp_like_edm2,
}
