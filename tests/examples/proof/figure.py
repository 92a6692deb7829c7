"""The README's figure: errors beside those of the newest checkpoint, with intervals over runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.examples.demo import INK, STYLE
from tests.examples.proof.tables import Cell, Cells, find_error, find_interval, name_task

AVERAGE, LATE, COSINE = "#0072b2", "#d55e00", "#009e73"
#: What is drawn: field, label, colour, mark, place beside the line of a task.
SERIES = (
    ("average", "average of the last ten epochs", AVERAGE, "o", -0.22),
    ("late", "rate decayed over those ten", LATE, "s", 0.0),
    ("cosine", "rate decayed by a cosine throughout", COSINE, "D", 0.22),
)


def find_ratio(rates: Mapping[float, Sequence[Cell]], name: str) -> tuple[float, float, float]:
    """Return an error over that of the newest checkpoint, and its 95 % interval.

    It is the geometric mean of the rates for each seed, then Student's interval of the logarithm.
    """
    logs = [
        statistics.fmean(
            math.log(find_error(getattr(cell, name)) / find_error(cell.newest)) for cell in seed
        )
        for seed in zip(*rates.values(), strict=True)
    ]
    mean, half = find_interval(logs)
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def draw(cells: Cells, path: Path) -> None:
    """Draw one line for each task, without noise and with it.

    Args:
        cells: the runs.
        path: the .png file.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.6), dpi=160, layout="constrained", facecolor="white")
        axes = figure.subplots()
        for field, label, colour, mark, beside in SERIES:
            ratios = [find_ratio(rates, field) for rates in cells.values()]
            middle = [100 * one for one, _, _ in ratios]
            whiskers = [
                [100 * (one - low) for one, low, _ in ratios],
                [100 * (high - one) for one, _, high in ratios],
            ]
            places = [place + beside for place in range(len(ratios))]
            axes.errorbar(
                middle, places, xerr=whiskers, fmt=mark, color=colour, ms=7, capsize=3, label=label
            )
        axes.axvline(100, color=INK, lw=1)
        axes.set_yticks(range(len(cells)), [name_task(family, noisy) for family, noisy in cells])
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="#e6e6e6")
        axes.set_axisbelow(True)
        axes.set(xlabel="Test error in % of that of the newest checkpoint at a constant rate")
        figure.legend(loc="outside upper left", ncols=3, frameon=False)
        figure.savefig(path, metadata={"Software": None})


def describe(cells: Cells) -> str:
    """Return the text alternative of the figure."""
    ratios = {
        name: [find_ratio(rates, name)[0] for rates in cells.values()]
        for name in ("average", "late")
    }
    ranges = {name: f"{min(r):.0%} to {max(r):.0%}" for name, r in ratios.items()}
    return f"Errors beside the newest: average {ranges['average']}, decayed late {ranges['late']}"
