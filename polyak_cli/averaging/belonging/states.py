"""Recognise by their names the tensors of a training run that are no tensors of its model.

Formats that keep one flat list of names (safetensors, npz) tell nothing else of them: slots of an
optimizer, and single numbers such as a loss.  Formats with more structure have sorted theirs out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from polyak_cli.errors import list_some, word_count
from polyak_cli.tensors import FLOATS, TensorSpec

#: What torch.optim, apex, Adafactor and optax call an optimizer's slots, where no model does.
_SLOTS = {
    "acc_delta",
    "exp_avg",
    "exp_avg_sq",
    "exp_avg_sq_col",
    "exp_avg_sq_row",
    "exp_inf",
    "max_exp_avg_sq",
    "momentum_buffer",
    "square_avg",
}
#: How a path begins that leads into an optimizer: optimizer, optim_g, opt_state, training_state.
_OPTIMIZER = re.compile(r"(\w+_)?opt(im(izers?)?)?(_\w+)?|(training|trainer)_state")
#: What training scripts call single numbers of a run.
_MEASURES = (
    r"(loss|lr|learning_rate|acc|accuracy|epoch|step|iter|iteration|score|metric|error|perplexity|"
    r"ppl|psnr|ssim|fid|bleu|wer|cer|f1|auc|iou|miou|map)s?"
)
_MEASURE = re.compile(
    rf"((best|val|valid|validation|train|test|eval|last|mean|avg|running|global|total|min|max|top\d)"
    rf"_)*{_MEASURES}(_(best|val|valid|train|test|\d+))?"
)
#: Dictionaries of such numbers.
_MEASURED = re.compile(r"(\w+_)?(metrics?|stats|meters?|logs?|losses|scores|history|results)")


def is_of_the_run(spec: TensorSpec) -> bool:
    """Return whether a float is a slot of an optimizer, or a number of the run, by its name."""
    return spec.dtype in FLOATS and (_is_slot(spec.name) or _is_measure(spec))


def _is_slot(name: str) -> bool:
    """Return whether a name leads to a slot of an optimizer."""
    first, *others = re.split(r"[/.]", name)
    if others and others[-1] in _SLOTS:
        return True
    # As in 'optimizer.exp_avg.layer1.weight'.
    return bool(_OPTIMIZER.fullmatch(first)) and not _SLOTS.isdisjoint(others)


def _is_measure(spec: TensorSpec) -> bool:
    """Return whether a tensor is a single number that stands beside a model, not in a module."""
    *folders, last = spec.name.split("/")
    beside = not folders or (len(folders) == 1 and _MEASURED.fullmatch(folders[0]))
    return bool(spec.size == 1 and beside and _MEASURE.fullmatch(last.lower()))


def note_states(carried: Iterable[TensorSpec]) -> list[str]:
    """Return a note on the carried tensors that are of the run by their names."""
    names = [spec.name for spec in carried if is_of_the_run(spec)]
    if not names:
        return []
    return [
        f"{word_count(len(names), 'tensor')} ({list_some(names)}) look by their names like "
        "optimizer state or counters of the run, not like the model; the newest one's are "
        "copied, and --include-tensors averages them"
    ]


def note_numbers(averaged: Sequence[TensorSpec]) -> list[str]:
    """Return a note on averaged single numbers that stand beside the dictionaries of a model."""
    nested = any("/" in spec.name for spec in averaged)
    names = [spec.name for spec in averaged if nested and "/" not in spec.name and spec.size == 1]
    if not names:
        return []
    return [
        f"averaged as part of the model: {word_count(len(names), 'single number')} "
        f"({list_some(names)}); --exclude-tensors copies from the newest instead"
    ]
