"""The benchmark's command line: `python -m tests.benchmarks reach|compare|growth|startup`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import growth, measure, reach
from tests.benchmarks.compare import Session, compare
from tests.benchmarks.material import MB
from tests.benchmarks.measure import ROOT
from tests.benchmarks.startup import startup

Asked = argparse.Namespace
#: Size in MB and rounds, where not asked for.
_DEFAULTS = {"reach": (410.0, 7), "compare": (410.0, 5), "growth": (200.0, 3), "startup": (0.0, 15)}


def _compare(session: Session, asked: Asked) -> dict[str, Any]:
    return compare(session, asked.files, asked.nbytes)


def _growth(session: Session, asked: Asked) -> dict[str, Any]:
    return growth.growth(session, asked.nbytes, full=asked.full, only=asked.only)


def _reach(session: Session, asked: Asked) -> dict[str, Any]:
    return reach.reach(session, asked.files, asked.nbytes, asked.only)


def _startup(session: Session, _: Asked) -> dict[str, Any]:
    return startup(session)


_EXPERIMENTS: Mapping[str, Callable[[Session, Asked], dict[str, Any]]] = {
    "reach": _reach,
    "compare": _compare,
    "growth": _growth,
    "startup": _startup,
}


def _parse(arguments: Sequence[str] | None) -> Asked:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("experiment", choices=list(_EXPERIMENTS))
    parser.add_argument("--size", type=float, help="MB of a checkpoint")
    parser.add_argument("--files", type=int, default=10, help="checkpoints (reach, compare)")
    parser.add_argument("--rounds", type=int, help="runs of each contender")
    parser.add_argument("--jobs", type=int, default=2, help="polyak's threads")
    parser.add_argument("--full", action="store_true", help="growth to 100 x 100 MB and to 4 GB")
    parser.add_argument(
        "--only", default="", help="sections of reach or series of growth, by commas"
    )
    parser.add_argument("--folder", type=Path, help="scratch is made, and removed, below this")
    parser.add_argument("--out", type=Path, default=ROOT / ".bench", help="where results go")
    asked = parser.parse_args(arguments)
    size, rounds = _DEFAULTS[asked.experiment]
    asked.nbytes = round((asked.size or size) * MB)
    asked.rounds = asked.rounds or rounds
    asked.only = asked.only.split(",") if asked.only else []
    parts: Sequence[Any] = reach.plan(2, MB) if asked.experiment == "reach" else growth.plan()
    known = {one.key for one in parts}
    if unknown := set(asked.only) - known:
        parser.error(f"no such series: {', '.join(sorted(unknown))}; there are {sorted(known)}")
    return asked


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one experiment, print its table, write its results.

    Returns:
        1 if the limits of `startup` were missed, and if `polyak` failed in any; else 0.
    """
    asked = _parse(arguments)
    asked.out.mkdir(parents=True, exist_ok=True)
    below = asked.folder or asked.out
    below.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="scratch-", dir=below)).resolve()
    try:
        # Once, unmeasured: modules are compiled then, as they are wherever they are installed.
        measure.run([sys.executable, "-m", "polyak_cli", "average", "--help"])
        session = Session(scratch, asked.rounds, asked.jobs, _say)
        data = _EXPERIMENTS[asked.experiment](session, asked)
    except measure.Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    text = _text(data)
    print(f"\n{text}")
    stem = asked.out / asked.experiment
    stem.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    stem.with_suffix(".md").write_text(text + "\n")
    _chart(asked.experiment, data, stem)
    missed = asked.experiment == "startup" and any(one["missed"] for one in data["reach"])
    return 1 if missed or _failed(data) else 0


def _say(text: str) -> None:
    print(text, flush=True)


def _text(data: Mapping[str, Any]) -> str:
    """Return an experiment as Markdown."""
    lines = [f"## {data['title']}", ""]
    if "rows" in data:
        lines += [measure.table(data["rows"]), ""]
    for section in data.get("sections", ()):
        lines += [f"### {section['title']}", "", measure.table(section["rows"]), ""]
        lines += [*(f"- {note}" for note in section["notes"]), ""]
    for series in data.get("series", ()):
        lines += [f"### {series['key']}: {series['title']}", "", _points(series), ""]
    lines += [f"- {note}" for note in data["notes"]]
    lines += ["- " + ", ".join(f"{name}: {value}" for name, value in data["machine"].items()), ""]
    return "\n".join([*lines, *(f"- {_say_reach(one)}" for one in data["reach"])])


def _points(series: Mapping[str, Any]) -> str:
    head = ("", "seconds", "s/GB", "floor's s/GB", "us per tensor and file", "peak memory")
    lines = [head, tuple("---" for _ in head)]
    for point in series["points"]:
        if "seconds" not in point:
            lines.append((point["label"], point["error"], "-", "-", "-", "-"))
            continue
        lines.append(
            (
                point["label"],
                f"{point['seconds']:.2f}",
                f"{point['seconds_per_gigabyte']:.3f}",
                f"{point.get('floor_seconds_per_gigabyte', float('nan')):.3f}",
                f"{point['microseconds_per_tensor']:.1f}",
                f"{point['peak'] / 1e6:.0f} MB",
            )
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _say_reach(one: Mapping[str, Any]) -> str:
    return str(measure.Reach(**{key: one[key] for key in one if key != "missed"}))


def _failed(data: Mapping[str, Any]) -> bool:
    """Return whether polyak itself failed; failures of others are only shown in the table."""
    every = [data, *data.get("sections", ())]
    rows = [row for part in every for row in part.get("rows", ()) if row["key"].startswith(_OURS)]
    rows += [point for series in data.get("series", ()) for point in series["points"]]
    return any(row["error"].startswith("failed") for row in rows)


#: How the keys of contenders begin that run polyak.
_OURS = ("polyak", "help", "samples")


def _chart(experiment: str, data: Mapping[str, Any], stem: Path) -> None:
    if experiment not in ("compare", "growth"):
        return
    if not importlib.util.find_spec("matplotlib"):
        print("no chart: matplotlib is not installed")
        return
    from tests.benchmarks import charts

    draw = charts.growth_chart if experiment == "growth" else charts.compare_chart
    draw(data, stem)
    print(f"{stem}.json, .md, .png and .svg are written")


if __name__ == "__main__":
    sys.exit(main())
