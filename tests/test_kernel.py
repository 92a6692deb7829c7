"""The contract of the kernels, each of which an independent oracle judges, bit for bit.

Widening is exact; products, sums and quotients are rounded to float64, each once; then each number
is rounded to the stored type once, to nearest, ties to even.
"""

from __future__ import annotations

import math
import struct
import tracemalloc
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak_cli.engine.kernel import Kernel, choose_kernel
from polyak_cli.storage import Bytes
from polyak_cli.storage.local import page_aligned
from polyak_cli.tensors import FLOATS, Float64, itemsize
from tests.kernels import KERNELS
from tests.oracle import LAYOUTS, decode, encode, nearest_bfloat16

quietly = settings(derandomize=True, deadline=None, max_examples=120)


@pytest.fixture(scope="module", params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    """Return each kernel; the compiled one is skipped where it is not installed."""
    return choose_kernel(request.param)


# --- what the tests draw --------------------------------------------------------------------------

#: None, few, odd, around the widths of vectors, and around the blocks of both kernels.
lengths = st.one_of(
    st.integers(0, 40),
    st.sampled_from([63, 64, 65, 127, 511, 512, 513, 1025, 16383, 16384, 16385, 32769]),
)
#: How many bytes after a multiple of 64 a buffer of stored numbers begins.
offsets = st.integers(0, 9)
coefficients = st.one_of(
    st.floats(-2, 2), st.sampled_from([0.0, 1.0, 0.1, 5e-324, -1e-310, 1e300, -1.7e308])
)
divisors = st.one_of(st.floats(0.5, 1), st.sampled_from([1.0, 0.75, 3.0, 5e-324, 1e-300, 1.7e308]))


@st.composite
def stored_codes(draw: st.DrawFn, dtype: str) -> int:
    """Return the bits of any number of a type: often one with which something is special."""
    mantissa, exponent, _ = LAYOUTS[dtype]
    sign = draw(st.integers(0, 1)) << (mantissa + exponent)
    if draw(st.booleans()):
        return sign | draw(st.integers(0, (1 << (mantissa + exponent)) - 1))
    top = (1 << exponent) - 1
    field = draw(st.sampled_from([0, 1, top // 2, top - 1, top]))
    fractions = [0, 1, 1 << (mantissa - 1), (1 << mantissa) - 1]
    return sign | field << mantissa | draw(st.sampled_from(fractions))


def place(nbytes: int, offset: int) -> tuple[Bytes, Bytes]:
    """Return a buffer that begins some bytes after a multiple of 64, and what lies around it."""
    around = page_aligned(nbytes + 128)
    around[:] = 0xA5
    return around[offset : offset + nbytes], around


def is_untouched(around: Bytes, nbytes: int, offset: int) -> bool:
    """Return whether what lies around a buffer is as `place` made it."""
    return bool((around[:offset] == 0xA5).all() and (around[offset + nbytes :] == 0xA5).all())


def store(codes: Sequence[int], dtype: str, byteorder: str, count: int, offset: int) -> Bytes:
    """Return so many stored numbers; the codes are repeated."""
    width = itemsize(dtype)
    raw, _ = place(count * width, offset)
    numbers = np.resize(np.array(codes, np.uint64), count).astype(f"{byteorder}u{width}")
    raw[:] = numbers.view(np.uint8)
    return raw


def number_bits(values: npt.ArrayLike) -> list[bytes]:
    """Return the bits of float64 values, all NaN alike: processors differ in their payload."""
    array = np.atleast_1d(np.array(values, np.float64)).tolist()
    return [b"nan" if math.isnan(value) else struct.pack("<d", value) for value in array]


def agrees(found: npt.NDArray[Any], expected: Sequence[float]) -> bool:
    """Return whether float64 values are the expected ones, which repeat."""
    period = len(expected)
    wanted = np.resize(np.array(expected, np.float64), len(found))
    is_nan = np.isnan(wanted)
    same = found.view(np.uint64) == wanted.view(np.uint64)
    return bool(np.where(is_nan, np.isnan(found), same).all()) and period > 0


def round_codes(
    kernel: Kernel, values: npt.ArrayLike, dtype: str, byteorder: str = "<", offset: int = 0
) -> list[int]:
    """Return the codes to which a kernel rounds; nothing is written outside of the buffer."""
    array = np.array(values, np.float64)
    nbytes = array.size * itemsize(dtype)
    out, around = place(nbytes, offset)
    kernel.round_to(array, dtype, byteorder, out)
    assert is_untouched(around, nbytes, offset)
    codes = np.frombuffer(out.tobytes(), f"{byteorder}u{itemsize(dtype)}")
    return [int(code) for code in codes]


def widen_codes(kernel: Kernel, codes: Sequence[int], dtype: str, byteorder: str = "<") -> Float64:
    """Return the values of stored numbers."""
    values = np.empty(len(codes))
    with np.errstate(invalid="ignore"):
        kernel.widen(store(codes, dtype, byteorder, len(codes), 0), dtype, byteorder, values)
    return values


# --- the whole way --------------------------------------------------------------------------------


def expect_sums(
    checkpoints: Sequence[Sequence[float]], rows: Sequence[Sequence[float]], averages: int
) -> list[list[float] | None]:
    """Return the sums of each average in Python's floats: a product, and then a sum."""
    sums: list[list[float] | None] = [None] * averages
    for values, row in zip(checkpoints, rows, strict=True):
        for number, c in enumerate(row):
            if c:
                products = [c * x for x in values]
                before = sums[number]
                if before is not None:
                    products = [a + b for a, b in zip(before, products, strict=True)]
                sums[number] = products
    return sums


@quietly
@given(data=st.data(), dtype=st.sampled_from([*LAYOUTS]), byteorder=st.sampled_from("<>"))
def test_averages_have_the_bits_of_the_oracle(
    kernel: Kernel, data: st.DataObject, dtype: str, byteorder: str
) -> None:
    """For any numbers, lengths, places in memory, coefficients, divisors and types to store."""
    averages, count = data.draw(st.integers(1, 9)), data.draw(lengths)
    period, checkpoints = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    lists = st.lists(stored_codes(dtype), min_size=period, max_size=period)
    codes = data.draw(st.lists(lists, min_size=checkpoints, max_size=checkpoints))
    row = st.lists(coefficients, min_size=averages, max_size=averages)
    rows = data.draw(st.lists(row, min_size=checkpoints, max_size=checkpoints))
    sums, values = [np.full(count, np.nan) for _ in range(averages)], np.empty(count)
    scratch = values, values if averages == 1 else np.empty(count)
    started = bytearray(averages)
    for numbers, row_of in zip(codes, rows, strict=True):
        raw = store(numbers, dtype, byteorder, count, data.draw(offsets))
        terms = [(k, c) for k, c in enumerate(row_of) if c]
        with np.errstate(all="ignore"):
            kernel.accumulate(raw, dtype, byteorder, terms, sums, started, scratch)
    wide = [[decode(code, dtype) for code in numbers] for numbers in codes]
    expected = expect_sums(wide, rows, averages)
    assert [bool(flag) for flag in started] == [row is not None for row in expected]
    for found, wanted in zip(sums, expected, strict=True):
        if wanted is None:
            assert np.isnan(found).all()
            continue
        assert agrees(found, wanted)
        divisor = data.draw(divisors)
        wanted = [value / divisor for value in wanted]
        with np.errstate(all="ignore"):
            finite = kernel.divide(found, divisor)
        assert agrees(found, wanted)
        assert finite == all(map(math.isfinite, wanted[:count])) == kernel.is_finite(found)
        target, order = data.draw(st.sampled_from([*LAYOUTS])), data.draw(st.sampled_from("<>"))
        rounded = round_codes(kernel, found, target, order, data.draw(offsets))
        nearest = [encode(value, target) for value in wanted]
        for number, code in enumerate(rounded):
            expect = nearest[number % period]
            # Which of two NaN a sum of them is differs between processors, and within a vector.
            assert math.isnan(decode(code, target)) if expect is None else code == expect


# --- widening -------------------------------------------------------------------------------------


@quietly
@given(
    codes=st.sampled_from([*LAYOUTS]).flatmap(
        lambda dtype: st.tuples(st.just(dtype), st.lists(stored_codes(dtype), min_size=1))
    ),
    byteorder=st.sampled_from("<>"),
    count=lengths,
    offset=offsets,
)
def test_widening_is_exact(
    kernel: Kernel, codes: tuple[str, list[int]], byteorder: str, count: int, offset: int
) -> None:
    """Subnormals, signs of zero and infinities included; NaN keeps its sign and payload."""
    dtype, numbers = codes
    values = np.empty(count)
    raw = store(numbers, dtype, byteorder, count, offset)
    before = raw.tobytes()
    with np.errstate(invalid="ignore"):
        kernel.widen(raw, dtype, byteorder, values)
    assert raw.tobytes() == before
    assert agrees(values, [decode(code, dtype) for code in numbers])
    if dtype not in FLOAT8:
        for code, found in zip(numbers, values.view(np.uint64).tolist(), strict=False):
            if math.isnan(decode(code, dtype)):
                assert found == widen_nan(code, dtype)


def widen_nan(code: int, dtype: str) -> int:
    """Return the bits of a NaN as float64: its sign and payload, and the bit of quiet ones."""
    mantissa, exponent, _ = LAYOUTS[dtype]
    payload = (code & ((1 << mantissa) - 1)) << (52 - mantissa)
    return code >> (mantissa + exponent) << 63 | 0x7FF << 52 | 1 << 51 | payload


FLOAT8 = {"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2}


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_means_what_ml_dtypes_says(kernel: Kernel, dtype: str) -> None:
    """All 256 codes have the value that ml_dtypes gives: NaN, infinity and subnormals too."""
    expected = np.arange(256, dtype=np.uint8).view(FLOAT8[dtype]).astype(np.float64)
    assert np.array_equal(widen_codes(kernel, range(256), dtype), expected, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_every_stored_value_survives_widening_and_narrowing(
    kernel: Kernel, dtype: str, byteorder: str
) -> None:
    """All 65,536 patterns, or as many random ones, survive; NaN stays some NaN."""
    width = itemsize(dtype)
    rng = np.random.default_rng(0)
    raw = (
        np.arange(65536, dtype=f"{byteorder}u2").view(np.uint8)
        if width == 2
        else rng.integers(0, 256, 65536 * width, np.uint8)
    )
    values = np.empty(65536)
    with np.errstate(invalid="ignore"):
        kernel.widen(raw, dtype, byteorder, values)
    again = np.empty_like(raw)
    kernel.round_to(values, dtype, byteorder, again)
    number = ~np.isnan(values)
    before, after = (a.reshape(-1, width) for a in (raw, again))
    assert np.array_equal(before[number], after[number])
    with np.errstate(invalid="ignore"):
        kernel.widen(again, dtype, byteorder, values)
    assert np.isnan(values[~number]).all()


def test_widening_bfloat16_takes_it_for_the_upper_half_of_a_float32(kernel: Kernel) -> None:
    """0x3FC0 is 1.5 in both byte orders."""
    assert [widen_codes(kernel, [0x3FC0], "bfloat16", order)[0] for order in "<>"] == [1.5, 1.5]


# --- rounding -------------------------------------------------------------------------------------


@st.composite
def near_ties(draw: st.DrawFn, dtype: str) -> float:
    """Return a float64 at or beside the middle between two numbers of a type, or beside one."""
    mantissa, exponent, has_infinity = LAYOUTS[dtype]
    # The last finite code has the number after it that would be next: there the overflow begins.
    last = (((1 << exponent) - has_infinity) << mantissa) - 1 - (not has_infinity)
    code = draw(st.one_of(st.integers(0, last), st.sampled_from([0, 1, last - 1, last])))
    value = Fraction(decode(code, dtype))
    field = max(code >> mantissa, 1)
    step = Fraction(2) ** (field - ((1 << (exponent - 1)) - 1) - mantissa)
    # Of float64 there is no middle: the sum is rounded to a neighbour, or to infinity.
    exact = value + step * draw(st.sampled_from([Fraction(0), Fraction(1, 2), Fraction(1)]))
    try:
        found = float(exact)
    except OverflowError:
        found = math.inf
    for _ in range(draw(st.integers(0, 2))):
        found = math.nextafter(found, draw(st.sampled_from([0.0, math.inf])))
    return math.copysign(found, draw(st.sampled_from([1, -1])))


@pytest.mark.parametrize("dtype", LAYOUTS)
@settings(derandomize=True, deadline=None, max_examples=60)
@given(data=st.data(), byteorder=st.sampled_from("<>"), count=lengths, offset=offsets)
def test_a_number_is_rounded_to_the_nearest_once(
    kernel: Kernel, dtype: str, data: st.DataObject, byteorder: str, count: int, offset: int
) -> None:
    """By exact fractions: ties to even, gradual underflow, and overflow from half a step on."""
    number = st.one_of(near_ties(dtype), near_ties(dtype), st.floats(width=64), st.just(5e-324))
    values = data.draw(st.lists(number, min_size=8, max_size=20))
    count = max(count, data.draw(st.sampled_from([0, 20])))
    codes = round_codes(kernel, np.resize(values, count), dtype, byteorder, offset)
    assert codes == [*np.resize(codes[: len(values)], count)]
    for code, value in zip(codes, values, strict=False):
        nearest = encode(value, dtype)
        assert math.isnan(decode(code, dtype)) if nearest is None else code == nearest


@quietly
@given(
    st.integers(0, 1),
    st.integers(0, (1 << 51) - 1),
    st.sampled_from(["float16", "bfloat16", "float32", "float64"]),
)
def test_a_quiet_nan_keeps_its_sign_and_the_upper_bits_of_its_payload(
    kernel: Kernel, sign: int, payload: int, dtype: str
) -> None:
    """It never becomes infinity, whatever bits are lost."""
    bits = sign << 63 | 0x7FF << 52 | 1 << 51 | payload
    mantissa, exponent, _ = LAYOUTS[dtype]
    upper = (1 << 51 | payload) >> (52 - mantissa)
    expected = sign << (mantissa + exponent) | ((1 << exponent) - 1) << mantissa | upper
    assert round_codes(kernel, np.array([bits], np.uint64).view(np.float64), dtype) == [expected]


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=500)
@given(st.floats(allow_nan=False, allow_infinity=False, width=64))
def test_bfloat16_is_the_nearest_by_bisection(kernel: Kernel, value: float) -> None:
    """A second oracle, which looks for the two neighbours, agrees with the first one."""
    assert round_codes(kernel, [value], "bfloat16") == [nearest_bfloat16(value)]


def test_bfloat16_beside_a_tie_is_not_rounded_twice(kernel: Kernel) -> None:
    """A value just above the middle is rounded up, though as float32 it would be the middle."""
    values = [1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8]
    assert round_codes(kernel, values, "bfloat16") == [0x3F81, 0x3F80]


def test_bfloat16_keeps_nan_and_infinity_apart(kernel: Kernel) -> None:
    """NaN stays NaN, infinity stays infinity, and an overflow becomes infinity."""
    nan, *others = round_codes(kernel, [np.nan, np.inf, -np.inf, 1e300, -0.0], "bfloat16")
    assert math.isnan(decode(nan, "bfloat16"))
    assert others == [0x7F80, 0xFF80, 0x7F80, 0x8000]


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_rounds_as_ml_dtypes_does(kernel: Kernel, dtype: str) -> None:
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
    assert round_codes(kernel, single, dtype) == expected.view(np.uint8).tolist()
    for beyond, nearest in ((np.inf, finite[1:]), (-np.inf, finite[:-1])):
        codes = round_codes(kernel, np.nextafter(middles, beyond), dtype)
        assert [decode(code, dtype) for code in codes] == nearest.tolist()


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_overflows_where_the_next_number_would_be(kernel: Kernel, dtype: str) -> None:
    """Values from half a step above the maximum become infinity, or NaN without infinity."""
    greatest, step, over = (448, 32, np.nan) if "fn" in dtype else (57344, 8192, np.inf)
    limit = greatest + step / 2
    # The maximum of E4M3FN is even and that of E5M2 is odd: a tie goes down, or up.
    tie = greatest if "fn" in dtype else over
    values = [np.nextafter(limit, 0), limit, np.nextafter(limit, np.inf), 1e300, -np.inf]
    found = [decode(code, dtype) for code in round_codes(kernel, values, dtype)]
    assert np.array_equal(found, [greatest, tie, over, over, -over], equal_nan=True)


# --- sums -----------------------------------------------------------------------------------------


def add(kernel: Kernel, values: Sequence[float], multipliers: Sequence[float]) -> float:
    """Return the sum of multiplied float64 numbers."""
    sums, scratch, started = [np.zeros(1)], np.empty(1), bytearray(1)
    for value, multiplier in zip(values, multipliers, strict=True):
        raw = np.array([value]).view(np.uint8)
        terms = [(0, multiplier)]
        kernel.accumulate(raw, "float64", "<", terms, sums, started, (scratch, scratch))
    return float(sums[0][0])


def test_the_average_of_negative_zeros_is_a_negative_zero(kernel: Kernel) -> None:
    """A sum that began with 0 would have lost the sign."""
    assert number_bits(add(kernel, [-0.0, -0.0], [0.5, 0.5])) == number_bits(-0.0)
    sums = np.array([-0.0])
    assert kernel.divide(sums, 0.75)
    assert number_bits(sums) == number_bits([-0.0])


def test_no_product_is_fused_with_its_sum(kernel: Kernel) -> None:
    """The product is rounded before it is added: a fused multiply-add would leave 2^-60 here."""
    x = 1 + 2.0**-30
    assert add(kernel, [-(1 + 2.0**-29), x], [1.0, x]) == 0.0


@pytest.mark.parametrize("count", [1, 7, 64, 16385])
def test_one_number_that_is_not_finite_is_found_anywhere(kernel: Kernel, count: int) -> None:
    """In the first and the last place too; large numbers whose sum overflows are finite."""
    values = np.full(count, 1.7e308)
    assert kernel.is_finite(values)
    for number in (math.inf, -math.inf, math.nan):
        for position in {0, count // 2, count - 1}:
            values[position] = number
            assert not kernel.is_finite(values)
            with np.errstate(all="ignore"):
                assert not kernel.divide(values, 0.999)
            values[:] = 1.7e308
    assert kernel.is_finite(np.empty(0))


# --- buffers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 100_000, 1 << 22])
def test_buffers_begin_at_a_page(nbytes: int) -> None:
    """Buffers begin at a page and have the wanted length, wherever the allocator puts them."""
    buffers = [page_aligned(nbytes) for _ in range(5)]
    assert [len(buffer) for buffer in buffers] == [nbytes] * 5
    assert all(buffer.ctypes.data % 4096 == 0 for buffer in buffers if nbytes)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("byteorder", "<>")
def test_nothing_is_allocated_for_a_piece(kernel: Kernel, dtype: str, byteorder: str) -> None:
    """After the first piece, no operation needs memory that grows with the piece."""
    count = 100_000
    raw = np.random.default_rng(0).integers(0, 256, count * itemsize(dtype), np.uint8)
    values, product, sums = np.empty(count), np.empty(count), [np.empty(count), np.empty(count)]
    out = np.empty_like(raw)

    def fold_piece() -> None:
        with np.errstate(all="ignore"):
            kernel.widen(raw, dtype, byteorder, values)
            started = bytearray(2)
            for _ in range(2):
                terms = [(0, 0.5), (1, 0.25)]
                kernel.accumulate(raw, dtype, byteorder, terms, sums, started, (values, product))
            for total in sums:
                kernel.divide(total, 0.75)  # of random bytes, many of which are not finite
                kernel.round_to(total, dtype, byteorder, out)

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
