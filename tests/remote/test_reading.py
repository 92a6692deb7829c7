"""Buckets are read as folders are: listed, chosen from, looked at and averaged, to the same bytes.

Objects are put by the vendors' own clients, and the averages of the same files on the disk are what
is expected.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.command import POLYAK, environment, polyak
from tests.remote.servers import AzureContainer, S3Bucket

TENSORS = {"a/kernel": (300, 257), "a/bias": (257,), "b/scale": (3,)}


def write_run(folder: Path, epochs: int = 4, rows: int = 300) -> Path:
    """Write checkpoints of one run."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    shapes = TENSORS | {"a/kernel": (rows, 257)}
    values = {name: np.zeros(shape, "f4") for name, shape in shapes.items()}
    for epoch in range(1, epochs + 1):
        for name, shape in shapes.items():
            values[name] = values[name] + np.float32(0.01) * draw.standard_normal(shape).astype(
                "f4"
            )
        save_file(values, folder / f"epoch_{epoch:02d}.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def run(bucket: S3Bucket, tmp_path: Path) -> Path:
    """Write a run to a folder and put the same files into the bucket under ``run/``."""
    folder = write_run(tmp_path / "run")
    bucket.put_tree(folder, "run/")
    return folder


def expect(bucket: S3Bucket, cwd: Path, *arguments: object) -> str:
    """Run a command that must succeed, and return what it prints."""
    done = polyak(*arguments, cwd=cwd, environ=bucket.environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refuse(bucket: S3Bucket, cwd: Path, *arguments: object, **more: str) -> str:
    """Run a command that must fail with one line, and return it."""
    done = polyak(*arguments, cwd=cwd, environ=bucket.environ | more)
    assert done.returncode in (2, 3), done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.mark.parametrize(
    ("source", "options", "kernel"),
    [
        ("run/", ("--last", "2"), "compiled"),
        ("run", ("--from", "2", "--scheme", "linear"), "numpy"),
        ("run/epoch_0[13].safetensors", ("--no-hash",), "numpy"),
        ("*/epoch_*", ("--every", "2", "--no-hash"), "compiled"),
    ],
)
def test_an_average_has_the_bytes_of_the_local_one(
    bucket: S3Bucket, run: Path, source: str, options: tuple[str, ...], kernel: str
) -> None:
    """Folders, patterns and the options that choose work as on the disk, with either kernel."""
    local = run.parent / source
    bucket.environ["POLYAK_KERNEL"] = kernel
    if kernel == "compiled" and find_spec("polyak_cli.engine._kernel") is None:
        pytest.skip("the compiled kernel is not here")
    for place, output in ((local, "a.safetensors"), (f"{bucket.url}/{source}", "b.safetensors")):
        expect(bucket, run.parent, "average", place, *options, "-o", output)
    here, there = ((run.parent / name).read_bytes() for name in ("a.safetensors", "b.safetensors"))
    assert here == there


def test_names_are_urls_without_secrets(bucket: S3Bucket, run: Path) -> None:
    """Plan, data and record call objects by their URLs or names; no local path or key is shown."""
    plan = expect(bucket, run, "average", f"{bucket.url}/run/", "-n", "--json")
    paths = [one["path"] for one in json.loads(plan)["checkpoints"]]
    assert paths == [f"{bucket.url}/run/epoch_{k:02d}.safetensors" for k in (1, 2, 3, 4)]
    looked = expect(bucket, run, "inspect", paths[0])
    assert looked.startswith(f"{paths[0]}: safetensors")
    report = expect(bucket, run, "average", *paths, "-o", "c.safetensors", "--json")
    written = (run / "c.safetensors").read_bytes()
    for text in (plan, looked, report, written.decode("latin-1")):
        assert bucket.server.environ["AWS_SECRET_ACCESS_KEY"] not in text
        assert "polyak-gateway" not in text


def test_runs_are_looked_at(bucket: S3Bucket, run: Path) -> None:
    """`check`, `diff` and `inspect --stats` say of objects what they say of the files."""
    for command in (["check", "{}", "--json"], ["diff", "{}", "--json"], ["inspect", "--stats",
                    "--json", "{}/epoch_01.safetensors", "{}/epoch_04.safetensors"]):  # fmt: skip
        here = expect(bucket, run, *(one.format(run) for one in command))
        there = expect(bucket, run, *(one.format(f"{bucket.url}/run") for one in command))
        found = json.loads(there.replace(f"{bucket.url}/run", str(run)))
        expected = json.loads(here)
        for one in (found, expected):  # of an object it is the time when it was put
            for row in one.get("checkpoints", ()):
                row.pop("modified", None)
        assert found == expected


def test_the_best_are_chosen_by_a_log_beside_them(bucket: S3Bucket, run: Path) -> None:
    """The log of --best may be an object too."""
    log = "epoch,val_loss\n0,0.4\n1,0.1\n2,0.3\n3,0.2\n"
    bucket.put("run/log.csv", log.encode())
    (run / "log.csv").write_text(log)
    options = ("--best", "2", "--log-first", "0", "-n", "--json")
    there = expect(bucket, run, "average", f"{bucket.url}/run/", "--log",
                   f"{bucket.url}/run/log.csv", *options)  # fmt: skip
    here = expect(bucket, run, "average", run, "--log", run / "log.csv", *options)
    chosen = [[one["name"] for one in json.loads(text)["checkpoints"]] for text in (here, there)]
    assert chosen[0] == chosen[1] == ["epoch_02.safetensors", "epoch_04.safetensors"]


ODD = ["a b/epoch_1.safetensors", "ü/epoch_1.safetensors", "p%20q/epoch_1.safetensors",
       "x+&=?#/epoch_1.safetensors", "[1]/epoch_1.safetensors"]  # fmt: skip


@pytest.mark.parametrize("key", ODD)
def test_odd_keys_are_read(bucket: S3Bucket, run: Path, key: str) -> None:
    """Spaces, letters beyond ASCII, percent signs and brackets are parts of names."""
    bucket.put(key, (run / "epoch_01.safetensors").read_bytes())
    assert expect(bucket, run, "inspect", f"{bucket.url}/{key}").startswith(f"{bucket.url}/{key}:")


def test_what_cannot_be_read_is_one_line(bucket: S3Bucket, run: Path) -> None:
    """No such object, bucket or scheme, no access: each is named, with what to do."""
    there = f"{bucket.url}/run/"
    assert refuse(bucket, run, "inspect", f"{there}none.h5").startswith(f"{there}none.h5: ")
    line = refuse(bucket, run, "average", "s3://polyak-no-such-bucket/run/", "-n")
    assert line.startswith("s3://polyak-no-such-bucket/run/: ")
    assert "404" in line
    line = refuse(bucket, run, "average", there, "-n", AWS_SECRET_ACCESS_KEY="wrong")
    assert line.startswith(f"{bucket.url}/run: cannot be read: access is denied (403")
    assert "AWS_ACCESS_KEY_ID" in line
    line = refuse(bucket, run, "average", "ftp://host/run/", "-n")
    assert line.startswith("ftp://host/run/: ftp:// is not supported; expected a path or one of s3")
    line = refuse(bucket, run, "average", there, "-o", "gs://b/o.h5")
    assert "'-o' / '--output' must be a local file" in line or "gs://" in line


def test_names_that_no_file_can_have_are_refused(bucket: S3Bucket, run: Path) -> None:
    """An object below the name of another, and a part of a key that is too long, are named."""
    bucket.put("run/epoch_01.safetensors/x", b"x")
    line = refuse(bucket, run, "average", f"{bucket.url}/run/", "-n")
    assert "holds the object 'run/epoch_01.safetensors' and others below" in line
    bucket.put("odd/ta\tb.safetensors", b"x")
    line = refuse(bucket, run, "average", f"{bucket.url}/odd/", "-n")
    assert "odd/: holds the object 'odd/ta\\tb.safetensors', a name that no file can have" in line


def test_a_changed_object_is_refused_and_nothing_is_written(
    bucket: S3Bucket, tmp_path: Path
) -> None:
    """An object that was replaced after it was listed is named, and there is no output."""
    run = write_run(tmp_path / "run", 2, 5000)  # more than is fetched whole
    bucket.put_tree(run, "run/")
    code = """
import sys, polyak_cli.averaging.writing as module
original = module.write_average
def pausing(*arguments, **options):
    print("pausing", flush=True)
    sys.stdin.readline()
    return original(*arguments, **options)
import polyak_cli.pipeline
polyak_cli.pipeline.write_average = pausing
from polyak_cli.cli import main
main(sys.argv[1:])
"""
    source = f"{bucket.url}/run/"
    with subprocess.Popen(
        [sys.executable, "-c", code, "average", source, "-o", "c.safetensors", "--no-hash"],
        cwd=run.parent,
        env=environment(**bucket.environ),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "pausing\n"
        bucket.put("run/epoch_02.safetensors", (run / "epoch_01.safetensors").read_bytes())
        _, errors = process.communicate("\n", timeout=60)
    assert process.returncode == 3
    assert f"{source}epoch_02.safetensors: tensor " in errors
    assert "changed while it was read" in errors
    assert not [path for path in run.parent.iterdir() if path.name != "run"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_gateway_and_no_stand_ins(
    bucket: S3Bucket, run: Path, tmp_path: Path, how: signal.Signals
) -> None:
    """Whatever ends the process, its gateway ends too, and removes what it has made."""
    (tmp_path / "t").mkdir()
    code = """
import sys, time
from polyak_cli.storage import mirrors
print(mirrors.enter(sys.argv[1]), mirrors._mirror.client.process.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, f"{bucket.url}/run/"],
        env=environment(TMPDIR=str(tmp_path / "t"), **bucket.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout
        path, pid = process.stdout.readline().split()
        assert sorted(os.listdir(path)) == sorted(os.listdir(run))
        process.send_signal(how)
        process.wait(30)
    deadline = time.monotonic() + 30
    while (Path(f"/proc/{pid}").exists() or os.listdir(tmp_path / "t")) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
    assert os.listdir(tmp_path / "t") == []


def test_a_forked_child_may_read_what_is_listed_and_nothing_else(
    bucket: S3Bucket,
    run: Path,  # noqa: ARG001 (what it has put is read)
) -> None:
    """The gateway refuses a sandboxed child to list, and to read what was not listed."""
    bucket.put("other/secret", b"secret")
    code = """
import sys
from polyak_cli.errors import PolyakError
from polyak_cli.processes import sandbox
from polyak_cli.storage import mirrors, open_input
path = mirrors.enter(sys.argv[1])
client = mirrors._mirror.client
def look(request, heartbeat):
    with open_input(path) as file:
        found = [len(file.read(0, 100))]
    root = client.root
    for op, arguments in (
        ("list", {"url": sys.argv[2]}),
        ("fetch", {"paths": [path]}),
        ("fill", {"path": root + sys.argv[2].replace("://", "/"), "version": [0, 0, 6, 0, ""],
                  "first": 0, "count": 1}),
    ):
        try:
            found.append(client.ask(op, **arguments))
        except PolyakError as error:
            found.append(str(error))
    return found
(found,) = sandbox.run_each(look, [0], ["x"])
print(*found, sep="\\n")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, f"{bucket.url}/run/epoch_01.safetensors",
         f"{bucket.url}/other/secret"],
        env=environment(**bucket.environ), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        "100",
        "the gateway refuses 'list' to this process",
        "the gateway refuses 'fetch' to this process",
        "cannot be read: it is none of the objects that were listed",
    ], done.stderr


def test_no_process_that_forks_has_a_network_client(bucket: S3Bucket, run: Path) -> None:
    """Every fork of an average, a check and an inspection is of a process without obstore.

    obstore waits for ever in a child that was forked from a process that has used it; an alarm ends
    the command if that happens.
    """
    code = """
import os, signal, sys
signal.alarm(100)
original = os.fork
forks = []
def fork():
    forks.append([name for name in ("obstore", "boto3", "botocore") if name in sys.modules])
    return original()
os.fork = fork
import atexit
atexit.register(lambda: print(len(forks) > 0, [one for one in forks if one], flush=True))
from polyak_cli.cli import main
main(sys.argv[1:])
"""
    for command in (
        ["average", f"{bucket.url}/run/", "-o", "f.safetensors", "-q", "--verify"],
        ["check", f"{bucket.url}/run/", "-q"],
        ["inspect", "--stats", f"{bucket.url}/run/epoch_01.safetensors"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *command],
            cwd=run.parent,
            env=environment(POLYAK_KERNEL="numpy", **bucket.environ),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.stdout.splitlines()[-1] == "True []", (command, done.stdout, done.stderr)


def test_the_folder_of_a_killed_run_is_removed_by_the_next(
    bucket: S3Bucket, run: Path, tmp_path: Path
) -> None:
    """Not that of a run that lives, nor other folders of such names."""
    bucket.put_tree(run, "run/")
    (tmp_path / "tmp" / "polyak-other").mkdir(parents=True)
    code = """
import sys
from polyak_cli.storage import mirrors
mirrors.enter(sys.argv[1])
print(mirrors._mirror.client.process.pid, flush=True)
sys.stdin.read()
"""
    environ = environment(**bucket.environ, TMPDIR=str(tmp_path / "tmp"))
    started = []
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", code, f"{bucket.url}/run/"],
            env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout
        started.append((process, int(process.stdout.readline())))
    assert len(list((tmp_path / "tmp").iterdir())) == 3
    killed, gateway = started[0]
    os.kill(gateway, signal.SIGKILL)
    killed.kill()
    killed.communicate()
    done = subprocess.run([*POLYAK, "inspect", f"{bucket.url}/run/epoch_01.safetensors"],
                          env=environ, capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "tmp").iterdir())) == 2
    started[1][0].communicate("")
    assert [path.name for path in (tmp_path / "tmp").iterdir()] == ["polyak-other"]


def test_two_processes_read_one_bucket_at_a_time(bucket: S3Bucket, run: Path) -> None:
    """Each has a gateway of its own."""
    command = [*POLYAK, "average", f"{bucket.url}/run/", "-q", "-o"]
    both = [
        subprocess.Popen([*command, f"{k}.safetensors"], cwd=run.parent,
                         env=environment(**bucket.environ))
        for k in range(2)
    ]  # fmt: skip
    assert [one.wait(60) for one in both] == [0, 0]
    one, other = ((run.parent / f"{k}.safetensors").read_bytes() for k in range(2))
    assert one == other


def test_python_reads_urls_too(bucket: S3Bucket, run: Path) -> None:
    """The functions of the package take URLs as texts, and threads may share them."""
    code = """
import sys, threading
import polyak_cli
url = sys.argv[1]
report = polyak_cli.average(url, "p.safetensors", last=2)
print(len(report.plan.checkpoints), report.data()["template"])
def work(k):
    polyak_cli.average(url, f"t{k}.safetensors", last=2)
threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
[one.start() for one in threads]; [one.join() for one in threads]
names = ["p.safetensors", *(f"t{k}.safetensors" for k in range(3))]
print(len({open(name, "rb").read() for name in names}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, f"{bucket.url}/run/"], cwd=run.parent,
        env=environment(**bucket.environ), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        f"2 {bucket.url}/run/epoch_04.safetensors",
        "1",
    ], done.stderr


def test_a_bucket_is_watched(bucket: S3Bucket, run: Path, tmp_path: Path) -> None:
    """The average is current after an object was added, and one was replaced; none is local."""
    names = sorted(path.name for path in run.iterdir())
    for name in names[2:]:
        bucket.delete(f"run/{name}")
    command = [*POLYAK, "watch", f"{bucket.url}/run/", "-o", "w.safetensors", "--interval", "0.2"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment(**bucket.environ | {"PYTHONUNBUFFERED": "1"}),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        assert process.stdout
        assert "2 checkpoints" in process.stdout.readline()
        bucket.put(f"run/{names[2]}", (run / names[2]).read_bytes())
        assert "3 checkpoints" in process.stdout.readline()
        bucket.put(f"run/{names[0]}", (run / names[3]).read_bytes())
        assert "checkpoints" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.wait(30)
    (run / names[0]).write_bytes((run / names[3]).read_bytes())
    (run / names[3]).unlink()
    expect(bucket, tmp_path, "average", run, "-o", "l.safetensors")
    assert (tmp_path / "w.safetensors").read_bytes() == (tmp_path / "l.safetensors").read_bytes()


def test_watching_begins_before_there_is_an_object(bucket: S3Bucket, tmp_path: Path) -> None:
    """A folder of a bucket is there although it holds nothing yet."""
    done = polyak("watch", f"{bucket.url}/none/", "-o", "w.h5", "--once", "--interval", "0.1",
                  cwd=tmp_path, environ=bucket.environ)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")
    assert f"{bucket.url}/none: no complete checkpoint is here yet" in done.stderr


def test_an_average_is_verified_against_a_bucket(bucket: S3Bucket, run: Path) -> None:
    """The average may lie there too; a checkpoint that differs is named by its URL."""
    expect(bucket, run.parent, "average", f"{bucket.url}/run/", "-o", "v.safetensors")
    found = expect(bucket, run.parent, "verify", "v.safetensors", "--source", f"{bucket.url}/run/")
    assert "verified" in found
    bucket.put("run/v.safetensors", (run.parent / "v.safetensors").read_bytes())
    assert "verified" in expect(bucket, run.parent, "verify", f"{bucket.url}/run/v.safetensors")
    bucket.put("v.safetensors", (run.parent / "v.safetensors").read_bytes())
    (run.parent / "elsewhere").mkdir()
    done = polyak("verify", f"{bucket.url}/v.safetensors", cwd=run.parent / "elsewhere",
                  environ=bucket.environ)  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "")
    assert f"of that name in {bucket.url}, whose folders are not searched, or" in done.stdout
    bucket.put("run/epoch_02.safetensors", (run / "epoch_01.safetensors").read_bytes())
    done = polyak("verify", "v.safetensors", "--source", f"{bucket.url}/run/", cwd=run.parent,
                  environ=bucket.environ)  # fmt: skip
    assert done.returncode == 1
    assert "epoch_02.safetensors" in done.stdout


def test_a_library_is_given_a_copy_that_is_removed(bucket: S3Bucket, run: Path) -> None:
    """Keras opens files by their names: objects are fetched for it, one at a time."""
    code = """
import sys
from pathlib import Path
from polyak_cli.storage import mirrors
for epoch in (1, 2):
    path = mirrors.enter(f"{sys.argv[1]}epoch_0{epoch}.safetensors")
    with mirrors.fetched([path]) as local:
        here = Path(sys.argv[2], local.name).read_bytes()
        print(local.read_bytes() == here, str(local) != path, *mirrors.describe_fetched(path))
    print(local.exists(), len(list(Path(mirrors._mirror.client.root).glob("copy-*"))))
with mirrors.fetched([sys.argv[2]]) as local:
    print(str(local) == sys.argv[2], mirrors.describe_fetched(sys.argv[2]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, f"{bucket.url}/run/", run],
        env=environment(**bucket.environ), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    size = (run / "epoch_01.safetensors").stat().st_size / 1000
    fetched = [f"True True was fetched to TMPDIR, {size:.3g} kB", "False 0"]
    assert done.stdout.splitlines() == [*fetched, *fetched, "True []"], done.stderr


def test_an_azure_container_is_averaged(container: AzureContainer, tmp_path: Path) -> None:
    """az:// is read as s3:// is, to the same bytes."""
    run = write_run(tmp_path / "run", 3)
    container.put_tree(run, "a run/")
    for source, output in ((run, "l.safetensors"), (f"{container.url}/a run/", "r.safetensors")):
        done = polyak("average", source, "-o", output, cwd=tmp_path, environ=container.environ)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "l.safetensors").read_bytes() == (tmp_path / "r.safetensors").read_bytes()


@pytest.mark.soak
def test_of_many_objects_only_headers_are_fetched(bucket: S3Bucket, tmp_path: Path) -> None:
    """A thousand checkpoints are listed, looked at and chosen from with a request or two each."""
    run = write_run(tmp_path / "run", 2, 600)
    one, other = (path.read_bytes() for path in sorted(run.iterdir()))
    for epoch in range(1000):
        bucket.put(f"run/epoch_{epoch:04d}.safetensors", one if epoch < 999 else other)
    code = """
import atexit, sys
from polyak_cli.storage import mirrors
def report():
    requests, retries, nbytes = mirrors._mirror.client.ask("count")
    print(requests, nbytes, file=sys.stderr)
atexit.register(report)  # before that which ends the gateway
from polyak_cli.cli import main
path = mirrors.enter(sys.argv[2])
atexit.unregister(mirrors.close)
main(sys.argv[1:])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "average", f"{bucket.url}/run/", "--last=2", "-n", "--json"],
        cwd=tmp_path, env=environment(**bucket.environ), capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    requests, nbytes = map(int, done.stderr.split()[-2:])
    assert "epoch_0998.safetensors" in done.stdout
    assert requests <= 1100
    assert nbytes <= 1000 * (65 << 10) + 2 * len(one)
