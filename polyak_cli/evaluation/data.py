"""Load the data sets of ``--data``: generated blobs, .npz and .csv files, or a user's function.

A function given as MODULE.py:FUNCTION is code of the user and is run.  Nothing else here runs code,
and nothing is unpickled.  The files are opened by path: they are the user's data, not checkpoints.
This module knows rows and labels, and no model; `labels` decides their form for a loss.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from polyak_cli.errors import (
    FormatError,
    PolyakError,
    UsageError,
    shown,
    word_rest,
)
from polyak_cli.evaluation import pipelines, user_code
from polyak_cli.evaluation.forms import WHOLE, Pairs, sort_names, sort_returned

Array: TypeAlias = npt.NDArray[Any]
#: One array, or several of the same length, by name or by position, for a model with several inputs
#: or outputs.
Arrays: TypeAlias = Array | Mapping[str, Array] | tuple[Array, ...]

EXPECTED = "expected blobs, FILE.npz, FILE.csv or MODULE.py:FUNCTION"
LABEL_COLUMNS = ("label", "target", "class", "y")
_DAMAGED = (csv.Error, zipfile.BadZipFile, zlib.error, NotImplementedError)


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Some rows: features and their labels.

    Attributes:
        source: its name in messages.
        features: float, integer or boolean arrays whose first axis is the rows.
        labels: classes as integers (rows,), one-hot (rows, classes), or numbers to predict.
    """

    source: str
    features: Arrays
    labels: Arrays

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(list_arrays(self.labels)[0])


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """The rows of one ``--data``, undivided or divided into train and test.

    Attributes:
        name: the value of ``--data``.
        splits: name -> rows; the name is "" if the data set is not divided.
        notes: messages for the user, one line each.
    """

    name: str
    splits: Mapping[str, Split]
    notes: tuple[str, ...] = ()

    def split(self, which: str | None = None, default: str = "test") -> Split:
        """Return the rows of a split; by default those of ``default``, or of the only one.

        Raises:
            UsageError: the data set has no such split.
        """
        if which is None:
            which = default if default in self.splits else next(iter(self.splits))
        if which in self.splits:
            return self.splits[which]
        if WHOLE in self.splits:
            there = "is not split into train and test; leave --split out"
        else:
            there = f"has only {' and '.join(self.splits)}"
        raise UsageError(f"{shown(self.name)}: has no split '{shown(which)}'; it {there}")


def list_arrays(arrays: Arrays) -> list[Array]:
    """Return one or several arrays as a list, in order."""
    if isinstance(arrays, Mapping):
        return list(arrays.values())
    return list(arrays) if isinstance(arrays, tuple) else [arrays]


def is_one_hot(labels: Array) -> bool:
    """Return whether each row along the last axis has a single 1 among zeros."""
    return bool(np.isin(labels, (0, 1)).all() and (labels.sum(-1) == 1).all())


def halves(split: Split, *, seed: int = 0, share: float = 0.5) -> tuple[Split, Split]:
    """Divide rows at random: some to choose a model, the others to report on it.

    A model looks better than it is on the rows that it was chosen on.  If labels are classes, each
    part gets its share of each class, to within one row.

    Args:
        split: the rows; they keep their order.
        seed: the same seed gives the same parts.
        share: the share of the rows for selection, above 0 and below 1.

    Returns:
        The rows for selection and the rows for reporting; each row is in exactly one of them.

    Raises:
        UsageError: the share is out of range, or a part gets fewer than the two rows that a
            comparison needs.
    """
    if not 0 < share < 1:
        raise UsageError(f"the share {share:g} for selection is out of range; expected 0 to 1")
    random = np.random.default_rng(seed)
    order = random.permutation(split.rows)
    classes = _find_classes(split.labels)
    if classes is not None:
        order = order[np.argsort(classes[order], kind="stable")]
    # Systematic sampling: every 1/share-th of the rows sorted by class, from a random start.  So
    # each class gives its share, and each row has the same chance, also in a small class.
    steps = np.floor(np.arange(split.rows + 1) * share + random.random())
    chosen = np.zeros(split.rows, dtype=bool)
    chosen[order[np.diff(steps) > 0]] = True
    parts = [
        Split(
            f"{split.source}, for {purpose}",
            take_rows(split.features, k),
            take_rows(split.labels, k),
        )
        for purpose, k in (("selection", chosen), ("reporting", ~chosen))
    ]
    fewest = min(part.rows for part in parts)
    if fewest < 2:
        raise UsageError(
            f"{split.source}: has {split.rows} row{'s' * (split.rows != 1)}; expected two or more "
            f"to choose on and two or more to report on, found {fewest}"
        )
    return parts[0], parts[1]


def take_rows(arrays: Arrays, chosen: Array | slice) -> Arrays:
    """Return copies of some rows of one array or of each of several.

    A model may write into what it gets, as one does that scales pictures in place.
    """
    if isinstance(arrays, Mapping):
        return {name: _copy_rows(array, chosen) for name, array in arrays.items()}
    if isinstance(arrays, tuple):
        return tuple(_copy_rows(array, chosen) for array in arrays)
    return _copy_rows(arrays, chosen)


def _copy_rows(array: Array, chosen: Array | slice) -> Array:
    rows = array[chosen]
    return np.array(rows) if isinstance(chosen, slice) else rows  # numbers of rows copy already


def _find_classes(labels: Arrays) -> Array | None:
    """Return the class of each row as a number, or None if labels are not classes."""
    if len(list_arrays(labels)) != 1:
        return None
    (array,) = list_arrays(labels)
    if array.ndim == 2 and array.shape[1] > 1:
        return array.argmax(-1) if is_one_hot(array) else None
    column = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    return column if column.ndim == 1 and column.dtype.kind in "biu" else None


def load(name: str) -> Dataset:
    """Load the data set of a value of ``--data``.

    * ``blobs``: 1,100 points of scikit-learn's ``make_blobs(centers=3, n_features=2, cluster_std=2,
      random_state=2)``; the first 100 are train, the other 1,000 test.
    * ``FILE.npz``: arrays ``x`` and ``y``, or ``x_train``, ``y_train``, ``x_test``, ``y_test``;
      for several inputs or outputs numbered or named ones, as `forms.sort_names` says.
    * ``FILE.csv``: a header row, then numbers; separated by comma, semicolon or tab.  The label is
      the first column named label, target, class or y, else the last column.
    * ``MODULE.py:FUNCTION`` or ``package.module:FUNCTION``: called without arguments, returns
      ``(x, y)``, ``((x_train, y_train), (x_test, y_test))`` or ``{"train": (x, y), "test":
      (x, y)}``; x and y may each be a dict, a tuple or a list of arrays, one
      for each input or output.  It may return a ``Dataset`` or ``DataLoader`` of PyTorch, a
      ``tf.data.Dataset``, or a list of dicts with labels, in place of (x, y).  What Python, numpy
      and PyTorch's CPU draw in it is the same in each run.

    Labels that are text are numbered as classes, in sorted order from 0; a note says so.

    Raises:
        UsageError: the name is none of these.
        FormatError: the file does not contain such data, or its parts do not fit together.
        PolyakError: no such file, or the user's function failed.
    """
    if name == "blobs":
        return _make_blobs()
    suffix = Path(name).suffix.lower()
    if suffix == ".npz":
        return _load_npz(name)
    if suffix == ".csv":
        return _load_csv(name)
    if user_code.is_function(name):
        return _load_function(name)
    raise UsageError(f"{shown(name)}: is not a data set; {EXPECTED}")


def _make_blobs() -> Dataset:
    """Draw the points as scikit-learn does, in the same order from the same generator.

    So blobs need no scikit-learn, and a test compares them bit for bit.  numpy keeps the numbers of
    a `RandomState` of one seed the same in all versions, as it does not for newer generators.
    """
    random = np.random.RandomState(2)
    centres = random.uniform(-10, 10, (3, 2))
    sizes = (367, 367, 366)
    points = np.concatenate(
        [random.normal(centre, 2, (rows, 2)) for centre, rows in zip(centres, sizes, strict=True)]
    )
    classes = np.repeat(np.arange(3), sizes)
    order = np.arange(len(classes))
    random.shuffle(order)
    parts = {"train": order[:100], "test": order[100:]}
    return Dataset(
        "blobs", {key: Split(f"blobs ({key})", points[k], classes[k]) for key, k in parts.items()}
    )


# --- files ---------------------------------------------------------------------------------------


def _load_npz(name: str) -> Dataset:
    pairs, unused = sort_names(shown(name), _read_npz(name))
    return _make_dataset(name, pairs, _note_unused(name, unused))


def _note_unused(name: str, unused: Sequence[str]) -> tuple[str, ...]:
    others = ", ".join(shown(key, 40) for key in unused)
    return (f"{shown(name)}: unused arrays: {others}",) if others else ()


def _read_npz(name: str) -> dict[str, Array]:
    """Read every array of an archive."""
    # numpy does not close a file that it opened itself if the archive is damaged.
    with _reword_read_errors(name), open(name, "rb") as file:
        # allow_pickle=False: unpickling would run code of the file.
        opened = np.load(file, allow_pickle=False)
        if not isinstance(opened, np.lib.npyio.NpzFile):
            raise FormatError(f"{shown(name)}: is one numpy array, not an .npz archive of several")
        with opened:
            return {key: opened[key] for key in opened.files}


def _load_csv(name: str) -> Dataset:
    # utf-8-sig: spreadsheets begin a file with a byte order mark.
    with _reword_read_errors(name), open(name, encoding="utf-8-sig", newline="") as file:
        first = file.readline()
        delimiter = max(",;\t", key=first.count)
        lines = csv.reader(itertools.chain([first], file), delimiter=delimiter)
        header = [cell.strip() for cell in next(lines, [])]
        # Without a header, the first row would be lost and the label column be a guess.
        if len(header) < 2 or all(map(_is_number, header)):
            raise FormatError(
                f"{shown(name)}: the first line must name at least two columns, found "
                f"{shown(first.strip(), 80) or 'nothing'!r}"
            )
        label = _find_label_column(header)
        rows, labels = _read_csv_rows(name, lines, header, label)
    features = np.array(rows, np.float64).reshape(len(rows), len(header) - 1)
    note = f"{shown(name)}: the labels are column '{shown(header[label], 60)}'"
    return _make_dataset(name, {WHOLE: (features, _convert_labels(labels))}, (note,))


def _read_csv_rows(
    name: str, lines: Iterator[list[str]], header: Sequence[str], label: int
) -> tuple[list[list[float]], list[str]]:
    """Return the features and the labels (as text) of the rows below the header."""
    rows, labels = [], []
    for number, cells in enumerate(lines, 2):
        if not cells:
            continue  # many files end with an empty line
        if len(cells) != len(header):
            raise FormatError(
                f"{shown(name)}: row {number} has {len(cells)} fields, but the header names "
                f"{len(header)}"
            )
        row = []
        for column, cell in enumerate(cells):
            if column == label:
                continue
            try:
                row.append(float(cell))
            except ValueError:
                raise FormatError(
                    f"{shown(name)}: row {number}, column '{shown(header[column], 60)}': expected "
                    f"a number, found '{shown(cell, 60)}'"
                ) from None
        if not cells[label].strip():
            raise FormatError(f"{shown(name)}: row {number} has no label")
        rows.append(row)
        labels.append(cells[label].strip())
    return rows, labels


def _find_label_column(header: Sequence[str]) -> int:
    lowered = [cell.lower() for cell in header]
    return next((lowered.index(n) for n in LABEL_COLUMNS if n in lowered), len(header) - 1)


def _convert_labels(labels: Sequence[str]) -> Array:
    """Return labels as integers if all are whole, as floats if all are numbers, else as text."""
    if not all(map(_is_number, labels)):
        return np.array(labels, dtype=str)
    numbers = np.array([float(label) for label in labels])
    with np.errstate(invalid="ignore"):  # NaN and infinity are found below
        whole = numbers.astype(np.int64)
    return whole if np.array_equal(whole, numbers) else numbers


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@contextlib.contextmanager
def _reword_read_errors(name: str) -> Iterator[None]:
    """Replace any exception of reading a file by an error of one line.

    Raises:
        PolyakError: the file does not exist or cannot be read.
        FormatError: it is damaged, or not of the type of its suffix.
    """
    path = Path(name)
    if path.exists() and not path.is_file():  # opening a pipe would wait forever
        raise PolyakError(f"{shown(name)}: is not a regular file; {EXPECTED}")
    try:
        yield
    except (ValueError, EOFError, KeyError, OSError, MemoryError, *_DAMAGED) as error:
        if isinstance(error, OSError) and error.strerror:
            raise PolyakError(f"{shown(name)}: cannot be read: {error.strerror}") from None
        raise FormatError(
            f"{shown(name)}: is damaged or not what its suffix says: {shown(error)}"
        ) from None


# --- the user's own code -------------------------------------------------------------------------


def _load_function(name: str) -> Dataset:
    function = user_code.find_function(name, EXPECTED)
    with pipelines.draw_alike():
        returned = function.call()
    where = f"{shown(function.path)}: {function.name}()"
    # Begun again, as the function may have imported PyTorch.
    with pipelines.draw_alike(), function.running(f"the data set of {function.name}() failed"):
        returned = pipelines.read_all(returned, where)
    pairs, unused = sort_returned(where, returned)
    return _make_dataset(name, pairs, _note_unused(name, unused))


# --- arrays that fit together --------------------------------------------------------------------


def _make_dataset(name: str, pairs: Pairs, notes: Sequence[str]) -> Dataset:
    """Check the pairs of features and labels, and number labels that are text.

    Raises:
        FormatError: an array is empty or not numeric, or the lengths differ.
    """
    splits = {}
    for key, (features, labels) in pairs.items():
        source = f"{shown(name)} ({key})" if key else shown(name)
        splits[key] = Split(
            source,
            _convert_arrays(features, f"{source}: the features"),
            _convert_arrays(labels, f"{source}: the labels", text=True),
        )
        _check_rows(splits[key])
    return _number_text_labels(Dataset(name, splits, tuple(notes)))


def _convert_arrays(given: object, what: str, text: bool = False) -> Arrays:
    """Return arrays of numbers: several for a dict or a tuple, otherwise one."""
    if isinstance(given, Mapping):
        return {
            str(k): _convert_array(v, f"{what} '{shown(k, 60)}'", text) for k, v in given.items()
        }
    if isinstance(given, tuple):
        return tuple(_convert_array(v, f"{what} [{k}]", text) for k, v in enumerate(given))
    return _convert_array(given, what, text)


def _convert_array(given: object, what: str, text: bool) -> Array:
    if np.ma.is_masked(given):
        raise FormatError(f"{what} are masked in places; expected a value everywhere")
    try:
        array: Array = pipelines.to_array(given)
    except (ValueError, TypeError) as error:  # ragged lists, other objects
        raise FormatError(f"{what} are not an array: {shown(error)}") from None
    if text and array.dtype.kind in "US" and array.ndim == 1:
        return array
    # Complex numbers and objects mean that something else was loaded.
    if array.dtype.kind not in "biuf":
        raise FormatError(f"{what} have dtype {array.dtype}; expected numbers")
    if array.ndim == 0:
        raise FormatError(f"{what} are a single number; expected one row or more")
    return array.astype(array.dtype.newbyteorder("="), copy=False)  # PyTorch takes no other


def _check_rows(split: Split) -> None:
    arrays = [*list_arrays(split.features), *list_arrays(split.labels)]
    rows = {len(array) for array in arrays}
    if not list_arrays(split.features) or not list_arrays(split.labels) or rows == {0}:
        raise FormatError(f"{split.source}: is empty; expected one row or more")
    if len(rows) > 1:
        shapes = " and ".join(str(array.shape) for array in arrays)
        raise FormatError(
            f"{split.source}: features and labels must have the same number of rows; found the "
            f"shapes {shapes}"
        )


def _number_text_labels(dataset: Dataset) -> Dataset:
    """Replace text labels by the index of their name among the sorted names of all splits."""
    notes = list(dataset.notes)
    arrays = {key: _key_arrays(split.labels) for key, split in dataset.splits.items()}
    for output in dict.fromkeys(output for own in arrays.values() for output in own):
        every = [own[output] for own in arrays.values() if output in own]
        texts = [array for array in every if _is_text(array)]
        if not texts:
            continue
        if len(texts) < len(every):
            raise FormatError(
                f"{shown(dataset.name)}: the labels are text in only one of the splits"
            )
        # All splits share one numbering, even if one of them lacks a class.
        names = np.unique(np.concatenate([np.asarray(text, dtype=str) for text in texts]))
        for own in arrays.values():
            if output in own:
                own[output] = np.searchsorted(names, np.asarray(own[output], dtype=str))
        listed = ", ".join(f"{shown(n, 40)} = {k}" for k, n in enumerate(names[:10]))
        which = f" '{shown(output, 40)}'" if output else ""
        notes.append(
            f"{shown(dataset.name)}: the labels{which} are text, numbered as classes: "
            f"{listed}{word_rest(len(names) - 10)}"
        )
    splits = {
        key: Split(s.source, s.features, _rebuild(s.labels, [*arrays[key].values()]))
        for key, s in dataset.splits.items()
    }
    return Dataset(dataset.name, splits, tuple(notes))


def _key_arrays(labels: Arrays) -> dict[str, Array]:
    """Return several arrays by name or number; a single one has the name ""."""
    if isinstance(labels, Mapping):
        return dict(labels)
    if isinstance(labels, tuple):
        return {str(number): array for number, array in enumerate(labels, 1)}
    return {"": labels}


def _rebuild(like: Arrays, arrays: Sequence[Array]) -> Arrays:
    """Return arrays in the form that others have: one, or a tuple or dict of several."""
    if isinstance(like, Mapping):
        return dict(zip(like, arrays, strict=True))
    return tuple(arrays) if isinstance(like, tuple) else arrays[0]


def _is_text(labels: Array) -> bool:
    return labels.dtype.kind in "US"
