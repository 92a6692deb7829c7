"""Checkpoints of one run whose names differ by a prefix."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from polyak_cli import average, check, plan, verify
from polyak_cli.errors import MismatchError, UsageError

Tensors = dict[str, npt.NDArray[np.float32]]

NAMES = ("encoder.layer1.weight", "encoder.layer1.bias", "head.weight")


def values(seed: int) -> Tensors:
    """Return the tensors of a model, all of one shape, so that only names tell them apart."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(2, 3)).astype(np.float32) for name in NAMES}


def rename(tensors: Tensors, old: str, new: str) -> Tensors:
    """Return the tensors with a part of their names replaced; old "" puts a prefix before all."""
    return {(name.replace(old, new) if old else new + name): v for name, v in tensors.items()}


#: What the older checkpoint's names have, and the options that the error recommends.
CASES = {
    "DDP": ("", "module.", ["module."]),
    "torch.compile": ("", "_orig_mod.", ["_orig_mod."]),
    "both": ("", "module._orig_mod.", ["module.", "_orig_mod."]),
    "FSDP": ("", "_fsdp_wrapped_module.", ["_fsdp_wrapped_module."]),
    "DeepSpeed": ("", "_forward_module.", ["_forward_module."]),
    "a compiled part": ("layer1.", "layer1._orig_mod.", ["_orig_mod."]),
    "Lightning": ("", "model.", ["model."]),
    "Lightning and torch.compile": ("", "model._orig_mod.", ["_orig_mod.", "model."]),
}


@pytest.mark.parametrize(
    ("suffix", "case", "is_newer"),
    [
        *(("safetensors", case, False) for case in CASES),
        ("safetensors", "both", True),
        ("npz", "both", True),
        ("npz", "a compiled part", False),
    ],
)
def test_the_error_names_the_option_that_pairs_them(
    tmp_path: Path, suffix: str, case: str, is_newer: bool
) -> None:
    """Whichever has the prefix; the newest's names are kept, and verify uses the option too."""
    old, new, options = CASES[case]
    plain = [values(1), values(2), values(3)]
    saved = [rename(one, old, new) if (k == 2) == is_newer else one for k, one in enumerate(plain)]
    (tmp_path / "run").mkdir()
    for k, tensors in enumerate(saved):
        path = tmp_path / "run" / f"m_{k}.{suffix}"
        if suffix == "npz":
            np.savez(path, **tensors)  # type: ignore[arg-type] # keywords are names
        else:
            save_file(tensors, path)
    wanted = " ".join(f"--strip-prefix {option}" for option in options)
    with pytest.raises(MismatchError, match=rf"m_1.*only a prefix differs.*Use {wanted} to pair"):
        plan(tmp_path / "run")
    kinds = {problem.kind for problem in check(tmp_path / "run").all_problems}
    assert "other model" in kinds
    found = check(tmp_path / "run", strip_prefix=options)
    assert "other model" not in {problem.kind for problem in found.all_problems}
    output = tmp_path / f"o.{suffix}"
    report = average(tmp_path / "run", output, strip_prefix=options)
    result = dict(np.load(output)) if suffix == "npz" else load_file(output)
    for name, theirs in zip(saved[2], NAMES, strict=True):
        total = plain[0][theirs].astype(np.float64)
        for k in (1, 2):
            total = total + plain[k][theirs].astype(np.float64)
        assert result[name].tobytes() == (total / 3).astype(np.float32).tobytes()
    fewer = plan(sorted((tmp_path / "run").iterdir())[1:], strip_prefix=options)
    for notes, count in ((report.notes, "2 checkpoints"), (fewer.notes, "1 checkpoint")):
        text = f"the names of {count} are paired without the prefix"
        assert any(note.startswith(text) for note in notes)
    assert verify(output, sources=[tmp_path / "run"]).problems == ()


def test_a_record_has_the_option_only_where_it_was_given(tmp_path: Path) -> None:
    """So the records of other averages keep their bytes."""
    save_file(values(1), tmp_path / "m_1.safetensors")
    save_file(rename(values(2), "", "module."), tmp_path / "m_2.safetensors")
    paths = [str(tmp_path / "m_1.safetensors"), str(tmp_path / "m_2.safetensors")]
    command = [sys.executable, "-m", "polyak_cli", "average", *paths]
    output = ["-o", str(tmp_path / "o.safetensors"), "--strip-prefix", "module."]
    subprocess.run([*command, *output], check=True, capture_output=True)
    average(paths[:1], tmp_path / "one.safetensors")
    for name, expected in (("o", ["module."]), ("one", None)):
        with safe_open(tmp_path / f"{name}.safetensors", "np") as file:
            record = json.loads(file.metadata()["polyak_provenance"])
        assert record["options"].get("strip_prefix") == expected


def test_names_that_become_equal_are_refused(tmp_path: Path) -> None:
    """Two tensors of one checkpoint must not be taken for one."""
    one = values(1) | rename(values(2), "", "module.")
    save_file(one, tmp_path / "m_1.safetensors")
    with pytest.raises(MismatchError, match=r"m_1.*have the same name without the prefix"):
        plan([tmp_path / "m_1.safetensors"], strip_prefix=["module."])


def test_a_prefix_that_no_name_has_is_a_usage_error(tmp_path: Path) -> None:
    """A typing error is not passed over; neither is a part in the middle of a word stripped."""
    save_file(rename(values(1), "", "submodule."), tmp_path / "m_1.safetensors")
    with pytest.raises(UsageError, match=r"--strip-prefix 'module\.' matches no tensor"):
        plan([tmp_path / "m_1.safetensors"], strip_prefix=["module"])


def test_other_models_are_not_called_a_prefix(tmp_path: Path) -> None:
    """Where more than a prefix differs, the error says what is missing, as before."""
    save_file(values(1), tmp_path / "m_1.safetensors")
    other = rename(values(2), "", "module.")
    other["module.other.weight"] = other.pop("module.head.weight")
    save_file(other, tmp_path / "m_2.safetensors")
    with pytest.raises(MismatchError) as caught:
        plan(tmp_path)
    assert "prefix" not in str(caught.value)
