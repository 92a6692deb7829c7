"""What Dask does when 64 workers average 405e9 numbers: all but reading and folding.

All is real but the shares, which only sleep: the plan of slabs, the shares and their pickles, the
coordinator's loop, Dask's scheduler in a process of its own, and 64 of its workers, all in one
process.  `python -m tests.remote.simulation` prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from polyak_cli.engine import clusters, sinks
from polyak_cli.engine.folding import FoldJob
from polyak_cli.engine.slabs import (
    FoldTensor,
    Memory,
    Share,
    TensorSource,
    cut_slabs,
    gather_parts,
)
from polyak_cli.engine.timing import Totals
from polyak_cli.storage import File, Version, mirrors
from polyak_cli.storage.uploads import Upload
from polyak_cli.tensors import Extent, Placement
from tests.command import environment
from tests.remote.clusters import Cluster, cluster, has_said, make, read_cpu, wait_until
from tests.remote.servers import running

#: Numbers of Llama 3.1 405B, of bfloat16, in about as many tensors.
NUMBERS, TENSORS = 405_000_000_000, 1138
CHECKPOINTS = 10
#: Bytes that a share writes: 6,035 parts are 810 GB.
PART = 128 << 20
#: What a share that is simulated has done.
DONE = {
    "totals": list(Totals()),
    "samples": None,
    "constants": [],
    "kernel": "compiled",
    "receipts": {0: {1: "0" * 34}},
    "written": {},
    "sums": [],
    "peak": 0,
}


def make_parts(tensors: int) -> Iterator[Share]:
    """Yield the parts of an average of so many tensors of this size, as `executors.fold` does."""
    memory = Memory.within(1 << 30, 1).for_objects(CHECKPOINTS).align()
    size = NUMBERS // TENSORS
    nbytes = 2 * size
    folded = [
        FoldTensor(
            f"model.layers.{k}.weight",
            size,
            [TensorSource(Extent(k * nbytes, nbytes, n), "bfloat16", "<", n)
             for n in range(CHECKPOINTS)],
            [Placement(k * nbytes, "bfloat16", "<")],
        )
        for k in range(tensors)
    ]  # fmt: skip
    slabs = cut_slabs(
        folded,
        memory.piece,
        memory.most,
        aligned=memory.aligned,
        pieces=memory.tuning.pieces_per_batch,
    )
    return gather_parts(slabs, [PART], memory)


def make_job(output: str) -> FoldJob:
    """Return the job of ten checkpoints in a bucket."""
    inputs = [
        File(f"s3://bucket/run/step_{k}/model.safetensors", Version(0, 0, 2 * NUMBERS, 0))
        for k in range(CHECKPOINTS)
    ]
    coefficients = np.full((1, CHECKPOINTS), 1 / CHECKPOINTS)
    return FoldJob(inputs, [output], coefficients, [1.0], False, parts=[PART])


async def serve(address: str, count: int, seconds: float) -> None:
    """Run workers of a scheduler, all in this process, whose shares take so many seconds."""
    import distributed

    def sleep(*_: object) -> dict[str, Any]:
        time.sleep(seconds)
        return {"worker": distributed.get_worker().address, "done": DONE}

    vars(clusters)["run_on_dask"] = sleep  # `clusters` looks it up by its name
    start: Any = distributed.Worker
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(count):
            await start(
                address, nthreads=1, memory_limit=0, dashboard=False, local_directory=folder
            )
        print("ready", flush=True)
        await asyncio.Event().wait()


@contextlib.contextmanager
def serving(folder: Path, workers: int, seconds: float) -> Iterator[Cluster]:
    """Yield a scheduler with workers that all are in one other process."""
    environ = environment()
    with contextlib.ExitStack() as stack:
        found = stack.enter_context(cluster(folder, environ, 0))
        command = [
            *(sys.executable, "-m", "tests.remote.simulation", "--serve", found.address),
            *("--workers", str(workers), "--seconds", str(seconds)),
        ]
        home = make(folder / "workers")
        served = stack.enter_context(running(command, home, environ))
        wait_until(partial(has_said, "ready", home), served)
        yield found


@contextlib.contextmanager
def uploading(folder: Path) -> Iterator[str]:
    """Yield the name of a file that counts as being sent in parts; of it only the size is there."""
    path = folder / "o"
    with path.open("xb") as file:
        file.truncate(2 * NUMBERS)
    upload = Upload("s3://bucket/o", "upload", "token", PART, 2 * NUMBERS)
    with (
        mock.patch.object(sinks, "find_sinks", return_value=[upload]),
        mock.patch.object(mirrors, "add_receipts"),
    ):
        yield str(path)


def simulate(workers: int, seconds: float, tensors: int = TENSORS) -> dict[str, Any]:
    """Run all parts on a cluster, one a share, and return what that took."""
    begun = time.process_time()
    count = sum(1 for _ in make_parts(tensors))
    cutting = time.process_time() - begun
    with (
        tempfile.TemporaryDirectory() as name,
        uploading(Path(name)) as output,
        serving(Path(name), workers, seconds) as made,
    ):
        pid = made.scheduler.pid
        with clusters.start("dask", made.address, 0) as executor:
            assert isinstance(executor, clusters.Dask)
            executor.share_nbytes = 1
            cpu, own, start = read_cpu(pid), time.process_time(), time.monotonic()
            parts: Any = make_parts(tensors)
            done = sum(1 for _ in executor.run(make_job(output), parts))
            took = time.monotonic() - start
            assert done == count
            return {
                "workers": workers,
                "shares": count,
                "seconds of a share": seconds,
                "seconds": took,
                "seconds if nothing were in the way": count * seconds / workers,
                "scheduler's CPU seconds": read_cpu(pid) - cpu,
                "coordinator's CPU seconds": time.process_time() - own,
                "CPU seconds of cutting into parts": cutting,
            }


def main() -> None:
    """Run the simulation, or the workers of it."""
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--workers", type=int, default=64)
    ask.add_argument("--seconds", type=float, default=0.0, help="that a share takes")
    ask.add_argument("--tensors", type=int, default=TENSORS)
    ask.add_argument("--serve", help=argparse.SUPPRESS)
    given = ask.parse_args()
    if given.serve:
        asyncio.run(serve(given.serve, given.workers, given.seconds))
    else:
        print(json.dumps(simulate(given.workers, given.seconds, given.tensors), indent=2))


if __name__ == "__main__":
    main()
