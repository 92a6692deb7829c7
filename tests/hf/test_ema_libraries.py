"""Checkpoints with an EMA that its own library keeps: ema-pytorch and Ignite."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from ema_pytorch import EMA, PostHocEMA
from torch import nn

from polyak_cli import average

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch calls its own torch.jit.script
    from ignite.engine import Engine, Events
    from ignite.handlers import Checkpoint, DiskSaver, EMAHandler

State = dict[str, torch.Tensor]


def make_net() -> Any:
    """Return a model with statistics of BatchNorm, and a counter."""
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 2))


def shift(net: Any) -> None:
    """Move all parameters a little, as a step of training does."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)


def assert_mean(found: State, states: Sequence[State]) -> None:
    """Compare with the mean that PyTorch computes in float64; counters are the newest's."""
    assert found.keys() == states[0].keys()
    for name, value in found.items():
        expected = states[-1][name]
        if value.is_floating_point():
            mean = sum((state[name].double() for state in states), torch.zeros(())) / len(states)
            expected = mean.to(value.dtype)
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("use_ema", [False, True])
def test_the_mean_of_ema_pytorch_loads_into_it(tmp_path: Path, use_ema: bool) -> None:
    """The library's own state dict, beside the model's."""
    torch.manual_seed(0)
    (tmp_path / "run").mkdir()
    net = make_net()
    ema = EMA(net, beta=0.5, update_every=1, update_after_step=0)
    states, means = [], []
    for step in (1, 2):
        shift(net)
        ema.update()
        shift(ema.ema_model)
        states.append(copy.deepcopy(net.state_dict()))
        means.append(copy.deepcopy(ema.ema_model.state_dict()))
        torch.save(
            {"model": net.state_dict(), "ema": ema.state_dict()}, tmp_path / f"run/ckpt.{step}.pt"
        )
    average(tmp_path / "run", tmp_path / "o.pt", use_ema=use_ema)
    found = torch.load(tmp_path / "o.pt", weights_only=True)
    ema.load_state_dict(found["ema"])
    assert_mean(ema.ema_model.state_dict(), means if use_ema else states)
    net.load_state_dict(found["model"])
    assert_mean(net.state_dict(), means if use_ema else states)


def ema_of_ema_pytorch(net: Any, beta: float) -> tuple[Callable[[], None], Callable[[], State]]:
    """Return what updates an EMA of ema-pytorch, in every step from the first on, and reads it."""
    ema = EMA(net, beta=beta, update_every=1, update_after_step=0)
    return ema.update, lambda: dict(ema.ema_model.named_parameters())


def ema_of_diffusers(
    net: Any, beta: float, warmup: bool
) -> tuple[Callable[[], None], Callable[[], State]]:
    """Return what updates an EMA of diffusers, and what reads it."""
    names = [name for name, _ in net.named_parameters()]
    ema = EMAModel(net.parameters(), decay=beta, use_ema_warmup=warmup)
    return (
        lambda: ema.step(net.parameters()),
        lambda: dict(zip(names, ema.shadow_params, strict=True)),
    )


@pytest.mark.parametrize(
    ("ramp", "make"),
    [
        ("ema-pytorch", ema_of_ema_pytorch),
        ("ema-pytorch", partial(ema_of_diffusers, warmup=True)),
        ("tfa", partial(ema_of_diffusers, warmup=False)),
    ],
)
@pytest.mark.parametrize("beta", [0.4, 0.9999])
def test_a_ramp_gives_what_its_library_keeps(
    tmp_path: Path, ramp: Any, make: Callable[..., Any], beta: float
) -> None:
    """Over the same checkpoints, whether the ramp has reached the decay or not."""
    torch.manual_seed(0)
    net = nn.Linear(4, 3).double()
    update, read = make(net, beta)
    for step in range(1, 9):
        shift(net)
        update()
        torch.save(net.state_dict(), tmp_path / f"step_{step}.pt")
    average(tmp_path, tmp_path / "o.pt", scheme="ema", decay=beta, ramp=ramp)
    found = torch.load(tmp_path / "o.pt", weights_only=True)
    for name, value in read().items():
        # Their factors are float32.
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("use_ema", [False, True])
def test_ignite_goes_on_from_an_average(tmp_path: Path, use_ema: bool) -> None:
    """Its checkpoints hold model, EMA, optimizer and the state of the trainer."""
    torch.manual_seed(0)
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    trainer = Engine(lambda _, __: shift(net))
    handler = EMAHandler(net, momentum=0.5)
    handler.attach(trainer)
    whole = {"model": net, "ema": handler.ema_model, "optimizer": optimizer, "trainer": trainer}
    saver = DiskSaver(str(tmp_path / "run"))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint(whole, saver, n_saved=None))
    trainer.run([0, 1], max_epochs=3)
    paths = sorted((tmp_path / "run").iterdir())
    assert [path.name for path in paths] == [
        "checkpoint_2.pt",
        "checkpoint_4.pt",
        "checkpoint_6.pt",
    ]
    average(tmp_path / "run", tmp_path / "o.pt", last=2, use_ema=use_ema)
    saved = [torch.load(path, weights_only=True) for path in paths[-2:]]
    assert not torch.equal(saved[0]["model"]["0.weight"], saved[0]["ema"]["0.weight"])
    Checkpoint.load_objects(whole, torch.load(tmp_path / "o.pt", weights_only=True))
    key = "ema" if use_ema else "model"
    for one in (net, handler.ema_model):
        assert_mean(one.state_dict(), [state[key] for state in saved])
    trainer.run([0, 1], max_epochs=4)


def test_the_post_hoc_ema_of_ema_pytorch_is_made(tmp_path: Path) -> None:
    """Its own files, combined to another width: what the library makes, but for its missing sum.

    The library does not divide by the sum of its coefficients, which is near 1, so that all of its
    numbers have one factor in common.
    """
    torch.manual_seed(0)
    net, folder = nn.Linear(5, 7), tmp_path / "snapshots"
    emas = PostHocEMA(
        net,
        sigma_rels=(0.05, 0.2),
        update_every=1,
        checkpoint_every_num_steps=50,
        checkpoint_folder=str(folder),
        checkpoint_dtype=torch.float32,
    )
    for _ in range(200):
        shift(net)
        emas.update()
    theirs = emas.synthesize_ema_model(sigma_rel=0.12, step=200).ema_model.state_dict()
    output = tmp_path / "o.pt"
    average(folder, output, scheme="posthoc", sigma=0.12, snapshots="0.05,0.2")
    ours = torch.load(output)
    factor = float(theirs["weight"][0, 0] / ours["ema_model.weight"][0, 0])
    assert 0.9 < factor < 1.1
    for name, value in theirs.items():
        torch.testing.assert_close(factor * ours[f"ema_model.{name}"], value, rtol=1e-4, atol=1e-5)
    assert float(ours["step"]) == 200
