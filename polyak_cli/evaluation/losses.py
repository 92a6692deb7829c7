"""Find the losses and metrics that a file names, and compute them row by row.

A name is looked up among those that Keras, or the user's own code, has registered; nothing that a
file names is imported.  This module knows no files and no data sets.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from polyak_cli.errors import shown
from polyak_cli.evaluation import data


def make_zero_loss(keras: Any) -> Callable[[Any, Any], Any]:
    """Return a loss of zero, because Keras measures nothing without a loss."""

    def no_loss(_: Any, predicted: Any) -> Any:
        return keras.ops.zeros_like(predicted[..., 0])

    return no_loss


def complete_losses(keras: Any, outputs: Sequence[str], loss: Any) -> Any:
    """Return losses as compile() takes them: one for every output, or losses of zero if none is.

    An output without a loss counts nothing, but Keras refuses a dict that does not name it.
    """
    if not flatten(loss):
        zeros = [make_zero_loss(keras)] * len(outputs)
        # A model whose outputs are a dict takes its losses by name only.
        known = len(outputs) > 1 and all(outputs)
        return dict(zip(outputs, zeros, strict=True)) if known else zeros
    if isinstance(loss, dict) and all(outputs):
        return {name: loss.get(name) for name in outputs}
    return loss


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
    notes: list[str] = field(default_factory=list)
    left_out: set[str] = field(default_factory=set)  # of what something was not known: "loss"

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
            self.left_out.add(what)
            self.notes.append(
                f"left out the {what} '{shown(_name_config(config), 60)}', which Keras does not "
                "know; the file holds only its name: to measure it, register it in the file of "
                "--data MODULE.py:FUNCTION"
            )
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
        """Return the name of a function that is stored as an object, as in .keras files.

        Raises:
            ValueError: it is no function of Keras, and not registered.
        """
        if not isinstance(config, dict) or config.get("class_name") != "function":
            return config
        name = str(config["config"])
        # compile("mse") is stored as that text; a function of this name is the user's, as Keras's
        # is called mean_squared_error.  Keras itself would load its own instead, without a word.
        homes = (self.keras.losses, self.keras.metrics)
        if self.keras.saving.get_registered_object(name) is None and not any(
            getattr(getattr(home, name, None), "__name__", None) == name for home in homes
        ):
            raise ValueError(name)
        return name

    def _build(self, config: Mapping[str, Any], home: Any, base: type) -> Any:
        """Return an object of a class of Keras or a registered class, with plain arguments only."""
        name = config.get("registered_name") or config["class_name"]
        kind = self.keras.saving.get_registered_object(name)
        # A class of the user's own may be called like one of Keras's, whose module .keras files
        # name; .h5 files name none.
        if kind is None and str(config.get("module", "keras")).startswith(("keras", "tf_keras")):
            kind = getattr(home, config["class_name"], None)
        # `home` is a module of Keras: a hostile name must not find another object in it.
        if not (isinstance(kind, type) and issubclass(kind, base) and kind is not base):
            raise ValueError(name)
        arguments = {k: v for k, v in config["config"].items() if k not in ("fn", "dtype")}
        if arguments.get("reduction") == "auto":  # Keras 2's word for its default
            arguments["reduction"] = "sum_over_batch_size"
        if home is self.keras.losses:
            self._note_lost_settings(kind, arguments)
        return kind(**keep_plain_values(arguments))

    def _note_lost_settings(self, kind: type, arguments: Mapping[str, Any]) -> None:
        """Note the settings of a loss that the file does not keep, as Keras 3 drops Huber's."""
        for name, parameter in inspect.signature(kind).parameters.items():
            default = parameter.default
            if name in arguments or name in ("name", "dtype", "reduction", "fn"):
                continue
            if default is not parameter.empty and default is not None:
                self.notes.append(
                    f"the file does not record the {name} of its loss {kind.__name__}: the loss "
                    f"shown uses Keras's default, {default!r}"
                )


def _name_config(config: Any) -> object:
    """Return the name of a loss or metric as its configuration gives it."""
    if not isinstance(config, dict):
        return config
    kind = config.get("class_name")
    if kind == "__lambda__":
        return "<lambda>"
    return config.get("config") if kind == "function" else kind


def name_losses(model: Any, outputs: Sequence[str], loss: Any, weights: Any) -> str:
    """Return which loss a model is scored with, and whose, such as "mse (Keras's)".

    Args:
        model: the model, whose code may compute a loss of its own.
        outputs: names of its outputs.
        loss: what `Registry.resolve` found.
        weights: of the outputs; None for 1 each.
    """
    found = [select_output(loss, index, name) for index, name in enumerate(outputs)]
    if not any(one is not None for one in found):
        return ""
    words = []
    for index, (name, known) in enumerate(zip(outputs, found, strict=True)):
        weight = select_output(weights, index, name)
        times = "" if weight is None or weight == 1 else f" * {weight:g}"
        output = f"{shown(name, 60)}: " if len(outputs) > 1 else ""
        words.append(f"{output}{'none' if known is None else _name_loss(known)}{times}")
    text = ", ".join(words)
    # A subclass may compute something else of these losses, or nothing.
    for method in ("compute_loss", "test_step"):
        owner = next(k for k in type(model).__mro__ if method in vars(k))
        if not owner.__module__.startswith("keras."):
            text = f"{owner.__name__}.{method}() of {text}"
    penalties = " + the model's own penalties (regularizers, add_loss)" if model.losses else ""
    return text + penalties


def _name_loss(known: Any) -> str:
    """Return the name of a loss, its settings, and whether it is one of Keras's."""
    if isinstance(known, str):
        return f"{shown(known, 60)} (Keras's)"
    name = _get_name(known)
    home = getattr(known, "__module__", None) or type(known).__module__
    settings = ""
    if hasattr(known, "get_config"):
        given = known.get_config().items()
        plain = [(k, v) for k, v in given if isinstance(v, (bool, int, float)) and k != "axis"]
        listed = ", ".join(f"{key}={value!r}" for key, value in plain if value)
        settings = f"({listed})" if listed else ""
    whose = "Keras's" if home.startswith("keras.") else "your own"
    return f"{shown(name, 60)}{settings} ({whose})"


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
    name = known if isinstance(known, str) else f"{_get_name(known)}{getattr(known, 'name', '')}"
    return name.lower().replace("_", "")


def _get_name(known: Any) -> str:
    """Return the name of a function, or of the class of an object."""
    return getattr(known, "__name__", "") or type(known).__name__


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
        kind = _get_name(known)
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
