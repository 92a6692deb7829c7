"""Checkpoints of Orbax: a folder of `_METADATA`, which lists a tree of arrays, and their values.

The values lie in an OCDBT database in the folder (`ocdbt`), or in a folder for each array.  A value
is a chunk of an array (`zarr`), and mostly a whole array or the part of one device.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from polyak_cli.errors import FormatError, shown
from polyak_cli.formats import conversion
from polyak_cli.formats.folder_records import read_record
from polyak_cli.formats.format import Draft, Format, ScanRequest, SkeletonRequest
from polyak_cli.formats.model_folders import OTHER_WEIGHTS, STATE
from polyak_cli.formats.orbax import items, writing
from polyak_cli.formats.orbax.values import (
    Leaf,
    Values,
    describe,
    open_values,
    read_array,
    refuse_shared,
)
from polyak_cli.processes.sandbox import Heartbeat
from polyak_cli.storage import File, open_input
from polyak_cli.storage.local import LocalOutput, name_errors
from polyak_cli.tensors import (
    FLOATS,
    OutputRules,
    Table,
    TensorSpec,
)

#: What an array's value may be: what Orbax calls types of leaves, without their packages.
_ARRAYS = {"jax.Array", "np.ndarray", "scalar"}
#: Files of databases, which one database of an output replaces.
_STORAGE = re.compile(
    r"([^/]+/)?(ocdbt\.process_\d+/)?(manifest\.(ocdbt|[0-9a-f]{16})|d/[0-9a-f]{32})"
)
_STRINGS = "_strings.json"


class _Listed(NamedTuple):
    """What `_METADATA` says."""

    file: File
    arrays: Sequence[Leaf]
    keys: Mapping[str, str]  # name of an array -> its key in the tree
    strings: Collection[str]
    #: None: the list does not say, as those of Orbax 0.4 do not.
    uses_ocdbt: bool | None
    content: Mapping[str, Any]

    def list_keys(self, kept: Collection[str]) -> set[str]:
        """Return the tree's keys without those of arrays that are not kept."""
        left_out = {key for name, key in self.keys.items() if name not in kept}
        return set(self.content["tree_metadata"]) - left_out


# --- the tree -------------------------------------------------------------------------------------


def _read_tree(path: str, heartbeat: Heartbeat) -> _Listed:
    """Read which arrays there are.

    Raises:
        FormatError: `_METADATA` is damaged, or lists something that is not read here.
    """
    file, said = items.read_json(Path(path))
    with name_errors(path):
        tree, uses_ocdbt = said.get("tree_metadata"), said.get("use_ocdbt")
        if not isinstance(tree, dict) or not isinstance(uses_ocdbt, bool | None):
            raise FormatError("has no tree_metadata of an Orbax checkpoint")
        arrays, strings, keys = [], [], {}
        for key, entry in heartbeat.over(tree.items()):
            leaf, kind = _parse_leaf(key, entry)
            if kind in _ARRAYS:
                arrays.append(leaf)
                keys[leaf.name] = key
            elif kind == "string":
                strings.append(leaf.name)
            elif not (isinstance(entry, dict) and entry["value_metadata"].get("skip_deserialize")):
                raise FormatError(
                    f"'{shown(leaf.name)}' is a {shown(kind, 40)}; expected arrays, numbers and "
                    "strings"
                )
        if len(keys) < len(arrays):
            raise FormatError("two of its arrays have the same name")
    return _Listed(file, arrays, keys, strings, uses_ocdbt, said)


def _parse_leaf(key: str, entry: Any) -> tuple[Leaf, str]:
    """Return one leaf of the tree, and what it is."""
    try:
        keys = [each["key"] for each in entry["key_metadata"]]
        kind = entry["value_metadata"]["value_type"]
        path = tuple(str(each) for each in keys if isinstance(each, (str, int)))
        if len(path) != len(keys) or not path or not isinstance(kind, str):
            raise TypeError("its keys are no texts")
    except (LookupError, TypeError) as error:
        raise FormatError(
            f"describes {shown(key, 60)} by something else than keys and a type "
            f"({shown(error, 40)})"
        ) from None
    return Leaf(".".join(path), path), kind


def _open(listed: _Listed, heartbeat: Heartbeat) -> Values:
    """Return the values of a checkpoint."""
    is_sparse = listed.content.get("store_array_data_equal_to_fill_value") is not True
    folder = Path(listed.file.path).parent
    return open_values(folder, listed.uses_ocdbt, is_sparse, heartbeat)


def _is_state(leaf: Leaf, part: Sequence[str]) -> bool:
    """Return whether an array continues a training, and is none of the part that was asked for."""
    if part and leaf.path[: len(part)] == tuple(part):
        return False
    return any(map(items.is_state, leaf.path[:2]))


def _list_step(path: str) -> tuple[File, ...]:
    """Return the file of the step whose item a tree is, if it is one."""
    root = items.find_root(path)
    if root == Path(path).parent:
        return ()
    with open_input(root / items.STEP) as file:
        return (File(str(root / items.STEP), file.version),)


def _find_list(table: Table) -> File:
    """Return the file that lists the arrays of a checkpoint."""
    return next(file for file in table.files[:-3:-1] if Path(file.path).name != items.STEP)


class OrbaxCheckpoint(Format):
    """The folders that `orbax.checkpoint` and Keras's `OrbaxCheckpoint` write."""

    key = "orbax"
    name = "Orbax"
    suffixes = ()
    recalculation = (
        "load the average into the model, and run training data through it in training mode, "
        "without a step of the optimizer"
    )
    can_be_folder = True
    carries_all = True
    can_be_left = True
    has_parts = True
    dtypes = frozenset(FLOATS)

    def scan(self, request: ScanRequest, heartbeat: Heartbeat) -> Table:
        """See `Format.scan`."""
        tree = items.find_tree(request.path, request.key)
        listed = _read_tree(tree.path, heartbeat)
        if text := items.find_missing(tree.part, [leaf.path for leaf in listed.arrays]):
            raise FormatError(f"{shown(tree.path)}: {text}")
        values = _open(listed, heartbeat)
        tensors: dict[str, TensorSpec] = {}
        others: dict[str, TensorSpec] = {}
        state = frozenset(leaf.name for leaf in listed.arrays if _is_state(leaf, tree.part))
        for leaf in heartbeat.over(listed.arrays):
            spec = describe(values, leaf, heartbeat)
            # All are looked at, so that the checkpoint's files are the same either way.
            if leaf.name not in state and leaf.path[: len(tree.part)] == tree.part:
                tensors[leaf.name] = spec
            elif request.with_optimizer:
                others[leaf.name] = spec
        if not tensors:
            raise FormatError(f"{shown(request.path)}: lists no array of a model")
        refuse_shared(values, tree.path)
        record = read_record(items.find_root(request.path))
        return Table(
            path=Path(request.path),
            format=self.key,
            files=(*values.files, listed.file, *_list_step(tree.path)),
            tensors=tensors,
            others=others,
            optimizer=state,
            config="",
            is_polyak_output=bool(record),
            about={"provenance": record} if record else {},
            rules=OutputRules(is_fixed=False, part=request.key),
        )

    def texts(self, table: Table, heartbeat: Heartbeat) -> dict[str, str]:
        """See `Format.texts`: strings of the tree, and the configuration of a Keras model."""
        listed = _read_tree(_find_list(table).path, heartbeat)
        folder = Path(listed.file.path).parent
        found = _read_strings(folder / _STRINGS) if listed.strings else {}
        try:
            found |= _read_strings(folder.parent / "model_config" / _STRINGS)
        except FormatError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
        return found

    def find_root(self, template: Table) -> Path:
        """See `Format.find_root`."""
        return items.find_root(template.path)

    def is_storage(self, name: str) -> bool:
        """See `Format.is_storage`: of databases, what older versions and processes left."""
        return _STORAGE.fullmatch(name) is not None

    def name_outputs(self, template: Table) -> list[str]:
        """See `Format.name_outputs`; values lie in one file, whatever the template's lie in."""
        root, tree = items.find_root(template.path), Path(_find_list(template).path)
        folder = tree.parent.relative_to(root)
        names = [(folder / name).as_posix() for name in (*writing.FILES, tree.name)]
        return names if tree.parent == root else [*names, items.STEP]

    def list_neighbours(self, template: Table) -> dict[str, str]:
        """See `Format.list_neighbours`: other items of the step."""
        tree = Path(_find_list(template).path)
        root = items.find_root(template.path)
        if tree.parent == root:
            return {}
        others = [name for name in items.list_items(root) if name != tree.parent.name]
        return {name: STATE if items.is_state(name) else OTHER_WEIGHTS for name in others}

    def write_skeleton(self, request: SkeletonRequest, heartbeat: Heartbeat) -> Draft:
        """See `Format.write_skeleton`."""
        template = request.template
        scanned = _find_list(template)
        listed = _read_tree(scanned.path, heartbeat)
        values = _open(listed, heartbeat)
        conversion.require_same(listed.file.path, listed.file.version, scanned.version)
        paths = [str(Path(request.output, name)) for name in self.name_outputs(template)]
        manifest_path, data_path, tree_path = paths[:3]
        specs = {**template.tensors, **template.others}
        layout, placements, kept = writing.Layout(), {}, set()
        Path(data_path).parent.mkdir(parents=True, exist_ok=True)
        with (
            conversion.Carrier(template, heartbeat) as carrier,
            LocalOutput(data_path, create=True) as output,
        ):
            for leaf in heartbeat.over(listed.arrays):
                spec = specs[leaf.name]
                if leaf.name in template.optimizer and request.drop_optimizer:
                    continue
                kept.add(leaf.name)
                array, pieces = read_array(values, leaf, heartbeat)
                blocks = [(piece.start, piece.shape) for piece in pieces]
                wanted = request.averaged.get(leaf.name)
                grid = layout.add(writing.Chunked(leaf.name, array, blocks), wanted or spec.dtype)
                if wanted and spec.size:
                    placements[leaf.name] = writing.place(grid, wanted)
                elif not wanted:
                    carrier.carry(spec, writing.Target(output, grid), 0)
            node, manifest = layout.finish()
            output.truncate(layout.end)
            output.write(layout.end, node)
        tree = writing.encode_tree(listed.content, listed.list_keys(kept))
        contents = [(manifest_path, manifest), (tree_path, tree)]
        if len(paths) > len(contents) + 1:
            file, step = items.read_json(Path(template.files[-1].path))
            conversion.require_same(file.path, file.version, template.files[-1].version)
            contents.append((paths[-1], items.encode_items(step, self.list_neighbours(template))))
        for path, content in contents:
            with LocalOutput(path, create=True) as output:
                output.write(0, content)
        return Draft(placements, paths)

    def is_polyak_output(self, path: str, heartbeat: Heartbeat) -> bool:
        """See `Format.is_polyak_output`."""
        heartbeat()
        return bool(read_record(items.find_root(path)))


def _read_strings(path: Path) -> dict[str, str]:
    """Return the strings of a tree."""
    _, said = items.read_json(path)
    if not all(isinstance(text, str) for text in said.values()):
        raise FormatError(f"{shown(path)}: does not map names to strings; it is damaged")
    return said
