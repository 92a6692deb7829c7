"""The arithmetic of an average: widen stored bytes to float64, add terms, and round once.

Arrays go in and arrays come out.  A kernel is a module that has the operations of `Kernel`.  All
kernels give the same bits, so that the choice changes the speed only: `numpy_kernel` runs
everywhere, and `compiled_kernel`, where it could be built, is faster.  `tests/test_kernel.py`
compares them with an independent oracle.  Knows nothing of files, of slabs or of names of tensors.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Protocol

import numpy as np

from polyak_cli.engine import numpy_kernel
from polyak_cli.errors import UsageError, shown
from polyak_cli.storage import Bytes
from polyak_cli.tensors import WHOLE_NUMBERS, Float64

#: The environment variable that names the kernel to use.
VARIABLE = "POLYAK_KERNEL"


class Kernel(Protocol):
    """What a module needs to be a kernel; `numpy_kernel` says what each operation does."""

    NAME: str

    def widen(self, raw: Bytes, dtype: str, byteorder: str, out: Float64) -> None:
        """Convert stored bytes to float64."""

    def accumulate(
        self,
        raw: Bytes,
        dtype: str,
        byteorder: str,
        terms: Sequence[tuple[int, float]],
        sums: Sequence[Float64],
        started: bytearray,
        scratch: tuple[Float64, Float64],
    ) -> None:
        """Add one checkpoint's terms to the sums of all averages it counts in."""

    def divide(self, values: Float64, divisor: float) -> bool:
        """Divide sums in place, and return whether all quotients are finite."""

    def is_finite(self, values: Float64) -> bool:
        """Return whether all values are finite."""

    def round_to(self, values: Float64, dtype: str, byteorder: str, out: Bytes) -> None:
        """Round float64 to the stored type once."""


def find_compiled() -> tuple[Kernel | None, str]:
    """Return the compiled kernel, or None and why it cannot be had."""
    if find_spec("polyak_cli.engine._kernel") is None:
        return None, "not installed; installing polyak compiles it where there is a C compiler"
    try:
        from polyak_cli.engine import compiled_kernel
    except ImportError as error:  # as where a file system forbids to execute what lies on it
        return None, f"installed and cannot be loaded: {shown(error)}"
    return compiled_kernel, ""


def choose_kernel(wanted: str) -> Kernel:
    """Return the kernel of a name, or the fastest one that can be had if the name is empty.

    Raises:
        UsageError: there is no kernel of that name, or it cannot be had.
    """
    if wanted not in ("", "numpy", "compiled"):
        raise UsageError(
            f"{VARIABLE} is '{shown(wanted, 40)}'; set it to numpy or compiled, or unset it"
        )
    if wanted == "numpy":
        return numpy_kernel
    compiled, why = find_compiled()
    if wanted and compiled is None:
        raise UsageError(f"{VARIABLE} is 'compiled', but the compiled kernel is {why}")
    return compiled or numpy_kernel


# Chosen once, when the engine is loaded, so that forked processes have the kernel of their parent.
_chosen = choose_kernel(os.environ.get(VARIABLE, ""))
NAME = _chosen.NAME
widen, accumulate = _chosen.widen, _chosen.accumulate
divide, is_finite, round_to = _chosen.divide, _chosen.is_finite, _chosen.round_to


def find_kernel(name: str) -> Kernel:
    """Return the kernel of a name, or the one that was chosen if the name is empty."""
    return choose_kernel(name) if name else _chosen


def name_other() -> str:
    """Return the name of another kernel than the chosen one; the chosen one's if there is none.

    Who has chosen numpy may have no trust in the compiled one, so that it is not used then.
    """
    return numpy_kernel.NAME if _chosen.NAME == "compiled" else _chosen.NAME


def describe_kernel() -> str:
    """Return the name of the kernel in use, and why it is not the compiled one."""
    if NAME == "compiled":
        return NAME
    if os.environ.get(VARIABLE):
        return f"{NAME} ({VARIABLE} is set)"
    return f"{NAME} (the compiled one, which is faster, is {find_compiled()[1]})"


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
