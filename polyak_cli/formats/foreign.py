"""Name files and folders that are no checkpoint of a known format, and say what to do with them.

Knows how other programs' files begin, end and are called.  Reads a few bytes, parses nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import NamedTuple

from polyak_cli.formats.detection import Opening


class Foreign(NamedTuple):
    """What a file or a folder is, and what its user should do.

    Attributes:
        name: with its article, such as "a GGUF file".
        advice: a clause in the imperative.
    """

    name: str
    advice: str

    def __str__(self) -> str:
        """Return both, as errors have them behind the name of the file."""
        return f"is {self.name}; {self.advice}"


_BEFORE = "average the checkpoints that it was made from, and convert the average"
_STATE = "torch.save(model.state_dict(), ...) or safetensors"
_UNPACK = "unpack it, and average what is in it"
GGUF = Foreign("a GGUF or GGML file of llama.cpp", f"{_BEFORE} with convert_hf_to_gguf.py")
ONNX = Foreign("an ONNX model", _BEFORE)
MSGPACK = Foreign(
    "a msgpack file, as Flax writes them",
    "load it with flax.serialization and save its arrays with safetensors.flax.save_file or "
    "numpy.savez",
)
SAVED_MODEL = Foreign(
    "a TensorFlow SavedModel",
    "average the TensorFlow checkpoints in it, A/variables/variables.index and so on, into "
    "variables/variables.index of a copy of the newest folder",
)
ORBAX = Foreign(
    "an Orbax checkpoint that has no _METADATA here",
    "name the folder in it that has one, as in 'run/*/NAME'; if none has, restore it with "
    "orbax.checkpoint and save it again",
)
#: Before version 0.3: one msgpack file for the tree, and a folder for each array.
OLD_ORBAX = Foreign(
    "an Orbax checkpoint from before version 0.3, without _METADATA",
    "restore it with orbax.checkpoint and save it again with a newer version",
)
#: Without the file `.metadata`, which is written last and says what lies in which part.
DCP = Foreign(
    "a distributed checkpoint of PyTorch (DCP) without its .metadata",
    "it was not saved completely: save it again or leave it out",
)
DCP_BY_RANK = Foreign(
    "a distributed checkpoint of PyTorch (DCP) with one .metadata a process",
    "save it with use_collectives=True",
)
DCP_SHARDS = Foreign(
    "a distributed checkpoint of PyTorch (DCP) in safetensors files that hold parts of tensors",
    "save it with HuggingFaceStorageWriter(..., enable_consolidation=True)",
)
DEEPSPEED = Foreign(
    "a checkpoint of DeepSpeed's ZeRO, in parts",
    "convert each to one file with the zero_to_fp32.py beside it",
)
#: The ending of the names of its parts.
DCP_PART = ".distcp"
EXPORTED = Foreign("a program of torch.export (.pt2)", f"{_BEFORE}; save those with {_STATE}")
TFLITE = Foreign("a TFLite (LiteRT) model", _BEFORE)
COREML = Foreign("a Core ML model", _BEFORE)
GRAPH = Foreign("a TensorFlow graph (.pb)", "average the checkpoints that it was frozen from")
NUMPY = Foreign(
    "a single numpy array (.npy)", "save all tensors of a model together: numpy.savez(FILE, **them)"
)
PICKLE = Foreign(
    "a pickle, as pickle.dump and joblib.dump write them",
    "unpickling can run code, so polyak never does it: if you trust its source, load it and save "
    f"its arrays with numpy.savez, or a model with {_STATE}",
)
LEGACY_TORCH = Foreign(
    "a file of torch.save in the format before PyTorch 1.6",
    "if you trust its source, load it with torch.load and save it again with torch.save",
)
TAR = Foreign(
    "a tar archive",
    f"{_UNPACK}; the oldest torch.save wrote them too: torch.load and save it again",
)
LFS = Foreign("a Git LFS pointer, not the file itself", "fetch the file with `git lfs pull`")
HTML = Foreign(
    "an HTML or XML page, as servers send in place of a file",
    "read what the page says, and download the file again",
)
EMPTY = Foreign("empty (0 bytes)", "save it again or leave it out")
ZEROS = Foreign("all zeros at its beginning", "it was not written completely: save it again")
JSON = Foreign("a JSON file", "name the file of the tensors instead")
ZIP = Foreign("a zip archive that holds no known checkpoint", _UNPACK)
DIRECTORY = Foreign("a folder and not one checkpoint", "name one of the checkpoints in it")


def _compressed(program: str) -> Foreign:
    return Foreign(f"compressed with {program}", _UNPACK)


#: How files begin -> what they are.  The first that fits counts.
_HEADS: tuple[tuple[re.Pattern[bytes], Foreign], ...] = tuple(
    (re.compile(pattern, re.DOTALL | re.IGNORECASE), what)
    for pattern, what in (
        (rb"version https://git-lfs", LFS),
        (rb"\s*<(!doctype|html|head|\?xml|error)", HTML),
        (rb"gguf|ggml|ggjt|ggla|lmgg|tjgg", GGUF),
        (rb".{4}TFL3", TFLITE),
        (rb"\x93NUMPY", NUMPY),
        (rb"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P", LEGACY_TORCH),
        (rb"\x80[\x02-\x05]", PICKLE),
        (rb"\x1f\x8b", _compressed("gzip")),
        (rb"BZh[1-9]", _compressed("bzip2")),
        (rb"\xfd7zXZ", _compressed("xz")),
        (rb"\x28\xb5\x2f\xfd", _compressed("zstd")),
        (rb"7z\xbc\xaf", _compressed("7-Zip")),
        # joblib compresses its pickles with zlib.
        (rb"x[\x01\x5e\x9c\xda]", _compressed("zlib, as joblib does")),
        # Field 1 of a protocol buffer: version 1 of a SavedModel, and the version of ONNX's IR.
        (rb"\x08\x01\x12", SAVED_MODEL),
        (rb"\x08[\x02-\x14][\x12\x1a\x22\x28\x32\x3a\x42]", ONNX),
        # A map whose first key is a text.
        (rb"(\xde..|\xdf....|[\x81-\x8f])([\xa1-\xbf]|\xd9.)[\w/]", MSGPACK),
        (rb"\0{32}", ZEROS),
        (rb"\s*[{\[]", JSON),
        (rb"PK\x03\x04", ZIP),
    )
)
#: Endings of names -> what the file is, where its content does not tell.
_ENDINGS = {
    ".gguf": GGUF,
    ".ggml": GGUF,
    ".onnx": ONNX,
    ".tflite": TFLITE,
    ".msgpack": MSGPACK,
    ".mlmodel": COREML,
    ".pt2": EXPORTED,
    ".pkl": PICKLE,
    ".pickle": PICKLE,
    ".joblib": PICKLE,
    ".npy": NUMPY,
    ".metadata": Foreign(
        "no .metadata of a distributed checkpoint of PyTorch (DCP)", "save it again or leave it out"
    ),
    DCP_PART: Foreign(
        "a part of a distributed checkpoint of PyTorch (DCP)", "name the folder that it lies in"
    ),
}
#: Those whose content looks like another format's: the name is believed first.
_BY_NAME_FIRST = (".mlmodel", DCP_PART, ".metadata")
#: What tells a folder by the names in it.
_FOLDERS: tuple[tuple[Callable[[Collection[str]], bool], Foreign], ...] = (
    (lambda names: not {"saved_model.pb", "saved_model.pbtxt"}.isdisjoint(names), SAVED_MODEL),
    (lambda names: _any(r"__\d+\.metadata", names), DCP_BY_RANK),
    (lambda names: _any(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors", names), DCP_SHARDS),
    (lambda names: ".metadata" not in names and _any(r".*\.distcp", names), DCP),
    (
        lambda names: (
            not {
                "_CHECKPOINT_METADATA",
                "_METADATA",
                "manifest.ocdbt",
                "ocdbt.process_0",
            }.isdisjoint(names)
        ),
        ORBAX,
    ),
    (
        lambda names: (
            "checkpoint" in names and _any(r"[\w.-]+\.(kernel|bias|scale|embedding)", names)
        ),
        OLD_ORBAX,
    ),
    (lambda names: _any(r"(bf16_|fp16_)?zero_pp_rank_.*", names), DEEPSPEED),
    (lambda names: {"Manifest.json", "Data"} <= set(names), COREML),
)
#: Suffix -> what a file of that name should be, for one that is nothing known.
_EXPECTED = {
    ".keras": "a .keras archive",
    ".npz": "an .npz archive of numpy",
    ".safetensors": "a safetensors file",
    ".pt": "a file of torch.save",
    ".pth": "a file of torch.save",
    ".ckpt": "a file of torch.save",
    ".bin": "a file of torch.save",
    ".index": "the index of a TensorFlow checkpoint",
    ".h5": "an HDF5 file",
    ".hdf5": "an HDF5 file",
}


def name_file(opening: Opening) -> Foreign | None:
    """Return what a file is by its content, and by its name where that does not tell."""
    ending = _find_ending(opening.file.name)
    if opening.file.size == 0:
        return EMPTY
    if ending in _BY_NAME_FIRST:
        return _ENDINGS[ending]
    if any(name.rpartition(b"/")[2] in _OF_PT2 for name in opening.members):
        return EXPORTED
    head = opening.file.read(0, 512)
    if head[257:262] == b"ustar":
        return TAR
    for pattern, what in _HEADS:
        if pattern.match(head):
            return what
    if ending == ".pb":
        return GRAPH
    return _ENDINGS.get(ending)


#: Members of an archive of torch.export, of two generations.
_OF_PT2 = {b"archive_format", b"serialized_exported_program.json"}


def describe_unknown(opening: Opening) -> str:
    """Return what is wrong with a file of no known format: a clause that follows its name."""
    foreign = name_file(opening)
    expected = _EXPECTED.get(_find_ending(opening.file.name))
    if foreign is ZIP and expected:  # a damaged list of members names none
        return f"is not {expected}, but {foreign.name}; save it again or leave it out"
    if foreign:
        return str(foreign)
    head = opening.file.read(0, 8)
    if expected:
        return f"is not {expected} (it begins with {head!r}); save it again or leave it out"
    return (
        f"is not a checkpoint in a known format (it begins with {head!r}): expected Keras's .h5, "
        ".weights.h5 or .keras, safetensors, PyTorch's, TensorFlow's, or .npz"
    )


def name_by_ending(name: str) -> Foreign | None:
    """Return what a file seems to be by its name alone."""
    return _ENDINGS.get(_find_ending(name))


def name_folder(names: Collection[str]) -> Foreign | None:
    """Return what a folder is, by the names of the files and folders in it."""
    return next((what for test, what in _FOLDERS if test(names)), None)


def _find_ending(name: str) -> str:
    dot = name.rfind(".")
    return name[dot:].casefold() if dot > name.rfind("/") else ""


def _any(pattern: str, names: Collection[str]) -> bool:
    return any(re.fullmatch(pattern, name) for name in names)
