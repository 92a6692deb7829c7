"""``--best`` by the `trainer_state.json` of each checkpoint; tests/hf has what a Trainer writes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyak_cli import CheckpointError, PolyakError, UsageError, select
from polyak_cli.checkpoints import trainer_states

LOSSES = {100: 0.9, 200: 0.4, 300: 0.6, 400: 0.3, 500: 0.8}


def write_state(folder: Path, step: int, logs: Sequence[Mapping[str, Any]], **others: Any) -> None:
    """Write a checkpoint with the state that a Trainer has at a step."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"")
    history = [one for one in logs if one["step"] <= step]
    state = {"global_step": step, "log_history": history, **others}
    (folder / "trainer_state.json").write_text(json.dumps(state))


def write_run(run: Path, values: Mapping[int, float] = LOSSES, **others: Any) -> Path:
    """Write checkpoints whose metrics are known, with the lines of the training between them."""
    logs: list[dict[str, Any]] = []
    for step, value in values.items():
        logs.append({"step": step, "epoch": step / 100, "loss": 5.0, "learning_rate": 0.1})
        logs.append({"step": step, "epoch": step / 100, "eval_loss": value, "eval_f1": 1 - value})
        logs.append({"step": step + 50, "eval_loss": 0.0, "eval_f1": 1.0})  # between two saves
    for step in values:
        write_state(run / f"checkpoint-{step}", step, logs, **others)
    return run


def chosen(run: Path, **options: Any) -> list[tuple[int | None, float | None]]:
    """Return step and metric of the chosen checkpoints."""
    return [(one.epoch, one.metric) for one in select([run], **options).checkpoints]


def test_the_metric_is_that_of_the_checkpoints_own_step(tmp_path: Path) -> None:
    """Evaluations between two saves are of weights that were not saved."""
    run = write_run(tmp_path / "run")
    assert chosen(run, best=2) == [(200, 0.4), (400, 0.3)]
    assert chosen(run, best=2, monitor="eval_loss") == [(200, 0.4), (400, 0.3)]
    assert chosen(run, best=1, monitor="loss") == [(400, 0.3)]  # as metric_for_best_model
    assert chosen(run, best=1, monitor="eval_f1") == [(400, 0.7)]
    assert chosen(run, best=1, last=1) == [(500, 0.8)]
    assert chosen(run, best=1, mode="max") == [(100, 0.9)]


def test_without_a_metric_the_trainers_own_counts(tmp_path: Path) -> None:
    """The one whose value at the best checkpoint is the Trainer's best metric."""
    of_trainer: Any = {"best_metric": 1 - 0.9, "best_model_checkpoint": "out/checkpoint-100"}
    run = write_run(tmp_path / "run", **of_trainer)
    selection = select([run], best=1)
    assert [one.epoch for one in selection.checkpoints] == [400]
    assert any("eval_f1 is that of each checkpoint's trainer" in note for note in selection.notes)


def test_the_direction_of_an_unknown_metric_is_that_of_the_best(tmp_path: Path) -> None:
    """Where its name says nothing, the Trainer's best is the least or the greatest."""
    values = {100: 3.0, 200: 1.0, 300: 2.0}
    logs = [{"step": step, "eval_zorp": value} for step, value in values.items()]
    for step in values:
        write_state(
            tmp_path / f"checkpoint-{step}",
            step,
            logs,
            best_metric=1.0,
            best_model_checkpoint="/elsewhere/checkpoint-200",
        )
    assert chosen(tmp_path, best=2) == [(200, 1.0), (300, 2.0)]
    with pytest.raises(UsageError, match="give --mode min or --mode max"):
        select([tmp_path], best=2, monitor="zorp")
    assert chosen(tmp_path, best=1, monitor="zorp", mode="max") == [(100, 3.0)]


def test_a_best_checkpoint_that_is_gone_is_named(tmp_path: Path) -> None:
    """`save_total_limit` deletes checkpoints, and --last leaves some out."""
    of_trainer: Any = {"best_metric": 0.3, "best_model_checkpoint": "out/checkpoint-400"}
    run = write_run(tmp_path / "run", **of_trainer)
    assert not any("is not among these" in note for note in select([run], best=2).notes)
    notes = select([run], best=1, last=1).notes
    assert "checkpoint-400, the best checkpoint by the Trainer, is not among these" in notes


def test_a_best_checkpoint_that_no_step_has_is_passed_by(tmp_path: Path) -> None:
    """Python refuses to read numbers of thousands of digits."""
    of_trainer: Any = {"best_metric": 0.3, "best_model_checkpoint": f"checkpoint-{'9' * 5000}"}
    assert chosen(write_run(tmp_path / "run", **of_trainer), best=1) == [(400, 0.3)]


def test_names_come_first(tmp_path: Path) -> None:
    """A metric in the folder's name is what the user sees."""
    logs = [{"step": k, "eval_loss": 9.0 - k} for k in (1, 2)]
    for k, loss in ((1, 0.5), (2, 0.7)):
        write_state(tmp_path / f"checkpoint-{k}-eval_loss-{loss}", k, logs)
    assert chosen(tmp_path, best=1, monitor="eval_loss") == [(1, 0.5)]


def test_what_is_not_finite_is_never_best(tmp_path: Path) -> None:
    """A Trainer writes NaN and Infinity as Python's JSON does."""
    run = write_run(tmp_path / "run", {100: math.nan, 200: -math.inf, 300: 0.5})
    assert chosen(run, best=1) == [(300, 0.5)]
    with pytest.raises(CheckpointError, match="2 more whose eval_loss is not a finite number"):
        select([run], best=2)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    """A state, a metric, an evaluation at the step of a checkpoint."""
    run = write_run(tmp_path / "run")
    with pytest.raises(CheckpointError, match="has no val_acc; choose --monitor from eval_loss"):
        select([run], best=1, monitor="val_acc")
    write_state(run / "checkpoint-600", 600, [{"step": 590, "eval_loss": 0.1}])
    with pytest.raises(CheckpointError, match=r"no eval_loss at step 600, .* of the steps 590\)"):
        select([run], best=1)
    assert chosen(run, best=1, exclude=["checkpoint-600"]) == [(400, 0.3)]
    (run / "checkpoint-200/trainer_state.json").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-200.*--best reads the metric from it"):
        select([run], best=1, exclude=["checkpoint-600"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        "null",
        "[]",
        '{"global_step": "500", "log_history": []}',
        '{"global_step": 500, "log_history": {}}',
        '{"global_step": true, "log_history": []}',
        '{"log_history": []}',
        '{"global_step": 500, "log_history": [], "x": ' + "9" * 5000 + "}",
    ],
)
def test_a_damaged_state_is_refused(tmp_path: Path, text: str) -> None:
    """In one line that names it."""
    run = write_run(tmp_path / "run")
    (run / "checkpoint-500/trainer_state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"checkpoint-500/trainer_state\.json: is damaged"):
        select([run], best=1)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
ENTRIES = st.lists(
    JSON | st.fixed_dictionaries({"step": JSON, "eval_loss": JSON, "eval_x": JSON}), max_size=4
)


@given(
    said=JSON
    | st.fixed_dictionaries(
        {
            "global_step": st.integers(0, 3) | JSON,
            "log_history": ENTRIES | JSON,
            "best_metric": JSON,
            "best_model_checkpoint": JSON | st.just("a/checkpoint-1"),
        }
    ),
    monitor=st.none() | st.sampled_from(["eval_loss", "loss", "x"]),
)
def test_no_state_gives_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, said: Any, monitor: str | None
) -> None:
    """Whatever JSON it holds, there is a metric or a refusal."""
    folder = tmp_path_factory.getbasetemp() / "state"
    folder.mkdir(exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps(said))
    try:
        found = trainer_states.read_metrics([folder], monitor, None)
    except PolyakError:
        return
    assert found.better in ("min", "max")
    assert [type(value) for value in found.values] == [float]
