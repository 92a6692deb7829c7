"""Match EMA slots with tensors in a `.keras` archive, which gives both of them numbers only.

Keras keeps the EMAs in the order of the trainable variables.  For models that are made of Keras's
own layers that order follows from the configuration; anything else is refused, since two tensors of
one shape that are mixed up would go unseen.  Builds nothing and reads no file.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from polyak_cli.errors import FormatError, shown
from polyak_cli.formats.keras.names import sort_key
from polyak_cli.formats.keras.outline import number_group, to_snake_case

#: Slots that an optimizer keeps of each variable by default, and settings that add another one.
_KEPT = {
    "SGD": 0,
    "RMSprop": 1,
    "Adam": 2,
    "AdamW": 2,
    "Adamax": 2,
    "Adagrad": 1,
    "Adadelta": 2,
    "Lion": 1,
    "Lamb": 2,
    "Ftrl": 2,
}
_CONFIG = "config.json"
_MORE = ("momentum", "amsgrad", "centered", "gradient_accumulation_steps")
#: What a layer of Keras has below itself, in the order in which it lists their variables.
_INNER = (
    *("cell", "layer", "forward_layer", "backward_layer"),
    *("query_dense", "key_dense", "value_dense", "output_dense"),
)

Shapes = Mapping[str, Sequence[int]]


class _Tree(NamedTuple):
    """The model's tensors: group -> the paths in it; and the names of layers."""

    below: Mapping[str, Sequence[str]]
    labels: Mapping[str, str]


def find_slots(
    config: Mapping[str, Any],
    own: Shapes,
    state: Shapes,
    labels: Mapping[str, str],
    version: str = "",
) -> dict[str, list[str]]:
    """Return each EMA slot with the tensor that it belongs to.

    Args:
        config: of the archive.
        own: location -> shape of the model's tensors.
        state: the same of the optimizer's.
        labels: group of variables -> the name of its layer, which only newer files have.
        version: of Keras, where the archive says it.

    Raises:
        FormatError: there is none, or the match is not certain.
    """
    # Both lists are in Keras's order, so that the n-th slot belongs to the n-th trained tensor;
    # shapes that differ anywhere show that the order was not understood.
    emas = _find_emas(config, state, version)
    trained = list(_list_trained(config, "", _Tree(_group_paths(own), labels)))
    if [state[place] for place in emas] != [own[place] for place in trained]:
        raise FormatError(
            f"the EMAs of its optimizer ({len(emas)} tensors) do not match the trained tensors in "
            f"its configuration ({len(trained)})"
        )
    return {slot: [place] for slot, place in zip(emas, trained, strict=True)}


def _find_emas(config: Mapping[str, Any], state: Shapes, version: str) -> list[str]:
    """Return the EMA slots: behind the iteration and the learning rate, before all others."""
    compiled = _read_part(config, "compile_config")
    optimizer = _read_part(compiled, "optimizer")
    # Saving as .h5 takes the optimizer out of the configuration that a later .keras is given
    # (keras/src/legacy/saving/saving_utils.py, model_metadata), while its variables stay.
    if (
        compiled
        and "optimizer" not in compiled
        and any(place.startswith("/optimizer/") for place in state)
    ):
        raise FormatError(
            f"it has an optimizer's variables, but its {_CONFIG} does not describe the optimizer, "
            "so it is unknown which of them are EMAs. Keras leaves the description out if the "
            "same model was saved as .h5 before: use those .h5 files, or save only .keras files"
        )
    if optimizer.get("class_name") == "LossScaleOptimizer":
        optimizer = _read_part(_read_part(optimizer, "config"), "inner_optimizer")
    settings, kind = _read_part(optimizer, "config"), optimizer.get("class_name")
    if settings.get("use_ema") is not True:
        raise FormatError("the run was not trained with use_ema=True and saved whole")
    if not isinstance(kind, str) or kind not in _KEPT or not _is_kerases(optimizer):
        raise FormatError(
            f"its optimizer {shown(kind, 40)} is unknown, and so is the number of its slots"
        )
    # Under mixed_float16, Keras wraps the optimizer in one that scales the loss, and the
    # configuration does not say so.
    scaled = [place for place in state if place.startswith("/optimizer/inner_optimizer/vars/")]
    plain = [place for place in state if place.startswith("/optimizer/vars/")]
    places = sorted(scaled or plain, key=sort_key)
    # A schedule is no variable, and tf_keras does not count the learning rate among them.
    is_rate_saved = not isinstance(settings.get("learning_rate"), dict)
    first = 2 if is_rate_saved and not version.startswith("2.") else 1
    each = 1 + _KEPT[kind] + sum(bool(settings.get(key)) for key in _MORE)
    count, rest = divmod(len(places) - first, each)
    if count < 1 or rest:
        raise FormatError(
            f"its optimizer {shown(kind)} has {len(places)} variables; expected {first} and "
            f"{each} for each trained tensor"
        )
    return places[first : first + count]


def _group_paths(own: Shapes) -> dict[str, list[str]]:
    """Return the paths in each group, sorted by number."""
    below: dict[str, dict[str, None]] = defaultdict(dict)
    for place in sorted(own, key=sort_key):
        # A path is entered in all groups above it; a dictionary keeps the first order.
        while place:
            home = place.rpartition("/")[0]
            below[home][place] = None
            place = home
    return {home: list(held) for home, held in below.items()}


def _list_trained(layer: Mapping[str, Any], path: str, tree: _Tree) -> Iterator[str]:
    """Yield the trainable tensors of a layer or model, in the order in which Keras lists them."""
    config, kind = _read_part(layer, "config"), layer.get("class_name")
    if path not in tree.below:
        return
    # The optimizer has no slots for a frozen layer, nor for anything below it.
    if config.get("trainable") is False:
        return
    if not _is_kerases(layer):
        raise FormatError(f"the order of the variables of '{shown(kind, 40)}' is unknown")
    if tree.labels.get(f"{path}/vars", "") not in ("", config.get("name")):
        raise FormatError(
            f"'{shown(path)}' does not belong to the layer that its configuration has in that place"
        )
    if kind in ("Sequential", "Functional"):
        yield from _list_of_layers(config, path, tree)
    elif kind == "BatchNormalization":
        # gamma and beta come before the moving statistics, which no optimizer trains.
        trained = bool(config.get("scale", True)) + bool(config.get("center", True))
        yield from tree.below.get(f"{path}/vars", ())[:trained]
    elif kind != "Normalization":
        yield from _list_of_layer(path, tree)


def _list_of_layers(config: Mapping[str, Any], path: str, tree: _Tree) -> Iterator[str]:
    """Yield the tensors of a model, whose layers have numbered names of their classes."""
    layers = config.get("layers")
    if tree.below[path] != [f"{path}/layers"] or not isinstance(layers, list):
        raise FormatError(f"the model '{shown(config.get('name'), 40)}' has tensors of its own")
    counted: Counter[str] = Counter()
    for layer in layers:
        if not isinstance(layer, dict) or not isinstance(layer.get("class_name"), str):
            raise FormatError("its configuration is damaged: it has a layer without a class")
        group = number_group(to_snake_case(layer["class_name"]), counted)
        yield from _list_trained(layer, f"{path}/layers/{group}", tree)


def _list_of_layer(path: str, tree: _Tree) -> Iterator[str]:
    """Yield all tensors of a layer: its own, or those of its sublayers."""
    held = {place.rpartition("/")[2]: place for place in tree.below[path]}
    if held.keys() == {"vars"}:
        yield from tree.below[held["vars"]]
        return
    if held.keys() - {*_INNER}:
        raise FormatError(f"the order of the variables in '{shown(path)}' is unknown")
    for name in _INNER:
        if name in held:
            yield from _list_of_layer(held[name], tree)


def _read_part(said: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return an object in a configuration, or an empty one."""
    found = said.get(key)
    return found if isinstance(found, dict) else {}


def _is_kerases(said: Mapping[str, Any]) -> bool:
    """Return whether a layer, model or optimizer is one that Keras brings."""
    return str(said.get("module")).partition(".")[0] == "keras"
