"""Find the losses and metrics that a file names, and compute them row by row.

A name is looked up among those that Keras, or the user's own code, has registered; nothing that a
file names is imported.  This module knows no files and no data sets.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from polyak_cli.errors import shown
from polyak_cli.evaluation import data


def make_zero_loss(keras: Any) -> Callable[[Any, Any], Any]:
    """Return a loss of zero, because Keras measures nothing without a loss."""

    def no_loss(_: Any, predicted: Any) -> Any:
        return keras.ops.zeros_like(predicted[..., 0])

    return no_loss


def keep_plain_values(value: Any) -> Any:
    """Return numbers, text, and lists or dicts of them; None for everything else.

    Arguments from a file are passed to Keras, which would turn other values into objects.
    """
    if isinstance(value, dict):
        return {str(key): keep_plain_values(item) for key, item in value.items()}
    if isinstance(value, list):
        return [keep_plain_values(item) for item in value]
    return value if isinstance(value, (int, float, str)) else None


@dataclass(frozen=True, slots=True)
class Registry:
    """Finds losses and metrics by the names that Keras, or code of the user, has registered.

    Keras's own deserialisation imports modules that the file names, and fails for names such as
    mse.
    """

    keras: Any
    notes: list[str]

    def resolve(self, config: Any, find: Callable[[Any], Any], what: str) -> Any:
        """Resolve a configuration: one object, or a list or dict with one for each output.

        Unknown names are left out, with a note.
        """
        if config is None:
            return None
        if isinstance(config, list):
            return [self.resolve(item, find, what) for item in config]
        if isinstance(config, dict) and "class_name" not in config:
            return {str(k): self.resolve(v, find, what) for k, v in config.items()}
        try:
            return find(config)
        except (ValueError, TypeError, KeyError, AttributeError):
            name = config.get("class_name") if isinstance(config, dict) else config
            self.notes.append(f"left out the {what} '{shown(name, 60)}', which Keras does not know")
            return None

    def find_loss(self, config: Any) -> Any:
        """Return a loss: a name that compile() accepts, a function, or an object."""
        config = self._unwrap_name(config)
        if isinstance(config, str):
            registered = self.keras.saving.get_registered_object(config)
            if registered is None:
                self.keras.losses.get(config)  # raises for an unknown name
            return registered or config
        return self._build(config, self.keras.losses, self.keras.losses.Loss)

    def find_metric(self, config: Any) -> Any:
        """Return a metric: a name that compile() accepts, a function, or an object."""
        config = self._unwrap_name(config)
        if config in ("accuracy", "acc"):
            return config  # compile() chooses by the shape of the output
        if isinstance(config, str):
            registered = self.keras.saving.get_registered_object(config)
            if registered is None:
                self.keras.metrics.get(config)
            return registered or config
        if config["class_name"] == "MeanMetricWrapper":  # how Keras 2 stores a metric given by name
            return self._wrap(config["config"]["fn"], str(config["config"]["name"]))
        return self._build(config, self.keras.metrics, self.keras.metrics.Metric)

    def _wrap(self, function: str, name: str) -> Any:
        """Return the mean of a function over the rows."""
        found = self.keras.saving.get_registered_object(function) or self.keras.metrics.get(
            function
        )
        if isinstance(found, self.keras.metrics.Metric):
            return type(found)(name=name)
        return self.keras.metrics.MeanMetricWrapper(found, name=name)

    def _unwrap_name(self, config: Any) -> Any:
        """Return the name of a function that is stored as an object, as in .keras files."""
        if isinstance(config, dict) and config.get("class_name") == "function":
            return config["config"]
        return config

    def _build(self, config: Mapping[str, Any], home: Any, base: type) -> Any:
        """Return an object of a class of Keras or a registered class, with plain arguments only."""
        name = config.get("registered_name") or config["class_name"]
        kind = self.keras.saving.get_registered_object(name) or getattr(
            home, config["class_name"], None
        )
        # `home` is a module of Keras: a hostile name must not find another object in it.
        if not (isinstance(kind, type) and issubclass(kind, base) and kind is not base):
            raise ValueError(name)
        arguments = {k: v for k, v in config["config"].items() if k not in ("fn", "dtype")}
        if arguments.get("reduction") == "auto":  # Keras 2's word for its default
            arguments["reduction"] = "sum_over_batch_size"
        return kind(**keep_plain_values(arguments))


def arrange_by_output(metrics: Any, outputs: Sequence[str]) -> Any:
    """Return metrics in the form that compile() expects, without the unknown ones.

    Keras 2 stores a list for each output, and puts the name of the output before that of the
    metric; compile() would add it again.
    """
    if len(outputs) == 1:
        return flatten(metrics)
    if isinstance(metrics, dict):
        return {name: flatten(own) for name, own in metrics.items()}
    if not isinstance(metrics, list):
        return metrics
    for name, own in zip(outputs, metrics, strict=False):
        for metric in flatten(own):
            if not isinstance(metric, str):
                metric.name = metric.name.removeprefix(f"{name}_")
    return [flatten(own) for own in metrics]


def flatten(nested: Any) -> list[Any]:
    """Return the known objects in a nested structure, in order."""
    if nested is None:
        return []
    if isinstance(nested, (list, tuple)):
        return [leaf for item in nested for leaf in flatten(item)]
    if isinstance(nested, dict):
        return [leaf for item in nested.values() for leaf in flatten(item)]
    return [nested]


def normalise_name(known: Any) -> str:
    """Return the name of a loss or metric, in lower case without underscores."""
    if isinstance(known, str):
        name = known
    else:
        name = getattr(known, "__name__", "") or type(known).__name__
        name += str(getattr(known, "name", ""))
    return name.lower().replace("_", "")


def select_output(nested: Any, index: int, name: str) -> Any:
    """Return the loss of one output of those that `Registry.resolve` resolved."""
    if isinstance(nested, dict):
        return nested.get(name)
    if isinstance(nested, list):
        return nested[index] if index < len(nested) else None
    return nested


class _RowLoss(NamedTuple):
    """The loss of one output."""

    output: int
    function: Callable[[Any, Any], Any]  # labels, output -> one number a row, or several
    weight: float
    name: str


@dataclass(frozen=True, slots=True)
class RowWise:
    """Computes for each row what Keras computes for their mean."""

    keras: Any
    losses: tuple[_RowLoss, ...]  # empty if the loss is unknown, or not one for single rows
    right: Callable[[Any, Any], Any] | None  # labels, output -> 1 where the class is right
    names: Sequence[str]  # of the outputs

    @property
    def loss_name(self) -> str:
        """The name of the loss; equal for all ways to write down the same one."""
        return ", ".join(f"{one.name} * {one.weight:g}" for one in self.losses)

    def order_outputs(self, arrays: Any) -> list[data.Array]:
        """Return one array for each output."""
        if isinstance(arrays, Mapping) and set(arrays) == set(self.names):
            return [arrays[name] for name in self.names]
        return data.list_arrays(tuple(arrays) if isinstance(arrays, list) else arrays)

    def compute(
        self, labels: data.Arrays, outputs: Sequence[data.Array], batch_size: int
    ) -> tuple[data.Array | None, data.Array | None]:
        """Return the loss of each row, and whether its class is right; None for unknown ones."""
        truths = self.order_outputs(labels)
        losses = None
        for one in self.losses:
            own = self._compute_each(
                one.function, truths[one.output], outputs[one.output], batch_size
            )
            if own is None:
                losses = None
                break
            losses = one.weight * own + (0.0 if losses is None else losses)
        if self.right is None or len(outputs) != 1 or outputs[0].ndim != 2:
            return losses, None
        correct = self._compute_each(self.right, truths[0], outputs[0], batch_size)
        return losses, None if correct is None else correct == 1

    def _compute_each(
        self, function: Callable[[Any, Any], Any], truth: data.Array, output: data.Array, step: int
    ) -> data.Array | None:
        """Return the value of a function for each row; None if it gives fewer than one a row."""
        import numpy as np

        found = np.empty(len(output))
        tensor, dtype = self.keras.ops.convert_to_tensor, self.keras.config.floatx()
        for start in range(0, len(output), step):
            block = slice(start, start + step)
            values = self.keras.ops.convert_to_numpy(
                function(tensor(truth[block], dtype=dtype), tensor(output[block], dtype=dtype))
            )
            if values.shape[:1] != output[block].shape[:1]:
                return None
            # A loss of an image or a sequence has a number for each of its positions.
            found[block] = values.reshape(len(values), -1).mean(1, dtype=np.float64)
        return found


def resolve_row_losses(
    keras: Any, outputs: Sequence[str], loss: Any, weights: Any
) -> tuple[_RowLoss, ...]:
    """Return the losses that `Registry.resolve` found, by output, before they are averaged."""
    found = []
    for index, name in enumerate(outputs):
        known = select_output(loss, index, name)
        if known is None:
            continue
        if isinstance(known, str):
            try:
                known = keras.losses.get(known)
            except ValueError:  # such as crossentropy, where compile() chooses by the labels
                return ()
        function = known.call if isinstance(known, keras.losses.Loss) else known
        if isinstance(known, type) or not callable(function):
            return ()
        weight = select_output(weights, index, name)
        kind = getattr(known, "__name__", "") or type(known).__name__
        # Integer and one-hot labels give the same loss, and a class and a function have names that
        # differ in style only: SparseCategoricalCrossentropy, categorical_crossentropy.
        kind = kind.lower().replace("_", "").removeprefix("sparse")
        found.append(_RowLoss(index, function, 1.0 if weight is None else float(weight), kind))
    return tuple(found)


def compute_penalty(keras: Any, model: Any) -> float:
    """Return the penalty that regularizers add to the loss of every batch."""
    return sum(
        float(keras.ops.convert_to_numpy(variable.regularizer(variable)))
        for variable in model.trainable_variables
        if getattr(variable, "regularizer", None) is not None
    )


def find_accuracy(metrics: Any) -> Any:
    """Return the accuracy among the metrics of a model, or None."""
    return next((known for known in flatten(metrics) if "acc" in normalise_name(known)), None)


def choose_accuracy(
    keras: Any, model: Any, loss: Any, metrics: Any, labels: data.Arrays
) -> Callable[[Any, Any], Any] | None:
    """Return a function of labels and output that is 1 where the class is right, else 0.

    Its mean is the accuracy.  A single output column is a class only with a binary loss, or with
    a sigmoid if the loss is unknown, or if the model measures accuracy itself.  Otherwise 0 and 1
    may be numbers to predict.
    """
    own = next(iter(flatten(loss)), None)
    accuracy = find_accuracy(metrics)
    shape = tuple(model.outputs[0].shape)
    if shape[-1] != 1:
        (truth,) = data.list_arrays(labels)
        sparse = truth.ndim < len(shape)
        name = "sparse_categorical_accuracy" if sparse else "categorical_accuracy"
        return cast(Callable[[Any, Any], Any], getattr(keras.metrics, name))
    last = getattr(model.layers[-1], "activation", None)
    sigmoid = own is None and last is keras.activations.sigmoid
    if "binary" not in normalise_name(own) and not sigmoid and accuracy is None:
        return None
    threshold = 0.0 if getattr(own, "from_logits", False) else 0.5
    if accuracy is not None:
        threshold = getattr(accuracy, "threshold", 0.5)
    return functools.partial(keras.metrics.binary_accuracy, threshold=threshold)
