"""Peak memory, measured: flat in the size of a model, of a tensor, and in their number."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import numpy.typing as npt
import pytest

from tests import dcp
from tests.command import POLYAK
from tests.oracle import Model, naive_average, read_model, same_bits, write_model
from tests.peaks import run_measured

pytestmark = pytest.mark.slow

MEGABYTE = 10**6
LIMIT = 100 * MEGABYTE
#: By how much two runs of one kind may differ, by the allocator and the threads' timing.
FLAT = 8 * MEGABYTE
#: Elements compared at a time.
STRIDE = 1 << 22


class Measured(NamedTuple):
    """One run of the program."""

    peak: int  # bytes, of the program or its largest child, whichever is more
    multipliers: list[float]


def measure_peak(sources: Path, output: Path, *options: str) -> int:
    """Average a folder in a fresh process and return its peak memory."""
    command = ("average", sources, "-o", output, "--json", "-q", *options)
    done = run_measured(*POLYAK, *command)
    assert done.code == 0, done.stderr
    report = json.loads(done.stdout)
    # The reported peak is right, except for the allocations that come after it.
    assert abs(report["peak_memory"] - done.peak) < FLAT
    return done.peak


def measure(sources: Path, output: Path, *options: str) -> Measured:
    """Average a folder of HDF5 files and return what that took, and their coefficients."""
    peak = measure_peak(sources, output, *options)
    with h5py.File(output) as file:
        record = json.loads(file.attrs["polyak_provenance"])
    return Measured(peak, [one["multiplier"] for one in record["inputs"]])


def write_large(path: Path, tensors: int, elements: int, seed: int) -> Path:
    """Write a checkpoint of large float32 tensors: values here and there, and holes between.

    What is not written reads as zeros and takes no disk, so that gigabytes are made in no time.
    """
    empty = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    empty.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    empty.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    write_model(path, {})
    with h5py.File(path, "r+") as file:
        names = [f"layer_{k}" for k in range(tensors)]
        file["model_weights"].attrs["layer_names"] = [name.encode() for name in names]
        for name in names:
            group = file["model_weights"].create_group(name)
            group.attrs["weight_names"] = [b"kernel"]
            space = h5py.h5s.create_simple((elements // 1024, 1024))
            h5py.h5d.create(group.id, b"kernel", h5py.h5t.IEEE_F32LE, space, dcpl=empty)
        extents = list(_extents(file, tensors))
    rng = np.random.default_rng(seed)
    with open(path, "r+b") as raw:
        for offset in extents:
            for start in range(0, elements, elements // 8):
                count = min(1 << 16, elements // 8)
                raw.seek(offset + 4 * start)
                raw.write(rng.normal(3, size=count).astype("<f4").tobytes())
    return path


def _extents(file: h5py.File, tensors: int) -> Iterator[int]:
    for k in range(tensors):
        yield file[f"model_weights/layer_{k}/kernel"].id.get_offset()


def _read(path: Path, name: str, start: int, count: int) -> npt.NDArray[np.float32]:
    with h5py.File(path) as file:
        offset = file[name].id.get_offset()
    return np.fromfile(path, "<f4", count, offset=offset + 4 * start)


def check_stream(
    paths: Sequence[Path], output: Path, multipliers: Sequence[float], tensors: int, elements: int
) -> None:
    """Compare the output bit for bit with the sum of pieces, oldest first, in float64."""
    for k in range(tensors):
        name = f"model_weights/layer_{k}/kernel"
        for start in range(0, elements, STRIDE):
            count = min(STRIDE, elements - start)
            total = np.zeros(count)
            for path, multiplier in zip(paths, multipliers, strict=True):
                total += np.float64(multiplier) * _read(path, name, start, count).astype("f8")
            found = _read(output, name, start, count)
            assert found.tobytes() == (total / math.fsum(multipliers)).astype("<f4").tobytes()


def average_large(folder: Path, count: int, tensors: int, elements: int, *options: str) -> int:
    """Write a run, average it, check the bits, delete all files and return the peak."""
    sources, output = folder / f"run_{count}_{elements}", folder / f"{count}_{elements}.h5"
    sources.mkdir()
    paths = [
        write_large(sources / f"model_{k}.h5", tensors, elements, seed=k) for k in range(count)
    ]
    measured = measure(sources, output, "--scheme", "exp", *options)
    check_stream(paths, output, measured.multipliers, tensors, elements)
    for path in [*paths, output]:
        path.unlink()
    return measured.peak


@pytest.mark.soak
def test_memory_is_the_same_for_small_and_large_models(tmp_path: Path) -> None:
    """Ten files of 4 MB and ten of 400 MB: at most 100 MB, and no more for the larger."""
    small = average_large(tmp_path, 10, 10, 100 * 1024)  # 10 x 410 kB = 4.1 MB a file
    large = average_large(tmp_path, 10, 10, 10_000 * 1024)  # 10 x 41 MB = 410 MB a file
    assert small <= LIMIT
    assert large <= LIMIT
    assert abs(large - small) <= FLAT


@pytest.mark.soak
def test_memory_is_the_same_for_one_tensor_of_2_gb(tmp_path: Path) -> None:
    """A tensor larger than any buffer streams through."""
    small = average_large(tmp_path, 2, 1, 1 << 20)  # 4 MiB
    large = average_large(tmp_path, 2, 1, 1 << 29)  # 2 GiB
    assert large <= LIMIT
    assert abs(large - small) <= FLAT


def test_memory_does_not_grow_with_the_number_of_checkpoints(tmp_path: Path) -> None:
    """Two checkpoints or sixty."""
    few = average_large(tmp_path, 2, 4, 1 << 20)
    many = average_large(tmp_path, 60, 4, 1 << 20)
    assert many <= LIMIT
    assert abs(many - few) <= FLAT


@pytest.mark.soak
def test_memory_stays_below_the_limit_with_a_thousand_checkpoints(tmp_path: Path) -> None:
    """Each checkpoint costs only the memory of its name, table, digests and record: a few kB."""
    few = average_large(tmp_path, 2, 1, 1 << 14)
    many = average_large(tmp_path, 1000, 1, 1 << 14)
    assert many <= LIMIT
    assert many - few <= 998 * 12_000  # 5 to 9 kB were measured, more with several threads


@pytest.mark.parametrize(
    "jobs",
    [pytest.param("1", marks=pytest.mark.soak), "8", pytest.param("64", marks=pytest.mark.soak)],
)
def test_memory_stays_below_the_limit_with_any_number_of_threads(tmp_path: Path, jobs: str) -> None:
    """Threads share one bound."""
    assert average_large(tmp_path, 3, 2, 1 << 22, "--jobs", jobs) <= LIMIT


def test_a_smaller_bound_costs_less(tmp_path: Path) -> None:
    """--max-memory moves the peak, and not one bit of the result.

    Plain tensors are folded in pieces of 1.5 MB at the most, whatever the bound; it is chunks that
    are better read in bands as large as it allows.
    """
    sources = tmp_path / "run"
    sources.mkdir()
    values = np.random.default_rng(0).normal(size=(8192, 1024)).astype(np.float32)  # 34 MB
    paths = [
        write_model(
            sources / f"model_{k}.h5",
            {"dense": {"kernel": values * np.float32(k)}},
            storage={"chunks": (512, 256)},  # a band is 2 MB, as float64 twice that
        )
        for k in range(3)
    ]
    least = measure(sources, tmp_path / "1.h5", "--max-memory", "1MiB", "--jobs", "1")
    most = measure(sources, tmp_path / "2.h5", "--max-memory", "32MiB", "--jobs", "1")
    assert least.peak + 2 * MEGABYTE < most.peak <= LIMIT
    expected = naive_average(paths, least.multipliers)
    assert same_bits(read_model(tmp_path / "1.h5"), expected)
    assert same_bits(read_model(tmp_path / "2.h5"), expected)


@pytest.mark.parametrize("bound", ["1MiB", pytest.param("32MiB", marks=pytest.mark.soak)])
def test_plain_tensors_stay_below_the_limit_with_any_bound(tmp_path: Path, bound: str) -> None:
    """Large or small, with the right bits, which are compared each time."""
    options = ("--max-memory", bound, "--jobs", "8")
    assert average_large(tmp_path, 3, 2, 1 << 22, *options) <= LIMIT
    assert average_large(tmp_path, 3, 2, 1 << 21, *options) <= LIMIT


def test_memory_stays_below_the_limit_with_compressed_checkpoints(tmp_path: Path) -> None:
    """Compressed tensors are inflated chunk by chunk."""
    sources = tmp_path / "run"
    sources.mkdir()
    tile = np.random.default_rng(0).normal(size=1 << 10).astype(np.float32)
    values = np.resize(tile, (8192, 1024))  # 34 MB
    paths = [
        write_model(
            sources / f"model_{k}.h5",
            {"dense": {"kernel": values * np.float32(k)}},
            storage={"chunks": (256, 256), "compression": "gzip", "shuffle": True},
        )
        for k in range(3)
    ]
    measured = measure(sources, tmp_path / "o.h5")
    assert measured.peak <= LIMIT
    expected = naive_average(paths, measured.multipliers)
    assert same_bits(read_model(tmp_path / "o.h5"), expected)


def test_memory_does_not_grow_with_carried_tensors(tmp_path: Path) -> None:
    """A large table that is copied from the newest, and compared, is streamed too."""
    sources = tmp_path / "run"
    sources.mkdir()
    table = np.arange(40_000_000, dtype=np.int32)  # 160 MB
    for k in range(2):
        layers: Model = {
            "lookup": {"table": table},
            "dense": {"kernel": np.ones((4, 4), np.float32)},
        }
        write_model(sources / f"model_{k}.h5", layers)
    assert measure(sources, tmp_path / "o.h5").peak <= LIMIT
    assert np.array_equal(read_model(tmp_path / "o.h5")["model_weights/lookup/table"], table)


def test_the_measuring_sees_what_is_used() -> None:
    """The measurement sees a process that takes 300 MB."""
    done = run_measured(sys.executable, "-c", "x = bytearray(b'x') * 300_000_000")
    assert (done.code, done.stderr) == (0, "")
    assert 300 * MEGABYTE < done.peak < 350 * MEGABYTE


#: Files of other values look like several runs.
GEOMETRY = ["geometry", "--allow", "two-runs"]


def test_memory_of_the_geometry_is_flat(tmp_path: Path) -> None:
    """Models of 4 MB or of 67 MB, two of them or forty: at most 100 MB, the buffers included."""
    peaks = []
    for count, elements in ((2, 1 << 20), (2, 1 << 24), (40, 1 << 20)):
        for k in range(count):
            write_large(tmp_path / f"m_{k}.h5", 1, elements, k)
        done = run_measured(*POLYAK, *GEOMETRY, tmp_path)
        assert done.code == 0, done.stderr
        peaks.append(done.peak)
    assert max(peaks) < LIMIT
    assert max(peaks) - min(peaks) < FLAT


@pytest.mark.soak
@pytest.mark.parametrize(
    "command", [["inspect", "--stats"], ["diff", "--atol", "9"], ["diff"], ["check"], GEOMETRY]
)
def test_looking_inside_is_flat_too(tmp_path: Path, command: list[str]) -> None:
    """Statistics, differences, distances and health of 4 MB and of 400 MB take the same memory."""
    peaks = []
    for elements in (1 << 20, 100 << 20):
        paths = [write_large(tmp_path / f"m_{k}.h5", 1, elements, k) for k in range(2)]
        sources = [str(path) for path in paths] if len(command) > 1 else [str(tmp_path)]
        done = run_measured(*POLYAK, *command, *sources)
        assert done.code in (0, 1), done.stderr
        peaks.append(done.peak)
    assert max(peaks) < LIMIT
    assert abs(peaks[1] - peaks[0]) < FLAT * 4  # buffers are as large as tensors allow


@pytest.mark.parametrize(
    "counts", [(8, 1), pytest.param((1, 8), marks=pytest.mark.soak)], ids=["rows", "columns"]
)
def test_memory_is_the_same_for_parts_of_any_size(tmp_path: Path, counts: tuple[int, int]) -> None:
    """A tensor in eight parts is read where its bytes lie; no part is held in memory."""
    peaks = []
    for rows in (512, 16384):  # parts of 0.5 MB, and of 16.8 MB
        sources = tmp_path / str(rows)
        for k in (1, 2):
            values = np.full((rows, 2048), k, np.float32)
            dcp.write(sources / f"step-{k}", {"x": dcp.split(values, counts)})
        for output in ("o.safetensors", "folder"):
            peaks.append(measure_peak(sources, tmp_path / f"{rows}-{output}"))
        shutil.rmtree(sources)
    assert max(peaks) <= LIMIT
    assert max(peaks) - min(peaks) <= FLAT
