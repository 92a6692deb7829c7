"""Read the slabs of all checkpoints, as a fold does, and take their inner products.

Knows no format and writes nothing.  `pairs` has the arithmetic; what it is for, others know.
"""

from __future__ import annotations

import contextlib
import itertools
import resource
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from polyak_cli.engine.constants import Agreement, Constant, find_codes
from polyak_cli.engine.executors import Executor, InProcess, Threads
from polyak_cli.engine.folding import Done, FoldJob, Team, Worker
from polyak_cli.engine.pairs import (
    BLOCK,
    SCALED,
    GroupProducts,
    InOrder,
    Products,
    multiply,
    subtract_newest,
)
from polyak_cli.engine.samples import SampleSums, Sampling
from polyak_cli.engine.slabs import (
    FOLD_BYTES,
    TUNING,
    Batch,
    Bundle,
    FoldTensor,
    Memory,
    Slab,
    Tuning,
    bundle_slabs,
    count_elements,
    cut_slabs,
    gather_batches,
)
from polyak_cli.engine.timing import Progress, Totals
from polyak_cli.errors import MismatchError, quote_glob, shown
from polyak_cli.storage import File
from polyak_cli.tensors import Float64

#: Bytes of the rows of one slab, which are to stay in the second cache while they are multiplied.
_ROWS_NBYTES = 1 << 20
#: Workers among which the bound on memory is divided, whatever their number: where a chunk of HDF5
#: decides how a tensor is cut, the cuts and so the last bits must not depend on --jobs.
_WORKERS = 8


class NumberedBatch(list[Bundle]):
    """A batch that knows its place among all."""

    def __init__(self, number: int, bundles: Iterable[Bundle]) -> None:
        super().__init__(bundles)
        self.number = number


@dataclass(frozen=True, slots=True)
class GramJob(FoldJob):
    """All that is needed to take the products of a batch; nothing is averaged and written.

    Attributes:
        groups: tensor -> the group whose products its elements add to.
    """

    groups: Mapping[str, int] | None = None

    def start_worker(self, tuning: Tuning, team: Team | None = None) -> Worker:
        """Return who takes the products of batches."""
        return GramWorker(self, tuning, team)


def make_job(
    inputs: Sequence[File], count: int, sampling: Sampling, groups: Mapping[str, int]
) -> GramJob:
    """Return the job for some checkpoints.

    Args:
        inputs: the files of all checkpoints.
        count: how many checkpoints there are.
        sampling: of what else neighbours are compared by; see `samples`.
        groups: as of `GramJob`.
    """
    return GramJob(inputs, (), np.ones((1, count)), [float(count)], False, sampling, groups=groups)


def share_memory(max_memory: int, jobs: int, count: int) -> Memory:
    """Divide a bound on buffers among workers that hold a row of each of ``count`` checkpoints."""
    element = FOLD_BYTES + 8 * count
    piece = max(1, min(TUNING.piece, _ROWS_NBYTES // (8 * count)) // BLOCK) * BLOCK
    most = max(piece, max_memory // (max(jobs, _WORKERS) * element))
    return Memory(max(1, min(jobs, max_memory // (most * element))), piece, most, element)


class Taken(NamedTuple):
    """What taking the products took and found."""

    groups: Mapping[int, Products]
    samples: SampleSums  # of neighbours; see `samples`
    constants: Sequence[Constant]
    totals: Totals


def take(
    tensors: Iterable[FoldTensor],
    job: GramJob,
    memory: Memory,
    progress: Progress = lambda _: None,
) -> Taken:
    """Take the inner products of all pairs of checkpoints, about the newest one.

    The result is the same to the last bit whatever the number of workers, up to `_WORKERS`.

    Args:
        tensors: every source has the tensor's size; targets are not looked at.
        job: inputs and groups.
        memory: of `share_memory`.
        progress: called with the bytes that each finished batch read.

    Raises:
        FormatError: an input ends early, is damaged, or changed since it was scanned.
        MismatchError: a value is not finite, and no constant of all checkpoints.
    """
    count = len(job.list_counted())
    if any(file.version.is_object for file in job.inputs):
        # As for the most workers: where batches end decides how their sums are rounded.
        remote = memory._replace(jobs=max(memory.jobs, _WORKERS)).for_objects(count)
        memory = remote._replace(jobs=memory.jobs)
    samples, constants, total, order = SampleSums(count), list[Constant](), Totals(), InOrder()
    batches = _number(tensors, memory)
    executor = _choose_executor(job, memory)
    with contextlib.closing(executor.run(job, batches)) as steps:
        for done in steps:
            total = total.plus(done.totals)
            samples.add(done.samples)
            constants += done.constants
            if done.pairs:
                order.add(done.pairs)
            progress(done.totals.bytes_read)
    return Taken(order.total.groups, samples, constants, total)


def _number(tensors: Iterable[FoldTensor], memory: Memory) -> Iterator[Batch]:
    """Yield the batches, numbered."""
    tuning = memory.tuning
    slabs = cut_slabs(tensors, memory.piece, memory.most)
    bundles = bundle_slabs(slabs, memory.piece, tuning)
    batches = gather_batches(bundles, memory.piece * tuning.pieces_per_batch, tuning)
    return itertools.starmap(NumberedBatch, enumerate(batches))


def _choose_executor(job: FoldJob, memory: Memory) -> Executor:
    """Return the fastest executor: threads, as most of the time is BLAS's, which needs no lock."""
    nbytes = sum(file.version.size for file in job.inputs)
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    # As for a fold: threads would share a limit of address space.
    is_limited = soft != resource.RLIM_INFINITY
    if memory.jobs == 1 or nbytes < memory.tuning.fork_nbytes or is_limited:
        return InProcess(memory.tuning)
    return Threads(memory.jobs, memory.tuning)


class GramWorker(Worker):
    """Takes the products of the batches of one job, with open files and buffers that it keeps."""

    def __init__(self, job: GramJob, tuning: Tuning = TUNING, team: Team | None = None) -> None:
        super().__init__(job, tuning, team)
        self.groups = job.groups or {}
        self.count = len(job.list_counted())
        self.rows: Float64 = np.empty((self.count, 0))
        self.pairs = GroupProducts()

    def fold(self, batch: Batch) -> Done:
        """Take the products of a numbered batch; return them, and what that took and found."""
        assert isinstance(batch, NumberedBatch)  # noqa: S101 - `take` numbers them
        self.pairs = GroupProducts(batch.number)
        return super().fold(batch)._replace(pairs=self.pairs)

    def _fold_bundle(self, bundle: Bundle) -> None:
        """Take the products of the slabs of a bundle."""
        count = count_elements(bundle)
        if count > self.rows.shape[1]:
            self._allocate(count)
            self.rows = np.empty((self.count, count))
        rows = self.rows[:, :count]
        sampler = self.sampler if self.sampler and self.sampler.begin(bundle) else None
        for k in range(self.count):
            raw = self._read(bundle, k, count)
            source = bundle[0].tensor.sources[k]
            self.kernel.widen(raw, source.dtype, source.byteorder, rows[k])
            if sampler:
                sampler.take(raw, source.dtype, source.byteorder)
        if sampler:
            sampler.finish()
        subtract_newest(rows)
        start = 0
        for slab in bundle:
            stop = start + slab.stop - slab.start
            self._add(slab, rows[:, start:stop])
            start = stop
        self.clock.fold()

    def _add(self, slab: Slab, rows: Float64) -> None:
        """Add the products of a slab to its group."""
        matrix, exponent = multiply(rows), 0
        # Whatever is not finite is in some square, so that no pass over the values is needed.
        if not np.isfinite(matrix).all():
            matrix, exponent = self._settle(slab)
        self.pairs.add(self.groups[slab.tensor.name], Products(matrix, rows.shape[1], exponent))

    def _settle(self, slab: Slab) -> tuple[Float64, int]:
        """Read a slab again, without constants that are not finite, and scaled if squares overflow.

        Raises:
            MismatchError: a value is not finite in some checkpoint only.
        """
        count = slab.stop - slab.start
        rows = np.empty((self.count, count))
        agreement = Agreement(count)
        for k in range(self.count):
            rows[k] = self._widen([slab], k, count)
            agreement.add(find_codes(rows[k]))
        agreement.refuse_nan(0, count)
        strays = np.flatnonzero(agreement.strays)
        if len(strays):
            raise self._describe_stray(slab, rows, int(strays[0]))
        found = agreement.describe(slab.tensor.name, 0, count)
        if found.infinite or found.nan:
            self.constants.append(found)
            rows[:, agreement.common != 0] = 0.0
        for exponent in (0, SCALED):
            # Before the differences, which may overflow as well.
            scaled = np.ldexp(rows, -exponent)
            subtract_newest(scaled)
            matrix = multiply(scaled)
            if np.isfinite(matrix).all():
                break
        return matrix, exponent

    def _describe_stray(self, slab: Slab, rows: Float64, place: int) -> MismatchError:
        """Return the error that names the oldest checkpoint whose value is not finite."""
        column = rows[:, place]
        k = int(np.flatnonzero(~np.isfinite(column))[0])
        name = slab.tensor.name
        where = "in every checkpoint: the run may have diverged"
        if np.isfinite(column).any():
            other = int(np.flatnonzero(np.isfinite(column))[-1])
            where = f"but {self._name_file(slab, other, place)} holds {column[other]:.6g}"
        return MismatchError(
            f"{self._name_file(slab, k, place)}: tensor '{shown(name)}' holds {column[k]} (element "
            f"{slab.start + place}), {where}; expected finite numbers, or the same infinity in "
            "every checkpoint. Leave the checkpoint out with --exclude, or the tensor with "
            f"--exclude-tensors {quote_glob(name)}"
        )
