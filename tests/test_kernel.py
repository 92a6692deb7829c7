"""The kernel: widening is exact, sums have fixed roundings, rounding is to nearest even, once."""

from __future__ import annotations

import math
import struct
import tracemalloc
from collections.abc import Callable

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak_cli.engine.kernel import accumulate, choose_kernel, round_to, widen
from polyak_cli.storage.local import page_aligned
from polyak_cli.tensors import FLOATS, itemsize
from tests.kernels import KERNELS
from tests.oracle import LAYOUTS, decode, encode, nearest_bfloat16

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=64)


def stored(values: npt.ArrayLike, dtype: str, byteorder: str = "<") -> npt.NDArray[np.uint8]:
    """Return the bytes that `round_to` writes."""
    array = np.array(values, np.float64)
    out = np.empty(array.size * int(FLOATS[dtype][1:]), np.uint8)
    round_to(array, dtype, byteorder, out)
    return out


@settings(derandomize=True, deadline=None, max_examples=500)
@given(
    st.one_of(
        FINITE,
        st.floats(-1e5, 1e5),
        # Values close to the middle between two bfloat16, where rounding twice goes wrong.
        st.builds(
            lambda bits, nudge: (
                float(np.array([(bits << 16) | 0x8000], np.uint32).view(np.float32)[0])
                * (1 + nudge * 2.0**-50)
            ),
            st.integers(0, 0x7F7F),
            st.integers(-3, 3),
        ),
    )
)
@pytest.mark.slow
def test_bfloat16_is_the_nearest_by_exact_fractions(value: float) -> None:
    """A float64 is rounded to the nearest bfloat16 in one step, ties to even."""
    assert stored([value], "bfloat16").view(np.uint16)[0] == nearest_bfloat16(value)


def test_bfloat16_beside_a_tie_is_not_rounded_twice() -> None:
    """A value just above the middle is rounded up, though as float32 it would be the middle."""
    hair_above = 1 + 2.0**-8 + 2.0**-40
    assert stored([hair_above], "bfloat16").view(np.uint16)[0] == 0x3F81
    assert stored([1 + 2.0**-8], "bfloat16").view(np.uint16)[0] == 0x3F80


def test_bfloat16_keeps_nan_and_infinity_apart() -> None:
    """NaN stays NaN, infinity stays infinity, and an overflow becomes infinity."""
    bits = stored([np.nan, np.inf, -np.inf, 1e300, -0.0], "bfloat16").view(np.uint16)
    assert np.isnan(np.array([int(bits[0]) << 16], np.uint32).view(np.float32)[0])
    assert bits[1:].tolist() == [0x7F80, 0xFF80, 0x7F80, 0x8000]


FLOAT8 = {"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2}


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_means_what_ml_dtypes_says(dtype: str) -> None:
    """All 256 codes have the value that ml_dtypes gives: NaN, infinity and subnormals too."""
    raw = np.arange(256, dtype=np.uint8)
    values = np.empty(256)
    widen(raw, dtype, "<", values)
    assert np.array_equal(values, raw.view(FLOAT8[dtype]).astype(np.float64), equal_nan=True)


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_rounds_to_the_nearest_once(dtype: str) -> None:
    """A tie between two neighbours goes to the even one; the next float64 goes to the nearer.

    ml_dtypes is compared with float32 values only, because it rounds float64 to float32 first.
    """
    known = np.arange(256, dtype=np.uint8).view(FLOAT8[dtype]).astype(np.float64)
    finite = np.unique(known[np.isfinite(known)])
    middles = (finite[:-1] + finite[1:]) / 2
    rng = np.random.default_rng(0)
    others = rng.normal(size=20_000) * 10.0 ** rng.uniform(-8, 6, 20_000)
    single = np.concatenate([middles, finite, others, [1e30, np.inf, np.nan, -0.0]])
    single = np.concatenate([single, -single]).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = single.astype(FLOAT8[dtype])
    assert stored(single, dtype).tobytes() == expected.tobytes()
    for beyond, nearest in ((np.inf, finite[1:]), (-np.inf, finite[:-1])):
        found = stored(np.nextafter(middles, beyond), dtype).view(FLOAT8[dtype])
        assert found.astype(np.float64).tolist() == nearest.tolist()


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_overflows_where_the_next_number_would_be(dtype: str) -> None:
    """Values from half a step above the maximum become infinity, or NaN without infinity."""
    greatest, step, over = (448, 32, np.nan) if "fn" in dtype else (57344, 8192, np.inf)
    limit = greatest + step / 2
    # The maximum of E4M3FN is even and that of E5M2 is odd: a tie goes down, or up.
    tie = greatest if "fn" in dtype else over
    values = [np.nextafter(limit, 0), limit, np.nextafter(limit, np.inf), 1e300, -np.inf]
    found = stored(values, dtype).view(FLOAT8[dtype]).astype(np.float64)
    assert np.array_equal(found, [greatest, tie, over, over, -over], equal_nan=True)


@settings(derandomize=True, deadline=None)
@given(st.lists(FINITE, min_size=1, max_size=20), st.sampled_from(["float16", "float32"]))
def test_float16_and_float32_round_like_numpy(values: list[float], dtype: str) -> None:
    """float16 and float32 are rounded as numpy's conversion from float64 does it."""
    with np.errstate(over="ignore"):
        expected = np.array(values).astype(dtype)
    assert stored(values, dtype).tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_every_stored_value_survives_widening_and_narrowing(dtype: str, byteorder: str) -> None:
    """All 65,536 patterns, or as many random ones, survive; NaN stays some NaN."""
    width = int(FLOATS[dtype][1:])
    rng = np.random.default_rng(0)
    raw = (
        np.arange(65536, dtype=f"{byteorder}u2").view(np.uint8)
        if width == 2
        else rng.integers(0, 256, 65536 * width, np.uint8)
    )
    values = np.empty(65536)
    with np.errstate(invalid="ignore"):
        widen(raw, dtype, byteorder, values)
    again = np.empty_like(raw)
    round_to(values, dtype, byteorder, again)
    number = ~np.isnan(values)
    before, after = (a.reshape(-1, width) for a in (raw, again))
    assert np.array_equal(before[number], after[number])
    with np.errstate(invalid="ignore"):
        widen(again, dtype, byteorder, values)
    assert np.isnan(values[~number]).all()


def test_widening_bfloat16_takes_it_for_the_upper_half_of_a_float32() -> None:
    """0x3FC0 is 1.5 in both byte orders."""
    for byteorder in "<>":
        values = np.empty(1)
        raw = np.array([0x3FC0], f"{byteorder}u2").view(np.uint8)
        widen(raw, "bfloat16", byteorder, values)
        assert values[0] == 1.5


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 100_000, 1 << 22])
def test_buffers_begin_at_a_page(nbytes: int) -> None:
    """Buffers begin at a page and have the wanted length, wherever the allocator puts them."""
    buffers = [page_aligned(nbytes) for _ in range(5)]
    assert [len(buffer) for buffer in buffers] == [nbytes] * 5
    assert all(buffer.ctypes.data % 4096 == 0 for buffer in buffers if nbytes)


# --- the contract of the kernel, which a compiled one must fulfil too ---------------------------


def bits(values: npt.ArrayLike) -> list[bytes]:
    """Return the bits of float64 values, all NaN alike."""
    array = np.array(values, np.float64).tolist()
    return [b"nan" if math.isnan(value) else struct.pack("<d", value) for value in array]


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    st.sampled_from([*LAYOUTS]),
    st.sampled_from("<>"),
    st.integers(1, 3),
    st.lists(st.lists(st.floats(-2, 2), min_size=3, max_size=3), min_size=1, max_size=4),
    st.data(),
)
def test_the_kernel_gives_the_bits_of_the_oracle(
    dtype: str, byteorder: str, averages: int, coefficients: list[list[float]], data: st.DataObject
) -> None:
    """Each product and each sum is rounded to float64; then each value is rounded once."""
    width = int(FLOATS[dtype][1:])
    codes = data.draw(
        st.lists(
            st.lists(st.integers(0, (1 << 8 * width) - 1), min_size=5, max_size=5),
            min_size=len(coefficients),
            max_size=len(coefficients),
        )
    )
    expected: list[list[float] | None] = [None] * averages
    sums = [np.full(5, np.nan) for _ in range(averages)]
    started = bytearray(averages)
    values = np.empty(5)
    scratch = values, values if averages == 1 else np.empty(5)
    for row, numbers in zip(coefficients, codes, strict=True):
        terms = [(k, c) for k, c in enumerate(row[:averages]) if c]
        raw = np.array(numbers, f"{byteorder}u{width}").view(np.uint8)
        with np.errstate(all="ignore"):
            accumulate(raw, dtype, byteorder, terms, sums, started, scratch)
        for k, c in terms:
            products = [c * decode(code, dtype) for code in numbers]
            before = expected[k]
            if before is not None:
                products = [a + b for a, b in zip(before, products, strict=True)]
            expected[k] = products
    assert [bool(flag) for flag in started] == [row is not None for row in expected]
    for found, wanted in zip(sums, expected, strict=True):
        if wanted is None:
            continue
        assert bits(found) == bits(wanted)
        for target in LAYOUTS:
            size = int(FLOATS[target][1:])
            out = np.empty(5 * size, np.uint8)
            round_to(found, target, byteorder, out)
            for code, value in zip(out.view(f"{byteorder}u{size}").tolist(), wanted, strict=True):
                nearest = encode(value, target)
                if nearest is None:
                    assert math.isnan(decode(code, target))
                else:
                    assert code == nearest


def test_the_average_of_negative_zeros_is_a_negative_zero() -> None:
    """A sum that began with 0 would have lost the sign."""
    raw = np.array([-0.0], "<f4").view(np.uint8)
    sums, values, started = [np.zeros(1)], np.empty(1), bytearray(1)
    for _ in range(2):
        accumulate(raw, "float32", "<", [(0, 0.5)], sums, started, (values, values))
    assert bits(sums[0]) == [struct.pack("<d", -0.0)]


def test_no_product_is_fused_with_its_sum() -> None:
    """The product is rounded before it is added: a fused multiply-add would leave 2^-60 here."""
    x = 1 + 2.0**-30
    first, second = (np.array([value]).view(np.uint8) for value in (-(1 + 2.0**-29), x))
    sums, values, started = [np.zeros(1)], np.empty(1), bytearray(1)
    accumulate(first, "float64", "<", [(0, 1.0)], sums, started, (values, values))
    accumulate(second, "float64", "<", [(0, x)], sums, started, (values, values))
    assert sums[0][0] == 0.0


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("byteorder", "<>")
def test_nothing_is_allocated_for_a_piece(kernel: str, dtype: str, byteorder: str) -> None:
    """After the first piece, no operation needs memory that grows with the piece."""
    chosen, count = choose_kernel(kernel), 100_000
    raw = np.random.default_rng(0).integers(0, 256, count * itemsize(dtype), np.uint8)
    values, product, sums = np.empty(count), np.empty(count), [np.empty(count), np.empty(count)]
    out = np.empty_like(raw)

    def fold_piece() -> None:
        with np.errstate(all="ignore"):
            chosen.widen(raw, dtype, byteorder, values)
            started = bytearray(2)
            for _ in range(2):
                terms = [(0, 0.5), (1, 0.25)]
                chosen.accumulate(raw, dtype, byteorder, terms, sums, started, (values, product))
            for total in sums:
                chosen.divide(total, 0.75)  # of random bytes, many of which are not finite
                chosen.round_to(total, dtype, byteorder, out)

    fold_piece()
    assert measure_allocations(fold_piece) < 10_000
    assert measure_allocations(lambda: np.abs(values)) > count  # the measure can fail


def measure_allocations(call: Callable[[], object]) -> int:
    """Return the most bytes that were allocated at a time during a call."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
