"""Inspecting: the table of tensors, statistics, and provenance."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import h5py
import numpy as np
import pytest

from polyak_cli import average, inspect
from tests.command import SAMPLES, one_line, polyak
from tests.oracle import write_model


def test_the_table_has_place_and_fate_of_every_tensor(tmp_path: Path) -> None:
    """Names, types, shapes, offsets and fates, in the file's order; the offsets are right."""
    kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
    layers = {"d": {"k": kernel, "n": np.array(3), "z": np.ones(2, np.complex64)}}
    state = {"m": np.ones(2, np.float32)}
    path = write_model(tmp_path / "m.h5", layers, optimizer=state)
    (found,) = inspect([path])
    rows = found.data()["tensors"]
    assert [(row["name"], row["dtype"], row["shape"], row["fate"]) for row in rows] == [
        ("d/k", "float32", [2, 3], "averaged"),
        ("d/n", "int64", [], "carried"),
        ("d/z", "compound", [2], "refused"),
        ("/optimizer_weights/m", "float32", [2], "dropped"),
    ]
    offset = int(rows[0]["stored"].removeprefix("plain bytes at "))
    assert path.read_bytes()[offset : offset + 24] == kernel.tobytes()
    assert found.parameters == 6
    assert found.data()["about"] == {"keras_version": "3.15.1", "backend": "tensorflow"}
    assert found.provenance is None


def test_a_folder_is_not_one_checkpoint(tmp_path: Path) -> None:
    """The folder of a run is refused, and the message asks for a checkpoint in it."""
    write_model(tmp_path / "run_1.h5", {"d": {"k": np.ones(2, np.float32)}})
    ended = polyak("inspect", tmp_path, cwd=tmp_path)
    assert ended.returncode == 3
    said = (
        f"error: {tmp_path}: is a folder and not one checkpoint; name one of the checkpoints in it"
    )
    assert ended.stderr == f"{said}\n"


def test_statistics_are_of_the_finite_values(tmp_path: Path) -> None:
    """Norm, minimum and maximum as numpy computes them, over many slabs; the rest is counted."""
    values = np.random.default_rng(0).normal(size=1_000_000).astype(np.float32)
    values[[5, 500_000]] = np.nan, -np.inf
    layers = {"d": {"k": values, "n": np.array([3, -4]), "m": np.array([True, False])}}
    path = write_model(tmp_path / "m.h5", {**layers, "e": {"empty": np.zeros((0, 2))}})
    (found,) = inspect([path], statistics=True)
    kernel, number, mask, empty = (tensor.statistics for tensor in found.tensors)
    finite = values[np.isfinite(values)].astype(np.float64)
    assert kernel
    assert kernel.norm == pytest.approx(math.sqrt((finite**2).sum()), rel=1e-12)
    assert kernel[1:] == (finite.min(), finite.max(), 2)
    assert number == (5.0, -4.0, 3.0, 0)
    assert mask == (1.0, 0.0, 1.0, 0)
    assert empty is None


def test_an_average_says_where_it_comes_from(tmp_path: Path) -> None:
    """The record that `average` wrote is returned, from HDF5 and from npz."""
    average(SAMPLES, tmp_path / "final.h5", scheme="exp", alpha=2)
    for k in range(2):
        np.savez(tmp_path / f"m_{k}.npz", x=np.ones(3))
    average([tmp_path / "m_0.npz", tmp_path / "m_1.npz"], tmp_path / "o.npz")
    h5, npz = inspect([tmp_path / "final.h5", tmp_path / "o.npz"])
    assert [each["name"] for each in npz.provenance["inputs"]] == ["m_0.npz", "m_1.npz"]
    assert h5.provenance["scheme"] == "exp"
    assert len(h5.provenance["inputs"]) == 10


@pytest.mark.parametrize(
    "record", ["no JSON", "[" * 10_000, "3", '{"inputs": 3}', '{"inputs": [3, {"name": 4}]}']
)
def test_a_record_by_another_program_does_no_harm(tmp_path: Path, record: str) -> None:
    """Any text in place of a record is shown as data, without a traceback."""
    path = write_model(tmp_path / "m.h5", {"d": {"k": np.ones(3, np.float32)}})
    with h5py.File(path, "r+") as file:
        file.attrs["polyak_provenance"] = record
    done = polyak("inspect", "m.h5", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].startswith("m.h5: ")
    (found,) = inspect([path])
    assert found.provenance == (json.loads(record) if "3" in record else record)


def test_the_command_prints_a_table_and_json(tmp_path: Path) -> None:
    """One line for each tensor, or JSON; several files at once."""
    average(SAMPLES, tmp_path / "final.h5")
    files = [SAMPLES / "model_499.h5", tmp_path / "final.h5"]
    done = polyak("inspect", *files, "--stats", cwd=tmp_path)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert sum(line.startswith("  dense/kernel ") for line in lines) == 2
    assert "model_499.h5: Keras HDF5, keras_version 3.15.1, backend tensorflow" in lines[0]
    assert lines[-1].startswith("an average by polyak ")
    verbose = polyak("inspect", files[0], "-v", cwd=tmp_path).stdout
    assert re.search(
        r"^  dense/sequential/dense/kernel .* plain bytes at \d+  averaged$", verbose, re.M
    )
    assert not re.search("plain bytes|averaged|dropped", "".join(lines[:-1]))
    data = json.loads(polyak("inspect", *files, "--json", cwd=tmp_path).stdout)
    assert [len(one["tensors"]) for one in data["checkpoints"]] == [10, 4]


def test_a_file_that_is_no_checkpoint_costs_one_line(tmp_path: Path) -> None:
    """Exit 3, and an error that names the file; nothing is printed."""
    (tmp_path / "x.h5").write_bytes(b"no such format")
    done = polyak("inspect", "x.h5", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert one_line(done.stderr).startswith("x.h5: is not")
