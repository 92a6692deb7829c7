"""Read and write zip archives: members at checked offsets, and space reserved for new ones.

Python's own `zipfile` reads and writes the list of members.  What it cannot do is here: refuse what
means harm, say where a member's bytes lie, and reserve space for bytes that are written later by
offset.  Knows nothing of what the members hold.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import re
import stat
import struct
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from polyak_cli.errors import FormatError, shown, word_size
from polyak_cli.processes.sandbox import Heartbeat
from polyak_cli.storage import Bytes, InputFile, open_input
from polyak_cli.storage.local import (
    LocalOutput,
    copy_range,
    make_read_error,
    name_errors,
)
from polyak_cli.tensors import Checksum, Extent, Files

STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
#: Bytes of a member that may be read into memory: lists, configurations, pickles.
WHOLE = 64 << 20
#: Deflate cannot do better than 1032 to 1; what claims so, or is large and near it, is a bomb.
RATIO, LARGE = 1032, 256 << 20
_LOCAL = struct.Struct("<4s5H3L2H")
_STEP = 1 << 20
_ENCRYPTED, _LATER, _UTF8 = 0x1, 0x8, 0x800
_ZIP64 = 0xFFFFFFFF  # stands for a size that an extra field holds (APPNOTE 4.5.3)


class Member(NamedTuple):
    """One file of an archive."""

    name: str
    offset: int  # of its bytes in the archive
    stored: int  # bytes there
    nbytes: int  # bytes of its content
    method: int  # STORED or DEFLATED
    crc: int


# --- reading --------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_archive(path: str) -> Iterator[tuple[InputFile, list[Member], bytes]]:
    """Yield an archive, open, with its members in the order of their bytes, and its comment.

    Raises:
        FormatError: the archive is damaged or means harm; names file and member.
    """
    with open_input(path) as file, name_errors(path):
        members, comment = _list_members(file)
        yield file, members, comment


def _list_members(file: InputFile) -> tuple[list[Member], bytes]:
    try:
        with file.stream() as stream, zipfile.ZipFile(stream) as archive:
            infos, comment = archive.infolist(), archive.comment
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # not a place that is none
            raise make_read_error(error) from None
        raise FormatError(
            f"is truncated or not a zip archive ({shown(error)}); save it again"
        ) from None
    ((often, times),) = Counter(info.filename for info in infos).most_common(1) or [("", 1)]
    if times > 1:
        raise FormatError(f"the member '{shown(often)}' occurs twice")
    members = [_check_member(file, info) for info in infos if info.filename[-1:] != "/"]
    members.sort(key=lambda member: member.offset)
    for one, other in itertools.pairwise(members):
        if one.offset + one.stored > other.offset:
            raise FormatError(f"the members '{shown(one.name)}' and '{shown(other.name)}' overlap")
    return members, comment


def _check_member(file: InputFile, info: zipfile.ZipInfo) -> Member:
    """Return a member, having refused what must not be read."""
    name = f"the member '{shown(info.filename)}'"
    # zipfile cuts a name at a NUL, under which another name might hide.
    if info.filename != info.orig_filename:
        raise FormatError(f"{name} has a name that programs interpret differently")
    if re.search(r"^$|(^|[/\\])\.\.([/\\]|$)|^[/\\]|^[A-Za-z]:", info.filename):
        raise FormatError(f"{name} has a path that leads nowhere or out of the archive")
    if info.flag_bits & _ENCRYPTED:
        raise FormatError(f"{name} is encrypted")
    if info.create_system == 3 and stat.S_ISLNK(info.external_attr >> 16):
        raise FormatError(f"{name} is a symbolic link")
    if info.compress_type not in (STORED, DEFLATED):
        raise FormatError(f"{name} is compressed by method {info.compress_type}; expected deflate")
    if info.compress_type == STORED and info.compress_size != info.file_size:
        raise FormatError(f"{name} is stored, but its two sizes differ")
    ratio = info.file_size / max(1, info.compress_size)
    if ratio > RATIO or (info.file_size > LARGE and ratio > RATIO / 4):
        raise FormatError(
            f"{name} claims {info.file_size} bytes in {info.compress_size}: a decompression bomb"
        )
    header = _read_part(file, info.header_offset, _LOCAL.size, name)
    signature, _, flags, method, _, _, *sizes, name_length, extra_length = _LOCAL.unpack(header)
    written = _read_part(file, info.header_offset + _LOCAL.size, name_length, name)
    encoding = "utf-8" if info.flag_bits & _UTF8 else "cp437"
    if signature != b"PK\x03\x04" or written != info.orig_filename.encode(encoding, "replace"):
        raise FormatError(
            f"{name} has another name in its own header than in the archive's directory"
        )
    # Who reads an archive from its beginning goes by what stands here, if it does not come later.
    listed = (info.CRC, info.compress_size, info.file_size)
    if method != info.compress_type or not (
        flags & _LATER or all(a in (b, _ZIP64) for a, b in zip(sizes, listed, strict=True))
    ):
        raise FormatError(
            f"{name} has another size, checksum or method in its own header than in the archive's "
            "directory"
        )
    offset = info.header_offset + _LOCAL.size + name_length + extra_length
    if offset + info.compress_size > file.size:
        raise FormatError(f"{name} lies outside the file; it is truncated or damaged")
    return Member(
        info.filename, offset, info.compress_size, info.file_size, info.compress_type, info.CRC
    )


def _read_part(file: InputFile, offset: int, nbytes: int, name: str) -> bytes:
    # The list may place a member anywhere, also where no file can be read.
    data = file.read(offset, nbytes) if 0 <= offset < 1 << 62 else b""
    if len(data) < nbytes:
        raise FormatError(f"{name} lies outside the file; it is truncated or damaged")
    return data


def read_whole(file: InputFile, member: Member) -> bytes:
    """Return a member's content, checked.

    Raises:
        FormatError: it is damaged, or too large to be held in memory.
    """
    if member.nbytes > WHOLE:
        raise FormatError(
            f"the member '{shown(member.name)}' has {word_size(member.nbytes)}; expected at most "
            f"{word_size(WHOLE)}"
        )
    return b"".join(read_pieces(file, member))


def read_head(file: InputFile, member: Member, nbytes: int) -> bytes:
    """Return the first bytes of a member's content, which are not checked, or all where it is less.

    Raises:
        FormatError: it is damaged.
    """
    nbytes = min(nbytes, member.nbytes)
    if member.method == STORED:
        return file.read(member.offset, nbytes)
    return _Stream(file, member.offset, member.stored).take(nbytes)


def read_pieces(file: InputFile, member: Member) -> Iterator[bytes]:
    """Yield a member's content; its length and checksum are checked at the end.

    Raises:
        FormatError: it is damaged.
    """
    crc = done = 0
    for piece in (
        _inflate(file, member) if member.method == DEFLATED else _read_stored(file, member)
    ):
        crc, done = zlib.crc32(piece, crc), done + len(piece)
        yield piece
    if (crc, done) != (member.crc, member.nbytes):
        raise FormatError(_word_damage(member))


def _read_stored(file: InputFile, member: Member) -> Iterator[bytes]:
    for done in range(0, member.stored, _STEP):
        yield file.read(member.offset + done, min(_STEP, member.stored - done))


def _inflate(file: InputFile, member: Member) -> Iterator[bytes]:
    stream = _Stream(file, member.offset, member.stored)
    while stream.position < member.nbytes:
        yield stream.take(min(_STEP, member.nbytes - stream.position))


def check(path: str, heartbeat: Heartbeat, later: int | None = None) -> list[Checksum]:
    """Check the checksums of all members; see `Format.check`.

    Raises:
        FormatError: one is wrong; names file and member.
    """
    with open_archive(path) as (file, members, _):
        return check_members(path, file, members, heartbeat, later)


def check_members(
    path: str,
    file: InputFile,
    members: Iterable[Member],
    heartbeat: Heartbeat,
    later: int | None = None,
) -> list[Checksum]:
    """Check the checksums of some members of an open archive; see `check`."""
    left = []
    for member in members:
        # The checksum of a deflated member is that of what comes of it, in its order.
        if later is not None and member.method == STORED and member.nbytes >= later:
            place = member.offset, member.nbytes
            left.append(Checksum(path, *place, member.crc, "crc32", _word_damage(member)))
            continue
        for _piece in heartbeat.over(read_pieces(file, member)):
            pass  # reading all of a member compares its checksum
    return left


def _word_damage(member: Member) -> str:
    return f"the checksum of the member '{shown(member.name)}' is wrong: the data are damaged"


class _Stream:
    """A deflated member that is read from its beginning."""

    def __init__(self, file: InputFile, offset: int, stored: int) -> None:
        self.file = file
        self.offset = offset
        self.left = stored
        self.position = 0
        self.decompressor = zlib.decompressobj(-zlib.MAX_WBITS)

    def take(self, nbytes: int) -> bytes:
        """Return the next bytes of the content.

        Raises:
            FormatError: there are not so many.
        """
        taken = []
        wanted = nbytes
        try:
            while wanted:
                data = self.decompressor.unconsumed_tail or self._read_more()
                piece = self.decompressor.decompress(data, wanted)
                if not piece and not data:
                    raise FormatError("a deflated member ends too early")
                taken.append(piece)
                wanted -= len(piece)
        except zlib.error as error:
            raise FormatError(f"a deflated member is damaged ({error})") from None
        self.position += nbytes
        return b"".join(taken)

    def _read_more(self) -> bytes:
        if self.decompressor.eof:
            return b""
        data = self.file.read(self.offset, min(_STEP >> 4, self.left))
        self.offset, self.left = self.offset + len(data), self.left - len(data)
        return data


@dataclass(frozen=True, slots=True)
class Deflated:
    """A tensor inside a deflated member: read forwards only, so best in the order of the file."""

    offset: int  # of the member's bytes in the file
    stored: int  # bytes there
    start: int  # of the tensor in the member's content
    nbytes: int
    file: int = 0  # which of the checkpoint's files

    def fields(self) -> list[int]:
        """Return what it was made of, as JSON can hold it."""
        return [self.offset, self.stored, self.start, self.nbytes, self.file]

    def describe(self) -> str:
        """See `tensors.Storage.describe`."""
        return "slow reader: in a deflated zip member"

    @property
    def preferred_nbytes(self) -> int:
        """Any piece is as good as any other: what lies between is inflated all the same."""
        return 1

    @property
    def block_nbytes(self) -> int:
        """See `tensors.Storage.block_nbytes`."""
        return 1

    def byte_ranges(self, start: int, stop: int) -> Iterable[Extent]:
        """See `tensors.Storage.byte_ranges`; only inflating shows where the bytes lie."""
        del start, stop
        return ()

    def read_into(self, files: Files, start: int, buffer: Bytes) -> None:
        """See `tensors.Storage.read_into`."""
        wanted = self.start + start
        file = files[self.file]
        key = (*file.version, self.offset)
        streams = _reached.streams
        stream = streams.pop(key, None)
        if stream is None or stream.position > wanted:
            stream = _Stream(file, self.offset, self.stored)
        stream.file = file  # it may have been closed and opened again since
        while stream.position < wanted:
            stream.take(min(_STEP, wanted - stream.position))
        buffer[:] = np.frombuffer(stream.take(len(buffer)), np.uint8)
        streams[key] = stream
        while len(streams) > _KEPT:
            del streams[next(iter(streams))]


class _Reached(threading.local):
    """Where reading stopped in deflated members, by file and offset, the last used at the end.

    Threads read different parts of a member: each has its own place, because there is no way back.
    """

    def __init__(self) -> None:
        self.streams: dict[tuple[object, ...], _Stream] = {}


_reached = _Reached()
_KEPT = 256  # some 100 KB each


# --- writing --------------------------------------------------------------------------------------


class Archive:
    """A new archive whose large members are written later, by offset.

    The list of members at its end needs their checksums, and is written by `finalize_archive`.
    """

    def __init__(self, path: str, comment: bytes = b"") -> None:
        self.file = LocalOutput(path)
        self.comment = comment
        self.end = 0
        self.listed: list[list[Any]] = []

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.truncate(self.end)
        self.file.close()

    def reserve(self, name: str, nbytes: int, alignment: int = 1) -> int:
        """Leave space for a stored member and return the offset of its bytes."""
        return self._write_header_aligned(name, nbytes, nbytes, STORED, None, alignment)

    def find_start(self, name: str, alignment: int) -> int:
        """Return where a stored member may begin; `list_written` is given its size later."""
        longest = _describe_member(
            name, self.end, 1 << 32, 1 << 32, STORED, None, padding=0
        ).FileHeader()
        return -(-(self.end + len(longest)) // alignment) * alignment

    def list_written(self, name: str, offset: int, nbytes: int) -> None:
        """List the member that was written at the offset that `find_start` gave."""
        bare = _describe_member(
            name, self.end, nbytes, nbytes, STORED, None, padding=0
        ).FileHeader()
        self._write_header(name, nbytes, nbytes, STORED, None, offset - self.end - len(bare))

    def add(self, name: str, content: bytes) -> None:
        """Write a small stored member."""
        offset = self._write_header_aligned(
            name, len(content), len(content), STORED, zlib.crc32(content), 1
        )
        self.file.write(offset, content)

    def copy(
        self, source: InputFile, member: Member, heartbeat: Heartbeat, alignment: int = 1
    ) -> None:
        """Copy a member of another archive as it is stored there."""
        _, offset, stored, nbytes, method, crc = member
        target = self._write_header_aligned(member.name, stored, nbytes, method, crc, alignment)
        copy_range(source, offset, self.file, target, stored, heartbeat)

    def write(self, offset: int, content: bytes) -> None:
        """Write into space that `reserve` left."""
        self.file.write(offset, content)

    def _write_header_aligned(
        self, name: str, stored: int, nbytes: int, method: int, crc: int | None, alignment: int
    ) -> int:
        """Write a local header, and return the offset behind it, aligned."""
        padding = None
        if alignment > 1:
            bare = _describe_member(
                name, self.end, stored, nbytes, method, crc, padding=0
            ).FileHeader()
            padding = -(self.end + len(bare)) % alignment
        return self._write_header(name, stored, nbytes, method, crc, padding)

    def _write_header(
        self, name: str, stored: int, nbytes: int, method: int, crc: int | None, padding: int | None
    ) -> int:
        """Write a local header, and return the offset behind it."""
        row = (name, self.end, stored, nbytes, method, crc)
        header = _describe_member(*row, padding=padding).FileHeader()
        self.file.write(self.end, header)
        offset = self.end + len(header)
        self.listed.append([*row, offset])
        self.end = offset + stored
        return offset

    def describe(self) -> list[Any]:
        """Return what `finalize_archive` wants to know, as JSON can hold it."""
        return [self.end, self.comment.hex(), self.listed]


def _describe_member(
    name: str,
    header_offset: int,
    stored: int,
    nbytes: int,
    method: int,
    crc: int | None,
    padding: int | None = None,
) -> zipfile.ZipInfo:
    """Describe a member to `zipfile`, with no clock in it, so that the bytes repeat."""
    info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    info.header_offset, info.compress_type, info.CRC = header_offset, method, crc or 0
    info.compress_size, info.file_size = stored, nbytes
    info.create_system, info.external_attr = 3, 0o600 << 16
    if padding is not None:  # "FB": PyTorch's own mark of a field that only moves what follows
        info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    return info


def finalize_archive(path: str, state: Sequence[Any]) -> None:
    """Compute the checksums that are missing and write the list of members."""
    end, comment, listed = state
    with LocalOutput(path) as file, file.stream() as stream:
        written = file.reader()
        stream.seek(end)
        with zipfile.ZipFile(stream, "w") as archive:  # writes where the stream stands
            for name, header, stored, nbytes, method, crc, offset in listed:
                found = crc
                if crc is None:
                    found = compute_crc32(written, offset, nbytes)
                    file.write(header + 14, struct.pack("<L", found))
                archive.filelist.append(
                    _describe_member(name, header, stored, nbytes, method, found)
                )
            archive.comment = bytes.fromhex(comment)


def compute_crc32(
    file: InputFile, offset: int, nbytes: int, after_each: Callable[[], None] = lambda: None
) -> int:
    """Return the checksum of bytes of a file as zip archives have it.

    Args:
        file: the file.
        offset: where the bytes begin.
        nbytes: how many.
        after_each: called after each piece; a heartbeat, for one.
    """
    crc = 0
    buffer = np.empty(min(_STEP, nbytes), np.uint8)
    for done in range(0, nbytes, _STEP):
        piece = buffer[: nbytes - done]
        file.read_into(offset + done, piece)
        crc = zlib.crc32(piece.data, crc)
        after_each()
    return crc
