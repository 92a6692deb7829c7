"""Tests with Orbax have an environment of their own; elsewhere they are not collected."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("orbax") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    # Before the libraries are imported: Keras on JAX, and as many devices as arrays are sharded
    # over.  Elsewhere this file is imported too, and other tests start Keras on its usual back end.
    os.environ["KERAS_BACKEND"] = "jax"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ignore warnings of the libraries about themselves, which the project can do nothing about."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for kind in ("UserWarning", "FutureWarning", "DeprecationWarning", "ResourceWarning"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore::{kind}"))
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))
