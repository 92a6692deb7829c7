"""What is installed, what it needs, and what a clone holds."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import pytest

import polyak_cli
from tests.command import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TOP = {
    "pyproject.toml",
    "README.md",
    "Makefile",
    "LICENSE",
    "CHANGELOG.md",
    "polyak_cli",
    "tests",
    "sample_checkpoints",
}


def names(requirements: list[str]) -> set[str]:
    """Return the packages of requirements, without versions."""
    return {requirement.partition(">")[0].partition("=")[0] for requirement in requirements}


def test_averaging_needs_five_packages_and_the_rest_is_extra() -> None:
    """What is required, what the extras bring, and for which Python."""
    extras = PROJECT["optional-dependencies"]
    assert names(PROJECT["dependencies"]) == {"click", "numpy", "h5py", "rich", "google-crc32c"}
    assert names(extras["tensorflow"]) == {"tensorflow", "keras"}
    assert extras["keras"] == ["keras>=3.11.3"]
    assert "keras>=3.11.3" in extras["tensorflow"]
    assert names(extras["plot"]) == {"matplotlib", "jinja2"}
    assert extras["all"] == ["polyak[tensorflow,plot]"]
    assert PROJECT["requires-python"] == ">=3.11"
    assert PROJECT["license"] == "MIT"
    assert PROJECT["scripts"] == {"polyak": "polyak_cli.cli:main"}


def test_the_package_says_that_it_is_typed() -> None:
    """A type checker reads the annotations of an installed package."""
    assert (Path(polyak_cli.__file__).parent / "py.typed").is_file()


def test_the_top_level_holds_what_it_should_and_dot_files() -> None:
    """Nothing else is kept at the top of a clone."""
    done = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("not a clone")
    kept = {line.partition("/")[0] for line in done.stdout.splitlines()}
    assert {name for name in kept if not name.startswith(".")} == TOP
