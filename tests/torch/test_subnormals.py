"""Averages inside a program that has switched off subnormal numbers, as training scripts do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from polyak_cli import PolyakError, average


@pytest.fixture
def flushing() -> Iterator[None]:
    """Have subnormal numbers taken for 0 in this thread during a test."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("flushing")
def test_no_average_is_written_where_subnormal_numbers_are_zero(tmp_path: Path) -> None:
    """Both kernels would have made 0 of 1e-40, and a verification in this process as well."""
    files = [tmp_path / f"m_{k}.npz" for k in (1, 2)]
    stored = np.full(4, 71362, np.uint32)  # the bits of 1e-40
    for file in files:
        np.savez(file, w=stored.view(np.float32))
    output = tmp_path / "o.npz"
    with pytest.raises(PolyakError, match=r"subnormal .* torch\.set_flush_denormal\(False\)"):
        average(files, output, verify=True)
    assert not output.exists()
    torch.set_flush_denormal(False)
    average(files, output)
    assert np.array_equal(np.load(output)["w"].view(np.uint32), stored)
