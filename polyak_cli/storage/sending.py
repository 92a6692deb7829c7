"""What the gateway does to write: it sends parts and whole files, and leaves nothing behind.

Knows neither sockets nor requests.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from polyak_cli.errors import OutputError, PolyakError
from polyak_cli.storage import uploads
from polyak_cli.storage.uploads import Upload

#: Bytes of parts that are in this process at a time, and how many parts these are at most.
_MEMORY, _MOST = 64 << 20, 8
#: Seconds that uploads have to be aborted when all ends.
_FAREWELL = 60.0


@dataclass
class _Begun:
    """An upload whose parts come one by one."""

    upload: Upload
    #: Parts that wait or are on their way, and how many there may be.
    slots: threading.Semaphore
    #: The bytes of the file that will be written by parts: offset and length of each run.
    written: Sequence[tuple[int, int]]
    sent: dict[int, Future[str]] = field(default_factory=dict)

    def collect(self, others: Mapping[int, str]) -> dict[int, str]:
        """Wait for all parts, and return their receipts, with those of other machines.

        Raises:
            OutputError: a part is missing that cannot be sent from the file, which has not got it.
        """
        receipts = {number: future.result() for number, future in [*self.sent.items()]}
        receipts |= others
        part = self.upload.part
        for offset, nbytes in self.written:
            for number in range(offset // part + 1, (offset + nbytes - 1) // part + 2):
                if number not in receipts:
                    raise OutputError(f"part {number} of the output was not sent")
        return receipts


class Sender:
    """Sends files; see the module."""

    def __init__(self) -> None:
        self.is_ending = threading.Event()
        self._begun: dict[str, _Begun] = {}  # by the path of the file
        self._lock = threading.Lock()
        self._busy = 0
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="polyak-put")
        self._leases: uploads.Leases | None = None

    def begin(self, files: Sequence[Sequence[Any]]) -> dict[str, Upload]:
        """Begin uploads in parts; return that of each file.

        Args:
            files: path, URL and size of each, and which of its bytes the parts will bring; the
                others are in the file.
        """
        if self._leases is None:
            self._leases = uploads.Leases()
            self._leases.__enter__()
        for path, url, nbytes, written in files:
            upload = uploads.begin(url, nbytes)
            slots = threading.Semaphore(max(1, min(_MOST, _MEMORY // upload.part)))
            self._leases.add(upload)
            self._begun[path] = _Begun(upload, slots, written)
        return {path: self._begun[path].upload for path, *_ in files}

    @contextlib.contextmanager
    def take(self, path: str, token: str, number: int) -> Iterator[Callable[[bytearray], None]]:
        """Wait until there is room for a part; yield what takes its bytes, and sends them later.

        Args:
            path: of the file.
            token: of its upload, which only those know who may write it.
            number: of the part.

        Raises:
            PolyakError: there is no such upload, or an earlier part could not be sent.
        """
        begun = self._begun.get(path)
        if begun is None or begun.upload.token != token:
            raise OutputError("there is no such upload")
        for future in [*begun.sent.values()]:
            if future.done():
                future.result()
        begun.slots.acquire()
        taken = False

        def take_content(content: bytearray) -> None:
            nonlocal taken
            future = self._pool.submit(uploads.send_part, begun.upload, number, content)
            taken = True
            begun.sent[number] = future
            future.add_done_callback(lambda _: begun.slots.release())

        try:
            yield take_content
        finally:
            if not taken:
                begun.slots.release()

    def send(
        self,
        files: Sequence[tuple[str, str]],
        receipts: Mapping[str, Mapping[int, str]],
        report: uploads.Progress,
        *,
        force: bool,
        stale: Sequence[str],
        verify: bool,
    ) -> None:
        """Send what is missing of files, and give all of them their names; see `send_files`.

        Args:
            files: path and URL of each.
            receipts: of parts that other machines have sent, by path.
            report: called with bytes that were sent; an exception stops all.
            force: as of `send_files`.
            stale: as of `send_files`.
            verify: as of `send_files`.
        """

        def progress(nbytes: int) -> None:
            if self.is_ending.is_set():
                raise OutputError("the upload was stopped")
            report(nbytes)

        with self._working():
            begun = {}
            for path, one in [*self._begun.items()]:
                # From now on it is aborted by `send_files`.
                begun[path] = one.upload, one.collect(receipts.get(path, {}))
            self._begun.clear()
            uploads.send_files(
                files, force=force, stale=stale, verify=verify, progress=progress, begun=begun
            )

    def abandon(self) -> None:
        """Abort all uploads that were begun and not sent."""
        with self._working():
            while self._begun:
                _, begun = self._begun.popitem()
                for future in begun.sent.values():
                    future.cancel()
                with contextlib.suppress(PolyakError):
                    uploads.abort(begun.upload)

    def end(self) -> None:
        """Stop all, and wait until nothing is left behind."""
        self.is_ending.set()
        self.abandon()
        deadline = time.monotonic() + _FAREWELL
        while self._busy and time.monotonic() < deadline:
            time.sleep(0.05)

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        with self._lock:
            self._busy += 1
        try:
            yield
        finally:
            with self._lock:
                self._busy -= 1
