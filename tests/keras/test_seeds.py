"""What averaging does over many seeds of the sample network, whatever the digits of one seed.

The tutorial's figures show one run.  Here, each seed is a run of its own, of 500 epochs, whose last
ten checkpoints are scored alone and averaged over every window, on all 1,000 test points.
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pytest

from polyak_cli import pipeline
from polyak_cli.averaging import writing
from polyak_cli.evaluation import candidates, data, sample_run

pytestmark = pytest.mark.soak
SEEDS, LAST = 10, 10
SCHEMES = ("equal", "linear", "exp")
Accuracies = dict[str, npt.NDArray[np.float64]]


def accuracy(path: Path, rows: data.Split) -> float:
    """Return the share of rows classified correctly, by the formula of the network in numpy."""
    with h5py.File(path) as file:
        tensors = {}
        file["model_weights"].visititems(
            lambda name, item: tensors.update({name: item[()]} if hasattr(item, "shape") else {})
        )
    ordered = [tensors[name] for name in sorted(tensors)]
    hidden_bias, hidden_kernel, bias, kernel = (np.asarray(t, np.float64) for t in ordered)
    hidden = np.maximum(np.asarray(rows.features) @ hidden_kernel + hidden_bias, 0)
    return float(np.mean((hidden @ kernel + bias).argmax(axis=1) == rows.labels))


@pytest.fixture(scope="module")
def accuracies(tmp_path_factory: pytest.TempPathFactory) -> Accuracies:
    """Return (seeds, 10) accuracies: of single models, and of each scheme over windows 1 to 10."""
    rows = data.load("blobs").split()
    found: dict[str, list[list[float]]] = {name: [] for name in ("single", *SCHEMES)}
    for seed in range(SEEDS):
        folder = tmp_path_factory.mktemp(f"seed_{seed}")
        report = sample_run.train(folder, seed=seed, keep=LAST)
        found["single"].append([accuracy(path, rows) for path in report.checkpoints])
        plan = pipeline.plan(folder)
        chosen = [("equal", None), ("linear", None), ("exp", 2.0)]
        averages = candidates.list_candidates(plan.positions, range(1, LAST + 1), chosen)[LAST:]
        outputs = [folder / f"average_{k}.out.h5" for k in range(len(averages))]
        writing.write_several(plan, [average.mean for average in averages], outputs)
        for k, name in enumerate(SCHEMES):
            own = outputs[k * LAST : (k + 1) * LAST]
            found[name].append([accuracy(path, rows) for path in own])
    return {name: np.array(values) for name, values in found.items()}


def test_a_window_of_one_is_the_newest_model(accuracies: Accuracies) -> None:
    """Every scheme begins with the newest, and with ten checkpoints the schemes differ."""
    for name in SCHEMES:
        assert accuracies[name].shape == (SEEDS, LAST)
        assert np.array_equal(accuracies[name][:, 0], accuracies["single"][:, -1])
    assert not np.array_equal(accuracies["equal"], accuracies["exp"])


def test_accuracy_spreads_less_over_windows_than_over_models(accuracies: Accuracies) -> None:
    """The number of averaged checkpoints matters less than the choice of a single one."""
    singles = accuracies["single"].std(axis=1).mean()
    for name in SCHEMES:
        assert accuracies[name].std(axis=1).mean() < singles


def test_the_average_is_no_worse_than_the_mean_model(accuracies: Accuracies) -> None:
    """This holds for ten checkpoints and any scheme, within two standard errors over the seeds."""
    mean = accuracies["single"].mean(axis=1)
    for name in SCHEMES:
        gains = accuracies[name][:, -1] - mean
        assert gains.mean() > -2 * gains.std(ddof=1) / np.sqrt(SEEDS)


def test_exp_is_the_flattest_line(accuracies: Accuracies) -> None:
    """Its accuracy changes least from window to window, as the oldest hardly count."""
    steps = {name: np.abs(np.diff(accuracies[name], axis=1)).mean() for name in SCHEMES}
    assert steps["exp"] < min(steps["equal"], steps["linear"])
