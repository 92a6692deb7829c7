"""Sorted tables of LevelDB, as TensorFlow writes them: read whole, within bounds, and written.

A table is blocks of sorted keys and values, a block of metadata, a block that lists the blocks, and
a footer; see LevelDB's "table_format.md".  Knows nothing of what keys and values mean.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from polyak_cli.errors import FormatError, word_size
from polyak_cli.formats import checksums
from polyak_cli.formats.zips import WHOLE

MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)
_FOOTER = 48  # bytes: two handles, padded, and the magic
_TRAILER = struct.Struct("<BL")  # of a block: compression and checksum
_COMPRESSION = {1: "snappy", 2: "zstd"}
_BLOCK = 1 << 18  # bytes of a block, as TensorFlow's tables have them
_RESTART = 16  # entries between two whole keys

Pair = tuple[bytes, bytes]


class _Handle(NamedTuple):
    offset: int
    nbytes: int


def read_varint(data: bytes, place: int) -> tuple[int, int]:
    """Return a number of seven bits a byte, and the place behind it.

    Raises:
        FormatError: it is cut off, or has more than 64 bits.
    """
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            raise FormatError("a number in it is cut off")
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, place
    raise FormatError("a number in it has more than 64 bits")


def encode_varint(value: int) -> bytes:
    """Return a number as `read_varint` reads it."""
    result = bytearray()
    while value > 0x7F:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*result, value))


# --- reading --------------------------------------------------------------------------------------


def read(data: bytes) -> tuple[list[Pair], dict[bytes, bytes]]:
    """Return the entries of a table, sorted by key, and its blocks of metadata by name.

    Raises:
        FormatError: it is damaged, hostile or compressed; the message lacks the file.
    """
    if len(data) < _FOOTER or not data.endswith(MAGIC):
        raise FormatError("has no footer: it is truncated or damaged; save it again")
    place = len(data) - _FOOTER
    meta, place = _read_handle(data, place)
    index, _ = _read_handle(data, place)
    budget = _Budget()
    entries: list[Pair] = []
    for _, value in _read_entries(_read_block(data, index), budget):
        entries.extend(_read_entries(_read_block(data, _read_handle(value, 0)[0]), budget))
    if any(one[0] >= other[0] for one, other in itertools.pairwise(entries)):
        raise FormatError("is damaged: its keys are not sorted")
    return entries, {
        name: _read_block(data, _read_handle(value, 0)[0])
        for name, value in _read_entries(_read_block(data, meta), budget)
    }


class _Budget:
    """What keys and values may take: a few bytes can stand for a long key, again and again."""

    def __init__(self) -> None:
        self.left = WHOLE

    def spend(self, nbytes: int) -> None:
        """Count bytes.

        Raises:
            FormatError: there are too many.
        """
        self.left -= nbytes
        if self.left < 0:
            raise FormatError(f"its keys and values have more than {word_size(WHOLE)}")


def _read_handle(data: bytes, place: int) -> tuple[_Handle, int]:
    offset, place = read_varint(data, place)
    nbytes, place = read_varint(data, place)
    return _Handle(offset, nbytes), place


def _read_block(data: bytes, handle: _Handle) -> bytes:
    """Return the content of a block, checked."""
    end = handle.offset + handle.nbytes
    if end + _TRAILER.size > len(data):
        raise FormatError(
            f"is truncated or damaged: a block at {handle.offset} of {handle.nbytes} bytes lies "
            f"outside its {len(data)} bytes"
        )
    kind, crc = _TRAILER.unpack_from(data, end)
    if kind:
        raise FormatError(
            f"a block at {handle.offset} is compressed "
            f"({_COMPRESSION.get(kind, f'method {kind}')}), which TensorFlow does not do; "
            "expected no compression"
        )
    if checksums.mask(checksums.crc32c(data[handle.offset : end + 1])) != crc:
        raise FormatError(f"is damaged: the checksum of a block at {handle.offset} is wrong")
    return data[handle.offset : end]


def _read_entries(block: bytes, budget: _Budget) -> Iterator[Pair]:
    """Yield keys and values of a block; each key is stored as its difference from the last one."""
    (restarts,) = struct.unpack_from("<L", block, len(block) - 4) if len(block) >= 4 else (1 << 32,)
    end = len(block) - 4 - 4 * restarts
    if end < 0:
        raise FormatError("is damaged: a block has no entries")
    place, key = 0, b""
    while place < end:
        shared, place = read_varint(block, place)
        own, place = read_varint(block, place)
        length, place = read_varint(block, place)
        if shared > len(key) or place + own + length > end:
            raise FormatError("is damaged: an entry reaches out of its block")
        budget.spend(shared + own + length)
        key = key[:shared] + block[place : place + own]
        place += own
        yield key, block[place : place + length]
        place += length


# --- writing --------------------------------------------------------------------------------------


def build_table(entries: Iterable[Pair], meta: Mapping[bytes, bytes]) -> bytes:
    """Return a table.

    Args:
        entries: keys and values, sorted by key.
        meta: further blocks by name, which who reads the entries does not see.
    """
    table = bytearray()
    index = []
    for group in _group_entries(entries):
        index.append((group[-1][0], _append_block(table, _pack_block(group, _RESTART))))
    named = [(name, _append_block(table, content)) for name, content in sorted(meta.items())]
    meta_handle = _append_block(table, _pack_block(named, _RESTART))
    footer = meta_handle + _append_block(table, _pack_block(index, 1))
    return bytes(table + footer.ljust(_FOOTER - len(MAGIC), b"\0") + MAGIC)


def _group_entries(entries: Iterable[Pair]) -> Iterator[list[Pair]]:
    """Divide entries into groups that each fill one block."""
    group: list[Pair] = []
    total = 0
    for key, value in entries:
        group.append((key, value))
        total += len(key) + len(value)
        if total >= _BLOCK:
            yield group
            group, total = [], 0
    if group:
        yield group


def _pack_block(entries: Sequence[Pair], restart: int) -> bytes:
    """Return the content of a block."""
    block = bytearray()
    restarts = [] if entries else [0]
    before = b""
    for number, (key, value) in enumerate(entries):
        shared = 0
        if number % restart == 0:
            restarts.append(len(block))
        else:
            shared = _count_shared(before, key)
        for length in (shared, len(key) - shared, len(value)):
            block += encode_varint(length)
        block += key[shared:] + value
        before = key
    return bytes(block + struct.pack(f"<{len(restarts)}LL", *restarts, len(restarts)))


def _count_shared(one: bytes, other: bytes) -> int:
    """Return how many bytes two keys have in common at their beginning."""
    length = min(len(one), len(other))
    return next((k for k in range(length) if one[k] != other[k]), length)


def _append_block(table: bytearray, content: bytes) -> bytes:
    """Append a block with its trailer and return its handle."""
    handle = encode_varint(len(table)) + encode_varint(len(content))
    sealed = content + b"\0"
    table += sealed + struct.pack("<L", checksums.mask(checksums.crc32c(sealed)))
    return handle
