"""LOOK INSIDE: what a checkpoint says of itself, its table of tensors, and statistics of them.

Reads headers, and for the statistics every value, in flat memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from polyak_cli import engine, formats
from polyak_cli.checkpoints import file_of
from polyak_cli.engine import Memory
from polyak_cli.matching import compared
from polyak_cli.tensors import FLOATS, Table, TensorSpec, is_carried, is_numeric

#: Bound on the buffers.
_MEMORY = 16 << 20


class Statistics(NamedTuple):
    """What the values of one tensor are like; all but ``nonfinite`` are of the finite ones."""

    norm: float  # sqrt(sum x^2)
    least: float | None  # None where there is no finite value
    greatest: float | None
    nonfinite: int


class Inspected(NamedTuple):
    """One tensor."""

    spec: TensorSpec
    fate: str  # what averaging does with it: averaged, carried, dropped; or refused
    statistics: Statistics | None


@dataclass(frozen=True, slots=True)
class Inspection:
    """One checkpoint."""

    table: Table
    format: str  # as its users call it
    tensors: tuple[Inspected, ...]

    @property
    def parameters(self) -> int:
        """Numbers in the model's own tensors."""
        return sum(spec.size for spec in self.table.tensors.values() if spec.dtype in FLOATS)

    @property
    def provenance(self) -> Any:
        """What this tool wrote into it, None where it did not."""
        try:
            return json.loads(self.table.about.get("provenance", "null"))
        except (ValueError, RecursionError):  # somebody else's text under that name
            return self.table.about["provenance"]

    def data(self) -> dict[str, Any]:
        """Return it as what JSON can hold."""
        about = {key: text for key, text in self.table.about.items() if key != "provenance"}
        return {
            "path": str(self.table.path),
            "format": self.format,
            "size": self.table.size,
            "parameters": self.parameters,
            "about": about,
            "provenance": self.provenance,
            "tensors": [_data(tensor) for tensor in self.tensors],
        }


def _data(tensor: Inspected) -> dict[str, Any]:
    spec, fate, statistics = tensor
    return {
        "name": spec.name,
        "dtype": spec.dtype,
        "shape": list(spec.shape),
        "bytes": spec.nbytes,
        "stored": stored(spec),
        "fate": fate,
        **(statistics._asdict() if statistics else {}),
    }


def stored(spec: TensorSpec) -> str:
    """Say where the values of a tensor are."""
    if spec.storage is None:
        return "HDF5 library"
    offset = getattr(spec.storage, "offset", None)
    return spec.storage.way if offset is None else f"{spec.storage.way} at {offset}"


def inspect(paths: Sequence[Path], *, statistics: bool = False) -> Iterator[Inspection]:
    """Look inside checkpoints, one after the other; they need not belong together.

    Args:
        paths: the checkpoints.
        statistics: read every value, once.

    Raises:
        FormatError: one is foreign, damaged, hostile, or still being written.
    """
    for path in paths:
        (table,) = formats.scan([file_of(path)])
        specs = [*table.tensors.values(), *table.others.values()]
        found = _statistics(table, specs) if statistics else {}
        yield Inspection(
            table,
            formats.module(table.format).NAME,
            tuple(Inspected(s, _fate(table, s), found.get(s.name)) for s in specs),
        )


def _fate(table: Table, spec: TensorSpec) -> str:
    """Say what averaging with no options does with a tensor."""
    if spec.name in table.optimizer and not table.fixed:
        return "dropped"
    if spec.name in table.others:
        return "carried"
    if spec.dtype in FLOATS:
        return "averaged"
    return "carried" if is_carried(spec.dtype) else "refused"


def _statistics(table: Table, specs: Sequence[TensorSpec]) -> dict[str, Statistics]:
    """Measure every tensor that holds numbers."""
    formats.check([table], jobs=1)
    tensors = compared([table], [(spec,) for spec in specs if is_numeric(spec)])
    sums: dict[str, list[float]] = {}
    with np.errstate(invalid="ignore", over="ignore"):
        for tensor, (slab,) in engine.values(tensors, table.files, Memory.within(_MEMORY, 1)):
            finite = slab[np.isfinite(slab)]
            row = sums.setdefault(tensor.name, [0.0, math.inf, -math.inf, 0])
            row[0] += float(np.dot(finite, finite))
            row[1] = min(row[1], float(finite.min(initial=math.inf)))
            row[2] = max(row[2], float(finite.max(initial=-math.inf)))
            row[3] += len(slab) - len(finite)
    engine.unchanged(table.files)
    return {name: _summed(*row) for name, row in sums.items()}


def _summed(squares: float, least: float, greatest: float, nonfinite: float) -> Statistics:
    empty = least > greatest
    return Statistics(
        math.sqrt(squares), None if empty else least, None if empty else greatest, int(nonfinite)
    )
