"""What the runs show: means, intervals over runs, and the tables made of them.

The unit is a seed: for each, the runs at all rates of a task are averaged first, as they share
their data and initial weights.  An interval is Student's for the mean of those numbers, so it says
what other seeds would give, and nothing about other tasks.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

#: 97.5 % quantiles of Student's t, by degrees of freedom.
STUDENT = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    8: 2.306,
    9: 2.262,
}
#: The tasks, in the order of the tables.
TASKS = ("digits", "MNIST", "characters", "regression")

Result = Mapping[str, Any]
Score = Mapping[str, float]


class Interval(NamedTuple):
    """A mean over seeds, and half the width of Student's 95 % interval."""

    mean: float
    half: float

    @property
    def is_beyond_noise(self) -> bool:
        """Whether 0 lies outside."""
        return abs(self.mean) > self.half


def find_interval(values: Sequence[float]) -> Interval:
    """Return Student's 95 % interval of a mean."""
    half = STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(statistics.fmean(values), half)


def find_error(score: Score) -> float:
    """Return the error in percent: of a classifier, or the part of a variance not explained."""
    return 100 * (1 - score["accuracy"] if "accuracy" in score else score["loss"])


def find_loss(score: Score) -> float:
    """Return the loss."""
    return score["loss"]


class Cell(NamedTuple):
    """The scores of the runs of one task, noise, rate and seed that are compared."""

    newest: Score  # at a constant rate
    average: Score  # of its last ten epochs
    late: Score  # the newest of a copy whose rate goes to 0 over those ten epochs
    cosine: Score  # the newest of a run whose rate goes to 0 over all epochs
    both: Score  # the average of that run


#: (family, whether there is noise) -> rate -> one cell a seed.
Cells = dict[tuple[str, bool], dict[float, list[Cell]]]


def pair(results: Iterable[Result]) -> Cells:
    """Put the two runs of each task, noise, rate and seed together."""
    found: dict[tuple[Any, ...], dict[bool, Result]] = {}
    for one in results:
        key = (one["family"], one["noise"] > 0, one["rate"], one["seed"])
        found.setdefault(key, {})[one["decayed"]] = one
    cells: Cells = {}
    for (family, noisy, rate, _), both in sorted(found.items(), key=lambda item: item[0][3]):
        constant, decayed = both[False], both[True]
        end = max(constant["singles"], key=int)
        cell = Cell(
            constant["singles"][end],
            constant["averages"][end],
            constant["decayed_late"],
            decayed["singles"][end],
            decayed["averages"][end],
        )
        cells.setdefault((family, noisy), {}).setdefault(rate, []).append(cell)
    return dict(sorted(cells.items(), key=lambda item: (TASKS.index(item[0][0]), item[0][1])))


def name_task(family: str, noisy: bool) -> str:
    """Return how tables name a task."""
    return f"{family}, noisy" if noisy else family


def compare(
    rates: Mapping[float, Sequence[Cell]],
    measure: Callable[[Score], float],
    ours: str,
    theirs: str,
) -> Interval:
    """Return the mean difference over seeds, each seed the mean of its rates."""
    seeds = zip(*rates.values(), strict=True)
    return find_interval(
        [
            statistics.fmean(
                measure(getattr(cell, ours)) - measure(getattr(cell, theirs)) for cell in seed
            )
            for seed in seeds
        ]
    )


def average_over(
    rates: Mapping[float, Sequence[Cell]], measure: Callable[[Score], float], name: str
) -> float:
    """Return the mean over all rates and seeds."""
    return statistics.fmean(
        measure(getattr(cell, name)) for cells in rates.values() for cell in cells
    )


def show(interval: Interval, digits: int) -> str:
    """Return a difference with its interval, bold where it is beyond noise."""
    text = f"{interval.mean:+.{digits}f} ± {interval.half:.{digits}f}"
    return f"**{text}**" if interval.is_beyond_noise else text


def make_summary(cells: Cells) -> str:
    """Return the README's table: errors in percent, means of all rates and seeds."""
    lines = [
        "| test error, % | newest | average | decayed late | cosine "
        "| average - newest | average - decayed late |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (family, noisy), rates in cells.items():
        means = [f"{average_over(rates, find_error, name):.2f}" for name in Cell._fields[:4]]
        gains = [
            show(compare(rates, find_error, "average", other), 2) for other in ("newest", "late")
        ]
        lines.append(f"| {' | '.join([name_task(family, noisy), *means, *gains])} |")
    return "\n".join(lines)


def make_details(
    cells: Cells,
    measure: Callable[[Score], float],
    digits: int,
    columns: Mapping[str, str],
) -> str:
    """Return a table of the guide with a row for each rate.

    Args:
        cells: the runs.
        measure: what is shown of a score.
        digits: decimal places.
        columns: field of a cell -> how the table calls it; the first heading is of "".
    """
    names = [name for name in columns if name]
    heads = [columns[""], "rate", *(columns[name] for name in names)]
    heads += ["average - newest", "average - late"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for (family, noisy), rates in cells.items():
        for rate in sorted(rates):
            one = {rate: rates[rate]}
            words = [name_task(family, noisy), f"{rate:g}"]
            words += [f"{average_over(one, measure, name):.{digits}f}" for name in names]
            words += [
                show(compare(one, measure, "average", other), digits)
                for other in ("newest", "late")
            ]
            lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines)


def make_errors(cells: Cells) -> str:
    """Return the guide's table of errors; it also has the average of the runs of a cosine."""
    names = dict(zip(Cell._fields, (*Cell._fields[:4], "its average"), strict=True))
    return make_details(cells, find_error, 2, {"": "test error, %", **names})


def make_losses(cells: Cells) -> str:
    """Return the guide's table of losses."""
    names = {name: name for name in Cell._fields[:4]}
    return make_details(cells, find_loss, 4, {"": "test loss", **names})


def find_best(rates: Mapping[float, Sequence[Cell]], name: str) -> list[float]:
    """Return the error of each seed at the rate whose mean error is the least."""
    every = [[find_error(getattr(cell, name)) for cell in seeds] for seeds in rates.values()]
    return min(every, key=statistics.fmean)


def compare_best(rates: Mapping[float, Sequence[Cell]], decay: str) -> Interval:
    """Return how far the average is above a decay, each at its best rate."""
    pairs = zip(find_best(rates, "average"), find_best(rates, decay), strict=True)
    return find_interval([ours - theirs for ours, theirs in pairs])


def make_best(cells: Cells) -> str:
    """Return the guide's table of what each column gives at its own best rate.

    Rates are chosen by the errors that are shown, for all columns alike.
    """
    lines = [
        "| test error, % | newest | average | late | cosine | average - the better decay |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (family, noisy), rates in cells.items():
        best = {name: find_best(rates, name) for name in Cell._fields[:4]}
        better = min(("late", "cosine"), key=lambda name: statistics.fmean(best[name]))
        words = [name_task(family, noisy)]
        words += [f"{statistics.fmean(errors):.2f}" for errors in best.values()]
        words.append(show(compare_best(rates, better), 2))
        lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines)


class Counts(NamedTuple):
    """How many runs at a constant rate there are, and in how many what is better."""

    pairs: int
    newest: int  # the average over the newest
    late: int  # the average over its copy whose rate is decayed late
    cosine: int  # the average over the run whose rate is decayed throughout
    both: int  # the average of that run over its newest


def count(cells: Cells, measure: Callable[[Score], float]) -> Counts:
    """Count over all runs."""
    every = [cell for rates in cells.values() for seeds in rates.values() for cell in seeds]

    def count_better(ours: str, theirs: str) -> int:
        return sum(measure(getattr(cell, ours)) < measure(getattr(cell, theirs)) for cell in every)

    return Counts(
        pairs=len(every),
        newest=count_better("average", "newest"),
        late=count_better("average", "late"),
        cosine=count_better("average", "cosine"),
        both=count_better("both", "cosine"),
    )


def make_page(cells: Cells) -> str:
    """Return all tables and counts."""
    parts = [
        make_summary(cells),
        make_errors(cells),
        make_losses(cells),
        make_best(cells),
        *(f"{name}: {counts}" for name, counts in describe_counts(cells).items()),
    ]
    return "\n\n".join(parts) + "\n"


def describe_counts(cells: Cells) -> dict[str, str]:
    """Return by error and by loss how often an average is the better one."""
    found = {}
    for name, measure in (("error", find_error), ("loss", find_loss)):
        one = count(cells, measure)
        found[name] = (
            f"of {one.pairs} runs at a constant rate, the average is better than the newest in "
            f"{one.newest}, than the rate decayed late in {one.late}, and than a cosine in "
            f"{one.cosine}; after a cosine, the average is better than the newest in {one.both}"
        )
    return found
