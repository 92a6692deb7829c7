"""Models of sentence-transformers, whose modules have weights in folders of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer
from transformers import BertConfig, BertModel

from polyak_cli import FormatError, average, check, diff, inspect, verify
from polyak_cli.pipeline.watching import watch
from tests.hf.models import RECORD, WORDS, assert_is_mean, make_tokenizer, mean, save_run


def make_embedder(folder: Path) -> Any:
    """Return a model of three modules, of which the first and the last have weights."""
    torch.manual_seed(0)
    settings = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    BertModel(settings).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    transformer = Transformer(str(folder))
    pooling = Pooling(16)
    dense = Dense(16, 8, activation_function=torch.nn.Tanh())
    return SentenceTransformer(modules=[transformer, pooling, dense], device="cpu")


def save(model: Any, folder: Path, _: int) -> None:
    """Save a checkpoint as the trainer does, with a state that does not belong to the model."""
    model.save_pretrained(str(folder))
    torch.save({}, folder / "optimizer.pt")


def test_all_modules_are_averaged(tmp_path: Path) -> None:
    """Dense's weights too; the folder loads, and embeds as the mean of the parameters does."""
    model = make_embedder(tmp_path / "base")
    states = save_run(model, tmp_path / "run", save)
    report = average(tmp_path / "run", tmp_path / "final")
    assert {"2_Dense/linear.weight", "2_Dense/linear.bias"} <= set(report.plan.averaged)
    loaded = SentenceTransformer(str(tmp_path / "final"), device="cpu")
    assert_is_mean(loaded, states)
    assert loaded.encode("one two").shape == (8,)
    newest, final = tmp_path / "run/checkpoint-40", tmp_path / "final"
    names, copies = (
        {path.relative_to(folder) for path in folder.rglob("*")} for folder in (newest, final)
    )
    assert copies == names - {Path("optimizer.pt")} | {Path(RECORD)}
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/config.json", "README.md"):
        assert (newest / name).read_bytes() == (final / name).read_bytes()
    assert verify(final).verified


def test_modules_of_both_formats_get_another_type(tmp_path: Path) -> None:
    """One in safetensors and one in PyTorch's own format: each tensor is the mean, rounded once."""

    def save_both(model: Any, folder: Path, step: int) -> None:
        save(model, folder, step)
        dense = folder / "2_Dense"
        torch.save(load_file(dense / "model.safetensors"), dense / "pytorch_model.bin")
        (dense / "model.safetensors").unlink()

    states = save_run(make_embedder(tmp_path / "base"), tmp_path / "run", save_both)
    average(tmp_path / "run", tmp_path / "final", dtype="float16")
    dense = torch.load(tmp_path / "final/2_Dense/pytorch_model.bin", weights_only=True)
    for name, value in (dense | load_file(tmp_path / "final/model.safetensors")).items():
        (key,) = [key for key in states[0] if key.endswith(name)]
        assert value.dtype == torch.float16
        assert (value.numpy() == mean(states)[key].astype("f2")).all(), name
    SentenceTransformer(str(tmp_path / "final"), device="cpu").encode("one two")


def test_the_other_commands_know_such_folders(tmp_path: Path) -> None:
    """Also where the final model lies beside its checkpoints, as `save_pretrained` leaves it."""
    run = tmp_path / "run"
    model = make_embedder(tmp_path / "base")
    save_run(model, run, save)
    model.save_pretrained(str(run))
    assert not check(run).problems
    (inspected,) = inspect([run / "checkpoint-10"])
    assert inspected.format == "sentence-transformers"
    found = diff(run / "checkpoint-10", run / "checkpoint-20")
    assert any(one.name == "2_Dense/linear.weight" for one in found.tensors)
    assert len([*watch(run, tmp_path / "kept", once=True, interval=0.05)]) == 1
    assert SentenceTransformer(str(tmp_path / "kept"), device="cpu").encode("one").shape == (8,)
    average(run, tmp_path / "last", last=2)
    average(run, tmp_path / "last", force=True, verify=True)
    assert len([*(tmp_path / "last").rglob("*.safetensors")]) == 2


@pytest.mark.parametrize(
    "path", ["../checkpoint-10/2_Dense", "/etc", "2_Dense/..", "a\\b", 3, None]
)
def test_modules_elsewhere_are_refused(tmp_path: Path, path: Any) -> None:
    """A path that leads out of the folder is not followed."""
    run = tmp_path / "run"
    save_run(make_embedder(tmp_path / "base"), run, save, 2)
    file = run / "checkpoint-20/modules.json"
    modules = json.loads(file.read_text())
    modules[2]["path"] = path
    file.write_text(json.dumps(modules))
    with pytest.raises(FormatError, match=r"modules\.json"):
        average(run, tmp_path / "final")
    assert not (tmp_path / "final").exists()
