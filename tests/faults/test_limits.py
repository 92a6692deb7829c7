"""Limits of the machine: the program keeps them, or refuses the work before it starts."""

from __future__ import annotations

import json
import os
import random
import resource
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from polyak_cli.errors import PolyakError
from polyak_cli.processes import children
from tests.command import Done, one_line, polyak, scripted
from tests.faults.runs import OLD, write_run
from tests.oracle import Array, naive_average, read_model, same_bits

MIB = 1 << 20


def limited(folder: Path, nbytes: int) -> Done:
    """Average a run over an older output under a limit of address space."""

    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes))

    command = ("average", "ckpts", "-q", "--force", "-o", "o.h5")
    return scripted("", *command, cwd=folder, prepare=prepare)


def _check(folder: Path, mebibytes: float, average: bytes) -> int:
    """Check that under a limit the average is right or the refusal is clean; return the code."""
    (folder / "o.h5").write_bytes(OLD)
    done = limited(folder, int(mebibytes * MIB))
    found = (folder / "o.h5").read_bytes()
    assert sorted(os.listdir(folder)) == ["ckpts", "o.h5"]
    if done.returncode == 0:
        assert (found, done.stderr) == (average, "")
        return 0
    assert done.returncode == 3, (mebibytes, done.stderr)
    assert "ulimit -v" in one_line(done.stderr)
    assert found == OLD
    return 3


def _average(folder: Path) -> bytes:
    assert polyak("average", "ckpts", "-q", "-o", "o.h5", cwd=folder).returncode == 0
    paths = [folder / f"ckpts/model_{k}.h5" for k in (1, 2, 3)]
    assert same_bits(read_model(folder / "o.h5"), naive_average(paths, [1] * 3))
    return (folder / "o.h5").read_bytes()


def test_a_limit_of_address_space(run_folder: Path) -> None:
    """With too little memory under `ulimit -v` the run is refused in one line."""
    average = _average(run_folder)
    assert _check(run_folder, 80, average) == 3
    assert _check(run_folder, 165, average) == 0


@pytest.mark.soak
def test_any_limit_of_address_space(run_folder: Path) -> None:
    """Under any limit that lets Python start, the run averages or is refused."""
    average = _average(run_folder)
    chance = random.Random(0)
    codes = Counter(_check(run_folder, chance.uniform(40, 240), average) for _ in range(60))
    assert min(codes[0], codes[3]) > 10, codes


def test_no_memory_left_is_one_line(run_folder: Path) -> None:
    """When memory runs out anywhere, the exit code is 3 and nothing unfinished is left."""
    code = (
        "import polyak_cli.engine.executors as module\n"
        "def fold(*arguments, **options):\n"
        "    raise MemoryError\n"
        "module.fold = fold\n"
    )
    done = scripted(code, "average", "ckpts", "-o", "o.h5", cwd=run_folder)
    assert (done.returncode, done.stdout) == (3, "")
    assert one_line(done.stderr).startswith("memory ran out; ")
    assert os.listdir(run_folder) == ["ckpts"]


@pytest.mark.parametrize("call", ["fork", "pipe"])
def test_no_process_can_be_started(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """The error gives the system's reason, and no descriptor is lost."""

    def fail() -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(
        PolyakError, match=r"no worker process can be started: .*temporarily unavailable"
    ):
        children.Child(lambda _: None)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.soak
def test_ten_thousand_checkpoints_under_256_open_files(tmp_path: Path) -> None:
    """The average has the same bits, and the record names all of the checkpoints."""
    (tmp_path / "ckpts").mkdir()
    paths = write_run(tmp_path / "ckpts", 10_000, 10)

    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))

    command = ("average", "ckpts", "--json", "-q", "-o", "o.h5")
    done = scripted("", *command, cwd=tmp_path, prepare=prepare)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads(done.stdout)["checkpoints"]) == 10_000
    kernel = "model_weights/dense/kernel"
    total = np.zeros(10)
    for path in paths:
        total += np.float64(1 / 10_000) * read_model(path)[kernel].astype(np.float64)
    assert read_model(tmp_path / "o.h5")[kernel].tobytes() == total.astype(np.float32).tobytes()


def write_many(path: Path, count: int, seed: int) -> Array:
    """Write a safetensors file of many tensors of two float32 each; return all values."""
    values = np.random.default_rng(seed).normal(3, size=2 * count).astype("<f4")
    entries = {
        f"t{k}": {"dtype": "F32", "shape": [2], "data_offsets": [8 * k, 8 * k + 8]}
        for k in range(count)
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + values.tobytes())
    return values


@pytest.mark.soak
def test_a_hundred_thousand_tensors_in_one_file(tmp_path: Path) -> None:
    """Each tensor is the average of its own values."""
    count = 100_000
    one, other = (write_many(tmp_path / f"m_{k}.safetensors", count, k) for k in (1, 2))
    names = ("m_1.safetensors", "m_2.safetensors")
    done = polyak("average", *names, "-q", "-o", "o.safetensors", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    content = (tmp_path / "o.safetensors").read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:length])
    expected = (0.5 * one.astype("f8") + 0.5 * other.astype("f8")).astype("<f4")
    for k in range(0, count, 997):
        start, stop = header[f"t{k}"]["data_offsets"]
        assert content[length + start : length + stop] == expected[2 * k : 2 * k + 2].tobytes()


@pytest.mark.soak
def test_a_million_tensors_in_one_file_are_refused(tmp_path: Path) -> None:
    """A header that needs more memory than any real model's is refused before the work."""
    write_many(tmp_path / "m_1.safetensors", 1_000_000, 1)
    done = polyak("average", "m_1.safetensors", "-o", "o.safetensors", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    line = one_line(done.stderr)
    assert line.startswith("m_1.safetensors: reading its header needs more than 268 MB of memory")
    assert os.listdir(tmp_path) == ["m_1.safetensors"]
