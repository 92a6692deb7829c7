"""Writes the guide's page of commands: `python -m tests.commands_page`.

The page is made of the help texts alone, so that it says what the program says.
"""

from __future__ import annotations

import click

from polyak_cli.cli import cli
from tests.command import ROOT

PAGE = ROOT / "polyak_cli/guide/commands.md"
#: Columns of a terminal that is narrow, and nevertheless usual.
_WIDTH = 80
_HEAD = """\
# Commands

The help of every command, as `polyak help COMMAND` prints it. `polyak COMMAND -h` does the same.
This page is written by `python -m tests.commands_page`.
"""


def _help(command: click.Command, name: str, parent: click.Context | None = None) -> str:
    """Return the help text of a command on a terminal of 80 columns."""
    settings = {**command.context_settings, "terminal_width": _WIDTH}
    with click.Context(command, info_name=name, parent=parent, **settings) as context:
        return command.get_help(context)


def make_page() -> str:
    """Return the page: the help of the program, then that of each command by name."""
    parts = [_HEAD, f"```text\n{_help(cli, 'polyak')}\n```\n"]
    root = click.Context(cli, info_name="polyak", **cli.context_settings)
    for name, command in sorted(cli.commands.items()):
        parts.append(f"## polyak {name}\n\n```text\n{_help(command, name, root)}\n```\n")
    lines = "\n".join(parts).splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
