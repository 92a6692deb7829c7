"""Measures all that the program means to reach, section by section, and says what it reached.

A section has checkpoints of its own.  Its contenders take turns, and both sides of each ratio are
in one section, so that a disturbance of the machine meets both.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks import compare, machine, material, measure
from tests.benchmarks.compare import MEMORY, Session, floor, polyak
from tests.benchmarks.material import MB, Made, Material
from tests.benchmarks.measure import Contender, Measurement, Reach, ratio

Found = Mapping[str, Measurement]

#: Averages that a sweep makes in one pass.
SEVERAL = 8
#: Checkpoints of the long run, of which the short one has the first tenth.
_LONG = 100
_SMALL, _SMALL_NBYTES = 1000, 4096
_KERNEL = "POLYAK_KERNEL"


@dataclass(frozen=True, slots=True)
class Section:
    """Checkpoints, who averages them, and what is to be reached."""

    key: str
    title: str
    material: Material
    contenders: Callable[[Made, Session], Sequence[Contender]]
    reached: Callable[[Found], Iterable[Reach]]
    cold: bool = False  # the inputs are dropped from the page cache ahead of each run
    #: The command that writes the average with which outputs are compared; None compares nothing.
    reference: Callable[[Made, Path], Sequence[str]] | None = None


def plan(files: int, nbytes: int) -> list[Section]:
    """Return all sections, those that share checkpoints side by side.

    Args:
        files: checkpoints of the common material.
        nbytes: of each of them, nearly; of the long run, a fifth of it.
    """
    common = Material(files, nbytes, safetensors=compare.has_mergekit())
    shorter = [
        Section(
            dtype,
            f"{files} checkpoints of {nbytes / MB:,.0f} MB, {dtype}",
            Material(files, nbytes, dtype=dtype),
            _beside_floor,
            functools.partial(_reached_beside_floor, dtype),
            reference=_average_by_numpy,
        )
        for dtype in ("bfloat16", "float16")
    ]
    return [
        Section(
            "main",
            f"{files} checkpoints of {nbytes / MB:,.0f} MB, float32",
            common,
            _main,
            _reached_main,
            reference=functools.partial(compare.rival, "loop-float64"),
        ),
        Section(
            "several",
            f"{SEVERAL} averages of the same checkpoints in one pass; ratios to one average",
            common,
            _several,
            _reached_several,
        ),
        Section(
            "cold",
            "the same checkpoints, page cache cold; ratios to reading alone",
            common,
            _cold,
            _reached_cold,
            cold=True,
        ),
        *shorter,
        Section(
            "checkpoints",
            f"{_LONG // 10} and {_LONG} checkpoints of {nbytes / 5 / MB:,.0f} MB; ratios to the "
            "floor of as many",
            Material(_LONG, nbytes // 5),
            _checkpoints,
            _reached_checkpoints,
        ),
        Section(
            "small",
            f"{_SMALL:,} tensors of {_SMALL_NBYTES} bytes in {files} files; ratios to one visit "
            "of each file",
            Material(files, _SMALL * _SMALL_NBYTES, count=_SMALL),
            _small,
            _reached_small,
        ),
    ]


def reach(session: Session, files: int, nbytes: int, only: Collection[str] = ()) -> dict[str, Any]:
    """Measure all sections, or some.

    Args:
        session: where and how often.
        files: as `plan`.
        nbytes: as `plan`.
        only: keys of sections; all if empty.

    Returns:
        What JSON can hold: sections with rows as of `Measurement.data`, and what was reached.
    """
    store = material.Store(session.folder / "inputs")
    chosen = [section for section in plan(files, nbytes) if not only or section.key in only]
    sections: list[dict[str, Any]] = []
    reached: list[Reach] = []
    peaks: list[int] = []
    for section in chosen:
        session.say(f"{section.key}: {section.title}")
        made = store.get(section.material)
        found, note = _measure(session, section, made, store.warmth)
        sections.append(
            {
                "key": section.key,
                "title": section.title,
                "gigabytes": made.gigabytes,
                "rows": measure.describe(found),
                "notes": [note, *_compare_alloy(found)],
            }
        )
        reached += section.reached(found)
        peaks += [one.peak for one in found.values() if one.runs and _is_ours(one.contender)]
    peak = max(peaks, default=0) / MB
    reached.append(
        Reach("peak memory of polyak in all sections", peak or None, MEMORY / MB, unit="MB")
    )
    return {
        "title": "What is to be reached",
        "notes": [*compare.NOTES, f"Each has {session.rounds} interleaved rounds."],
        "machine": machine.facts(session.folder) | compare.peer_versions(),
        "sections": sections,
        "reach": [one.data() for one in reached],
    }


def _measure(
    session: Session, section: Section, made: Made, warmth: machine.Warmth
) -> tuple[Found, str]:
    """Measure the contenders of a section, and say what was in the page cache."""
    reference = session.folder / "reference.h5"
    if section.reference:
        measure.run(section.reference(made, reference), variables={_KERNEL: "numpy"})
    chill = machine.Chill()
    before = (
        functools.partial(chill.keep, made.paths)
        if section.cold
        else functools.partial(warmth.keep, [*made.paths, *made.safetensors])
    )

    def inspect(contender: Contender) -> str:
        return compare.judge(contender, reference, session.folder) if section.reference else ""

    contenders = section.contenders(made, session)
    try:
        found = measure.interleaved(
            contenders, session.rounds, before=before, inspect=inspect, say=session.say
        )
    finally:
        measure.remove(reference)
    return found, chill.note() if section.cold else warmth.note()


def _is_ours(contender: Contender) -> bool:
    """Return whether a contender is polyak, with the kernel that it chooses by itself."""
    return contender.key.startswith("polyak") and not contender.key.endswith("-numpy")


def _compare_alloy(found: Found) -> Iterator[str]:
    """Say what alloy would take if it were as fast as reported."""
    mergekit = found.get("mergekit")
    if mergekit and mergekit.runs:
        seconds = mergekit.seconds / 2.1
        yield f"At the speed that its authors report, alloy would take {seconds:.1f} s."


# --- contenders -----------------------------------------------------------------------------------


@functools.cache
def has_compiled() -> bool:
    """Return whether polyak has its compiled kernel here."""
    try:
        measure.run([sys.executable, "-c", "import polyak_cli.engine._kernel"])
    except measure.Failed:
        return False
    return True


def _both(*ours: Contender) -> list[Contender]:
    """Return contenders that run polyak, once with each kernel that is here."""
    if not has_compiled():
        return [dataclasses.replace(one, label=f"{one.label}, numpy kernel") for one in ours]
    compiled = [
        dataclasses.replace(
            one, label=f"{one.label}, compiled kernel", variables={_KERNEL: "compiled"}
        )
        for one in ours
    ]
    others = [
        dataclasses.replace(
            one,
            key=f"{one.key}-numpy",
            label=f"{one.label}, numpy kernel",
            variables={_KERNEL: "numpy"},
            beside=f"{one.beside}-numpy" if one.beside.startswith("polyak") else one.beside,
        )
        for one in ours
    ]
    return [*compiled, *others]


def _average(made: Made, session: Session, key: str = "polyak", beside: str = "floor") -> Contender:
    output = session.folder / "output.h5"
    command = polyak(made.paths, output, "--quiet", "--jobs", session.jobs)
    return Contender(key, "polyak average", command, output, beside=beside)


def _average_by_numpy(made: Made, output: Path) -> list[str]:
    return polyak(made.paths, output, "--quiet", "--force")


def _beside_floor(made: Made, session: Session) -> list[Contender]:
    output = session.folder / "output.h5"
    return [
        compare.floor_beside(made, output, session.jobs),
        *_both(_average(made, session)),
    ]


def _main(made: Made, session: Session) -> list[Contender]:
    output = session.folder / "output.safetensors"
    command = polyak(made.safetensors, output, "--quiet", "--jobs", session.jobs)
    same = Contender(
        "polyak-safetensors",
        "polyak average, of safetensors",
        command,
        output,
        "" if made.safetensors else "skipped: there are none, for want of mergekit",
    )
    return [
        *_beside_floor(made, session),
        same,
        compare.linear_merge(made, session.folder),
        compare.alloy(),
        compare.ensemble(made, session.folder / "output.h5"),
    ]


def _several(made: Made, session: Session) -> list[Contender]:
    folder = session.folder / "several"

    def write(count: int) -> list[str]:
        start = [sys.executable, "-m", "tests.benchmarks.several", str(session.jobs), str(count)]
        return [*start, str(folder), *map(str, made.paths)]

    one = Contender("polyak-one", "one average", write(1), folder, beside="polyak-one")
    eight = Contender(
        "polyak-several", f"{SEVERAL} averages", write(SEVERAL), folder, beside="polyak-one"
    )
    alone = Contender(
        "floor-several",
        f"only reading, and writing {SEVERAL} files",
        floor(made.paths, folder, session.jobs, SEVERAL),
        folder,
        beside="polyak-one",
    )
    return [alone, *_both(one, eight)]


def _cold(made: Made, session: Session) -> list[Contender]:
    command = floor(made.paths, None, session.jobs)
    return [
        Contender("floor", "reading the inputs alone", command),
        *_both(_average(made, session)),
    ]


def _checkpoints(made: Made, session: Session) -> list[Contender]:
    output = session.folder / "output.h5"
    parts = {count: made.first(count) for count in (_LONG // 10, _LONG)}
    floors = [
        Contender(
            f"floor-{count}",
            f"floor of {count}",
            floor(part.paths, output, session.jobs),
            output,
            beside=f"floor-{count}",
        )
        for count, part in parts.items()
    ]
    ours = [
        dataclasses.replace(
            _average(part, session, f"polyak-{count}", f"floor-{count}"),
            label=f"polyak average of {count}",
        )
        for count, part in parts.items()
    ]
    return [*floors, *_both(*ours)]


def _small(made: Made, session: Session) -> list[Contender]:
    script = str(Path(__file__).with_name("visit.py"))
    command = [sys.executable, script, *map(str, made.paths)]
    return [
        Contender("visit", "h5py, visiting all tensors", command, beside="visit"),
        *_both(_average(made, session, beside="visit")),
    ]


# --- what was reached -----------------------------------------------------------------------------


def _reached_main(found: Found) -> Iterator[Reach]:
    ours = found["polyak"]
    yield Reach("polyak against the floor (goal 1.25)", ratio(ours, found["floor"]), 1.35)
    yield Reach("polyak's CPU time against the floor's", ratio(ours, found["floor"], "cpu"), 1.6)
    for key, label in (("mergekit", "mergekit's linear merge"), ("nces", "NCO's nces")):
        yield Reach(f"{label} against polyak", ratio(found[key], ours), 10.0, least=True)


def _reached_several(found: Found) -> Iterator[Reach]:
    value = ratio(found["polyak-several"], found["polyak-one"])
    yield Reach(f"{SEVERAL} averages in one pass against one", value, 2.5)


def _reached_cold(found: Found) -> Iterator[Reach]:
    value = ratio(found["polyak"], found["floor"])
    yield Reach("polyak, page cache cold, against reading alone", value, 1.1)


def _reached_beside_floor(dtype: str, found: Found) -> Iterator[Reach]:
    yield Reach(f"polyak against the floor, {dtype}", ratio(found["polyak"], found["floor"]), 1.6)


def _reached_checkpoints(found: Found) -> Iterator[Reach]:
    few, many = _LONG // 10, _LONG
    value = ratio(found[f"polyak-{many}"], found[f"polyak-{few}"])
    what = f"seconds per GB at {many} checkpoints against {few}"
    yield Reach(what, value and value * few / many, 1.0)


def _reached_small(found: Found) -> Iterator[Reach]:
    what = f"{_SMALL:,} tensors of {_SMALL_NBYTES} bytes against one h5py visit of each file"
    yield Reach(what, ratio(found["polyak"], found["visit"]), 1.5)
