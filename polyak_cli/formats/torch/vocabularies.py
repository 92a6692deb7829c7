"""Find the vocabularies and lists of classes that programs keep beside a state dict in one pickle.

Looks at the inert values that `pickles.read` returns.  Does not know how vocabularies are called;
see `formats.vocabularies`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from polyak_cli.formats.torch.pickles import Pairs
from polyak_cli.formats.vocabularies import digest_json, is_name_of_vocabulary
from polyak_cli.tensors import Asset

#: Dictionaries around a vocabulary at most: those of hyperparameters and of a tokenizer in them.
_DEPTH = 3


class _NotPlainError(Exception):
    """A value holds an object, of which a pickle does not say what it means."""


def find_in_pickle(root: Any) -> dict[str, Asset]:
    """Return the vocabularies in the dictionaries of a pickle, by the path of their keys.

    What holds objects or tensors is no vocabulary here: nothing is known of their content.
    """
    found = {}
    for name, value in _walk(root, (), set()):
        try:
            found[name] = Asset(digest_json(_simplify(value)))
        except (_NotPlainError, RecursionError):
            continue
    return found


def _walk(value: Any, path: tuple[str, ...], seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Yield path and value of what is called a vocabulary and is one: texts to or from rows."""
    if not isinstance(value, Pairs) or len(path) == _DEPTH or id(value) in seen:
        return
    seen.add(id(value))
    for key, inner in value.items:
        if not isinstance(key, str):
            continue
        if is_name_of_vocabulary(key) and _has_text(inner):
            yield "/".join((*path, key)), inner
        else:
            yield from _walk(inner, (*path, key), seen)


def _has_text(value: Any) -> bool:
    """Return whether a list or a dictionary begins with a text, as key or as value."""
    if isinstance(value, Pairs):
        return bool(value.items) and any(isinstance(one, str) for one in value.items[0])
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], str)


def _simplify(value: Any) -> Any:
    """Return a value as JSON can hold it, keys sorted."""
    if isinstance(value, Pairs):
        pairs = [(repr(_simplify(key)), _simplify(inner)) for key, inner in value.items]
        return {"pairs": sorted(pairs, key=lambda pair: pair[0])}
    if isinstance(value, (list, tuple)):
        return [_simplify(one) for one in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise _NotPlainError
