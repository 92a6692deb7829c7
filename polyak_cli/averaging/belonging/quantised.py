"""Recognise quantised tensors: integers that mean something only under their float scales.

Each checkpoint has scales of its own, so neither the newest integer nor the mean of integers times
the mean scale is the average.  Knows how programs call the parts.  Reads no values: which integers
differ between checkpoints is found by who compares them.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from polyak_cli.errors import shown
from polyak_cli.tensors import FLOATS, WHOLE_NUMBERS, TensorSpec

#: Words of a name that say "scale of the tensor beside it".
_SCALES = {"scale", "scales", "absmax", "amax", "scb", "zero", "zeros", "qzeros", "codebooks"}
#: Words that make it a scale of the model's own: CLIP's logit_scale, CaiT's layer_scale.
_OWN_SCALES = {"logit", "layer", "res", "residual", "norm", "log", "loss", "grad", "attn", "lr"}
#: Last parts of names that packed integers have, and nothing else -> who calls them so.
_PACKED = {
    "qweight": "GPTQ or AWQ",
    "q_weight": "EXL2",
    "weight_packed": "compressed-tensors",
    "int_data": "torchao",
    "qdata": "torchao",
    "weight_qdata": "torchao",
    "_weight_qdata": "torchao",
    "packed_weight": "torchao",
    "W_q": "HQQ",
    "_data": "quanto",
    "codes": "AQLM",
    "quantized_kernel": "Keras",
    "quantized_embeddings": "Keras",
}
#: Last parts of the names of what a layer multiplies with.
_WEIGHTS = {"weight", "kernel", "embeddings", "recurrent_kernel", "depthwise_kernel"}
#: Last words of names whose integers count, number or select something.
_COUNTS = {
    *("index", "indices", "idx", "ids", "id", "mask", "masks", "ptr", "pos", "position"),
    *("positions", "count", "counts", "counter", "counters", "number", "step", "steps", "seed"),
    *("state", "epoch", "vocab", "label", "labels", "type", "types", "tokens", "permutation"),
    *("shape", "size", "sizes", "order", "offset", "offsets", "updates", "enabled", "tracked"),
}
#: As many globs are named in an error; each covers the layers that differ by a number only.
_MOST_GLOBS = 12


class Quantised(NamedTuple):
    """One quantised tensor of a model."""

    name: str  # of the integers
    kind: str  # such as "GPTQ: 4-bit integers with scales"
    parts: tuple[str, ...]  # names of the integers and of what belongs to them


def describe_quantised(
    specs: Sequence[TensorSpec], averaged: Collection[str], wanted: Collection[str]
) -> str:
    """Return why quantised tensors cannot be averaged; "" if there are none, or all are carried.

    Args:
        specs: the tensors of the model.
        averaged: names of those that would be averaged.
        wanted: names of those that no option leaves out.
    """
    index = _Index(specs)
    refused = []
    for spec in specs:
        kind = _recognise(spec, index)
        parts = index.list_parts(spec) if kind else []
        # Scales may be integers too (MXFP4): then only the options say that all parts are carried.
        without_floats = all(part.dtype not in FLOATS for part in parts)
        mixed = any(part.name in averaged for part in parts)
        if kind and (mixed or (without_floats and spec.name in wanted)):
            names = tuple(part.name for part in parts)
            refused.append(Quantised(spec.name, kind, names))
    if not refused:
        return ""
    more = f" (and {len(refused) - 1} more such)" if len(refused) > 1 else ""
    return (
        f"tensor '{shown(refused[0].name)}' is quantised ({refused[0].kind}){more}; average the "
        "checkpoints before quantisation or dequantise them first, or carry the quantised tensors "
        f"from the newest with {word_globs(refused, [spec.name for spec in specs])}"
    )


def list_suspects(
    specs: Sequence[TensorSpec], averaged: Collection[str], wanted: Collection[str]
) -> dict[str, Quantised]:
    """Return the integers that must be the same in all checkpoints to be carried, by their names.

    They have a float tensor beside them that looks like their scale, or the name of weights.  They
    are no quantised tensors if they are constants, as positions and masks are.

    Args:
        specs: the tensors of the model.
        averaged: names of those that would be averaged.
        wanted: names of those that no option leaves out.
    """
    index = _Index(specs)
    found = {}
    for spec in specs:
        if not _is_integer(spec) or spec.name not in wanted:
            continue
        scale = _find_suspected_scale(spec, index, averaged)
        if scale:
            kind = f"{spec.dtype} beside '{shown(scale.name)}', which looks like its scale"
            found[spec.name] = Quantised(spec.name, kind, (spec.name, scale.name))
        elif _find_last(spec.name) in _WEIGHTS and len(spec.shape) > 1:
            kind = f"{spec.dtype} where a model has floats"
            found[spec.name] = Quantised(spec.name, kind, (spec.name,))
    return found


def describe_suspect(one: Quantised, names: Sequence[str]) -> str:
    """Return why integers that differ between the checkpoints cannot be carried.

    Args:
        one: of `list_suspects`.
        names: of all tensors of the model.
    """
    return (
        f"tensor '{shown(one.name)}' looks quantised ({one.kind}) and is not the same in all "
        "checkpoints; average the checkpoints before quantisation or dequantise them first, or "
        f"carry it from the newest with {word_globs([one], names)}; if it is no such thing, use "
        "--allow scaled-integers"
    )


# --- by names and types ---------------------------------------------------------------------------


class _Index:
    """The tensors of a model by their folders, and their scales by the tensors they belong to."""

    def __init__(self, specs: Iterable[TensorSpec]) -> None:
        self.folders: dict[str, list[TensorSpec]] = {}
        self.of_tensor: dict[str, list[TensorSpec]] = {}  # "a.weight" -> "a.weight_scale", ...
        self.derived: set[str] = set()  # names of scales that are named after another tensor
        names = set()
        scales = []
        for spec in specs:
            names.add(spec.name)
            self.folders.setdefault(_find_folder(spec.name), []).append(spec)
            if _is_scale(spec.name):
                scales.append(spec)
        for spec in scales:
            for owner in _list_owners(spec.name):
                if owner in names:
                    self.of_tensor.setdefault(owner, []).append(spec)
                    self.derived.add(spec.name)

    def list_siblings(self, spec: TensorSpec) -> list[TensorSpec]:
        """Return the scales in the folder of a tensor that are not named after another one."""
        folder = self.folders.get(_find_folder(spec.name), [])
        return [one for one in folder if _is_scale(one.name) and one.name not in self.derived]

    def list_parts(self, spec: TensorSpec) -> list[TensorSpec]:
        """Return a tensor of integers and all that belongs to it."""
        parts = [spec, *self.of_tensor.get(spec.name, []), *self.list_siblings(spec)]
        if len(parts) == 1 and _find_last(spec.name).isdigit():  # the files number the tensors
            parts += [one for one in self.folders[_find_folder(spec.name)] if one is not spec]
        return parts


def _recognise(spec: TensorSpec, index: _Index) -> str:
    """Return what a tensor is if it is surely quantised, else ""."""
    if not _is_integer(spec) and not spec.dtype.startswith("float8"):
        return ""
    last = _find_last(spec.name)
    siblings = index.list_siblings(spec)
    own = index.of_tensor.get(spec.name, [])
    if _is_scale(spec.name) and last not in _PACKED:  # such as the bytes of nested scales
        return ""
    if last == "qweight" and siblings:
        return _describe_gptq(spec, siblings, index)
    if last in _PACKED and (siblings or own) and _is_integer(spec):
        return f"{_PACKED[last]}: {spec.dtype} with scales"
    narrow = spec.dtype in ("int8", "uint8")
    words = {word for one in own for word in _split_words(_find_last(one.name))}
    if words & {"absmax"} or (
        last in _WEIGHTS and any(_find_last(s.name) == "SCB" for s in siblings)
    ):
        bits = 4 if spec.dtype == "uint8" else 8
        return f"bitsandbytes: {bits}-bit codes with scales"
    if own and (narrow or last in _WEIGHTS or spec.dtype.startswith("float8")):
        return f"{spec.dtype} with a scale"
    if last.endswith("_blocks") and f"{spec.name.removesuffix('_blocks')}_scales" in {
        one.name for one in siblings
    }:
        return f"MXFP4: {spec.dtype} blocks with scales"
    if spec.dtype.startswith("float8") and any(one.dtype in FLOATS for one in siblings):
        return f"{spec.dtype} with a scale"
    # Keras's weights files have numbers for names.
    beside = index.folders[_find_folder(spec.name)]
    if narrow and last.isdigit() and spec.shape and _has_numbered_float(beside):
        return f"{spec.dtype} with a scale"
    return ""


def _describe_gptq(spec: TensorSpec, siblings: Sequence[TensorSpec], index: _Index) -> str:
    """Return which program packed a ``qweight``, and in how many bits where the shapes tell.

    GPTQ packs along the inputs, whose number `g_idx` has; AWQ along the outputs, which have a
    column of scales each.
    """
    beside = {_find_last(one.name): one for one in index.folders[_find_folder(spec.name)]}
    groups, scales = beside.get("g_idx"), beside.get("scales", siblings[0])
    form, packed, whole = "AWQ", spec.shape[-1:], scales.shape[-1:]
    if groups is not None:
        form, packed, whole = "GPTQ", spec.shape[:1], groups.shape[:1]
    elif packed == whole:  # a column of scales for each packed column: GPTQ without an order
        form = "GPTQ"
    bits = 32 * packed[0] // whole[0] if packed and whole and whole[0] else 0
    return f"{form}: {f'{bits}-bit ' if bits in (2, 3, 4, 8) else ''}integers with scales"


def _has_numbered_float(folder: Iterable[TensorSpec]) -> bool:
    """Return whether a folder of a Keras weights file has float tensors."""
    return any(one.dtype in FLOATS and _find_last(one.name).isdigit() for one in folder)


# --- by what lies beside them ---------------------------------------------------------------------


def _find_suspected_scale(
    spec: TensorSpec, index: _Index, averaged: Collection[str]
) -> TensorSpec | None:
    """Return the averaged float tensor that looks like the scale of integers."""
    last = _find_last(spec.name)
    words = _split_words(last)
    zero = not {"zero", "zeros", "zp"}.isdisjoint(words)
    # A single number is a counter or a flag, unless it says that it is the point of zero.
    if not zero and (spec.size < 2 or _COUNTS.intersection(words[-1:])):
        return None
    beside = [
        one
        for one in (*index.of_tensor.get(spec.name, []), *index.folders[_find_folder(spec.name)])
        if one.name in averaged and one is not spec
    ]
    for one in beside:
        if _is_scale(one.name) and (zero or _is_per_group(one.shape, spec.shape)):
            return one
    # By shape alone, only what is too narrow to number things, and has the form of a matrix.
    if spec.dtype in ("int64", "uint64") or len(spec.shape) < 2:
        return None
    others = [one for one in beside if not _find_last(one.name).endswith("bias")]
    return next((one for one in others if _is_per_group(one.shape, spec.shape)), None)


def _is_per_group(scale: Sequence[int], values: Sequence[int]) -> bool:
    """Return whether a shape is that of one scale a tensor, a channel or a group of elements."""
    if all(length == 1 for length in scale):
        return True
    if len(scale) == 1:
        return any(scale[0] in (length, *_list_groups(length)) for length in values)
    if len(scale) != len(values) or list(scale) == list(values):
        return False
    return all(length and other % length == 0 for length, other in zip(scale, values, strict=True))


def _list_groups(length: int) -> list[int]:
    """Return how many groups of usual size a dimension may have."""
    return [
        length // size for size in (16, 32, 64, 128, 256) if size < length and not length % size
    ]


# --- names ----------------------------------------------------------------------------------------


def _is_integer(spec: TensorSpec) -> bool:
    """Return whether a tensor holds integers; truth values are none."""
    return spec.dtype in WHOLE_NUMBERS and spec.dtype != "bool"


def _find_folder(name: str) -> str:
    """Return a name without its last part, with the separator at its end."""
    return name[: len(name) - len(re.split(r"[/.]", name)[-1])]


def _find_last(name: str) -> str:
    """Return the last part of a name, without the number that TensorFlow appends."""
    return re.split(r"[/.]", name)[-1].partition(":")[0]


def _split_words(last: str) -> list[str]:
    """Return the words of the last part of a name, in small letters."""
    return [word for word in last.lower().split("_") if word]


def _is_scale(name: str) -> bool:
    """Return whether a name says that a tensor is the scale or the point of zero of another."""
    words = set(_split_words(_find_last(name)))
    quant = bool(words & {"quant", "bitsandbytes"})  # bitsandbytes: quant_map, quant_state
    return (quant or bool(words & _SCALES)) and not words & _OWN_SCALES


def _list_owners(name: str) -> list[str]:
    """Return the names of the tensors whose scale a tensor may be by its name."""
    folder, last = _find_folder(name), _find_last(name)
    tail = name[len(folder) + len(last) :]  # TensorFlow's ":0"
    owners = [folder[:-1], _find_folder(folder[:-1])[:-1]]  # "a.weight.quant_state.nf4"
    owners += [f"{folder}{last[: match.start()]}{tail}" for match in re.finditer("_", last)]
    if last.startswith("scale_"):  # ComfyUI: scale_weight
        owners.append(f"{folder}{last.removeprefix('scale_')}{tail}")
    return [owner for owner in owners if owner]


def word_globs(refused: Sequence[Quantised], names: Sequence[str]) -> str:
    """Return the options that carry all parts of quantised tensors from the newest checkpoint."""
    exact = [glob for one in refused for glob in _list_globs(one)]
    covered = {name for glob in exact for name in names if fnmatch.fnmatchcase(name, glob)}
    globs: Mapping[str, None] = {}
    for glob in exact:
        # Layers that differ by a number share a glob, where it covers nothing else.
        shared = re.sub(r"(?<=[/.])\d+(?=[/.])|^\d+(?=[/.])", "*", glob)
        wide = {name for name in names if fnmatch.fnmatchcase(name, shared)} <= covered
        globs = {**globs, (shared if wide else glob): None}
    listed = [f"--exclude-tensors '{shown(glob)}'" for glob in globs]
    more = len(listed) - _MOST_GLOBS
    return " ".join(listed[:_MOST_GLOBS]) + (f" and {more} more such" if more > 0 else "")


def _list_globs(one: Quantised) -> list[str]:
    """Return globs that match all parts of a quantised tensor, and as little else as possible."""
    folder = _find_folder(one.name)
    if all(part.startswith(one.name) for part in one.parts):
        return [f"{_escape(one.name)}*"]
    if folder and all(part.startswith(folder) for part in one.parts):
        return [f"{_escape(folder)}*"]
    return [_escape(part) for part in one.parts]


def _escape(name: str) -> str:
    """Return a glob that matches a name only."""
    return re.sub(r"([*?[])", r"[\1]", name)
