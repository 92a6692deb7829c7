"""Scan HDF5 files that Keras writes: whole models of every generation, and weights files.

Finds the tensors by the names that Keras lists, and executes nothing of the model configuration.
Does not know how values are stored; see `datasets`.  Runs in a child of `processes.sandbox`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from h5py import h5a, h5d, h5g, h5t

from polyak_cli.errors import FormatError, OutputError, shown
from polyak_cli.formats import conversion
from polyak_cli.formats.format import Draft, Format, ScanRequest, SkeletonRequest
from polyak_cli.formats.hdf5 import skeleton, weights_files
from polyak_cli.formats.hdf5.datasets import Describer
from polyak_cli.formats.hdf5.library import (
    Place,
    check_attributes,
    is_never_written,
    list_links,
    list_names,
    open_child,
    open_file,
    open_path,
    quote,
    read_strings,
    read_text,
    to_bytes,
    to_text,
    walk,
)
from polyak_cli.formats.hdf5.skeleton import PROVENANCE
from polyak_cli.formats.hdf5.windows import Window
from polyak_cli.formats.keras import from_models, to_models, vocabularies
from polyak_cli.formats.keras import names as keras_names
from polyak_cli.formats.keras.names import DTYPE, OPTIMIZER, WEIGHTS_SUFFIX
from polyak_cli.formats.keras.outline import read_outline
from polyak_cli.processes.sandbox import Heartbeat
from polyak_cli.storage import File
from polyak_cli.storage.local import LocalOutput
from polyak_cli.tensors import Asset, KerasFacts, OutputRules, Table, TensorSpec

WHOLE_CAUTIONS = {
    "bfloat16": "Keras cannot load bfloat16 from an .h5 file; use --dtype float32 for a file that "
    "Keras can load",
    "optimizer": "the optimizer state is that of the newest checkpoint: its momentum does not "
    "belong to averaged values, and Keras cannot continue fit() from an .h5 model with optimizer "
    "state",
}
WEIGHTS_CAUTIONS = {
    "optimizer": "the optimizer state is that of the newest checkpoint: its momentum does not "
    "belong to averaged values",
    "ema": "a weights file only numbers the optimizer's variables and does not say which are EMA "
    "slots; save whole models with model.save()",
}
#: Attributes that list tensors and their types.  A conversion does not carry them: every format has
#: its own way to list tensors.
_LISTS = re.compile(
    rb".*@(layer_names|weight_names)\d*|@polyak_provenance|.*/vars@name|.*/\d+@dtype", re.DOTALL
)
#: Where weights that belong to no layer are listed, after all layers.
_OWN = b"top_level_model_weights"
#: Versions of Keras that always save that group.
_TOP_LEVEL = re.compile(rb"3\.|2\.(1[3-9]|[2-9]\d)\.")
_UNFINISHED = "the file was not saved completely; save it again or leave it out"


def is_polyak_output(path: Place, heartbeat: Heartbeat) -> bool:
    """Return whether this tool wrote the file; False if it cannot be read."""
    heartbeat()
    try:
        with open_file(path) as (root, _):
            return bool(h5a.exists(root, PROVENANCE))
    except FormatError:
        return False


def read_description(path: str, heartbeat: Heartbeat) -> list[str]:
    """Return the model configuration, the training configuration and the version of Keras."""
    heartbeat()
    with open_file(path) as (root, _):
        keys = (b"model_config", b"training_config", b"keras_version")
        return [read_text(root, key).decode(errors="replace") for key in keys]


def read_texts(path: Place, heartbeat: Heartbeat) -> dict[str, str]:
    """Return the text attributes of a file, except those that only list tensors."""
    said: dict[str, str] = {}
    with open_file(path) as (root, _):
        below = ((where, item) for where, _, item in walk(root, heartbeat, {OPTIMIZER}))
        for where, item in (("", root), *below):
            for k in range(h5a.get_num_attrs(item)):
                attribute = h5a.open(item, index=k)
                if _LISTS.fullmatch(b"%b@%b" % (to_bytes(where), attribute.name)):
                    continue
                name = to_text(attribute.name)
                if not isinstance(attribute.get_type(), h5t.TypeStringID) or attribute.shape != ():
                    raise OutputError(
                        f"the attribute '{shown(name)}' of '{shown(where or '/')}' is not a "
                        "string and would be lost"
                    )
                text = to_text(read_text(item, attribute.name))
                if said.get(name) != text:  # Keras repeats some in /model_weights
                    said[f"{where[1:]}/{name}" if where else name] = text
    return said


def _find_vocabularies(config: bytes) -> dict[str, Asset]:
    """Return the vocabularies in a model configuration; one that is no JSON has none."""
    try:
        found, _ = vocabularies.find_in_configuration(json.loads(config))
    except (ValueError, RecursionError):  # Keras alone has to make sense of it
        return {}
    return {f"model_config/{name}": asset for name, asset in found.items()}


def _read_about(root: Any) -> dict[str, str]:
    """Return the short texts by which a file describes itself."""
    keys = {"keras_version": b"keras_version", "backend": b"backend", "provenance": PROVENANCE}
    texts = {name: read_text(root, key) for name, key in keys.items()}
    return {name: text.decode(errors="replace") for name, text in texts.items() if text}


def _find_model_group(root: Any, heartbeat: Heartbeat) -> Any:
    """Return the group that lists the layers; None for a weights file, which has no lists."""
    if _list_parts(root, b"layer_names"):
        return root  # legacy weights-only files have the same layout one level up
    links = [link for link in list_links(root, heartbeat) if link.name == b"model_weights"]
    return open_child(root, links[0], "") if links else None


def _describe_content(root: Any, heartbeat: Heartbeat) -> str:
    names = list_names(root, heartbeat)
    if {b"vars", b"layers", b"_layer_checkpoint_dependencies"} & {*names}:
        return "is a Keras weights file that holds no tensor of a model"
    held = ", ".join(shown(to_text(name), 40) for name in names[:5]) or "nothing"
    return f"holds no Keras model: expected the group 'model_weights', found {held}"


class Weights(NamedTuple):
    """What a weights file holds, or a part of one."""

    tensors: list[TensorSpec]  # in the order of the file
    others: list[TensorSpec]
    labels: dict[str, str]  # group -> the name of its layer
    is_polyak_output: bool
    about: Mapping[str, str]


def read_weights(
    path: Place, heartbeat: Heartbeat, *, with_optimizer: bool, number: int = 0
) -> Weights:
    """Read a weights file, or a part of one; `build_weights_table` makes a table of it.

    Args:
        path: of the file.
        heartbeat: sent before every object.
        with_optimizer: also note the datasets that are not the model's.
        number: of the file in the table.

    Raises:
        FormatError: the file is damaged or hostile; names file and tensor.
    """
    with open_file(path) as (root, size):
        return _read_weights(root, Describer(size, heartbeat, number), with_optimizer)


def _read_weights(root: Any, datasets: Describer, with_optimizer: bool) -> Weights:
    reader = _Reader(datasets, datasets.heartbeat)
    return Weights(
        reader.read_weights(root, with_optimizer),
        reader.others,
        reader.labels,
        bool(h5a.exists(root, PROVENANCE)),
        _read_about(root) if with_optimizer else {},
    )


def build_weights_table(form: str, path: str, found: Weights, files: Sequence[File] = ()) -> Table:
    """Return the table of a weights file.

    Args:
        form: the key of its format.
        path: of the checkpoint.
        found: in all its files.
        files: where there are several.
    """
    specs = {spec.location: spec for spec in found.tensors}
    aside = keras_names.find_optimizers(
        {at: (spec.dtype, spec.shape) for at, spec in specs.items()}
    )
    groups = tuple(f"{group}/" for group in aside)
    own = sorted((at for at in specs if not at.startswith(groups)), key=keras_names.sort_key)
    others = {spec.name: spec for spec in found.others}
    others |= {at: replace(s, name=at) for at, s in specs.items() if at.startswith(groups)}
    moving = keras_names.find_statistics(own, found.labels)
    # The label of the model itself says nothing of its layers.
    labels = {group.removesuffix("/vars"): name for group, name in found.labels.items() if name}
    labels = {g: name for g, name in labels.items() if g and not f"{g}/".startswith(groups)}
    return Table(
        path=Path(path),
        format=form,
        files=tuple(files),
        tensors={specs[at].name: specs[at] for at in own},
        others=others,
        optimizer=frozenset(name for name in others if name.startswith(("/optimizer/", *groups))),
        config="",
        is_polyak_output=found.is_polyak_output,
        about=found.about,
        keras=KerasFacts(
            statistics=frozenset(specs[at].name for at in moving),
            labels={g: name for g, name in labels.items() if not keras_names.is_aside(f"{g}/")},
        ),
        rules=OutputRules((WEIGHTS_SUFFIX,), WEIGHTS_CAUTIONS),
    )


@dataclass(slots=True)
class _Reader:
    """Walks one file and describes its tensors."""

    datasets: Describer
    heartbeat: Heartbeat
    others: list[TensorSpec] = field(default_factory=list)  # datasets that are not the model's own
    layers: list[str] = field(default_factory=list)  # with tensors, in Keras's order
    variables: dict[str, str] = field(default_factory=dict)  # of a model: tensor -> variable's path
    labels: dict[str, str] = field(default_factory=dict)  # of weights: group -> layer's name

    def read_model(self, root: Any, home: Any, everything: bool) -> list[TensorSpec]:
        """Return the model's tensors in the order in which Keras lists them.

        Args:
            root: of the file.
            home: the group that lists the layers.
            everything: walk the whole file, and note the other datasets too.
        """
        base = "" if home is root else "/model_weights"
        layers = _read_names(home, b"layer_names", base or "/")
        if not isinstance(home, h5g.GroupID):
            raise FormatError(f"{quote(base)} is not a group")
        if home.links.exists(_OWN):
            layers.append(_OWN)
        _refuse_twice(layers, "layer", base or "/")
        places = {f"{base}/{to_text(layer)}": layer for layer in layers}
        listed: dict[str, list[str]] = {}  # place of a layer -> places of its tensors
        specs: dict[str, TensorSpec] = {}
        known: set[str] = set()
        if everything:
            check_attributes(root, "/")
        found = walk(root, self.heartbeat) if everything else walk(home, self.heartbeat, where=base)
        for path, _, item in found:
            if path in places:
                listed[path] = _list_tensors(item, path, places[path])
                known.update(listed[path])
            if everything:
                check_attributes(item, path)
            if path in known:
                specs[path] = self.datasets.describe(item, path[len(base) + 1 :], path)
            elif everything:
                self._note_other(item, path)
        tensors = []
        for place, layer in self.heartbeat.over(places.items()):
            for tensor in self.list_layer(listed, place, layer):
                if tensor not in specs:
                    raise FormatError(
                        f"tensor {quote(tensor[len(base) + 1 :])} is named but does not exist in "
                        "the file"
                    )
                tensors.append(specs[tensor])
                self.variables[specs[tensor].name] = tensor[len(place) + 1 :]
        return tensors

    def list_layer(self, listed: Mapping[str, list[str]], place: str, layer: bytes) -> list[str]:
        """Return the paths of a layer's tensors; refuse a layer without a group."""
        _check_name(layer, to_text(layer))
        if place not in listed:
            raise FormatError(f"{quote(place)} is named but does not exist in the file")
        if listed[place]:
            self.layers.append(to_text(layer))
        return listed[place]

    def read_weights(self, root: Any, everything: bool) -> list[TensorSpec]:
        """Return the tensors of a weights file, which lists none of them."""
        specs = []
        if everything:
            check_attributes(root, "/")
        for path, _, item in walk(root, self.heartbeat, () if everything else keras_names.ASIDE):
            if everything:
                check_attributes(item, path)
            if isinstance(item, h5d.DatasetID) and keras_names.is_variable(path):
                # Two bare bytes are bfloat16, unless Keras names another type.
                spec = self.datasets.describe(item, path.removeprefix("/"), path)
                if spec.dtype == "bfloat16" and read_text(item, DTYPE) not in (b"", b"bfloat16"):
                    spec = replace(spec, dtype="opaque")
                specs.append(spec)
            elif everything:
                self._note_other(item, path)
            if isinstance(item, h5g.GroupID) and path.endswith("/vars"):
                self.labels[path] = read_text(item, b"name").decode(errors="replace")
        return specs

    def _note_other(self, item: Any, path: str) -> None:
        """Note a dataset that is not the model's, such as optimizer state."""
        if isinstance(item, h5d.DatasetID):
            self.others.append(self.datasets.describe_copied(item, path))


def _list_tensors(group: Any, place: str, layer: bytes) -> list[str]:
    """Return the paths of the tensors that a layer's group lists."""
    if not isinstance(group, h5g.GroupID):
        raise FormatError(f"{quote(place)} is not a group")
    names = _read_names(group, b"weight_names", place)
    _refuse_twice(names, "weight", to_text(layer))
    for name in names:
        _check_name(name, f"{to_text(layer)}/{to_text(name)}")
    return [f"{place}/{to_text(name)}" for name in names]


def _check_name(name: bytes, what: str) -> None:
    if any(part in (b"", b".", b"..") for part in name.split(b"/")):
        raise FormatError(f"the name {quote(what)} is empty, absolute or relative")


def _refuse_twice(names: Sequence[bytes], what: str, where: str) -> None:
    ((often, times),) = Counter(names).most_common(1) or [(b"", 1)]
    if times > 1:
        raise FormatError(f"the {what} {quote(to_text(often))} is listed twice in {quote(where)}")


def _read_names(location: Any, key: bytes, where: str) -> list[bytes]:
    """Return a list of names, which Keras splits (key0, key1, ...) when it is over 64 KB.

    Keras itself stops at the first part that is missing, and would load the model without the rest.
    """
    parts = _list_parts(location, key)
    if not parts:
        raise FormatError(f"{quote(where)} has no list {quote(to_text(key))} of its content")
    if parts == [b""]:
        return read_strings(location, key, where)
    if parts != [b"%d" % k for k in range(len(parts))]:
        found = ", ".join(quote(to_text(key + part)) for part in parts[:5])
        raise FormatError(
            f"the list {quote(to_text(key))} of {quote(where)} is incomplete: it has "
            f"{found}{', ...' * (len(parts) > 5)}; expected one list, or all its parts from 0 on"
        )
    return [name for part in parts for name in read_strings(location, key + part, where)]


def _list_parts(location: Any, key: bytes) -> list[bytes]:
    """Return the suffixes of the attributes that hold a list: b"", or b"0", b"1", ..."""
    if h5a.get_num_attrs(location) == 1 and h5a.exists(location, key):
        return [b""]  # the usual case, which 100,000 layers may have
    names = [h5a.open(location, index=k).name for k in range(h5a.get_num_attrs(location))]
    parts = [name[len(key) :] for name in names if name.startswith(key)]
    return sorted((part for part in parts if not part or part.isdigit()), key=_by_number)


def _by_number(part: bytes) -> tuple[int, bytes]:
    return len(part), part


def _check_saved_to_its_end(root: Any, home: Any) -> None:
    """Refuse a whole model whose save failed before its end.

    Keras writes all layers, then the weights of the model itself, then the names of the optimizer's
    tensors, then these tensors in their order.  A file that ends before the optimizer cannot be
    recognised: it looks like one that was saved without.
    """
    if _TOP_LEVEL.match(read_text(home, b"keras_version")) and not home.links.exists(_OWN):
        raise FormatError(f"has no group {quote(to_text(_OWN))}; {_UNFINISHED}")
    group = to_bytes(OPTIMIZER[1:])
    # Legacy weights-only files have no optimizer state.
    if home is root or not root.links.exists(group):
        return
    optimizer = open_path(root, group, "")
    if not isinstance(optimizer, h5g.GroupID):
        return
    if not _list_parts(optimizer, b"weight_names"):
        raise FormatError(f"has no list of its optimizer's tensors; {_UNFINISHED}")
    names = _read_names(optimizer, b"weight_names", OPTIMIZER)
    # The tensors are written in the order of the list, so the last one stands for all of them.
    if names:
        last = open_path(optimizer, names[-1], OPTIMIZER)
        if last is None or is_never_written(last):
            name = quote(f"{OPTIMIZER}/{to_text(names[-1])}")
            raise FormatError(f"tensor {name} is named but was not saved; {_UNFINISHED}")


def _build(
    request: SkeletonRequest,
    places: Mapping[str, str],
    heartbeat: Heartbeat,
    said: Mapping[str, Mapping[str, str | Sequence[str]]],
) -> Draft:
    """Write a file with the tensors of another at places of its own; see `weights_files.build`."""
    template = request.template
    with (
        conversion.Carrier(template, heartbeat) as carrier,
        LocalOutput(request.output) as output,
    ):
        target = Window(request.output, output.fileno(), 0)
        made = weights_files.build(request, places, target, heartbeat, said)
        for name, start in made.carried.items():
            carrier.carry(template.tensors[name], output, start)
    return Draft(made.placements)


class KerasHdf5(Format):
    """HDF5 files of every Keras generation."""

    key = "hdf5"
    is_scattered = True
    name = "Keras HDF5"
    # What Keras opens as HDF5: it goes by the suffix, and is case-sensitive.
    suffixes = (".h5", ".hdf5")
    keras_layout = "layers"
    recalculation = keras_names.RECALCULATION
    weights_suffix = WEIGHTS_SUFFIX
    can_be_left = True
    inner = "hdf5"
    conversion_suffix = ".h5"
    converts_from = frozenset({"keras_zip"})

    def texts(self, table: Table, heartbeat: Heartbeat) -> dict[str, str]:
        """See `Format.texts`."""
        return read_texts(table.files[0].path, heartbeat)

    def scan(self, request: ScanRequest, heartbeat: Heartbeat) -> Table:
        """See `Format.scan`.

        Raises:
            FormatError: the file is damaged, hostile, or holds no Keras model.
        """
        with open_file(request.path) as (root, size):
            datasets = Describer(size, heartbeat)
            home = _find_model_group(root, heartbeat)
            if home is None:
                found = _read_weights(root, datasets, request.with_optimizer)
                if not found.tensors:
                    raise FormatError(_describe_content(root, heartbeat))
                return build_weights_table(self.key, request.path, found)
            return self._scan_model(request, root, home, datasets)

    def _scan_model(self, request: ScanRequest, root: Any, home: Any, datasets: Describer) -> Table:
        """Return the table of a file that lists its layers in the group ``home``."""
        reader = _Reader(datasets, datasets.heartbeat)
        tensors = {
            spec.name: spec for spec in reader.read_model(root, home, request.with_optimizer)
        }
        _check_saved_to_its_end(root, home)
        others = {spec.name: spec for spec in reader.others}
        state = [name for name in others if name.startswith(f"{OPTIMIZER}/")]
        # Digested as bytes; only names and classes of layers are read, as it may name any code.
        config = read_text(root, b"model_config")
        slots = keras_names.find_slots(reader.variables, state)
        return Table(
            path=Path(request.path),
            format=self.key,
            files=(),
            tensors=tensors,
            others=others,
            optimizer=frozenset(state),
            config=hashlib.sha256(config).hexdigest() if config else "",
            is_polyak_output=bool(h5a.exists(root, PROVENANCE)),
            about=_read_about(root) if request.with_optimizer else {},
            keras=KerasFacts(tuple(reader.layers), ema_slots=slots, outline=read_outline(config)),
            rules=OutputRules(cautions=WHOLE_CAUTIONS),
            assets=_find_vocabularies(config),
        )

    def write_skeleton(self, request: SkeletonRequest, heartbeat: Heartbeat) -> Draft:
        """See `Format.write_skeleton`."""
        return skeleton.write_skeleton(request, heartbeat)

    def extract(self, request: SkeletonRequest, heartbeat: Heartbeat) -> Draft:
        """See `Format.extract`: each tensor where Keras looks for it in a ``.weights.h5``."""
        template = request.template
        places = from_models.place_tensors(template, self.texts(template, heartbeat))
        return _build(request, places, heartbeat, {})

    def refuse_extraction(self, request: SkeletonRequest, heartbeat: Heartbeat) -> None:
        """See `Format.refuse_extraction`."""
        conversion.refuse_losses(request)
        from_models.place_tensors(request.template, self.texts(request.template, heartbeat))

    def refuse_conversion(self, request: SkeletonRequest, texts: Mapping[str, str]) -> None:
        """See `Format.refuse_conversion`."""
        to_models.read_model(request.template, texts)
        for spec in request.template.tensors.values():
            if request.averaged.get(spec.location, spec.dtype) == "bfloat16":
                raise OutputError(
                    f"tensor '{shown(spec.name)}' is bfloat16, which Keras cannot load from an "
                    ".h5; use --dtype float32, or keep .keras"
                )

    def convert(
        self, request: SkeletonRequest, texts: Mapping[str, str], heartbeat: Heartbeat
    ) -> Draft:
        """See `Format.convert`: an archive becomes the same whole model in HDF5."""
        model = to_models.read_model(request.template, texts)
        base, last = "/model_weights", to_text(_OWN)
        said: dict[str, dict[str, str | list[str]]] = {
            "": {**model.texts},
            base: {"layer_names": [*model.layers], "keras_version": model.texts["keras_version"]},
            f"{base}/{last}": {"weight_names": []},
        }
        said |= {f"{base}/{name}": {"weight_names": [*own]} for name, own in model.layers.items()}
        places = {
            tensor: f"{base}/{layer}/{name}"
            for layer, own in model.layers.items()
            for name, tensor in own.items()
        }
        return _build(request, places, heartbeat, said)

    def is_polyak_output(self, path: str, heartbeat: Heartbeat) -> bool:
        """See `Format.is_polyak_output`."""
        return is_polyak_output(path, heartbeat)
