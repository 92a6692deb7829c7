"""Use libhdf5 with care: open files, explain errors, walk links, check attributes and types.

Follows hard links only, and leaves the values of tensors to the engine, which reads them by offset.
Does not know what Keras stores.  Runs in a child of `processes.sandbox`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import h5py
import numpy as np
from h5py import h5a, h5d, h5f, h5fd, h5g, h5i, h5l, h5o, h5p, h5s, h5t

from polyak_cli.errors import FormatError, PolyakError, shown
from polyak_cli.formats.hdf5.windows import Window
from polyak_cli.processes.sandbox import Heartbeat
from polyak_cli.storage import InputFile, mirrors, open_input
from polyak_cli.storage.local import name_errors
from polyak_cli.tensors import FLOATS

#: A file, or a part of one.
Place = str | Window
SIGNATURE = b"\x89HDF\r\n\x1a\n"
#: What users would call the content, by its first bytes.
FOREIGN = {
    b"PK\x03\x04": "a zip archive (.keras, .pt or .npz)",
    b"\x1f\x8b": "gzip-compressed",
    b"\x80\x02": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x93NUMPY": "a numpy array",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself",
}
_FLOAT_TYPES = [
    (name, order, h5t.py_create(np.dtype(order + code)))
    for name, code in FLOATS.items()
    if code.startswith("f")
    for order in "<>"
]
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
NAMELESS = b"window"  # what libhdf5 calls a file that has no path
_MAXIMUM_DEPTH = 64
#: Bytes of libhdf5's cache of headers.  An object's header takes some twelve times its size in the
#: file, so that a cache of 16 MiB would take most of the memory that a child may use.
CACHE = 1 << 20
_LARGEST_CACHE = 100 << 20  # libhdf5 allows 128 MiB
_STEP = 500  # links between two heartbeats


@contextlib.contextmanager
def open_file(path: Place) -> Iterator[tuple[Any, int]]:
    """Yield the root group and the size of the file; explain h5py's errors.

    Raises:
        FormatError: the file is damaged, or being written; names its path.
        OSError: another file, to which it is copied, cannot be written.
    """
    with _choose_place(path) as place, explain_errors(path, size := _check_file(place)):
        name = NAMELESS if isinstance(place, Window) else os.fsencode(place)
        file = h5f.open(name, h5f.ACC_RDONLY, fapl=make_access(place))
        try:
            yield h5o.open(file, b"/"), size
        except FormatError as error:
            raise FormatError(f"{shown(path)}: {error}") from None
        finally:
            failed = place.explain_error() if isinstance(place, Window) else None
            if failed:  # whatever else it led to
                raise type(failed)(f"{shown(path)}: {failed}")


@contextlib.contextmanager
def _choose_place(path: Place) -> Iterator[Place]:
    """Yield the place itself, or of an object a window, which is read as it is asked for."""
    if isinstance(path, Window) or not mirrors.is_mirrored(path):
        yield path
        return
    with _open_regular(path) as file:
        yield Window(path, file, 0, file.size)


def make_access(path: Place) -> Any:
    """Return the access properties with which every file is opened or created."""
    access = h5p.create(h5p.FILE_ACCESS)
    # Closing the file also closes the objects that are still open in it.
    access.set_fclose_degree(h5f.CLOSE_STRONG)
    # What Keras writes through h5py; HDF5 2.0 would start from a newer version by itself.
    access.set_libver_bounds(h5f.LIBVER_EARLIEST, h5f.LIBVER_LATEST)
    if isinstance(path, Window):
        access.set_fileobj_driver(h5fd.fileobj_driver, path)
    # libhdf5 lets its cache of headers grow, to hundreds of megabytes for 100,000 tensors, though
    # each is read once; kept small, it is twice as quick too.
    cache = access.get_mdc_config()
    cache.incr_mode = cache.flash_incr_mode = cache.decr_mode = 0
    access.set_mdc_config(_resize(cache, CACHE))
    return access


def _resize(cache: Any, nbytes: int) -> Any:
    """Return the configuration of a cache with another size, which stays as it is."""
    cache.set_initial_size = True
    cache.initial_size = cache.min_size = cache.max_size = min(nbytes, _LARGEST_CACHE)
    return cache


def _measure_names(group: Any, links: Sequence[_Link]) -> int:
    """Return the size of the block that holds a group's names, 0 where it fits into any cache.

    A cache that has no room for this block makes libhdf5 read it again for every link that is
    opened: 2 MB for each of 100,000 tensors.
    """
    if sum(len(link.name) for link in links) < CACHE // 8:
        return 0
    return int(h5o.get_info(group).meta_size.obj.heap_size)


@contextlib.contextmanager
def explain_errors(path: Place, size: int) -> Iterator[None]:
    """Say what h5py's errors mean to the user."""
    try:
        yield
    except Exception as error:
        # h5py raises half a dozen types for a damaged file; what comes from elsewhere is a bug.
        if isinstance(error, PolyakError) or not _is_from_h5py(error):
            raise
        number = _read_errno(error)
        if number in _NO_ROOM or re.search("file write failed|create file", str(error)):
            raise OSError(number, os.strerror(number)) from None
        raise FormatError(f"{shown(path)}: {_explain(error, size)}") from None


def _read_errno(error: Exception) -> int:
    """Return the system's error number that libhdf5 reports, or 0 if it reports none."""
    numbers = re.findall(
        r"errno = (\d+)\b", str(error)
    )  # the last: a file's name may look like one
    return int(numbers[-1]) if numbers else 0


def _check_file(path: Place) -> int:
    """Check, before libhdf5 opens it, that a file begins like HDF5; return its size."""
    if isinstance(path, Window):
        _check_signature(path.file, path.offset, path.size, path.name)
        return path.size
    # h5py itself would wait forever for the writer of a FIFO.
    with _open_regular(path) as file:
        if file.size == 0:
            raise FormatError(f"{shown(path)}: is empty (0 bytes); save it again or leave it out")
        _check_signature(file, 0, file.size, path)
        return file.size


def _open_regular(path: str) -> InputFile:
    try:
        return open_input(path)
    except FormatError as error:
        if not str(error).endswith(": is not a regular file"):
            raise
        raise FormatError(f"{error}; a checkpoint is a file or a folder of files") from None


def _check_signature(file: InputFile, start: int, size: int, name: str) -> None:
    """Refuse a file that does not begin like HDF5."""
    offset = 0
    while offset < size:  # a user block may stand before the signature
        if _read_head(file, start + offset, len(SIGNATURE)) == SIGNATURE:
            return
        offset = offset * 2 or 512
    head = _read_head(file, start, min(32, size))
    what = next((name for magic, name in FOREIGN.items() if head.startswith(magic)), None)
    begins = f"it is {what}" if what else f"it begins with {head[:8]!r}"
    raise FormatError(f"{shown(name)}: is not an HDF5 file ({begins}); expected a Keras .h5 file")


def _read_head(file: InputFile, offset: int, nbytes: int) -> bytes:
    with name_errors(file.name):
        return file.read(offset, nbytes)


def _is_from_h5py(error: Exception) -> bool:
    # h5py's compiled modules are in tracebacks by the paths of their sources.
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    code = trace.tb_frame.f_code.co_filename.replace("\\", "/") if trace else ""
    return "h5py/" in code and not isinstance(error, MemoryError)


def _explain(error: Exception, size: int) -> str:
    """Translate a message of libhdf5 into what the user can do."""
    text = str(error)
    if "unable to lock file" in text:
        return "is still being written by another process; wait until it is closed"
    if "already open for write" in text:  # a mark in the file, which stays if its writer dies
        return (
            "is still being written by another process, or that was killed; wait until it is "
            "closed, or save it again"
        )
    if "truncated file" in text:
        wanted = text.rpartition("stored_eof = ")[2].rstrip(")")
        return f"is truncated: it has {size} bytes, its header says {shown(wanted)}; save it again"
    if _read_errno(error):
        return f"cannot be read: {os.strerror(_read_errno(error))}"
    return f"is damaged or not a Keras model file: {shown(text)}"


def describe_type(datatype: Any, name: str) -> tuple[str, str]:
    """Return the dtype's name and byte order; refuse types whose values lie elsewhere."""
    size = datatype.get_size()
    order = ">" if _read_byteorder(datatype) == h5t.ORDER_BE else "<"
    if isinstance(datatype, h5t.TypeFloatID):
        for float_name, float_order, known in _FLOAT_TYPES:
            if datatype.equal(known):
                return float_name, float_order
        if size == 2 and datatype.get_fields() == (15, 7, 8, 0, 7) and datatype.get_ebias() == 127:
            return "bfloat16", order
        return f"float{8 * size}", order
    if isinstance(datatype, h5t.TypeIntegerID):
        sign = "" if datatype.get_sign() == h5t.SGN_2 else "u"
        return f"{sign}int{8 * size}", order
    if isinstance(datatype, h5t.TypeEnumID):
        members = {datatype.get_member_name(k) for k in range(datatype.get_nmembers())}
        return ("bool" if members == {b"FALSE", b"TRUE"} else "enum"), order
    if isinstance(datatype, h5t.TypeStringID):
        return "string", "<"
    if isinstance(datatype, h5t.TypeOpaqueID):  # h5py stores bfloat16 as two bare bytes
        return ("bfloat16" if size == 2 else "opaque"), "<"
    if isinstance(datatype, h5t.TypeBitfieldID):
        return "bitfield", order
    if isinstance(datatype, h5t.TypeCompoundID) and not is_pointing(datatype):
        return "compound", "<"
    raise FormatError(
        f"tensor {quote(name)} has an HDF5 type that is not supported "
        f"({type(datatype).__name__.removeprefix('Type').removesuffix('ID').lower()})"
    )


def _read_byteorder(datatype: Any) -> int:
    if isinstance(datatype, h5t.TypeEnumID):
        return int(datatype.get_super().get_order())
    if isinstance(datatype, (h5t.TypeFloatID, h5t.TypeIntegerID, h5t.TypeBitfieldID)):
        return int(datatype.get_order())
    return int(h5t.ORDER_LE)


def is_pointing(datatype: Any) -> bool:
    """Return whether values of a type refer to data that lies outside them."""
    if isinstance(datatype, h5t.TypeArrayID):
        return is_pointing(datatype.get_super())
    if isinstance(datatype, h5t.TypeCompoundID):
        return any(is_pointing(datatype.get_member_type(k)) for k in range(datatype.get_nmembers()))
    if isinstance(datatype, h5t.TypeStringID):
        return bool(datatype.is_variable_str())
    return isinstance(datatype, (h5t.TypeVlenID, h5t.TypeReferenceID))


def read_shape(dataset: Any, name: str) -> list[int]:
    """Return the shape of a dataset, which must have one."""
    space = dataset.get_space()
    if space.get_simple_extent_type() == h5s.NULL:
        raise FormatError(f"tensor {quote(name)} has no shape (an empty HDF5 dataspace)")
    return [int(n) for n in space.get_simple_extent_dims()]


def read_properties(dataset: Any, name: str) -> Any:
    """Return how a dataset is stored; refuse values in other files (CVE-2026-1669)."""
    properties = dataset.get_create_plist()
    if properties.get_external_count():
        raise FormatError(f"tensor {quote(name)} points to another file (external storage)")
    if properties.get_layout() == h5d.VIRTUAL:
        raise FormatError(f"tensor {quote(name)} points to other datasets (virtual layout)")
    return properties


def to_text(name: bytes) -> str:
    """Decode a name; bytes that are not UTF-8 survive the way back."""
    return name.decode("utf-8", "surrogateescape")


def to_bytes(text: str) -> bytes:
    """Encode a name that `to_text` decoded."""
    return text.encode("utf-8", "surrogateescape")


def quote(name: str) -> str:
    """Quote a name for a message."""
    return f"'{shown(name)}'"


class _Link(NamedTuple):
    """One entry of a group."""

    name: bytes
    is_hard: bool
    address: int  # of the object's header, which identifies the object


def list_links(group: Any, heartbeat: Heartbeat) -> list[_Link]:
    """Return the links of a group, in the order in which it keeps them."""
    found: list[tuple[int, _Link]] = []

    def note(name: bytes, link: Any) -> None:  # h5py passes the same object each time
        if len(found) % _STEP == 0:
            heartbeat()
        order = link.corder if link.corder_valid else 0
        found.append((order, _Link(name, link.type == h5l.TYPE_HARD, link.u)))

    group.links.iterate(note, info=True)
    found.sort(key=lambda pair: pair[0])
    return [link for _, link in found]


def list_names(group: Any, heartbeat: Heartbeat) -> list[bytes]:
    """Return the names in a group."""
    return [link.name for link in list_links(group, heartbeat)]


def open_child(group: Any, link: _Link, where: str) -> Any:
    """Open the object of a hard link; refuse links that lead out of this tree."""
    if not link.is_hard:
        full = quote(f"{where}/{to_text(link.name)}")
        raise FormatError(f"{full} is a soft or external link, which is not followed")
    return h5o.open(group, link.name)


def open_path(group: Any, path: bytes, where: str) -> Any:
    """Open what a path of hard links names, or return None where there is nothing."""
    for name in path.split(b"/"):
        if not isinstance(group, h5g.GroupID) or not name:
            return None
        if not group.links.exists(name):
            return None
        info = group.links.get_info(name)
        link = _Link(name, info.type == h5l.TYPE_HARD, info.u)
        group, where = open_child(group, link, where), f"{where}/{to_text(name)}"
    return group


def is_never_written(dataset: Any) -> bool:
    """Return whether a dataset has room for values in its header only."""
    return (
        isinstance(dataset, h5d.DatasetID)
        and dataset.get_space().get_simple_extent_npoints() > 0
        and dataset.get_storage_size() == 0
    )


def read_strings(location: Any, key: bytes, where: str) -> list[bytes]:
    """Read an attribute that must be a list of strings.

    The type is checked first: a damaged one makes libhdf5 crash on reading (HOSTILE.md rule 4).
    """
    attribute = h5a.open(location, key)
    if attribute.get_space().get_simple_extent_type() != h5s.NULL:
        if attribute.shape == (0,):
            return []  # Keras writes the empty list as an array of float64
        if isinstance(attribute.get_type(), h5t.TypeStringID) and len(attribute.shape) == 1:
            values = np.empty(attribute.shape, attribute.dtype)
            attribute.read(values)
            return [value if isinstance(value, bytes) else b"" for value in values.tolist()]
    raise FormatError(f"{quote(to_text(key))} of {quote(where)} is not a list of names")


def read_text(location: Any, key: bytes) -> bytes:
    """Return the bytes of a text attribute, or b'' if there is none."""
    if not h5a.exists(location, key):
        return b""
    attribute = h5a.open(location, key)
    if not isinstance(attribute.get_type(), h5t.TypeStringID) or attribute.shape != ():
        raise FormatError(f"{quote(to_text(key))} is not a string")
    value = np.empty((), attribute.dtype)
    attribute.read(value)
    content = value.item()
    return content if isinstance(content, bytes) else b""


def walk(
    root: Any, heartbeat: Heartbeat, shut: Collection[str] = (), where: str = "", copy: Any = None
) -> Iterator[tuple[str, Any, Any]]:
    """Yield (path, parent group, object) for the whole tree, each group before its content.

    Args:
        root: where to begin.
        heartbeat: sent before every object.
        shut: paths of groups not to enter.
        where: the path of the root.
        copy: an object of another file, in which the caller creates the same groups.

    Raises:
        FormatError: a soft or external link, a group that is reached twice, or a tree too deep.
    """
    files = [h5i.get_file_id(item) for item in (root, copy) if item is not None]
    passed = {h5o.get_info(root).addr}
    entered = [_enter(root, where, heartbeat)]
    cache = 0
    while entered:
        names = sum(group.names_nbytes for group in entered)
        wanted = names + CACHE // 4 if names else CACHE
        if cache != wanted:
            cache = wanted
            _resize_caches(files, cache)
        group, where = entered[-1].group, entered[-1].path
        for link in heartbeat.over(entered[-1].links):
            path = f"{where}/{to_text(link.name)}"
            child = open_child(group, link, where)
            yield path, group, child
            if isinstance(child, h5g.GroupID) and path not in shut:
                if link.address in passed or len(entered) > _MAXIMUM_DEPTH:
                    raise FormatError(f"the group {quote(path)} is linked twice or nested too deep")
                passed.add(link.address)
                entered.append(_enter(child, path, heartbeat))
                break
        else:
            entered.pop()


class _Entered(NamedTuple):
    """A group that is being walked."""

    path: str
    group: Any
    links: Iterator[_Link]  # the remaining ones
    names_nbytes: int


def _enter(group: Any, path: str, heartbeat: Heartbeat) -> _Entered:
    links = list_links(group, heartbeat)
    return _Entered(path, group, iter(links), _measure_names(group, links))


def _resize_caches(files: Sequence[Any], nbytes: int) -> None:
    for file in files:
        file.set_mdc_config(_resize(file.get_mdc_config(), nbytes))


def create_dataset(home: Any, name: bytes, datatype: Any, shape: tuple[int, ...]) -> Any:
    """Return a new tensor in a group, with room for its values, which are written by offset."""
    space = h5s.create_simple(shape) if shape else h5s.create(h5s.SCALAR)
    properties = h5p.create(h5p.DATASET_CREATE)
    properties.set_layout(h5d.CONTIGUOUS)
    # Allocated now, so that there is an offset to write at, and not filled with zeros before.
    properties.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)
    return h5d.create(home, name, datatype, space, properties)


def write_text(target: Any, key: bytes, text: str) -> None:
    """Create a text attribute, as h5py does."""
    datatype = h5t.TypeID.copy(h5t.C_S1)
    datatype.set_size(h5t.VARIABLE)
    datatype.set_cset(h5t.CSET_UTF8)
    made = h5a.create(target, key, datatype, h5s.create(h5s.SCALAR))
    made.write(np.array(text.encode(), dtype=h5py.string_dtype()))


def check_attributes(item: Any, path: str) -> None:
    """Refuse an object with an attribute that a copy would lose."""
    for k in range(h5a.get_num_attrs(item)):
        _check_attribute(h5a.open(item, index=k), path)


def copy_attribute(attribute: Any, target: Any, path: str) -> None:
    """Check an attribute, and copy it byte for byte."""
    _check_attribute(attribute, path)
    space = attribute.get_space()
    made = h5a.create(target, attribute.name, attribute.get_type(), space)
    if space.get_simple_extent_type() != h5s.NULL:
        values = np.empty(attribute.shape, attribute.dtype)
        attribute.read(values)
        made.write(values)


def _check_attribute(attribute: Any, path: str) -> None:
    """Refuse an attribute that refers to another object: a copy would lose the reference."""
    datatype = attribute.get_type()
    text = isinstance(datatype, h5t.TypeStringID)
    if isinstance(datatype, h5t.TypeCompoundID) or (is_pointing(datatype) and not text):
        what = type(datatype).__name__.removeprefix("Type").removesuffix("ID").lower()
        raise FormatError(
            f"the attribute {quote(to_text(attribute.name))} of {quote(path)} has a type that is "
            f"not supported ({what})"
        )
