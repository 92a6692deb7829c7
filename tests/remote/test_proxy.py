"""The faulty proxy does to requests what other tests rely on."""

from __future__ import annotations

import time
from typing import Any

import obstore
import pytest
from botocore.exceptions import ClientError, ConnectionClosedError, HTTPClientError
from obstore.exceptions import GenericError, PreconditionError
from obstore.store import S3Store

from tests.remote.proxy import (
    DENIED,
    EXPIRED,
    LOST,
    MISSING,
    NO_CONDITIONS,
    NO_RANGES,
    RESET,
    SLOW_DOWN,
    Fault,
    Proxy,
    every,
    first,
)
from tests.remote.servers import AzureContainer, S3Bucket, Server, connect

CONTENT = bytes(range(256)) * 1000


def through(proxy: Proxy) -> Any:
    """Return boto3's client that goes through a proxy."""
    return connect(Server(proxy.url, proxy.environ))


def store(proxy: Proxy, bucket: S3Bucket, retries: int = 0) -> S3Store:
    """Return obstore's view of a bucket through a proxy."""
    return S3Store(
        bucket.name,
        endpoint=proxy.url,
        access_key_id=proxy.environ["AWS_ACCESS_KEY_ID"],
        secret_access_key=proxy.environ["AWS_SECRET_ACCESS_KEY"],
        region="us-east-1",
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
        retry_config={"max_retries": retries},
    )


def test_without_faults_a_proxy_changes_nothing(bucket: S3Bucket, proxy: Proxy) -> None:
    """Bytes, ranges, odd keys, listings and uploads come through, and are counted by kind."""
    client, where = through(proxy), {"Bucket": bucket.name, "Key": "a b/ü%41+"}
    client.put_object(**where, Body=CONTENT)
    assert bucket.contents("a b/ü%41+") == CONTENT
    reply = client.get_object(**where, Range="bytes=10-19")
    assert (reply["Body"].read(), reply["ContentRange"]) == (CONTENT[10:20], "bytes 10-19/256000")
    assert client.head_object(**where)["ContentLength"] == len(CONTENT)
    assert client.list_objects_v2(Bucket=bucket.name)["KeyCount"] == 1
    made = client.create_multipart_upload(Bucket=bucket.name, Key="m")["UploadId"]
    part = {"Bucket": bucket.name, "Key": "m", "UploadId": made}
    mark = client.upload_part(**part, PartNumber=1, Body=b"m")["ETag"]
    client.complete_multipart_upload(
        **part, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": mark}]}
    )
    assert bucket.contents("m") == b"m"
    assert proxy.traffic.requests == {
        "PUT": 1, "GET": 1, "HEAD": 1, "LIST": 1, "CREATE": 1, "PART": 1, "COMPLETE": 1
    }  # fmt: skip
    assert [status for _, status in proxy.traffic.log] == [200, 206, 200, 200, 200, 200, 200]
    assert proxy.traffic.log[1][0].is_ranged
    assert proxy.traffic.log[1][0].path == f"/{bucket.name}/a b/ü%41+"
    client.close()


def test_azure_goes_through_too(container: AzureContainer) -> None:
    """Azure's requests are signed for an account rather than a host."""
    with Proxy(container.server) as proxy:
        there = AzureContainer(Server(proxy.environ["AZURE_STORAGE_ENDPOINT"], proxy.environ),
                               container.name)  # fmt: skip
        there.put("a b/ü", CONTENT)
        assert there.contents("a b/ü") == CONTENT
        assert there.keys() == ["a b/ü"]
        assert proxy.traffic.requests["LIST"] == 1
        there.client.close()
    assert container.contents("a b/ü") == CONTENT


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (SLOW_DOWN, 503, "SlowDown"),
        (DENIED, 403, "AccessDenied"),
        (MISSING, 404, "NoSuchKey"),
        (EXPIRED, 400, "ExpiredToken"),
    ],
)
def test_refusals_are_those_of_s3(
    bucket: S3Bucket, proxy: Proxy, fault: Fault, status: int, code: str
) -> None:
    """A client understands each refusal; the next request goes through."""
    bucket.put("a", CONTENT)
    client = through(proxy)
    proxy.rules = [first(1, fault)]
    with pytest.raises(ClientError) as caught:
        client.get_object(Bucket=bucket.name, Key="a")
    assert caught.value.response["Error"]["Code"] == code
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == status
    assert client.get_object(Bucket=bucket.name, Key="a")["Body"].read() == CONTENT
    assert [status for _, status in proxy.traffic.log] == [status, 200]
    client.close()


@pytest.mark.parametrize("fault", [RESET, Fault(reset=100_000), Fault(cut=100_000)])
def test_a_connection_breaks(bucket: S3Bucket, proxy: Proxy, fault: Fault) -> None:
    """Before the answer, or within its body; a second try is answered."""
    bucket.put("a", CONTENT)
    client = through(proxy)
    proxy.rules = [first(1, fault)]
    with pytest.raises((HTTPClientError, ConnectionClosedError, ClientError)):
        client.get_object(Bucket=bucket.name, Key="a")["Body"].read()
    assert client.get_object(Bucket=bucket.name, Key="a")["Body"].read() == CONTENT
    client.close()


def test_an_answer_is_shorter_than_what_was_asked_for(bucket: S3Bucket, proxy: Proxy) -> None:
    """The announced length is short as well, so that only who counts notices."""
    bucket.put("a", CONTENT)
    there = store(proxy, bucket)  # boto3 would notice by the checksum of the whole object
    proxy.rules = [every(2, Fault(shorten=7))]
    got = [bytes(obstore.get(there, "a").bytes()) for _ in range(3)]
    assert got == [CONTENT, CONTENT[:-7], CONTENT]


def test_an_answer_is_lost_though_the_server_did_the_work(bucket: S3Bucket, proxy: Proxy) -> None:
    """The object is there, and the client does not know."""
    client = through(proxy)
    proxy.rules = [first(1, LOST)]
    with pytest.raises((HTTPClientError, ConnectionClosedError)):
        client.put_object(Bucket=bucket.name, Key="a", Body=b"1")
    assert bucket.contents("a") == b"1"
    client.close()


def test_ranges_and_conditions_are_ignored(bucket: S3Bucket, proxy: Proxy) -> None:
    """The server gets a valid request without them: 200 and everything, or another version."""
    old = bucket.put("a", b"0123456789")
    client, asked = through(proxy), {"Bucket": bucket.name, "Key": "a"}
    proxy.rules = [lambda _: NO_RANGES]
    reply = client.get_object(**asked, Range="bytes=2-3", IfMatch=old)
    assert (reply["ResponseMetadata"]["HTTPStatusCode"], reply["Body"].read()) == (
        200,
        b"0123456789",
    )
    with pytest.raises(GenericError, match=r"(?i)partial"):
        obstore.get(store(proxy, bucket), "a", options={"range": (2, 4), "if_match": old})
    bucket.put("a", b"abcdefghij")
    proxy.rules = []
    with pytest.raises(PreconditionError):
        obstore.get(store(proxy, bucket), "a", options={"range": (2, 4), "if_match": old})
    proxy.rules = [lambda _: NO_CONDITIONS]
    reply = obstore.get(store(proxy, bucket), "a", options={"range": (2, 4), "if_match": old})
    assert bytes(reply.bytes()) == b"cd"
    client.put_object(**asked, Body=b"mine", IfNoneMatch="*")
    assert bucket.contents("a") == b"mine"
    client.close()


def test_faults_may_hit_only_some_requests(bucket: S3Bucket, proxy: Proxy) -> None:
    """By kind, by path, by number; obstore's own retries then succeed."""
    bucket.put("a", CONTENT)
    bucket.put("b", CONTENT)
    proxy.rules = [every(2, SLOW_DOWN, lambda request: request.path.endswith("/a"))]
    for _ in range(3):
        assert bytes(obstore.get(store(proxy, bucket, retries=2), "a").bytes()) == CONTENT
        assert bytes(obstore.get(store(proxy, bucket), "b").bytes()) == CONTENT
    assert [status for _, status in proxy.traffic.log].count(503) == 2


def test_each_connection_has_a_bound(bucket: S3Bucket, proxy: Proxy) -> None:
    """One connection takes at least the time that its bytes need, and so does an upload."""
    bucket.put("a", CONTENT)
    client = through(proxy)
    proxy.rate = 1e6
    begun = time.monotonic()
    client.get_object(Bucket=bucket.name, Key="a")["Body"].read()
    between = time.monotonic()
    client.put_object(Bucket=bucket.name, Key="b", Body=CONTENT)
    least = 0.9 * (len(CONTENT) / 1e6 - 0.05)
    assert min(time.monotonic() - between, between - begun) >= least
    assert proxy.traffic.most_open == 1
    client.close()


def test_something_happens_before_or_after_a_request(bucket: S3Bucket, proxy: Proxy) -> None:
    """A test changes the store at a moment that it chooses."""
    bucket.put("a", b"old")
    client, seen = through(proxy), []
    proxy.rules = [
        first(
            1,
            Fault(
                before=lambda: seen.append(bucket.put("a", b"new")),
                after=lambda: seen.append(bucket.put("a", b"newer")),
            ),
        )
    ]
    assert client.get_object(Bucket=bucket.name, Key="a")["Body"].read() == b"new"
    assert client.get_object(Bucket=bucket.name, Key="a")["Body"].read() == b"newer"
    assert len(seen) == 2
    client.close()


def test_a_waiting_client_does_not_keep_a_proxy(bucket: S3Bucket, s3: Server) -> None:
    """A proxy ends before an answer that takes seven hours does."""
    bucket.put("a", CONTENT)
    with Proxy(s3) as proxy:
        client = through(proxy)
        proxy.rules = [lambda _: Fault(rate=10.0)]
        body = client.get_object(Bucket=bucket.name, Key="a")["Body"]
        assert body.read(1) == CONTENT[:1]
    client.close()
