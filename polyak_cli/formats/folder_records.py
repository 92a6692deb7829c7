"""Read the record of an average that is a folder, from its file there.

Does not know what a record says.
"""

from __future__ import annotations

from pathlib import Path

from polyak_cli.errors import FormatError
from polyak_cli.formats.model_folders import RECORD_NAME
from polyak_cli.storage import open_input

#: Bytes of a record that are read; that of ten thousand checkpoints has a few MB.
_LONGEST = 64 << 20


def read_record(folder: Path) -> str:
    """Return the text of the record in a folder; "" if there is none, or it cannot be read."""
    try:
        with open_input(folder / RECORD_NAME) as file:
            return file.read(0, _LONGEST).decode(errors="replace").removesuffix("\n")
    except FormatError:
        return ""
