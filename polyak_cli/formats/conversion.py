"""An output of another format than its checkpoints': what crosses over, and what would be lost.

A format that can be left offers ``texts``, one that can be entered is a `Target`.  What crosses is
names, arrays and texts; anything else is refused before the work begins.  Knows no format.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from polyak_cli.errors import FormatError, OutputError, shown
from polyak_cli.formats.format import Layout
from polyak_cli.processes.sandbox import Alive
from polyak_cli.storage import (
    Version,
)
from polyak_cli.storage.local import (
    write_exactly,
)
from polyak_cli.tensors import Table, TensorSpec

_STEP = 1 << 20


class Source(Protocol):
    """What a module of `formats` offers besides, if its checkpoints may become another format's."""

    def texts(self, table: Table, alive: Alive) -> dict[str, str]:
        """Return all that a checkpoint says besides its tensors.

        Raises:
            OutputError: it says something that is not a text.
        """


class Target(Protocol):
    """What a module of `formats` offers besides, if other formats' checkpoints may become its."""

    def refuse(self, request: Layout, said: Mapping[str, str]) -> None:
        """Refuse what the format cannot hold.

        Raises:
            OutputError: says what and why, without the names of files.
        """

    def convert(self, request: Layout, said: Mapping[str, str], alive: Alive) -> dict[str, Any]:
        """Lay out what is not refused; see `tensors.Format.lay_out`."""


def refuse(request: Layout) -> None:
    """Refuse what no other format can hold.

    Raises:
        OutputError: says what and why.
    """
    template = request.template
    for name in template.others:
        if name in template.optimizer and not request.drop_optimizer:
            raise OutputError("optimizer state is kept only in the format it is in; drop it")
        if name not in template.optimizer:
            raise OutputError(f"'{shown(name)}', which is not the model's own, would be lost")
    for spec in template.tensors.values():
        if spec.storage is None:
            raise OutputError(f"tensor '{shown(spec.name)}' holds texts, which would be lost")
        if spec.arrangement:
            raise OutputError(f"tensor '{shown(spec.name)}' is stored in {spec.arrangement}")


def require_same(path: str, found: Version, scanned: Version) -> None:
    """Refuse a file that is no more the one that was scanned."""
    if found != scanned:
        raise FormatError(f"{shown(path)}: changed while it was read; is training still running?")


class Carrier:
    """Copies carried tensors of a checkpoint piece by piece, little-endian."""

    def __init__(self, table: Table, alive: Alive) -> None:
        self.table = table
        self.alive = alive
        self.opened: dict[int, int] = {}

    def __enter__(self) -> Carrier:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self.opened.values():
            os.close(descriptor)

    def carry(self, spec: TensorSpec, target: int, offset: int) -> None:
        """Copy a tensor to an offset of an open file."""
        if spec.storage is None:
            raise AssertionError(f"{spec.name} has no storage")
        width = spec.nbytes // max(1, spec.size)
        if spec.dtype.startswith("complex"):
            width //= 2  # of each of the two parts
        # A multiple of every width, as each is a power of two.
        buffer = np.empty(min(_STEP, spec.nbytes), np.uint8)
        for start in range(0, spec.nbytes, _STEP):
            self.alive()
            piece = buffer[: spec.nbytes - start]
            try:
                spec.storage.read_into(self._descriptor(spec.file), start, piece)
            except FormatError as error:
                path = self.table.files[spec.file].path
                raise FormatError(f"{shown(path)}: tensor '{shown(spec.name)}': {error}") from None
            if spec.byteorder == ">" and width > 1:
                piece.view(f"u{width}").byteswap(inplace=True)
            write_exactly(target, offset + start, piece)

    def _descriptor(self, number: int) -> int:
        if number not in self.opened:
            path, identity = self.table.files[number]
            self.opened[number] = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            require_same(path, Version.of(os.fstat(self.opened[number])), identity)
        return self.opened[number]
