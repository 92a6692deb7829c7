"""Repositories of the Hugging Face Hub: a revision becomes a commit, whose files are listed.

Files are read as those of any web server (see `objects`).  A commit never changes, so that it is
the version of each of its files.
"""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from polyak_cli.errors import FormatError
from polyak_cli.storage.urls import Url

#: Seconds to wait for an answer about a repository.
_TIMEOUT = 30
_NEXT = re.compile(r'<([^>]+)>; *rel="next"')
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubFile(NamedTuple):
    """One file of a commit."""

    path: str
    size: int
    mark: str  # the digest of its content


def find_endpoint() -> str:
    """Return the address of the Hub: HF_ENDPOINT, or the public one."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def make_headers() -> dict[str, str]:
    """Return what a request needs of the user's token, which is where the Hub's own library looks.

    That is HF_TOKEN, or the file that `hf auth login` writes.
    """
    token = os.environ.get("HF_TOKEN", "").strip()  # as the Hub's own library does
    if not token:
        home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
        path = Path(os.environ.get("HF_TOKEN_PATH") or f"{home}/token").expanduser()
        try:
            token = path.read_text().strip()
        except OSError:
            return {}
    return {"Authorization": f"Bearer {token}"} if token else {}


def split_revision(bucket: str) -> tuple[str, str]:
    """Return the name of a repository, and its revision, "main" if there is none."""
    name, _, revision = bucket.partition("@")
    return name, revision or "main"


def pin(url: Url) -> tuple[Url, int]:
    """Return a URL with the commit in place of its revision, and the commit's time in ns.

    Raises:
        OSError: the Hub does not answer, or answers with an error.
        FormatError: its answer is not understood; the message lacks the URL.
    """
    name, revision = split_revision(url.bucket)
    # A branch may have a slash, which is written as %2F in a URL of the Hub.
    about, _ = _ask(f"{find_endpoint()}/api/models/{name}/revision/{quote(revision, safe='%')}")
    commit = about.get("sha") if isinstance(about, dict) else None
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise FormatError("cannot be read: the Hub names no commit for this revision")
    return url._replace(bucket=f"{name}@{commit}"), _read_time(about.get("lastModified"))


def _read_time(text: object) -> int:
    try:
        return int(datetime.fromisoformat(str(text)).timestamp() * 1e6) * 1000
    except ValueError:
        return 0


def list_files(url: Url) -> Iterator[HubFile]:
    """Yield the files of a pinned repository.

    Raises:
        OSError: the Hub does not answer, or answers with an error.
        FormatError: its answer is not understood; the message lacks the URL.
    """
    name, commit = split_revision(url.bucket)
    address = f"{find_endpoint()}/api/models/{name}/tree/{commit}?recursive=true"
    while address:
        found, links = _ask(address)
        if not isinstance(found, list):
            raise FormatError("cannot be read: the Hub lists no files")
        for one in found:
            if not isinstance(one, dict) or one.get("type") != "file":
                continue
            large = one["lfs"] if isinstance(one.get("lfs"), dict) else one
            path, size, mark = one.get("path"), one.get("size"), large.get("oid")
            if not isinstance(path, str) or not isinstance(size, int) or size < 0:
                raise FormatError("cannot be read: the Hub lists a file without a name or size")
            yield HubFile(path, size, str(mark))
        further = _NEXT.search(links)
        address = further[1] if further else ""


def _ask(address: str) -> tuple[Any, str]:
    """Return the JSON and the links of an answer of the Hub."""
    if not address.startswith(f"{find_endpoint()}/"):  # the token is for the Hub alone
        raise FormatError("cannot be read: the Hub's list goes on at another server")
    headers: Mapping[str, str] = make_headers()
    request = urllib.request.Request(address, headers=dict(headers))  # noqa: S310 (see above)
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:  # noqa: S310 (the same)
            content, links = answer.read(), answer.headers.get("Link", "")
    except urllib.error.HTTPError as error:
        # Worded as `objects` expects it, which decides whether another try may help.
        raise OSError(f"status code: {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise OSError(f"error sending request: {error.reason}") from None
    try:
        return json.loads(content), links
    except ValueError:
        raise FormatError("cannot be read: the Hub's answer is no JSON") from None
