"""Schemes over running means: each file holds an average of the run already, not its weights."""

from __future__ import annotations

from collections.abc import Sequence

from polyak_cli.averaging.schemes.by_position import require_rising
from polyak_cli.errors import UsageError


def window(positions: Sequence[float]) -> list[float]:
    """-s for the oldest, e for the newest, 0 between: the mean of the weights after s up to e.

    File t holds C_t, the plain mean of the weights over the steps 1 ... t, as icefall's
    ``model_avg`` does.  So e C_e - s C_s is the sum over the steps s + 1 ... e, and

        (e C_e - s C_s) / (e - s)

    their mean: `average_checkpoints_with_averaged_model` of icefall.  The difference e - s, which
    divides, is the sum of the multipliers.

    Args:
        positions: of the files, in steps, oldest first.

    Raises:
        UsageError: there is only one file, or the steps do not rise.
    """
    if len(positions) < 2:
        raise UsageError(
            "--scheme window takes the running means of two files, from the start and the end of "
            "the window; there is one. Name the older one too, or raise --last"
        )
    require_rising(positions, "window")
    return [-positions[0], *(0.0 for _ in positions[1:-1]), positions[-1]]
