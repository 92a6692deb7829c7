"""`recalibrate` on checkpoints that are folders: only the statistics in them change."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.optim.swa_utils import update_bn

from polyak_cli import average, recalibrate, verify
from polyak_cli.averaging import carried_files
from polyak_cli.errors import OutputError, PolyakError
from tests.torch.test_evaluate import write_code
from tests.torch.test_recalibrate import CODE, build, make_rows, order_batches

CODE_2D = CODE.format(kind="BatchNorm2d(6)")
RECORD = "polyak_provenance.json"
STATISTICS = {f"{layer}.running_{which}" for layer in "ac" for which in ("mean", "var")}
State = dict[str, Any]


def save_single(state: State, folder: Path) -> None:
    """Save as Transformers does, in one file."""
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def save_shards(state: State, folder: Path, end: str, save: Callable[[State, Path], None]) -> None:
    """Save as Transformers does, in two files and an index; each layer lies in both."""
    stem = "model" if end == "safetensors" else "pytorch_model"
    place: dict[str, str] = {}
    for k in range(2):
        file = f"{stem}-0000{k + 1}-of-00002.{end}"
        own = dict([*state.items()][k::2])
        save(own, folder / file)
        place |= dict.fromkeys(own, file)
    size = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": place}
    (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def save_distributed(state: State, folder: Path) -> None:
    """Save as torch.distributed.checkpoint does, with the state of an optimizer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(
            {"model": state, "optim": {"state": {"exp_avg": torch.arange(3.0)}}},
            checkpoint_id=folder,
            no_dist=True,
        )


SAVERS: dict[str, Callable[[State, Path], None]] = {
    "one file": save_single,
    "safetensors": lambda state, folder: save_shards(
        state, folder, "safetensors", lambda own, file: save_file(own, file, {"format": "pt"})
    ),
    "bin": lambda state, folder: save_shards(state, folder, "bin", torch.save),
    "dcp": save_distributed,
}


def save_run(run: Path, kind: str, count: int = 1) -> list[Path]:
    """Save checkpoints with what a Trainer leaves beside the tensors."""
    folders = []
    for k in range(1, count + 1):
        folder = run / f"checkpoint-{k}"
        folder.mkdir(parents=True)
        SAVERS[kind](build(CODE_2D).state_dict(), folder)
        (folder / "config.json").write_text('{"model_type": "resnet"}')
        torch.save({"step": k}, folder / "optimizer.pt")
        folders.append(folder)
    return folders


def read_tensors(folder: Path) -> State:
    """Return the tensors of a folder by the libraries of their formats, model and optimizer."""
    if (folder / ".metadata").exists():
        file = folder.with_suffix(".whole")
        dcp_to_torch_save(folder, file)
        whole = torch.load(file)
        file.unlink()
        return {**whole["model"], **whole["optim"]["state"]}
    shards = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
    loaded = [load_file(one) if one.suffix == ".safetensors" else torch.load(one) for one in shards]
    return {name: tensor for state in loaded for name, tensor in state.items()}


def read_others(folder: Path) -> dict[str, Any]:
    """Return everything in a folder but the values of tensors and polyak's records."""
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        raw = path.read_bytes()
        if path.suffix == ".safetensors":
            header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
            header["__metadata__"].pop("polyak_provenance", None)
            found[path.name] = header
        elif path.suffix == ".bin":
            with zipfile.ZipFile(io.BytesIO(raw)) as archive:
                names = [n for n in archive.namelist() if "/data/" not in n and "polyak" not in n]
                found[path.name] = {name: archive.read(name) for name in names}
        elif path.suffix != ".distcp" and path.name != RECORD:
            found[path.name] = raw
    return found


@pytest.mark.parametrize("kind", SAVERS)
def test_only_the_statistics_change_in_a_folder(tmp_path: Path, kind: str) -> None:
    """They are those of `update_bn`; what belongs to the model is carried as `average` does it."""
    (folder,) = save_run(tmp_path / "run", kind)
    rows, source = make_rows((24, 6, 5, 4)), f"{write_code(tmp_path, CODE_2D)}:make"
    output = tmp_path / "final"
    found = recalibrate(folder, output, rows, batch_size=8, architecture=source)
    assert (found.layers, found.batches) == (2, 3)
    net = build(CODE_2D)
    before, after = read_tensors(folder), read_tensors(output)
    net.load_state_dict({name: before[name] for name in net.state_dict()})
    update_bn(order_batches(rows, 8), net)
    assert list(before) == list(after)
    for name, tensor in before.items():
        if name in STATISTICS:
            expected = net.state_dict()[name].numpy()
            assert after[name].numpy() == pytest.approx(expected, rel=1e-6, abs=1e-6)
            assert not torch.equal(after[name], tensor)
        else:
            assert torch.equal(after[name], tensor), name
    carried = read_others(folder)
    if kind != "dcp":  # which continues a training with it
        del carried["optimizer.pt"]
    assert read_others(output) == carried


@pytest.mark.parametrize("kind", ["one file", "bin", "dcp"])
def test_an_average_is_a_recalibrated_folder_in_one_step(tmp_path: Path, kind: str) -> None:
    """It has the bytes of both commands, `--verify` and `verify` pass it, and --force renews it."""
    save_run(tmp_path / "run", kind, 2)
    rows, source = make_rows((24, 6, 5, 4)), f"{write_code(tmp_path, CODE_2D)}:make"
    options: Any = {"batch_size": 8}
    for force in (False, True) if kind == "bin" else (False,):
        options["force"] = force
        own: Any = {"recalibrate": rows, "model": source, "verify": True}
        average(tmp_path / "run", tmp_path / "one", **options, **own)
        average(tmp_path / "run", tmp_path / "mean", force=force)
        recalibrate(tmp_path / "mean", tmp_path / "two", rows, architecture=source, **options)
    names = sorted(path.name for path in (tmp_path / "two").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "one").iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert verify(tmp_path / "one", sources=[tmp_path / "run"]).problems == ()
    listed = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in listed if name != "__pycache__"] == [
        *("mean", "net.py", "one", "run", "two")
    ]


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """A module that fails leaves nothing, and a folder that is no average is never replaced."""
    (folder,) = save_run(tmp_path / "run", "bin")
    source = f"{write_code(tmp_path, CODE_2D)}:make"
    output = tmp_path / "final"
    with pytest.raises(PolyakError, match="failed on rows"):
        recalibrate(folder, output, make_rows((24, 6)), architecture=source)
    with pytest.raises(PolyakError, match="failed on rows"):
        average(tmp_path / "run", output, recalibrate=make_rows((24, 6)), model=source)
    assert not [path for path in tmp_path.iterdir() if "final" in path.name or path.name[0] == "."]
    rows = make_rows((24, 6, 5, 4))
    recalibrate(folder, output, rows, architecture=source)
    with pytest.raises(OutputError, match="already exists; use --force"):
        recalibrate(folder, output, rows, architecture=source)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds 'notes.txt', which is not part of an average"):
        recalibrate(folder, output, rows, architecture=source, force=True)


@pytest.mark.parametrize("name", ["config.json", "pytorch_model-00001-of-00002.bin"])
def test_a_folder_that_changes_meanwhile_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even after all was copied: a training that goes on may have written files before, too."""
    (folder,) = save_run(tmp_path / "run", "bin")
    source = f"{write_code(tmp_path, CODE_2D)}:make"
    copy_files = carried_files.copy_files

    def copy_and_save_again(*arguments: Any) -> None:
        copy_files(*arguments)
        new = folder / "new"
        new.write_bytes((folder / name).read_bytes())
        new.replace(folder / name)

    monkeypatch.setattr(carried_files, "copy_files", copy_and_save_again)
    with pytest.raises(PolyakError, match=f"{name}: .*changed"):
        recalibrate(folder, tmp_path / "final", make_rows((24, 6, 5, 4)), architecture=source)
    assert not (tmp_path / "final").exists()


def test_shards_become_one_file(tmp_path: Path) -> None:
    """An output in .safetensors has the tensors of all shards, as of an average."""
    (folder,) = save_run(tmp_path / "run", "safetensors")
    source = f"{write_code(tmp_path, CODE_2D)}:make"
    output = tmp_path / "final.safetensors"
    recalibrate(folder, output, make_rows((24, 6, 5, 4)), architecture=source)
    before, after = read_tensors(folder), load_file(output)
    assert {n for n in before if not torch.equal(before[n], after[n])} == STATISTICS
