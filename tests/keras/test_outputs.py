"""Models of several inputs and outputs, and losses by name, against Keras itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyak_cli import compare, evaluate, recalibrate
from polyak_cli.errors import MismatchError
from polyak_cli.evaluation import data, evaluator
from tests.keras.commands import polyak
from tests.keras.test_evaluate import network

RANDOM = np.random.default_rng(11)
LEFT = RANDOM.normal(size=(30, 4)).astype(np.float32)
RIGHT = RANDOM.normal(size=(30, 2)).astype(np.float32)
KINDS = RANDOM.integers(0, 3, 30)
SIZES = RANDOM.normal(size=(30, 1)).astype(np.float32)
LOSSES = {"kind": "sparse_categorical_crossentropy", "size": "mse"}


def two(form: str, normalise: bool = False) -> Any:
    """Return a model of two inputs and two outputs, by position (list) or by name (dict)."""
    import keras

    inputs = [keras.Input((4,), name="left"), keras.Input((2,), name="right")]
    whole = keras.layers.Concatenate()(inputs)
    if normalise:
        whole = keras.layers.BatchNormalization()(whole)
    size = keras.layers.Dense(1, name="one", kernel_regularizer="l2")(whole)
    kind = keras.layers.Dense(3, activation="softmax", name="other")(whole)
    if form == "list":
        return keras.Model(inputs, [size, kind])
    # Keras sorts the names of a dict: kind comes before size.
    named = dict(zip(("left", "right"), inputs, strict=True))
    return keras.Model(named, {"size": size, "kind": kind})


def compiled(form: str, **options: Any) -> Any:
    """Return the model with weighted losses and metrics of its own."""
    model = two(form, **options)
    metrics: Any = {"kind": ["accuracy"], "size": ["mae"]}
    losses: Any = LOSSES
    weights: Any = {"kind": 1.0, "size": 0.25}
    if form == "list":
        losses, metrics, weights = (
            [given["size"], given["kind"]] for given in (losses, metrics, weights)
        )
    model.compile("sgd", loss=losses, metrics=metrics, loss_weights=weights)
    return model


@pytest.mark.parametrize(("form", "suffix"), [("list", ".keras"), ("dict", ".h5")])
def test_total_and_outputs_are_those_of_keras(tmp_path: Path, form: str, suffix: str) -> None:
    """The weighted total, and each output's loss and metrics, equal those of model.evaluate.

    So does the total by rows, and labels by name and in any order give the same.
    """
    model = compiled(form)
    path = tmp_path / f"model{suffix}"
    model.save(path)
    names = ("one", "other") if form == "list" else ("size", "kind")
    named = dict(zip(names, (SIZES, KINDS), strict=True))
    features = {"left": LEFT, "right": RIGHT}
    given = (named, features) if form == "dict" else ([SIZES, KINDS], [LEFT, RIGHT])
    expected = model.evaluate(given[1], given[0], batch_size=7, verbose=0, return_dict=True)
    assert len(expected) == 5
    reversed_names: list[Any] = [dict(reversed(one.items())) for one in (features, named)]
    every: list[list[Any]] = [[features, named], reversed_names]
    if form == "list":
        every.append([(LEFT, RIGHT), (SIZES, KINDS)])
    for x, y in every:
        rows = data.Split("rows", x, y)
        (found,) = evaluate(path, rows, batch_size=7)
        assert found.loss == pytest.approx(expected["loss"], rel=1e-6)
        assert {**found.metrics, "loss": found.loss} == pytest.approx(expected, rel=1e-6)
        examiner = evaluator.Evaluator([rows], batch_size=7)
        (scores,) = examiner.score_rows(path)
        assert scores.losses is not None
        assert scores.losses.mean() == pytest.approx(expected["loss"], rel=1e-5)
    words = ["mse (Keras's)", "sparse_categorical_crossentropy (Keras's)"]
    pairs = sorted(zip(names, words, (" * 0.25", ""), strict=True))
    if form == "list":
        pairs = [*zip(names, words, (" * 0.25", ""), strict=True)]
    assert found.loss_words == ", ".join(f"{n}: {w}{t}" for n, w, t in pairs) + (
        " + the model's own penalties (regularizers, add_loss)"
    )


def test_data_of_another_form_are_refused_by_name(tmp_path: Path) -> None:
    """Names that are not the model's, too few arrays, and positions where the model has names."""
    paths = {form: tmp_path / f"{form}.keras" for form in ("list", "dict")}
    for form, path in paths.items():
        compiled(form).save(path)
    x, y = (LEFT, RIGHT), (SIZES, KINDS)
    named = {"left": LEFT, "right": RIGHT}
    cases: list[tuple[str, Any, Any, str]] = [
        ("list", x, {"size": SIZES, "other": KINDS},
         "gives the outputs 'one', 'other', but rows has labels for 'size', 'other'"),
        ("list", x, SIZES, "gives 2 outputs, but rows has labels for 1; give one for each of"),
        ("list", LEFT, y, "takes 2 inputs, but rows has 1; give one for each of 'left', 'right'"),
        ("list", {"left": LEFT, "b": RIGHT}, y, "takes the inputs 'left', 'right', but rows has"),
        ("list", x, (KINDS, SIZES), "gives 'other' rows of shape (3,), but the labels"),
        ("list", (RIGHT, LEFT), y, "takes rows of shape (4,), but rows has rows of shape (2,)"),
        ("dict", named, y, "gives the outputs 'kind', 'size' as a dict, but the arrays of rows"),
        ("dict", x, {"size": SIZES, "kind": KINDS}, "takes the inputs 'left', 'right' as a dict"),
    ]  # fmt: skip
    for form, features, labels, message in cases:
        with pytest.raises(MismatchError) as error:
            [*evaluate(paths[form], data.Split("rows", features, labels))]
        assert message in str(error.value)
        assert len(str(error.value).splitlines()) == 1


def test_outputs_without_a_loss_are_not_counted(tmp_path: Path) -> None:
    """A loss of the user's own is left out of the total, which the note and the name say."""

    def mine(truth: Any, output: Any) -> Any:
        return (truth - output) ** 2

    model = two("list")
    model.compile(loss=[mine, "sparse_categorical_crossentropy"])
    model.save(tmp_path / "part.keras")
    model.compile(loss=[mine, mine])
    model.save(tmp_path / "none.keras")
    rows = data.Split("rows", (LEFT, RIGHT), (SIZES, KINDS))
    part, none = evaluate([tmp_path / "part.keras", tmp_path / "none.keras"], rows)
    shares = model.predict([LEFT, RIGHT], verbose=0)[1]
    penalty = 0.01 * (model.get_layer("one").get_weights()[0] ** 2).sum()
    expected = -np.log(shares[range(30), KINDS]).mean() + penalty
    assert part.loss == pytest.approx(expected, rel=1e-5)
    assert part.loss_words.startswith("one: none, other: sparse_categorical_crossentropy")
    assert "the loss shown is not the whole loss of the model" in part.notes[-1]
    assert (none.loss, dict(none.metrics), none.loss_words) == (None, {}, "")


def test_evaluate_recalibrate_and_compare_take_the_same_rows(tmp_path: Path) -> None:
    """Several inputs by name or by position give the same statistics and the same scores."""
    path = tmp_path / "model.keras"
    compiled("list", normalise=True).save(path)
    by_name = data.Split("rows", {"right": RIGHT, "left": LEFT}, {"other": KINDS, "one": SIZES})
    by_position = data.Split("rows", (LEFT, RIGHT), (SIZES, KINDS))
    scores = []
    for number, rows in enumerate((by_name, by_position)):
        recalibrate(path, tmp_path / f"{number}.keras", rows)
        found = compare(tmp_path / f"{number}.keras", path, rows)
        scores.append([found.models[0].score.loss, found.baseline.loss, found.models[0].gains])
        assert [gain.metric for gain in found.models[0].gains] == ["loss"]
    assert scores[0] == scores[1]
    assert scores[0][0] != scores[0][1]


# --- which loss it is -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The object being serialized includes a `lambda`")
def test_a_function_or_class_called_like_one_of_keras_is_not_taken_for_it(tmp_path: Path) -> None:
    """A .keras file tells the user's own mse and Huber from Keras's; an .h5 file keeps names only.

    There the name says that it is Keras's loss that is shown.
    """
    import keras

    def mse(truth: Any, output: Any) -> Any:
        return 5.0 + keras.ops.mean((truth - output) ** 2, -1)

    class Huber(keras.losses.Loss):  # type: ignore[misc]  # keras ships no types
        def call(self, truth: Any, output: Any) -> Any:
            return 7.0 + 0 * (truth - output)[..., 0]

    model = network(1, "linear")
    rows = data.Split("rows", LEFT, SIZES)
    error = float(((model.predict(LEFT, verbose=0) - SIZES) ** 2).mean())
    cases: list[tuple[Any, str, str]] = [
        ("mse", "mse (Keras's)", "mse (Keras's)"),
        (keras.losses.mean_squared_error, *["mean_squared_error (Keras's)"] * 2),
        (keras.losses.MeanSquaredError(), *["MeanSquaredError (Keras's)"] * 2),
        (mse, "", "mse (Keras's)"),
        (Huber(), "", "Huber (Keras's)"),
        (lambda truth, output: output[..., 0] + 0 * truth[..., 0], "", ""),
    ]
    for loss, *words in cases:
        model.compile(loss=loss)
        for suffix, expected in zip((".keras", ".h5"), words, strict=True):
            path = tmp_path / f"model{suffix}"
            model.save(path)
            (found,) = evaluate(path, rows)
            assert found.loss_words == expected
            if "uber" not in expected:
                assert found.loss == (pytest.approx(error, rel=1e-5) if expected else None)
            if not expected:
                assert found.notes[0].startswith("left out the loss '")


def test_settings_of_a_loss_are_named_or_noted_as_lost(tmp_path: Path) -> None:
    """Smoothing is kept in the file; the delta of Huber is not, so Keras's default is used."""
    import keras

    model = network()
    loss = keras.losses.CategoricalCrossentropy(label_smoothing=0.2)
    model.compile(loss=loss)
    model.save(tmp_path / "smooth.keras")
    model.compile(loss=keras.losses.Huber(delta=0.5))
    model.save(tmp_path / "huber.keras")
    rows = data.Split("rows", LEFT, np.eye(3)[KINDS])
    smooth, huber = evaluate([tmp_path / "smooth.keras", tmp_path / "huber.keras"], rows)
    assert smooth.loss_words == "CategoricalCrossentropy(label_smoothing=0.2) (Keras's)"
    assert smooth.notes == ()
    if huber.loss_words == "Huber (Keras's)":  # a Keras that keeps delta has nothing to note
        assert huber.notes == (
            "the file does not record the delta of its loss Huber: the loss shown uses "
            "Keras's default, 1.0",
        )


@pytest.mark.slow
def test_the_command_says_which_loss_it_prints(tmp_path: Path) -> None:
    """Below the table and in --json, for a function that returns a list of labels."""
    compiled("list").save(tmp_path / "two.keras")
    np.savez(tmp_path / "all.npz", a=LEFT, b=RIGHT, c=SIZES, d=KINDS)
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "def load():\n"
        "    a, b, c, d = np.load('all.npz').values()\n"
        "    return ([a, b], [c, d]), ([a[:9], b[:9]], [c[:9], d[:9]])\n"
    )
    done = polyak("evaluate", "two.keras", "--data", "mine.py:load", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    table, loss = done.stdout.splitlines()[:1], done.stdout.splitlines()[2]
    columns = table[0].split()
    assert columns[:2] == ["model", "loss"]
    assert {"one_loss", "other_loss", "one_mae", "other_accuracy"} < {*columns}
    assert loss.startswith("loss: one: mse (Keras's) * 0.25, other: sparse_categorical_cross")
    done = polyak(
        *["evaluate", "two.keras", "--data", "mine.py:load", "--split", "train", "--json"],
        cwd=tmp_path,
    )
    found = json.loads(done.stdout)
    assert found["rows"] == 30
    assert f"loss: {found['models'][0]['loss_name']}" == loss
