"""`make test` and `make soak` divide all tests; `make test` shows every promise."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.test_guide import ROOT, named_tests, promises

MAKEFILE = (ROOT / "Makefile").read_text().replace("\\\n", " ")


def recipe(target: str) -> list[str]:
    """Return the commands of a target of the Makefile."""
    match = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert match, target
    return [line.strip() for line in match[1].splitlines()]


def is_soak(decorators: list[ast.expr]) -> bool:
    """Return whether every case of a test is left to `make soak`."""
    return any(ast.unparse(one) == "pytest.mark.soak" for one in decorators)


def shown_by_make_test(path: Path, name: str) -> bool:
    """Return whether `make test` runs a test, or a case of it."""
    body: list[ast.stmt] = ast.parse(path.read_text()).body
    marks = [one.value for one in body if isinstance(one, ast.Assign | ast.AnnAssign) and one.value]
    if any("pytest.mark.soak" in ast.unparse(value) for value in marks):
        return False
    for part in name.split("::"):
        found = [
            one
            for one in body
            if isinstance(one, ast.ClassDef | ast.FunctionDef) and one.name == part
        ]
        if is_soak(found[-1].decorator_list):
            return False
        body = found[-1].body
    return True


def test_no_test_is_in_neither_tier() -> None:
    """One runs all that is not marked `soak`, the other all that is; nothing else is left out."""
    for tier, marked in (("test", "not soak"), ("soak", "soak")):
        run = f'$(BIN)/python -m pytest $(SPREAD) -m "{marked}"'
        assert recipe(tier) == [f"{run} --ignore=tests/keras", f"{run} tests/keras"]
    for name, spread in (("torch", ""), ("remote", " $(SPREAD)")):
        start = f"$({name.upper()})/python -m pytest"
        assert recipe(name) == [f'{start} $(SPREAD) -m "not soak" tests/{name}']
        assert recipe(f"{name}-all") == [f'{start}{spread} -m "soak" tests/{name}']
        for tier, target in (("test", name), ("soak", f"{name}-all")):
            assert re.search(rf"^{tier}:.* {target}(?![\w-])", MAKEFILE, re.MULTILINE)


def test_ci_runs_both_tiers() -> None:
    """What CI runs names both, each by its target."""
    commands = (ROOT / ".ci/run").read_text().splitlines()
    assert {"make test", "make soak"} <= set(commands)


def test_make_test_shows_every_promise() -> None:
    """Each row of the guide's table names a test that is not left to `make soak`."""
    for row in promises():
        shown = [shown_by_make_test(ROOT / path, name) for path, name in named_tests(row[2])]
        assert any(shown), row[0]


def test_what_soak_runs_is_recognised() -> None:
    """The check above can fail."""
    path = ROOT / "tests/test_memory.py"
    assert not shown_by_make_test(path, "test_memory_is_the_same_for_one_tensor_of_2_gb")
    assert shown_by_make_test(path, "test_memory_does_not_grow_with_the_number_of_checkpoints")
    assert not shown_by_make_test(ROOT / "tests/keras/test_seeds.py", "test_any")


def test_the_files_that_an_environment_runs_exist() -> None:
    """A test file that is renamed does not drop out of `make core` and `make oldest`."""
    lists = re.findall(r"patsubst %,tests/test_%.py,([\w\s]+)\)", MAKEFILE)
    assert len(lists) == 4
    for name in " ".join(lists).split():
        assert (ROOT / f"tests/test_{name}.py").is_file(), name
