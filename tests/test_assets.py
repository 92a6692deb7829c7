"""Vocabularies, tokenizers and names of classes: what gives rows of tensors their meaning.

Files are written by safetensors, h5py and numpy, and expected values computed by numpy.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from polyak_cli import average, check, diff, inspect, plan
from polyak_cli.errors import FormatError, MismatchError
from polyak_cli.formats import wire
from polyak_cli.formats.beside import read_assets_beside
from tests.command import polyak
from tests.counting import count_reads

TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2}, "merges": ["a b"]},
}
OTHER = TOKENIZER | {"model": {"type": "BPE", "vocab": {"a": 0, "c": 1, "b": 2}, "merges": []}}


def save(folder: Path, value: float, metadata: dict[str, str] | None = None) -> Path:
    """Write a checkpoint folder as Transformers does."""
    folder.mkdir(parents=True)
    tensors = {"embed.weight": np.full((3, 2), value, np.float32)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt", **(metadata or {})})
    return folder


def write_run(
    folder: Path, name: str, contents: list[Any], form: Callable[[Any], str] = json.dumps
) -> Path:
    """Write checkpoint-100, -200, ... with a file beside each model; None leaves it out."""
    for number, content in enumerate(contents, start=1):
        made = save(folder / f"checkpoint-{number}00", number)
        if content is not None:
            (made / name).write_text(form(content))
    return folder


def assert_refused(run: Path, name: str, place: str = "checkpoint-100") -> None:
    """`average` refuses and names file, asset and way out; `check` reports the same."""
    with pytest.raises(MismatchError) as raised:
        plan(run)
    text = str(raised.value)
    assert f"'{name}'" in text
    assert place in text
    assert "--allow other-assets" in text
    assert "\n" not in text
    found = check(run)
    kinds = {p.kind for one in found.checkpoints for p in one.problems}
    assert kinds == {"other assets"}
    assert any(f"'{name}'" in p.text for p in found.all_problems)


@pytest.mark.parametrize(
    ("name", "one", "other", "form"),
    [
        ("tokenizer.json", TOKENIZER, OTHER, json.dumps),
        ("vocab.json", {"a": 0, "b": 1}, {"b": 0, "a": 1}, json.dumps),
        ("added_tokens.json", {"<x>": 3}, {"<y>": 3}, json.dumps),
        ("vocab.txt", "a\nb\nc\n", "a\nc\nb\n", str),
        ("merges.txt", "#version: 0.2\na b\nb c\n", "#version: 0.2\nb c\na b\n", str),
        ("spiece.model", "\x0a\x05abc", "\x0a\x05acb", str),
        ("tokenizer.model", "\x0a\x05abc", "\x0a\x05acb", str),
        ("sentencepiece.bpe.model", "\x0a\x05abc", "\x0a\x05acb", str),
        ("tokens.txt", "<blk> 0\na 1\n", "<blk> 0\nb 1\n", str),
        ("dict.en.txt", "the 10\nof 9\n", "of 10\nthe 9\n", str),
        ("labels.txt", "cat\ndog\n", "dog\ncat\n", str),
        ("class_names.json", ["cat", "dog"], ["dog", "cat"], json.dumps),
    ],
)
def test_another_tokenizer_beside_the_weights_is_refused(
    tmp_path: Path, name: str, one: Any, other: Any, form: Any
) -> None:
    """Row 2 of an embedding is another word there; the file is named, and how to go on."""
    run = write_run(tmp_path / "run", name, [one, other, other], form)
    assert_refused(run, name)
    assert len(plan(run, last=2).checkpoints) == 2


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        # What a tokenizer cut and padded last is kept in its file, and changes with every call.
        ("tokenizer.json", [TOKENIZER, TOKENIZER | {"truncation": {"max_length": 9}}]),
        ("tokenizer.json", [TOKENIZER, dict(reversed(TOKENIZER.items()))]),
        ("vocab.json", [{"a": 0, "b": 1}, {"b": 1, "a": 0}]),
        ("tokenizer_config.json", [{"name_or_path": "/a"}, {"name_or_path": "/b"}]),
        ("trainer_state.json", [{"labels": 1}, {"labels": 2}]),
        ("config.json", [{"torch_dtype": "float32"}, {"dtype": "float32"}]),
    ],
)
def test_what_has_no_meaning_for_tensors_may_differ(
    tmp_path: Path, name: str, contents: list[Any]
) -> None:
    """Paths, versions, the order of keys and the last batch's padding are no reason to refuse."""
    run = write_run(tmp_path / "run", name, contents)
    report = average(run, tmp_path / "o.safetensors")
    found = load_file(report.output)["embed.weight"]
    np.testing.assert_array_equal(found, np.full((3, 2), 1.5, np.float32))
    assert check(run).healthy


def test_line_endings_have_no_meaning(tmp_path: Path) -> None:
    """A vocabulary that went through a system with other line endings is the same."""
    run = write_run(tmp_path / "run", "vocab.txt", [None, None])
    (run / "checkpoint-100" / "vocab.txt").write_bytes(b"a\r\nb\r\n")
    (run / "checkpoint-200" / "vocab.txt").write_bytes(b"a\nb\n")
    assert check(run).healthy
    assert plan(run).checkpoints


def test_names_of_classes_in_a_configuration_are_compared(tmp_path: Path) -> None:
    """Row 0 of a classifier is another class where `id2label` differs."""
    one = {"model_type": "bert", "id2label": {"0": "cat", "1": "dog"}}
    other = {"model_type": "bert", "id2label": {"0": "dog", "1": "cat"}}
    assert_refused(write_run(tmp_path / "run", "config.json", [one, other]), "config.json/id2label")


GPT2 = {"model_type": "gpt2", "n_embd": 8, "n_head": 4, "layer_norm_epsilon": 1e-5}
LLAMA = {"architectures": ["LlamaForCausalLM"], "rope_scaling": None, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("name", "key", "one", "other", "ours", "theirs"),
    [
        ("config.json", "n_head", GPT2, GPT2 | {"n_head": 2}, "4", "2"),
        ("config.json", "n_head", {"n_head": 4}, {"n_head": 2}, "4", "2"),
        ("config.json", "rope_theta", LLAMA, LLAMA | {"rope_theta": 5e5}, "10000", "500000"),
        (
            *("config.json", "rope_scaling", LLAMA),
            *(LLAMA | {"rope_scaling": {"factor": 8.0}}, "null", "{...}"),
        ),
        (
            *("config.json", "text_config.hidden_act"),
            {"model_type": "x", "text_config": {"hidden_act": "gelu"}},
            {"model_type": "x", "text_config": {"hidden_act": "relu"}},
            *('"gelu"', '"relu"'),
        ),
        ("adapter_config.json", "use_dora", {"r": 2}, {"r": 2, "use_dora": True}, "false", "true"),
        ("adapter_config.json", "peft_type", {"peft_type": "IA3"}, {"peft_type": "X"}, "IA3", "X"),
    ],
)
def test_another_configuration_is_refused_with_both_values(
    tmp_path: Path, name: str, key: str, one: Any, other: Any, ours: str, theirs: str
) -> None:
    """Tensors of 4 heads and of 2 have one shape; key, values and folders are in the message."""
    run = write_run(tmp_path / "run", name, [one, other, other])
    assert_refused(run, f"{name}/{key}")
    with pytest.raises(MismatchError) as raised:
        plan(run)
    said = str(raised.value)
    assert re.search(f"is {re.escape(ours)}|is .{ours}.,", said), said
    assert re.search(rf"that of \S*checkpoint-[23]00\S* is .?{re.escape(theirs)}", said), said
    assert len(plan(run, last=2).checkpoints) == 2
    assert any("(--allow other-assets)" in n for n in plan(run, allow=["other-assets"]).notes)


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("config.json", GPT2, GPT2 | {"transformers_version": "5.0.0", "use_cache": False}),
        ("config.json", GPT2 | {"_name_or_path": "/a"}, GPT2 | {"_name_or_path": "/b"}),
        ("config.json", GPT2 | {"attn_pdrop": 0.1}, GPT2 | {"attn_pdrop": 0}),
        ("config.json", LLAMA, LLAMA | {"rope_theta": 10000}),
        ("config.json", GPT2, GPT2 | {"n_inner": None, "pruned_heads": {}}),
        ("adapter_config.json", {"r": 2}, {"r": 2, "use_dora": False, "peft_version": "0.18"}),
        (
            *("adapter_config.json", {"r": 2, "target_modules": ["q", "v"]}),
            {"r": 2, "target_modules": ["v", "q"], "inference_mode": True, "lora_dropout": 0.1},
        ),
    ],
)
def test_keys_that_change_no_meaning_are_not_compared(
    tmp_path: Path, name: str, one: Any, other: Any
) -> None:
    """Versions, paths, dropout, and what a newer library writes as its default say nothing."""
    run = write_run(tmp_path / "run", name, [one, other])
    assert not any(f"{name}/" in note for note in plan(run).notes)
    assert check(run).healthy


@pytest.mark.parametrize(
    ("name", "one", "other", "key"),
    [
        ("config.json", GPT2 | {"pad_token_id": 0}, GPT2 | {"pad_token_id": 7}, "pad_token_id"),
        ("config.json", {"epoch": 1}, {"epoch": 2}, "epoch"),
        ("config.json", {"max_grad_norm": 1}, {"max_grad_norm": 2}, "max_grad_norm"),
        ("config.json", GPT2, GPT2 | {"scale_attn_weights": True}, "scale_attn_weights"),
        (
            *("adapter_config.json", {"base_model_name_or_path": "/a"}),
            *({"base_model_name_or_path": "org/a"}, "base_model_name_or_path"),
        ),
    ],
)
def test_keys_that_may_change_within_a_run_are_noted(
    tmp_path: Path, name: str, one: Any, other: Any, key: str
) -> None:
    """Special tokens, the base model's path, unknown files and keys of newer versions."""
    run = write_run(tmp_path / "run", name, [one, other])
    for notes in (plan(run).notes, check(run).notes):
        assert any(f"{name}/{key}" in note and "checkpoint-" in note for note in notes), notes
    assert check(run).healthy


def test_a_configuration_with_very_many_keys_is_compared_as_a_whole(tmp_path: Path) -> None:
    """A hostile file does not make the answer of the child large."""
    one = GPT2 | {f"k{n}": n for n in range(5000)}
    run = write_run(tmp_path / "run", "config.json", [one, one | {"k4999": 0}])
    assert_refused(run, "config.json")


def test_a_tokenizer_that_only_some_checkpoints_have_is_said(tmp_path: Path) -> None:
    """Many programs save it once: nothing contradicts, but nothing is known either."""
    run = write_run(tmp_path / "run", "tokenizer.json", [TOKENIZER, None, TOKENIZER])
    for notes in (plan(run).notes, check(run).notes):
        assert any("checkpoint-200" in n and "tokenizer.json" in n for n in notes), notes
    assert check(run).healthy


def test_files_of_one_folder_belong_to_all_checkpoints_in_it(tmp_path: Path) -> None:
    """There is nothing to compare, and nothing is said."""
    for number in (1, 2):
        save_file({"w": np.full(3, number, np.float32)}, tmp_path / f"m_{number}.safetensors")
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    assert not any("vocab" in note for note in plan(tmp_path).notes)


def test_the_odd_one_is_named_wherever_it_stands(tmp_path: Path) -> None:
    """Of three like checkpoints and a foreign one, the foreign one is blamed, also the last."""
    for odd in range(4):
        contents = ["b\na\n" if k == odd else "a\nb\n" for k in range(4)]
        run = write_run(tmp_path / f"run{odd}", "vocab.txt", contents, str)
        with pytest.raises(MismatchError) as raised:
            plan(run)
        assert f"checkpoint-{odd + 1}00/model.safetensors: 'vocab.txt'" in str(raised.value)
        assert ("--last" in str(raised.value)) == (odd < 2)


def test_those_without_an_asset_hide_no_difference(tmp_path: Path) -> None:
    """Two different vocabularies are refused also where most checkpoints have none."""
    contents = ["a\nb\n", None, None, "b\na\n", None]
    run = write_run(tmp_path / "run", "vocab.txt", contents, str)
    with pytest.raises(MismatchError, match=r"checkpoint-100.*'vocab.txt'.*checkpoint-400"):
        plan(run)


def test_allowed_assets_are_recorded_and_verified(tmp_path: Path) -> None:
    """`--allow other-assets` averages, says whose is carried, and `verify` recomputes with it."""
    run = write_run(tmp_path / "run", "vocab.txt", ["a\nb\n", "b\na\n", "a\nb\n"], str)
    done = polyak("average", "run", "-o", "o.safetensors", cwd=tmp_path)
    assert done.returncode == 3
    assert done.stdout == ""
    assert "checkpoint-200" in done.stderr
    arguments = ["average", "run", "-o", "o.safetensors", "--allow", "other-assets"]
    done = polyak(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "newest one's is copied" in done.stderr
    found = load_file(tmp_path / "o.safetensors")["embed.weight"]
    np.testing.assert_array_equal(found, np.full((3, 2), 2, np.float32))
    (shown,) = inspect([tmp_path / "o.safetensors"])
    assert shown.provenance["options"]["allow"] == ["other-assets"]
    assert polyak("verify", "o.safetensors", "--source", "run", cwd=tmp_path).returncode == 0
    assert plan(run, on_unhealthy="fail", allow=["other-assets"]).checkpoints


def test_a_checkpoint_with_other_assets_can_be_skipped(tmp_path: Path) -> None:
    """`--on-unhealthy skip` leaves the minority out, and averages the rest."""
    run = write_run(tmp_path / "run", "vocab.txt", ["a\nb\n", "b\na\n", "a\nb\n"], str)
    report = average(run, tmp_path / "o.safetensors", on_unhealthy="skip")
    found = load_file(report.output)["embed.weight"]
    np.testing.assert_array_equal(found, np.full((3, 2), 2, np.float32))
    assert [one.path.name for one in report.plan.skipped] == ["checkpoint-200"]


def test_a_vocabulary_in_the_metadata_is_compared(tmp_path: Path) -> None:
    """A text of a safetensors header may be the list of classes."""
    save(tmp_path / "run" / "checkpoint-1", 1, {"class_names": "cat,dog", "step": "1"})
    save(tmp_path / "run" / "checkpoint-2", 2, {"class_names": "dog,cat", "step": "2"})
    assert_refused(tmp_path / "run", "class_names", "checkpoint-1")
    one, other = sorted((tmp_path / "run").iterdir())
    assert diff(one, other).mismatches == ("'class_names' differs",)


def write_h5(path: Path, value: float, words: Any) -> Path:
    """Write a whole model as Keras does, with a configuration of one lookup layer."""
    layers = [
        {"class_name": "StringLookup", "config": {"name": "words", "vocabulary": words}},
        {"class_name": "Embedding", "config": {"name": "embedding"}},
    ]
    with h5py.File(path, "w") as file:
        config = {"class_name": "Sequential", "config": {"name": "s", "layers": layers}}
        file.attrs["model_config"] = json.dumps(config)
        group = file.create_group("model_weights")
        group.attrs["layer_names"] = [b"embedding"]
        layer = group.create_group("embedding")
        layer.attrs["weight_names"] = [b"embeddings"]
        layer["embeddings"] = np.full((3, 2), value, np.float32)
    return path


def test_a_vocabulary_in_the_model_configuration_is_compared(tmp_path: Path) -> None:
    """The layer is named; a vocabulary that is the path of a file is only another configuration."""
    for name, one, other in (
        ("lists", ["a", "b"], ["b", "a"]),
        ("paths", "/a/words.txt", "/b/words.txt"),
    ):
        (tmp_path / name).mkdir()
        write_h5(tmp_path / name / "m_1.h5", 1, one)
        write_h5(tmp_path / name / "m_2.h5", 2, other)
    assert_refused(tmp_path / "lists", "model_config/layers/string_lookup/vocabulary", "m_1.h5")
    with pytest.raises(MismatchError, match="of layer 'words'"):
        plan(tmp_path / "lists")
    assert any("configuration differs" in note for note in plan(tmp_path / "paths").notes)


def test_a_configuration_without_end_is_no_obstacle(tmp_path: Path) -> None:
    """Nesting that JSON cannot follow, and what is no JSON, has no vocabulary."""
    for number, config in ((1, "[" * 200_000), (2, "no json")):
        path = write_h5(tmp_path / f"m_{number}.h5", number, None)
        with h5py.File(path, "a") as file:
            file.attrs["model_config"] = config
    assert plan(tmp_path).checkpoints


def test_files_too_large_to_be_parsed_are_compared_to_their_end(tmp_path: Path) -> None:
    """A vocabulary above the bound, with another last word, is another vocabulary."""
    for name, last in (("a", b"one"), ("b", b"two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.txt").write_bytes(b"a word\n" * (33 << 17) + last)
    one, other = read_assets_beside([tmp_path / "a", tmp_path / "b"])
    assert one["vocab.txt"] != other["vocab.txt"]


@pytest.mark.parametrize("damage", ["[", "{"])
def test_damaged_files_are_compared_byte_by_byte(tmp_path: Path, damage: str) -> None:
    """What cannot be parsed hides neither its own difference nor that of the files beside it."""
    for count, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(damage * (100_000 + count))
        (tmp_path / name / "vocab.txt").write_text(name)
    one, other = read_assets_beside([tmp_path / "a", tmp_path / "b"])
    assert {*one} == {*other} == {"tokenizer.json", "vocab.txt"}
    assert one["tokenizer.json"] != other["tokenizer.json"]


def test_files_beside_that_mean_harm_are_no_obstacle(tmp_path: Path) -> None:
    """Damaged, endless and unreadable files are compared byte by byte, or not at all."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text("[" * 100_000)
        (tmp_path / name / "merges.txt").symlink_to("/dev/zero")
        (tmp_path / name / "vocab.json").mkdir()
        os.mkfifo(tmp_path / name / "vocab.txt")
    with (tmp_path / "b" / "vocab.bpe.txt").open("wb") as file:
        file.truncate(1 << 40)
    one, other = read_assets_beside([tmp_path / "a", tmp_path / "b"])
    assert one["tokenizer.json"] == other["tokenizer.json"]
    assert {*one} == {"tokenizer.json"}
    assert {*other} == {"tokenizer.json", "vocab.bpe.txt"}


@pytest.mark.parametrize("sent", [7, {"a": 1}, {"a": ["x"]}, {"a": ["x", 7]}])
def test_digests_of_another_form_are_refused(sent: Any) -> None:
    """A child that reads a hostile file may have been taken over by it."""
    with pytest.raises(FormatError, match="invalid digests"):
        wire.unpack_assets(sent, "folder")


def test_a_plan_with_tokenizers_still_reads_no_tensor(tmp_path: Path) -> None:
    """Only headers and the small files beside the weights are read."""
    run = write_run(tmp_path / "run", "vocab.txt", ["a\n", "a\n"], str)
    for folder in run.iterdir():
        save_file({"w": np.zeros(100_000, np.float32)}, folder / "model.safetensors")
    with count_reads(tmp_path) as log:
        plan(run)
    assert any(read.path.endswith("vocab.txt") for read in log.reads())
    assert not any(
        read.overlaps(4096, 400_000) for read in log.reads() if read.path.endswith("safetensors")
    )
