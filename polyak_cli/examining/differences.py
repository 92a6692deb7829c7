"""HOW FAR APART: two checkpoints tensor by tensor, or a run from one checkpoint to the next.

Every value is read once, in flat memory; twice where the file holds checksums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from polyak_cli import engine, formats
from polyak_cli.checkpoints import Selection, file_of
from polyak_cli.engine import Compared, Memory
from polyak_cli.errors import MismatchError, UsageError, shown
from polyak_cli.matching import Row, compared, files_of, match, sources_of
from polyak_cli.tensors import FLOATS, Float64, Table, TensorSpec, is_numeric

#: Bound on the buffers.
_MEMORY = 16 << 20
#: A checkpoint whose distance to the average is so many times the median one stands out.
ODD = 3.0


class Difference(NamedTuple):
    """How far tensor B is from tensor A."""

    name: str
    relative: float  # ||A - B|| / ||A||, Euclidean; inf where A is 0 and B is not
    largest: float  # of |a - b|
    cosine: float | None  # A.B / (||A|| ||B||); None where one of them is 0
    equal: bool  # |a - b| <= atol + rtol |a| throughout; NaN equals NaN


@dataclass(frozen=True, slots=True)
class Differences:
    """Two checkpoints compared, the worst tensor first."""

    paths: tuple[Path, Path]
    tensors: tuple[Difference, ...]
    apart: tuple[str, ...]  # why some tensors could not be compared, a sentence each

    @property
    def equal(self) -> bool:
        """Whether all tensors are there in both and equal within the tolerances."""
        return not self.apart and all(tensor.equal for tensor in self.tensors)

    def data(self) -> dict[str, Any]:
        """Return it as what JSON can hold."""
        return {
            "paths": [str(path) for path in self.paths],
            "equal": self.equal,
            "apart": list(self.apart),
            "tensors": [tensor._asdict() for tensor in self.tensors],
        }


def diff(one: Path, other: Path, *, rtol: float = 0.0, atol: float = 0.0) -> Differences:
    """Compare the models in two checkpoints, which may be of different formats.

    Args:
        one: the first, A, which the distances are relative to.
        other: the second, B.
        rtol: relative tolerance, of the value in A.
        atol: absolute tolerance.

    Raises:
        FormatError: a file is foreign, damaged or hostile.
        UsageError: a tolerance is negative or no number.
    """
    for option, value in (("rtol", rtol), ("atol", atol)):
        if not value >= 0:
            raise UsageError(f"--{option} is {value}; expected 0 or more")
    tables = [formats.scan([file_of(path)])[0] for path in (one, other)]
    for table in tables:
        formats.check([table], jobs=1)
    rows, apart = _paired(tables)
    moments = {row[0].name: _Moments() for row in rows}
    for tensor, (a, b) in _values(tables, rows):
        moments[tensor.name].add(a, b, rtol, atol)
    engine.unchanged(files_of(tables))
    found = [moment.difference(name) for name, moment in moments.items()]
    found.sort(key=lambda tensor: (tensor.equal, -tensor.relative, -tensor.largest))
    return Differences((one, other), tuple(found), tuple(apart))


def _paired(tables: Sequence[Table]) -> tuple[list[Row], list[str]]:
    """Pair what can be compared as numbers; say of the rest what is not the same."""
    one, other = tables
    rows: list[Row] = []
    others: list[Row] = []
    apart = [f"only {shown(one.path)} has '{shown(n)}'" for n in one.tensors.keys() - other.tensors]
    apart += [
        f"only {shown(other.path)} has '{shown(n)}'" for n in other.tensors.keys() - one.tensors
    ]
    for name in (name for name in one.tensors if name in other.tensors):
        a, b = one.tensors[name], other.tensors[name]
        if (a.shape, a.arrangement) != (b.shape, b.arrangement):
            apart.append(f"'{shown(name)}' has shape {_shape(a)} and {_shape(b)}")
        elif is_numeric(a) and is_numeric(b):
            rows.append((a, b))
        elif (a.dtype, a.digest) != (b.dtype, b.digest):
            apart.append(f"'{shown(name)}', {a.dtype} and {b.dtype}, is not the same")
        elif a.storage and b.storage:
            others.append((a, b))
    pairs = [(row[0].name, sources_of(tables, row)) for row in others]
    unequal, _ = engine.differing(pairs, files_of(tables), Memory.within(_MEMORY, 1))
    apart += [f"'{shown(name)}' is not the same" for name in unequal]
    return rows, sorted(apart)


def _shape(spec: TensorSpec) -> str:
    return f"{spec.shape} {spec.arrangement}".rstrip()


def _values(
    tables: Sequence[Table], rows: Sequence[Row]
) -> Iterator[tuple[Compared, list[Float64]]]:
    """Yield the slabs of all tensors as each checkpoint has them."""
    with np.errstate(invalid="ignore", over="ignore"):
        yield from engine.values(
            compared(tables, rows), files_of(tables), Memory.within(_MEMORY, 1)
        )


@dataclass(slots=True)
class _Moments:
    """Sums over one tensor, slab by slab."""

    aa: float = 0.0
    bb: float = 0.0
    ab: float = 0.0
    dd: float = 0.0
    largest: float = 0.0
    equal: bool = True

    def add(self, a: Float64, b: Float64, rtol: float, atol: float) -> None:
        """Take in a slab, which is overwritten."""
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        apart = np.abs(a - b)
        apart[same] = 0.0
        apart[np.isnan(apart)] = np.inf
        self.equal = self.equal and bool(np.all(same | (apart <= atol + rtol * np.abs(a))))
        self.largest = max(self.largest, float(apart.max(initial=0.0)))
        self.dd += float(np.dot(apart, apart))
        unusable = ~(np.isfinite(a) & np.isfinite(b))
        a[unusable] = b[unusable] = 0.0
        self.aa += float(np.dot(a, a))
        self.bb += float(np.dot(b, b))
        self.ab += float(np.dot(a, b))

    def difference(self, name: str) -> Difference:
        """Return what the sums say."""
        norms = math.sqrt(self.aa) * math.sqrt(self.bb)
        relative = _ratio(math.sqrt(self.dd), math.sqrt(self.aa))
        cosine = self.ab / norms if norms else None
        return Difference(name, relative, self.largest, cosine, self.equal)


def _ratio(part: float, whole: float) -> float:
    if part == 0:
        return 0.0
    return part / whole if whole else math.inf


# --- a run ----------------------------------------------------------------------------------------


class Distance(NamedTuple):
    """How far one checkpoint of a run is from others, relative to the norm of the average."""

    path: Path
    epoch: int | None
    to_previous: float | None  # ||x_k - x_(k-1)|| / ||average||; None for the oldest
    to_average: float  # ||x_k - average|| / ||average||
    odd: bool  # it is `ODD` times as far from the average as the median checkpoint


@dataclass(frozen=True, slots=True)
class Distances:
    """A run, oldest first, and how far its checkpoints are from one another."""

    checkpoints: tuple[Distance, ...]
    tensors: int  # float tensors that were compared, all of them as one long vector

    def data(self) -> dict[str, Any]:
        """Return it as what JSON can hold."""
        rows = [{**row._asdict(), "path": str(row.path)} for row in self.checkpoints]
        return {"tensors": self.tensors, "checkpoints": rows}


def distances(selection: Selection, *, by: str = "name") -> Distances:
    """Measure a run: from each checkpoint to the next, and from each to their equal average.

    Args:
        selection: two checkpoints or more, of one model.
        by: how tensors are paired, "name" or "order".

    Raises:
        UsageError: there is only one checkpoint.
        FormatError: a file is foreign, damaged or hostile.
        MismatchError: the checkpoints do not belong to one model, or hold what is not finite.
    """
    checkpoints = selection.checkpoints
    if len(checkpoints) < 2:
        raise UsageError("there is only one checkpoint; name two or more to compare")
    tables = formats.scan([file_of(checkpoint.path) for checkpoint in checkpoints])
    rows = [row for row in match(tables, by) if row[-1].dtype in FLOATS]
    formats.check(tables, jobs=1)
    steps, spread = np.zeros(len(tables) - 1), np.zeros(len(tables))
    whole = 0.0
    for tensor, slab in _values(tables, rows):
        stacked = np.stack(slab)
        average = stacked.mean(axis=0)
        if not np.isfinite(average).all():
            raise MismatchError(
                f"tensor '{shown(tensor.name)}' holds what is not finite; leave the checkpoint out "
                "with --exclude. `polyak inspect --stats` says which it is"
            )
        whole += float(np.dot(average, average))
        steps += (np.diff(stacked, axis=0) ** 2).sum(axis=1)
        spread += ((stacked - average) ** 2).sum(axis=1)
    engine.unchanged(files_of(tables))
    to_average = [_ratio(math.sqrt(s), math.sqrt(whole)) for s in spread]
    to_previous = [None, *(_ratio(math.sqrt(s), math.sqrt(whole)) for s in steps)]
    limit = ODD * float(np.median(to_average))
    return Distances(
        tuple(
            Distance(checkpoint.path, checkpoint.epoch, step, far, far > limit)
            for checkpoint, step, far in zip(checkpoints, to_previous, to_average, strict=True)
        ),
        len(rows),
    )
