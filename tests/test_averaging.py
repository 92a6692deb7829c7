"""The main job: the bits of the result, the fate of every tensor, and what is said about it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import polyak_cli
from polyak_cli import average, plan, run
from polyak_cli.engine import slabs
from polyak_cli.errors import (
    CheckpointError,
    FormatError,
    MismatchError,
    OutputError,
    PolyakError,
    UsageError,
)
from polyak_cli.pipeline.stages import Options
from tests.oracle import Array, naive_average, nearest_bfloat16, read_model, same_bits, write_model

SCHEMES: list[Options] = [
    {"scheme": "equal"},
    {"scheme": "linear"},
    {"scheme": "exp", "alpha": 2},
    {"scheme": "ema", "decay": 0.9},
    {"scheme": "power", "sigma": 0.1},
    {"coefficients": [5, 0, 0.25, 3]},
]


def model(rng: np.random.Generator, dtype: str = "float32", scale: float = 1.0) -> Any:
    """Return the tensors of a small model with a counter and a table beside the floats."""

    def values(*shape: int) -> Array:
        return np.asarray(rng.normal(3, size=shape) * scale).astype(dtype)

    return {
        "dense": {"seq/dense/kernel": values(33, 17), "seq/dense/bias": values(17)},
        "dense_1": {"seq/dense_1/kernel": values(17, 5), "seq/dense_1/scale": values()},
        "empty": {},
        "lookup": {
            "count": np.array(7, np.int64),
            "table": np.arange(5, dtype=np.int32),
            "mask": np.array([True, False]),
        },
    }


def write_run(
    folder: Path, count: int = 4, dtype: str = "float32", seed: int = 0, **options: Any
) -> list[Path]:
    """Write the checkpoints of a run, model_1.h5 the oldest."""
    rng = np.random.default_rng(seed)
    return [
        write_model(folder / f"model_{k + 1}.h5", model(rng, dtype), **options)
        for k in range(count)
    ]


def tensors(path: Path) -> dict[str, Array]:
    """Return what h5py reads below model_weights."""
    return {k: v for k, v in read_model(path).items() if k.startswith("model_weights/")}


# --- the bits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 2, 5])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
@pytest.mark.parametrize("options", SCHEMES, ids=lambda o: str(next(iter(o.values()))))
def test_the_result_equals_the_naive_average_bit_for_bit(
    tmp_path: Path, options: Options, dtype: str, jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every scheme, type and number of workers: whole tensors in float64, rounded once."""
    # Small as the files are, they are divided among processes.
    monkeypatch.setattr(slabs, "TUNING", slabs.Tuning(fork_nbytes=0))
    paths = write_run(tmp_path, dtype=dtype)
    threaded: Options = {**options, "jobs": jobs}
    report = average(tmp_path, tmp_path / "o.h5", **threaded)
    expected = naive_average(paths, report.plan.mean.multipliers)
    assert same_bits(tensors(tmp_path / "o.h5"), expected)


def test_bfloat16_equals_the_naive_average(tmp_path: Path) -> None:
    """Two-byte opaque tensors are bfloat16, widened, folded and rounded once."""
    rng = np.random.default_rng(0)
    singles = [rng.normal(3, size=1000).astype(np.float32) for _ in range(3)]
    halves = [(s.view(np.uint32) >> 16).astype(np.uint16) for s in singles]
    for k, bits in enumerate(halves):
        write_model(tmp_path / f"m_{k}.h5", {"d": {"k": bits.view("V2")}})
    report = average(tmp_path, tmp_path / "o.h5", scheme="exp")
    total = np.zeros(1000)
    mean = report.plan.mean
    for multiplier, bits in zip(mean.multipliers, halves, strict=True):
        total += multiplier * (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    expected = [nearest_bfloat16(value) for value in total / math.fsum(mean.multipliers)]
    found = read_model(tmp_path / "o.h5")["model_weights/d/k"].view(np.uint16)
    assert found.tolist() == expected
    assert any("Keras cannot load bfloat16" in note for note in report.notes)


@pytest.mark.parametrize("options", SCHEMES[:5], ids=lambda o: str(next(iter(o.values()))))
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_identical_checkpoints_average_to_identical_bits(
    tmp_path: Path, options: Options, dtype: str
) -> None:
    """Fifty copies of one model give that model, whatever the coefficients; -0.0 too."""
    values = model(np.random.default_rng(0), dtype)
    values["dense"]["seq/dense/bias"][:3] = [-0.0, 0.0, np.finfo(dtype).smallest_subnormal]
    values["dense"]["seq/dense/bias"][3:5] = [np.finfo(dtype).max, np.finfo(dtype).min]
    paths = [write_model(tmp_path / f"m_{k}.h5", values) for k in range(50)]
    average(tmp_path, tmp_path / "o.h5", **options)
    assert same_bits(tensors(tmp_path / "o.h5"), tensors(paths[0]))


@pytest.mark.parametrize("scheme", ["equal", "exp"])
def test_identical_float64_checkpoints_stay_near(tmp_path: Path, scheme: str) -> None:
    """float64 has no wider type to sum in: half a unit in the last place for each checkpoint."""
    paths = []
    for k in range(10):
        values = model(np.random.default_rng(0), "float64")
        paths.append(write_model(tmp_path / f"m_{k}.h5", values))
    average(tmp_path, tmp_path / "o.h5", scheme=scheme)
    found, expected = tensors(tmp_path / "o.h5"), tensors(paths[0])
    for name, values in expected.items():
        if values.dtype == np.float64:
            np.testing.assert_array_max_ulp(found[name], values, maxulp=5)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_one_checkpoint_averages_to_itself(tmp_path: Path, dtype: str) -> None:
    """A window of one is the checkpoint, bit for bit."""
    paths = write_run(tmp_path, dtype=dtype)
    for options in SCHEMES[:5]:
        one: Options = {**options, "last": 1, "force": True, "exclude": ["o.h5"]}
        average(tmp_path, tmp_path / "o.h5", **one)
        assert same_bits(tensors(tmp_path / "o.h5"), tensors(paths[-1]))


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    st.data(),
    st.sampled_from([np.float16, np.float32, np.float64]),
    st.integers(1, 5),
    st.integers(1, 3),
)
def test_any_values_equal_the_naive_average(
    tmp_path_factory: pytest.TempPathFactory, data: Any, dtype: Any, count: int, jobs: int
) -> None:
    """Subnormals, signed zeros and great numbers included."""
    folder = tmp_path_factory.mktemp("run")
    # Of fewer elements than tell whether unlike values are of one run.
    shape = data.draw(hnp.array_shapes(max_dims=4, max_side=3))
    info = np.finfo(dtype)
    elements = hnp.from_dtype(
        np.dtype(dtype),
        min_value=float(info.min) / 4,
        max_value=float(info.max) / 4,
        allow_nan=False,
        allow_subnormal=True,
    )
    drawn = [data.draw(hnp.arrays(dtype, shape, elements=elements)) for _ in range(count)]
    paths = [
        write_model(folder / f"m_{k}.h5", {"d": {"k": values}}) for k, values in enumerate(drawn)
    ]
    report = average(folder, folder / "o.h5", scheme="exp", jobs=jobs)
    expected = naive_average(paths, report.plan.mean.multipliers)
    assert same_bits(tensors(folder / "o.h5"), expected)


@pytest.mark.parametrize(
    "storage",
    [
        {"chunks": True},
        {"chunks": True, "compression": "gzip", "shuffle": True},
        {"chunks": True, "compression": "lzf", "fletcher32": True},
    ],
    ids=["chunked", "gzip", "lzf"],
)
def test_compressed_checkpoints_give_the_same_bits(tmp_path: Path, storage: Any) -> None:
    """How a checkpoint is stored does not matter, and checkpoints may differ in it."""
    for name in ("plain", "packed", "mixed"):
        (tmp_path / name).mkdir()
    plain = write_run(tmp_path / "plain")
    packed = write_run(tmp_path / "packed", storage=storage)
    for k, (one, other) in enumerate(zip(plain, packed, strict=True)):
        (tmp_path / "mixed" / one.name).write_bytes((one, other)[k % 2].read_bytes())
    results = []
    for name in ("plain", "packed", "mixed"):
        average(tmp_path / name, tmp_path / f"{name}.h5", scheme="linear", jobs=2)
        results.append(tensors(tmp_path / f"{name}.h5"))
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


def test_large_chunked_tensors_are_folded_band_by_band(tmp_path: Path) -> None:
    """More than a slab of chunks, with little memory, is still the naive average."""
    rng = np.random.default_rng(0)
    storage = {"chunks": (100, 30), "compression": "gzip", "compression_opts": 1}
    paths = []
    for k in range(2):
        values = np.round(rng.normal(3, size=(1000, 700)), 2).astype(np.float32)
        paths.append(write_model(tmp_path / f"m_{k}.h5", {"d": {"k": values}}, storage=storage))
    report = average(tmp_path, tmp_path / "o.h5", jobs=3, max_memory=1 << 20)
    assert same_bits(tensors(tmp_path / "o.h5"), naive_average(paths, report.plan.mean.multipliers))


@pytest.mark.parametrize(
    ("dtype", "stored"), [("float16", "<f2"), ("float32", "<f4"), ("float64", "<f8")]
)
def test_the_stored_type_may_be_another(tmp_path: Path, dtype: str, stored: str) -> None:
    """--dtype rounds once, from float64 to the type wanted; integers stay as they are."""
    paths = write_run(tmp_path)
    report = average(tmp_path, tmp_path / "o.h5", dtype=dtype)
    expected = naive_average(paths, report.plan.mean.multipliers, dtype=stored)
    assert same_bits(tensors(tmp_path / "o.h5"), expected)


def test_an_average_that_does_not_fit_the_stored_type_is_refused(tmp_path: Path) -> None:
    """Nothing becomes infinity silently."""
    write_model(tmp_path / "m_1.h5", {"d": {"k": np.array([1e6], np.float32)}})
    with pytest.raises(MismatchError, match=r"'d/k' holds 1e\+06, which float16 cannot store"):
        average(tmp_path, tmp_path / "o.h5", dtype="float16")
    assert sorted(os.listdir(tmp_path)) == ["m_1.h5"]
    average(tmp_path, tmp_path / "o.h5", dtype="float16", allow_nonfinite=True)
    assert np.isposinf(tensors(tmp_path / "o.h5")["model_weights/d/k"][0])


# --- fates ----------------------------------------------------------------------------------------


def test_integers_booleans_and_strings_are_carried_and_differences_noted(tmp_path: Path) -> None:
    """They come from the newest checkpoint; one that differs is named."""
    for k in range(3):
        layers: dict[str, Any] = {
            "d": {
                "kernel": np.ones(3, np.float32),
                "same": np.arange(3),
                "other": np.array([1, 2, k]),
                "flag": np.array(k == 2),
                "fixed": np.array([b"a", b"b" * (k + 1)]),
                "text": np.array(["a", f"ü{k}"], object),
                "words": np.array(["a", "b"], object),
            }
        }
        write_model(tmp_path / f"m_{k}.h5", layers)
    report = average(tmp_path, tmp_path / "o.h5")
    found, newest = tensors(tmp_path / "o.h5"), tensors(tmp_path / "m_2.h5")
    for name in ("same", "other", "flag", "fixed"):
        assert (
            found[f"model_weights/d/{name}"].tobytes()
            == newest[f"model_weights/d/{name}"].tobytes()
        )
    assert list(found["model_weights/d/text"]) == [b"a", "ü2".encode()]
    assert report.plan.averaged == ("d/kernel",)
    noted = {note.split("'")[1] for note in report.notes if "differs between checkpoints" in note}
    assert noted == {"d/other", "d/flag", "d/fixed", "d/text"}


def test_optimizer_state_is_dropped_without_a_trace(tmp_path: Path) -> None:
    """The output is the file that a run without optimizer state would have given."""
    state = {"sgd/iteration": np.array(1), "sgd/momentum": np.ones(1000, np.float32)}
    for name, optimizer in (("with", state), ("without", None)):
        (tmp_path / name).mkdir()
        write_run(tmp_path / name, optimizer=optimizer)
    report = average(tmp_path / "with", tmp_path / "a.h5")
    average(tmp_path / "without", tmp_path / "b.h5")
    assert report.plan.dropped == (
        "/optimizer_weights/sgd/iteration",
        "/optimizer_weights/sgd/momentum",
    )
    with h5py.File(tmp_path / "a.h5") as file:
        assert "optimizer_weights" not in file
    # The records of the inputs' sizes differ by a digit or two, not by the state's 4,000 bytes.
    sizes = [(tmp_path / f"{n}.h5").stat().st_size for n in "ab"]
    assert abs(sizes[0] - sizes[1]) < 64


def test_optimizer_state_of_the_newest_is_kept_on_demand(tmp_path: Path) -> None:
    """--optimizer newest carries it bit for bit, and says what Keras makes of it."""
    rng = np.random.default_rng(0)
    for k in range(3):
        state = {"sgd/iteration": np.array(k), "sgd/m": rng.normal(3, size=9).astype(np.float32)}
        write_model(tmp_path / f"m_{k}.h5", model(rng), optimizer=state)
    report = average(tmp_path, tmp_path / "o.h5", optimizer="newest")
    found, newest = read_model(tmp_path / "o.h5"), read_model(tmp_path / "m_2.h5")
    for name in ("iteration", "m"):
        key = f"optimizer_weights/sgd/{name}"
        assert found[key].tobytes() == newest[key].tobytes()
    assert any("fit()" in note for note in report.notes)
    assert report.plan.dropped == ()


def test_globs_choose_what_is_averaged(tmp_path: Path) -> None:
    """What --include-tensors leaves out or --exclude-tensors names is carried from the newest."""
    paths = write_run(tmp_path)
    newest, mean = tensors(paths[-1]), naive_average(paths, [0.25] * 4)
    cases: list[tuple[Options, str]] = [
        ({"include_tensors": ["*/kernel"]}, "kernel"),
        ({"exclude_tensors": ["*/bias", "*/scale"]}, "kernel"),
        ({"include_tensors": ["dense/*"], "exclude_tensors": ["*kernel"]}, "dense/bias"),
    ]
    for k, (options, averaged) in enumerate(cases):
        apart: Options = {**options, "exclude": ["o_*"]}
        average(tmp_path, tmp_path / f"o_{k}.h5", **apart)
        found = tensors(tmp_path / f"o_{k}.h5")
        for name, values in found.items():
            source = mean if name.endswith(averaged) else newest
            assert values.tobytes() == source[name].tobytes(), (k, name)


@pytest.mark.parametrize("option", ["include_tensors", "exclude_tensors"])
def test_a_glob_that_matches_nothing_is_an_error(tmp_path: Path, option: str) -> None:
    """A misspelt pattern does not silently average everything or nothing."""
    write_run(tmp_path)
    with pytest.raises(UsageError, match="'kernle' matches no tensor"):
        plan(tmp_path, **{option: ["kernle"]})  # type: ignore[arg-type] # the key is a parameter


def test_excluding_everything_is_an_error(tmp_path: Path) -> None:
    """An average of nothing is not written."""
    write_run(tmp_path)
    with pytest.raises(MismatchError, match="nothing to average"):
        plan(tmp_path, exclude_tensors=["*"])


def test_batchnorm_statistics_are_averaged_and_counted(tmp_path: Path) -> None:
    """Moving mean and variance of every generation are recognised, and the note says what to do."""
    names = ["gamma", "beta", "moving_mean", "moving_variance", "moving_mean:0"]
    for k in range(2):
        weights = {name: np.full(3, k, np.float32) for name in names}
        write_model(tmp_path / f"m_{k}.h5", {"bn": weights})
    report = average(tmp_path, tmp_path / "o.h5")
    assert (tensors(tmp_path / "o.h5")["model_weights/bn/moving_mean"] == 0.5).all()
    (note,) = (note for note in report.notes if "BatchNorm" in note)
    assert note == (
        "3 BatchNorm moving statistics are averaged; recompute them on training data "
        "(--recalibrate DATA)"
    )
    alone = average(tmp_path / "m_1.h5", tmp_path / "copy.h5")
    assert not [note for note in alone.notes if "BatchNorm" in note]  # a copy's still fit


@pytest.mark.parametrize("dtype", [np.complex64, np.longdouble])
def test_types_that_cannot_be_averaged_are_refused_or_carried(tmp_path: Path, dtype: Any) -> None:
    """A complex tensor is not averaged by accident; it can be carried on demand."""
    for k in range(2):
        layers: dict[str, Any] = {"d": {"k": np.ones(2, np.float32), "c": np.ones(2, dtype)}}
        write_model(tmp_path / f"m_{k}.h5", layers)
    with pytest.raises(MismatchError, match=r"tensor 'd/c' is of type .* not averaged"):
        plan(tmp_path)
    assert plan(tmp_path, exclude_tensors=["d/c"]).carried == ("d/c",)


def test_quantised_models_are_refused(tmp_path: Path) -> None:
    """An int8 kernel with its scale can neither be averaged nor carried."""
    layers: dict[str, Any] = {
        "d": {"kernel": np.ones(2, np.int8), "kernel_scale": np.ones(1, np.float32)}
    }
    write_model(tmp_path / "m_1.h5", layers)
    with pytest.raises(MismatchError, match="quantised"):
        plan(tmp_path)


# --- which belong together ------------------------------------------------------------------------


def two(folder: Path, first: Mapping[str, Any], second: Mapping[str, Any]) -> Path:
    """Write two checkpoints and return their folder."""
    write_model(folder / "m_1.h5", first)
    write_model(folder / "m_2.h5", second)
    return folder


K = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"d": {}}, {"d": {"k": K}}, r"m_1\.h5: has no tensor 'd/k', but .*m_2\.h5 has"),
        ({"d": {"k": K, "b": K}}, {"d": {"k": K}}, r"m_1\.h5: has a tensor 'd/b' that .*m_2"),
        (
            {"d": {"k": K}},
            {"d": {"k": K[:, :2]}},
            r"m_1\.h5: tensor 'd/k' has shape \(2, 3\), but .*m_2\.h5 has \(2, 2\)",
        ),
        (
            {"d": {"k": K}},
            {"d": {"k": K.reshape(3, 2)}},
            r"'d/k' has shape \(2, 3\), but .* has \(3, 2\)",
        ),
        (
            {"d": {"k": K}},
            {"d": {"k": K.astype(np.int32)}},
            r"m_1\.h5: tensor 'd/k' has dtype float32, but .*m_2\.h5 has int32",
        ),
    ],
    ids=["missing", "extra", "shape", "transposed", "dtype"],
)
def test_checkpoints_of_other_models_are_refused(
    tmp_path: Path, first: Any, second: Any, message: str
) -> None:
    """Missing, extra, reshaped and retyped tensors are named with both files; nothing is left."""
    two(tmp_path, first, second)
    with pytest.raises(MismatchError, match=message):
        average(tmp_path, tmp_path / "o.h5")
    assert sorted(os.listdir(tmp_path)) == ["m_1.h5", "m_2.h5"]


def test_a_mismatch_says_which_window_would_do(tmp_path: Path) -> None:
    """When only the older checkpoints differ, the message names the --last that leaves them out."""
    for k, width in enumerate([3, 3, 2, 2, 2]):
        write_model(tmp_path / f"m_{k}.h5", {"d": {"k": K[:, :width]}})
    with pytest.raises(MismatchError, match=r"or with --last 3$"):
        plan(tmp_path)
    assert len(plan(tmp_path, last=3).checkpoints) == 3


def test_a_frozen_sublayer_changes_only_the_order(tmp_path: Path) -> None:
    """Tensors are matched by name, and the newest file's order is kept."""
    a, b = np.zeros(3, np.float32), np.ones(3, np.float32)
    two(tmp_path, {"n": {"bn/g": a, "d/k": b}}, {"n": {"d/k": b, "bn/g": a}})
    average(tmp_path, tmp_path / "o.h5")
    found = tensors(tmp_path / "o.h5")
    assert found["model_weights/n/bn/g"].tolist() == [0, 0, 0]
    with h5py.File(tmp_path / "o.h5") as file:
        assert list(file["model_weights/n"].attrs["weight_names"]) == ["d/k", "bn/g"]


RENAMED = (
    {"dense": {"sequential/dense/kernel": K}, "dense_1": {"sequential/dense_1/kernel": K + 1}},
    {"dense_4": {"sequential_2/dense_4/kernel": K}, "dense_5": {"sequential_2/dense_5/kernel": K}},
)


def test_layers_that_keras_numbered_again_get_an_error_that_says_so(tmp_path: Path) -> None:
    """'dense' in one file and 'dense_4' in another are not guessed to be the same."""
    two(tmp_path, *RENAMED)
    with pytest.raises(MismatchError, match=r"'dense/sequential/dense/kernel' is called 'dense_4"):
        plan(tmp_path)
    with pytest.raises(MismatchError, match="Use --match order"):
        plan(tmp_path)


def test_match_order_pairs_by_position(tmp_path: Path) -> None:
    """On demand the first tensor goes with the first, under the newest file's names."""
    two(tmp_path, *RENAMED)
    average(tmp_path, tmp_path / "o.h5", match="order")
    found = tensors(tmp_path / "o.h5")
    assert np.array_equal(found["model_weights/dense_4/sequential_2/dense_4/kernel"], K)
    assert np.array_equal(found["model_weights/dense_5/sequential_2/dense_5/kernel"], K + 0.5)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"dense_4": {"kernel": K}}, "has 2 tensors, but .* has 1"),
        ({"a": {"kernel": K, "bias": K[0]}}, "has shape"),
        ({"a": {"kernel": K, "gamma": K}}, "they are not the same tensor"),
    ],
    ids=["count", "shape", "role"],
)
def test_match_order_checks_every_pair(tmp_path: Path, second: Any, message: str) -> None:
    """Count, shape, dtype and the last part of the name must agree."""
    two(tmp_path, {"dense": {"kernel": K, "bias": K}}, second)
    with pytest.raises(MismatchError, match=message):
        plan(tmp_path, match="order")


def test_another_configuration_is_noted(tmp_path: Path) -> None:
    """The configuration's bytes are compared, never parsed."""
    write_model(tmp_path / "m_1.h5", {"d": {"k": K}}, config="{[")
    write_model(tmp_path / "m_2.h5", {"d": {"k": K}}, config="{[[")
    assert any("model configuration differs" in note for note in plan(tmp_path).notes)


def test_nan_is_refused_by_name_or_allowed(tmp_path: Path) -> None:
    """NaN and infinity name file and tensor, unless they are allowed."""
    bad = K.copy()
    bad[1, 1] = np.inf
    two(tmp_path, {"d": {"k": bad}}, {"d": {"k": K}})
    with pytest.raises(MismatchError, match=r"m_1\.h5: tensor 'd/k' holds inf \(element 4\)"):
        average(tmp_path, tmp_path / "o.h5")
    assert sorted(os.listdir(tmp_path)) == ["m_1.h5", "m_2.h5"]
    average(tmp_path, tmp_path / "o.h5", allow_nonfinite=True)
    assert np.isposinf(tensors(tmp_path / "o.h5")["model_weights/d/k"][1, 1])


# --- plan, report, record -------------------------------------------------------------------------


def test_the_plan_tells_everything_and_writes_nothing(tmp_path: Path) -> None:
    """Checkpoints, coefficients, fates, bytes, what was passed over: before a tensor is read."""
    paths = write_run(tmp_path, optimizer={"iteration": np.array(1)})
    (tmp_path / "notes.txt").write_text("x")
    made = plan(tmp_path, tmp_path / "o.h5", scheme="linear", last=3)
    assert [c.epoch for c in made.checkpoints] == [2, 3, 4]
    assert made.coefficients == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert made.effective_number == pytest.approx(1 / (1 / 36 + 4 / 36 + 9 / 36))
    assert (len(made.averaged), len(made.carried), len(made.dropped)) == (4, 3, 1)
    floats = 4 * (33 * 17 + 17 + 17 * 5 + 1)
    assert made.bytes_to_read == 3 * (floats + 8 + 5 * 4 + 2)
    assert [passed.path.name for passed in made.passed_over] == ["notes.txt"]
    assert sorted(os.listdir(tmp_path)) == sorted([*(p.name for p in paths), "notes.txt"])
    data = json.loads(json.dumps(made.data()))
    assert [c["coefficient"] for c in data["checkpoints"]] == list(made.coefficients)
    assert data["tensors"]["averaged"]["count"] == 4
    assert data["template"].endswith("model_4.h5")


@pytest.mark.parametrize("scheme", ["ema", "power"])
def test_a_half_life_needs_epochs_to_count_in(tmp_path: Path, scheme: Any) -> None:
    """Names without them, or in another order, would have it count checkpoints instead."""
    paths = write_run(tmp_path, 3)
    named = plan(paths, scheme=scheme, ema_half_life=2)
    assert named.coefficients != plan(paths, scheme=scheme, ema_half_life=1).coefficients
    with pytest.raises(CheckpointError, match=r"--ema-half-life: .*model_2.h5 .*leave out --order"):
        plan(paths[::-1], scheme=scheme, ema_half_life=2, order="given")
    for letter, path in zip("abc", paths, strict=True):
        path.rename(tmp_path / f"{letter}.h5")
    unnamed = [tmp_path / f"{letter}.h5" for letter in "abc"]
    with pytest.raises(CheckpointError, match=r"a\.h5: --ema-half-life needs the epoch, but its"):
        plan(unnamed, scheme=scheme, ema_half_life=2)
    plan(unnamed, scheme="power", sigma=0.1)


def test_the_report_tells_what_was_done(tmp_path: Path) -> None:
    """Bytes, seconds, speed, peak memory and how the time was spent."""
    write_run(tmp_path)
    amounts: list[int] = []
    report = average(tmp_path, tmp_path / "o.h5", progress=amounts.append)
    averaged, compared = 4 * (33 * 17 + 17 + 17 * 5 + 1), 8 + 5 * 4 + 2
    assert sum(amounts) == report.bytes_read == 4 * (averaged + compared)
    assert report.bytes_written == (tmp_path / "o.h5").stat().st_size
    assert report.seconds > 0
    assert report.speed == report.bytes_read / report.seconds
    assert 10_000_000 < report.peak_memory < 2_000_000_000
    assert sum(report.shares.values()) == pytest.approx(1)
    assert json.loads(json.dumps(report.data()))["output"] == str(tmp_path / "o.h5")


def test_peak_memory_is_not_that_of_the_caller(tmp_path: Path) -> None:
    """A large process that starts polyak does not count, though getrusage would have it so."""
    write_run(tmp_path)
    code = f"from polyak_cli import average; print(average({str(tmp_path)!r}, 'o.h5').peak_memory)"
    ballast = bytearray(400 << 20)
    ballast[:: 1 << 12] = b"x" * (len(ballast) >> 12)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    del ballast
    assert int(done.stdout) < 200 << 20


def record(path: Path) -> dict[str, Any]:
    """Return the provenance that a file carries, read by h5py."""
    with h5py.File(path) as file:
        loaded: dict[str, Any] = json.loads(file.attrs["polyak_provenance"])
    return loaded


def sampled_sha256(path: Path) -> str:
    """Return the sampled digest of a small file, all of which it covers."""
    content = path.read_bytes()
    return hashlib.sha256(b"%d\n\n%b" % (len(content), content)).hexdigest()


def test_every_output_says_where_it_came_from(tmp_path: Path) -> None:
    """Version, scheme, parameters and each input's name, epoch, size and coefficient; no paths."""
    paths = write_run(tmp_path)
    report = average(tmp_path, tmp_path / "o.h5", scheme="exp", alpha=3, last=2, hash=True)
    found = record(tmp_path / "o.h5")
    assert found["polyak"] == polyak_cli.__version__
    assert (found["scheme"], found["parameters"]) == ("exp", {"alpha": 3.0})
    assert found["inputs"] == [
        {
            "name": path.name,
            "epoch": epoch,
            "size": path.stat().st_size,
            "coefficient": coefficient,
            "multiplier": multiplier,
            "sampled_sha256": sampled_sha256(path),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path, epoch, coefficient, multiplier in zip(
            paths[-2:],
            (3, 4),
            report.plan.coefficients,
            report.plan.mean.multipliers,
            strict=True,
        )
    ]
    assert found["divisor"] == report.plan.mean.divisor
    assert str(tmp_path) not in json.dumps(found)


def test_averages_lying_there_are_no_checkpoints(tmp_path: Path) -> None:
    """What polyak wrote into the folder earlier is passed over, whatever it is called."""
    write_run(tmp_path)
    average(tmp_path, tmp_path / "model_5.h5")
    average(tmp_path, tmp_path / "final.h5")
    made = plan(tmp_path)
    assert [c.path.name for c in made.checkpoints] == [f"model_{k}.h5" for k in (1, 2, 3, 4)]
    assert {p.path.name for p in made.passed_over} == {"model_5.h5", "final.h5"}


def test_an_average_named_by_itself_is_used_with_a_note(tmp_path: Path) -> None:
    """Averages can be averaged when they are asked for; the record is the new one's alone."""
    write_run(tmp_path)
    average(tmp_path, tmp_path / "a.h5", last=2)
    average(tmp_path, tmp_path / "b.h5", last=3)
    report = average([tmp_path / "a.h5", tmp_path / "b.h5"], tmp_path / "c.h5")
    assert sum("is itself an average" in note for note in report.notes) == 2
    assert [i["name"] for i in record(tmp_path / "c.h5")["inputs"]] == ["a.h5", "b.h5"]


# --- outputs and inputs that change ---------------------------------------------------------------


def test_an_existing_output_is_replaced_only_by_force(tmp_path: Path) -> None:
    """It stays untouched without --force."""
    write_run(tmp_path)
    (tmp_path / "o.h5").write_bytes(b"old")
    with pytest.raises(OutputError, match="already exists; use --force"):
        average(tmp_path, tmp_path / "o.h5", exclude=["o.h5"])
    assert (tmp_path / "o.h5").read_bytes() == b"old"
    average(tmp_path, tmp_path / "o.h5", exclude=["o.h5"], force=True)
    assert tensors(tmp_path / "o.h5")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("o.pt", r"only as \.h5 or \.hdf5"),
        ("o.H5", r"only as \.h5 or \.hdf5"),
        ("nowhere/o.h5", "there is no folder"),
        ("folder.h5", "is a folder"),
        ("pipe.h5", "not a regular file"),
    ],
)
def test_outputs_that_cannot_be(tmp_path: Path, name: str, message: str) -> None:
    """Wrong suffix, missing folder, folder and pipe are refused before the work."""
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run")
    (tmp_path / "folder.h5").mkdir()
    os.mkfifo(tmp_path / "pipe.h5")
    with pytest.raises(OutputError, match=message):
        plan(tmp_path / "run", tmp_path / name, force=True)


def test_an_input_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    """A trainer that writes on between plan and run costs the run, not the result."""
    paths = write_run(tmp_path)
    made = plan(tmp_path, tmp_path / "o.h5")
    content = paths[1].read_bytes()
    paths[1].write_bytes(content)
    os.utime(paths[1], ns=(1, 1))
    with pytest.raises(FormatError, match=r"model_2\.h5: .*changed"):
        run(made)
    assert not (tmp_path / "o.h5").exists()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_an_input_that_vanishes_meanwhile_is_noticed(tmp_path: Path) -> None:
    """A checkpoint deleted between plan and run is named."""
    paths = write_run(tmp_path)
    made = plan(tmp_path, tmp_path / "o.h5")
    paths[0].unlink()
    with pytest.raises(FormatError, match=r"model_1\.h5: cannot be read"):
        run(made)
    assert sorted(os.listdir(tmp_path)) == [p.name for p in paths[1:]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "--dtype is int8"),
        ({"match": "guess"}, "--match is guess"),
        ({"optimizer": "average"}, "--optimizer is average"),
        ({"jobs": 0}, "--jobs is 0"),
        ({"max_memory": 10}, "--max-memory is 10"),
        ({"scheme": "linear", "alpha": 1.0}, "--alpha belongs to --scheme exp"),
        ({"scheme": "exp", "coefficients": [1]}, "exclude each other"),
        ({"coefficients": [1, 2]}, "has 2 numbers; expected 4"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, options: Any, message: str) -> None:
    """Each is a usage error that names the option."""
    write_run(tmp_path)
    with pytest.raises(UsageError, match=message):
        plan(tmp_path, **options)


def test_a_plan_without_output_cannot_run(tmp_path: Path) -> None:
    """A dry run reports that something is missing."""
    write_run(tmp_path)
    with pytest.raises(UsageError, match="no output"):
        run(plan(tmp_path))


def test_chunks_larger_than_the_bound_are_refused_with_the_bound_that_would_do(
    tmp_path: Path,
) -> None:
    """A chunk must be held whole; the message says how much memory that takes."""
    values = np.zeros(1 << 20, np.float32)
    write_model(tmp_path / "m_1.h5", {"d": {"k": values}}, storage={"chunks": (1 << 20,)})
    with pytest.raises(FormatError, match="raise --max-memory above 8388608 bytes"):
        plan(tmp_path, max_memory=1 << 20, jobs=1)
    plan(tmp_path, max_memory=(8 << 20) + 1, jobs=1)


def every_error(call: Callable[[], Any]) -> str:
    """Return the message of the error that a call raises."""
    with pytest.raises(PolyakError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\u202eb", "x" * 5000, "a\udcffb"])
def test_strange_names_are_escaped_in_messages(tmp_path: Path, name: str) -> None:
    """Control and bidirectional characters and endless names do not reach the terminal."""
    bad = K.copy()
    bad[0, 0] = np.nan
    encoded = name.encode("utf-8", "surrogateescape")
    path = tmp_path / "m_1.h5"
    with h5py.File(path, "w") as file:
        group = file.create_group("model_weights")
        group.attrs["layer_names"] = [encoded]
        layer = h5py.Group(h5py.h5g.create(group.id, encoded))
        layer.attrs["weight_names"] = [b"k"]
        layer["k"] = bad
    message = every_error(lambda: average(tmp_path, tmp_path / "o.h5"))
    assert message.isprintable()
    assert len(message) < 600


def sample(names: Sequence[str]) -> Path:
    """Return the folder of the samples, having checked what is in it."""
    folder = Path(__file__).parent.parent / "sample_checkpoints"
    assert set(names) <= set(os.listdir(folder))
    return folder


def test_the_sample_checkpoints_equal_the_naive_average(tmp_path: Path) -> None:
    """The files that are shipped, averaged as the README does."""
    names = [f"model_{epoch}.h5" for epoch in range(490, 500)]
    folder = sample(names)
    report = average(folder, tmp_path / "final.h5", scheme="exp", alpha=2)
    assert [c.path.name for c in report.plan.checkpoints] == names
    expected = naive_average([folder / name for name in names], report.plan.mean.multipliers)
    assert same_bits(tensors(tmp_path / "final.h5"), expected)


def test_one_tensor_under_two_names_is_averaged_under_each(tmp_path: Path) -> None:
    """Linked in the newest, apart in the older: each name has its own average."""
    one, other = np.ones(3, np.float32), np.full(3, 5, np.float32)
    paths = [
        write_model(tmp_path / "m_1.h5", {"d": {"k": one}, "e": {"k": other}}),
        write_model(tmp_path / "m_2.h5", {"d": {"k": one}, "e": {"k": one}}),
    ]
    with h5py.File(paths[1], "r+") as file:
        del file["model_weights/e/k"]
        file["model_weights/e/k"] = file["model_weights/d/k"]
        file["alias"] = file["model_weights/d/k"]  # HDF5 lists it before the tensor
    average(paths, tmp_path / "o.h5")
    with h5py.File(tmp_path / "o.h5") as file:
        assert file["model_weights/d/k"][:].tolist() == [1, 1, 1]
        assert file["model_weights/e/k"][:].tolist() == [3, 3, 3]
        assert file["alias"] == file["model_weights/d/k"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scheem": "exp"}, TypeError, "unknown option scheem"),
        (
            {"include_tensors": "*kernel"},
            UsageError,
            "is a single string; expected a list of globs",
        ),
        ({"exclude": "a*"}, UsageError, "is a single string"),
        ({"max_memory": "64MB"}, UsageError, "max_memory is '64MB'; expected a whole number"),
        ({"last": "2"}, UsageError, "last is '2'; expected a whole number"),
    ],
)
def test_options_of_a_wrong_name_or_type_are_refused(
    tmp_path: Path, options: Any, error: type[Exception], message: str
) -> None:
    """A misspelt option is a bug of the caller's; nothing is read as what it is not."""
    write_run(tmp_path, 2)
    with pytest.raises(error, match=message):
        plan(tmp_path, **options)


def test_what_is_only_compared_is_read_too(tmp_path: Path) -> None:
    """Plan, progress and report count carried tensors, whose difference is looked for."""
    layers: Any = {"d": {"k": np.ones(7, np.float32), "n": np.arange(100_000)}}
    paths = [write_model(tmp_path / f"m_{k}.h5", layers) for k in range(3)]
    seen: list[int] = []
    report = average(paths, tmp_path / "o.h5", progress=seen.append)
    assert report.plan.bytes_to_read == 3 * (7 * 4 + 100_000 * 8)
    assert report.bytes_read == sum(seen) == report.plan.bytes_to_read


def test_match_order_does_not_part_what_has_one_name(tmp_path: Path) -> None:
    """Names that are all there in another order are paired by name, or not at all."""
    one, other = {"a": {"k": np.ones(3)}}, {"b": {"k": np.ones(3)}}
    paths = [
        write_model(tmp_path / "m_1.h5", one | other),
        write_model(tmp_path / "m_2.h5", other | one),
    ]
    with pytest.raises(MismatchError, match=r"m_1.*has the names of .*m_2.* order, from 'a/k' on"):
        average(paths, tmp_path / "o.h5", match="order")


def test_a_checkpoint_of_the_run_is_never_replaced(tmp_path: Path) -> None:
    """Not even one that was not chosen, --force or not; an older average may be."""
    paths = write_run(tmp_path, 3)
    before = [path.read_bytes() for path in paths]
    with pytest.raises(OutputError, match=r"model_1\.h5: is a checkpoint of this run"):
        average(tmp_path, paths[0], last=2, force=True)
    assert [path.read_bytes() for path in paths] == before
    average(tmp_path, tmp_path / "average.h5", last=2)
    average(tmp_path, tmp_path / "average.h5", last=2, force=True)


@pytest.mark.parametrize("name", ["x" * 300 + ".h5", "y" * 300 + "/o.h5", "loop.h5"])
def test_an_output_that_cannot_be_is_refused(tmp_path: Path, name: str) -> None:
    """A name too long, a link to itself: an error that names it, before the work."""
    (tmp_path / "run").mkdir()
    paths = write_run(tmp_path / "run", 2)
    (tmp_path / "loop.h5").symlink_to("loop.h5")
    for force in (False, True):
        with pytest.raises(OutputError, match=name[:20]):
            average(paths, tmp_path / name, force=force)
    assert sorted(os.listdir(tmp_path)) == ["loop.h5", "run"]
