"""The convolutional network with BatchNorm of `tests.examples.digits`, trained by Keras.

An epoch is one call of a compiled graph, since `fit` would take several times as long for batches
so small.  Layers, optimizer and files are those of Keras.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.examples.digits import experiment, in_keras
from tests.examples.proof.families import Factors, Score, score_classes, spoil
from tests.training import Array

BATCH = 16


@cache
def load() -> tuple[Array, Array, Array, Array]:
    """Return the images and classes to train on, then those to score."""
    train, _, test = experiment.images()
    return (
        np.asarray(train.features),
        np.asarray(train.labels),
        np.asarray(test.features),
        np.asarray(test.labels),
    )


def build() -> Any:
    """Return the network of `digits`, not compiled."""
    model = in_keras.network(0.1)
    return type(model).from_config(model.get_config())


@cache
def scorer() -> Any:
    """Return a network into which files are loaded to be scored."""
    return build()


@cache
def trainer() -> tuple[Any, Any]:
    """Return a network with its optimizer, and a function that trains it for an epoch.

    All runs of a process share them, as TensorFlow takes longer to compile the function than to
    run it; a run puts its own values in first.
    """
    import keras
    import tensorflow as tf

    model = build()
    sgd = keras.optimizers.SGD(0.1, momentum=0.9, name="sgd")
    model.compile(sgd, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    sgd.build(model.trainable_variables)
    measure = keras.losses.SparseCategoricalCrossentropy()

    @tf.function(reduce_retracing=True)  # type: ignore[untyped-decorator]
    def train(x: Any, y: Any, rates: Any) -> None:
        for k in tf.range(tf.shape(rates)[0]):
            sgd.learning_rate.assign(rates[k])
            with tf.GradientTape() as tape:
                loss = measure(y[k], model(x[k], training=True))
            sgd.apply(tape.gradient(loss, model.trainable_variables))

    return model, train


class KerasRun:
    """A run of the network.

    Args:
        rate: of SGD.
        labels: those of the training rows.
        random: for the order of the rows.
        values: of the weights, then of the optimizer.
    """

    def __init__(
        self, rate: float, labels: Array, random: np.random.Generator, values: list[Array]
    ) -> None:
        self.rate, self.labels, self.random, self.values = rate, labels, random, values

    def train_epoch(self, factors: Factors) -> None:
        """Train for one epoch; the rows left over from whole batches wait for another epoch."""
        steps = len(self.labels) // BATCH
        order = self.random.permutation(len(self.labels))[: steps * BATCH].reshape(steps, BATCH)
        rates = np.array([self.rate * factors(k / steps) for k in range(steps)], np.float32)
        model, train = trainer()
        self._put(model)
        train(load()[0][order], self.labels[order], rates)
        self.values = [variable.numpy() for variable in _list_variables(model)]

    def save(self, path: Path) -> None:
        """Write the whole model, as `ModelCheckpoint` does."""
        model, _ = trainer()
        self._put(model)
        model.save(path)

    def fork(self) -> KerasRun:
        """Return a copy that goes on in the same way."""
        return KerasRun(self.rate, self.labels, copy.deepcopy(self.random), list(self.values))

    def _put(self, model: Any) -> None:
        for variable, value in zip(_list_variables(model), self.values, strict=True):
            variable.assign(value)


def _list_variables(model: Any) -> list[Any]:
    return [*model.weights, *model.optimizer.variables]


@dataclass(frozen=True)
class Digits:
    """A convolutional network with BatchNorm on 692 images of digits; 808 others are scored."""

    name: str = "digits"
    optimizer: str = "SGD, momentum 0.9"
    suffix: str = ".keras"
    rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    noises: tuple[float, float] = (0.0, 0.2)

    def begin(self, rate: float, noise: float, seed: int) -> KerasRun:
        """Return a run that has not been trained yet."""
        import keras

        keras.utils.set_random_seed(seed)
        random = np.random.default_rng(seed)
        start = [variable.numpy() for variable in build().weights]
        zeros = [np.zeros_like(one.numpy()) for one in trainer()[0].optimizer.variables]
        labels = spoil(load()[1], 10, noise, random)
        return KerasRun(rate, labels, random, [*start, *zeros])

    def score(self, path: Path) -> Score:
        """Return loss and accuracy on the 808 images."""
        scorer().load_weights(path)
        shares = np.asarray(scorer()(load()[2], training=False), np.float64)
        return score_classes(np.log(np.maximum(shares, 1e-30)), load()[3])

    def read(self, path: Path) -> dict[str, Array]:
        """Return weights and BatchNorm's statistics."""
        scorer().load_weights(path)
        return {one.path: one.numpy() for one in scorer().weights}
