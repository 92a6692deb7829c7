"""Recognise the format of a checkpoint by a few bytes of its content, never by its name.

No byte inside a tensor is read.  Knows how files begin and end, and nothing more.
"""

from __future__ import annotations

import re
import struct
from functools import cached_property

from polyak_cli.storage import InputFile

#: Bytes of a zip archive's end in which its list of members is searched for.
_TAIL = 1 << 20
#: Bytes of both ends of a JSON file in which it must say what it lists.
_ENDS = 1 << 16
#: How a member is described in the list at the end, and where it lies: the signature, the offset
#: of the length of the name, and the offset of the name (APPNOTE 4.3.12 and 4.3.7).
_LISTED, _LOCAL = (b"PK\x01\x02", 28, 46), (b"PK\x03\x04", 26, 30)
#: Members of a .keras archive; one without its weights is one all the same.
_KERAS_WEIGHTS = {b"model.weights.h5", b"model.weights.npz"}
_KERAS_TEXTS = {b"config.json", b"metadata.json"}
#: The length of a header of safetensors, below 2^40, and its first brace.
_LENGTH = re.compile(rb".{5}\0{3}\{", re.DOTALL)
#: Whose classes the index of a distributed checkpoint names first: PyTorch's, or Megatron's.
_DCP = (b"torch.distributed.checkpoint", b"megatron.core.dist_checkpointing")
_HDF5 = b"\x89HDF\r\n\x1a\n"
#: LevelDB's tables end like this.  That of a TensorFlow checkpoint begins with an entry that has
#: no key, whose protocol buffer starts with the number of shards.
_TABLE = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"
_BUNDLE = re.compile(rb"\0\0[\x02-\x20]\x08[\x01-\xff]", re.DOTALL)


class Opening:
    """What a file shows of its format: how it begins and ends, read when it is first asked for."""

    def __init__(self, file: InputFile) -> None:
        self.file = file

    @cached_property
    def head(self) -> bytes:
        """The first 16 bytes."""
        return self.file.read(0, 16)

    @cached_property
    def members(self) -> set[bytes]:
        """The names of the members, if it is a zip archive."""
        if not self.head.startswith(b"PK\x03\x04"):
            return set()
        names = _find_names(self._read_directory(), _LISTED)
        # If the list at the end is cut off, the format's reader reports it.
        return names or _find_names(self.file.read(0, _TAIL), _LOCAL)

    @cached_property
    def weight_map(self) -> bytes:
        """Both ends of a JSON index of shards, whose map may come first; else nothing."""
        # The length of a header of safetensors may begin with the byte of a brace.
        if not self.head.lstrip().startswith(b"{") or _LENGTH.match(self.head):
            return b""
        last = max(0, self.file.size - _ENDS)
        ends = self.file.read(0, _ENDS) + self.file.read(last, _ENDS)
        return ends if b'"weight_map"' in ends else b""

    def _read_directory(self) -> bytes:
        """Return the list of members at the end of an archive (APPNOTE 4.3.12 and 4.3.16).

        Where the archive ends with its end record, as it does without a comment, only the list is
        read; otherwise as much of the end as the list may be in.
        """
        size = self.file.size
        end = self.file.read(max(0, size - 22), 22)
        if end.startswith(b"PK\x05\x06"):
            nbytes, offset = struct.unpack_from("<LL", end, 12)
            if offset + nbytes <= size and nbytes <= _TAIL:
                return self.file.read(offset, nbytes)
        return self.file.read(max(0, size - _TAIL), _TAIL)


def is_hdf5(opening: Opening) -> bool:
    """Return whether a file begins with HDF5's signature."""
    return opening.head.startswith(_HDF5)


def has_user_block(opening: Opening) -> bool:
    """Return whether HDF5's signature stands behind a block of the user's own: at 512, 1024, ..."""
    offset = 512
    while offset < opening.file.size:
        if opening.file.read(offset, len(_HDF5)) == _HDF5:
            return True
        offset *= 2
    return False


def is_keras_archive(opening: Opening) -> bool:
    """Return whether an archive has the members of a Keras model."""
    return bool(opening.members & _KERAS_WEIGHTS) or opening.members >= _KERAS_TEXTS


def is_npz(opening: Opening) -> bool:
    """Return whether an archive has an array of numpy's."""
    return any(name.endswith(b".npy") for name in opening.members)


def is_torch_zip(opening: Opening) -> bool:
    """Return whether `torch.save` wrote a file, in the form that it has had since PyTorch 1.6."""
    return any(re.search(rb"/data(\.pkl|/\d+)$", name) for name in opening.members)


def is_dcp_metadata(opening: Opening) -> bool:
    """Return whether a pickle is the `.metadata` of a distributed checkpoint, by the classes in it.

    One that is damaged has its name still; nothing else is called so.
    """
    if not opening.head.startswith(b"\x80"):
        return False
    first = opening.file.read(0, 512)
    return any(one in first for one in _DCP) or opening.file.name.endswith("/.metadata")


def is_orbax_metadata(opening: Opening) -> bool:
    """Return whether a JSON file lists the arrays or the items of an Orbax checkpoint.

    One that is damaged has its name still; nothing else is called so.
    """
    if not opening.head.lstrip().startswith(b"{") or _LENGTH.match(opening.head):
        return False
    return b'"tree_metadata"' in opening.file.read(0, 512) or opening.file.name.endswith(
        ("/_METADATA", "/_CHECKPOINT_METADATA")
    )


def is_keras_index(opening: Opening) -> bool:
    """Return whether a JSON file maps Keras's weights to shards.

    A map may name anything at all; the file's own name then says what it was meant to be.
    """
    ends = opening.weight_map
    return bool(ends) and (b'.h5"' in ends or opening.file.name.endswith(".weights.json"))


def is_safetensors(opening: Opening) -> bool:
    """Return whether a file is an index of safetensors shards, or begins with a header's length."""
    if b'.safetensors"' in opening.weight_map or _is_called(opening, ".safetensors.index.json"):
        return True
    return _LENGTH.match(opening.head) is not None


def is_torch_index(opening: Opening) -> bool:
    """Return whether a JSON file maps tensors to shards of `torch.save`."""
    return b'.bin"' in opening.weight_map or _is_called(opening, ".bin.index.json")


def _is_called(opening: Opening, ending: str) -> bool:
    """Return whether a file of JSON is named as an index: one cut off has its name still."""
    return opening.head.lstrip().startswith((b"{", b"[")) and opening.file.name.endswith(ending)


def is_list_of_modules(opening: Opening) -> bool:
    """Return whether a JSON file lists the modules of a model of sentence-transformers."""
    if not opening.head.lstrip().startswith(b"["):
        return False
    begin = opening.file.read(0, _ENDS)
    return b'"path"' in begin and b'"type"' in begin


def is_tensorflow_index(opening: Opening) -> bool:
    """Return whether a file is the index of a TensorFlow checkpoint, whole or cut off."""
    if _BUNDLE.match(opening.head):
        return True
    return opening.file.read(max(0, opening.file.size - 8), 8) == _TABLE


def _find_names(part: bytes, header: tuple[bytes, int, int]) -> set[bytes]:
    """Return what look like members' names in a part of an archive."""
    mark, length_at, name_at = header
    names = set()
    place = part.find(mark)
    while 0 <= place <= len(part) - name_at:
        (length,) = struct.unpack_from("<H", part, place + length_at)
        names.add(part[place + name_at : place + name_at + length])
        place = part.find(mark, place + name_at)
    return names
