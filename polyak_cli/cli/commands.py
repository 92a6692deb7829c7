"""The commands: argv to a tool's call, and its result to lines and an exit code.

Heavy packages are imported inside the commands that need them, so that ``--help`` is quick.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from polyak_cli import __version__
from polyak_cli.cli import rendering
from polyak_cli.cli.options import (
    AVERAGING,
    CHOOSING,
    DATA,
    EPOCH_PATTERN,
    EXAMPLE,
    EXCLUDE,
    FOLDER,
    FROM,
    HASH,
    JSON,
    LAST,
    MACHINE,
    MATCH,
    QUIET,
    RECALIBRATING,
    ROWS_AT_A_TIME,
    SOURCES,
    TO,
    TRUST_CODE,
    WRITING,
    Command,
    Gate,
    Size,
    option,
    scheme_options,
    under,
)
from polyak_cli.errors import PolyakError, UsageError, shown

if TYPE_CHECKING:
    from pathlib import Path

    from polyak_cli.comparison import Comparison
    from polyak_cli.data import Split
    from polyak_cli.models import Score

#: Exit codes; besides these, 3 for what failed and 2 for wrong usage: see `polyak_cli.cli`.
DONE, ANSWER_IS_NO = 0, 1
#: Bytes of address space without which numpy and h5py cannot be relied on to load and work.
_ADDRESS_SPACE = 160 << 20


@click.group(
    context_settings={"max_content_width": 100},
    epilog=EXAMPLE.format("polyak average ckpts/ --last 10 -o final.h5"),
)
@click.version_option(__version__, "-V", "--version", prog_name="polyak")
def cli() -> None:
    """Average the checkpoints of a training run into one better-behaved model."""
    _check_address_space()


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


@cli.command(
    cls=Command, example="polyak average ckpts/ --last 10 --scheme exp --alpha 2 -o final.h5"
)
@SOURCES
@CHOOSING
@under(
    "Health",
    option(
        "--on-unhealthy",
        type=click.Choice(["fail", "skip"]),
        help="Look for what `polyak check` finds first, at the price of a second reading, and "
        "refuse to average, or leave unhealthy checkpoints out.  [default: neither]",
    ),
)
@scheme_options
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
    from polyak_cli import pipeline
    from polyak_cli.averaging import planning

    notes = _load_rows(options)
    plan = planning.plan(sources, output, **options)
    if dry_run:
        rendering.notes([*notes, *plan.notes], quiet)
        rendering.result(plan.data(), as_json, quiet, lambda: rendering.plan_lines(plan, verbose))
        return
    with (
        _apart(options["recalibrate"]),
        rendering.progress("averaging", plan.bytes_to_read, quiet or as_json) as advance,
    ):
        report = pipeline.run(plan, progress=advance)
    rendering.notes([*notes, *report.notes], quiet)
    rendering.result(report.data(), as_json, quiet, lambda: rendering.report_lines(report, verbose))


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
@under(
    "Watching",
    option(
        "--interval",
        type=float,
        default=2.0,
        metavar="SECONDS",
        help="Between two looks at the directory.",
    ),
    option("--once", is_flag=True, help="Bring the output up to date and end, as from cron."),
)
@CHOOSING
@scheme_options
@AVERAGING
@under(
    "Output",
    option(
        "-o",
        "--output",
        type=click.Path(),
        required=True,
        metavar="FILE",
        help="The file to write, and to replace each time.",
    ),
    option("--force", is_flag=True, help="Replace an output that is no average by polyak."),
    HASH,
    option("--json", "as_json", is_flag=True, help="Print each report as one line of JSON."),
    QUIET,
    option("-v", "--verbose", is_flag=True, help="Print each report in full."),
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
        told=lambda note: rendering.notes([note], quiet),
        **options,
    ):
        rendering.notes([note for note in report.notes if note not in noted], quiet)
        noted = report.notes  # most are the same each time
        if as_json:
            rendering.json_line(report.data())
        elif not quiet:
            rendering.print_lines(
                rendering.report_lines(report, True)
                if verbose
                else rendering.published_lines(report),
                sys.stdout,
            )


@cli.command(
    cls=Command,
    short_help="Score model files on data.",
    example="polyak evaluate final.h5 --data blobs --fail-under accuracy=0.8",
)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...", type=click.Path())
@under(
    "Data",
    DATA,
    option(
        "--split",
        type=click.Choice(["train", "test"]),
        help="Which part of the data.  [default: test, where the data are split]",
    ),
    ROWS_AT_A_TIME,
)
@under(
    "Deciding",
    option(
        "--fail-under",
        type=Gate(),
        multiple=True,
        help="Exit with 1 when any model's metric is less, or its loss or metric is not finite; "
        "may be given again.",
    ),
    option(
        "--baseline",
        type=click.Path(),
        metavar="MODEL",
        help="Compare every model with this one, row by row: differences with 95 % intervals.",
    ),
    option(
        "--fail-if-worse",
        is_flag=True,
        help="Exit with 1 when any model is worse than the baseline beyond noise, in accuracy or, "
        "where there is none, in loss.",
    ),
    TRUST_CODE,
)
@under(
    "Output",
    JSON,
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
    rendering.notes(
        [*map(rendering.passed_over, passed_over), *dataset.notes, *_about(scores, compared)], quiet
    )
    found = {
        "data": data,
        "rows": rows.rows,
        **rendering.models_data(scores, compared),
        "passed_over": [{"path": str(one.path), "reason": one.reason} for one in passed_over],
        "failures": failures,
    }
    rendering.result(found, as_json, quiet, lambda: rendering.evaluation_lines(scores, compared))
    rendering.print_lines((f"failed: {line}" for line in failures), sys.stderr)
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
@under(
    "Data",
    DATA,
    option(
        "--split",
        type=click.Choice(["train", "test"]),
        help="Which part of the data.  [default: train, where the data are split]",
    ),
    option(
        "--batch-size",
        type=int,
        default=256,
        metavar="N",
        help="Rows at a time, at most; best that of training, and not small.",
    ),
    TRUST_CODE,
)
@under(
    "Output",
    option(
        "-o", "--output", type=click.Path(), required=True, metavar="FILE", help="What to write."
    ),
    option("--force", is_flag=True, help="Replace an existing output."),
    JSON,
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
    rendering.notes([*dataset.notes, *report.notes], quiet)
    rendering.result(report.data(), as_json, quiet, lambda: rendering.recalibration_lines(report))


@cli.command(
    cls=Command,
    short_help="See that an average is what its record says.",
    example="polyak verify final.h5 --source ckpts/",
)
@click.argument("file", metavar="FILE", type=click.Path())
@under(
    "Checkpoints",
    option(
        "--source",
        "sources",
        multiple=True,
        type=click.Path(),
        metavar="DIR",
        help="Look for them here first; may be given again.  [default: beside FILE, and in the "
        "folders beside it]",
    ),
)
@under(
    "Output",
    JSON,
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
    from polyak_cli.examining import verification

    found = verification.verify(file, sources=sources, **machine)
    rendering.notes(found.notes, quiet)
    rendering.result(found.data(), as_json, quiet, lambda: rendering.verification_lines(found))
    return DONE if found.verified else ANSWER_IS_NO


@cli.command(
    cls=Command,
    short_help="Show what is inside checkpoints.",
    example="polyak inspect final.h5 --stats",
)
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path())
@under(
    "Output",
    option(
        "--stats",
        is_flag=True,
        help="Read every value: norm, least, greatest, and how many are not finite.",
    ),
    JSON,
)
def inspect(files: tuple[str, ...], stats: bool, as_json: bool) -> None:
    """Show format, version, provenance and the table of tensors of each checkpoint.

    The fate of a tensor is what averaging does with it unless told otherwise.
    """
    from pathlib import Path

    from polyak_cli.examining import inspection

    found = list(inspection.inspect([Path(file) for file in files], statistics=stats))
    data = {"checkpoints": [one.data() for one in found]}
    rendering.result(
        data,
        as_json,
        False,
        lambda: (line for one in found for line in rendering.inside_lines(one)),
    )


@cli.command(
    cls=Command,
    short_help="Show how far checkpoints are apart.",
    example="polyak diff ckpts/model_09.h5 ckpts/model_10.h5 --rtol 1e-3",
)
@click.argument("sources", nargs=-1, required=True, metavar="A B | DIR", type=click.Path())
@under(
    "Two files",
    option("--rtol", type=float, metavar="R", help="Equal within R times A.  [default: 0]"),
    option("--atol", type=float, metavar="T", help="Equal within T.  [default: 0]"),
)
@under(
    "A run",
    LAST,
    EXCLUDE,
    option(
        "--match",
        type=click.Choice(["name", "order"]),
        help="How tensors are paired.  [default: name]",
    ),
    option("--plot", type=click.Path(), metavar="FILE", help="Draw the distances as .png or .svg."),
)
@under(
    "Output",
    JSON,
    QUIET,
    option("-v", "--verbose", is_flag=True, help="Show every tensor, not only the worst."),
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

    from polyak_cli.examining import differences

    one, other = map(Path, sources)
    found = differences.diff(one, other, rtol=rtol, atol=atol)
    rendering.result(
        found.data(), as_json, quiet, lambda: rendering.difference_lines(found, verbose)
    )
    return DONE if found.equal else ANSWER_IS_NO


def _diff_run(
    sources: Sequence[str], options: Mapping[str, Any], as_json: bool, quiet: bool
) -> int:
    from pathlib import Path

    from polyak_cli import checkpoints, formats
    from polyak_cli.examining import differences

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
    rendering.result(found.data(), as_json, quiet, lambda: rendering.distance_lines(found))
    return DONE


def _label(path: Path, epoch: int | None) -> str:
    return shown(path.stem, 20) if epoch is None else str(epoch)


@cli.command(
    cls=Command,
    short_help="Find what is wrong with checkpoints.",
    example="polyak check ckpts/ --last 10",
)
@SOURCES
@under("Choosing checkpoints", LAST, FROM, TO, EXCLUDE, EPOCH_PATTERN, MATCH)
@under(
    "Output",
    JSON,
    QUIET,
)
@under(
    "Machine",
    option(
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
    from polyak_cli.examining import health

    found = health.check(sources, **options)
    rendering.notes(found.notes, quiet)
    rendering.result(found.data(), as_json, quiet, lambda: rendering.health_lines(found))
    return DONE if found.healthy else ANSWER_IS_NO


@cli.command(
    cls=Command,
    short_help="Find the best average on data.",
    example="polyak sweep ckpts/ --data blobs -o report --write-best final.h5",
)
@SOURCES
@CHOOSING
@under(
    "Candidates",
    option(
        "--windows",
        metavar="LIST",
        help="How many of the newest count, like 1-10,20.  [default: all there are]",
    ),
    option(
        "--schemes",
        metavar="LIST",
        default="equal,linear,exp:1,exp:2,exp:5,ema:0.9,power:0.1",
        help="Schemes, each with its parameter.",
    ),
    option(
        "--search",
        type=click.Choice(["greedy", "coefficients"]),
        multiple=True,
        help="Look for a soup too: add checkpoints while the score improves, or fit coefficients.",
    ),
    option(
        "--batch",
        type=int,
        default=8,
        metavar="N",
        help="Averages that lie on the disk at a time; each batch reads the checkpoints once.",
    ),
)
@under(
    "Data",
    DATA,
    option(
        "--select-on",
        default="0.5",
        metavar="SHARE|SPLIT",
        help="The share of the test rows to choose on, the rest being reported on; or a split.",
    ),
    option("--seed", type=int, default=0, metavar="S", help="Of the division of the rows."),
    option(
        "--recalibrate",
        metavar="DATA",
        help="Gather BatchNorm's statistics of every average anew; DATA as in polyak recalibrate.",
    ),
    ROWS_AT_A_TIME,
    TRUST_CODE,
)
@under(
    "Output",
    FOLDER,
    option(
        "--write-best", type=click.Path(), metavar="FILE", help="Write the winner as a model file."
    ),
    option("--force", is_flag=True, help="Replace an older report and model file."),
    JSON,
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
        rendering.progress("scoring", None, quiet or as_json, in_bytes=False) as advance,
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
    rendering.notes([*notes, *found.notes], quiet)
    rendering.result(
        data_found, as_json, quiet, lambda: rendering.sweep_lines(data_found, folder, best)
    )


@cli.command(
    cls=Command,
    short_help="Train the sample network.",
    example="polyak train --data blobs -o ckpts --epochs 500 --keep 10",
)
@under(
    "Training",
    option(
        "--data",
        type=click.Choice(["blobs"]),
        default="blobs",
        help="1,100 points in three overlapping clouds, of which 100 are for training.",
    ),
    option("--epochs", type=int, default=500, metavar="N", help="How many epochs."),
    option("--seed", type=int, default=0, metavar="S", help="Of the initial weights and order."),
    option("--optimizer", type=click.Choice(["sgd", "adam"]), default="sgd", help="Which."),
    option(
        "--learning-rate",
        type=float,
        metavar="RATE",
        help="Of the optimizer.  [default: 0.01 for sgd, 0.001 for adam]",
    ),
)
@under(
    "Output",
    FOLDER,
    option("--keep", type=int, default=10, metavar="N", help="Keep the last N checkpoints."),
    option(
        "--plot",
        type=click.Path(),
        metavar="FILE",
        help="Draw the learning curves as .png or .svg.",
    ),
    option("--force", is_flag=True, help="Replace an earlier run in the folder."),
    JSON,
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
    with rendering.progress("training", epochs, quiet or as_json, in_bytes=False) as advance:
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
    rendering.result(made, as_json, quiet, lambda: rendering.training_lines(made))


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
    rendering.print_lines([kind(cli, {}, "polyak", "_POLYAK_COMPLETE").source()], sys.stdout)
