"""CRC32C (Castagnoli), masked as LevelDB and TensorFlow store it, at a few GB/s in plain numpy.

Python's zlib has another polynomial.  A message is a polynomial over GF(2), and its checksum the
remainder by `_POLYNOMIAL`.  Modulo that one, x^(64 * 5685) = x^(64 * 1362) + x^(64 * 426) + 1: so
the first words of a message may be XORed into three later places each, thousands of words at a
time, until few are left.  The idea is of Russell, "Chorba: A novel CRC32 implementation", 2024.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from polyak_cli.processes.sandbox import Alive
from polyak_cli.storage import (
    Bytes,
)
from polyak_cli.storage.local import (
    read_exactly,
)

_Words = npt.NDArray[np.uint32]

_POLYNOMIAL = 0x82F63B78  # reflected, as all here: the lowest bit is the highest power
#: Powers of x^64 of which the first is the sum of the others and of 1.
RELATION = (5685, 1362, 426)
_KEPT = RELATION[0]  # words to which any message is reduced
_SHIFTS = (_KEPT - RELATION[1], _KEPT - RELATION[2], _KEPT)
_STEP = 1 << 16  # words read at a time
_HEAD = 4  # bytes of a message that are inverted to begin with
_SMALL = 1 << 10  # bytes from which on numpy pays


def masked(crc: int) -> int:
    """Return a checksum as it is stored, so that data with checksums in them do not weaken it."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def of_bytes(data: bytes) -> int:
    """Return the checksum of bytes in memory."""
    if len(data) < _SMALL:
        return _bytewise(data)
    whole = np.frombuffer(data, np.uint8)

    def read(start: int, piece: Bytes) -> None:
        piece[:] = whole[start : start + len(piece)]

    return _streamed(read, len(data), lambda: None)


def of_file(descriptor: int, offset: int, nbytes: int, alive: Alive = lambda: None) -> int:
    """Return the checksum of a run of bytes of a file.

    Raises:
        FormatError: the file ends first.
    """

    def read(start: int, piece: Bytes) -> None:
        read_exactly(descriptor, offset + start, piece)

    if nbytes < _SMALL:
        buffer = np.empty(nbytes, np.uint8)
        read(0, buffer)
        return _bytewise(buffer.tobytes())
    return _streamed(read, nbytes, alive)


def _bytewise(data: bytes) -> int:
    crc = 0xFFFFFFFF
    table = _byte_table()
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _streamed(read: Callable[[int, Bytes], None], nbytes: int, alive: Alive) -> int:
    """Return the checksum of what ``read`` puts into buffers, each given with where it begins."""
    step = _STEP * 8
    most = min(nbytes, step + _HEAD)
    words = np.zeros(_KEPT + -(-most // 8), np.uint64)  # leading zeros are neutral
    done = 0
    while done < nbytes:
        count = (nbytes - done) % step  # only the first piece may be of an odd length
        count += step if count < _HEAD else 0
        end = _KEPT + -(-count // 8)
        piece = words.view(np.uint8)[end * 8 - count : end * 8]
        read(done, piece)
        if not done:
            piece[:_HEAD] ^= 0xFF
        _fold(words[:end])
        words[:_KEPT] = words[end - _KEPT : end].copy()
        done += count
        alive()
    return _reduced(words[max(0, _KEPT - -(-nbytes // 8)) : _KEPT]) ^ 0xFFFFFFFF


def _fold(words: npt.NDArray[np.uint64]) -> None:
    """Move all words into the last `_KEPT` ones."""
    for start in range(0, len(words) - _KEPT, _SHIFTS[0]):
        block = words[start : min(start + _SHIFTS[0], len(words) - _KEPT)]
        for shift in _SHIFTS:
            target = words[start + shift : start + shift + len(block)]
            np.bitwise_xor(target, block, out=target)


def _reduced(words: npt.NDArray[np.uint64]) -> int:
    """Return the remainder: the first half moves into the second, again and again."""
    halves = words.view("<u4")
    levels = _levels()
    count = (len(halves) - 1).bit_length()
    left = np.zeros(1 << count, np.uint32)
    left[len(left) - len(halves) :] = halves
    for level in reversed(levels[:count]):
        middle = len(left) // 2
        left = _advanced(level, left[:middle]) ^ left[middle:]
    return int(_advanced(levels[0], left)[0])


def _advanced(tables: npt.NDArray[np.uint32], words: _Words) -> _Words:
    """Multiply by the power of x whose products with every byte the tables hold."""
    result = np.zeros_like(words)
    for k, table in enumerate(tables):
        result ^= table.take(words >> np.uint32(8 * k) & np.uint32(0xFF))
    return result


@functools.cache
def _levels() -> list[npt.NDArray[np.uint32]]:
    """Return tables to multiply by x^(32 * 2^level), up to a level that has room for all words."""
    # Images of the 32 bits under one byte of zeros, squared to four bytes, and on.
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    table = np.array(_byte_table(), np.uint32)
    images = table[bits & np.uint32(0xFF)] ^ bits >> np.uint32(8)
    images = _product(images, _product(images, _product(images, images)))
    every = np.arange(256, dtype=np.uint32)
    levels = []
    for _ in range((2 * _KEPT - 1).bit_length()):
        levels.append(np.stack([_product(images, every << np.uint32(8 * k)) for k in range(4)]))
        images = _product(images, images)
    return levels


def _product(images: _Words, words: _Words) -> _Words:
    """Apply a linear map, given by the images of the bits, to words."""
    result = np.zeros_like(words)
    for bit in range(32):
        result ^= images[bit] * (words >> np.uint32(bit) & np.uint32(1))
    return result


@functools.cache
def _byte_table() -> list[int]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = crc >> 1 ^ (_POLYNOMIAL if crc & 1 else 0)
        table.append(crc)
    return table
