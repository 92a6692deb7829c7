"""Draw learning curves, the distances and the path of a run, and the scores of a sweep.

Only this module imports matplotlib, inside its functions; no display is needed.  The same numbers
give the same file: no dates, no random identifiers.  It does not know how the numbers were made.
"""

from __future__ import annotations

import contextlib
import html
import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from polyak_cli.errors import MissingExtraError, OutputError, UsageError, shown
from polyak_cli.evaluation.candidates import name_scheme

SUFFIXES = (".png", ".svg")
#: Colours of lines and of the grid; the HTML page replaces them by those of its theme.
INK = "#444444"
GRID = "#e6e6e6"
# The palette of Okabe and Ito ("Color Universal Design", 2008), which colour-blind readers can
# distinguish, and one more.  Orange and sky blue are darker than theirs: each colour stands out by
# 3 to 1 from white paper and from the dark page, as WCAG 1.4.11 asks.
_TRAIN, _TEST = "#0072b2", "#d55e00"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#c78400", "#3a93d0", "#8c6d31")
_WINNER = "#f0c000"  # its edge is in ink
_SOLID = 4  # so many lines are solid and the next are dashed, for who sees few colours
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
        raise UsageError(f"{shown(path)}: has an unknown suffix; expected {' or '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401 - imported only to see whether it is installed
    except ImportError:
        raise MissingExtraError("a plot", "plot") from None
    if not path.resolve().parent.is_dir():
        raise OutputError(f"{shown(path)}: its folder does not exist; create it first")


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
    last = ", ".join(f"{name} {values[-1]:.4g}" for name, values in history.items() if values)
    epochs = max(map(len, history.values()), default=0)
    about = f"After each of {epochs} epochs, for training and test points; after the last: {last}."
    with _open_figure(path, "Learning curves", about) as figure:
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
    far = max(places, key=to_average.__getitem__)
    about = (
        f"Relative distances of {len(labels)} checkpoints, oldest first. To the average: "
        f"{min(to_average):.3g} to {to_average[far]:.3g}, the farthest {shown(labels[far], 60)}."
    )
    with _open_figure(path, "Distances between checkpoints", about) as figure:
        axes = figure.subplots()
        axes.plot(places, to_average, "o-", color=_TEST, lw=1.2, ms=4, label="to the average")
        steps = [math.nan if step is None else step for step in to_previous]
        axes.plot(places, steps, "s-", color=_TRAIN, lw=1.2, ms=4, label="to the one before")
        shown_places = places[:: -(-len(labels) // 20)]  # more labels would overlap
        axes.set_xticks(shown_places, [labels[k] for k in shown_places], parse_math=False)
        axes.set(xlabel="Checkpoint", ylabel="Relative distance")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)


def draw_run(found: Mapping[str, Any], path: Path, panel: str | None = None) -> None:
    """Draw the path of a run in its first two components, and how its steps turn.

    Args:
        found: the result of `geometry.Geometry.data`.
        path: the .png or .svg file; replaced if it exists.
        panel: draw only "path" or "steps"; by default both.

    Raises:
        UsageError: another suffix.
        MissingExtraError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    panels = [panel] if panel else ["path", "steps"]
    draw = {"path": _draw_path, "steps": _draw_steps}
    about = " ".join(_describe_run(found, one) for one in panels)
    titles = {"path": "Path of the run", "steps": "How steps turn"}
    title = " and ".join(titles[one] for one in panels)
    with _open_figure(path, title, about, (4.6, 4.4) if panel else (9.6, 4.2)) as figure:
        for axes, one in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            draw[one](axes, found)


def _describe_run(found: Mapping[str, Any], panel: str) -> str:
    """Return in words what a panel of a run shows, for who cannot see it."""
    rows = found["checkpoints"]
    if panel == "steps":
        known = [row["cosine"] for row in rows if row["cosine"] is not None]
        if not known:
            return "No step can be compared with the next."
        return f"Cosine of each step with the next: {min(known):.3g} to {max(known):.3g}."
    shares = [f"{share:.0%}" for share in found["components"][:2]]
    return (
        f"{len(rows)} checkpoints in their first two components, which hold {' and '.join(shares)} "
        f"of the spread, from {shown(rows[0]['name'], 60)} to {shown(rows[-1]['name'], 60)}, and "
        "their average."
    )


def _draw_path(axes: Any, found: Mapping[str, Any]) -> None:
    """Draw the checkpoints in the plane in which they lie most apart, and their average."""
    rows, shares = found["checkpoints"], [*found["components"], 0.0, 0.0]

    def place(point: Sequence[float | None]) -> tuple[float, float]:
        x, y = [*(math.nan if one is None else one for one in point), 0.0][:2]
        return x, y

    points = [place(row["place"]) for row in rows]
    xs, ys = zip(*points, strict=True)
    axes.plot(xs, ys, "o-", color=_TRAIN, lw=1.2, ms=4, label="checkpoint")
    axes.plot(*points[-1], "s", color=_TEST, ms=7, label="newest", zorder=3)
    mean = place(found["average"]["place"])
    axes.plot(*mean, "*", mfc=_WINNER, mec=INK, mew=0.8, ms=15, ls="", label="average", zorder=4)
    for row, point in ((rows[0], points[0]), (rows[-1], points[-1])):
        name = shown(row["name"], 20) if row["epoch"] is None else str(row["epoch"])
        axes.annotate(
            name, point, xytext=(6, 6), textcoords="offset points", parse_math=False, fontsize=9
        )
    # A circle of distances is one only where both axes have one scale.
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.15)
    axes.locator_params(nbins=5)
    axes.set(
        xlabel=f"First component ({shares[0]:.0%} of the spread)",
        ylabel=f"Second component ({shares[1]:.0%})",
    )
    axes.legend(frameon=False, fontsize=9)


def _draw_steps(axes: Any, found: Mapping[str, Any]) -> None:
    """Draw the cosine of each step with the next over the epochs."""
    rows = found["checkpoints"]
    has_epochs = all(row["epoch"] is not None for row in rows)
    places = [row["epoch"] if has_epochs else k for k, row in enumerate(rows)]
    turns = [math.nan if row["cosine"] is None else row["cosine"] for row in rows]
    axes.axhline(0, color=INK, lw=0.8)
    axes.plot(places, turns, "o-", color=_TEST, lw=1.2, ms=4)
    axes.set_xlim(*_widen(places[0], places[-1]))
    axes.set_ylim(-1.05, 1.05)
    axes.locator_params(axis="x", nbins=6, integer=True)
    axes.set(
        xlabel="Epoch" if has_epochs else "Checkpoint",
        ylabel="Cosine of the step to it with the step from it",
    )


def _widen(low: float, high: float) -> tuple[float, float]:
    """Return an interval with room on both sides; of given order it may run backwards."""
    margin = 0.05 * abs(high - low) or 1.0
    return min(low, high) - margin, max(low, high) + margin


def draw_sweep(found: Mapping[str, Any], path: Path, metric: str | None = None) -> None:
    """Draw the scores on the reporting rows: singles as points, one line a scheme.

    Args:
        found: the result of `sweeping.Sweep.data`.
        path: the .png or .svg file; replaced if it exists.
        metric: draw only this one, with the legend below; by default all of `list_metrics`.

    Raises:
        UsageError: another suffix.
        MissingExtraError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    names = [metric] if metric else list_metrics(found)
    words = [_collect_series(found, name) for name in names]
    title = f"{_capitalise(' and '.join(names))} of single checkpoints and averages"
    about = " ".join(_describe_series(one) for one in words)
    # One panel is as wide as a phone, so that its text keeps its size there.
    size = (4.6, 4.8) if metric else (2.8 + 3.4 * max(2, len(names)), 4.2)
    with _open_figure(path, title, about, size) as figure:
        panels = figure.subplots(1, max(1, len(names)), squeeze=False)[0]
        for axes, series in zip(panels, words, strict=False):
            _draw_series(axes, series)
        place, columns = ("outside lower center", 2) if metric else ("outside right", 1)
        # A panel may have marks that the others lack; what they share is listed once.
        entries = {
            label: shape
            for axes in panels
            for shape, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        about_legend: Any = {"loc": place, "ncols": columns, "frameon": False, "fontsize": 9}
        legend = figure.legend(entries.values(), entries.keys(), **about_legend)
        for text in legend.get_texts():
            text.set_parse_math(False)  # the name of a file may hold a dollar


def list_metrics(found: Mapping[str, Any]) -> list[str]:
    """Return which of what was chosen by, accuracy and loss the single checkpoints have."""
    every = order_metrics(found["metric"])
    return [name for name in every if _collect_series(found, name).singles]


def order_metrics(chosen: str) -> list[str]:
    """Return the metrics of tables and figures: one of the user's own first, and the loss last."""
    return [*dict.fromkeys((*([chosen] if chosen != "loss" else []), "accuracy", "loss"))]


def _capitalise(text: str) -> str:
    """Return a text with a capital, without changing those of a function's name behind it."""
    return text[:1].upper() + text[1:]


class _Series(NamedTuple):
    """The scores of a sweep by one metric, as points of a place on the x axis and a value.

    Attributes:
        metric: accuracy, loss, or one of the user's own.
        rows: the number of rows that they were scored on.
        singles: the single checkpoints; the newest is at 1, where a window of 1 is.
        lines: name of a scheme, or of an extrapolation -> its windows.
        ensembles: windows, too.
        soups: name -> its point, at the number of its members.
        winner: name -> its point, if it has the metric.
    """

    metric: str
    rows: int
    singles: list[tuple[int, float]]
    lines: dict[str, list[tuple[int, float]]]
    ensembles: list[tuple[int, float]]
    soups: dict[str, tuple[int, float]]
    winner: dict[str, tuple[int, float]]

    @property
    def newest(self) -> list[float]:
        """The value of the newest checkpoint, or nothing if it has none."""
        return [value for place, value in self.singles if place == 1]


def _collect_series(found: Mapping[str, Any], metric: str) -> _Series:
    """Return the scores on the reporting rows, without those that are NaN or missing."""
    series = _Series(metric, found["splits"]["reporting"]["rows"], [], {}, [], {}, {})
    age = sum(row["kind"] == "single" for row in found["rows"])
    for row in found["rows"]:
        score = row["metrics"]["reporting"].get(metric)
        score = math.nan if score is None else score
        # A model of several names is a point of each: the newest begins the line of each scheme.
        for one in (row, *row["also"]):
            place = one["window"]
            if one["kind"] == "single":
                place, age = age, age - 1
            if math.isnan(score):
                continue
            if one is row and row["rank"] == 1:
                series.winner[shown(row["label"], 30)] = (place, score)
            if one["kind"] == "average":
                name = name_scheme(one["scheme"], one["parameter"])
                series.lines.setdefault(name, []).append((place, score))
            elif one["kind"] == "extrapolation":
                name = f"extrapolated by {one['parameter']:g}"
                series.lines.setdefault(name, []).append((place, score))
            elif one["kind"] == "soup":
                series.soups[f"{one['scheme']} soup"] = (place, score)
            else:
                {"single": series.singles, "ensemble": series.ensembles}[one["kind"]].append(
                    (place, score)
                )
    return series


def _draw_series(axes: Any, series: _Series) -> None:
    """Draw one metric of all candidates over the number of checkpoints averaged."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    for name, point in series.winner.items():
        axes.plot(
            *point,
            "*",
            mfc=_WINNER,
            mec=INK,
            mew=0.8,
            ms=15,
            ls="",
            label=f"winner: {name}",
            zorder=4,
        )
    axes.plot(*_split(series.singles), "o", color=INK, ms=4, label="single checkpoint", zorder=3)
    for value in series.newest:
        axes.axhline(value, color=INK, lw=0.8, label="newest checkpoint")
    singles = [value for _, value in series.singles if math.isfinite(value)]
    if singles:
        quarters = np.quantile(singles, (0.25, 0.75))
        axes.axhspan(*quarters, color=INK, alpha=0.15, lw=0, label="middle half of singles")
    for k, (name, line) in enumerate(series.lines.items()):
        style = "-" if k % len(_COLOURS) < _SOLID else (0, (6, 1.5))
        colour = _COLOURS[k % len(_COLOURS)]
        axes.plot(*_split(line), ls=style, color=colour, lw=1.4, label=name)
    if series.ensembles:
        axes.plot(*_split(series.ensembles), ":", color=INK, lw=1.6, label="ensemble")
    for marker, (name, point) in zip("Ds", series.soups.items(), strict=False):
        axes.plot(*point, marker, color=INK, mfc="none", ms=7, label=name)
    _scale(axes, series)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(
        xlabel="Number of newest checkpoints averaged\n(single checkpoint: 1 is the newest)",
        ylabel=f"{_capitalise(series.metric)} on {series.rows} reporting rows",
    )


def _split(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Return the places and the values of points in the order of places."""
    ordered = sorted(points)
    return [place for place, _ in ordered], [value for _, value in ordered]


def _scale(axes: Any, series: _Series) -> None:
    """Scale the y axis to the middle of the data, and mark what lies outside at its edge.

    One early checkpoint of a high loss would press all lines flat.
    """
    averages = [*(one for line in series.lines.values() for one in line), *series.ensembles]
    averages += [*series.soups.values(), *series.winner.values()]
    # Averages lie closer together than the singles that they are made of, and matter more.
    kept = [*_find_middle(series.singles, 1.5), *_find_middle(averages, 3)]
    kept += [*series.newest, *(value for _, value in series.winner.values())]
    kept = [value for value in kept if math.isfinite(value)]
    if not kept:
        return
    low, high = min(kept), max(kept)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
    axes.set_ylim(low - margin, high + margin)
    points = [*series.singles, *averages]
    for marker, edge, where, beyond in (
        ("^", high + margin, "above", {place for place, value in points if value > high}),
        ("v", low - margin, "below", {place for place, value in points if value < low}),
    ):
        if beyond:
            places, label = sorted(beyond), f"{where} the scale"
            # Half of a mark on the edge would be cut off.
            axes.plot(places, [edge] * len(places), marker, color=INK, label=label, clip_on=False)


def _find_middle(points: Sequence[tuple[int, float]], reach: float) -> list[float]:
    """Return the values that are not outliers.

    Outliers are outside Tukey's fences ("Exploratory Data Analysis", 1977), which stand ``reach``
    times the interquartile range beyond the quartiles.
    """
    import numpy as np

    finite = [value for _, value in points if math.isfinite(value)]
    if not finite:
        return []
    first, third = np.quantile(finite, (0.25, 0.75))
    fence = reach * (third - first)
    return [value for value in finite if first - fence <= value <= third + fence]


def _describe_series(series: _Series) -> str:
    """Return in words what a panel shows, for who cannot see it."""
    parts = [
        f"{_capitalise(series.metric)} on {series.rows} reporting rows, over the number of newest "
        f"checkpoints averaged. Single checkpoints: {_word_range(series.singles)}."
    ]
    parts += [f"The newest: {value:.4g}." for value in series.newest]
    lines = {**series.lines, **({"ensemble": series.ensembles} if series.ensembles else {})}
    parts += [f"{name}: {_word_range(line)}." for name, line in lines.items()]
    points = {**series.soups, **{f"winner, {k}": point for k, point in series.winner.items()}}
    parts += [f"{name}: {point[1]:.4g}." for name, point in points.items()]
    return " ".join(parts)


def _word_range(points: Sequence[tuple[int, float]]) -> str:
    values = [value for _, value in points]
    return f"{min(values):.4g} to {max(values):.4g}"


@contextlib.contextmanager
def _open_figure(
    path: Path, title: str, about: str, size: tuple[float, float] = (9, 3.8)
) -> Iterator[Any]:
    """Yield an empty figure, and write it at the end of the block.

    Args:
        path: the .png or .svg file.
        title: what is drawn, for who cannot see it.
        about: the numbers that it shows, in words.
        size: width and height in inches.
    """
    check_path(path)
    import matplotlib as mpl
    from matplotlib.figure import Figure

    suffix = path.suffix.lower()
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # Names of files may have letters that the font lacks; a browser has other fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        # Figure and not pyplot: pyplot chooses a backend, which may want a display.
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        drawn = io.BytesIO()
        figure.savefig(drawn, format=suffix[1:], dpi=150, metadata=_UNSTAMPED[suffix])
    content = drawn.getvalue()
    if suffix == ".svg":
        content = _add_description(content.decode(), title, about).encode()
    try:
        path.write_bytes(content)
    except OSError as error:
        raise OutputError(f"{shown(path)}: cannot be written: {error.strerror}") from error


def _add_description(svg: str, title: str, about: str) -> str:
    """Return a drawing with the title and description that a screen reader reads out."""
    # The first children of an element of this role are its name and description (SVG-AAM 1.0).
    start = svg.index("<svg ") + len("<svg ")
    end = svg.index(">", start) + 1
    # Only these three are special in text; matplotlib's own text is escaped already.
    title, about = (html.escape(text, quote=False) for text in (title, about))
    return (
        f'{svg[:start]}role="img" {svg[start:end]}\n <title>{title}</title>\n'
        f" <desc>{about}</desc>{svg[end:]}"
    )


def _draw_curves(axes: Any, history: Mapping[str, Sequence[float]], metric: str) -> None:
    """Draw one metric: the training points, and the test points on top."""
    for name, label, colour in ((metric, "train", _TRAIN), (f"val_{metric}", "test", _TEST)):
        if name in history:
            axes.plot(range(len(history[name])), history[name], color=colour, lw=1.2, label=label)
    axes.margins(x=0.02)
    if axes.lines:
        # Loss falls and accuracy rises, which leaves these corners free.
        axes.legend(frameon=False, loc="upper right" if metric == "loss" else "lower right")
