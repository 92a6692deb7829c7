"""Read the metric that checkpoints keep in themselves, as timm's do, through `formats`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from polyak_cli import formats
from polyak_cli.checkpoints.directions import guess_mode
from polyak_cli.checkpoints.listing import find_file
from polyak_cli.checkpoints.trainer_states import Measured
from polyak_cli.errors import CheckpointError, FormatError, UsageError, shown

#: What timm calls the metric, whatever it is.
_KEY = "metric"


def has_metric(path: Path, monitor: str | None) -> bool:
    """Return whether a checkpoint keeps a metric of itself, and that is what the user wants."""
    try:
        (found,) = formats.read_metrics([find_file(path)])
    except FormatError:  # reading it for the average says why
        return False
    return found is not None and monitor in (None, _KEY, found[0])


def read_metrics(paths: Sequence[Path], monitor: str | None, mode: str | None) -> Measured:
    """Return the metric of each checkpoint.

    Args:
        paths: the checkpoints, oldest first; the last has a metric.
        monitor: as for `has_metric`.
        mode: "min" or "max", whichever is better; None to find out by the metric's name.

    Raises:
        CheckpointError: one has no metric, or that of another name.
        UsageError: it is not known whether less or more is better.
    """
    del monitor
    found = formats.read_metrics([find_file(path) for path in paths])
    newest = found[-1]
    name = newest[0] if newest else ""
    values = []
    for path, one in zip(paths, found, strict=True):
        if one is None or one[0] != name:
            other = f"{shown(one[0])} as its" if one and one[0] else "no"
            raise CheckpointError(
                f"{shown(path)}: has {other} metric, unlike {shown(paths[-1])}, whose metric is "
                f"{shown(name) or 'there'}; leave it out with --exclude, or give a --log"
            )
        values.append(one[1])
    better = mode or guess_mode(name)
    if better is None:
        raise UsageError(
            f"{shown(paths[-1])}: the metric in it is called {shown(name) or 'nothing'}, which "
            "does not say whether less or more is better: give --mode min or --mode max"
        )
    note = f"{shown(name) or _KEY} is that in each checkpoint ({better} is better)"
    return Measured(name or _KEY, better, values, [note])
