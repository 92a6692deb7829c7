"""The record of provenance that an output carries: encode, seal, parse, and digest the inputs.

A record that is read is a stranger's text: every field is checked before it is used.  Does not know
how formats store the record, nor what is averaged.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeGuard

from polyak_cli import __version__, checkpoints, formats
from polyak_cli.averaging.schemes import Mean, make_mean, sum_absolutes
from polyak_cli.checkpoints.folders import list_relative_paths
from polyak_cli.errors import CheckpointError, FormatError, PolyakError, UsageError, shown
from polyak_cli.formats.folder_records import read_record
from polyak_cli.formats.model_folders import RECORD_NAME, FolderFiles
from polyak_cli.storage import File, open_input
from polyak_cli.storage.local import name_errors

if TYPE_CHECKING:  # a plan asks which files an older output may replace, which its record says
    from polyak_cli.averaging.planning import Plan
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
_YOUNGER_OPTIONS: Mapping[str, tuple[tuple[type, ...], Any]] = {
    "allow": ((list,), []),
    "lora": ((str,), "factors"),
    "strip_prefix": ((list,), []),
    "key": ((str,), ""),
}
#: Options that are lists of texts.
_LISTS = ("include_tensors", "exclude_tensors", "allow", "strip_prefix")
#: The longest file name that Linux and macOS allow, in bytes.
_LONGEST = 255
#: Inputs of at most this many bytes in all are hashed whole unasked: it takes no time then.
HASHED = 64 << 20
#: A sampled digest reads at most this many pieces of this many bytes: 3.93 MB.
SAMPLES, SAMPLE_BYTES = 64, 60 << 10
#: Checkpoints on a network that are sampled at a time: their pieces are waited for, not hashed.
_REMOTE = 8
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
        sampled: from `compute_sampled_digest`; "" in a record of polyak 0.1.0.
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
    younger = {key: types for key, (types, _) in _YOUNGER_OPTIONS.items()}
    defaults = {key: default for key, (_, default) in _YOUNGER_OPTIONS.items()}
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


# --- digests --------------------------------------------------------------------------------------


def compute_sampled_digest(files: Sequence[File]) -> str:
    """Return the SHA-256 over the sizes of a checkpoint's files and evenly spaced pieces of them.

    The files count as one run of N bytes: one after the other, in the order of the table.  The
    digest covers, in this order:

    1. the size of each file in decimal digits, joined by newlines, and two newlines at the end;
    2. all N bytes if N is at most ``SAMPLES * SAMPLE_BYTES`` (3,932,160); otherwise `SAMPLES`
       pieces of `SAMPLE_BYTES` bytes: piece k = 0 ... 63 begins at byte
       ``k * (N - SAMPLE_BYTES) // (SAMPLES - 1)``.

    Only the sizes decide which bytes are read, and at most 4 MB of a checkpoint are.

    Raises:
        FormatError: a file cannot be read, or changed since it was scanned.
    """
    sizes = [file.version.size for file in files]
    found = hashlib.sha256(("\n".join(map(str, sizes)) + "\n\n").encode())
    ranges = list_sampled_ranges(sum(sizes))
    end = 0
    for file, size in zip(files, sizes, strict=True):
        start, end = end, end + size
        pieces = [(max(a, start) - start, min(b, end) - start) for a, b in ranges]
        wanted = [(a, b) for a, b in pieces if a < b]
        if wanted:  # many shards have none
            _hash_ranges(found, file, wanted)
    return found.hexdigest()


def compute_sampled_digests(checkpoints: Sequence[Sequence[File]], jobs: int) -> list[str]:
    """Return `compute_sampled_digest` of each checkpoint, several of them at a time.

    Args:
        checkpoints: the files of each.
        jobs: threads, at most.

    Raises:
        FormatError: as `compute_sampled_digest`, of the first checkpoint that has an error.
    """
    nbytes = sum(file.version.size for files in checkpoints for file in files)
    if any(file.version.is_object for files in checkpoints for file in files):
        jobs = max(jobs, _REMOTE)
    if jobs > 1 and nbytes > HASHED:  # of fewer bytes, starting threads would take longer
        # Neither reading nor hashing holds the interpreter's lock.  Where a limit allows no more
        # threads, this one does the work.
        with contextlib.suppress(RuntimeError), ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(compute_sampled_digest, checkpoints))
    return [compute_sampled_digest(files) for files in checkpoints]


def list_sampled_ranges(nbytes: int) -> list[tuple[int, int]]:
    """Return the ranges of bytes, start and end, that the digest of a checkpoint covers."""
    if nbytes <= SAMPLES * SAMPLE_BYTES:
        return [(0, nbytes)]
    starts = (k * (nbytes - SAMPLE_BYTES) // (SAMPLES - 1) for k in range(SAMPLES))
    return [(start, start + SAMPLE_BYTES) for start in starts]


def _hash_ranges(found: hashlib._Hash, file: File, ranges: Sequence[tuple[int, int]]) -> None:
    """Add ranges of a file to a hash, in pieces of bounded size."""
    with open_input(file.path, file.version) as opened, name_errors(file.path):
        # A disk fetches scattered pieces faster when it knows of all of them.
        opened.prefetch((start, end - start) for start, end in ranges)
        for start, end in ranges:
            for offset in range(start, end, SAMPLE_BYTES):
                wanted = min(SAMPLE_BYTES, end - offset)
                piece = opened.read(offset, wanted)
                if len(piece) < wanted:
                    raise FormatError(f"the file ends {wanted - len(piece)} bytes too early")
                found.update(piece)


def hash_files(files: Sequence[File]) -> tuple[str, ...]:
    """Return the SHA-256 of each file of a checkpoint, in hexadecimal.

    Raises:
        FormatError: a file cannot be read, or changed since it was scanned.
    """
    return tuple(_hash_file(file) for file in files)


def _hash_file(file: File) -> str:
    found = hashlib.sha256()
    _hash_ranges(found, file, [(0, file.version.size)])
    return found.hexdigest()


# --- of a plan, and of an output ------------------------------------------------------------------


def make_record(plan: Plan, sampled: Sequence[str] = ()) -> dict[str, Any]:
    """Return the record that the output of a plan carries, without the seal.

    It holds no clock and no absolute path, so that the same inputs give the same bytes.

    Args:
        plan: what is averaged.
        sampled: `compute_sampled_digest` of each checkpoint, if they are known already.

    Raises:
        FormatError: a checkpoint cannot be read.
    """
    jobs = plan.settings.machine.share().jobs
    sampled = sampled or compute_sampled_digests([table.files for table in plan.tables], jobs)
    inputs = _describe_inputs(plan, sampled)
    wanted = plan.settings.output.hash
    if wanted or (wanted is None and sum(table.size for table in plan.tables) <= HASHED):
        for record, table in zip(inputs, plan.tables, strict=True):
            found = hash_files(table.files)
            record["sha256"] = found[0] if len(found) == 1 else list(found)
    skipped = [
        {"name": one.path.name, "reasons": [problem.kind for problem in one.problems]}
        for one in plan.skipped
    ]
    suspected = [problem.kind for problem in plan.suspicions]
    whole = plan.output_form.architecture
    return {
        "polyak": __version__,
        "scheme": plan.scheme,
        "parameters": dict(plan.parameters),
        "options": _list_options(plan),
        "divisor": plan.mean.divisor,
        "inputs": inputs,
        **({"files": describe_files(plan.files)} if plan.files else {}),
        **({"model": {"name": whole.path.name, "config": whole.config}} if whole else {}),
        **({"skipped": skipped} if skipped else {}),
        **({"suspicions": suspected} if suspected else {}),
    }


def _describe_inputs(plan: Plan, sampled: Sequence[str]) -> list[dict[str, Any]]:
    """Return what a record says of the checkpoints, without the digests of all bytes."""
    names = [checkpoint.path.name for checkpoint in plan.checkpoints]
    paths = list_relative_paths([checkpoint.path for checkpoint in plan.checkpoints])
    return [
        {
            "name": name,
            **({"path": path} if paths != names else {}),
            "epoch": checkpoint.epoch,
            "size": table.size,
            "sampled_sha256": digest,
            "coefficient": coefficient,
            "multiplier": multiplier,
        }
        | about
        for name, path, checkpoint, table, coefficient, multiplier, digest, about in zip(
            names,
            paths,
            plan.checkpoints,
            plan.tables,
            plan.coefficients,
            plan.mean.multipliers,
            sampled,
            _describe_running_means(plan),
            strict=True,
        )
    ]


def _describe_running_means(plan: Plan) -> list[dict[str, float]]:
    """Return what the coefficients of running means come from, which no name need say."""
    if not plan.averages_running_means:
        return [{} for _ in plan.checkpoints]
    if not plan.sigmas:
        return [{"step": step} for step in plan.positions]
    pairs = zip(plan.positions, plan.sigmas, strict=True)
    return [{"step": step, "sigma": sigma} for step, sigma in pairs]


def describe_files(files: FolderFiles, older: object = None) -> dict[str, Any]:
    """Return what a record says of the files in an output folder.

    Args:
        files: of the output.
        older: what the record of the checkpoint says that the folder is copied from; it stays, with
            what was left out of that one, if the same files are in both.
    """
    made: dict[str, Any] = {
        "weights": list(files.weights),
        "carried": [{"name": one.name, "sha256": _hash_file(one.file)} for one in files.carried],
        "left_out": [one.name for one in files.left_out],
    }
    same = ("weights", "carried")
    if isinstance(older, dict) and all(older.get(key) == made[key] for key in same):
        return older
    return made


def _list_options(plan: Plan) -> dict[str, Any]:
    """Return the options that decide which values an average has."""
    wanted = plan.settings.tensors
    named = {one.name: getattr(wanted, one.name) for one in fields(wanted)}
    listed = {key: list(one) if isinstance(one, tuple) else one for key, one in named.items()}
    for key, (_, default) in _YOUNGER_OPTIONS.items():
        if listed[key] == default:
            del listed[key]
    # What was done, and not what was asked for: some files keep the state whatever is asked.
    return listed | {"optimizer": "drop" if plan.drop_optimizer else "newest"}


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


def read_output_record(output: Path) -> Any:
    """Return what `make_record` made for an existing output, None if it has no such record."""
    with contextlib.suppress(PolyakError, ValueError, RecursionError):
        (table,) = formats.scan([checkpoints.find_file(output)])
        record = json.loads(table.about.get("provenance", "null"))
        return remove_seal(record) if isinstance(record, dict) else None
    return None
