"""The example on digits in Keras: its results can be reproduced, and its runs copied."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples.digits import experiment
from tests.examples.digits.in_keras import KERAS
from tests.examples.proof import digits_cnn


@pytest.mark.slow
def test_a_copy_of_a_run_of_the_proof_goes_on_in_the_same_way(tmp_path: Path) -> None:
    """Momentum and the order of the rows are copied, and files score as `evaluate` says."""
    keras = pytest.importorskip("keras")
    task = digits_cnn.Digits()
    run = task.begin(0.1, 0.2, 0)
    run.train_epoch(lambda _: 1.0)
    copy = run.fork()
    scores = []
    for name, one in (("a", run), ("b", copy)):
        one.train_epoch(lambda share: 1 - share)
        one.save(tmp_path / f"{name}.keras")
        scores.append(task.score(tmp_path / f"{name}.keras"))
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    _, _, x, y = digits_cnn.load()
    found = keras.models.load_model(tmp_path / "a.keras").evaluate(x, y, verbose=0)
    assert scores[0] == pytest.approx({"loss": found[0], "accuracy": found[1]}, abs=1e-4)


@pytest.mark.soak
def test_averaging_pays_where_the_newest_checkpoint_wanders(tmp_path: Path) -> None:
    """With wrong labels, the average beats the newest beyond noise; else they are equal."""
    calm, _, wrong = experiment.REGIMES
    gains = {}
    for regime in (calm, wrong):
        rows = {row["name"]: row for row in experiment.experiment(KERAS, regime, 2, tmp_path)}
        assert rows.keys() == {*experiment.CONTENDERS}
        gains[regime.name] = rows["average"]["newest"]
    assert gains[wrong.name]["low"] > 0
    assert gains[wrong.name]["verdict"] == "better"
    assert abs(gains[calm.name]["difference"]) < 0.01
    assert list(tmp_path.iterdir()) == []
