"""The tool of `polyak inspect`: a checkpoint's format, record, tensors, and their statistics.

Reads headers, and for the statistics every value once, in flat memory.  Knows no format, and does
not compare checkpoints.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from polyak_cli import formats
from polyak_cli.averaging.belonging.averages import list_averages
from polyak_cli.averaging.belonging.quantised import find_quantised
from polyak_cli.averaging.belonging.states import is_of_the_run
from polyak_cli.checkpoints import enter, find_file
from polyak_cli.errors import name_path
from polyak_cli.examining.reductions import ValueSums, reduce_each
from polyak_cli.formats.catalogue import find_format
from polyak_cli.tensors import FLOATS, Table, TensorSpec, is_carried, is_numeric


class Statistics(NamedTuple):
    """Statistics of one tensor; all except ``nonfinite`` are of its finite values."""

    norm: float  # sqrt(sum x^2)
    min: float | None  # None where there is no finite value
    max: float | None
    nonfinite: int

    def data(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return {
            "norm": self.norm,
            "least": self.min,
            "greatest": self.max,
            "nonfinite": self.nonfinite,
        }


class Inspected(NamedTuple):
    """One tensor."""

    spec: TensorSpec
    fate: str  # in an average without options: averaged, carried, dropped or refused
    statistics: Statistics | None
    role: str  # weights, ema, optimizer or other


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a checkpoint holds.

    Attributes:
        table: path, files and tensors, as the headers describe them.
        format: the usual name of the format, such as "Keras HDF5".
        tensors: each tensor.  ``spec`` has its name, shape and dtype; ``fate`` says what becomes of
            it in an average without options: averaged, carried, dropped or refused; ``statistics``
            are norm, minimum, maximum and the number of values that are not finite, None unless
            they were asked for; ``role`` says what it is: weights, ema (a running mean of weights),
            optimizer, or other (of the training run).
    """

    table: Table
    format: str
    tensors: tuple[Inspected, ...]

    @property
    def parameters(self) -> int:
        """The number of float elements in the model's own tensors."""
        return sum(spec.size for spec in self.table.tensors.values() if spec.dtype in FLOATS)

    @property
    def provenance(self) -> Any:
        """The record that polyak wrote into the file, None if there is none."""
        try:
            return json.loads(self.table.about.get("provenance", "null"))
        except (ValueError, RecursionError):  # another program's text under that name
            return self.table.about["provenance"]

    def data(self) -> dict[str, Any]:
        """Return it as JSON types."""
        about = {key: text for key, text in self.table.about.items() if key != "provenance"}
        return {
            "path": name_path(self.table.path),
            "format": self.format,
            "size": self.table.size,
            "parameters": self.parameters,
            "about": about,
            "provenance": self.provenance,
            "tensors": [_encode(tensor) for tensor in self.tensors],
        }


def _encode(tensor: Inspected) -> dict[str, Any]:
    """Return one tensor as JSON types."""
    spec, fate, statistics, role = tensor
    return {
        "name": spec.name,
        "dtype": spec.dtype,
        "shape": list(spec.shape),
        "bytes": spec.nbytes,
        "stored": describe_storage(spec),
        "fate": fate,
        "role": role,
        **(statistics.data() if statistics else {}),
    }


def describe_storage(spec: TensorSpec) -> str:
    """Return in words where the values of a tensor lie."""
    if spec.storage is None:
        return "HDF5 library"
    offset = getattr(spec.storage, "offset", None)
    return spec.storage.describe() if offset is None else f"{spec.storage.describe()} at {offset}"


def inspect(paths: Sequence[Path], *, statistics: bool = False) -> Iterator[Inspection]:
    """Inspect checkpoints one after the other; they need not belong together.

    Args:
        paths: the checkpoints.
        statistics: also read every value, once.

    Raises:
        FormatError: a file is of no known format, damaged, hostile, or still being written.
    """
    for path in paths:
        path = Path(enter(path))
        (table,) = formats.scan([find_file(path)])
        specs = [*table.tensors.values(), *table.others.values()]
        found = _measure(table, specs) if statistics else {}
        refused = {name for one in find_quantised([*table.tensors.values()]) for name in one.parts}
        means = _list_means(table)
        tensors = [
            Inspected(
                spec,
                _decide_fate(table, spec, refused),
                found.get(spec.name),
                _find_role(table, spec, means),
            )
            for spec in specs
        ]
        yield Inspection(table, find_format(table.format).name, tuple(tensors))


def _list_means(table: Table) -> set[str]:
    """Return the names of all tensors that are running means, with the counters among them."""
    (averages,) = list_averages([table])
    means = {name for one in averages for name in one.names} | {*table.keras.ema_slots}
    # An average without a prefix has its tensors between the weights (TensorFlow's shadows).
    prefixes = tuple(one.prefix for one in averages if one.prefix)
    return means | {name for name in table.tensors if prefixes and name.startswith(prefixes)}


def _find_role(table: Table, spec: TensorSpec, means: Collection[str]) -> str:
    """Return what a tensor is to the training program."""
    if spec.name in means:
        return "ema"
    if spec.name in table.optimizer:
        return "optimizer"
    return "other" if spec.name in table.others or is_of_the_run(spec) else "weights"


def _decide_fate(table: Table, spec: TensorSpec, refused: Collection[str]) -> str:
    """Return what averaging without options does with a tensor."""
    if spec.name in refused:
        return "refused"
    if spec.name in table.optimizer and not table.rules.is_fixed:
        return "dropped"
    if spec.name in table.others:
        return "carried"
    if spec.dtype in FLOATS:
        return "carried" if is_of_the_run(spec) else "averaged"
    return "carried" if is_carried(spec.dtype) else "refused"


def _measure(table: Table, specs: Sequence[TensorSpec]) -> dict[str, Statistics]:
    """Return the statistics of every tensor that holds numbers."""
    formats.check([table], jobs=1)
    rows = [(spec,) for spec in specs if is_numeric(spec)]
    sums = reduce_each([table], rows, ValueSums)
    return {name: _summarise(found) for name, found in sums.items()}


def _summarise(sums: ValueSums) -> Statistics:
    has_finite = sums.min <= sums.max
    return Statistics(
        math.sqrt(sums.squares),
        sums.min if has_finite else None,
        sums.max if has_finite else None,
        sums.nonfinite,
    )
