"""Turn plans, reports and tables into lines for people, and print them.

Knows what results look like, not how they came about.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from polyak_cli.cli.names import name_tensors
from polyak_cli.cli.tables import Table, Verbatim, lay_out
from polyak_cli.errors import OutputError, name_path, shown, word_count, word_rest, word_size

if TYPE_CHECKING:
    from polyak_cli.averaging.belonging.runs import Verdict
    from polyak_cli.averaging.planning import Plan
    from polyak_cli.checkpoints import PassedOver
    from polyak_cli.evaluation.comparison import Comparison
    from polyak_cli.evaluation.evaluator import Score
    from polyak_cli.evaluation.recalibration import Recalibration
    from polyak_cli.examining.differences import Differences, Distances
    from polyak_cli.examining.geometry import Geometry
    from polyak_cli.examining.health import Health
    from polyak_cli.examining.inspection import Inspected, Inspection
    from polyak_cli.examining.unfinished import Unfinished
    from polyak_cli.examining.verification import Verification
    from polyak_cli.pipeline.report import Report

#: Problems that are shown of an average which does not verify, and tensors of a comparison.
_MOST = 20
#: Reasons for which nobody expects that a file is averaged: how they begin.
_PLAIN_REASONS = ("not named like", "hidden", "a directory", "training state", "--exclude")
#: Files passed over that are shown, unless all were asked for.
MOST_PASSED = 5
#: What shows the others, of commands that have -v.
_BY_V = "see them with -v"
#: Seconds of a run above which its speed is worth a word.
_LONG = 1.0

#: What the functions below yield: sentences, and tables that are laid out where they are printed.
Line = str | Table


def print_result(
    data: Mapping[str, Any], as_json: bool, quiet: bool, lines: Callable[[], Iterator[Line]]
) -> None:
    """Print the result of a command: as JSON, or as lines unless ``quiet``."""
    if as_json:
        from polyak_cli.evaluation.reports import format_json as text

        print_text(text(data), sys.stdout)
    elif not quiet:
        print_lines(lines(), sys.stdout)


def print_json_line(data: Mapping[str, Any]) -> None:
    """Print a result as one line of JSON."""
    from polyak_cli.evaluation.reports import format_json as text

    print_text(text(data, indent=None), sys.stdout)


def passed_over_lines(
    passed: Sequence[PassedOver], most: int | None, where: str = "--json lists them"
) -> Iterator[str]:
    """Yield a line for each file that was passed over, with the reason.

    Args:
        passed: the files.
        most: how many to show; all, if None.  Those that may surprise the user come first.
        where: what the user does to see the others.
    """
    # A folder of logs and pictures must not hide an unfinished checkpoint, or the result.
    ranked = sorted(passed, key=lambda one: one.reason.startswith(_PLAIN_REASONS))
    for one in passed if most is None else ranked[:most]:
        yield f"passed over: {shown(one.path)} ({one.reason})"
    if most is not None and len(passed) > most:
        yield f"passed over: {len(passed) - most} more; {where}"


def print_notes(notes: Sequence[str], quiet: bool) -> None:
    """Print notes to stderr, unless nothing but errors is wanted."""
    if not quiet:
        lines = (note if note.startswith("warning: ") else f"note: {note}" for note in notes)
        print_lines(lines, sys.stderr)


def print_lines(lines: Iterable[Line], stream: TextIO) -> None:
    """Print when the work is done, and raise if the lines cannot be written."""
    # If the reader is gone (`| head`), SIGPIPE may end the program: nothing is left to clean up.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if isinstance(stream, io.TextIOWrapper):  # in a Latin-1 locale, names may have other letters
        stream.reconfigure(errors="backslashreplace")
    try:
        for line in lay_out(lines, stream):
            print(line, file=stream)
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what is still buffered
        raise OutputError(f"{stream.name}: the result cannot be shown: {error.strerror}") from None


def print_text(text: str, stream: TextIO) -> None:
    """Print what has its form already: a help text, a page, JSON or a script."""
    print_lines([Verbatim(text)], stream)


def plan_lines(plan: Plan, verbose: bool) -> Iterator[Line]:
    """Yield the plan for a person; with ``verbose``, the fate of every tensor too."""
    count = len(plan.checkpoints)
    yield f"{word_count(count, 'checkpoint')}, {word_rule(plan)}, oldest first:"
    yield _lay_out_coefficients(plan)
    if count == 1:
        yield _COPY
    if not plan.averages_running_means:  # which are no noise around one value
        yield f"effective number of checkpoints: {plan.effective_number:.2f}"
    if min(plan.coefficients) < 0:
        yield f"sum of the absolute values of the coefficients: {plan.sum_of_absolutes:.4f}"
    if verbose:
        yield (
            f"tensors: {len(plan.averaged)} averaged, {len(plan.carried)} copied from "
            f"{shown(plan.names[-1])}, {len(plan.dropped)} left out"
        )
        yield from _fate_lines(plan)
    else:
        yield _word_fates(plan)
    over = plan.recalibrate
    if over:
        yield (
            f"then BatchNorm's statistics are recomputed: {over['rows']} rows of "
            f"{over['data']}, batches of at most {over['batch_size']}"
        )
    yield from passed_over_lines(plan.passed_over, None if verbose else MOST_PASSED, _BY_V)
    yield from _skipped_lines(plan)
    yield from _file_lines(plan)
    yield (
        f"to read {word_size(plan.bytes_to_read)}, "
        f"to write about {word_size(plan.bytes_to_write)}, memory about {word_size(plan.memory)}"
    )


def _lay_out_coefficients(plan: Plan) -> Table:
    """Return the table of the checkpoints; of EMA snapshots, it has their widths."""
    columns = [
        [shown(name) for name in plan.names],
        [word_epoch(checkpoint.epoch) for checkpoint in plan.checkpoints],
        [f"{sigma:g}" for sigma in plan.sigmas],
        [f"{coefficient:.6f}" for coefficient in plan.coefficients],
    ]
    titles: tuple[str, ...] = ("checkpoint", "epoch", "coefficient")
    if plan.sigmas:
        titles = ("snapshot", "step", "sigma", "coefficient")
    rows = [*zip(*filter(None, columns), strict=True)]
    return Table(titles, rows, spare=("epoch",))


#: What a user may not expect of an average.
_COPY = "an average of one checkpoint is a copy of it"


def word_rule(made: Plan | Geometry) -> str:
    """Return the scheme and its parameters."""
    words = [made.scheme]
    for key, value in made.parameters.items():
        text = f"{value:g}" if isinstance(value, float) else "" if value is True else str(value)
        words.append(f"{key.replace('_', '-')} {text}".rstrip())
    return ", ".join(words)


def word_epoch(epoch: int | None) -> str:
    """Return an epoch, or that there is none."""
    return "-" if epoch is None else str(epoch)


def _word_span(plan: Plan) -> str:
    """Return how many checkpoints there are, the oldest and the newest, and the rule."""
    names = [shown(name, 60) for name in plan.names]
    span = f"{names[0]} to {names[-1]}" if len(names) > 1 else names[0]
    return f"{word_count(len(names), 'checkpoint')}, {span} ({word_rule(plan)})"


def _word_fates(plan: Plan) -> str:
    """Return what becomes of the tensors, in words that need no explanation."""
    counts = {
        "averaged": len(plan.averaged),
        f"copied from {shown(plan.names[-1], 60)}": len(plan.carried),
        "left out": len(plan.dropped),
    }
    return "tensors: " + ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def _file_lines(plan: Plan) -> Iterator[str]:
    """Yield which files of the newest checkpoint an output folder will have, and which not."""
    if plan.files is None:
        return
    newest = shown(plan.names[-1], 60)
    carried = [f"{shown(one.name)}" for one in plan.files.carried]
    if carried:
        yield f"files copied from {newest}: {', '.join(carried)}"
    reasons = dict.fromkeys(one.reason for one in plan.files.left_out)
    for reason in reasons:
        names = [shown(one.name) for one in plan.files.left_out if one.reason == reason]
        yield f"files not copied ({reason}): {', '.join(names)}"


def _skipped_lines(plan: Plan) -> Iterator[str]:
    for one in plan.skipped:
        yield from (f"skipped ({problem.kind}): {problem.text}" for problem in one.problems)


def _fate_lines(plan: Plan) -> Iterator[str]:
    rows = (*plan.averaged_rows, *plan.carried_rows)
    specs = {row[-1].name: row[-1] for row in rows} | dict(plan.tables[-1].others)
    for fate, names in (
        ("averaged", plan.averaged),
        ("copied", plan.carried),
        ("left out", plan.dropped),
    ):
        for name in names:
            spec = specs[name]
            way = spec.storage.describe() if spec.storage else "HDF5 library"
            shape = "x".join(map(str, spec.shape)) or "scalar"
            yield f"  {fate} {shown(name)} {spec.dtype} {shape} ({way})"
    ways = Counter(s.storage.describe() for row in plan.averaged_rows for s in row if s.storage)
    yield "stored as " + "; ".join(f"{way}: {word_count(n, 'tensor')}" for way, n in ways.items())


def report_lines(report: Report, verbose: bool) -> Iterator[Line]:
    """Yield what was averaged, the cost, and the output; with ``verbose``, the plan too."""
    plan = report.plan
    if verbose:
        yield from plan_lines(plan, verbose)
    else:
        yield f"averaged {_word_span(plan)}" + (f": {_COPY}" if len(plan.names) == 1 else "")
        odd = [one for one in plan.passed_over if not one.reason.startswith(_PLAIN_REASONS)]
        yield from passed_over_lines(odd, 3, _BY_V)
        yield from _skipped_lines(plan)
    yield _word_cost(report, verbose)
    if report.recalibrated:
        yield _gathered_line(report.recalibrated)
    verified = (
        f", verified: read back, it is the average of the {report.verified_by} kernel bit for bit"
        if report.verified
        else ""
    )
    yield f"wrote {shown(report.output)} ({word_size(report.bytes_written)}){verified}"


def _word_cost(report: Report, verbose: bool) -> str:
    """Return how much was read, in what time and memory, and how fast where that was long."""
    shares = ", ".join(f"{part} {share:.0%}" for part, share in report.shares.items())
    speed = f"{word_size(report.speed)}/s"
    how = f" ({speed})" if report.seconds > _LONG else ""
    if verbose:
        how = f" ({speed}; {shares}; {report.kernel} kernel)"
    by = "" if report.engine == "here" else f"{report.engine}: {_word_workers(report)} "
    return (
        f"{by}read {word_size(report.bytes_read)} in {report.seconds:.2f} s{how}, "
        f"peak memory {word_size(report.peak_memory)}"
    )


def _word_workers(report: Report) -> str:
    """Return how many workers a cluster had, what they asked for, and what was done again."""
    counts = {"request": report.requests, "repetition": report.retries}
    made = ", ".join(word_count(count, what) for what, count in counts.items() if count)
    return word_count(report.workers, "worker") + (f" ({made})" if made else "")


def recalibration_lines(report: Recalibration) -> Iterator[str]:
    """Yield the recomputed statistics in numbers, and the output."""
    yield _gathered_line(report)
    yield f"wrote {shown(report.output)}"


def _gathered_line(report: Recalibration) -> str:
    return (
        f"recomputed {word_count(len(report.statistics), 'statistic')} of "
        f"{word_count(report.layers, 'BatchNorm layer')}: "
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
    copied = f": {_COPY}" if len(report.plan.names) == 1 else ""
    yield f"wrote {shown(report.output)}: {_word_span(report.plan)}{copied}"


def inside_lines(one: Inspection, verbose: bool) -> Iterator[Line]:
    """Yield format, version, tensors and record of a checkpoint.

    With ``verbose``, each tensor has its name in the file, its place there, and its fate in an
    average.
    """
    about = "".join(f", {key} {shown(text, 40)}" for key, text in one.data()["about"].items())
    yield (
        f"{shown(one.table.path)}: {one.format}{about}, {one.parameters:,} parameters, "
        f"{word_size(one.table.size)}"
    )
    yield _tabulate_tensors(one.tensors, verbose)
    yield from _record_lines(one)


def _tabulate_tensors(tensors: Sequence[Inspected], verbose: bool) -> Table:
    from polyak_cli.examining.inspection import describe_storage

    header = ["tensor", "dtype", "shape", "bytes"]
    spare = ["stored", "bytes", "fate", "dtype", "role", "shape"]
    has_roles = len({tensor.role for tensor in tensors}) > 1
    if has_roles:
        header += ["role"]
    if verbose:
        header += ["stored", "fate"]
    measured = any(tensor.statistics for tensor in tensors)
    if measured:
        header += ["norm", "minimum", "maximum", "not finite"]
        spare += ["norm", "minimum", "maximum"]
    names = name_tensors(tensor.spec.name for tensor in tensors)
    rows = []
    for spec, fate, statistics, role in tensors:
        shape = "x".join(map(str, spec.shape)) or "scalar"
        row = [
            shown(spec.name if verbose else names[spec.name]),
            spec.dtype,
            shape,
            str(spec.nbytes),
            *([role] if has_roles else []),
        ]
        if verbose:
            row += [describe_storage(spec), fate]
        if measured:
            row += ["-" if v is None else f"{v:.4g}" for v in statistics or [None] * 4]
        rows.append(row)
    return Table(header, rows, spare)


def _record_lines(one: Inspection) -> Iterator[str]:
    """Yield what polyak recorded in a checkpoint that it wrote."""
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


def difference_lines(found: Differences, verbose: bool) -> Iterator[Line]:
    """Yield the tensors of two files, the worst first; with ``verbose``, all, by whole names."""
    most = len(found.tensors) if verbose else _MOST
    names = name_tensors(tensor.name for tensor in found.tensors)
    rows = []
    for tensor in found.tensors[:most]:
        cosine = "-" if tensor.cosine is None else f"{tensor.cosine:.6f}"
        equal = "equal" if tensor.equal else "differs"
        numbers = [f"{tensor.relative:.3e}", f"{tensor.largest:.3e}", cosine, equal]
        rows.append([shown(tensor.name if verbose else names[tensor.name]), *numbers])
    header = ("tensor", "relative", "largest", "cosine", "")
    if rows:
        yield Table(header, rows, spare=("largest", "cosine"))
    if len(found.tensors) > most:
        yield f"and {word_count(len(found.tensors) - most, 'tensor')} more; see them with -v"
    yield from found.mismatches
    differing = sum(not tensor.equal for tensor in found.tensors) + len(found.mismatches)
    if found.equal:
        yield "equal"
        return
    if rows:
        yield (
            "relative: the norm of the difference, as a share of the first file's; largest: of one "
            "number; cosine: 1 is the same direction, 0 is unrelated"
        )
    yield f"{word_count(differing, 'tensor')} {'differs' if differing == 1 else 'differ'}"
    yield _word_runs(found.verdict, [shown(path.name, 60) for path in found.paths])


def distance_lines(found: Distances) -> Iterator[Line]:
    """Yield the checkpoints of a run, and how far each is from others."""
    from polyak_cli.checkpoints.folders import list_relative_paths

    rows = []
    names = list_relative_paths([row.path for row in found.checkpoints])
    for name, row in zip(names, found.checkpoints, strict=True):
        step = "-" if row.to_previous is None else f"{row.to_previous:.3e}"
        odd = "far from the others" if row.outlier else ""
        rows.append([shown(name), word_epoch(row.epoch), step, f"{row.to_average:.3e}", odd])
    header = ("checkpoint", "epoch", "to previous", "to average", "")
    yield Table(header, rows, spare=("epoch", "to previous"))
    yield "to previous: the distance to the row above; to average: to that of all rows;"
    yield (
        f"both as shares of that average's norm, over {word_count(found.tensors, 'float tensor')}"
    )
    if any(row.outlier for row in found.checkpoints):
        yield "far from the others: over 3 times as far from the average as the middle one"


def health_lines(found: Health, verbose: bool) -> Iterator[Line]:
    """Yield the checkpoints of a run with their problems, then each problem in words.

    With ``verbose``, files that nobody takes for checkpoints are listed too.
    """
    from polyak_cli.checkpoints.folders import list_relative_paths
    from polyak_cli.examining.health import format_time

    header = ("checkpoint", "epoch", "written (UTC)", "size", "not finite", "to previous", "")
    rows = []
    names = list_relative_paths([one.path for one in found.checkpoints])
    for name, one in zip(names, found.checkpoints, strict=True):
        cells = [
            one.epoch,
            (format_time(one.modified) or "-")[:16].replace("T", " "),  # minutes will do
            None if one.size is None else word_size(one.size),
            one.nonfinite,
            None if one.to_previous is None else f"{one.to_previous:.3e}",
        ]
        problems = ", ".join(problem.kind for problem in one.problems)
        rows.append([shown(name), *("-" if c is None else str(c) for c in cells), problems])
    yield Table(header, rows, spare=("written (UTC)", "size", "epoch", "not finite"))
    odd = [p for p in found.passed_over if verbose or not p.reason.startswith(_PLAIN_REASONS)]
    yield from passed_over_lines(odd, None if verbose else MOST_PASSED, _BY_V)
    yield from _problem_lines(found)
    if len(names) > 1:
        yield _word_runs(found.verdict, names)
    count = len(found.all_problems)
    yield word_count(count, "problem") if count else "healthy"


def _problem_lines(found: Health) -> Iterator[str]:
    """Yield each problem; where several checkpoints have the same, its text only once."""
    alike: dict[tuple[str, str], tuple[str, list[str]]] = {}
    for one in found.checkpoints:
        path = shown(one.path)
        for problem in one.problems:
            # A text begins with the path of its checkpoint, mostly.
            key = problem.kind, problem.text.removeprefix(path)
            alike.setdefault(key, (problem.text, []))[1].append(path)
    for (kind, _), (text, (_, *others)) in alike.items():
        yield f"{kind}: {text}"
        if others:
            yield f"  the same of {', '.join(others[:3])}{word_rest(len(others) - 3)}"
    for problem in found.problems:
        yield f"{problem.kind}: {problem.text}"


def _word_runs(verdict: Verdict, names: Sequence[str]) -> str:
    """Return whether checkpoints of these names are of one run, as far as their values say."""
    if verdict.least is None or verdict.between is None:
        return "one run or two: cannot tell, too few numbers differ"
    a, b = (shown(names[k], 60) for k in verdict.between)
    least = f"cosine {round(verdict.least, 3) + 0.0:.3f}"
    least = f"{least} between {a} and {b}" if len(names) == 2 else f"least {least}, {a} and {b}"
    if verdict.is_refused:
        return f"two runs: not all checkpoints point the same way ({least}; one run has nearly 1)"
    return f"one run: neighbours point nearly the same way ({least}; two runs have about 0)"


def _score_data(score: Score) -> dict[str, Any]:
    return {
        "path": name_path(score.path),
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


def evaluation_lines(scores: Sequence[Score], compared: Comparison | None) -> Iterator[Line]:
    """Yield the scores, and the differences between the models and the baseline."""
    if compared is None:
        yield from _score_lines(scores)
        return
    baseline = compared.baseline
    # Among the models of a folder, the baseline has one row, and is not compared with itself.
    others = [one for one in compared.models if one.score.path != baseline.path]
    known = len(others) < len(compared.models)
    yield from _score_lines(scores if known else [*scores, baseline])
    rows = []
    tests: dict[str, dict[str, None]] = {}  # test -> the metrics that it is for
    for one in others or compared.models:
        for gain in one.gains:
            numbers = [f"{value:+.6f}" for value in gain.paired[:3]]
            if gain.p is not None:
                test = "a sign-flip test" if gain.mcnemar_p is None else "McNemar's test"
                over = f" over {gain.paired.rows} parts of the rows" if gain.in_parts else ""
                tests.setdefault(test, {})[f"{shown(gain.metric)}{over}"] = None
            words = ["-" if gain.p is None else f"{gain.p:.3g}", gain.verdict]
            rows.append([shown(one.score.path), gain.metric, *numbers, *words])
    if not rows:
        yield f"nothing can be compared with {shown(baseline.path, 60)}"
        return
    yield f"minus {shown(baseline.path, 60)}, with 95 % intervals over {baseline.rows} paired rows:"
    header = ("model", "metric", "difference", "from", "to", "p", "verdict")
    yield Table(header, rows, spare=("p", "from", "to", "difference"), left=("metric", "verdict"))
    if tests:
        yield "p by " + " and ".join(f"{test} ({', '.join(tests[test])})" for test in sorted(tests))
    if any(gain.verdict == "within noise" for one in compared.models for gain in one.gains):
        yield (
            "within noise: no difference is shown; that takes an interval without 0 and a p below "
            "0.05, so six rows that differ or more"
        )


def _score_lines(scores: Sequence[Score]) -> Iterator[Line]:
    """Yield a row for each model, a column for each metric that any of them has."""
    metrics = list(dict.fromkeys(name for score in scores for name in score.metrics))
    rows = []
    for score in scores:
        values = [score.loss, *(score.metrics.get(name) for name in metrics)]
        cells = ["-" if value is None else f"{value:.6f}" for value in values]
        rows.append([shown(score.path), *cells, str(score.rows)])
    # Accuracy is what most people look for; other metrics go before it, from the last.
    spare = ["rows", *(shown(name) for name in reversed(metrics) if name != "accuracy"), "loss"]
    yield Table(["model", "loss", *map(shown, metrics), "rows"], rows, spare)
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


def upload_lines(found: Sequence[Unfinished]) -> Iterator[Line]:
    """Yield unfinished uploads, and how many were aborted."""
    states = {(True, True): "aborted", (True, False): "dead", (False, False): "alive"}
    rows = [
        [
            shown(one.url),
            f"{one.begun:%Y-%m-%d %H:%M}",
            f"{one.idle / 60:.0f} min",
            word_size(one.nbytes),
            states[one.is_dead, one.is_aborted],
        ]
        for one in found
    ]
    if rows:
        header = ("upload", "begun (UTC)", "idle for", "size", "run")
        yield Table(header, rows, spare=("begun (UTC)",), left=("run",))
    dead = sum(one.is_dead and not one.is_aborted for one in found)
    aborted = sum(one.is_aborted for one in found)
    nbytes = sum(one.nbytes for one in found if one.is_aborted)
    if aborted:
        yield f"aborted {word_count(aborted, 'upload')} ({word_size(nbytes)})"
    elif dead:
        yield f"{word_count(dead, 'upload')} of dead runs; delete with --abort"
    else:
        yield "no uploads of dead runs"
