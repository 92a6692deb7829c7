"""TensorFlow SavedModels are named as such; the checkpoint inside is averaged or refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from polyak_cli import average, check, plan
from polyak_cli.errors import PolyakError


def test_the_variables_of_saved_models_are_averaged_as_their_names_say(tmp_path: Path) -> None:
    """As the error advises: into a copy of the newest folder, which TensorFlow then loads."""
    for number in (1, 2):
        module = tf.Module()
        module.kernel = tf.Variable(tf.fill((3, 2), float(number)))
        module.bias = tf.Variable(tf.fill((2,), 10.0 * number))
        tf.saved_model.save(module, str(tmp_path / f"export_{number}"))
    with pytest.raises(PolyakError, match=r"SavedModel; .*variables/variables.index"):
        plan(tmp_path / "export_1")
    copy = tmp_path / "average"
    shutil.copytree(tmp_path / "export_2", copy, ignore=shutil.ignore_patterns("variables.*"))
    paths = [tmp_path / f"export_{number}/variables/variables.index" for number in (1, 2)]
    average(paths, copy / "variables" / "variables.index")
    loaded = tf.saved_model.load(str(copy))
    np.testing.assert_array_equal(loaded.kernel.numpy(), np.full((3, 2), 1.5, np.float32))
    np.testing.assert_array_equal(loaded.bias.numpy(), np.full(2, 15, np.float32))


def test_exported_models_without_an_order_are_refused(tmp_path: Path) -> None:
    """model.export() numbers variables by a set: equal shapes would be averaged crosswise."""
    for number in (1, 2):
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3)])
        model.set_weights([np.full_like(w, number) for w in model.get_weights()])
        model.export(tmp_path / f"export_{number}", verbose=False)
    paths = [tmp_path / f"export_{number}/variables/variables.index" for number in (1, 2)]
    with pytest.raises(PolyakError, match=r"model\.export\(\).*average the model's own"):
        plan(paths)
    assert "no order" in {problem.kind for problem in check(paths).all_problems}
