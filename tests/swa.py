"""`python -m tests.swa FOLDER` trains with StochasticWeightAveraging on Keras's back end.

Tests run it in a process of their own, because the back end is chosen when Keras is imported.
"""

from __future__ import annotations

import sys
from pathlib import Path

import h5py
import numpy as np


def main(folder: Path) -> None:
    """Compare the weights in memory with the average of files, and print the back end."""
    import keras

    from polyak_cli.callbacks import PolyakCheckpoint, StochasticWeightAveraging

    keras.utils.set_random_seed(0)
    rows = np.random.default_rng(0).normal(size=(24, 4)).astype("float32")
    hidden, norm = (
        keras.layers.Dense(5, name="hidden"),
        keras.layers.BatchNormalization(name="norm"),
    )
    layers = [keras.Input((4,)), hidden, norm, keras.layers.Dropout(0.2), keras.layers.Dense(3)]
    model = keras.Sequential(layers)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.5), loss)
    output = folder / "average.weights.h5"
    saved = PolyakCheckpoint(folder / "c", output, every_steps=2, last=3, scheme="linear")
    swa = StochasticWeightAveraging(
        start_step=4, every_steps=2, scheme="linear", recalibrate=rows, batch_size=24
    )
    model.fit(rows, np.arange(24) % 3, batch_size=8, epochs=3, verbose=0, callbacks=[saved, swa])
    assert swa.count == 3
    with h5py.File(output) as file:
        for name, layer in (("dense", hidden), ("dense_1", model.layers[-1])):
            for k, own in enumerate(layer.get_weights()):
                assert own.tobytes() == file[f"layers/{name}/vars/{k}"][()].tobytes(), name
        scale, offset, mean, variance = norm.get_weights()
        for k, own in enumerate([scale, offset]):
            assert own.tobytes() == file[f"layers/batch_normalization/vars/{k}"][()].tobytes()
    # All rows in one batch: its moments, of the averaged layer before it.
    values = rows @ hidden.get_weights()[0] + hidden.get_weights()[1]
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(variance, values.var(0), rtol=1e-4, atol=1e-6)
    print(keras.backend.backend())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
