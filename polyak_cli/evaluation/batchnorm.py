"""Run a model over rows to gather the moving statistics of its BatchNorm layers.

This is "bn_update" of Izmailov et al., "Averaging weights leads to wider optima and better
generalization", 2018.  Only BatchNorm normalises as in training, by the moments of the batch.
Everything else runs as in inference: dropout and noise are off, except where a model calls a layer
with ``training=True`` in every mode.

Each statistic becomes the mean, in float64, of the values that the layer itself computes for each
batch, weighted by the rows.  For batches of equal size this is the result of Keras with momentum
k / (k + 1) in batch k = 0, 1, ...  A variance is over the rows of a batch, as in Keras, without the
factor n / (n - 1).

Layers that normalise by their statistics in training, too, keep them: trainable=False, or called
with training=False by a layer or model of the user.  PyTorch's ``update_bn`` changes them.  To such
layers the statistics are constants, and everything else was trained with them.

This module only computes the statistics; `recalibration` writes them into a file, and the callback
of stochastic weight averaging into the model that was trained.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polyak_cli.errors import MismatchError, PolyakError, UsageError, list_some, shown
from polyak_cli.evaluation import data
from polyak_cli.evaluation.architectures import Architecture
from polyak_cli.evaluation.keras_files import (
    Description,
    check_model,
    check_suffix,
    check_weights_name,
    collect_warnings,
    import_keras,
    name_writer,
    reword_keras_errors,
)
from polyak_cli.evaluation.labels import fit_features
from polyak_cli.evaluation.quiet import silence_frameworks
from polyak_cli.formats.catalogue import find_format
from polyak_cli.formats.keras.names import WEIGHTS_SUFFIX
from polyak_cli.storage import mirrors
from polyak_cli.tensors import Float64, Table

#: The newest Keras whose way of saving an archive `_trace_archive` was tested with.
LATEST_TRACED = (3, 15)


@dataclass(frozen=True, slots=True)
class Moments:
    """The moving statistics of the BatchNorm layers of a model.

    Attributes:
        before: location in the file -> the values that Keras loaded.
        after: location in the file -> the mean over all rows.
        layers: the number of layers that they belong to.
        batches: the number of batches.
        notes: messages for the user, one line each.
    """

    before: Mapping[str, data.Array]
    after: Mapping[str, Float64]
    layers: int
    batches: int
    notes: tuple[str, ...]


def gather_moments(
    table: Table,
    rows: data.Split,
    *,
    batch_size: int,
    trust_code: bool = False,
    architecture: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Moments:
    """Run a model once over rows, and gather the statistics of its BatchNorm layers.

    The rows are shuffled, always in the same order, because files are often sorted by class.  The
    sizes of batches differ by one at most.  A layer that is called several times counts each call.

    Args:
        table: table of the file, as `formats.scan` returns it ``with_optimizer``.
        rows: features, one array (rows, ...) for each input of the model.
        batch_size: the largest number of rows in a batch.
        trust_code: run the code that a file carries in a Lambda layer.
        architecture: the model of a file that holds weights only, as for `Architecture`.
        progress: called after each batch with the number of batches done, and that of all.

    Raises:
        MissingExtraError: Keras or its back end is not installed.
        FormatError: the file holds no architecture.
        MismatchError: the rows do not fit the model, or it has no statistics to gather.
        PolyakError: Keras is too old, or cannot load or run the model, or the model carries code.
    """
    path = table.path
    with silence_frameworks() as held_back, collect_warnings() as warned:
        keras, model, layers = _load_model(table, trust_code, architecture, held_back)
        stored = locate_variables(model, table)
        recorders = _make_recorders(path, layers, keras)
        rows = fit_rows(path, model, rows)
        before = _locate_values(path, recorders, stored)
        with reword_keras_errors(path, f"cannot run it on {rows.source}", held_back):
            batches = _run_model(keras, model, recorders, rows, batch_size, progress)
    fetched = mirrors.describe_fetched(table.files[0].path)
    notes = (*_note_unchanged(path, recorders), *warned, *fetched)
    chosen = [one for one in recorders if one.rows]
    after = {
        location: total / one.rows
        for one in chosen
        for total, statistic in zip(one.sums, one.statistics, strict=True)
        for location in stored[id(statistic)]
    }
    return Moments({k: before[k] for k in after}, after, len(chosen), batches, notes)


def gather_in_memory(
    model: Any, rows: data.Split, *, batch_size: int
) -> tuple[list[tuple[Any, Float64]], tuple[str, ...]]:
    """Run a model that is in memory once over rows, as `gather_moments` does that of a file.

    The model stays as it is.

    Returns:
        Each statistic, a variable of Keras, with its new value; and messages for the user.

    Raises:
        MismatchError: as for `gather_moments`.
        PolyakError: Keras cannot run the model.
    """
    import keras

    path = Path(model.name)
    recorders = _make_recorders(path, model._flatten_layers(), keras)
    rows = fit_rows(path, model, rows)
    try:
        with reword_keras_errors(path, f"cannot run it on {rows.source}", lambda: ""):
            _run_model(keras, model, recorders, rows, batch_size)
    finally:
        for one in recorders:
            one.restore()
    notes = tuple(_note_unchanged(path, recorders))
    found = [
        (statistic, total / one.rows)
        for one in recorders
        if one.rows
        for total, statistic in zip(one.sums, one.statistics, strict=True)
    ]
    return found, notes


def check_rows(rows: data.Split, batch_size: int) -> None:
    """Refuse rows that have no variance.

    Raises:
        UsageError: the batch size is out of range.
        MismatchError: there is only one row.
    """
    if batch_size < 2:
        raise UsageError(
            f"--batch-size {batch_size} is out of range; expected 2 or more: one row has no "
            "variance"
        )
    if rows.rows < 2:
        raise MismatchError(
            f"{rows.source}: is a single row, which has no variance; expected all training rows"
        )


def fit_rows(path: Path, model: Any, rows: data.Split) -> data.Split:
    """Return rows in the structure that a model takes.

    Raises:
        MismatchError: they do not fit its inputs.
    """
    features = fit_features(path, model, rows)
    return replace(rows, features=tuple(features) if isinstance(features, list) else features)


def _make_recorders(path: Path, layers: Iterable[Any], keras: Any) -> list[_BatchNormRecorder]:
    """Return a recorder for each BatchNorm layer.

    Raises:
        MismatchError: there is none.
    """
    found = [
        _BatchNormRecorder(layer, keras)
        for layer in layers
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    if not found:
        raise MismatchError(f"{shown(path)}: has no BatchNorm layer; nothing to recalibrate")
    return found


def _load_model(
    table: Table, trust_code: bool, architecture: str | None, held_back: Callable[[], str]
) -> tuple[Any, Any, list[Any]]:
    """Return keras, the model of a file, and its layers, those inside other layers included."""
    bare = None
    if architecture is not None and not table.config:
        bare = Architecture(architecture, trust_code=trust_code)
    check_model(table, bare=bare is not None)
    path, opened = table.path, Path(table.files[0].path)
    form = find_format(table.format)
    if form.keras_layout == "layers":
        check_suffix(opened, form)
    if bare:
        check_weights_name(table)
    written = Description("", "", table.about.get("keras_version", ""))
    keras = import_keras("recalibrating BatchNorm")
    with reword_keras_errors(path, f"cannot load it{name_writer(written)}", held_back):
        if bare:
            model, _ = bare.build(keras)
            bare.load_weights(model, table)
        else:
            with mirrors.fetched([str(opened)]) as local:
                model = keras.saving.load_model(local, compile=False, safe_mode=not trust_code)
        # model.layers lists the outermost only.  Keras has no public way to those inside.
        layers = list(model._flatten_layers())
    return keras, model, layers


class _BatchNormRecorder:
    """Replaces the call of a BatchNorm layer, and adds up the statistics of each batch."""

    CHANGED = ("call", "momentum", "renorm")

    def __init__(self, layer: Any, keras: Any) -> None:
        self.layer = layer
        self.ops = keras.ops
        self.call = layer.call
        self.own = {name: vars(layer)[name] for name in self.CHANGED if name in vars(layer)}
        self.statistics = (layer.moving_mean, layer.moving_variance)
        self.values = [self.ops.convert_to_numpy(statistic) for statistic in self.statistics]
        self.sums: list[Any] = [0.0, 0.0]
        self.rows = 0
        self.trains = False  # whether it normalises by the moments of the batch in training

    def probe(self, inputs: Any, training: bool | None = None, **more: Any) -> Any:
        """Note whether the layer trains when the model does; change nothing."""
        # A model of the user may call the layer with training=False; only its call shows that.
        self.trains = self.trains or bool(training and self.layer.trainable)
        return self.call(inputs, training=False, **more)

    def prepare(self) -> None:
        """Make the statistics of the layer those of the latest batch alone."""
        # Keras computes moving = moving * momentum + batch * (1 - momentum).
        self.layer.momentum = 0.0
        self.layer.renorm = False  # Ioffe, 2017: it mixes the moving statistics into the output
        # JAX 0.10 takes no variable of Keras for zeros_like().
        mean, variance = self.statistics
        mean.assign(self.ops.zeros(mean.shape, mean.dtype))
        variance.assign(self.ops.ones(variance.shape, variance.dtype))
        self.layer.call = self.gather

    def restore(self) -> None:
        """Make the layer what it was before."""
        for name in self.CHANGED:
            if name in self.own:
                setattr(self.layer, name, self.own[name])
            elif name in vars(self.layer):  # the class's own is used again
                delattr(self.layer, name)
        for statistic, values in zip(self.statistics, self.values, strict=True):
            statistic.assign(values)

    def gather(self, inputs: Any, training: bool | None = None, **more: Any) -> Any:
        """Normalise by the moments of the batch, and add them up."""
        del training  # False, as the model runs in inference mode
        outputs = self.call(inputs, training=True, **more)
        count = int(inputs.shape[0])
        for k, statistic in enumerate(self.statistics):
            # float64: over thousands of batches, float32 sums lose the digits that matter.
            values = self.ops.convert_to_numpy(statistic).astype("float64")
            self.sums[k] = self.sums[k] + count * values
        self.rows += count
        return outputs


def _run_model(
    keras: Any,
    model: Any,
    found: Sequence[_BatchNormRecorder],
    rows: data.Split,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Run the model once over the rows; return the number of batches."""
    batches = divide_rows(rows.rows, batch_size)
    for one in found:
        one.layer.call = one.probe
    # In this scope, layers that change their state in training do not keep the change.  Two rows
    # are enough to see which layers train.
    with keras.StatelessScope():
        model(_take_batch(rows.features, batches[0][:2]), training=True)
    for one in found:
        one.layer.call = one.call
        if one.trains:
            one.prepare()
    if not any(one.trains for one in found):
        return 0
    for done, batch in enumerate(batches, 1):
        model(_take_batch(rows.features, batch), training=False)
        if progress:
            progress(done, len(batches))
    return len(batches)


def divide_rows(rows: int, batch_size: int) -> list[data.Array]:
    """Return the numbers of the rows of each batch: shuffled, always in the same order.

    Files are often sorted by class.  The sizes of batches differ by one at most.
    """
    import numpy as np

    # numpy promises that the order of RandomState never changes, unlike that of default_rng.
    order = np.random.RandomState(0).permutation(rows)
    return np.array_split(order, -(-rows // batch_size))


def _take_batch(features: data.Arrays, rows: data.Array) -> Any:
    """Return some rows in the form in which a model is called: a dict, a list or an array."""
    if isinstance(features, Mapping):
        return {name: array[rows] for name, array in features.items()}
    return [a[rows] for a in features] if isinstance(features, tuple) else features[rows]


def locate_variables(model: Any, table: Table) -> dict[int, list[str]]:
    """Return where a file stores each variable of a model: its `id` -> locations.

    The variables are visited as Keras does when it loads: by the order of layers and variables in
    an .h5 file, by the tree of objects in a .keras archive and in .weights.h5 files.  Mismatches
    are left out.
    """
    found: dict[int, list[str]] = {}
    is_tree = WEIGHTS_SUFFIX in table.rules.suffixes
    if find_format(table.format).keras_layout == "layers" and not is_tree:
        variables = (
            variable
            for layer in model.layers
            for variable in (*layer.trainable_weights, *layer.non_trainable_weights)
        )
        # Variables of the model itself come last, after those of its layers.  They belong to no
        # BatchNorm layer, so the shorter sequence ends the pairs.
        pairs = list(zip(variables, (s.location for s in table.tensors.values()), strict=False))
    else:
        pairs = _trace_archive(model)
    # A wrong pair would put the statistics of one layer into another: shapes are compared here,
    # and `recalibration` compares the values.
    shapes = {spec.location: spec.shape for spec in table.tensors.values()}
    for variable, location in pairs:
        if shapes.get(location) == tuple(getattr(variable, "shape", ())):
            found.setdefault(id(variable), []).append(location)
    return found


def _trace_archive(model: Any) -> list[tuple[Any, str]]:
    """Return each variable of a model, and the location where Keras saves it in an archive.

    Raises:
        PolyakError: this Keras saves in another way.
    """
    # Warning: these are private names of Keras, and a minor release may change them.  No public
    # function says where a variable is saved.  A walk over the objects of a model, written down
    # here again, would go wrong silently.  A test runs this with the installed Keras.
    try:
        from keras.src.saving import saving_lib

        store: Any = saving_lib.H5IOStore
        save_state = saving_lib._save_state
    except (ImportError, AttributeError):
        raise _make_unknown_keras() from None

    class Recorder(store):  # type: ignore[misc]  # keras ships no types
        """A store that keeps the variables themselves instead of writing their values."""

        def __init__(self) -> None:
            self.groups: dict[str, dict[str, Any]] = {}

        def __bool__(self) -> bool:
            return True  # Keras skips a store that is false

        def make(self, path: str, metadata: Any = None) -> dict[str, Any]:
            """Return the dict that a saver fills with the variables of one object."""
            del metadata
            return self.groups.setdefault(path, {})

    recorder = Recorder()
    try:
        save_state(model, recorder, None, inner_path="", visited_saveables=set())
    except TypeError:  # other parameters
        raise _make_unknown_keras() from None
    return [
        (variable, f"/{path}/vars/{name}" if path else f"/vars/{name}")
        for path, group in recorder.groups.items()
        for name, variable in group.items()
    ]


def _make_unknown_keras() -> PolyakError:
    version = importlib.metadata.version("keras")
    return PolyakError(
        f"polyak cannot recalibrate .keras and .weights.h5 with Keras {shown(version)}, which "
        "saves models in another way; save the model as .h5, or install Keras "
        f"{LATEST_TRACED[0]}.{LATEST_TRACED[1]}"
    )


def _locate_values(
    path: Path, found: Sequence[_BatchNormRecorder], stored: Mapping[int, Sequence[str]]
) -> dict[str, data.Array]:
    """Return the statistics that Keras loaded, by their location in the file."""
    before: dict[str, data.Array] = {}
    for one in found:
        for statistic, values in zip(one.statistics, one.values, strict=True):
            if id(statistic) not in stored:
                raise MismatchError(
                    f"{shown(path)}: the statistics of layer '{shown(one.layer.name, 80)}' are "
                    "not in the place where this version of Keras keeps them; load it and save "
                    "it again with model.save()"
                )
            before |= dict.fromkeys(stored[id(statistic)], values)
    return before


def _note_unchanged(path: Path, found: Sequence[_BatchNormRecorder]) -> Iterator[str]:
    """Yield notes about layers whose statistics stay as they are.

    Raises:
        MismatchError: no layer has new statistics.
    """
    constant = [shown(one.layer.name, 80) for one in found if not one.trains]
    unused = [shown(one.layer.name, 80) for one in found if one.trains and not one.rows]
    if len(constant) + len(unused) == len(found):
        raise MismatchError(
            f"{shown(path)}: every BatchNorm layer is frozen (trainable=False, or called with "
            "training=False), so that its statistics are constants; nothing to recalibrate"
        )
    if constant:
        yield (
            f"{len(constant)} BatchNorm layers are frozen (trainable=False, or called with "
            f"training=False); their statistics are constants and stay ({list_some(constant)})"
        )
    if unused:
        yield (
            f"{len(unused)} BatchNorm layers saw no rows; their statistics stay "
            f"({list_some(unused)})"
        )
