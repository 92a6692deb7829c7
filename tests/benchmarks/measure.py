"""Run commands as a user would, and measure wall clock, processor time and memory.

Knows no contender and no file format.  On Linux no peak is reported below that of the measuring
process itself, some 20 MB: a child inherits it.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
#: Seconds after which a contender has fewer rounds, and after which it is given up.
SLOW, LIMIT = 20.0, 1800.0


class Failed(Exception):  # noqa: N818 - what a contender has, which is no error of ours
    """A command did not end well; the message is its last word."""


class Run(NamedTuple):
    """What one process, with all that it started, cost."""

    seconds: float  # wall clock, from before it was started until it was gone
    cpu: float  # seconds of processor, user and system
    peak: int  # bytes, resident, of the largest process


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to do the job."""

    key: str
    label: str
    command: Sequence[str]
    output: Path | None = None  # removed before and after every run
    absent: str = ""  # why it cannot take part
    variables: Mapping[str, str] = field(default_factory=dict)  # added to its environment
    beside: str = "floor"  # the key of the contender that its ratios are taken to


@dataclass(frozen=True, slots=True)
class Measurement:
    """All runs of one contender, or why there are none."""

    contender: Contender
    runs: Sequence[Run]
    error: str = ""
    verdict: str = ""  # what `inspect` said of the first output

    @property
    def seconds(self) -> float:
        """Median of the wall clock."""
        return statistics.median(run.seconds for run in self.runs)

    @property
    def cpu(self) -> float:
        """Median of the processor's seconds."""
        return statistics.median(run.cpu for run in self.runs)

    @property
    def peak(self) -> int:
        """Bytes of the largest process of all runs."""
        return max(run.peak for run in self.runs)

    def data(self, floor: Measurement | None = None) -> dict[str, Any]:
        """Return what JSON can hold; with the ratios to another one's seconds if given."""
        head: dict[str, Any] = {
            "key": self.contender.key,
            "label": self.contender.label,
            "rounds": len(self.runs),
            "error": self.error or self.contender.absent,
            "output": self.verdict,
        }
        if not self.runs:
            return head
        return head | {
            "seconds": self.seconds,
            "cpu": self.cpu,
            "peak": self.peak,
            "ratio": ratio(self, floor),
            "cpu_ratio": ratio(self, floor, "cpu"),
            "every": [run.seconds for run in self.runs],
        }


_OTHERS = ("PYTHON", "POLYAK_")


def environment() -> dict[str, str]:
    """Return the environment of every contender: the user's, without what alters Python or polyak.

    Compiled modules are kept, as they are wherever the program is installed.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OTHERS)}
    return kept | {"TF_CPP_MIN_LOG_LEVEL": "3"}


def run(
    command: Sequence[str], limit: float = LIMIT, variables: Mapping[str, str] | None = None
) -> Run:
    """Run a command to its end.

    Args:
        command: program and arguments; started in the project's folder.
        limit: seconds after which it is killed.
        variables: added to the environment.

    Raises:
        Failed: it did not exit with 0.
    """
    with tempfile.TemporaryFile() as said:
        begun = time.perf_counter()
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment() | {**(variables or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                start_new_session=True,
            )
        except OSError as error:
            raise Failed(f"{command[0]}: {error.strerror}") from None
        # wait4, and not Popen.wait, tells the resources of this very child.
        killer = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
        killer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        finally:
            killer.cancel()
        seconds = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise Failed(_last_word(said.read(), process.returncode, seconds))
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * _RSS_UNIT)


_RSS_UNIT = 1 if os.uname().sysname == "Darwin" else 1024  # getrusage's unit differs


def _last_word(said: bytes, code: int, seconds: float) -> str:
    if code == -signal.SIGKILL:
        return f"killed after {seconds:.0f} s (by the time limit, or for want of memory)"
    lines = said.decode(errors="replace").strip().splitlines()
    return f"exit code {code}: {lines[-1][:300] if lines else 'said nothing'}"


def interleaved(
    contenders: Iterable[Contender],
    rounds: int,
    *,
    slow_rounds: int = 3,
    before: Callable[[], None] = lambda: None,
    inspect: Callable[[Contender], str] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Measurement]:
    """Run the contenders A B C, A B C, ..., so that a disturbance meets them all.

    Args:
        contenders: the absent are kept in the result, without runs.
        rounds: of each.
        slow_rounds: of one that takes more than `SLOW` seconds.
        before: called ahead of each run, unmeasured; where it fails, so does the contender.
        inspect: judges the output of a contender's first run.
        say: called with a line for each step.

    Returns:
        By key, in the order given.
    """
    found = {c.key: Measurement(c, ()) for c in contenders}
    for number in range(rounds):
        for key, so_far in found.items():
            if so_far.contender.absent or so_far.error:
                continue
            if len(so_far.runs) >= slow_rounds and so_far.seconds > SLOW:
                continue
            found[key] = _once(so_far, before, inspect)
            say(f"round {number + 1} of {rounds}: {_told(found[key])}")
    return found


def _once(
    so_far: Measurement,
    before: Callable[[], None],
    inspect: Callable[[Contender], str] | None,
) -> Measurement:
    contender = so_far.contender
    remove(contender.output)
    # What an earlier contender left for the disk must not be paid by this one's fsync.
    os.sync()
    try:
        before()
        runs = (*so_far.runs, run(contender.command, variables=contender.variables))
        verdict = so_far.verdict
        if inspect and contender.output and not so_far.runs:
            verdict = inspect(contender)
        return Measurement(contender, runs, verdict=verdict)
    except Failed as error:
        return Measurement(contender, (), f"failed: {error}")
    finally:
        remove(contender.output)


def _told(measured: Measurement) -> str:
    label = measured.contender.label
    if measured.error:
        return f"{label}: {measured.error}"
    last = measured.runs[-1]
    return f"{label}: {last.seconds:.2f} s, {last.peak / 1e6:.0f} MB"


def describe(found: Mapping[str, Measurement]) -> list[dict[str, Any]]:
    """Return the data of all measurements, each with the ratios to the one it is put beside."""
    return [one.data(found.get(one.contender.beside)) for one in found.values()]


def remove(path: Path | None) -> None:
    """Remove a file or a folder, if it is there."""
    if path and path.is_dir():
        shutil.rmtree(path)
    elif path:
        path.unlink(missing_ok=True)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of what `Measurement.data` gave, with columns aligned."""
    lines: list[tuple[str, ...]] = [
        ("way", "seconds", "ratio", "CPU seconds", "CPU ratio", "peak memory", "output")
    ]
    for row in rows:
        if "seconds" not in row:
            lines.append((row["label"], "-", "-", "-", "-", "-", row["error"]))
            continue
        lines.append(
            (
                row["label"],
                f"{row['seconds']:.2f}",
                _times(row["ratio"]),
                f"{row['cpu']:.2f}",
                _times(row["cpu_ratio"]),
                f"{row['peak'] / 1e6:,.0f} MB",
                row["output"] or "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )


def _times(value: float | None) -> str:
    return f"{value:.2f}" if value is not None else "-"


@dataclass(frozen=True, slots=True)
class Reach:
    """One figure that the program means to reach."""

    what: str
    value: float | None  # None where nothing was measured
    limit: float
    least: bool = False  # the limit is a lower bound
    unit: str = "times"

    @property
    def missed(self) -> bool:
        """Return whether it was measured and is beyond the limit."""
        if self.value is None:
            return False
        return self.value < self.limit if self.least else self.value > self.limit

    def data(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return {
            "what": self.what,
            "value": self.value,
            "limit": self.limit,
            "least": self.least,
            "unit": self.unit,
            "missed": self.missed,
        }

    def __str__(self) -> str:
        bound = f"{'at least' if self.least else 'at most'} {self.limit:g} {self.unit}"
        if self.value is None:
            return f"   -    {self.what}: not measured ({bound})"
        return f"{'MISSED' if self.missed else 'ok    '}  {self.what}: {self.value:.2f} ({bound})"


def ratio(
    one: Measurement | None, other: Measurement | None, what: str = "seconds"
) -> float | None:
    """Return how many times more of something one took than the other; None unless both ran.

    Args:
        one: above.
        other: below.
        what: "seconds" of the clock, "cpu" seconds, or "peak" memory.
    """
    if not one or not other or not one.runs or not other.runs or not getattr(other, what):
        return None
    return float(getattr(one, what) / getattr(other, what))
