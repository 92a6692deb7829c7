"""Tests with Transformers have an environment of their own; elsewhere they are not collected."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("transformers") is None:
    collect_ignore_glob = ["test_*.py"]

# Before the libraries are imported: nothing here may ask the Hub for anything.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ignore warnings of the libraries about themselves, which the project can do nothing about."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for kind in ("UserWarning", "FutureWarning", "DeprecationWarning", "ResourceWarning"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore::{kind}"))
