"""The examples of the guide's reference of Python that need Keras."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.api_examples import WITH_KERAS
from tests.test_api import run_example


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_KERAS)
def test_an_example_shows_what_python_shows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Typed as it stands in a folder with the sample checkpoints."""
    monkeypatch.chdir(tmp_path)
    assert run_example(name, tmp_path) == ""
