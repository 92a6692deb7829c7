"""What a Gram matrix tells of a run equals what numpy finds in the whole vectors."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak_cli.examining import gram
from polyak_cli.tensors import Float64

COUNTS = st.integers(min_value=2, max_value=9)
SEEDS = st.integers(min_value=0, max_value=2**32 - 1)


def make_run(count: int, seed: int, size: int = 300, step: float = 0.01) -> Float64:
    """Return checkpoints that wander from a random start."""
    rng = np.random.default_rng(seed)
    steps = step * rng.normal(size=(count, size))
    return np.asarray(rng.normal(size=size) + steps.cumsum(axis=0))


def assert_close(found: Float64, wanted: object) -> None:
    """Fail if numbers differ beyond ten digits."""
    np.testing.assert_allclose(found, np.asarray(wanted, np.float64), rtol=1e-10, atol=1e-13)


def wide(vectors: Float64) -> np.ndarray:
    """Return the vectors as long doubles, in which the oracle computes."""
    return vectors.astype(np.longdouble)


@settings(max_examples=25, deadline=None)
@given(COUNTS, SEEDS)
def test_lengths_equal_those_of_the_whole_vectors(count: int, seed: int) -> None:
    """Norms, distances, steps, cosines and the spread are those of numpy, to ten digits."""
    vectors = make_run(count, seed)
    x, found = wide(vectors), gram.make_gram(vectors)
    assert_close(gram.norms(found), np.linalg.norm(vectors, axis=1))
    apart = [[float(np.sqrt(((a - b) ** 2).sum())) for a in x] for b in x]
    assert_close(gram.distances(found), apart)
    steps = np.diff(x, axis=0)
    lengths = np.sqrt((steps**2).sum(axis=1))
    assert_close(gram.lengths_of_steps(found), lengths)
    turned = [float(a @ b / np.sqrt((a @ a) * (b @ b))) for a, b in pairwise(steps)]
    assert_close(gram.cosines_of_steps(found), turned)
    angles = [[float(a @ b / np.sqrt((a @ a) * (b @ b))) for a in x] for b in x]
    assert_close(gram.cosines(found), angles)
    mean = x.mean(axis=0)
    wanted = float(((x - mean) ** 2).sum(axis=1).mean() / (mean @ mean))
    assert gram.spread(found) == pytest.approx(wanted, rel=1e-10)


@settings(max_examples=25, deadline=None)
@given(COUNTS, SEEDS)
def test_averages_of_any_sign_are_where_the_vectors_put_them(count: int, seed: int) -> None:
    """Distances to a weighted average, its norm and its place come from the matrix alone."""
    vectors = make_run(count, seed)
    x, found = wide(vectors), gram.make_gram(vectors)
    rng = np.random.default_rng(seed)
    signed, other = rng.normal(size=(2, count)) + 1
    signed, other = signed / signed.sum(), other / other.sum()
    average = signed.astype(np.longdouble) @ x
    far = np.sqrt(((x - average) ** 2).sum(axis=1)).astype(float)
    measured = gram.distances_to_average(found, signed)
    np.testing.assert_allclose(measured, far, rtol=1e-8)
    norm = float(np.sqrt(average @ average))
    assert gram.norm_of_average(found, signed) == pytest.approx(norm, rel=1e-10)
    between = float(np.sqrt(((average - other.astype(np.longdouble) @ x) ** 2).sum()))
    assert gram.distance_of_averages(found, signed, other) == pytest.approx(between, rel=1e-8)
    components = gram.find_components(found)
    values = np.linalg.svd(vectors - vectors.mean(axis=0), compute_uv=False) ** 2
    shares = values[:count] / values.sum()
    np.testing.assert_allclose(components.shares, shares, atol=1e-9)
    # The components keep all distances: also that of the average from each checkpoint.
    offsets = components.places - gram.place_average(components, signed)
    np.testing.assert_allclose(np.linalg.norm(offsets, axis=1), far, rtol=1e-6)


def test_a_spread_of_a_trillionth_of_the_norm_is_not_lost() -> None:
    """Distances of 1e-12 of the norm keep ten digits; products of the weights would keep none."""
    base = np.random.default_rng(1).normal(size=2000)
    steps = make_run(6, 2, size=2000, step=1.0)
    # Multiples of a power of two, so that the checkpoints are what was meant to the last bit.
    vectors = np.round(base * 2**8) / 2**8 + np.round(steps * 4) * 2.0**-44
    offsets = vectors - vectors.mean(axis=0)
    wanted = (offsets**2).sum(axis=1).mean() / (base @ base)
    found = gram.make_gram(vectors)
    assert wanted < 1e-24
    assert gram.spread(found) == pytest.approx(wanted, rel=1e-2)
    turned = [a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in pairwise(np.diff(vectors, axis=0))]
    np.testing.assert_allclose(gram.cosines_of_steps(found), turned, rtol=1e-10)


@pytest.mark.parametrize("r", [-0.5, 0.0, 0.3, 0.8])
@pytest.mark.parametrize("count", [5, 10])
def test_the_effective_number_is_that_of_the_process(r: float, count: int) -> None:
    """Of 40,000 independent autoregressive elements, r is found and so is the mean's variance."""
    rng = np.random.default_rng(3)
    rows = [rng.normal(size=40_000)]
    for _ in range(count - 1):
        rows.append(r * rows[-1] + np.sqrt(1 - r * r) * rng.normal(size=40_000))
    vectors = np.array(rows)
    found = gram.make_gram(vectors + 7)
    assert gram.estimate_correlation(found) == pytest.approx(r, abs=0.03)
    # Each element has variance 1, and the mean of N independent ones would have 1 / N.
    for c in (np.full(count, 1 / count), np.arange(1, count + 1) / sum(range(1, count + 1))):
        wanted = 1 / float(((c @ vectors) ** 2).mean())
        assert gram.effective_number(found, c) == pytest.approx(wanted, rel=0.06)


def test_drift_counts_as_one_checkpoint() -> None:
    """Checkpoints on a line, and those of a random walk, steady an average no more than one."""
    line = np.outer(np.arange(8.0), np.ones(5)) + 3
    walk = make_run(8, 4, size=40_000)
    for vectors in (line, walk):
        assert gram.effective_number(gram.make_gram(vectors)) == pytest.approx(1.0, abs=0.05)
    assert gram.mean_cosine(gram.make_gram(line)) == pytest.approx(1.0)


def test_what_cannot_be_said_is_none() -> None:
    """The same checkpoint twice, one alone, and zeros have no direction and no correlation."""
    same = gram.make_gram(np.full((4, 3), 2.5))
    assert gram.spread(same) == 0.0
    assert gram.mean_cosine(same) is None
    assert gram.effective_number(same) is None
    assert not gram.find_components(same).shares.any()
    one = gram.make_gram(np.full((1, 3), 2.5))
    assert (gram.spread(one), gram.mean_cosine(one), gram.effective_number(one)) == (
        0.0,
        None,
        None,
    )
    assert gram.distances(one).tolist() == [[0.0]]
    opposed = gram.make_gram(np.array([[1.0, -1.0], [-1.0, 1.0]]))
    assert gram.spread(opposed) is None  # relative to a mean of zero
    zeros = gram.make_gram(np.zeros((3, 2)))
    assert gram.spread(zeros) == 0.0
    assert np.isnan(gram.cosines(zeros)).all()
    swinging = gram.make_gram(np.array([[1.0], [2.0]] * 3))
    assert gram.effective_number(swinging) is None


@settings(max_examples=25, deadline=None)
@given(COUNTS, SEEDS, st.integers(0, 300))
def test_parts_add_up_to_the_whole(count: int, seed: int, cut: int) -> None:
    """The sum of the products of two parts is that of the whole, also at another exponent."""
    vectors = make_run(count, seed)
    low, high = gram.make_gram(vectors[:, :cut]), gram.make_gram(vectors[:, cut:])
    whole = gram.make_gram(vectors)
    for both in (low.plus(high), low.rescale(40).plus(high)):
        np.testing.assert_allclose(gram.distances(both), gram.distances(whole), rtol=1e-9)
        assert both.size == whole.size
        assert gram.spread(both) == pytest.approx(gram.spread(whole))
        assert gram.effective_number(both) == pytest.approx(gram.effective_number(whole))
    assert gram.make_empty(count).plus(whole).inner.tolist() == whole.inner.tolist()


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1.0))
def test_jitter_is_the_variance_of_noise_on_a_straight_path(seed: int, size: float) -> None:
    """Independent noise of a known variance is found whatever the drift, a path without it is 0."""
    random = np.random.default_rng(seed)
    path = random.normal(size=2000) + np.arange(12.0)[:, None] * random.normal(size=2000) / 50
    noisy = path + size * random.normal(size=path.shape)
    norm = float((noisy.mean(0) ** 2).sum())
    found = gram.jitter(gram.make_gram(noisy))
    assert found == pytest.approx(2000 * size**2 / norm, rel=0.2)
    assert gram.jitter(gram.make_gram(path)) == pytest.approx(0, abs=1e-13)
    assert gram.jitter(gram.make_gram(path[:2])) is None


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(0, 6), st.integers(2, 6))
def test_a_window_has_the_products_of_its_own_checkpoints(
    seed: int, first: int, length: int
) -> None:
    """They are those that the window alone would have given."""
    vectors = np.random.default_rng(seed).normal(size=(12, 30))
    window = gram.take_window(gram.make_gram(vectors), first, first + length)
    alone = gram.make_gram(vectors[first : first + length])
    assert window.inner == pytest.approx(alone.inner, abs=1e-10)
    assert window.along == pytest.approx(alone.along, abs=1e-10)
    assert window.square == pytest.approx(alone.square)
