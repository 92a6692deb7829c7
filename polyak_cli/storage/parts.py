"""Outputs that are never whole on a disk: their parts are sent to a store as they are folded.

A part is a pure function of the bytes that are not averaged, which the skeleton has, and of those
that are written into it.  So it may be made anywhere, in any order, and twice.  Knows no network:
who makes an output passes how its parts are sent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Semaphore
from typing import Self

import numpy as np

from polyak_cli.storage import Bytes

#: Returns the bytes of a part that is not averaged, with anything in the places of the others.
Fill = Callable[[int, int], bytearray]
#: Sends a part, by its number from 1 on; it may still be on its way on return.
Send = Callable[[int, bytearray], None]


class PartOutput:
    """A file of which one part after the other is written; see `storage.OutputFile`.

    A part is sent when the next one is begun, or by `sync`.  To write a part again in another
    process is right only if all of it is written there.
    """

    def __init__(
        self,
        name: str,
        nbytes: int,
        part: int,
        fill: Fill,
        send: Send,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        """Make an output of a size.

        Args:
            name: how messages call it.
            nbytes: its size.
            part: bytes of each part but the last.
            fill: called with a part's offset and length.
            send: called with a part's number and content.
            close: called when it is closed.
        """
        self.name = name
        self.nbytes = nbytes
        self.part = part
        self._fill = fill
        self._send = send
        self._close = close
        self._number = 0  # of the part at work, from 1
        self._content = bytearray()

    def write(self, offset: int, content: Bytes | bytes) -> None:
        """See `storage.OutputFile.write`."""
        view = memoryview(content if isinstance(content, bytes) else content.data).cast("B")
        while len(view):
            number, start = offset // self.part + 1, offset % self.part
            if number != self._number:
                self._begin(number)
            piece = view[: self.part - start]
            # As an array: a view of a bytearray would keep it from being sent as it is.
            np.frombuffer(self._content, np.uint8)[start : start + len(piece)] = piece
            view, offset = view[len(piece) :], offset + len(piece)

    def _begin(self, number: int) -> None:
        self.sync()
        start = (number - 1) * self.part
        self._content = self._fill(start, min(self.part, self.nbytes - start))
        self._number = number

    def sync(self) -> None:
        """Send the part at work."""
        if self._number:
            number, content = self._number, self._content
            self._number, self._content = 0, bytearray()
            self._send(number, content)

    def truncate(self, size: int) -> None:
        """Refuse another size: the parts are cut already."""
        if size != self.nbytes:
            raise ValueError(f"{self.name}: has {self.nbytes} bytes, not {size}")

    def close(self) -> None:
        """Forget the part at work."""
        self._number, self._content = 0, bytearray()
        self._close()

    def __enter__(self) -> Self:
        """Return the output."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


class Outbox:
    """Sends parts of one output on other threads, while the next ones are made.

    All outboxes of a process share these threads, so that few parts are in memory and on their way.
    """

    def __init__(self, send: Callable[[int, bytearray], str], at_once: int) -> None:
        """Send nothing yet.

        Args:
            send: sends a part, and returns its receipt.
            at_once: parts that are on their way at most.
        """
        self._send = send
        self._pool, self._slots = _open_lines(at_once)
        self._sent: dict[int, Future[str]] = {}

    def put(self, number: int, content: bytearray) -> None:
        """Send a part when there is room.

        Raises:
            PolyakError: an earlier part could not be sent.
        """
        self._slots.acquire()
        future = self._pool.submit(self._send, number, content)
        future.add_done_callback(lambda _: self._slots.release())
        for other in [*self._sent.values()]:
            if other.done():
                other.result()
        self._sent[number] = future

    def collect(self) -> dict[int, str]:
        """Wait for all parts, and return their receipts by number.

        Raises:
            PolyakError: one could not be sent.
        """
        return {number: future.result() for number, future in self._sent.items()}


@functools.cache
def _open_lines(at_once: int) -> tuple[ThreadPoolExecutor, Semaphore]:
    """Return the threads of this process that send so many parts at a time, and their number."""
    return ThreadPoolExecutor(at_once, thread_name_prefix="polyak-put"), Semaphore(at_once)
