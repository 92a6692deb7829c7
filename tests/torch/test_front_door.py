"""The rows of the README's table whose files PyTorch writes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import load_file

from tests.test_front_door import KERNEL, run_row

LIGHTNING = "Lightning `.ckpt` files, SpeechBrain folders"


def save(path: Path, shift: float, *, lightning: bool = False) -> None:
    """Save a state dict, bare or as a Lightning checkpoint holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state: Any = {"net.weight": torch.from_numpy(KERNEL + np_float(shift))}
    if lightning:
        state = {
            "epoch": int(shift),
            "global_step": 10 * int(shift),
            "pytorch-lightning_version": "2.4.0",
            "state_dict": state,
            "loops": {},
            "callbacks": {},
            "optimizer_states": [{"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
            "lr_schedulers": [],
            "hyper_parameters": {"width": 32},
        }
    torch.save(state, path)


def np_float(shift: float) -> Any:
    """Return a shift that leaves float32 arrays float32."""
    return KERNEL.dtype.type(shift)


@pytest.mark.parametrize("have", ["PyTorch state dicts, `.pt` or `.pth`", LIGHTNING])
def test_a_row_of_pytorch_runs(tmp_path: Path, have: str) -> None:
    """PyTorch loads the mean of the five checkpoints that it saved."""
    for epoch in range(1, 6):
        name = f"epoch={epoch}-step={10 * epoch}.ckpt" if have == LIGHTNING else f"model_{epoch}.pt"
        save(tmp_path / "ckpts" / name, epoch, lightning=have == LIGHTNING)
    loaded = torch.load(tmp_path / run_row(have, tmp_path)[-1], weights_only=True)
    state = loaded["state_dict"] if have == LIGHTNING else loaded
    assert torch.allclose(state["net.weight"], torch.from_numpy(KERNEL + 3), rtol=0, atol=1e-6)


def test_the_row_of_speechbrain_runs(tmp_path: Path) -> None:
    """Its folders lie in one, and PyTorch loads the mean of their model.ckpt."""
    for day in range(1, 6):
        save(tmp_path / "ckpts" / f"CKPT+2024-01-0{day}+00-00-00+00" / "model.ckpt", day)
    found = torch.load(tmp_path / run_row(LIGHTNING, tmp_path)[-1], weights_only=True)
    assert torch.allclose(found["net.weight"], torch.from_numpy(KERNEL + 3), rtol=0, atol=1e-6)


def test_the_row_of_a_part_as_safetensors_runs(tmp_path: Path) -> None:
    """The library of safetensors loads the mean of what Lightning's files hold as the model."""
    for epoch in range(1, 6):
        save(tmp_path / "ckpts" / f"epoch={epoch}.ckpt", epoch, lightning=True)
    have = "Lightning `.ckpt`, to become safetensors"
    found = load_file(tmp_path / run_row(have, tmp_path)[-1])
    assert torch.allclose(found["net.weight"], torch.from_numpy(KERNEL + 3), rtol=0, atol=1e-6)


def test_the_row_of_distributed_checkpoints_runs(tmp_path: Path) -> None:
    """PyTorch loads the mean of five folders that it saved into a state dict."""
    for step in range(1, 6):
        state = {"model": {"net.weight": torch.from_numpy(KERNEL + np_float(step))}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.distributed.checkpoint.save(
                state, checkpoint_id=tmp_path / "run" / f"step-{step}", no_dist=True
            )
    output = run_row("PyTorch distributed checkpoints (DCP) of FSDP2 or torchtitan", tmp_path)[-1]
    found = {"model": {"net.weight": torch.zeros(32, 32)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.distributed.checkpoint.load(found, checkpoint_id=tmp_path / output, no_dist=True)
    expected = torch.from_numpy(KERNEL + 3)
    assert torch.allclose(found["model"]["net.weight"], expected, rtol=0, atol=1e-6)


def test_the_row_of_files_in_another_order_runs(tmp_path: Path) -> None:
    """The first file counts once, the second three times."""
    save(tmp_path / "a.pt", 4)
    save(tmp_path / "b.pt", 8)
    run_row("some files in another order", tmp_path)
    loaded = torch.load(tmp_path / "two.pt", weights_only=True)
    expected = torch.from_numpy(KERNEL + np_float(7))
    assert torch.allclose(loaded["net.weight"], expected, rtol=0, atol=1e-5)
