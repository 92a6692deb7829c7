"""The tool of `polyak diff`: compare two checkpoints tensor by tensor, or measure a run.

Every value is read once, in flat memory; twice where the file holds checksums.  Knows no format,
and does not judge whether a run is healthy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from polyak_cli import formats
from polyak_cli.averaging.belonging import assets, runs
from polyak_cli.averaging.matching import Row, match
from polyak_cli.averaging.notebook import write_html
from polyak_cli.checkpoints import Selection, enter, find_file
from polyak_cli.engine.samples import SampleSums
from polyak_cli.errors import MismatchError, UsageError, name_path, shown, word_count
from polyak_cli.examining.reductions import (
    PairSums,
    RunSums,
    find_differing,
    fold_slabs,
    reduce_each,
)
from polyak_cli.tensors import FLOATS, Float64, Table, TensorSpec, is_numeric

#: A checkpoint is far from the average if its distance exceeds this multiple of the median.
OUTLYING = 3.0


class Difference(NamedTuple):
    """How far tensor B is from tensor A."""

    name: str
    relative: float  # ||A - B|| / ||A||, Euclidean; inf where A is 0 and B is not
    largest: float  # the maximum of |a - b|
    cosine: float | None  # A.B / (||A|| ||B||); None where one norm is 0
    equal: bool  # |a - b| <= atol + rtol |a| throughout; NaN equals NaN


@dataclass(frozen=True, slots=True)
class Differences:
    """The result of comparing two checkpoints, A and B.

    Attributes:
        paths: A and B.
        tensors: how far each tensor of B is from that of A, the largest relative distance first.
            Each has ``name``; ``relative``, the norm of A - B over the norm of A; ``largest``, the
            largest absolute difference of two elements; ``cosine``, None where a norm is 0; and
            ``equal``, whether all elements are equal within the tolerances.
        mismatches: why some tensors could not be compared, a sentence each.
        verdict: whether both are of one run, as far as their values tell.
    """

    paths: tuple[Path, Path]
    tensors: tuple[Difference, ...]
    mismatches: tuple[str, ...]
    verdict: runs.Verdict = field(default_factory=runs.Verdict)

    @property
    def equal(self) -> bool:
        """Whether both have all tensors, equal within the tolerances."""
        return not self.mismatches and all(tensor.equal for tensor in self.tensors)

    def _repr_html_(self) -> str:
        """Return the worst tensors for a notebook."""
        sentence = f"{self.paths[0]} and {self.paths[1]}: {'equal' if self.equal else 'different'}"
        rows = [(one.name, one.relative, one.largest, one.cosine) for one in self.tensors]
        header = ("tensor", "relative distance", "largest difference", "cosine")
        return write_html(sentence, header, rows, self.mismatches)

    def data(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return {
            "paths": [name_path(path) for path in self.paths],
            "equal": self.equal,
            "apart": list(self.mismatches),
            "tensors": [tensor._asdict() for tensor in self.tensors],
            "runs": self.verdict.data(self.paths),
        }


def diff(one: Path, other: Path, *, rtol: float = 0.0, atol: float = 0.0) -> Differences:
    """Compare the models in two checkpoints, which may be of different formats.

    Args:
        one: the first, A; distances are relative to its norm.
        other: the second, B.
        rtol: relative tolerance, a share of the value in A.
        atol: absolute tolerance.

    Raises:
        FormatError: a file is of no known format, damaged or hostile.
        UsageError: a tolerance is negative or NaN.
    """
    for option, value in (("rtol", rtol), ("atol", atol)):
        if not value >= 0:
            raise UsageError(f"--{option} is {value}; expected 0 or more")
    one, other = (Path(enter(path)) for path in (one, other))
    tables = [formats.scan([find_file(path)])[0] for path in (one, other)]
    for table in tables:
        formats.check([table], jobs=1)
    rows, mismatches = _pair(tables)
    sums = reduce_each(tables, rows, lambda: PairSums(rtol, atol))
    names = [row[0].name for row in rows]
    found = [_summarise(name, sums.get(name, PairSums())) for name in names]
    found.sort(key=lambda tensor: (tensor.equal, -tensor.relative, -tensor.largest))
    return Differences((one, other), tuple(found), tuple(mismatches), _judge(rows, sums))


def _judge(rows: Sequence[Row], sums: Mapping[str, PairSums]) -> runs.Verdict:
    """Return whether two checkpoints are of one run, from the matrices that `average` compares."""
    samples = SampleSums(2)
    for row, group in zip(rows, runs.choose_compared(rows).groups, strict=True):
        if group is not None and row[0].name in sums:
            # Checkpoint 1, and the one right before it.
            samples.of(group)[1, 0] += sums[row[0].name].apart
    return runs.judge(samples, range(2))


def _pair(tables: Sequence[Table]) -> tuple[list[Row], list[str]]:
    """Pair the tensors that can be compared as numbers; describe the others that differ."""
    one, other = tables
    rows: list[Row] = []
    others: list[Row] = []
    mismatches = [
        f"only {shown(one.path)} has '{shown(n)}'" for n in one.tensors.keys() - other.tensors
    ]
    mismatches += [
        f"only {shown(other.path)} has '{shown(n)}'" for n in other.tensors.keys() - one.tensors
    ]
    for name in (name for name in one.tensors if name in other.tensors):
        a, b = one.tensors[name], other.tensors[name]
        if (a.shape, a.arrangement) != (b.shape, b.arrangement):
            shapes = f"{_describe_shape(a)} and {_describe_shape(b)}"
            mismatches.append(f"'{shown(name)}' has shape {shapes}")
        elif is_numeric(a) and is_numeric(b):
            rows.append((a, b))
        elif (a.dtype, a.digest) != (b.dtype, b.digest):
            mismatches.append(f"'{shown(name)}', {a.dtype} and {b.dtype}, differs")
        elif a.storage and b.storage:
            others.append((a, b))
    unequal = find_differing(tables, others)
    mismatches += [f"'{shown(name)}' differs" for name in unequal]
    if one.format == other.format:  # each keeps its vocabularies in its own place
        mismatches += assets.describe_differences(tables)
    return rows, sorted(mismatches)


def _describe_shape(spec: TensorSpec) -> str:
    return f"{spec.shape} {spec.arrangement}".rstrip()


def _summarise(name: str, sums: PairSums) -> Difference:
    norms = math.sqrt(sums.aa) * math.sqrt(sums.bb)
    relative = _divide(math.sqrt(sums.dd), math.sqrt(sums.aa))
    cosine = sums.ab / norms if norms else None
    return Difference(name, relative, sums.largest, cosine, sums.equal)


def _divide(part: float, whole: float) -> float:
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
    outlier: bool  # far from the average, and not because training began there

    def data(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return {
            "path": name_path(self.path),
            "epoch": self.epoch,
            "to_previous": self.to_previous,
            "to_average": self.to_average,
            "odd": self.outlier,
        }


@dataclass(frozen=True, slots=True)
class Distances:
    """The distances within a run.

    Attributes:
        checkpoints: oldest first.  Each has ``path`` and ``epoch``; ``to_previous`` and
            ``to_average``, Euclidean distances relative to the norm of the average; and
            ``outlier``, whether it is more than three times as far from the average as the median.
            The first ones are none: training moves most at its beginning.
        tensors: the number of float tensors; a distance is over all of them.
    """

    checkpoints: tuple[Distance, ...]
    tensors: int

    def _repr_html_(self) -> str:
        """Return the distances for a notebook, the newest checkpoint first."""
        sentence = f"{word_count(len(self.checkpoints), 'checkpoint')} of a run, their distances"
        rows = [
            (one.path.name, one.to_previous, one.to_average, "yes" if one.outlier else "no")
            for one in reversed(self.checkpoints)
        ]
        return write_html(sentence, ("checkpoint", "to previous", "to average", "outlier"), rows)

    def data(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return {"tensors": self.tensors, "checkpoints": [row.data() for row in self.checkpoints]}


def distances(selection: Selection, *, by: str = "name") -> Distances:
    """Measure a run: from each checkpoint to the next, and from each to their equal average.

    Args:
        selection: two checkpoints or more, of one model.
        by: how tensors are paired, "name" or "order".

    Raises:
        UsageError: there is only one checkpoint.
        FormatError: a file is of no known format, damaged or hostile.
        MismatchError: the checkpoints do not belong to one model, or a value is not finite.
    """
    checkpoints = selection.checkpoints
    if len(checkpoints) < 2:
        raise UsageError("found only one checkpoint; name two or more to compare")
    tables = formats.scan([find_file(checkpoint.path) for checkpoint in checkpoints])
    rows = [row for row in match(tables, by) if row[-1].dtype in FLOATS]
    formats.check(tables, jobs=1)
    sums = RunSums(len(tables))

    def add(name: str, slabs: list[Float64]) -> None:
        if not sums.add(slabs):
            raise MismatchError(
                f"tensor '{shown(name)}' holds a value that is not finite; find the checkpoint "
                "with `polyak inspect --stats`, and leave it out with --exclude"
            )

    fold_slabs(tables, rows, add)
    norm = math.sqrt(sums.average)
    to_average = [_divide(math.sqrt(squares), norm) for squares in sums.spread]
    to_previous = [None, *(_divide(math.sqrt(squares), norm) for squares in sums.steps)]
    measured = zip(checkpoints, to_previous, to_average, _find_outliers(to_average), strict=True)
    return Distances(
        tuple(Distance(one.path, one.epoch, step, far, odd) for one, step, far, odd in measured),
        len(rows),
    )


def _find_outliers(to_average: Sequence[float]) -> Iterator[bool]:
    """Yield for each checkpoint whether it is an outlier.

    Those before the first that is near the average are none: training moves most at its beginning.
    """
    limit = OUTLYING * float(np.median(to_average))
    settled = False
    for far in to_average:
        yield settled and far > limit
        settled = settled or far <= limit
