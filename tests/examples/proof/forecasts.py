"""How well an average tells what annealing would have given, each task held out in turn.

`python -m tests.examples.proof.forecasts` prints the guide's table from the kept results.  A trial
is a run at a constant rate at epoch 20: it is annealed for five epochs, and the forecast is made of
the checkpoints up to there.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from polyak_cli.evaluation import forecast
from tests.examples.proof import __main__ as program
from tests.examples.proof.tables import TASKS

#: The share of trials in the other tasks that the interval covers, from which its width is found.
LEVEL = 0.95
FORK = 20


class Trial(NamedTuple):
    """One run."""

    family: str
    annealed: float  # the losses
    average: float
    newest: float
    movement: float

    @property
    def surprise(self) -> float:
        """How far the annealed loss is from the average's, in logarithms and units of movement."""
        return abs(math.log(self.annealed / self.average)) / self.movement


def list_trials(results: Iterable[Mapping[str, Any]]) -> list[Trial]:
    """Return the trials of all runs at a constant rate."""
    return [make_trial(run) for run in results if not run["decayed"]]


def make_trial(run: Mapping[str, Any]) -> Trial:
    """Return the trial of a run."""
    losses = [run["singles"][str(k)]["loss"] for k in range(FORK - 9, FORK + 1)]
    average = run["recent"][str(FORK)]["loss"]
    return Trial(
        run["family"],
        run["annealed"][str(FORK)]["loss"],
        average,
        losses[-1],
        forecast.find_movement(losses, average),
    )


def find_width(trials: Sequence[Trial]) -> float:
    """Return the width that covers as many trials as `LEVEL` says."""
    return float(np.quantile([trial.surprise for trial in trials], LEVEL))


def cover(trials: Sequence[Trial], width: float) -> float:
    """Return the share of trials that an interval of this width covers."""
    return float(np.mean([trial.surprise <= width for trial in trials]))


class Row(NamedTuple):
    """One task, held out."""

    trials: int
    average: float  # mean distances of the losses from the annealed
    newest: float
    width: float  # found in the other tasks
    covered: float
    half: float  # the median of half the interval, as a part of the loss


def hold_out(trials: Sequence[Trial]) -> dict[str, Row]:
    """Return for each task what the others foretell of it."""
    found = {}
    for name in TASKS:
        own = [trial for trial in trials if trial.family == name]
        width = find_width([trial for trial in trials if trial.family != name])
        found[name] = Row(
            len(own),
            float(np.mean([abs(trial.annealed - trial.average) for trial in own])),
            float(np.mean([abs(trial.annealed - trial.newest) for trial in own])),
            width,
            cover(own, width),
            float(np.median([math.expm1(width * trial.movement) for trial in own])),
        )
    return found


def make_table(trials: Sequence[Trial]) -> str:
    """Return the tasks, each held out in turn, and all of them."""
    lines = [
        "| task held out | trials | off: average | off: newest | interval, about | covered |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    rows = hold_out(trials)
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row.trials} | {row.average:.4f} | {row.newest:.4f} | ± {row.half:.0%} "
            f"| {row.covered:.0%} |"
        )
    covered = sum(row.trials * row.covered for row in rows.values()) / len(trials)
    lines.append(f"| all | {len(trials)} | | | | {covered:.0%} |")
    return "\n".join(lines)


def main() -> int:
    """Print the table, and the width that all tasks give."""
    trials = list_trials(program.read(program.RESULTS))
    print(make_table(trials))
    print(f"\nwidth of all tasks: {find_width(trials):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
