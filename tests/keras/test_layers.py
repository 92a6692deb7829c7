"""Layers are averaged with themselves, whatever Keras calls them and wherever it stores them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from polyak_cli import average, check, plan
from polyak_cli.errors import MismatchError
from tests.oracle import Array

RNG = np.random.default_rng(11)


def list_leaves(model: Any) -> list[Any]:
    """Return the layers that are no models, in the model's order."""
    found: list[Any] = []
    for layer in model.layers:
        found += list_leaves(layer) if hasattr(layer, "layers") else [layer]
    return found


def read_values(model: Any) -> list[Array]:
    """Return all values, layer by layer."""
    return [np.asarray(value) for layer in list_leaves(model) for value in layer.get_weights()]


def save_run(models: Sequence[Any], folder: Path, suffix: str = ".h5") -> list[Array]:
    """Give models random values, save each, and return the mean of their values by layer."""
    folder.mkdir()
    values = []
    for epoch, model in enumerate(models):
        for layer in list_leaves(model):
            layer.set_weights([RNG.normal(size=w.shape) for w in layer.get_weights()])
        values.append(read_values(model))
        save_one(model, folder / f"model_{epoch}{suffix}")
    columns = zip(*values, strict=True)
    return [np.mean([v.astype("f8") for v in column], 0).astype("f4") for column in columns]


def save_one(model: Any, path: Path) -> None:
    """Save a model as its suffix says."""
    if path.name.endswith(".weights.json"):
        model.save_weights(path, max_shard_size=1)
    elif ".weights" in path.name:
        model.save_weights(path)
    else:
        model.save(path)


def load(path: Path) -> list[Array]:
    """Return the values of a whole model, as Keras loads it, layer by layer."""
    return read_values(keras.models.load_model(path, compile=False))


def assert_same(found: Sequence[Array], expected: Sequence[Array]) -> None:
    """Compare bits."""
    assert [value.tobytes() for value in found] == [value.tobytes() for value in expected]


# --- frozen layers of whole models ----------------------------------------------------------------


def nested(keras_: Any, frozen: Sequence[int], names: Sequence[str | None] = ()) -> Any:
    """Return a model around another one, two layers of which are alike, and some frozen.

    Args:
        keras_: Keras 3 or tf_keras.
        frozen: places in the inner model.
        names: of the inner layers.
    """
    l_ = keras_.layers
    first, second = (*names, None, None)[:2]
    hidden = [l_.Dense(4, name=first), l_.BatchNormalization(), l_.Dense(4, name=second)]
    inner = keras_.Sequential([keras_.Input((4,)), *hidden, l_.BatchNormalization()])
    rows = keras_.Input((4,))
    for place in frozen:
        inner.layers[place].trainable = False
    return keras_.Model(rows, l_.Dense(4)(inner(l_.Dense(4)(rows))))


@pytest.mark.parametrize("frozen", [([], [0]), ([0, 1], [2]), ([0, 1, 2, 3], [1])])
def test_frozen_layers_are_averaged_with_themselves(
    tmp_path: Path, frozen: tuple[list[int], list[int]]
) -> None:
    """A model that is built again has other names, and one that is frozen another order."""
    expected = save_run([nested(keras, places) for places in frozen], tmp_path / "run")
    with pytest.raises(MismatchError, match="Use --match order"):
        average(tmp_path / "run", tmp_path / "o.h5")
    average(tmp_path / "run", tmp_path / "o.h5", match="order")
    assert_same(load(tmp_path / "o.h5"), expected)
    assert check(tmp_path / "run", match="order").healthy
    assert not check(tmp_path / "run").healthy


def test_frozen_layers_of_one_model_pair_by_name(tmp_path: Path) -> None:
    """Freezing changes the order in the file and not the names."""
    model = nested(keras, [])
    expected: list[list[Array]] = []
    for frozen in (False, True):
        list_leaves(model)[2].trainable = not frozen
        means = save_run([model], tmp_path / f"{frozen}")
        expected.append(means)
    paths = [tmp_path / f"{frozen}" / "model_0.h5" for frozen in (False, True)]
    average(paths, tmp_path / "o.h5")
    mean = [
        np.mean([a.astype("f8"), b.astype("f8")], 0).astype("f4")
        for a, b in zip(*expected, strict=True)
    ]
    assert_same(load(tmp_path / "o.h5"), mean)
    with pytest.raises(MismatchError, match="leave out --match order to pair tensors by name"):
        plan(paths, match="order")


def test_renamed_frozen_layers_pair_by_their_places(tmp_path: Path) -> None:
    """The configuration has the order of the layers; names that change places count more."""
    models = [nested(keras, [0], ("a", "b")), nested(keras, [], ("c", "d"))]
    expected = save_run(models, tmp_path / "run")
    average(tmp_path / "run", tmp_path / "o.h5", match="order")
    assert_same(load(tmp_path / "o.h5"), expected)
    moved = [nested(keras, [], ("a", "b")), nested(keras, [], ("b", "c"))]
    save_run(moved, tmp_path / "moved")
    with pytest.raises(MismatchError, match="has the layer 'a' where the other has 'b'"):
        average(tmp_path / "moved", tmp_path / "o.h5", match="order", force=True)


@pytest.mark.slow
@pytest.mark.parametrize("older_first", [True, False])
def test_keras_2_and_keras_3_pair_by_order(tmp_path: Path, older_first: bool) -> None:
    """The refusal of their names says so, and frozen layers do not matter."""
    tf_keras = pytest.importorskip("tf_keras")
    models = [nested(tf_keras, [0]), nested(keras, [2])]
    expected = save_run(models if older_first else models[::-1], tmp_path / "run")
    with pytest.raises(
        MismatchError, match=r"versions of Keras name tensors differently.*match order"
    ):
        plan(tmp_path / "run")
    average(tmp_path / "run", tmp_path / "o.h5", match="order")
    opener = keras if older_first else tf_keras
    assert_same(read_values(opener.models.load_model(tmp_path / "o.h5", compile=False)), expected)


@pytest.mark.slow
def test_weights_without_a_configuration_pair_by_their_numbers(tmp_path: Path) -> None:
    """Numbers of automatic names tell the order; other names of like layers are refused."""
    tf_keras = pytest.importorskip("tf_keras")

    def save(models: Sequence[Any], folder: Path) -> list[Array]:
        expected = save_run(models, folder)
        for epoch, model in enumerate(models):
            model.save_weights(folder / f"model_{epoch}.h5")
        return expected

    models = [nested(tf_keras, []), nested(tf_keras, [0])]
    expected = save(models, tmp_path / "run")
    average(tmp_path / "run", tmp_path / "o.h5", match="order")
    models[-1].load_weights(tmp_path / "o.h5")
    assert_same(read_values(models[-1]), expected)
    renamed = [nested(tf_keras, [], ("a", "b")), nested(tf_keras, [0], ("c", "d"))]
    save(renamed, tmp_path / "renamed")
    with pytest.raises(MismatchError, match=r"have the same shape.*Save whole models"):
        average(tmp_path / "renamed", tmp_path / "o.h5", match="order", force=True)


# --- layers that change places --------------------------------------------------------------------

SUFFIXES = (".keras", ".weights.h5", ".weights.json")


def chain(*names: str | None) -> Any:
    """Return a model of like layers."""
    return keras.Sequential([keras.Input((4,)), *(layers.Dense(4, name=n) for n in names)])


class Attributes(keras.Model):  # type: ignore[misc] # Keras has no types
    """Layers in a list and as attributes, whose names are given.

    Keras visits attributes by their alphabet, and "layers" is one of them that has all layers.
    """

    def __init__(self, names: str, attributes: str = "yz") -> None:
        super().__init__()
        self.blocks = [layers.Dense(4, name=name) for name in names]
        self.early, self.first = (layers.Dense(4, name=name) for name in attributes)

    def call(self, rows: Any) -> Any:
        """Use all of them."""
        for layer in (*self.blocks, self.early, self.first):
            rows = layer(rows)
        return rows


def by_name(build: Callable[[], Any], path: Path) -> dict[str, Array]:
    """Return the kernels of a model that loads a file, by the names of their layers."""
    if path.name.endswith(".keras"):
        model = keras.models.load_model(path, compile=False)
    else:
        model = build()
        model.load_weights(path)
    return {layer.name: np.asarray(layer.get_weights()[0]) for layer in list_leaves(model)}


def save_constants(models: Sequence[Any], folder: Path, suffix: str) -> None:
    """Save models in which every layer's kernel says the layer: left is 1, right is -1."""
    folder.mkdir()
    for epoch, model in enumerate(models):
        for layer in list_leaves(model):
            layer.set_weights([np.full(w.shape, VALUES[layer.name]) for w in layer.get_weights()])
        save_one(model, folder / f"model_{epoch}{suffix}")


VALUES = {"left": 1.0, "right": -1.0, "middle": 5.0, "y": 7.0, "z": 8.0}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_layers_that_change_places_pair_by_name(tmp_path: Path, suffix: str) -> None:
    """Their paths count the layers of a class; names beside them say which is which."""
    orders = (("left", "right", "middle"), ("middle", "left", "right"))
    save_constants([chain(*names) for names in orders], tmp_path / "run", suffix)
    output = tmp_path / ("o.keras" if suffix == ".keras" else "o.weights.h5")
    for match in ("name", "order"):
        average(tmp_path / "run", output, match=match, force=True)
        found = by_name(lambda: chain(*orders[1]), output)
        assert {name: float(v.flat[0]) for name, v in found.items()} == {
            name: VALUES[name] for name in orders[1]
        }
    # Equal in every bit but for their order, which check says, and not that models differ.
    assert {problem.kind for problem in check(tmp_path / "run").all_problems} == {"identical"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_other_names_are_refused(tmp_path: Path, suffix: str) -> None:
    """By name; by order only where no name stands at another place."""
    save_run([chain("left", "right"), chain("left", "middle")], tmp_path / "run", suffix)
    output = tmp_path / ("o.keras" if suffix == ".keras" else "o.weights.h5")
    with pytest.raises(MismatchError, match=r"'right' where the other has 'middle'.*--match order"):
        average(tmp_path / "run", output)
    assert not check(tmp_path / "run").healthy
    average(tmp_path / "run", output, match="order")
    save_run([chain("left", "right"), chain("right", "middle")], tmp_path / "moved", suffix)
    with pytest.raises(MismatchError, match=r"'left' where the other has 'right'"):
        average(tmp_path / "moved", output, match="order", force=True)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_numbers_that_keras_gives_again_are_tolerated(tmp_path: Path, suffix: str) -> None:
    """A model that is built again in one process has other numbers, and is the same model."""
    models = [chain(None, "left", None) for _ in range(2)]
    expected = save_run(models, tmp_path / "run", suffix)
    output = tmp_path / ("o.keras" if suffix == ".keras" else "o.weights.h5")
    average(tmp_path / "run", output)
    models[-1].load_weights(output)
    assert_same(read_values(models[-1]), expected)


def test_automatic_names_in_another_order_are_refused(tmp_path: Path) -> None:
    """Made in one order and used in another: which layer is meant is for the user to say."""
    models = []
    for order in (1, -1):
        keras.backend.clear_session()
        made = [layers.Dense(4), layers.Dense(4)]
        models.append(keras.Sequential([keras.Input((4,)), *made[::order]]))
    expected = save_run(models, tmp_path / "run", ".weights.h5")
    with pytest.raises(MismatchError, match=r"are numbered in another order.*--match order"):
        average(tmp_path / "run", tmp_path / "o.weights.h5")
    average(tmp_path / "run", tmp_path / "o.weights.h5", match="order")
    models[-1].load_weights(tmp_path / "o.weights.h5")
    assert_same(read_values(models[-1]), expected)


def test_layers_in_lists_and_attributes_are_compared(tmp_path: Path) -> None:
    """Lists pair by name; attributes whose names have changed places contradict themselves."""
    rows = np.zeros((1, 4), "f4")

    def build(names: str, attributes: str = "yz") -> Any:
        model = Attributes(names, attributes)
        model(rows)
        return model

    def save(models: Sequence[Any], folder: Path) -> None:
        folder.mkdir()
        for epoch, model in enumerate(models):
            for layer in (*model.blocks, model.early, model.first):
                layer.set_weights([np.full(w.shape, ord(layer.name)) for w in layer.get_weights()])
            model.save_weights(folder / f"model_{epoch}.weights.h5")

    models = [build("abc"), build("cab")]
    save(models, tmp_path / "run")
    average(tmp_path / "run", tmp_path / "o.weights.h5")
    models[-1].load_weights(tmp_path / "o.weights.h5")
    for layer in (*models[-1].blocks, models[-1].early, models[-1].first):
        assert (np.asarray(layer.get_weights()[0]) == ord(layer.name)).all()
    save([build("ab"), build("ab", "zy")], tmp_path / "moved")
    with pytest.raises(
        MismatchError, match=r"has the layer 'y' as '/early' where the other has 'z'"
    ):
        average(tmp_path / "moved", tmp_path / "o.weights.h5", force=True)


def test_named_layers_of_whole_models_pair_by_name(tmp_path: Path) -> None:
    """In .h5 too, where each tensor has its layer's name, and the newest file's order stays."""
    orders = (("left", "right", "middle"), ("middle", "left", "right"))
    models = [chain(*names) for names in orders]
    for model in models:
        model.name = "net"
    save_constants(models, tmp_path / "run", ".h5")
    average(tmp_path / "run", tmp_path / "o.h5", match="order")
    model = keras.models.load_model(tmp_path / "o.h5", compile=False)
    for layer in model.layers:
        assert (np.asarray(layer.get_weights()[0]) == VALUES[layer.name]).all()
