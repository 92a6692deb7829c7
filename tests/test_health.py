"""Checking a run: healthy runs, and one run for each kind of problem."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from polyak_cli import Health, __version__, average, check, errors, inspect, plan, watch
from tests.command import SAMPLES, one_line, polyak
from tests.oracle import Array, naive_average, read_model, same_bits, write_model

NEXT = 0.01  # from one checkpoint to the next, relative to the model
BEGUN = 1_700_000_000  # time of the first checkpoint, in seconds since 1970


def walk(count: int, steps: Sequence[float] = (), seed: int = 0) -> list[Array]:
    """Return the models of a run: a random walk, with the given step sizes if there are any."""
    rng = np.random.default_rng(seed)
    models = [rng.normal(size=(60, 50))]
    for k in range(count - 1):
        step = steps[k] if steps else NEXT
        models.append(models[-1] + step * rng.normal(size=models[0].shape))
    return models


def written(
    folder: Path,
    models: Sequence[Array],
    epochs: Sequence[int] | None = None,
    name: str = "model_{}.h5",
    carried: Mapping[str, Array] | None = None,
) -> list[Path]:
    """Write a run with plain h5py, a checkpoint every 100 seconds."""
    folder.mkdir(exist_ok=True)
    paths = []
    for k, model in enumerate(models):
        path = folder / name.format(epochs[k] if epochs else k + 1)
        layer = {"k": model.astype(np.float32), "b": model[0], **(carried or {})}
        paths.append(write_model(path, {"d": layer}))
        os.utime(path, (BEGUN + 100 * k,) * 2)
    return paths


def kinds(found: Health) -> dict[str, list[str]]:
    """Return the kinds of problems by checkpoint; those of the whole run have the key ''."""
    about = {one.path.name: [problem.kind for problem in one.problems] for one in found.checkpoints}
    about[""] = [problem.kind for problem in found.problems]
    return {name: problems for name, problems in about.items() if problems}


def checked(folder: Path, *options: str, expected: int = 1, **same: Any) -> Health:
    """Run the command, check that it reports what the API returns, and return that."""
    found = check(folder, **same)
    done = polyak("check", folder, *options, cwd=folder.parent)
    assert (done.returncode, done.stderr) == (expected, "")
    assert found.healthy is (expected == 0)
    lines = done.stdout.splitlines()
    for problem in found.problems:
        assert f"{problem.kind}: {problem.text}" in lines
    for one in found.checkpoints:
        for problem in one.problems:  # the text stands once where several have the same
            rest = problem.text.removeprefix(str(one.path))
            assert any(line.startswith(f"{problem.kind}: ") and rest in line for line in lines)
        (row,) = (line for line in lines if line.split()[0] == one.path.name)
        assert row.endswith(", ".join(problem.kind for problem in one.problems))
    count = len(found.all_problems)
    assert lines[-1] == ("healthy", "1 problem", f"{count} problems")[min(count, 2)]
    return found


# --- healthy runs ---------------------------------------------------------------------------------


def test_the_sample_run_is_healthy() -> None:
    """It has no problem, with the file times of a clone."""
    found = checked(SAMPLES, expected=0)
    assert [one.epoch for one in found.checkpoints] == list(range(490, 500))
    assert plan(SAMPLES).notes == ()


def test_the_numbers_are_those_of_numpy(tmp_path: Path) -> None:
    """Distances to both neighbours relative to the median norm; size and time."""
    models = walk(6)
    paths = written(tmp_path / "run", models)
    found = check(tmp_path / "run")
    flat = [
        np.concatenate([model.astype(np.float32).astype(np.float64).ravel(), model[0]])
        for model in models
    ]
    norm = float(np.median([np.linalg.norm(one) for one in flat]))
    steps = [float(np.linalg.norm(b - a)) / norm for a, b in pairwise(flat)]
    assert [one.to_next for one in found.checkpoints] == [
        *(pytest.approx(step, rel=1e-12) for step in steps),
        None,
    ]
    assert [one.to_previous for one in found.checkpoints[1:]] == pytest.approx(steps, rel=1e-12)
    assert [one.nonfinite for one in found.checkpoints] == [0] * 6
    assert [one.size for one in found.checkpoints] == [path.stat().st_size for path in paths]
    assert found.checkpoints[1].data()["modified"] == "2023-11-14T22:15:00Z"


def test_slabs_are_put_together(tmp_path: Path) -> None:
    """Tensors larger than the buffers, gzip and empty tensors give the same distances."""
    large = [np.tile(model, (40, 1)) for model in walk(3)]
    for folder, storage in (("plain", None), ("gzip", {"chunks": (64, 50), "compression": "gzip"})):
        (tmp_path / folder).mkdir()
        for k, model in enumerate(large):
            path = tmp_path / folder / f"m_{k}.h5"
            write_model(path, {"d": {"k": model, "e": model[:0]}}, storage=storage)
    plain, packed = (check(tmp_path / folder, max_memory=1 << 20) for folder in ("plain", "gzip"))
    steps = [one.to_next for one in plain.checkpoints]
    assert steps == [one.to_next for one in packed.checkpoints]
    scale = np.median([np.linalg.norm(one) for one in large])
    assert steps[0] == pytest.approx(np.linalg.norm(large[1] - large[0]) / scale, rel=1e-12)


HEALTHY = {
    "a step that shrinks tenfold each epoch": [10.0**-k for k in range(9)],
    "a step that grows tenfold each epoch": [10.0 ** (k - 8) for k in range(4)] + [NEXT] * 5,
    "a jump of the learning rate": [NEXT] * 4 + [100 * NEXT] + [NEXT] * 4,
    "restarts": [1.0, 0.1, 0.01, 1.0, 0.1, 0.01, 1.0, 0.1, 0.01],
    "a restart last": [1.0, 0.1, 0.01, 1.0, 0.1, 0.01, 0.001, 0.001, 1.0],
    "a large first step": [1.0, *[NEXT] * 8],
}


@pytest.mark.parametrize("steps", HEALTHY.values(), ids=HEALTHY)
def test_uneven_steps_are_no_outliers(tmp_path: Path, steps: Sequence[float]) -> None:
    """Training moves most at its beginning, and a learning rate may jump."""
    for seed in range(3):
        written(tmp_path / "run", walk(len(steps) + 1, steps, seed))
        assert check(tmp_path / "run").healthy


def test_an_oscillation_is_no_row_of_outliers(tmp_path: Path) -> None:
    """If every checkpoint is far from both its neighbours, none is an outlier."""
    one, other, *_ = walk(2, [1.0])
    models = [near + (other - one) * (k % 2) for k, near in enumerate(walk(10))]
    written(tmp_path / "run", models)
    assert check(tmp_path / "run").healthy


@pytest.mark.parametrize(
    "epochs",
    [
        [5, 10, 15, 20, 25],
        [10, 20, 30, 45, 55],
        [1, 5, 10, 15, 20],
        [7],
        [7, 90],
        [1, 2, 5, 9, 12, 30],
        [0, 100, 250],
    ],
)
def test_regular_and_irregular_epochs_are_no_gaps(tmp_path: Path, epochs: list[int]) -> None:
    """Every fifth epoch, with an early first one, or only the best: no epoch is surely missing."""
    written(tmp_path / "run", walk(len(epochs)), epochs)
    assert check(tmp_path / "run").healthy


def in_order(*order: int) -> list[int]:
    """Return the time of each epoch if they were written in this order."""
    return [order.index(k + 1) * 100 for k in range(len(order))]


@pytest.mark.parametrize(
    "seconds",
    [
        [0] * 10,  # as many tools copy
        in_order(1, 10, 2, 3, 4, 5, 6, 7, 8, 9),  # copied in the order of their names
        in_order(3, 7, 1, 9, 4, 10, 2, 8, 6, 5),  # in that of the directory
        in_order(6, 1, 7, 2, 8, 3, 9, 4, 10, 5),  # two copies at a time
        in_order(10, 9, 8, 7, 6, 5, 4, 3, 2, 1),
        [k * 1e-3 for k in in_order(1, 2, 3, 4, 5, 9, 10, 6, 7, 8)],  # within a second
        in_order(2, 3, 4, 5, 6, 7, 8, 9, 10, 1),  # the first one was touched
    ],
)
def test_times_of_copies_mean_nothing(tmp_path: Path, seconds: list[float]) -> None:
    """Copies share one time, or have times in the order of names or in no order."""
    for path, since in zip(written(tmp_path / "run", walk(10)), seconds, strict=True):
        os.utime(path, ns=(int((BEGUN + since) * 1e9),) * 2)
    assert check(tmp_path / "run").healthy
    assert plan(tmp_path / "run").notes == ()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_checkpoints_are_checked_too(tmp_path: Path, count: int) -> None:
    """Even a single one, which has no neighbour."""
    written(tmp_path / "run", walk(count, [NEXT, 1.0][: count - 1]))
    found = check(tmp_path / "run")
    assert found.healthy
    assert found.checkpoints[0].to_previous is found.checkpoints[-1].to_next is None


# --- one run a problem ----------------------------------------------------------------------------


def test_a_truncated_and_a_foreign_file_are_unreadable(tmp_path: Path) -> None:
    """Truncated, empty and foreign files are unreadable; distances are measured across them."""
    paths = written(tmp_path / "run", walk(8))
    content = paths[2].read_bytes()
    paths[2].write_bytes(content[: len(content) * 2 // 3])
    paths[4].write_bytes(b"")
    paths[5].write_text("no checkpoint")
    (tmp_path / "run" / "model_9.h5").symlink_to("nowhere")
    broken = ["model_3.h5", "model_5.h5", "model_6.h5", "model_9.h5"]
    found = checked(tmp_path / "run")
    assert kinds(found) == {name: ["unreadable"] for name in broken}
    for one in found.checkpoints:
        assert one.nonfinite == (None if one.problems else 0)
        assert all(one.path.name in problem.text for problem in one.problems)
    second, fourth = found.checkpoints[1], found.checkpoints[3]
    assert second.to_next == fourth.to_previous
    assert second.to_next == pytest.approx(NEXT * np.sqrt(2), rel=0.1)


def test_what_is_wrong_with_several_checkpoints_is_printed_once(tmp_path: Path) -> None:
    """The names of the others follow; another problem has a line of its own."""
    paths = written(tmp_path / "run", walk(9))
    for path in paths[1:7]:
        path.write_bytes(b"GGUF" + bytes(40))
    paths[7].write_text("no checkpoint")
    for k, path in enumerate(paths):
        os.utime(path, (BEGUN + 100 * k,) * 2)  # else the run looks resumed
    done = polyak("check", "run", cwd=tmp_path)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    first = next(k for k, line in enumerate(lines) if line.startswith("unreadable: "))
    assert lines[first].startswith("unreadable: run/model_2.h5: is a GGUF or GGML file")
    some = "run/model_3.h5, run/model_4.h5, run/model_5.h5"
    assert lines[first + 1] == f"  the same of {some} and 2 more"
    assert lines[first + 2].startswith("unreadable: run/model_8.h5: ")
    assert done.stdout.count("is a GGUF") == 1
    assert lines[-1] == "7 problems"


def test_a_log_beside_a_run_is_no_news(tmp_path: Path) -> None:
    """It is listed with -v and in --json; an average of polyak's is always."""
    written(tmp_path / "run", walk(3))
    (tmp_path / "run/training.log").write_text("epoch,loss")
    average(tmp_path / "run", tmp_path / "run/final.h5")
    log = "passed over: run/training.log (not named like a checkpoint)"
    short, long = (polyak("check", "run", *more, cwd=tmp_path) for more in ((), ("-v",)))
    assert (short.returncode, long.returncode) == (0, 0)
    assert log not in short.stdout
    assert log in long.stdout.splitlines()
    for done in (short, long):
        assert "passed over: run/final.h5 (written by polyak)" in done.stdout.splitlines()
    data = json.loads(polyak("check", "run", "--json", cwd=tmp_path).stdout)
    assert {one["path"] for one in data["passed_over"]} == {"run/final.h5", "run/training.log"}


def test_a_newest_checkpoint_that_is_damaged_in_its_optimizer(tmp_path: Path) -> None:
    """It would be the template, whose optimizer state is read too."""
    paths = written(tmp_path / "run", walk(3))
    with h5py.File(paths[2], "r+") as file:
        file.create_group("optimizer_weights")["m"] = h5py.ExternalLink("other.h5", "/m")
    os.utime(paths[2], (BEGUN + 200,) * 2)
    assert kinds(check(tmp_path / "run")) == {"model_3.h5": ["unreadable"]}
    assert len(plan(tmp_path / "run", on_unhealthy="skip").checkpoints) == 2


def test_damage_that_only_the_values_show_is_of_its_checkpoint(tmp_path: Path) -> None:
    """A damaged chunk or a wrong checksum is a problem of one checkpoint only."""
    storage = {"chunks": (60, 50), "compression": "gzip"}
    (tmp_path / "packed").mkdir()
    (tmp_path / "zip").mkdir()
    for k, model in enumerate(walk(3)):
        write_model(tmp_path / "packed" / f"m_{k}.h5", {"d": {"k": model}}, storage=storage)
        np.savez(tmp_path / "zip" / f"m_{k}.npz", k=model)
    with h5py.File(tmp_path / "packed" / "m_1.h5") as file:
        place = file["model_weights/d/k"].id.get_chunk_info(0).byte_offset
    for name, at in (("packed/m_1.h5", place), ("zip/m_1.npz", 5000)):
        path = tmp_path / name
        content = bytearray(path.read_bytes())
        content[at : at + 8] = b"\xff" * 8
        path.write_bytes(content)
        found = check(path.parent)
        assert kinds(found) == {path.name: ["unreadable"]}
        assert found.checkpoints[0].to_next is not None
        assert found.checkpoints[0].to_next == found.checkpoints[2].to_previous


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_counted(tmp_path: Path, value: float) -> None:
    """Two numbers of one tensor; its neighbours are compared with each other instead."""
    models = walk(6)
    models[3][20, :2] = value
    written(tmp_path / "run", models)
    found = checked(tmp_path / "run")
    assert kinds(found) == {"model_4.h5": ["nonfinite"]}
    assert [one.nonfinite for one in found.checkpoints] == [0, 0, 0, 2, 0, 0]
    (problem,) = found.checkpoints[3].problems
    assert "model_4.h5: tensor 'd/k' holds NaN or infinity; 2 of its numbers" in problem.text
    assert found.checkpoints[2].to_next == found.checkpoints[4].to_previous
    assert found.checkpoints[2].to_next == pytest.approx(NEXT * np.sqrt(2), rel=0.1)


def test_a_run_that_diverged_to_its_end(tmp_path: Path) -> None:
    """All checkpoints that are not finite are named; the others keep their distances."""
    models = walk(9)
    for model in models[4:]:
        model[:] = np.nan
    written(tmp_path / "run", models)
    found = check(tmp_path / "run")
    assert list(kinds(found)) == [f"model_{k}.h5" for k in range(5, 10)]
    assert [one.to_next is None for one in found.checkpoints] == [False] * 3 + [True] * 6


def test_a_checkpoint_that_is_the_same_as_the_one_before(tmp_path: Path) -> None:
    """Every bit of every tensor counts, and nothing else in the files; a zero has a sign."""
    models = walk(5)
    models[2] = models[1]
    models[3][0, 0] = 0.0
    models[4] = models[3].copy()
    models[4][0, 0] = -0.0
    paths = written(tmp_path / "run", models)
    with h5py.File(paths[2], "r+") as file:
        file.attrs["written"] = "later"
    os.utime(paths[2], (BEGUN + 200,) * 2)
    found = checked(tmp_path / "run")
    assert kinds(found) == {"model_3.h5": ["identical"]}
    assert found.all_problems[0].text.endswith(
        f"every tensor is bit for bit the same as in {paths[1]}"
    )


def test_carried_tensors_count_where_checkpoints_are_the_same(tmp_path: Path) -> None:
    """Checkpoints with another step counter or text are not the same."""
    for name, one, other in (
        ("n", np.array([1]), np.array([2])),
        ("s", np.array([b"x"]), np.array([b"y"])),
        ("v", np.array(["x"], object), np.array(["y"], object)),
    ):
        folder = tmp_path / name
        (model,) = walk(1)
        written(folder, [model, model], [1, 2], carried={name: one})
        assert kinds(check(folder)) == {"model_2.h5": ["identical"]}
        written(folder, [model], [2], carried={name: other})
        assert check(folder).healthy


def test_a_gap_of_epochs(tmp_path: Path) -> None:
    """A missing epoch is reported if the others are evenly spaced and it was not excluded."""
    written(tmp_path / "run", walk(6), [5, 10, 15, 20, 30, 35])
    found = checked(tmp_path / "run")
    assert kinds(found) == {"": ["gap"]}
    assert "model_20.h5 (epoch 20)" in found.problems[0].text
    assert "most are 5 apart" in found.problems[0].text
    checked(tmp_path / "run", "--from", "30", expected=0, from_epoch=30)
    written(tmp_path / "run", walk(7), [5, 10, 15, 20, 25, 30, 35])
    assert check(tmp_path / "run", exclude=["model_25.h5"]).healthy


def test_a_gap_is_still_reported_where_something_else_was_excluded(tmp_path: Path) -> None:
    """Excluding the final model does not hide a gap."""
    paths = written(tmp_path / "run", walk(5), [1, 2, 3, 5, 6])
    write_model(tmp_path / "run" / "final.h5", {"d": {"k": walk(1)[0]}})
    found = check(tmp_path / "run", exclude=["final.h5"])
    assert kinds(found) == {"": ["gap"]}
    assert paths[2].name in found.problems[0].text


def test_an_epoch_twice(tmp_path: Path) -> None:
    """Both files of one epoch are checked; averaging refuses them."""
    models = walk(5)
    written(tmp_path / "run", models, [1, 2, 3, 4, 5])
    written(tmp_path / "run", [models[2] + NEXT], [3], name="model_00{}.h5")
    found = checked(tmp_path / "run")
    assert kinds(found) == {"model_3.h5": ["duplicate epoch"]}
    assert len(found.checkpoints) == 6
    assert "model_003.h5 and " in found.all_problems[0].text
    with pytest.raises(errors.CheckpointError, match="are both epoch 3"):
        plan(tmp_path / "run", on_unhealthy="skip")


def test_a_name_without_an_epoch(tmp_path: Path) -> None:
    """The file is reported and checked; --from and --to keep it, and --exclude removes it."""
    written(tmp_path / "run", walk(4))
    written(tmp_path / "run", walk(1), [0], name="other.h5")
    assert kinds(check(tmp_path / "run"))["other.h5"] == ["no epoch"]
    found = check(tmp_path / "run", from_epoch=3)
    assert [one.path.name for one in found.checkpoints] == ["other.h5", "model_3.h5", "model_4.h5"]
    found = check(tmp_path / "run", epoch_pattern=r"_(\d+)")
    assert kinds(found)["other.h5"] == ["no epoch"]
    assert check(tmp_path / "run", exclude=["other.h5"]).healthy


def test_two_runs_by_their_names(tmp_path: Path) -> None:
    """The checkpoints of the smaller run are named, and are not compared with the larger run."""
    written(tmp_path / "run", walk(5, seed=0), name="run1_epoch_{}.h5")
    written(tmp_path / "run", walk(3, seed=1), name="run2_epoch_{}.h5")
    found = checked(tmp_path / "run")
    assert kinds(found) == {f"run2_epoch_{k}.h5": ["other run"] for k in (1, 2, 3)}
    steps = [one.to_next for one in found.checkpoints if one.path.name.startswith("run1")]
    assert steps[:-1] == pytest.approx([NEXT] * 4, rel=0.1)


def test_two_kinds_of_file(tmp_path: Path) -> None:
    """Files of two formats are two runs; averaging says the same."""
    models = walk(5)
    written(tmp_path / "run", models[:3])
    for k in (4, 5):
        np.savez(tmp_path / "run" / f"model_{k}.npz", k=models[k - 1])
    found = check(tmp_path / "run")
    assert kinds(found) == {
        "model_4.npz": ["other run", "other model"],
        "model_5.npz": ["other run", "other model"],
        "": ["other run"],
    }
    assert "holds 3 .h5 and 2 .npz files" in found.problems[0].text


def test_two_models(tmp_path: Path) -> None:
    """The model of most checkpoints counts, on a tie the newest; the others' problem says why."""
    models = walk(5)
    models[1] = models[1][:7]
    written(tmp_path / "run", models)
    found = checked(tmp_path / "run")
    assert kinds(found) == {"model_2.h5": ["other model"]}
    assert "tensor 'd/k' has shape (7, 50)" in found.all_problems[0].text
    assert found.checkpoints[0].to_next == found.checkpoints[2].to_previous
    assert kinds(check(tmp_path / "run", to_epoch=2)) == {"model_1.h5": ["other model"]}


def test_layers_that_keras_renumbered(tmp_path: Path) -> None:
    """They are another model by name, and the same model with --match order."""
    for k, (model, layer) in enumerate(zip(walk(2), ("dense", "dense_1"), strict=True)):
        (tmp_path / "run").mkdir(exist_ok=True)
        write_model(tmp_path / "run" / f"m_{k}.h5", {layer: {"kernel": model}})
    assert kinds(check(tmp_path / "run")) == {"m_0.h5": ["other model"]}
    checked(tmp_path / "run", "--match", "order", expected=0, match="order")


@pytest.mark.parametrize("place", [1, 4, 7])
def test_an_outlier(tmp_path: Path, place: int) -> None:
    """The outlier is reported; its neighbours, just as far from it, are not."""
    models = walk(9)
    models[place] = models[place] + 0.5 * walk(1, seed=7)[0]
    written(tmp_path / "run", models)
    assert kinds(check(tmp_path / "run")) == {f"model_{place + 1}.h5": ["outlier"]}


def test_the_newest_as_an_outlier(tmp_path: Path) -> None:
    """It has one step only, which must be far larger than any before."""
    models = walk(6)
    models[-1] = models[-1] + 0.5 * walk(1, seed=7)[0]
    written(tmp_path / "run", models)
    assert kinds(checked(tmp_path / "run")) == {"model_6.h5": ["outlier"]}


@pytest.mark.parametrize(
    ("order", "text"),
    [
        ((1, 2, 3, 4, 5, 9, 10, 6, 7, 8), "model_9.h5 to model_10.h5 were written before"),
        ((1, 2, 3, 4, 5, 6, 7, 8, 10, 9), "model_10.h5 was written before"),
        ((4, 5, 6, 7, 8, 9, 10, 1, 2, 3), "resumed from its beginning"),
    ],
)
def test_a_run_that_was_resumed(tmp_path: Path, order: tuple[int, ...], text: str) -> None:
    """Later epochs written earlier are reported, and noted by the plan of an average."""
    for path, since in zip(written(tmp_path / "run", walk(10)), in_order(*order), strict=True):
        os.utime(path, (BEGUN + since,) * 2)
    found = check(tmp_path / "run")
    assert kinds(found) == {"": ["resumed"]}
    assert text in found.problems[0].text
    made = plan(tmp_path / "run")
    assert made.notes == (found.problems[0].text,)
    assert made.data()["suspicions"] == [{"kind": "resumed", "text": found.problems[0].text}]


def test_one_file_under_two_names(tmp_path: Path) -> None:
    """A link to a checkpoint does not count as another checkpoint."""
    written(tmp_path / "run", walk(3))
    (tmp_path / "run" / "model_4.h5").symlink_to("model_3.h5")
    found = check(tmp_path / "run")
    assert kinds(found) == {"": ["same file"]}
    assert len(found.checkpoints) == 3


def test_files_named_one_by_one_are_ordered_by_epoch(tmp_path: Path) -> None:
    """A shell lists model_10 before model_9; names without epochs keep the given order."""
    paths = written(tmp_path / "run", walk(11))
    found = check(sorted(paths))
    assert found.healthy
    assert [one.epoch for one in found.checkpoints] == list(range(1, 12))
    named = [paths[1].rename(tmp_path / "b.h5"), paths[0].rename(tmp_path / "a.h5")]
    assert [one.path for one in check(named).checkpoints] == named
    assert check(named).healthy


# --- the command ----------------------------------------------------------------------------------


def test_json_is_what_the_api_returns(tmp_path: Path) -> None:
    """With problems of checkpoints and of the run; --quiet does not change the exit code."""
    models = walk(5)
    models[2][:] = np.nan
    written(tmp_path / "run", models, [1, 2, 3, 4, 9])
    done = polyak("check", "run", "--json", cwd=tmp_path)
    data = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (1, "")
    expected = {"polyak": __version__, **check(tmp_path / "run").data()}
    assert json.dumps(data) == json.dumps(expected).replace(f"{tmp_path}{os.sep}", "")
    assert data["healthy"] is False
    assert data["checkpoints"][2]["problems"][0]["kind"] == "nonfinite"
    assert data["problems"][0]["kind"] == "gap"
    done = polyak("check", "run", "--quiet", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_what_cannot_be_checked_is_an_error(tmp_path: Path) -> None:
    """No directory, an empty one, or wrong options: exit 3 or 2, with one line."""
    (tmp_path / "empty").mkdir()
    for arguments, code in ((["nowhere"], 3), ([SAMPLES, "--max-memory", "1k"], 2)):
        done = polyak("check", *arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (code, "")
        one_line(done.stderr)
    cases: list[tuple[Path, dict[str, Any], type[errors.PolyakError]]] = [
        (tmp_path / "empty", {}, errors.CheckpointError),
        (SAMPLES, {"last": 11}, errors.CheckpointError),
        (SAMPLES, {"from_epoch": 600}, errors.CheckpointError),
        (SAMPLES, {"last": 0}, errors.UsageError),
        (SAMPLES, {"from_epoch": 9, "to_epoch": 8}, errors.UsageError),
    ]
    for source, options, error in cases:
        with pytest.raises(error):
            check(source, **options)


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measured values are of neither the older nor the newer file."""
    from polyak_cli.engine import reading

    paths = written(tmp_path / "run", walk(3))
    pieces = reading.read_pieces

    def growing(*arguments: Any) -> Any:
        yield from pieces(*arguments)
        with open(paths[0], "ab") as file:
            file.write(b"more")

    monkeypatch.setattr(reading, "read_pieces", growing)
    with pytest.raises(errors.FormatError, match=r"model_1.h5: changed or vanished"):
        check(tmp_path / "run")


# --- average --on-unhealthy -----------------------------------------------------------------------


@pytest.fixture
def ill(tmp_path: Path) -> Path:
    """Return a run of six: the fourth is not finite, the newest is truncated."""
    models = walk(6)
    models[3][0, 0] = np.nan
    paths = written(tmp_path / "run", models)
    content = paths[5].read_bytes()
    paths[5].write_bytes(content[: len(content) // 2])
    return tmp_path / "run"


def test_fail_refuses_a_run_with_a_problem(ill: Path) -> None:
    """One line names the first problem and what to do; nothing is written."""
    done = polyak("average", ill, "--on-unhealthy", "fail", "-o", "o.h5", cwd=ill.parent)
    assert done.returncode == 3
    line = one_line(done.stderr)
    assert line.startswith(f"nonfinite: {ill / 'model_4.h5'}: tensor 'd/k'")
    assert "1 more problem;" in line
    assert "--on-unhealthy skip" in line
    assert not (ill.parent / "o.h5").exists()
    done = polyak("average", SAMPLES, "--on-unhealthy", "fail", "-n", cwd=ill.parent)
    assert (done.returncode, done.stderr) == (0, "")


def test_skip_averages_the_rest(ill: Path, tmp_path: Path) -> None:
    """The bits are those of the healthy checkpoints' average; everything skipped is reported."""
    output = tmp_path / "o.h5"
    arguments = ("average", ill, "--on-unhealthy", "skip", "--scheme", "linear", "-o", output)
    done = polyak(*arguments, cwd=tmp_path)
    assert done.returncode == 0
    assert "2 of the 6 chosen checkpoints are unhealthy and skipped; 4 are left" in done.stderr
    assert f"skipped (nonfinite): {ill / 'model_4.h5'}: tensor 'd/k' holds NaN" in done.stdout
    assert f"skipped (unreadable): {ill / 'model_6.h5'}" in done.stdout
    kept = [ill / f"model_{k}.h5" for k in (1, 2, 3, 5)]
    expected = naive_average(kept, [1, 2, 3, 4])
    found = {k: v for k, v in read_model(output).items() if k.startswith("model_weights")}
    assert same_bits(expected, found)
    (inside,) = inspect([output])
    assert inside.provenance["skipped"] == [
        {"name": "model_4.h5", "reasons": ["nonfinite"]},
        {"name": "model_6.h5", "reasons": ["unreadable"]},
    ]
    assert [one["name"] for one in inside.provenance["inputs"]] == [path.name for path in kept]
    done = polyak(*arguments, "--dry-run", "--json", "--force", cwd=tmp_path)
    data = json.loads(done.stdout)
    assert [Path(one["path"]).name for one in data["skipped"]] == ["model_4.h5", "model_6.h5"]
    assert data["template"].endswith("model_5.h5")


def test_skip_leaves_a_healthy_run_as_it_is(tmp_path: Path) -> None:
    """The bytes are the same as without the option, and the record does not mention it."""
    average(SAMPLES, tmp_path / "a.h5", scheme="exp")
    average(SAMPLES, tmp_path / "b.h5", scheme="exp", on_unhealthy="skip")
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    (inside,) = inspect([tmp_path / "b.h5"])
    assert "skipped" not in inside.provenance


def test_skip_takes_those_chosen_first(ill: Path) -> None:
    """--last counts before skipping; custom coefficients stay with their checkpoints."""
    made = plan(ill, last=3, on_unhealthy="skip", coefficients=[5, 1, 7])
    assert [one.path.name for one in made.checkpoints] == ["model_5.h5"]
    assert made.coefficients == (1.0,)
    made = plan(ill, last=4, on_unhealthy="skip", coefficients=[1, 5, 3, 7])
    assert made.coefficients == (0.25, 0.75)
    with pytest.raises(errors.PolyakError, match="coefficients"):
        plan(ill, last=4, on_unhealthy="skip", coefficients=[1, 3])


def test_skip_never_replaces_what_it_skips(ill: Path) -> None:
    """An unhealthy checkpoint is still one of the run."""
    with pytest.raises(errors.OutputError):
        plan(ill, ill / "model_4.h5", on_unhealthy="skip", force=True)


def test_a_run_without_a_healthy_checkpoint_is_an_error(ill: Path) -> None:
    """There is nothing left to average."""
    with pytest.raises(errors.CheckpointError, match="no healthy checkpoint is left"):
        plan([ill / "model_4.h5", ill / "model_6.h5"], on_unhealthy="skip")


def test_what_is_wrong_with_the_run_cannot_be_skipped(tmp_path: Path) -> None:
    """A gap is a note, also with skip, and an error with fail; an excluded epoch is no gap."""
    written(tmp_path / "run", walk(6), [1, 2, 3, 5, 6, 7])
    (note,) = plan(tmp_path / "run").notes
    assert "checkpoints are missing" in note
    made = plan(tmp_path / "run", on_unhealthy="skip")
    assert (made.notes, made.skipped) == ((note,), ())
    with pytest.raises(errors.CheckpointError, match=r"^gap: between .* are missing"):
        plan(tmp_path / "run", on_unhealthy="fail")
    written(tmp_path / "run", walk(7))
    assert plan(tmp_path / "run", exclude=["model_4.h5"]).notes == ()
    assert plan(tmp_path / "run", exclude=["model_4.h5"], on_unhealthy="fail").notes == ()


def test_options_that_do_not_go_with_it(tmp_path: Path) -> None:
    """--use-ema and `watch` are refused, and so are unknown words."""
    with pytest.raises(errors.UsageError, match="--use-ema"):
        plan(SAMPLES, on_unhealthy="skip", use_ema=True)
    wrong: Any = "ignore"
    with pytest.raises(errors.UsageError, match="--on-unhealthy is ignore; expected one of fail"):
        plan(SAMPLES, on_unhealthy=wrong)
    with pytest.raises(errors.UsageError, match="on_unhealthy belongs to average"):
        next(watch(SAMPLES, tmp_path / "o.h5", on_unhealthy="skip"))
