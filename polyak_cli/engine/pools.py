"""Run the shares of a fold on any pool of processes, and send those again that may succeed then.

Decides who folds a share and what is done when that fails.  It cannot change a byte, because a
share is a pure function.  Knows nothing of what is done with a share.
"""

from __future__ import annotations

import concurrent.futures as futures
import contextlib
import errno
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyak_cli import __version__
from polyak_cli.engine import shares, sinks
from polyak_cli.engine.folding import Done, FoldJob
from polyak_cli.engine.shares import Reply
from polyak_cli.engine.sinks import Parcel
from polyak_cli.engine.slabs import Batch
from polyak_cli.errors import PolyakError, shown
from polyak_cli.processes.children import make_ended, rebuild_error
from polyak_cli.storage import Version

#: Seconds between two looks at what no future reports, such as a scheduler that is gone.
POLL = 1.0
#: Shares that a worker has at a time: one that it folds, and others that it need not wait for.
_AHEAD = 3
#: How often a share is sent again after an error that may pass.
_RETRIES = 3
#: Errors of an output that no other worker would not have.
_LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: Shares for each worker, so that the last ones end at about the same time.
_ROUNDS = 8
#: Bytes that a share reads: what a scheduler does for a task is to be short beside it, and all of
#: it is done again if its worker is lost.
_LEAST, _MOST = 16 << 20, 1 << 30


@dataclass(slots=True)
class Futures:
    """Folds on a `concurrent.futures.Executor`: threads, spawned processes, or MPI's ranks.

    The pool's processes need the package, and the same paths for inputs and outputs.
    """

    pool: futures.Executor
    workers: int = 1
    #: Bytes that a share reads; by default it depends on how many there are, and on the workers.
    share_nbytes: int | None = None

    def run(self, job: FoldJob, batches: Iterable[Batch]) -> Generator[Done, None, None]:
        """See `executors.Executor.run`."""
        run = _Run(self, job)
        try:
            for parcel in run.list_parcels(batches, self._choose_nbytes(job)):
                while len(run.waiting) >= _AHEAD * self.count_workers():
                    yield from run.collect()
                run.send(_Sent(shares.pack(parcel)))
            while run.waiting:
                yield from run.collect()
        except futures.BrokenExecutor as error:
            raise make_ended(type(error).__name__) from None
        finally:
            self.stop(run.waiting)

    def _choose_nbytes(self, job: FoldJob) -> int:
        """Return how many bytes a share reads."""
        if self.share_nbytes is not None:
            return self.share_nbytes
        whole = sum(file.version.size for file in job.inputs)
        most = _MOST
        if None in sinks.find_sinks(job.outputs):
            most = min(most, sinks.MOST_RETURNED * max(1, len(job.list_counted())))
        return min(max(whole // (_ROUNDS * self.count_workers()), _LEAST), most)

    def submit(self, avoid: str, *task: Any) -> Future[Reply]:
        """Have a worker call `shares.fold_share`, if possible another one than ``avoid``."""
        del avoid  # such a pool has no names for its workers
        return self.pool.submit(shares.fold_share, *task)

    def count_workers(self) -> int:
        """Return how many workers there are now, at least one."""
        return self.workers

    def check(self) -> None:
        """Refuse to wait for workers that are gone for good.

        Raises:
            PolyakError: says what is gone.
        """

    def explain(self, error: BaseException) -> BaseException:
        """Return the error to raise for one of the pool itself."""
        return error

    def stop(self, waiting: Iterable[Future[Reply]]) -> None:
        """Cancel shares, and wait for those that have begun: no file of theirs is open then."""
        for future in waiting:
            future.cancel()
        futures.wait(waiting)


@dataclass(slots=True)
class _Sent:
    """A share that was sent."""

    share: bytes
    failures: int = 0
    avoid: str = ""  # the worker that failed last


@dataclass(slots=True)
class _Run:
    """The shares of one job that are at work."""

    executor: Futures
    job: FoldJob
    waiting: dict[Future[Reply], _Sent] = field(default_factory=dict)
    packed: bytes = b""
    portable: FoldJob = field(init=False)
    #: Shares that carried the job.  A worker keeps it, so that the others carry its name only.
    introduced: int = 0

    def __post_init__(self) -> None:
        self.portable = shares.make_portable(self.job)

    def list_parcels(self, batches: Iterable[Any], nbytes: int) -> Iterator[Parcel]:
        """Yield what is to be sent, so that a share reads so many bytes, or few more."""
        gather = shares.gather_runs if self.job.parts else shares.gather_shares
        for share in gather(batches, nbytes):
            yield sinks.make_parcel(share, self.job.outputs, self.portable.sinks)

    def send(self, sent: _Sent, *, whole: bool = False) -> None:
        """Send a share; with its job if that is wanted, or if its worker can hardly have it yet."""
        self.packed = self.packed or shares.pack(self.portable)
        if self.introduced < _AHEAD * self.executor.count_workers():
            self.introduced += 1
            whole = True
        job = self.packed if whole else b""
        task = __version__, self.job.id, job, sent.share
        self.waiting[self.executor.submit(sent.avoid, *task)] = sent

    def collect(self) -> Iterator[Done]:
        """Wait for some shares, and yield what each took; send those again that may succeed then.

        Raises:
            Exception: of a share, as a fold in this process raises it.
        """
        done, _ = futures.wait(self.waiting, POLL, futures.FIRST_COMPLETED)
        if not done:
            self.executor.check()
        for future in done:
            # Popped, so that a cluster can forget the result: it would be computed again if the
            # worker that holds it were lost.
            sent = self.waiting.pop(future)
            try:
                reply = future.result()
            except (Exception, futures.CancelledError) as error:
                raise self.executor.explain(error) from None
            if "done" in reply:
                sinks.accept(self.job, reply["done"])
                yield shares.read_done(reply, retries=sent.failures)
            elif "unknown" in reply:
                self.send(sent, whole=True)
            else:
                self._send_again(sent, reply)

    def _send_again(self, sent: _Sent, reply: Reply) -> None:
        """Send a share again after an error that may pass; raise any other."""
        error = self._find_error(reply)
        sent.failures += 1
        # What is wrong with a file is wrong on every worker; a worker's own trouble is not.
        may_pass = isinstance(error, (OSError, MemoryError)) and (
            getattr(error, "errno", None) not in _LASTING
        )
        if may_pass and sent.failures <= _RETRIES:
            sent.avoid = reply["worker"]
            self.send(sent, whole=True)
        else:
            raise error

    def _find_error(self, reply: Reply) -> Exception:
        """Return the error that a worker reports."""
        worker = shown(reply["worker"])
        if "version" in reply:
            return PolyakError(
                f"worker {worker}: has polyak {shown(reply['version'], 40)}, expected "
                f"{__version__}, as here; install the same version for all workers"
            )
        if reply.get("unseen") and self._is_here(reply["unseen"][0]):
            path, how = reply["unseen"]
            return PolyakError(
                f"worker {worker}: does not see {shown(path)} as it is here: {shown(how, 80)}; "
                "every worker must see the checkpoints and the output under the same paths"
            )
        error = rebuild_error(reply)
        if isinstance(error, PolyakError):
            return type(error)(self._shorten(str(error)))
        return error or RuntimeError(f"a worker's answer is not understood: {reply}")

    def _is_here(self, path: str) -> bool:
        """Return whether a file of the job is still here as it was."""
        for name, version in self.job.inputs:
            if shares.make_absolute(name) == path:
                with contextlib.suppress(OSError):
                    return version.matches(Version.of(Path(path).stat()))
                return False
        return Path(path).exists()

    def _shorten(self, text: str) -> str:
        """Return a message in which files have the names that the user gave them."""
        for path, _ in self.job.inputs:
            text = text.replace(shown(shares.make_absolute(path)), shown(path))
        return text
