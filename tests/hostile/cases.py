"""Files that mean harm or are merely odd: how each is made, and what must happen to it.

Made by h5py and by hand, never by the package.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from h5py import h5d, h5p, h5s, h5t

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
    """Return what creates the tensor anew."""

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
    "a dangling link": Case(lambda path: path.symlink_to("nowhere"), "file that is gone"),
    "a link to itself": Case(_loop, "leads back to itself"),
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


def _plugged(file: Any) -> None:
    """A filter that a plugin would bring, said to be optional so that it can be written without."""
    del file["model_weights/d/k"]
    properties = h5p.create(h5p.DATASET_CREATE)
    properties.set_chunk((2, 3))
    properties.set_filter(32015, 1, (3,))
    space = h5s.create_simple((2, 3))
    made = h5d.create(file["model_weights/d"].id, b"k", h5t.NATIVE_FLOAT, space, properties)
    made.write_direct_chunk((0, 0), bytes(24))


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
    "a filter of a plugin": Case(edited(_plugged), r"32015 .zstd; the package hdf5plugin brings"),
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
