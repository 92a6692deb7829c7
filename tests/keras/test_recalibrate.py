"""BatchNorm's statistics are recomputed as by hand, and nothing else of a model changes."""

from __future__ import annotations

import importlib.metadata
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import numpy.typing as npt
import pytest

from polyak_cli import average, plan, recalibrate, verify
from polyak_cli.errors import FormatError, MismatchError, OutputError, PolyakError, UsageError
from polyak_cli.evaluation import batchnorm, data, recalibration
from tests.command import SAMPLES, one_line, tree
from tests.keras.commands import polyak

layers = keras.layers
GENERATIONS = Path(__file__).parents[1] / "data" / "keras_generations"
RANDOM = np.random.default_rng(5)
ROWS = RANDOM.normal(2, 3, size=(101, 4)).astype(np.float32)
IMAGES = RANDOM.normal(1, 2, size=(30, 6, 6, 1)).astype(np.float32)
LABELS = np.arange(101) % 3
STATISTICS = re.compile(r".*/moving_(mean|variance)(:0)?$")
EPSILON = 1e-3  # BatchNorm's

Values = npt.NDArray[np.float64]


def split(features: Any = ROWS, source: str = "folder/rows.npz (train)") -> data.Split:
    """Return rows in the form that `data` returns."""
    count = len(data.list_arrays(features)[0])
    return data.Split(source, features, LABELS[:count])


def dense() -> Any:
    """Return a model with two BatchNorms, noise, and other layers with similar names."""
    normal = layers.Normalization(name="normalization")
    normal.adapt(ROWS)
    return keras.Sequential(
        [
            keras.Input((4,)),
            normal,
            layers.Dense(8, activation="relu", name="first"),
            layers.BatchNormalization(name="one"),
            layers.Dropout(0.5),
            layers.GaussianNoise(1.0),
            layers.LayerNormalization(name="layer"),
            layers.GroupNormalization(2, name="group"),
            layers.Dense(5, name="second"),
            layers.BatchNormalization(name="two"),
            layers.Dense(3, activation="softmax"),
        ]
    )


def convolutional() -> Any:
    """Return a functional model with a BatchNorm inside a nested one."""
    entry = keras.Input((6, 6, 1))
    inside = [keras.Input((4, 4, 4)), layers.Conv2D(3, 3), layers.BatchNormalization(name="inner")]
    nested = keras.Sequential(inside, name="nested")
    found = layers.BatchNormalization(name="outer")(layers.Conv2D(4, 3, name="conv")(entry))
    pooled = layers.GlobalAveragePooling2D()(nested(layers.ReLU()(found)))
    return keras.Model(entry, layers.Dense(3, activation="softmax")(pooled))


def saved(model: Any, path: Path, features: Any = ROWS) -> Path:
    """Train a model a little, and save it with its optimizer."""
    keras.utils.set_random_seed(3)
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(features, LABELS[: len(features)], epochs=2, verbose=0)
    model.save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with trained models."""
    made = tmp_path_factory.mktemp("models")
    model = dense()
    saved(model, made / "dense.h5")
    model.save(made / "dense.keras")
    model = convolutional()
    saved(model, made / "conv.h5", IMAGES)
    model.save(made / "conv.keras")
    return made


def tensors(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Return every tensor of a file, read with plain h5py."""
    found: dict[str, npt.NDArray[Any]] = {}

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = item[()]

    with _hdf5(path) as file:
        file.visititems(note)
    return found


def attributes(path: Path) -> dict[str, bytes]:
    """Return every attribute of a file except the record."""
    found: dict[str, bytes] = {}

    def note(name: str, item: Any) -> None:
        for key, value in item.attrs.items():
            found[f"{name}@{key}"] = np.asarray(value).astype("S").tobytes()

    with _hdf5(path) as file:
        note("", file)
        file.visititems(note)
    found.pop("@polyak_provenance", None)
    return found


def _hdf5(path: Path) -> Any:
    if path.suffix != ".keras":
        return h5py.File(path)
    with zipfile.ZipFile(path) as archive:
        return h5py.File(io.BytesIO(archive.read("model.weights.h5")))


def record(path: Path) -> dict[str, Any]:
    """Return the record in an output."""
    with _hdf5(path) as file:
        found: dict[str, Any] = json.loads(file.attrs["polyak_provenance"])
    return found


def statistics(path: Path) -> dict[str, Values]:
    """Return the moving statistics by layer and name, as Keras loads them."""
    model = keras.saving.load_model(path, compile=False)
    return {
        f"{layer.name}/{name}": np.asarray(getattr(layer, name), np.float64)
        for layer in model._flatten_layers()
        if isinstance(layer, layers.BatchNormalization)
        for name in ("moving_mean", "moving_variance")
    }


def batches(features: npt.NDArray[Any], size: int) -> Iterator[npt.NDArray[Any]]:
    """Yield the promised batches: one fixed shuffle, and sizes that differ by one at most."""
    order = np.random.RandomState(0).permutation(len(features))
    for batch in np.array_split(order, -(-len(features) // size)):
        yield features[batch]


def by_hand(path: Path, size: int) -> dict[str, Values]:
    """Return the statistics of the dense model, computed with numpy in float64."""
    model = keras.saving.load_model(path, compile=False)
    own = {layer.name: [np.asarray(w, np.float64) for w in layer.weights] for layer in model.layers}
    sums: dict[str, Values] = {}

    def normalised(name: str, x: Values) -> Values:
        mean, variance = x.mean(0), x.var(0)
        for key, value in ((f"{name}/moving_mean", mean), (f"{name}/moving_variance", variance)):
            sums[key] = sums.get(key, np.zeros(1)) + len(x) * value
        gamma, beta = own[name][:2]
        return np.asarray(gamma * (x - mean) / np.sqrt(variance + EPSILON) + beta)

    for batch in batches(ROWS.astype(np.float64), size):
        mean, variance = own["normalization"][:2]
        x = np.maximum((batch - mean) / np.sqrt(variance) @ own["first"][0] + own["first"][1], 0)
        x = normalised("one", x)
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPSILON)
        x = own["layer"][0] * x + own["layer"][1]
        x = x.reshape(len(x), 2, 4)
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPSILON)
        x = own["group"][0] * x.reshape(len(x), 8) + own["group"][1]
        normalised("two", x @ own["second"][0] + own["second"][1])
    return {key: total / len(ROWS) for key, total in sums.items()}


def refusal(error: type[PolyakError], *arguments: Any, **options: Any) -> str:
    """Return the one line with which a model is refused."""
    with pytest.raises(error) as caught:
        recalibrate(*arguments, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# --- the numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, 25, 1000])
def test_the_statistics_are_those_computed_by_hand(folder: Path, tmp_path: Path, size: int) -> None:
    """They are the mean of the moments of batches, weighted by their rows."""
    report = recalibrate(folder / "dense.h5", tmp_path / "o.h5", split(), batch_size=size)
    expected, found = by_hand(folder / "dense.h5", size), statistics(tmp_path / "o.h5")
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=2e-5, atol=1e-6, err_msg=name)
    assert (report.layers, report.rows, report.batches) == (2, 101, -(-101 // size))
    assert report.seconds > 0


def test_equal_batches_give_what_momentum_k_over_k_plus_1_gives(
    folder: Path, tmp_path: Path
) -> None:
    """The update of Keras with a cumulative momentum gives the same statistics."""
    rows = ROWS[:100]
    recalibrate(folder / "dense.h5", tmp_path / "o.h5", split(rows), batch_size=20)
    model = keras.saving.load_model(folder / "dense.h5", compile=False)
    noise = (layers.Dropout, layers.GaussianNoise)
    quiet = [layer for layer in model.layers if not isinstance(layer, noise)]
    model = keras.Sequential([keras.Input((4,)), *quiet])
    for k, batch in enumerate(batches(rows, 20)):
        for name in ("one", "two"):
            model.get_layer(name).momentum = k / (k + 1)
        model(batch, training=True)
    found = statistics(tmp_path / "o.h5")
    for name in ("one", "two"):
        for key in ("moving_mean", "moving_variance"):
            expected = np.asarray(getattr(model.get_layer(name), key))
            np.testing.assert_allclose(found[f"{name}/{key}"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("end", ["h5", "keras"])
def test_a_convolution_is_normalised_over_rows_and_places(
    folder: Path, tmp_path: Path, end: str
) -> None:
    """They are moments over all axes except the channels, also inside a nested model."""
    recalibrate(folder / f"conv.{end}", tmp_path / f"o.{end}", split(IMAGES))
    model = keras.saving.load_model(folder / f"conv.{end}", compile=False)
    outer, nested = model.get_layer("outer"), model.get_layer("nested")
    x = np.asarray(model.get_layer("conv")(IMAGES), np.float64)
    found = statistics(tmp_path / f"o.{end}")
    np.testing.assert_allclose(found["outer/moving_mean"], x.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(found["outer/moving_variance"], x.var((0, 1, 2)), rtol=1e-5)
    x = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + EPSILON)
    x = np.maximum(x * np.asarray(outer.gamma) + np.asarray(outer.beta), 0)
    x = np.asarray(nested.layers[0](x.astype(np.float32)), np.float64)
    np.testing.assert_allclose(found["inner/moving_mean"], x.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(found["inner/moving_variance"], x.var((0, 1, 2)), rtol=1e-4)


def test_a_layer_that_is_called_twice_counts_every_call(tmp_path: Path) -> None:
    """Its statistics are those of both inputs."""
    entry = keras.Input((4,))
    shared = layers.BatchNormalization(name="shared")
    both = layers.Add()([shared(entry), shared(layers.Rescaling(3.0, 1.0)(entry))])
    keras.Model(entry, both).save(tmp_path / "m.h5")
    recalibrate(tmp_path / "m.h5", tmp_path / "o.h5", split())
    x = ROWS.astype(np.float64)
    found = statistics(tmp_path / "o.h5")
    mean, variance = x.mean(0), x.var(0)
    np.testing.assert_allclose(found["shared/moving_mean"], (4 * mean + 1) / 2, rtol=1e-5)
    np.testing.assert_allclose(found["shared/moving_variance"], 5 * variance, rtol=1e-5)


def test_what_the_statistics_were_before_does_not_count(folder: Path, tmp_path: Path) -> None:
    """Not even NaN in them matters: two models that differ only in them give the same bytes."""
    model = keras.saving.load_model(folder / "dense.h5")
    for name in ("one", "two"):
        model.get_layer(name).moving_mean.assign(np.full(model.get_layer(name).beta.shape, np.nan))
        model.get_layer(name).moving_variance.assign(model.get_layer(name).moving_variance * 9)
    model.save(tmp_path / "m.h5")
    recalibrate(tmp_path / "m.h5", tmp_path / "o.h5", split())
    recalibrate(folder / "dense.h5", tmp_path / "expected.h5", split())
    found, expected = tensors(tmp_path / "o.h5"), tensors(tmp_path / "expected.h5")
    names = [name for name in expected if STATISTICS.match(name)]
    assert len(names) == 4
    assert all(np.array_equal(found[name], expected[name]) for name in names)


def test_several_inputs_come_by_name_or_by_position(tmp_path: Path) -> None:
    """As a dict or as a tuple, the same rows give the same bytes."""
    entries = [keras.Input((4,), name="a"), keras.Input((4,), name="b")]
    keras.Model(entries, layers.BatchNormalization()(layers.Subtract()(entries))).save(
        tmp_path / "m.h5"
    )
    for name, rows in (("dict", {"b": ROWS + 1, "a": ROWS}), ("tuple", (ROWS, ROWS + 1))):
        recalibrate(tmp_path / "m.h5", tmp_path / f"{name}.h5", split(rows))
    assert next(iter(statistics(tmp_path / "dict.h5").values())) == pytest.approx(-1)
    found = (tensors(tmp_path / f"{name}.h5") for name in ("dict", "tuple"))
    assert len({b"".join(v.tobytes() for v in each.values()) for each in found}) == 1


# --- everything else stays ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense.h5", "dense.keras", "conv.h5", "conv.keras"])
def test_only_the_statistics_change(folder: Path, tmp_path: Path, name: str) -> None:
    """Every other tensor, the state of the optimizer and all attributes stay bit for bit."""
    path, output = folder / name, tmp_path / name
    report = recalibrate(path, output, split(ROWS if "dense" in name else IMAGES))
    before, after = tensors(path), tensors(output)
    assert list(before) == list(after)
    changed = {n for n in before if before[n].tobytes() != after[n].tobytes()}
    assert len(changed) == len(report.statistics) == 4
    for tensor in changed:
        assert tensor.removeprefix("model_weights/") in report.statistics
        assert name.endswith(".keras") or STATISTICS.match(tensor)
    assert all(before[n].dtype == after[n].dtype for n in before)
    assert any("optimizer" in n for n in before)
    assert attributes(path) == attributes(output)
    if name.endswith(".keras"):
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(output) as new:
            assert old.read("config.json") == new.read("config.json")


@pytest.mark.parametrize("name", ["dense.h5", "dense.keras"])
def test_the_same_command_gives_the_same_bytes(folder: Path, tmp_path: Path, name: str) -> None:
    """The bytes repeat, also when the output is recalibrated again."""
    for number, source in enumerate([folder / name, folder / name, tmp_path / f"0_{name}"]):
        recalibrate(source, tmp_path / f"{number}_{name}", split(), batch_size=30)
    first, second, third = ((tmp_path / f"{k}_{name}").read_bytes() for k in range(3))
    assert first == second
    assert first == third


@pytest.mark.parametrize("generation", ["keras-3.0.5", "keras-3.3.3", "keras-3.15.1"])
def test_files_of_every_keras_3_are_recalibrated(tmp_path: Path, generation: str) -> None:
    """Their tensors are named in three ways; four are statistics, some in a nested model."""
    path = GENERATIONS / generation / "model_3.h5"
    model = keras.saving.load_model(path, compile=False)
    rows = RANDOM.normal(size=(40, *model.inputs[0].shape[1:])).astype(np.float32)
    check_only_statistics(path, tmp_path / "o.h5", rows, 4)


def test_files_of_keras_2_are_recalibrated(tmp_path: Path) -> None:
    """These are the files that Keras 3 opens, in which names end with :0."""
    old = pytest.importorskip("tf_keras")
    own = [old.layers.Dense(5, input_shape=(4,)), old.layers.BatchNormalization()]
    old.Sequential([*own, old.layers.Dense(3)]).save(tmp_path / "m.h5")
    check_only_statistics(tmp_path / "m.h5", tmp_path / "o.h5", ROWS, 2)


def check_only_statistics(path: Path, output: Path, rows: npt.NDArray[Any], count: int) -> None:
    """Check that this number of statistics changes, and nothing else."""
    report = recalibrate(path, output, split(rows))
    before, after = tensors(path), tensors(output)
    changed = {n for n in before if before[n].tobytes() != after[n].tobytes()}
    assert len(changed) == len(report.statistics) == count
    assert all(STATISTICS.match(name) for name in changed)
    assert list(before) == list(after)
    assert attributes(path) == attributes(output)


def frozen(tmp_path: Path, first: Callable[[Any, Any], Any]) -> Path:
    """Save a model whose first BatchNorm is made or called in a special way."""
    entry = keras.Input((4,))
    x = first(layers.BatchNormalization(name="one"), layers.Rescaling(2.0)(entry))
    x = layers.BatchNormalization(name="two")(x)
    keras.Model(entry, x).save(tmp_path / "m.h5")
    return tmp_path / "m.h5"


def not_trainable(layer: Any, x: Any) -> Any:
    """Freeze a layer by its attribute."""
    layer.trainable = False
    return layer(x)


@keras.saving.register_keras_serializable("recalibrate")
class Inferring(keras.Layer):  # type: ignore[misc]  # keras ships no types
    """Calls a BatchNorm as Keras's guide to transfer learning calls a base model."""

    def __init__(self, name: str = "inferring") -> None:
        super().__init__(name=name)
        self.inner = layers.BatchNormalization(name="one")

    def build(self, shape: Any) -> None:
        """Build its variables before they are loaded."""
        self.inner.build(shape)

    def call(self, x: Any) -> Any:
        """Run in inference mode, also in training."""
        return self.inner(x, training=False)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments for another one."""
        return {"name": self.name}


def inferring(layer: Any, x: Any) -> Any:
    """Make the layer run in inference mode, also in training."""
    del layer
    return Inferring()(x)


@pytest.mark.parametrize("freeze", [not_trainable, inferring])
def test_frozen_layers_are_left_alone(tmp_path: Path, freeze: Callable[[Any, Any], Any]) -> None:
    """They normalise by their statistics in training, too; a note names them."""
    report = recalibrate(frozen(tmp_path, freeze), tmp_path / "o.h5", split())
    found = statistics(tmp_path / "o.h5")
    assert (found["one/moving_mean"] == 0).all()
    assert (found["one/moving_variance"] == 1).all()
    expected = 2 * ROWS.astype(np.float64).mean(0) / np.sqrt(1 + EPSILON)
    np.testing.assert_allclose(found["two/moving_mean"], expected, rtol=1e-5)
    (note,) = report.notes
    assert note.startswith("1 BatchNorm layers are frozen")
    assert note.endswith("stay (one)")
    assert report.layers == 1


def test_layers_that_change_in_training_infer(tmp_path: Path) -> None:
    """The probe for layers that train changes nothing: the vector of a spectral norm stays."""
    entry = keras.Input((4,))
    spectral = layers.SpectralNormalization(layers.Dense(4, use_bias=False))
    keras.Model(entry, layers.BatchNormalization(name="bn")(spectral(entry))).save(
        tmp_path / "m.h5"
    )
    recalibrate(tmp_path / "m.h5", tmp_path / "o.h5", split())
    model = keras.saving.load_model(tmp_path / "m.h5", compile=False)
    x = np.asarray(model.layers[1](ROWS, training=False), np.float64)
    found = statistics(tmp_path / "o.h5")
    np.testing.assert_allclose(found["bn/moving_mean"], x.mean(0), rtol=1e-5, atol=1e-6)


# --- the record -----------------------------------------------------------------------------------


def test_the_record_of_an_average_is_kept_and_extended(folder: Path, tmp_path: Path) -> None:
    """It has the checkpoints, and now the pass; the data are named without their folder."""
    average([folder / "dense.h5", folder / "dense.h5"][:1], tmp_path / "average.h5", scheme="exp")
    recalibrate(tmp_path / "average.h5", tmp_path / "o.h5", split(), batch_size=50)
    before, after = record(tmp_path / "average.h5"), record(tmp_path / "o.h5")
    over = after.pop("recalibrated")
    assert after.pop("sha256") != before.pop("sha256")
    assert after == before
    assert verify(tmp_path / "o.h5", sources=[folder]).problems == ()
    assert len(over.pop("sha256")) == 64
    assert sorted({len(digest) for digest in over.pop("statistics").values()}) == [64]
    assert over == {
        "polyak": before["polyak"],
        "data": "rows.npz (train)",
        "rows": 101,
        "batch_size": 50,
        "batches": 3,
        "layers": 2,
    }
    recalibrate(tmp_path / "o.h5", tmp_path / "twice.h5", split(ROWS[:60]))
    assert record(tmp_path / "twice.h5")["recalibrated"]["rows"] == 60
    assert verify(tmp_path / "twice.h5", sources=[folder]).problems == ()
    assert record(tmp_path / "twice.h5")["inputs"] == before["inputs"]


def test_a_model_without_a_record_gets_one(folder: Path, tmp_path: Path) -> None:
    """It gets a record of version and pass alone; another text in its place is refused."""
    recalibrate(folder / "dense.keras", tmp_path / "o.keras", split())
    assert set(record(tmp_path / "o.keras")) == {"polyak", "recalibrated", "sha256"}
    path = tmp_path / "m.h5"
    path.write_bytes((folder / "dense.h5").read_bytes())
    with h5py.File(path, "r+") as file:
        file.attrs["polyak_provenance"] = "mine"
    line = refusal(FormatError, path, tmp_path / "o.h5", split())
    assert "polyak_provenance is not a record" in line


def test_half_precision_is_rounded_once(folder: Path, tmp_path: Path) -> None:
    """An average that is stored as float16 keeps its type; its statistics are the nearest ones."""
    average([folder / "dense.h5"], tmp_path / "half.h5", dtype="float16")
    recalibrate(tmp_path / "half.h5", tmp_path / "o.h5", split())
    found = {n: v for n, v in tensors(tmp_path / "o.h5").items() if STATISTICS.match(n)}
    expected = by_hand(tmp_path / "half.h5", 256)
    for name, values in found.items():
        assert values.dtype == np.float16
        wanted = expected["/".join(name.split("/")[-2:])]
        np.testing.assert_allclose(values, wanted.astype(np.float16), rtol=1e-3, atol=1e-6)


# --- refusals -------------------------------------------------------------------------------------


def test_what_cannot_be_recalibrated_is_refused(folder: Path, tmp_path: Path) -> None:
    """No or only frozen BatchNorm, bare weights, other formats or shapes give one line each."""
    output = tmp_path / "o.h5"
    blobs = data.load("blobs").split("train")
    line = refusal(MismatchError, SAMPLES / "model_499.h5", output, blobs)
    assert line == f"{SAMPLES / 'model_499.h5'}: has no BatchNorm layer; nothing to recalibrate"
    model = keras.saving.load_model(folder / "dense.h5", compile=False)
    model.trainable = False
    model.save(tmp_path / "frozen.h5")
    line = refusal(MismatchError, tmp_path / "frozen.h5", output, split())
    assert "every BatchNorm layer is frozen" in line
    model.save_weights(tmp_path / "m.weights.h5")
    line = refusal(FormatError, tmp_path / "m.weights.h5", tmp_path / "o.weights.h5", split())
    assert "holds weights only, no architecture" in line
    np.savez(tmp_path / "m.npz", a=ROWS)
    line = refusal(FormatError, tmp_path / "m.npz", tmp_path / "o.npz", split())
    assert "is numpy .npz, which holds tensors without a model" in line
    line = refusal(MismatchError, folder / "dense.h5", output, split(IMAGES))
    assert "takes rows of shape (4,), but" in line
    line = refusal(OutputError, folder / "dense.h5", tmp_path / "o.safetensors", split())
    assert "would not be a " in line
    line = refusal(UsageError, folder / "dense.h5", output, split(), batch_size=1)
    assert line.startswith("--batch-size 1 is out of range")
    line = refusal(MismatchError, folder / "dense.h5", output, split(ROWS[:1]))
    assert "is a single row" in line
    assert not output.exists()


def test_on_failure_an_older_output_stays(folder: Path, tmp_path: Path) -> None:
    """After any failure the old file is complete, and no hidden file is left."""
    output = tmp_path / "o.h5"
    output.write_bytes(b"old")
    old = tree(tmp_path)
    line = refusal(OutputError, folder / "dense.h5", output, split())
    assert line == f"{output}: already exists; use --force to replace it"
    infinite = ROWS.copy()
    infinite[7, 2] = np.inf
    line = refusal(MismatchError, folder / "dense.h5", output, split(infinite), force=True)
    assert "the new values of 'one/" in line
    assert "expected finite numbers of type float32" in line
    line = refusal(MismatchError, folder / "dense.h5", output, split(IMAGES), force=True)
    assert tree(tmp_path) == old
    line = refusal(OutputError, folder / "dense.h5", folder / "dense.h5", split(), force=True)
    assert "itself; name another output" in line
    recalibrate(folder / "dense.h5", output, split(), force=True)
    assert len(statistics(output)) == 4


def test_the_installed_keras_is_one_whose_archives_can_be_traced() -> None:
    """The walk over a model uses private names of Keras: a newer Keras must be tried first."""
    version = tuple(map(int, importlib.metadata.version("keras").split(".")[:2]))
    assert version <= batchnorm.LATEST_TRACED


@pytest.mark.parametrize("change", ["removed", "other parameters"])
def test_a_keras_that_saves_in_another_way_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """If Keras changes its private names, the message says which Keras works; .h5 works still."""
    from keras.src.saving import saving_lib

    if change == "removed":
        monkeypatch.delattr(saving_lib, "_save_state")
    else:
        monkeypatch.setattr(saving_lib, "_save_state", lambda _model: None)
    line = refusal(PolyakError, folder / "dense.keras", tmp_path / "o.keras", split())
    assert "saves models in another way; save the model as .h5, or install Keras 3.15" in line
    recalibrate(folder / "dense.h5", tmp_path / "o.h5", split())


def test_statistics_that_are_not_the_files_are_never_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If Keras loads other values than those in the file, nothing is written."""
    own = batchnorm.locate_variables

    def crossed(model: Any, table: Any) -> dict[int, list[str]]:
        stored = own(model, table)
        one = model.get_layer("one")
        mean, variance = id(one.moving_mean), id(one.moving_variance)
        return stored | {mean: stored[variance], variance: stored[mean]}

    monkeypatch.setattr(batchnorm, "locate_variables", crossed)
    line = refusal(MismatchError, folder / "dense.h5", tmp_path / "o.h5", split())
    assert "is not what was loaded for it" in line
    monkeypatch.setattr(batchnorm, "locate_variables", lambda *_: {})
    line = refusal(MismatchError, folder / "dense.h5", tmp_path / "o.h5", split())
    assert (
        "the statistics of layer 'one' are not in the place where this version of Keras keeps them"
        in line
    )
    assert tree(tmp_path) == {}


def test_code_is_not_run_unless_it_is_trusted(tmp_path: Path) -> None:
    """A Lambda layer is refused by default, as in evaluate."""
    keras.Sequential(
        [keras.Input((4,)), layers.Lambda(lambda x: 2 * x), layers.BatchNormalization(name="bn")],
        name="sequential",
    ).save(tmp_path / "m.h5")
    line = refusal(PolyakError, tmp_path / "m.h5", tmp_path / "o.h5", split())
    assert "use --trust-code" in line
    recalibrate(tmp_path / "m.h5", tmp_path / "o.h5", split(), trust_code=True)
    mean = tensors(tmp_path / "o.h5")["model_weights/bn/sequential/bn/moving_mean"]
    np.testing.assert_allclose(mean, 2 * ROWS.astype(np.float64).mean(0), rtol=1e-5)


# --- in the average -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return two folders with checkpoints of one run each."""
    made = tmp_path_factory.mktemp("run")
    model = keras.saving.load_model(folder / "dense.keras", compile=False)
    model.compile("sgd", "sparse_categorical_crossentropy")
    for end in ("h5", "keras"):
        (made / end).mkdir()
    for epoch in range(3):
        model.fit(ROWS, LABELS, verbose=0)
        for end in ("h5", "keras"):
            model.save(made / end / f"model_{epoch}.{end}")
    return made


@pytest.mark.parametrize("end", ["h5", "keras"])
def test_averaging_can_recalibrate_in_one_go(run_folder: Path, tmp_path: Path, end: str) -> None:
    """The file equals that of average and then recalibrate; the report has both."""
    one, average_alone, two = (tmp_path / f"{name}.{end}" for name in ("one", "average", "two"))
    report = average(run_folder / end, one, scheme="linear", recalibrate=split(), batch_size=40)
    average(run_folder / end, average_alone, scheme="linear")
    expected = recalibrate(average_alone, two, split(), batch_size=40)
    assert one.read_bytes() == two.read_bytes()
    assert set(record(one)) == {*record(average_alone), "recalibrated"}
    assert report.recalibrated
    assert report.recalibrated.statistics == expected.statistics
    assert report.bytes_written == one.stat().st_size
    assert report.data()["recalibrated"]["batches"] == 3
    assert not [note for note in report.notes if "moving statistics are averaged" in note]
    assert set(tree(tmp_path)) == {f"{name}.{end}" for name in ("one", "average", "two")}


def test_what_averaging_promises_holds_with_recalibration(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before a tensor is read if possible; on failure the old output is unchanged."""
    output = tmp_path / "o.h5"
    output.write_bytes(b"old")
    old = tree(tmp_path)
    infinite = ROWS.copy()
    infinite[0] = np.nan
    for error, rows, more, text in (
        (MismatchError, split(IMAGES), {}, f"{output}: takes rows of shape"),
        (MismatchError, split(infinite), {}, f"{output}: the new values of"),
        (MismatchError, split(ROWS[:1]), {}, "is a single row"),
        (UsageError, split(), {"batch_size": 0}, "--batch-size 0 is out of range"),
        (UsageError, None, {"batch_size": 9}, "--batch-size belongs to --recalibrate"),
        (UsageError, None, {"trust_code": True}, "--trust-code belongs to --recalibrate"),
    ):
        with pytest.raises(error) as caught:
            average(run_folder / "h5", output, recalibrate=rows, force=True, **more)
        assert text in str(caught.value)
        assert tree(tmp_path) == old
    with pytest.raises(FormatError, match="which holds tensors without a model"):
        plan(write_npz(tmp_path / "m.npz"), recalibrate=split())
    with pytest.raises(MismatchError, match="has no BatchNorm layer"):
        average(SAMPLES, output, recalibrate=data.load("blobs").split("train"), force=True)
    (tmp_path / "m.npz").unlink()
    monkeypatch.setattr(recalibration, "gather_moments", interrupted)
    with pytest.raises(KeyboardInterrupt):
        average(run_folder / "h5", output, recalibrate=split(), force=True)
    assert tree(tmp_path) == old


def write_npz(path: Path) -> Path:
    """Write tensors that are not a model."""
    np.savez(path, a=ROWS)
    return path


def interrupted(*_: Any, **__: Any) -> Any:
    """Raise what Ctrl-C raises."""
    raise KeyboardInterrupt


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_recalibrates_on_the_training_rows(folder: Path, tmp_path: Path) -> None:
    """Report, JSON and inspect name rows and layers; the output equals that of the function."""
    np.savez(tmp_path / "d.npz", x_train=ROWS, y_train=LABELS, x_test=ROWS[:9], y_test=LABELS[:9])
    (tmp_path / "m.h5").write_bytes((folder / "dense.h5").read_bytes())
    command = ("recalibrate", "m.h5", "--data", "d.npz", "-o", "o.h5")
    done = polyak(*command, "--batch-size", 40, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    first, last = done.stdout.splitlines()
    assert first.startswith("recomputed 4 statistics of 2 BatchNorm layers: 101 rows of d.npz")
    assert last == "wrote o.h5"
    rows = split(source="d.npz (train)")
    recalibrate(tmp_path / "m.h5", tmp_path / "expected.h5", rows, batch_size=40)
    assert (tmp_path / "o.h5").read_bytes() == (tmp_path / "expected.h5").read_bytes()
    done = polyak(*command, "--split", "test", "--force", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["rows"] == 9
    assert json.loads(done.stdout)["data"] == "d.npz (test)"
    done = polyak("inspect", "o.h5", cwd=tmp_path)
    assert done.stdout.splitlines()[-1].endswith("on 9 rows of d.npz (test)")


@pytest.mark.slow
def test_the_command_fails_in_one_line(tmp_path: Path) -> None:
    """Exit 3 and nothing is written if there is nothing to recalibrate."""
    model = SAMPLES / "model_499.h5"
    done = polyak("recalibrate", model, "--data", "blobs", "-o", "o.h5", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert one_line(done.stderr).endswith("has no BatchNorm layer; nothing to recalibrate")
    assert tree(tmp_path) == {}


@pytest.mark.slow
def test_the_command_averages_and_recalibrates(run_folder: Path, tmp_path: Path) -> None:
    """The plan names it, a dry run writes nothing, report and JSON say what was done."""
    np.savez(tmp_path / "d.npz", x=ROWS, y=LABELS)
    command = ("average", run_folder / "h5", "--recalibrate", "d.npz", "--batch-size", 50)
    done = polyak(*command, "--dry-run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    planned = "then BatchNorm's statistics are recomputed: 101 rows of d.npz, batches of at"
    assert f"{planned} most 50" in done.stdout
    assert set(tree(tmp_path)) == {"d.npz"}
    done = polyak(*command, "-o", "o.h5", "--json", cwd=tmp_path)
    assert done.returncode == 0
    found = json.loads(done.stdout)
    assert found["recalibrate"] == {"data": "d.npz", "rows": 101, "batch_size": 50}
    assert found["recalibrated"]["layers"] == 2
    done = polyak(*command, "-o", "o.h5", "--force", cwd=tmp_path)
    assert "recomputed 4 statistics of 2 BatchNorm layers" in done.stdout
    assert set(tree(tmp_path)) == {"d.npz", "o.h5"}
    done = polyak("average", run_folder / "h5", "--split", "test", "-o", "p.h5", cwd=tmp_path)
    assert done.returncode == 2
    assert one_line(done.stderr) == "--split belongs to --recalibrate, which is missing"
