from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak_cli.errors import FormatError, PolyakError, UsageError
from polyak_cli.evaluation import data


def only(dataset: data.Dataset) -> data.Split:
    """Return the rows of a data set that is not divided."""
    assert list(dataset.splits) == [""]
    return dataset.split()


def equal(arrays: data.Arrays, expected: Any) -> bool:
    """Compare one array, shape included."""
    assert isinstance(arrays, np.ndarray)
    return np.array_equal(arrays, expected)


def one_line(error: pytest.ExceptionInfo[PolyakError]) -> str:
    """Return an error message, and check that it is one line."""
    text = str(error.value)
    assert len(text.splitlines()) == 1
    return text


# --- blobs ----------------------------------------------------------------------------------------


def test_blobs_are_the_ones_of_scikit_learn() -> None:
    """The first 100 of 1,100 points are train, the others test, in scikit-learn's order."""
    from sklearn.datasets import make_blobs

    points, classes = make_blobs(
        n_samples=1100, centers=3, n_features=2, cluster_std=2, random_state=2
    )
    blobs = data.load("blobs")
    train, test = blobs.split("train"), blobs.split("test")
    assert (train.rows, test.rows) == (100, 1000)
    assert equal(train.features, points[:100])
    assert equal(test.features, points[100:])
    assert equal(train.labels, classes[:100])
    assert equal(test.labels, classes[100:])
    assert blobs.split() is test


def test_a_split_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """The message names the splits that exist."""
    with pytest.raises(UsageError, match="has only train and test") as error:
        data.load("blobs").split("valid")
    one_line(error)
    np.savez(tmp_path / "all.npz", x=np.zeros((2, 1)), y=np.zeros(2))
    with pytest.raises(UsageError, match="is not split"):
        data.load(str(tmp_path / "all.npz")).split("test")


@pytest.mark.parametrize("name", ["blob", "data.txt", "module.py", "module.py:", ""])
def test_what_is_no_data_set_is_reported_what_is(name: str) -> None:
    """For any other name, the message lists the four kinds."""
    with pytest.raises(UsageError, match=r"FILE\.npz, FILE\.csv or MODULE\.py:FUNCTION"):
        data.load(name)


@pytest.mark.parametrize("name", ["none.npz", "none.csv", "none.py:load"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    """A missing file gives one line with its name."""
    with pytest.raises(PolyakError, match="none") as error:
        data.load(str(tmp_path / name))
    one_line(error)


def test_a_function_may_be_named_by_its_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module is found in the current folder, and one that is not there is named."""
    (tmp_path / "rowsof").mkdir()
    (tmp_path / "rowsof/blobs.py").write_text("def load():\n    return [[1.0], [2.0]], [0, 1]\n")
    monkeypatch.chdir(tmp_path)
    assert data.load("rowsof.blobs:load").split().rows == 2
    with pytest.raises(PolyakError, match="there is no such module; expected blobs") as error:
        data.load("rowsof.nothing:load")
    one_line(error)


@pytest.mark.parametrize("given", ["rows", "rows.batch(2)", "(rows, rows.batch(2))"])
def test_a_data_set_of_tensorflow_has_the_rows_that_it_gives(tmp_path: Path, given: str) -> None:
    """In batches, as for Keras's fit(), or row by row; two are train and test."""
    (tmp_path / "rows.py").write_text(
        "import tensorflow as tf\n"
        "rows = tf.data.Dataset.from_tensor_slices(([[1.0], [2.0], [3.0]], [0, 1, 0]))\n"
        f"def load():\n    return {given}\n"
    )
    for split in data.load(f"{tmp_path}/rows.py:load").splits.values():
        assert np.array_equal(np.asarray(split.features), [[1.0], [2.0], [3.0]])
        assert np.array_equal(np.asarray(split.labels), [0, 1, 0])


def test_single_rows_of_tensorflow_may_have_one_hot_labels(tmp_path: Path) -> None:
    """Features and labels of one row are of two lengths, so they are no batch."""
    (tmp_path / "hot.py").write_text(
        "import tensorflow as tf\n"
        "def load(): return tf.data.Dataset.from_tensor_slices(([[1.0, 2.0]] * 3, [[0, 1, 0]] * 3))"
    )
    rows = only(data.load(f"{tmp_path}/hot.py:load"))
    assert np.array_equal(np.asarray(rows.features), [[1.0, 2.0]] * 3)
    assert np.array_equal(np.asarray(rows.labels), [[0, 1, 0]] * 3)


@pytest.mark.parametrize("suffix", ["npz", "csv"])
def test_a_pipe_or_folder_is_not_opened(tmp_path: Path, suffix: str) -> None:
    """A pipe, which would hang, and a folder are refused."""
    os.mkfifo(tmp_path / f"pipe.{suffix}")
    (tmp_path / f"folder.{suffix}").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(PolyakError, match="not a regular file"):
            data.load(str(tmp_path / f"{name}.{suffix}"))


# --- npz ------------------------------------------------------------------------------------------


def test_an_npz_of_one_piece(tmp_path: Path) -> None:
    """Arrays x and y are all rows; another array is noted."""
    np.savez(tmp_path / "d.npz", x=np.arange(6).reshape(3, 2), y=[0, 1, 1], weights=np.ones(3))
    loaded = data.load(str(tmp_path / "d.npz"))
    assert equal(only(loaded).features, [[0, 1], [2, 3], [4, 5]])
    assert equal(only(loaded).labels, [0, 1, 1])
    assert [note.endswith("unused arrays: weights") for note in loaded.notes] == [True]


def test_an_npz_in_two_splits(tmp_path: Path) -> None:
    """Arrays x_train to y_test are two splits, test by default; one of them may be missing."""
    np.savez(
        tmp_path / "d.npz",
        x_train=np.ones((2, 4, 4), np.uint8),
        y_train=np.array([0, 1]),
        x_test=np.zeros((3, 4, 4), np.uint8),
        y_test=np.array([0, 1, 2]),
    )
    loaded = data.load(str(tmp_path / "d.npz"))
    assert loaded.split().rows == 3
    assert loaded.split("train").rows == 2
    np.savez(tmp_path / "t.npz", x_train=np.ones((2, 4)), y_train=np.array([0, 1]))
    assert data.load(str(tmp_path / "t.npz")).split().rows == 2


@pytest.mark.parametrize("names", ["y{}", "y_{}"])
def test_an_npz_numbers_several_outputs(tmp_path: Path, names: str) -> None:
    """The arrays y1, y2, ... y10 are a tuple in the order of their numbers, from 0 or from 1 on."""
    for first in (0, 1):
        outputs: dict[str, Any] = {
            names.format(k + first): np.full(2, k) for k in reversed(range(10))
        }
        np.savez(tmp_path / "d.npz", x=np.ones((2, 3)), **outputs)
        labels = only(data.load(str(tmp_path / "d.npz"))).labels
        assert isinstance(labels, tuple)
        assert [array[0] for array in labels] == [*range(10)]


def test_an_npz_names_several_inputs_and_outputs_in_two_parts(tmp_path: Path) -> None:
    """The arrays x_train_NAME and y_test_NAME are dicts; classes that are text are numbered."""
    arrays: dict[str, Any] = {
        "x_train_a": [1.0, 2.0], "x_train_b": [3.0, 4.0],
        "y_train_kind": ["v", "u"], "y_train_size": [0.5, 0.6],
        "x_test_b": [3.0], "x_test_a": [1.0],
        "y_test_size": [0.7], "y_test_kind": ["w"], "x_val": [0.0],
    }  # fmt: skip
    np.savez(tmp_path / "d.npz", **arrays)
    loaded = data.load(str(tmp_path / "d.npz"))
    train, test = loaded.split("train"), loaded.split()
    assert isinstance(train.features, dict)
    assert isinstance(train.labels, dict)
    assert isinstance(test.labels, dict)
    assert {name: array.tolist() for name, array in train.features.items()} == {
        "a": [1.0, 2.0],
        "b": [3.0, 4.0],
    }
    assert (train.labels["kind"].tolist(), test.labels["kind"].tolist()) == ([1, 0], [2])
    assert train.labels["size"].tolist() == [0.5, 0.6]
    assert [note.partition(": ")[2] for note in loaded.notes] == [
        "unused arrays: x_val",
        "the labels 'kind' are text, numbered as classes: u = 0, v = 1, w = 2",
    ]


def test_an_array_y_is_used_alone(tmp_path: Path) -> None:
    """Other arrays whose names begin with y_ are noted, as any others."""
    np.savez(tmp_path / "d.npz", x=np.ones((2, 3)), y=[0, 1], y_mean=[5, 6], y2=[7, 8])
    loaded = data.load(str(tmp_path / "d.npz"))
    assert equal(only(loaded).labels, [0, 1])
    assert loaded.notes[0].endswith("unused arrays: y_mean, y2")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": [1.0], "y1": [1], "y3": [1]}, "holds y1, y3; expected numbers from 0 or 1 on"),
        ({"x": [1.0], "y2": [1], "y3": [1]}, "holds y2, y3; expected numbers from 0 or 1 on"),
        (
            {"x": [1.0], "y1": [1], "y_size": [1]},
            "holds y1, y_size; expected several arrays to be either",
        ),
        ({"x_train": [1.0], "y_train": [1], "x_test": [1.0]}, "holds x_test but no y_test"),
        ({"y_kind": [1], "y_size": [1]}, "holds y_kind but no x"),
        ({"x": [1.0, 2.0], "y_kind": [1, 2], "y_size": [1]}, "must have the same number of rows"),
        ({"a": [1.0], "b": [1]}, "expected arrays x and y.*found a, b"),
        ({}, "found none"),
        ({"x": [[1.0]]}, "holds x but no y"),
        ({"x": [[1.0]], "y": [1], "x_test": [[1.0]], "y_test": [1]}, "expected arrays x and y"),
        ({"x_test": [[1.0]]}, "holds x_test but no y_test"),
        (
            {"x": [[1.0], [2.0]], "y": [1]},
            r"the same number of rows; found the shapes \(2, 1\) and \(1,\)",
        ),
        ({"x": np.zeros((0, 2)), "y": np.zeros(0)}, "is empty"),
        ({"x": 1.0, "y": [1]}, "the features are a single number"),
        ({"x": [["a"]], "y": [1]}, "the features have dtype <U1; expected numbers"),
        ({"x": [[1j]], "y": [1]}, "complex"),
    ],
)
def test_an_npz_that_does_not_fit_is_refused(
    tmp_path: Path, arrays: dict[str, Any], message: str
) -> None:
    """Missing, empty, ragged and non-numeric arrays give one line with what was found."""
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(FormatError, match=message) as error:
        data.load(str(tmp_path / "d.npz"))
    assert str(tmp_path / "d.npz") in one_line(error)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """An array of objects, whose reading could run code, is refused."""
    np.savez(tmp_path / "d.npz", x=np.array([{"a": 1}], dtype=object), y=[1])
    with pytest.raises(FormatError, match="allow_pickle"):
        data.load(str(tmp_path / "d.npz"))


def test_a_damaged_npz_is_refused(tmp_path: Path) -> None:
    """A truncated archive, text, a single array, and a flipped byte give one line each."""
    good = tmp_path / "good.npz"
    np.savez_compressed(good, x=np.arange(2000.0).reshape(1000, 2), y=np.zeros(1000))
    raw = good.read_bytes()
    flipped = bytearray(raw)
    flipped[200] ^= 0xFF
    np.save(tmp_path / "bare.npy", np.zeros(3))
    bare = (tmp_path / "bare.npy").read_bytes()
    contents = [raw[:-20], raw[:10], b"", b"text", bare, bytes(flipped)]
    for content in contents:
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(FormatError, match=r"bad\.npz: ") as error:
            data.load(str(tmp_path / "bad.npz"))
        one_line(error)


# --- csv ------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> str:
    """Write a text file and return its name."""
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_csv_has_its_label_last_or_by_name(tmp_path: Path) -> None:
    """The label is the column label, target, class or y in any case, else the last one."""
    last = only(data.load(write(tmp_path / "a.csv", "a,b,c\n1,2,0\n3,4,1\n")))
    assert equal(last.features, [[1, 2], [3, 4]])
    assert equal(last.labels, [0, 1])
    named = data.load(write(tmp_path / "b.csv", "a, Label ,y\n1,0,2\n3,1,4\n"))
    assert equal(only(named).features, [[1, 2], [3, 4]])
    assert equal(only(named).labels, [0, 1])
    assert "the labels are column 'Label'" in named.notes[0]


@pytest.mark.parametrize(
    "text", ["a;y\n1;2\n", "a\ty\n1\t2\n", "\ufeffa,y\r\n1,2\r\n\r\n", "a,y\n1,2"]
)
def test_a_csv_as_spreadsheets_write_it(tmp_path: Path, text: str) -> None:
    """Semicolons, tabs, a byte order mark, empty lines, and no last line end are accepted."""
    rows = only(data.load(write(tmp_path / "a.csv", text)))
    assert equal(rows.features, [[1]])
    assert equal(rows.labels, [2])


def test_labels_that_are_whole_numbers_are_integers(tmp_path: Path) -> None:
    """Numbers with a fraction stay floats: they are values to predict, not classes."""
    whole = only(data.load(write(tmp_path / "a.csv", "a,y\n1,2.0\n1,3\n")))
    assert np.asarray(whole.labels).dtype == np.int64
    floats = only(data.load(write(tmp_path / "a.csv", "a,y\n1,2.5\n1,3\n1,nan\n")))
    assert np.array_equal(np.asarray(floats.labels), [2.5, 3, np.nan], equal_nan=True)


def test_names_of_classes_are_numbered_in_sorted_order(tmp_path: Path) -> None:
    """Text as labels becomes integers from 0, over all splits, and a note says which is which."""
    loaded = data.load(write(tmp_path / "a.csv", "a,kind\n1,dog\n2,cat\n3,dog\n"))
    assert equal(only(loaded).labels, [1, 0, 1])
    assert loaded.notes[-1].endswith("cat = 0, dog = 1")
    np.savez(
        tmp_path / "d.npz",
        x_train=np.zeros((2, 1)),
        y_train=["b", "c"],
        x_test=np.zeros((1, 1)),
        y_test=["a"],
    )
    split = data.load(str(tmp_path / "d.npz"))
    assert equal(split.split("train").labels, [1, 2])
    assert equal(split.split("test").labels, [0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the first line must name at least two columns, found 'nothing'"),
        ("a\n1\n", "at least two columns"),
        ("1,2\n3,4\n", "the first line must name"),
        ("a,b,y\n1,2,3\n1,2\n", "row 3 has 2 fields, but the header names 3"),
        ("a,b,y\n1,x,3\n", "row 2, column 'b': expected a number, found 'x'"),
        ("a,b,y\n1,,3\n", "row 2, column 'b': expected a number, found ''"),
        ("a,y\n1,\n", "row 2 has no label"),
        ("a,y\n", "is empty"),
    ],
)
def test_a_csv_that_does_not_fit_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """The message names the row, the column, and what was found."""
    with pytest.raises(FormatError, match=message) as error:
        data.load(write(tmp_path / "a.csv", text))
    assert str(tmp_path / "a.csv") in one_line(error)


def test_a_csv_that_is_no_text_is_refused(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 give one line, not a traceback."""
    (tmp_path / "a.csv").write_bytes(b"a,y\n\xff\xfe,1\n")
    with pytest.raises(FormatError, match="damaged or not what its suffix says"):
        data.load(str(tmp_path / "a.csv"))


finite = st.floats(allow_nan=False, allow_infinity=False)


@settings(derandomize=True, deadline=None)
@given(
    rows=st.lists(st.tuples(finite, finite, st.integers(-(2**53), 2**53)), min_size=1),
    delimiter=st.sampled_from(",;\t"),
)
def test_a_csv_gives_back_the_numbers_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[Any, ...]], delimiter: str
) -> None:
    """Every finite float64 and every exact integer comes back as it was."""
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([("a", "b", "y"), *rows])
    loaded = only(data.load(str(path)))
    assert equal(loaded.features, [row[:2] for row in rows])
    assert equal(loaded.labels, [row[2] for row in rows])


# --- the user's own function ----------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path) -> Callable[[str], str]:
    """Return a function that writes a module, whose function is `load`, and names it."""

    def write_module(code: str) -> str:
        (tmp_path / "mine.py").write_text(f"import numpy as np\n{code}", encoding="utf-8")
        return f"{tmp_path / 'mine.py'}:load"

    return write_module


def test_a_function_returns_rows_or_splits(module: Callable[[str], str]) -> None:
    """(x, y) is one piece; a dict has train and test; lists become arrays."""
    pair = data.load(module("def load(): return [[1.0, 2.0]], [3]"))
    assert equal(only(pair).features, [[1.0, 2.0]])
    both = data.load(module("def load(): return {'train': ([[1.]], [1]), 'test': ([[2.]], [2])}"))
    assert equal(both.split("train").labels, [1])
    assert equal(both.split().labels, [2])


def test_a_function_may_return_several_arrays(module: Callable[[str], str]) -> None:
    """A dict or a tuple of arrays is for several inputs or outputs, all of the same length."""
    code = "def load(): return {'a': [[1.0]], 'b': [[2.0]]}, (np.zeros(1), np.ones(1))"
    rows = only(data.load(module(code)))
    assert isinstance(rows.features, dict)
    assert list(rows.features) == ["a", "b"]
    assert isinstance(rows.labels, tuple)
    with pytest.raises(FormatError, match="the same number of rows"):
        data.load(module("def load(): return {'a': [[1.0]], 'b': [[2.0], [3.0]]}, np.zeros(1)"))


@pytest.mark.parametrize("brackets", ["()", "[]"])
def test_two_pairs_are_train_and_test(module: Callable[[str], str], brackets: str) -> None:
    """A function may return what keras.datasets returns; --split chooses, test by default."""
    opened, closed = brackets[0], brackets[1]
    pair = f"{opened}np.full(({{0}}, 2, 2), {{0}}), np.arange({{0}}){closed}"
    both = f"{opened}{pair.format(7)}, {pair.format(5)}{closed}"
    loaded = data.load(module(f"def load(): return {both}"))
    assert [*loaded.splits] == ["train", "test"]
    assert equal(loaded.split("train").features, np.full((7, 2, 2), 7))
    assert equal(loaded.split().features, np.full((5, 2, 2), 5))
    assert equal(loaded.split().labels, range(5))
    assert loaded.split(default="train") is loaded.split("train")


@pytest.mark.parametrize(
    ("code", "splits"),
    [
        # As many rows in all four: parts if the pairs are alike, array by array.
        ("(np.ones((4, 2)), np.ones(4)), (np.ones((4, 2)), np.zeros(4))", ["train", "test"]),
        ("(np.ones((4, 2)), np.ones(4)), (np.ones((4, 3)), np.zeros(4))", [""]),
        ("[np.ones((4, 2)), np.ones(4)], [np.ones((4, 2)), np.zeros(4)]", [""]),
        # With several arrays in a pair, and with dicts.
        ("(np.ones((4, 2)), [np.ones(4)] * 2), (np.ones((3, 2)), [np.ones(3)] * 2)",
         ["train", "test"]),
        ("({'a': np.ones(4)}, {'b': np.ones(4)}), ({'a': np.ones(3)}, {'b': np.ones(3)})",
         ["train", "test"]),
        # Lists of numbers are arrays.
        ("[[1.0, 2.0], [3.0, 4.0]], [[0, 1], [1, 0]]", [""]),
        ("[[[1], [2]], [[3], [4]]], [[[1], [2]], [[3], [4]]]", [""]),
    ],
)  # fmt: skip
def test_pairs_of_pairs_are_told_apart(
    module: Callable[[str], str], code: str, splits: list[str]
) -> None:
    """Two parts, or two inputs and two outputs, by the rules that the documentation gives."""
    assert [*data.load(module(f"def load(): return {code}")).splits] == splits


@pytest.mark.parametrize(
    "labels", ["[np.arange(9), np.ones((9, 1))]", "[list(range(9)), [1.0] * 9]"]
)
def test_a_list_of_labels_is_for_several_outputs(module: Callable[[str], str], labels: str) -> None:
    """As Keras takes it: a list of arrays with as many rows as the features."""
    rows = only(data.load(module(f"def load(): return np.ones((9, 2)), {labels}")))
    assert isinstance(rows.labels, tuple)
    assert [array.shape[0] for array in rows.labels] == [9, 9]
    assert rows.rows == 9
    several = only(data.load(module("def load(): return [np.ones(9), np.ones((9, 2))], [1] * 9")))
    assert isinstance(several.features, tuple)


def test_a_list_of_arrays_may_be_rows(module: Callable[[str], str]) -> None:
    """The number of rows decides; where it cannot, the function must say what it means."""
    rows = only(data.load(module("def load(): return [np.ones(2)] * 9, [1] * 9")))
    assert equal(rows.features, np.ones((9, 2)))
    with pytest.raises(PolyakError, match=r"could be rows or several inputs.*np\.stack") as error:
        data.load(module("def load(): return [np.ones(2)] * 2, [np.ones(2)] * 2"))
    one_line(error)


def test_a_function_may_return_what_an_npz_holds(module: Callable[[str], str]) -> None:
    """A dict of named arrays has the names of an .npz file."""
    loaded = data.load(module("def load(): return {'x': [[1.0]], 'y1': [1], 'y2': [2]}"))
    assert isinstance(only(loaded).labels, tuple)
    with pytest.raises(FormatError, match=r"load\(\) returned a dict: holds x but no y"):
        data.load(module("def load(): return {'x': [[1.0]]}"))


def test_a_module_may_import_what_lies_beside_it(
    module: Callable[[str], str], tmp_path: Path
) -> None:
    """It can import its neighbours, as a script can; the search path is restored."""
    import sys

    (tmp_path / "beside_polyak_test.py").write_text("rows = [[1.0]], [2]", encoding="utf-8")
    before = list(sys.path)
    code = "from beside_polyak_test import rows\ndef load(): return rows"
    assert only(data.load(module(code))).rows == 1
    assert sys.path == before


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def load():\n    return {}['key']", r"load\(\) failed: line 3: KeyError: 'key'"),
        ("def load():\n    np.zeros(-1)", r"load\(\) failed: line 3: ValueError"),
        ("raise RuntimeError('one\\ntwo')", r"cannot be loaded: line 2: RuntimeError: one\\ntwo"),
        ("def load(:", "cannot be loaded: line 2: SyntaxError"),
        ("import sys\ndef load(): sys.exit(3)", "failed: line 3: SystemExit: 3"),
        ("def other(): pass", "has no function 'load'"),
        ("load = 3", "has no function 'load'"),
        ("def load(): return 3", r"returned int; expected \(x, y\)"),
        ("def load(): return 1, 2, 3", "returned 3 things"),
        ("def load(): return {'valid': (1, 2)}", "returned a dict with the keys valid"),
        ("def load(): return {}", "with the keys none"),
        ("def load(): return [[1], [1, 2]], [1, 2]", "the features are not an array"),
        ("def load(): return [[1]], np.ma.array([1], mask=[1])", "the labels are masked in places"),
        ("def load(): return (), [1]", "is empty"),
    ],
)
def test_what_is_wrong_with_a_function_is_said(
    module: Callable[[str], str], code: str, message: str
) -> None:
    """An error in the user's code names its file, its line and the exception."""
    name = module(code)
    with pytest.raises(PolyakError, match=message) as error:
        data.load(name)
    assert "mine.py" in one_line(error)


def test_an_error_in_the_users_code_keeps_its_cause(module: Callable[[str], str]) -> None:
    """The exception itself is the cause of the error, for those who want the traceback."""
    with pytest.raises(PolyakError) as error:
        data.load(module("def load(): return 1 / 0"))
    assert isinstance(error.value.__cause__, ZeroDivisionError)


# --- rows to choose by, and rows to report on -----------------------------------------------------


@settings(derandomize=True, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=4, max_size=120),
    st.floats(0.3, 0.7),
    st.integers(0, 9),
    st.booleans(),
)
def test_halves_have_each_row_once_and_each_class_by_its_share(
    classes: list[int], share: float, seed: int, hot: bool
) -> None:
    """Features and labels stay together and in order; classes as integers or one-hot."""
    labels = np.eye(5)[classes] if hot else np.array(classes)
    split = data.Split("mine", np.arange(len(classes)), labels)
    try:
        chosen, other = data.halves(split, seed=seed, share=share)
    except UsageError:
        assert len(classes) < 8
        return
    assert sorted([*chosen.features, *other.features]) == list(range(len(classes)))
    for part in (chosen, other):
        rows = np.asarray(part.features)
        assert list(rows) == sorted(rows)
        assert equal(part.labels, labels[rows])
    for kind in range(5):
        taken = sum(classes[row] == kind for row in np.asarray(chosen.features))
        assert abs(taken - share * classes.count(kind)) < 1
    assert equal(data.halves(split, seed=seed, share=share)[0].features, chosen.features)


def test_halves_are_halves_and_say_so() -> None:
    """Each part gets 500 of the 1,000 test points; another seed gives others."""
    split = data.load("blobs").split("test")
    chosen, other = data.halves(split)
    assert (chosen.rows, other.rows) == (500, 500)
    sources = ("blobs (test), for selection", "blobs (test), for reporting")
    assert (chosen.source, other.source) == sources
    assert not equal(data.halves(split, seed=1)[0].features, chosen.features)


@pytest.mark.parametrize(
    "labels",
    [np.linspace(0, 1, 20), {"a": np.arange(20), "b": np.arange(20.0)}, (np.ones((20, 3)),)],
)
def test_halves_of_numbers_and_of_several_arrays_are_random(labels: data.Arrays) -> None:
    """Dicts and tuples stay dicts and tuples, and all their arrays are divided in the same way."""
    split = data.Split("mine", {"x": np.arange(20), "z": np.arange(20)[:, None]}, labels)
    chosen, other = data.halves(split, share=0.25)
    assert (chosen.rows, other.rows) == (5, 15)
    assert isinstance(chosen.features, dict)
    rows = chosen.features["x"]
    assert equal(chosen.features["z"][:, 0], rows)
    assert type(chosen.labels) is type(labels)
    for part, whole in zip(data.list_arrays(chosen.labels), data.list_arrays(labels), strict=True):
        assert equal(part, whole[rows])


def test_every_row_has_the_same_chance_of_either_half() -> None:
    """This holds also for the only row of a class: it is chosen for about 200 of 400 seeds."""
    split = data.Split("mine", np.arange(9), np.array([0, 1, 1, 2, 2, 2, 2, 2, 3]))
    chosen = [data.halves(split, seed=seed)[0].features for seed in range(400)]
    times = np.bincount(np.concatenate([np.asarray(rows) for rows in chosen]), minlength=9)
    assert (abs(times - 200) < 50).all()  # five standard deviations


def test_too_few_rows_to_part_are_reported() -> None:
    """Each part needs two rows, and the share must leave some for both."""
    for rows, share in ((1, 0.5), (3, 0.5), (20, 0.02)):
        with pytest.raises(UsageError, match=r"mine: has \d+ rows?; expected two or more"):
            data.halves(data.Split("mine", np.ones(rows), np.ones(rows)), share=share)
    for share in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(UsageError, match="out of range; expected"):
            data.halves(data.Split("mine", np.ones(9), np.ones(9)), share=share)
