"""How far the scoring of models has come: what callers are told, and what a terminal shows."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from polyak_cli import compare, evaluate
from polyak_cli.cli import progress
from polyak_cli.evaluation import data
from polyak_cli.pipeline.sweeping import sweep
from tests.command import script
from tests.test_cli import EAGER, on_terminal

ROWS = 12
CODE = """
def load(tensors):
    return lambda x: x @ tensors["w"]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a run of three, rows, and a function that needs no framework."""
    (tmp_path / "run").mkdir()
    rng = np.random.default_rng(0)
    for k in range(3):
        np.savez(tmp_path / f"run/m_{k}.npz", w=rng.normal(size=(4, 3)))
    np.savez(tmp_path / "rows.npz", x=rng.normal(size=(ROWS, 4)), y=rng.integers(0, 3, ROWS))
    (tmp_path / "net.py").write_text(CODE)
    return tmp_path


def load(folder: Path) -> data.Split:
    """Return the rows of the folder."""
    return data.load(str(folder / "rows.npz")).split()


def test_shares_of_models_are_the_shares_of_their_rows(folder: Path) -> None:
    """Each model begins at its number, and grows by its batches to the next; so do others."""
    seen: list[tuple[float, int]] = []
    options = {"batch_size": 5, "model": f"{folder / 'net.py'}:load"}
    paths = sorted((folder / "run").iterdir())
    found = evaluate(
        paths[:2],
        load(folder),
        progress=lambda *both: seen.append(both),
        **options,  # type: ignore[arg-type]  # a dict of several types
    )
    assert not seen  # nothing is scored before it is asked for
    assert len([*found]) == 2
    shares = [0, 5 / ROWS, 10 / ROWS, 1, 1]
    assert seen == [(k + share, 2) for k in range(2) for share in shares]
    seen.clear()
    compare(
        paths[1:],
        paths[0],
        load(folder),
        progress=lambda *both: seen.append(both),
        **options,  # type: ignore[arg-type]
    )
    assert seen == [(k + share, 3) for k in range(3) for share in shares]


def test_a_sweep_counts_the_models_of_its_searches_too(folder: Path) -> None:
    """It begins at none of those that are listed, never goes back, and ends with all."""
    seen: list[tuple[float, int]] = []
    found = sweep(
        folder / "run",
        data.load(str(folder / "rows.npz")),
        chosen="equal",
        search=["greedy"],
        model=f"{folder / 'net.py'}:load",
        scratch=folder,
        progress=lambda *both: seen.append(both),
    )
    # Three single checkpoints and two averages, as the window of one is the newest; then the search
    # tries two more checkpoints.
    assert [seen[0], seen[-1]] == [(0, 5), (7, 7)]
    assert sorted(seen) == seen
    assert sorted({int(done) for done, _ in seen}) == [*range(8)]
    assert [row.candidate.kind for row in found.rows].count("soup") == 1


def draw(folder: Path, *words: str, columns: int = 100) -> str:
    """Return all that a terminal shows of a command, without control codes."""
    code, text = on_terminal([*script(EAGER, *words)], folder, columns=columns)
    assert code == 0, text
    assert ("\x1b" in text) == ("scoring" in text)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


EVALUATE = ("evaluate", "run", "--data", "rows.npz", "--model", "net.py:load", "--batch-size", "5")


def test_a_terminal_shows_which_model_and_the_time_left(folder: Path) -> None:
    """The bar moves by batches, and says no time before the first model is done."""
    lines = [line for line in re.split(r"[\r\n]+", draw(folder, *EVALUATE)) if "scoring" in line]
    words = [line.split("━")[-1].strip("╺╸ ") for line in lines]
    assert [*dict.fromkeys(word.partition(",")[0] for word in words if word)] == [
        "model 1 of 3",
        "model 2 of 3",
        "model 3 of 3",
    ]
    assert {word for word in words if word.startswith("model 1")} == {"model 1 of 3"}
    assert [word for word in words if re.fullmatch(r"model 3 of 3, \d+ s left", word)]
    assert len({line for line in lines if "model 1" in line}) > 2  # it moves within a model


def test_a_narrow_terminal_keeps_the_words(folder: Path) -> None:
    """The bar gives way, and "^C" fits behind it: in the next line it would keep the bar there."""
    lines = re.split(r"[\r\n]+", draw(folder, *EVALUATE, columns=40))
    drawn = [line for line in lines if "scoring" in line]
    assert max(map(len, drawn)) + len("^C") == 40
    assert [line for line in drawn if re.search(r"model 3 of 3, \d+ s left$", line)]


@pytest.mark.parametrize("option", ["-q", "--json"])
def test_no_bar_where_only_the_result_is_wanted(folder: Path, option: str) -> None:
    """Even on a terminal, and no callback makes the work longer."""
    assert "scoring" not in draw(folder, *EVALUATE, option)
    with progress.show_count("scoring", "model", silent=True) as count:
        assert count is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "1 s"), (99, "99 s"), (100, "2 min"), (5940, "99 min"), (5941, "2 h"), (90000, "25 h")],
)
def test_the_time_left_is_rounded_up(seconds: float, words: str) -> None:
    """In seconds, minutes or hours, with two digits; where it is not known, nothing."""

    class Task:
        time_remaining: float | None = seconds

    task = Task()
    assert progress._word_left(task) == f", {words} left"  # type: ignore[arg-type]  # its like
    task.time_remaining = None
    assert progress._word_left(task) == ""  # type: ignore[arg-type]
