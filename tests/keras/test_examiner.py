"""The scores of single rows agree with the totals of Keras."""

from __future__ import annotations

import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyak_cli.errors import FormatError, MismatchError, UsageError
from polyak_cli.evaluation import data, evaluator
from tests.keras.test_evaluate import (
    CLASSES,
    ONE_HOT,
    RANDOM,
    ROWS,
    SAMPLE,
    SAMPLES,
    network,
    saved,
    score,
    split,
)


def outcome(path: Path, rows: data.Split | None = None, **options: Any) -> evaluator.RowScores:
    """Return the scores of a model on one split."""
    (found,) = evaluator.Evaluator([rows or split()], **options).score_rows(path)
    return found


def agrees(path: Path, rows: data.Split | None = None) -> evaluator.RowScores:
    """Return the scores, and check that rows agree with totals, and totals with `evaluate`."""
    found = outcome(path, rows, batch_size=16)
    expected = score(path, rows, batch_size=16)
    assert (found.loss, found.metrics) == (expected.loss, expected.metrics)
    if found.losses is not None:
        assert found.losses.dtype == np.float64
        assert found.losses.mean() == pytest.approx(found.loss, rel=1e-6)
    if found.correct is not None:
        assert found.correct.dtype == np.bool_
        accuracy = next(value for name, value in found.metrics.items() if "acc" in name)
        assert np.float32(found.correct.mean()) == np.float32(accuracy)
    return found


@pytest.mark.parametrize(
    ("loss", "metrics"),
    [
        ("categorical_crossentropy", ["accuracy"]),
        ("sparse_categorical_crossentropy", None),
        ("mse", ["categorical_accuracy"]),
        (None, None),
    ],
)
def test_rows_of_classes_agree_with_their_mean(
    tmp_path: Path, loss: str | None, metrics: Any
) -> None:
    """Losses agree to float32, classes exactly, and the predictions are those of the model."""
    model = network()
    if loss is None:
        model.save(tmp_path / "model.h5")
    else:
        saved(model, tmp_path / "model.h5", loss, metrics)
    found = agrees(tmp_path / "model.h5")
    assert found.predictions == pytest.approx(model.predict(ROWS, verbose=0), rel=1e-6)
    assert found.correct is not None
    assert list(found.correct) == list(found.predictions.argmax(1) == CLASSES)
    assert (found.losses is None) == (loss is None)
    assert found.notes[1:] == ()


def test_one_loss_has_one_name_however_it_is_written(tmp_path: Path) -> None:
    """A loss has one name, as a text, an object, or for integer classes; others differ."""
    import keras

    losses = (
        "categorical_crossentropy",
        "sparse_categorical_crossentropy",
        keras.losses.CategoricalCrossentropy(),
        "mse",
        keras.losses.MeanSquaredError(),
    )
    names = [
        outcome(saved(network(), tmp_path / f"{number}.h5", loss, None)).loss_name
        for number, loss in enumerate(losses)
    ]
    assert names == [names[0]] * 3 + [names[3]] * 2
    assert names[0] != names[3]


@pytest.mark.parametrize("metrics", [None, ["accuracy"]])
def test_rows_of_one_column_agree_with_their_mean(tmp_path: Path, metrics: Any) -> None:
    """Class 1 is above a half; above zero if the model gives logits and measures no accuracy."""
    import keras

    labels = (CLASSES > 0).astype(np.int64)
    logits = keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=0.1)
    cases = [("sigmoid", "binary_crossentropy"), ("linear", logits)]
    for number, (activation, loss) in enumerate(cases):
        path = saved(network(1, activation), tmp_path / f"{number}.h5", loss, metrics)
        found = agrees(path, split(labels=labels))
        assert found.losses is not None
        assert found.correct is not None


def test_numbers_to_predict_have_losses_and_no_classes(tmp_path: Path) -> None:
    """The loss of a row is the mean over its elements."""
    model = network(4, "linear")
    targets = RANDOM.normal(size=(50, 4))
    found = agrees(saved(model, tmp_path / "model.h5", "mae", ["mse"]), split(labels=targets))
    output = model.predict(ROWS, verbose=0)
    assert found.losses == pytest.approx(abs(output - targets).mean(1), rel=1e-5)
    assert found.correct is None


@pytest.mark.slow
def test_several_outputs_add_their_losses(tmp_path: Path) -> None:
    """Each output counts by its weight; there are no predictions."""
    import keras

    rows = keras.layers.Input((4,))
    model = keras.Model(
        rows,
        [
            keras.layers.Dense(3, activation="softmax", name="kind")(rows),
            keras.layers.Dense(2, name="size")(rows),
        ],
    )
    sizes = RANDOM.normal(size=(50, 2))
    losses = {"kind": "categorical_crossentropy", "size": "mse"}
    model.compile(loss=losses, loss_weights={"kind": 1.0, "size": 0.5})
    model.save(tmp_path / "model.h5")
    for labels in ({"size": sizes, "kind": CLASSES}, (ONE_HOT, sizes)):
        found = agrees(tmp_path / "model.h5", split(labels=labels))
        assert found.losses is not None
        assert (found.correct, found.predictions) == (None, None)
    examiner = evaluator.Evaluator([split(labels=(ONE_HOT, sizes))])
    examiner.score_rows(tmp_path / "model.h5")
    with pytest.raises(UsageError, match="a model with one output"):
        examiner.score_predictions([sizes])


def test_the_penalty_of_regularizers_is_in_every_row(tmp_path: Path) -> None:
    """Keras adds it to the mean, so it is added to the rows, too."""
    import keras

    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, "softmax", kernel_regularizer="l2")]
    )
    path = saved(model, tmp_path / "model.h5", "categorical_crossentropy", None)
    found = agrees(path)
    assert found.losses is not None
    penalty = 0.01 * (model.get_weights()[0] ** 2).sum()
    own = -np.log(model.predict(ROWS, verbose=0)[range(50), CLASSES])
    assert found.losses == pytest.approx(own + penalty, rel=1e-4)


def test_a_loss_that_no_row_has_is_not_reported_by_rows(tmp_path: Path) -> None:
    """A sum over a batch, and a loss of the whole batch, are not means over rows."""
    (tmp_path / "batch.py").write_text(
        "import keras\n"
        "@keras.saving.register_keras_serializable('polyak_tests')\n"
        "def largest(truth, output): return keras.ops.max(keras.ops.abs(truth - output))\n"
        "def load(): return [[1.0]], [1.0]\n"
    )
    data.load(f"{tmp_path / 'batch.py'}:load")
    import keras

    summed = keras.losses.CategoricalCrossentropy(reduction="sum")
    for number, loss in enumerate((summed, sys.modules["batch"].largest)):
        found = outcome(saved(network(), tmp_path / f"{number}.h5", loss, None))
        assert found.loss is not None
        assert found.losses is None
        assert found.correct is not None
    assert outcome(tmp_path / "0.h5").notes == (
        "its loss is not the mean of the losses of single rows",
    )


def test_words_of_a_text_are_no_rows(tmp_path: Path) -> None:
    """If each step of a row has a class, there is an accuracy, but no row is right or wrong."""
    import keras

    model = keras.Sequential([keras.Input((6, 4)), keras.layers.Dense(3, activation="softmax")])
    rows = split(RANDOM.normal(size=(20, 6, 4)), RANDOM.integers(0, 3, (20, 6)))
    found = agrees(saved(model, tmp_path / "m.h5", "sparse_categorical_crossentropy", None), rows)
    assert found.losses is not None
    assert len(found.losses) == 20
    assert found.correct is None
    assert "accuracy" in found.metrics


@pytest.mark.slow
def test_an_examiner_mixes_neither_files_nor_splits(tmp_path: Path) -> None:
    """This holds for files of a run, another architecture between them, and a rewritten file."""
    blobs = data.load("blobs")
    splits = [data.halves(blobs.split("test"))[1], blobs.split("train")]
    other = network(inputs=2)
    paths = [SAMPLES / "model_490.h5", saved(other, tmp_path / "other.h5", "mse", None), SAMPLE]
    examiner = evaluator.Evaluator(splits)
    for path in paths:
        shutil.copy(path, tmp_path / "candidate.h5")
        together = examiner.score_rows(tmp_path / "candidate.h5")
        for rows, found in zip(splits, together, strict=True):
            apart = agrees(path, rows)
            assert found.loss == pytest.approx(apart.loss, rel=1e-6)
            assert found.correct is not None
            assert list(found.correct) == list(apart.correct)  # type: ignore[arg-type]
            assert len(found.correct) == rows.rows
    assert examiner.notes == []


def test_predictions_of_others_are_judged_as_the_models_own() -> None:
    """The predictions of a model give its own scores; a mean of two models gives its own."""
    blobs = data.load("blobs")
    splits = [blobs.split("test"), blobs.split("train")]
    examiner = evaluator.Evaluator(splits)
    first = examiner.score_rows(SAMPLES / "model_490.h5")
    second = examiner.score_rows(SAMPLE)
    own = examiner.score_predictions([one.predictions for one in second])  # type: ignore[misc]
    for found, expected in zip(own, second, strict=True):
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        assert found.metrics == expected.metrics
        assert list(found.losses) == list(expected.losses)  # type: ignore[arg-type]
    means = [
        (a.predictions + b.predictions) / 2  # type: ignore[operator]
        for a, b in zip(first, second, strict=True)
    ]
    for found, mean, rows in zip(examiner.score_predictions(means), means, splits, strict=True):
        labels = np.asarray(rows.labels)
        shares = mean[range(rows.rows), labels] / mean.sum(1)
        assert found.loss == pytest.approx(-np.log(shares).mean(), rel=1e-5)
        assert found.metrics["accuracy"] == pytest.approx((mean.argmax(1) == labels).mean())
        assert found.predictions is mean


def test_judging_names_the_accuracy_as_the_model_does(tmp_path: Path) -> None:
    """Both are rounded alike, as they are printed in one column."""
    path = saved(network(), tmp_path / "model.h5", "mse", ["categorical_accuracy"])
    examiner = evaluator.Evaluator([split()])
    (own,) = examiner.score_rows(path)
    (found,) = examiner.score_predictions([own.predictions])  # type: ignore[list-item]
    assert found.metrics == own.metrics


def test_what_cannot_be_judged_is_refused(tmp_path: Path) -> None:
    """Predictions are refused before a model was scored, after an error, and in another shape."""
    examiner = evaluator.Evaluator([split()])
    with pytest.raises(UsageError, match="examined before"):
        examiner.score_predictions([ONE_HOT])
    examiner.score_rows(saved(network(), tmp_path / "model.h5", "mse", None))
    for predictions in ([], [ONE_HOT, ONE_HOT], [ONE_HOT[:4]], [ONE_HOT[:, :2]]):
        with pytest.raises(MismatchError, match="predictions have the shapes"):
            examiner.score_predictions(predictions)
    (tmp_path / "bad.h5").write_bytes(b"no")
    with pytest.raises(FormatError, match=r"bad\.h5"):
        examiner.score_rows(tmp_path / "bad.h5")
    with pytest.raises(MismatchError, match="takes rows of shape"):
        examiner.score_rows(SAMPLE)
    with pytest.raises(UsageError, match="examined before"):
        examiner.score_predictions([ONE_HOT])


def test_an_examiner_checks_its_batch_size_and_tells_each_note_once(tmp_path: Path) -> None:
    """A note that every file of a run has is reported once."""
    with pytest.raises(UsageError, match="--batch-size 0 is out of range"):
        evaluator.Evaluator([split()], batch_size=0)
    network().save(tmp_path / "model.h5")
    examiner = evaluator.Evaluator([split()])
    for _ in range(2):
        (found,) = examiner.score_rows(tmp_path / "model.h5")
    assert examiner.notes == list(found.notes)
    assert len(examiner.notes) == 1


def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list that gets every file from which Keras builds a model."""
    import keras

    built = []
    load = keras.saving.load_model

    def loading(path: Path, **options: Any) -> Any:
        built.append(Path(path))
        return load(path, **options)

    monkeypatch.setattr(keras.saving, "load_model", loading)
    return built


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_a_run_s_model_is_built_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """Only tensors are replaced, also if the learning rate changes from epoch to epoch."""
    model, labels = network(), ONE_HOT
    model.compile("adam", loss="categorical_crossentropy", metrics=["accuracy"])
    paths, expected = [], []
    for epoch in range(3):
        model.optimizer.learning_rate = 0.1 / (1 + epoch)
        model.fit(ROWS, labels, verbose=0)
        model.save(tmp_path / f"model_{epoch}{suffix}")
        paths.append(tmp_path / f"model_{epoch}{suffix}")
        expected.append(model.predict(ROWS, verbose=0))
    built = loads(monkeypatch)
    examiner = evaluator.Evaluator([split()])
    for path, predictions in zip(paths, expected, strict=True):
        (found,) = examiner.score_rows(path)
        assert found.predictions == pytest.approx(predictions, abs=1e-6)
        assert found.notes == ()
    assert built == paths[:1]


def test_a_model_with_a_vocabulary_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """State besides tensors belongs to each file: here, the vocabulary of a layer."""
    import keras

    rows = np.arange(8).reshape(8, 1)
    paths = []
    for known in ([1, 2, 3], [4, 5, 6]):
        keras.utils.set_random_seed(0)
        lookup = keras.layers.IntegerLookup(output_mode="multi_hot", name="lookup")
        lookup.adapt(np.array(known))
        model = keras.Sequential(
            [keras.Input((1,), dtype="int64"), lookup, keras.layers.Dense(3, name="dense")],
            name="model",
        )
        paths.append(tmp_path / f"{known[0]}.keras")
        model.save(paths[-1])
    built = loads(monkeypatch)
    examiner = evaluator.Evaluator([split(rows, CLASSES[:8])])
    first, second = (examiner.score_rows(path)[0].predictions for path in paths)
    assert built == paths
    assert first is not None
    assert second is not None
    assert np.array_equal(first[[0, 4]], first[[0, 0]])  # both unknown
    assert not np.array_equal(second[4], second[0])


def test_models_with_assets_are_built_again_though_described_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Assets of a layer are in no tensor, and in no configuration."""
    network().save(tmp_path / "1.keras")
    with zipfile.ZipFile(tmp_path / "1.keras", "a") as archive:
        archive.writestr("assets/layers/none/words.txt", "one")
    shutil.copy(tmp_path / "1.keras", tmp_path / "2.keras")
    built = loads(monkeypatch)
    examiner = evaluator.Evaluator([split()])
    for name in ("1.keras", "2.keras"):
        examiner.score_rows(tmp_path / name)
    assert built == [tmp_path / "1.keras", tmp_path / "2.keras"]


def test_a_metric_of_ones_own_measures_each_row_of_a_keras_model(tmp_path: Path) -> None:
    """It gets the labels as they were given, and the outputs that Keras predicts."""
    (tmp_path / "own.py").write_text(
        "def sure(labels, predictions):\n    return predictions.max(1) * (labels >= 0)\n"
    )
    rows = data.load("blobs").split()
    found = outcome(SAMPLE, rows, metric=f"{tmp_path}/own.py:sure")
    assert found.predictions is not None
    expected = found.predictions.max(1)
    assert found.own is not None
    assert found.own.divide() == pytest.approx(expected, rel=1e-6)
    assert found.metrics["sure"] == pytest.approx(expected.mean(), rel=1e-6)
    (total,) = evaluator.evaluate(SAMPLE, rows, metric=f"{tmp_path}/own.py:sure")
    assert total.metrics["sure"] == found.metrics["sure"]
