"""Run the batches of a fold: in this process, or in several forked ones.

Knows nothing of what is done with a batch.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import selectors
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from polyak_cli.engine.folding import FoldJob, Worker
from polyak_cli.engine.inputs import OpenInputs
from polyak_cli.engine.slabs import (
    PIECES,
    Bundle,
    FoldTensor,
    Memory,
    bundle_slabs,
    cut_slabs,
    gather_batches,
)
from polyak_cli.engine.timing import Progress, Totals
from polyak_cli.errors import PolyakError
from polyak_cli.processes.children import Child, Writer, raised

#: Bytes of the inputs from which on it pays to fork.
SPREAD = 64 << 20
#: Bytes written between two flushes to the disk.
FLUSH = 32 << 20


def fold(
    tensors: Iterable[FoldTensor],
    work: FoldJob,
    memory: Memory,
    progress: Progress = lambda _: None,
) -> Totals:
    """Average all tensors into the outputs.

    Args:
        tensors: dtype one of `tensors.FLOATS`; every source has the tensor's size.  Gone through
            once by each process, so that they need not all be in memory.
        work: inputs, outputs and the matrix of coefficients.
        memory: processes and pieces.
        progress: told the bytes read by each finished batch, in this process.

    Raises:
        FormatError: an input ends early, is damaged, or changed since it was scanned.
        MismatchError: a value is not finite, or an average does not fit the stored type.
        OSError: an output cannot be written.
    """
    parts = bundle_slabs(cut_slabs(tensors, memory.piece, memory.most), memory.piece)
    cut = gather_batches(parts, memory.piece * PIECES)
    nbytes = sum(file.version.size for file in work.inputs)
    here = _here(work, cut) if nbytes < SPREAD or memory.jobs == 1 else None
    total = Totals()
    with (
        _opened(work.outputs) as outputs,
        _Flusher(outputs) as flusher,
        contextlib.closing(here or _in_children(work, cut, memory.jobs)) as steps,
    ):
        for done in steps:
            total = total.plus(done)
            flusher.wrote(done.bytes_written)
            progress(done.bytes_read)
    return total


def _here(work: FoldJob, cut: Iterable[list[Bundle]]) -> Generator[Totals, None, None]:
    """FoldJob in this process, yielding what each batch took."""
    with OpenInputs(work.inputs) as files, _opened(work.outputs) as outputs:
        worker = Worker(work, files, outputs)
        for batch in _one_ahead(cut, worker.expect):
            yield worker.fold(batch)


def _one_ahead(
    cut: Iterable[list[Bundle]], expect: Callable[[list[Bundle]], None]
) -> Iterator[list[Bundle]]:
    """Yield each batch when the next one has been announced: it is fetched meanwhile."""
    waiting: list[Bundle] = []
    for batch in cut:
        expect(batch)
        if waiting:
            yield waiting
        waiting = batch
    if waiting:
        yield waiting


def _in_children(
    work: FoldJob, cut: Iterable[list[Bundle]], jobs: int
) -> Generator[Totals, None, None]:
    """FoldJob in several processes, each taking every so many-th batch.

    Two threads are hardly faster than one: numpy lets go of the interpreter's lock for some 20 us
    at a time, which is less than it takes to wake the one that waits for it.
    """

    def share(k: int) -> Callable[[Writer], None]:
        def fold_share(writer: Writer) -> None:
            for done in _here(work, itertools.islice(cut, k, None, jobs)):
                writer.send({"done": done})

        return fold_share

    children: list[Child] = []
    with selectors.DefaultSelector() as selector:
        try:
            for k in range(jobs):
                children.append(Child(share(k)))
                selector.register(children[-1].pipe, selectors.EVENT_READ, children[-1])
            while selector.get_map():
                for key, _ in selector.select():
                    yield from _received(key.data, selector)
        finally:
            for child in children:
                child.stop()


def _received(child: Child, selector: selectors.BaseSelector) -> Iterator[Totals]:
    """Yield what a child has sent, and let go of one that has ended."""
    alive = child.receive()
    while (line := child.next_line()) is not None:
        message = json.loads(line)
        error = raised(message)
        if error:
            raise error
        yield Totals(*message["done"])
    if not alive:
        selector.unregister(child.pipe)
        how = child.reap()
        if how:
            raise PolyakError(
                f"a worker was ended from outside ({how}), perhaps because memory ran out; "
                "use fewer --jobs or less --max-memory"
            )


class _Flusher:
    """Sends what is written to the disk while the folding goes on, so that the last fsync is short.

    One flush at a time; an error of the disk is raised where it is noticed.
    """

    def __init__(self, descriptors: Sequence[int]) -> None:
        self.descriptors = descriptors
        self.pool = ThreadPoolExecutor(1)
        self.flushing: Future[None] | None = None
        self.waiting = 0

    def __enter__(self) -> _Flusher:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        if self.flushing and kind is None and not self.flushing.cancelled():
            self.flushing.result()

    def wrote(self, nbytes: int) -> None:
        """Count bytes written, and start a flush when there are enough and none is running."""
        self.waiting += nbytes
        if self.waiting < FLUSH or (self.flushing and not self.flushing.done()):
            return
        if self.flushing:
            self.flushing.result()
        self.waiting = 0
        self.flushing = self.pool.submit(self._flush)

    def _flush(self) -> None:
        for descriptor in self.descriptors:
            getattr(os, "fdatasync", os.fsync)(descriptor)  # macOS has only fsync


@contextlib.contextmanager
def _opened(outputs: Sequence[str]) -> Iterator[list[int]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(open(path, "r+b")).fileno() for path in outputs]
