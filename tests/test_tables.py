"""Tables and sentences fit the terminal that they are shown on, and stay whole in a pipe."""

from __future__ import annotations

import re
import shutil
import string
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyak_cli import average
from polyak_cli.cli.names import name_tensors
from polyak_cli.cli.rendering import evaluation_lines
from polyak_cli.cli.tables import Table, fit, shorten, wrap
from polyak_cli.evaluation.comparison import Compared, Comparison, Gain
from polyak_cli.evaluation.evaluator import Score
from polyak_cli.evaluation.significance import Paired
from tests.command import POLYAK, SAMPLES, polyak
from tests.oracle import write_model
from tests.test_cli import on_terminal

#: Commands whose default output has a table or a long sentence, in a folder made by `folder`.
COMMANDS = [
    ("average", "ckpts", "-n"),
    ("average", "ckpts", "-o", "new.h5", "--force"),
    ("check", "ckpts"),
    ("diff", "ckpts"),
    ("diff", "final.h5", "ckpts/model_499.h5"),
    ("inspect", "ckpts/model_499.h5", "--stats"),
    ("inspect", "final.h5", "-v"),
    ("verify", "final.h5"),
]
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]\d+)?(?![\w.])")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run and its average."""
    made = tmp_path_factory.mktemp("tables")
    shutil.copytree(SAMPLES, made / "ckpts")
    average(made / "ckpts", made / "final.h5")
    return made


def rows_of(text: str) -> list[list[str]]:
    """Return the words of the lines that belong to tables, which are indented and begin a name."""
    return [line.split() for line in text.splitlines() if re.match(r"  \S.*  +\S", line)]


@pytest.mark.parametrize("columns", [80, 40])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_nothing_is_wider_than_the_terminal(
    folder: Path, command: tuple[str, ...], columns: int
) -> None:
    """No line is too long for 80 or for 40 columns, so the terminal breaks no number or word."""
    code, text = on_terminal([*POLYAK, *command], folder, columns=columns, NO_COLOR="1")
    assert code in (0, 1), text
    # The progress bar is drawn and erased on one line; what comes after it is the result.
    plain = re.sub(r".*\r(?!\n)", "", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))
    lines = plain.replace("\r\n", "\n").splitlines()
    assert lines
    assert [line for line in lines if len(line) > columns] == []


@pytest.mark.parametrize("columns", [80, 40])
def test_scores_and_differences_fit_too(columns: int) -> None:
    """The tables of evaluate, made of scores that no model had to be run for."""
    newest, final = (
        Score(Path(f"runs/resnet/{name}.keras"), 0.5, {"accuracy": 0.8, "mean_squared_error": 1}, 9)
        for name in ("model_00499", "final")
    )
    gains = (
        Gain("accuracy", Paired(-0.01, -0.025, 0.005, 1000), "within noise", mcnemar_p=0.245),
        Gain("loss", Paired(0.01, 0.004, 0.017, 1000), "worse", sign_flip_p=0.0017),
    )
    compared = Comparison(newest, (Compared(final, gains),))
    tables = [line for line in evaluation_lines([final], compared) if isinstance(line, Table)]
    assert [table.header[0] for table in tables] == ["model", "model"]
    for table in tables:
        fitted = fit(table, columns)
        widths = [max(map(len, column)) for column in zip(fitted.header, *fitted.rows, strict=True)]
        assert 2 + sum(widths) + 2 * (len(widths) - 1) <= columns
    assert fit(tables[0], 40).header[-1] == "accuracy"
    assert fit(tables[1], 40).header[-1] == "verdict"


@pytest.mark.parametrize("columns", [80, 40])
def test_numbers_of_a_narrow_table_are_those_of_the_pipe(folder: Path, columns: int) -> None:
    """Every cell that a terminal shows is a whole cell of the pipe's table, in the same row."""
    for command in (("check", "ckpts"), ("inspect", "ckpts/model_499.h5", "--stats")):
        piped = rows_of(polyak(*command, cwd=folder).stdout)
        _, text = on_terminal([*POLYAK, *command], folder, columns=columns, NO_COLOR="1")
        drawn = rows_of(text)
        assert len(piped) == len(drawn)
        for whole, short in zip(piped[1:], drawn[1:], strict=True):
            assert short[0] == whole[0] or "..." in short[0]
            assert [word for word in short[1:] if word not in whole] == []
        missing = len(piped[-1]) - len(drawn[-1])
        assert ("not shown at this width: " in text) == (missing > 0)


def test_a_pipe_gets_the_same_lines_at_any_width(folder: Path) -> None:
    """COLUMNS changes nothing where the output is no terminal, and no name is cut."""
    for command in COMMANDS[2:]:
        narrow, wide = (
            polyak(*command, cwd=folder, environ={"COLUMNS": text}).stdout for text in ("40", "300")
        )
        assert narrow == wide
        assert "..." not in narrow


def test_the_tables_of_the_sample_run_fit_80_columns_in_a_pipe(folder: Path) -> None:
    """Also where nothing is fitted, what everybody sees first has no long line."""
    for command in (("check", "ckpts"), ("diff", "ckpts"), ("average", "ckpts", "-n")):
        lines = polyak(*command, cwd=folder).stdout.splitlines()
        assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["dense_1/sequential/dense_1/kernel", "dense/sequential/dense/bias"],
            ["dense_1/kernel", "dense/bias"],
        ),
        (["dense/dense/kernel:0", "dense/dense/bias:0"], ["dense/kernel", "dense/bias"]),
        (["outer/model/outer/dense/kernel"], ["outer/dense/kernel"]),
        (["layers/dense/vars/0", "layers/dense/vars/1"], ["dense/kernel", "dense/bias"]),
        (["layers/conv2d_3/vars/0"], ["conv2d_3/kernel"]),
        (
            [f"layers/batch_normalization/vars/{k}" for k in range(4)],
            [
                f"batch_normalization/{weight}"
                for weight in ("gamma", "beta", "moving_mean", "moving_variance")
            ],
        ),
        # Which of gamma and beta a layer of three variables lacks is not in the name.
        ([f"layers/batch_normalization/vars/{k}" for k in range(3)], None),
        (["layers/mine/vars/0", "dense/vars/0"], ["mine/0", "dense/0"]),
        (["block.0.weight", "head.bias"], ["block.0.weight", "head.bias"]),
        # Two that would be called the same keep their whole names.
        (["d/one/d/kernel", "d/two/d/kernel"], ["d/one/d/kernel", "d/two/d/kernel"]),
        ([""], [""]),
    ],
)
def test_tensors_are_called_by_layer_and_weight(
    names: list[str], expected: list[str] | None
) -> None:
    """A layer's own path is left out, and variables that Keras numbers get their usual names."""
    found = name_tensors(names)
    if expected is None:
        expected = [f"batch_normalization/{k}" for k in range(3)]
    assert [found[name] for name in names] == expected


@given(st.lists(st.text(alphabet="ab/1:0._", max_size=12), unique=True, max_size=8))
def test_no_two_tensors_get_one_name(names: list[str]) -> None:
    """Different tensors are shown under different names, whatever they are called."""
    found = name_tensors(names)
    assert set(found) == {*names}


def test_the_names_on_the_screen_are_those_of_the_model(folder: Path) -> None:
    """Inspect and diff show layer and weight; JSON keeps the names in the file."""
    for command in (("inspect", "final.h5"), ("diff", "final.h5", "ckpts/model_499.h5")):
        names = [row[0] for row in rows_of(polyak(*command, cwd=folder).stdout)][1:]
        assert sorted(names) == ["dense/bias", "dense/kernel", "dense_1/bias", "dense_1/kernel"]
        assert "dense_1/sequential/dense_1/kernel" in polyak(*command, "--json", cwd=folder).stdout


CELLS = st.text(alphabet=string.ascii_letters + string.digits + "._/", min_size=1, max_size=40)
NUMBERS = st.floats(-1e9, 1e9).map("{:.3e}".format)


@given(
    st.lists(st.tuples(CELLS, NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=5),
    st.integers(24, 120),
)
def test_a_fitted_table_has_whole_numbers_and_fits(
    rows: list[tuple[str, str, str, str]], width: int
) -> None:
    """Columns go and names are cut, never numbers; with 24 columns there is room for one number."""
    table = Table(("name", "a", "b", "c"), rows, spare=("c", "b", "a"))
    fitted = fit(table, width)
    kept = [table.header.index(title) for title in fitted.header]
    for row, short in zip(rows, fitted.rows, strict=True):
        assert list(short[1:]) == [row[k] for k in kept[1:]]
    whole = [row[0] for row in rows] == [row[0] for row in fitted.rows]
    widths = [max(map(len, column)) for column in zip(fitted.header, *fitted.rows, strict=True)]
    assert whole or 2 + sum(widths) + 2 * (len(widths) - 1) <= width
    if len({row[0] for row in rows}) > 1:
        assert len({row[0] for row in fitted.rows}) == len({row[0] for row in rows})


def test_a_column_that_is_called_like_the_names_is_another() -> None:
    """A metric may be called "model"; the names stay, and it is the metric that goes."""
    table = Table(
        ("model", "loss", "model"), [("final.h5", "0.5", "0.123456789")], spare=("model",)
    )
    assert fit(table, 20).rows == [("final.h5", "0.5")]


def test_a_long_name_keeps_its_end() -> None:
    """The end, where files of one run differ, gets two thirds of the room."""
    name = "/data/experiments/2024/resnet/checkpoints/model_00499.h5"
    assert len(shorten(name, 26)) == 26
    assert shorten(name, 26) == "/data/ex.../model_00499.h5"
    assert shorten(name, 100) == name


def test_names_that_differ_in_the_middle_show_their_middle() -> None:
    """Where neither beginnings nor ends tell names apart, what differs is kept."""
    names = [f"resnet50_imagenet_experiment_epoch_{k:03d}_val_loss_0.1234.h5" for k in range(20)]
    table = Table(("checkpoint", "step"), [(name, "1.434e-02") for name in names])
    assert [row[0] for row in fit(table, 30).rows][:2] == ["...t_epoch_000...", "...t_epoch_001..."]


def test_a_sentence_breaks_between_words_and_keeps_units() -> None:
    """A number stays with its unit, and a path that is wider than the terminal stays whole."""
    line = "read 12.3 GB in 40.1 s, peak memory 52.7 MB"
    for width in range(20, 50):
        parts = wrap(line, width)
        assert " ".join(part.strip() for part in parts) == line
        assert max(map(len, parts)) <= width
        assert not [part for part in parts if re.search(r"\d$", part)]
    path = "/a" * 40
    assert wrap(f"wrote {path}", 30) == ["wrote", f"  {path}"]


def test_an_error_breaks_between_words_on_a_terminal(tmp_path: Path) -> None:
    """In a pipe it is one line; on a terminal of 40 columns the same words on several."""
    (tmp_path / "x.h5").write_bytes(b"no such format")
    command = ("average", "x.h5", "-o", "o.h5")
    piped = polyak(*command, cwd=tmp_path).stderr
    _, shown = on_terminal([*POLYAK, *command], tmp_path, columns=40)
    lines = shown.replace("\r\n", "\n").splitlines()
    assert len(lines) > 1 == len(piped.splitlines())
    assert max(map(len, lines)) <= 40
    assert shown.split() == piped.split()


def test_a_large_table_is_laid_out_too(tmp_path: Path) -> None:
    """A model of many tensors, shown without rich, has the same columns and no long line."""
    values = {f"layer_{k}": {"w": np.ones(2, np.float32)} for k in range(600)}
    write_model(tmp_path / "m.h5", values)
    code, text = on_terminal([*POLYAK, "inspect", "m.h5"], tmp_path, columns=40)
    assert code == 0
    assert len([row for row in rows_of(text) if row[0].startswith("layer_")]) == 600
    assert max(map(len, text.replace("\r\n", "\n").splitlines())) <= 40
