"""The README: short, with a picture, and a table whose commands run on files of other libraries."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.command import ROOT, fresh

README = (ROOT / "README.md").read_text()
ROWS = dict(re.findall(r"^\| ([^|]+) \| `(polyak average [^|]+)` \|$", README, re.MULTILINE))
HUGGING_FACE = "Hugging Face folders: `model.safetensors`, `pytorch_model.bin`, shards"
KERNEL = np.random.default_rng(0).normal(3, 1, size=(32, 32)).astype(np.float32)


def test_the_readme_is_short() -> None:
    """At most 130 lines of at most 110 characters."""
    lines = README.splitlines()
    assert len(lines) <= 130
    assert [line for line in lines if len(line) > 110] == []


def test_the_readme_links_to_files_that_exist() -> None:
    """The picture and every page that it names are in the repository."""
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 10
    assert [link for link in links if "://" not in link and not (ROOT / link).is_file()] == []
    (picture,) = re.findall(r"!\[([^\]]+)\]", README)
    assert len(picture) > 20  # said in words to whom cannot see it


def write_folders(run: Path, count: int, *, shards: bool) -> None:
    """Write folders as the Trainer of Hugging Face does, of one file or of two and an index."""
    for epoch in range(1, count + 1):
        folder = run / f"checkpoint-{500 * epoch}"
        folder.mkdir(parents=True)
        tensors = {"layer.weight": KERNEL + epoch, "layer.bias": KERNEL[0] + epoch}
        if not shards:
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            continue
        names = [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)]
        for name, tensor in zip(names, tensors.items(), strict=True):
            save_file(dict([tensor]), folder / name, metadata={"format": "pt"})
        weight_map = dict(zip(tensors, names, strict=True))
        index = {"metadata": {"total_size": 4 * 1056}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(str(index).replace("'", '"'))


def write_one_file(folder: Path) -> None:
    """Write folders of one file."""
    write_folders(folder / "run", 3, shards=False)


def write_shards(folder: Path) -> None:
    """Write folders of two files and an index."""
    write_folders(folder / "run", 3, shards=True)


def write_npz(folder: Path) -> None:
    """Write archives of arrays."""
    (folder / "ckpts").mkdir()
    for epoch in range(1, 4):
        np.savez(folder / f"ckpts/params_{epoch}.npz", kernel=KERNEL + epoch)


def run_row(have: str, folder: Path) -> list[str]:
    """Run the command of a row in a folder and return its words; it must say nothing of errors."""
    words = shlex.split(ROWS[have])
    done = fresh(*words[1:], cwd=folder)
    assert done.returncode == 0, done.stderr
    return words


@pytest.mark.parametrize(
    ("have", "write"),
    [
        (HUGGING_FACE, write_one_file),
        (HUGGING_FACE, write_shards),
        ("JAX or numpy arrays in `.npz`", write_npz),
    ],
)
def test_a_row_of_the_table_runs(tmp_path: Path, have: str, write: Callable[[Path], None]) -> None:
    """The average of what is shifted by 1, 2 and 3 is shifted by 2."""
    write(tmp_path)
    output = tmp_path / run_row(have, tmp_path)[-1]
    if output.suffix == ".npz":
        assert np.array_equal(np.load(output)["kernel"], KERNEL + 2)
    else:
        from safetensors.numpy import load_file

        files = [output] if output.is_file() else sorted(output.glob("*.safetensors"))
        tensors = {name: value for file in files for name, value in load_file(file).items()}
        assert np.allclose(tensors["layer.weight"], KERNEL + 2, rtol=0, atol=1e-6)
        assert tensors.keys() == {"layer.weight", "layer.bias"}


def test_every_row_of_the_table_is_run_by_some_test() -> None:
    """A row is in one of the six files that run them, by its first cell."""
    folders = ("", "keras/", "torch/", "hf/", "orbax/", "remote/")
    files = [f"{folder}test_front_door.py" for folder in folders]
    text = "".join((ROOT / "tests" / name).read_text() for name in files)
    assert len(ROWS) >= 9
    assert [have for have in ROWS if f'"{have}"' not in text] == []
