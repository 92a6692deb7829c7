"""What every store must do, whatever it keeps its bytes in.

A store's tests inherit `StoreContract`, and say how to put bytes under a name, without the code
under test.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyak_cli.errors import FormatError
from polyak_cli.storage import Bytes, Store

CONTENT = bytes(range(256)) * 40


class StoreContract(ABC):
    """What must hold of inputs; see the module."""

    @pytest.fixture
    @abstractmethod
    def store(self) -> Store:
        """Return an empty store."""

    @pytest.fixture
    @abstractmethod
    def root(self, tmp_path: Path) -> str:
        """Return a prefix in the store under which nothing lies yet."""

    @abstractmethod
    def put(self, key: str, content: bytes) -> None:
        """Put bytes under a name, replacing what is there."""

    def test_an_input_has_its_size_and_name(self, store: Store, root: str) -> None:
        """Size and name are those of what was opened."""
        self.put(f"{root}/a", CONTENT)
        with store.open(f"{root}/a") as file:
            assert (file.size, file.name) == (len(CONTENT), f"{root}/a")

    @settings(
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.differing_executors,
        ],
        max_examples=30,
        deadline=None,  # a network answers when it likes
    )
    @given(data=st.data())
    def test_every_range_is_read_exactly(
        self, store: Store, root: str, data: st.DataObject
    ) -> None:
        """`read_into` fills the buffer with the bytes at the offset, and `read` returns them."""
        self.put(f"{root}/a", CONTENT)
        offset = data.draw(st.integers(0, len(CONTENT)))
        nbytes = data.draw(st.integers(0, len(CONTENT) - offset))
        with store.open(f"{root}/a") as file:
            buffer: Bytes = np.full(nbytes, 77, np.uint8)
            file.read_into(offset, buffer)
            assert buffer.tobytes() == file.read(offset, nbytes) == CONTENT[offset:][:nbytes]

    def test_reading_past_the_end(self, store: Store, root: str) -> None:
        """`read` returns fewer bytes there; `read_into`, which must be exact, is an error."""
        self.put(f"{root}/a", b"abc")
        with store.open(f"{root}/a") as file:
            assert (file.read(1, 10), file.read(3, 1), file.read(9, 1)) == (b"bc", b"", b"")
            with pytest.raises(FormatError, match="the file ends 2 bytes before the tensor does"):
                file.read_into(1, np.empty(4, np.uint8))

    def test_a_hint_changes_nothing(self, store: Store, root: str) -> None:
        """Bytes that were asked for ahead, even beyond the end, are read as before."""
        self.put(f"{root}/a", CONTENT)
        with store.open(f"{root}/a") as file:
            file.prefetch([(0, 10), (len(CONTENT) - 1, 100)])
            assert file.read(0, len(CONTENT)) == CONTENT

    def test_a_missing_name_is_an_error(self, store: Store, root: str) -> None:
        """One line says which name cannot be read."""
        with pytest.raises(FormatError, match="/none: cannot be read"):
            store.open(f"{root}/none")

    def test_versions_tell_whether_the_bytes_are_the_same(self, store: Store, root: str) -> None:
        """Two looks at one file give one version; a replaced file has another."""
        self.put(f"{root}/a", b"old")
        with store.open(f"{root}/a") as one, store.open(f"{root}/a") as other:
            assert one.version == other.version
            seen = one.version
        with store.open(f"{root}/a", seen) as file:
            assert file.read(0, 3) == b"old"
        self.put(f"{root}/a", b"newer")
        with (  # some notice it on opening, and some on reading
            pytest.raises(FormatError, match="changed while it was read; is training still"),
            store.open(f"{root}/a", seen) as file,
        ):
            file.read(0, 3)
