"""Say by which options the checkpoints that an error is about are left out.

An option is named only if the checkpoints chosen with it are those that are wanted.  Reads names,
and no value.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from polyak_cli.averaging import options as averaging_options
from polyak_cli.averaging.options import Choice, Settings, Source
from polyak_cli.checkpoints import Selection
from polyak_cli.checkpoints.listing import is_matched
from polyak_cli.errors import PolyakError, quote_glob

Sources = Source | Sequence[Source] | Selection

#: Checkpoints that are named one by one in the advice.
_NAMED = 3


def add_advice(
    error: PolyakError, sources: Sources, chosen: Selection, settings: Settings, *, can_skip: bool
) -> PolyakError:
    """Return an error with the ways to average without the checkpoints that are at fault.

    Args:
        error: it is returned as it is if it blames no checkpoint, or all.
        sources: what was chosen from.
        chosen: the checkpoints, as the error numbers them.
        settings: the options.
        can_skip: ``--on-unhealthy skip`` leaves them out.
    """
    out = [chosen.checkpoints[k].path for k in error.at_fault]
    if not out or len(out) == len(chosen.checkpoints):
        return error
    search = _Search(sources, chosen, settings, out)
    ways = [*search.list_exclusions()]
    if can_skip:
        ways.append("--on-unhealthy skip")
    ways += search.list_windows()
    if not ways:
        return error
    what = "it" if len(out) == 1 else f"these {len(out)}"
    advised = type(error)(f"{error}; leave {what} out with {', or with '.join(ways)}")
    advised.about, advised.at_fault = error.about, error.at_fault
    return advised


class _Search:
    """Finds options with which some checkpoints are left out, and all others stay."""

    def __init__(
        self, sources: Sources, chosen: Selection, settings: Settings, out: Sequence[Path]
    ) -> None:
        self.sources = sources
        self.chosen = chosen
        self.settings = settings
        self.out = out
        self.paths = [one.path for one in chosen.checkpoints]

    def list_exclusions(self) -> Iterator[str]:
        """Yield --exclude for each, if a few are to be left out."""
        if len(self.out) > _NAMED:
            return
        globs = [quote_glob(self._choose_name(path)) for path in self.out]
        choice = self.settings.choice
        wider = replace(choice, exclude=(*choice.exclude, *(shlex.split(one)[0] for one in globs)))
        words = " ".join(f"--exclude {one}" for one in globs)
        if self._leaves_others(wider):
            yield words
        elif choice.last is not None:  # fewer than that are left
            last = len(self.paths) - len(self.out)
            if self._leaves_others(replace(wider, last=last)):
                yield f"{words} --last {last}"

    def list_windows(self) -> Iterator[str]:
        """Yield --last, if two or more are newer than all that are to be left out."""
        newer = len(self.paths) - 1 - max(self.paths.index(path) for path in self.out)
        choice = replace(self.settings.choice, last=newer)
        if isinstance(self.sources, Selection) or newer < 2:
            return
        if self._choose(choice) == self.paths[-newer:]:
            yield f"--last {newer}"

    def _choose_name(self, path: Path) -> str:
        """Return what a glob for one checkpoint must match: its name, or all of its path."""
        known = [*self.paths, *self.chosen.left_out]
        return str(path) if sum(one.name == path.name for one in known) > 1 else path.name

    def _leaves_others(self, choice: Choice) -> bool:
        found = {*self._choose(choice)}
        return found.isdisjoint(self.out) and found >= {*self.paths} - {*self.out}

    def _choose(self, choice: Choice) -> list[Path]:
        """Return the checkpoints that would be averaged; none if that would be refused."""
        weighting = self.settings.weighting
        with contextlib.suppress(PolyakError):
            if isinstance(self.sources, Selection):
                # The caller chose by rules of its own, among which globs work as everywhere.
                left = {
                    one.path: position
                    for one, position in zip(
                        self.chosen.checkpoints, self.chosen.positions, strict=True
                    )
                    if not any(is_matched(one.path, glob) for glob in choice.exclude)
                }
                weighting.compute([*left.values()])
                return [*left]
            again = averaging_options.select(
                self.sources,
                choice,
                use_ema=self.settings.tensors.use_ema,
                weighting=weighting,
            )
            weighting.compute(again.positions, again.sigmas)
            return [one.path for one in again.checkpoints]
        return []
