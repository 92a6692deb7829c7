"""Keeping a framework's chatter off the user's terminal.

Knows descriptors and log levels, no framework.  Keeps what a user's own code prints apart from the
program's results.  Silences what C++ code writes to descriptor 2 and
what TensorFlow's Python loggers say below an error; Python's own standard error, warnings and
exceptions keep their way to the terminal.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, TextIO

_LOGGERS = ("absl", "tensorflow")


@contextlib.contextmanager
def silence_frameworks() -> Iterator[Callable[[], str]]:
    """Hold back a framework's chatter while the block runs.

    Descriptor 2 goes to a temporary file meanwhile; where Python's standard error is that very
    descriptor, it is led around.  Not for several threads at a time.

    Yields:
        A function that returns the last line held back, "" where there is none: what to add to an
        error that C++ code explained there.
    """
    # What is logged after the block, at the interpreter's end, is chatter too.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with contextlib.ExitStack() as stack:
        for name in _LOGGERS:
            stack.enter_context(_raise_level(logging.getLogger(name), logging.ERROR))
        held = stack.enter_context(tempfile.TemporaryFile())
        with contextlib.suppress(OSError):  # descriptor 2 may be closed: then nothing is shown
            stack.enter_context(_redirect_stderr(held))
        yield lambda: _read_last_line(held)


@contextlib.contextmanager
def redirect_prints() -> Iterator[None]:
    """Lead descriptor 1 to where descriptor 2 leads while the block runs.

    So what others' code prints, in Python, in C or in a child process, does not mix with the
    results on standard output.  Outside of `silence_frameworks`, which would hold it back.
    """
    sys.stdout.flush()
    outside = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(outside, 1)
        os.close(outside)


@contextlib.contextmanager
def _raise_level(logger: logging.Logger, level: int) -> Iterator[None]:
    before = logger.level
    logger.setLevel(max(before, level))
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _redirect_stderr(held: IO[bytes]) -> Iterator[None]:
    """Lead descriptor 2 into a file, and Python's standard error around it."""
    outside = os.dup(2)
    stderr = sys.stderr
    try:
        around = _reopen(stderr, outside)
        os.dup2(held.fileno(), 2)
        sys.stderr = around or stderr
        yield
    finally:
        if around:
            around.flush()
        sys.stderr = stderr
        os.dup2(outside, 2)
        os.close(outside)


def _reopen(stream: TextIO | None, descriptor: int) -> TextIO | None:
    """Return a stream to the descriptor in place of one to descriptor 2, else None."""
    try:
        if stream is None or stream.fileno() != 2:
            return None
        stream.flush()
    except (OSError, ValueError, AttributeError):  # closed, or no file at all
        return None
    return open(
        descriptor, "w", encoding=stream.encoding, errors=stream.errors, buffering=1, closefd=False
    )


def _read_last_line(held: IO[bytes]) -> str:
    size = os.fstat(held.fileno()).st_size
    tail = os.pread(held.fileno(), 4096, max(0, size - 4096))
    lines = [line for line in tail.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
