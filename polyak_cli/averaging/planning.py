"""Decide everything about an average from headers: `plan`.

Writes nothing and does no arithmetic on tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from polyak_cli import checkpoints, formats
from polyak_cli.averaging import ema, schemes
from polyak_cli.averaging.fates import (
    decide_fates,
    drops_optimizer,
    is_compared,
    list_notes,
    map_stored_dtypes,
    note_files_beside,
    note_missing_emas,
    stored_dtype,
)
from polyak_cli.averaging.matching import Row, match
from polyak_cli.averaging.options import (
    MAX_MEMORY,
    Options,
    Source,
    batch_size_of,
    check_options,
    choose_coefficients,
    measure_peak,
    plan_memory,
    select,
)
from polyak_cli.checkpoints import Checkpoint, PassedOver
from polyak_cli.checkpoints.suspicions import find_suspicions
from polyak_cli.engine.slabs import Memory
from polyak_cli.errors import (
    CheckpointError,
    FormatError,
    UsageError,
    choose_verb,
    shown,
    word_count,
)
from polyak_cli.examining import health
from polyak_cli.examining.health import Checked
from polyak_cli.formats import outputs
from polyak_cli.storage import publishing
from polyak_cli.tensors import Table, itemsize

if TYPE_CHECKING:  # what knows of Keras is imported where it is asked for
    pass


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
        return {"data": rows.source, "rows": rows.rows, "batch_size": batch_size_of(self.options)}

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
    scheme, coefficients = choose_coefficients(chosen.positions, options)
    selection, skipped = _fit(chosen, options)
    if skipped:
        options = _without(skipped, chosen, options)
        scheme, coefficients = choose_coefficients(selection.positions, options)
    paths = [checkpoints.find_file(checkpoint.path) for checkpoint in selection.checkpoints]
    memory = plan_memory(options)
    use_ema = options.get("use_ema", False)
    tables = tuple(formats.scan(paths, jobs=memory.jobs, with_optimizer=use_ema))
    target = Path(output) if output is not None else None
    if target:
        force = options.get("force", False)
        outputs.check_output(target, tables, force=force, run=selection.left_out)
    _check_recalibration(tables[-1], target, options)
    taken, without = ema.in_place(tables) if use_ema else (tables, [])
    rows = match(taken, options.get("match", "name"))
    averaged, carried = decide_fates(rows, options, shown(tables[-1].path))
    if outputs.choose_format(target, tables[-1]) == tables[-1].format:
        _check_types(tables[-1], averaged, options)
    _check_chunks(tables, rows, memory, options)
    stored = map_stored_dtypes(averaged, options)
    drop = drops_optimizer(tables, options)
    outputs.check_conversion(target, tables[-1], averaged=stored, drop_optimizer=drop)
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
            *note_files_beside(selection.checkpoints[-1], tables[-1]),
            *list_notes(tables, averaged, carried, options),
            *note_missing_emas(without),
        ),
        bytes_to_read=_bytes_to_read(averaged, carried, coefficients),
        bytes_to_write=_bytes_to_write(tables[-1], averaged, dropped, options),
        memory=measure_peak() + memory.nbytes,
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
        more = f"; and {word_count(len(others), 'more problem')}" if others else ""
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
            f"{choose_verb(len(skipped))} not healthy and skipped; {len(kept)} are left"
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
    modified = [max(file.version.mtime_ns for file in table.files) / 1e9 for table in tables]
    found = find_suspicions(selection.checkpoints, modified, selection.thinned)
    return [problem.text for problem in found]


def _check_recalibration(template: Table, output: Path | None, options: Options) -> None:
    rows = options.get("recalibrate")
    if rows is not None:
        from polyak_cli.evaluation import recalibration

        recalibration.check_recalibration(template, output, rows, batch_size_of(options))


def _check_types(template: Table, averaged: Sequence[Row], options: Options) -> None:
    """Refuse another type where the files cannot have it."""
    for spec in (row[-1] for row in averaged if template.rules.is_fixed):
        if stored_dtype(spec, options) != spec.dtype:
            raise UsageError(
                f"--dtype {options.get('dtype')}: {shown(template.path)} keeps the types it has, "
                f"and tensor '{shown(spec.name)}' is {spec.dtype}; leave --dtype out and convert "
                "the output"
            )


def _check_chunks(
    tables: Sequence[Table], rows: Sequence[Row], memory: Memory, options: Options
) -> None:
    """Refuse chunks that do not fit: HDF5's filters work on whole chunks only."""
    bound = (options.get("max_memory") or MAX_MEMORY) // memory.jobs // 2
    newest = len(tables) - 1
    apart = [k for k in range(newest) if tables[k].tensors is not tables[-1].tensors]
    for row in rows:
        for k in (*apart, newest):
            table, spec = tables[k], row[k]
            if spec.storage and spec.storage.block_nbytes > bound:
                raise FormatError(
                    f"{shown(table.path)}: tensor '{shown(spec.name)}' is stored in chunks of "
                    f"{spec.storage.block_nbytes} bytes, each of which must be held whole; raise "
                    f"--max-memory above {2 * memory.jobs * spec.storage.block_nbytes} bytes"
                )


def _bytes_to_read(
    averaged: Sequence[Row], carried: Sequence[Row], coefficients: Sequence[float]
) -> int:
    counted = sum(1 for coefficient in coefficients if coefficient)
    compared = sum(spec.nbytes for row in carried if is_compared(row) for spec in row)
    return counted * sum(row[-1].nbytes for row in averaged) + compared


def _bytes_to_write(
    template: Table, averaged: Sequence[Row], dropped: Sequence[str], options: Options
) -> int:
    change = sum(
        row[-1].size * (itemsize(stored_dtype(row[-1], options)) - itemsize(row[-1].dtype))
        for row in averaged
    )
    return template.size + change - sum(template.others[n].nbytes for n in dropped)
