"""Every command's help says which formats it serves, and says what the program does."""

from __future__ import annotations

import re

import click
import pytest

from polyak_cli.cli import cli, serving
from polyak_cli.cli.options import Command
from polyak_cli.formats.catalogue import FORMATS, find_format
from polyak_cli.formats.format import RUN_MODULE

#: Format -> how the help calls its files.
FILES = {key: words for files in serving.FRAMEWORKS.values() for key, words in files.items()}
#: Options that run the model of a checkpoint.
RUNNING = {"--data", "--recalibrate"}


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_each_command_says_which_formats_it_serves(name: str) -> None:
    """In one place, before the example; and each framework, where any is read."""
    command = cli.commands[name]
    assert isinstance(command, Command)
    text = " ".join(command.get_help(click.Context(command, info_name=name)).split())
    assert text.count("Formats: ") == 1
    serves = text.partition("Formats: ")[2].partition(" Example: ")[0]
    # A long word is broken after its hyphen.
    assert serves.replace("- ", "-") == command.serves
    assert command.serves.endswith(".")
    if command.serves not in (serving.REWRITTEN, serving.WRITTEN, serving.NONE):
        assert all(framework in serves for framework in serving.FRAMEWORKS)
    # An option that runs a model is an exception from that.
    if "No framework is needed" in serves:
        runs = {option for param in command.params for option in param.opts} & RUNNING
        assert re.findall("needed without (--[a-z]+)", serves) == [*runs]


def test_the_formats_of_the_help_are_those_of_the_catalogue() -> None:
    """Each is named, with every suffix by which its files are found, and no other."""
    assert sorted(FILES) == sorted(entry.key for entry in FORMATS)
    for entry in FORMATS:
        assert {*re.findall(r"\.[\w.]+", FILES[entry.key])} == {*entry.kinds}, entry.key
        assert entry.kinds or entry.openers, entry.key  # those without a suffix are folders


def test_the_formats_that_are_recalibrated_are_those_of_modules() -> None:
    """The help of `recalibrate` names what it runs as a module of PyTorch, and no other."""
    keys = {e.key for e in FORMATS if find_format(e.key).recalculation == RUN_MODULE}
    for key, words in FILES.items():
        if key not in serving.FRAMEWORKS["Keras"]:
            found = re.search(rf"{re.escape(words)}[,)]", serving.REWRITTEN)
            assert bool(found) == (key in keys), key
