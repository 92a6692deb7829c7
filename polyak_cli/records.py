"""THE RECORD: what an output says of where it comes from, sealed against change, read with care.

The text is a stranger's when it is read: nothing in it is believed before it was checked.  Knows
neither how it is stored nor what is averaged.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from polyak_cli.errors import CheckpointError, FormatError, shown

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
        epoch: that its name tells, None where it tells none.
        size: bytes of all its files.
        coefficient: how much it counts.
        sha256: of each of its files; empty where none was recorded: see ``--hash``.
    """

    name: str
    epoch: int | None
    size: int
    coefficient: float
    sha256: tuple[str, ...]


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
    return Input(name, epoch, size, coefficient, tuple(listed))


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
