"""Average checkpoints into one published file: the only place where the stages meet.

Prints nothing and knows no file format.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from polyak_cli import checkpoints, formats
from polyak_cli.averaging import carried_files, products, provenance, records
from polyak_cli.averaging.belonging import blame, factors
from polyak_cli.averaging.options import Progress, Settings, Source, select
from polyak_cli.averaging.planning import Around, Plan, plan_average
from polyak_cli.averaging.writing import write_average
from polyak_cli.engine import kernel
from polyak_cli.engine.timing import measure_peak
from polyak_cli.errors import (
    CheckpointError,
    OutputError,
    PolyakError,
    UsageError,
    choose_verb,
    shown,
    word_count,
)
from polyak_cli.formats.keras.names import WEIGHTS_SUFFIX
from polyak_cli.pipeline.advice import add_advice
from polyak_cli.pipeline.report import Report
from polyak_cli.pipeline.stages import Options, Planned, Stages, parse_options, stages_of
from polyak_cli.storage import mirrors, publishing

if TYPE_CHECKING:  # what knows of Keras is imported where it is asked for
    from polyak_cli.evaluation.recalibration import Recalibration
    from polyak_cli.examining.health import Checked
    from polyak_cli.tensors import Table


def average(
    sources: Source | Sequence[Source] | checkpoints.Selection,
    output: Source,
    *,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Report:
    """Average checkpoints into one model file; the same as ``run(plan(...))``.

    The method is that of Polyak and Juditsky, "Acceleration of stochastic approximation by
    averaging", 1992, with the weights of a scheme.

    Args:
        sources: directories, globs or files, or a selection made by `select`.
        output: the file or folder to write, in the format of the checkpoints; ``.safetensors`` and
            ``.npz`` convert.
        progress: called after each piece of work with the bytes that it read.
        **options: see `Options`.

    Raises:
        PolyakError: one of its subclasses, as `plan` and `run` raise them; nothing is written then,
            and an older output is untouched.
    """
    return run(plan(sources, output, **options), progress=progress)


def plan(
    sources: Source | Sequence[Source] | checkpoints.Selection,
    output: Source | None = None,
    **options: Unpack[Options],
) -> Plan:
    """Decide what averaging would do.

    Only headers are read, except with ``on_unhealthy``, which examines the values first.

    Args:
        sources: directories, globs or files; or a selection made by `select`, for
            which the options that choose are ignored.
        output: the file or folder that would be written; None to leave it open.
        **options: see `Options`.

    Raises:
        UsageError: the options contradict one another.
        CheckpointError: the checkpoints cannot be found, ordered or selected.
        FormatError: a checkpoint is foreign, damaged or hostile.
        MismatchError: the checkpoints do not belong to one model.
        OutputError: the output is in the way or cannot be written.
    """
    return make_plan(sources, output, options)


def make_plan(
    sources: Source | Sequence[Source] | checkpoints.Selection,
    output: Source | None,
    options: Options,
    *,
    has_skip: bool = True,
) -> Plan:
    """Decide what averaging would do; see `plan`.

    Args:
        sources: as `plan`.
        output: as `plan`.
        options: as `plan`.
        has_skip: the caller's user can say ``--on-unhealthy skip``.
    """
    settings, stages = parse_options(options)
    chosen = (
        sources
        if isinstance(sources, checkpoints.Selection)
        else select(
            sources,
            settings.choice,
            use_ema=settings.tensors.use_ema,
            weighting=settings.weighting,
        )
    )
    _check_order(chosen, settings)
    # Refused before the values are examined.
    settings.weighting.compute(chosen.positions, chosen.sigmas)
    healthy, skipped, suspicions = _examine(chosen, settings, stages, options.get("max_memory"))
    if skipped and settings.weighting.coefficients is not None:
        left = _keep_coefficients(skipped, chosen, settings.weighting.coefficients)
        settings = replace(settings, weighting=replace(settings.weighting, coefficients=left))
    # `watch` chooses by itself, and waits for what cannot be read.
    has_skip = has_skip and not isinstance(sources, checkpoints.Selection)
    planned = Planned(
        stages,
        sources,
        healthy,
        has_skip and stages.on_unhealthy != "skip" and not settings.tensors.use_ema,
    )
    target = Path(output) if output is not None else None
    rows = stages.recalibrate
    around = Around(
        skipped=skipped,
        suspicions=suspicions,
        recalibrate=None
        if rows is None
        else {"data": rows.source, "rows": rows.rows, "batch_size": stages.batch_size},
        # The average stays until it is copied, and what is verified until it is compared.
        copies=1 + (rows is not None) + settings.output.verify,
        architecture=_scan_architecture(stages, target),
        stages=planned,
        check_template=lambda template, target: _check_recalibration(template, target, stages),
    )
    target = Path(mirrors.enter_output(os.fspath(output))) if output is not None else None
    try:
        return plan_average(healthy, target, settings, around)
    except PolyakError as error:
        raise _advise(error, planned, settings) from None


def _advise(error: PolyakError, planned: object, settings: Settings) -> PolyakError:
    """Return an error with the options that leave out the checkpoints at fault, if any are.

    A plan that was made without stages gives no advice.
    """
    if not isinstance(planned, Planned):
        return error
    return add_advice(error, planned.sources, planned.chosen, settings, can_skip=planned.can_skip)


def run(plan: Plan, *, progress: Progress | None = None) -> Report:
    """Do what a plan says.

    Args:
        plan: of `plan`, with an output.
        progress: called with the bytes read, after each piece of work.

    Raises:
        PolyakError: an input is damaged or changed meanwhile, a value is not finite, or the output
            cannot be written; nothing is left then, and an older output is untouched.
    """
    output = plan.output
    if output is None:
        raise UsageError("the plan has no output; name the file to write")
    begun, asked = time.perf_counter(), mirrors.count_requests()
    plan = _measure_factors(plan)
    force, verify = plan.settings.output.force, plan.settings.output.verify
    folder = records.list_owned if plan.files else None
    with _advising(plan), blame.naming_inputs(plan.tables):
        record = records.encode(records.seal(provenance.make_record(plan)))
    opener = plan.files.weights[-1] if plan.files else ""
    with publishing.publish(
        output, force=force, folder=folder, opener=opener, verify=verify
    ) as hidden:
        with _advising(plan):
            totals, files, beside, notes, found, crew = write_average(
                plan, hidden, record, progress or (lambda _: None)
            )
        recalibrated = _recalibrate(plan, output, hidden)
        if recalibrated:
            notes += recalibrated.notes
        nbytes = sum(file.stat().st_size for file in (*files, *beside))
        if verify:
            # Otherwise the kernel would return what was written, not what is on the disk.
            publishing.drop_cache([*files, *beside])
            _verify(plan, output, hidden, files, record, own=recalibrated is not None)
        written = hidden.stat().st_ino
    # Another run may have published under this name meanwhile; its bytes were not compared.
    if verify and publishing.is_replaced(output, written):
        raise OutputError(
            f"{shown(output)}: another program has written this file in the meantime; find out "
            "which"
        )
    spent = totals.reading + totals.folding + totals.writing
    requests, retries = (
        now - old for now, old in zip(mirrors.count_requests(), asked, strict=True)
    )
    return Report(
        output=output,
        plan=plan,
        bytes_read=totals.bytes_read,
        bytes_written=nbytes,
        seconds=time.perf_counter() - begun - (recalibrated.seconds if recalibrated else 0.0),
        peak_memory=max(measure_peak(), crew.peak),
        kernel=", ".join(sorted(crew.kernels)) or kernel.NAME,
        shares={
            part: getattr(totals, part) / spent if spent else 0.0
            for part in ("reading", "folding", "writing")
        },
        notes=(*plan.notes, *notes),
        runs=found,
        recalibrated=recalibrated,
        verified=True if verify else None,
        verified_by=kernel.name_other() if verify else None,
        engine=plan.settings.machine.engine,
        workers=max(1, len(crew.names)),
        requests=totals.requests + requests,
        retries=totals.retries + retries,
    )


@contextlib.contextmanager
def _advising(plan: Plan) -> Iterator[None]:
    """Add to errors about some of the checkpoints by which options these are left out."""
    try:
        yield
    except PolyakError as error:
        raise _advise(error, plan.stages, plan.settings) from None


def _measure_factors(plan: Plan) -> Plan:
    """Return a plan with what its factors' means miss, in place of the note that it is not known.

    A stage of its own, because the record has what is suspected, and is written before the values.
    """
    if not plan.factors:
        return plan
    exact = plan.settings.tensors.lora == "exact"
    bound = plan.settings.machine.max_memory
    measured = products.measure(plan.factors, plan.tables, plan.coefficients, bound, exact=exact)
    texts, suspicions = factors.describe_measured(plan.factors, measured, exact=exact)
    unknown = factors.describe_plan(plan.factors, exact=exact)
    kept = [note for note in plan.notes if note not in unknown]
    return replace(
        plan,
        measured=tuple(measured),
        suspicions=(*plan.suspicions, *suspicions),
        notes=(*kept, *(f"warning: {problem.text}" for problem in suspicions), *texts),
    )


def _verify(
    plan: Plan, output: Path, hidden: Path, files: Sequence[Path], record: str, *, own: bool
) -> None:
    """Read the output back, average again, and refuse any difference.

    Args:
        plan: what was done.
        output: what it will be called.
        hidden: what it is called now.
        files: all of its files.
        record: of the average.
        own: its BatchNorm statistics were recalibrated, and are compared with its record.

    Raises:
        OutputError: what differs.
    """
    from polyak_cli.examining.recompute import Written, compare_again

    written = Written(
        files=files,
        opened=Path(output.name, files[-1].relative_to(hidden) if hidden.is_dir() else ""),
        record=record,
        nbytes=plan.bytes_to_write,
        recalibrated=formats.scan([_find_opener(plan, hidden)], with_optimizer=True)[0]
        if own
        else None,
    )
    # Two programs that compute the same bits hardly have the same mistake, nor the same fault of
    # memory or of the processor.
    found = compare_again(plan, written, [output.resolve().parent], kernel=kernel.name_other())
    changed = carried_files.find_changed(hidden, records.read(record).carried)
    if found or changed:
        first, *others = [*map(str, found.tensors), *found.outside, *changed]
        more = f" (and {len(others)} more)" if others else ""
        is_other = kernel.name_other() != kernel.NAME
        other = f", or use the other kernel with {kernel.VARIABLE}=numpy" if is_other else ""
        raise OutputError(
            f"{shown(output)}: read back, it is not what was written: {first}{more}; nothing was "
            f"published. Check the disk and the memory of this machine{other}"
        )


def _find_opener(plan: Plan, written: Path) -> Path:
    """Return the file that opens an output, whatever it is called now."""
    return written / plan.files.weights[-1] if plan.files else written


def _find_twins(plan: Plan) -> dict[str, list[str]]:
    """Return name of a tensor -> the others that are averages of the same tensors.

    Such are the weights and their running mean, of which one is written in both places.
    """
    alike: dict[object, list[str]] = {}
    for row in plan.averaged_rows:
        alike.setdefault(row[-1].storage, []).append(row[-1].name)
    return {
        name: [other for other in names if other != name]
        for names in alike.values()
        for name in names
    }


def _recalibrate(plan: Plan, output: Path, hidden: Path) -> Recalibration | None:
    """Put the average with new statistics in its place, if that was asked for."""
    how = stages_of(plan).gathering
    if how is None:
        return None
    how = replace(how, key=plan.settings.tensors.key)
    from polyak_cli.evaluation import recalibration

    # Keras goes by the suffix; what begins with the hidden name is removed whatever happens.
    end = WEIGHTS_SUFFIX if output.name.endswith(WEIGHTS_SUFFIX) else output.suffix
    average = hidden.with_name(f"{hidden.name}.average{end}")
    hidden.rename(average)
    if plan.files is None:
        hidden.touch()
    else:
        hidden.mkdir()
    (table,) = formats.scan([_find_opener(plan, average)], with_optimizer=True)
    files = carried_files.plan_files(output, table)
    twins = _find_twins(plan)
    made = recalibration.rewrite(table, hidden, output, how, files, name=output, twins=twins)
    if average.is_dir():
        shutil.rmtree(average)
    else:
        average.unlink()
    return made


def _examine(
    chosen: checkpoints.Selection, settings: Settings, stages: Stages, max_memory: int | None
) -> tuple[checkpoints.Selection, tuple[Checked, ...], tuple[checkpoints.Problem, ...] | None]:
    """Return the checkpoints to average, those to skip, and problems of the run as a whole.

    Without ``on_unhealthy`` all are averaged, and nothing is known of the run.

    Raises:
        CheckpointError: something is wrong and nothing may be skipped, or everything would be.
    """
    wanted = stages.on_unhealthy
    if wanted is None:
        return chosen, (), None
    from polyak_cli.examining import health

    # The check has a smaller default of its own: only a bound that was given is passed on.
    found = health.check(
        chosen,
        match=settings.tensors.match,
        allow=settings.tensors.allow,
        strip_prefix=settings.tensors.strip_prefix,
        max_memory=max_memory,
    )
    # The plan refuses or says these itself, and knows which tensors the options carry.
    own = ("quantised", "factors")
    of_run = tuple(problem for problem in found.problems if problem.kind not in own)
    found = replace(found, problems=of_run)
    skipped = tuple(one for one in found.checkpoints if one.problems)
    if not found.healthy and (wanted == "fail" or len(skipped) == len(found.checkpoints)):
        first, *others = found.all_problems
        more = f"; and {word_count(len(others), 'more problem')}" if others else ""
        remedy = (
            ", or leave out unhealthy checkpoints with --on-unhealthy skip"
            if len(skipped) < len(found.checkpoints)
            else ", since no healthy checkpoint is left"
        )
        raise CheckpointError(
            f"{first.kind}: {first.text}{more}; see what is wrong with `polyak check`{remedy}"
        )
    out = {one.path for one in skipped}
    kept = [k for k, one in enumerate(chosen.checkpoints) if one.path not in out]
    notes = []
    if skipped:
        notes.append(
            f"{len(skipped)} of the {len(chosen.checkpoints)} chosen checkpoints "
            f"{choose_verb(len(skipped))} unhealthy and skipped; {len(kept)} are left"
        )
    healthy = replace(
        chosen,
        checkpoints=tuple(chosen.checkpoints[k] for k in kept),
        positions=tuple(chosen.positions[k] for k in kept),
        notes=(*chosen.notes, *notes),
        left_out=(*chosen.left_out, *out),
    )
    return healthy, skipped, found.problems


def _keep_coefficients(
    skipped: Sequence[Checked], chosen: checkpoints.Selection, coefficients: Sequence[float]
) -> tuple[float, ...]:
    """Return the custom coefficients without those of skipped checkpoints."""
    out = {one.path for one in skipped}
    pairs = zip(chosen.checkpoints, coefficients, strict=True)
    return tuple(coefficient for one, coefficient in pairs if one.path not in out)


def _check_order(chosen: checkpoints.Selection, settings: Settings) -> None:
    """Refuse coefficients for files whose order is another than that in which they were given."""
    if (
        settings.weighting.coefficients is not None
        and chosen.rearranged
        and settings.choice.order is None
    ):
        raise UsageError(
            "--coefficients begin with the oldest checkpoint, which is "
            f"{shown(chosen.checkpoints[0].path)} by its epoch, but the files were given in "
            "another order: use --order epoch, or --order given if the first file is the oldest"
        )


def _scan_architecture(stages: Stages, output: Path | None) -> Table | None:
    """Return the table of the whole model to which an average of weights is added, if it is."""
    if stages.architecture is None or stages.recalibrate is not None:
        return None
    if output is None or output.suffix != ".keras":
        raise UsageError(
            "--model belongs to --recalibrate, which is missing, or to an output in .keras"
        )
    path = Path(stages.architecture)
    if not path.is_file():
        raise UsageError(
            f"--model {shown(path)}: there is no such file; for an output in .keras, expected a "
            ".keras of the same model, which model.save() writes"
        )
    return formats.scan([path])[0]


def _check_recalibration(template: Table, output: Path | None, stages: Stages) -> None:
    """Refuse, before any work, a model that cannot be recalibrated, if that is asked for."""
    how = stages.gathering
    if how is not None:
        from polyak_cli.evaluation import recalibration

        recalibration.check_recalibration(template, output, how)


def check_replaceable(output: Path) -> None:
    """Refuse an output that is there already and was not written by this tool.

    For callers that write one file again and again without asking each time.

    Raises:
        OutputError: with what to do.
    """
    if output.exists() and not formats.find_polyak_outputs([checkpoints.find_file(output)]):
        raise OutputError(
            f"{shown(output)}: already exists and was not written by polyak; name another output, "
            "or use --force to replace it"
        )
