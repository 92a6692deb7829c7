"""The pickle of a state dict, read into inert values: nothing is imported, called or executed.

An interpreter of the opcodes that `torch.save` writes.  A global becomes its bare name, and a call
becomes a note of what was to be called.  A name that is not known is refused, or noted like any
other where the caller carries the pickle as it is; one that only runs code is refused anywhere.
Python's own unpickler has no part in this: `pickletools` only cuts the bytes into opcodes.
"""

from __future__ import annotations

import contextlib
import pickletools
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Never

from polyak_cli.errors import FormatError, shown
from polyak_cli.processes.sandbox import Heartbeat

#: Opcodes of a pickle; 100,000 tensors need some three millions.
MOST = 10_000_000
#: The types of storages and of tensors, and the bytes of an element.
SIZES: Mapping[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
}
_DIMENSIONS = 64  # as numpy has them
_STEP = 1000  # opcodes between two signs of life
#: The classes of storages -> their type.
STORAGES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.ComplexDoubleStorage": "complex128",
    "torch.ComplexFloatStorage": "complex64",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.UntypedStorage": "uint8",
    "torch.storage.UntypedStorage": "uint8",
}
#: What may be named but is not called; tensors with attributes name their own class.
_CLASSES = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
_NAMED = {f"torch.{dtype}" for dtype in SIZES} | _CLASSES
#: What may be called and is neither a tensor nor a dictionary.
_PLAIN = {
    "_codecs.encode",
    "builtins.bytearray",
    "builtins.complex",
    "builtins.set",
    "collections.Counter",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "torch.Size",
    "torch.device",
}
#: What runs a program or code when it is called, and is no object that a program would save.  The
#: list is a courtesy and no protection: nothing is called, whatever its name.
_RUNS_CODE = re.compile(
    # What a script saves of its machine is data: os.uname(), os.stat(), subprocess.run().
    r"(?!(os|posix|nt)\.(\w+_result|terminal_size)$|subprocess\.(CompletedProcess|CalledProcessError)$)"
    r"(os|posix|nt|sys|pty|subprocess|importlib|runpy|shutil|ctypes|_?pickle|marshal|webbrowser)\..*"
    r"|torch\.((hub|serialization|jit|ops)\..*|load)"
    r"|builtins\.(eval|exec|compile|open|input|breakpoint)"
    r"|.*\.__\w+__(\..*)?"  # such as the globals of a function
)
#: Tensors that are not one run of plain numbers: the name begins so -> what to tell.
_OTHER_TENSORS = {
    "torch._utils._rebuild_qtensor": "a quantised tensor; average the checkpoints before that",
    "torch._utils._rebuild_sparse": "a sparse tensor; save tensor.to_dense()",
    "torch._utils._rebuild_nested": "a nested tensor; save its parts",
    "torch._utils._rebuild_meta": "a tensor of the meta device, which has no values; save the "
    "model after its weights are loaded",
    "torch._utils._rebuild_": "a tensor that is not stored in plain form; save a plain tensor",
    "torch.Q": "a quantised tensor; average the checkpoints before that",
}


@dataclass(frozen=True, slots=True)
class Stored:
    """A storage: elements of one type in a member of the archive."""

    key: str
    dtype: str
    size: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A view of a storage, in elements."""

    storage: Stored
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Name:
    """A global that was named; it is never looked up."""

    full: str


@dataclass(slots=True, eq=False)
class Instance:
    """An object, or whatever else a call makes; it is noted, and never made."""

    of: str
    arguments: tuple[Any, ...]  # of the call that makes it
    state: Any = None  # what it is given afterwards: its attributes, or whatever its class takes
    # Most objects have neither, and an empty list for each would double the memory of a million.
    items: list[tuple[Any, Any]] | tuple[()] = ()  # if it is a kind of dictionary
    elements: list[Any] | tuple[()] = ()  # if it is a kind of list


@dataclass(slots=True, eq=False)
class Pairs:
    """A dictionary, as pairs: a stranger's keys are neither hashed nor compared."""

    items: list[tuple[Any, Any]] = field(default_factory=list)


def read(
    content: bytes,
    heartbeat: Heartbeat,
    classes: Collection[str] = (),
    unknown: dict[str, None] | None = None,
) -> Any:
    """Return what a pickle holds: plain values, lists, tuples and the inert classes above.

    Args:
        content: the pickle.
        heartbeat: called every few hundred opcodes.
        classes: full names of further classes and functions that may be called; each call gives
            an `Instance`.
        unknown: takes the full names of all others, in their order; each call gives an `Instance`.
            None: they are refused.

    Raises:
        FormatError: it is damaged, too large, or names what no state dict needs.
    """
    machine = _Machine(classes, unknown)
    with without_warnings():
        for count, (opcode, argument, _) in enumerate(list_opcodes(content)):
            if count % _STEP == 0:
                heartbeat()
                if count >= MOST:
                    raise FormatError(f"its pickle has more than {MOST} opcodes")
            action = _ACTIONS.get(opcode)
            if action is None:
                _damaged(f"it has the opcode {opcode}, which torch.save does not write")
            action(machine, argument)
    return machine.pop()


def find_inside(made: Instance, entered: set[int]) -> Iterator[Tensor | Stored]:
    """Yield the tensors that only the class of an object knows what to do with.

    These are in what it is created of, and in its attributes; neither in its items nor in its
    elements, which say by themselves what they are.

    Args:
        made: the object.
        entered: which values have been looked into; added to.
    """
    # No recursion: objects may be as deep as they like, as nothing in them has a name here.
    waiting: list[Any] = [made.arguments, made.state]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (Tensor, Stored)):
            yield value
        elif isinstance(value, (Pairs, Instance, list, tuple)) and id(value) not in entered:
            entered.add(id(value))
            waiting += _list_parts(value)


def _list_parts(value: Pairs | Instance | list[Any] | tuple[Any, ...]) -> list[Any]:
    """Return all values that a container or an object holds."""
    if isinstance(value, (list, tuple)):
        return [*value]
    parts = [part for pair in value.items for part in pair]
    if isinstance(value, Instance):
        parts += [*value.elements, value.arguments, value.state]
    return parts


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Silence what `pickletools` says of texts whose escapes are none: their opcode is refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def list_opcodes(content: bytes) -> Iterator[tuple[str, Any, int]]:
    """Yield each opcode's name, its argument, and where it stands; see `without_warnings`."""
    try:
        for opcode, argument, place in pickletools.genops(content):
            if opcode.name in ("GLOBAL", "INST"):
                # `pickletools` undoes escapes in names, which no unpickler does.
                written = str(argument).replace(" ", "\n", 1).encode() + b"\n"
                if not content.startswith(written, (place or 0) + 1):
                    _damaged(f"programs read the name '{shown(argument)}' differently")
            yield opcode.name, argument, place or 0
    except ValueError as error:  # what `genops` says of bytes that are no opcode
        _damaged(shown(error))


def _damaged(what: str) -> Never:
    raise FormatError(f"its pickle is damaged or hostile: {what}")


class _Machine:
    """The stack of the pickle machine; every method but the first four does one opcode."""

    def __init__(self, classes: Collection[str], unknown: dict[str, None] | None) -> None:
        self.classes = classes
        self.unknown = unknown
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each mark
        # Picklers number what they memoize from 0 on: millions of entries fit only into a list.
        self.memo: list[Any] = []
        self.far: dict[int, Any] = {}  # entries under numbers that do not follow the last

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            _damaged("it pops from an empty stack")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        if not self.below:
            _damaged("a mark is missing")
        items, self.stack = self.stack, self.below.pop()
        return items

    def discard(self) -> None:
        """Drop the last value; where there is none above a mark, that is the mark."""
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def discard_mark(self) -> None:
        self.pop_mark()

    def top(self, kind: type[Any] | tuple[type[Any], ...]) -> Any:
        """Return the last value, which must be of a kind."""
        if not self.stack or not isinstance(self.stack[-1], kind):
            _damaged("it adds items to an object that takes none")
        return self.stack[-1]

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def put(self, index: int) -> None:
        if not self.stack:
            _damaged("it memoizes from an empty stack")
        if index == len(self.memo) and index not in self.far:
            self.memo.append(self.stack[-1])
        elif index < len(self.memo):
            self.memo[index] = self.stack[-1]
        else:
            self.far[index] = self.stack[-1]

    def fetch(self, index: int) -> None:
        if index < len(self.memo):
            self.push(self.memo[index])
        elif index in self.far:
            self.push(self.far[index])
        else:
            _damaged("it reads a memo that was never set")

    def pack(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def extend(self, items: list[Any]) -> None:
        made = self.top((list, Instance))
        if isinstance(made, Instance):
            made.elements = made.elements or []
            made = made.elements
        made.extend(items)

    def fill(self, items: list[Any]) -> None:
        if len(items) % 2:
            _damaged("it has a key without a value")
        made = self.top((Pairs, Instance))
        made.items = made.items or []
        made.items.extend(zip(items[::2], items[1::2], strict=True))

    def name(self, text: str) -> None:
        """Take a global, in one text with a space between module and name."""
        # Protocol 2 calls builtins as Python 2 did.
        full = text.replace(" ", ".", 1).replace("__builtin__.", "builtins.", 1)
        if full not in self.classes and not _is_known(full):
            _refuse_special(full)
            if self.unknown is None:
                _refuse_unknown(full)
            self.unknown[full] = None
        self.push(Name(full))

    def is_callable(self, made: Any) -> bool:
        """Return whether a call of something is noted and not understood."""
        if not isinstance(made, Name):
            return self.unknown is not None and isinstance(made, Instance)
        return made.full in self.classes or not _is_known(made.full)

    def stack_name(self) -> None:
        """Take a global as protocol 4 writes it."""
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            _damaged("the name of a global is not a string")
        self.name(f"{module} {name}")

    def instance(self, text: str) -> None:
        """Refuse an opcode of long ago, naming what it would make."""
        self.name(text)
        _damaged(f"it would create a '{shown(self.pop().full)}'")

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(arguments, tuple):
            _damaged("it calls a function without arguments")
        if self.is_callable(function):
            self.push(_note_call(function, arguments))
        elif isinstance(function, Name):
            self.push(_called(function.full, arguments))
        else:
            _damaged("it calls an object that is not a function")

    def create(self, keywords: tuple[Any, ...] = ()) -> None:
        """Take an object as protocol 2 and later make it, of a class that is not understood."""
        arguments, kind = self.pop(), self.pop()
        if not self.is_callable(kind) or not isinstance(arguments, tuple):
            _damaged("it creates an object, which torch.save does not")
        self.push(_note_call(kind, arguments + keywords))

    def build(self) -> None:
        """Give an object its attributes: a state dict has its `_metadata` so."""
        state, made = self.pop(), self.top(object)
        if isinstance(made, Instance):
            # A second state would hide what is in the first.
            made.state = state if made.state is None else (made.state, state)
        elif isinstance(made, Pairs):
            made.items.append(("__dict__", state))
        else:
            _damaged("it sets attributes of an object that has none")

    def stored(self) -> None:
        """Take a persistent id, by which `torch.save` names storages and nothing else."""
        match self.pop():
            case ("storage", Name(full), str(key), str(), int(size)) if full in STORAGES:
                self.push(Stored(key, STORAGES[full], _numbers((size,))[0]))
            case _:
                _damaged("it has a persistent id that does not name a storage")


def _is_known(full: str) -> bool:
    """Return whether a name is one that state dicts have."""
    return full in STORAGES or full in _NAMED or full in _PLAIN or full in _MADE


def _refuse_special(full: str) -> None:
    """Refuse tensors that are not plain, and what runs code, wherever they are."""
    what = next((why for start, why in _OTHER_TENSORS.items() if full.startswith(start)), None)
    if what:
        raise FormatError(f"holds {what} ({shown(full)})")
    if _RUNS_CODE.fullmatch(full):
        raise FormatError(
            f"its pickle names '{shown(full)}', which runs code; no checkpoint needs that, and it "
            "is never run: do not trust this file"
        )


def _refuse_unknown(full: str) -> Never:
    raise FormatError(
        f"its pickle names '{shown(full)}', which no state dict needs and which is never run; "
        "save model.state_dict() without other objects"
    )


def _note_call(function: Name | Instance, arguments: tuple[Any, ...]) -> Instance:
    """Return an object of a class that is not understood, or what a function would return."""
    if isinstance(function, Name):
        return Instance(function.full, arguments)
    return Instance(function.of, (function, *arguments))


def _called(full: str, arguments: tuple[Any, ...]) -> Any:
    """Return what stands for the result of a call."""
    if full in _PLAIN:
        return Instance(full, arguments)
    if full not in _MADE:
        _damaged(f"it calls '{full}'")
    return _MADE[full](arguments)


def _dictionary(arguments: tuple[Any, ...]) -> Pairs:
    if arguments:
        _damaged("it creates a dictionary in a way that torch.save does not")
    return Pairs()


def _default_dictionary(_: tuple[Any, ...]) -> Pairs:
    return Pairs()  # its items follow; the class of missing ones does not matter


def _tensor(arguments: tuple[Any, ...]) -> Tensor:
    """Note what `torch._utils._rebuild_tensor_v2` would make."""
    match arguments:
        case (Stored() as stored, offset, tuple(shape), tuple(stride), *rest) if (
            len(shape) == len(stride) <= _DIMENSIONS
        ):
            _refuse_lazy(rest[2:])
            (first,) = _numbers((offset,))
            return Tensor(stored, first, _numbers(shape), _numbers(stride), stored.dtype)
    _damaged("it has a tensor that is not a view of a storage")


def _typed_tensor(arguments: tuple[Any, ...]) -> Tensor:
    """Note what `_rebuild_tensor_v3` would: for types that have no storages of their own."""
    match arguments:
        case (*plain, Name(full)) | (*plain, Name(full), Pairs()) if full.startswith("torch."):
            dtype = full.removeprefix("torch.")
            if dtype in SIZES:
                _refuse_lazy(arguments[7:])
                return replace(_tensor(tuple(plain)), dtype=dtype)
    _damaged("it has a tensor without a known type")


def _refuse_lazy(metadata: Sequence[Any]) -> None:
    """Refuse views that are negated or conjugated when they are read."""
    if any(not isinstance(found, Pairs) or found.items for found in metadata):
        raise FormatError(
            "holds a tensor that is lazily negated or conjugated; save tensor.clone()"
        )


def _parameter(arguments: tuple[Any, ...]) -> Tensor | Instance:
    """Note what `_rebuild_parameter` would make of a tensor; its attributes hold no tensors."""
    match arguments:
        case (Tensor() | Instance() as tensor, *_):
            return tensor
    _damaged("it has a parameter that is not a tensor")


def _with_attributes(arguments: tuple[Any, ...]) -> Tensor | Instance:
    """Note what `_rebuild_from_type_v2` would make: a plain tensor that was given attributes."""
    match arguments:
        case (Name(), Name(kind), tuple(), _) if not _is_known(kind):
            return Instance(kind, arguments)  # what such a class stores is not known
        case (Name(full), Name(kind), tuple(plain), _) if kind in _CLASSES:
            if full in _MADE and full != _FROM_TYPE:
                made = _MADE[full](plain)
                if isinstance(made, Tensor):
                    return made
    _damaged("it has a tensor of an unknown class")


def _numbers(values: tuple[Any, ...]) -> tuple[int, ...]:
    """Return sizes, which are whole numbers that a file could have."""
    for value in values:
        if type(value) is not int or not 0 <= value < 1 << 63:
            _damaged("it has a size that is not a whole number of 0 or more")
    return values


_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
_MADE: Mapping[str, Callable[[tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _dictionary,
    "collections.defaultdict": _default_dictionary,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    _FROM_TYPE: _with_attributes,
}
_Action = Callable[[_Machine, Any], None]
_ACTIONS: Mapping[str, _Action] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda *_: None),
    "MARK": lambda machine, _: machine.mark(),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1"), _Machine.push),
    # Picklers write only numbers of more than 255 bytes so, which are neither sizes nor keys.
    "LONG4": lambda machine, _: machine.push(Instance("builtins.int", ())),
    **dict.fromkeys(("BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _Machine.push),
    **dict.fromkeys(("SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"), _Machine.push),
    **dict.fromkeys(("BINBYTES8", "BYTEARRAY8"), _Machine.push),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_SET": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push(Pairs()),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "FROZENSET": lambda machine, _: machine.push(machine.pop_mark()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_mark())),
    "TUPLE1": lambda machine, _: machine.pack(1),
    "TUPLE2": lambda machine, _: machine.pack(2),
    "TUPLE3": lambda machine, _: machine.pack(3),
    # A tuple that holds itself is made twice, and the first is thrown away.
    "POP": lambda machine, _: machine.discard(),
    "POP_MARK": lambda machine, _: machine.discard_mark(),
    "APPEND": lambda machine, _: machine.extend([machine.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_mark()),
    "ADDITEMS": lambda machine, _: machine.extend(machine.pop_mark()),
    "SETITEM": lambda machine, _: machine.fill([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.fill(machine.pop_mark()),
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": lambda machine, _: machine.put(len(machine.memo) + len(machine.far)),
    "BINGET": _Machine.fetch,
    "LONG_BINGET": _Machine.fetch,
    "GLOBAL": lambda machine, text: machine.name(text.replace(" ", ".", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.stack_name(),
    "INST": _Machine.instance,
    "REDUCE": lambda machine, _: machine.call(),
    "NEWOBJ": lambda machine, _: machine.create(),
    "NEWOBJ_EX": lambda machine, _: machine.create((machine.pop(),)),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.stored(),
}
