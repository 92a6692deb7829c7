"""Lay out tables and sentences for a terminal of any width, or plainly for a pipe.

Knows columns and widths.  Does not know what a table is about.
"""

from __future__ import annotations

import contextlib
import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TextIO

#: A name that must be cut keeps at least as many characters, and as many where it is cut at last.
_LONG_ENOUGH, _SHORTEST = 28, 12
#: Rows above which a table is laid out without rich, which takes a millisecond for a few rows.
_MANY = 500


_QUANTITY = re.compile(r"(\d) (bytes|kB|MB|GB|TB|s|%)(?![^ ,;.:)/])")


@dataclass(frozen=True, slots=True)
class Table:
    """A table for people.

    Attributes:
        header: the columns' titles.
        rows: the cells; the first of each row is a name, which may be shortened in the middle.
        spare: titles of columns that a narrow terminal can do without, the first to go first.
        left: titles of columns of words, which stand at the left; others are right-aligned.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    spare: Sequence[str] = ()
    left: Sequence[str] = ("",)


class Verbatim(str):
    """A line that is pasted, such as a command; no terminal is so narrow that it is broken."""

    __slots__ = ()


def lay_out(items: Iterable[str | Table], stream: TextIO) -> Iterator[str]:
    """Yield the lines of sentences and tables, as wide as the terminal allows.

    A stream that is no terminal gets every column and every name whole, and sentences unbroken, so
    that a script finds each thing on one line whatever the width.
    """
    if not stream.isatty():
        for item in items:
            yield from _write_plainly(item) if isinstance(item, Table) else (item,)
        return
    width = find_width(stream)
    for item in items:
        if isinstance(item, Table):
            yield from _draw(item, width, stream)
        else:
            yield from [item] if isinstance(item, Verbatim) else wrap(item, width)


def find_width(stream: TextIO) -> int:
    """Return the columns of the terminal behind a stream, or what COLUMNS says."""
    said = os.environ.get("COLUMNS", "")
    columns = int(said) if said.isascii() and said.isdigit() else 0
    if not columns:
        with contextlib.suppress(OSError):
            columns = os.get_terminal_size(stream.fileno()).columns
    return max(columns or 80, 20)


def wrap(line: str, width: int) -> list[str]:
    """Break a sentence between words; a word that is longer than the width stays whole."""
    # textwrap does not break at the no-break spaces, which keep numbers and units together.
    held = _QUANTITY.sub("\\1\N{NO-BREAK SPACE}\\2", line)
    found = textwrap.wrap(
        held, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return [part.replace("\N{NO-BREAK SPACE}", " ") for part in found] or [line]


def _write_plainly(table: Table) -> Iterator[str]:
    """Yield a table in columns of characters."""
    widths = _measure(table)
    left = _find_left(table)
    for row in (table.header, *table.rows):
        cells = (
            cell.ljust(width) if k in left else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield ("  " + "  ".join(cells)).rstrip()


def _draw(table: Table, width: int, stream: TextIO) -> Iterator[str]:
    """Yield a table that fits a terminal, and the titles of the columns that it does not show."""
    if not table.header[-1] and not any(row[-1] for row in table.rows):
        table = _drop_column(table, "")  # of words where something is amiss
    fitted = fit(table, width)
    if len(fitted.rows) > _MANY:
        yield from _write_plainly(fitted)
    else:
        yield from _draw_with_rich(fitted, width, stream)
    missing = [title for title in table.header if title not in fitted.header]
    if missing:
        yield from wrap(f"not shown at this width: {', '.join(missing)}", width)


def _draw_with_rich(table: Table, width: int, stream: TextIO) -> Iterator[str]:
    from rich import box
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table as Drawn
    from rich.text import Text

    drawn = Drawn(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), highlight=False
    )
    left = _find_left(table)
    for k, title in enumerate(table.header):
        # Two long names can be equal where a narrow terminal cuts them, so they are folded.
        drawn.add_column(
            Text(title), justify="left" if k in left else "right", overflow="fold", no_wrap=k > 0
        )
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    console = Console(file=stream, width=width)
    with console.capture() as capture:
        console.print(Padding(drawn, (0, 0, 0, 2)))
    yield from (line.rstrip() for line in capture.get().splitlines())


def fit(table: Table, width: int) -> Table:
    """Return a table that is no wider than ``width``, by short names and fewer columns.

    Numbers are never cut.  Where not even the names and one column fit, the table stays too wide.
    """
    for shortest in (_LONG_ENOUGH, _SHORTEST):
        kept = table
        while True:
            room = width - 2 - sum(size + 2 for size in _measure(kept)[1:])
            cut = _shorten_names([row[0] for row in kept.rows], max(room, shortest))
            if cut and max(map(len, [*cut, kept.header[0]]), default=0) <= room:
                rows = [(name, *row[1:]) for name, row in zip(cut, kept.rows, strict=True)]
                return replace(kept, rows=rows)
            going = next((title for title in table.spare if title in kept.header[1:]), None)
            if going is None or not table.rows:
                break
            kept = _drop_column(kept, going)
    return kept


def _shorten_names(names: Sequence[str], room: int) -> list[str]:
    """Return names of at most ``room`` characters; the whole names if some became equal."""
    for share in (2 / 3, 1, 1 / 3):
        cut = {name: shorten(name, room, share) for name in names}
        if len({*cut.values()}) == len(cut):
            return [cut[name] for name in names]
    return _show_differences(names, room)


def _show_differences(names: Sequence[str], room: int) -> list[str]:
    """Return the parts in which names differ, with what fits around; else the whole names."""
    begin = _count_common(names)
    end = _count_common([name[begin:][::-1] for name in names])
    longest = max(len(name) - end - begin for name in names)
    before = room - 6 - longest  # as much of what they begin with as there is room for
    if before < 0:
        return [*names]
    start = max(0, begin - before)
    cut = [f"...{name[start : start + room - 6]}..." for name in names]
    return cut if len({*cut}) == len({*names}) else [*names]


def _count_common(texts: Sequence[str]) -> int:
    """Return with how many equal characters texts begin."""
    columns = enumerate(zip(*texts, strict=False))
    shortest = min(map(len, texts))
    return next((k for k, letters in columns if len({*letters}) > 1), shortest)


def shorten(name: str, room: int, share: float = 2 / 3) -> str:
    """Return a name of at most ``room`` characters, whose middle is left out.

    Args:
        name: files and tensors of one model begin alike, and mostly differ at the end.
        room: at least 4.
        share: how much of the room its end gets; the rest is for the beginning.
    """
    if len(name) <= room:
        return name
    tail = round((room - 3) * share)
    return f"{name[: room - 3 - tail]}...{name[len(name) - tail :]}"


def _drop_column(table: Table, title: str) -> Table:
    k = list(table.header).index(title, 1)  # not the names
    header, *rows = [[*row[:k], *row[k + 1 :]] for row in (table.header, *table.rows)]
    return replace(table, header=header, rows=rows)


def _measure(table: Table) -> list[int]:
    return [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]


def _find_left(table: Table) -> set[int]:
    return {0, *(k for k, title in enumerate(table.header) if title in table.left)}
