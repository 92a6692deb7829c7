"""Each command of the guide's page on other tools gives the value that the tool's recipe gives.

The oracles are PyTorch's own `swa_utils`, and else a few lines after the published formula or the
tool's documentation, which their docstrings name.  They import nothing of the package.
"""

from __future__ import annotations

import math
import re
import shlex
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from polyak_cli.averaging.schemes import make_mean
from polyak_cli.cli import cli
from polyak_cli.evaluation.candidates import Candidate, ScoredCandidate
from polyak_cli.evaluation.soups import search_greedily
from tests.oracle import Array, write_model
from tests.test_guide import GUIDE

PAGE = (GUIDE / "recipes.md").read_text()
COMMANDS = re.findall(r"^polyak .*$", PAGE, re.MULTILINE)
#: What an average may be off by, as a part of its distance from the newest state: one rounding to
#: float32 of numbers that are larger than that distance, ...
EXACT = 1.5e-6
#: ... what adding up a few numbers in float32 costs, ...
SINGLE = 5e-6
#: ... and what is not known of the steps between two files.
BETWEEN = 0.07
SHAPE = (16, 5)
Oracle = Callable[[Sequence[Array]], Any]


def walk(count: int, seed: int = 0) -> list[Array]:
    """Return the states of a run that drifts and wanders, oldest first."""
    steps = np.random.default_rng(seed).normal(0.01, 0.05, (count, *SHAPE))
    return [*(np.cumsum(steps, axis=0) + 1).astype("float32")]


# --- runs of tools, as they lie on the disk -------------------------------------------------------


def write_keras(folder: Path) -> list[Array]:
    """Write whole Keras models, one an epoch."""
    (folder / "ckpts").mkdir()
    states = walk(10)
    for k, state in enumerate(states, start=490):
        write_model(folder / f"ckpts/model_{k}.h5", {"d": {"w": state}})
    return states


def write_steps(folder: Path) -> list[Array]:
    """Write every 16th of 640 steps, and return all of them."""
    (folder / "ckpts").mkdir()
    states = walk(640)
    for step in range(16, 641, 16):
        write_model(folder / f"ckpts/model_{step}.h5", {"d": {"w": states[step - 1]}})
    return states


def write_lightning(folder: Path) -> list[Array]:
    """Write a checkpoint at the end of each epoch, counted from 0."""
    (folder / "checkpoints").mkdir()
    states = walk(10)
    for k, state in enumerate(states):
        saved = {"epoch": k, "global_step": 50 * (k + 1), "state_dict": {"w": torch.tensor(state)}}
        saved["pytorch-lightning_version"] = "2.5.0"
        torch.save(saved, folder / f"checkpoints/epoch={k}-step={50 * (k + 1)}.ckpt")
    return states


def write_snapshots(folder: Path) -> list[Array]:
    """Write live EMAs of two widths at every 160th of 640 steps, named as EDM2's are."""
    (folder / "snapshots").mkdir()
    states = walk(640)
    for step, sigma in SNAPSHOTS:
        values = run_power(states[:step], sigma)
        name = f"ema-{step:07d}-{sigma:.3f}.safetensors"
        save_file({"w": torch.tensor(values)}, folder / "snapshots" / name)
    return states


SNAPSHOTS = [(step, sigma) for step in (160, 320, 480, 640) for sigma in (0.05, 0.1)]


def write_soup(folder: Path) -> list[Array]:
    """Write models that were fine-tuned from one base, each in a folder of its own."""
    states = walk(3)
    for name, state in zip(("lr1", "lr2", "seed2"), states, strict=True):
        (folder / "runs" / name).mkdir(parents=True)
        save_file({"w": torch.tensor(state)}, folder / "runs" / name / "model.safetensors")
    return states


def write_merge(folder: Path) -> list[Array]:
    """Write the models of a merge."""
    states = walk(3)
    for name, state in zip("abc", states, strict=True):
        save_file({"w": torch.tensor(state)}, folder / f"{name}.safetensors")
    return states


def write_fairseq(folder: Path) -> list[Array]:
    """Write epochs 40 to 52 and updates within them, with what fairseq leaves beside them."""
    (folder / "checkpoints").mkdir()
    states = walk(13)
    for k, state in enumerate(states, start=40):
        # Those of updates hold other values, so that a mixture would be seen.
        for name, values in ((f"{k}", state), (f"_{k}_{k * 100}", -state)):
            saved = {
                "model": {"w": torch.tensor(values)},
                "args": None,
                "extra_state": {"epoch": k},
            }
            torch.save(saved, folder / f"checkpoints/checkpoint{name}.pt")
    for name in ("best", "last"):
        torch.save(
            {"model": {"w": torch.zeros(SHAPE)}}, folder / f"checkpoints/checkpoint_{name}.pt"
        )
    return states


def write_timm(folder: Path) -> list[Array]:
    """Write checkpoints as timm's CheckpointSaver does, the EMA beside the weights."""
    (folder / "output/train").mkdir(parents=True)
    states = walk(len(METRICS))
    for k, (state, metric) in enumerate(zip(states, METRICS, strict=True)):
        saved = {
            "epoch": k,
            "arch": "resnet10t",
            "state_dict": {"w": -torch.tensor(state)},
            "state_dict_ema": {"w": torch.tensor(state)},
            "optimizer": {},
            "version": 2,
            "args": Namespace(eval_metric="top1"),
            "metric": metric,
        }
        torch.save(saved, folder / f"output/train/checkpoint-{k}.pth.tar")
    return states


METRICS = (60.0, 72.5, 71.0, 70.0, 73.0, 69.0)


def write_espnet(folder: Path) -> list[Array]:
    """Write ESPnet's epochs, each a bare state dict."""
    (folder / "exp").mkdir()
    states = walk(7)
    for k, state in enumerate(states, start=1):
        saved = {"w": torch.tensor(state), "norm.num_batches_tracked": torch.tensor(100 * k)}
        torch.save(saved, folder / f"exp/{k}epoch.pth")
    return states


def write_icefall(folder: Path) -> list[Array]:
    """Write icefall's epochs, with the running mean of all steps; an epoch has 1,000 batches."""
    (folder / "exp").mkdir()
    states = walk(32)
    for k, state in enumerate(states, start=1):
        mean = np.mean(states[:k], axis=0, dtype=float)
        saved = {
            "model": {"w": torch.tensor(state)},
            "model_avg": {"w": torch.tensor(mean)},  # float64, as icefall keeps it
            "average_period": 200,
            "batch_idx_train": 1000 * k + 50,  # the mean is as old as its last update
        }
        torch.save(saved, folder / f"exp/epoch-{k}.pt")
    torch.save({"model": {"w": torch.zeros(SHAPE)}}, folder / "exp/best-valid-loss.pt")
    return states


# --- what the recipes give ------------------------------------------------------------------------


def run_swa(states: Sequence[Array], **options: Any) -> Array:
    """Update PyTorch's AveragedModel with each state."""
    model = torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False)
    averaged = AveragedModel(model, **options)
    for state in states:
        model.weight.data = torch.tensor(state)
        averaged.update_parameters(model)
    found: Array = averaged.module.weight.detach().numpy()
    return found


def run_lightning(states: Sequence[Array], start: int = 6, epochs: int = 10) -> Array:
    """Update the mean as Lightning 2's callback does at the beginning of each epoch."""
    mean, count = np.zeros(SHAPE), 0
    for epoch in range(1, epochs):  # epoch 0 begins with weights of which there is no file
        if start - 1 <= epoch <= epochs - 1:
            mean, count = mean + (states[epoch - 1] - mean) / (count + 1), count + 1
    assert count == 5
    return mean


def run_debiased_ema(states: Sequence[Array], decay: float = 0.9) -> Array:
    """Kingma and Ba 2015, algorithm 1: from zero, m = b m + (1 - b) x, and m / (1 - b^t)."""
    mean = np.zeros(SHAPE)
    for state in states:
        mean = decay * mean + (1 - decay) * state
    return mean / (1 - decay ** len(states))


def run_tfa(states: Sequence[Array]) -> Array:
    """Run tfa's MovingAverage with dynamic_decay, on a model that begins with the first state.

    Update n, counted from 0, keeps min(decay, (1 + n) / (10 + n)) of the average.
    """
    mean = states[0].astype(float)
    for n, state in enumerate(states):
        kept = min(0.9, (1 + n) / (10 + n))
        mean = kept * mean + (1 - kept) * state
    return mean


def run_pma(states: Sequence[Array]) -> Array:
    """PMA's EMA with alpha = 0.1: M_i = alpha W_i + (1 - alpha) M_(i-1), from the first model."""
    mean = states[0].astype(float)
    for state in states[1:]:
        mean = 0.1 * state + 0.9 * mean
    return mean


def find_gamma(sigma: float) -> float:
    """Solve sigma^2 = (g+1) / ((g+2)^2 (g+3)) for g by bisection."""
    low, high = 0.0, 1000.0
    for _ in range(100):
        g = (low + high) / 2
        low, high = (low, g) if (g + 1) / ((g + 2) ** 2 * (g + 3)) < sigma**2 else (g, high)
    return low


def run_posthoc(states: Sequence[Array], sigma: float = 0.15) -> Array:
    """Combine the snapshots by least squares: Karras et al. 2024, section 3.2 and algorithm 3.

    The profile of an EMA is (g+1) t^g / T^(g+1); inner products are its integrals.
    """

    def multiply(one: tuple[int, float], other: tuple[int, float]) -> float:
        (end, g), (later, h) = sorted((t, find_gamma(s)) for t, s in (one, other))
        return (g + 1) * (h + 1) / (g + h + 1) * math.pow(end / later, h) / later

    products = [[multiply(one, other) for other in SNAPSHOTS] for one in SNAPSHOTS]
    wanted = [multiply(one, (SNAPSHOTS[-1][0], sigma)) for one in SNAPSHOTS]
    found = np.linalg.solve(np.array(products), np.array(wanted))
    averages = [run_power(states[:step], width) for step, width in SNAPSHOTS]
    mean = weigh(averages, [*found])
    # And that is nearly the EMA that was never run.
    exact = run_power(states, sigma)
    assert np.linalg.norm(mean - exact) < 0.1 * np.linalg.norm(states[-1] - exact)
    return mean


def run_power(states: Sequence[Array], sigma: float = 0.1) -> Array:
    """EDM2's update in every step t: the average keeps (1 - 1/t)^(g+1)."""
    exponent = find_gamma(sigma) + 1
    mean = np.zeros(SHAPE)
    for t, state in enumerate(states, start=1):
        kept = (1 - 1 / t) ** exponent
        mean = kept * mean + (1 - kept) * state
    return mean


def run_torchtitan(states: Sequence[Array]) -> Array:
    """Torchtitan's components/ema.py with its defaults: keeps 2^(-1 / (0.05 t)) in update t."""
    mean = states[0].astype(float)
    for t, state in enumerate(states[1:], start=1):
        kept = 2.0 ** (-1.0 / (0.05 * t))
        mean = kept * mean + (1 - kept) * state
    return mean


def run_wsm(states: Sequence[Array]) -> Array:
    """Add up the updates since the oldest state, each times 1 - sqrt(i / N), as in WSM's eq. 5."""
    result = states[0].astype(float)
    for i in range(1, len(states)):
        update = states[i].astype(float) - states[i - 1]
        result = result + (1 - math.sqrt(i / len(states))) * update
    return result


def weigh(states: Sequence[Array], weights: Sequence[float]) -> Array:
    """Return a weighted mean: mergekit's linear, with normalize."""
    pairs = zip(weights, states, strict=True)
    found: Array = np.sum([w * s.astype(float) for w, s in pairs], axis=0) / sum(weights)
    return found


def add_in_float32(states: Sequence[Array]) -> Array:
    """Add tensors up and divide by their number, as scripts of fairseq, ESPnet and icefall do."""
    total = torch.tensor(states[0])
    for state in states[1:]:
        total = total + torch.tensor(state)
    mean: Array = (total / len(states)).numpy()
    return mean


def take_best(states: Sequence[Array]) -> Array:
    """Add up the three with the highest metrics in float64, and round to float32, as timm does."""
    best = sorted(zip(METRICS, range(len(states)), strict=True))[-3:]
    total = sum(torch.tensor(states[k]).double() for _, k in best)
    mean: Array = (total / 3).float().numpy()
    return mean


def run_icefall(states: Sequence[Array]) -> Array:
    """Icefall's window: (end * b - start * a) / (b - a), which is the mean of what lies between."""
    mean: Array = np.mean(states[21:30], axis=0, dtype=float)
    return mean


class Case(NamedTuple):
    """What a command is tried on, and what it should give."""

    write: Callable[[Path], list[Array]]
    expected: Oracle
    tolerance: float = EXACT


#: A part of a command -> its case.
CASES = {
    "--from 495 -o swa.h5": Case(write_keras, lambda s: run_swa(s[5:]), SINGLE),
    "--from 4 --to 8 -o swa.ckpt": Case(write_lightning, run_lightning),
    "--last 6 -o lawa.h5": Case(write_keras, lambda s: np.mean(s[-6:], axis=0, dtype=float)),
    "watch ckpts/ --last 6": Case(write_keras, lambda s: np.mean(s[-6:], axis=0, dtype=float)),
    "--scheme ema --decay 0.9 -o": Case(write_keras, run_debiased_ema),
    "-o live_ema.h5": Case(
        write_keras, lambda s: run_swa(s, multi_avg_fn=get_ema_multi_avg_fn(0.9)), SINGLE
    ),
    "--ramp tfa": Case(write_keras, run_tfa),
    "--sigma 0.1 -o power.h5": Case(write_steps, run_power, BETWEEN),
    "--scheme posthoc": Case(write_snapshots, run_posthoc),
    "--sigma 0.0629 -o titan.h5": Case(write_steps, run_torchtitan, BETWEEN),
    "--scheme decay --shape 1-sqrt": Case(write_keras, lambda s: run_wsm(s[-4:])),
    "-o sma.h5": Case(write_keras, lambda s: np.mean(s, axis=0, dtype=float)),
    "-o wma.h5": Case(write_keras, lambda s: weigh(s, range(1, 11))),
    "-o pma_ema.h5": Case(write_keras, run_pma),
    "-o soup.safetensors": Case(write_soup, lambda s: np.mean(s, axis=0, dtype=float)),
    "-o m.safetensors": Case(write_merge, lambda s: weigh(s, (1, 2, 1))),
    "--exclude 'checkpoint_*'": Case(write_fairseq, lambda s: add_in_float32(s[6:11]), SINGLE),
    "'checkpoint[0-9]*'": Case(write_fairseq, lambda s: -add_in_float32(s[-5:]), SINGLE),
    "output/train/": Case(write_timm, take_best),
    "exp/4epoch.pth": Case(write_espnet, lambda s: add_in_float32([s[3], s[5], s[6]]), SINGLE),
    "exp/ --to 30": Case(write_icefall, lambda s: add_in_float32(s[21:30]), SINGLE),
    "--scheme window --use-ema": Case(write_icefall, run_icefall),
}


def find_case(command: str) -> list[str]:
    """Return the keys of the cases that a command belongs to."""
    return [key for key in CASES if key in command]


def test_every_command_of_the_page_has_its_case() -> None:
    """One each, but for the sweep, whose search is tried below; and no case is left over."""
    found = [find_case(command) for command in COMMANDS if "sweep" not in command]
    assert [key for keys in found for key in keys] == list(CASES)
    assert {len(keys) for keys in found} == {1}


@pytest.mark.parametrize("command", [one for one in COMMANDS if "sweep" not in one])
def test_a_command_gives_what_the_recipe_gives(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very command of the page, in a folder as the tool leaves it."""
    (key,) = find_case(command)
    write, expected, tolerance = CASES[key]
    states = write(tmp_path)
    monkeypatch.chdir(tmp_path)
    _, *arguments = expand(command)
    quick = ["--interval", "0.1"] if arguments[0] == "watch" else []  # it looks twice
    cli.main([*arguments, *quick], standalone_mode=False)
    output = tmp_path / arguments[arguments.index("-o") + 1]
    found, wanted = read(output), expected(states)
    distance = np.linalg.norm(wanted - states[-1])
    assert distance > 0.1
    assert np.linalg.norm(found - wanted) <= tolerance * distance


def expand(command: str) -> list[str]:
    """Return the words of a command, as a shell expands them."""
    words = []
    for word, plain in zip(shlex.split(command), command.split(), strict=True):
        files = sorted(map(str, Path().glob(word))) if "*" in plain and "'" not in plain else []
        words += files or [word]
    return words


def read(path: Path) -> Any:
    """Return the averaged array of an output."""
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            return file["model_weights/d/w"][()]
    if path.suffix == ".safetensors":
        return load_file(path)["w"].numpy()
    loaded = torch.load(path, weights_only=False)
    if "norm.num_batches_tracked" in loaded:
        assert int(loaded["norm.num_batches_tracked"]) == 700  # the newest
    return loaded.get("model", loaded.get("state_dict", loaded))["w"].numpy()


def test_a_greedy_soup_is_that_of_the_paper() -> None:
    """Recipe 1 of Wortsman et al. 2022 on models whose loss is their distance from a point."""
    rng = np.random.default_rng(3)
    models = rng.normal(size=(7, 4))

    def lose(model: Array) -> float:
        return float(np.sum((model - 0.1) ** 2))

    soup: list[int] = []
    for k in sorted(range(7), key=lambda k: lose(models[k])):
        tried = [*soup, k]
        if not soup or lose(models[tried].mean(0)) < lose(models[soup].mean(0)):
            soup = tried
    assert 1 < len(soup) < 7

    def score(candidates: Sequence[Candidate]) -> list[ScoredCandidate]:
        found = []
        for one in candidates:
            scores: Any = Namespace(loss=lose(np.array(one.coefficients) @ models))
            found.append(ScoredCandidate(one, {"selection": scores}))
        return found

    singles = [
        Candidate("single", "", None, 1, make_mean([float(k == i) for i in range(7)]))
        for k in range(7)
    ]
    (found,) = search_greedily(score, score(singles), "loss")
    members = [k for k, c in enumerate(found.candidate.coefficients) if c]
    assert members == sorted(soup)
    assert found.candidate.coefficients[members[0]] == pytest.approx(1 / len(soup))
