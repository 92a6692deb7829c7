"""The example on digits in PyTorch: the network is Keras's, and its results can be reproduced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.examples.digits import experiment, in_keras, in_torch
from tests.torch.test_keras import run

STEPS, BATCH = 3, 16


def test_the_network_and_its_training_are_those_of_keras(tmp_path: Path) -> None:
    """From the same weights come the same outputs, and after three steps the same tensors."""
    pytest.importorskip("optree")  # Keras's
    code = "from tests.torch import test_digits; test_digits.print_gaps()"
    done = run("-c", code, backend="torch", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    gaps = json.loads(done.stdout.splitlines()[-1])
    assert gaps.keys() == {"outputs", "steps", "weights", "variances", "ema"}
    assert gaps.pop("steps") > 0.01  # training does something
    assert {name: gap for name, gap in gaps.items() if gap > 1e-5} == {}


def print_gaps() -> None:
    """Print the largest differences of the two networks, trained on the same batches."""
    theirs, ours = in_keras.network(0.1), in_torch.network()
    names = [name for name in ours.state_dict() if "num_batches" not in name]
    start = dict(zip(names, map(convert, theirs.weights), strict=True))
    ours.load_state_dict(start, strict=False)
    training = in_torch.Training(ours, 0.1)
    rows = experiment.images()[0]
    x, y = np.asarray(rows.features), np.asarray(rows.labels)
    outputs = ours.eval()(torch.tensor(x)).softmax(1).detach() - torch.tensor(theirs.predict(x))
    ours.train()
    for k in range(STEPS):
        batch = slice(k * BATCH, (k + 1) * BATCH)
        theirs.train_on_batch(x[batch], y[batch])
        training.step(torch.tensor(x[batch]), torch.tensor(y[batch]))
    found = ours.state_dict()
    wanted = dict(zip(names, map(convert, theirs.weights), strict=True))
    kept = 0.9**STEPS  # of the first variance, which is 1
    for name, pixels in (("3.running_var", 64), ("7.running_var", 16)):
        n = BATCH * pixels  # PyTorch divides by n - 1
        wanted[name] = kept + (wanted[name] - kept) * n / (n - 1)
    variances = [name for name in names if "running_var" in name]
    trained = [name for name, _ in ours.named_parameters()]
    means = map(convert, theirs.optimizer._model_variables_moving_average)
    ema = training.ema.module.state_dict()
    gaps = {
        "outputs": outputs.abs().max(),
        "steps": max((found[name] - start[name]).abs().max() for name in trained),
        "weights": max((found[n] - wanted[n]).abs().max() for n in {*names} - {*variances}),
        "variances": max((found[n] / wanted[n] - 1).abs().max() for n in variances),
        "ema": max((ema[n] - m).abs().max() for n, m in zip(trained, means, strict=True)),
    }
    print(json.dumps({name: float(gap) for name, gap in gaps.items()}))


def convert(variable: Any) -> torch.Tensor:
    """Return a tensor of Keras as PyTorch orders its axes."""
    value = variable.value.detach().clone()
    return value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T if value.ndim == 2 else value


@pytest.mark.soak
def test_averaging_pays_where_the_newest_checkpoint_wanders(tmp_path: Path) -> None:
    """With wrong labels, the average of PyTorch's checkpoints beats the newest beyond noise."""
    found = experiment.experiment(in_torch.TORCH, experiment.REGIMES[2], 2, tmp_path)
    rows = {row["name"]: row for row in found}
    assert rows.keys() == {*experiment.CONTENDERS}
    assert rows["average"]["newest"]["low"] > 0
    assert rows["average"]["newest"]["verdict"] == "better"
    assert list(tmp_path.iterdir()) == []
