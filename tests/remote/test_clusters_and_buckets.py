"""From bucket to bucket by workers of Dask and ranks of MPI: the same bytes, whatever happens."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.command import POLYAK, environment, one_line, polyak, tree
from tests.remote.clusters import Cluster, cluster, make
from tests.remote.kinds import named, write_run, write_run_and_average
from tests.remote.proxy import RESET, SLOW_DOWN, Fault, Proxy, Request, every, some
from tests.remote.servers import S3Bucket

MPIEXEC = shutil.which("mpiexec")
SOAK = pytest.mark.soak
#: 20 MB a checkpoint: several shares and parts, however they are cut.
ROWS = 80_000


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run in `run` and its average, made from there, in `expected`."""
    return write_run_and_average(tmp_path_factory.mktemp("together"), ROWS)


@pytest.fixture
def filled(bucket: S3Bucket, written: Path) -> S3Bucket:
    """Return a bucket with the run."""
    bucket.put_tree(written / "run", "run/")
    return bucket


@pytest.fixture
def two(proxy: Proxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Yield a cluster of two workers that reach the buckets through the proxy.

    Their TMPDIR is not that of the command.
    """
    folder = tmp_path_factory.mktemp("cluster")
    environ = environment(**proxy.environ, TMPDIR=str(make(folder / "temporary")))
    with cluster(folder, environ, 2) as found:
        yield found


def average(bucket: S3Bucket, *options: object) -> list[str]:
    """Return the command that averages the run of a bucket to the same bucket."""
    return [*POLYAK, "average", f"{bucket.url}/run/", "-o", f"{bucket.url}/o.safetensors",
            *map(str, options)]  # fmt: skip


def start(command: list[str], cwd: Path, environ: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start a command."""
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment(**environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for the end of a command, and return its code and what it printed."""
    out, errors = process.communicate(timeout=120)
    return process.returncode, out, errors


def assert_written(bucket: S3Bucket, written: Path) -> None:
    """Compare what is in the bucket with the local average."""
    assert bucket.contents("o.safetensors") == (written / "expected.safetensors").read_bytes()
    assert bucket.uploads() == []


def assert_nothing(bucket: S3Bucket) -> None:
    """Nothing is visible besides the checkpoints, and no upload is left."""
    assert [key for key in bucket.tree() if not key.startswith("run/")] == []
    assert bucket.uploads() == []


def is_value(request: Request) -> bool:
    """Return whether a request is for values rather than a header."""
    if not request.is_ranged:
        return False
    start, _, stop = request.headers["range"].removeprefix("bytes=").partition("-")
    return int(stop or 1 << 40) - int(start) > 1 << 17


def at(number: int, happen: Callable[[], object]) -> Any:
    """Return the rule that something happens before the request for values of a number."""
    return some(lambda count: count == number, Fault(before=happen), is_value)


def test_dask_from_bucket_to_bucket(
    filled: S3Bucket, proxy: Proxy, two: Cluster, written: Path, tmp_path: Path
) -> None:
    """Workers find credentials of their own; a tenth of all requests is to be repeated.

    The command reaches the bucket by another way: all parts with values are sent by the workers.
    """
    proxy.rules = [every(10, SLOW_DOWN)]
    environ = filled.environ | {"DASK_SCHEDULER_ADDRESS": two.address, "TMPDIR": str(tmp_path)}
    command = average(filled, "--engine", "dask", "--json")
    code, out, errors = finish(start(command, tmp_path, environ))
    assert code == 0, errors
    assert_written(filled, written)
    numbers = {
        int(request.query["partNumber"])
        for request, status in proxy.traffic.log if request.kind == "PART" and status == 200
    }  # fmt: skip
    assert numbers == {1, 2, 3}
    report = json.loads(out)
    assert report["requests"] >= sum(proxy.traffic.requests.values())
    assert report["retries"] >= sum(status == 503 for _, status in proxy.traffic.log) > 0
    assert proxy.environ["AWS_SECRET_ACCESS_KEY"] not in out + errors
    assert tree(tmp_path) == {}


@pytest.mark.skipif(MPIEXEC is None, reason="there is no mpiexec here")
def test_ranks_of_mpi_from_bucket_to_bucket(
    filled: S3Bucket, written: Path, tmp_path: Path
) -> None:
    """Two ranks fold and send; rank 0 sends them their shares, and has a TMPDIR of its own."""
    program = [sys.executable, "-m", "mpi4py.futures", "-m",
               *average(filled, "--engine", "mpi", "-q")[2:]]  # fmt: skip
    first, others = (f"TMPDIR={make(tmp_path / name)}" for name in ("first", "others"))
    command = [str(MPIEXEC), "--allow-run-as-root", "--oversubscribe",
               "-n", "1", "-x", first, *program, ":",
               "-n", "2", "-x", others, *program]  # fmt: skip
    code, _, errors = finish(start(command, tmp_path, filled.environ))
    assert code == 0, errors
    assert_written(filled, written)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("bucket", "npz"),
        pytest.param("bucket", "shards", marks=SOAK),
        pytest.param("container", "shards", marks=SOAK),
        pytest.param("container", "h5", marks=SOAK),
    ],
)
def test_workers_of_dask_write_other_kinds(
    request: pytest.FixtureRequest, two: Cluster, tmp_path: Path, place: str, name: str
) -> None:
    """Parts of shards are sent by the workers, and all else comes back to the command.

    These are formats with checksums of what is folded, and all to Azure.
    """
    kind, there = named(name), request.getfixturevalue(place)
    write_run(kind, tmp_path / "run", rows=ROWS if name == "shards" else ROWS // 4)
    here = polyak("average", "run", "-o", kind.output, "-q", cwd=tmp_path)
    assert here.returncode == 0, here.stderr
    command = [*POLYAK, "average", f"{tmp_path}/run", "-o", f"{there.url}/{kind.output}",
               "--engine", "dask", "--scheduler", two.address, "-q"]  # fmt: skip
    code, _, errors = finish(start(command, tmp_path, there.environ | {"TMPDIR": str(tmp_path)}))
    assert code == 0, errors
    made = tmp_path / kind.output
    files = [one for one in made.rglob("*") if one.is_file()] if made.is_dir() else [made]
    expected = {one.relative_to(tmp_path).as_posix(): one.read_bytes() for one in files}
    assert there.tree() == expected


@pytest.mark.parametrize("number", [4, *(pytest.param(k, marks=SOAK) for k in (1, 2, 6, 9, 12))])
def test_a_worker_that_is_killed_changes_no_byte(
    filled: S3Bucket, proxy: Proxy, two: Cluster, written: Path, tmp_path: Path, number: int
) -> None:
    """Its shares are folded by the other one."""
    proxy.rules = [at(number, two.workers[0].kill)]
    command = average(filled, "--engine", "dask", "--scheduler", two.address, "-q")
    code, _, errors = finish(start(command, tmp_path, proxy.environ))
    assert code == 0, errors
    assert two.workers[0].poll() is not None
    assert_written(filled, written)


@SOAK
@pytest.mark.parametrize("number", [1, 5])
def test_a_scheduler_that_is_killed_is_one_line(
    filled: S3Bucket, proxy: Proxy, two: Cluster, tmp_path: Path, number: int
) -> None:
    """Nothing is visible, and the upload is aborted."""
    proxy.rules = [at(number, two.scheduler.kill)]
    command = average(filled, "--engine", "dask", "--scheduler", two.address, "-q")
    code, _, errors = finish(start(command, tmp_path, proxy.environ))
    assert code == 3, errors
    assert "scheduler" in one_line(errors)
    assert_nothing(filled)


@SOAK
@pytest.mark.parametrize("number", [1, 5])
def test_an_interrupt_leaves_nothing(
    filled: S3Bucket, proxy: Proxy, two: Cluster, tmp_path: Path, number: int
) -> None:
    """Ctrl-C while workers read: the shares are given up, and the upload is aborted."""
    process: list[subprocess.Popen[str]] = []
    proxy.rules = [at(number, lambda: process[0].send_signal(signal.SIGINT))]
    command = average(filled, "--engine", "dask", "--scheduler", two.address)
    process.append(start(command, tmp_path, proxy.environ))
    code, _, errors = finish(process[0])
    assert code == 130, errors
    assert "Traceback" not in errors
    assert_nothing(filled)


@SOAK
@pytest.mark.parametrize("number", [2, 5])
def test_a_coordinator_that_is_killed_leaves_nothing_visible(
    filled: S3Bucket, proxy: Proxy, two: Cluster, written: Path, tmp_path: Path, number: int
) -> None:
    """The next run writes the average, with the same workers."""
    process: list[subprocess.Popen[str]] = []
    proxy.rules = [at(number, lambda: process[0].kill())]
    command = average(filled, "--engine", "dask", "--scheduler", two.address, "-q")
    process.append(start(command, tmp_path, proxy.environ))
    code, _, errors = finish(process[0])
    assert code == -signal.SIGKILL, errors
    assert [key for key in filled.tree() if not key.startswith("run/")] == []
    proxy.rules = []
    code, _, errors = finish(start(command, tmp_path, proxy.environ))
    assert code == 0, errors
    assert filled.contents("o.safetensors") == (written / "expected.safetensors").read_bytes()


@SOAK
def test_an_object_that_is_overwritten_meanwhile_ends_the_run(
    filled: S3Bucket, proxy: Proxy, two: Cluster, written: Path, tmp_path: Path
) -> None:
    """A worker finds it, and the error has the same words as that of one machine."""
    other = (written / "run/model_1.safetensors").read_bytes()
    proxy.rules = [at(3, lambda: filled.put("run/model_2.safetensors", other))]
    command = average(filled, "--engine", "dask", "--scheduler", two.address, "-q")
    code, _, errors = finish(start(command, tmp_path, proxy.environ))
    assert code == 3, errors
    line = one_line(errors)
    assert line.startswith(f"{filled.url}/run/model_2.safetensors: ")
    assert "changed while it was read" in line
    assert_nothing(filled)


@SOAK
def test_a_server_that_one_worker_cannot_reach(
    filled: S3Bucket, proxy: Proxy, two: Cluster, tmp_path: Path
) -> None:
    """Values cannot be had: one line names the object, and nothing is visible."""
    proxy.rules = [lambda request: RESET if is_value(request) else None]
    command = average(filled, "--engine", "dask", "--scheduler", two.address, "-q")
    code, _, errors = finish(start(command, tmp_path, proxy.environ))
    assert code == 3, errors
    assert one_line(errors).startswith(f"{filled.url}/run/")
    assert_nothing(filled)
