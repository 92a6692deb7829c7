"""The input files of a run: a bounded set of open files, checked to be those that were scanned.

Knows nothing of slabs, and nothing of what is done with the bytes.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Sequence

from polyak_cli.engine.slabs import TensorSource
from polyak_cli.engine.sums import Sums
from polyak_cli.errors import ChangedError, FormatError, shown
from polyak_cli.storage import Bytes, File, InputFile, open_input, read_version


class OpenInputs:
    """The inputs, opened when first read, each checked to be the file that was scanned.

    As many stay open as the process may have; the others are opened again for every slab.
    """

    def __init__(
        self, inputs: Sequence[File], taken: int = 0, sets: int = 1, sums: Sums | None = None
    ) -> None:
        """Open nothing yet.

        Args:
            inputs: the files of all checkpoints.
            taken: descriptors that are in use beside those of an ordinary run.
            sets: how many sets of these inputs are open in this process.
            sums: what is read is added to, if it is wanted.
        """
        self.inputs = inputs
        self.sums = sums
        # 64 descriptors are left for outputs, pipes and the caller's own files.
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        room = max(0, soft - 64 - taken) // sets
        self.limit = room if soft != resource.RLIM_INFINITY else len(inputs)
        self.kept: dict[int, InputFile] = {}

    def __enter__(self) -> OpenInputs:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        while self.kept:
            _, file = self.kept.popitem()
            file.close()

    def read(self, source: TensorSource, start: int, buffer: Bytes, name: str) -> None:
        """Fill the buffer from a tensor, with file and tensor named in every error."""
        with _CheckpointFiles(self, source.file) as files:
            try:
                source.storage.read_into(files, start, buffer)
            except FormatError as error:
                if files.is_opening and isinstance(error.__cause__, OSError):
                    raise  # it names the file already, and concerns no tensor
                path = self.inputs[files.last].path
                where = f"{shown(path)}: tensor '{shown(name)}'"
                if files.is_opening or isinstance(error, ChangedError):
                    raise ChangedError(f"{where}: {_CHANGED}") from None
                raise FormatError(f"{where}: {error}") from None

    def prefetch(self, number: int, ranges: Sequence[tuple[int, int]]) -> None:
        """Have ranges of an input fetched, each an offset and a length, if it stays open."""
        with contextlib.suppress(OSError, FormatError):  # the read that follows reports the error
            file = self.keep(number)
            if file is not None:
                file.prefetch(ranges)

    def keep(self, k: int) -> InputFile | None:
        """Return an input that is open for the whole run, if another may be open."""
        file = self.kept.get(k)
        if file is None and len(self.kept) < self.limit:
            file = self.kept[k] = open_input(*self.inputs[k])
        return file


_CHANGED = "the file changed while it was read; is training still running?"


class _CheckpointFiles:
    """The files of one checkpoint among the inputs; see `tensors.Files`."""

    def __init__(self, inputs: OpenInputs, first: int) -> None:
        self.inputs = inputs
        self.first = first
        self.last = first  # the input that was read last, for messages
        self.is_opening = False
        self.opened: dict[int, InputFile] = {}  # for this one reading

    def __enter__(self) -> _CheckpointFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.opened.values():
            file.close()

    def __getitem__(self, number: int) -> InputFile:
        self.last = self.first + number
        self.is_opening = True
        file = self.inputs.keep(self.last) or self.opened.get(number)
        if file is None:
            file = self.opened[number] = open_input(*self.inputs.inputs[self.last])
        self.is_opening = False
        return self.inputs.sums.watch(file, self.last) if self.inputs.sums else file


def check_unchanged(inputs: Sequence[File]) -> None:
    """Check again that every input is the file that was scanned.

    Of an object every read has demanded the version that was listed, so that nothing is left to
    check.

    Raises:
        FormatError: one was replaced, changed or removed since.
    """
    for path, version in inputs:
        with contextlib.suppress(OSError):
            if read_version(path) == version:
                continue
        raise ChangedError(
            f"{shown(path)}: changed or vanished while it was read; is training still running?"
        )
