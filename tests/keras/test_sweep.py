"""Sweeps of the sample run, with Keras itself as the oracle."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyak_cli import __version__, pipeline
from polyak_cli.evaluation import data
from polyak_cli.pipeline import sweeping
from tests.command import script
from tests.keras.commands import polyak
from tests.test_cli import EAGER, on_terminal

pytestmark = pytest.mark.slow
SAMPLE = Path(__file__).parents[2] / "sample_checkpoints"


@pytest.fixture(scope="module")
def found() -> sweeping.Sweep:
    """Sweep the newest four sample checkpoints once for all tests."""
    return sweeping.sweep(
        SAMPLE,
        data.load("blobs"),
        last=4,
        chosen="equal,exp:2",
        batch=3,
        search=["greedy", "coefficients", "extrapolate"],
    )


def scored(path: Path, rows: data.Split) -> tuple[float, float]:
    """Return loss and accuracy by Keras alone."""
    import keras

    model = keras.saving.load_model(path)
    classes = np.asarray(rows.labels)
    one_hot = classes if classes.ndim == 2 else np.eye(3, dtype=np.float32)[classes]
    loss, accuracy = model.evaluate(rows.features, one_hot, verbose=0)
    return loss, accuracy


def test_every_candidate_has_the_scores_of_its_own_average(
    found: sweeping.Sweep, tmp_path: Path
) -> None:
    """The scores of a window and a scheme are those of Keras for the file of `average`."""
    halves = dict(
        zip(("selection", "reporting"), data.halves(data.load("blobs").split()), strict=True)
    )
    for row in found.rows:
        candidate = row.candidate
        if candidate.kind == "single":
            path = found.plan.checkpoints[candidate.coefficients.index(1.0)].path
        elif candidate.kind == "average" and candidate.window in (2, 4):
            path = tmp_path / "average.h5"
            alpha: Any = {} if candidate.parameter is None else {"alpha": candidate.parameter}
            pipeline.average(
                SAMPLE, path, last=candidate.window, scheme=candidate.scheme, force=True, **alpha
            )
        else:
            continue
        for name, rows in halves.items():
            loss, accuracy = scored(path, rows)
            assert row.value("loss", name) == pytest.approx(loss, rel=1e-5)
            assert row.value("accuracy", name) == pytest.approx(accuracy, abs=1e-6)


def test_the_winner_is_best_on_the_selection_rows(found: sweeping.Sweep) -> None:
    """No single, average or soup is better there; the reporting rows are as many, and others."""
    competing = [row for row in found.rows if row.candidate.kind != "ensemble"]
    best = max(row.value("accuracy", "selection") for row in competing)
    assert found.winner.value("accuracy", "selection") == best
    assert found.splits["selection"][1] + found.splits["reporting"][1] == 1000


def test_no_model_is_compared_with_itself(found: sweeping.Sweep) -> None:
    """The gain is over the newest and over the best single checkpoint, where these are others."""
    singles = [row for row in found.rows if row.candidate.kind == "single"]
    best = max(singles, key=lambda row: row.value("accuracy", "selection"))
    others = {"newest": singles[-1], "best single": best}
    expected = {
        over
        for over, row in others.items()
        if row.candidate.coefficients != found.winner.candidate.coefficients
    }
    if best is singles[-1]:
        expected.discard("best single")
    assert {*found.gains} == expected
    assert found.verdict == found.gains["newest"][0].verdict


def test_each_model_has_one_row_and_a_rank(found: sweeping.Sweep) -> None:
    """Rank 1 is the winner; ensembles have none, and no coefficients stand there twice."""
    described = found.data(date="2026-11-29")
    assert (described["data"], described["date"], described["command"]) == (
        *("blobs", "2026-11-29", None),
    )
    models = [row for row in described["rows"] if row["kind"] != "ensemble"]
    assert len({tuple(row["coefficients"]) for row in models}) == len(models)
    assert sorted(row["rank"] for row in models) == [*range(1, len(models) + 1)]
    assert {row["rank"] for row in described["rows"] if row["kind"] == "ensemble"} == {None}
    assert described["winner"] in models
    assert described["winner"]["rank"] == 1
    assert described["winner"]["coefficients"] == list(found.winner.candidate.coefficients)
    total = sum(1 + len(row["also"]) for row in described["rows"])
    assert total == len(found.rows)
    scores = [row["metrics"]["selection"]["accuracy"] for row in models]
    ranks = [row["rank"] for row in models]
    best_first = [score for _, score in sorted(zip(ranks, scores, strict=True))]
    assert best_first == sorted(scores, reverse=True)


def test_gains_are_paired_differences_on_the_reporting_rows(found: sweeping.Sweep) -> None:
    """The difference is that of the accuracies of the two candidates, and in its interval."""
    newest = next(r for r in found.rows if r.candidate.coefficients == (0.0, 0.0, 0.0, 1.0))
    gain = next(gain for gain in found.gains["newest"] if gain.metric == "accuracy")
    difference = found.winner.value("accuracy", "reporting") - newest.value("accuracy", "reporting")
    assert gain.paired.difference == pytest.approx(difference, abs=1e-6)
    assert gain.paired.low <= gain.paired.difference <= gain.paired.high


def test_the_ensemble_is_the_mean_of_predictions(found: sweeping.Sweep) -> None:
    """Its accuracy is that of the averaged probabilities of its members."""
    import keras

    _, reporting = data.halves(data.load("blobs").split())
    labels = np.asarray(reporting.labels)
    classes = labels.argmax(-1) if labels.ndim == 2 else labels
    models = [keras.saving.load_model(c.path) for c in found.plan.checkpoints[-2:]]
    mean = np.mean([model.predict(reporting.features, verbose=0) for model in models], axis=0)
    (row,) = [r for r in found.rows if r.candidate.kind == "ensemble" and r.candidate.window == 2]
    expected = float((mean.argmax(-1) == classes).mean())
    assert row.value("accuracy", "reporting") == pytest.approx(expected, abs=1e-6)


def test_the_report_says_which_files_it_is_about(found: sweeping.Sweep) -> None:
    """Path, epoch, size and digest of each checkpoint, and the version that averaged them."""
    described = found.data()
    assert described["polyak"] == __version__
    for epoch, checkpoint in zip(range(496, 500), described["checkpoints"], strict=True):
        path = SAMPLE / f"model_{epoch}.h5"
        assert checkpoint == {
            "path": str(path),
            "epoch": epoch,
            "size": path.stat().st_size,
            "sha256": (hashlib.sha256(path.read_bytes()).hexdigest(),),
        }


def test_extrapolations_have_the_scores_of_their_own_models(
    found: sweeping.Sweep, tmp_path: Path
) -> None:
    """Keras scores B + x (B - A), which numpy makes of its weights, as the sweep did."""
    import keras

    paths = [one.path for one in found.plan.checkpoints]
    models = [keras.saving.load_model(path) for path in paths]
    halves = data.halves(data.load("blobs").split())
    rows = [row for row in found.rows if row.candidate.kind == "extrapolation"]
    assert [found.label(row.candidate) for row in rows] == [
        f"extrapolated by {reach}, last {window}"
        for reach in ("0.25", "0.5", "1")
        for window in (2, 4)
    ]
    for row in rows[1:4]:
        half, reach = row.candidate.window // 2, float(row.candidate.parameter or 0)
        made = []
        for tensors in zip(*(model.get_weights() for model in models), strict=True):
            older = np.mean(tensors[-2 * half : -half], axis=0, dtype=np.float64)
            newer = np.mean(tensors[-half:], axis=0, dtype=np.float64)
            made.append(newer + reach * (newer - older))
        model = keras.saving.load_model(paths[-1])
        model.set_weights(made)
        model.save(tmp_path / "beyond.h5")
        for name, part in zip(("selection", "reporting"), halves, strict=True):
            loss, accuracy = scored(tmp_path / "beyond.h5", part)
            assert row.value("loss", name) == pytest.approx(loss, rel=1e-5)
            assert row.value("accuracy", name) == pytest.approx(accuracy, abs=1e-6)


def test_average_repeats_a_soup_by_its_coefficients(found: sweeping.Sweep, tmp_path: Path) -> None:
    """`polyak average --coefficients`, as the report has them, gives a model of the same scores."""
    (_, rows) = data.halves(data.load("blobs").split())
    for row in found.rows:
        if row.candidate.kind == "soup":
            path = tmp_path / f"{row.candidate.name}.h5"
            coefficients = ",".join(map(repr, row.candidate.coefficients))
            options = ["--last", "4", "--coefficients", coefficients]
            made = polyak("average", SAMPLE, *options, "-o", path, cwd=tmp_path)
            assert made.returncode == 0, made.stderr
            loss, accuracy = scored(path, rows)
            assert row.value("loss", "reporting") == pytest.approx(loss, rel=1e-5)
            assert row.value("accuracy", "reporting") == pytest.approx(accuracy, abs=1e-6)


def test_soups_are_no_worse_than_what_they_began_with(found: sweeping.Sweep) -> None:
    """This holds on the selection rows; coefficients are not negative, and their sum is 1."""
    singles = [row for row in found.rows if row.candidate.kind == "single"]
    greedy, fitted = [row for row in found.rows if row.candidate.kind == "soup"]
    best = max(row.value("accuracy", "selection") for row in singles)
    assert greedy.value("accuracy", "selection") >= best
    assert fitted.value("accuracy", "selection") >= greedy.value("accuracy", "selection")
    for row in (greedy, fitted):
        assert min(row.candidate.coefficients) >= 0
        assert sum(row.candidate.coefficients) == pytest.approx(1)


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_averages_are_recalibrated_before_they_are_scored(tmp_path: Path, suffix: str) -> None:
    """With BatchNorm, each has the scores of the file of `average --recalibrate`."""
    import keras

    keras.utils.set_random_seed(1)
    random = np.random.default_rng(2)
    features = random.normal(3, 2, size=(80, 4)).astype(np.float32)
    labels = (features.sum(1) > 12).astype(np.int64)
    rows = data.Split("rows", features, labels)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(6),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )
    model.compile("sgd", "sparse_categorical_crossentropy")
    for epoch in range(3):
        model.fit(rows.features, rows.labels, verbose=0)
        model.save(tmp_path / f"m_{epoch}{suffix}")
    split = {"train": rows, "test": data.Split("other rows", features[:40], labels[:40])}
    found = sweeping.sweep(
        sorted(tmp_path.glob(f"*{suffix}")),
        data.Dataset("rows", split),
        chosen="equal",
        windows="3",
        select_on="train",
        recalibrate=rows,
        write_best=tmp_path / f"best{suffix}",
    )
    output = tmp_path / f"average{suffix}"
    pipeline.average(
        sorted(tmp_path.glob(f"m_*{suffix}")), output, recalibrate=rows, batch_size=256
    )
    (row,) = [row for row in found.rows if row.candidate.kind == "average"]
    loaded = keras.saving.load_model(output)
    expected = loaded.evaluate(rows.features, rows.labels, verbose=0)
    assert row.value("loss", "selection") == pytest.approx(expected, rel=1e-5)
    single = found.rows[0]
    own = keras.saving.load_model(tmp_path / f"m_0{suffix}").evaluate(
        rows.features, rows.labels, verbose=0
    )
    assert single.value("loss", "selection") == pytest.approx(own, rel=1e-5)


def test_the_command_writes_report_and_winner(tmp_path: Path) -> None:
    """It writes report, figure, tables, and the winner, which equals the file of `average`."""
    report, best = tmp_path / "report", tmp_path / "best.h5"
    run = polyak(
        "sweep", SAMPLE, "--data", "blobs", "--from", 496, "--windows", "2-3", "--schemes", "exp:2",
        "--seed", 2, "-o", report, "--write-best", best, "--json", cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    described: dict[str, Any] = json.loads(run.stdout)
    assert {path.name for path in tmp_path.iterdir()} == {"report", "best.h5"}
    with open(report / "sweep.csv") as file:
        assert [line["label"] for line in csv.DictReader(file)] == [
            r["label"] for r in described["rows"]
        ]
    assert described["winner"]["kind"] == "average"
    command = shlex.split(described["winner_command"])
    assert command[:2] == ["polyak", "average"]
    assert command[-2:] == ["-o", str(best)]
    again = tmp_path / "again.h5"
    made = polyak(*command[1:-1], again, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert again.read_bytes() == best.read_bytes()
    assert shlex.split(described["command"])[:3] == ["polyak", "sweep", str(SAMPLE)]
    once_more = polyak("sweep", SAMPLE, "--data", "blobs", "-o", report, cwd=tmp_path)
    assert once_more.returncode == 3
    assert "--force" in once_more.stderr


def test_the_printed_command_makes_a_soup(tmp_path: Path) -> None:
    """Pasted into a shell, it writes the file of --write-best again, bit for bit."""
    best = tmp_path / "the best.h5"
    run = polyak(
        *("sweep", SAMPLE, "--data", "blobs", "--last", 4, "--schemes", "exp:2", "--windows", 2),
        *("--search", "greedy", "-o", "report", "--write-best", best),
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    described = json.loads((tmp_path / "report/sweep.json").read_text())
    assert described["winner"]["kind"] == "soup"
    lines = run.stdout.splitlines()
    ways = ("Make it", "To make it anyway")
    assert {f"{way}: {described['winner_command']}" for way in ways}.intersection(lines)
    written = best.read_bytes()
    best.unlink()
    made = polyak(*shlex.split(described["winner_command"])[1:], cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert best.read_bytes() == written


def test_a_terminal_shows_how_far_the_sweep_is(tmp_path: Path) -> None:
    """It says which of all models is scored, and when they end; equal coefficients count once."""
    options = ["--data", "blobs", "--last", "2", "--schemes", "equal,exp:2", "-o", "report"]
    code, text = on_terminal([*script(EAGER, "sweep", str(SAMPLE), *options)], tmp_path)
    assert code == 0, text
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert re.search(r"scoring .* model 1 of 4\s", plain)  # two single checkpoints
    assert re.search(r"scoring .* model 4 of 4, \d+ s left", plain)  # and two averages of both
