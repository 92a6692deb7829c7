"""Averages written to buckets: the bytes of a local run, visible whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests import (
    test_front_door,
    test_hdf5,
    test_keras_zip,
    test_npz,
    test_safetensors,
    test_tf_bundle,
    test_weights,
)
from tests.command import POLYAK, Done, environment, one_line, polyak, script
from tests.contract import content
from tests.documented import find_undocumented, read_keys
from tests.remote.proxy import Fault, Proxy, some
from tests.remote.servers import Bucket, S3Bucket


@pytest.fixture(params=["bucket", "container"])
def place(request: pytest.FixtureRequest) -> Bucket:
    """Return a bucket, and in a second test a container."""
    found: Bucket = request.getfixturevalue(request.param)
    return found


def average(place: Bucket, *arguments: object, cwd: Path, **environ: str) -> Done:
    """Run `polyak average` with a bucket's credentials."""
    return polyak("average", *arguments, cwd=cwd, environ=place.server.environ | environ)


def write_run(folder: Path, count: int = 2, kib: int = 64) -> None:
    """Write checkpoints of one tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        values = np.random.default_rng(k).normal(size=kib * 256).astype(np.float32)
        save_file({"w": values}, folder / f"model_{k}.safetensors")


def _torch(folder: Path) -> None:
    from tests.test_torch_zip import archive, dictionary, tensor

    folder.mkdir()
    for k in range(3):
        values = np.random.default_rng(k).normal(size=1000).astype("<f4")
        pickle = dictionary({"weight": tensor("0", 1000)})
        archive(folder / f"model_{k}.pt", pickle, _0=values)


def _folders(folder: Path, *, shards: bool) -> None:
    test_front_door.write_folders(folder, 3, shards=shards)
    for one in folder.iterdir():
        (one / "config.json").write_text('{"model_type": "bert"}')
        (one / "tokenizer").mkdir()
        (one / "tokenizer/vocab.txt").write_text("a b\n")


#: Name of an output -> writes checkpoints of its format.
RUNS: dict[str, Callable[[Path], object]] = {
    "final.safetensors": test_safetensors.TestFile().write_run,
    "final.npz": test_npz.TestStored().write_run,
    "final.keras": test_keras_zip.TestStored().write_run,
    "final.h5": test_hdf5.TestWholeModels().write_run,
    "final.weights.h5": test_weights.TestWeights().write_run,
    "final.pt": _torch,
    "final.index": test_tf_bundle.write_run,
    "folder": lambda folder: _folders(folder, shards=False),
    "shards": lambda folder: _folders(folder, shards=True),
    "merged.safetensors": lambda folder: _folders(folder, shards=True),
}


#: The others are left to `make soak`: each takes two commands.
QUICK = ("final.safetensors", "final.keras", "final.index", "shards")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else (pytest.mark.soak,)) for n in RUNS]
)
def test_every_format_has_the_bytes_of_a_local_output(
    bucket: S3Bucket, tmp_path: Path, name: str
) -> None:
    """Files, further files and folders arrive in the bucket as they would be on the disk."""
    RUNS[name](tmp_path / "run")
    (tmp_path / "local").mkdir()
    done = polyak("average", "run", "-o", f"local/{name}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = average(bucket, "run", "-o", f"{bucket.url}/a b/{name}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"wrote {bucket.url}/a b/{name}" in done.stdout
    assert bucket.tree("a b/") == content(tmp_path / "local")
    assert bucket.uploads() == []


def write_large(path: Path, seed: int, *, odd: bool) -> None:
    """Write 20 MB of several types, with integers between them that are carried.

    With ``odd``, tensors of an HDF5 file begin at no multiple of the size of their elements.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    tensors: dict[str, Any] = {
        "a": rng.normal(size=700_004 - 3 * odd).astype(np.float16),
        "b": rng.normal(size=(1100, 1000)).astype(np.float32),
        "carried": np.arange(1_300_000, dtype=np.int64),
        **{f"small/{k}": rng.normal(size=k).astype(np.float64) for k in range(1, 60)},
        "c": rng.normal(size=500_000).astype(np.float64),
    }
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        write_h5(path, tensors)


def write_h5(path: Path, tensors: dict[str, Any]) -> None:
    """Write an HDF5 file of data sets, one after the other."""
    import h5py

    with h5py.File(path, "w") as file:
        for name, values in tensors.items():
            file[f"layers/{name}/vars/0"] = values


@pytest.mark.parametrize(
    ("name", "jobs"),
    [
        ("final.safetensors", 3),
        ("final.weights.h5", 2),
        pytest.param("final.safetensors", 1, marks=pytest.mark.soak),
        pytest.param("odd.weights.h5", 3, marks=pytest.mark.soak),
        pytest.param("shards", 3, marks=pytest.mark.soak),
    ],
)
def test_a_large_output_is_never_whole_on_the_disk(
    bucket: S3Bucket, tmp_path: Path, name: str, jobs: int
) -> None:
    """Parts are sent while they are folded, by several processes: the bytes of a local output.

    The disk holds what is carried, and nothing that is averaged; unless an element lies in two
    parts.
    """
    for k in range(2):
        if name == "shards":
            folder = tmp_path / f"run/checkpoint-{k}"
            parts = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
            for n, part in enumerate(parts):
                values = np.random.default_rng(7 * k + n).normal(size=(3000, 1000 + n))
                folder.mkdir(parents=True, exist_ok=True)
                save_file({f"w{n}": values.astype(np.float32)}, folder / part)
            index = {"metadata": {}, "weight_map": {f"w{n}": part for n, part in enumerate(parts)}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
            (folder / "config.json").write_text("{}")
        else:
            path = tmp_path / f"run/model_{k}.{name.partition('.')[2]}"
            write_large(path, k, odd=name.startswith("odd"))
    (tmp_path / "local").mkdir()
    allow = "--allow", "two-runs"  # the values are random
    done = polyak("average", "run", "-o", f"local/{name}", *allow, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    code = MEASURE.format(folder=str(tmp_path / "sizes"))
    done = subprocess.run(
        script(code, "average", "run", "-o", f"{bucket.url}/{name}", "--jobs", jobs, *allow),
        cwd=tmp_path,
        env=environment(**bucket.server.environ),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert bucket.tree() == content(tmp_path / "local")
    assert bucket.uploads() == []
    held = int((tmp_path / "sizes").read_text())
    whole = sum(map(len, bucket.tree().values()))
    assert held > whole if name.startswith("odd") else held < 0.7 * whole


#: Writes down how many bytes the stand-ins of outputs hold on the disk when they are published.
MEASURE = """
from polyak_cli.storage import mirrors
send = mirrors.send
def measure(named, **options):
    with open({folder!r}, "w") as file:
        file.write(str(sum(512 * path.stat().st_blocks for path in named)))
    send(named, **options)
mirrors.send = measure
"""


@pytest.mark.soak
def test_a_container_takes_folders_and_files(container: Bucket, tmp_path: Path) -> None:
    """On Azure nothing is left but the output, and a second run is refused."""
    _folders(tmp_path / "run", shards=True)
    for name in ("shards", "one.safetensors"):
        polyak("average", "run", "-o", name, cwd=tmp_path)
        done = average(container, "run", "-o", f"{container.url}/x/{name}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        again = average(container, "run", "-o", f"{container.url}/x/{name}", cwd=tmp_path)
        assert again.returncode == 3
        assert one_line(again.stderr).endswith("already exists; use --force to replace it")
    local = {f"shards/{key}": value for key, value in content(tmp_path / "shards").items()}
    local["one.safetensors"] = (tmp_path / "one.safetensors").read_bytes()
    assert container.tree("x/") == local


def test_from_the_bucket_to_the_bucket(place: Bucket, tmp_path: Path) -> None:
    """Checkpoints that are read from a store give the same output, verified, with their names."""
    write_run(tmp_path / "run", 3)
    place.put_tree(tmp_path / "run", "run/")
    polyak("average", "run", "-o", "local.safetensors", cwd=tmp_path)
    done = average(
        place, f"{place.url}/run/", "-o", f"{place.url}/out.safetensors", "--verify", "--json",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["verified"] is True
    assert report["output"] == f"{place.url}/out.safetensors"
    assert place.contents("out.safetensors") == (tmp_path / "local.safetensors").read_bytes()
    assert place.name.encode() not in place.contents("out.safetensors")  # the record has names only
    assert place.keys() == ["out.safetensors", *(f"run/model_{k}.safetensors" for k in range(3))]


def test_a_folder_is_replaced_whole(bucket: S3Bucket, tmp_path: Path) -> None:
    """Without --force a prefix must be empty; with it, all of the older average goes, and no more.

    The older average has shards that the new one has not.
    """
    _folders(tmp_path / "sharded", shards=True)
    _folders(tmp_path / "whole", shards=False)
    target = f"{bucket.url}/out"
    assert average(bucket, "sharded", "-o", target, cwd=tmp_path).returncode == 0
    before = bucket.tree()
    refused = average(bucket, "whole", "-o", target, cwd=tmp_path)
    assert one_line(refused.stderr) == f"{target}: already exists; use --force to replace it"
    assert bucket.tree() == before
    assert average(bucket, "whole", "-o", target, "--force", cwd=tmp_path).returncode == 0
    polyak("average", "whole", "-o", "local", cwd=tmp_path)
    assert bucket.tree("out/") == content(tmp_path / "local")
    bucket.put("out/notes.txt", b"mine")
    refused = average(bucket, "whole", "-o", target, "--force", cwd=tmp_path)
    assert "holds 'notes.txt', which is not part of an average" in one_line(refused.stderr)
    assert bucket.contents("out/notes.txt") == b"mine"


def test_two_commands_to_one_name(bucket: S3Bucket, tmp_path: Path) -> None:
    """Of two commands at the same time one writes, and the other says that the name is taken."""
    processes = []
    for k in range(2):
        write_run(tmp_path / f"run{k}", k + 2, kib=9 << 10)
        command = ["average", f"run{k}", "-o", f"{bucket.url}/out.safetensors"]
        processes.append(start(bucket, *command, cwd=tmp_path))
    errors = [process.communicate(timeout=120)[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert sorted(codes) == [0, 3], errors
    loser = codes.index(3)
    assert one_line(errors[loser]).endswith("already exists; use --force to replace it")
    polyak("average", f"run{1 - loser}", "-o", "local.safetensors", cwd=tmp_path)
    assert bucket.contents("out.safetensors") == (tmp_path / "local.safetensors").read_bytes()
    assert bucket.uploads() == []


# --- signals --------------------------------------------------------------------------------------


class Gate:
    """Stops the second part of an upload, and all after it, before they reach the server."""

    def __init__(self, proxy: Proxy) -> None:
        self.environ = proxy.environ
        self.stopped, self.opened = threading.Event(), threading.Event()
        # The first part that is sent is the lease.
        proxy.rules.append(
            some(lambda number: number > 2, Fault(before=self._wait), lambda r: r.kind == "PART")
        )

    def _wait(self) -> None:
        self.stopped.set()
        self.opened.wait()


@pytest.fixture
def gate(proxy: Proxy) -> Iterator[Gate]:
    """Yield a gate that opens at the end at the latest."""
    made = Gate(proxy)
    yield made
    made.opened.set()


def start(place: Bucket, *arguments: object, cwd: Path, **environ: str) -> subprocess.Popen[str]:
    """Start a command."""
    return subprocess.Popen(
        [*POLYAK, *map(str, arguments)],
        cwd=cwd,
        env=environment(**place.server.environ | environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.soak)]
)
def test_a_signal_leaves_nothing(
    bucket: S3Bucket, gate: Gate, tmp_path: Path, number: signal.Signals
) -> None:
    """In the middle of an upload, a signal ends the command, and the upload is aborted.

    By SIGKILL the main process alone dies, and its helper cleans up.
    """
    write_run(tmp_path / "run", kib=25 << 10)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    process = start(
        bucket, "average", "run", "-o", f"{bucket.url}/out.safetensors", cwd=tmp_path,
        **gate.environ, TMPDIR=str(temporary),
    )  # fmt: skip
    assert gate.stopped.wait(60)
    assert bucket.uploads() == ["out.safetensors"]
    process.send_signal(number)
    time.sleep(0.1)
    gate.opened.set()
    process.communicate(timeout=60)
    assert process.returncode in (128 + number, -number)
    wait_until(lambda: not bucket.uploads() and not any(temporary.iterdir()))
    assert bucket.keys() == []


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what another process does."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_uploads_lists_and_aborts_what_a_dead_run_left(
    bucket: S3Bucket, gate: Gate, tmp_path: Path
) -> None:
    """When all processes of a run were killed, `polyak uploads` finds its upload and aborts it."""
    write_run(tmp_path / "run", kib=25 << 10)
    process = start(
        bucket, "average", "run", "-o", f"{bucket.url}/dir/out.safetensors", cwd=tmp_path,
        **gate.environ,
    )  # fmt: skip
    assert gate.stopped.wait(60)
    (helper,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(helper), signal.SIGKILL)
    process.kill()
    process.communicate()
    foreign = bucket.client.create_multipart_upload(Bucket=bucket.name, Key="dir/foreign")
    environ = bucket.server.environ

    def run(*options: str) -> Done:
        return polyak("uploads", f"{bucket.url}/dir/", *options, cwd=tmp_path, environ=environ)

    assert "alive" in run("--abort").stdout  # it gave a sign of life a moment ago
    listed = run("--idle", "0").stdout
    assert f"{bucket.url}/dir/out.safetensors" in listed
    assert "1 upload of dead runs; delete with --abort" in listed
    assert "foreign" not in listed
    result = json.loads(run("--idle", "0", "--abort", "--json").stdout)
    page = read_keys("json")
    assert find_undocumented(result, {**page[""], **page["`polyak uploads`"]}, set()) == []
    (one,) = result["uploads"]
    assert one["aborted"] is True
    assert bucket.uploads() == ["dir/foreign"]
    assert run().stdout == "no uploads of dead runs\n"
    assert foreign["Key"] == "dir/foreign"


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://example.org/x.safetensors", "cannot be written to; expected one of s3://"),
        ("s3://bucket", "is a whole bucket; name an object or a folder in it"),
    ],
)
def test_an_output_that_cannot_be(bucket: S3Bucket, tmp_path: Path, url: str, said: str) -> None:
    """A URL that cannot be an output is refused in one line."""
    write_run(tmp_path / "run")
    done = average(bucket, "run", "-o", url, cwd=tmp_path)
    assert done.returncode in (2, 3)
    assert said in one_line(done.stderr)


@pytest.mark.parametrize(
    ("last", "said"), [(2, "is the checkpoint"), (1, "is a checkpoint of this run, though not")]
)
def test_no_checkpoint_is_replaced(place: Bucket, tmp_path: Path, last: int, said: str) -> None:
    """As with files, --force replaces an older output and never a checkpoint of the run."""
    write_run(tmp_path / "run")
    place.put_tree(tmp_path)
    before = place.tree()
    for name in ("model_0", "model_1")[:last]:
        done = average(
            place, f"{place.url}/run/", "--last", str(last),
            "-o", f"{place.url}/run/{name}.safetensors", "--force", cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 3
        assert said in one_line(done.stderr)
    assert place.tree() == before


def test_wrong_credentials_are_not_shown(bucket: S3Bucket, tmp_path: Path) -> None:
    """A store that refuses is found before any work, and no secret is in the message."""
    write_run(tmp_path / "run")
    done = average(
        bucket, "run", "-o", f"{bucket.url}/x.safetensors", cwd=tmp_path,
        AWS_SECRET_ACCESS_KEY="verysecret",
    )  # fmt: skip
    assert done.returncode == 3
    assert bucket.name in one_line(done.stderr)
    assert "secret" not in done.stderr


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    """Without boto3, the error before any work names the extra."""
    write_run(tmp_path / "run")
    code = (
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *more: None if name == 'boto3' else real(name, *more)\n"
        "from polyak_cli.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "average", "run", "-o", "s3://bucket/x.safetensors"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert "pip install 'polyak[s3]'" in one_line(done.stderr)
