"""`make bench-remote`: what averaging from a bucket costs, and how it grows with workers.

`floor`: polyak beside only reading every byte from the same server, by the same client; and beside
that with as many bytes written as the output has, in the same parts by the same client.
`scaling`: a proxy bounds each connection, so that the way is the limit, and not this machine: 1, 2,
4 and 8 workers of a Dask cluster average from the bucket to the bucket.  What counts is the time
from the first request for values to the one that completes the upload; all before and after is
start-up (Python, the cluster's client, listing, headers, digests), and given beside it.
`scheduler`: see `tests.remote.simulation`.

Tables go to the terminal, data to `.bench/remote.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from polyak_cli.storage.uploads import PART
from tests.command import POLYAK, ROOT, environment
from tests.remote.clusters import Cluster, cluster, make, read_cpu
from tests.remote.proxy import Proxy, Request
from tests.remote.servers import S3Bucket, seaweedfs
from tests.remote.simulation import simulate

MB = 1_000_000
#: Bytes of a GET of the floor, and how many at a time, as for polyak's values.
_GET, _AT_A_TIME = 8 << 20, 10

#: Reads every byte of some objects, as quickly as obstore can.
READ = f"""
import concurrent.futures, json, os, sys
import obstore
from obstore.store import S3Store
bucket, keys = sys.argv[1], json.loads(sys.argv[2])
store = S3Store(
    bucket, endpoint=os.environ["AWS_ENDPOINT_URL"], region="us-east-1",
    access_key_id=os.environ["AWS_ACCESS_KEY_ID"],
    secret_access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
    virtual_hosted_style_request=False, client_options={{"allow_http": True, "timeout": "120s"}},
)
def fetch(one):
    return len(obstore.get(store, one[0], options={{"range": one[1:]}}).bytes())
ranges = [
    (key, start, min(start + {_GET}, size))
    for key, size in keys for start in range(0, size, {_GET})
]
with concurrent.futures.ThreadPoolExecutor({_AT_A_TIME}) as pool:
    assert sum(pool.map(fetch, ranges)) == sum(size for _, size in keys)
"""


#: Writes an object of some bytes in parts, as quickly as boto3 can.
WRITE = f"""
import concurrent.futures, sys
from polyak_cli.storage import uploads
url, nbytes = sys.argv[1], int(sys.argv[2])
upload = uploads.begin(url, nbytes)
def send(number):
    return uploads.send_part(upload, number, bytes(min({PART}, nbytes - (number - 1) * {PART})))
numbers = range(1, -(-nbytes // {PART}) + 1)
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    uploads.complete(upload, dict(zip(numbers, pool.map(send, numbers))), force=True)
"""


def put_run(bucket: S3Bucket, files: int, nbytes: int, name: str) -> list[tuple[str, int]]:
    """Put checkpoints of bfloat16's size into a folder of a bucket; return their keys and sizes."""
    draw = np.random.default_rng(0)
    shape = (nbytes // 2 // 16 // 1024, 1024)
    values = [draw.standard_normal(shape, np.float32).astype(np.float16) for _ in range(16)]
    kept = []
    with tempfile.TemporaryDirectory() as folder:
        for k in range(1, files + 1):
            path = Path(folder) / f"step_{k}.safetensors"
            tensors = {
                f"model.layers.{n:02d}.weight": one * np.float16(1 + k / 100)
                for n, one in enumerate(values)
            }
            save_file(tensors, path, {"format": "pt"})
            bucket.client.upload_file(str(path), bucket.name, f"{name}/{path.name}")
            kept.append((f"{name}/{path.name}", path.stat().st_size))
            path.unlink()
    return kept


class Measured(dict[str, Any]):
    """Seconds, CPU seconds of this machine's processes, and what was said."""


def measure(commands: Sequence[Sequence[str]], environ: Mapping[str, str]) -> Measured:
    """Run commands at the same time, and return what they took together."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.monotonic()
    started = [
        subprocess.Popen(one, env=environment(**environ), stdout=subprocess.PIPE, text=True)
        for one in commands
    ]
    said = [one.communicate()[0] for one in started]
    took = time.monotonic() - begun
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if any(one.returncode for one in started):
        raise SystemExit(f"failed: {' '.join(commands[0])}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Measured(seconds=took, cpu=cpu, said=said)


def average(bucket: S3Bucket, output: object, *options: object, run: str = "run") -> list[str]:
    """Return the command that averages the run of a bucket."""
    return [*POLYAK, "average", f"{bucket.url}/{run}/", "-o", str(output), "--force", "--json",
            "--no-hash", *map(str, options)]  # fmt: skip


def read_all_cpu(found: Cluster) -> float:
    """Return the processor seconds of a cluster's workers so far."""
    return sum(read_cpu(worker.pid) for worker in found.workers)


class Watch:
    """Notes when the first request for values came, and the one that completes the upload."""

    def __init__(self) -> None:
        self.first = self.last = 0.0

    def __call__(self, request: Request) -> None:
        """Look at a request; see `proxy.Rule`."""
        low, _, high = request.headers.get("range", "").removeprefix("bytes=").partition("-")
        if not self.first and high and int(high) - int(low) > MB:
            self.first = time.monotonic()
        if request.method == "POST" and "uploadId" in request.query:
            self.last = time.monotonic()


def scale(folder: Path, bucket: S3Bucket, asked: Any) -> list[dict[str, Any]]:
    """Measure 1, 2, 4 and 8 workers behind a proxy that bounds each connection."""
    rows: list[dict[str, Any]] = []
    # As many whole parts for each of the workers, of which each is folded by one of them.
    size = max(asked.workers) * asked.parts * PART - (1 << 20)
    keys = put_run(bucket, asked.scaling_files, size, "scaling")
    nbytes = sum(n for _, n in keys)
    with Proxy(bucket.server, asked.rate, asked.delay) as proxy:
        environ = bucket.environ | proxy.environ
        for workers in asked.workers:
            home = make(folder / f"cluster-{workers}")
            with cluster(home, environment(**environ), workers) as made:
                command = average(bucket, f"{bucket.url}/o.safetensors", "--engine", "dask",
                                  "--scheduler", made.address, run="scaling")  # fmt: skip
                proxy.traffic.clear()
                proxy.rules = [watch := Watch()]
                cpu, own = read_all_cpu(made), time.process_time()
                found = measure([command], environ)
                seconds = watch.last - watch.first
                rows.append({
                    "workers": workers,
                    "seconds": seconds,
                    "MB/s": nbytes / seconds / MB,
                    "of linear": 0.0,
                    "seconds of start-up": found["seconds"] - seconds,
                    "CPU seconds a GB": (found["cpu"] + read_all_cpu(made) - cpu) / (nbytes / 1e9),
                    "proxy's CPU seconds": time.process_time() - own,
                    "requests": dict(proxy.traffic.requests),
                    "connections": proxy.traffic.most_open,
                })  # fmt: skip
                first, row = rows[0], rows[-1]
                ideal = first["seconds"] * first["workers"] / workers
                row["of linear"] = ideal / seconds
                print(json.dumps(row), flush=True)
    return rows


def compare(folder: Path, bucket: S3Bucket, keys: Sequence[tuple[str, int]],
            asked: Any) -> list[dict[str, Any]]:  # fmt: skip
    """Measure only reading every byte, and averaging, without any bound."""
    nbytes = sum(size for _, size in keys)
    jobs = asked.jobs
    shares = [json.dumps(keys[k::jobs]) for k in range(jobs)]
    environ = bucket.environ
    local = folder / "o.safetensors"
    with cluster(make(folder / "cluster"), environment(**environ), jobs) as made:
        dask = ("--engine", "dask", "--scheduler", made.address)
        read = [[sys.executable, "-c", READ, bucket.name, one] for one in shares]
        write = [sys.executable, "-c", WRITE, f"{bucket.url}/o", str(keys[0][1])]
        contenders: dict[str, Any] = {
            "only reading": read,
            "only reading and writing": [*read, write],
            "here, to the disk": [average(bucket, local, "--jobs", jobs)],
            "here, to the bucket": [
                average(bucket, f"{bucket.url}/o1.safetensors", "--jobs", jobs)
            ],
            "dask, to the disk": [average(bucket, local, *dask)],
            "dask, to the bucket": [average(bucket, f"{bucket.url}/o2.safetensors", *dask)],
        }
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
        for _ in range(asked.rounds):
            for name, commands in contenders.items():
                cpu = read_all_cpu(made)
                found = measure(commands, environ)
                used = found["cpu"] + read_all_cpu(made) - cpu
                rows[name].append({"seconds": found["seconds"],
                                   "CPU seconds a GB": used / (nbytes / 1e9)})  # fmt: skip
    best = {name: min(runs, key=lambda run: run["seconds"]) for name, runs in rows.items()}
    floor = best["only reading"]["seconds"]
    table = [{"what": name, **row, "MB/s": nbytes / row["seconds"] / MB,
              "of the floor": row["seconds"] / floor} for name, row in best.items()]  # fmt: skip
    for row in table:
        print(json.dumps(row), flush=True)
    return table


def main() -> None:
    """Run what is asked for."""
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("only", nargs="*", default=["floor", "scaling", "scheduler"])
    ask.add_argument("--files", type=int, default=10, help="checkpoints")
    ask.add_argument("--size", type=float, default=100.0, help="MB of a checkpoint")
    ask.add_argument("--scaling-files", type=int, default=2, help="checkpoints behind the bound")
    ask.add_argument("--parts", type=int, default=20, help="parts for each of the most workers")
    ask.add_argument("--rate", type=float, default=2.8e6, help="bytes a second of a connection")
    ask.add_argument("--delay", type=float, default=0.02, help="seconds before each answer")
    ask.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4, 8])
    ask.add_argument("--jobs", type=int, default=2, help="processes, without a bound")
    ask.add_argument("--rounds", type=int, default=3, help="without a bound")
    ask.add_argument("--seconds", type=float, default=1.35, help="that a simulated share takes")
    ask.add_argument("--out", type=Path, default=ROOT / ".bench/remote.json")
    asked = ask.parse_args()
    found: dict[str, Any] = {"asked": {k: str(v) for k, v in vars(asked).items()}}
    with tempfile.TemporaryDirectory(prefix="polyak-bench-") as name, contextlib.ExitStack() as s:
        folder = Path(name)
        if {"floor", "scaling"} & {*asked.only}:
            (folder / "server").mkdir()
            bucket = S3Bucket.create(s.enter_context(seaweedfs(folder / "server")))
            if "floor" in asked.only:
                keys = put_run(bucket, asked.files, round(asked.size * MB), "run")
                found["floor"] = compare(folder, bucket, keys, asked)
            if "scaling" in asked.only:
                found["scaling"] = scale(folder, bucket, asked)
        if "scheduler" in asked.only:
            found["scheduler"] = [simulate(64, 0.0), simulate(64, asked.seconds)]
            print(json.dumps(found["scheduler"], indent=2))
    asked.out.parent.mkdir(exist_ok=True)
    asked.out.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
