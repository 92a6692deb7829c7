"""The functions of `_kernel.c`, for type checkers; `kernel.Kernel` says what they do."""

from collections.abc import Sequence

from polyak_cli.storage import Bytes
from polyak_cli.tensors import Float64

SOURCE_DIGEST: str

def widen(raw: Bytes, dtype: str, byteorder: str, out: Float64, /) -> None: ...
def accumulate(
    raw: Bytes,
    dtype: str,
    byteorder: str,
    terms: Sequence[tuple[int, float]],
    sums: Sequence[Float64],
    started: bytearray,
    scratch: tuple[Float64, Float64],
    /,
) -> None: ...
def divide(values: Float64, divisor: float, /) -> bool: ...
def round_to(values: Float64, dtype: str, byteorder: str, out: Bytes, /) -> None: ...
