"""The row of the README's table whose files Orbax writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.orbax.test_orbax import load, save
from tests.test_front_door import KERNEL, run_row


def test_the_row_of_orbax_runs(tmp_path: Path) -> None:
    """The average of what is shifted by 1, 2 and 3 is shifted by 2."""
    for step in (1, 2, 3):
        save(tmp_path / f"run/{1000 * step}", {"params": {"kernel": KERNEL + step}})
    row = "Orbax checkpoints of JAX, or of Keras's `OrbaxCheckpoint`"
    found = load(tmp_path / run_row(row, tmp_path)[-1])
    assert np.array_equal(found["params"]["kernel"], KERNEL + 2)
