"""Which kernel runs, who decides it, and where it is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import polyak_cli
from polyak_cli.engine.kernel import choose_kernel
from polyak_cli.errors import UsageError
from tests.command import SAMPLES, one_line, polyak, scripted
from tests.kernels import COMPILED, KERNELS, needs_compiled

#: Makes the program believe that it was installed without the compiled kernel.
NOT_BUILT = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: (
    None if name == "polyak_cli.engine._kernel" else find(name, *more)
)
"""
#: Makes the compiled kernel one that cannot be loaded, as on a file system without execution.
NOT_LOADED = """
import builtins
load = builtins.__import__
def refuse(name, scope=None, local=None, names=(), level=0):
    if name == "polyak_cli.engine._kernel":
        raise ImportError("failed to map segment from shared object")
    return load(name, scope, local, names, level)
builtins.__import__ = refuse
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: (
    find("json") if name == "polyak_cli.engine._kernel" else find(name, *more)
)
"""


@pytest.mark.parametrize("arguments", [("-V", "-v"), ("-vV",), ("--verbose", "--version")])
def test_the_version_with_v_names_the_kernel(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """`polyak -V -v` says which kernel runs; without -v there is one line, as ever."""
    done = polyak(*arguments, cwd=tmp_path, environ={"POLYAK_KERNEL": "numpy"})
    first, second = done.stdout.splitlines()
    assert first == f"polyak, version {polyak_cli.__version__}"
    assert second == "kernel: numpy (POLYAK_KERNEL is set)"
    if COMPILED:
        done = polyak(*arguments, cwd=tmp_path, environ={"POLYAK_KERNEL": ""})
        assert done.stdout.splitlines()[1] == "kernel: compiled"


def test_v_before_a_command_is_refused(tmp_path: Path) -> None:
    """An option that would do nothing is an error, which says where it belongs."""
    done = polyak("-v", "average", cwd=tmp_path)
    assert done.returncode == 2
    assert "give it after the command" in one_line(done.stderr)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_report_names_the_kernel_that_ran(kernel: str, tmp_path: Path) -> None:
    """In words with -v, and in the report's JSON."""
    environ = {"POLYAK_KERNEL": kernel}
    words = ("average", SAMPLES, "-o", "o.h5", "--force")
    verbose = polyak(*words, "-v", cwd=tmp_path, environ=environ)
    assert f"; {kernel} kernel), peak memory" in verbose.stdout.splitlines()[-2]
    report = json.loads(polyak(*words, "--json", cwd=tmp_path, environ=environ).stdout)
    assert report["kernel"] == kernel


@needs_compiled
def test_both_kernels_write_the_same_file(tmp_path: Path) -> None:
    """The variable changes who does the arithmetic, and no byte of the average."""
    files = []
    for kernel in ("numpy", "compiled"):
        words = ("average", SAMPLES, "--scheme", "exp", "-o", f"{kernel}.h5")
        done = polyak(*words, cwd=tmp_path, environ={"POLYAK_KERNEL": kernel})
        assert done.returncode == 0, done.stderr
        files.append((tmp_path / f"{kernel}.h5").read_bytes())
    assert files[0] == files[1]


def test_a_kernel_of_another_name_is_refused(tmp_path: Path) -> None:
    """A misspelt variable is a usage error in one line, and nothing is written."""
    words = ("average", SAMPLES, "-o", "o.h5")
    done = polyak(*words, cwd=tmp_path, environ={"POLYAK_KERNEL": "cython"})
    assert done.returncode == 2
    assert "POLYAK_KERNEL is 'cython'; set it to numpy or compiled" in one_line(done.stderr)
    assert not (tmp_path / "o.h5").exists()


def test_without_the_compiled_kernel_numpy_runs_and_says_so(tmp_path: Path) -> None:
    """An installation without a compiler averages all the same."""
    environ = "import os; os.environ.pop('POLYAK_KERNEL', None)"
    done = scripted(environ + NOT_BUILT, "-V", "-v", cwd=tmp_path)
    assert "kernel: numpy (the compiled one, which is faster, is not installed" in done.stdout
    done = scripted(environ + NOT_BUILT, "average", SAMPLES, "-o", "o.h5", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["kernel"] == "numpy"


def test_a_compiled_kernel_that_is_demanded_and_missing_is_an_error(tmp_path: Path) -> None:
    """The error is one line, which says how the kernel is had."""
    code = "import os; os.environ['POLYAK_KERNEL'] = 'compiled'" + NOT_BUILT
    done = scripted(code, "average", SAMPLES, "-o", "o.h5", cwd=tmp_path)
    assert done.returncode == 2
    assert "is not installed; installing polyak compiles it where" in one_line(done.stderr)


def test_a_compiled_kernel_that_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    """Numpy runs, and the reason is that of the system."""
    code = "import os; os.environ.pop('POLYAK_KERNEL', None)" + NOT_LOADED
    done = scripted(code, "-V", "-v", cwd=tmp_path)
    assert "kernel: numpy (the compiled one" in done.stdout
    assert "cannot be loaded: failed to map segment" in done.stdout


def test_the_choice_is_made_by_name() -> None:
    """Nothing set means the fastest kernel that can be had."""
    assert choose_kernel("numpy").NAME == "numpy"
    assert ("compiled" if COMPILED else "numpy") == choose_kernel("").NAME
    with pytest.raises(UsageError, match="set it to numpy"):
        choose_kernel("Numpy")
