"""Schemes over running means, by the numbers in names, and who cannot use them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from polyak_cli import average, geometry, plan, verify, watch
from polyak_cli.averaging.schemes import SCHEMES, coefficients
from polyak_cli.errors import UsageError
from polyak_cli.evaluation import candidates


def write_means(folder: Path, steps: list[int], run: np.ndarray) -> Path:
    """Write the plain mean of the first rows of a run for each step."""
    folder.mkdir()
    for step in steps:
        save_file({"w": run[:step].mean(0)}, folder / f"checkpoint-{step}.safetensors")
    return folder


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 10**7), st.integers(1, 10**7), st.integers(0, 3))
def test_the_coefficients_are_the_exact_quotients(start: int, length: int, between: int) -> None:
    """E / (e - s) and -s / (e - s), each rounded once; what lies between does not count."""
    end = start + between + length
    steps = [start, *range(start + 1, start + between + 1), end]
    found = coefficients("window", steps)
    assert found[-1] == float(Fraction(end, end - start))
    assert found[0] == float(Fraction(-start, end - start))
    assert found[1:-1] == (0.0,) * between


def test_two_running_means_give_the_mean_between(tmp_path: Path) -> None:
    """Steps are the numbers in the names; files between are not read."""
    run = np.random.default_rng(0).normal(5, size=(40, 3))
    folder = write_means(tmp_path / "run", [8, 16, 40], run)
    (folder / "checkpoint-16.safetensors").write_bytes(
        (folder / "checkpoint-8.safetensors").read_bytes()
    )
    report = average(folder, tmp_path / "o.safetensors", scheme="window")
    np.testing.assert_allclose(
        load_file(tmp_path / "o.safetensors")["w"], run[8:].mean(0), rtol=1e-13
    )
    assert report.plan.mean.multipliers == (-8.0, 0.0, 40.0)
    assert report.plan.settings.tensors.allow == ("averages",)
    assert verify(tmp_path / "o.safetensors", sources=[folder]).verified


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["checkpoint-8"], "takes the running means of two files"),
        (["a", "b"], "needs the step of each file, but .*a.safetensors has no number"),
        (["checkpoint-8", "checkpoint-0"], "position 0"),
    ],
)
def test_a_window_without_two_steps_is_refused(
    tmp_path: Path, names: list[str], found: str
) -> None:
    """One line says what is missing."""
    files = [tmp_path / f"{name}.safetensors" for name in names]
    for k, file in enumerate(files):
        save_file({"w": np.full(3, float(k))}, file)
    with pytest.raises(UsageError, match=found):
        plan(files, scheme="window", order="given")


@pytest.mark.parametrize("scheme", [n for n, s in SCHEMES.items() if s.takes != "checkpoints"])
def test_what_is_for_checkpoints_of_a_run_refuses_them(tmp_path: Path, scheme: str) -> None:
    """Watch, sweep and geometry say so, and name `polyak average`."""
    expected = f"--scheme {scheme} takes running means that belong together"
    options: Any = {"scheme": scheme} | ({"sigma": 0.1} if scheme == "posthoc" else {})
    with pytest.raises(UsageError, match=expected):
        geometry(tmp_path, **options)
    with pytest.raises(UsageError, match=expected):
        watch(tmp_path, tmp_path / "o.safetensors", **options)
    with pytest.raises(UsageError, match=expected):
        candidates.parse_schemes(scheme)
