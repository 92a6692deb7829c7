"""THE RECORD: what an output says of where it comes from, sealed against change, read with care.

The text is a stranger's when it is read: nothing in it is believed before it was checked.  Knows
neither how it is stored nor what is averaged.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NoReturn

from polyak_cli import __version__, checkpoints, formats
from polyak_cli.averaging import records
from polyak_cli.averaging.fates import drops_optimizer
from polyak_cli.averaging.planning import Plan
from polyak_cli.errors import (
    CheckpointError,
    FormatError,
    PolyakError,
    shown,
)
from polyak_cli.storage.local import File
from polyak_cli.tensors import Table

if TYPE_CHECKING:  # what knows of Keras is imported where it is asked for
    pass
import math

#: The digest of all else in the record.
SEAL = "sha256"
#: What a record held before there was a seal.
_UNSEALED = {"polyak", "scheme", "parameters", "options", "inputs", "recalibrated"}
#: Options that tell how the average was made, and the types that they have.
_OPTIONS: Mapping[str, tuple[type, ...]] = {
    "dtype": (str, type(None)),
    "optimizer": (str,),
    "match": (str,),
    "use_ema": (bool,),
    "include_tensors": (list,),
    "exclude_tensors": (list,),
    "allow_nonfinite": (bool,),
}
#: The longest name that a file system takes, in bytes.
_LONGEST = 255
#: A sampled digest reads at most this many pieces of this many bytes: 3.93 MB.
SAMPLES, SAMPLE_BYTES = 64, 60 << 10
#: How far from 1 the sum of the coefficients may be: each was rounded once.
_SUM = 1e-9


def text(record: Mapping[str, Any]) -> str:
    """Return a record as it is written."""
    return json.dumps(record, separators=(",", ":"))


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with a seal of its own, in place of an older one."""
    rest = unsealed(record)
    return rest | {SEAL: hashlib.sha256(text(rest).encode()).hexdigest()}


def unsealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record without its seal."""
    return {key: value for key, value in record.items() if key != SEAL}


@dataclass(frozen=True, slots=True)
class Input:
    """One checkpoint that an average was made of.

    Attributes:
        name: of its file or folder.
        path: relative to the folder that all inputs have in common, with "/"; the bare name where
            no two inputs have the same name.
        epoch: that its name tells, None where it tells none.
        size: bytes of all its files.
        coefficient: how much it counts.
        sampled: its `sampled_digest`; "" in a record of polyak 0.1.0.
        sha256: of each of its files; empty where none was recorded: see ``--hash``.
    """

    name: str
    path: str
    epoch: int | None
    size: int
    coefficient: float
    sampled: str
    sha256: tuple[str, ...]

    @property
    def is_covered(self) -> bool:
        """Whether its digests cover all of its bytes."""
        return bool(self.sha256) or (self.sampled != "" and self.size <= SAMPLES * SAMPLE_BYTES)


@dataclass(frozen=True, slots=True)
class Record:
    """A record that is what this tool writes.

    Attributes:
        text: as it was written.
        version: of the tool that wrote it.
        inputs: oldest first.
        options: that tell how the average was made; as of `averaging.Options`.
        statistics: BatchNorm's that were gathered anew: name -> SHA-256 of the stored bytes; None
            where none were, or where an older version did not name them.
        recalibrated: they were gathered anew.
        is_sealed: it has a digest of itself, which is right.
    """

    text: str
    version: str
    inputs: tuple[Input, ...]
    options: Mapping[str, Any]
    statistics: Mapping[str, str] | None
    recalibrated: bool
    is_sealed: bool


def read(written: str) -> Record:
    """Check the record of an output.

    Raises:
        FormatError: it is damaged, or this tool did not write it; the message lacks the file.
        CheckpointError: what it is of is no average.
    """
    record = _parsed(written)
    is_sealed = SEAL in record
    if is_sealed and record != sealed(record):
        raise FormatError("its record of provenance was changed: its digest is another")
    others = record.keys() - _UNSEALED
    if not is_sealed and others:
        raise _foreign(f"'{shown(min(others), 40)}' in it")
    inputs = record.get("inputs")
    if inputs is None and "recalibrated" in record:
        raise CheckpointError("was recalibrated by polyak, but is no average")
    if not isinstance(inputs, list) or not inputs:
        raise _foreign("no inputs")
    version = record.get("polyak")
    if not isinstance(version, str):
        raise _foreign("no version")
    recalibrated = record.get("recalibrated")
    if not isinstance(recalibrated, dict | None):
        raise _foreign("no recalibration in its place")
    made = tuple(_input(each) for each in inputs)
    if abs(math.fsum(each.coefficient for each in made) - 1) > _SUM:
        raise _foreign("coefficients whose sum is not 1")
    return Record(
        text=written,
        version=version,
        inputs=made,
        options=_options(record.get("options")),
        statistics=_statistics(recalibrated or {}),
        recalibrated=recalibrated is not None,
        is_sealed=is_sealed,
    )


def _parsed(written: str) -> dict[str, Any]:
    """Parse a text that must be, letter for letter, what `text` makes of it."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number")

    try:
        record = json.loads(written, parse_constant=refuse)
        # A letter that means the same (1E-05 for 1e-05) was changed all the same.
        same = isinstance(record, dict) and text(record) == written
    except (ValueError, RecursionError):
        same = False
    if not same:
        raise _foreign(shown(written, 60))
    found: dict[str, Any] = record
    return found


def _foreign(found: str) -> FormatError:
    return FormatError(f"its record of provenance is damaged or not polyak's: {found}")


def _input(found: Any) -> Input:
    """Check one input."""
    if not isinstance(found, dict):
        raise _foreign("an input that is no table")
    name, epoch, size = (found.get(key) for key in ("name", "epoch", "size"))
    coefficient, digests = found.get("coefficient"), found.get("sha256", [])
    path, sampled = found.get("path", name), found.get("sampled_sha256", "")
    if not isinstance(name, str) or not _is_name(name):
        raise _foreign(f"an input called {shown(name, 60)}, expected the bare name of a file")
    where = f"input '{shown(name, 60)}' has"
    if type(epoch) not in (int, type(None)):
        raise _foreign(f"{where} the epoch {shown(epoch, 40)}")
    if type(size) is not int or size < 0:
        raise _foreign(f"{where} the size {shown(size, 40)}")
    if type(coefficient) is not float or not (math.isfinite(coefficient) and coefficient >= 0):
        raise _foreign(f"{where} the coefficient {shown(coefficient, 40)}")
    listed = digests if isinstance(digests, list) else [digests]
    if not all(isinstance(digest, str) for digest in listed):
        raise _foreign(f"{where} a SHA-256 that is no text")
    if not isinstance(sampled, str):
        raise _foreign(f"{where} a sampled SHA-256 that is no text")
    if not isinstance(path, str) or not _is_path(path, name):
        raise _foreign(f"{where} the path {shown(path, 60)}, expected one below a common folder")
    return Input(name, path, epoch, size, coefficient, sampled, tuple(listed))


def _is_path(path: str, name: str) -> bool:
    """Return whether a text is a relative path that ends in a name and leads nowhere else."""
    *folders, last = path.split("/")
    return last == name and all(_is_name(folder) for folder in folders)


def _is_name(name: str) -> bool:
    """Tell whether a text is the name of something in a folder, which leads nowhere else."""
    try:
        encoded = name.encode(errors="surrogateescape")  # as Python spells bytes that are not UTF-8
    except UnicodeEncodeError:
        return False
    return name not in ("", ".", "..") and not set(name) & {"/", "\0"} and len(encoded) <= _LONGEST


def _options(found: Any) -> dict[str, Any]:
    """Check the options that tell how an average was made; `averaging` checks their values."""
    options = found if isinstance(found, dict) else {}
    for key, types in _OPTIONS.items():
        if type(options.get(key)) not in types:
            raise _foreign(f"{shown(options.get(key), 40)} for {key}")
    for key in ("include_tensors", "exclude_tensors"):
        if not all(isinstance(glob, str) for glob in options[key]):
            raise _foreign(f"no list of globs for {key}")
    return {key: options[key] for key in _OPTIONS}


def _statistics(recalibrated: Mapping[str, Any]) -> dict[str, str] | None:
    found = recalibrated.get("statistics")
    if found is None:
        return None
    if not isinstance(found, dict) or not all(isinstance(one, str) for one in found.values()):
        raise _foreign("no digests of the statistics")
    return found


# --- digests --------------------------------------------------------------------------------------


def sampled_digest(files: Sequence[File]) -> str:
    """Return the SHA-256 over the sizes of a checkpoint's files and evenly spaced pieces of them.

    The files count as one run of N bytes: one after the other, in the order of the table.  What
    is hashed, in this order:

    1. the size of each file in decimal digits, joined by newlines, and two newlines at the end;
    2. all N bytes where N is at most ``SAMPLES * SAMPLE_BYTES`` (3,932,160); else `SAMPLES` pieces
       of `SAMPLE_BYTES` bytes, of which piece k = 0 ... 63 begins at byte
       ``k * (N - SAMPLE_BYTES) // (SAMPLES - 1)``.

    The sizes alone decide what is read: never more than 4 MB of a checkpoint.

    Raises:
        FormatError: a file cannot be read, or has become shorter.
    """
    sizes = [file.identity.size for file in files]
    found = hashlib.sha256(("\n".join(map(str, sizes)) + "\n\n").encode())
    ranges = sampled_ranges(sum(sizes))
    end = 0
    for file, size in zip(files, sizes, strict=True):
        start, end = end, end + size
        pieces = [(max(a, start) - start, min(b, end) - start) for a, b in ranges]
        _update(found, file, [(a, b) for a, b in pieces if a < b])
    return found.hexdigest()


def sampled_ranges(nbytes: int) -> list[tuple[int, int]]:
    """Return the ranges, begin and end, of a checkpoint's bytes that its sampled digest covers."""
    if nbytes <= SAMPLES * SAMPLE_BYTES:
        return [(0, nbytes)]
    starts = (k * (nbytes - SAMPLE_BYTES) // (SAMPLES - 1) for k in range(SAMPLES))
    return [(start, start + SAMPLE_BYTES) for start in starts]


def _update(found: hashlib._Hash, file: File, ranges: Sequence[tuple[int, int]]) -> None:
    """Hash ranges of a file."""
    if not ranges:
        return
    path = Path(file.path)
    try:
        with open(path, "rb", buffering=0) as opened:
            for start, end in ranges:
                for offset in range(start, end, SAMPLE_BYTES):
                    count = min(SAMPLE_BYTES, end - offset)
                    read = os.pread(opened.fileno(), count, offset)
                    if len(read) < count:
                        raise FormatError(f"{shown(path)}: ended early; it is being written to")
                    found.update(read)
    except OSError as error:
        raise FormatError(f"{shown(path)}: cannot be read: {error.strerror}") from None


def relative_paths(paths: Sequence[Path]) -> list[str]:
    """Return a path for each input that tells inputs of one name apart.

    Args:
        paths: of the inputs.

    Returns:
        The bare names where they differ; else paths relative to the folder that all inputs have
        in common, with "/".  No folder above that one is in them.
    """
    names = [path.name for path in paths]
    if len({*names}) == len(names):
        return names
    whole = [os.path.abspath(path) for path in paths]  # noqa: PTH100 - links are not followed
    common = os.path.commonpath([os.path.dirname(path) for path in whole])  # noqa: PTH120 - as above
    return [str(PurePosixPath(Path(path).relative_to(common))) for path in whole]


#: Bytes of all inputs up to which their digests are recorded unasked: it takes no time then.
HASHED = 64 << 20


def recorded(output: Path) -> Any:
    """Return what `provenance` was written into an output, None where there is nothing of it."""
    with contextlib.suppress(PolyakError, ValueError, RecursionError):
        (table,) = formats.scan([checkpoints.file_of(output)])
        record = json.loads(table.about.get("provenance", "null"))
        return records.unsealed(record) if isinstance(record, dict) else None
    return None


def provenance(plan: Plan, sampled: Sequence[str] = ()) -> dict[str, Any]:
    """Return the record that the output carries, without the seal of `records`.

    No clock and no absolute path are in it, so that the bytes repeat.

    Args:
        plan: what is averaged.
        sampled: `records.sampled_digest` of each checkpoint, where it is known already.

    Raises:
        FormatError: a checkpoint cannot be read.
    """
    options = plan.options
    sampled = sampled or [records.sampled_digest(table.files) for table in plan.tables]
    names = [checkpoint.path.name for checkpoint in plan.checkpoints]
    paths = records.relative_paths([checkpoint.path for checkpoint in plan.checkpoints])
    inputs: list[dict[str, Any]] = [
        {
            "name": name,
            **({"path": path} if paths != names else {}),
            "epoch": checkpoint.epoch,
            "size": table.size,
            "coefficient": coefficient,
            "sampled_sha256": digest,
        }
        for name, path, checkpoint, table, coefficient, digest in zip(
            names, paths, plan.checkpoints, plan.tables, plan.coefficients, sampled, strict=True
        )
    ]
    wanted = options.get("hash")
    if wanted or (wanted is None and sum(table.size for table in plan.tables) <= HASHED):
        for record, table in zip(inputs, plan.tables, strict=True):
            found = digests(table)
            record["sha256"] = found[0] if len(found) == 1 else list(found)
    skipped = [
        {"name": one.path.name, "reasons": [problem.kind for problem in one.problems]}
        for one in plan.skipped
    ]
    return {
        "polyak": __version__,
        "scheme": plan.scheme,
        "parameters": dict(plan.parameters),
        "options": {
            "dtype": options.get("dtype"),
            "optimizer": "drop" if drops_optimizer(plan.tables, options) else "newest",
            "match": options.get("match", "name"),
            "use_ema": options.get("use_ema", False),
            "include_tensors": list(options.get("include_tensors", ())),
            "exclude_tensors": list(options.get("exclude_tensors", ())),
            "allow_nonfinite": options.get("allow_nonfinite", False),
        },
        "inputs": inputs,
        **({"skipped": skipped} if skipped else {}),
    }


def digests(table: Table) -> tuple[str, ...]:
    """Return the SHA-256 of each file of a checkpoint.

    Raises:
        FormatError: one cannot be read.
    """
    return tuple(sha256(Path(file.path)) for file in table.files)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal.

    Raises:
        FormatError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FormatError(f"{shown(path)}: cannot be read: {error.strerror}") from None
