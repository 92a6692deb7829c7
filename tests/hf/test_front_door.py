"""The rows of the README's table whose files Hugging Face's libraries write."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel

from tests.hf.models import assert_is_mean, make_llama, save_run
from tests.hf.test_peft import make_adapted
from tests.test_front_door import run_row


def test_the_row_of_adapters_runs(tmp_path: Path) -> None:
    """PEFT loads the mean of the adapters that it saved."""
    states = save_run(
        make_adapted(), tmp_path / "run", lambda one, folder, _: one.save_pretrained(folder)
    )
    output = run_row("PEFT adapters, `checkpoint-500/adapter_model.safetensors`", tmp_path)[-1]
    assert_is_mean(PeftModel.from_pretrained(make_llama(), tmp_path / output), states)
