"""Flat lists of names: an optimizer's slots and numbers of the run are no part of the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from polyak_cli import average
from polyak_cli.averaging.belonging.states import is_of_the_run
from polyak_cli.tensors import TensorSpec


def spec(name: str, shape: tuple[int, ...] = (3,), dtype: str = "float32") -> TensorSpec:
    """Describe a tensor."""
    return TensorSpec(name, shape, dtype, "<", name, None)


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.state.0.exp_avg",
        "state.0.exp_avg_sq",
        "optim_g.exp_avg.layer1.weight",
        "training_state/momentum_buffer/layer1.weight",
        "opt/square_avg/0",
    ],
)
def test_slots_are_recognised(name: str) -> None:
    """By the slot's own name at the end, or anywhere in an optimizer's path."""
    assert is_of_the_run(spec(name))


@pytest.mark.parametrize("name", ["loss", "lr", "val_loss", "best_acc", "epoch", "metrics/fid"])
def test_numbers_are_recognised_where_they_are_single(name: str) -> None:
    """A vector of that name is not one of them, and neither is a number inside a module."""
    assert is_of_the_run(spec(name, ()))
    assert is_of_the_run(spec(name, (1,)))
    assert not is_of_the_run(spec(name, (2,)))
    assert not is_of_the_run(spec(f"layer.{name}", ()))
    assert not is_of_the_run(spec(name, (), "int64"))


@pytest.mark.parametrize(
    "name",
    ["layer1.weight", "momentum.weight", "optimizer.weight", "net.state.weight", "logit_scale"],
)
def test_a_model_s_tensors_are_not(name: str) -> None:
    """Layers may be called as an optimizer is; a scale may stand alone."""
    assert not is_of_the_run(spec(name))
    assert not is_of_the_run(spec(name, ()))


def test_they_are_carried_and_said(tmp_path: Path) -> None:
    """The output has the newest's, and a note names them."""
    rng = np.random.default_rng(0)
    names = ("w", "optimizer.state.0.exp_avg", "loss")
    models = [
        {name: rng.normal(size=(4,) if name != "loss" else ()) for name in names} for _ in range(3)
    ]
    for k, model in enumerate(models):
        save_file(model, tmp_path / f"m_{k}.safetensors")
    report = average(sorted(tmp_path.iterdir()), tmp_path / "o.safetensors")
    found = load_file(tmp_path / "o.safetensors")
    expected = (models[0]["w"] + models[1]["w"] + models[2]["w"]) / 3
    assert found["w"].tobytes() == expected.tobytes()
    for name in names[1:]:
        assert found[name].tobytes() == models[-1][name].tobytes()
    (note,) = (note for note in report.notes if "not like the model" in note)
    assert "2 tensors (optimizer.state.0.exp_avg" in note or "2 tensors (loss" in note
