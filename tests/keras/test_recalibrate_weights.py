"""BatchNorm's statistics in files of weights only are recomputed with the layers of `--model`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from keras import layers

from polyak_cli import average, recalibrate, verify
from polyak_cli.errors import FormatError, MismatchError, UsageError
from polyak_cli.evaluation import data
from polyak_cli.pipeline import sweeping
from tests.keras.commands import polyak

RANDOM = np.random.default_rng(17)
ROWS = RANDOM.normal(2, 3, size=(60, 4)).astype(np.float32)
CLASSES = RANDOM.integers(0, 3, 60)
SPLIT = data.Split("rows.npz", ROWS, CLASSES)


def network() -> Any:
    """Return a model with a BatchNorm outside, and one inside a model of its own."""
    inside = [keras.Input((5,)), layers.Dense(4, name="deep"), layers.BatchNormalization()]
    steps = [
        layers.Dense(5, "relu", name="first"),
        layers.BatchNormalization(name="outer"),
        keras.Sequential(inside, name="nested"),
        layers.Dense(3, "softmax", name="last"),
    ]
    model = keras.Sequential([keras.Input((4,)), *steps])
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run of weights, its model as `arch.keras`, and the rows."""
    folder = tmp_path_factory.mktemp("run")
    model = network()
    model.save(folder / "arch.keras")
    np.savez(folder / "rows.npz", x=ROWS, y=CLASSES)
    (folder / "ckpts").mkdir()
    for epoch in (1, 2, 3):
        for weight in model.trainable_variables:
            weight.assign_add(RANDOM.normal(size=weight.shape))
        model.save_weights(folder / f"ckpts/epoch_{epoch}.weights.h5")
    return folder


def load(path: Path) -> Any:
    """Return the model with the tensors of a file, loaded by Keras."""
    model = network()
    model.compile(None)
    model.load_weights(path)
    return model


def test_the_statistics_are_the_moments_of_the_rows(run: Path, tmp_path: Path) -> None:
    """In one batch these are mean and variance of what numpy computes; all else keeps its bits."""
    mean, made = tmp_path / "mean.weights.h5", tmp_path / "new.weights.h5"
    average(run / "ckpts", mean)
    report = recalibrate(mean, made, SPLIT, architecture=run / "arch.keras")
    assert report.layers == 2
    before, after = load(mean), load(made)
    kernel, bias = before.get_layer("first").get_weights()
    found = np.maximum(ROWS.astype(float) @ kernel + bias, 0)
    gamma, beta, moving_mean, variance = after.get_layer("outer").get_weights()
    assert moving_mean == pytest.approx(found.mean(0), rel=1e-5)
    assert variance == pytest.approx(found.var(0), rel=1e-4)
    changed = set()
    with h5py.File(mean) as old, h5py.File(made) as new:
        assert json.loads(new.attrs["polyak_provenance"])["recalibrated"]["model"] == "arch.keras"

        def compare(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset) and not np.array_equal(item[()], new[name][()]):
                changed.add(name)

        old.visititems(compare)
    inner = "layers/sequential/layers/batch_normalization/vars"
    outer = "layers/batch_normalization/vars"
    assert changed == {f"{where}/{k}" for where in (inner, outer) for k in (2, 3)}
    assert np.array_equal(gamma, before.get_layer("outer").get_weights()[0])
    assert np.array_equal(beta, before.get_layer("outer").get_weights()[1])


@pytest.mark.parametrize("kind", ["weights.json", "legacy"])
def test_other_files_of_weights_give_what_the_whole_model_gives(
    run: Path, tmp_path: Path, kind: str
) -> None:
    """Shards become one file, and the weights of Keras 2 are found by the order of layers."""
    model = load(run / "ckpts/epoch_3.weights.h5")
    if kind == "legacy":
        old = pytest.importorskip("tf_keras")
        inner = [old.layers.Dense(4, input_shape=(5,)), old.layers.BatchNormalization()]
        steps = [
            old.layers.Dense(5, "relu", input_shape=(4,)),
            old.layers.BatchNormalization(),
            old.Sequential(inner),
            old.layers.Dense(3, "softmax"),
        ]
        made = old.Sequential(steps)
        for own, layer in zip(made.layers, model.layers, strict=True):
            own.set_weights(layer.get_weights())
        source, output = tmp_path / "old.h5", tmp_path / "new.h5"
        made.save_weights(source)
    else:
        source, output = tmp_path / "w.weights.json", tmp_path / "new.weights.h5"
        model.save_weights(source, max_shard_size=1e-7)
    model.save(tmp_path / "whole.keras")
    recalibrate(source, output, SPLIT, batch_size=20, architecture=run / "arch.keras")
    recalibrate(tmp_path / "whole.keras", tmp_path / "right.keras", SPLIT, batch_size=20)
    right = keras.saving.load_model(tmp_path / "right.keras", compile=False)
    for ours, theirs in zip(load(output).get_weights(), right.get_weights(), strict=True):
        assert np.array_equal(ours, theirs)


def test_averaging_recalibrates_weights_in_one_go(run: Path, tmp_path: Path) -> None:
    """The file is that of two steps, and `verify` finds it as recorded."""
    one, alone, two = (tmp_path / f"{name}.weights.h5" for name in ("one", "alone", "two"))
    chosen = {"recalibrate": SPLIT, "batch_size": 20, "model": run / "arch.keras"}
    report = average(run / "ckpts", one, verify=True, **chosen)  # type: ignore[arg-type]
    average(run / "ckpts", alone)
    recalibrate(alone, two, SPLIT, batch_size=20, architecture=run / "arch.keras")
    assert one.read_bytes() == two.read_bytes()
    assert report.verified
    assert verify(one, sources=[run / "ckpts"]).problems == ()


@pytest.mark.slow
def test_a_sweep_recalibrates_each_average_of_weights(run: Path, tmp_path: Path) -> None:
    """The command that it prints makes a file with the winner's score."""
    best = tmp_path / "best.weights.h5"
    dataset = data.Dataset("rows", {"train": SPLIT, "test": data.Split("test", ROWS + 1, CLASSES)})
    arch = str(run / "arch.keras")
    found = sweeping.sweep(
        str(run / "ckpts"),
        dataset,
        windows="2-3",
        chosen="equal",
        recalibrate=SPLIT,
        model=arch,
        write_best=best,
    )
    for row in found.rows:
        if row.candidate.kind == "average":
            made = tmp_path / f"{row.candidate.window}.weights.h5"
            last = row.candidate.window
            average(run / "ckpts", made, last=last, recalibrate=SPLIT, model=arch)
            model = network()
            model.compile(None, "sparse_categorical_crossentropy", metrics=["accuracy"])
            model.load_weights(made)
            halves = data.halves(dataset.split(), seed=0, share=0.5)
            loss = model.evaluate(halves[1].features, halves[1].labels, 256, 0)[0]
            assert row.scores["reporting"].loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.soak
def test_the_commands_take_an_architecture(run: Path, tmp_path: Path) -> None:
    """`average --recalibrate --model` and `recalibrate --model`; a sweep prints the first."""
    done = polyak(
        *("average", "ckpts", "--recalibrate", "rows.npz", "--model", "arch.keras"),
        *("-o", tmp_path / "one.weights.h5", "-q"),
        cwd=run,
    )
    assert done.returncode == 0, done.stderr
    done = polyak(
        *("recalibrate", "ckpts/epoch_3.weights.h5", "--data", "rows.npz"),
        *("--model", "arch.keras", "-o", tmp_path / "two.weights.h5", "--json"),
        cwd=run,
    )
    assert json.loads(done.stdout)["layers"] == 2
    done = polyak(
        *("sweep", "ckpts", "--data", "rows.npz", "--recalibrate", "rows.npz"),
        *("--schemes", "equal", "--windows", "3", "--model", "arch.keras"),
        *("-o", tmp_path / "report", "--json"),
        cwd=run,
    )
    assert done.returncode == 0, done.stderr
    command = shlex.split(json.loads(done.stdout)["winner_command"])
    assert command[-1] == "best.weights.h5"
    if "equal" in command:  # an average won
        assert command[command.index("--model") + 1] == "arch.keras"


def test_what_is_missing_or_does_not_fit_is_one_line(run: Path, tmp_path: Path) -> None:
    """No architecture, that of another model, and one without a purpose are refused first."""
    source, output = run / "ckpts/epoch_1.weights.h5", tmp_path / "o.weights.h5"
    with pytest.raises(FormatError, match=r"weights only, no architecture.* with --model$"):
        recalibrate(source, output, SPLIT)
    with pytest.raises(FormatError, match=r"weights only, no architecture.* with --model$"):
        average(run / "ckpts", output, recalibrate=SPLIT)
    with pytest.raises(UsageError, match="--model belongs to --recalibrate"):
        average(run / "ckpts", output, model=run / "arch.keras")
    with pytest.raises(UsageError, match="there is no such file"):
        average(run / "ckpts", output, recalibrate=SPLIT, model=run / "none.keras")
    other = keras.Sequential([keras.Input((4,)), layers.BatchNormalization(), layers.Dense(3)])
    other.save(tmp_path / "other.keras")
    with pytest.raises(MismatchError, match=f"^{source}: holds .* as in --model"):
        recalibrate(source, output, SPLIT, architecture=tmp_path / "other.keras")
    note = next(one for one in average(run / "ckpts", output).notes if "moving" in one)
    assert note.endswith("(--recalibrate DATA --model ARCH)")
