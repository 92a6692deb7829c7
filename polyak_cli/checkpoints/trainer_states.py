"""Read metrics from the `trainer_state.json` that a Trainer writes into each checkpoint.

``log_history`` has the evaluations with their steps, ``global_step`` the checkpoint's own step, and
``best_metric`` and ``best_model_checkpoint`` what the Trainer itself takes for the best.  A state
is a stranger's text: every field is checked before it is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from polyak_cli.checkpoints.directions import guess_mode
from polyak_cli.errors import CheckpointError, FormatError, UsageError, list_some, shown
from polyak_cli.storage import open_input

NAME = "trainer_state.json"
#: Bytes that a state may have; one with a million lines of logs has 100 MB.
_LONGEST = 256 << 20
#: The metric where neither the user nor the Trainer names one.
_DEFAULT = "eval_loss"


class Measured(NamedTuple):
    """The metric of each checkpoint."""

    monitor: str
    better: str  # "min" or "max"
    values: list[float]
    notes: list[str]


@dataclass(frozen=True, slots=True)
class _State:
    """What the state of one checkpoint says."""

    path: Path
    step: int
    logs: Sequence[Mapping[str, Any]]  # only entries with a whole number as their step
    best_metric: float | None
    best: str  # the name of the best checkpoint's folder; "" if there is none

    def find_values(self, metric: str) -> dict[int, float]:
        """Return step -> value of a metric; of a step that was logged twice, the later."""
        return {one["step"]: float(one[metric]) for one in self.logs if _is_number(one.get(metric))}

    def list_metrics(self) -> list[str]:
        """Return the metrics of the evaluations, or of all logs if there was none."""
        names = dict.fromkeys(key for one in self.logs for key in one if _is_number(one[key]))
        evaluated = [name for name in names if name.startswith("eval_")]
        return evaluated or [name for name in names if name not in ("step", "epoch")]


def has_state(path: Path) -> bool:
    """Return whether a checkpoint is a folder with the state of a Trainer."""
    return (path / NAME).is_file()


def read_metrics(paths: Sequence[Path], monitor: str | None, mode: str | None) -> Measured:
    """Return the metric of each checkpoint at its own step.

    Args:
        paths: the folders, oldest first.
        monitor: the metric, with or without ``eval_``; None for the one by which the Trainer found
            its best checkpoint, or else eval_loss.
        mode: "min" or "max", whichever is better; None to find out.

    Raises:
        CheckpointError: a state is missing or damaged, or has no such metric at its step.
        UsageError: it is not known whether less or more is better.
    """
    states = [_read_state(path / NAME) for path in paths]
    metric = _choose_metric(states[-1], monitor)
    better = mode or guess_mode(metric) or _guess_by_best(states[-1], metric)
    if better is None:
        raise UsageError(
            f"--monitor {shown(metric)}: neither its name nor {NAME} says whether less or more is "
            "better: give --mode min or --mode max"
        )
    values = [_find_value(state, metric) for state in states]
    notes = [f"{shown(metric)} is that of each checkpoint's {NAME} ({better} is better)"]
    best = states[-1].best
    is_here = best in {path.name for path in paths}
    if not is_here and _is_metric_of_best(states[-1], metric):
        notes.append(f"{shown(best)}, the best checkpoint by the Trainer, is not among these")
    return Measured(metric, better, values, notes)


def _is_number(value: Any) -> bool:
    """Return whether a value is a number that a float can hold."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 1 << 63)


def _read_state(path: Path) -> _State:
    """Read the state of one checkpoint."""
    try:
        with open_input(path) as file:
            raw = file.read(0, _LONGEST + 1)
    except FormatError as error:
        raise CheckpointError(f"{error}; --best reads the metric from it") from None
    try:
        said = json.loads(raw) if len(raw) <= _LONGEST else None
    except (ValueError, RecursionError):
        said = None
    history = said.get("log_history") if isinstance(said, dict) else None
    step = said.get("global_step") if isinstance(said, dict) else None
    if not isinstance(said, dict) or not isinstance(history, list) or type(step) is not int:
        raise CheckpointError(
            f"{shown(path)}: is damaged: it has no log_history or no global_step, where --best "
            "looks for the metric"
        )
    logs = [one for one in history if isinstance(one, dict) and type(one.get("step")) is int]
    metric, best = said.get("best_metric"), said.get("best_model_checkpoint")
    return _State(
        path,
        step,
        logs,
        float(metric) if metric is not None and _is_number(metric) else None,
        PurePosixPath(best).name if isinstance(best, str) else "",
    )


def _choose_metric(newest: _State, monitor: str | None) -> str:
    """Return the metric's name as the logs have it."""
    if monitor is None:
        metrics = newest.list_metrics()
        return next((one for one in metrics if _is_metric_of_best(newest, one)), _DEFAULT)
    # Trainer's metric_for_best_model leaves out the "eval_" too.
    prefixed = f"eval_{monitor}"
    return prefixed if newest.find_values(prefixed) else monitor


def _is_metric_of_best(state: _State, metric: str) -> bool:
    """Return whether the best checkpoint's value of a metric is what the Trainer calls the best."""
    step = state.best.rpartition("-")[2]
    if state.best_metric is None or not re.fullmatch(r"\d{1,18}", step):
        return False
    return state.find_values(metric).get(int(step)) == state.best_metric


def _guess_by_best(state: _State, metric: str) -> str | None:
    """Return whether the best value is the least or the greatest of all; None if neither."""
    values = state.find_values(metric).values()
    if not _is_metric_of_best(state, metric) or len({*values}) < 2:
        return None
    ends = {"min": min(values), "max": max(values)}
    return next((mode for mode, end in ends.items() if end == state.best_metric), None)


def _find_value(state: _State, metric: str) -> float:
    """Return a checkpoint's metric at its own step."""
    values = state.find_values(metric)
    if state.step in values:
        return values[state.step]
    if not values:
        found = list_some(state.list_metrics()) or "no metric at all"
        raise CheckpointError(
            f"{shown(state.path)}: has no {shown(metric)}; choose --monitor from {found}"
        )
    steps = ", ".join(map(str, sorted(values)[-3:]))
    raise CheckpointError(
        f"{shown(state.path)}: has no {shown(metric)} at step {state.step}, when this checkpoint "
        f"was saved (the last are of the steps {steps}); leave it out with --exclude, or give a "
        "log with --log"
    )
