"""Runs of wenet and SpeechBrain: folders with a date, and metrics in YAML files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyak_cli import UsageError, select
from polyak_cli.checkpoints import descriptions, survey
from tests.test_checkpoints import epochs, make, names, reasons, refusal

#: As yaml.dump of PyYAML writes wenet's, of two generations, with lists and nested settings.
OLD = "cv_loss: {0}\nepoch: 3\nlr: 0.0005\nstep: 900\n"
NEW = """\
accum_grad: 4
dataset_conf:
  filter_conf:
    max_length: 40960
    loss: 9.0
  shuffle: true
epoch: 3
loss_dict:
  acc: {1}
  loss: {0}
  loss_att: 1.0e-05
lrs:
- 0.001
- 0.002
save_time: 02/01/2024 03:04:05
step: 900
tag: epoch_3
"""
LOSSES = (5.5, 4.25, 7.0, 4.5)


def write_wenet(folder: Path, text: str) -> Path:
    """Write four checkpoints with a description beside each, and those of the run itself."""
    folder.mkdir()
    for epoch, loss in enumerate(LOSSES):
        make(folder, f"{epoch}.pt")
        (folder / f"{epoch}.yaml").write_text(text.format(loss, 1 / loss))
    (folder / "train.yaml").write_text("epoch: 3\n")
    return folder


DATES = ("2024-01-02+03-04-05+00", "2024-01-02+23-04-05+00", "2024-01-03+01-00-00+00")


def write_speechbrain(
    folder: Path, counters: Sequence[str] = ("8", "9", "10"), **more: str
) -> Path:
    """Write folders as SpeechBrain's Checkpointer does, with a counter of epochs."""
    for number, date in enumerate(DATES):
        inner = folder / f"CKPT+{date}"
        inner.mkdir(parents=True)
        make(inner, "model.ckpt", "optimizer.ckpt", "normalizer.ckpt")
        if number < len(counters):
            (inner / "counter.ckpt").write_text(counters[number])
        numbers = {"WER": f"{LOSSES[number]}", "end-of-epoch": "true", "unixtime": "1704164645.5"}
        lines = [f"{key}: {value}" for key, value in (numbers | more).items()]
        (inner / "CKPT.yaml").write_text("\n".join(["# yamllint disable", *lines, ""]))
    return folder


def chosen(run: Path, **options: object) -> list[tuple[str, float | None]]:
    """Return name and metric of the chosen checkpoints."""
    found = select([run], **options).checkpoints  # type: ignore[arg-type]
    return [(one.path.name, one.metric) for one in found]


@pytest.mark.parametrize("text", [OLD, NEW])
def test_the_loss_of_wenet_is_found_beside_its_checkpoints(tmp_path: Path, text: str) -> None:
    """As its own averaging script does; the settings in the newer file are no metric."""
    run = write_wenet(tmp_path / "run", text)
    assert chosen(run, best=2) == [("1.pt", 4.25), ("3.pt", 4.5)]
    (note,) = (n for n in select([run], best=1).notes if "yaml" in n)
    assert note.endswith("loss is that of the .yaml of each checkpoint (min is better)")


def test_another_metric_is_named(tmp_path: Path) -> None:
    """Alone, or with the keys above it; the outermost of several counts."""
    run = write_wenet(tmp_path / "run", NEW)
    assert chosen(run, best=1, monitor="acc") == [("1.pt", 1 / 4.25)]
    assert chosen(run, best=1, monitor="loss_dict/acc") == [("1.pt", 1 / 4.25)]
    assert chosen(run, best=1, monitor="loss") == [("1.pt", 4.25)]
    assert chosen(run, best=1, monitor="loss", mode="max") == [("2.pt", 7.0)]
    assert "3.yaml: has no wer; choose --monitor from" in refusal(run, best=1, monitor="wer")
    with pytest.raises(UsageError, match=r"--monitor max_length: .*give --mode"):
        select([run], best=1, monitor="max_length")


def test_a_description_that_is_missing_is_named(tmp_path: Path) -> None:
    """Of a checkpoint, or of the metric."""
    run = write_wenet(tmp_path / "run", OLD)
    (run / "1.yaml").unlink()
    assert "1.pt: has no .yaml with metrics, unlike others" in refusal(run, best=1)
    (run / "1.yaml").write_text("epoch: 1\n")
    assert "1.yaml: has no cv_loss; leave" in refusal(run, best=1)
    (run / "1.yaml").write_bytes(b"#" * (1 << 20) + b"\ncv_loss: 1\n")
    assert "1.yaml: is too large" in refusal(run, best=1)


def test_speechbrain_folders_are_found_and_ordered_by_date(tmp_path: Path) -> None:
    """With the epochs of their counters; named as a folder, by a pattern or one by one."""
    run = write_speechbrain(tmp_path / "save")
    folders = [f"CKPT+{date}" for date in DATES]
    files = [run / folder / "model.ckpt" for folder in folders]
    for sources in ([run], [str(run / "CKPT*")], [run / one for one in folders[::-1]]):
        selection = select(sources)
        assert names(selection) == folders
        assert epochs(selection) == [8, 9, 10]
    assert [one.path for one in select([str(run / "CKPT*" / "model.ckpt")]).checkpoints] == files
    assert names(select([run / folders[1]])) == folders[1:2]
    assert epochs(survey([run])) == [8, 9, 10]
    assert names(select([run], from_epoch=9)) == folders[1:]
    assert names(select([run / one for one in folders[::-1]], order="given")) == folders[::-1]


@pytest.mark.parametrize("counters", [(), ("8", "8", "9"), ("8", "x", "10")])
def test_without_rising_epochs_the_dates_give_the_order(
    tmp_path: Path, counters: Sequence[str]
) -> None:
    """As within an epoch, or without a counter; the checkpoints are equally far apart then."""
    run = write_speechbrain(tmp_path / "save", counters=counters)
    selection = select([run], last=2)
    assert names(selection) == [f"CKPT+{date}" for date in DATES[1:]]
    assert epochs(selection) == [None, None]
    assert select([run]).positions == (1, 2, 3)


def test_the_only_metric_of_speechbrain_counts(tmp_path: Path) -> None:
    """Of several, one has to be named."""
    assert [metric for _, metric in chosen(write_speechbrain(tmp_path / "one"), best=2)] == [
        5.5,
        4.25,
    ]
    run = write_speechbrain(tmp_path / "two", ACC="0.5")
    assert "CKPT.yaml: has no single metric; choose --monitor from WER, ACC" in refusal(run, best=1)
    assert chosen(run, best=1, monitor="WER") == [(f"CKPT+{DATES[1]}", 4.25)]


def test_parts_of_deepspeed_are_no_checkpoints(tmp_path: Path) -> None:
    """The advice names the files of the weights, where each folder has one."""
    for step in (100, 200):
        folder = tmp_path / "run" / f"global_step{step}"
        folder.mkdir(parents=True)
        make(folder, "mp_rank_00_model_states.pt")
    text = refusal(tmp_path / "run")
    pattern = tmp_path / "run" / "*" / "mp_rank_00_model_states.pt"
    assert f"name all of them with '{pattern}'" in text
    assert epochs(select([str(pattern)])) == [100, 200]
    (part,) = make(folder, "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert reasons(select([folder])) == {part.name: "a part of a checkpoint of DeepSpeed's ZeRO"}
    (folder / "mp_rank_00_model_states.pt").unlink()
    assert "DeepSpeed's ZeRO, in parts; convert each" in refusal(folder)


@given(text=st.text(st.sampled_from("ab:-.0123 \n\te+#{}[]'\"")))
def test_no_description_gives_a_traceback(text: str) -> None:
    """Every value is a number, whatever the text."""
    found: Mapping[str, float] = descriptions.parse(text)
    assert all(isinstance(value, float) for value in found.values())


def test_numbers_of_yaml_are_read() -> None:
    """As YAML 1.1 writes floats, among them those that are never best."""
    found = descriptions.parse("a: .nan\nb: -.inf\nc: 1.0e-05\nd: 3\ne: '3'\nf: true\ng: 1_0\n")
    assert math.isnan(found.pop("a"))
    assert found == {"b": -math.inf, "c": 1e-5, "d": 3.0}
