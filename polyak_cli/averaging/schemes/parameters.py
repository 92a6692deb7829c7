"""What a scheme is: a function, and the options that it takes besides the positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from polyak_cli.errors import UsageError, shown

#: The value of a parameter: a number, a word, or whether a flag is set.
Value = float | str | bool


@dataclass(frozen=True, slots=True)
class Number:
    """A parameter that is a number.

    Attributes:
        name: as in Python; the option has hyphens for underscores.
        meaning: one line for the help text, with the name in capitals for the value.
        default: if the option is not given; None if there is none.
        allowed: whether a number is in range.
        range: what is in range, in words.
        instead_of: the parameter that this one says in another way; "" if there is none.
    """

    name: str
    meaning: str
    default: float | None
    allowed: Callable[[float], bool]
    range: str
    instead_of: str = ""

    @property
    def optional(self) -> bool:
        """Whether the scheme can do without it."""
        return self.default is not None or bool(self.instead_of)

    def check(self, given: object) -> float:
        """Return a value as the scheme takes it.

        Raises:
            UsageError: it is no number, or out of range.
        """
        try:
            value = float(given)  # type: ignore[arg-type]  # a number of any library, or an error
        except (TypeError, ValueError, OverflowError):
            value = None
        if value is None or not self.allowed(value):
            found = shown(given) if value is None else value
            raise UsageError(f"{spell(self.name)} is {found}; expected {self.range}")
        return value


@dataclass(frozen=True, slots=True)
class Word:
    """A parameter that is one of some words.  Without a default the scheme can do without it.

    Attributes:
        name: as of `Number`; so are the next two.
        words: the choices.
        needs: word -> the parameter without which it means nothing.
    """

    name: str
    meaning: str
    default: str | None
    words: tuple[str, ...]
    needs: Mapping[str, str] = field(default_factory=dict)
    optional = True

    def check(self, given: object) -> str:
        """Return a value as the scheme takes it.

        Raises:
            UsageError: it is another word.
        """
        if not isinstance(given, str) or given not in self.words:
            expected = ", ".join(self.words)
            raise UsageError(f"{spell(self.name)} is {shown(given)}; expected one of {expected}")
        return given


@dataclass(frozen=True, slots=True)
class Flag:
    """A parameter that is set or not, and is not by default; attributes as those of `Number`."""

    name: str
    meaning: str
    default: bool = False
    optional = True

    def check(self, given: object) -> bool:
        """Return a value as the scheme takes it."""
        return bool(given)


Parameter = Number | Word | Flag


@dataclass(frozen=True, slots=True)
class Scheme:
    """A rule that gives coefficients.

    Attributes:
        function: ``function(positions, **parameters)`` returns the multipliers, oldest first.
        summary: what the rule is, in a few words.
        parameters: its options; the first is the one that `polyak sweep` writes as ``exp:2``.
        takes: what the files hold: checkpoints of a run, of which any newest may be averaged;
            running means that belong together; or EMA snapshots, which do too, and whose widths the
            function gets as ``sigmas``.
    """

    function: Callable[..., list[float]]
    summary: str
    parameters: tuple[Parameter, ...] = ()
    takes: Literal["checkpoints", "running means", "snapshots"] = "checkpoints"


@dataclass(frozen=True, slots=True)
class UsedScheme:
    """The scheme that is used: its name, which may be ``custom``, and its parameters."""

    name: str
    parameters: Mapping[str, Value]


def spell(name: str) -> str:
    """Return the option of a parameter as the command line has it."""
    return f"--{name.replace('_', '-')}"
