"""What Keras leaves behind when a save fails on the way is refused, or holds all of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import pytest

from polyak_cli import formats
from polyak_cli.errors import FormatError

keras = pytest.importorskip("keras")

#: Where h5py is made to fail, as it does when a disk is full or a user presses Ctrl-C.
CALLS = [
    (h5py.Group, "create_dataset"),
    (h5py.Group, "create_group"),
    (h5py.AttributeManager, "create"),
    (h5py.Dataset, "__setitem__"),
]


def build_model() -> Any:
    """Return a compiled model whose optimizer has slots."""
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization()]
    )
    model.compile("adam", "mean_squared_error")
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("owner", "call"), CALLS, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_save_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, call: str
) -> None:
    """At every call in turn; only one that failed just before the optimizer is read as whole."""
    model = build_model()
    model.save(tmp_path / "whole.h5")
    (whole,) = formats.scan([tmp_path / "whole.h5"])
    original = getattr(owner, call)
    left: int | None = None

    def fail(*args: Any, **options: Any) -> Any:
        nonlocal left
        assert left is not None
        left -= 1
        if left < 0:
            raise OSError("on purpose")
        return original(*args, **options)

    refused = accepted = 0
    for count in range(1000):
        path = tmp_path / f"{count}.h5"
        left = count
        monkeypatch.setattr(owner, call, fail)
        try:
            model.save(path)
        except Exception:
            monkeypatch.setattr(owner, call, original)
        else:
            break
        try:
            (table,) = formats.scan([path])
        except FormatError:
            refused += 1
        else:
            assert table.tensors.keys() == whole.tensors.keys()
            assert not table.optimizer
            accepted += 1
    assert refused > 4
    assert accepted <= 1
