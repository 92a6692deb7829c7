"""Parse a file name: find its numbers, and guess which are epochs, steps or metrics.

Knows words and spellings.  Looks at no file, and does not compare names with one another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path


def split_words(words: str) -> frozenset[str]:
    """Return the words of a text as a set."""
    return frozenset(words.split())


#: Whether less or more is better -> last words of metrics' names.  Other names need a --mode.
BETTER = {
    "min": split_words(
        "loss error err mae mse rmse msle mape perplexity ppl crossentropy divergence hinge logcosh"
        " wer cer fid"
    ),
    "max": split_words(
        "acc accuracy auc precision recall f1 iou miou dice map ap r2 score bleu rouge psnr ssim"
        " sensitivity specificity kappa mcc"
    ),
}


class Role(Enum):
    """What a number in a file name seems to be, judged by the word before it.

    When the names of a run are compared, the value replaces the number.
    """

    EPOCH = "\0epoch"
    PLAIN = "\0plain"
    COUNTER = "\0counter"
    MEASURE = "\0measure"
    FIXED = "\0fixed"


#: Words for numbers that count as epochs do.  They are used if a name has no epoch.
_COUNTERS = split_words("step steps iter iters iteration iterations update updates batch ba")

_MEASURES = BETTER["min"] | BETTER["max"]

#: Words for numbers that identify the run, so they must not change within it.
_RUNS = split_words("run fold seed trial exp experiment rank worker split cv")

VERSIONS = split_words("v ver version")

_SETTINGS = split_words(
    "lr wd rate dropout alpha beta gamma momentum decay tau temp temperature width eps ema"
)

_SUFFIX = re.compile(r"\.(?:h5|hdf5|he5|hd5|json|keras)$", re.IGNORECASE)

# A minus is a sign only where it cannot be the dash between two fields: after "=", or after another
# dash and before a decimal.  An exponent has a sign, as Python writes it: in "0.25e12" it is epoch
# 12.  Digits with dots between them are cut up by _iterate_numerals().
_NUMERAL = re.compile(
    r"""
    (?: (?<==)-(?=\d) | (?<=[-_])-(?=\d+\.\d+(?!\.?\d)) )?  \d+(?:\.\d+)*  (?:[eE][-+]\d+)?
    | (?: (?<==)- | (?<=[-_])- )?  (?<![^\W\d_])(?:nan|inf)(?![^\W_])
    """,
    re.VERBOSE | re.IGNORECASE,
)

# The last word of a text: "epoch" in "my-epoch_", "Epoch" in "netEpoch"; f1 and r2 are words too.
_LABEL = re.compile(
    r"(?: (?<![^\W\d_]) | (?=[A-Z]) ) ([fF]1|[rR]2|[A-Z]?[a-z]+|[A-Z]+) ([-_=:.\ ]*) $", re.VERBOSE
)

_LABEL_AFTER = re.compile(r"(?:epochs?|ep)(?![^\W\d_])", re.IGNORECASE)

DATE = re.compile(r"(?:19|20)\d{6}")

#: What fairseq saves within an epoch: the epoch, of which there may be several, and the update.
_OF_FAIRSEQ = re.compile(r"checkpoint_\d+_\d+\.pt")

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|[^\W\d_a-zA-Z]+")


@dataclass(frozen=True, slots=True)
class _Number:
    """One number in a name, the word before it (``label``), and the text between (``joint``)."""

    text: str
    start: int
    value: int | float
    role: Role
    label: str
    joint: str


@dataclass(frozen=True, slots=True)
class Name:
    """A parsed file name; ``signature`` is the same for all names of a run."""

    path: Path
    stem: str
    numbers: tuple[_Number, ...]
    signature: str


def parse_name(path: Path) -> Name:
    """Find the numbers in a file's name."""
    stem = _SUFFIX.sub("", path.name)
    numbers: list[_Number] = []
    pieces: list[str] = []
    end = 0
    counts_updates = _OF_FAIRSEQ.fullmatch(path.name) is not None
    for start, text in _iterate_numerals(stem):
        number = _classify_number(stem, start, text)
        if counts_updates and not numbers:
            number = replace(number, role=Role.COUNTER)
        numbers.append(number)
        # A number that belongs to the run's name must be the same in all of its files.
        fixed = text if number.role is Role.FIXED else number.role.value
        pieces += (stem[end:start], fixed)
        end = start + len(text)
    pieces.append(stem[end:])
    return Name(path, stem, tuple(numbers), "".join(pieces))


def _iterate_numerals(stem: str) -> Iterator[tuple[int, str]]:
    """Yield start and text of each number; ``10.0.25`` in weights.10.0.25.h5 is 10 and 0.25."""
    for match in _NUMERAL.finditer(stem):
        start, parts = match.start(), match[0].split(".")
        if len(parts) % 2:
            yield start, parts[0]
            start += len(parts[0]) + 1
            parts = parts[1:]
        for whole, fraction in zip(parts[::2], parts[1::2], strict=True):
            text = f"{whole}.{fraction}"
            yield start, text
            start += len(text) + 1


def _classify_number(stem: str, start: int, text: str) -> _Number:
    match = _LABEL.search(stem[:start])
    label, joint = (match[1].casefold(), match[2]) if match else ("", "")
    if not text.lstrip("-").isdecimal():
        role = Role.FIXED if label in VERSIONS else Role.MEASURE
        return _Number(text, start, float(text), role, label, joint)
    role = _choose_role(label)
    if role is Role.PLAIN and _LABEL_AFTER.match(stem, start + len(text)):
        role = Role.EPOCH
    return _Number(text, start, int(text), role, label, joint)


def _choose_role(label: str) -> Role:
    # "ep" and "e" must be whole words: "step" and "size" end in them.
    if label.endswith(("epoch", "epochs")) or label in ("ep", "e"):
        return Role.EPOCH
    if label in _COUNTERS:
        return Role.COUNTER
    # Folds are called f1, so what follows "f1" may well be an epoch.
    if label not in ("f1", "r2") and _strip_split(label) in _MEASURES:
        return Role.MEASURE
    return Role.FIXED if label in _RUNS else Role.PLAIN


def _strip_split(label: str) -> str:
    return re.sub(r"^(?:validation|valid|val|training|train|test)(?=.)", "", label)


def has_whole_number(name: Name) -> bool:
    """Return whether a name has a number that could be an epoch."""
    return any(isinstance(number.value, int) for number in name.numbers)


def find_metric(name: Name, monitor: str) -> _Number | None:
    """Return the number that the metric's name precedes, else the only decimal without a name."""
    wanted = _split_label(monitor)
    before = [(one, _split_label(name.stem[: one.start])) for one in name.numbers]
    named = [one for one, words in before if _ends_with(words, wanted)]
    if named:
        return named[-1]
    bare = [number for number in name.numbers if is_unnamed_decimal(number)]
    return bare[0] if len(bare) == 1 else None


def is_unnamed_decimal(number: _Number) -> bool:
    """Return whether a decimal has no name: none in 10-0.25, but one in lr0.25 and a=0.25."""
    if isinstance(number.value, int):
        return False
    if not number.label:
        return True
    meant = _strip_split(number.label)
    return (
        bool(number.joint.strip("=:"))
        and meant not in _MEASURES
        and meant not in _SETTINGS
        and meant not in VERSIONS
    )


def _split_label(text: str) -> list[str]:
    words = [word.casefold() for word in _WORD.findall(text)]
    return ["accuracy" if word == "acc" else word for word in words]


def _ends_with(words: Sequence[str], wanted: Sequence[str]) -> bool:
    """Return whether the words end in the wanted ones, and are no metric of another split."""
    if len(wanted) > 1 and words[-1:] == ["".join(wanted)]:
        return True
    before, end = words[: -len(wanted)], words[-len(wanted) :]
    splits = ("val", "valid", "validation", "train", "training", "test")
    return end == list(wanted) and (not before or before[-1] not in splits)
