"""Count the bytes and seconds that a run spends on reading, folding and writing, and its memory.

Knows nothing of the work itself.
"""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
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
    requests: int = 0  # to servers of objects
    retries: int = 0  # of requests, and of work that was given to a worker again

    def plus(self, other: Totals) -> Totals:
        """Return the sum."""
        return Totals(
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
            self.reading + other.reading,
            self.folding + other.folding,
            self.writing + other.writing,
            self.requests + other.requests,
            self.retries + other.retries,
        )


class Crew(NamedTuple):
    """Who did a run.  Where nobody says, it is this process."""

    names: frozenset[str] = frozenset()  # of the workers
    kernels: frozenset[str] = frozenset()  # of other processes than this one and its children
    peak: int = 0  # bytes of memory of the largest of these processes

    def plus(self, other: Crew) -> Crew:
        """Return both."""
        peak = max(self.peak, other.peak)
        return Crew(self.names | other.names, self.kernels | other.kernels, peak)


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


def measure_peak() -> int:
    """Return the peak memory of the largest process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage's unit differs
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    try:
        # Linux's getrusage also counts what the process was before exec: a large caller's size.
        status = Path("/proc/self/status").read_text()
    except OSError:
        return max(children, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return max(children, int(found[1]) * 1024 if found else 0)
