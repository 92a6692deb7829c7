"""Checkpoints that pass one by one in memory: the mean is that of files, exactly."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from polyak_cli import average
from polyak_cli.engine import running
from polyak_cli.errors import MismatchError

FLOATS: Any = st.floats(-1e6, 1e6, width=32).map(lambda x: x or 0.0)


def run(states: list[Any], multipliers: list[float]) -> Any:
    """Return the mean of some arrays."""
    mean = running.begin(["t"], [states[0].dtype.name], [states[0].size])
    for k, (state, multiplier) in enumerate(zip(states, multipliers, strict=True)):
        mean.add(iter([state]), multiplier, f"step {k}")
    assert mean.count == len(states)
    assert mean.nbytes == 8 * states[0].size
    (raw,) = mean.finish(sum(multipliers))
    assert mean.nbytes == 0
    return raw.view(states[0].dtype).reshape(states[0].shape)


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=FLOATS))
def test_a_mean_is_within_one_rounding_of_the_exact_one(states: Any) -> None:
    """Of float32, with newer ones counting more; the oracle adds up fractions."""
    multipliers = [float(k + 1) for k in range(len(states))]
    found = run(list(states), multipliers)
    for column, mean in zip(states.T, found, strict=True):
        terms = (Fraction(float(x)) * Fraction(m) for x, m in zip(column, multipliers, strict=True))
        exact = sum(terms) / Fraction(sum(multipliers))
        # float64 has 29 bits more, which no sum of six uses up but by cancellation.
        assert abs(Fraction(float(mean)) - exact) <= Fraction(
            float(np.spacing(np.abs(mean)))
        ) / 2 + (Fraction(float(np.abs(column).max())) * Fraction(1, 1 << 48))


@pytest.mark.parametrize("size", [0, 1, (1 << 16) - 1, (1 << 16) + 1])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_bits_are_those_of_files(size: int, dtype: str, tmp_path: Path) -> None:
    """Whatever the type, and where a tensor is added in several blocks; -0.0 stays."""
    rng = np.random.default_rng(size)
    states = [(rng.normal(size=size) * 10.0**k).astype(dtype) for k in range(3)]
    for state in states:
        state[:1] = -0.0
    for k, state in enumerate(states):
        np.savez(tmp_path / f"m_{k}.npz", t=state, u=np.ones(1, "float32"))
    average(tmp_path, tmp_path / "out.npz", scheme="linear", exclude=["out.npz"])
    found = run(states, [1.0, 2.0, 3.0])
    with np.load(tmp_path / "out.npz") as file:
        assert found.tobytes() == file["t"].tobytes()


def test_a_constant_infinity_stays_and_others_are_refused() -> None:
    """A mask of -inf is no diverged training; infinity that comes or goes, and NaN, are."""
    mask = np.array([-np.inf, 1.0], "float32")
    np.testing.assert_array_equal(run([mask, mask, mask], [1.0] * 3), mask)
    plain = np.array([2.0, 1.0], "float32")
    large = np.array([1e308, 1.0])  # finite, unlike the sum of two
    for states in (
        [large, large],
        [mask, plain],
        [plain, mask],
        [mask, -mask],
        [np.array([np.nan], "float32")],
    ):
        with pytest.raises(MismatchError, match=rf"'t' holds .* at step {len(states) - 1}"):
            run(states, [1.0] * len(states))
