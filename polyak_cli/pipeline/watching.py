"""Keep the average of a directory's checkpoints current while training writes them.

Knows when a checkpoint is whole and when an output is out of date, but not how checkpoints are
averaged.  Calls `stat` every few seconds: notifications of the system would be quicker, but network
file systems, where clusters keep checkpoints, send none.

The rule: a checkpoint counts when two looks found it unchanged and it can be read whole.  Until
then the average is that of the others.  It is made again when a checkpoint was added or changed,
never because one was deleted or is being rewritten.
"""

from __future__ import annotations

import glob
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Unpack

from polyak_cli import checkpoints, formats, pipeline
from polyak_cli.averaging import options as averaging_options
from polyak_cli.averaging import provenance, schemes
from polyak_cli.averaging.planning import Plan
from polyak_cli.checkpoints import Selection
from polyak_cli.errors import (
    CheckpointError,
    OutputError,
    PolyakError,
    UsageError,
    shown,
    word_count,
)
from polyak_cli.pipeline.report import Report
from polyak_cli.pipeline.stages import Options, parse_options
from polyak_cli.storage import File, locate, mirrors, read_version

INTERVAL = 2.0  # seconds
#: Looks that find the same problem in an unchanged file before it is reported.
_PATIENCE = 5

_Files = tuple[File, ...]


def watch(
    directory: averaging_options.Source,
    output: averaging_options.Source,
    *,
    interval: float = INTERVAL,
    once: bool = False,
    on_note: Callable[[str], None] | None = None,
    check: Callable[[Plan], None] | None = None,
    **options: Unpack[Options],
) -> Iterator[Report]:
    """Average the checkpoints of a directory, and again whenever there are new ones.

    What is published is to the byte what `average` makes of the same checkpoints.  With
    fewer checkpoints than ``last`` or ``best``, all are averaged; ``coefficients`` wait for enough.

    >>> for report in watch("ckpts/", "latest.h5", last=10, scheme="exp"):  # doctest: +SKIP
    ...     print(len(report.plan.checkpoints), report.notes)

    Args:
        directory: where checkpoints appear; it must be there already.
        output: the file to write and to replace each time, in the directory or elsewhere.
        interval: seconds between two looks.
        once: look twice and end, as from cron; an output that is up to date is left alone.
        on_note: called with each message on what is waited for, one line each.
        check: called with each plan before it is run; a `PolyakError` that it raises ends the
            watch, unless the directory changed meanwhile.
        **options: see `averaging.Options`; ``force`` replaces an output that is no average.

    Returns:
        An iterator that looks and waits when it is asked for the next published file.

    Raises:
        UsageError: the options contradict one another.
        OutputError: the output is in the way or cannot be written.
        CheckpointError: the checkpoints cannot be ordered.
        PolyakError: another subclass, for problems that waiting does not solve.
    """
    if not (interval > 0 and math.isfinite(interval)):
        raise UsageError(f"--interval is {interval:g}; expected seconds above 0")
    checkpoints.refuse_url(os.fspath(output))
    parse_options(options)
    schemes.refuse_running_means(options.get("scheme"), "watch")
    if options.get("on_unhealthy"):
        raise UsageError(
            "on_unhealthy belongs to average; watch waits for files that it cannot read"
        )
    if not options.get("force"):
        pipeline.check_replaceable(Path(output))
    options["force"] = True  # from now on: it is an average, or the user has said so
    url = locate(os.fspath(directory))  # which the command line has entered already
    watched = _Watched(url, Path(output), options, on_note or _ignore, check or _ignore, once)
    return _look_repeatedly(watched, interval, 2 if once else None)


def _ignore(_: object) -> None:
    """Do nothing, where nobody listens or checks."""


def _look_repeatedly(watched: _Watched, interval: float, looks: int | None) -> Iterator[Report]:
    """Look and wait in turn."""
    while True:
        report = watched.look()
        if report:
            watched.published = True
            yield report
        del report  # its tables may be large, and the next one's come
        if watched.looks == looks:
            watched.report_idleness()
            return
        time.sleep(interval)


class _Seen(NamedTuple):
    """The findings on one checkpoint."""

    files: _Files
    trouble: str  # why it cannot be read, '' where it can
    average: bool  # by this tool
    looks: int  # how many found it unchanged since it was first found so

    @property
    def whole(self) -> bool:
        """Whether it counts."""
        return not self.trouble and not self.average and self.looks > 0


@dataclass(slots=True)
class _Watched:
    """A directory, and the state of its checkpoints and output."""

    source: str  # a folder, or the URL of one, which is listed at each look
    output: Path
    options: Options
    on_note: Callable[[str], None]
    check: Callable[[Plan], None]
    once: bool
    looks: int = 0
    published: bool = False
    seen: dict[Path, _Seen] = field(default_factory=dict)  # by the file that opens it
    held: dict[Path, _Files] | None = None  # the inputs of the output; None if not known yet
    directory: Path = Path()  # the folder, or the one of stand-ins

    def look(self) -> Report | None:
        """Look once, and publish an average if there is a new one to be made.

        Raises:
            PolyakError: the problem, if nothing changed in the directory meanwhile.
        """
        self.looks += 1
        names = self._list_names()
        try:
            selection = self._select()
            plan = self._plan_if_due(selection)
            if not plan:
                return None
            report = pipeline.run(plan)
        except (UsageError, OutputError):
            raise
        except PolyakError as error:
            if self._is_still(names):
                raise
            self.on_note(f"{error}; the directory is changing, so polyak looks again")
            return None
        self.held = _map_files(plan)
        return replace(report, notes=(*self._note_fewer(plan), *report.notes))

    # --- what is there ----------------------------------------------------------------------------

    def _list_names(self) -> set[str]:
        self.directory = Path(mirrors.enter_folder(self.source))
        try:
            names = set(os.listdir(self.directory))  # noqa: PTH208 (names are all that is compared)
        except OSError as error:
            raise CheckpointError(
                f"{shown(self.directory)}: is not a directory to watch: {error.strerror}"
            ) from None
        return names - {"__pycache__"}  # Python's own, of a module of the user that lies there

    def _is_still(self, names: set[str]) -> bool:
        """Return whether nothing changed since the look began, so that another finds the same."""
        same = all(map(_are_unchanged, (seen.files for seen in self.seen.values() if seen.whole)))
        return same and self._list_names() == names

    def _select(self) -> Selection:
        """Return the checkpoints that count now; there may be none."""
        earlier, self.seen = self.seen, {}
        passed: dict[Path, str] = {}

        def sift(paths: Sequence[Path]) -> Collection[Path]:
            self.seen = self._look_at(paths, earlier)
            passed.update(
                (path, "written by polyak" if seen.average else "not whole yet")
                for path, seen in self.seen.items()
                if not seen.whole
            )
            return passed

        settings, own = parse_options(self.options)[0], self._exclude_output()
        choice = settings.choice
        selection = averaging_options.select(
            self.directory,
            replace(choice, exclude=(*choice.exclude, *own)),
            use_ema=settings.tensors.use_ema,
            growing=True,
            find_polyak_outputs=sift,
        )
        self._report_waiting(selection)
        about = []
        for one in selection.passed_over:
            reason = one.reason
            if own and one.path.name == self.output.name:
                reason = "the output"
            elif reason == "written by polyak":  # as `select` says of all that was sifted out
                reason = passed[checkpoints.find_file(one.path)]
            about.append(replace(one, reason=reason))
        return replace(selection, passed_over=tuple(about))

    def _exclude_output(self) -> list[str]:
        """Return a glob that excludes the output, if it is in the directory."""
        output = self.output
        inside = output.exists() and output.parent.resolve() == self.directory.resolve()
        return [glob.escape(output.name)] if inside else []

    def _look_at(self, paths: Sequence[Path], earlier: Mapping[Path, _Seen]) -> dict[Path, _Seen]:
        """Look at the checkpoints; only new, changed or unreadable ones are opened."""
        seen: dict[Path, _Seen] = {}
        for path in paths:
            before = earlier.get(path)
            if before and not before.trouble and _are_unchanged(before.files):
                seen[path] = before._replace(looks=before.looks + 1)
        to_try = [path for path in paths if path not in seen]
        outcomes = formats.probe(to_try, key=self.options.get("key") or "")
        for path, outcome in zip(to_try, outcomes, strict=True):
            if isinstance(outcome, PolyakError):
                found = _Seen(_find_file(path), str(outcome), False, 0)
            else:
                found = _Seen(outcome.files, "", outcome.is_polyak_output, 0)
            before = earlier.get(path)
            if before and before.files == found.files:
                found = found._replace(looks=before.looks + 1)
            seen[path] = found
        return seen

    def _report_waiting(self, selection: Selection) -> None:
        """Report what is waited for, if somebody may have to repair it."""
        patience = 1 if self.once else _PATIENCE
        for seen in self.seen.values():
            if seen.trouble and seen.looks == patience:
                self.on_note(f"{seen.trouble}; left out until it is complete")
        if self.looks == 2 and not selection.checkpoints:
            below = checkpoints.describe_folders(selection.passed_over)
            self.on_note(
                f"{shown(self.directory)}: no complete checkpoint is here yet"
                + (f", but {below}" if below else "")
            )

    def report_idleness(self) -> None:
        """Report why nothing was published, where nothing else says so."""
        if self.published:
            return
        name = shown(self.output)
        coefficients = self.options.get("coefficients")
        if self.held is not None:
            self.on_note(f"{name}: is up to date ({word_count(len(self.held), 'checkpoint')})")
        elif coefficients:
            self.on_note(f"{name}: waits for {len(coefficients)} checkpoints, one a coefficient")

    # --- what there is to do ----------------------------------------------------------------------

    def _plan_if_due(self, selection: Selection) -> Plan | None:
        """Return the plan for a new output, None if there is nothing to do yet."""
        chosen: dict[Path, _Files] = {}
        for one in selection.checkpoints:
            path = checkpoints.find_file(one.path)
            if path not in self.seen:
                raise CheckpointError(
                    f"{shown(self.directory)}: is a checkpoint itself; name the folder in which "
                    "checkpoints appear"
                )
            chosen[path] = self.seen[path].files
        coefficients = self.options.get("coefficients")
        if not chosen or (coefficients and len(chosen) < len(coefficients)):
            return None
        if self.held is not None and not self._is_outdated(chosen, self.held):
            return None
        plan = pipeline.plan(selection, self.output, **self.options)
        if _map_files(plan) != chosen:
            return None  # one was written to since: the next look finds it so
        self.check(plan)
        if self.held is None and self._is_up_to_date(plan, selection.left_out):
            self.held = chosen
            return None
        return plan

    def _is_outdated(self, chosen: Mapping[Path, _Files], held: Mapping[Path, _Files]) -> bool:
        """Return whether the output lacks a checkpoint, or has one that is no longer chosen."""
        rewritten = any(not self.seen[path].whole for path in held if path in self.seen)
        if rewritten and list(chosen)[-1] in held:
            return False  # an average without it would last for moments only
        new = any(held.get(path) != files for path, files in chosen.items())
        left = [path for path in held if path not in chosen and path in self.seen]
        return new or any(self.seen[path].whole for path in left)

    def _is_up_to_date(self, plan: Plan, left_out: Sequence[Path]) -> bool:
        """Return whether an earlier run's output is up to date, judging by its record.

        Checkpoints that were deleted since do not count here either.
        """
        record = provenance.read_output_record(self.output) if self.output.exists() else None
        if not isinstance(record, dict) or not isinstance(record.get("inputs"), list):
            return False
        written = checkpoints.find_file(self.output).stat().st_mtime_ns
        if any(file.version.mtime_ns > written for table in plan.tables for file in table.files):
            return False
        new = provenance.make_record(plan)
        if record == new:
            return True
        ours, theirs = (
            {one.get("name"): one.get("size") for one in inputs if isinstance(one, dict)}
            for inputs in (new.pop("inputs"), record.pop("inputs"))
        )
        del new["divisor"]  # of fewer checkpoints it is another
        record.pop("divisor", None)
        gone = theirs.keys() - ours.keys()
        if not gone:  # the same ones, averaged in another way
            return False
        return (
            record == new
            and ours.items() <= theirs.items()
            and gone.isdisjoint(path.name for path in left_out)
        )

    def _note_fewer(self, plan: Plan) -> list[str]:
        """Return a note if there are fewer checkpoints than asked for, which `average` refuses."""
        # What chooses last says how many there should be.
        given = (
            ("best", self.options.get("best")),
            ("target-count", self.options.get("target_count")),
            ("last", self.options.get("last")),
        )
        option, wanted = next((one for one in given if one[1] is not None), ("last", 0))
        if len(plan.checkpoints) >= (wanted or 0):
            return []
        return [
            f"there are fewer checkpoints than --{option} {wanted} so far; no others are waited for"
        ]


def _map_files(plan: Plan) -> dict[Path, _Files]:
    """Return the files of each checkpoint of a plan."""
    return {
        checkpoints.find_file(one.path): tuple(table.files)
        for one, table in zip(plan.checkpoints, plan.tables, strict=True)
    }


def _find_file(path: Path) -> _Files:
    """Return a file as it is now, nothing if it was deleted."""
    try:
        return (File(str(path), read_version(path)),)
    except OSError:
        return ()


def _are_unchanged(files: _Files) -> bool:
    return all(_find_file(Path(file.path)) == (file,) for file in files)
