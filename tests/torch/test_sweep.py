"""`sweep` on checkpoints of PyTorch: every candidate is the model that plain PyTorch makes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from torch.optim.swa_utils import update_bn

from polyak_cli.errors import PolyakError
from polyak_cli.evaluation import data
from polyak_cli.pipeline import sweeping
from tests.command import polyak
from tests.torch.test_evaluate import CLASSES, X, make_net, run_plainly, write_code

Saver = Callable[[Mapping[str, Any], Path, int], None]
ROWS = data.Dataset("rows", {"": data.Split("rows", X, CLASSES)})


def save_files(state: Mapping[str, Any], run: Path, step: int) -> None:
    """Save as a training script does."""
    torch.save({"model": dict(state), "step": torch.tensor(step)}, run / f"step_{step}.pt")


def save_folders(state: Mapping[str, Any], run: Path, step: int) -> None:
    """Save as Transformers' Trainer does."""
    (run / f"checkpoint-{step}").mkdir()
    (run / f"checkpoint-{step}/config.json").write_text('{"model_type": "bert"}')
    save_file(dict(state), run / f"checkpoint-{step}/model.safetensors", {"format": "pt"})


def save_shards(state: Mapping[str, Any], run: Path, step: int) -> None:
    """Save as Transformers' Trainer does a model that is too large for one file."""
    folder = run / f"checkpoint-{step}"
    folder.mkdir()
    names = sorted(state)
    files = [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    parts = dict(zip(files, (names[:3], names[3:]), strict=True))
    for file, own in parts.items():
        save_file({name: state[name] for name in own}, folder / file, {"format": "pt"})
    place = {name: file for file, own in parts.items() for name in own}
    size = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def mix(states: Sequence[Mapping[str, Any]], coefficients: Sequence[float]) -> dict[str, Any]:
    """Return the mean of states as PyTorch alone computes it; integers are the newest's."""
    return {
        name: sum(c * state[name].double() for c, state in zip(coefficients, states, strict=True))
        .to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in states[-1].items()
    }  # fmt: skip


@pytest.mark.parametrize("save", [save_files, save_folders, save_shards])
def test_every_candidate_is_the_model_that_pytorch_averages(tmp_path: Path, save: Saver) -> None:
    """Singles, averages and ensembles have the loss and accuracy of plain PyTorch."""
    torch.manual_seed(2)
    (tmp_path / "run").mkdir()
    nets = [make_net() for _ in range(3)]
    for k, net in enumerate(nets):
        save(net.state_dict(), tmp_path / "run", 10 * k)
    found = sweeping.sweep(
        [tmp_path / "run"],
        ROWS,
        chosen="equal,exp:2",
        batch=3,
        model=f"{write_code(tmp_path)}:make",
        scratch=tmp_path,
    )
    parts = dict(zip(("selection", "reporting"), data.halves(ROWS.split()), strict=True))
    states = [net.state_dict() for net in nets]
    kinds = []
    for row in found.rows:
        kinds.append(row.candidate.kind)
        for name, split in parts.items():
            labels = torch.tensor(split.labels)
            if row.candidate.kind == "ensemble":
                members = [run_plainly(net, split.features).softmax(1) for net in nets]
                outputs = torch.stack(members[-row.candidate.window :]).mean(0).log()
            else:
                net = make_net()
                net.load_state_dict(mix(states, row.candidate.coefficients))
                outputs = run_plainly(net, split.features)
            expected = functional.cross_entropy(outputs, labels)
            assert row.scores[name].loss == pytest.approx(float(expected), rel=1e-4)
            right = (outputs.argmax(1) == labels).double().mean()
            assert row.scores[name].metrics["accuracy"] == pytest.approx(float(right), abs=1e-9)
    assert (kinds.count("single"), kinds.count("average"), kinds.count("ensemble")) == (3, 6, 3)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".polyak")] == []


def test_the_command_writes_the_page_and_the_winner(tmp_path: Path) -> None:
    """The winner of a run of folders is a folder, which PyTorch's loader reads."""
    torch.manual_seed(3)
    (tmp_path / "run").mkdir()
    for k in range(3):
        save_folders(make_net().state_dict(), tmp_path / "run", 10 * k)
    write_code(tmp_path)
    np.savez(tmp_path / "rows.npz", x=X, y=CLASSES)
    source = ("--model", "net.py:make", "--data", "rows.npz", "--schemes", "equal")
    done = polyak("sweep", "run", *source, "-o", "report", "--write-best", "best", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report/report.html").is_file()
    winner = json.loads((tmp_path / "report/sweep.json").read_text())["winner"]
    steps = (0, 10, 20)
    held = [load_file(tmp_path / f"run/checkpoint-{step}/model.safetensors") for step in steps]
    for name, tensor in load_file(tmp_path / "best/model.safetensors").items():
        assert torch.equal(tensor, mix(held, winner["coefficients"])[name]), name


def test_checkpoints_without_a_model_are_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    """The error says what to give; no folder of averages is left."""
    (tmp_path / "run").mkdir()
    for k in range(2):
        save_files(make_net().state_dict(), tmp_path / "run", k)
    with pytest.raises(PolyakError, match=r"--model MODULE\.py:FUNCTION"):
        sweeping.sweep([tmp_path / "run"], ROWS, scratch=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    "part",
    [("--use-ema",), pytest.param(("--key", "state_dict_ema"), marks=pytest.mark.slow)],
)
def test_the_ema_is_averaged_and_scored_where_it_is_asked_for(
    tmp_path: Path, part: tuple[str, ...]
) -> None:
    """Every candidate is that of the EMAs, and the command of the winner makes it of them too."""
    torch.manual_seed(5)
    (tmp_path / "run").mkdir()
    means = [make_net() for _ in range(2)]
    for k, net in enumerate(means):
        parts = {"state_dict": make_net().state_dict(), "state_dict_ema": net.state_dict()}
        torch.save(parts, tmp_path / f"run/e_{k}.pt")
    write_code(tmp_path)
    np.savez(tmp_path / "rows.npz", x=X, y=CLASSES)
    wanted = ("--model", "net.py:make", "--data", "rows.npz", "--schemes", "equal", *part)
    done = polyak("sweep", "run", *wanted, "-o", "report", "--write-best", "b.pt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "report/sweep.json").read_text())
    split = data.halves(ROWS.split())[1]
    states = [net.state_dict() for net in means]
    kinds = [row["kind"] for row in found["rows"] if row["rank"]]
    assert sorted(kinds) == ["average", "single", "single"]
    for row in found["rows"]:
        if row["rank"]:
            net = make_net()
            net.load_state_dict(mix(states, row["coefficients"]))
            expected = functional.cross_entropy(
                run_plainly(net, split.features), torch.tensor(split.labels)
            )
            assert row["metrics"]["reporting"]["loss"] == pytest.approx(float(expected), rel=1e-4)
    assert " ".join(part) in found["winner_command"]
    held = torch.load(tmp_path / "b.pt")["state_dict_ema"]
    for name, tensor in mix(states, found["winner"]["coefficients"]).items():
        assert torch.equal(held[name], tensor), name


def test_emas_in_folders_of_their_own_are_swept(tmp_path: Path) -> None:
    """As Diffusers saves them: an average of EMAs is the EMA, whatever its folder is called."""
    torch.manual_seed(6)
    nets = [make_net() for _ in range(2)]
    for k, net in enumerate(nets):
        for name, own in (("unet", make_net()), ("unet_ema", net)):
            folder = tmp_path / f"run/checkpoint-{k}/{name}"
            folder.mkdir(parents=True)
            (folder / "config.json").write_text('{"_class_name": "UNet2DModel"}')
            save_file(own.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    found = sweeping.sweep(
        *(tmp_path / "run", ROWS),
        chosen="equal",
        use_ema=True,
        scratch=tmp_path,
        model=f"{write_code(tmp_path)}:make",
    )
    split = data.halves(ROWS.split())[1]
    states = [net.state_dict() for net in nets]
    for row in found.rows[:3]:
        net = make_net()
        net.load_state_dict(mix(states, row.candidate.coefficients))
        expected = functional.cross_entropy(
            run_plainly(net, split.features), torch.tensor(split.labels)
        )
        assert row.scores["reporting"].loss == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("save", [save_files, save_shards])
def test_averages_of_a_sweep_have_the_statistics_of_update_bn(tmp_path: Path, save: Saver) -> None:
    """With --recalibrate every average is scored with them, and single checkpoints keep theirs."""
    torch.manual_seed(4)
    (tmp_path / "run").mkdir()
    nets = [make_net() for _ in range(2)]
    for k, net in enumerate(nets):
        save(net.state_dict(), tmp_path / "run", k)
    train = data.Split("train", X[:200], CLASSES[:200])
    found = sweeping.sweep(
        [tmp_path / "run"],
        ROWS,
        windows="2",
        chosen="equal",
        model=f"{write_code(tmp_path)}:make",
        recalibrate=train,
        batch_size=50,
        scratch=tmp_path,
    )
    net = make_net()
    net.load_state_dict(mix([one.state_dict() for one in nets], (0.5, 0.5)))
    order = np.random.RandomState(0).permutation(200)
    update_bn(torch.tensor(X[:200][order], dtype=torch.float32).split(50), net)
    split = data.halves(ROWS.split())[1]
    (average,) = [row for row in found.rows if row.candidate.kind == "average"]
    for row, own in ((average, net), (found.rows[0], nets[0])):
        expected = functional.cross_entropy(
            run_plainly(own, split.features), torch.tensor(split.labels)
        )
        assert row.scores["reporting"].loss == pytest.approx(float(expected), rel=1e-5)
