"""Draws what was measured, as PNG and SVG; imported last, for matplotlib is large."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_OURS, _FLOOR, _OTHERS, _INK, _LIMIT = "#0b6e4f", "#5c6f82", "#c9d1d9", "#24292f", "#b5473c"
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8c959f",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.titlelocation": "left",
    "svg.hashsalt": "polyak",
}


def compare_chart(data: Mapping[str, Any], stem: Path) -> None:
    """Draw seconds and peak memory of all contenders, on logarithmic scales."""
    rows = [row for row in data["rows"] if "seconds" in row]
    if not rows:  # all failed, as the table says
        return
    rows.sort(key=lambda row: -float(row["seconds"]))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(10, 1.4 + 0.42 * len(rows)), layout="constrained")
        seconds, memory = figure.subplots(1, 2, sharey=True)
        base = next((float(row["seconds"]) for row in rows if row["key"] == "floor"), None)
        _bars(
            seconds,
            rows,
            [float(row["seconds"]) for row in rows],
            [_seconds(float(row["seconds"]), base) for row in rows],
        )
        _bars(
            memory,
            rows,
            [row["peak"] / 1e6 for row in rows],
            [f"{row['peak'] / 1e6:,.0f} MB" for row in rows],
        )
        seconds.set_title("seconds, from start to exit")
        memory.set_title("peak memory of the largest process")
        figure.suptitle(data["title"], x=0.01, ha="left", fontweight="bold")
        _save(figure, data, stem)


def _seconds(seconds: float, base: float | None) -> str:
    digits = 2 if seconds < 10 else 1
    beside = f"  ({seconds / base:.1f} × floor)" if base and seconds != base else ""
    return f"{seconds:.{digits}f} s{beside}"


def _bars(
    axes: Axes, rows: Sequence[Mapping[str, Any]], values: Sequence[float], labels: Sequence[str]
) -> None:
    colours = [{"polyak": _OURS, "floor": _FLOOR}.get(row["key"], _OTHERS) for row in rows]
    bars = axes.barh([row["label"] for row in rows], values, color=colours, height=0.68)
    axes.set_xscale("log")
    # Room for the labels beyond the longest bar, on a scale that begins below the shortest.
    axes.set_xlim(min(values) / 2, max(values) * (max(values) / min(values)) ** 0.55 * 2)
    axes.bar_label(bars, labels, padding=4, fontsize=8.5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#eaeef2", zorder=0)
    axes.set_axisbelow(True)


def growth_chart(data: Mapping[str, Any], stem: Path) -> None:
    """Draw the cost of a gigabyte, or of a small tensor, and the peak memory of all series."""
    series = data["series"]
    across = -(-len(series) // 2)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(14, 2.1 * across + 1), layout="constrained")
        grid = figure.subplots(across, 4, squeeze=False)
        for k, one in enumerate(series):
            row, column = k % across, 2 * (k // across)
            _panel(grid[row][column], grid[row][column + 1], one)
        for k in range(len(series), 2 * across):
            row, column = k % across, 2 * (k // across)
            grid[row][column].set_axis_off()
            grid[row][column + 1].set_axis_off()
        title = f"{data['title']}: polyak (green), the floor of the same files (grey), limits (red)"
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        _save(figure, data, stem)


def _panel(cost: Axes, memory: Axes, one: Mapping[str, Any]) -> None:
    points = [point for point in one["points"] if "seconds" in point]
    labels = [str(point["label"]) for point in points]
    small = one["key"].startswith("small")
    what = "microseconds_per_tensor" if small else "seconds_per_gigabyte"
    values = [float(point[what]) for point in points]
    _draw(cost, one, labels, values)
    _draw(memory, one, labels, [point["peak"] / 1e6 for point in points])
    if not small:
        floors = [float(point.get("floor_seconds_per_gigabyte", 0.0)) for point in points]
        _mark(cost, one, floors, _FLOOR)
    if one["logarithmic"]:
        cost.set_yscale("log")
        cost.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        cost.set_ylim(bottom=0)
    if small:
        _mark(cost, one, [10.0] * len(points), _LIMIT)
    if all(point["allowed"] for point in points):
        _mark(memory, one, [point["allowed"] / 1e6 for point in points], _LIMIT)
    memory.set_ylim(0, memory.get_ylim()[1] * 1.1)
    cost.set_ylabel("µs per tensor and file" if small else "seconds per GB")
    memory.set_ylabel("peak, MB")
    # A point that is missing must not look as if it had never been asked for.
    failed = ", ".join(str(point["label"]) for point in one["points"] if point not in points)
    cost.set_title(one["title"] + (f" (failed: {failed})" if failed else ""))


def _draw(
    axes: Axes, one: Mapping[str, Any], labels: Sequence[str], values: Sequence[float]
) -> None:
    """Draw a line through points that have an order, and bars for others."""
    if one["ordered"]:
        axes.plot(labels, values, color=_OURS, marker="o", markersize=4)
    else:
        axes.bar(labels, values, color=_OURS, width=0.6)
        axes.set_xlim(-0.6, max(len(labels), 5) - 0.4)  # two bars are no wider than five
    axes.grid(axis="y", color="#eaeef2")
    axes.set_axisbelow(True)


def _mark(axes: Axes, one: Mapping[str, Any], values: Sequence[float], colour: str) -> None:
    """Draw what the points are to be compared with."""
    if one["ordered"]:
        style = "--" if colour == _LIMIT else "-"
        axes.plot(range(len(values)), values, style, color=colour, linewidth=1.2)
        return
    for k, value in enumerate(values):
        axes.hlines(value, k - 0.4, k + 0.4, color=colour, linewidth=2)


def _save(figure: Figure, data: Mapping[str, Any], stem: Path) -> None:
    facts = data["machine"]
    without = [f"{row['label']}: {row['error']}" for row in data.get("rows", ()) if row["error"]]
    versions = ", ".join(f"{name} {facts[name]}" for name in _VERSIONS if name in facts)
    figure.supxlabel(
        f"{facts['processor']}, {facts['cores']} cores, {facts['memory']}, {facts['kernel']}, "
        f"{facts['file system']}\n{versions}\n" + "\n".join([data["notes"][-1], *without]),
        x=0.01,
        ha="left",
        fontsize=7.5,
        color="#57606a",
    )
    FigureCanvasAgg(figure)
    figure.savefig(stem.with_suffix(".png"), dpi=150)
    # Without the date, the same figures give the same file.
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})


_VERSIONS = (
    "polyak",
    "Python",
    "numpy",
    "h5py",
    "tensorflow",
    "keras",
    "mergekit",
    "torch",
    "nces",
)
