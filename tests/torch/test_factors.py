"""Weight norm of PyTorch's own modules, and a LoRA layer of PEFT's names, through torch.save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from polyak_cli import average


def old_norm() -> Any:
    """Return a convolution with the old weight_norm, whose tensors are weight_g and weight_v."""
    return torch.nn.utils.weight_norm(torch.nn.Conv1d(3, 4, 5))


def new_norm() -> Any:
    """Return a transposed convolution with the parametrization, along its second dimension."""
    module = torch.nn.ConvTranspose1d(3, 4, 5)
    return torch.nn.utils.parametrizations.weight_norm(module, dim=1)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("make", [old_norm, new_norm])
def test_weight_norm_modules_get_the_mean_weight(tmp_path: Path, make: Callable[[], Any]) -> None:
    """The module that loads the average has the mean of the weights of the others."""
    weights = []
    for e in (1, 2, 3):
        torch.manual_seed(e)
        module = make()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape) * e)
        module(torch.ones(1, 3, 9))  # the old weight_norm computes its weight in a hook
        weights.append(module.weight.detach().double())
        torch.save(module.state_dict(), tmp_path / f"m_{e}.pt")
    mean = torch.stack(weights).mean(0)
    report = average(tmp_path, tmp_path / "o.pt")
    assert [problem.kind for problem in report.plan.suspicions] == ["factors"]
    average(tmp_path, tmp_path / "o.pt", lora="exact", force=True)
    module = make()
    module.load_state_dict(torch.load(tmp_path / "o.pt"))
    module(torch.ones(1, 3, 9))
    torch.testing.assert_close(module.weight.detach().double(), mean, rtol=1e-5, atol=1e-6)


def test_lora_of_a_state_dict_is_written_exactly(tmp_path: Path) -> None:
    """The output's product is the truncation that torch's own decomposition gives."""
    made = []
    for e in (1, 2, 3):
        torch.manual_seed(e)
        a, b = torch.randn(2, 7), torch.randn(9, 2)
        made.append(b.double() @ a.double())
        state = {
            "q.lora_A.default.weight": a,
            "q.lora_B.default.weight": b,
            "q.bias": torch.ones(9),
        }
        torch.save(state, tmp_path / f"m_{e}.pt")
    mean = torch.stack(made).mean(0)
    u, s, v = torch.linalg.svd(mean, full_matrices=False)
    expected = u[:, :2] @ torch.diag(s[:2]) @ v[:2]
    average(tmp_path, tmp_path / "o.pt", lora="exact")
    found = torch.load(tmp_path / "o.pt")
    product = found["q.lora_B.default.weight"].double() @ found["q.lora_A.default.weight"].double()
    torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-5)
