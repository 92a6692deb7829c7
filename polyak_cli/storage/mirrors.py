"""Stand-ins: local paths for the objects that URLs name.

A URL becomes a path at the door, in a private folder of sparse files that have the names, sizes and
times of the objects.  All that works with paths then works with objects: listing, epochs in names,
patterns, folders as checkpoints.  Headers are fetched into the sparse files block by block, when
they are read; values come straight from the objects and are not kept.  The bytes come from the
gateway, as this process may fork (see `gateway`).
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np

from polyak_cli.errors import (
    ChangedError,
    FormatError,
    MissingExtraError,
    name_path,
    show_urls_for,
    shown,
    word_size,
)
from polyak_cli.storage import Bytes, Version, urls
from polyak_cli.storage.gateway import BLOCK, Client, Stream
from polyak_cli.storage.local import InputStream, LocalInput, LocalStore, name_errors

#: Bytes up to which an object is fetched whole by the first read of it: one request is quicker.
_SMALL = 4 << 20
#: Bytes of a read above which it is no header's, and not kept.
_LARGE = 1 << 20
#: Blocks that are fetched at most because those before them were read.
_MOST_BLOCKS = 64
#: Bytes that are fetched ahead of one who reads on and on and does not say so.
_AHEAD = 4 << 20
#: Bytes up to which an object is fetched whole where its header is scattered over it.
WHOLE = 256 << 20


class _Mirror:
    """The gateway of this process and what was listed through it."""

    def __init__(self) -> None:
        self.client = Client()
        self.versions: dict[str, Version] = {}
        self.secret: list[str] = []  # places whose URLs have secrets
        show_urls_for(self.client.root)

    def list(self, url: urls.Url) -> str:
        """Make stand-ins of what a URL names, and forget those of objects that are gone.

        Returns:
            The folder of the stand-ins of its bucket, with a slash.
        """
        answer = self.client.ask("list", url=url.whole)
        for path in answer["gone"]:
            self.versions.pop(path, None)
        self.versions |= {path: Version(*version) for path, version in answer["made"]}
        return str(answer["home"])


_mirror: _Mirror | None = None
_lock = threading.Lock()


def enter(text: str) -> str:
    """Return the local name of what a URL names; any other text stays as it is.

    The URL may name an object, a folder, or be a pattern.  What it names is listed, again with each
    call.  A name that no object has is returned too: nothing is there.

    Raises:
        UsageError: it is a URL that is not supported.
        PolyakError: it cannot be listed; the message names it.
    """
    url = urls.parse(text)
    if url is None:
        return text
    mirror = _open_mirror(url)
    path = f"{mirror.list(url)}{url.key}".rstrip("/")
    if url.user or url.query:
        mirror.secret.append(path)
    return path


def enter_folder(text: str) -> str:
    """Return the local name of a folder, as `enter`, which is there even if it holds nothing."""
    url = urls.parse(text)
    if url is None:
        return text
    path = enter(str(url).rstrip("/") + "/")
    Path(path).mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def _open_mirror(url: urls.Url) -> _Mirror:
    """Return the mirror of this process; the first call starts its gateway."""
    global _mirror
    from importlib.util import find_spec

    with _lock:
        if _mirror is None:
            # Not imported here: this process forks.
            if find_spec("obstore") is None:
                raise MissingExtraError(f"{url.scheme}://", "remote")
            _mirror = _Mirror()
            atexit.register(close)
        return _mirror


def close() -> None:
    """End the gateway and remove the stand-ins; nothing happens where there are none."""
    global _mirror
    if _mirror is not None and _mirror.client.owner == os.getpid():
        _mirror.client.close()
        _mirror = None
        show_urls_for("")


def is_mirrored(path: str) -> bool:
    """Return whether a path is that of a stand-in, or of an output among them."""
    return _mirror is not None and path.startswith(f"{_mirror.client.root}/")


def find_version(path: str) -> Version | None:
    """Return the version of the object that a path stands in for; None for any other path."""
    return _mirror.versions.get(path) if _mirror is not None else None


def locate(path: str) -> str:
    """Return the URL of a stand-in, without its secrets; any other path stays as it is."""
    return name_path(path) if is_mirrored(path) else path


def count_requests() -> tuple[int, int]:
    """Return how many requests the gateway has made, and how many of them were tried again."""
    if _mirror is None:
        return 0, 0
    requests, retries, _ = _mirror.client.ask("count")
    return requests, retries


def is_secret(path: str) -> bool:
    """Return whether the URL of a stand-in has a password or a signature, which `locate` lacks."""
    return _mirror is not None and path.startswith(tuple(_mirror.secret))


def fetch(path: str) -> str:
    """Have the whole object in its stand-in, for libraries that open a path; return the path.

    A path that is no stand-in is returned as it is.

    Raises:
        FormatError: it cannot be fetched; the message names the object.
    """
    fetch_all([path])
    return path


def fetch_all(paths: Sequence[str], most: int | None = None) -> None:
    """Have objects in their stand-ins, all of them at a time; see `fetch`.

    Args:
        paths: what is no stand-in is passed over.
        most: bytes of the largest object to fetch; None for any.
    """
    if _mirror is None:
        return
    wanted = [
        path
        for path in paths
        if (version := _mirror.versions.get(path)) and (most is None or version.size <= most)
    ]
    if wanted:
        _check_room(wanted, _mirror)
        _mirror.client.ask("fetch", paths=wanted)


@contextlib.contextmanager
def fetched(paths: Sequence[str]) -> Iterator[Path]:
    """Yield a local file for a library that opens one by its name; it is removed afterwards.

    Args:
        paths: the file, and others that the library looks for beside it.  Those that are no objects
            are not copied.

    Raises:
        FormatError: an object cannot be fetched, or TMPDIR has no room; the message names it.
    """
    if _mirror is None or paths[0] not in _mirror.versions:
        yield Path(paths[0])
        return
    _check_room(paths, _mirror)
    with tempfile.TemporaryDirectory(prefix="copy-", dir=_mirror.client.root) as folder:
        targets = [Path(folder, Path(path).name) for path in paths]
        for path, target in zip(paths, targets, strict=True):
            _mirror.client.ask("download", path=path, target=str(target))
        yield targets[0]


def describe_fetched(path: str) -> list[str]:
    """Return a note that an object is fetched whole where it is used, none for a local file."""
    version = find_version(path)
    return [f"was fetched to TMPDIR, {word_size(version.size)}"] if version else []


def _check_room(paths: Sequence[str], mirror: _Mirror) -> None:
    nbytes = sum(mirror.versions[path].size for path in paths if path in mirror.versions)
    space = os.statvfs(mirror.client.root)
    if nbytes > space.f_bavail * space.f_frsize:
        raise FormatError(
            f"{shown(paths[0])}: TMPDIR has no room for the {word_size(nbytes)} to fetch; set "
            "TMPDIR to a folder on a disk with room"
        )


def expect_alike(paths: Iterable[str]) -> None:
    """Have the same blocks of several objects fetched at a time, when those of one are read."""
    if _mirror is not None:
        wanted = [path for path in paths if path in _mirror.versions]
        if len(wanted) > 1:
            _mirror.client.ask("pair", paths=wanted)


def open_whole(path: str, version: Version | None) -> LocalInput:
    """Return the stand-in of an object, open, with all of the object's bytes.

    Raises:
        FormatError: it cannot be fetched, or is another version; the message names it.
    """
    with MirrorStore().open(path, version) as source:
        if isinstance(source, MirroredInput):
            with name_errors(path):
                source.fill(0, source.size)
        opened = LocalStore().open(path)
        opened.version = source.version
        return opened


class MirroredInput:
    """An object, read through its stand-in and the gateway; see `storage.InputFile`."""

    def __init__(self, path: str, client: Client, version: Version, local: LocalInput) -> None:
        self.name = path
        self.version = version
        self._client = client
        self._local = local
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
        if self._is_whole is None and self.size <= _SMALL:
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


class MirrorStore:
    """The objects that have stand-ins; see `storage.Store`."""

    def open(self, key: str, version: Version | None = None) -> MirroredInput | LocalInput:
        """See `storage.Store.open`.  What lies among the stand-ins and is none is a local file."""
        found = find_version(key)
        if found is None or _mirror is None:
            return LocalStore().open(key, version)
        if version not in (None, found):
            raise ChangedError(
                f"{shown(key)}: changed while it was read; is training still running?"
            )
        return MirroredInput(key, _mirror.client, found, LocalStore().open(key))

    def list(self, prefix: str) -> Iterator[str]:
        """See `storage.Store.list`."""
        return LocalStore().list(prefix)

    def create(
        self, key: str, *, force: bool, folder: Callable[[Path], Collection[str]] | None = None
    ) -> AbstractContextManager[Path]:
        """See `storage.Store.create`."""
        return LocalStore().create(key, force=force, folder=folder)
