"""Find the files of a run's folder that are no epoch of it, by the words that programs call them.

Trainers copy or link the newest and the best checkpoint under a second name, and their averaging
scripts write beside the epochs.  Knows names; opens no file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from polyak_cli.checkpoints.listing import PassedOver, Pool, find_kind
from polyak_cli.checkpoints.names import Name, has_whole_number, parse_name, split_words

#: Words of a name -> what the file is; the first that a name has counts, as in ave_10best.pth.
_OUTSIDERS = {
    **dict.fromkeys(split_words("avg ave average averaged"), "an average, by its name"),
    "best": "the best checkpoint, by its name",
    **dict.fromkeys(("last", "latest", "newest"), "the newest checkpoint, by its name"),
    "final": "the final model, by its name",
    **dict.fromkeys(("init", "initial"), "the initial model, by its name"),
}
#: The whole name of what a trainer is resumed from, which ESPnet and others write.
_RESUMED = re.compile(r"(checkpoint|ckpt|trainer_state)(\.\w+)+", re.IGNORECASE)
_WORDS = re.compile(r"[a-z]+|[A-Z][a-z]+|[A-Z]+(?![a-z])")
#: Files that are named alike, without such a word, from which on they are taken for the run.
_ENOUGH = 2


def pass_over_outsiders(pool: Pool) -> Pool:
    """Return the candidates without those that are called otherwise than an epoch of the run.

    Files that were given one by one stay.  All files stay where no run is recognised, which takes
    two names that differ only in a number.
    """
    if pool.as_given or len(pool.paths) <= _ENOUGH:
        return pool
    passed = [*_list_outsiders([parse_name(path) for path in pool.paths])]
    left = {one.path for one in passed}
    kept = tuple(path for path in pool.paths if path not in left)
    return replace(pool, paths=kept, passed_over=(*pool.passed_over, *passed))


def _list_outsiders(names: Sequence[Name]) -> Iterator[PassedOver]:
    """Yield the files that are no epoch, and why."""
    reasons = [_find_reason(name) for name in names]
    numbered = Counter(
        (find_kind(name.path), name.signature)
        for name, reason in zip(names, reasons, strict=True)
        if not reason and has_whole_number(name)
    )
    if not numbered or max(numbered.values()) < _ENOUGH:
        return
    for name, reason in zip(names, reasons, strict=True):
        if reason:
            yield PassedOver(name.path, reason)
        elif _RESUMED.fullmatch(name.path.name) and not has_whole_number(name):
            yield PassedOver(name.path, "the state that training resumes from, by its name")


def _find_reason(name: Name) -> str:
    """Return what a file is by a word of its name; "" if no word says it."""
    words = {word.casefold() for word in _WORDS.findall(name.stem)}
    return next((reason for word, reason in _OUTSIDERS.items() if word in words), "")
