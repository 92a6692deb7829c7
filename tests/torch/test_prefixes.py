"""PyTorch checkpoints whose names have a wrapper's prefix in some of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from polyak_cli import average, verify
from polyak_cli.errors import MismatchError


def test_tied_weights_and_compiled_parts_are_paired(tmp_path: Path) -> None:
    """torch.compile of a part, DDP's prefix, and weights that share a storage."""
    (tmp_path / "run").mkdir()
    states = []
    for k in range(2):
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        net[1].weight = net[0].weight
        state = net.state_dict()
        if k == 0:  # the names after DDP(net) and net[1] = torch.compile(net[1])
            state = {f"module.{n}".replace("1.", "1._orig_mod."): v for n, v in state.items()}
        states.append(state)
        torch.save({"model": state}, tmp_path / f"run/m_{k}.pt")
    assert "module.1._orig_mod.bias" in states[0]
    with pytest.raises(MismatchError, match=r"--strip-prefix module\. --strip-prefix _orig_mod\."):
        average(tmp_path / "run", tmp_path / "o.pt")
    prefixes = ["module.", "_orig_mod."]
    average(tmp_path / "run", tmp_path / "o.pt", strip_prefix=prefixes)
    found = torch.load(tmp_path / "o.pt", weights_only=True)["model"]
    assert found.keys() == states[1].keys()
    for one, (name, other) in zip(states[0].values(), states[1].items(), strict=True):
        assert torch.equal(found[name], ((one.double() + other.double()) / 2).float()), name
    assert found["0.weight"].data_ptr() == found["1.weight"].data_ptr()
    assert verify(tmp_path / "o.pt", sources=[tmp_path / "run"]).problems == ()
