"""What the tests compare with: written with plain h5py and numpy, importing nothing of the package.

`write_model` makes files in Keras's layout; `naive_average` is the script that users write today,
done carefully: whole tensors, float64, from the oldest to the newest, divided and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Model = Mapping[str, Mapping[str, Array]]  # layer -> weight name -> values


def write_model(
    path: Path,
    layers: Model,
    *,
    config: str = '{"class_name": "Sequential"}',
    optimizer: Mapping[str, Array] | None = None,
    fixed: bool = False,
    storage: Mapping[str, Any] | None = None,
    **file_options: Any,
) -> Path:
    """Write a whole-model .h5 as Keras does.

    Args:
        path: the file.
        layers: the tensors; the weight name may hold slashes.
        config: model_config.
        optimizer: tensors of optimizer_weights; None writes none.
        fixed: write the lists of names as fixed-length strings, as Keras 2.0 did.
        storage: further arguments of h5py's create_dataset (chunks, compression, ...).
        **file_options: of h5py.File.
    """
    with h5py.File(path, "w", **file_options) as file:
        file.attrs["backend"] = "tensorflow"
        file.attrs["keras_version"] = "3.15.1"
        file.attrs["model_config"] = config.encode()
        group = file.create_group("model_weights")
        _write_names(group, "layer_names", list(layers), fixed)
        for layer in sorted([*layers, "top_level_model_weights"]):
            below = group.create_group(layer)
            weights = layers.get(layer, {})
            _write_names(below, "weight_names", list(weights), fixed)
            for name, values in weights.items():
                _write_tensor(below, name, values, storage or {})
        if optimizer is not None:
            group = file.create_group("optimizer_weights")
            _write_names(group, "weight_names", list(optimizer), fixed)
            for name, values in optimizer.items():
                group.create_dataset(name, data=values)
    return path


def _write_tensor(group: Any, name: str, values: Array, storage: Mapping[str, Any]) -> None:
    if values.dtype == object:
        group.create_dataset(name, data=values, dtype=h5py.string_dtype())
    elif values.ndim and values.size:
        group.create_dataset(name, data=values, **storage)
    else:
        group.create_dataset(name, data=values)


def _write_names(group: Any, key: str, names: Sequence[str], fixed: bool) -> None:
    """Write a list of names, split as Keras does when it is over 64,512 bytes."""
    encoded = [name.encode() for name in names]
    as_array: Array = np.array(encoded) if encoded else np.zeros((0,))
    parts = 1
    while any(part.nbytes > 64512 for part in np.array_split(as_array, parts)):
        parts += 1
    if parts > 1:
        for k, part in enumerate(np.array_split(as_array, parts)):
            group.attrs[f"{key}{k}"] = part
    elif fixed and encoded:
        group.attrs[key] = as_array
    else:
        group.attrs[key] = encoded if encoded else as_array


def read_model(path: Path) -> dict[str, Array]:
    """Return every dataset of a file by its path, read by h5py."""
    found: dict[str, Array] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = item[()]

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return found


def naive_average(
    paths: Sequence[Path], multipliers: Sequence[float], dtype: str | None = None
) -> dict[str, Array]:
    """Average the float tensors of model_weights; keep the others of the newest file.

    Args:
        paths: whole-model .h5 files, oldest first.
        multipliers: one each, such as 1 for the plain mean; the sum is divided by theirs.
        dtype: numpy type to round to; the stored one if None.
    """
    models = [read_model(path) for path in paths]
    result = {}
    for name, newest in models[-1].items():
        if not name.startswith("model_weights/"):
            continue
        if newest.dtype.kind != "f":
            result[name] = newest
            continue
        total: Any = None
        for model, multiplier in zip(models, multipliers, strict=True):
            term = np.float64(multiplier) * model[name].astype(np.float64)
            total = term if total is None else total + term
        with np.errstate(over="ignore"):
            result[name] = np.asarray(total / math.fsum(multipliers)).astype(dtype or newest.dtype)
    return result


def same_bits(one: Mapping[str, Array], other: Mapping[str, Array]) -> bool:
    """Tell whether two models have the same names, types, shapes and bits."""
    return list(one) == list(other) and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and one[name].tobytes() == other[name].tobytes()
        for name in one
    )


def nearest_bfloat16(value: float) -> int:
    """Return the bits of the bfloat16 nearest to a float64, ties to even, by exact fractions."""
    sign = 0x8000 if np.signbit(value) else 0
    wanted = abs(Fraction(value))
    # Bits of positive floats are in the order of their values: bisect for the two neighbours.
    low, high = 0, 0x7F80
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _bfloat16_value(middle) <= wanted else (low, middle)
    below, above = wanted - _bfloat16_value(low), _bfloat16_value(high) - wanted
    chosen = low if below < above or (below == above and low % 2 == 0) else high
    return sign | chosen


def _bfloat16_value(bits: int) -> Fraction:
    """Return the value of non-negative bits; infinity counts as the next power of two."""
    if bits == 0x7F80:
        return Fraction(2) ** 128
    exponent, mantissa = bits >> 7, bits & 0x7F
    if exponent == 0:
        return Fraction(mantissa, 128) * Fraction(2) ** -126
    return (1 + Fraction(mantissa, 128)) * Fraction(2) ** (exponent - 127)


#: dtype -> bits of the mantissa without the hidden one, bits of the exponent, has infinity.
LAYOUTS = {
    "float16": (10, 5, True),
    "bfloat16": (7, 8, True),
    "float32": (23, 8, True),
    "float64": (52, 11, True),
    "float8_e4m3fn": (3, 4, False),
    "float8_e5m2": (2, 5, True),
}


def decode(code: int, dtype: str) -> float:
    """Return the value of a code, from the definition of the IEEE formats."""
    mantissa, exponent, has_infinity = LAYOUTS[dtype]
    sign = -1.0 if code >> (mantissa + exponent) else 1.0
    field = code >> mantissa & ((1 << exponent) - 1)
    fraction = code & ((1 << mantissa) - 1)
    bias = (1 << (exponent - 1)) - 1
    if field == (1 << exponent) - 1:
        if has_infinity:
            return math.nan if fraction else sign * math.inf
        if fraction == (1 << mantissa) - 1:
            return math.nan
    whole = fraction + (1 << mantissa) if field else fraction
    return sign * math.ldexp(whole, max(field, 1) - bias - mantissa)


def encode(value: float | Fraction, dtype: str) -> int | None:
    """Return the code nearest to a number, by exact fractions, ties to even; None for NaN."""
    mantissa, exponent, has_infinity = LAYOUTS[dtype]
    sign = int(math.copysign(1, value) < 0) << (mantissa + exponent)
    infinity = (((1 << exponent) - 1) << mantissa) if has_infinity else None
    if math.isnan(value):
        return None
    if math.isinf(value):
        return None if infinity is None else sign | infinity
    exact = abs(Fraction(value))
    bias = (1 << (exponent - 1)) - 1
    binade = max(_find_binade(exact), 1 - bias) if value else 1 - bias
    units = round(exact / Fraction(2) ** (binade - mantissa))  # of a Fraction: ties to even
    # The code counts units: those of the binades below, and those of this one.
    code = ((binade + bias - 1) << mantissa) + units
    if infinity is None:
        return sign | code if code < (1 << (mantissa + exponent)) - 1 else None
    return sign | min(code, infinity)


def _find_binade(value: Fraction) -> int:
    """Return the exponent of the greatest power of two that is not above a positive number."""
    guess = value.numerator.bit_length() - value.denominator.bit_length()
    return guess if Fraction(2) ** guess <= value else guess - 1
