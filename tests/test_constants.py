"""Values that are not finite: constants are kept and said, what differs is refused by its glob."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from polyak_cli import average, check, verify
from polyak_cli.errors import MismatchError
from tests.command import one_line, polyak
from tests.oracle import Array

MASK = np.where(np.tri(4), 0, -np.inf).astype(np.float32)


def write(folder: Path, models: Sequence[Mapping[str, Array]]) -> list[Path]:
    """Write a run with numpy."""
    folder.mkdir(exist_ok=True)
    for epoch, model in enumerate(models, start=1):
        np.savez(folder / f"m_{epoch}.npz", **model)  # type: ignore[arg-type] # names of arrays
    return [folder / f"m_{epoch}.npz" for epoch in range(1, len(models) + 1)]


def write_with(folder: Path, name: str, values: Sequence[object], dtype: str = "f4") -> list[Path]:
    """Write a run whose tensor 'w' is the epoch, and that has another tensor besides."""
    return write(
        folder,
        [
            {"w": np.full((3, 2), epoch, "f4"), name: np.array(one, dtype)}
            for epoch, one in enumerate(values, start=1)
        ],
    )


def load(path: Path) -> dict[str, Array]:
    """Return all arrays of a file."""
    with np.load(path) as file:
        return dict(file)


CONSTANTS: Mapping[str, Array] = {
    "mask": MASK,
    "best loss": np.array(np.inf, np.float32),
    "half": np.array([1, np.inf, -np.inf], np.float16),
    "double": np.array([-np.inf, 2], np.float64),
    "unknown score": np.array(np.nan, np.float32),
    "unknown scores": np.array([np.nan, 0.5], np.float32),
}


@pytest.mark.parametrize("kind", CONSTANTS)
def test_a_constant_is_kept_and_said_once(tmp_path: Path, kind: str) -> None:
    """Bit for bit, without an option; `check`, `diff` and `verify` find nothing wrong."""
    values = CONSTANTS[kind]
    write(tmp_path / "run", [{"w": np.full((3, 2), e, "f4"), "c": values} for e in (1, 2, 3, 4)])
    done = polyak("average", "run", "-o", "o.npz", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "in every checkpoint" in line]
    count = int(np.count_nonzero(~np.isfinite(values)))
    numbers = (
        "1 number of 1 tensor (c) is" if count == 1 else f"{count} numbers of 1 tensor (c) are"
    )
    assert len(said) == 1
    assert numbers in said[0]
    assert ("warning" in said[0]) is bool(np.isnan(values).any())
    made = load(tmp_path / "o.npz")
    assert made["c"].tobytes() == values.tobytes()
    assert made["w"].tolist() == [[2.5, 2.5]] * 3
    seen = polyak("check", "run", cwd=tmp_path)
    assert (seen.returncode, seen.stdout.splitlines()[-1]) == (0, "healthy")
    assert numbers in seen.stderr
    found = check(tmp_path / "run")
    assert [one.nonfinite for one in found.checkpoints] == [0] * 4
    finite = values[np.isfinite(values)].astype(np.float64)
    norm = np.median([np.sqrt(6 * e**2 + np.dot(finite, finite)) for e in (1, 2, 3, 4)])
    assert found.checkpoints[1].to_next == pytest.approx(np.sqrt(6) / norm)
    far = polyak("diff", "run", cwd=tmp_path)
    assert (far.returncode, far.stderr) == (0, "")
    assert verify(tmp_path / "o.npz", sources=[tmp_path / "run"]).verified


def test_a_value_that_differs_is_refused_by_its_glob(tmp_path: Path) -> None:
    """The option in the message, pasted, carries that tensor and averages the others."""
    name = "it's [best]*"
    run_of_three = write_with(tmp_path / "run", name, [np.inf, 0.5, 0.25])
    line = one_line(polyak("average", "run", "-o", "o.npz", cwd=tmp_path).stderr)
    assert line.startswith(f"run/m_1.npz: tensor '{name}' holds inf (element 0), but ")
    assert "run/m_2.npz holds 0.5; expected" in line
    found = re.search(r"--exclude-tensors (.*), or use --allow-nonfinite", line)
    assert found is not None
    (glob,) = shlex.split(found[1])
    done = polyak("average", "run", "-o", "o.npz", "--exclude-tensors", glob, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = load(tmp_path / "o.npz")
    assert (made[name].tolist(), made["w"][0, 0]) == (0.25, 2.0)
    (problem,) = check(run_of_three).all_problems
    assert problem.kind == "nonfinite"
    assert shlex.quote("it's [[]best][*]") in problem.text


@pytest.mark.parametrize(
    "values",
    [
        pytest.param([[np.inf, 1], [np.inf, 1], [np.inf, np.inf]], id="one more"),
        pytest.param([[np.inf, 1], [1, np.inf], [1, 1]], id="other places"),
        pytest.param([[np.inf, 1], [-np.inf, 1], [np.inf, 1]], id="other signs"),
        pytest.param([[np.inf, 1], [np.nan, 1], [np.inf, 1]], id="NaN"),
        pytest.param([[1, 1], [1, 1], [np.inf, 1]], id="the newest"),
    ],
)
def test_what_differs_is_wrong_for_average_and_for_check(
    tmp_path: Path, values: Sequence[object]
) -> None:
    """Both name a checkpoint, and with those of `check` left out the average is made."""
    paths = write_with(tmp_path / "run", "c", values)
    with pytest.raises(MismatchError, match=r"tensor 'c' holds (inf|-inf|nan)") as caught:
        average(paths, tmp_path / "o.npz")
    found = check(tmp_path / "run")
    ill = [one.path for one in found.checkpoints if one.problems]
    assert {problem.kind for problem in found.all_problems} == {"nonfinite"}
    assert any(str(caught.value).startswith(f"{path}: ") for path in ill)
    rest = [path for path in paths if path not in ill]
    if rest:
        average(rest, tmp_path / "o.npz")


def test_a_run_that_diverged_before_its_first_checkpoint_is_refused(tmp_path: Path) -> None:
    """NaN in a kernel, or all over a vector, are no constants though every checkpoint has them."""
    part = np.ones((3, 2))
    part[1, 1] = np.nan
    for number, broken in enumerate((part, np.full((3, 2), np.nan), np.full(4, np.nan))):
        folder = tmp_path / str(number)
        paths = write_with(folder, "c", [broken] * 3)
        with pytest.raises(MismatchError, match=r"(NaN|nan).*may have diverged") as caught:
            average(paths, tmp_path / "o.npz")
        assert "--exclude-tensors 'c', or use --allow-nonfinite" in str(caught.value)
        assert not (tmp_path / "o.npz").exists()
        found = check(folder)
        assert [[one.kind for one in each.problems] for each in found.checkpoints] == [
            ["nonfinite"]
        ] * 3
        average(paths, tmp_path / f"{number}.npz", allow_nonfinite=True)


def test_a_checkpoint_of_coefficient_0_does_not_count(tmp_path: Path) -> None:
    """Its finite value makes no constant of the others wrong."""
    paths = write_with(tmp_path / "run", "c", [7.0, np.inf, np.inf])
    report = average(paths, tmp_path / "o.npz", coefficients=[0.0, 0.5, 0.5])
    assert load(tmp_path / "o.npz")["c"] == np.inf
    assert any("1 number of 1 tensor (c) is infinite" in note for note in report.notes)


def test_constants_come_back_from_every_process(tmp_path: Path) -> None:
    """A mask of many slabs is counted once, whoever folds it, and gives the same bytes."""
    mask = np.full((600, 700), -np.inf, np.float32)
    mask[0] = 0
    write(tmp_path / "run", [{"w": np.full(9, e, "f4"), "mask": mask} for e in (1, 2)])
    for jobs in (1, 2):
        made = average(tmp_path / "run", tmp_path / f"{jobs}.npz", jobs=jobs, max_memory=1 << 20)
        (note,) = (one for one in made.notes if "infinite" in one)
        assert note.startswith(f"{599 * 700} numbers of 1 tensor (mask) are infinite")
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "2.npz").read_bytes()
    assert check(tmp_path / "run", max_memory=1 << 20).notes == (note,)


def test_distances_of_a_run_whose_infinities_differ_are_refused(tmp_path: Path) -> None:
    """A constant adds nothing to a distance; what differs has none."""
    paths = write_with(tmp_path / "run", "c", [np.inf, np.inf, 1.0])
    done = polyak("diff", *paths, cwd=tmp_path)
    assert done.returncode == 3
    assert "tensor 'c' holds a value that is not finite" in done.stderr
