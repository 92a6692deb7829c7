"""PyTorch's zip checkpoints without PyTorch: pickles written opcode by opcode, hostile ones too.

`tests/torch` has the contract of all formats and what PyTorch itself writes and loads.
"""

from __future__ import annotations

import os
import pickle
import random
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from polyak_cli import average
from polyak_cli.checkpoints import select
from polyak_cli.errors import CheckpointError, FormatError, MismatchError, PolyakError
from polyak_cli.formats.format import ScanRequest
from polyak_cli.formats.torch import archive as torch_zip
from polyak_cli.formats.torch import pickles
from polyak_cli.formats.torch.archive import TorchZip
from polyak_cli.processes.sandbox import Heartbeat

REBUILD = "torch._utils _rebuild_tensor_v2"
PROTO, STOP = b"\x80\x02", b"."


def name(text: str) -> bytes:
    """Return the opcode of a global."""
    return b"c" + text.replace(" ", "\n").encode() + b"\n"


def text(value: str) -> bytes:
    """Return the opcode of a string."""
    data = value.encode()
    return b"X" + struct.pack("<L", len(data)) + data


def number(value: int) -> bytes:
    """Return the opcode of a whole number of eight bytes."""
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def several(*items: bytes) -> bytes:
    """Return the opcodes of a tuple."""
    return b"(" + b"".join(items) + b"t"


def call(function: str, *arguments: bytes) -> bytes:
    """Return the opcodes of a call."""
    return name(function) + several(*arguments) + b"R"


def dictionary(items: Mapping[str, bytes]) -> bytes:
    """Return the opcodes of a dictionary."""
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def storage(key: str, size: int, kind: str = "torch FloatStorage") -> bytes:
    """Return the opcodes of a storage."""
    return several(text("storage"), name(kind), text(key), text("cpu"), number(size)) + b"Q"


def view(stored: bytes, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """Return the opcodes of a tensor."""
    sizes = (several(*map(number, values)) for values in (shape, stride))
    hooks = call("collections OrderedDict")
    return call(REBUILD, stored, number(offset), *sizes, b"\x89", hooks)


def tensor(key: str, size: int, kind: str = "torch FloatStorage") -> bytes:
    """Return the opcodes of a tensor of one dimension that is a whole storage."""
    return view(storage(key, size, kind), (size,), (1,))


def archive(path: Path, content: bytes, **members: bytes | npt.NDArray[np.generic]) -> Path:
    """Write an archive of a pickle and of storages, `_0` being `data/0`."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", PROTO + content + STOP)
        for key, values in members.items():
            record = f"data/{key[1:]}" if key.startswith("_") else key
            file.writestr(f"archive/{record}", bytes(values))
    return path


def stored(path: Path, key: str, dtype: str = "<f4") -> npt.NDArray[np.generic]:
    """Return the values of a storage."""
    with zipfile.ZipFile(path) as file:
        (record,) = (name for name in file.namelist() if name.endswith(f"/data/{key}"))
        return np.frombuffer(file.read(record), dtype)


ONE, OTHER = (np.random.default_rng(seed).normal(size=6).astype("<f4") for seed in (0, 1))
MEAN = (0.5 * ONE.astype("f8") + 0.5 * OTHER).astype("<f4")


def test_tensors_are_matched_by_name_not_by_storage(tmp_path: Path) -> None:
    """The keys of storages and the order of names may differ from file to file."""
    one, other = tmp_path / "m_1.pt", tmp_path / "m_2.pt"
    state = {"b": tensor("7", 2), "a": tensor("3", 6)}
    archive(one, dictionary({"model": dictionary(state)}), _3=ONE, _7=ONE[:2])
    state = {"a": tensor("0", 6), "b": tensor("1", 2)}
    archive(other, dictionary({"model": dictionary(state)}), _0=OTHER, _1=OTHER[:2])
    report = average([one, other], tmp_path / "o.pt")
    assert report.plan.averaged == ("model/a", "model/b")
    assert stored(tmp_path / "o.pt", "0").tobytes() == MEAN.tobytes()
    assert stored(tmp_path / "o.pt", "1").tobytes() == MEAN[:2].tobytes()


def test_big_endian_archives_are_averaged(tmp_path: Path) -> None:
    """The member `byteorder` tells how all storages lie, and the output keeps it."""
    content = dictionary({"x": tensor("0", 6)})
    paths = [
        archive(tmp_path / f"m_{k}.pt", content, byteorder=b"big", _0=values.astype(">f4"))
        for k, values in enumerate((ONE, OTHER))
    ]
    average(paths, tmp_path / "o.pt")
    assert stored(tmp_path / "o.pt", "0", ">f4").tobytes() == MEAN.astype(">f4").tobytes()


def test_dictionaries_that_refer_to_one_another_are_walked_once(tmp_path: Path) -> None:
    """A dictionary that holds itself ends, and one that is there twice has one name."""
    inner = dictionary({"x": tensor("0", 6)}) + b"q\x01"
    content = dictionary({"model": inner, "same": b"h\x01"}) + b"q\x02" + text("loop") + b"h\x02s"
    paths = [archive(tmp_path / f"m_{k}.pt", content, _0=ONE) for k in (1, 2)]
    assert average(paths, tmp_path / "o.pt").plan.averaged == ("model/x",)


def test_a_directory_of_each_suffix_is_found(tmp_path: Path) -> None:
    """`.pt`, `.pth`, `.bin` and `.ckpt` are checkpoints in a directory."""
    for suffix in TorchZip.suffixes:
        folder = tmp_path / suffix
        folder.mkdir()
        for k in (1, 2):
            archive(folder / f"m_{k}{suffix}", dictionary({"x": tensor("0", 6)}), _0=ONE)
        assert len(average(folder, tmp_path / f"o{suffix}").plan.checkpoints) == 2


def refused(path: Path, content: bytes, **members: bytes | npt.NDArray[np.generic]) -> str:
    """Return the one line by which averaging a file ends."""
    archive(path, content, **(members or {"_0": ONE}))
    with pytest.raises((FormatError, MismatchError)) as error:
        average([path], path.with_name("o.pt"))
    assert os.listdir(path.parent) == [path.name]
    assert "\n" not in str(error.value)
    return str(error.value)


X = dictionary({"x": tensor("0", 6)})
GLOBALS = [
    "os system",
    "posix system",
    "subprocess Popen",
    "builtins eval",
    "__builtin__ exec",
    "torch.hub load",
    "torch.serialization load",
    "importlib import_module",
    "collections OrderedDict.__init__.__globals__",
]


@pytest.mark.parametrize("function", GLOBALS)
def test_names_that_run_code_are_refused(tmp_path: Path, function: str) -> None:
    """Wherever a global stands and however it is written, it is named and not looked up."""
    canary = tmp_path / "canary"
    run = call(function, text(f"touch {canary}"))
    shown = function.replace(" ", ".").replace("__builtin__", "builtins")
    module, _, attribute = function.partition(" ")
    for content in (
        dictionary({"x": tensor("0", 6), "y": run}),
        run + b"0" + X,
        X + b"(" + name(function),
        dictionary({"x": tensor("0", 6)}) + run + b"b",
        text(module) + text(attribute) + b"\x93",
        b"(" + text("touch") + b"i" + function.replace(" ", "\n").encode() + b"\n",
    ):
        assert f"names '{shown}'" in refused(tmp_path / "m.pt", content)
        assert not canary.exists()
        (tmp_path / "m.pt").unlink()


UNKNOWN = [
    "argparse Namespace",
    "__builtin__ getattr",
    "torch._utils _import_dotted_name",
    "functools partial",
    "numpy.f2py.crackfortran getlincoef",
    "torch FloatStorage.from_file",
    "omegaconf.dictconfig DictConfig",
    "nobody.has.this Nested.Class",
]


def average_two(folder: Path, content: bytes) -> tuple[str, ...]:
    """Average two archives of one pickle; return the notes, having compared pickle and values."""
    paths = [folder / "m_1.pt", folder / "m_2.pt"]
    for path, values in zip(paths, (ONE, OTHER), strict=True):
        archive(path, content, _0=values)
    report = average(paths, folder / "o.pt", force=True)
    with zipfile.ZipFile(folder / "o.pt") as output:
        assert output.read("archive/data.pkl") == PROTO + content + STOP
    assert stored(folder / "o.pt", "0").tobytes() == MEAN.tobytes()
    return report.notes


@pytest.mark.parametrize("function", UNKNOWN)
def test_unknown_names_are_carried_byte_for_byte(tmp_path: Path, function: str) -> None:
    """Nothing is imported or called; the plan names what is carried."""
    canary = tmp_path / "canary"
    run = call(function, text(f"touch {canary}"))
    notes = average_two(tmp_path, dictionary({"x": tensor("0", 6), "y": run}))
    shown = function.replace(" ", ".").replace("__builtin__", "builtins")
    assert any(f"objects of {shown}" in note for note in notes)
    assert not canary.exists()


OBJECT = "some.trainer Holder"
MADE = call(OBJECT, text("x"))
USES = {
    "thrown away": MADE + b"0" + X,
    "thrown away with a mark": b"(" + MADE + b"1" + X,
    "only named": dictionary({"x": tensor("0", 6), "y": name(OBJECT)}),
    "attributes": X + MADE + b"b",
    "protocol 4": X + text("y") + text("some.trainer") + text("Holder") + b"\x93)\x81}bs",
    "keywords": dictionary({"x": tensor("0", 6), "y": name(OBJECT) + b")}\x92"}),
    "its result called": dictionary({"x": tensor("0", 6), "y": MADE + b")R"}),
    "a dictionary": dictionary({"x": tensor("0", 6), "y": MADE + b"(" + text("k") + b"Nu"}),
    "a list": dictionary({"x": tensor("0", 6), "y": MADE + b"(NNe"}),
    "a key": b"}" + MADE + b"Ns" + text("x") + tensor("0", 6) + b"s",
}


@pytest.mark.parametrize("content", USES.values(), ids=USES)
def test_objects_are_carried_however_they_are_made(tmp_path: Path, content: bytes) -> None:
    """Every opcode that makes or fills an object, at any place, leaves the pickle as it is."""
    assert any("objects of some.trainer.Holder" in note for note in average_two(tmp_path, content))


HIDDEN = {
    "in its arguments": call(OBJECT, tensor("0", 6)),
    "in a dictionary of its arguments": call(OBJECT, X),
    "in its attributes": call(OBJECT) + dictionary({"weight": tensor("0", 6)}) + b"b",
    "in the first of two states": call(OBJECT) + X + b"b" + b"}b",
    "in the class of a tensor": call(
        "torch._tensor _rebuild_from_type_v2",
        name(REBUILD),
        name(OBJECT),
        several(storage("0", 6), number(0), several(number(6)), several(number(1)), b"\x89"),
        b"N",
    ),
    "in an object in an object": call(OBJECT, call(OBJECT, b"]" + tensor("0", 6) + b"a")),
    "in a call's result": call(OBJECT, tensor("0", 6)) + b")R",
    "under a tensor as its key": call(OBJECT, b"}" + tensor("0", 6) + b"Ns"),
    "deep in it": call(OBJECT, b"]" * 5000 + tensor("0", 6) + b"a" * 5000),
}


@pytest.mark.parametrize("made", HIDDEN.values(), ids=HIDDEN)
def test_tensors_of_the_model_inside_unknown_objects_are_refused(
    tmp_path: Path, made: bytes
) -> None:
    """They would be the newest's without a word; the object and its class are named."""
    line = refused(tmp_path / "m.pt", dictionary({"net": made}))
    assert "holds tensors inside an object at 'net' of the class 'some.trainer.Holder'" in line


@pytest.mark.parametrize("made", HIDDEN.values(), ids=HIDDEN)
def test_tensors_that_are_elsewhere_too_or_not_the_models_are_no_matter(
    tmp_path: Path, made: bytes
) -> None:
    """A tensor that a dictionary leads to is averaged; a setting's is the newest's."""
    one, other = tmp_path / "m_1.pt", tmp_path / "m_2.pt"
    shared = dictionary({"net": made, "model": X})
    beside = dictionary({"args": made, "model": dictionary({"y": tensor("1", 6)})})
    for content, key in ((shared, "0"), (beside, "1")):
        archive(one, content, _0=ONE, _1=ONE)
        archive(other, content, _0=OTHER, _1=OTHER)
        average([one, other], tmp_path / "o.pt", force=True)
        assert stored(tmp_path / "o.pt", key).tobytes() == MEAN.tobytes()
    assert stored(tmp_path / "o.pt", "0").tobytes() == OTHER.tobytes()


def test_tensors_in_a_kind_of_dictionary_are_averaged(tmp_path: Path) -> None:
    """Subclasses of dict, of OrderedDict and of list say by themselves what they hold."""
    for make in (name(OBJECT) + b")\x81", call(OBJECT), call("collections defaultdict", b"N")):
        content = dictionary({"model": make + text("x") + tensor("0", 6) + b"s"})
        archive(tmp_path / "m_1.pt", content, _0=ONE)
        archive(tmp_path / "m_2.pt", content, _0=OTHER)
        paths = [tmp_path / "m_1.pt", tmp_path / "m_2.pt"]
        assert average(paths, tmp_path / "o.pt", force=True).plan.averaged == ("model/x",)
        assert stored(tmp_path / "o.pt", "0").tobytes() == MEAN.tobytes()
    content = dictionary({"model": call(OBJECT) + tensor("0", 6) + b"a"})
    path = archive(tmp_path / "m.pt", content, _0=ONE)
    assert average([path], tmp_path / "o.pt", force=True).plan.averaged == ("model/0",)


DAMAGED = {
    "pops nothing": b"R",
    "no mark": X + b"t",
    "no memo": b"h\x07",
    "calls a number": number(1) + b")R",
    "calls a type": name("torch FloatStorage") + b")R",
    "attributes of a tensor": tensor("0", 6) + b"}b",
    "an opcode of objects": name("collections OrderedDict") + b")\x81",
    "extension": b"\x82\x01",
    "a name with an escape": b"ccoll\\x65ctions\nOrderedDict\n)R",
    "a name with a space": b"ctorch _utils\n_rebuild_tensor_v2\n",
    "an opcode that is none": b"\xff",
    "a text that never ends": b"X\xff\xff\xff\xff",
    "a number that never ends": b"\x8b\xff\xff\xff\x7f",
    "a key alone": b"}(" + text("x") + b"u",
    "items of a number": number(1) + b"(" + text("x") + number(2) + b"u",
    "persistent text": text("storage") + b"Q",
    "persistent bytes": several(text("module"), name("torch Tensor")) + b"Q",
    "storage without location": several(text("storage"), name("torch FloatStorage")) + b"Q",
    "storage of a function": storage("0", 6, REBUILD),
    "negative size": tensor("0", -6),
    "size of no number": view(storage("0", 6), (6,), (1,)).replace(number(6), b"N"),
    "more strides than sizes": view(storage("0", 6), (6,), (1, 1)),
    "parameter of text": call("torch._utils _rebuild_parameter", text("x"), b"\x88"),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_pickles_are_refused(tmp_path: Path, content: bytes) -> None:
    """What is no pickle of a state dict is one line that says so."""
    assert "m.pt: its pickle is damaged or hostile" in refused(tmp_path / "m.pt", content)


LIES = {
    "beyond its storage": (view(storage("0", 6), (6,), (1,), 1), "reaches element 6"),
    "strides beyond": (view(storage("0", 6), (2, 3), (2**62, 1)), "reaches element"),
    "sizes that overflow": (view(storage("0", 6), (2**62, 2**62), (2**62, 4)), "reaches element"),
    "a storage of another size": (tensor("0", 2**62), "storage of 24 bytes; expected"),
    "no such storage": (tensor("1", 6), "storage '1', which is missing"),
    "a path": (tensor("../../../etc/passwd", 6), "which is missing from the archive"),
    "an absolute path": (tensor("/etc/passwd", 6), "which is missing from the archive"),
    "two types": (b"(" + tensor("0", 6) + tensor("0", 6, "torch IntStorage") + b"t", "another"),
    "half of its elements": (tensor("0", 6, "torch DoubleStorage"), "24 bytes; expected 48"),
}


@pytest.mark.parametrize(("value", "message"), LIES.values(), ids=LIES)
def test_tensors_that_cannot_be_are_refused(tmp_path: Path, value: bytes, message: str) -> None:
    """A tensor reaches nothing but its own storage, whose size two places agree on."""
    content = dictionary({"x\x1b[2J": value})
    line = refused(tmp_path / "m.pt", content)
    assert message in line
    assert r"tensor 'x\x1b[2J" in line


BOMBS = {
    "deep lists": b"]" * 100_000 + b"a" * 99_999,
    "deep tuples": number(1) + b"\x85" * 100_000,
    "deep dictionaries": (b"}" + text("a")) * 100_000 + b"N" + b"s" * 100_000,
    "a tuple of itself, doubled": number(1) + b"q\x00h\x00\x86" * 200,
    "a list of itself": b"]q\x00h\x00a",
    "deep objects": (name("some.trainer Holder") + b"(") * 100_000 + b"tR" * 100_000,
    "objects in one another": call("some.trainer Holder") + b"q\x00h\x00b",
    "an object of itself, doubled": call("some.trainer Holder")
    + (b"q\x00" + name("some.trainer Holder") + b"h\x00h\x00\x86R") * 200,
    "a memo far away": number(1) + b"r\xff\xff\xff\xff" * 1000,
    "keys that are deep": b"}" + number(1) + b"\x85" * 100_000 + b"Ns",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_bombs_cost_little(tmp_path: Path, bomb: bytes) -> None:
    """Nesting without end is refused or walked once; no traceback, no crash, no long wait."""
    archive(tmp_path / "m.pt", dictionary({"y": bomb, "x": tensor("0", 6)}), _0=ONE)
    try:
        average([tmp_path / "m.pt"], tmp_path / "o.pt")
    except FormatError as error:
        assert "nested more than 64 deep" in str(error)  # noqa: PT017 (either may be)
    else:
        assert stored(tmp_path / "o.pt", "0").tobytes() == ONE.tobytes()


def test_keys_of_any_kind_are_passed_by(tmp_path: Path) -> None:
    """Keys that Python could not hash, or only by overflowing its stack, are never hashed."""
    odd = number(1) + b"\x85" * 100_000 + b"N" + b"]N" + b"}N" + tensor("0", 6) + b"N"
    path = archive(tmp_path / "m.pt", b"}(" + odd + text("x") + tensor("0", 6) + b"u", _0=ONE)
    assert average([path], tmp_path / "o.pt").plan.averaged == ("x",)


def test_numbers_of_any_length_are_passed_by(tmp_path: Path) -> None:
    """Python refuses to write out numbers of thousands of digits, and floats end at 1e308."""
    long = b"\x8b" + struct.pack("<l", 4000) + b"\x7f" * 4000
    beyond = b"\x8a\xff" + b"\x7f" * 255
    items = (
        long + number(1) + text("x") + tensor("0", 6) + text("n") + long + text("metric") + beyond
    )
    timm = b"".join(
        text(key) + b"N" for key in ("arch", "epoch", "optimizer", "state_dict", "version")
    )
    path = archive(tmp_path / "m.pt", b"}(" + items + timm + b"u", _0=ONE)
    assert average([path], tmp_path / "o.pt").plan.averaged == ("x",)
    with pytest.raises(CheckpointError, match="found no such number"):
        select([path], best=1)


def test_a_pickle_has_a_bounded_number_of_opcodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is longer than any state dict is not read to its end."""
    monkeypatch.setattr(pickles, "MOST", 5000)
    with pytest.raises(FormatError, match="more than 5000 opcodes"):
        pickles.read(PROTO + b"]" * 10_000 + STOP, Heartbeat(lambda: None))


def test_archives_that_torch_save_did_not_write_are_refused(tmp_path: Path) -> None:
    """Folders, code, byte orders and deflation that are not PyTorch's."""
    for member, message in (
        ({"../other/x": b"x"}, "out of the archive"),
        ({"code/__torch__.py": b"import os"}, "TorchScript"),
        ({"byteorder": b"middle"}, "byte order"),
    ):
        assert message in refused(tmp_path / "m.pt", X, _0=ONE, **member)
        (tmp_path / "m.pt").unlink()
    with zipfile.ZipFile(tmp_path / "m.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", PROTO + X + STOP)
        file.writestr("a/data/0", bytes(ONE))
    with pytest.raises(FormatError, match="'x' is deflated"):
        average([tmp_path / "m.pt"], tmp_path / "o.pt")
    archive(tmp_path / "m.pt", X, _0=ONE)
    with zipfile.ZipFile(tmp_path / "m.pt", "a") as file:
        file.writestr("b/data.pkl", PROTO + X + STOP)
    with pytest.raises(FormatError, match="the folders 'archive' and 'b'"):
        average([tmp_path / "m.pt"], tmp_path / "o.pt")


@pytest.mark.parametrize("moved", [1, 10**9])
def test_members_before_the_file_are_refused(tmp_path: Path, moved: int) -> None:
    """An end record that moves the list of members moves them to where no file is."""
    path = archive(tmp_path / "m.pt", X, _0=ONE)
    content = bytearray(path.read_bytes())
    place = len(content) - 22 + 16  # of the offset of the list
    struct.pack_into("<L", content, place, struct.unpack_from("<L", content, place)[0] + moved)
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"'archive/data.pkl' lies outside the file"):
        average([path], tmp_path / "o.pt")


def test_a_member_without_a_name_is_refused(tmp_path: Path) -> None:
    """Python's zipfile cannot even tell whether that is a directory."""
    path = archive(tmp_path / "m.pt", X, _0=ONE)
    content = path.read_bytes()
    last = content.rindex(b"PK\x01\x02")
    nameless = bytearray(content[last:])
    size = struct.unpack_from("<H", nameless, 28)[0]
    struct.pack_into("<3H", nameless, 28, 0, 0, size)  # what was its name is its comment
    path.write_bytes(content[:last] + nameless)
    with pytest.raises(FormatError, match=r"m.pt: .*has a path that leads nowhere"):
        average([path], tmp_path / "o.pt")


def test_a_bare_pickle_is_never_opened(tmp_path: Path) -> None:
    """A pickle without an archive may run code, whoever wrote it."""
    for protocol in (2, 4):
        (tmp_path / "m.pt").write_bytes(pickle.dumps({"x": 1}, protocol))
        with pytest.raises(FormatError, match=r"m.pt: is a pickle.*torch.save"):
            average([tmp_path / "m.pt"], tmp_path / "o.pt")


def test_a_flipped_bit_of_a_storage_is_refused(tmp_path: Path) -> None:
    """PyTorch itself does not look at the checksums."""
    path = archive(tmp_path / "m.pt", X, _0=ONE)
    content = bytearray(path.read_bytes())
    content[content.index(bytes(ONE)) + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"checksum of the member 'archive/data/0' is wrong"):
        average([path], tmp_path / "o.pt")


def test_mutated_pickles_give_one_line_or_a_table(tmp_path: Path) -> None:
    """Thousands of damaged pickles: a table or a FormatError, and nothing else."""
    whole = PROTO + dictionary({"a": X, "b": tensor("1", 2), "n": number(3)}) + STOP
    chance = random.Random(0)
    for _ in range(5000):
        mutated = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            mutated[chance.randrange(len(mutated))] = chance.choice((chance.randrange(256), 46, 82))
        try:
            root = pickles.read(bytes(mutated), Heartbeat(lambda: None))
            torch_zip._Collected({}, "<").fill(root, Heartbeat(lambda: None))
        except FormatError as error:
            assert "\n" not in str(error)  # noqa: PT017 (either may be)
    path = archive(tmp_path / "m.pt", whole[2:-1], _0=ONE, _1=ONE[:2])
    assert len(TorchZip().scan(ScanRequest(str(path), True), Heartbeat(lambda: None)).tensors) == 2


def test_a_truncated_archive_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    """No traceback, no output."""
    path = archive(tmp_path / "m.pt", X, _0=ONE)
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(PolyakError, match=r"m\.pt"):
            average([path], tmp_path / "o.pt")
    assert os.listdir(tmp_path) == ["m.pt"]
