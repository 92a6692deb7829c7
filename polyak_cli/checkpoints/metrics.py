"""Choose the best checkpoints by a metric, read from their names or from the run's CSV log.

Knows the log that Keras' CSVLogger writes.  Evaluates no model.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from polyak_cli.checkpoints.directions import guess_mode
from polyak_cli.checkpoints.listing import Checkpoint, StrPath
from polyak_cli.checkpoints.names import find_metric, is_unnamed_decimal, parse_name
from polyak_cli.checkpoints.ordering import describe_epochs, require_epoch
from polyak_cli.errors import CheckpointError, UsageError, choose_verb, shown


def check_monitor(
    best: int | None, monitor: str | None, mode: str | None, log: StrPath | None
) -> tuple[str, str]:
    """Return the metric and whether ``min`` or ``max`` of it is better."""
    if best is None:
        for name, value in (("monitor", monitor), ("mode", mode), ("log", log)):
            if value is not None:
                raise UsageError(f"--{name} is for choosing by metric: give --best N too")
        return "", ""
    monitor = "val_loss" if monitor is None else monitor
    if not monitor.strip():
        raise UsageError("--monitor is empty, but must name a metric, such as val_loss")
    if mode not in (None, "min", "max"):
        raise UsageError(f"--mode is {shown(mode)!r}, but must be min or max")
    better = mode or guess_mode(monitor)
    if better is None:
        raise UsageError(
            f"--monitor {shown(monitor)}: its name does not tell whether less or more is better: "
            "give --mode min or --mode max"
        )
    return monitor, better


def take_best(
    candidates: Sequence[Checkpoint],
    ordered: Sequence[Checkpoint],
    count: int,
    growing: bool,
    monitor: str,
    better: str,
    log: StrPath | None,
) -> tuple[list[Checkpoint], list[str]]:
    """Return the ``count`` best candidates, in the order given, and notes."""
    notes: list[str] = []
    if log is None:
        metrics = [_read_metric_in_name(one.path, monitor) for one in candidates]
    else:
        metrics, notes = _look_up_metrics(candidates, ordered, monitor, _read_log(log, monitor))
    measured = [
        replace(one, metric=metric) for one, metric in zip(candidates, metrics, strict=True)
    ]
    usable = [index for index, metric in enumerate(metrics) if math.isfinite(metric)]
    if count > len(usable) and not growing:
        lost = len(metrics) - len(usable)
        where = f", and {lost} more whose {shown(monitor)} is no finite number" if lost else ""
        raise CheckpointError(
            f"--best {count}: there {choose_verb(len(usable))} only "
            f"{describe_epochs([measured[index] for index in usable])} to choose from{where}"
        )
    sign = 1.0 if better == "min" else -1.0
    ranked = sorted(usable, key=lambda index: (sign * metrics[index], -index))
    return [measured[index] for index in sorted(ranked[:count])], notes


def _read_metric_in_name(path: Path, monitor: str) -> float:
    name = parse_name(path)
    number = find_metric(name, monitor)
    if number is not None:
        return float(number.value)
    bare = [number.text for number in name.numbers if is_unnamed_decimal(number)]
    found = f"the numbers {', '.join(bare)} without a name" if bare else "no such number"
    raise CheckpointError(
        f"{shown(path)}: looked in its name for {shown(monitor)}, but found {found}: give the "
        "training log with --log, or another --monitor"
    )


@dataclass(frozen=True, slots=True)
class _Log:
    """A column of a log: epoch of the row, which CSVLogger counts from 0 -> value."""

    path: str
    metric: dict[int, float]
    last: int
    notes: tuple[str, ...]


def _look_up_metrics(
    candidates: Sequence[Checkpoint], ordered: Sequence[Checkpoint], monitor: str, log: _Log
) -> tuple[list[float], list[str]]:
    epochs = [require_epoch(one, "--log") for one in candidates]
    newest = max((one for one in ordered if one.epoch is not None), key=lambda one: one.epoch or 0)
    offset, why = _find_offset(candidates, ordered, newest.epoch or 0, monitor, log)
    for one, epoch in zip(candidates, epochs, strict=True):
        if epoch - offset not in log.metric:
            raise CheckpointError(
                f"{shown(log.path)}: there is no row for {shown(one.path)}, which should be epoch "
                f"{epoch - offset} there ({why}); the rows are epochs {min(log.metric)} to "
                f"{max(log.metric)}"
            )
    note = (
        f"{shown(log.path)}: the row of epoch {(newest.epoch or 0) - offset} is taken for "
        f"{shown(newest.path)} ({why})"
    )
    return [log.metric[epoch - offset] for epoch in epochs], [*log.notes, note]


def _find_offset(
    candidates: Sequence[Checkpoint],
    ordered: Sequence[Checkpoint],
    newest: int,
    monitor: str,
    log: _Log,
) -> tuple[int, str]:
    """Return the difference between a file's epoch and its row's, and the reason in words.

    CSVLogger counts epochs from 0, and ModelCheckpoint names files from 1.  Custom callbacks mostly
    count from 0.
    """
    if any(one.epoch == 0 for one in ordered):
        return 0, "as the files count from 0 too"
    agreeing = [offset for offset in (0, 1) if _is_consistent(candidates, offset, monitor, log)]
    if len(agreeing) == 1:
        return agreeing[0], f"as the {shown(monitor)} in the file names agrees"
    if newest == log.last:
        return 0, "as the newest file and the last row have the same number"
    if newest == log.last + 1:
        return 1, "as the newest file is one more than the last row"
    return 1, "as Keras names files from 1 and counts rows from 0; check that this fits"


def _is_consistent(candidates: Sequence[Checkpoint], offset: int, monitor: str, log: _Log) -> bool:
    """Return whether the metric in every name is the rounded value of its row."""
    for one in candidates:
        number = find_metric(parse_name(one.path), monitor)
        exact = log.metric.get((one.epoch or 0) - offset, math.nan)
        if number is None or isinstance(number.value, int):
            return False
        # Half a unit of the last digit, and a little more for values that were float32 before.
        if not abs(number.value - exact) <= 0.5001 * _weigh_last_digit(number.text):
            return False
    return True


def _weigh_last_digit(numeral: str) -> float:
    """Return one unit in the last digit: 0.01 for 1.25, 1e-06 for 1.2e-05."""
    mantissa, _, exponent = numeral.casefold().partition("e")
    _, _, fraction = mantissa.partition(".")
    return float(f"1e{int(exponent or 0) - len(fraction)}")


def _read_log(path: StrPath, monitor: str) -> _Log:
    import csv  # only --log needs it

    text = os.fspath(path)
    if "\0" in text:
        raise CheckpointError(f"{shown(text)!r} is no path: --log must be a CSV file")
    try:
        # Opening a pipe without a writer would block for ever.
        if not Path(text).is_file():
            what = "is no regular file" if os.path.lexists(text) else "does not exist"
            raise CheckpointError(f"{shown(text)} {what}: --log must be a CSV file of CSVLogger")
        with open(text, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            start = stream.readline(1 << 16)
            delimiter = max(",;\t", key=start.count)
            stream.seek(0)
            rows = csv.reader(stream, delimiter=delimiter, skipinitialspace=True)
            return _parse_log(text, rows, monitor)
    except (OSError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{shown(text)}: the log cannot be read: {shown(reason)}") from error


def _parse_log(path: str, rows: Iterator[list[str]], monitor: str) -> _Log:
    header: list[str] = []
    metric: dict[int, float] = {}
    cut_short = last = 0
    for line, row in enumerate(rows, start=1):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if cut_short:
            raise CheckpointError(f"{shown(path)}: row {cut_short} has fewer cells than the header")
        # A restarted run may append to the log, with another header.
        if not header or "epoch" in cells:
            header = _check_header(path, cells, monitor)
        elif len(cells) < len(header):
            cut_short = line
        else:
            last = _parse_epoch(path, line, cells[header.index("epoch")])
            metric[last] = _parse_metric(path, line, cells[header.index(monitor)])
    if not metric:
        raise CheckpointError(f"{shown(path)}: the log has no rows; is it the CSVLogger's?")
    # Only the last row may be incomplete: training may be writing it now.
    notes = [f"{shown(path)}: row {cut_short}, the last, is incomplete and not used"]
    return _Log(path, metric, last, tuple(notes if cut_short else ()))


def _check_header(path: str, header: list[str], monitor: str) -> list[str]:
    columns = ", ".join(shown(column, 40) for column in header[:20])
    if "epoch" not in header:
        raise CheckpointError(
            f"{shown(path)}: its first row has no column 'epoch', as CSVLogger writes it, but: "
            f"{columns}"
        )
    if monitor not in header:
        raise CheckpointError(
            f"{shown(path)}: there is no column {shown(monitor)!r}: choose --monitor from {columns}"
        )
    return header


def _parse_epoch(path: str, line: int, cell: str) -> int:
    # A spreadsheet may have turned 3 into 3.0.
    if not re.fullmatch(r"\d{1,15}(?:\.0+)?", cell):
        raise CheckpointError(
            f"{shown(path)}: row {line}: the epoch is {shown(cell, 40)!r}, but must be a number"
        )
    return int(cell.partition(".")[0])


def _parse_metric(path: str, line: int, cell: str) -> float:
    # CSVLogger writes NA where a metric was not computed.
    if cell in ("", "NA"):
        return math.nan
    try:
        return float(cell)
    except ValueError:
        raise CheckpointError(
            f"{shown(path)}: row {line}: the metric is {shown(cell, 40)!r}, but must be a number"
        ) from None
