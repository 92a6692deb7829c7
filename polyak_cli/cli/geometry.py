"""The command that measures how checkpoints lie to one another, and its result in words.

Knows what the numbers look like, not how they are found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from polyak_cli.cli import rendering, serving
from polyak_cli.cli.names import name_tensors
from polyak_cli.cli.options import (
    ALLOW,
    CHOOSING,
    EXCLUDE_TENSORS,
    INCLUDE_TENSORS,
    JSON,
    KEY,
    MACHINE,
    MATCH,
    QUIET,
    SOURCES,
    STRIP_PREFIX,
    USE_EMA,
    Command,
    option,
    scheme_options,
    under,
)
from polyak_cli.cli.progress import show_bytes
from polyak_cli.cli.tables import Table
from polyak_cli.errors import shown, word_count, word_size

if TYPE_CHECKING:
    from polyak_cli.examining.geometry import Geometry

#: Tensors that are shown without -v.
_MOST = 5


@click.command(
    cls=Command,
    short_help="Measure how the checkpoints of a run lie.",
    example="polyak geometry ckpts/ --last 10 --plot run.html",
    guide="geometry",
    serves=serving.EVERY,
)
@SOURCES
@CHOOSING
@scheme_options
@under(
    "What is measured",
    INCLUDE_TENSORS,
    EXCLUDE_TENSORS,
    MATCH,
    USE_EMA,
    ALLOW,
    STRIP_PREFIX,
    KEY,
)
@under(
    "Output",
    option(
        "--plot",
        "plots",
        multiple=True,
        type=click.Path(),
        metavar="FILE",
        help="Draw the run as .png or .svg, or write a page, .html; may be repeated.",
    ),
    JSON,
    QUIET,
    option("-v", "--verbose", is_flag=True, help="Show every tensor, by its name in the file."),
)
@MACHINE
def geometry(
    sources: tuple[str, ...],
    plots: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **given: Any,
) -> None:
    """Measure how the checkpoints of a run lie to one another, without data.

    Every value is read once: how long the steps are and how they turn, how far the checkpoints and
    their average are apart, along how many directions they move, how many of them are independent,
    and which tensors move most. For - the names of files are read from standard input.
    """
    from pathlib import Path

    from polyak_cli.evaluation import reports
    from polyak_cli.examining import geometry

    paths = [Path(path) for path in plots]
    for path in paths:
        reports.check_picture(path)
    options: Any = given  # click has read them
    plan = geometry.plan_geometry(sources, options)
    total = geometry.count_bytes(plan)
    with show_bytes("measuring", total, quiet or as_json) as advance:
        found = geometry.measure(plan, advance)
    data = found.data()
    for path in paths:
        reports.write_picture(data, path, list(_verdict_lines(found, data)))
    rendering.print_notes(found.notes, quiet)
    rendering.print_result(data, as_json, quiet, lambda: geometry_lines(found, data, verbose))


def geometry_lines(found: Geometry, data: dict[str, Any], verbose: bool) -> Iterator[str | Table]:
    """Yield the checkpoints, then the numbers of the run, then the tensors that move most."""
    rows = []
    for one in data["checkpoints"]:
        epoch = rendering.word_epoch(one["epoch"])
        turned = "-" if one["cosine"] is None else f"{one['cosine']:+.3f}"
        lengths = [_word_length(one[key]) for key in ("to_previous", "to_newest", "to_average")]
        rows.append([shown(one["name"]), epoch, lengths[0], turned, *lengths[1:]])
    header = ("checkpoint", "epoch", "to previous", "cosine", "to newest", "to average")
    yield Table(header, rows, spare=("epoch", "to newest"))
    own = found.scheme == "custom"
    rule = "your coefficients" if own else f"scheme {rendering.word_rule(found)}"
    yield (
        f"to average: of {rule}; distances are shares of the norm of the equal average, "
        f"{found.norm:.4g}, over {found.gram.size:,} numbers"
    )
    yield "cosine: of the step that leads to the checkpoint with the step that leads away"
    yield from _run_lines(data)
    yield from _verdict_lines(found, data)
    yield _tabulate_moved(found, verbose)
    if len(found.moved) > _MOST and not verbose:
        yield f"and {word_count(len(found.moved) - _MOST, 'tensor')} more; see them with -v"
    yield f"read {word_size(found.bytes_read)} in {found.seconds:.2f} s"


def _run_lines(data: dict[str, Any]) -> Iterator[str]:
    """Yield the numbers of the run as a whole."""
    yield f"spread around the equal average: {_word_length(data['spread'])} of its squared norm"
    if data["mean_cosine"] is not None:
        yield f"mean cosine of each step with the next: {data['mean_cosine']:+.3f}"
    if any(data["components"]):
        first, second = data["components"][:2]
        yield f"along one direction: {first:.0%} of the spread; along the next: {second:.0%}"
    counts = data["effective_number"]
    plain = f"effective number of checkpoints: {counts['independent']:.2f} if they were independent"
    if counts["correlated"] is None:
        yield plain
    else:
        yield (
            f"{plain}, {counts['correlated']:.2f} as they are (neighbours correlate by "
            f"{counts['correlation']:+.2f})"
        )


def _verdict_lines(found: Geometry, data: dict[str, Any]) -> Iterator[str]:
    """Yield how the run moves, and which of its windows scatter most."""
    from polyak_cli.examining import verdict

    if found.movement:
        which = "by the newest ten, " if len(found.checkpoints) > verdict.WINDOW else ""
        yield f"{which}{verdict.word_movement(found.movement)}"
    if len(data["windows"]) > 1:
        ranked = [
            f"{shown(one['oldest'])} to {shown(one['newest'])} ({one['jitter']:.1e})"
            for one in data["windows"][:_MOST]
        ]
        listed = ", ".join(ranked)
        yield f"windows of ten that scatter most, by jitter of the median tensor: {listed}"


def _tabulate_moved(found: Geometry, verbose: bool) -> Table:
    """Return the tensors that move most."""
    moved: Sequence[Any] = found.moved if verbose else found.moved[:_MOST]
    names = name_tensors(one.name for one in found.moved)
    rows = [
        [
            shown((one.name if verbose else names[one.name]) or "all tensors"),
            f"{one.share:.1%}",
            _word_length(one.relative),
            "-" if one.cosine is None else f"{one.cosine:+.3f}",
            f"{one.elements:,}",
        ]
        for one in moved
    ]
    header = ("moves most", "share of spread", "relative", "cosine", "numbers")
    return Table(header, rows, spare=("numbers", "cosine"))


def _word_length(length: float | None) -> str:
    return "-" if length is None else f"{length:.3e}"
