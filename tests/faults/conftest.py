"""What the tests of faults work on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.runs import write_run
from tests.faults.shim import compiled


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Return a folder with a small run in ckpts/."""
    (tmp_path / "ckpts").mkdir()
    write_run(tmp_path / "ckpts", 3, 50_000)
    return tmp_path


@pytest.fixture
def tiny_disk(run_folder: Path) -> Iterator[Path]:
    """Return a folder on a disk of 1 MB."""
    folder = run_folder / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the library that makes system calls fail."""
    if not sys.platform.startswith("linux"):
        pytest.skip("LD_PRELOAD is Linux's")
    return compiled(tmp_path_factory.mktemp("shim"))
