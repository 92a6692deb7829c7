"""Run a model over the rows of a split, and score each of its outputs by labels of its own.

With labels of several outputs, by name or by position, the loss is the sum of theirs, as Keras adds
them up.  What one output's loss is, `passes` knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from polyak_cli.errors import MismatchError, UsageError, list_some, shown
from polyak_cli.evaluation import data
from polyak_cli.evaluation.evaluator import RowScores
from polyak_cli.evaluation.passes import OwnLoss, Pass, Predictor
from polyak_cli.evaluation.row_counts import RowCounter

#: What the user's function returns beside the model: one loss, or one for each output.
OwnLosses: TypeAlias = OwnLoss | Mapping[str, OwnLoss] | None

HOW = 'return (model, {"NAME": loss, ...}) from the function, with one loss for each output'


def read_losses(returned: Any) -> OwnLosses:
    """Return the losses that a function of the user returned; of a tuple or list, by position."""
    if isinstance(returned, (tuple, list)):
        returned = _number(returned)
    if isinstance(returned, Mapping):
        return {str(name): OwnLoss(one) for name, one in returned.items()}
    return None if returned is None else OwnLoss(returned)


def _number(several: Sequence[Any]) -> dict[str, Any]:
    """Return several outputs, labels or losses by the names that they have by position."""
    return {f"output_{number}": one for number, one in enumerate(several, 1)}


class Outputs:
    """The passes over the outputs of a model, in one run of it.

    Attributes:
        passes: name -> that of an output; a single one has the name "".
    """

    def __init__(self, predictor: Predictor, own: OwnLosses, split: data.Split, where: str) -> None:
        """Match losses with labels; nothing is run yet.

        Args:
            predictor: the model.
            own: its losses; None to choose them by the labels.
            split: the rows.
            where: the file of the weights, for messages.

        Raises:
            UsageError: the losses are not those of the outputs that have labels.
        """
        self._predictor, self._split, self._where = predictor, split, shown(where)
        labels = split.labels
        named = _number(labels) if isinstance(labels, tuple) else labels
        several = named if isinstance(named, Mapping) else {"": named}
        losses = _match_losses(own, several, split.source)
        self.passes = {
            name: Pass(
                predictor,
                losses[name],
                replace(split, labels=array),
                where,
                # An ensemble of several outputs has no loss that all of them would share.
                keeps=len(several) == 1,
            )
            for name, array in several.items()
        }

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of the predictions that are kept; None if they are too large, or of several outputs."""
        found = [one.shape for one in self.passes.values()]
        return found[0] if len(found) == 1 else None

    def run(self, batch_size: int, counter: RowCounter) -> None:
        """Score the outputs of the model, and count its rows.

        Raises:
            MismatchError: the labels do not fit the outputs.
        """
        for start in range(0, self._split.rows, batch_size):
            block = slice(start, start + batch_size)
            returned = self._predictor.predict(data.take_rows(self._split.features, block))
            for name, one in self.passes.items():
                one.add(block, self._find_output(name, returned))
            counter.add(min(batch_size, self._split.rows - start))

    def run_given(self, predictions: data.Array, batch_size: int) -> RowScores:
        """Return the scores of predictions that are like those of the only output."""
        (made,) = self.passes.values()
        again = made.restart()
        again.run_given(predictions, batch_size)
        return again.finish()

    def finish(self) -> RowScores:
        """Return the results of all batches."""
        found = {name: one.finish() for name, one in self.passes.items()}
        return _add_up(found) if len(found) > 1 else next(iter(found.values()))

    def _find_output(self, name: str, returned: Any) -> Any:
        """Return the output of a name, as its loss takes it.

        Raises:
            MismatchError: the model gives no such output.
        """
        if name == "":
            return self._predictor.find_output(returned)
        given = returned
        # A named tuple is one too, but its outputs have names.
        if isinstance(returned, (tuple, list)) and not hasattr(returned, "_fields"):
            given = _number(returned)
            if isinstance(self._split.labels, tuple) and len(given) != len(self.passes):
                raise MismatchError(
                    f"{self._where}: the model gives {len(given)} outputs, but "
                    f"{self._split.source} has labels for {len(self.passes)}"
                )
        found = None
        if isinstance(given, Mapping):
            found = given.get(name)
        elif not hasattr(given, "shape"):
            # A dataclass of Transformers, or a named tuple, has its outputs as attributes.
            found = getattr(given, name, None)
        # One array has a name in an .npz or a dict, whatever the model calls its only output.
        if found is None and len(self.passes) == 1:
            return self._predictor.find_output(returned)
        if found is None:
            gives = [*given] if isinstance(given, Mapping) else [type(returned).__name__]
            raise MismatchError(
                f"{self._where}: the model gives {list_some([str(one) for one in gives])}, but "
                f"{self._split.source} has labels for {list_some([*self.passes])}; name the labels "
                "like the outputs"
            )
        return found


def _match_losses(
    own: OwnLosses, labels: Mapping[str, object], source: str
) -> Mapping[str, OwnLoss | None]:
    """Return the loss of each output that has labels.

    Raises:
        UsageError: there is one loss for several outputs, or there are others.
    """
    if isinstance(own, Mapping):
        if {*own} != {*labels}:
            has = list_some([*labels]) if "" not in labels else "one output"
            raise UsageError(
                f"the function of --model returned losses for {list_some([*own])}, but {source} "
                f"has labels for {has}"
            )
        return own
    # It may take all outputs at once, but then nothing would tell the loss of each.
    if own is not None and len(labels) > 1:
        raise UsageError(
            f"the function of --model returned one loss, but {source} has labels for "
            f"{list_some([*labels])}; {HOW}"
        )
    return dict.fromkeys(labels, own)


def _add_up(found: Mapping[str, RowScores]) -> RowScores:
    """Return the sum of the losses of several outputs, and the metrics of each by its name."""
    # Without those of one output, the sum of a row would be that of another loss.
    losses = [one.losses for one in found.values() if one.losses is not None]
    metrics: dict[str, float] = {}
    for name, one in found.items():
        own = {"loss": one.loss or 0.0, **one.metrics}
        metrics |= {f"{name}_{metric}": value for metric, value in own.items()}
    return RowScores(
        sum(one.loss or 0.0 for one in found.values()),
        metrics,
        sum(losses[1:], losses[0]) if len(losses) == len(found) else None,
        None,
        None,
        "; ".join(f"{name}: {one.loss_name}" for name, one in found.items()),
        tuple(f"{shown(name, 60)}: {note}" for name, one in found.items() for note in one.notes),
        "; ".join(f"{shown(name, 60)}: {one.loss_words}" for name, one in found.items()),
    )
