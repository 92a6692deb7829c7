"""Runs of checkpoints to average, and averages that pause so that a test can act."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.command import PAUSE, stopped
from tests.oracle import write_model

OLD = b"an older average"

LAID_OUT = PAUSE.format(module="formats", function="write_skeleton")  # no tensor has been read
# Every tensor has been read and written.
FOLDED = PAUSE.format(module="engine.executors", function="fold")


def write_run(folder: Path, count: int, elements: int) -> list[Path]:
    """Write checkpoints whose values differ, quickly."""
    tile = np.random.default_rng(0).normal(size=1 << 12).astype(np.float32)
    values = np.resize(tile, elements)
    return [
        write_model(folder / f"model_{k}.h5", {"dense": {"kernel": values * np.float32(k)}})
        for k in range(1, count + 1)
    ]


def paused(
    folder: Path, code: str = "", output: str = "o.h5", *options: str, moment: str = LAID_OUT
) -> Any:
    """Start a run, and return it when it has paused."""
    return stopped(moment + code, "average", "ckpts", "-q", "-o", output, *options, cwd=folder)


def go_on(process: Any) -> tuple[int, str]:
    """Let a paused run continue to its end."""
    _, err = process.communicate("\n", timeout=60)
    return process.returncode, err


def _saved_again(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


def _written_into(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\x00\x00\x80?")


def _appended(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def _cut(path: Path) -> None:
    os.truncate(path, 5000)


CHANGES: dict[str, Callable[[Path], None]] = {
    "saved again": _saved_again,
    "written into": _written_into,
    "appended to": _appended,
    "truncated": _cut,
    "removed": Path.unlink,
}
