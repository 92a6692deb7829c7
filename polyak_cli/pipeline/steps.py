"""Count the batches of a training as its callbacks see them.  Imports no framework."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from numbers import Integral
from typing import Any

from polyak_cli.errors import UsageError, shown


class Steps:
    """The number of batches that a run was trained on, those of earlier calls of ``fit`` included.

    Attributes:
        done: batches since the start of epoch 1; 0 before training.
    """

    def __init__(self) -> None:
        self.done = 0
        self._batch = -1  # the last one of this epoch, counted from 0
        self._begun = False

    def begin_epoch(self, epoch: int, params: Mapping[str, Any]) -> None:
        """Start an epoch.

        Args:
            epoch: counted from 0, as Keras gives it; that of the first call is ``initial_epoch``.
            params: of the callback.

        Raises:
            UsageError: training begins later than with epoch 1, and it is not known how many
                batches the epochs before had.
        """
        if not self._begun:
            self.done = epoch * count_batches(params) if epoch else 0
        self._begun = True
        self._batch = -1

    def end_batch(self, batch: int, every: int) -> bool:
        """Count the batches up to this one; return whether a multiple of ``every`` is among them.

        With ``steps_per_execution``, Keras reports the last of several batches only.

        Args:
            batch: its number in the epoch, counted from 0, as Keras gives it.
            every: batches from one multiple to the next.
        """
        before = self.done
        self.done += batch - self._batch
        self._batch = batch
        return self.done // every > before // every


def check_counts(optional: Collection[str] = (), /, **counts: object) -> None:
    """Refuse what counts nothing.

    Args:
        optional: the arguments that may be None.
        **counts: argument -> its value.

    Raises:
        UsageError: one is no whole number, or less than 1.
    """
    for name, number in counts.items():
        if number is None and name in optional:
            continue
        if isinstance(number, bool) or not isinstance(number, Integral):  # as numpy's integers are
            raise UsageError(f"{name} is {shown(repr(number))}; expected a whole number")
        if number < 1:
            raise UsageError(f"{name} is {number}; expected at least 1")


def count_batches(params: Mapping[str, Any]) -> int:
    """Return the number of batches of an epoch.

    Raises:
        UsageError: Keras does not know it yet.
    """
    count = params.get("steps")
    if not count:
        raise UsageError(
            "fit does not know how many batches an epoch has, so the steps before this epoch "
            "cannot be counted; give steps_per_epoch to fit"
        )
    return int(count)
