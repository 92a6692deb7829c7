"""The simulation of a large average runs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.command import ROOT, environment


@pytest.mark.soak
def test_every_share_is_simulated() -> None:
    """Ten tensors of the model are 54 shares, which workers of a real cluster take."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.remote.simulation", "--tensors", "10", "--workers", "4"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["workers"], found["shares"]) == (4, 54)
    assert found["scheduler's CPU seconds"] > 0
