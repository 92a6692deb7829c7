"""An output of another format than its checkpoints': what crosses over, and what would be lost.

A format that can be left offers `Format.texts`, one that can be entered `Format.convert`.  What
crosses is names, arrays and texts; anything else is refused before the work begins.  Knows no
format.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from polyak_cli.errors import CHANGED, ChangedError, FormatError, OutputError, shown
from polyak_cli.formats.format import SkeletonRequest
from polyak_cli.processes.sandbox import Heartbeat
from polyak_cli.storage import Bytes, InputFile, Version, open_input
from polyak_cli.tensors import Table, TensorSpec

_STEP = 1 << 20


def refuse_losses(request: SkeletonRequest) -> None:
    """Refuse what no other format can hold.

    Raises:
        OutputError: says what and why.
    """
    template = request.template
    for name in template.others:
        if name in template.optimizer and not request.drop_optimizer:
            raise OutputError(
                "optimizer state cannot be converted to another format; leave it out with "
                "--optimizer drop"
            )
        is_optional = template.rules.part or request.only_weights
        if name not in template.optimizer and not is_optional:
            raise OutputError(
                f"'{shown(name)}', which is not part of the model, would be lost; leave it out "
                "with --only-weights"
            )
    for spec in template.tensors.values():
        if spec.storage is None:
            raise OutputError(f"tensor '{shown(spec.name)}' holds strings, which would be lost")
        if spec.arrangement:
            raise OutputError(
                f"tensor '{shown(spec.name)}' is stored in {spec.arrangement}, which another "
                "format cannot keep; give the output the suffix of the checkpoints, and convert "
                "the average with the program that loads it"
            )


def require_same(path: str, found: Version, scanned: Version) -> None:
    """Refuse a file that is no more the one that was scanned."""
    if found != scanned:
        raise ChangedError(f"{shown(path)}: {CHANGED}")


class Sink(Protocol):
    """What takes the bytes of a tensor; an `OutputFile` does."""

    def write(self, offset: int, content: Bytes) -> None:
        """Write all of the content at an offset."""


class Carrier:
    """Copies carried tensors of a checkpoint piece by piece, little-endian."""

    def __init__(self, table: Table, heartbeat: Heartbeat) -> None:
        self.table = table
        self.heartbeat = heartbeat
        self.opened: dict[int, InputFile] = {}
        self.last = 0  # the number of the file that was read last, for messages

    def __enter__(self) -> Carrier:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.opened.values():
            file.close()

    def __getitem__(self, number: int) -> InputFile:
        """Return one of the checkpoint's files; see `tensors.Files`."""
        self.last = number
        if number not in self.opened:
            self.opened[number] = open_input(*self.table.files[number])
        return self.opened[number]

    def carry(self, spec: TensorSpec, target: Sink, offset: int) -> None:
        """Copy a tensor to an offset of an output.

        Raises:
            FormatError: it cannot be read; names file and tensor.
            OSError: it cannot be written.
        """
        if spec.storage is None:
            raise AssertionError(f"{spec.name} has no storage")
        width = spec.nbytes // max(1, spec.size)
        if spec.dtype.startswith("complex"):
            width //= 2  # of each of the two parts
        # A multiple of every width, as each is a power of two.
        buffer = np.empty(min(_STEP, spec.nbytes), np.uint8)
        for start in range(0, spec.nbytes, _STEP):
            self.heartbeat()
            piece = buffer[: spec.nbytes - start]
            try:
                spec.storage.read_into(self, start, piece)
            except FormatError as error:
                path = self.table.files[self.last].path
                if str(error).startswith(f"{shown(path)}: "):  # it could not even be opened
                    raise
                raise FormatError(f"{shown(path)}: tensor '{shown(spec.name)}': {error}") from None
            if spec.byteorder == ">" and width > 1:
                piece.view(f"u{width}").byteswap(inplace=True)
            target.write(offset + start, piece)
