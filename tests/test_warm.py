"""A command that is forked ends as one that is started."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.command import SAMPLES, environment, fresh, polyak
from tests.warm import Warm


@pytest.mark.parametrize(
    "words",
    [
        ("average", SAMPLES, "--last", "3", "-o", "\udcff.h5"),  # prints a name that is not UTF-8
        ("inspect", SAMPLES / "model_499.h5", "--json"),
        ("average", "gone", "-o", "o.h5"),
        ("averag",),
        (),
    ],
)
def test_it_prints_the_same_and_ends_with_the_same_code(
    tmp_path: Path, words: tuple[object, ...]
) -> None:
    """In the folder that is named, where it finds and writes the same files."""
    ends = []
    for run in (fresh, polyak):
        folder = tmp_path / run.__name__
        folder.mkdir()
        done = run(*words, cwd=folder)
        text = done.stdout.split("\nread ")[0]  # without times
        ends.append((done.returncode, text, done.stderr, sorted(p.name for p in folder.iterdir())))
    assert ends[0] == ends[1]


def test_commands_at_the_same_time_do_not_wait_for_one_another(tmp_path: Path) -> None:
    """Each of the threads that start them gets what its own command printed."""
    texts: dict[str, str] = {}

    def run(topic: str) -> None:
        texts[topic] = polyak("guide", topic, cwd=tmp_path).stdout

    topics = ["tutorial", "schemes", "verify"]
    threads = [threading.Thread(target=run, args=(topic,)) for topic in topics]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {topic: fresh("guide", topic, cwd=tmp_path).stdout for topic in topics}


def test_a_command_that_does_not_end_is_killed(tmp_path: Path) -> None:
    """It is an error, and the next command runs."""
    warm = Warm("tests.imported")
    (tmp_path / "ckpts").mkdir()
    with pytest.raises(TimeoutError):
        warm.run(["watch", "ckpts", "-o", "o.h5"], tmp_path, environment(), longest=0.5)
    assert warm.run(["--version"], tmp_path, environment(), longest=120).returncode == 0


def test_an_exception_keeps_its_traceback(tmp_path: Path) -> None:
    """And its exit code, as in a process of its own."""
    (tmp_path / "sabotage.py").write_text(
        "import polyak_cli.cli as cli\n"
        "def fail(arguments): raise RuntimeError('a bug')\n"
        "cli._run = fail\n"
    )
    environ = environment()
    environ["PYTHONPATH"] += f":{tmp_path}"
    done = Warm("sabotage").run(["guide"], tmp_path, environ, longest=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("RuntimeError: a bug\n")
