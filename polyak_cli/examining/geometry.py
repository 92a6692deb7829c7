"""The tool of `polyak geometry`: how the checkpoints of a run lie to one another.

Every value is read once, in flat memory; twice where the file holds checksums.  Data are not
needed.  `gram` has the formulas; this module knows the options, and what is measured.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Unpack

import numpy as np

from polyak_cli import checkpoints, formats
from polyak_cli.averaging import schemes
from polyak_cli.averaging.belonging import blame, runs
from polyak_cli.averaging.belonging.constants import (
    describe_constants,
    is_diverged,
    merge_constants,
)
from polyak_cli.averaging.matching import (
    Row,
    find_last_part,
    is_statistic,
    list_files,
    list_sources,
)
from polyak_cli.averaging.notebook import write_html, write_text
from polyak_cli.averaging.options import Options, Progress, Source, parse, select
from polyak_cli.averaging.planning import Plan, note_coefficients, plan_average
from polyak_cli.averaging.writing import find_place, judge_runs
from polyak_cli.engine import grams
from polyak_cli.engine.constants import Constant
from polyak_cli.engine.inputs import check_unchanged
from polyak_cli.engine.pairs import Products
from polyak_cli.engine.slabs import FoldTensor
from polyak_cli.errors import (
    MismatchError,
    UsageError,
    list_some,
    name_path,
    quote_glob,
    shown,
    word_count,
)
from polyak_cli.examining import gram as grams_of
from polyak_cli.examining.gram import Gram
from polyak_cli.examining.verdict import Movement, Window, judge, rank_windows
from polyak_cli.tensors import Float64

#: Groups of tensors of which products are kept, and the bytes for all of them: more tensors, or
#: more checkpoints, make coarser groups.
_GROUPS, _GROUPS_NBYTES = 4096, 32 << 20
#: The share of all movement above which BatchNorm's statistics hide that of the weights.
_HIDING = 0.5
#: Options of an average that say how it is written.
_OF_OUTPUTS = (
    "dtype",
    "optimizer",
    "allow_nonfinite",
    "lora",
    "force",
    "hash",
    "only_weights",
    "verify",
    "engine",
    "scheduler",
)


class Moved(NamedTuple):
    """How a tensor, or a group of them, moved during the run.

    Attributes:
        name: of the tensor; of a group, how the names of its tensors begin.
        elements: how many numbers it has.
        norm: of its equal average.
        relative: root of the mean square of the distances from that average, over its norm; None
            where that is 0 and it moved.
        share: of the squared distances from the average, of all tensors.
        cosine: the mean cosine of each step with the next; None if none is known.
    """

    name: str
    elements: int
    norm: float
    relative: float | None
    share: float
    cosine: float | None


@dataclass(frozen=True, slots=True)
class Geometry:
    """How the checkpoints of a run lie to one another.

    Distances are Euclidean, over all numbers that averaging would average.  Where they are called
    relative, they are divided by the norm of the equal average.

    Attributes:
        checkpoints: oldest first.
        positions: where each stands in the run, in epochs.
        scheme: the name of the scheme of the average; "custom" for ``--coefficients``.
        parameters: the parameters of the scheme.
        coefficients: of the average, oldest first; their sum is 1.
        gram: the inner products of the checkpoints; see `polyak_cli.examining.gram`, whose
            functions give distances, cosines and components of any weighted average.
        groups: tensor, or group of tensors -> its inner products.
        moved: how each of them moved, the largest share first.
        ignored: names of the tensors that averaging copies, such as whole numbers.
        verdict: whether the checkpoints are of one run, as far as their values tell.
        notes: messages for the user, one line each.
        bytes_read: bytes of tensors that were read.
        seconds: how long that took.
    """

    checkpoints: tuple[checkpoints.Checkpoint, ...]
    names: tuple[str, ...]
    positions: tuple[float, ...]
    scheme: str
    parameters: Mapping[str, schemes.Value]
    coefficients: tuple[float, ...]
    gram: Gram = field(repr=False)
    groups: Mapping[str, Gram] = field(repr=False)
    moved: tuple[Moved, ...] = field(repr=False)
    ignored: tuple[str, ...]
    verdict: runs.Verdict
    notes: tuple[str, ...]
    bytes_read: int
    seconds: float

    @property
    def norm(self) -> float:
        """The norm of the equal average."""
        return grams_of.norm_of_average(self.gram, grams_of.share_equally(len(self.checkpoints)))

    @property
    def spread(self) -> float | None:
        """The mean of ||x - m||^2 over ||m||^2, with m the equal average."""
        return grams_of.spread(self.gram)

    @property
    def mean_cosine(self) -> float | None:
        """The mean cosine of each step with the next; None if none is known."""
        return grams_of.mean_cosine(self.gram)

    @property
    def correlation(self) -> float | None:
        """The correlation of neighbours around the mean; see `gram.estimate_correlation`."""
        return grams_of.estimate_correlation(self.gram)

    @property
    def effective_number(self) -> float | None:
        """How many independent checkpoints would steady the average as much; None if unknown."""
        return grams_of.effective_number(self.gram, self.coefficients)

    @property
    def movement(self) -> Movement | None:
        """How the newest ten move, in one word; None for fewer than four checkpoints."""
        return judge(self.gram)

    @property
    def windows(self) -> tuple[Window, ...]:
        """Windows of ten checkpoints, those that scatter most first; () for fewer than ten."""
        return tuple(rank_windows(self.groups))

    def to_average(self, coefficients: Sequence[float] | None = None) -> tuple[float, ...]:
        """Return how far a weighted average is from each checkpoint; nothing is read again.

        Args:
            coefficients: one a checkpoint, oldest first, of any sign; they are normalised.  None
                means the average of the scheme.

        Raises:
            UsageError: there are not as many as checkpoints, one is not finite, or the sum is 0.
        """
        own = self.coefficients
        if coefficients is not None:
            own = schemes.coefficients(None, self.positions, custom=coefficients)
        return tuple(grams_of.distances_to_average(self.gram, own).tolist())

    def _describe(self) -> str:
        return f"{word_count(len(self.checkpoints), 'checkpoint')} of a run, how they lie"

    def __repr__(self) -> str:
        """Return three lines for a prompt; the fields have the rest."""
        words = f"spread {word_number(self.spread)}, steps turn by cosine "
        words += f"{word_number(self.mean_cosine)}, effective number "
        return write_text(
            self._describe(), f"{words}{word_number(self.effective_number)}", self.notes
        )

    def _repr_html_(self) -> str:
        """Return the checkpoints for a notebook, the newest first."""
        rows = [
            (one["name"], one["epoch"], one["to_previous"], one["cosine"], one["to_average"])
            for one in reversed(self.data()["checkpoints"])
        ]
        header = ("checkpoint", "epoch", "to previous", "cosine of steps", "to average")
        return write_html(self._describe(), header, rows, self.notes)

    def data(self) -> dict[str, Any]:
        """Return it as JSON types; distances are relative."""
        # Of one scale, in which nothing overflows: quotients are those of the true lengths.
        scaled = self.gram.normalise()
        equal = grams_of.share_equally(len(self.checkpoints))
        norm = grams_of.norm_of_average(scaled, equal)
        components = grams_of.find_components(scaled)
        place = grams_of.place_average(components, self.coefficients)

        def relate(lengths: Float64) -> list[float | None]:
            return [_divide(float(length), norm) for length in lengths]

        return {
            "checkpoints": self._list_checkpoints(scaled, components, relate),
            "scheme": self.scheme,
            "parameters": dict(self.parameters),
            "average": {
                "norm": grams_of.norm_of_average(self.gram, self.coefficients),
                "place": relate(place[:2]),
                "from_equal": relate(
                    np.array([grams_of.distance_of_averages(scaled, self.coefficients, equal)])
                )[0],
            },
            "norm": self.norm,
            "spread": self.spread,
            "mean_cosine": self.mean_cosine,
            "movement": self.movement.data() if self.movement else None,
            "windows": [
                {
                    "oldest": self.names[one.first],
                    "newest": self.names[one.end - 1],
                    "jitter": one.jitter,
                }
                for one in self.windows
            ],
            "components": components.shares.tolist(),
            "effective_number": {
                "independent": schemes.effective_number(self.coefficients),
                "correlated": self.effective_number,
                "correlation": self.correlation,
            },
            "distances": [relate(row) for row in grams_of.distances(scaled)],
            "gram": {
                "inner": self.gram.inner.tolist(),
                "along": self.gram.along.tolist(),
                "square": self.gram.square,
                "exponent": self.gram.exponent,
            },
            "elements": self.gram.size,
            "tensors": [one._asdict() for one in self.moved],
            "ignored": list(self.ignored),
            "runs": self.verdict.data([one.path for one in self.checkpoints]),
            "notes": list(self.notes),
            "bytes_read": self.bytes_read,
            "seconds": self.seconds,
        }

    def _list_checkpoints(
        self, scaled: Gram, components: grams_of.Components, relate: Any
    ) -> list[dict[str, Any]]:
        """Return what is known of each checkpoint."""
        turns = [_keep_finite(float(one)) for one in grams_of.cosines_of_steps(scaled)]
        columns: dict[str, Sequence[Any]] = {
            "epoch": [one.epoch for one in self.checkpoints],
            "coefficient": self.coefficients,
            "norm": [_keep_finite(float(one)) for one in grams_of.norms(self.gram)],
            "to_previous": [None, *relate(grams_of.lengths_of_steps(scaled))],
            "cosine": [None, *turns, None],
            "to_newest": relate(grams_of.distances(scaled)[-1]),
            "to_average": relate(grams_of.distances_to_average(scaled, self.coefficients)),
            "place": [relate(row[:2]) for row in components.places],
        }
        return [
            {"path": name_path(one.path), "name": self.names[k]}
            | {key: column[k] for key, column in columns.items()}
            for k, one in enumerate(self.checkpoints)
        ]


def word_number(value: float | None) -> str:
    """Return a number in three digits; "-" if there is none."""
    return "-" if value is None else f"{value:.3g}"


def _divide(part: float, whole: float) -> float | None:
    if part == 0:
        return 0.0
    return part / whole if whole else None


def _keep_finite(value: float) -> float | None:
    """Return a number, or None, as JSON has neither NaN nor infinity."""
    return value if np.isfinite(value) else None


def geometry(
    sources: Source | Sequence[Source] | checkpoints.Selection,
    *,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Geometry:
    """Measure how the checkpoints of a run lie to one another, in one reading and without data.

    Args:
        sources: directories, globs or files, or a selection made by `select`.
        progress: called after each piece of work with the bytes that it read.
        **options: those of `average` that choose checkpoints and tensors, coefficients, memory and
            jobs.

    Raises:
        UsageError: the options contradict one another or belong to an output, or there is only one
            checkpoint.
        CheckpointError: the checkpoints cannot be found, ordered or selected.
        FormatError: a checkpoint is foreign, damaged or hostile.
        MismatchError: the checkpoints do not belong to one run, or a value is not finite.
    """
    return measure(plan_geometry(sources, options), progress)


def plan_geometry(
    sources: Source | Sequence[Source] | checkpoints.Selection, options: Options
) -> Plan:
    """Decide from headers what is measured; see `geometry`."""
    for key in _OF_OUTPUTS:
        if options.get(key) not in (None, False):
            raise UsageError(
                f"--{key.replace('_', '-')} belongs to an average that is written; leave it out"
            )
    settings = parse(options)
    schemes.refuse_running_means(settings.weighting.scheme, "geometry")
    chosen = (
        sources
        if isinstance(sources, checkpoints.Selection)
        else select(sources, settings.choice, use_ema=settings.tensors.use_ema)
    )
    if len(chosen.checkpoints) < 2:
        raise UsageError("found only one checkpoint; name two or more to compare")
    return plan_average(chosen, None, settings)


def count_bytes(plan: Plan) -> int:
    """Return how many bytes of tensors measuring reads."""
    return sum(spec.nbytes for row in plan.averaged_rows for spec in row)


def measure(plan: Plan, progress: Progress | None = None) -> Geometry:
    """Read all values of a plan, and measure them; see `geometry`."""
    begun = time.perf_counter()
    taken, groups, verdict, notes = _read(plan, progress or (lambda _: None))
    whole = grams_of.make_empty(len(plan.checkpoints))
    for one in groups.values():
        whole = whole.plus(one)
    moved = _list_moved(groups, whole)
    about = [problem.text for problem in plan.suspicions]
    used = plan.settings.weighting.resolve()
    about += note_coefficients(used, plan.mean, plan.positions[-1])
    notes = [*about, *notes, *_note_ignored(plan), *_note_statistics(plan, moved)]
    return Geometry(
        checkpoints=plan.checkpoints,
        names=tuple(plan.names),
        positions=plan.positions,
        scheme=plan.scheme,
        parameters=plan.parameters,
        coefficients=plan.coefficients,
        gram=whole,
        groups=groups,
        moved=moved,
        ignored=plan.carried,
        verdict=verdict,
        notes=tuple(notes),
        bytes_read=taken.totals.bytes_read,
        seconds=time.perf_counter() - begun,
    )


# --- reading --------------------------------------------------------------------------------------


def _read(
    plan: Plan, progress: Progress
) -> tuple[grams.Taken, dict[str, Gram], runs.Verdict, list[str]]:
    """Read all values; return what was found, the products of each group, and notes."""
    rows = [row for row in plan.averaged_rows if row[-1].size]
    count = len(plan.tables)
    names = [row[-1].name for row in rows]
    labels = group_names(names, max(1, min(_GROUPS, _GROUPS_NBYTES // (8 * count * count))))
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    machine = plan.settings.machine
    compared = runs.choose_compared(rows)
    groups = {name: numbers[label] for name, label in zip(names, labels, strict=True)}
    job = grams.make_job(list_files(plan.tables), count, compared.sampling, groups)
    memory = grams.share_memory(machine.max_memory, machine.jobs, count)
    with blame.naming_inputs(plan.tables):
        formats.check(plan.tables, jobs=machine.share().jobs)
        tensors = _list_tensors(plan, rows, compared.groups)
        taken = grams.take(tensors, job, memory, progress)
    check_unchanged(list_files(plan.tables))
    constants = merge_constants(taken.constants)
    _refuse_diverged(rows, constants)
    verdict = runs.judge(taken.samples, range(count))
    notes = [*judge_runs(plan, verdict, "measured"), *describe_constants(constants)]
    found = {
        label: _make_gram(taken.groups[number])
        for label, number in numbers.items()
        if number in taken.groups
    }
    return taken, found, verdict, notes


def _list_tensors(
    plan: Plan, rows: Sequence[Row], groups: Sequence[int | None]
) -> Iterator[FoldTensor]:
    """Yield the tensors in the order in which they lie in the newest checkpoint."""
    pairs = zip(rows, groups, strict=True)
    for row, group in sorted(pairs, key=lambda pair: find_place(pair[0])):
        spec = row[-1]
        yield FoldTensor(spec.name, spec.size, list_sources(plan.tables, row), (), group)


def _make_gram(products: Products) -> Gram:
    """Return products of the differences and of the newest as a Gram matrix about the newest."""
    matrix, size, exponent = products
    inner = matrix.copy()
    inner[-1, :] = inner[:, -1] = 0.0
    along = matrix[:, -1].copy()
    along[-1] = 0.0
    return Gram(inner, along, float(matrix[-1, -1]), size, exponent)


def _refuse_diverged(rows: Sequence[Row], found: Mapping[str, Constant]) -> None:
    """Refuse NaN that every checkpoint has where they cannot be constants."""
    for spec in (row[-1] for row in rows if row[-1].name in found):
        one = found[spec.name]
        if is_diverged(one, spec.shape):
            raise MismatchError(
                f"tensor '{shown(one.name)}' holds {one.nan} NaN in every checkpoint: the run may "
                "have diverged; expected finite numbers. Choose earlier checkpoints with --to, or "
                f"leave the tensor out with --exclude-tensors {quote_glob(one.name)}"
            )


# --- groups of tensors ----------------------------------------------------------------------------


def group_names(names: Sequence[str], most: int) -> list[str]:
    """Return for each tensor the name of its group, so that there are at most so many groups.

    A group is a tensor if that fits; else the tensors whose names begin with the same parts, as
    many parts as fit; else all of them.
    """
    if len(names) <= most:
        return [*names]
    parts = [re.split(r"(?<=[/.])", name) for name in names]
    for depth in range(max(map(len, parts)) - 1, 0, -1):
        labels = ["".join(one[:depth]) for one in parts]
        if len({*labels}) <= most:
            return labels
    return [""] * len(names)


def _list_moved(groups: Mapping[str, Gram], whole: Gram) -> tuple[Moved, ...]:
    """Return how each group moved, the largest share of the whole movement first."""
    total = float(np.trace(grams_of.center(whole)))
    found = []
    for name, own in groups.items():
        relative = grams_of.spread(own)
        movement = float(np.trace(grams_of.center(own.rescale(whole.exponent))))
        found.append(
            Moved(
                name,
                own.size,
                grams_of.norm_of_average(own, grams_of.share_equally(own.count)),
                None if relative is None else float(np.sqrt(relative)),
                max(0.0, movement / total) if total > 0 else 0.0,
                grams_of.mean_cosine(own),
            )
        )
    return tuple(sorted(found, key=lambda one: -one.share))


def _note_ignored(plan: Plan) -> Iterator[str]:
    """Yield which tensors were not measured."""
    if plan.carried:
        yield (
            f"not measured: {word_count(len(plan.carried), 'tensor')} that averaging copies from "
            f"the newest ({list_some(plan.carried)})"
        )


def _note_statistics(plan: Plan, moved: Sequence[Moved]) -> Iterator[str]:
    """Yield that BatchNorm's statistics hide how the weights move, if they do."""
    table = plan.tables[-1]
    found = [one for one in moved if is_statistic(table, one.name)]
    share = sum(one.share for one in found)
    if share > _HIDING:
        yield (
            f"BatchNorm's statistics make up {share:.0%} of the movement and hide that of the "
            f"weights; leave them out with {_exclude([one.name for one in found])}"
        )


def _exclude(names: Sequence[str]) -> str:
    """Return the option that leaves BatchNorm's statistics out, as this file names them."""
    for word in ("moving_", "running_"):
        if all(find_last_part(name).startswith(word) for name in names):
            return f"--exclude-tensors '*{word}*'"
    # Keras's newer files number them.
    return f"--exclude-tensors, once for each: {list_some(names)}"
