"""Orbax checkpoints that mean harm: one line, in little memory and in little time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from polyak_cli import average, inspect, plan
from polyak_cli.errors import FormatError, OutputError
from polyak_cli.formats.orbax import ocdbt
from polyak_cli.formats.tensorflow.sstables import encode_varint
from polyak_cli.formats.zips import WHOLE
from tests.command import POLYAK
from tests.orbax.test_orbax import BEAT, save, wrap
from tests.peaks import run_measured
from tests.test_memory import LIMIT, measure_peak

MANIFEST, NODE = b"\x0c\xdb\x3a\x2a", b"\x0c\xdb\x20\xde"
MEGABYTE = 10**6


def numbers(*values: int) -> bytes:
    """Return numbers of seven bits a byte."""
    return b"".join(map(encode_varint, values))


def files(*names: bytes) -> bytes:
    """Return a table of data files, none of which shares a prefix with another."""
    lengths = numbers(*([0] * (len(names) - 1)), *map(len, names), *([0] * len(names)))
    return numbers(len(names)) + lengths + b"".join(names)


def manifest(name: bytes, offset: int, length: int, height: int = 0) -> bytes:
    """Return a manifest of one version."""
    settings = bytes(16) + numbers(0, 100, 1000) + b"\x04" + numbers(0)
    version = numbers(1, 1) + bytes((height,)) + numbers(0, offset, length, 1, 1, 1) + bytes(8)
    return wrap(MANIFEST, settings + files(name) + version + numbers(0))


def leaf(pairs: dict[bytes, bytes]) -> bytes:
    """Return a node whose values are in it."""
    count = len(pairs)
    sizes = numbers(*([0] * (count - 1)), *map(len, pairs)) + b"".join(pairs)
    values = numbers(*map(len, pairs.values()), *([0] * count)) + b"".join(pairs.values())
    return wrap(NODE, b"\0" + files(b"d/x") + numbers(count) + sizes + values)


def inner(height: int, children: list[tuple[bytes, int, int]]) -> bytes:
    """Return a node with the keys, offsets and lengths of others in the same file."""
    keys = [key for key, _, _ in children]
    count = len(keys)
    head = numbers(*([0] * (count - 1)), *map(len, keys), *([0] * count)) + b"".join(keys)
    places = numbers(*([0] * count), *(o for _, o, _ in children), *(n for _, _, n in children))
    sums = numbers(*([1] * (3 * count)))
    return wrap(NODE, bytes((height,)) + files(b"d/x") + numbers(count) + head + places + sums)


def write(folder: Path, blocks: bytes, head: bytes) -> Path:
    """Write a database of one data file."""
    (folder / "d").mkdir(parents=True)
    (folder / "d/x").write_bytes(blocks)
    (folder / ocdbt.MANIFEST).write_bytes(head)
    return folder


def test_a_sound_database_made_here_is_read(tmp_path: Path) -> None:
    """So what the other tests change is what is refused."""
    one, two = leaf({b"a": b"1"}), leaf({b"b": b"22"})
    root = inner(1, [(b"a", 0, len(one)), (b"b", len(one), len(two))])
    head = manifest(b"d/x", len(one + two), len(root), 1)
    found, _ = ocdbt.read(write(tmp_path / "m", one + two + root, head), BEAT)
    assert {key: value.content for key, value in found.items()} == {"a": b"1", "b": b"22"}


@pytest.mark.parametrize(
    "name", [b"/etc/passwd", b"../../x", b"d/../../x", b"d//x", b"d/x\0", b"", b"~/x"]
)
def test_data_files_elsewhere_are_refused(tmp_path: Path, name: bytes) -> None:
    """A name leads to a file beside the manifest, or nowhere."""
    folder = write(tmp_path / "m", leaf({b"a": b"1"}), manifest(name, 0, 30))
    with pytest.raises(FormatError, match=r"m/manifest\.ocdbt: names (no|the) data file"):
        ocdbt.read(folder, BEAT)


def test_a_manifest_that_is_its_own_root_is_refused(tmp_path: Path) -> None:
    """A block of another kind is no node."""
    head = manifest(b"manifest.ocdbt", 0, 100)
    head = manifest(b"manifest.ocdbt", 0, len(head))
    with pytest.raises(FormatError, match="no block of"):
        ocdbt.read(write(tmp_path / "m", b"", head), BEAT)


def test_a_node_that_is_its_own_child_is_refused(tmp_path: Path) -> None:
    """Each level is one lower than the one above it, so every way down has an end."""
    length = len(inner(9, [(b"a", 0, 100), (b"b", 0, 100)]))
    root = inner(9, [(b"a", 0, length), (b"b", 0, length)])
    folder = write(tmp_path / "m", root, manifest(b"d/x", 0, length, 9))
    with pytest.raises(FormatError, match="a node has height 9; expected 8"):
        ocdbt.read(folder, BEAT)


def test_a_tree_of_millions_of_empty_nodes_ends(tmp_path: Path) -> None:
    """Each node has the same child twice: a few kilobytes that would be read a million times."""
    blocks = [leaf({})]
    for height in range(1, 41):
        place = sum(map(len, blocks[:-1])), len(blocks[-1])
        blocks.append(inner(height, [(b"a", *place), (b"b", *place)]))
    place = sum(map(len, blocks[:-1])), len(blocks[-1])
    folder = write(tmp_path / "m", b"".join(blocks), manifest(b"d/x", *place, 40))
    with pytest.raises(FormatError, match="its tree of keys has more than"):
        ocdbt.read(folder, BEAT)


def test_a_node_is_read_whole_or_not(tmp_path: Path) -> None:
    """A data file that ends anywhere inside of a node."""
    block = leaf({b"a": b"1", b"b": b"2" * 50})
    folder = write(tmp_path / "m", block, manifest(b"d/x", 0, len(block)))
    for length in range(len(block)):
        (folder / "d/x").write_bytes(block[:length])
        with pytest.raises(FormatError, match=r"m/d/x: has \d+ bytes, and a block of"):
            ocdbt.read(folder, BEAT)


def hit(folder: Path, changes: dict[str, Any], *, sparse: bool = False) -> Path:
    """Save a checkpoint of one compressed array, and change what is said of it."""
    save(folder, {"w": np.ones(500, "f4")}, use_ocdbt=False)
    path = folder / "w/.zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    if sparse:
        (folder / "w/0").unlink()
        tree = folder / "_METADATA"
        said = json.loads(tree.read_text()) | {"store_array_data_equal_to_fill_value": False}
        tree.write_text(json.dumps(said))
    return folder


HUGE = {"shape": [1 << 38], "chunks": [1 << 38]}


def test_a_chunk_that_cannot_hold_its_array_is_refused(tmp_path: Path) -> None:
    """Zstd makes at most 128 KiB of four bytes: a terabyte in a few is a lie that headers show."""
    hit(tmp_path / "m_1", HUGE)
    with pytest.raises(FormatError, match=r"m_1: tensor 'w' has 1099511627776 bytes in a chunk of"):
        plan([tmp_path / "m_1"])


def test_a_terabyte_of_nothing_does_not_fill_the_disk(tmp_path: Path) -> None:
    """An array none of whose chunks is stored is its fill value, and its average needs the room."""
    hit(tmp_path / "m_1", HUGE, sparse=True)
    assert plan([tmp_path / "m_1"]).bytes_to_write > 10**12
    with pytest.raises(OutputError, match=r"o: needs 1\.1 TB, but its disk has"):
        average([tmp_path / "m_1"], tmp_path / "o")


def test_chunks_in_the_same_bytes_are_refused(tmp_path: Path) -> None:
    """One chunk that many arrays name would be written for each of them."""
    said = json.dumps(
        {
            "chunks": [500],
            "compressor": None,
            "dtype": "<f4",
            "fill_value": None,
            "filters": None,
            "order": "C",
            "shape": [500],
            "zarr_format": 2,
        }
    ).encode()
    keys = [b"a/.zarray", b"a/0", b"b/.zarray", b"b/0"]
    sizes = numbers(0, 0, 0, *map(len, keys)) + b"".join(keys)
    values = numbers(len(said), 2000, len(said), 2000, 0, 1, 0, 1, 0, 0, 0, 0) + said + said
    block = wrap(NODE, b"\0" + files(b"d/x") + numbers(4) + sizes + values)
    folder = write(tmp_path / "m_1", bytes(2000) + block, manifest(b"d/x", 2000, len(block)))
    entry = {"value_metadata": {"value_type": "jax.Array"}}
    tree = {name: {"key_metadata": [{"key": name}], **entry} for name in "ab"}
    (folder / "_METADATA").write_text(json.dumps({"tree_metadata": tree, "use_ocdbt": True}))
    with pytest.raises(FormatError, match="two chunks lie at offset 0 of"):
        [*inspect([folder])]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["huge", "sparse", "chunks", "bomb", "node"])
def test_nothing_is_allocated_before_it_is_checked(tmp_path: Path, kind: str) -> None:
    """Each lie is found in the memory that a small average takes."""
    folder = tmp_path / "run/m_1"
    if kind == "huge":
        hit(folder, HUGE)
    elif kind == "sparse":
        hit(folder, HUGE, sparse=True)
    elif kind == "chunks":
        hit(folder, {"shape": [1 << 22], "chunks": [1]}, sparse=True)
    else:
        bomb = zstandard.ZstdCompressor().compress(bytes(1 << 30))
        hit(folder, {})
        if kind == "bomb":
            (folder / "w/0").write_bytes(bomb)
        else:
            whole = wrap(NODE, bomb, compression=1)
            (folder / "d").mkdir()
            (folder / "d/x").write_bytes(whole)
            (folder / ocdbt.MANIFEST).write_bytes(manifest(b"d/x", 0, len(whole)))
    done = run_measured(*POLYAK, "average", folder, "-o", tmp_path / "o")
    assert done.code == 3
    assert done.stderr.count("\n") == 1, done.stderr
    # A node is a list of keys, and is held up to a limit of its own.
    assert done.peak < LIMIT + (WHOLE if kind == "node" else 0)
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_memory_is_the_same_for_chunks_of_any_size(tmp_path: Path) -> None:
    """Compressed arrays of 20 MB and of 400 MB in one chunk, as one device writes them."""
    peaks = []
    for size in (5_000_000, 100_000_000):
        run = tmp_path / f"run_{size}"
        for k in range(2):
            values = np.random.default_rng(k).integers(0, 99, size // 16, np.int32)
            tree = {"w": np.repeat(values.astype("f4") + 1000, 16)}
            save(run / str(k), tree)
        peaks.append(measure_peak(run, tmp_path / f"o_{size}", "--allow", "two-runs"))
    assert abs(peaks[1] - peaks[0]) < 8 * MEGABYTE
    assert max(peaks) < LIMIT
