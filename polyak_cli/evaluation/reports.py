"""What a sweep found as files: CSV, JSON, and one HTML page that needs nothing else.

Knows the data of `sweeping.Sweep.data` and nothing of how it came about.
"""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from polyak_cli.errors import OutputError, shown
from polyak_cli.evaluation import plots

Data = Mapping[str, Any]
#: The inks of `plots.sweep`, in place of which the page puts those of its theme.
INK = "#444444"
_GRID = "#e6e6e6"


#: What a report's folder gets.
NAMES = ("sweep.csv", "sweep.json", "sweep.png", "sweep.svg", "report.html")


def check(folder: Path, *, force: bool) -> None:
    """Refuse, before any work, a folder that a report must not or cannot be written to.

    Raises:
        OutputError: what is in the way.
        MissingExtraError: matplotlib is not installed.
    """
    plots.check(folder.resolve().parent / NAMES[2])
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{shown(folder)}: exists and is no folder; name another for the report")
    older = [name for name in NAMES if (folder / name).exists()]
    if older and not force:
        raise OutputError(
            f"{shown(folder)}: holds an older report ({older[0]}); use --force to replace it"
        )


def write(found: Data, folder: Path) -> list[Path]:
    """Write the report's files, each of which appears whole.

    Raises:
        OutputError: they cannot be written.
    """
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".polyak-report-", dir=folder) as hidden:
            csv_file, json_file, png, svg, page = (Path(hidden) / name for name in NAMES)
            csv_file.write_text(as_csv(found))
            json_file.write_text(as_json(found) + "\n")
            plots.sweep(found, png)
            plots.sweep(found, svg)
            page.write_text(as_html(found, svg.read_text()))
            return [
                path.replace(folder / path.name) for path in (csv_file, json_file, png, svg, page)
            ]
    except OSError as error:
        raise OutputError(f"{shown(folder)}: cannot be written: {error.strerror}") from error


def as_json(found: Data, indent: int | None = 2) -> str:
    """Return everything; numbers that JSON has no word for are null."""
    return json.dumps(_finite(found), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_csv(found: Data) -> str:
    """Return a line for each candidate; coefficients with spaces between them, oldest first."""
    text = io.StringIO()
    columns = _columns(found)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["label", "kind", "scheme", "parameter", "window", "coefficients"]
        + [f"{split}_{metric}" for split, metric in columns]
    )
    for row in found["rows"]:
        numbers = [row["metrics"][split].get(metric) for split, metric in columns]
        about = [row["label"], row["kind"], row["scheme"], row["parameter"], row["window"]]
        writer.writerow([*about, " ".join(map(repr, row["coefficients"])), *numbers])
    return text.getvalue()


def _columns(found: Data) -> list[tuple[str, str]]:
    """Return every metric on every split."""
    names = dict.fromkeys(
        name for row in found["rows"] for scores in row["metrics"].values() for name in scores
    )
    return [(split, name) for split in found["splits"] for name in names]


def sentences(found: Data) -> Iterator[str]:
    """Yield what the sweep says, in words."""
    selection, reporting = (found["splits"][name]["rows"] for name in ("selection", "reporting"))
    yield (
        f"The best of {len(found['rows'])} candidates by {found['metric']} on {selection} rows for "
        f"choosing: {found['winner']['label']}."
    )
    for gain in found["gains"]:
        p = "" if gain["mcnemar_p"] is None else f", McNemar p {gain['mcnemar_p']:.3g}"
        yield (
            f"On {reporting} other rows, its {gain['metric']} differs from that of the "
            f"{gain['over']} checkpoint by {gain['difference']:+.4f} (95 % interval "
            f"{gain['low']:+.4f} to {gain['high']:+.4f}{p}): {gain['verdict']}."
        )


# --- the page -------------------------------------------------------------------------------------


def as_html(found: Data, figure: str) -> str:
    """Return the page.

    Args:
        found: of `Sweep.data`.
        figure: the drawing, as SVG.
    """
    words = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in sentences(found))
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in found["notes"])
    return _PAGE.format(
        style=_STYLE,
        script=_SCRIPT,
        words=words,
        figure=_inline(figure),
        table=_table(found),
        inputs="".join(map(_input, found["checkpoints"])),
        polyak=html.escape(found["polyak"]),
        notes=f"<h2>Notes</h2><ul>{notes}</ul>" if notes else "",
    )


def _input(checkpoint: Data) -> str:
    """Return where a checkpoint came from: which file, of which epoch, size and content."""
    epoch = "" if checkpoint["epoch"] is None else f"epoch {checkpoint['epoch']}, "
    digests = "".join(f"<br><code>{digest}</code>" for digest in checkpoint["sha256"])
    about = f"{epoch}{checkpoint['size']:,} bytes, SHA-256{digests}"
    return f"<li>{html.escape(checkpoint['path'])}: {about}</li>"


def _inline(figure: str) -> str:
    """Return a drawing that takes the colours of the page."""
    drawing = figure[figure.index("<svg") :]
    drawing = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", drawing, count=1)
    drawing = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", drawing, count=1)
    drawing = drawing.replace("fill: #ffffff", "fill: none")  # the paper
    return drawing.replace(INK, "currentColor").replace(_GRID, "var(--line)")


def _table(found: Data) -> str:
    columns = _columns(found)
    titles = ["candidate", "kind", "window", "coefficients"]
    titles += [f"{metric} ({split})" for split, metric in columns]
    head = "".join(
        f'<th aria-sort="none"><button type="button">{html.escape(title)}</button></th>'
        for title in titles
    )
    rows = "".join(_table_row(row, columns, row == found["winner"]) for row in found["rows"])
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _table_row(row: Data, columns: Sequence[tuple[str, str]], wins: bool) -> str:
    cells = [
        f"<td>{html.escape(row['label'])}{' <b>best</b>' if wins else ''}</td>",
        f"<td>{html.escape(row['kind'])}</td>",
        f'<td class="number">{row["window"]}</td>',
        f'<td data-value="{max(row["coefficients"]):.6f}">{_bars(row["coefficients"])}</td>',
    ]
    for split, metric in columns:
        value = row["metrics"][split].get(metric)
        known = value is not None and math.isfinite(value)
        text, number = (f"{value:.4f}", repr(value)) if known else ("-", "")
        cells.append(f'<td class="number" data-value="{number}">{text}</td>')
    style = ' class="best"' if wins else ""
    return f"<tr{style}>{''.join(cells)}</tr>"


def _bars(coefficients: Sequence[float]) -> str:
    """Draw coefficients as small bars, oldest first."""
    width, height, most = 6, 18, max(coefficients)
    bars = "".join(
        f'<rect x="{k * width}" y="{height * (1 - c / most):.2f}" width="{width - 1}" '
        f'height="{height * c / most:.2f}"/>'
        for k, c in enumerate(coefficients)
        if c
    )
    title = html.escape(", ".join(f"{c:.6f}" for c in coefficients))
    return (
        f'<svg class="bars" role="img" width="{width * len(coefficients)}" height="{height}">'
        f"<title>{title}</title>{bars}</svg>"
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'">
<title>Which average is best?</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>Which average is best?</h1>
{words}
<figure>{figure}</figure>
<h2>All candidates</h2>
<div class="scroll">{table}</div>
<h2>Checkpoints</h2>
<ol>{inputs}</ol>
<p>Averaged by polyak {polyak}.</p>
{notes}
</main>
<script>{script}</script>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #222222; --line: #dddddd;
  --accent: #0072b2; --best: #e8f3fa; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181b; --ink: #e3e3e3; --line: #3a3d42; --accent: #56b4e9; --best: #1d2c38; }
}
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 1rem; }
figure { margin: 1rem 0; }
figure svg { width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--line); text-align: left;
  white-space: nowrap; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--accent); }
th[aria-sort="ascending"] button::after { content: " \\2191"; }
th[aria-sort="descending"] button::after { content: " \\2193"; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.best { background: var(--best); }
code { font-size: 0.8rem; overflow-wrap: anywhere; }
.bars rect { fill: var(--accent); }
"""

_SCRIPT = """
"use strict";
const body = document.querySelector("tbody");
const heads = [...document.querySelectorAll("th")];
const value = (row, k) => {
  const cell = row.cells[k], text = cell.dataset.value ?? cell.textContent;
  const number = Number(text);
  return text === "" ? null : Number.isNaN(number) ? text : number;
};
heads.forEach((head, k) => head.querySelector("button").addEventListener("click", () => {
  const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  heads.forEach((other) => other.setAttribute("aria-sort", "none"));
  head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
  const order = (a, b) => {
    const x = value(a, k), y = value(b, k);
    if (x === null || y === null) return (x === null) - (y === null);
    return sign * (typeof x === typeof y && typeof x === "number" ? x - y
      : String(x).localeCompare(String(y)));
  };
  body.append(...[...body.rows].sort(order));
}));
"""
