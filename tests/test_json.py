"""The guide lists every key of what `--json` prints, with its type, and no other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from polyak_cli import __version__
from polyak_cli.cli import cli
from tests.command import SAMPLES, polyak
from tests.documented import find_undocumented, read_keys
from tests.oracle import write_model

PAGE = read_keys("json")
RECORD = read_keys("record")["Keys"]
PLAN, REPORT = "`polyak average --dry-run`", "`polyak average` and `polyak watch`"
INSPECT = "`polyak inspect`"
#: Headings of the page -> the commands whose results have these keys.
COMMANDS: Mapping[str, list[str]] = {
    PLAN: [
        "average bad --on-unhealthy skip --dry-run --json --scheme exp --alpha 2",
        "average lora --dry-run --json",
        "average folders -o other --dry-run --json",
    ],
    REPORT: [
        "average bad --on-unhealthy skip --json -o 1.h5 --best 3 --monitor loss "
        "--log bad/log.csv --log-first 0",
        "average lora --lora exact --json -o 2.safetensors --verify",
        "watch two --once --json -o 3.h5 --last 2",
    ],
    "`polyak verify`": ["verify final.h5 --json", "verify changed.h5 --json"],
    INSPECT: [
        "inspect final.h5 bad/model_1.h5 --stats --json",
        "inspect 1.h5 --json",
        "inspect whole --json",
    ],
    "`polyak diff A B`": ["diff bad/model_1.h5 bad/model_2.h5 --json"],
    "`polyak diff DIR`": ["diff two --last 2 --json"],
    "`polyak geometry`": [
        "geometry sample_checkpoints --scheme exp --json",
        "geometry two --last 2 --json",
    ],
    "`polyak check`": ["check bad --json", "check two --json"],
}
#: Keys of these commands that only Keras gives; see test_json and test_forecast in tests/keras.
OF_KERAS = {"forecast", *(f"recalibrate.{key}" for key in ("data", "rows", "batch_size"))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with healthy and unhealthy runs, LoRA factors, and averages."""
    folder = tmp_path_factory.mktemp("json")
    random = np.random.default_rng(0)
    one, other = random.normal(size=(2, 40, 20))
    for name, models in (
        ("bad", [one + 0.01 * k * other if k != 2 else one + np.nan for k in range(5)]),
        ("two", [one, one + 0.01 * other, other, other + 0.01 * one]),
        ("lora", [one, one + 0.3 * other]),
    ):
        (folder / name).mkdir()
        for number, model in enumerate(models, start=1):
            epoch = number + (name == "bad" and number > 3)  # epoch 4 is missing there
            numbers = model.astype(np.float32)
            if name == "lora":
                factors = {"q.lora_A.weight": numbers[:2], "q.lora_B.weight": numbers[:, :2].copy()}
                save_file(factors, folder / name / f"model_{epoch}.safetensors")
            else:
                write_model(folder / name / f"model_{epoch}.h5", {"d": {"k": numbers}})
    (folder / "bad/log.csv").write_text(
        "epoch,loss\n" + "".join(f"{k},{1 / (k + 1)}\n" for k in range(7))
    )
    for step in (1, 2):
        checkpoint = folder / f"folders/checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        save_file({"k": one.astype(np.float32)}, checkpoint / "model.safetensors")
        (checkpoint / "config.json").write_text("{}")
        (checkpoint / "optimizer.pt").write_text("moments")
    polyak("average", "folders", "-o", "whole", cwd=folder)
    for name in ("a", "final", "changed"):
        polyak("average", SAMPLES, "-o", f"{name}.h5", "--last", "2", cwd=folder)
    shutil.copytree(SAMPLES, folder / "sample_checkpoints")
    with open(folder / "changed.h5", "r+b") as file:
        file.seek(-100, 2)
        file.write(bytes(100))
    return folder


@pytest.mark.parametrize("heading", COMMANDS)
def test_every_key_is_in_the_guide_and_the_guide_has_no_other(folder: Path, heading: str) -> None:
    """Each key of each result is listed with its type, and each that is listed is met."""
    keys = dict(PAGE[""]) | dict(PAGE[heading])
    if heading == REPORT:
        keys |= PAGE[PLAN]
    if heading == INSPECT:
        keys |= {f"checkpoints[].provenance.{key}": types for key, types in RECORD.items()}
    seen: set[str] = set()
    for command in COMMANDS[heading]:
        done = polyak(*command.split(), cwd=folder)
        assert done.returncode in (0, 1), done.stderr
        result = json.loads(done.stdout)
        assert next(iter(result.items())) == ("polyak", __version__)
        assert find_undocumented(result, keys, seen) == [], command
    listed = {key for key in PAGE[heading] if key not in OF_KERAS}
    assert listed <= seen


def test_every_command_with_json_has_a_section() -> None:
    """A new command with --json is not left out of the page."""
    with_json = {
        name
        for name, command in cli.commands.items()
        if any("--json" in parameter.opts for parameter in command.params)
    }
    for name in with_json:
        assert any(f"`polyak {name}" in heading for heading in PAGE), name


def test_a_missing_key_and_a_wrong_type_are_found() -> None:
    """The comparison can fail: a key that is not listed, and a type that is another."""
    keys = {"a": frozenset({"integer"}), "b": frozenset({"object"}), "b.NAME": frozenset({"null"})}
    result: dict[str, Any] = {"a": 1, "b": {"x": None}}
    assert find_undocumented(result, keys, set()) == []
    assert find_undocumented(result | {"c": 2}, keys, set()) == ["c (integer)"]
    assert find_undocumented(result | {"a": 1.5}, keys, set()) == ["a (number)"]
    assert find_undocumented({"b": {"x": "y"}}, keys, set()) == ["b.x (string)"]
