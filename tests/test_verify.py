"""Verifying an average: an unchanged one verifies, and every change is found and named."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from polyak_cli import Discrepancy, PolyakError, Split, Verification, average, inspect, verify
from polyak_cli.averaging import hashing, schemes
from polyak_cli.engine import kernel, numpy_kernel
from polyak_cli.engine.kernel import name_other
from polyak_cli.errors import CheckpointError, FormatError, OutputError, UsageError
from polyak_cli.evaluation import batchnorm, recalibration
from polyak_cli.examining import bitwise
from polyak_cli.storage import Bytes, File, Version, publishing
from polyak_cli.tensors import Extent, Float64, Table, TensorSpec
from tests.command import PAUSE, SAMPLES, one_line, polyak, scripted, stopped, tree
from tests.oracle import Array, write_model

RECORD = "polyak_provenance"


def write_run(folder: Path, count: int = 3) -> list[Path]:
    """Write whole-model checkpoints of a run."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)

    def tensors() -> dict[str, Mapping[str, Array]]:
        values = rng.normal(3, size=(40, 25)).astype(np.float32)
        return {"dense": {"kernel": values, "bias": values[0].copy(), "steps": np.arange(5)}}

    return [write_model(folder / f"model_{k}.h5", tensors()) for k in range(1, count + 1)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that `run` copies."""
    folder = tmp_path_factory.mktemp("made")
    write_run(folder / "ckpts")
    average(folder / "ckpts", folder / "final.h5", scheme="exp", hash=False)
    average(folder / "ckpts", folder / "hashed.h5", scheme="exp")
    return folder


@pytest.fixture
def run(tmp_path: Path, made: Path) -> Path:
    """Return a folder with a run in ckpts/ and averages of it, without and with whole digests."""
    shutil.copytree(made, tmp_path / "run")  # the times stay
    return tmp_path / "run"


def verified(run: Path, name: str = "final.h5") -> Verification:
    """Verify an average of the run; check that the folder stays as it was."""
    before = tree(run)
    found = verify(run / name, sources=[run / "ckpts"])
    assert tree(run) == before
    return found


def problems(found: Verification, kind: str) -> dict[str, str]:
    """Return the problems of one kind, by the name of the input, tensor or file."""
    return {problem.name: problem.text for problem in found.problems if problem.kind == kind}


def record_of(path: Path) -> dict[str, Any]:
    """Return the record of an .h5 file, read by h5py."""
    with h5py.File(path) as file:
        found: dict[str, Any] = json.loads(file.attrs[RECORD])
    return found


def rewrite_record(path: Path, record: object) -> None:
    """Put another record into an .h5 file."""
    text = record if isinstance(record, str) else json.dumps(record, separators=(",", ":"))
    with h5py.File(path, "r+") as file:
        file.attrs[RECORD] = text


def unsealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record as written before records had their own digest."""
    return {key: value for key, value in record.items() if key != "sha256"}


def older(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record as the first version wrote it: without its own digest and multipliers."""
    inputs = [
        {key: value for key, value in one.items() if key != "multiplier"}
        for one in record["inputs"]
    ]
    rest = {key: value for key, value in unsealed(record).items() if key != "divisor"}
    return rest | {"inputs": inputs}


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with the right digest, as an attacker would make it."""
    rest = unsealed(record)
    text = json.dumps(rest, separators=(",", ":"))
    return rest | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


# --- what verifies --------------------------------------------------------------------------------


def test_an_average_verifies(tmp_path: Path) -> None:
    """The command says so and exits with 0; --json has the same result; no file is left behind."""
    shutil.copytree(SAMPLES, tmp_path / "ckpts")
    average(tmp_path / "ckpts", tmp_path / "ckpts/final.h5", last=4, scheme="linear")
    before = tree(tmp_path)
    done = polyak("verify", "ckpts/final.h5", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    line = "ckpts/final.h5: verified, equal bit for bit to the average of 4 checkpoints (16.9 kB)\n"
    assert done.stdout == line
    data = json.loads(polyak("verify", "ckpts/final.h5", "--json", cwd=tmp_path).stdout)
    assert data["verified"] is True
    assert data["problems"] == []
    assert [each["name"] for each in data["inputs"]] == [f"model_{k}.h5" for k in range(496, 500)]
    assert tree(tmp_path) == before


def test_an_average_by_the_earlier_rule_of_its_scheme_verifies(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record has the multipliers, so another rule for the scheme's name changes nothing."""
    with monkeypatch.context() as patch:
        # Each interval's steps for the checkpoint at its end, as `power` was before.
        old = replace(schemes.SCHEMES["power"], function=lambda _, **_sigma: [1.0, 7.0, 19.0])
        patch.setitem(schemes.SCHEMES, "power", old)
        average(run / "ckpts", run / "old.h5", scheme="power")
    assert record_of(run / "old.h5")["scheme"] == "power"
    assert [one["multiplier"] for one in record_of(run / "old.h5")["inputs"]] == [1.0, 7.0, 19.0]
    assert verified(run, "old.h5").verified


def test_the_folders_beside_an_average_are_searched(run: Path) -> None:
    """`polyak verify final.h5` finds the checkpoints of `polyak average ckpts/ -o final.h5`."""
    (run / "empty").mkdir()
    assert verify(run / "final.h5").verified
    assert not verify(run / "final.h5", sources=[run / "empty"]).verified
    shutil.copytree(run / "ckpts", run / "another")
    shutil.copy(run / "ckpts/model_1.h5", run / "another/model_2.h5")
    for name in ("hashed.h5", "final.h5"):
        assert verify(run / name).verified  # digests say which folder is meant
    shutil.rmtree(run / "ckpts")
    shutil.rmtree(run / "another")
    found = verify(run / "final.h5")
    assert set(problems(found, "input")) == {f"model_{k}.h5" for k in (1, 2, 3)}
    assert found.notes == ()


def test_the_working_folder_is_searched_for_what_was_averaged(run: Path) -> None:
    """After `average runs/ckpts -o out/final.h5`; a file of the name with other bytes is not it."""
    (run / "out").mkdir()
    (run / "runs").mkdir()
    shutil.move(run / "ckpts", run / "runs/ckpts")
    shutil.move(run / "final.h5", run / "out/final.h5")
    done = polyak("verify", "out/final.h5", cwd=run)
    assert (done.returncode, done.stderr) == (0, "")
    for k in (1, 2, 3):
        write_model(run / f"runs/ckpts/model_{k}.h5", {"dense": {"kernel": np.full((40, 25), k)}})
    done = polyak("verify", "out/final.h5", cwd=run)
    assert done.returncode == 1
    assert "'model_1.h5' is missing: no file of that name in out, two levels" in done.stdout


def test_folders_two_levels_below_an_average_are_searched(run: Path) -> None:
    """As in `polyak average runs/one/ckpts -o final.h5`; else the message names the option."""
    (run / "runs/one").mkdir(parents=True)
    shutil.move(run / "ckpts", run / "runs/ckpts")
    assert verify(run / "final.h5").verified
    shutil.move(run / "runs/ckpts", run / "runs/one/ckpts")
    found = verify(run / "final.h5")
    assert problems(found, "input")["model_1.h5"] == (
        f"'model_1.h5' is missing: no file of that name in {run}, two levels of folders below, or "
        "those of the working folder; name its folder with --source"
    )
    with_source = verify(run / "final.h5", sources=[run / "runs"])
    assert "two levels of" not in problems(with_source, "input")["model_1.h5"]


@pytest.mark.parametrize(
    ("output", "options"),
    [
        ("o.h5", {"dtype": "float16", "optimizer": "newest"}),
        ("o.h5", {"exclude_tensors": ["*bias"], "match": "order", "coefficients": [0, 3, 0.1]}),
        ("o.safetensors", {"dtype": "bfloat16"}),
        ("o.h5", {"last": 1, "hash": True}),
    ],
)
def test_every_option_of_the_average_is_followed(
    run: Path, output: str, options: dict[str, Any]
) -> None:
    """Types, conversions, carried tensors and coefficients of 0 are as recorded."""
    average(run / "ckpts", run / output, **options)
    assert verified(run, output).problems == ()


@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.floats(0, 1e6), min_size=3, max_size=3).filter(lambda found: sum(found) > 1e-3))
def test_coefficients_are_taken_as_recorded(run: Path, coefficients: list[float]) -> None:
    """They are exact in the record and are not normalised again."""
    average(run / "ckpts", run / "o.h5", coefficients=coefficients, force=True)
    assert verified(run, "o.h5").verified


def test_a_moved_and_renamed_average_verifies(run: Path) -> None:
    """The record holds neither the name nor the folder of the average."""
    (run / "elsewhere").mkdir()
    (run / "final.h5").rename(run / "elsewhere/model_3.h5")
    assert verified(run, "elsewhere/model_3.h5").problems == ()
    missing = problems(verify(run / "elsewhere/model_3.h5"), "input")
    assert [*missing] == ["model_1.h5", "model_2.h5", "model_3.h5"]  # not the average itself


def test_inputs_of_one_name_are_distinguished(tmp_path: Path) -> None:
    """Of two checkpoints of the same name, the one with the recorded digest is used."""
    one, two = (write_run(tmp_path / name, 2) for name in ("a", "b"))
    write_model(two[0], {"dense": {"kernel": np.ones((40, 25), np.float32)}})
    write_model(one[0], {"dense": {"kernel": np.zeros((40, 25), np.float32)}})
    average([one[0], two[0]], tmp_path / "o.h5", hash=True, coefficients=[1, 3])
    for sources in (["a", "b"], ["b", "a"]):
        assert verify(tmp_path / "o.h5", sources=[tmp_path / name for name in sources]).verified


def test_what_was_allowed_and_suspected_is_recorded(run: Path) -> None:
    """The record has both only where there are any, and such an average verifies."""
    for k in range(1, 7):  # epoch 6 was written before epoch 4: the run was resumed
        path = run / f"ckpts/model_{k}.h5"
        if not path.exists():
            shutil.copy(run / "ckpts/model_1.h5", path)
        os.utime(path, (1e9 + (350 if k == 6 else 100 * k),) * 2)
    average(run / "ckpts", run / "allowed.h5", allow=["two-runs"])
    record = record_of(run / "allowed.h5")
    assert record["options"]["allow"] == ["two-runs"]
    assert record["suspicions"] == ["resumed"]
    assert "allow" not in record_of(run / "final.h5")["options"]
    assert "suspicions" not in record_of(run / "final.h5")
    assert verified(run, "allowed.h5").verified


def test_older_records_have_no_digest_of_themselves(run: Path) -> None:
    """They are verified as far as possible, and a note says so."""
    rewrite_record(run / "final.h5", older(record_of(run / "final.h5")))
    found = verified(run)
    assert problems(found, "tensor") == problems(found, "input") == {}
    assert "has no digest of itself" in found.notes[0]


# --- one flipped bit ------------------------------------------------------------------------------


def flips(path: Path, count: int) -> list[int]:
    """Return positions all over a file, including some in its record."""
    content = path.read_bytes()
    start = content.find(b'"coefficient')
    chosen = random.Random(7).sample(range(len(content)), count)
    record = random.Random(8).sample(range(start - 200, start + 300), count // 2)
    return [*chosen, *(record if start >= 0 else ())]


def check_flips(run: Path, suffix: str, count: int) -> None:
    """Flip one bit at some positions: no such file verifies, and every error is one line."""
    if suffix == ".npz":
        shutil.rmtree(run / "ckpts")
        (run / "ckpts").mkdir()
        for k in (1, 2):
            np.savez(run / f"ckpts/m_{k}.npz", x=np.full((30, 20), k / 7), n=np.arange(4))
    output = run / f"flipped{suffix}"
    average(run / "ckpts", output, scheme="exp", hash=True)
    whole = output.read_bytes()
    missed = []
    for position in flips(output, count):
        content = bytearray(whole)
        content[position] ^= 1 << position % 8
        output.write_bytes(content)
        try:
            found = verify(output, sources=[run / "ckpts"])
        except PolyakError as error:  # the record itself is gone
            texts = [str(error)]
        else:
            texts = [problem.text for problem in found.problems]
        if not texts or any(len(text.splitlines()) != 1 for text in texts):
            missed.append(position)
    assert missed == []
    output.write_bytes(whole)
    assert verify(output, sources=[run / "ckpts"]).verified


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".h5", ".safetensors", ".npz"])
def test_a_flipped_bit_is_caught(run: Path, suffix: str) -> None:
    """In a tensor, in metadata, in the record, or in bytes that no reader uses."""
    check_flips(run, suffix, 4)


@pytest.mark.soak
@pytest.mark.parametrize("suffix", [".h5", ".safetensors", ".npz"])
def test_flipped_bits_all_over_the_file_are_caught(run: Path, suffix: str) -> None:
    """The same at many more places."""
    check_flips(run, suffix, 100)


def test_the_tensor_and_the_element_are_named(run: Path) -> None:
    """A note says that the inputs are as recorded."""
    for name in ("hashed.h5", "final.h5"):
        with h5py.File(run / name, "r+") as file:
            file["model_weights/dense/kernel"][2, 3] += 1
        found = verified(run, name)
        (text,) = problems(found, "tensor").values()
        assert "dense/kernel' differs in 1 of 1000 elements, first in element 53" in text
        assert problems(found, "input") == {}
        assert "every input has the SHA-256 recorded: the average was changed" in found.notes


def test_a_carried_tensor_and_an_attribute_are_named(run: Path) -> None:
    """Tensors and attributes that are not averaged are compared too."""
    with h5py.File(run / "hashed.h5", "r+") as file:
        file["model_weights/dense/steps"][4] = 9
    (text,) = problems(verified(run, "hashed.h5"), "tensor").values()
    assert "dense/steps' differs in 1 of 5 elements, first in element 4" in text
    content = (run / "final.h5").read_bytes()
    (run / "final.h5").write_bytes(content.replace(b"keras_version", b"keras_versiom", 1))
    found = verified(run)
    assert problems(found, "tensor") == {}
    assert "1 bytes outside the tensors differ" in problems(found, "metadata")["final.h5"]


def test_a_damaged_average_is_not_verified(run: Path) -> None:
    """The reason why the header cannot be read is reported, and the exit code is 1."""
    content = (run / "final.h5").read_bytes()
    (run / "final.h5").write_bytes(content[: len(content) // 2])
    assert "final.h5" in problems(verified(run), "file")["final.h5"]
    done = polyak("verify", "final.h5", "--source", "ckpts", cwd=run)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.endswith("final.h5: not verified\n")


def test_tensors_that_lie_elsewhere_are_compared_one_by_one(run: Path) -> None:
    """A file rewritten by another program differs, even if its tensors are equal."""
    with h5py.File(run / "final.h5", "r+") as file:
        file["new"] = file["model_weights/dense/kernel"][()]
        del file["model_weights/dense/kernel"]
        file.move("new", "model_weights/dense/kernel")
    found = verified(run)
    assert problems(found, "tensor") == {}
    assert "are not in the expected places" in problems(found, "metadata")["final.h5"]
    with h5py.File(run / "final.h5", "r+") as file:
        file["model_weights/dense/kernel"][0, 0] = 0
    assert "dense/kernel' differs" in " ".join(problems(verified(run), "tensor").values())


def test_another_version_is_noted(run: Path) -> None:
    """A note says that another version may write other bytes outside the tensors."""
    record = record_of(run / "final.h5") | {"polyak": "0.0.9"}
    rewrite_record(run / "final.h5", sealed(record))
    found = verified(run)
    assert not found.verified  # h5py wrote the record to another place
    assert (
        "every tensor is equal bit for bit; the file was written by polyak 0.0.9" in found.notes[0]
    )


# --- inputs ---------------------------------------------------------------------------------------


def change(path: Path) -> None:
    """Change one value of a checkpoint; its size stays, its time becomes later."""
    with h5py.File(path, "r+") as file:
        file["model_weights/dense/kernel"][1, 1] += 1
    later = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))


def exchange(run: Path) -> None:
    """Exchange the names of two checkpoints; their times stay."""
    one, two = run / "ckpts/model_1.h5", run / "ckpts/model_2.h5"
    one.rename(run / "other")
    two.rename(one)
    (run / "other").rename(two)


def test_a_changed_input_is_named(run: Path) -> None:
    """By its digest: of all bytes if that was recorded, else by the sampled one."""
    change(run / "ckpts/model_2.h5")
    found = verified(run, "hashed.h5")
    text = "'model_2.h5' was changed: its SHA-256 is not the recorded one"
    assert problems(found, "input") == {"model_2.h5": text}
    assert "element 26" in " ".join(problems(found, "tensor").values())
    found = verified(run)
    text = "'model_2.h5' was changed: its sampled SHA-256 is not the recorded one"
    assert problems(found, "input") == {"model_2.h5": text}


@pytest.mark.slow
def test_a_bit_anywhere_in_any_input_is_named(run: Path) -> None:
    """Even if the average does not depend on the bit."""
    random = np.random.default_rng(2)
    for k in (1, 2, 3):
        path = run / f"ckpts/model_{k}.h5"
        whole = path.read_bytes()
        for position in random.integers(0, len(whole), 4):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << int(random.integers(8))
            path.write_bytes(flipped)
            assert path.name in problems(verified(run, "hashed.h5"), "input"), position
        path.write_bytes(whole)
    assert verified(run, "hashed.h5").verified


def test_digests_are_recorded_unasked_of_few_bytes(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to a bound on the size of all inputs, or with --hash; never with --no-hash."""
    size = sum(path.stat().st_size for path in (run / "ckpts").iterdir())
    for bound, wanted, expected in (
        (size, None, True),
        (size - 1, None, False),
        (size - 1, True, True),
        (size, False, False),
    ):
        monkeypatch.setattr(hashing, "HASHED", bound)
        average(run / "ckpts", run / "o.h5", hash=wanted, force=True)
        (found,) = inspect([run / "o.h5"])
        assert ["sha256" in one for one in found.provenance["inputs"]] == [expected] * 3


def test_an_input_of_another_size_is_named(run: Path) -> None:
    """The message has both sizes."""
    with h5py.File(run / "ckpts/model_2.h5", "r+") as file:
        file.attrs["more"] = "x" * 10_000
    assert "bytes, but had" in problems(verified(run), "input")["model_2.h5"]


def test_exchanged_inputs_are_named(run: Path) -> None:
    """By their digests, sampled or of all bytes."""
    exchange(run)
    for name in ("hashed.h5", "final.h5"):
        found = problems(verified(run, name), "input")
        assert "holds what 'model_2.h5' held" in found["model_1.h5"]
        assert "holds what 'model_1.h5' held" in found["model_2.h5"]


def test_a_missing_input_is_named(run: Path) -> None:
    """The message names the folders that were searched."""
    (run / "ckpts/model_2.h5").unlink()
    for name in ("final.h5", "hashed.h5"):
        (text,) = problems(verified(run, name), "input").values()
        assert text.startswith("'model_2.h5' is missing: no file of that name in ")
        assert "ckpts" in text


@pytest.mark.parametrize("name", ["final.h5", "hashed.h5"])
def test_renamed_inputs_are_named(run: Path, name: str) -> None:
    """A file of another name with the recorded digest is used for the comparison."""
    for k in (1, 2):
        (run / f"ckpts/model_{k}.h5").rename(run / f"ckpts/epoch_{3 - k}.h5")
    found = verified(run, name)
    texts = problems(found, "input")
    assert "epoch_2.h5 holds what was averaged: it was renamed" in texts["model_1.h5"]
    assert "epoch_1.h5 holds what was averaged: it was renamed" in texts["model_2.h5"]
    assert problems(found, "tensor") == {}


def test_a_moved_input_is_named(run: Path) -> None:
    """A file of the same name in another folder, found by its digest."""
    (run / "ckpts/old").mkdir()
    (run / "ckpts/model_2.h5").rename(run / "ckpts/old/model_2.h5")
    found = verified(run)
    (text,) = problems(found, "input").values()
    assert text.endswith("ckpts/old/model_2.h5 holds what was averaged: it was moved")
    assert problems(found, "tensor") == {}


def write_large(path: Path, seed: int) -> Path:
    """Write a checkpoint that its sampled digest does not cover."""
    values = np.random.default_rng(seed).normal(3, size=(1200, 1000)).astype(np.float32)
    return write_model(path, {"dense": {"kernel": values}})


def flip_unsampled(path: Path) -> None:
    """Flip a bit of an element that the sampled digest does not cover."""
    with h5py.File(path) as file:
        start = file["model_weights/dense/kernel"].id.get_offset()
    ranges = hashing.list_sampled_ranges(path.stat().st_size)
    end = next(end for _, end in ranges if end > start)
    place = end + (start - end) % 4 + 2  # an upper bit of the fraction
    assert all(not begin <= place < stop for begin, stop in ranges)
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << 6
    path.write_bytes(content)


def test_a_change_that_the_sample_does_not_see_is_found(tmp_path: Path) -> None:
    """The average shows it; a note says which inputs cannot be excluded, --hash which it is."""
    (tmp_path / "ckpts").mkdir()
    for k in (1, 2):
        write_large(tmp_path / f"ckpts/model_{k}.h5", k)
    average(tmp_path / "ckpts", tmp_path / "final.h5", hash=False)
    average(tmp_path / "ckpts", tmp_path / "hashed.h5", hash=True)
    assert verify(tmp_path / "final.h5").verified
    flip_unsampled(tmp_path / "ckpts/model_2.h5")
    found = verify(tmp_path / "final.h5")
    (text,) = problems(found, "tensor").values()
    assert "kernel' differs in 1 of 1200000 elements" in text
    assert problems(found, "input") == {}
    assert "does not cover all bytes of 'model_1.h5', 'model_2.h5': one of" in found.notes[-1]
    found = verify(tmp_path / "hashed.h5")
    assert [*problems(found, "input")] == ["model_2.h5"]


def test_other_files_beside_an_average_are_no_obstacle(run: Path) -> None:
    """Files of the same names beside it, of another run: the search goes on in the folders."""
    for k in (1, 2, 3):
        write_model(run / f"model_{k}.h5", {"dense": {"kernel": np.full((40, 25), k, np.float32)}})
    assert verify(run / "final.h5").verified
    (run / "model_2.h5").unlink()
    os.mkfifo(run / "model_2.h5")
    assert verify(run / "final.h5").verified


@pytest.mark.parametrize("name", ["final.h5", "hashed.h5"])
def test_what_cannot_be_a_checkpoint_is_passed_over(run: Path, name: str) -> None:
    """Folders and files of the names that cannot be read or are of another format: never final."""
    before = [f"{kind}-before" for kind in ("dir", "fifo", "npz", "loop", "text")]
    for folder in before:
        (run / folder).mkdir()
    (run / "dir-before/model_1.h5").mkdir()
    os.mkfifo(run / "fifo-before/model_1.h5")
    np.savez(run / "npz-before/model_1.npz", kernel=np.ones(3))
    (run / "npz-before/model_1.npz").rename(run / "npz-before/model_1.h5")
    (run / "loop-before/model_1.h5").symlink_to("model_1.h5")
    (run / "text-before/model_1.h5").write_bytes(b"no checkpoint")
    sources = [run / folder for folder in (*before, "ckpts")]
    assert verify(run / name, sources=sources).verified
    assert verify(run / name).verified  # they are beside the average, too
    (run / "ckpts/model_1.h5").unlink()
    for kept in ("dir-before", "fifo-before", "npz-before", "text-before"):
        found = verify(run / name, sources=[run / kept, run / "ckpts"])
        (text,) = problems(found, "input").values()
        assert text.startswith("'model_1.h5' cannot be averaged: "), text
        assert found.inputs[0] == ("model_1.h5", None)
    sources = [run / "loop-before", run / "ckpts"]
    (text,) = problems(verify(run / name, sources=sources), "input").values()
    assert text.startswith("'model_1.h5' is missing: ")


def test_a_folder_that_may_not_be_read_is_passed_over(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the system refuses there, the checkpoints are found elsewhere."""
    (run / "another").mkdir()
    shutil.copy(run / "ckpts/model_1.h5", run / "another/model_1.h5")
    real_stat, real_iterdir = os.stat, Path.iterdir

    def refuse(folder: str) -> None:  # tests may run as root, whom the system refuses nothing
        if folder == str(run / "another"):
            raise PermissionError(13, "Permission denied", folder)

    def stat(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if isinstance(path, (str, os.PathLike)):
            refuse(str(Path(path).parent))
        return real_stat(path, *arguments, **options)

    def iterdir(path: Path) -> Any:
        refuse(str(path))
        return real_iterdir(path)

    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert verify(run / "final.h5").verified
    assert verify(run / "final.h5", sources=[run / "another", run / "ckpts"]).verified
    (run / "ckpts/model_1.h5").rename(run / "ckpts/epoch_1.h5")
    assert [*problems(verify(run / "final.h5"), "input")] == ["model_1.h5"]


def test_inputs_of_one_name_are_found_by_their_paths(tmp_path: Path) -> None:
    """In a folder like the one they lay in, wherever it is; an exchange names both paths."""
    for k in (1, 2):
        values = np.full((40, 25), k, np.float32)
        (tmp_path / f"run/step_{k}").mkdir(parents=True)
        write_model(tmp_path / f"run/step_{k}/model.h5", {"dense": {"kernel": values}})
    inputs = [tmp_path / f"run/step_{k}/model.h5" for k in (1, 2)]
    average(inputs, tmp_path / "o.h5", coefficients=[1, 3])
    assert verify(tmp_path / "o.h5").verified
    (tmp_path / "run").rename(tmp_path / "moved")
    assert verify(tmp_path / "o.h5").verified
    one, two = tmp_path / "moved/step_1", tmp_path / "moved/step_2"
    one.rename(tmp_path / "other")
    two.rename(one)
    (tmp_path / "other").rename(two)
    found = problems(verify(tmp_path / "o.h5"), "input")
    assert "holds what 'step_2/model.h5' held" in found["step_1/model.h5"]
    assert "holds what 'step_1/model.h5' held" in found["step_2/model.h5"]


def test_an_input_that_cannot_be_read_is_named(run: Path) -> None:
    """The message has the reader's reason."""
    path = run / "ckpts/model_2.h5"
    path.write_bytes(path.read_bytes()[:100])
    assert "cannot be averaged" in problems(verified(run), "input")["model_2.h5"]


def test_an_input_of_another_model_is_reported(run: Path) -> None:
    """The message is the one of averaging."""
    write_model(run / "ckpts/model_2.h5", {"dense": {"kernel": np.ones(3, np.float32)}})
    assert "cannot be recomputed: " in problems(verified(run), "file")["final.h5"]


def test_a_link_is_followed_but_no_name_leads_out(run: Path) -> None:
    """Only plain names are looked up, in the folders that the user named."""
    (run / "outside.h5").write_bytes((run / "ckpts/model_2.h5").read_bytes())
    record = record_of(run / "final.h5")
    for name in ("../outside.h5", str(run / "outside.h5"), "..", "", "\udfff", "a\0b", "x" * 300):
        record["inputs"][1]["name"] = name
        rewrite_record(run / "final.h5", sealed(record))
        found = verified(run)
        assert "expected the name of a file" in problems(found, "record")["final.h5"], name


# --- records --------------------------------------------------------------------------------------

DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no table": lambda _: [],
    "no JSON": lambda _: "not JSON",
    "nested": lambda _: "[" * 100_000,
    "huge number": lambda _: "1" * 10_000,
    "no inputs": lambda record: record | {"inputs": []},
    "an input that is none": lambda record: record | {"inputs": [None]},
    "options": lambda record: record | {"options": {"dtype": 5}},
    "a type that is none": lambda record: record | {"options": record["options"] | {"dtype": "f9"}},
    "globs": lambda record: record | {"options": record["options"] | {"include_tensors": [1]}},
    "a glob of nothing": lambda r: r | {"options": r["options"] | {"include_tensors": ["none*"]}},
    "version": lambda record: record | {"polyak": None},
    "recalibrated": lambda record: record | {"recalibrated": 1},
    "statistics": lambda record: record | {"recalibrated": {"statistics": {"a": 1}}},
    "a statistic that is none": lambda r: r | {"recalibrated": {"statistics": {"a": "1"}}},
    "coefficient": lambda record: record | one_input(record, coefficient=float("nan")),
    "infinite": lambda record: record | one_input(record, coefficient=1e999),
    "negative": lambda record: (
        record
        | {
            "inputs": [
                one | {"coefficient": coefficient}
                for one, coefficient in zip(record["inputs"], (-1.0, 1.0, 1.0), strict=True)
            ]
        }
    ),
    "sum": lambda record: record | one_input(record, coefficient=0.9),
    "text": lambda record: record | one_input(record, coefficient="1"),
    "multiplier": lambda record: record | one_input(record, multiplier=-1.0),
    "no multiplier": lambda record: record | one_input(record, multiplier=None),
    "another multiplier": lambda record: record | one_input(record, multiplier=0.5),
    "divisor": lambda record: record | {"divisor": "1"},
    "infinite divisor": lambda record: record | {"divisor": 1e999},
    "integer divisor": lambda record: {**scaled(record, 2.0), "divisor": 2},
    "another divisor": lambda record: record | {"divisor": record["divisor"] * 2},
    "no divisor": lambda record: {k: v for k, v in record.items() if k != "divisor"},
    "multipliers whose sum overflows": lambda record: scaled(record, 1e308),
    "multipliers of zero": lambda record: scaled(record, 0.0),
    "size": lambda record: record | one_input(record, size=-1),
    "epoch": lambda record: record | one_input(record, epoch=True),
    "digest": lambda record: record | one_input(record, sha256=[5]),
    "sampled digest": lambda record: record | one_input(record, sampled_sha256=5),
    "a path of another name": lambda record: record | one_input(record, path="a/b.h5"),
    "a path that leads out": lambda record: record | one_input(record, path="../model_1.h5"),
    "an absolute path": lambda record: record | one_input(record, path="/model_1.h5"),
    "no path": lambda record: record | one_input(record, path=5),
}


def scaled(record: Mapping[str, Any], multiplier: float) -> dict[str, Any]:
    """Return a record with the same multiplier for all inputs."""
    return dict(record) | {"inputs": [one | {"multiplier": multiplier} for one in record["inputs"]]}


def one_input(record: Mapping[str, Any], **changed: object) -> dict[str, Any]:
    """Return the inputs of a record, the first one changed."""
    first, *others = record["inputs"]
    return {"inputs": [first | changed, *others]}


def test_a_record_that_polyak_did_not_write_is_refused_in_one_line(run: Path) -> None:
    """Even if its digest is right: no traceback, and exit 1."""
    record = record_of(run / "final.h5")
    for name, damage in DAMAGES.items():
        damaged = damage(record)
        rewrite_record(run / "final.h5", sealed(damaged) if isinstance(damaged, dict) else damaged)
        (text,) = (problem.text for problem in verified(run).problems)
        assert len(text.splitlines()) == 1, name
        assert "record" in text, name


def test_a_change_in_the_record_is_caught(run: Path) -> None:
    """In any field, and even if the JSON means the same."""
    record = record_of(run / "final.h5")
    text = json.dumps(record, separators=(",", ":"))
    for one, other in (('"alpha":2.0', '"alpha":3.0'), ('"epoch":1', '"epoch":4'), (",", ", ")):
        rewrite_record(run / "final.h5", text.replace(one, other, 1))
        assert "record of provenance" in problems(verified(run), "record")["final.h5"]
    text = json.dumps(older(record) | {"sha256": "0"}, separators=(",", ":"))
    rewrite_record(run / "final.h5", text.replace('"sha256"', '"sha257"'))
    assert "'sha257' in it" in problems(verified(run), "record")["final.h5"]


def test_what_is_no_average_is_refused(run: Path) -> None:
    """Exit 3: there is nothing to verify."""
    with pytest.raises(FormatError, match=r"model_1.h5: holds no record of provenance"):
        verify(run / "ckpts/model_1.h5")
    with pytest.raises(FormatError, match=r"none.h5: cannot be read: No such file"):
        verify(run / "none.h5")
    with pytest.raises(UsageError, match=r"--source .*none: is not a folder"):
        verify(run / "final.h5", sources=[run / "none"])
    rewrite_record(run / "final.h5", sealed({"polyak": "0.1.0", "recalibrated": {}}))
    with pytest.raises(CheckpointError, match=r"final.h5: was recalibrated by polyak, but is no"):
        verify(run / "final.h5")
    assert polyak("verify", "none.h5", cwd=run).returncode == 3


# --- records of polyak 0.1.0 ----------------------------------------------------------------------


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Return a folder with checkpoints and averages that polyak 0.1.0 wrote."""
    shutil.copytree(Path(__file__).parent / "data/polyak-0.1.0", tmp_path / "old")
    return tmp_path / "old"


@pytest.mark.parametrize("name", ["final.h5", "hashed.h5", "same_names.safetensors"])
def test_averages_of_the_first_version_verify(old: Path, name: str) -> None:
    """Their records have no sampled digests; names, sizes and whole digests are compared."""
    folders = ["a", "b"] if name.startswith("same") else ["ckpts"]
    found = verify(old / name, sources=[old / folder for folder in folders])
    assert (found.problems, found.notes) == ((), ())


def test_averages_without_a_divisor_verify_by_the_older_rule(tmp_path: Path) -> None:
    """Their bytes are those that were computed then, and some are not those of today."""
    folder = Path(__file__).parent / "data/before-the-divisor"
    old = folder / "average.safetensors"
    assert hashlib.sha256(old.read_bytes()).hexdigest() == OLDER
    found = verify(old, sources=[folder / "ckpts"])
    assert (found.problems, found.notes) == ((), ())
    average(folder / "ckpts", tmp_path / "new.safetensors")
    assert verify(tmp_path / "new.safetensors", sources=[folder / "ckpts"]).verified
    before, now = (load_file(path) for path in (old, tmp_path / "new.safetensors"))
    assert np.count_nonzero(before["w"] != now["w"]) == 5


#: SHA-256 of an average by the older rule.
OLDER = "8fe11ff2fc9bf313cd92a246d1fae902d613045856676e54a969297d5107fab5"


def test_without_digests_the_folder_must_be_named(old: Path) -> None:
    """If several folders hold files of the names; a whole digest says which is meant."""
    for folder in ("a", "b"):
        shutil.rmtree(old / folder)
    shutil.copytree(old / "ckpts", old / "another")
    shutil.copy(old / "ckpts/model_1.h5", old / "another/model_2.h5")
    assert verify(old / "hashed.h5").verified
    found = verify(old / "final.h5")
    assert set(problems(found, "input")) == {f"model_{k}.h5" for k in (1, 2, 3)}
    several = f"{old}/another and {old}/ckpts hold files with these names: choose one with --source"
    assert several in found.notes
    for k in (1, 2, 3):
        (old / f"another/model_{k}.h5").unlink()
        (old / f"another/model_{k}.h5").mkdir()
    assert verify(old / "final.h5").verified


def test_without_digests_a_change_is_found_but_not_located(old: Path) -> None:
    """A note says that the record cannot show what was changed; a whole digest can."""
    exchange(old)
    found = verified(old)
    assert "dense/kernel" in " ".join(problems(found, "tensor"))
    assert problems(found, "input") == {}
    assert "no digests of the inputs were recorded (--hash), so it is unknown" in found.notes[0]
    found = verified(old, "hashed.h5")
    assert [*problems(found, "input")] == ["model_1.h5", "model_2.h5"]
    assert "files were exchanged" in found.problems[0].text


def test_without_digests_a_missing_input_is_not_guessed(old: Path) -> None:
    """A renamed file is found by its whole digest only; without one the input is missing."""
    (old / "ckpts/model_2.h5").rename(old / "ckpts/epoch_2.h5")
    (text,) = problems(verified(old), "input").values()
    assert text.startswith("'model_2.h5' is missing: no file of that name in ")
    (text,) = problems(verified(old, "hashed.h5"), "input").values()
    assert text.endswith("epoch_2.h5 holds what was averaged: it was renamed")


# --- the copy -------------------------------------------------------------------------------------


def test_no_room_for_the_copy_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what to do; the folder for temporary files is the second choice."""
    asked: list[Path] = []

    def free(folder: Path) -> int:
        asked.append(folder)
        return 0

    monkeypatch.setattr(publishing, "_free", free)
    monkeypatch.setenv("TMPDIR", str(run / "ckpts"))
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.raises(OutputError, match=r"no room for a copy of [\d.]+ kB.*set TMPDIR"):
        verify(run / "final.h5", sources=[run / "ckpts"])
    assert asked == [run, run / "ckpts"]


def test_a_signal_leaves_no_copy(run: Path) -> None:
    """The copy is gone and the exit code is the signal's."""
    before = tree(run)
    code = PAUSE.format(module="averaging.writing", function="write_again")
    process = stopped(code, "verify", "final.h5", "--source", "ckpts", cwd=run)
    assert tree(run) != before
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    one_line(err)
    assert tree(run) == before


# --- average --verify -----------------------------------------------------------------------------

#: A disk that gives back something else than it was given, at one byte of the new output.
ROTTEN = """
import polyak_cli.storage.publishing as publishing
real = publishing.drop_cache
def drop_cache(paths):
    real(paths)
    content = bytearray(paths[0].read_bytes())
    content[{position}] ^= 1
    paths[0].write_bytes(content)
publishing.drop_cache = drop_cache
"""


@pytest.mark.parametrize(
    ("place", "named"),
    [
        ("model_weights/dense/kernel", "dense/kernel' differs in 1 of 1000 elements, first in"),
        ("", "1 bytes outside the tensors differ, the first at byte 9 of"),
    ],
)
def test_a_write_that_goes_wrong_is_caught(run: Path, place: str, named: str) -> None:
    """The older output is untouched, exit 3, one line that names what differs."""
    with h5py.File(run / "final.h5") as file:
        position = file[place].id.get_offset() if place else 9
    before = tree(run)
    code = ROTTEN.format(position=position)
    options = ("--scheme", "exp", "--force", "--verify", "-o", "final.h5")
    done = scripted(code, "average", "ckpts", *options, cwd=run)
    assert (done.returncode, done.stdout) == (3, "")
    line = one_line(done.stderr)
    assert line.startswith("final.h5: read back, it is not what was written: ")
    assert named in line
    assert tree(run) == before
    assert scripted(code, "average", "ckpts", *options[:3], *options[4:], cwd=run).returncode == 0


def test_a_verified_average_is_the_same_and_says_so(run: Path) -> None:
    """The bytes are the same as without --verify; report and --json say that it was verified."""
    options = ("--scheme", "exp", "--verify", "-o")
    done = polyak("average", "ckpts", *options, "again.h5", cwd=run)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(
        f", verified: read back, it is the average of the {name_other()} kernel bit for bit\n"
    )
    assert (run / "again.h5").read_bytes() == (run / "hashed.h5").read_bytes()
    done = polyak("average", "ckpts", *options, "third.h5", "--json", cwd=run)
    assert json.loads(done.stdout)["verified"] is True
    assert json.loads(done.stdout)["verified_by"] == name_other() == "numpy"
    assert average(run / "ckpts", run / "fourth.h5").data()["verified"] is None
    names = ["again.h5", "ckpts", "final.h5", "fourth.h5", "hashed.h5", "third.h5"]
    assert sorted(os.listdir(run)) == names


class WrongKernel:
    """A kernel that has one bit wrong in each piece, as a faulty compiler could make it."""

    NAME = "compiled"
    widen, accumulate = staticmethod(numpy_kernel.widen), staticmethod(numpy_kernel.accumulate)
    divide, is_finite = staticmethod(numpy_kernel.divide), staticmethod(numpy_kernel.is_finite)

    def round_to(self, values: Float64, dtype: str, byteorder: str, out: Bytes) -> None:
        """Round as numpy does, and turn the last bit of the first number."""
        numpy_kernel.round_to(values, dtype, byteorder, out)
        out[0] ^= 1


def test_a_kernel_that_computes_other_bits_is_caught(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--verify computes with numpy what the compiled kernel has written, and names the way out."""
    monkeypatch.setattr(kernel, "_chosen", WrongKernel())
    monkeypatch.setattr(kernel, "NAME", WrongKernel.NAME)
    with pytest.raises(OutputError, match=r"tensor 'dense.*use the other kernel with POLYAK_KER"):
        average(run / "ckpts", run / "wrong.h5", verify=True)
    assert not (run / "wrong.h5").exists()
    average(run / "ckpts", run / "wrong.h5")
    assert verify(run / "wrong.h5", sources=[run / "ckpts"]).verified  # it computes the same


def test_verifying_needs_room_for_two(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before any work."""
    size = (run / "final.h5").stat().st_size
    monkeypatch.setattr(publishing, "_free", lambda _: size * 3 // 2)
    average(run / "ckpts", run / "one.h5")
    with pytest.raises(OutputError, match=r"two.h5: needs [\d.]+ kB, but its disk has"):
        average(run / "ckpts", run / "two.h5", verify=True)


def test_a_name_that_another_took_is_reported(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that finally has the name is the one that was verified."""
    real = publishing._name_new

    def rename(named: Mapping[Path, Path]) -> None:
        real(named)
        for final in named.values():
            final.unlink()
            final.write_bytes(b"another's")

    monkeypatch.setattr(publishing, "_name_new", rename)
    with pytest.raises(OutputError, match=r"o.h5: another program has written this file"):
        average(run / "ckpts", run / "o.h5", verify=True)


# --- recalibrated ---------------------------------------------------------------------------------


@pytest.fixture
def recalibrated(run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a run whose average has a recalibrated statistic, with Keras replaced by a stub."""
    values = np.random.default_rng(1).normal(size=(3, 7))
    for k, row in enumerate(values.astype(np.float32), 1):
        tensors = {"kernel": np.outer(row, row), "moving_mean": row}
        write_model(run / f"ckpts/model_{k}.h5", {"dense": tensors})

    def moments(table: Table, *_: object, **__: object) -> batchnorm.Moments:
        with h5py.File(table.files[0].path) as file:
            place = "/model_weights/dense/moving_mean"
            before = {place: file[place][()]}
        return batchnorm.Moments(before, {place: np.linspace(0, 1, 7) / 3}, 1, 1, ())

    monkeypatch.setattr(recalibration, "gather_moments", moments)
    monkeypatch.setattr(recalibration, "check_model", lambda *_, **__: None)
    rows = Split("rows", np.zeros((4, 3)), np.zeros(4))
    average(run / "ckpts", run / "final.h5", recalibrate=rows, verify=True, force=True)
    return run


def test_gathered_statistics_are_compared_with_their_digests(recalibrated: Path) -> None:
    """They cannot be recomputed; everything else is, including all metadata."""
    found = verified(recalibrated)
    assert found.problems == ()
    assert found.unverified == ("dense/moving_mean",)
    assert "1 BatchNorm statistics were recalibrated" in found.notes[0]
    whole = (recalibrated / "final.h5").read_bytes()
    for name, element in (("moving_mean", 2), ("kernel", (3, 3))):
        with h5py.File(recalibrated / "final.h5", "r+") as file:
            file[f"model_weights/dense/{name}"][element] = 7
        (text,) = problems(verified(recalibrated), "tensor").values()
        assert f"dense/{name}'" in text
        (recalibrated / "final.h5").write_bytes(whole)


def test_older_records_do_not_name_the_statistics(recalibrated: Path) -> None:
    """A note says that they are not verified."""
    record = older(record_of(recalibrated / "final.h5"))
    del record["recalibrated"]["statistics"]
    rewrite_record(recalibrated / "final.h5", record)
    found = verified(recalibrated)
    assert problems(found, "tensor") == {}
    assert "their digest was not recorded: they are not verified" in found.notes[1]


# --- comparing ------------------------------------------------------------------------------------


def table(path: Path, **places: tuple[int, int]) -> Table:
    """Return a table of float32 tensors; each place is an offset and a number of elements."""
    specs = {
        name: TensorSpec(name, (size,), "float32", "<", name, Extent(offset, 4 * size))
        for name, (offset, size) in places.items()
    }
    file = File(str(path), Version.of(path.stat()))
    return Table(path, "hdf5", (file,), specs, {}, frozenset(), "", False)


@settings(deadline=None)
@given(st.integers(1, 9), st.sets(st.integers(0, 79), min_size=1))
def test_what_differs_is_counted(
    tmp_path_factory: pytest.TempPathFactory, step: int, changed: set[int]
) -> None:
    """Elements, and bytes outside tensors, for any piece size; shared bytes count once."""
    folder = tmp_path_factory.mktemp("bytes")
    right, found = folder / "right", folder / "found"
    right.write_bytes(bytes(80))
    found.write_bytes(bytes(k in changed for k in range(80)))
    known = table(right, a=(3, 5), whole=(30, 8), part=(38, 2), z=(75, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitwise, "_STEP", step)
        deviation = bitwise.compare([found], known)
    places = {"a": range(3, 23), "part": range(38, 46), "whole": range(30, 62), "z": range(75, 79)}
    left = set(changed)
    for name, place in places.items():
        start = 30 if name == "whole" else place[0]
        elements = sorted({(k - start) // 4 for k in left & {*place}})
        left -= {*place}
        unlike = [(one.elements, one.first) for one in deviation.tensors if one.name == name]
        assert unlike == ([(len(elements), elements[0])] if elements else [])
    assert len(deviation.outside) == bool(left)
    if left:
        assert deviation.outside[0].startswith(f"{len(left)} bytes")
        assert f"at byte {min(left)} of" in deviation.outside[0]


def test_a_problem_is_data() -> None:
    """Results convert to JSON directly."""
    found = Verification(Path("o.h5"), problems=(Discrepancy("file", "o.h5", "is gone"),))
    assert not found.verified
    assert json.loads(json.dumps(found.data()))["problems"][0]["text"] == "is gone"
