"""Train networks on digits in three regimes, and compare what is made of their checkpoints.

The images are the 1,797 handwritten digits of scikit-learn, 8 x 8 pixels (UCI, Alpaydin and Kaynak
1998).  The learning rate is constant, so the last checkpoints wander about; in each regime they do
so more.  Who trains the network is a `Framework`; all else is the same for each.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from polyak_cli import Evaluator, average, halves, paired_difference, recalibrate, sign_flip
from polyak_cli.evaluation.data import Split
from polyak_cli.evaluation.significance import verdict
from tests.examples import demo

EPOCHS, LAST, SEEDS = 40, 10, 8
Correct = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Regime:
    """How the network is trained: by SGD with momentum 0.9 at a constant learning rate."""

    name: str
    rate: float
    batch: int
    wrong: float  # the share of the training labels that are drawn at random


REGIMES = (
    Regime("calm", 0.1, 32, 0.0),
    Regime("restless", 0.3, 16, 0.0),
    Regime("wrong labels", 0.2, 16, 0.2),
)


@dataclass(frozen=True, slots=True)
class Framework:
    """What trains the network.

    Attributes:
        name: as tables show it.
        suffix: of its checkpoints.
        model: what makes the model of a checkpoint that holds none, as for `evaluate`.
        train: trains once, for so many epochs, and saves model_001 and so on in the folder: with a
            seed, on rows whose labels are already those of the regime.
    """

    name: str
    suffix: str
    model: str | None
    train: Callable[[Path, Regime, int, Split, int], None]


#: What is compared, in the order of the table.
CONTENDERS = (
    "newest",
    "best single",
    "average",
    "average, recalibrated",
    "EMA",
    "EMA, recalibrated",
)


def images() -> tuple[Split, Split, Split]:
    """Return the images to train on, those to choose the best checkpoint by, those to report on."""
    pixels, labels = demo.read_digits()
    whole = Split("digits", pixels.astype(np.float32).reshape(-1, 8, 8, 1), labels)
    test, rest = halves(whole, share=0.45)
    selection, train = halves(rest, share=0.3)
    return train, selection, test


def spoil(rows: Split, share: float, seed: int) -> Split:
    """Return rows of which a share have labels that are drawn at random."""
    random = np.random.default_rng(seed)
    labels = np.array(rows.labels)
    drawn = random.random(len(labels)) < share
    labels[drawn] = random.integers(0, 10, drawn.sum())
    return Split(rows.source, rows.features, labels)


def contenders(framework: Framework, folder: Path, trained: Split) -> dict[str, Path]:
    """Write what is made of a run's checkpoints; the best single one is found later."""
    made = {name: folder / f"{name}{framework.suffix}" for name in CONTENDERS[2:]}
    run = str(folder / f"model_*{framework.suffix}")
    average(run, made["average"], last=LAST, scheme="equal")
    average(run, made["EMA"], last=1, use_ema=True)
    for name in ("average", "EMA"):
        target = made[f"{name}, recalibrated"]
        recalibrate(made[name], target, trained, architecture=framework.model)
    return made


def examine(
    framework: Framework, folder: Path, made: Mapping[str, Path], selection: Split, test: Split
) -> dict[str, npt.NDArray[np.bool_]]:
    """Return for each contender which rows of the test it got right."""
    examiner = Evaluator([selection, test], model=framework.model)
    singles = []
    for path in sorted(folder.glob(f"model_*{framework.suffix}"))[-LAST:]:
        chosen_by, reported = examiner.score_rows(path)
        assert chosen_by.correct is not None
        singles.append((float(chosen_by.correct.mean()), reported))
    found = {"newest": singles[-1][1], "best single": max(singles, key=lambda one: one[0])[1]}
    for name, path in made.items():
        found[name] = examiner.score_rows(path)[1]
    right = {}
    for name in CONTENDERS:
        correct = found[name].correct
        assert correct is not None
        right[name] = correct
    return right


def compare(right: Sequence[Mapping[str, npt.NDArray[np.bool_]]]) -> list[dict[str, Any]]:
    """Compare the contenders over all seeds.

    The unit of a paired interval is a row of the test, for which each contender gets the share of
    the seeds in which it was right: rows are drawn again, the runs are fixed.

    Args:
        right: for each seed, what `examine` gives.
    """
    shares: dict[str, Correct] = {
        name: np.mean([seed[name] for seed in right], axis=0) for name in CONTENDERS
    }
    rows = []
    for name in CONTENDERS:
        row: dict[str, Any] = {"name": name, "accuracy": float(shares[name].mean())}
        for over in CONTENDERS[:2]:
            gain = paired_difference(shares[name], shares[over])
            # Shares of seeds, not right or wrong, so McNemar's test does not apply.
            p = sign_flip(shares[name], shares[over])
            gains = [float(seed[name].mean() - seed[over].mean()) for seed in right]
            row[over] = {
                **gain._asdict(),
                "verdict": verdict(gain, higher_is_better=True, p=p),
                "seeds": gains,
            }
        rows.append(row)
    return rows


def experiment(
    framework: Framework, regime: Regime, seeds: int, scratch: Path, epochs: int = EPOCHS
) -> list[dict[str, Any]]:
    """Train and compare in one regime, for the seeds 0, 1, 2, ..."""
    rows, selection, test = images()
    right = []
    for seed in range(seeds):
        print(f"{framework.name}, {regime.name}: seed {seed}", file=sys.stderr, flush=True)
        trained = spoil(rows, regime.wrong, seed)
        with tempfile.TemporaryDirectory(dir=scratch) as name:
            folder = Path(name)
            framework.train(folder, regime, seed, trained, epochs)
            made = contenders(framework, folder, trained)
            right.append(examine(framework, folder, made, selection, test))
    return compare(right)
