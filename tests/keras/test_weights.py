"""Keras itself loads the averages of weights that it saved, and of the EMA of its optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from polyak_cli import average, plan
from polyak_cli.errors import MismatchError
from tests.oracle import Array

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(32, 6)).astype("float32")
LABELS = RNG.normal(size=(32, 2)).astype("float32")


class Subclassed(keras.Model):  # type: ignore[misc] # Keras has no types
    """Layers as attributes, in lists and below one another, and a variable of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = layers.Dense(5)
        self.bn = layers.BatchNormalization()
        self.blocks = [layers.Dense(4), [layers.Dense(4), sequential()]]
        self.own = self.add_weight(shape=(2,), name="own")
        self.seen = self.add_weight(shape=(), dtype="int32", trainable=False, name="seen")

    def call(self, rows: Any) -> Any:
        """Use all of them."""
        rows = self.bn(self.first(rows))
        return self.blocks[1][1](self.blocks[1][0](self.blocks[0](rows))) + self.own


def sequential() -> Any:
    """More than ten variables' worth of optimizer state, statistics, and a layer without any."""
    hidden = [layers.Dense(4, "relu"), layers.BatchNormalization(), layers.Dropout(0.1)]
    return keras.Sequential([*hidden, layers.Dense(2)])


def functional() -> Any:
    """A nested model, one layer used twice."""
    rows = keras.Input((6,))
    shared = layers.Dense(6)
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(3), layers.BatchNormalization()])
    return keras.Model(rows, layers.Dense(2)(inner(shared(shared(rows)))))


def recurrent() -> Any:
    """A cell below its layer, and a wrapper that stores a kernel twice."""
    steps = layers.Reshape((3, 2))
    dense = layers.SpectralNormalization(layers.Dense(2))
    return keras.Sequential([keras.Input((6,)), steps, layers.LSTM(4), dense])


@pytest.fixture(autouse=True)
def _policy() -> Any:
    """Leave no policy behind."""
    before = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(before)


def save_epochs(
    model: Any, folder: Path, save: Callable[[Any, Path], None], optimizer: Any = "adam"
) -> list[list[Array]]:
    """Train a model, save it after each of three epochs, and return its weights of each."""
    folder.mkdir()
    model.compile(optimizer, "mean_squared_error")
    weights = []
    for epoch in range(3):
        model.fit(ROWS, LABELS, verbose=0)
        save(model, folder / f"model_{epoch}")
        weights.append([np.asarray(value) for value in model.get_weights()])
    return weights


def save_random(model: Any, folder: Path, save: Callable[[Any, Path], None]) -> list[list[Array]]:
    """Do as `save_epochs` does, with random numbers, which takes less time than training."""
    folder.mkdir()
    model(ROWS)
    model.compile("adam", "mean_squared_error")
    model.optimizer.build(model.trainable_variables)
    weights = []
    for epoch in range(3):
        for variable in (*model.weights, *model.optimizer.variables):
            variable.assign(RNG.normal(size=variable.shape) * 100)
        save(model, folder / f"model_{epoch}")
        weights.append([np.asarray(value) for value in model.get_weights()])
    return weights


def mean(columns: Sequence[Sequence[Array]], multipliers: Sequence[float]) -> list[Array]:
    """Return the float64 averages, rounded to the type of each; integers are the newest's."""
    found = []
    for column in zip(*columns, strict=True):
        total: Any = 0.0
        for values, multiplier in zip(column, multipliers, strict=True):
            total = total + multiplier * np.asarray(values, np.float64)
        newest = column[-1]
        rounded = total / math.fsum(multipliers) if newest.dtype.kind != "i" else newest
        found.append(np.asarray(rounded).astype(newest.dtype))
    return found


def assert_weights(model: Any, expected: Sequence[Array]) -> None:
    """Compare bits."""
    found = [np.asarray(value) for value in model.get_weights()]
    assert [value.dtype for value in found] == [value.dtype for value in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.tobytes() == theirs.tobytes()


def save_weights(model: Any, path: Path) -> None:
    """Save in one file."""
    model.save_weights(f"{path}.weights.h5")


def save_shards(model: Any, path: Path) -> None:
    """Save in several files of at most 300 bytes of values each."""
    model.save_weights(f"{path}.weights.json", max_shard_size=300 / 1024**3)


@pytest.mark.parametrize(
    ("build", "save", "policy", "statistics"),
    [
        (sequential, save_weights, "float32", 2),
        (functional, save_weights, "float32", 2),
        (Subclassed, save_weights, "float32", 4),
        (Subclassed, save_shards, "float32", 4),
        (recurrent, save_weights, "float32", 0),
        (sequential, save_weights, "mixed_float16", 2),
        (sequential, save_weights, "bfloat16", 2),
        (sequential, save_shards, "bfloat16", 2),
    ],
)
def test_keras_loads_the_average_of_weights(
    tmp_path: Path, build: Any, save: Any, policy: str, statistics: int
) -> None:
    """Every weight has the very bits of the naive average, in a model that was built again."""
    keras.config.set_dtype_policy(policy)
    model = build()
    weights = save_random(model, tmp_path / "run", save)
    report = average(tmp_path / "run", tmp_path / "o.weights.h5", scheme="exp", alpha=2)
    again = build()
    again(ROWS)
    again.load_weights(tmp_path / "o.weights.h5")
    assert_weights(again, mean(weights, report.plan.mean.multipliers))
    assert len(report.plan.tables[-1].keras.statistics) == statistics


@pytest.mark.slow
def test_training_goes_on_from_averaged_weights(tmp_path: Path) -> None:
    """With the newest optimizer state where that was asked for."""
    model = sequential()
    weights = save_epochs(model, tmp_path / "run", save_weights)
    average(tmp_path / "run", tmp_path / "o.weights.h5", optimizer="newest")
    before = [np.asarray(variable) for variable in model.optimizer.variables]
    model.fit(ROWS, LABELS, verbose=0)
    model.load_weights(tmp_path / "o.weights.h5")
    for ours, theirs in zip(model.optimizer.variables, before, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), theirs)
    assert_weights(model, mean(weights, [1 / 3] * 3))
    model.fit(ROWS, LABELS, verbose=0)


@pytest.mark.slow
def test_weights_of_tf_keras(tmp_path: Path) -> None:
    """Its metrics are carried, never averaged."""
    tf_keras = pytest.importorskip("tf_keras")

    def build() -> Any:
        hidden = [tf_keras.layers.Dense(4, input_shape=(6,)), tf_keras.layers.BatchNormalization()]
        return tf_keras.Sequential([*hidden, tf_keras.layers.Dense(2)])

    weights = save_epochs(build(), tmp_path / "run", save_weights)
    report = average(tmp_path / "run", tmp_path / "o.weights.h5")
    assert set(report.plan.carried) == {"/metrics/mean/vars/0", "/metrics/mean/vars/1"}
    again = build()
    again.load_weights(tmp_path / "o.weights.h5")
    assert_weights(again, mean(weights, report.plan.mean.multipliers))


def test_shards_in_a_directory_belong_to_their_json(tmp_path: Path) -> None:
    """The epochs are counted by the .weights.json files."""
    save_random(sequential(), tmp_path / "run", save_shards)
    made = plan(tmp_path / "run")
    assert [checkpoint.path.name for checkpoint in made.checkpoints] == [
        f"model_{epoch}.weights.json" for epoch in range(3)
    ]
    assert len(made.passed_over) == len(list((tmp_path / "run").glob("*.weights.h5"))) >= 6


def save_whole(model: Any, path: Path) -> None:
    """Save a whole model."""
    model.save(f"{path}.h5")


@pytest.mark.parametrize(
    "policy", ["float32", pytest.param("mixed_float16", marks=pytest.mark.slow)]
)
def test_the_ema_of_the_optimizer_is_taken(tmp_path: Path, policy: str) -> None:
    """One checkpoint gives what Keras's own `finalize_variable_values` would make of the model."""
    keras.config.set_dtype_policy(policy)
    model = functional()
    optimizer = keras.optimizers.Adam(0.1, use_ema=True, ema_momentum=0.5)
    save_epochs(model, tmp_path / "run", save_whole, optimizer)
    average(tmp_path / "run", tmp_path / "o.h5", use_ema=True, last=1)
    optimizer.finalize_variable_values(model.trainable_variables)
    opened = keras.models.load_model(tmp_path / "o.h5", compile=False)
    assert_weights(opened, [np.asarray(value) for value in model.get_weights()])


def test_ema_from_the_first_is_what_keras_keeps(tmp_path: Path) -> None:
    """Its optimizer copies the weights after the first step, and folds in those that follow."""
    variable = keras.Variable(np.zeros(50, np.float32))
    optimizer = keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.9)
    random = np.random.default_rng(0)
    for step in range(1, 6):
        optimizer.apply([random.normal(size=50).astype(np.float32)], [variable])
        np.savez(tmp_path / f"step_{step}.npz", w=np.asarray(variable))
    average(tmp_path, tmp_path / "o.npz", scheme="ema", decay=0.9, from_first=True)
    (slot,) = [one for one in optimizer.variables if one.path.endswith("_average")]
    found = np.load(tmp_path / "o.npz")["w"]
    np.testing.assert_allclose(found, np.asarray(slot), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_emas_of_checkpoints_are_averaged(tmp_path: Path) -> None:
    """Each trained tensor is the mean of its slots, each other that of itself."""
    model = sequential()
    emas = []

    def save(model: Any, path: Path) -> None:
        save_whole(model, path)
        slots = [v for v in model.optimizer.variables if v.path.endswith("_average")]
        of = dict(zip([v.path for v in model.trainable_variables], slots, strict=True))
        emas.append([np.asarray(of.get(v.path, v)) for v in model.weights])

    optimizer = keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True)
    save_epochs(model, tmp_path / "run", save, optimizer)
    report = average(tmp_path / "run", tmp_path / "o.h5", use_ema=True)
    opened = keras.models.load_model(tmp_path / "o.h5", compile=False)
    assert_weights(opened, mean(emas, report.plan.mean.multipliers))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("suffix", ["h5", "keras"])
def test_the_ema_of_tf_keras_is_taken(tmp_path: Path, policy: str, suffix: str) -> None:
    """Its slots have names of another kind, without the optimizer's under mixed precision."""
    tf_keras = pytest.importorskip("tf_keras")
    hidden = [tf_keras.layers.Dense(4, input_shape=(6,)), tf_keras.layers.BatchNormalization()]
    tf_keras.mixed_precision.set_global_policy(policy)
    try:
        model = tf_keras.Sequential([*hidden, tf_keras.layers.Dense(2)])
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")
    optimizer = tf_keras.optimizers.Adam(0.1, use_ema=True, ema_momentum=0.5)

    def save(model: Any, path: Path) -> None:
        model.save(f"{path}.{suffix}")

    save_epochs(model, tmp_path / "run", save, optimizer)
    average(tmp_path / "run", tmp_path / f"o.{suffix}", use_ema=True, last=1)
    kept = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    emas = iter(kept._model_variables_moving_average)
    expected = [np.asarray(next(emas) if v.trainable else v) for v in model.weights]
    opened = tf_keras.models.load_model(tmp_path / f"o.{suffix}", compile=False)
    assert_weights(opened, expected)


@pytest.mark.slow
def test_a_keras_archive_saved_after_an_h5_says_what_is_missing(tmp_path: Path) -> None:
    """The .h5 has the EMAs of the same training by name, and gives them."""
    model = sequential()
    optimizer = keras.optimizers.Adam(0.1, use_ema=True, ema_momentum=0.5)
    model.compile(optimizer, "mean_squared_error")
    model.fit(ROWS, LABELS, verbose=0)
    model.save(tmp_path / "m_1.h5")
    model.save(tmp_path / "m_1.keras")
    with pytest.raises(MismatchError, match="does not describe the optimizer"):
        average([tmp_path / "m_1.keras"], tmp_path / "o.keras", use_ema=True)
    average([tmp_path / "m_1.h5"], tmp_path / "o.h5", use_ema=True)
    optimizer.finalize_variable_values(model.trainable_variables)
    opened = keras.models.load_model(tmp_path / "o.h5", compile=False)
    assert_weights(opened, [np.asarray(value) for value in model.get_weights()])
