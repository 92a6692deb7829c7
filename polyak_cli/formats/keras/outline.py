"""List the layers of a model from its configuration: names, classes, and which lies in which.

A configuration is a stranger's text.  It is parsed under bounds, and only names, classes and depths
leave this module; what cannot be understood gives no layers.  Builds nothing, and reads no file.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from polyak_cli.tensors import OutlinedLayer

#: Bytes of a configuration that is parsed: 1,000 layers take some 1 MB, and parsing takes ten times
#: the memory of the text.
_LARGEST = 16 << 20
#: Models in one another; the loaders of Keras recurse too.
_DEEPEST = 32
#: Classes whose automatic names are not those of their class: tf_keras calls a Functional "model".
_CLASSES = {"model": "functional"}


def read_outline(text: bytes) -> tuple[OutlinedLayer, ...]:
    """Return the layers of a whole model's configuration, each model before its own layers.

    Args:
        text: the JSON that Keras wrote.
    """
    if not 0 < len(text) <= _LARGEST:
        return ()
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return ()  # a reader of tensors does without it
    return tuple(_list_layers(said, 1))


def _list_layers(model: Any, depth: int) -> Iterator[OutlinedLayer]:
    if depth > _DEEPEST:
        return
    for layer in find_layers(model):
        config = read_part(layer, "config")
        # Keras writes a custom layer without a configuration of its own under a null name there;
        # a Functional model keeps the name beside the configuration.
        name = layer.get("name") or config.get("name")
        kind = _name_class(layer)
        kind = _CLASSES.get(kind, kind)
        yield OutlinedLayer(depth, name if isinstance(name, str) else "", kind)
        yield from _list_layers(layer, depth + 1)
        # TimeDistributed and the like have one layer inside, which may be a model.
        inner = read_part(config, "layer")
        if find_layers(inner):
            yield from _list_layers(inner, depth + 1)


def find_layers(model: Any) -> list[dict[str, Any]]:
    """Return the layers that a model's configuration lists; none for anything else."""
    config = model.get("config") if isinstance(model, dict) else None
    # Keras 2.0 to 2.2 wrote a Sequential as the list itself.
    listed = config.get("layers") if isinstance(config, dict) else config
    if not isinstance(listed, list):
        return []
    return [layer for layer in listed if isinstance(layer, dict)]


def read_part(said: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return an object in a configuration, or an empty one."""
    found = said.get(key)
    return found if isinstance(found, dict) else {}


def _name_class(layer: Mapping[str, Any]) -> str:
    """Return a layer's class in snake case, "" where it is not known."""
    kind = layer.get("class_name")
    # A registered class is written as "Package>Class".
    return to_snake_case(kind.rpartition(">")[2]) if isinstance(kind, str) else ""


def label_groups(config: Mapping[str, Any], groups: Collection[str]) -> dict[str, str]:
    """Return the names of layers in a weights file whose groups do not hold them.

    Keras stores the layers of a model under ``layers``, by class and count of the class.

    Args:
        config: of the model.
        groups: of the file, those that hold variables, without ``/vars``.
    """
    return {group: name for group, name in _label(config, "", 1) if group in groups}


def _label(model: Mapping[str, Any], path: str, depth: int) -> Iterator[tuple[str, str]]:
    if depth > _DEEPEST:
        return
    counted: Counter[str] = Counter()
    for layer in find_layers(model):
        place = f"{path}/layers/{number_group(_name_class(layer), counted)}"
        config = read_part(layer, "config")
        name = config.get("name") or layer.get("name")
        if isinstance(name, str):
            yield place, name
        yield from _label(layer, place, depth + 1)
        yield from _label(read_part(config, "layer"), f"{place}/layer", depth + 1)


def number_group(kind: str, counted: Counter[str]) -> str:
    """Return the group of a model's next layer of a class, numbered from the second on.

    Args:
        kind: the class in snake case.
        counted: how many layers of each class came before; it is counted up.
    """
    counted[kind] += 1
    return kind if counted[kind] == 1 else f"{kind}_{counted[kind] - 1}"


def to_snake_case(name: str) -> str:
    """Return what Keras makes of the name of a class."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()
