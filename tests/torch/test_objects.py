"""What training scripts keep beside the weights: objects of any class, as PyTorch saves them."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import enum
import os
import pathlib
import random
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from polyak_cli import average, plan
from polyak_cli.errors import FormatError


class Colour(enum.Enum):
    """A setting."""

    RED = "red"


class Flags(enum.IntFlag):
    """A setting that several may be set of."""

    A = 1
    B = 2


class Settings(dict[str, Any]):
    """A dictionary whose items are attributes, as Lightning and icefall have one."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class State(collections.OrderedDict[str, Any]):
    """A state dict of a class of its own."""


class Point(NamedTuple):
    """A tuple with names."""

    x: int
    y: float


@dataclass
class Config:
    """Hyper-parameters as a dataclass."""

    lr: float = 0.1
    path: Path = field(default_factory=lambda: Path("runs/1"))
    colour: Colour = Colour.RED

    def __hash__(self) -> int:
        return hash(self.lr)


class Node:
    """An object that refers to itself."""

    def __init__(self) -> None:
        self.me = (self, [self])


BESIDE: dict[str, Callable[[], Any]] = {
    "namespace": lambda: argparse.Namespace(lr=0.1, model="resnet", inner=argparse.Namespace(a=1)),
    "path": lambda: pathlib.PurePosixPath("a/b"),
    "windows path": lambda: pathlib.PureWindowsPath("a/b"),
    "defaultdict": lambda: collections.defaultdict(list, a=[1]),
    "defaultdict of a class": lambda: collections.defaultdict(Settings, a=Settings(b=1)),
    "deque": lambda: collections.deque([1, 2], maxlen=5),
    "counter": lambda: collections.Counter("aab"),
    "ordered": lambda: State(a=1, b=2),
    "dictionary": lambda: Settings(lr=0.1, inner=Settings(a=1)),
    "datetime": lambda: datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC),
    "timedelta": lambda: datetime.timedelta(seconds=3),
    "decimal": lambda: decimal.Decimal("0.1"),
    "enum": lambda: Colour.RED,
    "flags": lambda: Flags.A | Flags.B,
    "named tuple": lambda: Point(1, 2.0),
    "dataclass": Config,
    "slice": lambda: slice(1, 2),
    "range": lambda: range(3),
    "frozenset": lambda: frozenset("ab"),
    "large number": lambda: 1 << 4000,
    "function": lambda: nn.functional.relu,
    "class": lambda: nn.ReLU,
    "numpy types": lambda: (np.float32(0.5), np.dtype("f8"), np.int64),
    "random state": random.getstate,
    "machine": lambda: (os.uname(), os.stat_result(range(10)), os.terminal_size((80, 24))),
    "keys": lambda: {Colour.RED: 1, Path("a"): 2, (1, 2): 3, b"x": 4},
}


def write_two(folder: Path, make: Callable[[int], Any], **options: Any) -> list[Path]:
    """Save two checkpoints."""
    paths = [folder / "m_1.pt", folder / "m_2.pt"]
    for k, path in enumerate(paths, start=1):
        torch.save(make(k), path, **options)
    return paths


@pytest.mark.parametrize("protocol", [2, 4])
def test_objects_beside_the_weights_are_carried(tmp_path: Path, protocol: int) -> None:
    """PyTorch loads the same objects from the average, whose weights are the mean."""
    paths = write_two(
        tmp_path,
        lambda k: {
            "state_dict": {"w": torch.full((3,), float(k))},
            **{name: [make()] for name, make in BESIDE.items()},
        },
        pickle_protocol=protocol,
    )
    report = average(paths, tmp_path / "o.pt")
    found = torch.load(tmp_path / "o.pt", weights_only=False)
    assert report.plan.averaged == ("state_dict/w",)
    assert found["state_dict"]["w"].tolist() == [1.5] * 3
    for name, make in BESIDE.items():
        assert found[name] == [make()], name
        assert type(found[name][0]) is type(make()), name


def test_numpy_arrays_and_generators_are_carried(tmp_path: Path) -> None:
    """They are the newest's, as the plan says."""
    paths = write_two(
        tmp_path,
        lambda k: {
            "w": torch.full((3,), float(k)),
            "mean": np.full(2, float(k)),
            "objects": np.array([Path("a"), None]),
            "rng": np.random.get_state(),
            "generator": np.random.default_rng(k),
            "git": subprocess.CompletedProcess(["git"], k, "f00"),
        },
    )
    report = average(paths, tmp_path / "o.pt")
    found = torch.load(tmp_path / "o.pt", weights_only=False)
    newest = torch.load(paths[1], weights_only=False)
    assert found["mean"].tolist() == [2.0, 2.0]
    assert (found["objects"] == newest["objects"]).all()
    assert (found["rng"][1] == newest["rng"][1]).all()
    assert found["generator"].random() == newest["generator"].random()
    assert (found["git"].returncode, found["git"].stdout) == (2, "f00")
    assert any("carried unread" in note and "numpy" in note for note in report.notes)


def test_objects_that_refer_to_themselves_are_carried(tmp_path: Path) -> None:
    """Pickles of tuples in cycles have opcodes of their own."""
    paths = write_two(tmp_path, lambda k: {"w": torch.full((3,), float(k)), "node": Node()})
    average(paths, tmp_path / "o.pt")
    node = torch.load(tmp_path / "o.pt", weights_only=False)["node"]
    assert node.me[0] is node
    assert node.me[1] == [node]


@pytest.mark.parametrize("kind", [State, Settings, dict, collections.OrderedDict])
def test_state_dicts_of_any_class_are_averaged(tmp_path: Path, kind: type[Any]) -> None:
    """Their items are tensors under names, whatever else the class does."""
    paths = write_two(tmp_path, lambda k: kind(model=kind(w=torch.full((3,), float(k)), n=k)))
    average(paths, tmp_path / "o.pt")
    found = torch.load(tmp_path / "o.pt", weights_only=False)
    assert type(found["model"]) is kind
    assert found["model"]["w"].tolist() == [1.5] * 3
    assert found["model"]["n"] == 2


def test_only_the_averaged_storages_differ(tmp_path: Path) -> None:
    """The pickle of the average is the newest's, byte for byte."""
    paths = write_two(tmp_path, lambda k: {"w": torch.full((3,), float(k)), "args": Config()})
    average(paths, tmp_path / "o.pt")
    with zipfile.ZipFile(tmp_path / "o.pt") as found, zipfile.ZipFile(paths[1]) as newest:
        assert found.read("m_2/data.pkl") == newest.read("m_2/data.pkl")


def test_tensors_among_settings_are_the_newests(tmp_path: Path) -> None:
    """What a trainer's settings hold in an object is no part of the model."""

    def make(k: int) -> Any:
        settings = argparse.Namespace(weights=torch.full((2,), float(k)), loss=nn.BatchNorm1d(2))
        return {"state_dict": {"w": torch.full((3,), float(k))}, "hyper_parameters": settings}

    paths = write_two(tmp_path, make)
    assert plan(paths).averaged == ("state_dict/w",)
    average(paths, tmp_path / "o.pt")
    found = torch.load(tmp_path / "o.pt", weights_only=False)
    assert found["hyper_parameters"].weights.tolist() == [2.0, 2.0]
    assert found["hyper_parameters"].loss.running_var.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("key", ["model", "ema"])
def test_whole_models_are_refused_with_their_place(tmp_path: Path, key: str) -> None:
    """Only their classes know what their tensors are."""
    paths = write_two(tmp_path, lambda k: {"epoch": k, key: nn.Linear(2, 2), "args": Config()})
    with pytest.raises(
        FormatError, match=rf"whole model .*Linear\) at '{key}', whose code is never"
    ):
        average(paths, tmp_path / "o.pt")


def test_a_module_without_tensors_is_carried(tmp_path: Path) -> None:
    """A loss function or an activation holds nothing that could be averaged."""
    paths = write_two(tmp_path, lambda k: {"w": torch.full((3,), float(k)), "loss": nn.MSELoss()})
    average(paths, tmp_path / "o.pt")
    assert isinstance(torch.load(tmp_path / "o.pt", weights_only=False)["loss"], nn.MSELoss)


@pytest.mark.parametrize("state", [{"w": np.ones(3)}, [{"m": {"w": np.ones((2, 3), np.float32)}}]])
def test_a_file_of_arrays_alone_is_named(tmp_path: Path, state: object) -> None:
    """Arrays of numpy are carried beside tensors; without a tensor there is nothing to average."""
    torch.save(state, tmp_path / "m_1.pt")
    with pytest.raises(FormatError, match=r"m_1\.pt: holds arrays of numpy and no tensor.*savez"):
        plan(tmp_path / "m_1.pt")
