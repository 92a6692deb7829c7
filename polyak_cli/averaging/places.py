"""Find where each checkpoint stands in its run, for schemes that need more than its epoch.

Knows what the schemes need, and how names and files say it.  Reads no tensor.
"""

from __future__ import annotations

from dataclasses import replace

from polyak_cli import formats
from polyak_cli.averaging.schemes.posthoc import combine
from polyak_cli.checkpoints import Selection, find_file
from polyak_cli.checkpoints.snapshots import Snapshots
from polyak_cli.errors import UsageError, shown, word_share

#: Where icefall keeps how many batches it has trained, and every how many of them its ``model_avg``
#: is updated: that is the mean of the batches up to the last update.
_BATCHES, _PERIOD = "batch_idx_train", "average_period"
#: A difference from the EMA that is asked for, as a part of its norm, of which a plan warns.
_FAR = 0.2


def place_running_means(chosen: Selection) -> Selection:
    """Return the checkpoints of ``window`` with their steps for positions.

    A step is what the file says of itself, else the number in the name.

    Raises:
        FormatError: a checkpoint is foreign, damaged or hostile.
        UsageError: a step is not known.
    """
    files = [find_file(one.path) for one in chosen.checkpoints]
    found = formats.read_numbers(files, _BATCHES)
    steps = [number for number in found if number is not None]
    if len(steps) == len(found):
        periods = [period or 1.0 for period in formats.read_numbers(files, _PERIOD)]
        steps = [step // period * period for step, period in zip(steps, periods, strict=True)]
        note = f"the steps of the running means are those in the files: '{_BATCHES}'"
        return replace(chosen, positions=tuple(steps), notes=(*chosen.notes, note))
    # Not the positions: epochs that are counted from 0 are moved there, and steps are not.
    named = [one.epoch for one in chosen.checkpoints if one.epoch is not None]
    if len(named) == len(found):
        return replace(chosen, positions=tuple(map(float, named)))
    unknown = next(one.path for one in chosen.checkpoints if one.epoch is None)
    raise UsageError(
        f"--scheme window needs the step of each file, but {shown(unknown)} has no number in its "
        f"name that could be it, and no '{_BATCHES}' inside; say where it is with --epoch-pattern"
    )


def place_snapshots(found: Snapshots, sigma: float) -> Selection:
    """Return EMA snapshots with their steps for positions, and a note on what they can give.

    Args:
        found: the snapshots.
        sigma: of the EMA to make.

    Raises:
        UsageError: they cannot be combined.
    """
    error = combine(found.steps, sigma, found.sigmas).error
    note = (
        f"the EMA of sigma {sigma:g} at step {max(found.steps):g} is a snapshot itself"
        if error == 0.0
        else f"the weights of the steps that the snapshots give are off those of an EMA of sigma "
        f"{sigma:g} at step {max(found.steps):g} by {word_share(error)} (norm of the difference)"
    )
    if error > _FAR:
        note = f"warning: {note}: more snapshots, or of other sigmas, come nearer"
    return Selection(
        found.checkpoints,
        found.passed_over,
        (*found.notes, note),
        found.steps,
        left_out=found.left_out,
        run=found.checkpoints,
        thinned=True,
        sigmas=found.sigmas,
    )
