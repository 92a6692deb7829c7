"""Read metrics from the YAML that programs write for each checkpoint: wenet and SpeechBrain.

wenet puts `12.yaml` beside `12.pt`, SpeechBrain `CKPT.yaml` into the checkpoint's folder.  Only
lines of a key and a number are read, with the keys that they are indented below: no YAML library is
needed, and a stranger's text cannot do anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from polyak_cli.checkpoints import dated
from polyak_cli.checkpoints.directions import guess_mode
from polyak_cli.checkpoints.trainer_states import Measured
from polyak_cli.errors import CheckpointError, FormatError, UsageError, list_some, shown
from polyak_cli.storage import open_input

#: Bytes that a description may have; wenet's holds the whole configuration.
_LONGEST = 1 << 20
_LINE = re.compile(r"( *)([\w.@-]+): *(\S*) *")
#: The metrics of wenet's older and newer versions, taken where none is named.
_DEFAULTS = ("cv_loss", "loss_dict/loss")
#: Numbers that are no metric.
_OTHERS = {"unixtime", "epoch", "step", "steps", "lr", "lrs", "save_time", "save_interval"}


def find_description(path: Path) -> Path | None:
    """Return the description of a checkpoint; None if it has none."""
    folder = dated.find_dated(path)
    beside = folder / dated.DESCRIPTION if folder else path.with_suffix(".yaml")
    return beside if beside.is_file() and beside != path else None


def read_metrics(paths: Sequence[Path], monitor: str | None, mode: str | None) -> Measured:
    """Return the metric of each checkpoint by its description.

    Args:
        paths: the checkpoints, oldest first.
        monitor: the metric, alone or with the keys that it is below (``loss_dict/acc``); None for
            wenet's own choice, or for the only metric that there is.
        mode: "min" or "max", whichever is better; None to find out.

    Raises:
        CheckpointError: a description is missing or has no such metric.
        UsageError: it is not known whether less or more is better.
    """
    found = [_read(path) for path in paths]
    metric = _choose(paths[-1], found[-1], monitor)
    better = mode or guess_mode(metric.rpartition("/")[2])
    if better is None:
        raise UsageError(
            f"--monitor {shown(metric)}: its name does not say whether less or more is better: "
            "give --mode min or --mode max"
        )
    for path, numbers in zip(paths, found, strict=True):
        if metric not in numbers:
            raise CheckpointError(
                f"{shown(find_description(path))}: has no {shown(metric)}; leave {shown(path)} out "
                "with --exclude, or choose another --monitor"
            )
    note = f"{shown(metric)} is that of the .yaml of each checkpoint ({better} is better)"
    return Measured(metric, better, [numbers[metric] for numbers in found], [note])


def _choose(path: Path, numbers: Mapping[str, float], monitor: str | None) -> str:
    """Return the metric with the keys that it is below."""
    metrics = [key for key in numbers if key.rpartition("/")[2] not in _OTHERS]
    if monitor is None:
        usual = [key for key in _DEFAULTS if key in numbers] or metrics
        fitting = usual[:1] if len(metrics) == 1 or usual is not metrics else []
    else:
        fitting = [key for key in numbers if f"/{key}".endswith(f"/{monitor}")]
        # What stands further out is more general, such as the loss and the losses of heads.
        least = min((key.count("/") for key in fitting), default=0)
        fitting = [key for key in fitting if key.count("/") == least]
    if len(fitting) == 1:
        return fitting[0]
    wanted = shown(monitor) if monitor else "single metric"
    raise CheckpointError(
        f"{shown(find_description(path))}: has {'several' if fitting else 'no'} {wanted}; choose "
        f"--monitor from {list_some(fitting or metrics) or 'nothing: it has no number'}"
    )


def _read(path: Path) -> dict[str, float]:
    """Return the numbers in the description of a checkpoint, by their keys joined with "/".

    Raises:
        CheckpointError: it is not there or too large.
    """
    where = find_description(path)
    if where is None:
        raise CheckpointError(
            f"{shown(path)}: has no .yaml with metrics, unlike others; leave it out with --exclude"
        )
    try:
        with open_input(where) as file:
            raw = file.read(0, _LONGEST + 1)
    except FormatError as error:
        raise CheckpointError(f"{error}; --best reads the metric from it") from None
    if len(raw) > _LONGEST:
        raise CheckpointError(f"{shown(where)}: is too large for a list of metrics")
    return parse(raw.decode(errors="replace"))


def parse(text: str) -> dict[str, float]:
    """Return the numbers in a YAML of nested mappings, by their keys joined with "/"."""
    found: dict[str, float] = {}
    above: list[tuple[int, str]] = []
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            continue
        indent, key, value = len(match[1]), match[2], match[3]
        while above and above[-1][0] >= indent:
            above.pop()
        number = _parse_number(value)
        if number is not None:
            found["/".join([*(name for _, name in above), key])] = number
        if not value:
            above.append((indent, key))
    return found


def _parse_number(text: str) -> float | None:
    """Return a number as YAML writes it; None for anything else."""
    special = {".nan": math.nan, ".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf}
    if text.lower() in special:
        return special[text.lower()]
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text, re.ASCII):
        return float(text)
    return None
