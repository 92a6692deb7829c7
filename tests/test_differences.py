"""Distances between checkpoints: two files tensor by tensor, and a run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyak_cli import diff, distances, inspect, select
from polyak_cli.engine import reading
from polyak_cli.errors import FormatError, MismatchError, UsageError
from tests.command import SAMPLES, one_line, polyak
from tests.oracle import Array, write_model

RNG = np.random.default_rng(0)
A = RNG.normal(size=(300, 400)).astype(np.float32)
B = (A + RNG.normal(size=A.shape) * 0.01).astype(np.float32)


def files(folder: Path, one: dict[str, Array], other: dict[str, Array]) -> tuple[Path, Path]:
    """Write two checkpoints with the tensors of one layer."""
    a = write_model(folder / "a.h5", {"d": one})
    return a, write_model(folder / "b.h5", {"d": other})


def test_the_numbers_are_those_of_numpy(tmp_path: Path) -> None:
    """Relative distance, largest difference and cosine, over more than one slab."""
    large, other = (np.tile(x, (20, 1)) for x in (A, B))
    found = diff(*files(tmp_path, {"k": large, "b": A[0]}, {"k": other, "b": A[0]}))
    worst, best = found.tensors
    a, b = large.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    assert worst.name == "d/k"
    assert worst.relative == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-12)
    assert worst.largest == np.abs(a - b).max()
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert worst.cosine == pytest.approx(cosine, rel=1e-12)
    assert (best.name, best.relative, best.largest, best.equal) == ("d/b", 0.0, 0.0, True)
    assert not found.equal


@pytest.mark.parametrize(
    ("one", "other", "rtol", "atol", "equal"),
    [
        (1.0, 1.0, 0, 0, True),
        (1.0, 1.0 + 1e-6, 0, 0, False),
        (1.0, 1.0 + 1e-6, 1e-5, 0, True),
        (0.0, 1e-6, 1e-5, 0, False),
        (0.0, 1e-6, 0, 1e-5, True),
        (math.nan, math.nan, 0, 0, True),
        (math.nan, 1.0, 1e9, 1e9, False),
        (math.inf, math.inf, 0, 0, True),
        (math.inf, -math.inf, 0, 1e9, False),
        (-0.0, 0.0, 0, 0, True),
    ],
)
def test_equal_means_within_the_tolerances(
    tmp_path: Path, one: float, other: float, rtol: float, atol: float, equal: bool
) -> None:
    """|a - b| <= atol + rtol |a|; NaN and infinities equal only themselves."""
    a, b = files(tmp_path, {"k": np.array([2.0, one])}, {"k": np.array([2.0, other])})
    found = diff(a, b, rtol=rtol, atol=atol)
    assert found.equal is equal
    assert (found.tensors[0].relative < math.inf) or not equal


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ({"k": A}, {"k": A, "more": A}, "only .*b.h5 has 'd/more'"),
        ({"k": A, "more": A}, {"k": A}, "only .*a.h5 has 'd/more'"),
        ({"k": A}, {"k": A.T.copy()}, r"'d/k' has shape \(300, 400\) and \(400, 300\)"),
        ({"s": np.array(["x"], object)}, {"s": np.array(["y"], object)}, "'d/s', string"),
        ({"s": np.array([b"x"])}, {"s": np.array([b"y"])}, "'d/s' differs"),
    ],
)
def test_what_cannot_be_measured_is_reported(
    tmp_path: Path, one: dict[str, Array], other: dict[str, Array], message: str
) -> None:
    """Tensors of one file only, of another shape, and texts: a sentence says why they differ."""
    found = diff(*files(tmp_path, one, other))
    assert not found.equal
    (mismatch,) = found.mismatches
    assert re.search(message, mismatch)


def test_formats_types_and_whole_numbers_can_be_mixed(tmp_path: Path) -> None:
    """An npz and an .h5 file are compared by value, whatever the types."""
    a = write_model(tmp_path / "a.h5", {"d": {"k": A, "n": np.array([1, 2]), "e": A[:0]}})
    arrays: dict[str, Any] = {"d/k": A.astype(">f8"), "d/n": np.array([1, 3]), "d/e": A[:0]}
    np.savez(tmp_path / "b.npz", **arrays)
    found = diff(a, tmp_path / "b.npz")
    assert [(one.name, one.equal) for one in found.tensors] == [
        ("d/n", False),
        ("d/k", True),
        ("d/e", True),
    ]
    assert found.mismatches == ()


def test_damaged_values_are_not_compared(tmp_path: Path) -> None:
    """A wrong checksum is an error in either file, in a run, and with statistics."""
    for k in (1, 2):
        np.savez(tmp_path / f"m_{k}.npz", k=A)
    good, bad = tmp_path / "m_1.npz", tmp_path / "m_2.npz"
    content = bytearray(bad.read_bytes())
    content[5000] ^= 1
    bad.write_bytes(content)
    for look in (
        lambda: diff(good, bad),
        lambda: diff(bad, good),
        lambda: distances(select([tmp_path])),
        lambda: list(inspect([bad], statistics=True)),
    ):
        with pytest.raises(FormatError, match=r"m_2.npz: the checksum of the member 'k.npy'"):
            look()


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measured values are of neither the older nor the newer file."""
    a, b = files(tmp_path, {"k": A}, {"k": B})
    values = reading.read_values

    def growing(*arguments: Any) -> Iterator[Any]:
        yield from values(*arguments)
        with open(a, "ab") as file:
            file.write(b"more")

    monkeypatch.setattr(reading, "read_values", growing)
    for look in (
        lambda: diff(a, b),
        lambda: distances(select([a, b])),
        lambda: list(inspect([a], statistics=True)),
    ):
        with pytest.raises(FormatError, match=r"a.h5: changed or vanished while it was read"):
            look()


def test_the_command_answers_with_its_exit_code(tmp_path: Path) -> None:
    """0 if equal, 1 if not, 2 for a usage error; --json has the same result."""
    one, other = SAMPLES / "model_498.h5", SAMPLES / "model_499.h5"
    done = polyak("diff", one, other, cwd=tmp_path)
    assert done.returncode == 1
    differ, closing = done.stdout.splitlines()[-2:]
    assert differ == "4 tensors differ"
    assert closing == "one run or two: cannot tell, too few numbers differ"  # 110 in all
    assert polyak("diff", one, other, "--rtol", "9", cwd=tmp_path).returncode == 0
    done = polyak("diff", one, one, "--json", cwd=tmp_path)
    assert done.returncode == 0
    assert json.loads(done.stdout)["equal"] is True
    for options in (["--rtol", "-1"], ["--last", "2"]):
        done = polyak("diff", one, other, *options, cwd=tmp_path)
        assert done.returncode == 2
        assert options[0] in one_line(done.stderr)
    done = polyak("diff", SAMPLES, "--atol", "1", cwd=tmp_path)
    assert done.returncode == 2


def test_a_run_shows_its_outlier(tmp_path: Path) -> None:
    """Distances to the previous checkpoint and to the average, as numpy computes them."""
    models = [A.astype(np.float64) + RNG.normal(size=A.shape) * 0.01 for _ in range(6)]
    models[3] += 5 * (models[3] - A)
    for k, values in enumerate(models):
        write_model(tmp_path / f"m_{k}.h5", {"d": {"k": values, "n": np.array(k)}})
    found = distances(select([tmp_path]))
    mean = np.mean(models, axis=0)
    scale = np.linalg.norm(mean)
    expected = [np.linalg.norm(values - mean) / scale for values in models]
    assert [row.to_average for row in found.checkpoints] == pytest.approx(expected, rel=1e-9)
    steps = [np.linalg.norm(models[k] - models[k - 1]) / scale for k in range(1, 6)]
    assert [row.to_previous for row in found.checkpoints[1:]] == pytest.approx(steps, rel=1e-9)
    assert found.checkpoints[0].to_previous is None
    assert [row.epoch for row in found.checkpoints if row.outlier] == [3]
    assert found.tensors == 1


def test_the_beginning_of_training_is_no_outlier(tmp_path: Path) -> None:
    """The first checkpoints of a run that settles are far from the average, as in any run."""
    for k, far in enumerate((9.0, 4.0, 0.1, 0.05, 0.02, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01)):
        write_model(tmp_path / f"m_{k}.h5", {"d": {"k": A.astype(np.float64) + far}})
    found = distances(select([tmp_path]))
    apart = [row.to_average for row in found.checkpoints]
    assert apart[0] > 3 * np.median(apart)  # it would be one by its distance
    assert [row.epoch for row in found.checkpoints if row.outlier] == []


def test_two_runs_are_called_two_runs(tmp_path: Path) -> None:
    """As `check` does; tensors that no training changed do not hide it."""
    rng = np.random.default_rng(7)
    frozen = rng.normal(size=(200, 40))
    one, near, other = (rng.normal(size=(40, 40)) for _ in range(3))
    near = one + 0.1 * near
    for name, values in (("a", one), ("near", near), ("b", other)):
        half = np.concatenate([frozen, values])
        write_model(tmp_path / f"{name}.h5", {"d": {"k": half, "b": np.zeros(4)}})
    a, near_path, b = (tmp_path / f"{name}.h5" for name in ("a", "near", "b"))
    cosine = np.sum(one * other) / np.linalg.norm(one) / np.linalg.norm(other)
    found = diff(a, b)
    assert (found.verdict.word, found.data()["runs"]["verdict"]) == ("two runs", "two runs")
    assert found.verdict.least == pytest.approx(cosine, abs=1e-9)
    assert diff(a, near_path).verdict.word == "one run"
    closing = polyak("diff", a, near_path, cwd=tmp_path).stdout.splitlines()[-1]
    assert closing.startswith("one run: neighbours point nearly the same way (cosine 0.99")
    done = polyak("diff", a, b, cwd=tmp_path)
    assert done.stdout.splitlines()[-1].startswith(
        f"two runs: not all checkpoints point the same way (cosine {cosine:.3f} between"
    )


@pytest.mark.slow
def test_a_run_as_a_command(tmp_path: Path) -> None:
    """A table with one line for each checkpoint, JSON, and a picture."""
    pytest.importorskip("matplotlib")
    done = polyak("diff", SAMPLES, "--last", "4", "--plot", "d.svg", cwd=tmp_path)
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()[1:5]] == [
        f"model_{k}.h5" for k in range(496, 500)
    ]
    assert "to the average" in (tmp_path / "d.svg").read_text()
    data = json.loads(polyak("diff", SAMPLES, "--json", cwd=tmp_path).stdout)
    assert len(data["checkpoints"]) == 10


def test_a_run_of_one_or_of_two_models_is_refused(tmp_path: Path) -> None:
    """One checkpoint has nothing to compare with; two models do not belong together."""
    write_model(tmp_path / "m_1.h5", {"d": {"k": A}})
    with pytest.raises(UsageError, match="only one checkpoint"):
        distances(select([tmp_path]))
    write_model(tmp_path / "m_2.h5", {"d": {"k": A[:5]}})
    with pytest.raises(MismatchError, match="has shape"):
        distances(select([tmp_path]))
    write_model(tmp_path / "m_2.h5", {"d": {"k": A * np.float32(np.nan)}})
    with pytest.raises(MismatchError, match="not finite"):
        distances(select([tmp_path]))
