"""Read the fields of protocol buffers (the encoding of proto2 and proto3).

Knows no message: what a field's number means is for the caller to know.
"""

from __future__ import annotations

from collections.abc import Iterator

from polyak_cli.errors import FormatError
from polyak_cli.formats.tensorflow.sstables import read_varint


def read_fields(message: bytes) -> Iterator[tuple[int, int | bytes, bytes]]:
    """Yield number, value and stored bytes of each field of a protocol buffer.

    Raises:
        FormatError: it is damaged.
    """
    place = 0
    while place < len(message):
        start = place
        tag, place = read_varint(message, place)
        value: int | bytes
        # The low three bits are the wire type: 0 a varint, 1 and 5 fixed widths, 2 a length and
        # bytes.  Groups (3, 4) are deprecated, and TensorFlow writes none.
        if tag & 7 == 0:
            value, place = read_varint(message, place)
        elif tag & 7 in (1, 5):
            start_value, place = place, place + (8 if tag & 7 == 1 else 4)
            value = int.from_bytes(message[start_value:place], "little")
        elif tag & 7 == 2:
            length, start_value = read_varint(message, place)
            place = start_value + length
            value = message[start_value:place]
        else:
            raise FormatError(f"a field has wire type {tag & 7}, which these messages do not use")
        if place > len(message):
            raise FormatError("a field is cut off")
        yield tag >> 3, value, message[start:place]


def require_number(value: int | bytes) -> int:
    """Return a field that must be a number.

    Raises:
        FormatError: it is something else, or negative.
    """
    # Sizes and offsets are int64: beyond 2^63 they are negative numbers.
    if isinstance(value, bytes) or value >= 1 << 63:
        raise FormatError("a field is not a number of 0 or more")
    return value


def require_message(value: int | bytes) -> bytes:
    """Return a field that must be a message or bytes.

    Raises:
        FormatError: it is a number.
    """
    if isinstance(value, int):
        raise FormatError("a field is a number; expected a message")
    return value
