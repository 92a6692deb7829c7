"""Measures the peak memory of programs.

Each is started by a small process of its own: a process counts as its peak what it inherits from
the one that started it, and a test runner is a large one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import NamedTuple

from tests.command import environment

_MEASURE = """
import json, os, sys
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(pid, 0)
unit = 1 if sys.platform == "darwin" else 1024
print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_maxrss * unit]), file=sys.stderr)
"""


class Run(NamedTuple):
    """A program that has ended."""

    code: int
    peak: int  # bytes, of the program or its largest child, whichever is more
    stdout: str
    stderr: str


def run_measured(*command: object) -> Run:
    """Run a program to its end."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *map(str, command)],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    *lines, last = done.stderr.splitlines(keepends=True)
    code, peak = json.loads(last)
    return Run(code, peak, done.stdout, "".join(lines))
