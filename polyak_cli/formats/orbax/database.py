"""Write an OCDBT database of one version: a manifest, and a data file with a tree of one node.

Nothing in it is compressed, so values are filled in later by offset.  `ocdbt` reads such databases,
and names the description of the format.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from typing import NamedTuple

from polyak_cli.formats import checksums
from polyak_cli.formats.orbax import ocdbt
from polyak_cli.formats.tensorflow.sstables import encode_varint

#: The data file, relative to the manifest; the format allows any name.
DATA = "d/average"
#: Limits that only matter to who writes more into it: those that Orbax sets.
_MOST_INLINE, _MOST_NODE = 1024, 100_000_000
_ARITY = 4
_LENGTH_AT = struct.Struct("<Q")


class Kept(NamedTuple):
    """A value that lies in the data file."""

    offset: int
    nbytes: int


def encode_node(values: Mapping[str, bytes | Kept]) -> bytes:
    """Return the node of a tree that has all of its keys in it."""
    pairs = sorted((key.encode("utf-8", "surrogateescape"), value) for key, value in values.items())
    kept = [value for _, value in pairs if isinstance(value, Kept)]
    inline = [value for _, value in pairs if isinstance(value, bytes)]
    lengths = [v.nbytes if isinstance(v, Kept) else len(v) for _, v in pairs]
    return _encode_block(
        ocdbt.NODE_MAGIC,
        b"".join(
            (
                b"\0",  # its height: it has no nodes below
                _encode_files(),
                encode_varint(len(pairs)),
                # No key is shortened by what it shares with the one before.
                _encode_all([0] * (len(pairs) - 1)),
                _encode_all([len(key) for key, _ in pairs]),
                *(key for key, _ in pairs),
                _encode_all(lengths),
                _encode_all([int(isinstance(value, Kept)) for _, value in pairs]),
                _encode_all([0] * len(kept)),
                _encode_all([value.offset for value in kept]),
                *inline,
            )
        ),
    )


def encode_manifest(node: bytes, offset: int, values: Mapping[str, bytes | Kept]) -> bytes:
    """Return the manifest of a database whose node lies at an offset of the data file."""
    sums = len(values), len(node), sum(v.nbytes for v in values.values() if isinstance(v, Kept))
    return _encode_block(
        ocdbt.MANIFEST_MAGIC,
        b"".join(
            (
                hashlib.sha256(node).digest()[:16],  # its identity, the same for the same content
                encode_varint(0),  # one manifest, and not several
                encode_varint(_MOST_INLINE),
                encode_varint(_MOST_NODE),
                bytes((_ARITY,)),
                encode_varint(0),  # no compression
                _encode_files(),
                # One version: its generation, the height of its tree, where it lies, its sums, and
                # when it was made, which is left out so that bytes repeat.
                _encode_all([1, 1]),
                b"\0",
                _encode_all([0, offset, len(node), *sums]),
                _LENGTH_AT.pack(0),
                encode_varint(0),  # no older versions
            )
        ),
    )


def _encode_files() -> bytes:
    """Return a table of the one data file."""
    return _encode_all([1, len(DATA), 0]) + DATA.encode()


def _encode_all(numbers: list[int]) -> bytes:
    return b"".join(map(encode_varint, numbers))


def _encode_block(magic: int, body: bytes) -> bytes:
    """Return a block: its head, version 0 without compression, and its checksum."""
    head = struct.pack(">L", magic) + _LENGTH_AT.pack(4 + 8 + 2 + len(body) + 4) + b"\0\0"
    return head + body + struct.pack("<L", checksums.crc32c(head + body))
