"""Find the checkpoints that differ from a scanned one in their tensors' values only.

A table is made from a header alone, so a file whose bytes outside the tensors are the same has the
same table.  Comparing bytes is far quicker than libhdf5, and cannot be crashed.  Knows no format.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from polyak_cli.errors import FormatError
from polyak_cli.storage import Bytes, File, InputFile, open_input
from polyak_cli.storage.local import LocalInput
from polyak_cli.tensors import Extent, Table

#: Rows of [start, stop].
Spans = npt.NDArray[np.int64]

_STEP = 1 << 18  # bytes compared at a time
#: Bytes up to which tensors are read along and then ignored.  The disk and the page cache hand out
#: whole pages, so jumping over less saves no reading and costs a system call.
_ALONG = 4096
_OPEN = 32  # files that are open at a time


def compare_skeletons(table: Table, files: Sequence[File]) -> list[bool]:
    """Return for each file whether it equals the one of ``table`` in every byte outside tensors.

    Only headers are read, with one exception: tensors of at most a page (4,096 bytes) of a local
    file are read along with the bytes around them, because jumping over them would cost more than
    reading them.

    A file that cannot be read, or is still being written, does not count as equal: a scan will say
    what is wrong with it.
    """
    template = table.files[0]
    size = template.version.size
    candidates = [k for k, file in enumerate(files) if file.version.size == size]
    if len(table.files) > 1:
        return [False] * len(files)
    extents = _merge_extents(table)
    regions = _find_regions(extents, size, 0 if template.version.is_object else _ALONG)
    found: set[int] = set()
    for first in range(0, len(candidates), _OPEN):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError, FormatError):
            opened: dict[int, InputFile] = {}
            expected = stack.enter_context(_open_unlocked(template))
            for k in candidates[first : first + _OPEN]:
                with contextlib.suppress(OSError, FormatError):
                    opened[k] = stack.enter_context(_open_unlocked(files[k]))
            found |= _find_equal(expected, opened, extents, regions)
    return [k in found for k in range(len(files))]


def _find_equal(
    template: InputFile, opened: Mapping[int, InputFile], extents: Spans, regions: Spans
) -> set[int]:
    """Return which of the open files equal the template in all regions, outside the extents."""
    equal = dict(opened)
    buffers = [np.empty(_STEP, np.uint8) for _ in range(3)]
    for block in _group_blocks(regions):
        if not equal:
            break
        count = int((block[:, 1] - block[:, 0]).sum())
        expected, found, outside = (buffer[:count] for buffer in buffers)
        _read(template, block, expected)
        _mask_extents(extents, block, outside)
        for key, file in list(equal.items()):
            try:
                _read(file, block, found)
            except FormatError:
                del equal[key]
                continue
            np.bitwise_xor(expected, found, out=found)
            if np.bitwise_and(found, outside, out=found).any():
                del equal[key]
    return {*equal}


@contextlib.contextmanager
def _open_unlocked(file: File) -> Iterator[InputFile]:
    """Open the file that was scanned, unless somebody holds it locked for writing."""
    with open_input(*file) as opened:
        if isinstance(opened, LocalInput):
            # The lock by which libhdf5, too, finds out that a file is being written.
            fcntl.flock(opened.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield opened


def _merge_extents(table: Table) -> Spans:
    """Return [start, stop] of all bytes that hold values, sorted and without overlaps."""
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


def _find_regions(extents: Spans, size: int, along: int) -> Spans:
    """Return the parts of the file to compare, without the tensors of more than ``along`` bytes."""
    large = extents[extents[:, 1] - extents[:, 0] > along]
    starts, stops = np.append(0, large[:, 1]), np.append(large[:, 0], size)
    bounds = zip(starts.tolist(), stops.tolist(), strict=True)
    cut = np.array([low for start, stop in bounds for low in range(start, stop, _STEP)], np.int64)
    whole = stops[np.searchsorted(starts, cut, side="right") - 1]
    return np.column_stack([cut, np.minimum(cut + _STEP, whole)])


def _group_blocks(regions: Spans) -> Iterator[Spans]:
    """Yield consecutive regions that together fit into a buffer: many headers are a few bytes."""
    ends = np.cumsum(regions[:, 1] - regions[:, 0])
    first = 0
    while first < len(regions):
        done = int(ends[first - 1]) if first else 0
        last = int(np.searchsorted(ends, done + _STEP, side="right"))
        yield regions[first:last]
        first = last


def _read(file: InputFile, block: Spans, buffer: Bytes) -> None:
    """Read regions of a file side by side."""
    done = 0
    for start, stop in block.tolist():
        part = buffer[done : done + stop - start]
        if isinstance(file, LocalInput):
            file.read_into(start, part)
        else:  # as a header, which the scan of an object has read already
            content = file.read(start, len(part))
            part[: len(content)] = np.frombuffer(content, np.uint8)
        done += stop - start


def _mask_extents(extents: Spans, block: Spans, mask: Bytes) -> None:
    """Fill a mask for the bytes of regions: all ones, but zero where values lie."""
    mask[:] = 0xFF
    firsts = np.searchsorted(extents[:, 1], block[:, 0], side="right")
    lasts = np.searchsorted(extents[:, 0], block[:, 1])
    begins = np.cumsum(block[:, 1] - block[:, 0]) - (block[:, 1] - block[:, 0])
    for k in np.flatnonzero(firsts < lasts).tolist():
        start, stop = block[k].tolist()
        shift = int(begins[k]) - start
        for low, high in extents[firsts[k] : lasts[k]].tolist():
            mask[max(low, start) + shift : min(high, stop) + shift] = 0
