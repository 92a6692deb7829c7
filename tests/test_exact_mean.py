"""How near an average is to the exact mean: rational numbers are the judge.

Where all partial sums are numbers of float64, the average is the number of the stored type nearest
to the exact mean, ties to even.  No other rule can be nearer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from polyak_cli.averaging.schemes import SCHEMES, Mean, make_mean
from polyak_cli.engine.kernel import accumulate, divide, round_to
from polyak_cli.tensors import FLOATS
from tests.oracle import LAYOUTS, decode, encode

quietly = settings(derandomize=True, deadline=None, max_examples=300)
NARROW = ("float16", "bfloat16", "float32")


def average(codes: npt.NDArray[np.integer], dtype: str, mean: Mean) -> list[int]:
    """Return the codes of the average of stored values, checkpoints x elements."""
    width = int(FLOATS[dtype][1:])
    count = codes.shape[1]
    multipliers, divisor = mean.scale()
    sums, values, out = np.empty(count), np.empty(count), np.empty(count * width, np.uint8)
    started = bytearray(1)
    for row, multiplier in zip(codes, multipliers, strict=True):
        raw = row.astype(f"<u{width}").view(np.uint8)
        accumulate(raw, dtype, "<", [(0, multiplier)], [sums], started, (values, values))
    divide(sums, divisor)
    round_to(sums, dtype, "<", out)
    found: list[int] = out.view(f"<u{width}").tolist()
    return found


def shares(mean: Mean) -> Mean:
    """Return the older rule: coefficients are rounded, and values multiplied by them."""
    return Mean(mean.coefficients, 1.0)


def is_exact(values: Sequence[Fraction], mean: Mean) -> bool:
    """Return whether float64 holds every product and every partial sum."""
    total = Fraction(0)
    for value, multiplier in zip(values, mean.multipliers, strict=True):
        product = value * Fraction(multiplier)
        total += product
        if any(Fraction(float(one)) != one for one in (product, total)):
            return False
    return True


def weigh(values: Sequence[Fraction], mean: Mean) -> Fraction:
    """Return the exact mean."""
    pairs = zip(mean.multipliers, values, strict=True)
    return sum((Fraction(m) * x for m, x in pairs), Fraction(0)) / Fraction(mean.divisor)


@st.composite
def one_element(draw: st.DrawFn, dtype: str, count: int) -> list[int]:
    """Return the codes of one finite element in some checkpoints, mostly of similar size."""
    mantissa, exponent, has_infinity = LAYOUTS[dtype]
    top = (1 << exponent) - (2 if has_infinity else 1)
    if draw(st.booleans()):  # as parameters of a run are: within some binades of one another
        low = draw(st.integers(0, max(0, top - 3)))
        fields = st.integers(low, min(top, low + 3))
    else:
        fields = st.integers(0, top)
    sign, fraction = st.booleans(), st.integers(0, (1 << mantissa) - 1 - (not has_infinity))
    code = st.builds(
        lambda s, e, f: (s << (mantissa + exponent)) | (e << mantissa) | f, sign, fields, fraction
    )
    return draw(st.lists(code, min_size=count, max_size=count))


means = st.one_of(
    st.integers(1, 60).map(lambda count: make_mean(SCHEMES["equal"].function([1.0] * count))),
    st.integers(1, 40).map(lambda count: make_mean(SCHEMES["linear"].function([1.0] * count))),
    st.lists(st.integers(0, 9).map(float), min_size=1, max_size=20).filter(any).map(make_mean),
)


@quietly
@given(st.sampled_from([*NARROW, "float8_e4m3fn", "float8_e5m2"]), means, st.data())
def test_an_average_whose_sums_are_exact_is_the_number_nearest_to_the_exact_mean(
    dtype: str, mean: Mean, data: st.DataObject
) -> None:
    """Ties go to even; division and rounding are two roundings, and are never seen as two.

    With whole multipliers of the sum D < 2^28: a sum S that is a multiple of u is below 2^53 u.  A
    middle M between two stored numbers has at most 25 digits, so if S / D is not M, it is away from
    it by more than half a unit of float64, and is not rounded to M.
    """
    codes = data.draw(one_element(dtype, len(mean.multipliers)))
    values = [Fraction(decode(code, dtype)) for code in codes]
    assume(is_exact(values, mean))
    exact = weigh(values, mean)
    (found,) = average(np.array([[code] for code in codes]), dtype, mean)
    if exact:
        assert found == encode(exact, dtype)
        was = decode(average(np.array([[code] for code in codes]), dtype, shares(mean))[0], dtype)
        nearer = abs(Fraction(decode(found, dtype)) - exact)
        assert nearer <= abs(Fraction(was) - exact)
        event("nearer than before" if nearer < abs(Fraction(was) - exact) else "as near")
    else:
        assert decode(found, dtype) == 0.0


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn", "float8_e5m2"])
def test_equal_averages_of_8192_small_floats_are_always_nearest(dtype: str) -> None:
    """All numbers of these types are multiples of 2^-24 below 2^16: no such sum is rounded."""
    width = int(FLOATS[dtype][1:])
    rng = np.random.default_rng(0)
    mantissa, exponent, has_infinity = LAYOUTS[dtype]
    largest = (((1 << exponent) - has_infinity) << mantissa) - 1 - (not has_infinity)
    codes = rng.integers(0, largest + 1, (8192, 40))
    codes[:, :8] = largest
    codes[::2, 1] = codes[1:, 2] = codes[:-1, 3] = 1  # the smallest beside the largest
    codes[:, 8:] |= rng.integers(0, 2, (8192, 32)) << (8 * width - 1)
    mean = make_mean([1.0] * 8192)
    found = average(codes, dtype, mean)
    table = [decode(code, dtype) for code in range(1 << 8 * width)]
    for place in range(40):
        column = [table[code] for code in codes[:, place].tolist()]
        exact = Fraction(math.fsum(column)) / 8192  # fsum rounds once, and here not at all
        assert found[place] == encode(exact, dtype)


@quietly
@given(
    st.sampled_from(NARROW),
    st.lists(st.floats(2.0**-30, 2.0**30), min_size=1, max_size=20).map(make_mean),
    st.data(),
)
def test_every_average_is_within_half_a_unit_and_the_roundings_of_its_sums(
    dtype: str, mean: Mean, data: st.DataObject
) -> None:
    """Whatever the coefficients and however far apart the values are."""
    codes = data.draw(one_element(dtype, len(mean.multipliers)))
    values = [Fraction(decode(code, dtype)) for code in codes]
    exact, largest = weigh(values, mean), max(abs(value) for value in values)
    (found,) = average(np.array([[code] for code in codes]), dtype, mean)
    nearest = encode(exact, dtype)
    assert nearest is not None
    error = abs(Fraction(decode(found, dtype)) - exact)
    least = abs(Fraction(decode(nearest, dtype)) - exact)
    assert error <= least + 2 * (2 * len(codes) + 2) * largest * Fraction(1, 2**53)


def test_an_average_is_farther_than_before_only_where_a_sum_was_rounded() -> None:
    """Beside 8e7, float64 has no room for 2^-60, so a mean just above a tie becomes one on it.

    Multiplied by a rounded 1/5 it was, by chance, rounded up.  The values are 26 digits apart.
    """
    numbers = [83886008.0, 20.0, 24.0, 33.0, 2.0**-60]
    values = [Fraction(number) for number in numbers]
    mean = make_mean([1.0] * 5)
    codes = np.array([[encode(value, "float32")] for value in values], np.uint32)
    exact = weigh(values, mean)
    new, old = (
        decode(average(codes, "float32", one)[0], "float32") for one in (mean, shares(mean))
    )
    assert not is_exact(values, mean)
    assert (new, old) == (16777216, 16777218)
    assert abs(Fraction(old) - exact) < abs(Fraction(new) - exact) < 1 + Fraction(1, 2**60)


@pytest.mark.parametrize("count", [3, 5, 6, 7, 10])
def test_ties_of_float16_go_to_even(count: int) -> None:
    """About a percent of the means lie in the middle between two numbers.

    Multiplied by a rounded 1/N, some of them were rounded away from even.
    """
    rng = np.random.default_rng(count)
    run = rng.normal(size=(count, 4000)).astype(np.float16)
    exact = [sum(map(Fraction, column), Fraction(0)) / count for column in run.T.tolist()]
    expected = [encode(one, "float16") for one in exact]
    mean = make_mean([1.0] * count)
    codes = run.view(np.uint16)
    assert average(codes, "float16", mean) == expected
    old = average(codes, "float16", shares(mean))
    assert 0.003 < sum(a != b for a, b in zip(old, expected, strict=True)) / 4000 < 0.015


@pytest.mark.parametrize("count", [2, 3, 5, 7, 8, 10, 49, 50, 100, 1000])
def test_the_largest_float64_stays_finite_and_equal_ones_stay_near(count: int) -> None:
    """Sums are kept below the maximum by a power of two, as they were by the coefficients."""
    largest = np.finfo(np.float64).max
    values = np.array([largest, -largest, 1.0, 0.1, 5e-308])
    codes = np.tile(values.view(np.uint64), (count, 1))
    found = np.array(average(codes, "float64", make_mean([1.0] * count)), np.uint64).view("f8")
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, values, rtol=count * 2.0**-53)
