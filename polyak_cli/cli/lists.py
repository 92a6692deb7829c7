"""Read names of files from standard input, where ``-`` is given in the place of a name.

Knows how lists are written.  Opens none of the files, and does not know what they are for.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator

import click

from polyak_cli.errors import CheckpointError, UsageError, shown, word_size

#: What is given for a list.
DASH = "-"
#: Bytes of a whole list, and of one name: Linux accepts no longer path.
_MOST, _LONGEST = 64_000_000, 4096
_WHERE = "the list on standard input"


def expand_lists(
    _context: click.Context, _parameter: click.Parameter, names: tuple[str, ...]
) -> tuple[str, ...]:
    """Replace ``-`` by the names on standard input; a callback of parameters.

    Names are separated by NUL if there is a NUL in the list, else by newlines, and stay as they
    are: no quotes, no patterns, no ``-`` within the list.

    Raises:
        UsageError: ``-`` is given twice, or standard input is a terminal.
        CheckpointError: the list is empty or too long, or no list of names.
    """
    if DASH not in names:
        return names
    if names.count(DASH) > 1:
        raise UsageError("- is given twice, but standard input can be read only once")
    stream = sys.stdin.buffer
    if stream.isatty():
        raise UsageError(
            "- reads names of files from standard input, which is a terminal; pipe a list into the "
            "command, as in: find ckpts -name '*.h5' | polyak check -"
        )
    # A bound, because /dev/zero and a model of 40 GB may be given by mistake.
    content = stream.read(_MOST + 1)
    if len(content) > _MOST:
        raise CheckpointError(
            f"{_WHERE} is longer than {word_size(_MOST)}; expected names of files, one a line or "
            "separated by NUL"
        )
    place = names.index(DASH)
    return (*names[:place], *_parse_list(content), *names[place + 1 :])


def _parse_list(content: bytes) -> Iterator[str]:
    """Yield the names in a list; empty lines are skipped."""
    separator, what = (b"\0", "entry") if b"\0" in content else (b"\n", "line")
    empty = True
    for number, name in enumerate(content.split(separator), 1):
        if not name:
            continue
        empty = False
        if len(name) > _LONGEST:
            raise CheckpointError(
                f"{_WHERE}: {what} {number} has {len(name):,} bytes; expected names of files, of "
                f"at most {_LONGEST} bytes, one a line or separated by NUL"
            )
        decoded = os.fsdecode(name)
        # Elsewhere such a name is a pattern; a file that is gone must not bring others in.
        if glob.has_magic(decoded) and not os.path.lexists(decoded):
            raise CheckpointError(
                f"{_WHERE}: {what} {number} is {shown(decoded)}, and there is no such file; a list "
                "holds names, not patterns"
            )
        yield decoded
    if empty:
        raise CheckpointError(
            f"{_WHERE} names no file; expected one name a line, or names separated by NUL"
        )
