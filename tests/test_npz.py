"""Numpy's .npz: the contract of all formats, and what is its own."""

from __future__ import annotations

import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyak_cli import average, formats
from polyak_cli.errors import FormatError, MismatchError
from polyak_cli.formats import zips
from polyak_cli.storage import open_input
from tests.contract import Contract, Tensors, another_layout, assert_same, naive


class TestStored(Contract):
    """Written by np.savez."""

    suffix = ".npz"

    def write(self, path: Path, tensors: Tensors) -> None:
        """See `Contract.write`."""
        np.savez(path, **tensors)  # type: ignore[arg-type] # its stub takes an array for a flag

    def read(self, path: Path) -> Tensors:
        """See `Contract.read`."""
        with np.load(path) as archive:
            return dict(archive)


@another_layout
class TestDeflated(TestStored):
    """Written by np.savez_compressed."""

    def write(self, path: Path, tensors: Tensors) -> None:
        """See `Contract.write`."""
        np.savez_compressed(path, **tensors)  # type: ignore[arg-type] # as above


def write_pair(folder: Path, one: Tensors, other: Tensors) -> list[Path]:
    """Write two checkpoints."""
    paths = [folder / "m_1.npz", folder / "m_2.npz"]
    for path, tensors in zip(paths, (one, other), strict=True):
        np.savez(path, **tensors)  # type: ignore[arg-type] # as above
    return paths


def test_orders_of_bytes_and_axes_are_kept(tmp_path: Path) -> None:
    """Big-endian and Fortran-ordered arrays are averaged as they lie, strings are carried."""
    rng = np.random.default_rng(0)
    models: list[Tensors] = [
        {
            "big": rng.normal(size=(3, 4)).astype(">f4"),
            "fortran": np.asfortranarray(rng.normal(size=(5, 6))),
            "text": np.array("höhe"),
            "empty": np.zeros((0, 3), np.float32),
        }
        for _ in range(2)
    ]
    average(write_pair(tmp_path, *models), tmp_path / "o.npz")
    with np.load(tmp_path / "o.npz") as archive:
        found = dict(archive)
    assert_same(found, naive(models, [0.5, 0.5]))
    assert found["fortran"].flags.f_contiguous


def test_arrays_that_lie_differently_are_refused(tmp_path: Path) -> None:
    """C and Fortran order of one tensor cannot be averaged byte by byte."""
    values = np.ones((3, 4))
    paths = write_pair(tmp_path, {"x": values}, {"x": np.asfortranarray(values)})
    with pytest.raises(MismatchError, match=r"m_1.*'x' has arrangement C order.*Fortran order"):
        average(paths, tmp_path / "o.npz")


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    """An array of objects is a pickle: refused by name, whatever it holds."""
    values = np.array([print], object)
    paths = write_pair(tmp_path, {"x": values}, {"x": values})
    with pytest.raises(FormatError, match=r"m_2.npz: tensor 'x' is a pickled array of objects"):
        average(paths, tmp_path / "o.npz")


def test_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    """One flipped bit of a value, which no header shows."""
    paths = write_pair(tmp_path, {"x": np.ones(1000)}, {"x": np.ones(1000)})
    content = bytearray(paths[0].read_bytes())
    content[500] ^= 1
    paths[0].write_bytes(content)
    with pytest.raises(FormatError, match=r"m_1.npz: the checksum of the member 'x.npy' is wrong"):
        average(paths, tmp_path / "o.npz")


def test_the_archive_is_whole(tmp_path: Path) -> None:
    """Python's zipfile finds every checksum right, and no array that was not there."""
    paths = write_pair(tmp_path, {"x": np.ones(1000)}, {"x": np.zeros(1000)})
    average(paths, tmp_path / "o.npz", dtype="float32")
    with zipfile.ZipFile(tmp_path / "o.npz") as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["x.npy"]
        assert archive.comment.startswith(b"polyak_provenance ")


def test_threads_inflate_a_member_once_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that reads on does not begin again because another has read elsewhere."""
    content = np.arange(4000, dtype="<f4")
    np.savez_compressed(tmp_path / "m.npz", x=content)
    (table,) = formats.scan([tmp_path / "m.npz"])
    storage = table.tensors["x"].storage
    assert isinstance(storage, zips.Deflated)
    opened: list[int] = []
    real = zips._Stream

    def open_stream(*arguments: Any) -> zips._Stream:
        opened.append(threading.get_ident())
        return real(*arguments)

    monkeypatch.setattr(zips, "_Stream", open_stream)
    with open_input(*table.files[0]) as file, ThreadPoolExecutor(2) as pool:
        meeting = threading.Barrier(2)

        def read(first: int) -> None:
            for start in range(first, 16000, 1600):
                meeting.wait()  # both are at work at a time
                buffer = np.empty(800, np.uint8)
                storage.read_into([file], start, buffer)
                assert buffer.tobytes() == content.tobytes()[start : start + 800]

        list(pool.map(read, (0, 800)))
    assert len(opened) == len(set(opened)) == 2
