"""The kernels that the tests compare: numpy's, and the compiled one where it is there."""

from __future__ import annotations

import pytest

from polyak_cli.engine import kernel
from polyak_cli.engine.kernel import choose_kernel, find_compiled

COMPILED, _WHY = find_compiled()
needs_compiled = pytest.mark.skipif(COMPILED is None, reason=f"the compiled kernel is {_WHY}")
#: Their names, as parameters of a test.
KERNELS = ["numpy", pytest.param("compiled", marks=needs_compiled)]


def use_kernel(patch: pytest.MonkeyPatch, name: str) -> None:
    """Have averages of this process computed by a kernel, as `POLYAK_KERNEL` does for a new one."""
    patch.setattr(kernel, "_chosen", choose_kernel(name))
    patch.setattr(kernel, "NAME", name)
