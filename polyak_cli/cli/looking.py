"""The commands that look at checkpoints without a model: inspect, diff, check.

Each command calls one tool and prints its result; it does not know how the tool works.  Heavy
packages are imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from polyak_cli.cli import rendering, serving
from polyak_cli.cli.lists import expand_lists
from polyak_cli.cli.options import (
    ALLOW,
    ANSWER_IS_NO,
    DONE,
    EPOCH_PATTERN,
    EXCLUDE,
    FROM,
    JSON,
    LAST,
    MATCH,
    ORDER,
    QUIET,
    SOURCES,
    STRIP_PREFIX,
    TO,
    Command,
    Readable,
    Size,
    Writable,
    option,
    under,
)
from polyak_cli.errors import UsageError, shown


@click.command(
    cls=Command,
    short_help="Show what is inside checkpoints.",
    example="polyak inspect final.h5 --stats",
    guide="formats",
    serves=serving.EVERY,
)
@click.argument(
    "files",
    nargs=-1,
    required=True,
    metavar="FILE...",
    type=Readable(),
    callback=expand_lists,
)
@under(
    "Output",
    option(
        "--stats",
        is_flag=True,
        help="Read every value: norm, minimum, maximum, and how many are not finite.",
    ),
    JSON,
    option(
        "-v",
        "--verbose",
        is_flag=True,
        help="Show each tensor's name in the file, which --include-tensors takes, where its "
        "values lie, and what `polyak average` does with it by default.",
    ),
)
def inspect(files: tuple[str, ...], stats: bool, as_json: bool, verbose: bool) -> None:
    """Show format, version, provenance and the table of tensors of each checkpoint.

    For - the names of files are read from standard input.
    """
    from polyak_cli.examining import inspection

    found = list(inspection.inspect([Path(file) for file in files], statistics=stats))
    data = {"checkpoints": [one.data() for one in found]}
    rendering.print_result(
        data,
        as_json,
        False,
        lambda: (line for one in found for line in rendering.inside_lines(one, verbose)),
    )


@click.command(
    cls=Command,
    short_help="Show how far checkpoints are apart.",
    example="polyak diff ckpts/model_09.h5 ckpts/model_10.h5 --rtol 1e-3",
    guide="checking",
    serves=serving.EVERY,
)
@click.argument(
    "sources",
    nargs=-1,
    required=True,
    metavar="A B | DIR",
    type=Readable(),
    callback=expand_lists,
)
@under(
    "Two files",
    option("--rtol", type=float, metavar="R", help="Equal within R times A.  [default: 0]"),
    option("--atol", type=float, metavar="T", help="Equal within T.  [default: 0]"),
)
@under(
    "A run",
    LAST,
    EXCLUDE,
    EPOCH_PATTERN,
    ORDER,
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
    option(
        "-v",
        "--verbose",
        is_flag=True,
        help="Show every tensor, not only the worst, by its name in the file.",
    ),
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
    tensor, the worst first; exit 0 if all are equal within the tolerances, else 1.

    DIR is a directory, a glob, or three files or more: the distance from each checkpoint to the
    next, and of each to the average of all, which shows the outlier. For - the names of files are
    read from standard input.
    """
    given = [f"--{name}" for name, value in of_a_run.items() if value]
    from polyak_cli.checkpoints import find_file

    if len(sources) == 2 and all(find_file(Path(source)).is_file() for source in sources):
        if given:
            raise UsageError(f"{given[0]} belongs to a run, not to two files")
        return _diff_files(sources, rtol or 0.0, atol or 0.0, as_json, quiet, verbose)
    if rtol is not None or atol is not None:
        raise UsageError("--rtol and --atol belong to two files, not to a run")
    return _diff_run(sources, of_a_run, as_json, quiet)


def _diff_files(
    sources: Sequence[str], rtol: float, atol: float, as_json: bool, quiet: bool, verbose: bool
) -> int:
    from polyak_cli.examining import differences

    one, other = map(Path, sources)
    found = differences.diff(one, other, rtol=rtol, atol=atol)
    rendering.print_result(
        found.data(), as_json, quiet, lambda: rendering.difference_lines(found, verbose)
    )
    return DONE if found.equal else ANSWER_IS_NO


def _diff_run(
    sources: Sequence[str], options: Mapping[str, Any], as_json: bool, quiet: bool
) -> int:
    from polyak_cli import checkpoints, formats
    from polyak_cli.examining import differences

    plot = options["plot"]
    if plot:
        from polyak_cli.evaluation import plots

        plots.check_path(Path(plot))
    selection = checkpoints.select(
        sources,
        last=options["last"],
        exclude=options["exclude"],
        epoch_pattern=options["epoch_pattern"],
        order=options["order"],
        find_polyak_outputs=formats.find_polyak_outputs,
    )
    found = differences.distances(selection, by=options["match"] or "name")
    if plot:
        plots.draw_distances(
            [_choose_label(row.path, row.epoch) for row in found.checkpoints],
            [row.to_previous for row in found.checkpoints],
            [row.to_average for row in found.checkpoints],
            Path(plot),
        )
    rendering.print_result(found.data(), as_json, quiet, lambda: rendering.distance_lines(found))
    return DONE


def _choose_label(path: Path, epoch: int | None) -> str:
    return shown(path.stem, 20) if epoch is None else str(epoch)


@click.command(
    cls=Command,
    short_help="Find problems of checkpoints.",
    example="polyak check ckpts/ --last 10",
    guide="checking",
    serves=serving.EVERY,
)
@SOURCES
@under("Choosing checkpoints", LAST, FROM, TO, EXCLUDE, EPOCH_PATTERN, ORDER)
@under("What belongs together", MATCH, STRIP_PREFIX, ALLOW)
@under(
    "Output",
    JSON,
    QUIET,
    option("-v", "--verbose", is_flag=True, help="List every file that was passed over."),
)
@under(
    "Machine",
    option(
        "--max-memory",
        type=Size(),
        help="Bound on the buffers, on top of Python and its libraries.  [default: 16MiB]",
    ),
)
def check(
    sources: tuple[str, ...], as_json: bool, quiet: bool, verbose: bool, **options: Any
) -> int:
    """Find problems of a run and its checkpoints; exit 1 if there are any.

    Files that cannot be read, NaN and infinity, a checkpoint equal to the one before, an epoch
    twice or missing, two runs or two models in one place, an outlier, and a run that was resumed
    from an earlier epoch. Every value is read once. For - the names of files are read from standard
    input.
    """
    from polyak_cli.examining import health

    found = health.check(sources, **options)
    rendering.print_notes(found.notes, quiet)
    rendering.print_result(
        found.data(), as_json, quiet, lambda: rendering.health_lines(found, verbose)
    )
    return DONE if found.healthy else ANSWER_IS_NO


@click.command(
    cls=Command,
    short_help="List unfinished uploads, and abort them.",
    example="polyak uploads s3://bucket/runs/ --abort",
    guide="remote",
    serves=serving.NONE,
)
@click.argument("url", metavar="URL", type=Writable())
@under(
    "Aborting",
    option("--abort", is_flag=True, help="Delete the uploads of runs that are dead."),
    option(
        "--idle",
        type=float,
        metavar="MINUTES",
        help="A run is dead after so long without a sign of life.  [default: 15 on S3, else a day]",
    ),
)
@under("Output", JSON, QUIET)
def uploads(url: str, abort: bool, idle: float | None, as_json: bool, quiet: bool) -> None:
    """List what runs of polyak left unfinished below a URL: s3://, gs:// or az://.

    An upload that was neither completed nor aborted is invisible, and costs storage. polyak aborts
    its own, unless it was killed together with its helper or lost the network. Uploads of other
    programs are not listed and never aborted.
    """
    from polyak_cli.examining import unfinished

    found = unfinished.uploads(url, abort=abort, idle_minutes=idle)
    data = {"uploads": [one.data() for one in found]}
    rendering.print_result(data, as_json, quiet, lambda: rendering.upload_lines(found))
