"""What one thing at a time costs: more checkpoints, larger ones, smaller tensors, other options.

Every point is measured beside the floor of the same files, with the page cache warm.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tests.benchmarks import machine, material, measure
from tests.benchmarks.compare import MEMORY, NOTES, Session, floor, polyak
from tests.benchmarks.material import MB, Made, Material
from tests.benchmarks.measure import Contender, Measurement, Reach

#: Bytes of one checkpoint of the common material; all else is scaled with it.
BASE = 200 * MB
_COUNTS, _EACH = (1_000, 10_000, 100_000), (32, 512, 4096)
_MEMORIES = ("32MB", "128MB", "512MB", "1GB")
_SCHEMES = ("equal", "linear", "exp", "ema", "power")


class Point(NamedTuple):
    """One thing to measure: what to average, and how."""

    label: str
    material: Material
    options: Sequence[str] = ()
    files: int = 0  # only the first so many; 0 for all


@dataclass(frozen=True, slots=True)
class Series:
    """Points that differ in one thing."""

    key: str
    title: str
    points: Sequence[Point]
    ordered: bool = False  # a line is drawn through the points
    logarithmic: bool = False


def plan(nbytes: int = BASE, *, full: bool = False) -> list[Series]:
    """Return all series, those that share a material side by side.

    Args:
        nbytes: of one checkpoint of the common material; all else is scaled with it.
        full: checkpoints of half that size rather than a fifth, and files and tensors of 20 times
            that size (4 GB for 200 MB).
    """
    base, half, fifth = Material(10, nbytes), nbytes // 2, nbytes // 5
    many = Material(100, half if full else fifth)
    sizes = [nbytes // 200, nbytes // 20, half, nbytes * 5] + ([nbytes * 20] if full else [])
    huge = Material(4, nbytes * (20 if full else 2))
    packed = Material(4, fifth, compression="gzip")
    momentum = Material(10, half, optimizer=True)
    return [
        Series(
            "checkpoints",
            f"checkpoints of {_size(many.nbytes)}",
            [Point(str(n), many, files=n) for n in (2, 5, 10, 20, 50, 100)],
            ordered=True,
        ),
        Series(
            "size",
            "size of a checkpoint, four files",
            [Point(_size(n), Material(4, n)) for n in sizes],
            ordered=True,
            logarithmic=True,
        ),
        Series(
            "tensor",
            f"tensors in {_size(huge.nbytes)}, four files",
            [Point("ten", huge), Point("one", replace(huge, layers=1))],
        ),
        *_small(nbytes / BASE),
        _options("threads", "threads", base, "--jobs", ("1", "2")),
        _options("memory", "--max-memory", base, "--max-memory", _MEMORIES),
        _options("schemes", "scheme", base, "--scheme", _SCHEMES),
        _options("gzip", "threads, gzip, four files", packed, "--jobs", ("1", "2")),
        Series(
            "dtypes",
            f"float type, {_size(half)}",
            [Point(name, Material(10, half, dtype=name)) for name in material.ITEMSIZE],
        ),
        _options("optimizer", "optimizer state", momentum, "--optimizer", ("drop", "newest")),
    ]


def _small(scale: float) -> Iterator[Series]:
    """Yield the series of many small tensors, ten files each."""
    for each in _EACH:
        counts = [max(4, round(count * scale)) for count in _COUNTS]
        points = [Point(f"{n:,}", Material(10, n * each, count=n)) for n in counts]
        title = f"tensors of {each} bytes, ten files"
        yield Series(f"small-{each}", title, points, ordered=True, logarithmic=True)


def _options(key: str, title: str, of: Material, option: str, values: Iterable[str]) -> Series:
    return Series(key, title, [Point(value, of, (option, value)) for value in values])


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:g} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:g} MB"


def growth(
    session: Session, nbytes: int, *, full: bool = False, only: Collection[str] = ()
) -> dict[str, Any]:
    """Measure all series, or some.

    Args:
        session: where and how often.
        nbytes: of one checkpoint of the common material.
        full: see `plan`.
        only: keys of series; all if empty.

    Returns:
        What JSON can hold: series of points as of `Measurement.data`, and what was reached.
    """
    chosen = [series for series in plan(nbytes, full=full) if not only or series.key in only]
    store = material.Store(session.folder / "inputs")
    measured = [_series(session, series, store) for series in chosen]
    return {
        "title": "One thing at a time",
        "notes": [
            *NOTES,
            "A gigabyte is one of tensors to average, as if not compressed, in all checkpoints.",
            store.warmth.note(),
        ],
        "machine": machine.facts(session.folder),
        "series": measured,
        "reach": [reach.data() for reach in _reached({one["key"]: one for one in measured})],
    }


def _series(session: Session, series: Series, store: material.Store) -> dict[str, Any]:
    """Measure the points of a series, those of one material interleaved."""
    session.say(f"{series.key}: {series.title}")
    rows: list[dict[str, Any]] = []
    for shared, points in itertools.groupby(series.points, lambda point: point.material):
        rows += _points(session, store, store.get(shared), list(points))
    for row in rows:
        row["allowed"] = _allowed(series, row["tensors"])
        session.say(f"  {row['label']}: {row['error'] or _told(row)}")
    return {
        "key": series.key,
        "title": series.title,
        "ordered": series.ordered,
        "logarithmic": series.logarithmic,
        "points": rows,
    }


def _allowed(series: Series, tensors: int) -> int | None:
    """Return the bytes of memory that a run may need; None where the series is about them."""
    if series.key == "memory":
        return None
    return MEMORY + (1000 * tensors if series.key.startswith("small") else 0)


def _points(
    session: Session, store: material.Store, made: Made, points: Sequence[Point]
) -> list[dict[str, Any]]:
    output = session.folder / "output.h5"
    every = {point.label: made.first(point.files or len(made.paths)) for point in points}
    floors = {
        len(part.paths): Contender(
            f"floor {len(part.paths)}", "floor", floor(part.paths, output, session.jobs), output
        )
        for part in every.values()
    }
    threads = () if any("--jobs" in p.options for p in points) else ("--jobs", session.jobs)
    ours = [
        Contender(
            point.label,
            point.label,
            polyak(every[point.label].paths, output, "--quiet", *threads, *point.options),
            output,
        )
        for point in points
    ]
    found = measure.interleaved(
        [*floors.values(), *ours],
        session.rounds,
        slow_rounds=1,
        before=lambda: store.warmth.keep(made.paths),
    )
    return [
        _row(found[label], found[f"floor {len(part.paths)}"], part) for label, part in every.items()
    ]


def _row(measured: Measurement, beside: Measurement, made: Made) -> dict[str, Any]:
    row = measured.data(beside) | {
        "gigabytes": made.gigabytes,
        "tensors": made.tensors,
        "files": len(made.paths),
    }
    for name, which in (("", measured), ("floor_", beside)):
        if which.runs:
            row[f"{name}seconds_per_gigabyte"] = which.seconds / made.gigabytes
    if measured.runs:
        row["microseconds_per_tensor"] = measured.seconds * 1e6 / (made.tensors * len(made.paths))
    return row


def _told(row: Mapping[str, Any]) -> str:
    return (
        f"{row['seconds']:.2f} s, {row['seconds_per_gigabyte']:.3f} s/GB, "
        f"{row['microseconds_per_tensor']:.1f} us for a tensor of a file, "
        f"{row['peak'] / MB:.0f} MB"
    )


# --- what was reached -----------------------------------------------------------------------------


def _reached(series: Mapping[str, Any]) -> Iterator[Reach]:
    """Yield what the program means to reach, for the series that were measured."""
    if "checkpoints" in series:
        yield Reach(
            "seconds per gigabyte, 100 checkpoints against ten",
            _between(series["checkpoints"], "100", "10", "seconds_per_gigabyte"),
            1.1,
        )
    if "tensor" in series:
        yield Reach(
            "seconds per gigabyte, one huge tensor against ten",
            _between(series["tensor"], "one", "ten", "seconds_per_gigabyte"),
            1.05,  # no slower, except for the usual difference of two medians
        )
    for each in _EACH:
        if f"small-{each}" in series:
            yield from _reached_small(series[f"small-{each}"], each)
    if "gzip" in series:
        yield Reach(
            "gzip, one thread against two",
            _between(series["gzip"], "1", "2", "seconds"),
            1.7,
            least=True,
        )
    peaks = [
        point["peak"]
        for one in series.values()
        for point in one["points"]
        if "peak" in point and point["allowed"] == MEMORY
    ]
    if peaks:
        yield Reach("peak memory of all other runs", max(peaks) / MB, MEMORY / MB, unit="MB")


def _reached_small(one: Mapping[str, Any], each: int) -> Iterator[Reach]:
    point = one["points"][-1]
    what = f"{point['label']} tensors of {each} bytes"
    peak = point["peak"] / MB if "peak" in point else None
    yield Reach(f"{what}, each", point.get("microseconds_per_tensor"), 10.0, unit="us")
    yield Reach(f"{what}, peak memory", peak, point["allowed"] / MB, unit="MB")


def _between(one: Mapping[str, Any], above: str, below: str, what: str) -> float | None:
    found = {point["label"]: point.get(what) for point in one["points"]}
    top, bottom = found.get(above), found.get(below)
    return top / bottom if top and bottom else None
