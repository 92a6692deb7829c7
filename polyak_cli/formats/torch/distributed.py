"""Distributed checkpoints of PyTorch (DCP): a folder of `.metadata` and of parts, one a process.

`dcp_metadata` says which block of which tensor lies in which part, and `dcp_parts` where exactly.
A tensor in several blocks is a `Grid`, so that checkpoints of other numbers of processes average
with one another.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from polyak_cli.errors import FormatError, shown, word_size
from polyak_cli.formats import conversion, zips
from polyak_cli.formats.folder_records import read_record
from polyak_cli.formats.format import RUN_MODULE, Draft, Format, ScanRequest, SkeletonRequest
from polyak_cli.formats.torch import beside, dcp_metadata, dcp_trimming
from polyak_cli.formats.torch.beside import Owner
from polyak_cli.formats.torch.dcp_metadata import Block, BytesItem, Stored, TensorItem
from polyak_cli.formats.torch.dcp_parts import Piece, PieceReader
from polyak_cli.formats.torch.pickles import SIZES, Pairs
from polyak_cli.processes.sandbox import Heartbeat
from polyak_cli.storage import File, InputFile, open_input
from polyak_cli.storage.local import LocalOutput, copy_around, copy_range, name_errors
from polyak_cli.tensors import (
    FLOATS,
    Checksum,
    Extent,
    Grid,
    GridPart,
    KerasFacts,
    OutputRules,
    Placement,
    Storage,
    Table,
    TensorSpec,
)

#: What modules keep beside their tensors; Megatron appends which shard it is.
_EXTRA = re.compile(r"(.*\.)?_extra_state(/.*)?", re.DOTALL)
#: Keys that lead to a program's optimizer, where they were joined before they were saved.
_FLAT = re.compile(
    r"(.*\.)?(\w+_)?opt(im(izer)?)?s?\.(state|param_groups|distributed)\..*", re.DOTALL
)
#: An EMA that torchtitan keeps in the state of an optimizer of its own, beside the real one.
_EMA = re.compile(r"\w*ema\w*\.state\.(.+)\.ema_params", re.DOTALL)
_DEEPEST = 64

Item = TensorItem | BytesItem


class _Items(NamedTuple):
    """The items of a checkpoint, sorted by what they belong to, each kind in its order."""

    metadata: File
    model: Sequence[TensorItem]
    kept: Sequence[BytesItem]  # of the model, in bytes
    state: Sequence[Item]  # of the optimizer, and whatever else is the training run's


# --- scanning -------------------------------------------------------------------------------------


def _read_items(path: str, heartbeat: Heartbeat) -> _Items:
    """Read the metadata of a checkpoint."""
    with open_input(path) as file, name_errors(path):
        if file.size > zips.WHOLE:
            raise FormatError(
                f"has {word_size(file.size)}; expected at most {word_size(zips.WHOLE)}"
            )
        tensors, others = dcp_metadata.read(file.read(0, file.size), heartbeat)
        version = file.version
    model: list[TensorItem] = []
    kept: list[BytesItem] = []
    state: list[Item] = []
    parts = {item.path[0] for item in tensors if len(item.path) > 1}
    for item, owner in heartbeat.over(_find_owners([*tensors, *others])):
        if owner:
            state.append(item)
        elif isinstance(item, TensorItem):
            model.append(item)
        elif _EXTRA.fullmatch(item.name) or (len(item.path) > 1 and item.path[0] in parts):
            kept.append(item)
        else:
            state.append(item)
    return _Items(File(path, version), model, kept, state)


def _refuse_other_items(items: _Items) -> None:
    """Refuse a checkpoint without a tensor of a model, such as that of an optimizer."""
    if items.model:
        return
    path = shown(items.metadata.path)
    dictionaries = [item for item in items.state if item.path == (item.name,)]
    if dictionaries and all(isinstance(item, BytesItem) for item in items.state):
        raise FormatError(
            f"{path}: holds no tensor, but '{shown(dictionaries[0].name)}' in bytes; save it with "
            "a planner that flattens the state dict, as the default one does"
        )
    raise FormatError(f"{path}: holds the state of an optimizer or of a run; expected a model's")


def _find_owners(items: Sequence[Item]) -> Iterator[tuple[Item, Owner]]:
    """Yield each item with its owner; see `beside`."""
    for item in items:
        if len(item.path) > _DEEPEST:
            raise FormatError(f"its dictionaries are nested more than {_DEEPEST} deep")
    yield from _walk(items, (), "")


def _walk(
    items: Sequence[Item], path: tuple[str, ...], owner: Owner
) -> Iterator[tuple[Item, Owner]]:
    """Yield the items under a path, as if their dictionaries were there."""
    depth = len(path)
    below: dict[str, list[Item]] = {}
    for item in items:
        if len(item.path) == depth:
            is_slot = (
                bool(_FLAT.fullmatch(item.name)) or item.name.rpartition(".")[2] in beside.SLOTS
            )
            yield item, owner or beside.find_owner(path, item) or ("optimizer" if is_slot else "")
        else:
            below.setdefault(item.path[depth], []).append(item)
    owner = owner or beside.find_owner(path, Pairs([(key, None) for key in below]))
    for key, inner in below.items():
        yield from _walk(inner, (*path, key), owner)


def _find_emas(items: _Items) -> dict[str, list[str]]:
    """Return each EMA that an optimizer keeps, with the tensors of the model that it may be of."""
    model = {item.name for item in items.model}
    found = {}
    for item in items.state:
        match = _EMA.fullmatch(item.name)
        if match and isinstance(item, TensorItem):
            # Programs save the model by itself, or under a key.
            found[item.name] = [name for name in (match[1], f"model.{match[1]}") if name in model]
    return found


def _list_places(items: _Items) -> Iterator[Stored]:
    """Yield where each item and block lies."""
    for item in itertools.chain(items.model, items.kept, items.state):
        if isinstance(item, BytesItem):
            yield item.stored
        else:
            yield from (block.stored for block in item.blocks)


def _refuse_shared(items: _Items) -> None:
    """Refuse items and blocks of which two lie in the same bytes."""
    places = sorted(_list_places(items))
    for one, other in itertools.pairwise(places):
        if one.file == other.file and one.offset + one.nbytes > other.offset:
            raise FormatError(
                f"{shown(items.metadata.path)}: two items lie at offset {other.offset} of "
                f"{shown(other.file)}; it is damaged or hostile"
            )


class _Parts:
    """The parts of a checkpoint, and what their archives say of the blocks that were asked for."""

    def __init__(self, items: _Items, heartbeat: Heartbeat) -> None:
        self.folder = Path(items.metadata.path).parent
        self.heartbeat = heartbeat
        self.names = sorted({place.file for place in _list_places(items)})
        _refuse_shared(items)
        self.numbers = {name: number for number, name in enumerate(self.names)}
        self.files: list[File] = []
        self.sizes: dict[str, int] = {}
        for name in heartbeat.over(self.names):
            path = str(self.folder / name)
            with open_input(path) as file:
                self.files.append(File(path, file.version))

    def restrict(self, names: Collection[str]) -> None:
        """Forget all parts but these."""
        kept = [(name, self.files[self.numbers[name]]) for name in self.names if name in names]
        self.names = [name for name, _ in kept]
        self.files = [file for _, file in kept]
        self.numbers = {name: number for number, name in enumerate(self.names)}

    def read(self, tensors: Sequence[TensorItem]) -> dict[Stored, Piece]:
        """Read the archives of tensors, each part from its beginning to its end."""
        owners = {block.stored: item for item in tensors for block in item.blocks}
        reader = PieceReader(self.heartbeat)
        pieces = {}
        for name, places in itertools.groupby(sorted(owners), key=lambda place: place.file):
            with self.open(name) as file:
                for place in places:
                    with _naming(file, owners[place]):
                        pieces[place] = reader.read(file, place.offset, place.nbytes)
        return pieces

    def open(self, name: str) -> InputFile:
        """Open a part, checked to be the one that was seen first."""
        return open_input(*self.files[self.numbers[name]])

    def describe_bytes(self, item: BytesItem) -> TensorSpec:
        """Describe an item that is not looked into."""
        name, offset, nbytes = item.stored
        number = self.numbers[name]
        file = self.files[number]
        if offset + nbytes > file.version.size:
            raise FormatError(
                f"{shown(file.path)}: '{shown(item.name)}' lies outside the file; it is truncated, "
                "or metadata and parts come from different saves"
            )
        where = Extent(offset, nbytes, number)
        return TensorSpec(item.name, (nbytes,), "opaque", "<", item.name, where)

    def describe(self, item: TensorItem, pieces: Mapping[Stored, Piece]) -> TensorSpec:
        """Describe a tensor whose archives were read."""
        found = [pieces[block.stored] for block in item.blocks]
        for block, piece in zip(item.blocks, found, strict=True):
            with _naming(self.files[self.numbers[block.stored.file]], item):
                _check_piece(item, block, piece)
        orders = {piece.byteorder for piece in found}
        if len(orders) > 1:
            raise FormatError(
                f"{shown(self.folder)}: tensor '{shown(item.name)}' has blocks of both byte orders"
            )
        order = _find_order(item, found)
        if order is None:
            raise FormatError(
                f"{shown(self.folder)}: the blocks of tensor '{shown(item.name)}' have their "
                "elements in different orders; save tensor.contiguous()"
            )
        arrangement = ""
        if order != tuple(range(len(order))):
            arrangement = f"the order of its dimensions {order}"
        storage = self._place(item, found, order)
        return TensorSpec(
            item.name,
            item.shape,
            item.dtype,
            orders.pop() if orders else "<",
            item.name,
            storage,
            "",
            arrangement,
        )

    def _place(self, item: TensorItem, pieces: Sequence[Piece], order: Sequence[int]) -> Storage:
        """Return where the elements of a tensor lie, dimensions in the order of the archives."""

        def arrange(sizes: Sequence[int]) -> tuple[int, ...]:
            return tuple(sizes[k] for k in order)

        extents = [
            Extent(piece.offset, piece.nbytes, self.numbers[block.stored.file])
            for block, piece in zip(item.blocks, pieces, strict=True)
        ]
        if len(extents) <= 1:
            return extents[0] if extents else Extent(0, 0)
        parts = tuple(
            GridPart(arrange(block.start), arrange(block.shape), extent)
            for block, extent in zip(item.blocks, extents, strict=True)
        )
        return Grid(arrange(item.shape), SIZES[item.dtype], parts)


def _check_piece(item: TensorItem, block: Block, piece: Piece) -> None:
    """Refuse an archive that holds another tensor than the metadata say."""
    view = piece.tensor
    if view.dtype != item.dtype or view.shape != block.shape:
        raise FormatError(
            f"is {view.dtype} of shape {view.shape} in its archive, but {item.dtype} of shape "
            f"{block.shape} in the metadata; they come from different saves"
        )
    size = math.prod(view.shape)
    if view.offset or piece.nbytes != size * SIZES[view.dtype]:
        raise FormatError(
            f"has {size} elements in a storage of {piece.nbytes} bytes; expected a storage of its "
            "own"
        )


def _find_order(item: TensorItem, pieces: Sequence[Piece]) -> tuple[int, ...] | None:
    """Return the order of dimensions, outermost first, in which all blocks keep their elements."""
    plain = tuple(range(len(item.shape)))
    views = [piece.tensor for piece in pieces]
    orders = [plain]
    for view in views:
        # A dimension of one element may have any stride.
        strides = view.stride
        orders.append(tuple(sorted(plain, key=lambda k: (-strides[k], k))))
    for order in dict.fromkeys(orders):
        if all(_is_in_order(view.shape, view.stride, order) for view in views):
            return order
    return None


def _is_in_order(shape: Sequence[int], stride: Sequence[int], order: Sequence[int]) -> bool:
    """Return whether elements follow one another if dimensions are taken in an order."""
    expected = 1
    for k in reversed(order):
        if shape[k] > 1 and stride[k] != expected:
            return False
        expected *= shape[k]
    return True


@contextlib.contextmanager
def _naming(file: InputFile | File, item: Item) -> Iterator[None]:
    """Put the names of a part and of a tensor in front of errors."""
    try:
        yield
    except FormatError as error:
        name = file.path if isinstance(file, File) else file.name
        raise FormatError(f"{shown(name)}: tensor '{shown(item.name)}' {error}") from None


# --- writing --------------------------------------------------------------------------------------


def _move(piece: Piece, distance: int) -> Piece:
    """Return a block that lies further on in its part."""
    one, other = piece.crc_places
    places = one + distance, other + distance
    return piece._replace(offset=piece.offset + distance, crc_places=places)


def _copy_parts(
    parts: _Parts,
    pieces: Mapping[Stored, Piece],
    moves: Mapping[Stored, Stored],
    folder: Path,
    heartbeat: Heartbeat,
) -> tuple[list[str], list[list[Any]]]:
    """Copy the parts into a folder, except the values of blocks.

    Args:
        parts: of the template.
        pieces: the blocks whose values are left out.
        moves: where the items that are copied lie -> where they are to lie; none copies all.
        folder: of the output.
        heartbeat: called after each block.

    Returns:
        The files, and for each block the file, offset and bytes of its values and where their
        checksum stands.
    """
    written, checksums = [], []
    for name in parts.names:
        target = str(folder / name)
        # The items of one part, each with the block in it if its values are left out.
        own = sorted(place for place in moves or pieces if place.file == name)
        with (
            parts.open(name) as source,
            name_errors(source.name),
            LocalOutput(target, create=True) as output,
        ):
            if moves:
                for place in heartbeat.over(own):
                    _copy_item(source, output, place, moves[place].offset, pieces.get(place))
            else:
                found = sorted((pieces[place] for place in own), key=lambda piece: piece.offset)
                copy_around(source, output, ((one.offset, one.nbytes) for one in found), heartbeat)
            for place in heartbeat.over(own):
                if place in pieces:
                    _check_crc(source, pieces[place])
                    distance = moves[place].offset - place.offset if moves else 0
                    moved = _move(pieces[place], distance)
                    checksums.append([target, moved.offset, moved.nbytes, list(moved.crc_places)])
        written.append(target)
    return written, checksums


def _check_crc(source: InputFile, piece: Piece) -> None:
    """Refuse a block whose checksum stands in two places that differ."""
    if len({source.read(place, 4) for place in piece.crc_places}) > 1:
        raise FormatError(
            f"the archive of the block at byte {piece.offset} has two different checksums"
        )


def _copy_item(
    source: InputFile, output: LocalOutput, place: Stored, to: int, piece: Piece | None
) -> None:
    """Copy an item to an offset, except the values of a block."""
    distance, done = to - place.offset, place.offset
    if piece:
        copy_range(source, done, output, to, piece.offset - done)
        done = piece.offset + piece.nbytes
    end = place.offset + place.nbytes
    copy_range(source, done, output, done + distance, end - done)


def _place(spec: TensorSpec) -> Placement:
    """Return where the values of a tensor belong: where the template has them."""
    if isinstance(spec.storage, Grid):
        return Placement(0, spec.dtype, spec.byteorder, 0, spec.storage)
    if not isinstance(spec.storage, Extent):
        raise AssertionError(f"{spec.name} has no extent")
    return Placement(spec.storage.offset, spec.dtype, spec.byteorder, spec.storage.file)


class DistributedCheckpoint(Format):
    """The folders that `torch.distributed.checkpoint.save` writes."""

    key = "torch_dcp"
    name = "PyTorch DCP"
    suffixes = ()
    recalculation = RUN_MODULE
    has_checksums = True
    can_be_folder = True
    carries_all = True
    can_be_trimmed = True
    can_be_left = True
    dtypes = frozenset(FLOATS)

    def scan(self, request: ScanRequest, heartbeat: Heartbeat) -> Table:
        """See `Format.scan`."""
        items = _read_items(request.path, heartbeat)
        _refuse_other_items(items)
        parts = _Parts(items, heartbeat)
        record = read_record(Path(request.path).parent)
        wanted = [*items.model]
        if request.with_optimizer:
            wanted += [item for item in items.state if isinstance(item, TensorItem)]
        pieces = parts.read(wanted)
        tensors = {item.name: parts.describe(item, pieces) for item in heartbeat.over(items.model)}
        others: dict[str, TensorSpec] = {}
        for item in heartbeat.over([*items.kept, *items.state] if request.with_optimizer else ()):
            if isinstance(item, BytesItem):
                others[item.name] = parts.describe_bytes(item)
            else:
                others[item.name] = parts.describe(item, pieces)
        return Table(
            path=Path(request.path),
            format=self.key,
            files=(*parts.files, items.metadata),
            tensors=tensors,
            others=others,
            optimizer=frozenset(item.name for item in items.state),
            config="",
            is_polyak_output=bool(record),
            about={"provenance": record} if record else {},
            keras=KerasFacts(ema_slots=_find_emas(items)),
            rules=OutputRules(is_fixed=True),
        )

    def check(self, path: str, heartbeat: Heartbeat, later: int | None = None) -> list[Checksum]:
        """See `Format.check`; of the model's own tensors, as others are not averaged."""
        left = []
        items = _read_items(path, heartbeat)
        parts = _Parts(items, heartbeat)
        owners = {block.stored: item for item in items.model for block in item.blocks}
        pieces = parts.read(items.model)
        for name, places in itertools.groupby(sorted(pieces), key=lambda place: place.file):
            with parts.open(name) as file:
                for place in places:
                    piece = pieces[place]
                    damaged = (
                        f"tensor '{shown(owners[place].name)}' has a wrong checksum: the data are "
                        "damaged"
                    )
                    if later is not None and piece.nbytes >= later:
                        where = piece.offset, piece.nbytes
                        if piece.crc:
                            left.append(Checksum(file.name, *where, piece.crc, "crc32", damaged))
                        continue
                    found = zips.compute_crc32(file, piece.offset, piece.nbytes, heartbeat)
                    # Programs may have saved it without checksums; then all of them are 0.
                    if piece.crc not in (0, found):
                        raise FormatError(f"{shown(file.name)}: {damaged}")
        return left

    def texts(self, table: Table, heartbeat: Heartbeat) -> dict[str, str]:
        """See `Format.texts`."""
        del table
        heartbeat()
        return {"format": "pt"}

    def write_skeleton(self, request: SkeletonRequest, heartbeat: Heartbeat) -> Draft:
        """See `Format.write_skeleton`."""
        scanned = request.template.files
        items = _read_items(scanned[-1].path, heartbeat)
        parts = _Parts(items, heartbeat)
        for found, file in zip((*parts.files, items.metadata), scanned, strict=True):
            conversion.require_same(found.path, found.version, file.version)
        averaged = [item for item in items.model if item.name in request.averaged]
        pieces = parts.read(averaged)
        trimmed, moves = b"", dict[Stored, Stored]()
        if request.drop_optimizer:
            names = {one.name for one in items.model} | {one.name for one in items.kept}
            with open_input(*scanned[-1]) as source, name_errors(source.name):
                content = source.read(0, source.size)
                files = {place.file for place in _list_places(items._replace(state=()))}
                trimmed, moves = dcp_trimming.trim(content, names, files, heartbeat)
            parts.restrict(files)
        written, checksums = _copy_parts(parts, pieces, moves, Path(request.output), heartbeat)
        target = str(Path(request.output, Path(scanned[-1].path).name))
        with open_input(*scanned[-1]) as source, LocalOutput(target, create=True) as output:
            if trimmed:
                output.write(0, trimmed)
            else:
                copy_around(source, output, (), heartbeat)
        pieces |= {
            at: _move(pieces[at], to.offset - at.offset) for at, to in moves.items() if at in pieces
        }
        placements = {}
        for item in heartbeat.over(averaged):
            spec = parts.describe(item, pieces)
            if spec.size:
                placements[item.name] = _place(spec)
        return Draft(placements, [*written, target], {"checksums": checksums})

    def finalize(self, output: str, draft: Draft) -> None:
        """See `Format.finalize`."""
        del output
        for path, rows in itertools.groupby(draft.notes["checksums"], key=lambda row: row[0]):
            with LocalOutput(path) as file:
                for _, offset, nbytes, places in rows:
                    found = struct.pack("<L", zips.compute_crc32(file.reader(), offset, nbytes))
                    for place in places:
                        file.write(place, found)

    def is_polyak_output(self, path: str, heartbeat: Heartbeat) -> bool:
        """See `Format.is_polyak_output`."""
        heartbeat()
        return bool(read_record(Path(path).parent))
