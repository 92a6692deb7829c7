"""The two short experiments: how fast a command starts, and how fast it reads from the disk."""

from __future__ import annotations

import sys
from typing import Any

from tests.benchmarks import machine, material, measure
from tests.benchmarks.compare import Session, floor, polyak
from tests.benchmarks.material import MB, Material
from tests.benchmarks.measure import ROOT, Contender, Reach, ratio

_SAMPLES = ROOT / "sample_checkpoints"


def startup(session: Session) -> dict[str, Any]:
    """Measure `--help` and the sample run against importing what they need."""
    output = session.folder / "output.h5"
    python = sys.executable
    help_ = [python, "-m", "polyak_cli", "--help"]
    everything = "import click, numpy, h5py"
    found = measure.interleaved(
        [
            Contender("click", "import click", [python, "-c", "import click"]),
            Contender("help", "polyak --help", help_),
            Contender("imports", everything, [python, "-c", everything]),
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


def cold(session: Session, files: int, nbytes: int) -> dict[str, Any]:
    """Measure averaging against reading alone, the inputs dropped from the page cache.

    What lies below, such as the cache of a virtual machine's host, cannot be dropped from here.
    """
    session.say(f"making {files} checkpoints of {nbytes / MB:,.0f} MB")
    made = material.make(Material(files, nbytes), session.folder / "inputs")
    left: list[float | None] = []

    def drop() -> None:
        machine.drop(made.paths)
        left.append(machine.resident(made.paths))

    output = session.folder / "output.h5"
    ours = polyak(made.paths, output, "--quiet", "--jobs", session.jobs)
    found = measure.interleaved(
        [
            Contender("floor", "reading the inputs alone", floor(made.paths, None)),
            Contender("polyak", "polyak average", ours, output),
        ],
        session.rounds,
        before=drop,
        say=session.say,
    )
    known = [share for share in left if share is not None]
    note = (
        f"Ahead of each run the page cache held at most {max(known, default=1):.1%} of the inputs."
    )
    if len(known) < len(left):
        note = "Whether the inputs left the page cache is unknown."
    elif max(known, default=1) > 0.05:
        note = f"THE INPUTS DID NOT LEAVE THE PAGE CACHE: these figures are not cold. {note}"
    return {
        "title": f"{files} checkpoints of {made.nbytes / MB:,.0f} MB, page cache cold",
        "gigabytes": made.gigabytes,
        "notes": [note],
        "machine": machine.facts(session.folder),
        "rows": [measured.data(found["floor"]) for measured in found.values()],
        "reach": [
            Reach(
                "polyak against reading alone", ratio(found["polyak"], found["floor"]), 1.1
            ).data()
        ],
    }
