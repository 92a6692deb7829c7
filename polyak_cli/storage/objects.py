"""Objects of buckets and web servers: listed, and read by range; the only home of obstore.

Every GET names the version that was listed, so that what is read is one version or an error.  A
process that has used this module must not fork: obstore waits for ever in a forked child.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import functools
import io
import itertools
import mmap
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, Self, TypeVar
from urllib.parse import unquote

import numpy as np

from polyak_cli.errors import (
    CHANGED,
    ChangedError,
    FormatError,
    MissingExtraError,
    PolyakError,
    StoreError,
    redact,
    shown,
)
from polyak_cli.storage import Bytes, Version, hub, urls
from polyak_cli.storage.environment import check_environment, find_emulator
from polyak_cli.storage.local import InputStream
from polyak_cli.storage.urls import Url

#: Bytes of a GET that is made for a single reader, and of one that is made ahead.
PART, LARGE_PART = 8 << 20, 16 << 20
#: Bytes of an answer that are copied at a time, at least.
_PIECE = 1 << 18
#: Bytes between two ranges up to which one GET for both is quicker than two.
_GAP = 1 << 16
#: GETs of this process at a time; and of those for more bytes than `_LARGE`, each of which needs
#: some 1.2 MB besides its buffer.
_AT_A_TIME, _LARGE_AT_A_TIME, _LARGE = 32, 12, 1 << 18
#: Tries of a request, and the longest pause in seconds between two.
_TRIES, _LONGEST_PAUSE = 7, 8.0
#: Seconds that one request may take: 16 MiB at 140 kB/s.
_TIMEOUT = "120s"
#: What `mallopt` calls the number of heaps.
_ARENA_MAX = -8
#: What is wrong with the key of an object, and what to do.
ODD_NAME = "a name that no file can have; copy the checkpoints to another prefix"
#: Statuses, as obstore words them, that another try does not change.
_FINAL = re.compile(r"status code: (?:30\d|400|401|403|404|405|410|411|412|416|501)\b")

#: What S3 says, with status 400, of credentials that were valid before.
_EXPIRED = ("ExpiredToken", "TokenRefreshRequired", "InvalidToken")

Result = TypeVar("Result")


class Listed(NamedTuple):
    """One object, as a listing or the answer to a HEAD describes it."""

    key: str
    size: int
    mtime_ns: int
    mark: str  # the ETag; "" where the server has none

    @property
    def version(self) -> Version:
        """The version that later reads have to find."""
        return Version(0, 0, self.size, self.mtime_ns, self.mark)


class Requests(NamedTuple):
    """What this process has asked servers for."""

    requests: int
    retries: int
    nbytes: int


class _Counter:
    """Counts requests; several threads make them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.made = Requests(0, 0, 0)

    def add(self, requests: int = 0, retries: int = 0, nbytes: int = 0) -> None:
        """Count what one thread has done."""
        with self.lock:
            old = self.made
            self.made = Requests(
                old.requests + requests, old.retries + retries, old.nbytes + nbytes
            )


class _Buffers:
    """Buffers of this process, which are filled again when what was in them has been read.

    The allocator would leave holes in the heap, a third more memory, and the system would clear
    each buffer before it is filled.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.free: list[memoryview] = []

    def take(self, nbytes: int) -> memoryview:
        """Return the smallest free buffer that is long enough, or a new one."""
        with self.lock:
            fitting = [k for k, one in enumerate(self.free) if len(one) >= nbytes]
            if fitting:
                return self.free.pop(min(fitting, key=lambda k: len(self.free[k])))
            self.free.clear()  # others than these are wanted now
        return _map(nbytes)

    def give(self, buffer: memoryview) -> None:
        """Take back a buffer that nobody reads any more."""
        with self.lock:
            self.free.append(buffer)


def _map(nbytes: int) -> memoryview:
    """Return new memory, which the system has back as soon as nobody has it."""
    return memoryview(mmap.mmap(-1, max(1, nbytes), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


_counter = _Counter()
_buffers = _Buffers()
_large = threading.BoundedSemaphore(_LARGE_AT_A_TIME)


def count_request(*, again: bool) -> None:
    """Count a request that another library has made."""
    _counter.add(requests=1, retries=int(again))


def requests_made() -> Requests:
    """Return what this process has asked servers for since it was started."""
    return _counter.made


@functools.cache
def pool() -> ThreadPoolExecutor:
    """Return the threads that make requests in this process."""
    # glibc gives threads heaps of their own, whose holes are of no use to the others: 15 MiB.
    with contextlib.suppress(OSError, AttributeError):  # there is another C library
        ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)
    return ThreadPoolExecutor(_AT_A_TIME, thread_name_prefix="polyak-get")


# --- connections ----------------------------------------------------------------------------------


def connect(url: Url, *, retries: int = 0) -> Any:
    """Return obstore's store of a bucket, container or web server, one for each in this process.

    Credentials are found in the ways that are usual for the service.

    Args:
        url: in it.
        retries: how often obstore repeats a request by itself, for what `_try` cannot repeat.

    Raises:
        MissingExtraError: obstore is not installed, or boto3 where a profile needs it.
        PolyakError: it cannot be connected to.
    """
    key = url._replace(key="")
    if url.scheme in ("http", "https"):
        return _connect(key, retries)
    return _connect(key._replace(user="", query=""), retries)


@functools.cache
def _connect(url: Url, retries: int) -> Any:
    try:
        from obstore import store
    except ImportError:
        raise MissingExtraError(f"{url.scheme}://", "remote") from None
    check_environment(url.scheme)
    retry = {"max_retries": retries}  # mostly 0: `_try` repeats requests, and counts them
    options: Any = {"timeout": _TIMEOUT, "connect_timeout": "10s"}
    try:
        if url.scheme == "s3":
            return _connect_s3(url.bucket, options, retry)
        if url.scheme == "gs":
            settings = find_emulator(options)
            return store.GCSStore(
                url.bucket, client_options=options, retry_config=retry, **settings
            )
        if url.scheme == "az":
            endpoint = os.environ.get("AZURE_STORAGE_ENDPOINT", "") + os.environ.get(
                "AZURE_ENDPOINT", ""
            )
            emulated = os.environ.get("AZURE_STORAGE_USE_EMULATOR", "").lower() in ("true", "1")
            options["allow_http"] = endpoint.startswith("http:") or emulated
            return store.AzureStore(url.bucket, client_options=options, retry_config=retry)
        base = f"{url.scheme}://{url.bucket}/{url.query}"
        if url.user:
            said = base64.b64encode(unquote(url.user[:-1]).encode()).decode()
            options["default_headers"] = {"Authorization": f"Basic {said}"}
        if url.scheme == "hf":
            name, commit = hub.split_revision(url.bucket)
            base = f"{hub.find_endpoint()}/{name}/resolve/{commit}/"
            options["default_headers"] = hub.make_headers()
        options["allow_http"] = base.startswith("http:")
        return store.HTTPStore.from_url(base, client_options=options, retry_config=retry)
    except PolyakError:
        raise
    except Exception as error:  # obstore has an exception for each kind of bad configuration
        first = redact(str(error)).partition("\n")[0]
        raise PolyakError(f"{url}: cannot be connected to: {shown(first)}") from None


def _connect_s3(bucket: str, options: Any, retry: Any) -> Any:
    """Return the store of an S3 bucket.

    obstore knows keys in the environment, web identities, containers and instances.  Profiles, and
    logins by SSO, are boto3's.
    """
    from obstore import store

    environment = os.environ
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL", "")
    options["allow_http"] = endpoint.startswith("http:")
    settings: Any = {"client_options": options, "retry_config": retry}
    if endpoint:
        settings |= {"endpoint": endpoint, "virtual_hosted_style_request": False}
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    by_profile = "AWS_PROFILE" in environment or (
        not _has_s3_credentials() and _has_shared_credentials()
    )
    if by_profile:
        try:
            import boto3
            from obstore.auth.boto3 import Boto3CredentialProvider
        except ImportError:
            raise MissingExtraError("a profile of ~/.aws", "s3") from None
        session = boto3.Session()
        # Asked before each request: botocore keeps credentials itself, and knows when they end.
        settings["credential_provider"] = Boto3CredentialProvider(session, ttl=timedelta(0))
        region = region or session.region_name
    if region:
        settings["region"] = region
    return store.S3Store(bucket, **settings)


def _has_s3_credentials() -> bool:
    """Return whether the environment says where obstore finds credentials of S3."""
    known = (
        "AWS_ACCESS_KEY_ID",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        "AWS_SKIP_SIGNATURE",
    )
    return any(os.environ.get(name) for name in known)


def _has_shared_credentials() -> bool:
    """Return whether there is a file of profiles."""
    named = os.environ.get("AWS_SHARED_CREDENTIALS_FILE"), os.environ.get("AWS_CONFIG_FILE")
    usual = (Path.home() / ".aws" / name for name in ("credentials", "config"))
    return any(Path(name).is_file() for name in named if name) or any(p.is_file() for p in usual)


# --- requests -------------------------------------------------------------------------------------


def _try(ask: Callable[[], Result], url: Url) -> Result:
    """Make a request, again after a pause where that may help.

    Raises:
        FormatError: there is no such object, or it was changed; the message lacks the URL.
        StoreError: it failed; the message has the URL.
    """
    for number in range(_TRIES):
        _counter.add(requests=1, retries=1 if number else 0)
        try:
            return ask()
        except PolyakError:
            raise
        except Exception as error:  # obstore's, which must not leave this module
            if number + 1 == _TRIES or _is_final(error):
                _explain(error, url)
        pause = min(_LONGEST_PAUSE, 0.1 * 2**number)
        time.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 (nothing is secret)
    raise AssertionError  # the last try returns or raises


def _is_final(error: Exception) -> bool:
    """Return whether another try would fail as well."""
    kind, text = type(error).__name__, str(error)
    known = {
        "FileNotFoundError",
        "NotFoundError",
        "PermissionDeniedError",
        "UnauthenticatedError",
        "PreconditionError",
        "NotModifiedError",
        "NotSupportedError",
        "InvalidPathError",
        "UnknownConfigurationKeyError",
        "MemoryError",
    }
    return (
        kind in known
        or bool(_FINAL.search(text))
        or "169.254.169.254" in text  # there is no such service: this is no instance of a cloud
        or "metadata.google.internal" in text
        or _is_whole(text)
    )


def _is_whole(text: str) -> bool:
    """Return whether a server has sent a whole object in place of a range."""
    said = ("non-partial", "NotPartial", "Range request not supported")
    return any(one in text for one in said)


def _explain(error: Exception, url: Url) -> NoReturn:
    """Raise what a failed request means to the user; see `_try`."""
    kind, text = type(error).__name__, str(error)
    where = urls.SCHEMES[url.scheme]
    if kind in ("FileNotFoundError", "NotFoundError"):
        raise FormatError("cannot be read: there is no such object (404)") from None
    if kind == "PreconditionError":
        raise ChangedError(CHANGED) from None
    odd = re.search(r'object with invalid path: .*?Path "(.*?)"(?: contained|: )', text, re.DOTALL)
    if odd:
        raise FormatError(f"holds the object '{shown(odd[1])}', {ODD_NAME}") from None
    status = re.search(r"status code: (\d+)([A-Za-z ]*)", text)
    code = re.search(r"<Code>(\w+)</Code>", text)
    what = f"{status[1]}{f', {code[1]}' if code else status[2]}" if status else kind
    if status and status[1] == "404":
        raise FormatError(f"cannot be read: there is no such bucket or object ({what})") from None
    often = "" if _is_final(error) else f"; tried {_TRIES} times"
    if _is_whole(text):
        reason = (
            "the server ignores ranges of bytes (it answers 200, not 206); copy the file to a "
            "folder, or use a server that supports Range"
        )
    elif "169.254.169.254" in text or "metadata.google.internal" in text:
        reason = f"no credentials are found; {describe_credentials(url.scheme)}"
    elif (
        kind in ("PermissionDeniedError", "UnauthenticatedError")
        or what[:3] in ("401", "403")
        or (code and code[1] in _EXPIRED)
    ):
        reason = f"access is denied ({what}); {describe_credentials(url.scheme)}"
    elif "error sending request" in text:
        reason = f"the server{_name_endpoint(url)} cannot be reached{often}"
    else:
        reason = f"{f'{where} answers {what}' if status else _shorten(text)}{often}"
    raise StoreError(f"{url}: cannot be read: {reason}") from None


def _name_endpoint(url: Url) -> str:
    """Return where a store was looked for, in front of which goes a space; no secret is in it."""
    named = {
        "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        "gs": ("STORAGE_EMULATOR_HOST",),
        "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
    }
    found = [os.environ[name] for name in named.get(url.scheme, ()) if os.environ.get(name)]
    if url.scheme == "hf":
        found = [hub.find_endpoint()]
    return f" {shown(re.sub('//[^/]*@', '//', redact(found[0])))}" if found else ""


def _shorten(text: str) -> str:
    """Return the reason in a message of obstore's, without its URL, headers and debug text."""
    first = redact(text.partition("\n\nDebug source")[0].partition("\n")[0])
    return shown(re.sub(r"Error performing \w+ \S+ in \S+ - ", "", first), 160)


def describe_credentials(scheme: str) -> str:
    """Return where credentials are looked for."""
    known = {
        "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE with polyak[s3]",
        "gs": "set GOOGLE_APPLICATION_CREDENTIALS",
        "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or another of "
        "AZURE_STORAGE_*",
        "hf": "set HF_TOKEN",
    }
    return f"{known.get(scheme, 'check the URL')}, or check that they may read it"


# --- listing --------------------------------------------------------------------------------------


def pin(url: Url) -> tuple[Url, int]:
    """Return the URL of what will be read: of a repository of the Hub, with its present commit.

    Returns:
        The URL, and the time in ns that its files have where each has none of its own.

    Raises:
        FormatError: there is no such repository or revision; the message lacks the URL.
    """
    if url.scheme != "hf":
        return url, 0
    check_environment(url.scheme)
    return _try(lambda: hub.pin(url), url)


def list_repository(url: Url, mtime_ns: int, most: int) -> list[Listed]:
    """Return the files of a pinned repository of the Hub; at most one more than ``most``.

    Raises:
        FormatError: they cannot be listed; the message lacks the URL.
    """

    def ask() -> list[Listed]:
        files = itertools.islice(hub.list_files(url), most + 1)
        return [Listed(one.path, one.size, mtime_ns, one.mark) for one in files]

    return _try(ask, url)


def list_below(url: Url, most: int) -> list[Listed]:
    """Return all objects below a prefix, which is a folder's; at most one more than ``most``.

    Raises:
        FormatError: there is no such bucket; the message lacks the URL.
        StoreError: it cannot be listed.
    """
    import obstore

    store = connect(url)

    def ask() -> list[Listed]:
        found: list[Listed] = []
        for page in obstore.list(store, url.key or None, chunk_size=1000):
            found += map(_read_meta, page)
            if len(found) > most:
                break
        return found

    return _try(ask, url)


def list_beside(url: Url) -> tuple[list[Listed], list[str]]:
    """Return the objects and the folders directly below a prefix.

    Raises:
        FormatError: there is no such bucket; the message lacks the URL.
        StoreError: it cannot be listed.
    """
    import obstore

    store = connect(url)

    def ask() -> tuple[list[Listed], list[str]]:
        found = obstore.list_with_delimiter(store, url.key or None)
        return [*map(_read_meta, found["objects"])], [*found["common_prefixes"]]

    return _try(ask, url)


def find(url: Url) -> Listed | None:
    """Return one object, None where there is none of that name.

    Raises:
        StoreError: the server does not say.
    """
    store = connect(url)
    try:
        found = _try(lambda: _describe(store, url), url)
    except FormatError as error:
        if "(404)" in str(error):
            return None
        raise
    return _read_meta(found)._replace(key=url.key)


def _describe(store: Any, url: Url) -> Any:
    """Return what a server says of an object."""
    import obstore

    key = _encode_key(url)
    if url.scheme in ("http", "https"):
        # The first byte and not a HEAD: of a presigned URL, the signature is that of a GET.
        try:
            return obstore.get(store, key, options={"range": (0, 1)}).meta
        except Exception as error:  # see `_try`
            if not _is_whole(str(error)) and "status code: 416" not in str(error):
                raise
        _counter.add(requests=1)  # of a file without bytes, or a server without ranges
    return obstore.head(store, key)


#: Buckets that were found to know conditions.
_conditional: set[Url] = set()


def require_conditions(url: Url, found: Iterable[Listed]) -> None:
    """Refuse a store that ignores If-Match: once, it is asked for a version that no object has.

    The ETag of every answer is compared too.  That it belongs to the bytes is only promised by a
    store that knows conditions: another one may look up the ETag, and then read bytes of an object
    that was replaced in between.  Of web servers no more than that comparison is expected.

    Args:
        url: in the store.
        found: objects that are there.

    Raises:
        StoreError: it sends another version than the one asked for.
    """
    import obstore

    one = next((one for one in found if one.size and one.mark), None)
    place = url._replace(key="")
    if not url.has_conditions or one is None or place in _conditional:
        return
    url = url._replace(key=one.key)
    store, nobody = connect(url), '"00000000000000000000000000000000"'
    options: Any = {"range": (0, 1), "if_match": nobody}
    try:
        _try(lambda: obstore.get(store, url.key, options=options), url)
    except PolyakError as error:  # as it should be; others come again with the reads that follow
        _conditional.update([place] if isinstance(error, ChangedError) else [])
        return
    raise StoreError(
        f"{url}: cannot be read: the server ignores conditions (it answers 200 or 206 to the "
        "If-Match of another version, not 412), so that objects which are replaced while they are "
        "read might go unnoticed; copy the checkpoints to a folder, or use a server that supports "
        "If-Match"
    )


def _read_meta(meta: Any) -> Listed:
    mark = meta["e_tag"] or ""
    if mark and not mark.endswith('"'):  # as Azure's listings have it; its other answers quote it
        mark = f'"{mark}"'
    return Listed(
        meta["path"],
        meta["size"],
        int(meta["last_modified"].timestamp() * 1e6) * 1000,
        mark,
    )


def _encode_key(url: Url) -> str:
    """Return the key of an object as obstore wants it: not encoded for a URL."""
    return unquote(url.key) if url.scheme in ("http", "https") else url.key


# --- reading --------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """Bytes of an object that are being fetched, or have been, into a buffer at least as long."""

    start: int
    stop: int
    buffer: memoryview
    content: Future[memoryview]


class ObjectInput:
    """One version of an object; see `storage.InputFile`.  Not for several threads at a time.

    What is fetched ahead is kept until it was read, and at most for the ranges of the last two
    calls of `prefetch`; nothing else is kept.
    """

    def __init__(self, url: Url, version: Version) -> None:
        self.url = url
        self.name = str(url)
        self.version = version
        self._store = connect(url)
        self._key = _encode_key(url)
        self._ahead: list[list[_Part]] = []

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.version.size

    def read_into(self, offset: int, buffer: Bytes) -> None:
        """See `storage.InputFile.read_into`."""
        if offset + len(buffer) > self.size:
            missing = offset + len(buffer) - self.size
            raise FormatError(f"the file ends {missing} bytes before the tensor does")
        target, done = memoryview(buffer.data).cast("B"), 0
        for piece in self.pieces(offset, len(buffer)):
            target[done : done + len(piece)] = piece
            done += len(piece)

    def read(self, offset: int, nbytes: int) -> bytes:
        """See `storage.InputFile.read`."""
        # Not joined from pieces: each is only there until the next one is asked for.
        content = np.empty(max(0, min(nbytes, self.size - offset)), np.uint8)
        if len(content):
            self.read_into(offset, content)
        return content.tobytes()

    def stream(self) -> BinaryIO:
        """See `storage.InputFile.stream`."""
        return io.BufferedReader(InputStream(self))

    def pieces(self, offset: int, nbytes: int) -> Iterator[memoryview]:
        """Yield bytes of the object in order, those that were fetched ahead first of all.

        A piece is overwritten after the next one was asked for.

        Raises:
            FormatError: the object is gone or changed; the message lacks the URL.
            StoreError: they cannot be read.
        """
        stop = offset + nbytes
        while offset < stop:
            part = self._find(offset)
            if part:
                content = part.content.result()
                end = min(stop, part.stop)
                yield content[offset - part.start : end - part.start]
                if end == part.stop:
                    self._ahead = [[p for p in parts if p is not part] for parts in self._ahead]
                    _buffers.give(part.buffer)
                offset = end
                continue
            later = [one.start for parts in self._ahead for one in parts if one.start > offset]
            end = min([stop, *later])
            for part in self._cut(offset, end, PART):
                yield part.content.result()
                _buffers.give(part.buffer)
            offset = end

    def prefetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """See `storage.InputFile.prefetch`; to be called once for all that is read next."""
        spans: list[list[int]] = []
        for start, nbytes in sorted(ranges):
            stop = min(start + nbytes, self.size)
            if spans and start - spans[-1][1] <= _GAP:
                spans[-1][1] = max(spans[-1][1], stop)
            elif stop > start:
                spans.append([start, stop])
        parts = [part for start, stop in spans for part in self._cut(start, stop, LARGE_PART)]
        for old in self._ahead[:-1]:
            for part in old:
                part.content.cancel()
        self._ahead = [*self._ahead[-1:], parts]

    def close(self) -> None:
        """See `storage.InputFile.close`."""
        for part in (one for parts in self._ahead for one in parts):
            part.content.cancel()
        self._ahead = []

    def __enter__(self) -> Self:
        """Return the open file."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def _find(self, offset: int) -> _Part | None:
        """Return the part that was fetched ahead and holds a byte."""
        for parts in self._ahead:
            for part in parts:
                if part.start <= offset < part.stop:
                    return part
        return None

    def _cut(self, start: int, stop: int, most: int) -> list[_Part]:
        """Begin to fetch a range in parts of about equal size."""
        count = -(-(stop - start) // most)
        bounds = [start + (stop - start) * k // count for k in range(count + 1)] if count else []
        parts = []
        for low, high in itertools.pairwise(bounds):
            buffer = _buffers.take(high - low)
            content = pool().submit(self._fetch_into, buffer[: high - low], low, high)
            parts.append(_Part(low, high, buffer, content))
        return parts

    def fetch(self, start: int, stop: int) -> memoryview:
        """Return bytes of exactly the version that was opened, from one GET.

        Raises:
            FormatError: the object is gone or changed; the message lacks the URL.
            StoreError: they cannot be read.
        """
        return self._fetch_into(_map(stop - start)[: stop - start], start, stop)

    def _fetch_into(self, buffer: memoryview, start: int, stop: int) -> memoryview:
        """Fill a buffer from one GET and return it; see `fetch`.

        Raises:
            FormatError: the object is gone or changed; the message lacks the URL.
            StoreError: they cannot be read.
        """
        import obstore

        version = self.version
        options: Any = {"range": (start, stop)}
        if (start, stop) == (0, self.size) and not self.url.has_conditions:
            options = {}  # for a whole file, a web server needs no ranges
        # A weak mark never equals If-Match, and a commit is a version already.
        if version.mark and not version.mark.startswith("W/") and self.url.scheme != "hf":
            options["if_match"] = version.mark

        def ask() -> memoryview:
            reply = obstore.get(self._store, self._key, options=options)
            self._check(_read_meta(reply.meta))
            done = 0
            # Piece by piece, as obstore would hold the pieces and what it joins of them.
            for piece in reply.stream(min_chunk_size=_PIECE):
                if done + len(piece) <= len(buffer):
                    buffer[done : done + len(piece)] = memoryview(piece)
                done += len(piece)
            if done != len(buffer):
                raise OSError(f"{done} bytes instead of {len(buffer)}")
            _counter.add(nbytes=done)
            return buffer

        with _large if stop - start > _LARGE else contextlib.nullcontext():
            return _try(ask, self.url)

    def _check(self, found: Listed) -> None:
        """Refuse another version, which a server sends that knows no If-Match."""
        version = self.version
        if self.url.scheme == "hf":
            found = found._replace(mark=version.mark)
        if found.mark != version.mark or found.size != version.size:
            raise ChangedError(CHANGED)
        # A listing knows fractions of a second, and the header of an answer does not.
        if not version.mark and abs(found.mtime_ns - version.mtime_ns) >= 10**9:
            raise ChangedError(CHANGED)


class ObjectStore:
    """The objects that URLs name; see `storage.Store`.  Only for processes that do not fork."""

    def open(self, key: str, version: Version | None = None) -> ObjectInput:
        """See `storage.Store.open`; a version that is given is not looked for, but demanded."""
        url = urls.parse(key)
        if url is None:
            raise FormatError(f"{shown(key)}: is not a URL")
        try:
            if version is None:
                found = find(url)
                if found is None:
                    raise FormatError("cannot be read: there is no such object (404)")
                version = found.version
            return ObjectInput(url, version)
        except FormatError as error:
            raise type(error)(f"{url}: {error}") from None
