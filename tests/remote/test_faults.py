"""What servers and networks do wrong costs time at most: never a byte, and never half an output."""

from __future__ import annotations

import errno
import resource
import socket
from pathlib import Path
from typing import cast

import pytest

from polyak_cli.storage import gateway
from tests.command import Done, one_line, polyak, tree
from tests.remote.kinds import write_run_and_average
from tests.remote.proxy import (
    DENIED,
    EXPIRED,
    MISSING,
    NO_CONDITIONS,
    NO_RANGES,
    RESET,
    SLOW_DOWN,
    UNAVAILABLE,
    Fault,
    Proxy,
    Request,
    every,
    first,
    some,
)
from tests.remote.servers import S3Bucket

ROWS = 9000  # 2.3 MB a checkpoint, so that values come by requests of their own


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run in `run` and its average, made from there, in `expected`."""
    return write_run_and_average(tmp_path_factory.mktemp("faults"), ROWS)


@pytest.fixture
def source(bucket: S3Bucket, written: Path) -> str:
    """Put the run into a bucket, and return its URL."""
    bucket.put_tree(written / "run", "run/")
    return f"{bucket.url}/run/"


def run(proxy: Proxy, cwd: Path, *arguments: object) -> Done:
    """Run a command that reaches the server through a proxy."""
    return polyak(*arguments, cwd=cwd, environ=proxy.environ)


def is_value(request: Request) -> bool:
    """Return whether a request is for values rather than a header."""
    if not request.is_ranged:
        return False
    start, _, stop = request.headers["range"].removeprefix("bytes=").partition("-")
    return int(stop or 1 << 40) - int(start) > 1 << 17


SOAK = pytest.mark.soak


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(SLOW_DOWN, id="503"),
        pytest.param(UNAVAILABLE, id="500", marks=SOAK),
        pytest.param(RESET, id="reset", marks=SOAK),
        pytest.param(Fault(reset=9000), id="reset-within", marks=SOAK),
        pytest.param(Fault(cut=9000), id="cut"),
        pytest.param(Fault(shorten=7), id="short"),
        pytest.param(Fault(pause=0.7), id="late", marks=SOAK),
        pytest.param(Fault(rate=2e6), id="slow", marks=SOAK),
    ],
)
def test_faults_that_pass_change_no_byte(
    proxy: Proxy, source: str, written: Path, tmp_path: Path, fault: Fault
) -> None:
    """A third of all requests fail, listings too, and the average has the same bytes."""
    proxy.rules = [every(3, fault)]
    done = run(proxy, tmp_path, "average", source, "-o", "o.safetensors", "-q")
    assert done.returncode == 0, done.stderr
    expected = (written / "expected.safetensors").read_bytes()
    assert tree(tmp_path) == {"o.safetensors": expected}


@pytest.mark.parametrize(
    ("fault", "chosen", "expected"),
    [
        (DENIED, is_value, "access is denied (403"),
        (MISSING, is_value, "404"),
        (EXPIRED, is_value, "ExpiredToken"),
        (NO_RANGES, is_value, "ignores ranges"),
        (DENIED, lambda request: request.kind == "LIST", "access is denied (403"),
        (EXPIRED, lambda request: request.kind == "LIST", "ExpiredToken"),
        (NO_RANGES, lambda request: request.is_ranged, "ignores ranges"),
        (NO_CONDITIONS, lambda _: True, "ignores conditions"),
    ],
    ids=[
        "403",
        "404",
        "expired",
        "ranges",
        "403-list",
        "expired-list",
        "ranges-header",
        "conditions",
    ],
)
def test_what_does_not_pass_is_one_line_and_no_output(
    proxy: Proxy, source: str, tmp_path: Path, fault: Fault, chosen: object, expected: str
) -> None:
    """Refused at once, as another try cannot help; the object or folder is named."""
    assert callable(chosen)
    proxy.rules = [lambda request: fault if chosen(request) else None]
    done = run(proxy, tmp_path, "average", source, "-o", "o.safetensors")
    assert done.returncode == 3
    line = [one for one in done.stderr.splitlines() if one.startswith("error: ")]
    assert len(line) == 1, done.stderr
    assert line[0].startswith(f"error: {source.rstrip('/')}")
    # Only an object that is not there is a checkpoint to leave out.
    assert fault is MISSING or "--exclude" not in line[0]
    assert expected in line[0]
    assert "Traceback" not in done.stderr
    assert tree(tmp_path) == {}


@pytest.mark.soak
def test_a_server_that_is_always_overloaded_is_one_line(
    proxy: Proxy, source: str, tmp_path: Path
) -> None:
    """The tries end, and the message has the server's word and how often it was asked."""
    proxy.rules = [lambda request: SLOW_DOWN if is_value(request) else None]
    done = run(proxy, tmp_path, "average", source, "-o", "o.safetensors", "-q")
    line = one_line(done.stderr)
    assert line.startswith(source)
    assert "503" in line
    assert "tried" in line
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("conditions", [True, False], ids=["if-match", "ignored"])
def test_an_object_that_is_overwritten_meanwhile_ends_the_run(
    proxy: Proxy, bucket: S3Bucket, source: str, written: Path, tmp_path: Path, conditions: bool
) -> None:
    """Between header and values an object is replaced: also a server without If-Match is caught."""
    other = (written / "run/model_1.safetensors").read_bytes()

    def replace() -> None:
        bucket.put("run/model_2.safetensors", other)

    without = Fault().without if conditions else NO_CONDITIONS.without
    proxy.rules = [
        first(
            1,
            Fault(before=replace, without=without),
            lambda request: is_value(request) and request.path.endswith("model_2.safetensors"),
        )
    ]
    done = run(proxy, tmp_path, "average", source, "-o", "o.safetensors", "-q")
    assert done.returncode == 3
    line = one_line(done.stderr)
    assert line.startswith(f"{source}model_2.safetensors: ")
    assert "changed while it was read" in line
    assert tree(tmp_path) == {}


@pytest.mark.soak
def test_a_server_that_is_gone_is_one_line(proxy: Proxy, source: str, tmp_path: Path) -> None:
    """From the first value on, each connection is reset."""
    proxy.rules = [some(lambda _: True, RESET, is_value)]
    done = run(proxy, tmp_path, "average", source, "-o", "o.safetensors", "-q")
    line = one_line(done.stderr)
    assert line.startswith(source)
    assert "cannot be read" in line
    assert tree(tmp_path) == {}


def test_headers_and_values_are_few_requests(
    proxy: Proxy, source: str, written: Path, tmp_path: Path
) -> None:
    """A listing, a header each, and values; an object is not fetched again and again."""
    done = run(proxy, tmp_path, "average", source, "-o", "o.safetensors", "-q", "--no-hash")
    assert done.returncode == 0, done.stderr
    nbytes = sum(path.stat().st_size for path in (written / "run").iterdir())
    gets = proxy.traffic.requests["GET"] + proxy.traffic.requests["HEAD"]
    assert proxy.traffic.requests["LIST"] <= 2
    assert [status for _, status in proxy.traffic.log].count(
        412
    ) == 1  # the one that asks whether conditions hold
    assert gets <= 3 * 5
    # Files of this size are hashed as well.
    assert nbytes <= proxy.traffic.received <= 2.1 * nbytes


@SOAK
def test_too_few_descriptors_end_in_one_line(bucket: S3Bucket, tmp_path: Path) -> None:
    """Neither the command nor its cleanup waits for a connection that cannot be had."""
    write_run_and_average(tmp_path, 90_000)  # large enough to be read by several connections
    bucket.put_tree(tmp_path / "run", "run/")
    done = polyak(
        "average",
        f"{bucket.url}/run/",
        *("-o", f"{bucket.url}/average.safetensors"),
        cwd=tmp_path,
        environ=bucket.server.environ,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20)),
    )
    if done.returncode:
        assert done.returncode == 3
        assert one_line(done.stderr)
    assert bucket.keys("average") == ["average.safetensors"] * (done.returncode == 0)
    assert bucket.uploads() == []


def test_a_gateway_without_descriptors_refuses_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on once a descriptor is free, and closes its socket where none becomes free."""
    monkeypatch.setattr(gateway, "_PAUSE", 0.001)
    monkeypatch.setattr(gateway, "_PATIENCE", 0.01)
    served: list[object] = []

    class Server:
        """Notes which connections it serves."""

        def serve(self, connection: object) -> None:
            served.append(connection)

    class Listener:
        """Has one connection after three failures, and never one again."""

        def __init__(self) -> None:
            self.asked, self.closed = 0, False

        def accept(self) -> tuple[object, str]:
            self.asked += 1
            if self.asked == 4:
                return "connection", ""
            raise OSError(errno.EMFILE, "Too many open files")

        def close(self) -> None:
            self.closed = True

    listener = Listener()
    gateway._accept(cast(socket.socket, listener), cast(gateway._Server, Server()))
    assert listener.closed
    assert served == ["connection"]
