"""The geometry of a run in a bucket is that of the same files on the disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.command import polyak
from tests.remote.servers import S3Bucket
from tests.remote.test_reading import write_run


def test_a_run_in_a_bucket_has_the_same_numbers(bucket: S3Bucket, tmp_path: Path) -> None:
    """Numbers are the same, also with several workers, and checkpoints are called by their URLs."""
    folder = write_run(tmp_path / "run")
    bucket.put_tree(folder, "run/")
    results = []
    remote = f"{bucket.url}/run/"
    for source, jobs in ((folder, 1), (remote, 1), (remote, 3)):
        command = ("geometry", source, "--json", "--jobs", jobs)
        done = polyak(*command, cwd=tmp_path, environ=bucket.environ)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        paths = [one.pop("path") for one in found["checkpoints"]]
        assert all(path.startswith(str(source).rstrip("/")) for path in paths)
        results.append(found["gram"])
    local, *remotes = results
    assert remotes[0] == remotes[1]
    for key, values in local.items():
        np.testing.assert_allclose(remotes[0][key], values, rtol=1e-12)
