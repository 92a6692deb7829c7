"""Which layer is which, in files of older versions of Keras and with configurations of any kind."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from polyak_cli import average, plan
from polyak_cli.errors import MismatchError
from polyak_cli.formats.keras.outline import label_groups, read_outline
from polyak_cli.tensors import OutlinedLayer
from tests.oracle import read_model, write_model

ONES = np.ones((2, 2), "f4")


def describe(kind: str, name: str | None, *below: dict[str, Any]) -> dict[str, Any]:
    """Return a layer as Keras describes it in a configuration."""
    inside = {"layers": list(below)} if below else {}
    return {"class_name": kind, "config": {"name": name, **inside}}


def write_weights(file: Any, kernels: Mapping[str, float]) -> None:
    """Write kernels into a weights file without labels, as Keras 3.0 did."""
    for place, value in kernels.items():
        file[f"layers/{place}/vars/0"] = np.full((2, 2), value, "f4")


def write_archive(path: Path, names: list[str]) -> Path:
    """Write a .keras of dense layers whose names only its configuration has; left is 1."""
    places = ["dense", "dense_1", "dense_2"]
    weights = io.BytesIO()
    with h5py.File(weights, "w") as file:
        write_weights(file, {p: VALUES[n] for p, n in zip(places, names, strict=False)})
    config = describe("Sequential", "net", *(describe("Dense", name) for name in names))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", '{"keras_version": "3.0.5"}')
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("model.weights.h5", weights.getvalue())
    return path


VALUES = {"left": 1.0, "right": -1.0, "middle": 5.0}


def test_the_configuration_names_layers_of_older_archives(tmp_path: Path) -> None:
    """Layers that change places pair by name, and a note says so; other names are refused."""
    first = write_archive(tmp_path / "m_1.keras", ["left", "right"])
    second = write_archive(tmp_path / "m_2.keras", ["right", "left"])
    report = average([first, second], tmp_path / "o.keras")
    with zipfile.ZipFile(tmp_path / "o.keras") as archive:
        (tmp_path / "o.h5").write_bytes(archive.read("model.weights.h5"))
    found = read_model(tmp_path / "o.h5")
    assert (found["layers/dense/vars/0"] == -1).all()
    assert (found["layers/dense_1/vars/0"] == 1).all()
    assert any("paired by their layers' names" in note for note in report.notes)
    third = write_archive(tmp_path / "m_3.keras", ["left", "middle"])
    with pytest.raises(MismatchError, match=r"'right' where the other has 'middle'"):
        plan([first, third])
    plan([first, third], match="order")


def test_weights_without_labels_pair_by_their_paths(tmp_path: Path) -> None:
    """Nothing else is known of them."""
    for k, value in enumerate((1.0, 3.0)):
        with h5py.File(tmp_path / f"m_{k}.weights.h5", "w") as file:
            write_weights(file, {"dense": value, "dense_1": -value})
    average(tmp_path, tmp_path / "o.weights.h5")
    assert (read_model(tmp_path / "o.weights.h5")["layers/dense/vars/0"] == 2).all()


def test_an_outline_lists_models_before_their_layers() -> None:
    """Depth first, with the class as automatic names have it."""
    inner = describe("Functional", "bb", describe("Conv2D", "a"), describe("My>Own", None))
    wrapped = {"class_name": "TimeDistributed", "config": {"name": "t", "layer": inner}}
    text = json.dumps(describe("Functional", "net", inner, wrapped, describe("Dense", "d")))
    expected = [
        (1, "bb", "functional"),
        (2, "a", "conv2d"),
        (2, "", "own"),
        (1, "t", "time_distributed"),
        (2, "a", "conv2d"),
        (2, "", "own"),
        (1, "d", "dense"),
    ]
    assert read_outline(text.encode()) == tuple(OutlinedLayer(*layer) for layer in expected)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{[",
        b"[" * 100_000,
        b"3",
        b'{"config": 3}',
        b'{"config": {"layers": [3, null, []]}}',
        b"\xff\xfe",
        b'{"config": {"layers": {"a": 1}}}',
    ],
)
def test_a_configuration_of_any_kind_has_an_outline(text: bytes) -> None:
    """It is a stranger's, and no reason to refuse the tensors."""
    assert read_outline(text) == ()


def test_a_deep_configuration_ends() -> None:
    """Models are followed some way down, and no further."""
    config: dict[str, Any] = describe("Dense", "d")
    for _ in range(200):
        config = describe("Functional", "m", config)
    assert len(read_outline(json.dumps(config).encode())) < 50
    assert len(label_groups(config, {"/layers/functional"})) == 1


def write_nested(path: Path, weights: list[str], names: list[str]) -> Path:
    """Write a whole model with one nested model, whose kernels are 10 and -10."""
    inner = describe("Functional", "bb", *(describe("Conv1D", name) for name in names))
    values = {f"{name}/kernel": sign * ONES for name, sign in zip(names, (10, -10), strict=True)}
    layers = {"bb": {name: values[name] for name in weights}}
    return write_model(path, layers, config=json.dumps(describe("Functional", "net", inner)))


def test_a_position_in_the_model_counts_and_not_in_the_file(tmp_path: Path) -> None:
    """A frozen layer stands last in the list of its nested model's tensors."""
    first = write_nested(tmp_path / "m_1.h5", ["a/kernel", "b/kernel"], ["a", "b"])
    second = write_nested(tmp_path / "m_2.h5", ["d/kernel", "c/kernel"], ["c", "d"])
    average([first, second], tmp_path / "o.h5", match="order")
    found = read_model(tmp_path / "o.h5")
    assert (found["model_weights/bb/c/kernel"] == 10).all()
    assert (found["model_weights/bb/d/kernel"] == -10).all()


def test_without_configuration_like_layers_are_refused(tmp_path: Path) -> None:
    """Nothing tells whether freezing has moved them; what differs in shape still pairs."""
    layers: Any = [{"bb": {f"{n}/kernel": ONES for n in names}} for names in ("ab", "cd")]
    paths = [write_model(tmp_path / f"m_{k}.h5", one) for k, one in enumerate(layers)]
    with pytest.raises(MismatchError, match=r"'bb' has 'a', 'b' where .* have the same shape"):
        plan(paths, match="order")
    with pytest.raises(MismatchError, match=r"has no tensor"):
        plan(paths)
    for path, (one, other) in zip(paths, (("a", "b"), ("d", "c")), strict=True):
        kernels = {one: ONES, other: np.zeros((3, 3), "f4")}
        order = sorted(kernels)
        write_model(path, {"bb": {f"{n}/kernel": kernels[n] for n in order}})
    average(paths, tmp_path / "o.h5", match="order")
    assert (read_model(tmp_path / "o.h5")["model_weights/bb/d/kernel"] == 1).all()
