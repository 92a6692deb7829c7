"""Runs of every format, written by the formats' own libraries or by hand, never by the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests import (
    dcp,
    test_hdf5,
    test_keras_zip,
    test_modules,
    test_npz,
    test_safetensors,
    test_tf_bundle,
    test_torch_zip,
    test_weights,
)
from tests.command import polyak
from tests.contract import Tensors


class Kind(NamedTuple):
    """One format.

    Attributes:
        name: of this row, in the names of tests.
        checkpoint: what a checkpoint is called, with a field for its epoch.
        output: what an average is called.
        write: writes one checkpoint.
    """

    name: str
    checkpoint: str
    output: str
    write: Callable[[Path, Tensors], object]


def _write_torch(path: Path, tensors: Tensors) -> None:
    """Write a state dict as `torch.save` does."""
    kinds = {"f4": "Float", "f2": "Half", "f8": "Double", "i8": "Long", "i4": "Int"}
    state = {
        name: test_torch_zip.view(
            test_torch_zip.storage(
                str(k), values.size, f"torch {kinds[values.dtype.str[1:]]}Storage"
            ),
            values.shape,
            tuple(step // values.itemsize for step in values.strides),
        )
        for k, (name, values) in enumerate(tensors.items())
    }
    members = {f"_{k}": values.reshape(-1) for k, values in enumerate(tensors.values())}
    test_torch_zip.archive(path, test_torch_zip.dictionary(state), **members)


def _write_bundle(path: Path, tensors: Tensors) -> None:
    """Write TensorFlow's index and its shard; floats only."""
    floats = {name: values for name, values in tensors.items() if values.dtype == np.float32}
    test_tf_bundle.Bundle(floats).write(path)


def _write_dcp(path: Path, tensors: Tensors) -> None:
    """Write a folder of two ranks as `torch.distributed.checkpoint` does."""
    dcp.write(path, {
        name: dcp.split(values, [2] if values.ndim == 1 else [1] * values.ndim)
        for name, values in tensors.items() if values.ndim
    })  # fmt: skip


KINDS: Sequence[Kind] = (
    Kind("safetensors", "model_{}.safetensors", "o.safetensors", test_safetensors.TestFile().write),
    Kind("shards", "model_{}", "o", test_safetensors.TestFolder().write),
    Kind("modules", "model_{}", "o", test_modules.TestModules().write),
    Kind("h5", "model_{}.h5", "o.h5", test_hdf5.TestWholeModels().write),
    Kind("weights", "model_{}.weights.h5", "o.weights.h5", test_weights.TestWeights().write),
    Kind("sharded", "model_{}.weights.json", "o.weights.h5", test_weights.TestShards().write),
    Kind("keras", "model_{}.keras", "o.keras", test_keras_zip.TestStored().write),
    Kind("deflated keras", "model_{}.keras", "o.keras", test_keras_zip.TestDeflated().write),
    Kind("npz", "model_{}.npz", "o.npz", test_npz.TestStored().write),
    Kind("deflated npz", "model_{}.npz", "o.npz", test_npz.TestDeflated().write),
    Kind("torch", "model_{}.pt", "o.pt", _write_torch),
    Kind("bundle", "model-{}.index", "o.index", _write_bundle),
    Kind("dcp", "model_{}", "o", _write_dcp),
)


def named(name: str) -> Kind:
    """Return the kind of a name."""
    return next(kind for kind in KINDS if kind.name == name)


def draw_tensors(seed: int, rows: int = 33) -> Tensors:
    """Return the tensors of one checkpoint: two that are averaged, one that is not a float.

    They are near to those of other seeds, as the checkpoints of one run are.
    """
    base, change = np.random.default_rng(0), np.random.default_rng(seed + 1)

    def values(*shape: int) -> np.ndarray:
        return np.asarray(base.normal(3, size=shape) + 0.01 * change.normal(size=shape), np.float32)

    return {"kernel": values(rows, 64), "bias": values(64), "table": np.arange(5, dtype="i4")}


def write_run(kind: Kind, folder: Path, count: int = 3, rows: int = 33) -> Path:
    """Write checkpoints of one run to a folder, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for epoch in range(1, count + 1):
        kind.write(folder / kind.checkpoint.format(epoch), draw_tensors(epoch, rows))
    return folder


def write_run_and_average(home: Path, rows: int) -> Path:
    """Write a run of safetensors to `run`, and its average, made from there, to `expected`."""
    write_run(named("safetensors"), home / "run", 3, rows)
    done = polyak("average", "run", "-o", "expected.safetensors", "-q", cwd=home)
    assert done.returncode == 0, done.stderr
    return home
