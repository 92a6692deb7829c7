"""`polyak evaluate` and `polyak train` as a user meets them: real processes, real Keras.

Keras alone takes seconds to start, so each process answers for as much as it can.
"""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from polyak_cli import FormatError, Split, __version__, average, evaluate, plan, train
from polyak_cli.evaluation import data
from tests.command import SAMPLES, one_line, tree
from tests.keras.commands import polyak
from tests.test_cli import example_of

pytestmark = pytest.mark.slow

#: Data of the user's own: other numbers of rows in each part, and much to say about it.
OWN_DATA = """
import os
import numpy as np

def load():
    print("printed while loading")
    os.system("echo said by a child")
    rows = np.random.default_rng(0).normal(size=(90, 2))
    classes = np.arange(90) % 3
    return {"train": (rows[:60], classes[:60]), "test": (rows[60:], classes[60:])}
"""


def example(command: str) -> str:
    """Return the example in the help of a command, without the name of the program."""
    line = example_of(command).strip()
    assert line.startswith(f"polyak {command} ")
    return line.removeprefix("polyak ")


def damaged(path: Path) -> Path:
    """Write a sample whose last bias is NaN, so that its loss is NaN; it still predicts classes."""
    shutil.copy(SAMPLES / "model_499.h5", path)
    with h5py.File(path, "r+") as file:
        file["model_weights/dense_1/sequential/dense_1/bias"][0] = np.nan
    return path


def test_the_example_of_train_trains_and_draws(tmp_path: Path) -> None:
    """It runs with other numbers, and writes checkpoints, log and picture."""
    line = example("train").replace("--epochs 500", "--epochs 3").replace("--keep 10", "--keep 2")
    done = polyak(*shlex.split(line), "--plot", "x.png", "--seed", "3", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(tree(tmp_path)) == {
        "ckpts",
        "ckpts/model_1.h5",
        "ckpts/model_2.h5",
        "ckpts/training.csv",
        "x.png",
    }
    picture = (tmp_path / "x.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
    with open(tmp_path / "ckpts" / "training.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    lines = done.stdout.splitlines()
    assert "trained 3 epochs on blobs with sgd, learning rate 0.01, seed 3" in lines
    assert f"val_accuracy {float(rows[-1]['val_accuracy']):.4f}" in lines[1]
    assert lines[2:] == ["kept model_1.h5 to model_2.h5 and ckpts/training.csv", "drew x.png"]
    assert plan(tmp_path / "ckpts").checkpoints[-1].epoch == 2


def test_the_example_of_evaluate_passes_its_gate(tmp_path: Path) -> None:
    """It runs unchanged: exit 0, one table and the name of its loss, nothing on stderr."""
    average(SAMPLES, tmp_path / "final.h5", scheme="exp", alpha=2)
    done = polyak(*shlex.split(example("evaluate")), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    *table, loss = done.stdout.splitlines()
    assert loss == "loss: categorical_crossentropy (Keras's)"
    header, row = (line.split() for line in table)
    assert header == ["model", "loss", "accuracy", "rows"]
    assert row[0] == "final.h5"
    assert 0.8 <= float(row[2]) < 0.83
    assert row[3] == "1000"


def test_a_directory_gives_a_row_each_and_a_gate_that_fails_exits_with_1(tmp_path: Path) -> None:
    """Averages and names without numbers are scored, skipped files reported; the JSON is strict."""
    for name in ("last", "best_10", "best_9"):
        shutil.copy(SAMPLES / "model_499.h5", tmp_path / f"{name}.h5")
    (tmp_path / "training.csv").write_text("epoch,loss\n")
    average(SAMPLES, tmp_path / "average.h5")
    damaged(tmp_path / "nan.h5")
    gates = [word for least in ("0.5", "0.80601") for word in ("--fail-under", f"accuracy={least}")]
    done = polyak("evaluate", ".", "--data", "blobs", *gates, "--json", cwd=tmp_path)
    assert done.returncode == 1
    assert json.loads(done.stdout, parse_constant=pytest.fail) == {
        "polyak": __version__,
        "data": "blobs",
        "rows": 1000,
        "models": [
            scored("average.h5", 0.811),
            scored("best_9.h5", 0.806),
            scored("best_10.h5", 0.806),
            scored("last.h5", 0.806),
            scored("nan.h5", None),
        ],
        "passed_over": [{"path": "training.csv", "reason": "not named like a whole model"}],
        "failures": [line.removeprefix("failed: ") for line in done.stderr.splitlines()[1:]],
    }
    note, *failures = done.stderr.splitlines()
    assert note == "note: passed over: training.csv (not named like a whole model)"
    short = "accuracy is 0.806, less than 0.80601"
    assert failures[:3] == [f"failed: {name}.h5: {short}" for name in ("best_9", "best_10", "last")]
    assert [line.split(" is ")[0] for line in failures[3:]] == ["failed: nan.h5: accuracy"] * 2


def scored(name: str, accuracy: float | None) -> dict[str, Any]:
    """Return the JSON of a model, checking that without accuracy its loss is null, too."""
    return {
        "path": name,
        "loss": None if accuracy is None else pytest.approx(0.54, abs=0.02),
        "loss_name": "categorical_crossentropy (Keras's)",
        "metrics": {"accuracy": accuracy if accuracy is not None else pytest.approx(0.3, abs=0.1)},
        "rows": 1000,
        "notes": [],
    }


def test_code_in_a_model_is_refused_without_the_option(tmp_path: Path) -> None:
    """Exit 3, one line that names the file and the option; the code is not run."""
    with_lambda(tmp_path / "code.h5")
    done = polyak("evaluate", "code.h5", "--data", "blobs", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert re.search(r"^code\.h5: contains code .* use --trust-code", one_line(done.stderr))


def test_trusted_code_is_scored_on_the_part_asked_for(tmp_path: Path) -> None:
    """With --split and --batch-size; prints of the user's code are not among the results."""
    path = with_lambda(tmp_path / "code.h5")
    (tmp_path / "own.py").write_text(OWN_DATA)
    options = ("--split", "train", "--batch-size", "7", "--trust-code", "--json")
    done = polyak("evaluate", path.name, "--data", "own.py:load", *options, cwd=tmp_path)
    assert done.returncode == 0
    assert set(done.stderr.splitlines()) == {"printed while loading", "said by a child"}
    found = json.loads(done.stdout)
    assert found["rows"] == 60
    (score,) = found["models"]
    rows = np.random.default_rng(0).normal(size=(90, 2))[:60]
    right = (2 * rows @ np.array([[1, -1, 0], [0, 1, -1]])).argmax(1) == np.arange(60) % 3
    assert score["metrics"]["accuracy"] == pytest.approx(right.mean(), rel=1e-6)
    assert math.isfinite(score["loss"])


def with_lambda(path: Path) -> Path:
    """Save a model with a layer of code, which doubles the output of the other layer."""
    import keras

    dense = keras.layers.Dense(3, use_bias=False)
    layers = [keras.Input((2,)), dense, keras.layers.Lambda(lambda x: 2 * x), softmax(keras)]
    model = keras.Sequential(layers)
    dense.set_weights([np.array([[1, -1, 0], [0, 1, -1]], np.float32)])
    model.compile(loss="categorical_crossentropy", metrics=["accuracy"])
    model.save(path)
    return path


def softmax(keras: Any) -> Any:
    """Return the last layer of a classifier."""
    return keras.layers.Activation("softmax")


def test_the_calls_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Train and evaluate print nothing, return their results, and accept plain paths."""
    report = train(str(tmp_path / "run"), epochs=2, keep=1)
    (score,) = evaluate(str(report.checkpoints[0]), data.load("blobs").split("test"))
    assert score.metrics["accuracy"] == pytest.approx(report.history["val_accuracy"][-1], abs=1e-6)
    own = Split("mine", np.zeros((4, 2)), np.array([0, 1, 2, 0]))
    assert next(evaluate([report.checkpoints[0]], own)).rows == 4
    (tmp_path / "bad.h5").write_bytes(b"no model")
    with pytest.raises(FormatError):
        evaluate([tmp_path / "bad.h5"], own)
    assert tuple(capfd.readouterr()) == ("", "")
