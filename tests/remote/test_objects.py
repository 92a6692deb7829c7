"""Objects and their stand-ins do what files do: the contract of stores, in both ways to read them.

This process uses obstore, so that nothing here may fork; see `test_reading`.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from polyak_cli.errors import StoreError
from polyak_cli.storage import Store, mirrors, objects, urls
from tests.command import environment
from tests.remote.servers import S3Bucket
from tests.storage_contract import StoreContract


@pytest.fixture(autouse=True)
def _environ(bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have this process and its gateway find the server, and end the gateway with the test."""
    for name, value in bucket.server.environ.items():
        monkeypatch.setenv(name, value)
    yield
    mirrors.close()
    objects._connect.cache_clear()


class TestObjects(StoreContract):
    """Objects, as a worker reads them that does not fork."""

    @pytest.fixture
    def store(self) -> Store:
        """Return the store of objects."""
        return objects.ObjectStore()

    @pytest.fixture
    def root(self, bucket: S3Bucket) -> str:
        """Return an empty prefix of the bucket."""
        self.bucket = bucket
        return f"{bucket.url}/root"

    def put(self, key: str, content: bytes) -> None:
        """Put an object with the vendor's client."""
        self.bucket.put(key.removeprefix(f"{self.bucket.url}/"), content)


class TestStandIns(StoreContract):
    """Objects, as processes read them that fork: through the gateway."""

    @pytest.fixture
    def store(self) -> Store:
        """Return the store of stand-ins."""
        return mirrors.MirrorStore()

    @pytest.fixture
    def root(self, bucket: S3Bucket) -> str:
        """Return the stand-in of an empty prefix."""
        self.bucket = bucket
        return mirrors.enter(f"{bucket.url}/root/")

    def put(self, key: str, content: bytes) -> None:
        """Put an object, and list it again."""
        url = mirrors.locate(key)
        self.bucket.put(url.removeprefix(f"{self.bucket.url}/"), content)
        mirrors.enter(url)


def test_ranges_that_were_asked_for_are_one_request(bucket: S3Bucket) -> None:
    """Neighbours become one GET, what was fetched is not fetched again, and no byte is wrong."""
    content = bytes(range(256)) * 4096
    bucket.put("a", content)
    with objects.ObjectStore().open(f"{bucket.url}/a") as file:
        before = objects.requests_made()
        file.prefetch([(1000, 50_000), (51_000, 100), (60_000, 1), (900_000, 100_000)])
        assert file.read(1000, 50_000) == content[1000:51_000]
        assert file.read(51_000, 100) == content[51_000:51_100]
        assert file.read(60_000, 1) == content[60_000:60_001]
        assert file.read(900_000, 100_000) == content[900_000:1_000_000]
        after = objects.requests_made()
    assert (after.requests - before.requests, after.retries) == (2, before.retries)


def test_the_bytes_of_two_calls_are_kept_at_most(bucket: S3Bucket) -> None:
    """Ranges that nobody has read are forgotten when the next but one are asked for."""
    bucket.put("a", bytes(1 << 20))
    with objects.ObjectStore().open(f"{bucket.url}/a") as file:
        for start in range(0, 1 << 20, 1 << 18):
            file.prefetch([(start, 1 << 18)])
        assert sum(part.stop - part.start for parts in file._ahead for part in parts) == 2 << 18


def test_buffers_are_filled_again(bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading on and on takes the memory of two calls, of any size, and no byte is another's."""
    made: list[memoryview] = []
    allocate = objects._map

    def count(nbytes: int) -> memoryview:
        made.append(allocate(nbytes))
        return made[-1]

    monkeypatch.setattr(objects, "_map", count)
    monkeypatch.setattr(objects, "_buffers", objects._Buffers())
    content = np.random.default_rng(0).bytes(1 << 21)
    bucket.put("a", content)
    found = []
    with objects.ObjectStore().open(f"{bucket.url}/a") as file:
        ranges = [(start, 99_000 - start // 99) for start in range(0, 2_000_000, 99_000)]
        file.prefetch(ranges[:1])
        for this, following in itertools.zip_longest(ranges, ranges[1:]):
            file.prefetch([following] if following else [])
            found.append(file.read(*this))
    assert found == [content[start : start + nbytes] for start, nbytes in ranges]
    assert len(made) == 2


@pytest.mark.parametrize(
    ("text", "variable", "value", "named"),
    [
        ("s3://b/k", "AWS_ENDPOINT_URL", "http://me:secret@host:1/", " http://host:1/"),
        ("az://b/k", "AZURE_STORAGE_ENDPOINT", "https://host/account", " https://host/account"),
        ("gs://b/k", "AWS_ENDPOINT_URL", "http://host:1", ""),
    ],
)
def test_a_server_out_of_reach_is_named(
    monkeypatch: pytest.MonkeyPatch, text: str, variable: str, value: str, named: str
) -> None:
    """By the endpoint that the environment says, without its password."""
    monkeypatch.setenv(variable, value)
    url = urls.parse(text)
    assert url
    with pytest.raises(StoreError) as caught:
        objects._explain(RuntimeError("error sending request"), url)
    assert f"the server{named} cannot be reached" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_name_is_located_anywhere(bucket: S3Bucket) -> None:
    """The URL of a stand-in, with its version, opens the object in a process without a gateway."""
    bucket.put("run/a", b"content")
    path = mirrors.enter(f"{bucket.url}/run/a")
    url, version = mirrors.locate(path), mirrors.find_version(path)
    assert url == f"{bucket.url}/run/a"
    assert version is not None
    code = """
import sys
from polyak_cli.storage import Version, open_input
with open_input(sys.argv[1], Version(0, 0, int(sys.argv[2]), 0, sys.argv[3])) as file:
    print(file.read(0, 99).decode(), file.name)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, url, str(version.size), version.mark],
        env=environment(**bucket.environ), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == f"content {url}\n", done.stderr


def test_an_object_that_is_gone_from_the_listing_is_not_found(bucket: S3Bucket) -> None:
    """Each call lists anew: what was deleted has no stand-in any more."""
    bucket.put("run/a", b"a")
    bucket.put("run/b", b"b")
    folder = mirrors.enter(f"{bucket.url}/run/")
    assert sorted(os.listdir(folder)) == ["a", "b"]
    bucket.delete("run/a")
    mirrors.enter(f"{bucket.url}/run/")
    assert os.listdir(folder) == ["b"]
