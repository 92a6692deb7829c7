"""Take the inner products of all pairs of checkpoints, over all elements of each group of tensors.

The rows that are multiplied are the differences to the newest checkpoint, and the newest itself.
Knows nothing of files, and nothing of what the products mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from polyak_cli.tensors import Float64

#: Elements that BLAS multiplies at a time: so few that it starts no thread of its own, whose number
#: could change the last bit, and that a row is still in the cache when the next one needs it.
BLOCK = 1024
#: Values near float64's maximum are multiplied by 2 to minus this, so that no square overflows.
SCALED = 600


class Products(NamedTuple):
    """The inner products of rows over some elements.

    Attributes:
        matrix: rows x rows; of the true products, what is left of them by 4^-exponent.
        size: how many elements.
        exponent: 0, or `SCALED`.
    """

    matrix: Float64
    size: int
    exponent: int

    def plus(self, other: Products) -> Products:
        """Return the products over the elements of both."""
        exponent = max(self.exponent, other.exponent)
        a, b = (np.ldexp(one.matrix, 2 * (one.exponent - exponent)) for one in (self, other))
        return Products(a + b, self.size + other.size, exponent)


class GroupProducts:
    """The products of each group of tensors in one batch, or in all of them so far.

    Attributes:
        number: of the batch, in the order of all.
        groups: group -> its products.
    """

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.groups: dict[int, Products] = {}

    def add(self, group: int, products: Products) -> None:
        """Add products of a group."""
        before = self.groups.get(group)
        self.groups[group] = before.plus(products) if before else products

    def add_all(self, other: GroupProducts) -> None:
        """Add the products of another batch."""
        for group, products in other.groups.items():
            self.add(group, products)


class InOrder:
    """Adds batches in their order, however they come: the order of a sum decides its last bit."""

    def __init__(self) -> None:
        self.total = GroupProducts()
        self.next = 0
        self.waiting: dict[int, GroupProducts] = {}

    def add(self, sums: GroupProducts) -> None:
        """Take the sums of a batch, and add all whose turn it is."""
        self.waiting[sums.number] = sums
        for one in self._take_turns():
            self.total.add_all(one)

    def _take_turns(self) -> Iterator[GroupProducts]:
        while self.next in self.waiting:
            yield self.waiting.pop(self.next)
            self.next += 1


def subtract_newest(rows: Float64) -> None:
    """Replace each row but the last by its difference to the last."""
    np.subtract(rows[:-1], rows[-1], out=rows[:-1])


def multiply(rows: Float64) -> Float64:
    """Return the inner products of all pairs of rows."""
    count, size = rows.shape
    whole = size // BLOCK * BLOCK
    total = np.zeros((count, count))
    if whole:
        blocks = rows[:, :whole].reshape(count, -1, BLOCK).transpose(1, 0, 2)
        total += np.matmul(blocks, blocks.transpose(0, 2, 1)).sum(axis=0)
    if whole < size:
        rest = rows[:, whole:]
        total += rest @ rest.T
    return total
