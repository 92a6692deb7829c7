"""LoRA of Keras's own layers: the whole-model `.h5` keeps the factors, other files merge them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from polyak_cli import average


def make_model(e: int) -> Any:
    """Return a model with LoRA in a Dense, an Embedding and a Conv1D, and its own random values."""
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Embedding(9, 6, name="words"),
        keras.layers.Conv1D(5, 2, name="windows"),
        keras.layers.Dense(4, name="head"),
    ]
    model = keras.Sequential([keras.Input((3,)), *layers], name="net")
    values = np.random.default_rng(e)
    for layer in layers:
        layer.enable_lora(2)
        for variable in layer.trainable_variables:
            if "lora" in variable.path:
                variable.assign(values.standard_normal(variable.shape))
    return model


def list_kernels(model: Any) -> list[Any]:
    """Return the kernels that the layers use, with what LoRA adds."""
    words, windows, head = model.layers
    return [np.asarray(k, np.float64) for k in (words.embeddings, windows.kernel, head.kernel)]


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_keras_uses_the_mean_of_the_products(tmp_path: Path, suffix: str) -> None:
    """A `.keras` is merged when it is saved; of an `.h5`, --lora exact writes the truncation."""
    kernels = []
    for e in (1, 2):
        model = make_model(e)
        kernels.append(list_kernels(model))
        model.save(tmp_path / f"m_{e}{suffix}")
    base = make_model(3)
    for layer in base.layers:
        layer.lora_enabled = False
    plain = list_kernels(base)
    report = average(
        tmp_path, tmp_path / f"o{suffix}", lora="exact" if suffix == ".h5" else "factors"
    )
    assert bool(report.plan.factors) == (suffix == ".h5")
    found = list_kernels(keras.saving.load_model(tmp_path / f"o{suffix}"))
    for own, one, other, kernel in zip(found, *kernels, plain, strict=True):
        added = ((one + other) / 2 - kernel).reshape(-1, kernel.shape[-1])
        if suffix == ".h5":
            u, s, v = np.linalg.svd(added, full_matrices=False)
            added = u[:, :2] * s[:2] @ v[:2]
        expected = kernel + added.reshape(kernel.shape)
        np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-5)
