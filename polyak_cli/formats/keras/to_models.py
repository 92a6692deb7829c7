"""Turn the configuration and tensors of a `.keras` archive into those of a whole model in HDF5.

The opposite of `from_models`: Keras loads an `.h5` by the order of layers and of the tensors in
each, those that are trained before the others.  Whatever has no certain order is refused.  Builds
nothing and reads no file.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from polyak_cli.errors import OutputError, shown
from polyak_cli.formats.keras import names as keras_names
from polyak_cli.formats.keras.from_models import (
    CELLS,
    DEEPEST,
    MODELS,
    PARTS,
    PLAIN,
    RECURRENT,
    find_kind,
    is_plain,
    name_class,
    parse,
)
from polyak_cli.formats.keras.outline import find_layers, number_group, read_part, to_snake_case
from polyak_cli.tensors import Table

_WAY_OUT = "open it in Keras and save it as .h5 with model.save(), or keep .keras"
_CONFIG, _METADATA = "config.json", "metadata.json"
#: What the variables of a layer are called, where it has more than kernel and bias.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "Embedding": ("embeddings",),
    "PReLU": ("alpha",),
    "SeparableConv1D": ("depthwise_kernel", "pointwise_kernel", "bias"),
    "SeparableConv2D": ("depthwise_kernel", "pointwise_kernel", "bias"),
    "Normalization": ("mean", "variance", "count"),
    "RMSNormalization": ("scale",),
    "AdditiveAttention": ("scale",),
}
_CELL = ("kernel", "recurrent_kernel", "bias")
_MOVING = ("moving_mean", "moving_variance")
#: Layers that may have no variables at all, by their arguments.
_MAY_BE_EMPTY = frozenset(
    {
        *("LayerNormalization", "GroupNormalization", "RMSNormalization", "Normalization"),
        "AdditiveAttention",
    }
)


class Model(NamedTuple):
    """What an `.h5` file holds besides the values of tensors."""

    texts: Mapping[str, str]  # attributes of the file
    layers: Mapping[str, Mapping[str, str]]  # layer -> name of a tensor there -> name of the tensor


class _Variable(NamedTuple):
    location: str
    name: str  # in the group of its layer
    is_trained: bool


def read_model(table: Table, texts: Mapping[str, str]) -> Model:
    """Return what an `.h5` of the same model holds.

    Args:
        table: of the archive.
        texts: of it.

    Raises:
        OutputError: says what cannot be converted, and what to do.
    """
    for key in texts:
        if key not in (_CONFIG, _METADATA):
            raise OutputError(f"'{shown(key)}' would be lost: an .h5 has no place for it")
    version = parse(texts.get(_METADATA, "{}")).get("keras_version")
    if not isinstance(version, str) or not version.startswith("3."):
        raise OutputError(
            f"was written by Keras {shown(version, 20)}, and the order of its tensors is known of "
            f"Keras 3 only; {_WAY_OUT}"
        )
    try:
        config = parse(texts[_CONFIG])
        layers = _order_layers(config, table)
    except RecursionError:
        raise OutputError("has a damaged configuration: it is nested without end") from None
    own = {key: value for key, value in config.items() if key != "compile_config"}
    written = {"keras_version": version, "model_config": json.dumps(own)}
    if config.get("compile_config"):
        written["training_config"] = json.dumps(_convert_training(config["compile_config"]))
    return Model(written, layers)


def _convert_training(said: Any) -> dict[str, Any]:
    training = dict(said) if isinstance(said, dict) else {}
    optimizer = training.pop("optimizer", None)
    if not isinstance(optimizer, dict):
        raise OutputError(
            "has a training configuration without the optimizer that an .h5 needs; compile the "
            "model in Keras with one, or keep .keras"
        )
    return {"loss_weights": None, **training, "optimizer_config": optimizer}


def _order_layers(config: Mapping[str, Any], table: Table) -> dict[str, dict[str, str]]:
    """Return the tensors of each layer of a model in the order in which Keras loads them."""
    kind = find_kind(config)
    if kind not in MODELS:
        raise OutputError(
            f"is a {shown(config.get('class_name'), 60)}, expected a Sequential or Functional "
            f"model; {_WAY_OUT}"
        )
    lister = _Lister(table)
    ordered: dict[str, dict[str, str]] = {}
    for layer, home in _number_layers(config, ""):
        own = read_part(layer, "config")
        name = own.get("name")
        if not isinstance(name, str) or not name or "/" in name or name in ordered:
            raise OutputError(f"has a layer called {shown(name, 60)}; {_WAY_OUT}")
        found = lister.list_layer(layer, home, name, 1)
        if own.get("trainable", True):  # Keras keeps the order of a frozen layer as it is
            found.sort(key=lambda one: not one.is_trained)
        if kind == "Functional" or layer.get("class_name") != "InputLayer":
            ordered[name] = {one.name: lister.names[one.location] for one in found}
            if len(ordered[name]) < len(found):  # two of one name
                raise _refuse(layer)
    lister.refuse_left()
    return ordered


def _number_layers(model: Mapping[str, Any], home: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each layer of a model and the group where Keras saves it."""
    counted: Counter[str] = Counter()
    for layer in find_layers(model):
        kind = name_class(layer)
        yield layer, f"{home}/layers/{number_group(to_snake_case(kind), counted)}"


class _Lister:
    """Lists the variables of layers, and keeps account of what no layer has."""

    def __init__(self, table: Table) -> None:
        self.names = {spec.location: spec.name for spec in table.tensors.values()}
        self.held: dict[str, list[str]] = defaultdict(list)  # group -> locations in their order
        for location in sorted(self.names, key=keras_names.sort_key):
            self.held[location.rpartition("/vars/")[0]].append(location)
        self.left = set(self.held)

    def refuse_left(self) -> None:
        """Refuse tensors that belong to no layer in the configuration."""
        if self.left:
            raise OutputError(
                f"'{shown(min(self.left)[1:], 80)}' has tensors, but is no layer in its "
                f"configuration; {_WAY_OUT}"
            )

    def list_layer(
        self, layer: Mapping[str, Any], home: str, scope: str, depth: int
    ) -> list[_Variable]:
        """Return the variables of a layer in their natural order.

        Args:
            layer: its configuration.
            home: the group where Keras saves it.
            scope: the beginning of the names.
            depth: of the layer.
        """
        if depth > DEEPEST:
            raise OutputError(f"has more than {DEEPEST} models in one another")
        found = list(self._list_parts(layer, home, scope, depth))
        # A frozen model says so of each layer in it.
        is_frozen = not read_part(layer, "config").get("trainable", True)
        if is_frozen and find_kind(layer) not in MODELS:
            # Keras loads such a layer as frozen, and its parts as not frozen.
            if found and depth > 1 and find_kind(layer) not in PLAIN:
                raise _refuse(layer)
            found = [one._replace(is_trained=False) for one in found]
        if any(group == home or group.startswith(f"{home}/") for group in self.left):
            raise _refuse(layer)
        return found

    def _list_parts(
        self, layer: Mapping[str, Any], home: str, scope: str, depth: int
    ) -> Iterator[_Variable]:
        kind, config = find_kind(layer), read_part(layer, "config")
        inner = read_part(config, "layer")
        if kind == "Normalization" and depth > 1:
            raise _refuse(layer)  # Keras loads its mean from an .h5, and does not use it
        if kind in PLAIN and is_plain(layer):
            yield from self._list_own(layer, home, scope, _name_variables(kind, config))
        elif kind in PARTS and is_plain(layer):
            for part, attribute in PARTS[kind].items():
                yield from self._list_own(
                    layer, f"{home}/{attribute}", f"{scope}/{part}", ("kernel", "bias")
                )
        elif kind in RECURRENT:
            cell = f"{scope}/{to_snake_case(kind)}_cell"
            yield from self._list_own(layer, f"{home}/cell", cell, _CELL)
        elif kind == "RNN":
            for cell, group in _find_cells(layer, f"{home}/cell"):
                yield from self._list_own(layer, group, f"{scope}/{cell}", _CELL)
        elif kind == "TimeDistributed":
            own = f"{scope}/{read_part(inner, 'config').get('name')}"
            yield from self.list_layer(inner, f"{home}/layer", own, depth + 1)
        elif kind == "Bidirectional" and find_kind(inner) in (*RECURRENT, "RNN"):
            backward = read_part(config, "backward_layer") or inner
            for way, one in (("forward", inner), ("backward", backward)):
                yield from self.list_layer(one, f"{home}/{way}_layer", f"{scope}/{way}", depth + 1)
        elif kind in MODELS:
            for one, group in _number_layers(layer, home):
                own = f"{scope}/{read_part(one, 'config').get('name')}"
                yield from self.list_layer(one, group, own, depth + 1)

    def _list_own(
        self, layer: Mapping[str, Any], home: str, scope: str, called: Sequence[str]
    ) -> Iterator[_Variable]:
        """Yield the variables of one group, which are called so in this order."""
        held = self.held.get(home, [])
        # A layer that two models share is saved with the first of them only.
        is_missing = not held and find_kind(layer) not in _MAY_BE_EMPTY
        if is_missing or len(held) > len(called):
            raise _refuse(layer)
        self.left.discard(home)
        fixed = {"Normalization": called}.get(find_kind(layer), _MOVING)
        for name, location in zip(called, held, strict=False):
            yield _Variable(location, f"{scope}/{name}", name not in fixed)


def _name_variables(kind: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what the variables of a layer are called, at most."""
    if kind.endswith("Normalization") and kind not in _NAMES:
        scale = ("gamma",) if config.get("scale", True) else ()
        center = ("beta",) if config.get("center", True) else ()
        moving = _MOVING if kind == "BatchNormalization" else ()
        return (*scale, *center, *moving)
    return _NAMES.get(kind, ("kernel", "bias"))


def _find_cells(layer: Mapping[str, Any], home: str) -> list[tuple[str, str]]:
    """Return name and group of the cell of a layer, or of each of several."""
    cell = read_part(read_part(layer, "config"), "cell")
    stacked = read_part(cell, "config").get("cells")
    cells = [cell]
    is_stack = find_kind(cell) == "StackedRNNCells" and isinstance(stacked, list)
    if isinstance(stacked, list) and is_stack:
        cells = [one for one in stacked if isinstance(one, dict)]
    if not CELLS.issuperset(map(find_kind, cells)):
        raise _refuse(layer)
    counted: Counter[str] = Counter()
    found = []
    for one in cells:
        group = f"{home}/cells/{number_group(to_snake_case(find_kind(one)), counted)}"
        found.append((str(read_part(one, "config").get("name")), group if is_stack else home))
    return found


def _refuse(layer: Mapping[str, Any]) -> OutputError:
    return OutputError(
        f"has the layer '{shown(read_part(layer, 'config').get('name'), 60)}' of class "
        f"{shown(layer.get('class_name'), 60)}, for whose tensors the order in an .h5 is not known "
        f"for certain; {_WAY_OUT}"
    )
