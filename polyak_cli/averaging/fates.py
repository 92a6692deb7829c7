"""Decide which tensors are averaged, carried or dropped, and collect notes for the user.

Reads no values and opens no file.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence

from polyak_cli.averaging.belonging.quantised import describe_quantised
from polyak_cli.averaging.belonging.states import is_of_the_run, note_numbers, note_states
from polyak_cli.averaging.matching import Row, find_last_part, is_statistic
from polyak_cli.averaging.options import Tensors
from polyak_cli.checkpoints import Checkpoint
from polyak_cli.errors import (
    MismatchError,
    UsageError,
    choose_verb,
    list_some,
    shown,
    word_count,
)
from polyak_cli.formats.catalogue import OPENERS, find_format
from polyak_cli.tensors import FLOATS, Table, is_carried


def drops_optimizer(
    template: Table, optimizer: str, output_format: str, *, only_weights: bool = False
) -> bool:
    """Return whether an output of a format leaves the optimizer's state out.

    Files that are restored as a whole need every part that their index lists.
    """
    is_converted = output_format != template.format
    is_trimmed = only_weights and find_format(template.format).can_be_trimmed
    return optimizer == "drop" and (is_converted or is_trimmed or not template.rules.is_fixed)


def map_stored_dtypes(
    averaged: Iterable[Row], dtype: str | None, template: Table
) -> dict[str, str]:
    """Return a mapping: location in the template -> the type to store, for averaged tensors."""
    # Values that are read from another tensor's place may have that tensor's type.
    own = template.tensors
    return {row[-1].location: dtype or own[row[-1].name].dtype for row in averaged}


def decide_fates(rows: Sequence[Row], wanted: Tensors, where: str) -> tuple[list[Row], list[Row]]:
    """Divide the model's tensors into those to average and those to carry.

    Raises:
        MismatchError: a tensor can be neither, or nothing is left to average.
        UsageError: a glob matches nothing.
    """
    include, exclude = wanted.include_tensors, wanted.exclude_tensors
    names = [row[-1].name for row in rows]
    # A glob that matches nothing is a typing error, and would change the result silently.
    for option, globs in (("include", include), ("exclude", exclude)):
        for glob in globs:
            if not any(fnmatch.fnmatchcase(name, glob) for name in names):
                raise UsageError(f"--{option}-tensors '{shown(glob)}' matches no tensor")
    kept = {name for name in names if is_wanted(name, wanted)}
    averaged: list[Row] = []
    carried: list[Row] = []
    for row in rows:
        name, dtype = row[-1].name, row[-1].dtype
        # What is the run's and not the model's is averaged only where it is asked for.
        is_chosen = name in kept and (bool(include) or not is_of_the_run(row[-1]))
        if is_chosen and dtype in FLOATS:
            averaged.append(row)
        elif is_chosen and not is_carried(dtype):
            raise MismatchError(
                f"{where}: tensor '{shown(name)}' is of type {dtype}, which is not averaged; "
                f"expected {', '.join(FLOATS)}. Use --exclude-tensors to copy it from the newest"
            )
        else:
            carried.append(row)
    # Only now: a quantised kernel is known by the float scale that would be averaged beside it.
    quantised = describe_quantised(
        [row[-1] for row in rows], {row[-1].name for row in averaged}, kept
    )
    if quantised:
        raise MismatchError(f"{where}: {quantised}")
    if not averaged:
        raise MismatchError(
            f"{where}: nothing to average; expected at least one float tensor that no option "
            "leaves out"
        )
    return averaged, carried


def is_wanted(name: str, wanted: Tensors) -> bool:
    """Return whether the options do not leave a tensor out."""
    include, exclude = wanted.include_tensors, wanted.exclude_tensors
    is_included = not include or any(fnmatch.fnmatchcase(name, glob) for glob in include)
    return is_included and not any(fnmatch.fnmatchcase(name, glob) for glob in exclude)


def list_notes(
    tables: Sequence[Table],
    averaged: Sequence[Row],
    carried: Sequence[Row],
    stored_dtypes: Mapping[str, str],
    *,
    drop_optimizer: bool,
    recalibrates: bool,
) -> list[str]:
    """Return what a user should know before the run."""
    notes = [
        f"{shown(table.path)} is itself an average that polyak wrote"
        for table in tables
        if table.is_polyak_output
    ]
    if len({table.config for table in tables}) > 1:
        notes.append(
            "the model configuration differs between checkpoints; the newest one's is kept"
        )
    notes += note_states(row[-1] for row in carried)
    notes += note_numbers([row[-1] for row in averaged])
    # The averaged model's activations have other moments than the mean of the checkpoints' moments:
    # Izmailov et al., "Averaging weights leads to wider optima and better generalization", 2018.
    names = [row[-1].name for row in averaged]
    statistics = [name for name in names if is_statistic(tables[-1], name)]
    if statistics and not recalibrates and len(tables) > 1:  # those of a copy still fit
        count = word_count(len(statistics), "BatchNorm moving statistic")
        notes.append(
            f"{count} {choose_verb(len(statistics))} averaged; recompute them on training data "
            f"({_advise_recalculation(tables[-1])})"
        )
    stored = {*stored_dtypes.values(), "part"}
    if not (drop_optimizer and tables[-1].rules.part):  # a part is converted without what is beside
        stored.add("objects")
    if not drop_optimizer and tables[-1].optimizer:
        stored.add("optimizer")
    is_fixed = tables[-1].rules.is_fixed and not find_format(tables[-1].format).retypes
    notes += _note_types(averaged, stored_dtypes, is_fixed=is_fixed)
    notes += [text for key, text in tables[-1].rules.cautions.items() if key in stored]
    if tables[-1].rules.is_fixed and tables[-1].optimizer and not drop_optimizer:
        can_be_trimmed = find_format(tables[-1].format).can_be_trimmed
        way = "--only-weights leaves it out" if can_be_trimmed else "this format cannot drop it"
        notes.append(
            f"the optimizer state is that of the newest checkpoint: {way}, "
            "and it does not belong to averaged values"
        )
    # Strings have no storage to compare; their digests come with the header.
    strings = [row[-1].name for row in carried if len({spec.digest for spec in row}) > 1]
    return notes + [describe_difference(name) for name in strings]


def _note_types(
    averaged: Sequence[Row], stored_dtypes: Mapping[str, str], *, is_fixed: bool
) -> list[str]:
    """Return a note on the tensors that are not of one type in all checkpoints."""
    rows = [row for row in averaged if len({spec.dtype for spec in row}) > 1]
    if not rows:
        return []
    names = list_some([row[-1].name for row in rows])
    # Oldest first: this is how the run changed.
    found = " and ".join(dict.fromkeys(spec.dtype for row in rows for spec in row))
    stored = " and ".join(dict.fromkeys(stored_dtypes[row[-1].location] for row in rows))
    choice = "" if is_fixed else "; --dtype stores another type"
    return [
        f"{word_count(len(rows), 'tensor')} ({names}) {'has' if len(rows) == 1 else 'have'} "
        f"different types in the checkpoints ({found}): averaged in float64 and stored as "
        f"{stored}{choice}"
    ]


def _advise_recalculation(template: Table) -> str:
    """Return how to compute BatchNorm statistics again: by an option, or as the format says."""
    form = find_format(template.format)
    return "--recalibrate DATA" if form.keras_layout and template.config else form.recalculation


def note_missing_emas(names: Sequence[str]) -> list[str]:
    """Return a note with the float tensors that have no EMA and are averaged themselves."""
    if not names:
        return []
    have, its = ("has", "its") if len(names) == 1 else ("have", "their")
    return [
        f"{word_count(len(names), 'float tensor')} {have} no EMA ({list_some(names)}): {its} own "
        "values are averaged. EMAs are kept of trained tensors, mostly of no others"
    ]


def note_files_beside(newest: Checkpoint, template: Table) -> list[str]:
    """Return a note on the files in a checkpoint's folder that are not written."""
    if newest.path == template.path:
        return []
    if template.path.name not in OPENERS:
        return [
            f"only {shown(template.path.name)} is averaged: the average takes its place in a copy "
            f"of {shown(newest.path)}"
        ]
    form = find_format(template.format)
    if form.carries_all:
        return [
            f"only the tensors are written, and nothing else that is in {shown(newest.path)}; an "
            f"output without suffix is a folder of {form.name}"
        ]
    return [
        "only the tensors are written: a program may also need config.json, the tokenizer and "
        f"the other files in {shown(newest.path)}, which an output without suffix, a folder, holds"
    ]


def describe_difference(name: str) -> str:
    """Return the note that a carried tensor differs between the checkpoints."""
    return f"tensor '{shown(name)}' differs between checkpoints; the newest one's is copied"


def is_compared(row: Row) -> bool:
    """Return whether a carried tensor should be the same in all checkpoints.

    Floats are carried only if an option says so, and PyTorch's BatchNorm counts its batches.
    """
    spec = row[-1]
    counts = spec.dtype in FLOATS or find_last_part(spec.name) == "num_batches_tracked"
    return not counts and all(spec.storage is not None for spec in row)
