"""What a URL is: its scheme, the bucket or host, and the key; never a path.

`Path` would make ``s3:/bucket`` of ``s3://bucket``, so that URLs stay texts until they are parsed
here.  Knows no network.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import unquote

from polyak_cli.errors import UsageError, redact, shown

#: Scheme -> what it is, for messages.
SCHEMES = {
    "s3": "S3",
    "gs": "Google Cloud Storage",
    "az": "Azure",
    "https": "a web server",
    "http": "a web server",
    "hf": "the Hugging Face Hub",
}
#: Those whose objects can be written, under conditions.
BUCKETS = ("s3", "gs", "az")
#: How a URL begins.  A pathlib.Path has lost a slash already.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(//?)")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Url(NamedTuple):
    """One URL.

    Attributes:
        scheme: a key of `SCHEMES`.
        bucket: the bucket, the container, or the host and port of a web server.
        key: the rest, without a slash in front.
        user: user and password of a web server, with ``@``; a secret.
        query: the signature and the like of a web server, with ``?``; a secret.
    """

    scheme: str
    bucket: str
    key: str
    user: str = ""
    query: str = ""

    def __str__(self) -> str:
        """Return the URL without its secrets."""
        return f"{self.scheme}://{self.bucket}/{self.key}"

    @property
    def whole(self) -> str:
        """The URL with its secrets."""
        return f"{self.scheme}://{self.user}{self.bucket}/{self.key}{self.query}"

    @property
    def has_conditions(self) -> bool:
        """Whether its server can be relied on to honour ranges and conditions."""
        return self.scheme in BUCKETS

    @property
    def has_listing(self) -> bool:
        """Whether the names below it can be listed."""
        return self.scheme not in ("http", "https")


def parse(text: str) -> Url | None:
    """Return the parts of a URL, or None for the name of a file.

    Raises:
        UsageError: it is a URL of a scheme that is not supported, or names no bucket.
    """
    found = _URL.match(text)
    if not found or len(found[2]) < 2:
        return None
    scheme = found[1].lower()
    if scheme not in SCHEMES:
        raise UsageError(
            f"{shown(text)}: {shown(scheme)}:// is not supported; expected a path or one of "
            f"{', '.join(f'{one}://' for one in SCHEMES)}"
        )
    rest, query, user = text[found.end() :], "", ""
    if scheme in ("http", "https"):
        rest, _, query = rest.partition("?")
        query = f"?{query}" if query else ""
    bucket, _, key = rest.partition("/")
    if "@" in bucket and scheme in ("http", "https"):
        user, _, bucket = bucket.rpartition("@")
        user += "@"
    if scheme == "hf":
        owner, (name, _, key) = bucket, key.partition("/")
        bucket = f"{owner}/{name}"
        if not owner or not name:
            raise UsageError(f"{shown(text)}: expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    elif not scheme.startswith("http") and redact(text) != text:
        raise UsageError(
            f"{shown(text)}: {scheme}:// takes no password and no signature in the URL; set the "
            "variables of the service, or name the https:// address that was signed"
        )
    if not bucket or set(bucket) & set("*?[\\\0"):
        raise UsageError(f"{shown(text)}: expected the name of a bucket after {scheme}://")
    _check_key(unquote(key) if scheme.startswith("http") else key, text)
    if scheme.startswith("http") and "%2f" in key.lower():
        raise UsageError(f"{shown(text)}: expected a path without %2F, which is sent as a slash")
    return Url(scheme, bucket, key, user, query)


def _check_key(key: str, text: str) -> None:
    """Refuse keys that the network client, or a path, would make other names of."""
    parts = key.removesuffix("/").split("/")
    if {".", ".."} & {*parts} or ("" in parts and parts != [""]) or _CONTROL.search(key):
        raise UsageError(
            f"{shown(text)}: expected a key without empty parts ('//'), '.', '..' and control "
            "characters; copy the object to another name"
        )
