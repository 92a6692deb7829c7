"""The network of the digits in Keras, and its training by `fit`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polyak_cli.evaluation.data import Split
from tests.examples.digits.experiment import Framework, Regime


def network(rate: float) -> Any:
    """Return the network, compiled; its optimizer keeps the EMA of every step beside it."""
    import keras

    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", use_bias=False, name="first"),
            layers.BatchNormalization(momentum=0.9, name="first_normal"),
            layers.ReLU(),
            layers.Conv2D(32, 3, strides=2, padding="same", use_bias=False, name="second"),
            layers.BatchNormalization(momentum=0.9, name="second_normal"),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10, activation="softmax", name="classes"),
        ],
        name="digits",
    )
    sgd = keras.optimizers.SGD(rate, momentum=0.9, use_ema=True, ema_momentum=0.99, name="sgd")
    model.compile(sgd, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def train(folder: Path, regime: Regime, seed: int, rows: Split, epochs: int) -> None:
    """Train once, saving a checkpoint an epoch."""
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(seed)
    tf.config.experimental.enable_op_determinism()
    options = tf.data.Options()  # as in `polyak train`: TensorFlow's own would cost more than fit
    options.autotune.enabled = False
    options.experimental_optimization.apply_default_optimizations = False
    pipeline = tf.data.Dataset.from_tensor_slices((rows.features, rows.labels))
    network(regime.rate).fit(
        pipeline.with_options(options).shuffle(rows.rows).batch(regime.batch),
        epochs=epochs,
        shuffle=False,  # the pipeline does
        verbose=0,
        callbacks=[keras.callbacks.ModelCheckpoint(str(folder / "model_{epoch:03d}.keras"))],
    )


KERAS = Framework("Keras", ".keras", None, train)
