"""Distributed checkpoints (DCP) that PyTorch itself saves, in one process and in several."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from polyak_cli import average, check, diff, inspect, plan, verify
from polyak_cli.errors import FormatError, MismatchError, OutputError, PolyakError, UsageError
from tests import dcp as dcp_by_hand
from tests.contract import Contract, Tensors, another_layout
from tests.source import PACKAGE

State = dict[str, Any]


def save(folder: Path, state: State) -> Path:
    """Save a state dict from this process alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def load(folder: Path, state: State) -> None:
    """Load a checkpoint into the tensors of a state dict, in this process alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=folder, no_dist=True)


def flatten(state: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return the tensors of nested dictionaries by the names that DCP gives them."""
    if isinstance(state, torch.Tensor):
        return {prefix[:-1]: state}
    items = state.items() if isinstance(state, dict) else ()
    return {k: v for key, one in items for k, v in flatten(one, f"{prefix}{key}.").items()}


def read(folder: Path, file: Path) -> dict[str, torch.Tensor]:
    """Return the whole tensors of a checkpoint, by PyTorch's own converter."""
    dcp_to_torch_save(folder, file)
    return flatten(torch.load(file, weights_only=True))


def average_whole(models: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Average whole tensors in float64, oldest first; keep what is no float of the newest."""
    found = {}
    for name, newest in models[-1].items():
        total = sum(model[name].double() for model in models) / len(models)
        is_float = newest.is_floating_point()
        found[name] = torch.as_tensor(total).to(newest.dtype) if is_float else newest
    return found


def assert_equal(found: Mapping[str, Any], expected: Mapping[str, torch.Tensor]) -> None:
    """Compare names, types, shapes and bits."""
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert found[name].dtype == values.dtype, name
        assert torch.equal(found[name], values), name


class TestWhole(Contract):
    """Checkpoints of one process, written by PyTorch; the output is such a folder too."""

    suffix = ""
    converts = False

    @property
    def result(self) -> str:
        """See `Contract.result`; an output must not have a run's name."""
        return "-average"

    def write(self, path: Path, tensors: Tensors) -> None:
        """See `Contract.write`."""
        save(path, {name: torch.from_numpy(values) for name, values in tensors.items()})

    def read(self, path: Path) -> Tensors:
        """See `Contract.read`."""
        found = read(path, path.with_name(f"{path.name}.read"))
        path.with_name(f"{path.name}.read").unlink()
        return {name: tensor.numpy() for name, tensor in found.items()}

    @pytest.mark.slow
    def test_a_truncated_file_is_refused_wherever_it_ends(self, tmp_path: Path) -> None:
        """See `Contract`; each file of the folder."""
        paths, _ = self.write_run(tmp_path / "run", 2)
        for part in [path for path in paths[0].iterdir() if path.is_file()]:
            whole = part.read_bytes()
            for length in {0, 1, 7, len(whole) - 1, *range(8, len(whole), len(whole) // 5)}:
                part.write_bytes(whole[:length])
                with pytest.raises(PolyakError, match="model_1"):
                    average(paths, tmp_path / f"o{self.result}")
            part.write_bytes(whole)
        assert [path.name for path in tmp_path.iterdir()] == ["run"]


@another_layout
class TestInParts(TestWhole):
    """Checkpoints whose tensors lie in several parts, in blocks of rows and of columns."""

    def write(self, path: Path, tensors: Tensors) -> None:
        """See `Contract.write`; PyTorch reads what the other tests write by hand."""
        number = 1 + int(path.name.rpartition("_")[2])
        pieces = {
            name: dcp_by_hand.split(
                values, [min(n, count) for n, count in zip(values.shape, (number, 3), strict=False)]
            )
            for name, values in tensors.items()
        }
        dcp_by_hand.write(path, pieces)


def run_ranks(*arguments: object) -> None:
    """Save or load in several processes."""
    subprocess.run(
        [sys.executable, "-m", "tests.torch.ranks", *map(str, arguments)],
        cwd=PACKAGE.parent,
        check=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose four checkpoints were saved by 1, 2, 4 and 8 processes."""
    folder = tmp_path_factory.mktemp("sharded")
    for world in (1, 2, 4, 8):
        run_ranks("save", world, folder / f"step-{world}", world)
    return folder


@pytest.mark.slow
def test_checkpoints_of_one_to_eight_processes_average(sharded: Path, tmp_path: Path) -> None:
    """FSDP2's uneven shards, columns, blocks, copies, 0-d and empty tensors, and bfloat16."""
    output = tmp_path / "o.safetensors"
    report = average(sharded, output)
    assert [one.epoch for one in report.plan.checkpoints] == [1, 2, 4, 8]
    models = [read(sharded / f"step-{k}", tmp_path / f"{k}.pt") for k in (1, 2, 4, 8)]
    model = {name for name in models[0] if not name.startswith("optim.")}
    expected = average_whole([{name: one[name] for name in model} for one in models])
    assert_equal(load_file(output), expected)
    assert expected["model.3.weight"].dtype == torch.bfloat16
    assert "step" in report.plan.dropped
    assert "optim.state.0.weight.exp_avg" in report.plan.dropped
    assert verify(output, sources=[sharded]).problems == ()
    assert check(sharded).healthy


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 3])
def test_an_average_loads_into_a_live_model(sharded: Path, tmp_path: Path, world: int) -> None:
    """Of another number of processes than any that saved: model, optimizer, and all the rest."""
    output = tmp_path / "final"
    average(sharded, output, verify=True)
    run_ranks("load", world, output, tmp_path / "loaded.pt")
    loaded = torch.load(tmp_path / "loaded.pt", weights_only=True)
    models = [read(sharded / f"step-{k}", tmp_path / f"{k}.pt") for k in (1, 2, 4, 8)]
    newest = torch.load(tmp_path / "8.pt", weights_only=True)
    own = {name for name in models[0] if name.startswith(("model.", "more."))}
    expected = average_whole([{name: one[name] for name in own} for one in models])
    assert loaded.pop("step") == newest["step"] == 8
    assert_equal(loaded, {name.partition(".")[2]: one for name, one in expected.items()})
    slots = read(output, tmp_path / "output.pt")
    state = {name for name in slots if name.startswith("optim.")}
    assert_equal({n: slots[n] for n in state}, {n: models[-1][n] for n in state})
    assert {path.name for path in output.iterdir()} == {
        *(path.name for path in (sharded / "step-8").iterdir()),
        "polyak_provenance.json",
    }
    assert verify(output, sources=[sharded]).problems == ()


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 3])
def test_the_weights_alone_load_into_a_live_model(
    sharded: Path, tmp_path: Path, world: int
) -> None:
    """Nothing of the optimizer is in the folder, and none of its bytes in the parts."""
    whole, output = tmp_path / "whole", tmp_path / "final"
    average(sharded, whole)
    report = average(sharded, output, only_weights=True, verify=True)
    assert {"step", "optim.state.0.weight.exp_avg"} <= {*report.plan.dropped}
    assert not any("optimizer" in note for note in report.notes)
    run_ranks("weights", world, output, tmp_path / "loaded.pt")
    loaded = torch.load(tmp_path / "loaded.pt", weights_only=True)
    expected = read(whole, tmp_path / "whole.pt")
    own = {name: one for name, one in expected.items() if name.startswith(("model.", "more."))}
    assert_equal(loaded, {name.partition(".")[2]: one for name, one in own.items()})
    assert_equal(read(output, tmp_path / "final.pt"), own)
    sizes = [sum(path.stat().st_size for path in folder.iterdir()) for folder in (output, whole)]
    assert sizes[0] < sizes[1] * 0.7
    assert verify(output, sources=[sharded]).problems == ()
    average([output], tmp_path / "again.safetensors")
    assert_equal(load_file(tmp_path / "again.safetensors"), own)


@pytest.mark.slow
def test_one_division_differs_from_another_in_nothing(sharded: Path, tmp_path: Path) -> None:
    """What was loaded from eight parts and saved as one is equal, tensor by tensor."""
    dcp_to_torch_save(sharded / "step-8", tmp_path / "8.pt")
    folder = save(tmp_path / "one" / "step-8", torch.load(tmp_path / "8.pt", weights_only=True))
    assert diff(sharded / "step-8", folder).equal
    average([sharded / "step-8"], tmp_path / "a.safetensors")
    average([folder], tmp_path / "b.safetensors")
    assert_equal(load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors"))


@pytest.mark.parametrize("options", [{}, {"thread_count": 3}, {"single_file_per_rank": False}])
def test_the_options_of_the_writer_change_nothing(tmp_path: Path, options: State) -> None:
    """One file, several files of one process, or a file for each tensor."""
    torch.manual_seed(0)
    models = []
    for k in (1, 2):
        state = {f"w{n}": (1 + k / 16) * torch.randn(4, 3) for n in range(5)}
        torch.manual_seed(0)
        writer = dcp.FileSystemWriter(tmp_path / "run" / f"step-{k}", **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(state, storage_writer=writer, no_dist=True)
        models.append(state)
    report = average(tmp_path / "run", tmp_path / "o.safetensors")
    assert_equal(load_file(tmp_path / "o.safetensors"), average_whole(models))
    # Such a folder has neither a config.json nor a tokenizer that a note could speak of.
    (note,) = (note for note in report.notes if "only the tensors are written" in note)
    assert "without suffix is a folder of PyTorch DCP" in note
    assert "config.json" not in note


def test_every_type_is_read(tmp_path: Path) -> None:
    """Floats are averaged, the others are the newest's."""
    types = [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    ]
    models = [
        {str(kind).removeprefix("torch."): (torch.arange(6) + k).to(kind) for kind in types}
        for k in (0, 1)
    ]
    for k, state in enumerate(models):
        save(tmp_path / "run" / f"step-{k}", state)
    average(tmp_path / "run", tmp_path / "o.safetensors")
    assert_equal(load_file(tmp_path / "o.safetensors"), average_whole(models))


def test_names_of_a_program_say_what_is_the_model(tmp_path: Path) -> None:
    """As torchtitan, OLMo-core, Accelerate and Megatron name items; the order of keys is free."""
    weight, slot = torch.ones(3), torch.zeros(3)
    layouts: list[tuple[State, set[str]]] = [
        (
            {
                "tok_embeddings.weight": weight,
                "optimizer": {
                    "state.tok_embeddings.weight.exp_avg": slot,
                    "param_groups.tok_embeddings.weight.lr": 0.1,
                },
                "lr_scheduler": {"last_epoch": 3},
                "train_state": {"step": torch.tensor(3)},
                "dataloader": {"dp_rank_0": b"bytes"},
            },
            {"tok_embeddings.weight"},
        ),
        (
            {
                "model": {"w.weight": weight},
                "optim": {"state": {"w.weight": {"exp_avg": slot, "step": torch.tensor(1.0)}}},
            },
            {"model.w.weight"},
        ),
        (
            {
                "app": {
                    "model": {"w": weight},
                    "optim": {
                        "state": {"w": {"exp_avg": slot}},
                        "param_groups": [{"lr": 0.1, "params": ["w"]}],
                    },
                }
            },
            {"app.model.w"},
        ),
        (
            {
                "decoder.layers.weight": weight,
                "optimizer.state.exp_avg.decoder.layers.weight": slot,
                "rng_state": torch.zeros(4, dtype=torch.uint8),
            },
            {"decoder.layers.weight"},
        ),
    ]
    for number, (state, own) in enumerate(layouts):
        folder = save(tmp_path / f"step-{number}", state)
        report = average([folder], tmp_path / f"{number}.safetensors")
        assert set(load_file(tmp_path / f"{number}.safetensors")) == own
        assert set(report.plan.averaged) == own
        (seen,) = inspect([folder])
        assert len(seen.tensors) > len(own)


def test_what_a_module_keeps_beside_its_tensors_is_not_lost(tmp_path: Path) -> None:
    """Such bytes cannot become safetensors, and the error names them."""

    class Counted(nn.Linear):  # type: ignore[misc,unused-ignore]
        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 3}

        def set_extra_state(self, state: Any) -> None:
            del state

    folder = save(tmp_path / "step-1", {"model": Counted(2, 2).state_dict()})
    with pytest.raises(OutputError, match=r"model\._extra_state\.calls"):
        average([folder], tmp_path / "o.safetensors")


def test_memory_formats_are_kept_and_conversion_says_so(tmp_path: Path) -> None:
    """Elements of channels_last lie in another order, which safetensors does not have."""
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    folder = save(tmp_path / "run" / "step-1", {"image": image})
    save(tmp_path / "run" / "step-2", {"image": image * 1.125})
    average(tmp_path / "run", tmp_path / "final")
    expected = average_whole([{"image": image}, {"image": image * 1.125}])
    assert_equal(read(tmp_path / "final", tmp_path / "final.pt"), expected)
    with pytest.raises(OutputError, match=r"'image'.*the order of its dimensions \(0, 2, 3, 1\)"):
        average([folder], tmp_path / "o.safetensors")


def test_an_output_is_replaced_only_with_force(tmp_path: Path) -> None:
    """What is no part of an older average stays, and is named."""
    folder = save(tmp_path / "step-1", {"w": torch.arange(5.0)})
    (folder / "common.pt").write_bytes(b"of Megatron")
    (folder / "metadata.json").write_text("{}")
    output = tmp_path / "final"
    average([folder], output)
    assert (output / "common.pt").read_bytes() == b"of Megatron"
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(OutputError, match="use --force to replace it"):
        average([folder], output)
    average([folder], output, force=True)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    (output / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds 'notes.txt', which is not part of an average"):
        average([folder], output, force=True)


def test_checksums_of_an_output_are_right(tmp_path: Path) -> None:
    """Each archive in it is whole for any reader of zip files."""
    for k in (1, 2):
        save(tmp_path / "run" / f"step-{k}", {"a": torch.randn(9) / 99 + 1, "b": torch.ones(3) * k})
    average(tmp_path / "run", tmp_path / "final")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = dcp.FileSystemReader(tmp_path / "final").read_metadata()
    content = (tmp_path / "final" / "__0_0.distcp").read_bytes()
    assert len(found.storage_data) == 2
    for one in found.storage_data.values():
        whole = io.BytesIO(content[one.offset : one.offset + one.length])
        with zipfile.ZipFile(whole) as archive:
            assert archive.testzip() is None
            (member,) = (info for info in archive.infolist() if "/data/" in info.filename)
        # It stands behind the values too, for programs that read forwards.
        descriptor = struct.pack("<4sL", b"PK\x07\x08", member.CRC)
        assert descriptor in whole.getvalue()


def test_checkpoints_of_other_storage_are_named(tmp_path: Path) -> None:
    """Compressed ones, those in safetensors, and those with one .metadata a process."""
    state = {"w": torch.ones(300)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = dcp.filesystem.SerializationFormat.SAFETENSORS
        writer = dcp.FileSystemWriter(tmp_path / "tensors", serialization_format=kind)
        dcp.save(state, storage_writer=writer, no_dist=True)
    with pytest.raises(FormatError, match=r"SerializationFormat.SAFETENSORS"):
        average([tmp_path / "tensors"], tmp_path / "o.safetensors")
    folder = save(tmp_path / "step-1", state)
    (folder / ".metadata").rename(folder / "__0.metadata")
    with pytest.raises(PolyakError, match=r"with one .metadata a process; save it with use_coll"):
        average([folder], tmp_path / "o.safetensors")
    (folder / "__0.metadata").unlink()
    with pytest.raises(PolyakError, match=r"without its .metadata; it was not saved completely"):
        average([folder], tmp_path / "o.safetensors")


def test_tensors_in_parts_in_safetensors_are_named(tmp_path: Path) -> None:
    """Whole ones of the same writer are averaged; parts of tensors never are."""
    models = [{"w": torch.arange(6.0) / k} for k in (1, 2)]
    for k, state in enumerate(models):
        writer = dcp.HuggingFaceStorageWriter(str(tmp_path / "run" / f"step-{k}"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(state, storage_writer=writer, no_dist=True)
    average(tmp_path / "run", tmp_path / "o.safetensors", coefficients=[0.5, 0.5])
    assert_equal(load_file(tmp_path / "o.safetensors"), average_whole(models))
    folder = tmp_path / "parts"
    folder.mkdir()
    part = folder / "shard-00001-model-00001-of-00001.safetensors"
    said = {"format": "pt", "DCP_SHARDING_INFO": '{"w": {"saved_offsets": [0]}}'}
    save_file({"w": torch.ones(3)}, part, metadata=said)
    for source in (folder, part):
        with pytest.raises(PolyakError, match=r"parts of tensors; save it with HuggingFaceStor"):
            average([source], tmp_path / "p.safetensors")


def test_checkpoints_without_a_tensor_of_a_model_are_named(tmp_path: Path) -> None:
    """A state dict that was saved as one object, and the folder of an optimizer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
        state = {"model": {"w": torch.ones(3)}}
        dcp.save(state, checkpoint_id=tmp_path / "step-1", planner=planner, no_dist=True)
    with pytest.raises(FormatError, match=r"'model' in bytes; save it with a planner that flat"):
        average([tmp_path / "step-1"], tmp_path / "o.safetensors")
    folder = save(tmp_path / "optimizer_0", {"state": {"w": {"exp_avg": torch.ones(3)}}})
    with pytest.raises(FormatError, match=r"the state of an optimizer or of a run; expected a m"):
        average([folder], tmp_path / "o.safetensors")


def test_checksums_may_be_missing(tmp_path: Path) -> None:
    """PyTorch can save without them; then there is nothing to compare."""
    torch.serialization.set_crc32_options(False)
    try:
        folder = save(tmp_path / "step-1", {"w": torch.arange(5.0)})
    finally:
        torch.serialization.set_crc32_options(True)
    average([folder], tmp_path / "o.safetensors")
    assert_equal(load_file(tmp_path / "o.safetensors"), {"w": torch.arange(5.0)})


def ema_run(folder: Path, *, nested: bool = False) -> list[State]:
    """Save two checkpoints as torchtitan does with an EMA, an optimizer whose state is the mean."""
    states = []
    for step in (1, 2):
        torch.manual_seed(step)
        weights = {name: torch.randn(6, 3) for name in ("tok.weight", "layers.0.w")}
        counter = {"bias_count": torch.randn(4)}  # a buffer, which has no EMA
        slots = {f"state.{name}.exp_avg": torch.randn(6, 3) for name in weights}
        means = {f"state.{name}.ema_params": torch.randn(6, 3) for name in weights}
        steps = {f"state.{name}.step": torch.tensor(float(step)) for name in weights}
        model = {**weights, **counter}
        states.append(
            {
                **({"model": model} if nested else model),
                "optimizer": {**slots, **steps},
                "ema_optimizer": {**means, **steps, "param_groups.tok.weight.decay": 0.9},
                "train_state": {"step": torch.tensor(step)},
            }
        )
        save(folder / f"step-{step}", states[-1])
    return states


@pytest.mark.parametrize("nested", [False, True])
def test_the_ema_of_torchtitan_is_averaged_in_place_of_the_weights(
    tmp_path: Path, nested: bool
) -> None:
    """It loads where the weights were, the optimizers are the newest's; safetensors has no EMA."""
    states = ema_run(tmp_path / "run", nested=nested)
    raws = [state["model"] if nested else state for state in states]
    middle = {
        name: (raws[0][name].double() + raws[1][name].double()).div(2).float()
        for name in ("tok.weight", "layers.0.w", "bias_count")
    }
    kept = [state["ema_optimizer"] for state in states]
    means = middle | {
        name: (kept[0][key].double() + kept[1][key].double()).div(2).float()
        for name in ("tok.weight", "layers.0.w")
        for key in [f"state.{name}.ema_params"]
    }
    prefix = "model." if nested else ""
    for use_ema, expected in ((False, middle), (True, means)):
        output = tmp_path / f"final-{use_ema}"
        report = average(tmp_path / "run", output, use_ema=use_ema)
        blank = {
            name: {key: torch.zeros_like(one) for key, one in part.items() if hasattr(one, "shape")}
            if isinstance(part, dict)
            else torch.zeros_like(part)
            for name, part in states[-1].items()
        }
        load(output, blank)
        assert_equal(blank["model"] if nested else {n: blank[n] for n in expected}, expected)
        for name in ("optimizer", "ema_optimizer"):
            newest = {k: v for k, v in states[-1][name].items() if hasattr(v, "shape")}
            assert_equal(blank[name], newest)
        missing = [note for note in report.notes if "has no EMA" in note]
        assert len(missing) == use_ema
        assert all(f"({prefix}bias_count): its own values" in note for note in missing)
        assert verify(output, sources=[tmp_path / "run"]).problems == ()
        flat = tmp_path / f"{use_ema}.safetensors"
        average(tmp_path / "run", flat, use_ema=use_ema)
        assert_equal(load_file(flat), {f"{prefix}{name}": one for name, one in expected.items()})
    (seen,) = inspect([tmp_path / "run" / "step-1"])
    roles = {one.spec.name: one.role for one in seen.tensors}
    assert roles["ema_optimizer.state.tok.weight.ema_params"] == "ema"
    assert roles["optimizer.state.tok.weight.exp_avg"] == "optimizer"
    assert roles[f"{prefix}tok.weight"] == "weights"


def test_an_ema_beside_the_model_is_paired_with_it(tmp_path: Path) -> None:
    """Under a key of its own; without the option, the average of the raw weights is in both."""
    states = []
    for step in (1, 2):
        torch.manual_seed(step)
        states.append({key: {"w": torch.randn(3)} for key in ("model", "ema")})
        save(tmp_path / "run" / f"step-{step}", states[-1])
    for use_ema, key in ((False, "model"), (True, "ema")):
        output = tmp_path / f"final-{use_ema}"
        report = average(tmp_path / "run", output, use_ema=use_ema)
        mean = (states[0][key]["w"].double() + states[1][key]["w"].double()).div(2).float()
        assert_equal(read(output, tmp_path / "o.pt"), {"model.w": mean, "ema.w": mean})
        assert any("'ema.*' is a running mean of the raw weights" in one for one in report.notes)


def test_a_checkpoint_without_an_ema_is_named_as_such(tmp_path: Path) -> None:
    """No word of Keras, whose optimizers keep EMAs too."""
    folder = save(tmp_path / "step-1", {"model": {"w": torch.ones(3)}})
    with pytest.raises(MismatchError, match=r"has no running mean of its weights \(an EMA\)"):
        average([folder], tmp_path / "final", use_ema=True)


def test_a_key_is_refused_with_what_writes_the_model_alone(tmp_path: Path) -> None:
    """DCP's model is known by itself; the options that the error names leave out the rest."""
    folder = save(
        tmp_path / "step-1", {"model": {"w": torch.ones(3)}, "optim": {"m": torch.ones(3)}}
    )
    advice = r"--key model: .*PyTorch DCP file.*-o NAME\.safetensors or --only-weights"
    with pytest.raises(UsageError, match=advice):
        plan([folder], key="model")
    average([folder], tmp_path / "o.safetensors")
    assert list(load_file(tmp_path / "o.safetensors")) == ["model.w"]
