"""Says in one word how a run moves, and how often averaging paid in runs that moved so.

The words come from inner products alone, without data.  They are no forecast: no number of the
checkpoints was found that tells across tasks whether averaging pays.  So each word carries the
shares that were measured, from the task with the smallest to that with the largest.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any, NamedTuple

from polyak_cli.examining import gram as grams
from polyak_cli.examining.gram import Gram

#: Fewer checkpoints have too few steps to compare.
_FEWEST = 4
#: The last step is so much shorter than the longest where a rate was decayed.
_SETTLED = 0.1
#: Above this mean cosine of each step with the next, steps lead the same way more than they turn.
_DRIFTING = 0.1
#: Checkpoints in a window, as in the measurements.  Training moves most at its beginning: by all
#: checkpoints of a run, whatever follows would be called settled.
WINDOW = 10


class Shares(NamedTuple):
    """In what share of measured windows averaging paid, and in what share it lost.

    An average pays where its loss is 2 % below that of the newest checkpoint or more, and loses
    where it is 2 % above or more.  Each share is a pair: of the task with the smallest, and of that
    with the largest.
    """

    paid: tuple[float, float]
    lost: tuple[float, float]


#: Measured by `make proof`; a test computes them from its results.
MEASURED: Mapping[str, Shares] = {
    "settled": Shares((0.0, 0.24), (0.0, 0.27)),
    "drifting": Shares((0.0, 0.76), (0.0, 0.91)),
    "wandering": Shares((0.51, 1.0), (0.0, 0.16)),
}


class Movement(NamedTuple):
    """How the newest ten checkpoints of a run move, or all where there are fewer.

    Attributes:
        word: "settled", "drifting" or "wandering".
        cosine: the mean cosine of each step with the next; None where nothing moves.
        last_step: the length of the last step, as a part of the longest; None where nothing moves.
        checkpoints: how many were judged.
    """

    word: str
    cosine: float | None
    last_step: float | None
    checkpoints: int = WINDOW

    @property
    def measured(self) -> Shares | None:
        """How often averaging paid and lost in windows that moved so.

        None for fewer than ten, and where nothing moves: neither was measured.
        """
        was_measured = self.checkpoints == WINDOW and self.last_step is not None
        return MEASURED[self.word] if was_measured else None

    def data(self) -> dict[str, Any]:
        """Return it as JSON types."""
        paid, lost = self.measured or (None, None)
        return {
            **self._asdict(),
            "paid": paid and list(paid),
            "lost": lost and list(lost),
        }


def judge(gram: Gram) -> Movement | None:
    """Return how the newest ten checkpoints move; None for fewer than four checkpoints.

    *Settled*: the last step is at most a tenth of the longest, or nothing moves.  *Drifting*: steps
    lead the same way more than they turn, so an average lags behind.  *Wandering*: neither.
    """
    if gram.count < _FEWEST:
        return None
    gram = grams.take_window(gram, max(0, gram.count - WINDOW), gram.count)
    steps = grams.lengths_of_steps(gram.normalise())
    longest = float(steps.max())
    if not longest > 0:
        return Movement("settled", None, None, gram.count)
    last, cosine = float(steps[-1]) / longest, grams.mean_cosine(gram)
    return Movement(choose_word(cosine, last), cosine, last, gram.count)


def choose_word(cosine: float | None, last_step: float) -> str:
    """Return the word for a mean cosine of steps and a last step; see `Movement` and `judge`."""
    if last_step <= _SETTLED or cosine is None:
        return "settled"
    return "drifting" if cosine > _DRIFTING else "wandering"


class Window(NamedTuple):
    """Neighbouring checkpoints of a run.

    Attributes:
        first: the place of the oldest, counted from 0.
        end: the place after that of the newest.
        jitter: the median over the tensors of `gram.jitter`.
    """

    first: int
    end: int
    jitter: float


def rank_windows(groups: Mapping[str, Gram], length: int = WINDOW) -> list[Window]:
    """Return windows of a run that have no checkpoint in common, those that scatter most first.

    The newest window ends at the newest checkpoint.  Within a task, averaging gained more where
    `Window.jitter` was larger; across tasks its size says little.

    Args:
        groups: inner products of each tensor.
        length: checkpoints in a window.
    """
    count = next((group.count for group in groups.values()), 0)
    found = []
    for end in range(count, length - 1, -length):
        windows = (grams.take_window(group, end - length, end) for group in groups.values())
        measured = [value for value in map(grams.jitter, windows) if value is not None]
        found.append(Window(end - length, end, median(measured) if measured else 0.0))
    return sorted(found, key=lambda window: -window.jitter)


def word_movement(movement: Movement) -> str:
    """Return one line for the user."""
    if movement.last_step is None:
        newest = "newest ten" if movement.checkpoints == WINDOW else str(movement.checkpoints)
        return (
            f"{movement.word}: the {newest} checkpoints are the same, so an average of them is too"
        )
    if movement.measured is None:
        return (
            f"{movement.word}, by {movement.checkpoints} checkpoints: how often averaging paid was "
            "measured only where there were ten"
        )
    paid, lost = (_word_range(shares) for shares in movement.measured)
    return (
        f"{movement.word}: of such windows of ten in the project's measurements averaging paid in "
        f"{paid}, lost in {lost}, by task; what it does here, only data tell"
    )


def _word_range(shares: tuple[float, float]) -> str:
    low, high = (f"{share:.0%}".replace("%", " %") for share in shares)
    return low if low == high else f"{low.removesuffix(' %')} to {high}"
