"""safetensors: a header of JSON and behind it the tensors, in one file or in shards with an index.

The format's own library tells no offsets, so the header is read here: eight bytes of length, and
JSON.  What that library refuses is refused, and what it writes is written in the same way.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from polyak_cli.errors import FormatError, OutputError, shown, word_size
from polyak_cli.formats import conversion, foreign, vocabularies
from polyak_cli.formats.format import RUN_MODULE, Draft, Format, ScanRequest, SkeletonRequest
from polyak_cli.formats.sharding import Index, check_shard, read_index
from polyak_cli.processes.sandbox import Heartbeat
from polyak_cli.storage import File, Version, open_input
from polyak_cli.storage.local import LocalOutput, name_errors
from polyak_cli.tensors import FLOATS, Extent, Placement, Table, TensorSpec

PROVENANCE = "polyak_provenance"
#: Characters of a text of __metadata__ that is shown to whoever looks inside.
_SHORT = 100
_METADATA = "__metadata__"
#: What PyTorch's DCP says there of the parts of tensors in a file.
_SHARDED = "DCP_SHARDING_INFO"
#: Dtype in the header -> as tables have it, and the bits of an element.  In the library's order: it
#: writes the last ones first, so that every tensor is aligned.
_TYPES: Mapping[str, tuple[str, int]] = {
    "BOOL": ("bool", 8),
    "F4": ("float4_e2m1fn", 4),
    "F6_E2M3": ("float6_e2m3fn", 6),
    "F6_E3M2": ("float6_e3m2fn", 6),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "F32": ("float32", 32),
    "C64": ("complex64", 64),
    "F64": ("float64", 64),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
}
_CODES = {ours: code for code, (ours, _) in _TYPES.items()}
_RANKS = {code: rank for rank, code in enumerate(_TYPES)}
_KEYS = {"dtype", "shape", "data_offsets"}
#: The library's own bound on a header, and numpy's and PyTorch's on dimensions.
_LONGEST, _DEEPEST = 100_000_000, 64
#: What the index of a sharded checkpoint says that follows from its tensors.
_SIZE = "total_size"
_INDEX = ".safetensors.index.json"


class _Entry(NamedTuple):
    """One tensor in a header; the offsets count from the header's end."""

    name: str
    code: str  # its dtype, one of `_TYPES`
    shape: Sequence[int]
    start: int
    stop: int


class _Header(NamedTuple):
    """What one file says."""

    path: str
    version: Version
    metadata: Mapping[str, str]
    entries: Sequence[_Entry]  # in its order
    data: int  # offset of the tensors in the file


# --- reading --------------------------------------------------------------------------------------


def _collect_short_texts(headers: Iterable[_Header]) -> dict[str, str]:
    """Return this tool's record and the short texts; long ones may be whole configurations."""
    texts = {key: text for header in headers for key, text in header.metadata.items()}
    names = {key: key for key in texts if len(texts[key]) <= _SHORT} | {PROVENANCE: "provenance"}
    return {name: texts[key] for key, name in names.items() if key in texts}


def _build_specs(header: _Header, number: int) -> Iterator[TensorSpec]:
    """Yield the tensors of a file that is the ``number``-th of its checkpoint."""
    for name, code, shape, start, stop in header.entries:
        where = Extent(header.data + start, stop - start, number)
        yield TensorSpec(name, tuple(shape), _TYPES[code][0], "<", name, where)


def _is_index(path: str) -> bool:
    """Return whether a file is an index.

    A file of tensors begins with a length, which may look like a "{".
    """
    head = _read_content(path, 9, 0)[1]
    return head.startswith(b"{") and not head.endswith(b"\0\0\0{")


def _read_content(path: str, most: int, offset: int) -> tuple[Version, bytes]:
    """Return the version of a file, and its bytes from an offset on."""
    with open_input(path) as file, name_errors(path):
        return file.version, file.read(offset, most)


def _read_header(path: str, heartbeat: Heartbeat) -> _Header:
    """Read what a file of tensors says, and refuse what the format's library would refuse."""
    version, head = _read_content(path, 8, 0)
    length = int.from_bytes(head, "little")
    try:
        if len(head) < 8 or 8 + length > version.size:
            raise FormatError(
                f"has {version.size} bytes, which is less than its header needs; it is truncated "
                "or not a safetensors file"
            )
        if length > _LONGEST:
            raise FormatError(f"claims a header of {length} bytes; expected at most {_LONGEST}")
        content = _parse_object(_read_content(path, length, 8)[1], heartbeat)
        metadata = _check_metadata(content.pop(_METADATA, {}))
        _refuse_parts(path, metadata)
        entries = [_parse_entry(name, said) for name, said in content.items()]
        _check_extents(entries, version.size - 8 - length)
    except FormatError as error:
        raise FormatError(f"{shown(path)}: {error}") from None
    return _Header(path, version, metadata, entries, 8 + length)


def _parse_object(raw: bytes, heartbeat: Heartbeat) -> dict[str, Any]:
    """Parse a JSON object in which no key may stand twice: programs would read it differently."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        heartbeat()
        made = dict(pairs)
        if len(made) < len(pairs):
            ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
            raise FormatError(f"names '{shown(twice)}' twice in its header")
        return made

    try:
        if not raw.startswith(b"{"):
            raise ValueError("it does not begin with a brace")
        parsed = json.loads(raw.decode(), object_pairs_hook=once)
        if re.search(rb"\\u[dD][89a-fA-F]", raw):  # perhaps half of a character, not to be written
            json.dumps(parsed, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is damaged: its header is not JSON ({shown(error)})") from None
    return dict(parsed)


def _check_metadata(said: Any) -> dict[str, str]:
    if not isinstance(said, dict) or not all(isinstance(text, str) for text in said.values()):
        raise FormatError(f"is damaged: its {_METADATA} does not map names to strings")
    return said


def _refuse_parts(path: str, metadata: Mapping[str, str]) -> None:
    """Refuse a file of several that each hold a part of every tensor, as PyTorch's DCP writes them.

    A file of one process says where its tensors begin too, and it is whole.
    """
    if _SHARDED in metadata and Path(path).name.startswith("shard-"):
        raise FormatError(f"is a part of {foreign.DCP_SHARDS.name}; {foreign.DCP_SHARDS.advice}")


def _parse_entry(name: str, said: Any) -> _Entry:
    """Check one tensor of a header by itself."""
    if not isinstance(said, dict) or set(said) != _KEYS:
        raise FormatError(
            f"tensor '{shown(name)}' is not described by dtype, shape and data_offsets alone"
        )
    code, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
    if not isinstance(code, str) or code not in _TYPES:
        raise FormatError(f"tensor '{shown(name)}' has an unknown type, {shown(code, 40)}")
    if not _is_list_of_counts(shape) or len(shape) > _DEEPEST:
        raise FormatError(
            f"tensor '{shown(name)}' has the shape {shown(shape, 40)}; expected at most "
            f"{_DEEPEST} whole numbers of 0 or more"
        )
    if not _is_list_of_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(
            f"tensor '{shown(name)}' has the data_offsets {shown(offsets, 40)}; expected two "
            "whole numbers"
        )
    bits = _TYPES[code][1]
    for dimension in shape:
        bits *= dimension
    start, stop = offsets
    if bits != 8 * (stop - start):
        expected = f"{bits / 8:.16g}" if bits < 1 << 1000 else "more than any file has"
        raise FormatError(
            f"tensor '{shown(name)}' has {stop - start} bytes; expected {expected} for {code} "
            f"of shape {shown(shape, 100)}"
        )
    return _Entry(name, code, shape, start, stop)


def _is_list_of_counts(numbers: Any) -> bool:
    """Return whether something is a list of what can be counted or addressed."""
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)


def _check_extents(entries: Sequence[_Entry], nbytes: int) -> None:
    """Refuse tensors that overlap, leave holes, or do not end where the file does."""
    ordered = sorted(entries, key=lambda entry: (entry.start, entry.stop))
    for one, other in pairwise([_Entry("", "", (), 0, 0), *ordered]):
        if other.start < one.stop:
            raise FormatError(f"the tensors '{shown(one.name)}' and '{shown(other.name)}' overlap")
        if other.start > one.stop:
            raise FormatError(
                f"the {other.start - one.stop} bytes before tensor '{shown(other.name)}' belong "
                "to no tensor"
            )
    end = ordered[-1].stop if ordered else 0
    if end > nbytes:
        raise FormatError(
            f"tensor '{shown(ordered[-1].name)}' lies outside the file: {end - nbytes} bytes are "
            "missing; it is truncated or damaged"
        )
    if end < nbytes:
        raise FormatError(f"{nbytes - end} bytes at its end belong to no tensor; it is damaged")


def _read_index(path: str, heartbeat: Heartbeat) -> Index:
    """Read which shards there are, and which tensors should be in each."""
    index = read_index(path, ".safetensors", lambda raw: _parse_object(raw, heartbeat))
    if not isinstance(index.content.get("metadata", {}), dict):
        raise FormatError(f"{shown(path)}: is damaged: its metadata is not a JSON object")
    return index


def _read_shards(path: str, index: Index, heartbeat: Heartbeat) -> list[_Header]:
    """Read the shards, which must hold the very tensors that the index says."""
    headers = []
    for name in sorted(index.shards):
        header = _read_header(str(Path(path).with_name(name)), heartbeat)
        check_shard(path, index, name, {entry.name for entry in header.entries})
        headers.append(header)
    return headers


def _list_tensor_files(table: Table) -> Sequence[Any]:
    """Return the files of a checkpoint without its index, which is the last of several."""
    return table.files[:-1] if len(table.files) > 1 else table.files


def _merge_metadata(headers: Sequence[_Header]) -> dict[str, str]:
    """Return the metadata of several files as one's."""
    merged: dict[str, str] = {}
    for header in headers:
        for key, text in header.metadata.items():
            if key != PROVENANCE and merged.setdefault(key, text) != text:
                raise OutputError(
                    f"the shards have different values of '{shown(key)}' in their {_METADATA}, "
                    "and one file can keep only one of them; name a folder as the output"
                )
    return merged


# --- writing --------------------------------------------------------------------------------------


class _Output(NamedTuple):
    """One file to write."""

    path: str
    metadata: Mapping[str, str]
    entries: Sequence[_Entry]


def _write_index(request: SkeletonRequest, made: Sequence[_Output], heartbeat: Heartbeat) -> str:
    """Write the template's index for an output whose tensors may have another type."""
    source = request.template.files[-1].path
    content = dict(_read_index(source, heartbeat).content)
    total = sum(entry.stop - entry.start for one in made for entry in one.entries)
    content["metadata"] = content.get("metadata", {}) | {_SIZE: total}
    target = str(Path(request.output, _name_index(source)))
    with LocalOutput(target, create=True) as file:
        file.write(0, (json.dumps(content, indent=2) + "\n").encode())
    return target


def _name_index(source: str) -> str:
    """Return the name of an output's index, by which programs find it."""
    name = Path(source).name
    return name if name.endswith(_INDEX) else f"model{_INDEX}"


def _change_types(
    entries: Sequence[_Entry], request: SkeletonRequest, *, moved: bool
) -> Sequence[_Entry]:
    """Return entries with the types of the output, and new offsets where they are needed."""
    changed = [
        entry._replace(code=_CODES[request.averaged[entry.name]])
        if entry.name in request.averaged
        else entry
        for entry in entries
    ]
    return _place_in_a_row(changed) if moved or changed != list(entries) else entries


def _place_in_a_row(entries: Sequence[_Entry]) -> list[_Entry]:
    """Give tensors their offsets, the widest types first: so each is aligned."""
    placed = []
    end = 0
    for entry in sorted(entries, key=lambda entry: -_RANKS[entry.code]):
        nbytes = _count_bytes(entry.code, entry.shape)
        placed.append(entry._replace(start=end, stop=end + nbytes))
        end += nbytes
    return placed


def _count_bytes(code: str, shape: Sequence[int]) -> int:
    bits = _TYPES[code][1]
    for dimension in shape:
        bits *= dimension
    return bits // 8


def _write_files(request: SkeletonRequest, made: Sequence[_Output], heartbeat: Heartbeat) -> Draft:
    """Write headers and carried tensors, and return where the averaged ones belong."""
    specs = request.template.tensors
    placements = {}
    with conversion.Carrier(request.template, heartbeat) as carrier:
        for number, one in enumerate(made):
            head = _build_header(one, request.provenance)
            # A file of its own exists already under the hidden name; those in a folder do not.
            create = one.path != request.output
            with LocalOutput(one.path, create=create) as file:
                file.write(0, head)
                file.truncate(len(head) + max((entry.stop for entry in one.entries), default=0))
                for entry in heartbeat.over(one.entries):
                    spec, offset = specs[entry.name], len(head) + entry.start
                    wanted = request.averaged.get(spec.location)
                    if wanted is None:
                        carrier.carry(spec, file, offset)
                    elif spec.size:
                        placements[spec.location] = Placement(offset, wanted, "<", number)
    return Draft(placements)


def _build_header(one: _Output, provenance: str) -> bytes:
    """Return a header with its length, padded as the library does it."""
    metadata = {key: text for key, text in one.metadata.items() if key != PROVENANCE}
    content: dict[str, Any] = {_METADATA: metadata | {PROVENANCE: provenance}}
    for name, code, shape, start, stop in one.entries:
        content[name] = {"dtype": code, "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _LONGEST:
        raise FormatError(
            f"the header of the output would have {word_size(len(text))}; expected at most "
            f"{word_size(_LONGEST)}: average fewer checkpoints"
        )
    return len(text).to_bytes(8, "little") + text


# --- from another format --------------------------------------------------------------------------


def _refuse_half_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise OutputError(f"'{shown(text)}' is not UTF-8, which safetensors requires") from None


class Safetensors(Format):
    """A header of JSON and behind it the tensors, in one file or in shards with an index."""

    key = name = "safetensors"
    suffixes = (".safetensors",)
    dtypes = frozenset(FLOATS)
    recalculation = RUN_MODULE
    can_be_folder = True
    can_be_part = True
    can_be_left = True
    conversion_suffix = ".safetensors"

    def scan(self, request: ScanRequest, heartbeat: Heartbeat) -> Table:
        """See `Format.scan`."""
        if _is_index(request.path):
            index = _read_index(request.path, heartbeat)
            headers = _read_shards(request.path, index, heartbeat)
            files = [File(header.path, header.version) for header in headers]
            files.append(File(request.path, index.version))
        else:
            headers = [_read_header(request.path, heartbeat)]
            files = [File(request.path, headers[0].version)]
        tensors: dict[str, TensorSpec] = {}
        for number, header in enumerate(headers):
            tensors.update((spec.name, spec) for spec in _build_specs(header, number))
        return Table(
            path=Path(request.path),
            format=self.key,
            files=tuple(files),
            tensors=tensors,
            others={},
            optimizer=frozenset(),
            config="",
            is_polyak_output=any(PROVENANCE in header.metadata for header in headers),
            about=_collect_short_texts(headers),
            assets=vocabularies.find_in_texts(
                {key: text for header in headers for key, text in header.metadata.items()}
            ),
        )

    def name_outputs(self, template: Table) -> list[str]:
        """See `Format.name_outputs`."""
        names = [Path(file.path).name for file in template.files]
        return names if len(names) == 1 else [*names[:-1], _name_index(names[-1])]

    def texts(self, table: Table, heartbeat: Heartbeat) -> dict[str, str]:
        """Return what a checkpoint says besides its tensors."""
        return _merge_metadata(
            [_read_header(file.path, heartbeat) for file in _list_tensor_files(table)]
        )

    def is_polyak_output(self, path: str, heartbeat: Heartbeat) -> bool:
        """See `Format.is_polyak_output`."""
        try:
            if _is_index(path):
                first = min(_read_index(path, heartbeat).shards)
                path = str(Path(path).with_name(first))
            return PROVENANCE in _read_header(path, heartbeat).metadata
        except FormatError:
            return False

    def write_skeleton(self, request: SkeletonRequest, heartbeat: Heartbeat) -> Draft:
        """See `Format.write_skeleton`: one file, or a folder with the template's shards."""
        files = _list_tensor_files(request.template)
        headers = [_read_header(file.path, heartbeat) for file in files]
        for header, file in zip(headers, files, strict=True):
            conversion.require_same(header.path, header.version, file.version)
        if not Path(request.output).is_dir():
            entries = [entry for header in headers for entry in header.entries]
            moved = len(headers) > 1
            merged = _merge_metadata(headers) if moved else headers[0].metadata
            made = [_Output(request.output, merged, _change_types(entries, request, moved=moved))]
            return _write_files(request, made, heartbeat)
        folder = Path(request.output)
        made = [
            _Output(
                str(folder / Path(header.path).name),
                header.metadata,
                _change_types(header.entries, request, moved=False),
            )
            for header in headers
        ]
        draft = _write_files(request, made, heartbeat)
        index = _write_index(request, made, heartbeat)
        return draft._replace(files=[*(one.path for one in made), index])

    def refuse_conversion(self, request: SkeletonRequest, texts: Mapping[str, str]) -> None:
        """See `Format.refuse_conversion`."""
        for key in (_METADATA, PROVENANCE):
            if key in request.template.tensors or key in texts:
                raise OutputError(
                    f"holds something called '{key}', a name that safetensors reserves"
                )
        for spec in request.template.tensors.values():
            code = _CODES.get(request.averaged.get(spec.location, spec.dtype), "")
            carried = spec.location not in request.averaged
            if not code or (carried and spec.nbytes != _count_bytes(code, spec.shape)):
                raise OutputError(
                    f"tensor '{shown(spec.name)}' has type {spec.dtype}, which safetensors does "
                    "not have"
                )
            _refuse_half_characters(spec.name)
        for key, text in texts.items():
            _refuse_half_characters(key)
            _refuse_half_characters(text)

    def convert(
        self, request: SkeletonRequest, texts: Mapping[str, str], heartbeat: Heartbeat
    ) -> Draft:
        """See `Format.convert`; in the order in which the library would write it."""

        def entry(spec: TensorSpec) -> _Entry:
            code = _CODES[request.averaged.get(spec.location, spec.dtype)]
            return _Entry(spec.name, code, list(spec.shape), 0, 0)

        specs = request.template.tensors
        entries = _place_in_a_row([entry(specs[name]) for name in sorted(specs)])
        return _write_files(request, [_Output(request.output, texts, entries)], heartbeat)
