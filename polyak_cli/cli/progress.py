"""The bar of progress on a terminal; knows nothing of what is being done."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def show_progress(
    what: str, total: int | None, silent: bool, *, in_bytes: bool = True
) -> Iterator[Callable[..., None]]:
    """Show a bar with amount, speed and time left on a terminal; nothing elsewhere.

    What it yields takes the amount done, and the total where that was not known before.
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
    bar = bars.Progress(
        bars.TextColumn(what),
        bars.BarColumn(),
        *amount,
        bars.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        # No thread of its own: children are forked before the first byte is read.
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
