from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak_cli.errors import FormatError, MismatchError, MissingExtraError, PolyakError, UsageError
from polyak_cli.evaluation import data, evaluator, keras_files, keras_models

HERE = Path(__file__).parent
SAMPLES = HERE.parents[1] / "sample_checkpoints"
SAMPLE = SAMPLES / "model_499.h5"
GENERATIONS = HERE.parent / "data" / "keras_generations"
RANDOM = np.random.default_rng(7)
ROWS = RANDOM.normal(size=(50, 4)).astype(np.float32)
CLASSES = RANDOM.integers(0, 3, 50)
ONE_HOT = np.eye(3)[CLASSES]


def split(features: Any = ROWS, labels: Any = CLASSES) -> data.Split:
    """Return rows in the form that `data` returns."""
    return data.Split("rows.npz", features, labels)


def score(path: Path, rows: data.Split | None = None, **options: Any) -> evaluator.Score:
    """Return the score of one file."""
    (found,) = evaluator.evaluate([path], rows or split(), **options)
    return found


def refusal(path: Path, rows: data.Split | None = None, **options: Any) -> str:
    """Return the one line with which a file is refused, and check that it names the file."""
    with pytest.raises(PolyakError) as error:
        score(path, rows, **options)
    text = str(error.value)
    assert len(text.splitlines()) == 1
    assert text.startswith(str(path))
    return text


def network(width: int = 3, activation: str = "softmax", inputs: int = 4) -> Any:
    """Return a model of four inputs, not compiled."""
    import keras

    return keras.Sequential(
        [
            keras.Input((inputs,)),
            keras.layers.Dense(5, activation="relu"),
            keras.layers.Dense(width, activation=activation),
        ]
    )


def predicted(model: Any) -> npt.NDArray[np.float64]:
    """Return the predictions of a Sequential model of Dense layers, by numpy in float64."""
    kernel, bias, last_kernel, last_bias = (w.astype(np.float64) for w in model.get_weights())
    hidden = np.maximum(ROWS @ kernel + bias, 0)
    return np.asarray(hidden @ last_kernel + last_bias)


def edited(path: Path, **attributes: Any) -> Path:
    """Replace attributes of the root of a file; None removes one."""
    with h5py.File(path, "r+") as file:
        for name, value in attributes.items():
            del file.attrs[name]
            if value is not None:
                file.attrs[name] = value
    return path


# --- the numbers ----------------------------------------------------------------------------------


def test_the_numbers_are_those_of_keras() -> None:
    """Loss and accuracy equal those of Keras's own load, compile and evaluate."""
    import keras

    rows = data.load("blobs").split("test")
    model = keras.saving.load_model(SAMPLE, compile=False)
    model.compile(loss="categorical_crossentropy", metrics=["accuracy"])
    expected = model.evaluate(rows.features, np.eye(3)[np.asarray(rows.labels)], 256, 0)
    found = score(SAMPLE, rows)
    assert found.loss == pytest.approx(expected[0], rel=1e-7)
    assert found.metrics == {"accuracy": pytest.approx(expected[1], rel=1e-7)}
    assert (found.path, found.rows, found.notes) == (SAMPLE, 1000, ())


def test_the_accuracy_is_the_share_that_is_right() -> None:
    """It equals the count of numpy, and is the decimal number that people expect."""
    rows = data.load("blobs").split("test")
    with h5py.File(SAMPLE) as file:
        weights = [
            file[f"model_weights/{layer}/sequential/{layer}/{name}"][()].astype(np.float64)
            for layer in ("dense", "dense_1")
            for name in ("kernel", "bias")
        ]
    hidden = np.maximum(rows.features @ weights[0] + weights[1], 0)
    right = (hidden @ weights[2] + weights[3]).argmax(1) == rows.labels
    assert score(SAMPLE, rows).metrics["accuracy"] == right.mean()


def test_the_batch_size_changes_rounding_only() -> None:
    """One row at a time or all at once, the score is the same to float32."""
    rows = data.load("blobs").split("train")
    one, all_at_once = score(SAMPLE, rows, batch_size=1), score(SAMPLE, rows, batch_size=1000)
    assert one.loss == pytest.approx(all_at_once.loss, rel=1e-5)
    assert one.metrics == all_at_once.metrics
    with pytest.raises(UsageError, match="--batch-size 0 is out of range"):
        score(SAMPLE, rows, batch_size=0)


@pytest.mark.parametrize("dtype", ["f2", "f8", "i4", "?"])
def test_rows_of_any_type_are_scored_as_keras_scores_arrays(dtype: str, tmp_path: Path) -> None:
    """Floats of another width, integers and truth values, in batches of which the last is short."""
    model = network(width=1, activation="linear")
    path = saved(model, tmp_path / "m.keras", "mse", ["mae"])
    rows, targets = (2 * ROWS).astype(dtype), ROWS.sum(1).astype(dtype)
    loss, error = model.evaluate(rows, targets, batch_size=8, verbose=0)
    found = score(path, split(rows, targets), batch_size=8)
    assert (np.float32(found.loss), np.float32(found.metrics["mae"])) == (loss, error)


def test_files_of_one_run_are_scored_each_by_its_own_weights(tmp_path: Path) -> None:
    """Sharing a model between files, or changing to another architecture, mixes nothing."""
    rows = data.load("blobs").split("test")
    other = network(inputs=2)
    other.compile(loss="mse")
    other.save(tmp_path / "other.h5")
    paths = [SAMPLES / "model_490.h5", SAMPLE, tmp_path / "other.h5", SAMPLES / "model_491.h5"]
    together = list(evaluator.evaluate(paths, rows))
    apart = [score(path, rows) for path in paths]
    assert together == apart
    assert len({found.loss for found in together}) == 4


def test_scores_come_one_by_one() -> None:
    """A score can be shown before the next file is loaded."""
    scores = evaluator.evaluate([SAMPLE, SAMPLE], data.load("blobs").split("train"))
    assert isinstance(scores, Iterator)
    assert next(scores).path == SAMPLE


# --- losses and metrics as files store them -------------------------------------------------------


def saved(model: Any, path: Path, loss: Any, metrics: Any, **more: Any) -> Path:
    """Compile and save a model."""
    model.compile(loss=loss, metrics=metrics, **more)
    model.save(path)
    return path


@pytest.mark.parametrize("framework", ["keras", "tf_keras"])
@pytest.mark.parametrize("suffix", [".h5", ".hdf5", ".keras"])
def test_a_loss_that_keras_cannot_load_itself_is_scored(
    tmp_path: Path, framework: str, suffix: str
) -> None:
    """Short names such as mse, in the files of Keras 3 and of Keras 2."""
    if framework == "tf_keras" and suffix == ".keras":
        pytest.skip("Keras 3 does not read the .keras files of Keras 2")
    keras = pytest.importorskip(framework)
    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", loss="mse", metrics=["mae", "mse"])
    targets = RANDOM.normal(size=50)
    model.fit(ROWS, targets, verbose=0)  # Keras 2 stores its metrics only once they are built
    path = tmp_path / f"model{suffix}"
    model.save(path)
    kernel, bias = model.get_weights()
    difference = (ROWS @ kernel + bias)[:, 0] - targets
    found = score(path, split(labels=targets))
    assert found.loss == pytest.approx((difference**2).mean(), rel=1e-5)
    assert found.metrics == {
        "mae": pytest.approx(abs(difference).mean(), rel=1e-5),
        "mse": pytest.approx((difference**2).mean(), rel=1e-5),
    }
    assert found.notes == ()


@pytest.mark.parametrize("framework", ["keras", "tf_keras"])
def test_losses_and_metrics_with_settings_keep_them(tmp_path: Path, framework: str) -> None:
    """Objects are rebuilt with their names and settings, weighted metrics too."""
    import keras as keras3

    keras = pytest.importorskip(framework)
    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(3)])
    model.compile(
        "sgd",
        loss=keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.2),
        metrics=[keras.metrics.TopKCategoricalAccuracy(k=2, name="top"), "categorical_accuracy"],
        weighted_metrics=["mae"],
    )
    model.fit(ROWS, ONE_HOT, verbose=0)
    model.save(tmp_path / "model.h5")
    found = score(tmp_path / "model.h5")
    output = model.predict(ROWS, verbose=0)
    loss = keras3.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.2)
    assert found.loss == pytest.approx(float(loss(ONE_HOT, output)), rel=1e-5)
    top = np.argsort(output, 1)[:, 1:]
    assert found.metrics["top"] == pytest.approx((top == CLASSES[:, None]).any(1).mean())
    assert found.metrics["categorical_accuracy"] == (output.argmax(1) == CLASSES).mean()
    assert len(found.metrics) == 3
    assert found.notes == ()


@pytest.mark.parametrize("loss", ["categorical_crossentropy", "sparse_categorical_crossentropy"])
@pytest.mark.parametrize(
    "labels", [CLASSES, CLASSES[:, None], CLASSES.astype(float), ONE_HOT, ONE_HOT.astype(bool)]
)
def test_classes_are_given_as_the_loss_wants_them(
    tmp_path: Path, loss: str, labels: npt.NDArray[Any]
) -> None:
    """Integers, whole floats and one-hot rows score alike under either cross-entropy."""
    model = network()
    path = saved(model, tmp_path / "model.h5", loss, ["accuracy"])
    output = predicted(model)
    shares = np.exp(output) / np.exp(output).sum(1, keepdims=True)
    found = score(path, split(labels=labels))
    assert found.loss == pytest.approx(-np.log(shares[range(50), CLASSES]).mean(), rel=1e-5)
    assert found.metrics == {"accuracy": (output.argmax(1) == CLASSES).mean()}


@pytest.mark.parametrize("loss", ["categorical_crossentropy", "sparse_categorical_crossentropy"])
def test_accuracy_is_added_where_labels_are_classes(tmp_path: Path, loss: str) -> None:
    """A model without a metric gets it."""
    model = network()
    found = score(saved(model, tmp_path / "model.h5", loss, None))
    assert found.metrics == {"accuracy": (predicted(model).argmax(1) == CLASSES).mean()}


def test_accuracy_of_two_classes_in_one_column(tmp_path: Path) -> None:
    """With a binary loss, above a half is class 1; above zero if the model gives logits."""
    import keras

    labels = (CLASSES > 0).astype(np.int64)
    for number, (activation, loss) in enumerate(
        [
            ("sigmoid", "binary_crossentropy"),
            ("linear", keras.losses.BinaryCrossentropy(from_logits=True)),
        ]
    ):
        model = network(1, activation)
        path = saved(model, tmp_path / f"model_{number}.h5", loss, None)
        expected = ((predicted(model)[:, 0] > 0) == labels).mean()
        for given_labels in (labels, labels[:, None], np.eye(2)[labels]):
            assert score(path, split(labels=given_labels)).metrics == {"accuracy": expected}


def test_numbers_to_predict_get_no_accuracy(tmp_path: Path) -> None:
    """With a regression loss, 0 and 1 in one column are numbers."""
    path = saved(network(1, "linear"), tmp_path / "model.h5", "mae", None)
    assert score(path, split(labels=(CLASSES > 0).astype(int))).metrics == {}


@pytest.mark.parametrize("framework", ["keras", "tf_keras"])
@pytest.mark.parametrize("form", ["dict", "list"])
def test_several_outputs_have_each_their_loss(tmp_path: Path, framework: str, form: str) -> None:
    """Losses, weights and metrics by name or by position, labels likewise."""
    keras = pytest.importorskip(framework)
    rows = keras.layers.Input((4,))
    outputs = [
        keras.layers.Dense(3, activation="softmax", name="kind")(rows),
        keras.layers.Dense(1, name="size")(rows),
    ]
    model = keras.Model(rows, outputs)
    values = (["sparse_categorical_crossentropy", "mse"], [["accuracy"], ["mae"]], [1.0, 0.5])
    arguments = [dict(zip(("kind", "size"), v, strict=True)) for v in values]
    losses, metrics, weights = arguments if form == "dict" else values
    model.compile("sgd", loss=losses, metrics=metrics, loss_weights=weights)
    sizes = RANDOM.normal(size=(50, 1))
    model.fit(ROWS, [CLASSES, sizes], verbose=0)
    model.save(tmp_path / "model.h5")
    kinds, found_sizes = model.predict(ROWS, verbose=0)
    entropy = -np.log(kinds[range(50), CLASSES]).mean()
    error = ((found_sizes - sizes) ** 2).mean()
    for labels in ({"kind": CLASSES, "size": sizes}, (ONE_HOT, sizes)):
        if form == "list" and isinstance(labels, dict):
            continue  # Keras takes labels by name for losses by name only
        found = score(tmp_path / "model.h5", split(labels=labels))
        assert found.loss == pytest.approx(entropy + 0.5 * error, rel=1e-5)
        assert found.metrics["kind_accuracy"] == (kinds.argmax(1) == CLASSES).mean()
        assert found.metrics["size_mae"] == pytest.approx(abs(found_sizes - sizes).mean(), rel=1e-5)
        assert found.notes == ()


def test_a_model_that_was_not_compiled_gets_accuracy_only(tmp_path: Path) -> None:
    """Without a training configuration there is no loss, and a note says so."""
    model = network()
    model.save(tmp_path / "model.h5")
    found = score(tmp_path / "model.h5")
    assert found.loss is None
    assert found.metrics == {"accuracy": (predicted(model).argmax(1) == CLASSES).mean()}
    assert found.notes == ("holds no training configuration, so its loss is unknown",)
    nothing = score(tmp_path / "model.h5", split(labels=RANDOM.normal(size=(50, 3))))
    assert (nothing.loss, nothing.metrics) == (None, {})
    assert "nothing to measure" in nothing.notes[-1]


def test_a_sigmoid_that_was_not_compiled_gets_accuracy(tmp_path: Path) -> None:
    """One column is a class if the model ends in a sigmoid."""
    model = network(1, "sigmoid")
    model.save(tmp_path / "model.h5")
    labels = (CLASSES > 0).astype(int)
    expected = ((predicted(model)[:, 0] > 0) == labels).mean()
    assert score(tmp_path / "model.h5", split(labels=labels)).metrics == {"accuracy": expected}


def test_a_loss_of_the_users_own_is_left_out_with_a_note(tmp_path: Path) -> None:
    """A name unknown to Keras is reported, and the rest is measured."""

    def mine(truth: Any, output: Any) -> Any:
        import keras

        return keras.losses.categorical_crossentropy(truth, output)

    path = saved(network(), tmp_path / "model.h5", mine, ["accuracy", mine])
    found = score(path)
    assert found.loss is None
    assert list(found.metrics) == ["accuracy"]
    assert [note.partition(";")[0] for note in found.notes] == [
        "left out the loss 'mine', which Keras does not know",
        "left out the metric 'mine', which Keras does not know",
    ]
    assert all("register it in the file of --data" in note for note in found.notes)
    assert found.loss_words == ""


def test_what_the_user_registers_is_known(tmp_path: Path) -> None:
    """A layer and a loss registered in the file of --data are found by their names."""
    import keras

    (tmp_path / "own.py").write_text(
        "import keras, numpy as np\n"
        "@keras.saving.register_keras_serializable('polyak_tests')\n"
        "class Twice(keras.layers.Layer):\n"
        "    def call(self, x): return 2 * x\n"
        "@keras.saving.register_keras_serializable('polyak_tests')\n"
        "def cubed(truth, output): return keras.ops.mean(keras.ops.abs(truth - output) ** 3, -1)\n"
        "def load(): return np.ones((3, 4)), np.zeros((3, 1))\n"
    )
    rows = data.load(f"{tmp_path / 'own.py'}:load").split()
    own = sys.modules["own"]
    model = keras.Sequential([keras.Input((4,)), own.Twice(), keras.layers.Dense(1)])
    path = saved(model, tmp_path / "model.h5", own.cubed, [own.cubed])
    output = 2 * model.get_weights()[0].sum()
    found = score(path, rows)
    assert found.loss == pytest.approx(abs(output) ** 3, rel=1e-5)
    assert found.metrics == {"cubed": pytest.approx(abs(output) ** 3, rel=1e-5)}
    assert found.loss_words == "cubed (your own)"


def test_a_warning_of_keras_is_a_note(tmp_path: Path) -> None:
    """It becomes a note, and does not reach the terminal as lines of source code."""
    (tmp_path / "warning.py").write_text(
        "import keras, warnings\n"
        "@keras.saving.register_keras_serializable('polyak_tests')\n"
        "class Warns(keras.layers.Layer):\n"
        "    def build(self, shape): warnings.warn('beware\\nof this')\n"
        "    def call(self, x): return x\n"
        "def load(): return [[1.0]], [1.0]\n"
    )
    data.load(f"{tmp_path / 'warning.py'}:load")
    import keras

    own = sys.modules["warning"]
    with pytest.warns(UserWarning, match="beware"):
        model = keras.Sequential([keras.Input((4,)), own.Warns(), keras.layers.Dense(3)])
    model.save(tmp_path / "model.h5")
    assert "Keras warns: beware\\nof this" in score(tmp_path / "model.h5").notes


# --- files that are refused -----------------------------------------------------------------------


def lambda_model(path: Path, mark: Path) -> Path:
    """Save a model whose loading and running leaves a mark."""
    import keras

    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Lambda(lambda x: x, name="code"), keras.layers.Dense(3)]
    )
    model.compile(loss="mse")
    model.save(path)
    hostile = keras.layers.Lambda(eval(f"lambda x: (open({str(mark)!r}, 'w'), x)[1]"))
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        (layer,) = [c for c in config["config"]["layers"] if c["class_name"] == "Lambda"]
        layer["config"]["function"] = hostile.get_config()["function"]
        file.attrs["model_config"] = json.dumps(config)
    return path


def test_code_in_a_model_is_not_run_unless_trusted(tmp_path: Path) -> None:
    """A Lambda layer is refused with the option that allows it, and runs only with that option."""
    path = lambda_model(tmp_path / "model.h5", tmp_path / "mark")
    text = refusal(path, split(labels=ONE_HOT))
    assert "contains code" in text
    assert "--trust-code" in text
    assert not (tmp_path / "mark").exists()
    score(path, split(labels=ONE_HOT), trust_code=True)
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "config",
    [
        {"class_name": "system", "module": "os", "config": {}, "registered_name": None},
        {"class_name": "function", "module": "os", "config": "system", "registered_name": "system"},
        {"class_name": "Loss", "config": {"fn": {"module": "os", "class_name": "system"}}},
        {"class_name": "MeanMetricWrapper", "config": {"name": "a", "fn": "os.system"}},
        {"class_name": "Sequential", "config": {"layers": []}},
        {"class_name": "MeanSquaredError", "config": {"nonsense": 1}},
        {"class_name": 3, "config": 4},
        "os.system",
        "__class__",
        "",
        7,
    ],
)
def test_nothing_that_a_training_configuration_names_is_imported(
    tmp_path: Path, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and metrics come from Keras only; everything else is left out with a note."""
    path = saved(network(), tmp_path / "model.h5", "mse", None)
    edited(path, training_config=json.dumps({"loss": config, "metrics": [config]}))
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("code of the file was run"))
    found = score(path)
    assert found.loss is None
    assert [note.startswith("left out the") for note in found.notes] == [True, True]


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[1]", '"a"'])
def test_a_damaged_training_configuration_is_one_line(tmp_path: Path, text: str) -> None:
    """JSON that is broken, nested without end, or not an object is refused."""
    path = edited(saved(network(), tmp_path / "model.h5", "mse", None), training_config=text)
    assert "its training configuration is damaged" in refusal(path)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[1]", '{"a": 1}'])
def test_a_damaged_architecture_is_one_line(tmp_path: Path, text: str) -> None:
    """Any exception of Keras becomes one line."""
    path = edited(saved(network(), tmp_path / "model.h5", "mse", None), model_config=text)
    assert "Keras cannot load it" in refusal(path)


def test_weights_without_an_architecture_are_reported_so(tmp_path: Path) -> None:
    """This holds for each format of Keras for weights."""
    path = saved(network(), tmp_path / "model.h5", "mse", None)
    assert "holds weights only, no architecture" in refusal(edited(path, model_config=None))
    network().save_weights(tmp_path / "w.weights.h5")
    assert "expected a whole model" in refusal(tmp_path / "w.weights.h5")
    tf_keras = pytest.importorskip("tf_keras")
    old = tf_keras.Sequential([tf_keras.layers.Dense(3, input_shape=(4,))])
    old.save_weights(tmp_path / "legacy.h5")
    assert "holds weights only, no architecture" in refusal(tmp_path / "legacy.h5")


@pytest.mark.parametrize("name", ["model.H5", "model.hd5", "model", "model.keras"])
def test_a_name_that_keras_does_not_open_is_reported(tmp_path: Path, name: str) -> None:
    """An HDF5 file needs the suffix .h5 or .hdf5."""
    shutil.copy(SAMPLE, tmp_path / name)
    assert "rename it" in refusal(tmp_path / name)


def damages(good: bytes) -> dict[str, bytes]:
    """Return contents that are not a whole model file."""
    return {
        "empty": b"",
        "text": b"loss,accuracy\n",
        "truncated": good[: len(good) // 2],
        "beginning": good[:100],
        "zip": b"PK\x03\x04" + bytes(100),
    }


@pytest.mark.parametrize("kind", list(damages(b"")))
@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_a_damaged_file_is_one_line(tmp_path: Path, kind: str, suffix: str) -> None:
    """Truncated, empty and foreign files are refused before Keras sees them."""
    good = tmp_path / f"good{suffix}"
    saved(network(), good, "mse", None)
    bad = tmp_path / f"bad{suffix}"
    bad.write_bytes(damages(good.read_bytes())[kind])
    refusal(bad)


def test_a_keras_file_with_a_broken_member_is_one_line(tmp_path: Path) -> None:
    """A .keras archive without its configuration, or with other text in it, is refused."""
    import zipfile

    for name, members in (("none", {}), ("broken", {"config.json": "{"}), ("empty", {"a": ""})):
        with zipfile.ZipFile(tmp_path / f"{name}.keras", "w") as archive:
            for member, text in members.items():
                archive.writestr(member, text)
        refusal(tmp_path / f"{name}.keras")


def test_no_file_a_folder_and_a_pipe_are_one_line(tmp_path: Path) -> None:
    """None of them is opened, neither a folder nor a missing file."""
    os.mkfifo(tmp_path / "pipe.h5")
    (tmp_path / "folder.h5").mkdir()
    for name in ("none.h5", "pipe.h5", "folder.h5", "none.keras"):
        refusal(tmp_path / name)


def test_a_layer_that_keras_does_not_know_is_named(tmp_path: Path) -> None:
    """The message says where to register it."""
    import keras

    class Unheard(keras.layers.Layer):  # type: ignore[misc]  # keras ships no types
        def call(self, x: Any) -> Any:
            return x

    for suffix in (".h5", ".keras"):
        path = tmp_path / f"model{suffix}"
        keras.Sequential([keras.Input((4,)), Unheard()]).save(path)
        text = refusal(path)
        assert "'Unheard'" in text
        assert "register" in text


def test_rows_that_do_not_fit_are_reported_with_both_shapes(tmp_path: Path) -> None:
    """Features must fit the inputs of the model, and labels its outputs."""
    path = saved(network(), tmp_path / "model.h5", "categorical_crossentropy", None)
    sparse = saved(network(), tmp_path / "s.h5", "sparse_categorical_crossentropy", None)
    cases: list[tuple[Path, Any, Any, str]] = [
        (path, ROWS[:, :2], CLASSES, "takes rows of shape (4,), but rows.npz has rows of shape (2"),
        (path, ROWS[:, None], CLASSES, "but rows.npz has rows of shape (1, 4)"),
        (path, (ROWS, ROWS), CLASSES, "takes 1 inputs, but rows.npz has 2"),
        (path, ROWS, (CLASSES, CLASSES), "gives 1 outputs, but rows.npz has labels for 2"),
        (path, ROWS, np.ones((50, 7)), "gives rows of shape (3,), but the labels of rows.npz have"),
        (path, ROWS, CLASSES + 0.5, "gives rows of shape (3,), but the labels of rows.npz"),
        (path, ROWS, CLASSES + 1, "classes 0 to 2, but the labels of rows.npz go from 1 to 3"),
        (path, ROWS, CLASSES - 1, "go from -1 to 1"),
        (sparse, ROWS, np.full((50, 3), 0.5), "are not one-hot"),
    ]
    for file, features, labels, message in cases:
        with pytest.raises(MismatchError) as error:
            score(file, split(features, labels))
        assert message in str(error.value)
        assert str(error.value).startswith(str(file))


def test_a_later_bad_file_is_found_before_an_earlier_one_is_scored(tmp_path: Path) -> None:
    """All files are inspected first, so that a typo does not cost an hour."""
    (tmp_path / "bad.h5").write_bytes(b"no")
    with pytest.raises(FormatError, match=r"bad\.h5"):
        evaluator.evaluate([SAMPLE, tmp_path / "bad.h5"], data.load("blobs").split())


@pytest.mark.parametrize("version", ["2.13.1", "3.0.5", "3.9.2", "3.10.0", "3.11.2"])
def test_a_keras_that_runs_hidden_code_is_refused(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """Before 3.11.3 the safe mode is ignored for .h5; the message names both versions."""
    monkeypatch.setattr("importlib.metadata.version", lambda _name: version)
    with pytest.raises(PolyakError, match=rf"3\.11\.3 or newer, found {version}.*CVE-2025-9905"):
        evaluator.evaluate([SAMPLE], split())


@pytest.mark.parametrize("version", ["3.11.3", "3.12.0", "4.0.0.dev1"])
def test_a_newer_keras_is_not_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Versions are compared as numbers, not as text."""
    monkeypatch.setattr("importlib.metadata.version", lambda _name: version)
    evaluator.evaluate([SAMPLE], split())


@pytest.mark.parametrize(
    ("installed", "extra"),
    [
        ({"tensorflow", "torch"}, "tensorflow"),
        ({"keras"}, "tensorflow"),
        (set(), "tensorflow"),
        ({"torch"}, "keras"),
    ],
)
def test_a_missing_framework_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, installed: set[str], extra: str
) -> None:
    """The message says what to install: who has PyTorch needs only Keras."""
    import importlib.metadata

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return "3.15.1"

    monkeypatch.setattr("importlib.metadata.version", version)
    monkeypatch.setattr(keras_files, "find_spec", lambda name: name if name in installed else None)
    with pytest.raises(MissingExtraError, match=rf"polyak evaluate needs .*'polyak\[{extra}\]'"):
        evaluator.evaluate([SAMPLE], split())


# --- every generation of Keras --------------------------------------------------------------------


def forward(path: Path, rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the predictions of the model of `keras_generations`, by numpy and h5py alone."""
    with h5py.File(path) as file:

        def weights(layer: str) -> list[npt.NDArray[np.float64]]:
            group = file["model_weights"][layer]
            return [group[name][()].astype(np.float64) for name in group.attrs["weight_names"]]

        dense, normal, nested, last = map(weights, ("dense", "bn", "nested", "classes"))

    def normalised(x: Any, gamma: Any, beta: Any, mean: Any, variance: Any) -> Any:
        return gamma * (x - mean) / np.sqrt(variance + 1e-3) + beta

    hidden = normalised(np.maximum(rows @ dense[0] + dense[1], 0), *normal)
    hidden = normalised(hidden @ nested[0] + nested[1], *nested[2:])
    return np.asarray(hidden @ last[0] + last[1])


@pytest.mark.parametrize("generation", ["keras-3.0.5", "keras-3.3.3", "keras-3.15.1"])
def test_the_files_of_every_keras_3_are_scored(generation: str) -> None:
    """With BatchNormalization and a nested model, as numpy scores them."""
    paths = sorted((GENERATIONS / generation).glob("*.h5"))
    assert len(paths) == 3
    for found in evaluator.evaluate(paths, split()):
        output = forward(found.path, ROWS)
        shares = np.exp(output) / np.exp(output).sum(1, keepdims=True)
        entropy = -np.log(shares[range(50), CLASSES]).mean()
        assert found.loss == pytest.approx(entropy, rel=1e-5)
        assert found.metrics == {"accuracy": (output.argmax(1) == CLASSES).mean()}


@pytest.mark.parametrize("generation", ["tf.keras-2.13.1", "tf_keras-2.21.0"])
def test_a_keras_2_file_that_keras_3_cannot_build_says_who_wrote_it(generation: str) -> None:
    """Keras 3 does not understand the nested models of Keras 2; the message names the writer."""
    version = generation.rpartition("-")[2]
    text = refusal(GENERATIONS / generation / "model_1.h5")
    assert f"Keras cannot load it (it was written by Keras {version})" in text


# --- silence --------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [None, "0"])
def test_nothing_reaches_the_terminal(tmp_path: Path, level: str | None) -> None:
    """In a fresh process, from the first import to the interpreter's end, stderr stays empty."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TF_")}
    if level is not None:
        environment["TF_CPP_MIN_LOG_LEVEL"] = level
    code = (
        "from pathlib import Path\n"
        "from polyak_cli.evaluation import data, evaluator, sample_run\n"
        f"sample_run.train(Path({str(tmp_path)!r}), epochs=2)\n"
        f"paths = [Path({str(SAMPLE)!r}), Path({str(tmp_path)!r}) / 'model_1.h5']\n"
        "for score in evaluator.evaluate(paths, data.load('blobs').split()): print(score.rows)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=False, env=environment, cwd=HERE.parents[1],
    )  # fmt: skip
    assert (done.stderr, done.stdout, done.returncode) == ("", "1000\n1000\n", 0)


def test_importing_the_module_imports_no_framework() -> None:
    """The checks that refuse a bad file do not import one either."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from polyak_cli.evaluation import data, evaluator, plots, sample_run\n"
        "from polyak_cli.errors import PolyakError\n"
        "try: evaluator.evaluate([Path('none.h5')], None)\n"
        "except PolyakError as error: print(error)\n"
        "print({'keras', 'tensorflow', 'sklearn', 'matplotlib'} & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=HERE.parents[1],
    )
    assert done.stdout.splitlines()[-1] == "set()"
    assert done.stdout.startswith("none.h5: ")


# --- numbers --------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 10_000_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_number_is_shown_as_the_shortest_of_its_float32(share: tuple[int, int]) -> None:
    """It is the same float32, and no other decimal for it is shorter."""
    single = np.float32(share[0] / share[1])
    short = keras_models.shorten_float32(float(single))
    assert np.float32(short) == single
    assert len(repr(short)) <= len(repr(float(single)))


def test_a_number_of_more_than_float32_is_left_alone() -> None:
    """A metric computed in float64 keeps its digits."""
    assert keras_models.shorten_float32(0.1) == 0.1
    assert keras_models.shorten_float32(1 / 3) == 1 / 3
    assert keras_models.shorten_float32(float(np.float32(0.792))) == 0.792
    assert np.isnan(keras_models.shorten_float32(float("nan")))
