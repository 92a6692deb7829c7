"""The command sweep: its result as lines, and its winner as a command that can be pasted.

Knows the data that `sweeping.Sweep.data` returns, and how options are spelled.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from polyak_cli.cli import rendering, serving
from polyak_cli.cli.averaging import average
from polyak_cli.cli.models import load_rows
from polyak_cli.cli.options import (
    ARCHITECTURE,
    CHOOSING,
    DATA,
    DEVICE,
    FOLDER,
    JSON,
    MACHINE,
    METRIC,
    PART,
    QUIET,
    ROWS_AT_A_TIME,
    SOURCES,
    TRUST_CODE,
    Command,
    option,
    under,
)
from polyak_cli.cli.progress import show_count
from polyak_cli.cli.tables import Table, Verbatim
from polyak_cli.errors import redact, shown, word_count

if TYPE_CHECKING:
    from polyak_cli.pipeline.sweeping import Sweep

Data = Mapping[str, Any]
#: How many models are shown without --all.
MOST = 10
#: Options that do not change what is averaged, and the output, which is written last.
_LEFT_OUT = {"output", "force", "jobs", "max_memory", "engine", "scheduler"}
_LONGEST = 4000  # characters of a command that is shown


@click.command(
    cls=Command,
    short_help="Find the best average on data.",
    example="polyak sweep ckpts/ --data blobs -o report --write-best final.h5",
    guide="worth",
    serves=serving.RUN,
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
        type=click.Choice(["greedy", "coefficients", "extrapolate"]),
        multiple=True,
        help="Look for a soup too: add checkpoints while the score improves, or fit coefficients; "
        "or score what lies beyond the averages, with negative coefficients.  May be repeated.",
    ),
    option(
        "--batch",
        type=int,
        default=8,
        metavar="N",
        help="How many averages to keep on disk at once; each batch reads the checkpoints once.",
    ),
)
@under(
    "Data",
    DATA,
    option(
        "--select-on",
        default="0.5",
        metavar="SHARE|SPLIT",
        help="The share of the test rows to choose on; the rest is reported on. Or a split.",
    ),
    option("--seed", type=int, default=0, metavar="S", help="Seed that divides the rows."),
    option(
        "--recalibrate",
        metavar="DATA",
        help="Recompute BatchNorm's statistics of every average; DATA as in polyak recalibrate.",
    ),
    ROWS_AT_A_TIME,
    ARCHITECTURE,
    *PART,
    DEVICE,
    METRIC,
    TRUST_CODE,
)
@under(
    "Output",
    FOLDER,
    option(
        "--write-best", type=click.Path(), metavar="FILE", help="Write the winner as a model file."
    ),
    option("--force", is_flag=True, help="Replace an older report and model file."),
    option("--all", "show_all", is_flag=True, help="Show all models, not only the ten best."),
    option(
        "--date",
        metavar="DATE",
        help="A date for the report, like 2026-11-29.  [default: none: equal runs, equal files]",
    ),
    JSON,
    QUIET,
)
@MACHINE
def sweep(
    sources: tuple[str, ...],
    output: str,
    data: str,
    schemes: str,
    architecture: str | None,
    write_best: str | None,
    force: bool,
    show_all: bool,
    date: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Score every single checkpoint, and the average of every window by every scheme.

    The winner is chosen on one part of the test rows, and its gain is measured on the other.  DIR
    gets report.html, sweep.csv, sweep.json and the figure. For - the names of files are read from
    standard input.
    """
    from polyak_cli.evaluation import data as datasets
    from polyak_cli.evaluation import reports
    from polyak_cli.evaluation.quiet import redirect_prints
    from polyak_cli.pipeline import sweeping

    folder = Path(output)
    reports.check_date(date)
    reports.check_installed(sources, architecture)
    reports.check_folder(folder, force=force)
    recalibrated_on = options["recalibrate"]
    options["split"] = None
    notes = load_rows(options)
    with (
        redirect_prints(),
        show_count("scoring", "model", quiet or as_json) as progress,
    ):
        rows = datasets.load(data)
        best = Path(write_best) if write_best else None
        found = sweeping.sweep(
            sources,
            rows,
            chosen=schemes,
            model=architecture,
            scratch=folder.resolve().parent,
            write_best=best,
            force=force,
            progress=progress,
            **options,
        )
    data_found = found.data(
        command=click.get_current_context().meta[Command.LINE],
        winner_command=write_winner(found, recalibrated_on, best),
        date=date,
    )
    reports.write_files(data_found, folder)
    rendering.print_notes([*notes, *found.notes], quiet)
    rendering.print_result(
        data_found,
        as_json,
        quiet,
        lambda: sweep_lines(data_found, folder, best, show_all=show_all),
    )


def write_winner(found: Sweep, recalibrated_on: str | None, best: Path | None) -> str:
    """Return the command line that makes the winner of a sweep.

    Args:
        found: the result of the sweep.
        recalibrated_on: the data of --recalibrate, as they were named.
        best: the file that it was written to, if it was.
    """
    from polyak_cli.pipeline.sweeping import choose_suffix

    sources, options = found.recipe
    if options.get("recalibrate"):  # rows; the command names them
        options = {**options, "recalibrate": recalibrated_on}
    several = [sources] if isinstance(sources, (str, os.PathLike)) else sources
    # By the suffix Keras chooses the format.
    output = best or f"best{choose_suffix(found.plan)}"
    return write_command(average, several, options, output)


def write_command(
    command: click.Command, sources: Iterable[object], options: Data, output: object
) -> str:
    """Return the line of a command that writes a file, to be pasted into a shell.

    Args:
        command: its parameters say how options are spelled.
        sources: as the command takes them.
        options: parameter -> value; what is at its default is left out.
        output: the file to write.
    """
    context = click.Context(command)
    words = ["polyak", command.name or "", *map(_write_path, sources)]
    for parameter in command.params:
        value = options.get(parameter.name or "")
        if not isinstance(parameter, click.Option) or parameter.name in _LEFT_OUT:
            continue
        if value in (None, False, ()) or value == parameter.get_default(context):
            continue
        for one in value if parameter.multiple else [value]:
            words += parameter.opts[-1:] if one is True else (parameter.opts[-1], _write_value(one))
    return shlex.join([*words, "-o", _write_path(output)])


def _write_value(value: object) -> str:
    """Return the value of an option; numbers in the fewest digits that read back the same."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(_write_value, value))
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _write_path(path: object) -> str:
    text = redact(str(path))
    return f"./{text}" if text.startswith("-") else text


def sweep_lines(
    found: Data, folder: Path, best: Path | None, *, show_all: bool = False
) -> Iterator[str | Table]:
    """Yield the answer, the winner and how to make it, then its gains and the best models.

    Args:
        found: the result of `Sweep.data`.
        folder: the folder of the report.
        best: the file that the winner was written to, if it was.
        show_all: show all models and ensembles instead of the ten best models.
    """
    from polyak_cli.evaluation import forecast, reports

    yield reports.write_verdict(found)
    yield reports.write_choice(found)
    # Who keeps a single checkpoint has its file already.
    if found["winner_command"] and found["winner"]["kind"] != "single":
        is_gain = found["verdict"] in ("better", "not comparable")
        how = "Make it" if is_gain else "To make it anyway"
        yield Verbatim(f"{how}: {shown(found['winner_command'], _LONGEST)}")
    if found["forecast"]:
        yield forecast.word_forecast(found["forecast"])
    yield ""
    selection, reporting = (found["splits"][name]["rows"] for name in ("selection", "reporting"))
    if found["gains"]:
        yield f"On {reporting} rows that nothing was chosen on, with 95 % intervals:"
        header, *gains = reports.list_gains(found)
        yield Table(header, gains, spare=["p"], left=["metric", "verdict"])
        yield ""
    models = reports.list_models(found)
    rows = models if show_all else models[:MOST]
    which = "" if len(rows) == len(models) else f"The {len(rows)} best of "
    yield (
        f"{which}{word_count(len(models), 'model')}, on the {selection} rows for choosing (1) "
        f"and {reporting} others (2):"
    )
    # The newest is what everybody has without averaging, so it is shown wherever it stands.
    newest = reports.find_newest(found)
    rows = rows if newest in rows else [*rows, newest]
    ensembles = [row for row in found["rows"] if not row["rank"]] if show_all else []
    yield _list_scores(found, [*rows, *ensembles])
    for row in rows if show_all else ():
        if row["also"]:
            yield f"The same model as {shown(row['label'], 60)}: {reports.write_equals(row)}."
    yield ""
    yield f"wrote {shown(folder / 'report.html')}"
    if best:
        yield f"wrote {shown(best)}"


def _list_scores(found: Data, rows: Sequence[Data]) -> Table:
    """Return a table of what was chosen by, accuracy, loss and perplexity, where there are any."""
    from polyak_cli.evaluation import plots, reports

    pairs = [
        (metric, split)
        for split in ("selection", "reporting")
        for metric in (*plots.order_metrics(found["metric"]), "perplexity")
        if any(row["metrics"][split].get(metric) is not None for row in found["rows"])
    ]
    places, newest = {"selection": 1, "reporting": 2}, reports.find_newest(found)
    titles = [f"{metric} ({places[split]})" for metric, split in pairs]
    cells = []
    for row in rows:
        scores = [row["metrics"][split].get(metric) for metric, split in pairs]
        label = f"{shown(row['label'], 60)}{' (newest)' if row is newest else ''}"
        cells.append([label, *map(reports.format_number, scores)])
    # What the winner was not chosen by goes first.
    chosen = [f"{found['metric']} ({place})" for place in places.values()]
    spare = [title for title in reversed(titles) if title not in chosen]
    return Table(["model", *titles], cells, spare=spare)
