"""Slabs of many checkpoints -> slabs of one or several outputs, in processes and flat memory.

Knows no format, no scheme and no header: it gets tables of extents and a matrix of coefficients,
reads by offset, folds in float64 from the oldest checkpoint to the newest, rounds once and writes
by offset.  Work is divided across slabs, never across checkpoints, so the bytes do not depend on
the division.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import selectors
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from polyak_cli.errors import FormatError, MismatchError, PolyakError, shown
from polyak_cli.processes.children import Child, Writer, raised
from polyak_cli.storage import (
    Bytes,
    File,
    Version,
)
from polyak_cli.storage.local import (
    PAGE,
    clashes,
    expect,
    page_aligned,
    write_exactly,
)
from polyak_cli.tensors import (
    Extent,
    Float64,
    LaidOut,
    Storage,
    itemsize,
    narrow,
    numbers,
    widen,
)

#: Elements folded at a time: 256 KiB of float32, with its float64 sum and product within L2.
PIECE = 1 << 16
#: Pieces, or slabs of small tensors, that are folded between two messages.
PIECES, BATCH = 8, 256
#: Bytes of the inputs from which on it pays to fork.
SPREAD = 64 << 20
#: Bytes up to which a tensor is small: one system call for each would cost more than its bytes.
SMALL = 1 << 14
#: Bytes between two small tensors up to which it is quicker to read them along, and bytes of such
#: a reading for each element that may be folded at a time.
GAP, SPAN = 1 << 13, 16
#: Bytes of a slab from which on it pays to have it fetched ahead; the system does so for less.
AHEAD = 1 << 16
#: Bytes a second that one process gets from the page cache only: fetching ahead is in vain there.
FAST = 2e9
#: Bytes written between two flushes to the disk.
FLUSH = 32 << 20
#: Bytes that one element needs while it is folded: as stored, its float64 and the sum.
_FOLD_BYTES = 8 + 8 + 8
#: Bytes by which a buffer is moved where the system would copy slowly; see `tensors.clashes`.
_DODGE = PAGE // 2

Progress = Callable[[int], None]


class Source(NamedTuple):
    """Where one checkpoint keeps one tensor."""

    storage: Storage
    byteorder: str
    file: int  # in which of the inputs


class Averaged(NamedTuple):
    """One tensor to average: where all checkpoints keep it and where the outputs want it."""

    name: str
    size: int
    dtype: str
    sources: Sequence[Source]
    targets: Sequence[LaidOut]


class Slab(NamedTuple):
    """A contiguous part of a tensor, in elements."""

    tensor: Averaged
    start: int
    stop: int


#: Slabs that are folded as one: several small tensors whole, or one slab of any.
Bundle = Sequence[Slab]


def _count(bundle: Bundle) -> int:
    """Return the elements of a bundle."""
    return sum(slab.stop - slab.start for slab in bundle)


class Totals(NamedTuple):
    """What a run did; seconds are summed over the processes."""

    bytes_read: int = 0
    bytes_written: int = 0
    reading: float = 0.0
    folding: float = 0.0
    writing: float = 0.0

    def plus(self, other: Totals) -> Totals:
        """Return the sum."""
        return Totals(
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
            self.reading + other.reading,
            self.folding + other.folding,
            self.writing + other.writing,
        )


class Memory(NamedTuple):
    """How a bound on the buffers is shared out."""

    jobs: int
    piece: int  # elements of one tensor folded at a time
    most: int  # elements at a time where the storage is better read in larger parts
    element: int = _FOLD_BYTES  # bytes that one element needs

    @property
    def nbytes(self) -> int:
        """Bytes of all the buffers, at the usual piece."""
        return self.jobs * self.piece * self.element

    @classmethod
    def within(cls, nbytes: int, jobs: int, averages: int = 1) -> Memory:
        """Fit the processes and their buffers into a bound; fewer processes before tiny pieces."""
        # Each further average has a sum of its own; from two on, the product has a buffer too.
        element = _FOLD_BYTES + 8 * averages * (averages > 1)
        jobs = max(1, min(jobs, nbytes // (element * 4096)))
        most = max(256, nbytes // (element * jobs))
        return cls(jobs, min(PIECE, most), most, element)


@dataclass(frozen=True, slots=True)
class Fold:
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


def slabs(tensors: Iterable[Averaged], piece: int, most: int) -> Iterator[Slab]:
    """Cut tensors into slabs that cover each exactly once.

    Args:
        tensors: what to cut.
        piece: elements of a slab.
        most: elements that a slab may have where the storage is better read in larger parts.
    """
    for tensor in tensors:
        width = itemsize(tensor.dtype)
        best = max(source.storage.alignment for source in tensor.sources) // width
        step = piece if best <= 1 else max(1, min(best * max(1, piece // best), most))
        for start in range(0, tensor.size, step):
            yield Slab(tensor, start, min(start + step, tensor.size))


def bundles(work: Iterable[Slab], elements: int) -> Iterator[Bundle]:
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
        and 0 <= c.storage.offset - b.storage.offset - b.storage.nbytes <= GAP
        and c.storage.offset + c.storage.nbytes - a.storage.offset <= span
        for a, b, c in zip(first.sources, last.sources, new.sources, strict=True)
    )


def _is_small(slab: Slab) -> bool:
    """Tell whether a slab is a small tensor, and the whole of it, which a tight bound may cut."""
    tensor = slab.tensor
    whole = slab.stop - slab.start == tensor.size
    return whole and tensor.size * itemsize(tensor.dtype) <= SMALL


def batches(work: Iterable[Bundle], elements: int) -> Iterator[list[Bundle]]:
    """Gather bundles, so that a message is not sent for a handful of bytes."""
    batch: list[Bundle] = []
    total = length = 0
    for bundle in work:
        batch.append(bundle)
        total += _count(bundle)
        length += len(bundle)
        if total >= elements or length >= BATCH:
            yield batch
            batch, total, length = [], 0, 0
    if batch:
        yield batch


def fold(
    tensors: Iterable[Averaged],
    work: Fold,
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
    parts = bundles(slabs(tensors, memory.piece, memory.most), memory.piece)
    cut = batches(parts, memory.piece * PIECES)
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


def _here(work: Fold, cut: Iterable[list[Bundle]]) -> Generator[Totals, None, None]:
    """Fold in this process, yielding what each batch took."""
    with _Files(work.inputs) as files, _opened(work.outputs) as outputs:
        worker = _Worker(work, files, outputs)
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
    work: Fold, cut: Iterable[list[Bundle]], jobs: int
) -> Generator[Totals, None, None]:
    """Fold in several processes, each taking every so many-th batch.

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


def differing(
    tensors: Iterable[tuple[str, Sequence[Source]]],
    inputs: Sequence[File],
    memory: Memory,
    progress: Progress = lambda _: None,
) -> tuple[set[str], Totals]:
    """Return the names of tensors whose bytes are not the same everywhere, and what that took."""
    step = memory.piece * 8
    found = set()
    clock = _Clock()
    with _Files(inputs) as files:
        for name, sources in tensors:
            for read, same in _compared(sources, files, step, name):
                clock.read(read)
                progress(read)
                if not same:
                    found.add(name)
                    break
    return found, clock.totals()


def _compared(
    sources: Sequence[Source], files: _Files, step: int, name: str
) -> Iterator[tuple[int, bool]]:
    """Yield the bytes of each piece read, and whether it is the same as the first source's."""
    nbytes = sources[0].storage.nbytes
    if any(source.storage.nbytes != nbytes for source in sources):
        yield 0, False
        return
    for start in range(0, nbytes, step):
        first, other = (np.empty(min(step, nbytes - start), np.uint8) for _ in range(2))
        files.read(sources[0], start, first, name)
        yield len(first), True
        for source in sources[1:]:
            files.read(source, start, other, name)
            yield len(other), np.array_equal(first, other)


class Compared(NamedTuple):
    """One tensor of numbers, where each of several checkpoints keeps it."""

    name: str
    size: int
    dtypes: Sequence[str]  # of each source
    sources: Sequence[Source]


def pieces(
    tensors: Iterable[Compared], inputs: Sequence[File], memory: Memory, held: int | None = None
) -> Iterator[tuple[Compared, int, Bytes | FormatError]]:
    """Yield the stored bytes of every slab of every tensor, from each checkpoint in turn.

    Args:
        tensors: of types of at most 8 bytes, and not empty.
        inputs: the files of all checkpoints.
        memory: bounds the buffers, which are used again: a piece is gone when the next but one
            comes.
        held: how many float64 buffers of a slab's length the caller keeps; one a checkpoint, if
            not given.

    Yields:
        The tensor, the number of the checkpoint, and its bytes; or, in place of them, the error of
        a file that ends early, is damaged, or changed since it was scanned.

    Raises:
        FormatError: a tensor cannot be read within the bound.
    """
    with _Files(inputs) as files:
        for tensor in tensors:
            _check_held(tensor, inputs, memory)
            buffers = len(tensor.sources) if held is None else held
            count = min(tensor.size, max(1, memory.most // (1 + buffers)))
            # Whole bands of chunks where they fit, or chunks would be decoded again and again.
            band = max(
                s.storage.alignment * tensor.size // s.storage.nbytes for s in tensor.sources
            )
            count -= count % band if 0 < band < count < tensor.size else 0
            raw = [np.empty(count * 8, np.uint8) for _ in range(2)]
            for start in range(0, tensor.size, count):
                for k, source in enumerate(tensor.sources):
                    width = source.storage.nbytes // tensor.size
                    stored = raw[k % 2][: min(count, tensor.size - start) * width]
                    try:
                        files.read(source, start * width, stored, tensor.name)
                    except FormatError as error:
                        yield tensor, k, error
                    else:
                        yield tensor, k, stored


def values(
    tensors: Iterable[Compared], inputs: Sequence[File], memory: Memory
) -> Iterator[tuple[Compared, list[Float64]]]:
    """Yield every slab of every tensor as each checkpoint has it, in float64 and in flat memory.

    Args:
        tensors: of types that `tensors.numbers` knows, and not empty.
        inputs: the files of all checkpoints.
        memory: bounds the buffers, which are used again: a slab is gone when the next one comes.

    Raises:
        FormatError: an input ends early, is damaged, or changed since it was scanned.
    """
    buffers: list[Float64] = []
    for tensor, k, stored in pieces(tensors, inputs, memory):
        if isinstance(stored, FormatError):
            raise stored
        source = tensor.sources[k]
        count = len(stored) // (source.storage.nbytes // tensor.size)
        if k == 0 and (len(buffers) != len(tensor.sources) or len(buffers[0]) < count):
            buffers = [np.empty(count) for _ in tensor.sources]
        numbers(stored, tensor.dtypes[k], source.byteorder, buffers[k][:count])
        if k == len(tensor.sources) - 1:
            yield tensor, [buffer[:count] for buffer in buffers]


def _check_held(tensor: Compared, inputs: Sequence[File], memory: Memory) -> None:
    """Refuse what cannot be read within the bound."""
    for source in tensor.sources:
        if source.storage.held > memory.most * _FOLD_BYTES:
            raise FormatError(
                f"{shown(inputs[source.file].path)}: tensor '{shown(tensor.name)}' is stored in "
                f"chunks of {source.storage.held} bytes, each of which must be held whole; "
                f"expected at most {memory.most * _FOLD_BYTES}"
            )


class _Worker:
    """Folds slabs one after the other, with buffers that it keeps."""

    def __init__(self, work: Fold, files: _Files, outputs: Sequence[int]) -> None:
        self.work = work
        self.files = files
        self.outputs = outputs
        self.terms = work.terms()
        self.clock = _Clock()
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
        self.clock = _Clock()
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
                        self.files.expect(slab.tensor.sources[k], start, stop)

    def _fold(self, bundle: Bundle) -> None:
        """Average what is folded as one."""
        count = _count(bundle)
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

    def _gathered(self, sources: Sequence[Source], width: int, name: str) -> Bytes:
        """Return the values of small tensors side by side, read at once with what lies between."""
        extents = [source.storage for source in sources]
        starts = np.array([extent.offset for extent in extents if isinstance(extent, Extent)])
        sizes = np.array([extent.nbytes for extent in extents])
        low, high = int(starts[0]), int(starts[-1] + sizes[-1])
        if high - low > len(self.span):
            self.span = page_aligned(high - low)
        whole = self.span[: high - low]
        self.files.read(sources[0]._replace(storage=Extent(low, len(whole))), 0, whole, name)
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


class _Clock:
    """Splits the time into reading, folding and writing."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.bytes_read = self.bytes_written = 0
        self.reading = self.folding = self.writing = 0.0

    def _lap(self) -> float:
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
        """Return what was counted."""
        return Totals(self.bytes_read, self.bytes_written, self.reading, self.folding, self.writing)


class _Files:
    """The inputs, opened when first read, each checked to be the file that was scanned.

    As many stay open as the process may have; the rest are opened for every slab.
    """

    def __init__(self, inputs: Sequence[File]) -> None:
        self.inputs = inputs
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.room = max(0, soft - 64) if soft != resource.RLIM_INFINITY else len(inputs)
        self.kept: dict[int, int] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self.kept.values():
            os.close(descriptor)

    def read(self, source: Source, start: int, buffer: Bytes, name: str) -> None:
        """Fill the buffer from a tensor, with file and tensor named in every error."""
        path = self.inputs[source.file].path
        try:
            descriptor = self._keep(source.file)
            if descriptor is not None:
                source.storage.read_into(descriptor, start, buffer)
                return
            descriptor = self._open(source.file)
            try:
                source.storage.read_into(descriptor, start, buffer)
            finally:
                os.close(descriptor)
        except FormatError as error:
            raise FormatError(f"{shown(path)}: tensor '{shown(name)}': {error}") from None
        except OSError as error:
            raise FormatError(f"{shown(path)}: cannot be read: {error.strerror}") from None

    def expect(self, source: Source, start: int, stop: int) -> None:
        """Have bytes of a tensor fetched, if its file is one that stays open."""
        with contextlib.suppress(OSError, FormatError):  # reading them will say what is wrong
            descriptor = self._keep(source.file)
            if descriptor is not None:
                for offset, nbytes in source.storage.runs(start, stop):
                    expect(descriptor, offset, nbytes)

    def _keep(self, k: int) -> int | None:
        """Return an input that is open for the whole run, if there is room for another."""
        descriptor = self.kept.get(k)
        if descriptor is None and len(self.kept) < self.room:
            descriptor = self.kept[k] = self._open(k)
        return descriptor

    def _open(self, k: int) -> int:
        path, identity = self.inputs[k]
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if Version.of(os.fstat(descriptor)) != identity:
            os.close(descriptor)
            raise FormatError("the file changed while it was read; is training still running?")
        return descriptor


@contextlib.contextmanager
def _opened(outputs: Sequence[str]) -> Iterator[list[int]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(open(path, "r+b")).fileno() for path in outputs]


def unchanged(inputs: Sequence[File]) -> None:
    """Check once more that every input is the file that was scanned.

    Raises:
        FormatError: one was replaced, written to or removed meanwhile.
    """
    for path, identity in inputs:
        with contextlib.suppress(OSError):
            if Version.of(Path(path).stat()) == identity:
                continue
        raise FormatError(
            f"{shown(path)}: changed or vanished while it was read; is training still running?"
        )
