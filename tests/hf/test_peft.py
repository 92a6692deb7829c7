"""Adapters of PEFT, averaged into folders that it loads onto the base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.numpy import load_file

from polyak_cli import CheckpointError, average, verify
from tests.hf.models import RECORD, assert_is_mean, make_llama, save_run
from tests.hf.test_transformers import STATE, train


def make_adapted() -> Any:
    """Return a model with LoRA factors, which alone are trained and saved."""
    settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(make_llama(), settings)


def test_adapters_become_an_adapter_that_loads(tmp_path: Path) -> None:
    """With its configuration, onto the base model as it was."""
    states = save_run(
        make_adapted(), tmp_path / "run", lambda one, folder, _: one.save_pretrained(folder)
    )
    average(tmp_path / "run", tmp_path / "final")
    names = {path.name for path in (tmp_path / "final").iterdir()}
    assert names == {"adapter_model.safetensors", "adapter_config.json", "README.md", RECORD}
    assert_is_mean(PeftModel.from_pretrained(make_llama(), tmp_path / "final"), states)
    assert verify(tmp_path / "final").verified


@pytest.mark.parametrize("ending", ["adapter_model.safetensors", ""])
def test_adapters_are_found_one_by_one_and_by_patterns(tmp_path: Path, ending: str) -> None:
    """Folders or their files, in the order of the steps and not of the names."""
    save_run(
        make_adapted(), tmp_path / "run", lambda one, folder, _: one.save_pretrained(folder), 10
    )
    patterns = [f"{tmp_path}/run/checkpoint-*/{ending}"]
    report = average(patterns, tmp_path / "final", last=2)
    assert [one.epoch for one in report.plan.checkpoints] == [90, 100]


def test_a_run_of_the_trainer_with_an_adapter(tmp_path: Path) -> None:
    """The mean of the four adapters that were saved in training, without the training's state."""
    train(tmp_path / "run", make_adapted())
    report = average(tmp_path / "run", tmp_path / "final")
    assert [one.epoch for one in report.plan.checkpoints] == [2, 4, 6, 8]
    assert report.plan.files
    assert {one.name for one in report.plan.files.left_out} == STATE
    saved = [
        load_file(tmp_path / f"run/checkpoint-{k}/adapter_model.safetensors") for k in (2, 4, 6, 8)
    ]
    found = load_file(tmp_path / "final/adapter_model.safetensors")
    for name, values in found.items():
        exact = np.mean([state[name] for state in saved], axis=0, dtype=np.float64)
        assert np.array_equal(values, exact.astype(np.float32)), name
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path / "final")
    state = {name: value.numpy() for name, value in get_peft_model_state_dict(loaded).items()}
    assert state.keys() == found.keys()
    assert all(np.array_equal(state[name], found[name]) for name in found)


def test_another_adapter_beside_the_default_one_is_averaged_by_itself(tmp_path: Path) -> None:
    """PEFT saves it in a folder within the checkpoint's; no half of it is copied."""
    model = make_adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False))
    states = save_run(model, tmp_path / "run", lambda one, folder, _: one.save_pretrained(folder))
    report = average(tmp_path / "run", tmp_path / "final")
    assert any("other adapters are averaged by themselves: other/" in one for one in report.notes)
    average(f"{tmp_path}/run/*/other", tmp_path / "final/other")
    assert {path.name for path in (tmp_path / "final/other").iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        RECORD,
    }
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path / "final", adapter_name="default")
    loaded.load_adapter(tmp_path / "final/other", "other")
    assert_is_mean(loaded, states)


def test_adapters_without_a_default_one_need_a_pattern(tmp_path: Path) -> None:
    """Each has a folder of its own in every checkpoint."""
    model = get_peft_model(make_llama(), LoraConfig(r=2, target_modules=["q_proj"]), "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["v_proj"]))
    save_run(model, tmp_path / "run", lambda one, folder, _: one.save_pretrained(folder))
    with pytest.raises(CheckpointError, match=r"several models each.*/\*/a' or '.*/\*/b'"):
        average(tmp_path / "run", tmp_path / "final")
    average(f"{tmp_path}/run/*/a", tmp_path / "final")
