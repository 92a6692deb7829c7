"""The record of provenance: sampled digests of the inputs, and paths where their names repeat."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from polyak_cli import average, inspect
from polyak_cli.averaging import hashing
from polyak_cli.checkpoints import folders
from polyak_cli.errors import FormatError
from polyak_cli.storage import File, Version
from tests.oracle import write_model

#: The definition in the guide, in numbers.
PIECES, PIECE = 64, 61_440


def expected_digest(contents: list[bytes]) -> str:
    """Return the sampled digest as the guide defines it, computed on whole contents."""
    head = "\n".join(str(len(content)) for content in contents) + "\n\n"
    whole = b"".join(contents)
    if len(whole) > PIECES * PIECE:
        starts = [k * (len(whole) - PIECE) // (PIECES - 1) for k in range(PIECES)]
        assert (starts[0], starts[-1]) == (0, len(whole) - PIECE)
        whole = b"".join(whole[start : start + PIECE] for start in starts)
    return hashlib.sha256(head.encode() + whole).hexdigest()


def scanned(path: Path) -> File:
    """Return a file as it is now."""
    return File(str(path), Version.of(path.stat()))


@pytest.mark.parametrize(
    "sizes",
    [
        [0],
        [1],
        [PIECES * PIECE],
        [PIECES * PIECE + 1],
        [9_000_001],
        [10, 0, 5],
        [5_000_000, 3, 7_000_011],
        [3, *[100_000] * 90],
    ],
)
def test_a_sampled_digest_is_what_the_readme_defines(tmp_path: Path, sizes: list[int]) -> None:
    """Of one file or of several, below the bound and above it, whatever the sizes."""
    rng = np.random.default_rng(0)
    contents = [rng.bytes(size) for size in sizes]
    files = []
    for k, content in enumerate(contents):
        path = tmp_path / f"part_{k}"
        path.write_bytes(content)
        files.append(scanned(path))
    assert hashing.compute_sampled_digest(files) == expected_digest(contents)


def test_at_most_4_mb_of_a_checkpoint_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it has: one large file, or many shards."""
    read = 0
    real = os.pread

    def counting(descriptor: int, nbytes: int, offset: int) -> bytes:
        nonlocal read
        content = real(descriptor, nbytes, offset)
        read += len(content)
        return content

    monkeypatch.setattr(os, "pread", counting)
    for count, size in ((1, 1 << 30), (300, 1 << 20)):
        paths = [tmp_path / f"{count}_{k}" for k in range(count)]
        for path in paths:
            with open(path, "wb") as file:
                file.truncate(size)
        read = 0
        hashing.compute_sampled_digest([scanned(path) for path in paths])
        assert 3_900_000 < read <= 4_000_000


@pytest.mark.parametrize("jobs", [1, 3])
def test_digests_of_several_checkpoints_are_those_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    """Several at a time or one after the other, in their order; the first error is raised."""
    monkeypatch.setattr(hashing, "HASHED", 1 << 20)  # as if they were large
    rng = np.random.default_rng(0)
    contents = [rng.bytes(4_000_000 + 1000 * k) for k in range(5)]
    checkpoints = []
    for k, content in enumerate(contents):
        path = tmp_path / f"{k}.h5"
        path.write_bytes(content)
        checkpoints.append([scanned(path)])
    expected = [expected_digest([content]) for content in contents]
    assert hashing.compute_sampled_digests(checkpoints, jobs) == expected
    for k in (3, 1):
        (tmp_path / f"{k}.h5").unlink()
        with pytest.raises(FormatError, match=rf"{k}.h5: cannot be read: No such file"):
            hashing.compute_sampled_digests(checkpoints, jobs)


def test_digests_need_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a limit allows no more threads, digests are computed one after the other."""
    monkeypatch.setattr(hashing, "HASHED", 0)
    path = tmp_path / "m.h5"
    path.write_bytes(b"abc")
    started = []

    def refuse(thread: threading.Thread) -> None:
        started.append(thread)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert hashing.compute_sampled_digests([[scanned(path)]], 2) == [expected_digest([b"abc"])]
    assert len(started) == 1


def test_a_file_that_changed_is_an_error(tmp_path: Path) -> None:
    """Named in one line, as is one that has gone."""
    path = tmp_path / "m.h5"
    path.write_bytes(bytes(100))
    file = scanned(path)
    path.write_bytes(bytes(50))
    with pytest.raises(FormatError, match=r"m.h5: changed while it was read"):
        hashing.compute_sampled_digest([file])
    path.unlink()
    with pytest.raises(FormatError, match=r"m.h5: cannot be read: No such file"):
        hashing.compute_sampled_digest([file])


def inputs_of(output: Path) -> list[dict[str, Any]]:
    """Return the inputs in the record of an average."""
    (inside,) = inspect([output])
    found: list[dict[str, Any]] = inside.provenance["inputs"]
    return found


def test_sampled_digests_are_always_recorded(tmp_path: Path) -> None:
    """With and without --hash; of a sharded checkpoint, over all its files."""
    for k in (1, 2):
        folder = tmp_path / f"checkpoint-{k}"
        folder.mkdir()
        weight_map = {}
        for name in ("1", "2"):
            values = np.full(1_500_000, k, np.float32)
            save_file({name: values}, folder / f"model-0000{name}-of-00002.safetensors")
            weight_map[name] = f"model-0000{name}-of-00002.safetensors"
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(index)
    sources = [tmp_path / f"checkpoint-{k}" for k in (1, 2)]
    for wanted in (True, False):
        average(tmp_path, tmp_path / "o.safetensors", hash=wanted, force=True)
        for folder, one in zip(sources, inputs_of(tmp_path / "o.safetensors"), strict=True):
            parts = [
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
            ]
            contents = [(folder / part).read_bytes() for part in parts]
            assert one["sampled_sha256"] == expected_digest(contents)
            assert ("sha256" in one) is wanted
            assert "path" not in one


def test_paths_are_recorded_where_names_repeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative to the folder that all have in common, and the same from wherever they are named."""
    for k in (1, 2):
        (tmp_path / f"secret/run/step_{k}").mkdir(parents=True)
        values = np.full(3, k, np.float32)
        write_model(tmp_path / f"secret/run/step_{k}/model.h5", {"d": {"k": values}})
    absolute = [tmp_path / f"secret/run/step_{k}/model.h5" for k in (1, 2)]
    average(absolute, tmp_path / "one.h5")
    assert [one["name"] for one in inputs_of(tmp_path / "one.h5")] == ["model.h5"] * 2
    paths = [one["path"] for one in inputs_of(tmp_path / "one.h5")]
    assert paths == ["step_1/model.h5", "step_2/model.h5"]
    monkeypatch.chdir(tmp_path / "secret/run/step_1")
    average(["model.h5", "../step_2/model.h5"], tmp_path / "two.h5")
    content = (tmp_path / "one.h5").read_bytes()
    assert (tmp_path / "two.h5").read_bytes() == content
    assert b"secret" not in content
    assert b"run" not in content


def test_a_path_is_relative_to_the_innermost_common_folder() -> None:
    """Also where one checkpoint lies in the folder and another below it."""
    paths = [Path("/a/b/m.h5"), Path("/a/b/c/m.h5")]
    assert folders.list_relative_paths(paths) == ["m.h5", "c/m.h5"]
    assert folders.list_relative_paths([Path("/a/m_1.h5"), Path("/b/m_2.h5")]) == [
        "m_1.h5",
        "m_2.h5",
    ]
    assert folders.list_relative_paths([Path("/a/m.h5"), Path("/b/m.h5")]) == ["a/m.h5", "b/m.h5"]
