"""`polyak watch`: the average stays current while others write, and is always whole.

Nothing here is timed: tests wait for what must come, for as long as a slow machine may need.
"""

from __future__ import annotations

import gc
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from polyak_cli import (
    CheckpointError,
    MismatchError,
    OutputError,
    Report,
    UsageError,
    average,
    formats,
    pipeline,
    watch,
)
from polyak_cli.averaging import planning
from tests.command import POLYAK, ROOT, environment, one_line, polyak, script
from tests.oracle import naive_average, read_model, same_bits, write_model

OPTIONS = ("--scheme", "exp", "--last", "3", "--interval", "0.05")
PATIENCE = 120  # seconds, after which something that must come is taken for lost


def write(path: Path, value: float, elements: int = 24) -> Path:
    """Write a checkpoint under a hidden name first, as a careful trainer does."""
    values = np.random.default_rng(0).normal(size=elements).astype(np.float32)
    hidden = path.with_name(f".{path.name}")
    write_model(hidden, {"dense": {"kernel": values * np.float32(value)}})
    return hidden.replace(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with three checkpoints in ckpts/."""
    (tmp_path / "ckpts").mkdir()
    for k in (1, 2, 3):
        write(tmp_path / f"ckpts/model_{k}.h5", k)
    return tmp_path


def once(folder: Path, output: str = "o.h5", **options: Any) -> list[Report]:
    """Bring an output up to date, in this process."""
    options.setdefault("interval", 0.01)
    return list(watch(folder / "ckpts", folder / output, once=True, **options))


def made(folder: Path, **options: Any) -> bytes:
    """Return what `average` makes of the checkpoints."""
    reference = folder / "reference.h5"
    average(folder / "ckpts", reference, force=True, **options)
    return reference.read_bytes()


def names(report: Report) -> list[str]:
    """Return which checkpoints were averaged."""
    return [checkpoint.path.name for checkpoint in report.plan.checkpoints]


class Watcher:
    """A `polyak watch` that runs beside the test."""

    def __init__(self, folder: Path, *options: str, code: str = "", output: str = "o.h5") -> None:
        arguments = ("watch", "ckpts", "-o", output, *OPTIONS, *options)
        self.process = subprocess.Popen(
            script(code, *arguments) if code else [*POLYAK, *arguments],
            cwd=folder,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def line(self, stream: str = "stdout") -> str:
        """Return the next line, whenever it comes."""
        pipe = getattr(self.process, stream)
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                assert selector.select(PATIENCE), f"no line came, only {line!r}"
                piece = os.read(pipe.fileno(), 1)
                assert piece, self.process.communicate(timeout=PATIENCE)
                line += piece
        return line.decode().rstrip("\n")

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str, str]:
        """Send a signal and return exit code and what was not read yet."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out.decode(), err.decode()


@contextmanager
def watcher(folder: Path, *options: str, code: str = "", output: str = "o.h5") -> Iterator[Watcher]:
    """Start one, and see that it ends."""
    watched = Watcher(folder, *options, code=code, output=output)
    try:
        yield watched
    finally:
        if watched.process.poll() is None:
            watched.process.kill()
            watched.process.communicate(timeout=PATIENCE)


# --- what is published ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scheme": "exp", "alpha": 5.0, "last": 2},
        {"scheme": "power", "sigma": 0.2, "every": 2},
        {"coefficients": (1.0, 2.0, 5.0), "hash": True},
        {"dtype": "float16", "optimizer": "newest", "from_epoch": 2},
    ],
    ids=str,
)
def test_the_output_is_that_of_average_to_the_byte(folder: Path, options: dict[str, Any]) -> None:
    """Whatever the options, the file does not depend on how it was made."""
    (report,) = once(folder, **options)
    assert report.output == folder / "o.h5"
    assert (folder / "o.h5").read_bytes() == made(folder, **options)


def test_it_equals_the_naive_average(folder: Path) -> None:
    """By an oracle that shares no code."""
    once(folder)
    paths = [folder / f"ckpts/model_{k}.h5" for k in (1, 2, 3)]
    assert same_bits(read_model(folder / "o.h5"), naive_average(paths, [1] * 3))


def test_a_half_life_that_a_short_run_cannot_have_ends_nothing(folder: Path) -> None:
    """At step 3 a half-life is at most 3 ln 2; a run that goes on will have it, so it is noted."""
    (report,) = once(folder, scheme="power", ema_half_life=5)
    assert report.notes[0] == (
        "warning: --ema-half-life 5 is longer than 2.079, ln(2) of the newest checkpoint's "
        "position, 3: until the run is long enough for it, every step counts alike"
    )
    assert report.plan.coefficients == pytest.approx((0.5, 1 / 3, 1 / 6))
    for k in range(4, 10):
        write(folder / f"ckpts/model_{k}.h5", k)
    (report,) = once(folder, scheme="power", ema_half_life=5)
    assert not any("half-life" in note for note in report.notes)


def test_fewer_checkpoints_than_asked_for_are_averaged_and_it_is_said(folder: Path) -> None:
    """A run that has just begun has no ten checkpoints yet."""
    (report,) = once(folder, last=10)
    assert names(report) == ["model_1.h5", "model_2.h5", "model_3.h5"]
    assert report.notes == (
        "there are fewer checkpoints than --last 10 so far; no others are waited for",
    )
    assert (folder / "o.h5").read_bytes() == made(folder, last=3)


def test_the_best_are_chosen_among_those_that_are_there(folder: Path) -> None:
    """As many as there are, when fewer than asked for are."""
    log = folder / "ckpts/training.csv"
    log.write_text("epoch,val_loss\n1,0.3\n2,0.1\n3,0.2\n")
    (report,) = once(folder, best=2, log=log)
    assert names(report) == ["model_2.h5", "model_3.h5"]
    (report,) = once(folder, best=4, log=log)
    assert names(report) == ["model_1.h5", "model_2.h5", "model_3.h5"]
    assert (
        report.notes[0]
        == "there are fewer checkpoints than --best 4 so far; no others are waited for"
    )


def test_spacing_and_even_choice_follow_the_newest(folder: Path) -> None:
    """Both count from the newest that is there; a note says where fewer are there than wanted."""
    (report,) = once(folder, min_spacing=2)
    assert names(report) == ["model_1.h5", "model_3.h5"]
    (report,) = once(folder, target_count=2, scheme="linear")
    assert names(report) == ["model_1.h5", "model_3.h5"]
    (report,) = once(folder, target_count=5, last=2)
    assert names(report) == ["model_2.h5", "model_3.h5"]
    note = "there are fewer checkpoints than --target-count 5 so far; no others are waited for"
    assert report.notes == (note,)


def test_own_coefficients_wait_for_as_many_checkpoints(folder: Path) -> None:
    """They mean nothing for fewer."""
    options: dict[str, Any] = {"coefficients": (1.0, 1.0, 1.0, 3.0), "last": 4}
    assert once(folder, **options) == []
    write(folder / "ckpts/model_4.h5", 4)
    (report,) = once(folder, **options)
    assert len(names(report)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("output", ["latest.h5", "latest_99.h5", "latest.safetensors"])
def test_the_output_may_lie_among_the_checkpoints(folder: Path, output: str) -> None:
    """It is never taken for one, whatever its name or kind, also beside a single one."""
    for k in (2, 3):
        (folder / f"ckpts/model_{k}.h5").unlink()
    for k in (1, 2, 3):
        write(folder / f"ckpts/model_{k}.h5", k)
        (report,) = once(folder, f"ckpts/{output}", last=3)
        assert names(report) == [f"model_{n}.h5" for n in range(1, k + 1)]
    assert once(folder, f"ckpts/{output}", last=3) == []


def test_checkpoints_that_are_folders_are_watched(folder: Path) -> None:
    """One counts when all of its files are there and stand still."""
    save_file = pytest.importorskip("safetensors.numpy").save_file
    shutil.rmtree(folder / "ckpts")
    for k in (1, 2):
        path = folder / f"ckpts/checkpoint-{k}"
        path.mkdir(parents=True)
        shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        for name, shard in shards.items():
            save_file({name: np.full(4, k, np.float32)}, path / shard)
        (path / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": 32}, "weight_map": shards})
        )
    last = folder / "ckpts/checkpoint-2/model-00002-of-00002.safetensors"
    moved = last.rename(folder / "shard")
    (report,) = once(folder, "o.safetensors")
    assert names(report) == ["checkpoint-1"]
    moved.rename(last)
    (report,) = once(folder, "o.safetensors")
    assert names(report) == ["checkpoint-1", "checkpoint-2"]


# --- an output that is there ----------------------------------------------------------------------


def test_an_output_that_is_up_to_date_is_left_alone(folder: Path) -> None:
    """Byte, time and file, however often cron comes."""
    once(folder, scheme="exp", last=3)
    before = (folder / "o.h5").stat()
    assert once(folder, scheme="exp", last=3) == []
    after = (folder / "o.h5").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize(
    "options",
    [{"scheme": "linear"}, {"alpha": 3.0}, {"last": 2}, {"dtype": "float16"}, {"hash": False}],
    ids=str,
)
def test_other_options_make_another_output(folder: Path, options: dict[str, Any]) -> None:
    """What is there is an average, but not the one that was asked for."""
    once(folder, scheme="exp", last=3)
    wanted: dict[str, Any] = {"scheme": "exp", "last": 3} | options
    assert len(once(folder, **wanted)) == 1
    assert (folder / "o.h5").read_bytes() == made(folder, **wanted)


def test_other_coefficients_of_one_s_own_make_another_output(folder: Path) -> None:
    """They are no scheme's parameter, but are recorded with each input."""
    once(folder, coefficients=(1.0, 1.0, 2.0))
    assert once(folder, coefficients=(1.0, 1.0, 2.0)) == []
    assert len(once(folder, coefficients=(1.0, 1.0, 3.0))) == 1


def test_a_new_or_a_changed_checkpoint_makes_the_output_again(folder: Path) -> None:
    """By name and size, or by a time after the output's."""
    once(folder, last=3)
    write(folder / "ckpts/model_4.h5", 4)
    (report,) = once(folder, last=3)
    assert names(report) == ["model_2.h5", "model_3.h5", "model_4.h5"]
    write(folder / "ckpts/model_3.h5", 7)
    (report,) = once(folder, last=3)
    assert (folder / "o.h5").read_bytes() == made(folder, last=3)


@pytest.mark.parametrize("kept", [1, 2])
def test_checkpoints_that_go_change_nothing(folder: Path, kept: int) -> None:
    """Who tidies up after training does not lose the average."""
    once(folder, last=3)
    before = (folder / "o.h5").read_bytes()
    for k in range(1, 4 - kept):
        (folder / f"ckpts/model_{k}.h5").unlink()
    assert once(folder, last=3) == []
    assert (folder / "o.h5").read_bytes() == before


def test_an_output_that_is_no_average_is_refused(folder: Path) -> None:
    """It may be anything; --force says that it may go."""
    write(folder / "o.h5", 1)
    with pytest.raises(OutputError, match=r"o\.h5: already exists and was not written by polyak"):
        once(folder)
    assert len(once(folder, force=True)) == 1
    assert (folder / "o.h5").read_bytes() == made(folder)


# --- what is not whole ----------------------------------------------------------------------------


def halves(path: Path, source: Path) -> Callable[[], None]:
    """Write half of a file, and return what writes the rest."""
    content = source.read_bytes()
    path.write_bytes(content[: len(content) // 2])

    def rest() -> None:
        with path.open("ab") as file:
            file.write(content[len(content) // 2 :])

    return rest


def test_a_half_written_checkpoint_is_waited_for(folder: Path) -> None:
    """The average is that of the ones before it until it is whole."""
    rest = halves(folder / "ckpts/model_4.h5", write(folder / "four.h5", 4))
    with watcher(folder) as watched:
        assert "3 checkpoints, model_1.h5 to model_3.h5" in watched.line()
        rest()
        assert "3 checkpoints, model_2.h5 to model_4.h5" in watched.line()
    assert (folder / "o.h5").read_bytes() == made(folder, scheme="exp", last=3)


@pytest.mark.slow
def test_a_checkpoint_that_stays_broken_is_reported_once_and_stops_nothing(folder: Path) -> None:
    """Newer ones are averaged without it; when it is whole, it counts."""
    rest = halves(folder / "ckpts/model_4.h5", write(folder / "four.h5", 4))
    with watcher(folder) as watched:
        assert "model_1.h5 to model_3.h5" in watched.line()
        note = watched.line("stderr")
        assert note.startswith("note: ckpts/model_4.h5: is truncated")
        assert note.endswith("; left out until it is complete")
        write(folder / "ckpts/model_5.h5", 5)
        assert "3 checkpoints, model_2.h5 to model_5.h5" in watched.line()
        rest()
        assert "3 checkpoints, model_3.h5 to model_5.h5" in watched.line()
        code, out, err = watched.end()
    assert (code, out) == (143, "")
    assert one_line(err)
    assert (folder / "o.h5").read_bytes() == made(folder, scheme="exp", last=3)


def test_a_checkpoint_that_another_process_has_open_is_waited_for(folder: Path) -> None:
    """The HDF5 library's lock is respected, though the file on the disk could be read."""
    path = write(folder / "ckpts/model_4.h5", 4)
    holds = (
        "import h5py, sys\n"
        "with h5py.File(sys.argv[1], 'a', locking=True) as file:\n"
        "    print('open', flush=True)\n"
        "    sys.stdin.readline()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", holds, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout
    assert holder.stdout.readline() == b"open\n"
    with watcher(folder) as watched:
        assert "model_1.h5 to model_3.h5" in watched.line()
        note = watched.line("stderr")
        assert "model_4.h5: is still being written by another process" in note
        holder.communicate(b"\n", timeout=PATIENCE)
        assert "model_2.h5 to model_4.h5" in watched.line()


def test_a_checkpoint_that_goes_on_changing_is_never_read(folder: Path) -> None:
    """Even where it looks whole each time: two looks must find it the same."""
    path = folder / "ckpts/model_4.h5"
    write(path, 4)
    reports = watch(folder / "ckpts", folder / "o.h5", interval=0.01)
    looks = 0
    real = time.sleep
    newest = path.stat().st_mtime_ns  # an older time would be that of an earlier run

    def sleep(seconds: float) -> None:
        nonlocal looks
        looks += 1
        if looks < 8:
            os.utime(path, ns=(newest + looks, newest + looks))
        real(seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", sleep)
        assert names(next(reports))[-1] == "model_3.h5"
        assert looks < 8
        assert names(next(reports))[-1] == "model_4.h5"
        assert looks >= 8
    reports.close()  # type: ignore[attr-defined]  # it is a generator, if not for its users


def test_a_checkpoint_that_is_rewritten_is_waited_for(folder: Path) -> None:
    """No average without it comes in between, not even one with an older checkpoint instead."""
    write(folder / "ckpts/model_4.h5", 4)
    path = folder / "ckpts/model_3.h5"
    with watcher(folder) as watched:
        assert "3 checkpoints, model_2.h5 to model_4.h5" in watched.line()
        rest = halves(path, write(folder / "three.h5", 7))
        assert "model_3.h5: is truncated" in watched.line("stderr")
        rest()
        assert "3 checkpoints, model_2.h5 to model_4.h5" in watched.line()
    assert (folder / "o.h5").read_bytes() == made(folder, scheme="exp", last=3)


def test_a_checkpoint_whose_checksum_is_wrong_is_waited_for(folder: Path) -> None:
    """Formats with checksums are checked before anything is averaged."""
    shutil.rmtree(folder / "ckpts")
    (folder / "ckpts").mkdir()
    for k in (1, 2):
        np.savez(folder / f"ckpts/m_{k}.npz", a=np.full(1000, k, np.float32))
    path = folder / "ckpts/m_2.npz"
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    notes: list[str] = []
    (report,) = once(folder, "o.npz", on_note=notes.append)
    assert names(report) == ["m_1.npz"]
    assert len(notes) == 1
    assert "m_2.npz" in notes[0]


@pytest.mark.parametrize("name", ["model_4.h5.tmp", ".model_4.h5", "model_4.tmp.h5"])
def test_unfinished_names_are_never_read(folder: Path, name: str) -> None:
    """However long they stay."""
    (folder / "ckpts" / name).write_bytes(b"half")
    notes: list[str] = []
    (report,) = once(folder, on_note=notes.append)
    assert len(names(report)) == 3
    assert notes == []


def test_once_says_that_the_output_is_up_to_date(folder: Path) -> None:
    """The first run publishes, the second has nothing to do and says so, unless it is quiet."""
    arguments = ("watch", "ckpts", "-o", "o.h5", "--once", "--interval", "0.01")
    done = polyak(*arguments, cwd=folder)
    assert (done.stdout[:5], done.stderr) == ("wrote", "")
    done = polyak(*arguments, cwd=folder)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "note: o.h5: is up to date (3 checkpoints)\n"
    assert polyak(*arguments, "-q", cwd=folder).stderr == ""


def test_the_first_average_of_a_run_is_called_a_copy(folder: Path) -> None:
    """One checkpoint, as every run begins; the average of more is not."""
    arguments = ("watch", "ckpts", "-o", "o.h5", "--once", "--interval", "0.01")
    said = ": an average of one checkpoint is a copy of it\n"
    assert not polyak(*arguments, cwd=folder).stdout.endswith(said)
    for name in ("model_2.h5", "model_3.h5"):
        (folder / "ckpts" / name).unlink()
    (folder / "o.h5").unlink()
    assert polyak(*arguments, cwd=folder).stdout.endswith(said)


def test_once_says_that_coefficients_wait_for_checkpoints(folder: Path) -> None:
    """Three checkpoints are too few for four coefficients."""
    notes: list[str] = []
    assert once(folder, coefficients=[1, 1, 1, 1], on_note=notes.append) == []
    assert notes == [f"{folder / 'o.h5'}: waits for 4 checkpoints, one a coefficient"]


def test_an_empty_directory_is_waited_for(folder: Path) -> None:
    """Once says so and ends well; otherwise the first checkpoint is the first average."""
    for path in (folder / "ckpts").iterdir():
        path.unlink()
    done = polyak("watch", "ckpts", "-o", "o.h5", "--once", "--interval", "0.01", cwd=folder)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "note: ckpts: no complete checkpoint is here yet\n"
    with watcher(folder) as watched:
        assert watched.line("stderr") == "note: ckpts: no complete checkpoint is here yet"
        write(folder / "ckpts/model_1.h5", 1)
        assert "1 checkpoint, model_1.h5 (exp, alpha 2)" in watched.line()


def test_a_directory_of_runs_names_them(folder: Path) -> None:
    """Whoever watches the folder above the run is shown the run's."""
    done = polyak("watch", ".", "-o", "o.h5", "--once", "--interval", "0.01", cwd=folder)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == (
        "note: .: no complete checkpoint is here yet, but ckpts holds 3 checkpoints; name that "
        "folder\n"
    )


def test_a_checkpoint_that_goes_while_it_is_read_is_no_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer that keeps only its newest ones deletes when it likes."""
    real = pipeline.run

    def run(plan: planning.Plan) -> Report:
        monkeypatch.setattr(pipeline, "run", real)
        (folder / "ckpts/model_1.h5").unlink()
        return real(plan)

    monkeypatch.setattr(pipeline, "run", run)
    notes: list[str] = []
    reports = watch(folder / "ckpts", folder / "o.h5", interval=0.01, on_note=notes.append)
    assert names(next(reports)) == ["model_2.h5", "model_3.h5"]
    assert len(notes) == 1
    assert "model_1.h5" in notes[0]
    assert sorted(os.listdir(folder)) == ["ckpts", "o.h5"]


# --- what ends it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_the_last_output_whole(folder: Path, number: signal.Signals) -> None:
    """Exit 130 or 143, one line, nothing hidden."""
    with watcher(folder) as watched:
        watched.line()
        code, out, err = watched.end(number)
    assert (code, out) == (128 + number, "")
    said = "stopped" if number == signal.SIGINT else "error: ended by SIGTERM"
    assert err == f"{said}; no unfinished file is left\n"
    assert sorted(os.listdir(folder)) == ["ckpts", "o.h5"]
    assert (folder / "o.h5").read_bytes() == made(folder, scheme="exp", last=3)


def test_a_signal_amid_a_publication_leaves_the_output_before(folder: Path) -> None:
    """The old average until the new one is whole."""
    code = (
        "import sys, polyak_cli.formats as module\noriginal = module.write_skeleton\n"
        "def pausing(*arguments, **options):\n"
        "    value = original(*arguments, **options)\n"
        "    print('laid out', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    return value\n"
        "module.write_skeleton = pausing\n"
    )
    with watcher(folder, code=code) as watched:
        assert watched.line() == "laid out"
        assert watched.process.stdin
        watched.process.stdin.write(b"\n")
        watched.process.stdin.flush()
        assert watched.line().startswith("wrote o.h5")
        before = (folder / "o.h5").read_bytes()
        write(folder / "ckpts/model_4.h5", 4)
        assert watched.line() == "laid out"
        assert len(os.listdir(folder)) == 3
        code_, _, err = watched.end()
    assert code_ == 143
    one_line(err)
    assert sorted(os.listdir(folder)) == ["ckpts", "o.h5"]
    assert (folder / "o.h5").read_bytes() == before


def test_another_model_ends_it(folder: Path) -> None:
    """Waiting would not mend that: exit 3, the last output whole."""
    with watcher(folder) as watched:
        watched.line()
        before = (folder / "o.h5").read_bytes()
        other = {"other": {"kernel": np.zeros(3, np.float32)}}
        write_model(folder / "ckpts/model_4.h5", other)
        _, err = watched.process.communicate(timeout=PATIENCE)
    assert watched.process.returncode == 3
    assert "model_4.h5" in one_line(err.decode())
    assert (folder / "o.h5").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"scheme": "exp", "alpha": -1.0}, UsageError),
        ({"scheme": "equal", "alpha": 1.0}, UsageError),
        ({"last": 0}, UsageError),
        ({"monitor": "val_loss"}, UsageError),
        ({"interval": 0.0}, UsageError),
        ({"interval": float("nan")}, UsageError),
        ({"jobs": 0}, UsageError),
    ],
    ids=str,
)
def test_bad_options_are_refused_before_there_is_a_checkpoint(
    tmp_path: Path, options: dict[str, Any], error: type[Exception]
) -> None:
    """Not hours later, when the first epoch is over."""
    (tmp_path / "ckpts").mkdir()
    with pytest.raises(error):
        once(tmp_path, **options)


def test_a_plan_that_is_refused_ends_it_before_anything_is_written(folder: Path) -> None:
    """What a caller of `watch` checks comes first, also where the output is up to date."""
    plans: list[planning.Plan] = []
    (report,) = once(folder, check=plans.append)
    assert [plan.names for plan in plans] == [report.plan.names]
    before = (folder / "o.h5").read_bytes()

    def refuse(_: planning.Plan) -> None:
        raise MismatchError("no")

    for name in ("o.h5", "p.h5"):
        with pytest.raises(MismatchError, match="no"):
            once(folder, name, check=refuse)
    assert (folder / "o.h5").read_bytes() == before
    assert not (folder / "p.h5").exists()


def test_what_is_no_directory_is_refused(folder: Path) -> None:
    """A missing one too: it may be mistyped, and would be waited for for ever."""
    for name in ("missing", "ckpts/model_1.h5"):
        with pytest.raises(CheckpointError, match="is not a directory to watch"):
            list(watch(folder / name, folder / "o.h5", once=True))


def test_an_ambiguous_order_ends_it(folder: Path) -> None:
    """The error that `average` gives."""
    write(folder / "ckpts/model_03.h5", 3)
    with pytest.raises(CheckpointError, match="are both epoch 3"):
        once(folder)


def test_values_that_cannot_be_averaged_end_it(folder: Path) -> None:
    """A run that has diverged is reported."""
    write(folder / "ckpts/model_4.h5", float("nan"))
    with pytest.raises(MismatchError, match=r"model_4\.h5"):
        once(folder)
    assert sorted(os.listdir(folder)) == ["ckpts"]


# --- what is shown --------------------------------------------------------------------------------


def test_each_published_file_is_one_line_of_json(folder: Path) -> None:
    """Each line is flushed, and has the keys of `average --json`."""
    with watcher(folder, "--json") as watched:
        for newest in (3, 4):
            found = json.loads(watched.line())
            assert found["output"] == "o.h5"
            assert found["template"] == f"ckpts/model_{newest}.h5"
            assert found["scheme"] == "exp"
            write(folder / "ckpts/model_4.h5", 4)


def test_quiet_prints_nothing_and_verbose_everything(folder: Path) -> None:
    """As for `average`."""
    arguments = ("watch", "ckpts", "-o", "o.h5", "--once", "--interval", "0.01", "--last", "9")
    done = polyak(*arguments, "-q", cwd=folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = polyak(*arguments, "-v", "--scheme", "linear", cwd=folder)
    assert "averaged model_weights/dense" in done.stdout or "averaged dense" in done.stdout
    assert done.stderr.startswith("note: there are fewer checkpoints than --last 9")


# --- for a long time ------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_publication_beside_a_slow_writer_is_that_of_average(folder: Path) -> None:
    """Ten checkpoints written in place, with locks and pauses, as Keras writes them."""
    writes = (
        "import sys, time, h5py, numpy as np\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from tests.oracle import write_model\n"
        "for k in range(4, 14):\n"
        "    path = f'{sys.argv[1]}/model_{k}.h5'\n"
        "    write_model(path, {'dense': {'kernel': np.zeros(24, np.float32)}}, locking=True)\n"
        "    with h5py.File(path, 'a', locking=True) as file:\n"
        "        for _ in range(3):\n"
        "            file['model_weights/dense/kernel'][()] = np.full(24, k, np.float32)\n"
        "            file.flush()\n"
        "            time.sleep(0.02)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", writes, folder / "ckpts", ROOT])
    seen = 0
    options: dict[str, Any] = {"scheme": "power", "last": 4, "interval": 0.03}
    for report in watch(folder / "ckpts", folder / "o.h5", **options):
        seen += 1
        paths = [checkpoint.path for checkpoint in report.plan.checkpoints]
        reference = folder / "reference.h5"
        average(paths, reference, scheme="power", last=len(paths), force=True)
        assert (folder / "o.h5").read_bytes() == reference.read_bytes()
        if paths[-1].name == "model_13.h5" and len(paths) == 4:
            with h5py.File(paths[-1]) as file:
                assert set(file["model_weights/dense/kernel"][()]) == {13.0}
            break
    assert writer.wait(PATIENCE) == 0
    assert seen >= 1


@pytest.mark.soak
def test_hundreds_of_rounds_leave_memory_and_descriptors_as_they_are(folder: Path) -> None:
    """Each with a new checkpoint, an old one that goes, and several looks that find nothing."""
    write(folder / "ckpts/model_0.h5", 0).write_bytes(b"broken for ever")
    reports = watch(folder / "ckpts", folder / "o.h5", last=3, interval=0.001)
    found: list[tuple[int, int]] = []
    for k in range(4, 204):
        next(reports)
        write(folder / f"ckpts/model_{k}.h5", k)
        (folder / f"ckpts/model_{k - 3}.h5").unlink()
        if k in (54, 203):
            gc.collect()
            found.append((len(os.listdir("/proc/self/fd")), len(gc.get_objects())))
    (files, objects), (files_later, objects_later) = found
    assert files_later == files
    # Python itself remembers some hundred patterns; a plan that is kept has dozens of objects.
    assert objects_later < objects + 10 * 149


def test_waiting_takes_no_processor_time(folder: Path) -> None:
    """Between two looks it sleeps; hundreds of looks cost less than one average a look would."""
    waited: list[float] = []

    class EnoughError(Exception):
        pass

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 50:
            raise EnoughError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", sleep)
        tried = []
        real = formats.probe

        def counted(paths: list[Path], **options: Any) -> Any:
            tried.extend(paths)
            return real(paths, **options)

        patch.setattr(formats, "probe", counted)
        reports = watch(folder / "ckpts", folder / "o.h5", interval=7.0)
        with pytest.raises(EnoughError):
            list(reports)
    assert set(waited) == {7.0}
    assert len(tried) == 3  # each was opened at the first look only
