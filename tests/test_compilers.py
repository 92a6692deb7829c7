"""Every C compiler takes the kernel without a warning, and none fuses a product with a sum.

A compiler that is not here is skipped; `make compilers` installs them.
"""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.command import ROOT

HOOK = runpy.run_path(str(ROOT / ".build-hooks/kernel.py"))
#: Compiler -> its disassembler, and flags with which its target has fused instructions.
COMPILERS = {
    "gcc": ("objdump", ["-march=haswell"]),
    "clang": ("objdump", ["-march=haswell"]),
    "aarch64-linux-gnu-gcc": ("aarch64-linux-gnu-objdump", []),
}
#: x86: vfmadd213sd, vfnmsub231pd, ...; Arm: fmadd, fnmsub, fmla, fmls.
FUSED = re.compile(r"\t(v?fn?m(add|sub)\w*|fml[as]\w*)\s")


def translate(compiler: str, folder: Path, *more: str) -> Path:
    """Return the object that a compiler makes of the kernel, with the flags of the build."""
    objects, flags = COMPILERS[compiler]
    if shutil.which(compiler) is None or shutil.which(objects) is None:
        pytest.skip(f"{compiler} is not installed; `make compilers` installs it")
    result = folder / "kernel.o"
    done = subprocess.run(
        [
            *(compiler, *HOOK["FLAGS"], "-fPIC", "-Wall", "-Wextra", "-Werror", *flags, *more),
            *("-DPy_LIMITED_API=0x030B0000", f"-I{sysconfig.get_path('include')}"),
            *("-c", str(ROOT / HOOK["SOURCE"]), "-o", str(result)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return result


def find_fused(compiler: str, made: Path) -> list[str]:
    """Return the fused instructions in an object."""
    objects, _ = COMPILERS[compiler]
    listing = subprocess.run([objects, "-d", made], capture_output=True, text=True, check=True)
    assert "<PyInit__kernel>:" in listing.stdout
    return [match[1] for match in FUSED.finditer(listing.stdout)]


@pytest.mark.parametrize("compiler", COMPILERS)
def test_no_warning_and_nothing_fused(compiler: str, tmp_path: Path) -> None:
    """The strictest reading of the source passes, and products are rounded before they are added.

    64-bit Arm always has fused instructions, and x86 has them since Haswell.
    """
    assert find_fused(compiler, translate(compiler, tmp_path)) == []


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_fused_instruction_is_seen(compiler: str, tmp_path: Path) -> None:
    """The check above can fail: without the flag of the build, these compilers do fuse."""
    assert find_fused(compiler, translate(compiler, tmp_path, "-ffp-contract=fast"))
