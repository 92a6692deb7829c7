"""Find which of several checkpoints are unlike most of them, and say so.

The newest checkpoint is the template, but it need not be the one that is right: where tables
disagree, those outside the largest group of like ones are named.  Does not know when two
checkpoints are alike, nor by which options one is left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from polyak_cli import formats
from polyak_cli.errors import (
    ChangedError,
    FormatError,
    MismatchError,
    PolyakError,
    StoreError,
    list_some,
    shown,
)
from polyak_cli.formats.catalogue import detect, find_format
from polyak_cli.tensors import Table

#: Says why two checkpoints, the second of them the newer, are unlike; "" if they are alike.
Describe = Callable[[Table, Table], str]

#: A checkpoint is compared with as many groups.  A run has one or two; where every checkpoint is
#: of its own kind, comparing each with each would take hours for a thousand of them.
_COMPARED = 8
#: As many other checkpoints are tried before all are taken to be unreadable.
_TRIED = 8


def group_alike(tables: Sequence[Table], describe: Describe) -> list[list[int]]:
    """Return the checkpoints in groups of like ones, as numbers.

    The groups, and the checkpoints in each, are in the order newest first.
    """
    groups: list[list[int]] = []
    for k in reversed(range(len(tables))):
        for members in groups[:_COMPARED]:
            newest = tables[members[0]]
            # Checkpoints with equal skeletons share their tensors.
            same = tables[k].tensors is newest.tensors and tables[k].format == newest.format
            if same or not describe(tables[k], newest):
                members.append(k)
                break
        else:
            groups.append([k])
    return groups


def _find_odd(groups: Sequence[Sequence[int]]) -> tuple[Sequence[int], list[int]]:
    """Return the largest group, the newest on a tie, and the checkpoints outside it in order."""
    usual = max(groups, key=len)
    return usual, sorted(k for members in groups if members is not usual for k in members)


def blame_minority(
    tables: Sequence[Table], describe: Describe, error: MismatchError
) -> MismatchError:
    """Return the error that names the checkpoints that are unlike most of the others.

    Args:
        tables: the checkpoints, oldest first; they are not all alike.
        describe: says why two of them are unlike.
        error: what was found first, for want of better.
    """
    groups = group_alike(tables, describe)
    if len(groups) < 2:
        return error
    usual, odd = _find_odd(groups)
    newest, other = tables[usual[0]], tables[odd[-1]]
    text = describe(other, newest) or describe(newest, other)
    averages = [table.path for table in (other, newest) if table.is_polyak_output]
    if averages:
        text += f". {shown(averages[0])} is an average that polyak wrote"
    return _make_error(text or str(error), groups, [table.path for table in tables])


def blame_format(paths: Sequence[Path], error: PolyakError) -> PolyakError:
    """Return the error that names the files of another format than most.

    Args:
        paths: the checkpoints' files, oldest first; they are not of one format.
        error: what was found first.
    """
    try:
        keys = [detect(path) for path in paths]
    except StoreError as unreachable:
        return unreachable
    except PolyakError as foreign:  # it has no format that is known here; its own error says so
        return blame_unreadable(paths, foreign)
    # Newest first, as `group_alike` returns them.
    groups = [
        [k for k in reversed(range(len(keys))) if keys[k] == key]
        for key in dict.fromkeys(reversed(keys))
    ]
    if len(groups) < 2:
        return error
    usual, (*_, odd) = _find_odd(groups)
    try:
        # A damaged or foreign file has no format; its own error says so.
        formats.scan([paths[odd]])
    except StoreError as unreachable:
        return unreachable
    except PolyakError as damaged:
        damaged.at_fault = (odd,)
        return damaged
    text = describe_formats(paths[odd], keys[odd], paths[usual[0]], keys[usual[0]])
    return _make_error(text, groups, paths)


def describe_formats(path: Path, key: str, other: Path, other_key: str) -> str:
    """Return the sentence that two checkpoints are of different formats."""
    return (
        f"{shown(path)}: is a {find_format(key).name} file, but {shown(other)} is "
        f"{find_format(other_key).name}; all checkpoints of an average must have the same format"
    )


def blame_unreadable(paths: Sequence[Path], error: PolyakError, key: str = "") -> PolyakError:
    """Mark the file that an error is about as one to leave out, if any other can be read.

    Args:
        paths: the checkpoints.
        error: what was found first.
        key: of the part that is read of each; see `formats.scan`.
    """
    culprit = find_named(error, [[str(path)] for path in paths])
    if culprit is None or isinstance(error, StoreError):
        return error
    others = [path for k, path in enumerate(paths) if k != culprit]
    for path in others[::-1][:_TRIED]:
        try:
            formats.scan([path], key=key)
        except PolyakError:
            continue
        error.at_fault = (culprit,)
        break
    return error


@contextlib.contextmanager
def naming_inputs(tables: Sequence[Table]) -> Iterator[None]:
    """Mark errors about one checkpoint's values with its number.

    A file that was changed meanwhile is no reason to leave it out.
    """
    try:
        yield
    except (FormatError, MismatchError) as error:
        files = [[str(table.path), *(file.path for file in table.files)] for table in tables]
        culprit = None if isinstance(error, ChangedError) else find_named(error, files)
        error.at_fault = () if culprit is None else (culprit,)
        raise


def find_named(error: PolyakError, files: Sequence[Sequence[str]]) -> int | None:
    """Return the number of the checkpoint that an error begins with; None if it names none.

    Args:
        error: begins with the path of a file, and a colon, if it is about a file.
        files: of each checkpoint.
    """
    named = [
        (len(shown(file)), k)
        for k, names in enumerate(files)
        for file in names
        if (error.about == file if error.about else str(error).startswith(f"{shown(file)}: "))
    ]
    return max(named)[1] if named else None  # a name may be the beginning of another


def _make_error(text: str, groups: Sequence[Sequence[int]], paths: Sequence[Path]) -> MismatchError:
    """Return the error with the sizes of the groups, and with the numbers of those at fault."""
    error = MismatchError(f"{text}{_describe_groups(groups, paths)}")
    error.at_fault = tuple(_find_odd(groups)[1])
    return error


def _describe_groups(groups: Sequence[Sequence[int]], paths: Sequence[Path]) -> str:
    """Return a sentence on how many checkpoints are like which; "" for two checkpoints."""
    if len(paths) == 2:
        return ""
    usual, odd = _find_odd(groups)
    like = shown(paths[usual[0]])
    equals = [members for members in groups if len(members) == len(usual)]
    if len(equals) > 1:
        others = " as ".join(["", *(f"like {shown(paths[one[0]])}" for one in equals[1:])])
        return f". Of {len(paths)} checkpoints, as many are like {like}{others} ({len(usual)} each)"
    text = f". Of {len(paths)} checkpoints, {len(usual)} are like {like}"
    if len(odd) > 1:
        text += f"; {len(odd)} are not ({list_some([paths[k].name for k in odd])})"
    elif odd[0] == len(paths) - 1:
        text += ": the newest, which the average would be like, is the odd one"
    return text
