"""CRC-32C, the checksum of TensorFlow's files.

Knows no file format.  google-crc32c computes it with the processor's own instruction; it is
imported only where a TensorFlow checkpoint is read.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from polyak_cli.storage import InputFile

_STEP = 1 << 20  # bytes read at a time


def crc32c_of(
    file: InputFile, offset: int, nbytes: int, after_each: Callable[[], None] = lambda: None
) -> int:
    """Return the CRC-32C (RFC 3720, appendix B.4) of bytes of a file.

    Args:
        file: an open file.
        offset: where the bytes begin.
        nbytes: how many.
        after_each: called after each piece, as a sign of life.

    Raises:
        FormatError: the file ends first, or cannot be read; the message lacks its name.
    """
    import google_crc32c

    crc = 0
    buffer = np.empty(min(_STEP, nbytes), np.uint8)
    for done in range(0, nbytes, _STEP):
        piece = buffer[: nbytes - done]
        file.read_into(offset + done, piece)
        crc = google_crc32c.extend(crc, piece.tobytes())
        after_each()
    return crc


def crc32c(content: bytes) -> int:
    """Return the CRC-32C of bytes in memory."""
    import google_crc32c

    return int(google_crc32c.value(content))


def unmask(masked: int) -> int:
    """Return a checksum that stands in a file; see `mask`."""
    turned = (masked - 0xA282EAD8) & 0xFFFFFFFF
    return (turned >> 17 | turned << 15) & 0xFFFFFFFF


def mask(crc: int) -> int:
    """Return a checksum as it stands in files, so that no checksum is computed of itself.

    TensorFlow and LevelDB rotate it right by 15 bits and add a constant (LevelDB, util/crc32c.h).
    """
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
