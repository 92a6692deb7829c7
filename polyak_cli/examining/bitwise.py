"""Compare the files of two outputs bit for bit, and name the tensors in which they differ.

Compares bytes by offset, in flat memory.  Knows no format, and not how either output was made.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from polyak_cli.errors import shown
from polyak_cli.storage import InputFile, open_input
from polyak_cli.storage.local import name_errors
from polyak_cli.tensors import Extent, Grid, Table, TensorSpec

#: Bytes compared at a time.
_STEP = 1 << 20

Offsets = npt.NDArray[np.int64]


class TensorDeviation(NamedTuple):
    """A tensor that differs."""

    name: str
    elements: int  # how many elements differ; 0 if they were not counted
    first: int  # the first of them, in the order in which they are stored
    size: int  # how many elements the tensor has

    def __str__(self) -> str:
        """Return a sentence without its full stop."""
        if not self.elements:
            return f"tensor '{shown(self.name)}' differs"
        return (
            f"tensor '{shown(self.name)}' differs in {self.elements} of {self.size} elements, "
            f"first in element {self.first}"
        )


class Deviation(NamedTuple):
    """How an output deviates from what it should be; false if it does not."""

    tensors: tuple[TensorDeviation, ...] = ()
    outside: tuple[str, ...] = ()  # differences outside the tensors, a sentence each

    def __bool__(self) -> bool:
        """Return whether there is any deviation."""
        return bool(self.tensors or self.outside)


def compare(found: Sequence[Path], expected: Table) -> Deviation:
    """Compare the files of an output with those of another that is laid out in the same way.

    Args:
        found: the output's files, in the order of the table's.
        expected: the table of the output that is known to be right.

    Raises:
        FormatError: a file cannot be read, or becomes shorter while it is read.
    """
    specs = [*expected.tensors.values(), *expected.others.values()]
    tensors: list[TensorDeviation] = []
    outside: list[str] = []
    for number, (path, (other, _)) in enumerate(zip(found, expected.files, strict=True)):
        counts = _Counts(specs, number)
        with open_input(path) as a, open_input(other) as b:
            sizes = (a.size, b.size)
            for offsets in _find_unequal(a, b, min(sizes)):
                counts.add(offsets)
        tensors += [one for one in counts.list_tensors() if one not in tensors]
        if sizes[0] != sizes[1]:
            outside.append(f"has {sizes[0]} bytes; expected {sizes[1]}")
        if counts.outside:
            outside.append(
                f"{counts.outside} bytes outside the tensors differ, the first at byte "
                f"{counts.first} of {shown(path.name)}"
            )
    return Deviation(tuple(tensors), tuple(outside))


def _find_unequal(one: InputFile, other: InputFile, size: int) -> Iterator[Offsets]:
    """Yield the offsets of the bytes that differ, in order, one array for each piece."""
    a, b = np.empty(_STEP, np.uint8), np.empty(_STEP, np.uint8)
    for start in range(0, size, _STEP):
        count = min(_STEP, size - start)
        for file, buffer in ((one, a), (other, b)):
            with name_errors(file.name):
                file.read_into(start, buffer[:count])
        if not np.array_equal(a[:count], b[:count]):
            yield np.flatnonzero(a[:count] != b[:count]) + start


class _Counts:
    """Counts the elements that differ in each tensor of a file, and the bytes outside tensors."""

    def __init__(self, specs: Sequence[TensorSpec], number: int) -> None:
        placed = [
            (extent.offset, extent.nbytes, spec)
            for spec in specs
            for extent in _list_extents(spec)
            if extent.file == number and extent.nbytes
        ]
        placed.sort(key=lambda row: row[0])
        self.starts = [offset for offset, *_ in placed]
        self.specs = [spec for *_, spec in placed]
        self.ends = [offset + nbytes for offset, nbytes, *_ in placed]
        # The largest end so far: tensors may overlap, and a long one may hold several others.
        self.reach = [*itertools.accumulate(self.ends, max)]
        self.found: dict[int, list[int]] = {}  # tensor -> how many elements, the first, the last
        self.outside = 0
        self.first = -1

    def add(self, offsets: Offsets) -> None:
        """Count bytes that differ; calls come in order of the offsets."""
        left = offsets
        while left.size:
            k = bisect.bisect_right(self.starts, left[0]) - 1
            end = self.starts[k + 1] if k + 1 < len(self.starts) else left[-1] + 1
            # Bytes that tensors share (tied weights, views) count for the last that has them.
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
        again = int(elements[0]) == last  # one element may lie in two pieces
        self.found[k] = [count + len(elements) - again, first, int(elements[-1])]

    def list_tensors(self) -> Iterator[TensorDeviation]:
        """Yield the tensors that differ, in the order of the file."""
        for k, (count, first, _) in sorted(self.found.items()):
            name, size = self.specs[k].name, self.specs[k].size
            # A file has only some blocks of a tensor in several, so that a count would mislead.
            whole = isinstance(self.specs[k].storage, Extent)
            yield (
                TensorDeviation(name, count, first, size)
                if whole
                else TensorDeviation(name, 0, 0, size)
            )


def _list_extents(spec: TensorSpec) -> Sequence[Extent]:
    """Return where a tensor lies in the files; nothing if only a reader knows that."""
    if isinstance(spec.storage, Grid):
        return [part.extent for part in spec.storage.parts]
    return [spec.storage] if isinstance(spec.storage, Extent) else ()


def _split(offsets: Offsets, end: int) -> tuple[Offsets, Offsets]:
    """Split offsets into those before an end and the others."""
    count = int(np.searchsorted(offsets, end))
    return offsets[:count], offsets[count:]
