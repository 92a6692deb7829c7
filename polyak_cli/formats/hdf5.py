"""HDF5 files that Keras writes: scanned into a table of tensors, and laid out anew for an output.

Reads whole-model `.h5` of every Keras generation, legacy weights-only `.h5`, and `.weights.h5`.
Walks by the names that Keras wrote and through hard links only, and never reads a tensor's values:
those are `pread` by the engine.  Executes nothing of the model configuration.  Runs in a child of
`sandbox`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from polyak_cli.errors import FormatError, OutputError, PolyakError, shown
from polyak_cli.formats import keras_names
from polyak_cli.formats.chunks import UNDONE
from polyak_cli.formats.windows import Window
from polyak_cli.tensors import (
    FLOATS,
    Alive,
    Extent,
    Layout,
    Scan,
    Table,
    TensorSpec,
    read_at,
    read_exactly,
    unreadable,
    write_exactly,
)

# A file may name a filter plugin, which libhdf5 would then load and run: this turns plugins off.
# It is read when the library starts, so it must stand before the import.
os.environ.setdefault("HDF5_PLUGIN_PRELOAD", "::")

import h5py
import numpy as np
from h5py import h5a, h5d, h5f, h5fd, h5g, h5l, h5o, h5p, h5s, h5t

#: A file, or a part of one.
Place = str | Window

NAME = "Keras HDF5"
#: What Keras opens as HDF5; it goes by the suffix, and it is case-sensitive.
SUFFIXES = (".h5", ".hdf5")
WEIGHTS_SUFFIX = ".weights.h5"
CHECKED = False
SIGNATURE = b"\x89HDF\r\n\x1a\n"
PROVENANCE = b"polyak_provenance"
OPTIMIZER = "/optimizer_weights"
#: By this attribute Keras 3 knows bfloat16 in a weights file, where it stands as two bare bytes.
DTYPE = b"dtype"
WHOLE_CAUTIONS = {
    "bfloat16": "Keras cannot load bfloat16 from an .h5 file; use --dtype float32 for a file it "
    "opens",
    "optimizer": "optimizer state is the newest checkpoint's: Keras cannot fit() on from an .h5 "
    "model with optimizer state, and its momentum does not belong to averaged values",
}
WEIGHTS_CAUTIONS = {
    "optimizer": "optimizer state is the newest checkpoint's: its momentum does not belong to "
    "averaged values",
    "ema": "a weights file numbers the optimizer's variables without saying which are EMA slots "
    "and of what; save whole models with model.save()",
}
#: What users would call the content, by its first bytes.
FOREIGN = {
    b"PK\x03\x04": "a zip archive (.keras, .pt or .npz)",
    b"\x1f\x8b": "gzip-compressed",
    b"\x80\x02": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x93NUMPY": "a numpy array",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself",
}
#: Filters that this tool does not undo, by the names their users know.
FILTERS = {
    4: "szip",
    5: "nbit",
    6: "scale-offset",
    305: "lzo",
    307: "bzip2",
    32001: "blosc",
    32004: "lz4",
    32008: "bitshuffle",
    32013: "zfp",
    32015: "zstd",
    32017: "sz",
    32018: "fcidecomp",
    32024: "sz3",
    32026: "blosc2",
    32028: "sperr",
}
#: The package that brings a filter which is neither the library's own nor one of hdf5plugin's.
_PACKAGES = {305: "tables"}
_PLUGINS = 256  # the HDF5 Group gives out numbers from here on; lower ones are the library's own
_FLOAT_TYPES = [
    (name, order, h5t.py_create(np.dtype(order + code)))
    for name, code in FLOATS.items()
    if code.startswith("f")
    for order in "<>"
]
#: Attributes that say what tensors there are, and of which type: any format says that in its way.
_LISTS = re.compile(
    rb".*@(layer_names|weight_names)\d*|@polyak_provenance|.*/vars@name|.*/\d+@dtype", re.DOTALL
)
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_NAMELESS = b"window"  # what libhdf5 calls a file that has no path
_MAXIMUM_DEPTH = 64
_SMALL = 1 << 16  # bytes of a tensor whose values may be copied, to be overwritten
_CACHE = 1 << 20  # bytes of libhdf5's cache of headers
_STEP = 500  # tensors between two signs of life


# --- opening --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: Place) -> Iterator[tuple[Any, int]]:
    """Yield the root group and the size of the file, with h5py's errors made ours.

    Raises:
        FormatError: named by path, for everything that a damaged file makes libhdf5 say.
        OSError: another file, to which it is copied, cannot be written.
    """
    size = _look(path)
    with _explained(path, size):
        name = _NAMELESS if isinstance(path, Window) else os.fsencode(path)
        file = h5f.open(name, h5f.ACC_RDONLY, fapl=_access(path))
        try:
            yield h5o.open(file, b"/"), size
        except FormatError as error:
            raise FormatError(f"{shown(path)}: {error}") from None
        finally:
            if isinstance(path, Window) and path.error:  # whatever else it led to
                raise FormatError(f"{shown(path)}: {unreadable(path.error)}")


def _access(path: Place) -> Any:
    """Return how a file is opened that is laid out, or that is a part of another."""
    access = h5p.create(h5p.FILE_ACCESS)
    access.set_fclose_degree(h5f.CLOSE_STRONG)  # with everything still open in it
    # What Keras writes through h5py; HDF5 2.0 would start from a newer version by itself.
    access.set_libver_bounds(h5f.LIBVER_EARLIEST, h5f.LIBVER_LATEST)
    if isinstance(path, Window):
        access.set_fileobj_driver(h5fd.fileobj_driver, path)
    # libhdf5 lets its cache of headers grow, to hundreds of megabytes for 100,000 tensors, though
    # each is read once; kept small, it is twice as quick too.
    cache = access.get_mdc_config()
    cache.set_initial_size = True
    cache.initial_size = cache.min_size = cache.max_size = _CACHE
    cache.incr_mode = cache.flash_incr_mode = cache.decr_mode = 0
    access.set_mdc_config(cache)
    return access


@contextlib.contextmanager
def _explained(path: Place, size: int) -> Iterator[None]:
    """Say what h5py's errors mean to the user."""
    try:
        yield
    except Exception as error:
        # h5py raises half a dozen types for a damaged file; what comes from elsewhere is a bug.
        if isinstance(error, PolyakError) or not _from_h5py(error):
            raise
        number = _errno(error)
        if number in _NO_ROOM or re.search("file write failed|create file", str(error)):
            raise OSError(number, os.strerror(number)) from None
        raise FormatError(f"{shown(path)}: {_reason(error, size)}") from None


def _errno(error: Exception) -> int:
    """Return the number of the system's error that libhdf5 tells of, 0 where it is of another."""
    numbers = re.findall(r"errno = (\d+)\b", str(error))  # the last: a file may be called so
    return int(numbers[-1]) if numbers else 0


def _look(path: Place) -> int:
    """Look before opening (HOSTILE.md rule 1): a regular file that begins like HDF5; its size."""
    if isinstance(path, Window):
        _check_signature(path, path.descriptor, path.offset, path.size)
        return path.size
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise FormatError(f"{shown(path)}: cannot be read: {error.strerror}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FormatError(f"{shown(path)}: is not a regular file; a checkpoint is one .h5 file")
        if status.st_size == 0:
            raise FormatError(f"{shown(path)}: is empty (0 bytes); save it again or leave it out")
        _check_signature(path, descriptor, 0, status.st_size)
        return status.st_size
    finally:
        os.close(descriptor)


def _check_signature(path: Place, descriptor: int, start: int, size: int) -> None:
    """Refuse what does not begin like HDF5."""
    offset = 0
    while offset < size:  # a user block may stand before the signature
        if _head(path, descriptor, start + offset, len(SIGNATURE)) == SIGNATURE:
            return
        offset = offset * 2 or 512
    head = _head(path, descriptor, start, min(32, size))
    what = next((name for magic, name in FOREIGN.items() if head.startswith(magic)), None)
    begins = f"it is {what}" if what else f"it begins with {head[:8]!r}"
    raise FormatError(f"{shown(path)}: is not an HDF5 file ({begins}); expected a Keras .h5 file")


def _head(path: Place, descriptor: int, offset: int, nbytes: int) -> bytes:
    try:
        return read_at(descriptor, offset, nbytes)
    except FormatError as error:
        raise FormatError(f"{shown(path)}: {error}") from None


def _from_h5py(error: Exception) -> bool:
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    code = trace.tb_frame.f_code.co_filename.replace("\\", "/") if trace else ""
    return "h5py/" in code and not isinstance(error, MemoryError)


def _reason(error: Exception, size: int) -> str:
    """Say in the user's words what libhdf5 means."""
    text = str(error)
    if "unable to lock file" in text:
        return "is still being written by another process; wait until it is closed"
    if "already open for write" in text:  # a mark in the file, which stays when its writer dies
        return (
            "is still being written by another process, or that was killed; wait until it is "
            "closed, or save it again"
        )
    if "truncated file" in text:
        wanted = text.rpartition("stored_eof = ")[2].rstrip(")")
        return f"is truncated: it has {size} bytes, its header says {shown(wanted)}; save it again"
    if _errno(error):
        return f"cannot be read: {os.strerror(_errno(error))}"
    return f"is damaged or not a Keras model file: {shown(text)}"


def is_average(path: Place, alive: Alive) -> bool:
    """Tell whether this tool wrote the file; a file that cannot be read it did not."""
    alive()
    try:
        with _opened(path) as (root, _):
            return bool(h5a.exists(root, PROVENANCE))
    except FormatError:
        return False


def description(path: str, alive: Alive) -> list[str]:
    """Return what a file says of its model: what it is, how it was trained, which Keras."""
    alive()
    with _opened(path) as (root, _):
        keys = (b"model_config", b"training_config", b"keras_version")
        return [_attribute_text(root, key).decode(errors="replace") for key in keys]


def texts(table: Table, alive: Alive) -> dict[str, str]:
    """See `conversion.Source.texts`."""
    return texts_in(table.files[0].path, alive)


def texts_in(path: Place, alive: Alive) -> dict[str, str]:
    """Return the texts of a file; what only lists the names of tensors is not among them."""
    said: dict[str, str] = {}
    with _opened(path) as (root, _):
        below = ((where, item) for where, _, item in _walk(root, alive, {OPTIMIZER}))
        for where, item in (("", root), *below):
            for k in range(h5a.get_num_attrs(item)):
                attribute = h5a.open(item, index=k)
                if _LISTS.fullmatch(b"%b@%b" % (_bytes(where), attribute.name)):
                    continue
                name = _text(attribute.name)
                if not isinstance(attribute.get_type(), h5t.TypeStringID) or attribute.shape != ():
                    raise OutputError(
                        f"the attribute '{shown(name)}' of '{shown(where or '/')}', which is not a "
                        "text, would be lost"
                    )
                text = _text(_attribute_text(item, attribute.name))
                if said.get(name) != text:  # Keras repeats some in /model_weights
                    said[f"{where[1:]}/{name}" if where else name] = text
    return said


# --- scanning -------------------------------------------------------------------------------------


def scan(request: Scan, alive: Alive) -> dict[str, Any]:
    """Return the table of a file as JSON: the model's tensors, the others, a digest of the config.

    Raises:
        FormatError: the file is damaged, hostile, or holds no Keras model; names file and tensor.
    """
    with _opened(request.path) as (root, size):
        reader = _Reader(size, alive)
        home = _model_group(root)
        if home is None:
            found = _weights(root, reader, request.everything)
            if not found["tensors"]:
                raise FormatError(_no_model(root))
            return weights_table(found)
        tensors = reader.model(root, home, request.everything)
        others = reader.others
        state = [row[0] for row in others if row[0].startswith(f"{OPTIMIZER}/")]
        config = _attribute_text(root, b"model_config")
        return {
            "tensors": tensors,
            "others": others,
            "optimizer": state,
            "config": hashlib.sha256(config).hexdigest() if config else "",
            "average": bool(h5a.exists(root, PROVENANCE)),
            "about": _about(root) if request.everything else {},
            "order": reader.layers,
            "slots": keras_names.slots(reader.variables, state),
            "cautions": WHOLE_CAUTIONS,
        }


def _about(root: Any) -> dict[str, str]:
    """Return the short texts in which a file says what it is."""
    keys = {"keras_version": b"keras_version", "backend": b"backend", "provenance": PROVENANCE}
    texts = {name: _attribute_text(root, key) for name, key in keys.items()}
    return {name: text.decode(errors="replace") for name, text in texts.items() if text}


def _model_group(root: Any) -> Any:
    """Return the group that lists the layers, or None for a weights file, which has no lists."""
    if h5a.exists(root, b"layer_names") or h5a.exists(root, b"layer_names0"):
        return root  # legacy weights-only: the same layout one level up
    links = [link for link in _listing(root) if link.name == b"model_weights"]
    return _child(root, links[0], "") if links else None


def _no_model(root: Any) -> str:
    names = _links(root)
    if {b"vars", b"layers", b"_layer_checkpoint_dependencies"} & {*names}:
        return "is a Keras weights file that holds no tensor of a model"
    held = ", ".join(shown(_text(name), 40) for name in names[:5]) or "nothing"
    return f"holds no Keras model: expected the group 'model_weights', found {held}"


def weights(path: Place, alive: Alive, *, everything: bool) -> dict[str, Any]:
    """Read a weights file, or a part of one; `weights_table` makes a table of it.

    Raises:
        FormatError: the file is damaged or hostile; names file and tensor.
    """
    with _opened(path) as (root, size):
        return _weights(root, _Reader(size, alive), everything)


def _weights(root: Any, reader: _Reader, everything: bool) -> dict[str, Any]:
    return {
        "tensors": reader.weights(root, everything),
        "others": reader.others,
        "labels": reader.labels,
        "average": bool(h5a.exists(root, PROVENANCE)),
        "about": _about(root) if everything else {},
    }


def weights_table(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table of a weights file, as `scan` does, from what `weights` found."""
    rows = {row[4]: row for row in found["tensors"]}
    aside = keras_names.optimizers({place: (row[2], row[1]) for place, row in rows.items()})
    groups = tuple(f"{group}/" for group in aside)
    own = sorted((p for p in rows if not p.startswith(groups)), key=keras_names.in_order)
    others = found["others"] + [
        [place, *row[1:]] for place, row in rows.items() if place.startswith(groups)
    ]
    optimizer = ("/optimizer/", *groups)
    moving = keras_names.statistics(own, found["labels"])
    return {
        "tensors": [rows[place] for place in own],
        "others": others,
        "optimizer": [row[0] for row in others if row[0].startswith(optimizer)],
        "config": "",
        "average": found["average"],
        "about": found["about"],
        "statistics": [rows[place][0] for place in moving],
        "suffixes": [WEIGHTS_SUFFIX],
        "cautions": WEIGHTS_CAUTIONS,
    }


@dataclass(slots=True)
class _Reader:
    """Walks one file; every tensor becomes a row of JSON."""

    size: int
    alive: Alive
    others: list[list[Any]] = field(default_factory=list)  # what is not the model's own
    layers: list[str] = field(default_factory=list)  # those that have tensors, as Keras loads them
    variables: dict[str, str] = field(default_factory=dict)  # of a model: tensor -> variable's path
    labels: dict[str, str] = field(default_factory=dict)  # of weights: group -> layer's name
    kinds: dict[bytes, tuple[str, str]] = field(default_factory=dict)  # of types seen before

    def model(self, root: Any, home: Any, everything: bool) -> list[list[Any]]:
        """Return the model's tensors in the order in which Keras lists them.

        Args:
            root: of the file.
            home: the group that lists the layers.
            everything: walk all of the file, and note what is not the model's.
        """
        base = "" if home is root else "/model_weights"
        layers = _names(home, b"layer_names", base or "/")
        if b"top_level_model_weights" in _links(home):
            layers.append(b"top_level_model_weights")
        _refuse_twice(layers, "layer", base or "/")
        places = {f"{base}/{_text(layer)}": layer for layer in layers}
        listed: dict[str, list[str]] = {}  # place of a layer -> places of its tensors
        rows: dict[str, list[Any]] = {}
        known: set[str] = set()
        if everything:
            _check_attributes(root, "/")
        walk = _walk(root, self.alive) if everything else _walk(home, self.alive, where=base)
        for path, _, item in walk:
            if path in places:
                listed[path] = _listed(item, path, places[path])
                known.update(listed[path])
            if everything:
                _check_attributes(item, path)
            if path in known:
                rows[path] = self.row(item, path[len(base) + 1 :], path)
            elif everything:
                self.other(item, path)
        tensors = []
        for place, layer in places.items():
            for tensor in self.layer(listed, place, layer):
                if tensor not in rows:
                    raise FormatError(
                        f"tensor {_quoted(tensor[len(base) + 1 :])} is named but does not exist in "
                        "the file"
                    )
                tensors.append(rows[tensor])
                self.variables[rows[tensor][0]] = tensor[len(place) + 1 :]
        return tensors

    def layer(self, listed: Mapping[str, list[str]], place: str, layer: bytes) -> list[str]:
        """Return where the tensors of a layer lie, which must be there itself."""
        _check_name(layer, _text(layer))
        if place not in listed:
            raise FormatError(f"{_quoted(place)} is named but does not exist in the file")
        if listed[place]:
            self.layers.append(_text(layer))
        return listed[place]

    def weights(self, root: Any, everything: bool) -> list[list[Any]]:
        """Return the tensors of a weights file, which lists none of them."""
        rows = []
        if everything:
            _check_attributes(root, "/")
        for path, _, item in _walk(root, self.alive, () if everything else keras_names.ASIDE):
            if everything:
                _check_attributes(item, path)
            if isinstance(item, h5d.DatasetID) and keras_names.is_variable(path):
                row = self.row(item, path.removeprefix("/"), path)
                if row[2] == "bfloat16" and _attribute_text(item, DTYPE) not in (b"", b"bfloat16"):
                    row[2] = "opaque"
                rows.append(row)
            elif everything:
                self.other(item, path)
            if isinstance(item, h5g.GroupID) and path.endswith("/vars"):
                self.labels[path] = _attribute_text(item, b"name").decode(errors="replace")
        return rows

    def other(self, dataset: Any, path: str) -> None:
        """Note a dataset that is not the model's: optimizer state and whatever else."""
        if isinstance(dataset, h5d.DatasetID):
            _properties(dataset, path)
            kind = self.kind(dataset.get_type(), path)
            offset, nbytes = dataset.get_offset(), dataset.get_storage_size()
            storage = None if offset is None else ["extent", offset, nbytes]
            self.others.append([path, _shape(dataset, path), *kind, path, storage, ""])

    def kind(self, datatype: Any, name: str) -> tuple[str, str]:
        """Return what `_kind` does, which takes its time, once for all tensors of a type."""
        code = datatype.encode()
        if code not in self.kinds:
            self.kinds[code] = _kind(datatype, name)
        return self.kinds[code]

    def row(self, dataset: Any, name: str, location: str) -> list[Any]:
        """Describe one of the model's tensors, having refused what must not be read."""
        if not isinstance(dataset, h5d.DatasetID):
            raise FormatError(f"tensor {_quoted(name)} is a group, not a dataset")
        offset = dataset.get_offset()
        # What has an offset is contiguous and in this file; anything else is looked at closely.
        properties = _properties(dataset, name) if offset is None else None
        shape = _shape(dataset, name)
        datatype = dataset.get_type()
        dtype, byteorder = self.kind(datatype, name)
        if isinstance(datatype, h5t.TypeStringID) and datatype.is_variable_str():
            digest = self.digest(dataset, shape)
            return [name, shape, dtype, byteorder, location, None, digest]
        nbytes = math.prod(shape) * datatype.get_size()
        if nbytes == 0:
            storage: list[Any] = ["extent", 0, 0]
        elif offset is not None:
            self.inside(offset, nbytes, name)
            storage = ["extent", offset, nbytes]
        else:
            storage = self.storage(dataset, properties, shape, datatype.get_size(), name)
        return [name, shape, dtype, byteorder, location, storage, ""]

    def storage(
        self, dataset: Any, properties: Any, shape: list[int], itemsize: int, name: str
    ) -> list[Any]:
        """Return where values lie that are not one run of bytes."""
        nbytes = math.prod(shape) * itemsize
        kind = properties.get_layout()
        if kind == h5d.COMPACT:
            raw = np.empty(nbytes, np.uint8)
            space = h5s.create_simple(tuple(shape))
            dataset.read(space, space, raw, dataset.get_type())
            return ["inline", raw.tobytes().hex()]
        if kind == h5d.CHUNKED:
            return self.chunks(dataset, properties, shape, itemsize, name)
        raise FormatError(
            f"tensor {_quoted(name)} was never written ({nbytes} bytes are missing); "
            "the file was not saved to its end"
        )

    def chunks(
        self, dataset: Any, properties: Any, shape: list[int], itemsize: int, name: str
    ) -> list[Any]:
        """Return the index of a chunked dataset."""
        filters = [properties.get_filter(k)[0] for k in range(properties.get_nfilters())]
        for number in filters:
            if number not in UNDONE:
                what, plugin = FILTERS.get(number, "unknown"), ""
                if number in FILTERS and number >= _PLUGINS:
                    package = _PACKAGES.get(number, "hdf5plugin")
                    plugin = f"; the package {package} brings it to h5py"
                raise FormatError(
                    f"tensor {_quoted(name)} is stored through HDF5 filter {number} ({what}{plugin}"
                    "), which is not read here; save it uncompressed or with gzip"
                )
        chunk_shape = list(properties.get_chunk())
        wanted = math.prod(-(-n // c) for n, c in zip(shape, chunk_shape, strict=True))
        found = dataset.get_num_chunks()
        if found < wanted:
            raise FormatError(
                f"tensor {_quoted(name)} was written in part ({found} of {wanted} chunks); "
                "the file was not saved to its end"
            )
        index: list[Any] = []

        def note(info: Any) -> None:
            position = [k // c for k, c in zip(info.chunk_offset, chunk_shape, strict=True)]
            self.inside(info.byte_offset, info.size, name)
            index.append([position, info.byte_offset, info.size, info.filter_mask])
            if len(index) % _STEP == 0:
                self.alive()

        dataset.chunk_iter(note)
        return ["chunks", shape, chunk_shape, itemsize, filters, index]

    def inside(self, offset: int, nbytes: int, name: str) -> None:
        """Refuse bytes that the file does not have."""
        if offset + nbytes > self.size:
            raise FormatError(
                f"tensor {_quoted(name)} lies outside the file: it needs {offset + nbytes} bytes, "
                f"the file has {self.size}; it is truncated or damaged"
            )

    def digest(self, dataset: Any, shape: list[int]) -> str:
        """Digest variable-length strings, which only libhdf5 can find in the file's heap."""
        total = hashlib.sha256()
        values = h5py.Dataset(dataset)
        step = max(1, 1024 // max(1, math.prod(shape[1:])))
        rows: Iterator[Any] = (
            iter([values[()]])
            if not shape
            else (values[k : k + step] for k in range(0, shape[0], step))
        )
        for row in rows:
            self.alive()
            for value in np.ravel(np.asarray(row, dtype=object)):
                total.update(b"%d:%b" % (len(value), value))
        return total.hexdigest()


def _kind(datatype: Any, name: str) -> tuple[str, str]:
    """Return the dtype's name and byte order; refuse what points elsewhere."""
    size = datatype.get_size()
    order = ">" if _order(datatype) == h5t.ORDER_BE else "<"
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
    if isinstance(datatype, h5t.TypeOpaqueID):  # how h5py stores bfloat16, without a word of it
        return ("bfloat16" if size == 2 else "opaque"), "<"
    if isinstance(datatype, h5t.TypeBitfieldID):
        return "bitfield", order
    if isinstance(datatype, h5t.TypeCompoundID) and not _points(datatype):
        return "compound", "<"
    raise FormatError(
        f"tensor {_quoted(name)} is of an HDF5 type that is not carried here "
        f"({type(datatype).__name__.removeprefix('Type').removesuffix('ID').lower()})"
    )


def _order(datatype: Any) -> int:
    if isinstance(datatype, h5t.TypeEnumID):
        return int(datatype.get_super().get_order())
    if isinstance(datatype, (h5t.TypeFloatID, h5t.TypeIntegerID, h5t.TypeBitfieldID)):
        return int(datatype.get_order())
    return int(h5t.ORDER_LE)


def _points(datatype: Any) -> bool:
    """Tell whether values of a type lie or point outside of themselves, or a part of them does."""
    if isinstance(datatype, h5t.TypeArrayID):
        return _points(datatype.get_super())
    if isinstance(datatype, h5t.TypeCompoundID):
        return any(_points(datatype.get_member_type(k)) for k in range(datatype.get_nmembers()))
    if isinstance(datatype, h5t.TypeStringID):
        return bool(datatype.is_variable_str())
    return isinstance(datatype, (h5t.TypeVlenID, h5t.TypeReferenceID))


def _shape(dataset: Any, name: str) -> list[int]:
    space = dataset.get_space()
    if space.get_simple_extent_type() == h5s.NULL:
        raise FormatError(f"tensor {_quoted(name)} has no shape (an empty HDF5 dataspace)")
    return [int(n) for n in space.get_simple_extent_dims()]


def _properties(dataset: Any, name: str) -> Any:
    """Return how a dataset is stored, having refused values in other files (CVE-2026-1669)."""
    properties = dataset.get_create_plist()
    if properties.get_external_count():
        raise FormatError(f"tensor {_quoted(name)} points to another file (external storage)")
    if properties.get_layout() == h5d.VIRTUAL:
        raise FormatError(f"tensor {_quoted(name)} points to other datasets (virtual layout)")
    return properties


# --- names, links and attributes ------------------------------------------------------------------


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _quoted(name: str) -> str:
    return f"'{shown(name)}'"


class _Link(NamedTuple):
    """What a group says of something that it holds."""

    name: bytes
    is_hard: bool
    address: int  # of the object's header, by which it is known


def _listing(group: Any) -> list[_Link]:
    """Return what a group holds, in the order in which it keeps it."""
    found: list[tuple[int, _Link]] = []

    def note(name: bytes, link: Any) -> None:  # the next one has the same object
        order = link.corder if link.corder_valid else 0
        found.append((order, _Link(name, link.type == h5l.TYPE_HARD, link.u)))

    group.links.iterate(note, info=True)
    found.sort(key=lambda pair: pair[0])
    return [link for _, link in found]


def _links(group: Any) -> list[bytes]:
    """Return the names in a group."""
    return [link.name for link in _listing(group)]


def _child(group: Any, link: _Link, where: str) -> Any:
    """Open what a hard link names; soft and external links lead to places not of this tree."""
    if not link.is_hard:
        full = _quoted(f"{where}/{_text(link.name)}")
        raise FormatError(f"{full} is a soft or external link, which is not followed")
    return h5o.open(group, link.name)


def _listed(group: Any, place: str, layer: bytes) -> list[str]:
    """Return where the tensors lie that a layer's group lists."""
    if not isinstance(group, h5g.GroupID):
        raise FormatError(f"{_quoted(place)} is not a group")
    names = _names(group, b"weight_names", place)
    _refuse_twice(names, "weight", _text(layer))
    for name in names:
        _check_name(name, f"{_text(layer)}/{_text(name)}")
    return [f"{place}/{_text(name)}" for name in names]


def _check_name(name: bytes, what: str) -> None:
    if any(part in (b"", b".", b"..") for part in name.split(b"/")):
        raise FormatError(f"the name {_quoted(what)} is empty, absolute or relative")


def _refuse_twice(names: Sequence[bytes], what: str, where: str) -> None:
    ((often, times),) = Counter(names).most_common(1) or [(b"", 1)]
    if times > 1:
        raise FormatError(f"the {what} {_quoted(_text(often))} is listed twice in {_quoted(where)}")


def _names(location: Any, key: bytes, where: str) -> list[bytes]:
    """Return a list of names, which Keras splits (key0, key1, ...) when it is over 64 KB."""
    if h5a.exists(location, key):
        return _strings(location, key, where)
    names: list[bytes] = []
    part = 0
    while h5a.exists(location, key + b"%d" % part):
        names += _strings(location, key + b"%d" % part, where)
        part += 1
    if not part:
        raise FormatError(f"{_quoted(where)} has no list {_quoted(_text(key))} of its content")
    return names


def _strings(location: Any, key: bytes, where: str) -> list[bytes]:
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
    raise FormatError(f"{_quoted(_text(key))} of {_quoted(where)} is not a list of names")


def _attribute_text(location: Any, key: bytes) -> bytes:
    """Return the bytes of a string attribute, or b'' where there is none."""
    if not h5a.exists(location, key):
        return b""
    attribute = h5a.open(location, key)
    if not isinstance(attribute.get_type(), h5t.TypeStringID) or attribute.shape != ():
        raise FormatError(f"{_quoted(_text(key))} is not a text")
    value = np.empty((), attribute.dtype)
    attribute.read(value)
    content = value.item()
    return content if isinstance(content, bytes) else b""


def _walk(
    root: Any, alive: Alive, shut: Collection[str] = (), where: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yield (path, parent group, object) for all of the tree, groups before what they hold.

    Args:
        root: where to begin.
        alive: told before every object.
        shut: paths of groups not to enter.
        where: the path of the root.

    Raises:
        FormatError: a soft or external link, a group that is reached twice, or a tree too deep.
    """
    passed = {h5o.get_info(root).addr}
    entered = [(where, root, iter(_listing(root)))]
    while entered:
        where, group, links = entered[-1]
        for link in links:
            alive()
            path = f"{where}/{_text(link.name)}"
            child = _child(group, link, where)
            yield path, group, child
            if isinstance(child, h5g.GroupID) and path not in shut:
                if link.address in passed or len(entered) > _MAXIMUM_DEPTH:
                    raise FormatError(
                        f"the group {_quoted(path)} is linked twice or nested too deep"
                    )
                passed.add(link.address)
                entered.append((path, child, iter(_listing(child))))
                break
        else:
            entered.pop()


# --- laying out -----------------------------------------------------------------------------------


def lay_out(request: Layout, alive: Alive) -> dict[str, Any]:
    """See `tensors.Format.lay_out`.

    Attributes, groups, configuration and carried tensors are copied.  The file is built anew, not
    copied and edited: HDF5 leaves what is deleted as dead space.
    """
    (template,) = request.template.files
    return merge(request, [template.path], alive)


def merge(
    request: Layout, paths: Sequence[Place], alive: Alive, output: Window | None = None
) -> dict[str, Any]:
    """Lay out one file like several that share a tree: the parts of a weights file.

    Args:
        request: what to lay out.
        paths: the parts.
        alive: told now and then.
        output: where to write; None for a file of its own.  Offsets count from its beginning.

    Raises:
        OSError: there is no room in the window.
    """
    moved = {}
    name = _NAMELESS if output else os.fsencode(request.output)
    with _explained(paths[-1], 0):
        made = h5f.create(name, h5f.ACC_TRUNC, fapl=_access(output or request.output))
        try:
            copy = _Copy(request, {"": h5o.open(made, b"/")})
            if len(paths) == 1:
                copy.whole = _whole_groups(request.template, request.averaged)
            for path in paths:
                with _opened(path) as (root, _):
                    copy.tree(root, alive)
                moved[path], copy.moved = copy.moved, []
            copy.provenance()
        finally:
            made.close()
            if output and output.error:  # whatever else it led to
                raise output.error
    for path, runs in moved.items():
        _move(path, output or request.output, runs, alive)
    return {"places": copy.averaged}


def check(path: str, alive: Alive) -> None:
    """See `tensors.Format.check`; what Keras writes has no checksums, and `chunks` looks at its."""


def seal(output: str, laid_out: Mapping[str, Any]) -> None:
    """See `tensors.Format.seal`; nothing is left to do."""


def _whole_groups(table: Table, averaged: Mapping[str, str]) -> dict[str, list[TensorSpec]]:
    """Return the groups that may be copied as they are, and what is averaged in each.

    Those that hold small tensors only, of unchanged type.  None at all where tensors share their
    storage: the links between them would be lost.
    """
    specs = [*table.tensors.values(), *table.others.values()]
    offsets = [s.storage.offset for s in specs if isinstance(s.storage, Extent) and s.nbytes]
    if len(set(offsets)) < len(offsets):
        return {}
    groups: dict[str, list[TensorSpec]] = {}
    large = set()
    for spec in table.tensors.values():
        parts = spec.location.split("/")
        depth = 3 if parts[1] == "model_weights" else 2
        group = "/".join(parts[: -1 if _is_weights(table) else depth])
        held = groups.setdefault(group, [])
        plain = isinstance(spec.storage, Extent) and spec.nbytes <= _SMALL
        if not plain or averaged.get(spec.location, spec.dtype) != spec.dtype:
            large.add(group)
        elif spec.location in averaged and spec.nbytes:
            held.append(spec)
    return {group: held for group, held in groups.items() if group not in large}


def _is_weights(table: Table) -> bool:
    return table.suffixes == (WEIGHTS_SUFFIX,)


def _optimizers(table: Table) -> set[str]:
    """Return the groups that hold the optimizer's state."""
    if not _is_weights(table):
        return {OPTIMIZER}
    return {"/optimizer", *(keras_names.optimizer_of(name) for name in table.optimizer)}


@dataclass(slots=True)
class _Copy:
    """The output that grows while the template's tree is walked."""

    request: Layout
    groups: dict[str, Any]
    linked: list[tuple[str, Any, Any]] = field(default_factory=list)  # what has several names
    places: dict[tuple[int, int], str] = field(default_factory=dict)  # where it is by now
    dropped: Collection[str] = ()
    whole: Mapping[str, Sequence[TensorSpec]] = field(default_factory=dict)  # see `_whole_groups`
    averaged: dict[str, tuple[int, str, str]] = field(default_factory=dict)
    moved: list[tuple[int, int, int]] = field(default_factory=list)  # from, to, bytes

    def __post_init__(self) -> None:
        if self.request.drop_optimizer:
            self.dropped = _optimizers(self.request.template)

    def tree(self, root: Any, alive: Alive) -> None:
        """Copy a template, or one part of it."""
        self.linked.clear()
        self.places.clear()
        self.attributes(root, self.groups[""], "/")
        for path, parent, item in _walk(root, alive, {*self.whole, *self.dropped}):
            self.item(path, parent, item)
        self.links()

    def item(self, path: str, parent: Any, item: Any) -> None:
        """Copy one object of the template, unless it is dropped."""
        if path in self.dropped:
            return
        if path in self.groups:  # an earlier part has it too
            if not isinstance(item, h5g.GroupID):
                raise FormatError(f"tensor {_quoted(path)} is a group in another part")
            self.attributes(item, self.groups[path], path)
            return
        info = h5o.get_info(item)
        if info.rc > 1 and isinstance(item, h5d.DatasetID):
            # Two averaged names of one tensor part: an older checkpoint may keep them apart.
            if path not in self.request.averaged:
                self.linked.append((path, parent, item))
                return
            self.places.setdefault((info.fileno, info.addr), path)
        self.make(path, parent, item)

    def links(self) -> None:
        """Copy what has several names, once; its other names are hard links again."""
        for path, parent, item in self.linked:
            info = h5o.get_info(item)
            first = self.places.setdefault((info.fileno, info.addr), path)
            if first == path:
                self.make(path, parent, item)
                continue
            where, _, last = path.rpartition("/")
            there, _, its_name = first.rpartition("/")
            target = self.groups[where]
            target.links.create_hard(_bytes(last), self.groups[there], _bytes(its_name))

    def make(self, path: str, parent: Any, item: Any) -> None:
        """Create one object like the template's."""
        where, _, last = path.rpartition("/")
        target, name = self.groups[where], _bytes(last)
        if path in self.whole:
            self.copy_whole(path, parent, target, name)
        elif isinstance(item, h5g.GroupID):
            self.groups[path] = self.group(item, target, name, path)
        elif path in self.request.averaged:
            wanted = self.request.averaged[path]
            made, byteorder = self.room(item, target, name, path, wanted)
            if made.get_offset() is not None:
                self.averaged[path] = (made.get_offset(), wanted, byteorder)
        elif _is_large(item, path):
            made, _ = self.room(item, target, name, path, None)
            self.moved.append((item.get_offset(), made.get_offset(), item.get_storage_size()))
        else:
            h5o.copy(parent, name, target, name)

    def copy_whole(self, path: str, parent: Any, target: Any, name: bytes) -> None:
        """Let libhdf5 copy a group of small tensors at once, which is ten times as fast."""
        h5o.copy(parent, name, target, name)
        for spec in self.whole[path]:
            made = h5d.open(self.groups[""], _bytes(spec.location))
            wanted = self.request.averaged[spec.location]
            self.averaged[spec.location] = (made.get_offset(), wanted, spec.byteorder)

    def group(self, source: Any, target: Any, name: bytes, path: str) -> Any:
        """Create a group like its source."""
        properties = source.get_create_plist()
        properties.set_obj_track_times(False)  # the same bytes at any time of day
        made = h5g.create(target, name, gcpl=properties)
        self.attributes(source, made, path)
        return made

    def room(
        self, source: Any, target: Any, name: bytes, path: str, wanted: str | None
    ) -> tuple[Any, str]:
        """Allocate a tensor without filling it: it is written by offset.  None: of its own type."""
        dtype, byteorder = _kind(source.get_type(), path)
        datatype = source.get_type()
        if wanted and wanted != dtype:
            byteorder = "<"
            code = "V2" if wanted == "bfloat16" else byteorder + FLOATS[wanted]
            datatype = h5t.py_create(np.dtype(code))
        shape = tuple(_shape(source, path))
        space = h5s.create_simple(shape) if shape else h5s.create(h5s.SCALAR)
        properties = h5p.create(h5p.DATASET_CREATE)
        properties.set_layout(h5d.CONTIGUOUS)
        properties.set_alloc_time(h5d.ALLOC_TIME_EARLY)
        properties.set_fill_time(h5d.FILL_TIME_NEVER)
        properties.set_obj_track_times(False)
        made = h5d.create(target, name, datatype, space, properties)
        self.attributes(source, made, path)
        if wanted and wanted != dtype and _is_weights(self.request.template):
            _say_dtype(made, wanted)
        return made, byteorder

    def attributes(self, source: Any, target: Any, path: str) -> None:
        """Copy the attributes byte for byte, of types that point nowhere."""
        for k in range(h5a.get_num_attrs(source)):
            attribute = h5a.open(source, index=k)
            if attribute.name == PROVENANCE and path == "/":
                continue  # the template was an average itself; this one has its own
            if h5a.exists(target, attribute.name):
                continue  # of an earlier part
            _copy_attribute(attribute, target, path)

    def provenance(self) -> None:
        """Write down where the average comes from."""
        _write_text(self.groups[""], PROVENANCE, self.request.provenance)


def _say_dtype(dataset: Any, dtype: str) -> None:
    """Have Keras know a type that changed to or from bfloat16."""
    if h5a.exists(dataset, DTYPE):
        h5a.delete(dataset, DTYPE)
    if dtype == "bfloat16":
        _write_text(dataset, DTYPE, dtype)


def _write_text(target: Any, key: bytes, text: str) -> None:
    datatype = h5t.TypeID.copy(h5t.C_S1)
    datatype.set_size(h5t.VARIABLE)
    datatype.set_cset(h5t.CSET_UTF8)
    made = h5a.create(target, key, datatype, h5s.create(h5s.SCALAR))
    made.write(np.array(text.encode(), dtype=h5py.string_dtype()))


def _is_large(item: Any, path: str) -> bool:
    """Tell whether a carried object is one long run of bytes; refuse values in other files."""
    if not isinstance(item, h5d.DatasetID):
        return False
    _properties(item, path)
    datatype = item.get_type()
    in_heap = isinstance(datatype, h5t.TypeStringID) and datatype.is_variable_str()
    return item.get_offset() is not None and item.get_storage_size() > _SMALL and not in_heap


def _move(
    template: Place, output: Place, moved: Sequence[tuple[int, int, int]], alive: Alive
) -> None:
    """Copy large carried tensors by offset: libhdf5 would give no sign of life meanwhile."""
    buffer = np.empty(1 << 20, np.uint8)
    with _bytes_of(template, "rb") as source, _bytes_of(output, "r+b") as target:
        for start, to, nbytes in moved:
            for done in range(0, nbytes, len(buffer)):
                piece = buffer[: nbytes - done]
                try:
                    read_exactly(source.descriptor, source.offset + start + done, piece)
                except FormatError as error:
                    raise FormatError(f"{shown(template)}: {error}") from None
                write_exactly(target.descriptor, target.offset + to + done, piece)
                alive()


@contextlib.contextmanager
def _bytes_of(path: Place, mode: str) -> Iterator[Window]:
    """Yield a file, or the part of one, for reading and writing by offset."""
    if isinstance(path, Window):
        yield path
        return
    with open(path, mode) as file:
        yield Window(path, file.fileno(), 0)


def _check_attributes(item: Any, path: str) -> None:
    for k in range(h5a.get_num_attrs(item)):
        _check_attribute(h5a.open(item, index=k), path)


def _copy_attribute(attribute: Any, target: Any, path: str) -> None:
    _check_attribute(attribute, path)
    space = attribute.get_space()
    made = h5a.create(target, attribute.name, attribute.get_type(), space)
    if space.get_simple_extent_type() != h5s.NULL:
        values = np.empty(attribute.shape, attribute.dtype)
        attribute.read(values)
        made.write(values)


def _check_attribute(attribute: Any, path: str) -> None:
    """Refuse an attribute that points to something else, which a copy would lose."""
    datatype = attribute.get_type()
    text = isinstance(datatype, h5t.TypeStringID)
    if isinstance(datatype, h5t.TypeCompoundID) or (_points(datatype) and not text):
        what = type(datatype).__name__.removeprefix("Type").removesuffix("ID").lower()
        raise FormatError(
            f"the attribute {_quoted(_text(attribute.name))} of {_quoted(path)} is of a type that "
            f"is not carried here ({what})"
        )
