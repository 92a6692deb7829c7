"""Give storages other types in the pickle of `torch.save`, which is edited and never rebuilt.

A storage has its type in one place, the class in its persistent id.  That class is named there or
fetched from the memo, and both are replaced by the plain name of a class.  All else in the pickle
stays as it is, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from polyak_cli.errors import FormatError, shown
from polyak_cli.formats.torch import pickles
from polyak_cli.processes.sandbox import Heartbeat

#: The types that have a class of storages; of all others, each tensor names the type itself.
TYPES: Mapping[str, str] = {
    "float64": "torch.DoubleStorage",
    "float32": "torch.FloatStorage",
    "float16": "torch.HalfStorage",
    "bfloat16": "torch.BFloat16Storage",
}
_WAY_OUT = "leave out --dtype, or give the output a name in .safetensors"
#: Opcodes of protocol 4 and later, where the lengths of frames and the numbers of the memo go by
#: the opcodes before them.  `torch.save` uses protocol 2.
_LATER = {"FRAME", "MEMOIZE", "STACK_GLOBAL", "SHORT_BINUNICODE", "BINUNICODE8"}
_FETCHES = {"BINGET": 2, "LONG_BINGET": 5}  # with the bytes of the opcode and its argument
_PUTS = ("BINPUT", "LONG_BINPUT")
_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1")


@dataclass(slots=True)
class _Push:
    """An opcode that pushes one value: a text, a number, or the name of a class of storages."""

    start: int
    stop: int
    value: Any
    new: str = ""  # the class to name in its place, if it pushes one


def retype(content: bytes, wanted: Mapping[str, str], heartbeat: Heartbeat) -> bytes:
    """Return a pickle in which some storages have other types.

    Args:
        content: a pickle that `pickles.read` has read.
        wanted: key of a storage -> its type, one of `TYPES`.
        heartbeat: called every few hundred opcodes.

    Raises:
        FormatError: a storage is named in a way that `torch.save` does not use.
    """
    editor = _Editor(wanted)
    with pickles.without_warnings():
        for name, argument, place in heartbeat.over(pickles.list_opcodes(content)):
            editor.take(name, argument, place)
    missing = sorted(wanted.keys() - editor.found)
    if missing:
        raise FormatError(f"its pickle does not name the storage '{shown(missing[0])}'; {_WAY_OUT}")
    return b"".join(_replace(content, editor.classes))


def _replace(content: bytes, classes: list[_Push]) -> Iterator[bytes]:
    """Yield a pickle in pieces, where every push of a class is a name and no fetch from the memo.

    The memo may hold another class than before, so nothing must fetch one.
    """
    done = 0
    for push in classes:
        yield content[done : push.start]
        module, _, name = push.new.rpartition(".")
        yield f"c{module}\n{name}\n".encode()
        done = push.stop
    yield content[done:]


@dataclass(slots=True)
class _Editor:
    """Finds where classes of storages are pushed, and changes those of the storages wanted."""

    wanted: Mapping[str, str]
    found: set[str] = field(default_factory=set)
    classes: list[_Push] = field(default_factory=list)  # all pushes of one, in order
    memo: dict[int, _Push] = field(default_factory=dict)
    last: _Push | None = None  # what the opcode before has pushed
    group: list[_Push] | None = None  # pushed since the last mark, if nothing else was done
    closed: list[_Push] | None = None  # the tuple on the top of the stack

    def take(self, name: str, argument: Any, place: int) -> None:
        """Take one opcode."""
        if name in _LATER or (name == "PROTO" and argument > 2):
            raise FormatError(
                f"its pickle is of protocol 4 or later, which --dtype cannot change; {_WAY_OUT}"
            )
        if name in _PUTS:  # which leaves the stack as it is
            self.put(argument)
            return
        closed, self.closed = self.closed, None
        if name == "BINPERSID":
            self.change(closed or [])
        self.last = self.find_push(name, argument, place)
        if self.last is not None:
            if self.last.new:
                self.classes.append(self.last)
            if self.group is not None:
                self.group.append(self.last)
        elif name == "TUPLE":
            self.closed, self.group = self.group, None
        else:
            self.group = [] if name == "MARK" else None

    def put(self, index: int) -> None:
        """Note what the memo holds under a number, or that it is nothing of interest."""
        if self.last is None:
            self.memo.pop(index, None)
        else:
            self.memo[index] = self.last

    def find_push(self, name: str, argument: Any, place: int) -> _Push | None:
        """Return what an opcode pushes; None if it is nothing of interest."""
        if name == "GLOBAL":
            full = str(argument).replace(" ", ".", 1)
            stop = place + len(str(argument).encode()) + 2
            return _Push(place, stop, full, full if full in pickles.STORAGES else "")
        if name in _FETCHES:
            known = self.memo.get(argument)
            if known is None:
                return None
            same = known.value if known.new else ""
            return _Push(place, place + _FETCHES[name], known.value, same)
        if name == "BINUNICODE" or name in _NUMBERS:
            return _Push(place, place, argument)
        return None

    def change(self, pushed: list[_Push]) -> None:
        """Give the storage of a persistent id its new type, if it is one of those wanted."""
        match pushed:
            case [_Push(value="storage"), one, _Push(value=str(key)), _, _] if one.new:
                if key in self.wanted:
                    if one.value not in TYPES.values():
                        raise FormatError(
                            f"the storage '{shown(key)}' has no type of its own; {_WAY_OUT}"
                        )
                    one.new = TYPES[self.wanted[key]]
                    self.found.add(key)
            case _:
                raise FormatError(
                    "its pickle names a storage in a way that torch.save does not; " + _WAY_OUT
                )
