"""Run the batches of a fold: in this process, on its threads, or in forked ones.

An executor decides where a batch is folded, and when.  It cannot change a byte, because batches do
not overlap.  `spawned` and `clusters` have others.  Knows nothing of what is done with a batch.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import resource
import selectors
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

from polyak_cli.engine.constants import Constant
from polyak_cli.engine.folding import Done, FoldJob, Team
from polyak_cli.engine.kernel import find_kernel
from polyak_cli.engine.samples import SampleSums
from polyak_cli.engine.slabs import (
    TUNING,
    Batch,
    FoldTensor,
    Memory,
    Tuning,
    bundle_slabs,
    cut_slabs,
    gather_batches,
    gather_parts,
)
from polyak_cli.engine.sums import Ledger, Run
from polyak_cli.engine.timing import Crew, Progress, Totals
from polyak_cli.errors import PolyakError
from polyak_cli.processes.children import Child, Writer, make_ended, rebuild_error
from polyak_cli.storage import OutputFile, can_locate
from polyak_cli.storage.local import LocalOutput


def _list_batches(job: FoldJob, batches: Any) -> Iterator[Batch]:
    """Yield batches one by one, also those of shares."""
    return itertools.chain.from_iterable(batches) if job.parts else iter(batches)


class Executor(Protocol):
    """A way to run the batches of a job."""

    def run(self, job: FoldJob, batches: Iterable[Batch]) -> Generator[Done, None, None]:
        """Fold all batches, and yield what they took and found, in any order.

        Where the job has parts there are shares in place of batches, and each is folded by one
        worker.

        Closing the generator before its end stops the work.

        Raises:
            PolyakError, OSError: the first error of a batch, as in-process folding raises it.
        """


def fold(
    tensors: Iterable[FoldTensor],
    job: FoldJob,
    memory: Memory,
    progress: Progress = lambda _: None,
    executor: Executor | None = None,
    *,
    flush: bool = True,
    ledger: Ledger | None = None,
) -> Done:
    """Average all tensors into the outputs.

    Args:
        tensors: dtype one of `tensors.FLOATS`; every source has the tensor's size.  Each forked
            process iterates over them once, so that they need not all be in memory.
        job: inputs, outputs and the matrix of coefficients.
        memory: workers and pieces.
        progress: called in this process with the bytes that each finished batch read.
        executor: who runs the batches; `choose_executor` decides if it is not given.
        flush: write to the disk meanwhile; outputs that are never synced need not get there.
        ledger: of checksums, which gets what was read of the regions of the job.

    Raises:
        FormatError: an input ends early, is damaged, or changed since it was scanned.
        MismatchError: a value is not finite, or an average does not fit the stored type.
        OSError: an output cannot be written.
    """
    if any(file.version.is_object for file in job.inputs):
        memory = memory.for_objects(len(job.list_counted())).align()
    tuning = memory.tuning
    job = replace(job, piece=memory.piece)
    batches = _cut_batches(tensors, job, memory)
    executor = executor or choose_executor(job, memory)
    total, crew = Totals(), Crew()
    samples = SampleSums(len(job.list_counted()))
    constants: list[Constant] = []
    with (
        contextlib.ExitStack() as stack,
        _Flusher(
            [stack.enter_context(LocalOutput(path)) for path in (job.outputs if flush else ())],
            tuning.flush_nbytes,
        ) as flusher,
        contextlib.closing(executor.run(job, batches)) as steps,
    ):
        for done in steps:
            total, crew = total.plus(done.totals), crew.plus(done.crew)
            samples.add(done.samples)
            constants += done.constants
            if ledger:
                ledger.add(done.sums)
            flusher.count(done.totals.bytes_written)
            progress(done.totals.bytes_read)
    return Done(total, samples if job.sampling else None, constants, crew)


def _cut_batches(tensors: Iterable[FoldTensor], job: FoldJob, memory: Memory) -> Iterator[Any]:
    """Return the batches of a job, or its shares where it has parts.

    They are generated: of a table of 100,000 tensors, only those that are at work are in memory.
    """
    # Slabs that are sent to other machines are several pieces each.
    pieces = memory.tuning.pieces_per_batch if memory.aligned else 1
    slabs = cut_slabs(tensors, memory.piece, memory.most, aligned=memory.aligned, pieces=pieces)
    if job.parts:
        return gather_parts(slabs, job.parts, memory)
    bundles = bundle_slabs(slabs, memory.piece, memory.tuning)
    return gather_batches(bundles, memory.batch_nbytes, memory.tuning)


def choose_executor(job: FoldJob, memory: Memory) -> Executor:
    """Return the fastest executor of this machine."""
    # Starting a process and its share of the page tables takes longer than averaging a few MB.
    nbytes = sum(file.version.size for file in job.inputs)
    is_remote = any(file.version.is_object for file in job.inputs)
    # Processes that are started take as long as reading some 100 MB through the gateway.
    is_large = nbytes >= 2 * memory.tuning.fork_nbytes
    if is_remote and is_large and can_locate(file.path for file in job.inputs):
        from polyak_cli.engine.spawned import Spawned  # which only remote inputs need

        return Spawned(memory.jobs)
    if memory.jobs == 1 or nbytes < memory.tuning.fork_nbytes:
        return InProcess(memory.tuning)
    # Threads would share a limit of address space, of which the allocator reserves some for each.
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    is_limited = soft != resource.RLIM_INFINITY
    is_compiled = find_kernel(job.kernel).NAME == "compiled"
    workers = Threads if is_compiled and not is_limited else Forked
    return workers(memory.jobs, memory.tuning)


@dataclass(frozen=True, slots=True)
class InProcess:
    """Folds one batch after the other in this thread, while the next one is being fetched."""

    tuning: Tuning = TUNING

    def run(self, job: FoldJob, batches: Iterable[Batch]) -> Generator[Done, None, None]:
        """See `Executor.run`."""
        with job.start_worker(self.tuning) as worker:
            for batch in prefetch_next(_list_batches(job, batches), worker.prefetch):
                yield worker.fold(batch)
            worker.finish()


def prefetch_next(batches: Iterable[Batch], prefetch: Callable[[Batch], None]) -> Iterator[Batch]:
    """Yield each batch after prefetching the next one, which is fetched meanwhile."""
    waiting: Batch = []
    for batch in batches:
        prefetch(batch)
        if waiting:
            yield waiting
        waiting = batch
    if waiting:
        yield waiting


@dataclass(frozen=True, slots=True)
class Threads:
    """Folds on several threads of this process; each takes the next batch that none has taken.

    For the compiled kernel, which computes a whole slab without the interpreter's lock.
    """

    jobs: int
    tuning: Tuning = TUNING

    def run(self, job: FoldJob, batches: Iterable[Batch]) -> Generator[Done, None, None]:
        """See `Executor.run`."""
        team = Team(self.jobs)
        shared = _share(batches)
        # What each batch took; at the end of a thread its error, or None.
        reports: queue.SimpleQueue[Done | BaseException | None] = queue.SimpleQueue()

        def work() -> None:
            crew = Crew(frozenset([str(threading.get_ident())]))
            try:
                with job.start_worker(self.tuning, team) as worker:
                    for batch in prefetch_next(_list_batches(job, shared), worker.prefetch):
                        reports.put(worker.fold(batch)._replace(crew=crew))
                    worker.finish()
                reports.put(None)
            except BaseException as error:
                reports.put(error)

        threads: list[threading.Thread] = []
        try:
            for _ in range(self.jobs):
                threads.append(_start_thread(work))
            # This thread only waits, because it is the one that signals interrupt.
            at_work = len(threads)
            while at_work:
                report = reports.get()
                if isinstance(report, BaseException):
                    raise report
                if report is None:
                    at_work -= 1
                else:
                    yield report
        finally:
            # After an error or an interrupt the threads are still at work on the outputs.
            team.is_stopped = True
            for thread in threads:
                thread.join()


def _share(batches: Iterable[Any]) -> Iterator[Any]:
    """Return an iterator that several threads may use: each item is given to one of them."""
    lock = threading.Lock()
    source = iter(batches)  # mostly a generator, which two threads must not run at a time

    def take() -> Any:
        with lock:
            return next(source, None)

    return iter(take, None)


def _start_thread(work: Callable[[], None]) -> threading.Thread:
    """Return a thread that works, or raise the error of a system that allows no more of them."""
    # Daemonic: a read that hangs must not keep the program from ending.
    thread = threading.Thread(target=work, name="polyak-fold", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise PolyakError(
            f"no worker thread can be started: {error}; allow more memory or processes "
            "(ulimit -v, -u), or use fewer --jobs"
        ) from None
    return thread


@dataclass(frozen=True, slots=True)
class Forked:
    """Folds in several forked processes; each process takes every ``jobs``-th batch.

    For the numpy kernel: numpy releases the interpreter's lock for some 20 us at a time, which is
    less than it takes to wake a waiting thread, so that two threads are hardly faster than one.
    Forked processes need no message for each batch: they inherit the iterable of batches.
    """

    jobs: int
    tuning: Tuning = TUNING

    def run(self, job: FoldJob, batches: Iterable[Batch]) -> Generator[Done, None, None]:
        """See `Executor.run`."""
        # Each process walks over all batches and folds its own: walking is cheap, and sending
        # batches through a pipe is not.
        children: list[Child] = []
        with selectors.DefaultSelector() as selector:
            try:
                for k in range(self.jobs):
                    children.append(Child(self._make_share(job, batches, k)))
                    selector.register(children[-1].pipe, selectors.EVENT_READ, children[-1])
                while selector.get_map():
                    for key, _ in selector.select():
                        yield from _receive(key.data, selector)
            finally:
                # After an error or an interrupt the children are still at work on the outputs.
                for child in children:
                    child.stop()

    def _make_share(
        self, job: FoldJob, batches: Iterable[Batch], k: int
    ) -> Callable[[Writer], None]:
        """Return the work of the k-th process."""

        def fold_share(writer: Writer) -> None:
            share: Any = itertools.islice(batches, k, None, self.jobs)
            # The sums over all batches are no larger than those over one: one message for all is
            # less than one for each.
            samples = SampleSums(len(job.list_counted()))
            for done in InProcess(self.tuning).run(job, share):
                samples.add(done.samples)
                said = {"done": done.totals, "constants": done.constants, "sums": done.sums}
                writer.send(said)
            if samples.sums:
                writer.send({"samples": samples.pack()})

        return fold_share


def _receive(child: Child, selector: selectors.BaseSelector) -> Iterator[Done]:
    """Yield what a child has sent, and unregister a child that has ended."""
    has_more = child.receive()
    while (line := child.next_line()) is not None:
        message = json.loads(line)
        error = rebuild_error(message)
        if error:
            raise error
        if "samples" in message:
            yield Done(samples=SampleSums.unpack(message["samples"]))
        else:
            constants = [Constant(*one) for one in message["constants"]]
            crew = Crew(frozenset([str(child.pid)]))
            sums = [Run(*one) for one in message["sums"]]
            yield Done(Totals(*message["done"]), constants=constants, crew=crew, sums=sums)
    if not has_more:
        selector.unregister(child.pipe)
        how = child.reap()
        if how:
            raise make_ended(how)


class _Flusher:
    """Flushes outputs to the disk during the fold, so that the final fsync is short.

    There is one flush at a time.  An error of the disk is raised by the next call that notices it.
    """

    def __init__(self, outputs: Sequence[OutputFile], flush_nbytes: int) -> None:
        self.outputs = outputs
        self.flush_nbytes = flush_nbytes
        # A thread is enough: a flush waits for the disk without the interpreter's lock.
        self.pool = ThreadPoolExecutor(1)
        self.flushing: Future[None] | None = None
        self.waiting = 0

    def __enter__(self) -> _Flusher:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        # An error that is being raised already is not replaced by that of a flush.
        if self.flushing and kind is None and not self.flushing.cancelled():
            self.flushing.result()

    def count(self, nbytes: int) -> None:
        """Count written bytes; start a flush if they are enough and no flush is running."""
        self.waiting += nbytes
        is_busy = self.flushing and not self.flushing.done()
        if not self.outputs or self.waiting < self.flush_nbytes or is_busy:
            return
        if self.flushing:
            self.flushing.result()
        self.waiting = 0
        # Where no thread can be started, the sync at the end takes longer.
        with contextlib.suppress(RuntimeError):
            self.flushing = self.pool.submit(self._flush)

    def _flush(self) -> None:
        for output in self.outputs:
            output.sync()
