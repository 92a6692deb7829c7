"""Write the results of a sweep as files, CSV, JSON, figures and one HTML page; and those of a run.

A page needs no other file and fetches nothing.  This module knows the data that
`sweeping.Sweep.data` and `geometry.Geometry.data` return; it does not know how they came about.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from polyak_cli import __version__, checkpoints
from polyak_cli.checkpoints.listing import KINDS_OF_MODEL
from polyak_cli.errors import (
    CheckpointError,
    MissingExtraError,
    OutputError,
    PolyakError,
    UsageError,
    shown,
    word_count,
)
from polyak_cli.evaluation import keras_files, plots, user_code
from polyak_cli.evaluation.forecast import word_forecast

Data = Mapping[str, Any]
#: The files of a report.
NAMES = ("sweep.csv", "sweep.json", "sweep.png", "sweep.svg", "report.html")


def check_folder(folder: Path, *, force: bool) -> None:
    """Refuse a folder that a report must not or cannot be written to, before any work.

    Raises:
        OutputError: a file or an older report is in the way.
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    plots.check_path(folder.resolve().parent / NAMES[2])
    check_jinja()
    if folder.exists() and not folder.is_dir():
        raise OutputError(
            f"{shown(folder)}: exists and is not a folder; name another folder for the report"
        )
    older = [name for name in NAMES if (folder / name).exists()]
    if older and not force:
        raise OutputError(
            f"{shown(folder)}: holds an older report ({older[0]}); use --force to replace it"
        )


def check_date(date: str | None) -> None:
    """Refuse the date of a report that is none.

    Raises:
        UsageError: it is not written as ISO 8601 says.
    """
    try:
        datetime.datetime.fromisoformat(date or "2026-11-29")
    except ValueError:
        raise UsageError(
            f"--date {shown(date)}: is no date; write it like 2026-11-29 or 2026-11-29T14:30"
        ) from None


def check_installed(sources: Sequence[str], model: str | None = None) -> None:
    """Refuse to sweep where packages are missing, and name all extras at once.

    Args:
        sources: of the checkpoints, which say whether Keras has to run them.
        model: what makes the models of files without one.

    Raises:
        MissingExtraError: matplotlib or jinja2, or what runs the models, is not installed.
    """
    plot = "" if find_spec("jinja2") and find_spec("matplotlib") else "plot"
    framework = keras_files.find_missing_extra()
    if framework and model is not None and user_code.is_function(model):
        framework = "" if not plot or find_spec("torch") else _guess_extra(model)
    elif framework and model is None and not _are_of_keras(sources):
        framework = ""  # these are refused for want of a function
    missing = [extra for extra in (framework, plot) if extra]
    if missing:
        raise MissingExtraError("polyak sweep", ",".join(missing))


def _are_of_keras(sources: Sequence[str]) -> bool:
    """Return whether there are files that Keras opens, by their names."""
    try:
        paths, _ = checkpoints.model_files(sources)
    except CheckpointError:
        return False
    return any(path.name.endswith(tuple(KINDS_OF_MODEL)) for path in paths)


def _guess_extra(model: str) -> str:
    """Return the extra that a function of the user needs most likely, where no framework is.

    It may need any, which shows only when it runs.  One of the tensors needs none of polyak's.
    """
    try:
        return "" if user_code.find_function(model, "").count_arguments() == 1 else "torch"
    except PolyakError:  # most likely it could not import a framework
        return "torch"


def check_training(plot: bool) -> None:
    """Refuse to train where packages are missing, and name all extras at once.

    Raises:
        MissingExtraError: TensorFlow or Keras, or for a plot matplotlib, is not installed.
    """
    framework = keras_files.find_missing_extra(["tensorflow"])
    picture = "plot" if plot and not find_spec("matplotlib") else ""
    missing = [extra for extra in (framework, picture) if extra]
    if missing:
        raise MissingExtraError("polyak train", ",".join(missing))


def check_jinja() -> None:
    """Refuse to make a page without jinja2.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    # find_spec, so that nothing is imported before there is a page to render.
    if find_spec("jinja2") is None:
        raise MissingExtraError("an HTML report", "plot")


def write_files(found: Data, folder: Path) -> list[Path]:
    """Write the files of a report; each appears under its name only when it is complete.

    Raises:
        OutputError: they cannot be written.
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    try:
        folder.mkdir(exist_ok=True)
        # Beside their final names, so that `replace` is a rename within one file system.
        with tempfile.TemporaryDirectory(prefix=".polyak-report-", dir=folder) as hidden:
            csv_file, json_file, png, svg, page = (Path(hidden) / name for name in NAMES)
            csv_file.write_text(format_csv(found))
            json_file.write_text(format_json(found) + "\n")
            plots.draw_sweep(found, png)
            plots.draw_sweep(found, svg)
            page.write_text(render_page(found, _draw_panels(found, Path(hidden))))
            return [
                path.replace(folder / path.name) for path in (csv_file, json_file, png, svg, page)
            ]
    except OSError as error:
        raise OutputError(f"{shown(folder)}: cannot be written: {error.strerror}") from error


def _draw_panels(found: Data, folder: Path) -> dict[str, str]:
    """Return a figure of each metric as SVG; the page places them as its width allows."""
    panels = {}
    for metric in plots.list_metrics(found):
        path = folder / f"{metric}.svg"
        plots.draw_sweep(found, path, metric)
        panels[metric] = path.read_text()
    return panels


def format_json(found: Data, indent: int | None = 2) -> str:
    """Return a result as JSON, after the version of polyak that found it.

    NaN and infinity, which JSON cannot express, become null.
    """
    versioned = {"polyak": __version__, **found}  # a result that names its version keeps it
    return json.dumps(_replace_non_finite(versioned), indent=indent, allow_nan=False)


def _replace_non_finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replace_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_csv(found: Data) -> str:
    """Return one line a model; coefficients are separated by spaces, oldest first."""
    text = io.StringIO()
    columns = _list_columns(found)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["rank", "label", "kind", "scheme", "parameter", "window", "also", "coefficients"]
        + [f"{split}_{metric}" for split, metric in columns]
    )
    for row in found["rows"]:
        numbers = [row["metrics"][split].get(metric) for split, metric in columns]
        about = [row[key] for key in ("rank", "label", "kind", "scheme", "parameter", "window")]
        also = "; ".join(one["label"] for one in row["also"])
        # repr() is the shortest text that reads back as the same float.
        writer.writerow([*about, also, " ".join(map(repr, row["coefficients"])), *numbers])
    return text.getvalue()


def _list_columns(found: Data) -> list[tuple[str, str]]:
    """Return every pair of a split and a metric, in the order of the columns."""
    names = dict.fromkeys(
        name for row in found["rows"] for scores in row["metrics"].values() for name in scores
    )
    return [(split, name) for split in found["splits"] for name in names]


# --- in words -------------------------------------------------------------------------------------


def write_verdict(found: Data) -> str:
    """Return the answer of the sweep in one sentence: whether the winner beats the newest."""
    name, newest = (shown(row["label"], 60) for row in (found["winner"], find_newest(found)))
    if len(list_models(found)) == 1:
        return f"There is one model, {newest}, and nothing to compare it with."
    if found["verdict"] == "newest":
        return f"Keep the newest checkpoint, {newest}: no other model was better."
    if found["verdict"] == "better":
        return f"{name} is better than the newest checkpoint, {newest}."
    if found["verdict"] == "worse":
        return (
            f"Keep the newest checkpoint, {newest}: {name} was chosen, and is worse on other rows."
        )
    if found["verdict"] == "within noise":
        return (
            f"No gain in {found['metric']} is shown: {name} is within noise of the newest "
            f"checkpoint, {newest}; keep the newest."
        )
    return (
        f"{name} and the newest checkpoint, {newest}, have no finite {found['metric']} that can be "
        "compared."
    )


def write_choice(found: Data) -> str:
    """Return how the winner was chosen, and the best model of the other kind."""
    winner, metric = found["winner"], found["metric"]
    models, rows = list_models(found), found["splits"]["selection"]["rows"]
    text = (
        f"Best {metric} of {word_count(len(models), 'model')} on {rows} rows: "
        f"{shown(winner['label'], 60)}, {_choosing_score(winner, metric)}"
    )
    is_single = winner["kind"] == "single"
    # What lies beyond the checkpoints is no average of them; it stands in the table.
    kinds = ("average", "soup") if is_single else ("single",)
    others = [row for row in models if row["kind"] in kinds]
    if not others:
        return f"{text}."
    kind = "average" if is_single else "single checkpoint"
    return f"{text}. The best {kind}: {shown(others[0]['label'], 60)}, " + (
        f"{_choosing_score(others[0], metric)}."
    )


def list_models(found: Data) -> list[Data]:
    """Return the rows that are models, so without ensembles, the best first."""
    return sorted((row for row in found["rows"] if row["rank"]), key=lambda row: int(row["rank"]))


def write_equals(row: Data) -> str:
    """Return the other names of a model, or nothing: a scheme's windows, then the next's."""
    windows: dict[str, list[str]] = {}
    for one in row["also"]:
        name, _, window = one["label"].rpartition(", ")
        windows.setdefault(window if name else one["label"], []).append(name)
    return "; ".join(
        window if names == [""] else f"{window} by {', '.join(names)}"
        for window, names in windows.items()
    )


def list_gains(found: Data) -> list[list[str]]:
    """Return a table of the winner's gains, its titles first."""
    table = [["winner minus", "metric", "difference", "from", "to", "p", "verdict"]]
    for gain in found["gains"]:
        p = gain.get("sign_flip_p") if gain.get("mcnemar_p") is None else gain["mcnemar_p"]
        numbers = [format_number(gain[name], sign="+") for name in ("difference", "low", "high")]
        over = "the newest" if gain["over"] == "newest" else f"the {gain['over']}"
        row = [over, gain["metric"], *numbers, "-" if p is None else f"{p:.3g}", gain["verdict"]]
        table.append(row)
    return table


def format_number(value: float | None, sign: str = "") -> str:
    """Return a score in four decimals, or with an exponent where these would not show it."""
    if value is None:
        return "-"
    # The mean squared error of small numbers may be 1e-6, that of large ones 1e+6.
    plain = value == 0 or 5e-5 <= abs(value) < 1e5 or not math.isfinite(value)
    return f"{value:{sign}.4f}" if plain else f"{value:{sign}.2e}"


def find_newest(found: Data) -> Data:
    """Return the row of the newest checkpoint, the last of the singles."""
    singles: list[Data] = [row for row in found["rows"] if row["kind"] == "single"]
    return singles[-1]


def _choosing_score(row: Data, metric: str) -> str:
    return format_number(row["metrics"]["selection"].get(metric))


# --- the page -------------------------------------------------------------------------------------


class _Bar(NamedTuple):
    """One coefficient as a bar, in pixels from the top left corner."""

    x: int
    y: str
    width: int
    height: str


class _Cell(NamedTuple):
    """One score: its text, and the number to sort by ("" if there is none)."""

    text: str
    number: str


class _PageRow(NamedTuple):
    """One candidate as the page shows it."""

    label: str
    kind: str
    window: int
    also: str
    wins: bool
    newest: bool
    largest: str  # of its coefficients; the column is sorted by it
    coefficients: str
    width: int
    height: int
    bars: Sequence[_Bar]
    cells: Sequence[_Cell]


def render_page(found: Data, figures: Mapping[str, str]) -> str:
    """Return the HTML page.

    Args:
        found: the result of `Sweep.data`.
        figures: metric -> its drawing, as SVG.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    columns = _list_columns(found)
    gain_titles, *gains = list_gains(found)
    titles = ["model", "kind", "window", "coefficients"]
    ensembles = [row for row in found["rows"] if not row["rank"]]
    return _render(
        "report.html.j2",
        **{name: found[name] for name in _NAMED},
        verdict=write_verdict(found),
        choice=write_choice(found),
        forecast=word_forecast(found["forecast"]) if found["forecast"] else "",
        winner=found["winner"],
        gain_titles=gain_titles,
        gains=gains,
        figures=_inline_all(figures),
        titles=titles + [f"{metric} ({split})" for split, metric in columns],
        rows=[
            _lay_out_row(row, columns, row is find_newest(found))
            for row in (*list_models(found), *ensembles)
        ],
        **found["splits"],
    )


def _render(template: str, **content: Any) -> str:
    """Return a page from a template of this folder.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    check_jinja()
    import jinja2

    # jinja2 opens the files beside this module by itself; they are part of the package.  Style and
    # script are included as they are.  Everything else is escaped: labels, paths and notes hold
    # names of files, which may be chosen by somebody else.
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    page: str = environment.get_template(template).render(content)
    return page


def _inline_all(figures: Mapping[str, str]) -> list[Any]:
    """Return drawings for a page: name -> SVG."""
    from markupsafe import Markup

    # Markup: matplotlib escaped the text in its own drawing.
    return [Markup(_inline(*figure)) for figure in figures.items()]  # noqa: S704


#: What the page shows as it is.
_NAMED = ("polyak", "command", "date", "data", "winner_command", "checkpoints", "notes")


def _inline(metric: str, figure: str) -> str:
    """Return a drawing that takes the colours of the page, and whose identifiers are its own."""
    drawing = figure[figure.index("<svg") :]
    # Without a fixed size the style sheet scales it to the width of the page.
    drawing = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", drawing, count=1)
    drawing = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", drawing, count=1)
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)  # nothing refers to a group
    drawing = re.sub(r'( id="|href="#|url\(#)', rf"\1{metric}-", drawing)
    drawing = drawing.replace("fill: #ffffff", "fill: none")  # the background
    return drawing.replace(plots.INK, "currentColor").replace(plots.GRID, "var(--line)")


def _lay_out_row(row: Data, columns: Sequence[tuple[str, str]], is_newest: bool) -> _PageRow:
    """Return what the page shows of one candidate; its coefficients oldest first."""
    width, height = 6, 18
    coefficients = row["coefficients"]
    largest = max(coefficients)
    # From the zero line up, or down where a coefficient is negative.
    unit = height / (largest - min(0.0, *coefficients))
    bars = [
        _Bar(
            k * width,
            f"{(largest - max(c, 0.0)) * unit:.2f}",
            width - 1,
            f"{abs(c) * unit:.2f}",
        )
        for k, c in enumerate(coefficients)
        if c
    ]
    return _PageRow(
        label=row["label"],
        kind=row["kind"],
        window=row["window"],
        also=write_equals(row),
        wins=row["rank"] == 1,
        newest=is_newest,
        largest=f"{largest:.6f}",
        coefficients=", ".join(f"{c:.6f}" for c in coefficients),
        width=width * len(coefficients),
        height=height,
        bars=bars,
        cells=[_make_cell(row["metrics"][split].get(metric)) for split, metric in columns],
    )


def _make_cell(value: float | None) -> _Cell:
    if value is None or not math.isfinite(value):
        return _Cell("-", "")
    return _Cell(format_number(value), repr(value))


# --- the geometry of a run ------------------------------------------------------------------------

#: Tensors that the page of a run lists.
_MOST_TENSORS = 200


def check_picture(path: Path) -> None:
    """Refuse a path to which no picture or page of a run can be written, before any work.

    Raises:
        UsageError: the suffix is not .png, .svg or .html.
        MissingExtraError: matplotlib or jinja2 is not installed.
        OutputError: its folder does not exist.
    """
    if path.suffix.lower() != ".html":
        if path.suffix.lower() not in plots.SUFFIXES:
            expected = f"{', '.join(plots.SUFFIXES)} or .html"
            raise UsageError(f"{shown(path)}: has an unknown suffix; expected {expected}")
        plots.check_path(path)
        return
    check_jinja()
    plots.check_path(path.with_suffix(".svg"))


def write_picture(found: Data, path: Path, verdict: Sequence[str] = ()) -> None:
    """Write the geometry of a run as a picture or a page; replaces an older one.

    Args:
        found: the result of `Geometry.data`.
        path: the .png, .svg or .html file.
        verdict: lines for the page on how the run moves.

    Raises:
        OutputError: the file cannot be written.
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    if path.suffix.lower() != ".html":
        plots.draw_run(found, path)
        return
    try:
        # Beside its final name, so that `replace` is a rename within one file system.
        with tempfile.TemporaryDirectory(prefix=".polyak-page-", dir=path.parent) as hidden:
            figures = {}
            for panel in ("path", "steps"):
                drawn = Path(hidden) / f"{panel}.svg"
                plots.draw_run(found, drawn, panel)
                figures[panel] = drawn.read_text()
            page = Path(hidden) / "page.html"
            page.write_text(render_run(found, figures, verdict))
            page.replace(path)
    except OSError as error:
        raise OutputError(f"{shown(path)}: cannot be written: {error.strerror}") from error


def render_run(found: Data, figures: Mapping[str, str], verdict: Sequence[str] = ()) -> str:
    """Return the HTML page of a run.

    Args:
        found: the result of `Geometry.data`.
        figures: name -> its drawing, as SVG.
        verdict: lines on how the run moves.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    return _render(
        "geometry.html.j2",
        **{name: found[name] for name in ("scheme", "parameters", "elements", "notes")},
        numbers=_list_numbers(found),
        verdict=verdict,
        rows=_list_checkpoints(found),
        tensors=_list_tensors(found)[: 1 + _MOST_TENSORS],
        left=max(0, len(found["tensors"]) - _MOST_TENSORS),
        figures=_inline_all(figures),
        polyak=__version__,
    )


def _list_numbers(found: Data) -> list[tuple[str, str]]:
    """Return what each number of the whole run is, and the number."""
    counts = found["effective_number"]
    first, second = [*found["components"], 0.0, 0.0][:2]
    return [
        ("Spread around the equal average, of its squared norm", _word_length(found["spread"])),
        ("Mean cosine of each step with the next", _word_cosine(found["mean_cosine"])),
        ("Along one direction, of the spread", f"{first:.0%}"),
        ("Along the next", f"{second:.0%}"),
        ("Effective number, if checkpoints were independent", f"{counts['independent']:.2f}"),
        ("Effective number, as they are", _word_count(counts["correlated"])),
        ("Correlation of neighbours", _word_cosine(counts["correlation"])),
    ]


def _list_checkpoints(found: Data) -> list[list[str]]:
    """Return a table of the checkpoints, its titles first."""
    titles = ["checkpoint", "epoch", "coefficient", "to previous", "cosine"]
    table = [[*titles, "to newest", "to average"]]
    for row in found["checkpoints"]:
        epoch = "-" if row["epoch"] is None else str(row["epoch"])
        step, *far = [_word_length(row[key]) for key in ("to_previous", "to_newest", "to_average")]
        own = [row["name"], epoch, f"{row['coefficient']:.4f}", step]
        table.append([*own, _word_cosine(row["cosine"]), *far])
    return table


def _list_tensors(found: Data) -> list[list[str]]:
    """Return a table of the tensors, its titles first."""
    table = [["tensor", "share of spread", "relative", "cosine", "numbers"]]
    for one in found["tensors"]:
        lengths = [f"{one['share']:.1%}", _word_length(one["relative"])]
        turned = _word_cosine(one["cosine"])
        table.append([one["name"] or "all tensors", *lengths, turned, f"{one['elements']:,}"])
    return table


def _word_length(value: float | None) -> str:
    return "-" if value is None else f"{value:.3e}"


def _word_cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def _word_count(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
