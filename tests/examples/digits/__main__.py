"""Train the network of the digits in each regime: `make digits`, or see --help."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tests.examples.digits.experiment import REGIMES, SEEDS, experiment
from tests.examples.digits.in_keras import KERAS
from tests.examples.digits.tables import table

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "tests/examples/results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the regimes, print their tables, write them with all figures."""
    parser = argparse.ArgumentParser(prog="python -m tests.examples.digits", description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, default=ROOT / ".digits", help="where results go")
    asked = parser.parse_args(arguments)
    asked.out.mkdir(parents=True, exist_ok=True)
    results = []
    for regime in REGIMES:
        rows = experiment(KERAS, regime, asked.seeds, asked.out)
        results.append({"regime": asdict(regime), "seeds": asked.seeds, "rows": rows})
        print(f"{table(asdict(regime), rows)}\n", flush=True)
    (asked.out / "digits_keras.json").write_text(json.dumps(results, indent=1) + "\n")
    text = "\n\n".join(table(result["regime"], result["rows"]) for result in results)
    (asked.out / "digits.md").write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
