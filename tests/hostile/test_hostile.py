"""Whatever a stranger's file holds: an average, or one line that names it; never anything else."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from polyak_cli import average, diff, inspect
from polyak_cli.errors import MismatchError, PolyakError
from tests import test_safetensors
from tests.command import one_line, polyak, tree
from tests.hostile import cases, fuzz
from tests.oracle import naive_average, read_model, write_model
from tests.test_keras_zip import members, write_archive
from tests.test_safetensors import put
from tests.test_tf_bundle import BROKEN
from tests.test_torch_zip import DAMAGED, GLOBALS, LIES, ONE, archive, call, dictionary, text

CODE = "__import__('os').system('touch ran')"
CONFIG = (
    '{"class_name": "Lambda", "config": {"function": "__import__(\'os\').system(\'touch x\')"}}'
)


def refusal(paths: list[Path], output: Path) -> str:
    """Return the one line with which averaging is refused; nothing is left."""
    with pytest.raises(PolyakError) as caught:
        average(paths, output)
    message = str(caught.value)
    assert message.isprintable()  # one line, and nothing that moves a terminal's cursor
    assert len(message) < 2000
    assert not output.exists()
    return message


def marked(names: Iterable[str]) -> list[Any]:
    """Return the names of cases, marked where it takes seconds to make the file."""
    slow = ("inflates", "twice among many", "bomb")
    return [
        pytest.param(name, marks=pytest.mark.slow if any(map(name.__contains__, slow)) else ())
        for name in names
    ]


@pytest.mark.parametrize("name", marked(cases.HDF5))
def test_hdf5(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each case alone, as the older and as the newer of two checkpoints."""
    monkeypatch.chdir(tmp_path)
    case = cases.HDF5[name]
    folder = tmp_path / "run"
    folder.mkdir()
    for k in (1, 2):
        case.make(folder / f"m_{k}.h5")
    paths = [folder / "m_1.h5", folder / "m_2.h5"]
    before = tree(tmp_path)
    if case.message:
        message = refusal(paths, tmp_path / "o.h5")
        assert re.search(case.message, message), message
        assert re.search(r"m_[12]\.h5|^tensor '|^nothing to average", message), message
        assert tree(tmp_path) == before
    else:
        average(paths, tmp_path / "o.h5")
        found, expected = read_model(tmp_path / "o.h5"), naive_average(paths, [0.5, 0.5])
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
        # The oracle names what has two names once.
        assert found.keys() - expected.keys() <= {"model_weights/e/x"}


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.HDF5)
def test_hdf5_looked_into(tmp_path: Path, name: str) -> None:
    """`inspect` and `diff` read the same files under the same rules."""
    case = cases.HDF5[name]
    path = tmp_path / "m.h5"
    case.make(path)
    for message in (
        looked(lambda: list(inspect([path], statistics=True))),
        looked(lambda: diff(path, path)),
    ):
        assert message == "" or case.message, message
        assert message == "" or (message.isprintable() and "m.h5" in message), message


def looked(look: Callable[[], object]) -> str:
    """Return the error of looking into a file, if there is one."""
    try:
        look()
    except PolyakError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", cases.NO_FILES)
def test_what_is_no_file(tmp_path: Path, name: str) -> None:
    """Pipes, sockets, devices, folders and lost links, in a directory and named by themselves."""
    folder = tmp_path / "run"
    folder.mkdir()
    cases.plain(folder / "m_1.h5")
    cases.NO_FILES[name].make(folder / "m_2.h5")
    for sources in ([folder], [folder / "m_1.h5", folder / "m_2.h5"]):
        with pytest.raises(PolyakError, match=rf"(?s)m_2\.h5.*{cases.NO_FILES[name].message}"):
            average(sources, tmp_path / "o.h5")
    assert os.listdir(tmp_path) == ["run"]


def test_nothing_is_read_from_the_machine(tmp_path: Path) -> None:
    """CVE-2026-1669: a tensor said to lie in another file never gives its bytes."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"24 bytes that are secret")
    for k in (1, 2):
        write_model(tmp_path / f"m_{k}.h5", {"d": {"k": cases.KERNEL}})
        with h5py.File(tmp_path / f"m_{k}.h5", "r+") as file:
            del file["model_weights/d/k"]
            where = [(str(secret), 0, 24)]
            file["model_weights/d"].create_dataset("k", (2, 3), "f4", external=where)
    message = refusal([tmp_path / "m_1.h5", tmp_path / "m_2.h5"], tmp_path / "o.h5")
    assert "points to another file" in message


def test_no_code_of_a_model_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2025-9905 and CVE-2025-1550: the configuration is text, which is copied and no more."""
    monkeypatch.chdir(tmp_path)
    for k in (1, 2):
        write_model(tmp_path / f"m_{k}.h5", {"d": {"k": cases.KERNEL}}, config=CONFIG)
    average([tmp_path / "m_1.h5", tmp_path / "m_2.h5"], tmp_path / "o.h5")
    list(inspect([tmp_path / "o.h5"], statistics=True))
    assert diff(tmp_path / "m_1.h5", tmp_path / "o.h5").equal
    assert sorted(os.listdir(tmp_path)) == ["m_1.h5", "m_2.h5", "o.h5"]
    with h5py.File(tmp_path / "o.h5") as file:
        assert file.attrs["model_config"] == CONFIG


def test_no_code_of_a_keras_archive_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2025-1550: a function that config.json names is text too, carried byte for byte."""
    monkeypatch.chdir(tmp_path)
    config = f'{{"module": "os", "class_name": "function", "config": "{CODE}"}}'.encode()
    for k in (1, 2):
        content = members({"d": cases.KERNEL}) | {"config.json": config}
        write_archive(tmp_path / f"m_{k}.keras", content)
    average([tmp_path / "m_1.keras", tmp_path / "m_2.keras"], tmp_path / "o.keras")
    list(inspect([tmp_path / "o.keras"], statistics=True))
    assert sorted(os.listdir(tmp_path)) == ["m_1.keras", "m_2.keras", "o.keras"]
    with zipfile.ZipFile(tmp_path / "o.keras") as archive:
        assert archive.read("config.json") == config


def without_traces(folder: Path, paths: list[Path], output: Path) -> list[str]:
    """Return how averaging, inspecting and comparing refuse files, which leaves nothing behind."""
    before = sorted(os.listdir(folder))
    messages = [
        refusal(paths, output),
        looked(lambda: list(inspect(paths[:1], statistics=True))),
        looked(lambda: diff(paths[0], paths[0])),
    ]
    assert sorted(os.listdir(folder)) == before
    assert all(message.isprintable() and len(message) < 2000 for message in messages)
    return messages


@pytest.mark.parametrize("name", marked(cases.ARCHIVES))
def test_archives(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each case of an .npz is averaged, or refused by whoever reads its values; all is silent."""
    monkeypatch.chdir(tmp_path)
    case = cases.ARCHIVES[name]
    paths = [tmp_path / "m_1.npz", tmp_path / "m_2.npz"]
    for path in paths:
        case.make(path)
    if case.message:
        reported, *others = without_traces(tmp_path, paths, tmp_path / "o.npz")
        assert re.search(case.message, reported), reported
        assert re.match(rf"{tmp_path}/m_[12]\.npz: ", reported), reported
        # What averaging refuses by type or sense alone, whoever only looks may read.
        only_averaged = re.search("not averaged|quantised", reported)
        assert all(only_averaged or re.search(case.message, other) for other in others), others
    else:
        average(paths, tmp_path / "o.npz")
        (inside,) = inspect([tmp_path / "m_1.npz"], statistics=True)
        json.dumps(inside.data())
        assert diff(*paths).equal
    assert capfd.readouterr() == ("", "")


PICKLES = {
    **{name: dictionary({"x": value}) for name, (value, _) in LIES.items()},
    **DAMAGED,
    **{function: dictionary({"x": call(function, text("touch ran"))}) for function in GLOBALS},
}
OTHERS: dict[str, Callable[[Path], object]] = {
    **{
        f"{name}.safetensors": partial(put, said=said, data=bytes(8))
        for name, (said, _) in test_safetensors.HOSTILE.items()
    },
    **{f"{name}.pt": partial(archive, content=each, _0=ONE) for name, each in PICKLES.items()},
    **{f"{name}.index": bundle.write for name, (bundle, _) in BROKEN.items()},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers, pickles and indexes that mean harm are refused in one line by every command."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"m_1.{name.rpartition('.')[2]}"
    OTHERS[name](path)
    for message in without_traces(tmp_path, [path], tmp_path / f"o{path.suffix}"):
        assert message.startswith(f"{tmp_path}/m_1."), message


@pytest.mark.parametrize("name", ["an exabyte that is not there (CVE-2026-0897)", "a soft link"])
def test_the_command_line_says_so_in_one_line(tmp_path: Path, name: str) -> None:
    """Exit 3, one line that names the file, no output, no traceback; in flat memory."""
    cases.HDF5[name].make(tmp_path / "m_1.h5")
    for command in (["average", "m_1.h5", "-o", "o.h5"], ["inspect", "m_1.h5"]):
        done = polyak(*command, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (3, "")
        assert one_line(done.stderr).startswith("m_1.h5: ")
    assert os.listdir(tmp_path) == ["m_1.h5"]


SWMR = "h5py.File(path, 'r+', libver='latest'); file.swmr_mode = True"
WRITERS = {
    "opened again": ("earliest", "h5py.File(path, 'r+')", "input()", "wait until it is closed"),
    "being read meanwhile": ("latest", SWMR, "input()", "wait until it is closed"),
    "killed": ("latest", "h5py.File(path, 'r+', libver='latest')", "os._exit(9)", "save it again"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_another_process_writes(tmp_path: Path, name: str) -> None:
    """It is refused with that reason by all commands, and what is left when the writer dies too."""
    libver, opening, ending, message = WRITERS[name]
    path = write_model(tmp_path / "m_1.h5", {"d": {"k": cases.KERNEL}}, libver=libver)
    code = f"import h5py, os; path = {str(path)!r}; file = {opening}; print(flush=True); {ending}"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "\n"
        if ending != "input()":
            writer.wait()
        for reported in without_traces(tmp_path, [path], tmp_path / "o.h5"):
            assert re.search(rf"m_1.h5: is still being written .*{message}", reported), reported
        writer.communicate("\n" if ending == "input()" else None)


def test_layers_in_another_order_are_refused(tmp_path: Path) -> None:
    """The same names in another order are another model: Keras loads layers by position."""
    one, other = {"d": {"k": cases.KERNEL}}, {"e": {"k": cases.KERNEL}}
    write_model(tmp_path / "m_1.h5", other | one)
    write_model(tmp_path / "m_2.h5", one | other)
    with pytest.raises(MismatchError, match=r"m_1.*layer 'e' where .*has 'd'.*m_2.h5.*position"):
        average([tmp_path / "m_1.h5", tmp_path / "m_2.h5"], tmp_path / "o.h5")


def test_weights_of_a_layer_may_be_listed_in_another_order(tmp_path: Path) -> None:
    """Freezing a layer between epochs changes the order of the list, not the names."""
    one, other = np.ones(3, np.float32), np.zeros(3, np.float32)
    write_model(tmp_path / "m_1.h5", {"n": {"a": one, "b": other}})
    write_model(tmp_path / "m_2.h5", {"n": {"b": other, "a": one}})
    average([tmp_path / "m_1.h5", tmp_path / "m_2.h5"], tmp_path / "o.h5")
    found = read_model(tmp_path / "o.h5")
    assert found["model_weights/n/a"].tolist() == [1, 1, 1]
    assert found["model_weights/n/b"].tolist() == [0, 0, 0]


@pytest.mark.soak
def test_truncation_at_any_byte(tmp_path: Path) -> None:
    """A file that ends anywhere before its end is refused, by name."""
    whole = cases.plain(tmp_path / "whole.h5").read_bytes()
    for first in range(0, len(whole), 1000):
        paths = [tmp_path / f"m_{n}.h5" for n in range(first, min(first + 1000, len(whole)))]
        for length, path in enumerate(paths, start=first):
            path.write_bytes(whole[:length])
        for path, message in fuzz.outcomes(paths):
            assert message.startswith(f"{path}: "), message
            path.unlink()


def test_a_folder_that_may_not_be_read(tmp_path: Path) -> None:
    """Permissions are reported as they are; root may read everything."""
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    folder = tmp_path / "run"
    folder.mkdir()
    cases.plain(folder / "m_1.h5").chmod(0)
    with pytest.raises(PolyakError, match=r"m_1\.h5.*Permission denied"):
        average([folder], tmp_path / "o.h5")
    assert stat.S_IMODE((folder / "m_1.h5").stat().st_mode) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_mutated_headers(name: str) -> None:
    """A few hundred of what `make fuzz` tries: each is read or refused in one line."""
    ends = fuzz.fuzz(name, 300, seed=7)
    assert ends.total() == 300
    assert ends["refused"] > 100
