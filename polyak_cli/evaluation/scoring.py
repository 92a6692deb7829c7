"""How models are scored: the options that `evaluate`, `compare` and `sweep` share.

A new option is a key of `ScoringOptions`, a field of `Scoring`, and read where it has an effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from polyak_cli.averaging.options import fill
from polyak_cli.errors import UsageError
from polyak_cli.evaluation import user_code
from polyak_cli.evaluation.user_code import Maker


class ScoringOptions(TypedDict, total=False):
    """The options of `evaluate`, `compare` and `Evaluator`; every one may be left out.

    Attributes:
        batch_size: rows at a time, 256 by default; changes the speed, and the results only by
            rounding.
        trust_code: run the code that a file carries in a Lambda layer.
        model: the architecture of files that hold weights only: of Keras's a whole model
            (``.keras`` or ``.h5``), ``FILE.json`` of ``model.to_json()``, or
            ``MODULE.py:FUNCTION``, whose function is run and returns the model.  Of others such a
            function, which returns a ``torch.nn.Module``, alone or with its loss as ``(module,
            loss)``, of several outputs a dict of losses; or one of a single argument, which gets
            the tensors as a dict of arrays and returns ``predict(rows) -> outputs``, alone or with
            a loss.  It may be the function itself, of a module or a notebook.
        device: where PyTorch runs modules, such as ``cpu``; by default a GPU where there is one.
        metric: "accuracy", "loss", or ``MODULE.py:FUNCTION``, whose function gets labels and
            predictions, numpy arrays, and returns a number for each row, or one for all; more is
            better.  Predictions are the outputs, and probabilities where a module of PyTorch gives
            logits.
        key: of the part of PyTorch or Orbax checkpoints that is scored, as for `average`.
        use_ema: score the EMAs that a trainer keeps beside the weights, as for `average`.
    """

    batch_size: int | None
    trust_code: bool
    model: Maker | None
    device: str | None
    metric: str | None
    key: str | None
    use_ema: bool


@dataclass(frozen=True, slots=True)
class Scoring:
    """What of a file is scored, and how; its fields hold the only defaults."""

    batch_size: int = 256
    trust_code: bool = False
    model: Maker | None = None
    device: str | None = None
    metric: str | None = None
    key: str = ""
    use_ema: bool = False

    @property
    def source(self) -> str | None:
        """The text that names the model: a path, or a function by its module.

        Raises:
            UsageError: a function has no name of its own in its module, such as a lambda.
        """
        return None if self.model is None else user_code.name_source(self.model)


#: The keys of `ScoringOptions`.
KEYS = frozenset(one.name for one in fields(Scoring))


def parse(options: Mapping[str, Any]) -> Scoring:
    """Check the options of `ScoringOptions` by themselves; None stands for a default.

    Raises:
        TypeError: there is no such option.
        UsageError: the batch size is out of range.
    """
    unknown = options.keys() - KEYS
    if unknown:  # as Python raises for an unknown keyword
        raise TypeError(f"unknown option {min(unknown)}")
    found = fill(Scoring, options)
    if found.batch_size < 1:
        raise UsageError(f"--batch-size {found.batch_size} is out of range; expected 1 or more")
    return found
