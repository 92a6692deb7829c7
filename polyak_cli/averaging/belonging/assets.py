"""Compare what gives tensors their meaning: vocabularies, tokenizers, classes, configurations.

An embedding's row 2 is the third word of a vocabulary.  Where two checkpoints have different ones,
tensors of one name and one shape are not alike.  Does not know how formats keep such assets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from polyak_cli.checkpoints import Problem
from polyak_cli.errors import MismatchError, list_some, shown
from polyak_cli.formats.beside import read_assets_beside
from polyak_cli.tensors import Asset, Table

#: The kind of the problem, and what `--allow` takes to average all the same.
KIND, ALLOWED = "other assets", "other-assets"
#: Values that many versions of a library leave out, for they mean the same as no value.
_ABSENT = ("null", "false", '""')
#: What another asset does to tensors, and another key of a configuration.
_MEANING = "a row of a tensor may belong to another word or class"
_MEANING_OF_KEYS = "a tensor of one name and shape may mean something else to the model"


class _Other(NamedTuple):
    """What is other in a checkpoint than in most."""

    text: str  # a sentence
    meaning: str  # what this does to tensors


def refuse_other_assets(tables: Sequence[Table], allowed: Sequence[str]) -> list[str]:
    """Refuse checkpoints whose assets are not the newest's, unless that is allowed.

    Returns:
        Notes: what is carried all the same, and which assets only some of the checkpoints have.

    Raises:
        MismatchError: names the newest of those that differ from most, and what differs.
    """
    assets = _collect(tables)
    found = _find_others(tables, assets)
    if found and ALLOWED not in allowed:
        raise MismatchError(
            f"{found[max(found)].text}, so {found[max(found)].meaning}: "
            f"{_advise(len(tables), found)}, and --allow {ALLOWED} averages anyway and copies the "
            "newest one's"
        )
    return [
        f"{one.text}; the newest one's is copied (--allow {ALLOWED})" for one in found.values()
    ] + _list_notes(tables, assets)


def _advise(count: int, others: Collection[int]) -> str:
    """Return how to select checkpoints that are alike."""
    newer = count - 1 - max(others)
    last = f"--last {newer} averages only the newer checkpoints, " if newer > 1 else ""
    return f"{last}--exclude leaves checkpoints out"


def find_other_assets(tables: Sequence[Table]) -> tuple[dict[int, Problem], list[str]]:
    """Return the checkpoints whose assets are not those of most of them, and notes.

    Returns:
        Index of each such checkpoint and its problem; and which assets only some checkpoints have.
    """
    if not tables:
        return {}, []
    assets = _collect(tables)
    others = _find_others(tables, assets)
    problems = {place: Problem(KIND, one.text) for place, one in others.items()}
    return problems, _list_notes(tables, assets)


def describe_differences(tables: Sequence[Table]) -> list[str]:
    """Return, in a sentence each, which assets of two checkpoints are not the same."""
    (one, other), (first, second) = tables, (table.assets for table in tables)
    both = sorted(first.keys() & second.keys())
    found = [f"{_name(name, first)} differs" for name in both if _differs(name, first, second)]
    for table, ours, theirs in ((one, first, second), (other, second, first)):
        found += [f"only {shown(table.path)} has {_name(n, ours)}" for n in ours if n not in theirs]
    return found


def _collect(tables: Sequence[Table]) -> list[Mapping[str, Asset]]:
    """Return the assets of each checkpoint, with the files beside those in folders of their own.

    The files in one folder belong to all checkpoints in it: there is nothing to compare.
    """
    if len({table.path.parent for table in tables}) == 1:
        return [table.assets for table in tables]
    folders = [_list_folders(table) for table in tables]
    unique = [*dict.fromkeys(path for found in folders for path in found)]
    by_folder = dict(zip(unique, read_assets_beside(unique), strict=True))
    collected = [dict(table.assets) for table in tables]
    for assets, found in zip(collected, folders, strict=True):
        for path, prefix in found.items():
            assets |= {f"{prefix}{name}": asset for name, asset in by_folder[path].items()}
    return list(collected)


def _list_folders(table: Table) -> dict[Path, str]:
    """Return the folders with a checkpoint's files -> a prefix for the names of what is in them.

    Modules of a model may have a folder each, with a tokenizer of its own.
    """
    root = table.path.parent
    folders = dict.fromkeys([root, *(Path(file.path).parent for file in table.files)])
    return {
        path: "" if path == root else f"{path.relative_to(root).as_posix()}/"
        for path in folders
        if path == root or root in path.parents
    }


def _find_others(
    tables: Sequence[Table], assets: Sequence[Mapping[str, Asset]]
) -> dict[int, _Other]:
    """Return index and description of each checkpoint with another asset than most that have it."""
    usual = {name: _find_usual(assets, name) for name in set().union(*assets)}
    others: dict[int, _Other] = {}
    for k, found in enumerate(assets):
        differing = [
            name
            for name, asset in found.items()
            if not asset.is_noted and _differs(name, found, assets[usual[name]])
        ]
        if differing:
            # Of the copies that a layer and the layer inside it keep, the outer one is named.
            first, *more = sorted(differing, key=lambda name: (name.count("/"), name))
            text = _describe(first, found, assets[usual[first]], tables[usual[first]].path, more)
            meaning = _MEANING_OF_KEYS if found[first].value else _MEANING
            others[k] = _Other(f"{shown(tables[k].path)}: {text}", meaning)
    return others


def _describe(
    name: str,
    ours: Mapping[str, Asset],
    theirs: Mapping[str, Asset],
    path: Path,
    more: Sequence[str] = (),
) -> str:
    """Return in what an asset differs from that of another checkpoint."""
    some = f" (and {len(more)} more)" if more else ""
    if not ours[name].value:
        return f"{_name(name, ours)}{some} differs from that of {shown(path)}"
    return (
        f"{_name(name, ours)} is {shown(ours[name].value)}, but that of {shown(path)} is "
        f"{shown(theirs[name].value)}{some}"
    )


def _list_notes(tables: Sequence[Table], assets: Sequence[Mapping[str, Asset]]) -> list[str]:
    """Return notes on what differs and need not separate checkpoints, and on what some lack."""
    noted: dict[str, tuple[int, int]] = {}
    for name in dict.fromkeys(name for found in assets for name in found):
        usual = _find_usual(assets, name)
        for k, found in enumerate(assets):
            if name in found and found[name].is_noted and _differs(name, found, assets[usual]):
                noted.setdefault(name, (k, usual))
    if not noted:
        return _note_missing(tables, assets)
    (name, (k, usual)), *more = noted.items()
    text = _describe(name, assets[k], assets[usual], tables[usual].path, [n for n, _ in more])
    return [
        f"{shown(tables[k].path)}: {text}; use the average with the one that fits it",
        *_note_missing(tables, assets),
    ]


def _find_usual(assets: Sequence[Mapping[str, Asset]], name: str) -> int:
    """Return the index of the newest checkpoint with the most frequent content of an asset."""
    digests = {k: found[name].digest for k, found in enumerate(assets) if name in found}
    counts = Counter(digests.values())
    return max(digests, key=lambda k: (counts[digests[k]], k))


def _differs(name: str, ours: Mapping[str, Asset], theirs: Mapping[str, Asset]) -> bool:
    return ours[name].digest != theirs[name].digest


def _name(name: str, assets: Mapping[str, Asset]) -> str:
    """Return an asset's name with the layer that it belongs to."""
    owner = assets[name].owner
    return f"'{shown(name)}'" + (f" of layer '{shown(owner, 80)}'" if owner else "")


def _note_missing(tables: Sequence[Table], assets: Sequence[Mapping[str, Asset]]) -> list[str]:
    """Return a note where only some checkpoints have an asset: many programs save it once."""
    names = dict.fromkeys(
        name
        for found in assets
        for name, asset in found.items()
        if not asset.is_noted and asset.value not in _ABSENT
    )
    some = [name for name in names if not all(name in found for found in assets)]
    if not some:
        return []
    without = next(
        table for table, found in zip(tables, assets, strict=True) if some[0] not in found
    )
    return [
        f"{shown(without.path)} has no {list_some(some)}, unlike others: it cannot be checked "
        "whether its tensors have the same meaning"
    ]
