"""The row of the README on buckets: its command runs on a bucket of a server that really runs."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.command import polyak
from tests.remote.servers import S3Bucket
from tests.test_front_door import KERNEL, ROWS


def test_checkpoints_in_a_bucket_are_averaged(bucket: S3Bucket, tmp_path: Path) -> None:
    """The average of the last five of six epochs is their mean, opened by the format's library."""
    for epoch in range(1, 7):
        save_file({"kernel": KERNEL + epoch}, tmp_path / "one")
        bucket.put(f"run/epoch_{epoch}.safetensors", (tmp_path / "one").read_bytes())
    command = ROWS["checkpoints in a bucket"].replace("s3://bucket", bucket.url)
    done = polyak(*shlex.split(command)[1:], cwd=tmp_path, environ=bucket.environ)
    assert done.returncode == 0, done.stderr
    total = np.sum([(KERNEL + epoch).astype("f8") for epoch in range(2, 7)], axis=0)
    found = load_file(tmp_path / "final.safetensors")["kernel"]
    assert found.tobytes() == (total / 5).astype("f4").tobytes()
