"""Dask clusters on loopback, started by the commands that users start them with."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.remote.servers import PATIENCE, NoServerError, running


class Cluster(NamedTuple):
    """A scheduler and its workers.

    Attributes:
        address: of the scheduler.
        scheduler: its process.
        workers: the processes of the workers, each of one thread.
    """

    address: str
    scheduler: subprocess.Popen[bytes]
    workers: list[subprocess.Popen[bytes]]


@contextlib.contextmanager
def cluster(folder: Path, environ: dict[str, str], workers: int) -> Iterator[Cluster]:
    """Yield a cluster whose processes have an environment, when all workers are there."""
    where = folder / "scheduler.json"
    command = [
        *(sys.executable, "-m", "distributed.cli.dask_scheduler", "--no-dashboard"),
        *("--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(where)),
    ]
    with contextlib.ExitStack() as stack:
        scheduler = stack.enter_context(running(command, make(folder / "scheduler"), environ))
        wait_until(lambda: where.exists() and where.read_text() != "", scheduler)
        found = Cluster(json.loads(where.read_text())["address"], scheduler, [])
        homes = [make(folder / str(k)) for k in range(workers)]
        for home in homes:
            command = [
                *(sys.executable, "-m", "distributed.cli.dask_worker", found.address),
                *("--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", "."),
            ]
            found.workers.append(stack.enter_context(running(command, home, environ)))
        for home, worker in zip(homes, found.workers, strict=True):
            wait_until(partial(has_said, "Registered to", home), worker)
        yield found


def has_said(text: str, home: Path) -> bool:
    """Return whether the program that runs in a folder has said something."""
    return text in (home / "log").read_text(errors="replace")


def make(folder: Path) -> Path:
    """Make a folder, and return it."""
    folder.mkdir(parents=True)
    return folder


def wait_until(is_ready: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait until a process has done something.

    Raises:
        NoServerError: it ended, or has not done it in a minute.
    """
    deadline = time.monotonic() + PATIENCE
    while not is_ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise NoServerError(f"{process.args!r} does not answer")
        time.sleep(0.05)


def read_cpu(pid: int) -> float:
    """Return the processor seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
