"""Numpy's `.npz`: a zip archive with one `.npy` file a tensor, stored or deflated.

Arrays of Python objects are pickles, and are refused.  Knows the header of `.npy` through numpy's
own reader of it.
"""

from __future__ import annotations

import io
import re
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polyak_cli.errors import FormatError, OutputError, shown
from polyak_cli.formats import conversion, zips
from polyak_cli.formats.format import Draft, Format, ScanRequest, SkeletonRequest
from polyak_cli.processes.sandbox import Heartbeat
from polyak_cli.storage import InputFile
from polyak_cli.tensors import (
    FLOATS,
    Checksum,
    Extent,
    Placement,
    Storage,
    Table,
    TensorSpec,
    itemsize,
)

#: Marks this tool's record, compressed, in the archive's comment: a member would be one more array
#: to whoever loads them all.
MARK = b"polyak_provenance "
#: Bytes of a .npy header that are looked at; numpy allows 10,000 characters of it.
_HEAD = 1 << 14
_ALIGNMENT = 64  # of the values, as numpy's own header pads
#: Types of other formats that numpy has too.
_TYPES = re.compile(r"u?int(8|16|32|64)|float(16|32|64)|complex(64|128)|bool")
#: What a safetensors file says by which framework it was written, which is of no use here.
_IDLE = {"format"}


def _read_record(comment: bytes) -> dict[str, str]:
    """Return this tool's record, if it wrote the archive."""
    if not comment.startswith(MARK):
        return {}
    try:
        record = zlib.decompressobj().decompress(comment.removeprefix(MARK), zips.WHOLE)
    except zlib.error as error:
        raise FormatError(f"its record of provenance is damaged ({error})") from None
    return {"provenance": record.decode(errors="replace")}


def _describe_member(file: InputFile, member: zips.Member) -> TensorSpec:
    """Describe a member."""
    if not member.name.endswith(".npy"):
        where = _find_storage(member, 0)
        return TensorSpec(member.name, (member.nbytes,), "opaque", "<", member.name, where)
    name = member.name.removesuffix(".npy")
    try:
        dtype, shape, fortran, start = _parse_header(_read_head(file, member))
    except ValueError as error:
        raise FormatError(f"tensor '{shown(name)}' has no .npy header ({shown(error)})") from None
    # numpy would unpickle these, which runs whatever code the file names.
    if dtype.hasobject:
        raise FormatError(
            f"tensor '{shown(name)}' is a pickled array of objects, which is never loaded"
        )
    nbytes = dtype.itemsize * int(np.prod(shape, dtype=object))
    # The header alone could claim any shape; the member's size is the second witness.
    if start + nbytes != member.nbytes:
        raise FormatError(
            f"tensor '{shown(name)}' has {member.nbytes - start} bytes; "
            f"expected {nbytes} for {dtype} of shape {shape}"
        )
    order = ">" if dtype.str.startswith(">") else "<"
    arrangement = "Fortran order" if fortran else ""
    where = _find_storage(member, start) if nbytes else Extent(0, 0)
    sizes = tuple(shape)
    return TensorSpec(
        name, sizes, _name_dtype(dtype), order, member.name, where, arrangement=arrangement
    )


def _read_head(file: InputFile, member: zips.Member) -> bytes:
    """Return the first bytes of an array: only its header, if the header's length is known."""
    if member.method != zips.STORED:  # its bytes are inflated in larger pieces anyway
        return zips.read_head(file, member, _HEAD)
    start = zips.read_head(file, member, 12)
    width = 2 if start[6:7] == b"\1" else 4  # of the header's length, by the format's version
    length = int.from_bytes(start[8 : 8 + width], "little")
    return zips.read_head(file, member, min(8 + width + length, _HEAD))


def _parse_header(head: bytes) -> tuple[np.dtype[Any], list[int], bool, int]:
    """Read dtype, shape, whether in Fortran order, and where the values begin.

    Raises:
        ValueError: it is damaged, or of a version that is not written for plain arrays.
    """
    stream = io.BytesIO(head)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(stream)
    if version not in readers:
        raise ValueError(f"version {version}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns of the headers of Python 2
            shape, fortran, dtype = readers[version](stream)
    except Exception as error:  # numpy's reader lets through what Python's parsers raise
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if any(type(n) is not int or not 0 <= n < 1 << 63 for n in shape):
        raise ValueError(f"shape {shape}")
    # One dimension has one order, and none has none.
    return dtype, list(shape), fortran and len(shape) > 1, stream.tell()


def _name_dtype(dtype: np.dtype[Any]) -> str:
    """Return the dtype's name as tables have it."""
    if dtype.kind in "SU":
        return "string"
    if dtype.kind == "V":
        # numpy writes a type that it does not know, such as JAX's bfloat16, as bare bytes.
        plain = "bfloat16" if dtype.itemsize == 2 else "opaque"
        return "compound" if dtype.names else plain
    return dtype.name


def _find_storage(member: zips.Member, start: int) -> Storage:
    if member.method == zips.STORED:
        return Extent(member.offset + start, member.nbytes - start)
    return zips.Deflated(member.offset, member.stored, start, member.nbytes - start)


def _build_comment(provenance: str) -> bytes:
    comment = MARK + zlib.compress(provenance.encode())
    if len(comment) > 0xFFFF:
        raise FormatError(
            "the record of so many checkpoints does not fit into an .npz file; average fewer of "
            "them"
        )
    return comment


def _convert_header(head: bytes, wanted: str, stored: str) -> bytes:
    """Return a .npy header for another type, or as it is for the same."""
    _, shape, fortran, end = _parse_header(head)
    if wanted == stored:
        return head[:end]
    return _build_header("|V2" if wanted == "bfloat16" else "<" + FLOATS[wanted], shape, fortran)


def _build_header(descr: str, shape: Sequence[int], fortran: bool) -> bytes:
    """Return a .npy header."""
    stream = io.BytesIO()
    described = {"descr": descr, "fortran_order": fortran, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(stream, described)
    return stream.getvalue()


# --- from and to other formats --------------------------------------------------------------------


class Npz(Format):
    """A zip archive with one `.npy` file a tensor."""

    key = "npz"
    is_scattered = True
    name = "numpy .npz"
    suffixes = (".npz",)
    has_checksums = True
    can_be_left = True
    conversion_suffix = ".npz"

    def scan(self, request: ScanRequest, heartbeat: Heartbeat) -> Table:
        """See `Format.scan`."""
        with zips.open_archive(request.path) as (file, members, comment):
            specs = []
            for member in heartbeat.over(members):
                specs.append(_describe_member(file, member))
        tensors = {spec.name: spec for spec in specs}
        if len(tensors) < len(specs):  # "x" and "x.npy"
            raise FormatError(f"{shown(request.path)}: two of its tensors have the same name")
        return Table(
            path=Path(request.path),
            format=self.key,
            files=(),
            tensors=tensors,
            others={},
            optimizer=frozenset(),
            config="",
            is_polyak_output=comment.startswith(MARK),
            about=_read_record(comment),
        )

    def write_skeleton(self, request: SkeletonRequest, heartbeat: Heartbeat) -> Draft:
        """See `Format.write_skeleton`."""
        specs = {spec.location: spec for spec in request.template.tensors.values()}
        places = {}
        with (
            zips.open_archive(request.template.files[0].path) as (file, members, _),
            zips.Archive(request.output, _build_comment(request.provenance)) as archive,
        ):
            for member in heartbeat.over(members):
                wanted = request.averaged.get(member.name)
                if wanted is None:
                    archive.copy(file, member, heartbeat, _ALIGNMENT)
                    continue
                spec = specs[member.name]
                head = _convert_header(zips.read_head(file, member, _HEAD), wanted, spec.dtype)
                nbytes = spec.size * itemsize(wanted)
                offset = archive.reserve(member.name, len(head) + nbytes, _ALIGNMENT)
                archive.write(offset, head)
                if spec.size:
                    order = spec.byteorder if wanted == spec.dtype else "<"
                    places[member.name] = Placement(offset + len(head), wanted, order)
            return Draft(places, notes={"archive": archive.describe()})

    def finalize(self, output: str, draft: Draft) -> None:
        """See `Format.finalize`."""
        zips.finalize_archive(output, draft.notes["archive"])

    def check(self, path: str, heartbeat: Heartbeat, later: int | None = None) -> list[Checksum]:
        """See `Format.check`."""
        return zips.check(path, heartbeat, later)

    def is_polyak_output(self, path: str, heartbeat: Heartbeat) -> bool:
        """See `Format.is_polyak_output`."""
        heartbeat()
        try:
            with zips.open_archive(path) as (_, _, comment):
                return comment.startswith(MARK)
        except FormatError:
            return False

    def texts(self, table: Table, heartbeat: Heartbeat) -> dict[str, str]:
        """See `Format.texts`."""
        heartbeat()
        with zips.open_archive(table.files[0].path) as (_, _, comment):
            if not comment or comment.startswith(MARK):
                return {}
            return {"comment": comment.decode("utf-8", "surrogateescape")}

    def refuse_conversion(self, request: SkeletonRequest, texts: Mapping[str, str]) -> None:
        """See `Format.refuse_conversion`."""
        for key in texts:
            if key not in _IDLE:
                raise OutputError(
                    f"'{shown(key)}' would be lost: an .npz file holds only named arrays"
                )
        for spec in request.template.tensors.values():
            wanted = request.averaged.get(spec.location, spec.dtype)
            if not _TYPES.fullmatch(wanted):
                raise OutputError(
                    f"tensor '{shown(spec.name)}' has type {wanted}, which numpy does not have"
                    + ("; choose another --dtype" if wanted in FLOATS else "")
                )
            if re.search(r"(^|[/\\])\.\.([/\\]|$)|^[/\\]|^[A-Za-z]:|\0", spec.name):
                raise OutputError(
                    f"tensor '{shown(spec.name)}' has a name that leads out of a zip archive"
                )

    def convert(
        self, request: SkeletonRequest, texts: Mapping[str, str], heartbeat: Heartbeat
    ) -> Draft:
        """See `Format.convert`; stored, as np.savez does it."""
        del texts  # `refuse_conversion` has found nothing in them
        places = {}
        with (
            conversion.Carrier(request.template, heartbeat) as carrier,
            zips.Archive(request.output, _build_comment(request.provenance)) as archive,
        ):
            for spec in heartbeat.over(request.template.tensors.values()):
                wanted = request.averaged.get(spec.location)
                dtype = np.dtype(wanted or spec.dtype)
                head = _build_header(dtype.newbyteorder("<").str, spec.shape, fortran=False)
                nbytes = spec.size * dtype.itemsize
                offset = archive.reserve(f"{spec.name}.npy", len(head) + nbytes, _ALIGNMENT)
                archive.write(offset, head)
                if wanted is None:
                    carrier.carry(spec, archive.file, offset + len(head))
                elif spec.size:
                    places[spec.location] = Placement(offset + len(head), wanted, "<")
            return Draft(places, notes={"archive": archive.describe()})
