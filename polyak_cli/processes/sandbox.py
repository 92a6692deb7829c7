"""Read untrusted headers in a forked child, under limits of memory and time.

One flipped byte of a header can make libhdf5 crash, loop, or allocate without end, and it holds the
interpreter's lock meanwhile.  A child that dies costs one error line.  Knows no format.
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
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from polyak_cli.errors import FormatError, PolyakError, shown, word_size
from polyak_cli.processes.children import Child, Writer, describe_error, rebuild_error

CPU_SECONDS = 4  # of processor time between two heartbeats; more is a loop inside libhdf5
WALL_SECONDS = 120  # between two heartbeats; more is a file system that does not answer
BEAT_SECONDS = 0.1  # between two heartbeats at least
GROWTH_BYTES = 256 << 20  # address space on top of what the parent has

Item = TypeVar("Item")


class Heartbeat:
    """Reports that a task makes progress, at most every `BEAT_SECONDS`.

    A task that sends no heartbeat for `CPU_SECONDS` of processor time, or for `WALL_SECONDS`, is
    ended.  Loops use `over`; a step that is no loop calls the heartbeat itself.
    """

    def __init__(self, beat: Callable[[], None]) -> None:
        self.beat = beat
        self.next = 0.0

    def __call__(self) -> None:
        """Report progress, unless that was done a moment ago."""
        now = time.monotonic()
        if now >= self.next:
            self.next = now + BEAT_SECONDS
            self.beat()

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items, with a heartbeat before each."""
        for item in items:
            self()
            yield item


Task = Callable[[Any, Heartbeat], Any]


def run_each(
    task: Task, items: Sequence[Any], names: Sequence[str], jobs: int = 1
) -> Generator[Any, None, None]:
    """Yield ``task(item, heartbeat)`` for every item, in order, each run in a child.

    Args:
        task: called in the child with the item and a heartbeat, which it must send at least every
            few hundred tensors.  Returns what JSON can hold, or raises PolyakError.
        items: what to work on; reaches the child by fork, not by serialisation.
        names: how messages call each item.
        jobs: number of children; child `k` takes every `jobs`-th item from item `k` on.

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


def run_all(
    task: Task, items: Sequence[Any], names: Sequence[str], jobs: int = 1
) -> Generator[Any, None, None]:
    """Yield what `run_each` does, but raise the first PolyakError."""
    with contextlib.closing(run_each(task, items, names, jobs)) as outcomes:
        for outcome in outcomes:
            if isinstance(outcome, PolyakError):
                raise outcome
            yield outcome


@dataclass(slots=True)
class _Lane:
    """One child at a time, which works through its share of the items."""

    task: Task
    items: Sequence[Any]
    names: Sequence[str]
    share: range
    done: int = 0
    child: Child | None = None
    waited: bool = False  # for `WALL_SECONDS`, without a heartbeat; the child was ended

    def start(self) -> None:
        """Fork a child for the items that are left of the share."""
        self.waited = False
        left = [self.items[k] for k in self.share[self.done :]]
        if left:
            self.child = Child(lambda writer: _work_through(self.task, left, writer))

    def take(self) -> Any:
        """Return the outcome of the next item of this lane; an error is marked with its name."""
        name = self.names[self.share[self.done]]
        outcome = self._take(shown(name))
        if isinstance(outcome, PolyakError):
            outcome.about = name
        return outcome

    def _take(self, name: str) -> Any:
        """Return the outcome of the next item, which messages call by its name."""
        line = self._read_line()
        self.done += 1
        if line is None:
            outcome: Any = FormatError(f"{name}: {self._explain_end()}")
            self.start()
            return outcome
        message = json.loads(line)
        error = rebuild_error(message)
        if isinstance(error, MemoryError):
            return FormatError(
                f"{name}: reading its header needs more than {word_size(GROWTH_BYTES)} of memory, "
                f"the limit of address space{_add_cap('AS', 'ulimit -v')}; leave the file out or "
                "save it again"
            )
        if isinstance(error, OSError):
            return FormatError(f"{name}: cannot be read: {error.strerror}")
        if isinstance(error, PolyakError):
            return error
        if error:
            raise error
        return message["value"]

    def _read_line(self) -> bytes | None:
        """Return the next line, or None when the child is gone."""
        child = self.child
        while child:
            line = child.next_line()
            if line is not None:
                return line
            with selectors.DefaultSelector() as selector:
                selector.register(child.pipe, selectors.EVENT_READ)
                if not selector.select(WALL_SECONDS):
                    self.waited = True
                    os.kill(child.pid, signal.SIGKILL)
                    return None
            if not child.receive():
                return None
        return None

    def _explain_end(self) -> str:
        """Reap a child that ended early, and say which limit it reached or how else it ended."""
        how = self.child.reap() if self.child else ""
        if self.waited:
            return (
                f"reading its header took more than {WALL_SECONDS} seconds without a heartbeat, "
                "the limit; its file system may not respond. Leave the file out, or try again"
            )
        if how == "SIGXCPU":
            return (
                f"reading its header took more than {CPU_SECONDS} seconds of processor time "
                f"without a heartbeat, the limit{_add_cap('CPU', 'ulimit -t')}. Leave the file "
                "out or save it again"
            )
        if how == "SIGKILL":
            return (
                "the process that reads its header was killed from outside (SIGKILL), perhaps "
                f"because memory ran out{_add_cap('CPU', 'ulimit -t')}; use fewer --jobs, or leave "
                "the file out"
            )
        scarce = _add_cap("AS", "it needs more memory than ulimit -v allows")
        return (
            f"reading its header crashed the HDF5 library ({how}); the file is damaged or "
            f"hostile{scarce}. Leave it out or save it again"
        )

    def stop(self) -> None:
        """End the child, whatever it is doing."""
        if self.child:
            self.child.stop()


def _add_cap(limit: str, name: str) -> str:
    """Return the user's own limit as a second explanation, '' where there is none."""
    soft, _ = resource.getrlimit(getattr(resource, f"RLIMIT_{limit}"))
    return f", or {name}" if soft != resource.RLIM_INFINITY else ""


def _work_through(task: Task, items: Sequence[Any], writer: Writer) -> None:
    """Work through the items in the child."""
    _silence_stderr()
    _limit_memory()
    gc.disable()  # it takes a third of the time of 100,000 tensors, and no cycles are made

    def beat() -> None:
        writer.line()
        _grant_processor_time()

    heartbeat = Heartbeat(beat)
    for item in heartbeat.over(items):
        try:
            writer.send({"value": task(item, heartbeat)})
        except Exception as error:  # the parent reports it; the next item may do better
            writer.send(describe_error(error))


def _silence_stderr() -> None:
    """Redirect stderr to /dev/null: the parent reports each file's error in one line.

    Otherwise the allocator that finds its heap damaged, a library that warns of an old header, and
    an interpreter without memory would each print lines of their own.
    """
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(null, 2)
    os.close(null)


def _grant_processor_time() -> None:
    """Move the limit of processor time to `CPU_SECONDS` from now."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    granted = int(time.process_time()) + 1 + CPU_SECONDS
    with contextlib.suppress(ValueError):  # a hard limit of the user's that is nearer still
        resource.setrlimit(resource.RLIMIT_CPU, (granted, hard))


def _limit_memory() -> None:
    """Allow `GROWTH_BYTES` of address space more than the process has now, and no core file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        with open("/proc/self/statm", "rb") as statm:
            pages = int(statm.read().split()[0])
    except OSError:
        return  # only Linux has this file, and only Linux enforces RLIMIT_AS
    limit = pages * resource.getpagesize() + GROWTH_BYTES
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
