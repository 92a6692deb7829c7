"""What commands are forked with: `tests.warm` imports this first.

All that a command may import without an extra.  Modules of `polyak_cli.evaluation` are left out,
because some look which frameworks are there.
"""

from __future__ import annotations

import importlib
import os
from pkgutil import walk_packages

import polyak_cli.examining
import polyak_cli.formats

# As the command line does: threads of BLAS make a fork unsafe.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import polyak_cli.cli
import polyak_cli.pipeline

for _package in (polyak_cli.examining, polyak_cli.formats):
    for _module in walk_packages(_package.__path__, f"{_package.__name__}."):
        importlib.import_module(_module.name)
