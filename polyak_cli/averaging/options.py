"""Say what `plan` and `average` accept, and choose checkpoints and coefficients as asked.

Knows no tensor and no file format.
"""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

import numpy as np

from polyak_cli import checkpoints, formats
from polyak_cli.averaging import schemes
from polyak_cli.engine.slabs import Memory
from polyak_cli.errors import UsageError, shown
from polyak_cli.tensors import FLOATS

if TYPE_CHECKING:  # what knows of Keras is imported where it is asked for
    from polyak_cli.evaluation.data import Split

Source = str | os.PathLike[str]
Progress = Callable[[int], None]
#: Bound on the buffers of the engine; the interpreter with numpy and h5py comes on top.
MAX_MEMORY = 32 << 20
#: Rows that a model is run on at a time where it is recalibrated.
BATCH_SIZE = 256


class Options(TypedDict, total=False):
    """What `plan` and `average` may be told; every key may be left out.

    Attributes:
        last: only the newest so many; an error when there are fewer.
        from_epoch: the first epoch that counts.
        to_epoch: the last epoch that counts.
        every: every so many-th, counted back from the newest; 1.
        exclude: globs of file names that are not checkpoints.
        best: only the best so many by ``monitor``.
        monitor: the metric; "val_loss" with ``best``.
        mode: "min" or "max"; told by the metric's name.
        log: a Keras CSVLogger file with the metric.
        epoch_pattern: a regular expression that finds the epoch in a name.
        scheme: "equal" (the default), "linear", "exp", "ema", "power".
        alpha: of exp.
        decay: of ema.
        sigma: of power.
        coefficients: in place of a scheme, oldest first.
        dtype: stored float type, one of `tensors.FLOATS`; as in the template.
        optimizer: what becomes of the optimizer's state; "drop".
        include_tensors: globs: average only these.
        exclude_tensors: globs: carry these.
        match: how tensors are paired; "name".
        use_ema: take the EMAs that the optimizer keeps in place of the model's own tensors.
        allow_nonfinite: average NaN and infinity too.
        on_unhealthy: "fail" or "skip": `check` the chosen checkpoints first, and refuse them when
            anything is wrong, or average those that are healthy; None does neither.
        recalibrate: rows over which the average's BatchNorm statistics are gathered anew, by Keras;
            see `recalibrate`.
        batch_size: of these rows at a time, at most; `BATCH_SIZE`.
        trust_code: run the code that the model carries in a Lambda layer, to recalibrate it.
        force: replace an existing output.
        hash: record each input's SHA-256; where it is not said, if all have `HASHED` bytes at most.
        verify: read the output back from the disk before it gets its name, and compare it, bit for
            bit, with the average computed once more.
        max_memory: bytes for buffers; `MAX_MEMORY`.
        jobs: processes that fold; as many as there are processors, at most 8.
    """

    last: int | None
    from_epoch: int | None
    to_epoch: int | None
    every: int
    exclude: Sequence[str]
    best: int | None
    monitor: str | None
    mode: str | None
    log: Source | None
    epoch_pattern: str | None
    scheme: str | None
    alpha: float | None
    decay: float | None
    sigma: float | None
    coefficients: Sequence[float] | None
    dtype: str | None
    optimizer: Literal["drop", "newest"]
    include_tensors: Sequence[str]
    exclude_tensors: Sequence[str]
    match: Literal["name", "order"]
    use_ema: bool
    allow_nonfinite: bool
    on_unhealthy: Literal["fail", "skip"] | None
    recalibrate: Split | None
    batch_size: int | None
    trust_code: bool
    force: bool
    hash: bool | None
    verify: bool
    max_memory: int | None
    jobs: int | None


def check_options(options: Options) -> None:
    """Refuse what can be refused before there is a checkpoint.

    Raises:
        UsageError: names the option and what it takes.
    """
    unknown = options.keys() - Options.__annotations__.keys()
    if unknown:
        raise TypeError(f"there is no option {', '.join(sorted(unknown))}; see Options")
    for key in ("exclude", "include_tensors", "exclude_tensors"):
        if isinstance(options.get(key), str):  # a sequence too: of its letters
            raise UsageError(f"{key} is one text; expected a list of globs")
    for key in (
        "last",
        "from_epoch",
        "to_epoch",
        "every",
        "best",
        "jobs",
        "max_memory",
        "batch_size",
    ):
        if not isinstance(options.get(key), (int, np.integer, type(None))):
            raise UsageError(f"{key} is {options.get(key)!r}; expected a whole number")
    choices = {
        "dtype": (None, *FLOATS),
        "optimizer": ("drop", "newest"),
        "match": ("name", "order"),
        "on_unhealthy": (None, "fail", "skip"),
    }
    for key, allowed in choices.items():
        value = options.get(key, allowed[0])
        if value not in allowed:
            named = ", ".join(str(choice) for choice in allowed if choice)
            option = key.replace("_", "-")
            raise UsageError(f"--{option} is {shown(value)}; expected one of {named}")
    if options.get("on_unhealthy") and options.get("use_ema"):
        raise UsageError(
            "--on-unhealthy looks at the model's own tensors, not at the EMAs of --use-ema; leave "
            "one of them out"
        )
    for key, least in (("jobs", 1), ("max_memory", 1 << 20)):
        value = options.get(key)
        if isinstance(value, int) and value < least:
            raise UsageError(f"--{key.replace('_', '-')} is {value}; expected at least {least}")
    _choice(options)

    for key in ("batch_size", "trust_code"):
        if options.get(key) and options.get("recalibrate") is None:
            raise UsageError(
                f"--{key.replace('_', '-')} belongs to --recalibrate, which is missing"
            )


def batch_size_of(options: Options) -> int:
    """Return the rows that a model is run on at a time."""
    size = options.get("batch_size")
    return BATCH_SIZE if size is None else size


def select(
    sources: Source | Sequence[Source],
    options: Options,
    *,
    growing: bool = False,
    find_polyak_outputs: Callable[[Sequence[Path]], Collection[Path]] = formats.find_polyak_outputs,
) -> checkpoints.Selection:
    """Choose checkpoints as the options say; see `checkpoints.select`."""
    listed = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    return checkpoints.select(
        listed,
        last=options.get("last"),
        from_epoch=options.get("from_epoch"),
        to_epoch=options.get("to_epoch"),
        every=options.get("every", 1),
        exclude=options.get("exclude", ()),
        best=options.get("best"),
        monitor=options.get("monitor"),
        mode=options.get("mode"),
        log=options.get("log"),
        epoch_pattern=options.get("epoch_pattern"),
        growing=growing,
        find_polyak_outputs=find_polyak_outputs,
    )


def plan_memory(options: Options, averages: int = 1) -> Memory:
    """Divide the bound on buffers among the processes that fold."""
    jobs = options.get("jobs") or min(8, _processors())
    return Memory.within(options.get("max_memory") or MAX_MEMORY, jobs, averages)


def _processors() -> int:
    """Return the processors this process may use, which macOS does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_coefficients(
    positions: Sequence[float], options: Options
) -> tuple[schemes.Choice, tuple[float, ...]]:
    """Return the scheme and one coefficient a checkpoint, oldest first."""
    return _choice(options), schemes.coefficients(
        options.get("scheme"),
        positions,
        alpha=options.get("alpha"),
        decay=options.get("decay"),
        sigma=options.get("sigma"),
        custom=options.get("coefficients"),
    )


def _choice(options: Options) -> schemes.Choice:
    return schemes.resolve(
        options.get("scheme"),
        alpha=options.get("alpha"),
        decay=options.get("decay"),
        sigma=options.get("sigma"),
        custom=options.get("coefficients"),
    )


def measure_peak() -> int:
    """Return the peak memory of the largest process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage's unit differs
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    try:
        # Linux's getrusage also counts what the process was before exec: a large caller's size.
        status = Path("/proc/self/status").read_text()
    except OSError:
        return max(children, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return max(children, int(found[1]) * 1024 if found else 0)
