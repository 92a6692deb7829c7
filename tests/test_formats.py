"""Scanning and laying out HDF5: every layout that Keras writes, and what is refused.

Files are written by h5py in the oracle, and results are read by h5py, never by the package.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import stat
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyak_cli import formats
from polyak_cli.errors import FormatError, OutputError, PolyakError
from polyak_cli.formats import outputs as formats_outputs
from polyak_cli.formats import same_skeleton
from polyak_cli.formats.hdf5 import library
from polyak_cli.formats.hdf5.chunks import Chunks
from polyak_cli.processes import sandbox
from polyak_cli.storage import File, Version, open_input, publishing
from polyak_cli.tensors import Extent, Table, TensorSpec
from tests.counting import count_reads
from tests.oracle import write_model

KERNEL = np.arange(6, dtype=np.float32).reshape(2, 3)


def scan(path: Path) -> Table:
    """Scan one file as the template."""
    (table,) = formats.scan([path])
    return table


def read(table: Table, name: str, start: int = 0, stop: int | None = None) -> bytes:
    """Read bytes of a tensor through its storage."""
    storage = table.tensors[name].storage
    assert storage is not None
    buffer = np.empty((storage.nbytes if stop is None else stop) - start, np.uint8)
    with open_input(table.path) as file:
        storage.read_into([file], start, buffer)
    return buffer.tobytes()


@pytest.mark.parametrize("weight", ["kernel:0", "kernel", "sequential/dense/kernel", "a/b/c/d/k"])
def test_every_generation_of_weight_names(tmp_path: Path, weight: str) -> None:
    """Names with and without slashes are found where Keras 2, 3.0 and 3.3 put them."""
    path = write_model(tmp_path / "m.h5", {"dense": {weight: KERNEL}})
    table = scan(path)
    assert list(table.tensors) == [f"dense/{weight}"]
    assert read(table, f"dense/{weight}") == KERNEL.tobytes()


@pytest.mark.parametrize("fixed", [True, False])
def test_names_of_fixed_and_variable_length(tmp_path: Path, fixed: bool) -> None:
    """Keras 2.0 wrote the lists of names as fixed-length strings, later ones do not."""
    path = write_model(tmp_path / "m.h5", {"a": {"k": KERNEL}, "bbbb": {"k": KERNEL}}, fixed=fixed)
    assert list(scan(path).tensors) == ["a/k", "bbbb/k"]


@pytest.mark.parametrize("fixed", [True, False])
def test_non_ascii_names(tmp_path: Path, fixed: bool) -> None:
    """Layer and weight names of any script survive scan and layout."""
    path = write_model(tmp_path / "m.h5", {"café_层": {"ядро": KERNEL}}, fixed=fixed)
    assert list(scan(path).tensors) == ["café_层/ядро"]
    output = lay_out(path, tmp_path / "o.h5")
    with h5py.File(output) as file:
        names = file["model_weights"].attrs["layer_names"]
        assert [n if isinstance(n, str) else n.decode() for n in names] == ["café_层"]
        assert file["model_weights/café_层/ядро"].shape == (2, 3)


@pytest.mark.slow
def test_lists_of_names_over_64_kb_are_joined(tmp_path: Path) -> None:
    """layer_names0, layer_names1, ... are one list, in order, and are carried as they are."""
    layers = {f"{k:04d}_{'x' * 150}": {"kernel": KERNEL} for k in range(700)}
    path = write_model(tmp_path / "m.h5", layers)
    with h5py.File(path) as file:
        keys = set(file["model_weights"].attrs)
    assert {"layer_names0", "layer_names1"} <= keys
    assert list(scan(path).tensors) == [f"{layer}/kernel" for layer in layers]
    output = lay_out(path, tmp_path / "o.h5")
    with h5py.File(output) as file:
        assert set(file["model_weights"].attrs) == keys


def test_order_is_keras_own_not_the_file_s(tmp_path: Path) -> None:
    """Tensors come as layer_names and weight_names list them, though groups are sorted."""
    layers = {"z": {"k": KERNEL, "b": KERNEL[0]}, "a": {"k": KERNEL}}
    assert list(scan(write_model(tmp_path / "m.h5", layers)).tensors) == ["z/k", "z/b", "a/k"]


def test_legacy_weights_only_files_have_their_groups_at_the_root(tmp_path: Path) -> None:
    """What Keras 2's save_weights('w.h5') wrote is the same layout, one level up."""
    path = tmp_path / "w.h5"
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"dense"]
        file.create_group("dense").attrs["weight_names"] = [b"dense/kernel:0"]
        file["dense"].create_dataset("dense/kernel:0", data=KERNEL)
    table = scan(path)
    assert read(table, "dense/dense/kernel:0") == KERNEL.tobytes()


STORAGES: dict[str, dict[str, Any]] = {
    "chunked": {"chunks": (3, 5)},
    "gzip": {"chunks": (3, 5), "compression": "gzip"},
    "gzip of whole rows": {"chunks": (4, 13), "compression": "gzip"},
    "shuffled": {"chunks": (3, 5), "compression": "gzip", "shuffle": True},
    "checked": {"chunks": (3, 5), "fletcher32": True},
    "all": {"chunks": (7, 6), "compression": "gzip", "shuffle": True, "fletcher32": True},
    "lzf": {"chunks": (7, 6), "compression": "lzf"},
    "resizable": {"chunks": (3, 5), "maxshape": (None, None)},
}


@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
def test_chunked_tensors_read_like_h5py_reads_them(
    tmp_path: Path, storage: dict[str, Any], dtype: str
) -> None:
    """Any piece of a chunked tensor, whatever its filters, is what h5py gives."""
    rng = np.random.default_rng(0)
    values = np.round(rng.normal(size=(22, 13)), 1).astype(dtype)
    path = write_model(tmp_path / "m.h5", {"d": {"k": values}}, storage=storage)
    table = scan(path)
    assert isinstance(table.tensors["d/k"].storage, Chunks)
    with h5py.File(path) as file:
        expected = file["model_weights/d/k"][:].tobytes()
    width = values.itemsize
    cuts = [0, 1, 5, 13, 26, 39, 100, 285, 286]
    for start, stop in itertools.combinations(cuts, 2):
        piece = read(table, "d/k", start * width, stop * width)
        assert piece == expected[start * width : stop * width]


def test_a_chunk_whose_filter_was_skipped(tmp_path: Path) -> None:
    """HDF5 leaves a filter out for single chunks, and says so chunk by chunk."""
    path = tmp_path / "m.h5"
    write_model(path, {"d": {"k": KERNEL}}, storage={"chunks": (2, 3), "compression": "gzip"})
    with h5py.File(path, "r+") as file:
        file["model_weights/d/k"].id.write_direct_chunk((0, 0), KERNEL.tobytes(), filter_mask=1)
    assert read(scan(path), "d/k") == KERNEL.tobytes()


@pytest.mark.parametrize(
    ("storage", "damage"), [("gzip", b"\x55"), ("checked", b"\x01"), ("lzf", b"\x55" * 12)]
)
def test_a_damaged_chunk_is_refused(tmp_path: Path, storage: str, damage: bytes) -> None:
    """Flipped bytes in compressed or checksummed data are noticed."""
    values = np.zeros((22, 13), np.float32)
    path = write_model(tmp_path / "m.h5", {"d": {"k": values}}, storage=STORAGES[storage])
    chunks = scan(path).tensors["d/k"].storage
    assert isinstance(chunks, Chunks)
    offset, nbytes, _ = chunks.index[0, 0]
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(damage[:nbytes])
    with pytest.raises(FormatError, match=r"damaged|decodes to"):
        read(scan(path), "d/k")


def test_a_chunk_that_inflates_to_more_than_declared_is_refused(tmp_path: Path) -> None:
    """A deflate bomb is cut off at the size that the header declares."""
    import zlib

    path = tmp_path / "m.h5"
    write_model(path, {"d": {"k": KERNEL}}, storage={"chunks": (2, 3), "compression": "gzip"})
    with h5py.File(path, "r+") as file:
        file["model_weights/d/k"].id.write_direct_chunk((0, 0), zlib.compress(b"\0" * 9999))
    with pytest.raises(FormatError, match="does not end where it should"):
        read(scan(path), "d/k")


def test_compact_tensors_are_read_from_the_header(tmp_path: Path) -> None:
    """HDF5's compact layout keeps the values in the header itself."""
    path = write_model(tmp_path / "m.h5", {"d": {"b": np.zeros(3, np.float32)}})
    with h5py.File(path, "r+") as file:
        group = file["model_weights/d"]
        del group["b"]
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_layout(h5py.h5d.COMPACT)
        space = h5py.h5s.create_simple((3,))
        made = h5py.h5d.create(group.id, b"b", h5py.h5t.IEEE_F32LE, space, properties)
        made.write(h5py.h5s.ALL, h5py.h5s.ALL, np.array([1, 2, 3], np.float32))
    assert read(scan(path), "d/b") == np.array([1, 2, 3], np.float32).tobytes()


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.zeros(2, "<f2"), "float16"),
        (np.zeros(2, "V2"), "bfloat16"),
        (np.zeros(2, ">f8"), "float64"),
        (np.zeros(2, np.longdouble), "float128"),
        (np.zeros(2, "<i8"), "int64"),
        (np.zeros(2, "<u1"), "uint8"),
        (np.zeros(2, bool), "bool"),
        (np.array([b"ab", b"c"]), "string"),
        (np.array(["ab", "ü"], object), "string"),
        (np.zeros(2, np.complex64), "compound"),
    ],
)
def test_types_are_reported_apart(tmp_path: Path, values: np.ndarray, dtype: str) -> None:
    """Each HDF5 type has the name that decides its fate."""
    path = write_model(tmp_path / "m.h5", {"d": {"x": values}})
    assert scan(path).tensors["d/x"].dtype == dtype


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    """A 0-d tensor has one element; one with no elements has no bytes."""
    layers = {"d": {"s": np.array(3, np.float32), "e": np.zeros((0, 3), np.float32)}}
    path = write_model(tmp_path / "m.h5", layers)
    table = scan(path)
    assert table.tensors["d/s"].shape == ()
    assert read(table, "d/s") == np.float32(3).tobytes()
    assert table.tensors["d/e"].storage == Extent(0, 0)


def test_a_user_block_shifts_all_offsets(tmp_path: Path) -> None:
    """A file that begins with a block of the user's own is read all the same."""
    path = write_model(tmp_path / "m.h5", {"d": {"k": KERNEL}}, userblock_size=1024)
    assert read(scan(path), "d/k") == KERNEL.tobytes()


def test_files_of_the_latest_format_version(tmp_path: Path) -> None:
    """libver='latest' writes other headers with the same content."""
    path = write_model(tmp_path / "m.h5", {"d": {"k": KERNEL}}, libver="latest")
    assert read(scan(path), "d/k") == KERNEL.tobytes()


# --- what is refused ------------------------------------------------------------------------------


def _edit(path: Path, edit: Any) -> Path:
    with h5py.File(path, "r+") as file:
        edit(file)
    return path


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04rest", b"\x89HDF\r\n\x1a\n"])
def test_what_is_no_hdf5_file(tmp_path: Path, content: bytes) -> None:
    """Empty, foreign and cut-off files give one line that names them."""
    path = tmp_path / "m.h5"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"m\.h5: (is|holds)") as caught:
        scan(path)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_truncation_at_many_places(tmp_path: Path) -> None:
    """However many bytes are missing, the file is refused with its name, without a traceback."""
    whole = write_model(tmp_path / "whole.h5", {"d": {"k": KERNEL}, "e": {"k": KERNEL}})
    content = whole.read_bytes()
    path = tmp_path / "m.h5"
    for size in range(0, len(content), 397):
        path.write_bytes(content[:size])
        with pytest.raises(FormatError, match=r"m\.h5: "):
            scan(path)


def test_a_fifo_is_refused_without_waiting(tmp_path: Path) -> None:
    """A named pipe would make h5py hang for ever."""
    os.mkfifo(tmp_path / "m.h5")
    with pytest.raises(FormatError, match="not a regular file"):
        scan(tmp_path / "m.h5")


def test_a_file_that_is_still_written(tmp_path: Path) -> None:
    """A checkpoint that its trainer holds open is refused with that reason."""
    path = write_model(tmp_path / "m.h5", {"d": {"k": KERNEL}})
    code = f"import h5py; f = h5py.File({str(path)!r}, 'r+'); print('open', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "open\n"
        with pytest.raises(FormatError, match=r"m\.h5: is still being written"):
            scan(path)
        trainer.communicate("\n")
    assert list(scan(path).tensors) == ["d/k"]


def test_an_empty_weights_file_is_reported_from_a_model(tmp_path: Path) -> None:
    """Keras 3's .weights.h5 has another layout, and the message says that nothing is in it."""
    path = tmp_path / "m.weights.h5"
    with h5py.File(path, "w") as file:
        file.create_group("layers/dense/vars")
    with pytest.raises(FormatError, match=r"is a Keras weights file that holds no tensor"):
        scan(path)


def test_other_hdf5_files_are_reported_what_is_missing(tmp_path: Path) -> None:
    """Any HDF5 file that holds no model says what it holds."""
    path = tmp_path / "m.h5"
    with h5py.File(path, "w") as file:
        file["data"] = [1]
    with pytest.raises(FormatError, match="expected the group 'model_weights', found data"):
        scan(path)


# --- the sandbox ----------------------------------------------------------------------------------


def _crash(item: str, alive: Any) -> str:
    alive()
    if item == "crash":
        os.kill(os.getpid(), 11)
    if item == "exit":
        os._exit(3)
    if item == "memory":
        return str(len(bytearray(1 << 40)))
    if item == "error":
        raise OutputError("no room")
    if item == "bug":
        raise ZeroDivisionError
    return item.upper()


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_a_crash_costs_one_error_and_no_other_item(jobs: int) -> None:
    """Whatever happens to a child, the other files are still read, in order."""
    items = ["a", "crash", "b", "exit", "c", "memory", "error", "d"]
    outcomes = list(sandbox.run_each(_crash, items, items, jobs))
    assert [o for o in outcomes if isinstance(o, str)] == ["A", "B", "C", "D"]
    crash, exited, memory, error = (o for o in outcomes if isinstance(o, PolyakError))
    assert "SIGSEGV" in str(crash)
    assert str(crash).startswith("crash: ")
    assert "exit 3" in str(exited)
    assert "MB of memory" in str(memory)
    assert isinstance(error, OutputError)


def test_a_bug_in_a_child_keeps_its_traceback() -> None:
    """What is no bad input is not called one."""
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        list(sandbox.run_each(_crash, ["bug"], ["bug"]))


def _spin(item: str, _alive: Any) -> str:
    while item:
        pass
    return item


def test_a_child_says_nothing_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    """What the allocator or a library prints before a crash does not reach the terminal."""

    def task(item: str, alive: Any) -> str:
        alive()
        os.write(2, b"corrupted double-linked list\n")
        return item

    assert list(sandbox.run_each(task, ["a"], ["a"])) == ["a"]
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_a_child_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop without a sign of life ends at the limit of processor time."""
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 1)
    (outcome,) = sandbox.run_each(_spin, ["x"], ["x"])
    assert isinstance(outcome, FormatError)
    assert "without a heartbeat" in str(outcome)


def _sleep(item: str, _alive: Any) -> str:
    import time

    time.sleep(60)
    return item


def test_a_child_that_waits_for_ever_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that does not answer ends at the limit of patience."""
    monkeypatch.setattr(sandbox, "WALL_SECONDS", 0.2)
    (outcome,) = sandbox.run_each(_sleep, ["x"], ["x"])
    assert "without a heartbeat" in str(outcome)


# --- laying out -----------------------------------------------------------------------------------


def lay_out(template: Path, output: Path, *, drop: bool = False, dtype: str | None = None) -> Path:
    """Lay out an output with room for all float tensors, which stay unwritten."""
    table = scan(template)
    averaged = {
        spec.location: dtype or spec.dtype
        for spec in table.tensors.values()
        if "float" in spec.dtype
    }
    formats.write_skeleton(table, output, averaged=averaged, drop_optimizer=drop, provenance="{}")
    return output


def test_everything_but_the_numbers_is_carried(tmp_path: Path) -> None:
    """Attributes of every kind, groups, other tensors and unreferenced datasets survive."""
    layers = {"d": {"k": KERNEL, "n": np.array([1, 2]), "s": np.array(["ü", "b"], object)}}
    state = {"sgd/iteration": np.array(7)}
    path = write_model(tmp_path / "m.h5", layers, optimizer=state)

    def edit(file: Any) -> None:
        file["extra/deep/data"] = np.arange(3)
        file["model_weights/d/k"].attrs["unit"] = np.float64(2)
        file["model_weights"].attrs["flags"] = np.array([True, False])
        file.attrs["empty"] = h5py.Empty("f4")
        file.attrs["long"] = "x" * 700_000

    output = lay_out(_edit(path, edit), tmp_path / "o.h5")
    with h5py.File(output) as file, h5py.File(path) as source:
        assert set(file.attrs) == {*source.attrs, "polyak_provenance"}
        assert file.attrs["long"] == "x" * 700_000
        assert file["extra/deep/data"][:].tolist() == [0, 1, 2]
        assert file["model_weights/d/k"].attrs["unit"] == 2
        assert file["model_weights"].attrs["flags"].tolist() == [True, False]
        assert file["model_weights/d/n"][:].tolist() == [1, 2]
        assert file["model_weights/d/s"].asstr()[:].tolist() == ["ü", "b"]
        assert file["optimizer_weights/sgd/iteration"][()] == 7


def test_hard_links_stay_hard_links(tmp_path: Path) -> None:
    """A tensor under two names is stored once in the output too."""
    path = write_model(tmp_path / "m.h5", {"d": {"k": KERNEL}})
    _edit(path, lambda f: f.__setitem__("alias", f["model_weights/d/k"]))
    output = lay_out(path, tmp_path / "o.h5")
    with h5py.File(output) as file:
        assert file["alias"] == file["model_weights/d/k"]


def test_what_is_dropped_leaves_no_dead_space(tmp_path: Path) -> None:
    """The output without optimizer state is as small as a file that never had one."""
    layers = {"d": {"k": np.zeros((100, 100), np.float32)}}
    without = write_model(tmp_path / "a.h5", layers)
    state = {"sgd/momentum": np.ones((100, 100), np.float32)}
    with_state = write_model(tmp_path / "b.h5", layers, optimizer=state)
    outputs = [
        lay_out(without, tmp_path / "oa.h5"),
        lay_out(with_state, tmp_path / "ob.h5", drop=True),
    ]
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert b"momentum" not in outputs[1].read_bytes()


@pytest.mark.parametrize(
    ("dtype", "stored"), [("float16", "<f2"), ("float64", "<f8"), ("bfloat16", "|V2")]
)
def test_the_stored_type_can_be_changed(tmp_path: Path, dtype: str, stored: str) -> None:
    """Room is made for the wanted type."""
    output = lay_out(
        write_model(tmp_path / "m.h5", {"d": {"k": KERNEL}}), tmp_path / "o.h5", dtype=dtype
    )
    with h5py.File(output) as file:
        assert file["model_weights/d/k"].dtype == np.dtype(stored)
        assert file["model_weights/d/k"].shape == (2, 3)


def test_layouts_repeat_byte_for_byte(tmp_path: Path) -> None:
    """No time of day enters the output, even from a template that keeps times."""
    path = write_model(tmp_path / "m.h5", {"d": {"k": KERNEL}}, libver="latest", track_order=True)
    one = lay_out(path, tmp_path / "a.h5").read_bytes()
    assert one == lay_out(path, tmp_path / "b.h5").read_bytes()


# --- publishing -----------------------------------------------------------------------------------


def test_a_published_file_appears_whole_with_the_user_s_mode(tmp_path: Path) -> None:
    """The output takes its name at the end, with the permissions of any new file."""
    old = os.umask(0o027)
    try:
        with publishing.publish(tmp_path / "o.h5", force=False) as hidden:
            assert hidden.parent == tmp_path
            assert hidden.name.startswith(".")
            hidden.write_bytes(b"new")
            assert not (tmp_path / "o.h5").exists()
    finally:
        os.umask(old)
    assert (tmp_path / "o.h5").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "o.h5").stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["o.h5"]


@pytest.mark.parametrize("force", [True, False])
def test_what_gets_its_name_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    """The file is synced before it is named, and its folder afterwards."""
    events: list[str] = []
    sync, link, rename = os.fsync, os.link, Path.replace

    def synced(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def linked(one: Path, other: Path) -> None:
        events.append("named")
        link(one, other)

    def renamed(one: Path, other: Path) -> Path:
        events.append("named")
        return rename(one, other)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "link", linked)
    monkeypatch.setattr(Path, "replace", renamed)
    with publishing.publish(tmp_path / "o.h5", force=force) as hidden:
        hidden.write_bytes(b"new")
    assert events == ["file", "named", "folder"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_old_output_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    """On any exception, an interrupt too, the hidden file is gone and the old one intact."""
    (tmp_path / "o.h5").write_bytes(b"old")
    with pytest.raises(error), publishing.publish(tmp_path / "o.h5", force=True) as hidden:
        hidden.write_bytes(b"half")
        raise error
    assert (tmp_path / "o.h5").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["o.h5"]


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """Without --force, whoever came first keeps the name."""
    with (
        pytest.raises(OutputError, match="already exists"),
        publishing.publish(tmp_path / "o.h5", force=False) as hidden,
    ):
        hidden.write_bytes(b"ours")
        (tmp_path / "o.h5").write_bytes(b"theirs")
    assert (tmp_path / "o.h5").read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["o.h5"]


@pytest.mark.parametrize("appears", [False, True])
def test_where_there_are_no_hard_links_a_file_is_not_replaced_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, appears: bool
) -> None:
    """FAT and some networks: the output gets its name, unless another file has it by then."""

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    expected = pytest.raises(OutputError, match="already exists") if appears else nullcontext()
    with expected, publishing.publish(tmp_path / "o.h5", force=False) as hidden:
        hidden.write_bytes(b"ours")
        if appears:
            (tmp_path / "o.h5").write_bytes(b"theirs")
    assert (tmp_path / "o.h5").read_bytes() == (b"theirs" if appears else b"ours")
    assert os.listdir(tmp_path) == ["o.h5"]


def test_replacing_keeps_the_mode_and_follows_a_link(tmp_path: Path) -> None:
    """An output that is a symbolic link stays one; what it points to is replaced."""
    (tmp_path / "real.h5").write_bytes(b"old")
    (tmp_path / "real.h5").chmod(0o600)
    (tmp_path / "o.h5").symlink_to("real.h5")
    with publishing.publish(tmp_path / "o.h5", force=True) as hidden:
        hidden.write_bytes(b"new")
    assert (tmp_path / "o.h5").is_symlink()
    assert (tmp_path / "real.h5").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "real.h5").stat().st_mode) == 0o600


def test_an_output_that_is_an_input_is_refused_through_links(tmp_path: Path) -> None:
    """--force does not help: a hard or symbolic link to a checkpoint is the checkpoint."""
    path = write_model(tmp_path / "m.h5", {"d": {"k": KERNEL}})
    table = scan(path)
    (tmp_path / "soft.h5").symlink_to(path)
    os.link(path, tmp_path / "hard.h5")
    for name in ("m.h5", "soft.h5", "hard.h5"):
        with pytest.raises(OutputError, match="is the checkpoint"):
            formats_outputs.check_output(tmp_path / name, [table], force=True)


def test_no_room_is_reported_before_the_work(tmp_path: Path) -> None:
    """An output larger than the disk is refused with both sizes."""
    with pytest.raises(OutputError, match="free; make room"):
        publishing.check_room(tmp_path / "o.h5", 1 << 60)


def test_what_it_wrote_is_recognised(tmp_path: Path) -> None:
    """An average is distinguished from a checkpoint and from files that are no HDF5."""
    path = write_model(tmp_path / "m.h5", {"d": {"k": KERNEL}})
    output = lay_out(path, tmp_path / "o.h5")
    (tmp_path / "text.h5").write_text("text")
    assert formats.find_polyak_outputs([path, output, tmp_path / "text.h5"]) == {output}


def test_filter_plugins_are_off() -> None:
    """A file cannot make libhdf5 load a shared object."""
    assert library.SIGNATURE
    assert os.environ["HDF5_PLUGIN_PRELOAD"] == "::"


# --- checkpoints of the same skeleton -------------------------------------------------------------


def test_checkpoints_that_differ_in_values_share_one_scan(tmp_path: Path) -> None:
    """One table serves all; each keeps its own path and identity, and its own values."""
    paths = [
        write_model(tmp_path / f"m_{k}.h5", {"d": {"k": KERNEL + k, "b": np.zeros(99_999)}})
        for k in range(3)
    ]
    tables = formats.scan(paths)
    assert all(table.tensors is tables[-1].tensors for table in tables)
    assert [table.path for table in tables] == paths
    assert [table.files[0].version.inode for table in tables] == [
        path.stat().st_ino for path in paths
    ]
    assert [read(table, "d/k") for table in tables] == [(KERNEL + k).tobytes() for k in range(3)]


@pytest.mark.parametrize("where", ["name", "attribute", "last byte of the header"])
def test_one_other_byte_outside_of_the_tensors_is_another_skeleton(
    tmp_path: Path, where: str
) -> None:
    """A header that differs in one byte is read again, whatever it says."""
    layers = {"d": {"kernel": KERNEL, "b": np.zeros(99_999, np.float32)}}
    paths = [write_model(tmp_path / f"m_{k}.h5", layers) for k in range(2)]
    content = bytearray(paths[0].read_bytes())
    if where == "name":
        content = content.replace(b"kernel", b"kermel")
    elif where == "attribute":
        content = content.replace(b"3.15.1", b"3.15.2")
    else:
        offset = scan(paths[0]).tensors["d/b"].storage
        assert isinstance(offset, Extent)
        content[offset.offset - 1] ^= 1
    paths[0].write_bytes(content)
    tables = formats.scan(paths)
    assert tables[0].tensors is not tables[1].tensors
    assert next(iter(tables[0].tensors)) == ("d/kermel" if where == "name" else "d/kernel")


@settings(
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the fixture changes nothing
)
@given(
    spans=st.lists(st.tuples(st.integers(0, 999), st.integers(1, 400)), max_size=8),
    flipped=st.lists(st.lists(st.integers(0, 999), max_size=4), max_size=6),
    beside=st.integers(-1, 1),
    step=st.integers(1, 1200),
    along=st.integers(0, 500),
    at_a_time=st.integers(1, 3),
)
@pytest.mark.slow
def test_files_of_the_same_skeleton_differ_within_tensors_only(
    tmp_path_factory: pytest.TempPathFactory,
    spans: list[tuple[int, int]],
    flipped: list[list[int]],
    beside: int,
    step: int,
    along: int,
    at_a_time: int,
) -> None:
    """Files have the template's skeleton if all bytes that differ lie in tensors.

    Wherever the tensors lie, whatever their size is for which they are read along, and however many
    bytes are compared and files are open at a time.
    """
    folder = tmp_path_factory.mktemp("skeletons")
    # Where tensors begin and end is where a mistake would be.
    edges = [e + beside for s, n in spans for e in (s, s + n) if 0 <= e + beside < 1000]
    flipped = [*flipped, *([edge] for edge in edges)]
    content = np.random.default_rng(0).bytes(1000)
    files = []
    for k, places in enumerate([[], *flipped]):
        other = bytearray(content)
        for place in set(places):
            other[place] ^= 1
        (folder / str(k)).write_bytes(other)
        files.append(File(str(folder / str(k)), Version.of((folder / str(k)).stat())))
    inside = {p for start, length in spans for p in range(start, min(start + length, 1000))}
    tensors = {
        str(k): TensorSpec(str(k), (), "uint8", "<", "", Extent(start, min(length, 1000 - start)))
        for k, (start, length) in enumerate(spans)
    }
    table = Table(folder / "0", "hdf5", (files[0],), tensors, {}, frozenset(), "", False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(same_skeleton, "_STEP", step)
        patch.setattr(same_skeleton, "_ALONG", along)
        patch.setattr(same_skeleton, "_OPEN", at_a_time)
        found = same_skeleton.compare_skeletons(table, files[1:])
    assert found == [inside >= {*places} for places in flipped]


def test_a_file_of_the_same_skeleton_that_is_still_written_is_refused(tmp_path: Path) -> None:
    """The same bytes do not help while a trainer holds the file."""
    paths = [write_model(tmp_path / f"m_{k}.h5", {"d": {"k": KERNEL}}) for k in range(2)]
    with open(paths[0], "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(FormatError, match=r"m_0\.h5: is still being written"):
            formats.scan(paths)
    assert len(formats.scan(paths)) == 2


def test_an_unfinished_scan_of_the_parent_is_not_ended_by_a_child() -> None:
    """A child inherits what its parent has not finished, and leaves it alone."""
    unfinished = sandbox.run_each(_sleep_a_little, ["a", "b"], ["a", "b"])
    assert next(unfinished) == "a"

    def close(item: str, _alive: Any) -> str:
        unfinished.close()
        return item

    (outcome,) = sandbox.run_each(close, ["c"], ["c"])
    assert outcome == "c"
    assert next(unfinished) == "b"


def _sleep_a_little(item: str, _alive: Any) -> str:
    import time

    time.sleep(0.5 if item == "b" else 0)
    return item


def test_large_carried_tensors_are_copied_bit_for_bit(tmp_path: Path) -> None:
    """Tensors beyond what libhdf5 copies at once, of any plain type, keep type and values."""
    rng = np.random.default_rng(0)
    layers: dict[str, Any] = {
        "d": {"k": KERNEL, "ints": rng.integers(0, 2**40, 1_000_000), "big": np.arange(9.0)}
    }
    state = {"m": rng.normal(size=600_000).astype(">f4"), "text": np.array([b"ab"] * 99_999)}
    path = write_model(tmp_path / "m.h5", layers, optimizer=state)
    output = lay_out(path, tmp_path / "o.h5")
    with h5py.File(output) as file, h5py.File(path) as source:
        for name in ("model_weights/d/ints", "optimizer_weights/m", "optimizer_weights/text"):
            assert file[name].dtype == source[name].dtype
            assert file[name][:].tobytes() == source[name][:].tobytes()


def test_comparing_skeletons_reads_no_tensor_of_over_a_page(tmp_path: Path) -> None:
    """Not one byte of it in any of the files, but every byte outside tensors."""
    layers = {
        "d": {"k": np.zeros(100_000), "page": np.zeros(512), "more": np.zeros(513)},
        "e": {"k": np.zeros(100_000)},
    }
    paths = [write_model(tmp_path / f"m_{k}.h5", layers) for k in range(3)]
    table = scan(paths[0])
    files = [File(str(path), Version.of(path.stat())) for path in paths]
    with count_reads(tmp_path) as log:
        assert same_skeleton.compare_skeletons(table, files[1:]) == [True, True]
    for file in files:
        seen = np.zeros(file.version.size, bool)
        for read in log.reads():
            if read.path == file.path:
                seen[read.offset : read.offset + read.nbytes] = True
        for spec in table.tensors.values():
            assert isinstance(spec.storage, Extent)
            extent = slice(spec.storage.offset, spec.storage.offset + spec.nbytes)
            assert spec.nbytes <= 4096 or not seen[extent].any()
            seen[extent] = True
        assert seen.all()  # all else was compared
