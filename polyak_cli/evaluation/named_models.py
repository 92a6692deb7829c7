"""Score models that a function of the user makes: the back end of `evaluator` for other files.

The function returns a module of PyTorch, which gets the tensors of one checkpoint after another by
name, or it takes these tensors and returns what predicts.  Rows are scored batch by batch.  This
module imports no framework: `torch_modules` runs modules.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyak_cli.errors import MissingExtraError, UsageError, list_some, shown, word_count
from polyak_cli.evaluation import data, user_code, weights
from polyak_cli.evaluation.batchnorm import Moments
from polyak_cli.evaluation.evaluator import RowScores, Score, summarise
from polyak_cli.evaluation.keras_files import collect_warnings
from polyak_cli.evaluation.outputs import Outputs, OwnLosses, read_losses
from polyak_cli.evaluation.passes import Function, Predictor
from polyak_cli.evaluation.quiet import silence_frameworks
from polyak_cli.evaluation.row_counts import OnShare, RowCounter
from polyak_cli.evaluation.scoring import Scoring
from polyak_cli.storage import mirrors
from polyak_cli.tensors import Table

if TYPE_CHECKING:
    from polyak_cli.evaluation.torch_modules import Module

EXPECTED = "expected MODULE.py:FUNCTION or package.module:FUNCTION that returns the model"


class NamedModels:
    """Scores one checkpoint after another on the same rows; see `evaluator.Evaluator`.

    Attributes:
        notes: messages for the user about the files scored so far, each only once.
    """

    def __init__(self, splits: Sequence[data.Split], how: Scoring, source: str) -> None:
        """Find the function; it is called when the first checkpoint is scored.

        Raises:
            UsageError: there is no such function.
            PolyakError: there is no such file, or its code failed.
        """
        self.notes: list[str] = []
        self._splits = tuple(splits)
        self._how, self._source = how, source
        if not user_code.is_function(source):
            raise UsageError(f"--model {shown(source)}: {EXPECTED}")
        self._maker = user_code.find_function(source, EXPECTED)
        self._takes_weights = self._maker.count_arguments() == 1
        self._described: dict[Path, weights.Weights] = {}
        self._made: tuple[Module | Function, OwnLosses] | None = None
        self._passes: list[Outputs] = []

    @property
    def shapes(self) -> Sequence[tuple[int, ...] | None]:
        """See `evaluator.BackEnd.shapes`."""
        return [made.shape for made in self._passes]

    def inspect_files(self, paths: Sequence[Path]) -> None:
        """See `evaluator.Evaluator.inspect_files`."""
        found = weights.describe(paths, key=self._how.key, use_ema=self._how.use_ema)
        self._described.update(zip(paths, found, strict=True))

    def score(self, path: Path, report: OnShare | None) -> list[Score]:
        """See `evaluator.Evaluator.score`."""
        return summarise(path, self._splits, self.score_rows(path, report))

    def score_rows(self, path: Path, report: OnShare | None) -> list[RowScores]:
        """See `evaluator.Evaluator.score_rows`."""
        held = self._described.pop(path)
        self._passes = []
        counter = RowCounter(report, sum(split.rows for split in self._splits))
        with silence_frameworks(), collect_warnings("PyTorch") as warned:
            # Moving a module and loading its tensors may run code of the user, too.
            with self._maker.running(f"the model cannot take the tensors of {shown(path)}"):
                predictor, own, notes = self._load(held)
            for split in self._splits:
                what = f"the model with the weights of {shown(path)} failed on {split.source}"
                with self._maker.running(what):
                    made = Outputs(predictor, own, split, str(path))
                    made.run(self._how.batch_size, counter)
                self._passes.append(made)
        said = (*notes, *warned, *mirrors.describe_fetched(str(path)))
        self.notes += [note for note in said if note not in self.notes]
        found = [made.finish() for made in self._passes]
        return [replace(one, notes=(*said, *one.notes)) for one in found]

    def score_predictions(self, predictions: Sequence[data.Array]) -> list[RowScores]:
        """See `evaluator.Evaluator.score_predictions`."""
        pairs = zip(predictions, self._passes, strict=True)
        return [made.run_given(array, self._how.batch_size) for array, made in pairs]

    def _load(self, held: weights.Weights) -> tuple[Predictor, OwnLosses, Sequence[str]]:
        """Return what predicts with the tensors of a checkpoint, its loss if it has one, and notes.

        Raises:
            UsageError: the function returns something else.
            MismatchError: the tensors are not those of the module.
        """
        if self._takes_weights:
            returned = self._maker.call(weights.read_arrays(held))
            predictor, own = recognise(self._source, returned, held.path, self._how.device)
            return predictor, own, self._compare(predictor, held)
        if self._made is None:
            require_torch(self._maker.path)
            self._made = recognise(self._source, self._maker.call(), held.path, self._how.device)
        predictor, own = self._made
        if isinstance(predictor, Function):
            raise UsageError(
                f"--model {shown(self._source)}: returns a function, which polyak cannot give the "
                "tensors of a checkpoint; return a torch.nn.Module, or write the function so that "
                "it takes them as its one argument, a dict of arrays by name"
            )
        return predictor, own, predictor.load(held, f"the module of {shown(self._source)}")

    def _compare(self, predictor: Module | Function, held: weights.Weights) -> Sequence[str]:
        """Return a note where a function of the tensors has changed some of them in its module.

        Raises:
            UsageError: it has put none of them into its module.
        """
        if isinstance(predictor, Function):
            return ()
        changed, same = predictor.find_changed(held, f"the module of {shown(self._source)}")
        if changed and not same:
            raise UsageError(
                f"--model {shown(self._source)}: takes one argument, which is a dict of the "
                "tensors, but the module that it returned has other values than "
                f"{shown(held.path)}; return a module with these tensors, or name a function "
                "without arguments, whose module polyak gives them"
            )
        if not changed:
            return ()
        count = word_count(len(changed), "parameter")
        return (f"the function changed {count} of the module ({list_some(changed)})",)


def recognise(
    source: str, returned: Any, path: Path, device: str | None
) -> tuple[Module | Function, OwnLosses]:
    """Return the model and the loss that a function of the user returned.

    Args:
        source: as the user names the function.
        returned: what it returned.
        path: the checkpoint whose tensors it gets, for messages.
        device: where PyTorch runs a module; None for a GPU where there is one.

    Raises:
        UsageError: it is neither a module of PyTorch nor a function.
    """
    model, loss = returned if _is_pair(returned) else (returned, None)
    own = read_losses(loss)
    where = f"--model {shown(source)}: returned"
    # A class of a framework that is not imported cannot have been returned.
    if "torch" in sys.modules:
        from polyak_cli.evaluation import torch_modules

        if torch_modules.is_module(model):
            return torch_modules.Module(model, device), own
    if "keras" in sys.modules and isinstance(model, sys.modules["keras"].Model):
        raise UsageError(
            f"{where} a Keras model, and {shown(path)} is not a file of Keras's; expected a "
            "torch.nn.Module"
        )
    if not callable(model) or isinstance(model, type):
        raise UsageError(
            f"{where} {shown(type(model).__name__, 60)}; expected a torch.nn.Module, or "
            "(module, loss)"
        )
    return Function(model), own


def _is_pair(returned: Any) -> bool:
    return isinstance(returned, tuple) and len(returned) == 2


def require_torch(path: Path) -> None:
    """Check that PyTorch is installed, without importing it.

    Raises:
        MissingExtraError: it is not.
    """
    if find_spec("torch") is None:
        raise MissingExtraError(f"{shown(path)}: running a module of PyTorch", "torch")


def check_device(name: str | None) -> None:
    """Refuse a device that cannot be used; PyTorch is imported only where one is named.

    Raises:
        UsageError: there is no such device.
    """
    if name is not None:
        from polyak_cli.evaluation import torch_modules

        torch_modules.choose_device(name)


def gather_moments(
    table: Table,
    source: str,
    rows: data.Split,
    batch_size: int,
    device: str | None,
    progress: Callable[[int, int], None] | None,
) -> Moments:
    """Gather BatchNorm's statistics with the module of a function of the user.

    Args:
        table: of the checkpoint whose tensors the module gets.
        source: names the function.
        rows: features.
        batch_size: the largest number of rows in a batch.
        device: where PyTorch runs the module; None for a GPU where there is one.
        progress: called after each batch with the number of batches done, and that of all.

    Raises:
        UsageError: the function does not return a module of PyTorch.
        MismatchError: the tensors are not those of the module, or it has no statistics to gather.
        PolyakError: the function or the module fails.
    """
    maker = user_code.find_function(source, EXPECTED)
    if maker.count_arguments():
        raise UsageError(
            f"--model {shown(source)}: takes arguments, as a function of the tensors does; "
            "expected one without any that returns a torch.nn.Module, whose BatchNorm layers "
            "polyak can see"
        )
    held = weights.Weights(table.path, table, weights.list_views(table))
    with silence_frameworks(), collect_warnings("PyTorch") as warned:
        returned = maker.call()
        with maker.running(f"the model cannot be used for {shown(table.path)}"):
            model, _ = recognise(source, returned, table.path, device)
        if isinstance(model, Function):
            raise UsageError(
                f"--model {shown(source)}: returns a function; expected a torch.nn.Module, whose "
                "BatchNorm layers polyak can see"
            )
        from polyak_cli.evaluation import torch_batchnorm

        found = torch_batchnorm.gather_moments(held, model, maker, rows, batch_size, progress)
    return replace(found, notes=(*found.notes, *warned))
