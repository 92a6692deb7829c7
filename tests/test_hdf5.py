"""Keras's HDF5 files that are large, or that a save left incomplete; h5py and Keras write them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import h5py
import numpy as np
import pytest

from polyak_cli.errors import FormatError
from polyak_cli.formats.format import ScanRequest
from polyak_cli.formats.hdf5 import keras_files, library
from polyak_cli.formats.hdf5.windows import Window
from polyak_cli.processes import sandbox
from polyak_cli.tensors import Table
from tests.command import polyak
from tests.contract import Contract, Tensors
from tests.oracle import read_model, write_model


class TestWholeModels(Contract):
    """Keras's whole models, of one layer and with the state of an optimizer.

    What libhdf5 reads by itself is not counted where a plan is to read headers only; NaN in place
    of the tensors shows that the plan does not depend on them.
    """

    suffix = ".h5"

    def write(self, path: Path, tensors: Tensors) -> None:
        """See `Contract.write`."""
        write_model(path, {"dense": tensors}, optimizer={"sgd/iteration": np.array(7)})

    def read(self, path: Path) -> Tensors:
        """See `Contract.read`."""
        group = "model_weights/dense/"
        found = {name: np.asarray(values) for name, values in read_model(path).items()}
        assert {n for n in found if not n.startswith(group)} <= {"optimizer_weights/sgd/iteration"}
        return {n.removeprefix(group): v for n, v in found.items() if n.startswith(group)}


def scan(path: Path, with_optimizer: bool = True) -> Table:
    """Scan a file in this process."""
    heartbeat = sandbox.Heartbeat(lambda: None)
    return keras_files.KerasHdf5().scan(ScanRequest(str(path), with_optimizer), heartbeat)


def write_layer(path: Path, count: int, name: str, seed: int) -> np.ndarray:
    """Write a model of one layer with many small tensors, with h5py; return their values."""
    values = np.random.default_rng(seed).random((count, 2), np.float32)
    names = [name.format(k).encode() for k in range(count)]
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = '{"class_name": "Functional"}'
        group = file.create_group("model_weights")
        group.attrs["layer_names"] = [b"embeddings"]
        layer = group.create_group("embeddings")
        listed = np.array(names)
        for k, part in enumerate(np.array_split(listed, 1 + listed.nbytes // 50_000)):
            layer.attrs[f"weight_names{k}"] = part
        for tensor, row in zip(names, values, strict=True):
            layer[tensor] = row
    return values


@pytest.mark.soak
def test_a_hundred_thousand_tensors_in_one_layer(tmp_path: Path) -> None:
    """They are averaged, within the limits of time and memory of the reading child."""
    one, other = (write_layer(tmp_path / f"m_{k}.h5", 100_000, "kernel_{}", k) for k in (1, 2))
    done = polyak("average", "m_1.h5", "m_2.h5", "-q", "-o", "o.h5", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    expected = (0.5 * one.astype("f8") + 0.5 * other.astype("f8")).astype("f4")
    with h5py.File(tmp_path / "o.h5") as file:
        layer = file["model_weights/embeddings"]
        assert len(layer) == 100_000
        for k in range(0, 100_000, 997):
            assert np.array_equal(layer[f"kernel_{k}"][()], expected[k])


class CountingWindow(Window):
    """Counts the bytes that libhdf5 reads."""

    nbytes = 0

    def readinto(self, buffer: memoryview) -> int:
        """Read and count."""
        self.nbytes += len(buffer)
        return super().readinto(buffer)


def test_names_of_a_large_group_are_read_once(tmp_path: Path) -> None:
    """Not once for every tensor, though they take more than libhdf5's cache of headers."""
    path = tmp_path / "m.h5"
    write_layer(path, 12_000, "kernel_" + 100 * "x" + "_{}", 1)
    size = path.stat().st_size
    with path.open("rb") as file:
        window = CountingWindow(str(path), file.fileno(), 0, size)
        with library.open_file(window) as (root, _):
            heartbeat = sandbox.Heartbeat(lambda: None)
            count = sum(1 for _ in library.walk(root, heartbeat))
    assert count == 12_000 + 2
    assert window.nbytes < 20 * size


def test_every_phase_sends_heartbeats(tmp_path: Path) -> None:
    """Listing, walking and sorting thousands of tensors each report progress."""
    path = tmp_path / "m.h5"
    write_layer(path, 3000, "kernel_{}", 1)
    beats = 0

    def beat() -> None:
        nonlocal beats
        beats += 1

    heartbeat = sandbox.Heartbeat(beat)
    with library.open_file(str(path)) as (root, _):
        for _ in library.walk(root, heartbeat):
            heartbeat.next = 0.0
    assert beats > 3000
    beats = 0
    heartbeat.next = 0.0
    assert (
        len(keras_files.KerasHdf5().scan(ScanRequest(str(path), True), heartbeat).tensors) == 3000
    )
    assert beats


def split_names(path: Path, key: str, parts: list[str]) -> Path:
    """Write a model with h5py whose list of names stands in these attributes; return the path."""
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = '{"class_name": "Sequential"}'
        group = file.create_group("model_weights")
        names = [f"n{k}".encode() for k in range(3)]
        for layer in names if key == "layer_names" else [b"layer"]:
            below = group.create_group(layer)
            weights = names if key == "weight_names" else [b"kernel"]
            if key == "layer_names":
                below.attrs["weight_names"] = weights
            for weight in weights:
                below[weight] = np.ones(2, np.float32)
        if key == "weight_names":
            group.attrs["layer_names"] = [b"layer"]
        target = group if key == "layer_names" else group["layer"]
        for part, held in zip(parts, np.array_split(np.array(names), len(parts)), strict=True):
            target.attrs[key + part] = held
    return path


@pytest.mark.parametrize("key", ["layer_names", "weight_names"])
@pytest.mark.parametrize(
    "parts", [["0", "2"], ["1", "2"], ["", "0"], ["", "1"], ["0", "01"], ["1"]]
)
def test_a_list_of_names_with_a_part_missing(tmp_path: Path, key: str, parts: list[str]) -> None:
    """What the missing part lists would be taken for no part of the model."""
    split_names(tmp_path / "m_1.h5", key, parts)
    done = polyak("average", "m_1.h5", "-q", "-o", "o.h5", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert re.search(
        rf"^error: m_1\.h5: the list '{key}' of .* is incomplete: it has '", done.stderr
    )
    assert os.listdir(tmp_path) == ["m_1.h5"]


@pytest.mark.parametrize("key", ["layer_names", "weight_names"])
@pytest.mark.parametrize("parts", [[""], ["0"], ["0", "1"], ["0", "1", "2"]])
def test_a_list_of_names_that_is_whole(tmp_path: Path, key: str, parts: list[str]) -> None:
    """One list, or its parts from 0 on."""
    path = split_names(tmp_path / "m_1.h5", key, parts)
    assert len(scan(path).tensors) == 3


def test_more_than_ten_parts_are_joined_in_their_order(tmp_path: Path) -> None:
    """By number: part 10 comes after part 9."""
    names = [f"n{k}".encode() for k in range(12)]
    with h5py.File(tmp_path / "m.h5", "w") as file:
        group = file.create_group("model_weights")
        group.attrs["layer_names"] = [b"layer"]
        layer = group.create_group("layer")
        for k, name in enumerate(names):
            layer.attrs[f"weight_names{k}"] = np.array([name])
            layer[name] = np.ones(2, np.float32)
    assert [*scan(tmp_path / "m.h5").tensors] == [f"layer/n{k}" for k in range(12)]


@pytest.mark.parametrize("version", ["3.15.1", "2.21.0", "2.13.1"])
def test_a_save_that_failed_before_the_model_s_own_weights(tmp_path: Path, version: str) -> None:
    """Keras lists the weights of the model itself last, even where there are none."""
    path = split_names(tmp_path / "m_1.h5", "layer_names", [""])
    with h5py.File(path, "a") as file:
        file["model_weights"].attrs["keras_version"] = version
    with pytest.raises(
        FormatError, match=r"no group 'top_level_model_weights'.* not saved completely"
    ):
        scan(path)
    with h5py.File(path, "a") as file:
        file["model_weights"].create_group("top_level_model_weights")
    with pytest.raises(FormatError, match=r"top_level_model_weights' has no list 'weight_names'"):
        scan(path)
    with h5py.File(path, "a") as file:
        file["model_weights/top_level_model_weights"].attrs["weight_names"] = np.zeros(0)
    assert len(scan(path).tensors) == 3


def test_older_keras_has_no_list_of_the_model_s_own_weights(tmp_path: Path) -> None:
    """Its files are read as before."""
    path = split_names(tmp_path / "m_1.h5", "layer_names", [""])
    with h5py.File(path, "a") as file:
        file["model_weights"].attrs["keras_version"] = "2.4.0"
    assert len(scan(path).tensors) == 3


@pytest.mark.parametrize("with_optimizer", [True, False])
def test_a_save_that_failed_in_the_optimizer(tmp_path: Path, with_optimizer: bool) -> None:
    """A tensor that is listed is missing, or has no values; or the list is not there yet."""
    path = split_names(tmp_path / "m_1.h5", "layer_names", [""])
    with h5py.File(path, "a") as file:
        file.create_group("optimizer_weights")
    with pytest.raises(
        FormatError, match=r"no list of its optimizer's tensors.* not saved completely"
    ):
        scan(path, with_optimizer)
    with h5py.File(path, "a") as file:
        group = file["optimizer_weights"]
        group.attrs["weight_names"] = [b"adam/iteration", b"adam/kernel/m"]
        group["adam/iteration"] = 3
    with pytest.raises(
        FormatError, match=r"adam/kernel/m' is named but was not saved.*save it again"
    ):
        scan(path, with_optimizer)
    with h5py.File(path, "a") as file:
        file.create_dataset("optimizer_weights/adam/kernel/m", (2,), "f4")
    with pytest.raises(
        FormatError, match=r"adam/kernel/m' is named but was not saved.*save it again"
    ):
        scan(path, with_optimizer)
    with h5py.File(path, "a") as file:
        file["optimizer_weights/adam/kernel/m"][:] = 1
    assert len(scan(path, with_optimizer).tensors) == 3
