"""A run that was started again into its folder is found by file times, whatever is selected."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from polyak_cli import CheckpointError, average, check, plan, watch
from polyak_cli.checkpoints.restarts import find_restart
from tests.oracle import write_model

DAY = 86400


def written(folder: Path, times: Sequence[float], name: str = "weights.{:02d}.h5") -> Path:
    """Write a checkpoint for each time, epochs from 1, each of other values."""
    folder.mkdir(parents=True)
    for epoch, since in enumerate(times, start=1):
        path = folder / name.format(epoch)
        write_model(path, {"d": {"kernel": np.arange(1, 7, dtype=np.float32) + epoch / 100}})
        os.utime(path, (1.7e9 + since,) * 2)
    return folder


def stale(new: int = 5, count: int = 10, step: float = 600) -> list[float]:
    """Return the times of a run of which the first epochs were written again a day later."""
    return [step * k + DAY * (k < new) for k in range(count)]


def notes_on_times(folder: Path, **options: Any) -> list[str]:
    """Return the suspicions of a plan that speak of file times."""
    made = plan(folder, **options).data()
    texts = [one["text"] for one in made["suspicions"] if one["kind"] == "resumed"]
    assert set(texts) <= set(made["notes"])
    return texts


@pytest.mark.parametrize(
    "options",
    [{}, {"last": 3}, {"from_epoch": 6}, {"to_epoch": 7}, {"every": 3, "last": 2}, {"last": 1}],
    ids=str,
)
def test_a_stale_part_is_said_whatever_is_selected(tmp_path: Path, options: Any) -> None:
    """The plan says what is old and how to leave it out; check and --on-unhealthy fail agree."""
    run = written(tmp_path / "run", stale())
    (text,) = notes_on_times(run, **options)
    assert f"{run / 'weights.06.h5'} to weights.10.h5 were written before" in text
    assert "with --to 5, or" in text
    assert "--exclude 'weights.0[6-9].h5' --exclude 'weights.10.h5'" in text
    with pytest.raises(CheckpointError, match="resumed: "):
        average(run, tmp_path / "o.h5", on_unhealthy="fail", **options)
    rest = {key: value for key, value in options.items() if key != "every"}
    assert [one.kind for one in check(run, **rest).problems] == ["resumed"]


@pytest.mark.parametrize(
    "options",
    [{"to_epoch": 5}, {"to_epoch": 5, "last": 2}, {"exclude": ["weights.0[6-9].h5", "*.10.h5"]}],
    ids=str,
)
def test_the_advice_is_followed_without_a_word(tmp_path: Path, options: Any) -> None:
    """What is left is one run, in the plan and in the check."""
    run = written(tmp_path / "run", stale())
    assert notes_on_times(run, **options) == []
    assert check(run, **options).healthy


A, B, C = 0, DAY, 2 * DAY


@pytest.mark.parametrize(
    ("times", "current"),
    [
        (stale(9), range(9)),  # all but the last were replaced
        (stale(1 + 1), range(2)),
        (stale(5, step=1), range(5)),  # a tiny model: each run within a minute
        (stale(2, 3), range(2)),
        (stale(2, 4), range(2)),
        ([0, 600, 1200, B, B + 600, 3000, 3600], range(5)),  # from the middle
        ([B + k * 600 for k in range(10)], None),  # it has gone past, and nothing is left
        ([k * 600 + (DAY if k >= 5 else 0) for k in range(10)], None),  # resumed, and gone past
        ([C, C + 600, C + 1200, *(B + k * 600 for k in range(3, 7)), 4200, 4800, 5400], range(3)),
        (
            [0, 600, 1200, B, B + 600, C, C + 600, B + 2400, 4800, 5400],
            range(7),
        ),  # both from within
    ],
)
def test_restarts_of_many_kinds(times: list[float], current: range | None) -> None:
    """From the start, from the middle, twice, and with one epoch or one minute left."""
    found = find_restart(range(1, len(times) + 1), times, range(len(times)))
    assert (None if found is None else found.current) == (current and tuple(current))


def fall(runs: int) -> list[float]:
    """Return the times of runs that each left four epochs after those of the next, a day newer."""
    return [DAY * (runs - run) + 600.0 * k for run in range(runs) for k in range(4)]


@pytest.mark.parametrize(
    ("times", "current"),
    [
        ([0, 1200, 600], None),  # of three, one was touched
        ([1800, 2400, 1200], None),  # three without a pause between two runs
        ([3000, 3600, 1200, 1800, 2400], range(2)),  # five show a pattern without a pause
        ([40, 50, 10, 20, 30, 35], None),  # copied within a minute
        ([480, 600, 120, 240, 360, 420], range(2)),  # the same twelve times as slow
        (fall(12), range(4)),
        (fall(14), None),  # so many runs never write into one folder
    ],
)
def test_the_bounds_of_a_pattern(times: list[float], current: range | None) -> None:
    """Few files need a pause, files within a minute tell nothing, and too many runs are none."""
    found = find_restart(range(1, len(times) + 1), times, range(len(times)))
    assert (None if found is None else found.current) == (current and tuple(current))


def test_copies_tell_nothing(tmp_path: Path) -> None:
    """By name over minutes, a few at a time, in no order, and all within a minute."""
    rng = np.random.default_rng(5)
    count = 24
    by_name = sorted(range(count), key=lambda k: str(k + 1))
    times = [0.0] * count
    for place, k in enumerate(by_name):
        times[k] = 70.0 * place
    assert find_restart(range(1, count + 1), times, by_name) is None
    several = [times[by_name[place ^ 1]] for place in range(count)]  # two at a time
    swapped = [0.0] * count
    for place, k in enumerate(by_name):
        swapped[k] = several[place]
    assert find_restart(range(1, count + 1), swapped, by_name) is None
    alarms = 0
    for _ in range(300):
        mixed = [float(t) for t in rng.permutation(times)]
        alarms += find_restart(range(1, count + 1), mixed, range(count)) is not None
    assert alarms == 0
    within = [float(t) for t in rng.permutation(times) * (59 / max(times))]
    assert find_restart(range(1, count + 1), within, range(count)) is None
    assert notes_on_times(written(tmp_path / "run", [1.0] * 6)) == []


def test_a_checkpoint_of_several_files_is_as_new_as_its_newest(tmp_path: Path) -> None:
    """A folder's index may be old where a shard was written since."""
    for epoch in range(1, 7):
        folder = tmp_path / f"checkpoint-{epoch}"
        folder.mkdir()
        shard = folder / "model-00001-of-00001.safetensors"
        save_file({"w": np.full((3, 4), epoch / 8 + 1, np.float32)}, shard)
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"w": shard.name}}))
        for path, since in ((index, 0), (shard, 600 * epoch + DAY * (epoch < 4))):
            os.utime(path, (1.7e9 + since,) * 2)
    (text,) = notes_on_times(tmp_path, last=2)
    assert "checkpoint-4 to checkpoint-6 were written before" in text
    assert "--to 3, or leave the others out with --exclude 'checkpoint-[4-6]'" in text


def test_watch_follows_the_run_that_is_being_written(tmp_path: Path) -> None:
    """From its second checkpoint on, the newest run alone is averaged, and a note says so."""
    for new, expected in ((1, [8, 9, 10]), (2, [1, 2]), (5, [3, 4, 5]), (9, [7, 8, 9])):
        run = written(tmp_path / f"run{new}", stale(new))
        (report,) = watch(run, tmp_path / "o.h5", once=True, last=3, interval=0.01)
        assert [one.epoch for one in report.plan.checkpoints] == expected
        said = [note for note in report.notes if "only the run that is being written" in note]
        assert len(said) == (new > 1)
        assert report.plan.suspicions == ()


def test_watch_follows_no_single_file_that_was_written_again(tmp_path: Path) -> None:
    """An epoch in the middle that was repaired, or copied back, is no run to follow."""
    run = written(tmp_path / "run", [600 * k + DAY * (k == 4) for k in range(10)])
    (report,) = watch(run, tmp_path / "o.h5", once=True, last=3, interval=0.01)
    assert [one.epoch for one in report.plan.checkpoints] == [8, 9, 10]
