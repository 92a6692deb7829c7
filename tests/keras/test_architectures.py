"""`--model ARCH`: files that hold weights only are scored as Keras scores the model they are of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from polyak_cli import average
from polyak_cli.checkpoints import model_files
from polyak_cli.errors import PolyakError
from polyak_cli.evaluation import comparison, data, evaluator
from polyak_cli.pipeline import sweeping
from tests.keras.commands import polyak

RANDOM = np.random.default_rng(11)
ROWS = RANDOM.normal(size=(40, 4)).astype(np.float32)
CLASSES = RANDOM.integers(0, 3, 40)
SPLIT = data.Split("rows.npz", ROWS, CLASSES)
#: What MODULE.py:FUNCTION holds: a model of a class of its own, which no file can describe alone.
MODULE = """
import keras

class Own(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden = keras.layers.Dense(5, "relu")
        self.last = keras.layers.Dense(3, "softmax")

    def build(self, shape):
        self.hidden.build(shape)
        self.last.build((*shape[:-1], 5))

    def call(self, rows):
        return self.last(self.hidden(rows))

def make():
    model = Own()
    model.build((None, 4))
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model

def unbuilt():
    return Own()

def number():
    return 3

def failing():
    raise ValueError("no such network")
"""


def network(width: int = 5) -> Any:
    """Return a model with a layer of each kind that Keras saves differently."""
    steps = [layers.Dense(width, "relu"), layers.BatchNormalization(), layers.Dropout(0.5)]
    last = layers.SpectralNormalization(layers.Dense(3, "softmax"))
    model = keras.Sequential([keras.Input((4,)), *steps, last])
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def save_run(folder: Path, make: Callable[[], Any] = network) -> tuple[Any, list[Path]]:
    """Save the weights of three models that differ; return the last model and the files."""
    model, paths = make(), []
    for epoch in (1, 2, 3):
        for weight in model.trainable_variables:
            weight.assign_add(RANDOM.normal(size=weight.shape))
        paths.append(folder / f"epoch_{epoch}.weights.h5")
        model.save_weights(paths[-1])
    return model, paths


def expected(model: Any, path: Path) -> tuple[float, float]:
    """Return loss and accuracy by Keras's own load_weights and evaluate."""
    # Keras refuses an average without the state of its optimizer.
    model.compile(None, "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.load_weights(path)
    loss, accuracy = model.evaluate(ROWS, CLASSES, 256, 0)
    return loss, accuracy


def module(folder: Path) -> Path:
    """Write the module of the user."""
    path = folder / "own.py"
    path.write_text(MODULE)
    return path


def from_module() -> Any:
    """Return the model of the module, without polyak."""
    names: dict[str, Any] = {}
    exec(compile(MODULE, "own", "exec"), names)  # the test's own text
    return names["make"]()


@pytest.mark.parametrize(
    "kind",
    [
        "keras",
        pytest.param("h5", marks=pytest.mark.slow),
        pytest.param("json", marks=pytest.mark.slow),
    ],
)
def test_an_average_of_weights_is_scored_as_keras_scores_it(tmp_path: Path, kind: str) -> None:
    """The architecture gives layers and loss; every tensor is that of the weights file."""
    model, paths = save_run(tmp_path)
    average(paths, tmp_path / "mean.weights.h5")
    arch = tmp_path / f"arch.{kind}"
    fresh = network()
    if kind == "json":
        arch.write_text(fresh.to_json())
    else:
        fresh.save(arch)
    files = [tmp_path / "mean.weights.h5", *paths]
    found = [*evaluator.evaluate(files, SPLIT, model=arch)]
    for path, score in zip(files, found, strict=True):
        loss, accuracy = expected(model, path)
        assert score.loss == pytest.approx(loss, rel=1e-6)
        assert score.metrics["accuracy"] == pytest.approx(accuracy, rel=1e-6)
        assert score.notes == ()
    assert len({score.loss for score in found}) == 4


@pytest.mark.slow
def test_a_function_of_the_user_gives_a_model_of_his_own_class(tmp_path: Path) -> None:
    """A subclassed model has no description; its loss is that with which it was compiled."""
    model, paths = save_run(tmp_path, from_module)
    done = polyak(
        *("evaluate", tmp_path, "--data", write_rows(tmp_path), "--json"),
        *("--model", f"{module(tmp_path)}:make"),
        cwd=tmp_path,
    )
    scores = json.loads(done.stdout)["models"]
    assert [Path(one["path"]).name for one in scores] == [path.name for path in paths]
    for path, score in zip(paths, scores, strict=True):
        assert score["loss"] == pytest.approx(expected(model, path)[0], rel=1e-6)


def test_a_function_of_the_tensors_serves_the_files_of_keras(tmp_path: Path) -> None:
    """It gets the arrays of weights and of whole models, whose own layers are then not used."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(5), layers.Dense(3)])
    model.save_weights(tmp_path / "a.weights.h5")
    model.save(tmp_path / "a.keras")
    model.save(tmp_path / "a.h5")
    (tmp_path / "plain.py").write_text(
        "def load(tensors):\n"
        "    first, last = [array for array in tensors.values() if array.ndim == 2]\n"
        "    return lambda rows: rows @ first @ last\n"
    )
    first, _, last, _ = model.get_weights()
    numbers = RANDOM.normal(size=(40, 3))
    files = [tmp_path / name for name in ("a.weights.h5", "a.keras", "a.h5")]
    rows = data.Split("rows", ROWS, numbers)
    for score in evaluator.evaluate(files, rows, model=tmp_path / "plain.py:load"):
        assert score.loss == pytest.approx(((ROWS @ first @ last - numbers) ** 2).mean(), rel=1e-5)


def write_rows(folder: Path) -> Path:
    """Write the rows as a data set."""
    path = folder / "rows.npz"
    np.savez(path, x=ROWS, y=CLASSES)
    return path


def test_shards_are_scored_as_one_file(tmp_path: Path) -> None:
    """The index names them, and is found in a folder as one model."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(300), layers.Dense(3, "softmax")])
    model.compile(None, "sparse_categorical_crossentropy")
    model.save(tmp_path / "arch.keras")
    (tmp_path / "run").mkdir()
    model.set_weights([weight + 0.1 for weight in model.get_weights()])
    model.save_weights(tmp_path / "run" / "w.weights.json", max_shard_size=5e-6)
    ((path,), _) = model_files(tmp_path / "run", weights=True)
    assert path.name == "w.weights.json"
    (score,) = evaluator.evaluate(path, SPLIT, model=tmp_path / "arch.keras")
    assert score.loss == pytest.approx(model.evaluate(ROWS, CLASSES, 256, 0), rel=1e-6)


def test_weights_of_keras_2_are_scored(tmp_path: Path) -> None:
    """A legacy .h5 of save_weights() gets its layers from --model, by their order."""
    old = pytest.importorskip("tf_keras")
    made = old.Sequential([old.layers.Dense(3, "softmax", input_shape=(4,))])
    made.save_weights(tmp_path / "legacy.h5")
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, "softmax")])
    model.compile(None, "sparse_categorical_crossentropy")
    model.save(tmp_path / "arch.keras")
    (score,) = evaluator.evaluate(tmp_path / "legacy.h5", SPLIT, model=tmp_path / "arch.keras")
    right = made.predict(ROWS, verbose=0)[np.arange(40), CLASSES]
    assert score.loss == pytest.approx(-np.log(right).mean(), rel=1e-5)


@pytest.mark.slow
def test_weights_are_compared_with_a_whole_model(tmp_path: Path) -> None:
    """A whole model keeps its own layers beside --model, and equal tensors score equally."""
    model, paths = save_run(tmp_path)
    model.save(tmp_path / "whole.keras")
    (one,) = comparison.compare(
        [paths[-1]], tmp_path / "whole.keras", SPLIT, model=tmp_path / "whole.keras"
    ).models
    assert one.gains[0].paired.difference == 0
    (earlier,) = comparison.compare(
        [paths[0]], tmp_path / "whole.keras", SPLIT, model=tmp_path / "whole.keras"
    ).models
    assert earlier.score.loss != one.score.loss


def test_the_vocabulary_is_that_of_the_architecture(tmp_path: Path) -> None:
    """Weights files hold no vocabulary, so Keras has it from the model too."""
    rows = np.array([[70], [80], [90], [70]])
    lookup = layers.IntegerLookup(vocabulary=[70, 80, 90], output_mode="one_hot")
    model = keras.Sequential([keras.Input((1,), dtype="int64"), lookup, layers.Dense(1)])
    model.compile("sgd", "mse")
    model.save(tmp_path / "arch.keras")
    model.set_weights([weight + 1 for weight in model.get_weights()])
    model.save_weights(tmp_path / "a.weights.h5")
    labels = np.arange(4.0)
    (score,) = evaluator.evaluate(
        tmp_path / "a.weights.h5",
        data.Split("codes", rows, labels),
        model=tmp_path / "arch.keras",
    )
    tensor = keras.ops.convert_to_tensor(rows)
    assert score.loss == pytest.approx(np.mean((np.ravel(model(tensor)) - labels) ** 2), rel=1e-6)


def refusal(path: Path, arch: object) -> str:
    """Return the one line with which weights are refused."""
    with pytest.raises(PolyakError) as error:
        list(evaluator.evaluate([path], SPLIT, model=str(arch)))
    text = str(error.value)
    assert len(text.splitlines()) == 1
    return text


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    """Keras would pass over a layer that only the file has; nothing is dropped here."""
    _, paths = save_run(tmp_path)
    network(6).save(tmp_path / "wider.keras")
    assert "tensors of shape" in refusal(paths[0], tmp_path / "wider.keras")
    short = keras.Sequential([keras.Input((4,)), layers.Dense(5, "relu")])
    short.save(tmp_path / "short.keras")
    assert "as in --model" in refusal(paths[0], tmp_path / "short.keras")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("unbuilt", "built"),
        ("number", "is a int, expected a keras.Model"),
        ("failing", "line 30: ValueError: no such network"),
        ("missing", "has no function 'missing'"),
    ],
)
def test_a_function_that_gives_no_such_model_is_one_line(
    tmp_path: Path, function: str, words: str
) -> None:
    """Each mistake is said with its place."""
    from_module().save_weights(tmp_path / "a.weights.h5")
    assert words in refusal(tmp_path / "a.weights.h5", f"{module(tmp_path)}:{function}")


def test_a_bad_architecture_is_one_line(tmp_path: Path) -> None:
    """What is no model is refused before any weights are loaded."""
    _, (path, *_) = save_run(tmp_path)
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "other.json").write_text('{"class_name": "NoSuchLayer", "config": {}}')
    assert "there is no such file" in refusal(path, tmp_path / "none.keras")
    assert "is not a JSON object" in refusal(path, tmp_path / "list.json")
    assert str(tmp_path / "other.json") in refusal(path, tmp_path / "other.json")
    assert "names no function" in refusal(path, module(tmp_path))
    assert "holds weights only" in refusal(path, path)
    renamed = path.rename(tmp_path / "renamed.h5")
    network().save(tmp_path / "arch.keras")
    assert "only with the suffix .weights.h5" in refusal(renamed, tmp_path / "arch.keras")


def test_code_in_an_architecture_does_not_run(tmp_path: Path) -> None:
    """A Lambda layer is refused without --trust-code, in JSON as in a file."""
    model = keras.Sequential([keras.Input((4,)), layers.Lambda(lambda rows: rows), layers.Dense(3)])
    model.save_weights(tmp_path / "a.weights.h5")
    model.save(tmp_path / "arch.keras")
    (tmp_path / "arch.json").write_text(model.to_json())
    for name in ("arch.keras", "arch.json"):
        assert "contains code" in refusal(tmp_path / "a.weights.h5", tmp_path / name)


def test_weights_in_a_folder_are_found_only_with_an_architecture(tmp_path: Path) -> None:
    """Without one they are passed over, as before."""
    _, paths = save_run(tmp_path)
    network().save(tmp_path / "whole_9.keras")
    assert model_files(tmp_path)[0] == [tmp_path / "whole_9.keras"]
    assert model_files(tmp_path, weights=True)[0] == [*paths, tmp_path / "whole_9.keras"]


@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_a_sweep_scores_averages_of_weights(tmp_path: Path, sharded: bool) -> None:
    """Each candidate's loss is Keras's own, with the mean that numpy computes."""
    network().save(tmp_path / "arch.keras")
    run = tmp_path / "run"
    run.mkdir()
    model, paths = save_run(run)
    kept = []
    for epoch, path in enumerate(paths):
        model.load_weights(path)
        kept.append(model.get_weights())
        if sharded:
            path.unlink()
            model.save_weights(run / f"shards_{epoch}.weights.json", max_shard_size=1e-3)
    dataset = data.Dataset("rows", {"train": SPLIT, "test": data.Split("test", ROWS + 1, CLASSES)})
    best = tmp_path / "best.weights.h5"
    found = sweeping.sweep(
        str(run),
        dataset,
        windows="3",
        chosen="equal",
        select_on="train",
        write_best=best,
        model=str(tmp_path / "arch.keras"),
    )
    model.compile(None, "sparse_categorical_crossentropy")
    for row in found.rows:
        if row.candidate.kind == "ensemble":
            continue
        shares = row.candidate.coefficients
        model.set_weights(
            [
                sum(c * w for c, w in zip(shares, own, strict=True))
                for own in zip(*kept, strict=True)
            ]
        )
        loss = model.evaluate(ROWS + 1, CLASSES, 256, 0, return_dict=True)["loss"]
        assert row.scores["reporting"].loss == pytest.approx(loss, rel=1e-5)
    fresh = network()
    fresh.compile(None, "sparse_categorical_crossentropy")
    fresh.load_weights(best)
    loss = fresh.evaluate(ROWS + 1, CLASSES, 256, 0, return_dict=True)["loss"]
    assert found.winner.scores["reporting"].loss == pytest.approx(loss, rel=1e-6)


@pytest.mark.slow
def test_the_command_of_a_sweep_takes_weights(tmp_path: Path) -> None:
    """The command that it prints writes a weights file."""
    network().save(tmp_path / "arch.keras")
    (tmp_path / "run").mkdir()
    save_run(tmp_path / "run")
    done = polyak(
        *("sweep", "run", "--data", write_rows(tmp_path), "--model", "arch.keras"),
        *("--schemes", "equal", "--windows", "3", "-o", "report", "--json"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["winner_command"].split()[-1].endswith(".weights.h5")
