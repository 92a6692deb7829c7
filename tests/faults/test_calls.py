"""System calls that fail, or do less than they were asked for, drawn from seeds.

At each the old output is intact or the new one is complete, nothing unfinished is left, and what
went wrong is one line that names the file it was about.
"""

from __future__ import annotations

import errno
import io
import os
import random
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pytest

from tests import dcp
from tests.command import one_line, polyak
from tests.faults.runs import OLD
from tests.faults.shim import END, EVER, SHORT, Fault, injected
from tests.oracle import Array, write_model

Tensors = dict[str, Array]
COUNT = 3
#: How a call on a checkpoint or on the output may go wrong, by its kind.
READING: dict[str, list[int | str]] = {
    "read": [errno.EIO, errno.ESTALE, errno.EINTR, SHORT, SHORT],
    # libhdf5 takes what lies behind the end for zeros; the file's size shows that it got shorter.
    "readv": [END],
    "open": [errno.EIO, errno.EMFILE, errno.EACCES],
}
WRITING: dict[str, list[int | str]] = {
    "write": [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINTR, SHORT, SHORT],
    "open": [errno.EIO, errno.EMFILE, errno.EROFS],
    "sync": [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINTR],
    "rename": [errno.EIO, errno.ENOSPC, errno.EDQUOT],
}
FULL = (errno.ENOSPC, errno.EDQUOT)


def _write_h5(path: Path, tensors: Tensors) -> None:
    write_model(path, {"dense": tensors})


def _write_chunked(path: Path, tensors: Tensors) -> None:
    write_model(path, {"dense": tensors}, storage={"chunks": True, "compression": "gzip"})


def _write_keras(path: Path, tensors: Tensors) -> None:
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        for k, values in enumerate(tensors.values()):
            file[f"layers/dense/vars/{k}"] = values
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", '{"keras_version": "3.15.1"}')
        archive.writestr("config.json", '{"class_name": "Sequential", "config": {}}')
        archive.writestr("model.weights.h5", content.getvalue())


def _write_npz(path: Path, tensors: Tensors) -> None:
    np.savez(path, **tensors)  # type: ignore[arg-type] # its stub takes an array for a flag


def _write_deflated(path: Path, tensors: Tensors) -> None:
    np.savez_compressed(path, **tensors)  # type: ignore[arg-type] # as above


def _write_safetensors(path: Path, tensors: Tensors) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, path)


def _write_dcp(path: Path, tensors: Tensors) -> None:
    counts = {name: [2] * values.ndim for name, values in tensors.items()}
    dcp.write(path, {name: dcp.split(one, counts[name]) for name, one in tensors.items()})


def _read_h5(path: Path) -> Tensors:
    with h5py.File(path) as file:
        group = file["model_weights/dense"]
        return {name: group[name][()] for name in group}


def _read_keras(path: Path) -> Tensors:
    with (
        zipfile.ZipFile(path) as archive,
        h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file,
    ):
        group = file["layers/dense/vars"]
        return {name: group[str(k)][()] for k, name in enumerate(NAMES)}


def _read_npz(path: Path) -> Tensors:
    with np.load(path) as archive:
        return dict(archive)


def _read_safetensors(path: Path) -> Tensors:
    from safetensors.numpy import load_file

    return load_file(path)


class Way(NamedTuple):
    """One way of storing tensors, by its own library."""

    suffix: str
    write: Callable[[Path, Tensors], None]
    read: Callable[[Path], Tensors]
    result: str = ""  # suffix of an output, where it has another


NAMES = ("kernel", "bias", "table")
WAYS = {
    "h5": Way(".h5", _write_h5, _read_h5),
    "chunked": Way(".h5", _write_chunked, _read_h5),
    "keras": Way(".keras", _write_keras, _read_keras),
    "npz": Way(".npz", _write_npz, _read_npz),
    "deflated": Way(".npz", _write_deflated, _read_npz),
    "safetensors": Way(".safetensors", _write_safetensors, _read_safetensors),
    "torch_dcp": Way("", _write_dcp, _read_safetensors, ".safetensors"),
}


def tensors_of(seed: int) -> Tensors:
    """Return the tensors of one checkpoint; the table is carried, and too large for one copy."""
    rng = np.random.default_rng(seed)
    return {
        "kernel": rng.normal(3, size=(120, 100)).astype(np.float32),
        "bias": rng.normal(3, size=100).astype(np.float32),
        "table": np.arange(40_000, dtype=np.int32),
    }


class Trials:
    """A run of checkpoints that is averaged repeatedly, each time over an older output."""

    def __init__(self, folder: Path, shim: Path, way: Way) -> None:
        self.folder = folder
        self.shim = shim
        self.way = way
        (folder / "ckpts").mkdir()
        (folder / "written").mkdir()
        output = f"written/o{way.result or way.suffix}"
        self.output = folder / output
        self.command = ("average", "ckpts", "-q", "--force", "-o", output)
        models = [tensors_of(seed) for seed in range(COUNT)]
        for k, model in enumerate(models, start=1):
            way.write(folder / f"ckpts/model_{k}{way.suffix}", model)
        done = polyak(*self.command, cwd=folder)
        assert (done.returncode, done.stderr) == (0, "")
        self.average = self.output.read_bytes()
        self._check_bits(models)

    def _check_bits(self, models: Sequence[Tensors]) -> None:
        """Compare the undisturbed output with the average by plain numpy."""
        found = self.way.read(self.output)
        for name, newest in models[-1].items():
            expected = newest
            if newest.dtype.kind == "f":
                terms = [model[name].astype(np.float64) for model in models]
                mean = (terms[0] + terms[1] + terms[2]) / COUNT
                expected = np.asarray(mean).astype(newest.dtype)
            assert found[name].tobytes() == expected.tobytes()

    def calls(self, function: str, path: str) -> int:
        """Count the calls of an undisturbed run."""
        done, calls = injected(self.shim, Fault(function, path), *self.command, cwd=self.folder)
        assert (done.returncode, done.stderr) == (0, "")
        return calls

    def check(self, fault: Fault) -> int:
        """Make calls fail, check what the run leaves behind, and return the exit code."""
        self.output.write_bytes(OLD)
        done, calls = injected(self.shim, fault, *self.command, cwd=self.folder)
        found = self.output.read_bytes()
        assert os.listdir(self.folder / "written") == [self.output.name], fault
        if done.returncode == 0:
            assert (found, done.stderr) == (self.average, ""), fault
            return 0
        assert calls >= fault.first, fault
        assert done.returncode == 3, (fault, done.stderr)
        assert fault.how not in (SHORT, str(errno.EINTR)), (fault, done.stderr)
        line = one_line(done.stderr)
        if fault.path.startswith("ckpts/"):
            assert found == OLD, fault
            assert line.startswith("ckpts/model_"), (fault, line)
            assert fault.how == END or os.strerror(int(fault.how)) in line, (fault, line)
            return 3
        # Once the output has its name, only the folder is opened and synced.
        last = fault.function in ("open", "sync")
        assert found == OLD or (last and found == self.average), fault
        reason = os.strerror(int(fault.how))
        full = int(fault.how) in FULL
        what = f"no room to write it ({reason})" if full else f"cannot be written: {reason}"
        assert line.startswith(f"{self.command[-1]}: {what}"), (fault, line)
        return 3

    def draw(self, seed: int, count: int) -> None:
        """Check ``count`` faults, of every kind."""
        chance = random.Random(seed)
        kinds: list[tuple[str, str, str, int]] = []
        for path, functions in (("ckpts/", READING), ("/written", WRITING)):
            for function, hows in functions.items():
                calls = self.calls(function, path)
                kinds += [(function, path, str(how), calls) for how in hows]
        codes: Counter[int] = Counter()
        for k in range(count):
            function, path, how, calls = kinds[k % len(kinds)]
            first = chance.randint(1, calls)
            # A full disk stays full; an interrupted call succeeds the next time.
            lasting = how not in (SHORT, END, str(errno.EINTR)) and chance.random() < 0.5
            last = EVER if lasting else first
            codes[self.check(Fault(function, path, first, last, how))] += 1
        assert min(codes[0], codes[3]) >= count // 5, codes


@pytest.mark.soak
def test_any_call_may_fail(tmp_path: Path, shim: Path) -> None:
    """Each of a hundred faults leaves the old output or the new one, and nothing unfinished."""
    Trials(tmp_path, shim, WAYS["h5"]).draw(0, 100)


@pytest.mark.soak
@pytest.mark.parametrize("name", [name for name in WAYS if name != "h5"])
def test_any_call_may_fail_in_every_format(tmp_path: Path, shim: Path, name: str) -> None:
    """The same where archives and headers are read and written by other libraries."""
    Trials(tmp_path, shim, WAYS[name]).draw(1, 24)


@pytest.mark.slow
def test_a_call_fails(tmp_path: Path, shim: Path) -> None:
    """EIO and a quota are reported for the right file; short reads and writes are continued."""
    trials = Trials(tmp_path, shim, WAYS["h5"])
    for fault in (
        Fault("read", "ckpts/", 1, EVER, str(errno.EIO)),  # before it is opened by a library
        Fault("read", "ckpts/model_3", 20, EVER, str(errno.EIO)),  # in libhdf5
        Fault("write", "/written", 1, 1, str(errno.EDQUOT)),  # in libhdf5
        Fault("sync", "/written", 1, 1, str(errno.EIO)),
        Fault("read", "ckpts/", 1, EVER, SHORT),
        Fault("write", "/written", 1, EVER, SHORT),
    ):
        assert trials.check(fault) == (0 if fault.how == SHORT else 3)
