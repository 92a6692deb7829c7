"""Running means in buckets: their steps and widths are found there as in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from polyak_cli import average
from tests.remote.servers import S3Bucket


def test_snapshots_and_running_means_in_a_bucket_are_combined(
    bucket: S3Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes are those of a local run; the list of snapshots may lie in the bucket too."""
    for key, value in bucket.environ.items():
        monkeypatch.setenv(key, value)
    rng, rows = np.random.default_rng(0), ["file,step,sigma"]
    (tmp_path / "emas").mkdir()
    for step in (20, 40):
        for sigma in (0.05, 0.1):
            name = f"run-{step:05d}-{sigma:.3f}.safetensors"
            save_file({"w": rng.normal(size=5)}, tmp_path / "emas" / name)
            rows.append(f"{name},{step},{sigma}")
    bucket.put_tree(tmp_path / "emas", "emas/")
    bucket.put("list.csv", "\n".join(rows).encode())
    listed = {"snapshots": f"{bucket.url}/list.csv"}
    made: list[bytes] = []
    posthoc: dict[str, Any] = {"scheme": "posthoc", "sigma": 0.15}
    for source, more in ((tmp_path / "emas", {}), (f"{bucket.url}/emas/", listed)):
        options: Any = posthoc | more
        average(source, tmp_path / f"{len(made)}.safetensors", **options)
        made.append((tmp_path / f"{len(made)}.safetensors").read_bytes())
    assert made[0] == made[1]
    made.clear()
    for source in (tmp_path / "emas", f"{bucket.url}/emas"):
        files = [f"{source}/run-{step:05d}-0.050.safetensors" for step in (20, 40)]
        average(files, tmp_path / f"w{len(made)}.safetensors", scheme="window")
        made.append((tmp_path / f"w{len(made)}.safetensors").read_bytes())
    assert made[0] == made[1]
