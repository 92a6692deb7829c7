"""Read the index of a sharded checkpoint: JSON whose ``weight_map`` says what lies in which shard.

Does not know how a shard stores tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from polyak_cli.errors import FormatError, shown, word_size
from polyak_cli.formats.zips import WHOLE
from polyak_cli.storage import Version, open_input
from polyak_cli.storage.local import name_errors


class Index(NamedTuple):
    """The index of a sharded checkpoint."""

    version: Version
    content: Mapping[str, Any]  # all of the JSON
    shards: Mapping[str, list[str]]  # file name -> the keys of the map that lie in it


def read_index(path: str, suffix: str, parse: Callable[[bytes], Any]) -> Index:
    """Read an index.

    Args:
        path: the JSON file.
        suffix: of the names of shards; "" if any name will do.
        parse: returns the content as Python objects.

    Raises:
        FormatError: it is damaged, or names a file that does not lie beside it; names the file.
    """
    with open_input(path) as file, name_errors(path):
        raw = file.read(0, WHOLE + 1)  # one byte more shows that the file is larger
        if len(raw) > WHOLE:
            raise FormatError(f"has {word_size(file.size)}; expected at most {word_size(WHOLE)}")
        try:
            content = parse(raw)
        except (ValueError, RecursionError):
            content = None
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise FormatError(
                "is damaged: it has no weight_map, which says which shard holds which tensor"
            )
        shards: dict[str, list[str]] = {}
        for key, name in _list_pairs(weight_map):
            _check_bare(key, name, suffix)
            shards.setdefault(name, []).append(key)
        return Index(file.version, content, shards)


def check_shard(path: str, index: Index, name: str, held: Collection[str]) -> None:
    """Refuse a shard that holds other tensors than the index says.

    Args:
        path: of the index.
        index: its content; the keys of its map are names of tensors.
        name: of the shard.
        held: the names of its tensors.

    Raises:
        FormatError: names the shard and a tensor.
    """
    shard, wanted = Path(path).with_name(name), index.shards[name]
    for tensor in sorted({*wanted} - {*held})[:1]:
        raise FormatError(
            f"{shown(shard)}: has no tensor '{shown(tensor)}', which {shown(path)} says is in it; "
            "the files come from different saves"
        )
    for tensor in sorted({*held} - {*wanted})[:1]:
        others = [other for other in index.shards if tensor in index.shards[other]]
        says = f"is in {shown(others[0])}" if others else "is nowhere"
        raise FormatError(
            f"{shown(shard)}: has a tensor '{shown(tensor)}', which {shown(path)} says {says}; "
            "the files come from different saves"
        )


def _list_pairs(weight_map: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each key with the name of each of its shards."""
    for key, names in weight_map.items():
        # Keras writes a list where the variables of one group lie in several shards.
        listed = names if isinstance(names, list) else [names]
        if not listed or not all(isinstance(name, str) for name in listed):
            raise FormatError(
                f"the weight_map of '{shown(key)}' is neither the name of a shard nor a list of "
                "names; expected names of files in the same folder"
            )
        for name in listed:
            yield key, name


def _check_bare(key: str, name: str, suffix: str) -> None:
    """Refuse a path: libraries write bare names only, and a path could lead to any file."""
    is_path = name in ("", ".", "..") or any(c in name for c in "/\\\0")
    if is_path or not name.endswith(suffix) or name == suffix != "":
        raise FormatError(
            f"names the shard '{shown(name)}' for '{shown(key)}'; expected the name of a "
            f"{suffix or ''}{' ' * bool(suffix)}file in the same folder"
        )
