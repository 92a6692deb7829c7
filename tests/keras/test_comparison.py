"""Models compared with a baseline, by rows, in words, and by `polyak evaluate --baseline`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from polyak_cli import (
    Compared,
    Comparison,
    Gain,
    Paired,
    Score,
    average,
    compare,
    evaluate,
)
from polyak_cli.cli import rendering
from polyak_cli.cli.tables import Table
from polyak_cli.errors import FormatError, UsageError
from polyak_cli.evaluation import data, evaluator
from polyak_cli.evaluation.comparison import compute_gains
from polyak_cli.evaluation.significance import mcnemar, paired_difference, sign_flip
from tests.command import Done, one_line
from tests.keras.commands import polyak
from tests.keras.test_evaluate import (
    CLASSES,
    ROWS,
    SAMPLE,
    SAMPLES,
    network,
    predicted,
    saved,
    split,
)

TESTS = ("mcnemar_p", "sign_flip_p")


def ruined(path: Path, bias: float) -> Path:
    """Write a sample that predicts its first class far too often, or, for NaN, always."""
    shutil.copy(SAMPLE, path)
    with h5py.File(path, "r+") as file:
        file["model_weights/dense_1/sequential/dense_1/bias"][0] += bias
    return path


def made(**given: Any) -> evaluator.RowScores:
    """Return the scores of eight rows."""
    whole = {"loss": 0.5, "metrics": {}, "losses": np.ones(8), "correct": np.ones(8, bool)}
    return evaluator.RowScores(**{**whole, "predictions": None, "loss_name": "a", **given})


# --- the pairing ----------------------------------------------------------------------------------


def test_models_are_compared_row_by_row() -> None:
    """Scores are those of `evaluate`, and the gains those of the rows' losses and classes."""
    rows = data.load("blobs").split("test")
    paths = [SAMPLES / "model_490.h5", SAMPLES / "model_492.h5"]
    found = compare(paths, SAMPLE, rows)
    assert [found.baseline, *(one.score for one in found.models)] == [
        *evaluate([SAMPLE, *paths], rows)
    ]
    examiner = evaluator.Evaluator([rows])
    (theirs,), *each = map(examiner.score_rows, [SAMPLE, *paths])
    for one, (ours,) in zip(found.models, each, strict=True):
        accuracy, loss = one.gains
        assert ours.correct is not None
        assert theirs.correct is not None
        assert (accuracy.metric, loss.metric) == ("accuracy", "loss")
        assert accuracy.paired == paired_difference(ours.correct, theirs.correct)
        assert accuracy.mcnemar_p == mcnemar(ours.correct, theirs.correct)
        assert ours.losses is not None
        assert theirs.losses is not None
        assert loss.sign_flip_p == sign_flip(ours.losses, theirs.losses)
        assert (accuracy.sign_flip_p, loss.mcnemar_p) == (None, None)
        own, others = one.score.metrics["accuracy"], found.baseline.metrics["accuracy"]
        assert accuracy.paired.difference == pytest.approx(own - others)
        own, others = (score.loss or 0.0 for score in (one.score, found.baseline))
        assert loss.paired.difference == pytest.approx(own - others, abs=1e-6)


def test_a_metric_of_the_users_own_measures_models_of_keras(tmp_path: Path) -> None:
    """It gets labels and the outputs; as one number for all rows it is compared over parts."""
    code = "def right(labels, predictions):\n    return (predictions.argmax(1) == labels)"
    (tmp_path / "own.py").write_text(
        f"{code}\n\ndef share(*given):\n    return right(*given).mean()\n"
    )
    rows = data.load("blobs").split("train")
    for name in ("right", "share"):
        found = compare(SAMPLES / "model_490.h5", SAMPLE, rows, metric=f"{tmp_path}/own.py:{name}")
        own, accuracy, _ = found.models[0].gains
        assert (own.metric, own.in_parts) == (name, name == "share")
        assert found.baseline.metrics[name] == pytest.approx(found.baseline.metrics["accuracy"])
        assert own.paired == pytest.approx(accuracy.paired, abs=1e-9)


def test_a_model_is_not_ahead_of_itself() -> None:
    """No row differs: 0, from 0 to 0, p 1, within noise."""
    found = compare(SAMPLE, SAMPLE, data.load("blobs").split("train"))
    (one,) = found.models
    assert [gain.paired for gain in one.gains] == [(0.0, 0.0, 0.0, 100)] * 2
    assert [gain.mcnemar_p for gain in one.gains] == [1.0, None]
    assert [gain.sign_flip_p for gain in one.gains] == [None, 1.0]
    assert {gain.verdict for gain in one.gains} == {"within noise"}


def test_what_only_one_has_is_not_compared() -> None:
    """Only classes, or losses of the same name, that both models have are compared."""
    assert [gain.metric for gain in compute_gains(made(), made())] == ["accuracy", "loss"]
    assert [gain.metric for gain in compute_gains(made(correct=None), made())] == ["loss"]
    assert [gain.metric for gain in compute_gains(made(), made(losses=None))] == ["accuracy"]
    assert [gain.metric for gain in compute_gains(made(loss_name="b"), made())] == ["accuracy"]
    assert compute_gains(made(correct=None), made(losses=None)) == ()


def test_less_loss_is_better_and_less_accuracy_worse() -> None:
    """A loss that is not finite cannot be compared."""
    wrong = made(correct=np.zeros(8, bool), losses=np.zeros(8))
    assert [gain.verdict for gain in compute_gains(wrong, made())] == ["worse", "better"]
    assert [gain.verdict for gain in compute_gains(made(), wrong)] == ["better", "worse"]
    none = made(losses=np.full(8, np.nan))
    assert [gain.verdict for gain in compute_gains(none, made())] == [
        "within noise",
        "not comparable",
    ]


def test_another_architecture_is_a_baseline_and_another_loss_is_reported(tmp_path: Path) -> None:
    """Accuracy is compared; crossentropy and squared error are not, and a note says so."""
    rows = data.load("blobs").split("train")
    other = saved(network(inputs=2), tmp_path / "other.h5", "mse", None)
    (one,) = compare(SAMPLE, other, rows).models
    assert [gain.metric for gain in one.gains] == ["accuracy"]
    assert one.score.notes == (
        f"its loss is categoricalcrossentropy * 1, {other}'s meansquarederror * 1: they are not "
        "compared",
    )


def test_every_file_is_looked_at_before_the_first_is_scored(tmp_path: Path) -> None:
    """A bad file, also as the baseline, is refused; and one row is too few."""
    (tmp_path / "bad.h5").write_bytes(b"no")
    rows = data.load("blobs").split("train")
    for path, baseline in ((SAMPLE, tmp_path / "bad.h5"), (tmp_path / "bad.h5", SAMPLE)):
        with pytest.raises(FormatError, match=r"bad\.h5"):
            compare([SAMPLE, path], baseline, rows)
    path = saved(network(), tmp_path / "model.h5", "mse", None)
    with pytest.raises(UsageError, match="two rows or more; found 1"):
        compare(path, path, split(ROWS[:1], CLASSES[:1]))


# --- the command line -----------------------------------------------------------------------------


def evaluated(*arguments: object, cwd: Path) -> Done:
    """Run `polyak evaluate` on blobs."""
    return polyak("evaluate", *arguments, "--data", "blobs", cwd=cwd)


@pytest.mark.slow
def test_the_table_says_how_far_each_model_is_ahead(tmp_path: Path) -> None:
    """Scores with the baseline last, then a row for accuracy and one for loss; noise passes."""
    average(SAMPLES, tmp_path / "final.h5", scheme="exp", alpha=2)
    shutil.copy(SAMPLE, tmp_path / "newest.h5")
    done = evaluated("final.h5", "--baseline", "newest.h5", "--fail-if-worse", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["model", "final.h5", "newest.h5"]
    assert lines[3] == "loss: categorical_crossentropy (Keras's)"
    assert lines[4] == "minus newest.h5, with 95 % intervals over 1000 paired rows:"
    accuracy, loss = (line.split() for line in lines[6:8])
    assert accuracy[:3] == ["final.h5", "accuracy", "+0.001000"]
    assert accuracy[-2:] == loss[-2:] == ["within", "noise"]
    assert float(accuracy[3]) < 0 < float(accuracy[4])
    assert accuracy[5] == "1"
    assert float(loss[5]) > 0.05
    assert lines[8] == "p by McNemar's test (accuracy) and a sign-flip test (loss)"
    assert lines[9].startswith("within noise: no difference is shown")


@pytest.mark.slow
def test_a_model_that_is_worse_exits_with_1_and_is_named(tmp_path: Path) -> None:
    """Only the worse model fails, and the one whose loss is NaN; other gates still hold."""
    shutil.copy(SAMPLE, tmp_path / "newest.h5")
    ruined(tmp_path / "worse.h5", 3.0)
    ruined(tmp_path / "nan.h5", np.nan)
    arguments = ["worse.h5", "newest.h5", "nan.h5", "--baseline", "newest.h5", "--json"]
    done = evaluated(*arguments, "--fail-if-worse", "--fail-under", "accuracy=0.9", cwd=tmp_path)
    assert done.returncode == 1
    found = json.loads(done.stdout, parse_constant=pytest.fail)
    assert found["baseline"]["path"] == "newest.h5"
    worse, same, none = (model["gains"] for model in found["models"])
    assert worse["accuracy"]["verdict"] == worse["loss"]["verdict"] == "worse"
    assert worse["accuracy"]["mcnemar_p"] < 0.001
    assert set(worse["loss"]) == {
        "difference",
        "low",
        "high",
        "rows",
        "in_parts",
        *TESTS,
        "verdict",
    }
    assert same["accuracy"]["difference"] == 0
    assert none["loss"]["verdict"] == "not comparable"
    assert none["loss"]["difference"] is None
    failures = [line.removeprefix("failed: ") for line in done.stderr.splitlines()]
    assert failures == found["failures"]
    assert [line.split(" is ")[0] for line in failures] == [
        *(f"{name}.h5: accuracy" for name in ("worse", "newest", "nan")),
        "worse.h5: accuracy",
        "nan.h5: accuracy",
    ]
    assert "worse than that of newest.h5 by 0." in failures[3]
    # Without the option it is reported, and the exit code is 0.
    done = evaluated("worse.h5", "--baseline", "newest.h5", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-2].endswith("worse")


def test_a_baseline_among_the_models_is_shown_once() -> None:
    """It has one row of scores, and is compared with itself only where nothing else is there."""
    baseline, other = Score(Path("b.h5"), 0.5, {}, 10), Score(Path("a.h5"), 0.25, {}, 10)
    gains = (Gain("loss", Paired(0.25, 0.125, 0.375, 10), "worse", sign_flip_p=0.01),)
    for models, scored, shown in (
        ([other, baseline], ["a.h5", "b.h5"], ["a.h5"]),
        ([other], ["a.h5", "b.h5"], ["a.h5"]),
        ([baseline], ["b.h5"], ["b.h5"]),
    ):
        compared = Comparison(baseline, tuple(Compared(score, gains) for score in models))
        lines = rendering.evaluation_lines(models, compared)
        tables = [line for line in lines if isinstance(line, Table)]
        assert [[row[0] for row in table.rows] for table in tables] == [scored, shown]


@pytest.mark.slow
def test_four_rows_that_differ_show_nothing_and_pass_the_gate(tmp_path: Path) -> None:
    """All four are against the model: the interval has no 0, McNemar's p is 0.125, no verdict."""
    model = network(1, "sigmoid")
    # With the median row at 0.5, half of the rows are of either class, whatever the kernels are.
    middle = np.median(predicted(model))
    model.layers[-1].bias.assign([-middle])
    good = saved(model, tmp_path / "good.h5", "binary_crossentropy", None)
    ahead = model.predict(ROWS, verbose=0)[:, 0] > 0.5
    # The other model calls every row 1: rows called 0 by the first are the ones that differ.
    model.layers[-1].bias.assign([50.0])
    model.layers[-1].kernel.assign(0 * model.layers[-1].kernel)
    model.save(tmp_path / "ones.h5")
    assert ahead.sum() >= 6
    assert (~ahead).sum() >= 6
    ones, zeros = np.flatnonzero(ahead), np.flatnonzero(~ahead)
    for differ, status, word in ((4, 0, "within noise"), (6, 1, "worse")):
        rows = np.concatenate([ones[:6], zeros[:differ]])
        np.savez(tmp_path / "rows.npz", x=ROWS[rows], y=ahead[rows].astype(int))
        arguments = ["ones.h5", "--baseline", good.name, "--data", "rows.npz", "--fail-if-worse"]
        done = polyak("evaluate", *arguments, "--json", "-q", cwd=tmp_path)
        assert done.returncode == status
        (found,) = json.loads(done.stdout)["models"]
        gain = found["gains"]["accuracy"]
        assert gain["high"] < 0
        assert gain["mcnemar_p"] == pytest.approx(2 * 0.5**differ)
        assert gain["verdict"] == word


@pytest.mark.slow
def test_models_with_nothing_in_common_cannot_be_gated(tmp_path: Path) -> None:
    """Exit 2 and one line; without the gate the table says that there is nothing to compare."""
    np.savez(tmp_path / "rows.npz", x=ROWS, y=np.linspace(0, 1, 50))
    saved(network(1, "linear"), tmp_path / "mse.h5", "mse", None)
    saved(network(1, "linear"), tmp_path / "mae.h5", "mae", None)
    arguments = ["evaluate", "mse.h5", "--baseline", "mae.h5", "--data", "rows.npz", "-q"]
    done = polyak(*arguments, "--fail-if-worse", cwd=tmp_path)
    assert done.returncode == 2
    assert "neither an accuracy nor a loss in common" in one_line(done.stderr)
    done = polyak(*arguments[:-1], cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "nothing can be compared with mae.h5"


@pytest.mark.slow
def test_a_loss_decides_where_there_are_no_classes(tmp_path: Path) -> None:
    """A regression that is worse in loss fails, also when it has a NaN."""
    model = network(1, "linear")
    good = saved(model, tmp_path / "good.h5", "mse", None)
    targets = model.predict(ROWS, verbose=0) + np.linspace(-0.1, 0.1, 50)[:, None]
    np.savez(tmp_path / "rows.npz", x=ROWS, y=targets)
    for name, value in (("worse", 1.0), ("none", np.nan)):
        model.layers[-1].bias.assign([value])
        model.save(tmp_path / f"{name}.h5")
    done = polyak(
        *["evaluate", "good.h5", "worse.h5", "none.h5", "--baseline", good.name],
        *["--data", "rows.npz", "--fail-if-worse", "-q"],
        cwd=tmp_path,
    )
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert first.startswith("failed: worse.h5: loss is worse than that of good.h5 by ")
    assert second == "failed: none.h5: the loss is nan, not a finite number"
