"""List the formats: how each is recognised, what its files are called, and where its class is.

Imports no format: a class is imported when a file of its format is first met.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from polyak_cli.errors import FormatError, shown
from polyak_cli.formats import detection, foreign
from polyak_cli.formats.detection import Opening
from polyak_cli.formats.format import Format
from polyak_cli.storage import open_input
from polyak_cli.storage.local import name_errors


class Entry(NamedTuple):
    """One format.

    Attributes:
        key: its name in tables and records; it never changes.
        home: module and class, separated by a colon.
        recognises: tells a file of it by its content.
        kinds: suffix of the files in a directory that are taken for checkpoints -> their kind.
            Files of two kinds are not of one run.  The first suffix that fits counts.
        openers: names of the file by which a folder that is one checkpoint is opened.
    """

    key: str
    home: str
    recognises: Callable[[Opening], bool]
    kinds: Mapping[str, str]
    openers: tuple[str, ...] = ()


#: The format of files whose signature does not stand at their beginning.
_WITH_USER_BLOCK = "hdf5"
#: A new format is one line here and one subclass of `format.Format`.  The first that recognises a
#: file has it; `foreign` names the files that none recognises.
_ORBAX = ("_METADATA", "_CHECKPOINT_METADATA")
FORMATS: tuple[Entry, ...] = (
    Entry(
        "hdf5",
        "polyak_cli.formats.hdf5.keras_files:KerasHdf5",
        detection.is_hdf5,
        {".weights.h5": ".weights.h5", ".h5": ".h5", ".hdf5": ".h5"},
    ),
    Entry(
        "keras_zip",
        "polyak_cli.formats.keras.archive:KerasArchive",
        detection.is_keras_archive,
        {".keras": ".keras"},
    ),
    Entry(
        "npz",
        "polyak_cli.formats.npz:Npz",
        detection.is_npz,
        {".npz": ".npz"},
    ),
    Entry(
        "weights_json",
        "polyak_cli.formats.keras.shards:KerasShards",
        detection.is_keras_index,
        {".weights.json": ".weights.json"},
    ),
    Entry(
        "safetensors",
        "polyak_cli.formats.safetensors:Safetensors",
        detection.is_safetensors,
        {
            ".safetensors": ".safetensors",
            ".safetensors.index.json": ".safetensors.index.json",
        },
        (
            "model.safetensors",
            "model.safetensors.index.json",
            "adapter_model.safetensors",
            "diffusion_pytorch_model.safetensors",
            "diffusion_pytorch_model.safetensors.index.json",
            "pytorch_lora_weights.safetensors",
        ),
    ),
    Entry(
        "torch_zip",
        "polyak_cli.formats.torch.archive:TorchZip",
        detection.is_torch_zip,
        {".pt": ".pt", ".pth": ".pth", ".bin": ".bin", ".ckpt": ".ckpt", ".pth.tar": ".pth.tar"},
        (
            "pytorch_model.bin",
            "pytorch_model_fsdp.bin",  # of Accelerate, with FULL_STATE_DICT
            "adapter_model.bin",
            "diffusion_pytorch_model.bin",
        ),
    ),
    Entry(
        "torch_dcp",
        "polyak_cli.formats.torch.distributed:DistributedCheckpoint",
        detection.is_dcp_metadata,
        {},
        # As PyTorch, torchtitan and Megatron save them; OLMo-core; Accelerate and Transformers.
        (".metadata", "model_and_optim/.metadata", "pytorch_model_fsdp_0/.metadata"),
    ),
    Entry(
        "orbax",
        "polyak_cli.formats.orbax.checkpoint:OrbaxCheckpoint",
        detection.is_orbax_metadata,
        {},
        # A tree, and a step of several items; without the latter, as older versions call items.
        (
            *_ORBAX,
            "pytree/_METADATA",
            "default/_METADATA",
            "state/_METADATA",
            "items/_METADATA",
            "params/_METADATA",
        ),
    ),
    Entry(
        "torch_shards",
        "polyak_cli.formats.torch.shards:TorchShards",
        detection.is_torch_index,
        {".bin.index.json": ".bin.index.json"},
        ("pytorch_model.bin.index.json", "diffusion_pytorch_model.bin.index.json"),
    ),
    Entry(
        "modules",
        "polyak_cli.formats.sentence_transformers:ModuleFolders",
        detection.is_list_of_modules,
        {},
        ("modules.json",),
    ),
    Entry(
        "tf_bundle",
        "polyak_cli.formats.tensorflow.bundle:TensorFlowBundle",
        detection.is_tensorflow_index,
        {".index": ".index"},
    ),
)


#: The opener of a folder of modules, among which the others may be.
MODULES = "modules.json"
#: All names by which a folder that is one checkpoint is opened.
OPENERS = tuple(name for entry in FORMATS for name in entry.openers)


def choose_openers(names: Collection[str]) -> list[str]:
    """Return the names by which a folder could be opened; several if it is not clear by which.

    Of the same weights in safetensors and in PyTorch's own format, the former are taken, as
    Transformers, PEFT and Diffusers do.
    """
    for name in (MODULES, *_ORBAX):
        if name in names:
            return [name]
    found = [name for name in OPENERS if name in names]
    safe = {_find_stem(name) for name in found if ".safetensors" in name}
    return [name for name in found if ".safetensors" in name or _find_stem(name) not in safe]


def _find_stem(name: str) -> str:
    """Return what two forms of the same weights have in common."""
    return name.partition(".")[0].removeprefix("pytorch_").removesuffix("_fsdp")


@functools.cache
def find_format(key: str) -> Format:
    """Return the format of a key of `FORMATS`, imported when it is first needed."""
    (home,) = (entry.home for entry in FORMATS if entry.key == key)
    module, _, name = home.partition(":")
    form = getattr(importlib.import_module(module), name)()
    if not isinstance(form, Format):
        raise TypeError(f"{home} is no Format")
    return form


def detect(path: Path) -> str:
    """Return the key of the format of a checkpoint, recognised by content.

    Raises:
        FormatError: the file cannot be read, or is of no format that is known here; says what it is
            and what to do.
    """
    try:
        with open_input(path) as file, name_errors(str(path)):
            opening = Opening(file)
            # Each part is made of several archives, which only their index tells apart.
            if path.suffix == foreign.DCP_PART:
                raise FormatError(foreign.describe_unknown(opening))
            for entry in FORMATS:
                if entry.recognises(opening):
                    return entry.key
            if detection.has_user_block(opening):
                return _WITH_USER_BLOCK
            raise FormatError(foreign.describe_unknown(opening))
    except FormatError as error:
        if str(error).endswith(": is not a regular file") and path.is_dir():
            raise FormatError(f"{shown(path)}: {name_folder(path) or foreign.DIRECTORY}") from None
        raise


def is_known_content(path: Path) -> bool:
    """Return whether a file is of a format that is known here; no more than its ends are read."""
    try:
        detect(path)
    except FormatError:
        return False
    return True


def name_folder(path: Path) -> foreign.Foreign | None:
    """Return which other program's checkpoint a folder is, if it is one."""
    try:
        return foreign.name_folder(os.listdir(path))  # noqa: PTH208 - names alone are needed
    except OSError:
        return None


def name_file(path: Path) -> foreign.Foreign | None:
    """Return which other program's file a file is, if it is of no format that is known here."""
    try:
        with open_input(path) as file, name_errors(str(path)):
            opening = Opening(file)
            if any(entry.recognises(opening) for entry in FORMATS):
                return None
            return foreign.name_file(opening)
    except FormatError:
        return None
