"""Folders of sentence-transformers: `modules.json` names the folders of the modules of a model.

The first module is mostly a model of Transformers in the folder itself; others, such as
``2_Dense``, may have weights too.  Each keeps its format, and all are averaged.  Runs no code of a
module: their classes, which the file names, are not looked at.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polyak_cli.errors import FormatError, shown
from polyak_cli.formats.catalogue import MODULES, choose_openers
from polyak_cli.formats.format import ScanRequest
from polyak_cli.formats.parts import FormatOfParts, Part, scan_part
from polyak_cli.processes.sandbox import Heartbeat
from polyak_cli.storage import open_input
from polyak_cli.storage.local import name_errors

#: Bytes that the file may have, modules that it may name, and folders in the folder of a module.
_LONGEST, _MOST_MODULES, _DEEPEST = 1 << 20, 100, 4


def _read_modules(path: Path) -> list[str]:
    """Return the folders of the modules, relative to that of the file; "" is the folder itself."""
    with open_input(path) as file, name_errors(str(path)):
        raw = file.read(0, _LONGEST + 1)
        try:
            said = json.loads(raw) if len(raw) <= _LONGEST else None
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, list) or not 0 < len(said) <= _MOST_MODULES:
            raise FormatError("is damaged: it is no list of modules")
        return list(dict.fromkeys(_check_module(module) for module in said))


def _check_module(module: Any) -> str:
    """Return the folder of a module; refuse a path that leads elsewhere."""
    folder = module.get("path") if isinstance(module, dict) else None
    if not isinstance(folder, str):
        raise FormatError("is damaged: a module has no path")
    steps = folder.split("/")
    if folder and (any(step in ("", ".", "..") for step in steps) or set(folder) & {"\\", "\0"}):
        raise FormatError(
            f"names the folder '{shown(folder)}' for a module; expected one in the same folder"
        )
    return folder


def _find_weights(root: Path, module: str) -> Iterator[tuple[str, str]]:
    """Yield the file that opens the weights of each folder of a module, and a prefix for its names.

    A module may hold modules in folders, such as those of a Router.
    """
    waiting = [module]
    while waiting:
        folder = waiting.pop(0)
        prefix = f"{folder}/" if folder else ""
        names, folders = _list_folder(root / folder)
        openers = choose_openers(names - {MODULES})
        if len(openers) > 1:
            raise FormatError(
                f"{shown(root / folder)}: holds {openers[0]} and {openers[1]}, and either could be "
                "the weights; move one away"
            )
        yield from ((f"{prefix}{name}", prefix) for name in openers)
        # The folders in the model's own folder are modules only if the file says so.
        if module and folder.count("/") < module.count("/") + _DEEPEST:
            waiting += [f"{prefix}{name}" for name in folders]


def _list_folder(folder: Path) -> tuple[set[str], list[str]]:
    """Return the names of the files and of the folders in a folder, which must be no link.

    A folder that is missing has no weights: modules without any need none.
    """
    if not os.path.lexists(folder):
        return set(), []
    if folder.is_symlink() or not folder.is_dir():
        raise FormatError(f"{shown(folder)}: is not a folder; {MODULES} says that it is a module's")
    names, folders = set(), []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                elif entry.is_file():
                    names.add(entry.name)
    except OSError as error:
        raise FormatError(f"{shown(folder)}: cannot be read: {error.strerror}") from None
    return names, sorted(folders)


class ModuleFolders(FormatOfParts):
    """`modules.json` and the folders of modules that it names."""

    key = "modules"
    name = "sentence-transformers"
    suffixes = ()
    recalculation = "load the average, and run texts through it in training mode, without a step"

    def scan_parts(self, request: ScanRequest, heartbeat: Heartbeat) -> list[Part]:
        """Read the headers of all modules that have weights."""
        path = Path(request.path)
        found = [
            scan_part(path.parent, name, prefix, request, heartbeat)
            for folder in _read_modules(path)
            for name, prefix in _find_weights(path.parent, folder)
        ]
        if not found:
            raise FormatError(f"{shown(path)}: none of its modules has weights")
        return found

    def is_polyak_output(self, path: str, heartbeat: Heartbeat) -> bool:
        """See `Format.is_polyak_output`."""
        try:
            found = self.scan_parts(ScanRequest(path, with_optimizer=False), heartbeat)
        except FormatError:
            return False
        return any(part.table.is_polyak_output for part in found)
