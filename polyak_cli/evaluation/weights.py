"""Read the tensors of one checkpoint by name, for a model that a function of the user makes.

Any format that `average` reads will do.  Headers are read by `formats`, in a child; nothing is
unpickled, and nothing that a checkpoint names is run.  This module imports no framework.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from polyak_cli import formats
from polyak_cli.averaging import ema, records
from polyak_cli.averaging.belonging.prefixes import find_others, match_names
from polyak_cli.averaging.options import Tensors
from polyak_cli.checkpoints import find_file
from polyak_cli.engine.inputs import OpenInputs, check_unchanged
from polyak_cli.engine.kernel import widen
from polyak_cli.engine.slabs import TensorSource
from polyak_cli.errors import FormatError, MismatchError, list_some, shown, word_rest
from polyak_cli.evaluation import data
from polyak_cli.formats.running_means import names_running_mean
from polyak_cli.tensors import FLOATS, WHOLE_NUMBERS, Table, TensorSpec, is_numeric

_MOST_NAMES = 3  # that a message lists
_COUNTER = "n_averaged"  # of models, which PyTorch's AveragedModel holds beside the tensors of one


class View(NamedTuple):
    """One named tensor of a checkpoint, as it lies in its storage; in elements."""

    spec: TensorSpec  # of the storage
    offset: int
    shape: tuple[int, ...]
    steps: tuple[int, ...]


class Weights(NamedTuple):
    """The named tensors of one checkpoint."""

    path: Path  # as the user names it
    table: Table
    views: Mapping[str, View]


def describe(paths: Sequence[Path], *, key: str = "", use_ema: bool = False) -> list[Weights]:
    """Return the named tensors of each checkpoint, from its headers alone.

    Args:
        paths: the checkpoints.
        key: of the part of each that is taken for the model, as in `averaging.Options`.
        use_ema: take the running means of the weights in their place.

    Raises:
        UsageError: a key is given, and checkpoints of this format have no parts.
        FormatError: one is foreign, damaged or hostile.
        MismatchError: they are of several formats, or hold no running means.
    """
    files = [find_file(path) for path in paths]
    tables = formats.scan(files, jobs=4, with_optimizer=use_ema, key=key)
    if use_ema:
        # One by one: those that are scored need not be of one run.
        tables = [take_emas(one) for one in tables]
    # Checkpoints of one skeleton share their tensors, so the views are the same too.
    known: dict[int, Mapping[str, View]] = {}
    for table in tables:
        if id(table.tensors) not in known:
            known[id(table.tensors)] = list_views(table)
    return [
        Weights(path, table, known[id(table.tensors)])
        for path, table in zip(paths, tables, strict=True)
    ]


def take_emas(table: Table) -> Table:
    """Return a checkpoint with the running means of its weights in their place.

    An average that polyak made of running means has them there already, and may have no others.

    Raises:
        MismatchError: it holds none, or several.
    """
    try:
        taken, _, _ = ema.take_parts([table], Tensors(use_ema=True))
    except MismatchError:
        if records.has_emas(table):
            return table
        raise
    return taken[0]


def list_views(table: Table) -> dict[str, View]:
    """Return each name of a checkpoint and how its tensor lies in its storage."""
    return dict(_find_views(table))


def _find_views(table: Table) -> Iterator[tuple[str, View]]:
    """Yield each name and how its tensor lies in its storage."""
    numbers = {name: spec for name, spec in table.tensors.items() if is_numeric(spec)}
    odd = [name for name, spec in numbers.items() if spec.arrangement]
    if not odd:
        for name, spec in numbers.items():
            yield name, View(spec, 0, spec.shape, _count_steps(spec.shape))
        return
    if table.format != "torch_zip":
        raise FormatError(
            f"{shown(table.path)}: tensor '{shown(odd[0])}' shares its storage or is transposed "
            f"({shown(numbers[odd[0]].arrangement, 80)}); save it as one .pt or .safetensors file"
        )
    by_place = {spec.location: spec for spec in numbers.values()}
    for name, place, offset, shape, steps in formats.list_views(table):
        if place not in by_place:
            continue
        spec = by_place[place]
        # It was checked when the file was scanned; the file may be another one since.
        last = offset + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
        if 0 not in shape and not 0 <= offset <= last < spec.size:
            raise FormatError(f"{shown(table.path)}: changed while it was read")
        yield name, View(spec, offset, tuple(shape), tuple(steps))


def _count_steps(shape: Sequence[int]) -> tuple[int, ...]:
    """Return how many elements lie from one index to the next on each axis, in C order."""
    steps, step = [], 1
    for size in reversed(shape):
        steps.append(step)
        step *= max(1, size)
    return tuple(reversed(steps))


def pair(
    weights: Weights, wanted: Mapping[str, tuple[int, ...]], tied: Iterable[str], what: str
) -> dict[str, View]:
    """Return the tensor of a checkpoint for each name of a model, as `average` pairs names.

    Beginnings that wrappers and trainers add are left out, such as ``module.``.  Of a checkpoint
    that holds a model and its EMA, the model is taken.

    Args:
        weights: of the checkpoint.
        wanted: name in the model -> shape.
        tied: names that need not be held, as the model has their tensors under other names too.
        what: names the model in messages.

    Raises:
        MismatchError: a name is missing or too many, or a shape is another one.
    """
    pairs = _choose_group(weights, wanted, list(tied), what)
    for name, held in pairs.items():
        found = weights.views[held].shape
        if found != wanted[name]:
            raise MismatchError(
                f"{shown(weights.path)}: tensor '{shown(held)}' has shape {found}, but {what} has "
                f"{wanted[name]}"
            )
    return {name: weights.views[held] for name, held in pairs.items()}


def _choose_group(
    weights: Weights, wanted: Mapping[str, tuple[int, ...]], tied: Sequence[str], what: str
) -> dict[str, str]:
    """Return name in a model -> name in the part of a checkpoint that has all of them."""
    groups: dict[str, list[str]] = {}
    for name in weights.views:
        groups.setdefault(name.rpartition("/")[0], []).append(name)
    found = {}
    for group, names in groups.items():
        short = {name.rpartition("/")[2]: name for name in names}
        if _COUNTER not in wanted:
            short.pop(_COUNTER, None)
        pairs = match_names(list(short), list(wanted), tied)
        if pairs:
            found[group] = {one: short[other] for one, other in pairs.items()}
    # A running mean beside the weights themselves is another model.
    raw = {g: p for g, p in found.items() if not names_running_mean(g.rpartition("/")[2])}
    chosen = raw or found
    if len(chosen) > 1:
        raise MismatchError(
            f"{shown(weights.path)}: holds {what} in {list_some([*chosen])}; write one of them "
            "alone: polyak average FILE --key NAME -o NAME.safetensors"
        )
    if not chosen:
        raise MismatchError(_describe_difference(weights, wanted, tied, what))
    return next(iter(chosen.values()))


def _describe_difference(
    weights: Weights, wanted: Mapping[str, object], tied: Sequence[str], what: str
) -> str:
    """Return which names of a model are missing, and which it does not have."""
    held = {name.rpartition("/")[2] for name in weights.views}
    missing, extra = find_others(sorted(held), list(wanted), tied)
    text = f"{shown(weights.path)}: its tensors are not those of {what}: "
    parts = [
        f"{words} {', '.join(shown(name, 60) for name in names[:_MOST_NAMES])}"
        f"{word_rest(len(names) - _MOST_NAMES)}"
        for words, names in (("it lacks", missing), ("and has besides", extra))
        if names
    ]
    return text + "; ".join(parts)


def read(weights: Weights, views: Mapping[str, View]) -> Iterator[tuple[str, data.Array, View]]:
    """Yield name, stored bytes in the order of this machine, and view of each tensor.

    Raises:
        FormatError: the file is damaged, or changed since it was scanned.
    """
    with OpenInputs(weights.table.files) as files:
        for name, view in views.items():
            spec = view.spec
            raw = np.empty(spec.nbytes, np.uint8)
            if spec.nbytes and spec.storage:
                files.read(TensorSource(spec.storage, spec.dtype, spec.byteorder, 0), 0, raw, name)
            if spec.byteorder == ">" and spec.nbytes:
                width = spec.nbytes // spec.size
                raw = raw.view(f"u{width}").byteswap().view(np.uint8)
            yield name, raw, view
    check_unchanged(weights.table.files)


def read_arrays(weights: Weights) -> dict[str, data.Array]:
    """Return all tensors of a checkpoint as numpy arrays, by name.

    numpy has no bfloat16 and no float8: these become float32, which holds each of their values.
    """
    found = {}
    for name, raw, view in read(weights, weights.views):
        dtype = view.spec.dtype
        if dtype in ("float16", "float32", "float64"):
            flat = raw.view(FLOATS[dtype])
        elif dtype in FLOATS:
            wide = np.empty(view.spec.size)
            widen(raw, dtype, "<", wide)
            flat = wide.astype(np.float32)
        else:
            flat = raw.view(bool if dtype == "bool" else WHOLE_NUMBERS[dtype])
        strides = [step * flat.itemsize for step in view.steps]
        viewed = np.lib.stride_tricks.as_strided(flat[view.offset :], view.shape, strides)
        found[name] = np.array(viewed)
    return found
