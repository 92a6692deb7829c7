"""Score Keras models on data: loss, metrics, and the result of every single row.

Models are compiled here from what the file says of its training.  This module knows nothing of
averaging, and leaves the question of what a file may contain to `formats`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from polyak_cli.errors import MismatchError, UsageError, shown
from polyak_cli.evaluation import data
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
from polyak_cli.evaluation.labels import check_features, fit_labels, list_output_names
from polyak_cli.evaluation.losses import (
    Registry,
    RowWise,
    arrange_by_output,
    choose_accuracy,
    compute_penalty,
    find_accuracy,
    flatten,
    keep_plain_values,
    make_zero_loss,
    resolve_row_losses,
)
from polyak_cli.evaluation.quiet import hushed

_Answer = TypeVar("_Answer")
_StrPath = str | os.PathLike[str]


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
            (rows, ...).  ``polyak_cli.evaluation.data.load("blobs").split()`` gives those
            of ``--data blobs``.
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
        require_keras("polyak evaluate")
        self.notes: list[str] = []
        self._splits = tuple(splits)
        self._batch_size = batch_size
        self._trust_code = trust_code
        self._described: dict[Path, Description] = {}
        self._scorer: _Scorer | None = None
        self._told: list[_Told] = []

    def look(self, paths: Sequence[Path]) -> None:
        """Look at files at arm's length before the first is loaded, several at a time.

        What is asked of a file next relies on it, once; a file that is written anew after that is
        looked at again.

        Raises:
            FormatError: a file is damaged or foreign, or holds weights without an architecture.
        """
        hdf5 = [path for path in paths if path.suffix != ".keras" or not is_zip(path)]
        self._described.update(zip(hdf5, describe_hdf5_files(hdf5), strict=True))
        for path in paths:
            if path not in self._described:
                self._described[path] = describe_archive(path)

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
            keras = import_keras("polyak evaluate")
        earlier, self._scorer, self._told = self._scorer, None, []  # nothing half loaded stays
        with hushed() as held_back, collect_warnings() as warned:
            with reword_keras_errors(path, f"cannot load it{name_writer(description)}", held_back):
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
                with reword_keras_errors(path, f"cannot score it on {part.source}", held_back):
                    answers.append(question(scorer, part, self._batch_size))
        self._scorer = scorer
        notes = (*scorer.notes, *warned)
        self.notes += [note for note in notes if note not in self.notes]
        return answers, notes


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

    description: Description
    model: Any
    parts: tuple[_Part, ...]
    has_loss: bool
    row_wise: RowWise
    notes: tuple[str, ...]

    @classmethod
    def prepared(
        cls,
        keras: Any,
        path: Path,
        model: Any,
        description: Description,
        splits: Sequence[data.Split],
    ) -> _Scorer:
        """Compile a loaded model and fit the rows to it."""
        known = Registry(keras, [])
        text = description.training
        training = parse_json_object(path, text, "training configuration") if text else {}
        if not training:
            known.notes.append("holds no training configuration: the loss it had is not known")
        outputs = list_output_names(model)
        loss = known.nested(training.get("loss"), known.loss, "loss")
        metrics, weighted = (
            arrange_by_output(known.nested(training.get(which), known.metric, "metric"), outputs)
            for which in ("metrics", "weighted_metrics")
        )
        has_loss = bool(flatten(loss))
        weights = keep_plain_values(training.get("loss_weights")) if has_loss else None
        parts, right = _fitted_parts(keras, path, model, splits, loss, metrics)
        row_wise = RowWise(keras, resolve_row_losses(keras, outputs, loss, weights), right, outputs)
        if right and not find_accuracy(metrics):
            metrics = [*flatten(metrics), keras.metrics.MeanMetricWrapper(right, name="accuracy")]
        if not has_loss and not flatten(metrics):
            known.notes.append("nothing to measure: no loss, no metric, and no classes as labels")
        with reword_keras_errors(path, "cannot compile it", lambda: ""):
            model.compile(
                optimizer=None,  # Keras would look for its state in every .keras file
                loss=loss if has_loss else [make_zero_loss(keras)] * len(outputs),
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
            losses += compute_penalty(self.row_wise.keras, self.model)
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
        check_features(path, model, split)
        labels, classes = fit_labels(path, split, model, loss, metrics)
        parts.append(_Part(split.source, split.features, labels))
        all_classes &= classes
    right = (
        choose_accuracy(keras, model, loss, metrics, parts[0].labels)
        if all_classes and parts
        else None
    )
    return tuple(parts), right


def _shortest(value: float) -> float:
    """Return the shortest number that is the same float32, where Keras computed in float32.

    792 right of 1,000 are 0.792, not 0.7919999957084656, which a gate at 0.792 would refuse.
    """
    import numpy as np

    single = np.float32(value)
    return float(str(single)) if float(single) == float(value) else float(value)
