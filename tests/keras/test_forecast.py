"""Forecasts of commands, with Keras itself as the oracle."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from polyak_cli import pipeline
from polyak_cli.evaluation import data
from polyak_cli.evaluation.forecast import forecast
from tests.keras.commands import polyak

pytestmark = pytest.mark.slow
SAMPLE = Path(__file__).parents[2] / "sample_checkpoints"


def find_loss(path: Path) -> float:
    """Return the loss on the test rows by Keras alone."""
    import keras

    rows = data.load("blobs").split()
    one_hot = np.eye(3, dtype=np.float32)[np.asarray(rows.labels)]
    model = keras.saving.load_model(path)
    return float(model.evaluate(rows.features, one_hot, verbose=0)[0])


def test_watch_foretells_what_annealing_would_give(tmp_path: Path) -> None:
    """Loss and interval come from the losses of the ten and of the average of five, by Keras."""
    pipeline.average(SAMPLE, tmp_path / "five.h5", last=5)
    singles = [find_loss(path) for path in sorted(SAMPLE.glob("*.h5"))]
    wanted = forecast(singles, find_loss(tmp_path / "five.h5"))
    assert wanted is not None
    watch = ("watch", SAMPLE, "--once", "--data", "blobs", "--scheme", "exp", "-o")
    done = polyak(*watch, "a.h5", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["forecast"]
    assert found == pytest.approx(wanted.data(), rel=1e-4)
    done = polyak(*watch, "b.h5", cwd=tmp_path)
    wrote, said = done.stdout.splitlines()
    assert wrote.startswith("wrote b.h5: 10 checkpoints")
    assert re.match(rf"Annealed now .* rate: about loss {found['loss']:.4g}, from", said)


def test_sweep_foretells_it_too(tmp_path: Path) -> None:
    """The line is printed, and the JSON has the loss of the average of five on the other rows."""
    done = polyak(
        *("sweep", SAMPLE, "--data", "blobs", "--schemes", "equal", "--windows", "5", "-o", "r"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "r/sweep.json").read_text())
    five = [row for row in found["rows"] if row["window"] == 5 and row["kind"] == "average"]
    loss = five[0]["metrics"]["reporting"]["loss"]
    assert found["forecast"]["loss"] == loss
    assert f"one an epoch at a constant rate: about loss {loss:.4g}, from" in done.stdout
