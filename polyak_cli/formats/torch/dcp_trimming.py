"""Write the `.metadata` of a distributed checkpoint (DCP) for a part of its items.

What `dcp_metadata` read is written as it was, with the classes of the program that saved it, and
without the items that are left out.  The others lie one behind the other in the same parts.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from polyak_cli.errors import FormatError, shown
from polyak_cli.formats.torch.dcp_metadata import Stored, read_root
from polyak_cli.formats.torch.pickles import Instance, Name, Pairs
from polyak_cli.processes.sandbox import Heartbeat

#: What Megatron keeps to plan the next save; it names all items, and may be missing.
_PLANS = "all_local_plans"
#: Attributes whose keys are the names of items.
_BY_NAME = ("state_dict_metadata", "planner_data", "mcore_data")
#: From here on a number needs an opcode with its length.
_INT = 1 << 31
#: Values in values, and bytes for each byte that was read: what is fetched from the memo again and
#: again is written as often.
_DEEPEST, _GROWTH = 32, 16


def trim(
    content: bytes, names: Collection[str], files: Collection[str], heartbeat: Heartbeat
) -> tuple[bytes, dict[Stored, Stored]]:
    """Return the metadata of some of a checkpoint's items.

    Args:
        content: the metadata of all items, which `dcp_metadata.read` has read.
        names: of the items that stay.
        files: the parts that they lie in.  Empty blocks in others are left out: nothing reads them.
        heartbeat: called every few hundred items.

    Returns:
        The metadata, and where the items lay -> where they lie.

    Raises:
        FormatError: items overlap, or the metadata hold what cannot be written again.
    """
    root = read_root(content, heartbeat)
    kept: list[tuple[Any, Any]] = []
    moves: dict[Stored, Stored] = {}
    for key, value in _read_attributes(root).items():
        if key == "storage_data":
            found = [(pair, _read_place(pair[1])) for pair in value.items if _is_of(pair, names)]
            found = [(pair, place) for pair, place in found if place.file in files]
            moves = _pack(place for _, place in found)
            value = Pairs([_move(pair, moves[place]) for pair, place in heartbeat.over(found)])
        elif key in _BY_NAME and isinstance(value, Pairs):
            value = Pairs([(k, v) for k, v in value.items if isinstance(k, str) and k in names])
        if key != _PLANS:
            kept.append((key, value))
    writer = _Writer(heartbeat, _GROWTH * len(content))
    written = writer.write(Instance(root.of, root.arguments, Pairs(kept)))
    return b"".join((b"\x80\x02", *written, b".")), moves


def _read_attributes(value: Instance) -> dict[str, Any]:
    """Return the attributes of an object; a stranger's other keys need not be hashable."""
    return {key: item for key, item in value.state.items if isinstance(key, str)}


def _is_of(pair: tuple[Any, Any], names: Collection[str]) -> bool:
    """Return whether a place is that of one of the items, or of one of their blocks."""
    return _read_attributes(pair[0])["fqn"] in names


def _read_place(info: Instance) -> Stored:
    said = _read_attributes(info)
    return Stored(said["relative_path"], said["offset"], said["length"])


def _move(pair: tuple[Any, Any], to: Stored) -> tuple[Any, Any]:
    """Return a place that lies elsewhere in its part."""
    index, info = pair
    said = _read_attributes(info) | {"offset": to.offset}
    return index, Instance(info.of, info.arguments, Pairs([*said.items()]))


def _pack(places: Iterable[Stored]) -> dict[Stored, Stored]:
    """Return a mapping: where items lie -> where they lie without gaps.

    Empty blocks are among them, of which nothing else is known: those that share bytes with other
    items could make a large output of a small input.
    """
    moves: dict[Stored, Stored] = {}
    for _, group in itertools.groupby(sorted({*places}), key=lambda place: place.file):
        end = last = 0
        for place in group:
            if place.offset < last:
                raise FormatError(
                    f"two items lie at offset {place.offset} of {shown(place.file)}; the metadata "
                    "are damaged or hostile"
                )
            moves[place] = place._replace(offset=end)
            end, last = end + place.nbytes, place.offset + place.nbytes
    return moves


def _refuse() -> FormatError:
    return FormatError("its metadata hold what cannot be written again; leave out --only-weights")


class _Writer:
    """Turns inert values into the opcodes of protocol 2."""

    def __init__(self, heartbeat: Heartbeat, budget: int) -> None:
        self.heartbeat = heartbeat
        self.budget = budget  # bytes that may still be written
        self.known: dict[str, bytes] = {}  # name of a class -> the opcode that fetches it

    def write(self, value: Any, depth: int = 0) -> Iterator[bytes]:
        """Yield the opcodes that push a value; classes are only named.

        Raises:
            FormatError: there are no opcodes for it here, or far more than there were.
        """
        self.budget -= 1
        if depth > _DEEPEST or self.budget < 0:
            raise _refuse()
        match value:
            case None | False | True:
                yield {None: b"N", False: b"\x89", True: b"\x88"}[value]
            case int():
                yield self._count(_write_number(value))
            case str():
                text = value.encode("utf-8", "surrogatepass")
                yield self._count(b"X" + struct.pack("<L", len(text)) + text)
            case tuple():
                yield from self._write_all(b"(", value, b"t", depth)
            case list():
                yield from self._write_all(b"](", value, b"e", depth)
            case Pairs(items):
                flat = (one for pair in items for one in pair)
                yield from self._write_all(b"}(", flat, b"u", depth)
            case Name(full):
                yield self._count(self._name(full))
            case Instance(of, arguments, state, (), ()):
                yield from self._write_object(of, arguments, state, depth)
            case _:
                raise _refuse()

    def _count(self, opcodes: bytes) -> bytes:
        self.budget -= len(opcodes)
        return opcodes

    def _write_all(
        self, before: bytes, values: Iterable[Any], after: bytes, depth: int
    ) -> Iterator[bytes]:
        yield before
        for value in self.heartbeat.over(values):
            yield from self.write(value, depth + 1)
        yield after

    def _write_object(
        self, of: str, arguments: tuple[Any, ...], state: Any, depth: int
    ) -> Iterator[bytes]:
        """Yield what makes an object: dataclasses get attributes only, all others arguments."""
        yield self._count(self._name(of))
        if arguments:
            yield from self._write_all(b"(", arguments, b"tR", depth)
        else:
            yield b")\x81"
        if state is not None:
            yield from self.write(state, depth + 1)
            yield b"b"

    def _name(self, full: str) -> bytes:
        if full in self.known:
            return self.known[full]
        place = struct.pack("<L", len(self.known))
        self.known[full] = b"j" + place
        module, _, name = full.rpartition(".")
        return f"c{module}\n{name}\n".encode() + b"r" + place


def _write_number(number: int) -> bytes:
    if -_INT <= number < _INT:
        return b"J" + struct.pack("<l", number)
    content = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content
