"""The arithmetic of an average: widen stored bytes to float64, add terms, and round once.

Arrays go in and arrays come out.  `accumulate` and `round_to` are the two operations of the inner
loop; a kernel is a module that has them, `widen` and `is_finite`.  `numpy_kernel` is the one that
runs everywhere, and another must give the same bits; `tests/test_kernel.py` compares them with an
independent oracle.  Knows nothing of files, of slabs or of the names of tensors.
"""

from __future__ import annotations

import numpy as np

from polyak_cli.engine.numpy_kernel import accumulate, is_finite, round_to, widen
from polyak_cli.storage import Bytes
from polyak_cli.tensors import WHOLE_NUMBERS, Float64

__all__ = ["accumulate", "is_finite", "round_to", "widen", "widen_any"]


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
