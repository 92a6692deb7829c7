"""Vocabularies and lists of classes that programs keep beside a state dict in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from polyak_cli import average, check, plan
from polyak_cli.errors import MismatchError


def save_run(folder: Path, one: Any, other: Any) -> Path:
    """Save two checkpoints, each with something beside the state dict."""
    folder.mkdir()
    for number, beside in enumerate((one, other), start=1):
        state = {"embed.weight": torch.full((3, 2), float(number))}
        torch.save({"model": state, "epoch": number} | beside, folder / f"m_{number}.pt")
    return folder


@pytest.mark.parametrize(
    ("one", "other", "name"),
    [
        ({"vocab": ["a", "b"]}, {"vocab": ["b", "a"]}, "vocab"),
        ({"char2idx": {"a": 0, "b": 1}}, {"char2idx": {"a": 1, "b": 0}}, "char2idx"),
        ({"idx_to_class": {0: "a", 1: "b"}}, {"idx_to_class": {0: "b", 1: "a"}}, "idx_to_class"),
        (
            {"hyper_parameters": {"class_names": ("a", "b")}},
            {"hyper_parameters": {"class_names": ("b", "a")}},
            "hyper_parameters/class_names",
        ),
    ],
)
def test_another_vocabulary_in_the_file_is_refused(
    tmp_path: Path, one: Any, other: Any, name: str
) -> None:
    """A row of the embedding is another word; `check` reports the same."""
    run = save_run(tmp_path / "run", one, other)
    with pytest.raises(MismatchError, match=rf"m_1.pt: '{name}' differs from that of .*m_2.pt"):
        plan(run)
    assert [problem.kind for problem in check(run).all_problems] == ["other assets"]
    report = average(run, tmp_path / "o.pt", allow=["other-assets"])
    found = torch.load(report.output, weights_only=True)
    assert torch.equal(found["model"]["embed.weight"], torch.full((3, 2), 1.5))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"vocab": {"a": 0, "b": 1}}, {"vocab": {"b": 1, "a": 0}}),
        ({"tokens": 1000, "labels": [0, 1]}, {"tokens": 2000, "labels": [1, 0]}),
        ({"args": ["--out", "a"]}, {"args": ["--out", "b"]}),
    ],
)
def test_what_is_no_vocabulary_may_differ(tmp_path: Path, one: Any, other: Any) -> None:
    """Counters, arguments and the order of a dictionary's keys have no meaning for rows."""
    assert plan(save_run(tmp_path / "run", one, other)).checkpoints
