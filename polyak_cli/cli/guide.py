"""The commands `guide`, `help` and `completion`: a page, the help of a command, a shell's script.

Knows where the pages are and how they are shown.  Their order, kinds and summaries are those of
``polyak_cli/guide/index.md``, the only place that lists them.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import click

from polyak_cli.cli import rendering, serving
from polyak_cli.cli.options import Command
from polyak_cli.errors import UsageError, shown

#: The folder of the pages, in a clone and in an installed package.
PAGES = Path(__file__).parents[1] / "guide"
#: The page that lists the others.
INDEX = "index"
#: Columns of a page on a wide terminal: longer lines are harder to read.
_WIDEST = 100
_HEADING = re.compile(r"## (.+)")
_ENTRY = re.compile(r"\* \[(.+?)\]\(([\w-]+)\.md\): (.+)")
#: A link from one page to another.
_LINK = re.compile(r"\[([^\]]+)\]\(([\w-]+)\.md(?:#[\w-]*)?\)")


class Entry(NamedTuple):
    """A page of the guide, as the index lists it."""

    kind: str  # the heading above it: Tutorial, How-to, Reference, Explanation
    topic: str  # the file's name without suffix, which is the argument of `polyak guide`
    title: str
    summary: str


def list_pages() -> list[Entry]:
    """Return the pages in the order of the index."""
    entries = []
    kind = ""
    for line in (PAGES / f"{INDEX}.md").read_text(encoding="utf-8").splitlines():
        if heading := _HEADING.fullmatch(line):
            kind = heading[1]
        elif entry := _ENTRY.fullmatch(line):
            title, topic, summary = entry.groups()
            entries.append(Entry(kind, topic, title, summary))
    return entries


@click.command(
    cls=Command,
    short_help="Show a page of the guide.",
    example="polyak guide tutorial",
    guide=INDEX,
    serves=serving.NONE,
)
@click.argument("topic", required=False)
def guide(topic: str | None) -> None:
    """Show a page of the guide, or without TOPIC the list of pages.

    TOPIC is the name of a page, or of a command, whose page is then shown. On a terminal the page
    is formatted, and opened in a pager ($PAGER) if it is longer than the screen. In a pipe it is
    plain Markdown.
    """
    if topic is None:
        rendering.print_text("\n".join(_list_topics()), sys.stdout)
        return
    text = (PAGES / f"{_find_page(topic)}.md").read_text(encoding="utf-8").rstrip()
    if sys.stdout.isatty() and _can_draw():
        _show_page(text)
    else:
        rendering.print_text(text, sys.stdout)


@click.command(
    "help",
    cls=Command,
    short_help="Show the help of a command.",
    example="polyak help average",
    guide="commands",
    serves=serving.NONE,
)
@click.argument("name", required=False, metavar="[COMMAND]")
@click.pass_context
def show_help(context: click.Context, name: str | None) -> None:
    """Show the help of a command, like `polyak COMMAND --help`; without COMMAND, list all."""
    root = context.find_root()
    if name is None:
        rendering.print_text(root.get_help(), sys.stdout)
        return
    commands = _list_commands(root)
    if name not in commands:
        raise UsageError(
            f"there is no command {shown(name)}{_word_nearest(name, commands)} "
            "polyak help lists the commands"
        )
    command = commands[name]
    # A context of its own, so that the usage line names the command.
    with click.Context(command, info_name=name, parent=root, **command.context_settings) as inner:
        rendering.print_text(command.get_help(inner), sys.stdout)


@click.command(
    cls=Command,
    short_help="Print a shell's completion script.",
    example='eval "$(polyak completion bash)"',
    guide="commands",
    serves=serving.NONE,
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that makes a shell complete polyak's commands and options."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    if kind is None:
        raise UsageError(f"there is no completion for {shell}")
    group = click.get_current_context().find_root().command
    rendering.print_text(kind(group, {}, "polyak", "_POLYAK_COMPLETE").source(), sys.stdout)


def _list_commands(root: click.Context) -> dict[str, click.Command]:
    """Return the commands of the program by name."""
    return {**root.command.commands} if isinstance(root.command, click.Group) else {}


def _list_topics() -> Iterator[str]:
    """Yield the lines that list the pages: kind, then topic and summary."""
    entries = list_pages()
    width = max(len(entry.topic) for entry in entries)
    kind = None
    for entry in entries:
        if entry.kind != kind:
            yield entry.kind if kind is None else f"\n{entry.kind}"
            kind = entry.kind
        yield f"  {entry.topic:{width}}  {entry.summary.replace('`', '')}"
    yield "\nShow a page: polyak guide TOPIC"


def _find_page(topic: str) -> str:
    """Return the page of a topic or of a command.

    Raises:
        UsageError: there is none; it names the nearest.
    """
    name = topic.lower().removesuffix(".md")
    topics = [INDEX, *(entry.topic for entry in list_pages())]
    if name in topics:
        return name
    command = _list_commands(click.get_current_context().find_root()).get(name)
    if isinstance(command, Command):
        return command.guide
    raise UsageError(
        f"the guide has no page {shown(topic)}{_word_nearest(name, topics)} "
        "polyak guide lists the pages"
    )


def _word_nearest(name: str, names: Iterable[str]) -> str:
    """Return a semicolon, with a question for the most similar name where one is similar."""
    import difflib  # only a mistaken name needs it

    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ";"


def _can_draw() -> bool:
    """Return whether the terminal has what a formatted page needs: styles, and bullets."""
    can_encode = sys.stdout.encoding.lower().startswith("utf")
    return can_encode and os.environ.get("TERM", "dumb") != "dumb"


def _show_page(text: str) -> None:
    """Show a page on the terminal, in a pager where it is longer than the screen."""
    columns, rows = shutil.get_terminal_size()
    drawn = _draw(text, min(columns, _WIDEST))
    if drawn.count("\n") < rows:
        rendering.print_text(drawn.rstrip("\n"), sys.stdout)
        return
    with _ignore_interrupts():
        click.echo_via_pager(drawn, color=True)


def _draw(text: str, width: int) -> str:
    """Return a page as a terminal shows it, with the colours that the terminal allows."""
    from rich.console import Console
    from rich.markdown import Markdown

    # A terminal cannot follow a link to a file; the command that shows the page can be typed.
    linked = _LINK.sub(r"\1 (`polyak guide \2`)", text)
    console = Console(file=sys.stdout, width=width)
    with console.capture() as captured:
        console.print(Markdown(linked, code_theme="ansi_dark", hyperlinks=False))
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


@contextmanager
def _ignore_interrupts() -> Iterator[None]:
    """Leave Ctrl-C to the pager: if this program ended first, the terminal would stay in disorder.

    A handler is not inherited by the pager, as SIG_IGN would be.
    """
    before = signal.signal(signal.SIGINT, lambda _number, _frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
