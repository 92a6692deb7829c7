"""Tests against object stores have an environment of their own; elsewhere nothing is collected."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from tests.remote.proxy import Proxy
from tests.remote.servers import (
    AzureContainer,
    NoServerError,
    S3Bucket,
    Server,
    azurite,
    seaweedfs,
)

# Where only evaluate and sweep are tried on a bucket, the vendors' clients are not all there.
if find_spec("obstore") is None or find_spec("boto3") is None or find_spec("azure") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield an S3 server: SeaweedFS."""
    try:
        with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
            yield server
    except NoServerError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield an Azure blob server: Azurite."""
    try:
        with azurite(tmp_path_factory.mktemp("azurite")) as server:
            yield server
    except NoServerError as error:
        pytest.skip(str(error))


@pytest.fixture
def bucket(s3: Server) -> Iterator[S3Bucket]:
    """Yield an empty bucket of this test alone."""
    made = S3Bucket.create(s3)
    yield made
    made.remove()


@pytest.fixture
def container(azure: Server) -> Iterator[AzureContainer]:
    """Yield an empty Azure container of this test alone."""
    made = AzureContainer.create(azure)
    yield made
    made.remove()


@pytest.fixture
def proxy(s3: Server) -> Iterator[Proxy]:
    """Yield a proxy before the S3 server, without faults yet."""
    with Proxy(s3) as running:
        yield running
