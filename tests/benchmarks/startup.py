"""Measures how fast a command starts."""

from __future__ import annotations

import sys
from typing import Any

from tests.benchmarks import machine, measure
from tests.benchmarks.compare import Session, polyak
from tests.benchmarks.measure import ROOT, Contender, Reach, ratio

_SAMPLES = ROOT / "sample_checkpoints"


def startup(session: Session) -> dict[str, Any]:
    """Measure `--help` and the sample run against importing what they need."""
    output = session.folder / "output.h5"
    python = sys.executable
    help_ = [python, "-m", "polyak_cli", "--help"]
    everything = "import click, numpy, h5py"
    # As `polyak` does: without BLAS's threads, and without taking the interpreter apart at the end.
    modules = "import os, polyak_cli.cli, polyak_cli.pipeline, h5py; os._exit(0)"
    found = measure.interleaved(
        [
            Contender("python", "python -c pass", [python, "-c", "pass"]),
            Contender("click", "import click", [python, "-c", "import click"]),
            Contender("help", "polyak --help", help_),
            Contender("imports", everything, [python, "-c", everything]),
            Contender(
                "modules",
                "import all that polyak average needs",
                [python, "-c", modules],
                variables={"OPENBLAS_NUM_THREADS": "1"},
            ),
            Contender(
                "samples",
                "polyak average sample_checkpoints",
                polyak([_SAMPLES], output),
                output,
            ),
        ],
        session.rounds,
    )
    for measured in found.values():
        session.say(
            f"{measured.contender.label}: "
            + (measured.error or f"{measured.seconds * 1000:.0f} ms")
        )
    return {
        "title": "Starting",
        "notes": [f"Medians of {session.rounds} interleaved runs."],
        "machine": machine.facts(session.folder),
        "rows": [measured.data() for measured in found.values()],
        "reach": [
            reach.data()
            for reach in (
                Reach("--help against importing click", ratio(found["help"], found["click"]), 1.5),
                Reach(
                    "ten sample files against importing click, numpy and h5py",
                    ratio(found["samples"], found["imports"]),
                    1.8,
                ),
            )
        ],
    }
