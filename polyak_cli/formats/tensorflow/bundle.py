"""TensorFlow's checkpoints: an `.index` file, and data shards beside it that hold the values.

The index is a sorted table (`sstables`) from keys to protocol buffers: see tensor_bundle.proto in
TensorFlow's sources.  Reads what `tf.train.Checkpoint`, `Model.save_weights` and the Saver of
TensorFlow 1 write.  Knows which keys are optimizer state.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from polyak_cli.errors import FormatError, shown, word_size
from polyak_cli.formats import checksums
from polyak_cli.formats.format import Draft, Format, ScanRequest, SkeletonRequest
from polyak_cli.formats.tensorflow import sstables
from polyak_cli.formats.tensorflow.protobuf import read_fields, require_message, require_number
from polyak_cli.formats.tensorflow.sstables import Pair, encode_varint
from polyak_cli.formats.zips import WHOLE
from polyak_cli.processes.sandbox import Heartbeat
from polyak_cli.storage import File, InputFile, open_input
from polyak_cli.storage.local import LocalOutput, copy_range, name_errors
from polyak_cli.tensors import FLOATS, Checksum, Extent, OutputRules, Placement, Table, TensorSpec

#: A block of metadata, which TensorFlow never looks for: a key would be one more variable.
PROVENANCE = b"polyak_provenance"
#: TensorFlow's numbers of types: name and bytes of an element, 0 where that varies.
KINDS = {
    1: ("float32", 4),
    2: ("float64", 8),
    3: ("int32", 4),
    4: ("uint8", 1),
    5: ("int16", 2),
    6: ("int8", 1),
    7: ("string", 0),
    8: ("complex64", 8),
    9: ("int64", 8),
    10: ("bool", 1),
    11: ("qint8", 1),
    12: ("quint8", 1),
    13: ("qint32", 4),
    14: ("bfloat16", 2),
    15: ("qint16", 2),
    16: ("quint16", 2),
    17: ("uint16", 2),
    18: ("complex128", 16),
    19: ("float16", 2),
    20: ("opaque", 0),  # a resource
    21: ("opaque", 0),  # a variant
    22: ("uint32", 4),
    23: ("uint64", 8),
    24: ("float8_e5m2", 1),
    25: ("float8_e4m3fn", 1),
}
_DTYPE, _SHAPE, _SHARD, _OFFSET, _SIZE, _CRC, _SLICES = range(1, 8)  # fields of an entry
_MAXIMUM_RANK = 254  # TensorFlow's own
_STEP = 1 << 20
_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
_COUNTERS = re.compile(r"(.*/)?save_counter|(.*/)?keras_api/metrics/.*")
_OPTIMIZER = re.compile(r"(?:^|_)optimizers?(?:_|$)", re.IGNORECASE)
#: What an optimizer has beside its count of steps, as `iter` alone may be anybody's.
_SETTINGS = ("decay", "learning_rate", "beta_1", "momentum", "rho")
#: How the Saver's files call what TensorFlow 1 keeps below a variable, and what has no variable.
_SLOTS = re.compile(
    r"(Adam|Momentum|RMSProp|Adagrad|AdagradDA|Adadelta|Ftrl|LAMB\w*|"
    r"adam_[mv]|lamb_[mv]|slot_v[cr]?|slot_m|[mv]|vhat|rms|mg|momentum|accumulator|linear)(_\d+)?"
)
_POWERS = re.compile(r"(.*/)?beta[12]_power(_\d+)?")


_SUFFIX = ".index"
_CAUTIONS = {
    "ema": "a TensorFlow checkpoint only numbers the variables of Keras's optimizers and does not "
    "say which are EMA slots; save whole models with model.save('x.h5')"
}


class _Entry(NamedTuple):
    """One tensor, or one part of a partitioned variable, as the index describes it."""

    key: bytes
    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int
    offset: int
    nbytes: int
    crc: int
    parts: bool  # no values here: the variable's parts are entries of their own

    @property
    def location(self) -> str:
        """The key, as JSON can hold it."""
        return _decode(self.key)


class _Bundle(NamedTuple):
    """One checkpoint, its shards open."""

    pairs: list[Pair]
    entries: list[_Entry]  # those that have values
    byteorder: str
    files: list[InputFile]  # the index, then the shards
    record: bytes | None  # this tool's, if it wrote the checkpoint


# --- reading --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _open_bundle(path: str) -> Iterator[_Bundle]:
    """Yield a checkpoint with every extent checked.

    Raises:
        FormatError: it is damaged, hostile or not complete; names the file.
    """
    with contextlib.ExitStack() as stack:
        index = _open_file(path, stack)
        try:
            if not path.endswith(_SUFFIX):
                raise FormatError(
                    "is the index of a TensorFlow checkpoint; expected a name like NAME.index"
                )
            pairs, meta = _read_table(index)
            shards, byteorder = _parse_header(pairs[0] if pairs else (b"?", b""))
            entries = [_parse_entry(key, value) for key, value in pairs[1:]]
        except FormatError as error:
            raise FormatError(f"{shown(path)}: {error}") from None
        stem = path.removesuffix(".index")
        files = [
            index,
            *(_open_file(f"{stem}{_name_tail(k, shards)}", stack) for k in range(shards)),
        ]
        entries = [entry for entry in entries if not entry.parts]
        _check_extents(entries, [file.name for file in files], [file.size for file in files])
        record = meta.get(PROVENANCE)
        yield _Bundle(pairs, entries, byteorder, files, record)


def _open_file(path: str, stack: contextlib.ExitStack) -> InputFile:
    try:
        return stack.enter_context(open_input(path))
    except FormatError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise FormatError(
            f"{shown(path)}: is missing; a TensorFlow checkpoint consists of its .index and all "
            "its data shards: copy them together"
        ) from None


def _name_tail(shard: int, shards: int) -> str:
    """Return how the name of a shard ends."""
    return f".data-{shard:05d}-of-{shards:05d}"


def _read_table(index: InputFile) -> tuple[list[Pair], dict[bytes, bytes]]:
    if index.size > WHOLE:
        raise FormatError(
            f"has {word_size(index.size)}; expected an index of at most {word_size(WHOLE)}"
        )
    return sstables.read(index.read(0, index.size))


def _parse_header(pair: Pair) -> tuple[int, str]:
    """Return the number of shards and the byte order, which the entry without a key tells.

    Raises:
        FormatError: there is none, or it is of a later version.
    """
    key, value = pair
    if key:
        raise FormatError("is a sorted table, but not the index of a TensorFlow checkpoint")
    header = {number: field for number, field, _ in read_fields(value)}
    version = {
        number: field for number, field, _ in read_fields(require_message(header.get(3, b"")))
    }
    least = require_number(version.get(2, 0))
    if least > 1:
        raise FormatError(f"needs a reader of version {least}; expected at most 1")
    return require_number(header.get(1, 0)), ">" if require_number(header.get(2, 0)) else "<"


def _parse_entry(key: bytes, value: bytes) -> _Entry:
    """Read an entry.

    Raises:
        FormatError: it contradicts itself; names the tensor.
    """
    name = _name_tensor(key)
    try:
        fields = {number: field for number, field, _ in read_fields(value)}
        code, shard, offset, nbytes, crc = (
            require_number(fields.get(number, 0))
            for number in (_DTYPE, _SHARD, _OFFSET, _SIZE, _CRC)
        )
        shape = _parse_shape(require_message(fields.get(_SHAPE, b"")))
        if code not in KINDS:
            raise FormatError(f"has TensorFlow's type {code}, which is not supported")
        dtype, width = KINDS[code]
        parts = _SLICES in fields
        expected = math.prod(shape) * width
        if width and not parts and nbytes != expected:
            raise FormatError(
                f"has {nbytes} bytes; expected {expected} for {dtype} of shape {shown(shape)}"
            )
    except FormatError as error:
        raise FormatError(f"tensor '{shown(name)}': {error}") from None
    return _Entry(key, name, dtype, shape, shard, offset, nbytes, crc, parts)


def _parse_shape(message: bytes) -> tuple[int, ...]:
    """Read a TensorShapeProto."""
    shape = []
    for number, value, _ in read_fields(message):
        if number == 2:
            size = {k: field for k, field, _ in read_fields(require_message(value))}.get(1, 0)
            shape.append(require_number(size))
    if len(shape) > _MAXIMUM_RANK:
        raise FormatError(f"has {len(shape)} dimensions; expected at most {_MAXIMUM_RANK}")
    if math.prod(shape) >= 1 << 63:
        raise FormatError(f"has the shape {shown(shape)}; expected fewer than 2^63 elements")
    return tuple(shape)


def _check_extents(entries: list[_Entry], paths: Sequence[str], sizes: Sequence[int]) -> None:
    """Refuse values that their shard does not have, or that lie over one another."""
    for entry in entries:
        if entry.shard >= len(paths) - 1:
            raise FormatError(
                f"{shown(paths[0])}: tensor '{shown(entry.name)}' lies in shard {entry.shard} of "
                f"{len(paths) - 1}; the index is damaged"
            )
        end, size = entry.offset + entry.nbytes, sizes[1 + entry.shard]
        if end > size:
            raise FormatError(
                f"{shown(paths[1 + entry.shard])}: tensor '{shown(entry.name)}' lies outside the "
                f"file: it needs {end} bytes, the file has {size}; it is truncated or damaged"
            )
    filled = sorted((e for e in entries if e.nbytes), key=lambda e: (e.shard, e.offset))
    for one, other in itertools.pairwise(filled):
        if one.shard == other.shard and one.offset + one.nbytes > other.offset:
            raise FormatError(
                f"{shown(paths[0])}: the tensors '{shown(one.name)}' and '{shown(other.name)}' "
                "overlap; the index is damaged"
            )


# --- names ----------------------------------------------------------------------------------------


def _decode(key: bytes) -> str:
    return key.decode(errors="surrogateescape")


def _name_tensor(key: bytes) -> str:
    """Return the name by which users know a tensor."""
    name = _decode(key).removesuffix(_VALUE)
    if key.startswith(b"\0"):
        with contextlib.suppress(FormatError):
            return _name_part(key)
    return name


def _name_part(key: bytes) -> str:
    """Name a part of a partitioned variable, from TensorFlow's "ordered code" of its place.

    Raises:
        FormatError: it is something else.
    """
    end = key.find(b"\0\1")  # of the variable, in which zeros are escaped otherwise
    place = end + 3
    if end < 0 or key[end + 2 : place] != b"\1":  # then the number of dimensions, in one byte
        raise FormatError("no part")
    rank, place = key[place] if place < len(key) else 0, place + 1
    spans = []
    for _ in range(rank):
        start, place = _read_signed(key, place)
        length, place = _read_signed(key, place)
        spans.append(":" if length < 0 else f"{start}:{start + length}")
    return f"{_decode(key[1:end])}[{', '.join(spans)}]"


def _read_signed(key: bytes, place: int) -> tuple[int, int]:
    """Read a signed number: its first bits count its bytes; only -1 is negative."""
    if key[place : place + 1] == b"\x7f":
        return -1, place + 1
    first = key[place] if place < len(key) else 0
    ones = 8 - (first ^ 0xFF).bit_length()
    if not 0 < ones < 8:
        raise FormatError("no part")
    digits = int.from_bytes(key[place : place + ones], "big")
    return digits & (1 << 7 * ones - 1) - 1, place + ones


def _separate_state(entries: Sequence[_Entry]) -> tuple[set[str], set[str]]:
    """Return the names of optimizer state, and of other tensors that are not the model's own."""
    names = {entry.name for entry in entries}
    homes = _find_homes(names)
    tracked = any(entry.name == _GRAPH for entry in entries)
    of_optimizer = _is_tracked_state if tracked else _is_saved_state
    optimizer = {name for name in names if of_optimizer(name, names, homes)}
    # Such as the keys of a lookup table, which have no fixed order.
    attributes = {
        entry.name
        for entry in entries
        if "/.ATTRIBUTES/" in entry.location and not entry.location.endswith(_VALUE)
    }
    rest = {name for name in names if name == _GRAPH or _COUNTERS.fullmatch(name)} | attributes
    return optimizer, rest - optimizer


def _find_homes(names: Collection[str]) -> set[str]:
    """Return the paths of optimizers, recognised by the tensors that lie in them."""
    homes = set()
    for name in names:
        home, _, leaf = name.rpartition("/")
        if home and (
            leaf == "_iterations"
            or (leaf == "iter" and any(f"{home}/{setting}" in names for setting in _SETTINGS))
        ):
            homes.add(home)
    return homes


def _is_tracked_state(name: str, names: Collection[str], homes: Collection[str]) -> bool:
    """Return whether a tensor is optimizer state, in a checkpoint of objects."""
    del names
    steps = name.split("/")
    # TensorFlow names a variable by the shortest way to it.  Keras 3's optimizers lead to the
    # model's own variables, and from tf.train.Checkpoint(model=..., optimizer=...) sooner.
    if "_trainable_variables" in steps:
        return False
    return (
        ".OPTIMIZER_SLOT" in steps
        or any(_OPTIMIZER.search(step) for step in steps[:-1])
        or _is_below(name, homes)
    )


def _is_saved_state(name: str, names: Collection[str], homes: Collection[str]) -> bool:
    """Return whether a tensor is optimizer state, where names are all there is (TF 1's Saver)."""
    whole, bracket, part = name.partition("[")
    variable, _, leaf = whole.rpartition("/")
    slot = _SLOTS.fullmatch(leaf) and f"{variable}{bracket}{part}" in names
    return bool(slot or _POWERS.fullmatch(name)) or _is_below(name, homes)


def _is_below(name: str, homes: Collection[str]) -> bool:
    return any(name[: match.start()] in homes for match in re.finditer("/", name))


# --- the format -----------------------------------------------------------------------------------


def _copy(
    source: InputFile, path: str, holes: Sequence[tuple[int, int]], heartbeat: Heartbeat
) -> None:
    """Copy a shard, except for what will be overwritten."""
    with LocalOutput(path, create=True) as target, name_errors(source.name):
        target.truncate(source.size)
        start = 0
        for low, high in (*holes, (source.size, source.size)):
            if start < low:
                copy_range(source, start, target, start, low - start, heartbeat)
            start = high


def _replace_checksum(value: bytes, crc: int) -> bytes:
    """Return an entry with another checksum."""
    # Its fields in order, as TensorFlow compares some by their bytes; a zero is left out.
    fields = [(number, raw) for number, _, raw in read_fields(value) if number != _CRC]
    if crc:
        fields.append((_CRC, encode_varint(_CRC << 3 | 5) + crc.to_bytes(4, "little")))
    return b"".join(raw for _, raw in sorted(fields, key=lambda field: field[0]))


class TensorFlowBundle(Format):
    """TensorFlow's checkpoints: an index and shards of bytes."""

    key = "tf_bundle"
    name = "TensorFlow checkpoint"
    suffixes = (_SUFFIX,)
    has_checksums = True
    dtypes = frozenset(FLOATS)

    def scan(self, request: ScanRequest, heartbeat: Heartbeat) -> Table:
        """See `Format.scan`."""
        heartbeat()
        with _open_bundle(request.path) as bundle:
            heartbeat()
            optimizer, rest = _separate_state(bundle.entries)
            tensors: dict[str, TensorSpec] = {}
            others: dict[str, TensorSpec] = {}
            for entry in bundle.entries:
                where = Extent(entry.offset, entry.nbytes, 1 + entry.shard)
                kind = (entry.shape, entry.dtype, bundle.byteorder)
                spec = TensorSpec(entry.name, *kind, entry.location, where)
                aside = entry.name in optimizer or entry.name in rest
                if spec.name in tensors:
                    raise FormatError(
                        f"{shown(request.path)}: two of its tensors have the same name"
                    )
                (others if aside else tensors)[spec.name] = spec
            record = bundle.record if request.with_optimizer else None
            tails = tuple(f".data-{file.name.rpartition('.data-')[2]}" for file in bundle.files[1:])
            return Table(
                path=Path(request.path),
                format=self.key,
                files=tuple(File(file.name, file.version) for file in bundle.files),
                tensors=tensors,
                others=others if request.with_optimizer else {},
                optimizer=frozenset(optimizer),
                config="",
                is_polyak_output=bundle.record is not None,
                about={"provenance": record.decode(errors="replace")} if record else {},
                # Checkpoint.restore wants every slot that the graph of objects lists.
                rules=OutputRules(cautions=_CAUTIONS, is_fixed=True, tails=tails),
            )

    def check(self, path: str, heartbeat: Heartbeat, later: int | None = None) -> list[Checksum]:
        """See `Format.check`; of the model's own tensors, as no others are read."""
        left = []
        with _open_bundle(path) as bundle:
            optimizer, rest = _separate_state(bundle.entries)
            for entry in heartbeat.over(bundle.entries):
                # Of what varies in length, the checksum is not that of the bytes.
                if (
                    entry.name in optimizer
                    or entry.name in rest
                    or entry.dtype in ("string", "opaque")
                ):
                    continue
                file = bundle.files[1 + entry.shard]
                damaged = f"tensor '{shown(entry.name)}' has a wrong checksum: the data are damaged"
                if later is not None and entry.nbytes >= later:
                    place, crc = (entry.offset, entry.nbytes), checksums.unmask(entry.crc)
                    left.append(Checksum(file.name, *place, crc, "crc32c", damaged))
                    continue
                crc = checksums.crc32c_of(file, entry.offset, entry.nbytes, heartbeat)
                if checksums.mask(crc) != entry.crc:
                    raise FormatError(f"{shown(file.name)}: {damaged}")
        return left

    def write_skeleton(self, request: SkeletonRequest, heartbeat: Heartbeat) -> Draft:
        """See `Format.write_skeleton`."""
        placements = {}
        with _open_bundle(request.template.files[0].path) as bundle:
            shards = len(bundle.files) - 1
            files = [
                request.output,
                *(f"{request.output}{_name_tail(k, shards)}" for k in range(shards)),
            ]
            holes: list[list[tuple[int, int]]] = [[] for _ in files]
            for entry in bundle.entries:
                if entry.nbytes and entry.location in request.averaged:
                    file = 1 + entry.shard
                    placements[entry.location] = Placement(
                        entry.offset, entry.dtype, bundle.byteorder, file
                    )
                    holes[file].append((entry.offset, entry.offset + entry.nbytes))
            for k in range(1, len(files)):
                _copy(bundle.files[k], files[k], sorted(holes[k]), heartbeat)
            table = sstables.build_table(bundle.pairs, {PROVENANCE: request.provenance.encode()})
            with LocalOutput(request.output) as index:
                index.write(0, table)
            return Draft(placements, files)

    def finalize(self, output: str, draft: Draft) -> None:
        """See `Format.finalize`; the index still has the template's checksums."""
        found = {}
        with contextlib.ExitStack() as stack:
            shards = [stack.enter_context(LocalOutput(path)).reader() for path in draft.files[1:]]
            index = stack.enter_context(LocalOutput(output))
            written = index.reader()
            pairs, meta = sstables.read(written.read(0, written.size))
            entries = {_decode(key): _parse_entry(key, value) for key, value in pairs[1:]}
            for location in draft.placements:
                entry = entries[location]
                crc = checksums.crc32c_of(shards[entry.shard], entry.offset, entry.nbytes)
                found[entry.key] = checksums.mask(crc)
            final = [
                (key, _replace_checksum(value, found[key]) if key in found else value)
                for key, value in pairs
            ]
            table = sstables.build_table(final, meta)
            index.write(0, table)
            index.truncate(len(table))

    def is_polyak_output(self, path: str, heartbeat: Heartbeat) -> bool:
        """See `Format.is_polyak_output`."""
        heartbeat()
        try:
            with contextlib.ExitStack() as stack:
                return PROVENANCE in _read_table(_open_file(path, stack))[1]
        except FormatError:
            return False
