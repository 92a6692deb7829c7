"""Find where each checkpoint stands in its run, for schemes that need more than its epoch.

Knows what the schemes need, and how names and files say it.  Reads no tensor.
"""

from __future__ import annotations

from dataclasses import replace

from polyak_cli import formats
from polyak_cli.checkpoints import Selection, find_file
from polyak_cli.errors import UsageError, shown

#: Where icefall keeps how many batches its ``model_avg`` is the mean of.
_BATCHES = "batch_idx_train"


def place_running_means(chosen: Selection) -> Selection:
    """Return the checkpoints of ``window`` with their steps for positions.

    A step is what the file says of itself, else the number in the name.

    Raises:
        FormatError: a checkpoint is foreign, damaged or hostile.
        UsageError: a step is not known.
    """
    found = formats.read_numbers([find_file(one.path) for one in chosen.checkpoints], _BATCHES)
    steps = [number for number in found if number is not None]
    if len(steps) == len(found):
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
