"""The functions of `_kernel.c`, for type checkers."""

from polyak_cli.storage import Bytes
from polyak_cli.tensors import Float64

SOURCE_DIGEST: str

def accumulate(raw: Bytes, coefficient: float, total: Float64, started: bool, /) -> None: ...
def round_to(values: Float64, out: Bytes, /) -> None: ...
