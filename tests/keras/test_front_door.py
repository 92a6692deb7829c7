"""The rows of the README's table whose files Keras and TensorFlow write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.keras.test_evaluate import network
from tests.test_front_door import run_row

WEIGHTS = "Keras 3 `.weights.h5` or `.weights.json` files"


@pytest.mark.parametrize(
    ("have", "suffix"),
    [
        ("Keras `.h5` files, one an epoch", ".h5"),
        ("Keras 3 `.keras` files", ".keras"),
        (WEIGHTS, ".weights.h5"),
        (WEIGHTS, ".weights.json"),
    ],
)
def test_a_row_of_keras_runs(tmp_path: Path, have: str, suffix: str) -> None:
    """Keras loads the output, whose weights are the mean of the ten that were saved."""
    import keras

    (tmp_path / "ckpts").mkdir()
    model = network()
    model.compile(loss="categorical_crossentropy")
    first = [weight + 1 for weight in model.get_weights()]
    for epoch in range(1, 11):
        model.set_weights([weight + 0.01 * epoch for weight in first])
        path = tmp_path / f"ckpts/model_{epoch:02}{suffix}"
        if suffix == ".weights.json":
            model.save_weights(path, max_shard_size=1e-5)
        else:
            model.save_weights(path) if have == WEIGHTS else model.save(path)
    output = tmp_path / run_row(have, tmp_path)[-1]
    loaded: Any = network()
    if have == WEIGHTS:
        loaded.load_weights(output)
    else:
        loaded = keras.models.load_model(output, compile=False)
    for weight, start in zip(loaded.get_weights(), first, strict=True):
        assert np.allclose(weight, start + 0.055, rtol=0, atol=1e-5)


def test_the_row_of_tensorflow_runs(tmp_path: Path) -> None:
    """TensorFlow restores the mean of the checkpoints that it saved."""
    import tensorflow as tf

    (tmp_path / "ckpts").mkdir()
    kernel = np.random.default_rng(0).normal(3, 1, size=(32, 32)).astype(np.float32)
    variable = tf.Variable(kernel)
    for epoch in range(1, 4):
        variable.assign(kernel + epoch)
        tf.train.Checkpoint(kernel=variable).write(str(tmp_path / f"ckpts/ckpt-{epoch}"))
    output = run_row("TensorFlow `ckpt-10.index` and its shards", tmp_path)[-1]
    tf.train.Checkpoint(kernel=variable).read(str(tmp_path / output).removesuffix(".index"))
    assert np.allclose(variable.numpy(), kernel + 2, rtol=0, atol=1e-6)
