"""Factors whose product is meant: recognised, measured, and written as factors of the mean product.

Files are written, and results read, by safetensors, numpy and h5py; the expected products are
numpy's, of whole matrices.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from polyak_cli import average, check, plan, verify
from polyak_cli.averaging.belonging.factors import find_factors
from polyak_cli.engine import numpy_kernel
from polyak_cli.errors import MismatchError, OutputError, UsageError
from polyak_cli.storage import Bytes
from polyak_cli.tensors import Float64
from tests.contract import assert_same, naive
from tests.kernels import needs_compiled, use_kernel
from tests.oracle import Array, read_model, write_model

Model = dict[str, Array]
Product = Callable[[Mapping[str, Array]], Array]
COEFFICIENTS = [0.2, 0.3, 0.5]


def floats(seed: int, *shape: int, around: float = 0.0) -> Array:
    """Return random numbers; ``around``: the share of numbers that all seeds have in common."""
    own = np.random.default_rng(seed).standard_normal(shape)
    common = np.random.default_rng(99).standard_normal(shape)
    return (around * common + (1 - around) * own).astype(np.float32)


def of_names(first: str, second: str) -> tuple[Callable[[int], Model], Product]:
    """Return how a PyTorch pair of matrices is made and multiplied: B A."""
    return (
        lambda e: {first: floats(e, 2, 6), second: floats(e + 50, 5, 2)},
        lambda t: t[second].astype(np.float64) @ t[first].astype(np.float64),
    )


def convolution(e: int) -> Model:
    """Return PEFT's pair for a convolution of 3x3: A has the window, B is 1x1."""
    return {"c.lora_A.weight": floats(e, 2, 3, 3, 3), "c.lora_B.weight": floats(e + 50, 5, 2, 1, 1)}


def multiply_convolution(t: Mapping[str, Array]) -> Array:
    """Return the update of the convolution's kernel, outputs x inputs x 3 x 3."""
    a, b = (t[f"c.lora_{x}.weight"].astype(np.float64) for x in "AB")
    product: Array = np.einsum("orxy,rihw->oihw", b, a)
    return product


def keras_layer(e: int) -> Model:
    """Return Keras's pair of a Dense layer: a b, and not b a."""
    return {"d/lora_kernel_a": floats(e, 6, 2), "d/lora_kernel_b": floats(e + 50, 2, 5)}


PAIRS: Mapping[str, tuple[Callable[[int], Model], Product]] = {
    "PEFT": of_names("base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"),
    "PEFT in a model": of_names("q.lora_A.default.weight", "q.lora_B.default.weight"),
    "PEFT's embedding": of_names("e.lora_embedding_A", "e.lora_embedding_B"),
    "loralib": of_names("q.lora_A", "q.lora_B"),
    "kohya": of_names("lora_unet_down_0_q.lora_down.weight", "lora_unet_down_0_q.lora_up.weight"),
    "diffusers": of_names("attn.to_q.lora.down.weight", "attn.to_q.lora.up.weight"),
    "old diffusers": of_names("attn.to_q_lora.down.weight", "attn.to_q_lora.up.weight"),
    "linear layer": of_names("q.lora_linear_layer.down.weight", "q.lora_linear_layer.up.weight"),
    "convolution": (convolution, multiply_convolution),
    "Keras": (
        keras_layer,
        lambda t: t["d/lora_kernel_a"].astype(np.float64) @ t["d/lora_kernel_b"],
    ),
}


def write_run(folder: Path, models: Sequence[Model]) -> Path:
    """Write checkpoints as safetensors and return their folder."""
    folder.mkdir(exist_ok=True)
    for e, model in enumerate(models, 1):
        save_file(model, folder / f"m_{e}.safetensors")
    return folder


def weigh(arrays: Sequence[Array]) -> Array:
    """Return the mean of arrays with the coefficients of the tests."""
    terms = [c * x.astype(np.float64) for c, x in zip(COEFFICIENTS, arrays, strict=True)]
    return np.asarray(np.sum(terms, axis=0))


def norm(values: Array) -> float:
    """Return a Frobenius norm."""
    return float(np.sqrt(np.sum(values.astype(np.float64) ** 2)))


@needs_compiled
def test_a_mean_product_is_verified_by_the_other_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tensors are factors, so that only their writing asks a kernel to round.

    A numpy kernel that is wrong in the last bit shows that it is the one that is asked.
    """
    use_kernel(monkeypatch, "compiled")
    folder = write_run(tmp_path / "run", [PAIRS["PEFT"][0](e) for e in range(3)])
    options: Any = {"coefficients": COEFFICIENTS, "lora": "exact", "verify": True}
    assert average(folder, tmp_path / "right.safetensors", **options).verified_by == "numpy"
    right = numpy_kernel.round_to

    def round_wrongly(values: Float64, dtype: str, byteorder: str, out: Bytes) -> None:
        right(values, dtype, byteorder, out)
        out[0] ^= 1

    monkeypatch.setattr(numpy_kernel, "round_to", round_wrongly)
    with pytest.raises(OutputError, match="it is not what was written"):
        average(folder, tmp_path / "o.safetensors", **options)


@pytest.mark.parametrize("name", PAIRS)
def test_the_mean_of_factors_is_measured_and_the_mean_product_written(
    tmp_path: Path, name: str
) -> None:
    """Cross term and loss are those of whole products, and the output is their best truncation."""
    make, multiply = PAIRS[name]
    models = [make(e) for e in (1, 2, 3)]
    folder, output = write_run(tmp_path / "run", models), tmp_path / "o.safetensors"
    mean = weigh([multiply(model) for model in models])
    means = {key: weigh([model[key] for model in models]) for key in models[0]}
    report = average(folder, output, coefficients=COEFFICIENTS)
    found = report.data()["factors"]["measured"][0]
    assert found["cross_term"] == pytest.approx(norm(multiply(means) - mean) / norm(mean), rel=1e-6)
    assert_same(load_file(output), naive(models, COEFFICIENTS))  # only said, not changed
    flat = mean.reshape(mean.shape[0], -1)
    values = np.linalg.svd(flat, compute_uv=False)
    lost = float(np.sqrt(np.sum(values[2:] ** 2) / np.sum(values**2)))
    assert found["lost"] == pytest.approx(lost, rel=1e-6)
    (problem,) = [one for one in report.plan.suspicions if one.kind == "factors"]
    assert "--lora exact" in problem.text
    assert f"warning: {problem.text}" in report.notes

    exact = average(folder, output, coefficients=COEFFICIENTS, lora="exact", force=True)
    assert exact.plan.suspicions == ()
    written = load_file(output)
    assert {n: (v.dtype, v.shape) for n, v in written.items()} == {
        n: (v.dtype, v.shape) for n, v in models[0].items()
    }
    assert norm(multiply(written) - mean) / norm(mean) == pytest.approx(lost, rel=1e-5)
    assert verify(output, sources=[folder]).verified


def test_a_mean_product_of_the_rank_is_written_whole(tmp_path: Path) -> None:
    """Where the mean product has the pair's rank, nothing is lost: here A is the same in all."""
    models = [
        {"q.lora_A.weight": floats(1, 3, 40), "q.lora_B.weight": floats(e, 30, 3)}
        for e in (1, 2, 3)
    ]
    folder, output = write_run(tmp_path / "run", models), tmp_path / "o.safetensors"
    report = average(folder, output, coefficients=COEFFICIENTS, lora="exact", dtype="float64")
    a, b = (load_file(output)[f"q.lora_{x}.weight"] for x in "AB")
    mean = weigh([m["q.lora_B.weight"].astype(np.float64) @ m["q.lora_A.weight"] for m in models])
    np.testing.assert_allclose(b @ a, mean, rtol=0, atol=1e-12 * norm(mean))
    # Balanced: the two factors have the same singular values.
    np.testing.assert_allclose(b.T @ b, a @ a.T, rtol=0, atol=1e-12 * norm(mean))
    assert report.data()["factors"]["measured"][0]["lost"] == pytest.approx(0, abs=1e-7)
    assert report.data()["factors"]["measured"][0]["cross_term"] == pytest.approx(0, abs=1e-12)


def test_neighbours_are_a_note_and_no_warning(tmp_path: Path) -> None:
    """At most 5 % off is said in a note; the record and the exit of check are as ever."""
    models = [
        {
            "q.lora_A.weight": floats(e, 2, 6, around=0.95),
            "q.lora_B.weight": floats(e + 50, 5, 2, around=0.95),
        }
        for e in (1, 2, 3)
    ]
    folder = write_run(tmp_path / "run", models)
    report = average(folder, tmp_path / "o.safetensors")
    assert 0 < report.data()["factors"]["measured"][0]["cross_term"] < 0.05
    assert report.plan.suspicions == ()
    (note,) = [note for note in report.notes if "LoRA pair" in note]
    assert not note.startswith("warning")
    assert check(folder).healthy
    record = verify(tmp_path / "o.safetensors", sources=[folder])
    assert record.verified


def test_what_average_suspects_check_reports(tmp_path: Path) -> None:
    """The same sentence, as a problem of the run; the record keeps its kind."""
    models = [PAIRS["PEFT"][0](e) for e in (1, 2, 3)]
    folder = write_run(tmp_path / "run", models)
    report = average(folder, tmp_path / "o.safetensors", on_unhealthy="fail")
    (problem,) = check(folder).all_problems
    assert problem in report.plan.suspicions
    (header,) = [json.loads(read_metadata(tmp_path / "o.safetensors"))]
    assert header["suspicions"] == ["factors"]
    assert "lora" not in header["options"]


def read_metadata(path: Path) -> str:
    """Return the record in a safetensors file."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    metadata = json.loads(raw[8 : 8 + size])["__metadata__"]
    (text,) = [value for value in metadata.values() if value.startswith('{"polyak"')]
    return str(text)


def test_a_plan_says_that_there_are_factors_without_reading_them(tmp_path: Path) -> None:
    """Their values are unreadable here, and the plan does not mind."""
    models = [PAIRS["PEFT"][0](e) for e in (1, 2)]
    for model in models:
        model["base_model.model.q.lora_A.weight"][:] = np.nan
    made = plan(write_run(tmp_path / "run", models))
    assert made.measured == ()
    (note,) = [note for note in made.notes if "LoRA" in note]
    assert "the report says how far apart" in note


# --- weight norm ----------------------------------------------------------------------------------


def multiply_norm(g: Array, v: Array, axes: tuple[int, ...]) -> Array:
    """Return g v / ||v||, the norm over some axes."""
    v = v.astype(np.float64)
    whole: Array = g * v / np.sqrt(np.sum(v * v, axis=axes, keepdims=True))
    return whole


NORMS: Mapping[str, tuple[str, str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "weight_norm": ("c.weight_g", "c.weight_v", (4, 1, 1), (4, 3, 5), (1, 2)),
    "dim 1": ("c.weight_g", "c.weight_v", (1, 3, 1), (4, 3, 5), (0, 2)),
    "dim None": ("c.weight_g", "c.weight_v", (), (4, 3), (0, 1)),
    "parametrization": (
        "c.parametrizations.weight.original0",
        "c.parametrizations.weight.original1",
        (4, 1),
        (4, 6),
        (1,),
    ),
    "LSTM": ("r.weight_hh_l0_g", "r.weight_hh_l0_v", (8, 1), (8, 2), (1,)),
    "TensorFlow Addons": ("w/g", "w/v", (5,), (3, 3, 5), (0, 1)),
}


@pytest.mark.parametrize("name", NORMS)
def test_weight_norms_are_measured_and_their_mean_product_written(
    tmp_path: Path, name: str
) -> None:
    """The output's g v / ||v|| is the mean of those of the checkpoints: nothing is lost."""
    g, v, g_shape, v_shape, axes = NORMS[name]
    models = [
        {g: np.asarray(np.abs(floats(e, *g_shape)) * e), v: floats(e, *v_shape)} for e in (1, 2, 3)
    ]
    folder, output = write_run(tmp_path / "run", models), tmp_path / "o.safetensors"
    mean = weigh([multiply_norm(model[g], model[v], axes) for model in models])
    product = multiply_norm(weigh([m[g] for m in models]), weigh([m[v] for m in models]), axes)
    report = average(folder, output, coefficients=COEFFICIENTS)
    found = report.data()["factors"]["measured"][0]
    assert found["cross_term"] == pytest.approx(norm(product - mean) / norm(mean), rel=1e-6)
    assert [problem.kind for problem in report.plan.suspicions] == ["factors"]
    average(folder, output, coefficients=COEFFICIENTS, lora="exact", dtype="float64", force=True)
    written = load_file(output)
    np.testing.assert_allclose(
        multiply_norm(written[g], written[v], axes), mean, rtol=1e-12, atol=1e-14
    )
    assert verify(output, sources=[folder]).verified


def test_channels_of_zeros_keep_a_direction(tmp_path: Path) -> None:
    """A mean product of 0 has no direction of its own: the mean one is kept, under a g of 0."""
    models = [
        {
            "c.weight_g": np.array([[s], [2.0]], np.float32),
            "c.weight_v": np.eye(2, dtype=np.float32),
        }
        for s in (1, -1)
    ]
    folder, output = write_run(tmp_path / "run", models), tmp_path / "o.safetensors"
    average(folder, output, lora="exact")
    found = load_file(output)
    np.testing.assert_array_equal(found["c.weight_g"], [[0], [2]])
    assert np.all(np.sum(found["c.weight_v"] ** 2, axis=1) > 0)


# --- refusals -------------------------------------------------------------------------------------


def test_products_of_other_scales_are_refused(tmp_path: Path) -> None:
    """The alpha of kohya and PEFT's lora_alpha are factors too, and must be the same in all."""
    models = [
        PAIRS["kohya"][0](e) | {"lora_unet_down_0_q.alpha": np.array(4.0 * e, np.float32)}
        for e in (1, 2)
    ]
    folder = write_run(tmp_path / "run", models)
    with pytest.raises(MismatchError, match=r"alpha' is 4, but .* it is 8.*--exclude"):
        average(folder, tmp_path / "o.safetensors")
    assert [problem.kind for problem in check(folder).all_problems] == ["factors"]
    for e in (1, 2):
        step = tmp_path / f"peft/checkpoint-{e}"
        step.mkdir(parents=True)
        save_file(PAIRS["PEFT"][0](e), step / "adapter_model.safetensors")
        (step / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8 * e}))
    paths = sorted((tmp_path / "peft").glob("*/adapter_model.safetensors"))
    with pytest.raises(MismatchError, match=r"has lora_alpha 8, but .* has 16.*--exclude"):
        plan(paths)
    assert "factors" in [problem.kind for problem in check(paths).all_problems]


@pytest.mark.parametrize(
    ("extra", "options", "message"),
    [
        ({}, {"exclude_tensors": ["*lora*"]}, "no averaged tensors are factors of a product"),
        ({"z.hada_w1_a": floats(1, 2, 2)}, {}, "'z.hada_w1_a' is not a factor .*'z.hada_w1_a'"),
        ({}, {"max_memory": 1 << 20}, r"'q' needs [\d.]+ [kM]B of memory; use --max-memory \d+"),
    ],
)
def test_what_exact_cannot_do_is_refused_before_the_run(
    tmp_path: Path, extra: Model, options: Any, message: str
) -> None:
    """Each refusal names the tensor and the option that helps."""
    models = [
        {
            "q.lora_A.weight": floats(e, 8, 2000, around=0.9),
            "q.lora_B.weight": floats(e, 2000, 8, around=0.9),
            "b": floats(e, 2),
        }
        | extra
        for e in (1, 2)
    ]
    folder = write_run(tmp_path / "run", models)
    with pytest.raises(UsageError, match=message) as caught:
        plan(folder, lora="exact", **options)
    if "--max-memory" in str(caught.value):
        enough = int(str(caught.value).rsplit(" ", 1)[1])
        average(folder, tmp_path / "o.safetensors", lora="exact", max_memory=enough)


def test_values_that_are_not_finite_have_no_decomposition(tmp_path: Path) -> None:
    """NaN is refused by the checkpoint and the tensor; of coefficient 0 it is not even read."""
    models = [PAIRS["PEFT"][0](e) for e in (1, 2)]
    models[0]["base_model.model.q.lora_B.weight"][0, 0] = np.nan
    folder, output = write_run(tmp_path / "run", models), tmp_path / "o.safetensors"
    with pytest.raises(MismatchError, match=r"m_1\.safetensors: tensor '.*lora_B.*' holds NaN"):
        average(folder, output, lora="exact")
    assert not output.exists()
    average(folder, output, lora="exact", coefficients=[0, 1])
    models[0]["base_model.model.q.lora_B.weight"][0, 0] = np.inf
    write_run(tmp_path / "run", models)
    with pytest.raises(MismatchError, match=r"m_1\.safetensors: tensor '.*lora_B.*' holds inf"):
        average(folder, output, force=True)
    report = average(folder, output, allow_nonfinite=True, force=True)
    assert any("not measured" in note and "not finite" in note for note in report.notes)


def test_types_and_other_tensors_are_as_ever(tmp_path: Path) -> None:
    """bfloat16 factors are stored as bfloat16, rounded once; other tensors are averaged."""
    models = [
        {n: v.astype(ml_dtypes.bfloat16) for n, v in PAIRS["PEFT"][0](e).items()}
        | {"classifier.bias": floats(e, 3)}
        for e in (1, 2)
    ]
    for k, model in enumerate(models, 1):
        save_file(model, tmp_path / f"m_{k}.safetensors")
    wide, narrow = tmp_path / "wide.npz", tmp_path / "narrow.npz"
    paths = [tmp_path / f"m_{k}.safetensors" for k in (1, 2)]
    average(paths, wide, lora="exact", dtype="float64")
    average(paths, narrow, lora="exact", dtype="float32")
    for name, values in np.load(narrow).items():
        if values.dtype.kind == "f":
            np.testing.assert_array_equal(values, np.load(wide)[name].astype(np.float32))


@pytest.mark.parametrize(
    "names",
    [
        ("l.hada_w1_a", "l.hada_w1_b", "l.hada_w2_a", "l.hada_w2_b"),
        ("l.lokr_w1", "l.lokr_w2"),
        ("l.lora_down.weight", "l.lora_up.weight", "l.lora_mid.weight"),
        ("b.q.lora_A", "b.q.lora_B", "b.q.lora_E"),
    ],
)
def test_products_of_other_kinds_are_suspected(tmp_path: Path, names: Sequence[str]) -> None:
    """LoHa, LoKr, LoCon with a core and AdaLoRA are named; what their means miss is unknown."""
    models = [{name: floats(e + k, 3, 3) for k, name in enumerate(names)} for e in (1, 2)]
    folder = write_run(tmp_path / "run", models)
    report = average(folder, tmp_path / "o.safetensors")
    (problem,) = report.plan.suspicions
    assert problem.kind == "factors"
    assert names[0] in problem.text
    assert "merge each checkpoint into its base model first" in problem.text
    assert [*check(folder).all_problems] == [problem]


@pytest.mark.parametrize("jobs", [1, 3])
def test_the_bytes_do_not_depend_on_the_number_of_processes(tmp_path: Path, jobs: int) -> None:
    """The mean product is computed in one process, whatever --jobs says."""
    models = [PAIRS["convolution"][0](e) for e in (1, 2, 3)]
    folder = write_run(tmp_path / "run", models)
    average(folder, tmp_path / "a.safetensors", lora="exact")
    average(folder, tmp_path / "b.safetensors", lora="exact", jobs=jobs, max_memory=1 << 20)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_large_factors_are_measured_by_blocks(tmp_path: Path) -> None:
    """With less memory than the factors have, the same distance is found."""
    models = [
        {
            "q.lora_A.weight": floats(e, 4, 20_000, around=0.9),
            "q.lora_B.weight": floats(e + 9, 15_000, 4, around=0.9),
        }
        for e in (1, 2)
    ]
    folder = write_run(tmp_path / "run", models)
    found = [
        average(folder, tmp_path / f"{bound}.safetensors", max_memory=bound).data()["factors"][
            "measured"
        ][0]["cross_term"]
        for bound in (1 << 20, 64 << 20)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    assert found[0] > 0.001


def test_a_high_rank_is_measured_in_strips(tmp_path: Path) -> None:
    """Where the products of all stacked factors do not fit the memory, they are made in parts."""
    models = [
        {"q.lora_A.weight": floats(e, 60, 90, around=0.9), "q.lora_B.weight": floats(e + 9, 70, 60)}
        for e in (1, 2, 3)
    ]
    folder = write_run(tmp_path / "run", models)
    products = [m["q.lora_B.weight"].astype(float) @ m["q.lora_A.weight"] for m in models]
    mean = np.mean(products, 0)
    a, b = (np.mean([m[f"q.lora_{x}.weight"].astype(float) for m in models], 0) for x in "AB")
    for bound in (1 << 20, 32 << 20):
        report = average(folder, tmp_path / f"{bound}.safetensors", max_memory=bound)
        found = report.data()["factors"]["measured"][0]
        assert found["unmeasured"] == []
        assert found["cross_term"] == pytest.approx(norm(b @ a - mean) / norm(mean), rel=1e-6)


def test_factors_of_hdf5_files_of_fortran_order_and_alone(tmp_path: Path) -> None:
    """Keras's .h5 and Fortran-ordered .npz are multiplied alike; one factor alone is no product."""
    layers: list[dict[str, Any]] = [
        {"d": {"lora_kernel_a": floats(e, 6, 2), "lora_kernel_b": floats(e + 9, 2, 5)}}
        for e in (1, 2)
    ]
    mean = sum(
        one["d"]["lora_kernel_a"].astype(np.float64) @ one["d"]["lora_kernel_b"] / 2
        for one in layers
    )
    values = np.linalg.svd(mean, compute_uv=False)
    lost = np.sqrt(np.sum(values[2:] ** 2))
    for e, one in enumerate(layers):
        write_model(tmp_path / f"m_{e}.h5", one)
        savez: Any = np.savez
        savez(tmp_path / f"m_{e}.npz", **{k: np.asfortranarray(v) for k, v in one["d"].items()})
    average(sorted(tmp_path.glob("m_*.h5")), tmp_path / "o.h5", lora="exact")
    average(sorted(tmp_path.glob("m_*.npz")), tmp_path / "o.npz", lora="exact")
    stored = {k.rpartition("/")[2]: v for k, v in read_model(tmp_path / "o.h5").items()}
    for found in (stored, np.load(tmp_path / "o.npz")):
        product = found["lora_kernel_a"].astype(np.float64) @ found["lora_kernel_b"]
        assert norm(product - mean) == pytest.approx(lost, rel=1e-5)
    alone = plan(sorted(tmp_path.glob("m_*.h5")), exclude_tensors=["*_b"])
    assert not alone.factors
    assert not find_factors(alone.averaged_rows)
