"""Inner products of neighbouring checkpoints: what is sampled, and that nothing else matters."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyak_cli.engine import executors
from polyak_cli.engine.executors import Executor, Forked, InProcess, Threads
from polyak_cli.engine.folding import FoldJob
from polyak_cli.engine.pools import Futures
from polyak_cli.engine.samples import REACH, SampleSums, Sampling
from polyak_cli.engine.slabs import FoldTensor, Memory, TensorSource
from polyak_cli.storage import File, Version
from polyak_cli.tensors import Extent, Placement

Array = np.ndarray[Any, Any]
#: Each checkpoint as its tensors, and the group of each tensor.
Run = list[list[Array]]


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    """Yield threads of this process."""
    with ThreadPoolExecutor(2) as made:
        yield made


def write(folder: Path, run: Run) -> list[File]:
    """Write each checkpoint as its tensors, one after the other."""
    files = []
    for k, tensors in enumerate(run):
        path = folder / f"{k}.raw"
        path.write_bytes(b"".join(array.tobytes() for array in tensors))
        files.append(File(str(path), Version.of(path.stat())))
    (folder / "out").write_bytes(bytes(path.stat().st_size))
    return files


def fold(
    folder: Path,
    run: Run,
    groups: list[int | None],
    sampling: Sampling | None,
    coefficients: Array,
    executor: Executor,
    piece: int = 1 << 16,
) -> SampleSums | None:
    """Fold a run and return its products."""
    files = write(folder, run)
    tensors = []
    offset = 0
    for t, array in enumerate(run[0]):
        dtype = str(array.dtype)
        extent = Extent(offset, array.nbytes)
        sources = [TensorSource(extent, dtype, "<", k) for k in range(len(run))]
        targets = [Placement(offset, dtype, "<")]
        tensors.append(FoldTensor(f"t{t}", array.size, sources, targets, groups[t]))
        offset += array.nbytes
    job = FoldJob(files, [str(folder / "out")], coefficients, [1.0], True, sampling)
    return executors.fold(tensors, job, Memory(2, piece, piece), executor=executor).samples


def expect(
    run: Run, groups: list[int | None], sampling: Sampling, counts: list[int]
) -> dict[int, Array]:
    """Return the same by plain numpy, one element after the other."""
    found: dict[int, Array] = {}
    for t, group in enumerate(groups):
        if group is None:
            continue
        sums = found.setdefault(group, np.zeros((len(counts), REACH, 4)))
        for i in range(run[0][t].size):
            if i % sampling.step >= sampling.length:
                continue
            values = [float(run[k][t][i]) for k in counts]
            values = [value if np.isfinite(value) else 0.0 for value in values]
            for k, x in enumerate(values):
                for reach in range(1, min(k, REACH) + 1):
                    y = values[k - reach]
                    if x != y:
                        sums[k, reach - 1] += (x * y, x * x, y * y, 1)
    return found


@settings(
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seed=st.integers(0, 1 << 30),
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=8),
    checkpoints=st.integers(1, 24),
    step=st.integers(1, 60),
    length=st.integers(1, 60),
    piece=st.integers(1, 200),
    kind=st.sampled_from(["in process", "threads", "forked", "pool"]),
)
def test_products_are_those_of_plain_numpy_whoever_folds(
    tmp_path: Path,
    pool: ThreadPoolExecutor,
    *,
    seed: int,
    sizes: list[int],
    checkpoints: int,
    step: int,
    length: int,
    piece: int,
    kind: str,
) -> None:
    """Neither the executor nor the size of a slab decides what is sampled or how it is summed."""
    rng = np.random.default_rng(seed)
    run = [[rng.normal(size=n).astype("f4") for n in sizes] for _ in range(checkpoints)]
    for tensors in run[1:]:  # some elements are those of the oldest, and some are not finite
        for array, oldest in zip(tensors, run[0], strict=True):
            array[:] = np.where(rng.random(array.size) < 0.3, oldest, array)
            array[rng.random(array.size) < 0.05] = np.nan
    groups = [None if g == 3 else int(g) for g in rng.integers(0, 4, len(sizes))]
    coefficients = np.where(rng.random((1, checkpoints)) < 0.2, 0.0, 1.0)
    coefficients[0, -1] = 1.0
    counted = [int(k) for k in np.flatnonzero(coefficients[0])]
    ways: dict[str, Executor] = {
        "in process": InProcess(),
        "forked": Forked(2),
        "threads": Threads(2),
        "pool": Futures(pool, 2, share_nbytes=1),
    }
    sampling = Sampling(step, length)
    found = fold(tmp_path, run, groups, sampling, coefficients, ways[kind], piece)
    assert found is not None
    expected = expect(run, groups, sampling, counted)
    for group, sums in expected.items():
        assert np.allclose(found.of(group), sums, rtol=1e-12, atol=1e-12)
    assert found.sums.keys() <= expected.keys()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_products_are_of_the_stored_values_and_change_no_byte(tmp_path: Path, dtype: str) -> None:
    """Values of any float type are widened, and the average is that of a run without products."""
    rng = np.random.default_rng(5)
    run: Run = [[rng.normal(size=5000).astype(dtype)] for _ in range(6)]
    average = np.full((1, 6), 1 / 6)
    sampling = Sampling(500, 70)
    found = fold(tmp_path, run, [0], sampling, average, InProcess())
    written = (tmp_path / "out").read_bytes()
    assert found is not None
    expected = expect(run, [0], sampling, [*range(6)])
    assert np.allclose(found.of(0), expected[0], rtol=1e-12, atol=1e-12)
    assert fold(tmp_path, run, [0], None, average, InProcess()) is None
    assert (tmp_path / "out").read_bytes() == written


def test_products_survive_a_message() -> None:
    """What a forked process sends is, to the last bit, what it found."""
    sums = SampleSums(3)
    sums.of(4)[...] = np.random.default_rng(0).normal(size=(3, REACH, 4))
    again = SampleSums.unpack(sums.pack())
    assert again.sums.keys() == {4}
    assert np.array_equal(again.of(4), sums.of(4))
