"""Averages the same checkpoints in every way people have, side by side, the page cache warm."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks import machine, material, measure
from tests.benchmarks.material import MB, Made, Material
from tests.benchmarks.measure import ROOT, Contender, Measurement, Reach, ratio

#: Where `make bench-peers` puts environments of their own.
PEERS = ROOT / ".bench" / "peers"
#: Bytes of memory that no run may exceed.
MEMORY = 96 * MB
_HERE = Path(__file__).parent
NOTES = (
    "Seconds are medians, start-up included; memory is the peak of the largest process; MB are "
    "10^6 bytes.",
    "The floor and polyak sync their output to the disk; the others do not.",
)


@dataclass(frozen=True, slots=True)
class Session:
    """Where an experiment works, and how often it measures."""

    folder: Path  # scratch, of this session alone
    rounds: int
    jobs: int
    say: Callable[[str], None]


def floor(paths: Sequence[Path], output: Path | None) -> list[str]:
    """Return the command that only reads the inputs and writes as much as the output."""
    script = str(_HERE / "floor.py")
    return [sys.executable, script, str(output or "-"), *map(str, paths)]


def polyak(paths: Sequence[Path], output: Path, *options: object) -> list[str]:
    """Return the command that averages checkpoints, oldest first."""
    start = [sys.executable, "-m", "polyak_cli", "average", *map(str, paths)]
    return [*start, "-o", str(output), *map(str, options)]


def compare(session: Session, files: int, nbytes: int) -> dict[str, Any]:
    """Measure all contenders.

    Args:
        session: where and how often.
        files: checkpoints to average.
        nbytes: of each, nearly.

    Returns:
        What JSON can hold: material, machine, rows as of `Measurement.data`, and what was reached.
    """
    asked = Material(files, nbytes, safetensors=_mergekit().exists())
    session.say(f"making {files} checkpoints of {nbytes / MB:,.0f} MB")
    made = material.make(asked, session.folder / "inputs")
    reference = session.folder / "reference.h5"
    measure.run(_rival("loop-float64", made, reference))
    warmth = machine.Warmth()
    found = measure.interleaved(
        contenders(made, session),
        session.rounds,
        before=lambda: warmth.keep([*made.paths, *made.safetensors]),
        inspect=lambda contender: judge(contender, reference, session.folder),
        say=session.say,
    )
    return {
        "title": f"{files} checkpoints of {made.nbytes / MB:,.0f} MB averaged into one",
        "gigabytes": made.gigabytes,
        "notes": [*NOTES, warmth.note()],
        "machine": machine.facts(session.folder) | _peer_versions(),
        "rows": [measured.data(found["floor"]) for measured in found.values()],
        "reach": [reach.data() for reach in reached(found)],
    }


def contenders(made: Made, session: Session) -> list[Contender]:
    """Return every way to average the checkpoints, the absent ones too."""
    folder, paths = session.folder, made.paths
    output = folder / "output.h5"

    def rival(key: str, label: str, absent: str = "") -> Contender:
        return Contender(key, label, _rival(key, made, output), output, absent)

    no_keras = "" if importlib.util.find_spec("tensorflow") else "skipped: no TensorFlow here"
    return [
        Contender("floor", "floor: reading and writing alone", floor(paths, output), output),
        Contender(
            "polyak",
            "polyak average",
            polyak(paths, output, "--quiet", "--jobs", session.jobs),
            output,
        ),
        rival("loop-float32", "h5py, tensor by tensor, float32"),
        rival("loop-float64", "h5py, tensor by tensor, float64"),
        rival("tutorial-h5py", "h5py, all models in memory, numpy.average"),
        rival("tutorial-keras", "Keras, load_model and get_weights", no_keras),
        _linear_merge(made, folder),
        _ensemble(made, output),
    ]


def _rival(key: str, made: Made, output: Path) -> list[str]:
    script = str(_HERE / "rivals.py")
    return [sys.executable, script, key, str(output), *map(str, made.paths)]


def _mergekit() -> Path:
    return PEERS / "mergekit" / "bin" / "mergekit-pytorch"


def _linear_merge(made: Made, folder: Path) -> Contender:
    models = [
        {"model": str(path), "parameters": {"weight": 1.0 / len(made.safetensors)}}
        for path in made.safetensors
    ]
    # JSON is YAML.
    config, output = folder / "merge.yml", folder / "merged"
    config.write_text(json.dumps({"merge_method": "linear", "dtype": "float32", "models": models}))
    return Contender(
        "mergekit",
        "mergekit, linear merge of safetensors",
        [str(_mergekit()), "--quiet", str(config), str(output)],
        output,
        "" if made.safetensors else "skipped: no mergekit; `make bench-peers` installs it",
    )


def _ensemble(made: Made, output: Path) -> Contender:
    program = shutil.which("nces")
    return Contender(
        "nces",
        "NCO, nces",
        [program or "nces", "-O", "-y", "avg", *map(str, made.paths), "-o", str(output)],
        output,
        "" if program else "skipped: no NCO; `make bench-peers` installs it",
    )


def _peer_versions() -> dict[str, str]:
    python = str(PEERS / "mergekit" / "bin" / "python")
    code = "import importlib.metadata as m; print(m.version('mergekit'), m.version('torch'))"
    mergekit, _, torch = machine.said([python, "-c", code]).partition(" ")
    nces = machine.said(["nces", "--version"]).rpartition("version ")[2]
    found = {"mergekit": mergekit, "torch": torch, "nces": nces}
    return {name: version for name, version in found.items() if version}


def judge(contender: Contender, reference: Path, folder: Path) -> str:
    """Compare an output with the float64 average.

    Raises:
        Failed: the output is not the average, or, of polyak, is not so bit for bit.
    """
    if contender.key == "floor" or not contender.output:
        return ""
    found = material.compare(reference, contender.output, folder)
    if found["same"]:
        return "the same bits"
    if contender.key == "polyak" or found["deviation"] > 1e-5:
        raise measure.Failed(f"is off by up to {found['deviation']:.1e} from the float64 average")
    return f"off by up to {found['deviation']:.0e}"


def reached(found: Mapping[str, Measurement]) -> list[Reach]:
    """Return what the program means to reach beside the others, and whether it does."""
    ours = found["polyak"]
    return [
        Reach("polyak against the floor", ratio(ours, found["floor"]), 1.5),
        *(
            Reach(f"{label} against polyak", ratio(found[key], ours), limit, least=True)
            for key, label, limit in (
                ("mergekit", "mergekit", 10.0),
                ("loop-float64", "the float64 loop", 4.0),
                ("nces", "nces", 25.0),
                ("tutorial-keras", "the Keras procedure", 25.0),
            )
        ),
        Reach(
            "peak memory of polyak", ours.peak / MB if ours.runs else None, MEMORY / MB, unit="MB"
        ),
    ]
