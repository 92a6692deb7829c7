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
from polyak_cli.tensors import Extent, File, Identity, Table, read_exactly

#: Bytes compared at a time; shorter tensors are read along and their differences looked up.
_STEP = 1 << 18


def twins(table: Table, files: Sequence[File]) -> list[bool]:
    """Tell which files equal the one of ``table`` in every byte outside of its tensors.

    Not those either that cannot be read or are still being written: a scan will say why.
    """
    extents = _extents(table)
    return [_is_twin(table, file, extents) for file in files]


def _is_twin(table: Table, file: File, extents: npt.NDArray[np.int64]) -> bool:
    template, size = table.files[0], file.identity.size
    if len(table.files) > 1 or size != template.identity.size:
        return False
    try:
        with _opened(*file) as one, _opened(*template) as other:
            return all(
                _same(one, other, start, stop, extents) for start, stop in _regions(extents, size)
            )
    except (OSError, FormatError):
        return False


@contextlib.contextmanager
def _opened(path: str, identity: Identity) -> Iterator[int]:
    """Open the file that was meant, unless somebody holds it locked for writing."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if Identity.of(os.fstat(descriptor)) != identity:
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


def _same(one: int, other: int, start: int, stop: int, extents: npt.NDArray[np.int64]) -> bool:
    """Tell whether two files differ between two offsets inside of tensors only."""
    ours, theirs = (np.empty(stop - start, np.uint8) for _ in range(2))
    read_exactly(one, start, ours)
    read_exactly(other, start, theirs)
    places = np.flatnonzero(ours != theirs) + start
    if not len(places):
        return True
    before = np.searchsorted(extents[:, 0], places, side="right") - 1
    return bool((before >= 0).all() and (places < extents[before, 1]).all())
