"""`pytorch_model.bin` in shards with an index: the contract of all formats, by PyTorch."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from polyak_cli import PolyakError, average, verify
from tests.contract import Contract, Tensors

INDEX = "pytorch_model.bin.index.json"


class TestShards(Contract):
    """State dicts in two files; the output is a folder of two."""

    suffix = ""
    converts = False

    @property
    def result(self) -> str:
        """A name without suffix, as that of a folder is."""
        return "_average"

    def write(self, path: Path, tensors: Tensors) -> None:
        """See `Contract.write`."""
        path.mkdir(exist_ok=True)
        names = sorted(tensors)
        weight_map: dict[str, str] = {}
        for k in range(2):
            shard = f"pytorch_model-{k + 1:05}-of-00002.bin"
            held = names[k::2]
            torch.save({name: torch.from_numpy(tensors[name]) for name in held}, path / shard)
            weight_map |= dict.fromkeys(held, shard)
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def read(self, path: Path) -> Tensors:
        """See `Contract.read`."""
        shards = sorted(path.glob("*.bin"))
        states = [torch.load(shard, weights_only=True) for shard in shards]
        return {name: value.numpy() for state in states for name, value in state.items()}

    @pytest.mark.slow
    def test_a_truncated_file_is_refused_wherever_it_ends(self, tmp_path: Path) -> None:
        """Each shard, and the index."""
        paths, _ = self.write_run(tmp_path / "run", 2)
        for file in sorted(paths[0].iterdir()):
            whole = file.read_bytes()
            for length in {0, 1, 7, len(whole) - 2, *range(8, len(whole) - 2, len(whole) // 4)}:
                file.write_bytes(whole[:length])
                with pytest.raises(PolyakError, match="model_1"):
                    average(paths, tmp_path / "o")
            file.write_bytes(whole)
        assert os.listdir(tmp_path) == ["run"]


def test_shards_get_another_type(tmp_path: Path) -> None:
    """Each shard's storages do, and the index has the new size of all; the rest of it stays."""
    states = []
    for k in (1, 2):
        folder = tmp_path / f"run/checkpoint-{k}00"
        folder.mkdir(parents=True)
        torch.manual_seed(k)
        shards = [
            {"a": torch.randint(-99, 99, (3, 4)) / 8, "n": torch.tensor(k)},
            {"b": torch.randint(-99, 99, (5,)) / 8, "c": torch.ones(2, dtype=torch.float16)},
        ]
        names = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
        for name, shard in zip(names, shards, strict=True):
            torch.save(shard, folder / name)
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": 48 + 8 + 20 + 4, "x": [1]}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index))
        states.append(shards[0] | shards[1])
    average(tmp_path / "run", tmp_path / "o", dtype="bfloat16")
    found: dict[str, torch.Tensor] = {}
    for name in names:
        found |= torch.load(tmp_path / "o" / name, weights_only=True)
    assert list(found) == ["a", "n", "b", "c"]
    for key in ("a", "b", "c"):
        mean = (states[0][key].double() + states[1][key].double()) / 2
        assert found[key].dtype == torch.bfloat16
        assert torch.equal(found[key], mean.bfloat16())
    assert found["n"] == 2
    said = json.loads((tmp_path / "o" / INDEX).read_text())
    assert said == index | {"metadata": {"total_size": 24 + 8 + 10 + 4, "x": [1]}}
    assert verify(tmp_path / "o").verified


def test_a_full_state_dict_of_fsdp_is_found(tmp_path: Path) -> None:
    """As Accelerate's `save_state` leaves it, with the state of the training beside it."""
    for step in (500, 1000):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        torch.save({"w": torch.full((3,), float(step))}, folder / "pytorch_model_fsdp.bin")
        torch.save({"state": {}, "param_groups": []}, folder / "optimizer.bin")
        (folder / "random_states_0.pkl").write_bytes(b"state")
    report = average(tmp_path / "run", tmp_path / "final")
    assert [one.epoch for one in report.plan.checkpoints] == [500, 1000]
    assert sorted(os.listdir(tmp_path / "final")) == [
        "polyak_provenance.json",
        "pytorch_model_fsdp.bin",
    ]
    found = torch.load(tmp_path / "final/pytorch_model_fsdp.bin", weights_only=True)
    assert found["w"].tolist() == [750.0] * 3
