"""Files that mean harm or are merely odd: how each is made, and what must happen to it.

Made by h5py and by hand, never by the package.  What only one of the other formats can hold is
beside its tests, and is looked into here too.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from h5py import h5a, h5d, h5p, h5s, h5t

from tests.oracle import Array, write_model

KERNEL = np.arange(6, dtype=np.float32).reshape(2, 3)
Make = Callable[[Path], Any]


class Case(NamedTuple):
    """One kind of file, made at a path."""

    make: Make
    message: str  # a pattern of the error; "" where the file is averaged


def plain(path: Path, **layers: Any) -> Path:
    """Write a sound checkpoint with one layer, to be spoilt."""
    return write_model(path, {"d": {"k": KERNEL}, **layers})


def edited(edit: Callable[[Any], Any], **options: Any) -> Make:
    """Return what writes a sound checkpoint and then changes it by h5py."""

    def make(path: Path) -> None:
        write_model(path, {"d": {"k": KERNEL}}, **options)
        with h5py.File(path, "r+") as file:
            edit(file)

    return make


def replaced(link: Any) -> Make:
    """Return what puts something else in place of the tensor."""

    def edit(file: Any) -> None:
        del file["model_weights/d/k"]
        if link is not None:
            file["model_weights/d/k"] = link

    return edited(edit)


def dataset(*arguments: Any, **options: Any) -> Make:
    """Return an edit that creates the tensor again."""

    def edit(file: Any) -> None:
        del file["model_weights/d/k"]
        file["model_weights/d"].create_dataset("k", *arguments, **options)

    return edited(edit)


def names(key: str, values: Any, where: str = "model_weights") -> Make:
    """Return what writes another list of names."""

    def edit(file: Any) -> None:
        del file[where].attrs[key]
        if values is not None:
            file[where].attrs[key] = values

    return edited(edit)


def holding(values: Array) -> Make:
    """Return what writes one more tensor."""
    return lambda path: write_model(path, {"d": {"k": KERNEL}, "e": {"x": values}})


# --- not even a file ------------------------------------------------------------------------------


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the path of a socket may have a hundred letters only
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


NO_FILES = {
    "a named pipe": Case(os.mkfifo, "named pipe"),
    "a socket": Case(_socket, "socket"),
    "a device": Case(lambda path: path.symlink_to("/dev/zero"), "character device"),
    "a folder": Case(Path.mkdir, "directory|no checkpoint here"),
    "a dangling link": Case(lambda path: path.symlink_to("nowhere"), "file that does not exist"),
    "a link to itself": Case(_loop, "symbolic link to itself"),
}

# --- links and layouts that lead elsewhere --------------------------------------------------------


def _external_storage(file: Any) -> None:
    """CVE-2026-1669: the values are said to lie in any file of the machine."""
    del file["model_weights/d/k"]
    file["model_weights/d"].create_dataset("k", (2, 3), "f4", external=[("/etc/passwd", 0, 24)])


def _virtual(file: Any) -> None:
    del file["model_weights/d/k"]
    layout = h5py.VirtualLayout((2, 3), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (2, 3))
    file["model_weights/d"].create_virtual_dataset("k", layout)


def _middle(link: Any) -> Callable[[Any], None]:
    def edit(file: Any) -> None:
        file.move("model_weights/d", "elsewhere")
        file["model_weights/d"] = link

    return edit


def _nested(file: Any) -> None:
    group = file["model_weights/d"]
    for _ in range(3000):
        group = group.create_group("g")


def _reference(file: Any) -> None:
    file["model_weights/d"].attrs["points"] = file["model_weights"].ref


def _array_of_references(file: Any) -> None:
    group = file["model_weights/d"]
    datatype = h5t.array_create(h5t.STD_REF_OBJ, (2,))
    h5a.create(group.id, b"points", datatype, h5s.create(h5s.SCALAR))


def _references(file: Any, kind: Any, target: Any) -> None:
    """Put values that point to something in place of the tensor."""
    del file["model_weights/d/k"]
    values = np.array([target, target], dtype=kind)
    file["model_weights/d"].create_dataset("k", data=values, dtype=kind)


def _records(kind: Any, value: Any, rows: int) -> Callable[[Any], None]:
    """Return what writes, beside the model, records that hold arrays of what lies elsewhere."""

    def edit(file: Any) -> None:
        values = np.zeros(rows, [("number", "f4"), ("points", kind, (2,))])
        values["points"] = value(file)
        file["records"] = values

    return edit


LINKS = {
    "a soft link": Case(replaced(h5py.SoftLink("/x")), "soft or external link"),
    "an external link": Case(replaced(h5py.ExternalLink("/etc/passwd", "b")), "soft or external"),
    "a soft link on the way": Case(edited(_middle(h5py.SoftLink("/elsewhere"))), "soft or ext"),
    "an external link on the way": Case(
        edited(_middle(h5py.ExternalLink("other.h5", "/d"))), "soft or external link"
    ),
    "an external link beside the model": Case(
        edited(lambda f: f.__setitem__("elsewhere", h5py.ExternalLink("a", "b"))),
        "soft or external link",
    ),
    "external raw storage": Case(edited(_external_storage), "another file .external storage"),
    "a virtual dataset": Case(edited(_virtual), "other datasets .virtual layout"),
    "a cycle of groups": Case(
        edited(lambda f: f["model_weights/d"].__setitem__("again", f["model_weights"])),
        "linked twice",
    ),
    "groups 3,000 deep": Case(edited(_nested), "nested too deep"),
    "a reference in an attribute": Case(edited(_reference), "reference"),
    "a reference in an attribute of the root": Case(
        edited(lambda f: f.attrs.__setitem__("points", f["model_weights"].ref)), "reference"
    ),
    "a region in an attribute": Case(
        edited(
            lambda f: f.attrs.create(
                "points", f["model_weights/d/k"].regionref[:1], dtype=h5py.regionref_dtype
            )
        ),
        "reference",
    ),
    "an array of references in an attribute": Case(edited(_array_of_references), "array"),
    "references for values": Case(
        edited(lambda f: _references(f, h5py.ref_dtype, f.ref)), r"'d/k' .*\(reference\)"
    ),
    "regions for values": Case(
        edited(
            lambda f: _references(f, h5py.regionref_dtype, f["model_weights/d"]["k"].regionref[:1])
        ),
        r"'d/k' .*\(reference\)",
    ),
    "records of references": Case(
        edited(_records(h5py.ref_dtype, lambda f: f.ref, 5000)), r"'/records' .*\(compound\)"
    ),
    "records of texts in a heap": Case(
        edited(_records(h5py.string_dtype(), lambda _: "x", 3)), r"'/records' .*\(compound\)"
    ),
    "a soft link for the optimizer": Case(
        edited(lambda f: f.__setitem__("optimizer_weights", h5py.SoftLink("/model_weights"))),
        "'/optimizer_weights' is a soft or external link",
    ),
    "the model for the optimizer": Case(
        edited(lambda f: f.__setitem__("optimizer_weights", f["model_weights"])), "linked twice"
    ),
}

# --- never written, half written, far too large ---------------------------------------------------


def _half_written(file: Any) -> None:
    del file["model_weights/d/k"]
    half = file["model_weights/d"].create_dataset("k", (20, 3), "f4", chunks=(2, 3))
    half[:4] = 1


def _never_allocated(file: Any) -> None:
    del file["model_weights/d/k"]
    properties = h5p.create(h5p.DATASET_CREATE)
    properties.set_alloc_time(h5d.ALLOC_TIME_LATE)
    space = h5s.create_simple((1 << 30, 1 << 30))
    h5d.create(file["model_weights/d"].id, b"k", h5t.NATIVE_FLOAT, space, properties)


def _deflate_bomb(path: Path) -> None:
    """One chunk of 256 MiB that is stored in some 260 kB."""
    write_model(path, {"d": {"k": KERNEL}})
    with h5py.File(path, "r+") as file:
        del file["model_weights/d/k"]
        options = {"chunks": (1 << 26,), "compression": "gzip", "compression_opts": 9}
        file["model_weights/d"].create_dataset("k", data=np.zeros(1 << 26, np.float32), **options)


def plugged(number: int) -> Make:
    """Return what names a filter, said to be optional so that it can be written without."""

    def edit(file: Any) -> None:
        del file["model_weights/d/k"]
        properties = h5p.create(h5p.DATASET_CREATE)
        properties.set_chunk((2, 3))
        properties.set_filter(number, 1, (3,))
        space = h5s.create_simple((2, 3))
        made = h5d.create(file["model_weights/d"].id, b"k", h5t.NATIVE_FLOAT, space, properties)
        made.write_direct_chunk((0, 0), bytes(24))

    return edited(edit)


def _damaged_chunk(path: Path) -> None:
    values = np.arange(3000, dtype=np.float32)
    write_model(path, {"d": {"k": values}}, storage={"chunks": (1000,), "compression": "gzip"})
    with h5py.File(path, "r") as file:
        chunk = file["model_weights/d/k"].id.get_chunk_info(1)
    with open(path, "r+b") as raw:
        raw.seek(chunk.byte_offset + chunk.size // 2)
        raw.write(bytes(16))


GAPS = {
    "a tensor never written": Case(dataset((2, 3), "f4"), "was never written"),
    "a tensor half written": Case(edited(_half_written), "was written in part"),
    "an exabyte that is not there (CVE-2026-0897)": Case(edited(_never_allocated), "never written"),
    "an exabyte in chunks": Case(
        dataset((1 << 30, 1 << 30), "f4", chunks=(1 << 10, 1 << 10)), "was written in part"
    ),
    "a chunk that inflates to 256 MiB": Case(_deflate_bomb, "must be held whole"),
    "a damaged chunk": Case(_damaged_chunk, "chunk is damaged"),
    "a filter of a plugin": Case(
        plugged(32015), r"32015 .zstd; h5py reads it with the package hdf5plugin"
    ),
    "a filter of PyTables": Case(plugged(305), r"305 .lzo; h5py reads it with the package tables"),
    "a filter of nobody": Case(plugged(999), r"HDF5 filter 999 \(unknown\)"),
    "a filter that loses digits": Case(
        dataset(data=KERNEL, chunks=(2, 3), scaleoffset=2), "scale-offset"
    ),
}


# --- lists of names -------------------------------------------------------------------------------

WEIGHTS = "model_weights/d"
LISTS = {
    "no list of layers": Case(names("layer_names", None), "has no list 'layer_names'"),
    "layers that are numbers": Case(names("layer_names", [1, 2]), "is not a list of names"),
    "layers that are one text": Case(names("layer_names", "d"), "is not a list of names"),
    "layers of no number": Case(names("layer_names", h5py.Empty("S1")), "is not a list"),
    "a layer that is not there": Case(names("layer_names", [b"d", b"x"]), "x' is named but"),
    "a layer named twice": Case(names("layer_names", [b"d", b"d"]), "is listed twice"),
    "an absolute layer": Case(names("layer_names", [b"/d"]), "empty, absolute or relative"),
    "a layer above": Case(names("layer_names", [b"../d"]), "empty, absolute or relative"),
    "an empty layer": Case(names("layer_names", [b""]), "empty, absolute or relative"),
    "a layer with a NUL": Case(
        names("layer_names", np.array([b"d\0x"], "S5")), r"d\\x00x' is named but"
    ),
    "a layer that is no UTF-8": Case(
        names("layer_names", [b"\xff\xfe"]), r"\\udcff.* is named but"
    ),
    "layers in rows and columns": Case(names("layer_names", np.array([[b"d"]])), "is not a list"),
    "no layer at all": Case(names("layer_names", np.zeros(0)), "nothing to average|has no tensor"),
    "no list of weights": Case(names("weight_names", None, WEIGHTS), "has no list 'weight_n"),
    "weights that are numbers": Case(names("weight_names", [1.5], WEIGHTS), "is not a list"),
    "a weight that is not there": Case(names("weight_names", [b"x"], WEIGHTS), "'d/x' is named"),
    "an absolute weight": Case(names("weight_names", [b"/k"], WEIGHTS), "empty, absolute or rel"),
    "an empty weight": Case(names("weight_names", [b""], WEIGHTS), "empty, absolute or relative"),
    "a weight named twice": Case(names("weight_names", [b"k", b"k"], WEIGHTS), "listed twice"),
    "a group for a tensor": Case(
        edited(
            lambda f: (
                f["model_weights/d"].__delitem__("k"),
                f.create_group("model_weights/d/k"),
            )
        ),
        "is a group, not a dataset",
    ),
    "a tensor with no dataspace": Case(replaced(h5py.Empty("f4")), "has no shape"),
}

# --- types ----------------------------------------------------------------------------------------


def _quantised(path: Path) -> None:
    tensors: dict[str, Array] = {
        "kernel": np.ones((2, 3), np.int8),
        "kernel_scale": np.ones(3, np.float32),
    }
    write_model(path, {"d": {"k": KERNEL}, "q": tensors})


def _enum(path: Path) -> None:
    write_model(path, {"d": {"k": KERNEL}, "e": {"x": np.ones(2, np.int8)}})
    with h5py.File(path, "r+") as file:
        del file["model_weights/e/x"]
        colours = h5py.enum_dtype({"RED": 0, "GREEN": 1}, "i1")
        file["model_weights/e"].create_dataset("x", data=np.ones(2, np.int8), dtype=colours)


def _hard_linked(path: Path) -> None:
    write_model(path, {"d": {"k": KERNEL}, "e": {"x": KERNEL}})
    with h5py.File(path, "r+") as file:
        del file["model_weights/e/x"]
        file["model_weights/e/x"] = file["model_weights/d/k"]


def _named(name: str) -> Make:
    return lambda path: write_model(path, {"d": {"k": KERNEL}, name: {"x": KERNEL}})


COMPOUND = np.zeros(2, [("a", "f4"), ("b", "i4")])
RANK_32 = np.ones((1,) * 31 + (2,), np.float32)

TYPES = {
    "int8 with a scale": Case(_quantised, "is quantised"),
    "complex numbers": Case(holding(np.ones(2, np.complex64)), "compound|complex"),
    "records": Case(holding(COMPOUND), "compound"),
    "float128": Case(holding(np.ones(2, np.longdouble)), "float128"),
    "big-endian": Case(holding(np.ones(2, ">f8")), ""),
    "an enumeration": Case(_enum, ""),
    "texts of any length": Case(holding(np.array(["a", "bc"], object)), ""),
    "texts of one length": Case(holding(np.array([b"a", b"bc"])), ""),
    "a scalar": Case(holding(np.array(1.5, np.float32)), ""),
    "nothing": Case(holding(np.zeros((0, 3), np.float32)), ""),
    "32 dimensions": Case(holding(RANK_32), ""),
    "one tensor under two names": Case(_hard_linked, ""),
    "a user block": Case(
        lambda path: write_model(path, {"d": {"k": KERNEL}}, userblock_size=512), ""
    ),
    "the latest file format": Case(
        lambda path: write_model(path, {"d": {"k": KERNEL}}, libver="latest"), ""
    ),
    "a name with spaces": Case(_named("my layer (2)"), ""),
    "a name in other letters": Case(_named("café_层"), ""),
    "a name with control characters": Case(_named("a\x1b[2Jb\nc"), ""),
    "a name of 20,000 letters": Case(_named("x" * 20_000), ""),
}

HDF5 = {**LINKS, **GAPS, **LISTS, **TYPES}


# --- archives -------------------------------------------------------------------------------------


def npy(described: str = "", values: bytes = bytes(24), version: int = 1) -> bytes:
    """Return a .npy file whose header says anything."""
    described = described or header()
    size = struct.pack("<H" if version == 1 else "<L", len(described))
    return b"\x93NUMPY" + bytes((version, 0)) + size + described.encode("latin-1") + values


def header(descr: str = "'<f4'", shape: str = "(2, 3)") -> str:
    """Return what a .npy header says."""
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n"


def archived(
    *members: tuple[str, bytes], method: int = zipfile.ZIP_STORED, comment: bytes = b""
) -> Make:
    """Return what writes an archive of one sound array and of other members."""

    def make(path: Path) -> None:
        with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as archive:
            warnings.simplefilter("ignore", UserWarning)  # of names that are there twice
            for name, content in (("k.npy", npy()), *members):
                archive.writestr(name, content)
            archive.comment = comment

    return make


def patched(mark: bytes, offset: int, form: str, number: int, make: Make | None = None) -> Make:
    """Return what writes a sound archive and then a number into the last header of a kind."""

    def patch(path: Path) -> None:
        (make or archived())(path)
        content = bytearray(path.read_bytes())
        struct.pack_into(form, content, content.rindex(mark) + offset, number)
        path.write_bytes(content)

    return patch


def _link(path: Path) -> None:
    archived()(path)
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("x.npy")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")


def _one_place_twice(path: Path) -> None:
    """Two entries of the list lead to one member, as in archives that inflate without end."""
    archived()(path)
    content = path.read_bytes()
    listed, end = content.rindex(LISTED), content.rindex(END)
    entry = content[listed:end]
    ending = bytearray(content[end:])
    struct.pack_into("<HHL", ending, 8, 2, 2, 2 * len(entry))
    path.write_bytes(content[:end] + entry.replace(b"k.npy", b"x.npy") + ending)


def _bomb(path: Path) -> None:
    """512 MiB of zeros in half a megabyte."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("k.npy", "w", force_zip64=True) as member,
    ):
        member.write(npy(header(shape=f"({1 << 27},)"), b""))
        for _ in range(512):
            member.write(bytes(1 << 20))


def _many_twice(path: Path) -> None:
    """So many names that comparing each with all before would not end."""
    archived(*((f"{k}.npy", b"") for k in range(20_000)), ("k.npy", npy()))(path)


LOCAL, LISTED, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
DEFLATED = archived(("x.npy", npy()), method=zipfile.ZIP_DEFLATED)
RECORD = b"polyak_provenance "
OUT = "a path that leads nowhere or out of the archive"
ARCHIVES = {
    "a path above": Case(archived(("../x.npy", npy())), OUT),
    "an absolute path": Case(archived(("/x.npy", npy())), OUT),
    "a path of Windows": Case(archived(("..\\x.npy", npy())), OUT),
    "a drive": Case(archived(("C:x.npy", npy())), OUT),
    "a member twice": Case(archived(("k.npy", npy())), "'k.npy' occurs twice"),
    "a member twice among many": Case(_many_twice, "'k.npy' occurs twice"),
    "one place twice": Case(_one_place_twice, "another name in its own header"),
    "an encrypted member": Case(patched(LISTED, 8, "<H", 1), "'k.npy' is encrypted"),
    "a symbolic link": Case(_link, "'x.npy' is a symbolic link"),
    "a decompression bomb": Case(_bomb, "'k.npy' claims .* a decompression bomb"),
    "bzip2": Case(archived(method=zipfile.ZIP_BZIP2), "method 12; expected deflate"),
    "LZMA": Case(archived(method=zipfile.ZIP_LZMA), "method 14; expected deflate"),
    "a checksum that the list denies": Case(
        patched(LISTED, 16, "<L", 7), "'k.npy' has another size, checksum or method"
    ),
    "a checksum that only the list has": Case(
        patched(LOCAL, 14, "<L", 7), "'k.npy' has another size, checksum or method"
    ),
    "a method that the list denies": Case(
        patched(LOCAL, 8, "<H", 8), "'k.npy' has another size, checksum or method"
    ),
    "a size that the list denies": Case(
        patched(LOCAL, 22, "<L", 7), "'k.npy' has another size, checksum or method"
    ),
    "a name that the list denies": Case(patched(LOCAL, 30, "<B", 65), "'k.npy' has another name"),
    "a wrong checksum": Case(
        patched(b"NUMPY", 80, "<B", 1), "checksum of the member 'k.npy' is wrong"
    ),
    "a damaged stream": Case(
        patched(LISTED, 16, "<L", 7, patched(LOCAL, 14, "<L", 7, DEFLATED)),
        "checksum of the member 'x.npy' is wrong",
    ),
    "a member outside": Case(patched(LISTED, 42, "<L", 1 << 30), "lies outside|overlap"),
    "a list outside": Case(patched(END, 12, "<L", 1 << 30), "is truncated or not a zip archive"),
    "sizes that differ": Case(patched(LISTED, 24, "<L", 1 << 30), "its two sizes differ"),
    "objects": Case(archived(("x.npy", npy(header("'|O'")))), "'x' is a pickled array of objects"),
    "objects in records": Case(
        archived(("x.npy", npy(header("[('a', '<f4'), ('b', 'O')]")))),
        "'x' is a pickled array of objects",
    ),
    "records": Case(archived(("x.npy", npy(header("[('a', '<f4')]")))), "'x' is of type compound"),
    "complex numbers": Case(archived(("x.npy", npy(header("'<c8'", "(3,)")))), "complex64"),
    "float128": Case(archived(("x.npy", npy(header("'<f16'", "()"), bytes(16)))), "float128"),
    "dates": Case(archived(("x.npy", npy(header("'<M8[s]'", "(3,)")))), "datetime64"),
    "code for a header": Case(
        archived(("x.npy", npy(header("__import__('os').system('touch ran')")))), "no .npy header"
    ),
    "a deep header": Case(archived(("x.npy", npy(header("[" * 3000)))), "no .npy header"),
    "a shape that is not there": Case(
        archived(("x.npy", npy(header(shape="(4611686018427387904, 4)")))), "'x' has 24 bytes"
    ),
    "a shape of thousands of digits": Case(
        archived(("x.npy", npy(header(shape=f"({'9' * 4000}, {'9' * 4000})")))), "no .npy header"
    ),
    "a negative shape": Case(archived(("x.npy", npy(header(shape="(-6,)")))), "no .npy header"),
    "a shape of truths": Case(archived(("x.npy", npy(header(shape="(True, 6)")))), "no .npy head"),
    "elements of 2 GB": Case(
        archived(("x.npy", npy(header("'V2147483647'", "(9999,)")))), "'x' has 24 bytes; expected"
    ),
    "int8 with a scale": Case(
        archived(("kernel.npy", npy(header("'|i1'", "(24,)"))), ("kernel_scale.npy", npy())),
        "is quantised",
    ),
    "a header of Python 2": Case(archived(("x.npy", npy(header(shape="(2L, 3L)")))), ""),
    "big-endian": Case(archived(("x.npy", npy(header("'>f4'")))), ""),
    "a scalar": Case(archived(("x.npy", npy(header(shape="()"), bytes(4)))), ""),
    "nothing": Case(archived(("x.npy", npy(header(shape="(0, 3)"), b""))), ""),
    "32 dimensions": Case(archived(("x.npy", npy(header(shape=str((1,) * 31 + (6,)))))), ""),
    "a name with control characters": Case(archived(("a\x1b[2J\nb.npy", npy())), ""),
    "a name of 20,000 letters": Case(archived(("x" * 20_000 + ".npy", npy())), ""),
    "a record that is a bomb": Case(
        archived(comment=RECORD + zlib.compress(bytes(50 << 20), 9)), "needs more than 268 MB"
    ),
    "a record that is deep": Case(archived(comment=RECORD + zlib.compress(b"[" * 100_000)), ""),
}
