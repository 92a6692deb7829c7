"""What every test may rely on, however the test run was started."""

from __future__ import annotations

import os
import signal

from hypothesis import Phase, settings

# Before PyTorch is imported.  Tests run in as many processes as there are cores, and its threads
# wait for each other in a loop: on a busy machine a small training took 27 times the CPU so.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# For `make mutants`: it needs to know only that some example fails, not the simplest one.
settings.register_profile("mutants", max_examples=20, phases=[Phase.explicit, Phase.generate])


def pytest_configure() -> None:
    """Answer signals as at a terminal.

    Behind ``nohup`` or ``&`` some are ignored, and the programs under test would inherit that.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            answer = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, answer)
