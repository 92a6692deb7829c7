"""Write three checkpoints of a small model with whatever Keras runs this script.

Usage: python generate.py [tf_keras]

Run once with each Keras whose files are kept here; the folder is named after it.  ``tf_keras`` asks
for the package of that name, else it is ``keras`` of Keras 3, or ``tf.keras`` of a TensorFlow that
has Keras 2 inside.  Imports nothing of the project, and must run with every Keras from 2.13 on.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import numpy as np

EPOCHS = 3


def framework(arguments: list[str]) -> tuple[str, Any]:
    """Return the folder's name and the Keras to write with."""
    if "tf_keras" in arguments:
        return f"tf_keras-{importlib.metadata.version('tf_keras')}", importlib.import_module(
            "tf_keras"
        )
    version = importlib.metadata.version("keras")
    if version.startswith("2."):
        return f"tf.keras-{version}", importlib.import_module("tensorflow").keras
    return f"keras-{version}", importlib.import_module("keras")


def model(keras: Any) -> Any:
    """Return Dense and BatchNormalization, at the top and in a nested model, compiled."""
    layers = keras.layers
    nested = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5, name="inner_dense"),
            layers.BatchNormalization(name="inner_bn"),
        ],
        name="nested",
    )
    rows = keras.Input((4,), name="rows")
    hidden = layers.Dense(6, activation="relu", name="dense")(rows)
    hidden = layers.BatchNormalization(name="bn")(hidden)
    classes = layers.Dense(3, activation="softmax", name="classes")(nested(hidden))
    built = keras.Model(rows, classes, name="generation")
    built.compile(
        optimizer=keras.optimizers.SGD(0.05, momentum=0.9),
        loss="categorical_crossentropy",
        metrics=["accuracy"],
    )
    return built


def main() -> None:
    """Train a few steps an epoch, and save after each."""
    name, keras = framework(sys.argv[1:])
    folder = Path(__file__).parent / name
    folder.mkdir(exist_ok=True)
    keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)
    rows = random.normal(size=(64, 4)).astype("float32")
    labels = np.eye(3, dtype="float32")[random.integers(0, 3, 64)]
    trained = model(keras)
    for epoch in range(1, EPOCHS + 1):
        trained.fit(rows, labels, batch_size=16, epochs=1, verbose=0)
        trained.save(str(folder / f"model_{epoch}.h5"))


if __name__ == "__main__":
    main()
