"""THE TOOL: decide everything from headers (`plan`), then stream the tensors (`run`).

Knows which tensor meets which fate and what to tell about it.  Prints nothing, knows no file
format and does no arithmetic.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import itertools
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

import numpy as np

from polyak_cli import (
    __version__,
    checkpoints,
    ema,
    engine,
    formats,
    records,
    schemes,
)
from polyak_cli.checkpoints import Checkpoint, PassedOver
from polyak_cli.errors import (
    CheckpointError,
    FormatError,
    MismatchError,
    OutputError,
    PolyakError,
    UsageError,
    shown,
)
from polyak_cli.examining import health
from polyak_cli.examining.health import Checked
from polyak_cli.formats import publishing
from polyak_cli.matching import Row, files_of, is_statistic, leaf, match, sources_of
from polyak_cli.tensors import FLOATS, File, Table, TensorSpec, is_carried, itemsize

if TYPE_CHECKING:  # what knows of Keras is imported where it is asked for
    from polyak_cli.data import Split
    from polyak_cli.recalibration import Recalibration

Source = str | os.PathLike[str]
Progress = Callable[[int], None]

#: Bound on the buffers of the engine; the interpreter with numpy and h5py comes on top.
MAX_MEMORY = 32 << 20
#: Bytes of all inputs up to which their digests are recorded unasked: it takes no time then.
HASHED = 64 << 20
#: Rows that a model is run on at a time where it is recalibrated.
BATCH_SIZE = 256


class Options(TypedDict, total=False):
    """What `plan` and `average` may be told; every key may be left out.

    Attributes:
        last: only the newest so many; an error when there are fewer.
        from_epoch: the first epoch that counts.
        to_epoch: the last epoch that counts.
        every: every so many-th, counted back from the newest; 1.
        exclude: globs of file names that are not checkpoints.
        best: only the best so many by ``monitor``.
        monitor: the metric; "val_loss" with ``best``.
        mode: "min" or "max"; told by the metric's name.
        log: a Keras CSVLogger file with the metric.
        epoch_pattern: a regular expression that finds the epoch in a name.
        scheme: "equal" (the default), "linear", "exp", "ema", "power".
        alpha: of exp.
        decay: of ema.
        sigma: of power.
        coefficients: in place of a scheme, oldest first.
        dtype: stored float type, one of `tensors.FLOATS`; as in the template.
        optimizer: what becomes of the optimizer's state; "drop".
        include_tensors: globs: average only these.
        exclude_tensors: globs: carry these.
        match: how tensors are paired; "name".
        use_ema: take the EMAs that the optimizer keeps in place of the model's own tensors.
        allow_nonfinite: average NaN and infinity too.
        on_unhealthy: "fail" or "skip": `check` the chosen checkpoints first, and refuse them when
            anything is wrong, or average those that are healthy; None does neither.
        recalibrate: rows over which the average's BatchNorm statistics are gathered anew, by Keras;
            see `recalibrate`.
        batch_size: of these rows at a time, at most; `BATCH_SIZE`.
        trust_code: run the code that the model carries in a Lambda layer, to recalibrate it.
        force: replace an existing output.
        hash: record each input's SHA-256; where it is not said, if all have `HASHED` bytes at most.
        verify: read the output back from the disk before it gets its name, and compare it, bit for
            bit, with the average computed once more.
        max_memory: bytes for buffers; `MAX_MEMORY`.
        jobs: processes that fold; as many as there are processors, at most 8.
    """

    last: int | None
    from_epoch: int | None
    to_epoch: int | None
    every: int
    exclude: Sequence[str]
    best: int | None
    monitor: str | None
    mode: str | None
    log: Source | None
    epoch_pattern: str | None
    scheme: str | None
    alpha: float | None
    decay: float | None
    sigma: float | None
    coefficients: Sequence[float] | None
    dtype: str | None
    optimizer: Literal["drop", "newest"]
    include_tensors: Sequence[str]
    exclude_tensors: Sequence[str]
    match: Literal["name", "order"]
    use_ema: bool
    allow_nonfinite: bool
    on_unhealthy: Literal["fail", "skip"] | None
    recalibrate: Split | None
    batch_size: int | None
    trust_code: bool
    force: bool
    hash: bool | None
    verify: bool
    max_memory: int | None
    jobs: int | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do, decided from headers alone.

    Attributes:
        output: the file to write, if one was named.
        checkpoints: oldest first; the last one is the template.
        scheme: its name; "custom" for coefficients of one's own.
        parameters: of the scheme, such as alpha.
        coefficients: one a checkpoint, sum 1.
        positions: where each checkpoint stands in the run, in epochs.
        carried: names of the tensors that are the template's.
        dropped: names of what is left out.
        passed_over: what in a directory was not taken for a checkpoint, and why.
        skipped: the checkpoints that were chosen and left out because they are not healthy.
        notes: what a user should know before the run.
        bytes_to_read: of tensors, in all checkpoints that count.
        bytes_to_write: about the size of the output.
        memory: bytes, what the process has now and the buffers.
        options: as they were given.
        tables: of the checkpoints.
        averaged_rows: the tensors to average as each checkpoint has them.
        carried_rows: those to carry.
    """

    output: Path | None
    checkpoints: tuple[Checkpoint, ...]
    scheme: str
    parameters: Mapping[str, float]
    coefficients: tuple[float, ...]
    positions: tuple[float, ...]
    carried: tuple[str, ...]
    dropped: tuple[str, ...]
    passed_over: tuple[PassedOver, ...]
    skipped: tuple[Checked, ...]
    notes: tuple[str, ...]
    bytes_to_read: int
    bytes_to_write: int
    memory: int
    options: Options
    tables: tuple[Table, ...] = field(repr=False)
    averaged_rows: tuple[Row, ...] = field(repr=False)
    carried_rows: tuple[Row, ...] = field(repr=False)

    @property
    def averaged(self) -> tuple[str, ...]:
        """The names of the tensors that are averaged."""
        return tuple(row[-1].name for row in self.averaged_rows)

    @property
    def effective_number(self) -> float:
        """How many equally counted checkpoints would steady the average as much: 1 / sum(c^2)."""
        return schemes.effective_number(self.coefficients)

    @property
    def recalibrate(self) -> dict[str, Any] | None:
        """What BatchNorm's statistics will be gathered anew over, if they are."""
        rows = self.options.get("recalibrate")
        if rows is None:
            return None
        return {"data": rows.source, "rows": rows.rows, "batch_size": _batch_size(self.options)}

    def data(self) -> dict[str, Any]:
        """Return the plan as what JSON can hold."""
        return {
            "output": str(self.output) if self.output else None,
            "scheme": self.scheme,
            "parameters": dict(self.parameters),
            "effective_number": self.effective_number,
            "checkpoints": [
                {
                    "path": str(checkpoint.path),
                    "name": checkpoint.path.name,
                    "epoch": checkpoint.epoch,
                    "metric": checkpoint.metric,
                    "size": table.size,
                    "coefficient": coefficient,
                }
                for checkpoint, table, coefficient in zip(
                    self.checkpoints, self.tables, self.coefficients, strict=True
                )
            ],
            "template": str(self.checkpoints[-1].path),
            "tensors": {
                fate: {"count": len(names), "names": list(names)}
                for fate, names in (
                    ("averaged", self.averaged),
                    ("carried", self.carried),
                    ("dropped", self.dropped),
                )
            },
            "bytes_to_read": self.bytes_to_read,
            "bytes_to_write": self.bytes_to_write,
            "memory": self.memory,
            "recalibrate": self.recalibrate,
            "passed_over": [
                {"path": str(passed.path), "reason": passed.reason} for passed in self.passed_over
            ],
            "skipped": [one.data() for one in self.skipped],
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True)
class Report:
    """What a run did.

    Attributes:
        output: the file that was written.
        plan: what was to be done.
        bytes_read: of tensors; checksums that a format keeps are computed besides.
        bytes_written: the size of the output.
        seconds: wall clock, from the first byte to the renamed output, but for the recalibration,
            which tells its own.
        peak_memory: bytes, of the largest process.
        shares: of the workers' time: "reading", "folding", "writing"; sum 1.
        notes: the plan's, and what only the bytes could tell.
        recalibrated: what was gathered anew of BatchNorm's statistics, if that was asked for.
        verified: what the disk holds was found equal, bit for bit, to the average computed twice.
    """

    output: Path
    plan: Plan
    bytes_read: int
    bytes_written: int
    seconds: float
    peak_memory: int
    shares: Mapping[str, float]
    notes: tuple[str, ...]
    recalibrated: Recalibration | None = None
    verified: bool = False

    @property
    def speed(self) -> float:
        """Bytes read in a second."""
        return self.bytes_read / self.seconds if self.seconds else 0.0

    def data(self) -> dict[str, Any]:
        """Return the report, with its plan, as what JSON can hold."""
        return self.plan.data() | {
            "output": str(self.output),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "seconds": self.seconds,
            "speed": self.speed,
            "peak_memory": self.peak_memory,
            "shares": dict(self.shares),
            "notes": list(self.notes),
            "recalibrated": self.recalibrated.data() if self.recalibrated else None,
            "verified": self.verified,
        }


def average(
    sources: Source | Sequence[Source] | checkpoints.Selection,
    output: Source,
    *,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Report:
    """Average checkpoints into one model file: ``run(plan(...))``.

    Averaging the iterates of stochastic gradient descent: Polyak and Juditsky, "Acceleration of
    stochastic approximation by averaging", 1992; in the form of the schemes of `schemes`.

    Args:
        sources: directories, globs or files, or what `select` chose.
        output: the file to write, ``.h5`` or ``.hdf5``.
        progress: told the bytes read by every finished piece of work.
        **options: see `Options`.

    Raises:
        PolyakError: a leaf of it for whatever the input, the options or the disk do not allow;
            nothing is written then.
    """
    return run(plan(sources, output, **options), progress=progress)


def plan(
    sources: Source | Sequence[Source] | checkpoints.Selection,
    output: Source | None = None,
    **options: Unpack[Options],
) -> Plan:
    """Decide what averaging would do, without reading or writing one tensor.

    Args:
        sources: directories, globs or files; or what `select` chose, where the options that choose
            say nothing more.
        output: the file or folder that would be written; None to leave it open.
        **options: see `Options`.

    Raises:
        UsageError: the options contradict one another.
        CheckpointError: the checkpoints cannot be found, ordered or selected.
        FormatError: a checkpoint is foreign, damaged or hostile.
        MismatchError: the checkpoints do not belong to one model.
        OutputError: the output is in the way or cannot be written.
    """
    check_options(options)
    chosen = sources if isinstance(sources, checkpoints.Selection) else select(sources, options)
    scheme, coefficients = _coefficients(chosen.positions, options)
    selection, skipped = _fit(chosen, options)
    if skipped:
        options = _without(skipped, chosen, options)
        scheme, coefficients = _coefficients(selection.positions, options)
    paths = [checkpoints.file_of(checkpoint.path) for checkpoint in selection.checkpoints]
    memory = _memory(options)
    use_ema = options.get("use_ema", False)
    tables = tuple(formats.scan(paths, jobs=memory.jobs, everything=use_ema))
    target = Path(output) if output is not None else None
    if target:
        force = options.get("force", False)
        formats.check_output(target, tables, force=force, run=selection.left_out)
    _check_recalibration(tables[-1], target, options)
    taken, without = ema.in_place(tables) if use_ema else (tables, [])
    rows = match(taken, options.get("match", "name"))
    averaged, carried = _fates(rows, options, shown(tables[-1].path))
    if formats.target(target, tables[-1]) == tables[-1].format:
        _check_types(tables[-1], averaged, options)
    _check_chunks(tables, rows, memory, options)
    stored = _stored(averaged, options)
    drop = _drops(tables, options)
    formats.check_conversion(target, tables[-1], averaged=stored, drop_optimizer=drop)
    others = tables[-1].others
    dropped = [name for name in others if drop and name in tables[-1].optimizer]
    made = Plan(
        output=target,
        checkpoints=selection.checkpoints,
        scheme=scheme.name,
        parameters=scheme.parameters,
        coefficients=coefficients,
        positions=selection.positions,
        carried=(*(row[-1].name for row in carried), *(n for n in others if n not in dropped)),
        dropped=tuple(dropped),
        passed_over=selection.passed_over,
        skipped=skipped,
        notes=(
            *selection.notes,
            *_suspicions(selection, tables, options),
            *_beside(selection.checkpoints[-1], tables[-1]),
            *_notes(tables, averaged, carried, options),
            *_no_ema(without),
        ),
        bytes_to_read=_bytes_to_read(averaged, carried, coefficients),
        bytes_to_write=_bytes_to_write(tables[-1], averaged, dropped, options),
        memory=_peak() + memory.nbytes,
        options=options,
        tables=tables,
        averaged_rows=tuple(averaged),
        carried_rows=tuple(carried),
    )
    if target:
        _check_room(made, target)
    return made


def _check_room(plan: Plan, target: Path) -> None:
    """Refuse what will not fit on the disk."""
    # The average stays until it is copied, and what is verified until it is compared.
    copies = 1 + bool(plan.recalibrate) + plan.options.get("verify", False)
    publishing.check_room(target, copies * plan.bytes_to_write)


def run(plan: Plan, *, progress: Progress | None = None) -> Report:
    """Do what a plan says.

    Args:
        plan: of `plan`, with an output.
        progress: told the bytes read by every finished piece of work.

    Raises:
        PolyakError: an input is damaged or changed meanwhile, a value is not finite, or the output
            cannot be written; nothing is left then, and an older output is untouched.
    """
    if plan.output is None:
        raise UsageError("the plan has no output; name the file to write")
    begun = time.perf_counter()
    force = plan.options.get("force", False)
    folder = formats.is_folder(plan.output, plan.tables[-1])
    verify = plan.options.get("verify", False)
    record = records.text(records.sealed(provenance(plan)))
    with publishing.publish(plan.output, force=force, folder=folder) as hidden:
        totals, files, notes = _write(plan, hidden, record, progress or (lambda _: None))
        recalibrated = _recalibrated(plan, plan.output, hidden)
        if recalibrated:
            notes += recalibrated.notes
        nbytes = sum(file.stat().st_size for file in files)
        if verify:
            _verify(plan, plan.output, hidden, files, record, own=recalibrated is not None)
        written = hidden.stat().st_ino
    if verify and plan.output.stat().st_ino != written:
        raise OutputError(
            f"{shown(plan.output)}: another file has taken its name since; see what else writes it"
        )
    spent = totals.reading + totals.folding + totals.writing
    return Report(
        output=plan.output,
        plan=plan,
        bytes_read=totals.bytes_read,
        bytes_written=nbytes,
        seconds=time.perf_counter() - begun - (recalibrated.seconds if recalibrated else 0.0),
        peak_memory=_peak(),
        shares={
            part: getattr(totals, part) / spent if spent else 0.0
            for part in ("reading", "folding", "writing")
        },
        notes=(*plan.notes, *notes),
        recalibrated=recalibrated,
        verified=verify,
    )


def _write(
    plan: Plan, hidden: Path, record: str, progress: Progress
) -> tuple[engine.Totals, list[Path], list[str]]:
    """Write the whole output under its hidden name; return what that took, its files and notes."""
    options = plan.options
    formats.check(plan.tables, jobs=_memory(options).jobs)
    room = _room(plan, hidden, record)
    totals = _fold(plan, [plan.coefficients], [room], progress)
    inputs = files_of(plan.tables)
    compared, differing = _differing(plan, inputs, progress)
    engine.unchanged(inputs)
    return totals.plus(compared), [*map(Path, room.files)], differing


def again(plan: Plan, folder: Path, opened: Path, record: str) -> Table:
    """Write a plan's average once more, as `run` writes it; return its table.

    Args:
        plan: what to average.
        folder: where to write it; it should be empty.
        opened: the name, below that, of the file that opens it; of one in a folder where the
            output is such.
        record: that it carries.

    Raises:
        PolyakError: as `run`.
        OSError: there is no room.
    """
    formats.check(plan.tables, jobs=_memory(plan.options).jobs)
    hidden = folder / ".again"
    if len(opened.parts) > 1:
        hidden.mkdir()
    else:
        hidden.touch()
    room = _room(plan, hidden, record)
    _fold(plan, [plan.coefficients], [room], lambda _: None)
    engine.unchanged(files_of(plan.tables))
    publishing.take_names(hidden, folder / opened.parts[0])
    (table,) = formats.scan([folder / opened], everything=True)
    return table


def _verify(
    plan: Plan, output: Path, hidden: Path, files: Sequence[Path], record: str, *, own: bool
) -> None:
    """Refuse an output that is not, on the disk, what averaging once more gives.

    Args:
        plan: what was done.
        output: what it will be called.
        hidden: what it is called now.
        files: of which it consists.
        record: of the average.
        own: it has statistics of its own, gathered anew, which are compared with its record.

    Raises:
        OutputError: what differs.
    """
    from polyak_cli.examining.recompute import Written, compare_again

    publishing.from_disk(files)
    written = Written(
        files=files,
        opened=Path(output.name, files[-1].name) if hidden.is_dir() else Path(output.name),
        record=record,
        nbytes=plan.bytes_to_write,
        recalibrated=formats.scan([hidden], everything=True)[0] if own else None,
    )
    found = compare_again(plan, written, [output.resolve().parent])
    if found:
        first, *others = [*map(str, found.tensors), *found.outside]
        more = f" (and {len(others)} more)" if others else ""
        raise OutputError(
            f"{shown(output)}: read back, it is not what was written: {first}{more}; nothing was "
            "published. See whether disk and memory are sound"
        )


def several(
    plan: Plan,
    coefficients: Sequence[Sequence[float]],
    outputs: Sequence[Path],
    *,
    progress: Progress | None = None,
) -> None:
    """Write several averages of the same checkpoints, each of whose bytes is read once.

    The outputs are neither synced nor published: they are for looking at.

    Args:
        plan: which tensors of which checkpoints; its own coefficients do not count.
        coefficients: for each output, one a checkpoint, oldest first; see `schemes.coefficients`.
        outputs: the files to write, named as those of the format are; their records have only
            the sampled digests of the inputs.
        progress: told the bytes read by every finished piece of work.

    Raises:
        PolyakError: as `run`.
        OSError: there is no room.
    """
    rows = [tuple(row) for row in coefficients]
    options: Options = {**plan.options, "hash": False}
    sampled = [records.sampled_digest(table.files) for table in plan.tables]
    custom = replace(plan, scheme="custom", parameters={}, options=options)
    rooms = [
        _room(each, output, records.text(records.sealed(provenance(each, sampled))))
        for each, output in zip(
            (replace(custom, coefficients=row) for row in rows), outputs, strict=True
        )
    ]
    _fold(plan, rows, rooms, progress or (lambda _: None))
    engine.unchanged(files_of(plan.tables))


def _room(plan: Plan, output: Path, record: str) -> formats.Room:
    """Write all of an output, the record included, but its averaged tensors."""
    return formats.lay_out(
        plan.tables[-1],
        output,
        averaged=_stored(plan.averaged_rows, plan.options),
        drop_optimizer=_drops(plan.tables, plan.options),
        name=formats.target(plan.output, plan.tables[-1]),
        provenance=record,
    )


def _fold(
    plan: Plan,
    coefficients: Sequence[Sequence[float]],
    rooms: Sequence[formats.Room],
    progress: Progress,
) -> engine.Totals:
    """Average the tensors into the outputs, a row of coefficients each."""
    options = plan.options
    files = [file for room in rooms for file in room.files]
    nonfinite = options.get("allow_nonfinite", False)
    work = engine.Fold(files_of(plan.tables), files, np.array(coefficients), nonfinite)
    memory = _memory(options, len(rooms))
    totals = engine.fold(_Averaged(plan, rooms), work, memory, progress)
    for room in rooms:
        room.seal()
    return totals


def _recalibrated(plan: Plan, output: Path, hidden: Path) -> Recalibration | None:
    """Put the average with new statistics in its place, if that was asked for."""
    rows = plan.options.get("recalibrate")
    if rows is None:
        return None
    from polyak_cli import recalibration

    # Keras goes by the suffix; what begins with the hidden name is removed whatever happens.
    average = hidden.with_name(f"{hidden.name}.average{output.suffix}")
    hidden.rename(average)
    hidden.touch()
    (table,) = formats.scan([average], everything=True)
    made = recalibration.rewrite(
        replace(table, path=output),
        hidden,
        output,
        rows,
        _batch_size(plan.options),
        plan.options.get("trust_code", False),
    )
    average.unlink()
    return made


@dataclass(frozen=True, slots=True)
class _Averaged:
    """The tensors to average, made anew whenever they are gone through: 100,000 fill the memory."""

    plan: Plan
    rooms: Sequence[formats.Room]

    def __iter__(self) -> Iterator[engine.Averaged]:
        """Yield them as they lie in the template, which is how they are read best."""
        firsts = [*itertools.accumulate((len(room.files) for room in self.rooms), initial=0)]
        for row in sorted(self.plan.averaged_rows, key=_place):
            spec = row[-1]
            if spec.size:
                sources = sources_of(self.plan.tables, row)
                places = [room.places[spec.location] for room in self.rooms]
                targets = [
                    place._replace(file=first + place.file) if first else place
                    for first, place in zip(firsts, places, strict=False)
                ]
                yield engine.Averaged(spec.name, spec.size, spec.dtype, sources, targets)


def _place(row: Row) -> tuple[int, int, int]:
    """Return where a tensor lies in the template."""
    spec = row[-1]
    offset, start = (getattr(spec.storage, key, 0) for key in ("offset", "start"))
    return spec.file, offset, start


# --- deciding -------------------------------------------------------------------------------------


def check_options(options: Options) -> None:
    """Refuse what can be refused before there is a checkpoint.

    Raises:
        UsageError: names the option and what it takes.
    """
    unknown = options.keys() - Options.__annotations__.keys()
    if unknown:
        raise TypeError(f"there is no option {', '.join(sorted(unknown))}; see Options")
    for key in ("exclude", "include_tensors", "exclude_tensors"):
        if isinstance(options.get(key), str):  # a sequence too: of its letters
            raise UsageError(f"{key} is one text; expected a list of globs")
    for key in (
        "last",
        "from_epoch",
        "to_epoch",
        "every",
        "best",
        "jobs",
        "max_memory",
        "batch_size",
    ):
        if not isinstance(options.get(key), (int, np.integer, type(None))):
            raise UsageError(f"{key} is {options.get(key)!r}; expected a whole number")
    choices = {
        "dtype": (None, *FLOATS),
        "optimizer": ("drop", "newest"),
        "match": ("name", "order"),
        "on_unhealthy": (None, "fail", "skip"),
    }
    for key, allowed in choices.items():
        value = options.get(key, allowed[0])
        if value not in allowed:
            named = ", ".join(str(choice) for choice in allowed if choice)
            option = key.replace("_", "-")
            raise UsageError(f"--{option} is {shown(value)}; expected one of {named}")
    if options.get("on_unhealthy") and options.get("use_ema"):
        raise UsageError(
            "--on-unhealthy looks at the model's own tensors, not at the EMAs of --use-ema; leave "
            "one of them out"
        )
    for key, least in (("jobs", 1), ("max_memory", 1 << 20)):
        value = options.get(key)
        if isinstance(value, int) and value < least:
            raise UsageError(f"--{key.replace('_', '-')} is {value}; expected at least {least}")
    _choice(options)

    for key in ("batch_size", "trust_code"):
        if options.get(key) and options.get("recalibrate") is None:
            raise UsageError(
                f"--{key.replace('_', '-')} belongs to --recalibrate, which is missing"
            )


def _fit(
    chosen: checkpoints.Selection, options: Options
) -> tuple[checkpoints.Selection, tuple[Checked, ...]]:
    """Return which of the checkpoints to average and which to skip, if health is asked for.

    Raises:
        CheckpointError: something is wrong and nothing may be skipped, or everything would be.
    """
    wanted = options.get("on_unhealthy")
    if wanted is None:
        return chosen, ()
    found = health.check(
        chosen, match=options.get("match", "name"), max_memory=options.get("max_memory")
    )
    skipped = tuple(one for one in found.checkpoints if one.problems)
    if not found.healthy and (wanted == "fail" or len(skipped) == len(found.checkpoints)):
        first, *others = found.all_problems
        several = "s" if len(others) > 1 else ""
        more = f"; and {len(others)} more problem{several}" if others else ""
        remedy = (
            ", or leave what is unhealthy out with --on-unhealthy skip"
            if len(skipped) < len(found.checkpoints)
            else ", since no healthy checkpoint is left"
        )
        raise CheckpointError(
            f"{first.kind}: {first.text}{more}; see what is wrong with `polyak check`{remedy}"
        )
    out = {one.path for one in skipped}
    kept = [k for k, one in enumerate(chosen.checkpoints) if one.path not in out]
    told = [problem.text for problem in found.problems]
    if skipped:
        told.append(
            f"{len(skipped)} of the {len(chosen.checkpoints)} chosen checkpoints "
            f"{'is' if len(skipped) == 1 else 'are'} not healthy and skipped; {len(kept)} are left"
        )
    healthy = replace(
        chosen,
        checkpoints=tuple(chosen.checkpoints[k] for k in kept),
        positions=tuple(chosen.positions[k] for k in kept),
        notes=(*chosen.notes, *told),
        left_out=(*chosen.left_out, *out),
    )
    return healthy, skipped


def _without(
    skipped: Sequence[Checked], chosen: checkpoints.Selection, options: Options
) -> Options:
    """Return the options with the coefficients of one's own that are left."""
    own = options.get("coefficients")
    if own is None:
        return options
    out = {one.path for one in skipped}
    pairs = zip(chosen.checkpoints, own, strict=True)
    left = options.copy()
    left["coefficients"] = [coefficient for one, coefficient in pairs if one.path not in out]
    return left


def _suspicions(
    selection: checkpoints.Selection, tables: Sequence[Table], options: Options
) -> list[str]:
    """Say what epochs and file times tell, unless all of it has been looked at."""
    if options.get("on_unhealthy"):
        return []
    modified = [max(file.identity.mtime_ns for file in table.files) / 1e9 for table in tables]
    found = health.suspicions(selection.checkpoints, modified, selection.thinned)
    return [problem.text for problem in found]


def _check_recalibration(template: Table, output: Path | None, options: Options) -> None:
    rows = options.get("recalibrate")
    if rows is not None:
        from polyak_cli import recalibration

        recalibration.check(template, output, rows, _batch_size(options))


def _batch_size(options: Options) -> int:
    size = options.get("batch_size")
    return BATCH_SIZE if size is None else size


def check_replaceable(output: Path) -> None:
    """Refuse an output that is there already and was not written by this tool.

    For those who write one file again and again, without being asked each time.

    Raises:
        OutputError: with what to do.
    """
    if output.exists() and not formats.averages([checkpoints.file_of(output)]):
        raise OutputError(
            f"{shown(output)}: already exists and is no average by polyak; name another output, or "
            "use --force to replace it"
        )


def recorded(output: Path) -> Any:
    """Return what `provenance` was written into an output, None where there is nothing of it."""
    with contextlib.suppress(PolyakError, ValueError, RecursionError):
        (table,) = formats.scan([checkpoints.file_of(output)])
        record = json.loads(table.about.get("provenance", "null"))
        return records.unsealed(record) if isinstance(record, dict) else None
    return None


def select(
    sources: Source | Sequence[Source],
    options: Options,
    *,
    growing: bool = False,
    written_by_us: Callable[[Sequence[Path]], Collection[Path]] = formats.averages,
) -> checkpoints.Selection:
    """Choose checkpoints as the options say; see `checkpoints.select`."""
    listed = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    return checkpoints.select(
        listed,
        last=options.get("last"),
        from_epoch=options.get("from_epoch"),
        to_epoch=options.get("to_epoch"),
        every=options.get("every", 1),
        exclude=options.get("exclude", ()),
        best=options.get("best"),
        monitor=options.get("monitor"),
        mode=options.get("mode"),
        log=options.get("log"),
        epoch_pattern=options.get("epoch_pattern"),
        growing=growing,
        written_by_us=written_by_us,
    )


def _memory(options: Options, averages: int = 1) -> engine.Memory:
    jobs = options.get("jobs") or min(8, _processors())
    return engine.Memory.within(options.get("max_memory") or MAX_MEMORY, jobs, averages)


def _processors() -> int:
    """Return the processors this process may use, which macOS does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _drops(tables: Sequence[Table], options: Options) -> bool:
    return options.get("optimizer", "drop") == "drop" and not tables[-1].fixed


def _dtype(spec: TensorSpec, options: Options) -> str:
    return options.get("dtype") or spec.dtype


def _stored(averaged: Iterable[Row], options: Options) -> dict[str, str]:
    """Return where in the template each averaged tensor lies, and the type to store."""
    return {row[-1].location: _dtype(row[-1], options) for row in averaged}


def _fates(rows: Sequence[Row], options: Options, where: str) -> tuple[list[Row], list[Row]]:
    """Divide the model's tensors into those to average and those to carry.

    Raises:
        MismatchError: a tensor can be neither, or nothing is left to average.
        UsageError: a glob matches nothing.
    """
    include, exclude = options.get("include_tensors", ()), options.get("exclude_tensors", ())
    names = [row[-1].name for row in rows]
    for option, globs in (("include", include), ("exclude", exclude)):
        for glob in globs:
            if not any(fnmatch.fnmatchcase(name, glob) for name in names):
                raise UsageError(f"--{option}-tensors '{shown(glob)}' matches no tensor")
    averaged: list[Row] = []
    carried: list[Row] = []
    for row in rows:
        name, dtype = row[-1].name, row[-1].dtype
        wanted = not include or any(fnmatch.fnmatchcase(name, glob) for glob in include)
        wanted = wanted and not any(fnmatch.fnmatchcase(name, glob) for glob in exclude)
        if wanted and dtype in FLOATS:
            averaged.append(row)
        elif wanted and not is_carried(dtype):
            raise MismatchError(
                f"{where}: tensor '{shown(name)}' is of type {dtype}, which is not averaged; "
                f"expected {', '.join(FLOATS)}. Use --exclude-tensors to carry it from the newest"
            )
        else:
            carried.append(row)
    _refuse_quantised(averaged, carried, where)
    if not averaged:
        raise MismatchError(
            f"{where}: nothing to average; expected a float tensor that no option leaves out"
        )
    return averaged, carried


def _refuse_quantised(averaged: Iterable[Row], carried: Iterable[Row], where: str) -> None:
    """Refuse kernels of 8 bits with a float scale: the two mean nothing but together."""
    names = {row[-1].name for row in averaged}
    numbered = {name.rpartition("/")[0] for name in names if name.rpartition("/")[2].isdigit()}
    for row in (*averaged, *carried):
        spec = row[-1]
        folder, _, last = spec.name.rpartition("/")
        narrow = spec.dtype in ("int8", "uint8")
        nameless = narrow and last.isdigit() and spec.shape and folder in numbered  # weights files
        scaled = not names.isdisjoint((f"{spec.name}_scale", f"{spec.name}_scale_inv"))
        if nameless or (scaled and (narrow or spec.dtype.startswith("float8"))):
            raise MismatchError(
                f"{where}: tensor '{shown(spec.name)}' is quantised ({spec.dtype} with a scale); "
                "average the checkpoints before quantisation, or carry all of its layer with "
                "--exclude-tensors"
            )


def _check_types(template: Table, averaged: Sequence[Row], options: Options) -> None:
    """Refuse another type where the files cannot have it."""
    for spec in (row[-1] for row in averaged if template.fixed):
        if _dtype(spec, options) != spec.dtype:
            raise UsageError(
                f"--dtype {options.get('dtype')}: {shown(template.path)} keeps the types it has, "
                f"and tensor '{shown(spec.name)}' is {spec.dtype}; leave --dtype out and convert "
                "the output"
            )


def _check_chunks(
    tables: Sequence[Table], rows: Sequence[Row], memory: engine.Memory, options: Options
) -> None:
    """Refuse chunks that do not fit: HDF5's filters work on whole chunks only."""
    bound = (options.get("max_memory") or MAX_MEMORY) // memory.jobs // 2
    newest = len(tables) - 1
    apart = [k for k in range(newest) if tables[k].tensors is not tables[-1].tensors]
    for row in rows:
        for k in (*apart, newest):
            table, spec = tables[k], row[k]
            if spec.storage and spec.storage.held > bound:
                raise FormatError(
                    f"{shown(table.path)}: tensor '{shown(spec.name)}' is stored in chunks of "
                    f"{spec.storage.held} bytes, each of which must be held whole; raise "
                    f"--max-memory above {2 * memory.jobs * spec.storage.held} bytes"
                )


def _coefficients(
    positions: Sequence[float], options: Options
) -> tuple[schemes.Choice, tuple[float, ...]]:
    return _choice(options), schemes.coefficients(
        options.get("scheme"),
        positions,
        alpha=options.get("alpha"),
        decay=options.get("decay"),
        sigma=options.get("sigma"),
        custom=options.get("coefficients"),
    )


def _choice(options: Options) -> schemes.Choice:
    return schemes.resolve(
        options.get("scheme"),
        alpha=options.get("alpha"),
        decay=options.get("decay"),
        sigma=options.get("sigma"),
        custom=options.get("coefficients"),
    )


# --- telling --------------------------------------------------------------------------------------


def _notes(
    tables: Sequence[Table], averaged: Sequence[Row], carried: Sequence[Row], options: Options
) -> list[str]:
    """Say what a user should know before the run."""
    notes = [
        f"{shown(table.path)} is itself an average that polyak wrote"
        for table in tables
        if table.average
    ]
    if len({table.config for table in tables}) > 1:
        notes.append(
            "the model configuration is not the same in all checkpoints; the newest one's is kept"
        )
    names = [row[-1].name for row in averaged]
    statistics = [name for name in names if is_statistic(tables[-1], name)]
    if statistics and options.get("recalibrate") is None:
        notes.append(
            f"{len(statistics)} BatchNorm moving statistics are averaged ("
            f"{_some(statistics)}); they are estimates for each checkpoint, not for the average: "
            "recalculate them with one pass over training data (--recalibrate DATA) when the "
            "learning rate was high or the average scores below its checkpoints"
        )
    stored = {_dtype(row[-1], options) for row in averaged}
    if not _drops(tables, options) and tables[-1].optimizer:
        stored.add("optimizer")
    notes += [text for key, text in tables[-1].cautions.items() if key in stored]
    if tables[-1].fixed and tables[-1].optimizer:
        notes.append(
            "optimizer state is the newest checkpoint's: such a file keeps it even where it is to "
            "be dropped, and it does not belong to averaged values"
        )
    strings = [row[-1].name for row in carried if len({spec.digest for spec in row}) > 1]
    return notes + [_differs(name) for name in strings]


def _no_ema(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    return [
        f"{len(names)} float tensors have no EMA in the optimizer's state, as what is not trained; "
        f"their own values are averaged ({_some(names)})"
    ]


def _beside(newest: Checkpoint, template: Table) -> list[str]:
    """Say what a folder has besides its tensors, which an average does not."""
    if newest.path == template.path:
        return []
    return [
        "only the tensors are written: a program may want config.json, the tokenizer's files and "
        f"the like of {shown(newest.path)} beside them"
    ]


def _some(names: Sequence[str]) -> str:
    first = ", ".join(shown(name, 80) for name in names[:3])
    return first + (", ..." if len(names) > 3 else "")


def _differs(name: str) -> str:
    return f"tensor '{shown(name)}' is not the same in all checkpoints; the newest one's is carried"


def _compared(row: Row) -> bool:
    """Tell whether a carried tensor should be the same everywhere.

    Not where it was asked for, and PyTorch's BatchNorm counts its batches.
    """
    spec = row[-1]
    counts = spec.dtype in FLOATS or leaf(spec.name) == "num_batches_tracked"
    return not counts and all(spec.storage is not None for spec in row)


def _differing(
    plan: Plan, inputs: Sequence[File], progress: Progress
) -> tuple[engine.Totals, list[str]]:
    """Compare what is carried and should be the same everywhere."""
    rows = [(r[-1].name, sources_of(plan.tables, r)) for r in plan.carried_rows if _compared(r)]
    found, totals = engine.differing(rows, inputs, _memory(plan.options), progress)
    return totals, [_differs(name) for name, _ in rows if name in found]


def _bytes_to_read(
    averaged: Sequence[Row], carried: Sequence[Row], coefficients: Sequence[float]
) -> int:
    counted = sum(1 for coefficient in coefficients if coefficient)
    compared = sum(spec.nbytes for row in carried if _compared(row) for spec in row)
    return counted * sum(row[-1].nbytes for row in averaged) + compared


def _bytes_to_write(
    template: Table, averaged: Sequence[Row], dropped: Sequence[str], options: Options
) -> int:
    change = sum(
        row[-1].size * (itemsize(_dtype(row[-1], options)) - itemsize(row[-1].dtype))
        for row in averaged
    )
    return template.size + change - sum(template.others[n].nbytes for n in dropped)


def provenance(plan: Plan, sampled: Sequence[str] = ()) -> dict[str, Any]:
    """Return the record that the output carries, without the seal of `records`.

    No clock and no absolute path are in it, so that the bytes repeat.

    Args:
        plan: what is averaged.
        sampled: `records.sampled_digest` of each checkpoint, where it is known already.

    Raises:
        FormatError: a checkpoint cannot be read.
    """
    options = plan.options
    sampled = sampled or [records.sampled_digest(table.files) for table in plan.tables]
    names = [checkpoint.path.name for checkpoint in plan.checkpoints]
    paths = records.relative_paths([checkpoint.path for checkpoint in plan.checkpoints])
    inputs: list[dict[str, Any]] = [
        {
            "name": name,
            **({"path": path} if paths != names else {}),
            "epoch": checkpoint.epoch,
            "size": table.size,
            "coefficient": coefficient,
            "sampled_sha256": digest,
        }
        for name, path, checkpoint, table, coefficient, digest in zip(
            names, paths, plan.checkpoints, plan.tables, plan.coefficients, sampled, strict=True
        )
    ]
    wanted = options.get("hash")
    if wanted or (wanted is None and sum(table.size for table in plan.tables) <= HASHED):
        for record, table in zip(inputs, plan.tables, strict=True):
            found = digests(table)
            record["sha256"] = found[0] if len(found) == 1 else list(found)
    skipped = [
        {"name": one.path.name, "reasons": [problem.kind for problem in one.problems]}
        for one in plan.skipped
    ]
    return {
        "polyak": __version__,
        "scheme": plan.scheme,
        "parameters": dict(plan.parameters),
        "options": {
            "dtype": options.get("dtype"),
            "optimizer": "drop" if _drops(plan.tables, options) else "newest",
            "match": options.get("match", "name"),
            "use_ema": options.get("use_ema", False),
            "include_tensors": list(options.get("include_tensors", ())),
            "exclude_tensors": list(options.get("exclude_tensors", ())),
            "allow_nonfinite": options.get("allow_nonfinite", False),
        },
        "inputs": inputs,
        **({"skipped": skipped} if skipped else {}),
    }


def digests(table: Table) -> tuple[str, ...]:
    """Return the SHA-256 of each file of a checkpoint.

    Raises:
        FormatError: one cannot be read.
    """
    return tuple(sha256(Path(file.path)) for file in table.files)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal.

    Raises:
        FormatError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FormatError(f"{shown(path)}: cannot be read: {error.strerror}") from None


def _peak() -> int:
    """Return the peak memory of the largest process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage's unit differs
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    try:
        # Linux's getrusage also counts what the process was before exec: a large caller's size.
        status = Path("/proc/self/status").read_text()
    except OSError:
        return max(children, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return max(children, int(found[1]) * 1024 if found else 0)
