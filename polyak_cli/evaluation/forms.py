"""Recognise the forms in which rows are given: parts, pairs, and several inputs or outputs.

A file names its arrays; a function of the user returns tuples, lists and dicts of them.  This
module turns both into pairs of features and labels, by part.  It knows names and numbers of rows;
it checks no values, and knows no model: whether the names are those of its inputs, `labels` checks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from polyak_cli.errors import FormatError, PolyakError, shown

#: Features and labels by part: "train", "test", or "" where the rows are not divided.  Several
#: arrays are a tuple or a dict; a list is one array, row by row.
Pairs: TypeAlias = dict[str, tuple[object, object]]

WHOLE = ""  # name of the only part of rows that are not divided
#: What an .npz file may hold; see `sort_names`.
_EXPECTED_NAMES = (
    "expected arrays x and y, or x_train, y_train, x_test and y_test; several inputs or outputs "
    "are numbered (y1, y2) or named (y_NAME, y_train_NAME)"
)
_EXPECTED = (
    "expected (x, y), ((x_train, y_train), (x_test, y_test)) "
    'or {"train": (x, y), "test": (x, y)}, where x and y are each an array, or a tuple, list or '
    "dict of arrays"
)
_NAME = re.compile(r"(?P<side>[xy])(?:_(?P<part>train|test))?(?:_?(?P<number>\d+)|_(?P<name>.+))?")


# --- named arrays ---------------------------------------------------------------------------------


def sort_names(where: str, held: Mapping[str, Any]) -> tuple[Pairs, list[str]]:
    """Return the pairs that named arrays make, and the names of the arrays that are not used.

    * ``x`` and ``y`` are all rows; ``x_train``, ``y_train``, ``x_test``, ``y_test`` are two parts.
    * ``y1``, ``y2``, ... (or ``y_1``, ``y_train1``, from 0 or 1 on) are several, by position.
    * ``y_NAME`` (``y_train_NAME``) are several, by name.  The same holds for ``x`` and inputs.
    * An array ``y`` is used alone: ``y_NAME`` beside it is not used.  So is ``x_NAME`` where there
      are parts.

    Raises:
        FormatError: the names make no pairs, or contradict one another.
    """
    matches = {key: match for key in held if (match := _NAME.fullmatch(key))}
    parts = {match["part"] for match in matches.values() if match["part"]} or {None}
    if parts != {None} and {"x", "y"} & set(held):
        raise _make_refusal(where, held)
    pairs: Pairs = {}
    used: set[str] = set()
    for part in sorted(parts, key=("train", "test", None).index):
        own = {key: match for key, match in matches.items() if match["part"] == part}
        sides = [[key for key, m in own.items() if m["side"] == side] for side in ("x", "y")]
        for side, other, keys in (("x", sides[1], sides[0]), ("y", sides[0], sides[1])):
            if other and not keys:
                missing = f"{side}_{part}" if part else side
                raise FormatError(f"{where}: holds {shown(other[0], 40)} but no {missing}")
        if not sides[0]:
            continue
        first, second = (_choose(where, side, own) for side in sides)
        pairs[part or WHOLE] = (_gather(first, own, held), _gather(second, own, held))
        used |= {*first, *second}
    if not pairs:
        raise _make_refusal(where, held)
    return pairs, [key for key in held if key not in used]


def _make_refusal(where: str, held: Iterable[str]) -> FormatError:
    found = ", ".join(shown(key, 40) for key in held) or "none"
    return FormatError(f"{where}: {_EXPECTED_NAMES}; found {found}")


def _choose(where: str, keys: Sequence[str], matches: Mapping[str, re.Match[str]]) -> list[str]:
    """Return the names of one side that are used, in order: the plain one, or all others."""
    plain = [key for key in keys if not matches[key]["number"] and not matches[key]["name"]]
    if plain:
        return plain
    numbers = {int(matches[key]["number"]): key for key in keys if matches[key]["number"]}
    if numbers and len(numbers) < len(keys):
        listed = ", ".join(shown(key, 40) for key in keys)
        raise FormatError(
            f"{where}: holds {listed}; expected several arrays to be either all numbered, like y1 "
            "and y2, or all named"
        )
    if not numbers:
        return list(keys)
    ordered = sorted(numbers)
    first = min(1, ordered[0])
    if ordered != [*range(first, first + len(ordered))]:
        listed = ", ".join(shown(numbers[number], 40) for number in ordered)
        raise FormatError(f"{where}: holds {listed}; expected numbers from 0 or 1 on, without gaps")
    return [numbers[number] for number in ordered]


def _gather(
    keys: Sequence[str], matches: Mapping[str, re.Match[str]], held: Mapping[str, Any]
) -> object:
    """Return one array, or several as a tuple, if numbered, or a dict, if named."""
    if matches[keys[0]]["number"]:
        return tuple(held[key] for key in keys)
    names = [matches[key]["name"] for key in keys]
    return held[keys[0]] if names == [None] else dict(zip(names, map(held.get, keys), strict=True))


# --- what a function returned ---------------------------------------------------------------------


def sort_returned(where: str, returned: Any) -> tuple[Pairs, list[str]]:
    """Return the pairs that a function returned, and the names of arrays that are not used.

    Two pairs are train and test, as ``keras.datasets`` returns them, or the inputs and the outputs
    of a model that has two of both.  They are train and test if the first pair has another number
    of rows than the second.  If all have the same number, they are train and test if they are
    tuples of arrays of the same shapes, array by array; otherwise inputs and outputs.  No number
    depends on a wrong guess: a model takes one input or two, and refuses the other.

    Raises:
        PolyakError: it has another form.
    """
    if isinstance(returned, Mapping):
        if returned and not {*returned} <= {"train", "test"}:
            if any(isinstance(key, str) and _NAME.fullmatch(key) for key in returned):
                named = {str(key): value for key, value in returned.items()}
                return sort_names(f"{where} returned a dict", named)
        elif returned:
            return {key: _check_pair(where, pair) for key, pair in returned.items()}, []
        keys = ", ".join(shown(key, 40) for key in returned) or "none"
        raise PolyakError(f"{where} returned a dict with the keys {keys}; {_EXPECTED}")
    if _are_parts(returned):
        pairs = [_check_pair(where, pair) for pair in returned]
        return dict(zip(("train", "test"), pairs, strict=True)), []
    return {WHOLE: _check_pair(where, returned)}, []


def _are_parts(returned: Any) -> bool:
    """Return whether something is ((x_train, y_train), (x_test, y_test)); see `sort_returned`."""
    if not _is_pair(returned) or not all(map(_is_pair, returned)):
        return False
    # Lists of numbers are arrays, and two rows of two numbers are no pairs.
    if not all(isinstance(pair, tuple) or any(map(_is_several, pair)) for pair in returned):
        return False
    counts = [_count_pairings(*pair) for pair in returned]
    if not all(counts):
        return False
    if counts[0].isdisjoint(counts[1]):
        return True
    tuples = all(isinstance(pair, tuple) for pair in returned)
    return tuples and _list_shapes(returned[0]) == _list_shapes(returned[1])


def _is_pair(given: Any) -> bool:
    return isinstance(given, (tuple, list)) and len(given) == 2


def _is_several(item: object) -> bool:
    """Return whether something is an array with a shape, or a dict of arrays."""
    return isinstance(item, Mapping) or bool(len(getattr(item, "shape", ())))


def _count_pairings(features: object, labels: object) -> set[int]:
    """Return the numbers of rows with which features and labels fit together."""
    return {rows for _, rows in _read(features)} & {rows for _, rows in _read(labels)}


def _list_shapes(item: Any) -> object:
    """Return the shapes of single rows of arrays, nested as the arrays are."""
    if isinstance(item, Mapping):
        return {key: _list_shapes(value) for key, value in item.items()}
    if isinstance(item, tuple) or (isinstance(item, list) and any(map(_is_several, item))):
        return [_list_shapes(value) for value in item]
    try:
        return tuple(np.shape(item)[1:])
    except ValueError:
        return None


def _check_pair(where: str, pair: Any) -> tuple[object, object]:
    """Return features and labels, lists resolved to one array or several by the number of rows.

    Raises:
        PolyakError: it is no pair, or a list is as many rows as it would be arrays.
    """
    if not _is_pair(pair):
        what = f"{len(pair)} things" if isinstance(pair, (tuple, list)) else type(pair).__name__
        raise PolyakError(f"{where} returned {what}; {_EXPECTED}")
    features, labels = pair
    fitting = [
        (one, other)
        for one, rows in _read(features)
        for other, others in _read(labels)
        if rows == others
    ]
    if len(fitting) > 1:
        # Lists of numbers are one array where they can be, as for numpy.
        plain = [
            (one, other)
            for one, other in fitting
            if _is_natural(features, one) and _is_natural(labels, other)
        ]
        if len(plain) != 1:
            raise PolyakError(
                f"{where} returned a list of arrays, which could be rows or several inputs or "
                "outputs; return np.stack(LIST) for rows, and a tuple or a dict by name for "
                "several arrays"
            )
        fitting = plain
    if fitting:
        return fitting[0]
    # It fits in no way: what it most likely is meets the check of the rows, which shows the shapes.
    return _guess(features), _guess(labels)


def _read(given: object) -> list[tuple[object, int]]:
    """Return the ways to read arrays, each with its number of rows: as one array, as several."""
    if not isinstance(given, (tuple, list, Mapping)):
        rows = _count_rows(given)
        return [] if rows is None else [(given, rows)]
    items = list(given.values()) if isinstance(given, Mapping) else list(given)
    counts = {_count_rows(item) for item in items}
    several = [rows for rows in counts if rows is not None] if len(counts) == 1 else []
    if isinstance(given, Mapping):
        return [(given, rows) for rows in several]
    found: list[tuple[object, int]] = [(tuple(items), rows) for rows in several]
    # Arrays of several shapes are no rows of one array.
    alike = len({str(getattr(item, "shape", ())) for item in items}) < 2
    if not found or (isinstance(given, list) and alike):
        found.append((items, len(items)))
    return found


def _count_rows(item: Any) -> int | None:
    """Return the length of the first axis, or None for a single number."""
    if isinstance(item, (list, tuple)):
        return len(item)
    shape: Any = getattr(item, "shape", ())
    return int(shape[0]) if len(shape) else None


def _is_natural(given: object, reading: object) -> bool:
    """Return whether a reading of a list is the one that numpy, or Keras, would choose."""
    if not isinstance(given, list) or any(map(_is_several, given)):
        return True
    return isinstance(reading, list)


def _guess(given: object) -> object:
    return tuple(given) if isinstance(given, list) and any(map(_is_several, given)) else given
