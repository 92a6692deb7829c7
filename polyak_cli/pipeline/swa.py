"""The Keras callback that keeps the running mean of a training in memory.

Importing it imports keras, as `callback` does; only `polyak_cli.callbacks` imports it.  Knows which
variables count and when; the arithmetic is the engine's, and BatchNorm's statistics are gathered as
`polyak recalibrate` gathers them.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polyak_cli.averaging.schemes import make_mean
from polyak_cli.engine import running
from polyak_cli.errors import MissingExtraError, UsageError, shown, word_count
from polyak_cli.pipeline.steps import Steps, check_counts
from polyak_cli.tensors import FLOATS

try:
    import keras
except ModuleNotFoundError:
    raise MissingExtraError("polyak_cli.callbacks", "tensorflow") from None

if TYPE_CHECKING:
    from polyak_cli.evaluation.data import Split

#: Scheme -> the multiplier of the k-th checkpoint, the oldest being the first.  With these schemes
#: it does not change when another checkpoint comes; with all others, the sum would have to be
#: multiplied again and again, and rounded each time.
RUNNING: Mapping[str, Callable[[int], float]] = {"equal": lambda _: 1.0, "linear": float}


class StochasticWeightAveraging(keras.callbacks.Callback):  # type: ignore[misc]  # no types
    """Averages the weights of a training in memory, and leaves the average in the model.

    >>> swa = StochasticWeightAveraging(start_epoch=76, recalibrate=x)   # doctest: +SKIP
    >>> model.fit(x, y, epochs=100, callbacks=[swa])                     # doctest: +SKIP
    >>> model.save("averaged.keras")                                     # doctest: +SKIP

    After ``fit``, every float variable among ``model.weights`` is, bit for bit, what ``polyak
    average`` makes of files that were saved at the same moments: added up in float64, divided once,
    rounded once.  Integers are those of the newest weights, and so is the optimizer's state.
    Before, training goes on with its own weights; an exception in ``fit`` leaves these.

    The sums take 8 bytes for each number that is averaged, twice the model in float32, and no disk.
    Where Keras reads a variable by copying it, as on TensorFlow, the largest one is in memory once
    or twice more meanwhile.  The sums are lost with the process, and each ``fit`` begins with none;
    `PolyakCheckpoint` keeps files, from which a run can be resumed and another window averaged.

    Instead of TensorFlow Addons, with M a multiple of K:

    * ``tfa.optimizers.SWA(opt, start_averaging=M, average_period=K)`` becomes ``opt`` itself, with
      ``StochasticWeightAveraging(start_step=M, every_steps=K)`` among the callbacks of ``fit``, and
      ``assign_average_vars`` is left out.  tfa counts steps from 0, and takes step M + 1, M + K + 1
      and so on.  It averages trained variables only.
    * ``tfa.callbacks.AverageModelCheckpoint(False, "averaged.h5")``, which writes an average after
      each epoch, becomes ``PolyakCheckpoint("ckpts", "averaged.h5", last=10, scheme="equal")``;
      with ``update_weights=True`` the average is in the model: use this class.

    Args:
        start_epoch: the first epoch whose weights count; counted from 1, as in names of files.
        start_step: the first step whose weights count, where steps are counted.
        every: epochs from one averaged state to the next; those whose number is a multiple.
        every_steps: batches instead of epochs, counted as by `PolyakCheckpoint`.
        scheme: "equal", or "linear": newer weights count more, 1, 2, 3, ...
        recalibrate: training rows, with which the statistics of BatchNorm layers are computed again
            after training: an array, a tuple or dict of arrays for several inputs, or a `Split`.
            Without them, the statistics are averaged like everything else, and a warning says so.
        batch_size: the largest number of these rows in a batch, as for `recalibrate`.

    Attributes:
        count: how many states were averaged.
        nbytes: memory of the sums while training.
        notes: messages about BatchNorm layers that were not recalibrated.

    Raises:
        UsageError: the arguments contradict one another or are out of range, or training ends
            before anything would be averaged.
        MismatchError: out of ``fit``, before the first epoch when rows do not fit the model, and
            when weights are not finite.
    """

    def __init__(
        self,
        start_epoch: int = 1,
        *,
        start_step: int | None = None,
        every: int = 1,
        every_steps: int | None = None,
        scheme: str = "equal",
        recalibrate: Split | Any = None,
        batch_size: int = 256,
    ) -> None:
        super().__init__()
        _check_numbers(start_epoch, start_step, every, every_steps)
        if not isinstance(scheme, str) or scheme not in RUNNING:
            raise UsageError(
                f"scheme is {shown(scheme)!r}; expected {' or '.join(RUNNING)}: others are exact "
                "only once all checkpoints are known, so use PolyakCheckpoint"
            )
        self.start_epoch, self.start_step = start_epoch, start_step or 1
        self.every, self.every_steps = every, every_steps
        # Where epochs are counted, Keras need not wait for each batch: nothing is done after it.
        self.async_safe = every_steps is None
        self.rows, self.batch_size = _take_rows(recalibrate, batch_size), batch_size
        self.count = self.nbytes = 0
        self.notes: tuple[str, ...] = ()
        self._multiply = RUNNING[scheme]
        self._steps, self._epoch = Steps(), 0
        self._sums: running.RunningMean | None = None

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Refuse what would come to nothing after hours of training."""
        del logs
        self._check_end()
        self.count = self.nbytes = 0
        self._steps, self._sums = Steps(), None
        layers = [
            layer
            for layer in self.model._flatten_layers()
            if isinstance(layer, keras.layers.BatchNormalization)
        ]
        if self.rows is not None and not layers:
            raise UsageError("recalibrate is given, but the model has no BatchNorm layer")
        if self.rows is not None:
            from polyak_cli.evaluation import batchnorm

            batchnorm.fit_rows(Path(self.model.name), self.model, self.rows)
        if self.rows is None and layers:
            warnings.warn(
                f"the statistics of {word_count(len(layers), 'BatchNorm layer')} will be averaged, "
                "and fit the averaged weights only roughly; give recalibrate=ROWS, training rows "
                "with which they are computed again",
                stacklevel=2,
            )

    def _check_end(self) -> None:
        """Refuse a training that ends before its weights count, as far as its end is known."""
        epochs, batches = self.params.get("epochs"), self.params.get("steps")
        if not epochs:
            return
        ends = [("epoch", epochs, -(-self.start_epoch // self.every) * self.every)]
        if self.every_steps is not None and batches:
            first = max(self.start_step, self.every_steps)
            if self.model.steps_per_execution == 1:  # else a multiple is reported at a later step
                first = -(-first // self.every_steps) * self.every_steps
            ends.append(("step", epochs * batches, first))
        for unit, end, first in ends:
            if end < first:
                raise UsageError(
                    f"weights count from {unit} {first} on, but fit ends after {unit} {end}: "
                    "nothing would be averaged"
                )

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Note the epoch, and where its steps begin."""
        del logs
        self._epoch = epoch + 1
        if self.every_steps is not None:
            self._steps.begin_epoch(epoch, self.params)

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Add the weights, if steps are counted and a multiple of ``every_steps`` is reached."""
        del logs
        if self.every_steps is None or not self._steps.end_batch(batch, self.every_steps):
            return
        if self._epoch >= self.start_epoch and self._steps.done >= self.start_step:
            self._add(f"step {self._steps.done}")

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Add the weights, if epochs are counted and it is one of every ``every``."""
        del logs
        counts = self.every_steps is None and (epoch + 1) % self.every == 0
        if counts and epoch + 1 >= self.start_epoch:
            self._add(f"epoch {epoch + 1}")

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Put the average into the model, and gather the statistics of its BatchNorm layers."""
        del logs
        if self._sums is None:
            warnings.warn(
                "training ended before its weights counted; the model has its last weights, and "
                "no average",
                stacklevel=2,
            )
            return
        divisor = make_mean([self._multiply(k + 1) for k in range(self.count)]).divisor
        for variable, raw in zip(self._list_variables(), self._sums.finish(divisor), strict=True):
            _assign(variable, raw)
        self._sums = None
        if self.rows is not None:
            self._recalibrate(self.rows)

    def _list_variables(self) -> list[Any]:
        """Return the variables that are averaged."""
        model = self.model  # with JAX, this brings the values of the training step into the model
        return [one for one in model.weights if str(one.dtype) in FLOATS]

    def _add(self, where: str) -> None:
        """Add the weights of this moment to the sums."""
        variables = self._list_variables()
        if self._sums is None:
            self._sums = running.begin(
                [one.path for one in variables],
                [str(one.dtype) for one in variables],
                [int(np.prod(one.shape)) for one in variables],
            )
            self.nbytes = self._sums.nbytes
        self.count += 1
        self._sums.add(_read(variables), self._multiply(self.count), where)

    def _recalibrate(self, rows: Split) -> None:
        """Compute the statistics of BatchNorm again, as `polyak recalibrate` does."""
        from polyak_cli.evaluation import batchnorm, recalibration

        found, self.notes = batchnorm.gather_in_memory(self.model, rows, batch_size=self.batch_size)
        order = "<" if sys.byteorder == "little" else ">"
        for variable, values in found:
            where = f"the new values of '{shown(variable.path)}'"
            raw = recalibration.round_values(values.ravel(), str(variable.dtype), order, where)
            _assign(variable, raw)


def _read(variables: list[Any]) -> Iterator[Any]:
    """Yield the values of variables, one at a time, so that no second model is in memory."""
    return (keras.ops.convert_to_numpy(one) for one in variables)


def _assign(variable: Any, raw: Any) -> None:
    """Set a variable from the bytes of its values."""
    # Keras has taught numpy the names of the other types, such as bfloat16.
    variable.assign(raw.view(np.dtype(str(variable.dtype))).reshape(variable.shape))


def _take_rows(given: Any, batch_size: int) -> Split | None:
    """Return the rows that are given to recalibrate with."""
    from polyak_cli.evaluation import batchnorm, data

    if given is None:
        return None
    features = tuple(given) if isinstance(given, list) else given
    split = isinstance(given, data.Split)
    if not split and not all(np.ndim(one) for one in data.list_arrays(features)):
        raise UsageError(
            f"recalibrate is of type {type(given).__name__}; expected training rows: an array, or "
            "a tuple or dict of arrays"
        )
    rows = (
        given
        if split
        # Labels are not used; there are as many as rows.
        else data.Split("recalibrate", features, data.list_arrays(features)[0])
    )
    batchnorm.check_rows(rows, batch_size)
    return rows


def _check_numbers(
    start_epoch: int, start_step: int | None, every: int, every_steps: int | None
) -> None:
    check_counts(
        ("start_step", "every_steps"),
        start_epoch=start_epoch,
        start_step=start_step,
        every=every,
        every_steps=every_steps,
    )
    if every_steps is not None and every != 1:
        raise UsageError(
            f"every is {every} epochs, but weights are averaged every {every_steps} steps; give "
            "one of the two"
        )
    if start_step is not None and every_steps is None:
        raise UsageError("start_step counts steps; give every_steps too, or start_epoch instead")
