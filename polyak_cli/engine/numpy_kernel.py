"""The kernel in numpy, which runs everywhere.  Knows what `kernel` knows.

It allocates nothing for a piece: what numpy cannot do in place goes through buffers of a few
thousand elements, which each thread keeps.  New arrays of a piece's size would be new pages of
memory for each piece, and to make those takes longer than to compute what they hold.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from polyak_cli.engine import float8
from polyak_cli.storage import Bytes
from polyak_cli.tensors import FLOATS, Float64

NAME = "numpy"
_Bits = npt.NDArray[np.uint32]
#: Elements that are converted at a time where a conversion needs buffers, which stay in the cache.
_BLOCK = 16384


class _Buffers(threading.local):
    """Buffers of one block for each thread, made when the thread first asks for one."""

    def __init__(self) -> None:
        #: A float32 and, as integers, its bits.
        self.single = np.empty(_BLOCK, np.float32)
        self.bits = self.single.view(np.uint32)
        self.wide, self.other = np.empty(_BLOCK), np.empty(_BLOCK)
        self.spare = np.empty(_BLOCK, np.uint32)
        self.index = np.empty(_BLOCK, np.intp)
        self.flags = np.empty(_BLOCK, np.bool_)


_buffers = _Buffers()


def _cut(count: int) -> Iterator[slice]:
    """Yield the blocks of so many elements."""
    for start in range(0, count, _BLOCK):
        yield slice(start, min(start + _BLOCK, count))


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
        table = float8.list_values(dtype)
        for block in _cut(len(out)):
            _pick(table, raw[block], out[block])
        return
    stored = raw.view(byteorder + FLOATS[dtype])
    if dtype != "bfloat16":
        np.copyto(out, stored)
        return
    for block in _cut(len(out)):  # a bfloat16 is the upper half of a float32
        bits = _buffers.bits[: len(stored[block])]
        np.copyto(bits, stored[block])
        np.left_shift(bits, 16, out=bits)
        np.copyto(out[block], bits.view(np.float32))


def _pick(table: npt.NDArray[Any], codes: npt.NDArray[Any], out: npt.NDArray[Any]) -> None:
    """Look up a block of codes in a table that has an entry for each code."""
    index = _buffers.index[: len(codes)]
    np.copyto(index, codes)  # numpy would make a new array of indices
    # No index is out of bounds; "clip" only saves numpy the check and a copy of ``out``.
    np.take(table, index, out=out, mode="clip")


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
        if np.isfinite(np.add.reduce(values)):
            return True
    flags = _buffers.flags
    return all(
        np.isfinite(values[block], out=flags[: len(values[block])]).all()
        for block in _cut(len(values))
    )


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
        if dtype != "bfloat16" and dtype not in float8.LAYOUTS:
            np.copyto(stored, values, casting="same_kind")
            return
        for block in _cut(len(values)):
            bits = _round_to_odd(values[block])
            if dtype == "bfloat16":
                _round_bits(bits, values[block])
                np.copyto(stored[block], bits, casting="unsafe")
            else:
                # bfloat16 to odd has bits enough to be rounded once more, by a table.
                _halve_to_odd(bits)
                _pick(float8.list_codes(dtype), bits, out[block])


def _round_to_odd(values: Float64) -> _Bits:
    """Round a block to float32 *to odd*: toward zero, with the last bit set when inexact.

    Rounding to nearest first would round twice.  This keeps what the second rounding must know:
    Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using
    rounding to odd", 2008.

    Returns:
        The bits, in a buffer that the next call overwrites.
    """
    count = len(values)
    bits, spare, flags = _buffers.bits[:count], _buffers.spare[:count], _buffers.flags[:count]
    wide, magnitudes = _buffers.wide[:count], _buffers.other[:count]
    np.copyto(_buffers.single[:count], values, casting="same_kind")
    np.copyto(wide, _buffers.single[:count])
    np.not_equal(wide, values, out=flags)
    np.copyto(spare, flags)
    np.absolute(wide, out=wide)
    np.absolute(values, out=magnitudes)
    np.greater(wide, magnitudes, out=flags)
    # Subtracting 1 from the bits is one step toward zero, and turns infinity into the maximum.
    np.subtract(bits, 1, out=bits, where=flags)
    np.bitwise_or(bits, spare, out=bits)
    return bits


def _round_bits(bits: _Bits, values: Float64) -> None:
    """Round the bits of a block of float32 to their upper halves, in place."""
    spare, flags = _buffers.spare[: len(bits)], _buffers.flags[: len(bits)]
    # Rounding up would carry a NaN into infinity: keep its upper bits.  A float32 of a float64 is
    # always a quiet NaN, whose bit is among them.
    np.isnan(values, out=flags)
    np.copyto(spare, bits)
    np.right_shift(bits, 16, out=bits)
    np.bitwise_and(bits, 1, out=bits)
    np.add(bits, 0x7FFF, out=bits)
    np.add(bits, spare, out=bits)
    np.copyto(bits, spare, where=flags)
    np.right_shift(bits, 16, out=bits)


def _halve_to_odd(bits: _Bits) -> None:
    """Round the bits of a block of float32 to their upper halves to odd, in place."""
    spare, flags = _buffers.spare[: len(bits)], _buffers.flags[: len(bits)]
    np.bitwise_and(bits, 0xFFFF, out=spare)
    np.not_equal(spare, 0, out=flags)
    np.right_shift(bits, 16, out=bits)
    np.bitwise_or(bits, 1, out=bits, where=flags)
