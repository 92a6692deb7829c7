"""The example on digits: the guide agrees with its results, and they can be reproduced."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests.examples import digits

RESULTS = Path(digits.__file__).parent / "results"


def test_the_guide_shows_the_results() -> None:
    """The table of each regime, made again from all numbers, is in the guide line by line."""
    page = (digits.ROOT / "polyak_cli/guide/when.md").read_text()
    results = json.loads((RESULTS / "digits.json").read_text())
    known = [dataclasses.asdict(regime) for regime in digits.REGIMES]
    assert [result["regime"] for result in results] == known
    for result in results:
        assert result["seeds"] == digits.SEEDS
        assert digits.table(result["regime"], result["rows"]) in page


@pytest.mark.soak
def test_averaging_pays_where_the_newest_checkpoint_wanders(tmp_path: Path) -> None:
    """With wrong labels, the average beats the newest beyond noise; else they are equal."""
    calm, _, wrong = digits.REGIMES
    gains = {}
    for regime in (calm, wrong):
        rows = {row["name"]: row for row in digits.experiment(regime, 2, tmp_path)}
        assert rows.keys() == {*digits.CONTENDERS}
        gains[regime.name] = rows["average"]["newest"]
    assert gains[wrong.name]["low"] > 0
    assert gains[wrong.name]["verdict"] == "better"
    assert abs(gains[calm.name]["difference"]) < 0.01
    assert list(tmp_path.iterdir()) == []
