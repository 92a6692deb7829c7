"""PyTorch checkpoints of one run whose float types differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from polyak_cli import average, verify


def test_float32_and_then_bfloat16_are_averaged_in_float64(tmp_path: Path) -> None:
    """The output has the newest's types, each value rounded once; tied tensors stay tied."""
    types = (torch.float32, torch.float32, torch.bfloat16)
    values = [torch.randn(5, 7, dtype=torch.float64).to(dtype) for dtype in types]
    (tmp_path / "run").mkdir()
    for k, value in enumerate(values):
        model = {"weight": value, "head": value, "step": torch.tensor(k)}
        torch.save(model, tmp_path / f"run/m_{k}.pt")
    report = average(tmp_path / "run", tmp_path / "o.pt")
    total = sum(value.double().numpy() for value in values) / 3
    found = torch.load(tmp_path / "o.pt", weights_only=True)
    assert found["weight"].dtype == torch.bfloat16
    # Rounding float64 to bfloat16 at once: compare with both neighbours of the float64 average.
    stored = found["weight"].double().numpy()
    step = np.spacing(np.abs(stored).astype(np.float32)).astype(np.float64) * 2**16
    assert (np.abs(stored - total) <= step / 2).all()
    assert found["head"].data_ptr() == found["weight"].data_ptr()
    assert any("(float32 and bfloat16)" in n and "as bfloat16" in n for n in report.notes)
    assert verify(tmp_path / "o.pt", sources=[tmp_path / "run"]).problems == ()
