"""Show what averaging does: a run where it changes nothing, and eight where it pays.

`make demo`, or `python -m tests.examples.demo`.  Both networks are small, so plain numpy runs and
trains them, and neither TensorFlow nor scikit-learn has to be installed.  The averages are made by
`polyak_cli` from files.  Everything is seeded, and no seed is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from polyak_cli import average, paired_difference
from polyak_cli.errors import PolyakError
from polyak_cli.evaluation import data
from polyak_cli.evaluation.significance import mcnemar, verdict
from tests import training

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
SAMPLES = ROOT / "sample_checkpoints"
#: Checkpoints in an average; epochs and runs; share of the training labels drawn at random.
LAST, EPOCHS, SEEDS, WRONG = 10, 40, 8, 0.2
TRAINED_ON = 900
NETWORK = training.make_dense((64, 64, 10))
OPTIMIZER = training.Sgd(rate=0.1, momentum=0.9)
INK, SINGLE, AVERAGE = "#333333", "#d55e00", "#0072b2"
#: Of the README's figures, so that the user's own settings change nothing.
STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "text.color": INK,
}
Right = npt.NDArray[np.bool_]


class Outcome(NamedTuple):
    """Accuracy of single checkpoints and of averages of the last ten, one of each for an epoch."""

    epochs: list[int]
    singles: list[float]
    averages: list[float]


# --- scores by plain numpy ------------------------------------------------------------------------


def read_keras(path: Path) -> list[training.Array]:
    """Return kernel, bias, kernel, bias of the sample network from its .h5 file."""
    found: dict[str, training.Array] = {}

    def visit(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = item[()]

    with h5py.File(path) as file:
        file["model_weights"].visititems(visit)
    layers = sorted({name.partition("/")[0] for name in found})
    return [
        next(value for name, value in found.items() if name.startswith(f"{layer}/") and end in name)
        for layer in layers
        for end in ("kernel", "bias")
    ]


def read_numpy(path: Path) -> list[training.Array]:
    """Return kernel, bias, kernel, bias of a network for digits from its .npz file."""
    with np.load(path) as file:
        return [file[name] for name in ("w0", "b0", "w1", "b1")]


def find_right(tensors: Sequence[training.Array], x: training.Array, y: training.Array) -> Right:
    """Return which rows a network of two dense layers classifies correctly."""
    first, first_bias, second, second_bias = tensors
    hidden = np.maximum(x @ first + first_bias, 0)
    return np.asarray((hidden @ second + second_bias).argmax(1) == y)


# --- the sample run: nothing to gain --------------------------------------------------------------


def compare_sample(out: Path) -> tuple[dict[str, Any], Outcome]:
    """Average the sample checkpoints; compare with the newest on the 1,000 test points."""
    rows = data.load("blobs").split("test")
    x, y = np.asarray(rows.features), np.asarray(rows.labels)
    files = sorted(SAMPLES.glob("model_*.h5"))
    target = out / "average.h5"
    average(SAMPLES, target, scheme="exp", alpha=2, force=True)
    singles = [find_right(read_keras(path), x, y) for path in files]
    right = find_right(read_keras(target), x, y)
    outcome = Outcome([int(path.stem[-3:]) for path in files], [], [])
    for k, single in enumerate(singles):
        window = out / "window.h5"
        average(files[: k + 1], window, scheme="exp", alpha=2, force=True)
        outcome.singles.append(float(single.mean()))
        outcome.averages.append(float(find_right(read_keras(window), x, y).mean()))
        window.unlink()
    return compare(singles[-1], right), outcome


def compare(newest: Right, averaged: Right) -> dict[str, Any]:
    """Return both accuracies, the paired difference, its interval and what it means."""
    gain = paired_difference(averaged, newest)
    p = mcnemar(averaged, newest)
    return {
        "newest": float(newest.mean()),
        "average": float(averaged.mean()),
        **gain._asdict(),
        "p": p,
        "verdict": verdict(gain, higher_is_better=True, p=p),
    }


# --- wrong labels: averaging pays -----------------------------------------------------------------


def read_digits() -> tuple[training.Array, training.Array]:
    """Return the images (rows, 64), in shades from 0 to 1, and their classes (rows,)."""
    with np.load(HERE / "digits.npz") as file:
        return file["x"] / 16, file["y"].astype(np.int64)


def load_digits() -> tuple[training.Array, training.Array]:
    """Return the images, in a fixed random order, and their classes."""
    pixels, classes = read_digits()
    order = np.random.default_rng(0).permutation(len(classes))
    return pixels[order], classes[order]


def train_with_wrong_labels(folder: Path, seed: int, epochs: int = EPOCHS) -> None:
    """Train on images of which a fifth have random labels, and keep a checkpoint an epoch."""
    x, y = (part[:TRAINED_ON] for part in load_digits())
    random = np.random.default_rng(seed)
    drawn = random.random(len(y)) < WRONG
    labels = np.where(drawn, random.integers(0, 10, len(y)), y)
    folder.mkdir(parents=True, exist_ok=True)
    kept = training.train(
        NETWORK, OPTIMIZER, seed=seed, epochs=epochs, batch=16, examples=(x, labels)
    )
    for epoch, tensors in enumerate(kept[1:], 1):
        # Named one by one, as numpy's types take every other keyword for an option.
        w0, b0, w1, b1 = (tensors[name] for name in ("w0", "b0", "w1", "b1"))
        np.savez(folder / f"model_{epoch:03d}.npz", w0=w0, b0=b0, w1=w1, b1=b1)


def score_run(folder: Path) -> tuple[dict[str, Any], Outcome]:
    """Average the ten checkpoints up to each epoch of a run; score on images not trained on."""
    x, y = (part[TRAINED_ON:] for part in load_digits())
    files = sorted(folder.glob("model_*.npz"))
    outcome = Outcome([], [], [])
    for end in range(LAST, len(files) + 1):
        target = folder.parent / f"{folder.name}.npz"
        average(files[end - LAST : end], target, scheme="equal", force=True)
        newest = find_right(read_numpy(files[end - 1]), x, y)
        averaged = find_right(read_numpy(target), x, y)
        outcome.epochs.append(end)
        outcome.singles.append(float(newest.mean()))
        outcome.averages.append(float(averaged.mean()))
    return compare(newest, averaged), outcome


# --- what is shown --------------------------------------------------------------------------------


def say(text: str = "") -> None:
    """Print a paragraph at 80 columns, at once."""
    print(textwrap.fill(text, 79), flush=True)


def show_comparison(result: Mapping[str, Any]) -> None:
    """Print the accuracies, the difference with its interval, and the verdict."""
    print(f"  newest checkpoint  {result['newest']:.3f}")
    print(f"  average            {result['average']:.3f}")
    print(
        f"  difference         {result['difference']:+.3f}  "
        f"(95 % interval {result['low']:+.3f} to {result['high']:+.3f}): {result['verdict']}",
        flush=True,
    )


def draw(sample: Outcome, meaning: str, runs: Sequence[Outcome], path: Path) -> None:
    """Draw single epochs and averages: the runs with wrong labels, and the sample run.

    Args:
        sample: the sample run.
        meaning: what its difference means, such as "within noise".
        runs: those with wrong labels.
        path: the .png file.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4), dpi=160, layout="constrained", facecolor="white")
        pays, settled = figure.subplots(1, 2, width_ratios=(1.5, 1))
        _draw_runs(pays, runs)
        _draw_sample(settled, sample, meaning)
        figure.savefig(path, metadata={"Software": None})


def _draw_runs(axes: Any, runs: Sequence[Outcome]) -> None:
    """Draw the mean of several runs as a line and their range as a band."""
    epochs = runs[0].epochs
    for name, colour, values in (
        ("single epochs", SINGLE, np.array([run.singles for run in runs])),
        ("averages of the last ten epochs", AVERAGE, np.array([run.averages for run in runs])),
    ):
        mean = values.mean(0)
        axes.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.18, lw=0)
        axes.plot(epochs, mean, color=colour, lw=2, label=name)
        axes.annotate(
            f"{mean[-1]:.3f}",
            (epochs[-1], mean[-1]),
            (6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            weight="bold",
        )
    _label(axes, "Digits, a fifth of the labels wrong: averaging pays")
    axes.set(ylabel="Accuracy on held-out images", xlim=(epochs[0] - 0.5, epochs[-1] + 3.5))
    axes.set_ylim(bottom=axes.get_ylim()[0] - 0.06)  # the legend is below the bands
    axes.set_yticks(np.arange(0.7, 1.0, 0.05))
    title = f"Mean of {len(runs)} runs; bands: lowest to highest"
    axes.legend(loc="lower left", frameon=False, title=title, alignment="left")


def _draw_sample(axes: Any, sample: Outcome, meaning: str) -> None:
    epochs = sample.epochs
    axes.plot(epochs, sample.singles, "o-", color=SINGLE, lw=1.5, ms=4, label="single epochs")
    axes.plot(epochs, sample.averages, "s-", color=AVERAGE, lw=2, ms=4, label="averages so far")
    axes.set_ylim(min(sample.singles) - 0.03, max(sample.singles) + 0.02)
    axes.legend(loc="lower left", frameon=False)
    _label(axes, f"The sample run: {meaning}")
    axes.set_xticks(epochs[::3])
    axes.set(ylabel="Accuracy on test points")


def _label(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, weight="bold")
    axes.set(xlabel="Epoch")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6")
    axes.set_axisbelow(True)


def describe(sample: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the text alternative of the picture."""
    newest, averaged = (np.mean([run[key] for run in runs]) for key in ("newest", "average"))
    better = sum(run["average"] > run["newest"] for run in runs)
    return (
        f"Accuracy over epochs. Left: {len(runs)} runs on handwritten digits, a fifth of the "
        f"training labels wrong. At the end, single epochs reach {newest:.3f} on average, averages "
        f"of the last ten epochs {averaged:.3f}; the average is better in {better} of {len(runs)} "
        f"runs. Right: the sample run, newest {sample['newest']:.3f}, average "
        f"{sample['average']:.3f}: {sample['verdict']}."
    )


def show_next(out: Path) -> None:
    """Print the next three commands to try, which work from the folder that the demo ran in."""
    program = Path(sys.executable).parent / "polyak"
    with contextlib.suppress(ValueError):  # kept whole where the program lies elsewhere
        program = program.relative_to(Path.cwd())
    print("\nNext, try:")
    print(f"  {program} average sample_checkpoints --scheme exp --alpha 2 --dry-run")
    print(f"  {program} verify {out / 'average.h5'} --source sample_checkpoints")
    print(f"  {program} guide tutorial", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both cases, print what they show, and draw the figure."""
    parser = argparse.ArgumentParser(prog="python -m tests.examples.demo", description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, default=Path(".demo"), help="where results go")
    parser.add_argument("--picture", type=Path, help="folder for the picture and its numbers")
    asked = parser.parse_args(arguments)
    asked.out.mkdir(parents=True, exist_ok=True)
    try:
        sample, runs, figure = run_cases(asked.out, asked.seeds)
        if asked.picture:
            keep_picture(asked.picture, figure, sample, runs)
    except PolyakError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show_next(asked.out)
    return 0


def run_cases(
    out: Path, seeds: int
) -> tuple[dict[str, Any], list[tuple[dict[str, Any], Outcome]], Path]:
    """Run both cases and draw them; return the comparisons and the figure."""
    say("1. The ten checkpoints of sample_checkpoints, newer ones counting more (exp, alpha 2):")
    sample, sample_outcome = compare_sample(out)
    show_comparison(sample)
    if sample["verdict"] == "within noise":
        print("  Averaging shows neither a gain nor a loss here: the interval contains 0.")
    print(flush=True)
    say(
        f"2. Handwritten digits, a fifth of the training labels wrong: {seeds} runs of {EPOCHS} "
        "epochs are trained with numpy, and the last ten checkpoints of each averaged:"
    )
    runs = []
    for seed in range(seeds):
        train_with_wrong_labels(out / f"seed_{seed}", seed)
        runs.append(score_run(out / f"seed_{seed}"))
        result = runs[-1][0]
        print(
            f"  seed {seed}: newest {result['newest']:.3f}, average {result['average']:.3f}, "
            f"{result['difference']:+.3f} ({result['low']:+.3f} to {result['high']:+.3f}): "
            f"{result['verdict']}",
            flush=True,
        )
    results = [result for result, _ in runs]
    better = sum(result["verdict"] == "better" for result in results)
    newest, averaged = (
        np.mean([result[key] for result in results]) for key in ("newest", "average")
    )
    print(
        f"  mean: newest {newest:.3f}, average {averaged:.3f}; better in {better} of {seeds} runs"
    )
    print("  Averaging pays here: with wrong labels, the weights keep moving.")
    figure = out / "figure.png"
    draw(sample_outcome, sample["verdict"], [outcome for _, outcome in runs], figure)
    print(f"\nThe figure: {figure}", flush=True)
    return sample, runs, figure


def keep_picture(
    folder: Path,
    figure: Path,
    sample: Mapping[str, Any],
    runs: Sequence[tuple[Mapping[str, Any], Outcome]],
) -> None:
    """Write the README's picture, its numbers and its text alternative."""
    results = [result for result, _ in runs]
    (folder / "averaging.png").write_bytes(figure.read_bytes())
    kept = {"alt": describe(sample, results), "sample": sample, "runs": results}
    (folder / "averaging.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
