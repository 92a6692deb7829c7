"""A plugin of coverage, loaded in every process that is measured: children are ended less quickly.

The program kills a child as soon as it has what it wanted of it, which is before that child could
save what was measured in it.
"""

from __future__ import annotations

import contextlib
import os
import signal
from time import monotonic, sleep  # themselves: tests put others into `time`
from typing import Any

#: Seconds that a child has to end by itself before it is killed.
PATIENCE = 2.0


def coverage_init(registry: Any, options: Any) -> None:
    """Have `os.kill` wait for a child that is about to end."""
    del registry, options  # nothing is measured in another way
    kill = os.kill

    def kill_patiently(pid: int, number: int) -> None:
        if number == signal.SIGKILL:
            with contextlib.suppress(ChildProcessError):  # no child: this very process, or another
                until = monotonic() + PATIENCE
                how = os.WEXITED | os.WNOWAIT | os.WNOHANG
                while not os.waitid(os.P_PID, pid, how) and monotonic() < until:
                    sleep(0.005)
        kill(pid, number)

    os.kill = kill_patiently
