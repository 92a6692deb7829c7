"""Turn plans, reports and tables into lines for people, and print them.

Knows what results look like, not how they came about.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from polyak_cli.errors import OutputError, shown, word_count, word_size

if TYPE_CHECKING:
    from polyak_cli.averaging.belonging.runs import Verdict
    from polyak_cli.averaging.planning import Plan
    from polyak_cli.checkpoints import PassedOver
    from polyak_cli.evaluation.comparison import Comparison
    from polyak_cli.evaluation.evaluator import Score
    from polyak_cli.evaluation.recalibration import Recalibration
    from polyak_cli.examining.differences import Differences, Distances
    from polyak_cli.examining.health import Health
    from polyak_cli.examining.inspection import Inspection
    from polyak_cli.examining.verification import Verification
    from polyak_cli.pipeline import Report

#: Problems that are shown of an average which does not verify.
_MOST = 20


def print_result(
    data: Mapping[str, Any], as_json: bool, quiet: bool, lines: Callable[[], Iterator[str]]
) -> None:
    """Print the result of a command: as JSON, or as lines unless ``quiet``."""
    if as_json:
        from polyak_cli.evaluation.reports import format_json as text

        print_lines([text(data)], sys.stdout)
    elif not quiet:
        print_lines(lines(), sys.stdout)


def print_json_line(data: Mapping[str, Any]) -> None:
    """Print a result as one line of JSON."""
    from polyak_cli.evaluation.reports import format_json as text

    print_lines([text(data, indent=None)], sys.stdout)


def word_passed_over(one: PassedOver) -> str:
    """Return the line for a file that was passed over, with the reason."""
    return f"passed over: {shown(one.path)} ({one.reason})"


def print_notes(notes: Sequence[str], quiet: bool) -> None:
    """Print notes to stderr, unless nothing but errors is wanted."""
    if not quiet:
        lines = (note if note.startswith("warning: ") else f"note: {note}" for note in notes)
        print_lines(lines, sys.stderr)


def print_lines(lines: Iterable[str], stream: TextIO) -> None:
    """Print when the work is done, and raise if the lines cannot be written."""
    # If the reader is gone (`| head`), SIGPIPE may end the program: nothing is left to clean up.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        for line in lines:
            print(line, file=stream)
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what is still buffered
        raise OutputError(f"{stream.name}: the result cannot be shown: {error.strerror}") from None


def plan_lines(plan: Plan, verbose: bool) -> Iterator[str]:
    """Yield the plan as lines for a person."""
    parameters = "".join(f", {name} {value:g}" for name, value in plan.parameters.items())
    count = len(plan.checkpoints)
    yield f"{word_count(count, 'checkpoint')}, {plan.scheme}{parameters}, oldest first:"
    table = [["checkpoint", "epoch", "coefficient"]]
    rows = zip(plan.checkpoints, plan.names, plan.coefficients, strict=True)
    for checkpoint, name, coefficient in rows:
        epoch = "-" if checkpoint.epoch is None else str(checkpoint.epoch)
        table.append([shown(name, 60), epoch, f"{coefficient:.6f}"])
    yield from _columns(table)
    yield f"effective number of checkpoints: {plan.effective_number:.2f}"
    yield (
        f"tensors: {len(plan.averaged)} averaged, {len(plan.carried)} carried from "
        f"{shown(plan.names[-1])}, {len(plan.dropped)} dropped"
    )
    if verbose:
        yield from _fate_lines(plan)
    over = plan.recalibrate
    if over:
        yield (
            f"then BatchNorm's statistics are recomputed: {over['rows']} rows of "
            f"{over['data']}, batches of at most {over['batch_size']}"
        )
    yield from map(word_passed_over, plan.passed_over)
    for one in plan.skipped:
        yield from (f"skipped ({problem.kind}): {problem.text}" for problem in one.problems)
    yield (
        f"to read {word_size(plan.bytes_to_read)}, "
        f"to write about {word_size(plan.bytes_to_write)}, memory about {word_size(plan.memory)}"
    )


def _fate_lines(plan: Plan) -> Iterator[str]:
    rows = (*plan.averaged_rows, *plan.carried_rows)
    specs = {row[-1].name: row[-1] for row in rows} | dict(plan.tables[-1].others)
    for fate, names in (
        ("averaged", plan.averaged),
        ("carried", plan.carried),
        ("dropped", plan.dropped),
    ):
        for name in names:
            spec = specs[name]
            way = spec.storage.describe() if spec.storage else "HDF5 library"
            shape = "x".join(map(str, spec.shape)) or "scalar"
            yield f"  {fate} {shown(name)} {spec.dtype} {shape} ({way})"
    ways = Counter(s.storage.describe() for row in plan.averaged_rows for s in row if s.storage)
    yield "read by " + "; ".join(f"{way} (tensors: {n})" for way, n in ways.items())


def report_lines(report: Report, verbose: bool) -> Iterator[str]:
    """Yield the report as lines for a person."""
    yield from plan_lines(report.plan, verbose)
    shares = ", ".join(f"{part} {share:.0%}" for part, share in report.shares.items())
    yield (
        f"read {word_size(report.bytes_read)} in {report.seconds:.2f} s "
        f"({word_size(report.speed)}/s; {shares}), peak memory {word_size(report.peak_memory)}"
    )
    if report.recalibrated:
        yield _gathered_line(report.recalibrated)
    verified = ", verified: read back, it is the average bit for bit" if report.verified else ""
    yield f"wrote {shown(report.output)} ({word_size(report.bytes_written)}){verified}"


def recalibration_lines(report: Recalibration) -> Iterator[str]:
    """Yield the recomputed statistics in numbers, and the output."""
    yield _gathered_line(report)
    yield f"wrote {shown(report.output)}"


def _gathered_line(report: Recalibration) -> str:
    return (
        f"recomputed {len(report.statistics)} statistics of {report.layers} BatchNorm layers: "
        f"{report.rows} rows of {report.source}, batches of at most {report.batch_size}, "
        f"{report.seconds:.2f} s"
    )


def verification_lines(found: Verification) -> Iterator[str]:
    """Yield the problems, or that the average is verified."""
    name = shown(found.output)
    for problem in found.problems[:_MOST]:
        yield f"  {problem.text}"
    if len(found.problems) > _MOST:
        yield f"  and {len(found.problems) - _MOST} more; see them with --json"
    if found.problems:
        yield f"{name}: not verified"
        return
    yield (
        f"{name}: verified, equal bit for bit to the average of "
        f"{word_count(len(found.inputs), 'checkpoint')} ({word_size(found.nbytes)})"
    )


def published_lines(report: Report) -> Iterator[str]:
    """Yield one short line for `polyak watch`, which prints one for each publication."""
    plan = report.plan
    names = [shown(name, 60) for name in plan.names]
    span = f"{names[0]} to {names[-1]}" if len(names) > 1 else names[0]
    rule = ", ".join([plan.scheme, *(f"{key} {value:g}" for key, value in plan.parameters.items())])
    count = word_count(len(names), "checkpoint")
    yield f"wrote {shown(report.output)}: {count}, {span} ({rule})"


def inside_lines(one: Inspection) -> Iterator[str]:
    """Yield format, version, tensors and record of a checkpoint."""
    from polyak_cli.examining.inspection import describe_storage

    about = "".join(f", {key} {shown(text, 40)}" for key, text in one.data()["about"].items())
    yield (
        f"{shown(one.table.path)}: {one.format}{about}, {one.parameters:,} parameters, "
        f"{word_size(one.table.size)}"
    )
    table = [["tensor", "dtype", "shape", "bytes", "stored", "fate"]]
    measured = any(tensor.statistics for tensor in one.tensors)
    if measured:
        table[0] += ["norm", "least", "greatest", "not finite"]
    for spec, fate, statistics in one.tensors:
        shape = "x".join(map(str, spec.shape)) or "scalar"
        row = [
            shown(spec.name, 80),
            spec.dtype,
            shape,
            str(spec.nbytes),
            describe_storage(spec),
            fate,
        ]
        if measured:
            row += ["-" if v is None else f"{v:.6g}" for v in statistics or [None] * 4]
        table.append(row)
    yield from _columns(table)
    record = one.provenance
    if isinstance(record, dict) and isinstance(record.get("inputs"), list):
        inputs = [each for each in record["inputs"] if isinstance(each, dict)]
        names = ", ".join(shown(each.get("path", each.get("name")), 60) for each in inputs)
        yield (
            f"an average by polyak {shown(record.get('polyak'))}, scheme "
            f"{shown(record.get('scheme'))}, of {len(record['inputs'])} checkpoints: {names}"
        )
    if isinstance(record, dict) and isinstance(record.get("recalibrated"), dict):
        over = record["recalibrated"]
        yield (
            f"BatchNorm's statistics gathered by polyak {shown(over.get('polyak'))} on "
            f"{shown(over.get('rows'))} rows of {shown(over.get('data'))}"
        )


def difference_lines(found: Differences, verbose: bool) -> Iterator[str]:
    """Yield the tensors of two files, the worst first."""
    table = [["tensor", "relative", "largest", "cosine", ""]]
    most = len(found.tensors) if verbose else 20
    for tensor in found.tensors[:most]:
        cosine = "-" if tensor.cosine is None else f"{tensor.cosine:.6f}"
        equal = "equal" if tensor.equal else "differs"
        numbers = [f"{tensor.relative:.3e}", f"{tensor.largest:.3e}", cosine, equal]
        table.append([shown(tensor.name, 80), *numbers])
    yield from _columns(table)
    if len(found.tensors) > most:
        yield f"and {len(found.tensors) - most} tensors more; see them with -v"
    yield from found.mismatches
    differing = sum(not tensor.equal for tensor in found.tensors) + len(found.mismatches)
    yield "equal" if found.equal else f"{differing} tensors differ"


def distance_lines(found: Distances) -> Iterator[str]:
    """Yield the checkpoints of a run, and how far each is from others."""
    from polyak_cli.checkpoints.folders import list_relative_paths

    table = [["checkpoint", "epoch", "to previous", "to average", ""]]
    names = list_relative_paths([row.path for row in found.checkpoints])
    for name, row in zip(names, found.checkpoints, strict=True):
        step = "-" if row.to_previous is None else f"{row.to_previous:.3e}"
        number = "-" if row.epoch is None else str(row.epoch)
        odd = "odd one out" if row.outlier else ""
        table.append([shown(name, 60), number, step, f"{row.to_average:.3e}", odd])
    yield from _columns(table)
    yield f"distances relative to the norm of the average, over {found.tensors} float tensors"


def health_lines(found: Health) -> Iterator[str]:
    """Yield the checkpoints of a run with their problems, then each problem in words."""
    from polyak_cli.checkpoints.folders import list_relative_paths
    from polyak_cli.examining.health import format_time

    columns = ["epoch", "written (UTC)", "size", "not finite", "to previous", "to next", ""]
    table = [["checkpoint", *columns]]
    names = list_relative_paths([one.path for one in found.checkpoints])
    for name, one in zip(names, found.checkpoints, strict=True):
        cells = [
            one.epoch,
            format_time(one.modified),
            None if one.size is None else word_size(one.size),
            one.nonfinite,
            *(None if step is None else f"{step:.3e}" for step in (one.to_previous, one.to_next)),
        ]
        problems = ", ".join(problem.kind for problem in one.problems)
        row = ["-" if cell is None else str(cell) for cell in cells]
        table.append([shown(name, 60), *row, problems])
    yield from _columns(table)
    yield from map(word_passed_over, found.passed_over)
    for problem in found.all_problems:
        yield f"{problem.kind}: {problem.text}"
    if len(names) > 1:
        yield _word_runs(found.verdict, names)
    count = len(found.all_problems)
    yield word_count(count, "problem") if count else "healthy"


def _word_runs(verdict: Verdict, names: Sequence[str]) -> str:
    """Return whether checkpoints of these names are of one run, as far as their values say."""
    if verdict.least is None or verdict.between is None:
        return "one run: cannot tell, too few elements differ"
    a, b = (shown(names[k], 60) for k in verdict.between)
    return f"{verdict.word}: neighbours have a cosine of at least {verdict.least:.3f} ({a} and {b})"


def _score_data(score: Score) -> dict[str, Any]:
    return {
        "path": str(score.path),
        "loss": score.loss,
        "loss_name": score.loss_words or None,
        "metrics": dict(score.metrics),
        "rows": score.rows,
        "notes": list(score.notes),
    }


def models_data(scores: Sequence[Score], compared: Comparison | None) -> dict[str, Any]:
    """Return scores and gains as JSON can hold them."""
    models = [_score_data(score) for score in scores]
    if compared is None:
        return {"models": models}
    for model, one in zip(models, compared.models, strict=True):
        model["gains"] = {gain.metric: gain.data() for gain in one.gains}
    return {"baseline": _score_data(compared.baseline), "models": models}


def evaluation_lines(scores: Sequence[Score], compared: Comparison | None) -> Iterator[str]:
    """Yield the scores, and the differences between the models and the baseline."""
    if compared is None:
        yield from _score_lines(scores)
        return
    yield from _score_lines([*scores, compared.baseline])
    baseline = compared.baseline
    tests = ["McNemar p", "sign-flip p"]
    table = [["model", "metric", "difference", "from", "to", *tests, "verdict"]]
    for one in compared.models:
        for gain in one.gains:
            numbers = [f"{value:+.6f}" for value in gain.paired[:3]]
            p = ["-" if p is None else f"{p:.3g}" for p in (gain.mcnemar_p, gain.sign_flip_p)]
            table.append([shown(one.score.path, 60), gain.metric, *numbers, *p, gain.verdict])
    if len(table) == 1:
        yield f"nothing can be compared with {shown(baseline.path, 60)}"
        return
    yield f"minus {shown(baseline.path, 60)}, with 95 % intervals over {baseline.rows} paired rows:"
    yield from _columns(table)
    if any(gain.verdict == "within noise" for one in compared.models for gain in one.gains):
        yield (
            "within noise: no difference is shown; that takes an interval without 0 and a p below "
            "0.05, so six rows that differ or more"
        )


def _score_lines(scores: Sequence[Score]) -> Iterator[str]:
    """Yield a row for each model, a column for each metric that any of them has."""
    metrics = list(dict.fromkeys(name for score in scores for name in score.metrics))
    table = [["model", "loss", *map(shown, metrics), "rows"]]
    for score in scores:
        values = [score.loss, *(score.metrics.get(name) for name in metrics)]
        cells = ["-" if value is None else f"{value:.6f}" for value in values]
        table.append([shown(score.path, 60), *cells, str(score.rows)])
    yield from _columns(table)
    yield from _loss_lines(scores)


def _loss_lines(scores: Sequence[Score]) -> Iterator[str]:
    """Yield which loss the numbers are: once if all are the same one, else for each model."""
    names = dict.fromkeys(score.loss_words for score in scores if score.loss_words)
    if len(names) == 1:
        yield f"loss: {next(iter(names))}"
        return
    for score in scores:
        if score.loss_words:
            yield f"loss of {shown(score.path, 60)}: {score.loss_words}"


def training_lines(made: Mapping[str, Any]) -> Iterator[str]:
    """Yield the settings, the last metrics, and the files that were kept."""
    yield (
        f"trained {made['epochs']} epochs on {made['data']} with {made['optimizer']}, "
        f"learning rate {made['learning_rate']:g}, seed {made['seed']}"
    )
    yield ", ".join(f"{name} {value:.4f}" for name, value in made["last"].items())
    names = [path.rpartition(os.sep)[2] for path in made["checkpoints"]]
    kept = f"{names[0]} to {names[-1]}" if len(names) > 1 else names[0]
    yield f"kept {kept} and {shown(made['log'])}"
    if made["plot"]:
        yield f"drew {shown(made['plot'])}"


def _columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Align a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        yield ("  " + "  ".join(cells)).rstrip()
