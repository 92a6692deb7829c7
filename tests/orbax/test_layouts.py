"""Ways in which Orbax and TensorStore lay out values that Orbax's newest version does not show."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore

from polyak_cli import average, inspect
from polyak_cli.errors import FormatError
from tests.contract import Tensors, assert_same, naive
from tests.orbax.test_orbax import load, save

ZSTD = {"id": "zstd", "level": 1}
SPECS: dict[str, Any] = {
    "zarr2": {"driver": "zarr", "metadata": {"compressor": None, "chunks": [4, 6]}},
    "zstd": {"driver": "zarr", "metadata": {"compressor": ZSTD, "chunks": [4, 6]}},
    "gzip": {
        "driver": "zarr",
        "metadata": {"compressor": {"id": "gzip", "level": 3}, "chunks": [4, 6]},
    },
    "zlib": {
        "driver": "zarr",
        "metadata": {"compressor": {"id": "zlib", "level": 3}, "chunks": [4, 6]},
    },
    "zarr3": {
        "driver": "zarr3",
        "metadata": {
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4, 6]}},
            "codecs": [{"name": "gzip", "configuration": {"level": 5}}],
        },
    },
    "shards": {
        "driver": "zarr3",
        "metadata": {
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [8, 12]}},
            "codecs": [{"name": "sharding_indexed", "configuration": {"chunk_shape": [4, 6]}}],
        },
    },
}


def rewrite(
    folder: Path, name: str, values: Any, spec: Any, fill: float = 0, *, complete: bool = False
) -> None:
    """Write an array of a checkpoint again with TensorStore, by default without empty chunks."""
    shutil.rmtree(folder / name)
    kvstore = f"file://{folder}/{name}/"
    opened = {**spec, "kvstore": kvstore, "store_data_equal_to_fill_value": complete}
    shape, dtype = values.shape, values.dtype
    store = tensorstore.open(opened, create=True, dtype=dtype, shape=shape, fill_value=fill)
    store.result()[...] = values
    path = folder / "_METADATA"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "store_array_data_equal_to_fill_value": complete}))


def make_sparse(k: int, fill: float, dtype: Any) -> Any:
    """Return a matrix whose corner and middle are one value."""
    values = np.random.default_rng(k).normal(5, 0.01, size=(16, 24)).astype(dtype)
    values[:8, :12] = fill
    values[8:12, 12:18] = fill
    return values


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("fill", [0.0, 1.5])
def test_chunks_that_are_not_stored_have_the_fill_value(
    tmp_path: Path, kind: str, fill: float
) -> None:
    """TensorStore leaves out chunks of the fill value, as Orbax let it until it said otherwise."""
    spec = SPECS[kind]
    models: list[Tensors] = []
    for k in range(3):
        values = make_sparse(k, fill, "f4")
        empty = np.full((8, 12), fill, "f4")
        models.append({"w": values, "empty": empty})
        folder = tmp_path / f"run/{k}"
        save(
            folder, {"w": values, "empty": empty}, use_ocdbt=False, use_zarr3="3" in spec["driver"]
        )
        for name, array in models[-1].items():
            rewrite(folder, name, array, spec, fill)
    assert len([*(tmp_path / "run/0").rglob("*")]) < len([*(tmp_path / "run/0/w").rglob("*")]) + 20
    average(tmp_path / "run", tmp_path / "o", coefficients=[1, 2, 4], verify=True)
    assert_same(load(tmp_path / "o"), naive(models, [1, 2, 4]))
    (found,) = inspect([tmp_path / "run/0"])
    storage = found.table.tensors["empty"].storage
    assert storage is not None
    assert "not stored" in storage.describe()


def test_chunks_that_must_be_there_are_missed(tmp_path: Path) -> None:
    """Newer versions store all chunks and say so: then a missing one was lost."""
    save(tmp_path / "m_1", {"w": np.ones((16, 24), "f4")}, use_ocdbt=False)
    rewrite(tmp_path / "m_1", "w", make_sparse(0, 0, "f4"), SPECS["zarr2"], complete=True)
    (tmp_path / "m_1/w/1.1").unlink()
    with pytest.raises(FormatError, match=r"m_1: tensor 'w' .*no chunk '1.1'; .* not complete"):
        average([tmp_path / "m_1"], tmp_path / "o")


@pytest.mark.parametrize(
    ("fill", "dtype", "is_read"),
    [
        ("NaN", "<f4", True),
        (None, "bfloat16", True),
        (0.0, "bfloat16", True),
        (7, "<i4", True),
        (1.5, "bfloat16", False),
        ([1], "<f4", False),
        ("x", "<f4", False),
        (1 << 70, "<i4", False),
    ],
)
def test_a_fill_value_is_read_or_refused(
    tmp_path: Path, fill: Any, dtype: str, is_read: bool
) -> None:
    """Values that numpy can make of the type are known; others are named."""
    tree = {"w": np.ones((4, 6), "f4"), "x": np.ones((4, 6), "f4")}
    save(tmp_path / "m_1", tree, use_ocdbt=False, use_compression=False)
    rewrite(tmp_path / "m_1", "w", tree["w"], SPECS["zarr2"])
    path = tmp_path / "m_1/w/.zarray"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "fill_value": fill, "dtype": dtype})
    )
    (tmp_path / "m_1/w/0.0").unlink()
    if is_read:
        assert len([*inspect([tmp_path / "m_1"])]) == 1
    else:
        with pytest.raises(FormatError, match=r"tensor 'w' has the fill_value"):
            [*inspect([tmp_path / "m_1"])]


def test_a_shape_of_chunks_that_are_not_there_is_refused(tmp_path: Path) -> None:
    """Millions of chunks of one element each, none of which is stored, are not believed."""
    save(tmp_path / "m_1", {"w": np.ones((4, 6), "f4")}, use_ocdbt=False)
    rewrite(tmp_path / "m_1", "w", np.zeros((4, 6), "f4"), SPECS["zarr2"])
    path = tmp_path / "m_1/w/.zarray"
    said = json.loads(path.read_text()) | {"shape": [1 << 21, 1], "chunks": [1, 1]}
    path.write_text(json.dumps(said))
    with pytest.raises(FormatError, match=r"m_1: tensor 'w' .*more than 65536 chunks are missing"):
        [*inspect([tmp_path / "m_1"])]


def store_again(folder: Path, config: Any) -> None:
    """Copy a checkpoint's database with TensorStore into one of other settings."""
    old = tensorstore.KvStore.open(f"file://{folder}/|ocdbt:").result()
    values = {key: old[key] for key in old.list().result()}
    for path in ("ocdbt.process_0", "d"):
        shutil.rmtree(folder / path, ignore_errors=True)
    (folder / "manifest.ocdbt").unlink()
    spec = {"driver": "ocdbt", "base": f"file://{folder}/", "config": config}
    new = tensorstore.KvStore.open(spec).result()
    for key, value in values.items():
        new[key] = value


def make_run(run: Path) -> list[Tensors]:
    """Save three steps of a small model."""
    rng = np.random.default_rng(0)
    models: list[Tensors] = [
        {"w": rng.normal(5, size=(30, 20)).astype("f4"), "b": rng.normal(5, size=3).astype("f4")}
        for _ in range(3)
    ]
    for k, model in enumerate(models):
        save(run / f"{k}", dict(model))
    return models


def test_numbered_manifests_are_read(tmp_path: Path) -> None:
    """The newest version counts, whose number is in the name of its manifest."""
    models = make_run(tmp_path / "run")
    for k in range(3):
        store_again(tmp_path / f"run/{k}", {"manifest_kind": "numbered"})
    assert [*(tmp_path / "run/2").glob("manifest.0*")]
    average(tmp_path / "run", tmp_path / "o", verify=True)
    assert_same(load(tmp_path / "o"), naive(models, [1, 1, 1]))
    assert not [*(tmp_path / "o").glob("manifest.0*")]
    (tmp_path / "run/2/manifest.ocdbt").write_bytes(
        (tmp_path / "run/1/manifest.ocdbt").read_bytes()
    )
    with pytest.raises(FormatError, match=r"run/2/manifest\.0.*no version of the database"):
        average(tmp_path / "run", tmp_path / "p")


def test_databases_of_several_versions_and_nodes_are_read(tmp_path: Path) -> None:
    """Nothing is compressed, nothing inline, and small nodes in several levels."""
    models = make_run(tmp_path / "run")
    config = {"max_inline_value_bytes": 0, "max_decoded_node_bytes": 64, "compression": None}
    for k in range(3):
        store_again(tmp_path / f"run/{k}", config)
    average(tmp_path / "run", tmp_path / "o", verify=True)
    assert_same(load(tmp_path / "o"), naive(models, [1, 1, 1]))


def test_databases_of_processes_that_were_not_merged_are_read(tmp_path: Path) -> None:
    """Each process of a run writes its chunks into a database of its own, merged at the end."""
    models = make_run(tmp_path / "run")
    for k in range(3):
        folder = tmp_path / f"run/{k}"
        old = tensorstore.KvStore.open(f"file://{folder}/|ocdbt:").result()
        values = {key: old[key] for key in old.list().result()}
        shutil.rmtree(folder / "ocdbt.process_0")
        shutil.rmtree(folder / "d")
        (folder / "manifest.ocdbt").unlink()
        for process in (0, 10, 2):
            spec = f"file://{folder}/ocdbt.process_{process}/|ocdbt:"
            new = tensorstore.KvStore.open(spec).result()
            for key, value in values.items():
                if key.endswith(b".zarray") or process == (10 if key.startswith(b"w") else 2):
                    new[key] = value
    average(tmp_path / "run", tmp_path / "o", verify=True)
    assert_same(load(tmp_path / "o"), naive(models, [1, 1, 1]))
    assert not [*(tmp_path / "o").glob("ocdbt.process_*/manifest*")]
    new[b"w/.zarray"] = b"{}"
    with pytest.raises(FormatError, match=r"run/2/ocdbt.process_\d+: holds another value of 'w/"):
        average(tmp_path / "run", tmp_path / "p")


@pytest.mark.parametrize("ocdbt", [True, False], ids=["database", "folders"])
def test_lists_of_orbax_0_4_do_not_name_the_kind_of_store(tmp_path: Path, ocdbt: bool) -> None:
    """The folder shows it; the first version of such a database is an empty tree."""
    rng = np.random.default_rng(0)
    models: list[Tensors] = []
    for k in range(2):
        models.append({"w": rng.normal(5, size=(30, 20)).astype("f4")})
        folder = tmp_path / f"run/{k}"
        save(folder, dict(models[-1]), use_ocdbt=ocdbt)
        said = json.loads((folder / "_METADATA").read_text())
        for key in ("use_ocdbt", "use_zarr3", "store_array_data_equal_to_fill_value"):
            del said[key]
        (folder / "_METADATA").write_text(json.dumps(said))
        if ocdbt:
            store_again(folder, {})
    average(tmp_path / "run", tmp_path / "o", verify=True)
    assert_same(load(tmp_path / "o"), naive(models, [1, 1]))
