"""Score model files on data: loss, metrics, and the result of every single row.

`Evaluator` gives each file to the back end that can run its model: `keras_models` opens the files
that Keras wrote, `named_models` gives the tensors of any other to a model that a function of the
user makes.  This module knows no framework and nothing of averaging.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Unpack

from polyak_cli.errors import MismatchError, UsageError
from polyak_cli.evaluation import data, frameworks, scoring
from polyak_cli.evaluation.keras_files import is_of_keras, refuse_parts
from polyak_cli.evaluation.own_metrics import Measured, OwnMetric
from polyak_cli.evaluation.row_counts import OnShare, Progress, follow
from polyak_cli.evaluation.scoring import ScoringOptions
from polyak_cli.formats.format import Format
from polyak_cli.storage import mirrors

_StrPath = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Score:
    """The result of a model on some rows.

    Attributes:
        path: the model file.
        loss: mean over the rows of the loss that the model was trained with, as Keras computes it,
            in the unit of that loss (nats for a cross-entropy); None if it is not known.
        metrics: name -> value.  The metrics of the model, and accuracy (the share of rows
            classified correctly, 0 to 1) where labels are classes.
            With several outputs, the loss and the metrics of each too: kind_loss, kind_accuracy.
        rows: how many were scored.
        notes: messages for the user, one line each.
        loss_words: which loss it is, and whose, such as "mse (Keras's)"; "" if there is none.
    """

    path: Path
    loss: float | None
    metrics: Mapping[str, float]
    rows: int
    notes: tuple[str, ...] = ()
    loss_words: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class RowScores:
    """The result of a model on some rows, in total and row by row.

    Attributes:
        loss: as in `Score`.
        metrics: as in `Score`.
        losses: (rows,) float64, the loss of each row, whose mean is the loss; None if the loss is
            not known, or is not a mean over single rows.
        correct: (rows,) bool, whether the class of each row is predicted correctly; None unless
            labels are classes, one a row.
        predictions: (rows, ...) output of the model; None if it has several outputs.
        loss_name: name of the loss; only losses of the same name can be compared.
        notes: messages for the user, one line each.
        loss_words: as in `Score`.
        own: the metric of the user's own, if there is one.
    """

    loss: float | None
    metrics: Mapping[str, float]
    losses: data.Array | None
    correct: data.Array | None
    predictions: data.Array | None
    loss_name: str = ""
    notes: tuple[str, ...] = ()
    loss_words: str = ""
    own: Measured | None = None


def summarise(path: Path, splits: Sequence[data.Split], found: Sequence[RowScores]) -> list[Score]:
    """Return the result of a file on each split in total."""
    return [
        Score(path, one.loss, one.metrics, split.rows, one.notes, one.loss_words)
        for split, one in zip(splits, found, strict=True)
    ]


def evaluate(
    paths: _StrPath | Sequence[_StrPath],
    rows: data.Split,
    *,
    progress: Progress | None = None,
    **options: Unpack[ScoringOptions],
) -> Iterator[Score]:
    """Score model files on the same rows, one after the other.

    Every file is inspected in a separate process before this function returns.  Each is loaded and
    scored when the iterator reaches it.  Labels are converted to the form that each loss expects:
    classes as integers or one-hot.

    >>> rows = Split("my rows", x, y)                                     # doctest: +SKIP
    >>> [score.metrics["accuracy"] for score in evaluate("final.h5", rows)]  # doctest: +SKIP

    Args:
        paths: whole-model ``.h5``, ``.hdf5`` or ``.keras`` files, or one of them; those of a folder
            are found by ``model_files``.  With ``model`` also other checkpoints that ``average``
            reads, such as ``.pt``, ``.safetensors`` and folders of Hugging Face.
        rows: features, one array (rows, ...) for each input of the model, and labels, one for each
            output: classes (rows,) from 0, one-hot (rows, classes), or numbers to predict
            (rows, ...).  ``polyak_cli.evaluation.data.load("blobs").split()`` gives those
            of ``--data blobs``.
        progress: called as rows are scored, with the number of models done and that of all; 2.25
            of 14 is a quarter of the third model.
        **options: see `ScoringOptions`.

    Returns:
        An iterator with a score for each file, in the order given.

    Raises:
        UsageError: the batch size is out of range.
        MissingExtraError: Keras or its back end is not installed.
        FormatError: a file is damaged or foreign, or holds weights without an architecture.
        MismatchError: the rows do not fit the model; raised when the iterator comes to it.
        PolyakError: Keras is too old, or cannot load a model, or the model carries code; the last
            two are raised when the iterator comes to it.
    """
    evaluator = Evaluator([rows], **options)
    # A single string is a sequence of strings too: of its letters.
    several = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    files = [Path(mirrors.enter(os.fspath(path))) for path in several]
    evaluator.inspect_files(files)
    return (
        score
        for done, path in enumerate(files)
        for score in evaluator.score(path, follow(progress, done, len(files)))
    )


class BackEnd(Protocol):
    """What runs the models of one framework."""

    notes: list[str]

    @property
    def shapes(self) -> Sequence[tuple[int, ...] | None]:
        """Of the predictions that can be scored: those of the last `score_rows`, one a split.

        None where there are none for single rows; nothing before.
        """

    def inspect_files(self, paths: Sequence[Path]) -> None:
        """See `Evaluator.inspect_files`; the files are of one format."""

    def score(self, path: Path, report: OnShare | None) -> list[Score]:
        """See `Evaluator.score`; the file was inspected, the share is reported after each batch."""

    def score_rows(self, path: Path, report: OnShare | None) -> list[RowScores]:
        """See `Evaluator.score_rows`; the share is reported after each batch."""

    def score_predictions(self, predictions: Sequence[data.Array]) -> list[RowScores]:
        """See `Evaluator.score_predictions`."""


class Evaluator:
    """Scores one model file after another on the same rows.

    Files with the same description share one compiled model and the fitted rows; only the tensors
    are replaced.  Building a model takes seconds, loading its weights milliseconds.

    Attributes:
        metric: of the user's own; None if there is none.
    """

    def __init__(self, splits: Sequence[data.Split], **options: Unpack[ScoringOptions]) -> None:
        """Keep the rows; no file is opened yet.

        Args:
            splits: features and labels, as for `evaluate`.
            **options: see `ScoringOptions`.

        Raises:
            UsageError: the batch size is out of range, or there is no such metric.
        """
        self._splits, self._how = tuple(splits), scoring.parse(options)
        self._source = self._how.source
        self._back_ends: dict[str, BackEnd] = {}
        self._inspected: dict[Path, BackEnd] = {}
        self._last: BackEnd | None = None
        self.metric = None if self._how.metric is None else OwnMetric(self._how.metric)

    @property
    def notes(self) -> list[str]:
        """Messages for the user about the files scored so far, each only once."""
        return [note for one in self._back_ends.values() for note in one.notes]

    def _choose(self, path: Path, form: Format) -> BackEnd:
        """Return the back end that can run the model of a file, made when it is first needed.

        Raises:
            FormatError: no function makes its model.
        """
        # Imported here: the back ends make the results that are defined above.
        if is_of_keras(form) and not self._takes_tensors:
            from polyak_cli.evaluation.keras_models import KerasModels

            if self._how.key or self._how.use_ema:
                refuse_parts(path, form)
            if "keras" not in self._back_ends:
                self._back_ends["keras"] = KerasModels(self._splits, self._how)
            return self._back_ends["keras"]
        if self._source is None:
            frameworks.refuse_missing_model(path, form)
        from polyak_cli.evaluation.named_models import NamedModels

        if "named" not in self._back_ends:
            self._back_ends["named"] = NamedModels(self._splits, self._how, self._source)
        return self._back_ends["named"]

    @functools.cached_property
    def _takes_tensors(self) -> bool:
        return frameworks.takes_tensors(self._source)

    def inspect_files(self, paths: Sequence[Path]) -> None:
        """Inspect files in separate processes, several at a time, before the first is loaded.

        The result is used by the next call for this file and then discarded, so a rewritten file
        is inspected again.

        Raises:
            FormatError: a file is damaged or foreign, or holds weights without an architecture.
        """
        groups: dict[tuple[int, str], list[Path]] = {}
        for path in paths:
            form = frameworks.recognise(path)
            self._inspected[path] = self._choose(path, form)
            groups.setdefault((id(self._inspected[path]), form.key), []).append(path)
        for own in groups.values():
            self._inspected[own[0]].inspect_files(own)

    def _take(self, path: Path) -> BackEnd:
        """Return the back end that has inspected a file."""
        if path not in self._inspected:
            self.inspect_files([path])
        return self._inspected.pop(path)

    def score(self, path: Path, report: OnShare | None = None) -> list[Score]:
        """Return the score of a file on each split; arguments and errors as of `score_rows`."""
        path = Path(mirrors.enter(os.fspath(path)))
        if self.metric is not None:
            return summarise(path, self._splits, self.score_rows(path, report))
        with _reporting_ends(report):
            return self._take(path).score(path, report)

    def score_rows(self, path: Path, report: OnShare | None = None) -> list[RowScores]:
        """Return the result of a file on each split, in total and row by row.

        Args:
            path: the file.
            report: called with the share that is done, from 0 before the first batch to 1.

        Raises:
            FormatError: the file is damaged or foreign, or holds weights without an architecture.
            MismatchError: the rows do not fit the model.
            PolyakError: Keras cannot load or score the model, or it carries code.
        """
        path = Path(mirrors.enter(os.fspath(path)))
        self._last = None  # an error leaves no model behind to score predictions of
        back_end = self._take(path)
        with _reporting_ends(report):
            found = back_end.score_rows(path, report)
        self._last = back_end
        return self._measure(path, found)

    def score_predictions(self, predictions: Sequence[data.Array]) -> list[RowScores]:
        """Score predictions made elsewhere, such as a mean, like those of the model scored last.

        Their loss is the mean of the losses of the rows.  It does not contain the penalty of
        regularizers, which depends on the tensors of a model.

        Args:
            predictions: one array for each split, shaped like the model's own.

        Raises:
            UsageError: `score_rows` was not called before, or the model has several outputs.
            MismatchError: the shapes are not those of the model's own predictions.
        """
        shapes = self._last.shapes if self._last else ()
        if self._last is None or not shapes or None in shapes:
            raise UsageError(
                "predictions can be scored only for a model with one output that was examined "
                "before"
            )
        found = [array.shape for array in predictions]
        if found != [*shapes]:
            raise MismatchError(
                f"predictions have the shapes {found}; expected those of the model, {[*shapes]}"
            )
        return self._measure(Path("the ensemble"), self._last.score_predictions(predictions))

    def _measure(self, path: Path, found: list[RowScores]) -> list[RowScores]:
        """Return the results with the metric of the user's own, if there is one."""
        if self.metric is None:
            return found
        measure = self.metric.measure
        return [measure(path, *pair) for pair in zip(self._splits, found, strict=True)]


@contextlib.contextmanager
def _reporting_ends(report: OnShare | None) -> Iterator[None]:
    """Report where the work on a file begins and ends."""
    if report:
        report(0.0)
    yield
    if report:
        report(1.0)
