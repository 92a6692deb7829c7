"""Read the same slabs of several checkpoints, for tools that look at tensors.

Knows nothing of what those tools compute.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from polyak_cli.engine.inputs import OpenInputs
from polyak_cli.engine.kernel import widen_any
from polyak_cli.engine.slabs import FOLD_BYTES, Memory, TensorSource
from polyak_cli.engine.timing import Clock, Progress, Totals
from polyak_cli.errors import FormatError, shown, word_size
from polyak_cli.storage import Bytes, File
from polyak_cli.tensors import Float64


def find_differing(
    tensors: Iterable[tuple[str, Sequence[TensorSource]]],
    inputs: Sequence[File],
    memory: Memory,
    progress: Progress = lambda _: None,
) -> tuple[set[str], Totals]:
    """Return the names of tensors whose bytes differ between checkpoints, and what that took.

    Args:
        tensors: name and sources of each.
        inputs: the files of all checkpoints.
        memory: bounds the buffers.
        progress: called with the bytes of each piece that was read.

    Raises:
        FormatError: an input ends early, is damaged, or changed since it was scanned.
    """
    # Bytes and not values are compared: then -0.0 and NaN need no rules, and any type will do.
    step = memory.piece * 8
    found = set()
    clock = Clock()
    with OpenInputs(inputs) as files:
        for name, sources in tensors:
            for read, same in _compare(sources, files, step, name):
                clock.read(read)
                progress(read)
                if not same:
                    found.add(name)
                    break  # the rest of the tensor cannot change the answer
    return found, clock.totals()


def _compare(
    sources: Sequence[TensorSource], files: OpenInputs, step: int, name: str
) -> Iterator[tuple[int, bool]]:
    """Yield the length of each piece read, and whether it equals the first source's."""
    nbytes = sources[0].storage.nbytes
    if any(source.storage.nbytes != nbytes for source in sources):
        yield 0, False
        return
    for start in range(0, nbytes, step):
        first, other = (np.empty(min(step, nbytes - start), np.uint8) for _ in range(2))
        files.read(sources[0], start, first, name)
        yield len(first), True
        for source in sources[1:]:
            files.read(source, start, other, name)
            yield len(other), np.array_equal(first, other)


class ReadTensor(NamedTuple):
    """One tensor of numbers to read, and where each of several checkpoints keeps it."""

    name: str
    size: int
    sources: Sequence[TensorSource]


class Piece(NamedTuple):
    """A slab of a tensor, as one checkpoint stores it."""

    tensor: ReadTensor
    checkpoint: int
    start: int  # elements
    stop: int
    stored: Bytes | FormatError  # the error where it cannot be read

    @property
    def is_last(self) -> bool:
        """Whether no other checkpoint has the slab after this one."""
        return self.checkpoint == len(self.tensor.sources) - 1


def read_pieces(
    tensors: Iterable[ReadTensor], inputs: Sequence[File], memory: Memory, held: int | None = None
) -> Iterator[Piece]:
    """Yield the stored bytes of every slab of every tensor, checkpoint after checkpoint.

    Args:
        tensors: of types of at most 8 bytes; none is empty.
        inputs: the files of all checkpoints.
        memory: bounds the buffers.  There are two, used in turn: a piece is overwritten when the
            second one after it is yielded.
        held: how many float64 buffers of a slab's length the caller keeps; by default one for
            each checkpoint.

    Yields:
        The pieces.  If a file ends early, is damaged, or changed since it was scanned, its error
        stands in place of the bytes.

    Raises:
        FormatError: a tensor cannot be read within the bound.
    """
    with OpenInputs(inputs) as files:
        for tensor in tensors:
            _check_held(tensor, inputs, memory)
            buffers = len(tensor.sources) if held is None else held
            count = min(tensor.size, max(1, memory.most // (1 + buffers)))
            # Slabs of whole bands of chunks where they fit: a chunk that two slabs share is decoded
            # twice.
            band = max(
                s.storage.preferred_nbytes * tensor.size // s.storage.nbytes for s in tensor.sources
            )
            count -= count % band if 0 < band < count < tensor.size else 0
            # Two buffers, so that a caller can compare a piece with the piece before it.
            raw = [np.empty(count * 8, np.uint8) for _ in range(2)]
            for start in range(0, tensor.size, count):
                stop = min(start + count, tensor.size)
                for k, source in enumerate(tensor.sources):
                    width = source.storage.nbytes // tensor.size
                    stored = raw[k % 2][: (stop - start) * width]
                    try:
                        files.read(source, start * width, stored, tensor.name)
                    except FormatError as error:
                        yield Piece(tensor, k, start, stop, error)
                    else:
                        yield Piece(tensor, k, start, stop, stored)


def read_values(
    tensors: Iterable[ReadTensor], inputs: Sequence[File], memory: Memory
) -> Iterator[tuple[ReadTensor, list[Float64]]]:
    """Yield every slab of every tensor as float64, one array for each checkpoint.

    Args:
        tensors: of types that `kernel.widen_any` knows; none is empty.
        inputs: the files of all checkpoints.
        memory: bounds the buffers.  They are used again: a slab is overwritten by the next one.

    Raises:
        FormatError: an input ends early, is damaged, or changed since it was scanned.
    """
    buffers: list[Float64] = []
    for piece in read_pieces(tensors, inputs, memory):
        tensor, k, start, stop, stored = piece
        if isinstance(stored, FormatError):
            raise stored
        source, count = tensor.sources[k], stop - start
        # Buffers are kept from tensor to tensor: allocating them costs more than a small tensor.
        if k == 0 and (len(buffers) != len(tensor.sources) or len(buffers[0]) < count):
            buffers = [np.empty(count) for _ in tensor.sources]
        widen_any(stored, source.dtype, source.byteorder, buffers[k][:count])
        if piece.is_last:
            yield tensor, [buffer[:count] for buffer in buffers]


def _check_held(tensor: ReadTensor, inputs: Sequence[File], memory: Memory) -> None:
    """Refuse a tensor in blocks that do not fit the bound."""
    # A compressed chunk is decoded whole for any part of it, so no slab can be small enough.
    for source in tensor.sources:
        if source.storage.block_nbytes > memory.most * FOLD_BYTES:
            path = inputs[source.find_file(0)].path
            raise FormatError(
                f"{shown(path)}: tensor '{shown(tensor.name)}' is stored in chunks of "
                f"{word_size(source.storage.block_nbytes)}, and each must be held whole; expected "
                f"at most {word_size(memory.most * FOLD_BYTES)}"
            )
