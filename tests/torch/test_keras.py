"""Keras models run on PyTorch where TensorFlow is not installed."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from polyak_cli.evaluation import data
from tests.command import ROOT
from tests.examples.demo import find_right, read_keras

pytest.importorskip("optree")  # Keras's; importing Keras itself would choose its back end
SAMPLES = ROOT / "sample_checkpoints"


def run(*arguments: str, backend: str = "", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run Python, without a back end chosen by the user or with one."""
    environment = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    environment |= {"KERAS_BACKEND": backend} if backend else {}
    environment["KERAS_HOME"] = str(cwd / "keras")  # not the settings of the user
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_scores_on_pytorch_are_those_of_tensorflow(tmp_path: Path) -> None:
    """Loss and accuracy of every sample checkpoint are what Keras logged on TensorFlow."""
    done = run("-m", "polyak_cli", "evaluate", str(SAMPLES), "--data=blobs", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with open(SAMPLES / "training.csv", newline="") as file:
        logged = {int(float(row["epoch"])): row for row in csv.DictReader(file)}
    models = json.loads(done.stdout)["models"]
    assert len(models) == 10
    for model in models:
        row = logged[int(Path(model["path"]).stem[-3:])]
        assert model["metrics"]["accuracy"] == pytest.approx(float(row["val_accuracy"]), abs=1e-6)
        assert model["loss"] == pytest.approx(float(row["val_loss"]), rel=1e-5)


def test_a_sweep_on_pytorch_scores_as_plain_numpy_does(tmp_path: Path) -> None:
    """Each checkpoint and the average of all have the accuracy of a network written by hand."""
    command = ["sweep", "--data=blobs", "--windows=10", "--schemes=equal", "--json", "-o", "report"]
    done = run("-m", "polyak_cli", *command, str(SAMPLES), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {}
    for row in json.loads(done.stdout)["rows"]:
        parts = [row["metrics"][part]["accuracy"] for part in ("selection", "reporting")]
        found[row["label"]] = sum(parts) / 2  # each is the share of 500 rows
    rows = data.load("blobs").split("test")
    x, y = np.asarray(rows.features), np.asarray(rows.labels)
    files = sorted(SAMPLES.glob("model_*.h5"))
    models = [read_keras(path) for path in files]
    averaged = [np.mean(tensors, axis=0, dtype=float) for tensors in zip(*models, strict=True)]
    for name, tensors in zip(
        (*(f.name for f in files), "equal, last 10"), (*models, averaged), strict=True
    ):
        assert found[name] == pytest.approx(find_right(tensors, x, y).mean(), abs=1e-9), name


def test_batchnorm_is_recalibrated_on_pytorch(tmp_path: Path) -> None:
    """The statistics of a layer at the input become the mean and the variance of the rows."""
    script = """
import os
os.environ["KERAS_BACKEND"] = "torch"
import keras
import numpy as np
from polyak_cli import Split, recalibrate
x = np.random.default_rng(0).normal(3, 2, (500, 2)).astype("float32")
model = keras.Sequential([keras.Input((2,)), keras.layers.BatchNormalization()])
model.save("model.keras")
recalibrate("model.keras", "new.keras", Split("rows", x, np.zeros(500)), batch_size=500)
layer = keras.saving.load_model("new.keras").layers[0]
for found, expected in ((layer.moving_mean, x.mean(0)), (layer.moving_variance, x.var(0))):
    np.testing.assert_allclose(keras.ops.convert_to_numpy(found), expected, rtol=1e-4)
"""
    done = run("-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_back_end_that_is_not_installed_is_one_line(tmp_path: Path) -> None:
    """The user's choice is not replaced; the error names it and the variable."""
    model = str(SAMPLES / "model_499.h5")
    done = run("-m", "polyak_cli", "evaluate", model, "--data=blobs", backend="jax", cwd=tmp_path)
    assert done.returncode
    (line,) = done.stderr.splitlines()
    assert "cannot be imported on the back end jax" in line
    assert "KERAS_BACKEND" in line


def test_training_the_sample_run_needs_tensorflow(tmp_path: Path) -> None:
    """Its bytes are those of TensorFlow's pipeline, so another back end is not used."""
    done = run("-m", "polyak_cli", "train", "--data=blobs", "-o", "run", cwd=tmp_path)
    assert done.returncode
    assert "pip install 'polyak[tensorflow]'" in done.stderr


def test_weights_are_averaged_in_memory_on_pytorch(tmp_path: Path) -> None:
    """As the files of the same steps are, and with new statistics of BatchNorm."""
    done = run("-m", "tests.swa", str(tmp_path), backend="torch", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "torch\n"), done.stderr
