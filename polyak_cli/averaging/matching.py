"""Pair the tensors of several checkpoints, by name or by order.

Knows how Keras names layers, and why two checkpoints of one model may differ.  Reads no values.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

from polyak_cli.averaging.belonging import blame, layers, prefixes
from polyak_cli.engine.reading import ReadTensor
from polyak_cli.engine.slabs import TensorSource
from polyak_cli.errors import MismatchError, shown
from polyak_cli.formats.keras.names import sort_key
from polyak_cli.storage import File
from polyak_cli.tensors import COMMON, Storage, Table, TensorSpec

Row = tuple[TensorSpec, ...]  # one tensor as each checkpoint has it, oldest first
#: BatchNorm's statistics, as Keras, tf_keras's renorm and PyTorch call them.
_STATISTICS = {
    "moving_mean",
    "moving_variance",
    "moving_stddev",
    "running_mean",
    "running_var",
    "renorm_mean",
    "renorm_stddev",
}

#: Those of them that no model has below 0.
_VARIANCES = {one for one in _STATISTICS if not one.endswith("_mean")}


def match(tables: Sequence[Table], by: str) -> tuple[Row, ...]:
    """Pair the tensors of all checkpoints with the template's, in the template's order.

    Raises:
        MismatchError: a tensor is missing, extra, or of another shape or kind of dtype.
    """
    try:
        return _pair_all(tables, by)
    except prefixes.PrefixError:
        raise
    except MismatchError as error:
        # The newest need not be the one that is right.
        raise blame.blame_minority(
            tables, lambda one, other: describe_mismatch(one, other, by), error
        ) from None


def describe_mismatch(table: Table, template: Table, by: str) -> str:
    """Return why two checkpoints cannot belong to one run, "" if they can."""
    if table.format != template.format:
        return blame.describe_formats(table.path, table.format, template.path, template.format)
    try:
        _pair_all([table, template], by)
    except MismatchError as error:
        return str(error)
    return ""


def _pair_all(tables: Sequence[Table], by: str) -> tuple[Row, ...]:
    """Pair the tensors of all checkpoints with the template's; see `match`."""
    template = tables[-1]
    pair = _pair_by_order if by == "order" else _pair_by_name
    columns = [list(template.tensors.values())]
    for table in reversed(tables[:-1]):
        if table.tensors is template.tensors:  # the skeletons are equal byte for byte
            columns.insert(0, columns[-1])
            continue
        column = pair(table, template)
        for ours, theirs in zip(column, columns[-1], strict=True):
            _check_same(table, ours, template, theirs)
        columns.insert(0, column)
    return tuple(zip(*columns, strict=True))


def _pair_by_name(table: Table, template: Table) -> list[TensorSpec]:
    """Return the tensors in the template's order; refuse other names or other layers."""
    missing = [name for name in template.tensors if name not in table.tensors]
    extra = [name for name in table.tensors if name not in template.tensors]
    if missing or extra:
        _recommend_order(table, template)
        only_prefix = prefixes.describe_prefixes(table, template)
        if only_prefix:
            raise prefixes.PrefixError(only_prefix)
    if missing:
        raise MismatchError(
            f"{shown(table.path)}: has no tensor '{shown(missing[0])}', but "
            f"{shown(template.path)} has{_count_others(missing)}. All checkpoints must come from "
            "one model"
        )
    if extra:
        raise MismatchError(
            f"{shown(table.path)}: has a tensor '{shown(extra[0])}' that {shown(template.path)} "
            f"does not have{_count_others(extra)}. All checkpoints must come from one model"
        )
    # Names alone are not enough: Keras's loader goes by the position of a layer.
    try:
        layers.check_order(table, template)
    except layers.UnclearError as error:
        is_known = bool(table.keras.outline and template.keras.outline)
        way = ". Use --match order to pair layers by their position" if is_known else ""
        raise MismatchError(
            f"{shown(table.path)}: {error} ({shown(template.path)}); Keras loads layers by their "
            f"position, so all checkpoints need the same order{way}"
        ) from None
    return _find_by_labels(table, template, "name")


def _recommend_order(table: Table, template: Table) -> None:
    """Refuse names that only Keras has changed, and say how the tensors are paired.

    Keras numbers layers again when a model is built again in one process, and its versions call
    the tensors of a layer differently.
    """
    pairs: Mapping[str, TensorSpec] = {}
    if table.keras.layers and template.keras.layers:
        with contextlib.suppress(layers.UnclearError):
            pairs = layers.pair_by_layers(table, template, "numbers")
    elif _is_renumbered(table, template):
        pairs = dict(zip(template.tensors, table.tensors.values(), strict=True))
    renamed = ((pairs[name].name, name) for name in pairs if pairs[name].name != name)
    ours, theirs = next(renamed, ("", ""))
    if ours:
        raise MismatchError(
            f"{shown(table.path)}: tensor '{shown(ours)}' is called '{shown(theirs)}' in "
            f"{shown(template.path)}; Keras numbers the layers of each new model in one process "
            "from where it stopped, and versions of Keras name tensors differently. Use --match "
            "order to pair tensors by their position in the model"
        )


def _count_others(names: Sequence[str]) -> str:
    """Return how many names there are after the first, in brackets; "" if there are none."""
    return f" ({len(names) - 1} more such)" if len(names) > 1 else ""


def _pair_by_order(table: Table, template: Table) -> list[TensorSpec]:
    """Return the tensors as they stand; refuse an order that would mix different tensors."""
    column = list(table.tensors.values())
    if len(column) != len(template.tensors):
        raise MismatchError(
            f"{shown(table.path)}: has {len(column)} tensors, but {shown(template.path)} has "
            f"{len(template.tensors)}. All checkpoints must come from one model"
        )
    in_order = list(table.tensors) == list(template.tensors)
    has_same_names = table.tensors.keys() == template.tensors.keys()
    if (table.keras.layers and template.keras.layers) and (
        not has_same_names or _contradicts_names(table, template)
    ):
        return _pair_by_layers(table, template)
    # With equal names, another order means other layers: by position they would be mixed up.
    if has_same_names and not in_order:
        moved = next(a for a, b in zip(table.tensors, template.tensors, strict=True) if a != b)
        raise MismatchError(
            f"{shown(table.path)}: has the names of {shown(template.path)} in another order, from "
            f"'{shown(moved)}' on; leave out --match order to pair tensors by name"
        )
    for ours, theirs in zip(table.tensors, template.tensors, strict=True):
        _check_last_part(table, ours, template, theirs)
    if has_same_names:  # paths of a weights file, in which layers may have changed places
        return _find_by_labels(table, template, "order")
    return column


def _contradicts_names(table: Table, template: Table) -> bool:
    """Return whether equal names stand at places that are known to be other ones."""
    try:
        layers.check_order(table, template)
    except layers.UnclearError:
        return bool(table.keras.outline and template.keras.outline)
    return False


def _find_by_labels(table: Table, template: Table, by: str) -> list[TensorSpec]:
    """Return the tensors of the template's names, from where the file keeps their layers."""
    try:
        moved = layers.find_moved(table, template, by)
    except layers.UnclearError as error:
        way = ". Use --match order to pair layers by their position" if by == "name" else ""
        raise MismatchError(
            f"{shown(table.path)}: {error} ({shown(template.path)}); their paths only count the "
            f"layers of each class, and the layers' own names do not match{way}"
        ) from None
    return [table.tensors[name] for name in layers.rename(template.tensors, moved)]


def _pair_by_layers(table: Table, template: Table) -> list[TensorSpec]:
    """Return the tensors by their places in a Keras model, which are not those in the file."""
    try:
        pairs = layers.pair_by_layers(table, template)
    except layers.UnclearError as error:
        raise MismatchError(
            f"{shown(table.path)}: {error} ({shown(template.path)}); their order does not show "
            "which tensor is which. Save whole models (model.save), or give the layers the same "
            "names (name=...), so that they are paired by name"
        ) from None
    for name, spec in pairs.items():
        _check_last_part(table, spec.name, template, name)
    return [pairs[name] for name in template.tensors]


def _strip_numbers(name: str) -> str:
    """Return a name without the numbers that Keras appends to make names unique, and without :0."""
    return re.sub(r"_\d+(?=/|$)", "", re.sub(r":\d+$", "", name))


def _check_last_part(table: Table, ours: str, template: Table, theirs: str) -> None:
    """Refuse to pair a kernel with anything but a kernel."""
    if _strip_numbers(ours).rpartition("/")[2] != _strip_numbers(theirs).rpartition("/")[2]:
        raise MismatchError(
            f"{shown(table.path)}: by order, tensor '{shown(ours)}' would be averaged with "
            f"'{shown(theirs)}' of {shown(template.path)}; they are not the same tensor"
        )


def _is_renumbered(table: Table, template: Table) -> bool:
    """Return whether the names differ only in the numbers that Keras appends."""
    return [_strip_numbers(n) for n in table.tensors] == [
        _strip_numbers(n) for n in template.tensors
    ]


def _check_same(table: Table, ours: TensorSpec, template: Table, theirs: TensorSpec) -> None:
    # Fortran order is an arrangement too: the bytes of the two orders do not match.
    # A run may change its precision: any two plain floats are averaged as the numbers they are.  A
    # float8 beside a wider float is quantised: its numbers mean nothing without their scale.
    are_floats = ours.dtype in COMMON and theirs.dtype in COMMON
    for what, one, other in (
        ("shape", ours.shape, theirs.shape),
        ("dtype", ours.dtype, theirs.dtype),
        ("arrangement", ours.arrangement or "C order", theirs.arrangement or "C order"),
    ):
        if one != other and not (what == "dtype" and are_floats):
            raise MismatchError(
                f"{shown(table.path)}: tensor '{shown(ours.name)}' has {what} {one}, but "
                f"{shown(template.path)} has {other}. All checkpoints must come from one model"
            )


def list_sources(tables: Sequence[Table], row: Row) -> list[TensorSource]:
    """Return where every checkpoint keeps a tensor; files are numbered across tables."""
    if any(spec.storage is None for spec in row):  # only strings have none, and those are carried
        raise AssertionError(f"{row[-1].name} has no storage")
    firsts = itertools.accumulate((len(table.files) for table in tables), initial=0)
    return [
        TensorSource(cast(Storage, spec.storage), spec.dtype, spec.byteorder, first)
        for spec, first in zip(row, firsts, strict=False)
    ]


def find_last_part(name: str) -> str:
    """Return the last part of a tensor's name."""
    return re.split(r"[/.]", name)[-1].partition(":")[0]


def is_statistic(table: Table, name: str) -> bool:
    """Return whether a tensor is one of BatchNorm's moving statistics."""
    return find_last_part(name) in _STATISTICS or name in table.keras.statistics


def list_variances(table: Table, names: Iterable[str]) -> frozenset[str]:
    """Return BatchNorm's variances and deviations, which are never negative, among tensors."""
    listed = [*names]
    found = {name for name in listed if find_last_part(name) in _VARIANCES}
    groups: dict[str, list[str]] = defaultdict(list)
    for name in listed:
        if name in table.keras.statistics:
            groups[name.rpartition("/")[0]].append(name)
    for held in groups.values():  # mean, variance, and the same once more of renorm
        found.update(sorted(held, key=sort_key)[1::2])
    return frozenset(found)


def list_files(tables: Sequence[Table]) -> list[File]:
    """Return the files of all checkpoints, as `list_sources` numbers them."""
    return [file for table in tables for file in table.files]


def list_compared(tables: Sequence[Table], rows: Iterable[Row]) -> Iterator[ReadTensor]:
    """Yield the tensors that are not empty, in the form in which the engine reads them."""
    for row in rows:
        if row[0].size:
            yield ReadTensor(row[0].name, row[0].size, list_sources(tables, row))
