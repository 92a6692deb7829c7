"""The files of a sweep: numbers read back the same, and the page works in a real browser."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from polyak_cli.errors import MissingExtraError, OutputError
from polyak_cli.evaluation import reports


def found(evil: str = "model_3.h5") -> dict[str, Any]:
    """Return a possible result of a sweep of three checkpoints."""

    def row(label: str, kind: str, window: int, coefficients: list[float], score: float) -> Any:
        metrics = {"loss": 1 - score, "accuracy": score}
        return {
            "label": label,
            "kind": kind,
            "scheme": "equal" if kind == "average" else "",
            "parameter": None,
            "window": window,
            "coefficients": coefficients,
            "metrics": {"selection": metrics, "reporting": {"loss": None, "accuracy": score / 3}},
        }

    rows = [
        row("model_1.h5", "single", 1, [1.0, 0.0, 0.0], 0.7),
        row("model_2.h5", "single", 1, [0.0, 1.0, 0.0], 0.5),
        row(evil, "single", 1, [0.0, 0.0, 1.0], 0.6),
        row("equal, last 2", "average", 2, [0.0, 0.5, 0.5], 0.8),
        row("equal, last 3", "average", 3, [1 / 3, 1 / 3, 1 / 3], 0.75),
    ]
    gain = {"metric": "accuracy", "difference": 0.1, "low": -0.02, "high": 0.2, "mcnemar_p": 0.25}
    return {
        "polyak": "1.2.3",
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
        "notes": [],
    }


def test_csv_and_json_hold_every_number() -> None:
    """Each candidate has a line and an object, whose numbers read back the same."""
    data = found()
    lines = list(csv.DictReader(io.StringIO(reports.format_csv(data))))
    assert [line["label"] for line in lines] == [row["label"] for row in data["rows"]]
    for line, row in zip(lines, data["rows"], strict=True):
        assert [float(c) for c in line["coefficients"].split()] == row["coefficients"]
        assert float(line["reporting_accuracy"]) == row["metrics"]["reporting"]["accuracy"]
        assert line["reporting_loss"] == ""
    assert json.loads(reports.format_json(data)) == data


def test_words_say_that_a_gain_is_within_noise() -> None:
    """The sentences name the winner, both numbers of rows, the difference, its interval and p."""
    data = found()
    text = " ".join(reports.write_sentences(data))
    assert "equal, last 2" in text
    for part in ("50 rows", "51 other rows", "+0.1000", "-0.0200 to +0.2000", "p 0.25"):
        assert part in text
    assert text.endswith("McNemar p 0.25): within noise: no difference is shown.")
    data["gains"] = [
        {**data["gains"][0], "mcnemar_p": None, "sign_flip_p": 0.0312, "verdict": "better"}
    ]
    assert " ".join(reports.write_sentences(data)).endswith(", sign-flip p 0.0312): better.")


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


# --- in a real browser ----------------------------------------------------------------------------


@pytest.fixture
def browser() -> Iterator[Any]:
    """Yield a headless Chromium; `make system` installs it if it is missing."""
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    if not driver or not chromium:
        pytest.skip("no Chromium and chromedriver here; `make system` installs them")
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = webdriver.Chrome(options, Service(driver))
    yield running
    running.quit()


def cells(browser: Any, column: int) -> list[str]:
    """Return the text of a column of the table in its present order."""
    script = "return [...document.querySelectorAll('tbody tr')].map(r => r.cells[%d].innerText)"
    texts: list[str] = browser.execute_script(script % column)
    return texts


@pytest.mark.slow
def test_a_browser_sorts_the_table_and_shows_both_themes(tmp_path: Path, browser: Any) -> None:
    """Chromium shows no error; columns sort both ways, themes differ, and the page fits a phone."""
    reports.write_files(found(), tmp_path / "report")
    browser.get((tmp_path / "report" / "report.html").as_uri())
    titles = [button.text for button in browser.find_elements("css selector", "th button")]
    assert titles[:3] == ["candidate", "kind", "window"]
    column = titles.index("accuracy (selection)")
    button = browser.find_elements("css selector", "th button")[column]
    button.click()
    assert cells(browser, column) == ["0.5000", "0.6000", "0.7000", "0.7500", "0.8000"]
    assert cells(browser, 0)[0] == "model_2.h5"
    button.click()
    assert cells(browser, column)[0] == "0.8000"
    assert browser.find_elements("css selector", "tr.best td")[0].text.startswith("equal, last 2")

    colours = {}
    for theme in ("light", "dark"):
        media = [{"name": "prefers-color-scheme", "value": theme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        script = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
        colours[theme] = browser.execute_script(script)
        shot = browser.get_screenshot_as_png()
        assert len(shot) > 5000
    assert colours["light"] == ["rgb(255, 255, 255)", "rgb(34, 34, 34)"]
    assert colours["dark"] == ["rgb(22, 24, 27)", "rgb(227, 227, 227)"]

    ink = "return getComputedStyle(document.querySelector('figure text')).fill"
    assert browser.execute_script(ink) == colours["dark"][1]

    phone = {"width": 375, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    overflow = "return document.documentElement.scrollWidth - window.innerWidth"
    assert browser.execute_script(overflow) <= 0
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []
