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
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyak_cli.errors import (
    CHANGED,
    ChangedError,
    FormatError,
    MissingExtraError,
    OutputError,
    PolyakError,
    UsageError,
    name_path,
    show_urls_for,
    shown,
    word_size,
)
from polyak_cli.storage import Version, urls
from polyak_cli.storage.local import LocalInput, LocalOutput, LocalStore, name_errors

if TYPE_CHECKING:  # imported where a URL is named: who averages local files pays for none of it
    from polyak_cli.storage import uploads
    from polyak_cli.storage.mirrored import MirroredInput
    from polyak_cli.storage.parts import PartOutput

#: Bytes up to which an object is fetched whole where its header is scattered over it.
WHOLE = 256 << 20


class _Mirror:
    """The gateway of this process and what was listed through it."""

    def __init__(self) -> None:
        from polyak_cli.storage.gateway import Client

        self.client = Client()
        self.versions: dict[str, Version] = {}
        self.secret: list[str] = []  # places whose URLs have secrets
        #: Files that are sent in parts while they are written; and receipts of their parts.
        self.begun: dict[str, uploads.Upload] = {}
        self.receipts: dict[str, dict[int, str]] = {}
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

    def forget(self, path: Path) -> None:
        """Delete the stand-in of an empty object by which a store keeps a folder."""
        self.client.ask("forget", path=str(path))
        self.versions.pop(str(path), None)


_mirror: _Mirror | None = None
_heads_only = False  # see `reading_heads`
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


def enter_output(text: str) -> str:
    """Return the local name of an output; of a URL, one in a folder that exists.

    What has the name is listed, so that it is seen.

    Raises:
        UsageError: it is a URL that is not supported.
        PolyakError: it cannot be written to, or not be listed.
    """
    if urls.parse(text) is None:
        return text
    url = _parse_output(text)
    if not url.key.strip("/"):
        raise OutputError(f"{shown(text)}: is a whole bucket; name an object or a folder in it")
    path = Path(enter(str(url)))
    mirror = _require()
    if path.is_file() and not path.stat().st_size and not mirror.client.ask("exists", url=str(url)):
        mirror.forget(path)
    _make_folder(path.parent, mirror)
    return str(path)


def _make_folder(folder: Path, mirror: _Mirror) -> None:
    """Make the folder of an output, where an empty object may stand for it.

    Raises:
        OutputError: an object has its name.
    """
    if folder.is_file():
        if folder.stat().st_size:
            raise OutputError(f"{shown(folder)}: is an object, not a folder; name another output")
        mirror.forget(folder)
    if not folder.is_dir():
        _make_folder(folder.parent, mirror)
        folder.mkdir(mode=0o700)


def _parse_output(text: str) -> urls.Url:
    """Return the parts of a URL that can be written to.

    Raises:
        UsageError: it is none.
        MissingExtraError: a package is missing.
    """
    url = urls.parse(text)
    if url is None or url.scheme not in urls.BUCKETS:
        known = ", ".join(f"{one}://" for one in urls.BUCKETS)
        raise UsageError(f"{shown(text)}: cannot be written to; expected one of {known}")
    if url.scheme == "s3" and not find_spec("boto3"):
        raise MissingExtraError("writing to s3://", "s3")
    return url


def begin(named: Mapping[Path, Path], written: Mapping[Path, Sequence[tuple[int, int]]]) -> bool:
    """Begin to send files in parts while they are written, and return whether all can be.

    What is not written by `open_output` is sent from the files at the end, by `send`.

    Args:
        named: path of each file, which has its size -> that of the stand-in that it will be.
        written: path -> offset and length of each run of bytes that `open_output` will write.
    """
    if not all(map(is_sent_in_parts, named.values())):
        return False
    from polyak_cli.storage import uploads

    mirror = _require()
    files = [
        (str(path), locate(str(final)), size, written[path])
        for path, final in named.items()
        if (size := path.stat().st_size) > uploads.PART
    ]
    begun = mirror.client.ask("begin", files=files)
    mirror.begun |= {path: uploads.Upload(*upload) for path, upload in begun.items()}
    return True


def is_sent_in_parts(output: Path) -> bool:
    """Return whether an output can be sent in parts by several processes: to S3 only."""
    return is_mirrored(str(output)) and locate(str(output)).startswith("s3://")


def find_upload(path: str) -> uploads.Upload | None:
    """Return the upload in parts that a file has become, if any."""
    return _mirror.begun.get(path) if _mirror is not None else None


def find_part(path: str) -> int:
    """Return the bytes of a part of a file that is sent in parts; 0 of any other."""
    upload = find_upload(path)
    return upload.part if upload else 0


def open_output(path: str) -> LocalOutput | PartOutput:
    """Open a file that is there already, to be written by offset.

    Of a file that is sent in parts, the bytes that are written go to the store and not to the disk.
    """
    upload = find_upload(path)
    if upload is None or _mirror is None:
        return LocalOutput(path)
    from polyak_cli.storage.mirrored import Parts
    from polyak_cli.storage.parts import PartOutput

    parts = Parts(_mirror.client, path, upload.token)
    skeleton = LocalStore().open(path)

    def fill(offset: int, nbytes: int) -> bytearray:
        return bytearray(skeleton.read(offset, nbytes))

    def close() -> None:
        skeleton.close()
        parts.close()

    return PartOutput(path, skeleton.size, upload.part, fill, parts.send, close)


def add_receipts(receipts: Mapping[str, Mapping[int, str]]) -> None:
    """Keep the receipts of parts that other machines have sent, for `send`."""
    for path, found in receipts.items():
        _require().receipts.setdefault(path, {}).update(found)


def abandon() -> None:
    """Abort the uploads that were begun and not sent; nothing happens where there are none."""
    if _mirror is not None and _mirror.begun:
        _mirror.begun.clear()
        _mirror.receipts.clear()
        with contextlib.suppress(PolyakError):
            _mirror.client.ask("abandon")


def prepare(path: Path, *, force: bool) -> None:
    """Refuse a store that may not be written, or would replace objects; see `uploads.prepare`."""
    _require().client.ask("prepare", url=locate(str(path)), force=force)


def send(
    named: Mapping[Path, Path], *, force: bool, stale: Sequence[Path] = (), verify: bool = False
) -> None:
    """Send files to the objects that paths stand for; see `uploads.send_files`."""
    from polyak_cli.storage.messages import watch

    files = [(str(path), locate(str(final))) for path, final in named.items()]
    old = [locate(str(path)) for path in stale]
    mirror = _require()
    request: dict[str, Any] = {
        "files": files,
        "receipts": mirror.receipts,
        "force": force,
        "stale": old,
        "verify": verify,
    }
    with mirror.client.connect() as connection:
        watch(connection, "send", lambda _: None, **request)


def find_orphans(url: str) -> list[uploads.Orphan]:
    """Return what runs left in a store, or are at work on; see `uploads.find_orphans`."""
    from polyak_cli.storage import uploads

    parsed = _parse_output(url)
    found = _open_mirror(parsed).client.ask("find_orphans", url=str(parsed))
    return [uploads.Orphan(*one) for one in found]


def abort_orphan(orphan: uploads.Orphan) -> None:
    """Delete what was left of a run."""
    _require().client.ask("abort_orphan", orphan=orphan)


def _require() -> _Mirror:
    """Return the mirror in which a path lies."""
    if _mirror is None:
        raise PolyakError("the process that writes to the network has ended; try again")
    return _mirror


def _open_mirror(url: urls.Url) -> _Mirror:
    """Return the mirror of this process; the first call starts its gateway."""
    global _mirror
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


@contextlib.contextmanager
def reading_heads() -> Iterator[None]:
    """Have only the blocks fetched that are asked for, of small objects too.

    For a look at the headers of many objects, of which few will be read.
    """
    global _heads_only
    before, _heads_only = _heads_only, True
    try:
        yield
    finally:
        _heads_only = before


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
        if not isinstance(source, LocalInput):
            with name_errors(path):
                source.fill(0, source.size)
        opened = LocalStore().open(path)
        opened.version = source.version
        return opened


class MirrorStore:
    """The objects that have stand-ins; see `storage.Store`."""

    def open(self, key: str, version: Version | None = None) -> MirroredInput | LocalInput:
        """See `storage.Store.open`.  What lies among the stand-ins and is none is a local file."""
        found = find_version(key)
        if found is None or _mirror is None:
            return LocalStore().open(key, version)
        if version not in (None, found):
            raise ChangedError(f"{shown(key)}: {CHANGED}")
        from polyak_cli.storage.mirrored import MirroredInput

        local = LocalStore().open(key)
        return MirroredInput(key, _mirror.client, found, local, lambda: _heads_only)
