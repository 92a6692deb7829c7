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
import sys
import threading
import traceback
from collections.abc import Generator, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import IO, Any

from polyak_cli.engine import shares
from polyak_cli.engine.folding import Done, FoldJob
from polyak_cli.engine.pools import Futures
from polyak_cli.engine.shares import Reply
from polyak_cli.engine.slabs import Batch
from polyak_cli.errors import PolyakError
from polyak_cli.processes.children import make_ended
from polyak_cli.processes.modules import start_module

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
            yield from _Shares(pool, self.jobs).run(job, batches)


class _Shares(Futures):
    """See `Futures`; processes that are of no use any more are ended at once."""

    def stop(self, waiting: Iterable[Future[Reply]]) -> None:
        """See `Futures.stop`."""
        for future in waiting:
            future.cancel()
        if isinstance(self.pool, _Pool):
            self.pool.close()


class _Pool(futures.Executor):
    """Processes, each of which takes the next task."""

    def __init__(self, jobs: int) -> None:
        self.tasks: _Tasks = queue.SimpleQueue()
        self.processes: list[_Process] = []
        try:
            for _ in range(jobs):
                self.processes.append(_Process(self.tasks))
        except (OSError, RuntimeError) as error:
            self.close()
            raise PolyakError(
                f"no worker process can be started: {error}; allow more memory or processes "
                "(ulimit -v, -u), or use fewer --jobs"
            ) from None

    def submit(self, _call: Any, /, *arguments: Any, **_: Any) -> Future[Any]:
        """Have a process call `shares.fold_share`, which is all that it can."""
        future: Future[Any] = Future()
        self.tasks.put((future, arguments))
        return future

    def close(self) -> None:
        """End all processes, whatever they are doing."""
        for process in self.processes:
            process.popen.kill()
            self.tasks.put(None)  # for any of them, all of which are to end
            process.is_free.release()
        for process in self.processes:
            process.close()
        self.processes = []


#: What waits for a process; None for one that is to end.
_Tasks = queue.SimpleQueue[tuple[Future[Reply], tuple[Any, ...]] | None]


class _Process:
    """A process, a thread that gives it tasks, and one that takes its replies.

    It gets a task when it fetches no more for the one before, whose last parts come and go yet.
    """

    def __init__(self, tasks: _Tasks) -> None:
        self.tasks = tasks
        self.sent: dict[int, Future[Reply]] = {}
        self.lock = threading.Lock()
        self.ended = ""  # how, when it has
        self.is_free = threading.Semaphore(1)
        self.popen = start_module(__name__)
        self.threads = [
            threading.Thread(target=work, daemon=True) for work in (self._feed, self._listen)
        ]
        try:
            for thread in self.threads:
                thread.start()
        except RuntimeError:
            self.popen.kill()
            self.popen.wait()
            raise

    def _feed(self) -> None:
        while self.is_free.acquire() and (task := self.tasks.get()) is not None:
            future, arguments = task
            if not future.set_running_or_notify_cancel():
                self.is_free.release()
                continue
            number = id(future)
            with self.lock:
                self.sent[number] = future
                if self.ended:
                    self._fail()
                    return
            if self.popen.stdin:
                with contextlib.suppress(OSError, ValueError):  # it has ended, as `_listen` finds
                    _write(self.popen.stdin, pickle.dumps((number, arguments)))

    def _listen(self) -> None:
        while self.popen.stdout and (body := _read(self.popen.stdout)) is not None:
            number, reply = pickle.loads(body)  # noqa: S301 (from a process of our own)
            if reply is None:
                self.is_free.release()
            else:
                self.sent.pop(number).set_result(reply)
        code = self.popen.wait()
        with self.lock:
            self.ended = signal.Signals(-code).name if code < 0 else f"exit {code}"
            self._fail()

    def _fail(self) -> None:
        """Report to all who wait for this process that it has ended."""
        while self.sent:
            _, future = self.sent.popitem()
            future.set_exception(make_ended(self.ended))

    def close(self) -> None:
        """Wait for its end."""
        for thread in self.threads:
            thread.join()
        self.popen.wait()
        for stream in (self.popen.stdin, self.popen.stdout):
            if stream:
                with contextlib.suppress(OSError):
                    stream.close()


def main() -> None:
    """Fold one share after the other, until the process that sends them has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is that one's matter
    replies, lock = os.fdopen(os.dup(1), "wb"), threading.Lock()
    os.dup2(2, 1)  # a library that prints must not print into the replies

    def answer(number: int, reply: Reply | None) -> None:
        with lock:
            _write(replies, pickle.dumps((number, reply)))

    def fold(number: int, task: tuple[Any, ...], is_ready: threading.Event) -> None:
        try:
            version, job_id, job, share = task
            answer(number, shares.fold_share(version, job_id, job, share, is_ready.set))
            is_ready.set()
        except BaseException:  # a bug: nobody would wait for this process in vain
            traceback.print_exc()
            os._exit(1)

    while (body := _read(sys.stdin.buffer)) is not None:
        number, task = pickle.loads(body)  # noqa: S301 (from the process that started this one)
        is_ready = threading.Event()
        threading.Thread(target=fold, args=(number, task, is_ready), daemon=True).start()
        is_ready.wait()
        answer(number, None)  # ready for another


if __name__ == "__main__":
    main()
