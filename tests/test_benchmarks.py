import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from tests.benchmarks import __main__ as command
from tests.benchmarks import compare, files, floor, growth, machine, material, measure, reach
from tests.benchmarks.material import MB, Material
from tests.benchmarks.measure import Contender, Failed, Measurement, Reach, Run
from tests.command import ROOT
from tests.oracle import naive_average, read_model

pytestmark = pytest.mark.soak

_TINY = Material(files=3, nbytes=MB // 10)


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def _benchmark(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the harness as `make bench` does: in a process that has imported nothing else."""
    return subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


# --- measuring ------------------------------------------------------------------------------------


_GROW = "x = bytearray(300_000_000); x[::4096] = b'x' * len(x[::4096])"


def _measured(code: str) -> Run:
    """Measure from a small process, as the harness does: a test session's own peak is large."""
    whole = (
        "import json, sys; from tests.benchmarks import measure; "
        "print(json.dumps(measure.run([sys.executable, '-c', sys.argv[1]])))"
    )
    done = subprocess.run(
        [*_python(whole), code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return Run(*json.loads(done.stdout))


def test_a_run_tells_what_the_child_cost() -> None:
    """Seconds, processor and memory are those of the child: it slept, computed and allocated."""
    slept = _measured("import time; time.sleep(0.3)")
    assert slept.seconds >= 0.3
    assert slept.cpu < slept.seconds
    assert slept.peak < 40e6
    assert 300e6 < _measured(_GROW).peak < 400e6
    assert _measured("import time\nwhile time.process_time() < 0.3: pass").cpu >= 0.3


def test_memory_of_grandchildren_counts() -> None:
    """What a contender starts and waits for is a part of its cost: the largest process counts."""
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {_GROW!r}])"
    assert 300e6 < _measured(nested).peak < 400e6


def test_a_failed_command_is_reported_by_its_last_line() -> None:
    """A contender that fails is reported with its exit code and its last word."""
    with pytest.raises(Failed, match="exit code 3: the last"):
        measure.run(_python("import sys; print('first\\nthe last', file=sys.stderr); sys.exit(3)"))
    with pytest.raises(Failed, match="No such file"):
        measure.run(["/no/such/program"])


def test_a_command_that_never_ends_is_killed() -> None:
    """A contender that takes longer than the limit is given up, and that is said."""
    with pytest.raises(Failed, match="killed after"):
        measure.run(_python("import time; time.sleep(600)"), limit=0.5)


def test_contenders_take_turns(tmp_path: Path) -> None:
    """The order is A B A B, and outputs are gone before and after every run."""
    log, output = tmp_path / "log", tmp_path / "output"

    def noting(key: str) -> Contender:
        code = (
            "import sys, pathlib; log, output, key = sys.argv[1:]; "
            "there = pathlib.Path(output).exists(); pathlib.Path(output).write_text(key); "
            "open(log, 'a').write(key + ('!' if there else '') + ' ')"
        )
        return Contender(key, key, [*_python(code), str(log), str(output), key], output)

    output.write_text("left by another")
    found = measure.interleaved([noting("a"), noting("b")], 3)
    assert log.read_text() == "a b a b a b "
    assert [len(measured.runs) for measured in found.values()] == [3, 3]
    assert not output.exists()


def test_failures_and_absences_are_kept_apart_and_shown(tmp_path: Path) -> None:
    """A contender that fails is not run again; an absent one is never run; both are reported."""
    log = tmp_path / "log"
    code = f"open({str(log)!r}, 'a').write('x'); raise SystemExit('no luck')"
    found = measure.interleaved(
        [
            Contender("bad", "bad", _python(code)),
            Contender("away", "away", ["/no/such/program"], absent="skipped: not here"),
            Contender("good", "good", _python("pass")),
        ],
        2,
    )
    assert log.read_text() == "x"
    rows = [measured.data(found["good"]) for measured in found.values()]
    assert [row["rounds"] for row in rows] == [0, 0, 2]
    shown = measure.table(rows)
    assert "failed: exit code 1: no luck" in shown
    assert "skipped: not here" in shown


def test_what_cannot_be_prepared_is_reported_and_loses_no_other_result() -> None:
    """Where the inputs do not fit the page cache, that is what the contender's row says."""
    ready = iter([None, None])

    def before() -> None:
        if next(ready, Failed) is Failed:
            raise Failed("no room")

    found = measure.interleaved(
        [Contender("a", "a", ["true"]), Contender("b", "b", ["true"])], 2, before=before
    )
    assert [measured.error for measured in found.values()] == ["failed: no room"] * 2


@pytest.mark.parametrize(("limit", "rounds"), [(0.0, 2), (1000.0, 4)])
def test_a_slow_contender_has_fewer_rounds(
    monkeypatch: pytest.MonkeyPatch, limit: float, rounds: int
) -> None:
    """Beyond the limit a contender runs only as often as slow ones do."""
    monkeypatch.setattr(measure, "SLOW", limit)
    found = measure.interleaved([Contender("a", "a", ["true"])], 4, slow_rounds=2)
    assert len(found["a"].runs) == rounds


def test_figures_are_medians_and_the_largest_peak() -> None:
    """One disturbed round moves no figure but the peak, which is that of all rounds."""
    runs = [Run(1.0, 0.5, 10), Run(9.0, 7.0, 30), Run(2.0, 0.6, 20)]
    one = Measurement(Contender("a", "a", []), runs)
    other = Measurement(Contender("b", "b", []), [Run(0.5, 0.5, 1)])
    row = one.data(other)
    assert (row["seconds"], row["cpu"], row["peak"], row["ratio"]) == (2.0, 0.6, 30, 4.0)
    assert row["cpu_ratio"] == 1.2
    assert measure.ratio(one, other) == 4.0
    assert measure.ratio(one, other, "peak") == 30
    assert measure.ratio(one, Measurement(Contender("c", "c", []), ())) is None


def test_limits_know_their_side() -> None:
    """A figure is missed above an upper limit, below a lower one, and never if not measured."""
    assert Reach("a", 1.6, 1.5).missed
    assert not Reach("a", 1.5, 1.5).missed
    assert Reach("a", 9.9, 10.0, least=True).missed
    assert not Reach("a", None, 10.0, least=True).missed
    assert "not measured" in str(Reach("a", None, 10.0))


def test_measuring_imports_nothing_large() -> None:
    """A child inherits the peak of who starts it, so the process that measures must stay small."""
    code = (
        "import sys, tests.benchmarks.__main__; "
        "print(sorted({'numpy', 'h5py', 'matplotlib', 'click'} & set(sys.modules)))"
    )
    done = subprocess.run(_python(code), cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- material -------------------------------------------------------------------------------------


def test_the_default_material_is_ten_large_and_ten_small_tensors_of_410_mb() -> None:
    """The layout that the figures speak of: 20 tensors, 410 MB within a thousandth."""
    shapes = [
        shape for weights in files.layers_of(Material()).values() for shape in weights.values()
    ]
    assert [len(shape) for shape in shapes] == [2, 1] * 10
    assert abs(sum(4 * int(np.prod(shape)) for shape in shapes) / (410 * MB) - 1) < 0.001


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(
    "change", [{}, {"compression": "gzip"}, {"optimizer": True}, {"count": 10, "nbytes": 5120}]
)
def test_material_is_what_was_asked_for(tmp_path: Path, dtype: str, change: Any) -> None:
    """Sizes and types are as described, values are finite, random and of each file's own."""
    asked = replace(_TINY, dtype=dtype, **change)
    made = material.make(asked, tmp_path / "made")
    models = [read_model(path) for path in made.paths]
    inside = [name for name in models[0] if name.startswith("model_weights/")]
    assert len(inside) == made.tensors
    assert sum(models[0][name].nbytes for name in inside) == made.nbytes
    assert 0.8 < made.nbytes / asked.nbytes <= 1.1
    assert (len(models[0]) == 2 * made.tensors) == asked.optimizer
    for name in models[0]:
        first, second = models[0][name], models[1][name]
        assert first.dtype == ("V2" if dtype == "bfloat16" else dtype)
        assert first.tobytes() != second.tobytes()
        values = first
        if dtype == "bfloat16":
            values = (first.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        assert np.all(np.abs(values) <= 0.5)


def test_safetensors_hold_the_same_tensors(tmp_path: Path) -> None:
    """Mergekit is given the very values that the others are given."""
    made = material.make(replace(_TINY, safetensors=True), tmp_path / "made")
    for path, twin in zip(made.paths, made.safetensors, strict=True):
        folder = tmp_path / twin.stem
        folder.mkdir()
        twin.rename(folder / "model.safetensors")
        assert material.compare(path, folder, tmp_path) == {"same": True, "deviation": 0.0}


def test_long_lists_of_names_are_split_as_keras_does(tmp_path: Path) -> None:
    """A model of very many layers has its names in several attributes, as in Keras's files."""
    made = material.make(Material(2, 40_000 * 32, count=40_000), tmp_path / "made")
    with h5py.File(made.paths[1]) as file:
        attributes = dict(file["model_weights"].attrs)
    assert "layer_names" not in attributes
    names = [attributes[f"layer_names{k}"] for k in range(len(attributes))]
    assert max(part.nbytes for part in names) <= 64512
    assert sum(map(len, names)) == 10_000


def test_comparing_sees_one_bit_and_a_missing_tensor(tmp_path: Path) -> None:
    """An output that is not the average cannot pass as one."""
    made = material.make(_TINY, tmp_path / "made")
    reference, output = made.paths[0], tmp_path / "output.h5"
    output.write_bytes(reference.read_bytes())
    assert material.compare(reference, output, tmp_path)["same"]
    name = "model_weights/dense/sequential/dense/bias"
    with h5py.File(output, "r+") as file:
        file[name][0] = np.nextafter(file[name][0], np.float32(1))
    found = material.compare(reference, output, tmp_path)
    assert not found["same"]
    assert 0 < found["deviation"] < 1e-6
    with pytest.raises(Failed, match="off by up to"):
        compare.judge(Contender("polyak", "polyak", [], output), reference, tmp_path)
    assert "off by" in compare.judge(Contender("other", "o", [], output), reference, tmp_path)
    with h5py.File(output, "r+") as file:
        del file[name]
    with pytest.raises(Failed, match="1 tensors are missing"):
        material.compare(reference, output, tmp_path)


# --- contenders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["loop-float64", "tutorial-h5py", "loop-float32"])
def test_rivals_average(tmp_path: Path, way: str) -> None:
    """Each h5py script writes the average: the float64 ones bit for bit as the oracle does."""
    # Of ten files some means are ties, which multiplying by a rounded 1/10 would round wrongly.
    made = material.make(replace(_TINY, files=10), tmp_path / "made")
    output = tmp_path / "output.h5"
    script = Path(compare.__file__).with_name("rivals.py")
    measure.run([sys.executable, str(script), way, str(output), *map(str, made.paths)])
    expected = naive_average(made.paths, [1] * 10)
    found = read_model(output)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        if way == "loop-float32":
            assert np.allclose(found[name], values, rtol=0, atol=1e-7)
        else:
            assert found[name].tobytes() == values.tobytes()


def test_the_floor_reads_every_byte_once_and_writes_as_much_as_one_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The floor does all that averaging cannot avoid, and nothing twice."""
    made = material.make(replace(_TINY, nbytes=3 * MB), tmp_path / "made")
    read: list[int] = []
    readv = os.readv

    def counting(descriptor: int, buffers: Any) -> int:
        read.append(readv(descriptor, buffers))
        return read[-1]

    monkeypatch.setattr(os, "readv", counting)
    monkeypatch.setattr(floor, "_PORTION", (1 << 21) + 5)
    floor.main(2, 0, str(tmp_path / "output"), [str(path) for path in made.paths])
    sizes = [path.stat().st_size for path in made.paths]
    assert sum(read) == sum(sizes)
    assert max(read) == 1 << 20
    assert (tmp_path / "output").stat().st_size == sizes[-1]
    read.clear()
    floor.main(2, 3, str(tmp_path / "several"), [str(path) for path in made.paths])
    assert sum(read) == sum(sizes)
    assert [path.stat().st_size for path in (tmp_path / "several").iterdir()] == [sizes[-1]] * 3


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the page cache cannot be steered")
def test_the_page_cache_is_seen_and_steered(tmp_path: Path) -> None:
    """Warm files are wholly resident; dropped ones are not, if their file system has a disk."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    machine.warm([path])
    assert machine.resident([path]) == 1.0
    machine.drop([path])
    if machine.facts(tmp_path)["file system"] in ("tmpfs", "ramfs", "overlay"):
        pytest.skip("this file system may live in memory")
    assert machine.resident([path]) == 0.0
    machine.warm([path])
    assert machine.resident([path]) == 1.0


def test_what_was_not_wholly_warm_is_not_reported_as_warm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that the system evicts is reported; inputs larger than the page cache are refused."""
    path = tmp_path / "file"
    path.write_bytes(b"x")
    for shares, note in (
        ([1.0, 1.0], "held every page"),
        ([1.0, 0.99999], "held at least 99.99 %"),
        ([1.0, None], "unknown"),
    ):
        warmth = machine.Warmth()
        for share in shares:
            monkeypatch.setattr(machine, "resident", lambda _, share=share: share)
            warmth.keep([path])
        assert note in warmth.note()
    monkeypatch.setattr(machine, "resident", lambda _: 0.9)
    with pytest.raises(Failed, match=r"only 90\.0% of the inputs"):
        machine.Warmth().keep([path])


# --- the experiments ------------------------------------------------------------------------------


def test_growth_plans_what_the_figures_need() -> None:
    """Every series is there, its points differ, and what follows on another shares its material."""
    series = growth.plan(full=True)
    assert len({one.key for one in series}) == len(series)
    for one in series:
        assert len({point.label for point in one.points}) == len(one.points) >= 2
    largest = {one.key: max(point.material.nbytes for point in one.points) for one in series}
    assert largest["size"] == largest["tensor"] == 4000 * MB
    small = [one for one in series if one.key.startswith("small")]
    assert [one.points[-1].material.count for one in small] == [100_000] * 3
    # The default leaves room on a disk of 12 GB: one material at a time.
    points = [point for one in growth.plan() for point in one.points]
    assert max(p.material.nbytes * p.material.files for p in points) <= 4100 * MB


def test_reach_plans_what_the_figures_need() -> None:
    """Every section is there; one material at a time, with all outputs, fits into 12 GB."""
    sections = {section.key: section for section in reach.plan(10, 410 * MB)}
    assert [*sections] == [
        *("main", "several", "cold", "bfloat16", "float16", "checkpoints", "small")
    ]
    for section in sections.values():
        copies = 2 if section.material.safetensors else 1
        used = section.material.nbytes * (section.material.files * copies + reach.SEVERAL)
        assert used <= 12_000 * MB
    assert sections["checkpoints"].material.files == 100
    assert sections["main"].material == sections["several"].material == sections["cold"].material


def test_both_kernels_are_measured_where_both_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel is asked for by name, and averages of one kernel are put beside one another."""
    ours = [Contender("polyak-one", "a", []), Contender("polyak", "b", [], beside="polyak-one")]
    monkeypatch.setattr(reach, "has_compiled", lambda: True)
    found = {one.key: (one.variables["POLYAK_KERNEL"], one.beside) for one in reach._both(*ours)}
    assert found == {
        "polyak-one": ("compiled", "floor"),
        "polyak": ("compiled", "polyak-one"),
        "polyak-one-numpy": ("numpy", "floor"),
        "polyak-numpy": ("numpy", "polyak-one-numpy"),
    }
    monkeypatch.setattr(reach, "has_compiled", lambda: False)
    assert [(one.key, dict(one.variables)) for one in reach._both(*ours)] == [
        ("polyak-one", {}),
        ("polyak", {}),
    ]


def test_the_visit_sees_every_tensor(tmp_path: Path) -> None:
    """What small tensors are compared with looks at all tensors of all files."""
    made = material.make(replace(_TINY, count=40), tmp_path / "made")
    script = Path(compare.__file__).with_name("visit.py")
    done = subprocess.run(
        [sys.executable, script, *made.paths], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == 3 * made.tensors == 120


def test_several_averages_begin_with_the_equal_one(tmp_path: Path) -> None:
    """The script that stands beside one average writes as many as asked for, and true ones."""
    made = material.make(_TINY, tmp_path / "made")
    folder = tmp_path / "several"
    start = [sys.executable, "-m", "tests.benchmarks.several", "1", "3", str(folder)]
    measure.run([*start, *map(str, made.paths)])
    assert sorted(path.name for path in folder.iterdir()) == ["0.h5", "1.h5", "2.h5"]
    equal = naive_average(made.paths, [1] * 3)
    for name, values in read_model(folder / "0.h5").items():
        assert np.allclose(values, equal[name], rtol=0, atol=1e-7)
    later = naive_average(made.paths, [1, 2, 3])
    for name, values in read_model(folder / "1.h5").items():
        assert np.allclose(values, later[name], rtol=0, atol=1e-7)


def test_growth_measures_and_tells_what_was_reached(tmp_path: Path) -> None:
    """A run leaves JSON and a table, removes its scratch, and says which limits hold."""
    done = _benchmark(
        *("growth", "--size", 1, "--rounds", 1, "--only", "gzip,optimizer", "--out", tmp_path)
    )
    assert done.returncode == 0, done.stderr + done.stdout
    data = json.loads((tmp_path / "growth.json").read_text())
    assert [one["key"] for one in data["series"]] == ["gzip", "optimizer"]
    for point in (point for one in data["series"] for point in one["points"]):
        assert point["error"] == ""
        assert point["seconds_per_gigabyte"] == pytest.approx(point["seconds"] / point["gigabytes"])
        assert 20e6 < point["peak"] < 200e6
    reached = {reach["what"]: reach["value"] for reach in data["reach"]}
    points = {point["label"]: point for point in data["series"][0]["points"]}
    expected = points["1"]["seconds"] / points["2"]["seconds"]
    assert reached["gzip, one thread against two"] == pytest.approx(expected)
    assert "| drop |" in (tmp_path / "growth.md").read_text()
    assert not list(tmp_path.glob("scratch-*"))


@pytest.mark.parametrize("experiment", ["growth", "reach"])
def test_an_unknown_series_is_refused(capsys: pytest.CaptureFixture[str], experiment: str) -> None:
    """A misspelt series, or section, is not silently left out."""
    with pytest.raises(SystemExit):
        command.main([experiment, "--only", "gzp"])
    assert "no such series: gzp" in capsys.readouterr().err


def test_startup_exits_with_1_where_a_limit_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limits of starting are a gate."""
    for value, code in ((2.1, 1), (1.9, 0)):
        reached = {
            "title": "Starting",
            "notes": [],
            "machine": {},
            "rows": [],
            "reach": [Reach("--help", value, 2.0).data()],
        }
        monkeypatch.setitem(command._EXPERIMENTS, "startup", lambda *_, reached=reached: reached)
        assert command.main(["startup", "--out", str(tmp_path)]) == code


def test_all_ways_agree_and_charts_are_drawn(tmp_path: Path) -> None:
    """The whole comparison runs at a small size: outputs are checked, charts and tables written."""
    done = _benchmark("compare", "--size", 1, "--rounds", 1, "--files", 3, "--out", tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    data = json.loads((tmp_path / "compare.json").read_text())
    rows = {row["key"]: row for row in data["rows"]}
    assert {"floor", "polyak", "loop-float64", "tutorial-keras", "mergekit", "nces"} <= set(rows)
    assert rows["polyak"]["output"] == "the same bits"
    for row in rows.values():
        assert row["error"] == "" or row["error"].startswith(("skipped", "not measured")), row
    assert {"processor", "cores", "memory", "kernel"} <= set(data["machine"])
    assert "page cache was warm" in data["notes"][-1]
    assert (tmp_path / "compare.png").exists() or "no chart" in done.stdout


def test_reach_measures_every_section_and_says_what_was_reached(tmp_path: Path) -> None:
    """A run at a small size leaves a table, JSON and a line for each target, and no scratch."""
    done = _benchmark("reach", "--size", 1, "--rounds", 1, "--files", 3, "--out", tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    data = json.loads((tmp_path / "reach.json").read_text())
    rows = {(part["key"], row["key"]): row for part in data["sections"] for row in part["rows"]}
    for row in rows.values():
        assert row["error"] == "" or row["error"].startswith(("skipped", "not measured")), row
    for dtype in ("main", "bfloat16", "float16"):
        assert rows[dtype, "polyak"]["output"] == "the same bits"
    one, several = rows["several", "polyak-one"], rows["several", "polyak-several"]
    assert several["ratio"] == pytest.approx(several["seconds"] / one["seconds"])
    assert "2.1 times" in rows["main", "alloy"]["error"]
    (cold,) = (part for part in data["sections"] if part["key"] == "cold")
    assert "page cache" in cold["notes"][0].lower()
    reached = {one["what"]: one for one in data["reach"]}
    assert [one["limit"] for one in reached.values()] == [
        *(1.35, 1.6, 10.0, 10.0, 2.5, 1.1, 1.6, 1.6, 1.0, 1.5, 64.0)
    ]
    for what in reached:
        assert what in (tmp_path / "reach.md").read_text()
        assert what in done.stdout
    few, many = rows["checkpoints", "polyak-10"], rows["checkpoints", "polyak-100"]
    found = reached["seconds per GB at 100 checkpoints against 10"]["value"]
    assert found == pytest.approx(many["seconds"] / few["seconds"] / 10)
    assert not list(tmp_path.glob("scratch-*"))


def test_what_stayed_in_the_page_cache_is_not_reported_as_cold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system in memory keeps its files, so its figures are not cold."""
    monkeypatch.setattr(machine, "drop", lambda _: None)
    for share, note in ((0.0, "at most 0.0%"), (1.0, "not cold"), (None, "unknown")):
        chill = machine.Chill()
        monkeypatch.setattr(machine, "resident", lambda _, share=share: share)
        chill.keep([tmp_path])
        assert note in chill.note()


def test_startup_runs(tmp_path: Path) -> None:
    """The short experiment leaves its result."""
    done = _benchmark("startup", "--rounds", 1, "--out", tmp_path)
    assert done.returncode in (0, 1), done.stderr + done.stdout  # 1: a limit missed, in one round
    startup = json.loads((tmp_path / "startup.json").read_text())
    assert all(not row["error"] for row in startup["rows"])
    assert [reach["limit"] for reach in startup["reach"]] == [1.5, 1.8]
