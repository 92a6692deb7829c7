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
MEMORY = 64 * MB
_HERE = Path(__file__).parent
NOTES = (
    "Seconds are medians, start-up included; memory is the peak of the largest process; MB are "
    "10^6 bytes.",
    "The floor and polyak sync their output to the disk; the others do not.",
    "Ratios are to the floor, where nothing else is said.",
)


@dataclass(frozen=True, slots=True)
class Session:
    """Where an experiment works, and how often it measures."""

    folder: Path  # scratch, of this session alone
    rounds: int
    jobs: int
    say: Callable[[str], None]


def floor(paths: Sequence[Path], output: Path | None, threads: int, several: int = 0) -> list[str]:
    """Return the command that only reads the inputs and writes as much as the output or outputs."""
    start = [sys.executable, str(_HERE / "floor.py"), str(threads), str(several)]
    return [*start, str(output or "-"), *map(str, paths)]


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
    asked = Material(files, nbytes, safetensors=has_mergekit())
    session.say(f"making {files} checkpoints of {nbytes / MB:,.0f} MB")
    made = material.make(asked, session.folder / "inputs")
    reference = session.folder / "reference.h5"
    measure.run(rival("loop-float64", made, reference))
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
        "machine": machine.facts(session.folder) | peer_versions(),
        "rows": measure.describe(found),
        "reach": [reach.data() for reach in reached(found)],
    }


def contenders(made: Made, session: Session) -> list[Contender]:
    """Return every way to average the checkpoints, the absent ones too."""
    folder, paths = session.folder, made.paths
    output = folder / "output.h5"

    def script(key: str, label: str, absent: str = "") -> Contender:
        return Contender(key, label, rival(key, made, output), output, absent)

    no_keras = "" if importlib.util.find_spec("tensorflow") else "skipped: no TensorFlow here"
    return [
        floor_beside(made, output, session.jobs),
        Contender(
            "polyak",
            "polyak average",
            polyak(paths, output, "--quiet", "--jobs", session.jobs),
            output,
        ),
        script("loop-float32", "h5py, tensor by tensor, float32"),
        script("loop-float64", "h5py, tensor by tensor, float64"),
        script("tutorial-h5py", "h5py, all models in memory, numpy.average"),
        script("tutorial-keras", "Keras, load_model and get_weights", no_keras),
        linear_merge(made, folder),
        alloy(),
        ensemble(made, output),
    ]


def floor_beside(made: Made, output: Path, threads: int) -> Contender:
    """Return the floor of some checkpoints."""
    command = floor(made.paths, output, threads)
    return Contender("floor", "floor: reading and writing alone", command, output)


def rival(key: str, made: Made, output: Path) -> list[str]:
    """Return the command that averages in one of the ways of `rivals.WAYS`."""
    script = str(_HERE / "rivals.py")
    return [sys.executable, script, key, str(output), *map(str, made.paths)]


def _mergekit() -> Path:
    return PEERS / "mergekit" / "bin" / "mergekit-pytorch"


def has_mergekit() -> bool:
    """Return whether `make bench-peers` has installed mergekit."""
    return _mergekit().exists()


def linear_merge(made: Made, folder: Path) -> Contender:
    """Return mergekit's merge of the checkpoints as safetensors, the format that it reads."""
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


def alloy() -> Contender:
    """Return a merger in Rust that cannot be installed here, with what its authors report."""
    return Contender(
        "alloy",
        "alloy, linear merge of safetensors",
        [],
        absent="not measured; its authors report 2.1 times mergekit's speed",
    )


def ensemble(made: Made, output: Path) -> Contender:
    """Return NCO's mean of the checkpoints, which are netCDF files too, being HDF5."""
    program = shutil.which("nces")
    return Contender(
        "nces",
        "NCO, nces",
        [program or "nces", "-O", "-y", "avg", *map(str, made.paths), "-o", str(output)],
        output,
        "" if program else "skipped: no NCO; `make bench-peers` installs it",
    )


def peer_versions() -> dict[str, str]:
    """Return the versions of the other programs that are installed."""
    python = str(PEERS / "mergekit" / "bin" / "python")
    code = "import importlib.metadata as m; print(m.version('mergekit'), m.version('torch'))"
    mergekit, _, torch = machine.said([python, "-c", code]).partition(" ")
    nces = machine.said(["nces", "--version"]).rpartition("version ")[2]
    found = {"mergekit": mergekit, "torch": torch, "nces": nces}
    return {name: version for name, version in found.items() if version}


def judge(contender: Contender, reference: Path, folder: Path) -> str:
    """Compare an output with the float64 average.

    Raises:
        Failed: the output is not the average, or one of polyak's is not so bit for bit.
    """
    if contender.key == "floor" or not contender.output:
        return ""
    found = material.compare(reference, contender.output, folder)
    if found["same"]:
        return "the same bits"
    if contender.key.startswith("polyak") or found["deviation"] > 1e-5:
        raise measure.Failed(f"is off by up to {found['deviation']:.1e} from the float64 average")
    return f"off by up to {found['deviation']:.0e}"


def reached(found: Mapping[str, Measurement]) -> list[Reach]:
    """Return what the program means to reach beside the others, and whether it does."""
    ours = found["polyak"]
    return [
        Reach("polyak against the floor", ratio(ours, found["floor"]), 1.35),
        *(
            Reach(f"{label} against polyak", ratio(found[key], ours), limit, least=True)
            for key, label, limit in (
                ("mergekit", "mergekit", 10.0),
                ("loop-float64", "the float64 loop", 4.0),
                ("nces", "nces", 10.0),
                ("tutorial-keras", "the Keras procedure", 25.0),
            )
        ),
        Reach(
            "peak memory of polyak", ours.peak / MB if ours.runs else None, MEMORY / MB, unit="MB"
        ),
    ]
