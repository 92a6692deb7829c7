"""Folders, disks and the library of failing calls, as fixtures."""

from __future__ import annotations

import shutil
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
    _prepared("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder)
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def quota(run_folder: Path) -> Iterator[Path]:
    """Return a folder that may hold 1 MiB, on a disk with room for more."""
    if not shutil.which("btrfs"):
        pytest.skip("btrfs-progs is not here (`make system`)")
    image, disk = run_folder / "image", run_folder / "disk"
    disk.mkdir()
    with open(image, "wb") as file:
        file.truncate(128 << 20)  # the least that btrfs takes, but sparse
    subprocess.run(["mkfs.btrfs", "-q", image], check=True, capture_output=True)
    _prepared("mount", "-o", "loop", image, disk)
    try:
        _prepared("btrfs", "quota", "enable", disk)
        _prepared("btrfs", "subvolume", "create", disk / "home")
        _prepared("btrfs", "qgroup", "limit", "1M", disk / "home")
        yield disk / "home"
    finally:
        subprocess.run(["umount", disk], check=True)


def _prepared(*command: str | Path) -> None:
    """Prepare a disk, or skip the test where that is not allowed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no such disk can be made here: {done.stderr.strip()}")


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the compiled library that makes system calls fail."""
    if not sys.platform.startswith("linux"):
        pytest.skip("LD_PRELOAD is Linux's")
    return compiled(tmp_path_factory.mktemp("shim"))
