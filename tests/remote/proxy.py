"""A proxy on loopback that makes the faults of object stores, and counts requests.

It forwards each request to a server, but for those that a fault answers or changes.  Requests are
signed for the proxy's own host, which it passes on, so that the server accepts them.

``python -m tests.remote.proxy URL --rate 4e6`` runs one by itself and prints its URL.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from tests.remote.servers import Server

#: Bytes that are passed on at a time, so that a bound on bytes a second holds evenly.
STEP = 1 << 18
#: What belongs to one connection rather than to a request or its answer.
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "proxy-connection"}


class Request(NamedTuple):
    """One request, as faults see it before it is forwarded.

    Attributes:
        method: `GET`, `PUT`, ...
        path: the path without the query, decoded.
        query: the query's names and values.
        headers: by name in small letters.
        number: how many requests came before it.
    """

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    number: int

    @property
    def kind(self) -> str:
        """What the request does in S3: `LIST`, `PART`, `COMPLETE`, ..., or its method."""
        names = self.query.keys()
        known = {
            ("GET", "list-type"): "LIST",
            ("GET", "comp"): "LIST",  # of Azure
            ("GET", "uploads"): "UPLOADS",
            ("POST", "uploads"): "CREATE",
            ("PUT", "partNumber"): "PART",
            ("POST", "uploadId"): "COMPLETE",
            ("DELETE", "uploadId"): "ABORT",
        }
        return next((kind for (m, n), kind in known.items() if m == self.method and n in names),
                    self.method)  # fmt: skip

    @property
    def is_ranged(self) -> bool:
        """Whether it asks for a part of an object."""
        return self.kind == "GET" and bool(self.headers.keys() & {"range", "x-ms-range"})


@dataclass(frozen=True)
class Fault:
    """What to do to a request instead of forwarding it as it is; the defaults change nothing.

    Attributes:
        status: answer with this status, and do not forward.
        code: S3's word for it, which is in the answer's body.
        reset: reset the connection after so many bytes of the answer's body, header included.
        cut: end the connection after so many bytes of the body, of which more were announced.
        shorten: announce and send fewer bytes of the body by so many.
        pause: wait so many seconds before the answer.
        rate: pass on so many bytes of the body a second.
        without: header names, in small letters, that the server does not get to see.
        before: call this before the request is forwarded.
        after: call this when the whole answer was passed on.
        lost: forward the request, and reset the connection instead of passing on the answer.
    """

    status: int = 0
    code: str = ""
    reset: int | None = None
    cut: int | None = None
    shorten: int = 0
    pause: float = 0.0
    rate: float | None = None
    without: frozenset[str] = frozenset()
    before: Callable[[], object] | None = None
    after: Callable[[], object] | None = None
    lost: bool = False


SLOW_DOWN = Fault(503, "SlowDown")
DENIED = Fault(403, "AccessDenied")
MISSING = Fault(404, "NoSuchKey")
EXPIRED = Fault(400, "ExpiredToken")
UNAVAILABLE = Fault(500, "InternalError")
RESET = Fault(reset=0)
LOST = Fault(lost=True)
NO_RANGES = Fault(without=frozenset({"range", "x-ms-range"}))
NO_CONDITIONS = Fault(without=frozenset({"if-match", "if-none-match"}))

#: Returns the fault of a request, None to forward it as it is.
Rule = Callable[[Request], Fault | None]


def every(nth: int, fault: Fault, chosen: Callable[[Request], bool] = lambda _: True) -> Rule:
    """Return the rule that every ``nth`` request of those that are chosen has a fault."""
    return some(lambda count: count % nth == 0, fault, chosen)


def first(count: int, fault: Fault, chosen: Callable[[Request], bool] = lambda _: True) -> Rule:
    """Return the rule that the first so many requests of those that are chosen have a fault."""
    return some(lambda number: number <= count, fault, chosen)


def some(
    which: Callable[[int], bool], fault: Fault, chosen: Callable[[Request], bool] = lambda _: True
) -> Rule:
    """Return the rule that requests have a fault by their number, from 1, of those chosen."""
    lock, seen = threading.Lock(), [0]

    def rule(request: Request) -> Fault | None:
        if not chosen(request):
            return None
        with lock:
            seen[0] += 1
            number = seen[0]
        return fault if which(number) else None

    return rule


@dataclass
class Traffic:
    """What went through a proxy.

    Attributes:
        requests: how many of each `Request.kind`.
        log: each request, with the status that was answered, 0 where none was.
        received: bytes of answers' bodies that went to clients.
        sent: bytes of requests' bodies that came from clients.
        open: connections that are open now.
        most_open: the most that were open at a time.
    """

    requests: Counter[str] = field(default_factory=Counter)
    log: list[tuple[Request, int]] = field(default_factory=list)
    received: int = 0
    sent: int = 0
    open: int = 0
    most_open: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def clear(self) -> None:
        """Forget what went through so far."""
        with self.lock:
            self.requests.clear()
            self.log.clear()
            self.received = self.sent = 0


class Proxy:
    """A proxy that runs; see the module.

    Attributes:
        url: where it listens.
        rules: asked in turn for each request; the first fault counts.  To be changed at any time.
        rate: bytes a second of each connection, both ways together; None for no bound.
        delay: seconds before each answer, as on a long way.
        traffic: what went through.
        ended: set when all is to end.
    """

    def __init__(self, server: Server, rate: float | None = None, delay: float = 0.0) -> None:
        self.server = server
        self.rate = rate
        self.delay = delay
        self.rules: list[Rule] = []
        self.traffic = Traffic()
        self.ended = threading.Event()
        self._http = _Listener(("127.0.0.1", 0), _Handler)
        self._http.proxy = self
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    @property
    def environ(self) -> dict[str, str]:
        """The variables by which clients find the proxy instead of the server."""
        there = urlsplit(self.server.endpoint)
        base = f"{there.scheme}://{there.netloc}"
        return {name: value.replace(base, self.url) for name, value in self.server.environ.items()}

    def fault(self, request: Request) -> Fault:
        """Return what is to be done to a request."""
        return next(filter(None, (rule(request) for rule in self.rules)), Fault())

    def __enter__(self) -> Proxy:
        """Begin to listen."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End all connections, also those that a fault keeps waiting."""
        self.ended.set()
        self._http.shutdown()
        self._http.close_connections()
        self._http.server_close()
        self._thread.join()


class _Listener(ThreadingHTTPServer):
    """Accepts connections; each has a thread."""

    daemon_threads = False  # so that the end of a test waits for them
    request_queue_size = 256
    proxy: Proxy

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Count a connection."""
        traffic = self.proxy.traffic
        with traffic.lock:
            self._open.add(request)
            traffic.open += 1
            traffic.most_open = max(traffic.most_open, traffic.open)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Uncount it."""
        with self.proxy.traffic.lock:
            self._open.discard(request)
            self.proxy.traffic.open -= 1
        super().shutdown_request(request)

    def handle_error(self, *_: object) -> None:
        """Say nothing: clients may go away at any moment, and some tests kill them."""

    def close_connections(self) -> None:
        """Have every thread of a connection end."""
        with self.proxy.traffic.lock:
            left = [*self._open]
        for one in left:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


class _EndOfConnectionError(Exception):
    """The connection to the client is to be closed now."""


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client, with one to the server."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def setup(self) -> None:
        """Begin a connection."""
        super().setup()
        self._proxy = self.server.proxy
        self._upstream: http.client.HTTPConnection | None = None
        self._due = time.monotonic()

    def finish(self) -> None:
        """End it, and that to the server."""
        if self._upstream:
            self._upstream.close()
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def handle_expect_100(self) -> bool:
        """Leave it to `_body`, as some faults answer before the body is sent."""
        return True

    def __getattr__(self, name: str) -> Any:
        """Handle every method alike."""
        if name.startswith("do_"):
            return self._handle
        raise AttributeError(name)

    def _handle(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        parts = urlsplit(self.path)
        query = {k: v[-1] for k, v in parse_qs(parts.query, keep_blank_values=True).items()}
        traffic = self._proxy.traffic
        with traffic.lock:
            number = len(traffic.log)
            request = Request(self.command, unquote(parts.path), query, headers, number)
            traffic.requests[request.kind] += 1
            traffic.log.append((request, 0))
        fault = self._proxy.fault(request)
        try:
            status = self._answer(request, fault)
        except _EndOfConnectionError:
            self.close_connection = True
            return
        with traffic.lock:
            if number < len(traffic.log):  # `clear` may have come between
                traffic.log[number] = (request, status)

    def _answer(self, request: Request, fault: Fault) -> int:
        """Answer one request, and return the status."""
        body = self._body(request)
        self._sleep(self._proxy.delay + fault.pause)
        if fault.before:
            fault.before()
        if fault.status:
            return self._refuse(request, fault)
        if fault.reset == 0:
            self._reset()
        reply = self._forward(request, fault, body)
        if fault.lost:
            reply.read()
            self._reset()
        self._pass_on(reply, fault)
        if fault.after:
            fault.after()
        return reply.status

    def _body(self, request: Request) -> bytes:
        """Return the body that the client sends, at the bounded rate."""
        if request.headers.get("expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        if "chunked" in request.headers.get("transfer-encoding", ""):
            return b"".join(self._chunks())
        left = int(request.headers.get("content-length", 0))
        parts = []
        while left:
            part = self.rfile.read(min(STEP, left))
            if not part:
                raise _EndOfConnectionError
            parts.append(part)
            left -= len(part)
            self._wait(len(part), self._proxy.rate)
        body = b"".join(parts)
        with self._proxy.traffic.lock:
            self._proxy.traffic.sent += len(body)
        return body

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _refuse(self, request: Request, fault: Fault) -> int:
        """Answer as a server does that refuses a request."""
        self.send_response(fault.status)
        body = b""
        if request.method != "HEAD":
            body = (
                f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{fault.code}</Code>'
                f"<Message>The proxy says so.</Message></Error>"
            ).encode()
        self.send_header("Content-Type", "application/xml")
        if fault.code:
            self.send_header("x-ms-error-code", fault.code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return fault.status

    def _forward(self, request: Request, fault: Fault, body: bytes) -> http.client.HTTPResponse:
        """Send a request to the server, and return its answer."""
        names = {name: value for name, value in self.headers.items()
                 if name.lower() not in HOP_BY_HOP | fault.without}  # fmt: skip
        if fault.without & request.headers.keys():
            names = sign_again(self._proxy.server, self.command, self.path, names)
        # A server may have closed a connection that was idle.  A POST must not be sent twice.
        for fresh in (False, True):
            if self._upstream and self.command == "POST":
                self._upstream.close()
                self._upstream = None
            if self._upstream is None:
                there = urlsplit(self._proxy.server.endpoint).netloc
                self._upstream = http.client.HTTPConnection(there, timeout=60)
            try:
                self._upstream.putrequest(
                    self.command, self.path, skip_host=True, skip_accept_encoding=True
                )
                for name, value in names.items():
                    if name.lower() != "content-length":
                        self._upstream.putheader(name, value)
                if body or self.command in ("PUT", "POST"):
                    self._upstream.putheader("Content-Length", str(len(body)))
                self._upstream.endheaders(body)
                return self._upstream.getresponse()
            except (OSError, http.client.HTTPException):
                self._upstream.close()
                self._upstream = None
                if fresh or self.command == "POST":
                    raise _EndOfConnectionError from None
        raise AssertionError

    def _pass_on(self, reply: http.client.HTTPResponse, fault: Fault) -> None:
        """Send an answer to the client, as far as a fault lets it."""
        has_body = self.command != "HEAD" and reply.status not in (204, 304)
        length = reply.getheader("Content-Length")
        self.send_response_only(reply.status, reply.reason)
        for name, value in reply.getheaders():
            if name.lower() not in HOP_BY_HOP | {"content-length"}:
                self.send_header(name, value)
        body = None
        if has_body and length is None:
            body = reply.read()
            length = str(len(body))
        if length is not None:
            shorter = fault.shorten if has_body else 0
            self.send_header("Content-Length", str(int(length) - shorter))
        self.end_headers()
        if not has_body:
            reply.read()
            return
        self._send_body(reply, body, int(length or 0) - fault.shorten, fault)
        reply.read()  # what is left, so that the connection to the server can be used again

    def _send_body(
        self, reply: http.client.HTTPResponse, body: bytes | None, nbytes: int, fault: Fault
    ) -> None:
        limits = [one for one in (fault.reset, fault.cut) if one is not None]
        most = min([nbytes, *limits])
        rate = fault.rate or self._proxy.rate
        sent = 0
        while sent < most:
            step = min(STEP if rate is None else min(STEP, max(1, int(rate / 8))), most - sent)
            part = reply.read(step) if body is None else body[sent : sent + step]
            if not part:
                break
            self._wait(len(part), rate)
            self.wfile.write(part)
            sent += len(part)
            with self._proxy.traffic.lock:
                self._proxy.traffic.received += len(part)
        self.wfile.flush()
        if fault.reset is not None:
            self._reset()
        if sent < nbytes:
            raise _EndOfConnectionError

    def _wait(self, nbytes: int, rate: float | None) -> None:
        """Wait until so many more bytes are allowed."""
        if rate:
            self._due = max(self._due, time.monotonic() - 0.05) + nbytes / rate
            self._sleep(self._due - time.monotonic())

    def _sleep(self, seconds: float) -> None:
        """Wait, but not beyond the end of the proxy."""
        if self._proxy.ended.wait(max(0.0, seconds)):
            raise _EndOfConnectionError

    def _reset(self) -> None:
        """Have the system answer the client with RST rather than FIN."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise _EndOfConnectionError


def sign_again(server: Server, method: str, path: str, headers: dict[str, str]) -> dict[str, str]:
    """Return the headers of a request to S3 with a signature that fits those that are left."""
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    own = re.compile("authorization|x-amz-date|x-amz-content-sha256|user-agent", re.IGNORECASE)
    kept = {name: value for name, value in headers.items() if not own.fullmatch(name)}
    host = next(value for name, value in kept.items() if name.lower() == "host")
    request = AWSRequest(method, f"http://{host}{path}", headers=kept)
    request.context["payload_signing_enabled"] = False
    environ = server.environ
    credentials = Credentials(environ["AWS_ACCESS_KEY_ID"], environ["AWS_SECRET_ACCESS_KEY"])
    S3SigV4Auth(credentials, "s3", environ["AWS_REGION"]).add_auth(request)
    return dict(request.headers.items())


def main() -> None:
    """Run a proxy until this process is killed."""
    ask = argparse.ArgumentParser()
    ask.add_argument("url")
    ask.add_argument("--rate", type=float)
    ask.add_argument("--delay", type=float, default=0.0)
    given = ask.parse_args()
    with Proxy(Server(given.url, {}), given.rate, given.delay) as proxy:
        print(proxy.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
