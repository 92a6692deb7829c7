"""Tables of the two float8 types: the value of each code, and the code nearest to each bfloat16."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from polyak_cli.tensors import Float64

#: float8 type -> bits of its mantissa, bias of its exponent, the first code that is not finite.
LAYOUTS = {"float8_e4m3fn": (3, 7, 0x7F), "float8_e5m2": (2, 15, 0x7C)}


@functools.cache
def _make_ladder(dtype: str) -> Float64:
    """Return the values of all codes from 0, and the value that would follow the maximum."""
    mantissa, bias, end = LAYOUTS[dtype]
    exponent, fraction = np.divmod(np.arange(end + 1), 1 << mantissa)
    whole = np.where(exponent, (1 << mantissa) + fraction, fraction)  # subnormals have no hidden 1
    ladder: Float64 = whole * 2.0 ** (np.maximum(exponent, 1) - bias - mantissa)
    return ladder


@functools.cache
def list_values(dtype: str) -> Float64:
    """Return the value of each of the 256 codes."""
    *_, end = LAYOUTS[dtype]
    values = np.full(128, np.nan)
    values[:end] = _make_ladder(dtype)[:end]
    if end < 0x7F:  # without "fn", the code after the greatest is infinity
        values[end] = np.inf
    return np.concatenate([values, -values])


@functools.cache
def list_codes(dtype: str) -> npt.NDArray[np.uint8]:
    """Return the code nearest to each of the 65,536 bfloat16; ties go to the even code."""
    *_, end = LAYOUTS[dtype]
    ladder = _make_ladder(dtype)
    middles = (ladder[:-1] + ladder[1:]) / 2
    # A tie goes up from an odd code.  From an even code only a greater value goes up, so its
    # limit is the next float64 after the middle.
    middles[::2] = np.nextafter(middles[::2], np.inf)
    magnitudes = (np.arange(0x8000, dtype=np.uint32) << 16).view(np.float32)
    codes = np.searchsorted(middles, magnitudes, side="right")
    # searchsorted puts NaN behind all numbers, where the code for overflow is: infinity, or NaN in
    # a type without infinity.
    codes[np.isnan(magnitudes)] = 0x7F if end == 0x7F else 0x7E
    return np.concatenate([codes, codes | 0x80]).astype(np.uint8)
