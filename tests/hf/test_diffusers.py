"""Runs of Diffusers' training scripts: models and their EMA in folders of each checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel

from polyak_cli import CheckpointError, average, check, verify

State = dict[str, torch.Tensor]


def make_unet() -> Any:
    """Return a small model."""
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )


def save_run(run: Path) -> tuple[list[State], list[State]]:
    """Save checkpoints as the scripts' hook for Accelerate does; return the states and the EMAs."""
    torch.manual_seed(0)
    model = make_unet()
    ema = EMAModel(model.parameters(), decay=0.5, model_cls=UNet2DModel, model_config=model.config)
    states, means = [], []
    for step in (500, 1000):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        ema.step(model.parameters())
        folder = run / f"checkpoint-{step}"
        ema.save_pretrained(str(folder / "unet_ema"))
        model.save_pretrained(str(folder / "unet"))
        for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
            torch.save({"state": {}}, folder / name)
        states.append(copy.deepcopy(model.state_dict()))
        exported = make_unet()
        ema.copy_to(exported.parameters())
        means.append(exported.state_dict())
    (run / "logs").mkdir()
    return states, means


def assert_mean(folder: Path, states: list[State]) -> None:
    """Compare what Diffusers loads with the mean that PyTorch computes."""
    loaded = UNet2DModel.from_pretrained(folder).state_dict()
    assert loaded.keys() == states[0].keys()
    for name, value in loaded.items():
        mean = sum((state[name].double() for state in states), torch.zeros(())) / len(states)
        assert torch.equal(value, mean.float()), name


def test_the_folder_of_a_run_is_enough(tmp_path: Path) -> None:
    """The models are averaged, or with use_ema their EMAs; Diffusers loads both."""
    states, means = save_run(tmp_path / "run")
    report = average(tmp_path / "run", tmp_path / "unet")
    assert [one.epoch for one in report.plan.checkpoints] == [500, 1000]
    assert_mean(tmp_path / "unet", states)
    report = average(tmp_path / "run", tmp_path / "ema", use_ema=True)
    assert any("'unet_ema' hold running means" in note for note in report.notes)
    assert_mean(tmp_path / "ema", means)
    EMAModel.from_pretrained(str(tmp_path / "ema"), UNet2DModel)
    assert verify(tmp_path / "ema").verified
    assert not check(tmp_path / "run").problems


def test_the_final_model_beside_the_checkpoints_is_passed_over(tmp_path: Path) -> None:
    """The scripts save the whole pipeline into the folder of the run at the end."""
    states, _ = save_run(tmp_path / "run")
    make_unet().save_pretrained(tmp_path / "run/unet")
    make_unet().save_pretrained(tmp_path / "run/vae")
    report = average(tmp_path / "run", tmp_path / "unet")
    assert_mean(tmp_path / "unet", states)
    reasons = {one.path.name: one.reason for one in report.plan.passed_over}
    assert reasons["vae"] == "no checkpoint of the run, by its name"
    assert reasons["unet_ema"] == "the EMA, which --use-ema takes"


def test_several_models_are_averaged_one_by_one(tmp_path: Path) -> None:
    """Which one, the user says; the error has the pattern of each."""
    save_run(tmp_path / "run")
    for step in (500, 1000):
        make_unet().save_pretrained(tmp_path / f"run/checkpoint-{step}/text_encoder")
    with pytest.raises(
        CheckpointError, match=r"several models each.*/\*/text_encoder' or '.*unet'"
    ):
        average(tmp_path / "run", tmp_path / "unet")
    average(f"{tmp_path}/run/*/unet_ema", tmp_path / "unet", use_ema=True)
