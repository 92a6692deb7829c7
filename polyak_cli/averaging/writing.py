"""Carry out a plan: write the skeleton of an output, fold its tensors, and finalize it.

Decides nothing, and does not know how an output is published under its name.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from polyak_cli import formats
from polyak_cli.averaging import (
    carried_files,
    hashing,
    products,
    provenance,
    records,
    schemes,
)
from polyak_cli.averaging.belonging import blame, constants, quantised, runs
from polyak_cli.averaging.fates import describe_difference, is_compared, is_wanted
from polyak_cli.averaging.matching import Row, list_files, list_sources, list_variances
from polyak_cli.averaging.options import Machine, Progress
from polyak_cli.averaging.planning import Plan, sends_in_parts
from polyak_cli.engine import executors, reading
from polyak_cli.engine.constants import Constant
from polyak_cli.engine.folding import Done, FoldJob
from polyak_cli.engine.inputs import check_unchanged
from polyak_cli.engine.slabs import FoldTensor
from polyak_cli.engine.sums import Ledger
from polyak_cli.engine.timing import Crew, Totals
from polyak_cli.errors import MismatchError, UsageError, shown
from polyak_cli.storage import File, can_locate, mirrors, publishing
from polyak_cli.tensors import Checksum, Grid, Table, itemsize


class Written(NamedTuple):
    """What writing an output took and found."""

    totals: Totals
    files: list[Path]  # that hold the tensors
    beside: list[Path]  # others of an output folder
    notes: list[str]
    runs: runs.Verdict  # whether the checkpoints that count are of one run
    crew: Crew


def write_average(plan: Plan, hidden: Path, record: str, progress: Progress) -> Written:
    """Write the output under its hidden name."""
    with blame.naming_inputs(plan.tables):
        left = formats.check(plan.tables, jobs=plan.settings.machine.share().jobs, later=True)
    skeleton = _write_skeleton(plan, hidden, record)
    in_parts = _begin_parts(plan, skeleton)
    with blame.naming_inputs(plan.tables):
        done, kept, verdict = _fold(
            plan,
            [plan.mean],
            [skeleton],
            progress,
            in_parts=in_parts,
            unsigned=_list_variances(plan),
            checksums=left,
        )
    inputs = list_files(plan.tables)
    compared, differing = _compare_carried(plan, inputs, progress)
    beside = carried_files.copy_files(plan.files, hidden, record) if plan.files else []
    # Only now: a file that was rewritten while it was read gives a mixture of two checkpoints.
    whole = plan.output_form.architecture
    copied = [one.file for one in (plan.files.carried if plan.files else ())]
    check_unchanged([*inputs, *copied, *(whole.files if whole else ())])
    notes = [*judge_runs(plan, verdict), *constants.describe_constants(kept), *differing]
    weights = [*map(Path, skeleton.files)]
    totals = done.totals.plus(compared)
    return Written(totals, weights, beside, notes, verdict, done.crew)


def _list_variances(plan: Plan) -> frozenset[str]:
    """Return the averaged variances, unless they are computed over data afterwards."""
    if plan.recalibrate:
        return frozenset()
    return list_variances(plan.tables[-1], (row[-1].name for row in plan.averaged_rows))


def _begin_parts(plan: Plan, skeleton: formats.Skeleton) -> bool:
    """Begin to send the output to a store while it is folded, if it can be; return whether it is.

    No element may lie in two parts, which are cut at multiples of more than its size.
    """
    if not sends_in_parts(plan):
        return False
    spans: dict[int, list[tuple[int, int]]] = {k: [] for k in range(len(skeleton.files))}
    for row in plan.averaged_rows:
        place = skeleton.placements[row[-1].location]
        width = itemsize(place.dtype)
        if place.grid or place.offset % width:
            return False
        if row[-1].size:
            spans[place.file].append((place.offset, row[-1].size * width))
    return publishing.begin_parts(
        {Path(file): _join(spans[k]) for k, file in enumerate(skeleton.files)}
    )


def _join(runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return runs of bytes in order, those that touch as one."""
    joined: list[tuple[int, int]] = []
    for offset, nbytes in sorted(runs):
        if joined and sum(joined[-1]) == offset:
            offset, nbytes = joined[-1][0], joined.pop()[1] + nbytes
        joined.append((offset, nbytes))
    return joined


def write_again(plan: Plan, folder: Path, opened: Path, record: str, kernel: str = "") -> Table:
    """Write a plan's average again, exactly as `run` does; return its table.

    Args:
        plan: what to average.
        folder: where to write it; it should be empty.
        opened: the name, relative to ``folder``, of the file that opens the average; "NAME/FILE" if
            the average is a folder.
        record: the text of its record.
        kernel: the name of the one that computes; empty for the one in use.

    Raises:
        PolyakError: as `run`.
        OSError: there is no room.
    """
    left = formats.check(plan.tables, jobs=plan.settings.machine.share().jobs, later=True)
    hidden = folder / ".again"
    # Skeletons become what the hidden name already is: a folder of shards, or one file.
    if len(opened.parts) > 1:
        hidden.mkdir()
    else:
        hidden.touch()
    skeleton = _write_skeleton(plan, hidden, record)
    _fold(plan, [plan.mean], [skeleton], lambda _: None, flush=False, kernel=kernel, checksums=left)
    check_unchanged(list_files(plan.tables))
    publishing.take_names(hidden, folder / opened.parts[0])
    (table,) = formats.scan([folder / opened], with_optimizer=True)
    return table


def write_several(
    plan: Plan,
    means: Sequence[schemes.Mean],
    outputs: Sequence[Path],
    *,
    progress: Progress | None = None,
) -> list[str]:
    """Write several averages of the same checkpoints, and read each byte only once.

    The outputs are neither synced nor published; they are meant to be evaluated and deleted.

    Args:
        plan: which tensors of which checkpoints; its own mean is ignored.
        means: one for each output.
        outputs: the files to write, named as those of the format are; their records have only
            the sampled digests of the inputs.
        progress: called with the bytes read, after each piece of work.

    Returns:
        What a user should know of the checkpoints.

    Raises:
        PolyakError: as `run`.
        OSError: there is no room.
    """
    # Hashing all inputs would cost a second reading, for files that are deleted soon.
    unhashed = replace(plan.settings, output=replace(plan.settings.output, hash=False))
    jobs = plan.settings.machine.share().jobs
    sampled = hashing.compute_sampled_digests([table.files for table in plan.tables], jobs)
    custom = replace(plan, scheme="custom", parameters={}, settings=unhashed)
    for output in outputs:
        output.touch()  # a skeleton is written into a file that exists, as `publish` makes it
    skeletons = [
        _write_skeleton(
            each, output, records.encode(records.seal(provenance.make_record(each, sampled)))
        )
        for each, output in zip(
            (replace(custom, mean=mean) for mean in means), outputs, strict=True
        )
    ]
    count, unsigned = progress or (lambda _: None), _list_variances(plan)
    _, _, verdict = _fold(plan, means, skeletons, count, flush=False, unsigned=unsigned)
    check_unchanged(list_files(plan.tables))
    return judge_runs(plan, verdict)


def _write_skeleton(plan: Plan, output: Path, record: str) -> formats.Skeleton:
    """Write an output with its record, but without values for the averaged tensors."""
    return formats.write_skeleton(
        plan.tables[-1],
        output,
        averaged=plan.stored_dtypes,
        drop_optimizer=plan.drop_optimizer,
        form=plan.output_form,
        provenance=record,
    )


def _fold(
    plan: Plan,
    means: Sequence[schemes.Mean],
    skeletons: Sequence[formats.Skeleton],
    progress: Progress,
    *,
    flush: bool = True,
    kernel: str = "",
    in_parts: bool = False,
    unsigned: frozenset[str] = frozenset(),
    checksums: Sequence[Checksum] = (),
) -> tuple[Done, Mapping[str, Constant], runs.Verdict]:
    """Average the tensors into the outputs, by a mean each.

    Args:
        plan: which tensors of which checkpoints.
        means: one for each output.
        skeletons: the outputs.
        progress: as of `executors.fold`.
        flush: whether the outputs are kept, so that the disk gets them meanwhile.
        kernel: the name of the one that computes; empty for the one in use.
        in_parts: the outputs are sent to a store in parts.
        unsigned: names of the tensors that are refused if their average is negative.
        checksums: of inputs, which are compared with what is read.

    Returns:
        What it took, the constants that are not finite by tensor, and whether there is one run.
    """
    files = [file for skeleton in skeletons for file in skeleton.files]
    compared = runs.choose_compared(plan.averaged_rows)
    scaled = [mean.scale() for mean in means]
    ledger = Ledger(checksums, list_files(plan.tables))
    work = FoldJob(
        list_files(plan.tables),
        files,
        np.array([mean.multipliers for mean in scaled]),
        [mean.divisor for mean in scaled],
        plan.settings.tensors.allow_nonfinite,
        compared.sampling,
        kernel,
        parts=[mirrors.find_part(file) for file in files] if in_parts else (),
        unsigned=unsigned,
        regions=ledger.regions,
    )
    tensors = _Averaged(plan, skeletons, compared.groups, in_output_order=in_parts)
    done = _run(plan.settings.machine, tensors, work, progress, ledger, flush and not in_parts)
    kept = constants.merge_constants(done.constants)
    _refuse_diverged(plan, kept)
    if plan.settings.tensors.lora == "exact":
        for mean, skeleton in zip(scaled, skeletons, strict=True):
            made = _write_products(plan, mean, skeleton, progress, kernel)
            done = done._replace(totals=done.totals.plus(made))
    # Checksums in an archive cover the folded bytes, so they are written last.
    for skeleton in skeletons:
        skeleton.finalize()
    found = done.samples
    verdict = runs.judge(found, work.list_counted()) if found else runs.Verdict()
    return done, kept, verdict


def _write_products(
    plan: Plan, mean: schemes.Mean, skeleton: formats.Skeleton, progress: Progress, kernel: str
) -> Totals:
    """Write the factors of mean products; see `products.write_products`."""
    bound = plan.settings.machine.max_memory
    return products.write_products(
        plan.factors, plan.tables, mean, skeleton, bound, progress, kernel
    )


def _run(
    machine: Machine,
    tensors: _Averaged,
    work: FoldJob,
    progress: Progress,
    ledger: Ledger,
    flush: bool,
) -> Done:
    """Fold on an engine, and compare the checksums of what was read."""
    if machine.engine == "here":
        memory = machine.share(len(tensors.skeletons))
        done = executors.fold(tensors, work, memory, progress, flush=flush, ledger=ledger)
    else:
        done = _fold_on_cluster(machine, tensors, work, progress, ledger)
    ledger.verify(machine.share().jobs)
    return done


def _fold_on_cluster(
    machine: Machine, tensors: _Averaged, work: FoldJob, progress: Progress, ledger: Ledger
) -> Done:
    """Fold on the workers of a cluster, which see the inputs, and a local output, by their paths.

    Each worker flushes what it writes, and no two write neighbouring bytes: a network file system
    need not show one machine at once what another one has written.  An output in a bucket is sent
    by the workers, or given back by them; see `sinks`.
    """
    from polyak_cli.engine import clusters  # which only the few who ask for it have to load

    for path, _ in work.inputs:
        if not can_locate([path]):
            raise UsageError(
                f"{shown(path)}: its URL has a password or a signature, which is not sent to the "
                f"workers of --engine {machine.engine}; use --engine here, or a URL without, and "
                "credentials that each worker finds"
            )
    publishing.sync_files([Path(path) for path in work.outputs])
    ordered = replace(tensors, in_output_order=True)
    with clusters.start(machine.engine, machine.scheduler, machine.jobs) as executor:
        memory = machine.share_cluster()
        shared = replace(work, flush=True)
        return executors.fold(
            ordered, shared, memory, progress, executor, flush=False, ledger=ledger
        )


def judge_runs(plan: Plan, verdict: runs.Verdict, done: str = "averaged") -> list[str]:
    """Refuse checkpoints of more than one run, or return the note that they are averaged.

    Args:
        plan: what was read.
        verdict: whether there is one run.
        done: what is done with the checkpoints.

    Raises:
        MismatchError: there are several runs, which the options do not allow.
    """
    if not verdict.is_refused:
        return []
    text = runs.describe(verdict, plan.names)
    if runs.ALLOWED in plan.settings.tensors.allow:
        return [f"{text}; {done} anyway"]
    advice = runs.advise(verdict, plan.checkpoints, plan.names, plan.settings.choice)
    raise MismatchError(f"{text}; {advice}")


def _refuse_diverged(plan: Plan, found: Mapping[str, Constant]) -> None:
    """Refuse NaN that every checkpoint has where they cannot be constants."""
    for spec in (row[-1] for row in plan.averaged_rows if row[-1].name in found):
        if constants.is_diverged(found[spec.name], spec.shape):
            raise MismatchError(constants.describe_diverged(found[spec.name]))


@dataclass(frozen=True, slots=True)
class _Averaged:
    """The tensors to average.

    They are created on each iteration, because 100,000 of them would fill the memory.
    """

    plan: Plan
    skeletons: Sequence[formats.Skeleton]
    groups: Sequence[int | None]  # of each averaged tensor; see `FoldTensor`
    in_output_order: bool = False

    def __iter__(self) -> Iterator[FoldTensor]:
        """Yield them in the order of their offsets in the template, which reads fastest.

        With ``in_output_order``, it is the order of their offsets in the first output.
        """
        # The engine numbers the files of all outputs in one row.
        firsts = [
            *itertools.accumulate((len(skeleton.files) for skeleton in self.skeletons), initial=0)
        ]
        exact = self.plan.settings.tensors.lora == "exact"
        apart = products.list_exact(self.plan.factors) if exact else ()
        grouped = zip(self.plan.averaged_rows, self.groups, strict=True)
        find = self._find_target if self.in_output_order else find_place
        for row, group in sorted(grouped, key=lambda pair: find(pair[0])):
            spec = row[-1]
            # An empty tensor is complete in the skeleton, and factors of products are made apart.
            if spec.size and spec.name not in apart:
                sources = list_sources(self.plan.tables, row)
                places = [skeleton.placements[spec.location] for skeleton in self.skeletons]
                targets = [
                    place._replace(file=first + place.file) if first else place
                    for first, place in zip(firsts, places, strict=False)
                ]
                yield FoldTensor(spec.name, spec.size, sources, targets, group)

    def _find_target(self, row: Row) -> tuple[int, int, int]:
        """Return file and offset of a tensor in the first output, as a key to sort by."""
        target = self.skeletons[0].placements[row[-1].location]
        return target.file, target.offset, 0


def find_place(row: Row) -> tuple[int, int, int]:
    """Return file and offset of a tensor in the template, as a key to sort by."""
    storage = row[-1].storage
    if isinstance(storage, Grid):
        storage = storage.parts[0].extent
    # Chunks have no single offset: they come first, in the order of the plan.
    file, offset, start = (getattr(storage, key, 0) for key in ("file", "offset", "start"))
    return file, offset, start


def _compare_carried(
    plan: Plan, inputs: Sequence[File], progress: Progress
) -> tuple[Totals, list[str]]:
    """Compare carried tensors that should be the same in all checkpoints."""
    rows = [(r[-1].name, list_sources(plan.tables, r)) for r in plan.carried_rows if is_compared(r)]
    found, totals = reading.find_differing(rows, inputs, plan.settings.machine.share(), progress)
    _refuse_scaled_integers(plan, found)
    return totals, [describe_difference(name) for name, _ in rows if name in found]


def _refuse_scaled_integers(plan: Plan, differing: Collection[str]) -> None:
    """Refuse integers that differ between the checkpoints and have a scale that is averaged."""
    if not differing or quantised.ALLOWED in plan.settings.tensors.allow:
        return
    specs = [row[-1] for row in (*plan.averaged_rows, *plan.carried_rows)]
    names = [spec.name for spec in specs]
    chosen = {name for name in names if is_wanted(name, plan.settings.tensors)}
    for name, one in quantised.list_suspects(specs, set(plan.averaged), chosen).items():
        if name in differing:
            where = shown(plan.tables[-1].path)
            raise MismatchError(f"{where}: {quantised.describe_suspect(one, names)}")
