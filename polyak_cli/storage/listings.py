"""Which objects of a store a URL names, of those that can become files below one folder.

The network client is imported when the gateway's process asks, and in no other.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

from polyak_cli.errors import FormatError, StoreError, shown
from polyak_cli.storage import urls

#: Objects below one prefix; more are hardly one run.
MOST = 100_000


def list_named(url: urls.Url) -> tuple[urls.Url, list[Any], Callable[[str], bool]]:
    """Return the objects that a URL names: itself with its neighbours, or those below it.

    A file may belong to others beside it, such as an index to its shards, so these are listed too.

    Returns:
        The URL, whose revision has become a commit, the objects, and a function that tells whether
        a key would be among them.
    """
    from polyak_cli.storage import objects

    if url.scheme == "hf":
        url, mtime_ns = objects.pin(url)
        found = objects.list_repository(url, mtime_ns, MOST)
        return url, _refuse_unusual(_refuse_many(found)), lambda _: True
    if not url.has_listing:
        one = objects.find(url)
        return url, [one] if one else [], lambda key: key == url.key
    magic = min([url.key.find(c) for c in "*?[" if c in url.key], default=len(url.key))
    folder, _, name = url.key[:magic].rpartition("/")
    below = f"{folder}/" if folder else ""
    if magic < len(url.key) or not name:
        found = objects.list_below(url._replace(key=folder), MOST)
        return url, _refuse_unusual(_refuse_many(found)), lambda key: key.startswith(below)
    found, folders = _list_around(url, folder)
    if url.key in folders:
        found += objects.list_below(url, MOST)
    return (
        url,
        _refuse_unusual(_refuse_many(found)),
        lambda key: key.startswith(f"{url.key}/") or key.rpartition("/")[0] == folder,
    )


def _refuse_many(found: list[Any]) -> list[Any]:
    if len(found) > MOST:
        raise FormatError(f"holds more than {MOST:,} objects; name a folder with fewer")
    return found


def _list_around(url: urls.Url, folder: str) -> tuple[list[Any], list[str]]:
    """List the folder of a name; where that is not allowed, the name must be an object."""
    from polyak_cli.storage import objects

    try:
        return objects.list_beside(url._replace(key=folder))
    except (FormatError, StoreError):
        with contextlib.suppress(FormatError, StoreError):
            one = objects.find(url)
            if one:
                return [one], []
        raise


def _refuse_unusual(found: Sequence[Any]) -> list[Any]:
    """Refuse keys that no path can have; leave out the empty objects by which folders are kept."""
    from polyak_cli.storage.objects import ODD_NAME

    unique = {one.key: one for one in found}
    folders = {key[:k] for key in unique for k, c in enumerate(key) if c == "/"}
    kept = []
    for key, one in unique.items():
        parts = key.split("/")
        if key in folders:
            if one.size:
                raise FormatError(
                    f"holds the object '{shown(key)}' and others below '{shown(key)}/', which "
                    "files cannot; copy the checkpoints to another prefix"
                )
            continue
        if {"", ".", ".."} & {*parts} or max(len(os.fsencode(part)) for part in parts) > 255:
            raise FormatError(f"holds the object '{shown(key)}', {ODD_NAME}")
        kept.append(one)
    return kept
