"""The Keras callback that `polyak_cli.callbacks` offers: it averages while a model is trained.

Importing it imports keras, because a callback is a subclass of Keras's; so only that module imports
it.  Knows the names of its own checkpoints, but not how they are averaged.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any, Literal, TypedDict, Unpack, cast

from polyak_cli import pipeline
from polyak_cli.averaging import options as averaging_options
from polyak_cli.errors import CheckpointError, MissingExtraError, UsageError, shown

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
    """Saves a checkpoint at the end of epochs and averages the newest ones into one file.

    >>> model.fit(x, y, callbacks=[PolyakCheckpoint("ckpts", "latest.h5")])  # doctest: +SKIP

    Checkpoints and output appear whole under their names or not at all, and the output is to the
    byte what ``polyak average`` makes of the same checkpoints.  While there are fewer than
    ``last``, all are averaged.  A training that is resumed with ``initial_epoch`` continues with
    the checkpoints up to that epoch; later ones belong to an older run and are ignored.

    Args:
        checkpoints: a directory, for ``model_01.h5`` and so on with the output's suffix, or a path
            whose name has ``{epoch}``, counted from 1, and perhaps metrics, as for Keras's
            ModelCheckpoint: ``"ckpts/model_{epoch:02d}-{val_loss:.2f}.keras"``.  The suffix says
            what is saved: ``.h5`` and ``.keras`` the whole model, ``.weights.h5`` weights only.
        output: the average's file.
        last: how many of the newest checkpoints to average.
        scheme: the rule that gives coefficients.
        every: epochs from one checkpoint to the next.
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
        keep: int | None = None,
        force: bool = False,
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__()
        self.output = Path(output)
        self.folder, self.pattern, self.suffix = _parse_name(os.fspath(checkpoints), self.output)
        self.last, self.every, self.keep, self.force = last, every, keep, force
        self.options = cast(pipeline.Options, {"scheme": scheme, **settings})
        self.report: pipeline.Report | None = None
        self._run: list[Path] | None = None  # its checkpoints, oldest first; None before it begins
        _check_numbers(last, every, keep)
        pipeline.parse_options(self.options)

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Refuse an output that could not be replaced, before an epoch is wasted."""
        del logs
        if not self.force:
            pipeline.check_replaceable(self.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._run = None

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Find the checkpoints of an earlier part of the run, before its first epoch."""
        del logs
        if self._run is None:
            self._run = self._find_earlier(epoch)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Save a checkpoint, average, and delete old checkpoints."""
        if (epoch + 1) % self.every:
            return
        saved = self._save(epoch + 1, logs or {})
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

    def _save(self, epoch: int, logs: Mapping[str, Any]) -> Path:
        """Save the model under a hidden name, so that no half-written checkpoint is ever seen."""
        try:
            name = self.pattern.format(**{**logs, "epoch": epoch})
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

    def _find_earlier(self, epoch: int) -> list[Path]:
        """Return the checkpoints of the epochs before this one, oldest first."""
        pattern = _compile_pattern(self.pattern)
        found: dict[int, Path] = {}
        for path in sorted(self.folder.iterdir()):
            match = pattern.fullmatch(path.name)
            if not match or int(match["epoch"]) > epoch or path.name.startswith("."):
                continue
            other = found.setdefault(int(match["epoch"]), path)
            if other != path:
                raise CheckpointError(
                    f"{shown(other)} and {shown(path)} are both epoch {match['epoch']}; move one "
                    "away"
                )
        return [found[number] for number in sorted(found)]


def _parse_name(checkpoints: str, output: Path) -> tuple[Path, str, str]:
    """Return folder, pattern of the names, and suffix of the checkpoints."""
    path = Path(checkpoints)
    fields = [field for _, field, _, _ in Formatter().parse(path.name) if field is not None]
    if not fields and not path.name.endswith(_SUFFIXES):
        suffix = next((end for end in _SUFFIXES if output.name.endswith(end)), _SUFFIXES[1])
        return path, f"model_{{epoch:02d}}{suffix}", suffix
    if "epoch" not in fields:
        raise UsageError(
            f"{shown(checkpoints)}: has no {{epoch}} in its name, so that each checkpoint would "
            "replace the one before; expected one like 'ckpts/model_{epoch:02d}.h5', or a directory"
        )
    suffix = next((end for end in _SUFFIXES if path.name.endswith(end)), "")
    if not suffix:
        raise UsageError(
            f"{shown(checkpoints)}: has no suffix by which Keras knows what to save; expected one "
            f"of {', '.join(_SUFFIXES)}"
        )
    return path.parent, path.name, suffix


def _compile_pattern(pattern: str) -> re.Pattern[str]:
    """Return an expression that matches the names made from a pattern."""
    text = ""
    for literal, field, _, _ in Formatter().parse(pattern):
        text += re.escape(literal)
        if field == "epoch":
            text += r"\d+" if "<epoch>" in text else r"(?P<epoch>\d+)"
        elif field is not None:
            text += ".+?"
    return re.compile(text)


def _check_numbers(last: int, every: int, keep: int | None) -> None:
    for name, number in (("last", last), ("every", every), ("keep", keep)):
        if number is not None and number < 1:
            raise UsageError(f"{name} is {number}; expected at least 1")
    if keep is not None and keep < last:
        raise UsageError(f"keep is {keep}, but last is {last}: what is averaged must be kept")
