"""Score Keras models on data: the back end of `evaluator` for files that Keras wrote.

Models are compiled from the training configuration in their file.  This module knows nothing of
averaging, and leaves the question of what a file may contain to `formats`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from polyak_cli import formats
from polyak_cli.errors import shown
from polyak_cli.evaluation import data
from polyak_cli.evaluation.architectures import Architecture
from polyak_cli.evaluation.evaluator import RowScores, Score
from polyak_cli.evaluation.keras_files import (
    Description,
    collect_warnings,
    describe_archive,
    describe_hdf5_files,
    import_keras,
    is_zip,
    name_writer,
    parse_json_object,
    require_keras,
    reword_keras_errors,
)
from polyak_cli.evaluation.labels import fit_features, fit_labels, list_output_names
from polyak_cli.evaluation.losses import (
    Registry,
    RowWise,
    arrange_by_output,
    choose_accuracy,
    complete_losses,
    compute_penalty,
    find_accuracy,
    flatten,
    keep_plain_values,
    name_losses,
    resolve_row_losses,
)
from polyak_cli.evaluation.quiet import silence_frameworks
from polyak_cli.evaluation.row_counts import OnShare, RowCounter
from polyak_cli.evaluation.scoring import Scoring
from polyak_cli.storage import mirrors

_Result = TypeVar("_Result")


class KerasModels:
    """Scores one file of Keras after another on the same rows; see `evaluator.Evaluator`.

    Attributes:
        notes: messages for the user about the files scored so far, each only once.
    """

    def __init__(self, splits: Sequence[data.Split], how: Scoring) -> None:
        """Keep the rows; the errors are those of `evaluator.Evaluator`."""
        require_keras("polyak evaluate")
        self.notes: list[str] = []
        self._splits = tuple(splits)
        self._how, source = how, how.source
        self._weights_of = Architecture(source, trust_code=how.trust_code) if source else None
        self._described: dict[Path, Description] = {}
        self._compiled: _CompiledModel | None = None
        self._reportable: list[_Reportable] = []

    @property
    def shapes(self) -> Sequence[tuple[int, ...] | None]:
        """See `evaluator.BackEnd.shapes`."""
        return [one.shape for one in self._reportable]

    def inspect_files(self, paths: Sequence[Path]) -> None:
        """See `evaluator.Evaluator.inspect_files`."""
        # Keras decides by the suffix first: a zip archive of another name is opened as HDF5.
        hdf5 = [path for path in paths if path.suffix != ".keras" or not is_zip(path)]
        weights_of = self._weights_of.description if self._weights_of else None
        self._described.update(zip(hdf5, describe_hdf5_files(hdf5, weights_of), strict=True))
        for path in paths:
            if path not in self._described:
                self._described[path] = describe_archive(path)

    def score(self, path: Path, report: OnShare | None) -> list[Score]:
        """See `evaluator.Evaluator.score`."""
        counter = RowCounter(report, self._count_rows())
        found, notes = self._evaluate(path, _CompiledModel.evaluate, counter)
        return [
            Score(path, loss, metrics, split.rows, notes, self._name_loss())
            for split, (loss, metrics) in zip(self._splits, found, strict=True)
        ]

    def score_rows(self, path: Path, report: OnShare | None) -> list[RowScores]:
        """See `evaluator.Evaluator.score_rows`."""
        # Each split is run twice: for the totals of Keras, and for the outputs of its rows.
        counter = RowCounter(report, 2 * self._count_rows())
        found, notes = self._evaluate(path, _CompiledModel.score_rows, counter)
        self._reportable = [reportable for _, reportable in found]
        name = self._name_loss()
        return [
            replace(scores, notes=(*notes, *scores.notes), loss_words=name) for scores, _ in found
        ]

    def _count_rows(self) -> int:
        return sum(split.rows for split in self._splits)

    def _name_loss(self) -> str:
        return self._compiled.loss_words if self._compiled else ""

    def score_predictions(self, predictions: Sequence[data.Array]) -> list[RowScores]:
        """See `evaluator.Evaluator.score_predictions`."""
        compiled = self._compiled
        assert compiled is not None  # noqa: S101 - `shapes` says so
        return [
            compiled.score_predictions(part, array, one, self._how.batch_size)
            for part, array, one in zip(compiled.parts, predictions, self._reportable, strict=True)
        ]

    def _evaluate(
        self,
        path: Path,
        measure: Callable[[_CompiledModel, _FittedSplit, int, RowCounter], _Result],
        counter: RowCounter,
    ) -> tuple[list[_Result], tuple[str, ...]]:
        """Load a file and measure its model on each split; return the results and notes."""
        description = self._described.pop(path)
        with silence_frameworks():
            keras = import_keras("polyak evaluate")
        # Forgotten until this file is scored, so that an error leaves no half-loaded model behind.
        earlier, self._compiled, self._reportable = self._compiled, None, []
        with silence_frameworks() as held_back, collect_warnings() as warned:
            with reword_keras_errors(path, f"cannot load it{name_writer(description)}", held_back):
                compiled = self._load(keras, path, description, earlier)
            results = []
            for part in compiled.parts:
                with reword_keras_errors(path, f"cannot score it on {part.source}", held_back):
                    results.append(measure(compiled, part, self._how.batch_size, counter))
        self._compiled = compiled
        notes = (*compiled.notes, *warned, *mirrors.describe_fetched(str(path)))
        self.notes += [note for note in notes if note not in self.notes]
        return results, notes

    def _load(
        self, keras: Any, path: Path, description: Description, earlier: _CompiledModel | None
    ) -> _CompiledModel:
        """Load a file into the model used before where that is the same, else into a new one."""
        bare = self._weights_of if description.weights else None
        # Assets, such as vocabularies, are state that load_weights does not replace.  Weights files
        # have none, so theirs are those of their architecture.
        if earlier and earlier.description == description and (bare or not description.assets):
            if bare:
                bare.load_weights(earlier.model, formats.scan([path])[0])
            else:
                with mirrors.fetched([str(path)]) as local:
                    earlier.model.load_weights(local)
            return earlier
        said = description
        if bare:
            model, training = bare.build(keras)
            bare.load_weights(model, formats.scan([path])[0])
            said = description._replace(training=training)
        else:
            with mirrors.fetched([str(path)]) as local:
                model = keras.saving.load_model(
                    local, compile=False, safe_mode=not self._how.trust_code
                )
        compiled = _CompiledModel.compile(keras, path, model, said, self._splits)
        return replace(compiled, description=description)


@dataclass(frozen=True, slots=True, eq=False)
class _FittedSplit:
    """The rows of one split, in the form that a model expects."""

    source: str
    features: data.Arrays
    labels: data.Arrays
    _fed: dict[int, Any] = field(default_factory=dict)  # by the size of a batch

    def feed(self, keras: Any, batch_size: int) -> dict[str, Any]:
        """Return the rows as Keras takes them, in batches.

        From arrays Keras builds a pipeline each time, which takes longer than a small model does.
        With TensorFlow it is built here, once for all models of a run.
        """
        arrays: Any = (self.features, self.labels)
        if keras.backend.backend() != "tensorflow" or not all(map(_is_plain, arrays)):
            return {"x": self.features, "y": self.labels, "batch_size": batch_size}
        if batch_size not in self._fed:
            import tensorflow

            # Keras makes all floats of arrays these.
            width = keras.backend.floatx()
            given = tuple(a.astype(width, copy=False) if a.dtype.kind == "f" else a for a in arrays)
            self._fed[batch_size] = tensorflow.data.Dataset.from_tensor_slices(given).batch(
                batch_size
            )
        return {"x": self._fed[batch_size]}


def _is_plain(arrays: data.Arrays) -> bool:
    """Return whether this is one array of numbers, which every library reads alike."""
    dtype = getattr(arrays, "dtype", None)
    return dtype is not None and dtype.kind in "biuf"


class _Reportable(NamedTuple):
    """The results that a model has for the single rows of a split."""

    shape: tuple[int, ...] | None  # of its predictions; None if it has several outputs
    losses: bool
    accuracy: str | None  # the name of the metric; None if rows are not right or wrong


@dataclass(frozen=True, slots=True)
class _CompiledModel:
    """A compiled model, and the rows in the form that it expects."""

    description: Description
    model: Any
    parts: tuple[_FittedSplit, ...]
    loss_words: str  # "" if it has none
    row_wise: RowWise
    notes: tuple[str, ...]

    @classmethod
    def compile(
        cls,
        keras: Any,
        path: Path,
        model: Any,
        description: Description,
        splits: Sequence[data.Split],
    ) -> _CompiledModel:
        """Compile a loaded model as its file says, and convert the rows to the form it expects."""
        known = Registry(keras)
        text = description.training
        training = parse_json_object(path, text, "training configuration") if text else {}
        if not training:
            known.notes.append("holds no training configuration, so its loss is unknown")
        outputs = list_output_names(model)
        loss = known.resolve(training.get("loss"), known.find_loss, "loss")
        metrics, weighted = (
            arrange_by_output(
                known.resolve(training.get(which), known.find_metric, "metric"), outputs
            )
            for which in ("metrics", "weighted_metrics")
        )
        has_loss = bool(flatten(loss))
        weights = keep_plain_values(training.get("loss_weights")) if has_loss else None
        loss_words = name_losses(model, outputs, loss, weights)
        if loss_words and "loss" in known.left_out:
            known.notes.append(
                "the loss shown is not the whole loss of the model: unknown losses are left out"
            )
        parts, right = _fit_splits(keras, path, model, splits, loss, metrics)
        row_wise = RowWise(keras, resolve_row_losses(keras, outputs, loss, weights), right, outputs)
        # Users compare accuracy, so it is added where the model does not measure it itself.
        if right and not find_accuracy(metrics):
            metrics = [*flatten(metrics), keras.metrics.MeanMetricWrapper(right, name="accuracy")]
        if not has_loss and not flatten(metrics):
            known.notes.append(
                "nothing to measure: the model has no loss and no metric, and the labels are not "
                "classes"
            )
        with reword_keras_errors(path, "cannot compile it", lambda: ""):
            model.compile(
                optimizer=None,  # with one, load_weights looks for its state in every .keras file
                loss=complete_losses(keras, outputs, loss),
                loss_weights=weights,
                metrics=metrics,
                weighted_metrics=weighted,
            )
        return cls(description, model, parts, loss_words, row_wise, tuple(known.notes))

    def evaluate(
        self, part: _FittedSplit, batch_size: int, counter: RowCounter
    ) -> tuple[float | None, dict[str, float]]:
        """Return loss and metrics."""
        keras = self.row_wise.keras
        rows = part.feed(keras, batch_size)
        callbacks = _list_callbacks(keras, batch_size, counter)
        result = self.model.evaluate(**rows, verbose=0, return_dict=True, callbacks=callbacks)
        # With return_dict the total loss has this name, penalties of regularizers included.
        metrics = {name: shorten_float32(value) for name, value in result.items()}
        loss = metrics.pop("loss", None)
        if self.loss_words:
            return loss, metrics
        for name in self.row_wise.names:  # the zeros of `make_zero_loss`, by output
            metrics.pop(f"{name}_loss", None)
        return None, metrics

    def score_rows(
        self, part: _FittedSplit, batch_size: int, counter: RowCounter
    ) -> tuple[RowScores, _Reportable]:
        """Return the scores of each row, as far as they agree with the totals of Keras."""
        loss, metrics = self.evaluate(part, batch_size, counter)
        rows = part.feed(self.row_wise.keras, batch_size)
        rows.pop("y", None)
        callbacks = _list_callbacks(self.row_wise.keras, batch_size, counter)
        predicted = self.model.predict(**rows, verbose=0, callbacks=callbacks)
        outputs = self.row_wise.order_outputs(predicted)
        losses, correct = self.row_wise.compute(part.labels, outputs, batch_size)
        notes = []
        if losses is not None:
            losses += compute_penalty(self.row_wise.keras, self.model)
        # Only the total of Keras contains losses over whole batches, masks and add_loss().  If it
        # differs, the mean of these losses is not the loss that the user knows.
        if losses is not None and not _is_close(losses.mean(), loss, 1e-3):
            losses = None
            notes.append("its loss is not the mean of the losses of single rows")
        name = next((n for n in metrics if "acc" in n.lower() and "top" not in n.lower()), None)
        if correct is not None and name and not _is_close(correct.mean(), metrics[name], 1e-3):
            correct = None
            notes.append(
                f"its metric {shown(name, 60)} is not the share of rows classified correctly"
            )
        only = outputs[0] if len(outputs) == 1 else None
        reportable = _Reportable(
            None if only is None else only.shape,
            losses is not None,
            None if correct is None else name or "accuracy",
        )
        kind = self.row_wise.loss_name
        return RowScores(loss, metrics, losses, correct, only, kind, tuple(notes)), reportable

    def score_predictions(
        self, part: _FittedSplit, output: data.Array, reportable: _Reportable, batch_size: int
    ) -> RowScores:
        """Return the scores of predictions made elsewhere, as far as the model has them."""
        import numpy as np

        losses, correct = self.row_wise.compute(part.labels, [output], batch_size)
        losses = losses if reportable.losses else None
        # Rounded to float32 like the totals of Keras, so that both are printed alike.
        loss = None if losses is None else shorten_float32(float(np.float32(losses.mean())))
        metrics = {}
        if reportable.accuracy and correct is not None:
            metrics[reportable.accuracy] = shorten_float32(float(np.float32(correct.mean())))
        correct = correct if reportable.accuracy else None
        return RowScores(loss, metrics, losses, correct, output, self.row_wise.loss_name)


def _list_callbacks(keras: Any, batch_size: int, counter: RowCounter) -> list[Any]:
    """Return what counts the rows of each batch, if anybody waits: a callback costs a little."""
    if not counter.is_wanted:
        return []

    def add(_batch: int, logs: Any) -> None:
        del logs  # Keras gives it by this name
        counter.add(batch_size)

    return [keras.callbacks.LambdaCallback(on_test_batch_end=add, on_predict_batch_end=add)]


def _is_close(mean: float, keras: float | None, tolerance: float) -> bool:
    """Return whether a mean is what Keras, which adds up in float32, says; NaN agrees with NaN."""
    if keras is None or mean != mean or keras != keras:
        return keras is not None and mean != mean and keras != keras
    return math.isclose(mean, keras, rel_tol=tolerance, abs_tol=tolerance)


def _fit_splits(
    keras: Any, path: Path, model: Any, splits: Sequence[data.Split], loss: Any, metrics: Any
) -> tuple[tuple[_FittedSplit, ...], Callable[[Any, Any], Any] | None]:
    """Return the rows in the form that a model expects, and the accuracy of a row, if any."""
    parts, all_classes = [], True
    for split in splits:
        features = fit_features(path, model, split)
        labels, classes = fit_labels(path, split, model, loss, metrics)
        parts.append(_FittedSplit(split.source, features, labels))
        all_classes &= classes
    right = (
        choose_accuracy(keras, model, loss, metrics, parts[0].labels)
        if all_classes and parts
        else None
    )
    return tuple(parts), right


def shorten_float32(value: float) -> float:
    """Return the shortest number that is the same float32, where Keras computed in float32.

    792 right of 1,000 are 0.792, not 0.7919999957084656, which a gate at 0.792 would refuse.
    """
    import numpy as np

    # numpy prints the shortest decimal that identifies a number of its type.
    single = np.float32(value)
    return float(str(single)) if float(single) == float(value) else float(value)
