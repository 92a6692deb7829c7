"""`watch --data` beside a training of PyTorch, whose losses PyTorch itself computes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from polyak_cli import pipeline
from polyak_cli.evaluation import data
from polyak_cli.evaluation.forecast import Forecast, forecast
from polyak_cli.pipeline.annealing import Forecaster
from tests.command import one_line, polyak
from tests.test_watch import PATIENCE, watcher
from tests.torch.test_evaluate import CLASSES, X, make_net, run_plainly, write_code
from tests.torch.test_sweep import mix

Saver = Callable[[Mapping[str, Any], Path, int], None]
EPOCHS = 12


def save_file_of_torch(state: Mapping[str, Any], run: Path, epoch: int) -> None:
    """Save as a script does, under the final name from the first byte on."""
    torch.save({"model": dict(state), "epoch": epoch}, run / f"epoch_{epoch}.pt")


def save_for_lightning(state: Mapping[str, Any], run: Path, epoch: int) -> None:
    """Save as Lightning's ModelCheckpoint does, with seven steps an epoch."""
    held = {f"model.{name}": tensor for name, tensor in state.items()}
    whole = {"state_dict": held, "epoch": epoch, "global_step": 7 * epoch}
    torch.save(whole, run / f"epoch={epoch}-step={7 * epoch}.ckpt")


def save_for_trainer(state: Mapping[str, Any], run: Path, epoch: int) -> None:
    """Save a folder as Transformers' Trainer does, with one step an epoch, file after file."""
    folder = run / f"checkpoint-{epoch}"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    save_file(dict(state), folder / "model.safetensors", {"format": "pt"})


def train(run: Path, save: Saver) -> Iterator[dict[str, Any]]:
    """Train a network by one step an epoch, and yield its state after each, when it is saved."""
    torch.manual_seed(6)
    net = make_net()
    x, y = torch.tensor(X, dtype=torch.float32), torch.tensor(CLASSES)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    for epoch in range(1, EPOCHS + 1):
        net.train()
        optimizer.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        save(state, run, epoch)
        yield state


def find_loss(state: Mapping[str, Any]) -> float:
    """Return the loss of a state by PyTorch alone."""
    net = make_net()
    net.load_state_dict(state)
    return float(functional.cross_entropy(run_plainly(net), torch.tensor(CLASSES)))


def foretell(states: list[dict[str, Any]]) -> Forecast:
    """Return the forecast of the last ten states, of losses by PyTorch alone."""
    found = forecast([find_loss(state) for state in states], find_loss(mix(states[-5:], [0.2] * 5)))
    assert found is not None
    return found


def prepare(folder: Path) -> tuple[str, ...]:
    """Write the rows and the network, and return the options that name them."""
    (folder / "ckpts").mkdir()
    np.savez(folder / "rows.npz", x=X, y=CLASSES)
    write_code(folder)
    return ("--data", "rows.npz", "--model", "net.py:make", "--last", "20")


@pytest.mark.parametrize(
    ("save", "output"),
    [
        (save_file_of_torch, "o.pt"),
        pytest.param(save_for_lightning, "o.ckpt", marks=pytest.mark.slow),
        pytest.param(save_for_trainer, "o", marks=pytest.mark.slow),
    ],
)
def test_watch_foretells_beside_a_training(tmp_path: Path, save: Saver, output: str) -> None:
    """It may miss checkpoints in between; with the last there is the forecast of all of them."""
    options = prepare(tmp_path)
    with watcher(tmp_path, *options, "--json", output=output) as watched:
        states = []
        for state in train(tmp_path / "ckpts", save):
            states.append(state)
            if len(states) == 2:  # from here on, both run at once
                json.loads(watched.line())
        found: dict[str, Any] = {"checkpoints": []}
        while len(found["checkpoints"]) < EPOCHS:
            found = json.loads(watched.line())
            wanted = len(found["checkpoints"]) >= 10
            assert (found["forecast"] is not None) == wanted
        code, _, err = watched.end()
    assert found["forecast"] == pytest.approx(foretell(states).data(), rel=1e-4)
    assert code == 143, err


def test_the_forecast_of_emas_is_by_their_losses(tmp_path: Path) -> None:
    """Single checkpoints are scored by what is averaged, and not by the weights beside it."""
    options = prepare(tmp_path)
    states = []
    for epoch, state in enumerate(train(tmp_path / "ckpts", lambda *_: None), 1):
        states.append(state)
        parts = {"state_dict": make_net().state_dict(), "state_dict_ema": state}
        torch.save(parts, tmp_path / f"ckpts/epoch_{epoch}.pt")
    plan = pipeline.plan(tmp_path / "ckpts", use_ema=True)
    rows = data.load(str(tmp_path / options[1])).split()
    forecaster = Forecaster(rows, model=tmp_path / "net.py:make", use_ema=True)
    found = forecaster.forecast(plan)
    assert found is not None
    assert found.data() == pytest.approx(foretell(states).data(), rel=1e-4)


@pytest.mark.parametrize("is_late", [False, True])
def test_a_watch_that_cannot_score_ends_at_the_first_checkpoint(
    tmp_path: Path, is_late: bool
) -> None:
    """Without --model: one line, at the start or once a checkpoint is there; nothing is written."""
    prepare(tmp_path)
    if not is_late:
        next(train(tmp_path / "ckpts", save_file_of_torch))
    with watcher(tmp_path, "--data", "rows.npz", output="o.pt") as watched:
        if is_late:
            assert "no complete checkpoint is here yet" in watched.line("stderr")
            next(train(tmp_path / "ckpts", save_file_of_torch))
        out, err = watched.process.communicate(timeout=PATIENCE)
    assert (watched.process.returncode, out) == (3, b"")
    line = one_line(err.decode())
    assert "epoch_1.pt: is PyTorch" in line
    assert "name a function that returns it" in line
    assert not (tmp_path / "o.pt").exists()


@pytest.mark.slow
def test_sweep_foretells_too_and_the_page_says_it(tmp_path: Path) -> None:
    """By the losses on the rows that nothing was chosen on."""
    prepare(tmp_path)
    states = list(train(tmp_path / "ckpts", save_for_trainer))
    np.savez(tmp_path / "two.npz", x_train=X[:90], y_train=CLASSES[:90], x_test=X, y_test=CLASSES)
    source = ("--data", "two.npz", "--select-on", "train", "--model", "net.py:make")
    wide = ("--schemes", "equal", "--windows", "5", "-o", "report")
    done = polyak("sweep", "ckpts", *source, *wide, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    wanted = foretell(states)
    found = json.loads((tmp_path / "report/sweep.json").read_text())
    assert found["forecast"] == pytest.approx(wanted.data(), rel=1e-4)
    said = f"about loss {wanted.loss:.4g}, from {wanted.low:.4g} to {wanted.high:.4g}"
    assert said in done.stdout
    assert said in (tmp_path / "report/report.html").read_text()
