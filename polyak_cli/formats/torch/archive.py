"""PyTorch's `.pt`: a zip archive of a pickle and of one member for each storage.

The pickle says how tensors lie in storages; a storage is averaged as a whole, which averages every
view of it.  The output is the template byte for byte except averaged storages, their checksums and
this tool's record, since PyTorch finds storages by where its own writer would have put them.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from polyak_cli.errors import FormatError, OutputError, shown, word_rest
from polyak_cli.formats import conversion, zips
from polyak_cli.formats.format import RUN_MODULE, Draft, Format, ScanRequest, SkeletonRequest
from polyak_cli.formats.torch import beside, pickles, retyping, vocabularies
from polyak_cli.formats.torch.beside import Owner
from polyak_cli.formats.torch.pickles import SIZES, Instance, Pairs, Stored, Tensor, find_inside
from polyak_cli.processes.sandbox import Heartbeat
from polyak_cli.storage import InputFile
from polyak_cli.storage.local import (
    LocalOutput,
    copy_around,
    make_read_error,
)
from polyak_cli.tensors import FLOATS, Checksum, Extent, OutputRules, Placement, Table, TensorSpec

#: The member that holds this tool's record; PyTorch looks for members by name and ignores others.
PROVENANCE = "polyak_provenance"
#: The member by which PyTorch knows that it may compute where storages lie, as its own writer puts
#: them, in place of looking for them.
_VERSION = ".format_version"
_ALIGNMENT = 64  # of storages, as torch.save has it
_MAXIMUM_DEPTH = 64
#: What makes an array of numpy, before version 2 and since.
_ARRAYS = {f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")}
_MOST_KEYS = 10  # that an error names
_STEP = 1 << 20

Named = tuple[str, Tensor | Stored]


# --- scanning -------------------------------------------------------------------------------------


def _find_records(members: Sequence[zips.Member]) -> dict[str, zips.Member]:
    """Return the members by their names within the one folder that `torch.save` puts them in."""
    folders = {member.name.partition("/")[0] for member in members}
    if len(folders) > 1:
        one, other = sorted(folders)[:2]
        raise FormatError(
            f"has the folders '{shown(one)}' and '{shown(other)}'; torch.save writes one"
        )
    records = {member.name.partition("/")[2]: member for member in members}
    if "constants.pkl" in records or any(name.startswith("code/") for name in records):
        raise FormatError(
            "is a TorchScript archive, which holds code; load it with torch.jit.load and save its "
            "state: torch.save(module.state_dict(), ...)"
        )
    if "data.pkl" not in records:
        raise FormatError("has no member data.pkl; it was not written by torch.save")
    if not any(member.crc for member in members):
        raise FormatError(
            "was written without checksums (torch.serialization.set_crc32_options); save it with"
        )
    return records


def _describe_origin(
    file: InputFile, records: Mapping[str, zips.Member], root: Any
) -> dict[str, str]:
    """Return the program that trained the model, and this tool's record if it wrote the archive."""
    trainer = beside.find_trainer(root)
    about = {"trainer": trainer} if trainer else {}
    if PROVENANCE in records:
        about["provenance"] = zips.read_whole(file, records[PROVENANCE]).decode(errors="replace")
    return about


def _read_byteorder(file: InputFile, records: Mapping[str, zips.Member]) -> str:
    if "byteorder" not in records:
        return "<"  # what PyTorch takes for granted too
    text = zips.read_whole(file, records["byteorder"])
    if text not in (b"little", b"big"):
        raise FormatError(f"has the byte order {shown(text[:20])}; expected little or big")
    return "<" if text == b"little" else ">"


@dataclass(slots=True)
class _Collected:
    """The tensors of a checkpoint: one for each storage, named by the first tensor on it."""

    records: Mapping[str, zips.Member]
    byteorder: str
    tensors: list[TensorSpec] = field(default_factory=list)
    others: list[TensorSpec] = field(default_factory=list)
    optimizer: list[str] = field(default_factory=list)
    part: tuple[str, ...] = ()  # the keys that lead to what is taken for the model

    def fill(self, root: Any, heartbeat: Heartbeat) -> None:
        """Add the storages of all tensors that the pickle's root leads to."""
        if isinstance(root, Pairs) and beside.is_optimizer(root):
            raise FormatError("is the state of an optimizer; expected a model's state dict")
        views: dict[str, list[_Found]] = {}
        hidden: dict[str, tuple[_Found, Instance]] = {}
        for count, found in enumerate(self.list_all(root)):
            if count % 500 == 0:
                heartbeat()
            key = found.value.key if isinstance(found.value, Stored) else found.value.storage.key
            if found.holder is None:
                views.setdefault(key, []).append(found)
            elif not found.owner:
                hidden.setdefault(key, (found, found.holder))
        for key, (found, holder) in hidden.items():
            if all(view.owner for view in views.get(key, ())):
                _refuse_hidden(found, holder)
        for several in views.values():
            # What a model and its optimizer share is the model's.
            own = [view for view in several if not view.owner and self.is_inside(view)]
            start = len(self.part) if own else 0
            spec = self.describe(
                [("/".join(v.path[start:]) or "tensor", v.value) for v in own or several]
            )
            (self.tensors if own else self.others).append(spec)
            if not own and several[0].owner == "optimizer":
                self.optimizer.append(spec.name)
        if not self.tensors and beside.find_trainer(root).startswith("DeepSpeed"):
            raise FormatError(
                "is a part of a checkpoint of DeepSpeed's ZeRO, without a tensor of the model; "
                "convert its folder to one file with the zero_to_fp32.py beside it"
            )
        if not self.tensors and _has_arrays(root):
            raise FormatError(
                "holds arrays of numpy and no tensor of a model; save tensors in their place, made "
                "with torch.from_numpy, or the arrays with numpy.savez"
            )

    def list_all(self, root: Any) -> Iterator[_Found]:
        """Yield all tensors, those of the part first: what is there twice is entered once."""
        walk = _Walk()
        if self.part:
            yield from walk.find(_find_part(root, self.part), self.part)
        yield from walk.find(root)

    def is_inside(self, found: _Found) -> bool:
        """Return whether a tensor is in the part that is taken for the model."""
        return found.path[: len(self.part)] == self.part

    def describe(self, named: Sequence[Named]) -> TensorSpec:
        """Describe a storage."""
        name, first = named[0]
        stored = first if isinstance(first, Stored) else first.storage
        views = [_view_storage(value) for _, value in named]
        if any(view.storage != stored or view.dtype != views[0].dtype for view in views):
            raise FormatError(f"tensor '{shown(name)}' shares its storage with one of another type")
        member = self.member(stored, name)
        dtype = views[0].dtype
        size = member.nbytes // SIZES[dtype]
        for (its, _), view in zip(named, views, strict=True):
            _check_inside(its, view, size)
        whole = math.prod(views[0].shape) == size
        shape = views[0].shape if whole else (size,)
        plain = len(named) == 1 and whole and _is_plain(views[0])
        arrangement = "" if plain else _describe_arrangement(named, views, size)
        storage = Extent(member.offset if size else 0, member.nbytes)
        return TensorSpec(
            name, tuple(shape), dtype, self.byteorder, member.name, storage, "", arrangement
        )

    def member(self, stored: Stored, name: str) -> zips.Member:
        """Return where a storage lies, having compared the two places that tell its size."""
        member = self.records.get(f"data/{stored.key}")
        if member is None:
            raise FormatError(
                f"tensor '{shown(name)}' refers to the storage '{shown(stored.key)}', which is "
                "missing from the archive"
            )
        expected = stored.size * SIZES[stored.dtype]
        if member.nbytes != expected:
            raise FormatError(
                f"tensor '{shown(name)}' lies in a storage of {member.nbytes} bytes; "
                f"expected {expected}"
            )
        if member.method != zips.STORED:
            raise FormatError(
                f"tensor '{shown(name)}' is deflated, which torch.save does not do; save it again"
            )
        return member

    def leftover(self) -> None:
        """Add the storages that no dictionary leads to: attributes of tensors have some."""
        known = {spec.location for spec in (*self.tensors, *self.others)}
        for record, member in self.records.items():
            if record.startswith("data/") and member.name not in known:
                storage = Extent(member.offset, member.nbytes)
                self.others.append(
                    TensorSpec(member.name, (member.nbytes,), "opaque", "<", member.name, storage)
                )


def read_names(path: str, heartbeat: Heartbeat) -> set[str]:
    """Return the names of all tensors of a checkpoint, of tied ones too."""
    with zips.open_archive(path) as (file, members, _):
        content = zips.read_whole(file, _find_records(members)["data.pkl"])
        root = pickles.read(content, heartbeat, unknown={})
        return {"/".join(found.path) for found in _Walk().find(root)}


def list_views(request: tuple[str, str], heartbeat: Heartbeat) -> list[list[Any]]:
    """Return how every tensor of a checkpoint lies in its storage, tied ones under each name.

    Args:
        request: the file, and the key of the part that was taken for the model, or "".
        heartbeat: see `Format`.

    Returns:
        Name as in the table, member of the storage, first element, shape, and steps in elements.
    """
    path, key = request
    part = tuple(key.split("/")) if key else ()
    with zips.open_archive(path) as (file, members, _):
        records = _find_records(members)
        root = pickles.read(zips.read_whole(file, records["data.pkl"]), heartbeat, unknown={})
    found = []
    for one in _Walk().find(_find_part(root, part)):
        view = _view_storage(one.value)
        member = records.get(f"data/{view.storage.key}")
        if member is not None and one.holder is None:
            name = "/".join(one.path) or "tensor"
            found.append([name, member.name, view.offset, [*view.shape], [*view.stride]])
        heartbeat()
    return found


class _Found(NamedTuple):
    """A tensor in a pickle."""

    path: tuple[str, ...]  # the keys that lead to it
    owner: Owner
    value: Tensor | Stored
    holder: Instance | None = None  # the object that it can be reached through, if it is in one


def _find_part(root: Any, keys: tuple[str, ...]) -> Any:
    """Return what is under keys in the dictionaries of a pickle.

    Raises:
        FormatError: there is no such key; says which there are.
    """
    for depth, wanted in enumerate(keys, start=1):
        items = dict(_list_items(root)) if isinstance(root, (Pairs, Instance, list, tuple)) else {}
        if wanted not in items:
            some = ", ".join(f"'{shown(key, 40)}'" for key in [*items][:_MOST_KEYS])
            raise FormatError(
                f"has no '{shown('/'.join(keys[:depth]))}' that --key could choose; expected one "
                f"of {some or 'none, as it is no dictionary'}{word_rest(len(items) - _MOST_KEYS)}"
            )
        root = items[wanted]
    return root


def _suggest_keys(root: Pairs | Instance) -> str:
    """Return which keys of a dictionary hold state dicts, for an error; "" if none does."""
    found = []
    for key, value in root.items:
        if not (isinstance(key, str) and isinstance(value, (Pairs, Instance)) and value.items):
            continue
        tensors = all(isinstance(one, Tensor) for name, one in value.items if name != "__dict__")
        if tensors and not beside.find_owner((key,), value):
            found.append(f"--key {shown(key, 40)}")
    return f", such as {' or '.join(found[:_MOST_KEYS])}" if found else ""


class _Walk:
    """A walk through all that a pickle holds; what is there twice is entered once."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.inside: dict[bool, set[int]] = {True: set(), False: set()}  # the model's own or not

    def find(self, value: Any, path: tuple[str, ...] = (), owner: Owner = "") -> Iterator[_Found]:
        """Yield all tensors."""
        owner = owner or beside.find_owner(path, value)
        if owner == "run" and beside.is_running_mean(path, value):
            owner = ""
        if isinstance(value, (Tensor, Stored)):
            yield _Found(path, owner, value)
        elif isinstance(value, (Pairs, Instance, list, tuple)) and id(value) not in self.seen:
            self.seen.add(id(value))
            if len(path) == _MAXIMUM_DEPTH:
                raise FormatError(f"its dictionaries are nested more than {_MAXIMUM_DEPTH} deep")
            if isinstance(value, Instance):
                for hidden in find_inside(value, self.inside[owner == ""]):
                    yield _Found(path, owner, hidden, value)
            for key, item in _list_items(value):
                yield from self.find(item, (*path, key), owner)


def _list_items(value: Pairs | Instance | list[Any] | tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    """Yield what is in a container, each under its key or number in text."""
    for key, item in value.items if isinstance(value, (Pairs, Instance)) else ():
        plain = isinstance(key, (str, int, float, bool, type(None)))
        yield str(key) if plain else "?", item
    elements = value.elements if isinstance(value, Instance) else value
    for number, item in enumerate(() if isinstance(elements, Pairs) else elements):
        yield str(number), item


def _has_arrays(root: Any) -> bool:
    """Return whether there is an array of numpy in the dictionaries of a pickle."""
    waiting, seen = [root], set[int]()
    while waiting:
        value = waiting.pop()
        if isinstance(value, (Pairs, Instance, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, Instance) and value.of in _ARRAYS:
                return True
            waiting += [item for _, item in _list_items(value)]
    return False


def _refuse_hidden(found: _Found, holder: Instance) -> None:
    """Refuse a tensor of the model that can be reached only through an object."""
    where = f" at '{shown('/'.join(found.path))}'" if found.path else ""
    names = _list_keys(holder.state)
    if "_parameters" in names or holder.of.startswith("torch.nn.modules."):
        raise FormatError(
            f"holds a whole model with its classes ({shown(holder.of)}){where}, whose code is "
            "never run; if you trust its source, load it and torch.save(model.state_dict(), ...)"
        )
    raise FormatError(
        f"holds tensors inside an object{where} of the class '{shown(holder.of)}', whose code is "
        "never run, so what they mean is not known; save the state dict without that object"
    )


def _list_keys(state: Any) -> set[str]:
    """Return the names of an object's attributes."""
    if not isinstance(state, Pairs):
        return set()
    return {key for key, _ in state.items if isinstance(key, str)}


def _view_storage(value: Tensor | Stored) -> Tensor:
    """Return a bare storage as a view of itself."""
    if isinstance(value, Tensor):
        return value
    return Tensor(value, 0, (value.size,), (1,), value.dtype)


def _check_inside(name: str, view: Tensor, size: int) -> None:
    last = view.offset + sum(
        (n - 1) * step for n, step in zip(view.shape, view.stride, strict=True)
    )
    if 0 not in view.shape and last >= size:
        raise FormatError(
            f"tensor '{shown(name)}' reaches element {last} of a storage of {size}; it is damaged"
        )


def _is_plain(view: Tensor) -> bool:
    """Return whether a view of a whole storage is in C order; without elements, any order is."""
    if 0 in view.shape:
        return True
    expected = 1
    for n, step in zip(reversed(view.shape), reversed(view.stride), strict=True):
        if n > 1 and step != expected:
            return False
        expected *= n
    return True


def _describe_arrangement(named: Sequence[Named], views: Sequence[Tensor], size: int) -> str:
    """Return how tensors lie in a storage, so that it differs where they do."""
    parts = [
        f"{name} {view.shape} from {view.offset} by {view.stride}"
        for (name, _), view in zip(named, views, strict=True)
    ]
    text = f"{size} elements viewed as {'; '.join(parts)}"
    name = shown(text)
    if name != text:
        name += f" (SHA-256 {hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:16]})"
    return name


def _note_objects(names: Sequence[str]) -> dict[str, str]:
    """Return what to say of the objects that the pickle holds: they are carried unread."""
    if not names:
        return {}
    some = ", ".join(shown(name, 60) for name in names[:3])
    return {
        "objects": f"carried unread from the newest checkpoint: objects of {some}"
        f"{word_rest(len(names) - 3)}; like the checkpoints, the average opens with "
        "torch.load(..., weights_only=False), which runs their code"
    }


def _note_part(root: Any, part: str) -> dict[str, str]:
    """Return what to say of the part that was chosen, if it is not what its name says."""
    raw = beside.find_raw_part(root, part)
    if not raw:
        return {}
    return {
        "part": f"'{part}' is a running mean (EMA) of the weights in '{raw}': averaging running "
        f"means counts old steps several times; --key {raw} averages the weights themselves"
    }


# --- writing --------------------------------------------------------------------------------------


def _find_checksums(file: InputFile, rooms: Sequence[zips.Member]) -> list[list[Any]]:
    """Return name, offset and bytes of each averaged storage, and where its checksum stands.

    That is behind it where the writer did not know it before (bit 3, APPNOTE 4.3.9), with or
    without a signature.
    """
    try:
        with file.stream() as stream, zipfile.ZipFile(stream) as archive:
            infos = {info.filename: info for info in archive.infolist()}
    except OSError as error:
        raise make_read_error(error) from None
    found = []
    for member in rooms:
        info, place = infos[member.name], member.offset + member.stored
        if not info.flag_bits & 0x8:
            place = info.header_offset + 14
        elif file.read(place, 4) == b"PK\x07\x08":
            place += 4
        if file.read(place, 4) != struct.pack("<L", member.crc):
            raise FormatError(f"the member '{shown(member.name)}' has two different checksums")
        found.append([member.name, member.offset, member.nbytes, place])
    return found


def _drop_record(archive: zipfile.ZipFile, name: str) -> None:
    """Take the record of an average that was the template out of the list, and out of the way."""
    old = archive.NameToInfo.pop(name, None)
    if old:
        archive.filelist.remove(old)
        if all(info.header_offset < old.header_offset for info in archive.filelist):
            archive.start_dir = old.header_offset  # where `zipfile` appends


def _write_retyped(
    request: SkeletonRequest, specs: Mapping[str, TensorSpec], heartbeat: Heartbeat
) -> Draft:
    """Write a skeleton in which averaged storages have other types, and so other sizes.

    Args:
        request: see `Format.write_skeleton`.
        specs: location in the template -> its tensor.
        heartbeat: see `Format`.
    """
    source = request.template.files[0]
    wanted = {where.rpartition("/")[2]: to for where, to in request.averaged.items()}
    placements = {}
    with (
        zips.open_archive(source.path) as (file, members, _),
        zips.Archive(request.output) as archive,
    ):
        conversion.require_same(source.path, file.version, source.version)
        for member in heartbeat.over(members):
            folder, _, record = member.name.partition("/")
            if record == "data.pkl":
                content = retyping.retype(zips.read_whole(file, member), wanted, heartbeat)
                archive.add(member.name, content)
            elif member.name in request.averaged:
                dtype, spec = request.averaged[member.name], specs[member.name]
                nbytes = member.nbytes // SIZES[spec.dtype] * SIZES[dtype]
                offset = archive.reserve(member.name, nbytes, _ALIGNMENT)
                if nbytes:
                    placements[member.name] = Placement(offset, dtype, spec.byteorder)
            elif record not in (PROVENANCE, _VERSION):
                archive.copy(file, member, heartbeat, _ALIGNMENT)
        archive.add(f"{folder}/{PROVENANCE}", request.provenance.encode())
        return Draft(placements, notes={"archive": archive.describe()})


class TorchZip(Format):
    """The zip archives that `torch.save` writes."""

    key = "torch_zip"
    is_scattered = True
    name = "PyTorch"
    suffixes = (".pt", ".pth", ".bin", ".ckpt", ".pth.tar")
    recalculation = RUN_MODULE
    has_checksums = True
    can_be_left = True
    has_parts = True
    can_be_part = True
    dtypes = frozenset(FLOATS)
    retypes = frozenset(retyping.TYPES)

    def scan(self, request: ScanRequest, heartbeat: Heartbeat) -> Table:
        """See `Format.scan`."""
        with zips.open_archive(request.path) as (file, members, _):
            records = _find_records(members)
            part = tuple(request.key.split("/")) if request.key else ()
            table = _Collected(records, _read_byteorder(file, records), part=part)
            unknown: dict[str, None] = {}
            content = zips.read_whole(file, records["data.pkl"])
            root = pickles.read(content, heartbeat, unknown=unknown)
            table.fill(root, heartbeat)
            if request.with_optimizer:
                table.leftover()
            tensors = {spec.name: spec for spec in table.tensors}
            if len(tensors) < len(table.tensors):
                raise FormatError("two of its tensors have the same name")
            others = table.others if request.with_optimizer else ()
            return Table(
                path=Path(request.path),
                format=self.key,
                files=(),
                tensors=tensors,
                others={spec.name: spec for spec in others},
                optimizer=frozenset(table.optimizer),
                config="",
                is_polyak_output=PROVENANCE in records,
                about=_describe_origin(file, records, root) if request.with_optimizer else {},
                rules=OutputRules(
                    cautions=_note_objects([*unknown]) | _note_part(root, request.key),
                    is_fixed=True,
                    part=request.key,
                ),
                assets=vocabularies.find_in_pickle(root),
            )

    def write_skeleton(self, request: SkeletonRequest, heartbeat: Heartbeat) -> Draft:
        """See `Format.write_skeleton`."""
        specs = {spec.location: spec for spec in request.template.tensors.values()}
        if any(specs[where].dtype != dtype for where, dtype in request.averaged.items()):
            return _write_retyped(request, specs, heartbeat)
        with zips.open_archive(request.template.files[0].path) as (file, members, _):
            rooms = [m for m in members if m.name in request.averaged and m.nbytes]
            with LocalOutput(request.output) as target:
                copy_around(file, target, ((m.offset, m.stored) for m in rooms), heartbeat)
            placements = {
                m.name: Placement(m.offset, specs[m.name].dtype, specs[m.name].byteorder)
                for m in rooms
            }
            notes = {
                "checksums": _find_checksums(file, rooms),
                "record": f"{members[0].name.partition('/')[0]}/{PROVENANCE}",
                "provenance": request.provenance,
            }
            return Draft(placements, notes=notes)

    def finalize(self, output: str, draft: Draft) -> None:
        """See `Format.finalize`."""
        if "archive" in draft.notes:
            zips.finalize_archive(output, draft.notes["archive"])
            return
        with (
            LocalOutput(output) as file,
            file.stream() as stream,
            zipfile.ZipFile(stream, "a") as archive,
        ):
            written = file.reader()
            for name, offset, nbytes, place in draft.notes["checksums"]:
                info = archive.getinfo(name)
                info.CRC = zips.compute_crc32(written, offset, nbytes)
                file.write(place, struct.pack("<L", info.CRC))
            _drop_record(archive, draft.notes["record"])
            info = zipfile.ZipInfo(draft.notes["record"], (1980, 1, 1, 0, 0, 0))
            info.create_system = 3
            archive.writestr(info, draft.notes["provenance"])

    def read_metric(self, path: str, heartbeat: Heartbeat) -> tuple[str, float] | None:
        """See `Format.read_metric`."""
        with zips.open_archive(path) as (file, members, _):
            content = zips.read_whole(file, _find_records(members)["data.pkl"])
            return beside.find_metric(pickles.read(content, heartbeat, unknown={}))

    def read_number(self, path: str, key: str, heartbeat: Heartbeat) -> float | None:
        """See `Format.read_number`."""
        with zips.open_archive(path) as (file, members, _):
            content = zips.read_whole(file, _find_records(members)["data.pkl"])
            return beside.find_number(pickles.read(content, heartbeat, unknown={}), key)

    def check(self, path: str, heartbeat: Heartbeat, later: int | None = None) -> list[Checksum]:
        """See `Format.check`."""
        return zips.check(path, heartbeat, later)

    def texts(self, table: Table, heartbeat: Heartbeat) -> dict[str, str]:
        """See `Format.texts`: what it says is Python's, and only names can leave it.

        The versions of modules that a state dict has besides stay behind, as in PyTorch's own
        safetensors files.
        """
        with zips.open_archive(table.files[0].path) as (file, members, _):
            content = zips.read_whole(file, _find_records(members)["data.pkl"])
            root = pickles.read(content, heartbeat, unknown={})
        if table.rules.part:
            root = _find_part(root, tuple(table.rules.part.split("/")))
        if not isinstance(root, (Pairs, Instance)):
            raise OutputError("is not a state dict, so its tensors have no names")
        for key, value in root.items:
            if not isinstance(key, str) or (key != "__dict__" and not isinstance(value, Tensor)):
                named = shown(key, 40) if isinstance(key, (str, int, float)) else "?"
                raise OutputError(
                    f"has '{named}' beside or around its tensors, which would be lost; choose "
                    f"the state dict in it with --key{_suggest_keys(root)}"
                )
        return {"format": "pt"}

    def is_polyak_output(self, path: str, heartbeat: Heartbeat) -> bool:
        """See `Format.is_polyak_output`."""
        heartbeat()
        try:
            with zips.open_archive(path) as (_, members, _):
                return any(member.name.partition("/")[2] == PROVENANCE for member in members)
        except FormatError:
            return False
