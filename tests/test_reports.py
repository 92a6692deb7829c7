"""The files of a sweep: numbers read back the same, and the page works in a real browser."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shlex
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from polyak_cli.cli import sweeps, tables
from polyak_cli.cli.averaging import average
from polyak_cli.errors import MissingExtraError, OutputError, UsageError
from polyak_cli.evaluation import plots, reports
from tests.browser import THEMES, find_faults, open_browser, show

SVG = "{http://www.w3.org/2000/svg}"


def found(evil: str = "model_3.h5") -> dict[str, Any]:
    """Return a possible result of a sweep of three checkpoints."""

    def name(label: str, kind: str, window: int) -> dict[str, Any]:
        scheme, _, parameter = label.partition(",")[0].partition(":")
        about = {"label": label, "kind": kind, "scheme": scheme if kind == "average" else ""}
        return {**about, "parameter": float(parameter or 0) or None, "window": window}

    def row(
        label: str, kind: str, window: int, coefficients: list[float], score: float, place: int
    ) -> Any:
        metrics = {"loss": 1 - score, "accuracy": score}
        return {
            **name(label, kind, window),
            "rank": None if kind == "ensemble" else place,
            "also": [],
            "coefficients": coefficients,
            "metrics": {"selection": metrics, "reporting": {"loss": None, "accuracy": score / 3}},
        }

    rows = [
        row("model_1.h5", "single", 1, [1.0, 0.0, 0.0], 0.7, 3),
        row("model_2.h5", "single", 1, [0.0, 1.0, 0.0], 0.5, 5),
        row(evil, "single", 1, [0.0, 0.0, 1.0], 0.6, 4),
        row("equal, last 2", "average", 2, [0.0, 0.5, 0.5], 0.8, 1),
        row("equal, last 3", "average", 3, [1 / 3, 1 / 3, 1 / 3], 0.75, 2),
        row("ensemble, last 2", "ensemble", 2, [0.0, 0.5, 0.5], 0.85, 0),
    ]
    rows[2]["also"] = [name("equal, last 1", "average", 1), name("exp:2, last 1", "average", 1)]
    gain = {"metric": "accuracy", "difference": 0.1, "low": -0.02, "high": 0.2, "mcnemar_p": 0.25}
    return {
        "polyak": "1.2.3",
        "command": "polyak sweep ckpts --data rows.npz -o report",
        "date": "2026-11-29",
        "data": "rows.npz",
        "verdict": "within noise",
        "winner_command": "polyak average ckpts --last 2 --scheme equal -o best.h5",
        "checkpoints": [
            {"path": path, "epoch": epoch, "size": 54321, "sha256": ["0a" * 32]}
            for path, epoch in (("model_1.h5", 1), ("model_2.h5", 2), (evil, None))
        ],
        "splits": {
            "selection": {"source": "half", "rows": 50},
            "reporting": {"source": "other", "rows": 51},
        },
        "metric": "accuracy",
        "rows": rows,
        "winner": rows[3],
        "gains": [{**gain, "over": "newest", "verdict": "within noise"}],
        "forecast": None,
        "notes": [],
    }


def test_csv_and_json_hold_every_number() -> None:
    """Each model has a line and an object, whose numbers read back the same."""
    data = found()
    lines = list(csv.DictReader(io.StringIO(reports.format_csv(data))))
    assert [line["label"] for line in lines] == [row["label"] for row in data["rows"]]
    for line, row in zip(lines, data["rows"], strict=True):
        assert [float(c) for c in line["coefficients"].split()] == row["coefficients"]
        assert float(line["reporting_accuracy"]) == row["metrics"]["reporting"]["accuracy"]
        assert line["reporting_loss"] == ""
    assert [line["also"] for line in lines[2:4]] == ["equal, last 1; exp:2, last 1", ""]
    assert [line["rank"] for line in lines] == ["3", "5", "4", "1", "2", ""]
    assert json.loads(reports.format_json(data)) == data


@pytest.mark.parametrize(
    ("verdict", "sentence"),
    [
        ("newest", "Keep the newest checkpoint, model_3.h5: no other model was better."),
        ("better", "equal, last 2 is better than the newest checkpoint, model_3.h5."),
        (
            "within noise",
            "No gain in accuracy is shown: equal, last 2 is within noise of the newest",
        ),
        ("worse", "Keep the newest checkpoint, model_3.h5: equal, last 2 was chosen, and is worse"),
        ("not comparable", "have no finite accuracy that can be compared"),
    ],
)
def test_the_verdict_is_one_sentence(verdict: str, sentence: str) -> None:
    """It names the winner and the newest checkpoint."""
    text = reports.write_verdict(found() | {"verdict": verdict})
    assert sentence in text
    assert text.count(".") == 1 + text.count(".h5")


def test_what_lies_beyond_the_checkpoints_is_called_no_average() -> None:
    """The best average is one; an extrapolation stands in the table, and has a line of its own."""
    data = found()
    data["winner"], data["rows"][0]["rank"] = data["rows"][0], 1
    beyond = {"label": "extrapolated by 0.5, last 2", "kind": "extrapolation", "parameter": 0.5}
    data["rows"][3] |= {**beyond, "scheme": "extrapolate", "rank": 3}
    assert reports.write_choice(data).endswith("The best average: equal, last 3, 0.7500.")
    assert "extrapolated by 0.5, last 2" in [row["label"] for row in reports.list_models(data)]
    assert plots._collect_series(data, "accuracy").lines["extrapolated by 0.5"] == [(2, 0.8 / 3)]


def test_a_sweep_of_one_checkpoint_says_so() -> None:
    """There is nothing to compare, and no table of gains."""
    data = found() | {"verdict": "newest", "gains": []}
    (row,) = data["rows"] = [{**data["rows"][2], "rank": 1}]
    lines = print_lines(data | {"winner": row})
    assert lines[0] == "There is one model, model_3.h5, and nothing to compare it with."
    assert lines[1] == "Best accuracy of 1 model on 50 rows: model_3.h5, 0.6000."
    assert "1 model, on the 50 rows for choosing (1) and 51 others (2):" in lines
    assert not any("interval" in line for line in lines)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        """Return that lines are laid out for a width."""
        return True


def print_lines(data: dict[str, Any], width: int = 0, **options: Any) -> list[str]:
    """Return the lines that the command prints, into a pipe or on a terminal of some width."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        stream = _Terminal() if width else io.StringIO()
        lines = tables.lay_out(sweeps.sweep_lines(data, Path("report"), None, **options), stream)
        return [re.sub(r"\x1b\[\d*m", "", line) for line in lines]  # without bold


def test_the_answer_comes_first_and_the_ten_best_follow() -> None:
    """Verdict, winner and its command are the first lines; each model has one row, best first."""
    data = found()
    lines = print_lines(data)
    assert lines[0].startswith("No gain in accuracy is shown: equal, last 2 is within noise")
    assert lines[1] == (
        "Best accuracy of 5 models on 50 rows: equal, last 2, 0.8000. "
        "The best single checkpoint: model_1.h5, 0.7000."
    )
    assert lines[2] == f"To make it anyway: {data['winner_command']}"
    (gain,) = [line for line in lines if line.startswith("  the newest")]
    assert gain.split() == [
        *("the", "newest", "accuracy", "+0.1000", "-0.0200", "+0.2000", "0.25", "within", "noise")
    ]
    table = [re.split("  +", line.strip()) for line in lines if line.startswith("  ")]
    assert [row[0] for row in table[-5:]] == [
        *("equal, last 2", "equal, last 3", "model_1.h5", "model_3.h5 (newest)", "model_2.h5")
    ]
    assert table[-5][1:] == ["0.8000", "0.2000", "0.2667"]  # no loss on the reporting rows
    same = "The same model as model_3.h5: last 1 by equal, exp:2."
    assert same not in lines
    assert same in print_lines(data, show_all=True)
    assert not any("ensemble" in line for line in lines)


def test_a_long_table_is_cut_to_ten_and_the_newest() -> None:
    """With --all, every model and every ensemble has its row; no line is wider than a terminal."""
    data = found("a_very_long_name_" * 5 + "_3.h5")
    extra = [
        {**data["rows"][3], "rank": place, "label": f"ema:0.95, last {place}"}
        for place in range(6, 40)
    ]
    data["rows"] += extra
    data["rows"][2]["rank"] = 99
    short = print_lines(data, width=80)
    scores = re.compile(r"  0\.\d{4} +0\.\d{4} +0\.\d{4}$")  # no loss on the reporting rows
    assert len([*filter(scores.search, short)]) == 10 + 1
    assert any("(newest)" in line for line in short)
    whole = print_lines(data, width=80, show_all=True)
    assert len([*filter(scores.search, whole)]) == 39 + 1
    assert max(map(len, whole)) <= 80
    assert any(line.split()[0].startswith("a_very") and "..." in line for line in whole if line)


def test_small_and_large_scores_are_not_rounded_away() -> None:
    """Four decimals, or an exponent where they would show nothing; what is not finite is said."""
    values = [0.5, 0.0, 3.2e-7, 1234567.0, math.nan, None]
    assert [*map(reports.format_number, values)] == [
        *("0.5000", "0.0000", "3.20e-07", "1.23e+06", "nan", "-")
    ]
    assert reports.format_number(-3.2e-7, sign="+") == "-3.20e-07"


def test_the_command_of_the_winner_is_quoted_and_short() -> None:
    """Options at their default are left out; names are quoted, and none is taken for an option."""
    options = {
        "last": 3,
        "scheme": "exp",
        "alpha": 2.5,
        "every": 1,
        "best": None,
        "exclude": ("old *", "x"),
        "force": True,
        "jobs": 2,
    }
    line = sweeps.write_command(average, ["-a b.h5", "c"], options, "best.h5")
    assert shlex.split(line) == [
        *("polyak", "average", "./-a b.h5", "c", "--last", "3", "--exclude", "old *"),
        *("--exclude", "x", "--scheme", "exp", "--alpha", "2.5", "-o", "best.h5"),
    ]
    third = [1 / 3, 0.25]
    line = sweeps.write_command(average, ["a"], {"coefficients": third, "best": 2}, "o")
    assert line == f"polyak average a --best 2 --coefficients {1 / 3!r},0.25 -o o"


def test_the_command_of_a_recalibrated_winner_names_the_data() -> None:
    """The data as they were named, and the rows at a time; without --write-best, a likely file."""
    recipe = ("ckpts", {"last": 2, "recalibrate": object(), "batch_size": 64, "trust_code": False})
    checkpoints = [SimpleNamespace(path=Path("ckpts/model_1.keras"))]
    plan = SimpleNamespace(checkpoints=checkpoints, tables=checkpoints)
    swept: Any = SimpleNamespace(recipe=recipe, plan=plan)
    assert sweeps.write_winner(swept, "my rows.npz", None) == (
        "polyak average ckpts --last 2 --recalibrate 'my rows.npz' --batch-size 64 -o best.keras"
    )


@pytest.mark.parametrize("date", ["tomorrow", "2026-13-01", "29.11.2026"])
def test_what_is_no_date_is_refused(date: str) -> None:
    """The message says how a date is written; without one, none is invented."""
    with pytest.raises(UsageError, match=r"--date .*is no date; write it like 2026-11-29"):
        reports.check_date(date)
    reports.check_date(None)
    reports.check_date("2026-11-29T14:30")


@pytest.mark.slow
def test_an_older_report_is_kept_unless_forced(tmp_path: Path) -> None:
    """A folder with a report is refused before any work; other files in it do not matter."""
    pytest.importorskip("matplotlib")
    folder = tmp_path / "report"
    reports.check_folder(folder, force=False)
    reports.write_files(found(), folder)
    assert {path.name for path in folder.iterdir()} == {*reports.NAMES}
    with pytest.raises(OutputError, match=r"holds an older report .*--force"):
        reports.check_folder(folder, force=False)
    reports.check_folder(folder, force=True)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    reports.write_files(found(), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_a_missing_jinja2_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report is refused before any work; the message says what to install."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(reports, "find_spec", lambda _name: None)
    with pytest.raises(MissingExtraError, match=r"an HTML report needs .*'polyak\[plot\]'"):
        reports.check_folder(tmp_path / "report", force=False)


class _Outside(HTMLParser):
    """Collects attributes that would fetch something, and text that became an element."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect what points outside the page."""
        if tag in ("link", "img", "iframe", "object", "embed", "b-evil"):
            self.found.append(tag)
        for name, value in attrs:
            outward = name in ("src", "href", "xlink:href") and not (value or "").startswith("#")
            if outward or name.startswith("on"):
                self.found.append(f"{tag} {name}={value}")


def test_the_page_fetches_nothing_and_escapes_names(tmp_path: Path) -> None:
    """The page contains no address, and markup in the name of a file stays text."""
    pytest.importorskip("matplotlib")
    reports.write_files(found("<b-evil onclick=x>.h5"), tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    outside = _Outside()
    outside.feed(page)
    assert outside.found == []
    assert page.count("&lt;b-evil") >= 2  # in the table and among the checkpoints
    for part in ("epoch 2", "54,321 bytes", "0a" * 32, "polyak 1.2.3"):
        assert part in page
    assert not re.search(r"url\((?!#)|@import", page)


# --- the figure -----------------------------------------------------------------------------------


def draw(data: dict[str, Any], folder: Path, metric: str = "accuracy") -> ElementTree.Element:
    """Return the figure of one metric as parsed SVG."""
    pytest.importorskip("matplotlib")
    plots.draw_sweep(data, folder / "figure.svg", metric)
    return ElementTree.fromstring((folder / "figure.svg").read_text())


def texts(drawing: ElementTree.Element, tag: str = "text") -> list[str]:
    """Return the texts of a drawing in order."""
    return ["".join(one.itertext()).strip() for one in drawing.iter(f"{SVG}{tag}")]


def test_every_mark_and_band_of_the_figure_is_in_the_legend(tmp_path: Path) -> None:
    """The winner, single and newest checkpoint, the band, each scheme and the ensemble."""
    assert {
        *("winner: equal, last 2", "single checkpoint", "newest checkpoint", "equal", "exp:2"),
        *("middle half of singles", "ensemble"),
    } <= {*texts(draw(found(), tmp_path))}


def test_a_parameter_that_is_a_word_is_in_the_legend(tmp_path: Path) -> None:
    """And negative coefficients hang from the zero line of their bars."""
    data = found()
    row = {**data["rows"][4], "label": "decay:1-sqrt, last 3", "scheme": "decay"}
    data["rows"].append(row | {"parameter": "1-sqrt", "coefficients": [-0.5, 0.5, 1.0]})
    assert "decay:1-sqrt" in texts(draw(data, tmp_path))
    bars = reports._lay_out_row(data["rows"][-1], [], False).bars
    assert [(bar.y, bar.height) for bar in bars] == [
        ("12.00", "6.00"),
        ("6.00", "6.00"),
        ("0.00", "12.00"),
    ]


def test_numbers_of_checkpoints_are_whole(tmp_path: Path) -> None:
    """Three checkpoints give the ticks 1, 2 and 3, and nothing between."""
    ticks = [text for text in texts(draw(found(), tmp_path)) if re.fullmatch(r"[\d.]+", text)]
    assert [tick for tick in ticks if float(tick) >= 1] == ["1", "2", "3"]


def test_one_wild_checkpoint_does_not_press_the_others_flat(tmp_path: Path) -> None:
    """The scale ends beyond the middle of the data; what is outside is marked at its edge."""
    data = found()
    singles = [
        {**data["rows"][0], "metrics": {"selection": {}, "reporting": {"accuracy": score}}}
        for score in (500.0, math.inf, 0.1, 0.11, 0.12, 0.13, 0.14, math.nan)
    ]
    data["rows"] = [*singles, *data["rows"]]
    drawing = draw(data, tmp_path)
    ticks = [float(text) for text in texts(drawing) if re.fullmatch(r"0\.\d+", text)]
    assert len(ticks) >= 3
    assert max(ticks) < 0.5
    assert "above the scale" in texts(drawing)
    assert "below the scale" not in texts(drawing)


def test_the_figure_has_a_title_and_says_its_numbers(tmp_path: Path) -> None:
    """They are the first children of an image, where a screen reader looks, and valid XML."""
    evil = r"$\frac$ <b> & _3.h5"
    data = found(evil)
    data["rows"][3]["rank"], data["rows"][2]["rank"] = 9, 1
    drawing = draw(data, tmp_path)
    assert drawing.get("role") == "img"
    assert [one.tag for one in drawing][:2] == [f"{SVG}title", f"{SVG}desc"]
    assert texts(drawing, "title") == ["Accuracy of single checkpoints and averages"]
    (about,) = texts(drawing, "desc")
    assert "on 51 reporting rows" in about
    assert "Single checkpoints: 0.1667 to 0.2333. The newest: 0.2." in about
    assert "equal: 0.2 to 0.2667." in about  # from a window of 1, the newest, to one of 2
    assert f"winner, {evil}: 0.2." in about
    assert f"winner: {evil}" in texts(drawing)  # no formula


# --- in a real browser ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Yield a headless Chromium."""
    with open_browser() as running:
        yield running


def cells(browser: Any, column: int) -> list[str]:
    """Return the text of a column of the table in its present order."""
    rows = "[...document.querySelectorAll('#scores tbody tr')]"
    script = f"return {rows}.map(row => row.cells[{column}].innerText)"
    texts: list[str] = browser.execute_script(script)
    return texts


@pytest.mark.slow
def test_a_browser_sorts_the_table(tmp_path: Path, browser: Any) -> None:
    """Columns sort both ways, and numbers by their value."""
    reports.write_files(found(), tmp_path / "report")
    show(browser, tmp_path / "report" / "report.html", "desktop", "light")
    assert cells(browser, 0)[0].startswith("equal, last 2")  # the best first
    buttons = browser.find_elements("css selector", "#scores th button")
    titles = [button.text for button in buttons]
    assert titles[:3] == ["model", "kind", "window"]
    column = titles.index("accuracy (selection)")
    buttons[column].click()
    ascending = ["0.5000", "0.6000", "0.7000", "0.7500", "0.8000", "0.8500"]
    assert cells(browser, column) == ascending
    assert cells(browser, 0)[0] == "model_2.h5"
    buttons[column].click()
    assert cells(browser, column) == ascending[::-1]
    assert browser.find_elements("css selector", "tr.best td")[0].text.startswith("equal, last 2")


@pytest.mark.slow
def test_the_page_shows_ten_rows_and_all_on_demand(tmp_path: Path, browser: Any) -> None:
    """A button shows the rest; sorting keeps ten, now the first of the new order."""
    data = found()
    data["rows"] += [
        {**data["rows"][3], "rank": place, "label": f"exp:{place}, last 2"}
        for place in range(6, 20)
    ]
    reports.write_files(data, tmp_path / "report")
    show(browser, tmp_path / "report" / "report.html", "desktop", "light")
    visible = "return [...document.querySelectorAll('#scores tbody tr')].filter(r => !r.hidden)"
    assert len(browser.execute_script(visible)) == 10
    browser.find_elements("css selector", "#scores th button")[0].click()
    assert len(browser.execute_script(visible)) == 10
    button = browser.find_element("css selector", "#all")
    assert button.text == "Show all 20 rows"
    button.click()
    assert len(browser.execute_script(visible)) == 20
    assert not button.is_displayed()


@pytest.mark.slow
def test_the_page_is_readable_on_every_screen_and_in_both_themes(
    tmp_path: Path, browser: Any
) -> None:
    """Contrast is WCAG's AA, headings are in order, and nothing overflows, whatever the names."""
    data = found("a_very_long_name_" * 9 + "_3.h5")
    data["rows"] += [  # a line of every colour
        {**data["rows"][3], "rank": 6 + k, "scheme": f"exp{k}", "label": f"exp{k}, last 2"}
        for k in range(8)
    ]
    for row in data["rows"]:  # two figures
        row["metrics"]["reporting"] = row["metrics"]["selection"]
    data["winner_command"] += f" --exclude {'x' * 300}"
    data["notes"] = ["a note: " + "y" * 300]
    reports.write_files(data, tmp_path / "report")
    page = tmp_path / "report" / "report.html"
    assert find_faults(browser, page) == []
    colours = {}
    for theme in THEMES:
        show(browser, page, "phone", theme)
        style = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
        colours[theme] = browser.execute_script(style)
    assert colours["light"] == ["rgb(255, 255, 255)", "rgb(34, 34, 34)"]
    assert colours["dark"] == ["rgb(22, 24, 27)", "rgb(227, 227, 227)"]
    ink = "return getComputedStyle(document.querySelector('figure text')).fill"
    assert browser.execute_script(ink) == colours["dark"][1]


@pytest.mark.slow
def test_each_fault_of_a_page_is_seen(tmp_path: Path, browser: Any) -> None:
    """Pale text, headings out of order, a wide box, an unreachable region, a nameless figure."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><html><body><h2>Late</h2><h4>Deep</h4>"
        "<p style='color: #999'>pale</p><div style='width: 2000px'>wide</div>"
        "<div class='scroll' id='a'>region</div><i id='a'>twice</i>"
        "<figure><svg width='90' height='20' viewBox='0 0 90 20'>"
        "<path d='M0 0 L9 9' style='stroke: #eeeeee; fill: none'/>"
        "<text x='80' y='15'>cut off</text></svg></figure></body></html>"
    )
    faults = "\n".join(find_faults(browser, page))
    for part in (
        *("contrast 2.85 of p pale", "of path", "not the only h1", "h4 follows h2", "too wide"),
        *("no title or no language", "no keyboard", "twice", "no title", "cut off in a figure"),
    ):
        assert part in faults
