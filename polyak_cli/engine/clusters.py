"""Run the shares of a fold on the workers of a Dask cluster, or on the ranks of MPI.

Knows who the workers are, and what happens to them; `pools` sends them shares.  Dask and mpi4py are
imported here only, and a client lives only while a fold runs: this process forks before and after.
"""

from __future__ import annotations

import concurrent.futures as futures
import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from typing import Any

from polyak_cli import __version__
from polyak_cli.engine import shares
from polyak_cli.engine.executors import Executor
from polyak_cli.engine.pools import POLL, Futures
from polyak_cli.engine.shares import Reply
from polyak_cli.errors import PolyakError, UsageError, shown
from polyak_cli.storage.private import use_folder

#: The variable by which Dask's own tools name a scheduler.
ADDRESS = "DASK_SCHEDULER_ADDRESS"

#: Seconds that workers which were started here have to end.
_CLOSING = 60.0


@contextlib.contextmanager
def start(engine: str, scheduler: str | None, jobs: int) -> Iterator[Executor | None]:
    """Yield what runs batches on an engine; None for "here", where the fold chooses by itself.

    Args:
        engine: "here", "dask" or "mpi".
        scheduler: the address of Dask's; else that in the environment, else one is started here.
        jobs: workers to start, where they are started here.

    Raises:
        PolyakError: there is no such scheduler, or there are no workers.
    """
    if engine == "dask":
        with _start_dask(scheduler or os.environ.get(ADDRESS), jobs) as made:
            yield made
    elif engine == "mpi":
        with _start_mpi() as made:
            yield made
    else:
        yield None


# --- Dask -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _start_dask(address: str | None, jobs: int) -> Iterator[Executor]:
    """Yield an executor on a Dask cluster; without an address, on one that is started here."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_silence())
        where = address or stack.enter_context(_start_local(jobs))
        dask = Dask(stack.enter_context(_connect(where)), where)
        dask.wait_for_workers()
        yield dask


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep Dask from logging what is no matter of the user's, or what an error says anyway."""
    import distributed  # noqa: F401 (it sets the levels that are changed)

    noisy = ("distributed", "tornado", "asyncio")
    names = [*noisy, *(n for n in logging.root.manager.loggerDict if n.startswith(noisy))]
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def _start_loop() -> Iterator[Any]:
    """Yield Dask's loop on a thread; it, and the processes that it starts, never see Ctrl-C.

    That is the coordinator's matter.  A process that ignored it by a handler of its own would print
    a trace while it loads its modules.
    """
    from distributed.utils import LoopRunner

    make: Any = LoopRunner
    runner = make()
    # Started by the first process, it would unblock the signal for all that follow.
    resource_tracker.ensure_running()
    others = {*multiprocessing.active_children()}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        runner.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield runner.loop
    finally:
        runner.stop()
        # After an interrupt, those that were being started would still write into their folder.
        for process in {*multiprocessing.active_children()} - others:
            process.kill()
            process.join()


@contextlib.contextmanager
def _start_local(jobs: int) -> Iterator[str]:
    """Yield the address of a scheduler with workers on this machine, which only it can reach."""
    import dask
    import distributed

    make: Any = distributed.LocalCluster
    with (
        use_folder() as folder,
        _start_loop() as loop,
        dask.config.set({"temporary-directory": folder}),  # where Dask would leave one of its own
    ):
        try:
            cluster = make(
                loop=loop,
                n_workers=jobs,
                threads_per_worker=1,
                host="127.0.0.1",
                # Dask serves pages of itself even without its dashboard, and prints a warning where
                # another cluster has the usual port: any free one will do.
                dashboard_address="127.0.0.1:0",
                scheduler_kwargs={"dashboard": False},
                silence_logs=logging.CRITICAL + 1,
                memory_limit=0,  # `--max-memory` bounds the buffers already
            )
        except RuntimeError as error:
            raise PolyakError(
                f"--engine dask: its workers cannot be started: {shown(str(error))}; on a busy "
                "machine, use fewer --jobs or a longer DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT"
            ) from None
        try:
            yield cluster.scheduler_address
        finally:
            # On a busy machine that takes long.  All is folded, and they end with this process.
            with contextlib.suppress(TimeoutError):
                cluster.close(timeout=_CLOSING)


@contextlib.contextmanager
def _connect(address: str) -> Iterator[Any]:
    """Yield a client of the scheduler at an address."""
    import distributed

    make: Any = distributed.Client
    try:
        # Not the default one, which Dask's other functions would use too.
        client = make(address, set_as_default=False, name="polyak")
    except (OSError, ValueError, TypeError) as error:
        reason = shown(str(error).partition("\n")[0] or type(error).__name__)
        raise PolyakError(
            f"--scheduler {shown(address)}: cannot be reached: {reason}; start one with "
            "`dask scheduler`, and name the address that it prints"
        ) from None
    try:
        yield client
    finally:
        # A scheduler that is gone answers nothing.
        with contextlib.suppress(OSError, futures.TimeoutError):
            client.close(timeout=_timeout() if client.status == "running" else 1)


def _timeout() -> float:
    """Return for how many seconds Dask is to wait for a connection."""
    import dask

    text: str = dask.config.get("distributed.comm.timeouts.connect")
    return float(dask.utils.parse_timedelta(text))


#: What a worker evaluates.  A function that it cannot import would end the worker, which is the
#: user's; here the error comes back.
_CALL = f"__import__({__name__!r}, fromlist=['run_on_dask']).run_on_dask(*task)"


def run_on_dask(version: str, job_id: str, job: bytes, share: bytes) -> Reply:
    """Fold a share on a Dask worker, and return its reply with the worker's address."""
    from distributed import get_worker, secede

    # While the last bytes come and the last parts go, the worker takes the next share.
    reply = shares.fold_share(version, job_id, job, share, on_last=secede)
    return reply | {"worker": get_worker().address}


@dataclass(slots=True)
class _Counted:
    """How many workers there were when last looked at."""

    workers: list[str] = field(default_factory=list)
    at: float = -POLL


class Dask(Futures):
    """Folds on the workers of a Dask cluster."""

    def __init__(self, client: Any, address: str) -> None:
        self.client = client
        self.address = address
        self.share_nbytes = None
        self.seen = _Counted()

    def wait_for_workers(self) -> None:
        """Wait until there is a worker.

        Raises:
            PolyakError: there is none for the time that Dask waits for a connection.
        """
        end = time.monotonic() + _timeout()
        while not self._list_workers():
            self._refuse_lost()
            if time.monotonic() > end:
                raise PolyakError(
                    f"the Dask scheduler {shown(self.address)} has no workers; start some with "
                    f"`dask worker {shown(self.address)}`"
                )
            time.sleep(POLL / 10)

    def _list_workers(self) -> list[str]:
        """Return the addresses of the workers, one for each thread, as of a second ago at most."""
        if time.monotonic() - self.seen.at >= POLL:
            with contextlib.suppress(OSError, futures.CancelledError):
                threads: Mapping[str, int] = self.client.nthreads()
                self.seen.workers = [name for name, n in threads.items() for _ in range(n)]
            self.seen.at = time.monotonic()
        return self.seen.workers

    def count_workers(self) -> int:
        """See `Futures.count_workers`."""
        return max(1, len(self._list_workers()))

    def submit(self, avoid: str, *task: Any) -> Future[Reply]:
        """See `Futures.submit`."""
        others = sorted({*self._list_workers()} - {avoid}) if avoid else []
        # Every task has a name of its own: a retry must not get the result of the first attempt.
        options: dict[str, Any] = {"key": f"fold_share-{uuid.uuid4()}"}
        if others:  # preferred, as long as there are any
            options |= {"workers": others, "allow_other_workers": True}
        executor = self.client.get_executor()
        made: Future[Reply] = executor.submit(eval, _CALL, {"task": task}, **options)
        return made

    def check(self) -> None:
        """See `Futures.check`."""
        self._refuse_lost()
        # Dask itself would wait for ever; a worker that was killed is mostly started again.
        if not self._list_workers():
            self.wait_for_workers()

    def _refuse_lost(self) -> None:
        if self.client.status != "running":
            raise self._make_lost()

    def _make_lost(self) -> PolyakError:
        return PolyakError(
            f"the Dask scheduler {shown(self.address)} is gone, or cannot be reached any more; "
            "nothing was published, run the command again"
        )

    def explain(self, error: BaseException) -> BaseException:
        """See `Futures.explain`."""
        from distributed import KilledWorker

        if isinstance(error, KilledWorker):
            return PolyakError(
                f"a share was given up after {error.allowed_failures + 1} workers had died with "
                "it, perhaps because memory ran out; see their logs, or use less --max-memory"
            )
        if isinstance(error, (OSError, futures.CancelledError)):
            return self._make_lost()
        # A share returns its own errors, so that this one is of the machinery around it.
        reason = " ".join(str(error).split())
        return PolyakError(
            f"the Dask cluster cannot run polyak: {type(error).__name__}: {shown(reason)}; install "
            f"polyak {__version__} for its workers"
        )

    def stop(self, waiting: Iterable[Future[Reply]]) -> None:
        """See `Futures.stop`; shares at work end by themselves, with files that nobody keeps."""
        for future in waiting:
            future.cancel()


# --- MPI ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _start_mpi() -> Iterator[Executor]:
    """Yield an executor on the ranks of MPI, all but this one.

    Raises:
        UsageError: mpi4py.futures did not start this process, and would have no workers.
    """
    # Importing more of mpi4py than the program that starts this one starts MPI.
    core = sys.modules.get("mpi4py.futures._core")
    if core is None or getattr(core, "SharedPool", True) is None:
        raise UsageError(
            "--engine mpi works on ranks that mpi4py.futures starts: mpiexec -n RANKS python -m "
            "mpi4py.futures -m polyak_cli average ... --engine mpi"
        )
    from mpi4py import MPI
    from mpi4py.futures import MPIPoolExecutor

    workers = MPI.COMM_WORLD.size - 1
    if workers < 1:
        raise UsageError(
            "--engine mpi has one rank, and the first one folds nothing; start two or more"
        )
    # The module that runs here is a command, which workers need not load.
    pool = MPIPoolExecutor(main=False)
    try:
        yield Futures(pool, workers)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
