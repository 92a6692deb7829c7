"""The process that owns the network client, and the client by which others ask it for bytes.

polyak forks, and obstore waits for ever in a forked child.  So the process that forks never imports
it: it starts this one, which listens on a socket in a private folder.  Only the process that
started it may list, or have anything written; its forked children may ask for bytes of objects that
are listed already, and for nothing else.  It ends with the process that started it, however that
ended, and removes the folder.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from polyak_cli.errors import (
    CHANGED,
    ChangedError,
    FormatError,
    OutputError,
    PolyakError,
    rebuild,
    shown,
)
from polyak_cli.processes.modules import start_module
from polyak_cli.storage import Bytes, Version, urls
from polyak_cli.storage.listings import list_named
from polyak_cli.storage.messages import ask, describe_error, fill, receive, send
from polyak_cli.storage.private import make_folders
from polyak_cli.storage.sending import Sender

#: Bytes of a block of a stand-in.
BLOCK = 1 << 16
#: Blocks of one GET that fills a stand-in.
_RUN = 64
#: Seconds between two looks whether the process that started this one is alive.
_LOOK = 1.0
#: Seconds between attempts to take a connection while descriptors are short, and for all of them.
_PAUSE, _PATIENCE = 0.05, 5.0
_SOCKET = "gateway"


# --- the client -----------------------------------------------------------------------------------


class Client:
    """The gateway, as the process that started it and its forked children see it."""

    def __init__(self) -> None:
        """Start the process, with a private folder for stand-ins and its socket."""
        self.owner = self.forked = os.getpid()
        self.root, self.place, self.locks = make_folders(_SOCKET)
        try:
            self.process = start_module(
                __name__, self.root, self.place, start_new_session=True, pass_fds=self.locks
            )
            if not self.process.stdout or self.process.stdout.readline() != b"ready\n":
                raise PolyakError("the process that reads from the network could not be started")
        except OSError as error:
            raise PolyakError(
                f"the process that reads from the network cannot be started: {error.strerror}"
            ) from None
        finally:
            if not hasattr(self, "process") or self.process.poll() is not None:
                shutil.rmtree(self.root, ignore_errors=True)
        self.idle: list[socket.socket] = []  # connections of this process that nobody uses now
        self.lock = threading.Lock()

    def close(self) -> None:
        """End the process, which removes its folder; only the process that started it can."""
        if self.owner != os.getpid() or self.process.stdin is None:
            return
        for connection in self.idle:
            connection.close()
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()
        for folder in (self.root, self.place):
            shutil.rmtree(folder, ignore_errors=True)
        while self.locks:
            os.close(self.locks.pop())

    def connect(self) -> socket.socket:
        """Return a new connection, for one thread of one process at a time."""
        try:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(f"{self.place}/{_SOCKET}")
            except OSError:
                connection.close()
                raise
        except OSError as error:
            raise PolyakError(
                f"the process that reads from the network cannot be asked ({error.strerror}): it "
                "has ended, or too few files may be open; try again, or raise ulimit -n"
            ) from None
        return connection

    def ask(self, op: str, **arguments: Any) -> Any:
        """Return the answer to one request; several threads may ask at a time."""
        if self.forked != os.getpid():  # connections are not shared with the parent
            self.forked, self.idle, self.lock = os.getpid(), [], threading.Lock()
        with self.lock:
            connection = self.idle.pop() if self.idle else None
        connection = connection or self.connect()
        try:
            value = ask(connection, op, **arguments)
        except PolyakError:
            self._keep(connection)
            raise
        except BaseException:  # an interrupt: the answer would be taken for that of another request
            connection.close()
            raise
        self._keep(connection)
        return value

    def _keep(self, connection: socket.socket) -> None:
        with self.lock:
            self.idle.append(connection)


class Stream:
    """One object over a connection of its own: what is fetched ahead belongs to it."""

    def __init__(self, client: Client, path: str, version: Version) -> None:
        self.client = client
        self.process = os.getpid()
        self.connection: socket.socket | None = None
        self.opened = path, list(version)

    def _connect(self) -> socket.socket:
        if self.connection is None or self.process != os.getpid():
            self.process, self.connection = os.getpid(), self.client.connect()
        return self.connection

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Have ranges fetched; see `objects.ObjectInput.prefetch`."""
        path, version = self.opened
        ask(self._connect(), "prefetch", path=path, version=version, ranges=ranges)

    def read_into(self, offset: int, buffer: Bytes) -> None:
        """Fill a buffer.

        Raises:
            FormatError: it cannot be read; the message lacks its name.
        """
        path, version = self.opened
        connection = self._connect()
        view = memoryview(buffer.data).cast("B")
        ask(connection, "read", path=path, version=version, offset=offset, nbytes=len(view))
        while len(view):
            # Each piece comes behind its length, or an error in place of one.
            piece = receive(connection)
            if piece is not None and "error" in piece:
                raise rebuild(*piece["error"])
            if piece is None or not fill(connection, view[: piece["nbytes"]]):
                raise FormatError("cannot be read: the process that reads from the network ended")
            view = view[piece["nbytes"] :]

    def close(self) -> None:
        """End the connection, and forget what was fetched ahead."""
        if self.connection is not None and self.process == os.getpid():
            self.connection.close()
        self.connection = None


# --- the process ----------------------------------------------------------------------------------


class _Group:
    """Stand-ins whose blocks are fetched together, and which blocks were asked for already."""

    def __init__(self, members: Sequence[_StandIn]) -> None:
        self.members = members
        self.asked: set[tuple[int, int]] = set()


class _StandIn:
    """A sparse file of an object's size, and which of its blocks hold the object's bytes."""

    def __init__(self, path: str, url: urls.Url, version: Version) -> None:
        from polyak_cli.storage.objects import ObjectInput

        self.path = path
        self.version = version
        self.source = ObjectInput(url, version)
        self.blocks = -(-version.size // BLOCK)
        self.filled: dict[int, Future[None]] = {}
        self.present = 0
        self.lock = threading.Lock()
        self.alike = _Group(())

    def fill(self, first: int, count: int) -> None:
        """Have blocks in the file, and wait for them.

        Raises:
            FormatError: they cannot be read; the message lacks the URL.
        """
        last = min(first + count, self.blocks)
        wanted = self._begin(first, last)
        if (first, last) not in self.alike.asked:
            self.alike.asked.add((first, last))
            for other in self.alike.members:
                if other is not self:
                    other._begin(first, min(last, other.blocks))
        for future in dict.fromkeys(wanted):
            future.result()

    def _begin(self, first: int, last: int) -> list[Future[None]]:
        """Begin to fetch the blocks that are neither there nor on their way."""
        from polyak_cli.storage.objects import pool

        with self.lock:
            for number in range(first, last):  # what failed is tried again
                future = self.filled.get(number)
                if future and future.done() and future.exception():
                    del self.filled[number]
            missing = [number for number in range(first, last) if number not in self.filled]
            for run in _list_runs(missing):
                future = pool().submit(self._fetch, run)
                self.filled |= dict.fromkeys(run, future)
            return [self.filled[number] for number in range(first, last)]

    def _fetch(self, run: range) -> None:
        _copy_part(self.source, run.start * BLOCK, run.stop * BLOCK, self.path)
        with self.lock:
            self.present += len(run)

    def download(self, target: str) -> None:
        """Copy the whole object to another file.

        Raises:
            FormatError: it cannot be read, or the file cannot be written.
        """
        from polyak_cli.storage.objects import pool

        with open(target, "xb") as file:
            file.truncate(self.version.size)
        if self.is_whole:
            shutil.copyfile(self.path, target)
            return
        step = _RUN * BLOCK
        parts = [
            pool().submit(_copy_part, self.source, start, start + step, target)
            for start in range(0, self.version.size, step)
        ]
        for part in parts:
            part.result()

    @property
    def is_whole(self) -> bool:
        """Whether every byte is in the file."""
        return self.present == self.blocks


def _copy_part(source: Any, start: int, stop: int, path: str) -> None:
    """Copy a part of an object to the same place of a file.

    Raises:
        FormatError: it cannot be read, or the file cannot be written.
    """
    content = source.fetch(start, min(stop, source.size))
    try:
        with open(path, "r+b", buffering=0) as file:
            while len(content):
                count = os.pwrite(file.fileno(), content, start)
                content, start = content[count:], start + count
    except OSError as error:
        raise FormatError(
            f"cannot be copied to TMPDIR: {error.strerror}; make room, or set TMPDIR to a folder "
            "on a disk with room"
        ) from None


def _list_runs(numbers: Sequence[int]) -> Iterator[range]:
    """Yield runs of consecutive numbers, none longer than a GET."""
    k = 0
    while k < len(numbers):
        stop = k + 1
        while stop < len(numbers) and stop - k < _RUN and numbers[stop] == numbers[stop - 1] + 1:
            stop += 1
        yield range(numbers[k], numbers[stop - 1] + 1)
        k = stop


class _Server:
    """Answers requests, on a thread for each connection."""

    def __init__(self, root: str, owner: int) -> None:
        self.root = root
        self.owner = owner
        self.sender = Sender()
        self.stand_ins: dict[str, _StandIn] = {}
        self.lock = threading.Lock()

    def serve(self, connection: socket.socket) -> None:
        """Answer the requests of a connection until it ends."""
        visit = _Visit(self, connection)
        with connection, contextlib.suppress(OSError):
            try:
                while (message := receive(connection)) is not None:
                    visit.answer(message)
            finally:
                visit.close()

    def enlist(self, url: str) -> dict[str, Any]:
        """List what a URL names and make stand-ins.

        Returns:
            Paths and versions, what is gone, and the folder of the bucket's stand-ins.
        """
        from polyak_cli.storage import objects

        parsed = urls.parse(url)
        if parsed is None:
            raise FormatError(f"{shown(url)}: is not a URL")
        try:
            parsed, found, is_listed = list_named(parsed)
            objects.require_conditions(parsed, found)
        except FormatError as error:
            raise type(error)(f"{parsed}: {error}") from None
        with self.lock:
            made = [self._register(parsed, one) for one in found]
            known = {path for path, _ in made}
            home = f"{self.root}/{parsed.scheme}/{parsed.bucket}/"
            gone = [
                path
                for path in self.stand_ins
                if path not in known and path.startswith(home) and is_listed(path[len(home) :])
            ]
            for path in gone:
                del self.stand_ins[path]
                Path(path).unlink(missing_ok=True)
                folder = Path(path).parent
                with contextlib.suppress(OSError):  # a folder that is empty now is gone too
                    while f"{folder}/" != home:
                        folder.rmdir()
                        folder = folder.parent
            return {"made": made, "gone": gone, "home": home}

    def _register(self, url: urls.Url, one: Any) -> list[Any]:
        """Make the stand-in of an object, or make it again for another version of it."""
        path = f"{self.root}/{url.scheme}/{url.bucket}/{one.key}"
        known = self.stand_ins.get(path)
        if known is None or known.version != one.version:
            _make_sparse(path, one, url._replace(key=one.key))
            self.stand_ins[path] = _StandIn(path, url._replace(key=one.key), one.version)
        return [path, list(one.version)]

    def find(self, path: str, version: Sequence[Any] | None = None) -> _StandIn:
        """Return a stand-in; refuse what was not listed, or another version."""
        found = self.stand_ins.get(path)
        if found is None:
            raise FormatError("cannot be read: it is none of the objects that were listed")
        if version is not None and found.version != Version(*version):
            raise ChangedError(CHANGED)
        return found


class _Visit:
    """One connection, with the objects that are read over it."""

    def __init__(self, server: _Server, connection: socket.socket) -> None:
        self.server = server
        self.connection = connection
        self.is_owner = _read_peer(connection) == server.owner
        self.opened: dict[str, Any] = {}

    def close(self) -> None:
        """Forget what was fetched ahead."""
        for source in self.opened.values():
            source.close()

    def answer(self, message: dict[str, Any]) -> None:
        """Answer one request."""
        op = message.pop("op")
        try:
            if op not in _OPS or (_OPS[op].owner_only and not self.is_owner):
                raise PolyakError(f"the gateway refuses '{shown(op)}' to this process")
            value = _OPS[op].work(self, **message)
        except Exception as error:  # the other end raises it
            send(self.connection, {"error": describe_error(error)})
            return
        if op not in ("read", "part"):
            send(self.connection, {"value": value})

    def enlist(self, url: str) -> dict[str, Any]:
        """See `_Server.enlist`."""
        return self.server.enlist(url)

    def fill(self, path: str, version: Sequence[Any], first: int, count: int) -> bool:
        """Have blocks of an object in its stand-in; return whether all of its blocks are there."""
        stand_in = self.server.find(path, version)
        stand_in.fill(first, count)
        return stand_in.is_whole

    def fetch(self, paths: Sequence[str]) -> None:
        """Have whole objects in their stand-ins."""
        found = [self.server.find(path) for path in paths]
        for one in found:
            one._begin(0, one.blocks)
        for one in found:
            try:
                one.fill(0, one.blocks)
            except FormatError as error:
                raise type(error)(f"{one.source.name}: {error}") from None

    def download(self, path: str, target: str) -> None:
        """Copy a whole object to another file of the private folder."""
        stand_in = self.server.find(path)
        try:
            stand_in.download(target)
        except FormatError as error:
            raise type(error)(f"{stand_in.source.name}: {error}") from None

    def pair(self, paths: Sequence[str]) -> None:
        """Have the blocks of one of some objects, when they are asked for, fetched of all."""
        found = [self.server.find(path) for path in paths]
        group = _Group(found)
        for one in found:
            one.alike = group

    def prefetch(self, path: str, version: Sequence[Any], ranges: Sequence[Any]) -> None:
        """Have ranges of an object fetched, for reads over this connection."""
        self._open(path, version).prefetch([(start, nbytes) for start, nbytes in ranges])

    def read(self, path: str, version: Sequence[Any], offset: int, nbytes: int) -> None:
        """Send bytes of an object, each piece as it comes."""
        pieces = self._open(path, version).pieces(offset, nbytes)
        send(self.connection, {"value": None})
        try:
            for piece in pieces:
                send(self.connection, {"nbytes": len(piece)})
                self.connection.sendall(piece)
        except PolyakError as error:
            send(self.connection, {"error": describe_error(error)})

    def prepare(self, url: str, force: bool) -> None:
        """See `uploads.prepare`."""
        from polyak_cli.storage import uploads

        uploads.prepare(url, force=force)

    def exists(self, url: str) -> bool:
        """See `uploads.exists`."""
        from polyak_cli.storage import uploads

        return uploads.exists(url)

    def forget(self, path: str) -> None:
        """Delete a stand-in."""
        with self.server.lock:
            self.server.stand_ins.pop(path, None)
            Path(path).unlink(missing_ok=True)

    def begin(self, files: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """See `Sender.begin`."""
        return self.server.sender.begin(files)

    def part(self, path: str, token: str, number: int, nbytes: int) -> None:
        """Take a part, which follows the request, to be sent."""
        with self.server.sender.take(path, token, number) as take:
            send(self.connection, {"value": None})
            content = bytearray(nbytes)
            if not fill(self.connection, memoryview(content)):
                raise OutputError("the part ends too early")
            take(content)
        send(self.connection, {"value": None})

    def send(self, receipts: Mapping[str, Mapping[str, str]], **request: Any) -> None:
        """See `Sender.send`; stops when the other end does not want it any more."""
        by_number = {
            path: {int(number): receipt for number, receipt in found.items()}
            for path, found in receipts.items()
        }
        self.server.sender.send(receipts=by_number, report=self._report, **request)

    def abandon(self) -> None:
        """See `Sender.abandon`."""
        self.server.sender.abandon()

    def _report(self, nbytes: int) -> None:
        """Report bytes that were sent; raise where nobody waits for more."""
        ready, _, _ = select.select([self.connection], [], [], 0)
        if ready and not self.connection.recv(1):
            raise OutputError("the upload was stopped")
        if nbytes:
            send(self.connection, {"sent": nbytes})

    def find_orphans(self, url: str) -> list[Any]:
        """See `uploads.find_orphans`."""
        from polyak_cli.storage import uploads

        return uploads.find_orphans(url)

    def abort_orphan(self, orphan: Sequence[Any]) -> None:
        """See `uploads.abort_orphan`."""
        from polyak_cli.storage import uploads

        uploads.abort_orphan(uploads.Orphan(*orphan))

    def count(self) -> list[int]:
        """Return how many requests this process has made, and what they brought."""
        from polyak_cli.storage.objects import requests_made

        return list(requests_made())

    def _open(self, path: str, version: Sequence[Any]) -> Any:
        """Return an object that is read over this connection."""
        if path not in self.opened:
            from polyak_cli.storage.objects import ObjectInput

            stand_in = self.server.find(path, version)
            self.opened[path] = ObjectInput(stand_in.source.url, stand_in.version)
        return self.opened[path]


class _Op(NamedTuple):
    """A kind of request."""

    work: Callable[..., Any]
    owner_only: bool = True  # forked children, which read untrusted headers, may not ask for it


_OPS = {
    "list": _Op(_Visit.enlist),
    "pair": _Op(_Visit.pair),
    "fetch": _Op(_Visit.fetch),
    "download": _Op(_Visit.download),
    "count": _Op(_Visit.count),
    "prepare": _Op(_Visit.prepare),
    "exists": _Op(_Visit.exists),
    "forget": _Op(_Visit.forget),
    "begin": _Op(_Visit.begin),
    "send": _Op(_Visit.send),
    "abandon": _Op(_Visit.abandon),
    "find_orphans": _Op(_Visit.find_orphans),
    "abort_orphan": _Op(_Visit.abort_orphan),
    "fill": _Op(_Visit.fill, owner_only=False),
    "prefetch": _Op(_Visit.prefetch, owner_only=False),
    "read": _Op(_Visit.read, owner_only=False),
    # Of an upload whose token the asking process has: those that read headers have none.
    "part": _Op(_Visit.part, owner_only=False),
}


def _read_peer(connection: socket.socket) -> int:
    """Return the process at the other end, 0 where the system does not say."""
    if hasattr(socket, "SO_PEERCRED"):
        size = struct.calcsize("3i")
        answer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        return int(struct.unpack("3i", answer)[0])
    local, peer_pid = 0, 2  # SOL_LOCAL and LOCAL_PEERPID of macOS
    return connection.getsockopt(local, peer_pid)


def _make_sparse(path: str, one: Any, url: urls.Url) -> None:
    """Make an empty file of an object's size and time."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        Path(path).unlink(missing_ok=True)  # who has an older version open keeps its bytes
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, one.size)
        finally:
            os.close(descriptor)
        os.utime(path, ns=(one.mtime_ns, one.mtime_ns))
    except OSError as error:
        raise PolyakError(
            f"{url}: no stand-in can be made in TMPDIR: {error.strerror}; set TMPDIR to another "
            "folder"
        ) from None


def main() -> None:
    """Serve until the process that started this one has ended or says so."""
    root, place = sys.argv[1:]
    owner = os.getppid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # they are meant for the other process
    _raise_limit()
    server = _Server(root, owner)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{place}/{_SOCKET}")
            listener.listen(128)
            threading.Thread(target=_accept, args=(listener, server), daemon=True).start()
            os.write(1, b"ready\n")
            # Forked children of the other process hold the pipe too, and may outlive it.
            while os.getppid() == owner:
                ready, _, _ = select.select([0], [], [], _LOOK)
                if ready and not os.read(0, 1):
                    break
    finally:
        server.sender.end()
        for folder in (root, place):
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)  # without waiting for requests that are under way


def _accept(listener: socket.socket, server: _Server) -> None:
    """Take connections, until no descriptor becomes free for another."""
    refused = 0
    while refused * _PAUSE < _PATIENCE:
        try:
            connection, _ = listener.accept()
        except OSError:  # connections that end free descriptors
            refused += 1
            time.sleep(_PAUSE)
            continue
        refused = 0
        threading.Thread(target=server.serve, args=(connection,), daemon=True).start()
    listener.close()  # whoever waits for a connection would wait for ever


def _raise_limit() -> None:
    """Let this process open as many files and connections as the system lets it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # some systems have a lower limit of their own
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    main()
