"""The record of provenance that an output carries: encode, seal and parse it.

A record that is read is a stranger's text: every field is checked before it is used.  Does not know
how formats store the record, nor what is averaged (`provenance`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from polyak_cli.averaging.hashing import SAMPLE_BYTES, SAMPLES
from polyak_cli.averaging.schemes import Mean, make_mean, sum_absolutes
from polyak_cli.errors import CheckpointError, FormatError, PolyakError, UsageError, shown
from polyak_cli.formats.folder_records import read_record
from polyak_cli.formats.model_folders import RECORD_NAME
from polyak_cli.tensors import Table

#: The key of the record's own digest, over all other keys.
SEAL = "sha256"
#: The keys of records written before there was a seal.
_UNSEALED = {"polyak", "scheme", "parameters", "options", "inputs", "recalibrated"}
#: Options that decide the bytes of an average, and their types.
_OPTIONS: Mapping[str, tuple[type, ...]] = {
    "dtype": (str, type(None)),
    "optimizer": (str,),
    "match": (str,),
    "use_ema": (bool,),
    "include_tensors": (list,),
    "exclude_tensors": (list,),
    "allow_nonfinite": (bool,),
}
#: Options that are younger than the first records, their types and their defaults.  A record has
#: them only where they are not the default, so that the bytes of all other averages stay.
YOUNGER_OPTIONS: Mapping[str, tuple[tuple[type, ...], Any]] = {
    "allow": ((list,), []),
    "lora": ((str,), "factors"),
    "strip_prefix": ((list,), []),
    "key": ((str,), ""),
}
#: Options that are lists of texts.
_LISTS = ("include_tensors", "exclude_tensors", "allow", "strip_prefix")
#: The longest file name that Linux and macOS allow, in bytes.
_LONGEST = 255
#: How far the sum of the coefficients may be from 1, as a part of the sum of their absolute values:
#: each was rounded once.
_SUM = 1e-9


def encode(record: Mapping[str, Any]) -> str:
    """Return a record as the text that is written."""
    return json.dumps(record, separators=(",", ":"))


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with its own digest, which replaces an older one."""
    rest = remove_seal(record)
    return rest | {SEAL: hashlib.sha256(encode(rest).encode()).hexdigest()}


def remove_seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record without its own digest."""
    return {key: value for key, value in record.items() if key != SEAL}


@dataclass(frozen=True, slots=True)
class Input:
    """One checkpoint of an average.

    Attributes:
        name: of its file or folder.
        path: relative to the folder that all inputs have in common, with "/"; the bare name if
            no two inputs have the same name.
        epoch: from its name; None if the name has none.
        size: bytes of all its files.
        coefficient: its share of the average.
        multiplier: what it was multiplied by; see `Record.mean`.
        sampled: from `hashing.compute_sampled_digest`; "" in a record of polyak 0.1.0.
        sha256: of each of its files; empty if none was recorded (see ``--hash``).
    """

    name: str
    path: str
    epoch: int | None
    size: int
    coefficient: float
    multiplier: float
    sampled: str
    sha256: tuple[str, ...]

    @property
    def is_covered(self) -> bool:
        """Whether its digests cover all of its bytes."""
        return bool(self.sha256) or (self.sampled != "" and self.size <= SAMPLES * SAMPLE_BYTES)


@dataclass(frozen=True, slots=True)
class Record:
    """A record whose fields were checked.

    Attributes:
        text: the record as it was written.
        version: of polyak, which wrote it.
        inputs: oldest first.
        mean: by which the average was computed.  A record without a divisor is of the older rule:
            values were multiplied by coefficients that had been divided before.
        options: those that decide the bytes; keys as in `averaging.Options`.
        statistics: BatchNorm statistics gathered over data: name -> SHA-256 of the stored bytes;
            None if there are none, or if an older version did not name them.
        recalibrated: statistics were gathered over data.
        is_sealed: it has its own digest, and the digest is right.
        weights: of an output folder, the files with the tensors.
        carried: of an output folder, name of each file that was copied -> its SHA-256.
        architecture: the digest of the configuration to which the tensors were added, if they were.
    """

    text: str
    version: str
    inputs: tuple[Input, ...]
    mean: Mean
    options: Mapping[str, Any]
    statistics: Mapping[str, str] | None
    recalibrated: bool
    is_sealed: bool
    weights: tuple[str, ...] = ()
    carried: Mapping[str, str] = field(default_factory=dict)
    architecture: str = ""

    @property
    def key(self) -> str:
        """The part of each checkpoint that was averaged; "" where none was asked for."""
        return str(self.options.get("key") or "")


def read(written: str) -> Record:
    """Check the record of an output.

    Raises:
        FormatError: it is damaged, or polyak did not write it; the message does not name the file.
        CheckpointError: it is the record of a recalibrated model that is no average.
    """
    record = _parse(written)
    is_sealed = SEAL in record
    others = record.keys() - _UNSEALED
    if not is_sealed and others:
        raise _build_error(f"'{shown(min(others), 40)}' in it")
    inputs = record.get("inputs")
    if inputs is None and "recalibrated" in record:
        raise CheckpointError("was recalibrated by polyak, but is no average")
    if not isinstance(inputs, list) or not inputs:
        raise _build_error("no inputs")
    version = record.get("polyak")
    if not isinstance(version, str):
        raise _build_error("no version")
    recalibrated = record.get("recalibrated")
    if not isinstance(recalibrated, dict | None):
        raise _build_error("no recalibration in its place")
    made = tuple(_parse_input(each) for each in inputs)
    return Record(
        text=written,
        version=version,
        inputs=made,
        mean=_parse_mean(record.get("divisor"), made),
        options=_parse_options(record.get("options")),
        statistics=_parse_statistics(recalibrated or {}),
        recalibrated=recalibrated is not None,
        is_sealed=is_sealed,
        **_parse_files(record.get("files")),
        architecture=_parse_architecture(record.get("model", {"config": ""})),
    )


def _parse(written: str) -> dict[str, Any]:
    """Parse a text that must be, character for character, what `encode` returns for it.

    Raises:
        FormatError: it is not, or its own digest is wrong.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a number")

    try:
        record = json.loads(written, parse_constant=refuse)
        # Other characters of the same meaning, as 1E-05 for 1e-05, are a change too.
        same = isinstance(record, dict) and encode(record) == written
    except (ValueError, RecursionError):
        same = False
    if not same:
        raise _build_error(shown(written, 60))
    found: dict[str, Any] = record
    if SEAL in found and found != seal(found):
        raise FormatError("its record of provenance was changed: its digest does not match")
    return found


def _build_error(found: str) -> FormatError:
    """Return the error for a record that polyak did not write."""
    return FormatError(f"its record of provenance is damaged or was not written by polyak: {found}")


def _parse_input(found: Any) -> Input:
    """Check one input and return it."""
    if not isinstance(found, dict):
        raise _build_error("an input that is not an object")
    name, epoch, size = (found.get(key) for key in ("name", "epoch", "size"))
    coefficient, digests = found.get("coefficient"), found.get("sha256", [])
    path, sampled = found.get("path", name), found.get("sampled_sha256", "")
    if not isinstance(name, str) or not _is_name(name):
        raise _build_error(
            f"an input called {shown(name, 60)}; expected the name of a file, without a folder"
        )
    where = f"input '{shown(name, 60)}' has"
    if type(epoch) not in (int, type(None)):
        raise _build_error(f"{where} the epoch {shown(epoch, 40)}")
    if type(size) is not int or size < 0:
        raise _build_error(f"{where} the size {shown(size, 40)}")
    multiplier = found.get("multiplier", coefficient)
    if not _is_share(coefficient):
        raise _build_error(f"{where} the coefficient {shown(coefficient, 40)}")
    if not _is_share(multiplier):
        raise _build_error(f"{where} the multiplier {shown(multiplier, 40)}")
    listed = digests if isinstance(digests, list) else [digests]
    if not all(isinstance(digest, str) for digest in listed):
        raise _build_error(f"{where} a SHA-256 that is not a string")
    if not isinstance(sampled, str):
        raise _build_error(f"{where} a sampled SHA-256 that is not a string")
    if not isinstance(path, str) or not _is_path(path, name):
        raise _build_error(
            f"{where} the path {shown(path, 60)}; expected one that ends in the name"
        )
    return Input(name, path, epoch, size, coefficient, multiplier, sampled, tuple(listed))


def _is_share(found: Any) -> TypeGuard[float]:
    """Return whether a value is a number by which a checkpoint can count."""
    return type(found) is float and math.isfinite(found)


def _parse_mean(divisor: Any, inputs: Sequence[Input]) -> Mean:
    """Check multipliers, divisor and coefficients, and return the mean that was computed."""
    coefficients = tuple(each.coefficient for each in inputs)
    if abs(math.fsum(coefficients) - 1) > _SUM * max(1.0, sum_absolutes(coefficients)):
        raise _build_error("coefficients whose sum is not 1")
    multipliers = tuple(each.multiplier for each in inputs)
    if divisor is None and multipliers == coefficients:
        return Mean(coefficients, 1.0)
    try:
        mean = make_mean(multipliers)
    except UsageError as error:
        raise _build_error(str(error)) from None
    # An integer is equal to its float, but was not written by polyak.
    if type(divisor) is not float or mean != (multipliers, divisor):
        raise _build_error(f"the divisor {shown(divisor, 40)}; expected the sum of the multipliers")
    if mean.coefficients != coefficients:
        raise _build_error("coefficients that are not multiplier / divisor")
    return mean


def _is_path(path: str, name: str) -> bool:
    """Return whether a text is a relative path that ends in a name and never leads upwards."""
    *folders, last = path.split("/")
    return last == name and all(_is_name(folder) for folder in folders)


def _is_name(name: str) -> bool:
    """Return whether a text is a plain file name, which cannot lead to another folder."""
    try:
        encoded = name.encode(errors="surrogateescape")  # Python's spelling of non-UTF-8 bytes
    except UnicodeEncodeError:
        return False
    return name not in ("", ".", "..") and not set(name) & {"/", "\0"} and len(encoded) <= _LONGEST


def _parse_options(found: Any) -> dict[str, Any]:
    """Check the types of the options; `averaging` checks their values."""
    given = found if isinstance(found, dict) else {}
    younger = {key: types for key, (types, _) in YOUNGER_OPTIONS.items()}
    defaults = {key: default for key, (_, default) in YOUNGER_OPTIONS.items()}
    options = defaults | given
    for key, types in (*_OPTIONS.items(), *younger.items()):
        if type(options.get(key)) not in types:
            raise _build_error(f"{shown(options.get(key), 40)} for {key}")
    for key in _LISTS:
        if not all(isinstance(text, str) for text in options[key]):
            raise _build_error(f"no list of strings for {key}")
    return {key: options[key] for key in (*_OPTIONS, *younger)}


def _parse_statistics(recalibrated: Mapping[str, Any]) -> dict[str, str] | None:
    found = recalibrated.get("statistics")
    if found is None:
        return None
    if not isinstance(found, dict) or not all(isinstance(one, str) for one in found.values()):
        raise _build_error("no digests of the statistics")
    return found


def _parse_architecture(found: Any) -> str:
    digest = found.get("config") if isinstance(found, dict) else None
    if not isinstance(digest, str):
        raise _build_error("no digest of the model's configuration")
    return digest


def _parse_files(found: Any) -> dict[str, Any]:
    """Check what a record says of the files in an output folder."""
    if found is None:
        return {}
    weights = found.get("weights") if isinstance(found, dict) else None
    copies = found.get("carried") if isinstance(found, dict) else None
    if not isinstance(weights, list) or not isinstance(copies, list):
        raise _build_error("no lists of files in their place")
    if not all(isinstance(one, dict) and isinstance(one.get("sha256"), str) for one in copies):
        raise _build_error("no digests of the copied files")
    for name in (*weights, *(one.get("name") for one in copies)):
        if not isinstance(name, str) or not _is_path(name, name.rpartition("/")[2]):
            raise _build_error(
                f"a file called {shown(name, 60)}; expected a name inside the folder"
            )
    return {
        "weights": tuple(weights),
        "carried": {one["name"]: one["sha256"] for one in copies},
    }


def list_owned(folder: Path) -> frozenset[str]:
    """Return the names of the files that this tool wrote into an output folder, if it did.

    They are relative to the folder, and are those of the record in it, whose digest must be right.
    """
    with contextlib.suppress(PolyakError):
        # Of a folder that was recalibrated and is no average, too.
        record = _parse(read_record(folder))
        files = _parse_files(record.get("files") if SEAL in record else None)
        if files:
            return frozenset((*files["weights"], *files["carried"], RECORD_NAME))
    return frozenset()


def has_emas(table: Table) -> bool:
    """Return whether a file is an average of running means, which stand in the weights' place."""
    with contextlib.suppress(PolyakError):
        return bool(read(table.about.get("provenance", "")).options["use_ema"])
    return False
