"""Slabs, workers, executors and memory: dividing the work in another way changes no byte."""

from __future__ import annotations

import errno
import math
import multiprocessing
import os
import resource
import threading
import time
import tracemalloc
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyak_cli.engine import executors, folding, reading, shares
from polyak_cli.engine.executors import Executor, Forked, InProcess, Threads
from polyak_cli.engine.folding import Done, FoldJob, Team, Worker
from polyak_cli.engine.inputs import OpenInputs, check_unchanged
from polyak_cli.engine.kernel import is_finite
from polyak_cli.engine.pools import Futures
from polyak_cli.engine.reading import ReadTensor
from polyak_cli.engine.slabs import (
    TUNING,
    Bundle,
    FoldTensor,
    Memory,
    Slab,
    TensorSource,
    Tuning,
    bundle_slabs,
    count_elements,
    cut_slabs,
    gather_batches,
)
from polyak_cli.engine.timing import Clock, Progress, Totals
from polyak_cli.errors import FormatError, MismatchError, PolyakError
from polyak_cli.storage import Bytes, File, Version
from polyak_cli.storage.local import LocalOutput, page_aligned
from polyak_cli.tensors import Extent, Files, Grid, GridPart, Inline, Placement
from tests.oracle import nearest_bfloat16

#: For what no executor has a part in.
once = pytest.mark.parametrize("where", ["in process"], indirect=True)


def tensor(size: int, offset: int = 0, count: int = 1) -> FoldTensor:
    """Return a float32 tensor that lies at the same offset in all checkpoints."""
    sources = [TensorSource(Extent(offset, size * 4), "float32", "<", k) for k in range(count)]
    return FoldTensor("x", size, sources, [Placement(offset, "float32", "<")])


class Banded(Extent):
    """An extent that prefers to be read in bands of seven float32, like a chunked one."""

    preferred_nbytes = 28
    block_nbytes = 28


@once
@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(1, 1000), max_size=20), st.integers(1, 300))
def test_slabs_cover_each_tensor_exactly_once(sizes: list[int], piece: int) -> None:
    """Every element is in exactly one slab, and no slab is larger than a piece."""
    tensors = [tensor(size) for size in sizes]
    cut = list(cut_slabs(tensors, piece, piece))
    for one in tensors:
        spans = [(s.start, s.stop) for s in cut if s.tensor is one]
        covered = [k for start, stop in spans for k in range(start, stop)]
        assert covered == list(range(one.size))
    assert all(s.stop - s.start <= piece for s in cut)


@once
@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(1, 9000), max_size=50), st.integers(1, 20_000))
def test_bundles_and_batches_lose_no_slab(sizes: list[int], elements: int) -> None:
    """Bundles and batches keep every slab, in order, and no bundle is larger than a piece."""
    starts = np.cumsum([0, *sizes]) * 4
    tensors = [tensor(n, int(start)) for n, start in zip(sizes, starts, strict=False)]
    cut = [slab for one in tensors for slab in cut_slabs([one], elements, elements)]
    bundled = list(bundle_slabs(cut, elements))
    assert [slab for bundle in bundled for slab in bundle] == cut
    assert all(sum(s.stop - s.start for s in bundle) <= elements for bundle in bundled)
    assert [one for batch in gather_batches(bundled, 4 * elements) for one in batch] == bundled


def write_inputs(folder: Path, arrays: Sequence[np.ndarray]) -> list[File]:
    """Write raw files: the engine knows no format."""
    inputs = []
    for k, array in enumerate(arrays):
        path = folder / f"{k}.raw"
        path.write_bytes(array.tobytes())
        inputs.append(File(str(path), Version.of(path.stat())))
    return inputs


#: Those that divide the batches among as many workers as there are jobs.
DIVIDED: dict[str, type[Threads | Forked]] = {"threads": Threads, "forked": Forked}
#: How the batches of a test are run; set by the fixture `where`.
HERE: dict[str, Any] = {}
#: What each fold returned.
FOUND: list[Done] = []
WHERE = ["in process", "threads", "forked", "pool", "spawned"]


@pytest.fixture(scope="module")
def spawned() -> Iterator[ProcessPoolExecutor]:
    """Yield spawned processes: they share no memory, so everything they receive is pickled."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(time.sleep, [0.1] * 4))  # both are there before a test counts descriptors
        yield pool


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of threads of this process."""
    with ThreadPoolExecutor(2) as made:
        yield made


@pytest.fixture(autouse=True, params=WHERE)
def where(
    request: pytest.FixtureRequest, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Run every test with each executor, but for those that are marked `once`."""
    monkeypatch.setattr(shares, "EDGE", 1)  # the tensors of these tests are smaller than that
    executor: Executor | None = None
    if request.param == "spawned":
        executor = Futures(request.getfixturevalue("spawned"), 2, share_nbytes=1)
    elif request.param == "pool":
        executor = Futures(pool, 2, share_nbytes=1)
    monkeypatch.setitem(HERE, "executor", executor)
    monkeypatch.setitem(HERE, "where", request.param)
    return str(request.param)


def fold(
    tensors: Iterable[FoldTensor],
    job: FoldJob,
    memory: Memory,
    progress: Progress = lambda _: None,
) -> Totals:
    """Fold with the executor of the test."""
    executor = HERE["executor"]
    if executor is None:
        executor = InProcess(memory.tuning)
        if HERE["where"] in DIVIDED:
            executor = DIVIDED[HERE["where"]](memory.jobs, memory.tuning)
    FOUND.append(executors.fold(tensors, job, memory, progress, executor))
    return FOUND[-1].totals


def run(
    folder: Path,
    arrays: Sequence[np.ndarray],
    coefficients: npt.ArrayLike,
    memory: Memory,
    allow_nonfinite: bool = False,
    divisor: float = 1.0,
) -> list[np.ndarray]:
    """Fold whole files into one output of the newest's type for each row of coefficients."""
    inputs = write_inputs(folder, arrays)
    newest = arrays[-1]
    outputs = [folder / f"out{row}" for row in range(len(np.array(coefficients)))]
    for output in outputs:
        output.write_bytes(b"")
    sources = [
        TensorSource(Extent(0, array.nbytes), array.dtype.name, "<", k)
        for k, array in enumerate(arrays)
    ]
    targets = [Placement(0, newest.dtype.name, "<", row) for row in range(len(outputs))]
    rows = np.array(coefficients)
    divisors = [divisor] * len(rows)
    work = FoldJob(inputs, [str(o) for o in outputs], rows, divisors, allow_nonfinite)
    fold([FoldTensor("x", newest.size, sources, targets)], work, memory)
    return [np.fromfile(output, newest.dtype) for output in outputs]


@settings(
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the fixture changes nothing
)
@given(st.integers(1, 5), st.integers(1, 4000), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_workers_and_pieces_change_no_bit(
    tmp_path_factory: pytest.TempPathFactory, jobs: int, piece: int, count: int, seed: int
) -> None:
    """For any number of jobs and size of pieces, the bits are those of a fold of whole arrays."""
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=5000).astype(np.float32) for _ in range(count)]
    coefficients = rng.random(count)
    total = np.zeros(5000)
    for k, array in enumerate(arrays):
        term = coefficients[k] * array.astype(np.float64)
        total = term if k == 0 else total + term
    folder = tmp_path_factory.mktemp("run")
    (out,) = run(folder, arrays, [coefficients], Memory(jobs, piece, piece), divisor=0.7)
    assert out.tobytes() == (total / 0.7).astype(np.float32).tobytes()


@settings(
    derandomize=True,
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the fixture changes nothing
)
@given(
    st.one_of(
        st.sampled_from([2, 4, 8]).map(lambda width: [width] * 3),
        st.lists(st.sampled_from([2, 4, 8]), min_size=3, max_size=3),
    ),
    st.lists(
        st.tuples(st.integers(1, 40), st.sampled_from([0, 1, 4, 24, 9000]), st.booleans()),
        min_size=2,
    ),
    st.sampled_from(["alike", "moved", "in another order"]),
    st.integers(50, 4000),
    st.integers(0, 2**32 - 1),
)
def test_neighbouring_small_tensors_are_each_averaged(
    tmp_path_factory: pytest.TempPathFactory,
    widths: list[int],
    shape: list[tuple[int, int, bool]],
    others: str,
    piece: int,
    seed: int,
) -> None:
    """Each tensor has the bits of its own fold, wherever it lies; the bytes between stay.

    Between them lie any number of bytes, so that most begin at odd places; some are big-endian, and
    the checkpoints may be of different types.
    """
    rng = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("run")

    def byteorder(k: int, t: int) -> str:
        return "<>"[shape[t][2] if k == 0 else t % 4 == 3]

    arrays: list[dict[int, np.ndarray]] = []
    places: list[dict[int, int]] = []
    inputs = []
    for k in range(3):
        content, arrays_here, places_here = b"", {}, {}
        order = list(enumerate(shape))
        for t, (size, gap, _) in order[:: -1 if k == 0 and others == "in another order" else 1]:
            content += rng.bytes(gap + 3 * k if others == "moved" else gap)
            places_here[t] = len(content)
            arrays_here[t] = rng.normal(size=size).astype(f"{byteorder(k, t)}f{widths[k]}")
            content += arrays_here[t].tobytes()
        path = folder / f"{k}.raw"
        path.write_bytes(content)
        inputs.append(File(str(path), Version.of(path.stat())))
        arrays.append(arrays_here)
        places.append(places_here)
    tensors, expected = [], bytearray(b"\xaa" * len(content))
    for t, (size, _, _) in enumerate(shape):
        sources = [
            TensorSource(
                Extent(places[k][t], size * width), f"float{8 * width}", byteorder(k, t), k
            )
            for k, width in enumerate(widths)
        ]
        nbytes = size * widths[2]
        target = Placement(places[2][t], f"float{8 * widths[2]}", byteorder(2, t))
        tensors.append(FoldTensor(f"t{t}", size, sources, [target]))
        total = 0.2 * arrays[0][t].astype(np.float64)
        for coefficient, k in ((0.3, 1), (0.5, 2)):
            total = total + coefficient * arrays[k][t].astype(np.float64)
        stored = total.astype(f"{byteorder(2, t)}f{widths[2]}").tobytes()
        expected[places[2][t] : places[2][t] + nbytes] = stored
    (folder / "out").write_bytes(b"\xaa" * len(content))
    work = FoldJob(inputs, [str(folder / "out")], np.array([[0.2, 0.3, 0.5]]), [1.0], False)
    totals = fold(tensors, work, Memory(2, piece, piece))
    assert (folder / "out").read_bytes() == expected
    assert totals.bytes_read == sum(widths) * sum(size for size, _, _ in shape)


@settings(
    derandomize=True,
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the fixture changes nothing
)
@given(
    st.lists(
        st.sampled_from(["float16", "bfloat16", "float32", "float64"]), min_size=2, max_size=5
    ),
    st.sampled_from(["float16", "bfloat16", "float32", "float64"]),
    st.integers(1, 4000),
    st.integers(100, 5000),
    st.integers(0, 2**32 - 1),
)
def test_each_checkpoint_may_have_another_type(
    tmp_path_factory: pytest.TempPathFactory,
    dtypes: list[str],
    stored: str,
    size: int,
    piece: int,
    seed: int,
) -> None:
    """Values are widened from their own type, folded in float64 and rounded once to the output's.

    Some are stored in bands, which prefer slabs of another length.
    """
    rng = np.random.default_rng(seed)
    codes = {"bfloat16": ml_dtypes.bfloat16}
    arrays = [rng.normal(size=size).astype(codes.get(dtype, dtype)) for dtype in dtypes]
    folder = tmp_path_factory.mktemp("run")
    inputs = write_inputs(folder, arrays)
    (folder / "out").write_bytes(b"")
    sources = [
        TensorSource((Extent, Banded)[k % 2](0, array.nbytes), dtype, "<", k)
        for k, (array, dtype) in enumerate(zip(arrays, dtypes, strict=True))
    ]
    coefficients = rng.random(len(arrays))
    total = coefficients[0] * arrays[0].astype(np.float64)
    for coefficient, array in zip(coefficients[1:], arrays[1:], strict=True):
        total = total + coefficient * array.astype(np.float64)
    work = FoldJob(inputs, [str(folder / "out")], coefficients[None], [1.0], False)
    one = FoldTensor("x", size, sources, [Placement(0, stored, "<")])
    fold([one], work, Memory(2, piece, piece))
    found = (folder / "out").read_bytes()
    if stored == "bfloat16":
        bits = np.frombuffer(found, np.uint16)
        assert len(bits) == size
        assert bits[:50].tolist() == [nearest_bfloat16(value) for value in total[:50]]
    else:
        assert found == total.astype(stored).tobytes()


def test_a_culprit_of_another_type_is_named_by_its_own_element(tmp_path: Path) -> None:
    """The element is counted in the elements of the file that holds it."""
    halves = np.zeros(100, np.float16)
    halves[57] = np.inf
    with pytest.raises(MismatchError, match=r"1\.raw: tensor 'x' holds inf \(element 57\)"):
        run(tmp_path, [np.zeros(100, np.float64), halves], [[0.5, 0.5]], Memory(1, 30, 30))


def test_wider_values_that_the_newest_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    """An older float32 may be beyond what the newest's float16 stores."""
    arrays: list[np.ndarray] = [np.full(3, 3e5, np.float32), np.ones(3, np.float16)]
    with pytest.raises(MismatchError, match=r"holds 150000, which float16 cannot store"):
        run(tmp_path, arrays, [[0.5, 0.5]], Memory(1, 30, 30))


@once
def test_neighbouring_small_tensors_are_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred neighbours at the end of a file take two reads, which skip the bytes before."""
    before = np.zeros(10_000, np.float32)
    numbers = np.arange(995, dtype=np.float32)
    inputs = write_inputs(tmp_path, [np.concatenate([before, numbers])] * 2)
    (tmp_path / "out").write_bytes(b"")
    tensors = [tensor(5, 40_000 + 40 * k, 2) for k in range(100)]
    reads = []
    buffers = []
    preadv = os.preadv

    def counted(descriptor: int, buffers: Any, offset: int) -> int:
        reads.append(offset)
        return preadv(descriptor, buffers, offset)

    def measured(nbytes: int) -> Bytes:
        buffers.append(nbytes)
        return page_aligned(nbytes)

    monkeypatch.setattr(os, "preadv", counted)
    monkeypatch.setattr(folding, "page_aligned", measured)
    work = FoldJob(inputs, [str(tmp_path / "out")], np.array([[0.5, 0.5]]), [1.0], False)
    executors.fold(tensors, work, Memory(1, 400, 400), executor=InProcess())
    assert reads == [40_000, 40_000, 43_200, 43_200]
    assert max(buffers) < 10_000
    out = np.fromfile(tmp_path / "out", np.float32)[10_000:]
    assert out.reshape(-1, 5)[::2].ravel().tolist() == [
        10 * k + j for k in range(100) for j in range(5)
    ]


def test_a_nan_among_small_tensors_is_named_with_its_own_tensor(tmp_path: Path) -> None:
    """An error in one of many tensors that are folded together names that tensor."""
    array = np.zeros(100, np.float32)
    array[57] = np.nan
    inputs = write_inputs(tmp_path, [array])
    (tmp_path / "out").write_bytes(b"")
    tensors = [tensor(10, 40 * k)._replace(name=f"t{k}") for k in range(10)]
    work = FoldJob(inputs, [str(tmp_path / "out")], np.array([[1.0]]), [1.0], False)
    with pytest.raises(MismatchError, match=r"0\.raw: tensor 't5' holds nan \(element 7\)"):
        fold(tensors, work, Memory(2, 1000, 1000))


def test_small_tensors_that_a_tight_bound_cuts_are_averaged(tmp_path: Path) -> None:
    """A part of a small tensor is never bundled with its neighbours as if it were whole."""
    arrays = [np.arange(60, dtype=np.float32), np.ones(60, np.float32)]
    inputs = write_inputs(tmp_path, arrays)
    starts = [0, 15, 20, 25, 52, 53, 60]
    tensors = [tensor(b - a, 4 * a, 2) for a, b in pairwise(starts)]
    work = FoldJob(inputs, [str(tmp_path / "out")], np.array([[0.5, 0.5]]), [1.0], False)
    for piece in range(1, 31):
        (tmp_path / "out").write_bytes(b"")
        fold(tensors, work, Memory(1, piece, piece))
        out = np.fromfile(tmp_path / "out", np.float32)
        assert out.tolist() == ((arrays[0] + 1) / 2).tolist()


def test_several_outputs_come_from_one_reading(tmp_path: Path) -> None:
    """Each output holds the average of its own row of coefficients."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=1000).astype(np.float32) for _ in range(3)]
    matrix = [[1.0, 0.0, 0.0], [0.25, 0.25, 0.5], [0.0, 0.5, 0.5]]
    for rows in (matrix, matrix[1:]):
        outs = run(tmp_path, arrays, rows, Memory(2, 300, 300))
        for row, out in zip(rows, outs, strict=True):
            expected = sum(c * a.astype(np.float64) for c, a in zip(row, arrays, strict=True) if c)
            assert out.tobytes() == np.asarray(expected).astype(np.float32).tobytes()


def test_a_coefficient_of_zero_is_not_even_read(tmp_path: Path) -> None:
    """NaN and infinity in a checkpoint of coefficient 0 do not reach the average."""
    arrays = [np.array([np.nan, np.inf], np.float32), np.array([1, 2], np.float32)]
    (out,) = run(tmp_path, arrays, [[0.0, 1.0]], Memory(1, 10, 10))
    assert out.tolist() == [1.0, 2.0]


def test_a_nan_is_named_with_file_tensor_and_element(tmp_path: Path) -> None:
    """A value that is not finite is refused, and the message says where it is."""
    arrays = [np.zeros(1000, np.float32), np.zeros(1000, np.float32)]
    arrays[1][777] = np.nan
    with pytest.raises(MismatchError, match=r"1\.raw: tensor 'x' holds nan \(element 777\)"):
        run(tmp_path, arrays, [[0.5, 0.5]], Memory(2, 100, 100))


def test_nonfinite_values_are_averaged_where_they_are_allowed(tmp_path: Path) -> None:
    """With allow_nonfinite, infinity and NaN go through the arithmetic like any number."""
    arrays = [np.array([np.inf, 1, np.inf], np.float32), np.array([1, np.nan, -np.inf], np.float32)]
    (out,) = run(tmp_path, arrays, [[0.5, 0.5]], Memory(2, 10, 10), allow_nonfinite=True)
    assert np.isposinf(out[0])
    assert np.isnan(out[1:]).all()


def test_every_nan_of_an_average_has_the_same_bits(tmp_path: Path) -> None:
    """Whichever NaN is added to which, and wherever it lies in a slab."""
    bits = np.tile(np.array([0x7FC00001, 0xFFC00002, 0x7F800000, 0xFF800000], np.uint32), 9)
    arrays = [bits[:33].view(np.float32), np.roll(bits, 1)[:33].view(np.float32)]
    (out,) = run(tmp_path, arrays, [[0.5, 0.5]], Memory(1, 100, 100), allow_nonfinite=True)
    assert np.isnan(out).all()
    assert set(out.view(np.uint32).tolist()) == {0x7FC00000}


def test_an_overflow_of_float64_blames_no_checkpoint(tmp_path: Path) -> None:
    """If all values are finite and only their sum is not, no checkpoint is blamed."""
    arrays, coefficients = [np.array([1.0, 1.7e308])] * 2, [[0.75, 0.75]]
    with pytest.raises(MismatchError, match="the average of tensor 'x' overflows float64"):
        run(tmp_path, arrays, coefficients, Memory(2, 100, 100))
    (out,) = run(tmp_path, arrays, coefficients, Memory(2, 100, 100), allow_nonfinite=True)
    assert out.tolist() == [1.5, math.inf]


@once
def test_great_float64_values_are_no_false_alarm() -> None:
    """Finite values are recognised as finite even if their sum overflows."""
    assert is_finite(np.full(10, 1e308))
    assert not is_finite(np.array([1.0, np.inf]))
    assert not is_finite(np.array([np.inf, -np.inf]))


def test_an_input_that_ends_early_is_named(tmp_path: Path) -> None:
    """A short read is an error that names file and tensor; it never gives zeros."""
    inputs = write_inputs(tmp_path, [np.zeros(10, np.float32)])
    (tmp_path / "out").write_bytes(b"")
    work = FoldJob(inputs, [str(tmp_path / "out")], np.array([[1.0]]), [1.0], False)
    with pytest.raises(FormatError, match=r"0\.raw: tensor 'x': the file ends 40 bytes before"):
        fold([tensor(20)], work, Memory(2, 100, 100))


def test_a_replaced_input_is_refused(tmp_path: Path) -> None:
    """A file that was replaced after its header was scanned is not read."""
    inputs = write_inputs(tmp_path, [np.zeros(10, np.float32)])
    (tmp_path / "new").write_bytes(b"\0" * 40)
    (tmp_path / "new").replace(inputs[0].path)
    (tmp_path / "out").write_bytes(b"")
    work = FoldJob(inputs, [str(tmp_path / "out")], np.array([[1.0]]), [1.0], False)
    with pytest.raises(FormatError, match="changed"):
        fold([tensor(10)], work, Memory(2, 100, 100))
    with pytest.raises(FormatError, match="changed or vanished"):
        check_unchanged(inputs)


@once
def test_an_input_that_became_a_pipe_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening a FIFO does not wait for a writer."""
    inputs = write_inputs(tmp_path, [np.zeros(10, np.float32)])
    (tmp_path / "0.raw").unlink()
    os.mkfifo(tmp_path / "0.raw")
    real = os.open

    def opened(path: str, flags: int) -> int:
        assert flags & os.O_NONBLOCK
        return real(path, flags)

    monkeypatch.setattr(os, "open", opened)
    files = OpenInputs(inputs)
    with pytest.raises(FormatError, match=r"/0\.raw: tensor 'x': the file changed while it was"):
        files.read(tensor(10).sources[0], 0, np.empty(40, np.uint8), "x")


def test_inline_bytes_are_averaged_with_extents(tmp_path: Path) -> None:
    """A tensor may be stored in bands in one checkpoint and have no offset in another."""
    arrays = [np.arange(100, dtype=np.float32), np.ones(100, np.float32)]
    inputs = write_inputs(tmp_path, arrays)
    (tmp_path / "out").write_bytes(b"")
    one = tensor(100, 0, 2)
    inline = TensorSource(Inline(arrays[1].tobytes()), "float32", "<", 1)
    work = FoldJob(inputs, [str(tmp_path / "out")], np.array([[0.5, 0.5]]), [1.0], False)
    banded = one.sources[0]._replace(storage=Banded(0, 400))
    mixed = one._replace(sources=[banded, inline])
    fold([mixed], work, Memory(1, 30, 30))
    out = np.fromfile(tmp_path / "out", np.float32)
    assert out.tolist() == ((arrays[0] + 1) / 2).tolist()


def test_more_inputs_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files above the limit are opened again for each slab, with the same result."""
    monkeypatch.setattr("resource.getrlimit", lambda _: (66, 66))
    arrays = [np.full(1000, k, np.float32) for k in range(8)]
    before = len(os.listdir("/proc/self/fd"))
    (out,) = run(tmp_path, arrays, [[0.125] * 8], Memory(3, 100, 100))
    assert out.tolist() == [3.5] * 1000
    assert len(os.listdir("/proc/self/fd")) == before


@once
@settings(derandomize=True, deadline=None)
@given(st.integers(1 << 20, 1 << 34), st.integers(1, 256))
def test_the_bound_on_memory_is_kept(nbytes: int, jobs: int) -> None:
    """The buffers of all processes stay within the bound, however many processes were asked for."""
    memory = Memory.within(nbytes, jobs)
    assert 1 <= memory.jobs <= jobs
    assert memory.nbytes <= nbytes
    assert memory.jobs * memory.most * 24 <= nbytes


@pytest.mark.parametrize("flush", [1, 40_000], ids=["the first flush of many", "the last flush"])
def test_an_error_of_the_disk_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flush: int
) -> None:
    """A flush that fails during the fold ends the run, even if later flushes succeed."""
    if HERE["where"] == "pool":
        return  # whose share fails here, and is folded again
    flushed: list[int] = []

    def broken(descriptor: int) -> None:
        flushed.append(descriptor)
        if len(flushed) == 1:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", broken)
    tuning = Tuning(flush_nbytes=flush, pieces_per_batch=1)
    with pytest.raises(OSError, match="Input/output error"):
        run(tmp_path, [np.zeros(10_000, np.float32)], [[1.0]], Memory(2, 10, 10, tuning=tuning))


class Killing(Extent):
    """An extent whose reader is killed."""

    def read_into(self, files: Files, start: int, buffer: Bytes) -> None:
        """End the process that reads."""
        del files, start, buffer
        os.kill(os.getpid(), 9)


def test_a_worker_that_is_killed_is_reported(tmp_path: Path, where: str) -> None:
    """If the system kills a worker, the run ends with an error and not with half an output."""
    if where in ("in process", "threads", "pool"):
        return  # here it would be this very process
    inputs = write_inputs(tmp_path, [np.zeros(1000, np.float32)])
    (tmp_path / "out").write_bytes(b"")
    source = TensorSource(Killing(0, 4000), "float32", "<", 0)
    doomed = FoldTensor("x", 1000, [source], [Placement(0, "float32", "<")])
    job = FoldJob(inputs, [str(tmp_path / "out")], np.array([[1.0]]), [1.0], False)
    how = "SIGKILL" if where == "forked" else "BrokenProcessPool"
    message = (
        rf"^a worker process was killed \({how}\), perhaps because memory ran out; "
        r"use fewer --jobs or less --max-memory$"
    )
    memory = Memory(2, 100, 100)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        executor = Forked(2) if where == "forked" else Futures(pool)
        with pytest.raises(PolyakError, match=message):
            executors.fold([doomed], job, memory, executor=executor)


@pytest.mark.parametrize(
    "offset", [0, 4, 16, 60, 64, 100, 2020, 2048, 4032, 4036, 4080, 4092, 4097, 4099]
)
def test_where_a_tensor_lies_in_its_file_changes_nothing(
    tmp_path: Path, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers are placed where the system copies fast; the bits are the same."""
    preadv, pwrite = os.preadv, os.pwrite

    def address(buffer: memoryview) -> int:
        return int(np.frombuffer(buffer, np.uint8).ctypes.data)

    def read(descriptor: int, buffers: Sequence[memoryview], start: int) -> int:
        assert not 1 <= (address(buffers[0]) - start) % 4096 <= 63
        return preadv(descriptor, buffers, start)

    def write(descriptor: int, buffer: memoryview, start: int) -> int:
        assert not 1 <= (start - address(buffer)) % 4096 <= 63
        return pwrite(descriptor, buffer, start)

    monkeypatch.setattr(os, "preadv", read)
    monkeypatch.setattr(os, "pwrite", write)
    rng = np.random.default_rng(offset)
    arrays = [rng.normal(size=3000).astype(np.float32) for _ in range(3)]
    padding = np.zeros(offset, np.uint8)
    inputs = write_inputs(
        tmp_path, [np.concatenate([padding, array.view(np.uint8)]) for array in arrays]
    )
    (tmp_path / "out").write_bytes(b"")
    sources = [TensorSource(Extent(offset, 12_000), "float32", "<", k) for k in range(3)]
    tensor = FoldTensor("x", 3000, sources, [Placement(offset, "float32", "<")])
    coefficients = np.array([[0.5, 0.3, 0.2]])
    work = FoldJob(inputs, [str(tmp_path / "out")], coefficients, [1.0], False)
    fold([tensor], work, Memory(2, 1000, 1000))
    wide = [array.astype(np.float64) for array in arrays]
    expected = ((0.5 * wide[0] + 0.3 * wide[1]) + 0.2 * wide[2]).astype(np.float32)
    assert (tmp_path / "out").read_bytes() == bytes(offset) + expected.tobytes()


@pytest.mark.parametrize("slow", [True, False])
def test_the_next_batch_is_prefetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    """From a slow disk, all slabs but the first are prefetched, each once, before they are read."""
    tuning = Tuning(cache_speed=math.inf if slow else 0.0)
    monkeypatch.setitem(HERE, "executor", InProcess(tuning))
    events: list[tuple[str, int, int]] = []
    real = os.preadv

    def announced(descriptor: int, offset: int, nbytes: int, _advice: int) -> None:
        events.append(("announced", descriptor, offset))
        assert nbytes <= TUNING.piece * 4

    def read(descriptor: int, buffers: Any, offset: int) -> int:
        events.append(("read", descriptor, offset))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "posix_fadvise", announced)
    monkeypatch.setattr(os, "preadv", read)
    arrays = [np.ones(TUNING.piece * 40, np.float32)] * 2
    run(tmp_path, arrays, [[0.5, 0.5]], Memory.within(1 << 25, 1, tuning=tuning))
    reads = [event for event in events if event[0] == "read"]
    assert len(reads) == 80
    if not slow:  # from memory, that would be in vain
        assert events == reads
        return
    # How slow the disk is shows with the first batch, while the second one is at hand already.
    for _, descriptor, offset in reads[2 * 2 * TUNING.pieces_per_batch :]:
        announcement = events.index(("announced", descriptor, offset))
        assert announcement < events.index(("read", descriptor, offset))
    assert len(set(events)) == len(events)


@once
def test_slabs_hold_whole_bands_where_they_fit() -> None:
    """Tensors in bands are cut between bands: as many bands as a piece or the bound holds."""
    banded = TensorSource(Banded(0, 400), "float32", "<", 0)
    whole = FoldTensor("x", 100, [*tensor(100).sources, banded], [])
    for piece, most, length in ((20, 50, 14), (5, 50, 7), (5, 6, 6), (20, 10, 10), (1, 1, 1)):
        spans = [(s.start, s.stop) for s in cut_slabs([whole], piece, most)]
        assert spans == [(k, min(k + length, 100)) for k in range(0, 100, length)]


@once
def test_only_neighbouring_small_tensors_are_bundled() -> None:
    """Two tensors are bundled if gap, span and sizes are small and their types are the same."""
    small = TUNING.small_nbytes // 4

    def bundled(first: FoldTensor, second: FoldTensor, elements: int = 10_000) -> bool:
        cut = list(cut_slabs([first, second], elements, elements))
        return len(list(bundle_slabs(cut, elements))) == 1

    def at(offset: int, size: int = 10, **changes: Any) -> FoldTensor:
        return tensor(size, offset, 2)._replace(**changes)

    def moved(**changes: Any) -> Sequence[TensorSource]:
        same, other = at(40).sources
        return [same, other._replace(**changes)]

    assert bundled(at(0), at(40))
    assert bundled(at(0, small), at(4 * small))
    assert bundled(at(0), at(40 + TUNING.gap_nbytes))
    assert bundled(at(0), at(16 * 100 - 40), elements=100)
    apart = {
        "too large": (at(0), at(40, small + 1)),
        "after one too large": (at(0, small + 1), at(4 * small + 4)),
        "too far away": (at(0), at(41 + TUNING.gap_nbytes)),
        "before": (at(40), at(0)),
        "overlapping": (at(0), at(39)),
        "of another type": (at(0), at(40, sources=moved(dtype="float16"))),
        "in other bytes": (at(0), at(40, sources=moved(byteorder=">"))),
        "in another file": (at(0), at(40, sources=moved(file=0))),
        "by no offset": (at(0), at(40, sources=moved(storage=Inline(bytes(40))))),
        "written as another type": (at(0), at(40, targets=[Placement(40, "float16", "<")])),
        "written in other bytes": (at(0), at(40, targets=[Placement(40, "float32", ">")])),
    }
    assert [why for why, pair in apart.items() if bundled(*pair)] == []
    assert not bundled(at(0), at(16 * 100 - 39), elements=100)


@once
def test_batches_are_closed_by_bytes_or_by_number() -> None:
    """A batch has at most so many bytes of a checkpoint, or so many small tensors."""
    ones: list[Bundle] = [[Slab(tensor(1), 0, 1)] for _ in range(600)]
    assert [len(batch) for batch in gather_batches(ones, 4000)] == [256, 256, 88]
    assert [len(batch) for batch in gather_batches(ones[:11], 20)] == [5, 5, 1]
    pairs = [[*ones[0], *ones[0]]] * 150
    assert [len(batch) for batch in gather_batches(pairs, 4000)] == [128, 22]


@once
@pytest.mark.parametrize(
    ("bound", "memory"),
    [
        ((24 * 4096 * 3, 8), Memory(3, 4096, 4096, 24)),
        ((24 * 4096 * 2 + 5000, 8), Memory(2, 4200, 4200, 24)),
        ((1 << 30, 2), Memory(2, TUNING.piece, (1 << 30) // 48, 24)),
        ((40 * 4096, 1, 2), Memory(1, 4096, 4096, 40)),
        ((48 * 4096, 1, 3), Memory(1, 4096, 4096, 48)),
        ((1000, 4), Memory(1, 256, 256, 24)),
    ],
)
def test_memory_is_shared_out_to_the_byte(bound: tuple[int, ...], memory: Memory) -> None:
    """24 bytes an element, 8 more for each of several averages; at least 4,096 elements a job."""
    assert Memory.within(*bound) == memory


@once
def test_a_worker_has_the_buffers_that_the_bound_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one average and for several, an element needs the bytes that `Memory` counts."""
    for averages in (1, 2, 3):
        work = FoldJob([], [], np.ones((averages, 1)), [1.0] * averages, False)
        worker = Worker(work)
        buffers: list[int] = []

        def measured(nbytes: int, buffers: list[int] = buffers) -> Bytes:
            buffers.append(nbytes)
            return page_aligned(nbytes)

        monkeypatch.setattr(folding, "page_aligned", measured)
        worker._allocate(1000)
        element = Memory.within(1 << 30, 1, averages).element
        assert sum(buffers) == 1000 * element + 2048  # room to move the stored values


@once
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_worker_allocates_nothing_for_a_slab(tmp_path: Path, dtype: str) -> None:
    """It reads, folds, rounds and writes each slab in the buffers of the first."""
    values = (np.arange(200_000) % 1000).astype("u2" if dtype == "bfloat16" else dtype)
    inputs = write_inputs(tmp_path, [values] * 3)
    (tmp_path / "out").write_bytes(b"")
    sources = [TensorSource(Extent(0, values.nbytes), dtype, "<", k) for k in range(3)]
    tensor = FoldTensor("x", 200_000, sources, [Placement(0, dtype, "<")])
    first, *others = [[[slab]] for slab in cut_slabs([tensor], 20_000, 20_000)]
    assert len(others) == 9
    work = FoldJob(inputs, [str(tmp_path / "out")], np.ones((1, 3)), [3.0], False, kernel="numpy")
    with Worker(work) as worker:
        worker.fold(first)
        tracemalloc.start()
        for batch in others:
            worker.fold(batch)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 10_000  # a slab has 40,000 bytes or more
    assert (tmp_path / "out").read_bytes() == values.tobytes()


def test_bytes_and_seconds_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of tensors are counted, seconds are split in three, and progress reports the bytes."""
    inputs = write_inputs(tmp_path, [np.ones(1000, np.float32)] * 3)
    (tmp_path / "out").write_bytes(b"")
    work = FoldJob(inputs, [str(tmp_path / "out")], np.array([[0.5, 0.0, 0.5]]), [1.0], False)
    reported: list[int] = []
    flushed: list[int] = []
    monkeypatch.setattr(os, "fdatasync", flushed.append, raising=False)
    memory = Memory(2, 100, 100, tuning=Tuning(flush_nbytes=1000))
    totals = fold([tensor(1000, 0, 3)], work, memory, reported.append)
    assert (totals.bytes_read, totals.bytes_written) == (8000, 4000)
    assert sorted(reported) == [1600, 6400]
    assert flushed
    flushed.clear()
    executors.fold([tensor(1000, 0, 3)], work, memory, flush=False)
    assert not flushed
    assert min(totals[2:5]) > 0.0
    times = iter([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = Clock()
    clock.read(10)
    clock.fold()
    clock.write(5)
    clock.read(100)
    clock.fold()
    clock.write(50)
    assert clock.totals() == Totals(110, 55, 1.0 + 8.0, 2.0 + 16.0, 4.0 + 32.0)
    total = clock.totals().plus(Totals(1, 2, 3.0, 4.0, 5.0))
    assert total == Totals(111, 57, 12.0, 22.0, 41.0)


@once
def test_tensors_whose_bytes_differ_are_named(tmp_path: Path) -> None:
    """A differing byte at either end, in any checkpoint, or another length is found."""
    content = np.random.default_rng(0).integers(0, 256, 360, np.uint8)
    arrays = [content, content.copy(), content.copy()]
    arrays[2][90] += 1
    arrays[1][269] += 1
    inputs = write_inputs(tmp_path, arrays)

    def everywhere(start: int, stop: int) -> list[TensorSource]:
        return [TensorSource(Extent(start, stop - start), "uint8", "<", k) for k in range(3)]

    rows = [(f"t{k}", everywhere(90 * k, 90 * k + 90)) for k in range(4)]
    rows.append(("shorter", [*everywhere(0, 90)[:2], everywhere(0, 89)[2]]))
    reported: list[int] = []
    memory = Memory(1, 10, 10)
    found, totals = reading.find_differing(rows, inputs, memory, reported.append)
    assert found == {"t1", "t2", "shorter"}
    # In pieces of 80 bytes, and no further than to the first that differs.
    assert sum(reported) == totals.bytes_read == 270 + 240 + 260 + 270
    assert reading.find_differing(rows, inputs, memory)[0] == found
    assert reading.find_differing([("alone", everywhere(0, 90)[:1])], inputs, memory)[0] == set()
    for k in range(2):
        ending = everywhere(0, 90)
        ending[k] = TensorSource(Extent(300, 90), "uint8", "<", k)
        with pytest.raises(FormatError, match=rf"/{k}\.raw: tensor 'cut': the file ends 20 bytes"):
            reading.find_differing([("cut", ending)], inputs, memory)


@once
def test_pieces_are_the_stored_bytes_of_each_checkpoint(tmp_path: Path) -> None:
    """Pieces come slab by slab and checkpoint by checkpoint, as large as the bound allows."""
    arrays = [np.arange(100, dtype="<f4"), np.arange(100, dtype=">f8") / 3]
    inputs = write_inputs(tmp_path, arrays)
    sources = [
        TensorSource(Extent(0, 400), "float32", "<", 0),
        TensorSource(Extent(0, 800), "float64", ">", 1),
    ]
    bands = [TensorSource(Banded(0, 400), "float32", "<", 0), sources[1]]
    first = ReadTensor("x", 100, sources)
    memory = Memory(1, 1, 30)
    for one, most, held, length in (
        (first, 30, None, 10),
        (first, 30, 0, 30),
        (first, 30, 4, 6),
        (first, 2, None, 1),
        (first, 1000, None, 100),
        (first._replace(sources=bands), 30, None, 7),
        (first._replace(sources=bands), 15, None, 5),
        (first._replace(sources=bands), 1000, None, 100),
    ):
        got: list[list[bytes]] = [[], []]
        before = None
        for tensor, k, start, stop, stored in reading.read_pieces(
            [one], inputs, memory._replace(most=most), held
        ):
            assert (start, stop) == (length * len(got[k]), min(length * (len(got[k]) + 1), 100))
            assert not isinstance(stored, FormatError)
            assert tensor is one
            assert len(stored) == min(length, 100 - length * len(got[k])) * (4, 8)[k]
            if before is not None:  # of the checkpoint before, which is still there
                assert before[0].tobytes() == before[1]
            before = stored, stored.tobytes()
            got[k].append(stored.tobytes())
        assert [b"".join(parts) for parts in got] == [array.tobytes() for array in arrays]


@once
def test_a_piece_that_cannot_be_read_is_an_error_in_its_place(tmp_path: Path) -> None:
    """`read_pieces` yields the other pieces all the same; `read_values` raises the error."""
    inputs = write_inputs(tmp_path, [np.zeros(n, np.float32) for n in (10, 5, 10)])
    tensor = ReadTensor("x", 10, [TensorSource(Extent(0, 40), "float32", "<", k) for k in range(3)])
    memory = Memory(1, 100, 100)
    pieces = reading.read_pieces([tensor], inputs, memory)
    results = [(one.checkpoint, one.stored) for one in pieces]
    assert [k for k, _ in results] == [0, 1, 2]
    assert [len(stored) for k, stored in results if not isinstance(stored, FormatError)] == [40, 40]
    assert str(results[1][1]).endswith(
        "/1.raw: tensor 'x': the file ends 20 bytes before the tensor does"
    )
    with pytest.raises(FormatError, match=r"/1\.raw: tensor 'x': the file ends 20 bytes"):
        list(reading.read_values([tensor], inputs, memory))


@once
def test_values_are_float64_whatever_is_stored(tmp_path: Path) -> None:
    """Each tensor may have other types, byte orders, lengths and numbers of checkpoints."""
    types = {"float32": "<f4", "int16": ">i2", "uint8": "<u1"}
    content = [np.arange(100).astype(code) for code in types.values()]
    inputs = write_inputs(tmp_path, content)

    def compared(name: str, size: int, files: Sequence[int]) -> ReadTensor:
        sources = [
            TensorSource(Extent(0, size * content[k].itemsize), dtype, types[dtype][0], k)
            for k, dtype in enumerate(types)
            if k in files
        ]
        return ReadTensor(name, size, sources)

    tensors = [compared("a", 5, [0, 1, 2]), compared("b", 100, [0, 1, 2]), compared("c", 7, [1])]
    got: dict[str, list[list[list[float]]]] = {}
    for tensor, parts in reading.read_values(tensors, inputs, Memory(1, 160, 160)):
        assert all(slab.dtype == np.float64 for slab in parts)
        got.setdefault(tensor.name, []).append([slab.tolist() for slab in parts])
    assert got == {
        "a": [[[*range(5)]] * 3],
        "b": [[[*range(start, min(start + 40, 100))]] * 3 for start in (0, 40, 80)],
        "c": [[[*range(7)]]],
    }


@once
def test_a_block_that_is_decoded_whole_must_fit_the_bound(tmp_path: Path) -> None:
    """The error names file, tensor, needed and available bytes; an exact fit is accepted."""

    class Chunked(Extent):
        block_nbytes = 240

    inputs = write_inputs(tmp_path, [np.ones(2, np.float32)] * 2)
    sources = [
        TensorSource(Extent(0, 8), "float32", "<", 0),
        TensorSource(Chunked(0, 8), "float32", "<", 1),
    ]
    tensors = [ReadTensor("x", 2, sources)]
    assert len(list(reading.read_pieces(tensors, inputs, Memory(1, 10, 10)))) == 2
    with pytest.raises(
        FormatError,
        match=r"/1\.raw: tensor 'x' is stored in chunks of 240 bytes.* at most 216 bytes$",
    ):
        list(reading.read_pieces(tensors, inputs, Memory(1, 9, 9)))


def test_a_nan_behind_a_checkpoint_that_does_not_count_is_named(tmp_path: Path) -> None:
    """The search for the culprit skips checkpoints of coefficient 0."""
    arrays = [np.full(10, k, np.float32) for k in range(3)]
    arrays[2][3] = -np.inf
    with pytest.raises(
        MismatchError,
        match=r"/2\.raw: tensor 'x' holds -inf \(element 3\), but \S*/0\.raw holds 0; expected "
        r"finite numbers, or the same infinity in every checkpoint\. Copy the newest one's with "
        r"--exclude-tensors 'x', or use --allow-nonfinite$",
    ):
        run(tmp_path, arrays, [[0.5, 0.0, 0.5]], Memory(2, 10, 10))


@pytest.mark.parametrize("piece", [3, 7, 1000])
def test_an_infinity_that_all_have_is_a_constant(tmp_path: Path, piece: int) -> None:
    """It is kept whatever the signs of the coefficients, and counted once for each element."""
    arrays = [np.full(20, k, np.float32) for k in range(3)]
    for array in arrays:
        array[[2, 3, 19]] = [np.inf, -np.inf, np.inf]
    expected = np.full(20, 2 * 1.5 - 0.5 * 0, np.float32)
    expected[[2, 3, 19]] = [np.inf, -np.inf, np.inf]
    (out,) = run(tmp_path, arrays, [[-0.5, 0.0, 1.5]], Memory(2, piece, piece))
    assert out.tobytes() == expected.tobytes()
    assert FOUND[-1].constants
    assert sum(one.infinite for one in FOUND[-1].constants) == 3
    assert {(one.name, one.nan) for one in FOUND[-1].constants} == {("x", 0)}


def test_a_checkpoint_that_does_not_count_needs_no_such_infinity(tmp_path: Path) -> None:
    """Each average has the constants of its own checkpoints; of those that differ none is made."""
    arrays = [np.full(4, k, np.float32) for k in range(3)]
    arrays[1][2] = arrays[2][2] = -np.inf
    none, newer = run(tmp_path, arrays, [[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]], Memory(1, 10, 10))
    assert none.tolist() == [0, 0, 0, 0]
    assert newer.tolist() == [1.5, 1.5, -np.inf, 1.5]
    with pytest.raises(MismatchError, match=r"1\.raw: tensor 'x' holds -inf .*/0\.raw holds 0;"):
        run(tmp_path, arrays, [[0.0, 0.5, 0.5], [0.25, 0.25, 0.5]], Memory(1, 10, 10))


def test_other_infinities_are_no_constant(tmp_path: Path) -> None:
    """The sign counts, and so does the place."""
    for places in (([3], [4]), ([3], [3, 4]), ([3, 4], [4])):
        arrays = [np.zeros(9, np.float32) for _ in places]
        for array, where in zip(arrays, places, strict=True):
            array[where] = np.inf
        with pytest.raises(MismatchError, match=r"holds inf \(element [34]\), but \S* holds 0;"):
            run(tmp_path, arrays, [[0.5, 0.5]], Memory(1, 10, 10))
    arrays = [np.array([1, sign * np.inf], np.float32) for sign in (1, -1)]
    with pytest.raises(MismatchError, match=r"0\.raw: .* holds inf .*1\.raw holds -inf;"):
        run(tmp_path, arrays, [[0.5, 0.5]], Memory(1, 10, 10))


def test_nan_that_all_have_keep_the_newest_s_bits(tmp_path: Path) -> None:
    """Among finite numbers only; NaN throughout, or in one checkpoint alone, is no constant."""
    bits = np.array([0x3F800000, 0x7FC00001, 0x7FC00002], np.uint32)
    arrays = [bits.view(np.float32), (bits + np.array([0, 4, 8], np.uint32)).view(np.float32)]
    (out,) = run(tmp_path, arrays, [[0.5, 0.5]], Memory(1, 10, 10))
    assert out.tobytes() == arrays[1].tobytes()
    assert [one.nan for one in FOUND[-1].constants] == [2]
    message = r"^tensor 'x' holds nan \(element 0\) in every .* may have diverged; expected"
    with pytest.raises(MismatchError, match=message):
        run(tmp_path, [np.full(5, np.nan, np.float32)] * 2, [[0.5, 0.5]], Memory(1, 10, 10))
    with pytest.raises(MismatchError, match=r"0\.raw: .* holds nan \(element 1\); expected"):
        run(tmp_path, arrays[:1], [[1.0]], Memory(1, 10, 10))


def test_a_constant_is_read_once_more_and_no_slab_oftener(tmp_path: Path) -> None:
    """A tensor that is -inf throughout is read twice; its neighbours in a bundle are too."""
    arrays = [np.full(1000, -np.inf, np.float32) for _ in range(3)]
    (out,) = run(tmp_path, arrays, [[0.25, 0.25, 0.5]], Memory(1, 10, 10))
    assert np.isneginf(out).all()
    assert FOUND[-1].totals.bytes_read == 2 * 3 * 4000


def test_a_constant_that_the_wanted_type_lacks_is_refused(tmp_path: Path) -> None:
    """float8_e4m3fn has no infinity; types that have one keep it."""
    values = [1.0, -np.inf]
    assert folded_once(tmp_path, values, "float16", 1.0) == b"\x00\x3c\x00\xfc"
    assert folded_once(tmp_path, values, "float8_e5m2", 1.0) == b"\x3c\xfc"
    message = "holds -inf, which float8_e4m3fn cannot store; choose a wider --dtype"
    with pytest.raises(MismatchError, match=message):
        folded_once(tmp_path, values, "float8_e4m3fn", 1.0)


def folded_once(
    folder: Path,
    values: Sequence[float],
    stored: str,
    coefficient: float,
    allow_nonfinite: bool = False,
) -> bytes:
    """Return the bytes of one float64 tensor, averaged into another type."""
    inputs = write_inputs(folder, [np.array(values, np.float64)])
    (folder / "out").write_bytes(b"")
    source = TensorSource(Extent(0, 8 * len(values)), "float64", "<", 0)
    one = FoldTensor("x", len(values), [source], [Placement(0, stored, "<")])
    work = FoldJob(inputs, [str(folder / "out")], np.array([[coefficient]]), [1.0], allow_nonfinite)
    fold([one], work, Memory(2, 10, 10))
    return (folder / "out").read_bytes()


def test_an_average_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Overflow of float64, and of the wanted type, are different errors; one names the value."""
    message = (
        "^the average of tensor 'x' overflows float64, although every checkpoint is finite; use "
        "--allow-nonfinite to write it anyway$"
    )
    with pytest.raises(MismatchError, match=message):
        folded_once(tmp_path, [1.0, 1e308], "float64", 10.0)
    message = (
        "^the average of tensor 'x' holds -70000, which float16 cannot store; choose a wider "
        "--dtype$"
    )
    with pytest.raises(MismatchError, match=message):
        folded_once(tmp_path, [1.0, -70000.0], "float16", 1.0)
    assert folded_once(tmp_path, [1.0, -65504.0], "float16", 1.0) == b"\x00\x3c\xff\xfb"
    allowed = folded_once(tmp_path, [1.0, -70000.0], "float16", 1.0, allow_nonfinite=True)
    assert allowed == b"\x00\x3c\x00\xfc"


@pytest.mark.parametrize("gone", [True, False])
def test_an_input_that_changes_before_it_is_fetched_ahead_is_named(
    tmp_path: Path, gone: bool
) -> None:
    """Prefetching raises no error; the read that follows names the file."""
    inputs = write_inputs(tmp_path, [np.zeros(20_000, np.float32)] * 3)
    (tmp_path / "out").write_bytes(b"")
    if gone:
        (tmp_path / "1.raw").unlink()
        what = "cannot be read: No such file or directory"
    else:
        (tmp_path / "1.raw").write_bytes(b"")
        what = "tensor 'x': the file changed while it was read"
    work = FoldJob(inputs, [str(tmp_path / "out")], np.array([[0.5, 0.25, 0.25]]), [1.0], False)
    with pytest.raises(FormatError, match=rf"/1\.raw: {what}"):
        memory = Memory(2, 20_000, 20_000, tuning=Tuning(cache_speed=math.inf))
        fold([tensor(20_000, 0, 3)], work, memory)
    with pytest.raises(FormatError, match=r"/1\.raw: changed or vanished while it was read"):
        check_unchanged(inputs)
    check_unchanged([inputs[0], inputs[2]])


@once
def test_as_many_inputs_stay_open_as_the_process_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 descriptors are left for other uses; without a limit all inputs stay open."""
    inputs = write_inputs(tmp_path, [np.zeros(1, np.float32)] * 3)
    for limit, room in ((65, 1), (64, 0), (10, 0), (resource.RLIM_INFINITY, 3)):
        monkeypatch.setattr("resource.getrlimit", lambda _, limit=limit: (limit, limit))
        assert OpenInputs(inputs).limit == room
        with OpenInputs(inputs) as files:
            for source in tensor(1, 0, 3).sources:
                files.read(source, 0, np.empty(4, np.uint8), "x")
            assert len(files.kept) == room


@once
@pytest.mark.parametrize("call", ["fdatasync", "fsync"])
def test_outputs_are_flushed_during_the_fold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """After enough bytes all outputs are flushed, one flush at a time; macOS has only fsync."""
    flushed: list[int] = []
    go_on = threading.Event()

    def flush(descriptor: int) -> None:
        assert go_on.wait(60)
        flushed.append(descriptor)

    monkeypatch.delattr(os, "fdatasync", raising=False)
    monkeypatch.setattr(os, call, flush, raising=False)
    outputs = [LocalOutput(str(tmp_path / name), create=True) for name in "ab"]
    with executors._Flusher(outputs, 100) as flusher:
        flusher.count(60)
        flusher.count(39)
        none = flusher.flushing
        flusher.count(1)
        first = flusher.flushing
        assert none is None
        assert first is not None
        flusher.count(100)  # it waits for the one that goes on
        assert flusher.flushing is first
        go_on.set()
        first.result(60)
        flusher.count(0)
        second = flusher.flushing
        assert second is not first
        assert second is not None
        second.result(60)
        flusher.count(99)
        assert flusher.flushing is second
    assert flushed == [output.fileno() for output in outputs] * 2
    for output in outputs:
        output.close()


@once
def test_an_error_of_the_disk_while_flushing_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next count or the end raises the error; it does not hide an earlier one."""

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdatasync", full, raising=False)

    def written(*, again: bool = False, error: Exception | None = None) -> None:
        with (
            LocalOutput(str(tmp_path / "out")) as output,
            executors._Flusher([output], 100) as flusher,
        ):
            flusher.count(100)
            assert flusher.flushing is not None
            flusher.flushing.exception(60)
            if again:
                flusher.count(100)
                pytest.fail("the second portion did not notice")
            if error:
                raise error

    (tmp_path / "out").touch()
    for again in (True, False):
        with pytest.raises(OSError, match="No space left"):
            written(again=again)
    with pytest.raises(ValueError, match=r"^other$"):
        written(error=ValueError("other"))


def test_the_caller_s_errstate_changes_nothing(tmp_path: Path) -> None:
    """Underflow, infinity and NaN raise no error, whatever the caller's np.errstate."""
    with np.errstate(all="raise"):
        tiny = folded_once(tmp_path, [5e-324, 1e308], "float64", 0.25)
        endless = folded_once(tmp_path, [np.inf, 1e308], "float64", 10.0, allow_nonfinite=True)
    assert tiny == np.array([0.0, 2.5e307]).tobytes()
    assert endless == np.array([np.inf, np.inf]).tobytes()


# --- what executors have in common ----------------------------------------------------------------


def test_a_run_that_is_interrupted_ends_with_its_files_closed(tmp_path: Path) -> None:
    """An exception in the caller's progress stops every executor; the next run is complete."""
    arrays = [np.ones(5000, np.float32)] * 2
    inputs = write_inputs(tmp_path, arrays)
    (tmp_path / "out").write_bytes(b"")
    job = FoldJob(inputs, [str(tmp_path / "out")], np.array([[0.5, 0.5]]), [1.0], False)
    memory = Memory(2, 10, 10, tuning=Tuning(pieces_per_batch=1))
    before = len(os.listdir("/proc/self/fd"))

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fold([tensor(5000, 0, 2)], job, memory, interrupt)
    assert len(os.listdir("/proc/self/fd")) == before
    fold([tensor(5000, 0, 2)], job, memory)
    assert np.fromfile(tmp_path / "out", np.float32).tolist() == [1.0] * 5000


def test_a_full_disk_is_the_error_of_the_system(tmp_path: Path) -> None:
    """Every executor raises the system's error, with its number."""
    inputs = write_inputs(tmp_path, [np.ones(1000, np.float32)])
    job = FoldJob(inputs, ["/dev/full"], np.ones((1, 1)), [1.0], False)
    with pytest.raises(OSError, match="No space left on device") as caught:
        fold([tensor(1000)], job, Memory(2, 100, 100))
    assert caught.value.errno == errno.ENOSPC


def test_a_tensor_in_blocks_of_several_files_is_averaged(tmp_path: Path) -> None:
    """Blocks of rows, and blocks of columns, are read from the files that hold them."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(4, 6)).astype(np.float32) for _ in range(2)]
    rows = [arrays[0][:2], arrays[0][2:]]
    columns = [arrays[1][:, :2], arrays[1][:, 2:]]
    inputs = write_inputs(tmp_path, [*rows, *columns])
    by_rows = Grid(
        (4, 6),
        4,
        (
            GridPart((0, 0), (2, 6), Extent(0, 48, 0)),
            GridPart((2, 0), (2, 6), Extent(0, 48, 1)),
        ),
    )
    by_columns = Grid(
        (4, 6),
        4,
        (
            GridPart((0, 0), (4, 2), Extent(0, 32, 0)),
            GridPart((0, 2), (4, 4), Extent(0, 64, 1)),
        ),
    )
    (tmp_path / "out").write_bytes(b"")
    job = FoldJob(inputs, [str(tmp_path / "out")], np.array([[0.25, 0.75]]), [1.0], False)
    sources = [
        TensorSource(by_rows, "float32", "<", 0),
        TensorSource(by_columns, "float32", "<", 2),
    ]
    sharded = FoldTensor("x", 24, sources, [Placement(0, "float32", "<")])
    expected = 0.25 * arrays[0].astype(np.float64) + 0.75 * arrays[1].astype(np.float64)
    for piece in (1, 5, 6, 24):
        fold([sharded], job, Memory(2, piece, piece))
        assert (tmp_path / "out").read_bytes() == expected.astype(np.float32).tobytes()
    columns[1][3, 3] = np.nan
    inputs = write_inputs(tmp_path, [*rows, *columns])
    job = FoldJob(inputs, job.outputs, job.coefficients, job.divisors, False)
    with pytest.raises(MismatchError, match=r"/3\.raw: tensor 'x' holds nan \(element 23\)"):
        fold([sharded], job, Memory(2, 5, 5))


@once
def test_no_thread_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to do, and the threads that could be started have ended."""
    inputs = write_inputs(tmp_path, [np.zeros(1000, np.float32)])
    (tmp_path / "out").write_bytes(b"")
    job = FoldJob(inputs, [str(tmp_path / "out")], np.array([[1.0]]), [1.0], False)
    start = threading.Thread.start
    begun: list[threading.Thread] = []

    def fail(thread: threading.Thread) -> None:
        if begun:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(PolyakError, match=r"^no worker thread can be started: can't start new"):
        executors.fold([tensor(1000)], job, Memory(2, 100, 100), executor=Threads(2))
    assert not begun[0].is_alive()


@once
def test_threads_share_the_limit_of_open_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All workers of a process together leave 64 descriptors, and one for each output."""
    inputs = write_inputs(tmp_path, [np.zeros(1, np.float32)] * 3)
    for name in ("out", "other"):
        (tmp_path / name).write_bytes(b"")
    outputs = [str(tmp_path / "out"), str(tmp_path / "other")]
    job = FoldJob(inputs, outputs, np.ones((2, 3)), [1.0, 1.0], False)
    monkeypatch.setattr("resource.getrlimit", lambda _: (64 + 50, 64 + 50))
    for threads, room in ((1, 50), (2, 24), (5, 8), (50, 0)):
        with Worker(job, team=Team(threads)) as worker:
            assert worker.inputs.limit == room


class Slow(Extent):
    """An extent that takes its time, as a far disk does."""

    reads: ClassVar[list[int]] = []

    def read_into(self, files: Files, start: int, buffer: Bytes) -> None:
        """Wait, and read."""
        self.reads.append(start)
        time.sleep(0.01)
        super().read_into(files, start, buffer)


@once
def test_threads_that_are_stopped_read_no_further_checkpoint(tmp_path: Path) -> None:
    """After an interrupt a slab of many checkpoints is given up, and no thread is left."""
    many = 2000
    inputs = write_inputs(tmp_path, [np.ones(2, np.float32)])
    (tmp_path / "out").write_bytes(b"")
    slow = FoldTensor(
        "x",
        2,
        [TensorSource(Slow(0, 8), "float32", "<", 0)] * many,
        [Placement(0, "float32", "<")],
    )
    quick = FoldTensor("y", 2, [TensorSource(Extent(0, 8), "float32", "<", 0)] * many, slow.targets)
    job = FoldJob(inputs, [str(tmp_path / "out")], np.ones((1, many)), [1.0], False)
    batches = [[[Slab(each, 0, 2)]] for each in (quick, slow, slow)]
    Slow.reads.clear()
    steps = Threads(2).run(job, batches)
    next(steps)
    steps.close()
    assert len(Slow.reads) < many
    assert not [one for one in threading.enumerate() if one.name == "polyak-fold"]


def test_a_tensor_is_written_into_blocks_of_several_files(tmp_path: Path) -> None:
    """Each block gets its part of the average, for slabs of any length; all other bytes stay."""
    values = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    inputs = write_inputs(tmp_path, [values])
    bounds = [((0, 0, 0), (3, 4, 2)), ((0, 0, 2), (2, 1, 3)), ((0, 1, 2), (2, 3, 3))]
    bounds.append(((2, 0, 2), (1, 4, 3)))
    blocks, ends = [], [3, 3]
    for k, (start, shape) in enumerate(bounds):
        extent = Extent(ends[k % 2], 4 * int(np.prod(shape)), k % 2)
        blocks.append(GridPart(start, shape, extent))
        ends[k % 2] += extent.nbytes
    place = Placement(0, "float32", "<", 1, Grid((3, 4, 5), 4, tuple(blocks)))
    source = TensorSource(Extent(0, values.nbytes), "float32", "<", 0)
    outputs = [str(tmp_path / name) for name in ("other", "a", "b")]
    expected = [bytearray(b"xyz") for _ in outputs]
    for (start, shape), block in zip(bounds, blocks, strict=True):
        part = values[tuple(slice(n, n + k) for n, k in zip(start, shape, strict=True))]
        expected[1 + block.extent.file] += part.tobytes()
    for piece in (1, 7, 20, 60):
        for path in outputs:
            Path(path).write_bytes(b"xyz")
        job = FoldJob(inputs, outputs, np.ones((1, 1)), [1.0], False)
        fold([FoldTensor("x", 60, [source], [place])], job, Memory(2, piece, piece))
        assert [Path(path).read_bytes() for path in outputs] == expected


@once
def test_threads_fold_with_the_compiled_kernel_unless_they_would_share_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numpy kernel and a limit of address space want processes; one job wants nothing."""
    inputs = write_inputs(tmp_path, [np.ones(1000, np.float32)])
    job = FoldJob(inputs, [str(tmp_path / "out")], np.array([[1.0]]), [1.0], False)
    limits = {resource.RLIMIT_AS: resource.RLIM_INFINITY}
    monkeypatch.setattr("resource.getrlimit", lambda which: (limits[which], limits[which]))
    several = Memory(2, 100, 100, tuning=Tuning(fork_nbytes=0))
    chosen = SimpleNamespace(NAME="compiled")
    monkeypatch.setattr(executors, "find_kernel", lambda _: chosen)
    for name, kind in (("numpy", Forked), ("compiled", Threads)):
        chosen.NAME = name
        assert isinstance(executors.choose_executor(job, several), kind)
        for memory in (Memory(1, 100, 100, tuning=several.tuning), Memory(2, 100, 100)):
            assert isinstance(executors.choose_executor(job, memory), InProcess)
    limits[resource.RLIMIT_AS] = 1 << 30
    assert isinstance(executors.choose_executor(job, several), Forked)


@once
def test_without_a_thread_the_flush_is_left_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flushing meanwhile is only faster: a run does without it."""

    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    with (
        LocalOutput(str(tmp_path / "out"), create=True) as output,
        executors._Flusher([output], 10) as flusher,
    ):
        flusher.count(100)
        flusher.count(100)
        assert flusher.flushing is None


@once
@pytest.mark.parametrize("checkpoints", [1, 2, 60, 1000])
@pytest.mark.parametrize("jobs", [1, 2, 8])
def test_what_is_fetched_ahead_is_bounded_for_any_number_of_checkpoints(
    checkpoints: int, jobs: int
) -> None:
    """Two batches a worker of all checkpoints fit the bound; for few of them requests are large."""
    memory = Memory.within(256 << 20, jobs).for_objects(checkpoints)
    ahead = min(TUNING.ahead_nbytes, TUNING.ahead_of_all_nbytes // jobs)
    for dtype in ("float16", "float32", "float64"):
        width = np.dtype(dtype).itemsize
        sources = [TensorSource(Extent(0, width << 23), dtype, "<", 0)]
        wide = FoldTensor("x", 1 << 23, sources, [Placement(0, dtype, "<")])
        slabs = cut_slabs([wide], memory.piece, memory.most)
        batches = [*gather_batches([[slab] for slab in slabs], memory.batch_nbytes)]
        nbytes = [width * sum(map(count_elements, batch)) for batch in batches]
        assert 2 * checkpoints * max(nbytes) <= ahead
        assert nbytes[0] >= min(TUNING.request_nbytes, ahead // (4 * checkpoints))
