"""The rows of the README's table whose files Hugging Face's libraries write."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM

from tests.hf import test_bin as bins
from tests.hf import test_sentence_transformers as sentences
from tests.hf.models import assert_is_mean, make_llama, save_run
from tests.hf.test_peft import make_adapted
from tests.test_front_door import HUGGING_FACE, run_row


def test_the_row_of_adapters_runs(tmp_path: Path) -> None:
    """PEFT loads the mean of the adapters that it saved."""
    states = save_run(
        make_adapted(), tmp_path / "run", lambda one, folder, _: one.save_pretrained(folder)
    )
    output = run_row("PEFT adapters, `checkpoint-500/adapter_model.safetensors`", tmp_path)[-1]
    assert_is_mean(PeftModel.from_pretrained(make_llama(), tmp_path / output), states)


def test_the_row_of_state_dicts_runs(tmp_path: Path) -> None:
    """Transformers loads the mean of the shards."""
    states = save_run(make_llama(tied=False), tmp_path / "run", bins.save_shards)
    output = tmp_path / run_row(HUGGING_FACE, tmp_path)[-1]
    assert_is_mean(AutoModelForCausalLM.from_pretrained(output), states)


def test_the_row_of_modules_runs(tmp_path: Path) -> None:
    """sentence-transformers loads the mean of all modules."""
    model = sentences.make_embedder(tmp_path / "base")
    states = save_run(model, tmp_path / "run", sentences.save)
    output = run_row("sentence-transformers folders with `modules.json`", tmp_path)[-1]
    assert_is_mean(SentenceTransformer(str(tmp_path / output), device="cpu"), states)
