"""Results in a notebook: short HTML that hostile names cannot break out of."""

from __future__ import annotations

import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from polyak_cli import Problem, average, check, diff, distances, plan, select
from polyak_cli.averaging.notebook import MOST, write_html
from polyak_cli.evaluation.comparison import Compared, Comparison, Gain
from polyak_cli.evaluation.evaluator import Score
from polyak_cli.evaluation.significance import Paired
from polyak_cli.examining.differences import Difference, Differences
from polyak_cli.examining.health import Health
from polyak_cli.pipeline.sweeping import Sweep
from tests.command import SAMPLES

HOSTILE = "<script>alert('x')</script>\"&\u202e\n\x1b[31m"
#: All that a representation may consist of.
TAGS = {"div", "p", "strong", "table", "thead", "tbody", "tr", "th", "td", "ul", "li"}


class Parsed(HTMLParser):
    """HTML as a browser reads it: elements that are closed in order, attributes, and text."""

    def __init__(self, content: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        """Accept plain elements only."""
        assert tag in TAGS, tag
        assert attrs == []
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        """Close the innermost element."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Collect text, and that of the cells."""
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def parse(result: Any) -> Parsed:
    """Return the representation of a result, which is short and has no odd characters."""
    content = result._repr_html_()
    assert len(content) < 20_000
    parsed = Parsed(content)
    assert parsed.text.isprintable()
    return parsed


def comparison(name: str) -> Comparison:
    """Return a comparison of one model with a baseline."""
    score = Score(Path(name), 0.5, {}, 10)
    paired = Paired(0.25, 0.125, 0.375, 10)
    return Comparison(score, (Compared(score, (Gain("accuracy", paired, "better", 0.01),)),))


def sweep(name: str) -> Any:
    """Return what of a sweep is shown; the models are 20, of which one has no score."""
    rows = [
        SimpleNamespace(
            candidate=SimpleNamespace(kind="single", name=f"{name}{k}"),
            value=lambda _metric, _split, k=k: float("nan") if k == 3 else k / 100,
        )
        for k in range(20)
    ]
    found = SimpleNamespace(
        metric="accuracy", rows=rows, winner=rows[-1], verdict="better", notes=(name,)
    )
    found.label = lambda candidate: candidate.name
    found._repr_html_ = lambda: Sweep._repr_html_(found)  # type: ignore[arg-type]  # its fields
    return found


def test_a_plan_and_a_report_show_what_is_averaged(tmp_path: Path) -> None:
    """The plan has a row for each checkpoint, newest first; the report says what was written."""
    shown = parse(plan(SAMPLES, tmp_path / "o.h5", last=3, scheme="linear"))
    assert shown.text.startswith(f"Plan: average 3 checkpoints into {tmp_path}/o.h5, scheme linear")
    assert [float(row[2]) for row in shown.rows[1:]] == pytest.approx(
        [1 / 2, 1 / 3, 1 / 6], abs=1e-6
    )
    assert [row[1] for row in shown.rows[1:]] == ["499", "498", "497"]
    report = average(SAMPLES, tmp_path / "o.h5", last=3)
    assert parse(report).text.startswith(f"Averaged 3 checkpoints into {tmp_path}/o.h5")


def test_a_plan_and_a_report_are_at_most_three_lines_at_a_prompt(tmp_path: Path) -> None:
    """print() and repr() give what it is, a line more, and a note; names cannot break a line."""
    output = tmp_path / HOSTILE.replace("/", "") / "o.h5"
    output.parent.mkdir()
    made = plan(SAMPLES, output, last=3, scheme="linear")
    what, names = str(made).splitlines()
    assert repr(made) == str(made)
    assert what.startswith("Plan: average 3 checkpoints into ")
    assert names == "oldest first: model_497.h5, model_498.h5, model_499.h5"
    report = average(SAMPLES, output, last=3, scheme="linear")
    what, cost = repr(report).splitlines()
    assert what.startswith("Averaged 3 checkpoints into ")
    assert cost.startswith("scheme linear, read 1.84 kB in ")
    assert (what + cost).isprintable()
    noted = replace(report, notes=("one\nnote", "another"))
    assert repr(noted).splitlines()[2:] == ["note: one\\nnote and 1 more"]


def test_checks_and_differences_show_the_worst(tmp_path: Path) -> None:
    """A healthy run has no table; two files have a row for each tensor, a run for each file."""
    files = sorted(SAMPLES.glob("*.h5"))[-2:]
    assert parse(check(files)).text.startswith("2 checkpoints, no problems")
    shutil.copy(files[1], tmp_path / "model_500.h5")
    problem = parse(check([*files, tmp_path / "model_500.h5"]))
    assert problem.rows[1][0] == "identical"
    found = diff(*files)
    shown = parse(found)
    assert "different" in shown.text
    assert float(shown.rows[1][1]) == pytest.approx(found.tensors[0].relative, rel=1e-5)
    assert len(parse(distances(select(files))).rows) == 3


@pytest.mark.parametrize(
    "result",
    [
        comparison(HOSTILE),
        sweep(HOSTILE),
        Health((), (Problem("gap", HOSTILE),) * 30, (), (HOSTILE,) * 30),
        Differences(
            (Path(HOSTILE), Path(HOSTILE)),
            (Difference(HOSTILE * 100, 1.0, 2.0, None, False),) * 1000,
            (HOSTILE,),
        ),
    ],
    ids=["comparison", "sweep", "health", "differences"],
)
def test_hostile_names_stay_text_and_long_results_are_cut(result: Any) -> None:
    """Names with markup are shown as text, and of a thousand rows ten are shown."""
    shown = parse(result)
    assert "<script>alert('x')</script>\"&" in shown.text
    assert len(shown.rows) <= MOST + 1


def test_a_comparison_shows_difference_interval_and_verdict() -> None:
    """Each metric of each model has a row."""
    shown = parse(comparison("a.h5"))
    expected = ["a.h5", "accuracy", "+0.2500", "+0.1250 to +0.3750", "better"]
    assert shown.rows[1] == expected


def test_a_sweep_shows_the_winner_and_the_ten_best() -> None:
    """The best come first, and a model without a score last."""
    shown = parse(sweep("m"))
    assert shown.text.startswith("Winner: m19; verdict: better")
    assert [row[0] for row in shown.rows[1:]] == [f"m{k}" for k in range(19, 9, -1)]
    assert "The first 10 rows and 10 more." in shown.text


def test_the_parser_of_the_tests_sees_markup() -> None:
    """What was not escaped fails the tests above."""
    assert "&lt;b&gt;" in write_html("<b>")
    with pytest.raises(AssertionError):
        Parsed("<div><script>1</script></div>")
    with pytest.raises(AssertionError):
        Parsed("<div><p></div>")
