"""The guide lists every key of what the commands that run Keras print with `--json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import keras
import numpy as np
import pytest

from polyak_cli import __version__
from tests.command import SAMPLES
from tests.documented import find_undocumented, read_keys
from tests.keras.commands import polyak

pytestmark = pytest.mark.slow

PAGE = read_keys("json")
#: Headings of the page -> the command whose result has these keys.
COMMANDS: Mapping[str, str] = {
    "`polyak train`": "train --epochs 3 --keep 2 -o run --json",
    "`polyak recalibrate`": "recalibrate bn/model_1.h5 --data rows.npz -o new.h5 --json",
    "`polyak average` and `polyak watch`": "average bn --recalibrate rows.npz -o o.h5 --json",
    "`polyak inspect`": "inspect o.h5 --json",
    "`polyak evaluate`": "evaluate run --data blobs --baseline run/model_1.h5 --json",
    "`polyak sweep`": (
        f"sweep {SAMPLES} --data blobs -o report --windows 2,5 --schemes equal,ema:1 --json"
    ),
}


def write_models(folder: Path) -> None:
    """Write two Keras models with BatchNorm, and rows for them."""
    (folder / "bn").mkdir()
    layers = [keras.Input((4,)), keras.layers.BatchNormalization(), keras.layers.Dense(3)]
    model = keras.Sequential(layers)
    for epoch in (1, 2):
        model.save(folder / f"bn/model_{epoch}.h5")
        model.layers[-1].bias.assign_add([0.1, 0.2, 0.3])
    rows = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    np.savez(folder / "rows.npz", x=rows, y=np.arange(20) % 3)


def list_keys(heading: str) -> dict[str, frozenset[str]]:
    """Return the keys below a heading, with those of the objects that it refers to."""
    keys = dict(PAGE[""]) | dict(PAGE[heading])
    if heading.startswith("`polyak average`"):
        keys |= PAGE["`polyak average --dry-run`"]
        keys |= {f"recalibrated.{k}": types for k, types in PAGE["`polyak recalibrate`"].items()}
    if heading == "`polyak inspect`":
        record = read_keys("record")["Keys"]
        keys |= {f"checkpoints[].provenance.{key}": types for key, types in record.items()}
    if heading == "`polyak sweep`":
        rows = {k.removeprefix("rows[]."): t for k, t in keys.items() if k.startswith("rows[].")}
        keys |= {f"winner.{key}": types for key, types in rows.items()}
    return keys


def test_every_key_is_in_the_guide_and_the_guide_has_no_other(tmp_path: Path) -> None:
    """Each key is listed with its type, each that is listed is met, and sweep.json is the same."""
    write_models(tmp_path)
    for heading, command in COMMANDS.items():
        done = polyak(*command.split(), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        seen: set[str] = set()
        assert next(iter(result.items())) == ("polyak", __version__)
        assert find_undocumented(result, list_keys(heading), seen) == [], heading
        if heading not in ("`polyak average` and `polyak watch`", "`polyak inspect`"):
            assert set(PAGE[heading]) <= seen, heading
        elif "average" in heading:
            assert {f"recalibrate.{key}" for key in ("data", "rows", "batch_size")} <= seen
    assert json.loads((tmp_path / "report/sweep.json").read_text()) == result
