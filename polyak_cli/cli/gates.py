"""Decide whether the scores of models pass the gates of `polyak evaluate`.

Knows scores and verdicts, not how they came about.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from polyak_cli.errors import UsageError, shown

if TYPE_CHECKING:
    from polyak_cli.evaluation.comparison import Comparison
    from polyak_cli.evaluation.evaluator import Score


def find_worse(compared: Comparison, metric: str | None) -> Iterator[str]:
    """Yield the models that are worse than the baseline beyond noise, or that cannot be judged.

    The metric of --metric decides, or without one accuracy, or loss if there is none.
    """
    wanted = metric and metric.rpartition(":")[2]
    for one in compared.models:
        path, than = shown(one.score.path), shown(compared.baseline.path)
        if not one.gains:
            raise UsageError(
                f"--fail-if-worse: {path} and {than} have neither an accuracy nor a loss in common"
            )
        asked = [gain for gain in one.gains if wanted in (None, gain.metric)]
        if not asked:
            raise UsageError(f"--fail-if-worse: {path} and {than} cannot be compared by {wanted}")
        first, paired = asked[0], asked[0].paired
        if first.verdict == "worse":
            yield (
                f"{path}: {first.metric} is worse than that of {than} by "
                f"{abs(paired.difference):.6f} ({paired.low:+.6f} to {paired.high:+.6f})"
            )
        elif first.why:
            yield f"{path}: not compared with {than}: {first.why}"
        elif one.score.loss is not None and not math.isfinite(one.score.loss):
            yield f"{path}: the loss is {one.score.loss!r}, not a finite number"


def find_failed(score: Score, gates: Sequence[tuple[str, float]]) -> Iterator[str]:
    """Yield the gates that a model fails; it fails all if its loss is not finite."""
    values = dict(score.metrics) | ({} if score.loss is None else {"loss": score.loss})
    loss = values.get("loss", 0.0)
    for metric, least in gates:
        if metric not in values:
            raise UsageError(
                f"--fail-under {shown(metric)}: {shown(score.path)} has no such metric; it has "
                f"{', '.join(map(shown, values)) or 'none'}"
            )
        found = f"{shown(score.path)}: {shown(metric)} is {values[metric]!r}"
        if not math.isfinite(values[metric]):
            yield f"{found}, not a finite number"
        elif values[metric] < least:
            yield f"{found}, less than {least!r}"
        elif not math.isfinite(loss):
            yield f"{found}, but the loss is {loss!r}, not a finite number"
