"""Writes the guide's reference of Python: `python -m tests.api_page`.

The page is made of signatures and docstrings alone, so that it says what the code says.
"""

from __future__ import annotations

import inspect
import textwrap

import polyak_cli
from polyak_cli.errors import PolyakError
from tests.command import ROOT

PAGE = ROOT / "polyak_cli/guide/api.md"
_WIDTH = 100
_HEAD = """\
# Python reference

Every public name: its signature, then what it does, with shapes, units and errors. All can be
imported from `polyak`. [Use it from Python](python.md) has examples. This page is written by
`python -m tests.api_page`.
"""


def _signature(name: str, value: object) -> str:
    """Return a call of a function or class, with one parameter a line where it is long."""
    if not callable(value) or (isinstance(value, type) and issubclass(value, PolyakError)):
        return name
    if hasattr(value, "__total__"):  # a TypedDict: keywords that other functions take
        keys = [f"    {key}: {kind}" for key, kind in _annotations(value).items()]
        return "\n".join([f"class {name}:", *keys])
    signature = inspect.signature(value)
    returned = signature.return_annotation
    end = "" if returned in (inspect.Signature.empty, None, "None") else f" -> {returned}"
    parts = [_parameter(one) for one in signature.parameters.values()]
    short = f"{name}({', '.join(parts)}){end}"
    if len(short) <= _WIDTH:
        return short
    return "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){end}"])


def _parameter(one: inspect.Parameter) -> str:
    """Return a parameter with its type, and its default where that can be written down."""
    stars: dict[object, str] = {
        inspect.Parameter.VAR_POSITIONAL: "*",
        inspect.Parameter.VAR_KEYWORD: "**",
    }
    text = f"{stars.get(one.kind, '')}{one.name}: {one.annotation}"
    if one.default is inspect.Parameter.empty:
        return text
    default = repr(one.default)  # of a function or a factory, it begins with <
    return f"{text} = {'...' if default.startswith('<') else default}"


def _annotations(value: object) -> dict[str, str]:
    """Return the types of the keys as they are written."""
    found: dict[str, str] = {}
    for base in reversed(getattr(value, "__orig_bases__", ())):
        found |= _annotations(base)
    for key, kind in getattr(value, "__annotations__", {}).items():
        found[key] = getattr(kind, "__forward_arg__", str(kind))
    return found


def make_page() -> str:
    """Return the page: functions, then classes, then errors, each by name."""
    parts = [_HEAD]
    for title, names in _sort_names().items():
        parts.append(f"## {title}\n")
        for name in names:
            value = getattr(polyak_cli, name)
            text = f"{_signature(name, value)}\n\n{textwrap.dedent(inspect.getdoc(value) or '')}"
            parts.append(f"### {name}\n\n```text\n{text}\n```\n")
    lines = "\n".join(parts).splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _sort_names() -> dict[str, list[str]]:
    """Return the public names by what they are."""
    kinds: dict[str, list[str]] = {"Functions": [], "Classes": [], "Errors": []}
    for name in sorted(set(polyak_cli.__all__) - {"__version__"}, key=str.lower):
        value = getattr(polyak_cli, name)
        if not isinstance(value, type):
            kinds["Functions"].append(name)
        elif issubclass(value, PolyakError):
            kinds["Errors"].append(name)
        else:
            kinds["Classes"].append(name)
    return kinds


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
