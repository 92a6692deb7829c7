"""Quantised tensors: recognised by names, types and values; carried with their scales on demand.

Files are written, and results read, by safetensors, numpy and h5py.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import deserialize
from safetensors.numpy import load_file, save_file

from polyak_cli import average, check, inspect, plan, verify
from polyak_cli.errors import MismatchError
from tests.contract import assert_same, naive
from tests.oracle import Array, write_model

Model = dict[str, Array]


def floats(seed: int, *shape: int) -> Array:
    """Return numbers as a layer has them."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def whole(seed: int, *shape: int, dtype: Any = np.int32) -> Array:
    """Return integers as quantisation makes them, all of them other than with another seed."""
    return np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)


def gptq(e: int) -> Model:
    """Return a layer of 4 bits as AutoGPTQ saves it: 64 inputs in 8 rows, 16 outputs."""
    return {
        "h.0.qweight": whole(e, 8, 16),
        "h.0.qzeros": whole(e, 2, 2),
        "h.0.scales": floats(e, 2, 16).astype(np.float16),
        "h.0.g_idx": np.arange(64, dtype=np.int32),
    }


def awq(e: int) -> Model:
    """Return a layer of 4 bits as AutoAWQ saves it: 64 inputs, 16 outputs in 2 columns."""
    return {
        "h.0.qweight": whole(e, 64, 2),
        "h.0.qzeros": whole(e, 2, 2),
        "h.0.scales": floats(e, 2, 16).astype(np.float16),
    }


def nf4(e: int) -> Model:
    """Return a layer of 4 bits as bitsandbytes saves it, with scales that are quantised too."""
    return {
        "h.0.weight": whole(e, 32, 1, dtype=np.uint8),
        "h.0.weight.absmax": whole(e, 4, dtype=np.uint8),
        "h.0.weight.quant_map": floats(0, 16),
        "h.0.weight.nested_absmax": floats(e, 1),
        "h.0.weight.nested_quant_map": floats(0, 256),
        "h.0.weight.quant_state.bitsandbytes__nf4": whole(e, 90, dtype=np.uint8),
    }


LAYERS: Mapping[str, tuple[Callable[[int], Model], str]] = {
    "gptq": (gptq, "'h.0.qweight' is quantised (GPTQ: 4-bit integers with scales)"),
    "awq": (awq, "'h.0.qweight' is quantised (AWQ: 4-bit integers with scales)"),
    "nf4": (nf4, "'h.0.weight' is quantised (bitsandbytes: 4-bit codes with scales)"),
    "int8 of bitsandbytes": (
        lambda e: {
            "h.0.weight": whole(e, 4, 6, dtype=np.int8),
            "h.0.SCB": floats(e, 4),
            "h.0.weight_format": np.zeros((), np.uint8),
        },
        "'h.0.weight' is quantised (bitsandbytes: 8-bit codes with scales)",
    ),
    "absmax beside": (
        lambda e: {
            "h.0.weight": whole(e, 12, 1, dtype=np.uint8),
            "h.0.absmax": floats(e, 2),
            "h.0.quant_map": floats(0, 16),
            "h.0.quant_state": whole(e, 9, dtype=np.uint8),
        },
        "'h.0.weight' is quantised (bitsandbytes: 4-bit codes with scales)",
    ),
    "torchao": (
        lambda e: {
            "h.0.int_data": whole(e, 4, 6, dtype=np.int8),
            "h.0.scale": floats(e, 4, 1),
            "h.0.zero_point": whole(e, 4, 1),
        },
        "'h.0.int_data' is quantised (torchao: int8 with scales)",
    ),
    "compressed-tensors": (
        lambda e: {
            "h.0.weight_packed": whole(e, 4, 1),
            "h.0.weight_scale": floats(e, 4, 1).astype(ml_dtypes.bfloat16),
            "h.0.weight_zero_point": whole(e, 1, 1),
            "h.0.weight_shape": np.array([4, 8]),
        },
        "'h.0.weight_packed' is quantised (compressed-tensors: int32 with scales)",
    ),
    "hqq": (
        lambda e: {
            "h.0.W_q": whole(e, 8, 4, dtype=np.uint8),
            "h.0.scale": floats(e, 1, 8),
            "h.0.zero": floats(e, 1, 8),
        },
        "'h.0.W_q' is quantised (HQQ: uint8 with scales)",
    ),
    "hqq with a folder": (
        lambda e: {
            "h.0.W_q": whole(e, 8, 4, dtype=np.uint8),
            "h.0.meta.scale": floats(e, 1, 8),
            "h.0.meta.zero": floats(e, 1, 8),
        },
        "'h.0.W_q' is quantised (HQQ: uint8 with scales)",
    ),
    "fp8": (
        lambda e: {
            "h.0.weight": floats(e, 4, 6).astype(ml_dtypes.float8_e4m3fn),
            "h.0.weight_scale_inv": floats(e, 1, 1),
            "h.0.input_scale": floats(e),
        },
        "'h.0.weight' is quantised (float8_e4m3fn with a scale)",
    ),
    "mxfp4": (
        lambda e: {
            "h.0.gate_blocks": whole(e, 4, 2, 16, dtype=np.uint8),
            "h.0.gate_scales": whole(e, 4, 2, dtype=np.uint8),
        },
        "'h.0.gate_blocks' is quantised (MXFP4: uint8 blocks with scales)",
    ),
    "mlx": (
        lambda e: {
            "h.0.weight": whole(e, 4, 2, dtype=np.uint32),
            "h.0.weight_scales": floats(e, 4, 1),
        },
        "'h.0.weight' is quantised (uint32 with a scale)",
    ),
}


def globs_of(message: str) -> list[str]:
    """Return the globs that an error names, as a shell would read them."""
    words = shlex.split(message.partition(" with --")[2].partition(";")[0])
    return [word for word in words if word != "--exclude-tensors" and word != "exclude-tensors"]


def write(path: Path, model: Model) -> None:
    """Write one checkpoint in the format of its suffix."""
    savez: Any = np.savez
    save_file(model, path) if path.suffix == ".safetensors" else savez(path, **model)


def read(path: Path) -> dict[str, bytes]:
    """Read the values of every tensor, as they are stored."""
    if path.suffix == ".npz":
        return {name: values.tobytes() for name, values in np.load(path).items()}
    read_all: Any = deserialize  # numpy has no float8
    return {name: bytes(said["data"]) for name, said in read_all(path.read_bytes())}


@pytest.mark.parametrize(
    ("name", "form"), [*((name, "safetensors") for name in LAYERS), ("gptq", "npz"), ("nf4", "npz")]
)
def test_quantised_layers_are_named_and_the_named_globs_carry_them(
    tmp_path: Path, name: str, form: str
) -> None:
    """Each is refused by its kind; with the globs of the error all its parts are the newest's."""
    make, kind = LAYERS[name]
    models = [
        {
            **make(e),
            **{k.replace("h.0", "h.1"): v for k, v in make(e + 9).items()},
            "x": floats(e, 3),
        }
        for e in (1, 2)
    ]
    for e, model in enumerate(models):
        write(tmp_path / f"m_{e}.{form}", model)
    with pytest.raises(MismatchError) as caught:
        average(tmp_path, tmp_path / f"o.{form}")
    assert kind in str(caught.value)
    assert "(and 1 more such)" in str(caught.value)
    with pytest.raises(MismatchError, match=re.escape(str(caught.value))):
        plan(tmp_path)  # known from headers alone
    assert [p.kind for p in check(tmp_path).all_problems] == ["quantised"]
    (inside,) = inspect([tmp_path / f"m_0.{form}"])
    fates = {one.spec.name: one.fate for one in inside.tensors}
    assert fates["x"] == "averaged"
    assert fates[re.findall(r"'(.*?)'", kind)[0]] == "refused"
    globs = globs_of(str(caught.value))
    average(tmp_path, tmp_path / f"o.{form}", exclude_tensors=globs)
    found = read(tmp_path / f"o.{form}")
    (mean,) = naive([{"x": model["x"]} for model in models], [1, 1]).values()
    expected = models[1] | {"x": mean}
    assert {name: found[name] for name in expected} == {n: v.tobytes() for n, v in expected.items()}


def write_series(folder: Path, make: Callable[[int], Model]) -> Path:
    """Write three checkpoints as safetensors and return their folder."""
    folder.mkdir(exist_ok=True)
    for e in (1, 2, 3):
        save_file(make(e), folder / f"m_{e}.safetensors")
    return folder


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("q.codes_scale", (4, 1), np.int8),
        ("q.amax", (1,), np.uint8),
        ("q.zeros", (6,), np.int16),
        ("q.s", (4, 1), np.int32),
        ("q.s", (2, 6), np.int8),
        ("q.scale", (4, 1), np.int64),
    ],
)
def test_unknown_integers_with_a_scale_are_refused_where_they_differ(
    tmp_path: Path, name: str, shape: tuple[int, ...], dtype: Any
) -> None:
    """Neither program nor names are known, only that integers differ beside what looks a scale."""

    def make(e: int) -> Model:
        return {"q.x": whole(e, 4, 6, dtype=dtype), name: floats(e, *shape), "b.y": floats(e, 2)}

    folder = write_series(tmp_path / "run", make)
    output = tmp_path / "o.safetensors"
    with pytest.raises(MismatchError, match=rf"'q\.x' looks quantised .*'{name}'") as caught:
        average(folder, output)
    assert not output.exists()
    (problem,) = check(folder).all_problems
    assert (problem.kind, problem.text) == ("quantised", str(caught.value))
    average(folder, output, exclude_tensors=globs_of(str(caught.value)))
    found = load_file(output)
    assert_same({k: found[k] for k in ("q.x", name)}, {k: make(3)[k] for k in ("q.x", name)})
    # Who knows better has the scale averaged, and the record says so.
    assert check(folder, allow=["scaled-integers"]).healthy
    average(folder, output, allow=["scaled-integers"], force=True)
    means = naive([make(e) for e in (1, 2, 3)], [1] * 3)
    assert_same(load_file(output), means)
    assert verify(output, sources=[folder]).verified


def test_integers_that_are_called_weights_are_refused_where_they_differ(tmp_path: Path) -> None:
    """GGML keeps its scales among the bytes of the blocks: no tensor lies beside them."""
    folder = write_series(
        tmp_path / "run",
        lambda e: {"q.weight": whole(e, 4, 18, dtype=np.uint8), "norm.weight": floats(e, 4)},
    )
    with pytest.raises(MismatchError, match=r"looks quantised .uint8 where a model has floats"):
        average(folder, tmp_path / "o.safetensors")


def test_scaled_integers_of_h5_files_are_refused(tmp_path: Path) -> None:
    """Keras's own names of packed kernels, and unknown ones, are seen in HDF5 too."""
    for e in (1, 2):
        layers: dict[str, Any] = {
            "d": {"x": whole(e, 4, 6, dtype=np.int8), "x_absmax": floats(e, 4)},
            "e": {"k": floats(e, 2)},
        }
        write_model(tmp_path / f"m_{e}.h5", layers)
    with pytest.raises(MismatchError, match=r"'d/x' is quantised .*--exclude-tensors 'd/x\*'"):
        average(tmp_path, tmp_path / "o.h5")
    average(tmp_path, tmp_path / "o.h5", exclude_tensors=["d/x*"])


def ordinary(e: int) -> Model:
    """Return the integers of ordinary modules, constants or counters, beside their floats."""
    return {
        "bn.weight": floats(e, 4),
        "bn.running_var": floats(e, 4),
        "bn.num_batches_tracked": np.array(100 * e),
        "swin.relative_position_bias_table": floats(e, 9, 2),
        "swin.relative_position_index": np.arange(16).reshape(4, 4),
        "gpt.attn.bias": np.tril(np.ones((1, 1, 4, 4), np.uint8)),
        "gpt.attn.masked_bias": np.array(-1e4, np.float32),
        "gpt.attn.weight": floats(e, 4, 12),
        "bert.embeddings.position_ids": np.arange(8).reshape(1, 8),
        "bert.embeddings.token_type_ids": np.zeros((1, 8), np.int64),
        "logit_scale": floats(e),
        "queue_ptr": np.array([64 * e]),
        "queue_labels": whole(e, 8, dtype=np.int64),
        "queue": floats(e, 8, 4),
        "ema.decay": np.array(0.999, np.float32),
        "ema.num_updates": np.array(10 * e, np.int32),
        "experts.tokens_per_expert": whole(e, 4, dtype=np.int64),
        "experts.e_score_correction_bias": floats(e, 4),
        "observer.scale": floats(e, 1),
        "observer.zero_point": np.zeros(1, np.int32),
        "observer.enabled": np.array([e], np.uint8),
        "ls1.layer_scale": floats(e, 4),
        "dropout.seed_generator_state": np.array([e, 7], np.uint32),
        "mask.weight_mask": np.ones((4, 4), np.uint8),
        "mask.weight_orig": floats(e, 4, 4),
    }


def test_integers_of_ordinary_modules_are_no_alarm(tmp_path: Path) -> None:
    """Counters may differ, and positions, masks and tables beside floats are constants."""
    folder = write_series(tmp_path / "run", ordinary)
    average(folder, tmp_path / "o.safetensors")
    assert_same(
        load_file(tmp_path / "o.safetensors"), naive([ordinary(e) for e in (1, 2, 3)], [1] * 3)
    )
    assert "quantised" not in [problem.kind for problem in check(folder).all_problems]


def test_constant_integers_beside_a_scale_are_carried(tmp_path: Path) -> None:
    """What never changes is no part of what was trained."""
    folder = write_series(
        tmp_path / "run",
        lambda e: {"q.x": whole(0, 4, 6), "q.scale": floats(e, 4, 1), "b": floats(e, 2)},
    )
    average(folder, tmp_path / "o.safetensors")
    assert check(folder).healthy


def test_only_the_scale_left_out_leaves_a_float8_kernel_refused(tmp_path: Path) -> None:
    """The mean of kernels under the newest scale is as wrong as under the mean scale."""
    folder = write_series(tmp_path / "run", lambda e: {**LAYERS["fp8"][0](e), "b": floats(e, 2)})
    with pytest.raises(MismatchError, match="is quantised"):
        average(folder, tmp_path / "o.safetensors", exclude_tensors=["*scale*"])


def test_one_glob_names_all_layers_that_differ_by_a_number(tmp_path: Path) -> None:
    """Forty quantised layers are carried with a single glob, which touches no other layer."""

    def make(e: int) -> Model:
        layers = {
            f"model.layers.{k}.q.{n[4:]}": v for k in range(40) for n, v in gptq(e + k).items()
        }
        return layers | {f"model.layers.{k}.norm.weight": floats(e, 4) for k in range(40)}

    folder = write_series(tmp_path / "run", make)
    with pytest.raises(MismatchError) as caught:
        average(folder, tmp_path / "o.safetensors")
    assert globs_of(str(caught.value)) == ["model.layers.*.q.*"]


def test_integers_that_are_carried_alone_are_refused_too(tmp_path: Path) -> None:
    """The newest integers under the mean of the scales are no average either."""
    folder = write_series(
        tmp_path / "run",
        lambda e: {"q.x": whole(e, 4, 6), "q.scale": floats(e, 4, 1), "b": floats(e, 2)},
    )
    with pytest.raises(MismatchError, match=r"'q\.x' looks quantised .*--exclude-tensors 'q\.\*'"):
        average(folder, tmp_path / "o.safetensors", exclude_tensors=["q.x"])


def test_many_tensors_in_one_folder_are_looked_at_once(tmp_path: Path) -> None:
    """The work grows with the number of tensors, not with its square, which would take hours."""
    model = {f"x{k}": np.zeros(2, np.int8) for k in range(20_000)}
    model |= {f"s{k}_scale": np.zeros(1, np.float32) for k in range(20_000)}
    save_file(model, tmp_path / "m_1.safetensors")
    assert len(plan(tmp_path).averaged) == 20_000
