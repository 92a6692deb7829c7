"""Keras's HDF5 files that are large, or that a save left incomplete; h5py and Keras write them."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from polyak_cli.formats.format import ScanRequest
from polyak_cli.formats.hdf5 import keras_files, library
from polyak_cli.formats.hdf5.windows import Window
from polyak_cli.processes import sandbox
from tests.command import polyak


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


@pytest.mark.slow
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
