"""Cut tensors into slabs, bundles and batches: the units in which tensors are folded.

Knows where every tensor lies and how much memory there is; reads and computes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from polyak_cli.tensors import Extent, Placement, Storage, itemsize

#: Elements folded at a time: 256 KiB of float32, with its float64 sum and product within L2.
PIECE = 1 << 16
#: Pieces, or slabs of small tensors, that are folded between two messages.
PIECES, BATCH = 8, 256
#: Bytes up to which a tensor is small: one system call for each would cost more than its bytes.
SMALL = 1 << 14
#: Bytes between two small tensors up to which it is quicker to read them along, and bytes of such
#: a reading for each element that may be folded at a time.
GAP, SPAN = 1 << 13, 16
#: Bytes that one element needs while it is folded: as stored, its float64 and the sum.
FOLD_BYTES = 8 + 8 + 8


class TensorSource(NamedTuple):
    """Where one checkpoint keeps one tensor."""

    storage: Storage
    byteorder: str
    file: int  # in which of the inputs


class FoldTensor(NamedTuple):
    """One tensor to average: where all checkpoints keep it and where the outputs want it."""

    name: str
    size: int
    dtype: str
    sources: Sequence[TensorSource]
    targets: Sequence[Placement]


class Slab(NamedTuple):
    """A contiguous part of a tensor, in elements."""

    tensor: FoldTensor
    start: int
    stop: int


#: Slabs that are folded as one: several small tensors whole, or one slab of any.
Bundle = Sequence[Slab]


def count_elements(bundle: Bundle) -> int:
    """Return the elements of a bundle."""
    return sum(slab.stop - slab.start for slab in bundle)


class Memory(NamedTuple):
    """How a bound on the buffers is shared out."""

    jobs: int
    piece: int  # elements of one tensor folded at a time
    most: int  # elements at a time where the storage is better read in larger parts
    element: int = FOLD_BYTES  # bytes that one element needs

    @property
    def nbytes(self) -> int:
        """Bytes of all the buffers, at the usual piece."""
        return self.jobs * self.piece * self.element

    @classmethod
    def within(cls, nbytes: int, jobs: int, averages: int = 1) -> Memory:
        """Fit the processes and their buffers into a bound; fewer processes before tiny pieces."""
        # Each further average has a sum of its own; from two on, the product has a buffer too.
        element = FOLD_BYTES + 8 * averages * (averages > 1)
        jobs = max(1, min(jobs, nbytes // (element * 4096)))
        most = max(256, nbytes // (element * jobs))
        return cls(jobs, min(PIECE, most), most, element)


def cut_slabs(tensors: Iterable[FoldTensor], piece: int, most: int) -> Iterator[Slab]:
    """Cut tensors into slabs that cover each exactly once.

    Args:
        tensors: what to cut.
        piece: elements of a slab.
        most: elements that a slab may have where the storage is better read in larger parts.
    """
    for tensor in tensors:
        width = itemsize(tensor.dtype)
        best = max(source.storage.preferred_nbytes for source in tensor.sources) // width
        step = piece if best <= 1 else max(1, min(best * max(1, piece // best), most))
        for start in range(0, tensor.size, step):
            yield Slab(tensor, start, min(start + step, tensor.size))


def bundle_slabs(work: Iterable[Slab], elements: int) -> Iterator[Bundle]:
    """Put small tensors together that lie side by side in every checkpoint: they are folded as one.

    Args:
        work: slabs, best in the order in which their tensors lie.
        elements: of a bundle at most.
    """
    bundle: list[Slab] = []
    count = 0
    for slab in work:
        length = slab.stop - slab.start
        if bundle and (count + length > elements or not _side_by_side(bundle, slab, elements)):
            yield bundle
            bundle, count = [], 0
        bundle.append(slab)
        count += length
    if bundle:
        yield bundle


def _side_by_side(bundle: Bundle, slab: Slab, elements: int) -> bool:
    """Tell whether a slab may be read along with those before it."""
    first, last, new = bundle[0].tensor, bundle[-1].tensor, slab.tensor
    if new.dtype != first.dtype or not (_is_small(slab) and _is_small(bundle[0])):
        return False
    span = SPAN * elements
    return all(
        b.dtype == a.dtype and b.byteorder == a.byteorder
        for a, b in zip(first.targets, new.targets, strict=True)
    ) and all(
        c.file == a.file
        and c.byteorder == a.byteorder
        and isinstance(a.storage, Extent)
        and isinstance(b.storage, Extent)
        and isinstance(c.storage, Extent)
        and c.storage.file == a.storage.file
        and 0 <= c.storage.offset - b.storage.offset - b.storage.nbytes <= GAP
        and c.storage.offset + c.storage.nbytes - a.storage.offset <= span
        for a, b, c in zip(first.sources, last.sources, new.sources, strict=True)
    )


def _is_small(slab: Slab) -> bool:
    """Tell whether a slab is a small tensor, and the whole of it, which a tight bound may cut."""
    tensor = slab.tensor
    whole = slab.stop - slab.start == tensor.size
    return whole and tensor.size * itemsize(tensor.dtype) <= SMALL


def gather_batches(work: Iterable[Bundle], elements: int) -> Iterator[list[Bundle]]:
    """Gather bundles, so that a message is not sent for a handful of bytes."""
    batch: list[Bundle] = []
    total = length = 0
    for bundle in work:
        batch.append(bundle)
        total += count_elements(bundle)
        length += len(bundle)
        if total >= elements or length >= BATCH:
            yield batch
            batch, total, length = [], 0, 0
    if batch:
        yield batch
