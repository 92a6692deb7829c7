"""The command line: parse argv, call a tool, print its result, and exit with a code.

The only part of the package that imports click, prints or exits.  This module holds the group of
commands, signals and exit codes.  It knows nothing of averaging: the tools raise errors, and here
they become one line and an exit code.
"""

from __future__ import annotations

import atexit
import os
import resource
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

import click

from polyak_cli import __version__
from polyak_cli.cli.averaging import average, verify, watch
from polyak_cli.cli.geometry import geometry
from polyak_cli.cli.guide import completion, guide, show_help
from polyak_cli.cli.looking import check, diff, inspect, uploads
from polyak_cli.cli.models import evaluate, recalibrate, train
from polyak_cli.cli.options import DONE, EXAMPLE
from polyak_cli.cli.sweeps import sweep
from polyak_cli.cli.tables import lay_out
from polyak_cli.errors import PolyakError, UsageError, word_size

#: Exit codes besides those of the commands.  After a signal it is 128 plus the signal's number.
USAGE, FAILED = 2, 3
#: Bytes of address space without which numpy and h5py cannot be relied on to load and work.
_ADDRESS_SPACE = 160 << 20


@click.group(
    # The commands inherit the names of the option that shows the help.
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
    epilog=EXAMPLE.format("polyak average ckpts/ --last 10 -o final.h5", "Guide: polyak guide"),
)
@click.option(
    "-V",
    "--version",
    is_flag=True,
    expose_value=False,
    callback=lambda context, _, wanted: _show_version(context) if wanted else None,
    help="Show the version and exit; with -v, also which kernel does the arithmetic.",
)
# Eager, so that it is known when -V is handled, in whatever order they come.
@click.option("-v", "--verbose", is_flag=True, is_eager=True, hidden=True)
def cli(verbose: bool) -> None:
    """Average the checkpoints of a training run into one better-behaved model."""
    if verbose:
        raise UsageError("-v before a command goes with -V only; give it after the command")
    _check_address_space()


def _show_version(context: click.Context) -> NoReturn:
    """Print the version, and with -v which kernel does the arithmetic; then exit."""
    print(f"polyak, version {__version__}")
    if context.params.get("verbose"):
        from polyak_cli.engine.kernel import describe_kernel

        print(f"kernel: {describe_kernel()}")
    context.exit()


def _check_address_space() -> None:
    """Refuse a limit of address space under which numpy or h5py would crash while loading.

    Raises:
        PolyakError: the limit is too low; it names both sizes.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < _ADDRESS_SPACE:
        raise PolyakError(
            f"the address space is limited to {word_size(limit)} (ulimit -v), and numpy and h5py "
            f"alone take most of {word_size(_ADDRESS_SPACE)}; allow at least as much"
        )


for _command in (
    average,
    check,
    completion,
    diff,
    evaluate,
    geometry,
    guide,
    inspect,
    recalibrate,
    show_help,
    sweep,
    train,
    uploads,
    verify,
    watch,
):
    cli.add_command(_command)


class _Terminated(BaseException):
    """A signal asked the program to end; raised, so that every ``finally`` cleans up.

    Used for Ctrl-C too, because click answers a KeyboardInterrupt with an empty line.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _terminate(number: int, _frame: object) -> NoReturn:
    for other in _SIGNALS:  # the clean-up itself must not be interrupted
        signal.signal(other, _pass_over)
    raise _Terminated(number)


def _pass_over(_number: int, _frame: object) -> None:
    """Do nothing.  With SIG_IGN, Python complains of a signal that came just before."""


def _find_signal(error: BaseException | None) -> int | None:
    """Return the number of the signal that led to an exception, or None.

    Other code may answer `_Terminated` with an exception of its own: Python 3.11 does so in
    ``__set_name__``, which runs while classes are made, as in every import.
    """
    while error is not None:
        if isinstance(error, _Terminated):
            return error.number
        error = error.__cause__ or error.__context__
    return None


def _ask_again(lost: sys.UnraisableHookArgs) -> None:
    """Raise again what Python dropped, as it does in destructors and weak references' callbacks."""
    number = _find_signal(lost.exc_value)
    if number is None:
        sys.__unraisablehook__(lost)
        return
    signal.signal(signal.SIGALRM, lambda _number, frame: _terminate(number, frame))
    # In a millisecond; if the exception is dropped again, this hook starts the timer again.
    signal.setitimer(signal.ITIMER_REAL, 0.001)


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    _open_standard_streams()
    # Only inner products use BLAS, on threads of polyak's own.  Those of BLAS would cost memory and
    # make a fork unsafe.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    sys.unraisablehook = _ask_again
    try:  # around everything: a signal may come between any two steps
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, _terminate)
        code = _run(arguments)
        # The work is done and printed; a late signal must not change the exit code.
        for number in (*_SIGNALS, signal.SIGALRM):
            signal.signal(number, _pass_over)
    except BaseException as error:
        ended = _find_signal(error)
        if ended is None:
            raise
        code = 128 + ended
        interrupted = ended == signal.SIGINT
        if interrupted and [*(sys.argv[1:] if arguments is None else arguments)][:1] == ["watch"]:
            # How everybody ends it, so it is no error; the code is that of the signal all the same.
            print("stopped; no unfinished file is left", file=sys.stderr)
        else:
            how = "interrupted" if interrupted else f"ended by {signal.Signals(ended).name}"
            _fail(f"{how}; no unfinished file is left", code)
    _leave(code)


def _leave(code: int) -> NoReturn:
    """Exit without finalising the interpreter, which takes as long as averaging a small run."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or its reader is gone
            stream.flush()
    if "mpi4py.MPI" in sys.modules:  # all ranks wait until each of them finalizes MPI
        sys.exit(code)
    os._exit(code)


def _open_standard_streams() -> None:
    """Open streams that the caller closed (``>&-``); a later file would get their number."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115 (open to the end)


def _run(arguments: Sequence[str] | None) -> int:
    """Run a command and return its exit code; unexpected exceptions keep their traceback."""
    try:
        code = cli.main(args=arguments, prog_name="polyak", standalone_mode=False)
    except (click.ClickException, PolyakError, MemoryError) as error:
        if _find_signal(error) is not None:
            raise  # `main` answers it
        return _explain(error)
    return code if isinstance(code, int) else DONE


def _explain(error: Exception) -> int:
    """Print what a command raised and return the exit code."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        print(error.format_message(), file=sys.stderr)
        return USAGE
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        message = error.format_message().rstrip(".")
        see = " See" if message.endswith("?") else "; see"  # after "Did you mean ...?"
        return _fail(message + (f"{see} {context.command_path} --help" if context else ""), USAGE)
    if isinstance(error, MemoryError):
        return _fail(
            "memory ran out; use fewer --jobs or less --max-memory, or allow more (ulimit -v)",
            FAILED,
        )
    return _fail(str(error), USAGE if isinstance(error, UsageError) else FAILED)


def _fail(message: str, code: int) -> int:
    line = " ".join(part.strip() for part in message.splitlines())  # click lists choices in lines
    for part in lay_out([f"error: {line}"], sys.stderr):
        print(part, file=sys.stderr)
    return code
