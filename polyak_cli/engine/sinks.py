"""What workers do with what they fold where they do not see the files of an output.

Parts of an upload they send by themselves; the bytes of a part that are not averaged come with its
share.  All else they give back, and the coordinator writes it.  Both are right in any order, and
twice.  Knows nothing of who sends shares, or of when.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from polyak_cli.engine.folding import FoldJob
from polyak_cli.engine.slabs import Batch, Slab
from polyak_cli.storage import Bytes, OutputFile, mirrors
from polyak_cli.storage.local import LocalOutput, LocalStore
from polyak_cli.storage.parts import PartOutput
from polyak_cli.tensors import itemsize

if TYPE_CHECKING:  # of no use to who writes local files
    from polyak_cli.storage.uploads import Upload

#: Bytes that a share gives back at most, by which they come in messages of a moderate size.
MOST_RETURNED = 32 << 20

#: Number of an output and of its part, from 1 on -> place in the part and bytes of what is not
#: averaged.
Literals = Mapping[tuple[int, int], Sequence[tuple[int, bytes]]]


class Parcel(NamedTuple):
    """A share with all that its worker needs beside the job."""

    share: Sequence[Batch]
    literals: Literals


# --- at the coordinator ---------------------------------------------------------------------------


def find_sinks(outputs: Iterable[str]) -> Sequence[Upload | None]:
    """Return the sinks of a job, none where workers write the files themselves; see `FoldJob`."""
    paths = [*outputs]
    return [*map(mirrors.find_upload, paths)] if any(map(mirrors.is_mirrored, paths)) else ()


def make_parcel(
    share: Sequence[Batch], outputs: Sequence[str], sinks: Sequence[Upload | None]
) -> Parcel:
    """Return a share with the literals of the parts that it sends.

    Args:
        share: batches.
        outputs: files of this machine, which hold all but what is averaged.
        sinks: as of `FoldJob`.
    """
    written: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for slab in _list_slabs(share) if sinks else ():
        target = slab.tensor.targets[0]
        upload = sinks[target.file]
        if upload is not None:  # then no slab lies in two parts
            width = itemsize(target.dtype)
            start, stop = (target.offset + place * width for place in (slab.start, slab.stop))
            part = target.file, start // upload.part + 1
            written.setdefault(part, []).append((start, stop))
    literals = {}
    for (k, number), runs in written.items():
        upload = sinks[k]
        if upload is not None:
            literals[k, number] = _read_rest(outputs[k], upload, number, runs)
    return Parcel(share, literals)


def _list_slabs(share: Sequence[Batch]) -> Iterator[Slab]:
    return itertools.chain.from_iterable(itertools.chain.from_iterable(share))


def _read_rest(
    path: str, upload: Upload, number: int, runs: Sequence[tuple[int, int]]
) -> list[tuple[int, bytes]]:
    """Return what a part of an output holds between the runs that are averaged."""
    begin = (number - 1) * upload.part
    end = min(begin + upload.part, upload.nbytes)
    rest, place = [], begin
    with LocalStore().open(path) as skeleton:
        for start, stop in [*sorted(runs), (end, end)]:
            if start > place:
                rest.append((place - begin, skeleton.read(place, start - place)))
            place = max(place, stop)
    return rest


def accept(job: FoldJob, delivered: Mapping[str, Any]) -> None:
    """Take what a worker delivers for a share of a job, as `deliver` made it there.

    Raises:
        OSError: it cannot be written here.
    """
    for k, receipts in delivered["receipts"].items():
        mirrors.add_receipts({job.outputs[k]: receipts})
    for k, runs in delivered["written"].items():
        with LocalOutput(job.outputs[k]) as output:
            for offset, content in runs:
                output.write(offset, bytes(content))


# --- in the worker --------------------------------------------------------------------------------


class _Sent(PartOutput):
    """An output whose parts are sent, several at a time."""

    def __init__(self, upload: Upload, literals: Mapping[int, Sequence[tuple[int, bytes]]]) -> None:
        from polyak_cli.storage import uploads  # which only the few who send have to load

        self.outbox = uploads.make_outbox(upload)
        self.literals = literals
        super().__init__(upload.url, upload.nbytes, upload.part, self._make_part, self.outbox.put)

    def _make_part(self, offset: int, nbytes: int) -> bytearray:
        content = bytearray(nbytes)
        for start, literal in self.literals[offset // self.part + 1]:
            content[start : start + len(literal)] = literal
        return content


class _Returned:
    """An output of which what is written is kept; see `storage.OutputFile`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.runs: list[tuple[int, bytearray]] = []

    def write(self, offset: int, content: Bytes | bytes) -> None:
        """See `storage.OutputFile.write`."""
        view = content if isinstance(content, bytes) else content.data
        if self.runs and self.runs[-1][0] + len(self.runs[-1][1]) == offset:
            self.runs[-1][1].extend(view)
        else:
            self.runs.append((offset, bytearray(view)))

    def truncate(self, size: int) -> None:
        """Refuse: the coordinator has set the size."""
        raise ValueError(f"{self.name}: its size is not changed to {size} here")

    def sync(self) -> None:
        """Do nothing: what was written is kept."""

    def close(self) -> None:
        """Do nothing."""

    def __enter__(self) -> Self:
        """Return the output."""
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing."""


def open_outputs(job: FoldJob, literals: Literals) -> list[OutputFile]:
    """Open the outputs of a share.

    Raises:
        OSError: this process does not see one.
    """
    if not job.sinks:
        return [LocalOutput(path) for path in job.outputs]
    return [
        _Returned(path)
        if upload is None
        else _Sent(upload, {number: kept for (n, number), kept in literals.items() if n == k})
        for k, (path, upload) in enumerate(zip(job.outputs, job.sinks, strict=True))
    ]


def deliver(outputs: Sequence[OutputFile]) -> dict[str, Any]:
    """Wait until the parts of a share are sent; return their receipts, and what goes back.

    Raises:
        PolyakError: a part could not be sent.
    """
    sent = {k: one.outbox for k, one in enumerate(outputs) if isinstance(one, _Sent)}
    return {
        "receipts": {k: outbox.collect() for k, outbox in sent.items()},
        "written": {k: one.runs for k, one in enumerate(outputs) if isinstance(one, _Returned)},
    }
