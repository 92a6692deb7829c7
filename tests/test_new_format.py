"""A format is added by one subclass of `Format` and one entry of `FORMATS`, and nothing else.

What every format has besides (contract, hostile files, a fuzz target, its row in the README and its
section in the guide) is listed here, so that none is forgotten for a new one.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import NamedTuple

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
from tests.command import ROOT
from tests.hostile import fuzz
from tests.test_front_door import ROWS
from tests.test_guide import defines

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


class Has(NamedTuple):
    """What there is for one format."""

    contract: str  # the subclass of `tests.contract.Contract`
    hostile: str  # a test of files that mean harm
    targets: tuple[str, ...]  # of `tests.hostile.fuzz`
    row: str  # of the README, how it begins
    section: str  # of the guide's page on formats


HOSTILE = "tests/hostile/test_hostile.py"
KERAS_WEIGHTS = "Keras 3 `.weights.h5` or", "Keras 3 weights, `.weights.h5`"
PYTORCH = "PyTorch: `.pt`, `.pth`, `.pth.tar`, `.bin`, `.ckpt`"
EVERY = {
    "hdf5": Has(
        "tests/test_hdf5.py::TestWholeModels",
        f"{HOSTILE}::test_hdf5",
        ("hdf5", "weights"),
        "Keras `.h5` files",
        "Keras whole model, `.h5`",
    ),
    "keras_zip": Has(
        "tests/test_keras_zip.py::TestStored",
        f"{HOSTILE}::test_archives",
        ("keras_zip",),
        "Keras 3 `.keras` files",
        "Keras 3 archive, `.keras`",
    ),
    "npz": Has(
        "tests/test_npz.py::TestStored",
        f"{HOSTILE}::test_archives",
        ("npz",),
        "JAX or numpy arrays in `.npz`",
        "numpy, `.npz`",
    ),
    "weights_json": Has(
        "tests/test_weights.py::TestShards",
        "tests/test_weights.py::test_hostile_maps_are_refused",
        ("weights_json",),
        *KERAS_WEIGHTS,
    ),
    "safetensors": Has(
        "tests/test_safetensors.py::TestFolder",
        "tests/test_safetensors.py::test_headers_that_mean_harm_are_refused",
        ("safetensors", "safetensors_index"),
        "Hugging Face folders",
        "safetensors",
    ),
    "torch_zip": Has(
        "tests/torch/test_torch.py::TestFlat",
        "tests/test_torch_zip.py::test_tensors_that_cannot_be_are_refused",
        ("torch_zip",),
        "PyTorch state dicts",
        PYTORCH,
    ),
    "torch_dcp": Has(
        "tests/torch/test_dcp.py::TestWhole",
        "tests/test_dcp.py::test_metadata_that_lie_are_refused",
        ("torch_dcp",),
        "PyTorch distributed checkpoints (DCP)",
        "PyTorch distributed checkpoints (DCP)",
    ),
    "orbax": Has(
        "tests/orbax/test_orbax.py::TestDefault",
        "tests/orbax/test_orbax.py::test_metadata_that_lie_are_refused",
        ("orbax",),
        "Orbax checkpoints of JAX",
        "Orbax: folders with `_METADATA`",
    ),
    "torch_shards": Has(
        "tests/torch/test_shards.py::TestShards",
        "tests/hf/test_bin.py::test_an_index_that_lies_is_refused",
        ("torch_shards",),
        "Hugging Face folders",
        PYTORCH,
    ),
    "modules": Has(
        "tests/test_modules.py::TestModules",
        "tests/test_modules.py::test_a_list_that_is_not_one_is_refused",
        ("modules",),
        "sentence-transformers folders",
        "sentence-transformers",
    ),
    "tf_bundle": Has(
        "tests/keras/test_tf_bundle.py::TestPlain",
        "tests/test_tf_bundle.py::test_what_means_harm_is_refused",
        ("tf_bundle",),
        "TensorFlow `ckpt-10.index`",
        "TensorFlow: `ckpt-10.index` and its shards",
    ),
}


def find_contracts() -> set[str]:
    """Return the test classes that inherit the contract directly or from one that does."""
    found: set[str] = set()
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        names = {"Contract"}
        for one in ast.parse(path.read_text()).body:
            if isinstance(one, ast.ClassDef) and names & {ast.unparse(b) for b in one.bases}:
                names.add(one.name)
                found.add(f"{path.relative_to(ROOT).as_posix()}::{one.name}")
    return found


def test_every_format_has_what_a_format_needs() -> None:
    """A contract suite, files that mean harm, a fuzz target, a row and a section."""
    assert EVERY.keys() == {entry.key for entry in catalogue.FORMATS}
    contracts = find_contracts()
    sections = (ROOT / "polyak_cli/guide/formats.md").read_text()
    for key, has in EVERY.items():
        assert has.contract in contracts, key
        path, _, name = has.hostile.partition("::")
        assert defines(ROOT / path, name), key
        assert any(have.startswith(has.row) for have in ROWS), key
        assert f"\n## {has.section}" in sections, key
    assert {one for has in EVERY.values() for one in has.targets} == fuzz.TARGETS.keys()
