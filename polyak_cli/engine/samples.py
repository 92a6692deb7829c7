"""Take the inner products of neighbouring checkpoints, over samples of what is folded anyway.

A sample is defined by its place in its tensor, so that it depends neither on the size of a slab nor
on who folds it.  Knows nothing of what the products mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from polyak_cli.engine.kernel import widen
from polyak_cli.engine.slabs import Bundle
from polyak_cli.storage import Bytes
from polyak_cli.tensors import Float64, itemsize

#: Each checkpoint is compared with so many before it, so that one between them does not part them.
REACH = 3
#: Elements of the buffer for samples, at which calls of numpy cost little beside its work.
_BUFFER = 1 << 16
#: Checkpoints of which samples are held before their products are taken, besides `REACH`.
_MOST = 16


class Sampling(NamedTuple):
    """Which elements of a tensor are sampled: the first `length` of every `step`."""

    step: int
    length: int

    def cut(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield where the samples between two elements of a tensor begin and end."""
        if self.length >= self.step:
            yield start, stop
            return
        for window in range(start - start % self.step, stop, self.step):
            low, high = max(start, window), min(stop, window + self.length)
            if low < high:
                yield low, high


class SampleSums:
    """Sums over the samples of each group of tensors.

    Attributes:
        sums: group -> an array, checkpoints x `REACH` x 4.  With y the checkpoint ``1 + r`` before
            x, ``[k, r]`` holds <x, y>, <x, x>, <y, y> and the number of elements, all over the
            elements that differ: those of a part that was never trained would hide the others.
    """

    def __init__(self, count: int, sums: Mapping[int, Float64] | None = None) -> None:
        self.count = count
        self.sums: dict[int, Float64] = dict(sums or {})

    def of(self, group: int) -> Float64:
        """Return the sums of a group, which may be added to."""
        if group not in self.sums:
            self.sums[group] = np.zeros((self.count, REACH, 4))
        return self.sums[group]

    def add(self, other: SampleSums | None) -> None:
        """Add the products of other samples."""
        for group, sums in (other.sums if other else {}).items():
            self.of(group)[...] += sums

    def pack(self) -> list[Any]:
        """Return what JSON can hold."""
        return [self.count, [[group, sums.tolist()] for group, sums in self.sums.items()]]

    @classmethod
    def unpack(cls, packed: Sequence[Any]) -> SampleSums:
        """Return what was packed."""
        count, sums = packed
        return cls(count, {group: np.array(rows) for group, rows in sums})


class Sampler:
    """Takes the samples of bundles, of each from the oldest checkpoint to the newest."""

    def __init__(self, count: int, sampling: Sampling) -> None:
        self.count = count
        self.sampling = sampling
        self.total = SampleSums(count)
        self.places: list[tuple[int, int, int]] = []  # group and columns
        self.picked: slice | npt.NDArray[np.int64] = slice(0)
        self.rows = np.empty((0, 0))  # of the buffer, a checkpoint each
        self.taken = 0  # checkpoints of this bundle
        self.filled = 0  # rows of the buffer

    def begin(self, bundle: Bundle) -> bool:
        """Begin a bundle; return whether anything of it is sampled."""
        spans: list[tuple[int, int, int]] = []
        before = 0
        for tensor, start, stop in bundle:
            if tensor.group is not None:
                spans += (
                    (tensor.group, before + low - start, before + high - start)
                    for low, high in self.sampling.cut(start, stop)
                )
            before += stop - start
        if not spans:
            return False
        # The columns of a group stand together, which few groups of many tensors make cheap.
        spans.sort()
        self.places = []
        column = 0
        for group, low, high in spans:
            if not self.places or self.places[-1][0] != group:
                self.places.append((group, column, column))
            column += high - low
            self.places[-1] = (group, self.places[-1][1], column)
        lows, highs = np.array([span[1:] for span in spans]).T
        sizes = highs - lows
        if len(spans) == 1:
            self.picked = slice(int(lows[0]), int(highs[0]))
        else:
            self.picked = np.arange(column) + np.repeat(lows - np.cumsum(sizes) + sizes, sizes)
        # Few columns leave room for many checkpoints, whose products one call of numpy takes.
        height = REACH + max(1, min(_MOST, self.count, _BUFFER // column - REACH))
        if self.rows.shape != (height, column):
            self.rows = np.empty((height, column))
        self.taken, self.filled = 0, 0
        return True

    def take(self, raw: Bytes, dtype: str, byteorder: str) -> None:
        """Take the samples of the next checkpoint from its stored values of the bundle."""
        row = self._make_row()
        stored = raw.view(f"u{itemsize(dtype)}")[self.picked].view(np.uint8)
        widen(stored, dtype, byteorder, row)

    def skip(self) -> None:
        """Go on to the checkpoint after the next, whose values cannot be read."""
        self._make_row().fill(0.0)

    def _make_row(self) -> Float64:
        """Return the row of the buffer for the next checkpoint."""
        if self.filled == len(self.rows):
            self._multiply()
            # The newest rows have neighbours that are still to come.
            self.rows[:REACH] = self.rows[-REACH:]
            self.filled = REACH
        self.filled += 1
        self.taken += 1
        row: Float64 = self.rows[self.filled - 1]
        return row

    def finish(self) -> None:
        """End the bundle."""
        self._multiply()

    def take_sums(self) -> SampleSums | None:
        """Return the products of all bundles since the last call, if there are any."""
        total, self.total = self.total, SampleSums(self.count)
        return total if total.sums else None

    def _multiply(self) -> None:
        """Add the products of the rows that are new in the buffer."""
        old = REACH if self.taken > self.filled else 0
        values = self.rows[: self.filled]
        fresh = values[old:]
        # An infinite sum proves nothing, a finite one that all are finite; see `kernel.is_finite`.
        if not np.isfinite(fresh.sum()):
            fresh[~np.isfinite(fresh)] = 0.0
        first = self.taken - self.filled  # the checkpoint in the buffer's first row
        for group, low, high in self.places:
            sums = self.total.of(group)
            for reach in range(1, REACH + 1):
                begin = max(old, reach)
                if begin < self.filled:
                    x = values[begin:, low:high]
                    y = values[begin - reach : self.filled - reach, low:high]
                    sums[first + begin : first + self.filled, reach - 1] += _multiply_pairs(x, y)


def _multiply_pairs(x: Float64, y: Float64) -> Float64:
    """Return <x, y>, <x, x>, <y, y> and the number of elements of each row, where they differ."""
    differs = x != y
    counts = np.count_nonzero(differs, axis=1)
    if counts.sum() < x.size:
        x, y = x * differs, y * differs
    return np.stack(
        [
            np.einsum("kn,kn->k", x, y),
            np.einsum("kn,kn->k", x, x),
            np.einsum("kn,kn->k", y, y),
            counts,
        ],
        axis=1,
    )
