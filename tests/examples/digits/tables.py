"""The results of the digits as Markdown: each framework's, and how far they are apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tests.examples.digits.experiment import CONTENDERS
from tests.examples.proof.tables import Interval, find_interval, show

#: Name of a framework -> its results, one of each regime, as `make digits` writes them.
Results = Mapping[str, Sequence[Mapping[str, Any]]]


def make_page(results: Results) -> str:
    """Return the table of each regime, and the one that compares two frameworks.

    They are compared only where both were trained with the same seeds, two at least.
    """
    regimes = zip(*results.values(), strict=True)
    parts = [make_table(dict(zip(results, one, strict=True))) for one in regimes]
    seeds = {one["seeds"] for framework in results.values() for one in framework}
    if len(results) == 2 and len(seeds) == 1 and seeds != {1}:
        parts.append(make_agreement(results))
    return "\n\n".join(parts) + "\n"


def make_table(regime: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the results in one regime, in percent and points; a contender's stand together."""
    about = next(iter(regime.values()))["regime"]
    wrong = f", {about['wrong']:.0%} of the labels drawn at random" if about["wrong"] else ""
    name, rate, batch = about["name"], about["rate"], about["batch"]
    lines = [
        f"{name.capitalize()}: rate {rate:g}, batches of {batch}{wrong}.",
        "",
        "| model | framework | accuracy, % | over the newest | over the best single |",
        "| --- | --- | --- | --- | --- |",
    ]
    for k, name in enumerate(CONTENDERS):
        for framework, result in regime.items():
            row = result["rows"][k]
            gains = [_word_gain(row[over]) if name != over else "" for over in CONTENDERS[:2]]
            words = [name, framework, f"{100 * row['accuracy']:.2f}", *gains]
            lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines)


def _word_gain(gain: Mapping[str, Any]) -> str:
    mean, low, high = (100 * gain[name] for name in ("difference", "low", "high"))
    text = f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"
    return text if gain["verdict"] == "within noise" else f"**{text}**"


def find_gaps(results: Results) -> dict[str, list[Interval]]:
    """Return how far the second framework's gains over the newest are above the first's.

    The unit is a seed: its wrong labels are the same in both frameworks, and initial weights and
    the order of the rows are not.

    Returns:
        contender -> Student's 95 % interval in points, one a regime.
    """
    return {
        name: [
            find_interval(
                [
                    100 * (second - first)
                    for first, second in zip(
                        *(one["rows"][k][CONTENDERS[0]]["seeds"] for one in pair), strict=True
                    )
                ]
            )
            for pair in zip(*results.values(), strict=True)
        ]
        for k, name in enumerate(CONTENDERS)
        if k
    }


def make_agreement(results: Results) -> str:
    """Return a table of `find_gaps`."""
    first, second = results
    names = [one["regime"]["name"] for one in results[first]]
    lines = [
        f"| gain over the newest, {second} - {first} | {' | '.join(names)} |",
        f"|{' --- |' * (1 + len(names))}",
    ]
    for name, gaps in find_gaps(results).items():
        lines.append(f"| {name} | {' | '.join(show(gap, 2) for gap in gaps)} |")
    return "\n".join(lines)
