"""Order the checkpoints of a run by epoch, separate runs, and restrict them to a window.

Knows how the names of one run resemble one another.  Reads no directory, log or checkpoint.
"""

from __future__ import annotations

import glob
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from itertools import pairwise
from pathlib import Path

from polyak_cli.checkpoints.dated import order_by_date
from polyak_cli.checkpoints.folders import find_names, list_paths_below, list_relative_paths
from polyak_cli.checkpoints.listing import (
    Checkpoint,
    Pool,
    Problem,
    advise_exclusion,
    exclude_all,
    find_kind,
    is_matched,
    refuse,
)
from polyak_cli.checkpoints.names import DATE, VERSIONS, Name, Role, has_whole_number, parse_name
from polyak_cli.errors import CheckpointError, choose_verb, shown, word_count, word_rest


def is_thinned(pool: Pool, exclude: Sequence[str]) -> bool:
    """Return whether a file was excluded that may be a checkpoint of the run."""
    passed = (one.path for one in pool.passed_over)
    excluded = (path for path in passed if any(is_matched(path, pattern) for pattern in exclude))
    return any(find_kind(path) and _try_read_epoch(path) is not None for path in excluded)


#: Files that an error names, each with the option that leaves it out.
_MOST_NAMED = 10
_SAY_WHERE_IN_PATH = (
    "say where the epoch is in the path with --epoch-pattern, for instance 'checkpoint-(\\d+)/'"
)


def _say_where(path: Path) -> str:
    """Return the advice on names whose epoch is not clear; its example fits the file's suffix."""
    # Other suffixes are parts of a name, or hold characters that a shell or a terminal interprets.
    usual = re.search(r"(?:\.weights)?\.[a-z]\w*\Z", path.name, re.IGNORECASE | re.ASCII)
    end = re.escape(usual[0]) if usual else ""
    return f"say where the epoch is with --epoch-pattern, for instance '(\\d+){end}$'"


_KEEP_ORDER = "keep the order given, oldest first, with --order given"


def order_by_epoch(
    pool: Pool, pattern: re.Pattern[str] | None, as_given: bool
) -> tuple[list[Checkpoint], list[str]]:
    """Return all checkpoints, oldest first, and notes about their order.

    Files given one by one are ordered as well: a shell sorts names as text, so that it gives
    epoch_10 before epoch_2, and an order that is not that of the epochs is a mistake nearly always.
    With ``as_given`` they keep their order.
    """
    if not pool.paths:
        return [], []
    dated = None if pattern or as_given else order_by_date(pool.paths)
    if dated is not None:
        return [Checkpoint(path, epoch, None) for path, epoch in dated], []
    if pattern is not None:
        texts = _list_searched(pool.paths, pattern)
        pairs = zip(pool.paths, texts, strict=True)
        epochs: list[int | None] = [_match_epoch(path, pattern, text) for path, text in pairs]
    elif pool.as_given:
        epochs = _try_read_epochs(pool.paths, as_given)
    else:
        epochs = [*_read_epochs(pool.paths)]
    found = [Checkpoint(path, epoch, None) for path, epoch in zip(pool.paths, epochs, strict=True)]
    if pool.as_given:
        return (found, []) if as_given else _rearrange(found)
    found.sort(key=lambda checkpoint: checkpoint.epoch or 0)
    _report_duplicates(found, refuse)
    return found, []


def _rearrange(given: list[Checkpoint]) -> tuple[list[Checkpoint], list[str]]:
    """Return files that were given one by one in order of epoch, where that is clear."""
    if len({one.epoch for one in given}) < len(given) or any(one.epoch is None for one in given):
        return given, _note_order(given)
    ordered = sorted(given, key=lambda one: one.epoch or 0)
    if ordered == given:
        return given, []
    first, last = ordered[0], ordered[-1]
    note = (
        f"the files are sorted by epoch, from {shown(first.path)} (epoch {first.epoch}) to "
        f"{shown(last.path)} (epoch {last.epoch}), not in the order given; {_KEEP_ORDER}"
    )
    return ordered, [note]


def _report_duplicates(
    ordered: Sequence[Checkpoint], on_problem: Callable[[Problem], None]
) -> None:
    for earlier, later in pairwise(ordered):
        if earlier.epoch == later.epoch is not None:
            text = (
                f"{shown(earlier.path)} and {shown(later.path)} are both epoch {later.epoch}: "
                f"leave one out with --exclude, or {_say_where(later.path)}"
            )
            on_problem(Problem("duplicate epoch", text, later.path))


def order_as_far_as_known(
    pool: Pool,
    pattern: re.Pattern[str] | None,
    as_given: bool,
    on_problem: Callable[[Problem], None],
) -> list[Checkpoint]:
    """Return all checkpoints, oldest first, and report those whose epoch is unknown."""
    epochs: Sequence[int | None]
    others: Collection[Path] = ()
    dated = None if pattern or as_given else order_by_date(pool.paths)
    if dated is not None:
        return [Checkpoint(path, epoch, None) for path, epoch in dated]
    if pattern is not None:
        texts = _list_searched(pool.paths, pattern)
        pairs = zip(pool.paths, texts, strict=True)
        epochs = [_try_match_epoch(path, pattern, text, on_problem) for path, text in pairs]
    elif pool.as_given:
        try:
            epochs = _try_read_epochs(pool.paths, as_given)
        except CheckpointError as error:
            on_problem(Problem("no epoch", str(error), pool.paths[0]))
            epochs = _try_read_epochs(pool.paths, True)
    else:
        known, others = _read_epochs_of_runs(pool.paths, on_problem)
        epochs = [known.get(path) for path in pool.paths]
    found = [Checkpoint(path, epoch, None) for path, epoch in zip(pool.paths, epochs, strict=True)]
    if pool.as_given and (as_given or None in epochs):
        return found
    found.sort(key=lambda one: -math.inf if one.epoch is None else one.epoch)
    _report_duplicates([one for one in found if one.path not in others], on_problem)
    return found


def _try_match_epoch(
    path: Path, pattern: re.Pattern[str], text: str, on_problem: Callable[[Problem], None]
) -> int | None:
    try:
        return _match_epoch(path, pattern, text)
    except CheckpointError as error:
        on_problem(Problem("no epoch", str(error), path))
        return None


def _read_epochs_of_runs(
    paths: Sequence[Path], on_problem: Callable[[Problem], None]
) -> tuple[dict[Path, int], set[Path]]:
    """Return the known epochs, and the files that do not belong to the largest run."""
    runs: dict[Hashable, list[Name]] = {}
    try:
        names = find_names(paths, _SAY_WHERE_IN_PATH)
    except CheckpointError as error:
        on_problem(Problem("no epoch", str(error), paths[0]))
        return {}, set()
    for name in names:
        if has_whole_number(name):
            runs.setdefault((find_kind(name.path), name.signature), []).append(name)
        else:
            text = _describe_missing_number(name, alone=len(paths) == 1)
            on_problem(Problem("no epoch", text, name.path))
    known: dict[Path, int] = {}
    parted: list[list[Name]] = []
    for alike in runs.values():
        try:
            field = _find_epoch_field(alike)
        except CheckpointError as error:
            on_problem(Problem("no epoch", str(error), alike[0].path))
            parted.append(alike)
            continue
        known |= {name.path: int(name.numbers[field].value) for name in alike}
        within: dict[Hashable, list[Name]] = {}
        for name in alike:
            within.setdefault(_find_fixed_numbers(name, field), []).append(name)
        parted += within.values()
    # On a tie, the run that reaches the latest epoch counts.
    parted.sort(key=lambda run: (len(run), max(known.get(name.path, 0) for name in run)))
    others = [name.path for run in parted[:-1] for name in run]
    for path in others:
        usual = shown(parted[-1][0].path)
        text = (
            f"{shown(path)} seems to belong to another run than {usual} ({len(parted[-1])} are "
            f"named like this one): leave one kind out with --exclude, or {_say_where(path)}"
        )
        on_problem(Problem("other run", text, path))
    return known, set(others)


def sort_by_epoch_or_name(paths: Sequence[Path]) -> list[Path]:
    """Return files in order of epoch, or in order of name if epochs are not clear."""
    try:
        epochs = dict(zip(paths, _read_epochs(paths), strict=True))
    except CheckpointError:
        epochs = {}
    if len(set(epochs.values())) == len(paths):
        return sorted(paths, key=lambda path: epochs[path])
    return sorted(paths, key=make_natural_key)


def make_natural_key(path: Path) -> list[str | int]:
    """Return a key that sorts model_9 before model_10."""
    parts = re.split(r"(\d+)", str(path))  # text and digits in turn, text first
    return [int(part) if place % 2 else part.casefold() for place, part in enumerate(parts)]


def _list_searched(paths: Sequence[Path], pattern: re.Pattern[str]) -> list[str]:
    """Return the texts in which --epoch-pattern is searched for.

    These are the files' names, or the paths below their common folder if names repeat or none of
    them matches.
    """
    texts = list_relative_paths(paths)
    return texts if any(map(pattern.search, texts)) else list_paths_below(paths)


def _match_epoch(path: Path, pattern: re.Pattern[str], searched: str) -> int:
    match = pattern.search(searched)
    where = "name" if searched == path.name else "path"
    if match is None:
        raise CheckpointError(
            f"{shown(path)}: --epoch-pattern '{shown(pattern.pattern)}' matches nothing in its "
            f"{where}: correct the pattern or leave the file out with --exclude"
        )
    group: str | int = "epoch" if "epoch" in pattern.groupindex else min(pattern.groups, 1)
    text = match[group]
    if text is None or not re.fullmatch(r"[-+]?\d+", text):
        raise CheckpointError(
            f"{shown(path)}: --epoch-pattern '{shown(pattern.pattern)}' finds "
            f"{'no epoch' if text is None else repr(shown(text))} in its {where}; expected a "
            "whole number in the group 'epoch' or the first group"
        )
    return int(text)


def _try_read_epochs(paths: Sequence[Path], as_given: bool) -> list[int | None]:
    """Read the epochs of files that were given one by one, as far as they are known.

    Raises:
        CheckpointError: the files should be ordered by epoch, and some have a number where others
            have none, or several numbers could be it.
    """
    way_out = f"{_SAY_WHERE_IN_PATH}, or {_KEEP_ORDER}"
    try:
        find_names(paths, way_out)
    except CheckpointError:
        if not as_given:
            raise
    try:
        return [*_read_epochs(paths)]
    except CheckpointError:
        epochs = [_try_read_epoch(path) for path in paths]
    if as_given or None not in epochs:
        return epochs
    known = [(epoch, path) for epoch, path in zip(epochs, paths, strict=True) if epoch is not None]
    falling = any(a > b for (a, _), (b, _) in pairwise(known))
    if falling and len({parse_name(path).signature for _, path in known}) == 1:
        raise CheckpointError(
            f"{shown(paths[epochs.index(None)])}: its name has no number, and the others are not "
            f"given in order of their epochs: {way_out}"
        )
    return epochs


def _try_read_epoch(path: Path) -> int | None:
    try:
        return _read_epochs([path])[0]
    except CheckpointError:
        return None


def _note_order(given: Sequence[Checkpoint]) -> list[str]:
    known = [checkpoint for checkpoint in given if checkpoint.epoch is not None]
    for earlier, later in pairwise(known):
        if (earlier.epoch or 0) >= (later.epoch or 0):
            return [
                "the files are kept in the order given, oldest first, which is not the order of "
                f"their epochs: {shown(earlier.path)} (epoch {earlier.epoch}) comes before "
                f"{shown(later.path)} (epoch {later.epoch}), and {shown(given[-1].path)} counts "
                "as the newest; confirm it with --order given"
            ]
    return []


def _read_epochs(paths: Sequence[Path]) -> list[int]:
    """Read the epoch from the names of one run's files.

    Raises:
        CheckpointError: a name has no number, the names are not alike, or none or several of their
            numbers could be the epoch.
    """
    names = find_names(paths, _SAY_WHERE_IN_PATH)
    missing = [name for name in names if not has_whole_number(name)]
    if missing:
        numbered = [name for name in names if has_whole_number(name)]
        raise CheckpointError(_describe_missing_numbers(missing, numbered))
    _require_alike(names, [name.signature for name in names])
    # Equal signatures: the names have the same numbers in the same places from here on.
    field = _find_epoch_field(names)
    _require_alike(names, [_find_fixed_numbers(name, field) for name in names])
    return [int(name.numbers[field].value) for name in names]


def _describe_missing_number(name: Name, alone: bool) -> str:
    if alone:  # such as the best.keras of a run that keeps its best epoch only
        return (
            f"{shown(name.path)}: is the only checkpoint, and its name has no epoch: an average "
            "needs several, so save one an epoch (in Keras, "
            "ModelCheckpoint('model_{epoch}.keras', save_best_only=False))"
        )
    return (
        f"{shown(name.path)}: its name has no whole number that could be the epoch: "
        f"{advise_exclusion(name.path)}, or {_say_where(name.path)}"
    )


def _describe_missing_numbers(missing: Sequence[Name], numbered: Sequence[Name]) -> str:
    """Describe all names without a number in one error, and the options that leave them out."""
    paths = [name.path for name in missing]
    # Files of another run would be the next error, after these were left out.
    kinds = Counter(name.signature for name in numbered)
    usual = kinds.most_common(1)[0][0] if kinds else ""
    others = [name.path for name in numbered if name.signature != usual]
    if len(missing) == 1 and not others:
        return _describe_missing_number(missing[0], alone=not numbered)
    way_out = f"leave them out with {exclude_all([*paths, *others][:_MOST_NAMED])}"
    if not numbered:
        way_out = "name the files one by one, oldest first"
    also = f"; {_list_some(others)} may be of another run" if others else ""
    which = "its name has" if len(paths) == 1 else "each name has"
    return (
        f"{_list_some(paths)}: {which} no whole number that could be the epoch{also}: {way_out}, "
        f"or {_say_where(paths[0])}"
    )


def _list_some(paths: Sequence[Path]) -> str:
    some = ", ".join(shown(path) for path in paths[:_MOST_NAMED])
    return f"{some}{word_rest(len(paths) - _MOST_NAMED)}"


def _find_fixed_numbers(name: Name, field: int) -> tuple[int | float, ...]:
    """Return the numbers besides the epoch that must not change within a run."""
    return tuple(
        number.value
        for index, number in enumerate(name.numbers)
        if number.role is Role.PLAIN and index != field
    )


def _require_alike(names: Sequence[Name], keys: Sequence[Hashable]) -> None:
    kinds = Counter(keys)
    if len(kinds) == 1:
        return
    (usual, many), (odd, few), *_ = kinds.most_common()
    one, other = names[keys.index(usual)].path, names[keys.index(odd)].path
    others = [name.path for name, key in zip(names, keys, strict=True) if key != usual]
    kept = [name.path for name, key in zip(names, keys, strict=True) if key == usual]
    raise CheckpointError(
        f"{shown(one)} and {shown(other)} look like checkpoints of two runs ({many} named like "
        f"the first, {few} like the second): leave one kind out, for instance with "
        f"{_exclude_kind(others, kept)}, or {_say_where(other)}"
    )


def _exclude_kind(others: Sequence[Path], kept: Sequence[Path]) -> str:
    """Return the option that leaves files out, and none of those that are kept."""
    if len(others) > 1:
        names = [path.name for path in others]
        begin = _find_common_start(names).rstrip("0123456789")
        end = _find_common_start([name[::-1] for name in names])[::-1].lstrip("0123456789")
        for pattern in (f"{glob.escape(begin)}*", f"*{glob.escape(end)}"):
            fits = len(pattern) > 1 and all(is_matched(path, pattern) for path in others)
            if fits and not any(is_matched(path, pattern) for path in kept):
                return f"--exclude '{shown(pattern)}'"
    if len(others) > _MOST_NAMED:
        return "--exclude"
    return exclude_all(others)


def _find_common_start(names: Sequence[str]) -> str:
    shortest = min(names, key=len)
    places = range(len(shortest))
    end = next((i for i in places if len({name[i] for name in names}) > 1), len(shortest))
    return shortest[:end]


def _find_epoch_field(names: Sequence[Name]) -> int:
    """Return the index of the number that is the epoch in all names."""
    first = names[0].numbers
    for role in (Role.EPOCH, Role.PLAIN, Role.COUNTER):
        places = [index for index, number in enumerate(first) if number.role is role]
        varying = [i for i in places if len({name.numbers[i].value for name in names}) > 1]
        if len(varying) > 1:
            raise CheckpointError(_describe_ambiguity(names, varying))
        if varying:
            return varying[0]
        if places and role is Role.EPOCH:
            return places[-1]
    return _guess_epoch_field(names[0])


def _guess_epoch_field(name: Name) -> int:
    """Return the index of the number that is most like an epoch, from one name alone."""

    def rank(index: int) -> tuple[int, bool, bool, int]:
        number = name.numbers[index]
        ranks = {Role.PLAIN: 3, Role.COUNTER: 2, Role.FIXED: 1}
        named = number.label == "of" or number.label in VERSIONS or DATE.fullmatch(number.text)
        # resnet50_10: a number that is part of a word rather belongs to a name.
        part_of_word = bool(number.label) and not number.joint
        return ranks[number.role], not named, not part_of_word, index

    whole = [index for index, number in enumerate(name.numbers) if isinstance(number.value, int)]
    possible = [index for index in whole if name.numbers[index].role is not Role.MEASURE]
    if not possible:
        number = name.numbers[whole[-1]]
        raise CheckpointError(
            f"{shown(name.path)}: the {number.text} in its name looks like the metric "
            f"'{shown(number.label)}' and not like an epoch: {_say_where(name.path)}"
        )
    return max(possible, key=rank)


def _describe_ambiguity(names: Sequence[Name], varying: Sequence[int]) -> str:
    numbers = [names[0].numbers[index].text for index in varying]
    return (
        f"{shown(names[0].path)}: {', '.join(numbers[:-1])} and {numbers[-1]} in its name differ "
        f"between files, so each could be the epoch: {_say_where(names[0].path)}, or leave "
        "files of another run out with --exclude"
    )


def restrict_epochs(
    ordered: Sequence[Checkpoint],
    from_epoch: int | None,
    to_epoch: int | None,
    growing: bool = False,
) -> list[Checkpoint]:
    """Return the checkpoints from one epoch to another, both included."""
    if from_epoch is None and to_epoch is None:
        return list(ordered)
    low = -math.inf if from_epoch is None else from_epoch
    high = math.inf if to_epoch is None else to_epoch
    kept = [one for one in ordered if low <= require_epoch(one, "--from and --to") <= high]
    if not kept and not growing:
        bounds = [
            *([] if from_epoch is None else [f"--from {from_epoch}"]),
            *([] if to_epoch is None else [f"--to {to_epoch}"]),
        ]
        raise CheckpointError(
            f"{' '.join(bounds)}: no checkpoint has such an epoch; found {describe_epochs(ordered)}"
        )
    return kept


def take_newest(
    checkpoints: list[Checkpoint], last: int | None, total: int, growing: bool = False
) -> list[Checkpoint]:
    """Return the last of the checkpoints; ``total`` is how many there were before restrictions."""
    if last is None:
        return checkpoints
    if not growing and last > len(checkpoints):
        rest = "" if total == len(checkpoints) else f" after the other options, out of {total}"
        raise CheckpointError(
            f"{shown(checkpoints[-1].path.parent)}: --last {last}, but there "
            f"{choose_verb(len(checkpoints))} only {describe_epochs(checkpoints)}"
            f"{rest}; ask for fewer, or name more files"
        )
    return checkpoints[-last:]


def place_in_run(chosen: Sequence[Checkpoint], ordered: Sequence[Checkpoint]) -> tuple[float, ...]:
    """Return the ``positions`` of a `Selection`."""
    epochs = [one.epoch for one in chosen if one.epoch is not None]
    # If epochs are counted from 0, epoch n has n + 1 epochs of training behind it.
    shift = max(0, 1 - min((one.epoch for one in ordered if one.epoch is not None), default=1))
    positions = [float(epoch + shift) for epoch in epochs]
    rising = all(a < b for a, b in pairwise(positions))
    if len(epochs) == len(chosen) and rising:
        return tuple(positions)
    return tuple(float(place) for place in range(1, len(chosen) + 1))


def require_epoch(checkpoint: Checkpoint, option: str) -> int:
    """Return a checkpoint's epoch, or raise that an option needs it."""
    if checkpoint.epoch is None:
        raise CheckpointError(
            f"{shown(checkpoint.path)}: {option} needs the epoch, but its name has no number that "
            f"could be it: {_say_where(checkpoint.path)}"
        )
    return checkpoint.epoch


def describe_epochs(checkpoints: Sequence[Checkpoint]) -> str:
    """Return the number of checkpoints and the range of their epochs, in words."""
    count = word_count(len(checkpoints), "checkpoint")
    epochs = [one.epoch for one in checkpoints if one.epoch is not None]
    if not epochs:
        return count
    if len(epochs) == 1:
        return f"{count} (epoch {epochs[0]})"
    return f"{count} (epochs {min(epochs)} to {max(epochs)})"
