"""The ways people average checkpoints today, each a short script that runs in a separate process.

Imports nothing of the package under test.  None of them syncs its output, as such scripts do not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import h5py
import numpy as np


def tutorial_h5py(inputs: Sequence[str], output: str) -> None:
    """Hold all models in memory and average each tensor with `numpy.average`."""
    models = []
    for path in inputs:
        with h5py.File(path, "r") as file:
            models.append({name: file[name][()] for name in _datasets(file)})
    weights = np.ones(len(inputs))
    _write(
        inputs[-1],
        output,
        lambda name: np.average([model[name] for model in models], axis=0, weights=weights),
    )


def tutorial_keras(inputs: Sequence[str], output: str) -> None:
    """Load all models into Keras, average their weights layer by layer, and save the model."""
    import keras

    members = [keras.saving.load_model(path, compile=False) for path in inputs]
    equal = np.ones(len(inputs))
    weights = [model.get_weights() for model in members]
    averaged = [
        np.average(np.array([member[k] for member in weights]), axis=0, weights=equal)
        for k in range(len(weights[0]))
    ]
    final = keras.models.clone_model(members[-1])
    final.set_weights(averaged)
    final.save(output)


def loop_float32(inputs: Sequence[str], output: str) -> None:
    """Add up whole tensors in float32, one tensor at a time."""
    _loop(inputs, output, np.dtype(np.float32))


def loop_float64(inputs: Sequence[str], output: str) -> None:
    """Add up whole tensors in float64, one tensor at a time: carefully, and plainly."""
    _loop(inputs, output, np.dtype(np.float64))


def _loop(inputs: Sequence[str], output: str, dtype: np.dtype[Any]) -> None:
    files = [h5py.File(path, "r") for path in inputs]

    def average(name: str) -> Any:
        total: Any = None
        for file in files:
            term = file[name][()].astype(dtype, copy=False)
            total = term if total is None else np.add(total, term, out=total)
        total /= len(files)
        return total

    _write(inputs[-1], output, average)
    for file in files:
        file.close()


def _datasets(file: Any) -> list[str]:
    found: list[str] = []

    def visit(_: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found.append(item.name)

    file["model_weights"].visititems(visit)
    return found


def _write(template: str, output: str, average: Callable[[str], Any]) -> None:
    """Write a file like the template, with its attributes and other values."""
    with h5py.File(template, "r") as source, h5py.File(output, "w") as target:
        target.attrs.update(source.attrs)

        def copy(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset):
                made = target.create_dataset(name, data=average(item.name), dtype=item.dtype)
            else:
                made = target.require_group(name)
            made.attrs.update(item.attrs)

        target.create_group("model_weights").attrs.update(source["model_weights"].attrs)
        source["model_weights"].visititems(lambda name, item: copy(f"model_weights/{name}", item))


WAYS = {
    way.__name__.replace("_", "-"): way
    for way in (tutorial_h5py, tutorial_keras, loop_float32, loop_float64)
}

if __name__ == "__main__":
    WAYS[sys.argv[1]](sys.argv[3:], sys.argv[2])
