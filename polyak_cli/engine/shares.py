"""Fold a share of a job in any process that sees its files: the unit of work of a cluster.

A share is a pure function of a job and of the bytes of its inputs.  It may be folded on any
machine, in any order, and twice: then it writes the same bytes to the same places again.  Knows
nothing of who sends shares, or of when.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from polyak_cli import __version__
from polyak_cli.engine import sinks
from polyak_cli.engine.constants import Constant
from polyak_cli.engine.folding import Done, FoldJob, Worker
from polyak_cli.engine.kernel import find_kernel
from polyak_cli.engine.samples import SampleSums
from polyak_cli.engine.sinks import Parcel
from polyak_cli.engine.slabs import TUNING, Batch, Share, Slab, count_elements
from polyak_cli.engine.sums import Run
from polyak_cli.engine.timing import Crew, Totals, measure_peak
from polyak_cli.processes.children import describe_error
from polyak_cli.storage import File, Version, locate
from polyak_cli.tensors import itemsize

#: Bytes of an output between whose multiples no two shares write.  Clients of a network file system
#: may write whole pages, and lock or send larger blocks, of which each should have one writer.  Not
#: more than a slab's bytes are under the tightest bound on memory, so that every cut is at such a
#: multiple.
EDGE = 1 << 15

#: What a task returns: plain values, which the coordinator can read whatever the worker's version.
Reply = dict[str, Any]


# --- cutting --------------------------------------------------------------------------------------


def gather_shares(batches: Iterable[Batch], nbytes: int) -> Iterator[Share]:
    """Gather batches into shares.

    Args:
        batches: in the order of their places in the outputs.
        nbytes: a share that reads so many is complete, if it ends where no block of `EDGE` bytes
            has to be written by the next one too.
    """
    share: list[Batch] = []
    total = 0
    for batch in batches:
        if total >= nbytes and _is_apart(share[-1][-1][-1], batch[0][0]):
            yield share
            share, total = [], 0
        share.append(batch)
        total += _count_bytes(batch)
    if share:
        yield share


def gather_runs(parts: Iterable[Share], nbytes: int) -> Iterator[Share]:
    """Gather shares that are a part of an output each into ones that read so many bytes."""
    run: list[Batch] = []
    total = 0
    for part in parts:
        run += part
        total += sum(map(_count_bytes, part))
        if total >= nbytes:
            yield run
            run, total = [], 0
    if run:
        yield run


def _count_bytes(batch: Batch) -> int:
    """Return the bytes that a batch reads."""
    return sum(
        count_elements(bundle) * sum(itemsize(s.dtype) for s in bundle[0].tensor.sources)
        for bundle in batch
    )


def _is_apart(last: Slab, following: Slab) -> bool:
    """Return whether two slabs write no common block of an output."""
    for before, after in zip(last.tensor.targets, following.tensor.targets, strict=True):
        if before.file != after.file or before.grid or after.grid:
            continue  # parts of a grid lie anywhere, so that no border is better than another
        end = before.offset + last.stop * itemsize(before.dtype)
        start = after.offset + following.start * itemsize(after.dtype)
        if (end - 1) // EDGE >= start // EDGE:
            return False
    return True


# --- sending --------------------------------------------------------------------------------------


def make_absolute(path: str) -> str:
    """Return a path that does not depend on the working folder."""
    return str(Path(path).absolute())


def _make_portable(file: File) -> File:
    """Return an input as any machine can open it: by its URL, or by its absolute path."""
    if file.version.is_object:
        return file._replace(path=locate(file.path))
    return File(make_absolute(file.path), file.version.made_portable())


def make_portable(job: FoldJob) -> FoldJob:
    """Return a job that processes with another working folder, on other machines, can fold."""
    found = sinks.find_sinks(job.outputs)
    portable = replace(
        job,
        inputs=[_make_portable(one) for one in job.inputs],
        # Where there are sinks, the outputs are files of this machine alone.
        outputs=[locate(path) if found else make_absolute(path) for path in job.outputs],
        sinks=found,
    )
    # `replace` makes a new name; the shares of one run have that of their job.
    object.__setattr__(portable, "id", job.id)
    return portable


def pack(value: FoldJob | Parcel) -> bytes:
    """Return the bytes to send.

    A worker looks at them only after it has compared versions, so that it never meets classes that
    it does not know.
    """
    return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)


# --- in the worker --------------------------------------------------------------------------------

#: The last job of this process, by its name: a job of many checkpoints is larger than its shares,
#: and is sent with the first of them only.
_jobs: dict[str, FoldJob] = {}


def fold_share(
    version: str,
    job_id: str,
    job: bytes,
    share: bytes,
    on_last: Callable[[], None] = lambda: None,
) -> Reply:
    """Fold a share into the outputs, and return what that took and found.

    Args:
        version: the coordinator's; another one may pack other classes.
        job_id: of the job.
        job: as `pack` makes it; empty if this process should have it already.
        share: a `Parcel`, as `pack` makes it.
        on_last: called when there is nothing more to fetch over a network.  Another share may begin
            then, on another thread: its first bytes come, and it waits until this one is folded.

    Returns:
        One of "done", with what a `Done` has; "version", where it is another one; "unknown", where
        the job has to be sent; or an error as `describe_error` has it, with "unseen" if this
        machine does not see the files of the job.  All have the name of the "worker".
    """
    worker = f"{socket.gethostname()}:{os.getpid()}"
    if version != __version__:
        return {"worker": worker, "version": __version__}
    known: FoldJob | None = None
    try:
        known = _find_job(job_id, job)
        if known is None:
            return {"worker": worker, "unknown": True}
        return {"worker": worker, "done": _fold(known, _unpack(share), on_last)}
    except Exception as error:
        unseen = _find_unseen(known) if known else None
        return {"worker": worker, "unseen": unseen, **describe_error(error)}


class _Requests:
    """The requests of this process that no share has reported yet."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.reported = 0, 0

    def take(self) -> tuple[int, int]:
        """Return how many there were, and how many of them were tried again."""
        objects = sys.modules.get("polyak_cli.storage.objects")
        if objects is None:  # nothing was asked of any server
            return 0, 0
        with self.lock:
            made = objects.requests_made()
            before, self.reported = self.reported, (made.requests, made.retries)
            return self.reported[0] - before[0], self.reported[1] - before[1]


_requests = _Requests()


def _unpack(packed: bytes) -> Any:
    """Return what the coordinator packed."""
    return pickle.loads(packed)  # noqa: S301 (who may send tasks here may run anything anyway)


def _find_job(job_id: str, job: bytes) -> FoldJob | None:
    """Return a job that was sent now or before."""
    if job and job_id not in _jobs:
        _jobs.clear()
        _jobs[job_id] = _unpack(job)
    return _jobs.get(job_id)


#: Held by the share that this process folds.
_turn = threading.Lock()


def _fold(job: FoldJob, parcel: Parcel, on_last: Callable[[], None] = lambda: None) -> Reply:
    """Fold a share; nothing of it stays open."""
    totals, samples = Totals(), SampleSums(len(job.list_counted()))
    constants: list[Constant] = []
    sums: list[Run] = []
    is_remote = any(file.version.is_object for file in job.inputs)
    tuning = TUNING.for_objects() if is_remote else TUNING
    outputs = sinks.open_outputs(job, parcel.literals)
    batches = parcel.share
    with Worker(job, tuning, outputs=outputs) as worker, _prefetched(worker, batches[0]):
        for number, batch in enumerate(batches, 1):
            if number < len(batches):
                worker.prefetch(batches[number])
            elif is_remote or job.sinks:  # of local files, nothing is worth another thread
                on_last()
            done = worker.fold(batch)
            totals = totals.plus(done.totals)
            samples.add(done.samples)
            constants += done.constants
            sums += done.sums
        # Only then is the share done: the coordinator may read it on another machine, and this one
        # may be switched off.  A descriptor reports the errors since it was opened, so that only
        # those of the worker will do.
        for output in outputs if job.flush else ():
            output.sync()
        worker.finish()
    delivered = sinks.deliver(outputs)
    requests, retries = _requests.take()
    return {
        "totals": list(totals.plus(Totals(requests=requests, retries=retries))),
        "samples": samples.pack() if samples.sums else None,
        "constants": [list(one) for one in constants],
        "sums": [list(one) for one in sums],
        "kernel": find_kernel(job.kernel).NAME,
        "peak": measure_peak(),
        **delivered,
    }


@contextlib.contextmanager
def _prefetched(worker: Worker, batch: Batch) -> Iterator[None]:
    """Have the bytes of a first batch fetched, and wait for the turn to fold it.

    So the bytes of two batches are on their way in this process at most, within a share and from
    one to the next.
    """
    worker.prefetch(batch)
    with _turn:
        yield


def _find_unseen(job: FoldJob) -> list[str] | None:
    """Return a file of a job that is not here as it is at the coordinator's, and how it differs."""
    for path in () if job.sinks else job.outputs:
        if not Path(path).exists():
            return [path, "no such file"]
    for path, version in job.inputs:
        if version.is_object:
            continue  # which is the same from everywhere
        try:
            found = Version.of(Path(path).stat())
        except OSError as error:
            return [path, str(error.strerror)]
        if not version.matches(found):
            return [path, "another size or time of change"]
    return None


def read_done(reply: Reply, retries: int = 0) -> Done:
    """Return what a worker's "done" says of a share that was sent again so often."""
    found = reply["done"]
    samples = found["samples"]
    return Done(
        Totals(*found["totals"]).plus(Totals(retries=retries)),
        SampleSums.unpack(samples) if samples else None,
        [Constant(*one) for one in found["constants"]],
        Crew(frozenset([reply["worker"]]), frozenset([found["kernel"]]), found["peak"]),
        sums=[Run(*one) for one in found["sums"]],
    )
