"""Train the small model of the sample run, saving the checkpoints that `polyak` averages.

This module knows one model and one data set.  It knows nothing of averaging.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyak_cli.errors import OutputError, UsageError, shown
from polyak_cli.evaluation import data
from polyak_cli.evaluation.keras_files import import_keras
from polyak_cli.evaluation.quiet import silence_frameworks

LEARNING_RATES = {"sgd": 0.01, "adam": 0.001}
MOMENTUM = 0.9
BATCH_SIZE = 32
_StrPath = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class TrainReport:
    """The result of a training run.

    Attributes:
        output: the folder.
        checkpoints: the model files kept, oldest first.
        log: the file that Keras's CSVLogger wrote.
        history: metric -> its value after each epoch: loss and accuracy on the training points,
            val_loss and val_accuracy on the test points.  Loss is the mean cross-entropy in nats;
            accuracy is the share of points classified correctly, 0 to 1.
        seed: seed of the initial weights and of the order of the points.
        optimizer: sgd or adam.
        learning_rate: learning rate of the optimizer.
    """

    output: Path
    checkpoints: tuple[Path, ...]
    log: Path
    history: Mapping[str, tuple[float, ...]]
    seed: int
    optimizer: str
    learning_rate: float


def train(
    out: _StrPath,
    *,
    epochs: int = 500,
    keep: int = 10,
    seed: int = 0,
    optimizer: str = "sgd",
    learning_rate: float | None = None,
    force: bool = False,
    progress: Callable[[int, Mapping[str, float]], None] | None = None,
) -> TrainReport:
    """Train the sample run on blobs, saving a checkpoint after each of the last epochs.

    The model is ``Dense(25, relu) -> Dense(3, softmax)`` with categorical cross-entropy, trained on
    100 points in batches of 32, and tested on 1,000.  Runs with the same seed on the same machine
    write the same bytes.

    Args:
        out: the folder for ``model_<epoch>.h5``, counted from 0, and ``training.csv``; it is
            created if it is missing.
        epochs: the number of epochs.
        keep: how many of the last epochs leave a checkpoint.
        seed: seed of the initial weights and of the order of the points; 0 to 4294967295.
        optimizer: sgd, with momentum 0.9, or adam.
        learning_rate: by default 0.01 for sgd, 0.001 for adam.
        force: remove the ``model_*.h5`` of an earlier run in the folder first.
        progress: called after each epoch with its number, from 0, and its metrics, with the
            names of the history.

    Returns:
        The files that were written, and the history.

    Raises:
        UsageError: a number is out of range.
        MissingExtraError: keras or tensorflow is not installed.
        OutputError: the folder has checkpoints and ``force`` is not given, or cannot be written.
    """
    out = Path(out)
    rate = _choose_learning_rate(optimizer, learning_rate)
    _check_run(epochs, keep, seed)
    earlier = _list_earlier_checkpoints(out)
    if earlier and not force:
        raise OutputError(
            f"{shown(out)}: already holds checkpoints ({shown(earlier[0].name)}); name another "
            "folder, or use --force to replace them"
        )
    with silence_frameworks() as held_back:
        keras = import_keras("polyak train", ["tensorflow"])  # for tf.data
        points = data.load("blobs")
        keras.utils.set_random_seed(seed)
        model = _build_model(keras, optimizer, rate)
        try:
            out.mkdir(parents=True, exist_ok=True)
            for path in earlier:
                path.unlink()
            saver = _make_saver(keras, out, epochs - keep, progress)
            logger = keras.callbacks.CSVLogger(str(out / "training.csv"))
            history = _fit_model(model, points, epochs, logger, saver)
        except OSError as error:
            why = error.strerror or held_back() or str(error)
            raise OutputError(f"{shown(out)}: cannot be written: {shown(why)}") from error
    log = out / "training.csv"
    return TrainReport(out, tuple(saver.saved), log, history, seed, optimizer, rate)


def _choose_learning_rate(optimizer: str, learning_rate: float | None) -> float:
    if optimizer not in LEARNING_RATES:
        choices = " or ".join(LEARNING_RATES)
        raise UsageError(f"--optimizer {shown(optimizer)} is unknown; expected {choices}")
    rate = LEARNING_RATES[optimizer] if learning_rate is None else learning_rate
    if not 0 < rate < float("inf"):
        raise UsageError(f"--learning-rate {rate:g} is out of range; expected a number above 0")
    return rate


def _check_run(epochs: int, keep: int, seed: int) -> None:
    if epochs < 1:
        raise UsageError(f"--epochs {epochs} is out of range; expected 1 or more")
    if keep < 1:
        raise UsageError(f"--keep {keep} is out of range; expected 1 or more")
    if not 0 <= seed < 2**32:
        raise UsageError(f"--seed {seed} is out of range; expected 0 to {2**32 - 1}")


def _list_earlier_checkpoints(out: Path) -> list[Path]:
    """Return the checkpoints of an earlier run of this command, sorted by name.

    Raises:
        OutputError: the folder is not a folder, or cannot be read.
    """
    try:
        names = sorted(out.iterdir()) if out.exists() else []
    except OSError as error:
        raise OutputError(f"{shown(out)}: is not a folder to write to: {error.strerror}") from None
    return [path for path in names if re.fullmatch(r"model_\d+\.h5", path.name)]


def _build_model(keras: Any, optimizer: str, learning_rate: float) -> Any:
    """Build and compile the model."""
    # Keras would number the names by the models built before in this process; fixed names make the
    # bytes of the files independent of that.
    model = keras.Sequential(
        [
            keras.Input((2,), name="input"),
            keras.layers.Dense(25, activation="relu", name="dense"),
            keras.layers.Dense(3, activation="softmax", name="dense_1"),
        ],
        name="sequential",
    )
    settings = {"sgd": (keras.optimizers.SGD, {"momentum": MOMENTUM}),
                "adam": (keras.optimizers.Adam, {})}  # fmt: skip
    kind, more = settings[optimizer]
    model.compile(
        optimizer=kind(learning_rate=learning_rate, name=optimizer, **more),
        loss="categorical_crossentropy",
        metrics=["accuracy"],
    )
    return model


def _fit_model(
    model: Any, points: data.Dataset, epochs: int, logger: Any, saver: Any
) -> dict[str, tuple[float, ...]]:
    """Run Keras's fit and return its history."""
    import numpy as np
    import tensorflow as tf

    tf.config.experimental.enable_op_determinism()
    # A custom pipeline, for two reasons.  Given arrays, a seeded Keras repeats one order of rows in
    # every epoch (seen in 3.15.1); this one shuffles each time.  And TensorFlow would optimise
    # the pipeline of Keras again in every epoch, which takes six times as long as the epoch.
    options = tf.data.Options()
    options.autotune.enabled = False
    options.experimental_optimization.apply_default_optimizations = False
    rows = {}
    for name, split in points.splits.items():
        one_hot = np.eye(3, dtype=np.float32)[np.asarray(split.labels)]
        features = np.asarray(split.features, np.float32)
        rows[name] = tf.data.Dataset.from_tensor_slices((features, one_hot)).with_options(options)
    try:
        history = model.fit(
            rows["train"].shuffle(points.splits["train"].rows).batch(BATCH_SIZE),
            validation_data=rows["test"].batch(points.splits["test"].rows),
            epochs=epochs,
            callbacks=[logger, saver],
            shuffle=False,  # the pipeline shuffles
            verbose=0,
        )
    finally:  # Keras closes the log only after the last epoch, not if one fails
        if logger.csv_file:
            logger.csv_file.close()
    return {name: tuple(map(float, values)) for name, values in history.history.items()}


def _make_saver(
    keras: Any,
    out: Path,
    first: int,
    progress: Callable[[int, Mapping[str, float]], None] | None,
) -> Any:
    """Return a callback that saves a checkpoint after each epoch, beginning with ``first``."""

    class Saver(keras.callbacks.Callback):  # type: ignore[misc]  # keras ships no types
        """Saves under a hidden name first, so that a partial checkpoint is never visible."""

        def __init__(self) -> None:
            super().__init__()
            self.saved: list[Path] = []

        def on_epoch_end(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
            if epoch >= first:
                hidden = out / f".model_{epoch}.partial.h5"
                try:
                    self.model.save(hidden)
                    self.saved.append(hidden.replace(out / f"model_{epoch}.h5"))
                finally:
                    hidden.unlink(missing_ok=True)
            if progress:
                progress(epoch, dict(logs or {}))

    return Saver()
