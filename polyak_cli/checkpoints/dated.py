"""Recognise and order the checkpoint folders of SpeechBrain, which are named by date and time.

A folder holds one file for each part of the training, and the weights are mostly in `model.ckpt`.
The epoch is in `counter.ckpt`, a text of digits.  Opens no other file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from polyak_cli.errors import FormatError
from polyak_cli.storage import open_input

#: The file of the weights in such a folder.
MODEL = "model.ckpt"
#: The file of what SpeechBrain says of the checkpoint, such as its metrics.
DESCRIPTION = "CKPT.yaml"
_COUNTER = "counter.ckpt"
#: The last number tells apart what was saved within one second.
_NAME = re.compile(r"CKPT\+\d{4}-\d\d-\d\d\+\d\d-\d\d-\d\d\+\d\d")


def is_dated(folder: Path) -> bool:
    """Return whether a folder is named as SpeechBrain names checkpoints."""
    return _NAME.fullmatch(folder.name) is not None


def find_dated(path: Path) -> Path | None:
    """Return the dated folder that a path is, or that a file lies in; None if there is none."""
    return next((one for one in (path, path.parent) if is_dated(one)), None)


def order_by_date(paths: Sequence[Path]) -> list[tuple[Path, int | None]] | None:
    """Return checkpoints by date, oldest first, with their epochs; None if some have no date.

    Epochs are left out where they do not rise with the date: a checkpoint within an epoch has the
    number of that epoch.
    """
    folders = {path: find_dated(path) for path in paths}
    dates = {path: folder.name for path, folder in folders.items() if folder}
    if not paths or len({*dates.values()}) < len(paths):
        return None
    ordered = sorted(paths, key=lambda path: dates[path])
    epochs = [_read_epoch(folders[path]) for path in ordered]
    known = [epoch for epoch in epochs if epoch is not None]
    if len(known) < len(ordered) or any(one >= other for one, other in pairwise(known)):
        return [(path, None) for path in ordered]
    return [*zip(ordered, epochs, strict=True)]


def _read_epoch(folder: Path | None) -> int | None:
    """Return the epoch that a checkpoint was saved in; None if it is not there."""
    if folder is None:
        return None
    try:
        with open_input(folder / _COUNTER) as file:
            text = file.read(0, 16)
    except FormatError:
        return None
    return int(text) if re.fullmatch(rb"\d{1,9}\n?", text) else None
