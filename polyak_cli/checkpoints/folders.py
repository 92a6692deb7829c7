"""Find the part of each path that tells the checkpoints of a run apart: the name, or a folder's.

Knows paths.  Lists no folder and opens no file.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from polyak_cli.checkpoints.names import DATE, VERSIONS, Name, Role, has_whole_number, parse_name
from polyak_cli.errors import CheckpointError, shown


def list_relative_paths(paths: Sequence[Path]) -> list[str]:
    """Return the shortest texts that tell checkpoints apart: their names, or else relative paths.

    Returns:
        The bare names if they differ; otherwise paths relative to the folder that all of them have
        in common, with "/".  They contain no folder above that one.
    """
    names = [path.name for path in paths]
    return names if len({*names}) == len(names) else list_paths_below(paths)


def list_paths_below(paths: Sequence[Path]) -> list[str]:
    """Return paths relative to the folder that all have in common, with "/"."""
    whole = [os.path.abspath(path) for path in paths]  # noqa: PTH100 - links are not followed
    common = os.path.commonpath([os.path.dirname(path) for path in whole])  # noqa: PTH120 - as above
    return [str(PurePosixPath(Path(path).relative_to(common))) for path in whole]


def find_names(paths: Sequence[Path], way_out: str) -> list[Name]:
    """Return the names in which the epochs of files are looked for.

    These are the files' own, unless they are equal or hold no number: then the nearest folder
    whose name has a number that varies, as in checkpoint-500/pytorch_model.bin.

    Args:
        paths: the files.
        way_out: what the error advises.

    Raises:
        CheckpointError: several folders vary, or one of them has no number.
    """
    own = [parse_name(path) for path in paths]
    if len(paths) < 2 or (
        len({path.name for path in paths}) > 1 and any(map(has_whole_number, own))
    ):
        return own
    folders = [PurePosixPath(text).parts[:-1] for text in list_paths_below(paths)]
    depth = max(map(len, folders))
    # Counted from the file upwards; a folder that is not there varies too.
    levels = [
        [parts[-k] if k <= len(parts) else "" for parts in folders] for k in range(1, depth + 1)
    ]
    varying = [level for level in levels if len({*level}) > 1]
    parsed = [[parse_name(Path(folder)) for folder in level] for level in varying]
    numbered = [level for level in parsed if any(map(has_epoch, level))]
    if not numbered:
        return own
    if len(varying) > 1:
        found = " and ".join(shown(level[0], 60) for level in varying[:2])
        raise CheckpointError(
            f"{shown(paths[0])}: the file names do not show the order, and several of their "
            f"folders differ, such as {found}: {way_out}"
        )
    for path, name in zip(paths, numbered[0], strict=True):
        if not has_whole_number(name):
            raise CheckpointError(
                f"{shown(path)}: the file names do not show the order, and its folder "
                f"'{shown(name.stem, 60)}' has no number, unlike others: leave it out with "
                f"--exclude '{shown(glob.escape(str(path)))}', or {way_out}"
            )
    return [replace(name, path=path) for path, name in zip(paths, numbered[0], strict=True)]


def has_epoch(name: Name) -> bool:
    """Return whether a folder's name has a number that may be an epoch or a step.

    Numbers of runs, seeds, folds and versions, and dates, tell runs apart and not epochs.
    """
    return any(
        number.role in (Role.EPOCH, Role.PLAIN, Role.COUNTER)
        and number.label not in VERSIONS
        and not DATE.fullmatch(number.text)
        for number in name.numbers
    )
