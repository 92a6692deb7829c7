"""Two runs in one series are refused, and honest runs are not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyak_cli import average, check, verify
from polyak_cli.errors import MismatchError
from tests.command import polyak
from tests.training import (
    Adam,
    Array,
    Network,
    Sgd,
    Tensors,
    make_conv,
    make_dense,
    make_embedding,
    make_factors,
    tanh,
    train,
)

DENSE = make_dense((64, 64, 10))
#: Networks of every kind; one of few elements is judged too.
NETWORKS: Mapping[str, Network] = {
    "dense": DENSE,
    "deep": make_dense((64, 48, 48, 48, 10), activation=tanh),
    "zero head": make_dense((64, 64, 10), last="zeros"),
    "autoencoder": make_dense((64, 16, 64)),
    "logistic": make_dense((64, 10)),
    "logistic from zero": make_dense((64, 10), last="zeros"),
    "convolution": make_conv(8),
    "embedding": make_embedding(),
    "factors": make_factors(),
    "small": make_dense((64, 6, 10)),
}
#: How they are trained: rates that are constant, decay, jump and restart, and usual optimizers.
TRAININGS: Mapping[str, dict[str, Any]] = {
    "constant": {"optimizer": Sgd(0.1)},
    "momentum": {"optimizer": Sgd(0.03, 0.9)},
    "adam": {"optimizer": Adam(0.001)},
    "fast adam": {"optimizer": Adam(0.01)},
    "rmsprop": {"optimizer": Adam(0.003, 0.0, 0.9)},
    "decay": {"optimizer": Adam(0.01), "rates": lambda epoch: 0.7**epoch},
    "jump": {"optimizer": Sgd(0.02, 0.9), "rates": lambda epoch: 5.0 if epoch >= 5 else 1.0},
    "warm restarts": {
        "optimizer": Adam(0.01),
        "rates": lambda epoch: 0.5 + 0.5 * np.cos(np.pi * (epoch % 4) / 4),
    },
    "weight decay": {"optimizer": Adam(0.003), "decay": 0.1},
}


def write(folder: Path, run: Sequence[Tensors]) -> Path:
    """Write the checkpoints of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    for epoch, tensors in enumerate(run):
        arrays: Any = tensors
        np.savez(folder / f"model_{epoch:02d}.npz", **arrays)
    return folder


def permute_units(tensors: Tensors) -> Tensors:
    """Return the same network with its hidden units in another order."""
    order = np.random.default_rng(1).permutation(tensors["w0"].shape[1])
    return {
        **tensors,
        "w0": np.ascontiguousarray(tensors["w0"][:, order]),
        "b0": tensors["b0"][order],
        "w1": tensors["w1"][order],
    }


def refuse(folder: Path, **options: Any) -> str:
    """Return the error of averaging a folder; nothing is written."""
    output = folder.parent / "refused.npz"
    with pytest.raises(MismatchError) as caught:
        average(folder, output, **options)
    assert not output.exists()
    assert [one.kind for one in check(folder).all_problems].count("two runs") == 1
    return str(caught.value)


@pytest.fixture(scope="module")
def seeds() -> tuple[list[Tensors], list[Tensors]]:
    """Return two runs of one network from two seeds."""
    first, second = (train(DENSE, Sgd(0.03, 0.9), seed=seed) for seed in (0, 1))
    return first, second


def test_five_epochs_of_another_seed(
    tmp_path: Path, seeds: tuple[list[Tensors], list[Tensors]]
) -> None:
    """The groups are named, with the options that average one of them; following them works."""
    first, second = seeds
    run = write(tmp_path / "run", [*first[:5], *second[5:10]])
    text = refuse(run)
    assert text.startswith(
        "these look like two runs: model_00.npz to model_04.npz, and model_05.npz to model_09.npz; "
        "cosine "
    )
    assert "between model_04.npz and model_05.npz" in text
    assert "--to 4 or --last 5, or all of them with --allow two-runs" in text
    for number, way in enumerate(({"to_epoch": 4}, {"last": 5})):
        chosen: Any = way
        report = average(run, tmp_path / f"{number}.npz", **chosen)
        assert len(report.plan.checkpoints) == 5


def test_two_models_of_two_seeds(
    tmp_path: Path, seeds: tuple[list[Tensors], list[Tensors]]
) -> None:
    """Two checkpoints are enough; the command exits with 3, and `check` with 1."""
    run = write(tmp_path / "run", [seeds[0][10], seeds[1][10]])
    refuse(run)
    done = polyak("average", "run", "-o", "o.npz", cwd=tmp_path)
    assert done.returncode == 3
    assert "these look like two runs: model_00.npz, and model_01.npz" in done.stderr
    assert polyak("check", "run", cwd=tmp_path).returncode == 1
    assert polyak("check", "run", "--allow", "two-runs", cwd=tmp_path).returncode == 0


def test_what_is_allowed_is_averaged_said_and_recorded(
    tmp_path: Path, seeds: tuple[list[Tensors], list[Tensors]]
) -> None:
    """With --allow two-runs, the average is that of numpy, and it verifies."""
    models = [seeds[0][10], seeds[1][10]]
    run = write(tmp_path / "run", models)
    done = polyak(*("average", "run", "-o", "o.npz", "--allow", "two-runs", "--json"), cwd=tmp_path)
    assert done.returncode == 0
    assert "look like two runs" in done.stderr
    assert json.loads(done.stdout)["runs"]["verdict"] == "two runs"
    with np.load(tmp_path / "o.npz") as written:
        for name, one in models[0].items():
            expected = (one.astype(float) + models[1][name]) / 2
            np.testing.assert_allclose(written[name], expected, rtol=1e-6, atol=1e-12)
    assert verify(tmp_path / "o.npz", sources=[run]).verified


def test_runs_that_alternate_and_a_foreign_one_between_them(
    tmp_path: Path, seeds: tuple[list[Tensors], list[Tensors]]
) -> None:
    """Checkpoints of one run are found together although others lie between them."""
    first, second = seeds
    mixed = [(first if epoch % 2 else second)[epoch] for epoch in range(2, 10)]
    assert "look like two runs" in refuse(write(tmp_path / "mixed", mixed))
    foreign = write(tmp_path / "foreign", [*first[4:7], second[7], *first[8:11]])
    assert "--exclude 'model_03.npz'" in refuse(foreign)
    report = average(foreign, tmp_path / "o.npz", exclude=["model_03.npz"])
    assert len(report.plan.checkpoints) == 6
    skipped = average(foreign, tmp_path / "s.npz", on_unhealthy="skip")
    assert [one.path.name for one in skipped.plan.skipped] == ["model_03.npz"]


def test_permuted_units_are_another_run(
    tmp_path: Path, seeds: tuple[list[Tensors], list[Tensors]]
) -> None:
    """A network with its units in another order computes the same, and averages to nonsense."""
    run = [*seeds[0][4:7], *map(permute_units, seeds[0][7:10])]
    assert "look like two runs" in refuse(write(tmp_path / "run", run))


def test_heads_of_two_seeds_on_one_frozen_part(tmp_path: Path) -> None:
    """What all have in common, bit for bit, hides no difference."""
    rng = np.random.default_rng(0)
    frozen = rng.normal(size=(200, 200)).astype(np.float32)
    heads: list[Array] = [rng.normal(size=(200, 10)).astype(np.float32) for _ in range(2)]
    moved = [heads[k // 2] + 0.01 * k for k in range(4)]
    run = [{"backbone": frozen, "head": head.astype(np.float32)} for head in moved]
    assert "look like two runs" in refuse(write(tmp_path / "run", run))


def test_few_elements_tell_nothing(tmp_path: Path) -> None:
    """A tiny model is averaged, and `check` says that it cannot tell."""
    rng = np.random.default_rng(0)
    run = [{"w": rng.normal(size=(8, 8)).astype(np.float32)} for _ in range(3)]
    folder = write(tmp_path / "run", run)
    assert average(folder, tmp_path / "o.npz").data()["runs"]["verdict"] == "cannot tell"
    assert check(folder).verdict.word == "cannot tell"
    assert "cannot tell" in polyak("check", "run", cwd=tmp_path).stdout


def test_checkpoints_of_one_name_are_told_apart(
    tmp_path: Path, seeds: tuple[list[Tensors], list[Tensors]]
) -> None:
    """`check` names neighbours by as much of their paths as its table does."""
    for epoch in (8, 9):
        arrays: Any = seeds[0][epoch]
        (tmp_path / f"step-{epoch}").mkdir()
        np.savez(tmp_path / f"step-{epoch}" / "model.npz", **arrays)
    done = polyak("check", "step-8/model.npz", "step-9/model.npz", cwd=tmp_path)
    assert "between step-8/model.npz and step-9/model.npz;" in done.stdout


#: Two orthogonal directions of a matrix, both of norm 32 and without a zero.
_ALONG = np.where(np.arange(1024) % 2, -1.0, 1.0).reshape(32, 32)
_ACROSS = np.where(np.arange(1024) % 4 < 2, -1.0, 1.0).reshape(32, 32)


@pytest.mark.parametrize(
    ("along", "across", "word"),
    [
        (0.28, 0.96, "one run"),  # a cosine of 0.28, as initial values have with the first epoch
        (0.20, 0.98, "two runs"),  # a cosine of 0.20, more than two seeds mostly have
        (0.50, 3.29, "one run"),  # 0.15, and the norm has grown around half of what began
        (0.50, 9.99, "two runs"),  # 0.05 is noise, whatever is left
    ],
)
def test_the_bounds_between_one_run_and_two(
    tmp_path: Path, along: float, across: float, word: str
) -> None:
    """A cosine is alike by itself, or where much of what began is still there."""
    grown = along * _ALONG + across * _ACROSS
    found = check(write(tmp_path / "run", [{"w": _ALONG}, {"w": grown}])).verdict
    assert found.word == word
    assert found.least == pytest.approx(along / np.hypot(along, across), abs=1e-3)


@pytest.mark.parametrize("shape", [(1024,), (1, 1024), (1024, 1)])
def test_vectors_tell_nothing(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Scales and biases point the same way in any two seeds, and say nothing in either way."""
    run = [{"v": value.reshape(shape)} for value in (_ALONG, _ACROSS)]
    folder = write(tmp_path / "run", run)
    assert check(folder).verdict.word == "cannot tell"
    assert average(folder, tmp_path / "o.npz").runs.word == "cannot tell"


@pytest.mark.parametrize("place", [0, 2])
def test_checkpoints_of_zeros_are_of_no_run(tmp_path: Path, place: int) -> None:
    """Two of them side by side, before the first step or after the last, are no second run."""
    run = [{"w": _ALONG}, {"w": 1.5 * _ALONG}]
    run[place:place] = [{"w": 0 * _ALONG} for _ in range(2)]
    folder = write(tmp_path / "run", run)
    expected = ((2, 3),) if place == 0 else ((0, 1),)
    assert check(folder).verdict.groups == expected
    assert average(folder, tmp_path / "o.npz").runs.groups == expected


@pytest.mark.parametrize(("others", "foreign"), [(2, None), (3, 3)])
def test_one_is_foreign_among_three_or_more(
    tmp_path: Path, others: int, foreign: int | None
) -> None:
    """Beside two checkpoints, the third may as well be the one that is right."""
    run = [{"w": (1 + 0.1 * k) * _ALONG} for k in range(others)]
    verdict = check(write(tmp_path / "run", [*run, {"w": _ACROSS}])).verdict
    assert (verdict.word, verdict.foreign) == ("two runs", foreign)


def test_a_soup_of_one_base_is_one_run(
    tmp_path: Path, seeds: tuple[list[Tensors], list[Tensors]]
) -> None:
    """Models that were fine-tuned from one base, with other seeds, belong together."""
    base = seeds[0][10]
    tuned = [train(DENSE, Sgd(0.03, 0.9), seed=5 + k, start=base, epochs=2)[-1] for k in range(3)]
    folder = write(tmp_path / "run", tuned)
    assert average(folder, tmp_path / "o.npz").runs.word == "one run"


@pytest.mark.parametrize("network", NETWORKS)
def test_honest_runs_are_averaged(tmp_path: Path, network: str) -> None:
    """From the initial values on, without a word, and `check` finds the same."""
    run = write(tmp_path / "run", train(NETWORKS[network], Adam(0.003), epochs=6))
    report = average(run, tmp_path / "o.npz")
    assert report.runs.word in ("one run", "cannot tell")
    found = check(run).verdict
    assert (found.groups, found.between) == (report.runs.groups, report.runs.between)
    assert found.least == pytest.approx(report.runs.least, abs=1e-12)


@pytest.mark.soak
@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("network", NETWORKS)
def test_honest_runs_of_every_kind(tmp_path: Path, network: str, training: str) -> None:
    """No alarm on ten epochs and the initial values, of 90 kinds of runs."""
    given = dict(TRAININGS[training])
    with np.errstate(all="ignore"):
        run = train(NETWORKS[network], given.pop("optimizer"), **given)
    if not all(np.isfinite(value).all() for tensors in run for value in tensors.values()):
        pytest.skip("the run diverged")
    report = average(write(tmp_path / "run", run), tmp_path / "o.npz")
    assert report.runs.word in ("one run", "cannot tell")


@pytest.mark.soak
@pytest.mark.parametrize("training", ["constant", "momentum", "adam", "decay", "weight decay"])
@pytest.mark.parametrize("network", ["dense", "deep", "autoencoder", "convolution", "embedding"])
def test_two_seeds_of_every_kind(tmp_path: Path, network: str, training: str) -> None:
    """Five epochs of one seed and five of another are refused."""
    given = dict(TRAININGS[training])
    optimizer = given.pop("optimizer")
    first, second = (train(NETWORKS[network], optimizer, seed=seed, **given) for seed in (0, 1))
    refuse(write(tmp_path / "run", [*first[1:6], *second[6:11]]))
