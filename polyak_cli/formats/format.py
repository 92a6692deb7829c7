"""Define what a format offers: scanning, laying out, checking.

Knows no format itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from polyak_cli.processes.sandbox import Alive
from polyak_cli.tensors import Table


class Scan(NamedTuple):
    """What to scan: a checkpoint, and whether also what is not the model's own."""

    path: str
    everything: bool


class Layout(NamedTuple):
    """What to lay out: an output like the template, with room for its averaged tensors."""

    template: Table
    output: str  # the hidden path to write
    averaged: Mapping[str, str]  # location -> dtype to store
    drop_optimizer: bool
    provenance: str  # the record to write into it, as JSON


class Format(Protocol):
    """What a module of `formats` offers for one way of storing checkpoints.

    All but `seal` run in a child of `formats.sandbox`, call ``alive`` every few hundred tensors and
    return what JSON can hold.
    """

    NAME: str  # as its users call it
    SUFFIXES: tuple[str, ...]  # what an output of it may be called
    CHECKED: bool  # its files hold checksums of their tensors

    def scan(self, request: Scan, alive: Alive) -> dict[str, Any]:
        """Read a header.

        Returns:
            ``tensors`` and ``others``, rows of [name, shape, dtype, byteorder, location, storage,
            digest, file, arrangement] where the last three may be left out; ``optimizer``, names
            among the others; ``config``, ``average``; and ``files``, [path, identity] each, where
            there are several.  Where there are such, ``about``, texts that it holds about itself,
            with ``provenance`` among them, where everything is asked for; ``order``, the layers in
            their order, where loading goes by position; ``statistics``, names of BatchNorm's moving
            statistics; ``slots``, EMA among the optimizer's -> the tensors that it may be of;
            ``suffixes`` of this very layout; ``fixed``, that types and optimizer state must stay;
            ``tails``, of the further files that an output has, in place of its suffix; and
            ``cautions``, what a user should know who stores a dtype, keeps the "optimizer", or
            wants the "ema" that a file has not.

        Raises:
            FormatError: the file is damaged, hostile or holds no model; names file and tensor.
        """

    def lay_out(self, request: Layout, alive: Alive) -> dict[str, Any]:
        """Write all of an output but its averaged tensors.

        Returns:
            ``places``: location -> [offset, dtype, byteorder, file] of every averaged tensor that
            is not empty; ``files`` where there are several, the others called like the output with
            something appended (see `publishing.publish`); and whatever `seal` wants to know.
        """

    def check(self, path: str, alive: Alive) -> None:
        """Compare the tensors with their checksums, where the format has such.

        Raises:
            FormatError: one is wrong; names file and tensor.
        """

    def seal(self, output: str, laid_out: Mapping[str, Any]) -> None:
        """Finish an output whose tensors are written: checksums."""

    def is_average(self, path: str, alive: Alive) -> bool:
        """Tell whether this tool wrote the file; a file that cannot be read it did not."""
