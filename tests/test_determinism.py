"""The same inputs give the same bytes, for any division of the work, day or version.

The tests of averaging and of each format check that these bytes are right.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from polyak_cli import average
from polyak_cli.averaging import records
from polyak_cli.engine import slabs
from polyak_cli.pipeline.stages import Options
from tests.command import SAMPLES
from tests.kernels import KERNELS, use_kernel
from tests.oracle import naive_average, read_model, write_model

#: Bytes of a float32 slab and of all buffers: the smallest slabs, the largest slabs, and slabs that
#: shrink to an odd size because the processes share little memory.
DIVISIONS = ((4 << 10, 1 << 33), (64 << 20, 1 << 33), (64 << 20, 1 << 20))


def write_run(folder: Path, large: int, count: int = 3) -> list[Path]:
    """Write checkpoints of many types: one large tensor, and small ones of odd sizes."""
    rng = np.random.default_rng(0)

    def values(size: int, dtype: str = "<f4") -> Any:
        return rng.standard_normal(size, np.float32).astype(dtype)

    paths = []
    for k in range(count):
        layers = {
            "large": {"kernel": values(large)},
            "odd": {
                "half": values(7_001, "<f2"),
                "double": values(10_007, "<f8"),
                "big_endian": values(9_999, ">f4"),
                "bfloat16": values(5_003).view(np.uint16)[1::2].copy().view("V2"),
            },
            "small": {f"w{n:03}": values(1 + 13 * n % 61) for n in range(60)},
            "mixed": {f"w{n:03}": values(1 + n % 7, ("<f2", "<f4")[n % 2]) for n in range(40)},
            "lookup": {"count": np.array(7), "table": np.arange(11, dtype=np.int32)},
        }
        paths.append(write_model(folder / f"model_{k}.h5", layers))
    return paths


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def assert_naive(output: Path, paths: list[Path]) -> None:
    """Compare an equal average with the naive one, except bfloat16, which has another oracle."""
    found = read_model(output)
    for name, values in naive_average(paths, [1] * len(paths)).items():
        if values.dtype.kind != "V":
            assert found[name].tobytes() == values.tobytes(), name


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], str]:
    """Return a run, and the digest of its average as one process makes it with large slabs."""
    folder = tmp_path_factory.mktemp("run")
    paths = write_run(folder, large=100_003)
    average(paths, folder / "o.h5", jobs=1)
    assert_naive(folder / "o.h5", paths)
    return paths, digest(folder / "o.h5")


@pytest.mark.slow
@pytest.mark.parametrize("jobs", range(1, 9))
def test_processes_and_slabs_change_no_byte(
    tmp_path: Path, run: tuple[list[Path], str], jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One to eight processes, and slabs of 4 KiB to 64 MiB, write the same file."""
    paths, expected = run
    for slab, memory in DIVISIONS:
        # Small as they are, the files are divided among processes.
        tuning = slabs.Tuning(piece=slab // 4, fork_nbytes=0)
        monkeypatch.setattr(slabs, "TUNING", tuning)
        average(paths, tmp_path / "o.h5", jobs=jobs, max_memory=memory, force=True)
        assert digest(tmp_path / "o.h5") == expected, (slab, memory)


@pytest.mark.slow
def test_a_run_that_is_large_enough_to_be_divided_gives_the_same_bytes(tmp_path: Path) -> None:
    """With nothing patched: processes, and bounds on their memory, change no byte."""
    paths = write_run(tmp_path, large=19_000_003, count=2)
    assert sum(path.stat().st_size for path in paths) > slabs.TUNING.fork_nbytes
    digests = set()
    for jobs, memory in ((1, 1 << 28), (8, 1 << 20), (3, 10_000_000), (8, 1 << 28)):
        average(paths, tmp_path / "o.h5", jobs=jobs, max_memory=memory, force=True)
        digests.add(digest(tmp_path / "o.h5"))
    assert_naive(tmp_path / "o.h5", paths)
    assert len(digests) == 1


def test_folders_and_file_times_change_no_byte(tmp_path: Path) -> None:
    """The output does not depend on the folder of the checkpoints or on their file times."""
    state = {"iteration": np.array(7)}
    for k, name in enumerate(("a", "elsewhere")):
        folder = tmp_path / name
        folder.mkdir()
        values = np.arange(9, dtype=np.float32)
        for epoch in (1, 2):
            path = write_model(
                folder / f"m_{epoch}.h5", {"d": {"k": values * epoch}}, optimizer=state
            )
            os.utime(path, (10**9 * k, 10**9 * k))
        average(folder, tmp_path / f"{name}.h5", optimizer="newest")
    assert digest(tmp_path / "a.h5") == digest(tmp_path / "elsewhere.h5")


# --- golden values --------------------------------------------------------------------------------

SCHEMES: dict[str, Options] = {
    "equal": {"scheme": "equal"},
    "linear": {"scheme": "linear"},
    "exp": {"scheme": "exp", "alpha": 2},
    "power": {"scheme": "power", "sigma": 0.1},
    # All bits of the sums, which rounding to float32 would hide.
    "wide": {"scheme": "exp", "alpha": 2, "dtype": "float64"},
    "signed": {"coefficients": [0, 0, 0, 0, -1, 0.5, -2, 1, 0.25, 4], "dtype": "float64"},
}
#: Of the tensors of the averaged samples, scheme by scheme.
TENSORS = {
    "equal": "767467719856b7a48c20148d02eb63f835ff48be6417c8cafbc62440d9f1950e",
    "linear": "76e1c2218bb2f556f6c484b5e13ee58ad08819e9d08463cfc9a726f807c7fbe7",
    "exp": "2909cf95c5ea40b6bf0f5c6a639d11dc8376fef622963289904b147902e93a9f",
    "power": "2bce494f55b5357d9e59fe9a35fa7dcc57c9a89a860af5368f8421cce73caca2",
    "wide": "7d4d003fcaedf3b8422f675b9d9be3046484f206ee449d1ac2c2d43e837f4c0c",
    "signed": "7efaa95f0eb6f386b87901f004e3c8b8e59d72bbce6effd5c3605fd1d259497b",
}
#: Of whole averaged files with a record that is always the same, by suffix and scheme.
FILES = {
    ".h5": {
        "equal": "d8350787e443528299c4ab9cd811448b89d8ded8fa61ab84dcca1a2e8ff3d1ff",
        "linear": "44ea70a3d74c25fa67ce3bb3aa9976a3970e32cdd1a69920c21e92c3eafabf0d",
        "exp": "1602549f1c26182cf3a8a70105608b291d0935fdcea74d9dd4be3319333e625c",
        "power": "c2d4a4f862f63c9eeef728b2f28a497869d6f5be237a26c2fb728f644018981f",
        "wide": "01ac5569c99519dd7e9d71ac79770b435c0af2b6237593aa31b8a49ff73952bc",
        "signed": "75bc050834887c7fe8a5e81f56ae98e70f13081129d5bf01e82611e82c370b0b",
    },
    ".safetensors": {
        "equal": "2e7750204757d37b27f816f991e9c63e71afa3ba287de912cff5a8aa0fad0923",
        "linear": "77903bc84a881ea98755191e8132315b46946a6b9ae07693db9bf941ff4940b4",
        "exp": "fc6320e965c3ea8956d6afa6cc9652a9f2034102aebad599d0b3924385463935",
        "power": "af788c51ba9725e27dd7a3a22195b11ff3e8b29a20c2f3f157c894b3e6edb287",
        "wide": "ef2729747a80741a4e18e5d1c8d7ccf20c3efee864cfe376809a61683e61f744",
        "signed": "32d463d4a9596b5f4c7ae98013c74bb2369dd1ba0912dda2103e6bb35cfc00d3",
    },
}


def h5_tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of a whole-model file, by the name of layer and weight."""
    for name, values in read_model(path).items():
        yield name.removeprefix("model_weights/"), values


def safetensors_tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of a safetensors file, as its own library reads them."""
    with safe_open(path, "numpy") as file:
        for name in file.keys():  # noqa: SIM118 # it is no mapping
            yield name, file.get_tensor(name)


READERS = {".h5": h5_tensors, ".safetensors": safetensors_tensors}


def tensors_digest(path: Path) -> str:
    """Return the SHA-256 over name, type, shape and bytes of every tensor, in order of names."""
    found = hashlib.sha256()
    for name, values in sorted(READERS[path.suffix](path), key=lambda pair: pair[0]):
        found.update(f"{name} {values.dtype.str} {values.shape}\n".encode())
        found.update(values.tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("suffix", READERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_averages_of_the_samples_have_golden_digests(
    tmp_path: Path, scheme: str, suffix: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes equal the committed ones, on any machine, with any versions of the libraries.

    The digest of the tensors must never change: these are the numbers that the scheme promises.
    The digest of the whole file may change in a release that arranges files differently; the
    changelog then says so.  The record of provenance holds polyak's version, so a constant
    replaces it here.
    """
    monkeypatch.setattr(records, "seal", lambda _: {"always": "the same"})
    use_kernel(monkeypatch, kernel)
    output = tmp_path / f"o{suffix}"
    assert average(SAMPLES, output, **SCHEMES[scheme]).kernel == kernel
    assert tensors_digest(output) == TENSORS[scheme]
    assert digest(output) == FILES[suffix][scheme]
