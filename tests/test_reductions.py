"""Sums over slabs: whatever the slabs, they are the sums over the whole tensors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyak_cli import formats
from polyak_cli.engine.slabs import Memory
from polyak_cli.examining import reductions
from polyak_cli.examining.reductions import NeighbourSums, PairSums, RunSums, ValueSums
from tests.oracle import Array, write_model

#: Values with all that is special, and where they are cut into slabs.
NUMBERS = st.sampled_from([0.0, -0.0, 1.5, -2.0, 1e200, math.inf, -math.inf, math.nan])
FINITE = st.integers(-100, 100).map(float)
CUTS = st.lists(st.integers(0, 12), max_size=4).map(sorted)


def slabs(values: Array, cuts: list[int]) -> list[Array]:
    """Return copies of the parts between the cuts, along the last axis."""
    return [part.copy() for part in np.split(values, cuts, axis=-1)]


@given(st.lists(NUMBERS, min_size=1, max_size=12), CUTS)
def test_values(values: list[float], cuts: list[int]) -> None:
    """Extremes and the count of what is not finite."""
    whole = np.array(values)
    sums = ValueSums()
    with np.errstate(over="ignore"):
        for slab in slabs(whole, cuts):
            sums.add([slab])
    finite = whole[np.isfinite(whole)]
    assert sums.nonfinite == len(whole) - len(finite)
    assert sums.min == finite.min(initial=math.inf)
    assert sums.max == finite.max(initial=-math.inf)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=12), CUTS)
def test_pairs_that_are_equal(pairs: list[tuple[float, float]], cuts: list[int]) -> None:
    """Equality is that of numpy, where NaN equals NaN, and so is whether the distance is 0."""
    a, b = np.array(pairs).T
    sums = PairSums()
    with np.errstate(over="ignore", invalid="ignore"):
        for one, other in zip(slabs(a, cuts), slabs(b, cuts), strict=True):
            sums.add([one, other])
    equal = np.array_equal(a, b, equal_nan=True)
    assert sums.equal is equal
    assert (sums.largest == 0.0) is equal


@given(st.lists(st.tuples(FINITE, FINITE, FINITE), min_size=1, max_size=12), CUTS)
def test_pairs_and_runs(rows: list[tuple[float, float, float]], cuts: list[int]) -> None:
    """Inner products and squared distances of whole numbers are exact."""
    models = np.array(rows).T * 3  # whose average is whole too
    a, b, _ = models
    pair, run = PairSums(), RunSums(3)
    for part in slabs(models, cuts):
        assert run.add([*part])
        pair.add([*part[:2]])
    assert (pair.aa, pair.bb, pair.ab) == (a @ a, b @ b, a @ b)
    assert pair.dd == (a - b) @ (a - b)
    average = models.sum(axis=0) / 3
    assert run.average == average @ average
    assert [*run.steps] == [step @ step for step in np.diff(models, axis=0)]
    assert [*run.spread] == [row @ row for row in models - average]


def test_a_run_that_is_not_finite_is_refused_before_anything_is_added() -> None:
    """So that the caller can name the tensor."""
    run = RunSums(2)
    assert not run.add([np.ones(3), np.array([1.0, math.nan, 1.0])])
    assert (run.average, *run.steps, *run.spread) == (0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("memory", [1 << 20, 16 << 20])
def test_neighbours(tmp_path: Path, memory: int) -> None:
    """Distances up to three places back, over more than one slab; no farther."""
    models = [np.arange(100_000) % (k + 3) for k in range(6)]
    paths = [
        write_model(tmp_path / f"m_{k}.h5", {"d": {"k": model.astype(np.float64)}})
        for k, model in enumerate(models)
    ]
    tables = formats.scan(paths)
    sums = NeighbourSums(len(tables))
    rows = [tuple(table.tensors["d/k"] for table in tables)]
    sums.read(tables, rows, Memory.within(memory, 1))
    for k, model in enumerate(models):
        assert sums.squares[k] == model @ model
        for j in range(k):
            squared = (model - models[j]) @ (model - models[j])
            expected = math.sqrt(squared) if k - j <= reductions.REACH else None
            assert sums.measure_distance(j, k) == expected
    assert not sums.same.any()


def test_every_tensor_has_a_reduction_of_its_own(tmp_path: Path) -> None:
    """By name, without empty tensors."""
    layer = {"a": np.ones(3), "b": np.full(4, 2.0), "empty": np.zeros((0, 2))}
    (table,) = formats.scan([write_model(tmp_path / "m.h5", {"d": layer})])
    rows = [(spec,) for spec in table.tensors.values()]
    found = reductions.reduce_each([table], rows, ValueSums)
    assert {name: sums.squares for name, sums in found.items()} == {"d/a": 3.0, "d/b": 16.0}
