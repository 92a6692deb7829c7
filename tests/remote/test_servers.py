"""The servers of the other tests: they keep bytes and honour ranges and conditions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.exceptions import AlreadyExistsError, PreconditionError
from obstore.store import AzureStore, S3Store

from tests.command import ROOT, environment
from tests.remote.servers import AzureContainer, Bucket, S3Bucket, clean_environ

#: A space, a sign that URLs escape, what looks escaped, and letters outside ASCII.
ODD = "run 1/épo%41che+#?&=_07.safetensors"


def open_s3(bucket: S3Bucket) -> S3Store:
    """Return obstore's view of a bucket."""
    there = bucket.server.environ
    return S3Store(
        bucket.name,
        endpoint=there["AWS_ENDPOINT_URL"],
        access_key_id=there["AWS_ACCESS_KEY_ID"],
        secret_access_key=there["AWS_SECRET_ACCESS_KEY"],
        region=there["AWS_REGION"],
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )


def open_azure(container: AzureContainer) -> AzureStore:
    """Return obstore's view of a container."""
    there = container.server.environ
    return AzureStore(
        container.name,
        account_name=there["AZURE_STORAGE_ACCOUNT_NAME"],
        account_key=there["AZURE_STORAGE_ACCOUNT_KEY"],
        endpoint=there["AZURE_STORAGE_ENDPOINT"],
        client_options={"allow_http": True},
    )


def check_store(store: Any, bucket: Bucket) -> None:
    """What polyak relies on: ranges, ETags, conditions, listing, odd keys."""
    etag = bucket.put(ODD, bytes(range(256)))
    bucket.put("run 1/b", b"b")
    assert bucket.keys("run 1/") == ["run 1/b", ODD]
    reply = obstore.get(store, ODD, options={"range": (5, 9), "if_match": etag})
    assert (reply.meta["size"], reply.meta["e_tag"]) == (256, etag)
    assert bytes(reply.bytes()) == b"\x05\x06\x07\x08"
    assert {one["path"] for one in obstore.list(store, "run 1").collect()} == {"run 1/b", ODD}
    with pytest.raises(AlreadyExistsError):
        obstore.put(store, ODD, b"other", mode="create")
    changed = bucket.put(ODD, b"other bytes")
    assert changed != etag
    with pytest.raises(PreconditionError):
        obstore.get(store, ODD, options={"range": (0, 4), "if_match": etag})
    assert bucket.contents(ODD) == b"other bytes"


def test_seaweedfs_honours_ranges_and_conditions(bucket: S3Bucket) -> None:
    """Half of an object under its ETag comes; after a change it is refused."""
    check_store(open_s3(bucket), bucket)


def test_azurite_honours_ranges_and_conditions(container: AzureContainer) -> None:
    """The same of Azure's server."""
    check_store(open_azure(container), container)


def test_an_upload_in_parts_is_seen_only_when_it_is_complete(bucket: S3Bucket) -> None:
    """Parts in any order; a completion that must not replace anything is refused if it would."""
    client: Any = bucket.client
    where = {"Bucket": bucket.name, "Key": "out"}
    parts = {1: b"a" * (5 << 20), 2: b"b" * 10}
    for run in range(2):
        made = client.create_multipart_upload(**where)["UploadId"]
        assert bucket.uploads() == ["out"]
        marks = {
            number: client.upload_part(
                **where, UploadId=made, PartNumber=number, Body=parts[number]
            )["ETag"]
            for number in (2, 1)
        }
        listed = [{"PartNumber": number, "ETag": marks[number]} for number in sorted(marks)]
        complete = {**where, "UploadId": made, "MultipartUpload": {"Parts": listed}}
        if run == 0:
            assert bucket.keys() == []
            client.complete_multipart_upload(**complete, IfNoneMatch="*")
        else:
            with pytest.raises(client.exceptions.ClientError, match="PreconditionFailed"):
                client.complete_multipart_upload(**complete, IfNoneMatch="*")
            client.abort_multipart_upload(**where, UploadId=made)
    assert bucket.contents("out") == b"".join(parts.values())
    assert bucket.uploads() == []


def test_each_test_has_a_bucket_of_its_own(s3: Any, bucket: S3Bucket) -> None:
    """What is in one bucket is not in another, and a removed one is gone."""
    other = S3Bucket.create(s3)
    other.put("a", b"1")
    assert bucket.keys() == []
    other.remove()
    names = {one["Name"] for one in bucket.client.list_buckets()["Buckets"]}
    assert bucket.name in names
    assert other.name not in names


def test_folders_go_to_a_bucket_and_back(bucket: S3Bucket, tmp_path: Path) -> None:
    """Every file comes under its path, byte for byte."""
    (tmp_path / "a b/c").mkdir(parents=True)
    (tmp_path / "a b/c/ü").write_bytes(b"1")
    (tmp_path / "d").write_bytes(b"")
    bucket.put_tree(tmp_path, "run/")
    assert bucket.tree("run/") == {"a b/c/ü": b"1", "d": b""}


@pytest.mark.soak
def test_more_objects_than_one_answer_lists(bucket: S3Bucket) -> None:
    """The servers answer a listing in pages of 1,000 keys, as the real ones do."""
    for number in range(1001):
        bucket.put(f"run/{number}", b"")
    first = bucket.client.list_objects_v2(Bucket=bucket.name, Prefix="run/")
    assert (first["KeyCount"], first["IsTruncated"]) == (1000, True)
    assert len(bucket.keys("run/")) == 1001


def test_the_caller_s_credentials_do_not_come_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own account cannot be reached from a test."""
    for name in ("AWS_PROFILE", "AZURE_STORAGE_SAS_TOKEN", "HF_TOKEN"):
        monkeypatch.setenv(name, "mine")
    assert "mine" not in clean_environ().values()


def test_a_server_ends_with_the_test_run(tmp_path: Path) -> None:
    """A test run that is killed leaves no server behind."""
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from tests.remote.servers import running\n"
        "with running(['sleep', '600'], Path('.'), {}) as server:\n"
        "    print(server.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
    )
    assert run.stdout
    server = int(run.stdout.readline())
    os.kill(server, 0)
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    for _ in range(100):
        if not Path(f"/proc/{server}").exists() or "(sleep) Z" in Path(
            f"/proc/{server}/stat"
        ).read_text(errors="replace"):
            return
        time.sleep(0.05)
    pytest.fail("the server runs on")
