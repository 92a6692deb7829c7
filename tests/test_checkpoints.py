"""Which files are taken: finding, ordering, restricting and choosing checkpoints by their names."""

from __future__ import annotations

import itertools
import math
import os
import random
import re
import shutil
import socket
import string
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak_cli import checkpoints
from polyak_cli.checkpoints import Selection, directions, metrics, model_files, ordering, select
from polyak_cli.checkpoints import spacing as spacing_module
from polyak_cli.errors import CheckpointError, PolyakError, UsageError

quietly = settings(derandomize=True, deadline=None)

#: What a test may call select() with.
Options = dict[str, Any]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return an empty directory for a run."""
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def make(folder: Path, *names: str) -> list[Path]:
    """Make files of these names, which nobody opens."""
    paths = [folder / name for name in names]
    for path in paths:
        path.write_bytes(b"")
    return paths


def numbered(folder: Path, *epochs: int) -> list[Path]:
    """Make model_<epoch>.h5 for each epoch."""
    return make(folder, *(f"model_{epoch}.h5" for epoch in epochs))


def names(selection: Selection) -> list[str]:
    """Return the names of the chosen files, oldest first."""
    return [one.path.name for one in selection.checkpoints]


def epochs(selection: Selection) -> list[int | None]:
    """Return the epochs of the chosen files, oldest first."""
    return [one.epoch for one in selection.checkpoints]


def reasons(selection: Selection) -> dict[str, str]:
    """Return what was passed over, by file name."""
    return {passed.path.name: passed.reason for passed in selection.passed_over}


def refusal(*sources: str | Path, **options: Any) -> str:
    """Return the message of the error that a choice gives, which is one line and has no gap."""
    with pytest.raises(PolyakError) as caught:
        select(sources, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    assert "None" not in message
    return message


# ---- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("oldest_first", "expected"),
    [
        (["model_9.h5", "model_10.h5"], [9, 10]),
        (["01-0.85.h5", "02-0.80.h5", "10-0.70.h5"], [1, 2, 10]),
        (["cp-0009.h5", "cp-0010.h5"], [9, 10]),
        (["model-v2_epoch2.h5", "model-v2_epoch12.h5"], [2, 12]),
        (["weights.09-0.25.hdf5", "weights.10-0.31.hdf5"], [9, 10]),
        (["weights.9.0.25.hdf5", "weights.10.0.31.hdf5"], [9, 10]),
        (["net3.h5", "net12.h5"], [3, 12]),
        (["epoch=05-val_loss=0.12.h5", "epoch=06-val_loss=1.h5"], [5, 6]),
        (["epoch=3-step=3400.h5", "epoch=4-step=4000.h5"], [3, 4]),
        (["step_400.h5", "step_3400.h5"], [400, 3400]),
        (["1_step400.h5", "1_step3400.h5"], [400, 3400]),
        (["resnet50_9.h5", "resnet50_10.h5"], [9, 10]),
        (["vgg16-2023-01-05_ep5.h5", "vgg16-2023-01-05_ep15.h5"], [5, 15]),
        (["cnn_lr0.001_05.h5", "cnn_lr0.001_06.h5"], [5, 6]),
        (["model_9_of_500.h5", "model_10_of_500.h5"], [9, 10]),
        (["epochs500_epoch3.h5", "epochs500_epoch4.h5"], [3, 4]),
        (["9epochs.h5", "10epochs.h5"], [9, 10]),
        (["netEpoch9.h5", "netEpoch10.h5"], [9, 10]),
        (["Ep 9.H5", "Ep 10.HDF5"], [9, 10]),
        (["acc100_7.h5", "acc85_8.h5"], [7, 8]),
        (["valacc100_7.h5", "valacc85_8.h5"], [7, 8]),
        (["9epochs-net_64.h5"], [9]),
        (["weights-0.25e9.h5", "weights-0.2e10.h5"], [9, 10]),
        (["née5_1.h5", "née5_2.h5"], [1, 2]),
        (["f1_05.h5", "f1_06.h5"], [5, 6]),
        (["model_v1.h5", "model_v2.h5"], [1, 2]),
        (["model_3.weights.h5", "model_4.weights.h5"], [3, 4]),
        (["09--0.25.h5", "10-0.25.h5"], [9, 10]),
        (["9-nan.h5", "10-1.2e-05.h5", "11-inf.h5", "12-1e-05.h5"], [9, 10, 11, 12]),
        (["0.h5", "1.h5"], [0, 1]),
        (["0.6_0.h5", "0.5_1.h5"], [0, 1]),
        (["7_step_400.h5"], [7]),
        (["step400_run9.h5"], [400]),
        (["эпоха 9.h5", "эпоха 10.h5"], [9, 10]),
        (["模型٩.h5", "模型١٠.h5"], [9, 10]),
        (["a (9).h5", "a (10).h5"], [9, 10]),
        (["a\x1b[1m\n_9.h5", "a\x1b[1m\n_10.h5"], [9, 10]),
        ([os.fsdecode(b"\xff_9.h5"), os.fsdecode(b"\xff_10.h5")], [9, 10]),
        (["only_7.h5"], [7]),
        (["model_7_20230105.h5"], [7]),
        (["model_7_seed42.h5"], [7]),
        (["3-f1=0.85.h5"], [3]),
        (["model_7_of_500.h5"], [7]),
        (["model_7_version_2.h5"], [7]),
        (["run3.h5"], [3]),
        (["epochs_7_64.h5"], [7]),
        (["ep7_64.h5"], [7]),
        (["E7_64.h5"], [7]),
        (["r2_05.h5", "r2_06.h5"], [5, 6]),
        (["w.9.0.25.h5", "w.10.1.31.h5"], [9, 10]),
        (["w.9.0.25.9.5.h5", "w.10.1.31.10.4.h5"], [9, 10]),
    ],
)
def test_epochs_are_read_as_people_write_them(
    run: Path, oldest_first: list[str], expected: list[int]
) -> None:
    """A directory is ordered by the epoch in the names, not by the text."""
    make(run, *oldest_first)
    selection = select([run])
    assert names(selection) == oldest_first
    assert epochs(selection) == expected
    assert selection.notes == ()
    assert selection.passed_over == ()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["epoch_3.h5", "epoch_003.h5"], r"epoch_003\.h5 and .*epoch_3\.h5 are both epoch 3"),
        (["3-0.5.h5", "3-0.4.h5"], r"3-0\.4\.h5 and .*3-0\.5\.h5 are both epoch 3"),
        (["epoch=0-step=100.h5", "epoch=0-step=200.h5"], "are both epoch 0"),
        (["best.h5", "model_1.h5"], r"best\.h5: its name has no whole number.*'best\.h5'"),
        (["0.85.h5", "0.80.h5"], "has no whole number"),
        (["a_1.h5", "a_2.h5", "b_3.h5"], r"a_1\.h5 and .*b_3\.h5 look like .*two runs .2 named"),
        (["epoch_3.h5", "model_4.h5"], "two runs"),
        (["model_3.h5", "model_3 (1).h5"], "two runs"),
        (["run1_3.h5", "run2_4.h5"], "two runs"),
        (["fold_1.h5", "fold_2.h5"], "two runs"),
        (["net-v1.2_3.h5", "net-v1.3_4.h5"], "two runs"),
        (["1_epoch2.h5", "2_epoch3.h5"], "two runs"),
        (["1_05.h5", "2_06.h5"], r"/1_05\.h5: 1 and 05 in its name differ .*--epoch-pattern"),
        (["1_05_7.h5", "2_06_8.h5"], r"/1_05_7\.h5: 1, 05 and 7 in .*out with --exclude$"),
        (["epoch1_epoch2.h5", "epoch2_epoch3.h5"], "1 and 2 in its name differ"),
        (["loss_05.h5", "loss_06.h5"], "05 in its name looks like the metric 'loss'"),
    ],
)
def test_an_order_that_is_not_clear_is_refused(run: Path, files: list[str], message: str) -> None:
    """Nothing is guessed: the error names the files and the way out."""
    make(run, *files)
    found = refusal(run)
    assert re.search(message, found)
    assert "--epoch-pattern" in found


WEIGHTS = ["a_3.weights.h5", "a_4.weights.h5"]


@pytest.mark.parametrize("files", [["m_3.h5", "m_4.weights.h5"], ["a_1.h5", "a_2.h5", *WEIGHTS]])
def test_two_kinds_of_files_are_refused(run: Path, files: list[str]) -> None:
    """Which of them is the run is not guessed; the error says how to leave one out."""
    make(run, *files)
    count = len(files) // 2
    message = refusal(run)
    assert message.startswith(f"{run}: holds {count} .h5 and {count} .weights.h5 files, which do")
    assert message.endswith("--exclude '*.weights.h5'")
    ((kind, text, path), *_) = checkpoints.survey(run).problems
    assert (kind, path, text) == ("other run", run, message)
    chosen = select([run], exclude=["*.weights.h5"]).checkpoints
    assert [checkpoint.path.name for checkpoint in chosen] == files[: len(chosen)]
    make(run, "m_1.npz", "m_2.npz", "m_5.h5", "m_6.weights.h5", "m_7.weights.h5")
    assert ".npz files, which do not belong to one run" in refusal(run)


def test_a_lone_file_of_another_kind_is_passed_over(run: Path) -> None:
    """A data set beside the checkpoints is passed over with a reason."""
    make(run, "m_1.h5", "m_2.hdf5", "data.npz")
    selection = select([run])
    assert len(selection.checkpoints) == 2
    assert reasons(selection) == {"data.npz": "the only .npz file among 2 .h5"}


@quietly
@given(
    before=st.text(alphabet="modelcnt", min_size=1, max_size=8),
    joint=st.sampled_from(["", "_", "-", " ", "=", "_epoch", "-ep=", "_E", "."]),
    width=st.integers(1, 4),
    after=st.sampled_from(["", "-{:.2f}", "_val_loss={:.3f}", "-{}", "_acc{:.1f}", "-lr{:.0e}"]),
    found=st.sets(st.integers(0, 20_000), min_size=2, max_size=12),
    metric=st.floats(-100, 100).filter(lambda value: "." in repr(value)),
    shuffle=st.randoms(use_true_random=False),
)
def test_any_usual_way_of_writing_an_epoch_is_read(
    before: str,
    joint: str,
    width: int,
    after: str,
    found: set[int],
    metric: float,
    shuffle: random.Random,
) -> None:
    """Whatever word, separator, padding and metric stand around it, the epoch is found."""
    if before.endswith("e") and not joint:
        before += "x"
    written = {f"{before}{joint}{e:0{width}d}{after.format(metric)}.h5": e for e in found}
    given_names = list(written)
    shuffle.shuffle(given_names)
    assert ordering._read_epochs([Path(name) for name in given_names]) == [
        written[name] for name in given_names
    ]


@quietly
@given(st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=5))
@pytest.mark.slow
def test_no_name_makes_the_reader_fail_otherwise(stems: list[str]) -> None:
    """Whatever the names, there are epochs for all of them or a one-line error."""
    paths = [Path(f"{stem}.h5") for stem in stems if not set(stem) & {"/", "\0"}]
    answer: object = None
    try:
        answer = len(ordering._read_epochs(paths)) if paths else 0
    except CheckpointError as error:
        answer = str(error)
    assert answer == len(paths) or (isinstance(answer, str) and answer.isprintable())


# ---- --epoch-pattern -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [r"_(\d+)_", r"\d+(?=_)", r"_(?P<epoch>\d+)_(\d+)", r"(\w)_(?P<epoch>\d+)", r"(\d+)_(\d)"],
)
def test_the_epoch_pattern_says_where_the_epoch_is(run: Path, pattern: str) -> None:
    """The group epoch, else the first, else the whole match counts; the rest may differ."""
    make(run, "a_9_77.h5", "b_10_66.h5")
    assert epochs(select([run], epoch_pattern=pattern)) == [9, 10]


def test_the_epoch_pattern_works_for_files_named_one_by_one(run: Path) -> None:
    """Their order stays as given, and their epochs come from the pattern."""
    older, newer = make(run, "a_1_5.h5", "a_2_6.h5")
    assert epochs(select([older, newer], epoch_pattern=r"(\d+)\.h5$")) == [5, 6]


def test_the_epoch_pattern_sees_the_whole_file_name(run: Path) -> None:
    """The example that the error messages give works as it stands."""
    make(run, "1_05.h5", "2_06.h5")
    assert r"'(\d+)\.h5$'" in refusal(run)
    assert epochs(select([run], epoch_pattern=r"(\d+)\.h5$")) == [5, 6]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", r"^--epoch-pattern '\(' is not a regular expression: missing \)"),
        ("a{99999999999999999999}", "is not a regular expression"),
        (r"x(\d+)", r"model_1\.h5: --epoch-pattern .* matches nothing in its name: correct"),
        (r"(mod)el", r"model_1\.h5: --epoch-pattern '\(mod\)el' finds 'mod' in its name"),
        (r"model_(y)?", "finds no epoch in its name"),
    ],
)
def test_an_epoch_pattern_that_finds_no_number_is_refused(
    run: Path, pattern: str, message: str
) -> None:
    """A bad pattern, no match, and a match that is no whole number are errors."""
    numbered(run, 1)
    assert re.search(message, refusal(run, epoch_pattern=pattern))


# ---- what is in a directory ------------------------------------------------------------------


def test_what_is_no_checkpoint_is_passed_over_with_a_reason(run: Path) -> None:
    """Hidden, unfinished and foreign files and subdirectories are reported with the reason."""
    numbered(run, 1)
    make(run, "model_2.h5")
    make(run, ".model_2.h5", "model_3.tmp.h5", "model_4.h5.part", "model_5.h5~", "tmp.h5")
    make(run, "training.csv", "README", "model_6.keras")
    (run / "logs").mkdir()
    selection = select([run])
    assert names(selection) == ["model_1.h5", "model_2.h5"]
    assert reasons(selection) == {
        ".model_2.h5": "hidden",
        "README": "not named like a checkpoint",
        "logs": "a directory",
        "model_3.tmp.h5": "unfinished, by its name",
        "model_4.h5.part": "unfinished, by its name",
        "model_5.h5~": "unfinished, by its name",
        "model_6.keras": "the only .keras file among 2 .h5",
        "tmp.h5": "unfinished, by its name",
        "training.csv": "not named like a checkpoint",
    }


def test_parts_of_checkpoints_are_passed_over_with_a_reason(run: Path) -> None:
    """TensorFlow's shards are named by their index; without it they are reported."""
    make(run, "m-1.index", "m-1.data-00000-of-00001", "m-2.data-00000-of-00001", "checkpoint")
    make(run, "m-00001-of-00002.safetensors", "tmp-m-3.index", "m-4.index")
    shard = "a data shard of a TensorFlow checkpoint whose .index is not here"
    assert reasons(select([run])) == {
        "m-2.data-00000-of-00001": shard,
        "checkpoint": "TensorFlow's list of checkpoints",
        "m-00001-of-00002.safetensors": "one shard of several, which belong to an index",
        "tmp-m-3.index": "unfinished, by its name",
    }
    passed = [one.path.name for one in checkpoints.survey(run).passed_over]
    assert passed == sorted(passed)


def test_shards_of_weights_are_parts_where_their_table_is_there(run: Path) -> None:
    """Else they look like a run of their own, and nothing says that they are none."""
    make(
        run, "m_1.weights.json", "m_1_00000.weights.h5", "m_1_00001.weights.h5", "m_2.weights.json"
    )
    found = select([run])
    assert names(found) == ["m_1.weights.json", "m_2.weights.json"]
    assert reasons(found) == {
        "m_1_00000.weights.h5": "a part of m_1.weights.json",
        "m_1_00001.weights.h5": "a part of m_1.weights.json",
    }


def test_what_every_source_passed_over_is_reported_in_order(tmp_path: Path, run: Path) -> None:
    """Not only the last one's, and whichever was named first."""
    numbered(run, 1)
    other = tmp_path / "a"
    other.mkdir()
    numbered(other, 2)
    make(run, "run.txt")
    make(other, "a.txt")
    found = select([run, other])
    assert [one.path.name for one in found.passed_over] == ["a.txt", "run.txt"]


def test_tensorflow_s_checkpoints_are_named_by_their_prefix(run: Path) -> None:
    """As `tf.train.Checkpoint` prints it; they are ordered as files are."""
    for epoch in (3, 4):
        make(run, f"ckpt-{epoch}.index", f"ckpt-{epoch}.data-00000-of-00001")
    found = select([run / "ckpt-4", run / "ckpt-3"])
    assert names(found) == ["ckpt-3.index", "ckpt-4.index"]
    assert epochs(found) == [3, 4]
    assert "no such file or directory" in refusal(run / "ckpt-5")


def test_a_directory_is_not_searched_deeper(run: Path) -> None:
    """Checkpoints in subdirectories belong to other runs."""
    numbered(run, 1)
    (run / "old").mkdir()
    numbered(run / "old", 2)
    assert names(select([run])) == ["model_1.h5"]


def test_our_own_averages_are_passed_over(run: Path) -> None:
    """What the caller recognises as written by polyak is not averaged again."""
    numbered(run, 1, 2)
    make(run, "final.h5", "notes.txt")
    asked: list[Path] = []

    def ours(paths: Sequence[Path]) -> list[Path]:
        asked.extend(paths)
        return [path for path in paths if path.name == "final.h5"]

    selection = select([run], find_polyak_outputs=ours)
    assert names(selection) == ["model_1.h5", "model_2.h5"]
    assert reasons(selection)["final.h5"] == "written by polyak"
    assert sorted(path.name for path in asked) == ["final.h5", "model_1.h5", "model_2.h5"]


def test_a_file_named_by_itself_is_meant(run: Path) -> None:
    """Neither its suffix nor who wrote it keeps a file out that was named by itself."""
    paths = make(run, "final.h5", "weights.bin", ".hidden.h5", "model.tmp")
    selection = select(paths, find_polyak_outputs=lambda given: given)
    assert names(selection) == [path.name for path in paths]
    assert epochs(selection) == [None] * 4


def test_an_average_named_beside_checkpoints_needs_confirmation(run: Path) -> None:
    """A shell's glob names an average in the folder too; only --order given says it is meant."""
    one, two, final = [*numbered(run, 1, 2), *make(run, "final.h5")]

    def ours(paths: Sequence[Path]) -> list[Path]:
        return [path for path in paths if path.name == "final.h5"]

    message = refusal(final, one, two, find_polyak_outputs=ours)
    assert message.startswith(f"{final} is an average that polyak wrote")
    assert "leave it out with --exclude 'final.h5'" in message
    assert refusal(run / "model_*.h5", final, find_polyak_outputs=ours) == message
    kept = select([final, one, two], find_polyak_outputs=ours, exclude=["final.h5"])
    assert names(kept) == ["model_1.h5", "model_2.h5"]
    meant = select([final, one, two], find_polyak_outputs=ours, order="given")
    assert names(meant) == ["final.h5", "model_1.h5", "model_2.h5"]
    assert names(select([final], find_polyak_outputs=ours)) == ["final.h5"]
    found = checkpoints.survey([final, one, two], find_polyak_outputs=ours)
    assert (epochs(found), reasons(found)) == ([1, 2], {"final.h5": "written by polyak"})
    assert [(problem.kind, problem.path) for problem in found.problems] == [("other run", final)]


def test_the_only_checkpoint_of_a_run_needs_no_exclusion(run: Path) -> None:
    """Keras's save_best_only keeps one file without an epoch; without it nothing would be left."""
    (best,) = make(run, "best.keras")
    message = refusal(run)
    assert message.startswith(f"{best}: is the only checkpoint, and its name has no epoch")
    assert "save_best_only=False" in message
    assert "--exclude" not in message
    assert [problem.text for problem in checkpoints.survey([run]).problems] == [message]


@pytest.mark.parametrize("pattern", ["best*", "*/run/best_*", "*[t].h5"])
def test_exclude_matches_names_and_whole_paths(run: Path, pattern: str) -> None:
    """An excluded file is passed over, and the reason is the pattern."""
    numbered(run, 1, 2)
    make(run, "best_est.h5")
    selection = select([run], exclude=[pattern])
    assert names(selection) == ["model_1.h5", "model_2.h5"]
    assert reasons(selection) == {"best_est.h5": f"--exclude '{pattern}'"}
    assert selection.notes == ()


def test_exclude_holds_for_files_named_one_by_one(run: Path) -> None:
    """The shell may have expanded the pattern that named them."""
    paths = [*make(run, "best.h5"), *numbered(run, 1, 2)]
    assert names(select(paths, exclude=["best*"])) == ["model_1.h5", "model_2.h5"]
    assert "--exclude matches every file" in refusal(*paths, exclude=["*"])


def test_exclude_that_matches_nothing_is_noted(run: Path) -> None:
    """A pattern that was mistyped does not go unnoticed; matching is by case."""
    numbered(run, 1)
    assert select([run], exclude=["Model_1*"]).notes == ("--exclude 'Model_1*' matched nothing",)


def test_exclude_gets_round_what_would_be_an_error(run: Path) -> None:
    """A pipe that is named like a checkpoint can be left out."""
    numbered(run, 1)
    os.mkfifo(run / "model_2.h5")
    assert names(select([run], exclude=["model_2.h5"])) == ["model_1.h5"]


# ---- sources ---------------------------------------------------------------------------------


def test_an_empty_directory_is_an_error(run: Path) -> None:
    """The error names the directory and says what was looked for."""
    message = refusal(run)
    assert message.startswith(
        f"{run}: there is no checkpoint here: looked for files in .weights.h5"
    )
    assert "looked for files in .weights.h5, .weights.json, .h5, .hdf5, " in message
    assert ".ckpt, .pth.tar, .bin.index.json, .index, but the folder is empty" in message


def test_an_error_names_the_folders_that_hold_checkpoints(run: Path) -> None:
    """Where a folder has none, but those in it do; how many are told for a few."""
    for folder, count in (("a", 2), ("b", 1), ("empty", 0), ("text", 0), ("d", 3), ("e", 1)):
        (run / folder).mkdir()
        make(run / folder, *(f"model_{k}.h5" for k in range(count)))
    make(run / "text", "notes.txt")
    some = f"{run / 'a'} (2), {run / 'b'} (1), {run / 'd'} (3) and 1 more hold checkpoints"
    assert refusal(run) == f"{run}: there is no checkpoint here, but {some}; name one of them"
    for folder in "bde":
        shutil.rmtree(run / folder)
    assert refusal(run).endswith(f"but {run / 'a'} holds 2 checkpoints; name that folder")


@pytest.mark.parametrize("text", ["ftp://bucket/run", "s3:/b/r", "s3://"])
def test_a_text_that_is_no_url_to_read_is_refused(
    text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another scheme, no bucket, and a URL that a Path has taken a slash from are named."""
    monkeypatch.chdir(tmp_path)
    expected = {
        "ftp://bucket/run": "ftp:// is not supported; expected a path or one of s3://, gs://, az:/",
        "s3:/b/r": "is a URL with one slash, as pathlib.Path makes it; give URLs as texts, like s3",
        "s3://": "expected the name of a bucket after s3://",
    }[text]
    with pytest.raises(UsageError) as caught:
        select([text])
    assert str(caught.value).startswith(f"{text}: {expected}")
    if text == "s3:/b/r":  # a folder may well have such a name
        (tmp_path / "s3:/b/r").mkdir(parents=True)
        make(tmp_path / "s3:/b/r", "model_1.h5")
        assert names(select([text])) == ["model_1.h5"]


def test_a_foreign_directory_is_an_error_that_says_what_was_there(run: Path) -> None:
    """The error tells the first few files that were passed over, and how many more."""
    make(run, *(f"{letter}.txt" for letter in "abcde"))
    reason = "(not named like a checkpoint)"
    three = f", passed over a.txt {reason}, b.txt {reason}, c.txt {reason}"
    assert refusal(run).endswith(f"{three} and 2 more")
    (run / "e.txt").unlink()
    assert refusal(run).endswith(f"{three} and 1 more")
    (run / "d.txt").unlink()
    assert refusal(run).endswith(three)
    make(run, f"{'a' * 100}.txt")
    assert "a" * 61 not in refusal(run)


def test_each_directory_must_hold_a_checkpoint(tmp_path: Path, run: Path) -> None:
    """One that has none is an error even if another one has some."""
    numbered(run, 1)
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refusal(run, tmp_path / "empty")


def test_a_directory_of_our_averages_only_is_an_error(run: Path) -> None:
    """Nothing is left to average there."""
    make(run, "final.h5")
    assert "final.h5 (written by polyak)" in refusal(run, find_polyak_outputs=lambda given: given)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "nowhere: no such file or directory"),
        ("nowhere/*.h5", "no file matches this pattern"),
        ("", "is not a path"),
        ("a\0b", "is not a path"),
        ("x" * 5000, "cannot be used"),
        ("file.h5/", "cannot be used: Not a directory"),
        ("no\x1b]31mwhere", r"no\\x1b\]31mwhere: no such file"),
    ],
)
def test_a_source_that_is_not_there_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    """The error names it, in one printable line."""
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "file.h5")
    with pytest.raises(CheckpointError):
        select([source])
    assert re.search(message, refusal(source))


def test_a_single_string_is_one_source(run: Path) -> None:
    """It is not taken for a sequence of one-letter paths."""
    numbered(run, 1)
    assert names(select(str(run))) == ["model_1.h5"]


def test_no_sources_are_a_usage_error() -> None:
    """An unset variable does not mean the current directory."""
    with pytest.raises(UsageError, match="no checkpoints named"):
        select([])


def test_a_directory_that_cannot_be_listed_is_an_error(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says why, as the system does."""

    def denied(path: str) -> Iterator[os.DirEntry[str]]:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", denied)
    assert "cannot be listed: Permission denied" in refusal(run)


def test_a_pattern_is_ordered_like_a_directory(run: Path) -> None:
    """What it matches is sifted and ordered by epoch."""
    numbered(run, 9, 10)
    make(run, "model_11.txt", "other_1.h5")
    selection = select([f"{run}/model_*"])
    assert epochs(selection) == [9, 10]
    assert reasons(selection) == {"model_11.txt": "not named like a checkpoint"}


def test_a_name_with_brackets_that_exists_is_no_pattern(tmp_path: Path) -> None:
    """A directory called run[1] is that directory."""
    folder = tmp_path / "run[1]"
    folder.mkdir()
    numbered(folder, 1)
    assert names(select([folder])) == ["model_1.h5"]
    (tmp_path / "link[1].h5").symlink_to("gone.h5")
    assert "link to a file that does not exist" in refusal(tmp_path / "link[1].h5")


def test_the_advice_to_exclude_works_for_any_name(run: Path) -> None:
    """Brackets in a name are written so that the pattern means them."""
    make(run, "best[x].h5", "model_1.h5")
    pattern = "best[[]x].h5"
    assert f"--exclude '{pattern}'" in refusal(run)
    assert names(select([run], exclude=[pattern])) == ["model_1.h5"]


def test_files_keep_the_order_given(run: Path) -> None:
    """With --order given the first is the oldest, whatever its epoch; else a note says so."""
    ten, nine = numbered(run, 10, 9)
    selection = select([ten, nine], order="given")
    assert (epochs(selection), selection.notes) == ([10, 9], ())
    assert selection.positions == (1.0, 2.0)
    selection = select([ten, nine])
    assert epochs(selection) == [9, 10]
    assert selection.notes == (
        f"the files are sorted by epoch, from {nine} (epoch 9) to {ten} (epoch 10), not "
        "in the order given; keep the order given, oldest first, with --order given",
    )
    zero, one = numbered(run, 0, 1)
    assert select([zero, one]).notes == ()
    (again,) = make(run, "model_00.h5")
    twice = select([zero, again])
    assert "(epoch 0) comes before" in twice.notes[0]
    assert twice.positions == (1.0, 2.0)


def in_folders(run: Path, *names: str, file: str = "weights.npz") -> list[Path]:
    """Make a file of one name in each folder, and return them as a shell sorts them."""
    for name in names:
        (run / name).mkdir(parents=True)
        make(run / name, file)
    return [run / name / file for name in sorted(names)]


STEPS = [f"checkpoint-{step}" for step in (500, 1000, 1500, 2000)]


def test_files_of_one_name_are_ordered_by_their_folders(run: Path) -> None:
    """A shell gives checkpoint-500 last; a quoted pattern and a survey have the same order."""
    paths = in_folders(run, *STEPS)
    found = select(paths, last=2)
    assert epochs(found) == [1500, 2000]
    assert "not in the order given" in found.notes[0]
    assert epochs(select(paths, order="given")) == [1000, 1500, 2000, 500]
    assert epochs(select([f"{run}/checkpoint-*/weights.npz"])) == [500, 1000, 1500, 2000]
    assert epochs(checkpoints.survey(paths, last=2)) == [1500, 2000]
    assert epochs(select(paths, epoch_pattern=r"checkpoint-(\d+)")) == [500, 1000, 1500, 2000]
    assert select([paths[-1], *paths[:-1]]).notes == ()


@pytest.mark.parametrize(
    ("folders", "found"),
    [
        ([*STEPS, "checkpoint-final"], "has no number, unlike others: leave it out with --exclude"),
        (["a1/checkpoint-20", "a2/checkpoint-3"], "several of their folders differ"),
    ],
)
def test_folders_that_tell_no_order_are_refused(run: Path, folders: list[str], found: str) -> None:
    """The error names --order given, which is the way to go on; a survey reports the same."""
    paths = in_folders(run, *folders)
    message = refusal(*paths)
    assert found in message
    assert message.endswith("or keep the order given, oldest first, with --order given")
    assert [one.path for one in select(paths, order="given").checkpoints] == paths
    assert [problem.kind for problem in checkpoints.survey(paths).problems] == ["no epoch"]


@pytest.mark.parametrize("folders", [["a", "b"], ["seed_10", "seed_2"], ["version_1", "version_0"]])
def test_folders_of_other_runs_say_nothing_of_the_order(run: Path, folders: list[str]) -> None:
    """Seeds, versions and words are no epochs, so the order given counts."""
    paths = in_folders(run, *folders)[::-1]
    found = select(paths)
    assert [one.path for one in found.checkpoints] == paths
    assert epochs(found) == [None, None]


def test_files_of_which_one_has_no_number_are_not_ordered_as_text(run: Path) -> None:
    """epoch_10 before epoch_2 is refused where final.h5 has no place among them."""
    paths = make(run, "epoch_1.h5", "epoch_10.h5", "epoch_2.h5", "final.h5")
    assert "final.h5: its name has no number, and the others" in refusal(*paths)
    assert epochs(select(paths, order="given")) == [1, 10, 2, None]


def test_files_in_order_need_no_note(run: Path) -> None:
    """Rising epochs, and files without any, are as they should be."""
    paths = [*make(run, "first.h5"), *numbered(run, 9, 10), *make(run, "final.h5")]
    selection = select(paths)
    assert epochs(selection) == [None, 9, 10, None]
    assert selection.notes == ()


def test_files_beside_a_directory_are_ordered_with_it(tmp_path: Path, run: Path) -> None:
    """As soon as one source is a directory, all are ordered by epoch."""
    numbered(run, 9, 11)
    (ten,) = numbered(tmp_path, 10)
    assert epochs(select([ten, run])) == [9, 10, 11]
    assert epochs(select([run, ten])) == [9, 10, 11]


# ---- what is no regular file -----------------------------------------------------------------


def link_to_itself(path: Path) -> None:
    """Make a symbolic link that leads to itself."""
    path.symlink_to(path.name)


def dangling_link(path: Path) -> None:
    """Make a symbolic link to nothing."""
    path.symlink_to("gone.h5")


def named_socket(path: Path) -> None:
    """Make a socket, by a short path because the system limits its length."""
    with socket.socket(socket.AF_UNIX) as made:
        here = Path.cwd()
        os.chdir(path.parent)
        try:
            made.bind(path.name)
        finally:
            os.chdir(here)


def device_link(path: Path) -> None:
    """Make a link to a device that never ends."""
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("put", "kind"),
    [
        (Path.mkdir, "a directory"),
        (os.mkfifo, "a named pipe"),
        (named_socket, "a socket"),
        (device_link, "a character device"),
        (link_to_itself, "a symbolic link to itself"),
        (dangling_link, "a symbolic link to a file that does not exist"),
    ],
)
def test_what_is_named_like_a_checkpoint_but_is_no_file_is_an_error(
    run: Path, put: Callable[[Path], None], kind: str
) -> None:
    """It is named, not opened; a pipe would hold the program up for ever."""
    numbered(run, 1)
    odd = run / "model_2.h5"
    put(odd)
    assert f"{odd} is {kind}" in refusal(run)
    assert "--exclude 'model_2.h5'" in refusal(run)
    if put is not Path.mkdir:
        assert f"{odd} is {kind}" in refusal(odd)


def test_an_empty_file_is_left_to_those_who_read_it(run: Path) -> None:
    """Zero bytes are no reason to drop a checkpoint silently."""
    (path,) = numbered(run, 1)
    assert path.stat().st_size == 0
    assert names(select([run])) == ["model_1.h5"]


@pytest.mark.parametrize("link", ["symbolic", "hard"])
def test_one_file_under_two_names_is_an_error(run: Path, link: str) -> None:
    """A link would count a checkpoint twice; the error says which to exclude."""
    (path,) = numbered(run, 1)
    other = run / "latest_2.h5"
    other.symlink_to(path.name) if link == "symbolic" else other.hardlink_to(path)
    message = refusal(run)
    assert str(path) in message
    assert str(other) in message
    assert "are the same file" in message
    if link == "hard":  # neither is the link: the later one is as good as the other
        assert message.endswith("--exclude 'model_1.h5'")
    if link == "symbolic":
        assert "--exclude 'latest_2.h5'" in message
        assert names(select([run], exclude=["latest_2.h5"])) == ["model_1.h5"]


def test_one_file_named_twice_is_an_error(run: Path) -> None:
    """So is a file that is also in a directory given."""
    (path,) = numbered(run, 1)
    assert f"{path} is given twice" in refusal(path, path)
    assert "is given twice" in refusal(run, path)


def test_the_advice_leaves_out_one_of_two_equal_names(tmp_path: Path, run: Path) -> None:
    """Two links of one name in two directories are distinguished by their whole paths."""
    (path,) = numbered(run, 1)
    other = tmp_path / "model_1.h5"
    other.symlink_to(path)
    assert f"--exclude '{other}'" in refusal(path, other)
    assert [one.path for one in select([path, other], exclude=[str(other)]).checkpoints] == [path]


def test_folders_that_are_checkpoints_stand_for_their_files(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their names tell the epoch, whether they or what is in them is named."""
    folders = [run / f"checkpoint-{step}" for step in (90, 100)]
    for folder in folders:
        folder.mkdir()
        make(folder, "model.safetensors", "training_args.bin", "other.safetensors")
    found = select([run])
    assert [one.path for one in found.checkpoints] == folders
    assert epochs(found) == [90, 100]
    assert [one.path for one in select([f"{run}/*/model.safetensors"]).checkpoints] == folders
    assert [one.path for one in select([folders[1] / "model.safetensors"]).checkpoints] == [
        folders[1]
    ]
    other = folders[1] / "other.safetensors"
    assert [one.path for one in select([other]).checkpoints] == [other]
    assert "other.safetensors: each name has no whole number" in refusal(folders[0])
    (folders[0] / "other.safetensors").unlink()
    assert [one.path for one in select([folders[0]]).checkpoints] == [folders[0]]
    monkeypatch.chdir(folders[0])
    assert [one.path for one in select(["model.safetensors"]).checkpoints] == [
        Path("model.safetensors")
    ]
    (final,) = make(run, "model.safetensors")  # beside the folders of its run
    found = select([run])
    assert [one.path for one in found.checkpoints] == folders
    assert reasons(found) == {final.name: "the only .safetensors file among 2 checkpoint folders"}
    make(run, "model_2.safetensors")
    kinds = f"{run}: holds 2 .safetensors and 2 checkpoint folders, which do not belong to one run"
    assert refusal(run).startswith(kinds)
    assert refusal(run).endswith("--exclude '*.safetensors'")
    numbered(run, 1, 2)
    alone = select([run], exclude=["checkpoint-90", "*.safetensors"])
    assert reasons(alone)["checkpoint-100"] == "the only folder among 2 .h5"
    for path in (*run.glob("*.h5"), run / "model_2.safetensors"):
        path.unlink()
    make(folders[0], "adapter_model.safetensors")
    two = "holds model.safetensors and adapter_model.safetensors, and either could be"
    assert f"{folders[0]}: {two}" in refusal(run)


def test_a_folder_that_is_a_checkpoint_has_its_name_from_wherever_it_is_seen(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named as it was given, and by its own name where that was only a dot or two."""
    for step in (90, 100):
        (run / f"checkpoint-{step}").mkdir()
        make(run / f"checkpoint-{step}", "model.safetensors")
    monkeypatch.chdir(run)
    found = select(["checkpoint-100", "checkpoint-90"])
    assert [one.path for one in found.checkpoints] == [
        Path("checkpoint-90"),
        Path("checkpoint-100"),
    ]
    (run / "checkpoint-90/logs").mkdir()
    monkeypatch.chdir(run / "checkpoint-90/logs")
    assert epochs(select([".."])) == [90]
    monkeypatch.chdir(run / "checkpoint-90")
    assert epochs(select(["."])) == [90]


# ---- surveys ---------------------------------------------------------------------------------


def test_a_survey_tells_what_a_choice_would_refuse(run: Path) -> None:
    """Each problem is reported with its file; every readable checkpoint is kept, in order."""
    numbered(run, 1, 2, 3)
    make(run, "model_02.h5", "other.h5", "net_7.h5")
    (run / "model_8.h5").symlink_to("model_3.h5")
    (run / "model_9.h5").symlink_to("gone.h5")
    found = checkpoints.survey(run)
    assert sorted((one.kind, one.path.name) for one in found.problems) == [
        ("duplicate epoch", "model_2.h5"),
        ("no epoch", "other.h5"),
        ("other run", "net_7.h5"),
        ("same file", "model_8.h5"),
        ("unreadable", "model_9.h5"),
    ]
    texts = {one.kind: one.text for one in found.problems}
    assert texts["duplicate epoch"].startswith(
        f"{run / 'model_02.h5'} and {run / 'model_2.h5'} are both epoch 2: leave one out with"
    )
    assert texts["other run"].startswith(
        f"{run / 'net_7.h5'} seems to belong to another run than {run / 'model_02.h5'} (5 "
        "are named like this one): leave one kind out with --exclude, or say where the epoch is"
    )
    assert texts["no epoch"].startswith(f"{run / 'other.h5'}: its name has no whole number")
    assert epochs(found) == [None, 1, 2, 2, 3, 7, 9]
    assert not any("None" in text for text in texts.values())


def test_a_survey_can_be_restricted(run: Path) -> None:
    """By epoch, to the newest, by exclusion and with a pattern; the rest troubles nobody."""
    paths = [*make(run, "other.h5"), *numbered(run, 1, 2, 3, 4)]
    survey = checkpoints.survey
    assert epochs(survey([run])) == [None, 1, 2, 3, 4]
    found = survey([run], from_epoch=2, to_epoch=3)
    assert epochs(found) == [None, 2, 3]
    assert [path.name for path in found.left_out] == ["model_1.h5", "model_4.h5"]
    found = survey([run], last=2)
    assert (epochs(found), found.problems, found.thinned) == ([3, 4], (), False)
    assert found.left_out == tuple(paths[:3])
    assert found.positions == (3.0, 4.0)
    found = survey([run], exclude=["other.h5", "model_2.h5"])
    assert (epochs(found), found.problems, found.thinned) == ([1, 3, 4], (), True)
    assert reasons(found) == {
        "other.h5": "--exclude 'other.h5'",
        "model_2.h5": "--exclude 'model_2.h5'",
    }
    assert not survey([run], exclude=["other.h5"]).thinned
    found = survey([run], epoch_pattern=r"_(\d)")
    assert epochs(found) == [None, 1, 2, 3, 4]
    ((kind, text, path),) = found.problems
    assert (kind, path) == ("no epoch", paths[0])
    assert text.startswith(f"{paths[0]}: --epoch-pattern '_(\\d)' matches nothing")
    assert epochs(survey([paths[4], paths[1]])) == [1, 4]
    assert epochs(survey([paths[0]], from_epoch=2)) == [None]
    assert epochs(survey([paths[4], paths[0], paths[1]])) == [4, None, 1]
    assert survey([run], exclude=["x*"]).notes == ("--exclude 'x*' matched nothing",)
    ours = survey([run], find_polyak_outputs=lambda _: [run / "other.h5"])
    assert reasons(ours) == {"other.h5": "written by polyak"}
    assert (epochs(ours), ours.thinned) == ([1, 2, 3, 4], False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"last": 0}, "--last is 0"),
        ({"last": 4}, "--last 4, but there are only 3 checkpoints"),
        ({"last": 2, "from_epoch": 3}, "only 1 checkpoint .*after the other options, out of 3"),
        ({"exclude": ["*_*"]}, "there is no checkpoint here"),
        ({"from_epoch": 3, "to_epoch": 2}, "--from 3 is after --to 2"),
        ({"from_epoch": 9}, "--from 9: no checkpoint has such an epoch"),
        ({"epoch_pattern": "("}, "is not a regular expression"),
    ],
)
def test_a_survey_of_nothing_is_refused(run: Path, options: Options, message: str) -> None:
    """As a choice is."""
    numbered(run, 1, 2, 3)
    with pytest.raises(PolyakError, match=message):
        checkpoints.survey([run], **options)


def test_the_run_of_a_survey_is_the_largest_and_then_the_longest(run: Path) -> None:
    """Of two as large, that which goes on longest; names whose epoch is not clear are a run too."""
    make(run, "a_1.h5", "a_2.h5", "b_1.h5", "b_3.h5")
    found = checkpoints.survey(run)
    assert {one.path.name for one in found.problems} == {"a_1.h5", "a_2.h5"}
    assert {one.kind for one in found.problems} == {"other run"}
    make(run, "c_1_5.h5", "c_2_6.h5", "c_3_7.h5")
    found = checkpoints.survey(run, exclude=["a_*"])
    kinds = {(one.kind, one.path.name) for one in found.problems}
    assert kinds == {("no epoch", "c_1_5.h5"), ("other run", "b_1.h5"), ("other run", "b_3.h5")}
    assert epochs(found) == [None, None, None, 1, 3]
    assert "1 and 5 in its name differ" in found.problems[0].text
    make(run, "d_1.h5", "d_2.h5", "d_3.h5")
    found = checkpoints.survey(run, exclude=["a_*"])
    others = [one for one in found.problems if one.kind == "other run"]
    assert sorted(one.path.name[0] for one in others) == ["b", "b", "c", "c", "c"]
    assert all(f"another run than {run / 'd_1.h5'} (3 are" in one.text for one in others)
    make(run, "5_epoch1.h5", "5_epoch2.h5", "6_epoch3.h5")
    found = checkpoints.survey(run, exclude=["[a-d]_*"])
    assert [one.path.name for one in found.problems] == ["6_epoch3.h5"]


# ---- restrictions ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        ({"last": 3}, [8, 9, 10]),
        ({"last": 10}, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        ({"from_epoch": 9}, [9, 10]),
        ({"to_epoch": 2}, [1, 2]),
        ({"from_epoch": 3, "to_epoch": 3}, [3]),
        ({"from_epoch": 0, "to_epoch": 99}, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        ({"every": 4}, [2, 6, 10]),
        ({"every": 99}, [10]),
        ({"every": 3, "last": 2}, [7, 10]),
        ({"to_epoch": 9, "every": 3, "last": 2}, [6, 9]),
        ({"exclude": ["model_10.h5"], "every": 3, "last": 2}, [6, 9]),
        ({"min_spacing": 4}, [2, 6, 10]),
        ({"min_spacing": 4, "last": 2}, [6, 10]),
        ({"every": 3, "min_spacing": 4}, [4, 10]),
        ({"min_spacing": 99}, [10]),
        ({"target_count": 4}, [1, 4, 7, 10]),
        ({"target_count": 1}, [10]),
        ({"target_count": 10}, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        ({"last": 7, "target_count": 3}, [4, 7, 10]),
        ({"growing": True, "target_count": 11}, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
    ],
)
def test_restrictions_apply_in_their_order(
    run: Path, options: Options, expected: list[int]
) -> None:
    """Exclude, from and to, every (back from the newest), min-spacing, last, target-count."""
    numbered(run, *range(1, 11))
    assert epochs(select([run], **options)) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"last": 4},
            "--last 4, but there are only 3 checkpoints (epochs 1 to 3); ask for fewer, or name "
            "more files",
        ),
        (
            {"last": 2, "from_epoch": 3},
            "there is only 1 checkpoint (epoch 3) after the other options, out of 3; ask for",
        ),
        ({"to_epoch": 0}, "--to 0: no checkpoint has such an epoch; found 3 checkpoints"),
        ({"from_epoch": 4}, "--from 4: no checkpoint has such an epoch; found 3 checkpoints"),
        ({"from_epoch": -5, "to_epoch": 0}, "--from -5 --to 0: no checkpoint"),
        (
            {"last": 2, "target_count": 3},
            "--target-count 3, but there are only 2 checkpoints (epochs 2 to 3) to choose from",
        ),
    ],
)
def test_fewer_than_asked_are_an_error(run: Path, options: Options, message: str) -> None:
    """Ten never quietly become seven; the error says how many there are."""
    numbered(run, 1, 2, 3)
    with pytest.raises(CheckpointError):
        select([run], **options)
    assert message in refusal(run, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"last": 0}, "--last is 0; expected at least 1"),
        ({"every": 0}, "--every is 0"),
        ({"best": -1}, "--best is -1"),
        ({"min_spacing": 0}, "--min-spacing is 0; expected at least 1"),
        ({"target_count": 0}, "--target-count is 0; expected at least 1"),
        ({"best_by": "lifespan"}, "--best-by belongs to --best N"),
        ({"best": 1, "best_by": "age"}, "--best-by is age; expected one of value, lifespan"),
        ({"from_epoch": 3, "to_epoch": 2}, "--from 3 is after --to 2"),
        ({"monitor": "val_loss"}, "--monitor belongs to --best N"),
        ({"mode": "min"}, "--mode belongs to --best"),
        ({"log": "training.csv"}, "--log belongs to --best"),
        ({"log_first": 0}, "--log-first belongs to --best N"),
        ({"best": 1, "log_first": 0}, "--log-first belongs to --log CSV"),
        ({"best": 1, "log": "a.csv", "log_first": 2}, "--log-first is 2; expected 0 or 1"),
        ({"best": 1, "mode": "low"}, "--mode is 'low'; expected min or max"),
        ({"best": 1, "monitor": " "}, "--monitor is empty"),
        ({"best": 1, "monitor": "lr"}, "--monitor lr: its name does not say"),
    ],
)
def test_arguments_that_contradict_are_refused(run: Path, options: Options, message: str) -> None:
    """They are usage errors, before any file is looked at."""
    with pytest.raises(UsageError):
        select([run], **options)
    assert message in refusal(run, **options)


def test_from_and_to_need_epochs(run: Path) -> None:
    """A file without a number in its name cannot be placed between two epochs."""
    paths = [*make(run, "first.h5"), *numbered(run, 2)]
    assert "first.h5: --from and --to needs the epoch" in refusal(*paths, to_epoch=2)


def test_positions_are_epochs_counted_from_one(run: Path) -> None:
    """The position of a checkpoint is how far into the run it was saved."""
    numbered(run, 2, 5, 9)
    assert select([run], last=2).positions == (5.0, 9.0)


def test_positions_of_a_run_that_counts_from_zero_are_one_more(run: Path) -> None:
    """An epoch 0 anywhere in the run, chosen or not, moves all of them."""
    numbered(run, 0, 5, 9)
    assert select([run], last=2).positions == (6.0, 10.0)
    assert select([run]).positions == (1.0, 6.0, 10.0)


def test_positions_without_epochs_are_counted(run: Path) -> None:
    """Files that do not all tell an epoch stand at 1, 2, 3."""
    assert select([*numbered(run, 7), *make(run, "final.h5")]).positions == (1.0, 2.0)


@quietly
@given(
    found=st.sets(st.integers(0, 60), min_size=1),
    first=st.none() | st.integers(0, 60),
    final=st.none() | st.integers(0, 60),
    every=st.integers(1, 7),
    last=st.none() | st.integers(1, 10),
)
def test_restrictions_equal_plain_list_arithmetic(
    found: set[int], first: int | None, final: int | None, every: int, last: int | None
) -> None:
    """The chosen epochs are those of a list comprehension, or there is an error."""
    ordered = [checkpoints.Checkpoint(Path(f"{e}.h5"), e, None) for e in sorted(found)]
    inside = [e for e in sorted(found) if (first or 0) <= e <= (60 if final is None else final)]
    expected = [e for i, e in enumerate(inside) if (len(inside) - 1 - i) % every == 0]
    try:
        within = ordering.restrict_epochs(ordered, first, final)
        chosen = ordering.take_newest(within[::-1][::every][::-1], last, len(ordered))
    except CheckpointError:
        assert not expected or len(expected) < (last or 0)
    else:
        assert [one.epoch for one in chosen] == expected[-(last or 0) :]


# ---- spacing ---------------------------------------------------------------------------------


def test_spacing_says_how_many_it_keeps_and_how_far_apart(run: Path) -> None:
    """The note has the numbers, and those left out are gaps on purpose; nothing left, no note."""
    numbered(run, 0, 64, 128, 130, 192, 256)
    found = select([run], min_spacing=64)
    assert epochs(found) == [0, 64, 128, 192, 256]
    assert found.thinned
    assert found.notes == (
        "--min-spacing 64 keeps 5 of 6 checkpoints (epochs 0 to 256); the other is less than 64 "
        "from the next newer one that is kept",
    )
    assert select([run], min_spacing=2).notes == ()
    assert select([run], target_count=4).notes == (
        "--target-count 4 keeps 4 of 6 checkpoints (epochs 0 to 256), 64 to 126 apart",
    )


def test_spacing_needs_epochs_in_their_order(run: Path) -> None:
    """No distance can be told without an epoch, or between files that are not in order."""
    paths = [*make(run, "first.h5"), *numbered(run, 2)]
    assert "first.h5: --min-spacing needs the epoch" in refusal(*paths, min_spacing=2)
    found = refusal(*numbered(run, 3, 1, 2), min_spacing=1, order="given")
    assert "model_1.h5 (epoch 1) comes after" in found
    assert "leave out --order given" in found
    # So many of them can be taken all the same: then checkpoints are counted.
    several = make(run, "a.h5", "b.h5", "c.h5")
    assert names(select(several, target_count=2)) == ["a.h5", "c.h5"]


@quietly
@given(found=st.sets(st.integers(0, 60), min_size=1), spacing=st.integers(1, 30))
def test_no_more_checkpoints_can_be_so_far_apart(found: set[int], spacing: int) -> None:
    """The newest is kept, no two are nearer, and the best of all subsets is no larger."""
    ordered = [checkpoints.Checkpoint(Path(f"{e}.h5"), e, None) for e in sorted(found)]
    kept = [one.epoch or 0 for one in spacing_module.keep_apart(ordered, spacing)[0]]
    assert kept[-1] == max(found)
    assert all(b - a >= spacing for a, b in itertools.pairwise(kept))
    # The most that fit from the oldest on, which a greedy choice from either end reaches.
    most, last = 0, -math.inf
    for epoch in sorted(found):
        if epoch - last >= spacing:
            most, last = most + 1, epoch
    assert len(kept) == most


@quietly
@given(found=st.sets(st.integers(0, 40), min_size=1, max_size=9), data=st.data())
def test_no_choice_of_so_many_is_more_evenly_spaced(found: set[int], data: st.DataObject) -> None:
    """Of all choices with both ends, none has a smaller sum of squared gaps; ties go to newer."""
    count = data.draw(st.integers(1, len(found)))
    ordered = [checkpoints.Checkpoint(Path(f"{e}.h5"), e, None) for e in sorted(found)]
    chosen, _ = spacing_module.take_evenly(ordered, ordered, count, growing=False)
    own = tuple(one.epoch or 0 for one in chosen)

    def rate(subset: tuple[int, ...]) -> tuple[int, list[int]]:
        gaps = (b - a for a, b in itertools.pairwise(subset))
        return sum(gap * gap for gap in gaps), [-epoch for epoch in subset]

    ends = {max(found)} if count == 1 else {min(found), max(found)}
    every = itertools.combinations(sorted(found), count)
    assert own == min((one for one in every if ends <= {*one}), key=rate)


# ---- the best, by name -----------------------------------------------------------------------


def test_the_best_by_lifespan_are_those_that_stayed_the_best(run: Path) -> None:
    """Values 5 3 4 4 2 1 1: 3 lasts 2 checkpoints, 1 lasts 1 (an equal one is no better)."""
    values = [0.5, 0.3, 0.4, 0.4, 0.2, 0.1, 0.1]
    paths = make(run, *(f"{k:02d}-{value:.2f}.h5" for k, value in enumerate(values, start=1)))
    selection = select([run], best=2, best_by="lifespan")
    assert epochs(selection) == [2, 6]
    assert selection.notes[-1] == (
        "--best-by lifespan keeps 2 of 7 checkpoints (epochs 1 to 7): for how many later ones the "
        "val_loss of each stayed the best: 02-0.30.h5 for 2, 06-0.10.h5 for 1"
    )
    # Of those that lasted for none the best value counts, and of equal ones the newer.
    assert epochs(select([run], best=3, best_by="lifespan")) == [2, 6, 7]
    assert epochs(select([run], best=2, best_by="value")) == [6, 7]
    assert epochs(select(paths[:4], best=1, best_by="lifespan", mode="max")) == [1]


@quietly
@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.data())
def test_lifespans_are_those_of_their_definition(values: list[int], data: st.DataObject) -> None:
    """The longest-lived are taken, then the best value, then the newer, as sorted by hand."""
    count, mode = data.draw(st.integers(1, len(values))), data.draw(st.sampled_from(["min", "max"]))
    better = int.__lt__ if mode == "min" else int.__gt__
    ranked = []
    for place, value in enumerate(values):
        is_record = all(better(value, earlier) for earlier in values[:place])
        later = values[place + 1 :]
        beaten = next((k for k, other in enumerate(later) if better(other, value)), len(later))
        lifespan = beaten if is_record else 0
        ranked.append((-lifespan, value if mode == "min" else -value, -place))
    expected = sorted(-key[2] for key in sorted(ranked)[:count])
    wanted = metrics.Wanted(count, "loss", mode, by="lifespan")
    assert metrics._rank([float(value) for value in values], wanted) == expected


def test_a_checkpoint_without_a_score_neither_ends_a_lifespan_nor_has_one(run: Path) -> None:
    """NaN is better than nothing that is known, so the best before it stays the best."""
    make(run, "1.h5", "2.h5", "3.h5", "4.h5")
    log = run / "training.csv"
    log.write_text("epoch,val_loss\n0,nan\n1,0.5\n2,nan\n3,0.4\n")
    assert epochs(select([run], best=1, best_by="lifespan", log=log, log_first=0)) == [2]


def test_the_best_are_chosen_by_the_metric_in_the_names(run: Path) -> None:
    """The lowest losses are taken, and stay in order of epoch."""
    make(run, "01-0.85.h5", "02-0.30.h5", "03-0.70.h5", "04-0.20.h5")
    selection = select([run], best=3)
    assert epochs(selection) == [2, 3, 4]
    assert [one.metric for one in selection.checkpoints] == [0.30, 0.70, 0.20]
    assert selection.positions == (2.0, 3.0, 4.0)


def test_the_highest_are_best_where_more_is_better(run: Path) -> None:
    """An accuracy is maximised by default, and --mode reverses it."""
    make(run, "1_val_acc0.7.h5", "2_val_acc0.9.h5", "3_val_acc0.8.h5")
    assert epochs(select([run], best=1, monitor="val_acc")) == [2]
    assert epochs(select([run], best=1, monitor="val_accuracy")) == [2]
    assert epochs(select([run], best=1, monitor="val_acc", mode="min")) == [1]
    make(run, "1_score1.5.h5", "2_score2.5.h5")
    scored = [run / "1_score1.5.h5", run / "2_score2.5.h5"]
    assert epochs(select(scored, best=1, monitor="score", mode="max")) == [2]
    assert epochs(select(scored, best=1, monitor="score", mode="min")) == [1]


def test_a_choice_says_what_it_left_out_and_whether_that_makes_gaps(run: Path) -> None:
    """Those of the run that were not chosen, in order; a choice by epoch alone makes no gaps."""
    paths = make(run, *(f"{k}-0.{k}.h5" for k in range(1, 5)))
    make(run, "b.txt", "a.txt")
    for options, chosen, thinned in (
        ({"last": 3}, [1, 2, 3], False),
        ({"every": 2}, [1, 3], True),
        ({"best": 2}, [0, 1], True),
        ({"exclude": ["2-*"]}, [0, 2, 3], True),
        ({"growing": True}, [0, 1, 2, 3], True),
    ):
        found = select([run], **options)
        assert [one.path for one in found.checkpoints] == [paths[k] for k in chosen]
        assert found.thinned is thinned
        left = [path for path in paths if path not in {one.path for one in found.checkpoints}]
        assert list(found.left_out) == ([] if "exclude" in options else left)
        assert [one.path.name for one in found.passed_over if one.path.suffix == ".txt"] == [
            "a.txt",
            "b.txt",
        ]


def test_notes_of_order_and_of_metric_are_both_reported(run: Path) -> None:
    """One does not take the place of the other."""
    numbered(run, 1, 2)
    log = write_log(run, [0.5, 0.4, 0.3])
    paths = [run / "model_2.h5", run / "model_1.h5"]
    about_order, about_metric = select(paths, best=1, log=log).notes
    assert about_order.startswith("the files are sorted by epoch")
    assert about_metric.startswith(str(log))


def test_ties_go_to_the_newer_one(run: Path) -> None:
    """Of two equal metrics, the later epoch is taken."""
    make(run, "1-0.5.h5", "2-0.5.h5", "3-0.5.h5")
    assert epochs(select([run], best=2)) == [2, 3]


def test_best_is_applied_to_what_the_other_options_leave(run: Path) -> None:
    """With --last 2, the best epoch of all may be out of the question."""
    make(run, "1-0.1.h5", "2-0.5.h5", "3-0.6.h5")
    assert epochs(select([run], best=1, last=2)) == [2]


def test_a_metric_that_is_no_number_is_never_best(run: Path) -> None:
    """NaN and infinity are not usable, and fewer than N usable ones are an error."""
    make(run, "1-nan.h5", "2-0.5.h5", "3-inf.h5")
    assert epochs(select([run], best=1)) == [2]
    message = refusal(run, best=2)
    assert message == (
        "--best 2: there is only 1 checkpoint (epoch 2) to choose from, and 2 more whose val_loss "
        "is not a finite number"
    )
    (run / "1-nan.h5").rename(run / "1-0.6.h5")
    (run / "3-inf.h5").unlink()
    assert refusal(run, best=3) == (
        "--best 3: there are only 2 checkpoints (epochs 1 to 2) to choose from"
    )


@pytest.mark.parametrize(
    ("name", "monitor", "expected"),
    [
        ("weights.10-0.25.h5", "val_loss", 0.25),
        ("weights.10.0.25.h5", "val_loss", 0.25),
        ("model-0.25-10.h5", "val_loss", 0.25),
        ("10--0.25.h5", "val_loss", -0.25),
        ("10_-1.5e-05.h5", "val_loss", -1.5e-05),
        ("10-loss=0.5-val_loss=0.25.h5", "val_loss", 0.25),
        ("10-loss=0.5-val_loss=0.25.h5", "loss", 0.5),
        ("10-val_loss=0.25-loss=0.5.h5", "val_loss", 0.25),
        ("10-val_loss=-1.h5", "val_loss", -1.0),
        ("10-valLoss0.25.h5", "val_loss", 0.25),
        ("10-valloss0.25.h5", "val_loss", 0.25),
        ("net-a-10-valloss0.25-b0.5.h5", "val_loss", 0.25),
        ("10_acc85.h5", "accuracy", 85.0),
        ("10-f1_0.85.h5", "f1", 0.85),
        ("cnn_lr0.001_10-0.25.h5", "val_loss", 0.25),
        ("net-v1.2_10-0.25.h5", "val_loss", 0.25),
    ],
)
def test_the_metric_is_read_from_a_name(
    run: Path, name: str, monitor: str, expected: float
) -> None:
    """A number named like the metric is taken, else the only decimal that has no name."""
    make(run, name)
    (one,) = select([run], best=1, monitor=monitor).checkpoints
    assert (one.epoch, one.metric) == (10, expected)


@pytest.mark.parametrize(
    ("name", "monitor", "found"),
    [
        ("model_10.h5", "val_loss", "no such number"),
        ("10-0.25-0.85.h5", "val_loss", "only the numbers 0.25, 0.85, without a name"),
        ("10-val_loss=0.25.h5", "loss", "no such number"),
        ("10-loss=0.25.h5", "val_loss", "no such number"),
        ("10-f1_0.85.h5", "auc", "no such number"),
        ("10-lr0.001.h5", "val_loss", "no such number"),
        ("10-a=0.25.h5", "val_loss", "no such number"),
        *[
            (f"10-{split}_loss=0.25.h5", "loss", "no such number")
            for split in ("valid", "validation", "train", "training", "test")
        ],
    ],
)
def test_a_metric_that_is_not_in_a_name_is_an_error(
    run: Path, name: str, monitor: str, found: str
) -> None:
    """Another metric's number is not taken for it; the error says what was found."""
    make(run, name)
    message = refusal(run, best=1, monitor=monitor)
    assert message == (
        f"{run / name}: looked in its name for {monitor}, but found {found}: give the training "
        "log with --log, or another --monitor"
    )


@pytest.mark.parametrize(
    ("logs", "named"),
    [
        (["training.log"], "--log {run}/training.log, or"),
        (["history.csv"], "--log {run}/history.csv, or"),
        ([], "--log, or"),
        (["a.csv", "b.csv"], "--log, or"),  # a guess would be wrong half of the time
    ],
)
def test_a_missing_metric_names_the_log_beside_the_checkpoint(
    run: Path, logs: list[str], named: str
) -> None:
    """Where exactly one log lies beside the checkpoints, the advice can be pasted."""
    make(run, "model_1.keras", *logs)
    message = refusal(run, best=1)
    assert f"give the training log with {named.format(run=run)} another --monitor" in message


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("best.keras", r"(\d+)\.keras$"),
        ("best.weights.h5", r"(\d+)\.weights\.h5$"),
        ("best.pth", r"(\d+)\.pth$"),
    ],
)
def test_the_example_of_a_pattern_fits_the_suffix(run: Path, name: str, pattern: str) -> None:
    """The pattern that a refusal proposes finds the epoch of a file of the same suffix."""
    _, other = make(run, name, f"x{name}")
    assert f"--epoch-pattern, for instance '{pattern}'" in refusal(run, last=1)
    other.unlink()
    (run / name).rename(run / name.replace("best", "best_7"))
    (found,) = select([run], epoch_pattern=pattern).checkpoints
    assert found.epoch == 7


LESS = (
    "loss val_loss mean_squared_error val_mae ppl binary_crossentropy kl_divergence head_1_loss wer"
    " eval_wer val_cer word_error_rate top_5_error error_top1 valid.loss loss/val train_loss_epoch"
    " mse rmse eval_perplexity fid fid_score brier_score perplexity_score KID lpips valloss"
    " log_loss nll negative_log_likelihood cross_entropy test_ter err@1 dice_loss val_auc_loss EER"
    " false_positive_rate"
)
MORE = (
    "acc val_accuracy auc_1 mean_io_u IoU mAP50 r2 f1 val_f1_score precision_2 dice top1 top5 top-1"
    " eval_top1 val_top_5 acc@1 acc1 top_k_categorical_accuracy bleu val_bleu_4 sacrebleu chrF++"
    " rougeL rouge-l eval_rouge1 mIoU val_mIoU iou dice_coef mAP mAP@0.5:0.95 map50-95"
    " average_precision roc_auc AUROC f1_macro macro_f1 recall recall@k psnr ssim ndcg@10"
    " exact_match val_acc_epoch eval_accuracy test/acc explained_variance inception_score f_score"
    " jaccard_index kappa mcc"
)
UNKNOWN = (
    "negative_error lr cosine_similarity neg_mean_squared_error _ é score val_score"
    " silhouette_score accuracy_drop accuracy_std loss_gap minus_iou 1-iou learning_rate rate"
    " my_metric distance step"
)


@pytest.mark.parametrize(
    ("monitor", "mode"),
    [
        *((name, "min") for name in LESS.split()),
        *((name, "max") for name in MORE.split()),
        *((name, None) for name in UNKNOWN.split()),
    ],
)
def test_the_mode_is_known_from_the_name_of_the_metric(monitor: str, mode: str | None) -> None:
    """Losses and errors are minimised, scores maximised, and anything else asked for."""
    assert directions.guess_mode(monitor) == mode


def test_a_metric_whose_direction_is_not_known_is_refused(run: Path) -> None:
    """The error names the option, and with the option the metric serves."""
    make(run, "1-silhouette_score=0.3.h5", "2-silhouette_score=0.5.h5")
    with pytest.raises(UsageError, match="give --mode min or --mode max"):
        select([run], best=1, monitor="silhouette_score")
    assert epochs(select([run], best=1, monitor="silhouette_score", mode="max")) == [2]


# ---- the best, by log ------------------------------------------------------------------------


def write_log(folder: Path, losses: Sequence[float | str], first: int = 0) -> Path:
    """Write a log as CSVLogger does: epochs from 0, columns sorted, lines that end in CRLF."""
    rows = [f"{first + row},0.5,{loss}" for row, loss in enumerate(losses)]
    path = folder / "training.csv"
    path.write_text("\r\n".join(["epoch,accuracy,val_loss", *rows, ""]), newline="")
    return path


def test_names_from_one_belong_to_rows_from_zero(run: Path) -> None:
    """ModelCheckpoint's file 3 is CSVLogger's row 2; a note says so."""
    numbered(run, 1, 2, 3)
    log = write_log(run, [0.5, 0.1, 0.3])
    selection = select([run], best=1, log=log)
    assert epochs(selection) == [2]
    assert [one.metric for one in selection.checkpoints] == [0.1]
    assert selection.notes == (
        f"{log}: matched {run / 'model_3.h5'} to the row of epoch 2 (as the newest file is one "
        "more than the last row)",
    )


def test_names_from_zero_belong_to_rows_from_zero(run: Path) -> None:
    """An epoch 0 among the files, even one that is not chosen, settles it."""
    numbered(run, 0, 1, 2)
    log = write_log(run, [0.5, 0.1, 0.3, 0.9])
    selection = select([run], best=1, log=log, last=2)
    assert epochs(selection) == [1]
    assert selection.notes[0].endswith(
        "model_2.h5 to the row of epoch 2 (as the files count from 0 too)"
    )
    (run / "model_1.h5").unlink()
    (run / "model_2.h5").unlink()
    (note,) = select([run], best=1, log=log).notes
    assert "to the row of epoch 0 (" in note


def test_rows_that_fit_either_way_are_not_guessed(run: Path) -> None:
    """Files 1 to 4 of a run of five epochs, whose last file is not there: the option decides."""
    numbered(run, 1, 2, 3, 4)
    log = write_log(run, [0.79, 2.57, 0.03, 1.55, 0.29])
    assert refusal(run, best=1, log=log) == (
        f"{log}: file 4 may belong to row 3, as Keras counts, or to row 4, and the best differ: "
        "with --log-first 0, which is Keras' way, model_3.h5; with --log-first 1, model_2.h5: "
        "give one of the two"
    )
    for first, best, row in ((0, 3, 3), (1, 2, 4)):
        selection = select([run], best=1, log=log, log_first=first)
        assert epochs(selection) == [best]
        assert [one.metric for one in selection.checkpoints] == [0.03]
        assert selection.notes == (
            f"{log}: matched {run / 'model_4.h5'} to the row of epoch {row} "
            f"(as --log-first {first} says)",
        )
    # The fifth file proves it, although it is not among those to choose from.
    numbered(run, 5)
    selection = select([run], best=1, to_epoch=4, log=log)
    assert epochs(selection) == [3]


def test_files_kept_only_when_better_have_the_rows_before_them(run: Path) -> None:
    """Files 1 and 3 of five epochs: the third is the best either way, and its metric is row 2's."""
    numbered(run, 1, 3)
    log = write_log(run, [0.79, 2.57, 0.03, 1.55, 0.29])
    (best,) = select([run], best=1, log=log).checkpoints
    assert (best.epoch, best.metric) == (3, 0.03)


def test_equal_numbers_are_taken_where_only_they_fit(run: Path) -> None:
    """A log that begins at row 1 has no row 0 for file 1."""
    numbered(run, 1, 2, 3)
    log = write_log(run, [0.5, 0.1, 0.3, 0.2], first=1)
    selection = select([run], best=1, log=log)
    assert epochs(selection) == [2]
    assert selection.notes[0].endswith(
        "(as every file has a row of the same number, but not of one less)"
    )


def test_a_log_that_lost_its_older_rows_serves_the_newer_files(run: Path) -> None:
    """A run that was started again may have written a new log: older files need no row."""
    numbered(run, 1, 2, 6, 7)
    log = write_log(run, [0.5, 0.4, 0.3], first=5)
    selection = select([run], best=1, log=log, last=2)
    assert [one.metric for one in selection.checkpoints] == [0.4]
    assert refusal(run, best=1, log=log).startswith(f"{log}: no row for")


def test_while_a_run_grows_a_row_may_be_there_before_its_file(run: Path) -> None:
    """Watching goes on, as Keras counts, and a note says what equal numbers would choose."""
    numbered(run, 1, 2, 3, 4)
    log = write_log(run, [0.79, 2.57, 0.03, 1.55, 0.29])
    selection = select([run], best=1, log=log, growing=True)
    assert epochs(selection) == [3]
    (note,) = selection.notes
    assert note.endswith("--log-first 1, it would be model_2.h5 and not model_3.h5)")
    numbered(run, 5)
    selection = select([run], best=1, log=log, growing=True)
    assert epochs(selection) == [3]
    assert selection.notes[0].endswith("(as the newest file is one more than the last row)")


def test_the_metric_in_the_names_settles_the_alignment(run: Path) -> None:
    """Where the rounded values fit one way only, that way is taken, whatever the last row."""
    make(run, "01-0.51.h5", "02-0.10.h5", "03-0.32.h5")
    log = write_log(run, [9.0, 0.5149, 0.1, 0.32])
    selection = select([run], best=1, log=log)
    assert [one.metric for one in selection.checkpoints] == [0.1]
    assert "to the row of epoch 3 (" in selection.notes[0]
    assert selection.notes[0].endswith("(as the val_loss in the file names agrees)")
    # One row before, where the last row alone would say that it is the same.
    log = write_log(run, [0.5149, 0.1, 0.32, 9.0])
    selection = select([run], best=1, log=log)
    assert [one.metric for one in selection.checkpoints] == [0.1]
    assert "to the row of epoch 2 (" in selection.notes[0]


@pytest.mark.parametrize(
    ("numeral", "worth"),
    [("1.25", 0.01), ("-0.5", 0.1), ("1.2e-05", 1e-06), ("1e-05", 1e-05), ("2.5E+03", 100.0)],
)
def test_a_name_says_its_metric_up_to_the_last_digit(numeral: str, worth: float) -> None:
    """Half of what one in the last digit is worth may have been rounded off."""
    assert metrics._weigh_last_digit(numeral) == worth


def test_an_alignment_that_does_not_matter_is_noted(run: Path) -> None:
    """Where either way chooses the same files, Keras' way is taken, and nothing is asked."""
    numbered(run, 2, 3)
    selection = select([run], best=1, log=write_log(run, [0.9, 0.5, 0.1, 0.05, 0.2]))
    assert epochs(selection) == [3]
    assert [one.metric for one in selection.checkpoints] == [0.1]
    assert selection.notes[0].endswith(
        "(as Keras names files from 1 and counts rows from 0; with equal numbers the same files "
        "would be chosen)"
    )


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_any_separator_of_the_logger_is_read(run: Path, separator: str) -> None:
    """CSVLogger can be configured to write semicolons or tabs."""
    numbered(run, 1, 2)
    log = write_log(run, [0.5, 0.4])
    log.write_text("\ufeff" + log.read_text().replace(",", separator), encoding="utf-8")
    assert epochs(select([run], best=1, log=log)) == [2]


def test_a_run_that_was_started_again_counts_with_its_later_rows(run: Path) -> None:
    """In append mode, header and epochs repeat and columns may move; the later row is meant."""
    numbered(run, 1, 2, 3)
    log = write_log(run, [0.1, 0.2, 0.9])
    log.write_text(log.read_text() + "\nepoch,val_loss\n1,0.8\n2,0.05\n")
    selection = select([run], best=2, log=log)
    assert epochs(selection) == [1, 3]
    assert [one.metric for one in selection.checkpoints] == [0.1, 0.05]


def test_a_value_that_was_not_computed_is_not_usable(run: Path) -> None:
    """CSVLogger writes NA for it."""
    numbered(run, 1, 2, 3)
    log = write_log(run, ["NA", 0.5, ""])
    assert epochs(select([run], best=1, log=log)) == [2]
    assert "2 more whose val_loss is not a finite number" in refusal(run, best=2, log=log)


def test_a_blank_after_a_value_of_the_same_epoch_hides_nothing(run: Path) -> None:
    """Lightning writes a row for training and one for validation; a value that is NaN counts."""
    numbered(run, 1, 2, 3)
    log = write_log(run, [0.5, 0.4, 0.1])
    log.write_text(log.read_text() + "0,0.5,\n1,0.5,NA\n2,0.5,nan\n")
    assert epochs(select([run], best=2, log=log)) == [1, 2]
    assert "1 more whose val_loss is not a finite number" in refusal(run, best=3, log=log)


def test_a_last_row_that_is_being_written_is_noted(run: Path) -> None:
    """The trainer may not have finished it; it is left out, and a note says so."""
    numbered(run, 1, 2)
    log = write_log(run, [0.5, 0.4])
    log.write_text(log.read_text() + "2,0.")
    incomplete = f"{log}: the last row, 4, is incomplete and was ignored"
    assert select([run], best=1, log=log).notes[0] == incomplete
    log.write_text(log.read_text() + "\n3,0.5,0.4\n")
    assert "row 4 has fewer cells than the header" in refusal(run, best=1, log=log)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epoch,accuracy\n0,1\n", "no column 'val_loss': choose --monitor from epoch, accuracy"),
        ("a,b\n0,1\n", "its first row has no column 'epoch'"),
        ("epoch,val_loss\n", "the log has no rows"),
        ("", "the log has no rows"),
        ("epoch,val_loss\nx,1\n", "row 2: the epoch is 'x'"),
        ("epoch,val_loss\n0,x\n", "row 2: the metric is 'x'"),
        ("epoch,val_loss\n0,1\n", "no row for"),
        ("epoch,val_loss\n5,1\n", "found rows of epochs 5 to 5"),
        ("epoch,val_loss\n0," + "1" * 200_000, "the log cannot be read"),
        ("\0\x89HDF\udcff\n\0", "its first row has no column"),
    ],
)
def test_a_log_that_does_not_serve_is_an_error(run: Path, content: str, message: str) -> None:
    """The error names the log and says what is missing."""
    numbered(run, 1, 2)
    log = run / "training.csv"
    log.write_text(content, errors="surrogateescape")
    assert message in refusal(run, best=1, log=log)
    assert str(log) in refusal(run, best=1, log=log)


def test_a_log_without_the_row_of_a_file_is_an_error(run: Path) -> None:
    """It says which file has none, what its row should be called, and which rows there are."""
    numbered(run, 2, 4)
    log = write_log(run, [0.5, 0.4], first=2)
    assert refusal(run, best=1, log=log) == (
        f"{log}: no row for {run / 'model_2.h5'}; expected epoch 1 (as the newest file is "
        "one more than the last row), found rows of epochs 2 to 3"
    )


def test_what_a_log_holds_is_shown_in_short(run: Path) -> None:
    """A log may hold anything: forty letters of a cell and twenty columns are shown."""
    numbered(run, 1)
    long = "x" * 100
    for content in (
        f"epoch,{long}\n",
        f"{long},val_loss\n",
        f"epoch,val_loss\n{long},1\n",
        f"epoch,val_loss\n0,{long}\n",
    ):
        (run / "log.csv").write_text(content)
        message = refusal(run, best=1, log=run / "log.csv")
        assert 30 < sum(len(part) for part in re.findall("xx+", message)) < 40
    (run / "log.csv").write_text(",".join(["epoch", *(f"c{k}" for k in range(30))]) + "\n")
    assert refusal(run, best=1, log=run / "log.csv").endswith("c18")


def test_a_log_that_is_no_file_is_an_error(run: Path) -> None:
    """A pipe is not opened, and a missing file is named."""
    numbered(run, 1)
    os.mkfifo(run / "pipe.csv")
    advice = "--log must be a CSV file of CSVLogger"
    for name, what in (("pipe.csv", "is not a regular file"), ("gone.csv", "does not exist")):
        assert refusal(run, best=1, log=run / name) == f"{run / name} {what}: {advice}"
    assert "is not a path" in refusal(run, best=1, log="a\0b")


def test_a_log_that_cannot_be_opened_is_an_error(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says why, as the system does."""
    numbered(run, 1)
    log = write_log(run, [0.5])

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(log))

    monkeypatch.setattr("builtins.open", denied)
    message = refusal(run, best=1, log=log)
    assert message == f"{log}: the log cannot be read: Permission denied"


@pytest.mark.parametrize(
    ("files", "losses", "row", "why"),
    [
        (["01-0.10.h5", "02-0.10.h5"], [0.1, 0.1], 1, "in the file names agrees"),
        (["01-0.51.h5", "02-0.10.h5"], [0.523, 0.1, 0.05], 1, "would be chosen"),
        (["1-val_loss=0.5.h5", "2-val_loss=1.h5"], [0.5, 1.0, 9.0], 1, "would be chosen"),
    ],
)
def test_the_names_agree_only_if_all_do(
    run: Path, files: list[str], losses: list[float], row: int, why: str
) -> None:
    """A row that is missing, off by one in the last digit, or a whole number settles nothing."""
    make(run, *files)
    (note,) = select([run], best=1, log=write_log(run, losses)).notes
    assert f"to the row of epoch {row} (" in note
    assert why in note


def test_a_log_needs_epochs(run: Path) -> None:
    """A file without a number in its name has no row."""
    paths = [*numbered(run, 1), *make(run, "final.h5")]
    log = write_log(run, [0.5])
    assert "final.h5: --log needs the epoch" in refusal(*paths, best=1, log=log)


def test_a_spreadsheet_may_have_touched_the_log(run: Path) -> None:
    """An epoch of 1.0 and spaces around the cells are read."""
    numbered(run, 1, 2)
    (run / "training.csv").write_text('epoch , "val_loss"\n0.0, 0.5\n1.0, 0.4\n')
    assert epochs(select([run], best=1, log=run / "training.csv")) == [2]


@quietly
@given(
    losses=st.lists(st.floats(0.001, 99), min_size=2, max_size=30),
    digits=st.sampled_from([".2f", ".4f", ".3e", ""]),
    start=st.sampled_from([0, 1]),
)
def test_rounded_metrics_agree_with_the_rows_they_come_from(
    losses: list[float], digits: str, start: int
) -> None:
    """Whatever the rounding, the true alignment is never ruled out."""
    files = [
        checkpoints.Checkpoint(Path(f"{row + start:02d}-{loss:{digits}}.h5"), row + start, None)
        for row, loss in enumerate(losses)
    ]
    log = metrics._Log("log", dict(enumerate(losses)), len(losses) - 1, False, ())
    if all("." in f"{loss:{digits}}" for loss in losses):
        assert metrics._is_consistent(files, start, "val_loss", log)


# ---- at large --------------------------------------------------------------------------------


@pytest.mark.slow
def test_ten_thousand_files_cost_one_look_each(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A huge directory is listed once, and each candidate's status asked for once."""
    for epoch in range(10_000):
        os.close(os.open(run / f"model_{epoch}-0.{epoch}.h5", os.O_CREAT))
    looks = 0
    real = Path.stat

    def counted(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        nonlocal looks
        looks += 1
        return real(path, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(Path, "stat", counted)
    selection = select([run], last=2)
    assert epochs(selection) == [9_998, 9_999]
    assert 10_000 <= looks <= 10_010  # the folder itself, whether it is a checkpoint


def test_the_order_does_not_depend_on_how_the_system_lists(run: Path) -> None:
    """Names made in any order give one order, and the passed over are sorted too."""
    shuffled = list(string.ascii_lowercase)
    random.Random(2).shuffle(shuffled)
    make(run, *(f"{letter}.txt" for letter in shuffled))
    numbered(run, 3, 1, 2)
    selection = select([run])
    assert epochs(selection) == [1, 2, 3]
    assert [passed.path.stem for passed in selection.passed_over] == sorted(shuffled)
    assert math.isclose(sum(selection.positions), 6.0)


# ---- models to look at, each by itself -----------------------------------------------------------


@pytest.mark.parametrize(
    "in_order",
    [
        ["best.h5", "last.h5"],
        ["model_9.h5", "model_10.h5"],
        ["b-9-0.7.h5", "b-10-0.1.h5"],
        ["z_epoch2_a.h5", "z_epoch10_a.h5"],
        ["average.h5", "model_9.h5", "model_10.h5"],
        ["model_9.h5", "model_9.keras", "model_10.hdf5"],
        ["run2_epoch_1.h5", "run10_epoch_1.h5"],
        ["A2.h5", "a10.h5"],
        ["2021.h5"],
    ],
)
def test_every_model_is_found_whatever_the_names(run: Path, in_order: list[str]) -> None:
    """By epoch where all names tell one, else by name as people count; and so for a pattern."""
    make(run, *reversed(in_order))
    for source in (run, f"{run}/*"):
        files, passed_over = model_files([source])
        assert [path.name for path in files] == in_order
        assert passed_over == []


def test_the_order_is_of_epochs_even_where_names_would_have_another(run: Path) -> None:
    """A metric that stands before the epoch does not order the files."""
    make(run, "acc0.9_epoch1.h5", "acc0.1_epoch2.h5")
    files, _ = model_files([run])
    assert [path.name for path in files] == ["acc0.9_epoch1.h5", "acc0.1_epoch2.h5"]


def test_what_is_no_model_is_passed_over_with_a_reason(run: Path) -> None:
    """Hidden, unfinished and foreign files, bare weights and directories are reported once each."""
    make(run, "model_1.h5", "data.npz", "m.weights.h5", "training.csv", ".m.h5", "m.tmp.h5")
    (run / "logs").mkdir()
    files, passed_over = model_files([run])
    assert [path.name for path in files] == ["model_1.h5"]
    assert {passed.path.name: passed.reason for passed in passed_over} == {
        ".m.h5": "hidden",
        "data.npz": "not named like a whole model",
        "logs": "a directory",
        "m.tmp.h5": "unfinished, by its name",
        "m.weights.h5": "not named like a whole model",
        "training.csv": "not named like a whole model",
    }


def test_what_every_source_has_passed_over_is_reported(tmp_path: Path, run: Path) -> None:
    """Not only the last one's."""
    make(run, "a.h5", "a.txt")
    other = tmp_path / "other"
    other.mkdir()
    make(other, "b.h5", "b.txt")
    assert [one.path.name for one in model_files([run, other])[1]] == ["a.txt", "b.txt"]


def test_a_named_file_is_a_model_whatever_its_name_and_sources_keep_their_order(run: Path) -> None:
    """Files and directories come as they are named; a single one needs no list."""
    make(run, "z.npz", ".hidden.h5", "a.h5")
    files, _ = model_files([run / "z.npz", run, run / ".hidden.h5"])
    assert [path.name for path in files] == ["z.npz", "a.h5", ".hidden.h5"]
    assert model_files([run])[0] == model_files([str(run)])[0] == [run / "a.h5"]


def test_a_place_without_a_model_is_an_error_that_says_what_was_there(run: Path) -> None:
    """Nothing there, nothing that fits, no such path and no path at all."""
    make(run, "data.npz")
    for source, message in (
        (run, "there is no model here: looked for files in .h5, .hdf5, .keras, passed over data"),
        (run / "none", "no such file or directory"),
        (f"{run}/*.h5", "no file matches this pattern"),
        ("", "is not a path"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(message)):
            model_files([source])
    with pytest.raises(UsageError):
        model_files([])


# ---- a run that goes on --------------------------------------------------------------------------


def test_a_growing_run_may_have_fewer_checkpoints_than_asked_for(tmp_path: Path) -> None:
    """Even none: what is not there yet may come, while a wrong order stays an error."""
    assert select([tmp_path], last=3, growing=True).checkpoints == ()
    for name in ("model_1.h5", "model_2.h5"):
        (tmp_path / name).touch()
    assert len(select([tmp_path], last=3, growing=True).checkpoints) == 2
    assert len(select([tmp_path], last=5, from_epoch=2, growing=True).checkpoints) == 1
    assert select([tmp_path], from_epoch=7, growing=True).checkpoints == ()
    scored = make(tmp_path, "1-0.5.h5", "2-0.4.h5")
    assert len(select(scored, best=3, growing=True).checkpoints) == 2
    for path in scored:
        path.unlink()
    with pytest.raises(CheckpointError):
        select([tmp_path], last=3)
    (tmp_path / "model_02.h5").touch()
    with pytest.raises(CheckpointError, match="are both epoch 2"):
        select([tmp_path], growing=True)
