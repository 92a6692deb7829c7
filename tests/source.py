"""What the package's source files say about themselves: imports, definitions, lines.

Reads them as text; imports and runs nothing of the package but its list of public names.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import polyak_cli

PACKAGE = Path(polyak_cli.__file__).parent

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One source file: its dotted name within the package, and its text."""

    name: str
    text: str

    @property
    def room(self) -> str:
        """The top-level module or package that it belongs to."""
        return self.name.partition(".")[0]

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed file."""
        return ast.parse(self.text)

    @cached_property
    def nodes(self) -> tuple[ast.AST, ...]:
        """All nodes of the parsed file."""
        return tuple(ast.walk(self.tree))

    def imports(self) -> set[str]:
        """Return the full names of everything that the file imports, inside functions too."""
        found = set()
        for node in self.nodes:
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
        return found

    def functions(self) -> Iterator[Function]:
        """Yield every function and method, nested ones too."""
        for node in self.nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node

    def lines_of_code(self) -> int:
        """Count the lines that are neither blank, comment nor docstring."""
        documented = set()
        for node in self.nodes:
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                documented |= _lines_of_docstring(node)
        return sum(
            1
            for number, line in enumerate(self.text.splitlines(), 1)
            if line.strip() and number not in documented and not line.strip().startswith("#")
        )

    def comments(self) -> int:
        """Count the comments, those at the end of a line of code too."""
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        return sum(1 for token in tokens if token.type == tokenize.COMMENT)


def _lines_of_docstring(node: ast.Module | ast.ClassDef | Function) -> set[int]:
    if ast.get_docstring(node) is None:
        return set()
    first = node.body[0]
    return set(range(first.lineno, (first.end_lineno or first.lineno) + 1))


def length(function: Function, *, docstring: bool = True) -> int:
    """Return the lines of a function from ``def`` to its end, with or without its docstring."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    return lines if docstring else lines - len(_lines_of_docstring(function))


@cache  # parsing them takes as long as all that is asked about them
def sources() -> tuple[Source, ...]:
    """Return all source files of the package, in the order of their names."""
    return tuple(
        Source(
            ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"),
            path.read_text(),
        )
        for path in sorted(PACKAGE.rglob("*.py"))
    )
