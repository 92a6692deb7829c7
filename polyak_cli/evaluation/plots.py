"""Draw learning curves, the distances between checkpoints, and the scores of a sweep.

Only this module imports matplotlib, inside its functions; no display is needed.  The same numbers
give the same file: no dates, no random identifiers.  It does not know how the numbers were made.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from polyak_cli.errors import MissingExtraError, OutputError, UsageError, shown

SUFFIXES = (".png", ".svg")
#: Colours of lines and of the grid; the HTML page replaces them by those of its theme.
INK = "#444444"
GRID = "#e6e6e6"
# The palette of Okabe and Ito ("Color Universal Design", 2008), which colour-blind readers can
# distinguish, and two more.
_TRAIN, _TEST = "#0072b2", "#d55e00"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7fd5")
_STYLE: Any = {  # matplotlib types it as a dict of 300 literal keys
    "svg.hashsalt": "polyak",  # else the identifiers in the SVG are random
    "svg.fonttype": "none",  # text stays text, so that the page can colour it
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
# matplotlib writes its version and the time into a file unless these are None.
_UNSTAMPED: Mapping[str, Any] = {".png": {"Software": None}, ".svg": {"Date": None}}


def check_path(path: Path) -> None:
    """Refuse a path that no picture can be written to, before any work.

    Raises:
        UsageError: the suffix is neither .png nor .svg.
        MissingExtraError: matplotlib is not installed.
        OutputError: its folder does not exist.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"{shown(path)}: is neither {' nor '.join(SUFFIXES)}; give the plot one of these "
            "suffixes"
        )
    try:
        import matplotlib  # noqa: F401 - imported only to see whether it is installed
    except ImportError:
        raise MissingExtraError("a plot", "plot") from None
    if not path.resolve().parent.is_dir():
        raise OutputError(f"{shown(path)}: there is no folder to write it in; create it first")


def draw_learning_curves(history: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw loss and accuracy over the epochs, for the training and the test points.

    Args:
        history: metric -> its value after each epoch, counted from 0: loss and accuracy, and
            val_loss and val_accuracy, as in Keras's history; a missing one is not drawn.
        path: the .png or .svg file; replaced if it exists.

    Raises:
        UsageError: another suffix.
        MissingExtraError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    with _open_figure(path) as figure:
        for axes, metric, label in zip(
            figure.subplots(1, 2),
            ("loss", "accuracy"),
            ("Loss (categorical cross-entropy)", "Accuracy"),
            strict=True,
        ):
            _draw_curves(axes, history, metric)
            axes.set(xlabel="Epoch", ylabel=label)


def draw_distances(
    labels: Sequence[str],
    to_previous: Sequence[float | None],
    to_average: Sequence[float],
    path: Path,
) -> None:
    """Draw the distance of each checkpoint from the previous one and from the average.

    Args:
        labels: names of the checkpoints, oldest first.
        to_previous: distance to the previous checkpoint, divided by the norm of the average; None
            for the oldest.
        to_average: distance to the average, divided by the same norm.
        path: the .png or .svg file; replaced if it exists.

    Raises:
        UsageError: another suffix.
        MissingExtraError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    places = range(len(labels))
    with _open_figure(path) as figure:
        axes = figure.subplots()
        axes.plot(places, to_average, "o-", color=_TEST, lw=1.2, ms=4, label="to the average")
        steps = [math.nan if step is None else step for step in to_previous]
        axes.plot(places, steps, "s-", color=_TRAIN, lw=1.2, ms=4, label="to the one before")
        shown_places = places[:: -(-len(labels) // 20)]  # more labels would overlap
        axes.set_xticks(shown_places, [labels[k] for k in shown_places])
        axes.set(xlabel="Checkpoint", ylabel="Relative distance")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)


def draw_sweep(found: Mapping[str, Any], path: Path) -> None:
    """Draw the scores on the reporting rows: singles as points, one line a scheme.

    Args:
        found: the result of `sweeping.Sweep.data`.
        path: the .png or .svg file; replaced if it exists.

    Raises:
        UsageError: another suffix.
        MissingExtraError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    metrics = [name for name in ("accuracy", "loss") if _select_points(found, "single", name)]
    with _open_figure(path) as figure:
        panels = figure.subplots(1, max(1, len(metrics)), squeeze=False)[0]
        for axes, metric in zip(panels, metrics, strict=False):
            _draw_candidates(axes, found, metric)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", frameon=False)


def _draw_candidates(axes: Any, found: Mapping[str, Any], metric: str) -> None:
    """Draw one metric of all candidates over the number of checkpoints averaged."""
    singles = [value for _, value in _select_points(found, "single", metric)]
    ages = range(len(singles), 0, -1)  # the newest is drawn where a window of 1 is
    axes.axhspan(min(singles), max(singles), color=INK, alpha=0.12, lw=0)
    axes.plot(ages, singles, "o", color=INK, ms=4, label="single")
    names = dict.fromkeys(
        (row["kind"], row["scheme"], row["parameter"])
        for row in found["rows"]
        if row["kind"] in ("average", "ensemble")
    )
    for k, (kind, scheme, parameter) in enumerate(names):
        line = _select_points(found, kind, metric, scheme, parameter)
        label = (scheme or kind) + ("" if parameter is None else f" {parameter:g}")
        style = "--" if kind == "ensemble" else "-"
        colour = _COLOURS[k % len(_COLOURS)]
        axes.plot(*zip(*line, strict=True), style, color=colour, lw=1.2, label=label)
    axes.set(xlabel="Checkpoints averaged (single: its age)", ylabel=metric.capitalize())


def _select_points(
    found: Mapping[str, Any],
    kind: str,
    metric: str,
    scheme: str = "",
    parameter: float | None = None,
) -> list[tuple[int, float]]:
    """Return (window, value) of the candidates of one kind that have the metric."""
    values = [
        (row["window"], row["metrics"]["reporting"].get(metric))
        for row in found["rows"]
        if (row["kind"], row["scheme"], row["parameter"]) == (kind, scheme, parameter)
    ]
    return [(window, value) for window, value in values if value is not None]


@contextlib.contextmanager
def _open_figure(path: Path) -> Iterator[Any]:
    """Yield an empty figure, and write it at the end of the block."""
    check_path(path)
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        # Figure and not pyplot: pyplot chooses a backend, which may want a display.
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        yield figure
        suffix = path.suffix.lower()
        try:
            figure.savefig(path, format=suffix[1:], dpi=150, metadata=_UNSTAMPED[suffix])
        except OSError as error:
            raise OutputError(f"{shown(path)}: cannot be written: {error.strerror}") from error


def _draw_curves(axes: Any, history: Mapping[str, Sequence[float]], metric: str) -> None:
    """Draw one metric: the training points, and the test points on top."""
    for name, label, colour in ((metric, "train", _TRAIN), (f"val_{metric}", "test", _TEST)):
        if name in history:
            axes.plot(range(len(history[name])), history[name], color=colour, lw=1.2, label=label)
    axes.margins(x=0.02)
    if axes.lines:
        # Loss falls and accuracy rises, which leaves these corners free.
        axes.legend(frameon=False, loc="upper right" if metric == "loss" else "lower right")
