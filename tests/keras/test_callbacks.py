"""PolyakCheckpoint in a real `fit`: checkpoints, average, resuming, and what goes wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

from polyak_cli import CheckpointError, MismatchError, OutputError, UsageError, average
from polyak_cli.callbacks import PolyakCheckpoint
from tests.keras.commands import polyak

ROWS = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
LABELS = np.arange(32) % 3


def model() -> Any:
    """Return a small classifier, as good as untrained."""
    keras.utils.set_random_seed(0)
    built = keras.Sequential(
        [
            keras.Input((4,), name="rows"),
            keras.layers.Dense(5, activation="relu", name="hidden"),
            keras.layers.Dense(3, name="scores"),
        ],
        name="classifier",
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    built.compile(optimizer="adam", loss=loss, metrics=["accuracy"])
    return built


def fit(callback: PolyakCheckpoint, *others: Any, trained: Any = None, **options: Any) -> Any:
    """Train with the callback and return the model."""
    trained = trained or model()
    trained.fit(ROWS, LABELS, verbose=0, callbacks=[callback, *others], **options)
    return trained


def files(folder: Path) -> list[str]:
    """Return all names, hidden ones too."""
    return sorted(os.listdir(folder))


@pytest.mark.parametrize(
    "suffix",
    [
        ".h5",
        pytest.param(".keras", marks=pytest.mark.slow),
        pytest.param(".weights.h5", marks=pytest.mark.slow),
    ],
)
def test_the_output_is_that_of_average_to_the_byte(tmp_path: Path, suffix: str) -> None:
    """Of the last checkpoints, in every format that Keras saves, with the API and the command."""
    output = tmp_path / f"latest{suffix}"
    callback = PolyakCheckpoint(tmp_path / "run/ckpts", output, last=3, alpha=3.0)
    fit(callback, epochs=5)
    assert files(tmp_path / "run/ckpts") == [f"model_0{k}{suffix}" for k in range(1, 6)]
    reference = tmp_path / f"reference{suffix}"
    average(tmp_path / "run/ckpts", reference, last=3, scheme="exp", alpha=3.0)
    assert output.read_bytes() == reference.read_bytes()
    options = ("--last", "3", "--scheme", "exp", "--alpha", "3", "--force", "-o", reference)
    assert polyak("average", "run/ckpts", *options, cwd=tmp_path).returncode == 0
    assert output.read_bytes() == reference.read_bytes()
    assert callback.report
    assert callback.report.output == output


def test_every_epoch_s_output_is_whole_and_that_of_average(tmp_path: Path) -> None:
    """From the first one on, when there are fewer checkpoints than asked for."""
    seen: list[bytes] = []

    class Look(keras.callbacks.Callback):  # type: ignore[misc]  # keras ships no types
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            del epoch, logs
            seen.append((tmp_path / "latest.h5").read_bytes())

    fit(PolyakCheckpoint(tmp_path / "c", tmp_path / "latest.h5", last=2), Look(), epochs=4)
    paths = [tmp_path / f"c/model_0{k}.h5" for k in range(1, 5)]
    for k, content in enumerate(seen, start=1):
        reference = tmp_path / "reference.h5"
        average(paths[:k], reference, last=min(k, 2), scheme="exp", force=True)
        assert content == reference.read_bytes()
    assert len(seen) == 4


def test_keras_opens_the_output_and_it_predicts(tmp_path: Path) -> None:
    """The mean of the newest weights, by hand."""
    pattern = tmp_path / "c/{epoch}-{loss:.2f}.keras"
    output = tmp_path / "latest.keras"
    fit(PolyakCheckpoint(pattern, output, last=2, scheme="equal"), epochs=3)
    newest = sorted(tmp_path.glob("c/*.keras"))[-2:]
    weights = [keras.models.load_model(path).get_weights() for path in newest]
    opened = keras.models.load_model(output, compile=False)
    for ours, *theirs in zip(opened.get_weights(), *weights, strict=True):
        np.testing.assert_array_equal(ours, np.mean(theirs, 0, np.float64).astype("float32"))
    assert opened.predict(ROWS, verbose=0).shape == (32, 3)


@pytest.mark.slow
def test_a_resumed_training_goes_on_from_its_checkpoints(tmp_path: Path) -> None:
    """With initial_epoch, in a new process or not: the result is that of the whole run."""
    output = tmp_path / "latest.h5"
    trained = fit(PolyakCheckpoint(tmp_path / "c", output, last=4), epochs=3)
    fit(
        PolyakCheckpoint(tmp_path / "c", output, last=4), trained=trained, initial_epoch=3, epochs=5
    )
    average(tmp_path / "c", tmp_path / "reference.h5", last=4, scheme="exp")
    assert output.read_bytes() == (tmp_path / "reference.h5").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("begin", [pytest.param(0, marks=pytest.mark.soak), 2])
def test_later_checkpoints_of_a_run_that_is_repeated_do_not_count(
    tmp_path: Path, begin: int
) -> None:
    """They belong to the older run until their epoch is trained again."""
    output = tmp_path / "latest.h5"
    callback = PolyakCheckpoint(tmp_path / "c", output, last=10)
    fit(callback, epochs=5)
    fit(callback, initial_epoch=begin, epochs=begin + 2)
    assert callback.report
    chosen = [checkpoint.path.name for checkpoint in callback.report.plan.checkpoints]
    assert chosen == [f"model_0{k}.h5" for k in range(1, begin + 3)]
    assert len(files(tmp_path / "c")) == 5


def test_only_every_so_many_epochs_are_saved(tmp_path: Path) -> None:
    """Counted from 1, as in the names."""
    fit(PolyakCheckpoint(tmp_path / "c", tmp_path / "latest.h5", every=2, last=2), epochs=5)
    assert files(tmp_path / "c") == ["model_02.h5", "model_04.h5"]


def test_steps_are_saved_when_keras_saves_them(tmp_path: Path) -> None:
    """ModelCheckpoint with the same save_freq has the same values; the names order the steps."""
    keras_names = str(tmp_path / "k/{epoch}-{batch}.weights.h5")
    others = keras.callbacks.ModelCheckpoint(keras_names, save_freq=3, save_weights_only=True)
    output = tmp_path / "latest.weights.h5"
    callback = PolyakCheckpoint(tmp_path / "c", output, last=3, scheme="power", every_steps=3)
    fit(callback, others, epochs=3, batch_size=8)
    assert files(tmp_path / "c") == [f"model_step_{k:06d}.weights.h5" for k in (3, 6, 9, 12)]
    same = ("1-3", "2-2", "3-1", "3-4")
    for own, name in zip(files(tmp_path / "c"), same, strict=True):
        paths = tmp_path / "c" / own, tmp_path / f"k/{name}.weights.h5"
        for ours, theirs in zip(*map(weights, paths), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    average(tmp_path / "c", tmp_path / "reference.weights.h5", last=3, scheme="power")
    assert output.read_bytes() == (tmp_path / "reference.weights.h5").read_bytes()
    assert callback.report
    assert [one.epoch for one in callback.report.plan.checkpoints] == [6, 9, 12]


def weights(path: Path) -> list[Any]:
    """Return the arrays of a file of weights, without the optimizer's."""
    found: list[Any] = []
    with h5py.File(path) as file:
        file.visititems(
            lambda name, one: (
                found.append(one[()])
                if isinstance(one, h5py.Dataset) and not name.startswith("optimizer")
                else None
            )
        )
    assert len(found) == 4
    return found


def test_a_resumed_training_counts_its_steps_on(tmp_path: Path) -> None:
    """From initial_epoch times the batches of an epoch; later steps are an older run's."""

    def train(**options: Any) -> PolyakCheckpoint:
        callback = PolyakCheckpoint(
            tmp_path / "{step}-{loss:.1f}.h5", tmp_path / "latest.h5", last=2, save_freq=3, keep=3
        )
        fit(callback, batch_size=8, **options)
        return callback

    train(epochs=2)
    steps = [int(name.partition("-")[0]) for name in files(tmp_path) if name != "latest.h5"]
    assert sorted(steps) == [3, 6]
    report = train(initial_epoch=1, epochs=3).report  # step 6 lies after the first epoch's 4
    assert report
    assert [one.epoch for one in report.plan.checkpoints] == [9, 12]
    steps = [int(name.partition("-")[0]) for name in files(tmp_path) if name != "latest.h5"]
    assert sorted({*steps}) == [6, 9, 12]


def test_steps_that_run_in_one_go_are_saved_at_the_next_report(tmp_path: Path) -> None:
    """Keras reports the last batch of an execution only, and the names tell the truth."""
    trained = model()
    trained.compile("sgd", trained.loss, steps_per_execution=2)
    callback = PolyakCheckpoint(tmp_path / "c", tmp_path / "latest.h5", every_steps=3)
    fit(callback, trained=trained, epochs=3, batch_size=8)
    saved = [int(name[11:17]) for name in files(tmp_path / "c")]
    assert saved == [4, 6, 10, 12]


def test_a_training_without_a_checkpoint_warns(tmp_path: Path) -> None:
    """More steps than the training has: nothing is saved, and nobody should look for an average."""
    callback = PolyakCheckpoint(tmp_path / "c", tmp_path / "latest.h5", every_steps=500)
    with pytest.warns(
        UserWarning, match="ended before a checkpoint was saved; there is no average"
    ):
        fit(callback, batch_size=8)
    assert files(tmp_path / "c") == []


def test_steps_before_a_resumed_epoch_must_be_known(tmp_path: Path) -> None:
    """A generator has no length, so nobody knows at which step epoch 2 begins."""
    callback = PolyakCheckpoint(tmp_path / "c", tmp_path / "latest.h5", every_steps=3)
    batches = ((ROWS[:8], LABELS[:8]) for _ in range(4))
    with pytest.raises(UsageError, match="give steps_per_epoch to fit"):
        model().fit(
            batches, initial_epoch=1, epochs=2, shuffle=False, callbacks=[callback], verbose=0
        )


@pytest.mark.slow
def test_older_checkpoints_are_deleted_when_asked(tmp_path: Path) -> None:
    """Those of this run only, and never one that is averaged."""
    (tmp_path / "c").mkdir()
    (tmp_path / "c/other.h5").write_bytes(b"somebody's")
    callback = PolyakCheckpoint(tmp_path / "c", tmp_path / "c/latest.h5", last=2, keep=3)
    fit(callback, epochs=6)
    assert files(tmp_path / "c") == [
        "latest.h5",
        "model_04.h5",
        "model_05.h5",
        "model_06.h5",
        "other.h5",
    ]
    average(tmp_path / "c", tmp_path / "reference.h5", last=2, scheme="exp", exclude=["other.h5"])
    assert (tmp_path / "c/latest.h5").read_bytes() == (tmp_path / "reference.h5").read_bytes()


def test_an_exception_in_training_leaves_the_last_output_whole(tmp_path: Path) -> None:
    """And no hidden file, wherever it comes from: a batch, or the saving itself."""

    class Stop(keras.callbacks.Callback):  # type: ignore[misc]  # keras ships no types
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            del batch, logs
            if len(files(tmp_path / "c")) == 2:
                raise KeyboardInterrupt

    output = tmp_path / "latest.h5"
    with pytest.raises(KeyboardInterrupt):
        fit(PolyakCheckpoint(tmp_path / "c", output, last=2), Stop(), epochs=9)
    average(tmp_path / "c", tmp_path / "reference.h5", last=2, scheme="exp")
    before = output.read_bytes()
    assert before == (tmp_path / "reference.h5").read_bytes()

    trained = model()
    saved = trained.save

    def save(path: Path) -> None:
        saved(path)
        raise OSError("the disk has gone")

    trained.save = save
    with pytest.raises(OSError, match="the disk has gone"):
        fit(
            PolyakCheckpoint(tmp_path / "c", output, last=2),
            trained=trained,
            initial_epoch=2,
            epochs=3,
        )
    assert files(tmp_path / "c") == ["model_01.h5", "model_02.h5"]
    assert output.read_bytes() == before
    assert files(tmp_path) == ["c", "latest.h5", "reference.h5"]


def test_a_run_that_diverges_is_reported(tmp_path: Path) -> None:
    """Values that cannot be averaged end the training, and the last output stays."""
    output = tmp_path / "latest.h5"
    trained = fit(PolyakCheckpoint(tmp_path / "c", output), epochs=1)
    before = output.read_bytes()
    trained.set_weights([np.full_like(values, np.nan) for values in trained.get_weights()])
    with pytest.raises(MismatchError, match=r"model_02\.h5"):
        fit(PolyakCheckpoint(tmp_path / "c", output), trained=trained, initial_epoch=1, epochs=2)
    assert output.read_bytes() == before


def test_an_output_that_is_no_average_is_refused_before_training(tmp_path: Path) -> None:
    """It may be anything; force says that it may go."""
    output = tmp_path / "latest.h5"
    model().save(output)
    with pytest.raises(OutputError, match="was not written by polyak"):
        fit(PolyakCheckpoint(tmp_path / "c", output), epochs=1)
    fit(PolyakCheckpoint(tmp_path / "c", output, force=True), epochs=1)
    assert files(tmp_path / "c") == ["model_01.h5"]


def test_an_epoch_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    """It is not known which of the two belongs to the run."""
    (tmp_path / "1-0.50.h5").touch()
    (tmp_path / "1-0.60.h5").touch()
    callback = PolyakCheckpoint(tmp_path / "{epoch}-{loss:.2f}.h5", tmp_path / "latest.h5")
    with pytest.raises(CheckpointError, match=r"1-0\.50\.h5 and .*1-0\.60\.h5 are both epoch 1"):
        fit(callback, initial_epoch=1, epochs=2)


def test_a_metric_that_is_missing_is_named(tmp_path: Path) -> None:
    """With those that there are."""
    callback = PolyakCheckpoint(tmp_path / "{epoch}-{val_loss:.2f}.h5", tmp_path / "latest.h5")
    with pytest.raises(UsageError, match=r"there is no metric 'val_loss'; choose from .*loss"):
        fit(callback, epochs=1)


@pytest.mark.parametrize(
    ("checkpoints", "options", "message"),
    [
        ("c/model.h5", {}, "has no {epoch}"),
        ("c/{loss}.h5", {}, "has no {epoch}"),
        ("c/{epoch}", {}, "has no suffix"),
        ("c", {"last": 0}, "last is 0"),
        ("c", {"every": 0}, "every is 0"),
        ("c", {"every_steps": 0}, "every_steps is 0"),
        ("c", {"every_steps": 1.5}, r"every_steps is 1\.5; expected a whole number"),
        ("c", {"last": None}, "last is None; expected a whole number"),
        ("c", {"last": "3"}, "last is '3'; expected a whole number"),
        ("c", {"keep": float("nan")}, "keep is nan; expected a whole number"),
        ("c", {"save_freq": 0}, "save_freq is 0"),
        ("c", {"every": 2, "every_steps": 5}, "every is 2 epochs, but .* every 5 steps"),
        ("c", {"save_freq": 5, "every_steps": 5}, "mean the same"),
        ("c", {"save_freq": "batch"}, "save_freq is 'batch'; expected 'epoch' or a number"),
        ("c", {"save_freq": True}, "save_freq is 'True'; expected 'epoch' or a number"),
        ("c/{epoch}.h5", {"every_steps": 5}, r"has \{epoch\} in its name, but .* by step"),
        ("c/{step}-{batch}.h5", {"every_steps": 5}, r"has \{batch\} in its name, but .* by step"),
        ("c/{loss}.h5", {"every_steps": 5}, r"has no \{step\}"),
        ("c/{step}.h5", {}, r"has \{step\} in its name, but .* by epoch"),
        ("c", {"last": 5, "keep": 4}, "keep is 4, but last is 5"),
        ("c", {"scheme": "best"}, "unknown scheme"),
        ("c", {"scheme": "equal", "alpha": 2.0}, "alpha"),
        ("c", {"scheme": "window"}, "takes running means that belong together"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_at_once(
    checkpoints: str, options: dict[str, Any], message: str
) -> None:
    """Before a model is trained for hours."""
    with pytest.raises(UsageError, match=message):
        PolyakCheckpoint(checkpoints, **options)


@pytest.mark.parametrize("options", [{"min_spacing": 2}, {"coefficients": [1, 2]}, {"lats": 3}])
def test_options_that_it_does_not_have_are_refused_at_once(options: dict[str, Any]) -> None:
    """Too few checkpoints for a spacing would end the training in its first epochs."""
    with pytest.raises(TypeError, match=rf"has no option {next(iter(options))}: .* polyak watch"):
        PolyakCheckpoint("c", **options)
