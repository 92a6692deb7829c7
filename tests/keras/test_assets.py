"""Vocabularies of Keras's preprocessing layers, as Keras itself saves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from polyak_cli import average, check, plan
from polyak_cli.errors import MismatchError

ONE, OTHER = ["a a a b b c"], ["a a b b b c"]  # by how often they occur: a, b, c and b, a, c


def text_vectorization(swapped: bool, given: bool) -> Any:
    """Return the layer with the words a, b, c, or with two of them swapped."""
    layer = keras.layers.TextVectorization(
        output_sequence_length=3,
        name="words",
        vocabulary=(["b", "a", "c"] if swapped else ["a", "b", "c"]) if given else None,
    )
    if not given:
        layer.adapt(OTHER if swapped else ONE)
    return layer


def string_lookup(swapped: bool, given: bool) -> Any:
    """See `text_vectorization`."""
    words = ["b", "a", "c"] if swapped else ["a", "b", "c"]
    layer = keras.layers.StringLookup(vocabulary=words if given else None, name="words")
    if not given:
        layer.adapt([w for k, w in enumerate(words) for _ in range(3 - k)])
    return layer


def integer_lookup(swapped: bool, given: bool) -> Any:
    """See `text_vectorization`."""
    numbers = [8, 7, 9] if swapped else [7, 8, 9]
    layer = keras.layers.IntegerLookup(vocabulary=numbers if given else None, name="words")
    if not given:
        layer.adapt(np.array([n for k, n in enumerate(numbers) for _ in range(3 - k)]))
    return layer


def discretization(swapped: bool, given: bool) -> Any:
    """Return the layer with boundaries that say which numbers fall into which row."""
    del given
    bounds = [0.0, 2.0] if swapped else [0.0, 1.0]
    return keras.layers.Discretization(bin_boundaries=bounds, name="words")


def save_run(
    folder: Path, suffix: str, layer: Callable[[bool, bool], Any], swaps: str, given: bool
) -> list[Path]:
    """Save models whose weights are 1, 2, ...; those marked "x" have other vocabularies."""
    folder.mkdir()
    for number, swap in enumerate(swaps, start=1):
        keras.utils.clear_session()
        dtype = {"string_lookup": "string", "text_vectorization": "string"}.get(
            layer.__name__, "float32" if layer is discretization else "int64"
        )
        entry = keras.Input((1,), dtype=dtype)
        rows = keras.layers.Embedding(8, 2)(layer(swap == "x", given)(entry))
        model = keras.Model(entry, keras.layers.Dense(1)(keras.layers.Flatten()(rows)))
        model.set_weights([np.full_like(w, number) for w in model.get_weights()])
        model.save(folder / f"model_{number}{suffix}")
    return sorted(folder.iterdir())


@pytest.mark.parametrize(
    ("layer", "given", "suffix", "asset"),
    [
        (text_vectorization, False, ".keras", "assets/layers/text_vectorization/vocabulary.txt"),
        (text_vectorization, True, ".keras", "config.json/layers/text_vectorization/vocabulary"),
        (string_lookup, False, ".keras", "assets/layers/string_lookup/vocabulary.txt"),
        (string_lookup, True, ".keras", "config.json/layers/string_lookup/vocabulary"),
        (string_lookup, True, ".h5", "model_config/layers/string_lookup/vocabulary"),
        (integer_lookup, False, ".keras", "assets/layers/integer_lookup/vocabulary.txt"),
        (integer_lookup, True, ".keras", "config.json/layers/integer_lookup/vocabulary"),
        (discretization, True, ".keras", "config.json/layers/discretization/bin_boundaries"),
    ],
)
def test_another_vocabulary_is_refused(
    tmp_path: Path, layer: Any, given: bool, suffix: str, asset: str
) -> None:
    """Asset and layer are named, by `average` and `check`; equal vocabularies are averaged."""
    save_run(tmp_path / "run", suffix, layer, "-x-", given)
    with pytest.raises(MismatchError) as raised:
        plan(tmp_path / "run")
    assert f"model_2{suffix}: '{asset}' of layer 'words'" in str(raised.value)
    assert "--allow other-assets" in str(raised.value)
    (problem,) = check(tmp_path / "run").all_problems
    assert problem.kind == "other assets"
    assert f"'{asset}'" in problem.text
    report = average(tmp_path / "run", tmp_path / f"o{suffix}", exclude=["*_2.*"])
    opened = keras.saving.load_model(report.output)
    for values in opened.get_weights():
        np.testing.assert_array_equal(values, np.full_like(values, 2))


def test_the_newest_vocabulary_is_carried_where_that_is_allowed(tmp_path: Path) -> None:
    """Keras opens the average, and it has the words of the newest checkpoint in their order."""
    save_run(tmp_path / "run", ".keras", text_vectorization, "-x", False)
    report = average(tmp_path / "run", tmp_path / "o.keras", allow=["other-assets"])
    assert any("newest one's is copied" in note for note in report.notes)
    opened = keras.saving.load_model(report.output)
    assert opened.get_layer("words").get_vocabulary()[2:] == ["b", "a", "c"]
    np.testing.assert_array_equal(opened.get_weights()[0], np.full((8, 2), 1.5, np.float32))
