"""PyTorch's zip checkpoints, written by torch.save and read by torch.load(weights_only=True)."""

from __future__ import annotations

import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from polyak_cli import average, inspect, plan
from polyak_cli.errors import FormatError, MismatchError, OutputError
from tests.contract import Contract, Tensors, another_layout

State = dict[str, Any]


def load(path: Path, **options: Any) -> Any:
    """Load a file as its users do."""
    return torch.load(path, weights_only=True, **options)


class TestFlat(Contract):
    """A state dict by itself."""

    suffix = ".pt"

    def write(self, path: Path, tensors: Tensors) -> None:
        """See `Contract.write`."""
        torch.save({name: torch.from_numpy(values) for name, values in tensors.items()}, path)

    def read(self, path: Path) -> Tensors:
        """See `Contract.read`."""
        return {name: tensor.numpy() for name, tensor in load(path).items()}


@another_layout
class TestNested(TestFlat):
    """A state dict beside what a training script keeps."""

    suffix = ".pth"

    def write(self, path: Path, tensors: Tensors) -> None:
        """See `Contract.write`."""
        state = OrderedDict((name, torch.from_numpy(values)) for name, values in tensors.items())
        note = {"loss": 0.5, "args": ["--lr", "0.1"], "best": None, "done": False}
        optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]}
        torch.save({"epoch": 10, **note, "optimizer": optimizer, "state_dict": state}, path)

    def read(self, path: Path) -> Tensors:
        """See `Contract.read`."""
        return {name: tensor.numpy() for name, tensor in load(path)["state_dict"].items()}


def write_pair(folder: Path, make: Callable[[], Any], **options: Any) -> list[Path]:
    """Save two checkpoints of what ``make`` returns."""
    torch.manual_seed(0)
    paths = [folder / "m_1.pt", folder / "m_2.pt"]
    for path in paths:
        torch.save(make(), path, **options)
    return paths


def averaged(paths: list[Path]) -> tuple[Any, list[Any]]:
    """Average two checkpoints; return the result and what went into it."""
    output = paths[0].with_name("o.pt")
    average(paths, output)
    return load(output), [load(path) for path in paths]


def middle(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Average two tensors by PyTorch itself, in float64."""
    return (0.5 * one.double() + 0.5 * other.double()).to(one.dtype)


def network() -> nn.Module:
    """Return a small model with BatchNorm."""
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def test_a_trained_model_and_its_optimizer_load(tmp_path: Path) -> None:
    """The model gets averages, counters and the optimizer's state are the newest's."""
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    states = []
    for epoch in range(3):
        optimizer.zero_grad()
        model(torch.randn(16, 4)).square().sum().backward()
        optimizer.step()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
        torch.save(state, tmp_path / f"epoch_{epoch}.pt")
        states.append(load(tmp_path / f"epoch_{epoch}.pt"))
    report = average(tmp_path, tmp_path / "o.pt", coefficients=[0, 0.5, 0.5])
    found = load(tmp_path / "o.pt")
    fresh = network()
    fresh.load_state_dict(found["model"])
    torch.optim.Adam(fresh.parameters()).load_state_dict(found["optimizer"])
    for name, tensor in fresh.state_dict().items():
        one, other = (state["model"][name] for state in states[1:])
        expected = middle(one, other) if tensor.is_floating_point() else other
        assert torch.equal(tensor, expected), name
    assert found["model"]["1.num_batches_tracked"] == 3
    assert found["epoch"] == 2
    newest = states[-1]["optimizer"]["state"]
    for number, slots in found["optimizer"]["state"].items():
        assert all(torch.equal(slots[name], newest[number][name]) for name in slots)
    assert report.plan.dropped == ()
    (seen,) = inspect([tmp_path / "epoch_2.pt"])
    assert "dropped" not in {tensor.fate for tensor in seen.tensors}
    assert any("optimizer state is that of the newest" in note for note in report.notes)
    assert any(re.match(r"\d+ BatchNorm moving statistics", note) for note in report.notes)


def test_only_averaged_storages_and_a_record_differ_from_the_template(tmp_path: Path) -> None:
    """Pickle, order, offsets and the rest are the newest's; checksums are right."""
    paths = write_pair(tmp_path, lambda: {"m": network().state_dict(), "epoch": 3})
    average(paths, tmp_path / "o.pt")
    with zipfile.ZipFile(tmp_path / "o.pt") as found, zipfile.ZipFile(paths[1]) as template:
        assert found.testzip() is None
        infos = found.infolist()
        assert infos.pop().filename == "m_2/polyak_provenance"
        for info, expected in zip(infos, template.infolist(), strict=True):
            assert info.filename == expected.filename
            assert info.header_offset == expected.header_offset
            if "/data/" not in info.filename:
                assert found.read(info) == template.read(expected)


def test_it_opens_in_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mapped, and with the offsets that PyTorch computes without looking, also of an average."""
    paths = write_pair(tmp_path, lambda: network().state_dict())
    average(paths, tmp_path / "o.pt")
    average([tmp_path / "o.pt"], tmp_path / "again.pt")
    plain = load(tmp_path / "o.pt")
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")  # compares those offsets with the list's
    for name in ("o.pt", "again.pt"):
        for options in ({"mmap": True}, {}):
            found = load(tmp_path / name, **options)
            assert all(torch.equal(found[key], plain[key]) for key in plain)
        assert load(tmp_path / name, map_location="meta").keys() == plain.keys()


def test_shared_storages_stay_shared(tmp_path: Path) -> None:
    """Tied tensors and views of one storage are averaged once and together."""

    def make() -> State:
        weight, flat = torch.randn(5, 3), torch.randn(20)
        views = {
            "head": flat[:12].view(3, 4),
            "tail": flat[12:],
            "turned": flat[:12].view(3, 4).t(),
        }
        return {"embed": weight, "lm_head": weight, **views}

    found, (one, other) = averaged(write_pair(tmp_path, make))
    for name in found:
        assert torch.equal(found[name], middle(one[name], other[name])), name
    assert found["embed"].data_ptr() == found["lm_head"].data_ptr()
    assert found["turned"].stride() == (1, 4)
    assert found["head"].untyped_storage().data_ptr() == found["tail"].untyped_storage().data_ptr()


def test_views_are_averaged_as_they_lie(tmp_path: Path) -> None:
    """Transposed, channels-last, strided, expanded and empty tensors keep their strides."""

    def make() -> State:
        return {
            "turned": torch.randn(3, 4).t(),
            "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
            "part": torch.randn(6, 6)[1:4, ::2],
            "expanded": torch.randn(3, 1).expand(3, 5),
            "empty": torch.randn(0, 3),
            "scalar": torch.randn(()),
            "parameter": nn.Parameter(torch.randn(3)),
            "list": [torch.randn(2), {"deeper": (torch.randn(1), "text", None, 7)}],
        }

    found, (one, other) = averaged(write_pair(tmp_path, make))
    for name in list(found)[:7]:
        assert torch.equal(found[name], middle(one[name], other[name])), name
        assert found[name].stride() == other[name].stride()
    assert isinstance(found["parameter"], nn.Parameter)
    assert torch.equal(found["list"][0], middle(one["list"][0], other["list"][0]))
    last = [state["list"][1]["deeper"] for state in (found, one, other)]
    assert torch.equal(last[0][0], middle(last[1][0], last[2][0]))
    assert last[0][1:] == ("text", None, 7)


def test_every_plain_type_is_kept(tmp_path: Path) -> None:
    """Floats are averaged in their own type, whole numbers and booleans are the newest's."""
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    whole = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16)

    def make() -> State:
        return {
            **{str(dtype): torch.randn(50).to(dtype) for dtype in floats},
            **{str(dtype): torch.arange(5).to(dtype) for dtype in whole},
            "bool": torch.rand(5) > 0.5,
            "others": [torch.float32, torch.device("cpu"), torch.Size([1, 2]), {1, 2}, 1j],
        }

    found, (one, other) = averaged(write_pair(tmp_path, make))
    for dtype in floats:
        name = str(dtype)
        assert torch.equal(found[name], middle(one[name], other[name])), name
    for name in ("bool", *map(str, whole)):
        assert torch.equal(found[name], other[name])
    assert found["others"] == other["others"]


def test_a_state_dict_becomes_safetensors(tmp_path: Path) -> None:
    """Of any type, and as programs want it that read PyTorch's; what would be lost is refused."""
    paths = write_pair(tmp_path, lambda: network().state_dict())
    average(paths, tmp_path / "o.pt")
    average(paths, tmp_path / "o.safetensors")
    average(paths, tmp_path / "half.safetensors", dtype="bfloat16")
    expected, found = load(tmp_path / "o.pt"), load_file(tmp_path / "o.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert torch.bfloat16 in {t.dtype for t in load_file(tmp_path / "half.safetensors").values()}
    with safe_open(tmp_path / "o.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
    tied = torch.randn(3)
    for content, message in (
        ({"model": {"x": tied}, "epoch": 3}, "has 'model' beside or around its tensors"),
        ({"x": tied, 3: tied}, "has '3' beside"),
        ([tied], "is not a state dict"),
        ({"x": tied, "y": tied}, "'x' is stored in 3 elements viewed as .*; give the output"),
    ):
        torch.save(content, tmp_path / "odd.pt")
        with pytest.raises(OutputError, match=message):
            plan(tmp_path / "odd.pt", tmp_path / "p.safetensors")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_averaged(tmp_path: Path, dtype: torch.dtype) -> None:
    """In its own type, like any other float."""
    paths = write_pair(tmp_path, lambda: {"x": torch.randn(50).to(dtype)})
    found, (one, other) = averaged(paths)
    # The mean of two such values is exact in float32.
    expected = (0.5 * one["x"].float() + 0.5 * other["x"].float()).to(dtype)
    assert found["x"].dtype == dtype
    assert torch.equal(found["x"].view(torch.uint8), expected.view(torch.uint8))


def test_parameters_with_attributes(tmp_path: Path) -> None:
    """Megatron and others hang attributes on parameters; those are carried."""

    def make() -> State:
        parameter = nn.Parameter(torch.randn(3))
        parameter.parallel = True
        return {"x": parameter}

    paths = write_pair(tmp_path, make)
    average(paths, tmp_path / "o.pt")
    found, one, other = (load(path) for path in (tmp_path / "o.pt", *paths))
    assert torch.equal(found["x"], middle(one["x"], other["x"]))
    assert found["x"].parallel is True


def test_newer_pickles_are_read(tmp_path: Path) -> None:
    """torch.save takes any protocol; torch.load reads the newer ones only when it trusts them."""
    paths = write_pair(tmp_path, lambda: {"x": torch.randn(3), "s": {1}}, pickle_protocol=4)
    average(paths, tmp_path / "o.pt")
    found, one, other = (
        torch.load(path, weights_only=False)["x"] for path in (tmp_path / "o.pt", *paths)
    )
    assert torch.equal(found, middle(one, other))


def test_what_a_trainer_keeps_need_not_match(tmp_path: Path) -> None:
    """Lightning's callbacks hold tensors under names that change from file to file."""
    numbers = iter(range(2))

    def make() -> State:
        scores = {f"epoch={next(numbers)}.ckpt": torch.tensor(0.1)}
        return {
            "state_dict": {"w": torch.randn(3)},
            "callbacks": {"ModelCheckpoint": {"best_k_models": scores}},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.randn(3)}}}],
        }

    paths = [path.rename(path.with_suffix(".ckpt")) for path in write_pair(tmp_path, make)]
    average(tmp_path, tmp_path / "o.ckpt")
    assert load(tmp_path / "o.ckpt")["callbacks"] == load(paths[1])["callbacks"]
    assert plan(paths).averaged == ("state_dict/w",)


def test_tensors_that_lie_differently_are_refused(tmp_path: Path) -> None:
    """A transposed and a plain tensor, a tied and a free one cannot be averaged by storage."""
    values = torch.randn(3, 4)
    for name, one, other in (
        ("turned", {"x": values}, {"x": torch.randn(4, 3).t()}),
        ("tied", {"x": values, "y": values}, {"x": values, "y": values.clone()}),
    ):
        paths = [tmp_path / f"{name}_1.pt", tmp_path / f"{name}_2.pt"]
        torch.save(one, paths[0])
        torch.save(other, paths[1])
        with pytest.raises(MismatchError, match=rf"{name}_1.*('x' has arrangement|no tensor 'y')"):
            average(paths, tmp_path / "o.pt")


@pytest.mark.filterwarnings("ignore:.*(quantize|Sparse|deprecated).*")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: {"x": torch.randn(3).to_sparse()}, r"sparse tensor.*_rebuild_sparse_tensor"),
        (
            lambda: {"x": torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8)},
            r"quantised tensor",
        ),
        (lambda: {"x": torch.randn(3, dtype=torch.complex64)}, r"'x' is of type complex64"),
        (
            lambda: {"x": torch.randn(3, device="meta")},
            r"of the meta device, which has no values; save",
        ),
        (lambda: network(), r"whole model.*torch.nn.modules.container.Sequential.*state_dict"),
        (lambda: torch.optim.Adam([torch.zeros(2)]).state_dict(), r"state of an optimizer"),
    ],
    ids=["sparse", "quantised", "complex", "meta", "module", "optimizer"],
)
def test_what_is_no_plain_state_dict_is_refused_by_name(
    tmp_path: Path, make: Callable[[], Any], message: str
) -> None:
    """The error names what was found."""
    paths = write_pair(tmp_path, make)
    with pytest.raises((FormatError, MismatchError), match=message):
        average(paths, tmp_path / "o.pt")
    assert sorted(os.listdir(tmp_path)) == ["m_1.pt", "m_2.pt"]


def test_other_archives_of_pytorch_are_refused(tmp_path: Path) -> None:
    """Files of before 1.6 and files without checksums."""
    old = write_pair(tmp_path, lambda: {"x": torch.ones(3)}, _use_new_zipfile_serialization=False)
    with pytest.raises(
        FormatError,
        match=r"m_2.pt: is a file of torch.save in the format before PyTorch 1.6.*save it again",
    ):
        average(old, tmp_path / "o.pt")
    torch.serialization.set_crc32_options(False)
    try:
        paths = write_pair(tmp_path, lambda: {"x": torch.ones(3)})
    finally:
        torch.serialization.set_crc32_options(True)
    with pytest.raises(FormatError, match=r"m_2.pt: was written without checksums"):
        average(paths, tmp_path / "o.pt")


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript_is_refused(tmp_path: Path) -> None:
    """An archive of code is not a state dict."""
    for k in (1, 2):
        torch.jit.script(network()).save(str(tmp_path / f"m_{k}.pt"))
    with pytest.raises(FormatError, match=r"m_2.pt: is a TorchScript archive"):
        average([tmp_path / "m_1.pt", tmp_path / "m_2.pt"], tmp_path / "o.pt")


class Gadget:
    """What an attacker saves: loading it carelessly runs a command."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


@pytest.mark.parametrize("place", ["top", "key", "optimizer", "hooks"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, place: str) -> None:
    """os.system anywhere in the file is named, whether a tensor needs it or not."""
    canary = tmp_path / "canary"
    gadget = Gadget(os.system, f"touch {canary}")
    parameter = nn.Parameter(torch.ones(2))
    state: dict[Any, Any] = {"x": torch.ones(3)}
    if place == "hooks":
        parameter.gadget = gadget
        state["p"] = parameter
    else:
        places: dict[str, dict[Any, Any]] = {
            "top": {"y": gadget},
            "key": {gadget: 1},
            "optimizer": {"optimizer": {"state": [gadget]}},
        }
        state |= places[place]
    paths = write_pair(tmp_path, lambda: state)
    with pytest.raises(FormatError, match=r"m_2.pt: its pickle names '(posix|nt).system'"):
        average(paths, tmp_path / "o.pt")
    assert not canary.exists()
    torch.load(paths[0], weights_only=False)  # the file is what it says: the canary can be made
    assert canary.exists()


def test_numpy_scalars_are_carried(tmp_path: Path) -> None:
    """Metrics that numpy computed stand in many files, and are notes of no harm."""
    paths = write_pair(tmp_path, lambda: {"x": torch.randn(3), "best": np.float64(0.25)})
    average(paths, tmp_path / "o.pt")
    assert torch.load(tmp_path / "o.pt", weights_only=False)["best"] == 0.25


@pytest.mark.parametrize("name", ["g_{:08}", "params.{:05}", "checkpoint-{}.pth.tar"])
def test_names_of_trainers_are_found(tmp_path: Path, name: str) -> None:
    """HiFi-GAN's and sockeye's files have no suffix, those of timm have two."""
    (tmp_path / "run").mkdir()
    for k in (1, 2):
        torch.save({"w": torch.full((3,), float(k))}, tmp_path / "run" / name.format(k))
    if name.endswith(".tar"):
        torch.save({"w": torch.zeros(3)}, tmp_path / "run" / "model_best.pth.tar")
    average(tmp_path / "run", tmp_path / "o.pth.tar")
    assert load(tmp_path / "o.pth.tar")["w"].tolist() == [1.5] * 3


@pytest.mark.parametrize("shape", [(3, 0), (0,), (2, 0, 3)])
def test_tensors_without_elements_are_converted(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Whatever their strides, they are in every order at once; so are turned ones."""
    state = {
        "w": torch.ones(2),
        "none": torch.empty(shape),
        "turned": torch.empty(shape[::-1]).permute(*reversed(range(len(shape)))),
    }
    paths = write_pair(tmp_path, lambda: state)
    average(paths, tmp_path / "o.safetensors")
    found = load_file(tmp_path / "o.safetensors")
    assert found["none"].shape == torch.Size(shape)
    assert found["turned"].shape == torch.Size(shape)
    average(paths, tmp_path / "o.pt", verify=True)
    assert load(tmp_path / "o.pt")["none"].stride() == state["none"].stride()
