"""Runs the command line as a user does: a process, its exit code, its two streams."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polyak_cli
from tests.warm import Warm

ROOT = Path(polyak_cli.__file__).parents[1]
SAMPLES = ROOT / "sample_checkpoints"
#: What starts the program; its arguments follow.
POLYAK = [sys.executable, "-m", "polyak_cli"]
#: Variables of the caller that would change what is printed, or when.
_CALLER = {"COLUMNS", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TERM", "PYTHONUNBUFFERED"}

#: Stops after a function is done, says so, and waits until a line comes in.
PAUSE = """
import sys
import polyak_cli.{module} as module
original = module.{function}
def pausing(*arguments, **options):
    value = original(*arguments, **options)
    print("pausing", flush=True)
    sys.stdin.readline()
    return value
module.{function} = pausing
"""

Done = subprocess.CompletedProcess[str]
#: How variables begin that the program reads while it runs, and nothing while it is imported.
_READ_LATE = (
    "AWS_",
    "AZURE_",
    "COLUMNS",
    "GOOGLE_",
    "HF_",
    "NO_COLOR",
    "PYTEST_",
    "STORAGE_",
    "TERM",
)
#: Seconds that a command may take.
LONGEST = 120
_WARM = Warm("tests.imported")

#: Path below a folder -> its bytes, or what else it is.
Tree = dict[str, bytes | str]


def environment(**more: str) -> dict[str, str]:
    """Return an environment in which the package is found from every folder."""
    kept = {name: value for name, value in os.environ.items() if name not in _CALLER}
    return kept | {"PYTHONPATH": str(ROOT), "TERM": "xterm"} | more


def unmeasured() -> dict[str, str]:
    """Return this process's environment without what has coverage, and all it needs, loaded."""
    return {name: value for name, value in os.environ.items() if name != "COVERAGE_PROCESS_CONFIG"}


def polyak(
    *arguments: object, cwd: Path, environ: Mapping[str, str] | None = None, **options: Any
) -> Done:
    """Run a command to its end and return exit code, stdout and stderr.

    The command is forked from a process that has imported the program.  With options, or with
    variables that matter to imports, it is started by `fresh`.
    """
    now, begun = {**os.environ, **(environ or {})}, _find_begun()
    changed = {name for name in now.keys() | begun.keys() if now.get(name) != begun.get(name)}
    if options or not all(name.startswith(_READ_LATE) for name in changed):
        return fresh(*arguments, cwd=cwd, environ=environ, **options)
    return _WARM.run([*map(str, arguments)], cwd, environment(**environ or {}), LONGEST)


@functools.cache
def _find_begun() -> dict[str, str]:
    """Return the environment of the first command, in which the program is imported."""
    return dict(os.environ)


def fresh(
    *arguments: object, cwd: Path, environ: Mapping[str, str] | None = None, **options: Any
) -> Done:
    """Do the same from the start, as a shell does."""
    return subprocess.run(
        [*POLYAK, *map(str, arguments)],
        cwd=cwd,
        env=environment(**environ or {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=LONGEST,
        **options,
    )


def scripted(
    code: str,
    *arguments: object,
    cwd: Path,
    prepare: Callable[[], None] | None = None,
) -> Done:
    """Run a command in a process that first executes some code, as a saboteur would."""
    return subprocess.run(
        script(code, *arguments),
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=LONGEST,
        preexec_fn=prepare,
    )


def script(code: str, *arguments: object) -> Sequence[str]:
    """Return the command of `scripted`."""
    whole = f"{code}\nimport sys\nfrom polyak_cli.cli import main\nmain(sys.argv[1:])"
    return [sys.executable, "-c", whole, *map(str, arguments)]


def stopped(code: str, *arguments: object, cwd: Path) -> Any:
    """Start a command whose code has a `PAUSE`, and return it when it has come there."""
    process = subprocess.Popen(
        script(code, *arguments),
        cwd=cwd,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "pausing\n"
    return process


def tree(folder: Path) -> Tree:
    """Return all that a folder holds, hidden files too."""
    found: Tree = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_file():
            found[name] = path.read_bytes()
        else:
            found[name] = "folder"
    return found


def one_line(text: str) -> str:
    """Return the one line that stderr holds, without ``error: ``."""
    lines = text.splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("error: "), text
    assert text.endswith("\n")
    return lines[0].removeprefix("error: ")
