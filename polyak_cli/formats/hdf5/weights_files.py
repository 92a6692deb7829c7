"""Create a file of Keras 3 from tensors that lie elsewhere, complete except for values.

Makes groups and allocates datasets; the values are written by offset.  Does not know where Keras
looks for a tensor.  Runs in a child of `processes.sandbox`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from h5py import h5a, h5f, h5g, h5o, h5p, h5s, h5t

from polyak_cli.formats.format import SkeletonRequest
from polyak_cli.formats.hdf5.library import (
    NAMELESS,
    create_dataset,
    explain_errors,
    make_access,
    to_bytes,
    write_text,
)
from polyak_cli.formats.hdf5.skeleton import PROVENANCE
from polyak_cli.formats.hdf5.windows import Window
from polyak_cli.formats.keras.names import DTYPE
from polyak_cli.processes.sandbox import Heartbeat
from polyak_cli.tensors import FLOATS, Placement

#: Bytes of a list that fit into one attribute, with room for a part that is longer than others.
_LONGEST_LIST = 50_000


class Built(NamedTuple):
    """Where the values of a new weights file belong; offsets count from its beginning."""

    placements: Mapping[str, Placement]  # location in the template -> an averaged tensor
    carried: Mapping[str, int]  # name of a carried tensor -> offset of its little-endian values


def build(
    request: SkeletonRequest,
    places: Mapping[str, str],
    output: Window,
    heartbeat: Heartbeat,
    said: Mapping[str, Mapping[str, str | Sequence[str]]] | None = None,
) -> Built:
    """Create a weights file, or a whole model.

    Args:
        request: the output; its template has the tensors.
        places: name of each tensor -> its location in the file, such as ``/layers/dense/vars/0``.
        output: where to write.
        heartbeat: sent before every tensor.
        said: path of a group -> its attributes, texts or lists of names; "" is the file itself.

    Raises:
        OSError: there is no room in the window.
    """
    placements: dict[str, Placement] = {}
    carried: dict[str, int] = {}
    with explain_errors(output, 0):
        made = h5f.create(NAMELESS, h5f.ACC_TRUNC, fapl=make_access(output))
        try:
            groups = {"": h5o.open(made, b"/")}
            for name, place in heartbeat.over(places.items()):
                spec = request.template.tensors[name]
                wanted = request.averaged.get(spec.location)
                parent, _, last = place.rpartition("/")
                home = _make_group(groups, parent)
                dataset = _allocate(home, to_bytes(last), wanted or spec.dtype, spec.shape)
                offset = dataset.get_offset()
                if offset is None:  # it has no elements
                    continue
                if wanted:
                    placements[spec.location] = Placement(offset, wanted, "<")
                else:
                    carried[name] = offset
            for path, attributes in heartbeat.over((said or {}).items()):
                for key, value in attributes.items():
                    if isinstance(value, str):
                        write_text(_make_group(groups, path), to_bytes(key), value)
                    else:
                        _write_names(_make_group(groups, path), key, value)
            write_text(groups[""], PROVENANCE, request.provenance)
        finally:
            made.close()
            if output.error:  # the first cause, whatever errors followed
                raise output.error
    return Built(placements, carried)


def _make_group(groups: dict[str, Any], path: str) -> Any:
    """Return the group of a path, which is made with those above it where it is missing."""
    if path not in groups:
        parent, _, last = path.rpartition("/")
        properties = h5p.create(h5p.GROUP_CREATE)
        properties.set_obj_track_times(False)  # outputs do not depend on the time
        groups[path] = h5g.create(_make_group(groups, parent), to_bytes(last), gcpl=properties)
    return groups[path]


def _write_names(group: Any, key: str, names: Sequence[str]) -> None:
    """Write a list of names, in several parts where it is too long for one, as Keras does."""
    listed = np.array([to_bytes(name) for name in names], "S")
    parts = np.array_split(listed, 1 + listed.nbytes // _LONGEST_LIST)
    for k, part in enumerate(parts):
        named = to_bytes(f"{key}{k}" if len(parts) > 1 else key)
        space = h5s.create_simple(part.shape)
        made = h5a.create(group, named, h5t.py_create(part.dtype), space)
        if part.size:
            made.write(np.ascontiguousarray(part))


def _allocate(home: Any, name: bytes, dtype: str, shape: tuple[int, ...]) -> Any:
    """Allocate a tensor without filling it."""
    code = "V2" if dtype == "bfloat16" else f"<{FLOATS[dtype]}" if dtype in FLOATS else dtype
    datatype = h5t.py_create(np.dtype(code), logical=True)
    made = create_dataset(home, name, datatype, shape)
    if dtype == "bfloat16":
        write_text(made, DTYPE, dtype)
    return made
