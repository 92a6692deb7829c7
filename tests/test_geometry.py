"""The geometry of a run: every number is that of numpy on whole models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from polyak_cli import Geometry, geometry
from polyak_cli.engine import grams
from polyak_cli.engine.executors import InProcess, Threads
from polyak_cli.engine.pairs import GroupProducts, InOrder, Products
from polyak_cli.engine.slabs import TUNING, Memory
from polyak_cli.errors import MismatchError, UsageError
from polyak_cli.evaluation import reports
from polyak_cli.examining import gram
from polyak_cli.examining.geometry import group_names
from tests.browser import find_faults, open_browser
from tests.command import SAMPLES, one_line, polyak
from tests.oracle import Array, write_model
from tests.test_keras_zip import members, write_archive
from tests.test_weights import write_weights

Tensors = dict[str, Array]
Vectors = np.ndarray[Any, Any]
NAN = np.float32("nan")


def make_run(count: int, dtype: Any = "float32", step: float = 0.02) -> list[Tensors]:
    """Return checkpoints that wander: a matrix of several slabs, small tensors, and a scalar."""
    rng = np.random.default_rng(count)
    shapes = {"k": (400, 300), "b": (300,), "small": (17, 5), "scalar": ()}
    now = {name: np.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    run = []
    for _ in range(count):
        now = {name: x + step * rng.normal(size=x.shape) for name, x in now.items()}
        run.append({name: np.asarray(x.astype(dtype)) for name, x in now.items()})
    return run


def flatten(run: list[Tensors]) -> Vectors:
    """Return whole models as vectors of long doubles."""
    return np.array(
        [np.concatenate([one[n].astype(np.longdouble).ravel() for n in run[0]]) for one in run]
    )


def norm(x: Vectors) -> Vectors:
    """Return the norms of vectors."""
    return np.asarray(np.sqrt((x**2).sum(axis=-1)))


def assert_geometry(found: Geometry, x: Vectors) -> None:
    """Fail if a number of the whole run is not that of its vectors."""
    data = found.data()

    def compare(got: object, wanted: object, tolerance: float = 1e-9) -> None:
        got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
        np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance * 1e-3)

    mean, steps, rows = x.mean(axis=0), np.diff(x, axis=0), data["checkpoints"]
    whole = norm(mean)
    compare(data["norm"], whole)
    compare([row["norm"] for row in rows], norm(x))
    compare([row["to_previous"] for row in rows[1:]], norm(steps) / whole)
    compare([row["to_newest"] for row in rows], norm(x - x[-1]) / whole)
    compare(data["distances"], [norm(x - one) / whole for one in x], 1e-7)
    turns = [a @ b / (norm(a) * norm(b)) for a, b in pairwise(steps)]
    compare([row["cosine"] for row in rows[1:-1]], turns)
    assert data["mean_cosine"] == (pytest.approx(float(np.mean(turns))) if turns else None)
    compare(data["spread"], (norm(x - mean) ** 2).mean() / whole**2)
    average = np.asarray(found.coefficients).astype(np.longdouble) @ x
    compare(data["average"]["norm"], norm(average))
    compare(data["average"]["from_equal"], norm(average - mean) / whole)
    compare([row["to_average"] for row in rows], norm(x - average) / whole)
    compare(found.to_average(), norm(x - average))
    values = np.linalg.svd((x - mean).astype(np.float64), compute_uv=False) ** 2
    compare(data["components"], values[: len(x)] / values.sum(), 1e-7)
    assert data["elements"] == x.shape[1]


# --- formats and types ----------------------------------------------------------------------------


def write_h5(path: Path, tensors: Tensors) -> None:
    """Write a Keras .h5 with plain datasets."""
    write_model(path.with_suffix(".h5"), {"d": tensors})


def write_packed(path: Path, tensors: Tensors) -> None:
    """Write a Keras .h5 whose matrices are compressed in chunks that no slab ends with."""
    layers = {
        n: {"v": v.reshape(-1, v.shape[-1]) if v.ndim else v[None, None]}
        for n, v in tensors.items()
    }
    storage = {"compression": "gzip", "compression_opts": 1}
    write_model(path.with_suffix(".h5"), layers, storage=storage)


def write_keras(path: Path, tensors: Tensors) -> None:
    """Write a .keras archive, laid out as Keras does."""
    write_archive(path.with_suffix(".keras"), members(tensors))


def write_npz(path: Path, tensors: Tensors) -> None:
    """Write numpy's archive."""
    arrays: dict[str, Any] = tensors
    np.savez(path.with_suffix(".npz"), **arrays)


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """Write a file with the format's own library."""
    save_file(tensors, path.with_suffix(".safetensors"))


@pytest.mark.parametrize(
    ("write", "dtype"),
    [
        (write_h5, "float32"),
        (write_packed, "float16"),
        (write_keras, "float64"),
        (write_npz, ">f8"),
        (write_safetensors, ml_dtypes.bfloat16),
        (write_safetensors, "float16"),
    ],
)
def test_the_numbers_are_those_of_numpy(
    tmp_path: Path, write: Callable[[Path, Tensors], None], dtype: Any
) -> None:
    """In every format and type, also of averages that weigh by a scheme."""
    run = make_run(5, dtype)
    for k, tensors in enumerate(run):
        write(tmp_path / f"m_{k + 1}", tensors)
    assert_geometry(geometry(tmp_path), flatten(run))
    assert_geometry(geometry(tmp_path, scheme="exp", alpha=2.0, last=3), flatten(run[-3:]))


def write_run(folder: Path, run: list[Tensors]) -> Path:
    """Write a run as .npz files."""
    folder.mkdir(exist_ok=True)
    for k, tensors in enumerate(run):
        write_npz(folder / f"m_{k + 1:02}", tensors)
    return folder


def test_each_tensor_has_its_own_numbers(tmp_path: Path) -> None:
    """Shares, relative movement and cosines of each tensor; the one that moves most is first."""
    run = make_run(6)
    found = geometry(write_run(tmp_path, run))
    whole = flatten(run)
    total = (norm(whole - whole.mean(axis=0)) ** 2).sum()
    for one in found.moved:
        x = flatten([{one.name: tensors[one.name]} for tensors in run])
        apart, size = norm(x - x.mean(axis=0)) ** 2, norm(x.mean(axis=0))
        assert one.share == pytest.approx(float(apart.sum() / total), rel=1e-9)
        assert one.relative == pytest.approx(float(np.sqrt(apart.mean()) / size), rel=1e-9)
        assert one.norm == pytest.approx(float(size))
        assert one.elements == x.shape[1]
        turns = [a @ b / (norm(a) * norm(b)) for a, b in pairwise(np.diff(x, axis=0))]
        assert one.cosine == pytest.approx(float(np.mean(turns)), rel=1e-9)
        own = gram.distances_to_average(found.groups[one.name], found.coefficients)
        np.testing.assert_allclose(own, norm(x - x.mean(axis=0)).astype(float), rtol=1e-9)
    assert found.moved[0].name == "k"
    assert sum(one.share for one in found.moved) == pytest.approx(1.0)


def test_any_other_average_needs_no_second_reading(tmp_path: Path) -> None:
    """Distances to averages of any sign come from the value, also after the files are gone."""
    run = make_run(5)
    found = geometry(write_run(tmp_path, run))
    for path in tmp_path.iterdir():
        path.unlink()
    x, c = flatten(run), np.array([-1.0, 0.0, 0.5, 0.0, 2.0]).astype(np.longdouble)
    wanted = norm(x - (c / c.sum()) @ x).astype(float)
    np.testing.assert_allclose(found.to_average([-1, 0, 0.5, 0, 2]), wanted, rtol=1e-9)
    write_run(tmp_path, run)
    given = geometry(tmp_path, coefficients=[-1, 0, 0.5, 0, 2])
    assert_geometry(given, x)
    for wrong, why in (
        ([1.0] * 4, "4 numbers; expected 5"),
        ([0.1, 0.2, -0.3, 0, 0], "the sum is 0"),
        ([np.nan] * 5, "number 1 is nan"),
    ):
        with pytest.raises(UsageError, match=why):
            found.to_average(wrong)
    # Whose sum overflows float64.
    wanted = norm(x - x.mean(axis=0)).astype(float)
    np.testing.assert_allclose(found.to_average([1e308] * 5), wanted, rtol=1e-9)


# --- the same numbers in any way ------------------------------------------------------------------


def test_the_number_of_threads_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any number of threads gives the same Gram matrix to the last bit, of a tensor and of all."""
    write_run(tmp_path, make_run(4))
    for k, tensors in enumerate(make_run(2)):
        write_packed(tmp_path / f"q_{k}", tensors)
    share = grams.share_memory
    tuning = replace(TUNING, pieces_per_batch=1, slabs_per_batch=1)  # many batches, in any order

    def cut(*arguments: int) -> Memory:
        return share(*arguments)._replace(tuning=tuning)

    monkeypatch.setattr(grams, "share_memory", cut)
    for pattern in ("m_*", "q_*"):
        made = []
        for jobs in (1, 2, 3, 8):
            monkeypatch.setattr(grams, "_choose_executor", _thread if jobs > 1 else _alone)
            made.append(geometry(str(tmp_path / pattern), jobs=jobs))
        first, *others = made
        for other in others:
            for name, own in first.groups.items():
                assert own.inner.tobytes() == other.groups[name].inner.tobytes()
            assert first.gram.inner.tobytes() == other.gram.inner.tobytes()
            assert first.gram.along.tobytes() == other.gram.along.tobytes()


def _thread(_job: object, memory: Any) -> Any:
    return Threads(memory.jobs, memory.tuning)


def _alone(_job: object, memory: Any) -> Any:
    return InProcess(memory.tuning)


def test_batches_are_added_in_their_order() -> None:
    """However batches come, the sums are those of their order."""
    rng = np.random.default_rng(0)
    batches = []
    for number in range(6):
        sums = GroupProducts(number)
        sums.add(0, Products(rng.normal(size=(3, 3)) * 10.0**number, 5, 0))
        batches.append(sums)

    def add(order: list[int]) -> Array:
        total = InOrder()
        for k in order:
            total.add(batches[k])
        assert not total.waiting
        assert total.total.groups[0].size == 30
        return total.total.groups[0].matrix

    assert add([5, 3, 4, 0, 2, 1]).tobytes() == add([0, 1, 2, 3, 4, 5]).tobytes()


def test_more_checkpoints_take_no_more_memory() -> None:
    """Workers have fewer elements of each of more checkpoints; all buffers fit the bound."""
    for count in (2, 10, 100, 1000):
        memory = grams.share_memory(32 << 20, 4, count)
        assert memory.jobs * memory.most * memory.element <= 32 << 20
        assert memory.piece <= memory.most


def test_many_tensors_become_groups() -> None:
    """Names are cut where they part, as late as the number of groups allows."""
    names = [f"layer.{k}.{part}" for k in range(3) for part in ("q", "v")]
    assert group_names(names, 6) == names
    assert group_names(names, 5) == [f"layer.{k}." for k in (0, 0, 1, 1, 2, 2)]
    assert group_names(names, 2) == ["layer."] * 6
    assert group_names(["a", "b"], 1) == ["", ""]


# --- values that are odd --------------------------------------------------------------------------


def test_a_value_that_is_not_finite_is_named(tmp_path: Path) -> None:
    """File, tensor and element, and how to leave either out; those options work."""
    run = make_run(4)
    run[1]["k"].reshape(-1)[70_000] = NAN
    run[2]["b"][3] = np.inf
    write_run(tmp_path, run)
    with pytest.raises(MismatchError, match=r"m_0[23].npz: tensor '[kb]' holds (nan|inf)") as error:
        geometry(tmp_path)
    assert re.search(r"\(element \d+\), but \S+m_04.npz holds -?\d", str(error.value))
    done = polyak("geometry", tmp_path, cwd=tmp_path)
    assert (done.returncode, one_line(done.stderr)) == (3, str(error.value))
    del run[1:3]
    found = geometry(tmp_path, exclude=["m_02*", "m_03*"])
    assert_geometry(found, flatten(run))
    assert len(geometry(tmp_path, exclude_tensors=["k", "b"]).groups) == 2


def test_constants_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    """An infinite mask that every checkpoint has moves nothing, and is said; NaN throughout not."""
    run = make_run(3)
    clean = flatten([{n: v.copy() for n, v in one.items()} for one in run])
    for one in run:
        one["mask"] = np.array([0, -np.inf, -np.inf], np.float32)
    found = geometry(write_run(tmp_path / "a", run))
    assert_geometry(found, np.hstack([clean, np.zeros((3, 3))]))
    assert any("2 numbers of 1 tensor (mask) are infinite" in note for note in found.notes)
    for one in run:
        one["mask"] = np.full((2, 2), NAN)
    with pytest.raises(
        MismatchError, match=r"'mask' holds nan .* in every checkpoint: the run may"
    ):
        geometry(write_run(tmp_path / "b", run))


@pytest.mark.parametrize("large", [1e160, 1.7e308])
def test_squares_that_overflow_are_measured(tmp_path: Path, large: float) -> None:
    """Of values whose squares, or even whose differences, no float64 holds."""
    rng = np.random.default_rng(0)
    run = [{"k": rng.uniform(-1, 1, size=(50, 40)), "b": rng.normal(size=30)} for _ in range(4)]
    scaled = [{"k": one["k"] * large, "b": one["b"]} for one in run]
    data = geometry(write_run(tmp_path, scaled), allow=["two-runs"]).data()
    x = flatten([{"k": one["k"]} for one in run])
    mean = x.mean(axis=0)
    assert data["spread"] == pytest.approx(
        float((norm(x - mean) ** 2).mean() / norm(mean) ** 2), rel=1e-9
    )
    to_newest = [row["to_newest"] for row in data["checkpoints"]]
    np.testing.assert_allclose(to_newest, (norm(x - x[-1]) / norm(mean)).astype(float), rtol=1e-9)
    json.dumps(json.loads(reports.format_json(data)), allow_nan=False)


def test_a_spread_of_a_trillionth_of_the_norm_is_measured(tmp_path: Path) -> None:
    """Distances of 1e-12 of the norm keep their digits, since differences are multiplied."""
    rng = np.random.default_rng(0)
    base = np.round(rng.normal(size=(60, 50)) * 2**8) / 2**8
    run = [{"k": base + np.round(rng.normal(size=(60, 50)) * 8) * 2.0**-44} for _ in range(5)]
    found = geometry(write_run(tmp_path, run))
    assert found.spread is not None
    assert found.spread < 1e-23
    x = flatten(run)
    to_newest = [row["to_newest"] for row in found.data()["checkpoints"]]
    wanted = (norm(x - x[-1]) / norm(x.mean(axis=0))).astype(float)
    np.testing.assert_allclose(to_newest, wanted, rtol=1e-9)


def test_identical_and_constant_tensors_have_no_direction(tmp_path: Path) -> None:
    """What does not move has spread 0 and no cosine; two identical checkpoints are 0 apart."""
    one, *_, last = make_run(3)
    steady = {"steady": np.full((20, 20), 3, np.float32)}
    run = [one | steady, one | steady, last | steady]
    found = geometry(write_run(tmp_path / "a", run))
    rows = found.data()["checkpoints"]
    assert [row["to_previous"] for row in rows][:2] == [None, 0.0]
    assert rows[1]["cosine"] is None
    (still,) = [one for one in found.moved if one.name == "steady"]
    assert (still.share, still.relative, still.cosine) == (0.0, 0.0, None)
    same = geometry(write_run(tmp_path / "b", [one, one]))
    assert (same.spread, same.mean_cosine, same.effective_number) == (0.0, None, None)
    assert [one["to_average"] for one in same.data()["checkpoints"]] == [0.0, 0.0]


def test_whole_numbers_are_named_and_not_measured(tmp_path: Path) -> None:
    """A counter that averaging copies is no distance."""
    run = make_run(3)
    wanted = flatten([{**one} for one in run])
    for k, one in enumerate(run):
        one["count"] = np.array([1000 * k])
    found = geometry(write_run(tmp_path, run))
    assert_geometry(found, wanted)
    assert found.ignored == ("count",)
    assert "not measured: 1 tensor that averaging copies from the newest (count)" in found.notes


def test_statistics_that_hide_the_weights_are_said(tmp_path: Path) -> None:
    """BatchNorm's variances move more than all weights; a note says how to leave them out."""
    run = make_run(3)
    for k, one in enumerate(run):
        one["bn/moving_variance"] = np.full(30, 100.0 + 10 * k, np.float32)
    found = geometry(write_run(tmp_path, run))
    (note,) = [note for note in found.notes if "BatchNorm" in note]
    glob = re.findall(r"'(\S+)'", note)[0]
    assert_geometry(
        geometry(tmp_path, exclude_tensors=[glob]),
        flatten([{n: v for n, v in one.items() if "moving" not in n} for one in run]),
    )


def test_numbered_statistics_that_hide_the_weights_are_named(tmp_path: Path) -> None:
    """Keras's newer files number them; each name in the note leaves out what it names."""
    for k in range(3):
        norm = {f"layers/batch_normalization/vars/{n}": np.full(5, 1.0 + 9 * k) for n in (2, 3)}
        weights = {f"layers/batch_normalization/vars/{n}": np.ones(5) for n in (0, 1)}
        dense = {"layers/dense/vars/0": np.arange(40.0) + k / 9}
        write_weights(tmp_path / f"m_{k + 1}.weights.h5", {**weights, **norm, **dense})
    (note,) = [note for note in geometry(tmp_path).notes if "BatchNorm" in note]
    names = re.findall(r"layers/\S+/vars/\d", note)
    assert sorted(names) == [f"layers/batch_normalization/vars/{n}" for n in (2, 3)]
    found = geometry(tmp_path, exclude_tensors=names)
    assert not [note for note in found.notes if "BatchNorm's statistics make up" in note]


# --- what is refused ------------------------------------------------------------------------------


def test_two_runs_are_refused_as_averaging_refuses_them(tmp_path: Path) -> None:
    """Two seeds in one folder are two runs; `--allow two-runs` measures them, and says so."""
    one, other = make_run(4), make_run(5)
    run = [*one[:2], *other[:2]]
    write_run(tmp_path, run)
    with pytest.raises(MismatchError, match=r"these look like two runs: m_01.npz and m_02.npz"):
        geometry(tmp_path)
    found = geometry(tmp_path, allow=["two-runs"])
    assert_geometry(found, flatten(run))
    assert any(note.endswith("; measured anyway") for note in found.notes)


def test_one_checkpoint_and_options_of_outputs_are_refused(tmp_path: Path) -> None:
    """One checkpoint has no geometry; nothing is written, so nothing says how."""
    write_run(tmp_path, make_run(2)[:1])
    with pytest.raises(UsageError, match="found only one checkpoint"):
        geometry(tmp_path)
    with pytest.raises(UsageError, match="--dtype belongs to an average that is written"):
        geometry(tmp_path, dtype="float32")


# --- the command ----------------------------------------------------------------------------------


def test_an_average_outside_of_its_checkpoints_is_said() -> None:
    """Negative coefficients get the warning that averaging gives them; others get none."""
    plain = geometry(SAMPLES, last=2, coefficients=[1, 3])
    beyond = geometry(SAMPLES, last=2, coefficients=[-1, 2])
    assert not [note for note in plain.notes if "coefficients" in note]
    (note,) = [note for note in beyond.notes if "coefficients" in note]
    assert note.startswith("warning: some coefficients are negative; the absolute values sum to 3,")


def test_the_command_prints_what_the_function_finds(tmp_path: Path) -> None:
    """The sample run: its numbers in words and in JSON, and the same from Python."""
    done = polyak("geometry", SAMPLES, "--json", cwd=tmp_path)
    data, found = json.loads(done.stdout), geometry(SAMPLES)
    assert data["spread"] == found.spread == pytest.approx(2.2e-4, rel=0.02)
    assert data["mean_cosine"] == found.mean_cosine == pytest.approx(0.543, abs=1e-3)
    shown = polyak("geometry", SAMPLES, cwd=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    for text in ("model_499.h5", "2.210e-04", "+0.543", "dense/kernel", "73.6%"):
        assert text in shown.stdout
    assert "spread 0.000221" in repr(found)
    assert "model_499.h5" in found._repr_html_()


def test_pictures_and_page_are_drawn_without_data(tmp_path: Path) -> None:
    """PNG, SVG and a page that fetches nothing; another suffix is refused before any work."""
    pytest.importorskip("matplotlib")
    names = ["run.png", "run.svg", "run.html"]
    done = polyak(
        "geometry", SAMPLES, *(x for n in names for x in ("--plot", n)), "-q", cwd=tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    svg, page = ((tmp_path / name).read_text() for name in names[1:])
    for text in ("First component (69% of the spread)", ">average<", ">Epoch<"):
        assert text in svg
    assert "Cosine of each step with the next: -0.289 to 0.898." in svg
    assert re.findall(r"(?:src|href)=\"(?!#|http://www.w3|https://matplotlib)[^\"]*", page) == []
    assert "<script" not in page
    assert "dense/kernel" in page
    assert "<p>Drifting: of such windows of ten" in page
    done = polyak("geometry", "missing", "--plot", "run.pdf", cwd=tmp_path)
    assert (done.returncode, "expected .png, .svg or .html" in done.stderr) == (2, True)


@pytest.mark.slow
def test_the_page_is_readable_in_a_browser(tmp_path: Path) -> None:
    """On a phone and a desktop, light and dark, with long names, markup, and two checkpoints."""
    pytest.importorskip("matplotlib")
    with open_browser() as browser:
        for count in (2, 7):
            folder = tmp_path / f"of{count}"
            run = [{"<b>&" + "x" * 120: one["k"], "b": one["b"]} for one in make_run(count)]
            write_run(folder, run)
            page = tmp_path / f"{count}.html"
            reports.write_picture(geometry(folder).data(), page)
            assert "<b>" not in page.read_text()
            assert find_faults(browser, page) == []
