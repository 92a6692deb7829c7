"""Which format a checkpoint has, by what it holds and never by its name.

Reads a few bytes of regular files, by offset.  Knows how files begin and end, and nothing more.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

from polyak_cli.errors import FormatError
from polyak_cli.storage import InputFile, open_input
from polyak_cli.storage.local import name_errors

#: Bytes of a zip archive's end in which its list of members is looked for.
_TAIL = 1 << 20
#: Bytes of both ends of a JSON file in which it must say what it lists.
_ENDS = 1 << 16
#: Members of a .keras archive; one from which the weights are missing is one all the same.
_KERAS_WEIGHTS = {b"model.weights.h5", b"model.weights.npz"}
_KERAS_TEXTS = {b"config.json", b"metadata.json"}
#: How a member is described in the list at the end, and where it lies: what that begins with,
#: where the length of the name is, and where the name.
_LISTED, _LOCAL = (b"PK\x01\x02", 28, 46), (b"PK\x03\x04", 26, 30)
#: How LevelDB's tables end, and how that of a TensorFlow checkpoint begins, whose first entry has
#: no key and a protocol buffer that starts with the number of shards.
_TABLE = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"
_HDF5 = b"\x89HDF\r\n\x1a\n"
_BUNDLE = re.compile(rb"\0\0[\x02-\x20]\x08[\x01-\xff]", re.DOTALL)


def detect(path: Path) -> str:
    """Return the name of the module of `formats` that reads a checkpoint.

    What no format knows is left to hdf5, which says what it found instead.

    Raises:
        FormatError: the file cannot be read.
    """
    try:
        with open_input(path) as file, name_errors(str(path)):
            return _recognise(file)
    except FormatError as error:
        if str(error).endswith(": is not a regular file"):
            return "hdf5"
        raise


def _recognise(file: InputFile) -> str:
    """Return the format of a file by a few bytes of it, none of them inside a tensor."""
    size = file.size
    head = file.read(0, 16)
    if head.startswith(_HDF5):
        return "hdf5"
    if head.startswith(b"PK\x03\x04"):
        return _archive(file, size)
    if head.lstrip().startswith(b"{"):  # an index of shards, of which the map may come first
        ends = file.read(0, _ENDS) + file.read(max(0, size - _ENDS), _ENDS)
        # A map may name anything at all; its own name says then what it was meant to be.
        if b'"weight_map"' in ends and (b'.h5"' in ends or file.name.endswith(".weights.json")):
            return "weights_json"
        if b'"weight_map"' in ends and b'.safetensors"' in ends:
            return "safetensors"
    # The length of a header and its first brace.
    if re.match(rb".{5}\0{3}\{", head, re.DOTALL):
        return "safetensors"
    # A pickle, or the tar archive that torch.save wrote first: not opened, which torch_zip tells.
    if re.match(rb"\x80[\x02-\x05]", head) or file.read(257, 5) == b"ustar":
        return "torch_zip"
    if _BUNDLE.match(head) or file.read(max(0, size - 8), 8) == _TABLE:
        return "tf_bundle"
    return "hdf5"


def _archive(file: InputFile, size: int) -> str:
    """Tell the formats that are zip archives by their members' names."""
    names = _names(_directory(file, size), _LISTED)
    if not names:  # the list at the end is cut off; whoever reads the format says so
        names = _names(file.read(0, _TAIL), _LOCAL)
    if names & _KERAS_WEIGHTS or names >= _KERAS_TEXTS:
        return "keras_zip"
    if any(name.endswith(b".npy") for name in names):
        return "npz"
    if any(re.search(rb"/data(\.pkl|/\d+)$", name) for name in names):
        return "torch_zip"
    return "hdf5"


def _directory(file: InputFile, size: int) -> bytes:
    """Return the list of members at the end of an archive (APPNOTE 4.3.12 and 4.3.16).

    Where the archive ends with its end record, as it does without a comment, only the list is
    read; otherwise as much of the end as the list may be in.
    """
    end = file.read(max(0, size - 22), 22)
    if end.startswith(b"PK\x05\x06"):
        nbytes, offset = struct.unpack_from("<LL", end, 12)
        if offset + nbytes <= size and nbytes <= _TAIL:
            return file.read(offset, nbytes)
    return file.read(max(0, size - _TAIL), _TAIL)


def _names(part: bytes, header: tuple[bytes, int, int]) -> set[bytes]:
    """Return what look like members' names in a part of an archive."""
    mark, length_at, name_at = header
    names = set()
    place = part.find(mark)
    while 0 <= place <= len(part) - name_at:
        (length,) = struct.unpack_from("<H", part, place + length_at)
        names.add(part[place + name_at : place + name_at + length])
        place = part.find(mark, place + name_at)
    return names
