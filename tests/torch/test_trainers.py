"""Runs of trainers as they lie on the disk: from the folder to an average that loads."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from polyak_cli import CheckpointError, FormatError, UsageError, average, select, verify


def test_a_run_of_speechbrain_is_averaged(tmp_path: Path) -> None:
    """Its best checkpoints, by the metric that it wrote; the average takes model.ckpt's place."""
    run, weights = tmp_path / "save", []
    for number, (date, wer) in enumerate(
        [("01-02+23-04-05", 9.5), ("01-03+01-00-00", 8.25), ("02-01+00-00-00", 9.0)]
    ):
        folder = run / f"CKPT+2024-{date}+00"
        folder.mkdir(parents=True)
        torch.manual_seed(number)
        model = nn.ModuleDict({"enc": nn.Linear(3, 4), "dec": nn.Linear(4, 2)})
        optimizer = torch.optim.Adam(model.parameters())
        torch.save(model.state_dict(), folder / "model.ckpt")
        torch.save(optimizer.state_dict(), folder / "optimizer.ckpt")
        (folder / "counter.ckpt").write_text(str(number + 1))
        (folder / "CKPT.yaml").write_text(f"# yamllint disable\nWER: {wer}\nend-of-epoch: true\n")
        weights.append(model.state_dict())
    output = tmp_path / "model.ckpt"
    report = average(run, output, best=2)
    assert [one.metric for one in report.plan.checkpoints] == [8.25, 9.0]
    assert any("only model.ckpt is averaged" in note for note in report.notes)
    found = torch.load(output, weights_only=True)
    for name, value in found.items():
        mean = (weights[1][name].double() + weights[2][name].double()) / 2
        assert torch.equal(value, mean.float()), name
    nn.ModuleDict({"enc": nn.Linear(3, 4), "dec": nn.Linear(4, 2)}).load_state_dict(found)
    assert verify(output, sources=[*run.iterdir()]).verified


def write_timm(folder: Path, metrics: Sequence[float | None], **settings: Any) -> Path:
    """Write checkpoints as timm's CheckpointSaver does, with the arguments of its script."""
    folder.mkdir()
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    for epoch, metric in enumerate(metrics):
        torch.manual_seed(epoch)
        state = {
            "epoch": epoch,
            "arch": "resnet10t",
            "state_dict": nn.Linear(3, 2).state_dict(),
            "optimizer": optimizer.state_dict(),
            "version": 2,
            "args": Namespace(model="resnet10t", **settings),
        }
        state |= {} if metric is None else {"metric": metric}
        torch.save(state, folder / f"checkpoint-{epoch}.pth.tar")
    return folder


def chosen(run: Path, **options: Any) -> list[tuple[int | None, float | None]]:
    """Return epoch and metric of the chosen checkpoints."""
    return [(one.epoch, one.metric) for one in select([run], **options).checkpoints]


def test_the_metric_in_checkpoints_of_timm_counts(tmp_path: Path) -> None:
    """By the name that its arguments give it; with the mode of that name, or one that is given."""
    run = write_timm(tmp_path / "top1", [71.5, 73.25, 70.0, 72.0], eval_metric="top1")
    assert chosen(run, best=2) == [(1, 73.25), (3, 72.0)]
    assert chosen(run, best=1, monitor="top1") == [(1, 73.25)]
    assert chosen(run, best=1, monitor="metric", mode="min") == [(2, 70.0)]
    assert "top1 is that in each checkpoint (max is better)" in select([run], best=1).notes
    run = write_timm(tmp_path / "loss", [0.5, 0.25, 0.75], eval_metric="loss")
    assert chosen(run, best=1) == [(1, 0.25)]
    output = tmp_path / "o.pth.tar"
    average(run, output, best=2, key="state_dict")
    found = torch.load(output, weights_only=False)["state_dict"]
    models = [
        torch.load(run / f"checkpoint-{k}.pth.tar", weights_only=False)["state_dict"]
        for k in (0, 1)
    ]
    for name, value in found.items():
        assert torch.equal(value, ((models[0][name].double() + models[1][name]) / 2).float())


def test_a_metric_that_is_missing_or_not_understood_is_named(tmp_path: Path) -> None:
    """Nothing is guessed: not the direction, and not the metric of another checkpoint."""
    run = write_timm(tmp_path / "none", [0.5, None, 0.75], eval_metric="loss")
    with pytest.raises(CheckpointError, match=r"checkpoint-1\.pth\.tar: has no metric, unlike"):
        select([run], best=1)
    run = write_timm(tmp_path / "unnamed", [0.5, 0.25])
    with pytest.raises(UsageError, match=r"the metric in it is called nothing.*--mode max"):
        select([run], best=1)
    assert chosen(run, best=1, mode="max") == [(0, 0.5)]
    with pytest.raises(CheckpointError, match=r"looked in its name for val_loss"):
        select([run], best=1, monitor="val_loss")
    (run / "checkpoint-1.pth.tar").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(CheckpointError, match=r"looked in its name"):
        select([run], best=1)


@pytest.mark.parametrize(
    "state",
    [
        {"module": None, "param_shapes": [], "optimizer": None},
        {"optimizer_state_dict": {"zero_stage": 3, "fp32_flat_groups": [torch.ones(9)]}},
    ],
    ids=["model", "optimizer"],
)
def test_a_part_of_deepspeed_says_how_it_becomes_whole(tmp_path: Path, state: Any) -> None:
    """Where a part is named by itself; folders say so too."""
    path = tmp_path / "zero_pp_rank_0_mp_rank_00_states.pt"
    torch.save(state | {"ds_version": "0.18.0", "ds_config": {}}, path)
    with pytest.raises(FormatError, match=r"part of a checkpoint of DeepSpeed.*zero_to_fp32\.py"):
        average([path], tmp_path / "o.pt")


def test_a_model_of_deepspeed_without_zero_is_averaged(tmp_path: Path) -> None:
    """Its weights are whole then, and --key makes them safetensors."""
    for step in (100, 200):
        folder = tmp_path / f"run/global_step{step}"
        folder.mkdir(parents=True)
        state = {"module": {"w": torch.full((3,), step / 100)}, "ds_version": "0.18.0"}
        torch.save(state | {"args": Namespace(lr=0.1)}, folder / "mp_rank_00_model_states.pt")
    pattern = f"{tmp_path}/run/*/mp_rank_00_model_states.pt"
    average(pattern, tmp_path / "o.safetensors", key="module")
    assert load_file(tmp_path / "o.safetensors")["w"].tolist() == [1.5] * 3
