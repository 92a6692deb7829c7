"""Uploads to S3 and its kin in parts that any process can send, through boto3.

An upload is plain data: bucket, key and the store's id of it.  A part that is sent twice replaces
itself.  Nothing is visible under the key before `complete`.

polyak marks its uploads with a *lease*: part 9,999, which is never part of an object, and is sent
again each minute while the run lives.  So another run can recognise an upload of polyak, and
whether it was left behind, from the list of its parts alone: S3 shows no metadata of an upload.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import functools
import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from polyak_cli.errors import MissingExtraError, OutputError, shown
from polyak_cli.storage import objects
from polyak_cli.storage.environment import check_environment
from polyak_cli.storage.urls import Url

if TYPE_CHECKING:
    from botocore.exceptions import ClientError

#: S3 allows part numbers up to 10,000.  Four digits, because SeaweedFS lists them by their text.
LEASE = 9_999
#: Parts of an object at most.  The number between them and the lease stays free: an upload of
#: another program that has so many parts has that one too, and so is never taken for polyak's.
MOST_PARTS = 9_997
#: How often a request is made before its error counts; pauses between grow to 20 seconds.
_ATTEMPTS = 6
#: What the lease contains.  Nobody reads it; its length is unusual.
_LEASE_CONTENT = b"polyak upload\n".ljust(7_321, b".")
#: Key of the metadata that tells an object's writer.
_WRITER = "polyak-upload"
_ALREADY = {"PreconditionFailed", "ConditionalRequestConflict", "412"}
_GONE = {"NoSuchUpload", "NoSuchKey", "404"}
_CREDENTIALS = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}


class Object(NamedTuple):
    """An object that has its name."""

    size: int
    mark: str  # the ETag
    token: str  # of the upload that made it, or empty


class Pending(NamedTuple):
    """An upload of polyak that is neither complete nor aborted."""

    key: str
    id: str
    begun: float  # seconds since 1970, by the server's clock
    idle: float  # seconds since the run last showed that it lives
    nbytes: int  # that the parts occupy


@functools.cache
def _connect() -> Any:
    """Return this process's client, which its threads share.

    Raises:
        MissingExtraError: boto3 is not installed.
        PolyakError: a variable of the environment is not usable.
    """
    try:
        import boto3
        from botocore.config import Config
    except ImportError:
        raise MissingExtraError("writing to s3://", "s3") from None
    check_environment("s3")
    is_aws = not (os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"))
    client = boto3.client(
        "s3",
        config=Config(
            # Of other stores only few know host names that begin with the bucket.
            s3={"addressing_style": "auto" if is_aws else "path"},
            # Checksums in trailers are known to few of them too; parts carry their MD5 instead.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
            connect_timeout=10,
            read_timeout=120,
            max_pool_connections=32,
        ),
    )
    client.meta.events.register("before-send.s3", _count)
    return client


def _count(request: Any, **_: Any) -> None:
    """Count a request; botocore numbers the attempts in a header."""
    attempt = request.headers.get("amz-sdk-request", b"attempt=1")
    objects.count_request(again=b"attempt=1" not in (attempt or b""))


@contextlib.contextmanager
def _explaining(url: Url) -> Iterator[Any]:
    """Yield the client, and raise its errors as `OutputError`s that hold no secret."""
    client = _connect()
    from botocore import exceptions

    try:
        yield client
    except exceptions.ClientError as error:
        raise OutputError(f"{shown(url)}: {_explain(error, url)}") from None
    except (
        exceptions.NoCredentialsError,
        exceptions.PartialCredentialsError,
        exceptions.CredentialRetrievalError,
        exceptions.ProfileNotFound,
        exceptions.SSOError,
    ) as error:
        raise OutputError(
            f"{shown(url)}: no credentials for it were found ({type(error).__name__}); set "
            "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or log in again"
        ) from None
    except exceptions.HTTPClientError as error:
        raise OutputError(
            f"{shown(url)}: cannot be written: the server did not answer ({type(error).__name__}); "
            "check AWS_ENDPOINT_URL, AWS_REGION and the network"
        ) from None
    except exceptions.BotoCoreError as error:
        raise OutputError(f"{shown(url)}: cannot be written: {type(error).__name__}") from None


def _explain(error: ClientError, url: Url) -> str:
    """Return what a server's refusal means; of its answer only the code is shown."""
    code, status = _find_code(error), _find_status(error)
    if code in _ALREADY:
        return "already exists; use --force to replace it"
    if code in _CREDENTIALS:
        return f"the credentials are not accepted ({code}); renew them, or use others"
    if status == 403:
        return f"may not be written with these credentials ({code}); ask for the permission"
    if code == "NoSuchBucket":
        return f"there is no bucket '{shown(url.bucket)}'; create it first"
    if code == "NoSuchUpload":
        return (
            "its upload was aborted meanwhile, by another run or a rule of the bucket; run it again"
        )
    if status == 501 or code == "NotImplemented":
        return "the server cannot refuse to replace an object; use --force"
    if code == "SlowDown" or status in (429, 503):
        return f"the server is too busy ({code}), after several attempts; try again later"
    return f"cannot be written: the server answered {code} (HTTP status {status})"


def _find_code(error: ClientError) -> str:
    """Return the server's word for an error: letters and digits only, as S3's codes are."""
    code = str(error.response.get("Error", {}).get("Code", "unknown"))
    return "".join(c for c in code if c.isalnum())[:60]


def _find_status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _hash(content: bytes | bytearray) -> str:
    """Return the MD5 that lets a server refuse what arrives damaged."""
    return base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode("ascii")


def begin(url: Url, token: str) -> str:
    """Begin an upload in parts, and return its id.

    Args:
        url: the object to make.
        token: becomes metadata of the object, so that its writer can recognise it.
    """
    with _explaining(url) as client:
        answer = client.create_multipart_upload(
            Bucket=url.bucket,
            Key=url.key,
            Metadata={_WRITER: token},
            ContentType="application/octet-stream",
        )
    upload = str(answer["UploadId"])
    try:
        renew(url, upload)
    except BaseException:
        abort(url, upload)
        raise
    return upload


def renew(url: Url, upload: str) -> None:
    """Show that the run that began an upload still lives."""
    send_part(url, upload, LEASE, _LEASE_CONTENT)


def send_part(url: Url, upload: str, number: int, content: bytes | bytearray) -> str:
    """Send a part, from 1 on, and return the receipt that `complete` needs."""
    with _explaining(url) as client:
        answer = client.upload_part(
            Bucket=url.bucket,
            Key=url.key,
            UploadId=upload,
            PartNumber=number,
            Body=content,
            ContentMD5=_hash(content),
        )
        return str(answer["ETag"])


def complete(
    url: Url, upload: str, receipts: Mapping[int, str], token: str, *, force: bool
) -> None:
    """Give an upload its name.

    Raises:
        OutputError: the name is taken and ``force`` is not given, among others.
    """
    parts = [{"PartNumber": number, "ETag": receipts[number]} for number in sorted(receipts)]
    with _explaining(url) as client, _passing_if_own(url, token):
        client.complete_multipart_upload(
            Bucket=url.bucket,
            Key=url.key,
            UploadId=upload,
            MultipartUpload={"Parts": parts},
            **_condition(force=force),
        )


def _condition(*, force: bool) -> dict[str, str]:
    return {} if force else {"IfNoneMatch": "*"}


@contextlib.contextmanager
def _passing_if_own(url: Url, token: str) -> Iterator[None]:
    """Let an error pass if it answers a repetition of a request that had its effect.

    The client sends a request again where the answer was lost.  The object is there by then, and
    its upload is gone.
    """
    from botocore.exceptions import ClientError

    try:
        yield
    except ClientError as error:
        found = find(url) if _find_code(error) in _ALREADY | _GONE else None
        if not found or found.token != token:
            raise


def abort(url: Url, upload: str) -> None:
    """Delete an upload and its parts; one that is gone already is no error."""
    from botocore.exceptions import ClientError

    with _explaining(url) as client:
        # A part that another process sends meanwhile may be stored after the first call.
        for _ in range(3):
            try:
                client.abort_multipart_upload(Bucket=url.bucket, Key=url.key, UploadId=upload)
                client.list_parts(Bucket=url.bucket, Key=url.key, UploadId=upload, MaxParts=1)
            except ClientError as error:
                if _find_code(error) in _GONE:
                    return
                raise


def put(url: Url, content: bytes | bytearray, token: str, *, force: bool) -> None:
    """Write a small object in one request; see `complete`."""
    with _explaining(url) as client, _passing_if_own(url, token):
        client.put_object(
            Bucket=url.bucket,
            Key=url.key,
            Body=content,
            ContentMD5=_hash(content),
            ContentType="application/octet-stream",
            Metadata={_WRITER: token},
            **_condition(force=force),
        )


def find(url: Url) -> Object | None:
    """Return the object of a name, or None."""
    from botocore.exceptions import ClientError

    with _explaining(url) as client:
        try:
            answer = client.head_object(Bucket=url.bucket, Key=url.key)
        except ClientError as error:
            if _find_status(error) == 404:
                return None
            raise
    token = answer.get("Metadata", {}).get(_WRITER, "")
    return Object(int(answer["ContentLength"]), str(answer["ETag"]), token)


def delete(url: Url) -> None:
    """Delete an object; one that is gone is no error."""
    with _explaining(url) as client:
        client.delete_object(Bucket=url.bucket, Key=url.key)


def honours_conditions(url: Url) -> bool:
    """Return whether a server refuses a write whose condition does not hold.

    It is asked to replace an object that does not exist.  A server that ignores conditions makes
    that object, under a hidden name, and it is deleted.
    """
    from botocore.exceptions import ClientError

    name = f".polyak-{os.urandom(8).hex()}.probe"
    probe = url._replace(key=f"{url.key.rpartition('/')[0]}/{name}".lstrip("/"))
    with _explaining(url) as client:
        try:
            client.put_object(Bucket=url.bucket, Key=probe.key, Body=b"", IfMatch='"0"')
        except ClientError as error:
            if _find_code(error) in _ALREADY | _GONE:
                return True
            raise
    delete(probe)
    return False


def list_pending(url: Url) -> Iterator[Pending]:
    """Yield the uploads of polyak whose keys begin with that of a Url; never those of others."""
    with _explaining(url) as client:
        pages = client.get_paginator("list_multipart_uploads")
        for page in pages.paginate(Bucket=url.bucket, Prefix=url.key):
            now = _read_clock(page)
            for one in page.get("Uploads", ()):
                found = _examine(client, url._replace(key=one["Key"]), one, now)
                if found:
                    yield found


def _read_clock(answer: Mapping[str, Any]) -> float:
    """Return the server's time, since this machine's clock may be wrong."""
    text = answer["ResponseMetadata"]["HTTPHeaders"]["date"]
    return email.utils.parsedate_to_datetime(text).timestamp()


def _examine(client: Any, url: Url, listed: Mapping[str, Any], now: float) -> Pending | None:
    """Return an upload if it has polyak's lease, and nothing between its parts and the lease."""
    from botocore.exceptions import ClientError

    names = {"Bucket": url.bucket, "Key": url.key, "UploadId": listed["UploadId"]}
    try:
        pages = client.get_paginator("list_parts").paginate(**names)
        parts = {one["PartNumber"]: one for page in pages for one in page.get("Parts", ())}
    except ClientError as error:
        if _find_code(error) in _GONE:  # completed or aborted meanwhile
            return None
        raise
    lease = parts.pop(LEASE, None)
    if not lease or lease["Size"] != len(_LEASE_CONTENT) or max(parts, default=0) > MOST_PARTS:
        return None
    idle = max(0.0, now - lease["LastModified"].timestamp())
    nbytes = sum(one["Size"] for one in parts.values())
    return Pending(url.key, listed["UploadId"], listed["Initiated"].timestamp(), idle, nbytes)
