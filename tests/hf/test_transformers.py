"""Runs of Transformers' Trainer and what its models save, averaged into folders that it loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from polyak_cli import average, plan, verify
from tests.command import polyak
from tests.hf.models import (
    RECORD,
    WORDS,
    assert_is_mean,
    make_llama,
    make_tokenizer,
    save_run,
)

STATE = {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin"}


def train(run: Path, model: Any) -> None:
    """Train a tiny model with the Trainer, which saves and evaluates it four times."""
    words = [{"input_ids": [2, 3, 4, 5], "labels": [2, 3, 4, 5]} for _ in range(8)]
    settings = TrainingArguments(
        str(run),
        max_steps=8,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        metric_for_best_model="eval_loss",
        load_best_model_at_end=True,
    )
    trainer = Trainer(
        model,
        settings,
        train_dataset=words,
        eval_dataset=words[:2],
        processing_class=make_tokenizer(),
    )
    trainer.train()
    trainer.save_model()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run with its final model."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(folder, make_llama())
    return folder


def test_a_run_of_the_trainer_becomes_a_model_that_loads(run: Path, tmp_path: Path) -> None:
    """The mean of its four checkpoints, with the tokenizer, and without the training's state."""
    done = polyak("average", run, "-o", "final", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    saved = [load_file(run / f"checkpoint-{k}/model.safetensors") for k in (2, 4, 6, 8)]
    found = load_file(tmp_path / "final/model.safetensors")
    for name, values in found.items():
        expected = np.mean([state[name] for state in saved], axis=0, dtype=np.float64)
        assert np.array_equal(values, expected.astype(np.float32)), name
        assert np.array_equal(model.state_dict()[name].numpy(), values), name
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final")
    assert tokenizer("one two three")["input_ids"] == [
        WORDS.index(w) for w in ("one", "two", "three")
    ]
    with torch.no_grad():
        assert model(torch.tensor([[2, 3]])).logits.isfinite().all()


def test_all_but_the_state_of_the_training_is_copied(run: Path, tmp_path: Path) -> None:
    """Whatever this version of the Trainer writes is either the model's or its state."""
    average(run, tmp_path / "final")
    newest = {path.name: path.read_bytes() for path in (run / "checkpoint-8").iterdir()}
    found = {path.name: path.read_bytes() for path in (tmp_path / "final").iterdir()}
    assert found.keys() == newest.keys() - STATE | {RECORD}
    weights = {"model.safetensors", RECORD}
    assert {n: b for n, b in found.items() if n not in weights} == {
        n: b for n, b in newest.items() if n not in STATE | weights
    }
    made = plan(run, tmp_path / "other").files
    assert made
    assert {one.name for one in made.left_out} == STATE
    assert verify(tmp_path / "final", sources=[run]).verified


def save_shards(model: Any, folder: Path, number: int) -> None:
    """Save in shards, which are smaller in later checkpoints."""
    model.save_pretrained(folder, max_shard_size=f"{10 - 2 * number}KB")


@pytest.mark.parametrize("tied", [True, False])
def test_shards_may_be_divided_differently(tmp_path: Path, tied: bool) -> None:
    """The output has the newest one's, and its index says so."""
    states = save_run(make_llama(tied=tied), tmp_path / "run", save_shards)
    shards = [
        len([*folder.glob("*.safetensors")]) for folder in sorted((tmp_path / "run").iterdir())
    ]
    assert len({*shards}) > 2
    average(tmp_path / "run", tmp_path / "final")
    assert_is_mean(AutoModelForCausalLM.from_pretrained(tmp_path / "final"), states)
    index = json.loads((tmp_path / "final/model.safetensors.index.json").read_text())
    newest = json.loads((tmp_path / "run/checkpoint-40/model.safetensors.index.json").read_text())
    assert index == newest
    assert verify(tmp_path / "final").verified


def test_half_precision_stays(tmp_path: Path) -> None:
    """A bfloat16 model's average is bfloat16, rounded once from the exact mean."""
    model = make_llama().to(torch.bfloat16)
    states = save_run(model, tmp_path / "run", lambda one, folder, _: one.save_pretrained(folder))
    average(tmp_path / "run", tmp_path / "final")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    for name, value in loaded.state_dict().items():
        exact = np.mean([state[name] for state in states], axis=0, dtype=np.float64)
        assert torch.equal(value, torch.from_numpy(exact).to(torch.bfloat16)), name


def test_the_best_are_those_of_the_trainers_state(run: Path, tmp_path: Path) -> None:
    """By the metric that the Trainer was given, read from what it wrote."""
    chosen = plan(run, tmp_path / "best", best=2).checkpoints
    state = json.loads((run / "checkpoint-8/trainer_state.json").read_text())
    losses = {one["step"]: one["eval_loss"] for one in state["log_history"] if "eval_loss" in one}
    expected = sorted(sorted(losses, key=lambda step: losses[step])[:2])
    assert [(one.epoch, one.metric) for one in chosen] == [(k, losses[k]) for k in expected]
    assert f"checkpoint-{state['best_global_step']}" in {one.path.name for one in chosen}
