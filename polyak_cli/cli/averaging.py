"""The commands that make and check averages: average, watch, verify.

Each command calls one tool and prints its result; it does not know how the tool works.  Heavy
packages are imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from polyak_cli.cli import rendering, serving
from polyak_cli.cli.lists import expand_lists
from polyak_cli.cli.models import keep_prints_apart, load_rows
from polyak_cli.cli.options import (
    ANSWER_IS_NO,
    ARCHITECTURE,
    AVERAGING,
    CHOOSING,
    DEVICE,
    DONE,
    ENGINE,
    HASH,
    JSON,
    MACHINE,
    ONLY_WEIGHTS,
    QUIET,
    RECALIBRATING,
    SOURCES,
    TRUST_CODE,
    WRITING,
    Command,
    Readable,
    option,
    scheme_options,
    under,
)
from polyak_cli.cli.progress import show_bytes
from polyak_cli.errors import UsageError

if TYPE_CHECKING:
    from polyak_cli.averaging.planning import Plan
    from polyak_cli.evaluation.forecast import Forecast
    from polyak_cli.pipeline.annealing import Forecaster


@click.command(
    cls=Command,
    example="polyak average ckpts/ --last 10 --scheme exp --alpha 2 -o final.h5",
    guide="tutorial",
    serves=serving.AVERAGED,
)
@SOURCES
@CHOOSING
@under(
    "Health",
    option(
        "--on-unhealthy",
        type=click.Choice(["fail", "skip"]),
        help="Run `polyak check` first, which reads the checkpoints twice, and refuse to average, "
        "or leave unhealthy checkpoints out.  [default: neither]",
    ),
)
@scheme_options
@AVERAGING
@RECALIBRATING
@WRITING
@MACHINE
@ENGINE
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
    files one by one, oldest first. For - the names of files are read from standard input.
    Each can be a URL, such as s3://bucket/run/: see polyak guide remote.
    """
    if not output and not dry_run:
        raise UsageError("--output is missing; name the file to write with -o, or use --dry-run")
    from polyak_cli import pipeline

    notes = load_rows(options)
    plan = pipeline.plan(sources, output, **options)
    if dry_run:
        rendering.print_notes([*notes, *plan.notes], quiet)
        rendering.print_result(
            plan.data(), as_json, quiet, lambda: rendering.plan_lines(plan, verbose)
        )
        return
    with (
        keep_prints_apart(options["recalibrate"]),
        show_bytes("averaging", plan.bytes_to_read, quiet or as_json) as advance,
    ):
        report = pipeline.run(plan, progress=advance)
    rendering.print_notes([*notes, *report.notes], quiet)
    rendering.print_result(
        report.data(), as_json, quiet, lambda: rendering.report_lines(report, verbose)
    )


@click.command(
    cls=Command,
    short_help="Keep the average of a run in training current.",
    example="polyak watch ckpts/ --last 10 --scheme exp -o latest.h5",
    guide="training",
    serves=serving.WATCHED,
)
@click.argument("directory", metavar="DIR", type=Readable())
@under(
    "Watching",
    option(
        "--interval",
        type=float,
        default=2.0,
        metavar="SECONDS",
        help="Time between two looks at the directory.",
    ),
    option("--once", is_flag=True, help="Bring the output up to date and exit, as for cron."),
)
@under(
    "Forecast",
    option(
        "--data",
        metavar="DATA",
        help="Score the checkpoints on these rows, and say what annealing now would give; DATA as "
        "in polyak evaluate.",
    ),
    ARCHITECTURE,
    DEVICE,
    TRUST_CODE,
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
        help="The file or folder to write, and to replace each time.",
    ),
    option("--force", is_flag=True, help="Replace an output that is no average by polyak."),
    ONLY_WEIGHTS,
    HASH,
    option("--json", "as_json", is_flag=True, help="Print each report as one line of JSON."),
    QUIET,
    option("-v", "--verbose", is_flag=True, help="Print each report in full."),
)
@MACHINE
@ENGINE
def watch(
    directory: str,
    output: str,
    interval: float,
    once: bool,
    data: str | None,
    architecture: str | None,
    device: str | None,
    trust_code: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Keep the average of a directory's checkpoints current while training writes them.

    A checkpoint counts when two looks found it unchanged and it can be read completely. Until then
    the others are averaged. Fewer than --last or --best are no error: all are averaged.
    """
    from polyak_cli.evaluation.forecast import word_forecast
    from polyak_cli.pipeline.watching import watch

    scoring = {"model": architecture, "device": device, "trust_code": trust_code}
    part = {one: options[one] for one in ("key", "use_ema")}
    foretelling = _load_forecaster(data, quiet, scoring, part)
    noted: tuple[str, ...] = ()
    for report in watch(
        directory,
        output,
        interval=interval,
        once=once,
        on_note=lambda note: rendering.print_notes([note], quiet),
        check=foretelling.check if foretelling else None,
        **options,
    ):
        rendering.print_notes([note for note in report.notes if note not in noted], quiet)
        noted = report.notes  # most are the same each time
        if not as_json and not quiet:
            whole, brief = rendering.report_lines(report, True), rendering.published_lines(report)
            rendering.print_lines(whole if verbose else brief, sys.stdout)
        found = foretelling.forecast(report.plan) if foretelling else None
        if as_json:
            own = {"forecast": found and found.data()} if foretelling else {}
            rendering.print_json_line({**report.data(), **own})
        elif found and not quiet:
            rendering.print_lines([word_forecast(found.data())], sys.stdout)


class _Foretelling:
    """Foretells the loss of an annealed run after each average, and prints notes once each."""

    def __init__(self, forecaster: Forecaster, quiet: bool) -> None:
        self._forecaster, self._quiet = forecaster, quiet
        self._said: set[str] = set()

    def check(self, plan: Plan) -> None:
        """See `Forecaster.check`."""
        from polyak_cli.evaluation.quiet import redirect_prints

        with redirect_prints():
            self._forecaster.check(plan)

    def forecast(self, plan: Plan) -> Forecast | None:
        """See `Forecaster.forecast`."""
        from polyak_cli.errors import CheckpointError, FormatError
        from polyak_cli.evaluation.forecast import explain_absence
        from polyak_cli.evaluation.quiet import redirect_prints

        try:
            with redirect_prints():
                found = self._forecaster.forecast(plan)
        except (CheckpointError, FormatError) as error:  # such as one that the trainer deleted
            rendering.print_notes([f"no forecast this time: {error}"], self._quiet)
            return None
        absent = [] if found else [f"no forecast: {explain_absence(plan.positions)}"]
        notes = [note for note in (*self._forecaster.notes, *absent) if note not in self._said]
        rendering.print_notes(notes, self._quiet)
        self._said.update(notes)
        return found


def _load_forecaster(
    data: str | None, quiet: bool, scoring: Mapping[str, Any], part: Mapping[str, Any]
) -> _Foretelling | None:
    """Return what foretells the loss of an annealed run; None if no data are given.

    Args:
        data: the rows.
        quiet: no notes are printed.
        scoring: options that belong to the data.
        part: those that choose tensors of the checkpoints, to score and to average.
    """
    if data is None:
        if any(scoring.values()):
            raise UsageError(
                "--model, --device and --trust-code belong to --data, which is missing"
            )
        return None
    from polyak_cli.evaluation import data as datasets
    from polyak_cli.evaluation.quiet import redirect_prints
    from polyak_cli.pipeline.annealing import Forecaster

    with redirect_prints():
        dataset = datasets.load(data)
        forecaster = Forecaster(dataset.split(), **scoring, **part)
    rendering.print_notes(dataset.notes, quiet)
    return _Foretelling(forecaster, quiet)


@click.command(
    cls=Command,
    short_help="Check that an average is what its record says.",
    example="polyak verify final.h5 --source ckpts/",
    guide="verifying",
    serves=serving.EVERY,
)
@click.argument("file", metavar="FILE", type=Readable())
@under(
    "Checkpoints",
    option(
        "--source",
        "sources",
        multiple=True,
        type=Readable(),
        callback=expand_lists,
        metavar="DIR",
        help="Look for them here first; may be given again; - reads names from standard input.  "
        "[default: beside FILE, and in the folders beside it]",
    ),
)
@under(
    "Output",
    JSON,
    QUIET,
)
@MACHINE
@ENGINE
def verify(file: str, sources: tuple[str, ...], as_json: bool, quiet: bool, **machine: Any) -> int:
    """Check that an average is, bit for bit, what the record in it says.

    The checkpoints that the record names are averaged again, into a hidden copy that is removed
    afterwards. Exit 1 if FILE is not verified: the tensor or the input that differs is named.
    """
    from polyak_cli.examining import verification

    found = verification.verify(file, sources=sources, **machine)
    rendering.print_notes(found.notes, quiet)
    rendering.print_result(
        found.data(), as_json, quiet, lambda: rendering.verification_lines(found)
    )
    return DONE if found.verified else ANSWER_IS_NO
