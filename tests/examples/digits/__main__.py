"""Train the network of the digits in each regime: `make digits`, or see --help.

The results of a framework go to a file of their own; the tables show those of all that are there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.examples.digits import tables
from tests.examples.digits.experiment import REGIMES, SEEDS, experiment
from tests.examples.digits.in_keras import KERAS
from tests.examples.digits.in_torch import TORCH

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "tests/examples/results"
FRAMEWORKS = {"keras": KERAS, "torch": TORCH}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all regimes in one framework; write all figures, and the tables of both frameworks."""
    parser = argparse.ArgumentParser(prog="python -m tests.examples.digits", description=__doc__)
    parser.add_argument("framework", choices=FRAMEWORKS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, default=ROOT / ".digits", help="where results go")
    asked = parser.parse_args(arguments)
    asked.out.mkdir(parents=True, exist_ok=True)
    results = []
    for regime in REGIMES:
        rows = experiment(FRAMEWORKS[asked.framework], regime, asked.seeds, asked.out)
        results.append({"regime": asdict(regime), "seeds": asked.seeds, "rows": rows})
    (asked.out / f"digits_{asked.framework}.json").write_text(json.dumps(results, indent=1) + "\n")
    text = tables.make_page(read(asked.out))
    (asked.out / "digits.md").write_text(text)
    print(text, end="")
    return 0


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the results that are in a folder: name of a framework -> one of each regime."""
    files = {one.name: folder / f"digits_{key}.json" for key, one in FRAMEWORKS.items()}
    return {name: json.loads(path.read_text()) for name, path in files.items() if path.exists()}


if __name__ == "__main__":
    sys.exit(main())
