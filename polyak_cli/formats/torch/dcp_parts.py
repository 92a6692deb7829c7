"""The small archives in a part of a distributed checkpoint: each is one block of a tensor.

`torch.save` wrote each of them, one behind the other into one file, so that `zipfile` cannot open
the file.  There may be a hundred thousand, so that only the few bytes are read that say where the
values lie.  What PyTorch could read differently is refused.  Knows nothing of `.metadata`.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Mapping
from typing import NamedTuple

from polyak_cli.errors import FormatError, shown
from polyak_cli.formats.torch import pickles
from polyak_cli.formats.torch.pickles import SIZES, Tensor
from polyak_cli.processes.sandbox import Heartbeat
from polyak_cli.storage import InputFile

# APPNOTE 4.3.7, 4.3.12, 4.3.14, 4.3.15 and 4.3.16: a member's header, its entry in the directory,
# and what stands behind the directory.
_LOCAL = struct.Struct("<4s5H3L2H")
_LISTED = struct.Struct("<4s6H3L5H2L")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_END = struct.Struct("<4s4H2LH")
_SATURATED = 0xFFFFFFFF  # stands for a number that a 64-bit field holds
_LATER = 0x8  # the checksum stands behind the member
#: The length of a header of safetensors, and its first brace.
_SAFETENSORS = re.compile(rb".{5}\0{3}\{", re.DOTALL)
#: Members of an archive, bytes of its directory and of its pickle, at most.
_MEMBERS, _DIRECTORY, _PICKLE = 64, 1 << 16, 1 << 16
#: Pickles that are kept: those of blocks of one shape are equal.
_KEPT = 4096


class Piece(NamedTuple):
    """The values of a block."""

    tensor: Tensor  # how the block lies in its storage
    byteorder: str
    offset: int  # of the storage in the part
    nbytes: int
    crc: int  # as the archive says; 0 where it was written without checksums
    #: Where the checksum of the storage stands in the part.
    crc_places: tuple[int, int]


class _Member(NamedTuple):
    """A member of an archive, as its directory has it."""

    name: bytes  # with its folder
    header: int  # offset of its own header in the part
    nbytes: int
    crc: int
    flags: int
    listed: int  # offset of its entry in the directory


class PieceReader:
    """Reads the blocks of one part after the other."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        self.heartbeat = heartbeat
        self.known: dict[bytes, Tensor] = {}

    def read(self, file: InputFile, offset: int, nbytes: int) -> Piece:
        """Find the values of a block.

        Args:
            file: the part.
            offset: where the block's archive begins in it.
            nbytes: of the archive.

        Raises:
            FormatError: it is no archive of a tensor, or is damaged; the message lacks the file.
        """
        self.heartbeat()
        members = _read_directory(file, offset, nbytes)
        tensor = self._read_tensor(file, members)
        found = members.get(f"data/{tensor.storage.key}")
        if found is None:
            raise FormatError(f"lacks the storage '{shown(tensor.storage.key)}' in its archive")
        expected = tensor.storage.size * SIZES[tensor.storage.dtype]
        if found.nbytes != expected:
            raise FormatError(f"lies in a storage of {found.nbytes} bytes; expected {expected}")
        start = _find_content(file, found, offset + nbytes)
        return Piece(
            tensor,
            _read_byteorder(file, members),
            start,
            found.nbytes,
            found.crc,
            (_find_checksum(file, found, start), found.listed + 16),
        )

    def _read_tensor(self, file: InputFile, members: Mapping[str, _Member]) -> Tensor:
        """Return the tensor that an archive is, whose values are not looked at."""
        if "data.pkl" not in members:
            raise FormatError("was not written by torch.save: its archive has no data.pkl")
        content = _read_small(file, members["data.pkl"], "data.pkl")
        tensor = self.known.get(content)
        if tensor is None:
            found = pickles.read(content, self.heartbeat)
            if not isinstance(found, Tensor):
                raise FormatError("is not a plain tensor in its archive")
            if len(self.known) >= _KEPT:
                self.known.clear()
            tensor = self.known[content] = found
        return tensor


def _refuse(what: str) -> FormatError:
    return FormatError(f"has a truncated, damaged or hostile archive: {what}")


def _read_directory(file: InputFile, offset: int, nbytes: int) -> dict[str, _Member]:
    """Return the members of an archive, without the folder that all of them are in."""
    end = offset + nbytes
    if end > file.size or nbytes < _END.size:
        raise FormatError(
            f"lies in bytes {offset} to {end} of a file of {file.size}: it is truncated, or "
            "metadata and parts come from different saves"
        )
    if _SAFETENSORS.match(file.read(0, 9)):
        raise FormatError(
            "was saved with SerializationFormat.SAFETENSORS, which says nowhere what lies where; "
            "save with HuggingFaceStorageWriter, or without that option"
        )
    start, stop, count = _find_directory(file, offset, end)
    # Not a byte more: what stands before may be values.
    directory = file.read(start, stop - start)
    folders, members, place = set(), {}, 0
    for _ in range(count):
        member, after = _parse_entry(directory, place, start, offset)
        folder, _, rest = member.name.decode(errors="replace").partition("/")
        folders.add(folder)
        if rest in members:
            raise _refuse(f"the member '{shown(rest)}' occurs twice")
        members[rest], place = member, after
    if place != len(directory):
        raise _refuse("its directory has another size than its entries")
    if len(folders) != 1:
        raise _refuse(f"it has {len(folders)} folders; torch.save writes one")
    return members


def _find_directory(file: InputFile, offset: int, end: int) -> tuple[int, int, int]:
    """Return where the directory begins and ends in the part, and how many entries it has.

    Args:
        file: the part.
        offset: where the archive begins.
        end: where it ends.
    """
    longest = _END64.size + _LOCATOR.size + _END.size
    first = max(offset, end - longest)
    tail = file.read(first, end - first)
    mark, *_, count, size, place, comment = _END.unpack(tail[-_END.size :])
    stop = end - _END.size
    if mark != b"PK\x05\x06" or comment:
        raise FormatError(
            "is not in an archive of torch.save where the metadata say: metadata and parts come "
            "from different saves, or a part is truncated or damaged"
        )
    locator = tail[-_END.size - _LOCATOR.size : -_END.size]
    if locator.startswith(b"PK\x06\x07"):
        stop = first
        _, _, beginning, _ = _LOCATOR.unpack(locator)
        if len(tail) < longest or beginning != stop - offset:
            raise _refuse("its end is not where it says")
        numbers = count, size, place
        mark, *_, count, size, place = _END64.unpack_from(tail)
        alike = zip(numbers, (count, size, place), strict=True)
        if mark != b"PK\x06\x06" or not all(a in (b, _SATURATED, 0xFFFF) for a, b in alike):
            raise _refuse("its two ends differ")
    if count > _MEMBERS or size > _DIRECTORY:
        raise _refuse(f"it has {count} members and a directory of {size} bytes")
    if offset + place + size != stop:
        raise _refuse("its directory does not lie before its end")
    return stop - size, stop, count


def _parse_entry(directory: bytes, place: int, start: int, offset: int) -> tuple[_Member, int]:
    """Return a member, and where the next entry begins in the directory.

    Args:
        directory: all entries.
        place: where the entry begins in it.
        start: where the directory begins in the part.
        offset: where the archive does.
    """
    if place + _LISTED.size > len(directory):
        raise _refuse("its directory ends early")
    entry = _LISTED.unpack_from(directory, place)
    mark, _, _, flags, method, _, _, crc, stored, nbytes, name, extra, comment, *_, header = entry
    at = place + _LISTED.size
    after = at + name + extra + comment
    if mark != b"PK\x01\x02" or after > len(directory):
        raise _refuse("its directory ends early")
    field = directory[at + name : at + name + extra]
    nbytes, stored, header = _widen(field, (nbytes, stored, header))
    if method or stored != nbytes or flags & 1:
        raise FormatError("is compressed or encrypted in its archive, which torch.save does not do")
    whole = directory[at : at + name]
    return _Member(whole, offset + header, nbytes, crc, flags, start + place), after


def _widen(extra: bytes, numbers: tuple[int, ...]) -> tuple[int, ...]:
    """Return numbers with those that stand in a 64-bit field (APPNOTE 4.5.3)."""
    if _SATURATED not in numbers:
        return numbers
    place = 0
    while place + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, place)
        if kind == 1:
            field = extra[place + 4 : place + 4 + size]
            wide = iter(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
            return tuple(next(wide, n) if n == _SATURATED else n for n in numbers)
        place += 4 + size
    return numbers


def _find_content(file: InputFile, member: _Member, end: int) -> int:
    """Return where a member's bytes begin in the part, which its own header says."""
    name = shown(member.name.decode(errors="replace"))
    # What follows the header may be values; they are not read.
    length = _LOCAL.size + len(member.name)
    head = file.read(member.header, length) if member.header < end else b""
    if len(head) < length:
        raise _refuse(f"the member '{name}' lies outside it")
    mark, *_, length, extra = _LOCAL.unpack_from(head)
    if mark != b"PK\x03\x04" or length != len(member.name) or not head.endswith(member.name):
        raise _refuse(f"the member '{name}' has another name in its own header")
    start = member.header + len(head) + int(extra)
    if start + member.nbytes > end:
        raise _refuse(f"the member '{name}' lies outside it")
    return start


def _find_checksum(file: InputFile, member: _Member, start: int) -> int:
    """Return where the checksum of a member stands besides the directory."""
    if not member.flags & _LATER:
        return member.header + 14
    place = start + member.nbytes
    # The signature before it may be missing (APPNOTE 4.3.9.3).
    return place + 4 if file.read(place, 4) == b"PK\x07\x08" else place


def _read_small(file: InputFile, member: _Member, name: str) -> bytes:
    """Return the content of a small member, checked where there is a checksum."""
    if member.nbytes > _PICKLE:
        raise _refuse(f"the member '{name}' has {member.nbytes} bytes")
    start = _find_content(file, member, file.size)
    content = file.read(start, member.nbytes)
    if member.crc and zlib.crc32(content) != member.crc:
        raise _refuse(f"the checksum of the member '{name}' is wrong")
    return content


def _read_byteorder(file: InputFile, members: Mapping[str, _Member]) -> str:
    """Return the byte order of an archive; one without the member is little-endian."""
    if "byteorder" not in members:
        return "<"
    text = _read_small(file, members["byteorder"], "byteorder")
    if text not in (b"little", b"big"):
        raise _refuse(f"it has the byte order {shown(text[:20])}")
    return "<" if text == b"little" else ">"
