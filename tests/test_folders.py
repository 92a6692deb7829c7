"""Folders of models: what is copied beside the averaged tensors, what is not, and what is refused.

The folders are like those that Transformers writes; tests/hf has those that it does write.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from polyak_cli import FormatError, OutputError, average, plan, run, verify
from polyak_cli.averaging import carried_files, records
from polyak_cli.errors import ChangedError
from polyak_cli.pipeline.watching import watch
from tests.command import polyak

RECORD = "polyak_provenance.json"
MODEL = {
    "config.json": '{"model_type": "toy"}',
    "generation_config.json": "{}",
    "tokenizer.json": '{"model": {}}',
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": "{}",
    "spiece.model": "\x00\x01",
    "merges.txt": "#version: 0.2",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "modeling_toy.py": "raise SystemExit('not to be run')",
    "README.md": "---\nlicense: mit\n---",
    "LICENSE": "MIT",
    "1_Pooling/config.json": "{}",
}
VARYING = {"README.md", "modeling_toy.py", "chat_template.jinja"}
STATE = {
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
    "rng_state_3.pth",
    "random_states_0.pkl",
    "trainer_state.json",
    "training_args.bin",
    "zero_to_fp32.py",
    "latest",
    "optimizer.bin",
    "scheduler.bin",
}
FOLDERS_OF_STATE = {"global_step500/", "pytorch_model_fsdp_0/", "optimizer_0/"}
OTHER_WEIGHTS = {
    "pytorch_model.bin",
    "tf_model.h5",
    "flax_model.msgpack",
    "model-q4.gguf",
    "onnx/model.onnx",
    "head.pkl",
}


def fill(folder: Path, files: Mapping[str, str]) -> None:
    """Write files, with the folders that they lie in."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def write_run(run: Path, count: int = 3, extra: Mapping[str, str] = MODEL) -> list[Path]:
    """Write checkpoints whose values are 1, 2, ...; the files beside them say which they are of."""
    for k in range(1, count + 1):
        folder = run / f"checkpoint-{500 * k}"
        folder.mkdir(parents=True)
        values = np.arange(6, dtype=np.float32).reshape(2, 3) + k
        save_file({"w": values}, folder / "model.safetensors", {"format": "pt"})
        # What gives tensors their meaning is the same in all; the rest may change.
        own = {name: f"{text} {k}" for name, text in extra.items() if name in VARYING}
        fill(folder, {**extra, **own})
        fill(folder, dict.fromkeys(STATE, "state"))
        fill(folder, {f"{name}0.pt": "state" for name in FOLDERS_OF_STATE})
    return sorted(run.iterdir(), key=lambda path: int(path.name.partition("-")[2]))


def read_tree(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each file in a folder, and in those in it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_the_model_of_the_newest_folder_comes_along(tmp_path: Path) -> None:
    """What belongs to the model is copied byte for byte, what belongs to the training is not."""
    *_, newest = write_run(tmp_path / "run")
    report = average(tmp_path / "run", tmp_path / "final")
    found = read_tree(tmp_path / "final")
    assert found.keys() == {*MODEL, "model.safetensors", RECORD}
    assert {name: found[name] for name in MODEL} == {
        name: (newest / name).read_bytes() for name in MODEL
    }
    expected = np.arange(6, dtype=np.float32).reshape(2, 3) + 2
    assert np.array_equal(load_file(tmp_path / "final/model.safetensors")["w"], expected)
    assert report.bytes_written == sum(map(len, found.values()))


def test_the_plan_lists_what_is_copied_and_what_is_not(tmp_path: Path) -> None:
    """With the size of each file, and the reason for what is left out."""
    *_, newest = write_run(tmp_path / "run")
    fill(newest, {".gitattributes": "", "eval_results.json": "{}", "runs/events": ""})
    fill(newest, dict.fromkeys(OTHER_WEIGHTS, "x"))
    made = plan(tmp_path / "run", tmp_path / "final")
    assert made.files
    carried = made.files.data()["carried"]
    assert {one["name"]: one["size"] for one in carried} == {
        name: (newest / name).stat().st_size for name in MODEL
    }
    reasons = {one.name: one.reason for one in made.files.left_out}
    assert reasons == {
        **dict.fromkeys(STATE | FOLDERS_OF_STATE, "training state"),
        **dict.fromkeys(OTHER_WEIGHTS, "may hold weights, which are not averaged"),
        ".gitattributes": "hidden",
        "eval_results.json": "results of the newest checkpoint",
        "runs/": "results of the newest checkpoint",
    }
    done = polyak("average", "run", "-o", "final", "--dry-run", cwd=tmp_path)
    assert "files copied from checkpoint-1500: LICENSE, README.md, chat_template" in done.stdout
    assert "files not copied (training state): global_step500/, latest, opt" in done.stdout
    assert "other weights than the averaged ones may be in them: flax_model.msgpack" in done.stderr
    assert not (tmp_path / "final").exists()


def test_the_record_has_the_digest_of_each_copied_file(tmp_path: Path) -> None:
    """It lies in the folder, is the one in the weights, and names what was left out."""
    *_, newest = write_run(tmp_path / "run")
    average(tmp_path / "run", tmp_path / "final")
    text = (tmp_path / "final" / RECORD).read_text()
    with open(tmp_path / "final/model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header["__metadata__"]["polyak_provenance"] + "\n" == text
    files = json.loads(text)["files"]
    assert files["weights"] == ["model.safetensors"]
    assert {one["name"]: one["sha256"] for one in files["carried"]} == {
        name: hashlib.sha256((newest / name).read_bytes()).hexdigest() for name in MODEL
    }
    assert set(files["left_out"]) == STATE | FOLDERS_OF_STATE


def test_only_weights_leaves_everything_else_out(tmp_path: Path) -> None:
    """The tensors and the record alone."""
    write_run(tmp_path / "run")
    done = polyak("average", "run", "-o", "final", "--only-weights", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert read_tree(tmp_path / "final").keys() == {"model.safetensors", RECORD}


def test_a_file_as_the_output_says_what_is_missing(tmp_path: Path) -> None:
    """The tensors alone are a valid request; a note says how to have the rest."""
    write_run(tmp_path / "run")
    report = average(tmp_path / "run", tmp_path / "final.safetensors")
    assert any("an output without suffix, a folder, holds" in note for note in report.notes)
    assert report.plan.files is None


@pytest.mark.parametrize("name", ["llama-3.1", "v0.2-averaged", "final"])
def test_a_number_is_no_suffix(tmp_path: Path, name: str) -> None:
    """Models are often called by their version."""
    write_run(tmp_path / "run")
    average(tmp_path / "run", tmp_path / name)
    assert (tmp_path / name / "config.json").is_file()


def test_an_average_is_replaced_when_forced_and_nothing_else_is(tmp_path: Path) -> None:
    """A file that polyak did not write keeps the whole folder as it is, --force or not."""
    paths = write_run(tmp_path / "run")
    output = tmp_path / "final"
    average(paths[:2], output)
    older = read_tree(output)
    with pytest.raises(OutputError, match="already exists; use --force"):
        average(paths, output)
    average(paths, output, force=True)
    newer = read_tree(output)
    assert newer.keys() == older.keys()
    assert newer != older
    for name in ("notes.txt", "1_Pooling/notes.txt", "other/config.json"):
        fill(output, {name: "mine"})
        with pytest.raises(OutputError, match="which is not part of an average"):
            average(paths[:2], output, force=True)
        assert read_tree(output) == newer | {name: b"mine"}
        (output / name).unlink()
    assert sorted(os.listdir(tmp_path)) == ["final", "run"]


@pytest.mark.parametrize("how", ["none", "of another folder", "unsealed", "no record"])
def test_a_folder_whose_record_is_not_its_own_is_refused(tmp_path: Path, how: str) -> None:
    """A model that lies at the output by mistake is never deleted."""
    paths = write_run(tmp_path / "run")
    output = tmp_path / "final"
    fill(output, {"config.json": "mine", "model.safetensors": "mine"})
    if how == "of another folder":
        average(paths, tmp_path / "other", only_weights=True)
        (output / RECORD).write_bytes((tmp_path / "other" / RECORD).read_bytes())
    elif how == "unsealed":
        average(paths, tmp_path / "other")
        text = (tmp_path / "other" / RECORD).read_text()
        (output / RECORD).write_text(text.replace("config.json", "konfig.json"))
    elif how == "no record":
        (output / RECORD).write_text("[]")
    before = read_tree(output)
    with pytest.raises(OutputError, match=r"holds 'config\.json', which is not part of an average"):
        average(paths, output, force=True)
    assert read_tree(output) == before


def test_a_file_that_comes_into_the_older_folder_meanwhile_is_kept(tmp_path: Path) -> None:
    """The older folder is looked at once more before it is deleted, and gets its name back."""
    paths = write_run(tmp_path / "run")
    output = tmp_path / "final"
    average(paths[:2], output)
    before = read_tree(output)
    made = plan(paths, output, force=True)
    fill(output, {"notes.txt": "mine"})
    with pytest.raises(OutputError, match=r"now holds 'notes\.txt'"):
        run(made)
    assert read_tree(output) == before | {"notes.txt": b"mine"}
    assert sorted(os.listdir(tmp_path)) == ["final", "run"]


def test_an_average_of_averages_has_a_record_of_its_own(tmp_path: Path) -> None:
    """The record of the newest is not copied."""
    paths = write_run(tmp_path / "run")
    for k in (1, 2):
        average(paths[k - 1 : k + 1], tmp_path / f"mean-{k}")
    average([tmp_path / "mean-1", tmp_path / "mean-2"], tmp_path / "final")
    assert verify(tmp_path / "final").verified
    left_out = json.loads((tmp_path / "final" / RECORD).read_text())["files"]["left_out"]
    assert left_out == [RECORD]


# --- verify and watch -----------------------------------------------------------------------------


def test_a_folder_verifies_until_one_of_its_files_is_changed(tmp_path: Path) -> None:
    """Weights, copied files and the record are compared."""
    write_run(tmp_path / "run")
    output = tmp_path / "final"
    average(tmp_path / "run", output, verify=True)
    assert verify(output).verified
    for name, expected in (
        ("config.json", "'config.json', which was copied from the newest checkpoint, was changed"),
        (RECORD, f"'{RECORD}' is not the record in the weights"),
    ):
        before = (output / name).read_bytes()
        (output / name).write_bytes(before + b" ")
        found = verify(output)
        assert [problem.text for problem in found.problems] == [expected]
        (output / name).write_bytes(before)
    (output / "LICENSE").unlink()
    (problem,) = verify(output).problems
    assert problem.text.startswith("'LICENSE', which was copied")
    assert "cannot be read: No such file" in problem.text


def test_weights_that_were_taken_out_of_their_folder_verify(tmp_path: Path) -> None:
    """The record is in them, and there is nothing else to compare."""
    write_run(tmp_path / "run")
    average(tmp_path / "run", tmp_path / "final")
    (tmp_path / "final/model.safetensors").rename(tmp_path / "x.safetensors")
    assert verify(tmp_path / "x.safetensors", sources=[tmp_path / "run"]).verified


def test_watch_keeps_a_folder_current(tmp_path: Path) -> None:
    """In the run's own folder too; a new checkpoint replaces it, an old average is none."""
    paths = write_run(tmp_path / "run")
    paths[2].rename(tmp_path / "later")
    output = tmp_path / "run/average"
    assert len([*watch(tmp_path / "run", output, once=True, interval=0.05)]) == 1
    assert [*watch(tmp_path / "run", output, once=True, interval=0.05)] == []
    (tmp_path / "later").rename(paths[2])
    (report,) = watch(tmp_path / "run", output, once=True, interval=0.05)
    assert len(report.plan.checkpoints) == 3
    assert read_tree(output).keys() == {*MODEL, "model.safetensors", RECORD}


# --- what is hostile ------------------------------------------------------------------------------


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    """It could lead to a file that nobody meant to give away; --only-weights is the way out."""
    *_, newest = write_run(tmp_path / "run")
    (tmp_path / "secret").write_text("secret")
    (newest / "vocab.txt").symlink_to("../../secret")
    with pytest.raises(FormatError, match=r"vocab\.txt: is a link out of .*--only-weights"):
        average(tmp_path / "run", tmp_path / "final")
    assert not (tmp_path / "final").exists()
    average(tmp_path / "run", tmp_path / "final", only_weights=True)


@pytest.mark.parametrize("target", ["nowhere", "vocab.txt", "1_Pooling"])
def test_other_links_are_refused(tmp_path: Path, target: str) -> None:
    """To nothing, to itself, to a folder."""
    *_, newest = write_run(tmp_path / "run")
    (newest / "vocab.txt").symlink_to(target)
    with pytest.raises(FormatError, match=r"vocab\.txt: is a link"):
        average(tmp_path / "run", tmp_path / "final")


def test_a_link_within_the_folder_is_copied_as_a_file(tmp_path: Path) -> None:
    """As are the links of the Hub's cache, which lead to its blobs."""
    *_, newest = write_run(tmp_path / "run")
    (newest / "vocab.txt").symlink_to("merges.txt")
    average(tmp_path / "run", tmp_path / "final")
    copy = tmp_path / "final/vocab.txt"
    assert not copy.is_symlink()
    assert copy.read_bytes() == (newest / "merges.txt").read_bytes()
    cache = tmp_path / "models--a--b"
    for revision in ("1111", "2222"):
        snapshot = cache / "snapshots" / revision
        snapshot.mkdir(parents=True)
        (cache / "blobs").mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            blob = cache / f"blobs/{revision}{name[0]}"
            blob.write_bytes((newest / name).read_bytes())
            (snapshot / name).symlink_to(f"../../blobs/{blob.name}")
    average([*sorted((cache / "snapshots").iterdir())], tmp_path / "hub", order="given")
    assert (tmp_path / "hub/config.json").read_bytes() == (newest / "config.json").read_bytes()


def test_what_is_no_file_is_not_copied(tmp_path: Path) -> None:
    """A FIFO without a writer does not block."""
    *_, newest = write_run(tmp_path / "run")
    os.mkfifo(newest / "vocab.txt")
    made = plan(tmp_path / "run", tmp_path / "final")
    assert made.files
    assert ("vocab.txt", "not a regular file") in made.files.left_out


def test_a_folder_of_too_many_files_is_refused(tmp_path: Path) -> None:
    """Somebody's data set, or a folder that is meant to take hours."""
    *_, newest = write_run(tmp_path / "run", extra={})
    (newest / "data").mkdir()
    for k in range(10_001):
        os.close(os.open(newest / f"data/{k}.txt", os.O_CREAT))
    with pytest.raises(FormatError, match="more than 10000 files beside the weights"):
        plan(tmp_path / "run", tmp_path / "final")
    assert plan(tmp_path / "run", tmp_path / "final", only_weights=True).files


def test_folders_in_folders_have_an_end(tmp_path: Path) -> None:
    """What lies deeper than any model's files is left out."""
    *_, newest = write_run(tmp_path / "run", extra={})
    fill(newest, {"/".join(["d"] * 40) + "/x.json": ""})
    made = plan(tmp_path / "run", tmp_path / "final")
    assert made.files
    assert ("d/" * 9, "too deep to belong to a model") in made.files.left_out


@pytest.mark.parametrize("change", ["grown", "replaced", "deleted"])
def test_a_file_that_changes_while_it_is_copied_is_refused(tmp_path: Path, change: str) -> None:
    """Nothing is published then."""
    *_, newest = write_run(tmp_path / "run")
    made = plan(tmp_path / "run", tmp_path / "final")
    path = newest / "tokenizer.json"
    if change == "grown":
        with open(path, "a") as file:
            file.write(" ")
    else:
        path.unlink()
    if change == "replaced":
        path.write_text('{"model": {}}\n')
    with pytest.raises((ChangedError, FormatError), match=r"tokenizer\.json: (changed|cannot)"):
        run(made)
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_copy_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """After the weights are written, the disk is full or the user has had enough."""
    paths = write_run(tmp_path / "run")
    output = tmp_path / "final"
    average(paths[:2], output)
    before = read_tree(output)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(carried_files, "copy_range", fail)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        average(paths, output, force=True)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        average(paths, tmp_path / "new")
    assert read_tree(output) == before
    assert sorted(os.listdir(tmp_path)) == ["final", "run"]


def test_names_are_any_bytes(tmp_path: Path) -> None:
    """Of no encoding, with a line's end, like an option; the record holds and verifies them."""
    *_, newest = write_run(tmp_path / "run", extra={})
    names = [b"x\xff.txt", b"two\nlines.json", "ünï.txt".encode(), b"-o.json", b"a b.txt"]
    for name in names:
        with open(os.fsencode(newest) + b"/" + name, "wb") as file:
            file.write(name)
    done = polyak("average", "run", "-o", "final", "-v", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "two\\nlines.json" in done.stdout
    found = set(os.listdir(os.fsencode(tmp_path / "final")))
    assert found == {*names, b"model.safetensors", RECORD.encode()}
    assert verify(tmp_path / "final").verified
    assert average(tmp_path / "run", tmp_path / "final", force=True, verify=True).verified


def test_an_output_in_the_checkpoint_itself_is_refused(tmp_path: Path) -> None:
    """It would be copied into itself the next time."""
    *_, newest = write_run(tmp_path / "run")
    with pytest.raises(OutputError, match="lies in the folder of the checkpoint"):
        average(tmp_path / "run", newest / "mean")
    with pytest.raises(OutputError, match="holds the checkpoint"):
        average(tmp_path / "run", tmp_path / "run", force=True)


def test_two_forms_of_the_same_weights_are_one_checkpoint(tmp_path: Path) -> None:
    """Safetensors is read, as Transformers does; the other form is neither read nor copied."""
    for folder in write_run(tmp_path / "run"):
        (folder / "pytorch_model.bin").write_bytes(b"PK\3\4 not read")
    report = average(tmp_path / "run", tmp_path / "final")
    assert "pytorch_model.bin" not in read_tree(tmp_path / "final")
    assert any("pytorch_model.bin" in note for note in report.notes)


def test_hostile_records_name_no_file_outside(tmp_path: Path) -> None:
    """A name in a record cannot lead out of its folder."""
    write_run(tmp_path / "run")
    average(tmp_path / "run", tmp_path / "final")
    record = json.loads((tmp_path / "final" / RECORD).read_text())
    hostile: list[Any] = [
        {"weights": ["../x"], "carried": []},
        {"weights": ["/x"], "carried": []},
        {"weights": [], "carried": [{"name": "a/../../x", "sha256": "0"}]},
        {"weights": [1], "carried": []},
        {"weights": ["x"], "carried": [{"name": "y", "sha256": 0}]},
        {"weights": ["x"], "carried": [{"sha256": "0"}]},
        {"weights": ["x"], "carried": [["y", "0"]]},
        {"weights": ["x"], "carried": {"y": "0"}},
        {"weights": ["x"]},
        [],
    ]
    for files in hostile:
        text = records.encode(records.seal(record | {"files": files}))
        with pytest.raises(FormatError):
            records.read(text)
        (tmp_path / "final" / RECORD).write_text(text + "\n")
        assert records.list_owned(tmp_path / "final") == frozenset()


def test_weights_of_lora_open_a_folder(tmp_path: Path) -> None:
    """Scripts of Diffusers save pytorch_lora_weights.safetensors and the training's state."""
    name = "pytorch_lora_weights.safetensors"
    for k in (1, 2):
        folder = tmp_path / f"run/checkpoint-{k}00"
        folder.mkdir(parents=True)
        save_file({"unet.to_q.weight": np.full((2, 2), k, np.float32)}, folder / name)
        (folder / "optimizer.bin").write_bytes(b"x")
    save_file({"unet.to_q.weight": np.full((2, 2), 9, np.float32)}, tmp_path / "run" / name)
    average(tmp_path / "run", tmp_path / "final")
    assert {path.name for path in (tmp_path / "final").iterdir()} == {name, RECORD}
    assert (load_file(tmp_path / "final" / name)["unet.to_q.weight"] == 1.5).all()


def test_folders_of_models_in_numbered_folders(tmp_path: Path) -> None:
    """One model and its EMA are enough to choose; a folder that lacks it is passed over."""
    for step in (100, 200, 300):
        for k, name in enumerate(("net", "net_ema")):
            folder = tmp_path / f"run/checkpoint-{step}/{name}"
            folder.mkdir(parents=True)
            value = np.full(3, step + k, np.float32)
            save_file({"w": value}, folder / "model.safetensors")
    (tmp_path / "run/checkpoint-100/net_ema/model.safetensors").unlink()
    (tmp_path / "run/seed1/net").mkdir(parents=True)
    for use_ema, expected in ((False, 200), (True, 251)):
        output = tmp_path / f"final_{use_ema}"
        report = average(tmp_path / "run", output, use_ema=use_ema)
        assert (load_file(output / "model.safetensors")["w"] == expected).all()
    reasons = {str(one.path.relative_to(tmp_path)): one.reason for one in report.plan.passed_over}
    assert reasons["run/checkpoint-100"] == "holds no net_ema"
    assert reasons["run/checkpoint-200/net"] == "the model whose EMA is averaged"
    assert reasons["run/seed1"] == "a directory"


@pytest.mark.parametrize("there", [(), ("config.json", "trainer_state.json")])
def test_a_folder_of_an_interrupted_save_is_named(tmp_path: Path, there: tuple[str, ...]) -> None:
    """The newest folder lacks its weights: the report says so, and not of a folder of logs."""
    write_run(tmp_path / "run", 2, {})
    (tmp_path / "run/logs1").mkdir()
    fill(tmp_path / "run/checkpoint-1500", {"optimizer.pt": "", **dict.fromkeys(there, "{}")})
    shown = polyak("average", "run", "-o", "final", cwd=tmp_path)
    assert shown.stdout.count("passed over:") == 1
    assert "checkpoint-1500 (named like the checkpoints, but holds no complete one)" in shown.stdout


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "text", ['{"weight_map": {"w": "mod', '{"metadata": {}}', '{"weight_map": [1]}']
)
def test_an_index_that_is_cut_off_is_called_damaged(tmp_path: Path, kind: str, text: str) -> None:
    """Its name says what it was meant to be, where its content does not."""
    index = tmp_path / f"{kind}.index.json"
    index.write_text(text)
    with pytest.raises(FormatError, match=r"index\.json: is damaged"):
        plan(index, tmp_path / "final")
