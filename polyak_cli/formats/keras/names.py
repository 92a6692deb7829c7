"""Explain the names in Keras's weights files, where tensors have numbers only.

Keras 3 stores the variables of each layer as ``.../vars/0``, ``1``, ... in a tree of class or
attribute names.  Reads no file.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

#: Groups at the top that hold no tensors of the model; metrics are those of tf_keras.
ASIDE = frozenset({"/optimizer", "/metrics"})
#: A layer's class or attribute that is a BatchNorm by its name, such as sync_batch_normalization_1.
_BATCH_NORM = re.compile(r"(.*_)?(bn|batch_?norm(alization)?)(_?\d+)*", re.IGNORECASE)
_OPTIMIZER = re.compile(r"(?:.*/)?[^/]*optimizer(?:_\d+)?(?=/)", re.IGNORECASE)
#: Where a whole model keeps its optimizer's state.
OPTIMIZER = "/optimizer_weights"
#: By this attribute Keras 3 knows bfloat16 in a weights file, where it stands as two bare bytes.
DTYPE = b"dtype"
WEIGHTS_SUFFIX = ".weights.h5"
#: See `Format.recalculation`, of weights without their model.
RECALCULATION = "--recalibrate DATA --model ARCH"
_EMA = "_average"
#: Where tf_keras keeps EMAs; under mixed precision the optimizer's name is missing.
_OLDER_EMA = re.compile(r"/optimizer_weights/(?:[^/]+/)?average/(.*)")
_NAMELESS_EMA = f"{OPTIMIZER}/average/"


def sort_key(path: str) -> list[tuple[int, str]]:
    """Return a key that sorts numbers in paths by value: dense_2 before dense_10."""
    return [
        (int(digits), "") if digits else (-1, text)
        for part in path.split("/")
        for text, digits in [*re.findall(r"([^0-9]+)|([0-9]{1,18})", part), ("", "")]
    ]


def is_aside(path: str) -> bool:
    """Return whether a path lies in a group that holds no tensors of the model."""
    return path.startswith(tuple(f"{group}/" for group in ASIDE))


def is_variable(path: str) -> bool:
    """Return by its path whether a dataset is one of the model's tensors."""
    return "vars" in path.split("/")[1:-1] and not is_aside(path)


def find_optimizers(tensors: Mapping[str, tuple[str, Sequence[int]]]) -> set[str]:
    """Return the groups that hold optimizers which a model has as its own attributes.

    Each of Keras's optimizers saves the number of its iteration first, an integer scalar.

    Args:
        tensors: location -> dtype and shape.
    """
    groups = {match[0] for path in tensors if (match := _OPTIMIZER.match(path))}
    first = {group: tensors.get(f"{group}/vars/0", ("", ())) for group in groups}
    return {g for g, (dtype, shape) in first.items() if dtype.startswith("int") and not shape}


def find_optimizer_group(location: str) -> str:
    """Return the group of the optimizer to which a tensor belongs."""
    match = _OPTIMIZER.match(location)
    return match[0] if match else ""


def find_statistics(locations: Iterable[str], labels: Mapping[str, str]) -> list[str]:
    """Return the moving statistics of BatchNorm layers among tensors.

    A layer saves gamma and beta, where it has them, before mean and variance; renorm has more of
    them behind.  A layer under an attribute's name is recognised by its label only.

    Args:
        locations: of the tensors.
        labels: group of variables -> the name of its layer, which only newer files have.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for location in locations:
        groups[location.rpartition("/")[0]].append(location)
    found = []
    for group, held in groups.items():
        layer = group.removesuffix("/vars").rpartition("/")[2]
        if any(_BATCH_NORM.fullmatch(name) for name in (layer, labels.get(group, ""))):
            held.sort(key=sort_key)
            found += held[-2:] if len(held) < 5 else held[2:]
    return found


def find_slots(paths: Mapping[str, str], state: Iterable[str]) -> dict[str, list[str]]:
    """Return an optimizer's EMA slots, each with the tensors that it may belong to.

    Keras calls the slot of ``sequential/dense/kernel`` ``sgd/sequential_dense_kernel_average``, and
    tf_keras that of ``dense/kernel:0`` ``SGD/average/dense/kernel:0``, or under mixed precision,
    where another optimizer stands around, ``average/dense/kernel:0``.

    Args:
        paths: tensor -> the path of its variable.
        state: names of the optimizer's tensors.
    """
    flat: dict[str, list[str]] = defaultdict(list)
    for tensor, path in paths.items():
        flat[_flat(path)].append(tensor)
    slots = list(state)
    # A layer may itself be called "average": where the optimizer's name is missing,
    # average/average/kernel:0 is its EMA, and m/average/kernel:0 its momentum.
    is_nameless = any(
        _flat(slot.removeprefix(_NAMELESS_EMA)) in flat
        for slot in slots
        if slot.startswith(_NAMELESS_EMA)
    )
    averaged = ((slot, _find_averaged(slot, is_nameless)) for slot in slots)
    return {slot: flat.get(path, []) for slot, path in averaged if path is not None}


def _find_averaged(slot: str, is_nameless: bool) -> str | None:
    """Return the flat path of the variable of an EMA slot; None if it is no EMA slot."""
    if is_nameless:
        return _flat(slot[len(_NAMELESS_EMA) :]) if slot.startswith(_NAMELESS_EMA) else None
    older = _OLDER_EMA.fullmatch(slot)
    if older:
        return _flat(older[1])
    name = _flat(slot.rpartition("/")[2])
    return name.removesuffix(_EMA) if name.endswith(_EMA) else None


def _flat(path: str) -> str:
    return re.sub(r":\d+$", "", path).replace("/", "_")
