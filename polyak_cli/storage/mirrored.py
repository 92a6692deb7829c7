"""Objects that are read, or written in parts, by way of the gateway; see `mirrors`.

A module of its own, because it needs the gateway: who averages local files imports neither.
"""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Callable, Iterable
from typing import BinaryIO, Self

import numpy as np

from polyak_cli.errors import FormatError, OutputError
from polyak_cli.storage import Bytes, Version
from polyak_cli.storage.gateway import BLOCK, Client, Stream
from polyak_cli.storage.local import InputStream, LocalInput
from polyak_cli.storage.messages import ask, receive

#: Bytes up to which an object is fetched whole by the first read of it: one request is quicker.
_SMALL = 4 << 20
#: Bytes of a read above which it is no header's, and not kept.
_LARGE = 1 << 20
#: Blocks that are fetched at most because those before them were read.
_MOST_BLOCKS = 64
#: Bytes that are fetched ahead of one who reads on and on and does not say so.
_AHEAD = 4 << 20


class MirroredInput:
    """An object, read through its stand-in and the gateway; see `storage.InputFile`."""

    def __init__(
        self,
        path: str,
        client: Client,
        version: Version,
        local: LocalInput,
        is_head_only: Callable[[], bool],
    ) -> None:
        self.name = path
        self.version = version
        self._client = client
        self._local = local
        self._is_head_only = is_head_only  # see `mirrors.reading_heads`
        self._stream = Stream(client, path, version)
        self._known: set[int] = set()  # blocks that are in the file
        self._is_whole: bool | None = None  # unknown until something is read
        self._is_planned = False  # who reads says what comes next
        self._ahead = 0  # up to where it was fetched for one who does not
        self._run = range(0)  # blocks that were fetched last

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.version.size

    def read_into(self, offset: int, buffer: Bytes) -> None:
        """See `storage.InputFile.read_into`; values are not kept on the disk."""
        nbytes = len(buffer)
        if offset + nbytes > self.size:
            missing = offset + nbytes - self.size
            raise FormatError(f"the file ends {missing} bytes before the tensor does")
        if self._ask_whole():
            self._local.read_into(offset, buffer)
            return
        if not self._is_planned:
            self._look_ahead(offset, offset + nbytes)
        self._stream.read_into(offset, buffer)

    def _look_ahead(self, offset: int, stop: int) -> None:
        """Have what follows fetched, if the object is read from one offset to the next."""
        is_next = 0 <= self._ahead - offset <= 2 * _AHEAD
        if not is_next or stop > self._ahead - _AHEAD // 2:
            start = self._ahead if is_next else offset
            end = min(self.size, max(stop, start + _AHEAD))
            self._stream.prefetch([(start, end - start)])
            self._ahead = end

    def _ask_whole(self) -> bool:
        """Return whether every byte is in the file; have it there if it is small."""
        if self._is_whole is None and self.size <= _SMALL and not self._is_head_only():
            self._ask_blocks(range(-(-self.size // BLOCK)))
        elif self._is_whole is None:
            self._ask_blocks(range(0))
        return bool(self._is_whole)

    def read(self, offset: int, nbytes: int) -> bytes:
        """See `storage.InputFile.read`.

        What is read stays on the disk, as headers do, unless it was fetched ahead or is large.
        """
        nbytes = max(0, min(nbytes, self.size - offset))
        if (self._is_planned or nbytes >= _LARGE) and not self._ask_whole():
            buffer = np.empty(nbytes, np.uint8)
            self.read_into(offset, buffer)
            return buffer.tobytes()
        self.fill(offset, nbytes)
        return self._local.read(offset, nbytes)

    def fill(self, offset: int, nbytes: int) -> None:
        """Have bytes in the file."""
        if self._ask_whole() or not nbytes:
            return
        wanted = range(offset // BLOCK, (offset + nbytes - 1) // BLOCK + 1)
        if self._known.issuperset(wanted):
            return
        # Who reads block after block gets more and more of them at a time.
        ahead = 0
        if wanted.start <= self._run.stop < wanted.stop + 1 and self._run:
            ahead = min(2 * len(self._run), _MOST_BLOCKS)
        last = -(-self.size // BLOCK)
        run = range(wanted.start, min(last, max(wanted.stop, wanted.start + ahead)))
        self._ask_blocks(run)
        self._known.update(run)
        self._run = run

    def _ask_blocks(self, run: range) -> None:
        """Have blocks in the file, and note whether all are there."""
        self._is_whole = self._client.ask(
            "fill",
            path=self.name,
            version=list(self.version),
            first=run.start,
            count=len(run),
        )

    def prefetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """See `storage.InputFile.prefetch`."""
        self._is_planned = True
        if not self._ask_whole():
            self._stream.prefetch(list(ranges))

    def stream(self) -> BinaryIO:
        """See `storage.InputFile.stream`."""
        return io.BufferedReader(InputStream(self))

    def close(self) -> None:
        """See `storage.InputFile.close`."""
        self._local.close()
        self._stream.close()

    def __enter__(self) -> Self:
        """Return the open file."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


class Parts:
    """The way of parts to the gateway, over a connection of their own."""

    def __init__(self, client: Client, path: str, token: str) -> None:
        self.client = client
        self.file = path, token
        self.process = os.getpid()
        self.connection: socket.socket | None = None

    def send(self, number: int, content: bytearray) -> None:
        """Hand over a part; it is sent later, and the gateway keeps its receipt.

        Raises:
            PolyakError: an earlier part could not be sent.
        """
        if self.connection is None or self.process != os.getpid():
            self.process, self.connection = os.getpid(), self.client.connect()
        path, token = self.file
        ask(self.connection, "part", path=path, token=token, number=number, nbytes=len(content))
        try:
            self.connection.sendall(content)
            taken = receive(self.connection)
        except OSError:
            taken = None
        if taken is None or "error" in taken:
            raise OutputError("the process that writes to the network has ended")

    def close(self) -> None:
        """End the connection."""
        if self.connection is not None and self.process == os.getpid():
            self.connection.close()
        self.connection = None
