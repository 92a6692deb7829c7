"""The framework itself opens what was averaged, predicts with it, and trains on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from polyak_cli import average
from tests.oracle import read_model

HERE = Path(__file__).parent.parent
GENERATIONS = HERE / "data" / "keras_generations"
SAMPLES = HERE.parent / "sample_checkpoints"
ROWS = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")


def set_by_hand(framework: Any, paths: list[Path], multipliers: tuple[float, ...]) -> Any:
    """Return the newest model with the weighted mean of all models' weights, as a user would."""
    loaded = [framework.models.load_model(path, compile=False) for path in paths]
    means = [
        np.asarray(
            sum(
                m * np.asarray(values, np.float64)
                for m, values in zip(multipliers, column, strict=True)
            )
            / math.fsum(multipliers),
            np.float32,
        )
        for column in zip(*(m.get_weights() for m in loaded), strict=True)
    ]
    loaded[-1].set_weights(means)
    return loaded[-1]


def test_keras_predicts_with_the_average_as_with_weights_set_by_hand(tmp_path: Path) -> None:
    """The opened file has the very weights, and gives the very predictions."""
    folder = GENERATIONS / "keras-3.15.1"
    report = average(folder, tmp_path / "o.h5", scheme="exp", alpha=2)
    opened = keras.models.load_model(tmp_path / "o.h5")
    paths = [checkpoint.path for checkpoint in report.plan.checkpoints]
    expected = set_by_hand(keras, paths, report.plan.mean.multipliers)
    for ours, theirs in zip(opened.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(
        opened.predict(ROWS, verbose=0), expected.predict(ROWS, verbose=0)
    )


def test_fit_goes_on_from_the_average(tmp_path: Path) -> None:
    """The file keeps the training configuration without the state that would break fit()."""
    average(SAMPLES, tmp_path / "o.h5", scheme="exp", alpha=2)
    opened = keras.models.load_model(tmp_path / "o.h5")
    before = opened.get_weights()
    rows = ROWS[:, :2]
    labels = np.eye(3, dtype="float32")[np.arange(32) % 3]
    history = opened.fit(rows, labels, epochs=2, verbose=0)
    assert len(history.history["loss"]) == 2
    assert any(not np.array_equal(a, b) for a, b in zip(before, opened.get_weights(), strict=True))


def test_keras_saves_the_average_again_unchanged(tmp_path: Path) -> None:
    """Opened and saved by Keras, every number is the same."""
    average(SAMPLES, tmp_path / "o.h5")
    keras.models.load_model(tmp_path / "o.h5").save(tmp_path / "again.h5")
    one, other = (
        {k: v for k, v in read_model(tmp_path / name).items() if k.startswith("model_weights/")}
        for name in ("o.h5", "again.h5")
    )
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name])


@pytest.mark.parametrize("generation", ["keras-3.0.5", "keras-3.3.3"])
def test_todays_keras_opens_the_average_of_older_keras_3(tmp_path: Path, generation: str) -> None:
    """Weights named as Keras 3.0 and 3.3 did open in the installed one."""
    report = average(GENERATIONS / generation, tmp_path / "o.h5")
    opened = keras.models.load_model(tmp_path / "o.h5")
    paths = [checkpoint.path for checkpoint in report.plan.checkpoints]
    expected = set_by_hand(keras, paths, report.plan.mean.multipliers)
    np.testing.assert_array_equal(
        opened.predict(ROWS, verbose=0), expected.predict(ROWS, verbose=0)
    )


@pytest.mark.parametrize("generation", ["tf.keras-2.13.1", "tf_keras-2.21.0"])
def test_tf_keras_opens_the_average_of_its_own_files(tmp_path: Path, generation: str) -> None:
    """Keras 2's files stay Keras 2's files, for prediction and for training."""
    import tf_keras

    report = average(GENERATIONS / generation, tmp_path / "o.h5", scheme="linear")
    opened = tf_keras.models.load_model(tmp_path / "o.h5")
    paths = [checkpoint.path for checkpoint in report.plan.checkpoints]
    expected = set_by_hand(tf_keras, paths, report.plan.mean.multipliers)
    np.testing.assert_array_equal(
        opened.predict(ROWS, verbose=0), expected.predict(ROWS, verbose=0)
    )
    opened.fit(ROWS, np.eye(3, dtype="float32")[np.arange(32) % 3], verbose=0)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_keras_opens_an_average_stored_in_another_type(tmp_path: Path, dtype: Any) -> None:
    """Keras casts on loading; the numbers are those of the file."""
    average(SAMPLES, tmp_path / "o.h5", dtype=dtype)
    opened = keras.models.load_model(tmp_path / "o.h5", compile=False)
    stored = read_model(tmp_path / "o.h5")["model_weights/dense/sequential/dense/kernel"]
    np.testing.assert_array_equal(opened.get_weights()[0], stored.astype("float32"))


def test_the_average_of_a_layer_without_weights_and_shared_layers(tmp_path: Path) -> None:
    """Dropout, shared layers, int variables and layers of another type survive."""
    keras.utils.set_random_seed(0)
    for epoch in range(3):
        keras.backend.clear_session()
        shared = keras.layers.Dense(4, name="shared")
        a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
        both = keras.layers.Concatenate(name="both")([shared(a), shared(b)])
        dropped = keras.layers.Dropout(0.5, name="drop")(both)
        normal = keras.layers.Normalization(name="norm")
        normal.adapt(np.random.default_rng(0).normal(size=(10, 8)))
        out = keras.layers.Dense(2, name="out")(normal(dropped))
        keras.Model([a, b], out, name="m").save(tmp_path / f"m_{epoch}.h5")
    report = average(tmp_path, tmp_path / "o.h5")
    opened = keras.models.load_model(tmp_path / "o.h5")
    expected = set_by_hand(keras, [c.path for c in report.plan.checkpoints], (1 / 3,) * 3)
    rows = [ROWS, ROWS + 1]
    np.testing.assert_allclose(
        opened.predict(rows, verbose=0), expected.predict(rows, verbose=0), rtol=1e-6
    )


def test_two_models_of_one_process_need_match_order(tmp_path: Path) -> None:
    """Keras's own renaming: the error says so, and --match order gives what it should."""
    keras.utils.set_random_seed(0)
    for epoch in range(2):
        built = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)])
        built.save(tmp_path / f"m_{epoch}.h5")
    with pytest.raises(Exception, match="--match order"):
        average(tmp_path, tmp_path / "o.h5")
    average(tmp_path, tmp_path / "o.h5", match="order")
    opened = keras.models.load_model(tmp_path / "o.h5")
    paths = [tmp_path / "m_0.h5", tmp_path / "m_1.h5"]
    expected = set_by_hand(keras, paths, (0.5, 0.5))
    np.testing.assert_array_equal(
        opened.predict(ROWS, verbose=0), expected.predict(ROWS, verbose=0)
    )
