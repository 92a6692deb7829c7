"""Decide which files of a model's folder belong to the model, and which to its training.

Folders of Transformers, PEFT and sentence-transformers hold a configuration and a tokenizer beside
the weights, and those of a `Trainer` the state of the optimizer too.  Goes by names, as those
programs do.  Opens no file, follows no link out of the folder, and knows no format of weights.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from polyak_cli.errors import FormatError, shown
from polyak_cli.storage import File, read_version

#: The file in an output folder that holds the record of the average.
RECORD_NAME = "polyak_provenance.json"
#: Entries of a folder that are looked at, and folders in folders.  Models have some 30 files.
_MOST_ENTRIES, _DEEPEST = 10_000, 8

#: What Trainer, Accelerate, DeepSpeed and FSDP write to continue a training.
_STATE = re.compile(
    r"(optimizer|scheduler|scaler)(_\d+)?\.(pt|pth|bin)|rng_state(_\d+)?\.pth|random_states_\d+\.pkl"
    r"|trainer_state\.json|training_args\.bin|zero_to_fp32\.py|latest|user_content\.pt"
    r"|(sampler|dl_state_dict)(_\d+)?\.bin|custom_checkpoint_\d+\.pkl"
)
_STATE_FOLDERS = re.compile(r"global_step\d+|pytorch_model_fsdp(_\d+)?|optimizer(_\d+)?")
#: Measurements of the newest checkpoint, which are not the average's.
_RESULTS = re.compile(
    r"\w+_results\.json|events\.out\.tfevents\..*|trainer_log\.jsonl|training_\w+\.png"
)
_RESULT_FOLDERS = re.compile(r"runs|logs|wandb|mlruns|tensorboard|lightning_logs")
#: Weights of PEFT; an adapter that is not the default one has a folder in that of the default.
_ADAPTER = re.compile(r"(.+/)adapter_model\.(safetensors|bin)", re.DOTALL)
_CHECKPOINT_FOLDERS = re.compile(r"checkpoint-\d+")
#: Weights in any form; `.pkl` and `.joblib` may be anything.
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|hdf5|keras|npz|msgpack|gguf|ggml|onnx|onnx_data|ort|pb"
    r"|tflite|mlmodel|pkl|pickle|joblib)(\.index\.json)?|openvino_\w+\.xml",
    re.IGNORECASE,
)
#: Why a file is left out of an output.
STATE, RESULTS = "training state", "results of the newest checkpoint"
OTHER_WEIGHTS = "may hold weights, which are not averaged"
HIDDEN, TOO_DEEP = "hidden", "too deep to belong to a model"
OTHER_ADAPTER = "another adapter, which is averaged by itself"
OWN_RECORD = "the record of the average that the newest checkpoint is"


class CarriedFile(NamedTuple):
    """A file of the newest checkpoint's folder that is copied as it is."""

    name: str  # relative to the folder, with "/"
    file: File


class LeftOut(NamedTuple):
    """A file or folder of the newest checkpoint's folder that is not copied."""

    name: str  # relative to the folder, with "/"; a folder's name ends with one
    reason: str


@dataclass(frozen=True, slots=True)
class FolderFiles:
    """What an output folder will hold besides the record.

    Attributes:
        weights: names of the files that hold the tensors.
        carried: the files that are copied.
        left_out: what is not copied.
    """

    weights: tuple[str, ...]
    carried: tuple[CarriedFile, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes that are copied."""
        return sum(one.file.version.size for one in self.carried)

    def data(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return {
            "weights": list(self.weights),
            "carried": [{"name": one.name, "size": one.file.version.size} for one in self.carried],
            "left_out": [one._asdict() for one in self.left_out],
        }


def is_training_state(name: str) -> bool:
    """Return whether a file of this name continues a training and holds no model."""
    return _STATE.fullmatch(name) is not None


def is_state_folder(name: str) -> bool:
    """Return whether a folder of this name in a checkpoint's folder continues a training."""
    return _STATE_FOLDERS.fullmatch(name) is not None


def list_files(
    folder: Path, weights: Collection[str], *, everything: bool = False
) -> tuple[list[CarriedFile], list[LeftOut]]:
    """Return what belongs to the model of a folder, and what does not.

    Args:
        folder: the checkpoint.
        weights: names, relative to it, of the files that hold its tensors; they are in neither
            list.
        everything: the training's files are carried too.

    Raises:
        FormatError: a file of the model is a link that leads out of the folder, or there are too
            many files.
    """
    carried: list[CarriedFile] = []
    left_out: list[LeftOut] = []
    for name, entry in _walk(folder, left_out, everything=everything):
        if name in weights:
            continue
        reason = _find_reason(name)
        if everything and reason not in (HIDDEN, OWN_RECORD):
            reason = ""
        status = entry.stat(follow_symlinks=False)
        if not reason and stat.S_ISLNK(status.st_mode):
            status = _follow(folder, name)
        if not reason and not stat.S_ISREG(status.st_mode):
            reason = "not a regular file"
        if reason:
            left_out.append(LeftOut(name, reason))
        else:
            carried.append(CarriedFile(name, _name_file(folder / name, status)))
    return _leave_out_adapters(carried, left_out)


def _leave_out_adapters(
    carried: list[CarriedFile], left_out: list[LeftOut]
) -> tuple[list[CarriedFile], list[LeftOut]]:
    """Return both lists with the folders of other adapters, whose weights are left out, as wholes.

    A configuration without its weights is no adapter.
    """
    matches = [_ADAPTER.fullmatch(one.name) for one in left_out if one.reason == OTHER_WEIGHTS]
    folders = tuple(dict.fromkeys(match[1] for match in matches if match))
    if not folders:
        return carried, sorted(left_out)
    kept = [one for one in left_out if not one.name.startswith(folders)]
    kept += [LeftOut(name, OTHER_ADAPTER) for name in folders]
    return [one for one in carried if not one.name.startswith(folders)], sorted(kept)


def _name_file(path: Path, status: os.stat_result) -> File:
    return File(str(path), read_version(path, status))


def _walk(
    folder: Path, left_out: list[LeftOut], *, everything: bool
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield all that is no folder, by name; add the folders that are not entered to a list."""
    waiting = [""]
    seen = 0
    while waiting:
        inside = waiting.pop()
        try:
            with os.scandir(folder / inside) as entries:
                found = []
                for entry in entries:
                    seen += 1
                    if seen > _MOST_ENTRIES:
                        raise _refuse(
                            f"{shown(folder)}: holds more than {_MOST_ENTRIES} files beside the "
                            "weights"
                        )
                    found.append(entry)
        except OSError as error:
            raise FormatError(
                f"{shown(folder / inside)}: cannot be read: {error.strerror}"
            ) from None
        folders = []
        for entry in sorted(found, key=lambda entry: entry.name):
            name = f"{inside}{entry.name}"
            if not entry.is_dir(follow_symlinks=False):
                yield name, entry
            elif reason := _find_reason_of_folder(name, everything=everything):
                left_out.append(LeftOut(f"{name}/", reason))
            else:
                folders.append(f"{name}/")
        waiting += reversed(folders)


def _refuse(what: str) -> FormatError:
    """Return an error with the way out."""
    return FormatError(
        f"{what}; with --only-weights nothing is copied from there, and the configuration and the "
        "tokenizer must be put beside the average by hand"
    )


def _find_reason(name: str) -> str:
    """Return why a file is left out, "" if it belongs to the model."""
    last = name.rpartition("/")[2]
    if last.startswith("."):
        return HIDDEN
    if last == RECORD_NAME:
        return OWN_RECORD
    if is_training_state(last):
        return STATE
    if _RESULTS.fullmatch(last):
        return RESULTS
    return OTHER_WEIGHTS if _WEIGHTS.fullmatch(last) else ""


def _find_reason_of_folder(name: str, *, everything: bool) -> str:
    """Return why a folder is not entered, "" if it is."""
    last = name.rpartition("/")[2]
    if last.startswith(".") or last == "__pycache__":
        return HIDDEN
    if everything:
        return TOO_DEEP if name.count("/") == _DEEPEST else ""
    if _STATE_FOLDERS.fullmatch(last):
        return STATE
    if _RESULT_FOLDERS.fullmatch(last):
        return RESULTS
    if _CHECKPOINT_FOLDERS.fullmatch(last):
        return "another checkpoint"
    return TOO_DEEP if name.count("/") == _DEEPEST else ""


def _follow(folder: Path, name: str) -> os.stat_result:
    """Return what a link leads to: a file of the folder, or of the cache that the folder is in.

    The Hub's cache keeps each file under ``blobs`` and links to it from ``snapshots/REVISION``.
    Any other link could lead to a file that its owner never meant to give away.
    """
    try:
        target = (folder / name).resolve(strict=True)
        allowed = [folder.resolve()]
        if allowed[0].parent.name == "snapshots":
            allowed.append(allowed[0].parent.parent / "blobs")
        status = target.stat()
    except (OSError, RuntimeError):  # RuntimeError: a loop of links, before Python 3.13
        raise _refuse(f"{shown(folder / name)}: is a link that leads nowhere") from None
    if not any(place in target.parents for place in allowed):
        raise _refuse(
            f"{shown(folder / name)}: is a link out of the folder; put the file itself there"
        )
    if stat.S_ISDIR(status.st_mode):
        raise _refuse(f"{shown(folder / name)}: is a link to a folder; put the folder itself there")
    return status
