"""`--key`: one part of what a trainer saves is averaged, by itself or into safetensors."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from polyak_cli import average, plan, verify
from polyak_cli.errors import FormatError, OutputError, PolyakError, UsageError
from tests.command import polyak
from tests.torch.test_torch import middle


def network() -> nn.Module:
    """Return a small model with BatchNorm."""
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def write(folder: Path, **further: Any) -> list[Path]:
    """Save three Lightning checkpoints of a model and of another; return them, oldest first."""
    torch.manual_seed(0)
    paths = []
    for epoch in range(3):
        model, shadow = network(), network()
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.randn(16, 4)).square().sum().backward()
        optimizer.step()
        content = {
            "epoch": epoch,
            "pytorch-lightning_version": "2.5.0",
            "state_dict": model.state_dict(),
            "hyper_parameters": argparse.Namespace(lr=0.1, weights=torch.ones(epoch + 1)),
            "optimizer_states": [optimizer.state_dict()],
            "kept": {"net": {"inner": shadow.state_dict()}},
            **further,
        }
        paths.append(folder / f"epoch={epoch}.ckpt")
        torch.save(content, paths[-1])
    return paths


def load(path: Path) -> Any:
    """Load a file with the objects in it, which the test made."""
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize("key", ["state_dict", "kept/net/inner"])
def test_a_part_becomes_safetensors(tmp_path: Path, key: str) -> None:
    """Its names are the model's own, so that the model loads it; the rest is left out."""
    (tmp_path / "run").mkdir()
    paths = write(tmp_path / "run")
    output = tmp_path / "o.safetensors"
    report = average(tmp_path / "run", output, key=key, last=2)
    states = []
    for path in paths[1:]:
        state = load(path)
        for name in key.split("/"):
            state = state[name]
        states.append(state)
    found = load_file(output)
    model = network()
    model.load_state_dict(found)
    for name, tensor in found.items():
        one, other = (state[name] for state in states)
        expected = middle(one, other) if tensor.is_floating_point() else other
        assert torch.equal(tensor, expected), name
    assert "hyper_parameters" not in str(sorted(found))
    assert any(name.startswith("optimizer_states/") for name in report.plan.dropped)
    assert not any("carried unread" in note for note in report.notes)
    assert verify(output, sources=[tmp_path / "run"]).verified


def test_a_part_is_averaged_in_place(tmp_path: Path) -> None:
    """Everything else of the file is the newest's, and the record has the key."""
    (tmp_path / "run").mkdir()
    paths = write(tmp_path / "run")
    output = tmp_path / "o.ckpt"
    report = average(tmp_path / "run", output, key="state_dict", last=2, verify=True)
    found, one, other = (load(path) for path in (output, *paths[1:]))
    assert set(report.plan.averaged) == {
        name for name, tensor in one["state_dict"].items() if tensor.is_floating_point()
    }
    for name, tensor in one["state_dict"].items():
        if tensor.is_floating_point():
            expected = middle(tensor, other["state_dict"][name])
            assert torch.equal(found["state_dict"][name], expected)
    for name, tensor in other["kept"]["net"]["inner"].items():
        assert torch.equal(found["kept"]["net"]["inner"][name], tensor)
    assert found["hyper_parameters"].weights.tolist() == [1.0, 1.0, 1.0]
    assert verify(output, sources=[tmp_path / "run"]).verified


def test_types_are_chosen_in_a_conversion(tmp_path: Path) -> None:
    """`--dtype` stores another type of a part too."""
    write(tmp_path)
    output = tmp_path / "o.safetensors"
    options = ("--key", "state_dict", "--dtype", "bfloat16", "-o", output)
    assert polyak("average", tmp_path, *options, cwd=tmp_path).returncode == 0
    assert {t.dtype for t in load_file(output).values()} == {torch.bfloat16, torch.int64}


def test_a_part_that_is_there_twice_has_its_own_names(tmp_path: Path) -> None:
    """One dictionary under two keys, and tensors that two parts share, belong to the part asked."""
    for k in (1.0, 2.0):
        state = {"w": torch.full((3,), k)}
        content = {"first": state, "again": state, "third": {"v": state["w"]}}
        torch.save(content, tmp_path / f"m_{k:.0f}.pt")
    for key, name in (("first", "w"), ("again", "w"), ("third", "v")):
        average(tmp_path, tmp_path / "o.safetensors", key=key, force=True)
        found = load_file(tmp_path / "o.safetensors")
        assert {one: tensor.tolist() for one, tensor in found.items()} == {name: [1.5] * 3}


@pytest.mark.parametrize(
    ("key", "kind", "message"),
    [
        (
            "model",
            FormatError,
            r"has no 'model' that --key could choose; expected one of 'epoch', ",
        ),
        ("state_dict/0", FormatError, r"has no 'state_dict/0' .*expected one of '0.weight', "),
        ("epoch/x", FormatError, r"has no 'epoch/x' .*none, as it is no dictionary"),
        ("epoch", PolyakError, r"nothing to average"),
        ("kept", OutputError, r"has 'net' beside or around its tensors, .*with --key"),
    ],
)
def test_a_key_that_leads_to_no_state_dict_is_refused(
    tmp_path: Path, key: str, kind: type[Exception], message: str
) -> None:
    """The error says which keys there are."""
    paths = write(tmp_path)
    with pytest.raises(kind, match=message):
        plan(paths, tmp_path / "o.safetensors", key=key)


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        ({"epoch": 3, "model_state_dict": {"w": 0}}, "--key model_state_dict"),
        ({"epoch": 3, "model": {"w": 0}, "ema": {"w": 1}}, "--key model or --key ema"),
        ({"epoch": 3, "empty": {}, "deep": {"net": {"w": 0}}}, "with --key"),
        ({"epoch": 3, "net": {"w": 0}, "random_state": {"cpu": 1}}, "--key net"),
        ({"w": 0, 3: {"w": 1}}, "with --key"),
    ],
)
def test_the_advice_on_a_key_names_those_that_hold_state_dicts(
    tmp_path: Path, content: dict[Any, Any], advice: str
) -> None:
    """A key is advised if it leads to tensors of a model alone, and never one that is not there."""

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: fill(inner) for key, inner in value.items()}
        return value if value == 3 else torch.full((2,), float(value))

    torch.save(fill(content), tmp_path / "m_1.pt")
    with pytest.raises(OutputError) as refusal:
        plan([tmp_path / "m_1.pt"], tmp_path / "o.safetensors")
    assert str(refusal.value).endswith(advice)


def test_a_format_without_parts_has_no_key(tmp_path: Path) -> None:
    """The error names the file and the option that chooses tensors there."""
    from safetensors.torch import save_file

    save_file({"w": torch.ones(3)}, tmp_path / "m_1.safetensors")
    with pytest.raises(UsageError, match=r"--key model: .*safetensors file.*--include-tensors"):
        plan([tmp_path / "m_1.safetensors"], key="model")
