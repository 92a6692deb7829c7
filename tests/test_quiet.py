from __future__ import annotations

import subprocess
import sys


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, whose standard error is descriptor 2 itself."""
    imports = (
        "import logging, os, sys, warnings\n"
        "from polyak_cli.evaluation.quiet import silence_frameworks, redirect_prints"
    )
    script = f"{imports}\n{code}"
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )


def test_what_is_written_to_the_descriptor_is_held_back() -> None:
    """Messages of C++ code and of child processes do not reach standard error."""
    done = run(
        "with silence_frameworks():\n    os.write(2, b'chatter\\n'); os.system('echo more >&2')"
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_pythons_own_standard_error_is_not_held_back() -> None:
    """Prints, warnings and logged errors reach the terminal."""
    done = run(
        "with silence_frameworks():\n"
        "    os.write(2, b'chatter\\n')\n"
        "    print('printed', file=sys.stderr)\n"
        "    warnings.warn('warned')\n"
        "    logging.getLogger('tensorflow').error('logged')\n"
        "    logging.getLogger('tensorflow').warning('chatter')\n"
        "    logging.getLogger('own').warning('own')\n"
    )
    assert "chatter" not in done.stderr
    for text in ("printed", "UserWarning: warned", "logged", "own"):
        assert text in done.stderr


def test_everything_is_as_before_afterwards() -> None:
    """After the block, and after an exception in it, descriptor, stream and levels are restored."""
    done = run(
        "before = (sys.stderr, logging.getLogger('absl').level, len(os.listdir('/proc/self/fd')))\n"
        "try:\n"
        "    with silence_frameworks():\n"
        "        raise KeyError\n"
        "except KeyError: pass\n"
        "after = (sys.stderr, logging.getLogger('absl').level, len(os.listdir('/proc/self/fd')))\n"
        "assert before == after\n"
        "os.write(2, b'heard')\n"
    )
    assert (done.stderr, done.returncode) == ("heard", 0)


def test_the_last_line_held_back_is_reported() -> None:
    """An error can quote the last line that C++ code wrote before it."""
    done = run(
        "with silence_frameworks() as held_back:\n"
        "    assert held_back() == ''\n"
        "    os.write(2, b'one\\n  two \\xff\\n\\n')\n"
        "    print(ascii(held_back()))\n"
    )
    assert done.stdout == "'two \\ufffd'\n"


def test_a_closed_standard_error_is_no_reason_to_fail() -> None:
    """If descriptor 2 is closed, there is nothing to hold back."""
    done = run("os.close(2)\nwith silence_frameworks() as held_back:\n    print(repr(held_back()))")
    assert done.stdout == "''\n"


def test_what_others_print_goes_to_standard_error() -> None:
    """Prints of Python, C and child processes go to stderr, inside `silence_frameworks` too."""
    done = run(
        "print('before')\n"
        "try:\n"
        "    with redirect_prints():\n"
        "        with silence_frameworks(): print('printed'); os.write(2, b'chatter\\n')\n"
        "        os.system('echo child'); os.write(1, b'written\\n'); 1 / 0\n"
        "except ZeroDivisionError: print('after')\n"
    )
    assert done.stdout == "before\nafter\n"
    assert sorted(done.stderr.splitlines()) == ["child", "printed", "written"]
