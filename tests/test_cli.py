"""The command line as a user and a script meet it: what is printed where, and the exit code."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import math
import os
import pty
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import termios
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import h5py
import numpy as np
import pytest

import polyak_cli
from polyak_cli import __version__
from polyak_cli.averaging.options import Settings
from polyak_cli.averaging.schemes import SCHEMES, Flag, Number, spell
from polyak_cli.cli import cli
from polyak_cli.cli.gates import find_failed
from polyak_cli.errors import UsageError
from polyak_cli.evaluation.evaluator import Score
from polyak_cli.evaluation.reports import format_json
from tests.command import (
    POLYAK,
    SAMPLES,
    Done,
    environment,
    one_line,
    polyak,
    script,
    scripted,
    tree,
)
from tests.oracle import naive_average, read_model, same_bits, write_model

COMMANDS = sorted(cli.commands)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Return a folder that holds the ten sample checkpoints in ckpts/."""
    (tmp_path / "ckpts").mkdir()
    for path in SAMPLES.glob("*.h5"):
        shutil.copy(path, tmp_path / "ckpts")
    return tmp_path


def small(path: Path, value: float = 1.0, layer: str = "dense", **options: Any) -> Path:
    """Write a checkpoint with one layer."""
    return write_model(path, {layer: {"kernel": np.full((6, 4), value, np.float32)}}, **options)


def succeeded(done: Done) -> str:
    """Return what a command printed that ended well."""
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


# --- help and version -----------------------------------------------------------------------------

HEADINGS = {
    "average": [
        "Choosing checkpoints",
        "Health",
        "Coefficients",
        "Averaging",
        "Recalibrating",
        "Output",
        "Machine",
        "Cluster",
        "Help",
    ],
    "watch": [
        "Watching",
        "Forecast",
        "Choosing checkpoints",
        "Coefficients",
        "Averaging",
        "Output",
        "Machine",
        "Cluster",
        "Help",
    ],
    "check": ["Choosing checkpoints", "What belongs together", "Output", "Machine", "Help"],
    "evaluate": ["Data", "Deciding", "Output", "Help"],
    "geometry": [
        "Choosing checkpoints",
        "Coefficients",
        "What is measured",
        "Output",
        "Machine",
        "Help",
    ],
    "recalibrate": ["Data", "Output", "Help"],
    "sweep": ["Choosing checkpoints", "Candidates", "Data", "Output", "Machine", "Help"],
    "verify": ["Checkpoints", "Output", "Machine", "Cluster", "Help"],
    "inspect": ["Output", "Help"],
    "diff": ["Two files", "A run", "Output", "Help"],
    "train": ["Training", "Output", "Help"],
    "uploads": ["Aborting", "Output", "Help"],
    "completion": ["Help"],
    "guide": ["Help"],
    "help": ["Help"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_grouped_and_ends_with_an_example(command: str, tmp_path: Path) -> None:
    """Every command's options stand under headings, and a line to paste comes last."""
    text = succeeded(polyak(command, "--help", cwd=tmp_path))
    assert re.findall(r"^([A-Z][a-z ]+):$", text, re.MULTILINE) == HEADINGS[command]
    example, command_line, _, page = text.splitlines()[-4:]
    assert example.strip() == "Example:"
    assert "polyak " in command_line
    assert page.startswith("  Guide: polyak guide ")
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option_and_shows_its_default(command: str) -> None:
    """No option is bare, and what happens without it can be read."""
    context = click.Context(cli.commands[command], info_name=command, show_default=True)
    for option in cli.commands[command].params:
        if not isinstance(option, click.Option):
            continue
        record = option.get_help_record(context)
        assert record is not None
        assert len(record[1].split()) > 0, option.name
        default = option.get_default(context)
        if type(default) in (str, int, float):  # click's word for none at all is none of these
            assert f"[default: {default}]" in record[1]


@pytest.mark.parametrize("name", [name for name, s in SCHEMES.items() if s.parameters])
def test_help_tells_each_scheme_s_parameter(name: str, tmp_path: Path) -> None:
    """The schemes' parameters and their defaults are those of the registry."""
    text = " ".join(polyak("average", "--help", cwd=tmp_path).stdout.split())
    for one in SCHEMES[name].parameters:
        found = f"For {name}: {one.meaning}."
        if not isinstance(one, Flag) and one.default is not None:
            shown = f"{one.default:g}" if isinstance(one, Number) else one.default
            found += f" [default: {shown}]"
        assert re.search(rf"{spell(one.name)} (?!-).*?{re.escape(found)}", text), one.name


def example_of(command: str) -> str:
    """Return the line that the help of a command offers to paste."""
    return (cli.commands[command].epilog or "").partition("Example:\n")[2].splitlines()[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_valid_command_lines(command: str) -> None:
    """What help offers to paste is understood, option by option."""
    example = example_of(command)
    words = shlex.split(re.sub(r'^\s*eval "\$\((.*)\)"$', r"\1", example))
    assert words[:2] == ["polyak", command]
    assert cli.commands[command].make_context(command, words[2:]).params


def test_the_example_of_average_runs(run_folder: Path) -> None:
    """It can be pasted where the checkpoints are in ckpts/."""
    example = example_of("average")
    done = polyak(*shlex.split(example)[1:], cwd=run_folder)
    assert done.returncode == 0
    assert (run_folder / "final.h5").is_file()


def test_the_first_help_names_every_command_in_full(tmp_path: Path) -> None:
    """Each command has a summary that fits its line."""
    text = succeeded(polyak("--help", cwd=tmp_path)).partition("Example:")[0]
    listed = re.findall(r"^  (\w+) +(\S.*)$", text.partition("Commands:")[2], re.MULTILINE)
    assert [name for name, _ in listed] == COMMANDS
    assert all(summary.endswith(".") and "..." not in summary for _, summary in listed)


def test_the_first_help_ends_with_an_example_that_runs(run_folder: Path) -> None:
    """It can be pasted where the checkpoints are in ckpts/, and names the first thing to do."""
    lines = succeeded(polyak("--help", cwd=run_folder)).splitlines()
    assert [lines[-4].strip(), lines[-1].strip()] == ["Example:", "Guide: polyak guide"]
    program, *arguments = shlex.split(lines[-3])
    assert (program, arguments[0]) == ("polyak", "average")
    assert polyak(*arguments, cwd=run_folder).returncode == 0
    assert (run_folder / "final.h5").is_file()


@pytest.mark.parametrize("arguments", [["--version"], ["-V"], ["--help"], ["average", "--help"]])
def test_script_and_module_are_the_same_program(arguments: list[str], tmp_path: Path) -> None:
    """`polyak` and `python -m polyak_cli` print the same."""
    console = Path(sysconfig.get_path("scripts")) / "polyak"
    if not console.exists():
        pytest.skip("the package is not installed here, only on the path")
    done = subprocess.run(
        [console, *arguments], env=environment(), capture_output=True, text=True, check=False
    )
    assert succeeded(done) == succeeded(polyak(*arguments, cwd=tmp_path))


def test_the_version_is_the_package_s(tmp_path: Path) -> None:
    """--version prints one line with the number that the package knows."""
    text = succeeded(polyak("--version", cwd=tmp_path))
    assert text == f"polyak, version {polyak_cli.__version__}\n"


def test_no_command_shows_the_help_as_an_error(tmp_path: Path) -> None:
    """`polyak` alone says what it can do, on stderr: it did nothing."""
    done = polyak(cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Commands:" in done.stderr


# --- usage ----------------------------------------------------------------------------------------

USAGE = {
    "unknown command": (["avarage"], "No such command 'avarage'"),
    "unknown option": (["average", "ckpts", "--alhpa", "2"], "No such option '--alhpa'"),
    "unknown option of all": (["--nope"], "No such option"),
    "no source": (["average", "-o", "o.h5"], "Missing argument 'SOURCE...'"),
    "no output": (["average", "ckpts"], "--output is missing"),
    "empty output": (["average", "ckpts", "-o", ""], "--output is missing"),
    "option without value": (["average", "ckpts", "-o"], "requires an argument"),
    "no whole number": (["average", "ckpts", "-o", "o.h5", "--last", "2.5"], "'2.5'"),
    "no number": (["average", "ckpts", "-o", "o.h5", "--alpha", "two"], "'two'"),
    "last 0": (["average", "ckpts", "-o", "o.h5", "--last", "0"], "--last is 0"),
    "last -1": (["average", "ckpts", "-o", "o.h5", "--last", "-1"], "--last is -1"),
    "every 0": (["average", "ckpts", "-o", "o.h5", "--every", "0"], "--every is 0"),
    "jobs 0": (["average", "ckpts", "-o", "o.h5", "--jobs", "0"], "--jobs is 0"),
    "from after to": (
        ["average", "ckpts", "-o", "o.h5", "--from", "3", "--to", "2"],
        "--from 3 is after --to 2",
    ),
    "no scheme": (["average", "ckpts", "-o", "o.h5", "--scheme", "cubic"], "'cubic'"),
    "alpha of equal": (
        ["average", "ckpts", "-o", "o.h5", "--alpha", "2"],
        "--alpha belongs to --scheme exp, not to equal",
    ),
    "decay of exp": (
        ["average", "ckpts", "-o", "o.h5", "--scheme", "exp", "--decay", "0.9"],
        "--decay belongs to --scheme ema, not to exp",
    ),
    "sigma of linear": (
        ["average", "ckpts", "-o", "o.h5", "--scheme", "linear", "--sigma", "0.1"],
        "--sigma belongs to --scheme power or posthoc, not to linear",
    ),
    "coefficients and scheme": (
        ["average", "ckpts", "-o", "o.h5", "--scheme", "exp", "--coefficients", "1,1"],
        "exclude each other",
    ),
    "coefficients and alpha": (
        ["average", "ckpts", "-o", "o.h5", "--alpha", "2", "--coefficients", "1,1"],
        "--alpha",
    ),
    "too few coefficients": (
        ["average", "ckpts", "-o", "o.h5", "--coefficients", "1,2"],
        "has 2 numbers; expected 10, one for each checkpoint",
    ),
    "no coefficients": (["average", "ckpts", "-o", "o.h5", "--coefficients", "a,b"], "a,b"),
    "coefficient nan": (
        ["average", "ckpts", "--last", "2", "-o", "o.h5", "--coefficients", "nan,1"],
        "number 1 is nan",
    ),
    "coefficients all 0": (
        ["average", "ckpts", "--last", "2", "-o", "o.h5", "--coefficients", "0,0"],
        "--coefficients",
    ),
    "coefficients of the sum 0": (
        ["average", "ckpts", "--last", "2", "-o", "o.h5", "--coefficients", "-2,2"],
        "the sum is 0",
    ),
    "no size": (["average", "ckpts", "-o", "o.h5", "--max-memory", "lots"], "lots is not a size"),
    "infinite size": (["average", "ckpts", "-o", "o.h5", "--max-memory", "infGB"], "infGB"),
    "size of no unit": (["average", "ckpts", "-o", "o.h5", "--max-memory", "3XB"], "3XB"),
    "negative size": (["average", "ckpts", "-o", "o.h5", "--max-memory", "-5MB"], "-5MB"),
    "size too great": (
        ["average", "ckpts", "-o", "o.h5", "--max-memory", "9" * 400],
        "is not a size",
    ),
    "size too small": (["average", "ckpts", "-o", "o.h5", "--max-memory", "1k"], "1000"),
    "monitor alone": (["average", "ckpts", "-o", "o.h5", "--monitor", "loss"], "--best"),
    "no pattern": (["average", "ckpts", "-o", "o.h5", "--epoch-pattern", "("], "'('"),
    "glob of no tensor": (
        ["average", "ckpts", "-o", "o.h5", "--include-tensors", "zz*"],
        "'zz*' matches no tensor",
    ),
    "no shell": (["completion"], "Choose from: bash, zsh, fish"),
    "unknown shell": (["completion", "tcsh"], "'tcsh'"),
    "no data": (["evaluate", "m.h5"], "Missing option '--data'"),
    "no model": (["evaluate", "--data", "blobs"], "Missing argument 'MODEL...'"),
    "no gate": (["evaluate", "m.h5", "--data", "blobs", "--fail-under", "good"], "good"),
    **{
        f"gate {gate}": (["evaluate", "m.h5", "--data", "blobs", "--fail-under", gate], gate)
        for gate in ("accuracy=nan", "accuracy=inf", "loss=-inf", "=0.8", "accuracy=")
    },
    "nothing to be worse than": (
        ["evaluate", "m.h5", "--data", "blobs", "--fail-if-worse"],
        "--baseline",
    ),
    "no folder": (["train"], "Missing option '-o'"),
}


@pytest.mark.parametrize(("arguments", "message"), USAGE.values(), ids=USAGE)
def test_wrong_usage_is_one_line_and_exit_2(
    arguments: list[str], message: str, run_folder: Path
) -> None:
    """What was asked wrongly is said on stderr in one line, and nothing is done."""
    before = tree(run_folder)
    done = polyak(*arguments, cwd=run_folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in one_line(done.stderr)
    assert tree(run_folder) == before


# --- bad input of ordinary life -------------------------------------------------------------------


def _pair(first: Mapping[str, Any], second: Mapping[str, Any]) -> Callable[[Path], None]:
    """Return what writes two checkpoints of different models."""

    def write(folder: Path) -> None:
        write_model(folder / "run/m_1.h5", first)
        write_model(folder / "run/m_2.h5", second)

    return write


def _good(folder: Path, count: int = 2) -> None:
    for k in range(1, count + 1):
        small(folder / f"run/m_{k}.h5", k)


def _truncated(folder: Path) -> None:
    _good(folder)
    os.truncate(folder / "run/m_1.h5", 1000)


def _garbage(folder: Path) -> None:
    _good(folder)
    (folder / "run/m_1.h5").write_bytes(b"hello")


def _empty_file(folder: Path) -> None:
    _good(folder)
    (folder / "run/m_1.h5").write_bytes(b"")


def _nan(folder: Path) -> None:
    _good(folder)
    small(folder / "run/m_1.h5", np.nan)


def _existing(folder: Path) -> None:
    _good(folder)
    (folder / "out.h5").write_bytes(b"precious")


def _twice(folder: Path) -> None:
    _good(folder)
    (folder / "run/m_3.h5").hardlink_to(folder / "run/m_2.h5")


def _linked_output(folder: Path) -> None:
    _good(folder)
    (folder / "out.h5").symlink_to("run/m_1.h5")


def _file_as_folder(folder: Path) -> None:
    _good(folder)
    (folder / "notes").write_text("no folder")


def _folder_as_output(folder: Path) -> None:
    _good(folder)
    (folder / "out.h5").mkdir()


def _tied(folder: Path) -> None:
    small(folder / "run/m_3.h5")
    small(folder / "run/m_003.h5")


def _no_number(folder: Path) -> None:
    small(folder / "run/final.h5")
    small(folder / "run/m_3.h5")


def _mixed(folder: Path) -> None:
    small(folder / "run/resnet_1.h5")
    small(folder / "run/unet_2.h5")


def _named_pipe(folder: Path) -> None:
    _good(folder)
    os.mkfifo(folder / "pipe.h5")


def _f4(*shape: int) -> Any:
    return np.ones(shape, np.float32)


_ONE: Mapping[str, Any] = {"dense": {"kernel": _f4(6, 4), "bias": _f4(4)}}
_LESS: Mapping[str, Any] = {"dense": {"kernel": _f4(6, 4)}}
_SHAPE: Mapping[str, Any] = {"dense": {"kernel": _f4(6, 4), "bias": _f4(5)}}
_SCALAR: Mapping[str, Any] = {"dense": {"kernel": _f4(6, 4), "bias": _f4()}}
_DTYPE: Mapping[str, Any] = {"dense": {"kernel": _f4(6, 4), "bias": np.ones(4, np.int64)}}
_RENAMED: Mapping[str, Any] = {"dense_4": {"kernel": _f4(6, 4), "bias": _f4(4)}}

AVERAGE = ["average", "run", "-o", "out.h5"]
BAD: dict[str, tuple[Callable[[Path], object], list[str], int, str]] = {
    "empty folder": (lambda _: None, AVERAGE, 3, r"^run: there is no checkpoint here"),
    "no such folder": (
        lambda _: None,
        ["average", "gone/", "-o", "out.h5"],
        3,
        r"^gone/?: no such file or directory",
    ),
    "no such file": (
        _good,
        ["average", "run/m_1.h5", "run/m_9.h5", "-o", "out.h5"],
        3,
        r"^run/m_9\.h5: no such file",
    ),
    "glob of nothing": (
        _good,
        ["average", "run/x*.h5", "-o", "out.h5"],
        3,
        r"^run/x\*\.h5: no file",
    ),
    "no HDF5": (_garbage, AVERAGE, 3, r"^run/m_1\.h5: is not an HDF5 file .*b'hello'"),
    "empty file": (_empty_file, AVERAGE, 3, r"^run/m_1\.h5: .*empty"),
    "truncated": (_truncated, AVERAGE, 3, r"^run/m_1\.h5: is truncated: it has 1000 bytes"),
    "tensor missing": (_pair(_LESS, _ONE), AVERAGE, 3, r"^run/m_1\.h5: has no tensor 'dense/bias'"),
    "tensor extra": (_pair(_ONE, _LESS), AVERAGE, 3, r"^run/m_1\.h5: has a tensor 'dense/bias'"),
    "other shape": (
        _pair(_SHAPE, _ONE),
        AVERAGE,
        3,
        r"^run/m_1\.h5: tensor 'dense/bias' has shape \(5,\), but run/m_2\.h5 has \(4,\)",
    ),
    "a scalar": (_pair(_SCALAR, _ONE), AVERAGE, 3, r"^run/m_1\.h5: .* shape \(\)"),
    "other dtype": (
        _pair(_DTYPE, _ONE),
        AVERAGE,
        3,
        r"^run/m_1\.h5: tensor 'dense/bias' has dtype int64, but run/m_2\.h5 has float32",
    ),
    "renamed layers": (_pair(_ONE, _RENAMED), AVERAGE, 3, r"^run/m_1\.h5: .*--match order"),
    "nan": (_nan, AVERAGE, 3, r"^run/m_1\.h5: tensor 'dense/kernel' holds nan"),
    "existing output": (_existing, AVERAGE, 3, r"^out\.h5: already exists; use --force"),
    "output is an input": (
        _good,
        ["average", "run", "-o", "run/m_2.h5", "--force"],
        3,
        r"^run/m_2\.h5: is the checkpoint run/m_2\.h5 itself",
    ),
    "output is a link to an input": (
        _linked_output,
        [*AVERAGE, "--force"],
        3,
        r"^out\.h5: is the checkpoint run/m_1\.h5 itself",
    ),
    "output is a folder": (_folder_as_output, [*AVERAGE, "--force"], 3, r"^out\.h5: is a folder"),
    "output of another format": (
        _good,
        ["average", "run", "-o", "out.pt"],
        3,
        r"^out\.pt: .*\.h5 or \.hdf5",
    ),
    "no folder for the output": (
        _good,
        ["average", "run", "-o", "there/out.h5"],
        3,
        r"^there/out\.h5: there is no folder",
    ),
    "the output's folder is a file": (
        _file_as_folder,
        ["average", "run", "-o", "notes/out.h5"],
        3,
        r"^notes/out\.h5: there is no folder",
    ),
    "one file twice": (
        _good,
        ["average", "run/m_1.h5", "run/m_2.h5", "run/m_1.h5", "-o", "out.h5"],
        3,
        r"^run/m_1\.h5 is given twice",
    ),
    "one file by two names": (_twice, AVERAGE, 3, r"run/m_[23]\.h5.*run/m_[23]\.h5"),
    "one epoch twice": (_tied, AVERAGE, 3, r"run/m_0*3\.h5.*m_0*3\.h5"),
    "no epoch": (_no_number, AVERAGE, 3, r"run/final\.h5"),
    "two runs": (_mixed, AVERAGE, 3, r"resnet.*unet|unet.*resnet"),
    "not so many": (_good, [*AVERAGE, "--last", "3"], 3, r"^.*: --last 3, but there are only 2"),
    "a named pipe": (
        _named_pipe,
        ["average", "run/m_1.h5", "pipe.h5", "-o", "out.h5"],
        3,
        r"^pipe\.h5 is a named pipe",
    ),
    "no log": (
        _good,
        [*AVERAGE, "--best", "1", "--log", "training.csv"],
        3,
        r"^training\.csv",
    ),
}


@pytest.mark.parametrize(("write", "arguments", "code", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_that_names_it_and_leaves_nothing(
    write: Callable[[Path], object],
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
) -> None:
    """Exit 3, one line on stderr, nothing on stdout, and the folder as it was."""
    (tmp_path / "run").mkdir()
    write(tmp_path)
    before = tree(tmp_path)
    done = polyak(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    line = one_line(done.stderr)
    assert re.search(message, line), line
    assert tree(tmp_path) == before


@pytest.mark.parametrize("output", ["/proc/out.h5", "/sys/out.h5", "/dev/full/out.h5"])
def test_targets_that_cannot_be_written(run_folder: Path, output: str) -> None:
    """Folders in which no file can be made, even by root, are named in the error."""
    if not Path(output).parent.exists():
        pytest.skip(f"there is no {Path(output).parent} here")
    done = polyak("average", "ckpts", "-o", output, cwd=run_folder)
    assert (done.returncode, done.stdout) == (3, "")
    assert one_line(done.stderr).startswith(f"{output}: ")


def test_a_relative_source_of_strange_spelling_is_only_a_name(run_folder: Path) -> None:
    """After --, what begins with a dash is a file."""
    small(run_folder / "-1.h5")
    succeeded(polyak("average", "-q", "-o", "out.h5", "--", "-1.h5", cwd=run_folder))
    assert same_bits(read_model(run_folder / "out.h5"), read_model(run_folder / "-1.h5"))


# --- plan and report ------------------------------------------------------------------------------


def test_a_dry_run_shows_the_plan_and_writes_nothing(run_folder: Path) -> None:
    """Every checkpoint with epoch and coefficient, the fates of the tensors, bytes and memory."""
    before = tree(run_folder)
    (run_folder / "ckpts/notes.txt").write_text("foreign")
    text = succeeded(
        polyak("average", "ckpts", "--last", 3, "--scheme", "linear", "-n", cwd=run_folder)
    )
    (run_folder / "ckpts/notes.txt").unlink()
    assert tree(run_folder) == before
    rows = re.findall(r"^  model_(\d+)\.h5 +(\d+) +(0\.\d{6})$", text, re.MULTILINE)
    assert rows == [
        ("497", "497", "0.166667"),
        ("498", "498", "0.333333"),
        ("499", "499", "0.500000"),
    ]
    assert "effective number of checkpoints: 2.57" in text
    assert "tensors: 4 averaged, 6 left out\n" in text
    assert "passed over: ckpts/notes.txt (" in text
    assert re.search(r"to read .* [kM]?B, to write .* kB, memory about .* MB", text)
    assert "wrote" not in text


PLAN_KEYS = {
    "polyak": str,
    "output": str,
    "scheme": str,
    "parameters": dict,
    "effective_number": float,
    "sum_of_absolutes": float,
    "checkpoints": list,
    "template": str,
    "tensors": dict,
    "bytes_to_read": int,
    "bytes_to_write": int,
    "memory": int,
    "recalibrate": type(None),
    "files": type(None),
    "passed_over": list,
    "skipped": list,
    "suspicions": list,
    "factors": type(None),
    "notes": list,
}
REPORT_KEYS = PLAN_KEYS | {
    "bytes_read": int,
    "bytes_written": int,
    "seconds": float,
    "speed": float,
    "peak_memory": int,
    "kernel": str,
    "engine": str,
    "workers": int,
    "requests": int,
    "retries": int,
    "shares": dict,
    "runs": dict,
    "recalibrated": type(None),
    "verified": type(None),
    "verified_by": type(None),
}


def test_the_plan_as_json_is_complete(run_folder: Path) -> None:
    """--dry-run --json prints all that the plan knows, and nothing else, on stdout."""
    done = polyak(
        *("average", "ckpts", "--scheme", "exp", "--alpha", "3", "-o", "o.h5", "-n", "--json"),
        cwd=run_folder,
    )
    plan = json.loads(succeeded(done))
    assert {key: type(value) for key, value in plan.items()} == PLAN_KEYS
    assert [c["name"] for c in plan["checkpoints"]] == [f"model_{k}.h5" for k in range(490, 500)]
    assert all(
        set(c) == {"path", "name", "epoch", "metric", "size", "sigma", "coefficient"}
        for c in plan["checkpoints"]
    )
    expected = np.exp(-np.arange(10, 0, -1) / 3)
    found = [c["coefficient"] for c in plan["checkpoints"]]
    np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-12)
    assert plan["parameters"] == {"alpha": 3}
    assert plan["effective_number"] == pytest.approx(1 / np.square(found).sum())
    assert plan["template"] == "ckpts/model_499.h5"
    assert plan["tensors"]["averaged"]["names"] == [
        "dense/sequential/dense/kernel",
        "dense/sequential/dense/bias",
        "dense_1/sequential/dense_1/kernel",
        "dense_1/sequential/dense_1/bias",
    ]
    assert plan["tensors"]["dropped"]["count"] == 6
    assert plan["bytes_to_read"] == 10 * 4 * (2 * 25 + 25 + 25 * 3 + 3)
    assert not (run_folder / "o.h5").exists()


def test_the_report_as_json_is_complete(run_folder: Path) -> None:
    """--json prints the plan with what was done; notes still go to stderr."""
    for name in ("1.h5", "2.h5"):
        values = {"bn": {"moving_mean": _f4(3), "gamma": _f4(3)}}
        write_model(run_folder / name, values)
    done = polyak("average", "1.h5", "2.h5", "-o", "o.h5", "--json", cwd=run_folder)
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert {key: type(value) for key, value in report.items()} == REPORT_KEYS
    assert report["bytes_read"] == report["bytes_to_read"] == 2 * 2 * 3 * 4
    assert report["bytes_written"] == (run_folder / "o.h5").stat().st_size
    assert report["output"] == "o.h5"
    assert 1e6 < report["peak_memory"] < 1e9
    assert report["kernel"] in ("compiled", "numpy")
    assert set(report["shares"]) == {"reading", "folding", "writing"}
    assert len(report["notes"]) == 1
    assert done.stderr == f"note: {report['notes'][0]}\n"


def test_the_report_for_people_is_three_lines(run_folder: Path) -> None:
    """Which checkpoints by which rule, what it cost, and the output; no word of the code's own."""
    text = succeeded(polyak("average", "ckpts", "--scheme", "power", "-o", "o.h5", cwd=run_folder))
    averaged, read, wrote = text.splitlines()
    assert averaged == "averaged 10 checkpoints, model_490.h5 to model_499.h5 (power, sigma 0.1)"
    assert re.fullmatch(r"read 6\.12 kB in \d+\.\d+ s(?: \(.*\))?, peak memory .* MB", read)
    assert wrote.startswith("wrote o.h5 (")
    assert not re.search("extent|fate|carried|dropped", text)


def test_the_verbose_report_shows_the_plan_time_speed_and_memory(run_folder: Path) -> None:
    """The same lines as the plan's, then what it cost and what was written."""
    options = ("ckpts", "--scheme", "power", "-o", "o.h5", "-v")
    planned = succeeded(polyak("average", *options, "-n", cwd=run_folder)).splitlines()
    text = succeeded(polyak("average", *options, cwd=run_folder)).splitlines()
    assert text[: len(planned) - 1] == planned[:-1]
    assert "tensors: 4 averaged, 0 copied from model_499.h5, 6 left out" in text
    assert re.fullmatch(
        r"read 6\.12 kB in \d+\.\d+ s \(.*B/s; .* kernel\), peak memory .* MB", text[-2]
    )
    assert text[-1].startswith("wrote o.h5 (")


def test_the_average_of_one_checkpoint_is_called_a_copy(run_folder: Path) -> None:
    """The report and the plan say so, and those of two checkpoints do not."""
    for number, says in ((1, True), (2, False)):
        options = ("average", "ckpts", "--last", number, "-o", f"{number}.h5")
        for more in ("-n",), ():
            text = succeeded(polyak(*options, *more, cwd=run_folder))
            assert ("an average of one checkpoint is a copy of it" in text) == says


def test_an_average_in_the_folder_is_recognised_among_the_files_of_a_shell_glob(
    run_folder: Path,
) -> None:
    """The advice is to leave it out; `average` and `check` both say so, and with it both work."""
    succeeded(polyak("average", "ckpts", "-o", "ckpts/avg.h5", "-q", cwd=run_folder))
    files = sorted(path.relative_to(run_folder) for path in (run_folder / "ckpts").glob("*.h5"))
    output, without = ("-o", "o.h5"), ("--exclude", "avg.h5")
    text = "ckpts/avg.h5 is an average that polyak wrote, beside checkpoints that are none: leave"
    refused = polyak("average", *files, *output, cwd=run_folder)
    assert refused.returncode == 3
    assert f"error: {text} it out with --exclude 'avg.h5'" in refused.stderr
    checked = polyak("check", *files, cwd=run_folder)
    assert checked.returncode == 1
    assert f"other run: {text}" in checked.stdout
    succeeded(polyak("average", *files, *output, *without, cwd=run_folder))
    succeeded(polyak("average", "ckpts", "-o", "folder.h5", cwd=run_folder))
    assert (run_folder / "o.h5").read_bytes() == (run_folder / "folder.h5").read_bytes()
    assert "healthy" in succeeded(polyak("check", *files, *without, cwd=run_folder))


def test_files_that_nobody_takes_for_checkpoints_are_no_news(run_folder: Path) -> None:
    """A text file beside the run is listed under -v; an earlier average is always."""
    (run_folder / "ckpts/notes.txt").write_text("foreign")
    succeeded(polyak("average", "ckpts", "-o", "ckpts/model_500.h5", "-q", cwd=run_folder))
    options = ("average", "ckpts", "-o", "o.h5", "--force")
    short = succeeded(polyak(*options, cwd=run_folder))
    assert "notes.txt" not in short
    assert "passed over: ckpts/model_500.h5 (written by polyak)" in short
    assert "passed over: ckpts/notes.txt (not named" in succeeded(
        polyak(*options, "-v", cwd=run_folder)
    )


@pytest.mark.parametrize(
    ("command", "more"),
    [(("average", "-n"), ["passed over: 996 more; see them with -v"]), (("check",), [])],
    ids=["average", "check"],
)
def test_of_many_files_that_were_passed_over_the_odd_ones_are_shown(
    run_folder: Path, command: tuple[str, ...], more: list[str]
) -> None:
    """An unfinished file comes before a thousand others, which a plan counts and -v lists."""
    for number in range(1000):
        (run_folder / f"ckpts/log_{number}.txt").touch()
    (run_folder / "ckpts/model_500.h5.tmp").touch()
    done = polyak(*command, "ckpts", cwd=run_folder)
    lines = [line for line in done.stdout.splitlines() if line.startswith("passed over: ")]
    assert lines[0] == "passed over: ckpts/model_500.h5.tmp (unfinished, by its name)"
    assert [line for line in lines[1:] if "(not named like" not in line] == more
    assert len(lines) == (6 if more else 1)
    long = polyak(*command, "ckpts", "-v", cwd=run_folder).stdout
    assert long.count("passed over: ") == 1001
    asked = polyak(*command, "ckpts", "--json", cwd=run_folder)
    assert len(json.loads(asked.stdout)["passed_over"]) == 1001


@pytest.mark.parametrize(
    "arguments",
    [
        ("watch", "ckpts", "-o", "s3://b/o.h5"),
        ("recalibrate", "ckpts/m.h5", "--data", "blobs", "-o", "s3://b/m.h5"),
    ],
    ids=" ".join,
)
def test_a_url_in_place_of_a_local_file_is_refused_before_anything_is_done(
    run_folder: Path, arguments: tuple[str, ...]
) -> None:
    """Where only a path will do, a URL costs one line, exit 2, and no file; it is quoted."""
    done = polyak(*arguments, cwd=run_folder)
    assert (done.returncode, done.stdout) == (2, "")
    line = one_line(done.stderr)
    assert line.startswith("s3://b/")
    assert f"'{arguments[-2]}'" in line or f"'{arguments[-2]}' /" in line
    assert "must be a local file" in line
    assert os.listdir(run_folder) == ["ckpts"]


@pytest.mark.skipif(find_spec("obstore") is not None, reason="the extra is installed")
@pytest.mark.parametrize(
    "arguments",
    [("average", "s3://b/run", "-o", "o.h5"), ("inspect", "az://b/m.h5"), ("check", "gs://b/r/")],
    ids=" ".join,
)
def test_a_url_without_the_extra_names_the_extra(
    run_folder: Path, arguments: tuple[str, ...]
) -> None:
    """What is missing and how it is installed is one line."""
    done = polyak(*arguments, cwd=run_folder)
    assert (done.returncode, done.stdout) == (3, "")
    assert "needs packages that are missing: pip install 'polyak[remote]'" in one_line(done.stderr)
    assert os.listdir(run_folder) == ["ckpts"]


def test_quiet_prints_only_errors(run_folder: Path) -> None:
    """-q is silent when all is well, notes included, and still tells what went wrong."""
    for name in ("1.h5", "2.h5"):
        write_model(run_folder / name, {"bn": {"moving_mean": _f4(3)}})
    command = ("average", "1.h5", "2.h5", "-o", "o.h5")
    assert "BatchNorm" in polyak(*command, "-n", cwd=run_folder).stderr  # there is a note
    quiet = polyak(*command, "-q", cwd=run_folder)
    assert (succeeded(quiet), quiet.stderr) == ("", "")
    assert (run_folder / "o.h5").exists()
    done = polyak(*command, "-q", cwd=run_folder)
    assert (done.returncode, done.stdout) == (3, "")
    assert "already exists" in one_line(done.stderr)


def test_quiet_json_still_prints_the_data(run_folder: Path) -> None:
    """Who asks for data gets them; -q silences the notes."""
    for name in ("1.h5", "2.h5"):
        write_model(run_folder / name, {"bn": {"moving_mean": _f4(3)}})
    command = ("average", "1.h5", "2.h5", "-n", "--json")
    assert "BatchNorm" in polyak(*command, cwd=run_folder).stderr  # there is a note to silence
    done = polyak(*command, "-q", cwd=run_folder)
    assert len(json.loads(succeeded(done))["notes"]) == 1
    assert done.stderr == ""


def test_verbose_names_every_tensor(run_folder: Path) -> None:
    """-v tells each tensor's fate, type, shape and storage."""
    text = succeeded(polyak("average", "ckpts", "-n", "-v", cwd=run_folder))
    assert "  averaged dense/sequential/dense/kernel float32 2x25 (plain bytes)\n" in text
    assert "  left out /optimizer_weights/sgd/iteration int64 scalar (plain bytes)\n" in text
    assert len(re.findall(r"^  (averaged|copied|left out) ", text, re.MULTILINE)) == 10
    assert re.search(r"^stored as plain bytes: \d+ tensors$", text, re.MULTILINE)


@pytest.mark.parametrize("arguments", [["-n", "-v"], ["-n", "--json"], ["-o", "o.h5", "-v"]])
def test_nothing_but_plain_text_reaches_a_pipe(run_folder: Path, arguments: list[str]) -> None:
    """No colour, no progress, no carriage return when nobody watches, whatever TERM says."""
    done = polyak(
        "average", "ckpts", *arguments, cwd=run_folder, environ={"TERM": "xterm-256color"}
    )
    assert re.fullmatch(r"[\n -~]*", succeeded(done))


# --- choosing, as the shell passes it -------------------------------------------------------------


def found_names(done: Done) -> list[str]:
    """Return the names of the checkpoints in a plan."""
    return [checkpoint["name"] for checkpoint in json.loads(succeeded(done))["checkpoints"]]


def test_a_quoted_glob_is_expanded_and_ordered_by_epoch(run_folder: Path) -> None:
    """The program expands what the shell did not."""
    done = polyak("average", "ckpts/model_49[3-5].h5", "-n", "--json", cwd=run_folder)
    assert found_names(done) == ["model_493.h5", "model_494.h5", "model_495.h5"]


def test_files_one_by_one_keep_their_order(run_folder: Path) -> None:
    """Coefficients go by the order given if the user says so; otherwise it must be said."""
    names = ["model_499.h5", "model_490.h5", "model_495.h5"]
    paths = [run_folder / "ckpts" / name for name in names]
    arguments = ("average", *paths, "--coefficients", "3,0,1", "-o", "o.h5")
    done = polyak(*arguments, cwd=run_folder)
    assert done.returncode == 2
    assert "use --order epoch, or --order given" in one_line(done.stderr)
    succeeded(polyak(*arguments, "--order", "given", cwd=run_folder))
    expected = naive_average([paths[0], paths[2]], [0.75, 0.25])
    found = {k: v for k, v in read_model(run_folder / "o.h5").items() if "model_weights" in k}
    assert same_bits(found, expected)


def test_epochs_are_ordered_as_numbers(tmp_path: Path) -> None:
    """Epoch 9 comes before epoch 10, in the plan and in the coefficients."""
    for epoch in (8, 9, 10, 11):
        small(tmp_path / f"model_{epoch}.h5", epoch)
    done = polyak("average", ".", "--every", 2, "-n", "--json", cwd=tmp_path)
    assert found_names(done) == ["model_9.h5", "model_11.h5"]


def test_earlier_averages_and_leftovers_are_passed_over(run_folder: Path) -> None:
    """An average in the folder of the run is not taken for a checkpoint, and the plan says so."""
    succeeded(polyak("average", "ckpts", "-o", "ckpts/model_500.h5", "-q", cwd=run_folder))
    (run_folder / "ckpts/.polyak-1-abc.partial").write_bytes(b"left by a killed run")
    plan = json.loads(succeeded(polyak("average", "ckpts", "-n", "--json", cwd=run_folder)))
    assert plan["template"] == "ckpts/model_499.h5"
    passed = {Path(p["path"]).name: p["reason"] for p in plan["passed_over"]}
    assert "polyak" in passed["model_500.h5"]
    assert ".polyak-1-abc.partial" in passed


def test_hash_records_each_input_s_sha256(run_folder: Path) -> None:
    """--hash writes into the output what sha256sum says of every input."""
    succeeded(polyak("average", "ckpts", "--hash", "-q", "-o", "o.h5", cwd=run_folder))
    with h5py.File(run_folder / "o.h5") as file:
        (record,) = [
            json.loads(value)
            for value in file.attrs.values()
            if isinstance(value, str) and value.startswith('{"polyak"')
        ]
    for entry in record["inputs"]:
        content = (run_folder / "ckpts" / entry["name"]).read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("64MB", 64_000_000),
        ("64 mb", 64_000_000),
        ("1GiB", 1 << 30),
        ("1.5MiB", 3 << 19),
        ("2g", 2_000_000_000),
        ("2000k", 2_000_000),
        ("1048576", 1 << 20),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, nbytes: int) -> None:
    """Decimal and binary units, a space, any case, or plain bytes."""
    context = cli.commands["average"].make_context("average", ["x", "--max-memory", text])
    assert context.params["max_memory"] == nbytes


def test_max_memory_bounds_the_plan(run_folder: Path) -> None:
    """A smaller bound plans for less memory and gives the same bytes."""
    memory = []
    for k, bound in enumerate(["1MiB", "64MB"]):
        options = ("--max-memory", bound, "--jobs", "4", "--json", "-o", f"{k}.h5")
        done = polyak("average", "ckpts", *options, cwd=run_folder)
        memory.append(json.loads(succeeded(done))["memory"])
    assert memory[0] + 1e6 < memory[1]
    assert (run_folder / "0.h5").read_bytes() == (run_folder / "1.h5").read_bytes()


# --- strange names --------------------------------------------------------------------------------

STRANGE = "m\x1b[31m\n\u202e_2.h5"


@pytest.mark.slow
def test_control_characters_of_names_never_reach_the_terminal(tmp_path: Path) -> None:
    """File and tensor names are escaped in plan, report, notes and JSON."""
    (tmp_path / "run").mkdir()
    layer = "bn\x1b]0;title\x07\n"
    for name in ("m\x1b[31m\n\u202e_1.h5", STRANGE):
        write_model(tmp_path / "run" / name, {layer: {"moving_mean": _f4(3)}})
    (tmp_path / "run" / "foreign\r.txt").write_text("")
    for arguments in (["-n", "-v"], ["-n", "--json"], ["-o", "o\t.h5", "-v"]):
        done = polyak("average", "run", *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert not re.search("[^\n -~]", done.stdout + done.stderr)
        assert len(done.stderr.splitlines()) == 1
    assert "\\x1b[31m\\n\\u202e_2.h5" in polyak("average", "run", "-n", cwd=tmp_path).stdout


def test_control_characters_of_names_are_escaped_in_errors(tmp_path: Path) -> None:
    """One line stays one line, whatever a file is called."""
    (tmp_path / STRANGE).write_bytes(b"hello")
    for arguments in ([STRANGE, "-o", "o.h5"], ["gone\n\x1b.h5", "-o", "o.h5"]):
        done = polyak("average", *arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (3, "")
        assert re.fullmatch("[ -~]*", one_line(done.stderr))


@pytest.mark.parametrize(
    "arguments",
    [
        ["average\x1b[31m\n"],
        ["average", "x", "--\x1b[31m\n"],
        ["average", "x", "--jobs", "\x1b[31m\n"],
        ["average", "x", "-o", "o.h5", "--max-memory", "\x1b[31m\n"],
        ["average", "x", "-o", "o.h5", "--coefficients", "\x1b[31m\n"],
        ["average", "x", "-o", "o.h5", "--epoch-pattern", "\x1b[31m\n("],
    ],
)
def test_control_characters_of_arguments_are_escaped(arguments: list[str], tmp_path: Path) -> None:
    """A usage error repeats what was typed, harmlessly."""
    done = polyak(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("[ -~]*", one_line(done.stderr))


def test_names_that_are_not_utf8_work(tmp_path: Path) -> None:
    """A file name is bytes; JSON and messages escape what is no text."""
    source = small(tmp_path / "good_1.h5")
    name = os.fsdecode(b"caf\xe9_1.h5")
    source.rename(tmp_path / name)
    done = polyak("average", name, "-o", "o.h5", "--json", cwd=tmp_path)
    assert json.loads(succeeded(done))["checkpoints"][0]["name"] == name
    assert "caf\\udce9_1.h5" in succeeded(polyak("average", name, "-n", cwd=tmp_path))


# --- the terminal ---------------------------------------------------------------------------------


def on_terminal(
    command: list[str], cwd: Path, *, columns: int = 0, **environ: str
) -> tuple[int, str]:
    """Run a command on a pseudo-terminal and return its exit code and all that it showed."""
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        command, cwd=cwd, env=environment(**environ), stdin=other, stdout=other, stderr=other
    )
    os.close(other)
    shown = b""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        ready, _, _ = select.select([main], [], [], 0.2)
        try:
            data = os.read(main, 65536) if ready else b""
        except OSError:  # how Linux says that the other side is closed
            break
        if not data and process.poll() is not None:
            break
        shown += data
    os.close(main)
    return process.wait(60), shown.decode()


#: Draws the bar after every batch, so that the test does not depend on the machine's speed.
EAGER = """
import itertools, polyak_cli.cli.progress
seconds = itertools.count()
polyak_cli.cli.progress.read_clock = lambda: float(next(seconds))
"""


def test_a_terminal_shows_a_progress_bar(run_folder: Path) -> None:
    """Bytes, speed and time left, drawn in place and taken away at the end."""
    rng = np.random.default_rng(0)
    for k in range(3):
        values = rng.normal(3, size=2 * 10**6).astype("f4")
        write_model(run_folder / f"{k}.h5", {"d": {"k": values}})
    options = ("average", "0.h5", "1.h5", "2.h5", "-o", "o.h5", "--jobs", "1")
    code, text = on_terminal([*script(EAGER, *options)], run_folder)
    assert code == 0, text
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert re.search(r"averaging .* MB of 24 MB, [\d.]+ .?B/s, \d+ s left", plain)
    assert "\x1b[?25l" in text  # the cursor is hidden and shown again
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert text.rindex("\x1b[2K") > text.rindex("averaging")  # the bar is erased
    assert plain.rstrip().splitlines()[-1].startswith("wrote o.h5")


def test_no_color_is_respected(run_folder: Path) -> None:
    """With NO_COLOR the bar is drawn without colour."""
    colours = r"\x1b\[(3|4|9|10)[0-9][0-9;]*m|\x1b\[[0-9;]*38;"
    options = ("average", "ckpts", "-o")
    code, text = on_terminal([*script(EAGER, *options, "a.h5")], run_folder, TERM="xterm-256color")
    assert code == 0
    assert re.search(colours, text)
    code, text = on_terminal(
        [*script(EAGER, *options, "b.h5")], run_folder, TERM="xterm-256color", NO_COLOR="1"
    )
    assert code == 0
    assert not re.search(colours, text)


@pytest.mark.parametrize("option", ["-q", "--json"])
def test_no_bar_for_who_wants_silence_or_data(run_folder: Path, option: str) -> None:
    """-q and --json draw nothing even on a terminal."""
    code, text = on_terminal([*script(EAGER, "average", "ckpts", "-o", "o.h5", option)], run_folder)
    assert code == 0
    assert "\x1b" not in text
    assert (text == "") == (option == "-q")


def test_a_terminal_s_ctrl_c_restores_the_cursor(run_folder: Path) -> None:
    """An interrupted bar leaves the terminal as it was, and one line."""
    code, text = on_terminal(
        [
            *script(
                f"{EAGER}\nimport os, signal, polyak_cli.engine.executors as e\n"
                "def fold(*_, **__): os.kill(os.getpid(), signal.SIGINT)\ne.fold = fold",
                *("average", "ckpts", "-o", "o.h5"),
            )
        ],
        run_folder,
    )
    assert code == 130
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert (
        re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
        .strip()
        .endswith("error: interrupted; no unfinished file is left")
    )
    assert os.listdir(run_folder) == ["ckpts"]


# --- streams that are closed, full or abandoned ---------------------------------------------------


def test_an_abandoned_pipe_ends_it_as_it_ends_any_filter(run_folder: Path) -> None:
    """`| head -c 1`: no traceback, the status of a filter, and the output is whole."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*POLYAK, "average", "ckpts", "-o", "o.h5", "--json"],
        cwd=run_folder,
        env=environment(),
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")
    assert len(read_model(run_folder / "o.h5")) == 4
    assert sorted(os.listdir(run_folder)) == ["ckpts", "o.h5"]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["completion", "bash"], ["average", "-n", "ckpts"]]
)
def test_an_abandoned_pipe_gives_no_traceback(run_folder: Path, arguments: list[str]) -> None:
    """Nor does it in what only prints."""
    line = shlex.join([*POLYAK, *arguments])
    done = subprocess.run(
        ["bash", "-c", f"{line} | true"],
        cwd=run_folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_no_harm(run_folder: Path, closed: str) -> None:
    """As from a daemon: the output is the same, whichever descriptors are missing."""
    succeeded(polyak("average", "ckpts", "-q", "-o", "o.h5", cwd=run_folder))
    line = shlex.join([*POLYAK, "average", "ckpts", "-o", "p.h5", "-v"])
    done = subprocess.run(
        ["bash", "-c", f"{line} {closed}"],
        cwd=run_folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (run_folder / "p.h5").read_bytes() == (run_folder / "o.h5").read_bytes()
    assert sorted(os.listdir(run_folder)) == ["ckpts", "o.h5", "p.h5"]


def test_a_full_device_behind_stdout_is_reported(run_folder: Path) -> None:
    """A result that cannot be shown is an error of one line."""
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*POLYAK, "average", "ckpts", "-n"],
            cwd=run_folder,
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 3
    assert "the result cannot be shown: No space left on device" in one_line(done.stderr)


# --- completion -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_for_polyak(shell: str, tmp_path: Path) -> None:
    """Each shell's script asks the program itself what fits."""
    text = succeeded(polyak("completion", shell, cwd=tmp_path))
    assert f"_POLYAK_COMPLETE={shell}_complete" in text
    for program in (shutil.which(shell),):
        if program:
            checked = subprocess.run([program, "-n"], input=text, text=True, check=False)
            assert checked.returncode == 0


def complete_in_bash(folder: Path, *words: str) -> list[str]:
    """Return what a real bash, having sourced the script, offers for the last word."""
    program = folder / "bin/polyak"
    if not program.exists():
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec {shlex.join(POLYAK)} "$@"\n')
        program.chmod(0o755)
    lines = (
        'eval "$(polyak completion bash)"',
        "complete -p polyak | grep -q -- '-F _polyak_completion polyak' || exit 9",
        f"COMP_WORDS=({shlex.join(words)}) COMP_CWORD={len(words) - 1}",
        "_polyak_completion polyak",
        'printf "%s\\n" "${COMPREPLY[@]}"',
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", "\n".join(lines)],
        cwd=folder,
        env=environment(PATH=f"{program.parent}:{os.environ['PATH']}"),
        capture_output=True,
        text=True,
        check=False,
    )
    return succeeded(done).split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["polyak", ""], COMMANDS),
        (["polyak", "av"], ["average"]),
        (["polyak", "average", "--schem"], ["--scheme"]),
        (["polyak", "average", "--scheme", "e"], ["equal", "exp", "ema"]),
        (["polyak", "average", "ckpts", "--optimizer", "n"], ["newest"]),
        (["polyak", "completion", ""], ["bash", "zsh", "fish"]),
    ],
)
def test_bash_completes_commands_options_and_choices(
    tmp_path: Path, words: list[str], offered: list[str]
) -> None:
    """The script works in a real bash."""
    assert complete_in_bash(tmp_path, *words) == offered


@pytest.mark.parametrize(
    "words", ["polyak average ck", "polyak average -o fi", "polyak evaluate mo"]
)
def test_sources_and_outputs_complete_as_files(words: str, tmp_path: Path) -> None:
    """Where a file belongs the shell is asked to offer files."""
    environ = {"_POLYAK_COMPLETE": "bash_complete", "COMP_WORDS": words}
    done = polyak(cwd=tmp_path, environ=environ | {"COMP_CWORD": str(len(words.split()) - 1)})
    assert done.stdout.startswith("file,")


# --- gates and numbers that are none --------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "accuracy", "least", "failed"),
    [
        (0.5, 0.8, 0.8, []),
        (None, 0.8, 0.8, []),
        (0.5, 0.807, 0.80701, ["m.h5: accuracy is 0.807, less than 0.80701"]),
        (0.5, 0.8069999, 0.807, ["m.h5: accuracy is 0.8069999, less than 0.807"]),
        (0.5, math.nan, 0.1, ["m.h5: accuracy is nan, not a finite number"]),
        (0.5, math.inf, 0.1, ["m.h5: accuracy is inf, not a finite number"]),
        (math.nan, 0.9, 0.1, ["m.h5: accuracy is 0.9, but the loss is nan, not a finite number"]),
        (math.inf, 0.9, 0.1, ["m.h5: accuracy is 0.9, but the loss is inf, not a finite number"]),
    ],
)
def test_a_gate_lets_pass_what_is_enough_and_finite(
    loss: float | None, accuracy: float, least: float, failed: list[str]
) -> None:
    """A loss that is no number passes no gate, and two numbers that differ are shown differing."""
    score = Score(Path("m.h5"), loss, {"accuracy": accuracy}, 10)
    assert list(find_failed(score, [("accuracy", least)])) == failed


def test_a_gate_on_the_loss_is_of_the_loss() -> None:
    """A loss that is not finite is reported once; an unknown metric is a usage error."""
    score = Score(Path("m.h5"), math.nan, {}, 10)
    assert list(find_failed(score, [("loss", 0.1)])) == ["m.h5: loss is nan, not a finite number"]
    with pytest.raises(UsageError, match="has no such metric; it has loss"):
        list(find_failed(score, [("accuracy", 0.1)]))


def test_json_has_null_where_a_number_is_none() -> None:
    """At any depth; what is finite, text or a truth value stays as it is, after the version."""
    numbers = {"a": [math.nan, 1.5, (math.inf, 2)], "b": {"c": -math.inf, "d": True}, "e": "nan"}
    assert json.loads(format_json(numbers)) == {
        "a": [None, 1.5, [None, 2]],
        "b": {"c": None, "d": True},
        "e": "nan",
        "polyak": __version__,
    }


# --- missing packages, and bugs -------------------------------------------------------------------

HIDE = """
from importlib.machinery import PathFinder
original = PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {hidden!r} else original(name, path, target)
PathFinder.find_spec = find_spec
"""
TENSORFLOW = {"tensorflow", "keras", "tf_keras", "sklearn", "scipy"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "model_499.h5", "--data", "blobs"],
        ["evaluate", ".", "--data", "blobs"],
        ["train", "-o", "run"],
    ],
)
def test_a_missing_extra_is_named_with_what_brings_it(arguments: list[str], tmp_path: Path) -> None:
    """Without TensorFlow: exit 3, and the pip install that helps."""
    shutil.copy(SAMPLES / "model_499.h5", tmp_path)
    before = tree(tmp_path)
    done = scripted(HIDE.format(hidden=TENSORFLOW), *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert one_line(done.stderr).endswith(
        "pip install 'polyak[tensorflow]', or in a clone pip install '.[tensorflow]'"
    )
    assert tree(tmp_path) == before


def test_a_sweep_names_all_missing_extras_at_once(tmp_path: Path) -> None:
    """Who installs one must not learn of the next only then."""
    hidden = HIDE.format(hidden={"matplotlib"} | TENSORFLOW)
    done = scripted(hidden, "sweep", SAMPLES, "--data", "blobs", "-o", "report", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert "pip install 'polyak[tensorflow,plot]'" in one_line(done.stderr)
    assert tree(tmp_path) == {}
    # What Keras does not open, it need not run; nor does a function of the tensors need PyTorch.
    np.savez(tmp_path / "m_1.npz", w=np.ones(2))
    (tmp_path / "net.py").write_text("def load(tensors):\n    return None\n")
    for more in ((), ("--model", "net.py:load")):
        hidden = HIDE.format(hidden={"matplotlib", "torch"} | TENSORFLOW)
        options = ("--data", "blobs", "-o", "report", *more)
        done = scripted(hidden, "sweep", "m_1.npz", *options, cwd=tmp_path)
        assert "pip install 'polyak[plot]'" in one_line(done.stderr)


def test_a_model_of_ones_own_needs_the_framework_that_it_imports(tmp_path: Path) -> None:
    """Without PyTorch the extra that brings it is named, and with --model not Keras's."""
    hidden = HIDE.format(hidden={"matplotlib", "torch"} | TENSORFLOW)
    (tmp_path / "net.py").write_text("import torch\n\ndef make():\n    return None\n")
    np.savez(tmp_path / "m_1.npz", w=np.ones(2))
    source = ("m_1.npz", "--model", "net.py:make", "--data", "blobs")
    before = tree(tmp_path)
    done = scripted(hidden, "sweep", *source, "-o", "report", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert "pip install 'polyak[torch,plot]'" in one_line(done.stderr)
    done = scripted(hidden, "evaluate", *source, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert "line 1: ModuleNotFoundError" in one_line(done.stderr)
    assert one_line(done.stderr).endswith("; pip install 'polyak[torch]'")
    assert {k: v for k, v in tree(tmp_path).items() if "__pycache__" not in k} == before


def test_a_missing_plot_extra_is_named_before_training(tmp_path: Path) -> None:
    """Without matplotlib --plot is refused before time is spent, and with TensorFlow at once."""
    hidden = HIDE.format(hidden={"matplotlib"} | TENSORFLOW)
    done = scripted(hidden, "train", "-o", "run", "--plot", "curves.png", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert "pip install 'polyak[tensorflow,plot]'" in one_line(done.stderr)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("command", [("evaluate",), ("recalibrate", "-o", "o.h5")])
def test_a_missing_framework_is_named_before_rows_are_loaded(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    """Code that makes the rows may take long."""
    shutil.copy(SAMPLES / "model_499.h5", tmp_path / "m.h5")
    (tmp_path / "rows.py").write_text("open('loaded', 'w').close()\n")
    hidden = HIDE.format(hidden=TENSORFLOW)
    options = ("m.h5", "--data", "rows.py:load")
    done = scripted(hidden, *command, *options, cwd=tmp_path)
    assert done.returncode == 3
    assert "pip install 'polyak[tensorflow]'" in one_line(done.stderr)
    assert not (tmp_path / "loaded").exists()


def test_a_folder_of_weights_is_refused_with_what_runs_them(tmp_path: Path) -> None:
    """`evaluate` without --model names the option, not only the files of Keras."""
    np.savez(tmp_path / "m_1.npz", w=np.ones(2))
    done = polyak("evaluate", ".", "--data", "blobs", cwd=tmp_path)
    assert done.returncode == 3
    line = one_line(done.stderr)
    assert "m_1.npz holds tensors without a model" in line
    assert line.endswith("--model MODULE.py:FUNCTION")


def test_averaging_needs_no_extra(run_folder: Path) -> None:
    """With every optional package out of reach the main job is done all the same."""
    hidden = HIDE.format(hidden=TENSORFLOW | {"matplotlib"})
    succeeded(scripted(hidden, "average", "ckpts", "-o", "o.h5", cwd=run_folder))


@pytest.mark.parametrize(
    "where",
    ["pipeline.plan", "engine.executors.fold", "formats.hdf5.skeleton.write_skeleton"],
)
def test_a_bug_keeps_its_traceback_and_leaves_nothing(run_folder: Path, where: str) -> None:
    """What nobody foresaw is loud, and still cleans up."""
    module, _, name = where.rpartition(".")
    code = (
        f"import polyak_cli.{module} as m\n"
        f"def bug(*_, **__): raise ZeroDivisionError('a bug')\nm.{name} = bug"
    )
    done = scripted(code, "average", "ckpts", "-o", "o.h5", cwd=run_folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError: a bug" in done.stderr
    assert os.listdir(run_folder) == ["ckpts"]


@pytest.mark.skipif(sys.flags.dev_mode, reason="dev mode prints warnings of its own")
def test_a_run_warns_of_nothing(run_folder: Path) -> None:
    """Under -W error the run is as quiet: no file is left to the garbage collector."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "polyak_cli", "average", "ckpts", "-o", "o.h5"],
        cwd=run_folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "wrote o.h5" in succeeded(done)


def test_defaults_are_those_of_the_options_of_averaging() -> None:
    """The command line repeats defaults for its help, without importing numpy; they agree."""
    parts = [getattr(Settings(), part.name) for part in dataclasses.fields(Settings)]
    defaults = {
        field.name: getattr(part, field.name)
        for part in parts
        for field in dataclasses.fields(part)
    }
    given = cli.commands["average"].make_context("average", ["x", "-o", "y"]).params
    repeated = {name: given[name] for name in defaults if given[name] is not None}
    assert {"every", "match", "optimizer", "use_ema", "force"} <= repeated.keys()
    assert repeated == {name: defaults[name] for name in repeated}
