"""Checksums that are computed while bytes are folded equal those of one reading, in any order."""

from __future__ import annotations

import zlib
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak_cli.engine.sums import Ledger, Sums, combine
from polyak_cli.errors import FormatError
from polyak_cli.storage import File, Version
from polyak_cli.tensors import Checksum

KINDS = {"crc32": zlib.crc32, "crc32c": google_crc32c.value}


@settings(derandomize=True, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.binary(max_size=300), st.binary(max_size=300))
def test_the_checksums_of_two_halves_give_that_of_the_whole(
    kind: str, first: bytes, second: bytes
) -> None:
    """Only the length of the second half is needed besides them."""
    compute = KINDS[kind]
    assert combine(kind, compute(first), compute(second), len(second)) == compute(first + second)


def write(folder: Path, kind: str, places: list[tuple[int, int]]) -> tuple[Ledger, bytes]:
    """Write a file, and return the ledger of checksums of some of its places, with its content."""
    content = np.random.default_rng(0).bytes(5000)
    path = folder / "file"
    path.write_bytes(content)
    checksums = [
        Checksum(str(path), offset, nbytes, KINDS[kind](content[offset : offset + nbytes]), kind,
                 f"{offset} is damaged")
        for offset, nbytes in places
    ]  # fmt: skip
    return Ledger(checksums, [File(str(path), Version.of(path.stat()))]), content


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    st.sampled_from(sorted(KINDS)),
    st.lists(st.tuples(st.integers(0, 4999), st.integers(0, 900)), max_size=12),
    st.lists(st.integers(1, 4), min_size=12, max_size=12),
)
def test_any_order_of_any_readings_will_do(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    readings: list[tuple[int, int]],
    batches: list[int],
) -> None:
    """Readings overlap, repeat, reach over the borders of what has a checksum, or are missing."""
    places = [(10, 1000), (1010, 1), (1500, 3000)]
    ledger, content = write(tmp_path_factory.mktemp("sums"), kind, places)
    workers = [Sums(ledger.regions), Sums(ledger.regions)]
    for k, (offset, nbytes) in enumerate(readings):
        piece = content[offset : offset + nbytes]
        workers[k % 2].add(0, offset, np.frombuffer(piece, np.uint8))
        if batches[k] == 1:
            ledger.add(workers[k % 2].take())
    for worker in workers:
        ledger.add(worker.take())
    ledger.verify(2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", [[], [(0, 5000)], [(3000, 900), (100, 2900), (4000, 700)]])
def test_one_wrong_byte_is_found(tmp_path: Path, kind: str, read: list[tuple[int, int]]) -> None:
    """Wherever it lies, whether a worker has read it or the coordinator."""
    for spoilt in (100, 3500, 3950, 4699):
        ledger, content = write(tmp_path, kind, [(100, 4600)])
        damaged = bytearray(content)
        damaged[spoilt] ^= 4
        path = Path(ledger.inputs[0].path)
        path.write_bytes(damaged)
        ledger.inputs = [File(str(path), Version.of(path.stat()))]
        worker = Sums(ledger.regions)
        for offset, nbytes in read:
            piece = damaged[offset : offset + nbytes]
            worker.add(0, offset, np.frombuffer(piece, np.uint8))
        ledger.add(worker.take())
        with pytest.raises(FormatError, match=r"file: 100 is damaged"):
            ledger.verify(1)


def test_what_was_read_is_not_read_again(tmp_path: Path) -> None:
    """Slabs in another order than that of the file become one run, and the file is not asked."""
    ledger, content = write(tmp_path, "crc32", [(0, 5000)])
    workers = [Sums(ledger.regions) for _ in range(3)]
    for k in range(0, 50, 2):
        piece = np.frombuffer(content[k * 100 : k * 100 + 200], np.uint8)
        workers[k // 2 % 3].add(0, k * 100, piece)
    for worker in workers[::-1]:
        ledger.add(worker.take())
    (run,) = ledger.runs[0].values()
    assert (run.start, run.stop, run.crc) == (0, 5000, zlib.crc32(content))
