"""Write the names of tensors as people know them: a layer and a weight.

Formats keep tensors under paths of their own, such as ``dense_1/sequential/dense_1/kernel``.  Those
stay in JSON, in errors and under ``-v``.  Reads names only.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

#: Keras 3 numbers the variables of a layer, in the order in which its class makes them.
_WEIGHTS: Mapping[str, Mapping[int, tuple[str, ...]]] = {
    "dense": {1: ("kernel",), 2: ("kernel", "bias")},
    "embedding": {1: ("embeddings",)},
    "layer_normalization": {2: ("gamma", "beta")},
    # Without scale and center, only the statistics are left.
    "batch_normalization": {
        2: ("moving_mean", "moving_variance"),
        4: ("gamma", "beta", "moving_mean", "moving_variance"),
    },
}
_CONVOLUTION = re.compile(r"(?:depthwise_)?conv[123]d(?:_transpose)?")
_VARIABLE = re.compile(r"(.*)/vars/(\d+)")


def name_tensors(names: Iterable[str]) -> dict[str, str]:
    """Return each tensor's name as people know it; the whole name where two would be equal."""
    whole = [*names]
    numbered: dict[str, int] = defaultdict(int)  # group -> how many variables it has
    for name in whole:
        if match := _VARIABLE.fullmatch(name):
            numbered[match[1]] += 1
    short = {name: _shorten(name, numbered) for name in whole}
    counts = Counter(short.values())
    return {name: text if counts[text] == 1 else name for name, text in short.items()}


def _shorten(name: str, numbered: Mapping[str, int]) -> str:
    match = _VARIABLE.fullmatch(name)
    if match:
        return _name_variable(match[1], int(match[2]), numbered[match[1]])
    # Whole Keras models in HDF5: the layer's group, the model, and the layer again.
    parts = re.sub(r":\d+$", "", name).split("/")
    again = max(k for k, part in enumerate(parts) if part == parts[0])
    if 0 < again < len(parts) - 1:
        parts = parts[again:]
    return "/".join(parts).removeprefix("/").removeprefix("model_weights/")


def _name_variable(group: str, number: int, count: int) -> str:
    """Return the name of a numbered variable of a layer, whose class its group is named after."""
    parts = group.removeprefix("/").split("/")
    weights: tuple[str, ...] = ()
    if len(parts) > 1 and parts[-2] == "layers":  # under an attribute's name, it may be any class
        weights = _find_weights(parts[-1], count)
    weight = weights[number] if number < len(weights) else str(number)
    return "/".join([*(part for part in parts if part != "layers"), weight])


def _find_weights(layer: str, count: int) -> tuple[str, ...]:
    """Return the names of a layer's variables; nothing if they are not known for certain."""
    kind = re.sub(r"_\d+$", "", layer)
    return _WEIGHTS.get("dense" if _CONVOLUTION.fullmatch(kind) else kind, {}).get(count, ())
