"""safetensors: the contract of all formats, single files and sharded folders, and hostile headers.

Files are written, and results read, by the format's own library, and float8 by ml_dtypes.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import deserialize, safe_open
from safetensors.numpy import load_file, save_file

from polyak_cli import average
from polyak_cli.errors import CheckpointError, FormatError, MismatchError, OutputError, PolyakError
from polyak_cli.formats.catalogue import detect
from tests.contract import Contract, Tensors, assert_same, content, naive
from tests.counting import count_reads
from tests.oracle import nearest_bfloat16

INDEX = "model.safetensors.index.json"
RECORD = "polyak_provenance.json"


def write_folder(folder: Path, tensors: Tensors, shards: int = 2) -> Path:
    """Write a sharded checkpoint as Transformers does, the shards by the library."""
    folder.mkdir(exist_ok=True)
    names = [f"model-{k + 1:05d}-of-{shards:05d}.safetensors" for k in range(shards)]
    places = {tensor: names[k % shards] for k, tensor in enumerate(tensors)}
    for name in names:
        held = {tensor: tensors[tensor] for tensor in tensors if places[tensor] == name}
        save_file(held, folder / name, {"format": "pt"})
    total = sum(values.nbytes for values in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return folder


def read_folder(folder: Path) -> Tensors:
    """Read a sharded checkpoint by its index, and check every word of the index."""
    index = json.loads((folder / INDEX).read_text())
    held: Tensors = {}
    for name in sorted(set(index["weight_map"].values())):
        shard = load_file(folder / name)
        assert {t for t, where in index["weight_map"].items() if where == name} == set(shard)
        held |= shard
    assert sum(values.nbytes for values in held.values()) == index["metadata"]["total_size"]
    names = {path.name for path in folder.iterdir()} - {RECORD}
    assert names == {INDEX, *index["weight_map"].values()}
    return held


class TestFile(Contract):
    """One file."""

    suffix = ".safetensors"

    def write(self, path: Path, tensors: Tensors) -> None:
        """See `Contract.write`."""
        save_file(tensors, path, {"format": "pt"})

    def read(self, path: Path) -> Tensors:
        """See `Contract.read`."""
        return load_file(path)


class TestFolder(Contract):
    """Shards and their index; the output is such a folder too."""

    suffix = ""

    @property
    def result(self) -> str:
        """A name without suffix, as that of a folder is."""
        return "_average"

    def write(self, path: Path, tensors: Tensors) -> None:
        """See `Contract.write`."""
        write_folder(path, tensors)

    def read(self, path: Path) -> Tensors:
        """See `Contract.read`."""
        return read_folder(path)

    @pytest.mark.slow
    def test_a_truncated_file_is_refused_wherever_it_ends(self, tmp_path: Path) -> None:
        """Each shard, and the index."""
        paths, _ = self.write_run(tmp_path / "run", 2)
        for file in sorted(paths[0].iterdir()):
            whole = file.read_bytes()
            # Without the line's end the index still says everything.
            for length in {0, 1, 7, len(whole) - 2, *range(8, len(whole) - 2, len(whole) // 6)}:
                file.write_bytes(whole[:length])
                with pytest.raises(PolyakError, match="model_1"):
                    average(paths, tmp_path / "o")
            file.write_bytes(whole)
        assert os.listdir(tmp_path) == ["run"]


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header and the tensors' bytes, taken apart by hand."""
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    assert length % 8 == 0
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def test_equal_checkpoints_average_to_the_template_but_for_the_record(tmp_path: Path) -> None:
    """Names, order, offsets, metadata and every bit of the tensors are the template's."""
    tensors = TestFile().tensors(0)
    for name in ("m_1", "m_2", "m_3"):
        save_file(tensors, tmp_path / f"{name}.safetensors", {"format": "pt", "note": "höhe\n"})
    average(tmp_path, tmp_path / "o.safetensors", scheme="exp")
    header, data = header_of(tmp_path / "o.safetensors")
    expected, expected_data = header_of(tmp_path / "m_3.safetensors")
    record = header["__metadata__"].pop("polyak_provenance")
    assert len(json.loads(record)["inputs"]) == 3
    assert list(header) == list(expected)
    assert (header, data) == (expected, expected_data)


def test_a_file_in_an_order_of_its_own_keeps_it(tmp_path: Path) -> None:
    """The library reads tensors in any order of names and bytes; so does the average."""
    said = {
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        "a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
    }
    for k in (1, 2):
        put(tmp_path / f"m_{k}.safetensors", said, np.full(3, k, "<f4").tobytes())
    average(tmp_path, tmp_path / "o.safetensors")
    header, _ = header_of(tmp_path / "o.safetensors")
    assert [header["b"], header["a"]] == [said["b"], said["a"]]
    assert list(header)[1:] == ["b", "a"]
    assert load_file(tmp_path / "o.safetensors")["b"].tolist() == [1.5, 1.5]


def test_a_length_that_looks_like_json_does_not_confuse(tmp_path: Path) -> None:
    """A header of 123 bytes, which some writers do not pad, makes a file begin with a brace."""
    said = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(123)
    path = put(tmp_path / "m_1.safetensors", said, np.array(3, "<f4").tobytes())
    assert path.read_bytes().startswith(b"{")
    average(path, tmp_path / "o.safetensors")
    assert load_file(tmp_path / "o.safetensors")["x"].tolist() == [3]


def put(path: Path, said: object, data: bytes = b"") -> Path:
    """Write a file with any header."""
    text = said if isinstance(said, bytes) else json.dumps(said).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


# --- narrow types ---------------------------------------------------------------------------------


def stored(path: Path) -> dict[str, tuple[str, bytes]]:
    """Return dtype and bytes of all tensors as the library tells them."""
    rows = deserialize(path.read_bytes())  # type: ignore[no-untyped-call] # its stub says nothing
    return {name: (row["dtype"], bytes(row["data"])) for name, row in rows}


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_narrow_types_are_averaged_and_rounded_once(tmp_path: Path, dtype: str) -> None:
    """Types that numpy lacks are averaged like the others, subnormals included."""
    rng = np.random.default_rng(0)
    scale = 2.0 ** rng.integers(-9, 3, 999)
    models = [(rng.normal(size=999) * scale).astype(dtype) for _ in range(2)]
    for k, values in enumerate(models):
        save_file({"x": values}, tmp_path / f"m_{k}.safetensors")
    average(tmp_path, tmp_path / "o.safetensors")
    # The sum of two such values is exact in float64, and for float8 in float32 too.
    mean = (models[0].astype(np.float64) + models[1].astype(np.float64)) / 2
    if dtype == "bfloat16":
        expected = np.array([nearest_bfloat16(value) for value in mean], "<u2").tobytes()
    else:
        expected = mean.astype(np.float32).astype(dtype).tobytes()
    name, found = stored(tmp_path / "o.safetensors")["x"]
    assert name == {"b": "BF16", "4": "F8_E4M3", "5": "F8_E5M2"}[dtype.replace("float8_e", "")[0]]
    assert found == expected


@pytest.mark.parametrize(("dtype", "most"), [("float8_e4m3fn", 448), ("float8_e5m2", 57344)])
def test_an_average_that_float8_cannot_store_is_an_error(
    tmp_path: Path, dtype: str, most: float
) -> None:
    """E4M3FN has no infinity, and its NaN is not written in its place."""
    path = tmp_path / "m_1.safetensors"
    save_file({"x": np.array([most, -0.0, most / 3])}, path)
    average(path, tmp_path / "o.safetensors", dtype=dtype)
    _, found = stored(tmp_path / "o.safetensors")["x"]
    assert found == np.array([most, -0.0, most / 3], np.float32).astype(dtype).tobytes()
    save_file({"x": np.array([most * 1.2])}, path)
    with pytest.raises(MismatchError, match=f"'x' holds .* which {dtype} cannot store"):
        average(path, tmp_path / "p.safetensors", dtype=dtype)


def test_quantised_float8_is_refused(tmp_path: Path) -> None:
    """A kernel and its scale mean nothing but together, so each averaged alone is neither."""
    path = tmp_path / "m_1.safetensors"
    values = np.ones(4).astype(ml_dtypes.float8_e4m3fn)
    save_file({"a.weight": values, "a.weight_scale_inv": np.ones(1, np.float32)}, path)
    with pytest.raises(MismatchError, match=r"'a\.weight' is quantised"):
        average(path, tmp_path / "o.safetensors")


def test_what_cannot_be_averaged_is_carried_only_when_asked(tmp_path: Path) -> None:
    """Types without an average are named; --exclude-tensors carries them bit for bit."""
    said = {
        "e": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]},
        "f": {"dtype": "F4", "shape": [2, 4], "data_offsets": [4, 8]},
        "x": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
    }
    path = put(tmp_path / "m_1.safetensors", said, bytes(range(8)) + bytes(8))
    with pytest.raises(MismatchError, match="'e' is of type float8_e8m0fnu, which is not averaged"):
        average(path, tmp_path / "o.safetensors")
    average(path, tmp_path / "o.safetensors", exclude_tensors=["[ef]"], dtype="float64")
    found = stored(tmp_path / "o.safetensors")
    assert found["e"] == ("F8_E8M0", bytes(range(4)))
    assert found["f"] == ("F4", bytes(range(4, 8)))
    assert found["x"] == ("F64", bytes(16))


def test_another_type_keeps_every_tensor_aligned(tmp_path: Path) -> None:
    """The library can map the file: every offset is a multiple of its type's width."""
    path = tmp_path / "m_1.safetensors"
    save_file({"a": np.ones(3, np.float32), "b": np.ones(3, np.int32), "c": np.ones(1)}, path)
    average(path, tmp_path / "o.safetensors", dtype="float16")
    header, _ = header_of(tmp_path / "o.safetensors")
    for name, width in (("a", 2), ("b", 4), ("c", 2)):
        assert header[name]["data_offsets"][0] % width == 0
    assert load_file(tmp_path / "o.safetensors")["b"].tolist() == [1, 1, 1]


# --- folders --------------------------------------------------------------------------------------


def write_trainer_run(folder: Path, steps: Sequence[int], shards: int = 2) -> list[Tensors]:
    """Write a run as Transformers' Trainer leaves it, with all that lies beside the tensors."""
    folder.mkdir()
    models = [TestFile().tensors(step) for step in steps]
    for step, tensors in zip(steps, models, strict=True):
        checkpoint = folder / f"checkpoint-{step}"
        if shards > 1:
            write_folder(checkpoint, tensors, shards)
        else:
            checkpoint.mkdir()
            save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
        for name in ("optimizer.pt", "rng_state.pth", "trainer_state.json", "config.json"):
            (checkpoint / name).write_bytes(b"{}")
    save_file(models[-1], folder / "model.safetensors", {"format": "pt"})  # Trainer.save_model()
    (folder / "runs").mkdir()
    return models


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_the_folder_of_a_trainer_is_a_run(tmp_path: Path, shards: int) -> None:
    """Its checkpoints are ordered by their steps; the final model beside them is none of them."""
    models = write_trainer_run(tmp_path / "run", [1000, 500, 1500], shards)
    report = average(tmp_path / "run", tmp_path / "o.safetensors", scheme="exp")
    chosen = report.plan.checkpoints
    assert [checkpoint.epoch for checkpoint in chosen] == [500, 1000, 1500]
    reasons = {passed.path.name: passed.reason for passed in report.plan.passed_over}
    assert reasons["model.safetensors"] == ("the only .safetensors file among 3 checkpoint folders")
    assert any("only the tensors are written" in note for note in report.notes)
    ordered = [models[1], models[0], models[2]]
    assert_same(load_file(tmp_path / "o.safetensors"), naive(ordered, report.plan.mean.multipliers))
    with safe_open(tmp_path / "o.safetensors", "np") as file:
        assert file.metadata()["format"] == "pt"


def test_a_folder_that_is_one_checkpoint_may_be_named_in_three_ways(tmp_path: Path) -> None:
    """By itself, by its index, or by a pattern; it is one checkpoint, however many shards."""
    models = write_trainer_run(tmp_path / "run", [500, 1000])
    older, newer = (tmp_path / f"run/checkpoint-{step}" for step in (500, 1000))
    expected = naive(models, [1, 1])
    pattern = str(tmp_path / f"run/checkpoint-*/{INDEX}")
    ways: list[list[str | Path]] = [[older, newer], [older / INDEX, newer / INDEX], [pattern]]
    for k, sources in enumerate(ways):
        report = average(sources, tmp_path / f"{k}.safetensors")
        assert [checkpoint.epoch for checkpoint in report.plan.checkpoints] == [500, 1000]
        assert_same(load_file(tmp_path / f"{k}.safetensors"), expected)


def test_one_checkpoint_named_twice_is_refused(tmp_path: Path) -> None:
    """A folder and its own index are one and the same."""
    write_trainer_run(tmp_path / "run", [500])
    folder = tmp_path / "run/checkpoint-500"
    link = tmp_path / "link"
    link.symlink_to(folder)
    for other in (folder / INDEX, link):
        with pytest.raises(CheckpointError, match=r"given twice|the same file"):
            average([folder, other], tmp_path / "o.safetensors")


def test_a_folder_with_two_models_is_not_guessed_at(tmp_path: Path) -> None:
    """A single file left beside newer shards: the error names both."""
    folder = write_folder(tmp_path / "checkpoint-1", {"x": np.ones(3)})
    save_file({"x": np.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds model\.safetensors and model\.safetensors\."):
        average(folder, tmp_path / "o.safetensors")


def test_a_run_of_single_files_is_not_taken_for_its_final_model(tmp_path: Path) -> None:
    """A model.safetensors beside numbered ones hides none of them: the error says what to do."""
    for name in ("model-1", "model-2", "model"):
        save_file({"x": np.full(3, len(name), np.float32)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"--exclude 'model\.safetensors'"):
        average(tmp_path, tmp_path / "o.safetensors")
    report = average(tmp_path, tmp_path / "o.safetensors", exclude=["model.safetensors"])
    assert [checkpoint.epoch for checkpoint in report.plan.checkpoints] == [1, 2]


def test_shards_without_their_index_are_no_checkpoints(tmp_path: Path) -> None:
    """They are not taken for the epochs 1 and 2 of a run."""
    folder = write_folder(tmp_path / "run", {"x": np.ones(3), "y": np.ones(3)})
    (folder / INDEX).unlink()
    with pytest.raises(CheckpointError, match="one shard of several"):
        average(folder, tmp_path / "o.safetensors")


def write_pair(tmp_path: Path) -> tuple[list[Path], Tensors]:
    """Write two sharded checkpoints; return them and their average."""
    models = [TestFile().tensors(seed) for seed in range(2)]
    paths = [write_folder(tmp_path / f"checkpoint-{k}", models[k]) for k in range(2)]
    return paths, naive(models, [1, 1])


def test_an_older_folder_is_replaced_only_when_forced(tmp_path: Path) -> None:
    """Swapped whole, its mode kept; an empty one is filled without asking."""
    paths, expected = write_pair(tmp_path)
    output = tmp_path / "averaged"
    output.mkdir()
    average(paths, output)
    assert_same(read_folder(output), expected)
    older = content(output)
    with pytest.raises(OutputError, match="already exists; use --force"):
        average(paths[:1], output)
    assert content(output) == older
    output.chmod(0o750)
    average(paths[1:], output, force=True)
    assert content(output) != older
    assert output.stat().st_mode & 0o777 == 0o750
    assert sorted(os.listdir(tmp_path)) == ["averaged", "checkpoint-0", "checkpoint-1"]


@pytest.mark.parametrize("name", ["config.json", "sub/x.safetensors", "notes.safetensors"])
def test_nothing_else_in_a_folder_is_ever_deleted(tmp_path: Path, name: str) -> None:
    """A folder that holds anything an average would not is refused, --force or not."""
    paths, _ = write_pair(tmp_path)
    mine = tmp_path / "averaged" / name
    mine.parent.mkdir(parents=True)
    if name.startswith("notes"):
        mine.symlink_to(paths[0] / INDEX)
    else:
        mine.write_text("mine")
    with pytest.raises(OutputError, match="which is not part of an average"):
        average(paths, tmp_path / "averaged", force=True)
    assert os.path.lexists(mine)
    assert sorted(os.listdir(tmp_path)) == ["averaged", "checkpoint-0", "checkpoint-1"]


def test_a_checkpoint_is_not_replaced_by_its_average(tmp_path: Path) -> None:
    """Not even when forced."""
    paths, _ = write_pair(tmp_path)
    before = content(paths[1])
    with pytest.raises(OutputError, match="holds the checkpoint"):
        average(paths, paths[1], force=True)
    assert content(paths[1]) == before


@pytest.mark.parametrize("folder_before", [False, True])
def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path, folder_before: bool) -> None:
    """A value that is not finite, found late, leaves what was there before and nothing else."""
    paths, _ = write_pair(tmp_path)
    output = tmp_path / "averaged"
    if folder_before:
        average(paths, output)
    before = content(tmp_path / "averaged") if folder_before else {}
    broken = TestFile().tensors(0) | {"scale": np.array(np.inf, np.float32)}
    write_folder(paths[0], broken)
    with pytest.raises(MismatchError, match="'scale' holds inf"):
        average(paths, output, force=True)
    assert (content(output) if folder_before else {}) == before
    assert len(os.listdir(tmp_path)) == 2 + folder_before


def test_an_older_folder_comes_back_when_the_swap_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is moved aside first; if the new one cannot take its name, it gets its own again."""
    paths, _ = write_pair(tmp_path)
    output = tmp_path / "averaged"
    average(paths[:1], output)
    before, rename = content(output), Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputError, match="averaged: cannot be written: Input/output error"):
        average(paths, output, force=True)
    assert content(output) == before
    assert sorted(os.listdir(tmp_path)) == ["averaged", "checkpoint-0", "checkpoint-1"]


def test_the_types_of_shards_change_with_their_index(tmp_path: Path) -> None:
    """The index's total_size is that of the tensors, which `read_folder` compares."""
    paths, _ = write_pair(tmp_path)
    average(paths, tmp_path / "averaged", dtype="bfloat16")
    index = json.loads((tmp_path / "averaged" / INDEX).read_text())
    nbytes = sum(
        len(data)
        for name in set(index["weight_map"].values())
        for _, data in stored(tmp_path / "averaged" / name).values()
    )
    assert index["metadata"]["total_size"] == nbytes


def test_shards_that_say_different_things_become_no_single_file(tmp_path: Path) -> None:
    """One file has one set of metadata: the error names what would be lost, before any work."""
    paths, _ = write_pair(tmp_path)
    shard = paths[1] / "model-00002-of-00002.safetensors"
    save_file(load_file(shard), shard, {"format": "np"})
    with pytest.raises(OutputError, match="different values of 'format'"):
        average(paths, tmp_path / "o.safetensors")
    average(paths, tmp_path / "averaged")
    with safe_open(tmp_path / "averaged" / shard.name, "np") as file:
        assert file.metadata()["format"] == "np"


# --- files that mean harm -------------------------------------------------------------------------

X: dict[str, Any] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
TWICE = b'{"x":%b,"x":%b}' % ((json.dumps(X).encode(),) * 2)
HOSTILE: dict[str, tuple[object, str]] = {
    "a hole": ({"x": X, "y": X | {"data_offsets": [12, 20]}}, "4 bytes before tensor 'y'"),
    "an overlap": ({"x": X, "y": X | {"data_offsets": [4, 12]}}, "'x' and 'y' overlap"),
    "the same bytes twice": ({"x": X, "y": X}, "overlap"),
    "a hole at the start": ({"x": X | {"data_offsets": [8, 16]}}, "8 bytes before tensor 'x'"),
    "outside the file": ({"x": X | {"shape": [99], "data_offsets": [0, 396]}}, "'x' lies outside"),
    "bytes of no tensor": ({"x": X | {"shape": [1], "data_offsets": [0, 4]}}, "at its end"),
    "offsets that run back": ({"x": X | {"data_offsets": [8, 0]}}, "'x' has the data_offsets"),
    "one offset": ({"x": X | {"data_offsets": [8]}}, "'x' has the data_offsets"),
    "a negative offset": ({"x": X | {"data_offsets": [-8, 0]}}, "'x' has the data_offsets"),
    "a shape bomb": ({"x": X | {"shape": [1 << 40, 1 << 40]}}, "'x' has 8 bytes; expected 4.8"),
    "an overflowing shape": ({"x": X | {"shape": [1 << 62, 4, 2]}}, "'x' has 8 bytes"),
    "a shape beyond all floats": ({"x": X | {"shape": [1 << 62] * 64}}, "'x' has 8 bytes"),
    "a negative shape": ({"x": X | {"shape": [-2, -1]}}, "'x' has the shape"),
    "a shape of floats": ({"x": X | {"shape": [2.0]}}, "'x' has the shape"),
    "a shape of truths": ({"x": X | {"shape": [True, 2]}}, "'x' has the shape"),
    "65 dimensions": ({"x": X | {"shape": [1] * 64 + [2]}}, "'x' has the shape"),
    "half a byte": (
        {"x": {"dtype": "F4", "shape": [1], "data_offsets": [0, 0]}},
        "'x' has 0 bytes",
    ),
    "an unknown type": ({"x": X | {"dtype": "F128"}}, "'x' has an unknown type, F128"),
    "a type that is none": ({"x": X | {"dtype": ["F32"]}}, "'x' has an unknown type"),
    "something more": ({"x": X | {"scale": 2}}, "'x' is not described by"),
    "something less": ({"x": {"dtype": "F32", "shape": [2]}}, "'x' is not described by"),
    "no description": ({"x": "y"}, "'x' is not described by"),
    "a name twice": (TWICE, "names 'x' twice"),
    "a nested name twice": (b'{"x":{"dtype":"F32","dtype":"F16"}}', "names 'dtype' twice"),
    "metadata that are no texts": ({"__metadata__": {"a": 1}, "x": X}, "__metadata__ does not map"),
    "no JSON": (b"{" + b"\xff" * 9, "its header is not JSON"),
    "JSON behind JSON": (b"{}{}", "its header is not JSON"),
    "half a character": (
        b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        "not JSON",
    ),
    "deep nesting": (b'{"x":' + b"[" * 100_000, "its header is not JSON"),
    "a number without end": (b'{"x":{"shape":[' + b"9" * 10_000 + b"]}}", "not JSON"),
    "a name of control characters": ({"\x1b[31m": "y"}, r"tensor '\\x1b\[31m' is not"),
    "no tensors": ({}, "8 bytes at its end"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_headers_that_mean_harm_are_refused(tmp_path: Path, case: str) -> None:
    """Each costs one line that names the file and, where there is one, the tensor."""
    said, message = HOSTILE[case]
    path = put(tmp_path / "m_1.safetensors", said, bytes(8))
    with pytest.raises(FormatError, match=message) as caught:
        average(path, tmp_path / "o.safetensors")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == [path.name]


def test_headers_over_a_hundred_megabytes_are_not_read(tmp_path: Path) -> None:
    """Nothing is allocated because a header claims it; and what a file has not, is not expected."""
    path = tmp_path / "m_1.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 100_000_001) + b"{")
        file.truncate(200_000_000)
    with pytest.raises(FormatError, match="a header of 100000001 bytes; expected at most"):
        average(path, tmp_path / "o.safetensors")
    path.write_bytes(struct.pack("<Q", 1 << 39) + b"{}" + bytes(100))
    with pytest.raises(FormatError, match="less than its header needs"):
        average(path, tmp_path / "o.safetensors")


def test_an_empty_and_a_tensor_without_elements_are_carried(tmp_path: Path) -> None:
    """Zero-size and 0-d tensors, and 64 dimensions, are as the library has them."""
    tensors: Tensors = {
        "none": np.zeros((3, 0), np.float32),
        "deep": np.ones((1,) * 64, np.float32),
        "": np.array(2.0, np.float32),
        "x" * 20_000: np.ones(2, np.float32),
    }
    save_file(tensors, tmp_path / "m_1.safetensors")
    average(tmp_path, tmp_path / "o.safetensors")
    assert_same(load_file(tmp_path / "o.safetensors"), tensors)


SHARD = "model-00001-of-00002.safetensors"
MAPS: dict[str, tuple[object, str]] = {
    "a path": ({"x": f"../checkpoint-1/{SHARD}"}, "expected the name of a .safetensors file"),
    "an absolute path": ({"x": f"/{SHARD}"}, "file in the same folder"),
    "the folder above": ({"x": "..", "y": f"./{SHARD}"}, "file in the same folder"),
    "no name": ({"x": 3, "y": SHARD}, "files in the same folder"),
    "another kind of file": ({"x": "pytorch_model.bin", "y": SHARD}, "file in the same folder"),
    "a shard that is missing": ({"x": "other.safetensors"}, r"other\.safetensors: cannot be read"),
    "a tensor that is missing": ({"x": SHARD, "y": SHARD}, "has no tensor 'y'"),
    "a tensor that is nowhere": ({"x": SHARD}, "has a tensor 'z', which .* says is nowhere"),
    "no map": ([SHARD], "has no weight_map"),
}


@pytest.mark.parametrize("case", MAPS)
def test_an_index_that_its_shards_belie_is_refused(tmp_path: Path, case: str) -> None:
    """No path leads out of the folder, and every tensor is where the index says."""
    folder = write_folder(tmp_path / "checkpoint-1", {name: np.ones(3) for name in "xyz"})
    weight_map, message = MAPS[case]
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | {"weight_map": weight_map}))
    with pytest.raises(PolyakError, match=message):
        average(folder, tmp_path / "o.safetensors")
    assert os.listdir(tmp_path) == ["checkpoint-1"]


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    """Which of the two is meant is not guessed."""
    folder = write_folder(tmp_path / "checkpoint-1", {"x": np.ones(3), "y": np.ones(3)})
    second = folder / "model-00002-of-00002.safetensors"
    save_file({"x": np.zeros(3), "y": np.ones(3)}, second)
    with pytest.raises(
        FormatError, match=rf"{second.name}: has a tensor 'x'.*says is in .*{SHARD}"
    ):
        average(folder, tmp_path / "o.safetensors")


def test_a_shard_that_is_a_pipe_holds_nothing_up(tmp_path: Path) -> None:
    """It is no regular file."""
    folder = write_folder(tmp_path / "checkpoint-1", {"x": np.ones(3), "y": np.ones(3)})
    (folder / SHARD).unlink()
    os.mkfifo(folder / SHARD)
    with pytest.raises(FormatError, match=f"{SHARD}: is not a regular file"):
        average(folder, tmp_path / "o.safetensors")


def test_shards_that_are_links_are_followed(tmp_path: Path) -> None:
    """The cache in which models of a hub are kept has nothing but links."""
    folder = write_folder(tmp_path / "checkpoint-1", {"x": np.ones(3), "y": np.ones(3)})
    (folder / SHARD).rename(tmp_path / "blob")
    (folder / SHARD).symlink_to(tmp_path / "blob")
    average(folder, tmp_path / "o.safetensors")
    assert load_file(tmp_path / "o.safetensors")["x"].tolist() == [1, 1, 1]


def test_a_header_whose_length_begins_like_json_is_recognised_by_it(tmp_path: Path) -> None:
    """No byte of a tensor is read, though "{" is the length's first byte."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header = header.ljust(ord("{"))
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with count_reads(tmp_path) as log:
        assert detect(path) == "safetensors"
    assert all(read.offset + read.nbytes <= 8 + len(header) for read in log.reads())
