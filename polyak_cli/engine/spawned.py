"""Fold in processes that are started for that, not forked: they may use a network by themselves.

Reading objects through the process that owns the network client costs a message for each piece, and
a forked process cannot be such a client.  Run as a module, this is what the processes do.
"""

from __future__ import annotations

import concurrent.futures as futures
import contextlib
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Generator, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from polyak_cli.engine import shares
from polyak_cli.engine.clusters import Futures
from polyak_cli.engine.executors import make_ended
from polyak_cli.engine.folding import Done, FoldJob
from polyak_cli.engine.shares import Reply
from polyak_cli.engine.slabs import Batch
from polyak_cli.errors import PolyakError

_LENGTH = struct.Struct("<Q")


def _write(stream: IO[bytes], body: bytes) -> None:
    stream.write(_LENGTH.pack(len(body)))
    stream.write(body)
    stream.flush()


def _read(stream: IO[bytes]) -> bytes | None:
    """Return what was written at the other end, or None if that has ended."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    body = stream.read(*_LENGTH.unpack(head))
    return body if len(body) == _LENGTH.unpack(head)[0] else None


@dataclass(frozen=True, slots=True)
class Spawned:
    """Folds in several processes that are started here and end with the fold."""

    jobs: int

    def run(self, job: FoldJob, batches: Iterable[Batch]) -> Generator[Done, None, None]:
        """See `executors.Executor.run`."""
        with contextlib.closing(_Pool(self.jobs)) as pool:
            # Few: a process is idle at the end of each, while its last parts are on their way.
            yield from _Shares(pool, self.jobs, rounds=3).run(job, batches)


class _Shares(Futures):
    """See `Futures`; processes that are of no use any more are ended at once."""

    def stop(self, waiting: Iterable[Future[Reply]]) -> None:
        """See `Futures.stop`."""
        for future in waiting:
            future.cancel()
        if isinstance(self.pool, _Pool):
            self.pool.close()


class _Pool(futures.Executor):
    """Processes, each with a thread that gives it the next task."""

    def __init__(self, jobs: int) -> None:
        self.tasks: queue.SimpleQueue[tuple[Future[Reply], bytes] | None] = queue.SimpleQueue()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.threads: list[threading.Thread] = []
        try:
            for _ in range(jobs):
                self._start()
        except (OSError, RuntimeError) as error:
            self.close()
            raise PolyakError(
                f"no worker process can be started: {error}; allow more memory or processes "
                "(ulimit -v, -u), or use fewer --jobs"
            ) from None

    def _start(self) -> None:
        """Start a process and its thread."""
        package = str(Path(__file__).parents[2])
        known = os.environ.get("PYTHONPATH")
        process = subprocess.Popen(  # noqa: S603 (this very package)
            # -P: no module of the current folder is imported.
            [sys.executable, "-P", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": f"{package}:{known}" if known else package},
        )
        self.processes.append(process)
        thread = threading.Thread(target=self._feed, args=[process], daemon=True)
        thread.start()
        self.threads.append(thread)

    def _feed(self, process: subprocess.Popen[bytes]) -> None:
        """Give a process one task after the other."""
        while (task := self.tasks.get()) is not None:
            future, body = task
            if not future.set_running_or_notify_cancel():
                continue
            reply = None
            if process.stdin and process.stdout:
                with contextlib.suppress(OSError, ValueError):  # it has ended
                    _write(process.stdin, body)
                    reply = _read(process.stdout)
            if reply is None:
                code = process.wait()
                how = signal.Signals(-code).name if code < 0 else f"exit {code}"
                future.set_exception(make_ended(how))
                return
            future.set_result(pickle.loads(reply))  # noqa: S301 (from a process of our own)

    def submit(self, _call: Any, /, *arguments: Any, **_: Any) -> Future[Any]:
        """Have a process call `shares.fold_share`, which is all that it can."""
        future: Future[Any] = Future()
        self.tasks.put((future, pickle.dumps(arguments)))
        return future

    def close(self) -> None:
        """End all processes, whatever they are doing."""
        for process in self.processes:
            process.kill()
        for _ in self.threads:
            self.tasks.put(None)
        for thread in self.threads:
            thread.join()
        for process in self.processes:
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream:
                    with contextlib.suppress(OSError):
                        stream.close()
        self.processes, self.threads = [], []


def main() -> None:
    """Fold one share after the other, until the process that sends them has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is that one's matter
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not print into the replies
    while (body := _read(sys.stdin.buffer)) is not None:
        task = pickle.loads(body)  # noqa: S301 (from the process that started this one)
        _write(replies, pickle.dumps(shares.fold_share(*task)))


if __name__ == "__main__":
    main()
