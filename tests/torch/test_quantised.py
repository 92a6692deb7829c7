"""Quantised layers in files that torch.save writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polyak_cli import average
from polyak_cli.errors import MismatchError


def state(e: int) -> dict[str, torch.Tensor]:
    """Return a state dict with a layer of bitsandbytes's 4 bits and a float layer."""
    make = torch.Generator().manual_seed(e)
    return {
        "q.weight": torch.randint(0, 255, (12, 1), generator=make, dtype=torch.uint8),
        "q.weight.absmax": torch.rand(2, generator=make),
        "q.weight.quant_map": torch.linspace(-1, 1, 16),
        "v.weight": torch.randn(2, 3, generator=make),
    }


def test_quantised_state_dicts_are_refused_or_carried_whole(tmp_path: Path) -> None:
    """The error names the program and the glob; with that glob the layer is the newest's."""
    for e in (1, 2):
        torch.save({"model": state(e)}, tmp_path / f"m_{e}.pt")
    with pytest.raises(MismatchError, match=r"bitsandbytes: 4-bit codes") as caught:
        average(tmp_path, tmp_path / "o.pt")
    glob = str(caught.value).partition("--exclude-tensors '")[2].partition("'")[0]
    average(tmp_path, tmp_path / "o.pt", exclude_tensors=[glob])
    found = torch.load(tmp_path / "o.pt")["model"]
    for name in ("q.weight", "q.weight.absmax", "q.weight.quant_map"):
        assert torch.equal(found[name], state(2)[name])
    mean = (state(1)["v.weight"].double() + state(2)["v.weight"].double()) / 2
    assert torch.equal(found["v.weight"], mean.float())
