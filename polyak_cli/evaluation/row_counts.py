"""Count the rows that models have run, for those who wait.  Shows nothing: a caller may do that."""

from __future__ import annotations

from collections.abc import Callable

#: Called with the number of models done, of the last one the share of it, and with that of all.
Progress = Callable[[float, int], None]
#: Called with the share of one model's work that is done, from 0 to 1.
OnShare = Callable[[float], None]


def follow(progress: Progress | None, done: int, total: int) -> OnShare | None:
    """Return what reports the share of one model, after so many others of all."""
    return None if progress is None else lambda share: progress(done + share, total)


class RowCounter:
    """Adds up the rows of all passes over a model, and reports their share.

    Attributes:
        is_wanted: whether anybody waits for it.
    """

    def __init__(self, report: OnShare | None, total: int) -> None:
        """Begin at no rows.

        Args:
            report: called after each batch; None if nobody waits.
            total: rows of all passes.
        """
        self.is_wanted = report is not None
        self._report, self._total, self._done = report, total, 0

    def add(self, rows: int) -> None:
        """Add the rows of a batch, or more, where only the size of full batches is known."""
        if self._report:
            self._done += rows
            self._report(min(1.0, self._done / self._total))
