"""Names that differ only by a prefix, which wrappers of a model add to its tensors' names.

DDP calls them ``module.w``, torch.compile ``_orig_mod.w``, also in the middle of a name.  Pairs
what is left of the names without them.  Reads no value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from polyak_cli.errors import MismatchError, UsageError, list_some, shown, word_count
from polyak_cli.tensors import Table, TensorSpec

#: DistributedDataParallel, torch.compile, FSDP, DeepSpeed and Fabric, activation checkpointing.
_WRAPPERS = (
    "module.",
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "_forward_module.",
    "_checkpoint_wrapped_module.",
)


class PrefixError(MismatchError):
    """Two checkpoints pair without a prefix, so that none of them is to blame."""


def strip_tables(tables: Sequence[Table], prefixes: Sequence[str]) -> tuple[Sequence[Table], str]:
    """Return the tables with the template's names for what is equal without prefixes, and a note.

    Args:
        tables: of all checkpoints; the last is the template, which stays as it is.
        prefixes: to leave out, wherever a part of a name begins so.

    Raises:
        MismatchError: two names of a checkpoint are equal without the prefixes.
        UsageError: no name has one of them.
    """
    if not prefixes:
        return tables, ""
    whole = [_complete(prefix) for prefix in prefixes]
    for prefix in whole:
        if not any(_strip(name, [prefix]) != name for t in tables for name in t.tensors):
            raise UsageError(f"--strip-prefix '{shown(prefix)}' matches no tensor")
    names = _strip_names(tables[-1], whole)
    done: dict[int, Mapping[str, TensorSpec]] = {id(tables[-1].tensors): tables[-1].tensors}
    renamed = 0
    for table in tables:
        if id(table.tensors) not in done:
            done[id(table.tensors)] = _rename(table, tables[-1], names, whole)
        renamed += table.tensors.keys() != done[id(table.tensors)].keys()
    note = (
        f"the names of {word_count(renamed, 'checkpoint')} are paired without "
        f"the prefix {list_some(whole)}; the newest one's names are kept"
    )
    stripped = [replace(table, tensors=done[id(table.tensors)]) for table in tables]
    return stripped, note if renamed else ""


def describe_prefixes(table: Table, template: Table) -> str:
    """Return that only a prefix differs, and what to do; "" if more or nothing does."""
    found = _find_prefixes(list(table.tensors), list(template.tensors))
    if not found:
        return ""
    theirs = {_strip(name, found): name for name in template.tensors}
    ours = next(name for name in table.tensors if theirs[_strip(name, found)] != name)
    options = " ".join(f"--strip-prefix {shown(prefix)}" for prefix in found)
    return (
        f"{shown(table.path)}: only a prefix differs: tensor '{shown(ours)}' is called "
        f"'{shown(theirs[_strip(ours, found)])}' in {shown(template.path)}. Use {options} to pair "
        "them; the newest one's names are kept"
    )


def match_names(held: Sequence[str], wanted: Sequence[str], tied: Iterable[str]) -> dict[str, str]:
    """Return wanted name -> held name, where both are the same names except for prefixes.

    Args:
        held: names in a checkpoint.
        wanted: names of a model's tensors.
        tied: those of them that need not be held, as the model has the same tensor under another.

    Returns:
        The pairs; {} if a name that is not tied is missing, or one is held that is not wanted.
    """
    common = ([_find_common(held, wanted)], [_find_common(wanted, held)]) if held and wanted else ()
    for more in ([], *common):
        found = [*_WRAPPERS, *filter(None, more)]
        ours = {_strip(name, found): name for name in held}
        theirs = {_strip(name, found): name for name in wanted}
        is_unique = len(ours) == len(held) and len(theirs) == len(wanted)
        missing = theirs.keys() - ours.keys()
        is_whole = ours.keys() <= theirs.keys() and missing <= {_strip(n, found) for n in tied}
        if is_unique and is_whole:
            return {theirs[short]: name for short, name in ours.items()}
    return {}


def find_others(
    held: Sequence[str], wanted: Sequence[str], tied: Iterable[str]
) -> tuple[list[str], list[str]]:
    """Return the wanted names that `match_names` does not find, and the held ones not wanted."""
    found = [*_WRAPPERS, *filter(None, (_find_common(held, wanted), _find_common(wanted, held)))]
    ours = {_strip(name, found) for name in held}
    theirs = {_strip(name, found) for name in wanted}
    needless = {_strip(name, found) for name in tied}
    missing = [name for name in wanted if _strip(name, found) not in ours | needless]
    return missing, [name for name in held if _strip(name, found) not in theirs]


def _rename(
    table: Table, template: Table, names: Mapping[str, str], prefixes: Sequence[str]
) -> dict[str, TensorSpec]:
    """Return the tensors under the template's names, where there are such."""
    renamed = {}
    for short, name in _strip_names(table, prefixes).items():
        spec, target = table.tensors[name], names.get(short, name)
        theirs = template.tensors.get(target)
        arrangement = spec.arrangement
        # It has the names of tensors that share a storage.
        if theirs and _strip(arrangement, prefixes) == _strip(theirs.arrangement, prefixes):
            arrangement = theirs.arrangement
        renamed[target] = replace(spec, name=target, arrangement=arrangement)
    return renamed


def _strip_names(table: Table, prefixes: Sequence[str]) -> dict[str, str]:
    """Return each name without the prefixes -> the name."""
    found: dict[str, str] = {}
    for name in table.tensors:
        short = _strip(name, prefixes)
        if short in found:
            raise MismatchError(
                f"{shown(table.path)}: tensors '{shown(found[short])}' and '{shown(name)}' have "
                "the same name without the prefix; leave out that --strip-prefix"
            )
        found[short] = name
    return found


def _complete(prefix: str) -> str:
    """Return a prefix with the separator at its end."""
    return prefix if prefix.endswith((".", "/")) else f"{prefix}."


def _strip(name: str, prefixes: Iterable[str]) -> str:
    """Return a name, or a list of names, without the prefixes."""
    either = "|".join(map(re.escape, prefixes))
    return re.sub(rf"(?<![^/.\s])(?:{either})+", "", name)


def _find_prefixes(ours: Sequence[str], theirs: Sequence[str]) -> list[str]:
    """Return the prefixes without which both have the same names, [] if there are none."""
    if len(ours) != len(theirs) or {*ours} == {*theirs}:
        return []
    for more in ([], [_find_common(ours, theirs)], [_find_common(theirs, ours)]):
        found = [*_WRAPPERS, *filter(None, more)]
        if _are_equal(ours, theirs, found):
            for one in (*found,):  # only those that are needed
                rest = [prefix for prefix in found if prefix != one]
                found = rest if rest and _are_equal(ours, theirs, rest) else found
            return found
    return []


def _are_equal(ours: Iterable[str], theirs: Sequence[str], prefixes: Sequence[str]) -> bool:
    """Return whether two lists have the same names without prefixes, and each of them once."""
    one, other = ({_strip(name, prefixes) for name in names} for names in (ours, theirs))
    return one == other and len(one) == len(theirs)


def _find_common(short: Sequence[str], long: Sequence[str]) -> str:
    """Return what all names of a list begin with that are otherwise those of another list."""
    plain = {_strip(name, _WRAPPERS) for name in short}
    for name in (_strip(name, _WRAPPERS) for name in long):
        for match in re.finditer(r"[/.]", name):
            if name[match.end() :] in plain:
                return name[: match.end()]
        break
    return ""
