"""Count the bytes and seconds that a run spends on reading, folding and writing.

Knows nothing of the work itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

#: Called with the bytes that a finished piece of work has read.
Progress = Callable[[int], None]


class Totals(NamedTuple):
    """What a run did; seconds are summed over the workers."""

    bytes_read: int = 0
    bytes_written: int = 0
    reading: float = 0.0
    folding: float = 0.0
    writing: float = 0.0

    def plus(self, other: Totals) -> Totals:
        """Return the sum."""
        return Totals(
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
            self.reading + other.reading,
            self.folding + other.folding,
            self.writing + other.writing,
        )


class Clock:
    """Splits the time into reading, folding and writing.

    Each call counts the time since the call before, so that no time is lost or counted twice.
    """

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.bytes_read = self.bytes_written = 0
        self.reading = self.folding = self.writing = 0.0

    def _lap(self) -> float:
        """Return the seconds since the last lap, and begin another."""
        # One look at the clock for each lap: it is asked several times for each small slab.
        last, self.last = self.last, time.perf_counter()
        return self.last - last

    def read(self, nbytes: int) -> None:
        """Count the time since the last lap as reading."""
        self.bytes_read += nbytes
        self.reading += self._lap()

    def fold(self) -> None:
        """Count the time since the last lap as folding."""
        self.folding += self._lap()

    def write(self, nbytes: int) -> None:
        """Count the time since the last lap as writing."""
        self.bytes_written += nbytes
        self.writing += self._lap()

    def totals(self) -> Totals:
        """Return the counts so far."""
        return Totals(self.bytes_read, self.bytes_written, self.reading, self.folding, self.writing)
