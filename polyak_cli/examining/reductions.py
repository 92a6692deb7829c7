"""Fold the slabs of tensors into sums: norms, extremes, distances, equality.

A reduction takes one slab after the other and keeps only sums, so that memory stays flat whatever
the size of the tensors.  Knows neither formats nor what a sum means to the user.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np

from polyak_cli.averaging.belonging.constants import is_diverged, merge_constants
from polyak_cli.averaging.belonging.runs import choose_compared
from polyak_cli.averaging.matching import Row, list_compared, list_files, list_sources
from polyak_cli.engine import reading
from polyak_cli.engine.constants import Agreement, Constant, find_codes
from polyak_cli.engine.inputs import check_unchanged
from polyak_cli.engine.kernel import is_finite, widen_any
from polyak_cli.engine.reading import Piece
from polyak_cli.engine.samples import Sampler, SampleSums
from polyak_cli.engine.slabs import FoldTensor, Memory, Slab
from polyak_cli.errors import FormatError
from polyak_cli.storage import Bytes
from polyak_cli.tensors import Float64, Table

#: Bytes for the buffers of one tool, where the user names no bound.
BUFFER_BYTES = 16 << 20
#: How many places back `NeighbourSums` measures distances: over two neighbours that do not count.
REACH = 3


class Reduction(Protocol):
    """Sums over one tensor of one or more checkpoints."""

    def add(self, slabs: Sequence[Float64]) -> None:
        """Add the next slab, as each checkpoint has it.  The slabs may be overwritten."""


_Reduction = TypeVar("_Reduction", bound=Reduction)


def bound_memory() -> Memory:
    """Return the bound on the buffers of one tool in one process."""
    return Memory.within(BUFFER_BYTES, 1)


def find_differing(tables: Sequence[Table], rows: Iterable[Row]) -> set[str]:
    """Return the newest checkpoint's names of the tensors whose bytes are not the same in all.

    Args:
        tables: of the checkpoints.
        rows: the tensors, as each checkpoint has them; all of them are stored.

    Raises:
        FormatError: a file ends early, is damaged, or changed since it was scanned.
    """
    pairs = [(row[-1].name, list_sources(tables, row)) for row in rows]
    return reading.find_differing(pairs, list_files(tables), bound_memory())[0]


def fold_slabs(
    tables: Sequence[Table],
    rows: Sequence[Row],
    add: Callable[[str, list[Float64]], None],
) -> None:
    """Pass every slab of every tensor to a function, in order.

    Args:
        tables: of the checkpoints.
        rows: the tensors, as each checkpoint has them; empty tensors are left out.
        add: takes the tensor's name and its slab in each checkpoint, in float64.

    Raises:
        FormatError: a file ends early, is damaged, or changed since it was scanned.
    """
    files = list_files(tables)
    # Damaged or diverged models hold NaN, infinities, and values whose squares overflow.
    with np.errstate(invalid="ignore", over="ignore"):
        for tensor, slabs in reading.read_values(
            list_compared(tables, rows), files, bound_memory()
        ):
            add(tensor.name, slabs)
    check_unchanged(files)


def reduce_each(
    tables: Sequence[Table], rows: Sequence[Row], create: Callable[[], _Reduction]
) -> dict[str, _Reduction]:
    """Fold every tensor into a reduction of its own; return them by name, without empty tensors.

    Args:
        tables: of the checkpoints.
        rows: the tensors, as each checkpoint has them.
        create: returns a new reduction.

    Raises:
        FormatError: as `fold_slabs`.
    """
    found: dict[str, _Reduction] = {}

    def add(name: str, slabs: list[Float64]) -> None:
        if name not in found:
            found[name] = create()
        found[name].add(slabs)

    fold_slabs(tables, rows, add)
    return found


@dataclass(slots=True)
class ValueSums:
    """Norm and extremes of the finite values of one tensor, and the count of the others."""

    squares: float = 0.0
    min: float = math.inf
    max: float = -math.inf
    nonfinite: int = 0

    def add(self, slabs: Sequence[Float64]) -> None:
        """Add the next slab, of one checkpoint."""
        (slab,) = slabs
        finite = slab[np.isfinite(slab)]
        self.squares += float(np.dot(finite, finite))
        self.min = min(self.min, float(finite.min(initial=math.inf)))
        self.max = max(self.max, float(finite.max(initial=-math.inf)))
        self.nonfinite += len(slab) - len(finite)


@dataclass(slots=True)
class PairSums:
    """How far two checkpoints are apart in one tensor.

    ``aa``, ``bb`` and ``ab`` are inner products over the elements that are finite in both; ``dd``
    is the squared distance, which is infinite where a value that is not finite has no equal.
    ``apart`` is <b, a>, <b, b>, <a, a> and the number of elements, as in `SampleSums`: over those
    that differ, because a part that was never trained would hide the others.
    """

    rtol: float = 0.0
    atol: float = 0.0
    aa: float = 0.0
    bb: float = 0.0
    ab: float = 0.0
    dd: float = 0.0
    largest: float = 0.0  # of |a - b|
    equal: bool = True  # |a - b| <= atol + rtol |a| throughout; NaN equals NaN
    apart: Float64 = field(default_factory=lambda: np.zeros(4))

    def add(self, slabs: Sequence[Float64]) -> None:
        """Add the next slab of two checkpoints; it is overwritten."""
        a, b = slabs
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        distance = np.abs(a - b)
        distance[same] = 0.0  # inf - inf is NaN, but the two are equal
        distance[np.isnan(distance)] = np.inf
        within = distance <= self.atol + self.rtol * np.abs(a)
        self.equal = self.equal and bool(np.all(same | within))
        self.largest = max(self.largest, float(distance.max(initial=0.0)))
        self.dd += float(np.dot(distance, distance))
        unusable = ~(np.isfinite(a) & np.isfinite(b))
        a[unusable] = b[unusable] = 0.0
        products = np.array([np.dot(a, b), np.dot(b, b), np.dot(a, a), np.count_nonzero(~same)])
        ab, bb, aa = products[:3].tolist()
        self.aa, self.bb, self.ab = self.aa + aa, self.bb + bb, self.ab + ab
        if products[3] < len(a):
            x, y = b[~same], a[~same]
            products[:3] = np.dot(x, y), np.dot(x, x), np.dot(y, y)
        self.apart += products


class RunSums:
    """Squared distances within a run, over all its tensors as one long vector.

    Attributes:
        average: the squared norm of the checkpoints' equal average.
        steps: from each checkpoint to the next.
        spread: from each checkpoint to the average.
    """

    def __init__(self, count: int) -> None:
        self.average = 0.0
        self.steps = np.zeros(count - 1)
        self.spread = np.zeros(count)

    def add(self, slabs: Sequence[Float64]) -> bool:
        """Add the next slab; return False, and add nothing, if a value is not finite."""
        stacked = np.stack(slabs)
        codes = [find_codes(slab) for slab in slabs if not is_finite(slab)]
        if len(codes) == len(slabs):
            agreement = Agreement(len(codes[0]))
            for each in codes:
                agreement.add(each)
            stacked[:, agreement.common != 0] = 0.0  # constants: no checkpoint is off by them
        average = stacked.mean(axis=0)
        if not np.isfinite(average).all():
            return False
        self.average += float(np.dot(average, average))
        self.steps += (np.diff(stacked, axis=0) ** 2).sum(axis=1)
        self.spread += ((stacked - average) ** 2).sum(axis=1)
        return True


class RunSamples:
    """Takes the samples that averaging takes, from the pieces of a reading."""

    def __init__(self, rows: Sequence[Row], count: int) -> None:
        compared = choose_compared(rows)
        names = [row[0].name for row in rows]
        self.groups = dict(zip(names, compared.groups, strict=True))
        self.sampler = Sampler(count, compared.sampling)
        self.is_sampled = False  # whether anything of the slab is

    def take(self, piece: Piece) -> None:
        """Take the next piece."""
        tensor, k, start, stop, stored = piece
        if k == 0:
            one = FoldTensor(tensor.name, tensor.size, (), (), self.groups[tensor.name])
            self.is_sampled = self.sampler.begin([Slab(one, start, stop)])
        if not self.is_sampled:
            return
        if isinstance(stored, FormatError):
            self.sampler.skip()
        else:
            source = tensor.sources[k]
            self.sampler.take(stored, source.dtype, source.byteorder)
        if piece.is_last:
            self.sampler.finish()


class NeighbourSums:
    """Sums over all float tensors of the checkpoints of one model, oldest first.

    Which checkpoints hold NaN or infinity is known only at the end.  Distances are therefore also
    kept across up to two neighbours that may turn out not to be finite.

    Attributes:
        nonfinite: how many values of each checkpoint are not finite, and no constants.
        constants: tensor -> its values that are not finite and the same in all checkpoints.
        first_nonfinite: checkpoint -> the first tensor that holds such a value.
        squares: squared norm of each checkpoint.
        distances: ``[k, j]`` is the squared distance from checkpoint ``k - j`` to ``k``.
        same: every bit is that of the checkpoint before.
        damaged: checkpoint -> why its values cannot be read.
        samples: sums over those of neighbouring checkpoints, once all was read.
    """

    def __init__(self, count: int) -> None:
        self.nonfinite = np.zeros(count, np.int64)
        self.first_nonfinite: dict[int, str] = {}
        self.constants: dict[str, Constant] = {}
        self.added = 0  # checkpoints of this slab, without those that cannot be read
        self.pending: dict[int, int] = {}  # of this slab, how many values are not finite
        self.agreement = Agreement(0)
        self.squares = np.zeros(count)
        self.distances = np.zeros((count, REACH + 1))
        self.same = np.arange(count) > 0
        self.damaged: dict[int, FormatError] = {}
        self.samples = SampleSums(count)

    def read(self, tables: Sequence[Table], rows: Sequence[Row], memory: Memory) -> None:
        """Read every value of the float tensors, once.

        Raises:
            FormatError: a file changed since it was scanned, or a chunk exceeds the memory.
        """
        with np.errstate(invalid="ignore", over="ignore"):
            self._read(tables, rows, memory)
            self._settle(rows)
        check_unchanged(list_files(tables))

    def _settle(self, rows: Sequence[Row]) -> None:
        """Count the NaN of tensors in which no NaN can be a constant."""
        for row in rows:
            found = self.constants.get(row[0].name)
            if found and is_diverged(found, row[-1].shape):
                for k in range(len(self.squares)):
                    self._count(k, found.name, found.nan)
                self.constants[found.name] = found._replace(nan=0)

    def _read(self, tables: Sequence[Table], rows: Sequence[Row], memory: Memory) -> None:
        # A ring of the newest slabs: row k lies in place k % (REACH + 1); the last is scratch.
        recent: list[Float64] = []
        before: Bytes | None = None
        held = REACH + 4  # slabs to compare, their difference, two as stored, and masks
        samples = RunSamples(rows, len(tables))
        tensors = list_compared(tables, rows)
        for piece in reading.read_pieces(tensors, list_files(tables), memory, held):
            samples.take(piece)
            tensor, k, start, stop, stored = piece
            if k == 0:
                size = min(tensor.size, max(1, memory.most // (1 + held)))
                if not recent or len(recent[0]) < size:
                    recent = [np.empty(size) for _ in range(REACH + 2)]
            values = recent[k % (REACH + 1)]
            if isinstance(stored, FormatError):
                self.damaged.setdefault(k, stored)
                self.same[k : k + 2] = False
                values.fill(np.nan)  # no distance to it is finite
                before = None
            else:
                source, count = tensor.sources[k], stop - start
                widen_any(stored, source.dtype, source.byteorder, values[:count])
                self._add(k, [slab[:count] for slab in recent])
                if self.same[k]:
                    self.same[k] = before is not None and np.array_equal(stored, before)
                before = stored
            if piece.is_last:
                self._end_slab(tensor.name)
        self.samples.add(samples.sampler.take_sums())

    def _add(self, k: int, recent: Sequence[Float64]) -> None:
        """Add a slab of checkpoint ``k``, which lies in the ring among those before it."""
        *ring, difference = recent
        values = ring[k % len(ring)]
        squares = float(np.dot(values, values))
        if not np.isfinite(squares):  # a square may overflow where the value is finite
            self._take_nonfinite(k, values)
            squares = float(np.dot(values, values))
        self.squares[k] += squares
        self.added += 1
        for reach in range(1, min(k, REACH) + 1):
            np.subtract(values, ring[(k - reach) % len(ring)], out=difference)
            self.distances[k, reach] += np.dot(difference, difference)

    def _take_nonfinite(self, k: int, values: Float64) -> None:
        """Note which values of a slab are not finite, and put 0 in their place."""
        codes = find_codes(values)
        nonfinite = int(np.count_nonzero(codes))
        if not nonfinite:
            return
        # Checkpoints that turn out to be sound have the same there, and are not apart by it; the
        # distances of the others are not used.
        values[codes != 0] = 0.0
        if not self.pending:
            self.agreement = Agreement(len(values))
        if len(self.pending) == self.added:  # nothing is constant that was finite before
            self.agreement.add(codes)
        self.pending[k] = nonfinite

    def _end_slab(self, name: str) -> None:
        """Tell the constants of a slab from what went wrong: all checkpoints were added."""
        constants = 0
        if self.pending and len(self.pending) == self.added:
            self.agreement.refuse_nan(0, len(self.agreement.common))
            found = self.agreement.describe(name, 0, len(self.agreement.common))
            constants = found.infinite + found.nan
            if constants:
                before = self.constants.get(name, Constant(name, 0, 0))
                self.constants |= merge_constants([before, found])
        for k, nonfinite in self.pending.items():
            self._count(k, name, nonfinite - constants)
        self.pending, self.added = {}, 0

    def _count(self, k: int, name: str, nonfinite: int) -> None:
        """Count values of checkpoint ``k`` that went wrong."""
        self.nonfinite[k] += nonfinite
        if nonfinite:
            self.first_nonfinite.setdefault(k, name)

    def measure_distance(self, one: int, other: int) -> float | None:
        """Return how far two checkpoints are apart, None where that was not measured."""
        reach = other - one
        return float(np.sqrt(self.distances[other, reach])) if reach <= REACH else None
