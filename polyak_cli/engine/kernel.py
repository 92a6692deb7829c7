"""Convert stored bytes to float64, exactly, and round float64 to stored bytes, once.

Takes and returns arrays.  Knows nothing of files, of checkpoints and of coefficients.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from polyak_cli.storage import Bytes
from polyak_cli.tensors import FLOATS, WHOLE_NUMBERS, Float64

#: float8 type -> bits of its mantissa, bias of its exponent, the first code that is not finite.
_FLOAT8 = {"float8_e4m3fn": (3, 7, 0x7F), "float8_e5m2": (2, 15, 0x7C)}


def widen(raw: Bytes, dtype: str, byteorder: str, out: Float64) -> None:
    """Convert stored bytes to float64, exactly; a signalling NaN becomes a quiet one.

    To be called under ``np.errstate(invalid="ignore")``, which is too slow to enter for each slab.

    Args:
        raw: the stored bytes of n elements.
        dtype: one of `FLOATS`.
        byteorder: "<" or ">".
        out: n float64 elements, overwritten.
    """
    if dtype in _FLOAT8:
        np.take(_float8_values(dtype), raw, out=out, mode="clip")  # no index is out of bounds
        return
    stored = raw.view(byteorder + FLOATS[dtype])
    if dtype == "bfloat16":  # the upper half of a float32
        stored = np.left_shift(stored, 16, dtype=np.uint32).view(np.float32)
    np.copyto(out, stored)


def widen_any(raw: Bytes, dtype: str, byteorder: str, out: Float64) -> None:
    """Convert the stored bytes of any number to float64; integers beyond 2^53 are rounded.

    Args:
        raw: the stored bytes of n elements.
        dtype: one of `FLOATS` or of `WHOLE_NUMBERS`.
        byteorder: "<" or ">".
        out: n float64 elements, overwritten.
    """
    if dtype in WHOLE_NUMBERS:
        np.copyto(out, raw.view(byteorder + WHOLE_NUMBERS[dtype]), casting="unsafe")
    else:
        widen(raw, dtype, byteorder, out)


def narrow(values: Float64, dtype: str, byteorder: str, out: Bytes) -> None:
    """Round float64 to the stored type once, to nearest, ties to even.

    Args:
        values: n float64 elements.
        dtype: one of `FLOATS`.
        byteorder: "<" or ">".
        out: the stored bytes of n elements, overwritten.
    """
    stored = out.view(byteorder + FLOATS[dtype])
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if dtype == "bfloat16":
            stored[:] = _bfloat16_bits(values)
        elif dtype in _FLOAT8:
            stored[:] = _float8_bits(values, dtype)
        else:
            np.copyto(stored, values, casting="same_kind")


def _odd_bits(values: Float64) -> npt.NDArray[np.uint32]:
    """Round float64 to float32 *to odd*: toward zero, with the last bit set when inexact.

    Rounding to nearest first would round twice.  This keeps what the second rounding must know:
    Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using
    rounding to odd", 2008.
    """
    single = values.astype(np.float32)
    bits = single.view(np.uint32)
    wide = single.astype(np.float64)
    bits -= np.abs(wide) > np.abs(values)  # one step toward zero; infinity becomes the greatest
    bits |= wide != values
    return bits


def _bfloat16_bits(values: Float64) -> npt.NDArray[np.uint16]:
    """Round float64 to bfloat16 once."""
    bits = _odd_bits(values)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # A NaN must not carry into infinity: keep its upper bits and make it quiet.
    nan = np.isnan(values)
    rounded[nan] = (bits[nan] >> 16) | 0x40
    return rounded.astype(np.uint16)


def _float8_bits(values: Float64, dtype: str) -> npt.NDArray[np.uint8]:
    """Round float64 to a float8 once: to bfloat16 to odd, which has bits enough, and by a table."""
    bits = _odd_bits(values)
    codes: Bytes = _float8_codes(dtype)[(bits >> 16) | ((bits & 0xFFFF) != 0)]
    return codes


@functools.cache
def _float8_ladder(dtype: str) -> Float64:
    """Return the values of the codes from 0 on, and what would come after the greatest."""
    mantissa, bias, end = _FLOAT8[dtype]
    exponent, fraction = np.divmod(np.arange(end + 1), 1 << mantissa)
    whole = np.where(exponent, (1 << mantissa) + fraction, fraction)  # subnormals have no hidden 1
    ladder: Float64 = whole * 2.0 ** (np.maximum(exponent, 1) - bias - mantissa)
    return ladder


@functools.cache
def _float8_values(dtype: str) -> Float64:
    """Return the value of each of the 256 codes."""
    *_, end = _FLOAT8[dtype]
    values = np.full(128, np.nan)
    values[:end] = _float8_ladder(dtype)[:end]
    if end < 0x7F:  # without "fn", the code after the greatest is infinity
        values[end] = np.inf
    return np.concatenate([values, -values])


@functools.cache
def _float8_codes(dtype: str) -> npt.NDArray[np.uint8]:
    """Return the code nearest to each of the 65,536 bfloat16; ties go to the even code."""
    *_, end = _FLOAT8[dtype]
    ladder = _float8_ladder(dtype)
    middles = (ladder[:-1] + ladder[1:]) / 2
    # A tie goes up from an odd code; from an even one, only what is greater does.
    middles[::2] = np.nextafter(middles[::2], np.inf)
    numbers = (np.arange(0x8000, dtype=np.uint32) << 16).view(np.float32)
    codes = np.searchsorted(middles, numbers, side="right")
    # NaN, sorted behind all numbers; what overflows is infinity or, where there is none, NaN.
    codes[np.isnan(numbers)] = 0x7F if end == 0x7F else 0x7E
    return np.concatenate([codes, codes | 0x80]).astype(np.uint8)
