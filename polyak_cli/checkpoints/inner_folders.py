"""Choose the model in numbered folders that hold one a folder, such as `checkpoint-500/unet`.

Scripts of Diffusers save each model that they train in a folder of its own, and its EMA beside it
in `unet_ema`.  Knows paths; what a checkpoint is, the caller says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from polyak_cli.checkpoints.folders import has_epoch
from polyak_cli.checkpoints.names import parse_name

#: How a folder with the EMA of the model beside it is called, after that one's name.
_EMA = "_ema"
#: Why a folder is passed over that `find_incomplete` finds.
INCOMPLETE = "named like the checkpoints, but holds no complete one"
#: Folders that are looked into.
_MOST = 10_000


class InnerFolders(NamedTuple):
    """The models in the numbered folders of a run."""

    folders: Sequence[Path]  # the numbered ones, which hold some
    names: Sequence[str]  # of the models in them, each without its EMA
    chosen: Sequence[Path]  # the checkpoints, if there is one model
    left: Sequence[tuple[Path, str]]  # what is passed over then, and why


def find_inner(
    folders: Sequence[Path], is_checkpoint: Callable[[Path], bool], *, use_ema: bool
) -> InnerFolders | None:
    """Return the models in the numbered ones among folders; None if these hold no folder of one.

    Args:
        folders: those of a run, none of which is a checkpoint itself.
        is_checkpoint: tells whether a folder is one.
        use_ema: choose the EMA's folders where there are some.
    """
    held = {
        folder: [one for one in _list_folders(folder) if is_checkpoint(one)]
        for folder in folders[:_MOST]
        if has_epoch(parse_name(folder))
    }
    held = {folder: inner for folder, inner in held.items() if inner}
    names = sorted({one.name for inner in held.values() for one in inner})
    if not names:
        return None
    models = [name for name in names if name.removesuffix(_EMA) not in {*names} - {name}]
    if len(models) > 1:
        return InnerFolders([*held], models, (), ())
    wanted = f"{models[0]}{_EMA}" if use_ema and len(names) > 1 else models[0]
    chosen, left = [], []
    for folder, inner in held.items():
        for one in inner:
            if one.name == wanted:
                chosen.append(one)
            else:
                ema = "the EMA, which --use-ema takes"
                left.append((one, "the model whose EMA is averaged" if use_ema else ema))
        if wanted not in (one.name for one in inner):
            left.append((folder, f"holds no {wanted}"))
    return InnerFolders([*held], models, chosen, left)


def find_incomplete(folders: Sequence[Path], checkpoints: Sequence[Path]) -> set[Path]:
    """Return the folders that are called like the checkpoints, up to the number.

    A save that was interrupted leaves such a folder: the newest of the run, without its weights.

    Args:
        folders: those that are no checkpoints.
        checkpoints: files say nothing of folders' names.
    """
    if not folders:
        return set()
    # A model in a numbered folder, such as checkpoint-500/unet, has that folder's number.
    names = [
        path.name if re.search(r"\d", path.name) else path.parent.name
        for path in checkpoints
        if path.is_dir()
    ]
    forms = {re.sub(r"\d+", "0", name) for name in names if re.search(r"\d", name)}
    return {folder for folder in folders if re.sub(r"\d+", "0", folder.name) in forms}


def _list_folders(folder: Path) -> list[Path]:
    """Return the folders in a folder; none if it cannot be listed."""
    try:
        return sorted(one for one in folder.iterdir() if one.is_dir())
    except OSError:
        return []
