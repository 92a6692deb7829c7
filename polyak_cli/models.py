"""Keras models: scored on data, and trained for the sample run.

The only module that imports keras, and only inside its functions.  Models are loaded in Keras's
safe mode and compiled here from what the file says of its training, through names that Keras knows;
nothing that a file names is imported.  Knows nothing of averaging, and leaves what a file may hold
at all to `formats`, which looks at it at arm's length before Keras opens it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

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

#: Older ones run the code of a Lambda layer in any .h5 file, safe mode or not: CVE-2025-9905.
LEAST_KERAS = (3, 11, 3)
LEARNING_RATES = {"sgd": 0.01, "adam": 0.001}
MOMENTUM = 0.9
BATCH_SIZE = 32
_LONGEST_CONFIG = 64 << 20  # bytes of a config.json
_StrPath = str | os.PathLike[str]


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
    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size} is out of range; expected 1 or more")
    _require_keras("polyak evaluate")
    # A single string is a sequence of strings too: of its letters.
    several = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    files = [Path(path) for path in several]
    hdf5 = [path for path in files if path.suffix != ".keras" or not _is_zip(path)]
    described = dict(zip(hdf5, _described_hdf5(hdf5), strict=True))
    for path in files:
        if path not in described:
            described[path] = _described_zip(path)
    return _scores(described, files, rows, batch_size, trust_code)


def _described_hdf5(paths: Sequence[Path]) -> Iterator[_Description]:
    """Yield what each file says of its model, having refused what Keras must not or cannot open."""
    from polyak_cli import formats

    tables = formats.scan(paths, jobs=4)
    for table in tables:
        if not table.config:
            raise FormatError(
                f"{shown(table.path)}: holds weights only, no architecture; expected a whole "
                "model: save it with model.save()"
            )
    for path, texts in zip(paths, formats.descriptions(paths), strict=True):
        if path.suffix not in formats.module("hdf5").SUFFIXES:
            raise FormatError(
                f"{shown(path)}: is an HDF5 file, which Keras opens only by the suffix .h5 or "
                ".hdf5; rename it"
            )
        yield _Description(*texts)


def _is_zip(path: Path) -> bool:
    try:
        return path.is_file() and zipfile.is_zipfile(path)
    except OSError as error:
        raise FormatError(f"{shown(path)}: cannot be read: {error.strerror}") from None


def _scores(
    described: Mapping[Path, _Description],
    paths: Sequence[Path],
    rows: data.Split,
    batch_size: int,
    trust_code: bool,
) -> Iterator[Score]:
    """Load and score the files; those of one run share a model and its compiled functions."""
    scorer: _Scorer | None = None
    for path in paths:
        with hushed():
            keras = _keras("polyak evaluate")
        description = described[path]
        with hushed() as held_back, _noted() as warned:
            with _keras_errors(path, f"cannot load it{_writer(description)}", held_back):
                if scorer and scorer.description == description and path.suffix != ".keras":
                    scorer.model.load_weights(path)
                else:
                    model = keras.saving.load_model(path, compile=False, safe_mode=not trust_code)
                    scorer = None
            scorer = scorer or _Scorer.prepared(keras, path, model, description, rows)
            with _keras_errors(path, f"cannot score it on {rows.source}", held_back):
                loss, metrics = scorer.measured(batch_size)
        yield Score(path, loss, metrics, rows.rows, (*scorer.notes, *warned))


@dataclass(frozen=True, slots=True)
class _Scorer:
    """A compiled model with the rows made to fit it."""

    description: _Description
    model: Any
    features: data.Arrays
    labels: data.Arrays
    has_loss: bool
    notes: tuple[str, ...]

    @classmethod
    def prepared(
        cls, keras: Any, path: Path, model: Any, description: _Description, rows: data.Split
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
        _check_features(path, model, rows)
        labels, classes = _fitted_labels(path, rows, model, loss, metrics)
        accuracy = _accuracy(keras, model, loss, metrics, classes)
        if accuracy is not None:
            metrics = [*_flat(metrics), accuracy]
        if not has_loss and not _flat(metrics):
            known.notes.append("nothing to measure: no loss, no metric, and no classes as labels")
        with _keras_errors(path, "cannot compile it", lambda: ""):
            model.compile(
                loss=loss if has_loss else [_no_loss(keras)] * len(outputs),
                loss_weights=_plain(training.get("loss_weights")) if has_loss else None,
                metrics=metrics,
                weighted_metrics=weighted,
            )
        return cls(description, model, rows.features, labels, has_loss, tuple(known.notes))

    def measured(self, batch_size: int) -> tuple[float | None, dict[str, float]]:
        """Return loss and metrics."""
        result = self.model.evaluate(
            self.features, self.labels, batch_size=batch_size, verbose=0, return_dict=True
        )
        metrics = {name: _shortest(value) for name, value in result.items()}
        loss = metrics.pop("loss", None)
        return (loss if self.has_loss else None), metrics


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
    training: str  # JSON
    keras: str  # the version that wrote it


def _writer(description: _Description) -> str:
    """Say which Keras wrote a file that this one may not understand."""
    if not description.keras.startswith(("0.", "1.", "2.")):
        return ""
    return f" (it was written by Keras {shown(description.keras, 20)})"


def _described_zip(path: Path) -> _Description:
    """Read the description of a .keras file."""
    config = dict(_parsed(path, _zip_config(path), "config.json"))
    training = config.pop("compile_config", None)
    return _Description(json.dumps(config), json.dumps(training) if training else "", "")


def _zip_config(path: Path) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive, archive.open("config.json") as member:
            config = member.read(_LONGEST_CONFIG + 1)
    except (KeyError, OSError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise FormatError(f"{shown(path)}: is damaged or no Keras model: {shown(error)}") from None
    if len(config) > _LONGEST_CONFIG:
        raise FormatError(
            f"{shown(path)}: its config.json is longer than {_LONGEST_CONFIG} bytes; the file is "
            "damaged or hostile"
        )
    return config


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
        if alike and labels.shape[-1] == 2 and _one_hot(labels):
            labels, alike = labels.argmax(-1), False
        if alike and labels.shape[-1] != 1:
            raise _mismatch(labels, shape, where, source)
        return (labels if alike else labels[..., None]), bool(np.isin(labels, (0, 1)).all())
    if alike and labels.shape[-1] == width:
        hot = _one_hot(labels)
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


def _one_hot(labels: data.Array) -> bool:
    import numpy as np

    return bool(np.isin(labels, (0, 1)).all() and (labels.sum(-1) == 1).all())


def _mismatch(
    labels: data.Array, shape: tuple[int | None, ...], where: str, source: str
) -> MismatchError:
    return MismatchError(
        f"{where} {_shape(shape)}, but the labels of {source} have rows of shape "
        f"{_shape(labels.shape[1:])}"
    )


def _accuracy(keras: Any, model: Any, loss: Any, metrics: Any, classes: bool) -> Any:
    """Return the accuracy to measure beside the model's own metrics, or None.

    It is added where labels are classes and the model has none of its own.  One output column is a
    class only under a binary loss, or a sigmoid where the loss is not known: 0 or 1 may be a number
    to predict.
    """
    if not classes or any("acc" in _name(known) for known in _flat(metrics)):
        return None
    own = next(iter(_flat(loss)), None)
    if tuple(model.outputs[0].shape)[-1] != 1:
        if "sparse" in _name(own):
            return keras.metrics.SparseCategoricalAccuracy(name="accuracy")
        return keras.metrics.CategoricalAccuracy(name="accuracy")
    last = getattr(model.layers[-1], "activation", None)
    if "binary" in _name(own) or (own is None and last is keras.activations.sigmoid):
        threshold = 0.0 if getattr(own, "from_logits", False) else 0.5
        return keras.metrics.BinaryAccuracy(name="accuracy", threshold=threshold)
    return None


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
