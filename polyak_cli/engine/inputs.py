"""The input files of a run: opened when first read, and checked to be those that were scanned.

Knows nothing of slabs and of what is done with the bytes.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Sequence
from pathlib import Path

from polyak_cli.engine.slabs import TensorSource
from polyak_cli.errors import FormatError, shown
from polyak_cli.storage import Bytes, File, Version
from polyak_cli.storage.local import expect


class Files:
    """The inputs, opened when first read, each checked to be the file that was scanned.

    As many stay open as the process may have; the rest are opened for every slab.
    """

    def __init__(self, inputs: Sequence[File]) -> None:
        self.inputs = inputs
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.room = max(0, soft - 64) if soft != resource.RLIM_INFINITY else len(inputs)
        self.kept: dict[int, int] = {}

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self.kept.values():
            os.close(descriptor)

    def read(self, source: TensorSource, start: int, buffer: Bytes, name: str) -> None:
        """Fill the buffer from a tensor, with file and tensor named in every error."""
        path = self.inputs[source.file].path
        try:
            descriptor = self._keep(source.file)
            if descriptor is not None:
                source.storage.read_into(descriptor, start, buffer)
                return
            descriptor = self._open(source.file)
            try:
                source.storage.read_into(descriptor, start, buffer)
            finally:
                os.close(descriptor)
        except FormatError as error:
            raise FormatError(f"{shown(path)}: tensor '{shown(name)}': {error}") from None
        except OSError as error:
            raise FormatError(f"{shown(path)}: cannot be read: {error.strerror}") from None

    def expect(self, source: TensorSource, start: int, stop: int) -> None:
        """Have bytes of a tensor fetched, if its file is one that stays open."""
        with contextlib.suppress(OSError, FormatError):  # reading them will say what is wrong
            descriptor = self._keep(source.file)
            if descriptor is not None:
                for offset, nbytes in source.storage.runs(start, stop):
                    expect(descriptor, offset, nbytes)

    def _keep(self, k: int) -> int | None:
        """Return an input that is open for the whole run, if there is room for another."""
        descriptor = self.kept.get(k)
        if descriptor is None and len(self.kept) < self.room:
            descriptor = self.kept[k] = self._open(k)
        return descriptor

    def _open(self, k: int) -> int:
        path, identity = self.inputs[k]
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if Version.of(os.fstat(descriptor)) != identity:
            os.close(descriptor)
            raise FormatError("the file changed while it was read; is training still running?")
        return descriptor


def check_unchanged(inputs: Sequence[File]) -> None:
    """Check once more that every input is the file that was scanned.

    Raises:
        FormatError: one was replaced, written to or removed meanwhile.
    """
    for path, identity in inputs:
        with contextlib.suppress(OSError):
            if Version.of(Path(path).stat()) == identity:
                continue
        raise FormatError(
            f"{shown(path)}: changed or vanished while it was read; is training still running?"
        )
