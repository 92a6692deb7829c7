"""TensorFlow's checkpoints without TensorFlow: built by hand, and broken on purpose."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from polyak_cli import average, plan
from polyak_cli.errors import CheckpointError, FormatError, OutputError, PolyakError
from polyak_cli.formats import checksums
from polyak_cli.formats.format import ScanRequest
from polyak_cli.formats.tensorflow import sstables
from polyak_cli.formats.tensorflow.bundle import TensorFlowBundle
from polyak_cli.processes.sandbox import Heartbeat
from polyak_cli.storage import open_input, publishing
from tests.oracle import Array

MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)


def checksum(data: bytes) -> int:
    """Return the masked CRC32C, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(value: int) -> bytes:
    """Return a number of seven bits a byte."""
    head = bytes((value & 0x7F | 0x80,))
    return bytes((value,)) if value < 0x80 else head + varint(value >> 7)


def fields(*pairs: tuple[int, int | bytes]) -> bytes:
    """Return a protocol buffer."""
    return b"".join(
        varint(number << 3 | 2) + varint(len(value)) + value
        if isinstance(value, bytes)
        else varint(number << 3) + varint(value)
        for number, value in pairs
    )


def block(pairs: Sequence[tuple[bytes, bytes]], kind: int = 0) -> bytes:
    """Return a block of a table, every key whole, with its trailer."""
    content = b"".join(
        varint(0) + varint(len(key)) + varint(len(value)) + key + value for key, value in pairs
    )
    content += struct.pack("<LLB", 0, 1, kind)
    return content + struct.pack("<L", checksum(content))


@dataclass
class Bundle:
    """A checkpoint to write; a test may falsify every part of it."""

    tensors: Mapping[str, Array]
    header: bytes = fields((1, 1), (3, fields((1, 1))))
    entry: Mapping[int, int | bytes] = field(default_factory=dict)  # in place of the right ones
    kind: int = 0  # of the block of entries
    crc: int | None = None  # of every tensor
    handle: tuple[int, int] | None = None  # of the block of entries

    def write(self, path: Path) -> None:
        """Write the index and its one shard."""
        shard = path.with_name(f"{path.stem}.data-00000-of-00001")
        pairs = [(b"", self.header)]
        data = b""
        for name in sorted(self.tensors):
            values = self.tensors[name]
            raw = values.tobytes()
            shape = fields(*((2, fields((1, n))) for n in values.shape))
            entry: dict[int, int | bytes] = {1: 1, 2: shape, 4: len(data), 5: len(raw)}
            entry |= self.entry
            crc = checksum(raw) if self.crc is None else self.crc
            pairs.append((name.encode(), fields(*entry.items()) + b"\x35" + struct.pack("<L", crc)))
            data += raw
        shard.write_bytes(data)
        path.write_bytes(self.table(pairs))

    def table(self, pairs: Sequence[tuple[bytes, bytes]]) -> bytes:
        """Return a table of one block."""
        entries, meta = block(pairs, self.kind), block([])
        offset, nbytes = self.handle or (0, len(entries) - 5)
        index = block([(pairs[-1][0], varint(offset) + varint(nbytes))])
        handles = b"".join(
            varint(n) for n in (len(entries), len(meta) - 5, len(entries + meta), len(index) - 5)
        )
        return entries + meta + index + handles.ljust(40, b"\0") + MAGIC


def tensors(seed: int) -> dict[str, Array]:
    """Return the tensors of one checkpoint."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(3, size=(3, n)).astype("<f4") for name, n in (("a", 2), ("b", 200))}


def write_run(folder: Path) -> list[dict[str, Array]]:
    """Write two checkpoints."""
    folder.mkdir()
    models = [tensors(k) for k in range(2)]
    for k, model in enumerate(models):
        Bundle(model).write(folder / f"ckpt-{k}.index")
    return models


def test_only_values_and_their_checksums_change(tmp_path: Path) -> None:
    """The shard is the mean, laid out as before; each checksum is that of its bytes."""
    one, other = write_run(tmp_path / "run")
    report = average(tmp_path / "run", tmp_path / "o.index")
    shard = (tmp_path / "o.data-00000-of-00001").read_bytes()
    mean = {n: ((one[n].astype("f8") + other[n]) / 2).astype("<f4").tobytes() for n in one}
    assert shard == mean["a"] + mean["b"]
    index = (tmp_path / "o.index").read_bytes()
    for raw in mean.values():
        assert b"\x35" + struct.pack("<L", checksum(raw)) in index
    assert report.bytes_written == len(index) + len(shard)


def test_a_checkpoint_goes_by_what_its_files_begin_with(tmp_path: Path) -> None:
    """`ckpt-1` is `ckpt-1.index`, as in TensorFlow; shards and lists are no checkpoints."""
    write_run(tmp_path / "run")
    (tmp_path / "run/checkpoint").write_text('model_checkpoint_path: "ckpt-1"')
    (tmp_path / "run/ckpt-2.data-00000-of-00001").write_bytes(b"")
    named = plan([tmp_path / "run/ckpt-0", tmp_path / "run/ckpt-1"]).checkpoints
    listed = plan(tmp_path / "run")
    assert named == listed.checkpoints
    assert [passed.reason for passed in listed.passed_over] == [
        "TensorFlow's list of checkpoints",
        "a data shard of a TensorFlow checkpoint whose .index is not here",
    ]
    with pytest.raises(CheckpointError, match="ckpt-7: no such file"):
        plan([tmp_path / "run/ckpt-7"])


BROKEN = {
    "snappy": (Bundle(tensors(0), kind=1), "is compressed .snappy."),
    "checksum": (Bundle(tensors(0), crc=1), "tensor 'a' has a wrong checksum"),
    "block outside": (Bundle(tensors(0), handle=(1 << 40, 9)), "lies outside"),
    "block too long": (Bundle(tensors(0), handle=(0, 1 << 63)), "lies outside"),
    "offset outside": (Bundle(tensors(0), entry={4: 1 << 40}), "tensor 'a' lies outside the file"),
    "overlap": (Bundle(tensors(0), entry={4: 0}), "'a' and 'b' overlap"),
    "shape bomb": (
        Bundle(tensors(0), entry={2: fields((2, fields((1, 1 << 62))))}),
        "has 24 bytes",
    ),
    "shape of thousands of digits": (
        Bundle(tensors(0), entry={2: fields((2, fields((1, 1 << 62)))) * 254}),
        "expected fewer than 2.63 elements",
    ),
    "rank bomb": (Bundle(tensors(0), entry={2: fields((2, b"")) * 255}), "has 255 dimensions"),
    "negative size": (Bundle(tensors(0), entry={5: (1 << 64) - 1}), "tensor 'a': .*of 0 or more"),
    "shard number": (Bundle(tensors(0), entry={3: 5}), "tensor 'a' lies in shard 5 of 1"),
    "huge number": (Bundle(tensors(0), entry={5: 1 << 69}), "tensor 'a': .*more than 64 bits"),
    "type": (Bundle(tensors(0), entry={1: 99}), "tensor 'a': has TensorFlow's type 99"),
    "many shards": (Bundle(tensors(0), header=fields((1, 1 << 40))), "is missing"),
    "version": (Bundle(tensors(0), header=fields((1, 1), (3, fields((2, 9))))), "of version 9"),
    "no header": (Bundle(tensors(0), header=b"\x0b"), "wire type 3"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_means_harm_is_refused(tmp_path: Path, case: str) -> None:
    """One line that names the file, and no output."""
    bundle, message = BROKEN[case]
    write_run(tmp_path / "run")
    bundle.write(tmp_path / "run/ckpt-0.index")
    with pytest.raises(FormatError, match=rf"ckpt-0\.\S+ .*{message}"):
        average(tmp_path / "run", tmp_path / "o.index")
    assert os.listdir(tmp_path) == ["run"]


def test_keys_that_grow_in_memory_are_refused(tmp_path: Path) -> None:
    """Entries of a few bytes may share a key of a megabyte, thousands of times."""
    write_run(tmp_path / "run")
    long = b"k" * (1 << 20)
    content = varint(0) + varint(len(long)) + b"\0" + long
    content += (varint(len(long)) + b"\1\0\1") * 5000
    content += struct.pack("<LLB", 0, 1, 0)
    bomb = content + struct.pack("<L", checksums.mask(checksums.crc32c(content)))
    index = block([(b"k", varint(0) + varint(len(bomb) - 5))])
    handles = b"\0\0" + varint(len(bomb)) + varint(len(index) - 5)
    (tmp_path / "run/ckpt-0.index").write_bytes(bomb + index + handles.ljust(40, b"\0") + MAGIC)
    with pytest.raises(FormatError, match=r"ckpt-0.index: its keys and values have more than"):
        average(tmp_path / "run", tmp_path / "o.index")


@pytest.mark.slow
def test_truncation_anywhere_is_refused(tmp_path: Path) -> None:
    """Of the index or of the shard, and a shard that is not there."""
    write_run(tmp_path / "run")
    index, shard = (tmp_path / f"run/ckpt-0.{end}" for end in ("index", "data-00000-of-00001"))
    for path in (index, shard):
        whole = path.read_bytes()
        for length in {0, len(whole) - 1, *range(1, len(whole), len(whole) // 12)}:
            path.write_bytes(whole[:length])
            with pytest.raises(PolyakError, match="ckpt-0"):
                average(tmp_path / "run", tmp_path / "o.index")
        path.write_bytes(whole)
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"ckpt-0.index: has no footer: it is truncated"):
        average(tmp_path / "run", tmp_path / "o.index")
    Bundle(tensors(0)).write(index)
    shard.unlink()
    with pytest.raises(FormatError, match=r"ckpt-0.data-00000-of-00001: is missing"):
        average(tmp_path / "run", tmp_path / "o.index")
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.slow
def test_random_damage_never_gives_a_traceback(tmp_path: Path) -> None:
    """Whatever bytes an index has, it is read or refused."""
    Bundle(tensors(0)).write(tmp_path / "m-1.index")
    whole = (tmp_path / "m-1.index").read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(1000):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole) - 8, rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        mend(damaged)
        (tmp_path / "m-1.index").write_bytes(damaged)
        try:
            TensorFlowBundle().scan(
                ScanRequest(str(tmp_path / "m-1.index"), True), Heartbeat(lambda: None)
            )
        except FormatError:
            refused += 1
    assert 100 < refused < 1000


def mend(table: bytearray) -> None:
    """Make the checksum of the block of entries right, so that what is in it is read."""
    place = table.find(struct.pack("<LL", 0, 1)) + 9
    struct.pack_into("<L", table, place, checksum(bytes(table[:place])))


# --- publishing several files ---------------------------------------------------------------------


def test_a_shard_in_the_way_is_an_error_before_any_work(tmp_path: Path) -> None:
    """A data shard of the output's name alone needs --force too, and stays as it was."""
    write_run(tmp_path / "run")
    shard = tmp_path / "o.data-00000-of-00001"
    shard.write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"o.data-00000-of-00001: already exists; use --force"):
        plan(tmp_path / "run", tmp_path / "o.index")
    assert shard.read_bytes() == b"mine"
    average(tmp_path / "run", tmp_path / "o.index", force=True)
    assert shard.stat().st_size == 24 * 101
    assert sorted(os.listdir(tmp_path)) == ["o.data-00000-of-00001", "o.index", "run"]


@pytest.mark.parametrize("taken", ["o.index", "o.data-00000-of-00001"])
def test_all_files_get_their_names_or_none(tmp_path: Path, taken: str) -> None:
    """A name that was taken meanwhile leaves nothing behind."""
    with (
        pytest.raises(OutputError, match="already exists"),
        publishing.publish(tmp_path / "o.index", force=False) as hidden,
    ):
        hidden.with_name(f"{hidden.name}.data-00000-of-00001").write_bytes(b"ours")
        (tmp_path / taken).write_bytes(b"theirs")
    assert os.listdir(tmp_path) == [taken]
    assert (tmp_path / taken).read_bytes() == b"theirs"


def test_an_interrupt_leaves_no_shard(tmp_path: Path) -> None:
    """Hidden files of every name are gone, whatever ended the work."""
    with (
        pytest.raises(KeyboardInterrupt),
        publishing.publish(tmp_path / "o.index", force=True) as hidden,
    ):
        hidden.with_name(f"{hidden.name}.data-00000-of-00001").write_bytes(b"ours")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


# --- checksums and tables -------------------------------------------------------------------------


@pytest.mark.slow
def test_checksums_are_castagnoli(tmp_path: Path) -> None:
    """The known one, and those of runs of every kind of length and place in a file."""
    assert checksums.crc32c(b"123456789") == 0xE3069283
    data = np.random.default_rng(0).integers(0, 256, 530_000, np.uint8).tobytes()
    (tmp_path / "data").write_bytes(data)
    with open_input(tmp_path / "data") as file:
        for length in (0, 1, 3, 1023, 1024, 1025, 1031, 45_487, 524_288, 524_289, 524_292):
            found = checksums.crc32c_of(file, 7, length)
            assert checksums.mask(found) == checksum(data[7 : 7 + length]), length
            assert found == checksums.crc32c(data[7 : 7 + length])


def test_large_tables_are_read_as_they_were_written() -> None:
    """Many blocks and shared beginnings of keys; metadata apart from them."""
    entries = [(b"layer/%06d/kernel" % k, b"v" * (k % 90)) for k in range(20_000)]
    table = sstables.build_table(entries, {b"record": b"{}"})
    assert sstables.read(table) == (entries, {b"record": b"{}"})
    assert table.count(b"layer/") < 1400
