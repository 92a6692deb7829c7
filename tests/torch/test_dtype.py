"""`--dtype` with an output of PyTorch: the storages get other types, and all else stays."""

from __future__ import annotations

import io
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.serialization import config

from polyak_cli import average, check, plan, verify
from polyak_cli.errors import FormatError, UsageError
from polyak_cli.formats.torch import retyping
from polyak_cli.processes.sandbox import Heartbeat

State = dict[str, Any]
TYPES = {name: getattr(torch, name) for name in retyping.TYPES}


class Net(nn.Module):  # type: ignore[misc]  # torch is not installed where types are checked
    """A model with tied weights, statistics, a counter and a transposed tensor."""

    def __init__(self) -> None:
        """Make it."""
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 7)
        self.head.weight = self.embedding.weight
        self.turned = nn.Parameter(torch.empty(4, 6).t())
        self.register_buffer("empty", torch.empty(0, 3))


def make_state(step: int, **more: Any) -> State:
    """Return what a training script saves; sums of its weights are exact in float32."""
    torch.manual_seed(step)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters())
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for tensor in net.state_dict().values():
        tensor.copy_(torch.randint(-5000, 5000, tensor.shape) / 64)
    return {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step, **more}


def write(folder: Path, **more: Any) -> list[State]:
    """Save two checkpoints."""
    folder.mkdir(exist_ok=True)
    states = [make_state(step, **more) for step in (1, 2)]
    for state in states:
        torch.save(state, folder / f"m_{state['step']}.pt")
    return states


def assert_equal(found: Any, expected: Any) -> None:
    """Compare values, and of tensors type, strides and bits."""
    assert type(found) is type(expected)
    if isinstance(found, torch.Tensor):
        assert found.dtype == expected.dtype
        assert found.stride() == expected.stride()
        assert torch.equal(found, expected)
    elif isinstance(found, Mapping):
        assert [*found] == [*expected]
        for key, value in found.items():
            assert_equal(value, expected[key])
    elif isinstance(found, list):
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize("name", retyping.TYPES)
@pytest.mark.parametrize("source", ["float32", "bfloat16"])
def test_the_model_gets_another_type_and_the_rest_stays(
    tmp_path: Path, name: str, source: str
) -> None:
    """PyTorch loads it in each way that it has; the optimizer and the rest are the newest's."""
    states = write(tmp_path / "run")
    for state in states:
        for key, value in state["model"].items():
            if value.is_floating_point():
                state["model"][key] = value.to(TYPES[source])
        torch.save(state, tmp_path / "run" / f"m_{state['step']}.pt")
    output = tmp_path / "o.pt"
    average(tmp_path / "run", output, dtype=name)
    expected = states[-1]
    for key, value in expected["model"].items():
        if value.is_floating_point():
            mean = (states[0]["model"][key].double() + value.double()) / 2
            expected["model"][key] = torch.empty_like(value, dtype=TYPES[name]).copy_(mean)
    assert_equal(torch.load(output, weights_only=True), expected)
    assert_equal(torch.load(output, weights_only=True, mmap=True), expected)
    with config.patch({"load.calculate_storage_offsets": True}):
        assert_equal(torch.load(output, weights_only=True, mmap=True), expected)
    model = Net()
    model.load_state_dict(torch.load(output, weights_only=True)["model"])
    assert model.head.weight.data_ptr() == model.embedding.weight.data_ptr()
    assert verify(output, sources=[tmp_path / "run"]).verified
    assert not check(output).problems


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    """Two tensors on one storage are two in the output too."""
    write(tmp_path / "run")
    average(tmp_path / "run", tmp_path / "o.pt", dtype="float16")
    model = torch.load(tmp_path / "o.pt", weights_only=True)["model"]
    assert model["embedding.weight"].dtype == torch.float16
    assert model["embedding.weight"].data_ptr() == model["head.weight"].data_ptr()


def test_excluded_tensors_and_objects_are_carried(tmp_path: Path) -> None:
    """What is not averaged keeps its type, although its storages have the same class."""
    settings = Namespace(lr=0.1, dtype=torch.FloatStorage)
    states = write(tmp_path / "run", args=settings, kept=[torch.FloatStorage, torch.ones(3)])
    average(
        tmp_path / "run",
        tmp_path / "o.pt",
        dtype="float64",
        exclude_tensors=["model/norm*", "kept/*"],
    )
    found = torch.load(tmp_path / "o.pt", weights_only=False)
    # PyTorch reads the classes of storages as types of its own.
    assert (found["args"].lr, found["args"].dtype.dtype) == (0.1, torch.float32)
    assert found["kept"][0].dtype == torch.float32
    assert found["kept"][1].dtype == torch.float32
    for key in ("norm.weight", "norm.running_mean", "norm.num_batches_tracked"):
        assert_equal(found["model"][key], states[-1]["model"][key])
    assert found["model"]["head.bias"].dtype == torch.float64


def test_an_output_with_another_type_can_be_averaged_again(tmp_path: Path) -> None:
    """Its pickle is one that this program edits as it edits PyTorch's."""
    write(tmp_path / "run")
    average(tmp_path / "run", tmp_path / "half.pt", dtype="bfloat16")
    average(tmp_path / "half.pt", tmp_path / "whole.pt", dtype="float32")
    half, whole = (
        torch.load(tmp_path / name, weights_only=True)["model"] for name in ("half.pt", "whole.pt")
    )
    for key, value in half.items():
        wanted = torch.float32 if value.is_floating_point() else value.dtype
        assert_equal(whole[key], value.to(wanted))


def test_what_cannot_be_retyped_is_refused(tmp_path: Path) -> None:
    """Types without storages of their own, and pickles of a later protocol; nothing is written."""
    write(tmp_path / "run")
    with pytest.raises(UsageError, match=r"only between bfloat16, .*leave out --dtype"):
        plan(tmp_path / "run", dtype="float8_e5m2")
    torch.save({"x": torch.ones(3).to(torch.float8_e5m2)}, tmp_path / "float8.pt")
    with pytest.raises(UsageError, match=r"--dtype float16: .*'x' is float8_e5m2"):
        plan(tmp_path / "float8.pt", dtype="float16")
    torch.save({"x": torch.ones(3)}, tmp_path / "later.pt", pickle_protocol=4)
    with pytest.raises(FormatError, match=r"later.pt: .*protocol 4 or later.*leave out --dtype"):
        average(tmp_path / "later.pt", tmp_path / "o.pt", dtype="float16")
    assert not (tmp_path / "o.pt").exists()


TENSORS = st.builds(
    lambda dtype, size: torch.arange(size).to(dtype),
    st.sampled_from([*TYPES.values(), torch.int64, torch.bool, torch.complex64]),
    st.integers(0, 4),
)
TREES = st.recursive(
    TENSORS | st.text(max_size=3) | st.integers() | st.none() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=20,
)


def list_tensors(value: Any) -> list[torch.Tensor]:
    """Return the tensors in a tree."""
    if isinstance(value, torch.Tensor):
        return [value]
    inner = [*value.values()] if isinstance(value, dict) else value
    return [one for each in inner for one in list_tensors(each)] if isinstance(inner, list) else []


@given(tree=TREES, name=st.sampled_from([*TYPES]), data=st.data())
def test_any_pickle_is_edited_as_pytorch_reads_it(
    tree: Any, name: str, data: st.DataObject
) -> None:
    """Whatever lies around the tensors, and whichever of them get another type."""
    stream = io.BytesIO()
    torch.save(tree, stream)
    archive = zipfile.ZipFile(stream)
    tensors = list_tensors(tree)
    # PyTorch numbers storages in the order in which it meets them.
    floats = [k for k, one in enumerate(tensors) if one.dtype in TYPES.values()]
    chosen = data.draw(st.sets(st.sampled_from(floats))) if floats else set()
    wanted = {str(k): name for k in chosen}
    edited = io.BytesIO()
    with zipfile.ZipFile(edited, "w") as target:
        for member in archive.infolist():
            content = archive.read(member)
            key = member.filename.partition("/data/")[2]
            if member.filename.endswith("data.pkl"):
                content = retyping.retype(content, wanted, Heartbeat(lambda: None))
            elif key in wanted:
                content = tensors[int(key)].to(TYPES[name]).view(torch.uint8).numpy().tobytes()
            target.writestr(member.filename, content)
    found = list_tensors(torch.load(io.BytesIO(edited.getvalue()), weights_only=True))
    for number, (one, was) in enumerate(zip(found, tensors, strict=True)):
        assert_equal(one, was.to(TYPES[name]) if number in chosen else was)
