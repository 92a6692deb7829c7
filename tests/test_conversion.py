"""Outputs of another format than their checkpoints': nothing is lost, or it is refused."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save, save_file

from polyak_cli import average, plan, run
from polyak_cli.errors import FormatError, OutputError
from polyak_cli.pipeline.stages import Options
from tests.contract import Tensors, assert_same, naive
from tests.oracle import Array, write_model
from tests.test_keras_zip import VOCABULARY, members, write_archive
from tests.test_weights import write_shards


def layers(seed: int) -> dict[str, dict[str, Array]]:
    """Return the tensors of a Keras model."""
    rng = np.random.default_rng(seed)
    return {
        "dense": {
            "dense/kernel:0": rng.normal(3, size=(33, 17)).astype(np.float32),
            "dense/bias:0": rng.normal(3, size=17).astype(np.float16),
        },
        "count": {"seen": np.array(7, np.int64), "big": np.arange(9, dtype=">i4")},
        "a": {"mask": np.array([True, False, True]), "wide": rng.normal(3, size=5)},
        "none": {},
    }


def flat(model: dict[str, dict[str, Array]]) -> Tensors:
    """Return the tensors by the names that tables give them."""
    return {f"{layer}/{name}": values for layer in model for name, values in model[layer].items()}


def write_run(folder: Path) -> list[Tensors]:
    """Write two Keras models; return what is in them, little-endian."""
    folder.mkdir()
    models = [layers(seed) for seed in range(2)]
    for k, model in enumerate(models):
        write_model(folder / f"m_{k}.h5", model, optimizer={"adam/m": np.ones(4, np.float32)})
    return [
        {name: np.asarray(v).astype(v.dtype.newbyteorder("<")) for name, v in flat(model).items()}
        for model in models
    ]


def test_h5_becomes_what_the_library_itself_would_write(tmp_path: Path) -> None:
    """Byte for byte except the metadata, where every text of the Keras file is kept."""
    models = write_run(tmp_path / "run")
    output = tmp_path / "o.safetensors"
    average(tmp_path / "run", output, hash=False)
    with safe_open(output, "np") as file:
        said = file.metadata()
    with h5py.File(tmp_path / "run/m_1.h5") as file:
        for key in ("backend", "keras_version", "model_config"):
            text = file.attrs[key]
            assert said.pop(key) == (text.decode() if isinstance(text, bytes) else text)
    assert list(said) == ["polyak_provenance"]
    expected = save(naive(models, [0.5, 0.5]), {})
    found = output.read_bytes()
    length, known = (int.from_bytes(raw[:8], "little") for raw in (found, expected))
    assert found[8 + length :] == expected[8 + known :]
    assert found[8 : 8 + length].partition(b'"},')[2].strip() == (
        expected[8 : 8 + known].partition(b"{},")[2].strip()
    )


def test_npz_becomes_safetensors_and_comes_back(tmp_path: Path) -> None:
    """Stored and deflated, big-endian or not; through both, every array is the very same."""
    models = [flat(layers(seed)) for seed in range(2)]
    np.savez(tmp_path / "m_1.npz", **models[0])  # type: ignore[arg-type] # as in test_npz
    np.savez_compressed(tmp_path / "m_2.npz", **models[1])  # type: ignore[arg-type] # as above
    average([tmp_path / "m_1.npz", tmp_path / "m_2.npz"], tmp_path / "o.safetensors")
    expected = naive(models, [0.5, 0.5])
    expected["count/big"] = expected["count/big"].astype("<i4")
    assert_same(load_file(tmp_path / "o.safetensors"), expected)
    average(tmp_path / "o.safetensors", tmp_path / "back.npz")
    with np.load(tmp_path / "back.npz") as archive:
        assert_same(dict(archive), expected)


def test_legacy_weights_become_npz(tmp_path: Path) -> None:
    """A file without texts is nothing but names and arrays."""
    path = tmp_path / "w_1.h5"
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"dense"]
        file.create_group("dense").attrs["weight_names"] = [b"kernel"]
        file["dense"].create_dataset("kernel", data=np.arange(6.0), chunks=(2,), compression="gzip")
    average(path, tmp_path / "o.npz", dtype="float32")
    with np.load(tmp_path / "o.npz") as archive:
        assert_same(dict(archive), {"dense/kernel": np.arange(6, dtype=np.float32)})


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_keras_archives_become_safetensors(tmp_path: Path, method: int) -> None:
    """Configuration and assets are texts of its metadata, by their names."""
    models: list[Tensors] = [{"dense": np.full((3, 4), k, np.float32)} for k in (1, 2)]
    for k, tensors in enumerate(models):
        content = members(tensors)
        write_archive(tmp_path / f"m_{k}.keras", content, method)
    average(tmp_path, tmp_path / "o.safetensors")
    found = load_file(tmp_path / "o.safetensors")
    assert_same({"dense": found.pop("layers/dense/vars/0")}, naive(models, [0.5, 0.5]))
    with safe_open(tmp_path / "o.safetensors", "np") as file:
        said = file.metadata()
    assert not found
    assert said.keys() == {"config.json", "metadata.json", VOCABULARY, "polyak_provenance"}
    assert all(said[name] == content[name].decode() for name in said if name in content)
    refused(tmp_path, tmp_path / "m_1.keras", "o.npz", "would be lost: an .npz file holds")
    write_archive(tmp_path / "m_2.keras", content | {VOCABULARY: b"\xff"})
    refused(tmp_path, tmp_path / "m_2.keras", "p.safetensors", f"'{VOCABULARY}' is not text")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_shards_of_keras_weights_become_one_file(tmp_path: Path, suffix: str) -> None:
    """Their JSON says nothing that the tensors do not."""
    models: list[Tensors] = [
        {"a/vars/0": np.full(3, k, np.float32), "b/vars/0": np.full((2, 2), k)} for k in (1.0, 2.0)
    ]
    for k, model in enumerate(models):
        path = tmp_path / f"m_{k}.weights.json"
        write_shards(path, [{name: values} for name, values in model.items()])
    output = tmp_path / f"o{suffix}"
    average(tmp_path, output)
    found = dict(np.load(output)) if suffix == ".npz" else load_file(output)
    assert_same(found, naive(models, [0.5, 0.5]))


def refused(tmp_path: Path, source: Path, output: str, message: str, **options: object) -> None:
    """Expect a plan, which the dry run shows too, to be refused and nothing to be written."""
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(OutputError, match=message):
        plan(source, tmp_path / output, **Options(**options))  # type: ignore[typeddict-item] # any
    assert sorted(os.listdir(tmp_path)) == before


def test_what_would_be_lost_is_named(tmp_path: Path) -> None:
    """Texts in an .npz, optimizer state, other tensors, and attributes that are no texts."""
    write_run(tmp_path / "run")
    run = tmp_path / "run"
    refused(tmp_path, run, "o.npz", "'backend' would be lost: an .npz file holds only")
    refused(
        tmp_path, run, "o.safetensors", "optimizer state cannot be converted", optimizer="newest"
    )
    with h5py.File(run / "m_1.h5", "r+") as file:
        file.attrs["epoch"] = 3
    refused(tmp_path, run, "o.safetensors", "attribute 'epoch' of '/'.* would be lost")
    with h5py.File(run / "m_1.h5", "r+") as file:
        del file.attrs["epoch"]
        file["model_weights/dense"].create_dataset("more", data=np.ones(3))
    refused(tmp_path, run, "o.safetensors", "'/model_weights/dense/more', which is not part of")
    texts = np.array(["a", "ü"], object)
    path = write_model(tmp_path / "texts.h5", {"d": {"k": np.ones(3), "texts": texts}})
    refused(tmp_path, path, "o.safetensors", "tensor 'd/texts' holds strings, which would be lost")


def test_both_parts_of_big_endian_complex_numbers_are_carried(tmp_path: Path) -> None:
    """Each part has its bytes turned round by itself."""
    values = np.array([1 + 2j, -3.5 + 0.25j, 1e-9 - 7j], np.complex64)
    np.savez(tmp_path / "m_1.npz", k=np.ones(3), c=values.astype(">c8"))
    average(tmp_path / "m_1.npz", tmp_path / "o.safetensors", exclude_tensors=["c"])
    assert load_file(tmp_path / "o.safetensors")["c"].tolist() == values.tolist()


def test_a_checkpoint_that_changes_before_it_is_converted_is_refused(tmp_path: Path) -> None:
    """What is carried comes from the very file that was scanned."""
    write_run(tmp_path / "run")
    made = plan(tmp_path / "run", tmp_path / "o.safetensors")
    os.utime(tmp_path / "run/m_1.h5", ns=(1, 1))
    with pytest.raises(FormatError, match=r"m_1\.h5: changed while it was read"):
        run(made)
    assert sorted(os.listdir(tmp_path)) == ["run"]


def test_what_the_other_format_lacks_is_named(tmp_path: Path) -> None:
    """Strings, orders of axes, types and names."""
    arrays: dict[str, Array] = {
        "string": np.array(["a", "b"]),
        "stored in Fortran order": np.asfortranarray(np.ones((3, 4))),
    }
    for k, (message, values) in enumerate(arrays.items()):
        np.savez(tmp_path / f"m_{k}.npz", x=np.ones(3), y=values)
        refused(tmp_path, tmp_path / f"m_{k}.npz", "o.safetensors", f"'y' .*({message}|has type)")
    path = tmp_path / "m.safetensors"
    save_file({"x": np.ones(3, np.float32), "../y": np.ones(3, np.float32)}, path)
    refused(tmp_path, path, "o.npz", "'../y' has a name that leads out")
    save_file({"x": np.ones(3, np.float32)}, path, {"format": "pt", "note": "kept"})
    refused(tmp_path, path, "o.npz", "'note' would be lost")
    save_file({"x": np.ones(3, np.float32)}, path, {"format": "pt"})
    for dtype in ("bfloat16", "float8_e5m2"):
        refused(tmp_path, path, "o.npz", f"type {dtype}", dtype=dtype)
    average(path, tmp_path / "o.npz")
    with np.load(tmp_path / "o.npz") as archive:
        assert archive["x"].tolist() == [1, 1, 1]


def test_float8_is_not_written_where_it_is_unknown(tmp_path: Path) -> None:
    """Its bytes would look like integers in an .h5 or .npz."""
    write_run(tmp_path / "run")
    refused(tmp_path, tmp_path / "run", "o.h5", "no type float8_e4m3fn", dtype="float8_e4m3fn")
    np.savez(tmp_path / "m_1.npz", x=np.ones(3))
    refused(tmp_path, tmp_path / "m_1.npz", "o.npz", "no type float8_e5m2", dtype="float8_e5m2")


def test_a_suffix_that_is_none_of_these_is_refused(tmp_path: Path) -> None:
    """The checkpoints' own format is named."""
    write_run(tmp_path / "run")
    refused(
        tmp_path,
        tmp_path / "run",
        "o.onnx",
        "are Keras HDF5.*or .npz or .keras or .weights.h5 to conv",
    )


# --- a whole .h5 as .keras ------------------------------------------------------------------------


def described(*kinds: object) -> str:
    """Return the configuration of a Sequential with layers called a, b, ... of these classes."""
    named = zip("abcdef", kinds, strict=False)
    layers = [{"class_name": kind, "config": {"name": name}} for name, kind in named]
    return json.dumps({"class_name": "Sequential", "config": {"name": "m", "layers": layers}})


def test_tensors_of_an_archive_lie_in_the_tree_of_layers(tmp_path: Path) -> None:
    """Averaged, converted and carried ones; read back with plain h5py, in any order of bytes."""
    rng = np.random.default_rng(4)
    held: dict[str, dict[str, Array]] = {
        "a": {"m/a/kernel": rng.normal(3, size=(3, 4)).astype(">f4"), "m/a/bias": np.zeros(0)},
        "b": {"m/b/mean": np.array(2, np.float32), "m/b/count": np.arange(5, dtype=">i4")},
        "c": {"m/c/lstm_cell/kernel": rng.normal(size=(2, 2)).astype("<f8")},
    }
    config = described("Dense", "Normalization", "LSTM")
    write_model(tmp_path / "m.h5", held, config=config)
    average(tmp_path / "m.h5", tmp_path / "o.keras", dtype="float16")
    with zipfile.ZipFile(tmp_path / "o.keras") as archive:
        assert archive.testzip() is None
        said = json.loads(archive.read("config.json"))
        assert said["config"] == json.loads(config)["config"]
        assert (said["module"], said["class_name"]) == ("keras", "Sequential")
        assert json.loads(archive.read("metadata.json")) == {"keras_version": "3.15.1"}
        with archive.open("model.weights.h5") as member, h5py.File(member) as file:
            found = {f"{g}/{k}": file[f"layers/{g}/vars/{k}"][()] for g in ("dense",) for k in "01"}
            found |= {k: file[f"layers/normalization/vars/{k}"][()] for k in "01"}
            cell = file["layers/lstm/cell/vars/0"][()]
    assert found["dense/0"].dtype == cell.dtype == np.float16
    np.testing.assert_array_equal(found["dense/0"], held["a"]["m/a/kernel"].astype(np.float16))
    np.testing.assert_array_equal(cell, held["c"]["m/c/lstm_cell/kernel"].astype(np.float16))
    assert found["dense/1"].shape == (0,)
    assert found["0"] == 2
    assert found["1"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[]", "not a JSON object"),
        ("{", "damaged configuration"),
        ('{"a":' * 900 + "0" + "}" * 900, "nested|is a None"),
        ('{"class_name": "Sequential", "config": ' + "[" * 5000 + "]" * 5000 + "}", "damaged"),
        ('{"class_name": ["Sequential"]}', "expected a Sequential"),
        ('{"class_name": "Sequential"}', "'a' has tensors, but is no layer"),
        (described("Dense", None), "layer 'b' of class None"),
        (described("Dense", ["Dense"]), "layer 'b' of class"),
        (described("Dense", "Own>Dense"), "layer 'b' of class Own>Dense"),
        (described("Dense", "Bidirectional"), "layer 'b' of class Bidirectional"),
        (described("Dense", "TimeDistributed"), "layer 'None' of class None"),
        (described("Dense", "Sequential"), "layer 'b' of class Sequential"),
    ],
)
def test_a_configuration_without_certain_places_is_refused(
    tmp_path: Path, config: str, message: str
) -> None:
    """Damaged, hostile and unknown ones are one line each, and nothing is written."""
    one = np.ones(3, np.float32)
    held = {"a": {"m/a/kernel": one}, "b": {"m/b/kernel": one, "m/b/bias": one}}
    write_model(tmp_path / "m.h5", held, config=config)
    refused(tmp_path, tmp_path / "m.h5", "o.keras", message)
