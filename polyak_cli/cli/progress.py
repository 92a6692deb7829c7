"""Show a progress bar on a terminal.  Does not know what the progress is of."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from polyak_cli.errors import word_size

if TYPE_CHECKING:
    from rich.progress import Task

#: Columns of a terminal below which the bar takes what the words leave, instead of its usual 40.
_NARROW = 100
#: Seconds between two drawings, which are slow beside the work.
_PAUSE = 0.1
#: Draws the amount done and the total, None while unknown, with words about the task.
_Draw = Callable[[float, "float | None", "Callable[[Task], str]"], None]


@contextmanager
def show_bytes(what: str, total: int, silent: bool) -> Iterator[Callable[[int], None] | None]:
    """Show a bar of bytes with their speed and the time left, if stderr is a terminal.

    Args:
        what: what is done, such as "averaging".
        total: all bytes.
        silent: show nothing.

    Yields:
        A function to call with the bytes done since the last call; None if nothing is shown.
    """
    if _is_hidden(silent):
        yield None
        return
    done = 0

    def word(task: Task) -> str:
        # By the bytes of the last seconds: those of a run are read at one speed.
        speed = f", {word_size(task.speed)}/s" if task.speed else ""
        return f"{word_size(done)} of {word_size(total)}{speed}{_word_left(task)}"

    with _open_bar(what, period=30) as draw:

        def advance(amount: int) -> None:
            nonlocal done
            done += amount
            draw(done, total, word)

        yield advance


@contextmanager
def show_count(what: str, noun: str, silent: bool) -> Iterator[Callable[[float, int], None] | None]:
    """Show a bar such as "model 3 of 14, 12 s left", if stderr is a terminal.

    The time left is by the mean of all that is done, as the first models of a sweep may be the
    fastest.  Until the first of several is done, there is nothing to tell it by.

    Args:
        what: what is done, such as "scoring".
        noun: what is counted, such as "model".
        silent: show nothing.

    Yields:
        A function to call with the number done, of the last one the share of it, and with the
        number of all; None if nothing is shown.
    """
    if _is_hidden(silent):
        yield None
        return
    with _open_bar(what, period=math.inf) as draw:

        def count(done: float, total: int) -> None:
            words = f"{noun} {min(int(done) + 1, total)} of {total}"
            is_known = done >= 1 or total == 1
            draw(done, total, lambda task: words + (_word_left(task) if is_known else ""))

        yield count


def read_clock() -> float:
    """Return seconds that only grow; by these, bars are drawn and the time left is estimated."""
    return time.monotonic()


def _is_hidden(silent: bool) -> bool:
    return silent or not sys.stderr.isatty()


@contextmanager
def _open_bar(what: str, period: float) -> Iterator[_Draw]:
    """Show a bar; its speed is measured by the last seconds of the period."""
    from rich import progress as bars
    from rich.console import Console

    console = Console(stderr=True)
    # Two columns stay free for "^C", which terminals echo: in the next line it would keep this one.
    console.width -= 2
    bar = bars.Progress(
        bars.TextColumn(what),
        bars.BarColumn(None if console.width < _NARROW else 40),
        bars.TextColumn("{task.fields[words]}"),
        console=console,
        transient=True,
        # No thread that redraws: children are forked later, and threads make that unsafe.
        auto_refresh=False,
        speed_estimate_period=period,
        get_time=read_clock,
    )
    with bar:
        key = bar.add_task("", total=None, words="")
        drawn = -math.inf

        def draw(done: float, total: float | None, word: Callable[[Task], str]) -> None:
            nonlocal drawn
            bar.update(key, completed=done, total=total)
            now = read_clock()
            if now - drawn > _PAUSE:
                drawn = now
                bar.update(key, words=word(bar.tasks[0]), refresh=True)

        yield draw


def _word_left(task: Task) -> str:
    """Return the time left, rounded up: ", 12 s left"; "" if it is not known, or none is left."""
    seconds = task.time_remaining
    if not seconds:
        return ""
    for size, unit in ((1, "s"), (60, "min")):
        if seconds <= 99 * size:
            return f", {math.ceil(seconds / size)} {unit} left"
    return f", {math.ceil(seconds / 3600)} h left"
