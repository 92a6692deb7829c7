"""Copy what belongs to the model beside its tensors into an output folder, with the record.

Does not know which files belong to a model (`formats.model_folders`), nor how a record is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from polyak_cli.averaging import hashing
from polyak_cli.errors import FormatError, list_some, shown
from polyak_cli.formats import outputs
from polyak_cli.formats.catalogue import find_format
from polyak_cli.formats.model_folders import (
    OTHER_ADAPTER,
    OTHER_WEIGHTS,
    RECORD_NAME,
    FolderFiles,
    LeftOut,
    list_files,
)
from polyak_cli.storage import File, open_input
from polyak_cli.storage.local import LocalOutput, copy_range, name_errors
from polyak_cli.tensors import Table


def plan_files(
    output: Path | None, template: Table, *, only_weights: bool = False
) -> FolderFiles | None:
    """Return what an output folder will hold; None if the output is no folder.

    Args:
        output: what will be written, if it is known.
        template: the checkpoint that it will be like.
        only_weights: nothing is copied.

    Raises:
        FormatError: a file of the newest checkpoint's folder cannot be copied safely.
    """
    if output is None or not outputs.is_folder(output, template):
        return None
    form = find_format(template.format)
    weights = tuple(form.name_outputs(template))
    if only_weights:
        return FolderFiles(weights)
    folder = form.find_root(template)
    held = {Path(file.path).relative_to(folder).as_posix() for file in template.files}
    found, left_out = list_files(folder, held, everything=form.carries_all)
    neighbours = form.list_neighbours(template)
    left_out += (LeftOut(f"{name}/", reason) for name, reason in neighbours.items())
    carried = [
        one
        for one in found
        if not form.is_storage(one.name) and one.name.partition("/")[0] not in neighbours
    ]
    return FolderFiles(weights, tuple(carried), tuple(left_out))


def note_other_weights(files: FolderFiles | None) -> list[str]:
    """Return a note on what is not copied though a program may load it."""
    left = files.left_out if files else ()
    weights = [one.name for one in left if one.reason == OTHER_WEIGHTS]
    adapters = [one.name for one in left if one.reason == OTHER_ADAPTER]
    notes = []
    if weights:
        some = list_some(weights)
        notes.append(
            f"not copied, since other weights than the averaged ones may be in them: {some}"
        )
    if adapters:
        notes.append(
            f"not copied, since other adapters are averaged by themselves: {list_some(adapters)}; "
            f"name their folders, as in 'RUN/*/{shown(adapters[0].rstrip('/'), 60)}'"
        )
    return notes


def copy_files(files: FolderFiles, hidden: Path, record: str) -> list[Path]:
    """Copy the carried files into an output, and write its record; return what was written.

    Raises:
        FormatError: a file cannot be read, or changed since it was listed.
        OSError: the output cannot be written.
    """
    written = []
    for name, file in files.carried:
        target = hidden / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            open_input(*file) as source,
            name_errors(file.path),
            LocalOutput(str(target), create=True) as copy,
        ):
            copy_range(source, 0, copy, 0, source.size)
        written.append(target)
    target = hidden / RECORD_NAME
    with LocalOutput(str(target), create=True) as made:
        made.write(0, f"{record}\n".encode())
    return [*written, target]


def find_changed(folder: Path, digests: Mapping[str, str]) -> list[str]:
    """Return a sentence for each copied file that is not what was copied.

    Args:
        folder: the output.
        digests: name of each copied file -> its SHA-256.
    """
    found = []
    for name, digest in digests.items():
        path = folder / name
        try:
            with open_input(path) as opened:
                file = File(str(path), opened.version)
            text = "" if hashing.hash_file(file) == digest else "was changed"
        except FormatError as error:
            text = f"cannot be read: {str(error).rpartition(': ')[2]}"
        if text:
            found.append(
                f"'{shown(name, 80)}', which was copied from the newest checkpoint, {text}"
            )
    return found
