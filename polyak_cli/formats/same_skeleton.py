"""Checkpoints of one run mostly differ in their tensors' values only: one scan serves them all.

A table is made from a header alone, so a file whose bytes outside of another's tensors are the very
same has the same table.  Comparing bytes is far quicker than libhdf5, and cannot be crashed.  Knows
no format.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from polyak_cli.errors import FormatError
from polyak_cli.storage import (
    Bytes,
    File,
    Version,
)
from polyak_cli.storage.local import (
    read_exactly,
)
from polyak_cli.tensors import Extent, Table

#: Bytes compared at a time; shorter tensors are read along, and passed over then.
_STEP = 1 << 18
_OPEN = 32  # files that are open at a time


def twins(table: Table, files: Sequence[File]) -> list[bool]:
    """Tell which files equal the one of ``table`` in every byte outside of its tensors.

    Not those either that cannot be read or are still being written: a scan will say why.
    """
    template = table.files[0]
    size = template.version.size
    alike = [k for k, file in enumerate(files) if file.version.size == size]
    if len(table.files) > 1:
        return [False] * len(files)
    extents = _extents(table)
    found: set[int] = set()
    for first in range(0, len(alike), _OPEN):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError, FormatError):
            opened = {-1: stack.enter_context(_opened(*template))}
            for k in alike[first : first + _OPEN]:
                with contextlib.suppress(OSError, FormatError):
                    opened[k] = stack.enter_context(_opened(*files[k]))
            found |= _alike(opened.pop(-1), opened, extents, size)
    return [k in found for k in range(len(files))]


def _alike(
    template: int, opened: dict[int, int], extents: npt.NDArray[np.int64], size: int
) -> set[int]:
    """Return which of the open files equal the template outside of the extents."""
    ours, theirs, outside = (np.empty(_STEP, np.uint8) for _ in range(3))
    for start, stop in _regions(extents, size):
        if not opened:
            break
        a, b, mask = (buffer[: stop - start] for buffer in (ours, theirs, outside))
        read_exactly(template, start, a)
        _mask(extents, start, mask)
        for key, descriptor in list(opened.items()):
            try:
                read_exactly(descriptor, start, b)
            except (OSError, FormatError):
                del opened[key]
                continue
            np.bitwise_xor(a, b, out=b)
            if np.bitwise_and(b, mask, out=b).any():
                del opened[key]
    return {*opened}


@contextlib.contextmanager
def _opened(path: str, identity: Version) -> Iterator[int]:
    """Open the file that was meant, unless somebody holds it locked for writing."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if Version.of(os.fstat(descriptor)) != identity:
            raise FormatError("it was replaced")
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # as libhdf5 looks for a writer
        yield descriptor
    finally:
        os.close(descriptor)


def _extents(table: Table) -> npt.NDArray[np.int64]:
    """Return [start, stop] of everything that holds values, sorted and without overlaps."""
    spans = sorted(
        (spec.storage.offset, spec.storage.offset + spec.storage.nbytes)
        for specs in (table.tensors, table.others)
        for spec in specs.values()
        if isinstance(spec.storage, Extent) and spec.storage.nbytes
    )
    merged: list[list[int]] = []
    for start, stop in spans:
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], stop)
        else:
            merged.append([start, stop])
    return np.array(merged, np.int64).reshape(-1, 2)


def _regions(extents: npt.NDArray[np.int64], size: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of the file to compare, which leave the large tensors out."""
    start = 0
    for low, high in extents[extents[:, 1] - extents[:, 0] >= _STEP].tolist():
        yield from _steps(start, low)
        start = high
    yield from _steps(start, size)


def _steps(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for low in range(start, stop, _STEP):
        yield low, min(low + _STEP, stop)


def _mask(extents: npt.NDArray[np.int64], start: int, mask: Bytes) -> None:
    """Fill a mask for the bytes from ``start`` on: all ones, but zero where values lie."""
    mask[:] = 0xFF
    stop = start + len(mask)
    first = int(np.searchsorted(extents[:, 1], start, side="right"))
    last = int(np.searchsorted(extents[:, 0], stop))
    for low, high in (extents[first:last] - start).tolist():
        mask[max(low, 0) : high] = 0
