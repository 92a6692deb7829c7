"""The kernel in C, `_kernel.c`; numpy does what the C code does not know.

Cannot be imported where the C code has not been compiled.  Knows what `kernel` knows.
"""

from __future__ import annotations

from collections.abc import Sequence

from polyak_cli.engine import _kernel, numpy_kernel
from polyak_cli.engine.numpy_kernel import is_finite, widen
from polyak_cli.storage import Bytes
from polyak_cli.tensors import Float64

__all__ = ["NAME", "accumulate", "is_finite", "round_to", "widen"]

NAME = "compiled"
#: The types and byte orders that the C code knows.
_KNOWN = {("float32", "<")}


def accumulate(
    raw: Bytes,
    dtype: str,
    byteorder: str,
    terms: Sequence[tuple[int, float]],
    sums: Sequence[Float64],
    started: bytearray,
    scratch: tuple[Float64, Float64],
) -> None:
    """See `numpy_kernel.accumulate`."""
    if (dtype, byteorder) not in _KNOWN:
        numpy_kernel.accumulate(raw, dtype, byteorder, terms, sums, started, scratch)
        return
    for row, coefficient in terms:
        _kernel.accumulate(raw, coefficient, sums[row], bool(started[row]))
        started[row] = 1


def round_to(values: Float64, dtype: str, byteorder: str, out: Bytes) -> None:
    """See `numpy_kernel.round_to`."""
    if (dtype, byteorder) not in _KNOWN:
        numpy_kernel.round_to(values, dtype, byteorder, out)
        return
    _kernel.round_to(values, out)
