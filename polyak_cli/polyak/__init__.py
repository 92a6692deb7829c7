"""The package `polyak` of an installation: the public names of `polyak_cli` under its short name.

A wheel and an editable install hold this folder a second time, as `polyak` beside `polyak_cli`; see
`force-include` in pyproject.toml.  The names are the same objects, loaded when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import polyak_cli
from polyak_cli import __all__ as __all__
from polyak_cli import __version__ as __version__

if TYPE_CHECKING:  # the same names for type checkers, which do not follow __getattr__
    from polyak_cli import *  # noqa: F403 - __all__ lists them


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(polyak_cli, name)


def __dir__() -> list[str]:
    return __all__
