"""Runs commands in processes that have Keras imported when they begin.

Importing it takes seconds.  What a start without it shows is tested elsewhere: the examples of the
guide, and whatever `tests.command.fresh` runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.command import LONGEST, Done, environment
from tests.warm import Warm

_WARM = Warm("tests.keras.imported")


def polyak(*arguments: object, cwd: Path, environ: Mapping[str, str] | None = None) -> Done:
    """Run a command to its end and return exit code, stdout and stderr."""
    return _WARM.run([*map(str, arguments)], cwd, environment(**environ or {}), LONGEST)
