"""Tiny models of Transformers, made from a configuration, and what their averages have to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

State = Mapping[str, npt.NDArray[Any]]
WORDS = ("[PAD]", "[UNK]", "one", "two", "three", "four", "five", "six")
RECORD = "polyak_provenance.json"


def make_tokenizer() -> Any:
    """Return a tokenizer of eight words."""
    words = Tokenizer(WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def make_llama(*, tied: bool = True) -> Any:
    """Return a language model of two layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def copy_state(model: Any) -> State:
    """Return the parameters and buffers of a model as arrays of their own."""
    return {
        name: value.detach().clone().float().numpy() for name, value in model.state_dict().items()
    }


def save_run(
    model: Any, run: Path, save: Callable[[Any, Path, int], None], count: int = 4
) -> list[State]:
    """Save a model as ``checkpoint-10``, ``-20``, ... with a little noise each; return its states.

    Four by default: a quarter is exact in binary, so the mean of numpy has the same bits.

    Every tensor moves, so that a mean of the wrong checkpoints would be seen.
    """
    states = []
    for number in range(1, count + 1):
        with torch.no_grad():
            for value in model.parameters():
                if value.requires_grad:
                    value.add_(torch.randn_like(value) * 0.05)
        folder = run / f"checkpoint-{10 * number}"
        folder.mkdir(parents=True)
        save(model, folder, number)
        states.append(copy_state(model))
    return states


def mean(states: Sequence[State]) -> State:
    """Return the mean of states, computed by numpy alone."""
    return {
        name: np.asarray(np.mean([state[name] for state in states], axis=0, dtype=np.float64))
        for name in states[-1]
    }


def assert_is_mean(model: Any, states: Sequence[State]) -> None:
    """Compare all parameters of a loaded model with the mean of the states that were saved."""
    found, expected = copy_state(model), mean(states)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert np.array_equal(found[name], values.astype(np.float32)), name
