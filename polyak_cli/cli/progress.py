"""Show a progress bar on a terminal.  Does not know what the progress is of."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Columns of a terminal below which the bar leaves out what is not needed.
_NARROW = 60


@contextmanager
def show_progress(
    what: str, total: int | None, silent: bool, *, in_bytes: bool = True
) -> Iterator[Callable[..., None]]:
    """Show a bar with amount, speed and time left, if stderr is a terminal.

    Yields:
        A function to call with the amount done since the last call, and with the total if it was
        not known before.
    """
    if silent or not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich import progress as bars
    from rich.console import Console

    amount: list[bars.ProgressColumn] = (
        [bars.DownloadColumn(), bars.TransferSpeedColumn()]
        if in_bytes
        else [bars.MofNCompleteColumn()]
    )
    console = Console(stderr=True)
    if console.width < _NARROW:  # one line, without speed and time left
        columns = [bars.TextColumn(what), bars.BarColumn(), amount[0]]
    else:
        columns = [bars.TextColumn(what), bars.BarColumn(), *amount, bars.TimeRemainingColumn()]
    bar = bars.Progress(
        *columns,
        console=console,
        transient=True,
        # No thread that redraws: children are forked later, and threads make that unsafe.
        auto_refresh=False,
    )
    with bar:
        task = bar.add_task("", total=total)
        drawn = 0.0

        def advance(amount: int, total: int | None = None) -> None:
            nonlocal drawn
            bar.update(task, advance=amount, total=total)
            if bar.get_time() - drawn > 0.1:  # seconds; drawing is slow beside folding
                drawn = bar.get_time()
                bar.refresh()

        yield advance
