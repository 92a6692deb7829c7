"""Decide from inner products whether checkpoints are of one run.

Neighbours of a run point nearly the same way, and networks of two seeds, or one with its units in
another order, are as good as orthogonal.  Knows what honest runs look like; reads no value itself,
and does not know how products are taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from polyak_cli.averaging.matching import Row
from polyak_cli.averaging.options import Choice
from polyak_cli.checkpoints import Checkpoint
from polyak_cli.engine.samples import REACH, SampleSums, Sampling
from polyak_cli.errors import list_some, name_path, quote_glob, shown
from polyak_cli.tensors import FLOATS

#: The kind of `options.ALLOWED` that averages all the same, and that of the problem in `check`.
ALLOWED, KIND = "two-runs", "two runs"
#: In some 250 runs of numpy networks by every usual optimizer, neighbours had a cosine of at least
#: 0.6, and the initial values had 0.28 with those after the first epoch; two seeds mostly had
#: less than 0.13.  See tests/test_runs.py.
_ALIKE = 0.25
#: Where large steps let the norm grow, what began is still there: <x, y> / <y, y> stays above 0.45
#: while the cosine falls.  For two seeds that ratio is noise, unless the cosine is more than that.
_KEPT, _NOISE = 0.45, 0.1
#: Elements below which two directions may be alike by chance; a group of more counts no more.
_ENOUGH = 256
#: Groups of tensors: each counts by its own, so that no tensor of a large norm hides the others.
_GROUPS = 32
#: Elements to sample: the cosine of as many random ones is 0.004.
_SAMPLED = 1 << 16
#: A checkpoint is foreign if it is alone among at least so many others of one run.
_OTHERS = 3


class Compared(NamedTuple):
    """What is compared of some tensors.

    Attributes:
        sampling: which elements.
        groups: for each tensor the group that it counts in, None if it is not compared.
    """

    sampling: Sampling
    groups: Sequence[int | None]


def choose_compared(rows: Sequence[Row]) -> Compared:
    """Return what is compared of tensors: samples of the floats of two or more dimensions.

    Vectors are left out: scales begin at one and biases at zero, whatever the seed.
    """
    sizes = [row[-1].size if _is_matrix(row) else 0 for row in rows]
    total, count = sum(sizes), sum(map(bool, sizes))
    # A few elements of each of very many tensors, and at most 1024 that lie together.
    length = min(1024, max(16, _SAMPLED // max(1, count)))
    step = max(length, total * length // _SAMPLED)
    if total <= _SAMPLED:
        step = length = max(1, total)
    groups: list[int | None] = []
    group = filled = 0
    for size in sizes:
        # Small tensors share a group with what follows them.
        if size and filled >= max(_ENOUGH, total // _GROUPS):
            group, filled = group + 1, 0
        groups.append(group if size else None)
        filled += size
    return Compared(Sampling(step, length), groups)


def _is_matrix(row: Row) -> bool:
    """Return whether a tensor is of a float type and has two dimensions that are not 1."""
    spec = row[-1]
    return spec.dtype in FLOATS and sum(length > 1 for length in spec.shape) > 1


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether checkpoints are of one run.

    Attributes:
        groups: the checkpoints of each run, by number; none if that cannot be said.
        least: the least cosine of two neighbours, None if none is known.
        between: these neighbours.
    """

    groups: tuple[tuple[int, ...], ...] = ()
    least: float | None = None
    between: tuple[int, int] | None = None

    @property
    def word(self) -> str:
        """The verdict in words."""
        if not self.groups:
            return "cannot tell"
        return "one run" if len(self.groups) == 1 else "two runs"

    @property
    def is_refused(self) -> bool:
        """Whether there is more than one run."""
        return len(self.groups) > 1

    @property
    def foreign(self) -> int | None:
        """The one checkpoint that is not of the run of all the others, if there is one."""
        if len(self.groups) != 2:
            return None
        few, many = sorted(self.groups, key=len)
        return few[0] if len(few) == 1 and len(many) >= _OTHERS else None

    def data(self, paths: Sequence[Path]) -> dict[str, Any]:
        """Return it as what JSON can hold."""
        return {
            "verdict": self.word,
            "least_cosine": None if self.least is None else round(self.least, 4),
            "between": None
            if self.between is None
            else [name_path(paths[k]) for k in self.between],
            "groups": [[name_path(paths[k]) for k in group] for group in self.groups],
        }


class _Pair(NamedTuple):
    """How alike two checkpoints are."""

    cosine: float | None  # None where too little differs, or one is zero
    is_alike: bool | None


def judge(samples: SampleSums, counted: Sequence[int]) -> Verdict:
    """Return whether checkpoints are of one run.

    Args:
        samples: sums over those of the checkpoints.
        counted: the number of each; the sums know only their order.
    """
    pairs = {
        (k - reach, k): _compare(samples, k, reach)
        for k in range(len(counted))
        for reach in range(1, min(k, REACH) + 1)
    }
    known = {pair: found for pair, found in pairs.items() if found.cosine is not None}
    neighbours = {(a, b): found.cosine or 0.0 for (a, b), found in known.items() if b == a + 1}
    if not known:
        return Verdict()
    # One of the others' run that lies between foreign ones is found within the reach.
    home = [*range(len(counted))]
    for (a, b), found in pairs.items():
        if found.is_alike:
            old, new = home[b], home[a]
            home = [new if place == old else place for place in home]
    judged = {k for (a, b), found in pairs.items() if found.is_alike is not None for k in (a, b)}
    judged -= _find_empty(samples)
    groups = [tuple(k for k in sorted(judged) if home[k] == place) for place in sorted({*home})]
    between = min(neighbours, key=lambda pair: neighbours[pair], default=None)
    return Verdict(
        tuple(tuple(counted[k] for k in group) for group in groups if group),
        None if between is None else neighbours[between],
        None if between is None else (counted[between[0]], counted[between[1]]),
    )


def _find_empty(samples: SampleSums) -> set[int]:
    """Return the checkpoints without a number but 0 where others have some.

    They are of no run: networks before their first step, and those that diverged to NaN, which
    counts as 0.
    """
    total = sum(samples.sums.values(), np.zeros((samples.count, REACH, 4)))
    xx, yy, differing = (total[:, 0, part] for part in (1, 2, 3))
    empty = {k for k in range(1, samples.count) if differing[k] and not xx[k]}
    empty |= {k - 1 for k in range(1, samples.count) if differing[k] and not yy[k]}
    # Products are over what differs, so that two of them side by side have none.
    for k in [*range(1, samples.count), *range(samples.count - 1, 0, -1)]:
        if not differing[k] and not empty.isdisjoint((k - 1, k)):
            empty |= {k - 1, k}
    return empty


def _compare(samples: SampleSums, k: int, reach: int) -> _Pair:
    """Return how alike a checkpoint is to the one so many places before it."""
    weights = cosine = kept = differing = 0.0
    is_zero = False
    for sums in samples.sums.values():
        xy, xx, yy, count = sums[k, reach - 1].tolist()
        differing += count
        lengths = math.sqrt(xx) * math.sqrt(yy)
        # A tensor that begins at zero has no direction; one that overflows has none either.
        if not 0 < lengths < math.inf:
            is_zero = is_zero or count > 0
            continue
        weight = min(count, _ENOUGH)
        weights += weight
        cosine += weight * xy / lengths
        kept += weight * min(1.0, xy / min(xx, yy))
    if weights >= _ENOUGH:
        cosine, kept = cosine / weights, kept / weights
        return _Pair(cosine, cosine >= _ALIKE or (kept >= _KEPT and cosine >= _NOISE))
    # What differs in too few elements is nearly the same; beside zeros nothing can be said.
    return _Pair(None, None if is_zero or not samples.sums else True)


# --- what a user reads ----------------------------------------------------------------------------


def describe(verdict: Verdict, names: Sequence[str]) -> str:
    """Return which checkpoints look like which run.

    Args:
        verdict: of more than one run.
        names: of all checkpoints, as short as distinguishes them.
    """
    order = sorted(k for group in verdict.groups for k in group)
    count = len(verdict.groups)
    if all(len(group) == 1 for group in verdict.groups) and count > 2:
        listed = f"{_name_span([*order], order, names)} look like {count} runs"
    else:
        spans = [_name_span(group, order, names) for group in verdict.groups]
        more = f", and {count - 3} more" if count > 3 else ""
        what = "two" if count == 2 else str(count)
        listed = f"these look like {what} runs: {', and '.join(spans[:3])}{more}"
    if verdict.least is None or verdict.between is None:
        return listed
    a, b = (shown(names[k]) for k in verdict.between)
    # Plus zero: a cosine of -0.001 is 0.00 too.
    return (
        f"{listed}; cosine {round(verdict.least, 2) + 0.0:.2f} between {a} and {b} "
        "(neighbours of one run have nearly 1)"
    )


def _name_span(group: Sequence[int], order: Sequence[int], names: Sequence[str]) -> str:
    """Return the first and the last name of neighbours, the names of others."""
    first, last = order.index(group[0]), order.index(group[-1])
    if len(group) > 2 and last - first == len(group) - 1:
        return f"{shown(names[group[0]])} to {shown(names[group[-1]])}"
    if len(group) == 2:
        return " and ".join(shown(names[k]) for k in group)
    return list_some([names[k] for k in group])


def advise(
    verdict: Verdict, run: Sequence[Checkpoint], names: Sequence[str], choice: Choice
) -> str:
    """Return what a user can do: how to choose one of the runs, and how to average all.

    Args:
        verdict: of more than one run.
        run: all checkpoints, oldest first.
        names: of them, as short as distinguishes them.
        choice: how they were chosen.
    """
    allow = f"all of them with --allow {ALLOWED}"
    foreign = verdict.foreign
    if foreign is not None:
        path = run[foreign].path
        unique = names[foreign] == path.name
        glob = quote_glob(path.name if unique else str(path))
        return f"leave {shown(names[foreign])} out with --exclude {glob}, or average {allow}"
    ways = []
    count = sum(map(len, verdict.groups))
    # Where these choose too, --last and --to would not count from the same checkpoints.
    simple = choice == replace(choice, best=None, every=1, min_spacing=None, target_count=None)
    for group in verdict.groups:
        span = len(group) == group[-1] - group[0] + 1
        if not (len(group) > 1 and span and simple and len(verdict.groups) == 2):
            continue
        last = run[group[-1]].epoch
        if group[-1] == len(run) - 1:
            ways.append(f"--last {len(group)}")
        elif group[0] == 0 and _is_ordered(run) and last is not None:
            ways.append(f"--to {last}")
    if ways:
        return f"average one of them with {' or '.join(ways)}, or {allow}"
    if count == len(verdict.groups):
        return f"average checkpoints of one run, or {allow}"
    return f"average one of them and leave the others out with --exclude, or average {allow}"


def _is_ordered(run: Sequence[Checkpoint]) -> bool:
    """Return whether all epochs are known and rise."""
    epochs = [one.epoch for one in run if one.epoch is not None]
    return len(epochs) == len(run) and epochs == sorted({*epochs})
