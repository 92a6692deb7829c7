"""Parse the options of `plan` and `average`, once, into frozen parts with the only defaults.

Knows no tensor and no file format.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar

import numpy as np

from polyak_cli import checkpoints, formats
from polyak_cli.averaging import places, schemes
from polyak_cli.checkpoints import snapshots
from polyak_cli.engine.slabs import Memory
from polyak_cli.errors import MissingExtraError, UsageError, shown
from polyak_cli.tensors import FLOATS

Source = str | os.PathLike[str]
Progress = Callable[[int], None]
Part = TypeVar("Part")

#: What `allow` takes: a refusal that rests on what the numbers mean -> what is averaged all the
#: same.  A refusal that rests on a file's form has no such way out.
ALLOWED: Mapping[str, str] = {
    "two-runs": "checkpoints whose values look like those of two runs",
    "scaled-integers": "integers that differ between checkpoints and seem to have a scale",
    "averages": "running means of the weights in checkpoints without the weights themselves",
    "other-assets": "checkpoints with different vocabularies, tokenizers or model configurations",
}


#: Name of an engine -> the package that it needs, which is that of its extra.
ENGINES: Mapping[str, str] = {"here": "", "dask": "distributed", "mpi": "mpi4py"}


class Options(TypedDict, total=False):
    """The options of an average by itself; every key may be left out.

    `pipeline.stages.Options` adds those of the stages around it.

    Attributes:
        last: how many of the newest to use; fewer are an error.
        from_epoch: the first epoch to use.
        to_epoch: the last epoch to use.
        every: use each n-th, counted back from the newest; 1.
        min_spacing: use the newest, and before it those that are at least so many epochs or steps
            apart, whichever the names have.
        target_count: use so many, as evenly spaced as they can be; fewer are an error.
        exclude: globs of file names that are left out.
        best: how many of the best to use, by ``monitor``.
        best_by: "value" (the default), or "lifespan": those that stayed the best for the most later
            checkpoints.
        monitor: the metric of ``best``; "val_loss".
        mode: "min" or "max", whichever is better; by default found from the metric's name.
        log: a file of the CSVLogger of Keras or Lightning with the metric; by default it is in the
            file names.
        log_first: what the log calls the epoch that file names call 1: 0, as Keras counts, or 1.
        epoch_pattern: a regular expression that finds the epoch in a name.
        order: "given" keeps the order of files given one by one; "epoch" is the default.
        snapshots: of "posthoc", a CSV or JSON file with file, step and sigma of each snapshot, or
            the sigmas with commas between them, of files that are named INDEX.STEP.pt; by default
            both are in the names.
        scheme: "equal" (the default), "linear", "exp", "ema", "power", "decay",
            "window", "posthoc".
        alpha: the parameter of "exp": the age, in checkpoints, at which a weight falls to 1 / e.
        decay: the parameter of "ema": the factor of the weight for each checkpoint of age.
        sigma: the parameter of "power" and "posthoc": the relative width, as a part of the run's
            length.
        shape: the parameter of "decay": of the decay that it replaces, "linear", "1-sqrt" or
            "cosine".
        ema_half_life: "ema" and "power" in another way: the epochs or steps in which a weight falls
            by half; for "power", at the end of the run.
        from_first: "ema" starts from the oldest checkpoint, as in training, and is not debiased.
        ramp: "ema" begins with smaller decays, as in TensorFlow Addons ("tfa"), "ema-pytorch" or
            "edm2", and starts from the oldest checkpoint.
        coefficients: weights in place of a scheme, one a checkpoint, oldest first, of any sign.
        dtype: the float type to store, such as "float32" or "bfloat16"; by default that of the
            newest checkpoint.
        optimizer: "drop" (the default) leaves the optimizer's state out; "newest" copies that of
            the newest checkpoint.
        include_tensors: globs of names: average only these tensors.
        exclude_tensors: globs of names: copy these tensors from the newest checkpoint.
        match: pair tensors by "name" (the default), or by "order" in the model.
        use_ema: average the EMAs that the trainer keeps, in place of the model's tensors.
        allow_nonfinite: average NaN and infinity too.
        allow: what else to average although it is refused by default, such as "two-runs"; see the
            option ``--allow`` of `polyak average`.
        lora: "factors" (the default) averages factors whose product is meant (LoRA, DoRA, weight
            norm) by themselves; "exact" writes factors of the mean product.
        strip_prefix: beginnings of names, such as "module.", that are ignored in pairing.
        key: of the part of PyTorch checkpoints to average, such as "state_dict" or "model/ema"; the
            rest is the newest's, or left out of an output of another format.
        force: replace an existing output.
        hash: record the SHA-256 of each input; by default if all have 64 MB at most in all.
        only_weights: write nothing but the tensors into an output folder, no configuration and no
            tokenizer, and of a distributed checkpoint of PyTorch no optimizer state; also a
            ``.weights.h5`` of whole Keras models.
        verify: before the output gets its name, read it back from the disk, and compare it bit for
            bit with the average computed once more.
        max_memory: bytes for buffers; 32 MiB.
        jobs: the number of threads or processes; by default that of the processors, at most 8.
        engine: who reads and folds: "here" (the default), the workers of "dask", or the ranks of
            "mpi"; max_memory is then that of each worker.
        scheduler: the address of Dask's scheduler; by default DASK_SCHEDULER_ADDRESS, else Dask is
            started on this machine, with ``jobs`` workers.
    """

    last: int | None
    from_epoch: int | None
    to_epoch: int | None
    every: int
    min_spacing: int | None
    target_count: int | None
    exclude: Sequence[str]
    best: int | None
    best_by: Literal["value", "lifespan"] | None
    monitor: str | None
    mode: str | None
    log: Source | None
    log_first: int | None
    epoch_pattern: str | None
    order: str | None
    snapshots: Source | None
    scheme: str | None
    alpha: float | None
    decay: float | None
    sigma: float | None
    shape: str | None
    ema_half_life: float | None
    from_first: bool
    ramp: Literal["tfa", "ema-pytorch", "edm2"] | None
    coefficients: Sequence[float] | None
    dtype: str | None
    optimizer: Literal["drop", "newest"]
    include_tensors: Sequence[str]
    exclude_tensors: Sequence[str]
    match: Literal["name", "order"]
    use_ema: bool
    allow_nonfinite: bool
    allow: Sequence[str]
    lora: Literal["factors", "exact"]
    strip_prefix: Sequence[str]
    key: str
    force: bool
    hash: bool | None
    only_weights: bool
    verify: bool
    max_memory: int | None
    jobs: int | None
    engine: Literal["here", "dask", "mpi"]
    scheduler: str | None


@dataclass(frozen=True, slots=True)
class Choice:
    """Which checkpoints count; see `checkpoints.select`."""

    last: int | None = None
    from_epoch: int | None = None
    to_epoch: int | None = None
    every: int = 1
    min_spacing: int | None = None
    target_count: int | None = None
    exclude: tuple[str, ...] = ()
    best: int | None = None
    best_by: str | None = None
    monitor: str | None = None
    mode: str | None = None
    log: Source | None = None
    log_first: int | None = None
    epoch_pattern: str | None = None
    order: str | None = None
    snapshots: Source | None = None


@dataclass(frozen=True, slots=True)
class Weighting:
    """How much each checkpoint counts; see `schemes.coefficients`."""

    scheme: str | None = None
    alpha: float | None = None
    decay: float | None = None
    sigma: float | None = None
    shape: str | None = None
    ema_half_life: float | None = None
    from_first: bool = False
    ramp: str | None = None
    coefficients: tuple[float, ...] | None = None

    def resolve(self) -> schemes.UsedScheme:
        """Return the scheme and its parameters.

        Raises:
            UsageError: they contradict one another, or are out of range.
        """
        given = {name: getattr(self, name) for name in schemes.PARAMETERS}
        return schemes.resolve(self.scheme, given, custom=self.coefficients)

    def compute(self, positions: Sequence[float], sigmas: Sequence[float] = ()) -> schemes.Mean:
        """Return the mean of checkpoints at these positions, oldest first; see `schemes`.

        Raises:
            UsageError: own coefficients do not fit the number of checkpoints.
        """
        return schemes.compute_mean(self.resolve(), positions, self.coefficients, sigmas)


@dataclass(frozen=True, slots=True)
class Tensors:
    """The options that decide the values of an average; its record has all of them."""

    dtype: str | None = None
    optimizer: Literal["drop", "newest"] = "drop"
    match: Literal["name", "order"] = "name"
    use_ema: bool = False
    include_tensors: tuple[str, ...] = ()
    exclude_tensors: tuple[str, ...] = ()
    allow_nonfinite: bool = False
    allow: tuple[str, ...] = ()
    lora: Literal["factors", "exact"] = "factors"
    strip_prefix: tuple[str, ...] = ()
    key: str = ""


@dataclass(frozen=True, slots=True)
class Output:
    """How the output is published."""

    force: bool = False
    hash: bool | None = None  # None: if all inputs have `hashing.HASHED` bytes at most
    only_weights: bool = False  # of a folder's files
    verify: bool = False


@dataclass(frozen=True, slots=True)
class Machine:
    """How much of the machine an average may use."""

    #: Bytes for the buffers of the engine; the interpreter with numpy and h5py comes on top.
    max_memory: int = 32 << 20
    jobs: int = field(default_factory=lambda: min(8, _count_processors()))
    engine: Literal["here", "dask", "mpi"] = "here"
    scheduler: str | None = None

    def share(self, averages: int = 1) -> Memory:
        """Divide the bound on buffers among the workers that fold."""
        return Memory.within(self.max_memory, self.jobs, averages)

    def share_cluster(self) -> Memory:
        """Return the bound on the buffers of one worker of a cluster."""
        return Memory.within(self.max_memory, 1).align()


@dataclass(frozen=True, slots=True)
class Settings:
    """All options, parsed: the fields of its parts hold the only defaults."""

    choice: Choice = field(default_factory=Choice)
    weighting: Weighting = field(default_factory=Weighting)
    tensors: Tensors = field(default_factory=Tensors)
    output: Output = field(default_factory=Output)
    machine: Machine = field(default_factory=Machine)


#: Name in `Settings` -> the part; `parse` fills each with the options that are its fields.
PARTS = {
    "choice": Choice,
    "weighting": Weighting,
    "tensors": Tensors,
    "output": Output,
    "machine": Machine,
}


#: Options that are lists, and of what.
_LISTS = {
    "coefficients": "numbers",
    "exclude": "globs",
    "include_tensors": "globs",
    "exclude_tensors": "globs",
    "allow": "words",
    "strip_prefix": "prefixes",
}


#: Options that are whole numbers.
_WHOLE_NUMBERS = (
    *("last", "from_epoch", "to_epoch", "every", "min_spacing", "target_count"),
    *("best", "log_first", "jobs", "max_memory"),
)


def parse(options: Options) -> Settings:
    """Check options by themselves, before there is a checkpoint, and return them in parts.

    Raises:
        TypeError: there is no such option.
        UsageError: names the option and what it takes.
    """
    # A TypeError, as Python raises for an unknown keyword: the caller's mistake, not the user's.
    unknown = options.keys() - Options.__annotations__.keys()
    if unknown:
        raise TypeError(
            f"unknown option {', '.join(sorted(unknown))}; polyak_cli.Options lists all"
        )
    for key, what in _LISTS.items():
        if isinstance(options.get(key), str):  # a sequence too: of its letters
            raise UsageError(f"{key} is a single string; expected a list of {what}")
    for kind in options.get("allow") or ():
        check_choice({"allow": kind}, "allow", tuple(ALLOWED))
    check_whole_numbers(options, _WHOLE_NUMBERS)
    check_choice(options, "dtype", tuple(FLOATS))
    check_choice(options, "order", ("epoch", "given"))
    check_choice(options, "optimizer", ("drop", "newest"))
    check_choice(options, "match", ("name", "order"))
    check_choice(options, "lora", ("factors", "exact"))
    check_choice(options, "engine", tuple(ENGINES))
    settings = Settings(**{name: fill(part, options) for name, part in PARTS.items()})
    if schemes.takes_running_means(settings.weighting.scheme):
        # What is refused elsewhere is meant here; the record says so, for `verify`.
        allow = tuple(dict.fromkeys((*settings.tensors.allow, "averages")))
        settings = replace(settings, tensors=replace(settings.tensors, allow=allow))
    for option, value, least in (
        ("jobs", settings.machine.jobs, 1),
        ("max-memory", settings.machine.max_memory, 1 << 20),
    ):
        if value < least:
            raise UsageError(f"--{option} is {value}; expected at least {least}")
    check_engine(settings.machine)
    if settings.choice.snapshots is not None and settings.weighting.scheme != "posthoc":
        raise UsageError("--snapshots belongs to --scheme posthoc, which is missing")
    # A scheme and parameters that contradict one another are refused before any file is read.
    settings.weighting.resolve()
    return settings


def check_engine(machine: Machine) -> None:
    """Refuse an engine whose package is missing, and a scheduler without its engine.

    Raises:
        MissingExtraError: names the extra.
        UsageError: the options contradict one another.
    """
    if machine.scheduler and machine.engine != "dask":
        raise UsageError(
            "--scheduler is the address of a Dask scheduler; use it with --engine dask"
        )
    package = ENGINES[machine.engine]
    if package and find_spec(package) is None:
        raise MissingExtraError(f"--engine {machine.engine}", machine.engine)


def fill(part: Callable[..., Part], options: Mapping[str, Any]) -> Part:
    """Return a part with the options that are its fields.

    None stands for the default, and lists become tuples, so that parts never change.
    """
    given = {}
    for one in fields(part):  # type: ignore[arg-type] # every part is a dataclass
        value = options.get(one.name)
        if value is not None:
            given[one.name] = tuple(value) if isinstance(value, list) else value
    return part(**given)


def check_whole_numbers(options: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Refuse what is neither a whole number nor left out."""
    for key in keys:
        # Elements of numpy arrays are no instances of int.
        if not isinstance(options.get(key), (int, np.integer, type(None))):
            raise UsageError(f"{key} is {options.get(key)!r}; expected a whole number")


def check_choice(options: Mapping[str, Any], key: str, allowed: Sequence[str]) -> None:
    """Refuse a value that an option does not take."""
    value = options.get(key)
    if value is not None and value not in allowed:
        option = key.replace("_", "-")
        raise UsageError(f"--{option} is {shown(value)}; expected one of {', '.join(allowed)}")


def select(
    sources: Source | Sequence[Source],
    choice: Choice,
    *,
    use_ema: bool = False,
    weighting: Weighting | None = None,
    growing: bool = False,
    find_polyak_outputs: Callable[[Sequence[Path]], Collection[Path]] = formats.find_polyak_outputs,
) -> checkpoints.Selection:
    """Choose checkpoints; see `checkpoints.select`.

    The positions are those that the scheme needs.
    """
    scheme = weighting.scheme if weighting else None
    # A text is a sequence too, of its letters.
    listed = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    if weighting and scheme == "posthoc":
        found = _find_snapshots(listed, choice, use_ema, find_polyak_outputs)
        return places.place_snapshots(found, float(weighting.resolve().parameters["sigma"]))
    chosen = checkpoints.select(
        listed,
        last=choice.last,
        from_epoch=choice.from_epoch,
        to_epoch=choice.to_epoch,
        every=choice.every,
        min_spacing=choice.min_spacing,
        target_count=choice.target_count,
        exclude=choice.exclude,
        best=choice.best,
        best_by=choice.best_by,
        monitor=choice.monitor,
        mode=choice.mode,
        log=choice.log,
        log_first=choice.log_first,
        epoch_pattern=choice.epoch_pattern,
        order=choice.order,
        growing=growing,
        use_ema=use_ema,
        find_polyak_outputs=find_polyak_outputs,
    )
    return places.place_running_means(chosen) if scheme == "window" else chosen


#: Fields of `Choice` that choose among EMA snapshots too.
_OF_SNAPSHOTS = ("exclude", "from_epoch", "to_epoch", "snapshots")


def _find_snapshots(
    sources: Sequence[Source],
    choice: Choice,
    use_ema: bool,
    find_polyak_outputs: Callable[[Sequence[Path]], Collection[Path]],
) -> snapshots.Snapshots:
    """Find EMA snapshots; refuse options that would choose some of them by other rules."""
    for one in fields(choice):
        if one.name not in _OF_SNAPSHOTS and getattr(choice, one.name) != one.default:
            raise UsageError(
                f"--scheme posthoc combines all snapshots, and --{one.name.replace('_', '-')} "
                "would leave some out or order them; choose them with --exclude, or by step with "
                "--from and --to"
            )
    return snapshots.find_snapshots(
        sources,
        None if choice.snapshots is None else os.fspath(choice.snapshots),
        exclude=choice.exclude,
        from_step=choice.from_epoch,
        to_step=choice.to_epoch,
        use_ema=use_ema,
        find_polyak_outputs=find_polyak_outputs,
    )


def _count_processors() -> int:
    """Return the processors this process may use, which macOS does not report."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
