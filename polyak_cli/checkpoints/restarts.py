"""Tell from file times whether a run was started again over an earlier one, and which part is new.

Knows only epochs and times; no name and no file.  A run that is started again replaces the
checkpoints of the earlier run one by one, so later epochs are older until it has passed them.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

#: Files written within this many seconds may be copies, whose order says nothing of a run.
COPYING_SECONDS = 60.0
#: The times of fewer checkpoints show a pattern only where runs lie far apart in time.
_ENOUGH = 4
#: More runs than this never write into one folder; what looks so are times in no order.
_MOST_LAYERS = 12
#: A pause between two runs is this many times as long as an epoch, where few files must decide.
_PAUSE = 3.0


@dataclass(frozen=True, slots=True)
class Restart:
    """What was found; indices into the run, in order of epoch.

    Attributes:
        current: of the run that was written last, with the earlier checkpoints it went on from.
        written: those of ``current`` that it certainly wrote itself.
        older: checkpoint -> is it older than one of an earlier epoch?
    """

    current: tuple[int, ...]
    written: tuple[int, ...]
    older: tuple[bool, ...]


def find_restart(
    epochs: Sequence[int], times: Sequence[float], order: Sequence[int]
) -> Restart | None:
    """Find out whether a run was started again and has not passed the earlier one yet.

    Args:
        epochs: of all checkpoints in a folder, rising.
        times: when each was written, in seconds.
        order: indices in the order of the files' names, in which many tools copy.

    Returns:
        None if the times show nothing: each epoch is newer than the one before, or the files may
        be copies.
    """
    if len(times) < 3:
        return None
    ranks = _rank(times)
    layers = _split_layers(ranks)
    if layers is None or len(layers) < 2:
        return None
    touched: set[int] = set()
    if len(layers) > 2:
        # A single file that is newer than its neighbours was copied or touched by chance.
        touched = {layer[0] for layer in layers[:-1] if len(layer) == 1}
        left = [k for k in range(len(ranks)) if k not in touched]
        again = _split_layers([ranks[k] for k in left])
        layers = [[left[k] for k in layer] for layer in again or ()]
        if {ranks[k] for k in touched} & {ranks[k] for layer in layers[:-1] for k in layer}:
            return None  # files here and there were touched at one time
    if len(layers) < 2 or not _is_pattern(layers, epochs, times):
        return None
    if _is_in_order_of_names(layers, times, [k for k in order if k not in touched]):
        pause = _is_separated(layers, epochs, times)
        if not pause or _count_inversions([ranks[k] for k in order]) == 0:
            return None
    return _describe(layers, ranks, touched)


def _rank(times: Sequence[float]) -> list[int]:
    """Return numbers in the order of the times, equal ones for times within a minute."""
    ranks = [0] * len(times)
    rank, first = 0, min(times)
    for k in sorted(range(len(times)), key=lambda k: times[k]):
        if times[k] - first > COPYING_SECONDS:
            rank, first = rank + 1, times[k]
        ranks[k] = rank
    return ranks


def _split_layers(ranks: Sequence[int]) -> list[list[int]] | None:
    """Return the fewest runs that could have left these times, newest first; None if they are many.

    The newest run wrote consecutive epochs, one after another, after everything else.  Without
    them the rest is what the runs before had left.
    """
    rest = list(range(len(ranks)))
    layers: list[list[int]] = []
    while rest:
        if len(layers) == _MOST_LAYERS:
            return None
        values = [ranks[k] for k in rest]
        end = max(range(len(rest)), key=lambda k: (values[k], k))
        after = max(values[end + 1 :], default=-1)
        highest = [-1]  # of the values before each place
        for value in values[:end]:
            highest.append(max(highest[-1], value))
        start = end
        while start and values[start - 1] <= values[start] and values[start - 1] > after:
            start -= 1
        while values[start] < highest[start]:
            start += 1
        layers.append(rest[start : end + 1])
        rest = rest[:start] + rest[end + 1 :]
    return layers


def _is_pattern(
    layers: Sequence[Sequence[int]], epochs: Sequence[int], times: Sequence[float]
) -> bool:
    """Return whether so few runs explain so many times that chance does not."""
    count = sum(map(len, layers))
    newest = layers[0]
    if len(newest) == 1 and newest[0] == min(map(min, layers)):
        return False  # the first was touched, or a run has begun of which nothing can be said yet
    if len(layers) > 2:
        return count >= _ENOUGH * (len(layers) - 1) or _is_separated(layers, epochs, times)
    if count > _ENOUGH:
        return True
    resumed = newest[0] > min(layers[1])
    plain = resumed or (len(newest) > 1 and len(layers[1]) > 1)
    return (count == _ENOUGH and plain) or (
        len(newest) > 1 and _is_separated(layers, epochs, times)
    )


def _is_separated(
    layers: Sequence[Sequence[int]], epochs: Sequence[int], times: Sequence[float]
) -> bool:
    """Return whether each run began a good while after the one before had ended."""
    steps = [
        (times[b] - times[a]) / max(1, epochs[b] - epochs[a])
        for layer in layers
        for a, b in pairwise(layer)
    ]
    pause = max(COPYING_SECONDS, _PAUSE * max(steps, default=0.0))
    return bool(steps) and all(
        min(times[k] for k in newer) - max(times[k] for k in older) >= pause
        for newer, older in pairwise(layers)
    )


def _is_in_order_of_names(
    layers: Sequence[Sequence[int]], times: Sequence[float], order: Sequence[int]
) -> bool:
    """Return whether the files seem to have been copied by name: model_10 before model_9."""
    if list(order) == sorted(order):  # also the order of epochs, which these times are not in
        return False
    # Training may have gone on after the copying.
    last = max(map(max, layers))
    gone_on = set(layers[0]) if last in layers[0] else set()
    copied = [times[k] for k in order if k not in gone_on]
    # Tools that copy several files at a time finish a few of them in another order.
    return _count_inversions(copied) <= len(copied) // 2


def _count_inversions(values: Sequence[float]) -> int:
    """Return how many pairs of values stand in falling order."""
    seen: list[float] = []
    count = 0
    for value in values:
        place = bisect.bisect_right(seen, value)
        count += len(seen) - place
        seen.insert(place, value)
    return count


def _describe(layers: Sequence[Sequence[int]], ranks: Sequence[int], touched: set[int]) -> Restart:
    """Return which checkpoints are of the newest run, and which are older than earlier epochs."""
    newest = layers[0]
    current = {*range(newest[0], newest[-1] + 1)} & {*newest, *touched}
    passed: list[int] = []
    lowest = newest[0]
    for k in range(newest[0] - 1, -1, -1):
        passed.append(k)
        if k not in touched:
            if ranks[k] > ranks[lowest]:  # of another run, which this one did not go on from
                passed.clear()
                break
            lowest = k
            current.update(passed)
            passed.clear()
    current.update(passed)
    older: list[bool] = []
    highest = -1
    for k, rank in enumerate(ranks):
        older.append(rank < highest and k not in touched)
        if k not in touched:
            highest = max(highest, rank)
    return Restart(tuple(sorted(current)), tuple(newest), tuple(older))
