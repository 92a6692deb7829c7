"""Every format is averaged from a bucket to the bytes that the same files on the disk give.

Files are written by the formats' own libraries or by hand, as in the tests of the formats.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

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
from tests.command import POLYAK, environment, script
from tests.contract import Contract
from tests.remote.servers import S3Bucket


def write_dcp(folder: Path) -> None:
    """Write distributed checkpoints: each tensor in parts of two files."""
    for step in (10, 20, 30):
        values = np.random.default_rng(step).normal(3, size=(40, 300)).astype("f4")
        dcp.write(folder / f"step-{step}", {"w": dcp.split(values, [2, 1])})


def write_torch(folder: Path) -> None:
    """Write PyTorch files."""
    folder.mkdir()
    for epoch in (1, 2, 3):
        values = np.random.default_rng(epoch).normal(3, size=30_000).astype("f4")
        content = test_torch_zip.dictionary({"w": test_torch_zip.tensor("0", values.size)})
        test_torch_zip.archive(folder / f"model_{epoch}.pt", content, **{"data/0": values})


def by_contract(contract: Contract) -> Callable[[Path], object]:
    """Return what writes the run of a format's contract."""
    return lambda folder: contract.write_run(folder, 3)


FORMATS: dict[str, tuple[Callable[[Path], object], str]] = {
    "hdf5": (by_contract(test_hdf5.TestWholeModels()), ".h5"),
    "weights": (by_contract(test_weights.TestWeights()), ".weights.h5"),
    "sharded weights": (by_contract(test_weights.TestShards()), ".weights.h5"),
    "keras": (by_contract(test_keras_zip.TestStored()), ".keras"),
    "deflated keras": (by_contract(test_keras_zip.TestDeflated()), ".keras"),
    "npz": (by_contract(test_npz.TestStored()), ".npz"),
    "deflated npz": (by_contract(test_npz.TestDeflated()), ".npz"),
    "modules": (by_contract(test_modules.TestModules()), ""),
    "folders": (by_contract(test_safetensors.TestFolder()), ""),
    "TensorFlow": (test_tf_bundle.write_run, ".index"),
    "PyTorch": (write_torch, ".pt"),
    "DCP": (write_dcp, ""),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_averaged_to_the_same_bytes(
    bucket: S3Bucket, tmp_path: Path, name: str
) -> None:
    """Every file of the output, with the record, equals that of a local average.

    So it is where objects are as large as those that are read by blocks.
    """
    write, suffix = FORMATS[name]
    write(tmp_path / "run")
    bucket.put_tree(tmp_path / "run", "some/run/")
    outputs = []
    by_blocks = script(
        "from polyak_cli.storage import mirrored, mirrors\n"
        "assert mirrored._SMALL and mirrors.WHOLE\n"
        "mirrored._SMALL = mirrors.WHOLE = 0"
    )
    for place, source, command in (
        ("here", "run", POLYAK),
        ("there", f"{bucket.url}/some/run/", POLYAK),
        ("blocks", f"{bucket.url}/some/run/", by_blocks),
    ):
        (tmp_path / place).mkdir()
        done = subprocess.run(
            [*command, "average", source, "-o", f"{place}/out{suffix}"],
            cwd=tmp_path,
            env=environment(**bucket.environ),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        paths = sorted(path for path in (tmp_path / place).rglob("*") if path.is_file())
        outputs.append({path.relative_to(tmp_path / place): path.read_bytes() for path in paths})
    assert outputs[0]
    assert outputs[0] == outputs[1] == outputs[2]
