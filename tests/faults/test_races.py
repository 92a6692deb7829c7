"""What other processes do at random moments of a run, and outputs in unusual places."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from polyak_cli import average
from tests.command import POLYAK, environment, one_line, polyak
from tests.faults.runs import CHANGES, write_run
from tests.oracle import naive_average, read_model, same_bits

#: Opens a file repeatedly, as bytes and by h5py, until it is stopped; each content must be whole.
READER = """
import hashlib, os, sys
import h5py
print("reading", flush=True)
seen = {}
while not os.path.exists("enough"):
    content = hashlib.sha256(open("o.h5", "rb").read()).hexdigest()
    with h5py.File("o.h5", locking=False) as file:
        tensor = hashlib.sha256(file["model_weights/dense/kernel"][()].tobytes()).hexdigest()
    for found in (content, tensor):
        seen[found] = seen.get(found, 0) + 1
print(" ".join(seen), sum(seen.values()))
"""


def _publish(folder: Path, times: int) -> tuple[set[str], set[str], int]:
    """Publish two averages in turn while a reader runs; return made, read, count."""
    made = set()
    for scheme in ("equal", "linear"):
        average(folder / "ckpts", folder / "o.h5", scheme=scheme, force=True)
        tensor = read_model(folder / "o.h5")["model_weights/dense/kernel"].tobytes()
        made |= {
            hashlib.sha256(part).hexdigest() for part in ((folder / "o.h5").read_bytes(), tensor)
        }
    reader = subprocess.Popen(
        [sys.executable, "-c", READER],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert reader.stdout
    assert reader.stdout.readline() == "reading\n"
    for k in range(times):
        scheme = ("equal", "linear")[k % 2]
        average(folder / "ckpts", folder / "o.h5", scheme=scheme, force=True)
    (folder / "enough").touch()
    out, err = reader.communicate(timeout=60)
    assert (reader.returncode, err) == (0, "")
    *seen, count = out.split()
    return made, set(seen), int(count)


def test_whoever_reads_the_output_sees_all_of_one(run_folder: Path) -> None:
    """A reader finds the older or the newer output, always whole, while it is replaced."""
    made, seen, _ = _publish(run_folder, 4)
    assert seen <= made


@pytest.mark.soak
def test_whoever_reads_the_output_hundreds_of_times_sees_all_of_one(run_folder: Path) -> None:
    """The same, often enough that the reader meets both outputs."""
    made, seen, count = _publish(run_folder, 200)
    assert seen == made
    assert count > 200


@pytest.mark.soak
def test_a_checkpoint_is_changed_at_any_moment(tmp_path: Path) -> None:
    """The output is the average of files as they were at one moment, or there is none."""
    (tmp_path / "ckpts").mkdir()
    paths = write_run(tmp_path / "ckpts", 4, 1_000_000)
    shutil.copytree(tmp_path / "ckpts", tmp_path / "kept")
    command = [*POLYAK, "average", "ckpts", "-q", "--force", "-o", "o.h5"]
    begun = time.monotonic()
    assert polyak(*command[3:], cwd=tmp_path).returncode == 0
    seconds = time.monotonic() - begun
    whole = (tmp_path / "o.h5").read_bytes()
    ends: Counter[int] = Counter()
    for seed in range(60):
        chance = random.Random(seed)
        (tmp_path / "o.h5").write_bytes(b"older")
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
        )
        time.sleep(chance.uniform(0.4, 1.0) * seconds)
        path = chance.choice(paths)
        change = chance.choice(list(CHANGES))
        CHANGES[change](path)
        _, err = process.communicate(timeout=60)
        ends[process.returncode] += 1
        found = (tmp_path / "o.h5").read_bytes()
        assert sorted(os.listdir(tmp_path)) == ["ckpts", "kept", "o.h5"]
        if process.returncode == 0 and found != whole:
            # The change came before the listing, perhaps between a file's removal and its creation.
            possible = []
            away = [["--exclude", path.name]] if change == "saved again" else []
            for options in ([], *away):
                assert polyak(*command[3:], *options, cwd=tmp_path).returncode == 0
                possible.append((tmp_path / "o.h5").read_bytes())
            assert any(found == one for one in possible)  # pytest would compare them for hours
        elif process.returncode:
            assert process.returncode == 3, err
            assert one_line(err).startswith(f"ckpts/{path.name}"), err
            assert found == b"older"
        shutil.copy(tmp_path / "kept" / path.name, path)
    assert ends[3] >= 5, ends


def test_an_output_on_another_disk(run_folder: Path, tiny_disk: Path) -> None:
    """Checkpoints, output and TMPDIR may each lie where they like."""
    assert tiny_disk.stat().st_dev != run_folder.stat().st_dev
    environ = {"TMPDIR": "/dev/shm"}
    for more in ([], ["--force"]):
        done = polyak(
            "average", "ckpts", "-q", "-o", "disk/o.h5", *more, cwd=run_folder, environ=environ
        )
        assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir(tiny_disk) == ["o.h5"]
    paths = [run_folder / f"ckpts/model_{k}.h5" for k in (1, 2, 3)]
    assert same_bits(read_model(tiny_disk / "o.h5"), naive_average(paths, [1] * 3))


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_disk_that_may_only_be_read(run_folder: Path, tiny_disk: Path, force: list[str]) -> None:
    """It is refused before the work, also for root, to whom permissions do not apply."""
    (tiny_disk / "old.h5").write_bytes(b"older")
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    for name in ("old.h5", "new.h5") if force else ("new.h5",):
        done = polyak("average", "ckpts", "-o", f"disk/{name}", *force, cwd=run_folder)
        assert (done.returncode, done.stdout) == (3, "")
        assert one_line(done.stderr).startswith(f"disk/{name}: the folder ")
        assert "is not writable" in done.stderr
    assert os.listdir(tiny_disk) == ["old.h5"]
    assert (tiny_disk / "old.h5").read_bytes() == b"older"
