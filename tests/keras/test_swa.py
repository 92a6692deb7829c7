"""StochasticWeightAveraging in a real `fit`: its weights are those of `polyak average`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from polyak_cli import MismatchError, Split, UsageError, average
from polyak_cli.averaging.schemes import SCHEMES
from polyak_cli.callbacks import PolyakCheckpoint, StochasticWeightAveraging
from polyak_cli.pipeline.swa import RUNNING

ROWS = np.random.default_rng(0).normal(size=(24, 4)).astype("float32")
LABELS = np.arange(24) % 3


@keras.saving.register_keras_serializable("tests")
class Counter(keras.layers.Layer):  # type: ignore[misc]  # keras ships no types
    """Counts the batches of training in an integer, and passes its inputs on."""

    def build(self, shape: Any) -> None:
        """Make the count."""
        del shape
        self.seen = self.add_weight(
            shape=(), initializer="zeros", dtype="int32", trainable=False, name="seen"
        )

    def call(self, inputs: Any, training: bool = False) -> Any:
        """Count."""
        if training:
            self.seen.assign_add(1)
        return inputs


def model(policy: str = "float32") -> Any:
    """Return a small classifier with BatchNorm, dropout and a count, as good as untrained."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)
    try:
        built = keras.Sequential(
            [
                keras.Input((4,), name="rows"),
                keras.layers.Dense(5, activation="relu", name="hidden"),
                keras.layers.BatchNormalization(name="norm"),
                Counter(name="count"),
                keras.layers.Dropout(0.2, name="noise"),
                keras.layers.Dense(3, name="scores", dtype="float32"),
            ],
            name="classifier",
        )
    finally:
        keras.config.set_dtype_policy("float32")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    built.compile(keras.optimizers.SGD(0.5, momentum=0.9), loss=loss)
    return built


def fit(trained: Any, *callbacks: Any, **options: Any) -> list[Any]:
    """Train in batches of 8, 3 an epoch, and return the model's weights."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the statistics of 1 BatchNorm layer")
        trained.fit(
            ROWS, LABELS, verbose=0, batch_size=8, shuffle=False, callbacks=callbacks, **options
        )
    values: list[Any] = trained.get_weights()
    return values


def check_same(ours: list[Any], theirs: list[Any]) -> None:
    """Compare bit for bit, types too."""
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert one.tobytes() == other.tobytes()


def test_epochs_are_averaged_as_files_are(tmp_path: Path) -> None:
    """With and without BatchNorm recalibrated, for files in .keras that Keras itself saves."""
    saved = keras.callbacks.ModelCheckpoint(str(tmp_path / "c/{epoch}.keras"))
    swa = StochasticWeightAveraging(start_epoch=2, scheme="linear", recalibrate=ROWS, batch_size=10)
    trained = model()
    ours = fit(trained, saved, swa, epochs=4)
    rows = Split("rows", ROWS, LABELS)
    output = tmp_path / "average.keras"
    average(tmp_path / "c", output, from_epoch=2, scheme="linear", recalibrate=rows, batch_size=10)
    check_same(ours, keras.models.load_model(output, compile=False).get_weights())
    assert (swa.count, swa.notes) == (3, ())
    floats = sum(one.size for one in ours if one.dtype == np.float32)
    assert swa.nbytes == 8 * floats
    seen = next(one for one in ours if one.dtype == np.int32)
    assert int(seen) == 12  # the newest
    # The model is as it was: it trains, and its layers have their own settings.
    norm = trained.get_layer("norm")
    assert norm.momentum == 0.99
    assert "call" not in vars(norm)
    fit(trained, epochs=1)
    assert not np.array_equal(norm.get_weights()[2], ours[4])


def test_steps_are_averaged_as_files_are(tmp_path: Path) -> None:
    """Every two steps, across epochs, for .h5, under mixed precision."""
    output = tmp_path / "average.h5"
    saved = PolyakCheckpoint(tmp_path / "c", output, every_steps=2, last=3, scheme="equal")
    swa = StochasticWeightAveraging(start_step=3, every_steps=2)
    trained = model("mixed_float16")
    ours = fit(trained, saved, swa, epochs=3)
    assert saved.report
    assert [one.epoch for one in saved.report.plan.checkpoints] == [4, 6, 8]
    assert swa.count == 3
    theirs = keras.models.load_model(output, compile=False).get_weights()
    (count,) = (k for k, one in enumerate(ours) if one.dtype == np.int32)
    assert (int(ours.pop(count)), int(theirs.pop(count))) == (9, 8)  # the newest of each
    check_same(ours, theirs)


def test_nothing_is_averaged_silently() -> None:
    """A warning where statistics are averaged, and where training ends too early."""
    swa = StochasticWeightAveraging(every=3)
    trained = model()
    with pytest.warns(UserWarning, match="of 1 BatchNorm layer will be averaged"):
        trained.fit(ROWS, LABELS, verbose=0, epochs=3, callbacks=[swa])
    stop = keras.callbacks.EarlyStopping("loss", min_delta=1e9)
    with pytest.warns(UserWarning, match="training ended before its weights counted"):
        fit(trained, stop, swa, epochs=3)
    with pytest.warns(UserWarning, match="training ended before its weights counted"):
        fit(trained, swa, epochs=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_epoch": 3}, "from epoch 3 on, but fit ends after epoch 2"),
        ({"every": 5}, "from epoch 5 on, but fit ends after epoch 2"),
        ({"start_epoch": 3, "every_steps": 1}, "from epoch 3 on, but fit ends after epoch 2"),
        (
            {"every_steps": 99, "start_epoch": 2},
            r"from step 99 on, but fit ends after step \d+: nothing",
        ),
        ({"every_steps": 2, "start_step": 99}, "from step 100 on, but fit ends after step"),
        ({"every_steps": 4, "start_step": 5}, "from step 8 on, but fit ends after step 6"),
    ],
    ids=str,
)
def test_a_training_that_ends_too_early_is_refused(options: dict[str, Any], message: str) -> None:
    """Before the first epoch, by all counts that can be known then."""
    trained = model()
    before = trained.get_weights()
    with pytest.raises(UsageError, match=message):
        fit(trained, StochasticWeightAveraging(**options), epochs=2)
    check_same(before, trained.get_weights())


def test_rows_that_do_not_fit_the_model_are_refused_before_training() -> None:
    """Not hours later, when the statistics are computed."""
    trained = model()
    before = trained.get_weights()
    with pytest.raises(MismatchError, match=r"but recalibrate has rows of shape \(9,\)"):
        fit(trained, StochasticWeightAveraging(recalibrate=np.zeros((8, 9))), epochs=1)
    check_same(before, trained.get_weights())


def test_a_run_that_diverges_ends_the_training() -> None:
    """NaN is refused with the variable and the moment, and the weights stay those of training."""
    trained = model()
    kernel = trained.get_layer("scores").kernel

    class Break(keras.callbacks.Callback):  # type: ignore[misc]  # keras ships no types
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            del logs
            if epoch == 1:
                kernel.assign(kernel * np.nan)

    with pytest.raises(MismatchError, match=r"scores/kernel' holds nan \(element 0\) at epoch 2"):
        fit(trained, Break(), StochasticWeightAveraging(), epochs=3)
    assert np.isnan(keras.ops.convert_to_numpy(kernel)).all()


@pytest.mark.parametrize("scheme", RUNNING)
def test_running_schemes_are_those_of_files(scheme: str) -> None:
    """The multiplier of a checkpoint is the same whatever comes after it."""
    for count in (1, 2, 7):
        own = [RUNNING[scheme](k) for k in range(1, count + 1)]
        assert own == SCHEMES[scheme].function([1.0] * count)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_epoch": 0}, "start_epoch is 0"),
        ({"every_steps": 0}, "every_steps is 0"),
        ({"every": 1.5}, r"every is 1\.5; expected a whole number"),
        ({"every_steps": True}, "every_steps is True; expected a whole number"),
        ({"start_epoch": "3"}, "start_epoch is '3'; expected a whole number"),
        ({"scheme": ["equal"]}, "scheme is .*; expected equal or linear"),
        ({"recalibrate": "rows.npz"}, "recalibrate is of type str; expected training rows"),
        ({"recalibrate": np.float32(1)}, "recalibrate is of type float32; expected training rows"),
        ({"every": 2, "every_steps": 5}, "every is 2 epochs"),
        ({"start_step": 5}, "give every_steps too"),
        ({"scheme": "exp"}, "scheme is 'exp'; expected equal or linear"),
        ({"recalibrate": ROWS, "batch_size": 1}, "batch-size 1"),
        ({"recalibrate": ROWS[:1]}, "is a single row"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    """Before a model is trained for hours."""
    with pytest.raises((UsageError, MismatchError), match=message):
        StochasticWeightAveraging(**options)


def test_rows_for_a_model_without_batchnorm_are_refused() -> None:
    """Somebody expects that something is done with them."""
    plain = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    plain.compile("sgd", "mse")
    with pytest.raises(UsageError, match="has no BatchNorm layer"):
        plain.fit(
            ROWS, ROWS[:, :3], callbacks=[StochasticWeightAveraging(recalibrate=ROWS)], verbose=0
        )
