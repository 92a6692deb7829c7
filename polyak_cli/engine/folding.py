"""FoldJob batches of slabs in float64, from the oldest checkpoint to the newest, and round once.

Knows no format, no scheme and no header: it gets tables of extents and a matrix of coefficients.
Knows nothing of processes either: work is divided across slabs, never across checkpoints, so the
bytes do not depend on the division.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polyak_cli.engine.inputs import OpenInputs
from polyak_cli.engine.kernel import narrow, widen
from polyak_cli.engine.slabs import Bundle, Slab, TensorSource, count_elements
from polyak_cli.engine.timing import Clock, Totals
from polyak_cli.errors import MismatchError, PolyakError, shown
from polyak_cli.storage import Bytes, File
from polyak_cli.storage.local import PAGE, clashes, page_aligned, write_exactly
from polyak_cli.tensors import Extent, Float64, itemsize

#: Bytes of a slab from which on it pays to have it fetched ahead; the system does so for less.
AHEAD = 1 << 16
#: Bytes a second that one process gets from the page cache only: fetching ahead is in vain there.
FAST = 2e9
#: Bytes by which a buffer is moved where the system would copy slowly; see `tensors.clashes`.
_DODGE = PAGE // 2


@dataclass(frozen=True, slots=True)
class FoldJob:
    """All that a slab's work needs besides the slab: plain values, so that it can be sent."""

    inputs: Sequence[File]  # of all checkpoints
    outputs: Sequence[str]  # the files of all averages
    coefficients: npt.NDArray[np.float64]  # averages x checkpoints
    allow_nonfinite: bool

    def terms(self) -> list[list[tuple[int, float]]]:
        """Return for each checkpoint the averages it counts in, and how much.

        0 * inf is nan: a checkpoint that counts nowhere is not even read.
        """
        return [
            [(row, float(c)) for row, c in enumerate(column) if c] for column in self.coefficients.T
        ]


class Worker:
    """Folds slabs one after the other, with buffers that it keeps."""

    def __init__(self, work: FoldJob, files: OpenInputs, outputs: Sequence[int]) -> None:
        self.work = work
        self.files = files
        self.outputs = outputs
        self.terms = work.terms()
        self.clock = Clock()
        self.span = page_aligned(0)  # small tensors and what lies between them
        self._allocate(0)

    def _allocate(self, count: int) -> None:
        def floats() -> Float64:
            return page_aligned(count * 8).view(np.float64)

        self.raw: Bytes = page_aligned(count * 8 + _DODGE)
        self.values = floats()
        self.sums = [floats() for _ in self.work.coefficients]
        # With one average, the values themselves may be overwritten by the product.
        self.product = floats() if len(self.sums) > 1 else self.values

    def _buffer(self, nbytes: int, distance: int) -> Bytes:
        """Return a buffer for stored values.

        Args:
            nbytes: its length.
            distance: how far, modulo a page, a page lies behind where the system copies from, or
                ahead of where it copies to.
        """
        start = _DODGE if clashes(distance) else 0
        return self.raw[start : start + nbytes]

    def fold(self, batch: Sequence[Bundle]) -> Totals:
        """Average the bundles into the outputs and return what that took."""
        self.clock = Clock()
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):
            for bundle in batch:
                self._fold(bundle)
        return self.clock.totals()

    def expect(self, batch: Sequence[Bundle]) -> None:
        """Have what a batch needs fetched from the disk, if the last one came from there."""
        if self.clock.bytes_read >= FAST * self.clock.reading:
            return
        for slab in itertools.chain.from_iterable(batch):
            width = itemsize(slab.tensor.dtype)
            start, stop = slab.start * width, slab.stop * width
            if stop - start >= AHEAD:
                for k, terms in enumerate(self.terms):
                    if terms:
                        self.files.prefetch(slab.tensor.sources[k], start, stop)

    def _fold(self, bundle: Bundle) -> None:
        """Average what is folded as one."""
        count = count_elements(bundle)
        if count > self.values.size:
            self._allocate(count)
        try:
            self._sum(bundle, count)
            self._store(bundle, count)
        except PolyakError:
            if len(bundle) == 1:
                raise
            for slab in bundle:  # the one that it is about has itself named
                self._fold([slab])

    def _sum(self, bundle: Bundle, count: int) -> None:
        """Compute ``sum_k c_k x_k`` in float64, from the oldest checkpoint to the newest."""
        values, product = self.values[:count], self.product[:count]
        sums = [whole[:count] for whole in self.sums]
        begun = [False] * len(sums)
        for k, terms in enumerate(self.terms):
            if not terms:
                continue
            self._load(bundle, k, values)
            for row, coefficient in terms:
                if begun[row]:  # numpy fuses no multiply with an add
                    np.multiply(values, coefficient, out=product)
                    np.add(sums[row], product, out=sums[row])
                else:  # not 0 + c x, which would lose the sign of a negative zero
                    np.multiply(values, coefficient, out=sums[row])
                    begun[row] = True
            self.clock.fold()
        if not self.work.allow_nonfinite and not all(_finite(row) for row in sums):
            raise self._culprit(bundle[0], values)

    def _load(self, bundle: Bundle, k: int, values: Float64) -> None:
        """Read what checkpoint ``k`` has of a bundle, and widen it."""
        slab = bundle[0]
        tensor, source = slab.tensor, slab.tensor.sources[k]
        width = itemsize(tensor.dtype)
        if len(bundle) > 1:
            raw = self._gathered([s.tensor.sources[k] for s in bundle], width, tensor.name)
        else:
            offset = source.storage.offset if isinstance(source.storage, Extent) else 0
            raw = self._buffer(len(values) * width, -offset - slab.start * width)
            self.files.read(source, slab.start * width, raw, tensor.name)
        self.clock.read(len(raw))
        widen(raw, tensor.dtype, source.byteorder, values)

    def _gathered(self, sources: Sequence[TensorSource], width: int, name: str) -> Bytes:
        """Return the values of small tensors side by side, read at once with what lies between."""
        extents = [source.storage for source in sources]
        starts = np.array([extent.offset for extent in extents if isinstance(extent, Extent)])
        sizes = np.array([extent.nbytes for extent in extents])
        low, high = int(starts[0]), int(starts[-1] + sizes[-1])
        if high - low > len(self.span):
            self.span = page_aligned(high - low)
        whole = self.span[: high - low]
        span = Extent(low, len(whole), getattr(extents[0], "file", 0))
        self.files.read(sources[0]._replace(storage=span), 0, whole, name)
        # Picked by the largest unit in which all of them begin and end.
        unit = int(np.gcd(np.gcd.reduce(starts - low), width))
        ends = np.cumsum(sizes // unit)
        raw = self._buffer(int(sizes.sum()), 0)
        picked = np.arange(ends[-1]) + np.repeat(
            (starts - low - sizes.cumsum() + sizes) // unit, sizes // unit
        )
        np.take(whole.view(f"u{unit}"), picked, out=raw.view(f"u{unit}"), mode="clip")
        return raw

    def _store(self, bundle: Bundle, count: int) -> None:
        """Round the sums to the stored type and write them."""
        first = bundle[0]
        for row, target in enumerate(first.tensor.targets):
            width = itemsize(target.dtype)
            values = self.sums[row][:count]
            raw = self._buffer(count * width, target.offset + first.start * width)
            narrow(values, target.dtype, target.byteorder, raw)
            if target.dtype != first.tensor.dtype and not self.work.allow_nonfinite:
                stored = self.values[:count]
                widen(raw, target.dtype, target.byteorder, stored)
                _check_fits(first.tensor.name, target.dtype, values, stored)
            self.clock.fold()
            written = 0
            for tensor, start, stop in bundle:
                end = written + (stop - start) * width
                place = tensor.targets[row]
                write_exactly(
                    self.outputs[place.file], place.offset + start * width, raw[written:end]
                )
                written = end
            self.clock.write(len(raw))

    def _culprit(self, slab: Slab, values: Float64) -> MismatchError:
        """Read the slab again to say which checkpoint holds what is not finite."""
        name = shown(slab.tensor.name)
        for k, terms in enumerate(self.terms):
            if not terms:
                continue
            self._load([slab], k, values)
            where = np.flatnonzero(~np.isfinite(values))
            if len(where):
                path = self.work.inputs[slab.tensor.sources[k].file].path
                return MismatchError(
                    f"{shown(path)}: tensor '{name}' holds "
                    f"{values[where[0]]} (element {slab.start + int(where[0])}); expected finite "
                    "numbers. Leave the checkpoint out with --exclude, or use --allow-nonfinite"
                )
        return MismatchError(
            f"the average of tensor '{name}' overflows float64, though every checkpoint is "
            "finite; use --allow-nonfinite to write it all the same"
        )


def _finite(values: Float64) -> bool:
    """Tell whether all values are finite; a finite sum says so at once, and is quick."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.add.reduce(values))) or bool(np.isfinite(values).all())


def _check_fits(name: str, dtype: str, row: Float64, stored: Float64) -> None:
    """Refuse a finite average that the wanted type can only store as infinity."""
    if not _finite(stored):
        worst = row[~np.isfinite(stored)][0]
        raise MismatchError(
            f"the average of tensor '{shown(name)}' holds {worst:.6g}, which {dtype} cannot "
            "store; choose a wider --dtype"
        )
