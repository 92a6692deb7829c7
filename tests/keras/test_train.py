from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest

from polyak_cli.errors import MissingExtraError, OutputError, UsageError
from polyak_cli.evaluation import data, keras_files, sample_run

SAMPLES = Path(__file__).parents[2] / "sample_checkpoints"


def accuracy_and_loss(path: Path) -> tuple[float, float]:
    """Return accuracy and loss of a checkpoint of the sample run, by numpy alone."""
    rows = data.load("blobs").split("test")
    points, classes = np.asarray(rows.features), np.asarray(rows.labels)
    with h5py.File(path) as file:
        kernel, bias, last_kernel, last_bias = (
            file[f"model_weights/{layer}/sequential/{layer}/{name}"][()].astype(np.float64)
            for layer in ("dense", "dense_1")
            for name in ("kernel", "bias")
        )
    logits = np.maximum(points @ kernel + bias, 0) @ last_kernel + last_bias
    shares: npt.NDArray[np.float64] = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    right = float((shares.argmax(1) == classes).mean())
    return right, float(-np.log(shares[np.arange(len(classes)), classes]).mean())


def test_the_last_epochs_are_kept_and_all_are_logged(tmp_path: Path) -> None:
    """The last epochs leave model files, numbered from 0, and every epoch a row of the log."""
    seen: list[tuple[int, Mapping[str, float]]] = []
    report = sample_run.train(
        tmp_path / "new" / "run", epochs=4, keep=2, progress=lambda *both: seen.append(both)
    )
    assert report.output == tmp_path / "new" / "run"
    assert [path.name for path in report.checkpoints] == ["model_2.h5", "model_3.h5"]
    assert {path.name for path in report.output.iterdir()} == {
        "model_2.h5",
        "model_3.h5",
        "training.csv",
    }
    with open(report.log, newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "accuracy", "loss", "val_accuracy", "val_loss"]
    assert [row["epoch"] for row in rows] == ["0", "1", "2", "3"]
    for name, values in report.history.items():
        assert [float(row[name]) for row in rows] == list(values)
        assert [metrics[name] for _, metrics in seen] == list(values)
    assert [epoch for epoch, _ in seen] == [0, 1, 2, 3]


def test_what_is_logged_is_what_the_checkpoint_does(tmp_path: Path) -> None:
    """The test accuracy and loss of the last epoch are those of numpy for its file."""
    report = sample_run.train(tmp_path, epochs=3, keep=1)
    right, loss = accuracy_and_loss(report.checkpoints[0])
    assert report.history["val_accuracy"][-1] == pytest.approx(right, abs=1e-6)
    assert report.history["val_loss"][-1] == pytest.approx(loss, rel=1e-5)


def test_one_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    """The same seed gives the same files, another one others, whatever ran before."""
    for name, seed in (("one", 3), ("other", 4), ("again", 3)):
        sample_run.train(tmp_path / name, epochs=3, keep=2, seed=seed)

    def content(name: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    assert content("one") == content("again")
    assert content("one")["model_2.h5"] != content("other")["model_2.h5"]


def test_fewer_epochs_than_are_to_be_kept_are_all_kept(tmp_path: Path) -> None:
    """--keep is an upper limit."""
    report = sample_run.train(tmp_path, epochs=2, keep=10)
    assert [path.name for path in report.checkpoints] == ["model_0.h5", "model_1.h5"]


@pytest.mark.parametrize(
    ("optimizer", "rate", "expected"),
    [("sgd", None, 0.01), ("adam", None, 0.001), ("adam", 0.02, 0.02)],
)
def test_the_optimizer_is_the_one_asked_for(
    tmp_path: Path, optimizer: str, rate: float | None, expected: float
) -> None:
    """The file says which optimizer, learning rate, loss and metric it was trained with."""
    report = sample_run.train(tmp_path, epochs=1, optimizer=optimizer, learning_rate=rate)
    assert (report.optimizer, report.learning_rate) == (optimizer, expected)
    with h5py.File(report.checkpoints[0]) as file:
        training = json.loads(file.attrs["training_config"])
        assert "optimizer_weights" in file
    config = training["optimizer_config"]["config"]
    assert config["name"] == optimizer
    assert config["learning_rate"] == pytest.approx(expected)
    assert config.get("momentum") == (0.9 if optimizer == "sgd" else None)
    assert (training["loss"], training["metrics"]) == ("categorical_crossentropy", ["accuracy"])


def test_an_earlier_run_is_not_mixed_with_a_new_one(tmp_path: Path) -> None:
    """A folder with checkpoints is refused; --force removes them, and nothing else."""
    sample_run.train(tmp_path, epochs=5, keep=1)
    (tmp_path / "notes.txt").write_text("mine")
    before = (tmp_path / "model_4.h5").read_bytes()
    with pytest.raises(OutputError, match=r"already holds checkpoints \(model_4\.h5\).*--force"):
        sample_run.train(tmp_path, epochs=2, keep=1)
    assert (tmp_path / "model_4.h5").read_bytes() == before
    sample_run.train(tmp_path, epochs=2, keep=1, force=True)
    assert {p.name for p in tmp_path.iterdir()} == {"model_1.h5", "training.csv", "notes.txt"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "--epochs 0 is out of range"),
        ({"keep": 0}, "--keep 0 is out of range"),
        ({"seed": -1}, "--seed -1 is out of range"),
        ({"seed": 2**32}, "expected 0 to 4294967295"),
        ({"learning_rate": 0.0}, "--learning-rate 0 is out of range"),
        ({"learning_rate": float("nan")}, "--learning-rate nan is out of range"),
        ({"learning_rate": float("inf")}, "--learning-rate inf is out of range"),
        ({"optimizer": "rmsprop"}, "--optimizer rmsprop is unknown; expected sgd or adam"),
    ],
)
def test_numbers_out_of_range_are_refused(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    """They are refused before anything is written."""
    with pytest.raises(UsageError, match=message):
        sample_run.train(tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    """A file in place of the folder, or above it, is named."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file: is not a folder to write to"):
        sample_run.train(tmp_path / "file", epochs=1)
    with pytest.raises(OutputError, match="below: cannot be written: Not a directory"):
        sample_run.train(tmp_path / "file" / "below", epochs=1)


def test_an_interrupted_run_leaves_whole_checkpoints_only(tmp_path: Path) -> None:
    """Files saved before the interrupt stay; no partial file is left, hidden or not."""

    def interrupt(epoch: int, _metrics: Mapping[str, float]) -> None:
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_run.train(tmp_path, epochs=3, progress=interrupt)
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["model_0.h5", "model_1.h5", "training.csv"]


def test_a_failed_save_leaves_nothing_under_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk in the middle of a file gives one line, and the hidden file is removed."""
    import keras

    def fail(_model: object, path: Path) -> None:
        assert path.name.startswith(".")
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keras.Model, "save", fail)
    with pytest.raises(OutputError, match="cannot be written: No space left on device"):
        sample_run.train(tmp_path, epochs=1)
    assert [path.name for path in tmp_path.iterdir()] in ([], ["training.csv"])


def test_a_missing_framework_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without TensorFlow the message says what to install."""
    monkeypatch.setattr(keras_files, "find_spec", lambda _name: None)
    with pytest.raises(MissingExtraError, match=r"polyak train needs .*'polyak\[tensorflow\]'"):
        sample_run.train(tmp_path, epochs=1)


# --- the samples ----------------------------------------------------------------------------------


def test_the_samples_are_of_this_command(tmp_path: Path) -> None:
    """The first epochs of the command equal those of the shipped run, except for rounding."""
    report = sample_run.train(tmp_path, epochs=2)
    with open(SAMPLES / "training.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 500
    for name, values in report.history.items():
        assert [float(row[name]) for row in rows[:2]] == pytest.approx(values, abs=2e-3)


def test_the_figures_of_the_samples_are_true() -> None:
    """The README has accuracy and loss of each sample, and the log agrees."""
    text = (SAMPLES / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"\| (\d+) \| ([\d.]+) \| ([\d.]+) \|", text)
    listed = {int(epoch): (right, loss) for epoch, right, loss in lines}
    assert list(listed) == list(range(490, 500))
    with open(SAMPLES / "training.csv", newline="") as file:
        logged = {int(row["epoch"]): row for row in csv.DictReader(file)}
    found = {epoch: accuracy_and_loss(SAMPLES / f"model_{epoch}.h5") for epoch in listed}
    for epoch, (accuracy, cross_entropy) in found.items():
        assert listed[epoch] == (f"{accuracy:.3f}", f"{cross_entropy:.4f}")
        assert float(logged[epoch]["val_accuracy"]) == pytest.approx(accuracy, abs=1e-6)
    means = [f"{np.mean(column):.4f}" for column in zip(*found.values(), strict=True)]
    assert f"| mean of the ten | {means[0]} | {means[1]} |" in text
