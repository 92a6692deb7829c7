"""Which format a checkpoint has, by what it holds and never by its name.

Reads a few bytes of regular files, by offset.  Knows how files begin and end, and nothing more.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from pathlib import Path

#: Bytes of a zip archive's end in which its list of members is looked for.
_TAIL = 1 << 20
#: Bytes of both ends of a JSON file in which it must say what it lists.
_ENDS = 1 << 16
_LISTED = b"PK\x01\x02"


def detect(path: Path) -> str:
    """Return the name of the module of `formats` that reads a checkpoint.

    What no format knows is left to hdf5, which says what it found instead.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return "hdf5"
    try:
        status = os.fstat(descriptor)
        return _file(descriptor, status.st_size) if stat.S_ISREG(status.st_mode) else "hdf5"
    finally:
        os.close(descriptor)


def _file(descriptor: int, size: int) -> str:
    head = os.pread(descriptor, 16, 0)
    if head.startswith(b"PK\x03\x04"):
        return _archive(descriptor, size)
    # The length of a header and its first brace; or an index, of which the map may come first.
    if re.match(rb".{5}\0{3}\{", head, re.DOTALL):
        return "safetensors"
    if head.startswith(b"{"):
        ends = os.pread(descriptor, _ENDS, 0) + os.pread(descriptor, _ENDS, max(0, size - _ENDS))
        if b'"weight_map"' in ends and b'.safetensors"' in ends:
            return "safetensors"
    return "hdf5"


def _archive(descriptor: int, size: int) -> str:
    """Tell the formats that are zip archives by their members' names."""
    names = _names(os.pread(descriptor, _TAIL, max(0, size - _TAIL)))
    if any(name.endswith(b".npy") for name in names):
        return "npz"
    return "hdf5"


def _names(tail: bytes) -> set[bytes]:
    """Return what look like members' names in the end of an archive."""
    names = set()
    place = tail.find(_LISTED)
    while 0 <= place <= len(tail) - 46:
        (length,) = struct.unpack_from("<H", tail, place + 28)
        names.add(tail[place + 46 : place + 46 + length])
        place = tail.find(_LISTED, place + 46)
    return names
