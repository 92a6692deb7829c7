"""What stands beside a model in a PyTorch checkpoint is never averaged, whatever it is called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from polyak_cli import average, inspect
from polyak_cli.errors import FormatError

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "ASGD": torch.optim.ASGD,
    "Adadelta": torch.optim.Adadelta,
    "Adafactor": torch.optim.Adafactor,
    "Adagrad": torch.optim.Adagrad,
    "Adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "Adamax": torch.optim.Adamax,
    "LBFGS": torch.optim.LBFGS,
    "NAdam": torch.optim.NAdam,
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "Rprop": torch.optim.Rprop,
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


def make_state(name: str, net: nn.Module) -> dict[str, Any]:
    """Return an optimizer's state after one step."""
    optimizer = OPTIMIZERS[name](net.parameters())

    def closure() -> float:
        optimizer.zero_grad()
        loss = net(torch.randn(4, 3)).square().sum()
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    state: dict[str, Any] = optimizer.state_dict()
    return state


def run(folder: Path, make: Callable[[int], Any]) -> tuple[Any, list[Any], Any]:
    """Average two checkpoints; return the output, both checkpoints and the report."""
    states = [make(k) for k in (1, 2)]
    for k, state in enumerate(states):
        torch.save(state, folder / f"m_{k}.pt")
    report = average([folder / "m_0.pt", folder / "m_1.pt"], folder / "o.pt")
    return torch.load(folder / "o.pt", weights_only=True), states, report


def equal(one: Any, other: Any) -> bool:
    """Return whether two states are equal, bit for bit where they hold tensors."""
    if isinstance(one, torch.Tensor):
        return bool(torch.equal(one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *((name, "optim_g") for name in OPTIMIZERS),
        *(("Adam", key) for key in ("optimizer_generator", "opt_disc", "g", "1")),
    ],
)
def test_an_optimizer_is_recognised_by_its_structure(tmp_path: Path, name: str, key: str) -> None:
    """Under any key, in lists and in nested dictionaries, the newest's state stays bit for bit."""

    def make(seed: int) -> Any:
        torch.manual_seed(seed)
        net = nn.Linear(3, 2)
        state = make_state(name, net)
        return {
            "model": net.state_dict(),
            key: state,
            "several": [state["state"], make_state(name, net)],
            "training_state": {"inner": {"which": make_state(name, net)}},
        }

    found, (one, newest), report = run(tmp_path, make)
    assert torch.equal(
        found["model"]["weight"],
        ((one["model"]["weight"].double() + newest["model"]["weight"].double()) / 2).float(),
    )
    for part in (key, "several", "training_state"):
        assert equal(found[part], newest[part]), part
    assert report.plan.averaged == ("model/weight", "model/bias")
    assert any("optimizer state is that of the newest" in note for note in report.notes)
    (seen,) = inspect([tmp_path / "m_1.pt"])
    fates = {tensor.spec.name: tensor.fate for tensor in seen.tensors}
    assert {n for n, fate in fates.items() if fate == "averaged"} == {"model/weight", "model/bias"}


def test_parts_of_a_state_are_recognised(tmp_path: Path) -> None:
    """HiFi-GAN's and others' without groups, by parameters' names, bitsandbytes's, Adafactor's."""

    def make(seed: int) -> Any:
        torch.manual_seed(seed)

        def values() -> torch.Tensor:
            return torch.randn(3, 2)

        return {
            "mpd": {"w": values()},
            "optim_d": {"state": {0: {"exp_avg_sq": values()}}},
            "by_name": {"mpd.w": {"exp_avg": values(), "step": torch.tensor(2.0 * seed)}},
            "fsdp": {"state": {"mpd.w": {"x": values()}}, "param_groups": []},
            "bits": {"state": {0: {"state1": values(), "qmap1": values(), "absmax1": values()}}},
            "factors": [{"exp_avg_sq_row": torch.randn(3), "exp_avg_sq_col": torch.randn(2)}],
            "master": {"fp32": {"master_param": values()}},
        }

    found, (_, newest), report = run(tmp_path, make)
    assert report.plan.averaged == ("mpd/w",)
    for part in newest.keys() - {"mpd"}:
        assert equal(found[part], newest[part]), part


def test_schedulers_scalers_and_random_states_are_the_newest_s(tmp_path: Path) -> None:
    """Also what Lightning and fairseq keep of a run; the model's own tensors alone are averaged."""

    def make(seed: int) -> Any:
        torch.manual_seed(seed)
        optimizer = torch.optim.SGD([torch.zeros(2)], lr=torch.tensor(0.1 * seed))
        plan = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        return {
            "state_dict": {"w": torch.randn(3)},
            "plan_g": plan.state_dict(),
            "grad": torch.amp.GradScaler("cpu").state_dict() | {"scale": torch.tensor(2.0**seed)},
            "rng_state": torch.get_rng_state(),
            "cuda_rng_states": [torch.get_rng_state()],
            "hyper_parameters": {"class_weights": torch.tensor([1.0, seed])},
            "extra_state": {
                "means": {"w": torch.randn(3)},
                "train_ema": {"loss": torch.tensor(1.0 / seed), "wps": torch.tensor([0.1 * seed])},
            },
        }

    found, (_, newest), report = run(tmp_path, make)
    assert report.plan.averaged == ("state_dict/w",)
    for part in newest.keys() - {"state_dict"}:
        assert equal(found[part], newest[part]), part


def test_a_model_is_not_taken_for_an_optimizer(tmp_path: Path) -> None:
    """Parts of a model may be called state, opt or step, and a buffer random_features."""

    def make(seed: int) -> Any:
        torch.manual_seed(seed)
        return {
            "state": {"w": torch.randn(3), "step": torch.randn(2)},
            "opt_net": {"rng.weight": torch.randn(2), "random_features": torch.randn(2)},
            "opt": torch.randn(2),
            "rng_state": torch.randn(2),
            "net": {"optimizer.weight": torch.randn(2), "scale": torch.randn(())},
        }

    found, (one, newest), report = run(tmp_path, make)
    assert len(report.plan.averaged) == 8
    for part in ("state", "opt_net", "net"):
        for name, values in found[part].items():
            middle = (one[part][name].double() + newest[part][name].double()) / 2
            assert torch.equal(values, middle.float()), name


def test_numbers_of_the_run_are_carried_and_others_are_said(tmp_path: Path) -> None:
    """A loss or a rate is not averaged; a number of another name is averaged and named."""

    def make(seed: int) -> Any:
        torch.manual_seed(seed)
        return {
            "model": {"w": torch.randn(3), "loss": torch.randn(3), "epoch.scale": torch.randn(1)},
            "loss": torch.tensor(float(seed)),
            "lr": torch.tensor([0.1 * seed]),
            "best_val_acc": torch.tensor(0.5 * seed),
            "metrics": {"val_psnr": torch.tensor(20.0 * seed)},
            "temperature": torch.tensor(float(seed)),
        }

    found, (_, newest), report = run(tmp_path, make)
    for part in ("loss", "lr", "best_val_acc", "metrics"):
        assert equal(found[part], newest[part]), part
    assert found["temperature"] == 1.5
    assert {*report.plan.averaged} == {
        "model/w",
        "model/loss",
        "model/epoch.scale",
        "temperature",
    }
    (carried,) = (note for note in report.notes if "counters of the run" in note)
    assert "4 tensors" in carried
    assert "loss" in carried
    (said,) = (note for note in report.notes if "as part of the model" in note)
    assert "(temperature)" in said
    everything = average(
        [tmp_path / "m_0.pt", tmp_path / "m_1.pt"], tmp_path / "all.pt", include_tensors=["*"]
    )
    assert len(everything.plan.averaged) == 8
    (seen,) = inspect([tmp_path / "m_1.pt"])
    assert {t.fate for t in seen.tensors if t.spec.name in ("loss", "lr")} == {"carried"}


def test_the_state_of_an_optimizer_alone_is_no_model(tmp_path: Path) -> None:
    """With and without groups, and with more keys than torch writes."""
    state = torch.optim.Adam([torch.zeros(2)]).state_dict()
    for k, content in enumerate([state | {"more": 1}, {"state": {0: {"exp_avg": torch.ones(2)}}}]):
        torch.save(content, tmp_path / f"{k}.pt")
        with pytest.raises(FormatError, match="state of an optimizer"):
            average([tmp_path / f"{k}.pt"], tmp_path / "o.pt")
