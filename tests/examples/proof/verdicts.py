"""How well numbers without data tell whether averaging pays, in tasks that they were not fitted to.

`python -m tests.examples.proof.verdicts` prints the guide's tables from the kept results.

A window of ten checkpoints *pays* if its average's loss is at least 2 % below that of its newest
checkpoint.  That was fixed before any run was made.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np

from polyak_cli.examining import verdict
from tests.examples.proof import __main__ as program
from tests.examples.proof.scales import SCALES
from tests.examples.proof.tables import TASKS
from tests.training import Array

PAYS = 0.02
#: Windows of a task below which a share is not given.
FEWEST = 10


class Window(NamedTuple):
    """Ten checkpoints of a run."""

    family: str
    decayed: bool
    gain: float  # of the average over the newest, of the newest's loss
    numbers: Mapping[str, float]

    @property
    def pays(self) -> bool:
        """Whether averaging it pays."""
        return self.gain >= PAYS


def list_windows(results: Iterable[Mapping[str, Any]]) -> list[Window]:
    """Return the windows of all runs."""
    return [
        Window(
            run["family"],
            run["decayed"],
            1 - run["averages"][end]["loss"] / run["singles"][end]["loss"],
            {**numbers, "rate": run["rate"]},
        )
        for run in results
        for end, numbers in run["numbers"].items()
    ]


def find_area(paying: Sequence[float] | Array, other: Sequence[float] | Array) -> float:
    """Return the area under ROC: how often a paying window has more, ties counted half."""
    a, b = np.asarray(paying)[:, None], np.asarray(other)[None, :]
    return float(np.mean((a > b) + 0.5 * (a == b)))


def correlate_ranks(one: Sequence[float] | Array, other: Sequence[float] | Array) -> float:
    """Return Spearman's correlation; ties have the mean of their ranks."""
    return float(np.corrcoef(_rank(one), _rank(other))[0, 1])


def _rank(values: Sequence[float] | Array) -> Array:
    array = np.asarray(values)
    below = (array[None, :] < array[:, None]).sum(1)
    equal = (array[None, :] == array[:, None]).sum(1)
    return np.asarray(below + (equal + 1) / 2)


def find_threshold(values: Array, pays: Array) -> float:
    """Return the threshold of the best balanced accuracy."""
    return float(max(np.unique(values), key=lambda limit: balance(values >= limit, pays)))


def balance(said: Array, pays: Array) -> float:
    """Return the mean of the shares of paying and of other windows that are recognised."""
    return float((said[pays].mean() + (~said)[~pays].mean()) / 2)


class Row(NamedTuple):
    """How well one scale does.

    Attributes:
        within: area under ROC in each task.
        across: the mean of the areas between the paying windows of a task and the others of
            another, over all pairs of tasks.
        least: the smallest of them.
        correlation: Spearman's with the gain, over all tasks together.
        correlations: the same in each task.
        balanced: the balanced accuracy in each task of the threshold that is best in the others.
    """

    within: tuple[float, ...]
    across: float
    least: float
    correlation: float
    correlations: tuple[float, ...]
    balanced: tuple[float, ...]


def judge(windows: Sequence[Window], scale: Any) -> Row:
    """Measure how well a scale does."""
    values = {
        name: np.array([scale(w.numbers) for w in windows if w.family == name]) for name in TASKS
    }
    pays = {name: np.array([w.pays for w in windows if w.family == name]) for name in TASKS}
    gains = {name: np.array([w.gain for w in windows if w.family == name]) for name in TASKS}
    between = [
        find_area(values[one][pays[one]], values[other][~pays[other]])
        for one, other in permutations(TASKS, 2)
    ]
    balanced = []
    for name in TASKS:
        rest = [other for other in TASKS if other != name]
        limit = find_threshold(
            np.concatenate([values[other] for other in rest]),
            np.concatenate([pays[other] for other in rest]),
        )
        balanced.append(balance(values[name] >= limit, pays[name]))
    return Row(
        tuple(find_area(values[name][pays[name]], values[name][~pays[name]]) for name in TASKS),
        float(np.mean(between)),
        min(between),
        correlate_ranks(np.concatenate([*values.values()]), np.concatenate([*gains.values()])),
        tuple(correlate_ranks(values[name], gains[name]) for name in TASKS),
        tuple(balanced),
    )


def make_table(windows: Sequence[Window]) -> str:
    """Return how well each scale does, the best across tasks first."""
    lines = [
        "| scale | in a task | across | least | rank, all | rank, in a task | held out |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = {name: judge(windows, scale) for name, scale in SCALES.items()}
    for name, row in sorted(rows.items(), key=lambda item: -item[1].across):
        lines.append(
            f"| {name} | {_range(row.within)} | {row.across:.2f} | {row.least:.2f} "
            f"| {row.correlation:+.2f} | {_range(row.correlations, '+')} "
            f"| {_range(row.balanced)} |"
        )
    return "\n".join(lines)


def measure_words(windows: Sequence[Window]) -> dict[str, verdict.Shares]:
    """Return how often averaging pays and loses for each word, in the tasks that have it.

    Tasks with fewer than ten such windows are left out, as their shares would say little.
    """
    found: dict[str, dict[str, list[Window]]] = {}
    for one in windows:
        word = verdict.choose_word(one.numbers["cosine"], one.numbers["shrinkage"])
        found.setdefault(word, {}).setdefault(one.family, []).append(one)
    shares = {}
    for word, tasks in found.items():
        many = [listed for listed in tasks.values() if len(listed) >= FEWEST]
        paid = [sum(one.pays for one in listed) / len(listed) for listed in many]
        lost = [sum(one.gain <= -PAYS for one in listed) / len(listed) for listed in many]
        shares[word] = verdict.Shares((min(paid), max(paid)), (min(lost), max(lost)))
    return shares


def make_word_table(windows: Sequence[Window]) -> str:
    """Return for each word and task how many windows there are, and how many pay and lose."""
    lines = [
        f"| word | {' | '.join(TASKS)} |",
        f"| --- |{' --- |' * len(TASKS)}",
    ]
    for word in verdict.MEASURED:
        cells = []
        for name in TASKS:
            listed = [
                one
                for one in windows
                if one.family == name
                and verdict.choose_word(one.numbers["cosine"], one.numbers["shrinkage"]) == word
            ]
            paid, lost = sum(o.pays for o in listed), sum(o.gain <= -PAYS for o in listed)
            cells.append(f"{len(listed)}: {paid} paid, {lost} lost" if listed else "none")
        lines.append(f"| {word} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _range(values: Sequence[float], sign: str = "") -> str:
    return f"{min(values):{sign}.2f} to {max(values):{sign}.2f}"


def main() -> int:
    """Print the tables."""
    windows = list_windows(program.read(program.RESULTS))
    print(make_table(windows))
    print(f"\n{make_word_table(windows)}\n")
    for word, shares in measure_words(windows).items():
        print(f"{word}: {shares}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
