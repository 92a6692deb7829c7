"""What is built and installed, with a C compiler and without, and what a clone holds."""

from __future__ import annotations

import errno
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

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
    assert names(extras["orbax"]) == {"zstandard"}
    assert names(extras["remote"]) == {"obstore"}
    assert names(extras["s3"]) == {"polyak[remote]", "boto3"}
    assert names(extras["dask"]) == {"distributed"}
    assert names(extras["mpi"]) == {"mpi4py"}
    assert extras["all"] == ["polyak[tensorflow,plot,orbax,s3,dask]"]
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


def build(target: str, folder: Path, root: Path = ROOT, **environ: str) -> tuple[Path, str]:
    """Build a wheel or a source distribution, and return it with what was said."""
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)],
        cwd=root,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (built,) = [path for path in folder.iterdir() if path.is_file()]
    return built, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel of this clone, with the compiled kernel where there is a compiler."""
    built, _ = build("wheel", tmp_path_factory.mktemp("wheel"))
    return built


def unpack(wheel: Path) -> Path:
    """Return a folder with the files that a wheel installs."""
    folder = wheel.parent / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """Return a folder with the files that the wheel of this clone installs."""
    return unpack(wheel)


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


@pytest.mark.soak
def test_the_short_name_has_the_callbacks(installed: Path) -> None:
    """`polyak.callbacks` names the same classes, so that isinstance() and pickles agree."""
    pytest.importorskip("keras")
    code = (
        "import polyak.callbacks as short, polyak_cli.callbacks as long\n"
        "assert short.__all__ == long.__all__\n"
        "print([getattr(short, n) is getattr(long, n) for n in long.__all__])"
    )
    assert python(code, installed, "-c") == "[True, True, True]\n"


# --- the compiled kernel --------------------------------------------------------------------------

#: What compiles extensions for this Python, where it is installed.
COMPILER = shutil.which((os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0])
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler here")
EXTENSION = "polyak_cli/engine/_kernel.abi3.so"
#: Prints which kernel an unpacked wheel uses, and an average's digest.
USE = (
    "import hashlib, pathlib, polyak_cli, polyak_cli.engine.kernel as kernel\n"
    "polyak_cli.average({samples!r}, {output!r}, scheme='exp', force=True)\n"
    "print(kernel.NAME, hashlib.sha256(pathlib.Path({output!r}).read_bytes()).hexdigest())"
)


def use(installed: Path) -> list[str]:
    """Return which kernel an unpacked wheel uses, and the digest of an average by it."""
    output = installed.parent / "o.h5"
    code = USE.format(samples=str(ROOT / "sample_checkpoints"), output=str(output))
    kept = {key: value for key, value in environment().items() if key != "POLYAK_KERNEL"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=installed,
        env=kept | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def about(wheel: Path) -> str:
    """Return what a wheel says about itself."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/WHEEL")]
        return archive.read(name).decode()


def test_a_wheel_without_a_compiler_has_no_kernel_and_says_so(wheel: Path, tmp_path: Path) -> None:
    """It is a pure one, numpy runs, and it gives the bytes of the other wheel."""
    built, said = build("wheel", tmp_path / "dist", CC="/bin/false")
    assert built.name.endswith("-py3-none-any.whl")
    assert "Root-Is-Purelib: true" in about(built)
    (line,) = [line for line in said.splitlines() if "no compiled kernel" in line]
    assert "polyak: no compiled kernel, numpy is used instead: " in line
    assert "/bin/false" in line
    assert len(line) < 250
    pure = use(unpack(built))
    assert pure[0] == "numpy"
    assert pure[1] == use(unpack(wheel))[1]


@needs_compiler
def test_one_wheel_with_the_kernel_serves_all_versions_of_python(
    wheel: Path, installed: Path
) -> None:
    """Its tag names Python's stable ABI and the platform; the kernel in it runs."""
    version, abi, platform = wheel.name.removesuffix(".whl").split("-")[-3:]
    assert (version, abi) == ("cp311", "abi3")
    assert platform == sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert "Root-Is-Purelib: false" in about(wheel)
    assert f"Tag: cp311-abi3-{platform}" in about(wheel)
    assert (installed / EXTENSION).is_file()
    assert use(installed)[0] == "compiled"


@pytest.mark.soak
def test_a_source_distribution_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    """It holds the C code and what compiles it, and the files of the wheel are the same."""
    packed, _ = build("sdist", tmp_path / "sdist")
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path, filter="data")
    (root,) = tmp_path.glob("polyak-*")
    again, _ = build("wheel", tmp_path / "dist", root)
    assert again.name == wheel.name
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert first.namelist() == second.namelist()
        differing = [name for name in first.namelist() if first.read(name) != second.read(name)]
    # The compiler may have put the folder of the source into the extension.
    assert all(name == EXTENSION or name.endswith("/RECORD") for name in differing)


def hook() -> dict[str, Any]:
    """Return the names of the module that compiles the kernel."""
    return runpy.run_path(str(ROOT / ".build-hooks/kernel.py"))


@needs_compiler
def test_an_editable_install_replaces_the_kernel_or_removes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lies beside its source; where it cannot be compiled again, no older one is left."""
    place = tmp_path / EXTENSION
    place.parent.mkdir(parents=True)
    place.write_bytes(b"of an older source")
    before = place.stat().st_ino
    shutil.copy(ROOT / "polyak_cli/engine/_kernel.c", place.parent)
    hook()["compile_in_place"](tmp_path)
    assert place.read_bytes()[:4] != b"of a"
    # A file that a running process has mapped is never written into.
    assert place.stat().st_ino != before
    assert {path.name for path in place.parent.iterdir()} == {place.name, "_kernel.c"}
    for compiler, what in (("/bin/false", "false"), ("/bin/true", "has made nothing")):
        place.write_bytes(b"of an older source")
        monkeypatch.setenv("CC", compiler)
        with pytest.raises(Exception, match=what):
            hook()["compile_in_place"](tmp_path)
        assert {path.name for path in place.parent.iterdir()} == {"_kernel.c"}


@needs_compiler
@pytest.mark.parametrize("macro", ["__FAST_MATH__", "__FLT_EVAL_METHOD__=2"])
def test_arithmetic_of_other_bits_is_not_compiled(
    macro: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flags of the caller that would change a bit make the build fail, so that numpy is used."""
    monkeypatch.setenv("CFLAGS", f"-D{macro}")
    with pytest.raises(Exception, match="failed"):
        hook()["compile_kernel"](ROOT, tmp_path)


@needs_compiler
@pytest.mark.parametrize(
    "flags",
    [
        "-ffast-math -ffp-contract=fast",
        pytest.param("-Ofast -flto", marks=pytest.mark.soak),
        pytest.param("-funsafe-math-optimizations", marks=pytest.mark.soak),
    ],
)
def test_flags_of_the_caller_do_not_change_the_arithmetic(
    flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last flag counts, and the build has the last word, to the linker too.

    With fast-math, GCC links code that makes subnormal numbers 0 in the whole process.
    """
    monkeypatch.setenv("CFLAGS", flags)
    monkeypatch.setenv("LDFLAGS", flags)
    extension = hook()["compile_kernel"](ROOT, tmp_path)
    load = (
        "import sys; from importlib.util import module_from_spec, spec_from_file_location as find;"
        "module_from_spec(find('polyak_cli.engine._kernel', sys.argv[1]));"
        "print(float(sys.argv[2]) * float(sys.argv[3]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", load, str(extension), "5e-324", "3"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{3 * 5e-324}\n" == "1.5e-323\n"


@needs_compiler
def test_a_clone_that_nobody_may_write_into_is_installed_without_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hook catches this error, warns and goes on, as for want of a compiler."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    names = hook()
    with pytest.raises(names["KernelError"], match=r"beside its source: .*Read-only"):
        names["compile_in_place"](tmp_path)


# --- wheels for other platforms -------------------------------------------------------------------

PLATFORMS = {
    "linux": {
        *("cp311-manylinux_x86_64", "cp311-manylinux_aarch64"),
        *("cp311-musllinux_x86_64", "cp311-musllinux_aarch64"),
    },
    "macos": {"cp311-macosx_x86_64", "cp311-macosx_arm64"},
}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_cibuildwheel_reads_which_wheels_to_build(platform: str) -> None:
    """It takes the table, and would build one wheel for each platform."""
    pytest.importorskip("cibuildwheel")
    command = ["-m", "cibuildwheel", "--platform", platform, "--print-build-identifiers"]
    done = subprocess.run(
        [sys.executable, *command, str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == PLATFORMS[platform]


def test_each_built_wheel_is_tried_with_its_kernel() -> None:
    """What runs after each build demands the compiled kernel, averages and verifies."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    assert table["test-environment"] == {"POLYAK_KERNEL": "compiled"}
    assert [command.split()[1] for command in table["test-command"]] == ["-V", "average", "verify"]
