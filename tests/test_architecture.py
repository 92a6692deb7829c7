"""The house of modules: imports point down, and nothing heavy is loaded before it is needed."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.command import unmeasured
from tests.source import PACKAGE, Source, sources

#: Room -> the rooms that it may import, inside functions too; its own modules it always may.
ALLOWED = {
    "__main__": {"cli"},
    "cli": {
        "averaging",
        "checkpoints",
        "engine",  # which kernel does the arithmetic
        "errors",
        "evaluation",
        "examining",
        "formats",
        "pipeline",
    },
    "callbacks": {"pipeline"},
    "polyak": {"callbacks"},
    "pipeline": {
        "averaging",
        "checkpoints",
        "engine",  # which kernel does the arithmetic
        "errors",
        "evaluation",
        "examining",
        "formats",
        "storage",
        "tensors",
    },
    "evaluation": {
        "averaging",
        "checkpoints",  # how a folder is opened
        "engine",
        "errors",
        "formats",
        "storage",
        "tensors",
    },
    "examining": {
        "averaging",
        "checkpoints",
        "engine",
        "errors",
        "evaluation",  # statistics that were computed from data are compared with their record
        "formats",
        "storage",
        "tensors",
    },
    "averaging": {"checkpoints", "engine", "errors", "formats", "storage", "tensors"},
    "engine": {"errors", "processes", "storage", "tensors"},
    "formats": {"errors", "processes", "storage", "tensors"},
    "tensors": {"errors", "storage"},
    "checkpoints": {"errors", "formats", "storage"},
    "storage": {"errors", "processes"},
    "processes": {"errors"},
    "errors": set[str](),
}
#: The public names come from everywhere, each loaded when it is first used.
ALLOWED["__init__"] = set(ALLOWED) - {"__main__", "cli", "callbacks", "polyak"}
#: Package -> the only modules, or rooms, that may import it.
HOMES = {
    "click": {"cli"},
    "rich": {"cli"},
    "h5py": {"formats.hdf5"},
    # A callback is a subclass of Keras's; who trains imports it, and nothing of the package does.
    "keras": {"evaluation", "pipeline.callback", "pipeline.swa"},
    "tensorflow": {"evaluation"},
    "torch": {"evaluation.torch_modules", "evaluation.torch_batchnorm"},
    "matplotlib": {"evaluation.plots"},
    "jinja2": {"evaluation.reports"},
    "google_crc32c": {"formats.checksums", "engine.sums"},
    "dask": {"engine.clusters"},
    "distributed": {"engine.clusters"},
    "mpi4py": {"engine.clusters"},
    # A process that has used it must not fork.
    "obstore": {"storage.objects", "storage.blobs"},
    "boto3": {"storage.objects", "storage.s3"},
    "botocore": {"storage.objects", "storage.s3"},
}


def violations(files: Iterable[Source]) -> list[str]:
    """Return every import that the two tables above do not allow."""
    found = []
    for file in files:
        for name in sorted(file.imports()):
            top, _, rest = name.partition(".")
            room = rest.partition(".")[0]
            names = ("__version__", "__all__", "*", "")  # of the package itself
            inside = top == "polyak_cli" and room not in (*names, file.room)
            if inside and room not in ALLOWED[file.room]:
                found.append(f"{file.name} imports {name}")
            if top in HOMES and not any(f"{file.name}.".startswith(f"{h}.") for h in HOMES[top]):
                found.append(f"{file.name} imports {name}")
    return found


def test_imports_point_down() -> None:
    """Every room imports only what stands below it, and each package has one home."""
    assert violations(sources()) == []


def test_every_room_has_its_place_in_the_table() -> None:
    """A new room must be given a place before it may be used, and none stays that is gone."""
    assert {file.room for file in sources()} == set(ALLOWED)


def test_the_table_of_rooms_has_no_circle() -> None:
    """If a room may import another, that one may not import it, not by way of others either."""
    assert tuple(graphlib.TopologicalSorter(ALLOWED).static_order())


def test_an_import_that_points_up_is_seen() -> None:
    """The check of imports fails where a lower room imports a higher one, or a foreign package."""
    up = Source("storage.local", "def read():\n    from polyak_cli.engine import folding\n")
    foreign = Source("engine.kernel", "import h5py\n")
    assert violations([up]) == ["storage.local imports polyak_cli.engine.folding"]
    assert violations([foreign]) == ["engine.kernel imports h5py"]


def module_imports(file: Source, names: set[str]) -> set[str]:
    """Return the modules of the package that a file imports when it is itself imported."""
    found = set()
    for node in file.tree.body:  # neither inside functions nor under TYPE_CHECKING
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                full = f"{node.module}.{alias.name}".removeprefix("polyak_cli.")
                inside = full if full in names else full.rpartition(".")[0]
                found |= {inside} & names
    return found - {file.name}


def test_no_modules_import_each_other_in_a_circle() -> None:
    """The modules can be put in an order in which each imports only earlier ones."""
    files = sources()
    names = {file.name for file in files}
    graph = {file.name: module_imports(file, names) for file in files}
    assert len(tuple(graphlib.TopologicalSorter(graph).static_order())) == len(files)


# --- who opens files ------------------------------------------------------------------------------

#: Calls that open a file by its path.
OPENERS = {
    "open",
    "os.open",
    "io.open",
    "zipfile.ZipFile",
    "np.load",
    "np.savez",
    "h5py.File",
    "h5py.h5f.open",
    "h5py.h5f.create",
    "h5f.open",
    "h5f.create",
}
#: Methods of paths that do so.
METHODS = {"read_text", "read_bytes", "write_text", "write_bytes"}
#: Module -> why it may open files itself.
EXCEPTIONS = {
    "engine.timing": "/proc/self/status is the system's answer, and no file of bytes",
    "checkpoints.metrics": "a CSV log is text that Python's csv module reads",
    "cli": "standard streams that were closed are opened on /dev/null",
    "cli.guide": "the pages of the guide are texts of the package",
    "cli.rendering": "a broken pipe is replaced by /dev/null",
    "evaluation.data": "data sets are read by numpy, csv and Python's import",
    "evaluation.keras_files": "zipfile is given a stream that storage has opened",
    "evaluation.plots": "pictures are for people",
    "evaluation.quiet": "what a framework prints is held back in a temporary file",
    "evaluation.reports": "reports are texts for people",
    "formats.hdf5.chunks": "h5py's LZF needs a file in memory",
    "formats.hdf5.library": "libhdf5 opens a file by its name",
    "formats.hdf5.skeleton": "libhdf5 creates a file by its name",
    "formats.hdf5.weights_files": "libhdf5 creates a file inside one that storage has opened",
    "formats.torch.archive": "zipfile is given a stream that storage has opened",
    "formats.zips": "zipfile is given a stream that storage has opened",
    "processes.sandbox": "/dev/null, and the system's answer in /proc/self/statm",
}


def openings(file: Source) -> Iterator[str]:
    """Yield each call in a file that opens another by its path."""
    for node in file.nodes:
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        method = called.rpartition(".")[2] if "." in called else ""
        path_opened = method == "open" and called.rpartition(".")[0].lower().endswith("path")
        if called in OPENERS or method in METHODS or path_opened:
            yield f"{file.name}:{node.lineno} {called}"


def test_only_storage_opens_files_by_path() -> None:
    """Whatever reads or writes bytes goes through `storage`, except where a reason is named."""
    found = [
        opening
        for file in sources()
        if file.room != "storage" and file.name not in EXCEPTIONS
        for opening in openings(file)
    ]
    assert found == []


@pytest.mark.parametrize("module", EXCEPTIONS)
def test_an_exception_is_one(module: str) -> None:
    """A module that opens no file any more needs no exception."""
    (file,) = [file for file in sources() if file.name == module]
    assert [*openings(file)]


def test_the_check_of_openings_can_fail() -> None:
    """Each way to open a file is seen."""
    text = "os.open(path, 0)\npath.read_text()\nwith open(path) as f: pass\nself.path.open('rb')\n"
    assert len([*openings(Source("engine.reading", text))]) == 4


# --- what is loaded -------------------------------------------------------------------------------


def modules_loaded_by(code: str) -> set[str]:
    """Return the modules that a fresh interpreter has loaded after some code."""
    script = f"{code}\nimport sys; print(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=unmeasured(),
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.splitlines()[-1].split())


def loaded_by(code: str) -> set[str]:
    """Return the top-level packages that a fresh interpreter has loaded after some code."""
    return {module.partition(".")[0] for module in modules_loaded_by(code)}


HEAVY = {
    "numpy",
    "h5py",
    "rich",
    "tensorflow",
    "keras",
    "torch",
    "sklearn",
    "matplotlib",
    "jinja2",
    "google_crc32c",
    "decimal",
    "obstore",
    "boto3",
}


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


def test_averaging_local_files_loads_nothing_of_the_network(tmp_path: Path) -> None:
    """Who averages local files does not wait for modules that read or write buckets."""
    samples, output = PACKAGE.parent / "sample_checkpoints", tmp_path / "final.h5"
    code = f"from polyak_cli import average\naverage({str(samples)!r}, {str(output)!r})"
    network = {
        "gateway",
        "mirrored",
        "messages",
        "objects",
        "uploads",
        "s3",
        "blobs",
        "sending",
        "listings",
    }
    loaded = modules_loaded_by(code)
    assert "polyak_cli.storage.mirrors" in loaded
    assert not loaded & {f"polyak_cli.storage.{one}" for one in network}
