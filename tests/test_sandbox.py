"""Each limit of a child that reads headers: kept, and named by the error when it is reached."""

from __future__ import annotations

import os
import resource
import signal
import time
from typing import Any

import pytest

from polyak_cli.errors import FormatError
from polyak_cli.processes import sandbox
from polyak_cli.processes.sandbox import Heartbeat


def outcome_of(task: sandbox.Task) -> str:
    """Run a task that fails, and return its error line."""
    (outcome,) = sandbox.run_each(task, ["x"], ["a.h5"])
    assert isinstance(outcome, FormatError)
    assert str(outcome).startswith("a.h5: ")
    return str(outcome)


def spin(seconds: float) -> None:
    """Use processor time."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_the_limit_of_processor_time_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop without a heartbeat ends after so many seconds of processor time."""
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 0)
    line = outcome_of(lambda _item, _heartbeat: spin(20))
    assert "0 seconds of processor time without a heartbeat, the limit" in line
    assert "damaged" not in line


def test_the_limit_of_waiting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that does not return ends after so many seconds."""
    monkeypatch.setattr(sandbox, "WALL_SECONDS", 0.2)
    line = outcome_of(lambda _item, _heartbeat: time.sleep(60))
    assert "0.2 seconds without a heartbeat, the limit; its file system may" in line
    assert "damaged" not in line


def test_the_limit_of_address_space_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """An allocation beyond the limit fails; one within it succeeds."""
    monkeypatch.setattr(sandbox, "GROWTH_BYTES", 64 << 20)

    def allocate(nbytes: int, _heartbeat: Heartbeat) -> int:
        return len(bytearray(nbytes))

    # Far more than the limit: what a long test run has freed may be used again without growing.
    line = outcome_of(lambda _item, heartbeat: allocate(4 << 30, heartbeat))
    assert "needs more than 67.1 MB of memory, the limit of address space; leave" in line
    assert "damaged" not in line
    assert list(sandbox.run_each(allocate, [16 << 20], ["a"])) == [16 << 20]


def test_a_limit_of_the_user_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `ulimit -v` or `ulimit -t`, the error says that it may be the reason."""
    limits = {resource.RLIMIT_AS: "ulimit -v", resource.RLIMIT_CPU: "ulimit -t"}
    getrlimit = resource.getrlimit
    monkeypatch.setattr(
        resource, "getrlimit", lambda k: (1 << 50, 1 << 50) if k in limits else getrlimit(k)
    )

    def run_out(_item: Any, _heartbeat: Heartbeat) -> None:
        raise MemoryError

    assert "the limit of address space, or ulimit -v; leave" in outcome_of(run_out)
    killed = outcome_of(lambda _item, _heartbeat: os.kill(os.getpid(), signal.SIGXCPU))
    assert "without a heartbeat, the limit, or ulimit -t. Leave" in killed


def test_a_child_killed_from_outside_is_not_blamed_on_the_file() -> None:
    """The system kills a process when memory runs out; no limit of this program was reached."""
    line = outcome_of(lambda _item, _heartbeat: os.kill(os.getpid(), signal.SIGKILL))
    assert "was killed from outside (SIGKILL), perhaps because memory ran out" in line
    assert "damaged" not in line
    assert "limit" not in line


@pytest.mark.slow
def test_a_loop_with_heartbeats_may_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """`over` sends them, so that only a loop without progress reaches the limit."""
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 1)

    def task(item: int, heartbeat: Heartbeat) -> int:
        for _ in heartbeat.over(range(item)):
            spin(0.5)
        return item

    assert list(sandbox.run_each(task, [8], ["a"])) == [8]


def test_heartbeats_are_sent_before_each_item_but_not_too_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`over` yields what it is given, lazily; a second heartbeat at once is left out."""
    times = iter([0.0, 0.01, 0.2, 0.21])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    log: list[object] = []
    heartbeat = Heartbeat(lambda: log.append("beat"))
    for item in heartbeat.over(iter("abcd")):
        log.append(item)
    assert log == ["beat", "a", "b", "beat", "c", "d"]
