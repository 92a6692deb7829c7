"""What goes wrong in the middle: signals, full disks, vanishing folders, two runs at once.

Whatever happens, an older output is intact or the new one is complete, no unfinished file is left,
and no process outlives the command.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.command import POLYAK, Tree, environment, one_line, polyak, script, scripted, tree
from tests.faults.runs import CHANGES, FOLDED, LAID_OUT, OLD, go_on, paused, write_run
from tests.oracle import naive_average, read_model, same_bits

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Code after which a child takes a moment before it lays out the output.
SLOWLY = (
    "import time, polyak_cli.formats as formats\nreal_write = formats._write_one\n"
    "def write_one(*arguments):\n"
    "    time.sleep(0.3)\n"
    "    return real_write(*arguments)\n"
    "formats._write_one = write_one\n"
)


class Big(NamedTuple):
    """A run that takes a few hundred milliseconds to average."""

    folder: Path
    average: bytes  # what it gives
    seconds: float  # that one run took here, from its start to its end


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Big]:
    """Return a folder with such a run in ckpts/."""
    folder = tmp_path_factory.mktemp("big")
    (folder / "ckpts").mkdir()
    write_run(folder / "ckpts", 10, 5_000_000)  # 20 MB each
    for _ in range(2):  # the second one meets what later ones meet: files in the page cache
        begun = time.monotonic()
        done = polyak("average", "ckpts", "-o", "o.h5", "-q", "--force", "--jobs", "1", cwd=folder)
        seconds = time.monotonic() - begun
        assert done.returncode == 0, done.stderr
    yield Big(folder, (folder / "o.h5").read_bytes(), seconds)
    shutil.rmtree(folder)


def alive(group: int) -> list[int]:
    """Return the processes of a group that still run."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[2]) == group and fields[0] not in "ZX":
            found.append(int(status.parent.name))
    return found


def gone(group: int) -> bool:
    """Tell whether a group of processes ends within seconds."""
    for _ in range(500):
        if not alive(group):
            return True
        time.sleep(0.01)
    return False


def answers(process: int) -> bool:
    """Tell whether a process has set its handlers; before that, a signal meets Python's start-up.

    SIGHUP is the last that `cli.main` sets, and Python itself sets none for it.
    """
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:  # it has just ended
        return False
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGHUP - 1) & 1)


# --- signals at random moments --------------------------------------------------------------------


class Trial:
    """One run that is sent a signal at a moment drawn from a seed."""

    def __init__(self, big: Big, seed: int, signals: tuple[signal.Signals, ...]) -> None:
        self.folder = big.folder / f"out{seed}"
        self.folder.mkdir()
        self.output = self.folder / "average.h5"
        self.output.write_bytes(OLD)
        self.random = random.Random(seed)
        self.number = self.random.choice(signals)
        self.expected = big.average
        self.process = subprocess.Popen(
            [*POLYAK, "average", "ckpts", "--force", "--jobs", "1", "-q", "-o", self.output],
            cwd=big.folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        if self.random.random() < 0.7:  # most while tensors are folded, some at any moment
            while self.process.poll() is None and not self.hidden():
                time.sleep(0.001)
            time.sleep(self.random.uniform(0, big.seconds / 2))
        else:
            while self.process.poll() is None and not answers(self.process.pid):
                time.sleep(0.001)
            time.sleep(self.random.uniform(0, big.seconds))
        self._send()
        self.out, self.err = self.process.communicate(timeout=60)

    def _send(self) -> None:
        if self.process.poll() is None and self.random.random() < 0.5:
            os.killpg(self.process.pid, self.number)  # as a terminal does: to the children too
        else:
            self.process.send_signal(self.number)

    def hidden(self) -> list[str]:
        """Return the names of unfinished files."""
        return [name for name in os.listdir(self.folder) if name != "average.h5"]

    def check(self) -> str:
        """Check what every end must leave behind and say which end it was."""
        found = self.output.read_bytes()
        assert found in (OLD, self.expected)
        assert gone(self.process.pid)
        code = self.process.returncode
        if code == 0:
            assert found == self.expected
            assert self.err == ""
            return "done"
        if code == -self.number:  # before the program had set its handlers, or SIGKILL
            assert found == OLD or self.number == signal.SIGKILL
            return "killed"
        assert code == 128 + self.number, self.err
        assert one_line(self.err).endswith("; no unfinished file is left")
        return "ended"


def _signals(big: Big, first: int, count: int) -> None:
    """Make at least so many trials, and go on until a quarter of that number met a run at work.

    How long a run takes depends on what else the machine does: that a signal comes too late is no
    fault of the program, but one that always does would test nothing.
    """
    ends: Counter[str] = Counter()
    for seed in range(first, first + 10 * count):
        trial = Trial(big, seed, ENDING)
        ends[trial.check()] += 1
        assert trial.hidden() == []
        shutil.rmtree(trial.folder)
        if ends.total() >= count and ends["ended"] >= count // 4:
            return
    pytest.fail(f"hardly any signal met a run at work: {ends}")


@pytest.mark.slow
def test_a_signal_at_any_moment_leaves_the_old_or_the_new_output(big: Big) -> None:
    """SIGINT, SIGTERM, SIGHUP: exit 130, 143, 129, one line, nothing unfinished, no child."""
    _signals(big, 0, 24)


@pytest.mark.soak
def test_hundreds_of_signals_leave_nothing(big: Big) -> None:
    """The same, often enough to meet the moments that are rare."""
    _signals(big, 1000, 200)


@pytest.mark.slow
@pytest.mark.parametrize(
    "seeds", [range(2000, 2003), pytest.param(range(2003, 2030), marks=pytest.mark.soak)], ids=len
)
def test_a_killed_run_leaves_the_old_output_and_disturbs_no_later_run(
    big: Big, seeds: range
) -> None:
    """SIGKILL cannot be tidied after; the next run passes over what is left and succeeds."""
    for seed in seeds:
        trial = Trial(big, seed, (signal.SIGKILL,))
        trial.check()
        assert len(trial.hidden()) <= 1
        assert all(name.startswith(".polyak-") for name in trial.hidden())
        options = ("average", "ckpts", "-q", "--force", "-o", trial.output)
        assert polyak(*options, cwd=big.folder).returncode == 0
        assert trial.output.read_bytes() == trial.expected
        shutil.rmtree(trial.folder)


def test_leftovers_among_the_checkpoints_are_passed_over(run_folder: Path) -> None:
    """A killed run that wrote beside its checkpoints does not spoil them."""
    (run_folder / "ckpts/.polyak-99-dead.partial").write_bytes(b"half")
    (run_folder / "ckpts/.polyak-99-dead.partial.h5").write_bytes(b"half")
    done = polyak("average", "ckpts", "-o", "ckpts/average.h5", "-v", cwd=run_folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "passed over: ckpts/.polyak-99-dead.partial" in done.stdout
    assert "3 checkpoints" in done.stdout


def check_sigterm(code: str, folder: Path) -> None:
    """Average after some code by which SIGTERM comes; check that it is answered in one line.

    Nothing may be left, nor come after half a second: an orphan would have written by then.
    """
    done = scripted(code, "average", "ckpts", "-o", "o.h5", cwd=folder)
    assert done.returncode == 143
    assert one_line(done.stderr) == "ended by SIGTERM; no unfinished file is left"
    time.sleep(0.5)
    assert os.listdir(folder) == ["ckpts"]


@pytest.mark.parametrize("number", ENDING)
def test_each_signal_has_its_exit_code(run_folder: Path, number: signal.Signals) -> None:
    """What a shell expects: 128 and the signal's number."""
    process = paused(run_folder)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert one_line(err).endswith("; no unfinished file is left")
    assert os.listdir(run_folder) == ["ckpts"]


@pytest.mark.parametrize("number", ENDING)
def test_a_second_signal_does_not_disturb_the_clean_up(
    run_folder: Path, number: signal.Signals
) -> None:
    """An impatient user's second Ctrl-C finds the first one at work: nothing is left."""
    code = (
        "import os, signal, pathlib\nreal = pathlib.Path.unlink\n"
        "def unlink(*arguments, **options):\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    return real(*arguments, **options)\n"
        "pathlib.Path.unlink = unlink\n"
    )
    process = paused(run_folder, code)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    one_line(err)
    assert os.listdir(run_folder) == ["ckpts"]


def test_a_first_signal_in_the_clean_up_leaves_nothing(run_folder: Path) -> None:
    """Even one that comes when the output is written and only its hidden name is to go."""
    code = (
        "import os, signal, pathlib\nreal = pathlib.Path.unlink\n"
        "def unlink(*arguments, **options):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return real(*arguments, **options)\n"
        "pathlib.Path.unlink = unlink\n"
    )
    done = scripted(code, "average", "ckpts", "-q", "-o", "o.h5", cwd=run_folder)
    assert done.returncode == 143
    one_line(done.stderr)
    assert sorted(os.listdir(run_folder)) == ["ckpts", "o.h5"]
    assert same_bits(
        read_model(run_folder / "o.h5"),
        naive_average([run_folder / f"ckpts/model_{k}.h5" for k in (1, 2, 3)], [1] * 3),
    )


def test_a_signal_while_a_child_is_forked_is_answered_once(run_folder: Path) -> None:
    """The child of a fork never runs its parent's clean-up, nor speaks for it."""
    code = (
        "import os, signal\nfork = os.fork\n"
        "def forked():\n"
        "    pid = fork()\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"  # both of them, at the worst moment
        "    return pid\n"
        "os.fork = forked\n"
    )
    done = scripted(code, "average", "ckpts", "-o", "o.h5", cwd=run_folder)
    assert done.returncode == 130
    assert one_line(done.stderr) == "interrupted; no unfinished file is left"
    assert os.listdir(run_folder) == ["ckpts"]


@pytest.mark.parametrize("thread", ["main", "other"])
def test_a_signal_while_the_output_is_laid_out_leaves_nothing(
    run_folder: Path, thread: str
) -> None:
    """One that waits while a child is forked ends that child too, or it would go on writing."""
    code = (
        "import os, signal, threading, time\nfork = os.fork\n"
        "def forked():\n"
        "    pid = fork()\n"
        "    if pid and any(name.startswith('.polyak-') for name in os.listdir()):\n"
        f"        if {thread == 'main'}:\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"  # the parent alone, as `kill` does
        "        else:\n"  # as the system may choose; the main thread answers it all the same
        "            other = threading.Thread(target=time.sleep, args=[1], daemon=True)\n"
        "            other.start()\n"
        "            signal.pthread_kill(other.ident, signal.SIGTERM)\n"
        "            time.sleep(0.1)\n"
        "    return pid\n"
        "os.fork = forked\n"
    )
    check_sigterm(SLOWLY + code, run_folder)


def test_a_child_that_its_caller_could_not_name_is_ended(run_folder: Path) -> None:
    """A signal just after a child is made takes it from its caller, but leaves no orphan."""
    code = (
        "import os, signal, polyak_cli.processes.children as module\nreal = module.Child.__init__\n"
        "def made(self, work):\n"
        "    real(self, work)\n"
        "    del self\n"  # as where the call has returned: only the interpreter holds it
        "    if any(name.startswith('.polyak-') for name in os.listdir()):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "module.Child.__init__ = made\n"
    )
    check_sigterm(SLOWLY + code, run_folder)


def test_a_signal_that_python_answers_with_its_own_error_is_answered(run_folder: Path) -> None:
    """In ``__set_name__``, as while numpy is imported, Python 3.11 makes a RuntimeError of it."""
    code = (
        "import os, signal, polyak_cli.formats as module\nreal = module.write_skeleton\n"
        "class Field:\n"
        "    def __set_name__(self, owner, name):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "def write_skeleton(*arguments, **options):\n"
        "    type('Imported', (), {'field': Field()})\n"
        "    return real(*arguments, **options)\n"
        "module.write_skeleton = write_skeleton\n"
    )
    check_sigterm(code, run_folder)


def test_a_signal_before_python_has_bound_a_block_leaves_nothing(run_folder: Path) -> None:
    """While somebody holds the exception, nothing ends such a block but the exit of the program."""
    code = (
        "import contextlib, os, signal\n"
        "manager = contextlib._GeneratorContextManager\nreal, kept = manager.__enter__, []\n"
        "def enter(self):\n"
        "    found = real(self)\n"
        "    try:\n"
        "        if any(name.startswith('.polyak-') for name in os.listdir()):\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "    except BaseException as error:\n"
        "        kept.append(error)\n"
        "        raise\n"
        "    return found\n"
        "manager.__enter__ = enter\n"
    )
    check_sigterm(code, run_folder)


def test_a_signal_that_python_drops_is_answered_all_the_same(run_folder: Path) -> None:
    """What a handler raises in a destructor is lost; the program does not run on as if unasked."""
    code = (
        "import os, signal, time, polyak_cli.formats as module\nreal = module.write_skeleton\n"
        "class Last:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(0)\n"  # here the handler runs
        "def write_skeleton(*arguments, **options):\n"
        "    Last()\n"
        "    time.sleep(0.1)\n"
        "    return real(*arguments, **options)\n"
        "module.write_skeleton = write_skeleton\n"
    )
    check_sigterm(code, run_folder)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_beside_the_work_is_answered_in_one_line(run_folder: Path, when: str) -> None:
    """Between the setting of the handlers and the work, and between the work and the end."""
    code = (
        "import os, signal, time, polyak_cli.cli as module\nreal = module._run\n"
        "def run(arguments):\n"
        f"    code = real(arguments) if {when == 'after'} else 0\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(0)\n"  # here the handler runs
        "    return code\n"
        "module._run = run\n"
    )
    done = scripted(code, "average", "ckpts", "-q", "-o", "o.h5", cwd=run_folder)
    assert done.returncode == 143
    assert one_line(done.stderr) == "ended by SIGTERM; no unfinished file is left"
    assert sorted(os.listdir(run_folder)) == ["ckpts", "o.h5"][: 1 + (when == "after")]


def test_what_is_ignored_stays_ignored(run_folder: Path) -> None:
    """Under nohup, or behind & in a script, neither the program nor its children end."""
    code = (
        "import os, signal\nfork = os.fork\n"
        "def forked():\n"
        "    pid = fork()\n"
        "    if pid == 0:\n"
        "        os.kill(os.getpid(), signal.SIGHUP)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return pid\n"
        "os.fork = forked\n"
    )

    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    done = scripted(code, "average", "ckpts", "-q", "-o", "o.h5", cwd=run_folder, prepare=ignore)
    assert (done.returncode, done.stderr) == (0, "")


# --- what others do meanwhile ---------------------------------------------------------------------


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", [pytest.param("model_1.h5", marks=pytest.mark.slow), "model_3.h5"])
@pytest.mark.parametrize("moment", [LAID_OUT, FOLDED], ids=["before", "after"])
def test_a_checkpoint_that_training_rewrites_is_noticed(
    run_folder: Path, moment: str, name: str, change: Callable[[Path], None]
) -> None:
    """A mixture of old and new bytes is never published: exit 3, the file named, nothing left."""
    process = paused(run_folder, moment=moment)
    change(run_folder / "ckpts" / name)
    code, err = go_on(process)
    assert code == 3
    assert one_line(err).startswith(f"ckpts/{name}: ")
    assert os.listdir(run_folder) == ["ckpts"]


def test_a_new_checkpoint_does_not_disturb(run_folder: Path) -> None:
    """The plan holds: what training adds meanwhile is for the next run."""
    process = paused(run_folder)
    shutil.copy(run_folder / "ckpts/model_1.h5", run_folder / "ckpts/model_4.h5")
    assert go_on(process) == (0, "")


def test_the_output_s_folder_removed_meanwhile(run_folder: Path) -> None:
    """One line that names the output; the folder is not made again."""
    (run_folder / "out").mkdir()
    process = paused(run_folder, output="out/o.h5")
    shutil.rmtree(run_folder / "out")
    code, err = go_on(process)
    assert code == 3
    assert one_line(err).startswith("out/o.h5: cannot be written: ")
    assert os.listdir(run_folder) == ["ckpts"]


def test_an_output_that_appears_meanwhile_is_kept(run_folder: Path) -> None:
    """Without --force the first to finish wins, and the other says so."""
    process = paused(run_folder)
    (run_folder / "o.h5").write_bytes(OLD)
    code, err = go_on(process)
    assert code == 3
    assert one_line(err).startswith("o.h5: already exists; use --force")
    assert (run_folder / "o.h5").read_bytes() == OLD
    assert sorted(os.listdir(run_folder)) == ["ckpts", "o.h5"]


def test_of_two_runs_to_one_output_exactly_one_wins(run_folder: Path) -> None:
    """Both lay out, both finish: one is published, the other refused."""
    first, second = paused(run_folder), paused(run_folder)
    ends = sorted([go_on(first), go_on(second)])
    assert [code for code, _ in ends] == [0, 3]
    assert one_line(ends[1][1]).startswith("o.h5: already exists")
    assert sorted(os.listdir(run_folder)) == ["ckpts", "o.h5"]
    assert len(read_model(run_folder / "o.h5")) == 1


@pytest.mark.slow
def test_two_runs_at_once_race_and_exactly_one_wins(run_folder: Path) -> None:
    """The same without any pause, as a careless script does it."""
    for round_ in range(5):
        output = f"{round_}.h5"
        racers = [
            subprocess.Popen(
                [*POLYAK, "average", "ckpts", "-q", "-o", output],
                cwd=run_folder,
                env=environment(),
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        errors = [racer.communicate(timeout=60)[1] for racer in racers]
        assert sorted(racer.returncode for racer in racers) == [0, 3]
        assert one_line("".join(errors)).startswith(f"{output}: already exists")
    assert all(not name.startswith(".") for name in os.listdir(run_folder))


def test_forced_runs_at_once_leave_one_whole_output(run_folder: Path) -> None:
    """With --force both succeed, and the output is that of one of them, not a mixture."""
    (run_folder / "o.h5").write_bytes(OLD)
    first = paused(run_folder, "", "o.h5", "--force", "--scheme", "equal")
    second = paused(run_folder, "", "o.h5", "--force", "--scheme", "linear")
    assert go_on(first) == (0, "")
    assert go_on(second) == (0, "")
    paths = [run_folder / f"ckpts/model_{k}.h5" for k in (1, 2, 3)]
    assert same_bits(read_model(run_folder / "o.h5"), naive_average(paths, [1, 2, 3]))
    assert sorted(os.listdir(run_folder)) == ["ckpts", "o.h5"]


# --- no room --------------------------------------------------------------------------------------


def test_no_room_is_reported_before_the_work(run_folder: Path, tiny_disk: Path) -> None:
    """What will not fit is refused with both sizes, before a tensor is read."""
    (tiny_disk / "ballast").write_bytes(bytes(900_000))
    done = polyak("average", "ckpts", "-o", "disk/o.h5", cwd=run_folder)
    assert (done.returncode, done.stdout) == (3, "")
    assert one_line(done.stderr).startswith("disk/o.h5: needs ")
    assert os.listdir(tiny_disk) == ["ballast"]


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_disk_that_fills_up_meanwhile(
    run_folder: Path, tiny_disk: Path, force: list[str]
) -> None:
    """Exit 3, one line, nothing unfinished, and an older output intact."""
    if force:
        (tiny_disk / "o.h5").write_bytes(OLD)
    process = paused(run_folder, "", "disk/o.h5", *force)
    with open(tiny_disk / "ballast", "wb", buffering=0) as ballast:
        try:
            while ballast.write(bytes(4096)):
                pass
        except OSError:
            pass
    code, err = go_on(process)
    assert code == 3
    assert "disk/o.h5: no room to write it (No space left on device)" in one_line(err)
    assert sorted(os.listdir(tiny_disk)) == (["ballast", "o.h5"] if force else ["ballast"])
    assert not force or (tiny_disk / "o.h5").read_bytes() == OLD


@pytest.mark.parametrize("spent", [700_000, 1_000_000])
def test_a_quota_that_is_used_up(run_folder: Path, quota: Path, spent: int) -> None:
    """The disk says it has room, and yet refuses: exit 3, one line, the older output intact."""
    (quota / "o.h5").write_bytes(OLD)
    (quota / "ballast").write_bytes(os.urandom(spent))
    subprocess.run(["sync", "-f", quota], check=True)  # btrfs counts what it has written
    done = polyak("average", "ckpts", "-q", "--force", "-o", "disk/home/o.h5", cwd=run_folder)
    assert done.returncode == 3
    line = one_line(done.stderr)
    assert line.startswith("disk/home/o.h5: no room to write it (Disk quota exceeded)"), line
    assert sorted(os.listdir(quota)) == ["ballast", "o.h5"]
    assert (quota / "o.h5").read_bytes() == OLD


def test_a_disk_that_is_full_when_the_output_is_laid_out(run_folder: Path, tiny_disk: Path) -> None:
    """The library that writes the header fails; still one line that names the output's trouble."""
    (tiny_disk / "ballast").write_bytes(bytes(1 << 20))
    blind = "import polyak_cli.storage.publishing as f\nf.check_room = lambda *_: None"
    done = scripted(blind, "average", "ckpts", "-o", "disk/o.h5", cwd=run_folder)
    assert (done.returncode, done.stdout) == (3, "")
    line = one_line(done.stderr)
    assert "disk/o.h5" in line
    assert "No space left on device" in line
    assert os.listdir(tiny_disk) == ["ballast"]


@pytest.mark.parametrize("limit", [0, 1000, 4096, 100_000, 200_000])
def test_a_limit_on_the_size_of_files(run_folder: Path, limit: int) -> None:
    """`ulimit -f`: exit 3, one line, nothing left, wherever the limit strikes."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    before = tree(run_folder)
    done = scripted("", "average", "ckpts", "-o", "o.h5", cwd=run_folder, prepare=limited)
    assert (done.returncode, done.stdout) == (3, ""), done.stderr
    line = one_line(done.stderr)
    assert line.startswith("o.h5: ")
    assert "File too large" in line
    assert tree(run_folder) == before


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_hundreds_of_checkpoints_under_a_low_limit_of_open_files(tmp_path: Path) -> None:
    """320 checkpoints, 128 descriptors: the average is the same bits."""
    (tmp_path / "ckpts").mkdir()
    paths = write_run(tmp_path / "ckpts", 320, 100)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))

    done = scripted(
        "", "average", "ckpts", "-q", "-o", "o.h5", "--jobs", "4", cwd=tmp_path, prepare=limited
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert same_bits(read_model(tmp_path / "o.h5"), naive_average(paths, [1] * 320))


@pytest.mark.parametrize("descriptors", [16, 24, 40])
def test_very_few_open_files_are_enough_or_are_reported(run_folder: Path, descriptors: int) -> None:
    """Whatever the limit, the average is right or the error is one line and leaves nothing."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))

    done = scripted("", "average", "ckpts", "-q", "-o", "o.h5", cwd=run_folder, prepare=limited)
    assert (done.returncode, done.stderr) == (0, "")
    paths = [run_folder / f"ckpts/model_{k}.h5" for k in (1, 2, 3)]
    assert same_bits(read_model(run_folder / "o.h5"), naive_average(paths, [1] * 3))


def test_sources_that_may_only_be_read(run_folder: Path) -> None:
    """Nothing is written beside the checkpoints, and their times are as before."""

    def seen() -> tuple[Tree, list[int]]:
        folder = run_folder / "ckpts"
        return tree(folder), [path.stat().st_mtime_ns for path in sorted(folder.iterdir())]

    before = seen()
    assert polyak("average", "ckpts", "-q", "-o", "o.h5", cwd=run_folder).returncode == 0
    assert seen() == before


def test_no_process_outlives_a_crash_in_a_header(run_folder: Path) -> None:
    """A child that hangs in a header is ended with the run when the user gives up."""
    code = (
        "import polyak_cli.formats.hdf5.keras_files as h, time\n"
        "h.KerasHdf5.scan = lambda *_: time.sleep(600)"
    )
    process = subprocess.Popen(
        script(code, "average", "ckpts", "-o", "o.h5"),
        cwd=run_folder,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    # Importing h5py runs `uname -p`, before the program has set its handlers.
    while process.poll() is None and not (answers(process.pid) and len(alive(process.pid)) > 1):
        time.sleep(0.01)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    one_line(err)
    assert gone(process.pid)


def test_exit_handlers_run_and_what_was_printed_arrives(run_folder: Path) -> None:
    """The program ends without taking the interpreter apart, but not before its last duties."""
    code = "import atexit; atexit.register(print, 'the last word')"
    done = scripted(code, "average", "ckpts", "-n", cwd=run_folder)
    assert done.returncode == 0
    assert done.stdout.startswith("3 checkpoints")
    assert done.stdout.endswith("the last word\n")
