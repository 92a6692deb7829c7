"""Recognise quantised tensors: integers that mean something only under their float scales.

Each checkpoint has scales of its own, so neither the newest integer nor the mean of integers times
the mean scale is the average.  Knows how programs call the parts.  Reads no values: which integers
differ between checkpoints is found by who compares them.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Sequence
from glob import escape
from typing import NamedTuple

from polyak_cli.errors import shown
from polyak_cli.tensors import FLOATS, WHOLE_NUMBERS, TensorSpec

#: What `--allow` takes to average beside integers that only look quantised.
ALLOWED = "scaled-integers"

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
#: Tensors of a folder that are looked at as neighbours of one of them.
_MOST_BESIDE = 64
#: Words at the end of a name that may say "scale": weight_input_global_scale_inv has four.
_MOST_WORDS = 4
#: As many globs are named in an error; each covers the layers that differ by a number only.
_MOST_GLOBS = 12


class Quantised(NamedTuple):
    """One quantised tensor of a model."""

    name: str  # of the integers
    kind: str  # such as "GPTQ: 4-bit integers with scales"
    parts: tuple[str, ...]  # names of the integers and of what belongs to them


def find_quantised(specs: Sequence[TensorSpec]) -> list[Quantised]:
    """Return the quantised tensors that names and types give away, in the order of the file."""
    packed = [spec for spec in specs if _is_integer(spec) or spec.dtype.startswith("float8")]
    if not packed:  # which most models have not, and looking at 100,000 names takes its time
        return []
    index = _Index(specs)
    found = []
    for spec in packed:
        kind = _recognise(spec, index)
        if kind:
            parts = tuple(part.name for part in index.list_parts(spec))
            found.append(Quantised(spec.name, kind, parts))
    return found


def describe_quantised(
    specs: Sequence[TensorSpec], averaged: Collection[str], wanted: Collection[str]
) -> str:
    """Return why quantised tensors cannot be averaged; "" if there are none, or all are carried.

    Args:
        specs: the tensors of the model.
        averaged: names of those that would be averaged.
        wanted: names of those that no option leaves out.
    """
    floats = {spec.name for spec in specs if spec.dtype in FLOATS}
    refused = []
    for one in find_quantised(specs):
        # Scales may be integers too (MXFP4): then only the options say that all parts are carried.
        without_floats = floats.isdisjoint(one.parts)
        mixed = any(part in averaged for part in one.parts)
        if mixed or (without_floats and one.name in wanted):
            refused.append(one)
    if not refused:
        return ""
    more = f" (and {len(refused) - 1} more such)" if len(refused) > 1 else ""
    return (
        f"tensor '{shown(refused[0].name)}' is quantised ({refused[0].kind}){more}; average the "
        "checkpoints from before quantisation, dequantise them first, or copy the quantised "
        f"tensors from the newest with {word_globs(refused, [spec.name for spec in specs])}"
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
    integers = [spec for spec in specs if _is_integer(spec)]
    index = _Index(specs if integers else ())
    found = {}
    for spec in integers:
        scale = _find_suspected_scale(spec, index, averaged)
        # What is carried alone keeps a scale that is averaged, and is as wrong.
        if scale and (spec.name in wanted or _is_scale(scale.name)):
            kind = f"{spec.dtype} beside '{shown(scale.name)}', which looks like its scale"
            found[spec.name] = Quantised(spec.name, kind, (spec.name, scale.name))
        elif spec.name in wanted and _find_last(spec.name) in _WEIGHTS and len(spec.shape) > 1:
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
        f"tensor '{shown(one.name)}' looks quantised ({one.kind}) and differs between "
        "checkpoints; average the checkpoints from before quantisation, dequantise them first, "
        f"or copy it from the newest with {word_globs([one], names)}; if it is not quantised, use "
        f"--allow {ALLOWED}"
    )


# --- by names and types ---------------------------------------------------------------------------


class _Index:
    """The tensors of a model by their folders, and their scales by the tensors they belong to.

    Of each folder only the first `_MOST_BESIDE` count: a layer has no more, and a file with all
    tensors in one folder is looked at in a time that grows with their number.
    """

    def __init__(self, specs: Iterable[TensorSpec]) -> None:
        self.specs = {spec.name: spec for spec in specs}
        self.folders: dict[str, list[TensorSpec]] = {}
        self.scales: dict[str, list[TensorSpec]] = {}  # folder -> those named after no tensor in it
        self.of_tensor: dict[str, list[TensorSpec]] = {}  # "a.weight" -> "a.weight_scale", ...
        for spec in self.specs.values():
            folder = _find_folder(spec.name)
            _append(self.folders, folder, spec)
            if _is_scale(spec.name):
                owners = [owner for owner in _list_owners(spec.name) if owner in self.specs]
                for owner in owners:
                    _append(self.of_tensor, owner, spec)
                if not owners:
                    _append(self.scales, _strip_part(folder), spec)

    def list_siblings(self, spec: TensorSpec) -> list[TensorSpec]:
        """Return the scales in the folder of a tensor that are not named after another one."""
        return self.scales.get(_find_folder(spec.name), [])

    def list_parts(self, spec: TensorSpec) -> list[TensorSpec]:
        """Return a tensor of integers and all that belongs to it."""
        parts = [spec, *self.of_tensor.get(spec.name, []), *self.list_siblings(spec)]
        if len(parts) == 1 and _find_last(spec.name).isdigit():  # the files number the tensors
            parts += [one for one in self.folders[_find_folder(spec.name)] if one is not spec]
        return parts


def _append(lists: dict[str, list[TensorSpec]], key: str, spec: TensorSpec) -> None:
    """Append to the list of a key, unless the list is long enough."""
    found = lists.setdefault(key, [])
    if len(found) < _MOST_BESIDE:
        found.append(spec)


def _recognise(spec: TensorSpec, index: _Index) -> str:
    """Return what a tensor is if it is surely quantised, else ""."""
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
    beside = {_find_last(one.name) for one in siblings}
    if "absmax" in words or (last in _WEIGHTS and beside & {"SCB", "absmax"}):
        bits = 4 if spec.dtype == "uint8" else 8
        return f"bitsandbytes: {bits}-bit codes with scales"
    if own and (narrow or last in _WEIGHTS or spec.dtype.startswith("float8")):
        return f"{spec.dtype} with a scale"
    if last.endswith("_blocks") and f"{last.removesuffix('_blocks')}_scales" in beside:
        return f"MXFP4: {spec.dtype} blocks with scales"
    if spec.dtype.startswith("float8") and any(one.dtype in FLOATS for one in siblings):
        return f"{spec.dtype} with a scale"
    # Keras's weights files have numbers for names.
    numbered = index.folders[_find_folder(spec.name)]
    if narrow and last.isdigit() and spec.shape and _has_numbered_float(numbered):
        return f"{spec.dtype} with a scale"
    return ""


def _describe_gptq(spec: TensorSpec, siblings: Sequence[TensorSpec], index: _Index) -> str:
    """Return which program packed a ``qweight``, and in how many bits where the shapes tell.

    GPTQ packs along the inputs, whose number `g_idx` has; AWQ along the outputs, which have a
    column of scales each.
    """
    groups = index.specs.get(f"{_find_folder(spec.name)}g_idx")
    scales = next((one for one in siblings if _find_last(one.name) == "scales"), siblings[0])
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
        for one in (
            *index.of_tensor.get(spec.name, []),
            *index.list_siblings(spec),
            *index.folders[_find_folder(spec.name)],
        )
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
    return name[: max(name.rfind("/"), name.rfind(".")) + 1]


def _strip_part(folder: str) -> str:
    """Return the folder of the integers for that of their scales: HQQ has a folder for these."""
    for part in ("meta", "qparams"):
        if folder[:-1].endswith((f"/{part}", f".{part}")):
            return folder[: -len(part) - 1]
    return folder


def _find_last(name: str) -> str:
    """Return the last part of a name, without the number that TensorFlow appends."""
    return name[max(name.rfind("/"), name.rfind(".")) + 1 :].partition(":")[0]


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
    ends = [match.start() for match in re.finditer("_", last)][-_MOST_WORDS:]
    owners += [f"{folder}{last[:end]}{tail}" for end in ends]
    if last.startswith("scale_"):  # ComfyUI: scale_weight
        owners.append(f"{folder}{last.removeprefix('scale_')}{tail}")
    return [owner for owner in owners if owner]


def word_globs(refused: Sequence[Quantised], names: Sequence[str]) -> str:
    """Return the options that carry all parts of quantised tensors from the newest checkpoint."""
    # Layers that differ by a number only share a glob.
    shared: dict[str, list[str]] = {}
    for glob in (glob for one in refused for glob in _list_globs(one)):
        wide = re.sub(r"(?<=[/.])\d+(?=[/.])|^\d+(?=[/.])", "*", glob)
        shared.setdefault(wide, []).append(glob)
    globs: list[str] = []
    for wide, exact in shared.items():
        if len(globs) > _MOST_GLOBS:
            break
        # Only where it covers no other layer: that would be carried without a word.
        starts = tuple(one.removesuffix("*") for one in exact)
        matched = (name for name in names if fnmatch.fnmatchcase(name, wide))
        is_safe = len(exact) > 1 and all(escape(name).startswith(starts) for name in matched)
        globs += [wide] if is_safe else exact
    listed = [f"--exclude-tensors '{shown(glob)}'" for glob in globs[:_MOST_GLOBS]]
    more = sum(map(len, shared.values())) - _MOST_GLOBS if len(globs) > _MOST_GLOBS else 0
    return " ".join(listed) + (f" and {more} more such" if more > 0 else "")


def _list_globs(one: Quantised) -> list[str]:
    """Return globs that match all parts of a quantised tensor, and as little else as possible."""
    folder = _find_folder(one.name)
    if all(part.startswith(one.name) for part in one.parts):
        return [f"{escape(one.name)}*"]
    if folder and all(part.startswith(folder) for part in one.parts):
        return [f"{escape(folder)}*"]
    return [escape(part) for part in one.parts]
