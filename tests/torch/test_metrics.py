"""`evaluate --metric`: a function of the user's own, compared row by row where it can be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from polyak_cli import compare, evaluate
from polyak_cli.errors import PolyakError, UsageError
from polyak_cli.evaluation import data
from tests.command import polyak
from tests.torch.test_evaluate import CLASSES, NUMBERS, ROWS, X, make_net, run_plainly, write_code

METRICS = """
import numpy as np

def in_two_best(labels, predictions):
    return (np.argsort(predictions, axis=1)[:, -2:] == labels[:, None]).any(1)

def total(labels, predictions):
    return predictions.sum()

def wrong(labels, predictions):
    return predictions
"""


def save_two(tmp_path: Path) -> list[np.ndarray]:
    """Save two checkpoints, and return the probabilities that PyTorch gives."""
    torch.manual_seed(5)
    found = []
    for name in ("a.pt", "b.pt"):
        net = make_net()
        torch.save(net.state_dict(), tmp_path / name)
        found.append(run_plainly(net).softmax(1).numpy())
    write_code(tmp_path, METRICS, "own.py")
    return found


def test_a_metric_of_each_row_is_compared_row_by_row(tmp_path: Path) -> None:
    """The mean is shown, and the difference has an interval and a p, and decides."""
    theirs, ours = save_two(tmp_path)
    second = [(np.sort(p, axis=1)[:, 1] <= p[range(len(p)), CLASSES]) for p in (ours, theirs)]
    np.savez(tmp_path / "rows.npz", x=X, y=CLASSES)
    source = f"{write_code(tmp_path)}:make"
    metric = f"{tmp_path}/own.py:in_two_best"
    found = compare(tmp_path / "b.pt", tmp_path / "a.pt", ROWS, model=source, metric=metric)
    assert found.models[0].score.metrics["in_two_best"] == pytest.approx(second[0].mean())
    gain = found.models[0].gains[0]
    assert gain.metric == "in_two_best"
    assert gain.paired.difference == pytest.approx(second[0].mean() - second[1].mean())
    options = ("--model", "net.py:make", "--metric", "own.py:in_two_best", "--data", "rows.npz")
    done = polyak("evaluate", "b.pt", "--baseline", "a.pt", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "a sign-flip test (in_two_best, loss)" in done.stdout


def test_a_metric_of_all_rows_is_shown_and_not_compared(tmp_path: Path) -> None:
    """A note says why."""
    probabilities, _ = save_two(tmp_path)
    source = f"{write_code(tmp_path)}:make"
    metric = f"{tmp_path}/own.py:total"
    (score,) = evaluate(tmp_path / "a.pt", ROWS, model=source, metric=metric)
    assert score.metrics["total"] == pytest.approx(probabilities.sum(), rel=1e-6)
    assert score.notes == (
        "its total is one number for all rows, so it is not compared row by row",
    )
    found = compare(tmp_path / "b.pt", tmp_path / "a.pt", ROWS, model=source, metric=metric)
    assert [gain.metric for gain in found.models[0].gains] == ["accuracy", "loss"]


def test_what_is_no_metric_is_refused(tmp_path: Path) -> None:
    """A name that is no function, numbers of another shape, and accuracy without classes."""
    save_two(tmp_path)
    source = f"{write_code(tmp_path)}:make"
    with pytest.raises(UsageError, match="--metric f1: expected accuracy, MODULE"):
        evaluate(tmp_path / "a.pt", ROWS, model=source, metric="f1")
    with pytest.raises(PolyakError, match="one for each of the 203 rows"):
        list(evaluate(tmp_path / "a.pt", ROWS, model=source, metric=f"{tmp_path}/own.py:wrong"))
    torch.save(torch.nn.Linear(4, 1).state_dict(), tmp_path / "n.pt")
    one = write_code(
        tmp_path, "import torch\n\ndef make():\n    return torch.nn.Linear(4, 1)\n", "n.py"
    )
    with pytest.raises(PolyakError, match="are not classes"):
        list(
            evaluate(
                tmp_path / "n.pt",
                data.Split("rows", X, NUMBERS),
                model=f"{one}:make",
                metric="accuracy",
            )
        )
