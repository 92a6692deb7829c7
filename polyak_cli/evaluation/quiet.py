"""Keep messages of frameworks off the terminal, and prints of user code off standard output.

C++ code writes to descriptor 2, and TensorFlow's Python loggers write below the level of errors;
both are held back.  Standard error of Python, warnings and exceptions still reach the terminal.
This module knows descriptors and log levels; it imports no framework.
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
    """Hold back the messages of a framework while the block runs.

    Descriptor 2 is redirected to a temporary file; if Python's standard error uses it, that stream
    is reopened on the terminal.  Not for several threads at once, as descriptors belong to the
    process.

    Yields:
        A function that returns the last line held back, or "".  C++ code explains some errors
        there, which the exception does not contain.
    """
    # TensorFlow also logs at the exit of the interpreter, after the block; hence the variable.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with contextlib.ExitStack() as stack:
        for name in _LOGGERS:
            stack.enter_context(_raise_level(logging.getLogger(name), logging.ERROR))
        held = stack.enter_context(tempfile.TemporaryFile())
        with contextlib.suppress(OSError):  # descriptor 2 may be closed; then nothing is shown
            stack.enter_context(_redirect_stderr(held))
        yield lambda: _read_last_line(held)


@contextlib.contextmanager
def redirect_prints() -> Iterator[None]:
    """Redirect descriptor 1 to standard error while the block runs.

    So prints of other code, in Python, C or a child process, do not mix with the results on
    standard output.  Enter it outside `silence_frameworks`, which would hold the prints back.
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
    """Redirect descriptor 2 to a file, except for what Python writes to its standard error."""
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
    """Return a stream on the descriptor that replaces one on descriptor 2, else None."""
    try:
        if stream is None or stream.fileno() != 2:
            return None
        stream.flush()
    except (OSError, ValueError, AttributeError):  # closed, or not a file, as in notebooks
        return None
    return open(
        descriptor, "w", encoding=stream.encoding, errors=stream.errors, buffering=1, closefd=False
    )


def _read_last_line(held: IO[bytes]) -> str:
    size = os.fstat(held.fileno()).st_size
    tail = os.pread(held.fileno(), 4096, max(0, size - 4096))
    lines = [line for line in tail.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
