"""BIT FOR BIT: where the files of an output are not those that the same work gave again.

Compares bytes by offset, in flat memory, and says in which tensors they lie.  Knows no format, and
nothing of how either output came to be.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from polyak_cli.errors import FormatError, shown
from polyak_cli.tensors import Extent, Table, TensorSpec, read_exactly

#: Bytes compared at a time.
_STEP = 1 << 20

Offsets = npt.NDArray[np.int64]


class Unlike(NamedTuple):
    """A tensor that is not the same."""

    name: str
    elements: int  # how many differ; 0 where they were not counted
    first: int  # the first of them, in the order in which they are stored
    size: int  # how many there are

    def __str__(self) -> str:
        """Say it in words."""
        if not self.elements:
            return f"tensor '{shown(self.name)}' differs"
        return (
            f"tensor '{shown(self.name)}' differs in {self.elements} of {self.size} elements, "
            f"first in element {self.first}"
        )


class Deviation(NamedTuple):
    """How an output deviates from what it should be; false where it does not."""

    tensors: tuple[Unlike, ...] = ()
    outside: tuple[str, ...] = ()  # of the tensors: a sentence for each file

    def __bool__(self) -> bool:
        """Tell whether there is any deviation."""
        return bool(self.tensors or self.outside)


def compare(found: Sequence[Path], expected: Table) -> Deviation:
    """Compare the files of an output with those of another that is laid out in the same way.

    Args:
        found: a file for each of the table's, in their order.
        expected: the output that is known to be right, with all its tensors.

    Raises:
        FormatError: a file cannot be read, or becomes shorter meanwhile.
    """
    specs = [*expected.tensors.values(), *expected.others.values()]
    tensors: list[Unlike] = []
    outside: list[str] = []
    for number, (path, (other, _)) in enumerate(zip(found, expected.files, strict=True)):
        counts = _Counts([spec for spec in specs if spec.file == number])
        try:
            with open(path, "rb", buffering=0) as ours, open(other, "rb", buffering=0) as right:
                sizes = [each.seek(0, 2) for each in (ours, right)]
                for offsets in _unequal(ours, right, min(sizes)):
                    counts.add(offsets)
        except OSError as error:
            raise FormatError(f"{shown(path)}: cannot be read: {error.strerror}") from None
        tensors += counts.tensors()
        if sizes[0] != sizes[1]:
            outside.append(f"has {sizes[0]} bytes; expected {sizes[1]}")
        if counts.outside:
            outside.append(
                f"{counts.outside} bytes outside the tensors differ, the first at byte "
                f"{counts.first} of {shown(path.name)}"
            )
    return Deviation(tuple(tensors), tuple(outside))


def _unequal(one: BinaryIO, other: BinaryIO, size: int) -> Iterator[Offsets]:
    """Yield the offsets of the bytes that differ, piece by piece."""
    a, b = np.empty(_STEP, np.uint8), np.empty(_STEP, np.uint8)
    for start in range(0, size, _STEP):
        count = min(_STEP, size - start)
        read_exactly(one.fileno(), start, a[:count])
        read_exactly(other.fileno(), start, b[:count])
        if not np.array_equal(a[:count], b[:count]):
            yield np.flatnonzero(a[:count] != b[:count]) + start


class _Counts:
    """How many elements of each tensor of a file differ, and how many bytes outside of them."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        placed = [(s.storage.offset, s) for s in specs if isinstance(s.storage, Extent) and s.size]
        placed.sort(key=lambda pair: pair[0])
        self.starts = [offset for offset, _ in placed]
        self.specs = [spec for _, spec in placed]
        self.ends = [offset + spec.nbytes for offset, spec in placed]
        self.reach = [*itertools.accumulate(self.ends, max)]  # of all up to here
        self.found: dict[int, list[int]] = {}  # tensor -> how many elements, the first, the last
        self.outside = 0
        self.first = -1

    def add(self, offsets: Offsets) -> None:
        """Count bytes, which come in order."""
        left = offsets
        while left.size:
            k = bisect.bisect_right(self.starts, left[0]) - 1
            end = self.starts[k + 1] if k + 1 < len(self.starts) else left[-1] + 1
            # What tensors share, as tied ones and views do, counts for the last that has it.
            while k >= 0 and self.ends[k] <= left[0] < self.reach[k]:
                k -= 1
            if k >= 0 and left[0] < self.ends[k]:
                part, left = _split(left, min(end, self.ends[k]))
                self._count(k, part)
            else:
                part, left = _split(left, end)
                self.first = int(part[0]) if self.outside == 0 else self.first
                self.outside += len(part)

    def _count(self, k: int, offsets: Offsets) -> None:
        width = self.specs[k].nbytes // self.specs[k].size or 1
        elements = np.unique((offsets - self.starts[k]) // width)
        count, first, last = self.found.get(k, (0, int(elements[0]), -1))
        again = int(elements[0]) == last  # an element that two pieces share
        self.found[k] = [count + len(elements) - again, first, int(elements[-1])]

    def tensors(self) -> Iterator[Unlike]:
        """Yield the tensors that differ, as they lie in the file."""
        for k, (count, first, _) in sorted(self.found.items()):
            yield Unlike(self.specs[k].name, count, first, self.specs[k].size)


def _split(offsets: Offsets, end: int) -> tuple[Offsets, Offsets]:
    """Part the offsets before an end from the others."""
    count = int(np.searchsorted(offsets, end))
    return offsets[:count], offsets[count:]
