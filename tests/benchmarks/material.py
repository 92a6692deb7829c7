"""Describe the files that the contenders average; `files` makes them in a separate process."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks import machine, measure

#: Here and in every figure: a megabyte is 10^6 bytes and a gigabyte 10^9.
MB = 10**6
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True, slots=True)
class Material:
    """Checkpoints of one run, in the layout of Keras 3 `.h5`, with random values.

    Dense layers of an equal number of units, each with one large tensor and one small; or, with
    `count`, that many tensors of equal size, four to a layer.
    """

    files: int = 10
    nbytes: int = 410 * MB  # of the tensors of one file, nearly
    layers: int = 10
    count: int = 0
    dtype: str = "float32"
    compression: str = ""
    optimizer: bool = False  # with a momentum for each tensor
    safetensors: bool = False  # the same tensors once more, as safetensors


@dataclass(frozen=True, slots=True)
class Made:
    """Checkpoints on the disk, oldest first."""

    paths: Sequence[Path]
    safetensors: Sequence[Path]
    tensors: int  # in each file, of the model
    nbytes: int  # of these, in each file

    def first(self, count: int) -> Made:
        """Return the same with fewer checkpoints."""
        return dataclasses.replace(self, paths=self.paths[:count], safetensors=())

    @property
    def gigabytes(self) -> float:
        """What averaging has to read: the tensors of all files, as if not compressed."""
        return self.nbytes * len(self.paths) / 1e9


def make(material: Material, folder: Path) -> Made:
    """Write the checkpoints of a material, synced, and leave them in the page cache.

    Raises:
        Failed: for want of room on the disk, for example.
    """
    folder.mkdir(parents=True)
    described = json.dumps(dataclasses.asdict(material))
    measure.run([*_FILES, "make", described, str(folder)])
    made = json.loads((folder / "made.json").read_text())
    names = [f"model_{epoch:03d}" for epoch in range(material.files)]
    made = Made(
        [folder / f"{name}.h5" for name in names],
        [folder / f"{name}.safetensors" for name in names] if material.safetensors else [],
        made["tensors"],
        made["nbytes"],
    )
    machine.warm([*made.paths, *made.safetensors])
    return made


def compare(reference: Path, output: Path, folder: Path) -> Mapping[str, Any]:
    """Compare the tensors of a model file with those of a reference.

    Returns:
        same: whether all bits are; deviation: the largest difference of two values.

    Raises:
        Failed: the output lacks a tensor, or is no model file at all.
    """
    answer = folder / "answer.json"
    measure.run([*_FILES, "compare", str(reference), str(output), str(answer)])
    found: Mapping[str, Any] = json.loads(answer.read_text())
    answer.unlink()
    return found


class Store:
    """Keeps the latest material on the disk, and no other."""

    def __init__(self, folder: Path) -> None:
        """Start with nothing on the disk, in a folder that is not there yet."""
        self.folder = folder
        self.material: Material | None = None
        self.made: Made | None = None
        self.warmth = machine.Warmth()

    def get(self, wanted: Material) -> Made:
        """Return the checkpoints of a material, and make them unless they are the latest."""
        if self.made is None or self.material != wanted:
            measure.remove(self.folder)
            self.made, self.material = make(wanted, self.folder), wanted
        return self.made


_FILES = [sys.executable, "-m", "tests.benchmarks.files"]
