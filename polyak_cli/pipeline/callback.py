"""The Keras callback that `polyak_cli.callbacks` offers: it averages while a model is trained.

Importing it imports keras, because a callback is a subclass of Keras's; so only that module imports
it.  Knows the names of its own checkpoints, but not how they are averaged.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any, Literal, TypedDict, Unpack, cast

from polyak_cli import pipeline
from polyak_cli.averaging import options as averaging_options
from polyak_cli.averaging import schemes
from polyak_cli.errors import CheckpointError, MissingExtraError, UsageError, shown
from polyak_cli.pipeline.report import Report
from polyak_cli.pipeline.stages import Options, parse_options
from polyak_cli.pipeline.steps import Steps, check_counts

try:
    import keras
except ModuleNotFoundError:
    raise MissingExtraError("polyak_cli.callbacks", "tensorflow") from None

#: Suffixes by which Keras decides what to save; the longer first.
_SUFFIXES = (".weights.h5", ".h5", ".hdf5", ".keras")


class Settings(TypedDict, total=False):
    """Options of averaging besides the scheme; see `polyak_cli.Options`."""

    alpha: float | None
    decay: float | None
    sigma: float | None
    shape: str | None
    ema_half_life: float | None
    from_first: bool
    ramp: Literal["tfa", "ema-pytorch", "edm2"] | None
    dtype: str | None
    optimizer: Literal["drop", "newest"]
    match: Literal["name", "order"]
    include_tensors: Sequence[str]
    exclude_tensors: Sequence[str]
    use_ema: bool
    allow_nonfinite: bool
    allow: Sequence[str]
    lora: Literal["factors", "exact"]
    strip_prefix: Sequence[str]
    key: str
    hash: bool | None
    max_memory: int | None
    jobs: int | None


class PolyakCheckpoint(keras.callbacks.Callback):  # type: ignore[misc]  # keras ships no types
    """Saves a checkpoint every epoch, or every few batches, and averages the newest ones.

    >>> model.fit(x, y, callbacks=[PolyakCheckpoint("ckpts", "latest.h5")])  # doctest: +SKIP

    Checkpoints and output appear whole under their names or not at all, and the output is to the
    byte what ``polyak average`` makes of the same checkpoints.  While there are fewer than
    ``last``, all are averaged.  A training that is resumed with ``initial_epoch`` continues with
    the checkpoints up to that epoch; later ones belong to an older run and are ignored.

    A step is one batch, counted from the start of epoch 1.  Checkpoints are saved at the multiples
    of ``every_steps``; with ``steps_per_execution``, at the first step that Keras reports from
    there on.  ``initial_epoch=E`` begins at step E times the batches of an epoch.

    Args:
        checkpoints: a directory, for ``model_01.h5`` and so on with the output's suffix, or
            ``model_step_000100.h5`` where steps are counted; or a path whose name has ``{epoch}``,
            counted from 1, or ``{step}``, and perhaps metrics, as for Keras's ModelCheckpoint:
            ``"ckpts/model_{epoch:02d}-{val_loss:.2f}.keras"``.  The suffix says what is saved:
            ``.h5`` and ``.keras`` the whole model, ``.weights.h5`` weights only.
        output: the average's file.
        last: how many of the newest checkpoints to average.
        scheme: the rule that gives coefficients; the default, "exp", counts newer ones more, and
            "equal" is the plain mean.
        every: epochs from one checkpoint to the next.
        every_steps: batches from one checkpoint to the next, instead of epochs.
        save_freq: as for ModelCheckpoint: "epoch", or a number of batches, as ``every_steps``.
        keep: how many of the newest checkpoints to keep, at least ``last``; None keeps all.
        force: replace an output that is no average by polyak.
        **settings: see `Settings`.

    Attributes:
        report: of the last average, None before.

    Raises:
        UsageError: the arguments contradict one another or are out of range.
        PolyakError: out of ``fit``, when the output is in the way or cannot be written, or values
            cannot be averaged; an older output is left as it is.
    """

    def __init__(
        self,
        checkpoints: averaging_options.Source,
        output: averaging_options.Source = "latest.h5",
        *,
        last: int = 10,
        scheme: str = "exp",
        every: int = 1,
        every_steps: int | None = None,
        save_freq: int | Literal["epoch"] = "epoch",
        keep: int | None = None,
        force: bool = False,
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__()
        check_counts(
            ("every_steps", "keep"), last=last, every=every, every_steps=every_steps, keep=keep
        )
        self.output = Path(output)
        self.every, self.every_steps = every, _choose_steps(every, every_steps, save_freq)
        self.counted: Literal["epoch", "step"] = "epoch" if self.every_steps is None else "step"
        # Where epochs are counted, Keras need not wait for each batch: nothing is done after it.
        self.async_safe = self.every_steps is None
        names = _parse_name(os.fspath(checkpoints), self.output, self.counted)
        self.folder, self.pattern, self.suffix = names
        self.last, self.keep, self.force = last, keep, force
        self.options = cast(Options, {"scheme": scheme, **settings})
        self.report: Report | None = None
        self._run: list[Path] | None = None  # its checkpoints, oldest first; None before it begins
        self._steps = Steps()
        if keep is not None and keep < last:
            raise UsageError(f"keep is {keep}, but last is {last}: what is averaged must be kept")
        _check_settings(settings)
        parse_options(self.options)
        schemes.refuse_running_means(scheme, "PolyakCheckpoint")

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Refuse an output that could not be replaced, before an epoch is wasted."""
        del logs
        if not self.force:
            pipeline.check_replaceable(self.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._run, self._steps = None, Steps()

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Find the checkpoints of an earlier part of the run, before its first epoch."""
        del logs
        if self.every_steps is not None:
            self._steps.begin_epoch(epoch, self.params)
        if self._run is None:
            self._run = self._find_earlier(epoch if self.every_steps is None else self._steps.done)

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Save and average, if steps are counted and a multiple of ``every_steps`` is reached."""
        if self.every_steps is not None and self._steps.end_batch(batch, self.every_steps):
            self._add(self._steps.done, logs or {})

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Save and average, if epochs are counted and it is one of every ``every``."""
        if self.every_steps is None and (epoch + 1) % self.every == 0:
            self._add(epoch + 1, logs or {})

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Warn where the training was too short for a checkpoint."""
        del logs
        if self.report is None:
            warnings.warn(
                "training ended before a checkpoint was saved; there is no average", stacklevel=2
            )

    def _add(self, number: int, logs: Mapping[str, Any]) -> None:
        """Save the checkpoint of an epoch or step, average, and delete old checkpoints."""
        saved = self._save(number, logs)
        run = [path for path in self._run or () if path != saved and path.is_file()]
        run.append(saved)
        options = self.options.copy()
        options["last"] = min(self.last, len(run))
        options["force"] = True
        self.report = pipeline.average(run, self.output, **options)
        old = run[: -self.keep] if self.keep else []
        for path in old:  # only after the average was published
            path.unlink(missing_ok=True)
        self._run = run[len(old) :]

    def _save(self, number: int, logs: Mapping[str, Any]) -> Path:
        """Save the model under a hidden name, so that no half-written checkpoint is ever seen."""
        try:
            name = self.pattern.format(**{**logs, self.counted: number})
        except KeyError as missing:
            raise UsageError(
                f"{shown(self.pattern)}: there is no metric {shown(missing)}; choose from "
                f"{', '.join(map(shown, logs)) or 'none'}"
            ) from None
        hidden = self.folder / f".{name.removesuffix(self.suffix)}.partial{self.suffix}"
        save = self.model.save_weights if self.suffix == ".weights.h5" else self.model.save
        try:
            save(hidden)
            return hidden.replace(self.folder / name)
        finally:
            hidden.unlink(missing_ok=True)

    def _find_earlier(self, done: int) -> list[Path]:
        """Return the checkpoints of the epochs or steps that are done, oldest first."""
        pattern = _compile_pattern(self.pattern, self.counted)
        found: dict[int, Path] = {}
        for path in sorted(self.folder.iterdir()):
            match = pattern.fullmatch(path.name)
            if not match or int(match["number"]) > done or path.name.startswith("."):
                continue
            other = found.setdefault(int(match["number"]), path)
            if other != path:
                raise CheckpointError(
                    f"{shown(other)} and {shown(path)} are both {self.counted} "
                    f"{match['number']}; move one away"
                )
        return [found[number] for number in sorted(found)]


def _choose_steps(every: int, every_steps: int | None, save_freq: object) -> int | None:
    """Return how many batches lie between checkpoints, or None where epochs are counted."""
    if save_freq != "epoch":
        if isinstance(save_freq, bool) or not isinstance(save_freq, int):
            raise UsageError(
                f"save_freq is {shown(save_freq)!r}; expected 'epoch' or a number of batches"
            )
        check_counts(save_freq=save_freq)
        if every_steps is not None:
            raise UsageError("save_freq and every_steps mean the same; give one of them")
        every_steps = save_freq
    if every_steps is not None and every != 1:
        raise UsageError(
            f"every is {every} epochs, but checkpoints are saved every {every_steps} steps; give "
            "one of the two"
        )
    return every_steps


def _parse_name(checkpoints: str, output: Path, counted: str) -> tuple[Path, str, str]:
    """Return folder, pattern of the names, and suffix of the checkpoints.

    Args:
        checkpoints: a directory or a pattern.
        output: whose suffix those in a directory get.
        counted: what numbers the checkpoints: "epoch" or "step".
    """
    path = Path(checkpoints)
    fields = [field for _, field, _, _ in Formatter().parse(path.name) if field is not None]
    usual = "model_{epoch:02d}" if counted == "epoch" else "model_step_{step:06d}"
    if not fields and not path.name.endswith(_SUFFIXES):
        suffix = next((end for end in _SUFFIXES if output.name.endswith(end)), _SUFFIXES[1])
        return path, f"{usual}{suffix}", suffix
    # A step's name must hold no other count: several steps have the same epoch, and each epoch has
    # the same batches, so that nobody could order the files by their names.
    others = {"epoch", "step", "batch"} - {counted} if counted == "step" else {"step"}
    stray = [field for field in fields if field in others]
    expected = f"expected one like 'ckpts/{usual}.h5', or a directory"
    if stray:
        raise UsageError(
            f"{shown(checkpoints)}: has {{{stray[0]}}} in its name, but these checkpoints are "
            f"numbered by {counted}; {expected}"
        )
    if counted not in fields:
        raise UsageError(
            f"{shown(checkpoints)}: has no {{{counted}}} in its name, so that each checkpoint "
            f"would replace the one before; {expected}"
        )
    suffix = next((end for end in _SUFFIXES if path.name.endswith(end)), "")
    if not suffix:
        raise UsageError(
            f"{shown(checkpoints)}: has no suffix by which Keras knows what to save; expected one "
            f"of {', '.join(_SUFFIXES)}"
        )
    return path.parent, path.name, suffix


def _compile_pattern(pattern: str, counted: str) -> re.Pattern[str]:
    """Return an expression that matches the names made from a pattern."""
    text = ""
    for literal, field, _, _ in Formatter().parse(pattern):
        text += re.escape(literal)
        if field == counted:
            text += r"\d+" if "<number>" in text else r"(?P<number>\d+)"
        elif field is not None:
            text += ".+?"
    return re.compile(text)


def _check_settings(settings: Mapping[str, object]) -> None:
    """Refuse options that `Settings` does not have, before a training fails by them.

    Those that choose checkpoints would find too few in the first epochs.
    """
    unknown = settings.keys() - Settings.__annotations__.keys()
    if unknown:
        raise TypeError(
            f"PolyakCheckpoint has no option {', '.join(sorted(unknown))}: it averages the newest "
            "checkpoints by a scheme; polyak watch has all options of polyak average"
        )
