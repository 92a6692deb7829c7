"""WHICH files: find checkpoints, read epoch and metric from their names, order and select them.

Knows directories, names, and the CSV log that Keras writes beside a run.  Knows nothing of what is
inside a checkpoint and never opens one: a file is judged by its name and by os.stat() alone, so a
pipe or a device that is named like a checkpoint cannot hold the program up.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from polyak_cli.errors import CheckpointError, UsageError, shown

_StrPath = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One saved model file of a run, or a folder that is one, with what was read about it.

    ``epoch`` is None for a file that was named by itself and has no number in its name; ``metric``
    is None unless the best checkpoints were asked for.
    """

    path: Path
    epoch: int | None
    metric: float | None


@dataclass(frozen=True, slots=True)
class PassedOver:
    """Something in a directory, or excluded, that is not taken for a checkpoint of the run."""

    path: Path
    reason: str


class Trouble(NamedTuple):
    """What keeps the checkpoints of a run from being told apart or ordered."""

    kind: str  # "unreadable", "same file", "no epoch", "duplicate epoch" or "other run"
    path: Path  # which checkpoint it is about
    text: str


@dataclass(frozen=True, slots=True)
class Selection:
    """The checkpoints to average, oldest first, and what there is to say about the choice.

    ``positions`` has one number a checkpoint: how far into the run it was saved, in epochs counted
    from 1, or just 1, 2, 3, ... where not every epoch is known. ``left_out`` are the checkpoints of
    the run that were found and not chosen. ``thinned`` says that some between them were left out on
    purpose, so that a gap in the epochs means nothing. ``troubles`` are what `survey` found.
    """

    checkpoints: tuple[Checkpoint, ...]
    passed_over: tuple[PassedOver, ...]
    notes: tuple[str, ...]
    positions: tuple[float, ...]
    left_out: tuple[Path, ...] = ()
    thinned: bool = False
    troubles: tuple[Trouble, ...] = ()


def _no_file(_: Sequence[Path]) -> Collection[Path]:
    return ()


def select(
    sources: Sequence[_StrPath],
    *,
    last: int | None = None,
    from_epoch: int | None = None,
    to_epoch: int | None = None,
    every: int = 1,
    exclude: Sequence[str] = (),
    best: int | None = None,
    monitor: str | None = None,
    mode: str | None = None,
    log: _StrPath | None = None,
    epoch_pattern: str | None = None,
    growing: bool = False,
    written_by_us: Callable[[Sequence[Path]], Collection[Path]] = _no_file,
) -> Selection:
    r"""Find the checkpoints of a run and choose some of them.

    The restrictions apply in this order: ``exclude``, ``from_epoch`` and ``to_epoch``, ``every``,
    ``last``, ``best``.

    Args:
        sources: directories (not searched deeper, but for folders that are one checkpoint each, as
            Transformers saves them), patterns with ``* ? [``, and files. Files alone
            keep the order given, oldest first; with a directory or a pattern among the sources, all
            are ordered by the epoch in their names.
        last: how many of the newest to take; never fewer.
        from_epoch: the first epoch to take.
        to_epoch: the last epoch to take.
        every: take the newest, and each ``every``-th before it.
        exclude: patterns for file names or whole paths that are to be left out.
        best: how many to take by metric; ties go to the newer one. They stay in order of epoch.
        monitor: the metric for ``best``, ``val_loss`` unless given.
        mode: ``min`` or ``max``, whichever is better; told from the metric's name unless given.
        log: a CSV file of Keras' CSVLogger to read the metric from, instead of from the file names.
        epoch_pattern: a regular expression searched for in each file's name; its group ``epoch``,
            else its first group, else all that it matches, is the epoch.
        growing: the run goes on, so that it is no error when there are fewer checkpoints than were
            asked for, or none at all yet.
        written_by_us: says which of the given files are averages that an earlier run wrote there.
            Asked about regular files found in directories and by patterns only.

    Raises:
        UsageError: the arguments contradict one another or are out of range.
        CheckpointError: the checkpoints cannot be found, ordered or selected.
    """
    _check_counts(last=last, every=every, best=best)
    monitor, better = _check_monitor(best, monitor, mode, log)
    _check_bounds(from_epoch, to_epoch)
    pattern = None if epoch_pattern is None else _compiled(epoch_pattern)
    pool = _find(_several(sources), exclude, growing, written_by_us, _refuse)
    ordered, notes = _ordered(pool, pattern)
    spaced = _within(ordered, from_epoch, to_epoch, growing)[::-1][::every][::-1]
    chosen = _newest(spaced, last, len(ordered), growing)
    if best is not None and chosen:
        chosen, metric_notes = _best(chosen, ordered, best, growing, monitor, better, log)
        notes += metric_notes
    taken = {one.path for one in chosen}
    return Selection(
        checkpoints=tuple(chosen),
        passed_over=tuple(sorted(pool.passed_over, key=lambda passed: str(passed.path))),
        notes=(*pool.notes, *notes),
        positions=_positions(chosen, ordered),
        left_out=tuple(one.path for one in ordered if one.path not in taken),
        thinned=growing or every > 1 or best is not None or _thins(pool, exclude),
    )


def survey(
    sources: _StrPath | Sequence[_StrPath],
    *,
    last: int | None = None,
    from_epoch: int | None = None,
    to_epoch: int | None = None,
    exclude: Sequence[str] = (),
    epoch_pattern: str | None = None,
    written_by_us: Callable[[Sequence[Path]], Collection[Path]] = _no_file,
) -> Selection:
    """Find the checkpoints of a run as `select` does, but tell of what it would refuse.

    They are ordered by epoch, however the files were named; those whose epoch is not known come
    first.  Files named one by one that do not all tell an epoch keep the order given.

    Args:
        sources: as of `select`, like the other arguments.
        last: how many of the newest to take; never fewer.
        from_epoch: the first epoch to take.
        to_epoch: the last epoch to take.
        exclude: patterns for file names or whole paths that are to be left out.
        epoch_pattern: a regular expression that finds the epoch in a name.
        written_by_us: says which of the given files are averages.

    Returns:
        The checkpoints, with the ``troubles`` that were found.

    Raises:
        UsageError: the arguments contradict one another or are out of range.
        CheckpointError: there are no checkpoints.
    """
    _check_counts(last=last)
    _check_bounds(from_epoch, to_epoch)
    pattern = None if epoch_pattern is None else _compiled(epoch_pattern)
    troubles: list[Trouble] = []
    pool = _find(_several(sources), exclude, False, written_by_us, troubles.append)
    ordered = _ordered_as_far_as_known(pool, pattern, troubles.append)
    # Whether --from and --to mean those of unknown epoch cannot be told: they are looked at too.
    known = [one for one in ordered if one.epoch is not None]
    within = set(_within(known, from_epoch, to_epoch) if known else ())
    kept = [one for one in ordered if one.epoch is None or one in within]
    chosen = _newest(kept, last, len(ordered))
    taken = {one.path for one in chosen}
    left_out = tuple(one.path for one in ordered if one.path not in taken)
    return Selection(
        checkpoints=tuple(chosen),
        passed_over=tuple(sorted(pool.passed_over, key=lambda passed: str(passed.path))),
        notes=pool.notes,
        positions=_positions(chosen, ordered),
        left_out=left_out,
        thinned=_thins(pool, exclude),
        troubles=tuple(trouble for trouble in troubles if trouble.path not in left_out),
    )


def model_files(sources: _StrPath | Sequence[_StrPath]) -> tuple[list[Path], list[PassedOver]]:
    """Find every whole model that the sources name, to look at each by itself.

    Unlike `select`, this takes what lies together for no run: averages stand beside epochs, and a
    name needs no number.

    Args:
        sources: directories (not searched deeper), patterns with ``* ? [``, and files, which are
            taken whatever their names.

    Returns:
        The files, source by source, those of a directory or a pattern ordered by epoch where all
        their names tell one, else by name, numbers by their value; and what was passed over.

    Raises:
        UsageError: no sources are named.
        CheckpointError: a source is not there, cannot be listed, or holds no model.
    """
    found: list[Path] = []
    passed_over: list[PassedOver] = []
    for source in _several(sources):
        if os.path.lexists(source) and not Path(source).is_dir():
            found.append(Path(source))
            continue
        paths, _ = _expanded(source)
        reasons = {path: _why_not(path, _KINDS_OF_MODEL, "whole model") for path in paths}
        passed = [PassedOver(path, reason) for path, reason in reasons.items() if reason]
        models = [path for path, reason in reasons.items() if not reason]
        if not models:
            raise CheckpointError(_nothing_in(source, passed, "model", _KINDS_OF_MODEL))
        found += _by_epoch_or_name(models)
        passed_over += passed
    return found, passed_over


# ---- arguments -----------------------------------------------------------------------------------


def _each(words: str) -> frozenset[str]:
    return frozenset(words.split())


#: Words by which the names of metrics end -> which is better. Other names need a --mode.
_BETTER = {
    "min": _each(
        "loss error err mae mse rmse msle mape perplexity ppl crossentropy divergence hinge logcosh"
        " wer cer fid"
    ),
    "max": _each(
        "acc accuracy auc precision recall f1 iou miou dice map ap r2 score bleu rouge psnr ssim"
        " sensitivity specificity kappa mcc"
    ),
}


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UsageError(f"--{name} is {count}, but must be at least 1")


def _check_bounds(from_epoch: int | None, to_epoch: int | None) -> None:
    if from_epoch is not None and to_epoch is not None and from_epoch > to_epoch:
        raise UsageError(f"--from {from_epoch} is after --to {to_epoch}: nothing lies between them")


def _check_monitor(
    best: int | None, monitor: str | None, mode: str | None, log: _StrPath | None
) -> tuple[str, str]:
    """Return the metric and whether ``min`` or ``max`` of it is better."""
    if best is None:
        for name, value in (("monitor", monitor), ("mode", mode), ("log", log)):
            if value is not None:
                raise UsageError(f"--{name} is for choosing by metric: give --best N too")
        return "", ""
    monitor = "val_loss" if monitor is None else monitor
    if not monitor.strip():
        raise UsageError("--monitor is empty, but must name a metric, such as val_loss")
    if mode not in (None, "min", "max"):
        raise UsageError(f"--mode is {shown(mode)!r}, but must be min or max")
    better = mode or _better(monitor)
    if better is None:
        raise UsageError(
            f"--monitor {shown(monitor)}: its name does not tell whether less or more is better: "
            "give --mode min or --mode max"
        )
    return monitor, better


def _better(monitor: str) -> str | None:
    # Keras numbers metrics (auc_1) and spells IoU io_u; scikit-learn negates errors.
    words = re.findall(r"[a-z]+[0-9]*", monitor.casefold().replace("io_u", "iou"))
    if not words or {"neg", "negative"} & set(words):
        return None
    ends = {words[-1], words[-1].rstrip("0123456789")}
    return next((mode for mode, known in _BETTER.items() if ends & known), None)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(
            f"--epoch-pattern '{shown(pattern)}' is no regular expression: {shown(error)}"
        ) from error


# ---- finding -------------------------------------------------------------------------------------

#: How files end that are taken for checkpoints in a directory, by kind; what a file really is, its
#: content tells later.  The first that fits counts.
_KINDS_OF_FILE = {
    ".weights.h5": ".weights.h5",
    ".weights.json": ".weights.json",
    ".h5": ".h5",
    ".hdf5": ".h5",
    ".keras": ".keras",
    ".npz": ".npz",
    ".pt": ".pt",
    ".pth": ".pth",
    ".bin": ".bin",
    ".ckpt": ".ckpt",
    ".index": ".index",
    ".safetensors": ".safetensors",
    ".safetensors.index.json": ".safetensors.index.json",
}
#: The kind of a folder that is one checkpoint, and the files that make it such: it is opened by the
#: one that it has.
_FOLDER = "checkpoint folders"
_OPENERS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)
#: What lies beside TensorFlow's checkpoints, each of which goes by its .index file.
_DATA = re.compile(r"(.+)\.data-\d{5}-of-\d{5}", re.DOTALL)
#: One of the files that a sharded save of Keras consists of, beside the .weights.json.
_SHARD = re.compile(r"(.+)_[0-9]{5,}\.weights\.h5")
#: One of the files of which a sharded safetensors checkpoint consists, beside its index.
_PIECE = re.compile(r".*-\d{5}-of-\d{5}\.safetensors", re.IGNORECASE | re.DOTALL)

#: The same for models with their architecture, which weights alone are not.
_KINDS_OF_MODEL = {".weights.h5": "", ".h5": ".h5", ".hdf5": ".h5", ".keras": ".keras"}

#: Parts of a name, between dots, by which programs mark a file that they have not finished.
_UNFINISHED = _each("tmp temp part partial incomplete unfinished crdownload download swp swo lock")

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


@dataclass(frozen=True, slots=True)
class _Pool:
    """All candidates; ``as_given`` if every one was named by itself, so that their order counts."""

    paths: tuple[Path, ...]
    as_given: bool
    passed_over: tuple[PassedOver, ...]
    notes: tuple[str, ...]


def _find(
    sources: Sequence[_StrPath],
    exclude: Sequence[str],
    growing: bool,
    written_by_us: Callable[[Sequence[Path]], Collection[Path]],
    told: Callable[[Trouble], None],
) -> _Pool:
    """Find all candidates.

    What is ambiguous goes to ``told``; where that does not raise, the rest is gone on with.
    """
    unusable: list[Path] = []
    found: dict[tuple[int, int], Path] = {}
    passed_over: list[PassedOver] = []
    unmatched = dict.fromkeys(exclude)
    as_given = True
    for source in sources:
        paths, listed = _expanded(source)
        as_given = as_given and not listed
        if listed:
            paths = [path for path in paths if not _is_part(path)]
        kept, passed = _sifted(paths, listed, exclude, unmatched)
        if listed:
            kept, others = _one_kind(source, kept, told)
            passed += others
        files: list[tuple[Path, tuple[int, int]]] = []
        for path in kept:
            try:
                files.append((path, _identity(path)))
            except CheckpointError as error:
                told(Trouble("unreadable", path, str(error)))
                unusable.append(path)
        if listed:
            opened = {file_of(path): path for path, _ in files}
            ours = {opened[file] for file in written_by_us(list(opened))} if files else set()
            passed += [PassedOver(path, "written by polyak") for path, _ in files if path in ours]
            files = [(path, identity) for path, identity in files if path not in ours]
            if not files and not unusable and not growing:
                raise CheckpointError(_nothing_in(source, passed))
        passed_over += passed
        for path, identity in files:
            if identity in found:
                told(Trouble("same file", path, _same_file(found[identity], path)))
            found.setdefault(identity, path)
    if not found and not unusable and as_given:
        raise CheckpointError("no checkpoint is left: --exclude matches every file that was named")
    notes = tuple(f"--exclude '{shown(pattern)}' matched nothing" for pattern in unmatched)
    return _Pool((*found.values(), *unusable), as_given, tuple(passed_over), notes)


def _refuse(trouble: Trouble) -> None:
    raise CheckpointError(trouble.text) from None


def _thins(pool: _Pool, exclude: Sequence[str]) -> bool:
    """Tell whether something was excluded that may be a checkpoint of the run."""
    passed = (one.path for one in pool.passed_over)
    excluded = (path for path in passed if any(_matched(path, pattern) for pattern in exclude))
    return any(_kind(path) and _epoch_alone(path) is not None for path in excluded)


def _several(sources: _StrPath | Sequence[_StrPath]) -> Sequence[_StrPath]:
    """Return the sources as several; a single string is a sequence of strings too, its letters."""
    sources = [sources] if isinstance(sources, (str, os.PathLike)) else sources
    if not sources:
        raise UsageError("no checkpoints named: give a directory, a pattern or files")
    return sources


def _expanded(source: _StrPath) -> tuple[list[Path], bool]:
    """Return what a source stands for, and whether that was listed rather than named by itself."""
    text = os.fspath(source)
    # Path("") is the current directory, which nobody means who passes an unset variable.
    if not text or "\0" in text:
        raise CheckpointError(f"{shown(text)!r} is no path: give a directory, a pattern or files")
    try:
        mode = os.stat(text).st_mode  # noqa: PTH116 - Path() would forget a trailing slash
    except OSError as error:
        if glob.has_magic(text) and not os.path.lexists(text):
            return _matches(text), True
        # TensorFlow names a checkpoint by what its files' names begin with.
        if error.errno == errno.ENOENT and os.path.isfile(f"{text}.index"):  # noqa: PTH113 - as above
            return [Path(f"{text}.index")], False
        raise CheckpointError(_unusable(Path(text), error)) from error
    if not stat.S_ISDIR(mode):
        return [_whole(Path(text))], False
    try:
        with os.scandir(text) as entries:
            names = sorted(entry.name for entry in entries)
    except OSError as error:
        raise CheckpointError(
            f"{shown(text)}: the directory cannot be listed: {error.strerror}"
        ) from error
    listed = [Path(text, name) for name in names]
    # Beside the checkpoints of a run, its final model may lie in the very folder.
    if not set(_OPENERS).isdisjoint(names) and not any(_is_another(path) for path in listed):
        folder = Path(text)
        return [folder if folder.name not in ("", "..") else folder.resolve()], False
    return listed, True


def _is_another(path: Path) -> bool:
    """Tell whether something in a folder makes it more than one checkpoint."""
    if path.name in _OPENERS or _PIECE.fullmatch(path.name):
        return False
    return _kind_by_suffix(path, _KINDS_OF_FILE).startswith(".safetensors") or bool(_openers(path))


def file_of(path: Path) -> Path:
    """Return the file by which a checkpoint is opened: itself, or one in a folder that is one.

    Raises:
        CheckpointError: the folder has several such files.
    """
    found = _openers(path)
    if len(found) > 1:
        raise CheckpointError(
            f"{shown(path)}: holds {shown(found[0].name)} and {shown(found[1].name)}, either of "
            "which could be the checkpoint; move one away"
        )
    return found[0] if found else path


def _openers(path: Path) -> list[Path]:
    """Return the files by which a folder could be opened as one checkpoint."""
    if _kind_by_suffix(path, _KINDS_OF_FILE) or not path.is_dir():  # the name tells without a look
        return []
    return [path / name for name in _OPENERS if (path / name).is_file()]


def _whole(path: Path) -> Path:
    """Return the folder that a file stands for, as it has the epoch in its name; else the file."""
    known = path.name in _OPENERS and path.parent.name not in ("", "..")
    return path.parent if known and _openers(path.parent) == [path] else path


def _matches(pattern: str) -> list[Path]:
    paths = sorted(
        _whole(Path(match))
        for match in glob.glob(pattern)  # noqa: PTH207 - may be absolute
    )
    if not paths:
        raise CheckpointError(
            f"{shown(pattern)}: no file matches this pattern, and nothing has that very name"
        )
    return paths


def _sifted(
    paths: Sequence[Path], listed: bool, exclude: Sequence[str], unmatched: dict[str, None]
) -> tuple[list[Path], list[PassedOver]]:
    """Part the candidates from the rest; patterns that match are taken out of ``unmatched``."""
    kept: list[Path] = []
    passed: list[PassedOver] = []
    for path in paths:
        matching = [pattern for pattern in exclude if _matched(path, pattern)]
        for pattern in matching:
            unmatched.pop(pattern, None)
        reason = f"--exclude '{shown(matching[0])}'" if matching else None
        if reason is None and listed:
            reason = _why_not(path, _KINDS_OF_FILE, "checkpoint")
        if reason is None:
            kept.append(path)
        else:
            passed.append(PassedOver(path, reason))
    return kept, passed


def _matched(path: Path, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path.name, pattern) or fnmatch.fnmatchcase(str(path), pattern)


def _is_part(path: Path) -> bool:
    """Tell whether a file belongs to a checkpoint that goes by another file's name."""
    shard = _DATA.fullmatch(path.name)
    return shard is not None and path.with_name(f"{shard[1]}.index").is_file()


def _why_not(path: Path, kinds: Mapping[str, str], what: str) -> str | None:
    """Return why something in a directory is by its name not what is looked for, or None."""
    name = path.name.casefold()
    if name.startswith("."):
        return "hidden"
    if name.endswith("~") or not _UNFINISHED.isdisjoint(re.split(r"[.]|(?<=^tmp)-", name)):
        return "unfinished, by its name"
    if name == "checkpoint" and path.is_file():
        return "TensorFlow's list of checkpoints"
    if _DATA.fullmatch(name):
        return "a data shard of a TensorFlow checkpoint whose .index is not here"
    if _PIECE.fullmatch(name):
        return "one shard of several, which belong to an index"
    if not _kind(path, kinds):
        return "a directory" if path.is_dir() else f"not named like a {what}"
    shard = _SHARD.fullmatch(path.name)
    whole = path.with_name(f"{shard[1]}.weights.json") if shard else None
    return f"a part of {shown(whole.name)}" if whole and whole.is_file() else None


def _kind(path: Path, kinds: Mapping[str, str] = _KINDS_OF_FILE) -> str:
    """Return of which of the kinds a file is by its name, '' where it is of none."""
    kind = _kind_by_suffix(path, kinds)
    return kind or (_FOLDER if kinds is _KINDS_OF_FILE and _openers(path) else "")


def _kind_by_suffix(path: Path, kinds: Mapping[str, str]) -> str:
    name = path.name.casefold()
    return next((kind for end, kind in kinds.items() if name.endswith(end)), "")


def _one_kind(
    source: _StrPath, paths: Sequence[Path], told: Callable[[Trouble], None]
) -> tuple[list[Path], list[PassedOver]]:
    """Part a directory's checkpoints from single files of other kinds, such as a data set.

    There may be several of more than one kind, or one of each, which is told.
    """
    kinds = Counter(_kind(path) for path in paths)
    common = [kind for kind, count in kinds.items() if count > 1] or list(kinds)
    if len(common) > 1:
        one, other = sorted(common)[:2]
        files = "" if other == _FOLDER else " files"  # a folder's kind is the last, as sorted
        text = (
            f"{shown(os.fspath(source))}: holds {kinds[one]} {one} and {kinds[other]} {other}"
            f"{files}, which are not of one run; leave one kind out, for instance with "
            f"--exclude '*{max({one, other} - {_FOLDER}, key=len)}'"
        )
        told(Trouble("other run", Path(source), text))
    kept = [path for path in paths if _kind(path) in common]
    reason = f"the only {{}} among {kinds[common[0]]} {common[0]}" if common else ""
    others = [(path, _kind(path)) for path in paths if _kind(path) not in common]
    passed = [
        PassedOver(path, reason.format("folder" if kind == _FOLDER else f"{kind} file"))
        for path, kind in others
    ]
    return kept, passed


def _identity(path: Path) -> tuple[int, int]:
    """Return device and inode of a regular file.

    Raises:
        CheckpointError: it is anything else.
    """
    try:
        status = file_of(path).stat()
    except OSError as error:
        raise CheckpointError(_unusable(path, error)) from error
    if stat.S_ISREG(status.st_mode):
        return status.st_dev, status.st_ino
    kind = next((kind for test, kind in _KINDS if test(status.st_mode)), "a special file")
    raise CheckpointError(f"{shown(path)} is {kind}, not a checkpoint file: {_leave_out(path)}")


def _unusable(path: Path, error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return f"{shown(path)} is a symbolic link that leads back to itself: {_leave_out(path)}"
    if error.errno == errno.ENOENT and path.is_symlink():
        return f"{shown(path)} is a symbolic link to a file that is gone: {_leave_out(path)}"
    if error.errno == errno.ENOENT:
        return f"{shown(path)}: there is no such file or directory"
    return f"{shown(path)} cannot be used: {error.strerror}"


def _same_file(first: Path, second: Path) -> str:
    if str(first) == str(second):
        return f"{shown(first)} is given twice: name each checkpoint once"
    extra = first if first.is_symlink() and not second.is_symlink() else second
    return (
        f"{shown(first)} and {shown(second)} are one and the same file, through a link or another "
        f"way of writing its path: {_leave_out(extra, whole=first.name == second.name)}"
    )


def _leave_out(path: Path, whole: bool = False) -> str:
    """Return the advice to exclude a file, with a pattern that matches no other in its folder."""
    return f"leave it out with --exclude '{shown(glob.escape(str(path) if whole else path.name))}'"


def _nothing_in(
    source: _StrPath,
    passed: Sequence[PassedOver],
    what: str = "checkpoint",
    kinds: Mapping[str, str] = _KINDS_OF_FILE,
) -> str:
    ends = ", ".join(end for end, kind in kinds.items() if kind)
    text = f"{shown(os.fspath(source))}: there is no {what} here: looked for files in {ends}"
    if not passed:
        return f"{text}, but found nothing at all"
    some = ", ".join(f"{shown(one.path.name, 60)} ({one.reason})" for one in passed[:3])
    more = f" and {len(passed) - 3} more" if len(passed) > 3 else ""
    return f"{text}, passed over {some}{more}"


# ---- what a name says ----------------------------------------------------------------------------


class _Role(Enum):
    """What a number in a file name is taken for, by the word before it.

    The value stands for the number where the names of a run are compared.
    """

    EPOCH = "\0epoch"
    PLAIN = "\0plain"
    COUNTER = "\0counter"
    MEASURE = "\0measure"
    FIXED = "\0fixed"


#: Count like epochs do, and are taken for one where a name has nothing better.
_COUNTERS = _each("step steps iter iters iteration iterations update updates batch")
_MEASURES = _BETTER["min"] | _BETTER["max"]
#: Say which run it is, so they must not change within one.
_RUNS = _each("run fold seed trial exp experiment rank worker split cv")
_VERSIONS = _each("v ver version")
_SETTINGS = _each(
    "lr wd rate dropout alpha beta gamma momentum decay tau temp temperature width eps ema"
)

_SUFFIX = re.compile(r"\.(?:h5|hdf5|he5|hd5|json|keras)$", re.IGNORECASE)

# A minus is a sign only where it cannot be the dash between two fields: after "=", or after another
# dash and before a decimal.  An exponent has a sign, as Python writes it: in "0.25e12" it is epoch
# 12.  Digits with dots between them are cut up by _numerals().
_NUMERAL = re.compile(
    r"""
    (?: (?<==)-(?=\d) | (?<=[-_])-(?=\d+\.\d+(?!\.?\d)) )?  \d+(?:\.\d+)*  (?:[eE][-+]\d+)?
    | (?: (?<==)- | (?<=[-_])- )?  (?<![^\W\d_])(?:nan|inf)(?![^\W_])
    """,
    re.VERBOSE | re.IGNORECASE,
)
# The last word of a text: "epoch" of "my-epoch_", "Epoch" of "netEpoch"; f1 and r2 are words too.
_LABEL = re.compile(
    r"(?: (?<![^\W\d_]) | (?=[A-Z]) ) ([fF]1|[rR]2|[A-Z]?[a-z]+|[A-Z]+) ([-_=:.\ ]*) $", re.VERBOSE
)
_LABEL_AFTER = re.compile(r"(?:epochs?|ep)(?![^\W\d_])", re.IGNORECASE)
_DATE = re.compile(r"(?:19|20)\d{6}")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|[^\W\d_a-zA-Z]+")


@dataclass(frozen=True, slots=True)
class _Number:
    """One number in a name: the word before it (``label``) and what stands between (``joint``)."""

    text: str
    start: int
    value: int | float
    role: _Role
    label: str
    joint: str


@dataclass(frozen=True, slots=True)
class _Name:
    """A file name taken apart; ``signature`` is what all names of a run have in common."""

    path: Path
    stem: str
    numbers: tuple[_Number, ...]
    signature: str


def _taken_apart(path: Path) -> _Name:
    stem = _SUFFIX.sub("", path.name)
    numbers: list[_Number] = []
    pieces: list[str] = []
    end = 0
    for start, text in _numerals(stem):
        number = _number(stem, start, text)
        numbers.append(number)
        # A number that belongs to the run's name stands for itself.
        fixed = text if number.role is _Role.FIXED else number.role.value
        pieces += (stem[end:start], fixed)
        end = start + len(text)
    pieces.append(stem[end:])
    return _Name(path, stem, tuple(numbers), "".join(pieces))


def _numerals(stem: str) -> Iterator[tuple[int, str]]:
    """Yield start and text of each number; ``10.0.25`` is 10 and 0.25, as in weights.10.0.25.h5."""
    for match in _NUMERAL.finditer(stem):
        start, parts = match.start(), match[0].split(".")
        if len(parts) % 2:
            yield start, parts[0]
            start += len(parts[0]) + 1
            parts = parts[1:]
        for whole, fraction in zip(parts[::2], parts[1::2], strict=True):
            text = f"{whole}.{fraction}"
            yield start, text
            start += len(text) + 1


def _number(stem: str, start: int, text: str) -> _Number:
    match = _LABEL.search(stem[:start])
    label, joint = (match[1].casefold(), match[2]) if match else ("", "")
    if not text.lstrip("-").isdecimal():
        role = _Role.FIXED if label in _VERSIONS else _Role.MEASURE
        return _Number(text, start, float(text), role, label, joint)
    role = _integer_role(label)
    if role is _Role.PLAIN and _LABEL_AFTER.match(stem, start + len(text)):
        role = _Role.EPOCH
    return _Number(text, start, int(text), role, label, joint)


def _integer_role(label: str) -> _Role:
    # "ep" and "e" must be whole words: "step" and "size" end in them.
    if label.endswith(("epoch", "epochs")) or label in ("ep", "e"):
        return _Role.EPOCH
    if label in _COUNTERS:
        return _Role.COUNTER
    # Folds are called f1, so what follows "f1" may well be an epoch.
    if label not in ("f1", "r2") and _without_split(label) in _MEASURES:
        return _Role.MEASURE
    return _Role.FIXED if label in _RUNS else _Role.PLAIN


def _without_split(label: str) -> str:
    return re.sub(r"^(?:validation|valid|val|training|train|test)(?=.)", "", label)


# ---- order ---------------------------------------------------------------------------------------

_SAY_WHERE = "say where the epoch is with --epoch-pattern, for instance '(\\d+)\\.h5$'"


def _ordered(pool: _Pool, pattern: re.Pattern[str] | None) -> tuple[list[Checkpoint], list[str]]:
    """Return all checkpoints, oldest first, and what is to be noted about their order."""
    if not pool.paths:
        return [], []
    if pattern is not None:
        epochs: list[int | None] = [_matched_epoch(path, pattern) for path in pool.paths]
    elif pool.as_given:
        epochs = _epochs_if_any(pool.paths)
    else:
        epochs = [*_epochs(pool.paths)]
    found = [Checkpoint(path, epoch, None) for path, epoch in zip(pool.paths, epochs, strict=True)]
    if pool.as_given:
        return found, _order_notes(found)
    found.sort(key=lambda checkpoint: checkpoint.epoch or 0)
    _tell_of_doubles(found, _refuse)
    return found, []


def _tell_of_doubles(ordered: Sequence[Checkpoint], told: Callable[[Trouble], None]) -> None:
    for earlier, later in pairwise(ordered):
        if earlier.epoch == later.epoch is not None:
            text = (
                f"{shown(earlier.path)} and {shown(later.path)} are both epoch {later.epoch}: "
                f"leave one out with --exclude, or {_SAY_WHERE}"
            )
            told(Trouble("duplicate epoch", later.path, text))


def _ordered_as_far_as_known(
    pool: _Pool, pattern: re.Pattern[str] | None, told: Callable[[Trouble], None]
) -> list[Checkpoint]:
    """Return all checkpoints, oldest first, and tell of those whose names do not say enough."""
    epochs: Sequence[int | None]
    others: Collection[Path] = ()
    if pattern is not None:
        epochs = [_matched_epoch_if_any(path, pattern, told) for path in pool.paths]
    elif pool.as_given:
        epochs = _epochs_if_any(pool.paths)
    else:
        known, others = _epochs_of_runs(pool.paths, told)
        epochs = [known.get(path) for path in pool.paths]
    found = [Checkpoint(path, epoch, None) for path, epoch in zip(pool.paths, epochs, strict=True)]
    if pool.as_given and None in epochs:
        return found
    found.sort(key=lambda one: -math.inf if one.epoch is None else one.epoch)
    _tell_of_doubles([one for one in found if one.path not in others], told)
    return found


def _matched_epoch_if_any(
    path: Path, pattern: re.Pattern[str], told: Callable[[Trouble], None]
) -> int | None:
    try:
        return _matched_epoch(path, pattern)
    except CheckpointError as error:
        told(Trouble("no epoch", path, str(error)))
        return None


def _epochs_of_runs(
    paths: Sequence[Path], told: Callable[[Trouble], None]
) -> tuple[dict[Path, int], set[Path]]:
    """Return the epochs that names tell, and which files are not of the largest run."""
    runs: dict[Hashable, list[_Name]] = {}
    for path in paths:
        name = _taken_apart(path)
        if _has_number(name):
            runs.setdefault((_kind(path), name.signature), []).append(name)
        else:
            told(Trouble("no epoch", path, _no_number(name)))
    known: dict[Path, int] = {}
    parted: list[list[_Name]] = []
    for alike in runs.values():
        try:
            field = _epoch_field(alike)
        except CheckpointError as error:
            told(Trouble("no epoch", alike[0].path, str(error)))
            parted.append(alike)
            continue
        known |= {name.path: int(name.numbers[field].value) for name in alike}
        within: dict[Hashable, list[_Name]] = {}
        for name in alike:
            within.setdefault(_other_numbers(name, field), []).append(name)
        parted += within.values()
    # On a tie, that which goes on longest is taken for the run.
    parted.sort(key=lambda run: (len(run), max(known.get(name.path, 0) for name in run)))
    others = [name.path for run in parted[:-1] for name in run]
    for path in others:
        usual = shown(parted[-1][0].path)
        text = (
            f"{shown(path)} looks like a checkpoint of another run than {usual} "
            f"({len(parted[-1])} are named like this one): leave one kind out with --exclude, or "
            f"{_SAY_WHERE}"
        )
        told(Trouble("other run", path, text))
    return known, set(others)


def _by_epoch_or_name(paths: Sequence[Path]) -> list[Path]:
    """Return files in the order of their epochs, or of their names where that is not clear."""
    try:
        epochs = dict(zip(paths, _epochs(paths), strict=True))
    except CheckpointError:
        epochs = {}
    if len(set(epochs.values())) == len(paths):
        return sorted(paths, key=lambda path: epochs[path])
    return sorted(paths, key=with_numbers)


def with_numbers(path: Path) -> list[str | int]:
    """Return a key that sorts model_9 before model_10."""
    parts = re.split(r"(\d+)", str(path))  # text and digits in turn, text first
    return [int(part) if place % 2 else part.casefold() for place, part in enumerate(parts)]


def _matched_epoch(path: Path, pattern: re.Pattern[str]) -> int:
    match = pattern.search(path.name)
    if match is None:
        raise CheckpointError(
            f"{shown(path)}: --epoch-pattern '{shown(pattern.pattern)}' matches nothing in its "
            "name: correct the pattern or leave the file out with --exclude"
        )
    group: str | int = "epoch" if "epoch" in pattern.groupindex else min(pattern.groups, 1)
    text = match[group]
    if text is None or not re.fullmatch(r"[-+]?\d+", text):
        raise CheckpointError(
            f"{shown(path)}: --epoch-pattern '{shown(pattern.pattern)}' finds "
            f"{'no epoch' if text is None else repr(shown(text))} in its name, but the group "
            "'epoch', else the first group, must be a whole number"
        )
    return int(text)


def _epochs_if_any(paths: Sequence[Path]) -> list[int | None]:
    """Read epochs from files named one by one, whose order does not depend on them."""
    try:
        return [*_epochs(paths)]
    except CheckpointError:
        return [_epoch_alone(path) for path in paths]


def _epoch_alone(path: Path) -> int | None:
    try:
        return _epochs([path])[0]
    except CheckpointError:
        return None


def _order_notes(given: Sequence[Checkpoint]) -> list[str]:
    known = [checkpoint for checkpoint in given if checkpoint.epoch is not None]
    for earlier, later in pairwise(known):
        if (earlier.epoch or 0) >= (later.epoch or 0):
            return [
                "the files are taken in the order given, oldest first, which is not that of their "
                f"epochs: {shown(earlier.path)} (epoch {earlier.epoch}) stands before "
                f"{shown(later.path)} (epoch {later.epoch}), and {shown(given[-1].path)} counts as "
                "the newest; name their directory instead to order them by epoch"
            ]
    return []


def _epochs(paths: Sequence[Path]) -> list[int]:
    """Read the epoch from the names of one run's files.

    Raises:
        CheckpointError: a name has no number, the names are not alike, or none or several of their
            numbers could be the epoch.
    """
    names = [_taken_apart(path) for path in paths]
    for name in names:
        if not _has_number(name):
            raise CheckpointError(_no_number(name))
    _require_alike(names, [name.signature for name in names])
    # Equal signatures: the names have the same numbers in the same places from here on.
    field = _epoch_field(names)
    _require_alike(names, [_other_numbers(name, field) for name in names])
    return [int(name.numbers[field].value) for name in names]


def _has_number(name: _Name) -> bool:
    return any(isinstance(number.value, int) for number in name.numbers)


def _no_number(name: _Name) -> str:
    return (
        f"{shown(name.path)}: its name holds no whole number that could be the epoch: "
        f"{_leave_out(name.path)}, or {_SAY_WHERE}"
    )


def _other_numbers(name: _Name, field: int) -> tuple[int | float, ...]:
    """Return the numbers besides the epoch that must not change within a run."""
    return tuple(
        number.value
        for index, number in enumerate(name.numbers)
        if number.role is _Role.PLAIN and index != field
    )


def _require_alike(names: Sequence[_Name], keys: Sequence[Hashable]) -> None:
    kinds = Counter(keys)
    if len(kinds) == 1:
        return
    (usual, many), (odd, few), *_ = kinds.most_common()
    one, other = names[keys.index(usual)].path, names[keys.index(odd)].path
    raise CheckpointError(
        f"{shown(one)} and {shown(other)} look like checkpoints of two runs ({many} named like the "
        f"one, {few} like the other): leave one kind out with --exclude, or {_SAY_WHERE}"
    )


def _epoch_field(names: Sequence[_Name]) -> int:
    """Return which of the numbers that the names have in common is the epoch."""
    first = names[0].numbers
    for role in (_Role.EPOCH, _Role.PLAIN, _Role.COUNTER):
        places = [index for index, number in enumerate(first) if number.role is role]
        varying = [i for i in places if len({name.numbers[i].value for name in names}) > 1]
        if len(varying) > 1:
            raise CheckpointError(_ambiguous(names, varying))
        if varying:
            return varying[0]
        if places and role is _Role.EPOCH:
            return places[-1]
    return _likeliest_field(names[0])


def _likeliest_field(name: _Name) -> int:
    """Return the number that is most like an epoch where comparing names does not tell."""

    def likeliness(index: int) -> tuple[int, bool, bool, int]:
        number = name.numbers[index]
        ranks = {_Role.PLAIN: 3, _Role.COUNTER: 2, _Role.FIXED: 1}
        named = number.label == "of" or number.label in _VERSIONS or _DATE.fullmatch(number.text)
        # resnet50_10: a number that is part of a word is rather a name.
        part_of_word = bool(number.label) and not number.joint
        return ranks[number.role], not named, not part_of_word, index

    whole = [index for index, number in enumerate(name.numbers) if isinstance(number.value, int)]
    possible = [index for index in whole if name.numbers[index].role is not _Role.MEASURE]
    if not possible:
        number = name.numbers[whole[-1]]
        raise CheckpointError(
            f"{shown(name.path)}: the {number.text} in its name looks like the metric "
            f"'{shown(number.label)}', not like an epoch: {_SAY_WHERE}"
        )
    return max(possible, key=likeliness)


def _ambiguous(names: Sequence[_Name], varying: Sequence[int]) -> str:
    numbers = [names[0].numbers[index].text for index in varying]
    return (
        f"{shown(names[0].path)}: {', '.join(numbers[:-1])} and {numbers[-1]} in its name vary "
        f"from file to file, so each could be the epoch: {_SAY_WHERE}, or leave files of another "
        "run out with --exclude"
    )


# ---- restrictions --------------------------------------------------------------------------------


def _within(
    ordered: Sequence[Checkpoint],
    from_epoch: int | None,
    to_epoch: int | None,
    growing: bool = False,
) -> list[Checkpoint]:
    if from_epoch is None and to_epoch is None:
        return list(ordered)
    low = -math.inf if from_epoch is None else from_epoch
    high = math.inf if to_epoch is None else to_epoch
    kept = [one for one in ordered if low <= _known_epoch(one, "--from and --to") <= high]
    if not kept and not growing:
        bounds = [
            *([] if from_epoch is None else [f"--from {from_epoch}"]),
            *([] if to_epoch is None else [f"--to {to_epoch}"]),
        ]
        raise CheckpointError(
            f"{' '.join(bounds)}: no checkpoint has such an epoch; there are {_range(ordered)}"
        )
    return kept


def _newest(
    checkpoints: list[Checkpoint], last: int | None, total: int, growing: bool = False
) -> list[Checkpoint]:
    if last is None:
        return checkpoints
    if not growing and last > len(checkpoints):
        rest = "" if total == len(checkpoints) else f" after the other options, out of {total}"
        raise CheckpointError(
            f"{shown(checkpoints[-1].path.parent)}: --last {last}, but there "
            f"{'is' if len(checkpoints) == 1 else 'are'} only {_range(checkpoints)}{rest}; ask for "
            "fewer, or name more files"
        )
    return checkpoints[-last:]


def _positions(chosen: Sequence[Checkpoint], ordered: Sequence[Checkpoint]) -> tuple[float, ...]:
    epochs = [one.epoch for one in chosen if one.epoch is not None]
    # A run that has an epoch 0 has as many epochs behind it as the number says, plus one.
    shift = max(0, 1 - min((one.epoch for one in ordered if one.epoch is not None), default=1))
    positions = [float(epoch + shift) for epoch in epochs]
    rising = all(a < b for a, b in pairwise(positions))
    if len(epochs) == len(chosen) and rising:
        return tuple(positions)
    return tuple(float(place) for place in range(1, len(chosen) + 1))


def _known_epoch(checkpoint: Checkpoint, option: str) -> int:
    if checkpoint.epoch is None:
        raise CheckpointError(
            f"{shown(checkpoint.path)}: {option} needs the epoch, and its name holds no number "
            f"that could be it: {_SAY_WHERE}"
        )
    return checkpoint.epoch


def _range(checkpoints: Sequence[Checkpoint]) -> str:
    """Return how many there are, and of which epochs."""
    count = f"{len(checkpoints)} checkpoint{'' if len(checkpoints) == 1 else 's'}"
    epochs = [one.epoch for one in checkpoints if one.epoch is not None]
    if not epochs:
        return count
    if len(epochs) == 1:
        return f"{count} (epoch {epochs[0]})"
    return f"{count} (epochs {min(epochs)} to {max(epochs)})"


# ---- the best ------------------------------------------------------------------------------------


def _best(
    candidates: Sequence[Checkpoint],
    ordered: Sequence[Checkpoint],
    count: int,
    growing: bool,
    monitor: str,
    better: str,
    log: _StrPath | None,
) -> tuple[list[Checkpoint], list[str]]:
    """Return the ``count`` best of the candidates, in the order they came, and notes."""
    notes: list[str] = []
    if log is None:
        metrics = [_metric_in_name(one.path, monitor) for one in candidates]
    else:
        metrics, notes = _metrics_in_log(candidates, ordered, monitor, _read_log(log, monitor))
    measured = [
        replace(one, metric=metric) for one, metric in zip(candidates, metrics, strict=True)
    ]
    usable = [index for index, metric in enumerate(metrics) if math.isfinite(metric)]
    if count > len(usable) and not growing:
        lost = len(metrics) - len(usable)
        where = f", and {lost} more whose {shown(monitor)} is no finite number" if lost else ""
        raise CheckpointError(
            f"--best {count}: there {'is' if len(usable) == 1 else 'are'} only "
            f"{_range([measured[index] for index in usable])} to choose from{where}"
        )
    sign = 1.0 if better == "min" else -1.0
    ranked = sorted(usable, key=lambda index: (sign * metrics[index], -index))
    return [measured[index] for index in sorted(ranked[:count])], notes


def _metric_in_name(path: Path, monitor: str) -> float:
    name = _taken_apart(path)
    number = _metric_number(name, monitor)
    if number is not None:
        return float(number.value)
    bare = [number.text for number in name.numbers if _is_bare(number)]
    found = f"the numbers {', '.join(bare)} without a name" if bare else "no such number"
    raise CheckpointError(
        f"{shown(path)}: looked in its name for {shown(monitor)}, but found {found}: give the "
        "training log with --log, or another --monitor"
    )


def _metric_number(name: _Name, monitor: str) -> _Number | None:
    """Return the number that is named like the metric, else the only decimal without a name."""
    wanted = _words(monitor)
    named = [one for one in name.numbers if _ends_with(_words(name.stem[: one.start]), wanted)]
    if named:
        return named[-1]
    bare = [number for number in name.numbers if _is_bare(number)]
    return bare[0] if len(bare) == 1 else None


def _is_bare(number: _Number) -> bool:
    """Tell whether a decimal has no name: it has none in 10-0.25, but in lr0.25 and in a=0.25."""
    if isinstance(number.value, int):
        return False
    if not number.label:
        return True
    meant = _without_split(number.label)
    return (
        bool(number.joint.strip("=:"))
        and meant not in _MEASURES
        and meant not in _SETTINGS
        and meant not in _VERSIONS
    )


def _words(text: str) -> list[str]:
    words = [word.casefold() for word in _WORD.findall(text)]
    return ["accuracy" if word == "acc" else word for word in words]


def _ends_with(words: Sequence[str], wanted: Sequence[str]) -> bool:
    """Tell whether the words end in the wanted ones, and not in those of another split's metric."""
    if len(wanted) > 1 and words[-1:] == ["".join(wanted)]:
        return True
    before, end = words[: -len(wanted)], words[-len(wanted) :]
    splits = ("val", "valid", "validation", "train", "training", "test")
    return end == list(wanted) and (not before or before[-1] not in splits)


# ---- the training log ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Log:
    """A metric by the number of its row, as CSVLogger counts: from 0."""

    path: str
    metric: dict[int, float]
    last: int
    notes: tuple[str, ...]


def _metrics_in_log(
    candidates: Sequence[Checkpoint], ordered: Sequence[Checkpoint], monitor: str, log: _Log
) -> tuple[list[float], list[str]]:
    epochs = [_known_epoch(one, "--log") for one in candidates]
    newest = max((one for one in ordered if one.epoch is not None), key=lambda one: one.epoch or 0)
    offset, why = _offset(candidates, ordered, newest.epoch or 0, monitor, log)
    for one, epoch in zip(candidates, epochs, strict=True):
        if epoch - offset not in log.metric:
            raise CheckpointError(
                f"{shown(log.path)}: there is no row for {shown(one.path)}, which should be epoch "
                f"{epoch - offset} there ({why}); the rows are epochs {min(log.metric)} to "
                f"{max(log.metric)}"
            )
    note = (
        f"{shown(log.path)}: the row of epoch {(newest.epoch or 0) - offset} is taken for "
        f"{shown(newest.path)} ({why})"
    )
    return [log.metric[epoch - offset] for epoch in epochs], [*log.notes, note]


def _offset(
    candidates: Sequence[Checkpoint],
    ordered: Sequence[Checkpoint],
    newest: int,
    monitor: str,
    log: _Log,
) -> tuple[int, str]:
    """Return what to take from a file's epoch to get its row, and why.

    CSVLogger counts epochs from 0, and ModelCheckpoint names files from 1; people who save in a
    callback of their own mostly count from 0.
    """
    if any(one.epoch == 0 for one in ordered):
        return 0, "as the files count from 0 too"
    agreeing = [offset for offset in (0, 1) if _agrees(candidates, offset, monitor, log)]
    if len(agreeing) == 1:
        return agreeing[0], f"as the {shown(monitor)} in the file names agrees"
    if newest == log.last:
        return 0, "as the newest file and the last row have the same number"
    if newest == log.last + 1:
        return 1, "as the newest file is one more than the last row"
    return 1, "as Keras names files from 1 and counts rows from 0; check that this fits"


def _agrees(candidates: Sequence[Checkpoint], offset: int, monitor: str, log: _Log) -> bool:
    """Tell whether every name's metric is the rounded one of its row."""
    for one in candidates:
        number = _metric_number(_taken_apart(one.path), monitor)
        exact = log.metric.get((one.epoch or 0) - offset, math.nan)
        if number is None or isinstance(number.value, int):
            return False
        # Half of the last digit, and a little for values that were rounded to float32 before.
        if not abs(number.value - exact) <= 0.5001 * _last_digit(number.text):
            return False
    return True


def _last_digit(numeral: str) -> float:
    """Return what one in the last digit is worth: 0.01 for 1.25, 1e-06 for 1.2e-05."""
    mantissa, _, exponent = numeral.casefold().partition("e")
    _, _, fraction = mantissa.partition(".")
    return float(f"1e{int(exponent or 0) - len(fraction)}")


def _read_log(path: _StrPath, monitor: str) -> _Log:
    import csv  # only --log needs it

    text = os.fspath(path)
    if "\0" in text:
        raise CheckpointError(f"{shown(text)!r} is no path: --log must be a CSV file")
    try:
        # Opening a pipe would wait for ever.
        if not Path(text).is_file():
            what = "is no regular file" if os.path.lexists(text) else "does not exist"
            raise CheckpointError(f"{shown(text)} {what}: --log must be a CSV file of CSVLogger")
        with open(text, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            start = stream.readline(1 << 16)
            delimiter = max(",;\t", key=start.count)
            stream.seek(0)
            rows = csv.reader(stream, delimiter=delimiter, skipinitialspace=True)
            return _parsed_log(text, rows, monitor)
    except (OSError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{shown(text)}: the log cannot be read: {shown(reason)}") from error


def _parsed_log(path: str, rows: Iterator[list[str]], monitor: str) -> _Log:
    header: list[str] = []
    metric: dict[int, float] = {}
    cut_short = last = 0
    for line, row in enumerate(rows, start=1):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if cut_short:
            raise CheckpointError(f"{shown(path)}: row {cut_short} has fewer cells than the header")
        # A run that was started again may append to the log with a header of its own.
        if not header or "epoch" in cells:
            header = _checked_header(path, cells, monitor)
        elif len(cells) < len(header):
            cut_short = line
        else:
            last = _epoch_cell(path, line, cells[header.index("epoch")])
            metric[last] = _metric_cell(path, line, cells[header.index(monitor)])
    if not metric:
        raise CheckpointError(f"{shown(path)}: the log has no rows; is it the CSVLogger's?")
    # Only the very last one may be: the trainer is writing it.
    notes = [f"{shown(path)}: row {cut_short}, the last, is incomplete and not used"]
    return _Log(path, metric, last, tuple(notes if cut_short else ()))


def _checked_header(path: str, header: list[str], monitor: str) -> list[str]:
    columns = ", ".join(shown(column, 40) for column in header[:20])
    if "epoch" not in header:
        raise CheckpointError(
            f"{shown(path)}: its first row has no column 'epoch', as CSVLogger writes it, but: "
            f"{columns}"
        )
    if monitor not in header:
        raise CheckpointError(
            f"{shown(path)}: there is no column {shown(monitor)!r}: choose --monitor from {columns}"
        )
    return header


def _epoch_cell(path: str, line: int, cell: str) -> int:
    # A spreadsheet may have made 3.0 of 3.
    if not re.fullmatch(r"\d{1,15}(?:\.0+)?", cell):
        raise CheckpointError(
            f"{shown(path)}: row {line}: the epoch is {shown(cell, 40)!r}, but must be a number"
        )
    return int(cell.partition(".")[0])


def _metric_cell(path: str, line: int, cell: str) -> float:
    # CSVLogger writes NA where a metric was not computed.
    if cell in ("", "NA"):
        return math.nan
    try:
        return float(cell)
    except ValueError:
        raise CheckpointError(
            f"{shown(path)}: row {line}: the metric is {shown(cell, 40)!r}, but must be a number"
        ) from None
