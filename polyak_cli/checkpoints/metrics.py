"""Choose the best checkpoints by a metric: of their names, a CSV log, or a program's own file.

Knows the logs that the CSVLogger of Keras and that of Lightning write.  Evaluates no model.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from polyak_cli.checkpoints import descriptions, inner_metrics, trainer_states
from polyak_cli.checkpoints.directions import guess_mode
from polyak_cli.checkpoints.listing import Checkpoint, StrPath, enter
from polyak_cli.checkpoints.names import find_metric, is_unnamed_decimal, parse_name
from polyak_cli.checkpoints.ordering import describe_epochs, require_epoch
from polyak_cli.errors import CheckpointError, UsageError, choose_verb, shown, word_rest
from polyak_cli.storage import mirrors

#: Suffixes that people give the file of Keras' CSVLogger.
_LOG_SUFFIXES = (".csv", ".log")
#: What ``--best`` can rank by; the first is the default.
RANKINGS = ("value", "lifespan")


@dataclass(frozen=True, slots=True)
class Wanted:
    """How many of the best checkpoints are wanted, and by which metric.

    Attributes:
        count: how many.
        monitor: the metric.
        better: ``min`` or ``max`` of it.
        log: the CSV file that has it; None if the file names or the checkpoints have it.
        log_first: what the log calls the epoch that file names call 1; None if it must be found.
        asked: the metric that the user named; None if that is left open.
        mode: what the user said of it; None likewise.
        by: ``value`` of the metric, or ``lifespan``: for how many later checkpoints no better one
            came.
    """

    count: int
    monitor: str
    better: str
    log: StrPath | None = None
    log_first: int | None = None
    asked: str | None = None
    mode: str | None = None
    by: str = "value"


def check_monitor(
    best: int | None,
    monitor: str | None,
    mode: str | None,
    log: StrPath | None,
    log_first: int | None,
    by: str | None = None,
) -> Wanted | None:
    """Return what is wanted, or None if nothing is chosen by metric."""
    if best is None:
        for name, value in (
            *(("best-by", by), ("monitor", monitor), ("mode", mode)),
            *(("log", log), ("log-first", log_first)),
        ):
            if value is not None:
                raise UsageError(f"--{name} belongs to --best N, which is missing")
        return None
    asked = monitor
    monitor = "val_loss" if monitor is None else monitor
    if not monitor.strip():
        raise UsageError("--monitor is empty; expected the name of a metric, such as val_loss")
    if by not in (None, *RANKINGS):
        raise UsageError(f"--best-by is {shown(by)}; expected one of {', '.join(RANKINGS)}")
    if mode not in (None, "min", "max"):
        raise UsageError(f"--mode is {shown(mode)!r}; expected min or max")
    if log_first not in (None, 0, 1):
        raise UsageError(f"--log-first is {log_first}; expected 0 or 1")
    if log_first is not None and log is None:
        raise UsageError("--log-first belongs to --log CSV, which is missing")
    better = mode or guess_mode(monitor)
    if better is None:
        raise UsageError(
            f"--monitor {shown(monitor)}: its name does not say whether less or more is better: "
            "give --mode min or --mode max"
        )
    return Wanted(best, monitor, better, log, log_first, asked, mode, by or RANKINGS[0])


def take_best(
    candidates: Sequence[Checkpoint], ordered: Sequence[Checkpoint], wanted: Wanted, growing: bool
) -> tuple[list[Checkpoint], list[str]]:
    """Return the best candidates, in the order given, and notes."""
    notes: list[str] = []
    read = None if wanted.log else _find_reader(candidates[-1].path, wanted)
    if read is not None:
        found = read([one.path for one in candidates], wanted.asked, wanted.mode)
        metrics, notes = found.values, found.notes
        wanted = replace(wanted, monitor=found.monitor, better=found.better)
    elif wanted.log is None:
        metrics = [_read_metric_in_name(one.path, wanted.monitor) for one in candidates]
    else:
        log = _read_log(wanted.log, wanted.monitor)
        metrics, notes = _look_up_metrics(candidates, ordered, wanted, log, growing)
    measured = [
        replace(one, metric=metric) for one, metric in zip(candidates, metrics, strict=True)
    ]
    usable = [index for index, metric in enumerate(metrics) if math.isfinite(metric)]
    if wanted.count > len(usable) and not growing:
        lost = len(metrics) - len(usable)
        where = f", and {lost} more whose {shown(wanted.monitor)} is not a finite number"
        raise CheckpointError(
            f"--best {wanted.count}: there {choose_verb(len(usable))} only "
            f"{describe_epochs([measured[index] for index in usable])} to choose from"
            f"{where if lost else ''}"
        )
    chosen = _rank(metrics, wanted)
    if wanted.by == "lifespan":
        notes = [*notes, _describe_lifespans(measured, metrics, chosen, wanted)]
    return [measured[index] for index in chosen], notes


def _rank(metrics: Sequence[float], wanted: Wanted) -> list[int]:
    """Return the places of the best, in order; of equal metrics, the later is better."""
    usable = [index for index, metric in enumerate(metrics) if math.isfinite(metric)]
    sign = 1.0 if wanted.better == "min" else -1.0
    spans = _measure_lifespans(metrics, wanted) if wanted.by == "lifespan" else [0] * len(metrics)
    ranked = sorted(usable, key=lambda index: (-spans[index], sign * metrics[index], -index))
    return sorted(ranked[: wanted.count])


def _measure_lifespans(metrics: Sequence[float], wanted: Wanted) -> list[int]:
    """Return for how many later checkpoints each stayed the best; 0 if it never was.

    A checkpoint is the best if it is better than all before it, until a better one comes.  sockeye
    chooses so: a lucky score in a noisy validation is rarely one that lasts.
    """
    sign = 1.0 if wanted.better == "min" else -1.0
    spans = [0] * len(metrics)
    best: int | None = None
    for index, metric in enumerate(metrics):
        # NaN and infinity are no score, so none of them is ever the best.
        is_better = best is None or sign * metric < sign * metrics[best]
        if math.isfinite(metric) and is_better:
            best = index
        elif best is not None:
            spans[best] += 1
    return spans


def _describe_lifespans(
    candidates: Sequence[Checkpoint],
    metrics: Sequence[float],
    chosen: Sequence[int],
    wanted: Wanted,
    most: int = 10,
) -> str:
    spans = _measure_lifespans(metrics, wanted)
    some = ", ".join(f"{shown(candidates[k].path.name)} for {spans[k]}" for k in chosen[:most])
    return (
        f"--best-by lifespan keeps {len(chosen)} of {describe_epochs(candidates)}: for how many "
        f"later ones the {shown(wanted.monitor)} of each stayed the best: {some}"
        f"{word_rest(len(chosen) - most)}"
    )


def _find_reader(
    newest: Path, wanted: Wanted
) -> Callable[[Sequence[Path], str | None, str | None], trainer_states.Measured] | None:
    """Return what reads the metric where programs keep it; None to look in the names."""
    if find_metric(parse_name(newest), wanted.monitor) is not None:
        return None
    if trainer_states.has_state(newest):
        return trainer_states.read_metrics
    if descriptions.find_description(newest):
        return descriptions.read_metrics
    # The only file that is opened, so it is the last resort.
    return inner_metrics.read_metrics if inner_metrics.has_metric(newest, wanted.asked) else None


def _read_metric_in_name(path: Path, monitor: str) -> float:
    name = parse_name(path)
    number = find_metric(name, monitor)
    if number is not None:
        return float(number.value)
    bare = [number.text for number in name.numbers if is_unnamed_decimal(number)]
    found = f"only the numbers {', '.join(bare)}, without a name" if bare else "no such number"
    raise CheckpointError(
        f"{shown(path)}: looked in its name for {shown(monitor)}, but found {found}: give the "
        f"training log with --log{_name_logs_beside(path)}, or another --monitor"
    )


def _name_logs_beside(path: Path) -> str:
    """Return which log lies in the folder of a checkpoint, for an advice; "" if none or several."""
    try:
        logs = [one for one in path.parent.iterdir() if one.suffix in _LOG_SUFFIXES]
    except OSError:
        return ""
    return f" {shown(logs[0])}" if len(logs) == 1 else ""


@dataclass(frozen=True, slots=True)
class _Log:
    """A column of a log: epoch of the row, which CSVLogger counts from 0 -> value."""

    path: str
    metric: dict[int, float]
    last: int
    has_steps: bool  # as Lightning's has, and Keras's has not
    notes: tuple[str, ...]


def _look_up_metrics(
    candidates: Sequence[Checkpoint],
    ordered: Sequence[Checkpoint],
    wanted: Wanted,
    log: _Log,
    growing: bool,
) -> tuple[list[float], list[str]]:
    epochs = [require_epoch(one, "--log") for one in candidates]
    newest = max((one for one in ordered if one.epoch is not None), key=lambda one: one.epoch or 0)
    offset, why = _find_offset(candidates, ordered, wanted, log) or _compare_readings(
        candidates, wanted, log, growing
    )
    for one, epoch in zip(candidates, epochs, strict=True):
        if epoch - offset not in log.metric:
            raise CheckpointError(
                f"{shown(log.path)}: no row for {shown(one.path)}; expected epoch "
                f"{epoch - offset} ({why}), found rows of epochs {min(log.metric)} to "
                f"{max(log.metric)}"
            )
    note = (
        f"{shown(log.path)}: matched {shown(newest.path)} to the row of epoch "
        f"{(newest.epoch or 0) - offset} ({why})"
    )
    return [log.metric[epoch - offset] for epoch in epochs], [*log.notes, note]


def _find_offset(
    candidates: Sequence[Checkpoint], ordered: Sequence[Checkpoint], wanted: Wanted, log: _Log
) -> tuple[int, str] | None:
    """Return the difference between a file's epoch and its row's, and the reason in words.

    CSVLogger counts epochs from 0, and ModelCheckpoint names files from 1.  Custom callbacks mostly
    count from 0.  None if the rows fit the files either way: that the newest file and the last row
    have the same number proves nothing, as the file of the last row may not be there.
    """
    if wanted.log_first is not None:
        return 1 - wanted.log_first, f"as --log-first {wanted.log_first} says"
    if log.has_steps and all("epoch=" in one.path.name for one in ordered):
        return 0, "as Lightning gives both the same number"
    if any(one.epoch == 0 for one in ordered):
        return 0, "as the files count from 0 too"
    monitor = wanted.monitor
    agreeing = [offset for offset in (0, 1) if _is_consistent(candidates, offset, monitor, log)]
    if len(agreeing) == 1:
        return agreeing[0], f"as the {shown(monitor)} in the file names agrees"
    # The log may have lost the rows of older files, when the run was started again.
    fitting = _list_fitting(ordered, log) or _list_fitting(candidates, log)
    if len(fitting) == 2:
        return None
    newest = max(one.epoch or 0 for one in ordered)
    if newest == log.last + 1 and fitting != [0]:
        return 1, "as the newest file is one more than the last row"
    if fitting == [0]:
        return 0, "as every file has a row of the same number, but not of one less"
    if fitting == [1]:
        return 1, "as every file has a row of one less, but not of the same number"
    return 1, "as Keras names files from 1 and counts rows from 0; check that this fits"


def _list_fitting(files: Sequence[Checkpoint], log: _Log) -> list[int]:
    """Return the offsets under which every file has a row."""
    epochs = [one.epoch for one in files if one.epoch is not None]
    return [offset for offset in (0, 1) if all(epoch - offset in log.metric for epoch in epochs)]


def _compare_readings(
    candidates: Sequence[Checkpoint], wanted: Wanted, log: _Log, growing: bool
) -> tuple[int, str]:
    """Return Keras' way to count, if equal numbers would choose the same files; else refuse."""
    equal, keras = (
        [candidates[i] for i in _rank([log.metric[(c.epoch or 0) - k] for c in candidates], wanted)]
        for k in (0, 1)
    )
    why = "as Keras names files from 1 and counts rows from 0"
    if equal == keras:
        return 1, f"{why}; with equal numbers the same files would be chosen"
    if growing:
        # While training runs, it passes: a row is written before its file is there.
        return 1, (
            f"{why}; with equal numbers, which is --log-first 1, it would be {_list_names(equal)} "
            f"and not {_list_names(keras)}"
        )
    example = max(one.epoch or 0 for one in candidates)
    raise CheckpointError(
        f"{shown(log.path)}: file {example} may belong to row {example - 1}, as Keras counts, or "
        f"to row {example}, and the best differ: with --log-first 0, which is Keras' way, "
        f"{_list_names(keras)}; with --log-first 1, {_list_names(equal)}: give one of the two"
    )


def _list_names(chosen: Sequence[Checkpoint], most: int = 5) -> str:
    names = [shown(one.path.name) for one in chosen[:most]]
    if len(chosen) > most:
        names.append(f"and {len(chosen) - most} more")
    return ", ".join(names) or "none"


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
        raise CheckpointError(f"{shown(text)!r} is not a path: --log must be a CSV file")
    try:
        text = mirrors.fetch(enter(text))
        # Opening a pipe without a writer would block for ever.
        if not Path(text).is_file():
            what = "is not a regular file" if os.path.lexists(text) else "does not exist"
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
            value = _parse_metric(path, line, cells[header.index(monitor)])
            # Lightning writes a row for training and one for validation, without the other's.
            if value is not None or last not in metric:
                metric[last] = math.nan if value is None else value
    if not metric:
        raise CheckpointError(
            f"{shown(path)}: the log has no rows; expected a CSV file that CSVLogger wrote"
        )
    # Only the last row may be incomplete: training may be writing it now.
    notes = [f"{shown(path)}: the last row, {cut_short}, is incomplete and was ignored"]
    return _Log(path, metric, last, "step" in header, tuple(notes if cut_short else ()))


def _check_header(path: str, header: list[str], monitor: str) -> list[str]:
    columns = ", ".join(shown(column, 40) for column in header[:20])
    if "epoch" not in header:
        raise CheckpointError(
            f"{shown(path)}: its first row has no column 'epoch'; expected a CSV file that "
            f"CSVLogger wrote, found the columns {columns}"
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
            f"{shown(path)}: row {line}: the epoch is {shown(cell, 40)!r}; expected a number"
        )
    return int(cell.partition(".")[0])


def _parse_metric(path: str, line: int, cell: str) -> float | None:
    # Keras's CSVLogger writes NA where a metric was not computed.
    if cell in ("", "NA"):
        return None
    try:
        return float(cell)
    except ValueError:
        raise CheckpointError(
            f"{shown(path)}: row {line}: the metric is {shown(cell, 40)!r}; expected a number"
        ) from None
