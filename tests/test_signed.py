"""Coefficients of both signs: the average lies outside of its checkpoints, and is as exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from polyak_cli import average, pipeline, plan, verify
from polyak_cli.averaging import provenance, records, writing
from polyak_cli.averaging.schemes import coefficients, make_mean, sum_absolutes
from polyak_cli.engine import numpy_kernel
from polyak_cli.errors import FormatError, MismatchError, UsageError
from tests.command import polyak
from tests.kernels import COMPILED, needs_compiled
from tests.oracle import encode, naive_average, read_model, same_bits, write_model

quietly = settings(derandomize=True, deadline=None, max_examples=150)
numbers = st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=20)


@quietly
@given(numbers)
def test_signed_numbers_are_only_divided_by_their_sum(given_: list[float]) -> None:
    """Whatever the sign of the sum, the shares are the exact quotients, and sum to 1."""
    exact = [Fraction(one) for one in given_]
    total = sum(exact, Fraction(0))
    # What the rounding of decimals can leave is refused.
    assume(abs(total) > sum(map(abs, exact), Fraction(0)) / 2**52 + Fraction(1, 10**6))
    found = coefficients(None, range(1, len(given_) + 1), custom=given_)
    for share, one in zip(found, exact, strict=True):
        assert share == pytest.approx(float(one / total), rel=1e-15, abs=1e-300)
    absolute = float(sum(map(abs, exact), Fraction(0)) / abs(total))
    assert sum_absolutes(found) == pytest.approx(absolute, rel=1e-12)
    assert abs(math.fsum(found) - 1) <= 1e-15 * absolute + 1e-16


@quietly
@given(numbers)
def test_a_scaled_mean_of_both_signs_is_the_same_mean(given_: list[float]) -> None:
    """One power of two for both sides, and no multiplier is larger than its coefficient."""
    assume(abs(math.fsum(given_)) > 1e-6)
    mean = make_mean(given_)
    multipliers, divisor = mean.scale()
    assert 0.5 < divisor <= 1.0
    if sum(1 for one in mean.multipliers if one) == 1:
        assert sorted(multipliers) == [0.0] * (len(given_) - 1) + [1.0]
        return
    for one, scaled, share in zip(mean.multipliers, multipliers, mean.coefficients, strict=True):
        exact = Fraction(one) / Fraction(mean.divisor) * Fraction(divisor)
        assert abs(Fraction(scaled) - exact) <= Fraction(1, 2**1074)
        assert abs(scaled) <= abs(share)


@pytest.mark.parametrize(
    "given_",
    [
        [1.0, -1.0],
        [0.1, 0.2, -0.1, -0.2],
        [0.1, 0.2, -0.3],  # whose sum in float64 is 2.8e-17
        [1e308, 1e308, -1e308, -1e308],
        [1e308, 1e-5, -1e308],
        [1e300, -1e300, 1e-300],
        [1e-323, -1e-323],
    ],
)
def test_a_sum_of_0_is_refused(given_: list[float]) -> None:
    """There is nothing to divide by; what the rounding of decimals leaves counts as nothing."""
    with pytest.raises(UsageError, match="--coefficients: the sum is 0, by which they would be"):
        coefficients(None, range(1, len(given_) + 1), custom=given_)


def test_a_small_sum_is_no_sum_of_0() -> None:
    """A sum that the rounding of the numbers cannot explain divides them as any other."""
    for tiny in (2.0**-50, -(2.0**-40)):
        assert coefficients(None, [1, 2], custom=[1.0 + tiny, -1.0]) == (1 / tiny + 1, -1 / tiny)


def test_recorded_multipliers_whose_sum_is_0_are_refused() -> None:
    """What a record says is divided exactly, and refused where a coefficient would be infinite."""
    for given_ in ([1e300, -1e300], [1e300, -1e300, 1e-300], [1e308, 1e-5, -1e308]):
        with pytest.raises(UsageError, match=r"cannot be divided: 1e.30.*another sum than 0"):
            make_mean(given_)


@needs_compiled
@quietly
@given(
    st.sampled_from(["float16", "bfloat16", "float32", "float64", "float8_e4m3fn"]),
    st.lists(st.integers(-9, 9).map(float), min_size=2, max_size=8).filter(math.fsum),
    st.integers(0, 2**32 - 1),
)
def test_both_kernels_give_the_nearest_numbers_of_the_exact_mean(
    dtype: str, given_: list[float], seed: int
) -> None:
    """Fractions are the judge of values whose sums float64 holds; all other bits are equal too."""
    mean = make_mean(given_)
    width = {"float64": 8, "float32": 4, "float8_e4m3fn": 1}.get(dtype, 2)
    rng = np.random.default_rng(seed)
    # Whole numbers below 2^7, which every type but the narrowest holds; and any numbers.
    whole = rng.integers(-100, 100, (len(given_), 30)).astype(np.float64)
    for values in (whole, rng.normal(size=(len(given_), 30))):
        stored = [_store(row, dtype, width) for row in values]
        found = [_fold(kernel, stored, dtype, width, mean) for kernel in (numpy_kernel, COMPILED)]
        assert found[0].tobytes() == found[1].tobytes()
        if values is whole and dtype != "float8_e4m3fn":
            for place, column in enumerate(whole.T.tolist()):
                pairs = zip(mean.multipliers, column, strict=True)
                exact = sum((Fraction(m) * Fraction(x) for m, x in pairs), Fraction(0))
                code = encode(exact / Fraction(mean.divisor), dtype)
                assert exact == 0 or found[0][place] == code


def _store(values: Any, dtype: str, width: int) -> Any:
    out = np.empty(len(values) * width, np.uint8)
    numpy_kernel.round_to(np.ascontiguousarray(values), dtype, "<", out)
    return out


def _fold(kernel: Any, stored: Sequence[Any], dtype: str, width: int, mean: Any) -> Any:
    multipliers, divisor = mean.scale()
    count = len(stored[0]) // width
    sums, scratch, started = np.empty(count), np.empty(count), bytearray(1)
    with np.errstate(invalid="ignore", over="ignore"):
        for raw, multiplier in zip(stored, multipliers, strict=True):
            if multiplier:
                terms = [(0, multiplier)]
                kernel.accumulate(raw, dtype, "<", terms, [sums], started, (scratch, scratch))
        kernel.divide(sums, divisor)
    out = np.empty(count * width, np.uint8)
    kernel.round_to(sums, dtype, "<", out)
    return out.view(f"u{width}")


def write_run(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write checkpoints as safetensors and return their folder."""
    folder.mkdir()
    for k, tensors in enumerate(rows, 1):
        save_file(tensors, folder / f"m_{k}.safetensors")
    return folder


def test_an_average_of_both_signs_is_the_naive_one_and_verifies(tmp_path: Path) -> None:
    """Floats extrapolate, integers and counters are the newest's, and the record is read again."""
    rng = np.random.default_rng(0)
    paths = [
        write_model(
            tmp_path / f"m_{k}.h5",
            {
                "d": {
                    "k": rng.normal(3, size=(30, 7)).astype(np.float32),
                    "n": np.array([k, 0], "u1"),
                }
            },
        )
        for k in (1, 2, 3)
    ]
    report = average(paths, tmp_path / "o.h5", coefficients=[1, -2, -1], verify=True)
    assert report.plan.mean.multipliers == (-1.0, 2.0, 1.0)
    assert report.plan.coefficients == (-0.5, 1.0, 0.5)
    expected = naive_average(paths, [-1.0, 2.0, 1.0])
    found = read_model(tmp_path / "o.h5")
    assert same_bits({name: found[name] for name in expected}, expected)
    assert found["model_weights/d/n"].tolist() == [3, 0]
    assert verify(tmp_path / "o.h5").verified
    # The same numbers with one sign turned are another average, which the record does not allow.
    record = provenance.make_record(report.plan)
    record["inputs"][0]["coefficient"] = 0.5
    with pytest.raises(FormatError, match="whose sum is not 1"):
        records.read(records.encode(records.seal(record)))


def test_several_averages_of_both_signs_are_each_what_average_writes(tmp_path: Path) -> None:
    """One fold of several outputs takes each row's own signs and sum."""
    rng = np.random.default_rng(0)
    paths = [
        write_model(tmp_path / f"m_{k}.h5", {"d": {"k": rng.normal(3, size=900).astype("f4")}})
        for k in range(3)
    ]
    rows = [[1.0, 1.0, 1.0], [-0.5, -1.0, 3.0], [3.0, -1.0, 0.0], [-1.0, 1.0, 1.0]]
    outputs = [tmp_path / f"out_{k}.h5" for k in range(len(rows))]
    writing.write_several(pipeline.plan(paths), [make_mean(row) for row in rows], outputs)
    for row, output in zip(rows, outputs, strict=True):
        average(paths, tmp_path / "one.h5", coefficients=row, force=True, hash=False)
        assert output.read_bytes() == (tmp_path / "one.h5").read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_what_overflows_the_stored_type_is_refused(tmp_path: Path, dtype: str) -> None:
    """Finite values of one type extrapolate to one that it cannot hold: never silently infinity."""
    top = float(np.finfo(dtype).max)
    folder = write_run(
        tmp_path / "run",
        [{"k": np.array([1.0, x], dtype)} for x in (top / 2, top)],
    )
    options: Any = {"coefficients": [-1, 2], "allow": ["two-runs"]}
    wider = "overflows float64" if dtype == "float64" else f"{dtype} cannot store"
    with pytest.raises(MismatchError, match=f"average of tensor 'k'.*{wider}"):
        average(folder, tmp_path / "o.safetensors", **options)
    assert not (tmp_path / "o.safetensors").exists()
    average(folder, tmp_path / "o.safetensors", **options, allow_nonfinite=True)
    assert load_file(tmp_path / "o.safetensors")["k"].tolist() == [1.0, math.inf]
    if dtype == "float16":
        average(folder, tmp_path / "o.safetensors", **options, dtype="float32", force=True)
        assert load_file(tmp_path / "o.safetensors")["k"].tolist() == [1.0, 1.5 * top]


def test_infinities_that_all_checkpoints_have_stay(tmp_path: Path) -> None:
    """A mask of minus infinity is a constant, although inf - inf is not a number."""
    rows = [{"k": np.array([x, -math.inf, math.inf], "f4")} for x in (1.0, 2.0)]
    folder = write_run(tmp_path / "run", rows)
    for number, allowed in enumerate((False, True)):
        output = tmp_path / f"{number}.safetensors"
        options: Any = {"coefficients": [-1, 2], "allow_nonfinite": allowed}
        average(folder, output, **options, allow=["two-runs"])
        assert load_file(output)["k"].tolist() == [3.0, -math.inf, math.inf]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_identical_checkpoints_of_both_signs_give_identical_bits(
    tmp_path: Path, dtype: str
) -> None:
    """Also where the coefficients are thousands: the sums have bits to spare."""
    values = np.random.default_rng(0).normal(size=900).astype(dtype)
    values[:3] = [0.0, np.finfo(dtype).max, np.finfo(dtype).smallest_subnormal]
    folder = write_run(tmp_path / "run", [{"k": values}] * 5)
    weights = [-3000.3, 2000.1, 7, -1500, 2494.2]
    average(folder, tmp_path / "o.safetensors", coefficients=weights)
    assert load_file(tmp_path / "o.safetensors")["k"].tobytes() == values.tobytes()


@pytest.mark.parametrize("name", ["bn.running_var", "bn/moving_variance", "bn/renorm_stddev"])
def test_a_variance_below_0_is_refused(tmp_path: Path, name: str) -> None:
    """Its square root would be NaN in the model; other tensors may become negative."""
    rows = [{"a": np.array([3.0, 1.0], "f4"), name: np.array([5.0, x], "f4")} for x in (3.0, 1.0)]
    folder, output = write_run(tmp_path / "run", rows), tmp_path / "o.safetensors"
    options: Any = {"coefficients": [-1, 2], "allow": ["two-runs"]}
    with pytest.raises(MismatchError, match=rf"{name}', a variance, is -1 \(element 1\)"):
        average(folder, output, **options)
    average(folder, output, **options, exclude_tensors=[name])
    assert load_file(output)[name].tolist() == [5.0, 1.0]
    average(folder, output, coefficients=[-1, 4], allow=["two-runs"], force=True)
    assert load_file(output)[name][1] == np.float32(1 / 3)


def test_a_mean_product_of_both_signs_is_written(tmp_path: Path) -> None:
    """LoRA's exact mean is that of whole products, whatever their signs."""
    rng = np.random.default_rng(1)
    a = rng.normal(size=(3, 40))
    rows = [{"q.lora_A.weight": a, "q.lora_B.weight": rng.normal(size=(30, 3))} for _ in range(3)]
    folder, output = write_run(tmp_path / "run", rows), tmp_path / "o.safetensors"
    weights = [-0.4, 0.3, 1.1]
    average(folder, output, coefficients=weights, lora="exact", allow=["two-runs"])
    made = load_file(output)
    products = [one["q.lora_B.weight"] @ one["q.lora_A.weight"] for one in rows]
    mean = sum(w * x for w, x in zip(weights, products, strict=True))
    np.testing.assert_allclose(made["q.lora_B.weight"] @ made["q.lora_A.weight"], mean, atol=1e-11)


def test_the_plan_says_how_far_signs_reach(tmp_path: Path) -> None:
    """The sum of absolute values is in plan and JSON; above 1 there is a warning."""
    rows = [{"k": np.full(3, x, "f4")} for x in (1.0, 2.0, 3.0)]
    folder = write_run(tmp_path / "run", rows)
    made = plan(folder, coefficients=[-0.5, -1, 3])
    assert made.data()["sum_of_absolutes"] == 3.0
    assert [note for note in made.notes if "the absolute values sum to 3" in note]
    plain = plan(folder, scheme="exp")
    assert plain.sum_of_absolutes == pytest.approx(1.0, abs=1e-15)
    assert not [note for note in plain.notes if "absolute" in note]
    done = polyak("average", "run", "--coefficients", "-0.5,-1,3", "-n", cwd=tmp_path)
    assert "sum of the absolute values of the coefficients: 3.0000" in done.stdout
    assert "warning: some coefficients are negative" in done.stderr
    usual = polyak("average", "run", "-n", cwd=tmp_path)
    assert "absolute" not in usual.stdout + usual.stderr
