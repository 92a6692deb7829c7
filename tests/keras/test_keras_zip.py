"""Keras opens, scores and trains on with what was averaged of its own .keras archives."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from polyak_cli import average
from polyak_cli.errors import MismatchError
from tests.keras.commands import polyak
from tests.keras.test_opens import set_by_hand

ROWS = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
LABELS = np.arange(32) % 3


def sequential() -> Any:
    """Return a model with BatchNorm and dropout."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(8, activation="relu"),
            layers.BatchNormalization(),
            layers.Dropout(0.5),
            layers.Dense(3, activation="softmax"),
        ]
    )


def nested() -> Any:
    """Return a functional model with another in it, shared layers and a Normalization."""
    layers = keras.layers
    inside = keras.Input((4,))
    inner = keras.Model(inside, layers.BatchNormalization()(layers.Dense(6)(inside)), name="inner")
    normal = layers.Normalization()
    normal.adapt(ROWS)
    entry = keras.Input((4,))
    both = layers.Add()([inner(normal(entry)), inner(entry)])
    return keras.Model(entry, layers.Dense(3, activation="softmax")(both))


def train(folder: Path, model: Any, inputs: Any = ROWS, epochs: int = 2) -> list[Path]:
    """Train a model, saving each epoch; return the checkpoints."""
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    for epoch in range(epochs):
        model.fit(inputs, LABELS, batch_size=16, verbose=0)
        model.save(folder / f"model_{epoch}.keras")
    return sorted(folder.glob("*.keras"))


def deflate(path: Path) -> None:
    """Pack an archive again."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
@pytest.mark.parametrize(("build", "deflated"), [(sequential, False), (nested, True)])
def test_keras_goes_on_with_the_average(tmp_path: Path, build: Any, deflated: bool) -> None:
    """It opens with the weights of a mean by hand, predicts the same, scores, and trains on."""
    keras.utils.set_random_seed(0)
    folder = tmp_path / "run"
    folder.mkdir()
    paths = train(folder, build())
    if deflated:
        for path in paths:
            deflate(path)
    report = average(folder, tmp_path / "o.keras", scheme="exp", alpha=2)
    opened = keras.saving.load_model(tmp_path / "o.keras")
    expected = set_by_hand(keras, paths, report.plan.mean.multipliers)
    for ours, theirs in zip(opened.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(
        opened.predict(ROWS, verbose=0), expected.predict(ROWS, verbose=0)
    )
    assert np.isfinite(opened.evaluate(ROWS, LABELS, verbose=0)).all()
    assert int(opened.optimizer.iterations) == 0
    before = opened.get_weights()
    opened.fit(ROWS, LABELS, verbose=0)
    assert any(not np.array_equal(a, b) for a, b in zip(before, opened.get_weights(), strict=True))


def test_the_newest_optimizer_state_is_restored_whole(tmp_path: Path) -> None:
    """With --optimizer newest every slot is that of the newest checkpoint, and fit() goes on."""
    keras.utils.set_random_seed(0)
    paths = train(tmp_path, sequential())
    average(paths, tmp_path / "o.keras", optimizer="newest")
    opened, newest = (keras.saving.load_model(p) for p in (tmp_path / "o.keras", paths[-1]))
    assert len(opened.optimizer.variables) == len(newest.optimizer.variables) > 2
    for ours, theirs in zip(opened.optimizer.variables, newest.optimizer.variables, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    opened.fit(ROWS, LABELS, verbose=0)


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
def test_assets_are_carried(tmp_path: Path) -> None:
    """A vocabulary, which Keras keeps as a file in the archive, is found again."""
    keras.utils.set_random_seed(0)
    words = np.array([["red", "green", "blue"][k] for k in LABELS])[:, None]
    lookup = keras.layers.StringLookup(output_mode="one_hot")
    lookup.adapt(words)
    entry = keras.Input((1,), dtype="string")
    model = keras.Model(entry, keras.layers.Dense(3, activation="softmax")(lookup(entry)))
    import tensorflow as tf

    rows = tf.constant(words)
    paths = train(tmp_path, model, rows)
    with zipfile.ZipFile(paths[0]) as archive:
        assert any(name.startswith("assets/") for name in archive.namelist())
    report = average(paths, tmp_path / "o.keras")
    opened = keras.saving.load_model(tmp_path / "o.keras")
    expected = set_by_hand(keras, paths, report.plan.mean.multipliers)
    np.testing.assert_array_equal(opened(rows), expected(rows))


def test_bfloat16_opens(tmp_path: Path) -> None:
    """Unlike .h5, a .keras says what its two bytes are."""
    keras.utils.set_random_seed(0)
    built = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, dtype="bfloat16")])
    for epoch in range(2):
        built.layers[0].kernel.assign(np.full((4, 3), 1.0 + 2 * epoch))
        built.save(tmp_path / f"m_{epoch}.keras")
    report = average(tmp_path, tmp_path / "o.keras")
    assert not any("bfloat16" in note for note in report.notes)
    opened = keras.saving.load_model(tmp_path / "o.keras")
    assert opened.layers[0].kernel.dtype == "bfloat16"
    assert np.asarray(opened.layers[0].kernel, np.float32).tolist() == [[2.0] * 3] * 4


def test_an_average_is_scored(tmp_path: Path) -> None:
    """``polyak evaluate`` takes the averaged archive like any other."""
    keras.utils.set_random_seed(0)
    paths = train(tmp_path, sequential())
    average(paths, tmp_path / "o.keras")
    np.savez(tmp_path / "rows.npz", x=ROWS, y=LABELS)
    done = polyak("evaluate", "o.keras", "--data", "rows.npz", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "o.keras" in json.dumps(json.loads(done.stdout))


def recurrent() -> Any:
    """Return a model of layers that consist of others, and of equal ones named out of order."""
    layers = keras.layers
    entry = keras.Input((4,))
    both = [layers.Dense(4, name=name)(entry) for name in ("z", "a")]
    steps = layers.Reshape((4, 1))(layers.Dense(4, name="m")(layers.Concatenate()(both)))
    steps = layers.Bidirectional(layers.LSTM(4, return_sequences=True))(steps)
    steps = layers.TimeDistributed(layers.Dense(4))(layers.MultiHeadAttention(2, 2)(steps, steps))
    return keras.Model(entry, layers.Dense(3, activation="softmax")(layers.GRU(3)(steps)))


def frozen() -> Any:
    """Return a model with a layer that is not trained."""
    model = sequential()
    model.layers[0].trainable = False
    return model


@pytest.mark.parametrize(
    ("build", "optimizer", "settings", "policy"),
    [
        (sequential, "Adam", {}, "float32"),
        (nested, "SGD", {"momentum": 0.9}, "mixed_float16"),
        (recurrent, "AdamW", {"gradient_accumulation_steps": 2}, "float32"),
        (frozen, "SGD", {}, "bfloat16"),
    ],
)
def test_the_ema_of_an_archive_is_taken(
    tmp_path: Path, build: Any, optimizer: str, settings: dict[str, Any], policy: str
) -> None:
    """What Keras's own `finalize_variable_values` would make of the model, numbered as it is."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = build()
    finally:
        keras.config.set_dtype_policy(before)
    made = getattr(keras.optimizers, optimizer)(0.01, use_ema=True, **settings)
    model.compile(made, "sparse_categorical_crossentropy")
    model.fit(ROWS, LABELS, verbose=0)
    emas = made._model_variables_moving_average
    random = np.random.default_rng(0)
    for variable in (*model.weights, *emas):  # so that any two that are mixed up differ
        variable.assign(random.normal(size=variable.shape))
    model.save(tmp_path / "m.keras")
    report = average(tmp_path / "m.keras", tmp_path / "o.keras", use_ema=True)
    made.finalize_variable_values(model.trainable_variables)
    opened = keras.saving.load_model(tmp_path / "o.keras", compile=False)
    for ours, theirs in zip(opened.get_weights(), model.get_weights(), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    assert (
        sum(len(found) for found in report.plan.tables[-1].keras.ema_slots.values())
        == len(emas)
        > 0
    )


def test_a_layer_whose_order_is_not_known_has_its_ema_refused(tmp_path: Path) -> None:
    """It is named; without --use-ema the archive is averaged."""
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.SpectralNormalization(keras.layers.Dense(3))]
    )
    model.compile(keras.optimizers.Adam(use_ema=True), "sparse_categorical_crossentropy")
    model.fit(ROWS, LABELS, verbose=0)
    model.save(tmp_path / "m.keras")
    average(tmp_path / "m.keras", tmp_path / "o.keras")
    with pytest.raises(MismatchError, match=r"m\.keras: has no EMA .*spectral_normalization'"):
        average(tmp_path / "m.keras", tmp_path / "p.keras", use_ema=True)
