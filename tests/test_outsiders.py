"""Folders as trainers leave them: what is no epoch of the run, links, names without a suffix."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

from polyak_cli import average
from polyak_cli.checkpoints import select, survey
from polyak_cli.errors import CheckpointError
from tests.test_checkpoints import make, names, reasons, refusal

NEWEST, BEST = "the newest checkpoint, by its name", "the best checkpoint, by its name"
AVERAGE = "an average, by its name"
#: What trainers write into one folder -> what is passed over, and why.  "" is an epoch.
FOLDERS = {
    "fairseq": {
        "checkpoint1.pt": "",
        "checkpoint2.pt": "",
        "checkpoint10.pt": "",
        "checkpoint_best.pt": BEST,
        "checkpoint_last.pt": NEWEST,
        "checkpoint.best_loss_4.52.pt": BEST,
    },
    "ESPnet": {
        "1epoch.pth": "",
        "2epoch.pth": "",
        "10epoch.pth": "",
        "checkpoint.pth": "the state that training resumes from, by its name",
        "valid.acc.ave_3best.pth": AVERAGE,
        "valid.acc.ave_10best.till35epoch.pth": AVERAGE,
        "train.loss.best.pth": BEST,
    },
    "wenet": {
        "0.pt": "",
        "1.pt": "",
        "2.pt": "",
        "init.pt": "the initial model, by its name",
        "final.pt": "the final model, by its name",
        "avg_30.pt": AVERAGE,
    },
    "Lightning": {
        "epoch=1-step=10.ckpt": "",
        "epoch=2-step=20.ckpt": "",
        "last.ckpt": NEWEST,
        "last-v1.ckpt": NEWEST,
    },
    "timm": {
        "checkpoint-9.pth.tar": "",
        "checkpoint-10.pth.tar": "",
        "last.pth.tar": NEWEST,
        "model_best.pth.tar": BEST,
        "tmp.pth.tar": "unfinished, by its name",
    },
    "icefall": {
        "epoch-1.pt": "",
        "epoch-2.pt": "",
        "best-train-loss.pt": BEST,
        "best-valid-loss.pt": BEST,
    },
    "OpenMMLab": {
        "epoch_1.pth": "",
        "epoch_2.pth": "",
        "latest.pth": NEWEST,
        "best_coco_bbox_mAP_epoch_1.pth": BEST,
    },
    "two suffixes": {"model_1.ckpt.pt": "", "model_2.ckpt.pt": "", "bestModel.ckpt.pt": BEST},
}


@pytest.mark.parametrize("files", FOLDERS.values(), ids=FOLDERS)
def test_what_is_no_epoch_of_the_run_is_passed_over(tmp_path: Path, files: dict[str, str]) -> None:
    """Each with its reason; `check` sees the same run."""
    make(tmp_path, *files)
    found = select([tmp_path])
    assert names(found) == [name for name, reason in files.items() if not reason]
    assert reasons(found) == {name: reason for name, reason in files.items() if reason}
    assert names(survey([tmp_path])) == names(found)
    assert survey([tmp_path]).problems == ()


@pytest.mark.parametrize(
    "files",
    [
        ["best_1.pt", "best_2.pt"],
        ["avg_1.pt", "avg_2.pt", "avg_3.pt"],
        ["last-1.ckpt", "last-2.ckpt"],
        ["bestial_1.pt", "bestial_2.pt", "bestial_3.pt"],
        ["best.pt"],
    ],
)
def test_a_run_that_is_called_so_itself_is_averaged(tmp_path: Path, files: list[str]) -> None:
    """The words say something only beside files that are named otherwise."""
    make(tmp_path, *files)
    if len(files) > 1:
        assert names(select([tmp_path])) == files
    else:
        assert "is the only checkpoint" in refusal(tmp_path)


def test_files_given_by_name_and_patterns_of_epochs_are_taken_at_their_word(
    tmp_path: Path,
) -> None:
    """Who names a file wants it."""
    paths = make(tmp_path, "m_1.pt", "m_2.pt", "best_9.pt")
    assert names(select(paths)) == ["m_1.pt", "m_2.pt", "best_9.pt"]
    assert names(select([tmp_path], epoch_pattern=r"(\d+)")) == ["m_1.pt", "m_2.pt", "best_9.pt"]


def test_links_to_an_epoch_are_passed_over(tmp_path: Path) -> None:
    """A link without a number names what it leads to; one with a number is an error still."""
    make(tmp_path, "1epoch.pth", "2epoch.pth")
    for link, target in (("chosen.pth", "1epoch.pth"), ("newer.pth", "chosen.pth")):
        (tmp_path / link).symlink_to(target)
    (tmp_path / "hard.pth").hardlink_to(tmp_path / "1epoch.pth")  # as timm's last.pth.tar is
    found = select([tmp_path])
    assert names(found) == ["1epoch.pth", "2epoch.pth"]
    assert reasons(found) == dict.fromkeys(
        ("chosen.pth", "newer.pth", "hard.pth"), "a link to 1epoch.pth"
    )
    (tmp_path / "3epoch.pth").symlink_to("2epoch.pth")
    assert "are the same file" in refusal(tmp_path)


@pytest.mark.parametrize("stem", ["ckpt", "checkpoint"])
def test_numbers_between_dots_are_epochs(tmp_path: Path, stem: str) -> None:
    """ckpt.3.pt is one of a run, and ckpt.pt beside it is what the run is resumed from."""
    make(tmp_path, *(f"{stem}.{epoch}.pt" for epoch in (1, 2, 3)), f"{stem}.pt")
    found = select([tmp_path])
    assert names(found) == [f"{stem}.{epoch}.pt" for epoch in (1, 2, 3)]
    assert reasons(found) == {f"{stem}.pt": "the state that training resumes from, by its name"}


def test_updates_of_fairseq_are_in_order(tmp_path: Path) -> None:
    """Several checkpoints of one epoch are told apart by the number of updates."""
    made = ["checkpoint_1_500.pt", "checkpoint_1_1000.pt", "checkpoint_2_1500.pt"]
    make(tmp_path, *made, "checkpoint_best.pt", "checkpoint_last.pt")
    found = select([tmp_path])
    assert names(found) == made
    assert [one.epoch for one in found.checkpoints] == [500, 1000, 1500]


def test_the_number_of_a_process_is_none_of_an_epoch(tmp_path: Path) -> None:
    """Composer links to its newest checkpoint by latest-rank0.pt."""
    make(tmp_path, "ep1-ba100-rank0.pt", "ep2-ba200-rank0.pt")
    (tmp_path / "latest-rank0.pt").symlink_to("ep2-ba200-rank0.pt")
    found = select([tmp_path])
    assert names(found) == ["ep1-ba100-rank0.pt", "ep2-ba200-rank0.pt"]
    assert reasons(found) == {"latest-rank0.pt": "a link to ep2-ba200-rank0.pt"}


def test_a_link_out_of_the_folder_needs_a_number(tmp_path: Path) -> None:
    """Where it leads is no checkpoint of this folder."""
    (outside,) = make(tmp_path, "elsewhere.pth")
    run = tmp_path / "run"
    run.mkdir()
    make(run, "1epoch.pth", "2epoch.pth")
    (run / "base.pth").symlink_to(outside)
    assert "base.pth: its name has no whole number" in refusal(run)


def obey(folder: Path) -> list[str]:
    """Follow the --exclude options of an error once; return the names that are then chosen."""
    advised = re.findall(r"--exclude '([^']+)'", refusal(folder))
    return names(select([folder], exclude=advised))


@pytest.mark.parametrize(
    "others",
    [
        ["a.pt", "b.pt", "codebook.pt"],
        ["epoch-1.pt", "epoch-2.pt"],
        ["other[1].pt", "other[2].pt"],
        ["1-x.pt", "2-x.pt"],
        ["checkpoint-1.5.pt", "x-3.pt"],
        ["lone_7.pt"],
    ],
)
def test_one_error_has_the_exclude_that_settles_it(tmp_path: Path, others: list[str]) -> None:
    """All files that cannot be ordered are left out by the options that it names."""
    usual = ["checkpoint-1000.pt", "checkpoint-2000.pt", "checkpoint-3000.pt"]
    make(tmp_path, *usual, *others)
    assert obey(tmp_path) == usual


def write_npz(path: Path, value: float) -> None:
    """Write an archive of numpy under any name."""
    with path.open("wb") as file:
        np.savez(file, w=np.full(3, value, np.float32))


def test_files_without_a_suffix_are_known_by_their_content(tmp_path: Path) -> None:
    """Only where no file is named like a checkpoint; what is none stays passed over."""
    for k in (1, 2):
        write_npz(tmp_path / f"do_{k:08}", k)
        write_npz(tmp_path / f"params.{k:05}", k)
    (tmp_path / "config").write_text("width: 3")
    os.mkfifo(tmp_path / "pipe_3")
    message = refusal(tmp_path)
    assert "look like checkpoints of two runs" in message
    assert names(select([tmp_path], exclude=["params.*"])) == ["do_00000001", "do_00000002"]
    for pattern in ("do_*", "params.*"):
        average(str(tmp_path / pattern), tmp_path / "o.npz", force=True)
        with np.load(tmp_path / "o.npz") as found:
            assert found["w"].tolist() == [1.5] * 3
    (tmp_path / "o.npz").unlink()
    make(tmp_path, "m_1.npz")
    assert names(select([tmp_path])) == ["m_1.npz"]


def test_a_folder_of_other_files_holds_no_checkpoint(tmp_path: Path) -> None:
    """Text and pipes are looked at and left."""
    (tmp_path / "config_1").write_text("width: 3")
    os.mkfifo(tmp_path / "pipe_3")
    with pytest.raises(CheckpointError, match="there is no checkpoint here"):
        select([tmp_path])
