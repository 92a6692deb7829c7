from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyak_cli.errors import FormatError
from polyak_cli.processes import sandbox
from polyak_cli.storage import Store, Version, open_input, resolve
from polyak_cli.storage.local import LocalOutput, LocalStore, copy_range, open_local
from tests.counting import Read, count_reads
from tests.storage_contract import CONTENT, StoreContract


class TestLocalStore(StoreContract):
    """Files of this machine."""

    @pytest.fixture
    def store(self) -> Store:
        """Return the one local store."""
        return LocalStore()

    @pytest.fixture
    def root(self, tmp_path: Path) -> str:
        """Return an empty folder."""
        (tmp_path / "root").mkdir()
        return str(tmp_path / "root")

    def put(self, key: str, content: bytes) -> None:
        """Write a new file, as an editor does: under another name, then renamed."""
        beside = Path(f"{key}.tmp")
        beside.write_bytes(content)
        beside.rename(key)

    @pytest.mark.parametrize("kind", ["folder", "fifo", "device"])
    def test_only_regular_files_are_opened(self, store: Store, root: str, kind: str) -> None:
        """A folder, a FIFO without a writer and a device are refused at once."""
        path = f"{root}/odd"
        if kind == "folder":
            Path(path).mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        else:
            Path(path).symlink_to("/dev/zero")
        with pytest.raises(FormatError, match="/odd: is not a regular file"):
            store.open(path)

    def test_no_descriptor_is_lost(self, store: Store, root: str) -> None:
        """Whether opening succeeds, is refused, or a file is closed twice."""
        self.put(f"{root}/a", b"abc")
        before = os.listdir("/proc/self/fd")
        with store.open(f"{root}/a") as file:
            file.close()
        with pytest.raises(FormatError):
            store.open(f"{root}/a", Version(0, 0, 0, 0))
        with pytest.raises(FormatError):
            store.open(root)
        assert os.listdir("/proc/self/fd") == before


def test_names_resolve_to_the_local_store(tmp_path: Path) -> None:
    """A path, as text or as an object, is a key of the local store."""
    for name in (tmp_path / "a", str(tmp_path / "a")):
        store, key = resolve(name)
        assert (type(store), key) == (LocalStore, str(tmp_path / "a"))
    (tmp_path / "a").write_bytes(b"abc")
    with open_input(tmp_path / "a") as file:
        assert file.read(0, 9) == b"abc"


@given(
    offset=st.integers(0, 1000),
    nbytes=st.integers(0, 5000),
    to=st.integers(0, 1000),
    step=st.integers(1, 2000),
)
def test_a_range_is_copied_exactly(
    tmp_path_factory: pytest.TempPathFactory, offset: int, nbytes: int, to: int, step: int
) -> None:
    """Whatever the pieces, the bytes arrive at their place and nothing else changes."""
    folder = tmp_path_factory.mktemp("copy")
    (folder / "a").write_bytes(CONTENT)
    (folder / "b").write_bytes(b"\xff" * 7000)
    alive: list[None] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("polyak_cli.storage.local._STEP", step)
        with open_local(folder / "a") as source, LocalOutput(str(folder / "b")) as target:
            copy_range(source, offset, target, to, nbytes, lambda: alive.append(None))
    expected = b"\xff" * to + CONTENT[offset : offset + nbytes] + b"\xff" * (7000 - to - nbytes)
    assert (folder / "b").read_bytes() == expected
    assert len(alive) == -(-nbytes // step)


def test_short_reads_and_writes_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system may move fewer bytes than it was asked to; the rest follows."""
    preadv, pread, pwrite = os.preadv, os.pread, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:3]], at))
    monkeypatch.setattr(os, "pread", lambda fd, nbytes, at: pread(fd, min(nbytes, 3), at))
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: pwrite(fd, view[:3], at))
    with LocalOutput(str(tmp_path / "a"), create=True) as output:
        output.write(0, CONTENT)
    buffer = np.empty(100, np.uint8)
    with open_local(tmp_path / "a") as file:
        file.read_into(5, buffer)
        assert file.read(7, 100) == CONTENT[7:107]
    assert buffer.tobytes() == CONTENT[5:105]
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_new_output_file_must_be_new(tmp_path: Path) -> None:
    """With ``create`` an existing file is not opened; without it a missing one is not made."""
    (tmp_path / "a").write_bytes(b"abc")
    with pytest.raises(FileExistsError):
        LocalOutput(str(tmp_path / "a"), create=True)
    with pytest.raises(FileNotFoundError):
        LocalOutput(str(tmp_path / "b"))
    with LocalOutput(str(tmp_path / "a")) as output:
        output.truncate(2)
        output.sync()
    assert (tmp_path / "a").read_bytes() == b"ab"


def test_reads_of_children_are_counted(tmp_path: Path) -> None:
    """A log that misses what a child reads would prove nothing."""
    (tmp_path / "a").write_bytes(bytes(100))

    def task(path: str, _alive: Any) -> int:
        with open_local(path) as file:
            return len(file.read(7, 20))

    with count_reads(tmp_path) as log:
        assert [*sandbox.run_each(task, [str(tmp_path / "a")], ["a"])] == [20]
    assert log.reads() == [Read(str(tmp_path / "a"), 7, 20)]
