"""Forks commands from a process that has imported the modules of the program.

Importing takes longer than most commands do, so it is done once for many of them.  Each command is
a process of its own still, with its own arguments, folder, environment, streams and exit code.
What depends on a fresh start (imports, variables that are read with them, memory) is tested with
one: `tests.command.fresh` makes it.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_ROOT = Path(__file__).parents[1]


class Warm:
    """Runs commands that are forked from a process with some modules."""

    def __init__(self, *modules: str) -> None:
        self._modules = modules
        self._idle: list[_Server] = []

    def run(
        self, words: Sequence[str], cwd: Path, environ: Mapping[str, str], longest: float
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end and return exit code, stdout and stderr.

        Args:
            words: the arguments of the command.
            cwd: its folder.
            environ: its environment.  What a module reads while it is imported, it read in the
                environment of the first command.
            longest: seconds after which the command is killed.

        Raises:
            TimeoutError: the command took longer.
        """
        # Commands that run at the same time, started by threads, need a server each.
        server = self._idle.pop() if self._idle else _Server(self._modules, environ)
        with (
            tempfile.TemporaryFile("w+") as stdout,
            tempfile.TemporaryFile("w+") as stderr,
            open(os.devnull) as stdin,
        ):
            streams = [stream.fileno() for stream in (stdin, stdout, stderr)]
            try:
                code = server.run(words, cwd, environ, streams, longest)
            except BaseException:
                server.kill()
                raise
            self._idle.append(server)
            stdout.seek(0)
            stderr.seek(0)
            command = ["polyak", *words]
            return subprocess.CompletedProcess(command, code, stdout.read(), stderr.read())


class _Server:
    """A process that imports modules and then forks commands, one after the other."""

    def __init__(self, modules: Sequence[str], environ: Mapping[str, str]) -> None:
        self._channel, its = socket.socketpair()
        with its:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.warm", str(its.fileno()), *modules],
                cwd=_ROOT,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # so that sys.stdout is buffered, as into a pipe
                pass_fds=[its.fileno()],
                start_new_session=True,
            )
        atexit.register(self._end)

    def run(
        self,
        words: Sequence[str],
        cwd: Path,
        environ: Mapping[str, str],
        streams: Sequence[int],
        longest: float,
    ) -> int:
        request = [*words], str(cwd), dict(environ)
        self._channel.settimeout(longest)
        socket.send_fds(self._channel, [b"."], streams)
        self._channel.sendall(json.dumps(request).encode() + b"\n")
        answer = self._channel.recv(16)
        assert answer, "the process that forks commands has ended"
        return int(answer)

    def kill(self) -> None:
        """End the process, and the command that it waits for."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._end()

    def _end(self) -> None:
        self._channel.close()
        self._process.wait()


def _serve(channel: socket.socket) -> None:
    """Fork a command for each request, and answer with its exit code.

    In the command this returns when that has ended without exiting; an exception passes through, as
    it would from a fresh start.
    """
    requests = channel.makefile("rb")
    while True:
        mark, streams, _, _ = socket.recv_fds(channel, 1, 3)
        if not mark:  # the tests have ended
            return
        words, cwd, environ = json.loads(requests.readline())
        process = os.fork()
        if not process:
            requests.close()
            channel.close()
            _become(words, cwd, environ, streams)
            return
        for stream in streams:
            os.close(stream)
        _, status = os.waitpid(process, 0)
        channel.sendall(str(os.waitstatus_to_exitcode(status)).encode())


def _become(
    words: Sequence[str], cwd: str, environ: Mapping[str, str], streams: Sequence[int]
) -> None:
    """Become the command."""
    from polyak_cli.cli import main

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    sys.argv = [str(_ROOT / "polyak_cli/__main__.py"), *words]
    sys.path[0] = cwd
    main()


if __name__ == "__main__":
    for module in sys.argv[2:]:
        importlib.import_module(module)
    _serve(socket.socket(fileno=int(sys.argv[1])))
