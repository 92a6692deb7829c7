"""Start processes that run a module of this package; unlike forked ones, they may use a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def start_module(name: str, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """Start a process that runs a module, with pipes to its input and from its output.

    Args:
        name: of the module.
        *arguments: of the module.
        **options: others of `subprocess.Popen`.

    Raises:
        OSError: the system allows no more processes, among others.
    """
    package = str(Path(__file__).parents[2])
    known = os.environ.get("PYTHONPATH")
    return subprocess.Popen(  # noqa: S603 (this very package)
        # -P: no module of the current folder is imported.
        [sys.executable, "-P", "-m", name, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": f"{package}:{known}" if known else package},
        **options,
    )
