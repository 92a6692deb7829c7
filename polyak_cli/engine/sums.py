"""Checksums of bytes that a fold reads anyway, so that no file is read a second time for them.

Slabs come in any order and from several processes, and a checksum covers bytes in theirs.  So each
worker sums the runs of bytes that it reads, and sums of neighbours are combined, which needs their
lengths and not their bytes.  What nobody has read, such as tensors that are not averaged, is read
at the end.  Knows no format: files say what is to be summed, and what the sum should be.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, NamedTuple, Self

import numpy as np

from polyak_cli.errors import FormatError, shown
from polyak_cli.storage import Bytes, File, InputFile, Version, open_input
from polyak_cli.tensors import Checksum

#: Polynomials of the kinds of checksums, lowest power first.
_POLYNOMIALS = {"crc32": 0xEDB88320, "crc32c": 0x82F63B78}
_ONE, _X = 1 << 31, 1 << 30  # the powers 0 and 1 of x
#: Bytes that are read at a time where a fold has read none.
_STEP = 1 << 20
#: How many of these are fetched at a time.
_AHEAD = 8


class Region(NamedTuple):
    """Bytes of an input that are to be summed."""

    file: int  # which of the inputs
    offset: int
    nbytes: int
    kind: str  # a key of `_POLYNOMIALS`


class Run(NamedTuple):
    """Bytes of a region that were read, and their sum."""

    region: int  # its number
    start: int  # in the file
    stop: int
    crc: int
    is_read: bool = True


def extend(kind: str, crc: int, content: Bytes) -> int:
    """Return the checksum of bytes that follow those of a checksum; 0 is that of no bytes."""
    if kind == "crc32":
        return zlib.crc32(content.data, crc)
    import google_crc32c

    return int(google_crc32c.extend(crc, content.tobytes()))


# --- combining ------------------------------------------------------------------------------------


def combine(kind: str, first: int, second: int, nbytes: int) -> int:
    """Return the checksum of bytes from those of their beginning and of the ``nbytes`` after it.

    A CRC is the remainder of a polynomial over two elements: that of the first bytes is multiplied
    by x as often as the second ones have bits.  Initial and final inversions cancel each other.
    """
    return _multiply(kind, first, _raise(kind, 8 * nbytes)) ^ second


def _multiply(kind: str, a: int, b: int) -> int:
    """Return a product of polynomials, modulo that of a kind."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIALS[kind] if b & 1 else 0)
    return product


@functools.lru_cache(1 << 10)
def _raise(kind: str, power: int) -> int:
    """Return x to a power."""
    result, square = _ONE, _X
    while power:
        if power & 1:
            result = _multiply(kind, result, square)
        square, power = _multiply(kind, square, square), power >> 1
    return result


# --- in a worker ----------------------------------------------------------------------------------


class Sums:
    """What one worker reads of the regions of a job, summed."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self.regions = regions
        self.runs: list[Run] = []
        self.last: dict[int, int] = {}  # region -> the place of its last run
        self.by_file: dict[int, list[tuple[int, int]]] = {}  # end and number of each region
        for number, one in enumerate(regions):
            self.by_file.setdefault(one.file, []).append((one.offset + one.nbytes, number))
        for found in self.by_file.values():
            found.sort()

    def take(self) -> list[Run]:
        """Return the runs since the last call."""
        taken, self.runs, self.last = self.runs, [], {}
        return taken

    def add(self, file: int, offset: int, content: Bytes) -> None:
        """Sum what was read of an input from an offset on."""
        ends, stop = self.by_file.get(file, []), offset + len(content)
        for _, number in ends[bisect.bisect_right(ends, (offset, len(self.regions))) :]:
            region = self.regions[number]
            if region.offset >= stop:
                break
            low, high = max(offset, region.offset), min(stop, region.offset + region.nbytes)
            self._extend(number, low, content[low - offset : high - offset])

    def _extend(self, number: int, start: int, content: Bytes) -> None:
        kind, place = self.regions[number].kind, self.last.get(number)
        before = self.runs[place] if place is not None else Run(number, start, start, 0)
        if before.start <= start < before.stop:  # read again, such as rows that two slabs share
            content, start = content[before.stop - start :], before.stop
        if not len(content):
            return
        stop = start + len(content)
        if place is not None and before.stop == start:
            crc = extend(kind, before.crc, content)
            self.runs[place] = before._replace(stop=stop, crc=crc)
            return
        self.last[number] = len(self.runs)
        self.runs.append(Run(number, start, stop, extend(kind, 0, content)))

    def watch(self, file: InputFile, number: int) -> InputFile:
        """Return an input that sums what is read of it."""
        return _Watched(file, number, self) if number in self.by_file else file


class _Watched:
    """An input of which everything that is read is summed; see `storage.InputFile`."""

    def __init__(self, file: InputFile, number: int, sums: Sums) -> None:
        self.file = file
        self.number = number
        self.sums = sums

    @property
    def name(self) -> str:
        """See `storage.InputFile.name`."""
        return self.file.name

    @property
    def version(self) -> Version:
        """See `storage.InputFile.version`."""
        return self.file.version

    @property
    def size(self) -> int:
        """See `storage.InputFile.size`."""
        return self.file.size

    def read_into(self, offset: int, buffer: Bytes) -> None:
        """See `storage.InputFile.read_into`."""
        self.file.read_into(offset, buffer)
        self.sums.add(self.number, offset, buffer)

    def read(self, offset: int, nbytes: int) -> bytes:
        """See `storage.InputFile.read`."""
        content = self.file.read(offset, nbytes)
        self.sums.add(self.number, offset, np.frombuffer(content, np.uint8))
        return content

    def prefetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """See `storage.InputFile.prefetch`."""
        self.file.prefetch(ranges)

    def stream(self) -> BinaryIO:
        """See `storage.InputFile.stream`; nobody reads what is summed that way."""
        return self.file.stream()

    def close(self) -> None:
        """See `storage.InputFile.close`."""
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- in the coordinator ---------------------------------------------------------------------------


class Ledger:
    """The checksums of a job's inputs, and what workers have read of the bytes they cover."""

    def __init__(self, checksums: Sequence[Checksum], inputs: Sequence[File]) -> None:
        """Take what formats have not compared.

        Args:
            checksums: of inputs; each of bytes that no other one covers.
            inputs: of the job.
        """
        numbers = {file.path: number for number, file in enumerate(inputs)}
        self.inputs = inputs
        self.checksums = checksums
        self.regions = [
            Region(numbers[one.path], one.offset, one.nbytes, one.kind) for one in checksums
        ]
        # Start of each run -> the run, and its end -> its start.
        self.runs: list[dict[int, Run]] = [{} for _ in checksums]
        self.ends: list[dict[int, int]] = [{} for _ in checksums]

    def add(self, runs: Iterable[Run]) -> None:
        """Take what a worker has read; of neighbours only one run is kept."""
        for run in runs:
            starts, ends = self.runs[run.region], self.ends[run.region]
            if run.start in starts:  # a share that was folded twice
                continue
            joined = self._join(starts.pop(ends.pop(run.start)), run) if run.start in ends else run
            if joined.stop in starts:
                after = starts.pop(joined.stop)
                joined = self._join(joined, after)
            starts[joined.start], ends[joined.stop] = joined, joined.start

    def _join(self, one: Run, other: Run) -> Run:
        kind = self.regions[one.region].kind
        crc = combine(kind, one.crc, other.crc, other.stop - other.start)
        return one._replace(stop=other.stop, crc=crc)

    def verify(self, jobs: int) -> None:
        """Read what no worker has read, and compare all checksums.

        Args:
            jobs: files that are read at a time.

        Raises:
            FormatError: one is wrong; names its file.
        """
        by_file: dict[int, list[int]] = {}
        for number, region in enumerate(self.regions):
            by_file.setdefault(region.file, []).append(number)
        with ThreadPoolExecutor(max(1, min(jobs, len(by_file)))) as pool:
            for _ in pool.map(self._verify_file, by_file.items()):
                pass

    def _verify_file(self, item: tuple[int, Sequence[int]]) -> None:
        """Compare the checksums of one file."""
        path, version = self.inputs[item[0]]
        with open_input(path, version) as file:
            for number in item[1]:
                try:
                    found = self._sum(number, file)
                except FormatError as error:
                    raise type(error)(f"{shown(path)}: {error}") from None
                if found != self.checksums[number].crc:
                    raise FormatError(f"{shown(path)}: {self.checksums[number].damaged}")

    def _sum(self, number: int, file: InputFile) -> int:
        """Return the sum of a region: of what was read, and of the rest, which is read now."""
        kind, crc = self.regions[number].kind, 0
        runs = self._list_runs(number)
        contents = _read_ahead(file, [(run.start, run.stop) for run in runs if not run.is_read])
        for run in runs:
            nbytes = run.stop - run.start
            if run.is_read:
                crc = combine(kind, crc, run.crc, nbytes)
            else:
                for piece in itertools.islice(contents, -(-nbytes // _STEP)):
                    crc = extend(kind, crc, piece)
        return crc

    def _list_runs(self, number: int) -> list[Run]:
        """Return the runs of a region in order, with those between them that are to be read."""
        region, found = self.regions[number], []
        place, end = region.offset, region.offset + region.nbytes
        for run in [*sorted(self.runs[number].values()), Run(number, end, end, 0)]:
            if place < run.start:
                found.append(Run(number, place, run.start, 0, is_read=False))
                place = run.start
            if place == run.start < run.stop:
                found.append(run)
                place = run.stop
        return found


def _read_ahead(file: InputFile, ranges: Sequence[tuple[int, int]]) -> Iterator[Bytes]:
    """Yield what lies in ranges, in pieces of at most `_STEP` bytes, while the next are fetched."""
    pieces = [
        (place, min(_STEP, stop - place))
        for start, stop in ranges
        for place in range(start, stop, _STEP)
    ]
    buffer = np.empty(_STEP, np.uint8)
    file.prefetch(pieces[:_AHEAD])
    for k, (place, nbytes) in enumerate(pieces):
        if k % _AHEAD == 0:
            file.prefetch(pieces[k + _AHEAD : k + 2 * _AHEAD])
        file.read_into(place, buffer[:nbytes])
        yield buffer[:nbytes]
