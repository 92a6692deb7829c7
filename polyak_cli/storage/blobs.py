"""Uploads to Google's and Azure's stores: whole objects, written by one process through obstore.

An object is sent under a hidden name beside its own, ``.NAME.polyak-TOKEN.partial``, and then
copied to its name within the store, which can refuse to replace what is there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from polyak_cli.errors import OutputError, shown
from polyak_cli.storage.urls import Url

#: Bytes of the parts in which obstore sends an object, and how many it has under way.
CHUNK = 8 << 20
CONCURRENCY = 4
#: How often a request is repeated, with pauses that grow.
_RETRIES = 6
_MIDDLE, _SUFFIX = ".polyak-", ".partial"


class Left(NamedTuple):
    """An object of polyak under a hidden name."""

    key: str
    final: str  # the key that it would have got
    begun: float  # seconds since 1970, by the server's clock
    nbytes: int


def hide(url: Url, token: str) -> Url:
    """Return the hidden name of an object."""
    folder, slash, base = url.key.rpartition("/")
    return url._replace(key=f"{folder}{slash}.{base}{_MIDDLE}{token}{_SUFFIX}")


def _connect(url: Url) -> Any:
    """Return the process's store of a bucket, which its threads share."""
    from polyak_cli.storage.objects import connect

    return connect(url, retries=_RETRIES)


@contextlib.contextmanager
def _explaining(url: Url) -> Iterator[Any]:
    """Yield the store, and raise obstore's errors as `OutputError`s.

    Their texts are never shown: they contain whole requests, which may be signed.
    """
    store = _connect(url)
    from obstore import exceptions

    try:
        yield store
    except exceptions.AlreadyExistsError:
        raise OutputError(f"{shown(url)}: already exists; use --force to replace it") from None
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError):
        raise OutputError(
            f"{shown(url)}: may not be written with these credentials; renew them, or ask for the "
            "permission"
        ) from None
    except FileNotFoundError:
        raise OutputError(
            f"{shown(url)}: there is no '{shown(url.bucket)}'; create it first"
        ) from None
    except exceptions.BaseError as error:
        raise OutputError(
            f"{shown(url)}: cannot be written ({type(error).__name__}); check the network, "
            "and try again"
        ) from None


def send(url: Url, pieces: Iterator[bytes]) -> None:
    """Write an object; an exception of ``pieces`` passes through, and nothing is written."""
    with _explaining(url) as store:
        import obstore

        obstore.put(store, url.key, pieces, chunk_size=CHUNK, max_concurrency=CONCURRENCY)


def find(url: Url) -> int | None:
    """Return the size of an object, or None if there is none."""
    with _explaining(url) as store:
        import obstore

        try:
            return int(obstore.head(store, url.key)["size"])
        except FileNotFoundError:
            return None


def name(hidden: Url, final: Url, *, force: bool) -> None:
    """Copy an object to its name within the store.

    Raises:
        OutputError: the name is taken and ``force`` is not given, among others.
    """
    with _explaining(final) as store:
        import obstore

        obstore.copy(store, hidden.key, final.key, overwrite=force)


def delete(url: Url) -> None:
    """Delete an object; one that is gone is no error."""
    with _explaining(url) as store, contextlib.suppress(FileNotFoundError):
        import obstore

        obstore.delete(store, url.key)


def list_left(url: Url) -> Iterator[Left]:
    """Yield the hidden objects of polyak for names that begin with a URL's key."""
    folder = url.key.rpartition("/")[0]
    with _explaining(url) as store:
        import obstore

        for batch in obstore.list(store, folder or None):
            for one in batch:
                place, _, base = one["path"].rpartition("/")
                final, middle, _ = base.removeprefix(".").rpartition(_MIDDLE)
                final = f"{place}{'/' if place else ''}{final}"
                is_hidden = base.startswith(".") and base.endswith(_SUFFIX) and middle
                if is_hidden and final.startswith(url.key):
                    yield Left(one["path"], final, one["last_modified"].timestamp(), one["size"])
