"""What `make demo` shows, and the picture that is made of it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from polyak_cli.evaluation import data
from tests.command import ROOT
from tests.examples import demo

RESULTS = Path(demo.__file__).parent / "results"


def test_the_demo_shows_both_cases_and_three_commands_that_work(tmp_path: Path) -> None:
    """The sample run is within noise, wrong labels make averaging pay, and commands are named."""
    pytest.importorskip("matplotlib")
    (tmp_path / "sample_checkpoints").symlink_to(ROOT / "sample_checkpoints")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.examples.demo", "--seeds", "1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "newest checkpoint  0.806" in done.stdout
    assert "+0.001  (95 % interval -0.007 to +0.009): within noise" in done.stdout
    assert "better in 1 of 1 runs" in done.stdout
    assert (tmp_path / ".demo/figure.png").read_bytes().startswith(b"\x89PNG")
    commands = done.stdout.partition("Next, try:\n")[2].splitlines()
    assert len(commands) == 3
    for command in commands:
        words = [sys.executable, "-m", "polyak_cli", *shlex.split(command)[1:]]
        again = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert (again.returncode, again.stderr) == (0, ""), command
    assert max(map(len, done.stdout.partition("\nNext, try:")[0].splitlines())) <= 80


def test_the_demo_needs_neither_keras_nor_scikit_learn() -> None:
    """Its environment has what averaging and plots need, and nothing that is larger."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys, tests.examples.demo; print(*sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"keras", "tensorflow", "sklearn", "scipy", "torch", "jax"}


def test_the_digits_are_those_of_scikit_learn() -> None:
    """Images and classes are the same, in the same order."""
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, classes = datasets.load_digits(return_X_y=True)
    with np.load(Path(demo.__file__).parent / "digits.npz") as file:
        assert np.array_equal(file["x"], pixels)
        assert np.array_equal(file["y"], classes)


def test_numpy_scores_as_keras_did_while_training() -> None:
    """The accuracy of every sample checkpoint is the one that Keras logged."""
    rows = data.load("blobs").split("test")
    lines = (demo.SAMPLES / "training.csv").read_text().splitlines()
    column = lines[0].split(",").index("val_accuracy")
    logged = {int(float(line.split(",")[0])): line.split(",")[column] for line in lines[1:]}
    for path in sorted(demo.SAMPLES.glob("model_*.h5")):
        right = demo.find_right(
            demo.read_keras(path), np.asarray(rows.features), np.asarray(rows.labels)
        )
        assert right.mean() == pytest.approx(float(logged[int(path.stem[-3:])]), abs=1e-6)


def test_the_kept_numbers_are_those_of_the_demo(tmp_path: Path) -> None:
    """The first run beside the picture is reproduced, and its text is made of the numbers."""
    kept = json.loads((RESULTS / "averaging.json").read_text())
    assert kept["alt"] == demo.describe(kept["sample"], kept["runs"])
    assert len(kept["runs"]) == demo.SEEDS
    newest, averaged = (
        np.mean([run[key] for run in kept["runs"]]) for key in ("newest", "average")
    )
    rows = kept["runs"][0]["rows"]
    page = (ROOT / "polyak_cli/guide/when.md").read_text()
    assert f"is {averaged:.3f} against {newest:.3f}, on {rows} images" in page
    assert all(run["verdict"] == "better" for run in kept["runs"])
    demo.train_with_wrong_labels(tmp_path / "seed_0", 0)
    for path in sorted((tmp_path / "seed_0").glob("*.npz"))[: -demo.LAST]:
        path.unlink()  # the averages of earlier epochs are not in question
    found, _ = demo.score_run(tmp_path / "seed_0")
    assert found["average"] == pytest.approx(kept["runs"][0]["average"], abs=0.02)
    assert found["verdict"] == "better"


def test_an_old_python_is_named_at_once(tmp_path: Path) -> None:
    """Nothing is installed, and one line says which Python is needed."""
    old = 'test "$1" = --version && echo "Python 3.9.2"\nexit 1'
    assert fail_to_make_demo(tmp_path, old) == [
        "make demo needs Python 3.11 or newer, found: Python 3.9.2; "
        "name another: make demo PYTHON=python3.12"
    ]


def test_a_missing_network_is_named_at_once(tmp_path: Path) -> None:
    """Where pip fails, one line says so and names its log; no pip tries again."""
    # Its venv holds a Python that does no more than print its arguments and pip's variables.
    lines = (
        'test "$2" = venv || exit 0',
        "mkdir -p .venv-demo/bin",
        "printf '#!/bin/sh\\necho $* retries $PIP_RETRIES\\nexit 1\\n' > .venv-demo/bin/python",
        "chmod +x .venv-demo/bin/python",
    )
    said, problem = fail_to_make_demo(tmp_path, "\n".join(lines))
    assert said.startswith("Installing polyak")
    assert problem.startswith("make demo cannot install packages; is there a network?")
    log = (tmp_path / ".venv-demo/pip.log").read_text()
    assert "pip install" in log
    assert "retries 0" in log


def fail_to_make_demo(folder: Path, script: str) -> list[str]:
    """Run `make demo` with a Python that is a shell script; return the lines that it prints."""
    (folder / "pyproject.toml").touch()
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "--silent", "-f", str(ROOT / "Makefile"), "demo", f"PYTHON={python}"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode
    assert not (folder / ".venv-demo/.ready").exists()
    return done.stdout.splitlines()
