"""argv <-> tools: options, rendering, exit codes.

The only module that imports click, prints or exits.  Heavy packages are imported inside the
commands that need them, so that ``--help`` is quick.
"""

from __future__ import annotations

import atexit
import math
import os
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import click

from polyak_cli import __version__
from polyak_cli.errors import OutputError, PolyakError, UsageError, shown

if TYPE_CHECKING:
    from pathlib import Path

    from polyak_cli.averaging import Plan, Report
    from polyak_cli.checkpoints import PassedOver
    from polyak_cli.comparison import Comparison
    from polyak_cli.data import Split
    from polyak_cli.differences import Differences, Distances
    from polyak_cli.health import Health
    from polyak_cli.inspection import Inspection
    from polyak_cli.models import Score
    from polyak_cli.recalibration import Recalibration
    from polyak_cli.verification import Verification

#: Besides these, 128 and the signal's number where one ended the program.
DONE, ANSWER_IS_NO, USAGE, FAILED = 0, 1, 2, 3
#: Problems that are shown of an average which does not verify.
_MOST = 20
#: Bytes of address space without which numpy and h5py cannot be relied on to load and work.
_ADDRESS_SPACE = 160 << 20


# --- click, with what it lacks --------------------------------------------------------------------


class GroupedOption(click.Option):
    """An option that stands under a heading of the help text."""

    def __init__(self, *args: Any, group: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


#: How a help text ends.
_EXAMPLE = "\b\nExample:\n  {}"


class Command(click.Command):
    """A command whose help has headings, and an example that can be pasted."""

    def __init__(self, *args: Any, example: str, **kwargs: Any) -> None:
        kwargs["epilog"] = _EXAMPLE.format(example)
        kwargs.setdefault("context_settings", {"show_default": True, "max_content_width": 100})
        super().__init__(*args, **kwargs)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, a section for each group, in the order of declaration."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record and isinstance(parameter, click.Option):
                sections.setdefault(getattr(parameter, "group", "Help"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


class Size(click.ParamType[Any]):
    """A number of bytes as people write it: 64MB, 1GiB, 1000000."""

    name = "SIZE"
    units: Mapping[str, int] = {
        "": 1, "b": 1,
        "k": 10**3, "kb": 10**3, "kib": 1 << 10,
        "m": 10**6, "mb": 10**6, "mib": 1 << 20,
        "g": 10**9, "gb": 10**9, "gib": 1 << 30,
    }  # fmt: skip

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Return the bytes."""
        if isinstance(value, int):
            return value
        text = str(value).strip().lower()
        unit = text.lstrip("0123456789.")
        try:
            return int(float(text[: len(text) - len(unit)]) * self.units[unit.strip()])
        except (KeyError, ValueError, OverflowError):
            self.fail(f"{shown(value)} is not a size; write it like 64MB or 1GiB", param, ctx)


class Numbers(click.ParamType[Any]):
    """Numbers with commas between them."""

    name = "A,B,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        """Return the numbers."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{shown(value)} is not a list of numbers like 0.5,0.3,0.2", param, ctx)


class Gate(click.ParamType[Any]):
    """A metric and the least value it may have."""

    name = "METRIC=VALUE"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, float]:
        """Return the metric and the value."""
        if isinstance(value, tuple):
            return value
        name, _, number = str(value).partition("=")
        try:
            least = float(number)
        except ValueError:
            least = math.nan
        if not name.strip() or not math.isfinite(least):
            self.fail(f"{shown(value)} is not a gate like accuracy=0.8", param, ctx)
        return name.strip(), least


def _options(group: str, *declared: tuple[tuple[str, ...], dict[str, Any]]) -> Callable[[Any], Any]:
    """Return a decorator that adds options under one heading."""

    def decorate(function: Any) -> Any:
        for names, settings in reversed(declared):
            function = click.option(*names, cls=GroupedOption, group=group, **settings)(function)
        return function

    return decorate


def _option(*names: str, **settings: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return names, settings


# --- the commands ---------------------------------------------------------------------------------


@click.group(
    context_settings={"max_content_width": 100},
    epilog=_EXAMPLE.format("polyak average ckpts/ --last 10 -o final.h5"),
)
@click.version_option(__version__, "-V", "--version", prog_name="polyak")
def cli() -> None:
    """Average the checkpoints of a training run into one better-behaved model."""
    _check_address_space()


# Options of several commands.
LAST = _option("--last", type=int, metavar="N", help="Only the N newest.  [default: all]")
FROM = _option(
    "--from", "from_epoch", type=int, metavar="EPOCH", help="The first epoch that counts."
)
TO = _option("--to", "to_epoch", type=int, metavar="EPOCH", help="The last epoch that counts.")
EXCLUDE = _option(
    "--exclude",
    multiple=True,
    metavar="GLOB",
    help="File names that are not checkpoints; may be given again.",
)
EPOCH_PATTERN = _option(
    "--epoch-pattern",
    metavar="REGEX",
    help="Finds the epoch in unusual names: its group 'epoch', or its first group.",
)
MATCH = _option(
    "--match",
    type=click.Choice(["name", "order"]),
    default="name",
    help="How tensors are paired; 'order' for layers that Keras numbered anew.",
)
DATA = _option(
    "--data",
    required=True,
    metavar="DATA",
    help="blobs, a FILE.npz with x and y, a FILE.csv, or MODULE.py:FUNCTION that returns them.",
)
ROWS_AT_A_TIME = _option("--batch-size", type=int, default=256, metavar="N", help="Rows at a time.")
TRUST_CODE = _option(
    "--trust-code",
    is_flag=True,
    help="Run the code that a model file carries (a Lambda layer).",
)
HASH = _option(
    "--hash/--no-hash",
    default=None,
    help="Record each input's SHA-256 in the output.  [default: up to 64 MB in all]",
)
QUIET = _option("-q", "--quiet", is_flag=True, help="Print only errors.")

CHOOSING = _options(
    "Choosing checkpoints",
    LAST,
    FROM,
    TO,
    _option(
        "--every",
        type=int,
        metavar="K",
        default=1,
        help="Every K-th, counted back from the newest; before --last.",
    ),
    EXCLUDE,
    _option("--best", type=int, metavar="N", help="Only the N best by --monitor, after --last."),
    _option(
        "--monitor",
        metavar="METRIC",
        help="The metric of --best, from the file names or --log.  [default: val_loss]",
    ),
    _option(
        "--mode",
        type=click.Choice(["min", "max"]),
        help="Whether less or more is better.  [default: told by the metric's name]",
    ),
    _option("--log", type=click.Path(), metavar="CSV", help="A Keras CSVLogger file for --best."),
    EPOCH_PATTERN,
)


def _scheme_options(function: Any) -> Any:
    """Add the scheme and its parameters, derived from the registry."""
    from polyak_cli.schemes import SCHEMES

    declared = [
        _option(
            "--scheme",
            type=click.Choice(list(SCHEMES)),
            help="The rule that gives coefficients.  [default: equal]",
        )
    ]
    for name, scheme in SCHEMES.items():
        if scheme.parameter:
            declared.append(
                _option(
                    f"--{scheme.parameter.name}",
                    type=float,
                    help=f"Of {name}: {scheme.summary}.  [default: {scheme.parameter.default:g}]",
                )
            )
    declared.append(
        _option(
            "--coefficients",
            type=Numbers(),
            help="Your own, oldest first, instead of a scheme; they are normalised.",
        )
    )
    return _options("Coefficients", *declared)(function)


AVERAGING = _options(
    "Averaging",
    _option(
        "--dtype",
        type=click.Choice(
            ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"]
        ),
        help="The stored float type.  [default: the checkpoints' own]",
    ),
    _option(
        "--optimizer",
        type=click.Choice(["drop", "newest"]),
        default="drop",
        help="What becomes of the optimizer's state.",
    ),
    _option(
        "--include-tensors",
        multiple=True,
        metavar="GLOB",
        help="Average only these; the others are carried from the newest.",
    ),
    _option(
        "--exclude-tensors",
        multiple=True,
        metavar="GLOB",
        help="Carry these from the newest.",
    ),
    MATCH,
    _option(
        "--use-ema",
        is_flag=True,
        help="Take the EMA that Keras keeps in the optimizer's state (use_ema=True).",
    ),
    _option(
        "--allow-nonfinite",
        is_flag=True,
        help="Average NaN and infinity too, instead of refusing them.",
    ),
)

RECALIBRATING = _options(
    "Recalibrating",
    _option(
        "--recalibrate",
        metavar="DATA",
        help="Run the average in Keras and gather BatchNorm's statistics anew; DATA as in polyak "
        "recalibrate.",
    ),
    _option(
        "--split",
        type=click.Choice(["train", "test"]),
        help="Which part of the data.  [default: train, where the data are split]",
    ),
    _option("--batch-size", type=int, metavar="N", help="Rows at a time, at most.  [default: 256]"),
    _option("--trust-code", is_flag=True, help="Run the code that the model carries."),
)

WRITING = _options(
    "Output",
    _option("-o", "--output", type=click.Path(), metavar="FILE", help="The file to write."),
    _option("--force", is_flag=True, help="Replace an existing output."),
    HASH,
    _option(
        "--verify",
        is_flag=True,
        help="Read the output back from the disk, average once more and compare, before anything "
        "is replaced.",
    ),
    _option("-n", "--dry-run", is_flag=True, help="Show the plan and write nothing."),
    _option("--json", "as_json", is_flag=True, help="Print plan or report as JSON."),
    QUIET,
    _option("-v", "--verbose", is_flag=True, help="Name every tensor and what becomes of it."),
)

MACHINE = _options(
    "Machine",
    _option(
        "--max-memory",
        type=Size(),
        help="Bound on the buffers, on top of Python and its libraries.  [default: 32MiB]",
    ),
    _option("--jobs", type=int, metavar="N", help="Processes.  [default: processors, at most 8]"),
)


@cli.command(
    cls=Command, example="polyak average ckpts/ --last 10 --scheme exp --alpha 2 -o final.h5"
)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...", type=click.Path())
@CHOOSING
@_options(
    "Health",
    _option(
        "--on-unhealthy",
        type=click.Choice(["fail", "skip"]),
        help="Look for what `polyak check` finds first, at the price of a second reading, and "
        "refuse to average, or leave unhealthy checkpoints out.  [default: neither]",
    ),
)
@_scheme_options
@AVERAGING
@RECALIBRATING
@WRITING
@MACHINE
def average(
    sources: tuple[str, ...],
    output: str | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Average checkpoints into one model file.

    SOURCE is a directory or a glob, whose checkpoints are ordered by the epoch in their names, or
    files one by one, oldest first.
    """
    if not output and not dry_run:
        raise UsageError("--output is missing; name the file to write with -o, or use --dry-run")
    from polyak_cli import averaging

    notes = _load_rows(options)
    plan = averaging.plan(sources, output, **options)
    if dry_run:
        _notes([*notes, *plan.notes], quiet)
        _result(plan.data(), as_json, quiet, lambda: _plan_lines(plan, verbose))
        return
    with (
        _apart(options["recalibrate"]),
        _progress("averaging", plan.bytes_to_read, quiet or as_json) as advance,
    ):
        report = averaging.run(plan, progress=advance)
    _notes([*notes, *report.notes], quiet)
    _result(report.data(), as_json, quiet, lambda: _report_lines(report, verbose))


def _load_rows(options: dict[str, Any]) -> Sequence[str]:
    """Replace the name of a data set among the options by its rows; return its notes."""
    name, split = options["recalibrate"], options.pop("split")
    if name is None:
        if split:
            raise UsageError("--split belongs to --recalibrate, which is missing")
        return ()
    from polyak_cli import data as datasets

    with _apart(name):
        dataset = datasets.load(name)
    options["recalibrate"] = dataset.split(split, default="train")
    return dataset.notes


@contextmanager
def _apart(recalibrates: object) -> Iterator[None]:
    """Keep what a framework or a user's own code prints apart from the result, if any is run."""
    if recalibrates is None:
        yield
        return
    from polyak_cli.quiet import prints_on_stderr

    with prints_on_stderr():
        yield


@cli.command(
    cls=Command,
    short_help="Keep the average of a run in training current.",
    example="polyak watch ckpts/ --last 10 --scheme exp -o latest.h5",
)
@click.argument("directory", metavar="DIR", type=click.Path())
@_options(
    "Watching",
    _option(
        "--interval",
        type=float,
        default=2.0,
        metavar="SECONDS",
        help="Between two looks at the directory.",
    ),
    _option("--once", is_flag=True, help="Bring the output up to date and end, as from cron."),
)
@CHOOSING
@_scheme_options
@AVERAGING
@_options(
    "Output",
    _option(
        "-o",
        "--output",
        type=click.Path(),
        required=True,
        metavar="FILE",
        help="The file to write, and to replace each time.",
    ),
    _option("--force", is_flag=True, help="Replace an output that is no average by polyak."),
    HASH,
    _option("--json", "as_json", is_flag=True, help="Print each report as one line of JSON."),
    QUIET,
    _option("-v", "--verbose", is_flag=True, help="Print each report in full."),
)
@MACHINE
def watch(
    directory: str,
    output: str,
    interval: float,
    once: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Keep the average of a directory's checkpoints current while training writes them.

    A checkpoint counts when two looks found it unchanged and it can be read whole; until then the
    average is that of the others. Fewer than --last or --best are no error: all are averaged.
    """
    from polyak_cli.watching import watch

    noted: tuple[str, ...] = ()
    for report in watch(
        directory,
        output,
        interval=interval,
        once=once,
        told=lambda note: _notes([note], quiet),
        **options,
    ):
        _notes([note for note in report.notes if note not in noted], quiet)
        noted = report.notes  # most are the same each time
        if as_json:
            _json_line(report.data())
        elif not quiet:
            _print(_report_lines(report, True) if verbose else _published_lines(report), sys.stdout)


@cli.command(
    cls=Command,
    short_help="Score model files on data.",
    example="polyak evaluate final.h5 --data blobs --fail-under accuracy=0.8",
)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...", type=click.Path())
@_options(
    "Data",
    DATA,
    _option(
        "--split",
        type=click.Choice(["train", "test"]),
        help="Which part of the data.  [default: test, where the data are split]",
    ),
    ROWS_AT_A_TIME,
)
@_options(
    "Deciding",
    _option(
        "--fail-under",
        type=Gate(),
        multiple=True,
        help="Exit with 1 when any model's metric is less, or its loss or metric is not finite; "
        "may be given again.",
    ),
    _option(
        "--baseline",
        type=click.Path(),
        metavar="MODEL",
        help="Compare every model with this one, row by row: differences with 95 % intervals.",
    ),
    _option(
        "--fail-if-worse",
        is_flag=True,
        help="Exit with 1 when any model is worse than the baseline beyond noise, in accuracy or, "
        "where there is none, in loss.",
    ),
    TRUST_CODE,
)
@_options(
    "Output",
    _option("--json", "as_json", is_flag=True, help="Print the scores as JSON."),
    QUIET,
)
def evaluate(
    models: tuple[str, ...],
    data: str,
    split: str | None,
    batch_size: int,
    fail_under: tuple[tuple[str, float], ...],
    baseline: str | None,
    fail_if_worse: bool,
    trust_code: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Score model files on data: loss, accuracy and the model's own metrics.

    MODEL is a file, or a directory or glob, of which every model file is scored: by epoch where
    all names tell one, else by name.
    """
    if fail_if_worse and baseline is None:
        raise UsageError("--fail-if-worse has nothing to compare with; name a model by --baseline")
    from polyak_cli import checkpoints
    from polyak_cli import data as datasets
    from polyak_cli.quiet import prints_on_stderr

    paths, passed_over = checkpoints.model_files(models)
    with prints_on_stderr():
        dataset = datasets.load(data)
        rows = dataset.split(split)
        scores, compared = _scored(
            paths, baseline, rows, batch_size=batch_size, trust_code=trust_code
        )
    failures = [line for score in scores for line in _below(score, fail_under)]
    if compared and fail_if_worse:
        failures += _worse(compared)
    _notes([*map(_passed_over, passed_over), *dataset.notes, *_about(scores, compared)], quiet)
    found = {
        "data": data,
        "rows": rows.rows,
        **_models_data(scores, compared),
        "passed_over": [{"path": str(one.path), "reason": one.reason} for one in passed_over],
        "failures": failures,
    }
    _result(found, as_json, quiet, lambda: _evaluation_lines(scores, compared))
    _print((f"failed: {line}" for line in failures), sys.stderr)
    return ANSWER_IS_NO if failures else DONE


def _scored(
    paths: Sequence[Path], baseline: str | None, rows: Split, **options: Any
) -> tuple[list[Score], Comparison | None]:
    """Score the models, and compare them where there is something to compare with."""
    from polyak_cli import comparison, models

    if baseline is None:
        return [*models.evaluate(paths, rows, **options)], None
    compared = comparison.compare(paths, baseline, rows, **options)
    return [one.score for one in compared.models], compared


def _about(scores: Sequence[Score], compared: Comparison | None) -> Iterable[str]:
    """Return what the user should know of each file; the baseline may be among the models."""
    every = [compared.baseline, *scores] if compared else scores
    return dict.fromkeys(f"{shown(one.path)}: {note}" for one in every for note in one.notes)


def _worse(compared: Comparison) -> Iterator[str]:
    """Yield the models that are worse than the baseline: beyond noise, or with a loss that is none.

    Accuracy decides, or loss where there is no accuracy.
    """
    for one in compared.models:
        path, than = shown(one.score.path), shown(compared.baseline.path)
        if not one.gains:
            raise UsageError(
                f"--fail-if-worse: {path} and {than} have neither an accuracy nor a loss in common"
            )
        first, paired = one.gains[0], one.gains[0].paired
        if first.verdict == "worse":
            yield (
                f"{path}: {first.metric} is worse than that of {than} by "
                f"{abs(paired.difference):.6f} ({paired.low:+.6f} to {paired.high:+.6f})"
            )
        elif one.score.loss is not None and not math.isfinite(one.score.loss):
            yield f"{path}: the loss is {one.score.loss!r}, not a finite number"


def _below(score: Score, gates: Sequence[tuple[str, float]]) -> Iterator[str]:
    """Yield what a model fails by; one whose loss is not finite passes no gate."""
    values = dict(score.metrics) | ({} if score.loss is None else {"loss": score.loss})
    loss = values.get("loss", 0.0)
    for metric, least in gates:
        if metric not in values:
            raise UsageError(
                f"--fail-under {shown(metric)}: {shown(score.path)} has no such metric; it has "
                f"{', '.join(map(shown, values)) or 'none'}"
            )
        found = f"{shown(score.path)}: {shown(metric)} is {values[metric]!r}"
        if not math.isfinite(values[metric]):
            yield f"{found}, not a finite number"
        elif values[metric] < least:
            yield f"{found}, less than {least!r}"
        elif not math.isfinite(loss):
            yield f"{found}, but the loss is {loss!r}, not a finite number"


@cli.command(
    cls=Command,
    short_help="Gather BatchNorm's statistics anew.",
    example="polyak recalibrate average.h5 --data train.npz -o final.h5",
)
@click.argument("model", metavar="MODEL", type=click.Path())
@_options(
    "Data",
    DATA,
    _option(
        "--split",
        type=click.Choice(["train", "test"]),
        help="Which part of the data.  [default: train, where the data are split]",
    ),
    _option(
        "--batch-size",
        type=int,
        default=256,
        metavar="N",
        help="Rows at a time, at most; best that of training, and not small.",
    ),
    TRUST_CODE,
)
@_options(
    "Output",
    _option(
        "-o", "--output", type=click.Path(), required=True, metavar="FILE", help="What to write."
    ),
    _option("--force", is_flag=True, help="Replace an existing output."),
    _option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
    QUIET,
)
def recalibrate(
    model: str,
    data: str,
    split: str | None,
    batch_size: int,
    trust_code: bool,
    output: str,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Gather BatchNorm's moving statistics anew, in one pass over training data.

    MODEL is a whole Keras model, such as an average, whose statistics are averages of estimates
    that were made for other weights.  The output is MODEL with nothing else changed.
    """
    from polyak_cli import data as datasets
    from polyak_cli import recalibration
    from polyak_cli.quiet import prints_on_stderr

    with prints_on_stderr():
        dataset = datasets.load(data)
        rows = dataset.split(split, default="train")
        report = recalibration.recalibrate(
            model, output, rows, batch_size=batch_size, trust_code=trust_code, force=force
        )
    _notes([*dataset.notes, *report.notes], quiet)
    _result(report.data(), as_json, quiet, lambda: _recalibration_lines(report))


@cli.command(
    cls=Command,
    short_help="See that an average is what its record says.",
    example="polyak verify final.h5 --source ckpts/",
)
@click.argument("file", metavar="FILE", type=click.Path())
@_options(
    "Checkpoints",
    _option(
        "--source",
        "sources",
        multiple=True,
        type=click.Path(),
        metavar="DIR",
        help="Look for them here first; may be given again.  [default: beside FILE]",
    ),
)
@_options(
    "Output",
    _option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    QUIET,
)
@MACHINE
def verify(
    file: str, sources: tuple[str, ...], as_json: bool, quiet: bool, **machine: int | None
) -> int:
    """See that an average is, bit for bit, what the record in it says.

    The checkpoints that the record names are averaged once more, in a hidden copy that is removed
    again. Exit 1 when FILE is not verified: what differs is named, tensor or input.
    """
    from polyak_cli import verification

    found = verification.verify(file, sources=sources, **machine)
    _notes(found.notes, quiet)
    _result(found.data(), as_json, quiet, lambda: _verification_lines(found))
    return DONE if found.verified else ANSWER_IS_NO


@cli.command(
    cls=Command,
    short_help="Show what is inside checkpoints.",
    example="polyak inspect final.h5 --stats",
)
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path())
@_options(
    "Output",
    _option(
        "--stats",
        is_flag=True,
        help="Read every value: norm, least, greatest, and how many are not finite.",
    ),
    _option("--json", "as_json", is_flag=True, help="Print it as JSON."),
)
def inspect(files: tuple[str, ...], stats: bool, as_json: bool) -> None:
    """Show format, version, provenance and the table of tensors of each checkpoint.

    The fate of a tensor is what averaging does with it unless told otherwise.
    """
    from pathlib import Path

    from polyak_cli import inspection

    found = list(inspection.inspect([Path(file) for file in files], statistics=stats))
    data = {"checkpoints": [one.data() for one in found]}
    _result(data, as_json, False, lambda: (line for one in found for line in _inside_lines(one)))


@cli.command(
    cls=Command,
    short_help="Show how far checkpoints are apart.",
    example="polyak diff ckpts/model_09.h5 ckpts/model_10.h5 --rtol 1e-3",
)
@click.argument("sources", nargs=-1, required=True, metavar="A B | DIR", type=click.Path())
@_options(
    "Two files",
    _option("--rtol", type=float, metavar="R", help="Equal within R times A.  [default: 0]"),
    _option("--atol", type=float, metavar="T", help="Equal within T.  [default: 0]"),
)
@_options(
    "A run",
    LAST,
    EXCLUDE,
    _option(
        "--match",
        type=click.Choice(["name", "order"]),
        help="How tensors are paired.  [default: name]",
    ),
    _option(
        "--plot", type=click.Path(), metavar="FILE", help="Draw the distances as .png or .svg."
    ),
)
@_options(
    "Output",
    _option("--json", "as_json", is_flag=True, help="Print it as JSON."),
    QUIET,
    _option("-v", "--verbose", is_flag=True, help="Show every tensor, not only the worst."),
)
def diff(
    sources: tuple[str, ...],
    rtol: float | None,
    atol: float | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **of_a_run: Any,
) -> int:
    """Show how far checkpoints are apart.

    A and B are two checkpoint files: relative distance, largest difference and cosine of each
    tensor, the worst first; exit 0 when all are equal within the tolerances, 1 when not.

    DIR is a directory, a glob, or three files or more: the distance from each checkpoint to the
    next, and of each to the average of all, to see which is the odd one out.
    """
    from pathlib import Path

    given = [f"--{name}" for name, value in of_a_run.items() if value]
    from polyak_cli.checkpoints import file_of

    if len(sources) == 2 and all(file_of(Path(source)).is_file() for source in sources):
        if given:
            raise UsageError(f"{given[0]} belongs to a run, not to two files")
        return _diff_files(sources, rtol or 0.0, atol or 0.0, as_json, quiet, verbose)
    if rtol is not None or atol is not None:
        raise UsageError("--rtol and --atol belong to two files, not to a run")
    return _diff_run(sources, of_a_run, as_json, quiet)


def _diff_files(
    sources: Sequence[str], rtol: float, atol: float, as_json: bool, quiet: bool, verbose: bool
) -> int:
    from pathlib import Path

    from polyak_cli import differences

    one, other = map(Path, sources)
    found = differences.diff(one, other, rtol=rtol, atol=atol)
    _result(found.data(), as_json, quiet, lambda: _difference_lines(found, verbose))
    return DONE if found.equal else ANSWER_IS_NO


def _diff_run(
    sources: Sequence[str], options: Mapping[str, Any], as_json: bool, quiet: bool
) -> int:
    from pathlib import Path

    from polyak_cli import checkpoints, differences, formats

    plot = options["plot"]
    if plot:
        from polyak_cli import plots

        plots.check(Path(plot))
    selection = checkpoints.select(
        sources,
        last=options["last"],
        exclude=options["exclude"],
        written_by_us=formats.averages,
    )
    found = differences.distances(selection, by=options["match"] or "name")
    if plot:
        plots.distances(
            [_label(row.path, row.epoch) for row in found.checkpoints],
            [row.to_previous for row in found.checkpoints],
            [row.to_average for row in found.checkpoints],
            Path(plot),
        )
    _result(found.data(), as_json, quiet, lambda: _distance_lines(found))
    return DONE


def _label(path: Path, epoch: int | None) -> str:
    return shown(path.stem, 20) if epoch is None else str(epoch)


@cli.command(
    cls=Command,
    short_help="Find what is wrong with checkpoints.",
    example="polyak check ckpts/ --last 10",
)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...", type=click.Path())
@_options("Choosing checkpoints", LAST, FROM, TO, EXCLUDE, EPOCH_PATTERN, MATCH)
@_options(
    "Output",
    _option("--json", "as_json", is_flag=True, help="Print it as JSON."),
    QUIET,
)
@_options(
    "Machine",
    _option(
        "--max-memory",
        type=Size(),
        help="Bound on the buffers, on top of Python and its libraries.  [default: 16MiB]",
    ),
)
def check(sources: tuple[str, ...], as_json: bool, quiet: bool, **options: Any) -> int:
    """Find what is wrong with the checkpoints of a run, or with the run; exit 1 if anything is.

    Files that cannot be read, NaN and infinity, a checkpoint equal to the one before, an epoch
    twice or missing, two runs or two models in one place, an outlier, and a run that was resumed
    from an earlier epoch. Every value is read once.
    """
    from polyak_cli import health

    found = health.check(sources, **options)
    _notes(found.notes, quiet)
    _result(found.data(), as_json, quiet, lambda: _health_lines(found))
    return DONE if found.healthy else ANSWER_IS_NO


@cli.command(
    cls=Command,
    short_help="Find the best average on data.",
    example="polyak sweep ckpts/ --data blobs -o report --write-best final.h5",
)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...", type=click.Path())
@CHOOSING
@_options(
    "Candidates",
    _option(
        "--windows",
        metavar="LIST",
        help="How many of the newest count, like 1-10,20.  [default: all there are]",
    ),
    _option(
        "--schemes",
        metavar="LIST",
        default="equal,linear,exp:1,exp:2,exp:5,ema:0.9,power:0.1",
        help="Schemes, each with its parameter.",
    ),
    _option(
        "--search",
        type=click.Choice(["greedy", "coefficients"]),
        multiple=True,
        help="Look for a soup too: add checkpoints while the score improves, or fit coefficients.",
    ),
    _option(
        "--batch",
        type=int,
        default=8,
        metavar="N",
        help="Averages that lie on the disk at a time; each batch reads the checkpoints once.",
    ),
)
@_options(
    "Data",
    DATA,
    _option(
        "--select-on",
        default="0.5",
        metavar="SHARE|SPLIT",
        help="The share of the test rows to choose on, the rest being reported on; or a split.",
    ),
    _option("--seed", type=int, default=0, metavar="S", help="Of the division of the rows."),
    _option(
        "--recalibrate",
        metavar="DATA",
        help="Gather BatchNorm's statistics of every average anew; DATA as in polyak recalibrate.",
    ),
    ROWS_AT_A_TIME,
    TRUST_CODE,
)
@_options(
    "Output",
    _option("-o", "--output", type=click.Path(), required=True, metavar="DIR", help="The folder."),
    _option(
        "--write-best", type=click.Path(), metavar="FILE", help="Write the winner as a model file."
    ),
    _option("--force", is_flag=True, help="Replace an older report and model file."),
    _option("--json", "as_json", is_flag=True, help="Print the results as JSON."),
    QUIET,
)
@MACHINE
def sweep(
    sources: tuple[str, ...],
    output: str,
    data: str,
    schemes: str,
    write_best: str | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Score every single checkpoint, and the average of every window by every scheme.

    The winner is chosen on one part of the test rows, and its gain told on the other.  DIR gets
    report.html, sweep.csv, sweep.json and the figure.
    """
    from pathlib import Path

    from polyak_cli import data as datasets
    from polyak_cli import reports, sweeping
    from polyak_cli.quiet import prints_on_stderr

    folder = Path(output)
    reports.check(folder, force=force)
    options["split"] = None
    notes = _load_rows(options)
    with (
        prints_on_stderr(),
        _progress("scoring", None, quiet or as_json, in_bytes=False) as advance,
    ):
        rows = datasets.load(data)
        best = Path(write_best) if write_best else None
        found = sweeping.sweep(
            sources,
            rows,
            chosen=schemes,
            scratch=folder.resolve().parent,
            write_best=best,
            force=force,
            progress=lambda _done, total: advance(1, total),
            **options,
        )
    data_found = found.data()
    reports.write(data_found, folder)
    _notes([*notes, *found.notes], quiet)
    _result(data_found, as_json, quiet, lambda: _sweep_lines(data_found, folder, best))


def _sweep_lines(found: Mapping[str, Any], folder: Path, best: Path | None) -> Iterator[str]:
    """Yield a row for each candidate, then what they say."""
    from polyak_cli import reports

    columns = [(split, metric) for metric in ("accuracy", "loss") for split in found["splits"]]
    table = [["candidate", *(f"{metric} ({split})" for split, metric in columns)]]
    for row in found["rows"]:
        values = [row["metrics"][split].get(metric) for split, metric in columns]
        cells = ["-" if value is None else f"{value:.4f}" for value in values]
        table.append([shown(row["label"], 60), *cells])
    yield from _columns(table)
    yield from reports.sentences(found)
    yield f"wrote {shown(folder / 'report.html')}"
    if best:
        yield f"wrote {shown(best)}"


@cli.command(
    cls=Command,
    short_help="Train the sample network.",
    example="polyak train --data blobs -o ckpts --epochs 500 --keep 10",
)
@_options(
    "Training",
    _option(
        "--data",
        type=click.Choice(["blobs"]),
        default="blobs",
        help="1,100 points in three overlapping clouds, of which 100 are for training.",
    ),
    _option("--epochs", type=int, default=500, metavar="N", help="How many epochs."),
    _option("--seed", type=int, default=0, metavar="S", help="Of the initial weights and order."),
    _option("--optimizer", type=click.Choice(["sgd", "adam"]), default="sgd", help="Which."),
    _option(
        "--learning-rate",
        type=float,
        metavar="RATE",
        help="Of the optimizer.  [default: 0.01 for sgd, 0.001 for adam]",
    ),
)
@_options(
    "Output",
    _option("-o", "--output", type=click.Path(), required=True, metavar="DIR", help="The folder."),
    _option("--keep", type=int, default=10, metavar="N", help="Keep the last N checkpoints."),
    _option(
        "--plot",
        type=click.Path(),
        metavar="FILE",
        help="Draw the learning curves as .png or .svg.",
    ),
    _option("--force", is_flag=True, help="Replace an earlier run in the folder."),
    _option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
    QUIET,
)
def train(
    data: str,
    epochs: int,
    seed: int,
    optimizer: str,
    learning_rate: float | None,
    output: str,
    keep: int,
    plot: str | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train the sample network and keep a checkpoint of each of the last epochs."""
    from pathlib import Path

    from polyak_cli import models

    if plot:
        from polyak_cli import plots

        plots.check(Path(plot))
    with _progress("training", epochs, quiet or as_json, in_bytes=False) as advance:
        report = models.train(
            Path(output),
            epochs=epochs,
            keep=keep,
            seed=seed,
            optimizer=optimizer,
            learning_rate=learning_rate,
            force=force,
            progress=lambda _epoch, _metrics: advance(1),
        )
    if plot:
        plots.learning_curves(report.history, Path(plot))
    last = {name: values[-1] for name, values in report.history.items()}
    made = {
        "data": data,
        "seed": report.seed,
        "optimizer": report.optimizer,
        "learning_rate": report.learning_rate,
        "epochs": epochs,
        "checkpoints": [str(path) for path in report.checkpoints],
        "log": str(report.log),
        "plot": plot,
        "last": last,
    }
    _result(made, as_json, quiet, lambda: _training_lines(made))


@cli.command(
    cls=Command,
    short_help="Print a shell's completion script.",
    example='eval "$(polyak completion bash)"',
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that makes a shell complete polyak's commands and options."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    if kind is None:
        raise UsageError(f"there is no completion for {shell}")
    _print([kind(cli, {}, "polyak", "_POLYAK_COMPLETE").source()], sys.stdout)


# --- rendering ------------------------------------------------------------------------------------


def _result(
    data: Mapping[str, Any], as_json: bool, quiet: bool, lines: Callable[[], Iterator[str]]
) -> None:
    if as_json:
        from polyak_cli.reports import as_json as text

        _print([text(data)], sys.stdout)
    elif not quiet:
        _print(lines(), sys.stdout)


def _json_line(data: Mapping[str, Any]) -> None:
    from polyak_cli.reports import as_json as text

    _print([text(data, indent=None)], sys.stdout)


def _passed_over(one: PassedOver) -> str:
    return f"passed over: {shown(one.path)} ({one.reason})"


def _notes(notes: Sequence[str], quiet: bool) -> None:
    if not quiet:
        _print((f"note: {note}" for note in notes), sys.stderr)


def _print(lines: Iterable[str], stream: TextIO) -> None:
    """Print after the work is done, and see that it arrives."""
    # A reader who has gone (`| head`) ends us as it ends any filter; nothing is left to clean up.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        for line in lines:
            print(line, file=stream)
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what is still buffered
        raise OutputError(f"{stream.name}: the result cannot be shown: {error.strerror}") from None


def _plan_lines(plan: Plan, verbose: bool) -> Iterator[str]:
    """Yield the plan as lines for a person."""
    parameters = "".join(f", {name} {value:g}" for name, value in plan.parameters.items())
    count = len(plan.checkpoints)
    several = "s" if count > 1 else ""
    yield f"{count} checkpoint{several}, {plan.scheme}{parameters}, oldest first:"
    table = [["checkpoint", "epoch", "coefficient"]]
    for checkpoint, coefficient in zip(plan.checkpoints, plan.coefficients, strict=True):
        epoch = "-" if checkpoint.epoch is None else str(checkpoint.epoch)
        table.append([shown(checkpoint.path.name, 60), epoch, f"{coefficient:.6f}"])
    yield from _columns(table)
    yield f"effective number of checkpoints: {plan.effective_number:.2f}"
    yield (
        f"tensors: {len(plan.averaged)} averaged, {len(plan.carried)} carried from "
        f"{shown(plan.checkpoints[-1].path.name)}, {len(plan.dropped)} dropped"
    )
    if verbose:
        yield from _fate_lines(plan)
    over = plan.recalibrate
    if over:
        yield (
            f"then BatchNorm's statistics are gathered anew: {over['rows']} rows of "
            f"{over['data']}, batches of at most {over['batch_size']}"
        )
    yield from map(_passed_over, plan.passed_over)
    for one in plan.skipped:
        yield from (f"skipped ({problem.kind}): {problem.text}" for problem in one.problems)
    yield (
        f"to read {_size(plan.bytes_to_read)}, to write about {_size(plan.bytes_to_write)}, "
        f"memory about {_size(plan.memory)}"
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
            way = spec.storage.way if spec.storage else "HDF5 library"
            shape = "x".join(map(str, spec.shape)) or "scalar"
            yield f"  {fate} {shown(name)} {spec.dtype} {shape} ({way})"
    ways = Counter(s.storage.way for row in plan.averaged_rows for s in row if s.storage)
    yield "read by " + "; ".join(f"{way} (tensors: {n})" for way, n in ways.items())


def _report_lines(report: Report, verbose: bool) -> Iterator[str]:
    """Yield the report as lines for a person."""
    yield from _plan_lines(report.plan, verbose)
    shares = ", ".join(f"{part} {share:.0%}" for part, share in report.shares.items())
    yield (
        f"read {_size(report.bytes_read)} in {report.seconds:.2f} s "
        f"({_size(report.speed)}/s; {shares}), peak memory {_size(report.peak_memory)}"
    )
    if report.recalibrated:
        yield _gathered_line(report.recalibrated)
    verified = ", verified: read back, it is the average bit for bit" if report.verified else ""
    yield f"wrote {shown(report.output)} ({_size(report.bytes_written)}){verified}"


def _recalibration_lines(report: Recalibration) -> Iterator[str]:
    yield _gathered_line(report)
    yield f"wrote {shown(report.output)}"


def _gathered_line(report: Recalibration) -> str:
    return (
        f"gathered {len(report.statistics)} statistics of {report.layers} BatchNorm layers anew: "
        f"{report.rows} rows of {report.source}, batches of at most {report.batch_size}, "
        f"{report.seconds:.2f} s"
    )


def _verification_lines(found: Verification) -> Iterator[str]:
    name = shown(found.output)
    for problem in found.problems[:_MOST]:
        yield f"  {problem.text}"
    if len(found.problems) > _MOST:
        yield f"  and {len(found.problems) - _MOST} more; see them with --json"
    if found.problems:
        yield f"{name}: not verified"
        return
    several = "s" if len(found.inputs) > 1 else ""
    yield (
        f"{name}: verified, equal bit for bit to the average of {len(found.inputs)} "
        f"checkpoint{several} ({_size(found.nbytes)})"
    )


def _published_lines(report: Report) -> Iterator[str]:
    """Yield one line, of which many stand below one another."""
    plan = report.plan
    names = [shown(one.path.name, 60) for one in plan.checkpoints]
    span = f"{names[0]} to {names[-1]}" if len(names) > 1 else names[0]
    rule = ", ".join([plan.scheme, *(f"{key} {value:g}" for key, value in plan.parameters.items())])
    several = "s" if len(names) > 1 else ""
    yield f"wrote {shown(report.output)}: {len(names)} checkpoint{several}, {span} ({rule})"


def _inside_lines(one: Inspection) -> Iterator[str]:
    """Yield what is inside a checkpoint."""
    from polyak_cli.inspection import stored

    about = "".join(f", {key} {shown(text, 40)}" for key, text in one.data()["about"].items())
    yield (
        f"{shown(one.table.path)}: {one.format}{about}, {one.parameters:,} parameters, "
        f"{_size(one.table.size)}"
    )
    table = [["tensor", "dtype", "shape", "bytes", "stored", "fate"]]
    measured = any(tensor.statistics for tensor in one.tensors)
    if measured:
        table[0] += ["norm", "least", "greatest", "not finite"]
    for spec, fate, statistics in one.tensors:
        shape = "x".join(map(str, spec.shape)) or "scalar"
        row = [shown(spec.name, 80), spec.dtype, shape, str(spec.nbytes), stored(spec), fate]
        if measured:
            row += ["-" if v is None else f"{v:.6g}" for v in statistics or [None] * 4]
        table.append(row)
    yield from _columns(table)
    record = one.provenance
    if isinstance(record, dict) and isinstance(record.get("inputs"), list):
        inputs = [each for each in record["inputs"] if isinstance(each, dict)]
        names = ", ".join(shown(each.get("name"), 60) for each in inputs)
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


def _difference_lines(found: Differences, verbose: bool) -> Iterator[str]:
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
    yield from found.apart
    differing = sum(not tensor.equal for tensor in found.tensors) + len(found.apart)
    yield "equal" if found.equal else f"{differing} tensors differ"


def _distance_lines(found: Distances) -> Iterator[str]:
    """Yield the checkpoints of a run, and how far each is from others."""
    table = [["checkpoint", "epoch", "to previous", "to average", ""]]
    for path, epoch, to_previous, to_average, odd in found.checkpoints:
        step = "-" if to_previous is None else f"{to_previous:.3e}"
        number = "-" if epoch is None else str(epoch)
        far = f"{to_average:.3e}"
        table.append([shown(path.name, 60), number, step, far, "odd one out" if odd else ""])
    yield from _columns(table)
    yield f"distances relative to the norm of the average, over {found.tensors} float tensors"


def _health_lines(found: Health) -> Iterator[str]:
    """Yield the checkpoints of a run and what is wrong with them, then each problem in words."""
    from polyak_cli.health import written

    columns = ["epoch", "written (UTC)", "size", "not finite", "to previous", "to next", ""]
    table = [["checkpoint", *columns]]
    for one in found.checkpoints:
        cells = [
            one.epoch,
            written(one.modified),
            None if one.size is None else _size(one.size),
            one.nonfinite,
            *(None if step is None else f"{step:.3e}" for step in (one.to_previous, one.to_next)),
        ]
        problems = ", ".join(problem.kind for problem in one.problems)
        row = ["-" if cell is None else str(cell) for cell in cells]
        table.append([shown(one.path.name, 60), *row, problems])
    yield from _columns(table)
    yield from map(_passed_over, found.passed_over)
    for problem in found.all_problems:
        yield f"{problem.kind}: {problem.text}"
    count = len(found.all_problems)
    yield "healthy" if not count else f"{count} problem{'s' if count > 1 else ''}"


def _score_data(score: Score) -> dict[str, Any]:
    return {
        "path": str(score.path),
        "loss": score.loss,
        "metrics": dict(score.metrics),
        "rows": score.rows,
        "notes": list(score.notes),
    }


def _models_data(scores: Sequence[Score], compared: Comparison | None) -> dict[str, Any]:
    models = [_score_data(score) for score in scores]
    if compared is None:
        return {"models": models}
    for model, one in zip(models, compared.models, strict=True):
        model["gains"] = {gain.metric: gain.data() for gain in one.gains}
    return {"baseline": _score_data(compared.baseline), "models": models}


def _evaluation_lines(scores: Sequence[Score], compared: Comparison | None) -> Iterator[str]:
    """Yield the scores, and what the models are ahead of the baseline."""
    if compared is None:
        yield from _score_lines(scores)
        return
    yield from _score_lines([*scores, compared.baseline])
    baseline = compared.baseline
    table = [["model", "metric", "difference", "from", "to", "McNemar p", "verdict"]]
    for one in compared.models:
        for gain in one.gains:
            numbers = [f"{value:+.6f}" for value in gain.paired[:3]]
            p = "-" if gain.mcnemar_p is None else f"{gain.mcnemar_p:.3g}"
            table.append([shown(one.score.path, 60), gain.metric, *numbers, p, gain.verdict])
    if len(table) == 1:
        yield f"nothing can be compared with {shown(baseline.path, 60)}"
        return
    yield f"minus {shown(baseline.path, 60)}, with 95 % intervals over {baseline.rows} paired rows:"
    yield from _columns(table)


def _score_lines(scores: Sequence[Score]) -> Iterator[str]:
    """Yield a row for each model, a column for each metric that any of them has."""
    metrics = list(dict.fromkeys(name for score in scores for name in score.metrics))
    table = [["model", "loss", *map(shown, metrics), "rows"]]
    for score in scores:
        values = [score.loss, *(score.metrics.get(name) for name in metrics)]
        cells = ["-" if value is None else f"{value:.6f}" for value in values]
        table.append([shown(score.path, 60), *cells, str(score.rows)])
    yield from _columns(table)


def _training_lines(made: Mapping[str, Any]) -> Iterator[str]:
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


def _size(nbytes: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


@contextmanager
def _progress(
    what: str, total: int | None, silent: bool, *, in_bytes: bool = True
) -> Iterator[Callable[..., None]]:
    """Show a bar with amount, speed and time left on a terminal; nothing elsewhere.

    What it yields takes the amount done, and the total where that was not known before.
    """
    if silent or not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich import progress
    from rich.console import Console

    amount: list[progress.ProgressColumn] = (
        [progress.DownloadColumn(), progress.TransferSpeedColumn()]
        if in_bytes
        else [progress.MofNCompleteColumn()]
    )
    bar = progress.Progress(
        progress.TextColumn(what),
        progress.BarColumn(),
        *amount,
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        # No thread of its own: children are forked before the first byte is read.
        auto_refresh=False,
    )
    with bar:
        task = bar.add_task("", total=total)
        drawn = 0.0

        def advance(amount: int, total: int | None = None) -> None:
            nonlocal drawn
            bar.update(task, advance=amount, total=total)
            if bar.get_time() - drawn > 0.1:  # seconds; drawing is slow beside folding
                drawn = bar.get_time()
                bar.refresh()

        yield advance


# --- the way in and out ---------------------------------------------------------------------------


class _Terminated(BaseException):
    """A signal asked the program to end; it is raised so that everything cleans up.

    Ctrl-C too: click would answer a KeyboardInterrupt with an empty line.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _terminate(number: int, _frame: object) -> NoReturn:
    for other in _SIGNALS:  # the clean-up itself is not to be interrupted
        signal.signal(other, _pass_over)
    raise _Terminated(number)


def _pass_over(_number: int, _frame: object) -> None:
    """Do nothing: of a signal that came just before it was set to SIG_IGN, Python complains."""


def _ask_again(lost: sys.UnraisableHookArgs) -> None:
    """Raise soon what Python dropped, as it does in destructors and weak references' callbacks."""
    if not isinstance(lost.exc_value, _Terminated):
        sys.__unraisablehook__(lost)
        return
    number = lost.exc_value.number
    signal.signal(signal.SIGALRM, lambda _number, frame: _terminate(number, frame))
    signal.setitimer(signal.ITIMER_REAL, 0.001)  # seconds; dropped once more, it comes once more


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    _open_standard_streams()
    # Nothing here uses BLAS, whose threads would cost memory and stand in the way of a fork.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    sys.unraisablehook = _ask_again
    try:  # around it all: a signal may come between any two steps
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, _terminate)
        code = _run(arguments)
        # All is done and said; a late signal would only garble the ending.
        for number in (*_SIGNALS, signal.SIGALRM):
            signal.signal(number, _pass_over)
    except _Terminated as ended:
        interrupted = ended.number == signal.SIGINT
        how = "interrupted" if interrupted else f"ended by {signal.Signals(ended.number).name}"
        code = _fail(f"{how}; no unfinished file is left", 128 + ended.number)
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End without taking the interpreter apart, which takes as long as averaging a small run."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or nobody reads any more
            stream.flush()
    os._exit(code)


def _open_standard_streams() -> None:
    """Open what the caller closed (``>&-``), or a file opened later would get its number."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115 (open to the end)


def _run(arguments: Sequence[str] | None) -> int:
    """Run a command and return its exit code; what is no PolyakError keeps its traceback."""
    try:
        code = cli.main(args=arguments, prog_name="polyak", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return USAGE
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        where = f"; see {context.command_path} --help" if context else ""
        return _fail(error.format_message().rstrip(".") + where, USAGE)
    except UsageError as error:
        return _fail(str(error), USAGE)
    except PolyakError as error:
        return _fail(str(error), FAILED)
    except MemoryError:
        return _fail(
            "memory ran out; use fewer --jobs or less --max-memory, or allow more (ulimit -v)",
            FAILED,
        )
    return code if isinstance(code, int) else DONE


def _check_address_space() -> None:
    """Refuse a limit under which the libraries cannot be loaded: they end in their own ways.

    Raises:
        PolyakError: with both sizes.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < _ADDRESS_SPACE:
        raise PolyakError(
            f"the address space is limited to {limit >> 10} KiB (ulimit -v), and numpy and h5py "
            f"alone take most of {_ADDRESS_SPACE >> 10} KiB; allow at least as much"
        )


def _fail(message: str, code: int) -> int:
    line = " ".join(part.strip() for part in message.splitlines())  # click lists choices in lines
    print(f"error: {line}", file=sys.stderr)
    return code
