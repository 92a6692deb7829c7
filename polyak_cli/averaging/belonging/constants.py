"""Say which values are not finite and yet constants, and refuse NaN that mean a diverged run.

An infinity that every checkpoint has at the same place was put there: a mask, a best loss that has
not been measured yet.  NaN is the result of most errors as well.  Once the loss is NaN, every
gradient is, and with the next step every weight: a kernel, of two dimensions or more, holds NaN.
A number or a vector with some NaN, such as a best score that is not known, may be a constant.
Reads no values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from polyak_cli.engine.constants import Constant
from polyak_cli.errors import list_some, quote_glob, shown, word_count


def merge_constants(found: Iterable[Constant]) -> dict[str, Constant]:
    """Return what was found in the parts of each tensor, by tensor."""
    merged: dict[str, Constant] = {}
    for name, infinite, nan in found:
        _, *before = merged.get(name, Constant(name, 0, 0))
        merged[name] = Constant(name, before[0] + infinite, before[1] + nan)
    return merged


def is_diverged(constant: Constant, shape: Sequence[int]) -> bool:
    """Return whether the NaN of a tensor mean that training diverged."""
    return constant.nan > 0 and len(shape) > 1


def describe_diverged(constant: Constant) -> str:
    """Return why NaN that every checkpoint has are refused, and what to do."""
    return (
        f"tensor '{shown(constant.name)}' holds {constant.nan} NaN in every checkpoint: the run "
        "may have diverged; expected finite numbers, or the same infinity in every checkpoint. "
        "Choose earlier checkpoints with --to, copy the newest one's with --exclude-tensors "
        f"{quote_glob(constant.name)}, or use --allow-nonfinite"
    )


def describe_constants(found: Mapping[str, Constant]) -> Iterator[str]:
    """Yield a note on the infinities, and a warning about the NaN."""
    infinite = {one.name: one.infinite for one in found.values() if one.infinite}
    nan = {one.name: one.nan for one in found.values() if one.nan}
    if infinite:
        yield (
            f"{_word_where(infinite)} infinite in every checkpoint: constants, such as a mask, "
            "which the average keeps"
        )
    if nan:
        yield (
            f"warning: {_word_where(nan)} NaN in every checkpoint, and the average keeps them; "
            "check that the run has not diverged"
        )


def _word_where(counts: Mapping[str, int]) -> str:
    """Return how many numbers of which tensors: the beginning of a sentence with its verb."""
    total = sum(counts.values())
    tensors = word_count(len(counts), "tensor")
    verb = "is" if total == 1 else "are"
    return f"{word_count(total, 'number')} of {tensors} ({list_some([*counts])}) {verb}"
