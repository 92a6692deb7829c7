"""The geometry of what PyTorch writes: the numbers of the library's own tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polyak_cli import geometry


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_numbers_are_those_of_pytorch(tmp_path: Path, dtype: torch.dtype) -> None:
    """Checkpoints of a trainer, with a view and a counter: spread and distances in float64."""
    torch.manual_seed(0)
    now = {"w": torch.randn(300, 200), "b": torch.randn(40)}
    vectors = []
    for k in range(4):
        now = {name: x + 0.02 * torch.randn(x.shape) for name, x in now.items()}
        state = {name: x.to(dtype) for name, x in now.items()}
        state["w"] = state["w"].t()  # which is stored as it lies
        whole = {"model": state | {"steps": torch.tensor(k)}, "epoch": k}
        torch.save(whole, tmp_path / f"m_{k}.pt")
        vectors.append(torch.cat([x.double().flatten() for x in state.values()]))
    x = torch.stack(vectors)
    mean = x.mean(dim=0)
    found = geometry(tmp_path, key="model")
    spread = ((x - mean).norm(dim=1) ** 2).mean() / mean.norm() ** 2
    assert found.spread == pytest.approx(float(spread), rel=1e-9)
    far = torch.linalg.norm(x - mean, dim=1).tolist()
    assert found.to_average() == pytest.approx(far, rel=1e-9)
    assert any("steps" in name for name in found.ignored)
