"""Write an output like a Keras HDF5 file, complete except for its averaged tensors.

Copies attributes, groups, configuration and carried tensors, and allocates the averaged tensors.
Does not know their values, which the engine writes by offset.  Runs in a child of
`processes.sandbox`.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from h5py import h5a, h5d, h5f, h5g, h5o, h5t

from polyak_cli.errors import FormatError
from polyak_cli.formats.format import Draft, SkeletonRequest
from polyak_cli.formats.hdf5.library import (
    CACHE,
    NAMELESS,
    Place,
    copy_attribute,
    create_dataset,
    describe_type,
    explain_errors,
    make_access,
    open_file,
    quote,
    read_properties,
    read_shape,
    to_bytes,
    walk,
    write_text,
)
from polyak_cli.formats.hdf5.windows import Window
from polyak_cli.formats.keras import names as keras_names
from polyak_cli.formats.keras.names import DTYPE, OPTIMIZER, WEIGHTS_SUFFIX
from polyak_cli.processes.sandbox import Heartbeat
from polyak_cli.storage import InputFile, open_input
from polyak_cli.storage.local import LocalOutput, copy_range, name_errors
from polyak_cli.tensors import FLOATS, Extent, Placement, Table, TensorSpec

PROVENANCE = b"polyak_provenance"
_SMALL = 1 << 16  # bytes of a tensor whose values may be copied, to be overwritten
_NAMES = CACHE // 4  # bytes of names in one group that may be copied at once
_TENSORS = 50_000  # tensors that may be copied at once: half a second


def write_skeleton(request: SkeletonRequest, heartbeat: Heartbeat) -> Draft:
    """See `Format.write_skeleton`.

    Attributes, groups, configuration and carried tensors are copied.  The file is built from the
    start, not copied and edited: HDF5 keeps deleted objects as dead space.
    """
    (template,) = request.template.files
    return merge(request, [template.path], heartbeat)


def merge(
    request: SkeletonRequest,
    paths: Sequence[Place],
    heartbeat: Heartbeat,
    output: Window | None = None,
) -> Draft:
    """Write one skeleton like several files that share a tree: the parts of a weights file.

    Args:
        request: the output to write.
        paths: the parts.
        heartbeat: sent before every object.
        output: where to write; None for a file of its own.  Offsets count from its beginning.

    Raises:
        OSError: there is no room in the window.
    """
    moved = {}
    name = NAMELESS if output else os.fsencode(request.output)
    with explain_errors(paths[-1], 0):
        made = h5f.create(name, h5f.ACC_TRUNC, fapl=make_access(output or request.output))
        try:
            copy = _Copy(request, heartbeat, {"": h5o.open(made, b"/")})
            if len(paths) == 1:
                copy.whole = _find_whole_groups(request.template, request.averaged)
            for path in paths:
                with open_file(path) as (root, _):
                    copy.copy_tree(root)
                moved[path], copy.moved = copy.moved, []
            copy.write_provenance()
        finally:
            made.close()
            if output and output.error:  # the first cause, whatever errors followed
                raise output.error
    for path, runs in moved.items():
        _copy_large(path, output or request.output, runs, heartbeat)
    placements = {where: Placement(*place) for where, place in copy.averaged.items()}
    return Draft(placements)


def _find_whole_groups(table: Table, averaged: Mapping[str, str]) -> dict[str, list[TensorSpec]]:
    """Return the groups that are copied as they are, each with its averaged tensors.

    Those that hold small tensors only, of unchanged type, and not so many that libhdf5 would be
    busy too long without a heartbeat.  None at all where tensors share their storage: the links
    between them would be lost.
    """
    specs = [*table.tensors.values(), *table.others.values()]
    offsets = [s.storage.offset for s in specs if isinstance(s.storage, Extent) and s.nbytes]
    if len(set(offsets)) < len(offsets):
        return {}
    groups: dict[str, list[TensorSpec]] = {}
    names: Counter[str] = Counter()  # group -> bytes of the names in it
    large = set()
    for spec in table.tensors.values():
        parts = spec.location.split("/")
        depth = 3 if parts[1] == "model_weights" else 2
        group = "/".join(parts[: -1 if _is_weights(table) else depth])
        held = groups.setdefault(group, [])
        parent, _, name = spec.location.rpartition("/")
        names[parent] += len(name)
        crowded = names[parent] > _NAMES or len(held) > _TENSORS
        plain = isinstance(spec.storage, Extent) and spec.nbytes <= _SMALL
        if crowded or not plain or averaged.get(spec.location, spec.dtype) != spec.dtype:
            large.add(group)
        elif spec.location in averaged and spec.nbytes:
            held.append(spec)
    return {group: held for group, held in groups.items() if group not in large}


def _is_weights(table: Table) -> bool:
    return table.rules.suffixes == (WEIGHTS_SUFFIX,)


def _find_optimizers(table: Table) -> set[str]:
    """Return the groups that hold the optimizer's state."""
    if not _is_weights(table):
        return {OPTIMIZER}
    return {"/optimizer", *(keras_names.find_optimizer_group(name) for name in table.optimizer)}


@dataclass(slots=True)
class _Copy:
    """Builds the output while the template's tree is walked."""

    request: SkeletonRequest
    heartbeat: Heartbeat
    groups: dict[str, Any]
    linked: list[tuple[str, Any, Any]] = field(default_factory=list)  # objects with several names
    places: dict[tuple[int, int], str] = field(default_factory=dict)  # object -> output path
    dropped: Collection[str] = ()
    whole: Mapping[str, Sequence[TensorSpec]] = field(
        default_factory=dict
    )  # see `_find_whole_groups`
    averaged: dict[str, tuple[int, str, str]] = field(default_factory=dict)
    moved: list[tuple[int, int, int]] = field(default_factory=list)  # from, to, bytes

    def __post_init__(self) -> None:
        if self.request.drop_optimizer:
            self.dropped = _find_optimizers(self.request.template)

    def copy_tree(self, root: Any) -> None:
        """Copy a template, or one part of it."""
        self.linked.clear()
        self.places.clear()
        self.copy_attributes(root, self.groups[""], "/")
        for path, parent, item in walk(
            root, self.heartbeat, {*self.whole, *self.dropped}, copy=self.groups[""]
        ):
            self.copy_item(path, parent, item)
        self.copy_links()

    def copy_item(self, path: str, parent: Any, item: Any) -> None:
        """Copy one object of the template, unless it is dropped."""
        if path in self.dropped:
            return
        if path in self.groups:  # an earlier part has this group too
            if not isinstance(item, h5g.GroupID):
                raise FormatError(f"tensor {quote(path)} is a group in another part")
            self.copy_attributes(item, self.groups[path], path)
            return
        info = h5o.get_info(item)
        if info.rc > 1 and isinstance(item, h5d.DatasetID):
            # Two averaged names of one tensor part: an older checkpoint may keep them apart.
            if path not in self.request.averaged:
                self.linked.append((path, parent, item))
                return
            self.places.setdefault((info.fileno, info.addr), path)
        self.create(path, parent, item)

    def copy_links(self) -> None:
        """Copy objects with several names once; their other names become hard links again."""
        for path, parent, item in self.heartbeat.over(self.linked):
            info = h5o.get_info(item)
            first = self.places.setdefault((info.fileno, info.addr), path)
            if first == path:
                self.create(path, parent, item)
                continue
            where, _, last = path.rpartition("/")
            there, _, its_name = first.rpartition("/")
            target = self.groups[where]
            target.links.create_hard(to_bytes(last), self.groups[there], to_bytes(its_name))

    def create(self, path: str, parent: Any, item: Any) -> None:
        """Create an object like the template's."""
        where, _, last = path.rpartition("/")
        target, name = self.groups[where], to_bytes(last)
        if path in self.whole:
            self.copy_whole(path, parent, target, name)
        elif isinstance(item, h5g.GroupID):
            self.groups[path] = self.create_group(item, target, name, path)
        elif path in self.request.averaged:
            wanted = self.request.averaged[path]
            made, byteorder = self.allocate(item, target, name, path, wanted)
            if made.get_offset() is not None:
                self.averaged[path] = (made.get_offset(), wanted, byteorder)
        elif _is_large(item, path):
            made, _ = self.allocate(item, target, name, path, None)
            self.moved.append((item.get_offset(), made.get_offset(), item.get_storage_size()))
        else:
            h5o.copy(parent, name, target, name)

    def copy_whole(self, path: str, parent: Any, target: Any, name: bytes) -> None:
        """Let libhdf5 copy a group of small tensors at once, which is ten times as fast."""
        h5o.copy(parent, name, target, name)
        for spec in self.heartbeat.over(self.whole[path]):
            made = h5d.open(self.groups[""], to_bytes(spec.location))
            wanted = self.request.averaged[spec.location]
            self.averaged[spec.location] = (made.get_offset(), wanted, spec.byteorder)

    def create_group(self, source: Any, target: Any, name: bytes, path: str) -> Any:
        """Create a group like its source."""
        properties = source.get_create_plist()
        properties.set_obj_track_times(False)  # outputs do not depend on the time
        made = h5g.create(target, name, gcpl=properties)
        self.copy_attributes(source, made, path)
        return made

    def allocate(
        self, source: Any, target: Any, name: bytes, path: str, wanted: str | None
    ) -> tuple[Any, str]:
        """Allocate a tensor without filling it, of the dtype ``wanted`` or else its source's."""
        dtype, byteorder = describe_type(source.get_type(), path)
        datatype = source.get_type()
        if wanted and wanted != dtype:
            byteorder = "<"
            code = "V2" if wanted == "bfloat16" else byteorder + FLOATS[wanted]
            datatype = h5t.py_create(np.dtype(code))
        made = create_dataset(target, name, datatype, tuple(read_shape(source, path)))
        self.copy_attributes(source, made, path)
        if wanted and wanted != dtype and _is_weights(self.request.template):
            _note_dtype(made, wanted)
        return made, byteorder

    def copy_attributes(self, source: Any, target: Any, path: str) -> None:
        """Copy the attributes byte for byte, of types that point nowhere."""
        for k in range(h5a.get_num_attrs(source)):
            attribute = h5a.open(source, index=k)
            if attribute.name == PROVENANCE and path == "/":
                continue  # the template is an average itself; the output gets its own record
            if h5a.exists(target, attribute.name):
                continue  # an earlier part had it
            copy_attribute(attribute, target, path)

    def write_provenance(self) -> None:
        """Write the record of where the average comes from."""
        write_text(self.groups[""], PROVENANCE, self.request.provenance)


def _note_dtype(dataset: Any, dtype: str) -> None:
    """Note a type that changed to or from bfloat16, in the way that Keras reads it."""
    if h5a.exists(dataset, DTYPE):
        h5a.delete(dataset, DTYPE)
    if dtype == "bfloat16":
        write_text(dataset, DTYPE, dtype)


def _is_large(item: Any, path: str) -> bool:
    """Return whether a carried object is one long run of bytes; refuse values in other files."""
    if not isinstance(item, h5d.DatasetID):
        return False
    read_properties(item, path)
    datatype = item.get_type()
    in_heap = isinstance(datatype, h5t.TypeStringID) and datatype.is_variable_str()
    return item.get_offset() is not None and item.get_storage_size() > _SMALL and not in_heap


def _copy_large(
    template: Place, output: Place, moved: Sequence[tuple[int, int, int]], heartbeat: Heartbeat
) -> None:
    """Copy large carried tensors by offset: inside libhdf5 no heartbeat would be sent."""
    with contextlib.ExitStack() as stack:
        source: InputFile
        target: LocalOutput
        if isinstance(template, Window):
            source, begin = template.file, template.offset
        else:
            source, begin = stack.enter_context(open_input(template)), 0
        if isinstance(output, Window):
            target, end = LocalOutput.borrow(output.name, output.descriptor), output.offset
        else:
            target, end = stack.enter_context(LocalOutput(output)), 0
        stack.enter_context(name_errors(str(template)))
        for start, to, nbytes in moved:
            copy_range(source, begin + start, target, end + to, nbytes, heartbeat)
