"""Which kernel runs, who decides it, and that the compiled one gives the bits of plain floats."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import polyak_cli
from polyak_cli.engine.kernel import choose_kernel, find_compiled
from polyak_cli.errors import UsageError
from tests.command import ROOT, SAMPLES, one_line, polyak, scripted

COMPILED, _WHY = find_compiled()
needs_compiled = pytest.mark.skipif(COMPILED is None, reason=f"the compiled kernel is {_WHY}")
KERNELS = ["numpy", pytest.param("compiled", marks=needs_compiled)]

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
    if names and "_kernel" in names:
        raise ImportError("failed to map segment from shared object")
    return load(name, scope, local, names, level)
builtins.__import__ = refuse
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: (
    find("json") if name == "polyak_cli.engine._kernel" else find(name, *more)
)
"""


# --- the choice -----------------------------------------------------------------------------------


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


# --- the compiled kernel --------------------------------------------------------------------------

PATTERNS = st.lists(st.integers(0, 2**32 - 1), max_size=40)
COEFFICIENTS = st.floats(-4, 4).filter(bool)


def as_floats(patterns: list[int]) -> list[float]:
    """Return the float32 that these patterns are, as Python's own floats."""
    return [struct.unpack("<f", struct.pack("<I", bits))[0] for bits in patterns]


def number_bits(values: npt.ArrayLike) -> list[bytes]:
    """Return the bits of float64 values, all NaN alike: processors differ in their payload."""
    array = np.array(values, np.float64)
    array[np.isnan(array)] = np.nan
    return [array[k : k + 1].tobytes() for k in range(array.size)]


@needs_compiled
def test_the_extension_is_of_this_source() -> None:
    """After a change of the C code it has been compiled again."""
    from polyak_cli.engine import _kernel

    source = ROOT / "polyak_cli/engine/_kernel.c"
    assert hashlib.sha256(source.read_bytes()).hexdigest() == _kernel.SOURCE_DIGEST, (
        "compile the kernel again: python .build-hooks/kernel.py"
    )


@needs_compiled
@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.lists(PATTERNS, min_size=1, max_size=3), st.lists(COEFFICIENTS, min_size=3), st.data())
def test_float32_is_added_as_python_adds(
    checkpoints: list[list[int]], coefficients: list[float], data: st.DataObject
) -> None:
    """Each product and each sum is rounded by itself: Python's floats cannot fuse them.

    Stored numbers begin at any address.
    """
    assert COMPILED
    count = min(map(len, checkpoints))
    shift = data.draw(st.integers(0, 7))
    total = np.full(count, np.nan)
    started = bytearray(1)
    expected: list[float] | None = None
    for patterns, c in zip(checkpoints, coefficients, strict=False):
        room = np.zeros(count * 4 + shift, np.uint8)
        raw = room[shift:]
        raw[:] = np.array(patterns[:count], "<u4").view(np.uint8)
        COMPILED.accumulate(raw, "float32", "<", [(0, c)], [total], started, (total, total))
        products = [c * value for value in as_floats(patterns[:count])]
        before = expected
        expected = products if before is None else [a + b for a, b in zip(before, products)]  # noqa: B905
        assert started == b"\x01"
    assert expected is not None
    assert number_bits(total) == number_bits(expected)


@needs_compiled
@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.lists(st.floats(width=64), max_size=40), st.integers(0, 7))
def test_float32_is_rounded_once_as_c_says(values: list[float], shift: int) -> None:
    """Python's `struct` rounds to nearest, ties to even; it refuses what overflows to infinity."""
    assert COMPILED
    room = np.full(len(values) * 4 + shift, 255, np.uint8)
    COMPILED.round_to(np.array(values, np.float64), "float32", "<", room[shift:])
    found = room[shift:].tobytes()
    for k, value in enumerate(values):
        (stored,) = struct.unpack_from("<f", found, 4 * k)
        try:
            expected = struct.unpack("<f", struct.pack("<f", value))[0]
        except OverflowError:
            expected = np.copysign(np.inf, value)
        assert number_bits([stored]) == number_bits([expected])


@needs_compiled
def test_buffers_that_do_not_match_are_refused() -> None:
    """Nothing outside a buffer is read or written, whatever the caller gives."""
    from polyak_cli.engine import _kernel

    raw, total = np.zeros(12, np.uint8), np.zeros(3)
    odd = np.zeros(25, np.uint8)[1:].view(np.float64)
    for first, second in ((raw[:11], total), (raw, total[:2]), (raw[:8], total), (raw, odd)):
        with pytest.raises(ValueError, match="float64"):
            _kernel.accumulate(first, 1.0, second, False)
        with pytest.raises(ValueError, match="float64"):
            _kernel.round_to(second, first)
    fixed = np.zeros(3)
    fixed.flags.writeable = False
    for unfit in (fixed, np.zeros(6)[::2]):
        with pytest.raises(TypeError, match="read-write bytes-like"):
            _kernel.accumulate(raw, 1.0, unfit, False)
