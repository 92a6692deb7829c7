"""Add up checkpoints that are in memory one after the other, and give their mean at the end.

The operations are those of `folding`, in the same order: multiply and add in float64, divide once,
round once.  So the result has the bits of an average of files with the same values.  Knows no
framework and no scheme; numbers that are not floats are not given to it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from polyak_cli.engine.constants import NAN, Codes, find_codes
from polyak_cli.engine.kernel import accumulate, divide, is_finite, round_to, widen
from polyak_cli.errors import MismatchError, shown
from polyak_cli.storage import Bytes
from polyak_cli.tensors import itemsize

_ORDER = "<" if sys.byteorder == "little" else ">"
#: Elements that are added at a time, so that they and their sum stay in the cache.
_BLOCK = 1 << 16


@dataclass(slots=True)
class Running:
    """One tensor of an average, as far as it goes.

    Attributes:
        name: for messages.
        dtype: of the tensor, one of `FLOATS`.
        total: the sum of the multiplied values so far.
        constant: what the first checkpoint holds that is not finite, as a mask of -inf does.
    """

    name: str
    dtype: str
    total: npt.NDArray[np.float64]
    constant: Codes | None = None


@dataclass(slots=True)
class RunningMean:
    """The average of checkpoints that pass one by one; the oldest comes first.

    Attributes:
        tensors: all that is averaged.
        count: of the checkpoints that were added.
    """

    tensors: list[Running]
    count: int = 0
    _scratch: npt.NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        most = max((len(one.total) for one in self.tensors), default=0)
        self._scratch = np.empty(min(most, _BLOCK))

    @property
    def nbytes(self) -> int:
        """Memory of the sums: 8 bytes for each averaged number."""
        return sum(one.total.nbytes for one in self.tensors)

    def add(self, values: Iterator[npt.NDArray[np.generic]], multiplier: float, where: str) -> None:
        """Add a checkpoint.

        Args:
            values: an array for each tensor, of its type.
            multiplier: not 0.
            where: the checkpoint, for messages.

        Raises:
            MismatchError: a value is NaN, or infinite and was not so at the same place before.
        """
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):
            for tensor, array in zip(self.tensors, values, strict=True):
                self._add(tensor, as_bytes(array), multiplier, where)
        self.count += 1

    def _add(self, tensor: Running, raw: Bytes, multiplier: float, where: str) -> None:
        width, finite = itemsize(tensor.dtype), True
        for start in range(0, len(tensor.total), _BLOCK):
            total = tensor.total[start : start + _BLOCK]
            part = raw[start * width : (start + len(total)) * width]
            scratch = self._scratch[: len(total)]
            started = bytearray([self.count > 0])
            accumulate(
                part, tensor.dtype, _ORDER, [(0, multiplier)], [total], started, (scratch, scratch)
            )
            finite = is_finite(total) and finite
        if not finite:  # as every sum of a constant infinity is
            self._check_constant(tensor, raw, where)

    def _check_constant(self, tensor: Running, raw: Bytes, where: str) -> None:
        """Accept values that are infinite in every checkpoint, and refuse all else."""
        values = np.empty(len(tensor.total))
        widen(raw, tensor.dtype, _ORDER, values)
        codes = find_codes(values)
        if self.count == 0:
            tensor.constant = codes
        known = tensor.constant if tensor.constant is not None else np.zeros_like(codes)
        strays = (codes != known) | (codes == NAN) | (find_codes(tensor.total) != known)
        if strays.any():
            place = int(np.flatnonzero(strays)[0])
            raise MismatchError(
                f"'{shown(tensor.name)}' holds {values[place]:g} (element {place}) at {where}; "
                "expected finite numbers: the training may have diverged"
            )

    def finish(self, divisor: float) -> Iterator[Bytes]:
        """Yield the stored bytes of the mean of each tensor; the sums are given up.

        Args:
            divisor: the sum of the multipliers.
        """
        for tensor in self.tensors:
            raw = np.empty(len(tensor.total) * itemsize(tensor.dtype), np.uint8)
            with np.errstate(invalid="ignore", over="ignore", under="ignore"):
                divide(tensor.total, divisor)
            round_to(tensor.total, tensor.dtype, _ORDER, raw)
            tensor.total = np.empty(0)
            yield raw


def begin(names: Sequence[str], dtypes: Sequence[str], sizes: Sequence[int]) -> RunningMean:
    """Return the average of no checkpoint yet.

    Args:
        names: of the tensors.
        dtypes: of each, one of `FLOATS`.
        sizes: of each, in elements.
    """
    whole = zip(names, dtypes, sizes, strict=True)
    return RunningMean([Running(name, dtype, np.empty(size)) for name, dtype, size in whole])


def as_bytes(array: npt.NDArray[np.generic]) -> Bytes:
    """Return the bytes of an array in its order of elements, without a copy where it can be."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
