"""Dask clusters and MPI ranks, real ones on loopback: the same bytes, whoever is killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import polyak_cli
from tests import test_guide
from tests.command import POLYAK, ROOT, SAMPLES, environment, one_line, polyak, script, tree
from tests.oracle import naive_average, read_model, write_model
from tests.remote.servers import S3Bucket

pytest.importorskip("distributed")

MPIEXEC = shutil.which("mpiexec")
needs_mpi = pytest.mark.skipif(MPIEXEC is None, reason="there is no mpiexec here")
SOAK = pytest.mark.soak
#: Executed by a coordinator: shares become so small that 12 MB are dozens of them, and at the k-th
#: answer something happens.
SABOTAGE = """
import glob, os, signal, time
from polyak_cli.engine import pools, shares, slabs
slabs.TUNING = slabs.Tuning(piece=1 << 12, pieces_per_batch=4)
shares.EDGE = 1 << 12
pools.Futures._choose_nbytes = lambda *_: 1
answers = []
read_done = shares.read_done
def at_answer(reply, **more):
    answers.append(reply["worker"])
    if len(answers) == {k}:
        happen(reply)
    return read_done(reply, **more)
shares.read_done = at_answer
def list_workers():
    pids = " ".join(open(name).read() for name in glob.glob("/proc/self/task/*/children")).split()
    started = {{pid: open(f"/proc/{{pid}}/cmdline").read() for pid in pids}}
    return [int(pid) for pid, command in started.items() if "spawn_main" in command]
def happen(reply):
    {what}
"""


def write_run(folder: Path, numbers: int = 1_000_000) -> list[Path]:
    """Write three checkpoints of one large tensor and small ones."""
    values = np.random.default_rng(0).standard_normal(numbers, np.float32)
    folder.mkdir()
    return [
        write_model(
            folder / f"model_{k}.h5",
            {"d": {"k": values * np.float32(1 + k / 100), "b": values[: 77 + k * 0]}},
        )
        for k in range(3)
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """Return the folder of a run, and its average as this machine alone writes it."""
    folder = tmp_path_factory.mktemp("run")
    paths = write_run(folder / "run")
    polyak_cli.average(paths, folder / "o.h5")
    found = read_model(folder / "o.h5")
    for name, values in naive_average(paths, [1] * 3).items():
        assert found[name].tobytes() == values.tobytes()
    return folder / "run", (folder / "o.h5").read_bytes()


# --- Dask -----------------------------------------------------------------------------------------


class Scheduler(NamedTuple):
    """A scheduler that was started, and its workers."""

    process: Any
    address: str
    workers: list[Any]

    def start_worker(self, folder: Path, *before: str, **environ: str) -> None:
        """Start a worker in a folder, and wait until the scheduler knows it."""
        command = [
            *(*before, sys.executable, "-m", "distributed.cli.dask_worker", self.address),
            *("--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", folder),
        ]
        self.workers.append(start(command, folder, **environ))
        wait_for(self.workers[-1], "Registered to")


def start(command: list[Any], folder: Path, **environ: str) -> Any:
    """Start a program whose log can be read."""
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=folder,
        env=environment(**environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(process: Any, text: str) -> str:
    """Read a program's log up to a line with a text, and return the line."""
    log = ""
    for line in process.stdout:
        log += line
        if text in line:
            return str(line)
    raise AssertionError(log)


def end(process: Any) -> None:
    """End a program and those that it started."""
    process.kill()
    process.communicate()
    if process.stdout:
        process.stdout.close()


@pytest.fixture
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scheduler]:
    """Yield a scheduler without workers."""
    folder = tmp_path_factory.mktemp("scheduler")
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1"]
    process = start([*command, "--port", "0", "--no-dashboard"], folder)
    made = Scheduler(process, wait_for(process, "Scheduler at").split()[-1], [])
    yield made
    for one in (*made.workers, process):
        end(one)


#: Says so when the first worker has been started for half a second, and loads its modules.
STARTING = """
import threading, time
from distributed.process import AsyncProcess

start = AsyncProcess.start

def begin(self):
    threading.Timer(0.5, print, ["now"], {"flush": True}).start()
    return start(self)

AsyncProcess.start = begin
"""


def average(folder: Path, *options: object, code: str = "") -> subprocess.CompletedProcess[str]:
    """Average a run with Dask to o.h5 of a folder, after executing some code."""
    # A scheduler that is gone is given up soon; workers that are started here may take long.
    patience = "5s" if "--scheduler" in options else "30s"
    return subprocess.run(
        script(code, "average", *options, "-o", "o.h5", "--engine", "dask"),
        cwd=folder,
        env=environment(DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT=patience, TMPDIR=str(folder)),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("jobs", [pytest.param(1, marks=SOAK), 3])
def test_a_cluster_on_this_machine_writes_the_same_bytes(
    tmp_path: Path, run: tuple[Path, bytes], jobs: int
) -> None:
    """Without an address, as many workers start as there are jobs, and nothing of them is left."""
    code = SABOTAGE.format(k=0, what="pass")
    done = average(tmp_path, run[0], "--jobs", jobs, "-q", code=code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert tree(tmp_path) == {"o.h5": run[1]}


@pytest.mark.soak
def test_workers_that_are_slow_to_end_cost_no_average(
    tmp_path: Path, run: tuple[Path, bytes]
) -> None:
    """On a busy machine they take seconds, when all is folded; the average is published."""
    code = (
        "import distributed\n"
        "close = distributed.LocalCluster.close\n"
        "def close_late(self, timeout=None):\n"
        "    close(self, timeout)\n"
        "    raise TimeoutError\n"
        "distributed.LocalCluster.close = close_late"
    )
    done = average(tmp_path, run[0], "--jobs", 2, "-q", code=code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "o.h5").read_bytes() == run[1]


@pytest.mark.soak
def test_workers_that_cannot_be_started_are_one_line(
    tmp_path: Path, run: tuple[Path, bytes]
) -> None:
    """As on a machine so busy that they do not reach the scheduler in time."""
    code = (
        'import dask, distributed\ndask.config.set({"distributed.comm.timeouts.connect": "1ms"})\n'
    )
    done = average(tmp_path, run[0], "--jobs", 2, code=code)
    assert done.returncode == 3
    assert one_line(done.stderr).startswith("--engine dask: its workers cannot be started: Cluster")
    assert tree(tmp_path) == {}


@pytest.mark.soak
def test_only_this_machine_can_reach_the_cluster_that_is_started(
    tmp_path: Path, run: tuple[Path, bytes]
) -> None:
    """Scheduler, workers and nannies listen on loopback, and there is no dashboard."""
    what = """
    import json
    mine = list_workers()
    inodes = set()
    for p in (*mine, os.getpid()):
        for fd in glob.glob(f"/proc/{p}/fd/*"):
            try: inodes.add(os.readlink(fd))
            except OSError: pass
    found = []
    for table in ("tcp", "tcp6"):
        for line in open(f"/proc/net/{table}").read().splitlines()[1:]:
            part = line.split()
            if part[3] == "0A" and f"socket:[{part[9]}]" in inodes:
                found.append(part[1].split(":")[0])
    print(json.dumps([len(mine), found]))
"""
    done = average(tmp_path, run[0], "--jobs", 2, "-q", code=SABOTAGE.format(k=3, what=what))
    assert done.stderr == ""
    children, listening = json.loads(done.stdout)
    assert children >= 2
    assert len(listening) >= 3
    assert set(listening) == {"0100007F"}


@pytest.mark.parametrize("k", [5, *(pytest.param(k, marks=SOAK) for k in (1, 20, 40))])
def test_a_worker_that_is_killed_changes_no_byte(
    tmp_path: Path, run: tuple[Path, bytes], k: int
) -> None:
    """Whenever a worker dies, others do its shares, and those that it had finished stay."""
    what = 'os.kill(list_workers()[0], signal.SIGKILL); print("killed")'
    code = SABOTAGE.format(k=k, what=what)
    done = average(tmp_path, run[0], "--jobs", 2, "-q", code=code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "killed\n", "")
    assert tree(tmp_path) == {"o.h5": run[1]}


def test_the_scheduler_of_an_address_is_used(
    tmp_path: Path, run: tuple[Path, bytes], scheduler: Scheduler, tmp_path_factory: Any
) -> None:
    """Workers in other folders find relative paths, and an average is verified on them."""
    for _ in range(2):
        scheduler.start_worker(tmp_path_factory.mktemp("worker"))
    shutil.copytree(run[0], tmp_path / "run", copy_function=shutil.copy2)
    done = average(tmp_path, "run", "--scheduler", scheduler.address, "--verify", "-q")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "o.h5").read_bytes() == run[1]
    done = polyak(
        *("verify", "o.h5", "--source", "run", "--engine", "dask", "-q"),
        cwd=tmp_path,
        environ={"DASK_SCHEDULER_ADDRESS": scheduler.address},
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.soak
def test_a_scheduler_that_is_not_there_is_one_line(tmp_path: Path, run: tuple[Path, bytes]) -> None:
    """The address is named, and nothing was written."""
    for address, reason in (
        ("tcp://127.0.0.1:9", "Timed out trying to connect"),
        ("nonsense://x", "unknown address scheme"),
    ):
        done = average(tmp_path, run[0], "--scheduler", address)
        assert done.returncode == 3
        line = one_line(done.stderr)
        assert line.startswith(f"--scheduler {address}: cannot be reached: {reason}")
        assert line.endswith("start one with `dask scheduler`, and name the address that it prints")
        assert tree(tmp_path) == {}


@pytest.mark.soak
def test_a_scheduler_without_workers_is_one_line(
    tmp_path: Path, run: tuple[Path, bytes], scheduler: Scheduler
) -> None:
    """What to start is said."""
    done = average(tmp_path, run[0], "--scheduler", scheduler.address)
    assert done.returncode == 3
    assert one_line(done.stderr) == (
        f"the Dask scheduler {scheduler.address} has no workers; start some with `dask worker "
        f"{scheduler.address}`"
    )
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("k", [pytest.param(1, marks=SOAK), 10])
def test_a_scheduler_that_is_stopped_is_one_line(
    tmp_path: Path, run: tuple[Path, bytes], scheduler: Scheduler, tmp_path_factory: Any, k: int
) -> None:
    """Nothing is published, and nothing hidden is left."""
    scheduler.start_worker(tmp_path_factory.mktemp("worker"))
    what = f"os.kill({scheduler.process.pid}, signal.SIGKILL)"
    code = SABOTAGE.format(k=k, what=what)
    done = average(tmp_path, run[0], "--scheduler", scheduler.address, code=code)
    assert done.returncode == 3
    assert one_line(done.stderr) == (
        f"the Dask scheduler {scheduler.address} is gone, or cannot be reached any more; nothing "
        "was published, run the command again"
    )
    assert tree(tmp_path) == {}


@pytest.mark.soak
def test_all_workers_gone_is_one_line(
    tmp_path: Path, run: tuple[Path, bytes], scheduler: Scheduler, tmp_path_factory: Any
) -> None:
    """A run does not wait for ever for workers that do not come back."""
    scheduler.start_worker(tmp_path_factory.mktemp("worker"))
    what = f"os.kill({scheduler.workers[0].pid}, signal.SIGKILL)"
    code = SABOTAGE.format(k=3, what=what)
    done = average(tmp_path, run[0], "--scheduler", scheduler.address, code=code)
    assert done.returncode == 3
    assert "has no workers; start some with" in one_line(done.stderr)
    assert tree(tmp_path) == {}


def start_average(folder: Path, run: Path, code: str) -> subprocess.Popen[str]:
    """Start an average in a group of its own, with code that prints a line once it is to be hit."""
    process = subprocess.Popen(
        script(code, "average", run, "-o", "o.h5", "--engine", "dask", "--jobs", "2"),
        cwd=folder,
        env=environment(TMPDIR=str(folder)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "now\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=SOAK)])
def test_an_interrupt_cleans_up(
    tmp_path: Path, run: tuple[Path, bytes], number: signal.Signals
) -> None:
    """Ctrl-C, which all processes of a terminal get, leaves no file and no process."""
    what = 'print("now", flush=True); time.sleep(60)'
    code = SABOTAGE.format(k=5, what=what)
    process = start_average(tmp_path, run[0], code)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert one_line(err).endswith("no unfinished file is left")
    assert tree(tmp_path) == {}
    wait_for_end_of_group(process.pid)


def wait_for_end_of_group(group: int) -> None:
    """Wait until no process of a group is left."""
    for _ in range(300):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, 0)
            time.sleep(0.1)
            continue
        return
    raise AssertionError("processes are left")


@pytest.mark.soak
def test_an_interrupt_while_workers_start_is_one_line(
    tmp_path: Path, run: tuple[Path, bytes]
) -> None:
    """Ctrl-C reaches processes that load their modules, and none of them prints a trace."""
    process = start_average(tmp_path, run[0], STARTING)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert one_line(err).endswith("no unfinished file is left")
    assert tree(tmp_path) == {}
    wait_for_end_of_group(process.pid)


@pytest.mark.soak
def test_a_coordinator_that_is_killed_leaves_nothing_visible(
    tmp_path: Path, run: tuple[Path, bytes]
) -> None:
    """Its workers end by themselves; the next run removes their folder, and writes the bytes."""
    code = SABOTAGE.format(k=5, what="os.kill(os.getpid(), signal.SIGKILL)")
    process = subprocess.Popen(
        script(code, "average", run[0], "-o", "o.h5", "--engine", "dask", "--jobs", "2"),
        cwd=tmp_path,
        env=environment(TMPDIR=str(tmp_path)),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert all(name.startswith((".polyak-", "polyak-")) for name in tree(tmp_path))
    wait_for_end_of_group(process.pid)
    done = average(tmp_path, run[0], "--jobs", 2, "-q")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "o.h5").read_bytes() == run[1]
    assert not [name for name in tree(tmp_path) if name.startswith("polyak-")]


def test_a_worker_of_another_version_is_refused(
    tmp_path: Path, run: tuple[Path, bytes], scheduler: Scheduler, tmp_path_factory: Any
) -> None:
    """Its address and version are named."""
    folder = tmp_path_factory.mktemp("worker")
    shutil.copytree(ROOT / "polyak_cli", folder / "polyak_cli")
    init = folder / "polyak_cli/__init__.py"
    init.write_text(re.sub(r'__version__ = ".*"', '__version__ = "0.0.9"', init.read_text()))
    scheduler.start_worker(folder, PYTHONPATH=str(folder))
    done = average(tmp_path, run[0], "--scheduler", scheduler.address)
    assert done.returncode == 3
    assert re.fullmatch(
        rf"worker tcp://127.0.0.1:\d+: has polyak 0.0.9, expected {polyak_cli.__version__}, as "
        "here; install the same version for all workers",
        one_line(done.stderr),
    )
    assert tree(tmp_path) == {}


@pytest.mark.soak
def test_a_worker_without_polyak_is_refused(
    tmp_path: Path, run: tuple[Path, bytes], scheduler: Scheduler, tmp_path_factory: Any
) -> None:
    """What is missing is named in one line."""
    folder = tmp_path_factory.mktemp("worker")
    (folder / "polyak_cli.py").write_text("")  # found before an installed one
    scheduler.start_worker(folder, PYTHONPATH=str(folder))
    done = average(tmp_path, run[0], "--scheduler", scheduler.address)
    assert done.returncode == 3
    line = one_line(done.stderr)
    assert line.startswith("the Dask cluster cannot run polyak: ModuleNotFoundError: No module ")
    assert line.endswith(f"install polyak {polyak_cli.__version__} for its workers")
    assert tree(tmp_path) == {}
    assert scheduler.workers[0].poll() is None  # it is the user's, and has other work to do


@pytest.mark.soak
def test_a_worker_that_does_not_see_the_files_says_so(
    tmp_path: Path, run: tuple[Path, bytes], scheduler: Scheduler, tmp_path_factory: Any
) -> None:
    """As on a node where a folder of that name is its own, which is what a mount can show."""
    shutil.copytree(run[0], tmp_path / "run", copy_function=shutil.copy2)
    mount = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"']
    mount.append(str(tmp_path / "run"))
    tried = subprocess.run([*mount, "true"], capture_output=True, check=False)
    if tried.returncode:
        pytest.skip("folders cannot be mounted here")
    scheduler.start_worker(tmp_path_factory.mktemp("worker"), *mount)
    done = average(tmp_path, "run", "--scheduler", scheduler.address)
    assert done.returncode == 3
    assert re.fullmatch(
        rf"worker tcp://127.0.0.1:\d+: does not see {tmp_path}/run/model_0.h5 as it is here: No "
        "such file or directory; every worker must see the checkpoints and the output under the "
        "same paths",
        one_line(done.stderr),
    )
    assert {name for name in tree(tmp_path) if not name.startswith("run")} == set()


@pytest.mark.soak
def test_watch_averages_on_the_cluster(tmp_path: Path, run: tuple[Path, bytes]) -> None:
    """`watch --once` gives its fold to the engine too."""
    done = polyak(
        *("watch", run[0], "--once", "-o", "o.h5", "--engine", "dask", "--jobs", "2", "-q"),
        cwd=tmp_path,
        environ={"TMPDIR": str(tmp_path)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert tree(tmp_path) == {"o.h5": run[1]}


@needs_mpi
@pytest.mark.soak
def test_the_examples_of_the_guide_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page on clusters is run where the engines are installed."""
    # Open MPI asks for these where root has fewer cores than ranks.
    for name in ("ALLOW_RUN_AS_ROOT", "ALLOW_RUN_AS_ROOT_CONFIRM", "MCA_rmaps_base_oversubscribe"):
        monkeypatch.setenv(f"OMPI_{name}", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    test_guide.test_the_examples_of_a_page_run(ROOT / "polyak_cli/guide/clusters.md", tmp_path)


# --- MPI ------------------------------------------------------------------------------------------


def mpi(folder: Path, ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run polyak on the first of some ranks; the others are workers."""
    assert MPIEXEC
    launch = [MPIEXEC, "--oversubscribe", "--allow-run-as-root", "-n", str(ranks)]
    module = [sys.executable, "-m", "mpi4py.futures", "-m", "polyak_cli"]
    return subprocess.run(
        [*launch, *module, *map(str, arguments)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@needs_mpi
@pytest.mark.parametrize("ranks", [pytest.param(2, marks=SOAK), 3])
def test_the_ranks_of_mpi_write_the_same_bytes(
    tmp_path: Path, run: tuple[Path, bytes], ranks: int
) -> None:
    """With one worker and with two, verified on the same ranks."""
    done = mpi(
        tmp_path, ranks, "average", run[0], "-o", "o.h5", "--engine", "mpi", "--verify", "-q"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert tree(tmp_path) == {"o.h5": run[1]}


@pytest.mark.soak
@needs_mpi
def test_an_error_of_a_rank_keeps_its_words_and_code(tmp_path: Path) -> None:
    """The line is ours, the exit code too; what Open MPI prints besides is its own."""
    paths = write_run(tmp_path / "run", 1000)
    values = read_model(paths[1])["model_weights/d/k"]
    values[500] = np.inf
    write_model(paths[1], {"d": {"k": values, "b": values[:77]}})
    here = polyak("average", "run", "-o", "o.h5", cwd=tmp_path)
    done = mpi(tmp_path, 2, "average", "run", "-o", "o.h5", "--engine", "mpi")
    assert done.returncode == here.returncode == 3
    assert done.stderr.splitlines()[0] == here.stderr.strip()
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.soak
@needs_mpi
def test_mpi_without_workers_is_refused(tmp_path: Path) -> None:
    """Started as usual, or by mpiexec without mpi4py.futures, nothing is averaged."""
    expected = (
        "error: --engine mpi works on ranks that mpi4py.futures starts: mpiexec -n RANKS python -m "
        "mpi4py.futures -m polyak_cli average ... --engine mpi"
    )
    arguments = ["average", str(SAMPLES), "-o", "o.h5", "--engine", "mpi"]
    done = polyak(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr.strip()) == (2, expected)
    alone = mpi(tmp_path, 1, *arguments)
    assert alone.returncode == 2
    assert alone.stderr.splitlines()[0] == (
        "error: --engine mpi has one rank, and the first one folds nothing; start two or more"
    )
    assert MPIEXEC
    launch = [MPIEXEC, "--oversubscribe", "--allow-run-as-root", "-n", "2", *POLYAK]
    started = subprocess.run(
        [*launch, *arguments],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert started.returncode == 2
    assert expected in started.stderr.splitlines()
    assert tree(tmp_path) == {}


# --- buckets --------------------------------------------------------------------------------------

#: Makes processes of this machine read objects by themselves, however small these are.
SPAWN = """
from polyak_cli.engine import pools, shares, slabs
pools._LEAST, shares.EDGE = 1, 1 << 12
slabs.TUNING = slabs.Tuning(piece=1 << 12, pieces_per_batch=4, fork_nbytes=0,
                            ahead_nbytes=3 << 20)
"""
ENGINES = ["spawned", "dask", pytest.param("mpi", marks=needs_mpi)]


def average_bucket(
    folder: Path, bucket: S3Bucket, engine: str, *more: str, code: str = "", run: str = "run"
) -> subprocess.CompletedProcess[str]:
    """Average a run of a bucket to o.h5 of a folder, by workers that read it by themselves."""
    launch = [sys.executable]
    name = "here" if engine == "spawned" else engine
    if engine == "mpi":
        assert MPIEXEC
        launch = [MPIEXEC, "--oversubscribe", "--allow-run-as-root", "-n", "3", sys.executable]
        launch += ["-m", "mpi4py.futures"]
    command = script(SPAWN + code, "average", f"{bucket.url}/{run}", "-o", "o.h5", "--engine", name)
    return subprocess.run(
        [*launch, *command[1:], "--jobs", "2", *more],
        cwd=folder,
        env=environment(TMPDIR=str(folder), **bucket.server.environ),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_workers_read_objects_by_themselves(
    tmp_path: Path, run: tuple[Path, bytes], bucket: S3Bucket, engine: str
) -> None:
    """The bytes are those of local files, and the coordinator has not loaded a network client.

    It forks, and a forked child of a process that has used obstore waits for ever.
    """
    bucket.put_tree(run[0], "run/")
    code = "import atexit, sys; atexit.register(lambda: print('obstore' in sys.modules))"
    done = average_bucket(tmp_path, bucket, engine, "--json", code=code)
    assert (done.returncode, done.stderr) == (0, "")
    report, _, loaded = done.stdout.rpartition("}")
    assert loaded.split() == ["False"]
    found = json.loads(report + "}")
    assert found["engine"] == ("here" if engine == "spawned" else engine)
    assert found["workers"] == 2
    assert found["retries"] == 0
    assert 6 <= found["requests"] <= 80  # of 3 objects, in batches of 1 MiB and less
    assert tree(tmp_path) == {"o.h5": run[1]}


@pytest.mark.parametrize("engine", [pytest.param("spawned", marks=SOAK), "dask"])
def test_from_the_bucket_into_the_bucket(
    tmp_path: Path, run: tuple[Path, bytes], bucket: S3Bucket, engine: str
) -> None:
    """Workers send what they fold, and leave nothing behind."""
    bucket.put_tree(run[0], "run/")
    output = f"{bucket.url}/final.h5"
    done = average_bucket(tmp_path, bucket, engine, "-o", output, "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert bucket.contents("final.h5") == run[1]
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("engine", ["spawned", pytest.param("dask", marks=SOAK)])
def test_an_object_that_is_overwritten_meanwhile_ends_the_run(
    tmp_path: Path, run: tuple[Path, bytes], bucket: S3Bucket, engine: str
) -> None:
    """The worker that notices it says so, in the words of a run on local files."""
    bucket.put_tree(run[0], "run/")
    (tmp_path / "other").write_bytes((run[0] / "model_1.h5").read_bytes()[:-4] + b"\0\0\0\0")
    code = f"""
from polyak_cli.engine import executors
fold = executors.fold
def overwrite(*arguments, **options):
    import subprocess
    subprocess.run([{sys.executable!r}, "-c", '''if True:
        from tests.remote.servers import *
        from pathlib import Path
        server = Server({bucket.server.endpoint!r}, {bucket.server.environ!r})
        S3Bucket(server, {bucket.name!r}).put("run/model_1.h5", Path("other").read_bytes())
    '''], check=True)
    return fold(*arguments, **options)
executors.fold = overwrite
"""
    done = average_bucket(tmp_path, bucket, engine, code=code)
    assert done.returncode == 3
    assert re.fullmatch(
        rf"{bucket.url}/run/model_1.h5: tensor 'd/[kb]': the file changed while it "
        "was read; is training still running\\?.*",
        one_line(done.stderr),
    )
    assert set(tree(tmp_path)) == {"other"}


def test_a_spawned_process_that_is_killed_is_one_line(
    tmp_path: Path, run: tuple[Path, bytes], bucket: S3Bucket
) -> None:
    """As for a forked one; nothing is written."""
    bucket.put_tree(run[0], "run/")
    code = """
import os, signal
from polyak_cli.engine import spawned
start = spawned._Pool.__init__
def start_and_kill(pool, jobs):
    start(pool, jobs)
    os.kill(pool.processes[0].popen.pid, signal.SIGKILL)
spawned._Pool.__init__ = start_and_kill
"""
    done = average_bucket(tmp_path, bucket, "spawned", code=code)
    assert done.returncode == 3
    assert one_line(done.stderr) == (
        "a worker process was killed (SIGKILL), perhaps because memory ran out; use fewer --jobs "
        "or less --max-memory"
    )
    assert tree(tmp_path) == {}


@pytest.mark.soak
@pytest.mark.parametrize("engine", ["spawned", "dask"])
def test_the_memory_of_a_worker_does_not_grow_with_the_checkpoints(
    tmp_path: Path, bucket: S3Bucket, engine: str
) -> None:
    """It is 64 MiB at most, some 32 of Dask's own, and the 64 MiB that are on their way.

    Of 2 and of 60 checkpoints one share has at least twice as much to read.  Of the files of
    libraries the system maps some 8 MiB more where its cache has them in large pieces.
    """
    peaks = []
    for count, mib in ((2, 64), (60, 3)):
        values = np.random.default_rng(0).standard_normal(mib << 18, np.float32)
        for k in range(count):
            write_model(tmp_path / "one.h5", {"d": {"k": values * np.float32(1 + k / 1000)}})
            bucket.put(f"run{count}/model_{k}.h5", (tmp_path / "one.h5").read_bytes())
        done = average_bucket(
            tmp_path, bucket, engine, "--jobs", "1", "--json", "--no-hash", "--force",
            code="slabs.TUNING = slabs.Tuning(fork_nbytes=0); pools._LEAST = 1 << 30",
            run=f"run{count}",
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        found = json.loads(done.stdout)
        assert found["bytes_read"] == count * values.nbytes
        peaks.append(found["peak_memory"] >> 20)
    assert max(peaks) <= 64 + 64 + 8 + (32 if engine == "dask" else 0), peaks
    assert max(peaks) - min(peaks) <= 12, peaks
