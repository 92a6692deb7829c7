"""Send files to a store of objects: all of them get their names, or none of them does.

Nothing is visible under a name before its object is complete.  Without ``force`` no object is ever
replaced: the store itself refuses to, so that of two runs to one name one fails.  Whatever ends a
run, its uploads are aborted; those of a run that was killed are found by `find_orphans`.

Runs in the gateway process and in workers, never in a process that forks.
"""

from __future__ import annotations

import concurrent.futures as futures
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

from polyak_cli.errors import FormatError, OutputError, PolyakError, StoreError, shown
from polyak_cli.storage import blobs, s3
from polyak_cli.storage.local import LocalStore
from polyak_cli.storage.parts import Outbox
from polyak_cli.storage.urls import BUCKETS, Url, parse

#: Bytes of a part, where the object is not so large that its parts have to be larger.
PART = 8 << 20
#: Bytes of the parts that are in memory at a time, and how many these are at most.
_MEMORY = 64 << 20
_MOST_AT_ONCE = 4
#: Seconds after which a living run renews its leases, and after which it counts as dead.
_RENEWAL = 60.0
_DEAD = 15 * 60.0
#: The same for a hidden object on gs:// and az://, which shows no sign of life.
_DEAD_HIDDEN = 24 * 3600.0
#: Seconds between two calls of `Progress` while nothing happens.
_TICK = 0.5

#: Called with bytes that were sent, also with 0 while waiting.  An exception stops the upload.
Progress = Callable[[int], None]


class Upload(NamedTuple):
    """An upload in parts: plain data, so that other processes can send parts of it."""

    url: str
    id: str
    token: str  # recognises the object as this upload's
    part: int  # bytes of each part but the last
    nbytes: int  # of all parts


class Orphan(NamedTuple):
    """What a run of polyak left behind in a store, or is still at work on."""

    url: str
    id: str  # of an upload, or the key of a hidden object
    begun: float  # seconds since 1970
    idle: float  # seconds without a sign of life
    nbytes: int
    is_dead: bool


def _parse(url: str) -> Url:
    """Return the parts of a URL that can be written to."""
    parsed = parse(url)
    if parsed is None or parsed.scheme not in BUCKETS:
        raise OutputError(f"{shown(url)}: cannot be written to")
    return parsed


def choose_part(nbytes: int) -> int:
    """Return the bytes of a part: the usual ones, or more where a store allows no more parts."""
    least = -(-nbytes // s3.MOST_PARTS)
    return max(PART, -(-least // (1 << 20)) << 20)


# --- one upload in parts, from several processes --------------------------------------------------


def begin(url: str, nbytes: int, *, part: int | None = None) -> Upload:
    """Begin an upload in parts to S3, and abort what a dead run left under the same name.

    Args:
        url: the object to make.
        nbytes: its size.
        part: bytes of a part; the usual ones if it is not given.
    """
    parsed = _parse(url)
    with contextlib.suppress(PolyakError):  # there may be no permission to list
        for orphan in find_orphans(url):
            if orphan.url == url and orphan.is_dead:
                abort_orphan(orphan)
    token = os.urandom(8).hex()
    return Upload(url, s3.begin(parsed, token), token, part or choose_part(nbytes), nbytes)


def send_part(upload: Upload, number: int, content: bytes | bytearray) -> str:
    """Send a part, from 1 on, and return its receipt; a part may be sent again."""
    return s3.send_part(_parse(upload.url), upload.id, number, content)


def make_outbox(upload: Upload) -> Outbox:
    """Return what sends parts, more of them at a time if they are small."""
    # One connection to a store is slower than a worker.
    at_once = max(2, min(_MOST_AT_ONCE, _MEMORY // upload.part))
    return Outbox(partial(send_part, upload), at_once)


def complete(upload: Upload, receipts: Mapping[int, str], *, force: bool) -> None:
    """Give the object its name.

    Raises:
        OutputError: the name is taken and ``force`` is not given, among others; the upload remains,
            and is to be aborted.
    """
    s3.complete(_parse(upload.url), upload.id, receipts, upload.token, force=force)


def abort(upload: Upload) -> None:
    """Delete an upload and its parts."""
    s3.abort(_parse(upload.url), upload.id)


def prepare(url: str, *, force: bool) -> None:
    """Refuse, before any work, a store that may not be written, or that would replace objects.

    Raises:
        OutputError: says what the store refuses, or should refuse.
    """
    parsed = _parse(url)
    if parsed.scheme == "s3" and not s3.honours_conditions(parsed) and not force:
        raise OutputError(
            f"{shown(parsed)}: the server ignores If-Match and If-None-Match, so that "
            "another run's object could be replaced; use --force to accept that"
        )


class Leases:
    """Shows the store each minute that this run lives, until the block ends."""

    def __init__(self) -> None:
        self._uploads: list[Upload] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="polyak-lease", daemon=True)

    def __enter__(self) -> Leases:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def add(self, upload: Upload) -> None:
        """Renew the lease of an upload too."""
        self._uploads.append(upload)

    def _renew(self) -> None:
        while not self._ended.wait(_RENEWAL):
            for upload in [*self._uploads]:
                # It may be complete by now; and a server that is down ends the upload by itself.
                with contextlib.suppress(PolyakError):
                    s3.renew(_parse(upload.url), upload.id)


# --- whole files ----------------------------------------------------------------------------------


class _Object(Protocol):
    """A file on its way to its name."""

    def send(self, progress: Progress) -> None:
        """Send its bytes, to where nobody sees them."""

    def name(self, *, force: bool) -> None:
        """Give the object its name."""

    def abort(self) -> None:
        """Delete what was sent; the object, if it has its name, is left alone."""

    def withdraw(self) -> None:
        """Delete the object, if it is the one that this run has named."""


_NOT_BEGUN = Upload("", "", "", PART, 0)


@dataclass
class _InParts:
    """A file for S3 that is larger than a part."""

    path: str
    url: Url
    nbytes: int
    leases: Leases
    upload: Upload = _NOT_BEGUN
    receipts: dict[int, str] = field(default_factory=dict)

    def send(self, progress: Progress) -> None:
        """See `_Object.send`; parts are sent in parallel, of which few are in memory."""
        if not self.upload.id:
            self.upload = begin(str(self.url), self.nbytes)
            self.leases.add(self.upload)
        upload = self.upload
        at_once = max(1, min(_MOST_AT_ONCE, _MEMORY // upload.part))
        pool = futures.ThreadPoolExecutor(at_once)
        waiting: set[futures.Future[tuple[int, str, int]]] = set()
        try:
            with LocalStore().open(self.path) as file:
                for number, offset in enumerate(range(0, self.nbytes, upload.part), 1):
                    if number in self.receipts:
                        continue
                    waiting.add(pool.submit(self._send_part, file.read, number, offset))
                    while len(waiting) >= at_once:
                        waiting = self._collect(waiting, progress)
                while waiting:
                    waiting = self._collect(waiting, progress)
        finally:
            # Requests that hang are not waited for: their upload is aborted next.
            pool.shutdown(wait=False, cancel_futures=True)

    def _send_part(
        self, read: Callable[[int, int], bytes], number: int, offset: int
    ) -> tuple[int, str, int]:
        content = read(offset, self.upload.part)
        return number, send_part(self.upload, number, content), len(content)

    def _collect(
        self, waiting: set[futures.Future[tuple[int, str, int]]], progress: Progress
    ) -> set[futures.Future[tuple[int, str, int]]]:
        """Wait for some parts, take their receipts, and return the others."""
        done, waiting = futures.wait(waiting, _TICK, return_when=futures.FIRST_COMPLETED)
        for future in done:
            number, self.receipts[number], nbytes = future.result()
            progress(nbytes)
        progress(0)
        return waiting

    def name(self, *, force: bool) -> None:
        """See `_Object.name`."""
        complete(self.upload, self.receipts, force=force)
        self._check()

    def _check(self) -> None:
        found = s3.find(self.url)
        if not found or found.token != self.upload.token:
            raise OutputError(
                f"{shown(self.url)}: another program has written or deleted this object in the "
                "meantime; find out which"
            )
        if found.size != self.nbytes:
            raise OutputError(
                f"{shown(self.url)}: the server made an object of {found.size} bytes of the "
                f"{self.nbytes} that it got"
            )

    def abort(self) -> None:
        """See `_Object.abort`."""
        if self.upload.id:
            abort(self.upload)

    def withdraw(self) -> None:
        """See `_Object.withdraw`."""
        found = s3.find(self.url)
        if found and found.token == self.upload.token:
            s3.delete(self.url)


@dataclass
class _AtOnce:
    """A file for S3 that one request can write; it is sent when it gets its name."""

    path: str
    url: Url
    nbytes: int
    token: str = field(default_factory=lambda: os.urandom(8).hex())

    def send(self, progress: Progress) -> None:
        """See `_Object.send`."""
        progress(0)

    def name(self, *, force: bool) -> None:
        """See `_Object.name`."""
        with LocalStore().open(self.path) as file:
            s3.put(self.url, file.read(0, self.nbytes), self.token, force=force)

    def abort(self) -> None:
        """See `_Object.abort`."""

    def withdraw(self) -> None:
        """See `_Object.withdraw`."""
        found = s3.find(self.url)
        if found and found.token == self.token:
            s3.delete(self.url)


@dataclass
class _Hidden:
    """A file for gs:// or az://; see `blobs`."""

    path: str
    url: Url
    nbytes: int
    token: str = field(default_factory=lambda: os.urandom(8).hex())
    is_named: bool = False

    def send(self, progress: Progress) -> None:
        """See `_Object.send`."""
        with contextlib.suppress(PolyakError):  # there may be no permission to list
            for orphan in find_orphans(str(self.url)):
                if orphan.url == str(self.url) and orphan.is_dead:
                    abort_orphan(orphan)
        blobs.send(blobs.hide(self.url, self.token), self._read(progress))

    def _read(self, progress: Progress) -> Iterator[bytes]:
        with LocalStore().open(self.path) as file:
            for offset in range(0, self.nbytes, blobs.CHUNK):
                piece = file.read(offset, blobs.CHUNK)
                yield piece
                progress(len(piece))

    def name(self, *, force: bool) -> None:
        """See `_Object.name`."""
        blobs.name(blobs.hide(self.url, self.token), self.url, force=force)
        self.is_named = True
        found = blobs.find(self.url)
        if found != self.nbytes:
            raise OutputError(
                f"{shown(self.url)}: the store made an object of {found} bytes of the "
                f"{self.nbytes} that it got"
            )
        self.abort()

    def abort(self) -> None:
        """See `_Object.abort`."""
        blobs.delete(blobs.hide(self.url, self.token))

    def withdraw(self) -> None:
        """See `_Object.withdraw`."""
        if self.is_named:
            blobs.delete(self.url)


def send_files(
    files: Sequence[tuple[str, str]],
    *,
    force: bool,
    progress: Progress = lambda _: None,
    stale: Sequence[str] = (),
    verify: bool = False,
    begun: Mapping[str, tuple[Upload, dict[int, str]]] | None = None,
) -> None:
    """Send files of this machine, and give all of them their names when all bytes are there.

    They get their names in their order, so that a reader who finds the last one finds all.  After
    an error nothing is left of them; with ``force``, objects that were replaced by then stay so.

    Args:
        files: path and URL of each; the one that opens the others comes last.
        force: replace objects that have these names.
        progress: see `Progress`.
        stale: URLs of objects to delete at the end, which belonged to what was replaced.
        verify: read the objects back, and compare them with the files.
        begun: by path, uploads that were begun already, with the receipts of their parts; the
            missing parts are sent from the files.

    Raises:
        OutputError: a name is taken and ``force`` is not given; or a store cannot be written.
    """
    named: list[_Object] = []
    with Leases() as leases:
        objects = [_make(path, _parse(url), leases, begun or {}) for path, url in files]
        try:
            for one in objects:
                one.send(progress)
            for one in objects:
                progress(0)
                named.append(one)  # even if this fails: the answer may be lost, not the request
                one.name(force=force)
            for path, url in files if verify else ():
                _compare(path, url, progress)
        except BaseException:
            _undo(objects, [] if force else named)
            raise
    for url in stale:
        _delete(_parse(url))


def _make(
    path: str, url: Url, leases: Leases, begun: Mapping[str, tuple[Upload, dict[int, str]]]
) -> _Object:
    nbytes = Path(path).stat().st_size
    if path in begun:
        return _InParts(path, url, nbytes, leases, *begun[path])
    if url.scheme != "s3":
        return _Hidden(path, url, nbytes)
    return _InParts(path, url, nbytes, leases) if nbytes > PART else _AtOnce(path, url, nbytes)


def _compare(path: str, url: str, progress: Progress) -> None:
    """Read an object back.

    Raises:
        OutputError: it is not the file.
    """
    from polyak_cli.storage.objects import ObjectStore

    try:
        with LocalStore().open(path) as file, ObjectStore().open(url) as sent:
            same = file.size == sent.size
            for offset in range(0, file.size, PART):
                if not same:
                    break
                # The next piece comes while this one is compared.
                sent.prefetch([(offset, 2 * PART)])
                same = file.read(offset, PART) == sent.read(offset, PART)
                progress(0)
    except (FormatError, StoreError) as error:
        raise OutputError(f"it was written, but cannot be read back: {error}") from None
    if not same:
        raise OutputError(
            f"{shown(url)}: read back, it is not what was sent; check the store, and the network "
            "and memory of this machine"
        )


def _undo(objects: Sequence[_Object], named: Sequence[_Object]) -> None:
    """Delete what was sent, as far as the stores let it: the error that led here is raised."""
    for one in named:
        with contextlib.suppress(PolyakError):
            one.withdraw()
    for one in objects:
        with contextlib.suppress(PolyakError):
            one.abort()


def exists(url: str) -> bool:
    """Return whether an object has a name."""
    parsed = _parse(url)
    return (s3 if parsed.scheme == "s3" else blobs).find(parsed) is not None


def _delete(url: Url) -> None:
    (s3 if url.scheme == "s3" else blobs).delete(url)


# --- what dead runs left --------------------------------------------------------------------------


def find_orphans(url: str) -> list[Orphan]:
    """Return uploads of polyak, alive or dead, to names that begin with a URL; see `Orphan`.

    Uploads of other programs are never among them.  On gs:// the parts of an unfinished upload
    cannot be listed, and on az:// the store deletes them by itself within a week.
    """
    parsed = _parse(url)
    if parsed.scheme == "s3":
        return [
            Orphan(
                str(parsed._replace(key=one.key)),
                one.id,
                one.begun,
                one.idle,
                one.nbytes,
                one.idle > _DEAD,
            )
            for one in s3.list_pending(parsed)
        ]
    now = time.time()
    return [
        Orphan(
            str(parsed._replace(key=one.final)),
            one.key,
            one.begun,
            now - one.begun,
            one.nbytes,
            now - one.begun > _DEAD_HIDDEN,
        )
        for one in blobs.list_left(parsed)
    ]


def abort_orphan(orphan: Orphan) -> None:
    """Delete what was left of a run."""
    parsed = _parse(orphan.url)
    if parsed.scheme == "s3":
        s3.abort(parsed, orphan.id)
    else:
        blobs.delete(parsed._replace(key=orphan.id))
