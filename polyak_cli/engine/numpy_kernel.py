"""The kernel in numpy, which runs everywhere.  Knows what `kernel` knows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from polyak_cli.engine import float8
from polyak_cli.storage import Bytes
from polyak_cli.tensors import FLOATS, Float64

NAME = "numpy"


def widen(raw: Bytes, dtype: str, byteorder: str, out: Float64) -> None:
    """Convert stored bytes to float64, exactly; a signalling NaN becomes a quiet one.

    Call it under ``np.errstate(invalid="ignore")``, which is too slow to enter for each slab.

    Args:
        raw: the stored bytes of n elements.
        dtype: one of `FLOATS`.
        byteorder: "<" or ">".
        out: n float64 elements, overwritten.
    """
    _convert(raw, dtype, byteorder, out)
    if dtype in ("float16", "float64"):  # which numpy copies bit by bit
        np.multiply(out, 1.0, out=out)


def _convert(raw: Bytes, dtype: str, byteorder: str, out: Float64) -> None:
    """Convert as `widen`, except that a signalling NaN may stay one."""
    if dtype in float8.LAYOUTS:
        # No index is out of bounds; "clip" only saves numpy the check and a copy of ``out``.
        np.take(float8.list_values(dtype), raw, out=out, mode="clip")
        return
    stored = raw.view(byteorder + FLOATS[dtype])
    if dtype == "bfloat16":  # the upper half of a float32
        stored = np.left_shift(stored, 16, dtype=np.uint32).view(np.float32)
    np.copyto(out, stored)


def accumulate(
    raw: Bytes,
    dtype: str,
    byteorder: str,
    terms: Sequence[tuple[int, float]],
    sums: Sequence[Float64],
    started: bytearray,
    scratch: tuple[Float64, Float64],
) -> None:
    """Add one checkpoint's terms ``c x`` to the sums of all averages it counts in.

    The order of calls is the order of the terms: from the oldest checkpoint to the newest.
    Call it under ``np.errstate``, as `widen`.

    Args:
        raw: the stored bytes of n elements x.
        dtype: one of `FLOATS`.
        byteorder: "<" or ">".
        terms: for each average that the checkpoint counts in, its number and c, which is not 0.
        sums: n float64 elements for each average.
        started: a byte for each average, 0 until its sum has a first term; set here.
        scratch: two buffers of n elements, overwritten.  With one average they may be the same:
            then its product may overwrite the widened values, as no other average needs them.
    """
    values, product = scratch
    _convert(raw, dtype, byteorder, values)
    for row, coefficient in terms:
        if started[row]:
            # Two roundings, of the product and of the sum.  A fused multiply-add rounds once, so
            # its last bits would depend on the processor and on the compiler's choice.  These two
            # calls of numpy cannot be fused; a compiled kernel must switch contraction off.
            np.multiply(values, coefficient, out=product)
            np.add(sums[row], product, out=sums[row])
        else:
            # The first term is stored, not added to 0: 0 + (-0.0) is +0.0, so a sum that begins
            # with 0 would lose the sign of an average of negative zeros.
            np.multiply(values, coefficient, out=sums[row])
            started[row] = 1


def divide(values: Float64, divisor: float) -> bool:
    """Divide sums in place, and return whether all quotients are finite.

    Call it under ``np.errstate``, as `widen`.

    Args:
        values: n float64 elements.
        divisor: the sum of the multipliers.
    """
    if divisor != 1.0:
        np.divide(values, divisor, out=values)
    return is_finite(values)


def is_finite(values: Float64) -> bool:
    """Return whether all values are finite."""
    # A finite sum proves it in one pass without a temporary array.  An infinite one proves
    # nothing, as large finite values can overflow; only then are the values looked at one by one.
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.add.reduce(values))) or bool(np.isfinite(values).all())


def round_to(values: Float64, dtype: str, byteorder: str, out: Bytes) -> None:
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
        elif dtype in float8.LAYOUTS:
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
    # Subtracting 1 from the bits is one step toward zero, and turns infinity into the maximum.
    bits -= np.abs(wide) > np.abs(values)
    bits |= wide != values
    return bits


def _bfloat16_bits(values: Float64) -> npt.NDArray[np.uint16]:
    """Round float64 to bfloat16 once."""
    bits = _odd_bits(values)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Rounding up would carry a NaN into infinity: keep its upper bits and make it quiet.
    nan = np.isnan(values)
    rounded[nan] = (bits[nan] >> 16) | 0x40
    return rounded.astype(np.uint16)


def _float8_bits(values: Float64, dtype: str) -> npt.NDArray[np.uint8]:
    """Round float64 to a float8 once: to bfloat16 to odd, which has bits enough, and by a table."""
    bits = _odd_bits(values)
    codes: Bytes = float8.list_codes(dtype)[(bits >> 16) | ((bits & 0xFFFF) != 0)]
    return codes
