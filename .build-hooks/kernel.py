"""Compile the kernel when the package is built, if there is a C compiler; else build without it.

Hatchling runs this for wheels and for editable installs; run as a script, it compiles the kernel
into the clone.  An installation must not fail for want of a compiler: numpy does the same work.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sys
import sysconfig
import tempfile
import textwrap
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.builders.wheel import WheelBuilderConfig

SOURCE = Path("polyak_cli", "engine", "_kernel.c")
#: The file name of an extension that serves this and every later version of Python.
TARGET = SOURCE.with_suffix(".abi3.so")
#: The oldest Python that has what the C code uses: its limited API has buffers since 3.11.
OLDEST = (3, 11)
# No fused multiply-add, and no reordered sums, whatever CFLAGS of the caller say.
FLAGS = ["-std=c11", "-O3", "-fno-fast-math", "-ffp-contract=off", "-fvisibility=hidden"]
# With fast-math, GCC links code that makes subnormals 0 in every process that loads it.
LINKING = ["-O3", "-fno-fast-math", "-fno-unsafe-math-optimizations"]


class KernelError(Exception):
    """The kernel cannot be compiled; the message says why."""


def compile_kernel(root: Path, folder: Path) -> Path:
    """Compile the kernel and return the extension, which lies in a folder.

    Args:
        root: the clone or the unpacked source distribution.
        folder: for the extension and what the compiler leaves behind.

    Raises:
        KernelError: there is no compiler, or it fails.
    """
    if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise KernelError("this Python has no stable ABI")
    try:
        from setuptools import Distribution, Extension
    except ImportError:
        raise KernelError("setuptools, which calls the C compiler, is not installed") from None
    digest = hashlib.sha256((root / SOURCE).read_bytes()).hexdigest()
    version = f"0x{OLDEST[0]:02X}{OLDEST[1]:02X}0000"
    extension = Extension(
        "_kernel",
        [str(root / SOURCE)],
        define_macros=[("Py_LIMITED_API", version), ("SOURCE_DIGEST", f'"{digest}"')],
        extra_compile_args=FLAGS,
        extra_link_args=LINKING,
        py_limited_api=True,
    )
    command: Any = Distribution({"ext_modules": [extension]}).get_command_obj("build_ext")
    command.build_lib, command.build_temp = str(folder), str(folder / "objects")
    try:
        command.ensure_finalized()
        command.run()
    except Exception as error:  # compilers fail in as many ways as there are compilers
        # The message may hold the whole command; what the compiler said is above it.
        raise KernelError(textwrap.shorten(str(error) or type(error).__name__, 150)) from None
    built = Path(command.get_ext_fullpath("_kernel"))
    if not built.is_file():  # as with CC=true
        raise KernelError("the C compiler reports success, and has made nothing")
    return built


def compile_in_place(root: Path) -> None:
    """Compile the kernel into the package of a clone, for an editable install.

    Raises:
        KernelError: as `compile_kernel`.  An older extension is removed then: its source is gone.
    """
    target = root / TARGET
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".kernel-") as folder:
            # Renamed and not overwritten: a running process may have the older one mapped.
            compile_kernel(root, Path(folder)).replace(target)
    except (KernelError, OSError) as error:  # OSError as in a clone that is mounted read-only
        with contextlib.suppress(OSError):
            target.unlink(missing_ok=True)
        if isinstance(error, KernelError):
            raise
        raise KernelError(f"it cannot be put beside its source: {error}") from None


class KernelHook(BuildHookInterface[WheelBuilderConfig]):
    """Adds the compiled kernel to a wheel, whose tag then names the platform."""

    folder: str | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """See `BuildHookInterface.initialize`."""
        root = Path(self.root)
        try:
            if version == "editable":
                compile_in_place(root)
                return
            self.folder = tempfile.mkdtemp(prefix="polyak-")
            built = compile_kernel(root, Path(self.folder))
        except KernelError as error:
            self.app.display_warning(f"polyak: no compiled kernel, numpy is used instead: {error}")
            return
        build_data["force_include"][str(built)] = TARGET.as_posix()
        # Hatchling's tag for this platform, which minds what macOS builds are told by variables.
        builder: Any = self.build_config.builder
        platform = builder.get_best_matching_tag().rpartition("-")[2]
        build_data["tag"] = f"cp{OLDEST[0]}{OLDEST[1]}-abi3-{platform}"
        build_data["pure_python"] = False

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002 (an interface)
        """See `BuildHookInterface.finalize`."""
        if self.folder:
            shutil.rmtree(self.folder)


if __name__ == "__main__":
    compile_in_place(Path(__file__).parents[1])
