"""Every format is averaged from a bucket to the bytes that the same files on the disk give.

Files are written by the formats' own libraries or by hand, as in the tests of the formats.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.command import environment, one_line, polyak, script, tree
from tests.remote.kinds import KINDS, Kind, named, write_run
from tests.remote.proxy import Proxy
from tests.remote.servers import S3Bucket

#: Treats objects of any size as those that are too large to be fetched whole.
BY_BLOCKS = """
from polyak_cli.engine import slabs
from polyak_cli.storage import mirrored, mirrors
assert mirrored._SMALL and mirrors.WHOLE
mirrored._SMALL = mirrors.WHOLE = 0
"""
#: And has processes fold that read objects by themselves.
SPAWNED = f"{BY_BLOCKS}slabs.TUNING = slabs.Tuning(fork_nbytes=0)"
#: Formats with checksums of each tensor or member.
CHECKED = ("keras", "npz", "torch", "bundle", "dcp")
#: Of a checkpoint: 250 kB.
ROWS = 1000


def average(
    command: Sequence[str], source: str, output: str, folder: Path, environ: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Average a run to a file or folder of a folder."""
    return subprocess.run(
        [*command, "average", source, "-o", output, "--no-hash", "-q"],
        cwd=folder,
        env=environment(**environ),
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_format_is_averaged_to_the_same_bytes(
    bucket: S3Bucket, tmp_path: Path, kind: Kind
) -> None:
    """Every file of the output, with the record, equals that of a local average.

    So it is where objects are as large as those that are read by blocks.
    """
    write_run(kind, tmp_path / "run", 3, ROWS)
    bucket.put_tree(tmp_path / "run", "some/run/")
    outputs = []
    for place, source, code in (
        ("here", "run", None),
        ("there", f"{bucket.url}/some/run/", None),
        ("blocks", f"{bucket.url}/some/run/", BY_BLOCKS),
    ):
        (tmp_path / place).mkdir()
        output = f"{place}/{kind.output}"
        if code is None:
            words = ("average", source, "-o", output, "--no-hash", "-q")
            done = polyak(*words, cwd=tmp_path, environ=bucket.environ)
        else:
            done = average(script(code), source, output, tmp_path, bucket.environ)
        assert (done.returncode, done.stderr) == (0, "")
        paths = sorted(path for path in (tmp_path / place).rglob("*") if path.is_file())
        outputs.append({path.relative_to(tmp_path / place): path.read_bytes() for path in paths})
    assert outputs[0]
    assert outputs[0] == outputs[1] == outputs[2]


def find_largest(bucket: S3Bucket) -> str:
    """Return the key of an object that holds values."""
    contents = bucket.tree("run/")
    return f"run/{max(sorted(contents), key=lambda key: len(contents[key]))}"


@pytest.mark.parametrize(
    "kind",
    [
        # One with much besides its tensors, and one whose tensors are in blocks.
        pytest.param(
            named(one), marks=[] if one in ("keras", "dcp") else [pytest.mark.soak], id=one
        )
        for one in CHECKED
    ],
)
def test_checksums_are_compared_while_values_are_folded(
    proxy: Proxy, bucket: S3Bucket, tmp_path: Path, kind: Kind
) -> None:
    """The values of large objects come once, and a bit that is wrong in them is found."""
    write_run(kind, tmp_path / "run", 3, 16 * ROWS)
    bucket.put_tree(tmp_path / "run", "run/")
    source = f"{bucket.url}/run/"
    received: list[int] = []
    for code in (BY_BLOCKS, f"{BY_BLOCKS}from polyak_cli import formats; formats._LATER = 1 << 40"):
        proxy.traffic.clear()
        (tmp_path / f"{len(received)}").mkdir()
        output = f"{len(received)}/{kind.output}"
        done = average(script(code), source, output, tmp_path, proxy.environ)
        assert (done.returncode, done.stderr) == (0, "")
        received.append(proxy.traffic.received)
    # With a first reading for the checksums, the tensor comes again that is averaged; but for what
    # lies in blocks that were fetched for the headers.
    assert received[1] - received[0] > 0.45 * 3 * (16 * ROWS * 64 * 4)
    key = find_largest(bucket)
    damaged = bytearray(bucket.contents(key))
    damaged[len(damaged) // 2] ^= 1
    bucket.put(key, bytes(damaged))
    before = tree(tmp_path)
    for command in (script(BY_BLOCKS), script(SPAWNED)):
        done = average(command, source, f"other{kind.output}", tmp_path, bucket.environ)
        assert done.returncode == 3
        line = one_line(done.stderr)
        assert line.startswith(f"{bucket.url}/{key}: ")
        assert "checksum" in line
        assert "the data are damaged" in line
        assert tree(tmp_path) == before
