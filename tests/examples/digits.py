"""Where averaging pays: a small convolutional network on real images, over several seeds.

`make digits`, or `python -m tests.examples.digits`.  The images are the 1,797 handwritten digits of
scikit-learn, 8 x 8 pixels (UCI, Alpaydin and Kaynak 1998).  The learning rate is constant, so the
last checkpoints wander about; in each regime they do so more.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from polyak_cli import Evaluator, average, halves, paired_difference, recalibrate, sign_flip
from polyak_cli.evaluation.data import Split
from polyak_cli.evaluation.significance import verdict

ROOT = Path(__file__).parents[2]
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
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    whole = Split("digits", (pixels / 16).astype(np.float32).reshape(-1, 8, 8, 1), labels)
    test, rest = halves(whole, share=0.45)
    selection, train = halves(rest, share=0.3)
    return train, selection, test


def network(rate: float) -> Any:
    """Return the network, compiled; its optimizer keeps the EMA of every step beside it."""
    import keras

    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", use_bias=False, name="first"),
            layers.BatchNormalization(momentum=0.9, name="first_normal"),
            layers.ReLU(),
            layers.Conv2D(32, 3, strides=2, padding="same", use_bias=False, name="second"),
            layers.BatchNormalization(momentum=0.9, name="second_normal"),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10, activation="softmax", name="classes"),
        ],
        name="digits",
    )
    sgd = keras.optimizers.SGD(rate, momentum=0.9, use_ema=True, ema_momentum=0.99, name="sgd")
    model.compile(sgd, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def train(folder: Path, regime: Regime, seed: int, rows: Split, epochs: int = EPOCHS) -> Split:
    """Train once, saving a checkpoint an epoch; return the rows with the labels that were used."""
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(seed)
    random = np.random.default_rng(seed)
    labels = np.array(rows.labels)
    drawn = random.random(len(labels)) < regime.wrong
    labels[drawn] = random.integers(0, 10, drawn.sum())
    tf.config.experimental.enable_op_determinism()
    options = tf.data.Options()  # as in `polyak train`: TensorFlow's own would cost more than fit
    options.autotune.enabled = False
    options.experimental_optimization.apply_default_optimizations = False
    pipeline = tf.data.Dataset.from_tensor_slices((rows.features, labels)).with_options(options)
    network(regime.rate).fit(
        pipeline.shuffle(len(labels)).batch(regime.batch),
        epochs=epochs,
        shuffle=False,  # the pipeline does
        verbose=0,
        callbacks=[keras.callbacks.ModelCheckpoint(str(folder / "model_{epoch:03d}.keras"))],
    )
    return Split("digits", rows.features, labels)


def contenders(folder: Path, trained: Split) -> dict[str, Path]:
    """Write what is made of a run's checkpoints; the best single one is found later."""
    made = {name: folder / f"{name}.keras" for name in CONTENDERS[2:]}
    run = str(folder / "model_*.keras")
    average(run, made["average"], last=LAST, scheme="equal")
    average(run, made["EMA"], last=1, use_ema=True)
    for name in ("average", "EMA"):
        recalibrate(made[name], made[f"{name}, recalibrated"], trained)
    return made


def examine(
    folder: Path, made: Mapping[str, Path], selection: Split, test: Split
) -> dict[str, npt.NDArray[np.bool_]]:
    """Return for each contender which rows of the test it got right."""
    examiner = Evaluator([selection, test])
    singles = []
    for path in sorted(folder.glob("model_*.keras"))[-LAST:]:
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
    regime: Regime, seeds: int, scratch: Path, epochs: int = EPOCHS
) -> list[dict[str, Any]]:
    """Train and compare in one regime, for the seeds 0, 1, 2, ..."""
    rows, selection, test = images()
    right = []
    for seed in range(seeds):
        print(f"{regime.name}: seed {seed}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=scratch) as name:
            trained = train(Path(name), regime, seed, rows, epochs)
            right.append(examine(Path(name), contenders(Path(name), trained), selection, test))
    return compare(right)


def table(regime: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a regime's results as Markdown."""
    wrong = f", {regime['wrong']:.0%} of the labels drawn at random" if regime["wrong"] else ""
    lines = [
        f"{regime['name'].capitalize()}: rate {regime['rate']:g}, "
        f"batches of {regime['batch']}{wrong}.",
        "",
        "| model | accuracy | over the newest | over the best single |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        gains = [_gain(row[over]) if row["name"] != over else "" for over in CONTENDERS[:2]]
        lines.append(f"| {row['name']} | {row['accuracy']:.4f} | {gains[0]} | {gains[1]} |")
    return "\n".join(lines)


def _gain(gain: Mapping[str, Any]) -> str:
    text = f"{gain['difference']:+.4f} ({gain['low']:+.4f} to {gain['high']:+.4f})"
    return text if gain["verdict"] == "within noise" else f"**{text}**"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the regimes, print their tables, write them with all figures."""
    parser = argparse.ArgumentParser(prog="python -m tests.examples.digits", description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, default=ROOT / ".digits", help="where results go")
    asked = parser.parse_args(arguments)
    asked.out.mkdir(parents=True, exist_ok=True)
    results = []
    for regime in REGIMES:
        rows = experiment(regime, asked.seeds, asked.out)
        results.append({"regime": asdict(regime), "seeds": asked.seeds, "rows": rows})
        print(f"{table(asdict(regime), rows)}\n", flush=True)
    (asked.out / "digits.json").write_text(json.dumps(results, indent=1) + "\n")
    text = "\n\n".join(table(result["regime"], result["rows"]) for result in results)
    (asked.out / "digits.md").write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
