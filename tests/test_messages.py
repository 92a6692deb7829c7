"""What users read is plain English: no string of the package holds a phrase to be decoded."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator

from tests.source import Source, sources

#: Patterns of phrases that a reader must decode -> what to write in their place.
UNWANTED = {
    r"its content tells": "recognised by content",
    r"makes? no sense": "usage error, or what is wrong with it",
    r"\bno sensible\b": "invalid",
    r"stands? in for": "replaces",
    r"\banew\b": "again",
    r"\btold\b": "reported",
    r"\bwhich (\w+ )?has not\b": "which does not have",
    r"\bto its end\b": "completely",
    r"\bis there twice\b": "occurs twice",
    r"\bnot (read|carried|known|used) here\b": "not supported, or unknown",
    r"\bof (one|another) save\b": "from one save",
    r"(?<!there )\b(is|are) no (folder|text|file|tensor|number|table|path)\b": "is not a",
    r"\ball the same\b": "anyway",
    r"\bbut must be\b": "; expected",
    r"\b(of which|but for)\b": "two sentences",
    r"\bhas no \w+, but\b": "what was found; expected what",
    r"\{[\w.]*nbytes\} (bytes )?(free|of memory)": "a size in MB, by word_size",
}


def strings(file: Source) -> Iterator[tuple[int, str]]:
    """Yield line and text of every string that is no docstring; an f-string shows its code."""
    documentation = {
        id(node.value)
        for node in file.nodes
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in file.nodes:
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, ast.unparse(node)
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in documentation
        ):
            yield node.lineno, node.value


def find_unwanted(files: Iterable[Source]) -> list[str]:
    """Return where an unwanted phrase stands, and what to write in its place."""
    return sorted(
        {
            f"{file.name}, line {line}: {found[0]!r}; write {better!r}"
            for file in files
            for line, text in strings(file)
            for pattern, better in UNWANTED.items()
            if (found := re.search(pattern, text))
        }
    )


def test_messages_are_plain_english() -> None:
    """No error, note, help text or other string holds a phrase that is listed above."""
    assert find_unwanted(sources()) == []


def test_an_unwanted_phrase_is_found() -> None:
    """In a plain string, in an f-string and across lines; a docstring is not looked at."""
    code = (
        "def f(name):\n"
        "    '''It makes no sense.'''\n"
        "    a = 'the command line makes no sense'\n"
        "    b = (f'{name}: is of type float8, '\n"
        "         'which numpy has not')\n"
    )
    found = find_unwanted([Source("x", code)])
    assert [one.partition(":")[0] for one in found] == ["x, line 3", "x, line 4"]
