"""Compare a result in JSON with the keys that a page of the guide lists.

A key has a line such as ``* `rows[].window` (integer or null): what it is.``  A part of it in
capitals varies: ``metrics.NAME``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tests.command import ROOT

#: Key -> the types that it may have, in words.
Keys = Mapping[str, frozenset[str]]
_LINE = re.compile(r"^\* `([^`]+)` \(([^)]+)\): ", re.MULTILINE)
_NAMES: Mapping[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    dict: "object",
    list: "array",
    type(None): "null",
}


def read_keys(page: str) -> dict[str, Keys]:
    """Return heading -> the keys below it; those above all headings have the heading ""."""
    text = (ROOT / f"polyak_cli/guide/{page}.md").read_text()
    title, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    found = {"": _list_keys(title)}
    for section in sections:
        heading, _, rest = section.partition("\n")
        found[heading] = _list_keys(rest)
    return found


def _list_keys(text: str) -> Keys:
    return {key: frozenset(re.split(", | or ", types)) for key, types in _LINE.findall(text)}


def walk(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Yield every key below an object, with its type in words."""
    for key, item in value.items():
        name = f"{path}{key}"
        if isinstance(item, list):
            kinds = sorted({_NAMES[type(each)] for each in item})
            yield name, " and ".join(f"array of {kind}s" for kind in kinds) or "array"
            for each in item:
                if isinstance(each, dict):
                    yield from walk(each, f"{name}[].")
            continue
        yield name, "true" if item is True else _NAMES[type(item)]
        if isinstance(item, dict):
            yield from walk(item, f"{name}.")


def _fits(found: str, types: Iterable[str]) -> bool:
    """Return whether a type is among those in words; an integer is a number, true is a boolean."""
    wider = {"integer": "number", "true": "boolean", "array of integers": "array of numbers"}
    if found == "array":  # nothing is in it
        return any(one.startswith("array of ") for one in types)
    return bool({found, wider.get(found, found)} & set(types))


def find_undocumented(result: Mapping[str, Any], keys: Keys, seen: set[str]) -> list[str]:
    """Return what a page does not say of a result, and add the keys that it does say to ``seen``.

    Args:
        result: an object that the program printed.
        keys: those of the page.
        seen: keys of the page that were met so far.
    """
    patterns = {
        key: re.compile(re.sub(r"\b[A-Z]+\b", "[^.]+", re.escape(key)) + r"\Z") for key in keys
    }
    wrong = []
    for path, found in walk(result):
        line = path if path in keys else next((k for k, p in patterns.items() if p.match(path)), "")
        if not line or not _fits(found, keys[line]):
            wrong.append(f"{path} ({found})")
        seen.add(line)
    return wrong
