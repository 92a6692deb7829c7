"""The compiled kernel gives the bits of numpy's, and stays within its buffers."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak_cli.engine import numpy_kernel
from polyak_cli.storage import Bytes
from polyak_cli.tensors import FLOATS, Float64, itemsize
from tests.command import ROOT
from tests.kernels import COMPILED, needs_compiled


def number_bits(values: Float64) -> list[int]:
    """Return the bits of float64 values, all NaN alike: processors differ in their payload."""
    return [int(bits) for bits in np.where(np.isnan(values), np.nan, values).view(np.uint64)]


@needs_compiled
def test_the_extension_is_of_this_source() -> None:
    """After a change of the C code it has been compiled again."""
    from polyak_cli.engine import _kernel

    source = ROOT / "polyak_cli/engine/_kernel.c"
    assert hashlib.sha256(source.read_bytes()).hexdigest() == _kernel.SOURCE_DIGEST, (
        "compile the kernel again: python .build-hooks/kernel.py"
    )


@needs_compiled
@settings(derandomize=True, deadline=None, max_examples=400)
@given(
    dtype=st.sampled_from([*FLOATS]),
    byteorder=st.sampled_from("<>"),
    codes=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20),
    count=st.one_of(st.integers(0, 40), st.sampled_from([511, 512, 513, 1025])),
    shift=st.integers(0, 7),
    coefficients=st.lists(
        st.lists(st.floats(-4, 4), min_size=3, max_size=3), min_size=1, max_size=3
    ),
    averages=st.integers(1, 3),
)
def test_both_kernels_give_the_same_bits(
    *,
    dtype: str,
    byteorder: str,
    codes: list[int],
    count: int,
    shift: int,
    coefficients: list[list[float]],
    averages: int,
) -> None:
    """For any stored numbers at any address, of any length, and for any number of averages."""
    width = itemsize(dtype)
    numbers = np.resize(np.array(codes, np.uint64).astype(f"{byteorder}u{width}"), count)
    raw = np.zeros(count * width + shift, np.uint8)[shift:]
    raw[:] = numbers.view(np.uint8)
    found = []
    for each in (numpy_kernel, COMPILED):
        assert each
        sums, values = [np.full(count, np.nan) for _ in range(averages)], np.empty(count)
        scratch = values, values if averages == 1 else np.empty(count)
        started = bytearray(averages)
        with np.errstate(all="ignore"):
            for row in coefficients:
                terms = [(k, c) for k, c in enumerate(row[:averages]) if c]
                each.accumulate(raw, dtype, byteorder, terms, sums, started, scratch)
            each.widen(raw, dtype, byteorder, values)
        stored = np.empty(raw.size, np.uint8)
        each.round_to(values, dtype, byteorder, stored)
        found.append((values.tobytes(), stored.tobytes(), started, [*map(number_bits, sums)]))
    assert found[0] == found[1]


@needs_compiled
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("byteorder", "<>")
def test_both_kernels_round_alike(dtype: str, byteorder: str) -> None:
    """At and beside values and middles of any 8 or 16 bits, and for doubles of any exponent."""
    rng = np.random.default_rng(0)
    known = np.empty(65536)
    for number, small in enumerate(("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")):
        codes = np.resize(np.arange(65536), 16384).astype(f"u{itemsize(small)}").view(np.uint8)
        with np.errstate(invalid="ignore"):
            part = known[16384 * number : 16384 * (number + 1)]
            numpy_kernel.widen(codes[: 16384 * itemsize(small)], small, "<", part)
    spread = rng.integers(0, 1 << 64, 65536, np.uint64)
    spread &= ~((np.uint64(1) << rng.integers(0, 52, 65536, np.uint64)) - np.uint64(1))
    wide = spread.view(np.float64)
    with np.errstate(all="ignore"):
        values = [known, wide * 1.0, wide * 2.0**-300, known * 2.0**-10]
        for fraction in (2, 3, 7, 10, 23):
            middles = known * (1 + 2.0 ** -(fraction + 1))
            values += [middles, np.nextafter(middles, np.inf), np.nextafter(middles, -np.inf)]
    every = np.concatenate(values)
    found = []
    for each in (numpy_kernel, COMPILED):
        assert each
        out = np.empty(every.size * itemsize(dtype), np.uint8)
        each.round_to(every, dtype, byteorder, out)
        found.append(out.tobytes())
    assert found[0] == found[1]


@needs_compiled
@given(st.lists(st.floats(width=64), max_size=40), st.floats(0.25, 4))
def test_division_is_that_of_python_and_finds_what_is_not_finite(
    values: list[float], divisor: float
) -> None:
    """Quotients are rounded once; the answer is whether all of them are finite."""
    from polyak_cli.engine import _kernel

    array = np.array(values, np.float64)
    is_finite = _kernel.divide(array, divisor)
    expected = np.array([value / divisor for value in values], np.float64)
    assert number_bits(array) == number_bits(expected)
    assert is_finite == all(map(math.isfinite, expected.tolist()))


@needs_compiled
def test_buffers_that_do_not_match_are_refused() -> None:
    """Nothing outside a buffer is read or written, whatever the caller gives."""
    from polyak_cli.engine import _kernel

    raw, total = np.zeros(12, np.uint8), np.zeros(3)
    odd = np.zeros(25, np.uint8)[1:].view(np.float64)
    fixed = np.zeros(3)
    fixed.flags.writeable = False
    scratch = total, total

    def add(*, raw: Bytes = raw, dtype: str = "float32", row: int = 0, total: Any = total) -> None:
        _kernel.accumulate(raw, dtype, "<", [(row, 1.0)], [total], bytearray(1), scratch)

    for first, second in ((raw[:11], total), (raw, total[:2]), (raw[:8], total), (raw, odd)):
        with pytest.raises(ValueError, match="float"):
            add(raw=first, total=second)
        with pytest.raises(ValueError, match="float"):
            _kernel.widen(first, "float32", "<", second)
        with pytest.raises(ValueError, match="float"):
            _kernel.round_to(second, "float32", "<", first)
    for name, order in (("float128", "<"), ("float32", "|"), ("", "")):
        with pytest.raises(ValueError, match="12 bytes are no"):
            _kernel.widen(raw, name, order, total)
    for row in (-1, 1, 1 << 40):
        with pytest.raises(ValueError, match="there is no sum"):
            add(row=row)
    for unfit in (fixed, np.zeros(6)[::2], "text", None):
        with pytest.raises((TypeError, ValueError, BufferError)):
            add(total=unfit)
    with pytest.raises(ValueError, match="aligned"):
        _kernel.divide(odd, 2.0)
    # 2^61 numbers of 8 bytes: the product of both is 0 in 64 bits.  Nothing lies at the address.
    vast: Any = (ctypes.c_char * (1 << 61)).from_address(64)
    with pytest.raises(ValueError, match="float64"):
        add(raw=vast, dtype="float8_e5m2", total=np.empty(0))
    unfit_terms: Any
    for unfit_terms in (None, [None], [(0,)], [("0", 1.0)], 5):
        with pytest.raises((TypeError, SystemError)):
            _kernel.accumulate(raw, "float32", "<", unfit_terms, [total], bytearray(1), scratch)
    for few in ([], [total]):
        with pytest.raises((ValueError, IndexError)):
            _kernel.accumulate(raw, "float32", "<", [(1, 1.0)], few, bytearray(2), scratch)


@needs_compiled
def test_buffers_are_given_back() -> None:
    """After a call, refused or not, nobody holds a buffer: a bytearray can grow again."""
    kernel: Any = importlib.import_module("polyak_cli.engine._kernel")
    raw, total, scratch = bytearray(8), bytearray(16), bytearray(16)
    order = "float32", "<"
    for terms in ([(0, 1.0)], [(5, 1.0)], [None]):
        for sums in ([total], [bytes(16)], [bytearray(24)], []):
            with contextlib.suppress(Exception):
                kernel.accumulate(raw, *order, terms, sums, bytearray(1), (scratch, scratch))
    for values in (total, bytearray(24), bytes(16)):
        with contextlib.suppress(Exception):
            kernel.widen(raw, *order, values)
        with contextlib.suppress(Exception):
            kernel.round_to(values, *order, raw)
    kernel.divide(total, 2.0)
    raw += b"grows"
    total += b"too"
    scratch += b"all"
