"""Keras opens what was converted from one of its formats to another, and predicts the same."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

from polyak_cli import average, plan, verify
from polyak_cli.errors import OutputError
from tests.keras.test_keras_zip import ROWS, deflate, nested, sequential, train
from tests.keras.test_opens import set_by_hand

# --- .keras to .weights.h5 ------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_weights_of_archives_predict_as_weights_set_by_hand(tmp_path: Path, packed: bool) -> None:
    """A fresh model loads them, with every bit of the mean; `verify` makes the same bytes."""
    (tmp_path / "run").mkdir()
    paths = train(tmp_path / "run", nested())
    expected = set_by_hand(keras, paths, (0.5, 0.5))
    for path in paths if packed else ():
        deflate(path)
    output = tmp_path / "mean.weights.h5"
    average(tmp_path / "run", output, only_weights=True, verify=True)
    fresh = keras.models.clone_model(expected)
    fresh.load_weights(output)
    for ours, theirs in zip(fresh.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(fresh.predict(ROWS, verbose=0), expected.predict(ROWS, verbose=0))
    assert verify(output, sources=[tmp_path / "run"]).problems == ()


def test_one_archive_gives_the_tensors_that_keras_saves(tmp_path: Path) -> None:
    """One checkpoint alone is converted bit for bit; the file has the groups that Keras makes."""
    (path, _) = train(tmp_path, sequential())
    average(path, tmp_path / "ours.weights.h5", only_weights=True)
    model = keras.saving.load_model(path)
    model.save_weights(tmp_path / "theirs.weights.h5")

    def read(name: str) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def note(where: str, item: Any) -> None:
            if not where.startswith("optimizer"):
                values = item[()].tobytes() if isinstance(item, h5py.Dataset) else None
                found[where] = (values, dict(item.attrs))

        with h5py.File(tmp_path / name) as file:
            file.visititems(note)
        return found

    assert read("ours.weights.h5") == read("theirs.weights.h5")


def test_the_configuration_is_lost_only_on_demand(tmp_path: Path) -> None:
    """Without --only-weights it is an error that names what would be lost, before any work."""
    (path, _) = train(tmp_path, sequential())
    before = path.read_bytes()
    with pytest.raises(OutputError, match=r"configuration and the assets.* --only-weights, or kee"):
        plan(path, tmp_path / "o.weights.h5")
    with pytest.raises(OutputError, match=r"or \.safetensors or \.npz or \.weights\.h5 to convert"):
        plan(path, tmp_path / "o.h5", only_weights=True)
    average(path, tmp_path / "same.keras", only_weights=True)
    with zipfile.ZipFile(tmp_path / "same.keras") as archive:
        assert "config.json" in archive.namelist()
    assert path.read_bytes() == before
