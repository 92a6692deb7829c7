"""Tell values that are not finite on purpose from those that went wrong.

A causal mask of -inf, and a best loss that begins as inf, hold the same value at the same place in
every checkpoint: they are constants, and the average of a constant is the constant.  A value that
differs between checkpoints went wrong.  Knows nothing of files and of messages.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from polyak_cli.tensors import Float64

#: What an element is: 0 if it is finite.
Codes = npt.NDArray[np.uint8]
FINITE, MINUS, PLUS, NAN = range(4)


class Constant(NamedTuple):
    """The elements of a tensor, or of a part of it, that are such constants."""

    name: str
    infinite: int
    nan: int


def find_codes(values: Float64) -> Codes:
    """Return for each element whether it is finite, an infinity, or NaN."""
    codes = np.zeros(len(values), np.uint8)
    # Masks are mostly not finite: looking for each kind is quicker than picking those that are not.
    codes[np.isneginf(values)] = MINUS
    codes[np.isposinf(values)] = PLUS
    codes[np.isnan(values)] = NAN
    return codes


class Agreement:
    """Which elements hold the same value that is not finite in every checkpoint added so far.

    All NaN count as the same: their bits depend on the processor that made them.

    Attributes:
        count: of checkpoints.
        common: the code that all of them have; `FINITE` where they differ.
        strays: where a checkpoint is not finite, and not all of them have the same.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self.common: Codes = np.zeros(size, np.uint8)
        self.strays: npt.NDArray[np.bool_] = np.zeros(size, np.bool_)

    def add(self, codes: Codes) -> None:
        """Add a checkpoint."""
        if self.count == 0:
            self.common[:] = codes
        elif not np.array_equal(self.common, codes):
            self.strays |= self.common != codes
            self.common[self.strays] = FINITE
        self.count += 1

    def refuse_nan(self, start: int, stop: int) -> None:
        """Count NaN as strays where they mean that a run diverged.

        Nothing tells a single checkpoint's NaN from a constant, and NaN throughout is what is left
        of every weight once the loss was NaN.

        Args:
            start: where the elements of one tensor begin.
            stop: where they end.
        """
        nan = self.common[start:stop] == NAN
        if self.count == 1 or (nan.all() and len(nan) > 1):
            self.strays[start:stop] |= nan
            self.common[start:stop][nan] = FINITE

    def describe(self, name: str, start: int, stop: int) -> Constant:
        """Return how many constants the elements of one tensor are."""
        codes = self.common[start:stop]
        nan = int(np.count_nonzero(codes == NAN))
        return Constant(name, int(np.count_nonzero(codes)) - nan, nan)
