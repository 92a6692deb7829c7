"""Find gaps in the epochs of a run, and signs that it was resumed from an earlier epoch.

Uses only names and file times, which are known before any file is opened.  Does not know what the
checkpoints hold.
"""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

from polyak_cli.checkpoints.listing import Checkpoint, Problem, is_matched, read_times
from polyak_cli.checkpoints.restarts import find_restart
from polyak_cli.errors import shown

#: At most this many patterns are advised; more would be no advice.
_MOST_PATTERNS = 4


def find_suspicions(
    chosen: Sequence[Checkpoint], run: Sequence[Checkpoint], thinned: bool
) -> list[Problem]:
    """Return the problems that epochs and file times show in a run as a whole.

    Args:
        chosen: the checkpoints to judge, oldest first.
        run: all checkpoints in the same place, whether chosen or not.  A run that was started again
            shows only among all of them.
        thinned: checkpoints between the chosen ones were left out on purpose.
    """
    known = [(one.epoch, one.path) for one in chosen if one.epoch is not None]
    # Named one by one, in another order, there are no gaps to be seen.
    is_rising = all(a[0] <= b[0] for a, b in pairwise(known))
    found = [] if thinned or not is_rising else _find_gaps(known)
    restarted = find_overwritten({one.path: one for one in (*chosen, *run)}.values())
    return found + (restarted.describe(chosen) if restarted else [])


@dataclass(frozen=True, slots=True)
class Overwritten:
    """A run that was started again over an earlier one and has not replaced all of it.

    Attributes:
        run: all checkpoints, by epoch.
        current: those of the run that was written last, with what it went on from.
        written: those of ``current`` that it wrote itself.
        older: those that are older than a checkpoint of an earlier epoch.
    """

    run: tuple[Checkpoint, ...]
    current: tuple[Checkpoint, ...]
    written: tuple[Checkpoint, ...]
    older: tuple[Checkpoint, ...]

    def describe(self, chosen: Collection[Checkpoint]) -> list[Problem]:
        """Return the problem, if a chosen checkpoint is older than one of an earlier epoch."""
        paths = {one.path for one in self.older}
        if not any(one.path in paths for one in chosen):
            return []
        return [Problem("resumed", f"{self.describe_parts()}; {self._advise()}")]

    def describe_parts(self) -> str:
        """Return which checkpoints are older than which, in words."""
        newest = self.current[-1]
        left = [one for one in self.older if _epoch(one) > _epoch(newest)]
        newer = list(self.written)
        if not left:  # the newest run has the last epochs, but other runs have left earlier ones
            left = [one for one in self.older if one in self.current]
            newer = [one for one in self.run if one not in self.current] or newer
        place = self.run.index(newer[0])
        begun = f"epoch {self.run[place - 1].epoch}" if place else "its beginning"
        return (
            f"{_describe_span(left)} {'was' if len(left) == 1 else 'were'} written before "
            f"{_describe_span(newer)}: the run seems to have been resumed from {begun} since"
        )

    def _advise(self) -> str:
        """Return what averages only checkpoints of one run."""
        others = [one for one in self.run if one not in self.current]
        newest = self.current[-1]
        advice = []
        # --to is enough where all that is left of the other runs are later epochs.
        if all(_epoch(one) > _epoch(newest) for one in others):
            advice.append(f"take what was written last with --to {newest.epoch}")
        patterns = _list_patterns(others, self.current)
        if patterns:
            listed = " ".join(f"--exclude '{shown(pattern)}'" for pattern in patterns)
            advice.append(f"leave the others out with {listed}")
        return ", or ".join(advice) or "move the checkpoints of the earlier run away"


def find_overwritten(run: Iterable[Checkpoint]) -> Overwritten | None:
    """Find out by file times whether a run was started again over an earlier one."""
    known = sorted((one for one in run if one.epoch is not None), key=_epoch)
    read = zip(known, read_times([one.path for one in known]), strict=True)
    timed = [(one, time) for one, time in read if time is not None]
    placed = [one for one, _ in timed]
    names = [str(one.path) for one in placed]
    order = sorted(range(len(names)), key=names.__getitem__)
    found = find_restart([*map(_epoch, placed)], [time for _, time in timed], order)
    if found is None:
        return None
    return Overwritten(
        run=tuple(placed),
        current=tuple(placed[k] for k in found.current),
        written=tuple(placed[k] for k in found.written),
        older=tuple(one for one, older in zip(placed, found.older, strict=True) if older),
    )


def _epoch(checkpoint: Checkpoint) -> int:
    """Return an epoch that is known."""
    return checkpoint.epoch or 0


def _list_patterns(out: Sequence[Checkpoint], kept: Sequence[Checkpoint]) -> list[str]:
    """Return patterns for --exclude that match some checkpoints and no others, [] if many."""
    whole = {one.path.name for one in out} & {one.path.name for one in kept}
    texts = [str(one.path) if whole else one.path.name for one in out]
    patterns: list[str] = []
    # weights.06.h5 to weights.09.h5 differ in the last digit of the epoch.
    split = [_split_last_digit(text, _epoch(one)) for text, one in zip(texts, out, strict=True)]
    for (before, after), group in groupby(split, key=lambda parts: (parts[0], parts[2])):
        digits = "".join(parts[1] for parts in group)
        run = len(digits) > 1 and int(digits[-1]) - int(digits[0]) == len(digits) - 1
        few = f"[{digits[0]}-{digits[-1]}]" if run else f"[{digits}]"
        middle = digits if len(digits) == 1 else few
        patterns.append(f"{glob.escape(before)}{middle}{glob.escape(after)}")
    right = all(any(is_matched(one.path, each) for each in patterns) for one in out)
    wrong = any(is_matched(one.path, each) for one in kept for each in patterns)
    return patterns if right and not wrong and len(patterns) <= _MOST_PATTERNS else []


def _split_last_digit(text: str, epoch: int) -> tuple[str, str, str]:
    """Return a name before, at, and after the last digit of its epoch."""
    found = [match for match in re.finditer(r"\d+", text) if int(match[0]) == epoch]
    end = found[-1].end() if found else len(text)
    return text[: end - 1], text[end - 1 : end], text[end:]


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
            f"checkpoints are missing; most are {usual} apart{more}",
        )
    ]


def _describe_span(run: Sequence[Checkpoint]) -> str:
    """Return the first and the last name of consecutive checkpoints."""
    first, last = run[0].path, run[-1].path
    if len(run) == 1:
        return shown(first)
    return f"{shown(first)} to {shown(last if last.name == first.name else last.name)}"
