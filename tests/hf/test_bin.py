"""Weights that `torch.save` wrote: `pytorch_model.bin`, also in shards, and `adapter_model.bin`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftModel
from transformers import AutoModelForCausalLM

from polyak_cli import FormatError, OutputError, average, plan, verify
from tests.hf.models import assert_is_mean, make_llama, save_run
from tests.hf.test_peft import make_adapted

INDEX = "pytorch_model.bin.index.json"


def save_bin(model: Any, folder: Path, _: int) -> None:
    """Save the state dict in one file, tied weights under both names, with the configuration."""
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    model.config.save_pretrained(folder)


def save_shards(model: Any, folder: Path, number: int) -> None:
    """Save shards and their index, as the Hub's library divides them."""
    state = model.state_dict()
    split = split_torch_state_dict_into_shards(
        state,
        max_shard_size=f"{11 - 2 * number}KB",
        filename_pattern="pytorch_model{suffix}.bin",
    )
    for name, tensors in split.filename_to_tensors.items():
        torch.save({tensor: state[tensor] for tensor in tensors}, folder / name)
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / INDEX).write_text(json.dumps(index, indent=2))
    model.config.save_pretrained(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_a_state_dict_becomes_a_model_that_loads(tmp_path: Path, tied: bool) -> None:
    """Tied weights stay tied."""
    states = save_run(make_llama(tied=tied), tmp_path / "run", save_bin)
    average(tmp_path / "run", tmp_path / "final")
    assert_is_mean(AutoModelForCausalLM.from_pretrained(tmp_path / "final"), states)
    state = torch.load(tmp_path / "final/pytorch_model.bin", weights_only=True)
    one, other = state["lm_head.weight"], state["model.embed_tokens.weight"]
    assert (one.data_ptr() == other.data_ptr()) == tied
    assert verify(tmp_path / "final").verified


def test_shards_become_shards_that_load(tmp_path: Path) -> None:
    """Divided differently in each checkpoint; the output is divided as the newest."""
    states = save_run(make_llama(tied=False), tmp_path / "run", save_shards)
    assert len({len([*one.glob("*.bin")]) for one in (tmp_path / "run").iterdir()}) > 2
    report = average(tmp_path / "run", tmp_path / "final", verify=True)
    assert report.verified
    assert_is_mean(AutoModelForCausalLM.from_pretrained(tmp_path / "final"), states)
    newest = tmp_path / "run/checkpoint-40"
    assert (tmp_path / "final" / INDEX).read_bytes() == (newest / INDEX).read_bytes()
    assert verify(tmp_path / "final").verified
    shard = sorted((tmp_path / "final").glob("*.bin"))[-1]
    raw = bytearray(shard.read_bytes())
    raw[raw.index(b"data/0") + 200] ^= 1  # in the first tensor, behind the member's padded header
    shard.write_bytes(raw)
    assert not verify(tmp_path / "final").verified


def test_shards_are_converted_and_not_merged(tmp_path: Path) -> None:
    """Into one safetensors file, which the library reads; a single .bin is refused with the way."""
    states = save_run(make_llama(tied=False), tmp_path / "run", save_shards)
    average(tmp_path / "run", tmp_path / "final.safetensors")
    folder = tmp_path / "whole"
    folder.mkdir()
    shutil.copy(tmp_path / "run/checkpoint-40/config.json", folder)
    (tmp_path / "final.safetensors").rename(folder / "model.safetensors")
    assert_is_mean(AutoModelForCausalLM.from_pretrained(folder), states)
    with pytest.raises(OutputError, match="written to a folder; give the output no suffix"):
        plan(tmp_path / "run", tmp_path / "final.bin")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"lm_head.weight": "../pytorch_model.bin"}, "file in the same folder"),
        ({"lm_head.weight": "/etc/passwd.bin"}, "file in the same folder"),
        ({"no.such": "pytorch_model-00009-of-00009.bin"}, "cannot be read: No such file"),
        ({"lm_head.weight": None}, "neither the name of a shard nor a list"),
        ({"no.such": "pytorch_model-00001-of-{n:05}.bin"}, "has no tensor 'no.such'"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, change: Any, expected: str) -> None:
    """Names that point outside, shards that are missing, tensors that are elsewhere."""
    save_run(make_llama(tied=False), tmp_path / "run", save_shards, 2)
    path = tmp_path / "run/checkpoint-20" / INDEX
    index = json.loads(path.read_text())
    count = len({*index["weight_map"].values()})
    index["weight_map"] |= {k: v and v.format(n=count) for k, v in change.items()}
    path.write_text(json.dumps(index))
    with pytest.raises(FormatError, match=expected):
        average(tmp_path / "run", tmp_path / "final")
    assert not (tmp_path / "final").exists()


def test_adapters_of_older_versions(tmp_path: Path) -> None:
    """PEFT wrote `adapter_model.bin` before safetensors, and still can."""
    states = save_run(
        make_adapted(),
        tmp_path / "run",
        lambda one, folder, _: one.save_pretrained(folder, safe_serialization=False),
    )
    assert (tmp_path / "run/checkpoint-40/adapter_model.bin").is_file()
    average(tmp_path / "run", tmp_path / "final")
    assert_is_mean(PeftModel.from_pretrained(make_llama(), tmp_path / "final"), states)


def test_both_forms_are_one_checkpoint(tmp_path: Path) -> None:
    """Transformers loads safetensors, and so does polyak; what it leaves out, it says."""

    def save_both(model: Any, folder: Path, _: int) -> None:
        model.save_pretrained(folder)
        torch.save({"stale": torch.zeros(3)}, folder / "pytorch_model.bin")

    states = save_run(make_llama(), tmp_path / "run", save_both)
    report = average(tmp_path / "run", tmp_path / "final")
    assert_is_mean(AutoModelForCausalLM.from_pretrained(tmp_path / "final"), states)
    assert not (tmp_path / "final/pytorch_model.bin").exists()
    assert any("pytorch_model.bin" in note for note in report.notes)
