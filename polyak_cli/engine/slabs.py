"""Cut tensors into slabs, bundles and batches: the units in which tensors are folded.

Knows where every tensor lies and how much memory there is; reads and computes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from polyak_cli.tensors import Extent, Placement, Storage, itemsize

#: Bytes that one element needs while it is folded: as stored, its float64 and the sum.
FOLD_BYTES = 8 + 8 + 8


@dataclass(frozen=True, slots=True)
class Tuning:
    """The sizes that decide how fast a run is, and never which bytes it writes."""

    #: Elements of a slab: 256 KiB of float32, with its float64 sum and product within L2.
    piece: int = 1 << 16
    #: Slabs of that many elements, or slabs of small tensors, that are folded between two reports.
    pieces_per_batch: int = 8
    slabs_per_batch: int = 256
    #: Bytes of the inputs above which several workers pay.
    fork_nbytes: int = 64 << 20
    #: Bytes up to which a tensor is small: a system call for it would cost more than its bytes.
    small_nbytes: int = 1 << 14
    #: Bytes between two small tensors up to which it is faster to read them too.
    gap_nbytes: int = 1 << 13
    #: Bytes of such a common read for each element of a slab.
    span_nbytes: int = 16
    #: Bytes of a slab above which prefetching pays; the system itself reads less than that ahead.
    prefetch_nbytes: int = 1 << 16
    #: Bytes a second that only the page cache delivers: then there is nothing to prefetch.
    cache_speed: float = 2e9
    #: Bytes of objects that are in memory or on their way: for one worker, and for all that this
    #: machine starts; and of the part of them that one batch asks one checkpoint for, at most.
    ahead_nbytes: int = 64 << 20
    ahead_of_all_nbytes: int = 128 << 20
    request_nbytes: int = 16 << 20
    #: Bytes written between two flushes to the disk.
    flush_nbytes: int = 32 << 20

    def for_objects(self) -> Tuning:
        """Return the same for inputs on a network: whatever is read next is fetched ahead."""
        return replace(self, prefetch_nbytes=0, cache_speed=float("inf"))


TUNING = Tuning()


class TensorSource(NamedTuple):
    """Where one checkpoint keeps one tensor."""

    storage: Storage
    dtype: str  # its own: checkpoints of one run may differ, as after a change of precision
    byteorder: str
    file: int  # which of the inputs is the first file of the checkpoint

    def find_file(self, start: int) -> int:
        """Return which of the inputs holds the tensor's byte ``start``."""
        for extent in self.storage.byte_ranges(start, start + 1):
            return self.file + extent.file
        return self.file  # its header holds the bytes


class FoldTensor(NamedTuple):
    """One tensor to average: where each checkpoint keeps it, and where each output wants it."""

    name: str
    size: int
    sources: Sequence[TensorSource]
    targets: Sequence[Placement]
    group: int | None = None  # whose inner products its samples add to; see `samples`


class Slab(NamedTuple):
    """A contiguous part of a tensor, in elements."""

    tensor: FoldTensor
    start: int
    stop: int


#: Slabs that are folded as one: several small tensors, each of them whole, or one slab of any size.
Bundle = Sequence[Slab]
#: Bundles that are folded between two reports: the unit of work that is sent to another process.
Batch = Sequence[Bundle]
#: Batches that one process folds one after the other, such as all of a part of an output.
Share = Sequence[Batch]


def count_elements(bundle: Bundle) -> int:
    """Return the elements of a bundle."""
    return sum(slab.stop - slab.start for slab in bundle)


class Memory(NamedTuple):
    """How a bound on the buffers is divided among workers and slabs."""

    jobs: int
    piece: int  # elements of one tensor folded at a time
    most: int  # elements at a time if the storage prefers larger reads
    element: int = FOLD_BYTES  # bytes that one element needs
    tuning: Tuning = TUNING
    aligned: bool = False  # see `cut_slabs`

    def for_objects(self, checkpoints: int) -> Memory:
        """Return the same with batches that make large requests of a network.

        Each worker has the ranges of two batches of every checkpoint in memory or on their way.
        These fit `Tuning.ahead_nbytes`, so that more checkpoints make smaller requests.
        """
        ahead = min(self.tuning.ahead_nbytes, self.tuning.ahead_of_all_nbytes // self.jobs)
        share = ahead // (2 * max(1, checkpoints))
        piece = max(256, min(self.piece, share // 8))  # of any type
        pieces = min(share, self.tuning.request_nbytes) // (piece * 4)
        tuning = replace(
            self.tuning.for_objects(),
            pieces_per_batch=max(1, pieces),
            slabs_per_batch=self.tuning.slabs_per_batch * 16,
        )
        return self._replace(piece=piece, tuning=tuning)

    @property
    def batch_nbytes(self) -> int:
        """Bytes that a checkpoint of float32 has of the pieces of a batch."""
        return self.piece * self.tuning.pieces_per_batch * 4

    @property
    def nbytes(self) -> int:
        """Bytes of all the buffers, at the usual piece."""
        return self.jobs * self.piece * self.element

    @classmethod
    def within(
        cls, nbytes: int, jobs: int, averages: int = 1, *, tuning: Tuning | None = None
    ) -> Memory:
        """Fit the workers and their buffers into a bound.

        Args:
            nbytes: the bound.
            jobs: workers at most.  There are fewer where each would have only tiny buffers.
            averages: how many averages are folded at once.
            tuning: other sizes than the default ones.
        """
        tuning = tuning or TUNING
        # Each further average needs another sum.  From two averages on, the product needs a buffer
        # too, because the widened values are used again.
        element = FOLD_BYTES + 8 * averages * (averages > 1)
        jobs = max(1, min(jobs, nbytes // (element * 4096)))
        most = max(256, nbytes // (element * jobs))
        return cls(jobs, min(tuning.piece, most), most, element, tuning)

    def align(self) -> Memory:
        """Return what cuts outputs at places that workers on other machines can share well."""
        return self._replace(piece=1 << (self.piece.bit_length() - 1), aligned=True)


def cut_slabs(
    tensors: Iterable[FoldTensor],
    piece: int,
    most: int,
    *,
    aligned: bool = False,
    pieces: int = 1,
) -> Iterator[Slab]:
    """Cut tensors into slabs that cover each exactly once.

    Args:
        tensors: the tensors to cut.
        piece: elements of a slab.
        most: elements of a slab if the storage prefers larger reads.
        aligned: where a tensor is cut, its place in the output is a multiple of a slab's bytes, if
            the storage does not prefer otherwise.
        pieces: pieces of a slab, for who folds it piece by piece (see `refine`), if the storage
            does not prefer otherwise.  Few slabs are quickly cut, and sent.
    """
    for tensor in tensors:
        # A chunk is decoded whole for any part of it, so slabs end where chunks do if that fits.
        best = _count_preferred(tensor)
        step = piece * pieces if best <= 1 else max(1, min(best * max(1, piece // best), most))
        first = _find_first_cut(tensor.targets[0], step) if aligned and best <= 1 else step
        if first < step:
            yield Slab(tensor, 0, min(first, tensor.size))
        for start in range(first % step, tensor.size, step):
            yield Slab(tensor, start, min(start + step, tensor.size))


def _count_preferred(tensor: FoldTensor) -> int:
    """Return the elements that the storage prefers to be read at a time."""
    return max(s.storage.preferred_nbytes // itemsize(s.dtype) for s in tensor.sources)


def refine(bundle: Bundle, piece: int) -> Iterable[Bundle]:
    """Return the pieces of a slab that was cut to several; any other bundle stays whole."""
    tensor, start, stop = bundle[0]
    if len(bundle) > 1 or not piece or stop - start <= piece:
        return [bundle]
    if _count_preferred(tensor) > 1:
        return [bundle]  # it was cut as its storage prefers
    bounds = (*range(start, stop, piece), stop)
    return ([Slab(tensor, low, high)] for low, high in itertools.pairwise(bounds))


def _find_first_cut(target: Placement, step: int) -> int:
    """Return the elements before the first multiple of a slab's bytes in an output."""
    width = itemsize(target.dtype)
    elements, rest = divmod(-target.offset % (step * width), width)
    return step if rest else elements or step


def bundle_slabs(slabs: Iterable[Slab], elements: int, tuning: Tuning = TUNING) -> Iterator[Bundle]:
    """Bundle small tensors that are neighbours in every checkpoint, so that one read serves all.

    Args:
        slabs: best in the order in which their tensors lie in the files.
        elements: of a bundle at most.
        tuning: which tensors are small, and how far apart they may lie.
    """
    bundle: list[Slab] = []
    count = 0
    for slab in slabs:
        length = slab.stop - slab.start
        if bundle and (
            count + length > elements or not _is_neighbour(bundle, slab, elements, tuning)
        ):
            yield bundle
            bundle, count = [], 0
        bundle.append(slab)
        count += length
    if bundle:
        yield bundle


def _is_neighbour(bundle: Bundle, slab: Slab, elements: int, tuning: Tuning) -> bool:
    """Return whether a slab may be read together with the slabs of a bundle."""
    first, last, new = bundle[0].tensor, bundle[-1].tensor, slab.tensor
    if not (_is_small(slab, tuning) and _is_small(bundle[0], tuning)):
        return False
    span = tuning.span_nbytes * elements
    return all(
        b.dtype == a.dtype and b.byteorder == a.byteorder
        for a, b in zip(first.targets, new.targets, strict=True)
    ) and all(
        c.file == a.file
        and c.dtype == a.dtype
        and c.byteorder == a.byteorder
        and isinstance(a.storage, Extent)
        and isinstance(b.storage, Extent)
        and isinstance(c.storage, Extent)
        and c.storage.file == a.storage.file
        and 0 <= c.storage.offset - b.storage.offset - b.storage.nbytes <= tuning.gap_nbytes
        and c.storage.offset + c.storage.nbytes - a.storage.offset <= span
        for a, b, c in zip(first.sources, last.sources, new.sources, strict=True)
    )


def _is_small(slab: Slab, tuning: Tuning) -> bool:
    """Return whether a slab is the whole of a small tensor; a tight bound may cut even those."""
    tensor = slab.tensor
    is_whole = slab.stop - slab.start == tensor.size
    dtypes = {source.dtype for source in tensor.sources}
    return is_whole and tensor.size * max(map(itemsize, dtypes)) <= tuning.small_nbytes


def gather_batches(
    bundles: Iterable[Bundle], nbytes: int, tuning: Tuning = TUNING
) -> Iterator[Batch]:
    """Gather bundles into batches, because a report for each bundle would cost too much.

    Args:
        bundles: in the order in which they are folded.
        nbytes: what one checkpoint has of a batch, at most, if that is more than one bundle.
        tuning: how many slabs complete a batch that has fewer bytes.
    """
    batch: list[Bundle] = []
    total = length = 0
    for bundle in bundles:
        width = max(itemsize(source.dtype) for source in bundle[0].tensor.sources)
        count = count_elements(bundle) * width
        if batch and (total + count > nbytes or length >= tuning.slabs_per_batch):
            yield batch
            batch, total, length = [], 0, 0
        batch.append(bundle)
        total += count
        length += len(bundle)
    if batch:
        yield batch


def _cut_at_parts(slab: Slab, parts: Sequence[int]) -> Iterator[Slab]:
    """Cut a slab where a part of its output ends; its elements begin at multiples of their size."""
    target = slab.tensor.targets[0]
    part, width, start = parts[target.file], itemsize(target.dtype), slab.start
    while part:
        border = (target.offset + start * width) // part * part + part
        stop = (border - target.offset) // width
        if stop >= slab.stop:
            break
        yield slab._replace(start=start, stop=stop)
        start = stop
    yield slab._replace(start=start)


def gather_parts(slabs: Iterable[Slab], parts: Sequence[int], memory: Memory) -> Iterator[Share]:
    """Gather the batches that are folded into each part of the outputs.

    Args:
        slabs: in the order of their places in the outputs.
        parts: as of `FoldJob`.
        memory: pieces of a batch.
    """

    def find_part(slab: Slab) -> tuple[int, int]:
        target = slab.tensor.targets[0]
        offset = target.offset + slab.start * itemsize(target.dtype)
        part = parts[target.file]
        return target.file, offset // part if part else 0

    tuning = memory.tuning
    cut = itertools.chain.from_iterable(_cut_at_parts(slab, parts) for slab in slabs)
    for _, group in itertools.groupby(cut, find_part):
        bundles = bundle_slabs(group, memory.piece, tuning)
        yield [*gather_batches(bundles, memory.batch_nbytes, tuning)]
