"""OCDBT, the database of keys and values in which TensorStore keeps arrays: read, never written.

A manifest names the newest root of a tree of sorted keys; see the format's description in
TensorStore's documentation of the driver "ocdbt".  A value stands in its node, or is a range of
bytes of a data file.  Nothing that is read is believed: every node is checked by its checksum, and
names, ranges, keys and counts are checked here.  Knows no array.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from polyak_cli.errors import FormatError, shown, word_size
from polyak_cli.formats import checksums
from polyak_cli.formats.orbax import contents
from polyak_cli.formats.tensorflow.sstables import read_varint
from polyak_cli.formats.zips import WHOLE
from polyak_cli.processes.sandbox import Heartbeat
from polyak_cli.storage import InputFile, open_input
from polyak_cli.storage.local import name_errors

MANIFEST = "manifest.ocdbt"
MANIFEST_MAGIC, NODE_MAGIC = 0x0CDB3A2A, 0x0CDB20DE
_HEAD = struct.Struct(">L")  # the magic; the length follows, little-endian
_LENGTH = struct.Struct("<Q")
_CRC = struct.Struct("<L")
_PLAIN, _ZSTD = 0, 1
_SINGLE, _NUMBERED = 0, 1
_NUMBERS = re.compile(r"manifest\.[0-9a-f]{16}")
#: What reading a block costs besides its bytes: a tree of tiny nodes must end too.
_COST = 4096
#: Offset and length of the root of an empty tree.
_ABSENT = (1 << 64) - 1
#: Bytes of a path that the format allows.
_LONGEST_PATH = 65535


class Value(NamedTuple):
    """A value of the database: its bytes, or where they lie."""

    content: bytes | None
    file: str = ""  # relative to the folder of the manifest
    offset: int = 0
    nbytes: int = 0


class _Place(NamedTuple):
    """Where a node of the tree lies, and what its place in the tree says of it."""

    base: str  # the part of its file's path that its children's paths begin with
    file: str
    offset: int
    nbytes: int
    height: int
    prefix: bytes  # with which all of its keys begin


class _Cursor:
    """Reads the fields of a decoded node one after the other."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.place = 0

    def number(self) -> int:
        """Return a number of seven bits a byte."""
        value, self.place = read_varint(self.data, self.place)
        return value

    def numbers(self, count: int) -> list[int]:
        """Return several numbers, each of which takes a byte at least."""
        if count > len(self.data) - self.place:
            raise FormatError(f"counts {count} entries in {len(self.data)} bytes")
        return [self.number() for _ in range(count)]

    def take(self, nbytes: int) -> bytes:
        """Return bytes as they are."""
        if nbytes > len(self.data) - self.place:
            raise FormatError("is cut off")
        self.place += nbytes
        return self.data[self.place - nbytes : self.place]

    def byte(self) -> int:
        """Return a number of one byte."""
        return self.take(1)[0]

    def texts(self, prefixes: Sequence[int], suffixes: Sequence[int]) -> Iterator[bytes]:
        """Yield texts of which each shares a prefix with the one before it."""
        text = b""
        for prefix, suffix in zip(prefixes, suffixes, strict=True):
            if prefix > len(text):
                raise FormatError("has a name that is longer in part than as a whole")
            text = text[:prefix] + self.take(suffix)
            yield text

    def finish(self) -> None:
        """Refuse bytes that belong to nothing."""
        if self.place != len(self.data):
            raise FormatError(f"has {len(self.data) - self.place} bytes that belong to nothing")


class _Reader:
    """Reads one database, within a budget of bytes for all that it decodes."""

    def __init__(self, folder: Path, heartbeat: Heartbeat) -> None:
        self.folder = folder
        self.heartbeat = heartbeat
        self.left = WHOLE
        self.last = b""  # the key that was read last
        self.files: dict[str, None] = {}  # those that were opened, in their order

    def spend(self, nbytes: int) -> None:
        """Count decoded bytes, and for a block those that it costs to read it.

        A node may be named by several parents, each time read again.
        """
        self.left -= nbytes
        if self.left < 0:
            raise FormatError(f"its tree of keys has more than {word_size(WHOLE)}")

    def read_block(self, file: InputFile, offset: int, size: int, magic: int) -> bytes:
        """Return the decoded body of a node or of the manifest, which begins with a magic number.

        Raises:
            FormatError: it is damaged; the message lacks the file.
        """
        if size > WHOLE or offset + size > file.size:
            raise FormatError(
                f"has {file.size} bytes, and a block of {size} at offset {offset}; it is "
                "truncated or damaged"
            )
        data = file.read(offset, size)
        cursor = _Cursor(data[: -_CRC.size])
        found = _HEAD.unpack(cursor.take(_HEAD.size))[0]
        length = _LENGTH.unpack(cursor.take(_LENGTH.size))[0]
        if found != magic or length != size:
            raise FormatError(f"no block of {size} bytes begins at offset {offset}; it is damaged")
        if _CRC.unpack(data[-_CRC.size :])[0] != checksums.crc32c(data[: -_CRC.size]):
            raise FormatError(f"the block at offset {offset} has a wrong checksum: it is damaged")
        version, compression = cursor.number(), cursor.number()
        if version != 0 or compression not in (_PLAIN, _ZSTD):
            raise FormatError(
                f"has version {version} and compression {compression}; expected version 0 and "
                "none or zstd"
            )
        body = cursor.data[cursor.place :]
        if compression == _ZSTD:
            body = contents.decompress(body, self.left)
        self.spend(_COST + len(body))
        return body

    def read_files(self, cursor: _Cursor, base: str) -> list[tuple[str, str]]:
        """Return the data files that a block names: each with what children's paths begin with."""
        count = cursor.number()
        prefixes = [0, *cursor.numbers(max(0, count - 1))] if count else []
        suffixes = cursor.numbers(count)
        bases = cursor.numbers(count)
        files = []
        for path, length in zip(cursor.texts(prefixes, suffixes), bases, strict=True):
            if length > len(path) or len(base) + len(path) > _LONGEST_PATH:
                raise FormatError("names a data file by a path that is too long")
            self.spend(len(path))
            name = base + path.decode("utf-8", "surrogateescape")
            # Anything else could lead to any file of the machine.  None is that of an empty tree.
            if (name and not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name)) or ".." in name.split("/"):
                raise FormatError(f"names the data file {shown(name, 60)}; expected one beside it")
            files.append((name[: len(base) + length], name))
        return files

    def read_root(self) -> _Place | None:
        """Return where the newest root lies; None if the database is empty."""
        identity, cursor = self.read_manifest(MANIFEST)
        if cursor.number() == _NUMBERED:
            # This one only has settings; each version has a manifest with its number in the name.
            found = [path.name for path in self.folder.glob("manifest.*")]
            name = max((name for name in found if _NUMBERS.fullmatch(name)), default="")
            if not name:
                return None
            other, cursor = self.read_manifest(name)
            kind = cursor.number()
            if other != identity or kind != _SINGLE:
                raise FormatError(
                    f"{shown(self.folder / name)}: is no version of the database beside it; the "
                    "files come from different saves"
                )
        with name_errors(str(self.folder / [*self.files][-1])):
            return self.read_versions(cursor)

    def read_manifest(self, name: str) -> tuple[bytes, _Cursor]:
        """Return the identity of the database that a manifest has, and what follows it."""
        self.files[name] = None
        path = str(self.folder / name)
        with open_input(path) as file, name_errors(path):
            cursor = _Cursor(self.read_block(file, 0, file.size, MANIFEST_MAGIC))
            return cursor.take(16), cursor

    def read_versions(self, cursor: _Cursor) -> _Place | None:
        """Return where the newest root lies by the part of a manifest that follows its kind."""
        cursor.numbers(2)  # limits for writing
        cursor.byte()  # how versions are grouped
        if cursor.number() == _ZSTD:
            cursor.take(4)  # the level of compression
        files = self.read_files(cursor, "")
        count = cursor.number()
        cursor.numbers(count)  # generations, the newest last
        heights = cursor.take(count)
        numbers, offsets, lengths = (cursor.numbers(count) for _ in range(3))
        if not count or offsets[-1] == lengths[-1] == _ABSENT:
            return None
        base, name = _choose(files, numbers[-1])
        return _Place(base, name, offsets[-1], lengths[-1], heights[-1], b"")

    def read_node(self, place: _Place) -> Iterator[tuple[bytes, Value]]:
        """Yield the keys and values under a node, sorted."""
        path = str(self.folder / place.file)
        self.files[place.file] = None
        with open_input(path) as file, name_errors(path):
            cursor = _Cursor(self.read_block(file, place.offset, place.nbytes, NODE_MAGIC))
            height = cursor.byte()
            if height != place.height:
                raise FormatError(f"a node has height {height}; expected {place.height}")
            files = self.read_files(cursor, place.base)
            count = cursor.number()
            prefixes = [0, *cursor.numbers(count - 1)] if count else []
            suffixes = cursor.numbers(count)
            read = self._read_children if height else self._read_values
            entries = read(cursor, place.prefix, files, prefixes, suffixes)
        for key, found in self.heartbeat.over(entries):
            if isinstance(found, _Place):
                yield from self.read_node(found._replace(height=height - 1))
                continue
            if key <= self.last:
                raise FormatError(
                    f"{shown(path)}: the key {shown(key, 60)} is out of order; it is damaged"
                )
            self.last = key
            yield key, found

    def _read_children(
        self,
        cursor: _Cursor,
        prefix: bytes,
        files: Sequence[tuple[str, str]],
        prefixes: Sequence[int],
        suffixes: Sequence[int],
    ) -> list[tuple[bytes, _Place | Value]]:
        """Return where the children of a node lie."""
        commons = cursor.numbers(len(suffixes))
        keys = [*self._build_keys(cursor, b"", prefixes, suffixes)]
        numbers, offsets, lengths = (cursor.numbers(len(keys)) for _ in range(3))
        for _ in range(3):
            cursor.numbers(len(keys))  # sums over the tree below
        cursor.finish()
        children: list[tuple[bytes, _Place | Value]] = []
        for key, common, number, offset, nbytes in zip(
            keys, commons, numbers, offsets, lengths, strict=True
        ):
            base, name = _choose(files, number)
            if common > len(key):
                raise FormatError("has a name that is longer in part than as a whole")
            children.append((key, _Place(base, name, offset, nbytes, 0, prefix + key[:common])))
        return children

    def _read_values(
        self,
        cursor: _Cursor,
        prefix: bytes,
        files: Sequence[tuple[str, str]],
        prefixes: Sequence[int],
        suffixes: Sequence[int],
    ) -> list[tuple[bytes, _Place | Value]]:
        """Return the values of a node."""
        keys = [*self._build_keys(cursor, prefix, prefixes, suffixes)]
        lengths, kinds = cursor.numbers(len(keys)), cursor.numbers(len(keys))
        if any(kind not in (0, 1) for kind in kinds):
            raise FormatError("has a value of an unknown kind; it is damaged")
        numbers, offsets = iter(cursor.numbers(sum(kinds))), iter(cursor.numbers(sum(kinds)))
        values: list[tuple[bytes, _Place | Value]] = []
        for key, nbytes, kind in zip(keys, lengths, kinds, strict=True):
            if kind:
                name = _choose(files, next(numbers))[1]
                values.append((key, Value(None, name, next(offsets), nbytes)))
            else:
                values.append((key, Value(cursor.take(nbytes))))
        cursor.finish()
        return values

    def _build_keys(
        self, cursor: _Cursor, prefix: bytes, prefixes: Sequence[int], suffixes: Sequence[int]
    ) -> Iterator[bytes]:
        """Yield whole keys; a few bytes can stand for a long one, again and again."""
        for key in cursor.texts(prefixes, suffixes):
            self.spend(len(prefix) + len(key))
            yield prefix + key


def _choose(files: Sequence[tuple[str, str]], number: int) -> tuple[str, str]:
    """Return the data file of a number."""
    if number >= len(files):
        raise FormatError(f"names data file {number} of {len(files)}")
    if not files[number][1]:
        raise FormatError("names no data file for something that is in one")
    return files[number]


def read(folder: Path, heartbeat: Heartbeat) -> tuple[dict[str, Value], list[str]]:
    """Return the keys of the newest version of a database with their values, and its files.

    Args:
        folder: that of the manifest.
        heartbeat: called every few keys.

    Returns:
        The values by their keys, and the names of the files that keys were read from.

    Raises:
        FormatError: it is damaged, hostile or of a later version; names the file.
    """
    reader = _Reader(folder, heartbeat)
    root = reader.read_root()
    entries = reader.read_node(root) if root and root.nbytes else ()
    found = {key.decode("utf-8", "surrogateescape"): value for key, value in entries}
    return found, list(reader.files)
