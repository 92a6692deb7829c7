"""Run a model over rows to gather the moving statistics of its BatchNorm layers.

This module only computes the statistics; `recalibration` writes them into a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyak_cli.errors import MismatchError, list_some, shown
from polyak_cli.evaluation import data
from polyak_cli.evaluation.keras_files import (
    Description,
    check_model,
    check_suffix,
    collect_warnings,
    import_keras,
    name_writer,
    reword_keras_errors,
)
from polyak_cli.evaluation.labels import check_features
from polyak_cli.evaluation.quiet import silence_frameworks
from polyak_cli.tensors import Float64, Table


@dataclass(frozen=True, slots=True)
class Moments:
    """The moving statistics of a model's BatchNorm layers.

    Attributes:
        before: location in the file -> the values that the model was loaded with.
        after: location in the file -> the mean over all rows.
        layers: how many layers they belong to.
        batches: how many there were.
        notes: what the user should know, a line each.
    """

    before: Mapping[str, data.Array]
    after: Mapping[str, Float64]
    layers: int
    batches: int
    notes: tuple[str, ...]


def gather_moments(
    table: Table, rows: data.Split, *, batch_size: int, trust_code: bool = False
) -> Moments:
    """Run a model once over rows and gather what its BatchNorm layers see.

    "bn_update" of Izmailov et al., "Averaging weights leads to wider optima and better
    generalization", 2018.  Only BatchNorm normalises as in training, by the moments of the batch;
    everything else runs as in inference, dropout and noise off (but what a model calls with
    ``training=True`` whatever its mode).  Each statistic becomes the mean, in float64, of what the
    layer itself computes of each batch, weighted by the rows: of equal batches, what Keras would
    arrive at with momentum k / (k + 1) in batch k = 0, 1, ...  A variance is that of Keras, of the
    rows of a batch and with no n / (n - 1).

    The rows are shuffled, always in the same way, since files are often sorted by class; batches
    are as many as needed, of sizes that differ by one at most.  A layer that is called several
    times counts every call.

    Layers that normalise by their statistics in training too - trainable=False, or called with
    training=False by a layer or model of the user's own - are left alone, unlike by PyTorch's
    ``update_bn``: to them these are constants, with which everything else was trained.

    Args:
        table: of the file, as `formats.scan` gives it with everything.
        rows: features, one array (rows, ...) for each input of the model.
        batch_size: rows at a time, at most.
        trust_code: run the code that a file carries in a Lambda layer.

    Raises:
        MissingExtraError: keras or tensorflow is not installed.
        FormatError: the file holds no architecture.
        MismatchError: the rows do not fit the model, or it has no statistics to gather.
        PolyakError: Keras is too old, or cannot load or run the model, or the model carries code.
    """
    check_model(table)
    path, opened = table.path, Path(table.files[0].path)
    if table.format == "hdf5":
        check_suffix(opened)
    written = Description("", "", table.about.get("keras_version", ""))
    with silence_frameworks() as held_back, collect_warnings() as warned:
        keras = import_keras("recalibrating BatchNorm")
        with reword_keras_errors(path, f"cannot load it{name_writer(written)}", held_back):
            model = keras.saving.load_model(opened, compile=False, safe_mode=not trust_code)
            layers = model._flatten_layers()
            stored = locate_variables(model, table)
        found = [
            _BatchNormRecorder(layer, keras)
            for layer in layers
            if isinstance(layer, keras.layers.BatchNormalization)
        ]
        if not found:
            raise MismatchError(f"{shown(path)}: has no BatchNorm layer; nothing to recalibrate")
        check_features(path, model, rows)
        before = _locate_values(path, found, stored)
        with reword_keras_errors(path, f"cannot run it on {rows.source}", held_back):
            batches = _run_model(keras, model, found, rows, batch_size)
    notes = (*_note_unchanged(path, found), *warned)
    chosen = [one for one in found if one.rows]
    after = {
        location: total / one.rows
        for one in chosen
        for total, statistic in zip(one.sums, one.statistics, strict=True)
        for location in stored[id(statistic)]
    }
    return Moments({k: before[k] for k in after}, after, len(chosen), batches, notes)


class _BatchNormRecorder:
    """Stands in for the call of a BatchNorm layer, and adds up what it computes of each batch."""

    def __init__(self, layer: Any, keras: Any) -> None:
        self.layer = layer
        self.ops = keras.ops
        self.call = layer.call
        self.statistics = (layer.moving_mean, layer.moving_variance)
        self.values = [self.ops.convert_to_numpy(statistic) for statistic in self.statistics]
        self.sums: list[Any] = [0.0, 0.0]
        self.rows = 0
        self.trains = False  # it normalises by the moments of the batch where the model trains

    def probe(self, inputs: Any, training: bool | None = None, **more: Any) -> Any:
        """See whether the layer trains where the model does."""
        self.trains = self.trains or bool(training and self.layer.trainable)
        return self.call(inputs, training=False, **more)

    def prepare(self) -> None:
        """Have the layer's statistics be those of the latest batch alone."""
        self.layer.momentum = 0.0
        self.layer.renorm = False  # it would normalise by more than the batch
        self.layer.moving_mean.assign(self.ops.zeros_like(self.layer.moving_mean))
        self.layer.moving_variance.assign(self.ops.ones_like(self.layer.moving_variance))
        self.layer.call = self.gather

    def gather(self, inputs: Any, training: bool | None = None, **more: Any) -> Any:
        """Normalise by the moments of the batch, and add them up."""
        del training  # of the model, which infers
        outputs = self.call(inputs, training=True, **more)
        count = int(inputs.shape[0])
        for k, statistic in enumerate(self.statistics):
            values = self.ops.convert_to_numpy(statistic).astype("float64")
            self.sums[k] = self.sums[k] + count * values
        self.rows += count
        return outputs


def _run_model(
    keras: Any, model: Any, found: Sequence[_BatchNormRecorder], rows: data.Split, batch_size: int
) -> int:
    """Run the model once over the rows; return the number of batches."""
    import numpy as np

    # The order of this old generator is promised never to change, unlike that of newer ones.
    order = np.random.RandomState(0).permutation(rows.rows)
    for one in found:
        one.layer.call = one.probe
    with keras.StatelessScope():  # a layer that changes in training does so in vain
        model(_take_batch(rows.features, order[:2]), training=True)
    for one in found:
        one.layer.call = one.call
        if one.trains:
            one.prepare()
    if not any(one.trains for one in found):
        return 0
    count = -(-rows.rows // batch_size)
    for batch in np.array_split(order, count):
        model(_take_batch(rows.features, batch), training=False)
    return count


def _take_batch(features: data.Arrays, rows: data.Array) -> Any:
    """Return some of the rows as a model is called with them."""
    if isinstance(features, Mapping):
        return {name: array[rows] for name, array in features.items()}
    return [a[rows] for a in features] if isinstance(features, tuple) else features[rows]


def locate_variables(model: Any, table: Table) -> dict[int, list[str]]:
    """Return where the file keeps each variable of a model: its identity -> locations.

    Goes the way that Keras goes when it loads: by the order of layers and variables in an .h5
    file, by the tree of objects in a .keras archive.  What does not fit is left out.
    """
    found: dict[int, list[str]] = {}
    if table.format == "hdf5":
        variables = (
            variable
            for layer in model.layers
            for variable in (*layer.trainable_weights, *layer.non_trainable_weights)
        )
        # Where a model has variables of its own, they come last.
        pairs = list(zip(variables, (s.location for s in table.tensors.values()), strict=False))
    else:
        pairs = _trace_archive(model)
    shapes = {spec.location: spec.shape for spec in table.tensors.values()}
    for variable, location in pairs:
        if shapes.get(location) == tuple(getattr(variable, "shape", ())):
            found.setdefault(id(variable), []).append(location)
    return found


def _trace_archive(model: Any) -> list[tuple[Any, str]]:
    """Return each variable of a model and where Keras would save it in an archive."""
    from keras.src.saving import saving_lib

    class Recorder(saving_lib.H5IOStore):  # type: ignore[misc]  # keras ships no types
        """Takes what is to be saved, and keeps it."""

        def __init__(self) -> None:
            self.groups: dict[str, dict[str, Any]] = {}

        def __bool__(self) -> bool:
            return True

        def make(self, path: str, metadata: Any = None) -> dict[str, Any]:
            """Return what a saver fills."""
            del metadata
            return self.groups.setdefault(path, {})

    recorder = Recorder()
    saving_lib._save_state(model, recorder, None, inner_path="", visited_saveables=set())
    return [
        (variable, f"/{path}/vars/{name}" if path else f"/vars/{name}")
        for path, group in recorder.groups.items()
        for name, variable in group.items()
    ]


def _locate_values(
    path: Path, found: Sequence[_BatchNormRecorder], stored: Mapping[int, Sequence[str]]
) -> dict[str, data.Array]:
    """Return the statistics that a model was loaded with, by where the file keeps them."""
    before: dict[str, data.Array] = {}
    for one in found:
        for statistic, values in zip(one.statistics, one.values, strict=True):
            if id(statistic) not in stored:
                raise MismatchError(
                    f"{shown(path)}: the statistics of layer '{shown(one.layer.name, 80)}' are not "
                    "where this Keras would keep them; load it and save it anew with model.save()"
                )
            before |= dict.fromkeys(stored[id(statistic)], values)
    return before


def _note_unchanged(path: Path, found: Sequence[_BatchNormRecorder]) -> Iterator[str]:
    """Yield what to tell of the layers whose statistics stay as they are.

    Raises:
        MismatchError: there are no others.
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
