"""Messages between the gateway and those who ask it: JSON behind its length, and raw bytes.

Errors of the package keep their kind and text.  Knows nothing of what is asked.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from collections.abc import Callable
from typing import Any

from polyak_cli.errors import FormatError, OutputError, PolyakError, rebuild, shown

#: Seconds that a stopped upload has to delete what it sent.
_FAREWELL = 60.0
_LENGTH = struct.Struct("<I")


def send(connection: socket.socket, message: Any) -> None:
    """Send a message of values that JSON can hold."""
    body = json.dumps(message).encode()
    connection.sendall(_LENGTH.pack(len(body)) + body)


def receive(connection: socket.socket) -> Any:
    """Return the next message, or None at the end."""
    head = _receive_exactly(connection, _LENGTH.size)
    if head is None:
        return None
    body = _receive_exactly(connection, *_LENGTH.unpack(head))
    return None if body is None else json.loads(body)


def _receive_exactly(connection: socket.socket, nbytes: int) -> bytes | None:
    buffer = bytearray(nbytes)
    return bytes(buffer) if fill(connection, memoryview(buffer)) else None


def fill(connection: socket.socket, view: memoryview) -> bool:
    """Fill a buffer, and return whether the other end sent as much."""
    while len(view):
        count = connection.recv_into(view)
        if not count:
            return False
        view = view[count:]
    return True


def ask(connection: socket.socket, op: str, **arguments: Any) -> Any:
    """Return the answer to one request.

    Raises:
        PolyakError: as the gateway raised it.
    """
    try:
        send(connection, {"op": op, **arguments})
        answer = receive(connection)
    except OSError:
        answer = None
    if answer is None:
        raise FormatError("cannot be read: the process that reads from the network has ended")
    if "error" in answer:
        raise rebuild(*answer["error"])
    return answer["value"]


def watch(
    connection: socket.socket, op: str, report: Callable[[int], None], **arguments: Any
) -> None:
    """Make a request that sends files, and pass on the bytes that are sent meanwhile.

    After an exception, a signal's too, the gateway stops and leaves nothing behind.

    Raises:
        PolyakError: as the gateway raised it.
    """
    try:
        send(connection, {"op": op, **arguments})
        while "sent" in (answer := receive(connection) or {}):
            report(answer["sent"])
    except BaseException:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(_FAREWELL)
            while "sent" in (receive(connection) or {}):
                pass
        raise
    if "error" in answer:
        raise rebuild(*answer["error"])
    if "value" not in answer:
        raise OutputError("the process that writes to the network has ended; try again")


def describe_error(error: Exception) -> list[str]:
    """Return what `errors.rebuild` is given; a bug's text is for whoever repairs it."""
    if isinstance(error, PolyakError):
        return [type(error).__name__, str(error)]
    import traceback

    return [
        "PolyakError",
        f"the gateway failed: {shown(''.join(traceback.format_exception(error)), 2000)}",
    ]
