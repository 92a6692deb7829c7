"""The word for how a run moves, and the order of its windows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from polyak_cli.examining import gram as grams
from polyak_cli.examining import verdict
from tests.command import polyak
from tests.training import Array

RANDOM = np.random.default_rng(0)
CENTRE = RANDOM.normal(size=400)
NOISE = RANDOM.normal(size=(10, 400))
STEPS = np.arange(10.0)[:, None]
RUNS = {
    "drifting": CENTRE + 0.01 * STEPS * NOISE[0] + 1e-3 * NOISE,
    "wandering": CENTRE + 0.01 * NOISE,
    "settled": CENTRE + 0.3**STEPS * NOISE[0] + 1e-9 * NOISE,
}


def name(vectors: Array) -> str:
    """Return the word for checkpoints."""
    movement = verdict.judge(grams.make_gram(vectors))
    assert movement is not None
    return movement.word


@pytest.mark.parametrize("word", RUNS)
@pytest.mark.parametrize("scale", [1e-100, 1.0, 1e100])
def test_a_run_is_called_what_it_does(word: str, scale: float) -> None:
    """A line with little noise drifts, noise about a point wanders, shrinking steps settle."""
    assert name(RUNS[word] * scale) == word


def test_a_run_that_does_not_move_has_settled() -> None:
    """Equal checkpoints have neither a cosine nor a last step."""
    still = verdict.judge(grams.make_gram(np.tile(CENTRE, (10, 1))))
    assert still == verdict.Movement("settled", None, None)
    assert (still.measured, still.data()["paid"], still.data()["lost"]) == (None, None, None)
    assert verdict.word_movement(still) == (
        "settled: the newest ten checkpoints are the same, so an average of them is too"
    )
    few = verdict.judge(grams.make_gram(np.tile(CENTRE, (4, 1))))
    assert few is not None
    assert "the 4 checkpoints are the same" in verdict.word_movement(few)


@pytest.mark.parametrize("word", RUNS)
def test_the_newest_ten_are_judged_however_the_run_began(word: str) -> None:
    """Early steps that are a hundred times as long change neither the word nor its numbers."""
    early = CENTRE + 10 * np.random.default_rng(2).normal(size=(5, 400))
    whole = verdict.judge(grams.make_gram(np.concatenate([early, RUNS[word]])))
    newest = verdict.judge(grams.make_gram(RUNS[word]))
    assert whole is not None
    assert newest is not None
    assert whole.word == newest.word == word
    assert whole.cosine == pytest.approx(newest.cosine)
    assert whole.last_step == pytest.approx(newest.last_step)


def test_three_checkpoints_are_not_judged() -> None:
    """Two steps have one cosine, which says nothing."""
    assert verdict.judge(grams.make_gram(RUNS["drifting"][:3])) is None
    assert verdict.judge(grams.make_gram(RUNS["drifting"][:4])) is not None


def test_fewer_than_ten_get_the_word_without_shares() -> None:
    """How often averaging paid was measured on windows of ten, so nothing is claimed of others."""
    few = verdict.judge(grams.make_gram(RUNS["wandering"][:6]))
    assert few is not None
    assert (few.measured, few.data()["paid"], few.data()["lost"]) == (None, None, None)
    text = verdict.word_movement(few)
    assert text.startswith(f"{few.word}, by 6 checkpoints: ")
    assert "%" not in text


def test_the_line_gives_both_shares_and_denies_more() -> None:
    """The word, how often averaging paid and lost, and that this is no prediction."""
    for word, shares in verdict.MEASURED.items():
        text = verdict.word_movement(verdict.Movement(word, 0.0, 1.0))
        assert text.startswith(f"{word}: ")
        assert f"{round(100 * shares.paid[1])} %" in text
        assert "only data tell" in text


def test_the_command_says_the_word_and_lists_windows(tmp_path: Path) -> None:
    """Both are in the lines and in the JSON; windows only where there are two of ten."""
    for k in range(20):
        size = 1e-2 if k < 10 else 3e-3
        noise = np.random.default_rng(k).normal(size=400)
        np.savez(tmp_path / f"model_{k:02d}.npz", k=(CENTRE + size * noise).astype(np.float32))
    done = polyak("geometry", ".", cwd=tmp_path)
    assert "\nby the newest ten, wandering: of such windows of ten" in done.stdout
    listed = r"by jitter of the median tensor: model_00\.npz to model_09\.npz \(.*\), model_10"
    assert re.search(listed, done.stdout)
    found = json.loads(polyak("geometry", ".", "--last", "10", "--json", cwd=tmp_path).stdout)
    assert found["movement"]["word"] == "wandering"
    assert found["movement"]["paid"] == list(verdict.MEASURED["wandering"].paid)
    assert [one["newest"] for one in found["windows"]] == ["model_19.npz"]
    three = json.loads(polyak("geometry", ".", "--last", "3", "--json", cwd=tmp_path).stdout)
    assert (three["movement"], three["windows"]) == (None, [])


def test_windows_are_ranked_by_how_much_they_scatter() -> None:
    """The one with most noise is first; checkpoints left over at the beginning are in none."""
    sizes = np.repeat([9.0, 0.01, 0.1, 0.03], [2, 4, 4, 4])[:, None]
    vectors = CENTRE + sizes * np.random.default_rng(1).normal(size=(14, 400))
    groups = {"a": grams.make_gram(vectors[:, :100]), "b": grams.make_gram(vectors[:, 100:])}
    ranked = verdict.rank_windows(groups, 4)
    assert [(one.first, one.end) for one in ranked] == [(6, 10), (10, 14), (2, 6)]
    assert verdict.rank_windows(groups, 15) == []
    assert verdict.rank_windows({}, 4) == []
