"""Search for soups, averages whose members or coefficients are chosen by their score, and beyond.

This module scores candidates through the function that it is given; it opens no file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from polyak_cli.averaging.schemes import make_mean
from polyak_cli.evaluation.candidates import (
    Candidate,
    ScoredCandidate,
    find_best,
    list_extrapolations,
    rank,
)

#: Makes and scores candidates, and yields a row for each, in order.
Score = Callable[[Sequence[Candidate]], Iterable[ScoredCandidate]]


def search_greedily(
    score: Score, rows: Sequence[ScoredCandidate], metric: str
) -> list[ScoredCandidate]:
    """Add checkpoints, the best first, and keep one only if it strictly improves the score.

    This is recipe 1 of Wortsman et al., "Model soups", 2022.
    """
    singles = [row for row in rows if row.candidate.kind == "single"]
    ranked = sorted(singles, key=lambda row: rank(row, metric))
    best, members = ranked[0], {ranked[0].candidate.coefficients.index(1.0)}
    for row in ranked[1:]:
        tried = members | {row.candidate.coefficients.index(1.0)}
        mean = make_mean([float(k in tried) for k in range(len(singles))])
        (found,) = score([Candidate("soup", "greedy", None, len(tried), mean)])
        if rank(found, metric) < rank(best, metric):
            best, members = found, tried
    kept = best.candidate.mean
    return [ScoredCandidate(Candidate("soup", "greedy", None, len(members), kept), best.scores)]


def search_coefficients(
    score: Score, rows: Sequence[ScoredCandidate], metric: str
) -> list[ScoredCandidate]:
    """Fit coefficients that are not negative and sum to 1, by pattern search.

    From the best candidate, it steps toward or away from one checkpoint, by half of the possible
    way, then by a quarter, and so on, while the score improves: Kolda, Lewis and Torczon,
    "Optimization by direct search", 2003.
    """
    best = find_best([row for row in rows if row.candidate.kind not in _OTHERS], metric)
    count = len(best.candidate.coefficients)
    step = 0.5
    while step > _FINEST:
        tried = [
            Candidate("soup", "coefficients", None, sum(c > 0 for c in near), make_mean(near))
            for k in range(count)
            for near in step_coefficients(best.candidate.coefficients, k, step)
        ]
        # Together, so that all steps of a round take few readings of the checkpoints.
        found = find_best([*score(tried)], metric) if tried else best
        if rank(found, metric) < rank(best, metric):
            best = found
        else:
            step /= 2
    kept = best.candidate.mean
    window = sum(m > 0 for m in kept.multipliers)
    return [ScoredCandidate(Candidate("soup", "coefficients", None, window, kept), best.scores)]


def step_coefficients(
    coefficients: Sequence[float], k: int, step: float
) -> Iterator[tuple[float, ...]]:
    """Yield the coefficients after a step toward one checkpoint, and after one away from it."""
    for share in (coefficients[k] * (1 - step) + step, coefficients[k] * (1 - step)):
        rest = 1 - coefficients[k]
        if rest > 0 and share != coefficients[k]:
            moved = [c * (1 - share) / rest for c in coefficients]
            moved[k] = share
            # The others share the rest in their old proportion.  The sum is made 1 again each time,
            # as rounding errors of many steps would add up.
            total = math.fsum(moved)
            yield tuple(c / total for c in moved)


_FINEST = 1 / 32  # finer steps fit the noise of the selection rows


#: Kinds that are no model, or have coefficients below 0.
_OTHERS = ("ensemble", "extrapolation")


def extrapolate(
    score: Score, rows: Sequence[ScoredCandidate], _metric: str
) -> list[ScoredCandidate]:
    """Score what lies beyond the averages of every window; see `list_extrapolations`."""
    singles = sum(row.candidate.kind == "single" for row in rows)
    windows = {row.candidate.window for row in rows if row.candidate.kind == "average"}
    return [*score(list_extrapolations(singles, windows))]


SEARCHES: Mapping[str, Callable[[Score, Sequence[ScoredCandidate], str], list[ScoredCandidate]]] = {
    "greedy": search_greedily,
    "coefficients": search_coefficients,
    "extrapolate": extrapolate,
}
