"""The example on digits: guide and README show the results of both frameworks, which agree."""

from __future__ import annotations

import dataclasses
from typing import Any

from tests.examples.digits import experiment, tables
from tests.examples.digits.__main__ import RESULTS, ROOT, read

GUIDE = (ROOT / "polyak_cli/guide/when.md").read_text()


def test_the_guide_shows_the_results() -> None:
    """The tables, made again from all numbers, are in the guide line by line."""
    results = read(RESULTS)
    assert [*results] == ["Keras", "PyTorch"]
    regimes = [dataclasses.asdict(regime) for regime in experiment.REGIMES]
    for one in results.values():
        assert [result["regime"] for result in one] == regimes
        assert {result["seeds"] for result in one} == {experiment.SEEDS}
    assert tables.make_page(results) == (RESULTS / "digits.md").read_text()
    for pair in zip(*results.values(), strict=True):
        assert tables.make_table(dict(zip(results, pair, strict=True))) in GUIDE
    assert tables.make_agreement(results) in GUIDE


def test_pytorch_gains_what_keras_gains() -> None:
    """In each regime and for each contender, within the 95 % interval over seeds."""
    gaps = tables.find_gaps(read(RESULTS))
    assert [*gaps] == [*experiment.CONTENDERS[1:]]
    every = [gap for row in gaps.values() for gap in row]
    assert len(every) == 15
    assert [gap for gap in every if gap.is_beyond_noise] == []


def list_gains(framework: str, name: str) -> list[Any]:
    """Return what a contender gained over the newest, one a regime."""
    k = experiment.CONTENDERS.index(name)
    return [regime["rows"][k]["newest"] for regime in read(RESULTS)[framework]]


def test_the_words_carry_the_figures() -> None:
    """README and guide say what seeds and recalibration did, and where frameworks differ."""
    readme, guide = (" ".join(t.split()) for t in ((ROOT / "README.md").read_text(), GUIDE))
    keras, torch = (list_gains(name, "average") for name in ("Keras", "PyTorch"))
    means = [f"{100 * gains[2]['difference']:.2f}" for gains in (keras, torch)]
    assert "{} points of accuracy in Keras and {} in PyTorch".format(*means) in readme
    wins = [sum(gain > 0 for gain in gains[k]["seeds"]) for k in (1, 2) for gains in (keras, torch)]
    assert wins == [6, 4, 8, 8]
    largest = [f"{100 * max(gains[1]['seeds']):.1f}" for gains in (keras, torch)]
    assert "({} points of Keras's, {} of PyTorch's)".format(*largest) in guide
    assert keras[1]["high"] < torch[1]["low"]  # over images they do differ


def test_the_words_on_recalibration_carry_the_figures() -> None:
    """What it changes in an average, and what it gives back to an EMA."""
    guide = " ".join(GUIDE.split())
    changes = {
        name: [
            100 * (after["difference"] - before["difference"])
            for before, after in zip(
                list_gains(name, "average"), list_gains(name, "average, recalibrated"), strict=True
            )
        ]
        for name in ("Keras", "PyTorch")
    }
    assert max(abs(change) for one in changes.values() for change in one[:2]) < 0.055
    last = " and ".join(f"{one[2]:+.2f} ({name})" for name, one in changes.items())
    assert f"at most 0.05 points in the first two regimes, and by {last} in the last" in guide
    before, after = (list_gains("PyTorch", f"EMA{end}")[1] for end in ("", ", recalibrated"))
    gaps = [100 * (b - a) for a, b in zip(before["seeds"], after["seeds"], strict=True)]
    assert [f"{gap:.0f}" for gap in gaps if gap > 1] == ["7", "14"]
    assert "in two of PyTorch's seeds at the high rate it lost 7 and 14 points" in guide
