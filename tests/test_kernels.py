"""Which kernel runs, who decides it, and that both give the same bits."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import polyak_cli
from polyak_cli.engine import numpy_kernel
from polyak_cli.engine.kernel import choose_kernel, find_compiled
from polyak_cli.errors import UsageError
from polyak_cli.storage import Bytes
from polyak_cli.tensors import FLOATS, Float64, itemsize
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


def number_bits(values: Float64) -> list[int]:
    """Return the bits of float64 values, all NaN alike: processors differ in their payload."""
    return [int(bits) for bits in np.where(np.isnan(values), np.nan, values).view(np.uint64)]


@needs_compiled
def test_the_extension_is_of_this_source() -> None:
    """After a change of the C code it has been compiled again."""
    from polyak_cli.engine import _kernel

    source = ROOT / "polyak_cli/engine/_kernel.c"
    assert hashlib.sha256(source.read_bytes()).hexdigest() == _kernel.SOURCE_DIGEST, (
        "compile the kernel again: python .build-hooks/kernel.py"
    )


@needs_compiled
@settings(derandomize=True, deadline=None, max_examples=400)
@given(
    dtype=st.sampled_from([*FLOATS]),
    byteorder=st.sampled_from("<>"),
    codes=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20),
    count=st.one_of(st.integers(0, 40), st.sampled_from([511, 512, 513, 1025])),
    shift=st.integers(0, 7),
    coefficients=st.lists(
        st.lists(st.floats(-4, 4), min_size=3, max_size=3), min_size=1, max_size=3
    ),
    averages=st.integers(1, 3),
)
def test_both_kernels_give_the_same_bits(
    *,
    dtype: str,
    byteorder: str,
    codes: list[int],
    count: int,
    shift: int,
    coefficients: list[list[float]],
    averages: int,
) -> None:
    """For any stored numbers at any address, of any length, and for any number of averages."""
    width = itemsize(dtype)
    numbers = np.resize(np.array(codes, np.uint64).astype(f"{byteorder}u{width}"), count)
    raw = np.zeros(count * width + shift, np.uint8)[shift:]
    raw[:] = numbers.view(np.uint8)
    found = []
    for each in (numpy_kernel, COMPILED):
        assert each
        sums, values = [np.full(count, np.nan) for _ in range(averages)], np.empty(count)
        scratch = values, values if averages == 1 else np.empty(count)
        started = bytearray(averages)
        with np.errstate(all="ignore"):
            for row in coefficients:
                terms = [(k, c) for k, c in enumerate(row[:averages]) if c]
                each.accumulate(raw, dtype, byteorder, terms, sums, started, scratch)
            each.widen(raw, dtype, byteorder, values)
        stored = np.empty(raw.size, np.uint8)
        each.round_to(values, dtype, byteorder, stored)
        found.append((values.tobytes(), stored.tobytes(), started, [*map(number_bits, sums)]))
    assert found[0] == found[1]


@needs_compiled
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("byteorder", "<>")
def test_both_kernels_round_alike(dtype: str, byteorder: str) -> None:
    """At and beside values and middles of any 8 or 16 bits, and for doubles of any exponent."""
    rng = np.random.default_rng(0)
    known = np.empty(65536)
    for number, small in enumerate(("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")):
        codes = np.resize(np.arange(65536), 16384).astype(f"u{itemsize(small)}").view(np.uint8)
        with np.errstate(invalid="ignore"):
            part = known[16384 * number : 16384 * (number + 1)]
            numpy_kernel.widen(codes[: 16384 * itemsize(small)], small, "<", part)
    spread = rng.integers(0, 1 << 64, 65536, np.uint64)
    spread &= ~((np.uint64(1) << rng.integers(0, 52, 65536, np.uint64)) - np.uint64(1))
    wide = spread.view(np.float64)
    with np.errstate(all="ignore"):
        values = [known, wide * 1.0, wide * 2.0**-300, known * 2.0**-10]
        for fraction in (2, 3, 7, 10, 23):
            middles = known * (1 + 2.0 ** -(fraction + 1))
            values += [middles, np.nextafter(middles, np.inf), np.nextafter(middles, -np.inf)]
    every = np.concatenate(values)
    found = []
    for each in (numpy_kernel, COMPILED):
        assert each
        out = np.empty(every.size * itemsize(dtype), np.uint8)
        each.round_to(every, dtype, byteorder, out)
        found.append(out.tobytes())
    assert found[0] == found[1]


@needs_compiled
@given(st.lists(st.floats(width=64), max_size=40), st.floats(0.25, 4))
def test_division_is_that_of_python_and_finds_what_is_not_finite(
    values: list[float], divisor: float
) -> None:
    """Quotients are rounded once; the answer is whether all of them are finite."""
    from polyak_cli.engine import _kernel

    array = np.array(values, np.float64)
    is_finite = _kernel.divide(array, divisor)
    expected = np.array([value / divisor for value in values], np.float64)
    assert number_bits(array) == number_bits(expected)
    assert is_finite == all(map(math.isfinite, expected.tolist()))


@needs_compiled
def test_buffers_that_do_not_match_are_refused() -> None:
    """Nothing outside a buffer is read or written, whatever the caller gives."""
    from polyak_cli.engine import _kernel

    raw, total = np.zeros(12, np.uint8), np.zeros(3)
    odd = np.zeros(25, np.uint8)[1:].view(np.float64)
    fixed = np.zeros(3)
    fixed.flags.writeable = False
    scratch = total, total

    def add(*, raw: Bytes = raw, dtype: str = "float32", row: int = 0, total: Any = total) -> None:
        _kernel.accumulate(raw, dtype, "<", [(row, 1.0)], [total], bytearray(1), scratch)

    for first, second in ((raw[:11], total), (raw, total[:2]), (raw[:8], total), (raw, odd)):
        with pytest.raises(ValueError, match="float"):
            add(raw=first, total=second)
        with pytest.raises(ValueError, match="float"):
            _kernel.widen(first, "float32", "<", second)
        with pytest.raises(ValueError, match="float"):
            _kernel.round_to(second, "float32", "<", first)
    for name, order in (("float128", "<"), ("float32", "|"), ("", "")):
        with pytest.raises(ValueError, match="12 bytes are no"):
            _kernel.widen(raw, name, order, total)
    for row in (-1, 1, 1 << 40):
        with pytest.raises(ValueError, match="there is no sum"):
            add(row=row)
    for unfit in (fixed, np.zeros(6)[::2], "text", None):
        with pytest.raises((TypeError, ValueError, BufferError)):
            add(total=unfit)
    with pytest.raises(ValueError, match="aligned"):
        _kernel.divide(odd, 2.0)
    unfit_terms: Any
    for unfit_terms in (None, [None], [(0,)], [("0", 1.0)], 5):
        with pytest.raises((TypeError, SystemError)):
            _kernel.accumulate(raw, "float32", "<", unfit_terms, [total], bytearray(1), scratch)
    for few in ([], [total]):
        with pytest.raises((ValueError, IndexError)):
            _kernel.accumulate(raw, "float32", "<", [(1, 1.0)], few, bytearray(2), scratch)
