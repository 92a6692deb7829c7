"""Pictures: learning curves, how far checkpoints are apart, and what a sweep found.

The only module that imports matplotlib, inside its functions and without a display.  The same
numbers give the same file: no dates, no random identifiers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from polyak_cli.errors import MissingExtraError, OutputError, UsageError, shown

SUFFIXES = (".png", ".svg")
_TRAIN, _TEST, _INK = "#0072b2", "#d55e00", "#444444"  # told apart by the colour-blind too
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7fd5")
_STYLE: Any = {  # matplotlib types it as a dict of 300 literal keys
    "svg.hashsalt": "polyak",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}
_UNSTAMPED: Mapping[str, Any] = {".png": {"Software": None}, ".svg": {"Date": None}}


def check(path: Path) -> None:
    """Refuse a name that no picture can be written under, before any work.

    Raises:
        UsageError: the suffix is neither .png nor .svg.
        MissingExtraError: matplotlib is not installed.
        OutputError: there is no such folder.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"{shown(path)}: is neither {' nor '.join(SUFFIXES)}; give the plot one of these "
            "suffixes"
        )
    try:
        import matplotlib  # noqa: F401 - only whether it is there
    except ImportError:
        raise MissingExtraError("a plot", "plot") from None
    if not path.resolve().parent.is_dir():
        raise OutputError(f"{shown(path)}: there is no folder to write it in; create it first")


def learning_curves(history: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw loss and accuracy over the epochs, on the training and on the test points.

    Args:
        history: metric -> its value after each epoch, counted from 0: loss and accuracy, and
            val_loss and val_accuracy, as in Keras's history; one that is missing is not drawn.
        path: the .png or .svg file; replaced if it exists.

    Raises:
        UsageError: another suffix.
        MissingExtraError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    with _figure(path) as figure:
        for axes, metric, label in zip(
            figure.subplots(1, 2),
            ("loss", "accuracy"),
            ("Loss (categorical cross-entropy)", "Accuracy"),
            strict=True,
        ):
            _curves(axes, history, metric)
            axes.set(xlabel="Epoch", ylabel=label)


def distances(
    labels: Sequence[str],
    to_previous: Sequence[float | None],
    to_average: Sequence[float],
    path: Path,
) -> None:
    """Draw how far each checkpoint of a run is from the one before and from the average.

    Args:
        labels: of the checkpoints, oldest first.
        to_previous: relative to the norm of the average; None for the oldest.
        to_average: the same, to the average.
        path: the .png or .svg file; replaced if it exists.

    Raises:
        UsageError: another suffix.
        MissingExtraError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    places = range(len(labels))
    with _figure(path) as figure:
        axes = figure.subplots()
        axes.plot(places, to_average, "o-", color=_TEST, lw=1.2, ms=4, label="to the average")
        steps = [math.nan if step is None else step for step in to_previous]
        axes.plot(places, steps, "s-", color=_TRAIN, lw=1.2, ms=4, label="to the one before")
        shown_places = places[:: -(-len(labels) // 20)]  # more labels would overlap
        axes.set_xticks(shown_places, [labels[k] for k in shown_places])
        axes.set(xlabel="Checkpoint", ylabel="Relative distance")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)


def sweep(found: Mapping[str, Any], path: Path) -> None:
    """Draw how candidates score on the reporting rows: singles as points, a line for each scheme.

    Args:
        found: of `sweeping.Sweep.data`.
        path: the .png or .svg file; replaced if it exists.

    Raises:
        UsageError: another suffix.
        MissingExtraError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    metrics = [name for name in ("accuracy", "loss") if _points(found, "single", name)]
    with _figure(path) as figure:
        panels = figure.subplots(1, max(1, len(metrics)), squeeze=False)[0]
        for axes, metric in zip(panels, metrics, strict=False):
            _candidates(axes, found, metric)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", frameon=False)


def _candidates(axes: Any, found: Mapping[str, Any], metric: str) -> None:
    """Draw one metric of all candidates over the number of checkpoints that count."""
    singles = [value for _, value in _points(found, "single", metric)]
    ages = range(len(singles), 0, -1)  # the newest stands where a window of one does
    axes.axhspan(min(singles), max(singles), color=_INK, alpha=0.12, lw=0)
    axes.plot(ages, singles, "o", color=_INK, ms=4, label="single")
    names = dict.fromkeys(
        (row["kind"], row["scheme"], row["parameter"])
        for row in found["rows"]
        if row["kind"] in ("average", "ensemble")
    )
    for k, (kind, scheme, parameter) in enumerate(names):
        line = _points(found, kind, metric, scheme, parameter)
        label = (scheme or kind) + ("" if parameter is None else f" {parameter:g}")
        style = "--" if kind == "ensemble" else "-"
        colour = _COLOURS[k % len(_COLOURS)]
        axes.plot(*zip(*line, strict=True), style, color=colour, lw=1.2, label=label)
    axes.set(xlabel="Checkpoints averaged (single: its age)", ylabel=metric.capitalize())


def _points(
    found: Mapping[str, Any],
    kind: str,
    metric: str,
    scheme: str = "",
    parameter: float | None = None,
) -> list[tuple[int, float]]:
    """Return window and value of the candidates of one kind that have the metric."""
    values = [
        (row["window"], row["metrics"]["reporting"].get(metric))
        for row in found["rows"]
        if (row["kind"], row["scheme"], row["parameter"]) == (kind, scheme, parameter)
    ]
    return [(window, value) for window, value in values if value is not None]


@contextlib.contextmanager
def _figure(path: Path) -> Iterator[Any]:
    """Yield an empty figure, which is written when it has been drawn."""
    check(path)
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        yield figure
        suffix = path.suffix.lower()
        try:
            figure.savefig(path, format=suffix[1:], dpi=150, metadata=_UNSTAMPED[suffix])
        except OSError as error:
            raise OutputError(f"{shown(path)}: cannot be written: {error.strerror}") from error


def _curves(axes: Any, history: Mapping[str, Sequence[float]], metric: str) -> None:
    """Draw one metric, the test points over the training points."""
    for name, label, colour in ((metric, "train", _TRAIN), (f"val_{metric}", "test", _TEST)):
        if name in history:
            axes.plot(range(len(history[name])), history[name], color=colour, lw=1.2, label=label)
    axes.margins(x=0.02)
    if axes.lines:
        # Loss falls and accuracy rises, which leaves these corners free.
        axes.legend(frameon=False, loc="upper right" if metric == "loss" else "lower right")
