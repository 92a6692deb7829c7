"""Files and folders of other programs are named as what they are, with what to do.

Heads of files are written by hand from the formats' descriptions; what libraries here write is
written by them in tests/keras and tests/torch.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from polyak_cli import average, check, diff, inspect
from polyak_cli.errors import PolyakError
from polyak_cli.formats.catalogue import detect
from tests.command import polyak


def archive(*members: str) -> bytes:
    """Return a zip archive with empty members."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        for name in members:
            file.writestr(name, b"")
    return made.getvalue()


def tarred() -> bytes:
    """Return a tar archive."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as file:
        file.addfile(tarfile.TarInfo("model_weights.ckpt"))
    return made.getvalue()


def array() -> bytes:
    """Return a single array as numpy saves it."""
    made = io.BytesIO()
    np.save(made, np.ones(3))
    return made.getvalue()


OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
#: Name of a file, its content, how it is named, and words of what to do.
FILES: list[tuple[str, bytes, str, str]] = [
    ("m.gguf", b"GGUF\x03\0\0\0" + bytes(60), "GGUF", "average the checkpoints"),
    ("m.bin", b"GGUF\x03\0\0\0" + bytes(60), "GGUF", "average the checkpoints"),
    ("m.onnx", b"\x08\x08\x12\x07pytorch\x1a\x032.0:\x10", "ONNX", "average the checkpoints"),
    ("m_1.msgpack", b"\x81\xa6params\x81\xa5Dense", "msgpack", "flax.serialization"),
    ("checkpoint_1", b"\x83\xa4step\x01\xa6params", "msgpack", "flax.serialization"),
    ("saved_model.pb", b"\x08\x01\x12\xbe\xe8\x02\n\xcb", "SavedModel", "variables.index"),
    ("frozen.pb", b"\n\x1c\n\x01x\x12\x0bPlaceholder", "TensorFlow graph", "frozen from"),
    ("m.tflite", b"\x1c\0\0\0TFL3" + bytes(30), "TFLite", "average the checkpoints"),
    ("m.mlmodel", b"\x08\x04\x12\x10\n\x05image", "Core ML", "average the checkpoints"),
    ("m.pth", OLD_TORCH, "in the format before PyTorch 1.6", "save it again with torch.save"),
    ("m.pkl", pickle.dumps({"w": 1}, 4), "pickle", "if you trust its source"),
    ("m.pt", pickle.dumps({"w": 1}, 2), "pickle", "if you trust its source"),
    ("m.joblib", zlib.compress(pickle.dumps({"w": 1}), 3), "zlib", "unpack it"),
    ("m.pt2", archive("m/archive_format", "m/models/model.json"), "torch.export", "average"),
    ("m.h5.gz", gzip.compress(b"x", mtime=0), "gzip", "unpack it"),
    ("m.bz2", bz2.compress(b"x"), "bzip2", "unpack it"),
    ("m.xz", lzma.compress(b"x"), "xz", "unpack it"),
    ("m.nemo", tarred(), "tar archive", "unpack it"),
    ("m.zip", archive("readme.txt"), "zip archive", "unpack it"),
    ("m.npy", array(), "single numpy array", "numpy.savez"),
    ("m.h5", POINTER, "Git LFS pointer", "git lfs pull"),
    ("m.safetensors", POINTER, "Git LFS pointer", "git lfs pull"),
    ("m.keras", b"<!DOCTYPE html><html>sign in</html>", "HTML", "download the file again"),
    ("m.ckpt", b"\n<?xml version='1.0'?><Error>AccessDenied</Error>", "XML", "download"),
    ("m.npz", b"", "empty (0 bytes)", "leave it out"),
    ("m.pt", bytes(4096), "zeros", "save it again"),
    ("config.json", b'{"model_type": "bert"}', "JSON", "name the file of the tensors"),
    ("__0_0.distcp", archive("archive/data.pkl"), "(DCP)", "name the folder"),
    (".metadata", b"{}", "(DCP)", "save it again"),
    ("m.h5", b"hello world", "not an HDF5 file", "save it again"),
    ("m.keras", b"hello world", "not a .keras archive", "save it again"),
    ("m.pt", b"hello world", "not a file of torch.save", "save it again"),
    ("notes", b"hello world", "not a checkpoint in a known format", "expected Keras's"),
]


@pytest.mark.parametrize(("name", "content", "what", "advice"), FILES)
def test_a_file_of_another_program_is_named(
    tmp_path: Path, name: str, content: bytes, what: str, advice: str
) -> None:
    """`average`, `inspect`, `diff` and `check` say the same in one line."""
    path = tmp_path / name
    path.write_bytes(content)
    calls: tuple[Callable[[], object], ...] = (
        lambda: average([path], tmp_path / "o.npz"),
        lambda: list(inspect([path])),
        lambda: diff(path, path),
    )
    said = []
    for call in calls:
        with pytest.raises(PolyakError) as raised:
            call()
        said.append(str(raised.value))
    said += [problem.text for problem in check([path]).all_problems]
    assert len(said) == 4
    for text in said:
        assert text.startswith(f"{path}: is "), text
        assert what in text
        assert advice in text
        assert "\n" not in text
        assert "model.save()" not in text


#: Folder -> the names of the files in it, how it is named, and words of what to do.
FOLDERS: dict[str, tuple[list[str], str, str]] = {
    "SavedModel": (["saved_model.pb", "variables/x", "assets/y"], "SavedModel", "variables.index"),
    "DCP": (["__0_0.distcp", "__1_0.distcp"], "(DCP)", "not saved completely"),
    "DCP by rank": (["__0.metadata", "__0_0.distcp"], "(DCP)", "use_collectives=True"),
    "Orbax": (["manifest.ocdbt", "_sharding", "d/a"], "Orbax", "orbax.checkpoint"),
    "Orbax 0.2": (["checkpoint", "params.dense.kernel/.zarray"], "Orbax", "save it again"),
    "Core ML": (["Manifest.json", "Data/weight.bin"], "Core ML", "average the checkpoints"),
}


@pytest.mark.parametrize(("names", "what", "advice"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_of_another_program_is_named(
    tmp_path: Path, names: list[str], what: str, advice: str
) -> None:
    """As a source by itself, and as what a folder of a run holds."""
    for number in (1, 2):
        for name in names:
            path = tmp_path / "run" / f"step_{number}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"\x01")
    for source in (tmp_path / "run" / "step_1", tmp_path / "run"):
        for call in (lambda s: average(s, tmp_path / "o.npz"), check):
            with pytest.raises(PolyakError) as raised:
                call(source)
            text = str(raised.value)
            assert text.startswith(f"{source}: "), text
            assert what in text
            assert advice in text
            assert ".h5" not in text
    with pytest.raises(PolyakError, match="step_1: is ") as raised:
        list(inspect([tmp_path / "run" / "step_1"]))
    assert what in str(raised.value)


def test_a_folder_that_holds_only_such_files_says_so(tmp_path: Path) -> None:
    """Instead of a list of suffixes; the exit code is 3, and no traceback is printed."""
    (tmp_path / "run").mkdir()
    for number in (1, 2):
        (tmp_path / "run" / f"model_{number}.gguf").write_bytes(b"GGUF\x03\0\0\0" + bytes(60))
        (tmp_path / "run" / "config.json").write_text("{}")
    done = polyak("average", "run", "-o", "o.npz", cwd=tmp_path)
    assert done.returncode == 3
    assert done.stderr.startswith("error: run: holds no checkpoint, but model_1.gguf, which is a ")
    assert done.stderr.count("\n") == 1


def test_a_foreign_file_beside_checkpoints_is_passed_over_by_its_name(tmp_path: Path) -> None:
    """The plan says what it is, and the run is averaged."""
    for number in (1, 2):
        np.savez(tmp_path / f"m_{number}.npz", w=np.full(3, number, np.float32))
    (tmp_path / "m.onnx").write_bytes(b"\x08\x08\x12\x07pytorch")
    report = average(tmp_path, tmp_path / "o.npz")
    assert [passed.reason for passed in report.plan.passed_over] == ["an ONNX model"]
    with np.load(report.output) as found:
        np.testing.assert_array_equal(found["w"], np.full(3, 1.5, np.float32))


def test_hdf5_behind_a_block_of_the_users_own_is_recognised(tmp_path: Path) -> None:
    """Its signature stands at 512 bytes or a power of two times that (HDF5's specification)."""
    path = tmp_path / "m.h5"
    with h5py.File(path, "w", userblock_size=2048) as file:
        file["w"] = np.ones(3)
    assert detect(path) == "hdf5"


def test_advice_on_batchnorm_fits_the_format(tmp_path: Path) -> None:
    """A file without a model needs a function that returns it, or PyTorch's own `update_bn`."""
    from safetensors.numpy import save_file

    for number in (1, 2):
        tensors = {"bn.weight": np.ones(3, "f4"), "bn.running_mean": np.full(3, number, "f4")}
        save_file(tensors, tmp_path / f"m_{number}.safetensors")
    report = average(tmp_path, tmp_path / "o.safetensors")
    (note,) = (note for note in report.notes if "BatchNorm" in note)
    assert "update_bn" in note
    assert "--recalibrate DATA --model MODULE.py:FUNCTION" in note
