"""Tables cross the border between processes unchanged; whatever else a child sends is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyak_cli.errors import FormatError
from polyak_cli.formats import wire
from polyak_cli.formats.hdf5.chunks import Chunks
from polyak_cli.formats.zips import Deflated
from polyak_cli.storage import File, Version
from polyak_cli.tensors import (
    Asset,
    Extent,
    Grid,
    GridPart,
    Inline,
    KerasFacts,
    OutlinedLayer,
    OutputRules,
    Placement,
    Storage,
    Table,
    TensorSpec,
)

SIZE = 1 << 20
PATH = File("model", Version(1, 2, SIZE, 3))
FILES = (PATH, File("model-2", Version(1, 3, SIZE, 4)))
NAMES = st.text(st.characters(codec="utf-8"), max_size=8)
SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
COUNTS = st.integers(0, SIZE // 2)
EXTENTS = st.builds(Extent, COUNTS, COUNTS, st.integers(0, 1))


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """Return a tensor that is cut along its first dimension."""
    rows, width = draw(st.integers(2, 9)), draw(st.integers(1, 9))
    cut = draw(st.integers(1, rows - 1))
    halves = [
        GridPart((start, 0), (stop - start, width), Extent(0, (stop - start) * width * 4, file))
        for file, (start, stop) in enumerate([(0, cut), (cut, rows)])
    ]
    return Grid((rows, width), 4, tuple(halves))


STORAGES: st.SearchStrategy[Storage | None] = st.one_of(
    st.none(),
    EXTENTS,
    st.builds(Inline, st.binary(max_size=9)),
    grids(),
    st.builds(Deflated, COUNTS, COUNTS, COUNTS, COUNTS, st.integers(0, 1)),
    st.builds(
        Chunks,
        st.just((9, 9)),
        st.tuples(st.integers(1, 9), st.integers(1, 9)),
        st.sampled_from([1, 2, 4, 8]),
        st.lists(st.sampled_from([1, 2, 3, 32000]), max_size=3).map(tuple),
        st.dictionaries(
            st.tuples(COUNTS, COUNTS), st.tuples(COUNTS, COUNTS, st.integers(0, 7)), max_size=3
        ),
        st.integers(0, 1),
    ),
)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, TensorSpec]:
    """Return specs by their names."""
    make = st.builds(
        TensorSpec,
        NAMES,
        SHAPES,
        st.sampled_from(["float32", "bfloat16", "int8", "string"]),
        st.sampled_from("<>"),
        NAMES,
        STORAGES,
        NAMES,
        NAMES,
    )
    return {spec.name: spec for spec in draw(st.lists(make, max_size=4))}


TABLES = st.builds(
    Table,
    path=st.just(Path(PATH.path)),
    format=st.just("npz"),
    files=st.just(FILES),
    tensors=tensors(),
    others=tensors(),
    optimizer=st.frozensets(NAMES, max_size=3),
    config=NAMES,
    is_polyak_output=st.booleans(),
    about=st.dictionaries(NAMES, NAMES, max_size=3),
    keras=st.builds(
        KerasFacts,
        st.lists(NAMES, max_size=3).map(tuple),
        st.frozensets(NAMES, max_size=3),
        st.dictionaries(NAMES, st.lists(NAMES, max_size=3).map(tuple), max_size=3),
        st.lists(NAMES, max_size=3).map(
            lambda names: tuple(OutlinedLayer(k, n, n) for k, n in enumerate(names, start=1))
        ),
        st.dictionaries(NAMES, NAMES, max_size=3),
    ),
    rules=st.builds(
        OutputRules,
        st.lists(NAMES, max_size=3).map(tuple),
        st.dictionaries(NAMES, NAMES, max_size=3),
        st.booleans(),
        st.lists(NAMES, max_size=3).map(tuple),
    ),
    assets=st.dictionaries(NAMES, st.builds(Asset, NAMES, NAMES), max_size=3),
)


# Drawing a table takes long on a busy machine.
@settings(suppress_health_check=[HealthCheck.too_slow])
@given(TABLES)
def test_a_table_comes_back_as_it_was(table: Table) -> None:
    """Also in the order of its tensors."""
    packed = json.loads(json.dumps(wire.pack_table(table)))
    found = wire.unpack_table(packed, "npz", PATH)
    assert found == table
    assert list(found.tensors) == list(table.tensors)


def one_table(storage: Storage) -> dict[str, Any]:
    """Return the JSON of a table of one tensor."""
    spec = TensorSpec("w", (2, 2), "float32", "<", "w", storage)
    table = Table(Path("model"), "npz", FILES, {"w": spec}, {}, frozenset(), "", False)
    packed: dict[str, Any] = json.loads(json.dumps(wire.pack_table(table)))
    return packed


CHUNKS = Chunks((2, 2), (2, 2), 4, (1,), {(0, 0): (0, 16, 0)})
GRID = Grid((2, 2), 4, (GridPart((0, 0), (2, 2), Extent(0, 16)),))


@pytest.mark.parametrize(
    ("storage", "keys", "value"),
    [
        (Extent(0, 16), (1,), SIZE),  # offset
        (Extent(0, 16), (1,), -1),
        (Extent(0, 16), (1,), 1.5),
        (Extent(0, 16), (1,), True),
        (Extent(0, 16), (2,), SIZE + 1),  # bytes
        (Extent(0, 16), (3,), 2),  # file
        (Extent(0, 16), (0,), "pickle"),
        (Inline(b"abcd"), (1,), "no hex"),
        (GRID, (2,), 0),  # bytes of an element
        (GRID, (3, 0, 0), [1, 0]),  # start: the part ends outside the tensor
        (GRID, (3, 0, 0), [0]),
        (GRID, (3, 0, 1), [1 << 60, 0]),  # shape: without end, and of no bytes
        (GRID, (3, 0, 2, 0), SIZE),
        (Deflated(0, 16, 0, 16), (2,), SIZE + 1),  # bytes of the member
        (Deflated(0, 16, 0, 16), (5,), 2),
        (CHUNKS, (2,), [0, 2]),  # shape of a chunk
        (CHUNKS, (2,), [1 << 20, 1 << 20]),
        (CHUNKS, (2,), [2]),
        (CHUNKS, (3,), 1 << 40),  # bytes of an element
        (CHUNKS, (4,), [7]),  # filters
        (CHUNKS, (5, 0, 0), [0]),  # position
        (CHUNKS, (5, 0, 1), SIZE),  # offset
        (CHUNKS, (5, 0, 3), -1),  # filters that were skipped
        (CHUNKS, (6,), 2),  # file
    ],
)
def test_a_place_outside_the_files_is_refused(
    storage: Storage, keys: tuple[int, ...], value: Any
) -> None:
    """Nor are numbers taken that would fill the memory or never end."""
    packed = one_table(storage)
    assert wire.unpack_table(copy.deepcopy(packed), "npz", PATH).tensors
    row = packed["tensors"][0][5]
    for key in keys[:-1]:
        row = row[key]
    row[keys[-1]] = value
    with pytest.raises(FormatError, match="gave an invalid result"):
        wire.unpack_table(packed, "npz", PATH)


@pytest.mark.parametrize("place", range(8))
@pytest.mark.parametrize("value", [7, {"a": 1}, [[]], True])
def test_a_row_of_other_types_is_refused(place: int, value: Any) -> None:
    """Each of its values is checked."""
    packed = one_table(Extent(0, 16))
    row = [*packed["tensors"][0], "digest", "arrangement"]
    row[place] = value
    with pytest.raises(FormatError, match="gave an invalid result"):
        wire.unpack_table(packed | {"tensors": [row]}, "npz", PATH)


@pytest.mark.parametrize(
    "key",
    ["files", "tensors", "others", "optimizer", "config", "about", "keras", "rules", "assets"],
)
@pytest.mark.parametrize("value", [7, [7], [[7]]])
def test_a_table_of_other_types_is_refused(key: str, value: Any) -> None:
    """Each of its fields is checked."""
    with pytest.raises(FormatError, match="gave an invalid result"):
        wire.unpack_table(one_table(Extent(0, 16)) | {key: value}, "npz", PATH)


@pytest.mark.parametrize(
    "outline",
    [[[0, "a", ""]], [[1, "a", ""], [3, "b", ""]], [[1, 7, ""]], [[1, "a"]], [[True, "a", ""]]],
)
def test_an_outline_of_no_model_is_refused(outline: Any) -> None:
    """Depths begin at 1 and go down one by one, and names are texts."""
    packed = one_table(Extent(0, 16))
    packed["keras"][3] = outline
    with pytest.raises(FormatError, match="gave an invalid result"):
        wire.unpack_table(packed, "npz", PATH)


def test_placements_come_back_and_others_are_refused() -> None:
    """The dtype is the one that was asked for, and the files are those of the output."""
    places = {"a": Placement(7, "float32", "<", 1), "b": Placement(0, "float32", "<", 0, GRID)}
    averaged = {"a": "float32", "empty": "float16", "b": "float32"}
    packed = wire.pack_placements(places, averaged)
    assert wire.unpack_placements(packed, averaged, 2) == places
    outside = wire._pack_storage(GRID)[1:]
    outside[2][0][2][2] = 2  # a file that the output does not have
    for at, value in enumerate([-1, "float64", "=", 2, outside]):
        row: list[Any] = [*places["a"]]
        row[at] = value
        with pytest.raises(ValueError, match="invalid placements"):
            wire.unpack_placements([row, None, packed[2]], averaged, 2)
    with pytest.raises(ValueError, match="invalid placements"):
        wire.unpack_placements(packed[:1], averaged, 2)


def test_an_output_has_its_files_beside_it_or_in_it() -> None:
    """A child that was taken over must not make its parent write into other files."""
    files = ["/a/out.data", "/a/out/x", "/a/out/b/x"]
    assert wire.unpack_output_files(files, "/a/out") == files
    for path in ("/a/b/x", "/x", "/a/out/../../x", "/a/out/b/../../../x", "/a/outer/x", 7):
        with pytest.raises(ValueError, match="file"):
            wire.unpack_output_files([path], "/a/out")
