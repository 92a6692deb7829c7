"""The commands that need a model or data: evaluate, recalibrate, train; sweep is in `sweeps`.

Each command calls one tool and prints its result; it does not know how the tool works.  Heavy
packages are imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from polyak_cli.cli import gates, rendering, serving
from polyak_cli.cli.lists import expand_lists
from polyak_cli.cli.options import (
    ANSWER_IS_NO,
    ARCHITECTURE,
    DATA,
    DEVICE,
    DONE,
    FOLDER,
    JSON,
    METRIC,
    PART,
    QUIET,
    ROWS_AT_A_TIME,
    TRUST_CODE,
    Command,
    Gate,
    Readable,
    option,
    under,
)
from polyak_cli.cli.progress import show_count
from polyak_cli.errors import UsageError, name_path, shown

if TYPE_CHECKING:
    from pathlib import Path

    from polyak_cli.evaluation.comparison import Comparison
    from polyak_cli.evaluation.data import Split
    from polyak_cli.evaluation.evaluator import Score


def load_rows(options: dict[str, Any]) -> Sequence[str]:
    """Replace the data set's name in ``options["recalibrate"]`` by its rows; return its notes."""
    name, split = options["recalibrate"], options.pop("split")
    if name is None:
        if split:
            raise UsageError("--split belongs to --recalibrate, which is missing")
        return ()
    from polyak_cli.evaluation import data as datasets

    with keep_prints_apart(name):
        dataset = datasets.load(name)
    options["recalibrate"] = dataset.split(split, default="train")
    return dataset.notes


@contextmanager
def keep_prints_apart(recalibrates: object) -> Iterator[None]:
    """Redirect prints of Keras and of the user's data module to stderr, if either is run."""
    if recalibrates is None:
        yield
        return
    from polyak_cli.evaluation.quiet import redirect_prints

    with redirect_prints():
        yield


@click.command(
    cls=Command,
    short_help="Score model files on data.",
    example="polyak evaluate final.h5 --data blobs --fail-under accuracy=0.8",
    guide="worth",
    serves=serving.RUN,
)
@click.argument(
    "models",
    nargs=-1,
    required=True,
    metavar="MODEL...",
    type=Readable(),
    callback=expand_lists,
)
@under(
    "Data",
    DATA,
    option(
        "--split",
        type=click.Choice(["train", "test"]),
        help="Which part of the data.  [default: test, where the data are split]",
    ),
    ROWS_AT_A_TIME,
    ARCHITECTURE,
    *PART,
    DEVICE,
    METRIC,
)
@under(
    "Deciding",
    option(
        "--fail-under",
        type=Gate(),
        multiple=True,
        help="Exit with 1 when any model's metric is less, or its loss or metric is not finite; "
        "may be given again.",
    ),
    option(
        "--baseline",
        type=Readable(),
        metavar="MODEL",
        help="Compare every model with this one, row by row: differences with 95 % intervals.",
    ),
    option(
        "--fail-if-worse",
        is_flag=True,
        help="Exit with 1 when any model is worse than the baseline beyond noise, by --metric, in "
        "accuracy, or where there is none in loss.",
    ),
    TRUST_CODE,
)
@under(
    "Output",
    JSON,
    QUIET,
)
def evaluate(
    models: tuple[str, ...],
    data: str,
    split: str | None,
    batch_size: int,
    architecture: str | None,
    metric: str | None,
    fail_under: tuple[tuple[str, float], ...],
    baseline: str | None,
    fail_if_worse: bool,
    trust_code: bool,
    as_json: bool,
    quiet: bool,
    **part: Any,
) -> int:
    """Score model files on data: loss, accuracy and the model's own metrics.

    MODEL is a file, or a directory or a glob whose model files are all scored: by epoch if every
    name has one, else by name. For - the names of files are read from standard input.
    """
    if fail_if_worse and baseline is None:
        raise UsageError("--fail-if-worse has nothing to compare with; name a model by --baseline")
    from polyak_cli import checkpoints
    from polyak_cli.evaluation import data as datasets
    from polyak_cli.evaluation import keras_files, user_code
    from polyak_cli.evaluation.quiet import redirect_prints

    paths, passed_over = checkpoints.model_files(models, weights=architecture is not None)
    # A function may take the tensors of Keras's files, and need no Keras.
    if architecture is None or not user_code.is_function(architecture):
        keras_files.require_keras_for("polyak evaluate", paths)
    with redirect_prints(), show_count("scoring", "model", quiet or as_json) as progress:
        dataset = datasets.load(data)
        rows = dataset.split(split)
        options: dict[str, Any] = {"batch_size": batch_size, "trust_code": trust_code}
        options |= {"model": architecture, "metric": metric, **part}
        scores, compared = _score_models(paths, baseline, rows, progress=progress, **options)
    failures = [line for score in scores for line in gates.find_failed(score, fail_under)]
    if compared and fail_if_worse:
        failures += gates.find_worse(compared, metric)
    rendering.print_notes(
        [
            *rendering.passed_over_lines(passed_over, rendering.MOST_PASSED),
            *dataset.notes,
            *_collect_notes(scores, compared),
        ],
        quiet,
    )
    found = {
        "data": data,
        "rows": rows.rows,
        **rendering.models_data(scores, compared),
        "passed_over": [{"path": name_path(one.path), "reason": one.reason} for one in passed_over],
        "failures": failures,
    }
    rendering.print_result(
        found, as_json, quiet, lambda: rendering.evaluation_lines(scores, compared)
    )
    rendering.print_lines((f"failed: {line}" for line in failures), sys.stderr)
    return ANSWER_IS_NO if failures else DONE


def _score_models(
    paths: Sequence[Path], baseline: str | None, rows: Split, **options: Any
) -> tuple[list[Score], Comparison | None]:
    """Score the models, and compare them with the baseline if there is one."""
    from polyak_cli.evaluation import comparison, evaluator

    if baseline is None:
        return [*evaluator.evaluate(paths, rows, **options)], None
    compared = comparison.compare(paths, baseline, rows, **options)
    return [one.score for one in compared.models], compared


def _collect_notes(scores: Sequence[Score], compared: Comparison | None) -> Iterable[str]:
    """Return the notes about each file once; the baseline may be among the models."""
    every = [compared.baseline, *scores] if compared else scores
    return dict.fromkeys(f"{shown(one.path)}: {note}" for one in every for note in one.notes)


@click.command(
    cls=Command,
    short_help="Recompute BatchNorm's statistics.",
    example="polyak recalibrate average.h5 --data train.npz -o final.h5",
    guide="batchnorm",
    serves=serving.REWRITTEN,
)
@click.argument("model", metavar="MODEL", type=Readable())
@under(
    "Data",
    DATA,
    option(
        "--split",
        type=click.Choice(["train", "test"]),
        help="Which part of the data.  [default: train, where the data are split]",
    ),
    option(
        "--batch-size",
        type=int,
        default=256,
        metavar="N",
        help="Rows at a time, at most; best that of training, and not small.",
    ),
    ARCHITECTURE,
    *PART,
    DEVICE,
    TRUST_CODE,
)
@under(
    "Output",
    option(
        "-o", "--output", type=click.Path(), required=True, metavar="FILE", help="What to write."
    ),
    option("--force", is_flag=True, help="Replace an existing output."),
    JSON,
    QUIET,
)
def recalibrate(
    model: str,
    data: str,
    split: str | None,
    batch_size: int,
    architecture: str | None,
    device: str | None,
    trust_code: bool,
    output: str,
    force: bool,
    as_json: bool,
    quiet: bool,
    **part: Any,
) -> None:
    """Recompute BatchNorm's moving statistics in one pass over training data.

    MODEL is a model, such as an average: its statistics are averages of estimates that
    belong to other weights.  In the output, nothing else of MODEL is changed.
    """
    from pathlib import Path

    from polyak_cli.evaluation import data as datasets
    from polyak_cli.evaluation import keras_files, recalibration
    from polyak_cli.evaluation.quiet import redirect_prints

    keras_files.require_keras_for("recalibrating BatchNorm", [Path(model)])
    with redirect_prints(), show_count("recalibrating", "batch", quiet or as_json) as progress:
        dataset = datasets.load(data)
        rows = dataset.split(split, default="train")
        report = recalibration.recalibrate(
            model,
            output,
            rows,
            batch_size=batch_size,
            trust_code=trust_code,
            force=force,
            architecture=architecture,
            device=device,
            progress=progress,
            **part,
        )
    rendering.print_notes([*dataset.notes, *report.notes], quiet)
    rendering.print_result(
        report.data(), as_json, quiet, lambda: rendering.recalibration_lines(report)
    )


@click.command(
    cls=Command,
    short_help="Train the sample network.",
    example="polyak train --data blobs -o ckpts --epochs 500 --keep 10",
    guide="tutorial",
    serves=serving.WRITTEN,
)
@under(
    "Training",
    option(
        "--data",
        type=click.Choice(["blobs"]),
        default="blobs",
        help="1,100 points in three overlapping clouds; 100 are for training.",
    ),
    option("--epochs", type=int, default=500, metavar="N", help="How many epochs."),
    option(
        "--seed", type=int, default=0, metavar="S", help="Seed of the initial weights and order."
    ),
    option("--optimizer", type=click.Choice(["sgd", "adam"]), default="sgd", help="The optimizer."),
    option(
        "--learning-rate",
        type=float,
        metavar="RATE",
        help="Its learning rate.  [default: 0.01 for sgd, 0.001 for adam]",
    ),
)
@under(
    "Output",
    FOLDER,
    option("--keep", type=int, default=10, metavar="N", help="Keep the last N checkpoints."),
    option(
        "--plot",
        type=click.Path(),
        metavar="FILE",
        help="Draw the learning curves as .png or .svg.",
    ),
    option("--force", is_flag=True, help="Replace an earlier run in the folder."),
    JSON,
    QUIET,
)
def train(
    data: str,
    epochs: int,
    seed: int,
    optimizer: str,
    learning_rate: float | None,
    output: str,
    keep: int,
    plot: str | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train the sample network and keep a checkpoint of each of the last epochs."""
    from pathlib import Path

    from polyak_cli.evaluation import reports, sample_run

    reports.check_training(plot is not None)
    if plot:
        from polyak_cli.evaluation import plots

        plots.check_path(Path(plot))
    with show_count("training", "epoch", quiet or as_json) as progress:
        report = sample_run.train(
            Path(output),
            epochs=epochs,
            keep=keep,
            seed=seed,
            optimizer=optimizer,
            learning_rate=learning_rate,
            force=force,
            progress=progress and (lambda epoch, _: progress(epoch + 1, epochs)),
        )
    if plot:
        plots.draw_learning_curves(report.history, Path(plot))
    last = {name: values[-1] for name, values in report.history.items()}
    made = {
        "data": data,
        "seed": report.seed,
        "optimizer": report.optimizer,
        "learning_rate": report.learning_rate,
        "epochs": epochs,
        "checkpoints": [name_path(path) for path in report.checkpoints],
        "log": str(report.log),
        "plot": plot,
        "last": last,
    }
    rendering.print_result(made, as_json, quiet, lambda: rendering.training_lines(made))
