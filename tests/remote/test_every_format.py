"""Every format is averaged from a bucket to a bucket, to the bytes of the local average."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import environment, tree
from tests.remote.kinds import KINDS, Kind, write_run
from tests.remote.servers import AzureContainer, Bucket, S3Bucket

#: Averages a run on the disk to the disk, and the run of a bucket to the bucket.
AVERAGE = """
import sys
import polyak_cli
here, there, output = sys.argv[1:]
polyak_cli.average(here + "/run", f"{here}/out/{output}", last=3)
polyak_cli.average(there + "/run/", f"{there}/out/{output}", last=3)
print("done")
"""


#: Kinds that `make test` averages here; others are read and written apart in other tests.
QUICK = ("shards", "h5")


def check(bucket: Bucket, kind: Kind, folder: Path) -> None:
    """Average a run in both places, and compare all that was written."""
    write_run(kind, folder / "run", 4)
    bucket.put_tree(folder / "run", "run/")
    (folder / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", AVERAGE, folder, bucket.url, kind.output],
        cwd=folder,
        env=environment(**bucket.environ),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout == "done\n", done.stderr
    expected = {name: one for name, one in tree(folder / "out").items() if isinstance(one, bytes)}
    assert expected
    assert bucket.tree("out/") == expected


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, id=kind.name, marks=[] if kind.name in QUICK else [pytest.mark.soak])
        for kind in KINDS
    ],
)
def test_s3_gives_and_takes_the_same_bytes(bucket: S3Bucket, kind: Kind, tmp_path: Path) -> None:
    """From and to S3, file or folder; no upload is left open."""
    check(bucket, kind, tmp_path)
    assert bucket.uploads() == []


@pytest.mark.soak
@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind.name in ("shards", "h5")], ids=lambda kind: kind.name
)
def test_azure_gives_and_takes_the_same_bytes(
    container: AzureContainer, kind: Kind, tmp_path: Path
) -> None:
    """From and to Azure: a folder, and a file that needs seeking."""
    check(container, kind, tmp_path)
