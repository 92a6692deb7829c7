"""Shares of a fold on pools without order, memory or luck; those of `tests/remote` are real ones.

The pools here pickle all that is sent and returned, as those of other machines do.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import json
import pickle
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import polyak_cli
from polyak_cli import average, errors, verify
from polyak_cli.averaging import options, records
from polyak_cli.cli import rendering
from polyak_cli.engine import clusters, executors, kernel, shares, slabs
from polyak_cli.engine.executors import Executor
from polyak_cli.engine.folding import FoldJob
from polyak_cli.engine.pools import Futures
from polyak_cli.engine.sinks import Parcel
from polyak_cli.engine.slabs import (
    Batch,
    FoldTensor,
    Memory,
    TensorSource,
    Tuning,
    bundle_slabs,
    cut_slabs,
    gather_batches,
)
from polyak_cli.errors import FormatError, MismatchError, MissingExtraError, PolyakError, UsageError
from polyak_cli.pipeline.stages import Options
from polyak_cli.storage import mirrors, uploads
from polyak_cli.tensors import FLOATS, Extent, Placement, itemsize
from tests.command import ROOT, SAMPLES, environment, one_line, polyak
from tests.kernels import COMPILED, KERNELS, use_kernel
from tests.oracle import naive_average, read_model, write_model
from tests.test_determinism import FILES, SCHEMES, digest
from tests.test_engine import write_inputs


class Pool(concurrent.futures.Executor):
    """One thread that pickles tasks and results, and counts them; it can do every task twice.

    Attributes:
        forgets: whether its worker never keeps a job.
        order: chooses which of the waiting tasks is next, and every task is done twice; None for
            the order in which they come.
    """

    def __init__(self, *, forgets: bool = False, order: random.Random | None = None) -> None:
        self.forgets = forgets
        self.order = order
        self.pool = ThreadPoolExecutor(1)
        self.lock = threading.Lock()
        self.waiting: list[tuple[Future[Any], bytes]] = []
        self.most = 0
        self.sizes: list[tuple[bool, int]] = []  # with the job or not, and bytes

    def submit(self, call: Any, /, *arguments: Any, **options: Any) -> Future[Any]:
        """Have a task done, not necessarily the next."""
        future: Future[Any] = Future()
        assert not options
        sent = pickle.dumps((call, arguments))
        with self.lock:
            self.sizes.append((bool(arguments[2]), len(sent)))
            self.waiting.append((future, sent))
            self.most = max(self.most, len(self.waiting))
        self.pool.submit(self.work)
        return future

    def work(self) -> None:
        """Do one of the waiting tasks."""
        with self.lock:
            k = self.order.randrange(len(self.waiting)) if self.order else 0
            future, sent = self.waiting[k]
        for _ in range(2 if self.order else 1):
            if self.forgets:
                shares._jobs.clear()
            call, arguments = pickle.loads(sent)
            result = pickle.loads(pickle.dumps(call(*arguments)))
        with self.lock:
            del self.waiting[k]
        future.set_result(result)


def tensor(size: int, offset: int = 0, count: int = 1) -> FoldTensor:
    """Return a float32 tensor that lies at the same offset in all checkpoints."""
    sources = [TensorSource(Extent(offset, size * 4), "float32", "<", k) for k in range(count)]
    return FoldTensor("x", size, sources, [Placement(offset, "float32", "<")])


def make_job(folder: Path, *arrays: np.ndarray) -> FoldJob:
    """Return a job that averages whole files."""
    (folder / "out").write_bytes(b"")
    inputs = write_inputs(folder, arrays)
    coefficients = np.full((1, len(arrays)), 1 / len(arrays))
    return FoldJob(inputs, [str(folder / "out")], coefficients, [1.0], False)


#: So small that a few numbers are many batches.
TINY = Memory(1, 10, 10, tuning=Tuning(pieces_per_batch=5))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every batch a share, wherever it ends."""
    monkeypatch.setattr(shares, "EDGE", 1)


# --- outputs that workers do not see --------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 90), st.integers(0, 70)), min_size=1, max_size=8),
    st.integers(0, 100),
    st.sampled_from([0, 64, 256]),
    st.integers(1, 2000),
    st.integers(0, 9),
)
def test_parts_have_the_bytes_of_a_local_output(
    sizes: list[tuple[int, int]], head: int, part: int, nbytes: int, seed: int
) -> None:
    """Sent in any order and twice, with the bytes between tensors; or given back (part 0)."""
    drawn = np.random.default_rng(len(sizes))
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        tensors, offset = [], 4 * head
        for size, gap in sizes:
            tensors.append(tensor(size, offset, 2))
            offset += 4 * (size + gap)
        job = make_job(folder, *(drawn.random(offset // 4, np.float32) for _ in range(2)))
        out = folder / "out"
        out.write_bytes(skeleton := drawn.bytes(offset))
        executors.fold(tensors, job, TINY)
        expected = out.read_bytes()
        out.write_bytes(skeleton)
        sent: dict[int, bytes] = {}
        upload = uploads.Upload("s3://bucket/o", "id", "token", part, offset)

        def keep(_: object, number: int, content: bytearray) -> str:
            sent[number] = bytes(content)
            return f"receipt {number}"

        receipts: dict[str, dict[int, str]] = {}
        patch.setattr(uploads, "send_part", keep)
        patch.setattr(mirrors, "is_mirrored", lambda path: path == str(out))
        patch.setattr(mirrors, "locate", lambda _: "s3://bucket/o")
        patch.setattr(mirrors, "find_upload", lambda _: upload if part else None)
        patch.setattr(mirrors, "add_receipts", lambda found: [
            receipts.setdefault(path, {}).update(one) for path, one in found.items()
        ])  # fmt: skip
        work = replace(job, parts=[part] if part else ())
        executor = Futures(Pool(order=random.Random(seed)), share_nbytes=nbytes)
        memory = TINY.align() if seed % 2 else TINY
        executors.fold(tensors, work, memory, executor=executor, flush=False)
        found = bytearray(out.read_bytes())
        for number, content in sent.items():
            found[(number - 1) * part : (number - 1) * part + len(content)] = content
            assert len(content) == min(part, offset - (number - 1) * part)
        assert found == expected
        numbers = {number: f"receipt {number}" for number in sent}
        assert receipts == ({str(out): numbers} if part else {})
        assert bool(part) == (out.read_bytes() == skeleton)


# --- cutting --------------------------------------------------------------------------------------


def places(batches: Iterable[Batch]) -> Iterator[tuple[int, int]]:
    """Yield where each slab of batches is written."""
    for batch in batches:
        for bundle in batch:
            for slab in bundle:
                offset = slab.tensor.targets[0].offset
                yield offset + 4 * slab.start, offset + 4 * slab.stop


@settings(derandomize=True, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 400_000), st.integers(0, 9)), min_size=1, max_size=20),
    st.integers(1, 3_000_000),
    st.integers(1 << 20, 4 << 20),
)
def test_no_block_of_an_output_belongs_to_two_shares(
    tensors: list[tuple[int, int]], nbytes: int, bound: int
) -> None:
    """All is written once, and blocks of 32 KiB have one writer, whatever lies between tensors."""
    memory = Memory.within(bound, 1).align()
    end, made = 8, []
    for size, gap in tensors:
        made.append(tensor(size, end + 4 * gap))
        end = end + 4 * gap + 4 * size
    slabs = cut_slabs(made, memory.piece, memory.most, aligned=memory.aligned)
    batches = [*gather_batches(bundle_slabs(slabs, memory.piece), memory.batch_nbytes)]
    cut = [*shares.gather_shares(batches, nbytes)]
    assert [batch for share in cut for batch in share] == batches
    written = sorted(places(batches))
    expected = [(one.targets[0].offset, one.targets[0].offset + 4 * one.size) for one in made]
    joined: list[tuple[int, int]] = []
    for start, stop in written:
        if joined and joined[-1][1] == start and start not in dict(expected):
            joined[-1] = joined[-1][0], stop
        else:
            joined.append((start, stop))
    assert joined == expected
    owners: dict[int, int] = {}
    for number, share in enumerate(cut):
        for start, stop in places(share):
            for block in range(start >> 15, (stop - 1 >> 15) + 1):
                assert owners.setdefault(block, number) == number


def test_a_large_tensor_is_cut_into_shares_that_read_as_much_as_is_wanted() -> None:
    """A share is complete at the first good place behind the wanted size."""
    memory = Memory.within(32 << 20, 1).align()
    slabs = cut_slabs([tensor(10 << 20, 1000, 3)], memory.piece, memory.most, aligned=True)
    batches = gather_batches(bundle_slabs(slabs, memory.piece), memory.batch_nbytes)
    read = [
        3 * sum(stop - start for start, stop in places(share))
        for share in shares.gather_shares(batches, 20 << 20)
    ]
    assert sum(read) == 3 * (40 << 20)
    assert all(20 << 20 <= nbytes <= 27 << 20 for nbytes in read[:-1])


@pytest.mark.parametrize("dtype", FLOATS)
def test_even_the_tightest_bound_on_memory_leaves_places_to_cut(dtype: str) -> None:
    """Slabs are never so small that all shares would be one, whatever the type."""
    memory = Memory.within(1 << 20, 1).align()
    width = itemsize(dtype)
    sources = [TensorSource(Extent(1000, width << 24), dtype, "<", 0)]
    one = FoldTensor("x", 1 << 24, sources, [Placement(8 * 125, dtype, "<")])
    slabs = cut_slabs([one], memory.piece, memory.most, aligned=True)
    batches = gather_batches(bundle_slabs(slabs, memory.piece), memory.batch_nbytes)
    assert len(list(shares.gather_shares(batches, 1 << 20))) > 12


def test_files_of_an_output_may_end_anywhere() -> None:
    """Two shards have no common block, however small they are."""
    one, other = tensor(10), tensor(10)
    other = other._replace(targets=[other.targets[0]._replace(file=1)])
    batches = [*gather_batches([[slab] for slab in cut_slabs([one, other], 99, 99)], 1)]
    assert len(list(shares.gather_shares(batches, 1))) == 2


# --- sending --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
def test_shares_are_sent_in_a_bounded_window_and_the_job_once(tmp_path: Path) -> None:
    """Few shares are submitted at a time, and only the first ones carry the job."""
    arrays = [np.arange(5000, dtype=np.float32) * k for k in range(40)]
    job = make_job(tmp_path, *arrays)
    pool = Pool()
    iterated: list[int] = []

    def one_by_one() -> Iterator[FoldTensor]:
        for k in range(100):
            iterated.append(k)
            assert len(iterated) <= len(pool.sizes) + 3  # the table is not iterated over at once
            yield tensor(50, 200 * k, 40)

    executors.fold(one_by_one(), job, TINY, executor=Futures(pool, share_nbytes=1))
    expected = sum(array.astype(np.float64) / 40 for array in arrays)
    assert np.allclose(np.fromfile(tmp_path / "out", np.float32), expected)
    assert pool.most <= 3
    assert [whole for whole, _ in pool.sizes] == [True] * 3 + [False] * 97
    assert max(size for whole, size in pool.sizes if not whole) < 2000


@pytest.mark.usefixtures("small")
def test_a_worker_that_does_not_know_the_job_gets_it(tmp_path: Path) -> None:
    """A worker that a pool started later gets the job with its share."""
    job = make_job(tmp_path, np.arange(300, dtype=np.float32))
    pool = Pool(forgets=True)
    totals = executors.fold([tensor(300)], job, TINY, executor=Futures(pool, share_nbytes=1)).totals
    assert len(pool.sizes) == 6 + 3  # the three that came without it came twice
    assert totals.bytes_read == totals.bytes_written == 1200
    assert np.fromfile(tmp_path / "out", np.float32).tolist() == [*range(300)]


@pytest.mark.parametrize("suffix", FILES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.usefixtures("small")
def test_any_order_and_every_share_twice_gives_the_golden_digests(
    tmp_path: Path, scheme: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share is a pure function: the bytes are those that this machine alone writes."""
    monkeypatch.setattr(records, "seal", lambda _: {"always": "the same"})
    sent = use_pool(monkeypatch, Pool(order=random.Random(scheme)), workers=5)
    output = tmp_path / f"o{suffix}"
    chosen: Options = {**SCHEMES[scheme], "engine": "dask"}
    average(SAMPLES, output, **chosen)
    assert digest(output) == FILES[suffix][scheme]
    assert sent


def use_pool(
    patch: pytest.MonkeyPatch, pool: concurrent.futures.Executor, workers: int = 1
) -> list[Executor]:
    """Have `engine="dask"` use a pool; return the executors that were asked for, as they come."""
    made: list[Executor] = []

    @contextlib.contextmanager
    def start(*_: object) -> Iterator[Executor]:
        made.append(Futures(pool, workers, share_nbytes=1))
        yield made[-1]

    patch.setattr(options, "ENGINES", {**options.ENGINES, "dask": ""})
    patch.setattr(clusters, "start", start)
    return made


def write_run(folder: Path) -> list[Path]:
    """Write checkpoints of 40,000 numbers each."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(40_000, np.float32)
    folder.mkdir()
    paths = []
    for k in range(3):
        paths.append(write_model(folder / f"model_{k}.h5", {"d": {"k": values * (1 + k / 100)}}))
    return paths


@pytest.mark.usefixtures("small")
def test_average_and_verify_give_their_fold_to_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--verify` and `polyak verify` average again on the engine, with whatever kernel."""
    paths = write_run(tmp_path / "run")
    asked = use_pool(monkeypatch, Pool(order=random.Random(0)), workers=3)
    report = average(paths, tmp_path / "o.h5", engine="dask", verify=True)
    assert len(asked) == 2
    assert (report.engine, report.workers, report.requests, report.retries) == ("dask", 1, 0, 0)
    assert report.kernel == kernel.NAME
    found = naive_average(paths, [1] * 3)
    for name, values in read_model(tmp_path / "o.h5").items():
        assert values.tobytes() == found[name].tobytes()
    assert verify(tmp_path / "o.h5", sources=[tmp_path / "run"], engine="dask").verified
    assert len(asked) == 3


@pytest.mark.usefixtures("small")
def test_the_record_does_not_name_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An average by a cluster is, record and all, the file that this machine writes."""
    paths = write_run(tmp_path / "run")
    here = average(paths, tmp_path / "here.h5")
    use_pool(monkeypatch, Pool())
    there = average(paths, tmp_path / "there.h5", engine="dask")
    assert (tmp_path / "here.h5").read_bytes() == (tmp_path / "there.h5").read_bytes()
    assert here.data().keys() == there.data().keys()
    same = {"engine", "output", "seconds", "speed", "shares", "peak_memory", "workers", "memory"}
    differing = {key for key, value in here.data().items() if value != there.data()[key]}
    assert "engine" in differing <= same


def test_a_report_counts_the_threads_that_folded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here too: at most as many as there are jobs."""
    monkeypatch.setattr(slabs, "TUNING", Tuning(piece=1000, pieces_per_batch=1, fork_nbytes=0))
    paths = write_run(tmp_path / "run")
    assert average(paths, tmp_path / "o.h5", jobs=1).workers == 1
    for name in ("numpy", *(["compiled"] if COMPILED else [])):
        use_kernel(monkeypatch, name)
        found = average(paths, tmp_path / "o.h5", jobs=3, force=True)
        assert (found.engine, found.kernel) == ("here", name)
        # Processes divide the work beforehand; a thread takes what others have left.
        assert found.workers == 3 or (name == "compiled" and 1 <= found.workers < 3)


@pytest.mark.usefixtures("small")
def test_the_printed_report_names_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker's trouble that passed is counted."""
    paths = write_run(tmp_path / "run")
    use_pool(monkeypatch, Pool())
    fail(monkeypatch, OSError(errno.EIO, "Input/output error"))
    report = average(paths, tmp_path / "o.h5", engine="dask")
    lines = [str(line) for line in rendering.report_lines(report, False)]
    assert lines[1].startswith("dask: 1 worker (1 repetition) read 480 kB in ")


# --- errors across the wire -----------------------------------------------------------------------


def test_a_relative_path_is_named_as_the_user_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker in another folder finds the files, and its errors have the words of this machine."""
    path = write_run(tmp_path / "run")[1]
    values = read_model(path)["model_weights/d/k"]
    values[-1] = np.nan
    write_model(path, {"d": {"k": values}})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MismatchError) as here:
        average("run", "o.h5")
    elsewhere = Elsewhere()
    use_pool(monkeypatch, elsewhere)
    with pytest.raises(MismatchError) as there:
        average("run", "o.h5", engine="dask")
    assert str(there.value) == str(here.value)
    assert str(here.value).startswith("run/model_1.h5: tensor ")
    assert [one.name for one in tmp_path.iterdir()] == ["run"]
    assert elsewhere.tasks


class Elsewhere(concurrent.futures.Executor):
    """A pool whose every task is done by a new process in the folder /."""

    def __init__(self) -> None:
        self.tasks = 0

    def submit(self, call: Any, /, *arguments: Any, **_: Any) -> Future[Any]:
        """Do a task now."""
        self.tasks += 1
        code = (
            "import sys, pickle; call, arguments = pickle.load(sys.stdin.buffer)\n"
            "sys.stdout.buffer.write(pickle.dumps(call(*arguments)))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=pickle.dumps((call, arguments)),
            capture_output=True,
            cwd="/",
            env=environment(),
            check=True,
        )
        future: Future[Any] = Future()
        future.set_result(pickle.loads(done.stdout))
        return future


#: Errors of this package whose message is their one argument.
KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, PolyakError) and kind is not MissingExtraError
]


def fail(patch: pytest.MonkeyPatch, *problems: BaseException) -> list[int]:
    """Have the first shares fail; return a list that grows with every share that is tried."""
    tried: list[int] = []
    fold = shares._fold

    def failing(job: FoldJob, parcel: Parcel, on_last: Callable[[], None]) -> shares.Reply:
        tried.append(len(tried))
        if len(tried) <= len(problems):
            raise problems[tried[-1]]
        return fold(job, parcel, on_last)

    patch.setattr(shares, "_fold", failing)
    return tried


@pytest.mark.parametrize("kind", [*KINDS, RuntimeError])
def test_an_error_keeps_its_type_and_words_and_is_not_tried_again(
    tmp_path: Path, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong with a checkpoint is wrong on every worker, and a bug is one everywhere."""
    tried = fail(monkeypatch, kind("words: 'of' an error"))
    job = make_job(tmp_path, np.ones(9, np.float32))
    with pytest.raises(kind, match="words: 'of' an error") as caught:
        executors.fold([tensor(9)], job, TINY, executor=Futures(Pool()))
    assert type(caught.value) is kind
    assert len(tried) == 1


@pytest.mark.parametrize("problem", [OSError(errno.EIO, "Input/output error"), MemoryError()])
@pytest.mark.parametrize("times", [3, 4])
def test_what_may_pass_is_tried_four_times(
    tmp_path: Path, times: int, problem: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker's trouble with its network or memory is not the end; the fourth time it is."""
    tried = fail(monkeypatch, *[problem] * times)
    job = make_job(tmp_path, np.arange(9, dtype=np.float32))
    if times < 4:
        done = executors.fold([tensor(9)], job, TINY, executor=Futures(Pool()))
        assert done.totals.retries == times
        assert done.totals.bytes_read == 36  # of the attempt that succeeded
        assert np.fromfile(tmp_path / "out", np.float32).tolist() == [*range(9)]
    else:
        with pytest.raises(type(problem)):
            executors.fold([tensor(9)], job, TINY, executor=Futures(Pool()))
    assert len(tried) == 4


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_not_tried_again(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is as full for every worker."""
    tried = fail(monkeypatch, OSError(number, "no room"))
    job = make_job(tmp_path, np.ones(9, np.float32))
    with pytest.raises(OSError, match="no room"):
        executors.fold([tensor(9)], job, TINY, executor=Futures(Pool()))
    assert len(tried) == 1


def test_a_worker_of_another_version_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that was packed by another version is unpacked."""
    job = make_job(tmp_path, np.ones(9, np.float32))
    monkeypatch.setattr(shares, "__version__", "0.0.9")  # that of the worker, in this process
    monkeypatch.setattr(shares, "_unpack", lambda _: pytest.fail("unpacked"))
    message = (
        rf"^worker \S+:\d+: has polyak 0.0.9, expected {polyak_cli.__version__}, as here; install "
        "the same version for all workers$"
    )
    with pytest.raises(PolyakError, match=message):
        executors.fold([tensor(9)], job, TINY, executor=Futures(Pool()))


class Blind(Pool):
    """A pool whose worker does not see a file, or sees another one."""

    def __init__(self, path: Path, instead: bytes | None) -> None:
        super().__init__()
        self.path, self.instead = path, instead

    def work(self) -> None:
        """Work while the file is another one."""
        kept = self.path.with_suffix(".kept")
        self.path.rename(kept)
        if self.instead is not None:
            self.path.write_bytes(self.instead)
        # The answer comes when the coordinator sees the file again.
        (future, sent) = self.waiting.pop()
        call, arguments = pickle.loads(sent)
        result = call(*arguments)
        kept.replace(self.path)
        future.set_result(result)


@pytest.mark.parametrize(
    ("name", "instead", "how"),
    [
        ("0.raw", None, "No such file or directory"),
        ("0.raw", b"123", "another size or time of change"),
        ("0.raw", bytes(36), "another size or time of change"),
        ("out", None, "no such file"),
    ],
)
def test_a_worker_that_sees_other_files_says_so_in_one_line(
    tmp_path: Path, name: str, instead: bytes | None, how: str
) -> None:
    """It is no damage of the checkpoint, and no training that is still running."""
    job = make_job(tmp_path, np.ones(9, np.float32))
    pool = Blind(tmp_path / name, instead)
    message = (
        rf"^worker \S+:\d+: does not see {tmp_path}/{name} as it is here: {how}; every worker must "
        "see the checkpoints and the output under the same paths$"
    )
    with pytest.raises(PolyakError, match=message):
        executors.fold([tensor(9)], job, TINY, executor=Futures(pool))


def test_a_checkpoint_that_changed_is_no_fault_of_the_worker(tmp_path: Path) -> None:
    """If this machine sees the change too, the message is the usual one."""
    job = make_job(tmp_path, np.ones(9, np.float32))
    (tmp_path / "0.raw").write_bytes(bytes(37))
    with pytest.raises(FormatError, match=r"0.raw: tensor 'x': the file changed while it"):
        executors.fold([tensor(9)], job, TINY, executor=Futures(Pool()))


def test_a_url_with_a_secret_is_not_sent_to_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is known to this process alone; workers find credentials of their own."""
    paths = write_run(tmp_path / "run")
    use_pool(monkeypatch, Pool())
    monkeypatch.setattr(mirrors, "is_secret", lambda path: "model_1" in path)
    message = "model_1.h5: its URL has a password or a signature, which is not sent to the workers"
    with pytest.raises(UsageError, match=message):
        average(paths, tmp_path / "o.h5", engine="dask")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# --- options --------------------------------------------------------------------------------------


def test_a_scheduler_belongs_to_dask() -> None:
    """An address that would be ignored is refused."""
    with pytest.raises(UsageError, match="--scheduler is the address of a Dask scheduler"):
        average(SAMPLES, "o.h5", scheduler="tcp://127.0.0.1:1")


@pytest.mark.parametrize(("engine", "package"), [("dask", "distributed"), ("mpi", "mpi4py")])
def test_a_missing_extra_is_one_line(tmp_path: Path, engine: str, package: str) -> None:
    """It is refused before a checkpoint is looked for, and says what to install."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        f"util.find_spec = lambda name, *more: None if name == {package!r} else find(name, *more)\n"
    )
    done = polyak(
        *("average", "nowhere", "-o", "o.h5", "--engine", engine),
        cwd=tmp_path,
        environ={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    assert done.returncode == 3
    assert one_line(done.stderr) == (
        f"--engine {engine} needs packages that are missing: pip install 'polyak[{engine}]', or in "
        f"a clone pip install '.[{engine}]'"
    )


def test_who_does_not_ask_for_an_engine_loads_none(tmp_path: Path) -> None:
    """Averaging here imports neither Dask nor MPI nor what sends shares."""
    code = (
        "import sys, polyak_cli\n"
        f"polyak_cli.average({str(SAMPLES)!r}, 'o.h5')\n"
        "print([n for n in sys.modules if n.split('.')[0] in ('dask', 'distributed', 'mpi4py')\n"
        "       or n.removeprefix('polyak_cli.engine.') in ('clusters', 'pools', 'shares')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"


# --- memory ---------------------------------------------------------------------------------------

#: Folds tensors of 8 and of 64 pieces, for each type, and prints how many pages of memory the
#: larger one needed more.  Dask's workers have such an allocator: it gives memory back at once.
FAULTS = """
import json, resource, sys
from pathlib import Path
import numpy as np
from polyak_cli.engine import shares, numpy_kernel
from polyak_cli.engine.folding import FoldJob
from polyak_cli.engine.sinks import Parcel
from polyak_cli.engine.slabs import *
from polyak_cli.storage import File, Version, mirrors
from polyak_cli.tensors import FLOATS, Extent, Placement, itemsize
folder, allocating = Path(sys.argv[1]), sys.argv[2] == "allocating"
if allocating:
    convert = numpy_kernel._convert
    def convert_and_copy(raw, dtype, byteorder, out):
        convert(raw.copy(), dtype, byteorder, out)
    numpy_kernel._convert = convert_and_copy
def fold(dtype, pieces):
    n = pieces << 16
    width = itemsize(dtype)
    files = []
    for k in range(3):
        path = folder / f"{k}.raw"
        path.write_bytes(bytes(n * width))
        files.append(File(str(path), Version.of(path.stat())))
    out = folder / "out"
    out.write_bytes(bytes(n * width))
    job = FoldJob(files, [str(out)], np.full((1, 3), 1 / 3), [1.0], False)
    sources = [TensorSource(Extent(0, n * width), dtype, "<", k) for k in range(3)]
    tensor = FoldTensor("x", n, sources, [Placement(0, dtype, "<")])
    share = [*gather_batches([[slab] for slab in cut_slabs([tensor], 1 << 16, 1 << 16)], 1 << 19)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    shares._fold(job, Parcel(share, {}))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
found = {}
for dtype in FLOATS:
    fold(dtype, 8)
    fold(dtype, 8)
    found[dtype] = fold(dtype, 64) - fold(dtype, 8)
print(json.dumps(found))
"""


def count_faults(folder: Path, kernel: str, how: str = "") -> dict[str, int]:
    """Return for each type how many pages 56 pieces more need, of three checkpoints each."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, str(folder), how],
        # The first is Dask's.  With the second, no array of a piece fits into a hole of the heap,
        # of which there are some after one import and none after another.
        env=environment(
            MALLOC_TRIM_THRESHOLD_="65536", MALLOC_MMAP_THRESHOLD_="32768", POLYAK_KERNEL=kernel
        ),
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is what Dask sets")
@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_is_allocated_for_a_piece(tmp_path: Path, kernel: str) -> None:
    """Folding more needs no more memory, not even for a moment, whatever the type.

    Where the allocator gives memory back at once, as in Dask's workers, new arrays for each piece
    take longer than the arithmetic.
    """
    found = count_faults(tmp_path, kernel)
    assert len(found) == 6
    assert max(found.values()) < 56  # less than a page for a piece; an array of it has 32 to 128


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is what Dask sets")
def test_an_array_for_each_piece_is_noticed(tmp_path: Path) -> None:
    """The test above can fail."""
    found = count_faults(tmp_path, "numpy", "allocating")
    assert min(found["float32"], found["float64"]) > 56 * 3 * 32
