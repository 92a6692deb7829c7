"""What is installed, what it needs, and what a clone holds."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

import polyak_cli
from tests.command import ROOT, environment

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


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the files that the wheel of this clone installs."""
    folder = tmp_path_factory.mktemp("wheel")
    builder = WheelBuilder(str(ROOT))
    (built,) = builder.build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(built) as wheel:
        wheel.extractall(folder / "installed")
    return folder / "installed"


def python(code: str, folder: Path, *more: str) -> str:
    """Run code in a fresh process that finds modules in a folder, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", *more, code],
        cwd=folder,
        env=environment(PYTHONPATH=str(folder)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_wheel_holds_every_file_of_the_package(installed: Path) -> None:
    """What git keeps in `polyak_cli` is installed, byte for byte."""
    done = subprocess.run(
        ["git", "ls-files", "polyak_cli"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("not a clone")
    # The folder of the short name lies beside the package.
    homes = {
        name: name.removeprefix("polyak_cli/") if name.startswith("polyak_cli/polyak/") else name
        for name in done.stdout.splitlines()
    }
    assert "polyak_cli/__init__.py" in homes
    for name, home in homes.items():
        assert (installed / home).read_bytes() == (ROOT / name).read_bytes()


def test_the_short_name_has_the_same_objects(installed: Path) -> None:
    """`import polyak` offers each public name of `polyak_cli`, and loads nothing by itself."""
    code = (
        "import sys, polyak\n"
        "assert 'polyak_cli.errors' not in sys.modules and 'numpy' not in sys.modules\n"
        "import polyak_cli\n"
        "assert polyak.__all__ == polyak_cli.__all__\n"
        "assert dir(polyak) == sorted(polyak.__all__)\n"
        "same = [getattr(polyak, n) is getattr(polyak_cli, n) for n in polyak_cli._HOMES]\n"
        "print(polyak.__file__, polyak_cli.__file__, len(same), all(same), polyak.__version__)\n"
        "try: polyak.averge\n"
        "except AttributeError as error: print(error)"
    )
    first, second = python(code, installed, "-c").splitlines()
    files = f"{installed / 'polyak/__init__.py'} {installed / 'polyak_cli/__init__.py'}"
    assert first == f"{files} {len(polyak_cli._HOMES)} True {polyak_cli.__version__}"
    assert second == "module 'polyak' has no attribute 'averge'"


def test_the_short_name_has_the_callbacks(installed: Path) -> None:
    """`polyak.callbacks` names the same classes, so that isinstance() and pickles agree."""
    pytest.importorskip("keras")
    code = (
        "import polyak.callbacks as short, polyak_cli.callbacks as long\n"
        "assert short.__all__ == long.__all__\n"
        "print([getattr(short, n) is getattr(long, n) for n in long.__all__])"
    )
    assert python(code, installed, "-c") == "[True, True]\n"
