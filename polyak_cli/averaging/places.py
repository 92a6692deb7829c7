"""Find where each checkpoint stands in its run, for schemes that need more than its epoch.

Knows what the schemes need, and how names and files say it.  Reads no tensor.
"""

from __future__ import annotations

from dataclasses import replace

from polyak_cli import formats
from polyak_cli.checkpoints import Selection, find_file
from polyak_cli.errors import UsageError, shown

#: Where icefall keeps how many batches it has trained, and every how many of them its ``model_avg``
#: is updated: that is the mean of the batches up to the last update.
_BATCHES, _PERIOD = "batch_idx_train", "average_period"


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
