"""The candidates of a sweep, the options that list them, and their order by score.

This module scores nothing and reads no file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from polyak_cli.averaging import schemes
from polyak_cli.errors import UsageError, shown
from polyak_cli.evaluation.evaluator import RowScores


class Candidate(NamedTuple):
    """One way to combine the checkpoints.

    Attributes:
        kind: "single", "average", "ensemble" (of predictions), "soup" (found by a search), or
            "extrapolation" (beyond the checkpoints, with negative coefficients).
        scheme: its name; "" if there is none.
        parameter: the parameter of the scheme, or None; how far an extrapolation goes.
        window: the number of checkpoints in it; except for singles and soups, the newest.
        mean: of all checkpoints of the sweep; those that are not in it have the multiplier 0.
    """

    kind: str
    scheme: str
    parameter: schemes.Value | None
    window: int
    mean: schemes.Mean

    @property
    def coefficients(self) -> tuple[float, ...]:
        """One for each checkpoint of the sweep, oldest first; their sum is 1."""
        return self.mean.coefficients

    @property
    def name(self) -> str:
        """Its scheme in the form of `--schemes`, or its kind."""
        return name_scheme(self.scheme or self.kind, self.parameter)


class ScoredCandidate(NamedTuple):
    """A candidate, and its scores on each split."""

    candidate: Candidate
    scores: Mapping[str, RowScores]

    def value(self, metric: str, split: str) -> float:
        """Return a metric, or the loss; NaN if the model does not have it."""
        scores = self.scores[split]
        found = scores.loss if metric == "loss" else scores.metrics.get(metric)
        return math.nan if found is None else found


def name_scheme(scheme: str, parameter: schemes.Value | None) -> str:
    """Return a scheme in the form of `--schemes`, such as exp:2 or decay:1-sqrt."""
    if parameter is None:
        return scheme
    return f"{scheme}:{parameter:g}" if isinstance(parameter, float) else f"{scheme}:{parameter}"


def find_single(coefficients: Sequence[float]) -> int | None:
    """Return the place of the only checkpoint that counts; None if there are several."""
    # Others of both signs can leave 1 for one of several.
    return coefficients.index(1.0) if max(coefficients) == 1 and min(coefficients) >= 0 else None


def parse_schemes(text: str) -> list[tuple[str, schemes.Value | None]]:
    """Read a list such as ``equal,exp:2``.

    Raises:
        UsageError: a scheme is unknown, or its parameter is out of range or not accepted.
    """
    found: list[tuple[str, schemes.Value | None]] = []
    for part in text.split(","):
        name, _, number = part.strip().partition(":")
        if name not in schemes.SCHEMES:
            usual = (one for one in schemes.SCHEMES if not schemes.takes_running_means(one))
            raise UsageError(
                f"--schemes: unknown scheme {shown(name)!r}; choose from {', '.join(usual)}"
            )
        schemes.refuse_running_means(name, "a sweep")
        own = schemes.SCHEMES[name].parameters
        if number and not own:
            raise UsageError(f"--schemes: {name} takes no parameter; found {shown(part)!r}")
        try:
            given = (
                float(number) if number and isinstance(own[0], schemes.Number) else number or None
            )
        except ValueError:
            raise UsageError(
                f"--schemes: {shown(part)!r} is not a scheme with a parameter; write it like exp:2"
            ) from None
        # Its errors too: the parameter may be out of range.
        choice = schemes.resolve(name, make_parameter(name, given))
        value = choice.parameters[own[0].name] if own else None
        if (name, value) not in found:
            found.append((name, value))
    return found


def make_parameter(scheme: str, value: schemes.Value | None) -> dict[str, Any]:
    """Return the first parameter of a scheme as an option of `schemes.resolve`."""
    return {one.name: value for one in schemes.SCHEMES[scheme].parameters[:1]}


def parse_windows(text: str | None, count: int) -> list[int]:
    """Read a list such as ``1-10,20``; None means every window.

    Raises:
        UsageError: it is not a list of numbers, or a window is larger than the run.
    """
    if text is None:
        return list(range(1, count + 1))
    found: set[int] = set()
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdigit() or (dash and not high.isdigit()):
            raise UsageError(f"--windows: {shown(part)!r} is not a window; write it like 5 or 1-10")
        first, last = int(low), int(high or low)
        if not 1 <= first <= last <= count:
            raise UsageError(
                f"--windows: {shown(part)!r} is out of range; there are {count} checkpoints"
            )
        found.update(range(first, last + 1))
    return sorted(found)


def list_candidates(
    positions: Sequence[float],
    windows: Sequence[int],
    chosen: Sequence[tuple[str, schemes.Value | None]],
) -> list[Candidate]:
    """Return every single checkpoint, oldest first, and every window of every scheme.

    Args:
        positions: position of each checkpoint in the run, oldest first.
        windows: the numbers of newest checkpoints to average.
        chosen: schemes and their parameters, as `parse_schemes` returns them.
    """
    count = len(positions)
    found = [
        Candidate("single", "", None, 1, schemes.make_mean([float(k == j) for j in range(count)]))
        for k in range(count)
    ]
    # By scheme first, so that tables and figures have the windows of a scheme in one piece.
    for (name, value), window in itertools.product(chosen, windows):
        choice = schemes.resolve(name, make_parameter(name, value))
        newest = schemes.compute_mean(choice, positions[count - window :])
        whole = schemes.make_mean((*(0.0,) * (count - window), *newest.multipliers))
        found.append(Candidate("average", name, value, window, whole))
    return found


#: How far extrapolations go, in distances between the halves of a window.
_REACHES = (0.25, 0.5, 1.0)


def list_extrapolations(count: int, windows: Iterable[int]) -> list[Candidate]:
    """Return B + x (B - A) for every window and some x.

    A is the mean of the older half of the newest checkpoints in the window, and B that of the newer
    half.  The difference of the means is the drift of the run, with less noise than a single step
    has; where a run drifts, the weights go on in this direction (cf. BEMA and Extra-Merge).

    Args:
        count: of all checkpoints.
        windows: numbers of newest checkpoints; of an odd one, the oldest is left out.
    """
    halves = sorted({window // 2 for window in windows} - {0})
    return [
        Candidate(
            "extrapolation",
            "extrapolate",
            reach,
            2 * half,
            schemes.make_mean(
                (*(0.0,) * (count - 2 * half), *(-reach,) * half, *(1.0 + reach,) * half)
            ),
        )
        for reach in _REACHES
        for half in halves
    ]


def rank(row: ScoredCandidate, metric: str) -> tuple[float, float]:
    """Return a key that is smaller for the better candidate; the loss decides ties."""
    loss = row.value("loss", "selection")
    loss = math.inf if math.isnan(loss) else loss  # NaN would compare false with everything
    if metric == "loss":
        return loss, loss
    correct = row.scores["selection"].correct if metric == "accuracy" else None
    # Keras may call its accuracy otherwise.
    value = row.value(metric, "selection") if correct is None else float(np.mean(correct))
    return (math.inf if math.isnan(value) else -value), loss


def find_best(rows: Sequence[ScoredCandidate], metric: str) -> ScoredCandidate:
    """Return the best candidate on the selection rows; the first of equal ones."""
    return min(rows, key=lambda row: rank(row, metric))


def fold_equal(
    rows: Sequence[ScoredCandidate],
) -> list[tuple[ScoredCandidate, tuple[Candidate, ...]]]:
    """Return each model once, in order, with the other candidates that are the same model.

    Candidates of equal coefficients are one model: a window of 1 is the newest checkpoint under
    every scheme, and a search may end where it began.
    """
    found: dict[tuple[bool, tuple[float, ...]], list[ScoredCandidate]] = {}
    for row in rows:
        candidate = row.candidate
        # An ensemble of one is that checkpoint; one of several averages predictions instead.
        several = candidate.kind == "ensemble" and candidate.window > 1
        found.setdefault((several, candidate.coefficients), []).append(row)
    return [(first, tuple(row.candidate for row in rest)) for first, *rest in found.values()]
