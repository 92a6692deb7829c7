"""Find gaps in the epochs of a run, and signs that it was resumed from an earlier epoch.

Uses only names and file times, which are known before any file is opened.  Does not know what the
checkpoints hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from polyak_cli.checkpoints.listing import Checkpoint, Problem
from polyak_cli.errors import shown

#: The times of fewer checkpoints show no pattern.
_ENOUGH = 4
#: Files all written within this many seconds may be copies, whose times say nothing of a run.
_COPYING_SECONDS = 60.0


def find_suspicions(
    run: Sequence[Checkpoint], modified: Sequence[float | None], thinned: bool
) -> list[Problem]:
    """Return the problems that epochs and file times show in a run as a whole.

    Args:
        run: its checkpoints, oldest first.
        modified: when each was written, in seconds since 1970.
        thinned: checkpoints between them were left out on purpose.
    """
    known = [
        (one.epoch, one.path, time)
        for one, time in zip(run, modified, strict=True)
        if one.epoch is not None
    ]
    if any(a[0] > b[0] for a, b in pairwise(known)):  # named one by one, in another order
        return []
    found = [] if thinned else _find_gaps([(epoch, path) for epoch, path, _ in known])
    timed = [(epoch, path, time) for epoch, path, time in known if time is not None]
    return found + _find_resumed(timed)


def _find_gaps(run: Sequence[tuple[int, Path]]) -> list[Problem]:
    """Find missing epochs in a run whose checkpoints are mostly evenly spaced."""
    steps = [b[0] - a[0] for a, b in pairwise(run) if b[0] > a[0]]
    usual, times = Counter(steps).most_common(1)[0] if steps else (0, 0)
    if 2 * times <= len(steps):  # only improvements are saved, for example
        return []
    gaps = [(a, b) for a, b in pairwise(run) if b[0] - a[0] >= 2 * usual]
    if not gaps:
        return []
    (epoch, path), (next_epoch, next_path) = gaps[0]
    more = f"; {len(gaps) - 1} more such gaps" if len(gaps) > 1 else ""
    return [
        Problem(
            "gap",
            f"between {shown(path)} (epoch {epoch}) and {shown(next_path)} (epoch {next_epoch}) "
            f"checkpoints are missing: most are {usual} apart{more}",
        )
    ]


def _find_resumed(run: Sequence[tuple[int, Path, float]]) -> list[Problem]:
    """Find checkpoints of an earlier run that a resumed run has not replaced yet.

    A run of 10 epochs, resumed from epoch 5 and now at 8, has written 6 to 8 last.  In order of
    epoch, the times rise, fall once, and rise; the times of 9 and 10 lie between those of 5 and 6.
    Copied files mostly share one time, or have times in order of epoch or in no order.
    """
    times = [time for _, _, time in run]
    falls = [k for k, (a, b) in enumerate(pairwise(times)) if a > b]
    if len(run) < _ENOUGH or max(times) - min(times) < _COPYING_SECONDS or len(falls) != 1:
        return []
    end = falls[0] + 1  # run[start:end] are the checkpoints written after the resume
    start = sum(time <= times[end] for time in times[:end])
    # A single checkpoint older than all others may have been copied or touched by chance.
    plain = start > 0 or (end > 1 and len(run) - end > 1)
    by_time = sorted(run, key=lambda one: one[2])
    by_name = [path for _, path, _ in by_time] == sorted(path for _, path, _ in run)
    if times[start] < times[-1] or not plain or by_name:  # model_10 is copied before model_9
        return []
    left, newer = run[end:], run[start:end]
    return [
        Problem(
            "resumed",
            f"{_describe_span(left)} {'was' if len(left) == 1 else 'were'} written before "
            f"{_describe_span(newer)}: the run seems to have been resumed from "
            f"{f'epoch {run[start - 1][0]}' if start else 'its beginning'} since",
        )
    ]


def _describe_span(run: Sequence[tuple[int, Path, float]]) -> str:
    """Return the first and the last name of consecutive checkpoints."""
    first, last = shown(run[0][1]), shown(run[-1][1].name)
    return first if len(run) == 1 else f"{first} to {last}"
