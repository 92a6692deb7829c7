"""Several averages are made while the checkpoints are read once."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest

from polyak_cli import pipeline
from polyak_cli.averaging import hashing, writing
from polyak_cli.averaging.schemes import make_mean
from polyak_cli.engine import slabs
from polyak_cli.errors import MismatchError
from tests.oracle import write_model


def test_several_averages_are_each_what_average_writes(tmp_path: Path) -> None:
    """Every output has the same bytes as an average that is made alone."""
    rng = np.random.default_rng(0)
    paths = [
        write_model(
            tmp_path / f"m_{k}.h5",
            {"d": {"k": rng.normal(3, size=(300, 70)).astype(np.float32), "n": np.array(k)}},
        )
        for k in range(4)
    ]
    rows = [[0.25] * 4, [0.0, 0.0, 0.5, 0.5], [0.0, 1.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]]
    outputs = [tmp_path / f"out_{k}.h5" for k in range(len(rows))]
    means = [make_mean(row) for row in rows]
    writing.write_several(pipeline.plan(paths), means, outputs)
    for row, output in zip(rows, outputs, strict=True):
        pipeline.average(paths, tmp_path / "one.h5", coefficients=row, force=True, hash=False)
        assert output.read_bytes() == (tmp_path / "one.h5").read_bytes()
        with h5py.File(output) as file:
            assert file["model_weights/d/n"][()] == 3


def test_several_averages_read_each_byte_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No part of a tensor is read twice, however many outputs there are."""
    paths = [
        write_model(tmp_path / f"m_{k}.h5", {"d": {"k": np.full(200_000, k, np.float32)}})
        for k in range(3)
    ]
    plan = pipeline.plan(paths, jobs=1)
    reads: Counter[tuple[int, int]] = Counter()
    total = 0
    preadv = os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal total
        reads[os.fstat(descriptor).st_ino, offset] += 1
        count = preadv(descriptor, buffers, offset)
        total += count
        return count

    # The sampled digests of the inputs read them too, before the outputs are laid out.
    monkeypatch.setattr(hashing, "compute_sampled_digest", lambda _: "0" * 64)
    monkeypatch.setattr(os, "preadv", counted)
    rows = [[0.5, 0.25, 0.25], [0.25, 0.25, 0.5], [0.0, 0.5, 0.5]]
    writing.write_several(
        plan, [make_mean(row) for row in rows], [tmp_path / f"out_{k}.h5" for k in range(3)]
    )
    assert max(reads.values()) == 1
    assert total == 3 * 200_000 * 4


def test_several_averages_of_two_runs_are_refused(tmp_path: Path) -> None:
    """What one average refuses, several do too, unless it is allowed, and then they say so."""
    values = np.random.default_rng(0).normal(size=(2, 40, 40)).astype(np.float32)
    paths = [write_model(tmp_path / f"m_{k}.h5", {"d": {"k": one}}) for k, one in enumerate(values)]
    means = [make_mean(row) for row in ([1.0, 1.0], [1.0, 3.0])]
    outputs = [tmp_path / f"out_{k}.h5" for k in range(2)]
    with pytest.raises(MismatchError, match="look like two runs"):
        writing.write_several(pipeline.plan(paths), means, outputs)
    (note,) = writing.write_several(pipeline.plan(paths, allow=["two-runs"]), means, outputs)
    assert "look like two runs" in note
    assert note.endswith("averaged anyway")


def test_averages_that_are_deleted_soon_are_not_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither candidates nor what `verify` writes again must get to the disk; an average must."""
    monkeypatch.setattr(slabs, "TUNING", slabs.Tuning(flush_nbytes=1))
    values = np.random.default_rng(0).normal(size=(2, 40, 40)).astype(np.float32)
    paths = [
        write_model(tmp_path / f"m_{k}.h5", {"d": {"k": values[0] + 0.01 * one}})
        for k, one in enumerate(values)
    ]
    plan = pipeline.plan(paths)
    flushed: list[int] = []
    monkeypatch.setattr(os, "fdatasync", flushed.append, raising=False)
    writing.write_several(plan, [make_mean([1.0, 1.0])] * 2, [tmp_path / "a.h5", tmp_path / "b.h5"])
    (tmp_path / "again").mkdir()
    writing.write_again(plan, tmp_path / "again", Path("o.h5"), "record")
    assert not flushed
    writing.write_average(plan, tmp_path / "c.h5", "record", lambda _: None)
    assert flushed
