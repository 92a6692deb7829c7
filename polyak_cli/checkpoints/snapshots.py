"""Find EMA snapshots of a run, and the step and the width (sigma) of each.

Knows how programs name snapshots, and the user's own list of them.  Opens no snapshot.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from polyak_cli.checkpoints.listing import (
    Checkpoint,
    StrPath,
    enter,
    find_candidates,
    list_sources,
    refuse,
)
from polyak_cli.errors import CheckpointError, FormatError, UsageError, list_some, shown
from polyak_cli.storage import open_input

#: EDM2's names: network-snapshot-0001234-0.050.pkl.
_STEP_SIGMA = re.compile(r"(?:.*[-_])?(?P<step>\d+)[-_](?P<sigma>0?\.\d+)(?:\.[A-Za-z]\w*)*")
#: ema-pytorch's: 0.1000.pt, the number of the EMA and the step.
_INDEX_STEP = re.compile(r"(?P<index>\d+)\.(?P<step>\d+)(?:\.[A-Za-z]\w*)+")
_LONGEST_LIST = 16 << 20
_COLUMNS = ("file", "step", "sigma")
#: What text, numbers or structure other than expected raise.
_UNREADABLE = (
    ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError
)  # fmt: skip


class Snapshots(NamedTuple):
    """The snapshots of a run.

    Attributes:
        checkpoints: in order of step and sigma; the epoch is the step.
        steps: of each.
        sigmas: of each.
        left_out: snapshots before ``from_step`` or after ``to_step``.
        passed_over: as `Selection.passed_over`.
        notes: sentences for the user.
    """

    checkpoints: tuple[Checkpoint, ...]
    steps: tuple[float, ...]
    sigmas: tuple[float, ...]
    left_out: tuple[Path, ...]
    passed_over: tuple[Any, ...]
    notes: tuple[str, ...]


def find_snapshots(
    sources: Sequence[StrPath],
    said: str | None,
    *,
    exclude: Sequence[str],
    from_step: int | None,
    to_step: int | None,
    use_ema: bool,
    find_polyak_outputs: Callable[[Sequence[Path]], Collection[Path]],
) -> Snapshots:
    """Find snapshots, and read the step and sigma of each.

    Args:
        sources: directories, patterns and files.
        said: a CSV or JSON file with ``file``, ``step`` and ``sigma`` of each; or the sigmas with
            commas between them, of files that are named INDEX.STEP as ema-pytorch's are.  None if
            both are in the names, as EDM2 writes them.
        exclude: globs of names that are left out.
        from_step: the first step to use.
        to_step: the last step to use; it is that of the EMA to make.
        use_ema: as for `select`.
        find_polyak_outputs: as for `select`.

    Raises:
        UsageError: step or sigma of a snapshot is not known.
        CheckpointError: there are no snapshots, or the list cannot be read.
    """
    pool = find_candidates(
        list_sources(sources), exclude, False, find_polyak_outputs, refuse, True, use_ema
    )
    notes = [*pool.notes]
    if said is None:
        found = {path: _read_name(path) for path in pool.paths}
    elif sigmas := _split_numbers(said):
        found = {path: _read_index(path, sigmas) for path in pool.paths}
    else:
        listed = _read_list(said)
        found = {path: _look_up(path, listed, said) for path in pool.paths}
        missing = listed.keys() - {path.name for path in pool.paths}
        if missing:
            rest = list_some(sorted(missing))
            notes.append(f"{shown(said)} lists files that are not used: {rest}")
    low, high = from_step or 0, math.inf if to_step is None else to_step
    ordered = sorted(found, key=lambda path: (*found[path], path.name))
    chosen = [path for path in ordered if low <= found[path][0] <= high]
    if not chosen:
        steps = [step for step, _ in found.values()]
        raise CheckpointError(
            f"--from and --to leave no snapshot; found steps {min(steps):g} to {max(steps):g}"
        )
    return Snapshots(
        tuple(Checkpoint(path, int(found[path][0]), None) for path in chosen),
        tuple(found[path][0] for path in chosen),
        tuple(found[path][1] for path in chosen),
        tuple(path for path in ordered if path not in chosen),
        pool.passed_over,
        tuple(notes),
    )


def _read_name(path: Path) -> tuple[float, float]:
    """Return step and sigma as EDM2 writes them in a name."""
    match = _STEP_SIGMA.fullmatch(path.name)
    if not match:
        raise UsageError(
            f"--scheme posthoc needs step and sigma of each snapshot, but {shown(path)} has no "
            "such name as network-snapshot-0001234-0.050.pt; list both with --snapshots FILE, or "
            "the sigmas of ema-pytorch's files with --snapshots 0.05,0.28"
        )
    return float(match["step"]), float(match["sigma"])


def _read_index(path: Path, sigmas: Sequence[float]) -> tuple[float, float]:
    """Return step and sigma of a file that has the number of its EMA in its name."""
    match = _INDEX_STEP.fullmatch(path.name)
    if not match or int(match["index"]) >= len(sigmas):
        raise UsageError(
            f"--snapshots has {len(sigmas)} sigmas, of files that are named INDEX.STEP.pt as "
            f"ema-pytorch's are; found {shown(path)}, expected an INDEX below {len(sigmas)}"
        )
    return float(match["step"]), sigmas[int(match["index"])]


def _split_numbers(text: str) -> tuple[float, ...]:
    """Return numbers with commas between them; none if a text is something else."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        return ()


def _look_up(
    path: Path, listed: Mapping[str, tuple[float, float]], said: str
) -> tuple[float, float]:
    if path.name not in listed:
        raise UsageError(
            f"{shown(said)}: does not list {shown(path.name)}; expected a line for each snapshot, "
            "or leave it out with --exclude"
        )
    return listed[path.name]


def _read_list(said: str) -> dict[str, tuple[float, float]]:
    """Return step and sigma of each file that a CSV or JSON file lists, by its name.

    Raises:
        CheckpointError: it cannot be read, or is no such list.
    """
    try:
        with open_input(enter(said)) as file:
            raw = file.read(0, _LONGEST_LIST + 1)
        text = bytes(raw).decode("utf-8-sig")
        rows = json.loads(text) if text.lstrip().startswith("[") else _parse_csv(text)
        found = dict(map(_parse_row, rows))
    except FormatError as error:
        raise CheckpointError(f"--snapshots: {error}") from None
    except (*_UNREADABLE, csv.Error) as error:
        raise CheckpointError(
            f"--snapshots: {shown(said)} is no list of snapshots ({shown(error, 60)}); expected "
            "CSV with the columns file,step,sigma, or JSON: "
            '[{"file": "a.pt", "step": 1000, "sigma": 0.05}]'
        ) from None
    if len(raw) > _LONGEST_LIST or len(found) < len(rows) or not rows:
        raise CheckpointError(
            f"--snapshots: {shown(said)} is empty, lists a file twice, or is longer than 16 MiB"
        )
    return found


def _parse_csv(text: str) -> list[dict[str, str]]:
    """Return the rows of a CSV file by the names in its first line."""
    return [*csv.DictReader(text.splitlines(), skipinitialspace=True, strict=True)]


def _parse_row(row: Mapping[str, Any]) -> tuple[str, tuple[float, float]]:
    """Return the name of a file, and its step and sigma."""
    name, step, sigma = (row[column] for column in _COLUMNS)
    values = float(step), float(sigma)
    if isinstance(step, bool) or not all(map(_is_usable, values)):
        raise ValueError(f"step {step}, sigma {sigma}")
    return Path(name).name, values


def _is_usable(value: float) -> bool:
    return math.isfinite(value) and value > 0.0
