"""An EMA of any width from EMA snapshots, against the EMAs of every step and numpy's solver."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from polyak_cli import average, plan, verify
from polyak_cli.averaging import provenance
from polyak_cli.averaging.schemes import coefficients, gamma
from polyak_cli.averaging.schemes.posthoc import combine
from polyak_cli.errors import CheckpointError, PolyakError, UsageError
from tests.command import polyak

Array = np.ndarray[Any, Any]
SIGMAS = (0.05, 0.10)


def solve(steps: Sequence[float], sigma: float, sigmas: Sequence[float]) -> Array:
    """Return the normalised solution of the normal equations, by LAPACK."""
    t, g = np.array(steps, np.float64), np.array([gamma(one) for one in sigmas])
    r, end = np.array([gamma(sigma)]), np.array([t.max()])

    def product(ta: Array, ga: Array, tb: Array, gb: Array) -> Array:
        power = (ta / tb) ** np.where(ta < tb, gb, -ga)
        widths = (ga + 1) * (gb + 1) / (ga + gb + 1)
        return np.asarray(widths * power / np.maximum(ta, tb))

    matrix = product(t[:, None], g[:, None], t[None], g[None])
    found: Array = np.linalg.solve(matrix, product(t, g, end, r))
    return np.asarray(found / found.sum())


def run_emas(walk: Array, sigma: float, every: int) -> dict[int, Array]:
    """Return the power-function EMA of a run of weights, as it was every few steps."""
    exponent, mean, kept = gamma(sigma) + 1, np.zeros(walk.shape[1]), {}
    for step, weights in enumerate(walk, 1):
        beta = (1 - 1 / step) ** exponent
        mean = beta * mean + (1 - beta) * weights
        if step % every == 0:
            kept[step] = mean.copy()
    return kept


def test_the_tiny_case_has_the_published_coefficients() -> None:
    """Two EMAs at two steps, for a width between; these bits are the same on every machine."""
    found = coefficients("posthoc", [4, 8, 4, 8], sigma=0.075, sigmas=[0.05, 0.05, 0.10, 0.10])
    assert found == pytest.approx((0.000136, 0.342969, -0.002427, 0.659322), abs=5e-7)
    assert found == (
        0.00013574828106139146,
        0.3429690358600806,
        -0.00242662683057669,
        0.6593218426894346,
    )


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.sampled_from([0.03, 0.05, 0.1, 0.2, 0.28])),
        min_size=2,
        max_size=12,
        unique=True,
    ),
    st.floats(0.02, 0.28),
)
def test_coefficients_are_those_of_a_solver(stored: list[tuple[int, float]], sigma: float) -> None:
    """For any snapshots and any width, up to what float64 loses."""
    steps, sigmas = [step for step, _ in stored], [one for _, one in stored]
    if (max(steps), sigma) in stored:
        return
    found = coefficients("posthoc", steps, sigma=sigma, sigmas=sigmas)
    np.testing.assert_allclose(found, solve(steps, sigma, sigmas), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("place", range(4))
def test_a_stored_ema_is_taken_alone(place: int) -> None:
    """Exactly 1 for the snapshot that is asked for, and 0 for all others."""
    steps, sigmas = [8, 8, 8, 4], [0.05, 0.1, 0.2, 0.05]
    if place < 3:
        found = coefficients("posthoc", steps, sigma=sigmas[place], sigmas=sigmas)
        assert found == tuple(float(k == place) for k in range(4))
    else:  # of an older step, which is not the one to make
        assert coefficients("posthoc", [8, 8, 4], sigma=0.2, sigmas=[0.05, 0.1, 0.2])[2] != 1.0


@pytest.mark.parametrize(
    ("sigma", "errors"),
    [(0.15, (3.3e-4, 2.7e-3, 1.8e-2)), (0.03, (1.6e-3, 1.1e-2, 5.0e-2))],
)
def test_a_random_walk_is_reconstructed(sigma: float, errors: Sequence[float]) -> None:
    """Snapshots of sigma 0.05 and 0.10 every 256, 512 and 1,024 of 4,096 steps give other EMAs."""
    walk = np.cumsum(np.random.default_rng(0).normal(size=(4096, 100)), axis=0)
    stored = {one: run_emas(walk, one, 256) for one in SIGMAS}
    wanted = run_emas(walk, sigma, 4096)[4096]
    for every, error in zip((256, 512, 1024), errors, strict=True):
        listed = [(step, one) for step in range(every, 4097, every) for one in SIGMAS]
        steps, sigmas = [step for step, _ in listed], [one for _, one in listed]
        found = coefficients("posthoc", steps, sigma=sigma, sigmas=sigmas)
        made = sum(
            (c * stored[one][step] for c, (step, one) in zip(found, listed, strict=True)),
            np.zeros(100),
        )
        off = np.linalg.norm(made - wanted) / np.linalg.norm(wanted)
        assert error / 1.5 < off < error * 1.5
    assert min(found) < 0


def test_a_profile_that_is_wholly_missed_is_said_in_plain_digits(tmp_path: Path) -> None:
    """One narrow EMA at two steps cannot be widened fourfold: off by more than the EMA itself."""
    for step in (5, 9):
        np.savez(tmp_path / f"ema-{step}-0.050.npz", w=np.ones(3))
    (note,) = plan(tmp_path, scheme="posthoc", sigma=0.2).notes
    assert "at step 9 by 154 % (norm of the difference): more snapshots" in note


def test_the_error_of_the_profile_is_that_of_its_values() -> None:
    """Integrated step by step, the combined profile is off by what is reported."""
    steps, sigmas, sigma = [512.0, 1024.0] * 2, [0.05, 0.05, 0.1, 0.1], 0.2
    found = combine(steps, sigma, sigmas)
    t = (np.arange(102400) + 0.5) / 100

    def profile(end: float, width: float) -> Array:
        g = gamma(width)
        return np.where(t <= end, (g + 1) * (t / end) ** g / end, 0.0)

    shares = coefficients("posthoc", steps, sigma=sigma, sigmas=sigmas)
    rows = zip(shares, steps, sigmas, strict=True)
    made = sum((c * profile(end, width) for c, end, width in rows), np.zeros(len(t)))
    wanted = profile(1024, sigma)
    off = np.linalg.norm(made - wanted) / np.linalg.norm(wanted)
    assert found.error == pytest.approx(off, rel=1e-2)


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of snapshots that are named as EDM2 names them."""
    walk = np.cumsum(np.random.default_rng(0).normal(size=(80, 9)), axis=0)
    (tmp_path / "emas").mkdir()
    for sigma in SIGMAS:
        for step, mean in run_emas(walk, sigma, 20).items():
            name = f"network-snapshot-{step:07d}-{sigma:.3f}.safetensors"
            save_file({"w": mean}, tmp_path / "emas" / name)
    return tmp_path


def expect(folder: Path, sigma: float, to: int = 80) -> Array:
    """Return the combination of the snapshots up to a step."""
    listed = [(step, one) for step in range(20, to + 1, 20) for one in SIGMAS]
    weights = solve([step for step, _ in listed], sigma, [one for _, one in listed])
    files = (folder / f"emas/network-snapshot-{t:07d}-{s:.3f}.safetensors" for t, s in listed)
    total: Array = sum(
        (c * load_file(file)["w"] for c, file in zip(weights, files, strict=True)), np.zeros(9)
    )
    return total


def test_snapshots_are_combined_by_their_names(folder: Path) -> None:
    """In order of step and sigma; the newest step is that of the EMA, or the last by --to."""
    output = folder / "o.safetensors"
    report = average(folder / "emas", output, scheme="posthoc", sigma=0.15)
    np.testing.assert_allclose(load_file(output)["w"], expect(folder, 0.15), rtol=1e-9)
    found = report.plan.data()
    assert [one["epoch"] for one in found["checkpoints"]] == [20, 20, 40, 40, 60, 60, 80, 80]
    assert [one["sigma"] for one in found["checkpoints"]] == [0.05, 0.1] * 4
    assert found["parameters"] == {"sigma": 0.15}
    assert found["sum_of_absolutes"] > 1
    assert any("are off those of an EMA of sigma 0.15 at step 80 by" in n for n in report.notes)
    inputs = provenance.make_record(report.plan)["inputs"]
    assert [(one["step"], one["sigma"]) for one in inputs[:3]] == [
        (20, 0.05),
        (20, 0.1),
        (40, 0.05),
    ]
    assert verify(output).verified
    average(folder / "emas", output, scheme="posthoc", sigma=0.15, to_epoch=60, force=True)
    np.testing.assert_allclose(load_file(output)["w"], expect(folder, 0.15, 60), rtol=1e-9)
    average(folder / "emas", output, scheme="posthoc", sigma=0.1, force=True)
    stored = load_file(folder / "emas/network-snapshot-0000080-0.100.safetensors")["w"]
    assert load_file(output)["w"].tobytes() == stored.tobytes()


@pytest.mark.parametrize("form", ["csv", "json", "sigmas"])
def test_step_and_sigma_can_be_listed(folder: Path, form: str) -> None:
    """In a file of the user's, or as the sigmas of files that have the number of their EMA."""
    rows: list[dict[str, Any]] = []
    for path in sorted((folder / "emas").iterdir()):
        _, _, step, sigma = path.name.removesuffix(".safetensors").split("-")
        index = SIGMAS.index(float(sigma))
        stem = f"{index}.{int(step)}" if form == "sigmas" else str(len(rows))
        name = f"{stem}.safetensors"
        path.rename(path.with_name(name))
        rows.append({"file": name, "step": int(step), "sigma": float(sigma)})
    said = folder / f"list.{form}"
    if form == "csv":
        lines = ["file,step,sigma", *(f"{r['file']},{r['step']},{r['sigma']}" for r in rows)]
        said.write_text("\n".join(lines))
    elif form == "json":
        said.write_text(json.dumps([*rows, {"file": "gone.pt", "step": 5, "sigma": 0.2}]))
    given_ = "0.05,0.10" if form == "sigmas" else str(said)
    command = ("average", "emas", "--scheme", "posthoc", "--sigma", "0.15", "-o", "o.safetensors")
    done = polyak(*command, "--snapshots", given_, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert ("lists files that are not used: gone.pt" in done.stderr) == (form == "json")
    found = load_file(folder / "o.safetensors")["w"]
    listed = [(r["step"], r["sigma"]) for r in rows]
    weights = solve([step for step, _ in listed], 0.15, [one for _, one in listed])
    values = [load_file(folder / "emas" / r["file"])["w"] for r in rows]
    np.testing.assert_allclose(found, np.array(weights) @ np.array(values), rtol=1e-9)


REFUSED: dict[str, tuple[Callable[[Path], dict[str, Any]], type[PolyakError], str]] = {
    "no sigma": (lambda _: {"sigma": None}, UsageError, "posthoc needs --sigma; expected"),
    "too wide": (lambda _: {"sigma": 0.3}, UsageError, "--sigma is 0.3; expected"),
    "last": (lambda _: {"last": 3}, UsageError, "combines all snapshots, and --last would"),
    "order": (lambda _: {"order": "given"}, UsageError, "and --order would"),
    "unhealthy": (lambda _: {"on_unhealthy": "skip"}, UsageError, "takes running means of them"),
    "another scheme": (
        lambda _: {"scheme": "power", "snapshots": "0.1"},
        UsageError,
        "--snapshots belongs to --scheme posthoc",
    ),
    "index": (lambda _: {"snapshots": "0.05,0.1"}, UsageError, "expected an INDEX below 2"),
    "no list": (lambda d: {"snapshots": write(d, "a,b\n1,2\n")}, CheckpointError, "no list of sn"),
    "a value": (
        lambda d: {"snapshots": write(d, "file,step,sigma\na,-1,0.1\n")},
        CheckpointError,
        "no list of snapshots .step -1, sigma 0.1",
    ),
    "twice": (
        lambda d: {"snapshots": write(d, "file,step,sigma\na,1,0.1\na,2,0.1\n")},
        CheckpointError,
        "lists a file twice",
    ),
    "binary": (lambda d: {"snapshots": write(d, "\0\udcff")}, CheckpointError, "no list of sna"),
    "not listed": (
        lambda d: {"snapshots": write(d, "file,step,sigma\na,1,0.1\n")},
        UsageError,
        "does not list network-snapshot-0000020-0.050.safetensors",
    ),
    "a huge number": (
        lambda d: {"snapshots": write(d, f'[{{"file": "a", "step": {10**400}, "sigma": 0.1}}]')},
        CheckpointError,
        "no list of snapshots",
    ),
    "rows of another form": (
        lambda d: {"snapshots": write(d, "[1, [2]]")},
        CheckpointError,
        "no list of snapshots",
    ),
    "a width": (
        lambda d: {"snapshots": write_all(d, 0.5)},
        UsageError,
        "a snapshot has step 1 and sigma 0.5; expected a step above 0, and a sigma from 0.001",
    ),
    "gone": (lambda d: {"snapshots": d / "gone.csv"}, CheckpointError, "gone.csv: "),
    "steps": (lambda _: {"to_epoch": 5}, CheckpointError, "found steps 20 to 80"),
    "one": (
        lambda _: {"exclude": ["*-0.1*", "*20-*", "*40-*", "*60-*"]},
        UsageError,
        "one snapshot, of sigma 0.05, gives no other EMA",
    ),
}


def write(folder: Path, text: str) -> Path:
    """Write a list and return its path."""
    (folder / "list").write_bytes(text.encode(errors="surrogateescape"))
    return folder / "list"


def write_all(folder: Path, sigma: float) -> Path:
    """Write a list of all snapshots with one sigma, and return its path."""
    names = sorted(path.name for path in (folder / "emas").iterdir())
    rows = [f"{name},{step},{sigma}" for step, name in enumerate(names, 1)]
    return write(folder, "\n".join(["file,step,sigma", *rows]))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_combined_is_refused_in_one_line(folder: Path, name: str) -> None:
    """Each message says what was found and what to do."""
    make, kind, found = REFUSED[name]
    options: Any = {"scheme": "posthoc", "sigma": 0.15, **make(folder)}
    with pytest.raises(kind, match=found) as caught:
        plan(folder / "emas", **options)
    assert len(str(caught.value).splitlines()) == 1


def test_the_same_ema_twice_is_refused(folder: Path) -> None:
    """Two files of one step and sigma have no coefficients of their own."""
    first = folder / "emas/network-snapshot-0000020-0.050.safetensors"
    (folder / "emas/other-0000020-0.050.safetensors").write_bytes(first.read_bytes())
    with pytest.raises(UsageError, match=r"two snapshots have sigma 0\.05 at step 20"):
        plan(folder / "emas", scheme="posthoc", sigma=0.15)
    with pytest.raises(UsageError, match="too alike for coefficients of their own"):
        combine([8.0, 8.0, 4.0], 0.1, [0.05, 0.05 + 1e-17, 0.2 - 0.1])
    with pytest.raises(UsageError, match=r"needs the sigma of each snapshot; found 0 of 2"):
        coefficients("posthoc", [1, 2], sigma=0.1)


def test_a_name_without_step_and_sigma_is_refused(tmp_path: Path) -> None:
    """The message shows EDM2's form, and both ways to say it."""
    for k in (1, 2):
        save_file({"w": np.full(2, float(k))}, tmp_path / f"ema_{k}.safetensors")
    with pytest.raises(UsageError, match="no such name as network-snapshot-0001234-"):
        plan(tmp_path, scheme="posthoc", sigma=0.1)
