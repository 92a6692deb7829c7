"""Forked worker processes that report in lines of JSON.

Untrusted headers are read in one because libhdf5 may crash; numpy's kernel folds tensors in several
because its threads would wait too often for the interpreter's lock.  Messages are JSON and never
pickles: a child that a hostile file has taken over must not be able to run code here.  Knows
nothing of the work.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

from polyak_cli.errors import PolyakError, rebuild

Work = Callable[["Writer"], None]

#: Signals that ask a program to end, and the one by which `cli` asks again.
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)


class Writer:
    """The child's end of the pipe."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def send(self, message: Any) -> None:
        """Send a message of values that JSON can hold."""
        self.line(json.dumps(message).encode())

    def line(self, line: bytes = b"") -> None:
        """Send a line; an empty one is a heartbeat."""
        view = memoryview(line + b"\n")
        while view:
            view = view[os.write(self.descriptor, view) :]


class Child:
    """A process that works and reports; forked at once, later reaped or stopped."""

    def __init__(self, work: Work) -> None:
        self.parent = os.getpid()
        self.pid = 0
        self.pending = bytearray()
        try:
            self.pipe, writer = os.pipe()
        except OSError as error:
            raise _explain_no_child(error) from None
        with warnings.catch_warnings():
            # Python 3.12 warns of any thread, those of a caller's framework too; the child runs
            # only numpy and h5py, whose lock is taken across a fork.
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                with _holding_signals() as held:
                    self.pid = os.fork()
                    if self.pid == 0:
                        os.close(self.pipe)
                        _run_child(work, Writer(writer), held)
            except OSError as error:
                os.close(self.pipe)
                raise _explain_no_child(error) from None
            except BaseException:  # a held signal; the caller has no child that it could stop
                self.stop()
                raise
            finally:
                os.close(writer)

    def __del__(self) -> None:
        """End a child that a signal took from its caller just before the caller could name it."""
        self.stop()

    def receive(self) -> bool:
        """Wait for something to read, and return whether there was anything."""
        received = os.read(self.pipe, 1 << 20)
        self.pending += received
        return bool(received)

    def next_line(self) -> bytes | None:
        """Return the next line already received that is not a heartbeat."""
        while (end := self.pending.find(b"\n")) >= 0:
            line = bytes(self.pending[:end])
            del self.pending[: end + 1]
            if line:
                return line
        return None

    def reap(self) -> str:
        """Wait for the end of the child and return how it ended: '' for success."""
        pid, self.pid = self.pid, 0  # first: after an interrupt below, nobody reaps it again
        os.close(self.pipe)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            return signal.Signals(os.WTERMSIG(status)).name
        return f"exit {os.WEXITSTATUS(status)}" if os.WEXITSTATUS(status) else ""

    def stop(self) -> None:
        """End the child, whatever it is doing."""
        # A forked child inherits the objects of its siblings, which only the parent may end.
        if self.pid and self.parent == os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.reap()


def _explain_no_child(error: OSError) -> PolyakError:
    return PolyakError(
        f"no worker process can be started: {error.strerror}; allow more memory, processes or "
        "open files (ulimit -v, -u, -n), or use fewer --jobs"
    )


def make_ended(how: str) -> PolyakError:
    """Return the error of a worker that did not end by itself."""
    return PolyakError(
        f"a worker process was killed ({how}), perhaps because memory ran out; use fewer --jobs "
        "or less --max-memory"
    )


@contextlib.contextmanager
def _holding_signals() -> Iterator[list[int]]:
    """Yield a list of the signals that come while the block runs; its end hands them on.

    Between a fork and the next line, one would run the parent's clean-up in the child, or lose the
    child.  A mask would not do: it is this thread's, and what reaches another thread is answered in
    the main one all the same.
    """
    held: list[int] = []
    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
    try:
        if threading.current_thread() is threading.main_thread():  # the only one that answers
            for number in _ENDING:
                handler = signal.getsignal(number)
                if callable(handler):
                    handlers[number] = handler
                    signal.signal(number, lambda number, _frame: held.append(number))
        yield held
    finally:
        for kept, handler in handlers.items():
            signal.signal(kept, handler)
        for waited in held:
            signal.raise_signal(waited)


def _run_child(work: Work, writer: Writer, held: Sequence[int]) -> NoReturn:
    """Work, and leave without running the parent's clean-up.

    Args:
        work: what to do.
        writer: for the parent.
        held: signals that came while the child was forked.
    """
    code = 70
    try:
        for number in _ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        for waited in held:
            signal.raise_signal(waited)
        faulthandler.disable()  # a crash here is one line of the parent's
        try:
            work(writer)
        except Exception as error:
            writer.send(describe_error(error))
        code = 0
    finally:
        os._exit(code)


def describe_error(error: Exception) -> dict[str, Any]:
    """Return the message that reports an error to the parent; an unexpected one is a bug."""
    if isinstance(error, PolyakError):
        return {"error": [type(error).__name__, str(error)]}
    if isinstance(error, OSError) and error.errno:
        return {"system": [error.errno, error.strerror]}
    if isinstance(error, MemoryError):
        return {"memory": True}
    return {"bug": "".join(traceback.format_exception(error))}


def rebuild_error(message: dict[str, Any]) -> Exception | None:
    """Return the error that a message reports, as it was in the child, or None."""
    if "error" in message:
        return rebuild(*message["error"])
    if "system" in message:
        return OSError(*message["system"])
    if "memory" in message:
        return MemoryError()
    if "bug" in message:
        return RuntimeError(message["bug"])
    return None
