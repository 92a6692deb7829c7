"""Keras opens what was converted from one of its formats to another, and predicts the same."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from keras import layers

from polyak_cli import average, plan, verify
from polyak_cli.errors import MismatchError, OutputError, UsageError
from tests.keras.test_keras_zip import ROWS, deflate, nested, sequential, train
from tests.keras.test_opens import GENERATIONS, set_by_hand

# --- .keras to .weights.h5 ------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)])
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
    with pytest.raises(OutputError, match=r"or \.npz or \.h5 or \.weights\.h5 to convert it$"):
        plan(path, tmp_path / "o.bin", only_weights=True)
    average(path, tmp_path / "same.keras", only_weights=True)
    with zipfile.ZipFile(tmp_path / "same.keras") as archive:
        assert "config.json" in archive.namelist()
    assert path.read_bytes() == before


# --- .h5 to .keras --------------------------------------------------------------------------------

SEQUENCES = np.random.default_rng(1).normal(size=(6, 5, 4)).astype("float32")
IMAGES = np.random.default_rng(2).normal(size=(6, 8, 8, 3)).astype("float32")


def recurrent() -> Any:
    """Return a model of cells, wrappers, and models in models, one of them frozen."""
    inner = [keras.Input((5, 4)), layers.Dense(3), layers.BatchNormalization(), layers.GRU(2)]
    inner[-1].return_sequences = True
    deep = keras.Sequential(inner, name="deep")
    frozen = keras.Sequential(
        [keras.Input((5, 2)), layers.BatchNormalization(), layers.Dense(2)], name="frozen"
    )
    frozen.trainable = False
    steps = [
        layers.LSTM(3, return_sequences=True, dropout=0.1),
        layers.Bidirectional(layers.GRU(3, return_sequences=True)),
        layers.TimeDistributed(layers.Dense(4)),
        layers.TimeDistributed(keras.Sequential([keras.Input((4,)), layers.Dense(4)])),
        layers.BatchNormalization(),
        layers.Dropout(0.2),
        keras.Sequential([keras.Input((5, 4)), deep, layers.BatchNormalization()], name="outer"),
        frozen,
        layers.SimpleRNN(3),
        layers.Dense(3, "softmax"),
        layers.Dense(3, "softmax"),
    ]
    return keras.Sequential([keras.Input((5, 4)), *steps])


def convolutional() -> Any:
    """Return a model of every plain kind of layer, some without bias or scale."""
    steps = [
        layers.Conv2D(4, 2, use_bias=False),
        layers.BatchNormalization(scale=False),
        layers.PReLU(),
        layers.DepthwiseConv2D(2),
        layers.SeparableConv2D(3, 2),
        layers.Conv2DTranspose(4, 2),
        layers.GroupNormalization(2),
        layers.LayerNormalization(),
        layers.RMSNormalization(),
        layers.Reshape((-1, 4)),
        layers.EinsumDense("abc,cd->abd", (None, 5), bias_axes="d"),
        layers.Conv1D(3, 2),
        layers.Conv1DTranspose(3, 2),
        layers.GlobalAveragePooling1D(),
        layers.Dense(3, "softmax"),
    ]
    return keras.Sequential([keras.Input((8, 8, 3)), *steps])


def functional() -> Any:
    """Return the functional model with shared layers and a Normalization."""
    return nested()


def embedding() -> Any:
    """Return a functional model of two inputs, one of them whole numbers."""
    first, second = keras.Input((4,), name="rows"), keras.Input((4,), name="codes")
    found = layers.Embedding(9, 3)(second)
    pooled = layers.GlobalAveragePooling1D()(found)
    joined = layers.Concatenate()([layers.Dense(2)(first), pooled])
    return keras.Model([first, second], layers.Dense(3, "softmax")(joined))


def attentive() -> Any:
    """Return a functional model of attention and cells, some of it in a shared inner model."""
    entry = keras.Input((5, 4))
    heads = layers.MultiHeadAttention(2, 3)(entry, entry)
    grouped = layers.GroupQueryAttention(3, 4, 2, use_bias=False)(heads, entry)
    added = layers.AdditiveAttention()([grouped, entry])
    stack = [layers.LSTMCell(4), layers.GRUCell(3), layers.LSTMCell(4)]
    cells = layers.RNN(stack, return_sequences=True)(added)
    one = layers.RNN(layers.SimpleRNNCell(4), return_sequences=True)
    both = layers.Bidirectional(one, merge_mode="ave")(cells)
    start = keras.Input((5, 4))
    deep = layers.LayerNormalization()(layers.MultiHeadAttention(2, 2)(start, start))
    deep = layers.BatchNormalization()(layers.TimeDistributed(layers.Dense(4))(deep))
    inner = keras.Model(start, deep, name="inner")
    twice = inner(inner(both))  # shared
    frozen = layers.MultiHeadAttention(1, 2, trainable=False)(twice, twice)
    pooled = layers.GlobalAveragePooling1D()(layers.Dropout(0.1)(frozen))
    return keras.Model(entry, layers.Dense(3, "softmax")(pooled))


MODELS: dict[Callable[[], Any], Any] = {
    attentive: SEQUENCES,
    recurrent: SEQUENCES,
    convolutional: IMAGES,
    functional: ROWS,
    embedding: [ROWS, np.abs(ROWS.round())],
}


def train_h5(folder: Path, model: Any, inputs: Any) -> list[Path]:
    """Train a model, saving each epoch as .h5; return the checkpoints."""
    loss = keras.losses.SparseCategoricalCrossentropy()
    model.compile(keras.optimizers.Adam(0.003), loss, metrics=["accuracy"])
    labels = np.arange(len(inputs[0] if isinstance(inputs, list) else inputs)) % 3
    for epoch in range(2):
        model.fit(inputs, labels, verbose=0)
        model.save(folder / f"model_{epoch}.h5")
    return sorted(folder.glob("*.h5"))


def read_weights(path: Path) -> dict[str, tuple[str, bytes]]:
    """Return type and bytes of each tensor in an archive but the optimizer's, by location."""
    found: dict[str, tuple[str, bytes]] = {}

    def note(where: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and not where.startswith("optimizer"):
            found[where] = (str(item.dtype), item[()].tobytes())

    with (
        zipfile.ZipFile(path) as archive,
        archive.open("model.weights.h5") as member,
        h5py.File(member) as file,
    ):
        file.visititems(note)
    return found


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
@pytest.mark.parametrize(
    "make",
    [
        functional,
        pytest.param(attentive, marks=pytest.mark.slow),
        *(
            pytest.param(one, marks=pytest.mark.soak)
            for one in (embedding, recurrent, convolutional)
        ),
    ],
)
def test_a_whole_model_becomes_the_archive_that_keras_saves(
    tmp_path: Path, make: Callable[[], Any]
) -> None:
    """Every tensor has Keras's own place for it; predictions and training are the same."""
    inputs = MODELS[make]
    (_, path) = train_h5(tmp_path, make(), inputs)
    average(path, tmp_path / "ours.keras")
    model = keras.saving.load_model(path)
    model.save(tmp_path / "theirs.keras")
    assert read_weights(tmp_path / "ours.keras") == read_weights(tmp_path / "theirs.keras")
    opened = keras.saving.load_model(tmp_path / "ours.keras")
    np.testing.assert_array_equal(
        opened.predict(inputs, verbose=0), model.predict(inputs, verbose=0)
    )
    assert opened.optimizer.get_config() == model.optimizer.get_config()
    assert opened.loss.get_config() == model.loss.get_config()
    for ours, theirs in zip(opened.layers, model.layers, strict=True):
        assert (ours.name, ours.trainable) == (theirs.name, theirs.trainable)
    count = len(inputs[0] if isinstance(inputs, list) else inputs)
    opened.fit(inputs, np.arange(count) % 3, verbose=0)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
def test_the_average_of_whole_models_is_written_as_an_archive(tmp_path: Path) -> None:
    """Every bit is that of weights set by hand, and `verify` makes the same bytes."""
    (tmp_path / "run").mkdir()
    paths = train_h5(tmp_path / "run", recurrent(), SEQUENCES)
    output = tmp_path / "mean.keras"
    average(tmp_path / "run", output, verify=True)
    expected = set_by_hand(keras, paths, (0.5, 0.5))
    opened = keras.saving.load_model(output)
    for ours, theirs in zip(opened.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert verify(output, sources=[tmp_path / "run"]).problems == ()
    average(tmp_path / "run", tmp_path / "again.keras")
    assert output.read_bytes() == (tmp_path / "again.keras").read_bytes()
    average(output, tmp_path / "weights.weights.h5", only_weights=True)
    opened.compile(None)
    opened.load_weights(tmp_path / "weights.weights.h5")


# --- .h5 to .weights.h5 ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
@pytest.mark.parametrize(
    "make",
    [
        embedding,
        pytest.param(functional, marks=pytest.mark.slow),
        *(
            pytest.param(one, marks=pytest.mark.soak)
            for one in (attentive, recurrent, convolutional)
        ),
    ],
)
def test_the_weights_of_whole_models_are_loaded_by_keras(
    tmp_path: Path, make: Callable[[], Any]
) -> None:
    """A fresh model with the weights of an average predicts as one whose weights are set by hand.

    `verify` makes the same bytes from the whole models.
    """
    (tmp_path / "run").mkdir()
    paths = train_h5(tmp_path / "run", make(), MODELS[make])
    output = tmp_path / "mean.weights.h5"
    average(tmp_path / "run", output, only_weights=True, verify=True)
    expected = set_by_hand(keras, paths, (0.5, 0.5))
    fresh = make()
    fresh.load_weights(output)
    for ours, theirs in zip(fresh.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    rows = MODELS[make]
    np.testing.assert_array_equal(fresh.predict(rows, verbose=0), expected.predict(rows, verbose=0))
    assert verify(output, sources=[tmp_path / "run"]).problems == ()


def test_what_a_weights_file_cannot_hold_is_named(tmp_path: Path) -> None:
    """The configuration and the optimizer's state are left out on demand only."""
    (_, path) = train_h5(tmp_path, embedding(), MODELS[embedding])
    output = tmp_path / "o.weights.h5"
    with pytest.raises(OutputError, match=r"configuration .* would be lost.* --only-weights"):
        plan(path, output)
    with pytest.raises(OutputError, match=r"optimizer state .* leave it out with --optimizer drop"):
        plan(path, output, only_weights=True, optimizer="newest")
    made = plan(path, output, only_weights=True)
    assert made.dropped
    assert all("optimizer" in name for name in made.dropped)
    entry = keras.Input((4,))
    normed = layers.SpectralNormalization(layers.Dense(2), name="normed")(entry)
    keras.Model(entry, normed).save(tmp_path / "normed.h5")
    with pytest.raises(OutputError, match=r"'normed' of class SpectralNorm.* model.save_weights"):
        plan(tmp_path / "normed.h5", output, only_weights=True)


@pytest.mark.parametrize(
    "generation", sorted(one.name for one in GENERATIONS.iterdir() if one.is_dir())
)
def test_each_generation_of_keras_is_converted_or_refused(tmp_path: Path, generation: str) -> None:
    """Files of Keras 3 predict the same; those of Keras 2 are refused with the way out.

    Keras 3.0 writes the variables of inner models without the names of their layers.
    """
    path = sorted((GENERATIONS / generation).glob("*.h5"))[-1]
    with h5py.File(path) as file:
        is_whole = "model_config" in file.attrs
        version = str(file.attrs.get("keras_version", ""))
    output = tmp_path / "o.keras"
    if not is_whole or not version.startswith("3.") or version.startswith("3.0."):
        expected = (
            r"'nested' of class Sequential|was written by Keras .* save it as \.keras|weights"
        )
        with pytest.raises(OutputError, match=expected):
            plan(path, output)
        return
    average(path, output)
    model, opened = (keras.saving.load_model(one, compile=False) for one in (path, output))
    for ours, theirs in zip(opened.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    rows = np.random.default_rng(0).normal(size=(8, *model.input_shape[1:]))
    np.testing.assert_array_equal(opened.predict(rows, verbose=0), model.predict(rows, verbose=0))


def test_what_has_no_certain_place_is_refused(tmp_path: Path) -> None:
    """Layers of other kinds, of the user, and formats without a model are one line each."""
    entry = keras.Input((5, 4))
    normed = layers.SpectralNormalization(layers.Dense(2), name="normed")(entry)
    keras.Model(entry, normed).save(tmp_path / "normed.h5")
    # Keras saves the kernel inside it twice.
    with pytest.raises(OutputError, match=r"'normed' of class SpectralNorm.* or keep .h5$"):
        plan(tmp_path / "normed.h5", tmp_path / "o.keras")
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4)])
    model.layers[0].enable_lora(2)
    model.save(tmp_path / "lora.h5")
    with pytest.raises(OutputError, match=r"'dense.*' of class Dense"):
        plan(tmp_path / "lora.h5", tmp_path / "o.keras")
    np.savez(tmp_path / "m.npz", a=ROWS)
    with pytest.raises(OutputError, match=r"give the output that suffix.*, or \.safetensors to"):
        plan(tmp_path / "m.npz", tmp_path / "o.keras")
    with pytest.raises(OutputError, match=r"or \.npz or \.keras or \.weights\.h5 to convert it$"):
        plan(tmp_path / "lora.h5", tmp_path / "o.bin")


# --- .weights.h5 to .keras ------------------------------------------------------------------------


class Subclassed(keras.Model):  # type: ignore[misc] # Keras has no types
    """A model whose tensors lie under the names of its attributes."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.first = layers.Dense(5, "relu")
        self.several = [layers.BatchNormalization(), layers.Dense(4)]
        self.last = layers.Dense(3, "softmax")

    def call(self, rows: Any) -> Any:
        """Return the classes of rows."""
        found = self.first(rows)
        for layer in self.several:
            found = layer(found)
        return self.last(found)


def subclassed() -> Any:
    """Return a model of a class of the user, which was built by a call."""
    model = Subclassed()
    model(ROWS)
    return model


def train_weights(folder: Path, make: Callable[[], Any], suffix: str, **shards: Any) -> list[Path]:
    """Train a model; save it as model.keras, and the weights of each epoch in ``run``."""
    (folder / "run").mkdir()
    model, inputs = make(), MODELS.get(make, ROWS)
    model.compile(keras.optimizers.Adam(0.003), "sparse_categorical_crossentropy")
    labels = np.arange(len(inputs[0] if isinstance(inputs, list) else inputs)) % 3
    for epoch in range(2):
        model.fit(inputs, labels, verbose=0)
        model.save_weights(folder / f"run/m_{epoch}{suffix}", **shards)
    model.fit(inputs, labels, verbose=0)
    model.save(folder / "model.keras")
    return sorted((folder / "run").glob(f"*{suffix}"))


def set_weights_by_hand(model: Any, paths: list[Path]) -> None:
    """Give a model the mean of weights files, with numpy alone."""
    found = []
    for path in paths:
        model.load_weights(path)
        found.append([np.asarray(one, np.float64) for one in model.get_weights()])
    own = model.get_weights()
    mean = [sum(row) / len(row) for row in zip(*found, strict=True)]
    model.set_weights([m.astype(one.dtype) for m, one in zip(mean, own, strict=True)])


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
@pytest.mark.parametrize(
    ("make", "suffix", "shards"),
    [
        (subclassed, ".weights.h5", {}),
        pytest.param(attentive, ".weights.h5", {}, marks=pytest.mark.soak),
        pytest.param(functional, ".weights.json", {"max_shard_size": 1e-6}, marks=pytest.mark.slow),
    ],
)
def test_averages_of_weights_become_whole_models(
    tmp_path: Path, make: Callable[[], Any], suffix: str, shards: dict[str, Any]
) -> None:
    """Keras opens the output, and it predicts as the model whose weights are set by hand."""
    paths = train_weights(tmp_path, make, suffix, **shards)
    output = tmp_path / "final.keras"
    average(tmp_path / "run", output, model=tmp_path / "model.keras", verify=True)
    own = {"Subclassed": Subclassed}
    opened = keras.saving.load_model(output, custom_objects=own)
    expected = keras.saving.load_model(tmp_path / "model.keras", custom_objects=own)
    set_weights_by_hand(expected, paths)
    for ours, theirs in zip(opened.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    rows = MODELS.get(make, ROWS)
    np.testing.assert_array_equal(
        opened.predict(rows, verbose=0), expected.predict(rows, verbose=0)
    )
    assert opened.loss == "sparse_categorical_crossentropy"
    found = verify(output, sources=[tmp_path / "run"])
    assert found.problems == ()
    assert any("layers are compared with the record" in note for note in found.notes)


def test_the_record_names_the_model_and_verify_sees_another(tmp_path: Path) -> None:
    """A configuration that was changed afterwards is a problem of the metadata."""
    train_weights(tmp_path, embedding, ".weights.h5")
    output = tmp_path / "final.keras"
    average(tmp_path / "run", output, model=tmp_path / "model.keras")
    with zipfile.ZipFile(output) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with h5py.File(io.BytesIO(members["model.weights.h5"])) as file:
        record = json.loads(file.attrs["polyak_provenance"])
    assert record["model"]["name"] == "model.keras"
    changed = members["config.json"].replace(b'"softmax"', b'"sigmoid"')
    assert changed != members["config.json"]
    with zipfile.ZipFile(output, "w") as archive:
        for name, content in (members | {"config.json": changed}).items():
            archive.writestr(name, content)
    (problem, *_) = verify(output, sources=[tmp_path / "run"]).problems
    assert "configuration of the model is not the recorded one" in problem.text


def test_weights_are_added_to_their_own_model_only(tmp_path: Path) -> None:
    """Other models, other kinds of files and outputs are one line each, before any work."""
    paths = train_weights(tmp_path, embedding, ".weights.h5")
    train(tmp_path, sequential())
    output, model = tmp_path / "o.keras", tmp_path / "model.keras"
    other = next(one for one in tmp_path.glob("*.keras") if one != model)
    with pytest.raises(OutputError, match=r"without the model .* with --model"):
        plan(paths, output)
    with pytest.raises(MismatchError, match=r"is of another model than .*missing"):
        plan(paths, output, model=other)
    with pytest.raises(UsageError, match=r"there is no such file; .* a .keras of the same model"):
        plan(paths, output, model="net.py:make")
    with pytest.raises(OutputError, match=r"is Keras HDF5; expected a Keras .keras file"):
        plan(paths, output, model=paths[0])
    with pytest.raises(UsageError, match=r"or to an output in \.keras"):
        plan(paths, tmp_path / "o.weights.h5", model=model)
    with pytest.raises(OutputError, match=r"the checkpoints are Keras .keras with a model; leave"):
        plan(other, output, model=model)


# --- .keras to .h5 --------------------------------------------------------------------------------


def partly_frozen() -> Any:
    """Return a Sequential of models that are frozen as a whole, in part, and not at all."""
    start = keras.Input((4,))
    steps = layers.BatchNormalization()(layers.Dense(4, "relu", trainable=False)(start))
    steps = layers.LayerNormalization()(steps)
    part = keras.Model(start, layers.Dense(4)(steps), name="part")
    begin = keras.Input((4,))
    steps = layers.BatchNormalization()(layers.Dense(4)(begin))
    whole = keras.Model(begin, layers.Dense(4)(steps), name="whole")
    whole.trainable = False
    inside = [layers.Dense(3), layers.BatchNormalization(trainable=False), layers.Dense(4)]
    return keras.Sequential(
        [
            keras.Input((4,)),
            part,
            whole,
            keras.Sequential([keras.Input((4,)), whole_again(), *inside], name="outer"),
            layers.BatchNormalization(trainable=False),
            layers.Dense(3, "softmax"),
        ]
    )


def whole_again() -> Any:
    """Return a frozen model that becomes a layer of another."""
    start = keras.Input((4,))
    model = keras.Model(start, layers.BatchNormalization()(layers.Dense(4)(start)), name="again")
    model.trainable = False
    return model


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
@pytest.mark.parametrize(
    "make",
    [
        functional,
        partly_frozen,
        *(
            pytest.param(one, marks=pytest.mark.soak)
            for one in (embedding, attentive, recurrent, convolutional)
        ),
    ],
)
def test_archives_become_whole_models_in_hdf5(tmp_path: Path, make: Callable[[], Any]) -> None:
    """Keras opens the output: the mean that is set by hand, the predictions and the training."""
    inputs = MODELS.get(make, ROWS)
    (tmp_path / "run").mkdir()
    loss = keras.losses.SparseCategoricalCrossentropy()
    model = make()
    model.compile(keras.optimizers.Adam(0.003), loss, metrics=["accuracy"])
    labels = np.arange(len(inputs[0] if isinstance(inputs, list) else inputs)) % 3
    for epoch in range(2):
        # Frozen layers differ too, so that an exchange of two would be seen.
        model.set_weights([one + 0.01 * k for k, one in enumerate(model.get_weights())])
        model.fit(inputs, labels, verbose=0)
        model.save(tmp_path / f"run/m_{epoch}.keras")
    paths = sorted((tmp_path / "run").glob("*.keras"))
    output = tmp_path / "mean.h5"
    average(tmp_path / "run", output, verify=True)
    set_by_hand(keras, paths, (0.5, 0.5)).save(tmp_path / "expected.keras")
    # Opened again, since a Normalization uses its mean only then.
    expected = keras.saving.load_model(tmp_path / "expected.keras")
    opened = keras.saving.load_model(output)
    for ours, theirs in zip(opened.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(
        opened.predict(inputs, verbose=0), expected.predict(inputs, verbose=0)
    )
    assert opened.optimizer.get_config() == model.optimizer.get_config()
    assert opened.loss.get_config() == loss.get_config()
    opened.fit(inputs, labels, verbose=0)
    assert verify(output, sources=[tmp_path / "run"]).problems == ()
    average(output, tmp_path / "back.keras")
    average(tmp_path / "run", tmp_path / "same.keras")
    assert read_weights(tmp_path / "back.keras") == read_weights(tmp_path / "same.keras")


def test_what_an_h5_cannot_hold_is_named(tmp_path: Path) -> None:
    """Assets, layers of other kinds or of the user, shared layers, bfloat16: one line each."""
    entry = keras.Input((4,))

    def refused(output: Any, message: str, **options: Any) -> None:
        path = tmp_path / "m.keras"
        keras.Model(entry, output).save(path)
        with pytest.raises(OutputError, match=message):
            plan(path, tmp_path / "o.h5", **options)

    normed = layers.SpectralNormalization(layers.Dense(2), name="normed")(entry)
    refused(normed, r"'normed' of class SpectralNorm.* or keep \.keras$")
    shared = layers.Dense(4)
    inner = keras.Sequential([keras.Input((4,)), shared], name="inner")
    refused(inner(shared(entry)), r"'dense.*' of class Dense, for whose tensors the order")
    start = keras.Input((4, 2))
    frozen = layers.MultiHeadAttention(1, 2, trainable=False, name="heads")(start, start)
    inner = keras.Model(start, frozen)
    refused(inner(layers.RepeatVector(4)(layers.Dense(2)(entry))), r"'heads' of class MultiHead")
    normalized = keras.Sequential([keras.Input((4,)), layers.Normalization(name="norm")])
    refused(normalized(entry), r"'norm' of class Normalization")
    refused(layers.Dense(2)(entry), r"is bfloat16, .* use --dtype float32", dtype="bfloat16")
    words = keras.Input((1,), dtype="string")
    lookup = layers.StringLookup()
    lookup.adapt(["a", "b"])
    found = layers.Embedding(5, 2)(lookup(words))
    keras.Model(words, found).save(tmp_path / "words.keras")
    with pytest.raises(OutputError, match=r"'assets/.*' would be lost: an \.h5 has no place"):
        plan(tmp_path / "words.keras", tmp_path / "o.h5")
    model = subclassed()
    model.save(tmp_path / "own.keras")
    with pytest.raises(OutputError, match=r"is a Subclassed, expected a Sequential or Functional"):
        plan(tmp_path / "own.keras", tmp_path / "o.h5")
