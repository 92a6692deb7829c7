"""Numbers of a window of checkpoints that could tell, without data, whether averaging it pays.

All come from inner products, by the functions that `polyak geometry` uses.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from polyak_cli.examining import gram as grams
from polyak_cli.examining.gram import Gram
from tests.training import Array

Numbers = Mapping[str, float]


def measure(files: Sequence[Mapping[str, Array]], first: Mapping[str, Array]) -> dict[str, float]:
    """Return the numbers of a window.

    Args:
        files: the tensors of each checkpoint by name, oldest first.
        first: those before any training.
    """
    groups = [
        grams.make_gram(
            np.stack([np.ravel(one[name]).astype(np.float64) for one in (first, *files)])
        )
        for name in files[0]
    ]
    whole = grams.make_empty(len(files) + 1)
    for group in groups:
        whole = whole.plus(group)
    window = grams.take_window(whole, 1, whole.count)
    parts = [grams.take_window(group, 1, group.count) for group in groups]
    steps = grams.lengths_of_steps(window)
    numbers = {
        "spread": grams.spread(window),
        "travel": find_travel(whole),
        "step": float(np.mean(steps**2)) / _square(window),
        "jitter": grams.jitter(window),
        "cosine": grams.mean_cosine(window),
        "correlation": grams.estimate_correlation(window),
        "shrinkage": float(steps[-1] / steps.max()),
        "newest": float(grams.distances_to_average(window, grams.share_equally(len(files)))[-1])
        ** 2
        / _square(window),
        "spread_median": _find_median(parts, grams.spread),
        "jitter_median": _find_median(parts, grams.jitter),
    }
    return {name: float(value or 0.0) for name, value in numbers.items()}


def find_travel(whole: Gram) -> float:
    """Return the squared distance of the average from the first, over its squared norm."""
    count = whole.count - 1
    average, start = np.full(count + 1, 1 / count), np.zeros(count + 1)
    average[0], start[0] = 0.0, 1.0
    return grams.distance_of_averages(whole, average, start) ** 2 / _square(
        grams.take_window(whole, 1, whole.count)
    )


def _square(gram: Gram) -> float:
    """Return the squared norm of the equal average; 1 of nothing, whose products are 0 too."""
    return grams.norm_of_average(gram, grams.share_equally(gram.count)) ** 2 or 1.0


def _find_median(parts: Sequence[Gram], find: Callable[[Gram], float | None]) -> float:
    return statistics.median(find(part) or 0.0 for part in parts)


#: What is tried as a scale, each so that more of it should mean that averaging pays.
SCALES: Mapping[str, Callable[[Numbers], float]] = {
    "spread, of the norm": lambda n: n["spread"],
    "spread, median tensor": lambda n: n["spread_median"],
    "spread, of the step": lambda n: n["spread"] / n["step"],
    "spread, of the distance from start": lambda n: n["spread"] / n["travel"],
    "spread, of the rate": lambda n: n["spread"] / n["rate"],
    "spread, of the rate squared": lambda n: n["spread"] / n["rate"] ** 2,
    "step, of the norm": lambda n: n["step"],
    "step, of the distance from start": lambda n: n["step"] / n["travel"],
    "jitter, of the norm": lambda n: n["jitter"],
    "jitter, median tensor": lambda n: n["jitter_median"],
    "jitter, of the distance from start": lambda n: n["jitter"] / n["travel"],
    "jitter, of the spread": lambda n: n["jitter"] / n["spread"],
    "newest to average, of the norm": lambda n: n["newest"],
    "newest to average, of the spread": lambda n: n["newest"] / n["spread"],
    "minus the cosine of steps": lambda n: -n["cosine"],
    "minus the correlation of neighbours": lambda n: -n["correlation"],
    "last step, of the longest": lambda n: n["shrinkage"],
}
