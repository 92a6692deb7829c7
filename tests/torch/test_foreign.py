"""What PyTorch writes besides state dicts is named as what it is, with what to do."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from polyak_cli import average, check, inspect
from polyak_cli.errors import PolyakError


def save_script(path: Path) -> None:
    """Save a TorchScript archive."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(path))


def save_program(path: Path) -> None:
    """Save a program of torch.export."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
        torch.export.save(program, path)


def save_legacy(path: Path) -> None:
    """Save a state dict as PyTorch did before 1.6."""
    torch.save({"w": torch.ones(3)}, path, _use_new_zipfile_serialization=False)


FILES: list[tuple[str, Callable[[Path], Any], str, str]] = [
    ("m.pt", save_script, "TorchScript archive", "torch.jit.load"),
    ("m.pt", lambda path: torch.save(nn.Linear(2, 2), path), "whole model", "state_dict()"),
    ("m.pt2", save_program, "torch.export", "average the checkpoints"),
    ("m.pth", save_legacy, "in the format before PyTorch 1.6", "save it again with"),
    (
        "m.pt",
        lambda path: path.write_bytes(pickle.dumps({"w": 1})),
        "pickle",
        "if you trust its source",
    ),
]


@pytest.mark.parametrize(("name", "save", "what", "advice"), FILES)
def test_what_is_no_state_dict_is_named(
    tmp_path: Path, name: str, save: Callable[[Path], Any], what: str, advice: str
) -> None:
    """`average`, `inspect` and `check` say the same."""
    path = tmp_path / name
    save(path)
    said = [problem.text for problem in check([path]).all_problems]
    for call in (lambda: average([path], tmp_path / "o.pt"), lambda: list(inspect([path]))):
        with pytest.raises(PolyakError) as raised:
            call()
        said.append(str(raised.value))
    assert len(said) == 3
    for text in said:
        assert text.startswith(f"{path}: "), text
        assert what in text
        assert advice in text
