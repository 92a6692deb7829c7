"""Find the tree of arrays in a step of a run, which may hold several items.

A `CheckpointManager` saves items for each step, such as "model", "ema" and "metrics", each in a
folder of its own.  Those with `_METADATA` are trees of arrays; the step's `_CHECKPOINT_METADATA`
lists them all.  Knows no array.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from polyak_cli.errors import FormatError, shown, word_size
from polyak_cli.formats import zips
from polyak_cli.storage import File, open_input
from polyak_cli.storage.local import name_errors

TREE, STEP = "_METADATA", "_CHECKPOINT_METADATA"
#: Under what programs keep optimizers and metrics: Keras; Flax's TrainState and MaxText; T5X; NNX.
_STATE = re.compile(
    r"optimizer(_variables|_states?)?|opt(_states?)?|metrics(_variables)?|param_states|tx"
)
_MOST_NAMED = 10
#: A folder of an item that describes its arrays further.
_ARRAYS = "array_metadatas"


class Tree(NamedTuple):
    """Where the tree of a checkpoint is, and which part of it was asked for."""

    path: str  # of its `_METADATA`
    part: tuple[str, ...]  # keys of the tree under which the model is; () for all of it


def is_state(name: str) -> bool:
    """Return whether an item, or what is under a key of a tree, continues a training."""
    return _STATE.fullmatch(name) is not None


def find_root(path: str | Path) -> Path:
    """Return the folder of a checkpoint: that of its step, in which the tree may be an item."""
    folder = Path(path).parent
    is_item = (folder.parent / STEP).is_file() and not (folder / STEP).is_file()
    return folder.parent if is_item else folder


def list_items(root: Path) -> list[str]:
    """Return the items of a step that are trees of arrays.

    Keras's `model_config` is a tree of strings, which has no folder for values.
    """
    found = (path.parent for path in root.glob(f"*/{TREE}"))
    return sorted(item.name for item in found if any(_list_folders(item)))


def _list_folders(item: Path) -> Iterator[Path]:
    """Yield the folders of an item that may hold values."""
    return (path for path in item.iterdir() if path.is_dir() and path.name != _ARRAYS)


def find_tree(path: str, key: str) -> Tree:
    """Return the tree of a checkpoint.

    Args:
        path: of the tree's `_METADATA`, or of the step's `_CHECKPOINT_METADATA`.
        key: of an item, of a part of the tree, or of both, separated by slashes; "" for neither.

    Raises:
        FormatError: there is no tree, or it is not clear which; says which there are.
    """
    keys = tuple(key.split("/")) if key else ()
    if Path(path).name != STEP:
        return Tree(path, keys)
    root = Path(path).parent
    found = list_items(root)
    if not found:
        raise FormatError(
            f"{shown(path)}: none of its items has a list of arrays ({TREE}); restore the "
            "checkpoint with orbax.checkpoint and save it again"
        )
    if keys and keys[0] in found:
        return Tree(str(root / keys[0] / TREE), keys[1:])
    models = [name for name in found if not is_state(name)] or found
    if len(models) > 1:
        some = ", ".join(f"'{shown(name, 40)}'" for name in found[:_MOST_NAMED])
        wanted = f"has no item '{shown(keys[0], 40)}', but" if keys else "has"
        raise FormatError(
            f"{shown(path)}: {wanted} the items {some}; choose the one to average, for example "
            f"with --key {shown(models[0], 40)}, or name its folder"
        )
    return Tree(str(root / models[0] / TREE), keys)


def read_json(path: Path) -> tuple[File, dict[str, Any]]:
    """Return a file of one JSON object.

    Raises:
        FormatError: it is something else; names the file.
    """
    with open_input(path) as file, name_errors(str(path)):
        if file.size > zips.WHOLE:
            raise FormatError(
                f"has {word_size(file.size)}; expected at most {word_size(zips.WHOLE)}"
            )
        try:
            said = json.loads(file.read(0, file.size))
        except (ValueError, RecursionError) as error:
            raise FormatError(
                f"is not JSON ({shown(error, 60)}); it is truncated or damaged"
            ) from None
        if not isinstance(said, dict):
            raise FormatError("is not a JSON object; it is damaged")
        return File(str(path), file.version), said


def encode_items(said: dict[str, Any], left_out: Collection[str]) -> bytes:
    """Return the list of a step's items without some of them."""
    handlers = said.get("item_handlers")
    if isinstance(handlers, dict):
        handlers = {name: value for name, value in handlers.items() if name not in left_out}
    return json.dumps({**said, "item_handlers": handlers}).encode()


def find_missing(part: Sequence[str], paths: Collection[tuple[str, ...]]) -> str:
    """Return what is wrong with a part of a tree that was asked for, "" if it is there."""
    for depth in range(1, len(part) + 1):
        there = {path[depth - 1] for path in paths if path[: depth - 1] == (*part[: depth - 1],)}
        if part[depth - 1] not in there:
            some = ", ".join(f"'{shown(name, 40)}'" for name in sorted(there)[:_MOST_NAMED])
            return (
                f"has no '{shown('/'.join(part[:depth]), 60)}' that --key could choose; expected "
                f"one of {some or 'none'}"
            )
    return ""
