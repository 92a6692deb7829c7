"""Writes the guide's reference of Python: `python -m tests.api_page`.

The page is made of signatures and docstrings, so that it says what the code says, and of the
examples in `tests/api_examples.py`, which the tests run.
"""

from __future__ import annotations

import inspect
import re
import textwrap

import polyak_cli
from polyak_cli.averaging import options
from polyak_cli.errors import PolyakError
from tests.api_examples import EXAMPLES
from tests.command import ROOT

PAGE = ROOT / "polyak_cli/guide/api.md"
_WIDTH = 100
_HEAD = """\
# Python reference

Every public name: its signature, what it does, with shapes, units and errors, and an example.
All can be imported from `polyak` or from `polyak_cli`. Arguments after `*` are given by name.
`StrPath` is a `str` or an `os.PathLike`, and `Array` a numpy array; `Maker` is a `StrPath` or a
function that makes a model. The examples run as they stand in a folder that holds
`sample_checkpoints`; [Use it from Python](python.md) is shorter.
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
    end = (
        "" if returned in (inspect.Signature.empty, None, "None") else f" -> {_word_type(returned)}"
    )
    parts = _list_parameters(signature)
    short = f"{name}({', '.join(parts)}){end}"
    if len(short) <= _WIDTH:
        return short
    return "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){end}"])


def _list_parameters(signature: inspect.Signature) -> list[str]:
    """Return the parameters, with * before those that are given by name."""
    parts = []
    starred = False
    for one in signature.parameters.values():
        starred = starred or one.kind is inspect.Parameter.VAR_POSITIONAL
        if one.kind is inspect.Parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
            starred = True
        parts.append(_parameter(one))
    return parts


def _word_type(annotation: object) -> str:
    """Return a type as users know it: without modules of this package and names of its own."""
    text = str(getattr(annotation, "__forward_arg__", annotation))
    text = re.sub(r"\b[a-z_.]+\.(?=[A-Z])", "", text)
    return re.sub(r"\b(_StrPath|Source)\b", "StrPath", text)


def _parameter(one: inspect.Parameter) -> str:
    """Return a parameter with its type, and its default where that can be written down."""
    stars: dict[object, str] = {
        inspect.Parameter.VAR_POSITIONAL: "*",
        inspect.Parameter.VAR_KEYWORD: "**",
    }
    text = f"{stars.get(one.kind, '')}{one.name}: {_word_type(one.annotation)}"
    if one.default is inspect.Parameter.empty:
        return text
    default = repr(one.default)  # of a function or a factory, it begins with <
    return f"{text} = {'...' if default.startswith(('<', 'PosixPath')) else default}"


def _annotations(value: object) -> dict[str, str]:
    """Return the types of the keys as they are written."""
    found: dict[str, str] = {}
    for base in reversed(getattr(value, "__orig_bases__", ())):
        found |= _annotations(base)
    for key, kind in getattr(value, "__annotations__", {}).items():
        found[key] = _word_type(kind)
    return found


def make_page() -> str:
    """Return the page: functions, then classes, then errors, each by name."""
    parts = [_HEAD]
    for title, names in _sort_names().items():
        parts.append(f"## {title}\n")
        for name in names:
            value = getattr(polyak_cli, name)
            text = "\n\n".join(filter(None, [_signature(name, value), *_list_texts(value)]))
            parts.append(f"### {name}\n\n```text\n{text}\n```\n")
            parts.append(f"```pycon\n{textwrap.dedent(EXAMPLES[name]).strip()}\n```\n")
    lines = "\n".join(parts).splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _list_texts(value: object) -> list[str]:
    """Return the docstring without examples, those of bases of options, and the members."""
    text = re.sub(r"^(>>>|\.\.\.) .*\n\n?", "", inspect.getdoc(value) or "", flags=re.MULTILINE)
    texts = [text]
    if value is polyak_cli.Options:  # Python 3.11 does not know the base of a TypedDict
        texts[0] += "\n" + (inspect.getdoc(options.Options) or "").partition("Attributes:\n")[2]
    if isinstance(value, type) and (members := _list_members(value)):
        texts.append("\n".join(["Also:", *members]))
    return texts


def _list_members(kind: type) -> list[str]:
    """Return the public properties and methods of a class, with what each says first."""
    found = []
    for name, member in vars(kind).items():
        if name.startswith("_") or not (isinstance(member, property) or inspect.isfunction(member)):
            continue
        sentence = (inspect.getdoc(member) or "").partition("\n\n")[0].replace("\n", " ")
        call = ""
        if inspect.isfunction(member):
            taken = [_parameter(one) for one in inspect.signature(member).parameters.values()]
            call = f"({', '.join(taken[1:])})"
        found += textwrap.wrap(
            f"{name}{call}: {sentence}", _WIDTH, initial_indent="    ", subsequent_indent=" " * 8
        )
    return found


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
