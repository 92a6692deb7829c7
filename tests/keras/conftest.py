"""Fixtures of the tests of Keras models, which are not collected without TensorFlow."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("tensorflow") is None or find_spec("keras") is None:
    collect_ignore_glob = ["test_*.py"]

#: Warnings of the frameworks about themselves, which the project can do nothing about.
FRAMEWORKS = [
    # The variables of Keras do not accept an argument of numpy 2 yet.
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
    # tf_keras warns about .h5, the format of these tests.
    "ignore:You are saving your model as an HDF5 file:UserWarning",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ignore these warnings in the tests of this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for warning in FRAMEWORKS:
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Let every test draw the same initial weights whenever and in whatever order it runs."""
    import keras

    keras.utils.set_random_seed(0)
