"""Choose checkpoints by their distances: at least so far apart, or so many of them, evenly spaced.

Knows only epochs and their order; no directory and no metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from polyak_cli.checkpoints.listing import Checkpoint
from polyak_cli.checkpoints.ordering import describe_epochs, place_in_run, require_epoch
from polyak_cli.errors import CheckpointError, choose_verb, shown


def keep_apart(
    candidates: Sequence[Checkpoint], spacing: int
) -> tuple[list[Checkpoint], list[str]]:
    """Return the newest checkpoint and those before it that are far enough apart, and a note.

    Each is compared with the next newer one that is kept, so as many are kept as can be.

    Args:
        candidates: oldest first, at least one.
        spacing: the least distance, in epochs or steps, whichever their names have.

    Raises:
        CheckpointError: an epoch is unknown, or they are not in order of their epochs.
    """
    epochs = require_rising_epochs(candidates, "--min-spacing")
    kept = [len(candidates) - 1]
    for place in range(len(candidates) - 2, -1, -1):
        if epochs[kept[-1]] - epochs[place] >= spacing:
            kept.append(place)
    chosen = [candidates[place] for place in reversed(kept)]
    left = len(candidates) - len(chosen)
    if not left:
        return chosen, []
    return chosen, [
        f"--min-spacing {spacing} keeps {len(chosen)} of {describe_epochs(candidates)}; the "
        f"{'other is' if left == 1 else f'{left} others are'} less than {spacing} from the next "
        "newer one that is kept"
    ]


def require_rising_epochs(candidates: Sequence[Checkpoint], option: str) -> list[int]:
    """Return the epoch of each checkpoint, for an option that measures distances.

    Raises:
        CheckpointError: an epoch is unknown, or they are not in order of their epochs.
    """
    epochs = [require_epoch(one, option) for one in candidates]
    for (earlier, before), (later, after) in pairwise(zip(candidates, epochs, strict=True)):
        if not before < after:
            raise CheckpointError(
                f"{option}: {shown(later.path)} (epoch {after}) comes after "
                f"{shown(earlier.path)} (epoch {before}); expected files in order of their "
                "epochs: leave out --order given"
            )
    return epochs


def take_evenly(
    candidates: Sequence[Checkpoint], ordered: Sequence[Checkpoint], count: int, growing: bool
) -> tuple[list[Checkpoint], list[str]]:
    """Return so many checkpoints, as evenly spaced as they can be, and a note.

    The newest and the oldest are kept.  Distances are in epochs, or in checkpoints where not every
    epoch is known.

    Args:
        candidates: oldest first, at least one.
        ordered: all checkpoints of the run.
        count: how many.
        growing: fewer are no error, as the run is still training.

    Raises:
        CheckpointError: there are fewer.
    """
    if count > len(candidates) and not growing:
        raise CheckpointError(
            f"--target-count {count}, but there {choose_verb(len(candidates))} only "
            f"{describe_epochs(candidates)} to choose from; ask for fewer"
        )
    if count >= len(candidates):
        return [*candidates], []
    positions = place_in_run(candidates, ordered)
    places = _place_evenly(positions, count)
    gaps = sorted(positions[b] - positions[a] for a, b in pairwise(places))
    apart = f", {_write_range(gaps)} apart" if gaps else ""
    return [candidates[place] for place in places], [
        f"--target-count {count} keeps {count} of {describe_epochs(candidates)}{apart}"
    ]


def _place_evenly(positions: Sequence[float], count: int) -> list[int]:
    """Return the places of so many positions, both ends among them, with the most equal gaps.

    The sum of all gaps is given by the ends, so the sum of their squares is least where they differ
    least.  Of choices that are as good, it is the one with the newer checkpoints.

    Args:
        positions: rising.
        count: from 1 to their number.
    """
    newest = len(positions) - 1
    if count == 1:
        return [newest]
    # costs[j]: of the gaps from j to the newest, with one checkpoint more in each round.
    costs = [(positions[newest] - position) ** 2 for position in positions]
    rounds: list[list[int]] = []  # the next place after each, where so many follow
    for following in range(2, count):
        costs, after = _add_gap(positions, costs, following)
        rounds.append(after)
    places = [0]
    for after in reversed(rounds):
        places.append(after[places[-1]])
    return [*places, newest]


def _add_gap(
    positions: Sequence[float], costs: Sequence[float], following: int
) -> tuple[list[float], list[int]]:
    """Return the least cost from each place with one gap more, and the place where that gap ends.

    Squares of gaps are such that a later beginning never has an earlier best end.  So the end of
    the middle place bounds those of the others, and halving needs n log n steps for n places.
    """
    newest = len(positions) - 1
    best = [float("inf")] * len(positions)
    ends = [newest] * len(positions)
    # Begin and end of a range of places, and the bounds of the ends of its gaps.
    waiting = [(0, newest - following, 1, newest - following + 1)]
    while waiting:
        first, last, low, high = waiting.pop()
        if first > last:
            continue
        middle = (first + last) // 2
        for end in range(max(low, middle + 1), high + 1):
            cost = (positions[end] - positions[middle]) ** 2 + costs[end]
            if cost <= best[middle]:
                best[middle], ends[middle] = cost, end
        waiting.append((first, middle - 1, low, ends[middle]))
        waiting.append((middle + 1, last, ends[middle], high))
    return best, ends


def _write_range(gaps: Sequence[float]) -> str:
    low, high = gaps[0], gaps[-1]
    return f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"
