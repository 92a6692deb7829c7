"""Turn the texts and names of a whole model in HDF5 into those of Keras 3's own files.

An `.h5` file lists the tensors of each layer in a row; a `.keras` and a `.weights.h5` have them in
a tree of objects.
For the layers of Keras that are known here, the tree follows from the configuration.  Any other
layer with tensors is refused, since a tensor in a wrong place would go unseen.  Builds nothing and
reads no file.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from polyak_cli.errors import OutputError, shown
from polyak_cli.formats.keras.outline import find_layers, number_group, read_part, to_snake_case
from polyak_cli.tensors import Table

#: What else can be done; ends a refusal.
_WAY_OUT = (
    "open it in Keras and save it as .keras with model.save(), or its tensors with "
    "model.save_weights(), or keep .h5"
)
#: Classes of models -> what Keras 3 calls them in archives.
MODELS: Mapping[object, Mapping[str, str | None]] = {
    "Sequential": {"module": "keras", "registered_name": None},
    "Functional": {"module": "keras.src.models.functional", "registered_name": "Functional"},
}
#: Layers that hold all of their variables themselves, in the order of an .h5 file.
PLAIN = frozenset(
    {
        *("Dense", "EinsumDense", "Embedding", "PReLU", "Normalization"),
        *("Conv1D", "Conv2D", "Conv3D", "DepthwiseConv1D", "DepthwiseConv2D"),
        *("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"),
        *("SeparableConv1D", "SeparableConv2D"),
        *("BatchNormalization", "LayerNormalization", "GroupNormalization", "RMSNormalization"),
        # No Attention: Keras cannot open an .h5 with one, and takes its "dot" for a function.
        "AdditiveAttention",
    }
)
#: Layers of several parts: the scope of a part's variables -> the attribute that holds the part.
PARTS: Mapping[object, Mapping[str, str]] = {
    "MultiHeadAttention": {
        "query": "query_dense",
        "key": "key_dense",
        "value": "value_dense",
        "attention_output": "output_dense",
    },
    "GroupedQueryAttention": {
        "query": "_query_dense",
        "key": "_key_dense",
        "value": "_value_dense",
        "attention_output": "_output_dense",
    },
}
#: Layers whose variables are those of the cell inside.
RECURRENT = frozenset({"LSTM", "GRU", "SimpleRNN", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D"})
#: The name under which Keras exports a class -> that of the class itself.
_EXPORTED = {"GroupQueryAttention": "GroupedQueryAttention"}
#: Cells that hold all of their variables themselves.
CELLS = frozenset({"LSTMCell", "GRUCell", "SimpleRNNCell"})
#: Models in one another.
DEEPEST = 32
#: Parts of a training configuration -> where their classes are.
_MODULES = {
    "loss": "keras.losses",
    "metrics": "keras.metrics",
    "weighted_metrics": "keras.metrics",
}
_TEXTS = frozenset({"model_config", "training_config", "keras_version", "backend"})


class Model(NamedTuple):
    """What an archive holds besides the values of tensors."""

    config: bytes  # config.json
    metadata: bytes  # metadata.json
    places: Mapping[str, str]  # name of each tensor -> its location in the weights file


class _Variable(NamedTuple):
    name: str  # of the tensor
    path: tuple[str, ...]  # the scopes in which Keras made it, and its own name


def read_model(table: Table, texts: Mapping[str, str]) -> Model:
    """Return what an archive of the same model holds.

    Args:
        table: of the `.h5` file.
        texts: of it.

    Raises:
        OutputError: says what cannot be converted, and what to do.
    """
    if not table.config:
        raise OutputError(
            "holds weights only, without the model that a .keras holds; name a .keras of the same "
            "model with --model, or keep the suffix"
        )
    for key in texts:
        if key not in _TEXTS:
            raise OutputError(f"'{shown(key)}' would be lost: a .keras has no place for it")
    places = place_tensors(table, texts)
    config = parse(texts["model_config"])
    # The layers in it are described in the older way, which Keras 3 reads in archives too.
    config |= MODELS[config["class_name"]]
    if texts.get("training_config"):
        config["compile_config"] = _convert_training(parse(texts["training_config"]))
    metadata = {"keras_version": texts["keras_version"]}
    return Model(json.dumps(config).encode(), json.dumps(metadata).encode(), places)


def place_tensors(table: Table, texts: Mapping[str, str]) -> dict[str, str]:
    """Return name of each tensor -> its location in a weights file of the same model.

    Args:
        table: of a whole ``.h5`` file.
        texts: of it.

    Raises:
        OutputError: names the layer whose tensors have no certain place, and what to do.
    """
    version = texts.get("keras_version", "")
    if not version.startswith("3."):
        raise OutputError(
            f"was written by Keras {shown(version, 20) or '1'}, whose configuration is not that of "
            f"Keras 3; {_WAY_OUT}"
        )
    try:
        config = parse(texts.get("model_config", ""))
        if str(config.get("class_name")) not in MODELS:
            raise OutputError(
                f"is a {shown(config.get('class_name'), 60)}, expected a Sequential or Functional "
                f"model; {_WAY_OUT}"
            )
        return dict(_place_layers(config, "", _list_held(table), 1))
    except RecursionError:
        raise OutputError("has a damaged configuration: it is nested without end") from None


def find_kind(layer: Mapping[str, Any]) -> str:
    """Return the class of a layer; "" for one that is not of Keras, whatever it is called."""
    module = layer.get("module", "keras")
    is_own = isinstance(module, str) and module.partition(".")[0] == "keras"
    name = str(layer.get("class_name"))
    return _EXPORTED.get(name, name) if is_own else ""


def name_class(layer: Mapping[str, Any]) -> str:
    """Return the class of a layer by which Keras names its group, whosever class it is."""
    name = str(layer.get("class_name")).rpartition(">")[2]
    return _EXPORTED.get(name, name) if find_kind(layer) else name


def is_plain(layer: Mapping[str, Any]) -> bool:
    """Return whether a layer has no more variables than its class says."""
    config = read_part(layer, "config")
    policy = str(read_part(config, "dtype").get("class_name"))
    # Both add variables, which are saved in an order of their own.
    return not config.get("lora_rank") and not policy.startswith("Quantized")


def parse(text: str) -> dict[str, Any]:
    """Return a configuration; refuse what is no JSON object."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OutputError(f"has a damaged configuration: {shown(error)}") from None
    if not isinstance(said, dict):
        raise OutputError("has a damaged configuration: it is not a JSON object")
    return said


def _convert_training(training: dict[str, Any]) -> dict[str, Any]:
    """Return the training configuration as archives have it, with the optimizer described alike."""
    said = dict(training)
    optimizer = said.pop("optimizer_config", None)
    for key, module in _MODULES.items():
        if key in said:
            said[key] = _name_modules(said[key], module)
    return {"optimizer": _name_modules(optimizer, "keras.optimizers"), **said}


def _name_modules(said: Any, module: str) -> Any:
    """Return losses or metrics with the module that archives name beside each class of Keras."""
    if isinstance(said, list):
        return [_name_modules(one, module) for one in said]
    if not isinstance(said, dict):
        return said
    if isinstance(said.get("class_name"), str) and "module" not in said:
        return _describe(said, module)
    return {key: _name_modules(one, module) for key, one in said.items()}


def _describe(said: Mapping[str, Any], module: str) -> dict[str, Any]:
    """Return the description of an object of Keras, or of a class that the user registered."""
    name = said["class_name"]
    own = name.rpartition(">")[2]
    is_own = own == name
    described = {"module": module if is_own else None, "registered_name": None if is_own else name}
    return {**said, **described, "class_name": own}


def _list_held(table: Table) -> dict[str, list[_Variable]]:
    """Return the variables of each layer in their order.

    Raises:
        OutputError: a layer has a name that Keras 3 does not give.
    """
    held: dict[str, list[_Variable]] = {}
    for layer in table.keras.layers:
        if "/" in layer:
            raise OutputError(f"has a layer with a slash in its name, '{shown(layer)}'; {_WAY_OUT}")
    for name in table.tensors:
        layer, *path = name.split("/")
        held.setdefault(layer, []).append(_Variable(name, tuple(path)))
    return held


def _place_layers(
    model: Mapping[str, Any], path: str, held: Mapping[str, Sequence[_Variable]], depth: int
) -> Iterator[tuple[str, str]]:
    """Yield name and location of the tensors of a model, whose layers are numbered by class."""
    if depth > DEEPEST:
        raise OutputError(f"has more than {DEEPEST} models in one another")
    counted: Counter[str] = Counter()
    left = dict(held)
    for layer in find_layers(model):
        group = f"{path}/layers/{number_group(to_snake_case(name_class(layer)), counted)}"
        # A Functional model keeps the name of a layer beside its configuration, too.
        variables = left.pop(str(read_part(layer, "config").get("name")), ())
        if variables:
            yield from _place_layer(layer, group, variables, depth)
    if left:
        raise OutputError(
            f"'{shown(next(iter(left)), 80)}' has tensors, but is no layer in its configuration; "
            f"{_WAY_OUT}"
        )


def _place_layer(
    layer: Mapping[str, Any], path: str, variables: Sequence[_Variable], depth: int
) -> Iterator[tuple[str, str]]:
    """Yield name and location of the tensors of one layer."""
    kind, config = find_kind(layer), read_part(layer, "config")
    inner = read_part(config, "layer")
    if kind in PLAIN and is_plain(layer):
        yield from _number(variables, path)
    elif kind in PARTS and is_plain(layer):
        homes = {scope: f"{path}/{part}" for scope, part in PARTS[kind].items()}
        yield from _place_parts(layer, homes, variables)
    elif kind in RECURRENT:
        yield from _number(variables, f"{path}/cell")
    elif kind == "RNN":
        yield from _place_cells(layer, f"{path}/cell", variables)
    elif kind == "TimeDistributed":
        yield from _place_layer(inner, f"{path}/layer", variables, depth + 1)
    elif kind == "Bidirectional" and str(inner.get("class_name")) in (*RECURRENT, "RNN"):
        backward = read_part(config, "backward_layer") or inner
        if len(variables) % 2 or backward.get("class_name") != inner.get("class_name"):
            raise _refuse(layer)
        half = len(variables) // 2
        yield from _place_layer(inner, f"{path}/forward_layer", variables[:half], depth + 1)
        yield from _place_layer(backward, f"{path}/backward_layer", variables[half:], depth + 1)
    elif kind in MODELS:
        yield from _place_layers(layer, path, _part(layer, variables), depth + 1)
    else:
        raise _refuse(layer)


def _number(variables: Sequence[_Variable], path: str) -> Iterator[tuple[str, str]]:
    for k, variable in enumerate(variables):
        yield variable.name, f"{path}/vars/{k}"


def _place_cells(
    layer: Mapping[str, Any], path: str, variables: Sequence[_Variable]
) -> Iterator[tuple[str, str]]:
    """Yield name and location of the tensors of one cell, or of several on one another."""
    cell = read_part(read_part(layer, "config"), "cell")
    stacked = read_part(cell, "config").get("cells")
    is_stack = cell.get("class_name") == "StackedRNNCells" and isinstance(stacked, list)
    cells = stacked if is_stack and stacked else [cell]
    kinds = [str(one.get("class_name")) if isinstance(one, dict) else "" for one in cells]
    if not CELLS.issuperset(kinds):
        raise _refuse(layer)
    if not is_stack:
        yield from _number(variables, path)
        return
    counted: Counter[str] = Counter()
    homes = {
        str(read_part(one, "config").get("name")): (
            f"{path}/cells/{number_group(to_snake_case(kind), counted)}"
        )
        for one, kind in zip(cells, kinds, strict=True)
    }
    if len(homes) < len(cells):  # two of one name
        raise _refuse(layer)
    yield from _place_parts(layer, homes, variables)


def _place_parts(
    layer: Mapping[str, Any], homes: Mapping[str, str], variables: Sequence[_Variable]
) -> Iterator[tuple[str, str]]:
    """Yield name and location of the tensors of a layer whose parts hold them.

    Args:
        layer: for a refusal.
        homes: the scope of a part's variables -> where the part is saved.
        variables: of the layer; those of one part are in their order.
    """
    parts: dict[str, list[_Variable]] = {scope: [] for scope in homes}
    for variable in variables:
        scope = variable.path[-2] if len(variable.path) > 1 else ""
        if scope not in parts:
            raise _refuse(layer)
        parts[scope].append(variable)
    for scope, held in parts.items():
        yield from _number(held, homes[scope])


def _part(
    model: Mapping[str, Any], variables: Sequence[_Variable]
) -> Mapping[str, Sequence[_Variable]]:
    """Return the variables of each layer of an inner model.

    The file lists those that are trained before the others, so only their paths tell the layers.
    """
    names = {str(read_part(layer, "config").get("name")) for layer in find_layers(model)}
    parts: dict[str, list[_Variable]] = defaultdict(list)
    for variable in variables:
        # Models that were built before they became part of this one are the outermost scope.
        found = [scope for scope in variable.path[:-1] if scope in names]
        if len(found) != 1:
            raise _refuse(model)
        parts[found[0]].append(variable)
    return parts


def _refuse(layer: Mapping[str, Any]) -> OutputError:
    config = read_part(layer, "config")
    return OutputError(
        f"has the layer '{shown(config.get('name'), 60)}' of class "
        f"{shown(layer.get('class_name'), 60)}, whose place for each tensor in a .keras is not "
        f"known for certain; {_WAY_OUT}"
    )
