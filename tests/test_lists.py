"""Lists of files on standard input, and that nothing but the command line says what is averaged."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from polyak_cli.cli import cli
from polyak_cli.cli.lists import expand_lists
from polyak_cli.errors import CheckpointError, PolyakError, UsageError
from tests.command import POLYAK, SAMPLES, environment, one_line, polyak

NEWEST = sorted(SAMPLES.glob("*.h5"))[-3:]
#: Command -> the parameter that takes a list.
TAKE_LISTS = {
    "average": "sources",
    "check": "sources",
    "diff": "sources",
    "evaluate": "models",
    "inspect": "files",
    "sweep": "sources",
    "verify": "sources",
}
Expand = Callable[..., tuple[str, ...]]


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def expand(monkeypatch: pytest.MonkeyPatch) -> Expand:
    """Return a function that expands the names of a command, with bytes on standard input."""

    def run(content: bytes, names: Sequence[str] = ("-",)) -> tuple[str, ...]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        command = cli.commands["check"]
        return expand_lists(click.Context(command), command.params[0], tuple(names))

    return run


# --- what a list is -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"a.h5\nb.h5\n", ("a.h5", "b.h5")),
        (b"a.h5\nb.h5", ("a.h5", "b.h5")),  # the last newline may be missing
        (b"\na.h5\n\nb.h5\n\n", ("a.h5", "b.h5")),
        (b"a.h5\0b.h5\0", ("a.h5", "b.h5")),
        (b"a\nb.h5\0c.h5", ("a\nb.h5", "c.h5")),  # as `find -print0` writes it
        (b" a b.h5 \n", (" a b.h5 ",)),
        (b"'a.h5'\n-o\n-\n--force\n", ("'a.h5'", "-o", "-", "--force")),
        (b"\xff.h5\n", ("\udcff.h5",)),  # bytes that are not UTF-8, as Python writes them
        ("größe.h5\n".encode(), (os.fsdecode("größe.h5".encode()),)),
    ],
)
def test_a_list_is_split_and_otherwise_left_alone(
    content: bytes, names: tuple[str, ...], expand: Expand
) -> None:
    """Names are separated by NUL where there is one, else by newlines; nothing else is special."""
    assert expand(content) == names


def test_a_list_takes_the_place_of_its_dash(expand: Expand) -> None:
    """Names before and after `-` stay before and after those of the list."""
    assert expand(b"b\nc\n", ["a", "-", "./-"]) == ("a", "b", "c", "./-")


def test_standard_input_is_left_alone_without_a_dash(
    expand: Expand,
) -> None:
    """What nobody asked for is not read."""
    assert expand(b"b\n", ["a"]) == ("a",)
    assert sys.stdin.buffer.read() == b"b\n"


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (b"", CheckpointError, "names no file; expected one name a line"),
        (b"\n\n", CheckpointError, "names no file"),
        (b"\0\0", CheckpointError, "names no file"),
        (b"a\n" + b"x" * 4097, CheckpointError, "line 2 has 4,097 bytes; expected names of files"),
        (b"a\0" + b"x" * 9999, CheckpointError, "entry 2 has 9,999 bytes"),
        (b"*.h5\n", CheckpointError, "line 1 is *.h5, and there is no such file; a list holds"),
        (b"a[1].h5\0", CheckpointError, "entry 1 is a[1].h5, and there is no such file"),
        (b"\x1b[31m?\n", CheckpointError, r"line 1 is \x1b[31m?, and"),
        (b"x" * 64_000_001, CheckpointError, "longer than 64 MB; expected names of files"),
    ],
    ids=range(9),
)
def test_a_list_that_is_none_is_refused(
    content: bytes, error: type[PolyakError], words: str, expand: Expand
) -> None:
    """The error says what was found, in which line, and what was expected."""
    with pytest.raises(error) as caught:
        expand(content)
    assert words in str(caught.value)
    assert str(caught.value).isprintable()


def test_two_dashes_are_refused(expand: Expand) -> None:
    """Standard input is read once, so that a second `-` would be an empty list."""
    with pytest.raises(UsageError, match="- is given twice"):
        expand(b"a\n", ["-", "-"])


def test_a_name_that_looks_like_a_pattern_is_a_name_where_the_file_exists(
    tmp_path: Path, expand: Expand
) -> None:
    """A list holds names, whatever characters are in them."""
    odd = tmp_path / "a[1]*.h5"
    odd.touch()
    assert expand(os.fsencode(odd)) == (str(odd),)


@pytest.mark.parametrize("name", sorted(TAKE_LISTS))
def test_every_command_that_takes_files_takes_a_list(name: str) -> None:
    """The parameter expands `-`, and the help says so."""
    (parameter,) = (one for one in cli.commands[name].params if one.name == TAKE_LISTS[name])
    assert parameter.callback is expand_lists
    # By the command line: a command keeps its help option from the first context that asks for it.
    help_text = CliRunner().invoke(cli, [name, "--help"]).output
    assert "from standard input" in " ".join(help_text.split())


# --- lists of the commands ------------------------------------------------------------------------


def test_an_average_of_a_list_is_that_of_the_files(tmp_path: Path) -> None:
    """A list, NUL-separated or not, makes the bytes that the names on the command line make."""
    names = list(map(str, NEWEST))
    done = [
        polyak("average", *names, "-o", "named.h5", cwd=tmp_path),
        polyak("average", "-", "-o", "lines.h5", cwd=tmp_path, input="\n".join(names)),
        polyak("average", "-", "-o", "nul.h5", cwd=tmp_path, input="\0".join(names)),
    ]
    assert [one.returncode for one in done] == [0, 0, 0], done
    assert len({digest(tmp_path / f"{name}.h5") for name in ("named", "lines", "nul")}) == 1
    found = polyak(
        "verify", "lines.h5", "--source", "-", "--json", cwd=tmp_path, input=f"{SAMPLES}\n"
    )
    assert json.loads(found.stdout)["verified"] is True


def test_two_files_of_a_list_are_compared(tmp_path: Path) -> None:
    """`diff -` compares two files as it does two that are named, and `inspect -` shows each."""
    names = "\n".join(map(str, NEWEST[:2]))
    differ = polyak("diff", "-", "--json", cwd=tmp_path, input=names)
    named = polyak("diff", *NEWEST[:2], "--json", cwd=tmp_path)
    assert (differ.returncode, differ.stdout) == (1, named.stdout)
    inside = polyak("inspect", "-", "--json", cwd=tmp_path, input=names)
    assert len(json.loads(inside.stdout)["checkpoints"]) == 2


def test_a_file_of_a_list_that_is_gone_is_an_error(tmp_path: Path) -> None:
    """A name without a file is refused as on the command line, and nothing is written."""
    done = polyak("average", "-", "-o", "o.h5", cwd=tmp_path, input=f"{NEWEST[0]}\ngone.h5\n")
    assert done.returncode == 3
    assert one_line(done.stderr).startswith("gone.h5: ")
    assert [*tmp_path.iterdir()] == []


def test_a_terminal_is_not_read(tmp_path: Path) -> None:
    """Somebody who types `polyak check -` reads at once what is missing, instead of waiting."""
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [*POLYAK, "check", "-"],
            stdin=theirs,
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 2
    assert "which is a terminal; pipe a list into the command" in one_line(done.stderr)


# --- nothing else says what is averaged -----------------------------------------------------------


def click_variables() -> dict[str, str]:
    """Return the environment variables from which click could fill the options of `average`."""
    found = {}
    for parameter in cli.commands["average"].params:
        for prefix in ("POLYAK", "POLYAK_AVERAGE", "POLYAK_CLI"):
            found[f"{prefix}_{parameter.name}".upper()] = "1"
    return found


def test_no_variable_and_no_file_of_configuration_changes_an_average(tmp_path: Path) -> None:
    """A command line makes the same bytes whatever the environment, home and folder hold."""
    plain, full = tmp_path / "plain", tmp_path / "full"
    for folder in (plain, full):
        folder.mkdir()
        shutil.copytree(SAMPLES, folder / "ckpts")
    settings = "[tool.polyak]\nlast = 2\nscheme = 'exp'\n[average]\nlast = 2\nscheme = exp\n"
    home = tmp_path / "home"
    (home / ".config" / "polyak").mkdir(parents=True)
    for file in (
        *(full / name for name in ("polyak.toml", "pyproject.toml", "setup.cfg", ".polyakrc")),
        *(home / name for name in (".polyak", ".polyakrc", ".polyak.toml")),
        home / ".config" / "polyak.toml",
        home / ".config" / "polyak" / "config.toml",
    ):
        file.write_text(settings)
    variables: dict[str, Any] = click_variables() | {
        "HOME": str(home),
        "XDG_CONFIG_HOME": str(home / ".config"),
        "LC_ALL": "C",
        "OMP_NUM_THREADS": "3",
        "POLYAK_KERNEL": "numpy",  # who does the arithmetic changes no bit
        "TZ": "Asia/Kathmandu",
    }
    line = ("average", "ckpts", "--last", 5, "-o", "o.h5")
    for folder, environ in ((plain, {}), (full, variables)):
        done = polyak(*line, cwd=folder, environ=environ)
        assert done.returncode == 0, done.stderr
    assert digest(plain / "o.h5") == digest(full / "o.h5")


def test_no_option_has_a_variable() -> None:
    """Click could take values from the environment; no parameter and no group asks for it."""
    for command in cli.commands.values():
        assert command.context_settings.get("auto_envvar_prefix") is None
        assert [one.name for one in command.params if one.envvar] == []
    assert cli.context_settings.get("auto_envvar_prefix") is None
