"""Limits on the size of files, functions and rooms, so that each fits in a reader's head."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

import polyak_cli
from tests.source import PACKAGE, Source, length, sources

MODULE_LINES = 500
FUNCTION_LINES = 60
P95_LINES = 40
ENTRIES = 18
#: Rooms in which the reasons behind the code are the hardest to guess.
COMMENTED = ("averaging", "engine", "formats", "evaluation")
COMMENTS_PER_100 = 6


def long_functions(files: Iterable[Source]) -> list[str]:
    """Return the functions of more lines than allowed.

    Docstrings count, except those of the public functions, which are the reference manual.
    """
    found = []
    for file in files:
        top = {id(node) for node in file.tree.body}
        for function in file.functions():
            public = function.name in polyak_cli.__all__ and id(function) in top
            lines = length(function, docstring=not public)
            if lines > FUNCTION_LINES:
                found.append(f"{file.name}.{function.name}: {lines} lines")
    return found


def test_no_function_is_longer_than_a_screen() -> None:
    """A function has at most 60 lines."""
    assert long_functions(sources()) == []


def test_most_functions_are_short() -> None:
    """Nineteen of twenty functions have at most 40 lines, docstrings included."""
    lengths = sorted(length(function) for file in sources() for function in file.functions())
    assert lengths[int(0.95 * len(lengths))] <= P95_LINES


def test_no_module_is_too_long() -> None:
    """A module has at most 500 lines that are neither blank, comment nor docstring."""
    assert {
        file.name: file.lines_of_code() for file in sources() if file.lines_of_code() > MODULE_LINES
    } == {}


def test_the_package_has_few_entries() -> None:
    """A newcomer who lists the package sees at most 18 names."""
    entries = {path.name for path in PACKAGE.iterdir()} - {"__pycache__"}
    assert len(entries) <= ENTRIES


@pytest.mark.parametrize("room", COMMENTED)
def test_the_reasons_are_written_down(room: str) -> None:
    """The rooms with the least obvious code have at least 6 comments in 100 lines of code."""
    files = [file for file in sources() if file.room == room]
    comments = sum(file.comments() for file in files)
    assert comments >= COMMENTS_PER_100 / 100 * sum(file.lines_of_code() for file in files)


def test_the_counts_are_right() -> None:
    """Blank lines, comments and docstrings are no code; a comment behind code is a comment."""
    text = '"""Doc."""\n\n# why\ndef f():\n    """Doc.\n\n    More.\n    """\n    return 1  # why\n'
    file = Source("module", text)
    (function,) = file.functions()
    assert (file.lines_of_code(), file.comments()) == (2, 2)
    assert (length(function), length(function, docstring=False)) == (6, 2)


def test_a_long_function_is_seen() -> None:
    """A private function's docstring counts, a public one's does not."""
    body = "".join(f"    x{k} = {k}\n" for k in range(58))
    text = f'def {{}}():\n    """Do.\n\n    More.\n    """\n{body}'
    assert long_functions([Source("module", text.format("diff"))]) == []
    assert long_functions([Source("module", text.format("work"))]) == ["module.work: 63 lines"]
