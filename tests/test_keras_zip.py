"""Keras 3's .keras: the contract of all formats, and what is its own; see also tests/keras.

The archives are written by Python's zipfile and by h5py, laid out as Keras does.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np
import pytest

from polyak_cli import average
from polyak_cli.errors import FormatError
from tests.contract import Contract, Tensors, assert_same, naive

VOCABULARY = "assets/layers/lookup/vocabulary.txt"


def write_weights(tensors: Tensors) -> bytes:
    """Return a weights file with one layer a tensor, and the state of an optimizer."""
    inner = io.BytesIO()
    with h5py.File(inner, "w") as file:
        file.create_group("vars").attrs["name"] = "model"
        for name, values in tensors.items():
            file[f"layers/{name}/vars/0"] = values
            file[f"layers/{name}/vars"].attrs["name"] = name
        file["optimizer/vars/0"] = np.int64(3)
        file["optimizer/vars/1"] = np.ones(50_000, np.float32)
    return inner.getvalue()


def members(tensors: Tensors) -> dict[str, bytes]:
    """Return the members of an archive as Keras orders them."""
    return {
        "metadata.json": b'{"keras_version": "3.15.1", "date_saved": "2026-01-01@00:00:00"}',
        "config.json": b'{"class_name": "Sequential", "config": {"name": "model"}}',
        "model.weights.h5": write_weights(tensors),
        VOCABULARY: "eins\nzwei\n".encode(),
    }


def write_archive(path: Path, content: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    """Write members to an archive."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def read_weights(path: Path) -> h5py.File:
    """Open the weights file of an archive."""
    with zipfile.ZipFile(path) as archive:
        return h5py.File(io.BytesIO(archive.read("model.weights.h5")))


class TestStored(Contract):
    """As Keras writes them."""

    suffix = ".keras"
    method: ClassVar[int] = zipfile.ZIP_STORED

    def write(self, path: Path, tensors: Tensors) -> None:
        """See `Contract.write`."""
        write_archive(path, members(tensors), self.method)

    def read(self, path: Path) -> Tensors:
        """See `Contract.read`."""
        with read_weights(path) as file:
            return {name: layer["vars/0"][()] for name, layer in file["layers"].items()}


class TestDeflated(TestStored):
    """As somebody has packed them again."""

    method = zipfile.ZIP_DEFLATED
