"""What the tests compare with: written with plain h5py and numpy, importing nothing of the package.

`write_model` makes files in Keras's layout; `naive_average` is the script that users write today,
done carefully: whole tensors, float64, from the oldest to the newest, rounded once.
"""

from __future__ import annotations

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
    paths: Sequence[Path], coefficients: Sequence[float], dtype: str | None = None
) -> dict[str, Array]:
    """Average the float tensors of model_weights; keep the others of the newest file.

    Args:
        paths: whole-model .h5 files, oldest first.
        coefficients: one each, normalised.
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
        for model, coefficient in zip(models, coefficients, strict=True):
            term = np.float64(coefficient) * model[name].astype(np.float64)
            total = term if total is None else total + term
        with np.errstate(over="ignore"):
            result[name] = np.asarray(total).astype(dtype or newest.dtype)
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
