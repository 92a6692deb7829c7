"""System calls that fail on request: `shim.c`, compiled and loaded into a run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.command import Done, polyak

EVER = 1 << 60
#: What a call may do besides failing with an errno.
SHORT, END = "short", "end"


class Fault(NamedTuple):
    """Which calls fail, and how; see `shim.c`."""

    function: str
    path: str  # a part of the file's path
    first: int = EVER
    last: int = EVER
    how: str = SHORT


def compiled(folder: Path) -> Path:
    """Compile the shim, or skip the test where there is no compiler."""
    compiler = shutil.which("gcc")
    if not compiler:
        pytest.skip("gcc is not here, which compiles what makes system calls fail")
    library = folder / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


def injected(library: Path, fault: Fault, *arguments: object, cwd: Path) -> tuple[Done, int]:
    """Run a command in which calls fail; return how it ended, and how many calls there were."""
    counter = library.with_name("count")
    counter.write_bytes(bytes(8))
    environ = {
        "LD_PRELOAD": str(library),
        "FAULT": ":".join(map(str, fault)),
        "FAULT_COUNT": str(counter),
    }
    done = polyak(*arguments, cwd=cwd, environ=environ)
    return done, int.from_bytes(counter.read_bytes(), "little")
