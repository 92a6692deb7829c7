"""How much each checkpoint counts, against numbers and formulas worked out without the package."""

from __future__ import annotations

import decimal
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from polyak_cli.averaging import schemes
from polyak_cli.averaging.schemes import (
    SCHEMES,
    Mean,
    coefficients,
    effective_number,
    gamma,
    make_mean,
    resolve,
)
from polyak_cli.errors import UsageError
from tests.command import unmeasured

quietly = settings(derandomize=True, deadline=None)
counts = st.integers(1, 300)
alphas = st.floats(min_value=5e-324, max_value=1.7e308)
decays = st.floats(min_value=5e-324, max_value=1.0)
sigmas = st.floats(min_value=5e-324, max_value=0.2886)


def run_of(count: int) -> list[float]:
    """Return the positions of a run's first epochs."""
    return [float(epoch) for epoch in range(1, count + 1)]


def newest_first(
    scheme: str, *, alpha: float | None = None, decay: float | None = None
) -> list[float]:
    """Return the coefficients of ten checkpoints, as the tables print them."""
    return list(reversed(coefficients(scheme, run_of(10), alpha=alpha, decay=decay)))


def test_equal_counts_each_alike() -> None:
    """Ten checkpoints count 0.1 each."""
    assert newest_first("equal") == [0.1] * 10


def test_linear_gives_the_numbers_of_the_tutorial() -> None:
    """Linear coefficients fall evenly from 0.181818 to 0.018182."""
    expected = [
        *(0.181818, 0.163636, 0.145455, 0.127273, 0.109091),
        *(0.090909, 0.072727, 0.054545, 0.036364, 0.018182),
    ]
    assert newest_first("linear") == pytest.approx(expected, abs=1e-6)


def test_exp_gives_the_numbers_of_the_tutorial() -> None:
    """With alpha 2 the newest of ten counts 0.396139 and the oldest 0.004401."""
    expected = [
        *(0.396139, 0.240270, 0.145731, 0.088390, 0.053612),
        *(0.032517, 0.019723, 0.011962, 0.007256, 0.004401),
    ]
    assert newest_first("exp", alpha=2.0) == pytest.approx(expected, abs=1e-6)


def test_ema_is_debiased() -> None:
    """The oldest of ten does not count 0.91 at decay 0.99, but its fair share."""
    result = newest_first("ema", decay=0.99)
    assert result[0] == pytest.approx(1 / sum(0.99**age for age in range(10)), abs=1e-12)
    assert result[9] == pytest.approx(result[0] * 0.99**9, abs=1e-12)


@pytest.mark.parametrize(
    ("sigma", "expected"),
    [(0.05, 16.972199), (0.10, 6.937204), (0.15, 3.557869), (0.20, 1.826214), (0.25, 0.719824)],
)
def test_gamma_gives_the_published_exponents(sigma: float, expected: float) -> None:
    """The five widths have the exponents of the design's table."""
    assert gamma(sigma) == pytest.approx(expected, abs=1e-6)


@quietly
@given(st.floats(min_value=1e-3, max_value=0.2886))
def test_gamma_is_the_largest_root_that_numpy_finds(sigma: float) -> None:
    """The exponent agrees with the roots of the cubic as an eigenvalue solver gives them."""
    inverse = 1.0 / sigma**2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    largest = max(root.real for root in roots if abs(root.imag) < 1e-6 * abs(root))
    assert gamma(sigma) == pytest.approx(largest, rel=1e-9, abs=1e-9)


def integrate_power(positions: Sequence[float], sigma: float) -> list[float]:
    """Return the coefficients by Gauss' quadrature of the density times what is between files."""
    exponent = gamma(sigma)
    nodes, weights = np.polynomial.legendre.leggauss(100)
    start = max(0.0, 2 * positions[0] - positions[1])
    found = np.zeros(len(positions))
    for left, right in itertools.pairwise([start, *positions]):
        times = left + (right - left) * (nodes + 1) / 2
        density = weights * (right - left) / 2 * (times / positions[-1]) ** exponent
        for place in range(len(positions)):
            # np.interp is the line between neighbours, and the oldest's value before it.
            hat = np.interp(times, positions, np.eye(len(positions))[place])
            found[place] += float(density @ hat)
    return list(found / found.sum())


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.25])
@pytest.mark.parametrize("positions", [[490, 495, 500], [1, 2, 3, 4], [2, 9], [5, 6, 90, 100]])
def test_power_is_the_integral_of_what_is_interpolated(
    positions: list[float], sigma: float
) -> None:
    """Lines between checkpoints, the oldest's value before it, times (g+1) t^g / T^(g+1)."""
    found = coefficients("power", positions, sigma=sigma)
    assert found == pytest.approx(integrate_power(positions, sigma), rel=1e-7, abs=1e-30)


def test_power_halves_the_error_of_counting_each_interval_for_its_end() -> None:
    """Against the EMA of every step, on random walks of 1,024 steps with a file every 64.

    The relative errors, in per cent, of counting an interval's steps for the file at its end, and
    of the lines between files; means of ten seeds.
    """
    steps, spacing, seeds = 1024, 64, 10
    walk = np.random.default_rng(0).normal(size=(steps, seeds, 100)).cumsum(axis=0)
    times = np.arange(spacing, steps + 1, spacing)
    files = walk[times - 1]
    for sigma, old, new in (
        (0.05, 9.6, 5.4),
        (0.10, 7.6, 4.1),
        (0.15, 6.8, 3.4),
        (0.25, 5.5, 2.8),
    ):
        exponent = gamma(sigma) + 1
        every_step = np.zeros(walk.shape[1:])
        for step in range(1, steps + 1):
            decay = (1 - 1 / step) ** exponent
            every_step = decay * every_step + (1 - decay) * walk[step - 1]

        def measure(counts: Sequence[float], expected: np.ndarray = every_step) -> float:
            missed = np.tensordot(np.asarray(counts), files, 1) - expected
            errors = np.linalg.norm(missed, axis=1) / np.linalg.norm(expected, axis=1)
            return 100 * float(errors.mean())

        at_ends = np.diff((np.array([0, *times]) / steps) ** exponent)
        assert measure(list(at_ends)) == pytest.approx(old, abs=0.7)
        own = measure(coefficients("power", [float(time) for time in times], sigma=sigma))
        assert own == pytest.approx(new, abs=0.4)


def test_power_does_not_reach_back_before_the_start_of_the_run() -> None:
    """The oldest stands for the steps before it, as many as up to the next, but none before 0."""
    exponent = gamma(0.2) + 1.0
    mass = 1 - (2 / 9) ** exponent
    moment = exponent / (exponent + 1) * (9 - 2 * (2 / 9) ** exponent)
    newer = (moment - 2 * mass) / 7
    assert coefficients("power", [2, 9], sigma=0.2) == pytest.approx([1 - newer, newer], rel=1e-12)


def test_power_counts_positions_that_are_close_together_exactly() -> None:
    """Steps of a long run differ in their last digits only; no digit of the result is lost.

    So near the end the density does not change: half an interval at the newest, one and a half at
    the oldest.
    """
    found = coefficients("power", [1e15 - 2, 1e15 - 1, 1e15], sigma=0.1)
    assert found == pytest.approx([1 / 2, 1 / 3, 1 / 6], rel=1e-13)


def test_power_of_one_checkpoint_is_that_checkpoint() -> None:
    """A single checkpoint counts 1, wherever it stands."""
    assert coefficients("power", [490.0], sigma=0.1) == (1.0,)


def test_power_at_its_widest_is_the_mean_of_every_step() -> None:
    """Towards sigma = 1/sqrt(12) every step counts alike: the newest for half an interval only."""
    widest = math.nextafter(1 / math.sqrt(12), 0.0) - 1e-12
    expected = [0.3, 0.2, 0.2, 0.2, 0.1]
    assert coefficients("power", run_of(5), sigma=widest) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("positions", "found"),
    [
        ([2.5, 2.5], "position 2.5 follows 2.5; expected positions that rise"),
        ([2.0, 1.0], "position 1 follows 2; expected positions that rise"),
        ([0.0, 1.0], "a checkpoint has position 0; expected finite positions"),
        ([1.0, math.nan], "a checkpoint has position nan; expected finite positions"),
        ([1.0, math.inf], "a checkpoint has position inf; expected finite positions"),
    ],
)
def test_power_refuses_positions_that_do_not_rise(positions: list[float], found: str) -> None:
    """Positions that stand still, fall, or begin before the run are an error that names them."""
    with pytest.raises(UsageError, match=f"^--scheme power: {found}"):
        coefficients("power", positions, sigma=0.1)


def run_live(decays: Sequence[float], count: int) -> np.ndarray:
    """Return the coefficients of a live EMA: each checkpoint folded into what there was.

    The checkpoints are the unit vectors, so the average is its coefficients.
    """
    checkpoints = np.eye(count)
    mean: np.ndarray = checkpoints[0]
    for decay, checkpoint in zip(decays, checkpoints[1:], strict=True):
        mean = decay * mean + (1 - decay) * checkpoint
    return np.asarray(mean)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999, 1.0])
def test_ema_from_the_first_is_the_recursion(decay: float) -> None:
    """The oldest of ten counts decay^9: 0.387 at 0.9; with the ramps much less."""
    found = coefficients("ema", run_of(10), decay=decay, from_first=True)
    assert found == pytest.approx(run_live([decay] * 9, 10))
    assert found[0] == pytest.approx(decay**9)
    ramped = coefficients("ema", run_of(10), decay=decay, ramp="tfa")
    assert ramped == pytest.approx(
        run_live([min(decay, (1 + t) / (10 + t)) for t in range(1, 10)], 10)
    )
    ramped = coefficients("ema", run_of(10), decay=decay, ramp="ema-pytorch")
    limits = [min(decay, 1 - (1 + t) ** (-2 / 3)) for t in range(1, 10)]
    assert ramped == pytest.approx(run_live(limits, 10))


@quietly
@given(st.lists(st.integers(1, 10**4), min_size=1, max_size=30, unique=True), st.floats(0.1, 1e5))
def test_half_lives_are_of_steps_whatever_the_spacing(steps: list[int], half_life: float) -> None:
    """An update after d steps keeps 2^(-d / H); EDM2's ramp limits H to 0.09 t at step t."""
    positions = [float(step) for step in sorted(steps)]
    gaps = np.diff(positions)
    live = coefficients("ema", positions, ema_half_life=half_life, from_first=True)
    expected = run_live(list(2.0 ** -(gaps / half_life)), len(positions))
    assert live == pytest.approx(expected, abs=1e-12)
    limits = np.minimum(half_life, 0.09 * np.array(positions[1:]))
    ramped = coefficients("ema", positions, ema_half_life=half_life, ramp="edm2")
    assert ramped == pytest.approx(
        run_live(list(2.0 ** -(gaps / limits)), len(positions)), abs=1e-12
    )
    # Debiased: the live EMA of what came after an update before the oldest, over its sum.
    before = min([positions[0], *gaps[:1]])
    started = run_live(list(2.0 ** -(np.array([before, *gaps]) / half_life)), len(positions) + 1)[
        1:
    ]
    found = coefficients("ema", positions, ema_half_life=half_life)
    assert found == pytest.approx(started / started.sum(), abs=1e-9)


def test_a_half_life_is_a_decay_where_checkpoints_are_evenly_spaced() -> None:
    """Every 5 epochs and a half-life of 20: each counts 2^(-1/4) of the next one."""
    positions = [float(epoch) for epoch in range(5, 51, 5)]
    assert coefficients("ema", positions, ema_half_life=20) == pytest.approx(
        coefficients("ema", positions, decay=2**-0.25), rel=1e-15
    )
    halves = SCHEMES["ema"].function([10.0, 15.0, 20.0], ema_half_life=5.0)
    assert halves == [0.25, 0.5, 1.0]


@settings(quietly, max_examples=30)
@given(counts, st.floats(5e-324, 1.7e308), st.sampled_from([None, "tfa", "ema-pytorch", "edm2"]))
@example(10, 5e-324, None)
@example(10, 1.7e308, None)
@example(300, 1.7e308, "edm2")
def test_ema_is_sound_for_any_half_life(count: int, half_life: float, ramp: str | None) -> None:
    """However short or long: finite, at least 0, sum 1; debiased, it never rises with age."""
    found = coefficients("ema", run_of(count), ema_half_life=half_life, ramp=ramp)
    sound(found, falling=ramp is None)


def test_power_by_a_half_life_is_that_of_its_sigma() -> None:
    """The exponent g + 1 is T ln(2) / H; with more than T ln(2), every step counts alike."""
    positions = run_of(40)
    exponent = 40 * math.log(2) / 4
    sigma = math.sqrt(exponent / ((exponent + 1) ** 2 * (exponent + 2)))
    assert coefficients("power", positions, ema_half_life=4) == pytest.approx(
        coefficients("power", positions, sigma=sigma), rel=1e-10, abs=1e-25
    )
    # The mean of all steps: the oldest stands for itself and what lies before, the newest for half.
    equal = [1.5 / 40, *(1 / 40 for _ in positions[1:-1]), 0.5 / 40]
    for half_life in (40 * math.log(2), 28, 1e300):
        found = coefficients("power", positions, ema_half_life=half_life)
        assert found == pytest.approx(equal, rel=1e-12)


def test_power_is_the_default_ema_of_torchtitan() -> None:
    """Its decay of update n is 2^(-1 / (0.05 n)), a half-life of 5 % of the run: sigma 0.0629."""
    steps = 1000
    live = np.zeros(steps)
    live[0] = 1
    for step in range(1, steps):  # its first two updates both count as number 1
        decay = 2.0 ** (-1 / (0.05 * step))
        live = live * decay
        live[step] += 1 - decay
    found = coefficients("power", run_of(steps), sigma=0.0629)
    assert float(np.abs(live - found).sum()) < 0.02  # of all the weight, 2
    assert gamma(0.0629) + 1 == pytest.approx(20 * math.log(2), rel=1e-3)
    by_half_life = coefficients("power", run_of(steps), ema_half_life=0.05 * steps)
    assert by_half_life == pytest.approx(found, rel=0.01, abs=1e-12)


def test_the_function_of_a_scheme_gives_its_multipliers() -> None:
    """They are what the documentation writes, at the edges of its cases too."""
    assert SCHEMES["equal"].function(run_of(3)) == [1.0, 1.0, 1.0]
    assert SCHEMES["linear"].function(run_of(4)) == [1.0, 2.0, 3.0, 4.0]
    assert SCHEMES["exp"].function(run_of(2), alpha=0.01) == [
        rounded_exp(-1 / Fraction(0.01)),
        1.0,
    ]
    assert SCHEMES["ema"].function(run_of(3), decay=0.5) == [0.25, 0.5, 1.0]
    assert SCHEMES["power"].function([490.0], sigma=0.1) == [1.0]


@quietly
@given(counts)
def test_linear_is_exact_to_a_bit_or_two(count: int) -> None:
    """Each coefficient is 2(N - a) / (N(N + 1)), worked out in fractions."""
    expected = [Fraction(2 * (place + 1), count * (count + 1)) for place in range(count)]
    got = coefficients("linear", run_of(count))
    assert got == pytest.approx([float(value) for value in expected], rel=1e-15)


@quietly
@given(counts, st.floats(min_value=0.01, max_value=1e6))
def test_exp_equals_its_formula(count: int, alpha: float) -> None:
    """The coefficients are exp(-(a + 1) / alpha) over their sum, as exact as math.exp is."""
    raw = [math.exp(-(age + 1) / alpha) for age in reversed(range(count))]
    expected = [value / math.fsum(raw) for value in raw]
    # Below the smallest normal number a float has fewer digits, and the oracle's are cut first.
    assert coefficients("exp", run_of(count), alpha=alpha) == pytest.approx(
        expected, rel=1e-13, abs=1e-250
    )


def test_a_tiny_alpha_leaves_the_newest_alone() -> None:
    """With alpha 0.001 the newest counts 1 instead of 0/0."""
    assert newest_first("exp", alpha=0.001) == [1.0] + [0.0] * 9


@quietly
@given(counts, st.floats(min_value=0.05, max_value=0.999))
def test_ema_equals_exp_with_the_matching_alpha(count: int, decay: float) -> None:
    """A decay is an alpha of -1 / ln(decay)."""
    alpha = -1.0 / math.log(decay)
    assert coefficients("ema", run_of(count), decay=decay) == pytest.approx(
        coefficients("exp", run_of(count), alpha=alpha), rel=1e-10, abs=1e-200
    )


def sound(values: Sequence[float], falling: bool = True) -> None:
    """Assert what holds for all coefficients."""
    assert all(math.isfinite(value) and value >= 0.0 for value in values)
    assert abs(math.fsum(values) - 1.0) <= 1e-15 * len(values)
    if falling:
        assert list(values) == sorted(values)


@quietly
@given(counts)
def test_schemes_without_parameter_are_sound(count: int) -> None:
    """Equal and linear are finite, sum to 1 and never rise with age."""
    sound(coefficients("equal", run_of(count)))
    sound(coefficients("linear", run_of(count)))


@quietly
@given(counts, alphas, decays)
@example(10, 5e-324, 5e-324)
@example(10, 1.7e308, 1.0)
@example(10, 0.01, 0.5)
@example(10, math.nextafter(0.01, 0.0), 0.5)
def test_exp_and_ema_are_sound_for_any_parameter(count: int, alpha: float, decay: float) -> None:
    """However small or large the parameter: finite, sum 1, never rising with age."""
    sound(coefficients("exp", run_of(count), alpha=alpha))
    sound(coefficients("ema", run_of(count), decay=decay))


@quietly
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=60, unique=True), sigmas)
@example([1, 2, 3], 5e-324)
@example([1, 2, 3], 1e-200)
def test_power_is_sound_for_any_positions_and_width(epochs: list[int], sigma: float) -> None:
    """However narrow the average and uneven the epochs: finite, at least 0, sum 1."""
    positions = [float(epoch) for epoch in sorted(epochs)]
    sound(coefficients("power", positions, sigma=sigma), falling=False)


@quietly
@given(st.lists(st.floats(min_value=0.0, max_value=1.7e308), min_size=1, max_size=50).filter(any))
@example([1e308, 1e308, 1e308])
@example([5e-324, 0.0])
def test_custom_numbers_are_only_normalised(numbers: list[float]) -> None:
    """What is given is divided by its sum, exactly, however huge or tiny it is."""
    result = coefficients(None, run_of(len(numbers)), custom=numbers)
    sound(result, falling=False)
    total = sum(Fraction(number) for number in numbers)
    expected = [float(Fraction(number) / total) for number in numbers]
    assert result == pytest.approx(expected, rel=1e-14, abs=1e-300)


@quietly
@given(st.lists(st.floats(min_value=0.0, max_value=1.7e308), min_size=1, max_size=50).filter(any))
@example([1e308, 1e308, 1e308])
@example([5e-324, 5e-324, 0.0])
@example([1.0] * 8)
def test_the_scaled_mean_is_the_same_mean_with_a_divisor_near_one(numbers: list[float]) -> None:
    """One power of two for both sides; only what is below the smallest float64 is rounded."""
    mean = make_mean(numbers)
    assert mean.divisor == math.fsum(mean.multipliers)
    multipliers, divisor = mean.scale()
    assert 0.5 < divisor <= 1.0
    if sum(number > 0 for number in mean.multipliers) == 1:
        assert sorted(multipliers) == [0.0] * (len(numbers) - 1) + [1.0]
        return
    for own, scaled in zip(mean.multipliers, multipliers, strict=True):
        exact = Fraction(own) / Fraction(mean.divisor) * Fraction(divisor)
        assert abs(Fraction(scaled) - exact) <= Fraction(1, 2**1074)


def test_multipliers_of_usual_size_are_used_as_they_are_given() -> None:
    """The record and `--coefficients` show 1, and not a power of two or a share."""
    assert make_mean([1.0, 2.0, 5.0]) == Mean((1.0, 2.0, 5.0), 8.0)
    assert make_mean([1.0, 2.0, 5.0]).scale() == Mean((0.125, 0.25, 0.625), 1.0)
    assert make_mean([1.0] * 3).scale() == Mean((0.25,) * 3, 0.75)


def test_a_mean_with_the_divisor_1_multiplies_by_its_coefficients() -> None:
    """As the older rule did: `polyak verify` computes its averages in the same way once more."""
    old = Mean((0.1,) * 10, 1.0)
    assert old.scale() == old
    assert old.coefficients == old.multipliers


def test_custom_keeps_the_order_oldest_first() -> None:
    """The first number belongs to the oldest checkpoint."""
    assert coefficients(None, run_of(3), custom=[0, 1, 3]) == (0.0, 0.25, 0.75)


@pytest.mark.parametrize(
    ("numbers", "count", "found"),
    [
        ([1.0, 2.0], 3, "2 numbers; expected 3"),
        ([1.0], 2, "1 number; expected 2"),
        ([1.0, 2.0], 1, "2 numbers; expected 1"),
    ],
)
def test_custom_numbers_must_fit_the_checkpoints(
    numbers: list[float], count: int, found: str
) -> None:
    """Two numbers for three checkpoints are an error that tells both counts and what to do."""
    advice = "one for each checkpoint, oldest first"
    with pytest.raises(UsageError, match=f"^--coefficients has {found}, {advice}$"):
        coefficients(None, run_of(count), custom=numbers)


@pytest.mark.parametrize(
    ("numbers", "found"),
    [
        ([math.nan, 1.0], ": number 1 is nan; expected finite numbers"),
        ([1.0, math.inf], ": number 2 is inf; expected finite numbers"),
        (["half", 1.0], ": number 1 is half; expected finite numbers"),
        ([1.0, None], ": number 2 is None; expected finite numbers"),
        ([10**400, 1.0], ": number 1 is 1000.*; expected finite numbers"),
        ([0.0, 0.0], ": all numbers are 0; expected at least one other number"),
        ([0.5, -0.5], ": the sum is 0, by which they would be divided; expected another sum"),
    ],
)
def test_custom_numbers_that_cannot_be_used_are_refused(numbers: list[Any], found: str) -> None:
    """NaN and infinity are errors that say which number it is; so are zeros, and a sum of 0."""
    with pytest.raises(UsageError, match=f"^--coefficients{found}$"):
        coefficients(None, run_of(2), custom=numbers)


def test_custom_and_a_scheme_exclude_each_other() -> None:
    """A scheme together with custom coefficients is an error that names both."""
    with pytest.raises(UsageError, match="--coefficients and --scheme exp exclude each other"):
        coefficients("exp", run_of(1), custom=[1.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: resolve("linear", {"alpha": 2.0}),
            "--alpha belongs to --scheme exp, not to linear",
        ),
        (
            lambda: resolve(None, {"sigma": 0.1}),
            "--sigma belongs to --scheme power or posthoc, not to equal",
        ),
        (lambda: resolve("exp", {"decay": 0.9}), "--decay belongs to --scheme ema, not to exp"),
        (lambda: resolve("ema", {"alpha": 2.0, "decay": 0.9}), "--alpha belongs to --scheme exp"),
        (lambda: resolve(None, {"alpha": 2.0}, custom=[1.0]), "exp, not to --coefficients"),
        (
            lambda: resolve("exp", {"ema_half_life": 2.0}),
            "--ema-half-life belongs to --scheme ema or power, not to exp",
        ),
        (
            lambda: resolve("ema", {"decay": 0.9, "ema_half_life": 2.0}),
            "--ema-half-life and --decay exclude each other: give one of them",
        ),
        (
            lambda: resolve("power", {"sigma": 0.1, "ema_half_life": 2.0}),
            "--ema-half-life and --sigma exclude each other",
        ),
        (lambda: resolve("power", {"from_first": True}), "--from-first belongs to --scheme ema"),
        (
            lambda: resolve("ema", {"ramp": "edm2"}),  # before there is a checkpoint
            "--ramp edm2 needs --ema-half-life; give both, or choose another word",
        ),
        (lambda: resolve("ema", {"ramp": "timm"}), "expected one of tfa, ema-pytorch, edm2"),
        (
            lambda: coefficients("ema", [2.0, 1.0], ema_half_life=3),
            "--scheme ema: position 1 follows 2",
        ),
    ],
)
def test_a_parameter_of_another_scheme_is_refused(call: Callable[[], object], message: str) -> None:
    """The error names the parameter, its scheme, and the one that was chosen."""
    with pytest.raises(UsageError, match=message):
        call()


@pytest.mark.parametrize(
    ("option", "call", "values"),
    [
        ("alpha", lambda v: resolve("exp", {"alpha": v}), [10**400, 0.0, -1.0, math.inf, math.nan]),
        ("decay", lambda v: resolve("ema", {"decay": v}), [0.0, -0.5, 1.0000001, math.nan]),
        ("sigma", lambda v: resolve("power", {"sigma": v}), [0.0, -0.1, 0.3, math.inf, math.nan]),
        ("sigma", lambda v: resolve("power", {"sigma": v}), [1 / math.sqrt(12)]),
    ],
)
def test_a_parameter_out_of_range_is_refused(
    option: str, call: Callable[[float], object], values: list[float]
) -> None:
    """The error names the parameter and what it may be."""
    for value in values:
        with pytest.raises(
            UsageError, match=rf"^--{option} is .*; expected a (finite )?number above 0"
        ):
            call(value)


def test_an_unknown_scheme_is_refused() -> None:
    """The error lists the schemes there are; custom is no name to choose."""
    for name in ("best", "custom"):
        with pytest.raises(
            UsageError,
            match=f"unknown scheme '{name}': choose one of {', '.join(SCHEMES)}$",
        ):
            coefficients(name, run_of(2))


def test_no_checkpoints_are_refused() -> None:
    """There are no coefficients of nothing."""
    with pytest.raises(UsageError, match="no checkpoints"):
        coefficients("equal", [])


def test_the_parameter_really_used_can_be_reported() -> None:
    """A default is filled in, so that plan and provenance can record it."""
    assert resolve("exp").parameters == {"alpha": 2.0}
    assert resolve("ema").parameters == {"decay": 0.9}
    assert resolve("power").parameters == {"sigma": 0.1}
    assert resolve("power", {"ema_half_life": 3}).parameters == {"ema_half_life": 3.0}
    own: dict[str, schemes.Value] = {"ema_half_life": 3.0, "ramp": "tfa"}
    assert resolve("ema", {**own, "from_first": False}).parameters == own
    assert resolve("ema", {"from_first": True}).parameters == {"decay": 0.9, "from_first": True}
    assert resolve("power", {"sigma": 0.2}).parameters == {"sigma": 0.2}
    assert (resolve(None).name, resolve(None).parameters) == ("equal", {})
    assert resolve(None, custom=[1.0]).name == "custom"
    assert coefficients("exp", run_of(4)) == coefficients("exp", run_of(4), alpha=2.0)


def test_the_registry_describes_each_scheme() -> None:
    """Each scheme has a summary, and a default that it allows itself."""
    assert [*SCHEMES][:5] == ["equal", "linear", "exp", "ema", "power"]
    for scheme in SCHEMES.values():
        assert scheme.summary
        for one in scheme.parameters:
            assert one.default is None or one.check(one.default) == one.default


def test_the_effective_number_counts_equal_checkpoints() -> None:
    """Ten equal checkpoints are ten, one alone is one, and a zero adds nothing."""
    assert effective_number([0.1] * 10) == pytest.approx(10.0)
    assert effective_number([1.0, 0.0]) == 1.0
    assert effective_number(coefficients("exp", run_of(10), alpha=2.0)) == pytest.approx(
        1 / sum(value**2 for value in newest_first("exp", alpha=2.0))
    )


def test_the_bits_are_the_same_on_any_machine() -> None:
    """These numbers to the last bit were worked out in whole-number arithmetic, not by libm."""
    raw = [rounded_exp(Fraction(-age, 2)) for age in reversed(range(10))]
    total = math.fsum(raw)
    assert list(coefficients("exp", run_of(10), alpha=2.0)) == [value / total for value in raw]


def rounded_exp(argument: Fraction) -> float:
    """Return e^argument, correctly rounded, by the series in exact fractions."""
    term = result = Fraction(1)
    for order in range(1, 400):
        term *= argument / order
        result += term
    return float(result)


def test_what_a_program_sets_in_decimal_changes_no_coefficient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The defaults of the caller's decimal arithmetic are not those of the coefficients."""
    calls: list[Callable[[], Sequence[float]]] = [
        lambda: coefficients("exp", run_of(50), alpha=0.5),
        lambda: coefficients("ema", run_of(50), decay=1e-9),
        lambda: coefficients("power", run_of(50), sigma=0.01),
    ]
    usual = [call() for call in calls]
    for name, value in (("prec", 5), ("Emin", -5), ("Emax", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(decimal.DefaultContext, name, value)
            assert [call() for call in calls] == usual
    with monkeypatch.context() as patch:
        patch.setitem(decimal.DefaultContext.traps, decimal.Inexact, True)
        assert [call() for call in calls] == usual


def test_schemes_import_neither_numpy_nor_decimal() -> None:
    """The registry, which --help shows, costs no start-up time."""
    code = (
        "import sys, json; import polyak_cli.averaging.schemes;"
        "print(json.dumps([name in sys.modules for name in ('numpy', 'decimal', '_decimal')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=unmeasured(), capture_output=True, check=True, text=True
    )
    assert json.loads(done.stdout) == [False, False, False]
    assert schemes.__doc__
