"""The kernel in C, `_kernel.c`: the bits of `numpy_kernel`, in one pass, while other threads run.

Cannot be imported where the C code has not been compiled.  Knows what `kernel` knows.
"""

from __future__ import annotations

from polyak_cli.engine._kernel import accumulate, divide, round_to, widen
from polyak_cli.tensors import Float64

__all__ = ["NAME", "accumulate", "divide", "is_finite", "round_to", "widen"]

NAME = "compiled"


def is_finite(values: Float64) -> bool:
    """See `numpy_kernel.is_finite`."""
    return divide(values, 1.0)  # which leaves them as they are
