"""Adapters of PEFT, averaged into folders that it loads onto the base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, get_peft_model

from polyak_cli import average, verify
from tests.hf.models import RECORD, assert_is_mean, make_llama, save_run


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
