"""Keras models: scored on data, run for BatchNorm's statistics, and trained for the sample run.

The only module that imports keras, and only inside its functions.  Models are loaded in Keras's
safe mode and compiled here from what the file says of its training, through names that Keras knows;
nothing that a file names is imported.  Knows nothing of averaging, and leaves what a file may hold
at all to `formats`, which looks at it at arm's length before Keras opens it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import math
import os
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from polyak_cli import data
from polyak_cli.errors import (
    FormatError,
    MismatchError,
    MissingExtraError,
    OutputError,
    PolyakError,
    UsageError,
    shown,
)
from polyak_cli.quiet import hushed
from polyak_cli.tensors import Float64, Table

#: Older ones run the code of a Lambda layer in any .h5 file, safe mode or not: CVE-2025-9905.
LEAST_KERAS = (3, 11, 3)
LEARNING_RATES = {"sgd": 0.01, "adam": 0.001}
MOMENTUM = 0.9
BATCH_SIZE = 32
_LONGEST_CONFIG = 64 << 20  # bytes of a config.json
_StrPath = str | os.PathLike[str]
_Answer = TypeVar("_Answer")


def _require_keras(command: str) -> None:
    """Look at what is installed, before any of its code runs.

    Raises:
        MissingExtraError: keras or tensorflow is not installed.
        PolyakError: this Keras is too old to open a stranger's file.
    """
    try:
        version = importlib.metadata.version("keras")
    except importlib.metadata.PackageNotFoundError:
        raise MissingExtraError(command, "tensorflow") from None
    if find_spec("tensorflow") is None:
        raise MissingExtraError(command, "tensorflow")
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < LEAST_KERAS:
        least = ".".join(map(str, LEAST_KERAS))
        raise PolyakError(
            f"{command} needs Keras {least} or newer, found {shown(version)}, which runs code "
            "hidden in .h5 files (CVE-2025-9905): pip install --upgrade 'polyak[tensorflow]'"
        )


def _keras(command: str) -> Any:
    """Import keras and return it, checked as `_require_keras` does."""
    _require_keras(command)
    import keras

    return keras


# --- scoring -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Score:
    """What a model makes of some rows.

    Attributes:
        path: the model file.
        loss: as Keras computes it, the mean over the rows of the loss the file was trained with, in
            that loss's own unit (nats for a cross-entropy); None where it is not known.
        metrics: name -> value, the model's own; and accuracy, the share of rows classified right, 0
            to 1, where labels are classes.
        rows: how many were scored.
        notes: what the user should know, a line each.
    """

    path: Path
    loss: float | None
    metrics: Mapping[str, float]
    rows: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a model makes of some rows, taken together and one by one.

    Attributes:
        loss: as in `Score`.
        metrics: as in `Score`.
        losses: (rows,) float64, the loss of each row, whose mean is the loss; None where the loss
            is not known, or is not the mean of what single rows contribute.
        correct: (rows,) bool, whether its class was told right, where labels are classes, one a
            row; else None.
        predictions: (rows, ...) what a model of one output gave; None for one of several.
        loss_name: which loss it is; losses compare only with those of the same name.
        notes: what the user should know, a line each.
    """

    loss: float | None
    metrics: Mapping[str, float]
    losses: data.Array | None
    correct: data.Array | None
    predictions: data.Array | None
    loss_name: str = ""
    notes: tuple[str, ...] = ()


def evaluate(
    paths: _StrPath | Sequence[_StrPath],
    rows: data.Split,
    *,
    batch_size: int = 256,
    trust_code: bool = False,
) -> Iterator[Score]:
    """Score model files on the same rows, one after the other.

    Every file is looked at, at arm's length, before this returns; each is loaded and scored when
    the iterator comes to it.  Labels are given to each loss as it wants them: classes as integers
    or one-hot.

    >>> rows = Split("my rows", x, y)                                     # doctest: +SKIP
    >>> [score.metrics["accuracy"] for score in evaluate("final.h5", rows)]  # doctest: +SKIP

    Args:
        paths: whole-model ``.h5``, ``.hdf5`` or ``.keras`` files, or one of them; those of a folder
            are found by ``model_files``.
        rows: features, one array (rows, ...) for each input of the model, and labels, one for each
            output: classes (rows,) from 0, one-hot (rows, classes), or numbers to predict
            (rows, ...).  ``polyak_cli.data.load("blobs").split("test")`` gives those of ``--data``.
        batch_size: rows at a time; changes the speed, and the results only by rounding.
        trust_code: run the code that a file carries in a Lambda layer.

    Returns:
        An iterator with a score for each file, in the order given.

    Raises:
        UsageError: the batch size is out of range.
        MissingExtraError: keras or tensorflow is not installed.
        FormatError: a file is damaged or foreign, or holds weights without an architecture.
        MismatchError: the rows do not fit the model; raised when the iterator comes to it.
        PolyakError: Keras is too old, or cannot load a model, or the model carries code; the last
            two are raised when the iterator comes to it.
    """
    examiner = Examiner([rows], batch_size=batch_size, trust_code=trust_code)
    # A single string is a sequence of strings too: of its letters.
    several = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    files = [Path(path) for path in several]
    examiner.look(files)
    return (score for path in files for score in examiner.scores(path))


class Examiner:
    """Asks one model file after the other about the same rows.

    Files of one description share a model, its compiled functions and the fitted rows: only their
    tensors are exchanged.

    Attributes:
        notes: what the user should know of the files so far, a line each, each once.
    """

    def __init__(
        self, splits: Sequence[data.Split], *, batch_size: int = 256, trust_code: bool = False
    ) -> None:
        """Take the rows; no file is opened yet.

        Args:
            splits: features and labels, as for `evaluate`.
            batch_size: rows at a time.
            trust_code: run the code that a file carries in a Lambda layer.

        Raises:
            UsageError: the batch size is out of range.
            MissingExtraError: keras or tensorflow is not installed.
            PolyakError: Keras is too old.
        """
        if batch_size < 1:
            raise UsageError(f"--batch-size {batch_size} is out of range; expected 1 or more")
        _require_keras("polyak evaluate")
        self.notes: list[str] = []
        self._splits = tuple(splits)
        self._batch_size = batch_size
        self._trust_code = trust_code
        self._described: dict[Path, _Description] = {}
        self._scorer: _Scorer | None = None
        self._told: list[_Told] = []

    def look(self, paths: Sequence[Path]) -> None:
        """Look at files at arm's length before the first is loaded, several at a time.

        What is asked of a file next relies on it, once; a file that is written anew after that is
        looked at again.

        Raises:
            FormatError: a file is damaged or foreign, or holds weights without an architecture.
        """
        hdf5 = [path for path in paths if path.suffix != ".keras" or not _is_zip(path)]
        self._described.update(zip(hdf5, _described_hdf5(hdf5), strict=True))
        for path in paths:
            if path not in self._described:
                self._described[path] = _described_zip(path)

    def scores(self, path: Path) -> list[Score]:
        """Return the score of a file on each split; raises as `outcomes` does."""
        found, notes = self._asked(path, _Scorer.measured)
        return [
            Score(path, loss, metrics, split.rows, notes)
            for split, (loss, metrics) in zip(self._splits, found, strict=True)
        ]

    def outcomes(self, path: Path) -> list[Outcome]:
        """Return what the model of a file makes of each split, and of each of its rows.

        Raises:
            FormatError: the file is damaged or foreign, or holds weights without an architecture.
            MismatchError: the rows do not fit the model.
            PolyakError: Keras cannot load or score the model, or it carries code.
        """
        found, notes = self._asked(path, _Scorer.outcome)
        self._told = [told for _, told in found]
        return [replace(outcome, notes=(*notes, *outcome.notes)) for outcome, _ in found]

    def judged(self, predictions: Sequence[data.Array]) -> list[Outcome]:
        """Score predictions that somebody averaged, as those of the model examined last are.

        Their loss is the mean of the rows' losses, without the penalty of regularizers, which
        belongs to a model's tensors.

        Args:
            predictions: one array for each split, shaped like the model's own.

        Raises:
            UsageError: `outcomes` was not asked before, or the model has several outputs.
            MismatchError: the shapes are not those of the model's own predictions.
        """
        scorer = self._scorer
        if scorer is None or not self._told or any(told.shape is None for told in self._told):
            raise UsageError(
                "predictions are scored as those of a model of one output that was examined before"
            )
        if [array.shape for array in predictions] != [told.shape for told in self._told]:
            raise MismatchError(
                f"predictions have the shapes {[array.shape for array in predictions]}; expected "
                f"those of the model, {[told.shape for told in self._told]}"
            )
        return [
            scorer.judged(part, array, told, self._batch_size)
            for part, array, told in zip(scorer.parts, predictions, self._told, strict=True)
        ]

    def _asked(
        self, path: Path, question: Callable[[_Scorer, _Part, int], _Answer]
    ) -> tuple[list[_Answer], tuple[str, ...]]:
        """Load a file and ask its model about each split; return the answers and notes."""
        path = Path(path)
        if path not in self._described:
            self.look([path])
        description = self._described.pop(path)
        with hushed():
            keras = _keras("polyak evaluate")
        earlier, self._scorer, self._told = self._scorer, None, []  # nothing half loaded stays
        with hushed() as held_back, _noted() as warned:
            with _keras_errors(path, f"cannot load it{_writer(description)}", held_back):
                if earlier and earlier.description == description and not description.assets:
                    scorer = earlier
                    scorer.model.load_weights(path)
                    model = None
                else:
                    model = keras.saving.load_model(
                        path, compile=False, safe_mode=not self._trust_code
                    )
            if model is not None:
                scorer = _Scorer.prepared(keras, path, model, description, self._splits)
            answers = []
            for part in scorer.parts:
                with _keras_errors(path, f"cannot score it on {part.source}", held_back):
                    answers.append(question(scorer, part, self._batch_size))
        self._scorer = scorer
        notes = (*scorer.notes, *warned)
        self.notes += [note for note in notes if note not in self.notes]
        return answers, notes


def _described_hdf5(paths: Sequence[Path]) -> Iterator[_Description]:
    """Yield what each file says of its model, having refused what Keras must not or cannot open."""
    from polyak_cli import formats

    for table in formats.scan(paths, jobs=4):
        _check_architecture(table)
    for path, texts in zip(paths, formats.descriptions(paths), strict=True):
        _check_suffix(path)
        architecture, training, keras = texts
        yield _Description(architecture, _measuring(path, training), keras)


def _check_architecture(table: Table) -> None:
    """Refuse a file of which Keras could not build a model."""
    if not table.config:
        raise FormatError(
            f"{shown(table.path)}: holds weights only, no architecture; expected a whole "
            "model: save it with model.save()"
        )


def _check_suffix(path: Path) -> None:
    """Refuse an HDF5 file that Keras would take for something else."""
    from polyak_cli import formats

    if path.suffix not in formats.module("hdf5").SUFFIXES:
        raise FormatError(
            f"{shown(path)}: is an HDF5 file, which Keras opens only by the suffix .h5 or "
            ".hdf5; rename it"
        )


def _is_zip(path: Path) -> bool:
    try:
        return path.is_file() and zipfile.is_zipfile(path)
    except OSError as error:
        raise FormatError(f"{shown(path)}: cannot be read: {error.strerror}") from None


class _Part(NamedTuple):
    """The rows of one split, made to fit a model."""

    source: str
    features: data.Arrays
    labels: data.Arrays


class _Told(NamedTuple):
    """What a model could tell of the single rows of a split."""

    shape: tuple[int, ...] | None  # of its predictions
    losses: bool
    accuracy: str | None  # the name of the metric


@dataclass(frozen=True, slots=True)
class _Scorer:
    """A compiled model with the rows made to fit it."""

    description: _Description
    model: Any
    parts: tuple[_Part, ...]
    has_loss: bool
    row_wise: _RowWise
    notes: tuple[str, ...]

    @classmethod
    def prepared(
        cls,
        keras: Any,
        path: Path,
        model: Any,
        description: _Description,
        splits: Sequence[data.Split],
    ) -> _Scorer:
        """Compile a loaded model and fit the rows to it."""
        known = _Known(keras, [])
        text = description.training
        training = _parsed(path, text, "training configuration") if text else {}
        if not training:
            known.notes.append("holds no training configuration: the loss it had is not known")
        outputs = _output_names(model)
        loss = known.nested(training.get("loss"), known.loss, "loss")
        metrics, weighted = (
            _by_output(known.nested(training.get(which), known.metric, "metric"), outputs)
            for which in ("metrics", "weighted_metrics")
        )
        has_loss = bool(_flat(loss))
        weights = _plain(training.get("loss_weights")) if has_loss else None
        parts, right = _fitted_parts(keras, path, model, splits, loss, metrics)
        row_wise = _RowWise(keras, _row_losses(keras, outputs, loss, weights), right, outputs)
        if right and not _own_accuracy(metrics):
            metrics = [*_flat(metrics), keras.metrics.MeanMetricWrapper(right, name="accuracy")]
        if not has_loss and not _flat(metrics):
            known.notes.append("nothing to measure: no loss, no metric, and no classes as labels")
        with _keras_errors(path, "cannot compile it", lambda: ""):
            model.compile(
                optimizer=None,  # Keras would look for its state in every .keras file
                loss=loss if has_loss else [_no_loss(keras)] * len(outputs),
                loss_weights=weights,
                metrics=metrics,
                weighted_metrics=weighted,
            )
        return cls(description, model, parts, has_loss, row_wise, tuple(known.notes))

    def measured(self, part: _Part, batch_size: int) -> tuple[float | None, dict[str, float]]:
        """Return loss and metrics."""
        result = self.model.evaluate(
            part.features, part.labels, batch_size=batch_size, verbose=0, return_dict=True
        )
        metrics = {name: _shortest(value) for name, value in result.items()}
        loss = metrics.pop("loss", None)
        return (loss if self.has_loss else None), metrics

    def outcome(self, part: _Part, batch_size: int) -> tuple[Outcome, _Told]:
        """Return loss and metrics, and what can be told of each row in accordance with them."""
        loss, metrics = self.measured(part, batch_size)
        predicted = self.model.predict(part.features, batch_size=batch_size, verbose=0)
        outputs = self.row_wise.ordered(predicted)
        losses, correct = self.row_wise.told(part.labels, outputs, batch_size)
        notes = []
        if losses is not None:
            losses += _penalty(self.row_wise.keras, self.model)
        # Losses that look at a batch as a whole, masks, and what layers add are in Keras's only.
        if losses is not None and not _agree(losses.mean(), loss, 1e-3):
            losses = None
            notes.append("its loss is not the mean of the losses of single rows")
        name = next((n for n in metrics if "acc" in n.lower() and "top" not in n.lower()), None)
        if correct is not None and name and not _agree(correct.mean(), metrics[name], 1e-3):
            correct = None
            notes.append(f"its metric {shown(name, 60)} is not the share of rows told right")
        only = outputs[0] if len(outputs) == 1 else None
        told = _Told(
            None if only is None else only.shape,
            losses is not None,
            None if correct is None else name or "accuracy",
        )
        loss_name = self.row_wise.loss_name
        return Outcome(loss, metrics, losses, correct, only, loss_name, tuple(notes)), told

    def judged(self, part: _Part, output: data.Array, told: _Told, batch_size: int) -> Outcome:
        """Return what can be told of others' predictions from each row."""
        import numpy as np

        losses, correct = self.row_wise.told(part.labels, [output], batch_size)
        losses = losses if told.losses else None
        loss = None if losses is None else _shortest(float(np.float32(losses.mean())))
        metrics = {}
        if told.accuracy and correct is not None:
            metrics[told.accuracy] = _shortest(float(np.float32(correct.mean())))
        correct = correct if told.accuracy else None
        return Outcome(loss, metrics, losses, correct, output, self.row_wise.loss_name)


def _agree(mean: float, keras: float | None, tolerance: float) -> bool:
    """Tell whether a mean is what Keras, which adds up in float32, says; NaN agrees with NaN."""
    if keras is None or mean != mean or keras != keras:
        return keras is not None and mean != mean and keras != keras
    return math.isclose(mean, keras, rel_tol=tolerance, abs_tol=tolerance)


def _fitted_parts(
    keras: Any, path: Path, model: Any, splits: Sequence[data.Split], loss: Any, metrics: Any
) -> tuple[tuple[_Part, ...], Callable[[Any, Any], Any] | None]:
    """Return the rows as the model wants them, and what tells whether their class is right."""
    parts, all_classes = [], True
    for split in splits:
        _check_features(path, model, split)
        labels, classes = _fitted_labels(path, split, model, loss, metrics)
        parts.append(_Part(split.source, split.features, labels))
        all_classes &= classes
    right = _right(keras, model, loss, metrics, parts[0].labels) if all_classes and parts else None
    return tuple(parts), right


def _shortest(value: float) -> float:
    """Return the shortest number that is the same float32, where Keras computed in float32.

    792 right of 1,000 are 0.792, not 0.7919999957084656, which a gate at 0.792 would refuse.
    """
    import numpy as np

    single = np.float32(value)
    return float(str(single)) if float(single) == float(value) else float(value)


def _no_loss(keras: Any) -> Callable[[Any, Any], Any]:
    """Return a loss of zero: Keras measures nothing without one."""

    def no_loss(_: Any, predicted: Any) -> Any:
        return keras.ops.zeros_like(predicted[..., 0])

    return no_loss


@contextlib.contextmanager
def _noted() -> Iterator[list[str]]:
    """Collect warnings, which would reach the terminal as two lines of somebody's source."""
    lines: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for category in (DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)
        yield lines
    lines += dict.fromkeys(f"Keras warns: {shown(warning.message)}" for warning in caught)


@contextlib.contextmanager
def _keras_errors(path: Path, what: str, held_back: Callable[[], str]) -> Iterator[None]:
    """Make whatever Keras raises one line.

    Raises:
        PolyakError: the model carries code, is of unknown parts, or does not work.
    """
    try:
        yield
    except Exception as error:
        text = str(error).rpartition("Exception encountered: ")[2]
        if "arbitrary code execution" in text or "safe_mode" in text or "unsafe_deser" in text:
            raise PolyakError(
                f"{shown(path)}: carries code of its own (a Lambda layer or the like), which "
                "loading it would run; use --trust-code if you trust its source"
            ) from error
        unknown = re.search(r"Unknown layer: '([^']*)'|Could not locate class '([^']*)'", text)
        if unknown:
            raise PolyakError(
                f"{shown(path)}: needs '{shown(unknown[1] or unknown[2], 60)}', which Keras does "
                "not know; register it (keras.saving.register_keras_serializable) in the file of "
                "--data MODULE.py:FUNCTION"
            ) from error
        lines = [line for line in text.splitlines() if line.strip()] or [type(error).__name__]
        reason = lines[-1] if lines[0].startswith("Graph execution error") else lines[0]
        if held_back():
            reason = f"{shown(reason)} ({shown(held_back())})"
        raise PolyakError(f"{shown(path)}: Keras {what}: {shown(reason, 400)}") from error


# --- what a file says of its training ------------------------------------------------------------


class _Description(NamedTuple):
    """What a file says of its model; "" for what it does not."""

    architecture: str  # JSON
    training: str  # JSON, without the optimizer
    keras: str  # the version that wrote it
    assets: bool = False  # vocabularies and the like, which belong to the model and are no tensors


def _measuring(path: Path, text: str) -> str:
    """Leave the optimizer out of a training configuration: its rate may change by epoch."""
    training = dict(_parsed(path, text, "training configuration")) if text else {}
    for key in ("optimizer", "optimizer_config"):
        training.pop(key, None)
    return json.dumps(training) if training else ""


def _writer(description: _Description) -> str:
    """Say which Keras wrote a file that this one may not understand."""
    if not description.keras.startswith(("0.", "1.", "2.")):
        return ""
    return f" (it was written by Keras {shown(description.keras, 20)})"


def _described_zip(path: Path) -> _Description:
    """Read the description of a .keras file."""
    text, assets = _zip_config(path)
    config = dict(_parsed(path, text, "config.json"))
    training = config.pop("compile_config", None)
    measuring = _measuring(path, json.dumps(training)) if training else ""
    return _Description(json.dumps(config), measuring, "", assets)


def _zip_config(path: Path) -> tuple[bytes, bool]:
    """Return the configuration, and whether there are assets."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("config.json") as member:
            config = member.read(_LONGEST_CONFIG + 1)
            assets = any(name.startswith("assets/") for name in archive.namelist())
    except (KeyError, OSError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise FormatError(f"{shown(path)}: is damaged or no Keras model: {shown(error)}") from None
    if len(config) > _LONGEST_CONFIG:
        raise FormatError(
            f"{shown(path)}: its config.json is longer than {_LONGEST_CONFIG} bytes; the file is "
            "damaged or hostile"
        )
    return config, assets


def _parsed(path: Path, text: str | bytes, what: str) -> Mapping[str, Any]:
    """Parse a stranger's JSON object."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{shown(path)}: its {what} is damaged: {shown(error)}") from None
    if not isinstance(parsed, dict):
        raise FormatError(f"{shown(path)}: its {what} is damaged: it is not a JSON object")
    return parsed


def _plain(value: Any) -> Any:
    """Return numbers, text and lists or dicts of them; None for all else."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if isinstance(value, (int, float, str)) else None


@dataclass(frozen=True, slots=True)
class _Known:
    """Finds losses and metrics by the names that Keras, or the user's own code, has registered.

    Keras's own way back from a configuration imports modules that the file names, and fails for
    names such as mse; see `nested` for the shapes it comes in.
    """

    keras: Any
    notes: list[str]

    def nested(self, config: Any, resolve: Callable[[Any], Any], what: str) -> Any:
        """Resolve a configuration: one object, or one for each output as a list or a dict.

        What Keras does not know is left out, with a note.
        """
        if config is None:
            return None
        if isinstance(config, list):
            return [self.nested(item, resolve, what) for item in config]
        if isinstance(config, dict) and "class_name" not in config:
            return {str(k): self.nested(v, resolve, what) for k, v in config.items()}
        try:
            return resolve(config)
        except (ValueError, TypeError, KeyError, AttributeError):
            name = config.get("class_name") if isinstance(config, dict) else config
            self.notes.append(f"left out the {what} '{shown(name, 60)}', which Keras does not know")
            return None

    def loss(self, config: Any) -> Any:
        """Return a loss: a name that compile() takes, a function, or an object."""
        config = self.function_name(config)
        if isinstance(config, str):
            registered = self.keras.saving.get_registered_object(config)
            if registered is None:
                self.keras.losses.get(config)  # raises for an unknown name
            return registered or config
        return self.built(config, self.keras.losses, self.keras.losses.Loss)

    def metric(self, config: Any) -> Any:
        """Return a metric: a name that compile() takes, a function, or an object."""
        config = self.function_name(config)
        if config in ("accuracy", "acc"):
            return config  # compile() chooses by the shape of the output
        if isinstance(config, str):
            registered = self.keras.saving.get_registered_object(config)
            if registered is None:
                self.keras.metrics.get(config)
            return registered or config
        if config["class_name"] == "MeanMetricWrapper":  # how Keras 2 stores a metric given by name
            return self.wrapped(config["config"]["fn"], str(config["config"]["name"]))
        return self.built(config, self.keras.metrics, self.keras.metrics.Metric)

    def wrapped(self, function: str, name: str) -> Any:
        """Return the mean of a function over the rows."""
        found = self.keras.saving.get_registered_object(function) or self.keras.metrics.get(
            function
        )
        if isinstance(found, self.keras.metrics.Metric):
            return type(found)(name=name)
        return self.keras.metrics.MeanMetricWrapper(found, name=name)

    def function_name(self, config: Any) -> Any:
        """Return the name where a function is stored as an object, as .keras files do."""
        if isinstance(config, dict) and config.get("class_name") == "function":
            return config["config"]
        return config

    def built(self, config: Mapping[str, Any], home: Any, base: type) -> Any:
        """Return an object of a class of Keras or registered, with plain arguments only."""
        name = config.get("registered_name") or config["class_name"]
        kind = self.keras.saving.get_registered_object(name) or getattr(
            home, config["class_name"], None
        )
        if not (isinstance(kind, type) and issubclass(kind, base) and kind is not base):
            raise ValueError(name)
        arguments = {k: v for k, v in config["config"].items() if k not in ("fn", "dtype")}
        if arguments.get("reduction") == "auto":  # Keras 2's word for its default
            arguments["reduction"] = "sum_over_batch_size"
        return kind(**_plain(arguments))


def _by_output(metrics: Any, outputs: Sequence[str]) -> Any:
    """Return metrics as compile() wants them, without those that are not known.

    Keras 2 stores them in a list for each output, and with the output's name before theirs, which
    compile() would put there once more.
    """
    if len(outputs) == 1:
        return _flat(metrics)
    if isinstance(metrics, dict):
        return {name: _flat(own) for name, own in metrics.items()}
    if not isinstance(metrics, list):
        return metrics
    for name, own in zip(outputs, metrics, strict=False):
        for metric in _flat(own):
            if not isinstance(metric, str):
                metric.name = metric.name.removeprefix(f"{name}_")
    return [_flat(own) for own in metrics]


def _flat(nested: Any) -> list[Any]:
    """Return what is known in a structure, in order."""
    if nested is None:
        return []
    if isinstance(nested, (list, tuple)):
        return [leaf for item in nested for leaf in _flat(item)]
    if isinstance(nested, dict):
        return [leaf for item in nested.values() for leaf in _flat(item)]
    return [nested]


def _name(known: Any) -> str:
    """Return how a loss or metric is called, in small letters without underscores."""
    if isinstance(known, str):
        name = known
    else:
        name = getattr(known, "__name__", "") or type(known).__name__
        name += str(getattr(known, "name", ""))
    return name.lower().replace("_", "")


# --- rows that fit a model -----------------------------------------------------------------------


def _tensors(model: Any, which: str) -> list[Any]:
    """Return the model's inputs or outputs; none where it is written as a class of its own."""
    return list(getattr(model, which, None) or [])


def _output_names(model: Any) -> list[str]:
    """Return the names of the outputs; one without a name where the model does not tell."""
    names = list(getattr(model, "output_names", None) or [])
    return names if len(names) == len(_tensors(model, "outputs")) else [""]


def _check_features(path: Path, model: Any, rows: data.Split) -> None:
    """Refuse features that the model's inputs do not take."""
    inputs = _tensors(model, "inputs")
    given = data.leaves(rows.features)
    if inputs and len(inputs) != len(given):
        raise MismatchError(
            f"{shown(path)}: takes {len(inputs)} inputs, but {rows.source} has {len(given)}"
        )
    if isinstance(rows.features, Mapping):
        return  # paired by name, by Keras
    for tensor, array in zip(inputs, given, strict=False):
        wanted = tuple(tensor.shape)[1:]
        found = array.shape[1:]
        if found == wanted[:-1] and wanted[-1:] in ((1,), (None,)):
            continue  # Keras adds the last axis
        if len(wanted) != len(found) or any(
            size not in (None, there) for size, there in zip(wanted, found, strict=True)
        ):
            raise MismatchError(
                f"{shown(path)}: takes rows of shape {_shape(wanted)}, but {rows.source} has rows "
                f"of shape {_shape(found)}"
            )


def _shape(shape: Sequence[int | None]) -> str:
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    return f"({sizes},)" if len(shape) == 1 else f"({sizes})"


def _fitted_labels(
    path: Path, rows: data.Split, model: Any, loss: Any, metrics: Any
) -> tuple[data.Arrays, bool]:
    """Return the labels as each output's loss wants them, and whether they are classes.

    Whether is told for a model of one output only.
    """
    outputs = _tensors(model, "outputs")
    given = data.leaves(rows.labels)
    if outputs and len(outputs) != len(given):
        raise MismatchError(
            f"{shown(path)}: gives {len(outputs)} outputs, but {rows.source} has labels for "
            f"{len(given)}"
        )
    if not outputs:
        return rows.labels, False
    names = _output_names(model)
    keys = list(rows.labels) if isinstance(rows.labels, Mapping) else names
    fitted: list[tuple[data.Array, bool]] = []
    for key, array in zip(keys, given, strict=True):
        index = names.index(key) if key in names else len(fitted)
        where = f"{shown(path)}: gives rows of shape"
        own = _of_output(loss, index, names[index])
        sparse = any("sparse" in _name(known) for known in _flat(own) or _flat(metrics))
        fitted.append(_fitted(array, tuple(outputs[index].shape)[1:], sparse, where, rows.source))
    classes = len(fitted) == 1 and fitted[0][1]
    arrays = [array for array, _ in fitted]
    if isinstance(rows.labels, Mapping):
        return dict(zip(keys, arrays, strict=True)), classes
    return (tuple(arrays) if isinstance(rows.labels, tuple) else arrays[0]), classes


def _of_output(nested: Any, index: int, name: str) -> Any:
    """Return the loss of one output of those that `_Known.nested` resolved."""
    if isinstance(nested, dict):
        return nested.get(name)
    if isinstance(nested, list):
        return nested[index] if index < len(nested) else None
    return nested


def _fitted(
    labels: data.Array, shape: tuple[int | None, ...], sparse: bool, where: str, source: str
) -> tuple[data.Array, bool]:
    """Return labels in the shape of an output, and whether they are classes.

    Args:
        labels: (rows, ...).
        shape: of one row of the output; its last axis counts the classes, where there are any.
        sparse: give classes as integers, without that last axis; else one-hot.
        where: begins the message that tells the output's shape.
        source: names the labels in messages.

    Raises:
        MismatchError: they do not fit.
    """
    import numpy as np

    width = shape[-1] if shape else None
    if width is None:
        return labels, False
    alike = labels.ndim == len(shape) + 1
    if width == 1:
        if alike and labels.shape[-1] == 2 and data.one_hot(labels):
            labels, alike = labels.argmax(-1), False
        if alike and labels.shape[-1] != 1:
            raise _mismatch(labels, shape, where, source)
        return (labels if alike else labels[..., None]), bool(np.isin(labels, (0, 1)).all())
    if alike and labels.shape[-1] == width:
        hot = data.one_hot(labels)
        if sparse and not hot:
            raise MismatchError(
                f"{where} {_shape(shape)} with a loss for whole classes, but the labels of "
                f"{source} are not one-hot"
            )
        return (labels.argmax(-1) if sparse else labels), hot
    index = labels[..., 0] if alike and labels.shape[-1] == 1 else labels
    if index.ndim != len(shape) or not np.array_equal(index, np.floor(index)):
        raise _mismatch(labels, shape, where, source)
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= width:
        raise MismatchError(
            f"{where} {_shape(shape)}, classes 0 to {width - 1}, but the labels of {source} go "
            f"from {low} to {high}"
        )
    index = index.astype(np.int64)
    return (index if sparse else np.eye(width, dtype=np.float32)[index]), True


def _mismatch(
    labels: data.Array, shape: tuple[int | None, ...], where: str, source: str
) -> MismatchError:
    return MismatchError(
        f"{where} {_shape(shape)}, but the labels of {source} have rows of shape "
        f"{_shape(labels.shape[1:])}"
    )


# --- rows one by one -----------------------------------------------------------------------------


class _RowLoss(NamedTuple):
    """The loss of one output."""

    output: int
    function: Callable[[Any, Any], Any]  # labels, output -> a number for each row, or several
    weight: float
    name: str


@dataclass(frozen=True, slots=True)
class _RowWise:
    """Tells of each row what Keras tells of their mean."""

    keras: Any
    losses: tuple[_RowLoss, ...]  # none where the loss is not known, or not for single rows
    right: Callable[[Any, Any], Any] | None  # labels, output -> 1 where the class is right
    names: Sequence[str]  # of the outputs

    @property
    def loss_name(self) -> str:
        """Which loss it is, the same for all ways to write it down."""
        return ", ".join(f"{one.name} * {one.weight:g}" for one in self.losses)

    def ordered(self, arrays: Any) -> list[data.Array]:
        """Return one array for each output."""
        if isinstance(arrays, Mapping) and set(arrays) == set(self.names):
            return [arrays[name] for name in self.names]
        return data.leaves(tuple(arrays) if isinstance(arrays, list) else arrays)

    def told(
        self, labels: data.Arrays, outputs: Sequence[data.Array], batch_size: int
    ) -> tuple[data.Array | None, data.Array | None]:
        """Return the loss of each row, and whether its class is right; None where not known."""
        truths = self.ordered(labels)
        losses = None
        for one in self.losses:
            own = self._each(one.function, truths[one.output], outputs[one.output], batch_size)
            if own is None:
                losses = None
                break
            losses = one.weight * own + (0.0 if losses is None else losses)
        if self.right is None or len(outputs) != 1 or outputs[0].ndim != 2:
            return losses, None
        correct = self._each(self.right, truths[0], outputs[0], batch_size)
        return losses, None if correct is None else correct == 1

    def _each(
        self, function: Callable[[Any, Any], Any], truth: data.Array, output: data.Array, step: int
    ) -> data.Array | None:
        """Return a function of each row; None where it gives less than a number for each."""
        import numpy as np

        found = np.empty(len(output))
        tensor, dtype = self.keras.ops.convert_to_tensor, self.keras.config.floatx()
        for start in range(0, len(output), step):
            block = slice(start, start + step)
            values = self.keras.ops.convert_to_numpy(
                function(tensor(truth[block], dtype=dtype), tensor(output[block], dtype=dtype))
            )
            if values.shape[:1] != output[block].shape[:1]:
                return None
            found[block] = values.reshape(len(values), -1).mean(1, dtype=np.float64)
        return found


def _row_losses(
    keras: Any, outputs: Sequence[str], loss: Any, weights: Any
) -> tuple[_RowLoss, ...]:
    """Return the losses that `_Known.nested` resolved, by output, before they are averaged."""
    found = []
    for index, name in enumerate(outputs):
        known = _of_output(loss, index, name)
        if known is None:
            continue
        if isinstance(known, str):
            try:
                known = keras.losses.get(known)
            except ValueError:  # such as crossentropy, which compile() chooses by the labels
                return ()
        function = known.call if isinstance(known, keras.losses.Loss) else known
        if isinstance(known, type) or not callable(function):
            return ()
        weight = _of_output(weights, index, name)
        kind = getattr(known, "__name__", "") or type(known).__name__
        # Whole and one-hot classes have one loss; functions and classes are written differently.
        kind = kind.lower().replace("_", "").removeprefix("sparse")
        found.append(_RowLoss(index, function, 1.0 if weight is None else float(weight), kind))
    return tuple(found)


def _penalty(keras: Any, model: Any) -> float:
    """Return what regularizers add to the loss of every batch."""
    return sum(
        float(keras.ops.convert_to_numpy(variable.regularizer(variable)))
        for variable in model.trainable_variables
        if getattr(variable, "regularizer", None) is not None
    )


def _own_accuracy(metrics: Any) -> Any:
    """Return the accuracy that a model has among its metrics, or None."""
    return next((known for known in _flat(metrics) if "acc" in _name(known)), None)


def _right(
    keras: Any, model: Any, loss: Any, metrics: Any, labels: data.Arrays
) -> Callable[[Any, Any], Any] | None:
    """Return a function of labels and output that is 1 where the class is right, else 0.

    Its mean is the accuracy.  One output column is a class only under a binary loss, or a sigmoid
    where the loss is not known, or where the model measures accuracy itself: 0 or 1 may be a
    number to predict.
    """
    own = next(iter(_flat(loss)), None)
    accuracy = _own_accuracy(metrics)
    shape = tuple(model.outputs[0].shape)
    if shape[-1] != 1:
        (truth,) = data.leaves(labels)
        sparse = truth.ndim < len(shape)
        name = "sparse_categorical_accuracy" if sparse else "categorical_accuracy"
        return cast(Callable[[Any, Any], Any], getattr(keras.metrics, name))
    last = getattr(model.layers[-1], "activation", None)
    sigmoid = own is None and last is keras.activations.sigmoid
    if "binary" not in _name(own) and not sigmoid and accuracy is None:
        return None
    threshold = 0.0 if getattr(own, "from_logits", False) else 0.5
    if accuracy is not None:
        threshold = getattr(accuracy, "threshold", 0.5)
    return functools.partial(keras.metrics.binary_accuracy, threshold=threshold)


# --- BatchNorm's statistics ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Moments:
    """The moving statistics of a model's BatchNorm layers.

    Attributes:
        before: location in the file -> the values that the model was loaded with.
        after: location in the file -> the mean over all rows.
        layers: how many layers they belong to.
        batches: how many there were.
        notes: what the user should know, a line each.
    """

    before: Mapping[str, data.Array]
    after: Mapping[str, Float64]
    layers: int
    batches: int
    notes: tuple[str, ...]


def check_model(table: Table) -> None:
    """Refuse what Keras could not run, as far as it can be told without Keras.

    Raises:
        MissingExtraError: keras or tensorflow is not installed.
        FormatError: the file holds no architecture.
        PolyakError: Keras is too old.
    """
    _require_keras("recalibrating BatchNorm")
    _check_architecture(table)


def moments(
    table: Table, rows: data.Split, *, batch_size: int, trust_code: bool = False
) -> Moments:
    """Run a model once over rows and gather what its BatchNorm layers see.

    "bn_update" of Izmailov et al., "Averaging weights leads to wider optima and better
    generalization", 2018.  Only BatchNorm normalises as in training, by the moments of the batch;
    everything else runs as in inference, dropout and noise off (but what a model calls with
    ``training=True`` whatever its mode).  Each statistic becomes the mean, in float64, of what the
    layer itself computes of each batch, weighted by the rows: of equal batches, what Keras would
    arrive at with momentum k / (k + 1) in batch k = 0, 1, ...  A variance is that of Keras, of the
    rows of a batch and with no n / (n - 1).

    The rows are shuffled, always in the same way, since files are often sorted by class; batches
    are as many as needed, of sizes that differ by one at most.  A layer that is called several
    times counts every call.

    Layers that normalise by their statistics in training too - trainable=False, or called with
    training=False by a layer or model of the user's own - are left alone, unlike by PyTorch's
    ``update_bn``: to them these are constants, with which everything else was trained.

    Args:
        table: of the file, as `formats.scan` gives it with everything.
        rows: features, one array (rows, ...) for each input of the model.
        batch_size: rows at a time, at most.
        trust_code: run the code that a file carries in a Lambda layer.

    Raises:
        MissingExtraError: keras or tensorflow is not installed.
        FormatError: the file holds no architecture.
        MismatchError: the rows do not fit the model, or it has no statistics to gather.
        PolyakError: Keras is too old, or cannot load or run the model, or the model carries code.
    """
    check_model(table)
    path, opened = table.path, Path(table.files[0].path)
    if table.format == "hdf5":
        _check_suffix(opened)
    written = _Description("", "", table.about.get("keras_version", ""))
    with hushed() as held_back, _noted() as warned:
        keras = _keras("recalibrating BatchNorm")
        with _keras_errors(path, f"cannot load it{_writer(written)}", held_back):
            model = keras.saving.load_model(opened, compile=False, safe_mode=not trust_code)
            layers = model._flatten_layers()
            stored = _stored(model, table)
        found = [
            _Gathering(layer, keras)
            for layer in layers
            if isinstance(layer, keras.layers.BatchNormalization)
        ]
        if not found:
            raise MismatchError(f"{shown(path)}: has no BatchNorm layer; nothing to recalibrate")
        _check_features(path, model, rows)
        before = _located(path, found, stored)
        with _keras_errors(path, f"cannot run it on {rows.source}", held_back):
            batches = _gather(keras, model, found, rows, batch_size)
    notes = (*_left_alone(path, found), *warned)
    chosen = [one for one in found if one.rows]
    after = {
        location: total / one.rows
        for one in chosen
        for total, statistic in zip(one.sums, one.statistics, strict=True)
        for location in stored[id(statistic)]
    }
    return Moments({k: before[k] for k in after}, after, len(chosen), batches, notes)


class _Gathering:
    """Stands in for the call of a BatchNorm layer, and adds up what it computes of each batch."""

    def __init__(self, layer: Any, keras: Any) -> None:
        self.layer = layer
        self.ops = keras.ops
        self.call = layer.call
        self.statistics = (layer.moving_mean, layer.moving_variance)
        self.values = [self.ops.convert_to_numpy(statistic) for statistic in self.statistics]
        self.sums: list[Any] = [0.0, 0.0]
        self.rows = 0
        self.trains = False  # it normalises by the moments of the batch where the model trains

    def probe(self, inputs: Any, training: bool | None = None, **more: Any) -> Any:
        """See whether the layer trains where the model does."""
        self.trains = self.trains or bool(training and self.layer.trainable)
        return self.call(inputs, training=False, **more)

    def prepare(self) -> None:
        """Have the layer's statistics be those of the latest batch alone."""
        self.layer.momentum = 0.0
        self.layer.renorm = False  # it would normalise by more than the batch
        self.layer.moving_mean.assign(self.ops.zeros_like(self.layer.moving_mean))
        self.layer.moving_variance.assign(self.ops.ones_like(self.layer.moving_variance))
        self.layer.call = self.gather

    def gather(self, inputs: Any, training: bool | None = None, **more: Any) -> Any:
        """Normalise by the moments of the batch, and add them up."""
        del training  # of the model, which infers
        outputs = self.call(inputs, training=True, **more)
        count = int(inputs.shape[0])
        for k, statistic in enumerate(self.statistics):
            values = self.ops.convert_to_numpy(statistic).astype("float64")
            self.sums[k] = self.sums[k] + count * values
        self.rows += count
        return outputs


def _gather(
    keras: Any, model: Any, found: Sequence[_Gathering], rows: data.Split, batch_size: int
) -> int:
    """Run the model once over the rows; return the number of batches."""
    import numpy as np

    # The order of this old generator is promised never to change, unlike that of newer ones.
    order = np.random.RandomState(0).permutation(rows.rows)
    for one in found:
        one.layer.call = one.probe
    with keras.StatelessScope():  # a layer that changes in training does so in vain
        model(_batch(rows.features, order[:2]), training=True)
    for one in found:
        one.layer.call = one.call
        if one.trains:
            one.prepare()
    if not any(one.trains for one in found):
        return 0
    count = -(-rows.rows // batch_size)
    for batch in np.array_split(order, count):
        model(_batch(rows.features, batch), training=False)
    return count


def _batch(features: data.Arrays, rows: data.Array) -> Any:
    """Return some of the rows as a model is called with them."""
    if isinstance(features, Mapping):
        return {name: array[rows] for name, array in features.items()}
    return [a[rows] for a in features] if isinstance(features, tuple) else features[rows]


def _stored(model: Any, table: Table) -> dict[int, list[str]]:
    """Return where the file keeps each variable of a model: its identity -> locations.

    Goes the way that Keras goes when it loads: by the order of layers and variables in an .h5
    file, by the tree of objects in a .keras archive.  What does not fit is left out.
    """
    found: dict[int, list[str]] = {}
    if table.format == "hdf5":
        variables = (
            variable
            for layer in model.layers
            for variable in (*layer.trainable_weights, *layer.non_trainable_weights)
        )
        # Where a model has variables of its own, they come last.
        pairs = list(zip(variables, (s.location for s in table.tensors.values()), strict=False))
    else:
        pairs = _archived(model)
    shapes = {spec.location: spec.shape for spec in table.tensors.values()}
    for variable, location in pairs:
        if shapes.get(location) == tuple(getattr(variable, "shape", ())):
            found.setdefault(id(variable), []).append(location)
    return found


def _archived(model: Any) -> list[tuple[Any, str]]:
    """Return each variable of a model and where Keras would save it in an archive."""
    from keras.src.saving import saving_lib

    class Recorder(saving_lib.H5IOStore):  # type: ignore[misc]  # keras ships no types
        """Takes what is to be saved, and keeps it."""

        def __init__(self) -> None:
            self.groups: dict[str, dict[str, Any]] = {}

        def __bool__(self) -> bool:
            return True

        def make(self, path: str, metadata: Any = None) -> dict[str, Any]:
            """Return what a saver fills."""
            del metadata
            return self.groups.setdefault(path, {})

    recorder = Recorder()
    saving_lib._save_state(model, recorder, None, inner_path="", visited_saveables=set())
    return [
        (variable, f"/{path}/vars/{name}" if path else f"/vars/{name}")
        for path, group in recorder.groups.items()
        for name, variable in group.items()
    ]


def _located(
    path: Path, found: Sequence[_Gathering], stored: Mapping[int, Sequence[str]]
) -> dict[str, data.Array]:
    """Return the statistics that a model was loaded with, by where the file keeps them."""
    before: dict[str, data.Array] = {}
    for one in found:
        for statistic, values in zip(one.statistics, one.values, strict=True):
            if id(statistic) not in stored:
                raise MismatchError(
                    f"{shown(path)}: the statistics of layer '{shown(one.layer.name, 80)}' are not "
                    "where this Keras would keep them; load it and save it anew with model.save()"
                )
            before |= dict.fromkeys(stored[id(statistic)], values)
    return before


def _left_alone(path: Path, found: Sequence[_Gathering]) -> Iterator[str]:
    """Yield what to tell of the layers whose statistics stay as they are.

    Raises:
        MismatchError: there are no others.
    """
    constant = [shown(one.layer.name, 80) for one in found if not one.trains]
    unused = [shown(one.layer.name, 80) for one in found if one.trains and not one.rows]
    if len(constant) + len(unused) == len(found):
        raise MismatchError(
            f"{shown(path)}: every BatchNorm layer is frozen (trainable=False, or called with "
            "training=False), so that its statistics are constants; nothing to recalibrate"
        )
    if constant:
        yield (
            f"{len(constant)} BatchNorm layers are frozen (trainable=False, or called with "
            f"training=False); their statistics are constants and stay ({_some(constant)})"
        )
    if unused:
        yield f"{len(unused)} BatchNorm layers saw no rows; their statistics stay ({_some(unused)})"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


# --- training the sample run ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a training run left.

    Attributes:
        output: the folder.
        checkpoints: the model files kept, oldest first.
        log: what Keras's CSVLogger wrote.
        history: metric -> its value after each epoch: loss and accuracy on the training points, and
            with val_ before the name on the test points.  Loss is the mean cross-entropy of a point
            in nats, accuracy the share of points classified right, 0 to 1.
        seed: of the initial weights and the order of the points.
        optimizer: sgd or adam.
        learning_rate: of the optimizer.
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

    ``Dense(25, relu) -> Dense(3, softmax)`` under categorical cross-entropy, 100 training and 1,000
    test points, batches of 32.  Two runs of one seed on one machine write the same bytes.

    Args:
        out: the folder; made if it is missing.  Gets ``model_<epoch>.h5``, counted from 0, and
            ``training.csv``.
        epochs: how many.
        keep: of how many, at the end, a checkpoint is kept; all where there are fewer.
        seed: of the initial weights and the order of the points; 0 to 4294967295.
        optimizer: sgd, with momentum 0.9, or adam.
        learning_rate: by default 0.01 for sgd, 0.001 for adam.
        force: replace an earlier run's ``model_*.h5`` in the folder, which are removed first.
        progress: called after each epoch with its number, from 0, and its metrics, named as in the
            history.

    Returns:
        What was written where, and the history.

    Raises:
        UsageError: a number is out of range.
        MissingExtraError: keras, tensorflow or scikit-learn is not installed.
        OutputError: the folder has checkpoints and ``force`` is not given, or cannot be written.
    """
    out = Path(out)
    rate = _learning_rate(optimizer, learning_rate)
    _check_run(epochs, keep, seed)
    earlier = _earlier_checkpoints(out)
    if earlier and not force:
        raise OutputError(
            f"{shown(out)}: holds checkpoints already ({shown(earlier[0].name)}); name another "
            "folder, or use --force to replace them"
        )
    log = out / "training.csv"
    with hushed() as held_back:
        keras = _keras("polyak train")
        points = data.load("blobs")
        keras.utils.set_random_seed(seed)
        model = _sample_model(keras, optimizer, rate)
        try:
            out.mkdir(parents=True, exist_ok=True)
            for path in earlier:
                path.unlink()
            saver = _saver(keras, out, epochs - keep, progress)
            logger = keras.callbacks.CSVLogger(str(log))
            try:
                history = _fit(model, points, epochs, [logger, saver])
            finally:  # Keras closes it only after the last epoch
                if logger.csv_file:
                    logger.csv_file.close()
        except OSError as error:
            why = error.strerror or held_back() or str(error)
            raise OutputError(f"{shown(out)}: cannot be written: {shown(why)}") from error
    return TrainReport(out, tuple(saver.saved), log, history, seed, optimizer, rate)


def _learning_rate(optimizer: str, learning_rate: float | None) -> float:
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


def _earlier_checkpoints(out: Path) -> list[Path]:
    """Return the checkpoints that an earlier run of this command left, by name.

    Raises:
        OutputError: the folder is no folder, or cannot be read.
    """
    try:
        names = sorted(out.iterdir()) if out.exists() else []
    except OSError as error:
        raise OutputError(f"{shown(out)}: is not a folder to write to: {error.strerror}") from None
    return [path for path in names if re.fullmatch(r"model_\d+\.h5", path.name)]


def _sample_model(keras: Any, optimizer: str, learning_rate: float) -> Any:
    """Build and compile the model; the names are given, as Keras would number them anew."""
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


def _fit(
    model: Any, points: data.Dataset, epochs: int, callbacks: list[Any]
) -> dict[str, tuple[float, ...]]:
    """Run Keras's fit and return its history."""
    import numpy as np
    import tensorflow as tf

    tf.config.experimental.enable_op_determinism()
    # A pipeline of our own for two reasons.  Given arrays, Keras repeats one order of the rows in
    # every epoch once it is seeded (seen in 3.15.1); this one shuffles anew each time.
    # And TensorFlow would optimise Keras's pipeline again in every epoch, for six times as long as
    # the epoch takes.
    options = tf.data.Options()
    options.autotune.enabled = False
    options.experimental_optimization.apply_default_optimizations = False
    rows = {}
    for name, split in points.splits.items():
        one_hot = np.eye(3, dtype=np.float32)[np.asarray(split.labels)]
        features = np.asarray(split.features, np.float32)
        rows[name] = tf.data.Dataset.from_tensor_slices((features, one_hot)).with_options(options)
    history = model.fit(
        rows["train"].shuffle(points.splits["train"].rows).batch(BATCH_SIZE),
        validation_data=rows["test"].batch(points.splits["test"].rows),
        epochs=epochs,
        callbacks=callbacks,
        shuffle=False,  # the pipeline does
        verbose=0,
    )
    return {name: tuple(map(float, values)) for name, values in history.history.items()}


def _saver(
    keras: Any,
    out: Path,
    first: int,
    progress: Callable[[int, Mapping[str, float]], None] | None,
) -> Any:
    """Return a callback that saves a checkpoint after each epoch from ``first`` on."""

    class Saver(keras.callbacks.Callback):  # type: ignore[misc]  # keras ships no types
        """Saves under a hidden name, so that no half-written checkpoint is ever seen."""

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
