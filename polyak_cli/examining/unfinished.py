"""The tool of `polyak uploads`: what runs of polyak left unfinished in a store of objects.

Finds nothing of other programs.  `storage.uploads` knows how it is recognised, and when a run
counts as dead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from polyak_cli.errors import UsageError, name_path
from polyak_cli.storage import mirrors
from polyak_cli.storage.uploads import Orphan


@dataclass(frozen=True, slots=True)
class Unfinished:
    """One upload of polyak that is not complete.

    Attributes:
        url: the object that it would become.
        begun: when it was begun.
        idle: seconds since its run last gave a sign of life.
        nbytes: what it occupies in the store, and costs.
        is_dead: its run has ended without completing it.
        is_aborted: it was deleted.
    """

    url: str
    begun: datetime
    idle: float
    nbytes: int
    is_dead: bool
    is_aborted: bool = False

    def data(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return {
            "url": self.url,
            "begun": self.begun.isoformat(timespec="seconds"),
            "idle": self.idle,
            "size": self.nbytes,
            "dead": self.is_dead,
            "aborted": self.is_aborted,
        }


def uploads(
    url: str, *, abort: bool = False, idle_minutes: float | None = None
) -> list[Unfinished]:
    """Find the unfinished uploads of polyak to names that begin with a URL.

    Args:
        url: s3://, gs:// or az://, with a bucket at least.
        abort: delete those of dead runs.
        idle_minutes: a run counts as dead when it gave no sign of life for so long; 15 where a
            store shows signs of life (S3), and a day elsewhere, if it is not given.

    Raises:
        UsageError: the minutes are negative.
        PolyakError: the store cannot be asked, or refuses.
    """
    if idle_minutes is not None and not idle_minutes >= 0:
        raise UsageError(f"--idle {idle_minutes:g}: expected minutes, 0 or more")
    found = []
    for orphan in mirrors.find_orphans(url):
        one = _describe(orphan)
        if idle_minutes is not None:
            one = replace(one, is_dead=one.idle >= 60 * idle_minutes)
        if abort and one.is_dead:
            mirrors.abort_orphan(orphan)
            one = replace(one, is_aborted=True)
        found.append(one)
    return found


def _describe(orphan: Orphan) -> Unfinished:
    begun = datetime.fromtimestamp(orphan.begun, UTC)
    return Unfinished(name_path(orphan.url), begun, orphan.idle, orphan.nbytes, orphan.is_dead)
