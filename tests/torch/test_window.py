"""The mean of a part of a run, from two running means as icefall stores them.

icefall is not installed: its rules are written here once more, after icefall/checkpoint.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from polyak_cli import average, plan, verify
from polyak_cli.errors import UsageError
from tests.command import polyak

State = dict[str, torch.Tensor]
PERIOD = 5


def train(folder: Path, saved: dict[int, str]) -> list[State]:
    """Train for 40 batches, save some, and return the weights that entered the running mean.

    As icefall does, every PERIOD batches the newest weights enter ``model_avg``, for all PERIOD.
    """
    torch.manual_seed(0)
    folder.mkdir()
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    mean = {
        name: value.detach().to(torch.float64, copy=True)
        for name, value in net.state_dict().items()
    }
    entered = []
    for batch in range(1, 41):
        with torch.no_grad():
            for value in (*net.parameters(), net[1].running_var):
                value.add_(torch.rand_like(value))
        if batch % PERIOD == 0:
            entered.append({name: value.clone() for name, value in net.state_dict().items()})
            share = PERIOD / batch
            for name, value in net.state_dict().items():
                mean[name] = mean[name] * (1 - share) + value.double() * share
        if batch in saved:
            made: dict[str, Any] = {"model": net.state_dict(), "model_avg": mean, "optimizer": None}
            made |= {"batch_idx_train": batch, "average_period": PERIOD}
            torch.save(made, folder / saved[batch])
    return entered


def expect(entered: list[State], start: int, end: int, name: str) -> torch.Tensor:
    """Return the plain mean of the weights that entered after batch ``start`` up to ``end``."""
    inside = entered[start // PERIOD : end // PERIOD]
    return torch.stack([one[name].double() for one in inside]).mean(0)


def use_icefall(start: dict[str, Any], end: dict[str, Any], name: str) -> torch.Tensor:
    """Return what average_checkpoints_with_averaged_model gives: (C_e + C_s (v / u)) u."""
    begin, stop = (one["batch_idx_train"] // PERIOD * PERIOD for one in (start, end))
    u = stop / (stop - begin)
    found: torch.Tensor = (end["model_avg"][name] + start["model_avg"][name] * ((1 - u) / u)) * u
    return found


@pytest.mark.parametrize("names", ["checkpoint-{}.pt", "epoch-{}.pt"])
def test_a_window_is_the_mean_of_the_run_in_it(tmp_path: Path, names: str) -> None:
    """Of the weights themselves, and what icefall's own function gives, by steps in the files."""
    # Epochs of unequal numbers of batches: their numbers would give other weights.  Batch 32 is two
    # after the last update of the mean, which stands for the first 30.
    saved = {b: names.format(b if "check" in names else k) for k, b in enumerate((10, 32, 40), 1)}
    entered = train(tmp_path / "exp", saved)
    report = average(tmp_path / "exp", tmp_path / "o.pt", scheme="window", use_ema=True, last=2)
    assert report.plan.mean.multipliers == (-30.0, 40.0)
    assert report.plan.coefficients == (-3.0, 4.0)
    average(tmp_path / "exp", tmp_path / "whole.pt", scheme="window", use_ema=True)
    for output, start in (("o.pt", 32), ("whole.pt", 10)):
        found = torch.load(tmp_path / output, weights_only=False)
        older, newer = (
            torch.load(tmp_path / "exp" / saved[batch], weights_only=False) for batch in (start, 40)
        )
        for name in ("0.weight", "0.bias", "1.running_var"):
            exact = expect(entered, start, 40, name)
            torch.testing.assert_close(found["model_avg"][name], exact, rtol=1e-13, atol=1e-13)
            again = use_icefall(older, newer, name)
            torch.testing.assert_close(found["model_avg"][name], again, rtol=1e-13, atol=1e-13)
            torch.testing.assert_close(found["model"][name], exact.float(), rtol=1e-6, atol=0)
        assert found["batch_idx_train"] == 40
        assert verify(tmp_path / output, sources=[tmp_path / "exp"]).verified


def test_the_running_mean_has_to_be_asked_for(tmp_path: Path) -> None:
    """Raw weights beside it would be extrapolated; --key takes the mean alone."""
    train(tmp_path / "exp", {10: "checkpoint-10.pt", 40: "checkpoint-40.pt"})
    with pytest.raises(UsageError, match=r"'model/\*' and their running mean 'model_avg/\*'; add"):
        plan(tmp_path / "exp", scheme="window")
    made = plan(tmp_path / "exp", scheme="window", key="model_avg")
    assert made.coefficients == pytest.approx((-1 / 3, 4 / 3))
    assert any("steps of the running means are those in the files" in note for note in made.notes)
    command = ("average", "exp", "--scheme", "window", "--use-ema", "-n")
    done = polyak(*command, cwd=tmp_path)
    assert "window, oldest first" in done.stdout
    assert "sum of the absolute values of the coefficients: 1.6667" in done.stdout
    assert "effective number" not in done.stdout
    assert "rounding errors of the running means may grow" in done.stderr
    assert "if the files hold plain weights and no running means, choose another" in done.stderr


@pytest.mark.parametrize("step", [10**400, float("nan"), float("inf"), True, "40"])
def test_a_step_that_is_no_number_is_not_taken(tmp_path: Path, step: object) -> None:
    """The number in the name counts then, as where there is no step in the file."""
    for number, batch in ((10, 10), (40, step)):
        made = {"model_avg": {"w": torch.ones(3)}, "batch_idx_train": batch, "average_period": step}
        torch.save(made, tmp_path / f"checkpoint-{number}.pt")
    assert plan(tmp_path, scheme="window", key="model_avg").mean.multipliers == (-10.0, 40.0)
