"""A format is added by one subclass of `Format` and one entry of `FORMATS`, and nothing else."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

from polyak_cli import average
from polyak_cli.checkpoints import listing
from polyak_cli.formats import catalogue
from polyak_cli.formats.catalogue import Entry, find_format
from polyak_cli.formats.format import Draft, Format, ScanRequest, SkeletonRequest
from polyak_cli.processes.sandbox import Heartbeat
from polyak_cli.storage import open_input
from polyak_cli.storage.local import LocalOutput
from polyak_cli.tensors import Extent, Placement, Table, TensorSpec

MAGIC = b"TOY1"


class Toy(Format):
    """Four bytes that mark the format, and float32 values to the end of the file."""

    key = "toy"
    name = "toy"
    suffixes = (".toy",)

    def scan(self, request: ScanRequest, heartbeat: Heartbeat) -> Table:
        """See `Format.scan`."""
        heartbeat()
        with open_input(request.path) as file:
            nbytes = file.size - 4
        where = Extent(4, nbytes)
        spec = TensorSpec("x", (nbytes // 4,), "float32", "<", "x", where)
        return Table(Path(request.path), self.key, (), {"x": spec}, {}, frozenset(), "", False)

    def write_skeleton(self, request: SkeletonRequest, heartbeat: Heartbeat) -> Draft:
        """See `Format.write_skeleton`."""
        heartbeat()
        with LocalOutput(request.output) as output:
            output.write(0, MAGIC)
            output.truncate(4 + request.template.tensors["x"].nbytes)
        return Draft({"x": Placement(4, "float32", "<")})

    def is_polyak_output(self, path: str, heartbeat: Heartbeat) -> bool:
        """See `Format.is_polyak_output`."""
        del path, heartbeat
        return False


def test_a_new_format_is_found_recognised_and_averaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory of its files is listed, scanned, folded and written like any other."""
    entry = Entry("toy", f"{__name__}:Toy", lambda o: o.head.startswith(MAGIC), {".toy": ".toy"})
    monkeypatch.setattr(catalogue, "FORMATS", (*catalogue.FORMATS, entry))
    importlib.reload(listing)  # the suffixes of a directory's checkpoints follow from the entries
    find_format.cache_clear()
    try:
        values = [np.arange(6, dtype="<f4") * k for k in (1, 3)]
        for k, value in enumerate(values):
            (tmp_path / f"m_{k}.toy").write_bytes(MAGIC + value.tobytes())
        report = average([tmp_path / f"m_{k}.toy" for k in (0, 1)], tmp_path / "o.toy")
        assert [one.path.name for one in report.plan.checkpoints] == ["m_0.toy", "m_1.toy"]
        expected = MAGIC + (np.arange(6, dtype="<f4") * 2).tobytes()
        assert (tmp_path / "o.toy").read_bytes() == expected
        assert listing.find_kind(tmp_path / "m_0.toy") == ".toy"
    finally:
        monkeypatch.undo()
        importlib.reload(listing)
        find_format.cache_clear()
