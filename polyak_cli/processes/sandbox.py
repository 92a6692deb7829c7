"""Reading strangers' headers at arm's length: in a forked child, under limits of memory and time.

libhdf5 can be crashed, hung or bloated by one flipped byte of a header, with the interpreter's lock
held.  So it runs in a child, and a child that dies costs one error line.  Knows nothing of formats.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import selectors
import signal
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from polyak_cli.errors import FormatError, PolyakError, shown
from polyak_cli.processes.children import Child, Writer, failure, raised

CPU_SECONDS = 4  # without a sign of life: a loop inside libhdf5
WALL_SECONDS = 120  # without a sign of life: a file system that does not answer
PULSE_SECONDS = 0.1
GROWTH_BYTES = 256 << 20  # address space on top of what the parent has

Task = Callable[[Any, Callable[[], None]], Any]


def each(
    task: Task, items: Sequence[Any], names: Sequence[str], jobs: int = 1
) -> Generator[Any, None, None]:
    """Yield ``task(item, alive)`` for every item, in order, each run in a child.

    Args:
        task: called in the child with the item and with a function that says "still alive", to be
            called at least every few hundred tensors.  Returns what JSON can hold, or raises
            PolyakError.
        items: what to work on; reaches the child by fork, not by serialisation.
        names: how each item is called in messages.
        jobs: children at a time; the items are dealt out in turn.

    Yields:
        For each item the value, or the PolyakError (not raised: the caller may want the others).

    Raises:
        RuntimeError: the task has a bug; the message is the child's traceback.
    """
    lanes = [_Lane(task, items, names, range(k, len(items), jobs)) for k in range(jobs)]
    try:
        for lane in lanes:
            lane.start()
        for index in range(len(items)):
            yield lanes[index % jobs].take()
    finally:
        for lane in lanes:
            lane.stop()


def values(
    task: Task, items: Sequence[Any], names: Sequence[str], jobs: int = 1
) -> Generator[Any, None, None]:
    """Yield what `each` does, but raise the first PolyakError."""
    with contextlib.closing(each(task, items, names, jobs)) as outcomes:
        for outcome in outcomes:
            if isinstance(outcome, PolyakError):
                raise outcome
            yield outcome


@dataclass(slots=True)
class _Lane:
    """One child at a time, working through its share of the items."""

    task: Task
    items: Sequence[Any]
    names: Sequence[str]
    share: range
    done: int = 0
    child: Child | None = None

    def start(self) -> None:
        """Fork a child for what is left of the share."""
        left = [self.items[k] for k in self.share[self.done :]]
        if left:
            self.child = Child(lambda writer: _work(self.task, left, writer))

    def take(self) -> Any:
        """Return the outcome of the next item of this lane."""
        line = self._line()
        name = shown(self.names[self.share[self.done]])
        self.done += 1
        if line is None:
            outcome: Any = FormatError(f"{name}: {self._last_words()}")
            self.start()
            return outcome
        message = json.loads(line)
        error = raised(message)
        if isinstance(error, MemoryError):
            return FormatError(
                f"{name}: reading its header needs more than {GROWTH_BYTES >> 20} MiB of memory; "
                "the file is damaged, hostile, or beyond what can be read"
            )
        if isinstance(error, OSError):
            return FormatError(f"{name}: cannot be read: {error.strerror}")
        if isinstance(error, PolyakError):
            return error
        if error:
            raise error
        return message["value"]

    def _line(self) -> bytes | None:
        """Return the next line, or None when the child is gone."""
        child = self.child
        while child:
            line = child.next_line()
            if line is not None:
                return line
            with selectors.DefaultSelector() as selector:
                selector.register(child.pipe, selectors.EVENT_READ)
                if not selector.select(WALL_SECONDS):
                    os.kill(child.pid, signal.SIGKILL)
                    return None
            if not child.receive():
                return None
        return None

    def _last_words(self) -> str:
        """Reap a child that ended early and say what became of it."""
        how = self.child.reap() if self.child else ""
        if how in ("SIGXCPU", "SIGKILL"):
            return (
                "reading its header does not end; the file is damaged, hostile, or on a file "
                "system that does not answer. Leave it out or save it again"
            )
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        scarce = ", or needs more memory than ulimit -v allows" * (limit != resource.RLIM_INFINITY)
        return (
            f"reading its header crashed the HDF5 library ({how}); the file is damaged or "
            f"hostile{scarce}. Leave it out or save it again"
        )

    def stop(self) -> None:
        """End the child, whatever it is doing."""
        if self.child:
            self.child.stop()


def _work(task: Task, items: Sequence[Any], writer: Writer) -> None:
    """Work through the items in the child."""
    _hold_its_tongue()
    _limit_memory()
    gc.disable()  # a third of the time of 100,000 tensors, for cycles that nobody makes
    alive = _Pulse(writer)
    for item in items:
        alive()
        try:
            writer.send({"value": task(item, alive)})
        except Exception as error:  # told to the parent; the next item may do better
            writer.send(failure(error))


def _hold_its_tongue() -> None:
    """Lead standard error nowhere: what is to be told of a file is told by the parent, in one line.

    Else the allocator, which finds its heap spoilt, a library that warns of an old header, and an
    interpreter that is out of memory would each add words of their own.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(nowhere, 2)
    os.close(nowhere)


class _Pulse:
    """Says "still alive", though not more often than is of use."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.next = 0.0

    def __call__(self) -> None:
        """Say so, and grant the next stretch of processor time."""
        now = time.monotonic()
        if now < self.next:
            return
        self.next = now + PULSE_SECONDS
        self.writer.line()
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        granted = int(time.process_time()) + 1 + CPU_SECONDS
        with contextlib.suppress(ValueError):  # a hard limit of the user's that is nearer still
            resource.setrlimit(resource.RLIMIT_CPU, (granted, hard))


def _limit_memory() -> None:
    """Allow so much more address space than the process has now, and no core file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        with open("/proc/self/statm", "rb") as statm:
            pages = int(statm.read().split()[0])
    except OSError:
        return  # only Linux tells, and only there is RLIMIT_AS kept
    limit = pages * resource.getpagesize() + GROWTH_BYTES
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


#: Says "still alive" to whoever waits for a header's reader; see `formats.sandbox`.
Alive = Callable[[], None]
