"""Runs commands in processes that have Keras imported when they begin.

Each command is a process of its own still, with its own arguments, streams and exit code: it is
forked from one that imports the libraries and does nothing else, so that the seconds which that
takes are spent once and not for every command.  What a start without it shows is tested elsewhere:
the examples of the guide, and whatever `tests.command.polyak` runs.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.command import Done, environment

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.keras.imported"])
#: Seconds that a command may take.
_LONGEST = 120


def polyak(*arguments: object, cwd: Path, environ: Mapping[str, str] | None = None) -> Done:
    """Run a command to its end and return exit code, stdout and stderr."""
    words = [*map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdout", "stderr")]
        variables = environment(**environ or {})
        process = _FORKS.Process(target=_run, args=(words, cwd, variables, streams))
        process.start()
        process.join(_LONGEST)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"polyak {' '.join(words)} takes more than {_LONGEST} seconds")
        return Done(["polyak", *words], process.exitcode, *(path.read_text() for path in streams))


def _run(words: list[str], cwd: Path, variables: dict[str, str], streams: list[Path]) -> None:
    """Become the command."""
    from polyak_cli.cli import main

    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout = open(1, "w")  # noqa: SIM115 (it is open until the command ends)
    sys.stderr = open(2, "w", buffering=1)  # noqa: SIM115
    sys.argv = ["polyak", *words]
    main(words)
