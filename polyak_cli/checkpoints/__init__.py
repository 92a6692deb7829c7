"""Find the checkpoints of a run, order them by epoch, and choose some of them.

Knows directories, names, and what programs write of a run beside it.  Does not know what is inside
a checkpoint: where only that has the metric, `formats` reads it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from polyak_cli.checkpoints.listing import (
    KINDS_OF_FILE,
    KINDS_OF_MODEL,
    WEIGHTS_SUFFIXES,
    Checkpoint,
    PassedOver,
    Pool,
    Problem,
    StrPath,
    describe_folders,
    describe_nothing_found,
    enter,
    expand_source,
    find_candidates,
    find_file,
    find_objection,
    list_sources,
    refuse,
    refuse_url,
)
from polyak_cli.checkpoints.metrics import check_monitor, take_best
from polyak_cli.checkpoints.ordering import (
    describe_epochs,
    is_thinned,
    make_natural_key,
    order_as_far_as_known,
    order_by_epoch,
    place_in_run,
    restrict_epochs,
    sort_by_epoch_or_name,
    take_newest,
)
from polyak_cli.checkpoints.outsiders import pass_over_outsiders
from polyak_cli.checkpoints.spacing import keep_apart, take_evenly
from polyak_cli.checkpoints.suspicions import find_overwritten
from polyak_cli.errors import CheckpointError, UsageError, shown

__all__ = [
    "WEIGHTS_SUFFIXES",
    "Checkpoint",
    "PassedOver",
    "Problem",
    "Selection",
    "describe_folders",
    "enter",
    "find_file",
    "make_natural_key",
    "model_files",
    "refuse_url",
    "select",
    "survey",
]


@dataclass(frozen=True, slots=True)
class Selection:
    """The checkpoints to average, oldest first, and notes about the choice.

    Attributes:
        checkpoints: the chosen ones.
        passed_over: files in the directories that were not taken for checkpoints of the run.
        notes: sentences for the user.
        positions: for each checkpoint, how far into the run it was saved: in epochs counted from 1,
            or 1, 2, 3, ... if not every epoch is known.
        left_out: checkpoints of the run that were found and not chosen.
        run: all checkpoints of the run, whether chosen or not.
        rearranged: files were given one by one, and are not in the order given.
        thinned: some checkpoints were left out on purpose, so a gap in the epochs means nothing.
        problems: what `survey` found.
        sigmas: of EMA snapshots, the relative width of each; otherwise empty.
    """

    checkpoints: tuple[Checkpoint, ...]
    passed_over: tuple[PassedOver, ...]
    notes: tuple[str, ...]
    positions: tuple[float, ...]
    left_out: tuple[Path, ...] = ()
    run: tuple[Checkpoint, ...] = ()
    rearranged: bool = False
    thinned: bool = False
    problems: tuple[Problem, ...] = ()
    sigmas: tuple[float, ...] = ()


def _find_none(_: Sequence[Path]) -> Collection[Path]:
    return ()


def select(
    sources: Sequence[StrPath],
    *,
    last: int | None = None,
    from_epoch: int | None = None,
    to_epoch: int | None = None,
    every: int = 1,
    min_spacing: int | None = None,
    target_count: int | None = None,
    exclude: Sequence[str] = (),
    best: int | None = None,
    best_by: str | None = None,
    monitor: str | None = None,
    mode: str | None = None,
    log: StrPath | None = None,
    log_first: int | None = None,
    epoch_pattern: str | None = None,
    order: str | None = None,
    growing: bool = False,
    use_ema: bool = False,
    find_polyak_outputs: Callable[[Sequence[Path]], Collection[Path]] = _find_none,
) -> Selection:
    r"""Find the checkpoints of a run and choose some of them.

    The restrictions apply in this order: ``exclude``, ``from_epoch`` and ``to_epoch``, ``every``,
    ``min_spacing``, ``last``, ``target_count``, ``best``.

    Args:
        sources: directories, patterns with ``* ? [``, and files. Directories are not searched
            recursively, except that a folder may be one checkpoint, as Transformers saves them, or
            a numbered folder may hold one, as with Diffusers.
            All are ordered by the epoch in their names, or in those of their folders if the names
            are equal.  Files whose names have no number keep the order given, oldest first.
        last: how many of the newest to take; never fewer.
        from_epoch: the first epoch to take.
        to_epoch: the last epoch to take.
        every: take the newest, and each ``every``-th before it.
        min_spacing: take the newest, and before it those that are at least so far apart, in epochs
            or steps, whichever the names have.
        target_count: how many to take, as evenly spaced as they can be, the newest and the oldest
            among them; never fewer.
        exclude: patterns for file names or whole paths to leave out.
        best: how many to take by metric; ties go to the newer one. They stay in order of epoch.
        best_by: ``value`` takes the best values; ``lifespan`` takes those that stayed the best of
            the run for the most checkpoints.
        monitor: the metric for ``best``, ``val_loss`` by default.
        mode: ``min`` or ``max``, whichever is better; guessed from the metric's name by default.
        log: a CSV file to read the metric from, instead of from the file names, as the CSVLogger of
            Keras or Lightning writes it.
        log_first: what the log calls the epoch that file names call 1: 0, as Keras counts, or 1, if
            file and row have equal numbers.  Needed where both fit and choose other files.
        epoch_pattern: a regular expression that is searched for in each file's name, or in its path
            below their common folder if names repeat or none matches; the epoch is its group
            ``epoch``, else its first group, else the whole match.
        order: "given" keeps the order of files that are given one by one, and confirms that an
            average among them is meant; "epoch" confirms that the order is that of their epochs.
        growing: the run is still training, so fewer checkpoints than asked for, or none yet, are no
            error.
        use_ema: of folders that hold a model and its EMA, as Diffusers saves them, take the EMA.
        find_polyak_outputs: returns which of the given files are averages that this tool wrote.
            It is called only with regular files.  Averages in directories and patterns are passed
            over; given by themselves beside files that are none, they need ``order`` "given".

    Raises:
        UsageError: the arguments contradict one another or are out of range.
        CheckpointError: the checkpoints cannot be found, ordered or selected.
    """
    _check_counts(
        last=last, every=every, best=best, min_spacing=min_spacing, target_count=target_count
    )
    wanted = check_monitor(best, monitor, mode, log, log_first, best_by)
    _check_bounds(from_epoch, to_epoch)
    pattern = None if epoch_pattern is None else _compile_pattern(epoch_pattern)
    as_given = order == "given"
    pool = find_candidates(
        list_sources(sources), exclude, growing, find_polyak_outputs, refuse, as_given, use_ema
    )
    if pattern is None:  # a pattern says itself which files have an epoch
        pool = pass_over_outsiders(pool)
    ordered, notes = order_by_epoch(pool, pattern, as_given)
    followed = ordered
    if growing:
        followed, restart_notes = _follow(ordered)
        notes += restart_notes
    spaced = restrict_epochs(followed, from_epoch, to_epoch, growing)[::-1][::every][::-1]
    if min_spacing is not None and spaced:
        spaced, spacing_notes = keep_apart(spaced, min_spacing)
        notes += spacing_notes
    chosen = take_newest(spaced, last, len(ordered), growing)
    if target_count is not None and chosen:
        chosen, count_notes = take_evenly(chosen, ordered, target_count, growing)
        notes += count_notes
    if wanted is not None and chosen:
        chosen, metric_notes = take_best(chosen, ordered, wanted, growing)
        notes += metric_notes
    is_spaced = every > 1 or min_spacing is not None or target_count is not None
    thinned = growing or is_spaced or best is not None or is_thinned(pool, exclude)
    selection = _build_selection(pool, chosen, ordered, notes, thinned)
    return replace(
        selection, rearranged=pool.as_given and [*pool.paths] != [one.path for one in ordered]
    )


def survey(
    sources: StrPath | Sequence[StrPath],
    *,
    last: int | None = None,
    from_epoch: int | None = None,
    to_epoch: int | None = None,
    exclude: Sequence[str] = (),
    epoch_pattern: str | None = None,
    order: str | None = None,
    find_polyak_outputs: Callable[[Sequence[Path]], Collection[Path]] = _find_none,
) -> Selection:
    """Find the checkpoints of a run as `select` does, but report problems instead of raising.

    Checkpoints are ordered by epoch, however the files were given; those of unknown epoch come
    first.  Files that were given one by one keep their order unless every name has an epoch.

    Args:
        sources: as for `select`, like the other arguments.
        last: how many of the newest to take; never fewer.
        from_epoch: the first epoch to take.
        to_epoch: the last epoch to take.
        exclude: patterns for file names or whole paths to leave out.
        epoch_pattern: a regular expression that finds the epoch in a name.
        order: "given" keeps the order of files that are given one by one.
        find_polyak_outputs: returns which of the given files are averages that this tool wrote.

    Returns:
        The checkpoints, with the ``problems`` that were found.

    Raises:
        UsageError: the arguments contradict one another or are out of range.
        CheckpointError: there are no checkpoints.
    """
    _check_counts(last=last)
    _check_bounds(from_epoch, to_epoch)
    pattern = None if epoch_pattern is None else _compile_pattern(epoch_pattern)
    problems: list[Problem] = []
    as_given = order == "given"
    pool = find_candidates(
        list_sources(sources), exclude, False, find_polyak_outputs, problems.append, as_given
    )
    if pattern is None:
        pool = pass_over_outsiders(pool)
    ordered = order_as_far_as_known(pool, pattern, as_given, problems.append)
    # A checkpoint of unknown epoch may lie between --from and --to, so it is kept.
    known = [one for one in ordered if one.epoch is not None]
    within = set(restrict_epochs(known, from_epoch, to_epoch) if known else ())
    kept = [one for one in ordered if one.epoch is None or one in within]
    chosen = take_newest(kept, last, len(ordered))
    selection = _build_selection(pool, chosen, ordered, (), is_thinned(pool, exclude))
    concerned = (one for one in problems if one.path not in selection.left_out)
    foreign = {one.path for one in problems if one.kind == "other run"}
    of_run = tuple(one for one in ordered if one.path not in foreign)
    return replace(selection, problems=tuple(concerned), run=of_run)


def _follow(ordered: list[Checkpoint]) -> tuple[list[Checkpoint], list[str]]:
    """Return the checkpoints of the run that is being written, and notes.

    What an earlier run has left in the folder is not averaged with them.  One new file alone may
    have been repaired; from the second on, it is taken for a run that was started again.
    """
    restarted = find_overwritten(ordered)
    if restarted is None or len(restarted.written) < 2:
        return ordered, []
    current = {one.path for one in restarted.current}
    kept = [one for one in ordered if one.epoch is None or one.path in current]
    note = (
        f"{restarted.describe_parts()}; only the run that is being written is averaged, "
        f"{describe_epochs(kept)}"
    )
    return kept, [note]


def _build_selection(
    pool: Pool,
    chosen: Sequence[Checkpoint],
    ordered: Sequence[Checkpoint],
    notes: Sequence[str],
    thinned: bool,
) -> Selection:
    taken = {one.path for one in chosen}
    return Selection(
        checkpoints=tuple(chosen),
        passed_over=tuple(sorted(pool.passed_over, key=lambda passed: str(passed.path))),
        notes=(*pool.notes, *notes),
        positions=place_in_run(chosen, ordered),
        left_out=tuple(one.path for one in ordered if one.path not in taken),
        run=tuple(ordered),
        thinned=thinned,
    )


def model_files(
    sources: StrPath | Sequence[StrPath], *, weights: bool = False
) -> tuple[list[Path], list[PassedOver]]:
    """Find every whole model among the sources, to evaluate each by itself.

    Unlike `select`, this function does not assume that files in one place form a run: averages may
    lie beside epochs, and a name needs no number.

    Args:
        sources: directories (not searched recursively), patterns with ``* ? [``, and files, which
            are taken whatever their names.
        weights: take files that hold weights only too, as there is a model for them: of a folder
            those of Keras, or where it has none, every checkpoint that `average` takes.

    Returns:
        The files, source by source, and what was passed over. Files of a directory or a pattern are
        ordered by epoch if every name has one, else by name, with numbers by value.

    Raises:
        UsageError: no sources are named.
        CheckpointError: a source is not there, cannot be listed, or holds no model.
    """
    found: list[Path] = []
    passed_over: list[PassedOver] = []
    kinds = KINDS_OF_MODEL | ({one: one for one in WEIGHTS_SUFFIXES} if weights else {})
    for source in map(enter, list_sources(sources)):
        if os.path.lexists(source) and not Path(source).is_dir():
            found.append(Path(source))
            continue
        paths, is_listed = expand_source(source)
        if weights and not is_listed:  # a folder that is one checkpoint
            found += paths
            continue
        passed, models = _sort_out(paths, kinds, "whole model")
        if weights and not models:
            passed, models = _sort_out(paths, KINDS_OF_FILE, "checkpoint")
        if not models:
            message = describe_nothing_found(source, passed, "model", kinds)
            others = [] if weights else _sort_out(paths, KINDS_OF_FILE, "checkpoint")[1]
            if others:
                message += (
                    f"; {shown(others[0].name, 60)} holds tensors without a model: name a function "
                    "that returns it, such as a torch.nn.Module: --model MODULE.py:FUNCTION"
                )
            raise CheckpointError(message)
        found += sort_by_epoch_or_name(models)
        passed_over += passed
    return found, passed_over


def _sort_out(
    paths: Sequence[Path], kinds: Mapping[str, str], what: str
) -> tuple[list[PassedOver], list[Path]]:
    """Return what is passed over by its name, and the rest."""
    reasons = {path: find_objection(path, kinds, what) for path in paths}
    passed = [PassedOver(path, reason) for path, reason in reasons.items() if reason]
    return passed, [path for path, reason in reasons.items() if not reason]


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {count}; expected at least 1")


def _check_bounds(from_epoch: int | None, to_epoch: int | None) -> None:
    if from_epoch is not None and to_epoch is not None and from_epoch > to_epoch:
        raise UsageError(
            f"--from {from_epoch} is after --to {to_epoch}; expected the first epoch and then the "
            "last"
        )


def _compile_pattern(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(
            f"--epoch-pattern '{shown(pattern)}' is not a regular expression: {shown(error)}"
        ) from error
