"""`--metric`: a function of the user's own, compared row by row where it can be, and chosen by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyak_cli import compare, evaluate, sweep
from polyak_cli.cli import rendering
from polyak_cli.errors import PolyakError, UsageError
from polyak_cli.evaluation import data
from tests.command import polyak
from tests.torch.test_evaluate import CLASSES, NUMBERS, ROWS, X, make_net, run_plainly, write_code

METRICS = """
import numpy as np

def in_two_best(labels, predictions):
    return (np.argsort(predictions, axis=1)[:, -2:] == labels[:, None]).any(1)

def share(labels, predictions):
    found = in_two_best(labels, predictions).mean()
    labels[:], predictions[:] = 0, 0  # what it is given is its own
    return found

def macro_f1(labels, predictions):
    chosen = predictions.argmax(1)
    right = [((chosen == k) & (labels == k)).sum() for k in range(3)]
    return np.mean([2 * r / ((chosen == k).sum() + (labels == k).sum())
                    for k, r in enumerate(right)])
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


def find_macro_f1(chosen: np.ndarray) -> float:
    """Return the mean over classes of the harmonic mean of precision and recall, or 0."""
    found = []
    for k in range(3):
        pairs = [(int(c) == k, int(y) == k) for c, y in zip(chosen, CLASSES, strict=True)]
        both = sum(c and y for c, y in pairs)
        if both:
            precision, recall = both / sum(c for c, _ in pairs), both / sum(y for _, y in pairs)
            found.append(2 / (1 / precision + 1 / recall))
    return sum(found) / 3


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


def test_a_share_of_all_rows_is_compared_as_its_rows_are(tmp_path: Path) -> None:
    """One number for all rows that is a mean over them has the difference, interval and p of rows.

    Below 200 rows each row is a part; the metric may write into what it is given.
    """
    save_two(tmp_path)
    source = f"{write_code(tmp_path)}:make"
    few = data.Split("few", X[:150], CLASSES[:150])
    gains = []
    for name in ("in_two_best", "share"):
        metric = f"{tmp_path}/own.py:{name}"
        found = compare(tmp_path / "b.pt", tmp_path / "a.pt", few, model=source, metric=metric)
        assert [gain.metric for gain in found.models[0].gains] == [name, "accuracy", "loss"]
        gains.append(found.models[0].gains[0])
    by_rows, by_parts = gains
    assert (by_rows.in_parts, by_parts.in_parts) == (False, True)
    assert by_parts.paired == pytest.approx(by_rows.paired, abs=1e-9)
    assert by_parts.sign_flip_p == pytest.approx(by_rows.sign_flip_p, abs=0.02)


def test_f1_of_all_rows_is_compared_over_parts_of_them(tmp_path: Path) -> None:
    """The difference is that of the two F1; table and JSON say that parts were compared."""
    probabilities = save_two(tmp_path)
    options: Any = {
        "metric": f"{tmp_path}/own.py:macro_f1",
        "model": f"{write_code(tmp_path)}:make",
    }
    found = compare(tmp_path / "b.pt", tmp_path / "a.pt", ROWS, **options)
    theirs, ours = (find_macro_f1(p.argmax(1)) for p in probabilities)
    (model,) = rendering.models_data([one.score for one in found.models], found)["models"]
    gain = model["gains"]["macro_f1"]
    assert model["metrics"]["macro_f1"] == pytest.approx(ours)
    assert gain["difference"] == pytest.approx(ours - theirs)
    assert gain["low"] < gain["difference"] < gain["high"]
    assert (gain["rows"], gain["in_parts"]) == (100, True)
    lines = [*rendering.evaluation_lines([], found)]
    assert "p by McNemar's test (accuracy) and a sign-flip test " in str(lines)
    assert "(macro_f1 over 100 parts of the rows, loss)" in str(lines)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return None", "returned NoneType; expected one number, or one for each of the 203 rows"),
        ("return 'high'", "returned <U4 of shape ()"),
        ("return predictions", "returned float32 of shape (203, 3)"),
        ("return [[1], [2, 3]]", "m.py: f() failed on rows and the predictions of"),
        ("return 1 / 0", "m.py: f() failed on rows and the predictions of"),
    ],
)
def test_what_a_metric_may_not_return_is_one_line(tmp_path: Path, body: str, words: str) -> None:
    """It names the function, the file of the model, and what was expected."""
    save_two(tmp_path)
    metric = write_code(tmp_path, f"def f(labels, predictions):\n    {body}\n", "m.py")
    source = f"{write_code(tmp_path)}:make"
    with pytest.raises(PolyakError) as caught:
        list(evaluate(tmp_path / "a.pt", ROWS, model=source, metric=f"{metric}:f"))
    assert words in str(caught.value)
    assert "a.pt" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "rows", "words"),
    [
        ("return float('nan')", 203, "the f is nan, the other's nan"),
        ("return np.where(labels == 1, np.nan, 1.0)", 203, "the f is nan, the other's nan"),
        ("return 1.0 if len(labels) == 203 else float('nan')", 203, "is no finite number without"),
        ("return 1.0 if len(labels) == 203 else 1 / 0", 203, "ZeroDivisionError"),
        ("return labels.mean()", 9, "9 rows are too few to divide it among; expected 10 or more"),
    ],
)
def test_a_metric_that_cannot_be_compared_has_no_verdict(
    tmp_path: Path, body: str, rows: int, words: str
) -> None:
    """A note says why."""
    save_two(tmp_path)
    text = f"import numpy as np\n\ndef f(labels, predictions):\n    {body}\n"
    options: Any = {
        "metric": f"{write_code(tmp_path, text, 'm.py')}:f",
        "model": f"{write_code(tmp_path)}:make",
    }
    given = data.Split("rows", X[:rows], CLASSES[:rows])
    (model,) = compare(tmp_path / "b.pt", tmp_path / "a.pt", given, **options).models
    assert (model.gains[0].metric, model.gains[0].verdict) == ("f", "not comparable")
    assert words in model.score.notes[-1]


def test_a_gate_that_cannot_decide_by_its_metric_does_not_pass(tmp_path: Path) -> None:
    """It says why, instead of deciding by another metric."""
    save_two(tmp_path)
    write_code(tmp_path)
    write_code(tmp_path, "def f(labels, predictions):\n    return float('nan')\n", "m.py")
    np.savez(tmp_path / "rows.npz", x=X, y=CLASSES)
    options = ("--model", "net.py:make", "--metric", "m.py:f", "--data", "rows.npz")
    versus = ("b.pt", "--baseline", "a.pt", "--fail-if-worse")
    done = polyak("evaluate", *versus, *options, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "failed: b.pt: not compared with a.pt: the f is nan, the other's nan" in done.stderr
    assert "a.pt: its f is no finite number" in done.stderr


def test_a_gate_decides_by_the_loss_where_it_is_named(tmp_path: Path) -> None:
    """A model that is as often right, but far too sure, is worse by its loss alone."""
    net = make_net()
    torch.save(net.state_dict(), tmp_path / "a.pt")
    with torch.no_grad():
        for tensor in [*net.parameters()][-2:]:  # of the last layer: all logits are 50 times larger
            tensor *= 50
    torch.save(net.state_dict(), tmp_path / "b.pt")
    write_code(tmp_path)
    np.savez(tmp_path / "rows.npz", x=X, y=CLASSES)
    options = ("--model", "net.py:make", "--data", "rows.npz", "--fail-if-worse")
    words = ("evaluate", "b.pt", "--baseline", "a.pt", *options)
    assert polyak(*words, cwd=tmp_path).returncode == 0
    done = polyak(*words, "--metric", "loss", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "failed: b.pt: loss is worse than that of a.pt by " in done.stderr


def test_a_sweep_chooses_and_reports_by_the_metric(tmp_path: Path) -> None:
    """The winner has the best on its rows, also of soups; page, table and figures name it."""
    torch.manual_seed(6)
    (tmp_path / "run").mkdir()
    for k in range(3):
        torch.save(make_net().state_dict(), tmp_path / f"run/step_{k}.pt")
    np.savez(tmp_path / "rows.npz", x=X, y=CLASSES)
    write_code(tmp_path)
    write_code(tmp_path, METRICS, "own.py")
    searches = ("--search", "greedy", "--search", "coefficients", "--search", "extrapolate")
    options = ("--model", "net.py:make", "--metric", "own.py:macro_f1", "--data", "rows.npz")
    done = polyak("sweep", "run", *options, *searches, "-o", "report", "--all", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Best macro_f1 of " in done.stdout
    assert "macro_f1 (1)" in done.stdout
    found = json.loads((tmp_path / "report/sweep.json").read_text())
    assert found["metric"] == "macro_f1"
    scores = {row["label"]: row["metrics"]["selection"]["macro_f1"] for row in found["rows"]}
    models = [row for row in found["rows"] if row["kind"] != "ensemble"]
    kinds = {one["kind"] for row in found["rows"] for one in (row, *row["also"])}
    assert kinds == {"single", "average", "soup", "ensemble", "extrapolation"}
    assert scores[found["winner"]["label"]] == max(scores[row["label"]] for row in models)
    gains = [gain for gain in found["gains"] if gain["metric"] == "macro_f1"]
    assert [gain["in_parts"] for gain in gains] == [True] * len(gains)
    newest = next(row for row in found["rows"] if row["label"] == "step_2.pt")
    of_both = [row["metrics"]["reporting"]["macro_f1"] for row in (found["winner"], newest)]
    assert gains[0]["difference"] == pytest.approx(of_both[0] - of_both[1])
    assert "reporting_macro_f1" in (tmp_path / "report/sweep.csv").read_text().splitlines()[0]
    for name in ("report.html", "sweep.svg"):
        assert "Macro_f1 on " in (tmp_path / "report" / name).read_text()


def test_a_sweep_chooses_by_the_loss_where_it_is_named(tmp_path: Path) -> None:
    """The winner has the least, though labels are classes."""
    torch.manual_seed(6)
    for k in range(3):
        torch.save(make_net().state_dict(), tmp_path / f"step_{k}.pt")
    found = sweep(
        sorted(tmp_path.glob("step_*.pt")),
        data.Dataset("rows", {"": data.Split("rows", X, CLASSES)}),
        model=f"{write_code(tmp_path)}:make",
        metric="loss",
        scratch=tmp_path,
    )
    models = [row for row in found.rows if row.candidate.kind != "ensemble"]
    losses = [row.value("loss", "selection") for row in models]
    assert found.metric == "loss"
    assert found.winner.value("loss", "selection") == min(losses)


def test_a_sweep_by_accuracy_refuses_labels_that_are_no_classes(tmp_path: Path) -> None:
    """It does not choose by the loss instead."""
    torch.save(torch.nn.Linear(4, 1).state_dict(), tmp_path / "run_1.pt")
    text = "import torch\n\ndef make():\n    return torch.nn.Linear(4, 1)\n"
    source = f"{write_code(tmp_path, text)}:make"
    rows = data.Dataset("rows", {"": data.Split("rows", X, NUMBERS)})
    with pytest.raises(PolyakError, match="are not classes"):
        sweep(tmp_path / "run_1.pt", rows, model=source, metric="accuracy", scratch=tmp_path)


def test_what_is_no_metric_is_refused(tmp_path: Path) -> None:
    """A name that is no function, a name that is taken, and accuracy without classes."""
    save_two(tmp_path)
    source = f"{write_code(tmp_path)}:make"
    with pytest.raises(UsageError, match="--metric f1: expected accuracy, loss, MODULE"):
        evaluate(tmp_path / "a.pt", ROWS, model=source, metric="f1")
    taken = write_code(tmp_path, "def loss(labels, predictions):\n    return 1\n", "taken.py")
    with pytest.raises(UsageError, match="polyak has loss of its own"):
        evaluate(tmp_path / "a.pt", ROWS, model=source, metric=f"{taken}:loss")
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
