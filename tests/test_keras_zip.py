"""Keras 3's .keras: the contract of all formats, and what is its own; see also tests/keras.

The archives are written by Python's zipfile and by h5py, laid out as Keras does.
"""

from __future__ import annotations

import io
import os
import stat
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np
import pytest

from polyak_cli import average
from polyak_cli.errors import FormatError, MismatchError
from polyak_cli.formats import zips
from polyak_cli.formats.hdf5.windows import Window
from tests.command import scripted
from tests.contract import Contract, Tensors, another_layout, assert_same, naive

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
        VOCABULARY: b"eins\nzwei\n",
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

    # libhdf5 reads 512 bytes wherever it expects the header of an object (H5O_SPEC_READ_SIZE).
    overrun = 512
    suffix = ".keras"
    method: ClassVar[int] = zipfile.ZIP_STORED

    def write(self, path: Path, tensors: Tensors) -> None:
        """See `Contract.write`."""
        write_archive(path, members(tensors), self.method)

    def read(self, path: Path) -> Tensors:
        """See `Contract.read`."""
        with read_weights(path) as file:
            return {name: layer["vars/0"][()] for name, layer in file["layers"].items()}


@another_layout
class TestDeflated(TestStored):
    """As somebody has packed them again."""

    method = zipfile.ZIP_DEFLATED


def write_pair(folder: Path, method: int = zipfile.ZIP_STORED) -> list[Path]:
    """Write two checkpoints of one tensor, of ones and of threes."""
    content = [members({"dense": np.full((3, 4), value, np.float32)}) for value in (1, 3)]
    return [
        write_archive(folder / f"m_{k}.keras", archive, method)
        for k, archive in enumerate(content, start=1)
    ]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_everything_else_is_carried(tmp_path: Path, method: int) -> None:
    """Every checksum is right, and all members but the weights are the newest's byte for byte."""
    paths = write_pair(tmp_path, method)
    average(paths, tmp_path / "o.keras")
    expected = members({"dense": np.zeros(1)})
    with zipfile.ZipFile(tmp_path / "o.keras") as archive:
        assert archive.testzip() is None
        assert set(archive.namelist()) == set(expected)
        for name in expected.keys() - {"model.weights.h5"}:
            assert archive.read(name) == expected[name]
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_the_record_is_in_the_weights_file(tmp_path: Path) -> None:
    """A member of its own would have Keras unpack the whole archive."""
    average(write_pair(tmp_path), tmp_path / "o.keras")
    with read_weights(tmp_path / "o.keras") as file:
        assert '"name":"m_1.keras"' in file.attrs["polyak_provenance"]
        assert file["layers/dense/vars"].attrs["name"] == "dense"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_optimizer_state_is_dropped_or_kept(tmp_path: Path, method: int) -> None:
    """Dropped unless it is wanted; then it is the newest's, its large slots too."""
    paths = write_pair(tmp_path, method)
    average(paths, tmp_path / "o.keras")
    report = average(paths, tmp_path / "kept.keras", optimizer="newest")
    assert any("momentum does not belong" in note for note in report.notes)
    with read_weights(tmp_path / "o.keras") as file:
        assert "optimizer" not in file
    with read_weights(tmp_path / "kept.keras") as file:
        assert file["optimizer/vars/0"][()] == 3
        assert np.array_equal(file["optimizer/vars/1"], np.ones(50_000, np.float32))


def test_bfloat16_stays_what_keras_knows_it_by(tmp_path: Path) -> None:
    """Two bare bytes with an attribute that names the type; 1 and 3 average to 2."""
    for k, bits in ((1, 0x3F80), (2, 0x4040)):
        inner = io.BytesIO()
        with h5py.File(inner, "w") as file:
            made = file.create_dataset("layers/dense/vars/0", (5,), "V2")
            made[:] = np.full(5, bits, "<u2").view("V2")
            made.attrs["dtype"] = "bfloat16"
        content = members({}) | {"model.weights.h5": inner.getvalue()}
        write_archive(tmp_path / f"m_{k}.keras", content)
    average(tmp_path, tmp_path / "o.keras")
    with read_weights(tmp_path / "o.keras") as file:
        found = file["layers/dense/vars/0"]
        assert found.attrs["dtype"] == "bfloat16"
        assert found[()].view("<u2").tolist() == [0x4000] * 5


def with_chunks(folder: Path, method: int) -> list[Path]:
    """Write two checkpoints whose tensor is in gzip chunks."""
    paths = []
    for k in (1, 2):
        inner = io.BytesIO()
        with h5py.File(inner, "w") as file:
            values = np.full((8, 6), k, np.float32)
            file.create_dataset("layers/d/vars/0", data=values, chunks=(3, 6), compression="gzip")
        content = members({}) | {"model.weights.h5": inner.getvalue()}
        paths.append(write_archive(folder / f"m_{k}.keras", content, method))
    return paths


def test_chunks_are_read_where_they_lie_in_the_archive(tmp_path: Path) -> None:
    """Tensors that somebody compressed inside the weights file."""
    average(with_chunks(tmp_path, zipfile.ZIP_STORED), tmp_path / "o.keras")
    with read_weights(tmp_path / "o.keras") as file:
        assert np.array_equal(file["layers/d/vars/0"], np.full((8, 6), 1.5, np.float32))


def test_chunks_in_a_deflated_member_are_refused(tmp_path: Path) -> None:
    """What is compressed twice could only be read by unpacking it all."""
    with pytest.raises(FormatError, match=r"m_2.keras: tensor 'layers/d/vars/0' is .* in chunks"):
        average(with_chunks(tmp_path, zipfile.ZIP_DEFLATED), tmp_path / "o.keras")


def test_a_deflated_member_is_read_once_forwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors are averaged in the order of their bytes, whatever their names."""
    rng = np.random.default_rng(0)
    for k in (1, 2):
        tensors = {name: rng.normal(size=9000).astype(np.float32) for name in "dbaec"}
        write_archive(tmp_path / f"m_{k}.keras", members(tensors), zipfile.ZIP_DEFLATED)
    begun = []
    whole = zips._Stream

    def stream(*arguments: Any) -> zips._Stream:
        begun.append(arguments)
        return whole(*arguments)

    monkeypatch.setattr(zips, "_Stream", stream)
    monkeypatch.setattr(zips, "_reached", zips._Reached())  # nothing is kept of other tests
    average(tmp_path, tmp_path / "o.keras", jobs=1)
    assert len(begun) == 2  # one a checkpoint; the scans are other processes


def test_what_differs_from_save_to_save_is_no_other_configuration(tmp_path: Path) -> None:
    """The learning rate and objects' addresses change within a run; the layers do not."""
    config = '{{"config": {{"units": {}, "shared_object_id": {}}}, "compile_config": {{"lr": {}}}}}'
    notes = []
    for k, values in enumerate([(8, 1, 0.1), (8, 2, 0.2), (9, 2, 0.2)]):
        text = config.format(*values).encode()
        content = members({"dense": np.ones(3)}) | {"config.json": text}
        write_archive(tmp_path / f"m_{k}.keras", content)
        report = average(tmp_path, tmp_path / "o.keras", force=True, exclude=["o.keras"])
        notes.append("configuration differs" in "".join(report.notes))
    assert notes == [False, False, True]


def test_an_archive_without_an_ema_says_so(tmp_path: Path) -> None:
    """--use-ema wants a run that kept one."""
    with pytest.raises(MismatchError, match=r"m_1.keras: has no EMA slots.*use_ema=True"):
        average(write_pair(tmp_path), tmp_path / "o.keras", use_ema=True)


@pytest.mark.parametrize("kind", ["reordered", "without metadata", "trailing"])
def test_odd_archives_that_keras_opens_are_averaged(tmp_path: Path, kind: str) -> None:
    """Members in another order, no metadata.json, bytes behind the end."""
    models: list[Tensors] = [{"dense": np.full((3, 4), k, np.float32)} for k in (1, 2)]
    for k, tensors in enumerate(models):
        content = members(tensors)
        if kind == "reordered":
            content = dict(reversed(content.items()))
        if kind == "without metadata":
            del content["metadata.json"]
        path = write_archive(tmp_path / f"m_{k}.keras", content)
        if kind == "trailing":
            path.write_bytes(path.read_bytes() + b"behind")
    average(tmp_path, tmp_path / "o.keras")
    assert_same(TestStored().read(tmp_path / "o.keras"), naive(models, [0.5, 0.5]))


Edit = Callable[[dict[str, bytes]], object]


def inner_model() -> bytes:
    """Return a whole-model .h5, which is no weights file."""
    inner = io.BytesIO()
    with h5py.File(inner, "w") as file:
        file["model_weights/dense/kernel"] = np.ones(3)
    return inner.getvalue()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("config.json"), "has no member 'config.json'"),
        (lambda c: c.pop("model.weights.h5"), "has no member 'model.weights.h5'"),
        (
            lambda c: c.update({"model.weights.npz": c.pop("model.weights.h5")}),
            "its weights are pickled",
        ),
        (lambda c: c.update({"config.json": b"["}), "its config.json is damaged"),
        (lambda c: c.update({"config.json": b"[" * 100_000}), "its config.json is damaged"),
        (lambda c: c.update({"config.json": b"[]"}), "is not a JSON object"),
        (
            lambda c: c.update({"model.weights.h5": b"PK\x03\x04" + bytes(99)}),
            "model.weights.h5: is not an HDF5 file .it is a zip archive",
        ),
        (
            lambda c: c.update({"model.weights.h5": c["model.weights.h5"][:-9]}),
            "model.weights.h5: is truncated",
        ),
        (lambda c: c.update({"model.weights.h5": b""}), "model.weights.h5: is not an HDF5 file"),
        (
            lambda c: c.update({"model.weights.h5": inner_model()}),
            "its model.weights.h5 holds no tensor",
        ),
        (lambda c: c.update({"assets/../../x": b""}), "has a path that leads nowhere or out"),
    ],
)
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_what_is_no_whole_model_is_refused(
    tmp_path: Path, method: int, edit: Edit, message: str
) -> None:
    """Members that are missing, foreign, damaged or lead elsewhere are named."""
    content = members({"dense": np.ones(3)})
    edit(content)
    path = write_archive(tmp_path / "m.keras", content, method)
    with pytest.raises(FormatError, match=f"m.keras: .*{message}"):
        average([path], tmp_path / "o.keras")
    assert os.listdir(tmp_path) == ["m.keras"]


def test_a_link_is_refused(tmp_path: Path) -> None:
    """An asset that is a symbolic link would be unpacked as one."""
    path = tmp_path / "m.keras"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members({"dense": np.ones(3)}).items():
            archive.writestr(name, data)
        link = zipfile.ZipInfo("assets/link")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(FormatError, match=r"m.keras: the member 'assets/link' is a symbolic link"):
        average([path], tmp_path / "o.keras")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_weights_files_are_refused(tmp_path: Path) -> None:
    """Programs would not agree which of the two counts."""
    path = write_archive(tmp_path / "m.keras", members({"dense": np.ones(3)}))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model.weights.h5", write_weights({"dense": np.zeros(3)}))
    with pytest.raises(FormatError, match=r"the member 'model.weights.h5' occurs twice"):
        average([path], tmp_path / "o.keras")


def test_a_member_without_a_name_is_refused(tmp_path: Path) -> None:
    """A list that names nothing is an error and no crash."""
    path = write_archive(tmp_path / "m.keras", members({"dense": np.ones(3)}) | {"?": b""})
    raw = bytearray(path.read_bytes())
    local, central = raw.rindex(b"PK\x03\x04"), raw.rindex(b"PK\x01\x02")
    for place in (local + 26, central + 28):  # the name becomes one byte of an extra field
        raw[place : place + 4] = b"\0\0\1\0"
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=r"m.keras: the member '' has a path"):
        average([path], tmp_path / "o.keras")


def test_a_member_before_the_file_is_refused(tmp_path: Path) -> None:
    """An archive whose beginning is cut off, with a list that says otherwise."""
    (path, _) = write_pair(tmp_path)
    raw = path.read_bytes()
    place = raw.rindex(b"PK\x05\x06") + 16  # where the list begins, if nothing was cut off
    start = int.from_bytes(raw[place : place + 4], "little")
    path.write_bytes(raw[:place] + (start + 70).to_bytes(4, "little") + raw[place + 4 :])
    with pytest.raises(FormatError, match=r"m_1.keras: .*(lies outside|Bad offset)"):
        average([path], tmp_path / "o.keras")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("name", ["model.weights.h5", VOCABULARY])
def test_a_wrong_checksum_is_refused(tmp_path: Path, method: int, name: str) -> None:
    """A list that does not fit the bytes, of the weights or of anything else."""
    paths = write_pair(tmp_path, method)
    with zipfile.ZipFile(paths[0]) as archive:
        crc = archive.getinfo(name).CRC.to_bytes(4, "little")
    paths[0].write_bytes(paths[0].read_bytes().replace(crc, b"bad!"))
    with pytest.raises(FormatError, match=f"m_1.keras: the checksum of the member '{name}'"):
        average(paths, tmp_path / "o.keras")


def test_a_prefix_is_reported(tmp_path: Path) -> None:
    """What begins with something else is no checkpoint, though zip programs find the archive."""
    (path, _) = write_pair(tmp_path)
    path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())
    with pytest.raises(
        FormatError, match=r"m_1.keras: is not a .keras archive \(it begins with b'#!"
    ):
        average([path], tmp_path / "o.keras")


def test_a_deflated_archive_needs_a_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says what it is for and what to do."""
    paths = write_pair(tmp_path, zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(FormatError, match=r"m_2.keras: .* its deflated model.weights.h5.*TMPDIR"):
        average(paths, tmp_path / "o.keras")


def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    """An output that may not grow, as on a full disk, is one line, and nothing is left."""
    write_pair(tmp_path)
    code = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))"
    done = scripted(code, "average", "m_1.keras", "m_2.keras", "-o", "o.keras", cwd=tmp_path)
    assert done.returncode == 3
    assert "o.keras: no room to write it" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["m_1.keras", "m_2.keras"]


def test_a_window_keeps_errors_from_the_library(tmp_path: Path) -> None:
    """Bytes that cannot be written are reported afterwards; missing bytes are read as zeros."""
    path = tmp_path / "f"
    path.write_bytes(b"0123456789")
    with open(path, "rb") as file:
        window = Window("f", file.fileno(), 2, 5)
        buffer = bytearray(8)
        window.seek(3)
        assert window.readinto(memoryview(buffer)) == 8
        assert buffer == b"56" + bytes(6)
        window = Window("f", file.fileno(), 2)
        # Not through the library: what it cannot flush it tries again when Python has gone.
        assert window.write(memoryview(b"x")) == 1
        assert isinstance(window.error, OSError)
    assert path.read_bytes() == b"0123456789"


@pytest.mark.parametrize("nbytes", [0, 1000, (1 << 32) + 5])
def test_a_member_of_any_size_begins_where_it_was_said(tmp_path: Path, nbytes: int) -> None:
    """Above 4 GiB its header is longer, which the room before it allows for."""
    path = tmp_path / "a.zip"
    path.touch()
    with zips.Archive(str(path)) as archive:
        archive.add("first", b"1")
        offset = archive.find_start("last", 64)
        archive.list_written("last", offset, nbytes)
        ends = archive.end
        archive.end = offset  # the test writes no 4 GiB
    head = path.read_bytes()
    start = head.rindex(b"PK\x03\x04")
    name, extra = (int.from_bytes(head[start + k : start + k + 2], "little") for k in (26, 28))
    assert start + 30 + name + extra == offset
    assert offset % 64 == 0
    assert ends == offset + nbytes
