"""The package as Python code meets it: what it exports, and that it keeps silent."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import polyak_cli
from polyak_cli import errors
from tests.api_examples import EXAMPLES, WITH_KERAS
from tests.command import SAMPLES

COMMANDS = {
    "average",
    "check",
    "diff",
    "evaluate",
    "inspect",
    "recalibrate",
    "sweep",
    "train",
    "verify",
    "watch",
}


def test_every_name_can_be_had_and_none_is_a_module_s() -> None:
    """What is exported exists, also after every module was imported, which would hide its name."""
    modules = {module.name for module in pkgutil.iter_modules(polyak_cli.__path__)}
    assert not modules & set(polyak_cli.__all__)
    for module in modules - {"__main__", "callbacks"}:  # which imports a framework
        importlib.import_module(f"polyak_cli.{module}")
    for name in polyak_cli.__all__:
        assert not inspect.ismodule(getattr(polyak_cli, name)), name


def test_type_checkers_know_the_names_that_are_loaded() -> None:
    """The imports for type checkers name each public name, and the module that defines it."""
    tree = ast.parse(Path(polyak_cli.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    found = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        module = (node.module or "").removeprefix("polyak_cli.")
        for alias in node.names:
            assert alias.asname == alias.name  # otherwise the name is not public
            found[alias.name] = module
    assert found == polyak_cli._HOMES
    assert {*polyak_cli.__all__} == found.keys() | {"__version__"}


def test_every_error_and_every_command_with_a_result_is_exported() -> None:
    """Who calls the package can catch each kind of error by its name."""
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type)}
    assert "FormatError" in kinds
    assert kinds | COMMANDS <= set(polyak_cli.__all__)


@pytest.mark.parametrize("name", sorted(COMMANDS | {"plan", "compare"}))
def test_the_documentation_names_arguments_and_errors(name: str) -> None:
    """Every parameter, and what is raised."""
    function = getattr(polyak_cli, name)
    text = inspect.getdoc(function) or ""
    assert "Raises:" in text
    for parameter in inspect.signature(function).parameters:
        assert parameter in text, parameter


def test_a_name_that_is_not_exported_is_an_attribute_error() -> None:
    """As of any module."""
    with pytest.raises(AttributeError, match="no attribute 'avarage'"):
        polyak_cli.avarage  # noqa: B018 - looking is the test


def test_importing_names_of_evaluation_loads_no_framework() -> None:
    """Not even numpy, until a name is used; and no framework before the work begins."""
    code = (
        "import sys, polyak_cli; a = 'numpy' in sys.modules; polyak_cli.evaluate, polyak_cli.Split"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print(a, {{'keras', 'tensorflow'}} & {{*sys.modules}})"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False set()\n"


def test_the_calls_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Plan, average, inspect, diff and distances give their results to the caller alone."""
    made = polyak_cli.plan(SAMPLES, scheme="exp", alpha=2)
    assert len(made.checkpoints) == 10
    output = tmp_path / "final.h5"
    assert polyak_cli.average(SAMPLES, output, last=3).bytes_written == output.stat().st_size
    (found,) = polyak_cli.inspect([output], statistics=True)
    assert found.parameters > 0
    assert polyak_cli.check(SAMPLES).healthy
    assert not polyak_cli.diff(output, SAMPLES / "model_499.h5").equal
    assert len(polyak_cli.distances(polyak_cli.select([SAMPLES])).checkpoints) == 10
    assert tuple(capfd.readouterr()) == ("", "")


# --- the examples of the guide --------------------------------------------------------------------


def run_example(name: str, folder: Path) -> str:
    """Run the example of a name in a folder with the samples; return what differs, or nothing."""
    (folder / "sample_checkpoints").symlink_to(SAMPLES)
    example = doctest.DocTestParser().get_doctest(EXAMPLES[name], {}, name, None, 0)
    found: list[str] = []
    doctest.DocTestRunner(verbose=False).run(example, out=found.append)
    return "".join(found)


def test_every_public_name_has_an_example_that_uses_it() -> None:
    """None is missing, none is left of a name that has gone, and each shows a result."""
    assert EXAMPLES.keys() == {*polyak_cli.__all__} - {"__version__"}
    assert EXAMPLES.keys() >= {*WITH_KERAS}
    results = {"Compared", "Comparison", "Gain", "RowScores", "Score", "Sweep", "TrainReport"}
    results |= {"Checked", "Checkpoint", "Differences", "Discrepancy", "Distances", "Health"}
    results |= {"Geometry", "Inspection", "PassedOver", "Plan", "Problem", "Recalibration"}
    results |= {"Report", "Selection", "Verification"}
    for name, text in EXAMPLES.items():
        lines = text.split()
        assert name in results or any(name in line for line in lines), name
        examples = doctest.DocTestParser().get_examples(text)
        assert any(one.want for one in examples) or name == "MissingExtraError", name


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in WITH_KERAS])
def test_an_example_shows_what_python_shows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Typed as it stands in a folder with the sample checkpoints."""
    monkeypatch.chdir(tmp_path)
    assert run_example(name, tmp_path) == ""


def test_a_wrong_example_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another result than the page's is a difference."""
    monkeypatch.setitem(EXAMPLES, "halves", ">>> 1 + 1\n3\n")
    assert "Got:\n    2" in run_example("halves", tmp_path)
