"""README and guide tell the truth: their examples run, and what they say of commands is there."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from polyak_cli.averaging.schemes import SCHEMES
from polyak_cli.cli import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "polyak_cli/guide").glob("*.md"))]
README = "\n".join(page.read_text() for page in PAGES)
PROMISES = (ROOT / "polyak_cli/guide/exactness.md").read_text()
HAS_KERAS = importlib.util.find_spec("tensorflow") is not None


def blocks(language: str) -> list[str]:
    """Return the code blocks of one language in README and guide."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def without_keras(script: str) -> str:
    """Remove the commands that need an extra that is not installed here."""
    lines = script.splitlines(keepends=True)
    commands = tuple(f"polyak {name} " for name in ("evaluate", "recalibrate", "sweep", "train"))
    return "".join(line for line in lines if not line.startswith(commands))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the sample checkpoints, as a clone has them."""
    shutil.copytree(ROOT / "sample_checkpoints", tmp_path / "sample_checkpoints")
    return tmp_path


def run(command: list[str], folder: Path) -> str:
    """Run a command as a user would, who has polyak on the PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_shell_and_python_examples() -> None:
    """The tests below do not run over nothing."""
    assert len(blocks("sh")) >= 2
    assert len(blocks("python")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("script", blocks("sh"), ids=lambda s: s.split("\n", 1)[0][:40])
def test_shell_examples_run(folder: Path, script: str) -> None:
    """Every shell block runs to its end, every command with exit code 0, and writes its outputs."""
    script = script if HAS_KERAS else without_keras(script)
    run(["bash", "-euc", script], folder)
    outputs = re.findall(r"-o (\S+)", re.sub(r"#.*", "", script))
    for output in (folder / name for name in outputs):
        written = [*output.iterdir()] if output.is_dir() else [output]
        assert min(path.stat().st_size for path in written) > 1_000


def test_the_python_example_runs_and_prints_what_it_says(folder: Path) -> None:
    """The API's example works as it stands."""
    shutil.copytree(folder / "sample_checkpoints", folder / "ckpts")
    printed = run([sys.executable, "-c", blocks("python")[0]], folder)
    assert "model_495.h5" in printed
    assert (folder / "from_python.h5").exists()


def test_every_command_and_scheme_is_in_the_readme() -> None:
    """Nothing that the program can do is left out of its tables."""
    for name in cli.commands:
        assert f"`polyak {name}" in README
    for name in SCHEMES:
        assert f"`{name}" in README


def test_every_option_the_readme_names_exists() -> None:
    """An option that was renamed or removed does not live on in the text."""
    known = {
        option
        for command in cli.commands.values()
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for option in parameter.opts
    }
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert named - known <= {"--help"}


def promises() -> list[list[str]]:
    """Return the cells of each row of the table of promises."""
    rows = [line.strip("|").split("|") for line in PROMISES.splitlines() if line.startswith("|")]
    return rows[2:]


def named_tests(text: str) -> list[tuple[str, str]]:
    """Return (file or folder, name in it or nothing) of all that a text names below tests/."""
    found = []
    path = ""
    for named in re.findall(r"tests/[\w/.-]+(?:::\w+)*|(?<=`)(?:::\w+)+", text):
        file, _, name = named.partition("::")
        path = file or path
        found.append((path, name))
    return found


def defines(path: Path, name: str) -> bool:
    """Return whether a file defines a function, or a method by ``Class::method``."""
    body: list[ast.stmt] = ast.parse(path.read_text()).body
    for part in name.split("::"):
        inside = [d for d in body if isinstance(d, ast.ClassDef | ast.FunctionDef)]
        named = [d for d in inside if d.name == part]
        if not named:
            return False
        body = named[-1].body
    return True


def test_every_test_that_the_readme_names_exists() -> None:
    """A promise does not outlive the test that keeps it."""
    for path, name in named_tests(README):
        assert (ROOT / path).exists(), path
        assert not name or defines(ROOT / path, name), f"{path}::{name}"


def test_every_promise_is_kept_by_a_test() -> None:
    """Each row of the table has its three cells, and names a test by file and name."""
    assert len(promises()) >= 10
    for row in promises():
        assert len(row) == 3, row
        assert all(name for _, name in named_tests(row[2])), row[0]
        assert named_tests(row[2]), row[0]
