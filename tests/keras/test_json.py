"""The guide lists every key of what the commands that run Keras print with `--json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from polyak_cli import __version__
from tests.command import SAMPLES, scripted
from tests.documented import find_undocumented, read_keys

pytestmark = pytest.mark.slow

PAGE = read_keys("json")
#: Headings of the page -> the commands whose results have these keys.
COMMANDS: Mapping[str, list[str]] = {
    "`polyak train`": ["train --epochs 3 --keep 2 -o run --json"],
    "`polyak recalibrate`": ["recalibrate bn/model_1.h5 --data rows.npz -o new.h5 --json"],
    "`polyak average` and `polyak watch`": ["average bn --recalibrate rows.npz -o o.h5 --json"],
    "`polyak inspect`": ["inspect o.h5 --json"],
    "`polyak evaluate`": ["evaluate run --data blobs --baseline run/model_1.h5 --json"],
    "`polyak sweep`": [
        f"sweep {SAMPLES} --data blobs -o report --windows 2 --schemes equal,ema:1 --json"
    ],
}
#: Runs several commands in one process, as Keras takes seconds to load.
LOOP = """
import json, sys
from polyak_cli.cli import cli
for command in json.loads(sys.argv[1]):
    cli.main(command.split(), "polyak", standalone_mode=False)
sys.exit()
"""


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


def parse_all(text: str) -> list[dict[str, Any]]:
    """Return the objects that follow one another in a text."""
    found, position = [], 0
    while position < len(text):
        value, position = json.JSONDecoder().raw_decode(text, position)
        found.append(value)
        position += 1  # the newline
    return found


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
    commands = [command for each in COMMANDS.values() for command in each]
    done = scripted(LOOP, json.dumps(commands), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = parse_all(done.stdout)
    assert len(results) == len(commands)
    for (heading, _), result in zip(COMMANDS.items(), results, strict=True):
        seen: set[str] = set()
        assert next(iter(result.items())) == ("polyak", __version__)
        assert find_undocumented(result, list_keys(heading), seen) == [], heading
        if heading not in ("`polyak average` and `polyak watch`", "`polyak inspect`"):
            assert set(PAGE[heading]) <= seen, heading
        elif "average" in heading:
            assert {f"recalibrate.{key}" for key in ("data", "rows", "batch_size")} <= seen
    assert json.loads((tmp_path / "report/sweep.json").read_text()) == results[-1]
