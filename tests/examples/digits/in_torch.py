"""The network of the digits in PyTorch, and its training by a loop as most scripts have it.

Layers, initial weights, optimizer, batches and the EMA of every step are those of `in_keras`, and
only the random draws are others.  One number differs: the running variance of BatchNorm has
PyTorch's factor n / (n - 1), n being batch x pixels (at least 64).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polyak_cli.evaluation.data import Split
from tests.examples.digits.experiment import Framework, Regime


def network() -> Any:
    """Return the module; it takes the rows as Keras does, (rows, 8, 8, 1), and gives logits."""
    from torch import nn

    def normal(channels: int) -> Any:
        return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.1)  # Keras's momentum is 1 - 0.1

    module = nn.Sequential(
        nn.Flatten(),
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        normal(16),
        nn.ReLU(),
        nn.ZeroPad2d((0, 1, 0, 1)),  # at the ends only, as Keras's "same" with strides of 2
        nn.Conv2d(16, 32, 3, stride=2, bias=False),
        normal(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    for layer in module:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight)  # Glorot's
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
    return module


class Training:
    """Trains a module by SGD with momentum, and keeps the EMA of every step beside it."""

    def __init__(self, module: Any, rate: float) -> None:
        from torch import nn, optim
        from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

        self.module = module.train()
        self.measure = nn.CrossEntropyLoss()
        self.sgd = optim.SGD(module.parameters(), rate, momentum=0.9)
        self.ema = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.99))

    def step(self, x: Any, y: Any) -> None:
        """Train on a batch."""
        self.sgd.zero_grad()
        self.measure(self.module(x), y).backward()
        self.sgd.step()
        self.ema.update_parameters(self.module)


def train(folder: Path, regime: Regime, seed: int, rows: Split, epochs: int) -> None:
    """Train once, saving a checkpoint an epoch."""
    import torch

    torch.manual_seed(seed)
    x, y = torch.tensor(rows.features), torch.tensor(rows.labels)
    training = Training(network(), regime.rate)
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(len(y)).split(regime.batch):
            training.step(x[batch], y[batch])
        state = {"model": training.module.state_dict(), "ema": training.ema.state_dict()}
        torch.save({"epoch": epoch, **state}, folder / f"model_{epoch:03d}.pt")


TORCH = Framework("PyTorch", ".pt", f"{__file__}:network", train)
