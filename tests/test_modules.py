"""Folders of modules, as sentence-transformers saves them: the contract, without that library."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from polyak_cli import FormatError, MismatchError, PolyakError, average
from polyak_cli.formats import catalogue
from tests.contract import Contract, Tensors

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Router", "type": "sentence_transformers.models.Router"},
]
#: Where the second half of the tensors is: a module in a folder of a module.
INNER = "2_Router/query_0_Dense"


class TestModules(Contract):
    """Tensors in the folder itself and in that of a module; the output is such a folder."""

    suffix = ""

    @property
    def result(self) -> str:
        """A name without suffix, as that of a folder is."""
        return "_average"

    def write(self, path: Path, tensors: Tensors) -> None:
        """See `Contract.write`."""
        (path / INNER).mkdir(parents=True, exist_ok=True)
        (path / "modules.json").write_text(json.dumps(MODULES))
        names = sorted(tensors)
        for folder, held in ((path, names[::2]), (path / INNER, names[1::2])):
            save_file({name: tensors[name] for name in held}, folder / "model.safetensors")

    def read(self, path: Path) -> Tensors:
        """See `Contract.read`."""
        files = (path / "model.safetensors", path / INNER / "model.safetensors")
        return {name: values for file in files for name, values in load_file(file).items()}

    @pytest.mark.slow
    def test_a_truncated_file_is_refused_wherever_it_ends(self, tmp_path: Path) -> None:
        """Each part, and the list of modules."""
        paths, _ = self.write_run(tmp_path / "run", 2)
        for file in sorted(one for one in paths[0].rglob("*") if one.is_file()):
            whole = file.read_bytes()
            for length in {0, 1, 7, len(whole) - 1, *range(8, len(whole), len(whole) // 4)}:
                file.write_bytes(whole[:length])
                with pytest.raises(PolyakError, match="model_1"):
                    average(paths, tmp_path / "o")
            file.write_bytes(whole)
        assert os.listdir(tmp_path) == ["run"]


def write_pair(run: Path) -> list[Path]:
    """Write two checkpoints, and return their folders."""
    paths = [run / f"checkpoint-{k}" for k in (1, 2)]
    for k, path in enumerate(paths, start=1):
        TestModules().write(path, {"a": np.full(3, k, np.float32), "b": np.full(2, k, np.float32)})
    return paths


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[", "is a JSON file"),
        (b'[{"path": "x", "type": "y"}', "no list of modules"),
        (b'[{"path": 1, "type": "y"}]', "a module has no path"),
        (b'[{"path": "/x", "type": "y"}]', "expected one in the same folder"),
        (b'[{"path": "x/../../y", "type": "y"}]', "expected one in the same folder"),
        (b'[{"path": "gone", "type": "y"}]', "none of its modules has weights"),
        (b'[{"path": "model.safetensors", "type": "y"}]', "is not a folder"),
        (b'[{"path": "link", "type": "y"}]', "is not a folder"),
        (b'[{"path": "", "type": "y"}' + b', {"path": "", "type": "y"}' * 200 + b"]", "no list of"),
        (b'[{"path": "", "type": "y"}' + b"[" * 100_000, "no list of modules"),
    ],
)
def test_a_list_that_is_not_one_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    """What it names must be folders of the checkpoint."""
    paths = write_pair(tmp_path / "run")
    (paths[1] / "link").symlink_to("../checkpoint-1")
    (paths[1] / "modules.json").write_bytes(content)
    with pytest.raises(FormatError, match=expected):
        average(paths, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_folder_with_two_models_in_a_module_is_not_guessed_at(tmp_path: Path) -> None:
    """The error names both."""
    paths = write_pair(tmp_path / "run")
    save_file({"x": np.ones(3, np.float32)}, paths[1] / INNER / "adapter_model.safetensors")
    with pytest.raises(FormatError, match="either could be the weights"):
        average(paths, tmp_path / "o")


def test_weights_that_are_no_module_are_left_out(tmp_path: Path) -> None:
    """Another model in the folder is neither averaged nor copied, and the note says so."""
    paths = write_pair(tmp_path / "run")
    for path in paths:
        (path / "draft").mkdir()
        save_file({"x": np.ones(3, np.float32)}, path / "draft/model.safetensors")
        (path / "draft/config.json").write_text("{}")
    report = average(paths, tmp_path / "o")
    assert not (tmp_path / "o/draft/model.safetensors").exists()
    assert (tmp_path / "o/draft/config.json").exists()
    assert any("draft/model.safetensors" in note for note in report.notes)


def test_the_vocabulary_of_a_module_must_be_the_same(tmp_path: Path) -> None:
    """Each module may have a tokenizer of its own, in its folder."""
    paths = write_pair(tmp_path / "run")
    for k, path in enumerate(paths):
        (path / INNER / "vocab.txt").write_text("a\nb\n")
        (path / "vocab.txt").write_text("c\nd\n")
        (path / "2_Router/vocab.txt").write_text(f"{k}\n")  # of a folder without weights
    average(paths, tmp_path / "o")
    (paths[0] / INNER / "vocab.txt").write_text("b\na\n")
    with pytest.raises(MismatchError, match=rf"'{INNER}/vocab.txt' differs"):
        average(paths, tmp_path / "other")


def test_names_of_tensors_say_which_module_has_them(tmp_path: Path) -> None:
    """Those of the model in the folder itself stay as they are."""
    paths = write_pair(tmp_path / "run")
    assert average(paths, tmp_path / "o").plan.averaged == ("a", f"{INNER}/b")


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ({"model.safetensors", "pytorch_model.bin"}, ["model.safetensors"]),
        ({"pytorch_model.bin", "model.safetensors.index.json"}, ["model.safetensors.index.json"]),
        ({"pytorch_model.bin.index.json"}, ["pytorch_model.bin.index.json"]),
        ({"adapter_model.bin", "adapter_model.safetensors"}, ["adapter_model.safetensors"]),
        ({"model.safetensors", "pytorch_model_fsdp.bin"}, ["model.safetensors"]),
        ({"pytorch_model_fsdp.bin", "optimizer.bin"}, ["pytorch_model_fsdp.bin"]),
        ({"model.safetensors", "modules.json"}, ["modules.json"]),
        (
            {"adapter_model.bin", "model.safetensors"},
            ["model.safetensors", "adapter_model.bin"],
        ),
    ],
)
def test_what_opens_a_folder(names: set[str], chosen: list[Any]) -> None:
    """Of two forms of the same weights one is chosen; of two models, neither."""
    assert sorted(catalogue.choose_openers(names)) == sorted(chosen)
