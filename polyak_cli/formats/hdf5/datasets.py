"""Describe datasets of HDF5 files as tensors: their types, and where their values lie.

Reads values only where they have no place of their own: inside a header, or in the file's heap.
Does not know what Keras stores.  Runs in a child of `processes.sandbox`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5s, h5t

from polyak_cli.errors import FormatError
from polyak_cli.formats.hdf5.chunks import UNDONE, Chunks
from polyak_cli.formats.hdf5.library import describe_type, quote, read_properties, read_shape
from polyak_cli.processes.sandbox import Heartbeat
from polyak_cli.tensors import Extent, Inline, Storage, TensorSpec

#: Filters that are refused, by the names that their users know.
_FILTERS = {
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
_STEP = 500  # chunks between two heartbeats


@dataclass(slots=True)
class Describer:
    """Describes the datasets of one file."""

    size: int  # of the file
    heartbeat: Heartbeat
    file: int = 0  # its number in the table of the checkpoint
    types: dict[bytes, tuple[str, str]] = field(default_factory=dict)  # those described before

    def describe_copied(self, dataset: Any, path: str) -> TensorSpec:
        """Describe a dataset that is copied as it is, by libhdf5 where it is not one run of bytes.

        Raises:
            FormatError: its values are in another file, or of a type that is not carried.
        """
        read_properties(dataset, path)
        dtype, byteorder = self._describe_type(dataset.get_type(), path)
        offset, nbytes = dataset.get_offset(), dataset.get_storage_size()
        storage = None if offset is None else Extent(offset, nbytes, self.file)
        shape = tuple(read_shape(dataset, path))
        return TensorSpec(path, shape, dtype, byteorder, path, storage)

    def _describe_type(self, datatype: Any, name: str) -> tuple[str, str]:
        """Return what `describe_type` does, which is slow, once for all tensors of a type."""
        code = datatype.encode()
        if code not in self.types:
            self.types[code] = describe_type(datatype, name)
        return self.types[code]

    def describe(self, dataset: Any, name: str, location: str) -> TensorSpec:
        """Describe a dataset whose values are to be read by offset.

        Raises:
            FormatError: it is no dataset, was not written to its end, lies elsewhere, or went
                through a filter that is not undone here.
        """
        if not isinstance(dataset, h5d.DatasetID):
            raise FormatError(f"tensor {quote(name)} is a group, not a dataset")
        offset = dataset.get_offset()
        # A dataset with an offset is contiguous and in this file; others need a closer look.
        properties = read_properties(dataset, name) if offset is None else None
        shape = tuple(read_shape(dataset, name))
        datatype = dataset.get_type()
        dtype, byteorder = self._describe_type(datatype, name)
        if isinstance(datatype, h5t.TypeStringID) and datatype.is_variable_str():
            digest = self._digest(dataset, shape)
            return TensorSpec(name, shape, dtype, byteorder, location, None, digest)
        nbytes = math.prod(shape) * datatype.get_size()
        if nbytes == 0:
            storage: Storage = Extent(0, 0, self.file)
        elif offset is not None:
            self._check_inside(offset, nbytes, name)
            storage = Extent(offset, nbytes, self.file)
        else:
            storage = self._find_values(dataset, properties, shape, datatype.get_size(), name)
        return TensorSpec(name, shape, dtype, byteorder, location, storage)

    def _find_values(
        self, dataset: Any, properties: Any, shape: tuple[int, ...], itemsize: int, name: str
    ) -> Storage:
        """Return the place of values that are not one run of bytes."""
        nbytes = math.prod(shape) * itemsize
        kind = properties.get_layout()
        if kind == h5d.COMPACT:
            # At most 64 KiB, because a header message is no larger.
            raw = np.empty(nbytes, np.uint8)
            space = h5s.create_simple(shape)
            dataset.read(space, space, raw, dataset.get_type())
            return Inline(raw.tobytes())
        if kind == h5d.CHUNKED:
            return self._index_chunks(dataset, properties, shape, itemsize, name)
        raise FormatError(
            f"tensor {quote(name)} was never written ({nbytes} bytes are missing); the file was "
            "not saved completely"
        )

    def _index_chunks(
        self, dataset: Any, properties: Any, shape: tuple[int, ...], itemsize: int, name: str
    ) -> Chunks:
        """Return the index of a chunked dataset."""
        filters = tuple(properties.get_filter(k)[0] for k in range(properties.get_nfilters()))
        _check_filters(filters, name)
        chunk_shape = tuple(properties.get_chunk())
        wanted = math.prod(-(-n // c) for n, c in zip(shape, chunk_shape, strict=True))
        # libhdf5 would read a chunk that was never written as zeros.
        found = dataset.get_num_chunks()
        if found < wanted:
            raise FormatError(
                f"tensor {quote(name)} was written in part ({found} of {wanted} chunks); the file "
                "was not saved completely"
            )
        index: dict[tuple[int, ...], tuple[int, int, int]] = {}

        def note(info: Any) -> None:
            position = tuple(k // c for k, c in zip(info.chunk_offset, chunk_shape, strict=True))
            self._check_inside(info.byte_offset, info.size, name)
            index[position] = (info.byte_offset, info.size, info.filter_mask)
            if len(index) % _STEP == 0:
                self.heartbeat()

        dataset.chunk_iter(note)
        return Chunks(shape, chunk_shape, itemsize, filters, index, self.file)

    def _check_inside(self, offset: int, nbytes: int, name: str) -> None:
        """Refuse a range that ends behind the file."""
        if offset + nbytes > self.size:
            raise FormatError(
                f"tensor {quote(name)} lies outside the file: it needs {offset + nbytes} bytes, "
                f"the file has {self.size}; it is truncated or damaged"
            )

    def _digest(self, dataset: Any, shape: tuple[int, ...]) -> str:
        """Digest variable-length strings, which only libhdf5 finds in the file's heap."""
        total = hashlib.sha256()
        values = h5py.Dataset(dataset)
        step = max(1, 1024 // max(1, math.prod(shape[1:])))
        rows: Iterator[Any] = (
            iter([values[()]])
            if not shape
            else (values[k : k + step] for k in range(0, shape[0], step))
        )
        for row in self.heartbeat.over(rows):
            for value in np.ravel(np.asarray(row, dtype=object)):
                total.update(b"%d:%b" % (len(value), value))
        return total.hexdigest()


def _check_filters(filters: Sequence[int], name: str) -> None:
    """Refuse values that went through a filter that `chunks` does not undo."""
    for number in filters:
        if number not in UNDONE:
            what, plugin = _FILTERS.get(number, "unknown"), ""
            if number in _FILTERS and number >= _PLUGINS:
                package = _PACKAGES.get(number, "hdf5plugin")
                plugin = f"; h5py reads it with the package {package}"
            raise FormatError(
                f"tensor {quote(name)} is stored with HDF5 filter {number} ({what}{plugin}), "
                "which is not supported; save it uncompressed or with gzip"
            )
