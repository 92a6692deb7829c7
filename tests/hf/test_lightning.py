"""Checkpoints that PyTorch Lightning saves, and averages that it loads and trains on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from safetensors.torch import load_file
from torch import nn

from polyak_cli import average, inspect, select, verify


class Net(pl.LightningModule):  # type: ignore[misc,unused-ignore]
    """A small model with statistics, and with settings that are no plain data."""

    def __init__(self, width: int, data: Path) -> None:
        """Make it."""
        super().__init__()
        self.save_hyperparameters()
        self.data = data
        self.model = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 1))

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        """Return the loss."""
        loss = self.model(batch[0]).square().mean()
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return an optimizer with a state."""
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def make_trainer(folder: Path, epochs: int, *callbacks: Any) -> pl.Trainer:
    """Return a trainer that prints nothing and logs nothing."""
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[*callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        enable_checkpointing=bool(callbacks),
    )


def make_data() -> torch.utils.data.DataLoader[Any]:
    """Return the same few batches every time."""
    values = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(values), batch_size=8)


def train(folder: Path, *callbacks: Any) -> list[dict[str, Any]]:
    """Train three epochs, and return what Lightning saved after each."""
    torch.manual_seed(0)
    saver = ModelCheckpoint(folder / "run", save_top_k=-1, save_last=True)
    trainer = make_trainer(folder, 3, saver, *callbacks)
    trainer.fit(Net(5, Path("data")), make_data())
    paths = sorted((folder / "run").glob("epoch=*.ckpt"))
    assert len(paths) == 3
    return [torch.load(path, weights_only=False) for path in paths]


def average_states(states: list[dict[str, Any]], key: str) -> dict[str, torch.Tensor]:
    """Average parts of checkpoints in float64; what is no float is the newest's."""
    parts = [state[key] for state in states]
    return {
        name: torch.stack([part[name].double() for part in parts]).mean(0).to(newest.dtype)
        if newest.is_floating_point()
        else newest
        for name, newest in parts[-1].items()
    }


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compare names and values, to the last bit but one: torch adds in another order."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)


def test_an_average_loads_and_training_goes_on_from_it(tmp_path: Path) -> None:
    """With its settings, of which one is a path; last.ckpt is passed over."""
    states = train(tmp_path)
    output = tmp_path / "average.ckpt"
    report = average(tmp_path / "run", output)
    assert [one.path.name for one in report.plan.passed_over] == ["last.ckpt"]
    loaded = Net.load_from_checkpoint(output, weights_only=False)
    assert (loaded.hparams.width, loaded.hparams.data) == (5, Path("data"))
    assert_close(loaded.state_dict(), average_states(states, "state_dict"))
    trainer = make_trainer(tmp_path, 4)
    trainer.fit(loaded, make_data(), ckpt_path=output, weights_only=False)
    assert trainer.current_epoch == 4
    (seen,) = inspect([output])
    assert seen.table.about["trainer"].startswith("PyTorch Lightning")
    assert verify(output, sources=[tmp_path / "run"]).verified


@pytest.mark.parametrize("use_ema", [False, True])
def test_the_ema_of_lightning_is_told_from_the_weights(tmp_path: Path, use_ema: bool) -> None:
    """Lightning saves its EMA as state_dict, and the raw weights beside it."""
    states = train(tmp_path, EMAWeightAveraging(decay=0.5))
    key = "state_dict" if use_ema else "current_model_state"
    output = tmp_path / "average.ckpt"
    average(tmp_path / "run", output, use_ema=use_ema)
    loaded = Net.load_from_checkpoint(output, weights_only=False).state_dict()
    expected = average_states(states, key)
    # Each place keeps its own counter, and the EMA began a step later.
    counter = "model.1.num_batches_tracked"
    assert loaded.pop(counter) == states[-1]["state_dict"][counter]
    del expected[counter]
    assert_close(loaded, expected)


def test_another_type_and_another_format_load(tmp_path: Path) -> None:
    """In half precision, and as safetensors of the model alone."""
    states = train(tmp_path)
    expected = average_states(states, "state_dict")
    output = tmp_path / "half.ckpt"
    average(tmp_path / "run", output, dtype="bfloat16")
    found = torch.load(output, weights_only=False)["state_dict"]
    assert {v.dtype for v in found.values()} == {torch.bfloat16, torch.int64}
    loaded = Net.load_from_checkpoint(output, weights_only=False)
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0.01, atol=1e-6)
    average(tmp_path / "run", tmp_path / "model.safetensors", key="state_dict")
    assert_close(load_file(tmp_path / "model.safetensors"), expected)


class Validated(Net):
    """A model whose val_loss is the least after the second epoch."""

    def validation_step(self, _batch: Any, _: int) -> None:
        """Log a loss that is known beforehand."""
        self.log("val_loss", (0.3, 0.1, 0.2, 0.4)[self.current_epoch])


def test_the_best_by_the_log_of_lightning_are_those_of_its_epochs(tmp_path: Path) -> None:
    """A row of validation after those of training hides none of theirs; epochs are the names'."""
    logger = pl.loggers.CSVLogger(str(tmp_path), name="", version="")
    saver = ModelCheckpoint(tmp_path / "run", save_top_k=-1)
    trainer = make_trainer(tmp_path, 4, saver)
    trainer.logger, trainer.log_every_n_steps = logger, 1
    trainer.fit(Validated(5, Path("data")), make_data(), make_data())
    log = tmp_path / "metrics.csv"
    (tmp_path / "run/epoch=0-step=3.ckpt").unlink()  # its epoch 0 would tell how both count
    for wanted in (1, 2):
        chosen = select([tmp_path / "run"], best=wanted, log=log)
        assert [one.epoch for one in chosen.checkpoints] == [1, 2][:wanted]
        assert [one.metric for one in chosen.checkpoints] == pytest.approx([0.1, 0.2][:wanted])
    assert "(as Lightning gives both the same number)" in chosen.notes[-1]
    trained = select([tmp_path / "run"], best=3, log=log, monitor="train_loss").checkpoints
    last = [line.split(",")[2] for line in log.read_text().splitlines() if line.endswith(",")][2::3]
    assert [one.metric for one in trained] == [float(value) for value in last[1:]]
