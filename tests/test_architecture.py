"""The house of modules: imports point down, and nothing heavy is loaded before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import polyak_cli
from tests.command import unmeasured

PACKAGE = Path(polyak_cli.__file__).parent

#: Module -> what of the package it may import at all, inside functions too.
ALLOWED = {
    "__init__": {
        "averaging",
        "checkpoints",
        "comparison",
        "data",
        "differences",
        "errors",
        "health",
        "inspection",
        "models",
        "recalibration",
        "schemes",
        "statistics",
        "sweeping",
        "verification",
        "watching",
    },
    "__main__": {"cli"},
    "cli": {
        "averaging",
        "checkpoints",
        "cli",
        "comparison",
        "data",
        "differences",
        "errors",
        "formats",
        "health",
        "inspection",
        "models",
        "plots",
        "quiet",
        "reports",
        "recalibration",
        "schemes",
        "sweeping",
        "verification",
        "watching",
    },
    "averaging": {
        "bitwise",
        "checkpoints",
        "data",
        "ema",
        "engine",
        "errors",
        "formats",
        "health",
        "matching",
        "recalibration",
        "records",
        "schemes",
        "tensors",
    },
    "bitwise": {"errors", "tensors"},
    "comparison": {"data", "errors", "models", "statistics"},
    "callbacks": {"averaging", "errors"},
    "watching": {"averaging", "checkpoints", "errors", "formats", "tensors"},
    "differences": {"checkpoints", "engine", "errors", "formats", "matching", "tensors"},
    "health": {"checkpoints", "engine", "errors", "formats", "matching", "tensors"},
    "ema": {"errors", "tensors"},
    "inspection": {"checkpoints", "engine", "errors", "formats", "matching", "tensors"},
    "matching": {"engine", "errors", "tensors"},
    "recalibration": {
        "data",
        "engine",
        "errors",
        "formats",
        "matching",
        "models",
        "records",
        "tensors",
    },
    "records": {"errors"},
    "verification": {
        "averaging",
        "bitwise",
        "checkpoints",
        "engine",
        "errors",
        "formats",
        "matching",
        "recalibration",
        "records",
        "tensors",
    },
    "models": {"data", "errors", "formats", "quiet", "tensors"},
    "data": {"errors", "quiet"},
    "quiet": set(),
    "plots": {"errors"},
    "reports": {"errors", "plots"},
    "sweeping": {
        "averaging",
        "comparison",
        "data",
        "errors",
        "models",
        "recalibration",
        "schemes",
    },
    "checkpoints": {"errors"},
    "schemes": {"errors"},
    "statistics": {"errors"},
    "engine": {"children", "errors", "tensors"},
    "formats": {"children", "errors", "formats", "tensors"},
    "children": {"errors"},
    "tensors": {"errors"},
    "errors": set(),
}
#: Package -> the only modules that may import it.
HOMES = {
    "click": {"cli"},
    "rich": {"cli"},
    "h5py": {"formats"},
    # A callback is a subclass of Keras's; who trains imports it, and nothing of the package does.
    "keras": {"models", "callbacks"},
    "tensorflow": {"models"},
    "matplotlib": {"plots"},
    "sklearn": {"data"},
}


def imports(path: Path) -> set[str]:
    """Return the full names of all modules that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_of(path: Path) -> str:
    """Return the name by which the tables above know a file."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def violations() -> list[str]:
    """Return every import that points up or sideways."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = module_of(path)
        for name in imports(path):
            top, _, rest = name.partition(".")
            target = rest.partition(".")[0]
            inside = target not in ("__version__", "") and top == "polyak_cli"
            if inside and target not in ALLOWED[module]:
                found.append(f"{module} imports {name}")
            if top in HOMES and module not in HOMES[top]:
                found.append(f"{module} imports {name}")
    return found


def test_imports_point_down() -> None:
    """Every module imports only what stands below it, and each package has one home."""
    assert violations() == []


def test_every_module_has_its_place_in_the_table() -> None:
    """A new module must be given a place before it may be used."""
    assert {module_of(path) for path in PACKAGE.rglob("*.py")} <= set(ALLOWED)


def loaded_by(code: str) -> set[str]:
    """Return the top-level packages that a fresh interpreter has loaded after some code."""
    script = f"{code}\nimport sys; print(' '.join({{m.partition('.')[0] for m in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=unmeasured(),
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.splitlines()[-1].split())


HEAVY = {"numpy", "h5py", "rich", "tensorflow", "keras", "sklearn", "matplotlib", "decimal"}


def test_importing_the_package_loads_nothing_heavy() -> None:
    """`import polyak_cli` costs nothing until a name is used."""
    assert not loaded_by("import polyak_cli") & HEAVY


def test_help_loads_nothing_heavy() -> None:
    """`polyak --help` and the help of every command load click alone."""
    code = (
        "from polyak_cli.cli import cli\n"
        "cli.main(['average', '--help'], standalone_mode=False)\n"
        "cli.main(['--help'], standalone_mode=False)"
    )
    assert not loaded_by(code) & HEAVY


def test_averaging_loads_no_framework(tmp_path: Path) -> None:
    """An average is made with numpy and h5py alone, whatever else is installed."""
    samples = PACKAGE.parent / "sample_checkpoints"
    code = (
        f"from polyak_cli import average\n"
        f"average({str(samples)!r}, {str(tmp_path / 'final.h5')!r}, scheme='exp')"
    )
    loaded = loaded_by(code)
    assert "numpy" in loaded
    assert not loaded & (HEAVY - {"numpy", "h5py", "decimal"})


def test_the_check_of_loaded_packages_can_fail() -> None:
    """A package that is imported is seen."""
    assert "decimal" in loaded_by("import decimal") & HEAVY
