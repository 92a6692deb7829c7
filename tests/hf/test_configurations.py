"""Models that Transformers saves with one set of shapes and another meaning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from polyak_cli import MismatchError, average, check


def save_heads(folder: Path, heads: int, seed: int = 0, dropout: float = 0.1) -> GPT2LMHeadModel:
    """Save a GPT-2 of so many heads; its shapes and values do not depend on them."""
    torch.manual_seed(seed)
    config = GPT2Config(
        n_embd=8, n_head=heads, n_layer=1, vocab_size=16, n_positions=8, attn_pdrop=dropout
    )
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder)
    return model


def test_a_model_with_other_heads_is_refused(tmp_path: Path) -> None:
    """The same tensors compute something else with 2 heads than with 4; folders are named."""
    run = tmp_path / "run"
    models = [save_heads(run / f"checkpoint-{k + 1}0", heads) for k, heads in enumerate((2, 4, 4))]
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    words = torch.arange(8)[None]
    assert not torch.allclose(models[0](words).logits, models[1](words).logits)
    expected = r"checkpoint-10/\S+ 'config.json/n_head' is 2, but that of \S+checkpoint-30/\S+ is 4"
    with pytest.raises(MismatchError, match=expected):
        average(run, tmp_path / "final")
    assert "other assets" in [problem.kind for problem in check(run).all_problems]
    assert not (tmp_path / "final").exists()


def test_models_with_another_dropout_are_averaged(tmp_path: Path) -> None:
    """A stage with more noise trains the same tensors."""
    first = save_heads(tmp_path / "run/checkpoint-10", 2).state_dict()
    second = save_heads(tmp_path / "run/checkpoint-20", 2, dropout=0.3).state_dict()
    average(tmp_path / "run", tmp_path / "final")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "final").state_dict()
    for name, value in found.items():
        torch.testing.assert_close(value, (first[name] + second[name]) / 2)
