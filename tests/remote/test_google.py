"""Buckets of Google's interface, read from a server that speaks what it has in common with S3.

Google's XML interface lists, sends ranges and honours conditions as S3 does, but for signatures.
So SeaweedFS, read without credentials, answers `gs://`; writing differs, and is not tried here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command import polyak
from tests.remote.kinds import write_run_and_average
from tests.remote.proxy import Proxy, Request
from tests.remote.servers import NoServerError, S3Bucket, Server, clean_environ, seaweedfs

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a server that anybody may read from."""
    try:
        with seaweedfs(tmp_path_factory.mktemp("open"), is_open=True) as found:
            yield found
    except NoServerError as error:
        pytest.skip(str(error))


def test_an_average_from_google_has_the_same_bytes(server: Server, tmp_path: Path) -> None:
    """Listing, headers, values and the record, by ranges under conditions, without a signature."""
    write_run_and_average(tmp_path, 9000)
    bucket = S3Bucket.create(server)
    bucket.put_tree(tmp_path / "run", "a b/run/")
    with Proxy(server) as proxy:
        environ = clean_environ() | {"STORAGE_EMULATOR_HOST": proxy.environ["AWS_ENDPOINT_URL"]}
        source = f"gs://{bucket.name}/a b/run/"
        done = polyak("average", source, "-o", "g.safetensors", "-q", cwd=tmp_path, environ=environ)
        assert (done.returncode, done.stderr) == (0, "")
        written = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("g", "expected")]
        assert written[0] == written[1]
        asked = [request for request, _ in proxy.traffic.log if request.kind == "GET"]
        assert asked
        assert all(_is_conditional(request) for request in asked)
    bucket.remove()


def _is_conditional(request: Request) -> bool:
    """Return whether a request is for a part of a version that it names, and not signed."""
    names = request.headers.keys()
    return {"range", "if-match"} <= names and "authorization" not in names
