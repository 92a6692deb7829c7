"""What a process of `tests.keras.commands` imports before commands are forked from it."""

from __future__ import annotations

import os
from importlib.util import find_spec

from polyak_cli.evaluation.quiet import silence_frameworks

# As the command line does: threads of BLAS make a fork unsafe.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
with silence_frameworks():
    if find_spec("keras"):
        import keras  # noqa: F401 (it is there when a command begins)

import polyak_cli.cli
import polyak_cli.pipeline  # noqa: F401 (so is what averages)
