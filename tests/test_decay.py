"""Coefficients in place of a decay of the learning rate, against the decay itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak_cli import average, plan
from polyak_cli.averaging.schemes import coefficients
from polyak_cli.errors import UsageError
from polyak_cli.evaluation import candidates
from tests.command import polyak
from tests.oracle import read_model, write_model

quietly = settings(derandomize=True, deadline=None)
FALLS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}


def test_four_checkpoints_have_the_published_coefficients() -> None:
    """The numbers of Megatron-LM's discretisation, oldest first."""
    found = coefficients("decay", [1, 2, 3, 4], shape="1-sqrt")
    assert found == pytest.approx((0.5, 0.207107, 0.158919, 0.133975), abs=5e-7)
    assert coefficients("decay", [10, 20, 30, 40]) == found  # the default, and any distance
    assert coefficients("decay", [1, 2, 3, 4], shape="linear") == (0.25,) * 4
    cosine = coefficients("decay", [1, 2, 3, 4], shape="cosine")
    assert cosine == pytest.approx((0.146447, 0.353553, 0.353553, 0.146447), abs=5e-7)


@quietly
@given(st.sampled_from([*FALLS]), st.integers(1, 60))
def test_even_distances_give_the_formula(shape: str, count: int) -> None:
    """c_0 = 1 - f(1/N), c_i = f(i/N) - f((i+1)/N), and the newest f((N-1)/N)."""
    f = FALLS[shape]
    falls = [*(f(i / count) for i in range(count)), 0.0]
    expected = [falls[i] - falls[i + 1] for i in range(count)]
    found = coefficients("decay", range(1, count + 1), shape=shape)
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-15)


@quietly
@given(
    st.sampled_from([*FALLS]),
    st.lists(st.integers(1, 10**6), min_size=2, max_size=12, unique=True),
    st.integers(0, 2**32 - 1),
)
def test_the_average_is_the_run_whose_updates_were_decayed(
    shape: str, steps: Sequence[int], seed: int
) -> None:
    """At any distances: the oldest plus each update, multiplied by what the rate has fallen to."""
    t = sorted(float(step) for step in steps)
    updates = np.random.default_rng(seed).normal(size=len(t) - 1)
    run = np.concatenate([[5.0], 5.0 + np.cumsum(updates)])
    end = t[0] + (t[-1] - t[0]) * len(t) / (len(t) - 1)  # one mean distance after the newest
    rates = [FALLS[shape]((at - t[0]) / (end - t[0])) for at in t[1:]]
    decayed = 5.0 + float(np.dot(rates, updates))
    found = coefficients("decay", t, shape=shape)
    assert float(np.dot(found, run)) == pytest.approx(decayed, rel=1e-11, abs=1e-11)
    assert min(found) >= 0.0
    assert math.fsum(found) == pytest.approx(1.0, abs=1e-15)


def test_a_linear_decay_counts_each_checkpoint_by_what_follows_it() -> None:
    """At uneven distances the weights are the distances to the next, and the mean one."""
    assert coefficients("decay", [1, 2, 5, 7], shape="linear") == pytest.approx(
        [1 / 8, 3 / 8, 2 / 8, 2 / 8], rel=1e-15
    )


def test_one_checkpoint_counts_1() -> None:
    """There is nothing to decay."""
    assert coefficients("decay", [7.0]) == (1.0,)


def test_the_bits_of_a_cosine_are_those_of_exact_arithmetic() -> None:
    """cos(pi/3) is 1/2, whose float64 neighbours a C library may return."""
    found = coefficients("decay", [1, 2, 3], shape="cosine")
    assert found == (0.25, 0.5, 0.25)


def test_another_shape_is_refused() -> None:
    """The message lists the shapes; those of other schemes do not belong to it."""
    expected = "--shape is root; expected one of linear, 1-sqrt, cosine"
    with pytest.raises(UsageError, match=expected):
        coefficients("decay", [1, 2], shape="root")
    with pytest.raises(UsageError, match=expected):
        candidates.parse_schemes("decay:root")
    with pytest.raises(UsageError, match="--shape belongs to --scheme decay, not to equal"):
        coefficients(None, [1, 2], shape="linear")
    with pytest.raises(UsageError, match="--decay belongs to --scheme ema, not to decay"):
        coefficients("decay", [1, 2], decay=0.9)
    assert candidates.parse_schemes("decay,decay:linear") == [
        ("decay", "1-sqrt"),
        ("decay", "linear"),
    ]


def test_decay_averages_files_by_their_epochs(tmp_path: Path) -> None:
    """Command line, API and plan agree, and the record has the shape."""
    folder = tmp_path
    (folder / "run").mkdir()
    for epoch in (10, 20, 40):
        write_model(
            folder / f"run/model_{epoch}.h5", {"d": {"k": np.full(3, epoch / 10, np.float64)}}
        )
    made = plan(folder / "run", scheme="decay", shape="linear")
    assert made.coefficients == pytest.approx([2 / 9, 4 / 9, 3 / 9])
    assert made.data()["parameters"] == {"shape": "linear"}
    command = ("average", "run", "--scheme", "decay", "--shape", "linear", "-o", "a.h5")
    done = polyak(*command, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "decay, shape linear" in done.stdout
    average(folder / "run", folder / "b.h5", scheme="decay", shape="linear")
    assert (folder / "a.h5").read_bytes() == (folder / "b.h5").read_bytes()
    found = read_model(folder / "a.h5")["model_weights/d/k"]
    np.testing.assert_allclose(found, (2 * 1 + 4 * 2 + 3 * 4) / 9, rtol=1e-15)
